"""metrics.jsonl of a killed and resumed run reads like that of one that was not."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jgrpo.runtime.metrics import MetricsWriter
from model_port.errors import UserError
from tests.disks import files_at_most


def read(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def write_steps(run_dir, *steps, start_step=0):
    writer = MetricsWriter(run_dir, start_step)
    for step in steps:
        writer.write(step, {"reward": step / 10})
    writer.close()


def test_one_line_per_step_on_disk_at_once_in_strict_json(tmp_path):
    writer = MetricsWriter(tmp_path)
    values = {"loss": jnp.float32(0.5), "count": np.int64(3), "bad": float("nan"), "worse": jnp.array(-jnp.inf)}
    writer.write(0, values | {"list": np.array([1.0, np.inf]), "text": "ü"})
    expected = {"step": 0, "loss": 0.5, "count": 3, "bad": None, "worse": None, "list": [1.0, None], "text": "ü"}
    assert read(tmp_path / "metrics.jsonl") == [expected]
    writer.close()
    writer.close()


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    write_steps(tmp_path, 0, 1, 2, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    write_steps(tmp_path, 2, 3, start_step=2)
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl:2"):
        MetricsWriter(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 0}\nnonsense')


def test_completions_are_whole_files_by_step(tmp_path):
    writer = MetricsWriter(tmp_path)
    for rows in ([{"prompt": "a"}], [{"prompt": "übersetze", "rewards": np.array([0.25, np.nan])}, {"prompt": "b"}]):
        writer.write_completions(7, rows)
    path = tmp_path / "completions" / "step_000007.jsonl"
    assert read(path) == [{"prompt": "übersetze", "rewards": [0.25, None]}, {"prompt": "b"}]
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    writer.close()


def test_a_disk_that_is_full_is_said(tmp_path):
    writer = MetricsWriter(tmp_path)
    with files_at_most(10), pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: File too large; make room"):
        writer.write(0, {"reward": 0.25})
    writer.close()


def test_other_processes_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, process_index=1)
    writer.write(0, {"reward": 1.0})
    writer.write_completions(0, [{"prompt": "a"}])
    writer.close()
    assert not list(tmp_path.iterdir())


def scalars(board):
    """(tag, step, value) in the TensorBoard files: records of length, checksum, protobuf, checksum."""
    found = []
    for path in sorted(board.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            content = content[16 + length :]
    return found


def test_tensorboard_gets_the_finite_scalars(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(3, {"reward": 0.25, "kl": float("nan"), "name": "x"})
    writer.close()
    assert scalars(tmp_path / "tensorboard") == [("reward", 3, 0.25)]
