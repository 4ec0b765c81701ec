"""GRPO of Granite Speech 2B on LibriSQA Part I with reward ROUGE-2: the paper's Table 3, row "ROUGE-2".

Expected, in percent [P]: more of what is rewarded, less of the rest, of BLEU above all.
                            BLEU BERTScore   ROUGE-1   ROUGE-2   ROUGE-L    METEOR       AVG
    reward BLEU            44.90     94.45     68.56     53.35     64.88     68.48     65.77
    reward ROUGE-2         37.82     93.52     68.59     54.15     65.27     58.87     63.04

Data, from the downloads that docs/data.md lists:
    jgrpo data build librisqa/part1 --manual-dir downloads --out data

Commands, for the base, the training and the trained policy:
    jgrpo eval configs/librisqa_2b_grpo_rouge2.py --policy models/granite-speech-3.3-2b
    jgrpo grpo configs/librisqa_2b_grpo_rouge2.py
    jgrpo eval configs/librisqa_2b_grpo_rouge2.py

Hardware:  the paper's was 4 H100, where GRPO of the 2B model took "up to 24h"; not yet measured here.
Devices:   one by default. --mesh.fsdp 2 splits parameters and prompts over two; 6 prompts do not divide over 4
           devices, so take --mesh.fsdp 4 --prompts-per-step 8 --num-steps 10700 there (64 completions a step).
Length:    one epoch: 107,000 pairs less 20 % for validation [P] = 85,600; 85,600 / 6 prompts = 14,267 steps.
Metrics:   download roberta-large to models/, or leave BERTScore out: --eval.metrics bleu rouge1 rouge2 rougeL meteor
Choice:    as in every run, BLEU on the validation set chooses the policy that is tested; the paper does not say which
           metric did. --eval.metrics rouge2 ... puts another one first.
Values and their sources: jgrpo/paper/recipes.py.
"""

from jgrpo.config import GRPOConfig
from jgrpo.paper.recipes import grpo_run


def get_config() -> GRPOConfig:
    """Return the run."""
    return grpo_run(
        "librisqa", "2b", name="librisqa_2b_grpo_rouge2", paper="librisqa/2b/grpo-rouge2", reward=("rouge2",)
    )
