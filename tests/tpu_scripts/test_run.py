"""run, logs, status and stop, with real processes on the workers."""

import os
import time

import pytest

# Saves when SIGTERM comes, and leaves as `jgrpo` does.
POLITE = "trap 'echo saved; exit 143' TERM; echo begun; while :; do sleep 0.05; done"
# What a program does after jax.distributed.initialize().
DEAF = "trap '' TERM; echo begun; while :; do sleep 0.05; done"


def wait_for(condition, what):
    """Wait for what other processes do."""
    for _ in range(400):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"never: {what}")


def log(pod, worker):
    return (pod.home(worker) / "run" / "log").read_text()


def begun(pod, *workers):
    wait_for(lambda: all("begun" in log(pod, worker) for worker in workers), "the program begins")


def test_a_run_outlives_its_connection_and_ends_by_itself(pod):
    pod.ready()
    result = pod.ok("run", "--", "bash", "-c", "echo begun in $PWD; while [[ ! -e end ]]; do sleep 0.05; done")
    assert "start: done on 2 workers" in result.stderr
    begun(pod, 0, 1)
    status = pod("status")
    assert status.returncode == 0 and "run: running" in status.stdout
    assert "worker 1: running" in status.stdout and "host=t1v-fake-w-1" in status.stdout
    for worker in (0, 1):
        (pod.home(worker) / "source" / "end").touch()
    wait_for(lambda: not pod.processes(), "the run ends")
    status = pod("status")
    assert status.returncode == 0 and "run: finished" in status.stdout and "exit=0" in status.stdout


def test_the_environment_of_a_run(pod, tmp_path):
    pod.ready()
    (tmp_path / "secrets").write_text("# comment\n\nTOKEN=a 'b' $c = d\nLAST=no newline")
    variables = {"JAX_COMPILATION_CACHE_DIR": "gs://b/xla", "LIBTPU_INIT_ARGS": "--xla_a=1 --xla_b=2"}
    pod.ok("run", "--", "env", ENV_FILE=str(tmp_path / "secrets"), **variables)
    wait_for(lambda: not pod.processes(), "the run ends")
    lines = log(pod, 1).splitlines()
    for name, value in variables.items():
        assert f"{name}={value}" in lines
    assert "TOKEN=a 'b' $c = d" in lines and "LAST=no newline" in lines
    assert "JAX_COORDINATOR_PORT=8476" in lines
    assert f"VIRTUAL_ENV={pod.home(1)}/venv" in lines and "JGRPO_SUPERVISOR" not in log(pod, 1)
    assert not [call for call in pod.calls() if "TOKEN" in call]
    assert not (pod.local / "env").exists()
    assert (pod.home(0) / "run" / "env").stat().st_mode & 0o777 == 0o600


def test_the_command_arrives_as_it_was_given(pod):
    pod.ready()
    awkward = ["two words", "it's", '"', "$HOME", "*", "", "back\\slash", "line\nbreak", "ä"]
    pod.ok("run", "--", "printf", "<%s>", *awkward)
    wait_for(lambda: not pod.processes(), "the run ends")
    assert "".join(f"<{word}>" for word in awkward) in log(pod, 0)


def test_a_second_run_is_refused(pod):
    pod.ready()
    pod.ok("run", "--", "bash", "-c", POLITE)
    result = pod("run", "--", "true")
    assert result.returncode == 3 and "stop.sh ends it" in result.stderr
    for script in ("sync", "setup"):
        result = pod(script)
        assert result.returncode == 3 and "a run is in progress on t1v-fake-w-0" in result.stderr, script
    assert len(pod.processes()) >= 2


def test_stop_lets_a_run_save(pod):
    pod.ready()
    pod.ok("run", "--", "bash", "-c", POLITE)
    begun(pod, 0, 1)
    result = pod.ok("stop", GRACE="10")
    assert "worker 1: stopped, exit status 143" in result.stdout
    assert "saved" in log(pod, 0) and "saved" in log(pod, 1)
    assert not pod.processes()
    status = pod("status")
    assert status.returncode == 143 and "run: stopped" in status.stdout and "asked=yes" in status.stdout
    assert "no run" not in pod.ok("stop").stdout


def test_stop_kills_what_ignores_sigterm(pod):
    pod.ready()
    pod.ok("run", "--", "bash", "-c", DEAF)
    begun(pod, 0, 1)
    result = pod.ok("stop", GRACE="1")
    assert "worker 0: stopped by SIGKILL after 1 s, exit status 137" in result.stdout
    assert not pod.processes()
    assert pod("status").returncode == 143


