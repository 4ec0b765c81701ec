"""Which arrays a model of a given config has, how to put them in, and what to say when others are found."""

from collections.abc import Callable
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
    return {path: tuple(variable.shape) for path, variable in variables(abstract_model(config)).items()}


def check(where: str, problems: dict[str, list[str]], remedy: str) -> None:
    """Raise a UserError that lists the first few problems of every kind, if there are any."""
    lines = []
    for kind, found in problems.items():
        if found:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            lines.append(f"  {kind} ({len(found)}): {', '.join(sorted(found)[:SHOWN])}{more}")
    if lines:
        raise UserError("\n".join([f"{where}: the weights do not fit config.json", *lines, remedy]))
