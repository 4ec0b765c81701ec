"""SFT of Granite Speech 8B on LibriSQA Part I: the paper's Table 1, row "Granite Speech 8B + SFT".

Expected, in percent [P]:
                            BLEU BERTScore   ROUGE-1   ROUGE-2   ROUGE-L    METEOR       AVG
    base                   17.85     90.25     49.58     34.31     43.05     53.19     48.04
    + SFT                  42.34     94.49     67.05     51.54     63.76     65.99     64.20

Data, from the downloads that docs/data.md lists:
    jgrpo data build librisqa/part1 --manual-dir downloads --out data

Commands, for the base, the training and the trained policy:
    jgrpo eval configs/librisqa_8b_sft.py --policy models/granite-speech-3.3-8b
    jgrpo sft configs/librisqa_8b_sft.py
    jgrpo eval configs/librisqa_8b_sft.py

Hardware:  the paper's was 4 H100, and SFT cost "far lower" than GRPO; hours not stated, and not yet measured here.
Devices:   one by default; --mesh.fsdp 2, 4 or 8 splits parameters and prompts.
Length:    one epoch: 107,000 pairs less 20 % for validation [P] = 85,600; 85,600 / 32 prompts = 2,675 steps.
Metrics:   download roberta-large to models/, or leave BERTScore out: --eval.metrics bleu rouge1 rouge2 rougeL meteor
Values and their sources: jgrpo/paper/recipes.py.
"""

from jgrpo.config import SFTConfig
from jgrpo.paper.recipes import sft_run


def get_config() -> SFTConfig:
    """Return the run."""
    return sft_run("librisqa", "8b", name="librisqa_8b_sft", paper="librisqa/8b/sft")
