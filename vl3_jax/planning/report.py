"""Plans as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from vl3_jax.parallel.topologies import GIB
from vl3_jax.planning.plan_step import Plan
from vl3_jax.planning.search import Candidate, pareto
from vl3_jax.text_table import text_table
from vl3_jax.training.run_config import RunConfig

SPARE = 0.1  # share of the memory that a recommended plan leaves free
_PARTS = ("vision", "projector", "llm", "unembed", "lora")


def render(plan: Plan, samples: int = 0) -> str:
    """Returns one plan as text.

    Args:
      plan: The plan.
      samples: Number of samples in the training data; 0 is unknown.
    """
    chip, program, chips = plan.topology.chip, plan.program, plan.topology.chips
    slices = f"{plan.topology.slices} x " if plan.topology.slices > 1 else ""
    passes = f" in {plan.grad_accum_steps} parts" if plan.grad_accum_steps > 1 else ""
    verdict = f"it fits, {plan.headroom / GIB:.2f} to spare (arguments {program.arguments / GIB:.2f}, temporaries "
    verdict += f"{program.temporaries / GIB:.2f})"
    if not plan.fits:
        verdict = f"it does not fit, by {-plan.headroom / GIB:.2f}"
    lines = [
        f"{slices}{plan.topology.name}: {chips} chips, mesh {axes(plan.mesh)}; a step has {plan.rows} rows{passes}, "
        f"in most of {plan.length:,} tokens",
        f"HBM a chip    {program.peak / GIB:.2f} of {chip.hbm_bytes / GIB:.2f} GiB: {verdict}",
    ]
    if not plan.fits:
        return "\n".join(lines)
    for kind, traffic in program.cost.collectives.items():
        lines.append(f"{kind:20}{traffic.count:7,} a step, {traffic.bytes / 1e9:8.2f} GB a chip")
    parts = ", ".join(f"{name} {flops / 1e12:.1f}" for name, flops in plan.flops.items() if flops and name in _PARTS)
    again = plan.flops["recomputed"] / plan.flops["total"]
    cycles = ", ".join(f"{scope} {count / 1e9:.2f}" for scope, count in program.cost.cycles.items())
    lines += [
        f"TFLOP a chip  {plan.flops['total'] / 1e12:.1f} a step ({parts}), in rows as full as stage 4's: "
        f"{plan.useful_share:.0%} is no padding; {again:.0%} more is recomputed",
        f"Gcycles       {sum(program.cost.cycles.values()) / 1e9:.2f} a step ({cycles}), kernels not included",
        f"seconds       {plan.seconds:.2f} a step: "
        + ", ".join(f"{name} {seconds:.2f}" for name, seconds in plan.parts.items())
        + f"; {plan.useful_seconds:.2f} of useful arithmetic at the peak of {chip.peak_flops / 1e12:.0f} TFLOP/s",
        f"predicted     {plan.predicted_mfu:.0%} MFU, {plan.speed:,.0f} tokens/s",
    ]
    if samples:
        steps = samples / plan.samples
        hours = steps * plan.seconds / 3600
        lines.append(
            f"{samples:,} samples: about {steps:,.0f} steps, {hours:,.0f} hours, {hours * chips:,.0f} chip-hours"
        )
    lines.append(f"compiled in {program.seconds:.0f} s")
    return "\n".join(lines)


def render_fastest(config: RunConfig, found: Sequence[tuple[Candidate, Plan | None]]) -> str:
    """Returns the fastest plan of a search that leaves some memory free, as flags; empty if there is none."""
    fitting = [(one, plan) for one, plan in found if plan and plan.headroom >= SPARE * plan.topology.chip.hbm_bytes]
    if not fitting:
        return ""
    best, plan = max(fitting, key=lambda pair: pair[1].speed)
    flags = " ".join(f"--config.{key}={value}" for key, value in best.settings(config).items())
    return f"fastest with {SPARE:.0%} of the memory to spare, {plan.predicted_mfu:.0%} MFU: {flags}"


def render_change(change: Mapping[str, Any] | None, plan: Plan | None) -> str:
    """Returns the smallest change that makes a step fit, as flags, and the memory it then takes."""
    if change is None or plan is None:
        return "no change was found that makes it fit, nor a slice twice as large"
    flags = " ".join(
        f"--topology {value}" if key == "topology" else f"--config.{key}={value}" for key, value in change.items()
    )
    return f"it fits with {flags}: {plan.program.peak / GIB:.2f} GiB"


def table(found: Sequence[tuple[Candidate, Plan | None]]) -> str:
    """Returns the results of a search, fastest first; `*` marks those of which none is both faster and smaller."""
    best = pareto([plan for _, plan in found if plan])
    rows = [("", "mesh", "rows", "remat", "HBM GiB", "seconds", "MFU", "tokens/s")]
    known = sorted(
        ((one, plan) for one, plan in found if plan), key=lambda pair: (-pair[1].speed, pair[1].program.peak)
    )
    for one, plan in [*known, *((one, None) for one, plan in found if plan is None)]:
        settings = (axes(one.mesh), str(one.rows), one.remat)
        if plan is None:
            rows.append(("", *settings, "", "", "", "passed over"))
        elif not plan.fits:
            rows.append(("", *settings, f"{plan.program.peak / GIB:.2f}", "", "", "does not fit"))
        else:
            numbers = (f"{plan.program.peak / GIB:.2f}", f"{plan.seconds:.2f}", f"{plan.predicted_mfu:.0%}")
            rows.append(("*" if plan in best else "", *settings, *numbers, f"{plan.speed:,.0f}"))
    limit = next((plan.topology.chip.hbm_bytes for _, plan in found if plan), 0)
    legend = (
        f"rows: at a time, of each part of the mesh; HBM: of {limit / GIB:.2f}; seconds, MFU and tokens/s: predicted"
    )
    return "\n".join([*text_table(rows, "<<<<>>>>"), legend])


def axes(mesh: Mapping[str, int]) -> str:
    """Returns a mesh as text."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one chip"
