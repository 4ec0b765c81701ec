"""What every script prints without doing it, its help, its checks of variables, and shellcheck."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent.parent / "tpu_scripts"
GOLDEN = Path(__file__).parent / "golden"
COMMAND = ("--", "jgrpo", "grpo", "configs/covost2_en_de_8b_grpo.py", "--run-dir", "gs://my-bucket/runs/first run")
VERBS = {
    "create": (),
    "setup": (),
    "sync": (),
    "run": COMMAND,
    "logs": ("--worker", "all", "--lines", "50"),
    "status": (),
    "stop": (),
    "delete": (),
    "babysit": COMMAND,
    "convert": ("hf:ibm-granite/granite-speech-3.3-8b", "gs://my-bucket/granite-8b", "--", "--dtype", "bfloat16"),
    "plan": ("configs/covost2_en_de_8b_grpo.py", "--search"),
}
V5E_64 = {
    "ACCELERATOR": "v5litepod-64",
    "ZONE": "us-west4-a",
    "SPOT": "1",
    "VALID_UNTIL": "12h",
    "SERVICE_ACCOUNT": "tpu@my-project.iam.gserviceaccount.com",
    "DATA_DISK": "projects/my-project/zones/us-west4-a/disks/weights",
    "FETCH": "gs://my-bucket/granite-8b=models/granite-8b",
    "EXCLUDE": "demo",
    "SSH_FLAGS": "--internal-ip",
    "JGRPO": "jgrpo",
}


def test_every_script_is_here():
    scripts = {path.stem for path in SCRIPTS.glob("*.sh")}
    assert scripts == set(VERBS) | {"common", "provision", "worker"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_prints_the_commands_and_calls_nothing(pod, verb):
    result = pod.ok(verb, "--dry-run", *VERBS[verb], **V5E_64)
    assert not pod.calls() and not pod.local.exists()
    text = result.stdout.replace(str(pod.repository), "ROOT").replace(str(pod.local), "LOCAL")
    assert text == (GOLDEN / f"{verb}.txt").read_text()
    for line in text.splitlines():
        subprocess.run(["bash", "-n", "-c", line], check=True)


def test_only_provisioning_knows_gcloud():
    for path in SCRIPTS.glob("*.sh"):
        if path.name != "provision.sh":
            assert not re.search(r"gcloud (compute|alpha)", path.read_text()), path


@pytest.mark.parametrize("verb", VERBS)
def test_help(pod, verb):
    result = pod.ok(verb, "--help", POD_NAME="")
    assert result.stdout.startswith(f"{verb}.sh ") and "Variables:" in result.stdout
    assert "Exit status:" in result.stdout and "set -euo" not in result.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"POD_NAME": ""}, "POD_NAME is not set; it takes lower-case letters"),
        ({"POD_NAME": "Pod 1"}, "POD_NAME is 'Pod 1'; allowed is lower-case letters"),
        ({"PROJECT": "a b"}, "PROJECT is 'a b'"),
        ({"ZONE": "us-west4"}, "ZONE is 'us-west4'; allowed is a zone"),
        ({"ACCELERATOR": "v5e-64"}, "allowed is v4-N, v5litepod-N, v5p-N or v6e-N: export ACCELERATOR=v5litepod-64"),
        ({"ACCELERATOR": "v6e-48"}, "sizes of v6e are 1 4 8 16 32 64 128 256"),
        ({"ACCELERATOR": "v4-4"}, "sizes of v4 are 8 16"),
        ({"SPOT": "yes"}, "SPOT is 'yes'; allowed is 0 or 1"),
        ({"SPOT": "1", "RESERVED": "1"}, "exclude each other"),
        ({"RESERVATION_PROJECT": "p"}, "set RESERVED=1 with it"),
        ({"VALID_UNTIL": "6 hours"}, "VALID_UNTIL is '6 hours'"),
        ({"SERVICE_ACCOUNT": "tpu"}, "SERVICE_ACCOUNT is 'tpu'"),
        ({"DATA_DISK": "weights"}, "the full name of a disk"),
        ({"WAIT_SECONDS": "010"}, "WAIT_SECONDS is '010'; allowed is a whole number"),
        ({"POLL_SECONDS": "often"}, "POLL_SECONDS is 'often'"),
        ({"REMOTE_DIR": "a b"}, "REMOTE_DIR is 'a b'"),
    ],
)
def test_a_wrong_variable_of_create(pod, variables, message):
    rejected(pod("create", **variables), message)
    assert not pod.calls()


@pytest.mark.parametrize(
    ("verb", "arguments", "variables", "message"),
    [
        ("create", ("--now",), {}, "unknown argument '--now'; create.sh --help"),
        ("status", ("x",), {}, "unknown argument 'x'"),
        ("run", (), {}, "the command comes after --"),
        ("run", ("--",), {}, "no command after --"),
        ("babysit", ("jgrpo",), {}, "the command comes after --"),
        ("run", ("--", "true"), {"JAX_COORDINATOR_PORT": "80"}, "opens 8470, 8471, 8474 and 8476"),
        ("run", ("--", "true"), {"JAX_COMPILATION_CACHE_DIR": "cache"}, "allowed is gs://BUCKET/DIRECTORY"),
        ("run", ("--", "true"), {"ENV_FILE": "/none"}, "ENV_FILE is '/none', which cannot be read"),
        ("setup", (), {"PYTHON_VERSION": "3.10"}, "PYTHON_VERSION is '3.10'; allowed is 3.11, 3.12 or 3.13"),
        ("setup", (), {"EXTRAS": "tpu gcs"}, "EXTRAS is 'tpu gcs'"),
        ("setup", (), {"UV_VERSION": "latest"}, "UV_VERSION is 'latest'"),
        ("sync", (), {"FETCH": "gs://b/x"}, "FETCH has 'gs://b/x'; allowed is gs://BUCKET/DIRECTORY=PATH"),
        ("sync", (), {"FETCH": "gs://b/x=../y"}, "PATH inside the source"),
        ("sync", (), {"SOURCE_ARCHIVE": "/none"}, "SOURCE_ARCHIVE is '/none', which is no file"),
        ("stop", (), {"GRACE": "1m"}, "GRACE is '1m'"),
        ("logs", ("--worker", "2"), {}, "allowed is all, or a number from 0 to 1"),
        ("logs", ("--lines",), {}, "--lines needs a value"),
        ("babysit", ("--", "true"), {"MAX_RESTARTS": "many"}, "MAX_RESTARTS is 'many'"),
        ("convert", ("gs://b/x",), {}, "SOURCE and TARGET are needed"),
        ("convert", ("granite", "gs://b/x"), {}, "SOURCE is 'granite'; allowed is hf:OWNER/MODEL"),
        ("plan", (), {}, "the config file comes first"),
        ("plan", ("c.py",), {"ACCELERATOR": ""}, "ACCELERATOR is not set"),
    ],
)
def test_a_mistake_in_arguments_or_variables(pod, verb, arguments, variables, message):
    rejected(pod(verb, *arguments, **variables), message)
    assert not pod.calls()


def rejected(result, message):
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: ") and message in result.stderr


def test_a_line_of_the_environment_file_that_is_no_assignment(pod, tmp_path):
    (tmp_path / "env").write_text("A=1\nexport B=2\n")
    rejected(pod("run", "--", "true", ENV_FILE=str(tmp_path / "env")), "env, line 2 is not NAME=VALUE")


def test_shellcheck():
    """Without its data flow analysis, which takes as long again; `make lint` has that."""
    program = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    assert program, "shellcheck is not installed; it comes with the extra test"
    files = [*sorted(SCRIPTS.glob("*.sh")), Path(__file__).parent / "fake.sh"]
    result = subprocess.run(
        [program, "-x", "--extended-analysis=false", *files], cwd=SCRIPTS, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_tidy(path):
    text = path.read_text()
    assert "set -euo pipefail" in text or path.name == "provision.sh"
    assert max(map(len, text.splitlines())) <= 120 and len(text.splitlines()) <= 400
