# SPDX-License-Identifier: Apache-2.0
"""A data set by its path: a manifest, or a split of one that was built."""

import re
from collections.abc import Sequence
from pathlib import Path

from jgrpo.data.built import open_built, parse_split, read_built
from jgrpo.data.examples import Examples
from jgrpo.data.manifest import read_manifest
from model_port.errors import UserError

VERSION = re.compile(r"\d+\.\d+\.\d+")


def read_examples(path: str, *, prompts: Sequence[str] = (), reference: str = "", vary: bool = False) -> Examples:
    """Return the examples of a JSONL manifest or of PATH:SPLIT, a split of a built data set or a part of one.

    Args:
        prompts: templates; without any, the prompts of the manifest or the task of the data set.
        reference: column of the references; if empty, likewise.
        vary: whether each example takes a template of its own, as in training, or all the first, as in evaluation.

    Raises:
        UserError: as read_manifest and read_built do, or a directory without a split.
    """
    task = {"prompts": prompts, "reference": reference, "vary": vary}
    if parse_split(path) is not None:
        return read_built(path, **task)
    if Path(path).is_dir():
        splits = open_built(path).splits
        raise UserError(f"{path} is a directory; name a split of it: {path}:{next(iter(splits))} ({', '.join(splits)})")
    return read_manifest(path, **task)


def source_name(path: str) -> str:
    """Return what a data set is called where no name is given: the file's stem, or the config before the split."""
    parts = parse_split(path)
    if parts is None:
        return Path(path).stem
    directory = Path(parts["path"])
    return directory.parent.name if VERSION.fullmatch(directory.name) else directory.name


def set_names(paths: Sequence[str]) -> dict[str, str]:
    """Return {name: path} of evaluation sets: the file's stem, or config and split, such as part1_test.

    Raises:
        UserError: none, or two of one name, which results go by.
    """
    if not paths:
        raise UserError("data.test names nothing; give a manifest or a split: --data.test FILE.jsonl")
    named = {}
    for path in paths:
        name = source_name(path)
        if (parts := parse_split(path)) is not None:
            name += "_" + re.sub(r"[^\w.]+", "_", path[len(parts["path"]) + 1 :]).strip("_")
        if name in named:
            raise UserError(f"results go by name, and data.test has {name} twice: {', '.join(paths)}")
        named[name] = path
    return named
