"""Model FLOPs of one training step, counted from what a packed batch holds, and the peak rates of devices.

Useful work only, as model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) counts it: padding, masked pairs of
attention, recomputation and elementwise work are free. A multiply-add is 2 FLOPs. XLA's own count misses loops and
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
    """What a packed batch asks the model to do; those of several batches add up.

    Attributes:
      patches: patches that are no padding.
      patch_pairs: sum over frames of the square of their patches.
      vision_tokens: vision tokens that some patch is merged into.
      tokens: text positions that are no padding.
      token_pairs: sum over samples of n (n + 1) / 2, the pairs of causal attention.
      supervised: positions with a loss.
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


def count_work(batch: Mapping[str, np.ndarray]) -> StepWork:
    """Counts a packed batch, on the host: its `segment_ids`, `loss_weight`, `patch_segment` and `token_patches`."""
    samples = _segment_lengths(batch["segment_ids"])
    frames = _segment_lengths(batch["patch_segment"]) if "patch_segment" in batch else np.zeros(0, np.int64)
    vision = np.any(np.asarray(batch["token_patches"]) >= 0, axis=-1).sum() if "token_patches" in batch else 0
    return StepWork(
        patches=int(frames.sum()),
        patch_pairs=int((frames**2).sum()),
        vision_tokens=int(vision),
        tokens=int(samples.sum()),
        token_pairs=int((samples * (samples + 1) // 2).sum()),
        supervised=int(np.count_nonzero(batch["loss_weight"])),
    )


def _segment_lengths(segments: np.ndarray) -> np.ndarray:
    """Lengths of all segments of all rows ([..., N], 0 is padding), int64."""
    rows = np.asarray(segments).reshape(-1, np.shape(segments)[-1])
    lengths = [np.bincount(row)[1:] for row in rows]
    return np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, np.int64)


def step_flops(
    config: ModelConfig, work: StepWork, trained: Collection[str] = _MODULES, lora_rank: int = 0
) -> dict[str, float]:
    """FLOPs of the forward and backward passes over `work`.

    A matrix product costs as much again for the gradient of its input, if anything before it learns, and once more for
    the gradient of its weights, if they learn: three times its forward pass where everything does, once in a frozen
    tower.

    Args:
      config: sizes of the model.
      work: see `count_work`.
      trained: which of "vision", "projector", "llm" learn; "lora" for the decoder's adapters.
      lora_rank: of adapters on all linear layers of the decoder.

    Returns:
      {"vision", "projector", "llm", "unembed", "lora": FLOPs of the part, "forward": of the forward pass alone,
      "total": all}.
    """
    vision, text = config.vision, config.text
    width, out = vision.hidden_size, text.hidden_size
    query, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    layer = 2 * out * query + 2 * out * kv + 3 * out * text.intermediate_size
    adapter = _adapter_sides(out, query, kv, text.intermediate_size)
    learns = {name: name in trained for name in (*_MODULES, "lora")}
    below_projector = learns["vision"]
    below_llm = below_projector or learns["projector"]
    # Gradients reach a decoder layer's input for the layers and embeddings below it, too.
    through_llm = below_llm or learns["llm"] or learns["lora"]
    patch_embed = 2 * vision.patch_dim * width
    tower_layer = 2 * (4 * width * width + 2 * width * vision.intermediate_size)
    parts = {
        "vision": [
            (work.patches * patch_embed, False, learns["vision"]),
            (work.patches * vision.num_layers * tower_layer, learns["vision"], learns["vision"]),
            (work.patch_pairs * vision.num_layers * 4 * width, learns["vision"], learns["vision"]),
        ],
        "projector": [
            (work.vision_tokens * 2 * width * out, below_projector, learns["projector"]),
            (work.vision_tokens * 2 * out * out, below_llm, learns["projector"]),
        ],
        "llm": [
            (work.tokens * text.num_layers * 2 * layer, through_llm, learns["llm"]),
            # The two products of attention have two inputs each, and no weights.
            (work.token_pairs * text.num_layers * 4 * query, through_llm, through_llm),
        ],
        "unembed": [(work.supervised * 2 * out * text.vocab_size, through_llm, learns["llm"])],
        "lora": [(work.tokens * text.num_layers * 2 * lora_rank * adapter, through_llm, learns["lora"])],
    }
    flops = {name: float(sum(f * (1 + a + b) for f, a, b in products)) for name, products in parts.items()}
    forward = float(sum(f for products in parts.values() for f, _, _ in products))
    return {**flops, "forward": forward, "total": sum(flops.values())}


def _adapter_sides(out: int, query: int, kv: int, inner: int) -> int:
    """Inputs plus outputs of a decoder layer's linear layers: q, k, v, o, gate, up, down."""
    return 2 * (out + query) + 2 * (out + kv) + 3 * (out + inner)


def recomputed_flops(config: ModelConfig, work: StepWork, trained: Collection[str], remat: Mapping[str, str]) -> float:
    """FLOPs of the layers' forward passes that the backward pass repeats.

    Args:
      config, work, trained: see `step_flops`.
      remat: {"vision", "text": name from `vl3_jax.model.remat.POLICIES`}.
    """
    vision, text = config.vision, config.text
    width, out = vision.hidden_size, text.hidden_size
    query, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    # Of one position of a layer: the projections into attention and the MLP, and the one out of attention. That out of
    # the MLP is never repeated, since nothing but the residual takes it.
    tower_in, tower_out = 2 * (3 * width * width + width * vision.intermediate_size), 2 * width * width
    text_in, text_out = 2 * (out * (query + 2 * kv) + 2 * out * text.intermediate_size), 2 * out * query

    def repeated(policy: str, positions: int, inner: int, outer: int, pairs: int) -> int:
        products = {"none": 0, "dots": 0, "outputs": inner, "full": inner + outer}[policy]
        return positions * products + (0 if policy == "none" else pairs)

    tower = repeated(remat["vision"], work.patches, tower_in, tower_out, work.patch_pairs * 4 * width)
    decoder = repeated(remat["text"], work.tokens, text_in, text_out, work.token_pairs * 4 * query)
    return float(("vision" in trained) * vision.num_layers * tower + bool(trained) * text.num_layers * decoder)


class StepFlops:
    """Counts the FLOPs of steps of one run; of the rows that one host holds if given those.

    Args:
      config: sizes of the model.
      rates: peak learning rate of each group, None or 0 for a frozen one; if a group learns that is none of "vision",
        "projector", "llm" and "lora", the whole model counts as learning.
      lora_rank: see `step_flops`.
    """

    def __init__(self, config: ModelConfig, learning_rates: Mapping[str, float | None], lora_rank: int = 0):
        trained = {group for group, rate in learning_rates.items() if rate}
        own = trained - {*_MODULES, "lora"}
        self._config, self._trained, self._rank = config, trained | set(_MODULES if own else ()), lora_rank

    def __call__(self, batch: Mapping[str, np.ndarray]) -> float:
        """FLOPs of a step over the packed batch."""
        return step_flops(self._config, count_work(batch), self._trained, self._rank)["total"]


# Dense bfloat16 FLOP/s of one device, by a part of its `device_kind` (lower case), most specific first.
# TPU: cloud.google.com/tpu/docs, the pages "TPU v4", "v5e", "v5p", "v6e" (a device is a chip; v2 and v3 are not listed,
# theirs are half chips). GPU: NVIDIA's data sheets, without sparsity: H100 SXM5, PCIe and NVL, H200 SXM, A100.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("tpu v4", CHIPS["v4"].flops),
    ("tpu v5 lite", CHIPS["v5e"].flops),
    ("tpu v5e", CHIPS["v5e"].flops),
    ("tpu v5", CHIPS["v5p"].flops),
    ("tpu v6", CHIPS["v6e"].flops),
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("h200", 989e12),
    ("a100", 312e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device of this `jax.Device.device_kind`; None where unknown, as for a CPU."""
    kind = device_kind.lower()
    return next((peak for name, peak in PEAK_FLOPS if name in kind), None)
