# SPDX-License-Identifier: Apache-2.0
"""Evaluation as the paper reports it: sampled at temperature 0.9 and top-p 0.9 over several seeds; more beside it.

All seeds of a prompt decode together as samples of one group, so a clip is encoded and its prompt prefilled once. The
draws of a seed depend on the seed and the example alone, not on the batch or on the other seeds.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jgrpo.config import EvalOptions, RunConfig
from jgrpo.data.pipeline import PromptData
from jgrpo.paper.tables import COLUMNS
from jgrpo.programs.encode import ClipEncoder
from jgrpo.programs.steps import Programs
from jgrpo.rewards import CorpusScore, corpus_scores, make_reward
from jgrpo.runtime.rows import fetch, gather, place
from model_port.batch import Completions
from model_port.errors import UserError
from model_port.params import Params
from model_port.paths import as_path
from model_port.processor import Processor

EVALUATION = 2  # the purpose folded into a key; see jgrpo.rollout.scoring for training's

PassScores = Mapping[str, CorpusScore]  # of one pass, by metric


@dataclass(frozen=True)
class Passes:
    """How often, and how, every example is decoded.

    Attributes:
        seeds: of the sampled passes.
        greedy: whether there is a greedy pass.
        beams: width of a beam search pass; 0 for none.
    """

    seeds: tuple[int, ...]
    greedy: bool
    beams: int = 0

    @classmethod
    def final(cls, options: EvalOptions) -> "Passes":
        """Return those of a final evaluation."""
        return cls(options.seeds, options.greedy, options.beams)

    @classmethod
    def validation(cls, options: EvalOptions) -> "Passes":
        """Return those of an evaluation while training."""
        return cls(options.validation_seeds, greedy=not options.validation_seeds)


@dataclass(frozen=True)
class Evaluation:
    """Scores of one policy on one data set.

    Attributes:
        sampled: of each sampled pass, in the order of the seeds.
        greedy, beam: of the pass of that name, or None.
        seconds: wall time.
        predictions: one row per example: index, prompt, reference, sampled texts, greedy and beam text, columns.
    """

    passes: Passes
    sampled: tuple[PassScores, ...]
    greedy: PassScores | None
    beam: PassScores | None
    seconds: float
    predictions: list[dict[str, Any]]

    def mean(self, metric: str) -> float:
        """Return the mean over the sampled passes; where there are none, the greedy pass's score, or the beam's."""
        scores = self.sampled or [scores for scores in (self.greedy, self.beam) if scores is not None][:1]
        return statistics.fmean(scores[metric].value for scores in scores)

    def lower_is_better(self, metric: str) -> bool:
        """Return whether a lower score of this metric is the better one."""
        return self._any_pass()[metric].lower_is_better

    def summary(self) -> dict[str, Any]:
        """Return what a results file holds: by metric, the sampled mean and deviation over seeds, greedy and beam.

        `average` is the plain mean of the paper's six metrics, where all six are there: its column AVG.
        """
        found = self._any_pass()
        metrics = {
            name: {
                **self._decoded(lambda scores, name=name: scores[name].value),
                "label": score.label,
                "lower_is_better": score.lower_is_better,
            }
            for name, score in found.items()
        }
        average = self._decoded(paper_average) if set(COLUMNS) <= set(found) else None
        return {
            "examples": len(self.predictions),
            "seeds": list(self.passes.seeds),
            "beams": self.passes.beams,
            "metrics": metrics,
            "average": average,
            "seconds": self.seconds,
        }

    def _any_pass(self) -> PassScores:
        return next(scores for scores in (*self.sampled, self.greedy, self.beam) if scores is not None)

    def _decoded(self, value: Callable[[PassScores], float]) -> dict[str, Any]:
        """Return one number of every pass."""
        scores = [value(scores) for scores in self.sampled]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        return {
            "sampled": {"mean": statistics.fmean(scores), "sd": spread, "scores": scores} if scores else None,
            "greedy": None if self.greedy is None else value(self.greedy),
            "beam": None if self.beam is None else value(self.beam),
        }


def paper_average(scores: PassScores) -> float:
    """Return the plain mean of the paper's six metrics."""
    return statistics.fmean(scores[name].value for name in COLUMNS)


