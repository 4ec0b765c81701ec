"""GRPO of Granite Speech 2B on LibriSQA Part I with reward ROUGE-1: the paper's Table 3, row "ROUGE-1".

Expected, in percent [P]: more of what is rewarded, less of the rest, of BLEU above all.
                            BLEU BERTScore   ROUGE-1   ROUGE-2   ROUGE-L    METEOR       AVG
    reward BLEU            44.90     94.45     68.56     53.35     64.88     68.48     65.77
    reward ROUGE-1         38.81     93.54     68.87     53.45     64.76     60.65     63.35

Data, from the downloads that docs/data.md lists:
    jgrpo data build librisqa/part1 --manual-dir downloads --out data

Commands, for the base, the training and the trained policy:
    jgrpo eval configs/librisqa_2b_grpo_rouge1.py --policy models/granite-speech-3.3-2b
    jgrpo grpo configs/librisqa_2b_grpo_rouge1.py
    jgrpo eval configs/librisqa_2b_grpo_rouge1.py

Hardware:  the paper's was 4 H100, where GRPO of the 2B model took "up to 24h"; not yet measured here.
Devices:   one by default. --mesh.fsdp 2 splits parameters and prompts over two; 6 prompts do not divide over 4
           devices, so take --mesh.fsdp 4 --prompts-per-step 8 --num-steps 10700 there (64 completions a step).
Length:    one epoch: 107,000 pairs less 20 % for validation [P] = 85,600; 85,600 / 6 prompts = 14,267 steps.
Metrics:   download roberta-large to models/, or leave BERTScore out: --eval.metrics bleu rouge1 rouge2 rougeL meteor
Choice:    as in every run, BLEU on the validation set chooses the policy that is tested; the paper does not say which
           metric did. --eval.metrics rouge1 ... puts another one first.
Values and their sources: jgrpo/paper/recipes.py.
"""

from jgrpo.config import GRPOConfig
from jgrpo.paper.recipes import grpo_run


def get_config() -> GRPOConfig:
    """Return the run."""
    return grpo_run(
        "librisqa", "2b", name="librisqa_2b_grpo_rouge1", paper="librisqa/2b/grpo-rouge1", reward=("rouge1",)
    )
