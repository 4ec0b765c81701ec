# SPDX-License-Identifier: Apache-2.0
"""The arrays that travel between host and device, as pytrees with checked shapes."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array | np.ndarray


def struct(cls):
    """Make a frozen, keyword-only dataclass that is also a pytree.

    Unflattening skips `__init__`, so `jax.tree.map` and `jax.eval_shape` may put shardings or shape structs
    in the leaves without tripping the shape checks that construction runs.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    keys = [jax.tree_util.GetAttrKey(name) for name in names]

    def flatten(x):
        return tuple(getattr(x, name) for name in names), None

    def flatten_with_keys(x):
        return tuple(zip(keys, flatten(x)[0], strict=True)), None

    def unflatten(_, leaves):
        x = object.__new__(cls)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(x, name, leaf)
        return x

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


@struct
class Batch:
    """P prompts with their audio, padded to common lengths.

    Prompts are left-aligned: row p holds its tokens at positions 0 .. n-1 and padding after them.

    Attributes:
        tokens: token ids; `<|audio|>` stands once per audio embedding.
        mask: true where the token is real.
        audio_slots: for an audio position, the index of its embedding among the row's C * S audio embeddings
            (S embeddings per padded clip); -1 at text positions.
        features: stacked log-mel frames of C clips per prompt, zero padded.
        lengths: valid frames per clip; 0 where a prompt has fewer than C clips.
    """

    tokens: Int[Array, "P L"]
    mask: Bool[Array, "P L"]
    audio_slots: Int[Array, "P L"]
    features: Float[Array, "P C A M"]
    lengths: Int[Array, "P C"]


@struct
class Completions:
    """G sampled completions for each of P prompts.

    Attributes:
        tokens: token ids; positions after the end hold the pad id.
        mask: true up to and including the end-of-sequence token.
        logp: log-probability of each token under the distribution it was sampled from; 0 where masked.
    """

    tokens: Int[Array, "P G T"]
    mask: Bool[Array, "P G T"]
    logp: Float[Array, "P G T"]


@struct
class Trees:
    """The completions of P groups as prefix trees: N = F M + G nodes, a token after the tokens before it each.

    Each group has F trees of M slots, in depth-first order, for the nodes that something follows and which the model
    is fed; then G nodes that nothing follows, which are predicted only. Slot i of a tree sees the prompt and slot j
    where j <= i < ends[j]: the nodes before it and itself. A slot that is not in use sees the prompt and itself.

    Attributes:
        tokens: of every node.
        parents: the slot that predicts a node, trees one after the other; -1 is the prompt's last token.
        depths: completion tokens before a slot's own.
        ends: one past the last slot of a slot's subtree, counted in its tree.
        node_of: the node of every completion token; 0 where there is none.
    """

    tokens: Int[Array, "P N"]
    parents: Int[Array, "P N"]
    depths: Int[Array, "P F M"]
    ends: Int[Array, "P F M"]
    node_of: Int[Array, "P G T"]
