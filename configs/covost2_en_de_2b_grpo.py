"""GRPO of Granite Speech 2B on CoVoST2 English to German: the paper's Table 2, row "Granite Speech 2B + GRPO".

Expected, in percent [P]:
                            BLEU BERTScore   ROUGE-1   ROUGE-2   ROUGE-L    METEOR       AVG
    base                   29.06     86.04     57.25     35.19     54.09     55.03     52.78
    + SFT                  30.50     86.40     58.53     36.75     55.21     56.18     53.93
    + GRPO                 31.47     86.90     59.99     37.88     56.75     57.48     55.08

Data, from the downloads that docs/data.md lists:
    jgrpo data build covost2/en_de --manual-dir downloads --out data

Commands, for the base, the training and the trained policy:
    jgrpo eval configs/covost2_en_de_2b_grpo.py --policy models/granite-speech-3.3-2b
    jgrpo grpo configs/covost2_en_de_2b_grpo.py
    jgrpo eval configs/covost2_en_de_2b_grpo.py

The paper's searches (4.2), as options of the training command:
    --run-dir runs/covost2_en_de_2b_grpo_beta0 --grpo.beta 0
    --run-dir runs/covost2_en_de_2b_grpo_beta004 --grpo.beta 0.04
    --run-dir runs/covost2_en_de_2b_grpo_g4 --grpo.num-samples 4 --prompts-per-step 12 --num-steps 18334
    --run-dir runs/covost2_en_de_2b_grpo_g12 --grpo.num-samples 12 --prompts-per-step 4 --num-steps 55000
It found that beta 0 diverges, "especially on larger datasets", that a higher beta lowers the reward, and that G 8 with
beta 0.02 "yielded stable training", of beta 0 to 0.04 and G 4 to 12. It gives no scores for them.

Hardware:  the paper's was 4 H100, where GRPO of the 2B model took "up to 24h"; not yet measured here.
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
    return grpo_run("covost2_en_de", "2b", name="covost2_en_de_2b_grpo", paper="covost2/2b/grpo")
