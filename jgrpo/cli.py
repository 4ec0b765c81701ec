"""The command line: jgrpo demo | sft | grpo | eval | generate.

A mistake of the user's ends in one message on standard error and exit status 2.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from model_port.errors import UserError

USAGE = """\
usage: jgrpo COMMAND ...

  jgrpo demo                        train the demo model and compare base, SFT and GRPO
  jgrpo grpo CONFIG.py [OPTIONS]    Group Relative Policy Optimization
  jgrpo sft CONFIG.py [OPTIONS]     supervised fine-tuning on the references
  jgrpo eval CONFIG.py [OPTIONS]    corpus BLEU, sampled over seeds and greedy, of a run's policy or its base
  jgrpo generate MODEL --audio FILE --prompt TEXT

Every field of a config is an option: jgrpo grpo configs/demo_grpo.py --num-steps 20 --mesh.data 2
`jgrpo COMMAND --help` and `jgrpo grpo CONFIG.py --help` list them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
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
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def read_config(command: str, arguments: list[str], kind: type | None = None):
    """Return the config of CONFIG.py with the command line's overrides."""
    from jgrpo.config import RunConfig, load_config

    if not arguments or arguments[0] in ("-h", "--help"):
        raise UserError(f"jgrpo {command} needs a config file: jgrpo {command} CONFIG.py [OPTIONS]; see configs/")
    config = load_config(arguments[0])
    kind = kind or RunConfig
    if not isinstance(config, kind):
        raise UserError(f"{arguments[0]} gives a {type(config).__name__}; jgrpo {command} needs a {kind.__name__}")
    return config, arguments[1:]


def override(config, arguments: list[str], *, prog: str):
    """Return the config with typed options applied; tyro reports an unknown option or a wrong type, and exits."""
    return tyro.cli(type(config), default=config, args=arguments, prog=prog)


def run_grpo(arguments: list[str]) -> None:
    """Train by GRPO."""
    from jgrpo.config import GRPOConfig
    from jgrpo.train_grpo import train_grpo

    config, rest = read_config("grpo", arguments, GRPOConfig)
    train_grpo(override(config, rest, prog=f"jgrpo grpo {arguments[0]}"))


def run_sft(arguments: list[str]) -> None:
    """Train on references."""
    from jgrpo.config import SFTConfig
    from jgrpo.train_sft import train_sft

    config, rest = read_config("sft", arguments, SFTConfig)
    train_sft(override(config, rest, prog=f"jgrpo sft {arguments[0]}"))


def run_eval(arguments: list[str]) -> None:
    """Evaluate the policy of a run, or its base where it has none yet, on the config's test manifests."""
    from jgrpo.config import with_model
    from jgrpo.setup import evaluate_model

    config, rest = read_config("eval", arguments)
    policy = None
    if "--policy" in rest:
        at = rest.index("--policy")
        if at + 1 == len(rest):
            raise UserError("--policy needs the path of a model directory")
        policy = Path(rest.pop(at + 1))
        rest.pop(at)
    config = override(config, rest, prog=f"jgrpo eval {arguments[0]} [--policy MODEL]")
    if not config.data.test:
        raise UserError("data.test names no manifest; give one: --data.test FILE.jsonl")
    trained = Path(config.run_dir) / "policy"
    policy = policy or (trained if trained.exists() else None)
    if policy is not None:
        config = with_model(config, policy)
    print(f"evaluating {config.model.path}")
    manifests = {Path(path).stem: path for path in config.data.test}
    out = Path(config.run_dir) / "eval" / ("policy" if policy == trained else Path(config.model.path).name)
    results = evaluate_model(config, manifests, out=out)
    for name, result in results.items():
        print(describe(name, result))
    print(f"predictions and results.json are in {out}")


def describe(name: str, result: dict) -> str:
    """Return one line of results."""
    parts = [f"{name}: {result['examples']} examples"]
    if result["sampled"]:
        sampled = result["sampled"]
        parts.append(f"sampled BLEU {sampled['mean']:.2f} ± {sampled['sd']:.2f} over {len(sampled['seeds'])} seeds")
    if result["greedy"] is not None:
        parts.append(f"greedy BLEU {result['greedy']:.2f}")
    return ", ".join(parts) + f"\n  {result['signature']}"


@dataclass(frozen=True)
class GenerateOptions:
    """Ask a model about an audio file."""

    model: tyro.conf.Positional[str]
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

    from model_port import Processor, generate, load_model

    processor = Processor.from_pretrained(options.model)
    batch = processor(audio=list(options.audio), prompts=[options.prompt], system=options.system)
    out = generate(
        load_model(options.model, dtype=options.dtype),
        batch,
        key=jax.random.key(options.seed),
        num_samples=options.num_samples,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
    )
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

    options = tyro.cli(DemoOptions, args=arguments, prog="jgrpo demo")
    demo(Path(options.run_dir), seed=options.seed)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": run_demo,
    "grpo": run_grpo,
    "sft": run_sft,
    "eval": run_eval,
    "generate": run_generate,
}
