"""The tasks, by kind; `data_pipelines.synthetic.registry` lists them."""
