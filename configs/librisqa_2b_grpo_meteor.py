"""GRPO of Granite Speech 2B on LibriSQA Part I with reward METEOR: the paper's Table 3, row "METEOR".

Expected, in percent [P]: more of what is rewarded, less of the rest, of BLEU above all.
                            BLEU BERTScore   ROUGE-1   ROUGE-2   ROUGE-L    METEOR       AVG
    reward BLEU            44.90     94.45     68.56     53.35     64.88     68.48     65.77
    reward METEOR          37.69     94.04     66.99     51.74     62.63     70.25     63.89

METEOR is computed without synonyms unless --metrics.meteor-wordnet names WordNet's directory; which one the paper
used is not stated.

Data, from the downloads that docs/data.md lists:
    jgrpo data build librisqa/part1 --manual-dir downloads --out data

Commands, for the base, the training and the trained policy:
    jgrpo eval configs/librisqa_2b_grpo_meteor.py --policy models/granite-speech-3.3-2b
    jgrpo grpo configs/librisqa_2b_grpo_meteor.py
    jgrpo eval configs/librisqa_2b_grpo_meteor.py

Hardware:  the paper's was 4 H100, where GRPO of the 2B model took "up to 24h"; not yet measured here.
Devices:   one by default. --mesh.fsdp 2 splits parameters and prompts over two; 6 prompts do not divide over 4
           devices, so take --mesh.fsdp 4 --prompts-per-step 8 --num-steps 10700 there (64 completions a step).
Length:    one epoch: 107,000 pairs less 20 % for validation [P] = 85,600; 85,600 / 6 prompts = 14,267 steps.
Metrics:   download roberta-large to models/, or leave BERTScore out: --eval.metrics bleu rouge1 rouge2 rougeL meteor
Choice:    as in every run, BLEU on the validation set chooses the policy that is tested; the paper does not say which
           metric did. --eval.metrics meteor ... puts another one first.
Values and their sources: jgrpo/paper/recipes.py.
"""

from jgrpo.config import GRPOConfig
from jgrpo.paper.recipes import grpo_run


def get_config() -> GRPOConfig:
    """Return the run."""
    return grpo_run(
        "librisqa", "2b", name="librisqa_2b_grpo_meteor", paper="librisqa/2b/grpo-meteor", reward=("meteor",)
    )
