# SPDX-License-Identifier: Apache-2.0
"""The jitted programs of a run: encode, rollout, score, update. All run over one mesh and one set of parameters.

The trained parameters and the optimiser state are donated to `update`. A prompt is encoded once per step and its keys
and values exist once per prompt in every program.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, PyTree

from jgrpo.config import GRPOOptions
from jgrpo.core.logprobs import chunked_logprobs
from jgrpo.core.losses import ON_POLICY_METRICS, on_policy_mask, sft_token_loss, token_loss, token_weights
from jgrpo.programs.layout import decoding_options, rollout_layout
from jgrpo.runtime.optimiser import all_finite, select_tree
from model_port.batch import Batch, Trees, struct
from model_port.beam import search_completions
from model_port.generate import sample_completions
from model_port.params import ModelDef, Params
from model_port.partition import batch_sharding

Array = jax.Array | np.ndarray


@struct
class TrainState:
    """What an update replaces.

    Attributes:
        params: the trained parameters, float32.
        opt_state: of the optimiser.
    """

    params: dict
    opt_state: PyTree


@struct
class Targets:
    """Completions to learn from, with what the objective needs to know of each.

    Attributes:
        trees: the completions.
        mask: true where a token is learnt from: up to and including the end-of-sequence token, or nowhere.
        old_logp: log-probs under the policy that sampled; zeros for references.
        ref_logp: log-probs under the frozen initial policy; None when no KL is wanted.
        advantage: of each completion; ones for references.
        is_off_policy: true for completions that were not sampled (mixed-policy GRPO); None where there are none.
    """

    trees: Trees
    mask: Bool[Array, "P G T"]
    old_logp: Float[Array, "P G T"]
    ref_logp: Float[Array, "P G T"] | None
    advantage: Float[Array, "P G"]
    is_off_policy: Bool[Array, "P G"] | None = None


@dataclass(frozen=True)
class Objective:
    """A loss as a value: how each token counts and what it costs.

    Attributes:
        weigh: mask [P, G, T] to token weights [P, G, T]; taken over the whole batch, so that micro-batches add up.
        per_micro_batch: weigh each micro-batch by itself and average them instead (bnpo).
        token_loss: (logp [P, G, T], targets) to (loss [P, G, T], {metric: [P, G, T]}).
        temperature: that the logits are divided by.
        truncation: top_p, top_k and min_p of the rollout; the log-probs are those of the truncated distribution.
    """

    weigh: Callable
    token_loss: Callable
    temperature: float = 1.0
    per_micro_batch: bool = False
    truncation: dict[str, Any] = field(default_factory=dict)


def truncation(options: GRPOOptions) -> dict[str, Any]:
    """Return what the rollout keeps of each distribution, for truncate_logits."""
    return {"top_p": options.top_p, "top_k": options.top_k, "min_p": options.min_p}


def grpo_objective(options: GRPOOptions, max_completion_tokens: int) -> Objective:
    """Return the policy objective of a GRPO run."""
    chosen = ("loss_type", "epsilon_low", "epsilon_high", "beta", "kl", "importance", "delta", "off_policy_shaping")
    settings = {name: getattr(options, name) for name in chosen}

    def loss(logp, targets: Targets):
        behaviour = targets.old_logp, targets.ref_logp, targets.advantage, targets.mask, targets.is_off_policy
        losses, metrics = token_loss(logp, *behaviour, **settings)
        if targets.is_off_policy is not None:
            metrics["mixed/reference_ratio"] = jnp.where(targets.mask, jnp.exp(logp), 0.0)
        return losses, metrics

    def weigh(mask):
        return token_weights(
            mask,
            loss_type=options.loss_type,
            max_completion_length=max_completion_tokens,
            skip_empty_groups=options.filter_zero_variance,
        )

    per_micro_batch = options.loss_type == "bnpo"
    return Objective(weigh, loss, options.temperature, per_micro_batch, truncation(options))


def sft_objective() -> Objective:
    """Return the mean negative log-likelihood of the reference tokens."""
    return Objective(
        weigh=lambda mask: token_weights(mask, loss_type="dapo"),
        token_loss=lambda logp, targets: (sft_token_loss(logp, targets.mask), {}),
    )


@dataclass(frozen=True)
class Programs:
    """The compiled programs; each takes and returns arrays only.

    Attributes:
        encode: (params, frozen, batch) to encoder output [P, C, A, E].
        layout: (params, frozen) to the same as decoding wants them: laid out for it, in the dtype of the computation.
            Once per rollout; what is right as it is, is not copied.
        rollout: (params, frozen, batch, encoded, keys [P, G], num_tokens=, temperature=, top_p=, top_k=, min_p=) to
            Completions; params and frozen are those of `layout`.
        beam: (params, frozen, batch, encoded, num_beams=, num_tokens=) to the Completions [P, 1, T] of a beam search;
            params and frozen as for `rollout`.
        score: (params, frozen, batch, encoded, Trees) to log-probs [P, G, T] at the training temperature
            and truncation.
        update: (TrainState, frozen, batch, encoded, Targets) to (TrainState, metrics); the state is donated.
        share: (tree of [P, ...], part, parts=) to the rows part, part + parts, ... of every array: each device keeps
            rows of its own, and none moves.
        init: params to TrainState.
    """

    encode: Callable
    layout: Callable
    rollout: Callable
    beam: Callable
    score: Callable
    update: Callable
    share: Callable
    init: Callable


def make_programs(
    definition: ModelDef,
    *,
    mesh: Mesh,
    optimiser: optax.GradientTransformation,
    objective: Objective,
    trainable: tuple[str, ...],
    remat: str = "none",
    logprob_chunk: int = 4096,
    micro_batches: int = 1,
    rollout_weights: str = "gathered",
    rollout_layers: str = "auto",
    rollout_cache: str = "auto",
) -> Programs:
    """Return the programs of a run over `mesh`; those of the rollout are as layout.decoding_options says."""
    decoding = decoding_options(mesh, weights=rollout_weights, layers=rollout_layers, cache=rollout_cache)
    # A trained encoder is run again with the parameters in question: those of the update, or of the reference.
    reencode = any(name.startswith("encoder.") for name in trainable)
    # Each chunk reads all of the head, so its size is that of a device's share: more devices take no more chunks.
    chunk = logprob_chunk * mesh.shape["data"] * mesh.shape["fsdp"]
    logprobs = _logprobs_of(definition, objective, remat=remat, chunk=chunk, reencode=reencode)

    def encode(params: Params, frozen: Params, batch: Batch):
        return definition.bind(frozen, params).encode(batch.features, batch.lengths)

    def rollout(params, frozen, batch, encoded, keys, **sampling):
        return sample_completions(definition.bind(frozen, params), batch, encoded, keys, **decoding, **sampling)

    def beam(params, frozen, batch, encoded, **search):
        return search_completions(definition.bind(frozen, params), batch, encoded, **decoding, **search)

    def score(params, frozen, batch, encoded, trees):
        return logprobs(params, frozen, batch, encoded, trees)[0]

    def piece_loss(params, frozen, batch, encoded, targets, weights, shares):
        logp, entropy = logprobs(params, frozen, batch, encoded, targets.trees)
        loss, metrics = objective.token_loss(logp, targets)
        drift = jnp.where(on_policy_mask(targets.mask, targets.is_off_policy), jnp.abs(logp - targets.old_logp), 0.0)
        metrics = {**metrics, "entropy": entropy, "logp_drift": drift}
        sums = {name: jnp.sum(shares[AVERAGED_OVER.get(name, "all")] * value) for name, value in metrics.items()}
        total = jnp.sum(weights * loss)
        return total, (sums | {"loss": total}, {"logp_drift_max": drift.max()})

    def piece_gradient(params, frozen, piece):
        (_, (sums, peaks)), grads = jax.value_and_grad(piece_loss, has_aux=True)(params, frozen, *piece)
        return grads, sums, peaks

    def update(state: TrainState, frozen: Params, batch: Batch, encoded, targets: Targets):
        pieces = _split((batch, encoded, targets, *_weigh(objective, targets, micro_batches)), micro_batches)

        def add(total, piece):
            grads, sums, peaks = piece_gradient(state.params, frozen, piece)
            plus = jax.tree.map(jnp.add, total[:2], (grads, sums))
            return (*plus, jax.tree.map(jnp.maximum, total[2], peaks)), None

        shapes = jax.eval_shape(piece_gradient, state.params, frozen, jax.tree.map(lambda leaf: leaf[0], pieces))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (grads, sums, peaks), _ = jax.lax.scan(add, zeros, pieces)
        updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
        new = TrainState(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
        norm = optax.tree.norm(grads)
        sound = all_finite((sums["loss"], norm))
        # Without a token to learn from, an update would still move the parameters by its momentum.
        empty = ~jnp.any(targets.mask)
        counts = {"skipped": 1.0 - sound.astype(jnp.float32), "empty": empty.astype(jnp.float32)}
        return select_tree(sound & ~empty, new, state), {**sums, **peaks, "grad_norm": norm, **counts}

    rows = batch_sharding(mesh)
    sampling = ("num_tokens", "temperature", "top_p", "top_k", "min_p")
    return Programs(
        encode=_on(mesh, jax.jit(encode, out_shardings=rows)),
        layout=rollout_layout(definition, mesh, rollout_weights),
        rollout=_on(mesh, jax.jit(rollout, static_argnames=sampling, out_shardings=rows)),
        beam=_on(mesh, jax.jit(beam, static_argnames=("num_beams", "num_tokens"), out_shardings=rows)),
        score=_on(mesh, jax.jit(score, out_shardings=rows)),
        update=_on(mesh, jax.jit(update, donate_argnums=0)),
        share=_on(mesh, jax.jit(_share, static_argnames="parts", out_shardings=rows)),
        init=lambda params: _initial_state(params, optimiser, mesh),
    )


def _logprobs_of(definition: ModelDef, objective: Objective, *, remat: str, chunk: int, reencode: bool) -> Callable:
    """Return the function that scores completions: (log-probs, entropies) [P, G, T], arbitrary where masked."""

    def logprobs(params, frozen, batch, encoded, trees):
        model = definition.bind(frozen, params)
        if reencode:
            encoded = model.encode(batch.features, batch.lengths, remat=remat)
        hidden = model.completion_hidden(batch, encoded, trees, remat=remat)
        distribution = {"temperature": objective.temperature, **objective.truncation}
        nodes = chunked_logprobs(hidden, trees.tokens, model.policy_logits, chunk_tokens=chunk, **distribution)
        places = trees.node_of.reshape(len(trees.node_of), -1)
        return tuple(jnp.take_along_axis(x, places, axis=1).reshape(trees.node_of.shape) for x in nodes)

    return logprobs


# Which tokens a metric is a mean over, where that is not all of them.
AVERAGED_OVER = {name: "sampled" for name in (*ON_POLICY_METRICS, "logp_drift")} | {"mixed/reference_ratio": "others"}


def _weigh(objective: Objective, targets: Targets, micro_batches: int):
    """Return the loss weights [P, G, T] and {tokens: their plain shares [P, G, T]}; all add up over micro-batches."""
    mask, sampled = targets.mask, on_policy_mask(targets.mask, targets.is_off_policy)
    groups = {"all": mask, "sampled": sampled, "others": mask & ~sampled}
    shares = {name: token_weights(tokens, loss_type="dapo") for name, tokens in groups.items()}
    if not objective.per_micro_batch or micro_batches == 1:
        return objective.weigh(mask), shares
    weights = jax.vmap(objective.weigh)(_split(mask, micro_batches)) / micro_batches
    return _join(weights), shares


def _split(tree, pieces: int):
    """[P, ...] to [pieces, P / pieces, ...]; rows are dealt out in turn, so each piece stays split over the mesh."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 1, 0), tree)


