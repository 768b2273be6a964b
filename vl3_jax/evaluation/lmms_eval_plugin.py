"""What lmms-eval finds by the entry point of this package: the name of its model class, which is imported when used."""


def manifest():
    """Returns the `ModelManifest` of `vl3_jax`; needs lmms-eval, which calls this."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vl3_jax", chat_class_path="vl3_jax.evaluation.lmms_eval_model.VL3JaxModel")
