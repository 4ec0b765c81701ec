# SPDX-License-Identifier: Apache-2.0
"""What a run is: its options, field by field, and what must hold in them. Config files import from here."""

from jgrpo.config.options import (
    CheckpointOptions,
    DataOptions,
    DistributedOptions,
    EvalOptions,
    GRPOOptions,
    MetricOptions,
    ModelOptions,
    OptimiserOptions,
    SourceOptions,
)
from jgrpo.config.run import GRPOConfig, RunConfig, SFTConfig, load_config, with_model

__all__ = [
    "CheckpointOptions",
    "DataOptions",
    "DistributedOptions",
    "EvalOptions",
    "GRPOConfig",
    "GRPOOptions",
    "MetricOptions",
    "ModelOptions",
    "OptimiserOptions",
    "RunConfig",
    "SFTConfig",
    "SourceOptions",
    "load_config",
    "with_model",
]
