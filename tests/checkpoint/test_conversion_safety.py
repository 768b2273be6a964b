"""A conversion removes nothing that it did not make, commits nothing that it did not read, and has digests."""

import json
import pathlib
import random
import shutil
import subprocess
import sys

import pytest

from support.hf_folders import assert_same_tensors, read_tensors, tiny, write_folder
from vl3_jax.checkpoint import open_source, orbax_write
from vl3_jax.cli.main import main
from vl3_jax.cli.streams import EXIT_INTERRUPTED


def convert(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def refused(capfd, *arguments) -> str:
    """Asserts that a command fails with one line, and returns the line."""
    capfd.readouterr()
    assert convert(*arguments) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("vl3 ")]
    return line


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> pathlib.Path:
    """Returns a folder with a checkpoint `hf` and its conversion `orbax`."""
    root = tmp_path_factory.mktemp("safety")
    write_folder(root / "hf", "official", tiny(tied=False))
    assert convert("hf", root / "hf", root / "orbax") == 0
    return root


@pytest.fixture
def interrupted(folders, tmp_path, monkeypatch) -> pathlib.Path:
    """Returns `out.converting`, an unfinished conversion to `out`."""

    def stop(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(orbax_write, "_finish", stop)
        assert convert("hf", folders / "hf", tmp_path / "out") == EXIT_INTERRUPTED
    return tmp_path / "out.converting"


@pytest.mark.parametrize("seed", range(10))
def test_digests_find_a_flipped_bit(folders, tmp_path, capsys, seed):
    damaged = tmp_path / "damaged"
    shutil.copytree(folders / "orbax", damaged)
    assert convert("verify", "--digests", damaged) == 0
    rng = random.Random(seed)
    files = sorted(file for file in damaged.rglob("*") if file.is_file() and not file.name.startswith(".vl3_"))
    file = rng.choices(files, [file.stat().st_size for file in files])[0]
    content, bit = bytearray(file.read_bytes()), rng.randrange(8 * file.stat().st_size)
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    assert convert("verify", "--digests", damaged) in (1, 2)
    if file.parent != damaged and file.name[0].isdigit():  # a chunk
        assert f"{file.parent.name.replace('.', '/')} is not what was written" in capsys.readouterr().out


def test_digests_find_a_changed_setting(folders, tmp_path, capsys):
    shutil.copytree(folders / "orbax", tmp_path / "o")
    info = tmp_path / "o" / "vl3.json"
    info.write_text(info.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    (tmp_path / "o" / "assets" / "generation_config.json").unlink()
    assert convert("verify", "--digests", tmp_path / "o") == 1
    output = capsys.readouterr().out
    assert "vl3.json is not what was written" in output
    assert "assets/generation_config.json is not what was written" in output
    assert convert("verify", "--digests", folders / "orbax", folders / "hf", "--no-logits") == 2


@pytest.mark.parametrize("files", ["other", "null"])
def test_digests_without_those_of_files_are_damaged(folders, tmp_path, capsys, files):
    shutil.copytree(folders / "orbax", tmp_path / "o")
    info = json.loads((tmp_path / "o" / "vl3.json").read_text())
    info["digests"] |= {"other": info["digests"].pop("files")} if files == "other" else {"files": None}
    (tmp_path / "o" / "vl3.json").write_text(json.dumps(info))
    assert convert("verify", "--digests", tmp_path / "o") == 1
    assert "vl3.json is not what was written" in capsys.readouterr().out


@pytest.mark.parametrize("origin", [{"name": "a/b", "layout": []}, {"layout": "native"}, ["native"]])
def test_damaged_origins_are_none(folders, tmp_path, origin):
    shutil.copytree(folders / "orbax", tmp_path / "o")
    info = json.loads((tmp_path / "o" / "vl3.json").read_text())
    (tmp_path / "o" / "vl3.json").write_text(json.dumps(info | {"origin": origin}))
    assert open_source(tmp_path / "o").origin is None


def test_what_has_no_digests_is_refused(folders, capfd):
    assert "has no digests" in refused(capfd, "verify", "--digests", folders / "hf")
    assert "give two checkpoints" in refused(capfd, "verify", folders / "hf")


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_damaged_chunks_are_one_line(folders, tmp_path, capfd, damage):
    shutil.copytree(folders / "orbax", tmp_path / "o")
    chunk = tmp_path / "o" / "llm.layers.mlp.up.kernel" / "1.0.0"
    chunk.unlink() if damage == "missing" else chunk.write_bytes(chunk.read_bytes()[:-2])
    export = ("export", tmp_path / "o", tmp_path / "back", "--format", "native")
    for command in (export, ("verify", tmp_path / "o", folders / "hf"), ("verify", "--digests", tmp_path / "o")):
        assert "llm/layers/mlp/up/kernel cannot be read" in refused(capfd, *command)
    assert not (tmp_path / "back").exists()


def test_a_folder_of_the_user_named_converting_is_kept(folders, tmp_path, capfd):
    (tmp_path / "out.converting").mkdir()
    (tmp_path / "out.converting" / "thesis.txt").write_text("x")
    assert "out.converting: exists already and holds other data" in refused(
        capfd, "hf", folders / "hf", tmp_path / "out"
    )
    assert (tmp_path / "out.converting" / "thesis.txt").read_text() == "x"
    (tmp_path / "new.converting").write_text("a file")
    assert "new.converting: File exists" in refused(capfd, "hf", folders / "hf", tmp_path / "new")


def test_links_are_kept(folders, tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "out.converting").symlink_to(tmp_path / "mine")
    assert "out.converting: is a link" in refused(capfd, "hf", folders / "hf", tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert "link: is a link" in refused(capfd, "hf", folders / "hf", tmp_path / "link")
    assert list((tmp_path / "mine").iterdir()) == []


def test_starting_over_keeps_what_the_conversion_did_not_make(folders, tmp_path, interrupted, capfd):
    (interrupted / "notes.txt").write_text("x")
    (tmp_path / "mine").mkdir()
    shutil.rmtree(interrupted / "llm.norm.scale")
    (interrupted / "llm.norm.scale").symlink_to(tmp_path / "mine")
    other = ("hf", folders / "hf", tmp_path / "out", "--dtype", "float32")
    assert "it holds llm.norm.scale, notes.txt" in refused(capfd, *other)
    (interrupted / "notes.txt").unlink()
    (interrupted / "llm.norm.scale").unlink()
    (interrupted / ".vl3_complete.json").write_text("{}")  # written just before the folder is renamed
    assert convert(*other) == 0


def test_a_resumed_conversion_has_its_digests(folders, tmp_path, interrupted):
    (interrupted / "vision.patch_embed.bias" / "0").unlink()
    assert convert("hf", folders / "hf", tmp_path / "out") == 0
    assert convert("verify", "--digests", tmp_path / "out") == 0


@pytest.mark.parametrize("record", ["[]", "5", "[[[1]], null]", '["x"]', "{}", "\x00"])
def test_damaged_records(folders, tmp_path, interrupted, capfd, record):
    with open(interrupted / ".vl3_progress.jsonl", "a") as file:
        file.write(record + "\n")
    assert "not a written piece; remove the folder" in refused(capfd, "hf", folders / "hf", tmp_path / "out")


@pytest.mark.parametrize("record", ["[]", "5", "", "{}", "\x00"])
def test_damaged_mark_of_completeness(folders, tmp_path, capfd, record):
    shutil.copytree(folders / "orbax", tmp_path / "out")
    (tmp_path / "out" / ".vl3_complete.json").write_text(record)
    assert "holds other data" in refused(capfd, "hf", folders / "hf", tmp_path / "out")


@pytest.mark.parametrize("target", ["file", "file/below", "x" * 250, "x" * 300, "/", "."])
def test_odd_destinations(folders, tmp_path, capfd, target, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    for command in (("hf",), ("export", "--format", "native")):
        refused(capfd, *command[:1], folders / "orbax" if len(command) > 1 else folders / "hf", target, *command[1:])
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("change", ["weights", "tokenizer.json", "shorter", "gone"])
def test_a_source_that_changes_is_noticed(folders, tmp_path, monkeypatch, capfd, change):
    source, original = tmp_path / "hf", orbax_write._write_arrays
    shutil.copytree(folders / "hf", source)
    file = source / ("model.safetensors" if change != "tokenizer.json" else change)

    def changing(*arguments):
        if change in ("weights", "tokenizer.json"):
            original(*arguments)
        if change == "gone":
            file.unlink()
        else:
            content = file.read_bytes()
            file.write_bytes(content[:2000] if change == "shorter" else content[:-1] + b" ")
        if change in ("shorter", "gone"):
            original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(orbax_write, "_write_arrays", changing)
        assert "has changed" in refused(capfd, "hf", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.copy(folders / "hf" / file.name, file)
    assert convert("hf", source, tmp_path / "out") == 0
    assert convert("export", tmp_path / "out", tmp_path / "back", "--format", "official") == 0
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(folders / "hf"))


def test_an_export_of_changed_files_is_not_complete_already(folders, tmp_path, capfd):
    shutil.copytree(folders / "orbax", tmp_path / "o")
    export = ("export", tmp_path / "o", tmp_path / "back", "--format", "official")
    assert convert(*export) == 0
    assert convert(*export) == 0
    (tmp_path / "o" / "assets" / "generation_config.json").unlink()
    assert "holds other data" in refused(capfd, *export)


def test_conversions_do_not_import_jax(folders, tmp_path):
    """Its import would take as long as converting a gigabyte."""
    code = (
        "import sys; from vl3_jax.cli.main import main; "
        "assert main(['convert', 'hf', *sys.argv[1:3]]) == 0; "
        "assert main(['convert', 'export', *sys.argv[2:4], '--format', 'native']) == 0; "
        "assert 'jax' not in sys.modules"
    )
    arguments = [str(folder) for folder in (folders / "hf", tmp_path / "o", tmp_path / "back")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
