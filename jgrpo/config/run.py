# SPDX-License-Identifier: Apache-2.0
"""What a run is: frozen dataclasses, written down in configs/*.py, overridden on the command line, saved in the run.

A config file defines `get_config()`, which returns an `SFTConfig` or a `GRPOConfig`. Relative paths are taken from the
directory the command is started in.
"""

import dataclasses
import difflib
import importlib.util
import os
import re
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jgrpo.about import DATA
from jgrpo.config.checks import check_least, check_types
from jgrpo.config.options import (
    CheckpointOptions,
    DataOptions,
    DistributedOptions,
    EvalOptions,
    GRPOOptions,
    MetricOptions,
    ModelOptions,
    OptimiserOptions,
)
from model_port.config import LORA_TARGETS
from model_port.errors import UserError
from model_port.generate import check_sampling
from model_port.partition import MeshConfig, check_divides
from model_port.paths import as_path

# The least value of fields that are counts or sizes.
LEAST = {
    "num_steps": 1,
    "prompts_per_step": 1,
    "micro_batches": 1,
    "max_completion_tokens": 1,
    "seed": 0,
    "completions_every": 0,
    "max_skipped_updates": 0,
    "model.lora_rank": 1,
    "model.logprob_chunk": 1,
    "data.length_window": 1,
    "data.max_prompt_tokens": 1,
    "data.min_seconds": 0,
    "data.max_unreadable": 0,
    "eval.every": 0,
    "eval.batch_size": 1,
    "eval.beams": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "distributed.start_timeout": 1,
    "distributed.heartbeat_timeout": 10,
    "mesh.data": 1,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
}

