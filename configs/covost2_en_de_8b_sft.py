"""SFT of Granite Speech 8B on CoVoST2 English to German: the paper's Table 2, row "Granite Speech 8B + SFT".

Expected, in percent [P]:
                            BLEU BERTScore   ROUGE-1   ROUGE-2   ROUGE-L    METEOR       AVG
    base                   32.48     87.26     60.48     38.78     57.17     58.24     55.74
    + SFT                  31.62     86.76     59.66     37.91     56.35     57.35     54.94

In the paper, SFT makes the 8B model worse on this task.

Data, from the downloads that docs/data.md lists:
    jgrpo data build covost2/en_de --manual-dir downloads --out data

Commands, for the base, the training and the trained policy:
    jgrpo eval configs/covost2_en_de_8b_sft.py --policy models/granite-speech-3.3-8b
    jgrpo sft configs/covost2_en_de_8b_sft.py
    jgrpo eval configs/covost2_en_de_8b_sft.py

Hardware:  the paper's was 4 H100, and SFT cost "far lower" than GRPO; hours not stated, and not yet measured here.
Devices:   one by default; --mesh.fsdp 2, 4 or 8 splits parameters and prompts.
Length:    one epoch: 220,000 examples [P]; 220,000 / 32 prompts = 6,875 steps.
Metrics:   download bert-base-multilingual-cased to models/, or leave BERTScore out:
           --eval.metrics bleu rouge1 rouge2 rougeL meteor
Values and their sources: jgrpo/paper/recipes.py.
"""

from jgrpo.config import SFTConfig
from jgrpo.paper.recipes import sft_run


def get_config() -> SFTConfig:
    """Return the run."""
    return sft_run("covost2_en_de", "8b", name="covost2_en_de_8b_sft", paper="covost2/8b/sft")
