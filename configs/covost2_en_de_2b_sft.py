"""SFT of Granite Speech 2B on CoVoST2 English to German: the paper's Table 2, row "Granite Speech 2B + SFT".

Expected, in percent [P]:
                            BLEU BERTScore   ROUGE-1   ROUGE-2   ROUGE-L    METEOR       AVG
    base                   29.06     86.04     57.25     35.19     54.09     55.03     52.78
    + SFT                  30.50     86.40     58.53     36.75     55.21     56.18     53.93

Data, from the downloads that docs/data.md lists:
    jgrpo data build covost2/en_de --manual-dir downloads --out data

Commands, for the base, the training and the trained policy:
    jgrpo eval configs/covost2_en_de_2b_sft.py --policy models/granite-speech-3.3-2b
    jgrpo sft configs/covost2_en_de_2b_sft.py
    jgrpo eval configs/covost2_en_de_2b_sft.py

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
    return sft_run("covost2_en_de", "2b", name="covost2_en_de_2b_sft", paper="covost2/2b/sft")
