"""Whatever the small files of a checkpoint hold, opening and converting it gives a result or one line, in bounds."""

import functools
import itertools
import pathlib
import random
import shutil
import tempfile

import pytest

from support.bounded import run_bounded
from support.hf_folders import tiny, write_folder, write_json
from support.mutations import mutate
from vl3_jax.checkpoint import digests, open_source, write_hf, write_orbax
from vl3_jax.inference.generation_config import GenerationConfig
from vl3_jax.processing.processor_config import ProcessorConfig

HEADER = "model.safetensors"
# The files that are damaged, by folder. A file that is listed twice is damaged twice as often.
FILES = {
    "official": (
        *("config.json", "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
        *("tokenizer_config.json", "added_tokens.json", HEADER, HEADER),
    ),
    "native": ("config.json", "config.json", "preprocessor_config.json", "video_preprocessor_config.json", HEADER),
    "official-train": ("config.json",),
    "sharded": ("model.safetensors.index.json",),
    "siglip": ("config.json",),
    "adapter": ("adapter_config.json", "adapter_config.json", "adapter_model.safetensors"),
    "orbax": ("vl3.json", "vl3.json", "_METADATA"),
}


def test_mutated_files(checkpoints):
    check(checkpoints, 40)


@pytest.mark.slow
def test_many_mutated_files(checkpoints):
    check(checkpoints, 500, first=1000)


def check(checkpoints: pathlib.Path, count: int, first: int = 0) -> None:
    files = itertools.cycle([(folder, file) for folder, names in FILES.items() for file in names])
    order = random.Random(first).sample(list(itertools.islice(files, count)), count)
    inputs = [(folder, file, first + number) for number, (folder, file) in enumerate(order)]
    outcomes = run_bounded(functools.partial(use, checkpoints), inputs)
    harmful = [str(outcome) for outcome in outcomes if not outcome.harmless]
    assert not harmful, f"{len(harmful)} of {count}:\n" + "\n".join(harmful)
    assert {outcome.kind for outcome in outcomes} == {"result", "refused"}
    for outcome in outcomes:
        if outcome.kind == "refused":
            assert outcome.value.isprintable(), outcome
            assert len(outcome.value) < 3000, outcome


def use(checkpoints: pathlib.Path, mutation: tuple[str, str, int]) -> str:
    """Damages a file of a copied checkpoint, and does with it what the commands do before they compute."""
    name, file, seed = mutation
    with tempfile.TemporaryDirectory(prefix="vl3-mutation-") as temporary:
        folder, orbax = pathlib.Path(temporary, name), pathlib.Path(temporary, "out")
        shutil.copytree(checkpoints / name, folder)
        mutate(folder / file, seed)
        source = open_source(folder)
        ProcessorConfig.from_folder(source.files)
        GenerationConfig.read(source.files, [1])
        write_orbax(source, orbax, quiet=True)
        converted = open_source(orbax)
        assert digests.differing(converted, quiet=True) == []
        if converted.complete:
            for layout in ("official", "native"):
                write_hf(converted, pathlib.Path(temporary, f"as {layout}"), layout, quiet=True)
        return source.kind


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> pathlib.Path:
    """Returns a folder with a small checkpoint of each kind."""
    import numpy as np
    from safetensors.numpy import save_file

    root, config = tmp_path_factory.mktemp("mutations"), tiny()
    for layout in ("official", "native", "official-train", "siglip"):
        write_folder(root / layout, layout, config)
    write_json(root / "official" / "added_tokens.json", {"<|im_end|>": 492})
    write_folder(root / "sharded", "official", config, shards=2)
    write_orbax(open_source(root / "official"), root / "orbax", quiet=True)
    (root / "adapter").mkdir()
    pair = {"A": (4, 64), "B": (64, 4)}
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    tensors = {f"{module}.lora_{side}.weight": np.ones(shape, np.float32) for side, shape in pair.items()}
    save_file(tensors, root / "adapter" / "adapter_model.safetensors")
    content = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(root / "official"),
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "alpha_pattern": {"layers.1.self_attn.q_proj": 16},
        "rank_pattern": {},
        "fan_in_fan_out": False,
        "use_rslora": False,
        "modules_to_save": None,
    }
    write_json(root / "adapter" / "adapter_config.json", content)
    return root