def test_stop_finds_helpers_that_left_the_process_group(pod):
    pod.ready()
    pod.ok("run", "--", "bash", "-c", f"setsid bash -c {DEAF!r} & sleep 0.2; trap 'exit 143' TERM; wait")
    begun(pod, 0, 1)
    pod.ok("stop", GRACE="1")
    assert not pod.processes()


def test_stop_sends_sigterm_to_the_program_before_its_helpers(pod):
    """A training process may need its loaders until it has saved."""
    helper = "trap 'echo helper told; exit' TERM; while :; do sleep 0.05; done"
    program = f"bash -c {helper!r} & " + POLITE.replace("echo saved", "sleep 0.3; echo saved")
    pod.ready()
    pod.ok("run", "--", "bash", "-c", program)
    begun(pod, 0, 1)
    pod.ok("stop", GRACE="10")
    assert log(pod, 0).index("saved") < log(pod, 0).index("helper told")


def test_stop_reports_a_worker_that_it_did_not_reach(pod):
    pod.ready()
    pod.ok("run", "--", "bash", "-c", POLITE)
    begun(pod, 0, 1)
    pod.down(1)
    result = pod("stop", GRACE="10")
    assert result.returncode == 4 and "worker 1 did not answer: ssh: connect" in result.stderr
    assert pod.processes()
    pod.down()
    pod.ok("stop", GRACE="10")
    assert not pod.processes()


def test_a_run_that_cannot_start_everywhere_starts_nowhere(pod):
    pod.ready()
    (pod.home(1) / "installed").unlink()
    result = pod("run", "--", "bash", "-c", POLITE)
    assert result.returncode == 3 and "worker 1: error: the packages on t1v-fake-w-1 are not installed" in result.stderr
    assert not pod.processes()


def test_a_run_does_not_start_while_a_worker_is_silent(pod):
    pod.ready()
    pod.down(0)
    result = pod("run", "--", "true")
    assert result.returncode == 4 and "worker 0 did not answer" in result.stderr
    assert not (pod.home(1) / "run").exists()


@pytest.mark.parametrize(("command", "code"), [(("no-such-program",), 127), (("bash", "-c", "kill -KILL $$"), 137)])
def test_status_of_a_run_that_failed(pod, command, code):
    pod.ready()
    pod.ok("run", "--", *command)
    wait_for(lambda: not pod.processes(), "the run ends")
    status = pod("status")
    assert status.returncode == 1 and "run: failed" in status.stdout and f"exit={code} " in status.stdout


def test_status_when_a_host_has_died(pod):
    """A reboot leaves no exit status."""
    pod.ready()
    pod.ok("run", "--", "bash", "-c", POLITE)
    begun(pod, 0, 1)
    pod.kill()
    wait_for(lambda: not pod.processes(), "all dead")
    status = pod("status")
    assert status.returncode == 1 and "exit=unknown" in status.stdout


def test_sigterm_of_a_host_that_shuts_down_reaches_the_program(pod):
    pod.ready()
    pod.ok("run", "--", "bash", "-c", POLITE)
    begun(pod, 0, 1)
    for process in pod.processes("JGRPO_SUPERVISOR="):
        os.kill(process, 15)
    wait_for(lambda: not pod.processes(), "the run ends")
    assert "saved" in log(pod, 0)
    assert (pod.home(1) / "run" / "exit_code").read_text() == "143\n"


def test_logs_of_one_worker_and_of_all(pod):
    pod.ready()
    pod.ok("run", "--", "bash", "-c", "for i in 1 2 3; do echo line $i; done")
    wait_for(lambda: not pod.processes(), "the run ends")
    one = pod.ok("logs", "--worker", "1", "--lines", "3", "--no-follow").stdout
    assert "[t1v-fake-w-1] line 3" in one and "line 1" not in one and "w-0" not in one
    everything = pod.ok("logs", "--worker", "all").stdout
    assert "[t1v-fake-w-0] line 1" in everything and "[t1v-fake-w-1] line 1" in everything


def test_logs_follow_a_run_to_its_end(pod):
    pod.ready()
    pod.ok("run", "--", "bash", "-c", "echo begun; while [[ ! -e end ]]; do sleep 0.05; done; echo bye")
    begun(pod, 0)
    for worker in (0, 1):
        (pod.home(worker) / "source" / "end").touch()
    assert "[t1v-fake-w-0] bye" in pod.ok("logs").stdout


def test_questions_about_no_run(pod):
    pod.ready()
    assert pod("status").returncode == 3
    assert pod("logs").returncode == 3
    assert "worker 0: no run" in pod.ok("stop").stdout