def _share(tree, part, *, parts: int):
    return jax.tree.map(lambda x: x[part], _split(tree, parts))


def _join(x):
    """Undo `_split`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def _on(mesh: Mesh, program: Callable) -> Callable:
    """Run a jitted program with the mesh set, which `model_port.partition.constrain` reads."""

    @functools.wraps(program)
    def run(*args, **kwargs):
        with jax.set_mesh(mesh):
            return program(*args, **kwargs)

    return run


def _initial_state(params: Params, optimiser: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return the state before the first update; moments are laid out like their parameters."""
    abstract = jax.eval_shape(optimiser.init, params)

    def sharding(path, _):
        named = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in params]
        return params[named[-1]].sharding if named else NamedSharding(mesh, PartitionSpec())

    shardings = jax.tree_util.tree_map_with_path(sharding, abstract)
    with jax.set_mesh(mesh):
        opt_state = jax.jit(optimiser.init, out_shardings=shardings)(params)
    return TrainState(params=params, opt_state=opt_state)


def apply_updates(
    programs: Programs,
    state: TrainState,
    frozen: Params,
    batch: Batch,
    encoded: jax.Array,
    targets: Targets,
    *,
    iterations: int = 1,
    minibatches: int = 1,
) -> tuple[TrainState, dict[str, float]]:
    """Go over a rollout so many times, each time in so many updates, each on its share of the prompts; donates `state`.

    The shares are the same in every pass. Returns the new state and the metrics of all updates: the largest of those
    called `_max`, the sums of `skipped` and `empty`, and means of the others over the updates that were not empty.
    """
    arrays, found = (batch, encoded, targets), []
    for _ in range(iterations):
        for part in range(minibatches):
            piece = arrays if minibatches == 1 else programs.share(arrays, part, parts=minibatches)
            state, metrics = programs.update(state, frozen, *piece)
            found.append(metrics)
    found = [{name: float(value) for name, value in metrics.items()} for metrics in jax.device_get(found)]
    counted = [metrics for metrics in found if not metrics["empty"]] or found
    combined = {}
    for name in found[0]:
        if name in ("skipped", "empty"):
            combined[name] = sum(metrics[name] for metrics in found)
        elif name.endswith("_max"):
            combined[name] = max(metrics[name] for metrics in counted)
        else:
            combined[name] = sum(metrics[name] for metrics in counted) / len(counted)
    return state, combined
