"""The command line: jgrpo demo | sft | grpo | eval | plan | data | generate.

A mistake of the user's ends in one message on standard error and exit status 2, a SIGTERM in a saved run and 143.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Literal

import tyro

from model_port.errors import UserError

USAGE = """\
usage: jgrpo COMMAND ...

  jgrpo demo                        train the demo model and compare base, SFT and GRPO
  jgrpo grpo CONFIG.py [OPTIONS]    Group Relative Policy Optimization
  jgrpo sft CONFIG.py [OPTIONS]     supervised fine-tuning on the references
  jgrpo eval CONFIG.py [OPTIONS]    the metrics of a run's policy or its base, beside the paper's
  jgrpo plan CONFIG.py --topology v5e:8x8 [OPTIONS]    does the run fit that TPU slice, and what will a step take
  jgrpo data build | inspect | manifest                make and look into training data
  jgrpo generate MODEL --audio FILE --prompt TEXT

Every field of a config is an option: jgrpo grpo configs/demo_grpo.py --num-steps 20 --mesh.data 2
`jgrpo grpo --help` lists them with their defaults, `jgrpo grpo CONFIG.py --help` with the values of that file.
"""

CONFIG_HELP = """\
{summary}

CONFIG.py is a Python file whose get_config() returns {kinds}; configs/ has
examples. Every field of it is an option below. An option goes before what the file says;
what is marked required is set by the file.
"""

KINDS = {"RunConfig": "an SFTConfig or a GRPOConfig", "SFTConfig": "an SFTConfig", "GRPOConfig": "a GRPOConfig"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        if command not in COMMANDS:
            raise UserError(f"unknown command {command!r}; use one of {', '.join(COMMANDS)} (jgrpo --help)")
        COMMANDS[command](rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; a training run goes on from its last checkpoint with the same command", file=sys.stderr)
        return 130
    except SystemExit as end:  # tyro and argparse have printed the help, or what is wrong with an option
        return end.code or 0
    return 0


def read_config(command: str, arguments: list[str], kind: type, summary: str):
    """Return the config of CONFIG.py and the options after it; in the place of a file, --help prints all options."""
    from jgrpo.config import load_config

    if any(argument in ("-h", "--help") for argument in arguments[:1]):
        description = CONFIG_HELP.format(summary=summary, kinds=KINDS[kind.__name__])
        tyro.cli(kind, args=["--help"], prog=f"jgrpo {command} CONFIG.py", description=description)
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"the config file comes first: jgrpo {command} CONFIG.py [OPTIONS]; configs/ has examples")
    config = load_config(arguments[0])
    if not isinstance(config, kind):
        given = KINDS[type(config).__name__]
        raise UserError(f"{arguments[0]} returns {given}, and jgrpo {command} needs {KINDS[kind.__name__]}")
    return config, arguments[1:]


def override(config, arguments: list[str], *, prog: str):
    """Return the config with typed options applied; tyro reports an unknown option or a wrong type, and exits."""
    return tyro.cli(type(config), default=config, args=arguments, prog=prog)


def run_grpo(arguments: list[str]) -> None:
    """Train by GRPO."""
    from jgrpo.config import GRPOConfig
    from jgrpo.train_grpo import train_grpo

    config, rest = read_config("grpo", arguments, GRPOConfig, "Train by Group Relative Policy Optimization.")
    config = override(config, rest, prog=f"jgrpo grpo {arguments[0]}")
    train(train_grpo, config)


def run_sft(arguments: list[str]) -> None:
    """Train on references."""
    from jgrpo.config import SFTConfig
    from jgrpo.train_sft import train_sft

    config, rest = read_config("sft", arguments, SFTConfig, "Train on the references.")
    config = override(config, rest, prog=f"jgrpo sft {arguments[0]}")
    train(train_sft, config)


def train(method: Callable, config) -> None:
    """Train; leave with the status that a shell gives to SIGTERM if that came."""
    from jgrpo.runtime.compilations import keep_compiled
    from jgrpo.runtime.distributed import joined
    from jgrpo.runtime.stop import Stopped

    keep_compiled()
    try:
        with joined(config.distributed):
            method(config)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


def run_eval(arguments: list[str]) -> None:
    """Evaluate a run's policy, its base where it has none yet, or another model on the config's test sets."""
    from jgrpo.config import RunConfig, with_model
    from jgrpo.data.sources import set_names
    from jgrpo.paper import base_row
    from jgrpo.report import evaluation_table
    from jgrpo.runtime.compilations import keep_compiled
    from jgrpo.runtime.distributed import joined
    from jgrpo.setup import evaluate_model
    from model_port.paths import as_path, resolved

    summary = (
        "The scores of eval.metrics on the sets of data.test: of the policy in the run directory, of the base "
        "where there is none yet, or of the model directory given as --policy MODEL."
    )
    config, rest = read_config("eval", arguments, RunConfig, summary)
    parser = argparse.ArgumentParser(prog=f"jgrpo eval {arguments[0]}", add_help=False, allow_abbrev=False)
    parser.add_argument("--policy", metavar="MODEL")
    chosen, rest = parser.parse_known_args(rest)
    config = override(config, rest, prog=f"jgrpo eval {arguments[0]} [--policy MODEL]")
    sets = set_names(config.data.test)
    base, run_dir = config.model.path, as_path(config.run_dir)
    trained = run_dir / "policy"
    policy = chosen.policy or (trained if trained.exists() else None)
    if policy is None:
        print(f"{trained} does not exist yet: evaluating the base, {config.model.path}")
    else:
        config = with_model(config, policy)
        print(f"evaluating {policy}")
    is_base = resolved(config.model.path) == resolved(base)
    paper = base_row(config.paper) if config.paper and is_base else config.paper
    out = run_dir / "eval" / result_name(as_path(config.model.path), trained)
    keep_compiled()
    with joined(config.distributed):
        results = evaluate_model(config, sets, out=out)
    for name, result in results.items():
        print(f"\n{evaluation_table(name, result, paper=paper)}")
    print(f"predictions and results.json are in {out}")


def result_name(model: PurePath, trained: PurePath) -> str:
    """Return the directory of a model's results; a policy of another run goes by that run's name."""
    return model.parent.name if model.name == "policy" and model != trained else model.name


@dataclass(frozen=True)
class GenerateOptions:
    """Ask a model about an audio file."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A Hugging Face directory or an Orbax model directory."""
    audio: tuple[str, ...]
    """Audio file (wav, flac, mp3, ogg); one per <|audio|> in the prompt."""
    prompt: str
    """User message with <|audio|> where the clip is heard."""
    system: str | None = None
    """System message; none by default."""
    num_samples: int = 1
    """Answers to give."""
    temperature: float = 0.0
    """0 decodes greedily."""
    top_p: float = 1.0
    """Sample from the most probable tokens that hold this mass."""
    beams: int = 0
    """Width of a beam search, which gives one answer; 0 for none."""
    max_new_tokens: int = 200
    """Longest answer."""
    seed: int = 0
    """Of the sampling."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and computation."""


