# SPDX-License-Identifier: Apache-2.0
"""The parts of a run's config: what is trained, on what, how, and how it is scored.

Frozen dataclasses with defaults; jgrpo.config puts them together and checks what must hold between them. The line under
a field is its help on the command line.
"""

from dataclasses import dataclass
from typing import Literal

from jgrpo.core.advantages import SCALES
from jgrpo.core.kl import ESTIMATORS
from jgrpo.core.losses import IMPORTANCE, LOSSES


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
    """What of a layer the backward pass recomputes: norms, gates, attention; all but matrix products; everything."""
    logprob_chunk: int = 4096
    """Completion tokens of a device's prompts whose logits exist at one time."""


@dataclass(frozen=True)
class SourceOptions:
    """One data set of a mixture."""

    path: str
    """JSONL manifest, or PATH:SPLIT of a built data set."""
    weight: float = 1.0
    """Share of the examples, as a weight among the mixture's sources."""
    name: str = ""
    """In metrics; if empty, the manifest's name or the directory before the split."""
    prompts: tuple[str, ...] = ()
    """Templates; without any, the prompts of the manifest or the task of the built data set."""
    reference: str = ""
    """Column of the references; if empty, likewise."""
    reward: tuple[str, ...] = ()
    """Components of the reward of these examples, for GRPO; without any, those of the run."""
    reward_weights: tuple[float, ...] = ()
    """One weight per component; all 1 when left out."""


@dataclass(frozen=True)
class DataOptions:
    """Where prompts, audio and references come from, and the shapes they are padded to."""

    train: str | None = None
    """JSONL manifest, or PATH:SPLIT of a built data set, such as data/librisqa/part1:train or ...:train[:1000]."""
    mixture: tuple[SourceOptions, ...] = ()
    """Several data sets to train on, in the place of train."""
    validation: str | None = None
    """What the run is evaluated on while it trains, as for train."""
    test: tuple[str, ...] = ()
    """What `jgrpo eval` is about, as for train."""
    prompts: tuple[str, ...] = ()
    """Templates with <|audio|> and {column}, for train, validation and test; none: the data's own prompts or task."""
    reference: str = ""
    """Column of the references, likewise; if empty, that of the data's task, or the key reference of a manifest."""
    audio_buckets: tuple[float, ...] = (5.0, 10.0, 20.0, 35.0)
    """Seconds that clips are padded to: the smallest that holds a batch. A longer clip does not fit."""
    length_window: int = 8
    """Training batches over which clips of like length are put together, so that one does not pad all; 1 for none."""
    max_prompt_tokens: int = 256
    """Text tokens of a prompt, audio not counted; a longer prompt does not fit."""
    unfit: Literal["refuse", "drop"] = "refuse"
    """Whether training examples that do not fit are an error or are dropped; in evaluation they are an error."""
    min_seconds: float = 0.0
    """Training examples with a shorter clip are dropped."""
    max_seconds: float | None = None
    """Training examples with a longer clip are dropped."""
    max_reference_tokens: int | None = None
    """Training examples with a longer reference, end token included, are dropped."""
    max_unreadable: int = 10
    """Training examples that a process may find unreadable and replace by others before the run stops."""
    system: str | None = None
    """System message of all prompts; by default the chat template's own, if it has one, and "" leaves it out."""
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
class MetricOptions:
    """The variants of the text metrics that change their value, as rewards and in evaluation alike."""

    bleu_tokenize: Literal[
        "13a", "intl", "char", "zh", "none", "ja-mecab", "ko-mecab", "flores101", "flores200", "spBLEU-1K"
    ] = "13a"
    """sacrebleu's tokenizer; those from ja-mecab on need packages of their own, the last three a download, too."""
    bleu_smooth: Literal["exp", "floor", "add-k", "none"] = "exp"
    """sacrebleu's smoothing; without it a sentence that lacks one n-gram order scores 0."""
    bleu_lowercase: bool = False
    """BLEU without regard to case."""
    rouge_tokenizer: Literal["ascii", "unicode"] = "ascii"
    """ascii is rouge-score's own, as the paper's numbers presumably are: it cuts words at umlauts; unicode does not."""
    rouge_stemmer: bool = False
    """Porter stemming of English words before ROUGE."""
    meteor_wordnet: str | None = None
    """Directory of WordNet's database files, for METEOR's synonyms; without it METEOR has none."""
    bertscore_model: str | None = None
    """Directory of a BERT or RoBERTa model for BERTScore."""
    bertscore_layer: int | None = None
    """Layer whose output BERTScore compares; by default bert-score's choice for the model."""


