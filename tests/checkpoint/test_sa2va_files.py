"""A Sa2VA is joined from two models, exported and read back with the same bits."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from support.checkpoints import write_random_checkpoint, write_small_checkpoint
from support.sam2_folders import small_sam2, write_sam2_folder
from vl3_jax.checkpoint import compare, load, open_source
from vl3_jax.cli.main import main
from vl3_jax.processing.tokenizer import GROUNDING_TOKENS, Tokenizer
from vl3_jax.sa2va.sa2va_config import Sa2vaConfig
from vl3_jax.sam2.sam2_config import sa2va_settings


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns the folders of a VideoLLaMA3 and of a SAM-2."""
    folder = tmp_path_factory.mktemp("models")
    write_sam2_folder(folder / "sam2", small_sam2("2.0"))
    return write_small_checkpoint(folder / "vl3"), folder / "sam2"


@pytest.fixture(scope="module")
def joined(models, tmp_path_factory):
    """Returns the Orbax folder of both."""
    target = tmp_path_factory.mktemp("joined") / "sa2va"
    assert main(["convert", "init", "--base", str(models[0]), "--sam2", str(models[1]), str(target)]) == 0
    return target


def read(source, leaf):
    out = np.empty(source.leaves[leaf].shape, source.dtypes[leaf])
    source.read(leaf, None, tuple(slice(0, size) for size in out.shape), out)
    return out


def test_what_is_joined(models, joined):
    opened, base, sam2 = map(open_source, (joined, *models))
    assert isinstance(opened.config, Sa2vaConfig)
    assert opened.config.sam2 == sa2va_settings(small_sam2("2.0"))
    for leaf in ("vision/layers/attn/q/kernel", "llm/norm/scale"):
        assert (read(opened, leaf) == read(base, leaf)).all()
    for leaf in ("decoder/iou_token", "memory_time"):
        assert (read(opened, f"sam2/{leaf}") == read(sam2, leaf)).all()
    assert (read(opened, "stock_decoder/iou_token") == read(sam2, "decoder/iou_token")).all()
    width = base.config.text.hidden_size
    kernel = read(opened, "text_hidden_fcs/fc1/kernel")
    assert kernel.shape == (width, width)
    assert 0.9 / width**0.5 < np.abs(kernel).max() <= 1 / width**0.5
    assert read(opened, "text_hidden_fcs/fc2/kernel").shape == (width, 64)


def test_tokenizer_and_tables_grow(models, joined):
    opened, base = open_source(joined), open_source(models[0])
    tokenizer, old = Tokenizer.from_folder(opened.files), Tokenizer.from_folder(base.files)
    assert [tokenizer.id_of(name) for name in GROUNDING_TOKENS] == list(range(len(old), len(old) + 5))
    rows = opened.config.chat.text.vocab_size
    assert rows == max(base.config.text.vocab_size, len(old) + 5) > base.config.text.vocab_size
    embedding = read(opened, "llm/embed/embedding")
    assert (embedding[: len(old)] == read(base, "llm/embed/embedding")).all()
    assert 0.01 < embedding[len(old) :].std() < 0.03
    assert len({row.tobytes() for row in embedding[len(old) :]}) == 5


@pytest.mark.slow
def test_tables_with_room_stay_as_they_are(models, tmp_path):
    base = write_random_checkpoint(tmp_path / "vl3")
    main(["convert", "init", "--base", str(base), "--sam2", str(models[1]), str(tmp_path / "sa2va")])
    opened = open_source(tmp_path / "sa2va")
    assert opened.config.chat == open_source(base).config
    assert (read(opened, "llm/embed/embedding") == read(open_source(base), "llm/embed/embedding")).all()
    assert Tokenizer.from_folder(opened.files).id_of("[SEG]") < 151_936


@pytest.mark.parametrize("layout", ["official", "native"])
def test_export_and_back(joined, layout, tmp_path):
    export, back = tmp_path / "export", tmp_path / "back"
    assert main(["convert", "export", str(joined), str(export), "--format", layout]) == 0
    names = set(load_file(export / "model.safetensors"))
    assert {"text_hidden_fcs.0.weight", "grounding_encoder.no_memory_embedding"} <= names
    assert "stock_mask_decoder.iou_token.weight" in names
    assert ("lm_head.weight" in names) != open_source(joined).config.chat.text.tie_word_embeddings
    assert main(["convert", "hf", str(export), str(back)]) == 0
    for folder in (export, back):
        comparison = compare(open_source(joined), open_source(folder))
        assert comparison.equal, comparison.lines
        assert open_source(folder).config.sam2 == open_source(joined).config.sam2
    config = json.loads((export / "config.json").read_text())
    assert (config.get("text_config") or config)["vocab_size"] == 1029


def test_tied_stays_tied(models, joined, tmp_path):
    tied = open_source(models[0]).config.text.tie_word_embeddings
    assert tied, "the small model is like the 2B"
    assert open_source(joined).config.chat.text.tie_word_embeddings
    assert "llm/lm_head/kernel" not in open_source(joined).leaves


def test_seed(models, joined, tmp_path):
    flags = ["--base", str(models[0]), "--sam2", str(models[1])]
    for seed in ("0", "1"):
        main(["convert", "init", *flags, str(tmp_path / seed), "--seed", seed])
    first, second = (open_source(tmp_path / seed) for seed in ("0", "1"))
    assert compare(open_source(joined), first).equal
    assert (read(first, "text_hidden_fcs/fc1/bias") != read(second, "text_hidden_fcs/fc1/bias")).all()


def test_it_loads_whole_and_as_a_chat_model(models, joined):
    params = load(joined).params
    assert {"vision", "projector", "llm", "sam2", "stock_decoder", "text_hidden_fcs"} == set(params)
    chat = load(joined, serving=True).params
    assert {"vision", "projector", "llm"} == set(chat)


def test_sam_2_1_keeps_its_version(models, tmp_path):
    write_sam2_folder(tmp_path / "sam2", small_sam2("2.1"))
    main(["convert", "init", "--base", str(models[0]), "--sam2", str(tmp_path / "sam2"), str(tmp_path / "out")])
    config = open_source(tmp_path / "out").config.sam2
    assert config == dataclasses.replace(sa2va_settings(small_sam2("2.1")), pointer_time=True, occlusion=True)


def test_errors(models, joined, tmp_path, capsys):
    base, sam2 = map(str, models)
    for flags, text in (
        ((), "give one pair"),
        (("--base", base), "give one pair"),
        (("--base", base, "--sam2", sam2, "--llm", base), "give one pair"),
        (("--base", sam2, "--sam2", sam2), "segments and does not chat"),
        (("--base", base, "--sam2", base), "is no SAM-2"),
        (("--base", str(joined), "--sam2", sam2), "draws masks already"),
    ):
        assert main(["convert", "init", *flags, str(tmp_path / "out")]) == 2
        assert text in capsys.readouterr().err
