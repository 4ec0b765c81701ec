# SPDX-License-Identifier: Apache-2.0
"""From a name and the downloads to a finished data set on disk."""

import contextlib
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jgrpo.data.builders import covost2, librisqa
from jgrpo.data.builders.builder import SpeechBuilder, SpeechConfig
from model_port.errors import UserError
from model_port.libraries import quiet

CARD = "jgrpo.json"
WORK = ".building"  # in the output directory: what is not finished


def names() -> list[str]:
    """Return what can be built."""
    pairs = [config.name for config in covost2.Covost2.BUILDER_CONFIGS if not config.features]
    return [*(f"librisqa/{part}" for part in librisqa.TEXTS), *(f"covost2/{pair}" for pair in pairs)]


def build(
    name: str,
    *,
    manual_dir: str | Path,
    out: str | Path,
    workers: int | None = None,
    overwrite: bool = False,
    **chosen: Any,
) -> Path:
    """Build a data set, unless it is there, and return the directory of its version.

    What was found out about the clips outlives an interruption, and the same call goes on from there. The data set
    gets its place when it is complete; with `overwrite` an older one stays in it until then.

    Args:
        name: librisqa/part1, librisqa/part2, or covost2/ and a pair of languages such as en_de.
        manual_dir: where the downloads lie.
        out: where data sets go, each as NAME/CONFIG/VERSION.
        workers: processes that decode; None for one per core, 0 for this one alone.
        chosen: of the config, as in `choose`.

    Raises:
        UserError: an unknown name, downloads that are missing or damaged, or no room for the result.
    """
    kind, config = choose(name, **chosen)
    manual_dir, final = Path(manual_dir), version_dir(out, kind, config)
    if (final / CARD).is_file() and not overwrite:
        return final
    if final.exists() and not overwrite:
        raise UserError(f"{final} exists and is not a data set of jgrpo's; move it away, or replace it by --overwrite.")
    if not manual_dir.is_dir():
        raise UserError(f"{manual_dir}: no such directory.\n{kind.MANUAL_DOWNLOAD_INSTRUCTIONS}")
    try:
        with (
            _alone(Path(out) / WORK, f"{kind.name}-{config.name}") as aside,
            quiet("absl"),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            # TFDS announces downloads, and configs that it does not know by name.
            checks = aside.with_name(f"{aside.name}-checks.jsonl")
            builder = kind(data_dir=aside, config=config, workers=workers, checks=checks)
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
            final.parent.mkdir(parents=True, exist_ok=True)
            if final.exists():
                final.rename(aside / "replaced")
            Path(builder.data_dir).rename(final)
            checks.unlink()
    except OSError as error:
        raise UserError(
            f"{error.filename or final}: {error.strerror or error}; the same command goes on from here."
        ) from error
    return final


def is_built(name: str, *, out: str | Path, **chosen: Any) -> bool:
    """Whether `build` has nothing to do."""
    return (version_dir(out, *choose(name, **chosen)) / CARD).is_file()


def choose(
    name: str,
    *,
    features: bool = False,
    seed: int = 0,
    grouping: str = "utterance",
    validation_fraction: float = librisqa.DEFAULT_FRACTION,
) -> tuple[type[SpeechBuilder], SpeechConfig]:
    """Return the builder and the config that a name and its options stand for.

    Args:
        features: store the log-mel features beside the audio, in a config of its own.
        seed, grouping, validation_fraction: of LibriSQA's validation split; see LibrisqaConfig.
    """
    if name not in names():
        raise UserError(f"there is no data set {name!r}; there are {', '.join(names())}.")
    kind, _, which = name.partition("/")
    if kind == "librisqa":
        chosen = librisqa.make_config(
            which, grouping=grouping, fraction=validation_fraction, seed=seed, features=features
        )
        return librisqa.Librisqa, librisqa.Librisqa.builder_configs.get(chosen.name, chosen)
    if (seed, grouping, validation_fraction) != (0, "utterance", librisqa.DEFAULT_FRACTION):
        raise UserError(f"{name} comes with a validation split; leave seed, grouping and validation fraction out.")
    config = covost2.make_config(*which.split("_"), features=features)
    return covost2.Covost2, covost2.Covost2.builder_configs[config.name]


def version_dir(out: str | Path, kind: type[SpeechBuilder], config: SpeechConfig) -> Path:
    """Return where a data set lies."""
    return Path(out) / kind.name / config.name / str(kind.VERSION)


def describe(directory: Path) -> str:
    """Return the splits and drops of a built data set as text."""
    card = json.loads((directory / CARD).read_text(encoding="utf-8"))
    lines = []
    for split, size in card["splits"].items():
        lines.append(f"{split}: {size['records']:,} records, {size['hours']:,.2f} hours")
    for split, reasons in card["drops"].items():
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"dropped from {split}: {count:,} {reason}")
    if any(card["drops"].values()):
        lines.append(f"each of them is named in {directory / 'dropped'}")
    lines.append(f"audio files that belong to no row: {card['source']['clips_without_row']:,}")
    return "\n".join(lines)


@contextlib.contextmanager
def _alone(work: Path, label: str) -> Iterator[Path]:
    """Give an empty directory to build in, and hold its lock, which ends with the process however that ends."""
    work.mkdir(parents=True, exist_ok=True)
    path, aside = work / f"{label}.lock", work / label
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{aside} is being built by another process; wait for it or end it.") from error
        if not path.exists() or path.stat().st_ino != os.fstat(lock.fileno()).st_ino:
            raise UserError(f"{aside} was being built by another process until now; give the command again.")
        try:
            shutil.rmtree(aside, ignore_errors=True)  # of a build that was killed
            aside.mkdir()
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            path.unlink()
            with contextlib.suppress(OSError):  # other builds may be at work in it, or there are checks to go on from
                work.rmdir()
