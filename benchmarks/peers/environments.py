"""The environments of the peers: `python -m benchmarks.peers.environments trl` makes one.

Each peer has versions of its own that it was read and measured with, in requirements-NAME.txt, and never shares an
environment with this project.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from model_port.errors import UserError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DIRECTORY = ROOT / "build" / "peers"


@dataclass(frozen=True)
class Environment:
    """What an environment is made of.

    Attributes:
        requirements: file beside this one, every version pinned.
        modules: that a peer's side imports.
        cuda: requirements on top, on a machine with a GPU. PyPI's torch is a CUDA build by itself.
    """

    requirements: str
    modules: tuple[str, ...]
    cuda: tuple[str, ...] = ()


ENVIRONMENTS = {
    "trl": Environment("requirements-trl.txt", ("trl", "transformers", "torch", "peft")),
    "tunix": Environment("requirements-tunix.txt", ("tunix", "jax"), cuda=("jax[cuda13]==0.10.2",)),
}


def interpreter(name: str, directory: Path) -> Path:
    """Return the Python of an environment.

    Raises:
        UserError: no such environment, or it has not been made.
    """
    if name not in ENVIRONMENTS:
        raise UserError(f"there is no environment {name!r}; there are {', '.join(ENVIRONMENTS)}")
    python = directory / name / "bin" / "python"
    if not python.exists():
        raise UserError(
            f"{python} is not there; make it by `python -m benchmarks.peers.environments {name} "
            f"--environments {directory}`"
        )
    return python


def make(name: str, directory: Path, *, cuda: bool = False) -> Path:
    """Make an environment, or complete the one that is there, and return its Python.

    Raises:
        UserError: a requirement cannot be had, or a module of the peer cannot be imported.
    """
    environment = ENVIRONMENTS[name]
    home = directory / name
    wanted = ["--requirement", str(HERE / environment.requirements), *(environment.cuda if cuda else ())]
    python = home / "bin" / "python"
    steps = [
        [sys.executable, "-m", "venv", str(home)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted],
        [str(python), "-c", f"import {', '.join(environment.modules)}"],
    ]
    for step in steps:
        status = subprocess.run(step, cwd=home.parent if home.parent.exists() else ROOT).returncode
        if status:
            raise UserError(f"`{' '.join(step)}` ended with status {status}; see above, mend it and start again")
    return python


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Let a command line say where the environments are."""
    parser.add_argument("--environments", type=Path, default=DIRECTORY, help="directory of the peers' environments")


def main(arguments: list[str] | None = None) -> int:
    """Make the environments that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=list(ENVIRONMENTS), metavar=f"{{{','.join(ENVIRONMENTS)}}}")
    parser.add_argument("--cuda", action="store_true", help="for an NVIDIA GPU")
    add_argument(parser)
    options = parser.parse_args(arguments)
    options.environments.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        try:
            python = make(name, options.environments.resolve(), cuda=options.cuda)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        print(f"{name}: {python}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
