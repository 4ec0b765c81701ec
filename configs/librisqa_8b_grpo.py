"""GRPO of Granite Speech 8B on LibriSQA Part I: the paper's Table 1, row "Granite Speech 8B + GRPO".

Expected, in percent [P]:
                            BLEU BERTScore   ROUGE-1   ROUGE-2   ROUGE-L    METEOR       AVG
    base                   17.85     90.25     49.58     34.31     43.05     53.19     48.04
    + SFT                  42.34     94.49     67.05     51.54     63.76     65.99     64.20
    + GRPO                 46.40     94.76     69.57     57.49     66.16     69.61     67.33

ROUGE-2 of the last row stands out against ROUGE-1 and ROUGE-L, and may be a misprint (docs/sources.md).

Data, from the downloads that docs/data.md lists:
    jgrpo data build librisqa/part1 --manual-dir downloads --out data

Commands, for the base, the training and the trained policy:
    jgrpo eval configs/librisqa_8b_grpo.py --policy models/granite-speech-3.3-8b
    jgrpo grpo configs/librisqa_8b_grpo.py
    jgrpo eval configs/librisqa_8b_grpo.py

The paper's searches (4.2), as options of the training command:
    --run-dir runs/librisqa_8b_grpo_beta0 --grpo.beta 0
    --run-dir runs/librisqa_8b_grpo_beta004 --grpo.beta 0.04
    --run-dir runs/librisqa_8b_grpo_g4 --grpo.num-samples 4 --prompts-per-step 12 --num-steps 7134
    --run-dir runs/librisqa_8b_grpo_g12 --grpo.num-samples 12 --prompts-per-step 4 --num-steps 21400
It found that beta 0 diverges, "especially on larger datasets", that a higher beta lowers the reward, and that G 8 with
beta 0.02 "yielded stable training", of beta 0 to 0.04 and G 4 to 12. It gives no scores for them.

Hardware:  the paper's was 4 H100; hours not stated for the 8B model, and not yet measured here.
Devices:   one by default. --mesh.fsdp 2 splits parameters and prompts over two; 6 prompts do not divide over 4
           devices, so take --mesh.fsdp 4 --prompts-per-step 8 --num-steps 10700 there (64 completions a step).
Length:    one epoch: 107,000 pairs less 20 % for validation [P] = 85,600; 85,600 / 6 prompts = 14,267 steps.
Metrics:   download roberta-large to models/, or leave BERTScore out: --eval.metrics bleu rouge1 rouge2 rougeL meteor
Values and their sources: jgrpo/paper/recipes.py.
"""

from jgrpo.config import GRPOConfig
from jgrpo.paper.recipes import grpo_run


def get_config() -> GRPOConfig:
    """Return the run."""
    return grpo_run("librisqa", "8b", name="librisqa_8b_grpo", paper="librisqa/8b/grpo")
