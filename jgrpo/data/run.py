# SPDX-License-Identifier: Apache-2.0
"""The data of a run, from its config, and what a person is told about it when the run starts."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from jgrpo.config import DataOptions, RunConfig
from jgrpo.data.examples import Examples
from jgrpo.data.fit import FRAME_SECONDS, summary
from jgrpo.data.mixture import Source
from jgrpo.data.pipeline import PromptData
from jgrpo.data.sources import read_examples, source_name
from model_port.errors import UserError
from model_port.processor import Processor


def training_data(
    config: RunConfig, processor: Processor, *, rows: Int[np.ndarray, " P"], references: bool
) -> PromptData:
    """Return what the run trains on: filtered, and with substitutes for clips that cannot be read.

    Args:
        rows: of a step that this process holds.
        references: whether the references are trained on.
    """
    data = config.data
    return PromptData(
        read_training(data),
        processor,
        completion_tokens=config.max_completion_tokens if references else None,
        max_unreadable=data.max_unreadable,
        length_window=data.length_window,
        min_seconds=data.min_seconds,
        max_seconds=data.max_seconds,
        max_reference_tokens=data.max_reference_tokens,
        unfit=data.unfit,
        prompts_per_step=config.prompts_per_step,
        rows=rows,
        **_shape_options(config),
    )


def evaluation_data(config: RunConfig, path: str, processor: Processor, *, rows: Int[np.ndarray, " P"]) -> PromptData:
    """Return all that a manifest or split holds, each example asked by the task's first prompt."""
    examples = read_examples(path, prompts=config.data.prompts, reference=config.data.reference)
    size = config.eval.batch_size
    return PromptData(examples, processor, prompts_per_step=size, rows=rows, **_shape_options(config))


def _shape_options(config: RunConfig) -> dict[str, Any]:
    data = config.data
    return {
        "audio_buckets_seconds": data.audio_buckets,
        "max_prompt_tokens": data.max_prompt_tokens,
        "system": data.system,
        "cache": data.cache_features,
    }


def read_training(options: DataOptions) -> Examples | list[Source]:
    """Return what is trained on, each example with a prompt template of its own.

    Raises:
        UserError: as read_examples, or sources of a mixture with the same name.
    """
    if not options.mixture:
        return read_examples(options.train, prompts=options.prompts, reference=options.reference, vary=True)
    names = [source.name or source_name(source.path) for source in options.mixture]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"data.mixture has several sources called {', '.join(twice)}; give each a name of its own")
    return [
        Source(read_examples(one.path, prompts=one.prompts, reference=one.reference, vary=True), name, one.weight)
        for one, name in zip(options.mixture, names, strict=True)
    ]


def describe(data: PromptData, validation: PromptData | None, *, dropped: os.PathLike) -> Iterator[str]:
    """Give what is trained on, what of it was left out, and the shapes that programs may be compiled for.

    Args:
        dropped: the file that names what was left out.
    """
    names = data.sources or ("",)
    parts = zip(data.examples.stores, names, data.counts, data.seconds, data.drops, strict=True)
    for store, name, count, seconds, drops in parts:
        label = f"{name} ({store.name})" if name else store.name
        rest = f"; {len(drops):,} dropped: {summary(drops)}" if drops else ""
        yield f"{label}: {count:,} examples, {seconds / 3600:,.2f} h{rest}"
    if any(data.drops):
        yield f"{dropped} names what was dropped"
    for name, part in {"training": data, "validation": validation}.items():
        if part is not None:
            shapes = [f"{frames * FRAME_SECONDS:g} s of audio with {tokens} tokens" for frames, tokens in part.shapes()]
            yield f"shapes of {name} batches: {', '.join(shapes)}"
