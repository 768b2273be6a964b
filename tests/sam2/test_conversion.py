"""SAM-2 checkpoints of transformers and Meta: names, round trips, refusals, and models on several devices."""

import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from support.sam2_folders import random_sam2_tensors, small_sam2, write_sam2_folder
from support.tolerances import REORDERED, relative_error
from vl3_jax import sam2
from vl3_jax.checkpoint import load, name_map
from vl3_jax.checkpoint.sam2_names import SAM2_LAYOUTS
from vl3_jax.cli.main import main
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.sam2.sam2_config import SIZES, sam2_preset
from vl3_jax.sam2.sam2_model import abstract_sam2

PARAMETERS = {  # with the random frequencies of the prompt encoder, 2 x 128
    ("tiny", "2.0"): 38_945_986 + 256,
    ("tiny", "2.1"): 38_962_498 + 256,
    ("small", "2.0"): 46_043_842 + 256,
    ("small", "2.1"): 46_060_354 + 256,
    ("base-plus", "2.0"): 80_833_666 + 256,
    ("base-plus", "2.1"): 80_850_178 + 256,
    ("large", "2.0"): 224_430_130 + 256,
    ("large", "2.1"): 224_446_642 + 256,
}


def assert_equal(first: dict, second: dict) -> None:
    assert set(first) == set(second), set(first) ^ set(second)
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name], err_msg=name)


@pytest.mark.parametrize("version", ["2.0", "2.1"])
@pytest.mark.parametrize("size", SIZES)
def test_released_sizes(size, version):
    config = sam2_preset(size, version)
    names = name_map("sam2", config)
    assert sum(leaf.size for leaf in names.leaves.values()) == PARAMETERS[size, version]
    assert len(names.tensors) == 901 - 3 * (version == "2.0") or size != "large"
    for layout in SAM2_LAYOUTS:
        leaves = name_map(layout, config).leaves
        assert {path: leaf.shape for path, leaf in leaves.items()} == {
            p: leaf.shape for p, leaf in names.leaves.items()
        }


@pytest.mark.parametrize(
    "config",
    [
        small_sam2("2.0"),
        *(pytest.param(config, marks=pytest.mark.slow) for config in (small_sam2(), *map(sam2_preset, SIZES))),
    ],
)
def test_leaves_are_the_models_parameters(config):
    paths = jax.tree_util.tree_flatten_with_path(abstract_sam2(config))[0]
    expected = {"/".join(key.key for key in path): leaf.shape for path, leaf in paths}
    assert {path: leaf.shape for path, leaf in name_map("sam2", config).leaves.items()} == expected


@pytest.mark.parametrize("layout", SAM2_LAYOUTS)
def test_both_directions_are_inverse(layout):
    config = small_sam2()
    for name, tensor in random_sam2_tensors(config, layout).items():
        spec = name_map(layout, config).tensors[name]
        leaf = spec.to_leaf(tensor)
        assert leaf.shape == spec.slice_shape
        np.testing.assert_array_equal(spec.to_tensor(np.ascontiguousarray(leaf)), tensor)


