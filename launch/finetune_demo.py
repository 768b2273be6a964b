#!/usr/bin/env python3
"""Data, score and the step in transformers of `finetune_demo.sh`.

    python finetune_demo.py data                       writes media/, train.json and held_out.json here
    python finetune_demo.py score MODEL                asks a model about the clips of held_out.json
    python finetune_demo.py transformers DIR IMAGE     asks an exported model about an image, in transformers

The clips are cut from the videos that this project is tested with. No second of a held-out clip is in a training clip.
"""

import argparse
import json
import pathlib

import av
from PIL import Image

MEDIA = pathlib.Path(__file__).parents[1] / "tests" / "data" / "media"
CLIP_QUESTION, IMAGE_QUESTION = "What does the clip show?", "What is in the image?"
HEIGHT, FRAME_RATE = 56, 6  # pixels of a clip, and frames a second
# Answer: the video, and from which to which second its clips go, for training and held out.
CLIPS = {
    "city": ("city_night.mp4", [(0, 2), (0.3, 2.3), (0.6, 2.6), (4.6, 6.2)], [(2.6, 4.6), (6.2, 7.6)]),
    "earth": ("earth_night.mp4", [(0, 3), (5, 8), (15, 18), (20, 23)], [(10, 13), (25, 28)]),
    "tree": ("tree.avi", [(0, 3), (5, 8), (15, 18), (23, 26)], [(10, 13), (26, 29)]),
    "cartoon": ("bunny_long.mp4", [(start, start + 3) for start in range(30, 470, 60)], [(50, 53), (345, 348)]),
    "names": ("bunny_long.mp4", [(start, start + 3) for start in (505, 515, 530, 540, 550)], [(523, 526), (558, 561)]),
}
IMAGES = {"coffee.png": "a cup of coffee", "tulips.png": "flowers", "huckleberry_page.jpg": "a page of a book"}


def write_data(folder: pathlib.Path) -> None:
    """Writes the media and both annotation files."""
    media = folder / "media"
    media.mkdir(parents=True, exist_ok=True)
    train, held_out = [], []
    for answer, (video, *parts) in CLIPS.items():
        for records, clips in zip((train, held_out), parts, strict=True):
            for start, stop in clips:
                name = f"{answer}_{start:g}.mp4"
                cut(MEDIA / "videos" / video, start, stop, media / name)
                records.append(record("video", name, CLIP_QUESTION, answer))
    for name, answer in IMAGES.items():
        Image.open(MEDIA / "images" / name).reduce(4).save(media / name)
        train.append(record("image", name, IMAGE_QUESTION, answer))
    for name, records in (("train.json", train), ("held_out.json", held_out)):
        (folder / name).write_text(json.dumps(records, indent=1) + "\n")
    print(f"{len(train)} samples in train.json, {len(held_out)} in held_out.json")


def record(kind: str, name: str, question: str, answer: str) -> dict:
    """Returns a sample with one image or video."""
    turns = [{"from": "human", "value": f"<{kind}>\n{question}"}, {"from": "gpt", "value": answer}]
    return {kind: [name], "conversations": turns}


def cut(source: pathlib.Path, start: float, stop: float, target: pathlib.Path) -> None:
    """Writes the part [start, stop) of a video, in seconds, as a smaller one with FRAME_RATE frames a second."""
    with av.open(str(source)) as video, av.open(str(target), "w") as clip:
        frames = video.streams.video[0]
        stream = clip.add_stream("libx264", rate=FRAME_RATE)
        stream.width, stream.height = 2 * round(frames.width * HEIGHT / frames.height / 2), HEIGHT
        stream.pix_fmt = "yuv420p"
        written = 0
        for frame in video.decode(frames):
            if frame.time >= stop:
                break
            while start + written / FRAME_RATE <= frame.time:
                image = frame.reformat(stream.width, stream.height, stream.pix_fmt)
                image.pts, image.time_base = written, 1 / stream.codec_context.framerate
                clip.mux(stream.encode(image))
                written += 1
        clip.mux(stream.encode())


def score(model: str) -> None:
    """Prints the answers of a model to the held-out questions, and how many of them are right."""
    import vl3_jax as vl3
    from vl3_jax.inference.chat_model import conversation

    records = json.loads(pathlib.Path("held_out.json").read_text())
    names = [sample["video"][0] for sample in records]
    questions = [conversation(CLIP_QUESTION, videos=[f"media/{name}"]) for name in names]
    answers = [answer.text for answer in vl3.load(model).answer_batch(questions, max_new_tokens=8)]
    for name, answer in zip(names, answers, strict=True):
        print(f"{name:16} {answer}")
    right = sum(answer == sample["conversations"][-1]["value"] for answer, sample in zip(answers, records, strict=True))
    print(f"{right} of {len(records)} right")


def ask_in_transformers(folder: str, image: str) -> None:
    """Prints the answer of an exported model about an image, as transformers gives it."""
    from transformers import AutoProcessor, VideoLlama3ForConditionalGeneration

    processor = AutoProcessor.from_pretrained(folder)
    model = VideoLlama3ForConditionalGeneration.from_pretrained(folder)
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": IMAGE_QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(processor.decode(tokens, skip_special_tokens=True))


def main() -> None:
    """Runs one of the three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("data")
    steps.add_parser("score").add_argument("model")
    in_transformers = steps.add_parser("transformers")
    in_transformers.add_argument("folder")
    in_transformers.add_argument("image")
    arguments = parser.parse_args()
    if arguments.step == "data":
        write_data(pathlib.Path.cwd())
    elif arguments.step == "score":
        score(arguments.model)
    else:
        ask_in_transformers(arguments.folder, arguments.image)


if __name__ == "__main__":
    main()
