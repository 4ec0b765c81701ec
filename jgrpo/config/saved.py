# SPDX-License-Identifier: Apache-2.0
"""The config of a run in its directory: written down, and compared when the run is resumed."""

import dataclasses
import json
import os
from typing import Any

from jgrpo.about import made_by
from jgrpo.config import RunConfig
from model_port.errors import UserError
from model_port.paths import as_path, write_whole

# What may differ when a run is resumed: none of it changes the numbers of a step.
FREE_TO_CHANGE = (
    "run_dir",
    "mesh",
    "eval",
    "checkpoint",
    "distributed",
    "rollout_weights",
    "rollout_layers",
    "completions_every",
    "max_skipped_updates",
    "paper",
    "data.validation",
    "data.test",
    "data.cache_features",
    "data.max_unreadable",
    "grpo.rollout_chunks",
    "grpo.reward_workers",
)


def check_same_run(config: RunConfig, path: str | os.PathLike) -> None:
    """Raise a UserError if the file that `save_config` wrote describes another run; it names the fields that differ."""
    path = as_path(path)
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it, or use another --run-dir") from error
    saved.pop("made_by", None)
    old, new = _flatten(saved), _flatten(_resolved(config))
    changed = [
        name
        for name in {**old, **new}
        if old.get(name) != new.get(name) and not f"{name}.".startswith(tuple(f"{free}." for free in FREE_TO_CHANGE))
    ]
    if changed:
        lines = "\n".join(f"  {name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in changed)
        raise UserError(
            f"{path.parent} holds a run with another config:\n{lines}\nuse another --run-dir or the same config"
        )


def save_config(config: RunConfig, path: str | os.PathLike) -> None:
    """Write the resolved config and kind of run as JSON; `made_by` is the commit, command, versions of this start."""
    write_whole(path, json.dumps({**_resolved(config), "made_by": made_by()}, indent=2) + "\n")


def _resolved(config: RunConfig) -> dict[str, Any]:
    """Return the config as JSON gives it back."""
    return json.loads(json.dumps({"kind": type(config).__name__, **dataclasses.asdict(config)}))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
