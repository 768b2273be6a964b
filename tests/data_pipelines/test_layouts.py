"""Tests that the layouts of public data sets are read as they come: their media, their turns, what is learned."""

import base64
import json

import pytest
from sample_datasets import SETTINGS, TOKENIZER, write_lines, write_tar

from data_pipelines import sample_errors, shard_writer
from data_pipelines.layouts import official
from data_pipelines.mixture_dataset import DatasetSpec
from data_pipelines.packing.lengths import compute_sample_size
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.sample_errors import BadSampleError, SampleError
from data_pipelines.sources import Record, open_source
from data_pipelines.sources.media_resolver import MediaResolver


@pytest.fixture(scope="module")
def builder():
    return SampleBuilder(TOKENIZER, SETTINGS)


@pytest.fixture
def read(builder, folder):
    """Returns a function that gives the text of a sample with "@" for vision tokens, what is learned of it, counts."""

    def call(record):
        media = MediaResolver(str(folder))
        measured = builder.measure(record, media)
        assert not isinstance(measured, SampleError), measured
        sample = builder.sample(record, media, compute_sample_size(measured[0], SETTINGS), (0, 0))
        text = "".join(
            "@" if vision else builder.tokenizer.decode([token], False)
            for token, vision in zip(sample.tokens.tolist(), sample.is_vision.tolist(), strict=True)
        )
        while "@@" in text:
            text = text.replace("@@", "@")
        learned = builder.tokenizer.decode(sample.tokens[sample.loss_weight > 0].tolist(), False)
        return text.replace("<|im_start|>", "<").replace("<|im_end|>", ">"), learned, measured[1]

    return call


def test_messages_with_parts(read, folder):
    """Fields as in https://developers.openai.com/api/docs/guides/vision-fine-tuning (messages with parts) and in the
    schema FineTuneChatCompletionRequestAssistantMessage of OpenAI's API (weight).
    """
    inline = "data:image/png;base64," + base64.b64encode((folder / "p1.png").read_bytes()).decode()
    fields = {
        "messages": [
            {"role": "system", "content": "You describe."},
            {"role": "user", "content": "Describe this artwork."},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "p0.png", "detail": "low"}},
                    {"type": "text", "text": "And"},
                    {"type": "image_url", "image_url": {"url": inline}},
                ],
            },
            {"role": "assistant", "content": "Wrong.", "weight": 0},
            {"role": "user", "content": [{"type": "text", "text": "Again."}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Right."}], "weight": 1},
        ]
    }
    text, learned, counts = read(Record(fields, "a.jsonl, line 1"))
    assert text == (
        "<system\nYou describe.>\n<user\nDescribe this artwork.>\n<user\n@\nAnd@\n>\n"
        "<assistant\nWrong.>\n<user\nAgain.>\n<assistant\nRight.>\n"
    )
    assert learned == "Right.<|im_end|>"
    assert (counts.images, counts.unknown_keys) == (2, {})


def test_messages_whose_parts_stand_for_listed_images(read):
    """Fields as in https://huggingface.co/datasets/kokimashita/wild_vision_sft (messages with parts of type and text,
    images); a part that a table stores has null for the keys that it lacks.
    """
    content = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "Noise."}]
    text, learned, _ = read(Record({"images": ["p0.png"], "messages": turns}, "a.jsonl, line 1"))
    assert (text, learned) == ("<user\n@\nWhat?>\n<assistant\nNoise.>\n", "Noise.<|im_end|>")


def test_messages_with_a_video_and_its_options(read):
    """Fields as in https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct (video, fps, max_pixels); max_frames is ours."""
    part = {"type": "video", "video": "v2.mp4", "fps": 2.0, "max_frames": 3, "max_pixels": 1000}
    turns = [{"role": "user", "content": [part, "What?"]}, {"role": "assistant", "content": "Noise."}]
    text, _, counts = read(Record({"messages": turns}, "a.jsonl, line 1"))
    assert text.count("@") == 3
    assert (counts.videos, counts.unknown_keys) == (1, {"turn.part.max_pixels": 1})


