# SPDX-License-Identifier: Apache-2.0
"""Our model against the PyTorch reference on one clip: what comes out of every stage."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from etils import epath
from flax import nnx

from model_port.audio import load_audio
from model_port.batch import Batch, Completions
from model_port.config import GraniteSpeechConfig
from model_port.features import SAMPLE_RATE, log_mel
from model_port.generate import generate
from model_port.model import GraniteSpeech
from model_port.processor import AUDIO_MARKER, Processor
from model_port.weights import convert, reference
from model_port.weights.reference import Inputs, Outputs

PROMPT = f"{AUDIO_MARKER}can you transcribe the speech into a written format?"
# Largest difference allowed, relative to the largest magnitude: a hundred times what was measured in float32.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
# A sum that falls between two values of a narrower dtype may be rounded to either by torch and by NumPy.
ROUNDED_SUM = 1e-3


@dataclass(frozen=True)
class Stage:
    """One stage of the computation, compared.

    Attributes:
        found: what is said of it, e.g. the largest difference.
        ok: None where it was not compared.
    """

    name: str
    found: str
    allowed: str
    ok: bool | None

    def line(self) -> str:
        """Return it as a line of a table."""
        verdict = {True: "ok", False: "DIFFERS", None: ""}[self.ok]
        return f"  {self.name:<14}{self.found:>22}{self.allowed:>9}  {verdict}".rstrip()


@dataclass(frozen=True)
class Options:
    """How the models run.

    Attributes:
        dtype: in which both compute.
        audio: a clip; None stands for noise.
        prompt: user message; a model without a tokenizer gets random ids.
    """

    dtype: str
    max_new_tokens: int
    audio: str | os.PathLike | None
    prompt: str


def compare_models(
    src: str | os.PathLike,
    checkpoint: str | os.PathLike,
    original: GraniteSpeechConfig,
    *,
    lora: str,
    dtypes: Mapping[str, np.dtype],
    options: Options,
) -> tuple[list[Stage], list[str]]:
    """Run the reference, then ours, so that one model is in memory at a time; return the stages and remarks.

    Args:
        original: the config of `src`.
        lora: what became of the adapter of `src` in the checkpoint: keep, merge or none.
        dtypes: of the checkpoint's arrays, by dotted path.
    """
    inputs, processor = _inputs(src, original, options.audio, options.prompt)
    reason = reference.unavailable(original)
    if reason:
        return [], [f"stages not compared: {reason}"]
    run = {"dtype": options.dtype, "max_new_tokens": options.max_new_tokens}
    theirs = reference.run_reference(src, inputs, original, lora=lora, dtypes=dtypes, **run)
    if theirs.tokens is None:
        return [], [f"stages not compared: {theirs.missing['model']}"]
    with jax.default_matmul_precision("highest"):
        model = convert.load_model(checkpoint, dtype=options.dtype)
        ours, completion = _run(model, inputs, options.max_new_tokens)
    rounded_sums = lora == "merge" and any(dtype != np.float32 for dtype in dtypes.values())
    tolerance = max(TOLERANCE[options.dtype], ROUNDED_SUM if rounded_sums else 0.0)
    stages = _compare(theirs, ours, tolerance=tolerance, exact_tokens=tolerance == TOLERANCE["float32"])
    text = [f"text: {processor.decode(completion)[0][0]!r}"] if processor else []
    return stages, [*theirs.remarks, *text]


def _inputs(
    src: str | os.PathLike, config: GraniteSpeechConfig, audio: str | os.PathLike | None, prompt: str
) -> tuple[Inputs, Processor | None]:
    """Return one clip in a prompt, and the processor if the directory has a tokenizer; without one, ids are random."""
    random = np.random.default_rng(0)
    if audio is None:
        # Speech-like in that it swells and fades; its frames fill neither the last attention block nor the last window.
        time = np.arange(76_000) / SAMPLE_RATE
        wave = (random.standard_normal(len(time)) * (0.01 + 0.1 * np.sin(5 * time) ** 2)).astype(np.float32)
    else:
        wave = load_audio(os.fspath(audio))
    features = log_mel(wave)
    if any((epath.Path(src) / name).exists() for name in ("tokenizer.json", "vocab.json")):
        processor = Processor.from_pretrained(os.fspath(src))
        batch = processor(audio=[wave], prompts=[prompt])
        return Inputs(wave=wave, features=features, tokens=batch.tokens[0][batch.mask[0]]), processor
    words = np.setdiff1d(np.arange(config.decoder.vocab_size), [config.audio_token_id, *config.eos_token_ids])
    before, after = random.choice(words, 3), random.choice(words, 9)
    slots = np.full(config.projector.num_slots(len(features)), config.audio_token_id)
    return Inputs(wave=wave, features=features, tokens=np.concatenate([before, slots, after])), None


def _run(model: GraniteSpeech, inputs: Inputs, max_new_tokens: int) -> tuple[Outputs, Completions]:
    """Compute all stages with our model."""
    slots = np.full(inputs.tokens.shape, -1, np.int32)
    audio = inputs.tokens == model.config.audio_token_id
    slots[audio] = np.arange(audio.sum())
    batch = Batch(
        tokens=inputs.tokens[None].astype(np.int32),
        mask=np.ones((1, len(inputs.tokens)), bool),
        audio_slots=slots[None],
        features=inputs.features[None, None],
        lengths=np.full((1, 1), len(inputs.features), np.int32),
    )
    encoded, embeddings = _audio_stages(*nnx.split(model), batch)
    completion = generate(model, batch, max_new_tokens=max_new_tokens, temperature=0)
    stages = {"features": inputs.features, "encoder": encoded, "projector": embeddings, "logits": model(batch)[0]}
    outputs = Outputs(
        stages={name: np.asarray(value, np.float32) for name, value in stages.items()},
        tokens=np.asarray(completion.tokens)[0, 0][np.asarray(completion.mask)[0, 0]].tolist(),
    )
    return outputs, completion


@partial(jax.jit, static_argnums=0)
def _audio_stages(graph, state, batch: Batch):
    model = nnx.merge(graph, state)
    encoded = model.encode(batch.features, batch.lengths)
    return encoded[0, 0], model.project(encoded)[0]


def _compare(theirs: Outputs, ours: Outputs, *, tolerance: float, exact_tokens: bool) -> list[Stage]:
    stages = []
    for name, one in ours.stages.items():
        if name not in theirs.stages:
            stages.append(Stage(name, f"not compared: {theirs.missing[name]}", "", None))
            continue
        other = theirs.stages[name]
        if one.shape != other.shape:
            stages.append(Stage(name, f"shapes {other.shape}, {one.shape}", "", False))
            continue
        error = float(np.abs(one - other).max() / np.abs(other).max())
        allowed = TOLERANCE["float32"] if name == "features" else tolerance  # the front end knows no other dtype
        stages.append(Stage(name, f"{error:.1e}", f"{allowed:.0e}", error <= allowed))
    longest = max(len(theirs.tokens), len(ours.tokens))
    same = next(
        (at for at, pair in enumerate(zip(theirs.tokens, ours.tokens, strict=False)) if len(set(pair)) > 1),
        min(len(theirs.tokens), len(ours.tokens)),
    )
    if exact_tokens:
        return [*stages, Stage("greedy text", f"{same} of {longest} tokens", "all", same == longest)]
    return [*stages, Stage("greedy text", f"{same} of {longest} tokens", "any", None)]
