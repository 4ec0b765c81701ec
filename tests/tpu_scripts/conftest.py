"""A repository, a cloud and its workers in a temporary directory; the scripts run for real against a fake gcloud."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "tpu_scripts"
READY = "ACTIVE READY HEALTHY\n"
GRANTED = "WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE CREATING\n" + READY


class Pod:
    """Two workers (a v5litepod-8 would have one, a v4-16 has two) and what scripts are told about them."""

    def __init__(self, home: Path, repository: Path, prepared: Path | None = None):
        self.repository, self.fake, self.local = repository, home / "fake", home / "local"
        self._prepared = prepared
        binaries = home / "bin"
        for directory in (binaries, self.fake / "lives", self.fake / "bucket"):
            directory.mkdir(parents=True)
        for name in ("gcloud", "curl", "hostname", "sudo", "mount", "mountpoint"):
            (binaries / name).symlink_to(Path(__file__).parent / "fake.sh")
        (self.fake / "workers").write_text("2\n")
        self.lives(GRANTED)
        self.environment = {
            "PATH": f"{binaries}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "FAKE": str(self.fake),
            "LOCAL_DIR": str(self.local),
            "POD_NAME": "granite",
            "PROJECT": "my-project",
            "ZONE": "us-central2-b",
            "ACCELERATOR": "v4-16",
            "POLL_SECONDS": "0.05",
            "STOP_POLL_SECONDS": "0.05",
            "BACKOFF": "0",
        }

    def lives(self, *lives: str) -> None:
        """Say what the first, the second, ... slice goes through."""
        for number, life in enumerate(lives, start=1):
            (self.fake / "lives" / str(number)).write_text(life)

    def now(self, life: str) -> None:
        """Change what the present slice goes through from here on."""
        (self.fake / "now").write_text(life)

    def down(self, *workers: int) -> None:
        """Make ssh to these workers fail."""
        (self.fake / "down").write_text("".join(f"{worker}\n" for worker in workers))

    def __call__(self, script: str, *arguments: str, stdin: str = "", **environment: str):
        """Run a script to its end."""
        return subprocess.run(
            [self.repository / "tpu_scripts" / f"{script}.sh", *arguments],
            env=self.environment | environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=20,
        )

    def ok(self, script: str, *arguments: str, **environment: str):
        """Run a script that must succeed."""
        result = self(script, *arguments, **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return result

    def ready(self) -> "Pod":
        """Have a slice that create and setup have made, once for all tests."""
        shutil.copytree(self._prepared, self.fake, dirs_exist_ok=True)
        return self

    def calls(self, *words: str) -> list[str]:
        """Return gcloud's calls that have all these words."""
        path = self.fake / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if set(words) <= set(line.split())]

    def home(self, worker: int) -> Path:
        """Return the directory of the project on a worker."""
        return self.fake / "home" / str(worker) / "jgrpo"

    def processes(self, variable: str = "") -> list[int]:
        """Return what runs on the workers; with a variable in its environment, if one is given."""
        mark, found = f"FAKE_SLICE={self.fake}".encode(), []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it may end at any moment
                environment = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
                if mark in environment.split(b"\0") and variable.encode() in environment:
                    found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """End what a test left on the workers."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A small git repository with the scripts in it."""
    repository = tmp_path_factory.mktemp("template") / "repository"
    repository.mkdir()
    shutil.copytree(SCRIPTS, repository / "tpu_scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, repository)
    (repository / "module.py").write_text("answer = 42\n")
    (repository / "old.py").write_text("gone = True\n")
    (repository / "big.bin").write_bytes(b"0" * 100)
    (repository / ".gitignore").write_text("runs/\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(repository)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "begin"]):
        subprocess.run([*git, *command], check=True)
    return repository


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, template):
    """What a slice is like after create and setup."""
    pod = Pod(tmp_path_factory.mktemp("prepared"), template)
    pod.ok("create")
    pod.ok("setup")
    (pod.fake / "calls").unlink()
    return pod.fake


@pytest.fixture
def pod(tmp_path, template, prepared):
    """A cloud without a slice, and a working tree that a test may change."""
    repository = tmp_path / "repository"
    shutil.copytree(template, repository)
    pod = Pod(tmp_path, repository, prepared)
    yield pod
    pod.kill()
