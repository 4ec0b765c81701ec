"""model-port: convert Granite Speech weights between Hugging Face and Orbax directories."""

import argparse
import sys
from collections.abc import Sequence

from model_port.errors import UserError
from model_port.weights import convert


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 2 after a mistake that the message explains."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"model-port: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="model-port", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("convert", help="Hugging Face directory -> Orbax model directory")
    command.add_argument("src", metavar="SRC", help="Hugging Face directory")
    command.add_argument("out", metavar="OUT", help="directory to write; must not exist or be empty")
    command.add_argument("--dtype", choices=convert.DTYPES, help="dtype to store (default: the source's)")
    _add_lora(command)
    command.set_defaults(run=_convert)

    command = commands.add_parser("export", help="Orbax model directory -> Hugging Face directory")
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="Orbax model directory, e.g. the policy of a run")
    command.add_argument("out", metavar="OUT", help="directory to write; must not exist or be empty")
    command.add_argument("--dtype", choices=convert.DTYPES, help="dtype to store (default: the checkpoint's)")
    _add_lora(command)
    command.set_defaults(run=_export)
    return parser


def _add_lora(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--lora", choices=("keep", "merge"), default="keep", help="keep the adapter apart or fold it into the kernels"
    )


def _convert(arguments: argparse.Namespace) -> int:
    convert.convert(arguments.src, arguments.out, dtype=arguments.dtype, lora=arguments.lora)
    print(f"wrote {arguments.out}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    convert.export(arguments.checkpoint, arguments.out, dtype=arguments.dtype, lora=arguments.lora)
    print(f"wrote {arguments.out}")
    return 0