def check_metrics(config: RunConfig) -> None:
    """Check `eval.metrics`, and read what they need from disk, before the model is loaded.

    Raises:
        UserError: none, one that is named twice or does not exist, or files that one needs and that are missing.
    """
    names = config.eval.metrics
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        given = f"names {', '.join(twice)} twice" if twice else "is empty"
        raise UserError(f"eval.metrics {given}; name each metric once, the one that chooses the best policy first")
    make_reward(dict.fromkeys(names, 1.0), options=config.metrics)


def evaluate(
    programs: Programs,
    encode: ClipEncoder,
    params: Params,
    frozen: Params,
    data: PromptData,
    processor: Processor,
    *,
    mesh: Mesh,
    config: RunConfig,
    passes: Passes,
) -> Evaluation:
    """Decode every example of `data` in every pass and score the passes as corpora."""
    start = time.perf_counter()
    rows, weights = [], programs.layout(params, frozen)
    for prompts in data.epoch():
        batch = place(prompts.batch, mesh)
        arrays = (*weights, batch, encode(params, data, prompts, batch))
        found = _decode(programs, arrays, prompts.indices, mesh=mesh, config=config, passes=passes)
        texts = {name: processor.decode(gather(fetch(out), mesh)) for name, out in found.items()}
        indices = gather(prompts.indices, mesh)[: len(data) - len(rows)]  # what comes after them fills the batch
        rows.extend(_predictions(data, indices, texts))
    references = [row["reference"] for row in rows]
    columns = {name: [row["columns"][name] for row in rows] for name in data.examples.columns}

    def scores(texts: list[str]) -> PassScores:
        return corpus_scores(config.eval.metrics, texts, references, config.metrics, columns=columns)

    return Evaluation(
        passes=passes,
        sampled=tuple(scores([row["sampled"][i] for row in rows]) for i in range(len(passes.seeds))),
        greedy=scores([row["greedy"] for row in rows]) if passes.greedy else None,
        beam=scores([row["beam"] for row in rows]) if passes.beams else None,
        seconds=time.perf_counter() - start,
        predictions=rows,
    )


def _decode(
    programs: Programs, arrays: tuple, indices: np.ndarray, *, mesh: Mesh, config: RunConfig, passes: Passes
) -> dict[str, Completions]:
    """Return the completions of a batch, by the way they are decoded.

    Args:
        arrays: params and frozen as laid out for it, batch and encoder output.
        indices: of the examples.
    """
    num_tokens, found = config.max_completion_tokens, {}
    if passes.seeds:
        keys = place(example_keys(passes.seeds, indices), mesh)
        sampling = {"temperature": config.eval.temperature, "top_p": config.eval.top_p}
        found["sampled"] = programs.rollout(*arrays, keys, num_tokens=num_tokens, **sampling)
    if passes.greedy:
        keys = place(example_keys((0,), indices), mesh)  # one row per prompt; greedy decoding draws nothing
        found["greedy"] = programs.rollout(*arrays, keys, num_tokens=num_tokens, temperature=0.0)
    if passes.beams:
        found["beam"] = programs.beam(*arrays, num_beams=passes.beams, num_tokens=num_tokens)
    return found


def _predictions(
    data: PromptData, indices: np.ndarray, texts: Mapping[str, list[list[str]]]
) -> Iterator[dict[str, Any]]:
    """Give the rows of a predictions file for these examples."""
    for i, index in enumerate(indices.tolist()):
        example = data.examples[index]
        yield {
            "index": index,
            "prompt": example.prompt,
            "reference": example.reference,
            "sampled": texts["sampled"][i] if "sampled" in texts else [],
            **{name: texts[name][i][0] if name in texts else None for name in ("greedy", "beam")},
            "columns": example.columns,
        }


def example_keys(seeds: Sequence[int], indices: np.ndarray) -> jax.Array:
    """Return keys [P, G]: one per example and seed."""

    def key(seed, index):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), EVALUATION), index)

    over_seeds = jax.vmap(key, (0, None))
    return jax.vmap(over_seeds, (None, 0))(np.asarray(seeds, np.uint32), np.asarray(indices, np.uint32))


def write_predictions(evaluation: Evaluation, path: str | os.PathLike) -> None:
    """Write one JSON object per example; of several processes, only the first writes."""
    if jax.process_index() != 0:
        return
    path = as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.predictions))