@dataclass(frozen=True)
class EvalOptions:
    """The paper's protocol (temperature 0.9, top-p 0.9, several seeds); greedy and beam search beside it."""

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
    beams: int = 0
    """Also decode by beam search of this width in a final evaluation; 0 does not."""
    batch_size: int = 16
    """Prompts decoded at a time."""
    metrics: tuple[str, ...] = ("bleu",)
    """Scores of a pass, of the names in jgrpo.rewards; the first one chooses the best policy."""


@dataclass(frozen=True)
class CheckpointOptions:
    """What survives a kill."""

    every: int = 50
    """Steps between checkpoints, which is what a kill loses at most; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints that stay on disk."""


@dataclass(frozen=True)
class DistributedOptions:
    """Which processes make up the run; on a TPU slice its environment says it, and nothing is given here."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    """Of the run; each is started with the same command and a process id of its own."""
    process_id: int | None = None
    """Of this process, from 0."""
    start_timeout: int = 300
    """Seconds to wait for the others before giving up with a message."""
    heartbeat_timeout: int = 60
    """Seconds without a sign of life after which a process counts as lost, and all others end with a message."""


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
    loss_type: Literal[tuple(LOSSES)] = "dapo"
    """How token losses are normalised (paper eq. 3: dapo)."""
    importance: Literal[tuple(IMPORTANCE)] = "token"
    """Importance ratio per token, or per sequence (GSPO)."""
    advantage_scale: Literal[SCALES] = "group"
    """What rewards minus their group's mean are divided by (paper eq. 1: the group's deviation)."""
    num_iterations: int = 1
    """Passes over a rollout, mu (TRL)."""
    num_minibatches: int = 1
    """Updates in a pass, each on its share of the prompts."""
    delta: float | None = None
    """Two-sided clip: bound on the ratio where the advantage is negative, above 1 + epsilon_high (TRL); or None."""
    top_p: float = 1.0
    """Nucleus of the rollout; below 1 all log-probs are those of the truncated distribution."""
    top_k: int = 0
    """Most likely tokens that the rollout samples from; 0 for all."""
    min_p: float = 0.0
    """Least probability, as a share of the most likely token's, that the rollout samples; 0 for none."""
    mixed_policy: bool = False
    """The reference answer is the last member of each group, beside num_samples - 1 sampled ones (paper 3.2)."""
    off_policy_shaping: float = 0.0
    """LUFFY's gamma: the reference's ratio x counts as x / (x + gamma), usually 0.1; 0 leaves it as it is (paper)."""
    mask_truncated: bool = False
    """Completions cut at the limit are left out of the loss; their rewards still count in their group's mean."""
    overlong_buffer: int = 0
    """Tokens before the limit over which a penalty grows from 0 to overlong_penalty (DAPO); 0 for none."""
    overlong_penalty: float = 1.0
    """Taken off the reward of a completion at the limit."""
    filter_zero_variance: bool = False
    """Leave groups whose rewards are all equal out of the loss and of what it is divided by."""
    dynamic_sampling: int = 0
    """Most further rollouts of a step, on other prompts, to replace groups whose rewards are all equal (DAPO)."""
    rollout_chunks: int = 1
    """Pieces of a rollout; the rewards of one are computed while the device samples the next."""
    reward: tuple[str, ...] = ("bleu",)
    """Reward components, of the names in jgrpo.rewards, or functions of yours as package.module:function."""
    reward_weights: tuple[float, ...] = ()
    """One weight per component; all 1 when left out."""
    reward_scale: Literal["none", "group"] = "none"
    """Whether each component is first brought to mean 0 and deviation 1 within its group."""
    reward_workers: int = 0
    """Processes that compute rewards; 0 computes them in the training process."""