def run_generate(arguments: list[str]) -> None:
    """Print a model's answers."""
    options = tyro.cli(GenerateOptions, args=arguments, prog="jgrpo generate")
    import jax

    from jgrpo.runtime.compilations import keep_compiled
    from model_port import Processor, generate, load_model
    from model_port.beam import beam_search, check_beams
    from model_port.generate import check_sampling

    sampling = {name: getattr(options, name) for name in ("num_samples", "max_new_tokens", "temperature", "top_p")}
    check_sampling(**sampling)
    search = {"num_beams": options.beams, "max_new_tokens": options.max_new_tokens}
    if options.beams:
        check_beams(**search)
        if options.num_samples > 1 or options.temperature > 0:
            raise UserError("beam search gives one answer and draws nothing: leave --num-samples and --temperature out")
    keep_compiled()
    processor = Processor.from_pretrained(options.model)
    batch = processor(audio=list(options.audio), prompts=[options.prompt], system=options.system)
    model = load_model(options.model, dtype=options.dtype)
    if options.beams:
        out = beam_search(model, batch, **search)
    else:
        out = generate(model, batch, key=jax.random.key(options.seed), **sampling)
    for text in processor.decode(out)[0]:
        print(text.strip())


@dataclass(frozen=True)
class DemoOptions:
    """Train the small model of demo/ by SFT and GRPO and compare them."""

    run_dir: str = "runs/demo"
    """Where everything is written; an earlier demo there is replaced."""
    seed: Annotated[int, tyro.conf.arg(help="Of both trainings.")] = 0


def run_demo(arguments: list[str]) -> None:
    """Run the demo."""
    from jgrpo.demo import demo
    from jgrpo.runtime.compilations import keep_compiled
    from model_port.paths import is_remote

    options = tyro.cli(DemoOptions, args=arguments, prog="jgrpo demo")
    if is_remote(options.run_dir):
        raise UserError(f"--run-dir is {options.run_dir}; the demo writes to a disk, give a directory")
    keep_compiled()
    demo(Path(options.run_dir), seed=options.seed)


def run_plan(arguments: list[str]) -> None:
    """Compile a run for a TPU slice and say what it needs there; exit status 1 if it does not fit."""
    from jgrpo.config import RunConfig
    from jgrpo.plan import plan, plan_parser

    summary = "What the programs of a run need of a TPU slice, compiled for it on this machine: --topology v5e:8x8"
    config, rest = read_config("plan", arguments, RunConfig, summary)
    prog = f"jgrpo plan {arguments[0]} --topology NAME"
    chosen, rest = plan_parser(prog).parse_known_args(rest)
    if not plan(override(config, rest, prog=prog), chosen):
        sys.exit(1)


def run_data(arguments: list[str]) -> None:
    """Build data sets and look into them."""
    from jgrpo.data_commands import run_data

    run_data(arguments)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": run_demo,
    "grpo": run_grpo,
    "sft": run_sft,
    "eval": run_eval,
    "plan": run_plan,
    "data": run_data,
    "generate": run_generate,
}
