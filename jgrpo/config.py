"""What a run is: frozen dataclasses, written down in configs/*.py, overridden on the command line, saved in the run.

A config file defines `get_config()`, which returns an `SFTConfig` or a `GRPOConfig`. Relative paths are taken from the
directory the command is started in.
"""

import dataclasses
import difflib
import importlib.util
import json
import re
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jgrpo.checks import check_least, check_types
from jgrpo.core.advantages import SCALES
from jgrpo.core.kl import ESTIMATORS
from jgrpo.core.losses import IMPORTANCE, LOSS_TYPES
from model_port.config import LORA_TARGETS
from model_port.errors import UserError
from model_port.generate import check_sampling
from model_port.partition import MeshConfig, check_divides


@dataclass(frozen=True)
class ModelOptions:
    """The policy to start from, and what of it is trained."""

    path: str
    """A Hugging Face directory or an Orbax model directory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation and of the frozen parameters; trained parameters are kept in float32."""
    lora: Literal["keep", "merge", "none", "fresh"] = "keep"
    """The released adapter: keep it as part of the policy, merge it, drop it, or merge it and add a fresh one."""
    lora_rank: int = 64
    """Rank of a fresh adapter."""
    lora_alpha: float = 32.0
    """Alpha of a fresh adapter; its update is scaled by alpha / rank."""
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Linear layers of the decoder that get a fresh adapter."""
    trainable: tuple[str, ...] = ("projector", "lora")
    """Patterns of parameter names to train: projector, lora, decoder, encoder, a longer path, or all."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes, per layer: nothing, all but matrix products, or everything."""
    logprob_chunk: int = 4096
    """Completion tokens whose logits exist at one time."""


@dataclass(frozen=True)
class DataOptions:
    """Where prompts, audio and references come from, and the shapes they are padded to."""

    train: str
    """JSONL manifest: audio, prompt, reference and further columns; audio paths are relative to it."""
    validation: str | None = None
    """Manifest that the run is evaluated on while it trains."""
    test: tuple[str, ...] = ()
    """Manifests for `jgrpo eval`."""
    audio_buckets: tuple[float, ...] = (5.0, 10.0, 20.0, 35.0)
    """Seconds that clips are padded to: the smallest that holds a batch. A longer clip is an error."""
    max_prompt_tokens: int = 256
    """Text tokens of a prompt, audio not counted; a longer prompt is an error."""
    system: str | None = None
    """System message of all prompts; none by default, whatever the chat template would invent."""
    cache_features: bool = False
    """Keep the features of every clip in host memory after the first epoch."""
    cache_encoder: bool = False
    """Run the frozen encoder once over all clips when the run starts, and keep its output in host memory."""


@dataclass(frozen=True)
class OptimiserOptions:
    """AdamW with warm-up; the schedule runs over `num_steps` updates."""

    learning_rate: float = 5e-6
    """Peak learning rate."""
    warmup_fraction: float = 0.05
    """Share of the updates spent rising to the peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.999
    """AdamW's decay of the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norm scales and biases are left alone."""
    clip_norm: float | None = 1.0
    """Global norm that the gradient is clipped to."""


@dataclass(frozen=True)
class EvalOptions:
    """The paper's protocol (temperature 0.9, top-p 0.9, several seeds) and greedy decoding beside it."""

    every: int = 0
    """Evaluate on the validation set after every so many steps, and keep the best policy; 0 never does."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the sampled passes of a final evaluation."""
    validation_seeds: tuple[int, ...] = (0, 1)
    """Seeds of the sampled passes while training; without any, validation decodes greedily."""
    temperature: float = 0.9
    """Of the sampled passes."""
    top_p: float = 0.9
    """Of the sampled passes."""
    greedy: bool = True
    """Also decode greedily in a final evaluation."""
    batch_size: int = 16
    """Prompts decoded at a time."""
    lowercase: bool = False
    """Corpus BLEU without regard to case; the sacrebleu signature says so."""


