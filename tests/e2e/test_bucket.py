"""A run directory in a bucket: written, killed, gone on with and read, without a file of the run on this machine.

The tests marked slow start processes: `python -m pytest -m slow tests/e2e/test_bucket.py`.
"""

import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo import cli
from jgrpo.evaluation.tables import read_metrics
from jgrpo.runtime.checkpoint import RunCheckpoints
from jgrpo.runtime.metrics import MetricsWriter
from model_port import Processor, load_model
from model_port import cli as model_port_cli
from model_port.errors import UserError
from model_port.weights.convert import model_arrays
from model_port.weights.orbax_files import read_orbax
from tests.e2e.conftest import assert_same_bits, interruption, saved_arrays, train

EVERY_SECOND = ("--checkpoint.every", "2")


def timeless(run: str) -> list[dict]:
    """Read metrics without wall-clock times."""
    return [{name: value for name, value in row.items() if "second" not in name} for row in read_metrics(run)]


def tree(step):
    w = np.random.default_rng(step).normal(size=(29, 31)).astype(np.float32)
    return {"w": jnp.asarray(w), "b": jnp.full((3,), step, jnp.bfloat16)}


def test_checkpoints_are_kept_found_and_fallen_back_from(bucket, caplog):
    directory = "gs://bucket/checkpoints"
    with RunCheckpoints(directory, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            assert checkpoints.save(step, tree(step), {"step": step})
    assert {name.split("/")[1] for name in bucket.names("checkpoints/")} == {"3", "4"}
    (data,) = (name for name in bucket.names("checkpoints/4/state/ocdbt.process_0/d/"))
    bucket.put(data, bucket.objects[data][0][:1000])
    for name in bucket.names("checkpoints/3/"):  # a save that was killed: all but the mark
        if not name.endswith("3/commit_success.txt"):
            bucket.put(name.replace("/3/", "/5/"), bucket.objects[name][0])
    with RunCheckpoints(directory, keep=2) as checkpoints:
        assert "checkpoints/5 is a checkpoint whose save was interrupted" in caplog.text
        restored = checkpoints.restore(tree(0))
        assert "checkpoints/4 is damaged" in caplog.text
        assert restored.step == 3 and restored.host == {"step": 3}
        assert_same_bits(jax.device_get(restored.arrays), jax.device_get(tree(3)))
        assert checkpoints.save(4, tree(4), {"step": 4})
    assert {name.split("/")[1] for name in bucket.names("checkpoints/")} == {"3", "4", "damaged-4"}


def test_metrics_are_uploaded_when_asked_once_a_minute_and_at_the_end(bucket, monkeypatch):
    run, now = "gs://bucket/metrics", [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def steps():
        return [row["step"] for row in read_metrics(run)]

    first = MetricsWriter(run, 1)
    first.write(1, {"reward": 0.5})
    assert steps() == []
    first.flush()
    first.write(2, {"reward": 0.25})
    assert steps() == [1]
    now[0] += 61
    first.write(3, {"reward": 0.75})
    first.write(4, {"reward": 0.75})  # lost: the process is gone before it is uploaded
    assert steps() == [1, 2, 3]
    second = MetricsWriter(run, 3)
    assert steps() == [1, 2]
    second.write(3, {"reward": 0.125})
    second.write_completions(3, [{"prompt": "ü"}])
    second.close()
    assert [row["reward"] for row in read_metrics(run)] == [0.5, 0.25, 0.125]
    assert json.loads(bucket.objects["metrics/completions/step_000003.jsonl"][0]) == {"prompt": "ü"}
    assert bucket.names("metrics/tensorboard/events")
    first.close()


def test_a_run_in_a_bucket_is_the_run_on_a_disk(work, bucket, sft_run, capsys, tmp_path, monkeypatch):
    """Interrupted before step 4 is saved and gone on with; then evaluated, exported and loaded."""
    options = ("--num-steps", "4", *EVERY_SECOND)
    run, elsewhere = "gs://bucket/run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with interruption(4):
        assert cli.main(["sft", str(work.sft), "--run-dir", run, *options]) == 130
    train(work.sft, run, *options)
    assert "gs://bucket/run goes on after step 2\n" in capsys.readouterr().out
    assert timeless(run) == timeless(sft_run)[:4]
    policy, saved = read_orbax(f"{run}/policy")[1], saved_arrays(run, 4)
    assert_same_bits(policy, {name: saved[f"params.{name}"] for name in policy})
    assert json.loads(bucket.objects["run/config.json"][0])["run_dir"] == run
    assert cli.main(["eval", str(work.sft), "--run-dir", run]) == 0
    assert "evaluating gs://bucket/run/policy" in capsys.readouterr().out
    assert {"results.json", "test.jsonl"} <= {name.split("/")[-1] for name in bucket.names("run/eval/policy/")}
    assert cli.main(["sft", str(work.sft), "--run-dir", run, *options, "--seed", "5"]) == 2
    assert "gs://bucket/run holds a run with another config" in capsys.readouterr().err
    Processor.from_pretrained(f"{run}/policy")
    model_port_cli.main(["export", f"{run}/policy", str(tmp_path / "hf")])
    exported = model_arrays(load_model(tmp_path / "hf"))
    assert_same_bits(policy, {name: exported[name] for name in policy})
    assert not list(elsewhere.iterdir())


def test_other_buckets_and_a_missing_package_are_named(work, capsys, monkeypatch):
    assert cli.main(["sft", str(work.sft), "--run-dir", "s3://bucket/run"]) == 2
    assert "s3://bucket/run: of buckets, gs:// is read and written" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"takes the package gcsfs; install the extra gcs"):
        RunCheckpoints("gs://bucket/run")


@pytest.mark.slow
def test_a_run_in_a_bucket_survives_kills(work, bucket, grpo_run):
    """SIGKILL while step 3 is computed, and while checkpoint 4 is written."""
    run = "gs://bucket/killed"
    command = ("grpo", work.grpo, "--run-dir", run, *EVERY_SECOND)
    for mark in ("killed/checkpoints/2/commit_success.txt", "killed/checkpoints/4/_CHECKPOINT_METADATA"):
        process = work.start(*command)
        while mark not in bucket.objects:
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    process = work.start(*command)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "goes on after step" in out, errors
    assert timeless(run) == timeless(grpo_run)
    assert_same_bits(saved_arrays(run, 6), saved_arrays(grpo_run, 6))
    assert_same_bits(read_orbax(f"{run}/policy")[1], read_orbax(grpo_run / "policy")[1])
    names = [name.removeprefix("killed/completions/") for name in bucket.names("killed/completions/")]
    assert names == ["step_000001.jsonl", "step_000003.jsonl", "step_000005.jsonl"]