def test_sharegpt_with_tools(read):
    """Fields as in https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md (Sharegpt format: roles human,
    function_call, observation, gpt; system, tools, images).
    """
    fields = {
        "conversations": [
            {"from": "human", "value": "<image>Weather here?"},
            {"from": "function_call", "value": '{"name": "weather"}'},
            {"from": "observation", "value": "31 C"},
            {"from": "gpt", "value": "Warm."},
        ],
        "system": "Help.",
        "tools": "[]",
        "images": ["p0.png"],
    }
    text, learned, counts = read(Record(fields, "a.jsonl, line 1"))
    assert text.startswith("<system\nHelp.>\n<user\n@\nWeather here?>\n<assistant\n")
    assert "<user\n31 C>\n" in text
    assert learned == '{"name": "weather"}<|im_end|>Warm.<|im_end|>'
    assert counts.unknown_keys == {"tools": 1}


def test_llava_video(read, folder, tmp_path):
    """Fields as in https://huggingface.co/datasets/lmms-lab/LLaVA-Video-178K (id, conversations, data_source, video;
    the tag of a video is <image>).
    """
    turns = [{"from": "human", "value": "<image>\nWhat moves?"}, {"from": "gpt", "value": "A."}]
    record = {"id": "1006-89", "conversations": turns, "data_source": "0_30_s_nextqa", "video": "v0.mp4"}
    path = tmp_path / "0_30_s_mc_v0_1_qa_processed.json"
    path.write_text(json.dumps([record]))
    text, learned, counts = read(open_source(str(path))[0])
    assert "<image>" not in text
    assert text.endswith("\nWhat moves?>\n<assistant\nA.>\n")
    assert (counts.images, counts.videos, learned) == (0, 1, "A.<|im_end|>")
    assert counts.unknown_keys == {"data_source": 1}


@pytest.mark.parametrize("caption", ["a.txt", "a.json"])
def test_img2dataset(read, folder, tmp_path, caption):
    """Fields as in https://github.com/rom1504/img2dataset (README: .jpg, .txt and .json with url, caption, key, status,
    error_message, width, height, original_width, original_height, exif).
    """
    numbers = dict.fromkeys(("width", "height", "original_width", "original_height"), 64)
    facts = {"url": "http://x/a.jpg", "key": "000000001", "status": "success", "error_message": None, "exif": "{}"}
    members = {"000000001.png": (folder / "p0.png").read_bytes()}
    if caption == "a.txt":
        members["000000001.txt"] = b"Some noise.\n"
        facts["caption"] = "Some noise."
    members["000000001.json"] = json.dumps({**facts, **numbers, "caption": "Some noise."}).encode()
    text, learned, counts = read(open_source(write_tar(tmp_path / "00000.tar", members.items()))[0])
    assert (text, learned) == ("<user\n@\n>\n<assistant\nSome noise.>\n", "Some noise.<|im_end|>")
    assert counts.unknown_keys.keys() == {*facts, *numbers} - {"error_message", "caption"}


def test_the_cauldron(read, folder, tmp_path):
    """Fields as in https://huggingface.co/datasets/HuggingFaceM4/the_cauldron, and as torchtune's TheCauldronToMessages
    reads them (images, texts with user and assistant); no source was found for `source` of a text.
    """
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [{"bytes": (folder / "p0.png").read_bytes(), "path": None}]
    texts = [{"user": "What?", "assistant": "Noise.", "source": "x"}, {"user": "Sure?", "assistant": "Yes."}]
    path = str(tmp_path / "train-00000-of-00001.parquet")
    parquet.write_table(arrow.Table.from_pylist([{"images": images, "texts": texts}]), path)
    text, learned, counts = read(open_source(path)[0])
    assert text == "<user\n@\nWhat?>\n<assistant\nNoise.>\n<user\nSure?>\n<assistant\nYes.>\n"
    assert learned == "Noise.<|im_end|>Yes.<|im_end|>"
    assert (counts.images, counts.unknown_keys) == (1, {"turn.source": 1})


