# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation data: examples of audio, prompts and references, and the batches made of them."""

from jgrpo.data.examples import Example, Examples
from jgrpo.data.manifest import read_manifest
from jgrpo.data.mixture import Source
from jgrpo.data.pipeline import PromptBatch, PromptData
from jgrpo.data.sources import read_examples

__all__ = [
    "Example",
    "Examples",
    "PromptBatch",
    "PromptData",
    "Source",
    "read_examples",
    "read_manifest",
]