LEAST_OF_GRPO = {
    "grpo.beta": 0,
    "grpo.epsilon_low": 0,
    "grpo.epsilon_high": 0,
    "grpo.num_iterations": 1,
    "grpo.num_minibatches": 1,
    "grpo.off_policy_shaping": 0,
    "grpo.overlong_buffer": 0,
    "grpo.overlong_penalty": 0,
    "grpo.dynamic_sampling": 0,
    "grpo.rollout_chunks": 1,
    "grpo.reward_workers": 0,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What supervised fine-tuning and GRPO have in common."""

    run_dir: str
    """Directory of everything the run writes, on a disk or gs://; started again with the same config, it resumes."""
    model: ModelOptions
    data: DataOptions
    num_steps: int
    """Updates of the optimiser (rollouts, for GRPO)."""
    prompts_per_step: int
    """Prompts in one update, over all devices."""
    micro_batches: int = 1
    """Pieces that an update's prompts are computed in, one after the other; the result does not depend on it."""
    max_completion_tokens: int = 200
    """Longest completion, end-of-sequence token included (paper 4.2); a longer reference is an error."""
    seed: int = 0
    """Of the data order and of all sampling."""
    optimiser: OptimiserOptions = field(default_factory=OptimiserOptions)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalOptions = field(default_factory=EvalOptions)
    metrics: MetricOptions = field(default_factory=MetricOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    distributed: DistributedOptions = field(default_factory=DistributedOptions)
    rollout_weights: Literal["auto", "gathered", "stationary"] = "auto"
    """What fsdp splits of the weights is gathered once per rollout, or stays where it is, and activations travel."""
    rollout_layers: Literal["auto", "scanned", "unrolled"] = "auto"
    """Decoding scans the layers, or has a copy of each one's weights: faster but on TPUs, and longer to compile."""
    rollout_cache: Literal["auto", "float32", "bfloat16"] = "auto"
    """Keys and values while decoding; auto: as model.dtype, so that what is sampled is what is trained."""
    completions_every: int = 10
    """Steps between files of sampled completions; 0 writes none."""
    max_skipped_updates: int = 10
    """Updates with a non-finite loss or gradient that are skipped and counted before the run stops."""
    paper: str | None = None
    """Row of the paper's tables that this run stands beside, such as librisqa/2b/grpo."""

    def validate(self) -> None:
        """Check everything that can be checked before the model is loaded.

        Raises:
            UserError: the first rule that does not hold.
        """
        check_types(self)
        check_least(self, LEAST)
        as_path(self.run_dir)
        if self.prompts_per_step % self.micro_batches:
            raise UserError(
                f"prompts_per_step {self.prompts_per_step} must be a multiple of micro_batches {self.micro_batches}"
            )
        check_divides("prompts per micro-batch", self.prompts_per_step // self.micro_batches, self.mesh)
        check_divides("eval.batch_size", self.eval.batch_size, self.mesh)
        check_sampling(
            num_samples=max(len(self.eval.seeds), 1),
            max_new_tokens=self.max_completion_tokens,
            temperature=self.eval.temperature,
            top_p=self.eval.top_p,
        )
        if not self.eval.seeds and not self.eval.greedy and not self.eval.beams:
            raise UserError(
                "eval.seeds is empty, eval.greedy is off and eval.beams is 0: nothing would be evaluated; set one"
            )
        if self.eval.beams == 1:
            raise UserError("eval.beams is 1, which is greedy decoding; use 2 or more, or 0 for no beam search")
        if self.eval.every and not self.data.validation:
            raise UserError(
                "eval.every is set but data.validation is not: name a validation manifest or set every to 0"
            )
        self._check_data()
        if not self.data.audio_buckets or list(self.data.audio_buckets) != sorted(set(self.data.audio_buckets)):
            raise UserError(f"data.audio_buckets must be rising seconds, got {self.data.audio_buckets}")
        unknown = sorted(set(self.model.lora_targets) - set(LORA_TARGETS))
        if unknown:
            raise UserError(f"model.lora_targets names {', '.join(unknown)}; allowed are {', '.join(LORA_TARGETS)}")

    def _check_data(self) -> None:
        data = self.data
        if bool(data.train) == bool(data.mixture):
            given = "both are set" if data.train else "neither is set"
            raise UserError(f"data.train names one data set, data.mixture several, and {given}; set one of them")
        if data.max_seconds is not None and data.max_seconds <= data.min_seconds:
            raise UserError(f"data.max_seconds {data.max_seconds} must be above data.min_seconds {data.min_seconds}")
        if data.max_reference_tokens is not None and data.max_reference_tokens < 1:
            raise UserError(f"data.max_reference_tokens must be at least 1, got {data.max_reference_tokens}")
        for k, source in enumerate(data.mixture):
            check_types(source, f"data.mixture.{k}.")
            if not 0 < source.weight < float("inf"):
                raise UserError(f"data.mixture.{k}.weight is {source.weight}; a positive number is needed")
            if source.reward_weights and len(source.reward_weights) != len(source.reward):
                raise UserError(
                    f"data.mixture.{k}.reward names {len(source.reward)} components and reward_weights gives "
                    f"{len(source.reward_weights)}"
                )


@dataclass(frozen=True, kw_only=True)
class SFTConfig(RunConfig):
    """Supervised fine-tuning on the references: the paper's baseline."""

    def validate(self) -> None:
        """See RunConfig.validate."""
        super().validate()
        for k, source in enumerate(self.data.mixture):
            if source.reward:
                raise UserError(f"data.mixture.{k}.reward is set and supervised training has no reward; leave it out")


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(RunConfig):
    """Group Relative Policy Optimization with a text metric as the reward."""

    grpo: GRPOOptions = field(default_factory=GRPOOptions)

    def validate(self) -> None:
        """See RunConfig.validate."""
        super().validate()
        check_least(self, LEAST_OF_GRPO)
        self._check_rollout()
        self._check_groups()
        self._check_loss()
        self._check_rows()

    def _check_rollout(self) -> None:
        grpo = self.grpo
        check_sampling(
            num_samples=grpo.num_samples,
            max_new_tokens=self.max_completion_tokens,
            temperature=grpo.temperature,
            top_p=grpo.top_p,
            top_k=grpo.top_k,
            min_p=grpo.min_p,
        )
        for name, greedy in (("temperature", 0), ("top_k", 1), ("min_p", 1)):
            if getattr(grpo, name) == greedy:
                raise UserError(
                    f"grpo.{name} is {greedy}: greedy samples of a prompt are all alike; use a positive temperature, "
                    "a top_k of 0 or more than 1, and a min_p below 1"
                )
        if grpo.overlong_buffer > self.max_completion_tokens:
            raise UserError(
                f"grpo.overlong_buffer is {grpo.overlong_buffer} tokens and max_completion_tokens is "
                f"{self.max_completion_tokens}; the buffer must fit into it"
            )

    def _check_groups(self) -> None:
        grpo = self.grpo
        for needs, holds in (
            (f"advantage_scale {grpo.advantage_scale}", grpo.advantage_scale != "none"),
            ("filter_zero_variance", grpo.filter_zero_variance),
            ("dynamic_sampling", grpo.dynamic_sampling > 0),
        ):
            if holds and grpo.num_samples < 2:
                raise UserError(
                    f"grpo.num_samples is {grpo.num_samples}: for {needs} a group needs at least 2 samples to compare"
                )
        if grpo.mixed_policy and grpo.num_samples < 2:
            raise UserError(
                f"grpo.num_samples is {grpo.num_samples}: with mixed_policy one of them is the reference, and at least "
                "one must be sampled; use 2 or more"
            )
        if grpo.off_policy_shaping and not grpo.mixed_policy:
            raise UserError(
                f"grpo.off_policy_shaping is {grpo.off_policy_shaping} and mixed_policy is off: there is nothing to "
                "shape; switch mixed_policy on or set it to 0"
            )
        if grpo.reward_weights and len(grpo.reward_weights) != len(grpo.reward):
            raise UserError(
                f"grpo.reward names {len(grpo.reward)} components and reward_weights gives {len(grpo.reward_weights)}"
            )

    def _check_loss(self) -> None:
        grpo = self.grpo
        if grpo.loss_type == "cispo" and grpo.epsilon_high <= 1:
            raise UserError(
                f"grpo.epsilon_high is {grpo.epsilon_high}: with cispo it is the bound on the ratio itself; "
                "use a number above 1, such as 5"
            )
        if grpo.loss_type == "cispo" and grpo.delta is not None:
            raise UserError(
                f"grpo.delta is {grpo.delta}: cispo bounds the ratio by epsilon_high alone; set delta to None"
            )
        if grpo.delta is not None and grpo.delta <= 1 + grpo.epsilon_high:
            raise UserError(
                f"grpo.delta is {grpo.delta}; it bounds the ratio beyond the clip and must be above "
                f"1 + epsilon_high = {1 + grpo.epsilon_high}"
            )

    def _check_rows(self) -> None:
        """Check that the prompts divide into minibatches, micro-batches and chunks, and each over the mesh."""
        grpo, prompts = self.grpo, self.prompts_per_step
        pieces = grpo.num_minibatches * self.micro_batches
        if prompts % pieces:
            raise UserError(
                f"prompts_per_step {prompts} must be a multiple of grpo.num_minibatches {grpo.num_minibatches} x "
                f"micro_batches {self.micro_batches} = {pieces}"
            )
        if prompts % grpo.rollout_chunks:
            raise UserError(f"prompts_per_step {prompts} must be a multiple of rollout_chunks {grpo.rollout_chunks}")
        check_divides("prompts per minibatch and micro-batch", prompts // pieces, self.mesh)
        check_divides("prompts per rollout chunk", prompts // grpo.rollout_chunks, self.mesh)

    def num_updates(self) -> int:
        """Return the optimiser's updates in the whole run."""
        return self.num_steps * self.grpo.num_iterations * self.grpo.num_minibatches

    def reward_spec(self) -> dict[str, float] | tuple[dict[str, float], ...]:
        """Return {component: weight}; of a mixture, one for each source."""
        own = _weights(self.grpo.reward, self.grpo.reward_weights)
        sources = self.data.mixture
        specs = tuple(_weights(one.reward, one.reward_weights) if one.reward else own for one in sources)
        return specs or own


def _weights(components: tuple[str, ...], weights: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(components, weights or (1.0,) * len(components), strict=True))


def load_config(path: str | Path) -> RunConfig:
    """Run a config file, one's own or one of the project's by name, and return what its `get_config()` gives.

    Raises:
        UserError: no such file, no `get_config`, an unknown field, or something else than a run config.
    """
    path = Path(path)
    if not path.is_file():
        if not (DATA / path).is_file():
            raise UserError(f"config file {path} does not exist; the project's own are in configs/")
        path = DATA / path
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None:
        raise UserError(f"config file {path} is not a Python file; it must define get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError("it does not define get_config(); see the project's own in configs/")
        config = module.get_config()
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise UserError(f"config file {where}: {_explain(error)}") from error
    if not isinstance(config, RunConfig):
        raise UserError(
            f"get_config() of {path} returned a {type(config).__name__}; return an SFTConfig or a GRPOConfig"
        )
    check_types(config)
    return config


def _explain(error: Exception) -> str:
    """Return what went wrong in a config file; of an unknown field, which ones there are."""
    if isinstance(error, UserError):
        return str(error)
    unknown = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    kind = globals().get(unknown[1]) if unknown else None
    if not dataclasses.is_dataclass(kind):
        return f"{type(error).__name__}: {error}"
    names = [field.name for field in dataclasses.fields(kind)]
    close = difflib.get_close_matches(unknown[2], names, n=1)
    guess = f"; did you mean {close[0]}?" if close else "."
    return f"{unknown[1]} has no field {unknown[2]}{guess} It has {', '.join(names)}"


def with_model(config: RunConfig, path: str | os.PathLike) -> RunConfig:
    """Return a config that evaluates the model directory as it is."""
    model = dataclasses.replace(config.model, path=str(path), lora="keep", trainable=("projector",))
    return dataclasses.replace(config, model=model)
