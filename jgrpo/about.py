# SPDX-License-Identifier: Apache-2.0
"""What runs here: version, commit, and the versions that its numbers depend on."""

import collections
import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from jgrpo import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "sacrebleu", "numpy")
ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "_data"  # of a wheel: configs/ and demo/, as they lie in a checkout


def versions() -> dict[str, str]:
    """Return the versions of jgrpo, of Python and of the packages that numbers depend on, as far as installed."""
    found = {"jgrpo": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit of the checkout that runs, marked where files of it have changed; None outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout of somebody else
        return None


def code_digest() -> str:
    """Return a digest of the sources of both packages."""
    digest = hashlib.sha256()
    for folder in (ROOT / "model_port", ROOT / "jgrpo"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def made_by() -> dict[str, Any]:
    """Return what a run was made by: commit, command line and versions."""
    return {"commit": commit(), "command": sys.argv, "versions": versions()}


def describe() -> str:
    """Return versions, commit and devices as a person reads them."""
    lines = [f"{name} {version}" for name, version in versions().items()]
    lines.insert(1, f"commit {commit() or 'unknown: not a checkout'}")
    kinds = collections.Counter(f"{device.platform} {device.device_kind}" for device in jax.devices())
    return "\n".join([*lines, "devices " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items())])
