"""The generators of the tasks; `data_pipelines.synthetic.registry` lists them."""
