# SPDX-License-Identifier: Apache-2.0
"""IBM Granite Speech in Flax: the model, its weights in and out, and what is needed to ask it something."""

from model_port.batch import Batch, Completions
from model_port.beam import beam_search
from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.generate import generate
from model_port.model import GraniteSpeech
from model_port.processor import Processor
from model_port.weights.convert import load_model

__all__ = [
    "Batch",
    "Completions",
    "GraniteSpeech",
    "GraniteSpeechConfig",
    "Processor",
    "UserError",
    "beam_search",
    "generate",
    "load_model",
]
