"""create, setup, sync, status, convert and delete, and what goes wrong on the way."""

import pytest

READY = "ACTIVE READY HEALTHY\n"


def test_create_waits_until_the_slice_is_ready(pod):
    result = pod.ok("create", SPOT="1", VALID_UNTIL="6h")
    states = [line.split(": ")[1] for line in result.stderr.splitlines()]
    assert states == [
        "waiting (WAITING_FOR_RESOURCES)",
        "waiting (PROVISIONING)",
        "waiting (ACTIVE, node CREATING, health not reported)",
        "ready (ACTIVE, node READY, health HEALTHY)",
    ]
    assert len(pod.calls("create", "--spot", "--valid-until-duration=6h")) == 1
    assert "exists" in pod.ok("create").stderr
    assert len(pod.calls("create")) == 1


@pytest.mark.parametrize("life", ["PROVISIONING\nFAILED\n", "ACTIVE CREATING\nSUSPENDING\n", "ACTIVE TERMINATED\n"])
def test_create_says_that_the_slice_was_lost(pod, life):
    pod.lives(life)
    result = pod("create")
    assert result.returncode == 1 and "became lost" in result.stderr and "delete.sh makes room" in result.stderr


def test_create_gives_up_waiting(pod):
    pod.lives("WAITING_FOR_RESOURCES\n")
    result = pod("create", WAIT_SECONDS="0")
    assert result.returncode == 1 and "stays in the queue" in result.stderr
    pod.ok("create", "--no-wait")


def test_an_error_of_gcloud_is_not_an_absent_slice(pod):
    (pod.fake / "fail").write_text("describe\n")
    result = pod("create")
    assert result.returncode == 1 and "describe failed" in result.stderr
    assert not pod.calls("create")


def test_the_slice_must_be_ready(pod):
    for script, arguments in {"setup": (), "sync": (), "run": ("--", "true"), "stop": ()}.items():
        result = pod(script, *arguments)
        assert result.returncode == 3 and "granite is absent" in result.stderr, script
    assert pod("status").returncode == 3
    pod.ready().now("ACTIVE PREEMPTED\n")
    status = pod("status")
    assert status.returncode == 3 and "granite lost (ACTIVE, node PREEMPTED" in status.stdout


def test_setup_installs_once_and_again_when_requirements_change(pod):
    pod.ok("create")
    pod.ok("setup", EXTRAS="tpu,gcs")
    lines = (pod.fake / "uv").read_text().splitlines()
    home = pod.home(1)
    assert f"1 venv --quiet --allow-existing --python 3.12 {home}/venv" in lines
    install = f"pip install --quiet --python {home}/venv/bin/python --constraint {home}/source/constraints.txt"
    assert f"1 {install} --editable {home}/source[tpu,gcs]" in lines
    (pod.fake / "uv").unlink()
    pod.ok("setup", EXTRAS="tpu,gcs")
    assert not (pod.fake / "uv").exists()
    (pod.repository / "constraints.txt").write_text("jax==0\n")
    pod.ok("sync")
    result = pod("run", "--", "true")
    assert result.returncode == 3 and "constraints.txt has changed" in result.stderr
    (pod.fake / "no_network").touch()
    assert pod("setup", EXTRAS="tpu,gcs").returncode == 1
    result = pod("run", "--", "true")
    assert result.returncode == 3 and "not installed" in result.stderr


def test_setup_mounts_the_disk(pod):
    pod.ready()
    disk = "projects/my-project/zones/us-central2-b/disks/weights"
    for _ in range(2):
        pod.ok("setup", DATA_DISK=disk, DISK_DEVICE="/dev/null", MOUNT_DIR=str(pod.local))
    mounts = sorted((pod.fake / "mounts").read_text().splitlines())
    assert mounts == [f"{worker} -o ro,noload /dev/null {pod.local}" for worker in (0, 1)]


def test_sync_sends_the_tree_as_it_is(pod):
    pod.ready()
    source = pod.home(1) / "source"
    (source / "runs").mkdir()
    (source / "runs" / "mine").touch()
    (pod.repository / "module.py").write_text("answer = 43\n")
    (pod.repository / "old.py").unlink()
    (pod.repository / "new file.py").touch()
    (pod.repository / "runs").mkdir()
    (pod.repository / "runs" / "ignored").touch()
    result = pod.ok("sync", EXCLUDE="big.bin *.md")
    assert "source: done on 2 workers" in result.stderr
    assert (source / "module.py").read_text() == "answer = 43\n"
    assert not (source / "old.py").exists() and (source / "new file.py").exists()
    assert not (source / "big.bin").exists() and not (source / "runs" / "ignored").exists()
    assert (source / "runs" / "mine").exists()
    assert (source / "tpu_scripts" / "worker.sh").stat().st_mode & 0o100
    identities = {(pod.home(worker) / "source.id").read_text() for worker in (0, 1)}
    assert len(identities) == 1


