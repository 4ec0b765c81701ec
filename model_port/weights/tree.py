# SPDX-License-Identifier: Apache-2.0
"""Which arrays a model of a given config has, how to put them in, and what to say when others are found."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.model import GraniteSpeech

SHOWN = 5


def abstract_model(config: GraniteSpeechConfig, dtype: Any = jnp.float32) -> GraniteSpeech:
    """Build a model whose variables have shapes and dtypes but no values."""
    return nnx.eval_shape(lambda: GraniteSpeech(config, rngs=nnx.Rngs(0), dtype=dtype))


def variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Return the parameters and BatchNorm statistics of a model, abstract or not, by dotted path."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


def fill(model: nnx.Module, value: Callable[[str], jax.Array]) -> None:
    """Set every variable of a model, abstract or not, to `value(dotted path)`."""
    state = nnx.state(model)
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(value(".".join(map(str, path))))
    nnx.update(model, state)


def shapes(config: GraniteSpeechConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of the model, by dotted path."""
    return dict(_shapes(config))


@functools.lru_cache(maxsize=16)
def _shapes(config: GraniteSpeechConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((path, tuple(variable.shape)) for path, variable in variables(abstract_model(config)).items())


def compare(config: GraniteSpeechConfig, arrays: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return by kind what is wrong with {dotted path: array} for a model of this config; only shapes are looked at."""
    expected = shapes(config)
    return {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in arrays],
        "unexpected": [name for name in arrays if name not in expected],
        "wrong shape": [
            f"{name} is {tuple(arrays[name].shape)}, config.json asks for {shape}"
            for name, shape in expected.items()
            if name in arrays and tuple(arrays[name].shape) != shape
        ],
    }


def listed(problems: Mapping[str, list[str]]) -> list[str]:
    """Return a line for every kind of problem there is: how many, and the first few."""
    lines = []
    for kind, found in problems.items():
        if found:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            lines.append(f"  {kind} ({len(found)}): {', '.join(sorted(found)[:SHOWN])}{more}")
    return lines


def check(where: str, problems: Mapping[str, list[str]], remedy: str) -> None:
    """Raise a UserError that lists the first few problems of every kind, if there are any."""
    lines = listed(problems)
    if lines:
        raise UserError("\n".join([f"{where}: the weights do not fit config.json", *lines, remedy]))
