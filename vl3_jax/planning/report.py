"""Plans as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from vl3_jax.parallel.topologies import GIB
from vl3_jax.planning.plan_step import SAMPLES_PER_ROW, TOKEN_FILL, Plan
from vl3_jax.planning.search import Candidate, pareto
from vl3_jax.text_table import text_table

_PARTS = ("vision", "projector", "llm", "unembed", "lora")


def render(plan: Plan, mfu: float, samples: int = 0) -> str:
    """Returns one plan as text.

    Args:
      plan: The plan.
      mfu: Utilisation assumed for speed and cost, 0 to 1.
      samples: Number of samples in the training data; 0 is unknown.
    """
    chips, memory, peak = plan.topology.chips, plan.memory, plan.topology.chip.peak_flops
    slices = f"{plan.topology.slices} x " if plan.topology.slices > 1 else ""
    passes = f" in {plan.grad_accum_steps} parts" if plan.grad_accum_steps > 1 else ""
    verdict = f"it fits, {plan.headroom / GIB:.2f} to spare (arguments {memory.arguments / GIB:.2f}, temporaries "
    verdict += f"{memory.temporaries / GIB:.2f})"
    if not plan.fits:
        verdict = f"it does not fit, by {-plan.headroom / GIB:.2f}"
    lines = [
        f"{slices}{plan.topology.name}: {chips} chips, mesh {axes(plan.mesh)}; a step has {plan.rows} rows{passes}, "
        f"{plan.tokens:,} tokens",
        f"HBM a chip    {memory.peak / GIB:.2f} of {plan.topology.chip.hbm_bytes / GIB:.2f} GiB: {verdict}",
    ]
    for kind, traffic in memory.collectives.items():
        lines.append(f"{kind:20}{traffic.count:7,} a step, {traffic.bytes / 1e9:8.2f} GB a chip")
    parts = ", ".join(f"{name} {flops / 1e12:.1f}" for name, flops in plan.flops.items() if flops and name in _PARTS)
    again = plan.flops["recomputed"] / plan.flops["total"]
    seconds = plan.useful_seconds / mfu
    lines += [
        f"TFLOP a chip  {plan.flops['total'] / 1e12:.1f} a step ({parts}), in rows as full as stage 4's",
        f"arithmetic    {plan.useful_seconds:.2f} s a step at the peak of {peak / 1e12:.0f} TFLOP/s; {again:.0%} more "
        "is recomputed",
    ]
    if memory.collectives:
        lines.append(f"links         {plan.link_seconds:.2f} s a step at their peak")
    lines.append(f"at {mfu:.0%} MFU    {seconds:.2f} s a step, {plan.tokens * TOKEN_FILL / seconds:,.0f} tokens/s")
    if samples:
        steps = samples / SAMPLES_PER_ROW / plan.rows
        hours = steps * seconds / 3600
        lines.append(
            f"{samples:,} samples: about {steps:,.0f} steps, {hours:,.0f} hours, {hours * chips:,.0f} chip-hours"
        )
    lines.append(f"compiled in {memory.seconds:.0f} s")
    return "\n".join(lines)


def render_change(change: Mapping[str, Any] | None, plan: Plan | None) -> str:
    """Returns the smallest change that makes a step fit, as flags, and the memory it then takes."""
    if change is None or plan is None:
        return "no change was found that makes it fit, nor a slice twice as large"
    flags = " ".join(
        f"--topology {value}" if key == "topology" else f"--config.{key}={value}" for key, value in change.items()
    )
    return f"it fits with {flags}: {plan.memory.peak / GIB:.2f} GiB"


def table(found: Sequence[tuple[Candidate, Plan | None]], mfu: float) -> str:
    """Returns the results of a search, fastest first; `*` marks those of which none is both faster and smaller."""
    best = pareto([plan for _, plan in found if plan], mfu)
    rows = [("", "mesh", "rows", "remat", "HBM GiB", "compute s", "links s", "tokens/s")]
    known = sorted(
        ((one, plan) for one, plan in found if plan), key=lambda pair: (-pair[1].speed(mfu), pair[1].memory.peak)
    )
    for one, plan in [*known, *((one, None) for one, plan in found if plan is None)]:
        settings = (axes(one.mesh), str(one.rows), one.remat)
        if plan is None:
            rows.append(("", *settings, "", "", "", "passed over"))
        elif not plan.fits:
            rows.append(("", *settings, f"{plan.memory.peak / GIB:.2f}", "", "", "does not fit"))
        else:
            numbers = (plan.memory.peak / GIB, plan.compute_seconds(mfu), plan.link_seconds)
            speed = f"{plan.speed(mfu):,.0f}"
            rows.append(("*" if plan in best else "", *settings, *(f"{number:.2f}" for number in numbers), speed))
    limit = next((plan.topology.chip.hbm_bytes for _, plan in found if plan), 0)
    legend = f"rows: at a time, of each part of the mesh; HBM: of {limit / GIB:.2f}; compute: all of it, at {mfu:.0%}"
    return "\n".join([*text_table(rows, "<<<<>>>>"), legend])


def axes(mesh: Mapping[str, int]) -> str:
    """Returns a mesh as text."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one chip"