def test_shards_hold_every_layout(read, folder, tmp_path):
    pytest.importorskip("array_record")
    inline = "data:image/png;base64," + base64.b64encode((folder / "p1.png").read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": inline}}, {"type": "video", "video": "v2.mp4", "max_frames": 2}]
    records = [
        {"messages": [turn([*parts, "Q"]), turn("A", "assistant"), turn("B", "assistant", weight=0)], "system": "S"},
        {"images": ["p0.png"], "texts": [{"user": "Q", "assistant": "A"}], "kept": [1]},
    ]
    path = write_lines(tmp_path / "a.jsonl", records)
    shards, seen, errors = shard_writer.write(DatasetSpec("a", (path,), str(folder)), tmp_path / "out")
    assert (seen, errors) == (2, [])
    before, after = open_source(path), open_source(str(shards[0]))
    assert [read(after[n]) for n in range(2)] == [read(before[n]) for n in range(2)]


def test_a_table_may_store_turns_as_columns(read):
    """A sequence of objects in the data sets of Hugging Face and TFDS is an object of sequences in a table."""
    columns = {"from": ["human", "gpt"], "value": ["Q", "A"], "loss": [None, True]}
    assert read(Record({"conversations": columns}, "a, row 1"))[1] == "A<|im_end|>"


def test_a_caption_is_an_answer(read, tmp_path):
    """No published source of these fields in a JSON file was found."""
    source = open_source(write_lines(tmp_path / "a.jsonl", [{"image": "p0.png", "caption": " Noise. "}]))
    assert read(source[0])[:2] == ("<user\n@\n>\n<assistant\nNoise.>\n", "Noise.<|im_end|>")


def turn(content, role="user", **more):
    return {"role": role, "content": content, **more}


IMAGE = {"type": "image", "image": "p0.png"}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"messages": [turn(None, "assistant", function_call={"name": "f"})]}, sample_errors.BAD_RECORD),
        ({"messages": [turn([IMAGE, {"type": "image"}])]}, sample_errors.BAD_RECORD),
        ({"messages": [turn([IMAGE])], "images": ["p1.png"]}, sample_errors.BAD_RECORD),
        ({"messages": [turn([{"type": "image", "image": "a.png", "path": "b.png"}])]}, sample_errors.BAD_RECORD),
        ({"messages": [turn([{"type": "image_url", "image_url": {"href": "a"}}])]}, sample_errors.BAD_RECORD),
        (
            {"messages": [turn([{"type": "image_url", "image_url": "data:image/png;base64,?"}])]},
            sample_errors.BAD_RECORD,
        ),
        ({"messages": [turn([{"type": "image_url", "image_url": "data:image/png,"}])]}, sample_errors.BAD_RECORD),
        ({"messages": [turn([{"type": "input_audio", "input_audio": {}}])]}, sample_errors.TAGS),
        ({"messages": [turn([{"type": "text"}])]}, sample_errors.BAD_RECORD),
        ({"messages": [turn([3])]}, sample_errors.BAD_RECORD),
        ({"messages": [turn(None, "assistant", tool_calls=[{}])]}, sample_errors.BAD_RECORD),
        ({"messages": [turn("Q", value="Q")]}, sample_errors.BAD_RECORD),
        ({"messages": [{"content": "Q"}]}, sample_errors.BAD_RECORD),
        ({"messages": {}}, sample_errors.EMPTY),
        ({"messages": {"role": ["user"], "content": []}}, sample_errors.BAD_RECORD),
        ({"texts": ["Q", None]}, sample_errors.BAD_RECORD),
        ({"caption": "no image"}, sample_errors.BAD_RECORD),
        (None, sample_errors.BAD_RECORD),
    ],
)
def test_what_no_layout_allows(fields, kind):
    with pytest.raises(BadSampleError) as caught:
        official(fields)
    assert caught.value.kind == kind


def test_an_official_record_stays_as_it_is():
    part = {"type": "video", "video": "v.mp4", "fps": 2, "x": 1}
    fields = {"messages": [turn([part, "Q"]), turn("A", "assistant")], "id": 3}
    once = official(fields)
    assert official(once) == once
    assert once["video"] == [{"path": "v.mp4", "fps": 2}]
