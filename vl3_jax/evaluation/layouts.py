"""Writes made-up items in the folder layout of each benchmark, with tiny media: the counterpart of the loaders.

Prompt vectors and tests use it. The fields of an item are those of the published files that `Benchmark.source` names;
some say where it belongs: `format`, `task`, `image`, `video` and `key`; `srt` is the text of a subtitle file.
"""

import csv
import io
import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmarks.blink import TASKS as BLINK_TASKS
from vl3_jax.evaluation.benchmarks.mlvu import TASKS as MLVU_TASKS
from vl3_jax.evaluation.benchmarks.mme import CATEGORIES
from vl3_jax.evaluation.benchmarks.mmmu import SUBJECTS
from vl3_jax.evaluation.benchmarks.mvbench import TASKS as MVBENCH_TASKS

Row = Mapping[str, Any]
_OF_VECTORS = ("frame_timestamps", "subtitles", "srt")  # of a vector, not of the data


class Layout:
    """A folder of data under construction."""

    def __init__(self, root: str | pathlib.Path):
        self.root = pathlib.Path(root)

    def json(self, path: str, value: Any) -> None:
        self._file(path).write_text(json.dumps(value), encoding="utf-8")

    def lines(self, path: str, rows: Sequence[Row]) -> None:
        self._file(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def folder(self, path: str) -> None:
        (self.root / path).mkdir(parents=True, exist_ok=True)

    def text(self, path: str, text: str) -> None:
        self._file(path).write_text(text, encoding="utf-8")

    def csv(self, path: str, rows: Sequence[Row]) -> None:
        out = io.StringIO()
        writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        self.text(path, out.getvalue())

    def table(self, path: str, rows: Sequence[Row]) -> None:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(map(dict, rows))), self._file(path))

    def image(self, path: str) -> None:
        self._file(path).write_bytes(picture(path))

    def video(self, path: str, seconds: float = 2.0) -> None:
        """Writes a video, or a folder of frames if the path has no ending."""
        import av
        import numpy as np

        file = self._file(path)
        if file.exists():
            return
        if not file.suffix:
            for number in range(3):
                self.image(f"{path}/{number + 1:05}.jpg")
            return
        with av.open(str(file), "w") as container:
            stream = container.add_stream("mpeg4", rate=2)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"  # pyright: ignore
            for number in range(max(round(2 * seconds), 1)):
                pixels = np.full((64, 64, 3), 40 * number % 255, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            container.mux(stream.encode())

    def _file(self, path: str) -> pathlib.Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        return file


def picture(name: str) -> bytes:
    """Returns a small PNG whose content depends on a name."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (28, 28), tuple(zlib.crc32(name.encode()).to_bytes(4)[:3])).save(out, "png")
    return out.getvalue()


def write(benchmark: str, rows: Sequence[Row], root: str | pathlib.Path) -> None:
    """Writes the data of a benchmark.

    Args:
      benchmark: Name of the benchmark.
      rows: Fields of each item.
      root: The benchmark's folder.

    Raises:
      InputError: There is no layout for this benchmark, or an item lacks a field.
    """
    if benchmark not in _WRITERS:
        raise InputError(f"{benchmark}: no folder layout is known; use {', '.join(_WRITERS)}")
    try:
        _WRITERS[benchmark](Layout(root), [dict(row) for row in rows])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{benchmark}: an item lacks a field of its layout ({error!r}); add it") from None


def _without(row: Row, *names: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in names}


def _write_lines(file: str, folder: str = ""):
    def writer(layout: Layout, rows: Sequence[Row]) -> None:
        layout.lines(file, rows)
        for row in rows:
            layout.image(folder + row["image"])

    return writer


def _chartqa(layout: Layout, rows: Sequence[Row]) -> None:
    for half in ("augmented", "human"):
        layout.lines(f"test_{half}_renamed.jsonl", [row for row in rows if row.get("task", "augmented") == half])
    for row in rows:
        layout.image(row["image"])


def _infovqa(layout: Layout, rows: Sequence[Row]) -> None:
    layout.json("infographicsVQA_val_v1.0_withQT.json", {"data": rows})
    for row in rows:
        layout.image(f"images/{row['image_local_name']}")


def _ocrbench(layout: Layout, rows: Sequence[Row]) -> None:
    layout.json("OCRBench.json", rows)
    for row in rows:
        layout.image(f"OCRBench_Images/{row['image_path']}")


def _mathvista(layout: Layout, rows: Sequence[Row]) -> None:
    pids = [str(row.get("pid", number)) for number, row in enumerate(rows, start=1)]
    layout.json("testmini.json", dict(zip(pids, rows, strict=True)))
    layout.json("query.json", {pid: row["query"] for pid, row in zip(pids, rows, strict=True)})
    for row in rows:
        layout.image(row["image"])


def _with_images(row: Row, names: Sequence[str]) -> dict[str, Any]:
    images = {name: {"bytes": picture(f"{name}{row.get('id')}"), "path": f"{name}.png"} for name in names}
    return {**row, **images}


def _mmmu(layout: Layout, rows: Sequence[Row]) -> None:
    for subject in SUBJECTS:
        chosen = [_with_images(row, _tagged_images(row)) for row in rows if row["subject"] == subject]
        layout.table(f"{subject}/validation-00000-of-00001.parquet", _same_keys(chosen))


def _mmmu_pro(layout: Layout, rows: Sequence[Row]) -> None:
    chosen = [_with_images(row, _tagged_images(row)) for row in rows]
    layout.table("standard/test-00000-of-00001.parquet", _same_keys(chosen))


def _tagged_images(row: Row) -> list[str]:
    text = f"{row['question']} {row['options']}"
    return [f"image_{number}" for number in range(1, 8) if f"<image {number}>" in text]


def _same_keys(rows: Sequence[Row]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in keys} for row in rows]


def _blink(layout: Layout, rows: Sequence[Row]) -> None:
    for task in BLINK_TASKS:
        chosen = [_with_images(row, ["image_1", "image_2"]) for row in rows if _blink_task(row) == task]
        layout.table(f"{task}/val-00000-of-00001.parquet", chosen)


def _blink_task(row: Row) -> str:
    return row["idx"].split("_", 1)[1].rsplit("_", 1)[0]


def _realworldqa(layout: Layout, rows: Sequence[Row]) -> None:
    layout.table("data/test-00000-of-00001.parquet", [_with_images(row, ["image"]) for row in rows])


def _gqa(layout: Layout, rows: Sequence[Row]) -> None:
    layout.lines("llava_gqa_testdev_balanced.jsonl", [_without(row, "answer") for row in rows])
    answers = {row["question_id"]: {"answer": row.get("answer", "no")} for row in rows}
    layout.json("data/testdev_balanced_questions.json", answers)
    for row in rows:
        layout.image(f"data/images/{row['image']}")


def _mme(layout: Layout, rows: Sequence[Row]) -> None:
    # An item is a line of a file of questions; its picture is named, or two lines after each other share one.
    layout.lines("mme.jsonl", [])
    for category in CATEGORIES:
        layout.folder(f"MME_Benchmark_release_version/{category}")
    files: dict[str, list[str]] = {}
    for number, row in enumerate(rows):
        files.setdefault(row.get("image") or f"existence/{number // 2 + 1}.png", []).append(row["line"])
    for image, lines in files.items():
        folder, name = image.split("/")
        layout.image(f"MME_Benchmark_release_version/{image}")
        layout.text(f"MME_Benchmark_release_version/{folder}/{name.rsplit('.', 1)[0]}.txt", "\n".join(lines) + "\n")


def _videomme(layout: Layout, rows: Sequence[Row]) -> None:
    layout.table("test-00000-of-00001.parquet", [_without(row, *_OF_VECTORS) for row in rows])
    for row in rows:
        layout.video(f"videos/{row['videoID']}.mp4")
        if "srt" in row:
            layout.text(f"subtitles/{row['videoID']}.srt", row["srt"])


def _mmvu(layout: Layout, rows: Sequence[Row]) -> None:
    layout.json("validation.json", rows)
    for row in rows:
        layout.video("videos/" + "/".join(row["video"].split("/")[-2:]))


def _mvbench(layout: Layout, rows: Sequence[Row]) -> None:
    for task, (folder, _) in MVBENCH_TASKS.items():
        chosen = [row for row in rows if row.get("task", "Action Sequence") == task]
        layout.json(f"json/{task.lower().replace(' ', '_').replace('-', '_')}.json", chosen)
        for row in chosen:
            layout.video(f"video/{folder}/{row['video']}")


def _egoschema(layout: Layout, rows: Sequence[Row]) -> None:
    layout.json("questions.json", rows)
    layout.json("subset_answers.json", {row["q_uid"]: row["answer"] for row in rows if "answer" in row})
    for row in rows:
        layout.video(f"good_clips_git/{row['q_uid']}.mp4")


def _perception_test(layout: Layout, rows: Sequence[Row]) -> None:
    videos: dict[str, Any] = {}
    for row in rows:
        video = row.get("video", "video_1")
        entry = videos.setdefault(video, {"metadata": {"video_id": video}, "mc_question": []})
        entry["mc_question"].append(row)
        layout.video(f"videos/{video}.mp4")
    layout.json("mc_question_valid.json", videos)
    for entry in videos.values():
        entry["mc_question"] = [_without(row, "answer_id") for row in entry["mc_question"]]
    layout.json("mc_question_test.json", videos)


def _activitynet_qa(layout: Layout, rows: Sequence[Row]) -> None:
    layout.json("test_q.json", [{key: row[key] for key in ("video_name", "question", "question_id")} for row in rows])
    layout.json("test_a.json", [{key: row[key] for key in ("question_id", "answer", "type")} for row in rows])
    for row in rows:
        layout.video(f"all_test/v_{row['video_name']}.mp4")


def _mlvu(layout: Layout, rows: Sequence[Row]) -> None:
    for folder in MLVU_TASKS.values():
        chosen = [row for row in rows if row.get("task", "1_plotQA") == folder]
        layout.json(f"json/{folder}.json", chosen)
        for row in chosen:
            layout.video(f"video/{folder}/{row['video']}")


def _longvideobench(layout: Layout, rows: Sequence[Row]) -> None:
    layout.json("lvb_val.json", [_without(row, *_OF_VECTORS) for row in rows])
    for row in rows:
        layout.json(f"subtitles/{row['subtitle_path']}", row.get("subtitles", []))
        layout.video(f"videos/{row['video_path']}", float(row["duration"]))


def _lvbench(layout: Layout, rows: Sequence[Row]) -> None:
    keys = dict.fromkeys(row.get("key", "video") for row in rows)
    entries = [{"key": key, "qa": [row for row in rows if row.get("key", "video") == key]} for key in keys]
    layout.lines("video_info.meta.jsonl", entries)
    for key in keys:
        layout.video(f"video/{key}.mp4")


def _tempcompass(layout: Layout, rows: Sequence[Row]) -> None:
    for form in ("yes_no", "captioning", "caption_matching", "multi-choice"):
        chosen = [{"video_id": "1", **row} for row in rows if row["format"] == form]
        layout.table(f"{form}/test-00000-of-00001.parquet", [_without(row, "format") for row in chosen])
        for row in chosen:
            layout.video(f"videos/{row['video_id']}.mp4")


def _nextqa(layout: Layout, rows: Sequence[Row]) -> None:
    layout.csv("test.csv", rows)
    layout.json("map_vid_vidorID.json", {str(row["video"]): f"0000/{row['video']}" for row in rows})
    for row in rows:
        layout.video(f"NExTVideo/0000/{row['video']}.mp4")


def _charades_sta(layout: Layout, rows: Sequence[Row]) -> None:
    layout.json("charades_annotations_test-random_prompt.json", rows)
    for row in rows:
        layout.video(f"Charades_v1/{row['video']}")


_WRITERS = {
    "ChartQA": _chartqa,
    "DocVQA": _write_lines("val.jsonl"),
    "InfoVQA": _infovqa,
    "OCRBench": _ocrbench,
    "MathVista": _mathvista,
    "MathVision": _write_lines("test.jsonl"),
    "MMMU_Pro": _mmmu_pro,
    "MMMU": _mmmu,
    "BLINK": _blink,
    "RealWorldQA": _realworldqa,
    "AI2D": _write_lines("ai2d_test_vlmevalkit.jsonl"),
    "GQA": _gqa,
    "MME": _mme,
    "videomme": _videomme,
    "mmvu": _mmvu,
    "mvbench": _mvbench,
    "egoschema": _egoschema,
    "perception_test": _perception_test,
    "activitynet_qa": _activitynet_qa,
    "mlvu": _mlvu,
    "longvideobench": _longvideobench,
    "lvbench": _lvbench,
    "tempcompass": _tempcompass,
    "nextqa": _nextqa,
    "charades_sta": _charades_sta,
}
