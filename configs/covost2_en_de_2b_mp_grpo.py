"""Mixed-policy GRPO of Granite Speech 2B on CoVoST2 English to German: the paper's Figure 1 (3.2, 5.3).

One of the 8 completions of a group is the reference, without clipping and with probability 1 under its own policy [P];
docs/sources.md says how what the paper leaves open is settled.

Expected: above GRPO: the base can translate, and the references act as anchors (5.3).
The paper gives bars and no numbers; `jgrpo eval` prints its row of plain GRPO to compare with, in percent [P]:
                            BLEU BERTScore   ROUGE-1   ROUGE-2   ROUGE-L    METEOR       AVG
    base                   29.06     86.04     57.25     35.19     54.09     55.03     52.78
    + GRPO                 31.47     86.90     59.99     37.88     56.75     57.48     55.08

Data, from the downloads that docs/data.md lists:
    jgrpo data build covost2/en_de --manual-dir downloads --out data

Commands, for the base, the training and the trained policy:
    jgrpo eval configs/covost2_en_de_2b_mp_grpo.py --policy models/granite-speech-3.3-2b
    jgrpo grpo configs/covost2_en_de_2b_mp_grpo.py
    jgrpo eval configs/covost2_en_de_2b_mp_grpo.py

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
    return grpo_run("covost2_en_de", "2b", name="covost2_en_de_2b_mp_grpo", paper="covost2/2b/grpo", mixed_policy=True)
