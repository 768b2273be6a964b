"""`vl3 track` as people run it: videos, images, prompts of all kinds, models of all layouts; bad input is one line."""

import json
import os

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools.mask import decode

from support.media import MEDIA, write_audio, write_video
from support.sam2_folders import small_sam2, write_sam2_folder
from vl3_jax import sam2
from vl3_jax.cli.main import main
from vl3_jax.processing.videos import open_video

pytestmark = pytest.mark.usefixtures("fast_compile")
HEIGHT, WIDTH, FRAMES = 48, 64, 5
CLICK = ["--prompt", "0:cat:point=30,20,1"]
PRESENCE = "mask_decoder.pred_obj_score_head.proj_out.bias"  # large, so that the objects are there
ONE = [sam2.Prompt(0, "cat", [(30, 20, 1)])]
SEVERAL = [
    sam2.Prompt(0, "cat", [(30, 20, 1), (2, 2, 0)]),
    sam2.Prompt(3, "cat", [(10, 10, 0)], correction=True),
    sam2.Prompt(1, "2", [(40, 30, 1)], box=(20, 10, 60, 40)),
    sam2.Prompt(2, "2", mask="mask.png"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, a video, an image, and files that are none of these."""
    folder = tmp_path_factory.mktemp("track")
    write_sam2_folder(folder / "sam2", small_sam2(), **{PRESENCE: np.full(1, 1e6, np.float32)})
    write_video(folder / "video.mp4", [40 * number for number in range(FRAMES)], HEIGHT, WIDTH)
    write_audio(folder / "song.m4a")
    write_video(folder / "none.mp4", [])
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(folder / "image.png")
    Image.new("L", (WIDTH, HEIGHT), 255).save(folder / "mask.png")
    Image.new("L", (WIDTH + 1, HEIGHT), 255).save(folder / "other.png")
    (folder / "text.png").write_text("no picture")
    (folder / "empty").mkdir()
    write_sam2_folder(folder / "wrong", small_sam2(), no_memory_embedding=np.zeros((1, 1, 7), np.float32))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return sam2.load(folder / "sam2")


def track(*words, model="sam2", source=("--video", "video.mp4")):
    return main(["track", "--model", model, *source, *words])


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def read_png(path) -> np.ndarray:
    image = Image.open(path)
    assert image.mode == "L"
    pixels = np.asarray(image)
    assert set(np.unique(pixels)) <= {0, 255}
    return pixels > 0


def video_frames(path) -> list[Image.Image]:
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


@pytest.mark.parametrize(
    ("words", "prompts"),
    [
        ("0:cat:point=30,20,1", ONE),
        pytest.param(
            "0:cat:point=30,20;2,2,0 1:2:point=40,30,1 1:2:box=20,10,60,40 2:2:mask=mask.png 3:cat:correction=10,10,0",
            SEVERAL,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_video(model, words, prompts, tmp_path, capsys):
    """Prompts of all kinds; pictures, the JSON object and the overlay are those of the masks that Python gives."""
    out, overlay = tmp_path / "new" / "masks", tmp_path / "overlay.mp4"
    prompt_words = [word for prompt in words.split() for word in ("--prompt", prompt)]
    assert track(*prompt_words, "--out", str(out), "--overlay", str(overlay), "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["frames"] == {"indices": [*range(FRAMES)], "timestamps": pytest.approx([0, 0.04, 0.08, 0.12, 0.16])}
    frames = list(model.track("video.mp4", prompts))
    assert [*result["masks"]] == [*frames[0].objects] == [*dict.fromkeys(prompt.obj for prompt in prompts)]
    for frame in frames:
        for number, obj in enumerate(frame.objects):
            entry = result["masks"][obj][str(frame.index)]
            mask = read_png(out / obj / f"{frame.index}.png")
            assert mask.any()
            np.testing.assert_array_equal(mask, frame.masks[number])
            np.testing.assert_array_equal(mask, decode(entry))
            assert entry["score"] == pytest.approx(frame.scores[number], rel=1e-5)
            assert entry["object_score"] == pytest.approx(frame.presence[number], rel=1e-5)
    assert [frame.size for frame in video_frames(overlay)] == [(WIDTH, HEIGHT)] * FRAMES
    assert {path.name for path in out.iterdir()} == {*frames[0].objects}


def test_backwards_in_other_formats(model, tmp_path, capsys):
    words = ["--prompt", "2:1:point=30,20,1", "--reverse"]
    assert track(*words, "--format", "npy", "--out", str(tmp_path / "all")) == 0
    assert capsys.readouterr().out == f"1: in {FRAMES} of {FRAMES} frames, {tmp_path / 'all' / '1'}\n"
    frames = list(model.track("video.mp4", [sam2.Prompt(2, 1, [(30, 20, 1)])], reverse=True))
    assert [frame.index for frame in frames] == [4, 3, 2, 1, 0]
    for frame in frames:
        np.testing.assert_array_equal(np.load(tmp_path / "all" / "1" / f"{frame.index}.npy"), frame.masks[0])
    assert track(*words, "--format", "json", "--start-frame", "0", "--out", str(tmp_path / "first")) == 0
    assert os.listdir(tmp_path / "first" / "1") == ["0.json"]
    assert decode(json.loads((tmp_path / "first" / "1" / "0.json").read_text())).shape == (HEIGHT, WIDTH)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_an_image(tmp_path, ending):
    out, overlay = tmp_path / "masks", tmp_path / f"overlay.{ending}"
    words = ["--prompt", "0:the cat:point=5,5", "--out", str(out), "--overlay", str(overlay)]
    assert track(*words, source=("--image", "image.png")) == 0
    assert read_png(out / "the cat" / "0.png").shape == (HEIGHT, WIDTH)
    assert Image.open(overlay).size == (WIDTH, HEIGHT)


def test_models_of_all_layouts(tmp_path):
    """The same weights in the folder of transformers, of Meta, and of Orbax give the same masks."""
    assert main(["convert", "hf", "sam2", str(tmp_path / "orbax")]) == 0
    assert main(["convert", "export", str(tmp_path / "orbax"), str(tmp_path / "meta"), "--format", "official"]) == 0
    masks = []
    for model in ("sam2", str(tmp_path / "orbax"), str(tmp_path / "meta")):
        out = tmp_path / f"out{len(masks)}"
        assert track(*CLICK, "--out", str(out), model=model) == 0
        masks.append([read_png(out / "cat" / f"{index}.png") for index in range(FRAMES)])
    np.testing.assert_array_equal(masks[0], masks[1])
    np.testing.assert_array_equal(masks[0], masks[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["city_odd_355x201.avi", "city_rotated90.mp4", "city_vfr.mp4", "city.gif", "city.webp"]
)
def test_files_as_people_have_them(name, tmp_path, capsys):
    """Every frame gets a mask of its size, and the overlay lasts as long as the video, whatever the container."""
    reader = open_video(MEDIA / "edge" / name)
    words = [*CLICK, "--prompt", "3:2:box=10,10,100,90", "--out", str(tmp_path / "out"), "--json"]
    words += ["--overlay", str(tmp_path / "overlay.mp4")]
    assert track(*words, source=("--video", str(MEDIA / "edge" / name))) == 0
    count = len(reader.frame_times)
    assert json.loads(capsys.readouterr().out)["frames"]["timestamps"] == list(reader.frame_times)
    for obj in ("cat", "2"):
        assert len(os.listdir(tmp_path / "out" / obj)) == count
        assert read_png(tmp_path / "out" / obj / f"{count - 1}.png").shape == (reader.height, reader.width)
    with av.open(str(tmp_path / "overlay.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
        size = container.streams.video[0].height, container.streams.video[0].width
    assert size == (reader.height + reader.height % 2, reader.width + reader.width % 2)
    start = reader.frame_times[0]
    np.testing.assert_allclose(times, [time - start for time in reader.frame_times], atol=1e-3)


def refusal(capsys, *words, **options) -> str:
    """Returns the line in which `vl3 track` refuses its words."""
    try:
        code = track(*words, **options)
    except SystemExit as error:  # from argparse
        code = error.code
    output = capsys.readouterr()
    assert (code, output.out) == (2, "")
    assert output.err.startswith("vl3 track: ")
    assert output.err.count("\n") == 1
    assert len(output.err) < 700
    return output.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--prompt", "0:1:mask=text.png"], "text.png: not a readable image"),
        (["--prompt", "0:1:mask=nowhere.png"], "nowhere.png: no such mask"),
        (["--prompt", "0:1:mask=other.png"], "the mask has 65 x 48 pixels, the frame 64 x 48 pixels"),
        (["--prompt", "0:1:mask=mask.png", "--prompt", "0:1:point=1,1,1"], "a mask stands alone"),
        (["--prompt", "0:1:point=65,5,1"], "(65, 5) is outside the frame of 64 x 48 pixels"),
        (["--prompt", "0:1:point=-1,5,1"], "(-1, 5) is outside"),
        (["--prompt", "0:1:box=5,5,5,9"], "has no area"),
        (["--prompt", "0:1:box=9,9,5,5"], "give x0 < x1 and y0 < y1"),
        (["--prompt", "0:1:box=1,2,3"], "'1,2,3' are not 4 numbers"),
        (["--prompt", "0:1:point=1,nan,1"], "'1,nan' are not 2 numbers"),
        (["--prompt", "0:1:point=1,2,7"], "label '7' of a point"),
        (["--prompt", "0:1:point="], "'' are not 2 numbers"),
        (["--prompt", "0:1:circle=1,2"], "give FRAME:OBJECT:point="),
        (["--prompt", "the cat"], "give a number or a short name"),
        (["--prompt", "0:../x:point=1,1"], "object '../x'"),
        (["--prompt=-1:1:point=1,1"], "frame '-1'"),
        (["--prompt", "9" * 5000 + ":1:point=1,1"], "give its number, counted from 0"),
        (["--prompt", "5:1:point=1,1"], "a prompt in frame 5, and the video has 5 frames, counted from 0"),
        (["--prompt", "0:1:point=1,1", "--prompt", "0:1:point=2,2"], "object 1 has two prompts in frame 0"),
        (["--prompt", "2:1:correction=1,1"], "no prompt to track"),
        ([*CLICK, "--prompt", "2:1:correction=1,1"], "correction of object 1, which was not prompted"),
        ([*CLICK, "--prompt", "0:cat:correction=1,1"], "give all its points in that prompt"),
        ([*CLICK, "--prompt", "1:cat:correction=1,1", "--start-frame", "2"], "tracking from frame 2 does not reach"),
        ([*CLICK, "--start-frame", "5"], "--start-frame is 5, and the video has 5 frames"),
        ([*CLICK, "--start-frame", "x"], "argument --start-frame"),
        ([], "the following arguments are required: --prompt"),
        ([*CLICK, "--overlay", "video.mp4"], "video.mp4: exists"),
        ([*CLICK, "--overlay", "overlay.gif"], "overlay.gif: masks over a video are written as .mp4"),
        ([*CLICK, "--overlay", "nowhere/overlay.mp4"], "its folder does not exist"),
    ],
)
def test_words_that_cannot_be_used(words, text, tmp_path, capsys):
    """Nothing is written, and the model is not even looked for."""
    assert text in refusal(capsys, *words, "--out", str(tmp_path / "out"), model="no/model")
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"source": ("--video", "nowhere.mp4")}, "nowhere.mp4: no such video file or folder"),
        ({"source": ("--video", "song.m4a")}, "song.m4a: has no video (sound only)"),
        ({"source": ("--video", "none.mp4")}, "none.mp4: "),
        ({"source": ("--video", "empty")}, "empty: no images in this folder"),
        ({"source": ("--video", "text.png")}, "text.png: not a readable video"),
        ({"source": ("--image", "text.png")}, "text.png: not a readable image"),
        ({"source": ("--image", "video.mp4")}, "video.mp4: not a readable image"),
        ({"source": ("--image", "image.png", "--video", "video.mp4")}, "not allowed with argument"),
        ({"source": ()}, "one of the arguments --video --image is required"),
        ({"model": "nano"}, "give one of SAM-2"),
        ({"model": "nowhere"}, "nowhere: no such folder"),
        ({"model": "empty"}, "empty: no weights"),
        ({"model": "wrong"}, "wrong: the weights do not fit config.json"),
        ({"out": "sam2"}, "sam2: the folder holds other files"),
        ({"out": "mask.png"}, "mask.png: is a file"),
        ({"out": "mask.png/out"}, "mask.png/out: cannot be written"),
        ({"out": "gs://bucket/out"}, "gs://bucket/out: is a URL"),
    ],
)
def test_files_that_cannot_be_used(options, text, tmp_path, capsys):
    words = [*CLICK, "--out", options.pop("out", str(tmp_path / "out"))]
    assert text in refusal(capsys, *words, **options)
