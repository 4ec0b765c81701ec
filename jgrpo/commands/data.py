# SPDX-License-Identifier: Apache-2.0
"""The commands of `jgrpo data`: build the paper's data sets, look into what is there, check a manifest."""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

CHOICES = ("features", "seed", "grouping", "validation_fraction")  # of a config; what is not given is build's default
DESCRIPTION = "Training data: build it from downloads, look into it, check a manifest of your own."


def run_data(arguments: list[str]) -> None:
    """Run a command of `jgrpo data`."""
    options = _parser().parse_args(arguments)
    COMMANDS[options.command](options)


def run_build(options: argparse.Namespace) -> None:
    """Build a data set and print what became of every row."""
    from jgrpo.data.builders.build import build, describe, is_built

    chosen = {key: value for key, value in vars(options).items() if key in CHOICES}
    there = not options.overwrite and is_built(options.name, out=options.out, **chosen)
    try:
        directory = build(
            options.name,
            manual_dir=options.manual_dir,
            out=options.out,
            workers=options.workers,
            overwrite=options.overwrite,
            **chosen,
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the clips that have been checked", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    print(f"{directory} is there already; --overwrite builds it again" if there else f"built {directory}")
    print(describe(directory))


def run_inspect(options: argparse.Namespace) -> None:
    """Print what is in a data set or a manifest."""
    from jgrpo.data.inspection import inspect_data

    print(inspect_data(options.path, model=options.model, records=options.records))


def run_manifest(options: argparse.Namespace) -> None:
    """Check a manifest; every unusable line is named."""
    from jgrpo.data.inspection import check_manifest

    print(check_manifest(options.path))


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "build": run_build,
    "inspect": run_inspect,
    "manifest": run_manifest,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jgrpo data", description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="build | inspect | manifest")
    build = commands.add_parser(
        "build",
        help="make a data set of LibriSQA or CoVoST2 from its downloads",
        description="Check every clip and write a data set; docs/data.md says what to download. A build that was "
        "interrupted goes on with the same command.",
        allow_abbrev=False,
    )
    build.add_argument("name", metavar="NAME", help="librisqa/part1, librisqa/part2, covost2/en_de, covost2/fr_en, ...")
    build.add_argument("--manual-dir", required=True, type=Path, metavar="DIR", help="where the downloads lie")
    build.add_argument("--out", required=True, type=Path, metavar="DIR", help="written to DIR/NAME/VERSION")
    build.add_argument("--features", action="store_true", help="store log-mel features, too; NAME then ends so")
    build.add_argument("--workers", type=int, metavar="N", help="processes that decode; one per core by default")
    build.add_argument("--overwrite", action="store_true", help="build again what is there; it stays until then")
    held_out = build.add_argument_group("the validation split of LibriSQA, which has none of its own")
    held_out.add_argument("--seed", type=int, default=argparse.SUPPRESS, metavar="N", help="of the draw; 0 by default")
    held_out.add_argument(
        "--grouping",
        default=argparse.SUPPRESS,
        metavar="utterance|speaker",
        help="what is drawn, utterance by default; by speaker no one is heard in both splits",
    )
    held_out.add_argument(
        "--validation-fraction",
        type=float,
        default=argparse.SUPPRESS,
        metavar="X",
        help="of the training rows; the paper's fifth by default",
    )
    inspect = commands.add_parser(
        "inspect",
        help="counts, lengths, drops and a few records of what was built, or of a manifest",
        allow_abbrev=False,
    )
    inspect.add_argument(
        "path", metavar="PATH", help="a built data set, one of its splits as PATH:SPLIT, or a manifest"
    )
    inspect.add_argument("--model", metavar="DIR", help="count the tokens of its tokenizer")
    inspect.add_argument("--records", type=int, default=3, metavar="N", help="how many to show; 3 by default")
    manifest = commands.add_parser(
        "manifest", help="check every line and audio file of a JSON-lines manifest", allow_abbrev=False
    )
    manifest.add_argument("path", metavar="FILE")
    return parser
