# SPDX-License-Identifier: Apache-2.0
"""jgrpo grpo and jgrpo sft: training as a config says."""

import signal
import sys
from collections.abc import Callable

from jgrpo.commands.configs import override, read_config
from jgrpo.config import GRPOConfig, SFTConfig
from jgrpo.runtime.distributed import joined
from jgrpo.runtime.stop import Stopped
from jgrpo.train_grpo import train_grpo
from jgrpo.train_sft import train_sft
from model_port.libraries import keep_compiled


def run_grpo(arguments: list[str]) -> None:
    """Train by GRPO."""
    config, rest = read_config("grpo", arguments, GRPOConfig, "Train by Group Relative Policy Optimization.")
    config = override(config, rest, prog=f"jgrpo grpo {arguments[0]}")
    train(train_grpo, config)


def run_sft(arguments: list[str]) -> None:
    """Train on references."""
    config, rest = read_config("sft", arguments, SFTConfig, "Train on the references.")
    config = override(config, rest, prog=f"jgrpo sft {arguments[0]}")
    train(train_sft, config)


def train(method: Callable, config) -> None:
    """Train; leave with the status that a shell gives to SIGTERM if that came."""
    keep_compiled()
    try:
        with joined(config.distributed):
            method(config)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
