# SPDX-License-Identifier: Apache-2.0
"""jgrpo plan: whether a run fits a TPU slice, and what a step will take there."""

import sys

from jgrpo.commands.configs import override, read_config
from jgrpo.config import RunConfig
from jgrpo.planning.plan import plan, plan_parser


def run_plan(arguments: list[str]) -> None:
    """Compile a run for a TPU slice and say what it needs there; exit status 1 if it does not fit."""
    summary = "What the programs of a run need of a TPU slice, compiled for it on this machine: --topology v5e:8x8"
    config, rest = read_config("plan", arguments, RunConfig, summary)
    prog = f"jgrpo plan {arguments[0]} --topology NAME"
    chosen, rest = plan_parser(prog).parse_known_args(rest)
    if not plan(override(config, rest, prog=prog), chosen):
        sys.exit(1)