@dataclass(frozen=True)
class CheckpointOptions:
    """What survives a kill."""

    every: int = 50
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints that stay on disk."""


@dataclass(frozen=True)
class GRPOOptions:
    """Group Relative Policy Optimization. Defaults are the paper's where it states one, else TRL's."""

    num_samples: int = 8
    """Completions per prompt, G (paper 4.2)."""
    temperature: float = 1.0
    """Of the rollout, and of the log-probs in the loss (paper 4.2)."""
    beta: float = 0.02
    """Weight of the KL to the frozen initial policy (paper 4.2); 0 skips the reference."""
    kl: Literal[tuple(ESTIMATORS)] = "k3"
    """Estimator of that KL."""
    epsilon_low: float = 0.2
    """The ratio is clipped below 1 - epsilon_low (TRL)."""
    epsilon_high: float = 0.2
    """The ratio is clipped above 1 + epsilon_high (TRL)."""
    loss_type: Literal[LOSS_TYPES] = "dapo"
    """How token losses are normalised (paper eq. 3: dapo)."""
    importance: Literal[IMPORTANCE] = "token"
    """Importance ratio per token, or per sequence (GSPO)."""
    advantage_scale: Literal[SCALES] = "group"
    """What rewards minus their group's mean are divided by (paper eq. 1: the group's deviation)."""
    num_iterations: int = 1
    """Updates per rollout, mu (TRL)."""
    reward: tuple[str, ...] = ("bleu",)
    """Reward components: bleu, chrf, exact, wer, or a function of yours as package.module:function."""
    reward_weights: tuple[float, ...] = ()
    """One weight per component; all 1 when left out."""


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
    "data.max_prompt_tokens": 1,
    "eval.every": 0,
    "eval.batch_size": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "mesh.data": 1,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What supervised fine-tuning and GRPO have in common."""

    run_dir: str
    """Directory of everything the run writes; started again with the same config, the run resumes there."""
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
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    completions_every: int = 10
    """Steps between files of sampled completions; 0 writes none."""
    max_skipped_updates: int = 10
    """Updates with a non-finite loss or gradient that are skipped and counted before the run stops."""

    def validate(self) -> None:
        """Check everything that can be checked before the model is loaded.

        Raises:
            UserError: the first rule that does not hold.
        """
        check_types(self)
        check_least(self, LEAST)
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
        if not self.eval.seeds and not self.eval.greedy:
            raise UserError("eval.seeds is empty and eval.greedy is off: nothing would be evaluated; set one of them")
        if self.eval.every and not self.data.validation:
            raise UserError(
                "eval.every is set but data.validation is not: name a validation manifest or set every to 0"
            )
        if not self.data.audio_buckets or list(self.data.audio_buckets) != sorted(set(self.data.audio_buckets)):
            raise UserError(f"data.audio_buckets must be rising seconds, got {self.data.audio_buckets}")
        unknown = sorted(set(self.model.lora_targets) - set(LORA_TARGETS))
        if unknown:
            raise UserError(f"model.lora_targets names {', '.join(unknown)}; allowed are {', '.join(LORA_TARGETS)}")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(RunConfig):
    """Supervised fine-tuning on the references: the paper's baseline."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(RunConfig):
    """Group Relative Policy Optimization with a text metric as the reward."""

    grpo: GRPOOptions = field(default_factory=GRPOOptions)

    def validate(self) -> None:
        """See RunConfig.validate."""
        super().validate()
        grpo = self.grpo
        check_least(self, {f"grpo.{name}": 0 for name in ("beta", "epsilon_low", "epsilon_high")})
        check_sampling(
            num_samples=grpo.num_samples,
            max_new_tokens=self.max_completion_tokens,
            temperature=grpo.temperature,
            top_p=1.0,
        )
        if grpo.num_samples < 2 and grpo.advantage_scale != "none":
            raise UserError(f"grpo.num_samples is {grpo.num_samples}: a group needs at least 2 samples to compare")
        if grpo.temperature == 0:
            raise UserError(
                "grpo.temperature is 0: greedy samples of a prompt are all alike; use a positive temperature"
            )
        if grpo.loss_type == "cispo" and grpo.epsilon_high <= 1:
            raise UserError(
                f"grpo.epsilon_high is {grpo.epsilon_high}: with cispo it is the bound on the ratio itself; "
                "use a number above 1, such as 5"
            )
        if grpo.num_iterations < 1:
            raise UserError(f"grpo.num_iterations must be at least 1, got {grpo.num_iterations}")
        if grpo.reward_weights and len(grpo.reward_weights) != len(grpo.reward):
            raise UserError(
                f"grpo.reward names {len(grpo.reward)} components and reward_weights gives {len(grpo.reward_weights)}"
            )

    def reward_spec(self) -> dict[str, float]:
        """Return {component: weight}."""
        weights = self.grpo.reward_weights or (1.0,) * len(self.grpo.reward)
        return dict(zip(self.grpo.reward, weights, strict=True))


def load_config(path: str | Path) -> RunConfig:
    """Run a config file and return what its `get_config()` gives.

    Raises:
        UserError: no such file, no `get_config`, an unknown field, or something else than a run config.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file {path} does not exist; the project's own are in configs/")
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


def with_model(config: RunConfig, path: str | Path) -> RunConfig:
    """Return a config that evaluates the model directory as it is."""
    model = dataclasses.replace(config.model, path=str(path), lora="keep", trainable=("projector",))
    return dataclasses.replace(config, model=model)


# What may differ when a run is resumed: none of it changes the numbers of a step.
FREE_TO_CHANGE = (
    "run_dir",
    "mesh",
    "eval",
    "checkpoint",
    "completions_every",
    "max_skipped_updates",
    "data.validation",
    "data.test",
    "data.cache_features",
)


def check_same_run(config: RunConfig, path: Path) -> None:
    """Raise a UserError if the file that `save_config` wrote describes another run; it names the fields that differ."""
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it, or use another --run-dir") from error
    old, new = _flatten(saved), _flatten(_resolved(config))
    changed = [
        name
        for name in {**old, **new}
        if old.get(name) != new.get(name) and not f"{name}.".startswith(tuple(f"{free}." for free in FREE_TO_CHANGE))
    ]
    if changed:
        lines = "\n".join(f"  {name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in changed)
        raise UserError(
            f"{path.parent} holds a run with another config:\n{lines}\nuse another --run-dir or the same config"
        )


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as JSON, with the kind of run."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_resolved(config), indent=2) + "\n")
    partial.replace(path)


def _resolved(config: RunConfig) -> dict[str, Any]:
    """Return the config as JSON gives it back."""
    return json.loads(json.dumps({"kind": type(config).__name__, **dataclasses.asdict(config)}))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
