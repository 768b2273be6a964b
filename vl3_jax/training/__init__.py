"""Training: loss, parameter groups, optimizer, state and step of a run, LoRA adapters, and model FLOPs.

`groups`, `lora`, `loss`, `optimizer`, `state` and `step` work on nested dicts of parameters and on packed batches; they
read no data and know no tokenizer. `loop` is a run from top to bottom.
"""
