"""Tests what a decoded token costs on a TPU, by the compiler's estimate: cycles outside the attention kernel."""

import re

import pytest

from support.compiler import needs_compiler
from vl3_jax.parallel.topologies import parse_topology
from vl3_jax.planning.hlo import Program
from vl3_jax.planning.plan_serving import Workload, plan_serving

LARGE = 2**20  # bytes of an array, as a layer's weights and cache are
# Millions of cycles a token, of which the weights' bytes take most. What a call does once, such as unpacking masks of
# constraints (0.1 million), counts in each token.
BUDGETS = [("2b", 8, 5120, None, 9.1), ("2b", 1, 17_408, None, 10), ("7b", 8, 5120, "int8", 23.5)]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("model", "rows", "slots", "quantize", "million_cycles"), BUDGETS)
def test_decoding_stays_at_the_bandwidth_of_the_memory(model, rows, slots, quantize, million_cycles, tmp_path):
    workload = Workload(rows, prompt=slots - 1024, new=1024, patches=1024)
    plan = plan_serving(model, parse_topology("v5e:1x1"), workload, quantize=quantize, hlo=tmp_path)
    cycles = plan.programs["decode"].cost.cycles
    print(f"{model}, {rows} rows of {slots} slots: {sum(cycles.values()):,} cycles a token")
    assert plan.fits
    assert sum(cycles.values()) <= million_cycles * 1e6
    # The arguments, which are updated in place, and little else.
    decode = plan.programs["decode"]
    assert decode.temporaries < 0.05 * decode.arguments
    program = Program((tmp_path / "decode.hlo").read_text())
    for name, times in program.runs().items():
        for instruction in program.computations[name].values():
            if times > 1 and re.search(r"/llm._run_layers/while/body", instruction.op_name):
                assert instruction.opcode != "sort"
                is_copy = instruction.opcode == "copy" and "estimated_cycles" in instruction.attributes
                assert not is_copy or sum(instruction.array_bytes) < LARGE, instruction
