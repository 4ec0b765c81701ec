"""Evaluation as the paper reports it: sampled at temperature 0.9 and top-p 0.9 over several seeds; greedy beside it.

All seeds of a prompt decode together as samples of one group, so a clip is encoded and its prompt prefilled once. The
draws of a seed depend on the seed and the example alone, not on the batch or on the other seeds.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jgrpo.config import EvalOptions
from jgrpo.data.pipeline import PromptData
from jgrpo.encode import ClipEncoder
from jgrpo.rewards.bleu import BleuOptions, corpus_bleu
from jgrpo.steps import Programs, place
from model_port.params import Params
from model_port.processor import Processor

EVALUATION = 2  # the purpose folded into a key; see jgrpo.rollout for training's


@dataclass(frozen=True)
class Evaluation:
    """Corpus BLEU of one policy on one manifest.

    Attributes:
        sampled: BLEU of each sampled pass, 0..100, in the order of `seeds`.
        greedy: BLEU of the greedy pass, or None.
        signature: sacrebleu's.
        seconds: wall time.
        predictions: one row per example: index, prompt, reference, sampled texts, greedy text, further columns.
    """

    sampled: tuple[float, ...]
    seeds: tuple[int, ...]
    greedy: float | None
    signature: str
    seconds: float
    predictions: list[dict[str, Any]]

    @property
    def mean(self) -> float:
        """Mean BLEU of the sampled passes; that of the greedy pass where there are none."""
        return statistics.fmean(self.sampled) if self.sampled else self.greedy

    def summary(self) -> dict[str, Any]:
        """Return what a results file holds: the sampled mean and standard deviation over seeds, and greedy."""
        spread = statistics.stdev(self.sampled) if len(self.sampled) > 1 else 0.0
        sampled = {"mean": self.mean, "sd": spread, "seeds": list(self.seeds), "scores": list(self.sampled)}
        return {
            "sampled": sampled if self.sampled else None,
            "greedy": self.greedy,
            "examples": len(self.predictions),
            "signature": self.signature,
            "seconds": self.seconds,
        }


def evaluate(
    programs: Programs,
    encode: ClipEncoder,
    params: Params,
    frozen: Params,
    data: PromptData,
    processor: Processor,
    *,
    mesh: Mesh,
    options: EvalOptions,
    num_tokens: int,
    seeds: Sequence[int],
    greedy: bool,
) -> Evaluation:
    """Decode every example of `data` once per seed, and greedily if asked, and score the passes as corpora."""
    start = time.perf_counter()
    rows = []
    for prompts in data.epoch():
        batch = place(prompts.batch, mesh)
        encoded = encode(params, data, prompts, batch)
        passes = []
        for chosen, temperature, top_p in (
            (seeds, options.temperature, options.top_p),
            ((0,) if greedy else (), 0.0, 1.0),
        ):
            if chosen:
                keys = place(example_keys(chosen, prompts.indices), mesh)
                out = programs.rollout(
                    params, frozen, batch, encoded, keys, num_tokens=num_tokens, temperature=temperature, top_p=top_p
                )
                passes.append(processor.decode(jax.device_get(out)))
            else:
                passes.append([[] for _ in prompts.prompts])
        for i in range(prompts.valid):
            rows.append(
                {
                    "index": int(prompts.indices[i]),
                    "prompt": prompts.prompts[i],
                    "reference": prompts.references[i],
                    "sampled": passes[0][i],
                    "greedy": passes[1][i][0] if greedy else None,
                    "columns": {name: values[i] for name, values in prompts.columns.items()},
                }
            )
    references = [row["reference"] for row in rows]
    bleu = BleuOptions(lowercase=options.lowercase)
    scores = [corpus_bleu([row["sampled"][s] for row in rows], references, bleu) for s in range(len(seeds))]
    scores += [corpus_bleu([row["greedy"] for row in rows], references, bleu)] if greedy else []
    return Evaluation(
        sampled=tuple(score for score, _ in scores[: len(seeds)]),
        seeds=tuple(seeds),
        greedy=scores[-1][0] if greedy else None,
        signature=scores[0][1],
        seconds=time.perf_counter() - start,
        predictions=rows,
    )


def example_keys(seeds: Sequence[int], indices: np.ndarray) -> jax.Array:
    """Return keys [P, G]: one per example and seed."""

    def key(seed, index):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), EVALUATION), index)

    over_seeds = jax.vmap(key, (0, None))
    return jax.vmap(over_seeds, (None, 0))(np.asarray(seeds, np.uint32), np.asarray(indices, np.uint32))


def write_predictions(evaluation: Evaluation, path: Path) -> None:
    """Write one JSON object per example."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.predictions))
