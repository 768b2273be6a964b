"""Model FLOPs of a training step, counted from the content of a packed batch, and the peak FLOP/s of devices.

Only useful work counts, as in model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): padding, masked pairs of
attention, recomputation and elementwise operations do not. A multiply-add is 2 FLOPs. XLA's own count misses loops and
kernels.
"""

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np

from vl3_jax.model.config import ModelConfig
from vl3_jax.parallel.topologies import CHIPS

_MODULES = ("vision", "projector", "llm")


@dataclasses.dataclass(frozen=True)
class StepWork:
    """Amount of work in a packed batch. The work of several batches is their sum.

    Attributes:
      patches: Number of patches, padding not counted.
      patch_pairs: Sum over images and frames of the square of their number of patches.
      vision_tokens: Number of vision tokens, padding not counted.
      tokens: Number of text positions, padding not counted.
      token_pairs: Sum over samples of n (n + 1) / 2, the pairs of causal attention.
      supervised: Number of positions with a loss.
    """

    patches: int
    patch_pairs: int
    vision_tokens: int
    tokens: int
    token_pairs: int
    supervised: int

    def __add__(self, other: "StepWork") -> "StepWork":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return StepWork(*(a + b for a, b in pairs))

    def __mul__(self, count: int) -> "StepWork":
        return StepWork(*(count * amount for amount in dataclasses.astuple(self)))