def test_an_interrupted_sync_stops_the_next_run(pod):
    pod.ready()
    (pod.home(1) / "source.id").unlink()
    result = pod("run", "--", "true")
    assert result.returncode == 3 and "worker 1: error: the source on t1v-fake-w-1 is not complete" in result.stderr


def test_sync_fetches_directories_of_buckets(pod):
    pod.ready()
    bucket = pod.fake / "bucket" / "b" / "granite-8b"
    bucket.mkdir(parents=True)
    (bucket / "config.json").write_text("{}")
    pod.ok("sync", FETCH="gs://b/granite-8b=models/granite-8b")
    assert (pod.home(1) / "source" / "models" / "granite-8b" / "config.json").exists()
    result = pod("sync", FETCH="gs://b/none=data/none")
    assert result.returncode == 1 and "worker 0" in result.stderr and "none" in result.stderr


def test_one_worker_that_ssh_does_not_reach(pod):
    pod.ready().down(1)
    result = pod("sync")
    assert result.returncode == 4 and "did not reach all workers" in result.stderr
    status = pod("status")
    assert status.returncode == 4 and "worker 1: unreachable" in status.stdout and "worker 0: none" in status.stdout


def test_a_flag_that_gcloud_does_not_know(pod):
    pod.ready()
    result = pod("sync", SSH_FLAGS="--internal-ips")
    assert result.returncode != 0 and "unrecognized arguments: --internal-ips" in result.stderr


def test_more_workers_than_the_accelerator_has(pod):
    pod.ready()
    (pod.fake / "workers").write_text("3\n")
    result = pod("setup")
    assert result.returncode == 2 and "ACCELERATOR=v4-16 has 2 workers, and granite has more" in result.stderr


def test_convert_from_and_to_a_bucket(pod):
    pod.ready()
    (pod.fake / "bucket" / "b" / "hf").mkdir(parents=True)
    (pod.fake / "bucket" / "b" / "hf" / "weights").write_text("w")
    program = pod.home(0) / "venv" / "bin" / "model-port"
    program.write_text('#!/bin/sh\necho "$4 $5" >&2\ncp -r "$2" "$3"\n')
    program.chmod(0o755)
    result = pod.ok("convert", "gs://b/hf", "gs://b/orbax", "--", "--dtype", "bfloat16")
    assert "--dtype bfloat16" in result.stderr
    assert (pod.fake / "bucket" / "b" / "orbax" / "weights").read_text() == "w"
    assert not (pod.home(0) / "convert").exists()
    result = pod("convert", "gs://b/hf", "gs://b/orbax")
    assert result.returncode == 3 and "gs://b/orbax exists" in result.stdout


def test_plan_names_the_slice(pod, tmp_path):
    program = tmp_path / "jgrpo"
    program.write_text('#!/bin/sh\necho "$@"\nexit 1\n')
    program.chmod(0o755)
    for accelerator, topology in {"v5litepod-64": "v5e:8x8", "v5p-128": "v5p:4x4x4", "v6e-256": "v6e:16x16"}.items():
        result = pod("plan", "c.py", "--search", ACCELERATOR=accelerator, JGRPO=str(program))
        assert result.returncode == 1
        assert result.stdout == f"plan c.py --topology {topology} --search\n"


def test_delete_asks_first(pod):
    pod.ready()
    result = pod("delete", stdin="something else\n")
    assert result.returncode == 3 and "nothing was deleted" in result.stderr
    assert pod("delete").returncode == 3
    assert not pod.calls("delete")
    assert pod("delete", stdin="granite\n").returncode == 0
    assert len(pod.calls("delete", "--force")) == 1
    assert "nothing to delete" in pod.ok("delete", "--yes").stderr


def test_a_failed_deletion_is_reported(pod):
    pod.ready()
    (pod.fake / "fail").write_text("delete\n")
    result = pod("delete", "--yes")
    assert result.returncode == 1 and "was not deleted" in result.stderr
