"""Mixed-policy GRPO of Granite Speech 2B on LibriSQA Part I: the paper's Figure 1 (3.2, 5.3).

One of the 8 completions of a group is the reference, without clipping and with probability 1 under its own policy [P];
docs/sources.md says how what the paper leaves open is settled.

Expected: below GRPO: there is much to learn on this task, and the off-policy sample makes training less stable (5.3).
The paper gives bars and no numbers; `jgrpo eval` prints its row of plain GRPO to compare with, in percent [P]:
                            BLEU BERTScore   ROUGE-1   ROUGE-2   ROUGE-L    METEOR       AVG
    base                   27.74     91.17     56.66     40.25     51.26     53.01     53.35
    + GRPO                 44.90     94.45     68.56     53.35     64.88     68.48     65.77

Data, from the downloads that docs/data.md lists:
    jgrpo data build librisqa/part1 --manual-dir downloads --out data

Commands, for the base, the training and the trained policy:
    jgrpo eval configs/librisqa_2b_mp_grpo.py --policy models/granite-speech-3.3-2b
    jgrpo grpo configs/librisqa_2b_mp_grpo.py
    jgrpo eval configs/librisqa_2b_mp_grpo.py

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
    return grpo_run("librisqa", "2b", name="librisqa_2b_mp_grpo", paper="librisqa/2b/grpo", mixed_policy=True)
