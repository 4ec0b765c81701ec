# SPDX-License-Identifier: Apache-2.0
"""The paper's results, digit for digit, to stand beside ours: arXiv 2509.16990, Tables 1 to 3, in percent.

What does not fit together in them is listed in docs/sources.md.
"""

from model_port.errors import UserError

# The paper's columns, by the names of our metrics, in its order; its AVG is their plain mean.
COLUMNS = ("bleu", "bertscore", "rouge1", "rouge2", "rougeL", "meteor")

# "TASK/MODEL/TRAINING": the columns' values. "base" is the released model, "sota" the other work the paper compares
# with, of which it gives some columns only.
ROWS: dict[str, tuple[float | None, ...]] = {
    # Table 1: LibriSQA Part I, test.
    "librisqa/sota": (33.78, 93.07, 65.38, 50.19, 62.09, None),
    "librisqa/2b/base": (27.74, 91.17, 56.66, 40.25, 51.26, 53.01),
    "librisqa/2b/sft": (40.88, 94.15, 65.13, 49.07, 61.50, 64.64),
    "librisqa/2b/grpo": (44.90, 94.45, 68.56, 53.35, 64.88, 68.48),
    "librisqa/8b/base": (17.85, 90.25, 49.58, 34.31, 43.05, 53.19),
    "librisqa/8b/sft": (42.34, 94.49, 67.05, 51.54, 63.76, 65.99),
    "librisqa/8b/grpo": (46.40, 94.76, 69.57, 57.49, 66.16, 69.61),
    # Table 2: CoVoST2 English to German, test.
    "covost2/sota": (37.16, None, None, None, None, None),
    "covost2/2b/base": (29.06, 86.04, 57.25, 35.19, 54.09, 55.03),
    "covost2/2b/sft": (30.50, 86.40, 58.53, 36.75, 55.21, 56.18),
    "covost2/2b/grpo": (31.47, 86.90, 59.99, 37.88, 56.75, 57.48),
    "covost2/8b/base": (32.48, 87.26, 60.48, 38.78, 57.17, 58.24),
    "covost2/8b/sft": (31.62, 86.76, 59.66, 37.91, 56.35, 57.35),
    "covost2/8b/grpo": (35.08, 87.64, 62.90, 41.40, 59.64, 60.40),
    # Table 3: rewards, LibriSQA, 2B. Its row of BLEU is "librisqa/2b/grpo".
    "librisqa/2b/grpo-rouge1": (38.81, 93.54, 68.87, 53.45, 64.76, 60.65),
    "librisqa/2b/grpo-rouge2": (37.82, 93.52, 68.59, 54.15, 65.27, 58.87),
    "librisqa/2b/grpo-rougeL": (37.95, 93.56, 68.68, 53.84, 65.44, 59.27),
    "librisqa/2b/grpo-meteor": (37.69, 94.04, 66.99, 51.74, 62.63, 70.25),
}


def paper_row(key: str) -> dict[str, float]:
    """Return what the paper gives of a row, by metric.

    Raises:
        UserError: the paper has no such row.
    """
    if key not in ROWS:
        raise UserError(f"paper {key!r} names no row of the paper's tables; they are {', '.join(ROWS)}")
    return {name: value for name, value in zip(COLUMNS, ROWS[key], strict=True) if value is not None}


def base_row(key: str) -> str:
    """Return the key of the released model that a row's training starts from; its own if it starts from none.

    >>> base_row("librisqa/2b/grpo-meteor")
    'librisqa/2b/base'
    """
    base = "/".join([*key.split("/")[:2], "base"])
    return base if base in ROWS else key
