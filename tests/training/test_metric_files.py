"""The files of metrics of a run: damaged ones, full disks, curves."""

import json

import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from support.full_disk import files_of_at_most
from vl3_jax.errors import InputError
from vl3_jax.training.curves import Curves
from vl3_jax.training.metrics import METRICS, MetricWriter


def steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / METRICS).read_text().splitlines()]


def test_whole_lines_of_a_damaged_log_are_kept(tmp_path):
    lines = [
        b'{"step": 1}',
        b"\xff\xfe",
        b"\0\0\0",
        b"3",
        b"[]",
        b'{"loss": 1}',
        b'{"step": 2}',
        b'{"step": 3}',
        b'{"st',
    ]
    (tmp_path / METRICS).write_bytes(b"\n".join(lines))
    writer = MetricWriter(tmp_path, total=4, done=2, active=True, tensorboard=False)
    writer.write(3, {"loss": 1.0})
    writer.close()
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("tensorboard", [True, False])
def test_a_full_disk_is_one_line(tensorboard, tmp_path):
    writer = MetricWriter(tmp_path, total=4, done=0, active=True, tensorboard=tensorboard)
    with files_of_at_most(100), pytest.raises(InputError, match=r"metrics\.jsonl: no space left on the disk"):
        writer.write(1, {"loss": 1.0, "text": 2.0, "grad norm": 2.0, "tokens/s": 1.0, "samples/s": 2.0, "mfu": 1.0})
    writer.close()
    again = MetricWriter(tmp_path, total=4, done=0, active=True, tensorboard=tensorboard)
    again.write(1, {"loss": 1.0})
    again.close()
    assert steps(tmp_path) == [1]


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "tensorboard").write_text("mine")
    with pytest.raises(InputError, match="tensorboard: File exists; check the path"):
        MetricWriter(tmp_path, total=4, done=0, active=True)


def test_curves_hold_each_point_and_where_a_start_began(tmp_path):
    curves = Curves(epath.Path(tmp_path) / "tensorboard", done=2)
    curves.write(3, {"loss": 1.5, "grad norm": 2.0})
    curves.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, events = file.read_bytes(), []
    while content:  # records of length, its checksum, the event, and its checksum
        size = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    assert [(event.step, event.session_log.status) for event in events[1:2]] == [(2, 1)]
    points = {value.tag: (event.step, value.simple_value) for event in events for value in event.summary.value}
    assert points == {"loss": (3, 1.5), "grad_norm": (3, 2.0)}
