# SPDX-License-Identifier: Apache-2.0
"""What the paper's runs have in common; configs/ holds one file per run, with the values that differ.

Where a value comes from stands beside it: [P] the paper, arXiv 2509.16990; [LEAF] the public PyTorch implementation
Grimoid/LEAF, where the paper is silent; [IBM] IBM's fine-tuning notebook for Granite Speech; [TRL] the default of
Hugging Face TRL; [ours] chosen here. docs/sources.md has the same for what these configs leave at its default.
"""

from dataclasses import dataclass
from typing import Any, Literal

from jgrpo.config import (
    CheckpointOptions,
    DataOptions,
    EvalOptions,
    GRPOConfig,
    GRPOOptions,
    MetricOptions,
    ModelOptions,
    OptimiserOptions,
    SFTConfig,
)
from jgrpo.paper.tables import COLUMNS

Size = Literal["2b", "8b"]


@dataclass(frozen=True)
class Corpus:
    """A data set of the paper.

    Attributes:
        data: what `jgrpo data build` calls it; it is read from data/ in the directory that a command is started in.
        examples: of the training set that the paper states; those that were built decide how long an epoch is.
        audio_buckets: seconds that clips are padded to [ours].
        bertscore_model: of bert-score for the language of the references. The paper names none; its values are of the
            size that these give.
    """

    data: str
    examples: int
    audio_buckets: tuple[float, ...]
    bertscore_model: str


CORPORA = {
    # 107K pairs, of which 20 % become the validation set [P]: 0.8 x 107,000. LibriSpeech utterances last up to 35 s.
    "librisqa": Corpus("librisqa/part1", 85_600, (16.0, 25.0, 36.0), "models/roberta-large"),
    # 220K [P]; the official set has 289,430. Common Voice clips are short.
    "covost2_en_de": Corpus("covost2/en_de", 220_000, (8.0, 12.0, 36.0), "models/bert-base-multilingual-cased"),
}

GRPO_PROMPTS = 6  # x G = 8: 48 completions a step [LEAF], the upper end of the paper's batch sizes 12 to 48 [P]
SFT_PROMPTS = 32  # [IBM], within the same range [P]

# [ours] A fifth of LibriSQA is held out [P], some 21,000 examples: ten looks at all of them would decode 208,000
# answers in a run that samples 685,000. The records stand in the order of the archive, speaker after speaker, so a
# small part would be a few voices: with 22 held-out utterances each, this one has some 90 of LibriSpeech's 921.
VALIDATION = "validation[:2000]"


def sft_run(task: str, size: Size, *, name: str, paper: str | None) -> SFTConfig:
    """Return supervised fine-tuning for one epoch [IBM; the paper searched 1 to 10]."""
    steps = -(-CORPORA[task].examples // SFT_PROMPTS)
    return SFTConfig(
        num_steps=steps,
        prompts_per_step=SFT_PROMPTS,
        micro_batches=4,  # [ours] for memory; the result does not depend on it
        optimiser=OptimiserOptions(
            learning_rate=3e-5,  # [IBM], within 1e-6 to 5e-5 [P]
            warmup_fraction=0.1,  # [ours] within 0 to 0.15 [P]; IBM's 0.2 is beyond
        ),
        **_common(task, size, name=name, paper=paper, steps=steps),
    )


def grpo_run(task: str, size: Size, *, name: str, paper: str | None, **grpo: Any) -> GRPOConfig:
    """Return GRPO for one epoch [ours; the paper searched "similar ranges" to 1 to 10].

    Args:
        grpo: fields of GRPOOptions in which the run differs from the paper's main one.
    """
    steps = -(-CORPORA[task].examples // GRPO_PROMPTS)
    options = {
        "num_samples": 8,  # [P] "yielded stable training", of 4 to 12
        "beta": 0.02,  # [P] likewise, of 0 to 0.04
        "temperature": 1.0,  # [P]
        "top_p": 1.0,  # [TRL]; LEAF rolls out with 0.9
        "epsilon_low": 0.2,  # symmetric [P], value [TRL]
        "epsilon_high": 0.2,
        "num_iterations": 1,  # [TRL]
        "reward": ("bleu",),  # [P]
    }
    return GRPOConfig(
        num_steps=steps,
        prompts_per_step=GRPO_PROMPTS,
        optimiser=OptimiserOptions(
            learning_rate=5e-6,  # [LEAF], within 1e-6 to 5e-5 [P]
            warmup_fraction=0.05,  # [ours] within 0 to 0.15 [P]
        ),
        grpo=GRPOOptions(**{**options, **grpo}),
        **_common(task, size, name=name, paper=paper, steps=steps),
    )


def _common(task: str, size: Size, *, name: str, paper: str | None, steps: int) -> dict[str, Any]:
    """Return the fields that all runs share."""
    data = f"data/{CORPORA[task].data}"
    return {
        "run_dir": f"runs/{name}",
        "paper": paper,
        "model": ModelOptions(
            path=f"models/granite-speech-3.3-{size}",  # the released model [P]; its revision is not stated
            dtype="bfloat16",  # [IBM, LEAF]
            lora="keep",  # the released adapter is part of the model that the paper starts from
            trainable=("projector", "lora"),  # [IBM]; the paper does not say
            remat="full",  # [ours] for memory
        ),
        "data": DataOptions(
            train=f"{data}:train",
            validation=f"{data}:{VALIDATION}",
            test=(f"{data}:test",),
            audio_buckets=CORPORA[task].audio_buckets,
            max_prompt_tokens=256,  # [P]; that audio does not count is [ours]
            unfit="drop",  # [ours] of hundreds of thousands some are too long; the run says how many, and which
        ),
        "max_completion_tokens": 200,  # [P]
        "eval": EvalOptions(
            every=steps // 10,  # [ours]; the best of these policies is tested, as in [P]
            temperature=0.9,  # [P]
            top_p=0.9,  # [P]
            seeds=(0, 1, 2, 3, 4),  # [ours]; LEAF has five passes, too, and the paper does not say
            validation_seeds=(0,),  # [ours]
            batch_size=48,  # [ours]
            metrics=COLUMNS,  # [P]; BLEU chooses the best policy
        ),
        "metrics": MetricOptions(
            # Also for German: the paper's ROUGE is presumably that of rouge-score, which cuts words at umlauts.
            rouge_tokenizer="ascii",
            # METEOR has no synonyms unless metrics.meteor_wordnet is given; its label says so.
            bertscore_model=CORPORA[task].bertscore_model,
        ),
        "checkpoint": CheckpointOptions(every=200),
    }
