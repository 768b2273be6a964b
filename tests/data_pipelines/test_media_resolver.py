"""Names of media: what is below the media folder, what leads out of it, and what is on another machine."""

import json
import os

import pytest

from data_pipelines import shard_writer
from data_pipelines.mixture_dataset import DatasetSpec
from data_pipelines.sample_errors import MISSING, OUTSIDE, UNREADABLE, BadSampleError
from data_pipelines.sources import media_resolver, open_source
from data_pipelines.sources.media_resolver import MediaResolver
from vl3_jax.cli.main import main
from vl3_jax.processing.media_source import MediaBytes
from vl3_jax.processing.remote_media import RemotePolicy

INSIDE = ["a.png", "./a.png", "sub/../a.png", "nowhere/../a.png", "{root}/a.png", "..a.png", "10:22.png", "link.png"]
OUTSIDE_NAMES = ["../b.png", "sub/../../b.png", "sub/../..//b.png", "{above}/b.png", "{root}/../b.png", "..", "/"]
REFERENCES = ["file://{above}/b.png", "file:///{root}/a.png", "memory://elsewhere/b.png", "FILE://{above}/b.png"]
QUESTION = '[{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dot."}]'


@pytest.fixture
def root(tmp_path):
    """A media folder with a file beside it."""
    root = tmp_path / "media"
    (root / "sub").mkdir(parents=True)
    for file in (root / "a.png", root / "..a.png", root / "10:22.png", tmp_path / "b.png"):
        file.write_bytes(b"pixels")
    (root / "link.png").symlink_to(tmp_path / "b.png")  # a link of the person's own folder is followed
    return root


def filled(name, root):
    return name.format(root=root, above=root.parent)


@pytest.mark.parametrize("name", INSIDE)
def test_names_below_the_folder(name, root):
    assert os.path.isfile(MediaResolver(str(root)).resolve(filled(name, root), "image"))


@pytest.mark.parametrize("name", OUTSIDE_NAMES + REFERENCES)
def test_names_that_lead_out(name, root):
    with pytest.raises(BadSampleError, match="outside: true") as refused:
        MediaResolver(str(root)).resolve(filled(name, root), "image")
    assert refused.value.kind == OUTSIDE


@pytest.mark.parametrize("name", [*OUTSIDE_NAMES, "file://{above}/b.png"])
def test_outside_allows_them(name, root):
    assert os.path.exists(MediaResolver(str(root), outside=True).resolve(filled(name, root), "image"))


def test_a_missing_file_of_a_reference_is_missing(root):
    with pytest.raises(BadSampleError) as refused:
        MediaResolver(str(root), outside=True).resolve("file:///nowhere/a%20b.png", "image")
    assert (refused.value.kind, refused.value.file) == (MISSING, "/nowhere/a b.png")


def test_frames_and_paths_of_embedded_media_are_checked_too(root):
    resolver = MediaResolver(str(root))
    for value in (["a.png", "../b.png"], {"path": "../b.png", "bytes": None}):
        with pytest.raises(BadSampleError, match="leads out"):
            resolver.resolve(value, "video")
    assert resolver.resolve({"path": "../b.png", "bytes": b"pixels"}, "image") == b"pixels"


def test_without_a_folder_names_are_below_the_working_folder(root, monkeypatch):
    monkeypatch.chdir(root)
    assert MediaResolver().resolve("a.png", "image") == "a.png"
    assert MediaResolver().resolve(str(root / "a.png"), "image")
    with pytest.raises(BadSampleError, match="leads out"):
        MediaResolver().resolve("../b.png", "image")


@pytest.mark.parametrize("name", ["simplecache::http://127.0.0.1/a.png", "zip://a.png::http://127.0.0.1/a.zip"])
def test_a_chain_of_file_systems_reaches_no_other_machine(name):
    with pytest.raises(BadSampleError, match="chains") as refused:
        MediaResolver(outside=True).resolve(name, "image")
    assert refused.value.kind == OUTSIDE


def test_a_url_below_the_root_may_be_written_out():
    import fsspec

    with fsspec.open("memory://bucket/x/a.png", "wb") as file:
        file.write(b"pixels")
    resolver = MediaResolver("memory://bucket/x")
    assert resolver.resolve("memory://bucket/x/a.png", "image") == b"pixels"
    for name in ("memory://bucket/xy/a.png", "memory://bucket/x/../y.png", "../y.png", "/etc/hostname"):
        with pytest.raises(BadSampleError, match="leads out"):
            resolver.resolve(name, "image")


def test_remote_media_are_fetched_where_the_data_set_says_so():
    address = "http://example.org/a.png"
    with pytest.raises(BadSampleError, match="remote: true") as refused:
        MediaResolver(outside=True).resolve(address, "image")
    assert refused.value.kind == OUTSIDE
    policy = RemotePolicy(resolve=lambda host, port: ["127.0.0.1"])
    with pytest.raises(BadSampleError, match="not public") as refused:
        MediaResolver(remote=policy).resolve(address, "image")
    assert refused.value.kind == UNREADABLE


def test_shards_hold_media_of_every_reference(root, monkeypatch):
    monkeypatch.setattr(media_resolver, "fetch", lambda address, policy: MediaBytes(b"pixels", address))
    names = ["http://example.org/a.png", f"file://{root.parent}/b.png", "data:image/png;base64,cGl4ZWxz", "a.png"]
    annotations = root.parent / "a.jsonl"
    annotations.write_text(json.dumps({"image": names, "conversations": json.loads(QUESTION)}) + "\n")
    spec = DatasetSpec("own", (str(annotations),), str(root), outside=True, remote=True)
    (shard,), _, errors = shard_writer.write(spec, root.parent / "shards")
    assert not errors
    assert [image["bytes"] for image in open_source(str(shard))[0].fields["image"]] == [b"pixels"] * 4


def test_check_says_how_to_allow_them(root, capsys):
    annotations = root.parent / "a.jsonl"
    annotations.write_text(f'{{"image": "../b.png", "conversations": {QUESTION}}}\n')
    command = ["data", "check", "--annotations", str(annotations), "--media", str(root), "--workers", "0"]
    assert main(command) == 1
    assert "outside the media folder" in capsys.readouterr().out
    main([*command, "--allow-outside"])
    assert "outside the media folder" not in capsys.readouterr().out
