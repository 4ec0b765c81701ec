# SPDX-License-Identifier: Apache-2.0
"""The command line: jgrpo demo | sft | grpo | eval | plan | data | generate.

A mistake of the user's ends in one message on standard error and exit status 2, a SIGTERM in a saved run and 143.
"""

import importlib
import logging
import sys
from collections.abc import Sequence

from jgrpo.about import describe
from model_port.errors import UserError

USAGE = """\
usage: jgrpo COMMAND ...

  jgrpo demo                        train the demo model and compare base, SFT and GRPO
  jgrpo grpo CONFIG.py [OPTIONS]    Group Relative Policy Optimization
  jgrpo sft CONFIG.py [OPTIONS]     supervised fine-tuning on the references
  jgrpo eval CONFIG.py [OPTIONS]    the metrics of a run's policy or its base, beside the paper's
  jgrpo plan CONFIG.py --topology v5e:8x8 [OPTIONS]    does the run fit that TPU slice, and what will a step take
  jgrpo data build | inspect | manifest                make and look into training data
  jgrpo generate MODEL --audio FILE --prompt TEXT      as model-port generate

Every field of a config is an option: jgrpo grpo configs/demo_grpo.py --num-steps 20 --mesh.data 2
`jgrpo grpo --help` lists them with their defaults, `jgrpo grpo CONFIG.py --help` with the values of that file.
`jgrpo --version` names versions, commit and devices.
"""

# The function of each, which may return an exit status; its room is imported when it is asked for.
COMMANDS = {
    "demo": "jgrpo.commands.demo:run_demo",
    "grpo": "jgrpo.commands.train:run_grpo",
    "sft": "jgrpo.commands.train:run_sft",
    "eval": "jgrpo.commands.evaluate:run_eval",
    "plan": "jgrpo.commands.plan:run_plan",
    "data": "jgrpo.commands.data:run_data",
    "generate": "model_port.cli:run_generate",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(describe())
        return 0
    command, rest = arguments[0], arguments[1:]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        if command not in COMMANDS:
            raise UserError(f"unknown command {command!r}; use one of {', '.join(COMMANDS)} (jgrpo --help)")
        room, function = COMMANDS[command].split(":")
        return getattr(importlib.import_module(room), function)(rest) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; a training run goes on from its last checkpoint with the same command", file=sys.stderr)
        return 130
    except SystemExit as end:  # tyro and argparse have printed the help, or what is wrong with an option
        return end.code or 0