def count_work(batch: Mapping[str, np.ndarray]) -> StepWork:
    """Counts the work in a packed batch, with NumPy.

    Args:
      batch: Packed batch of which `segment_ids`, `loss_weight`, `patch_segment` and `token_patches` are read; the last
        two may be absent.
    """
    samples = _segment_lengths(batch["segment_ids"])
    frames = _segment_lengths(batch["patch_segment"]) if "patch_segment" in batch else np.zeros(0, np.int64)
    vision_tokens = np.any(np.asarray(batch["token_patches"]) >= 0, axis=-1).sum() if "token_patches" in batch else 0
    return StepWork(
        patches=int(frames.sum()),
        patch_pairs=int((frames**2).sum()),
        vision_tokens=int(vision_tokens),
        tokens=int(samples.sum()),
        token_pairs=int((samples * (samples + 1) // 2).sum()),
        supervised=int(np.count_nonzero(batch["loss_weight"])),
    )


def _segment_lengths(segments: np.ndarray) -> np.ndarray:
    """Returns the lengths of all segments of all rows, int64; `segments` is [..., N] and 0 is padding."""
    rows = np.asarray(segments).reshape(-1, np.shape(segments)[-1])
    return np.concatenate([np.zeros(0, np.int64), *(np.bincount(row)[1:] for row in rows)])


def step_flops(
    config: ModelConfig, work: StepWork, trainable: Collection[str] = _MODULES, lora_rank: int = 0
) -> dict[str, float]:
    """Computes the FLOPs of the forward and backward passes over `work`.

    The backward pass of a matrix product costs as much as its forward pass for the gradient of the input, if anything
    before it is trainable, and as much again for the gradient of the weights, if they are trainable. The total is three
    times the forward pass if everything is trainable, and the forward pass alone in a frozen tower.

    Args:
      config: Configuration of the model.
      work: Work of the step, from `count_work`.
      trainable: Trainable modules among "vision", "projector" and "llm"; "lora" for the adapters of the decoder.
      lora_rank: Rank of the adapters, which are on all linear layers of the decoder.

    Returns:
      FLOPs of the parts "vision", "projector", "llm", "unembed" and "lora", those of the forward pass as "forward", and
      the sum of the parts as "total".
    """
    vision, text = config.vision, config.text
    width, out = vision.hidden_size, text.hidden_size
    query, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    layer = 2 * out * query + 2 * out * kv + 3 * out * text.intermediate_size
    # Inputs and outputs of q and o, of k and v, and of gate, up and down.
    adapter = 2 * (out + query) + 2 * (out + kv) + 3 * (out + text.intermediate_size)
    tower, projector, llm, lora = (name in trainable for name in (*_MODULES, "lora"))
    below_llm = tower or projector
    # Gradients reach a decoder layer's input for the layers and embeddings below it, too.
    through_llm = below_llm or llm or lora
    patch_embed = 2 * vision.patch_dim * width
    tower_layer = 2 * (4 * width * width + 2 * width * vision.intermediate_size)
    parts = {
        "vision": [
            (work.patches * patch_embed, False, tower),
            (work.patches * vision.num_layers * tower_layer, tower, tower),
            (work.patch_pairs * vision.num_layers * 4 * width, tower, tower),
        ],
        "projector": [
            (work.vision_tokens * 2 * width * out, tower, projector),
            (work.vision_tokens * 2 * out * out, below_llm, projector),
        ],
        "llm": [
            (work.tokens * text.num_layers * 2 * layer, through_llm, llm),
            # The two products of attention have two inputs each, and no weights.
            (work.token_pairs * text.num_layers * 4 * query, through_llm, through_llm),
        ],
        "unembed": [(work.supervised * 2 * out * text.vocab_size, through_llm, llm)],
        "lora": [(work.tokens * text.num_layers * 2 * lora_rank * adapter, through_llm, lora)],
    }
    flops = {name: float(sum(f * (1 + a + b) for f, a, b in products)) for name, products in parts.items()}
    forward = float(sum(f for products in parts.values() for f, _, _ in products))
    return {**flops, "forward": forward, "total": sum(flops.values())}


def recomputed_flops(
    config: ModelConfig, work: StepWork, trainable: Collection[str], remat: Mapping[str, str]
) -> float:
    """Computes the FLOPs of the layers' forward passes that the backward pass repeats.

    Args:
      config: Configuration of the model.
      work: Work of the step, from `count_work`.
      trainable: Trainable modules, as for `step_flops`.
      remat: Remat policies of the layers of "vision" and "text", names from `vl3_jax.model.remat.POLICIES`.
    """
    vision, text = config.vision, config.text
    width, out = vision.hidden_size, text.hidden_size
    query, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    # FLOPs of one position in one layer: all projections but that out of the MLP, which is never repeated, since only
    # the residual stream uses its output.
    tower_products = 2 * (4 * width * width + width * vision.intermediate_size)
    text_products = 2 * (2 * out * (query + kv) + 2 * out * text.intermediate_size)

    def repeated(policy: str, products: int, pairs: int) -> int:
        return {"none": 0, "dots": 0, "outputs": products, "full": products + pairs}[policy]

    tower = repeated(remat["vision"], work.patches * tower_products, work.patch_pairs * 4 * width)
    decoder = repeated(remat["text"], work.tokens * text_products, work.token_pairs * 4 * query)
    return float(("vision" in trainable) * vision.num_layers * tower + bool(trainable) * text.num_layers * decoder)


class StepFlops:
    """Counts the FLOPs of the steps of one run.

    Args:
      config: Configuration of the model.
      learning_rates: Peak learning rate of each group of parameters, None or 0 for a frozen one. If a group other than
        "vision", "projector", "llm" and "lora" is trainable, the whole model counts as trainable.
      lora_rank: Rank of the adapters on all linear layers of the decoder.
    """

    def __init__(self, config: ModelConfig, learning_rates: Mapping[str, float | None], lora_rank: int = 0):
        trainable = {group for group, rate in learning_rates.items() if rate}
        custom_groups = trainable - {*_MODULES, "lora"}
        self._config, self._lora_rank = config, lora_rank
        self._trainable = trainable | set(_MODULES if custom_groups else ())

    def __call__(self, batch: Mapping[str, np.ndarray]) -> float:
        """Returns the FLOPs of a step over a packed batch, which may be the rows of one host."""
        return step_flops(self._config, count_work(batch), self._trainable, self._lora_rank)["total"]


# Dense bfloat16 FLOP/s of one device, by a part of its `device_kind` in lower case; the first match counts.
# TPU: cloud.google.com/tpu/docs, the pages "TPU v4", "v5e", "v5p", "v6e". A device is a chip; v2 and v3, whose devices
# are half chips, are not listed. GPU: NVIDIA's data sheets, without sparsity: H100 SXM5, PCIe and NVL, H200 SXM, A100.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("tpu v4", CHIPS["v4"].peak_flops),
    ("tpu v5 lite", CHIPS["v5e"].peak_flops),
    ("tpu v5e", CHIPS["v5e"].peak_flops),
    ("tpu v5", CHIPS["v5p"].peak_flops),
    ("tpu v6", CHIPS["v6e"].peak_flops),
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("h200", 989e12),
    ("a100", 312e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 FLOP/s of a `jax.Device.device_kind`; None if unknown, as for a CPU."""
    kind = device_kind.lower()
    return next((peak for name, peak in PEAK_FLOPS if name in kind), None)
