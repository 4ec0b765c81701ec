# SPDX-License-Identifier: Apache-2.0
"""What a person looks at after a run: tables, curves, completions."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jgrpo.paper.tables import COLUMNS, paper_row
from model_port.paths import as_path

SMOOTHING = 15  # steps in the running mean of the reward curve
TITLES = {"base": "base", "sft": "+ SFT", "grpo": "+ GRPO"}
METRIC_TITLES = {
    "bleu": "BLEU",
    "bertscore": "BERTScore",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "meteor": "METEOR",
    "chrf": "chrF",
    "wer": "WER",
    "cer": "CER",
}


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (as_path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def step_seconds(rows: list[dict[str, Any]]) -> np.ndarray:
    """Return the seconds of every step without compilation: the first step counts as the median one."""
    seconds = np.array([row["seconds"] for row in rows])
    seconds[0] = np.median(seconds)
    return seconds


def evaluation_table(name: str, result: Mapping[str, Any], *, paper: str | None = None) -> str:
    """Return what was found on one manifest: a row for each way to decode, the paper's row beneath, and the labels.

    Args:
        result: of results.json.
        paper: key of the paper's row; None for none.
    """
    metrics = dict(result["metrics"])
    titles = [METRIC_TITLES.get(metric, metric) for metric in metrics]
    if result["average"] is not None:
        metrics["average"] = result["average"]
        titles.append("AVG")
    lines = [["", *titles]]
    for way, title in (("sampled", "sampled"), ("greedy", "greedy"), ("beam", f"beam {result['beams']}")):
        if next(iter(metrics.values()))[way] is not None:
            lines.append([title, *(_cell(scores[way]) for scores in metrics.values())])
    if paper is not None:
        theirs = paper_row(paper)
        if set(COLUMNS) <= theirs.keys():
            theirs["average"] = float(np.mean(list(theirs.values())))
        lines.append([f"paper, {paper}", *(_cell(theirs.get(metric)) for metric in metrics)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in lines]
    labels = [f"{metric}: {scores['label']}" for metric, scores in result["metrics"].items()]
    seeds = f", {len(result['seeds'])} seeds" if result["seeds"] else ""
    return "\n".join([f"{name}: {result['examples']} examples{seeds}", *table, "", *labels]) + "\n"


def results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table: corpus BLEU sampled (mean ± deviation over seeds) and greedy, known and new voices."""
    first = next(iter(results.values()))
    signature = first["metrics"]["bleu"]["label"].removeprefix("BLEU ")
    lines = [
        f"Corpus BLEU, {first['examples']} held-out sentences each ({signature})",
        "",
        "| | sampled | greedy | new voices, sampled | new voices, greedy | training |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        known, new = result["metrics"]["bleu"], result["held_out_voices"]["metrics"]["bleu"]
        cells = [
            TITLES.get(name, name),
            _spread(known["sampled"]),
            f"{known['greedy']:.1f}",
            _spread(new["sampled"]),
            f"{new['greedy']:.1f}",
            f"{result['seconds']:.0f} s" if result["seconds"] else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def completions_text(predictions: Mapping[str, Path], *, count: int) -> str:
    """Return greedy completions of several policies beside their references, the same examples for all."""
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in predictions.items()}
    total = min(map(len, rows.values()))
    lines = []
    for index in np.linspace(0, total - 1, min(count, total)).astype(int):
        example = next(iter(rows.values()))[index]
        heard = example["columns"].get("transcript")
        lines += [f"- heard: {heard}"] if heard else [f"- prompt: {example['prompt']}"]
        lines.append(f"  - reference: {example['reference']}")
        lines += [f"  - {TITLES.get(name, name)}: {rows[name][index]['greedy'].strip()}" for name in rows]
    return "\n".join(lines) + "\n"


def draw_curves(runs: Mapping[str, Path], path: Path) -> None:
    """Draw the training reward by step, and validation BLEU by seconds of training, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, run_dir in runs.items():
        rows = read_metrics(run_dir)
        if "reward" in rows[0]:
            reward = np.array([row["reward"] for row in rows])
            steps = np.array([row["step"] for row in rows])
            window = min(SMOOTHING, len(reward))
            line = left.plot(steps, reward, alpha=0.25)[0]
            smooth = np.convolve(reward, np.ones(window) / window, mode="valid")
            left.plot(steps[window - 1 :], smooth, color=line.get_color(), label=f"{name}, mean of {window} steps")
        seconds = np.cumsum(step_seconds(rows))
        points = [(at, row["eval/bleu"]) for at, row in zip(seconds, rows, strict=True) if "eval/bleu" in row]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", label=name)
    left.set(title="Reward in training", xlabel="step", ylabel="sentence BLEU / 100")
    right.set(title="Validation, sampled", xlabel="seconds of training", ylabel="corpus BLEU")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _cell(score: Mapping[str, Any] | float | None) -> str:
    """Return a mean with its deviation, a number, or a dash."""
    if score is None:
        return "-"
    return f"{score['mean']:.2f} ± {score['sd']:.2f}" if isinstance(score, Mapping) else f"{score:.2f}"


def _spread(sampled: Mapping[str, Any]) -> str:
    return f"{sampled['mean']:.1f} ± {sampled['sd']:.1f}"
