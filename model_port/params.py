# SPDX-License-Identifier: Apache-2.0
"""A model as plain arrays: {dotted path: array}, and the static rest that turns them back into a model.

Jitted programs take and return such dicts, so that the trained and the frozen part, the optimiser state and the
checkpoint all speak of parameters by the same names.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from model_port.errors import UserError
from model_port.model import GraniteSpeech

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class ModelDef:
    """Everything of a model but its arrays; hashable, so it can be a static argument of a jitted program."""

    graph: nnx.GraphDef
    structure: jax.tree_util.PyTreeDef
    names: tuple[str, ...]
    stats: frozenset[str]

    def bind(self, *params: Mapping[str, jax.Array]) -> GraniteSpeech:
        """Return the model with these arrays; together the dicts must hold every name."""
        merged = {name: value for part in params for name, value in part.items()}
        return nnx.merge(self.graph, jax.tree.unflatten(self.structure, [merged[name] for name in self.names]))

    def skeleton(self) -> GraniteSpeech:
        """Return the model without arrays, for what it says of itself."""
        nothing = jax.ShapeDtypeStruct((), jnp.float32)
        return nnx.merge(self.graph, jax.tree.unflatten(self.structure, [nothing] * len(self.names)))


def split_model(model: GraniteSpeech) -> tuple[ModelDef, Params | dict[str, jax.ShapeDtypeStruct]]:
    """Return a model's definition and its arrays by dotted path, e.g. `decoder.layers.mlp.up_proj.kernel`."""
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    names = tuple(".".join(map(str, path)) for path, _ in flat)
    leaves, structure = jax.tree.flatten(state)
    stats = frozenset(name for name, (_, variable) in zip(names, flat, strict=True) if variable.type is nnx.BatchStat)
    return ModelDef(graph, structure, names, stats), dict(zip(names, leaves, strict=True))


def select(definition: ModelDef, patterns: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the parameters that any pattern matches; stored batch statistics are never among them.

    A pattern is a regular expression that must match whole dotted components: `projector`, `lora`,
    `decoder.layers.mlp`; `all` stands for every parameter.

    Raises:
        UserError: a pattern matches nothing.
    """
    trainable = [name for name in definition.names if name not in definition.stats]
    chosen: set[str] = set()
    for pattern in patterns:
        expression = re.compile(r".*" if pattern == "all" else rf"(^|.*\.)({pattern})(\..*|$)")
        matched = {name for name in trainable if expression.fullmatch(name)}
        if not matched:
            tops = sorted({name.split(".")[0] for name in trainable})
            adapter = any(".lora." in name for name in trainable)
            raise UserError(
                f"trainable pattern {pattern!r} matches no parameter; the model has {', '.join(tops)}"
                f"{'' if adapter else ' and no LoRA adapter'}; use one of these, a part such as "
                "'decoder.layers.self_attn', or 'all'"
            )
        chosen |= matched
    return tuple(name for name in trainable if name in chosen)
