# SPDX-License-Identifier: Apache-2.0
"""model-port: convert, check, look at and ask Granite Speech models in Hugging Face and Orbax directories."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
from tqdm import tqdm

from model_port.beam import beam_search, check_beams
from model_port.errors import UserError
from model_port.generate import check_sampling, generate
from model_port.libraries import keep_compiled
from model_port.processor import Processor
from model_port.weights import convert
from model_port.weights.comparison import PROMPT
from model_port.weights.inspection import inspect
from model_port.weights.verify import verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0; 1 if what was verified or inspected is not in order; 2 after a mistake that the message explains; 130 if
    interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"model-port: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("model-port: interrupted; nothing was left behind, run the same command again", file=sys.stderr)
        return 130


def run_generate(arguments: Sequence[str]) -> int:
    """Run `generate`, for `jgrpo generate`, which it once was."""
    return main(["generate", *arguments])


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

    command = commands.add_parser("verify", help="compare a converted or exported model with its source")
    command.add_argument("src", metavar="SRC", help="Hugging Face directory")
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="what convert or export made of it")
    command.add_argument("--audio", metavar="FILE", help="recording for the stages (default: a synthetic one)")
    command.add_argument(
        "--prompt", metavar="TEXT", default=PROMPT, help="prompt for the stages (default: %(default)s)"
    )
    command.add_argument("--dtype", choices=convert.DTYPES, default="float32", help="of the computation")
    command.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="tokens of the greedy text")
    command.add_argument("--weights-only", action="store_true", help="compare tensors and files, run no model")
    command.set_defaults(run=_verify)

    command = commands.add_parser("inspect", help="what a model directory is, from headers alone")
    command.add_argument("path", metavar="PATH", help="Hugging Face or Orbax model directory, or an adapter")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("generate", help="ask a model about audio files", allow_abbrev=False)
    command.add_argument("model", metavar="MODEL", help="Hugging Face or Orbax model directory")
    command.add_argument(
        "--audio", metavar="FILE", nargs="+", required=True, help="one for each <|audio|> (wav, flac, mp3, ogg, opus)"
    )
    command.add_argument(
        "--prompt", metavar="TEXT", required=True, help="user message, with <|audio|> where a clip is heard"
    )
    command.add_argument(
        "--system",
        metavar="TEXT",
        help="system message (default: the one of the model's template, if it has one; '' for none)",
    )
    command.add_argument("--num-samples", type=int, default=1, metavar="N", help="answers (default: %(default)s)")
    command.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy")
    command.add_argument("--top-p", type=float, default=1.0, metavar="X", help="the most probable tokens of this mass")
    command.add_argument("--beams", type=int, default=0, metavar="N", help="width of a beam search, for one answer")
    command.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="of an answer (%(default)s)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters and computation"
    )
    command.set_defaults(run=_generate)
    return parser


def _add_lora(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--lora", choices=("keep", "merge"), default="keep", help="keep the adapter apart or fold it into the kernels"
    )


def _convert(arguments: argparse.Namespace) -> int:
    convert.convert(arguments.src, arguments.out, dtype=arguments.dtype, lora=arguments.lora, progress=_bar)
    print(f"wrote {arguments.out}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    convert.export(arguments.checkpoint, arguments.out, dtype=arguments.dtype, lora=arguments.lora, progress=_bar)
    print(f"wrote {arguments.out}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    found = verify(
        arguments.src,
        arguments.checkpoint,
        audio=arguments.audio,
        prompt=arguments.prompt,
        dtype=arguments.dtype,
        max_new_tokens=arguments.max_new_tokens,
        stages=not arguments.weights_only,
    )
    print(found.text())
    return 0 if found.passed else 1


def _inspect(arguments: argparse.Namespace) -> int:
    found = inspect(arguments.path)
    print(found.text())
    return 0 if found.sound else 1


def _generate(arguments: argparse.Namespace) -> int:
    sampling = {name: getattr(arguments, name) for name in ("num_samples", "max_new_tokens", "temperature", "top_p")}
    check_sampling(**sampling)
    search = {"num_beams": arguments.beams, "max_new_tokens": arguments.max_new_tokens}
    if arguments.beams:
        check_beams(**search)
        if arguments.num_samples > 1 or arguments.temperature > 0:
            raise UserError("beam search gives one answer and draws nothing: leave --num-samples and --temperature out")
    keep_compiled()
    processor = Processor.from_pretrained(arguments.model)
    batch = processor(audio=arguments.audio, prompts=[arguments.prompt], system=arguments.system)
    model = convert.load_model(arguments.model, dtype=arguments.dtype)
    if arguments.beams:
        out = beam_search(model, batch, **search)
    else:
        out = generate(model, batch, key=jax.random.key(arguments.seed), **sampling)
    for text in processor.decode(out)[0]:
        print(text.strip())
    return 0


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """Show on standard error how many of `total` bytes are written; in a log, a line every ten seconds."""
    seconds = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, unit="B", unit_scale=True, mininterval=seconds, delay=1.0, leave=False) as bar:
        yield bar.update