@pytest.mark.parametrize("version", ["2.0", "2.1"])
@pytest.mark.parametrize("layout", ["sam2", "sam2-meta"])
def test_round_trips(tmp_path, capsys, layout, version):
    config = small_sam2(version)
    tensors = write_sam2_folder(tmp_path / "in", config, layout)
    assert main(["convert", "hf", str(tmp_path / "in"), str(tmp_path / "orbax")]) == 0
    same, other = ("native", "official") if layout == "sam2" else ("official", "native")
    for name, target in ((same, "same"), (other, "other")):
        assert main(["convert", "export", str(tmp_path / "orbax"), str(tmp_path / target), "--format", name]) == 0
    assert_equal(load_file(tmp_path / "same" / "model.safetensors"), tensors)
    assert main(["convert", "export", str(tmp_path / "other"), str(tmp_path / "back"), "--format", same]) == 0
    assert_equal(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    for name in ("in", "orbax", "other"):
        assert main(["convert", "verify", str(tmp_path / name), str(tmp_path / "back")]) == 0
        assert load(tmp_path / name).config == config
    capsys.readouterr()
    assert main(["convert", "inspect", str(tmp_path / "orbax")]) == 0
    total = sum(leaf.size for leaf in jax.tree.leaves(abstract_sam2(config)))
    assert re.search(rf"total +float32 +{total:,}", capsys.readouterr().out)


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_folders_of_transformers(tmp_path, version):
    """What transformers saves is read, and what is exported is read by transformers."""
    pytest.importorskip("transformers")
    from support.sam2_reference import sam2_reference, sam2_tensors, tiny_sam2

    reference = sam2_reference(tiny_sam2(version))
    reference.save_pretrained(tmp_path / "in")
    assert load(tmp_path / "in").config == tiny_sam2(version)
    assert main(["convert", "hf", str(tmp_path / "in"), str(tmp_path / "orbax")]) == 0
    assert main(["convert", "export", str(tmp_path / "orbax"), str(tmp_path / "out"), "--format", "official"]) == 0
    assert main(["convert", "export", str(tmp_path / "out"), str(tmp_path / "back"), "--format", "native"]) == 0
    again = type(reference).from_pretrained(tmp_path / "back")
    assert_equal(sam2_tensors(again), sam2_tensors(reference))
    assert load(tmp_path / "back").config == load(tmp_path / "in").config


def test_file_of_meta(tmp_path):
    """The released sizes are recognised by their weights; nothing but the file is there."""
    torch = pytest.importorskip("torch")
    config = sam2_preset("tiny", "2.0")
    names = name_map("sam2-meta", config)
    state = {name: torch.zeros(1).expand(spec.shape) for name, spec in names.tensors.items()}
    folder = tmp_path / "sam2"
    folder.mkdir()
    torch.save({"model": state}, folder / "sam2_hiera_tiny.pt")
    from vl3_jax.checkpoint import open_source

    source = open_source(folder)
    assert (source.config, source.kind) == (config, "sam2-meta")


def test_wrong_tensors_are_listed_at_once(tmp_path, capsys):
    extra = {"stranger": np.zeros(3, np.float32), "no_memory_embedding": np.zeros((1, 1, 7), np.float32)}
    tensors = write_sam2_folder(tmp_path / "in", small_sam2(), **extra)
    del tensors["no_object_pointer"]
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    assert main(["convert", "hf", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for text in (
        "missing: no_object_pointer",
        "unexpected: stranger",
        "no_memory_embedding (1, 1, 7) instead of (1, 1, 64)",
    ):
        assert text in error, error


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image_size": 100}, "image_size is 100"),
        ({"image_size": [128, 64]}, "only square images"),
        ({"max_cond_frame_num": 4}, "max_cond_frame_num is 4; only -1 is supported"),
        ({"memory_fuser_embed_dim": 32}, "memory_fuser_embed_dim is 32; expected 64"),
        ({"vision_config": {"backbone_config": {"blocks_per_stage": "x"}}}, "blocks_per_stage"),
        ({"num_maskmem": -1}, "num_maskmem is -1"),
        ({"max_object_pointers_in_encoder": 5}, "num_pointers is 5, less than num_memories 7"),
        ({"enable_occlusion_spatial_embedding": False}, "unexpected: occlusion_spatial_embedding_parameter"),
    ],
)
def test_wrong_settings(tmp_path, capsys, change, text):
    write_sam2_folder(tmp_path / "in", small_sam2(), change=change)
    assert main(["convert", "inspect", str(tmp_path / "in")]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_copies_that_differ(tmp_path, capsys):
    write_sam2_folder(
        tmp_path / "in", small_sam2(), **{"shared_image_embedding.positional_embedding": np.ones((2, 32), np.float32)}
    )
    assert main(["convert", "inspect", str(tmp_path / "in")]) == 2
    assert "shared_image_embedding.positional_embedding differs from prompt_encoder" in capsys.readouterr().err


def test_no_chat_model(tmp_path, capsys):
    write_sam2_folder(tmp_path / "in", small_sam2())
    assert main(["ask", "--model", str(tmp_path / "in"), "Who is there?"]) == 2
    assert "segments and does not chat" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compile")
def test_sharded_equals_one_device(tmp_path):
    """Features of images, and masks of two objects that are there in a video."""
    weights = {name: 0.1 * tensor for name, tensor in random_sam2_tensors(small_sam2()).items()}
    weights["mask_decoder.pred_obj_score_head.proj_out.bias"] += 10
    write_sam2_folder(tmp_path / "in", small_sam2(), **weights)
    frames = np.random.default_rng(1).integers(0, 256, (4, 128, 128, 3), np.uint8)
    prompts = [sam2.Prompt(0, 1, [(30, 40, 1)]), sam2.Prompt(1, 2, box=(5, 5, 90, 60))]

    def results(model: sam2.Segmenter) -> list:
        tracked = model.track(frames, prompts, chunk=4)
        return [model.encode(frames[0]).features, [(frame.logits, frame.presence) for frame in tracked]]

    expected = results(sam2.load(tmp_path / "in"))
    for logits, presence in expected[1]:
        assert presence.min() > 0
        assert all(0 < (mask > 0).mean() < 1 for mask in logits)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    with jax.set_mesh(mesh):
        model = sam2.load(tmp_path / "in", mesh=mesh)
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(model.params))
        ours = results(model)
    for first, second in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert relative_error(first, second) <= REORDERED
