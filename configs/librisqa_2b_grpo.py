"""GRPO of Granite Speech 2B on LibriSQA Part I: the paper's Table 1, row "Granite Speech 2B + GRPO", and Table 3.

Expected, in percent [P]:
                            BLEU BERTScore   ROUGE-1   ROUGE-2   ROUGE-L    METEOR       AVG
    base                   27.74     91.17     56.66     40.25     51.26     53.01     53.35
    + SFT                  40.88     94.15     65.13     49.07     61.50     64.64     62.56
    + GRPO                 44.90     94.45     68.56     53.35     64.88     68.48     65.77

Data, from the downloads that docs/data.md lists:
    jgrpo data build librisqa/part1 --manual-dir downloads --out data

Commands, for the base, the training and the trained policy:
    jgrpo eval configs/librisqa_2b_grpo.py --policy models/granite-speech-3.3-2b
    jgrpo grpo configs/librisqa_2b_grpo.py
    jgrpo eval configs/librisqa_2b_grpo.py

The paper's searches (4.2), as options of the training command:
    --run-dir runs/librisqa_2b_grpo_beta0 --grpo.beta 0
    --run-dir runs/librisqa_2b_grpo_beta004 --grpo.beta 0.04
    --run-dir runs/librisqa_2b_grpo_g4 --grpo.num-samples 4 --prompts-per-step 12 --num-steps 7134
    --run-dir runs/librisqa_2b_grpo_g12 --grpo.num-samples 12 --prompts-per-step 4 --num-steps 21400
It found that beta 0 diverges, "especially on larger datasets", that a higher beta lowers the reward, and that G 8 with
beta 0.02 "yielded stable training", of beta 0 to 0.04 and G 4 to 12. It gives no scores for them.

Hardware:  the paper's was 4 H100, where GRPO of the 2B model took "up to 24h"; not yet measured here.
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
    return grpo_run("librisqa", "2b", name="librisqa_2b_grpo", paper="librisqa/2b/grpo")
