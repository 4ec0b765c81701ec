"""babysit sees a run through preemption, failure and silence, and knows when to give up."""

import subprocess
import time

import pytest

READY = "ACTIVE READY HEALTHY\n"
# Both workers count their starts in one file outside the slice, as a run's checkpoints are; the run is over when it has
# been started for the second time.
SECOND_TIME = "echo . >>$FAKE/starts; if (($(wc -l <$FAKE/starts) > 2)); then exit 0; fi; "
HANG = "while :; do sleep 0.05; done"


@pytest.fixture(autouse=True)
def limits(pod):
    pod.environment |= {"MAX_RESTARTS": "2", "PATIENCE": "2", "GRACE": "1"}


def starts(pod):
    path = pod.fake / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_from_nothing_to_the_end(pod):
    result = pod.ok("babysit", "--", "true")
    assert "finished on all workers" in result.stderr
    assert len(pod.calls("create")) == 1 and not pod.calls("delete")


def test_a_preempted_slice_is_created_again_and_the_run_goes_on(pod):
    (pod.repository / "marker.py").write_text("new = 1\n")
    pod.lives(READY * 5 + "SUSPENDED\n", "WAITING_FOR_RESOURCES\n" + READY)
    pod.ok("babysit", "--", "bash", "-c", SECOND_TIME + HANG)
    assert starts(pod) >= 3
    assert len(pod.calls("create")) == 2 and len(pod.calls("delete", "--force")) == 1
    assert (pod.home(1) / "source" / "marker.py").exists()


def test_a_run_that_saved_after_sigterm_is_started_again(pod):
    pod.ready()
    result = pod.ok("babysit", "--", "bash", "-c", SECOND_TIME + "exit 143")
    assert "exit status 143; restart 1" in result.stderr and not pod.calls("create")


def test_a_failing_run_is_tried_again_up_to_the_limit(pod):
    pod.ready()
    result = pod("babysit", "--", "bash", "-c", "echo . >>$FAKE/starts; exit 1", BACKOFF="1", BACKOFF_MAX="0")
    assert result.returncode == 1 and "giving up after 2 restarts" in result.stderr
    assert starts(pod) == 3 * 2
    assert not pod.calls("delete")


def test_back_off_doubles_up_to_its_maximum(pod, tmp_path):
    """Sleeping is replaced by writing down for how long."""
    (tmp_path / "bin" / "sleep").write_text("#!/bin/sh\necho $1 >>$FAKE/sleeps\n")
    (tmp_path / "bin" / "sleep").chmod(0o755)
    (pod.fake / "fail").write_text("create\n" * 9)
    result = pod("babysit", "--", "true", BACKOFF="60", BACKOFF_MAX="200", MAX_RESTARTS="4")
    assert result.returncode == 1 and "the slice was not granted" in result.stderr
    sleeps = [line for line in (pod.fake / "sleeps").read_text().splitlines() if line != "0.05"]
    assert sleeps == ["60", "120", "200", "200"]


def test_running_well_forgives_earlier_restarts(pod):
    pod.lives(READY * 5 + "FAILED\n", READY * 5 + "ACTIVE PREEMPTED\n", READY)
    program = "echo . >>$FAKE/starts; if (($(wc -l <$FAKE/starts) > 4)); then exit 0; fi; " + HANG
    pod.ok("babysit", "--", "bash", "-c", program, HEALTHY_SECONDS="0", MAX_RESTARTS="1")
    assert len(pod.calls("create")) == 3


def test_a_mistake_in_the_command_is_not_repeated(pod):
    pod.ready()
    result = pod("babysit", "--", "bash", "-c", "echo . >>$FAKE/starts; exit 2")
    assert result.returncode == 2 and starts(pod) == 2


def test_a_silent_worker_costs_the_slice(pod):
    pod.ready().lives("", READY)
    pod.ok("run", "--", "bash", "-c", SECOND_TIME + HANG)
    pod.down(1)
    process = spawn(pod, "bash", "-c", SECOND_TIME + HANG)
    wait_for(lambda: pod.calls("delete"))
    pod.down()
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 0 and "unreachable, look 2 of 2" in output


def test_a_run_that_goes_on_without_one_worker_is_started_again(pod):
    pod.ready()
    program = SECOND_TIME + "if [[ $FAKE_WORKER == 1 ]]; then exit 1; fi; " + HANG
    result = pod.ok("babysit", "--", "bash", "-c", program)
    assert "some workers do not run" in result.stderr and not pod.calls("create")


def test_stop_ends_the_babysitting(pod):
    pod.ready()
    program = ("bash", "-c", "trap 'exit 143' TERM; " + HANG)
    process = spawn(pod, *program)
    wait_for(lambda: "running" in pod("status").stdout.split("run: ")[-1])
    pod.ok("stop")
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 143 and "stop.sh has ended the run" in output


def test_it_takes_over_its_own_run_and_refuses_another(pod):
    pod.ready()
    program = ("bash", "-c", "echo . >>$FAKE/starts; while [[ ! -e end ]]; do sleep 0.05; done")
    pod.ok("run", "--", *program)
    other = pod("babysit", "--", "true")
    assert other.returncode == 3 and "another command is running" in other.stderr
    process = spawn(pod, *program)
    for worker in (0, 1):
        (pod.home(worker) / "source" / "end").touch()
    assert process.wait(20) == 0 and starts(pod) == 2
    process.communicate()
    assert not pod.calls("delete")


def test_an_unanswered_question_changes_nothing(pod):
    pod.ready()
    (pod.fake / "fail").write_text("describe\n" * 2)
    result = pod.ok("babysit", "--", "true")
    assert "gcloud gives no answer" in result.stderr and not pod.calls("create")


def spawn(pod, *command):
    """Start babysit without waiting for it."""
    script = pod.repository / "tpu_scripts" / "babysit.sh"
    return subprocess.Popen(
        [script, "--", *command], env=pod.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition):
    for _ in range(100):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("never")
