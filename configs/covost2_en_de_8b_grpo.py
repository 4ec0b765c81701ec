"""GRPO of Granite Speech 8B on CoVoST2 English to German: the paper's Table 2, row "Granite Speech 8B + GRPO".

Expected, in percent [P]:
                            BLEU BERTScore   ROUGE-1   ROUGE-2   ROUGE-L    METEOR       AVG
    base                   32.48     87.26     60.48     38.78     57.17     58.24     55.74
    + SFT                  31.62     86.76     59.66     37.91     56.35     57.35     54.94
    + GRPO                 35.08     87.64     62.90     41.40     59.64     60.40     57.84

Data, from the downloads that docs/data.md lists:
    jgrpo data build covost2/en_de --manual-dir downloads --out data

Commands, for the base, the training and the trained policy:
    jgrpo eval configs/covost2_en_de_8b_grpo.py --policy models/granite-speech-3.3-8b
    jgrpo grpo configs/covost2_en_de_8b_grpo.py
    jgrpo eval configs/covost2_en_de_8b_grpo.py

The paper's searches (4.2), as options of the training command:
    --run-dir runs/covost2_en_de_8b_grpo_beta0 --grpo.beta 0
    --run-dir runs/covost2_en_de_8b_grpo_beta004 --grpo.beta 0.04
    --run-dir runs/covost2_en_de_8b_grpo_g4 --grpo.num-samples 4 --prompts-per-step 12 --num-steps 18334
    --run-dir runs/covost2_en_de_8b_grpo_g12 --grpo.num-samples 12 --prompts-per-step 4 --num-steps 55000
It found that beta 0 diverges, "especially on larger datasets", that a higher beta lowers the reward, and that G 8 with
beta 0.02 "yielded stable training", of beta 0 to 0.04 and G 4 to 12. It gives no scores for them.

Hardware:  the paper's was 4 H100; hours not stated for the 8B model, and not yet measured here.
Devices:   one by default. --mesh.fsdp 2 splits parameters and prompts over two; 6 prompts do not divide over 4
           devices, so take --mesh.fsdp 4 --prompts-per-step 8 --num-steps 27500 there (64 completions a step).
Length:    one epoch: 220,000 examples [P]; 220,000 / 6 prompts = 36,667 steps.
Metrics:   download bert-base-multilingual-cased to models/, or leave BERTScore out:
           --eval.metrics bleu rouge1 rouge2 rougeL meteor
Values and their sources: jgrpo/paper/recipes.py.
"""

from jgrpo.config import GRPOConfig
from jgrpo.paper.recipes import grpo_run


def get_config() -> GRPOConfig:
    """Return the run."""
    return grpo_run("covost2_en_de", "8b", name="covost2_en_de_8b_grpo", paper="covost2/8b/grpo")
