"""The jitted programs of a run: encode, rollout, score, update. All run over one mesh and one set of parameters.

The trained parameters and the optimiser state are donated to `update`. A prompt is encoded once per step and its keys
and values exist once per prompt in every program.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, PyTree

from jgrpo.config import GRPOOptions
from jgrpo.core.logprobs import chunked_logprobs
from jgrpo.core.losses import sft_token_loss, token_loss, token_weights
from jgrpo.runtime.optimiser import all_finite, select_tree
from model_port.batch import Batch, struct
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
        tokens: completion tokens; positions after the end hold the pad id.
        mask: true up to and including the end-of-sequence token.
        old_logp: log-probs under the policy that sampled; zeros for references.
        ref_logp: log-probs under the frozen initial policy; None when no KL is wanted.
        advantage: of each completion; ones for references.
    """

    tokens: Int[Array, "P G T"]
    mask: Bool[Array, "P G T"]
    old_logp: Float[Array, "P G T"]
    ref_logp: Float[Array, "P G T"] | None
    advantage: Float[Array, "P G"]


@dataclass(frozen=True)
class Objective:
    """A loss as a value: how each token counts and what it costs.

    Attributes:
        weigh: mask [P, G, T] to token weights [P, G, T]; taken over the whole batch, so that micro-batches add up.
        per_micro_batch: weigh each micro-batch by itself and average them instead (bnpo).
        token_loss: (logp [P, G, T], targets) to (loss [P, G, T], {metric: [P, G, T]}).
        temperature: that the logits are divided by.
    """

    weigh: Callable
    token_loss: Callable
    temperature: float = 1.0
    per_micro_batch: bool = False


def grpo_objective(options: GRPOOptions, max_completion_tokens: int) -> Objective:
    """Return the policy objective of a GRPO run."""
    chosen = ("loss_type", "epsilon_low", "epsilon_high", "beta", "kl", "importance")
    settings = {name: getattr(options, name) for name in chosen}

    def loss(logp, targets: Targets):
        return token_loss(logp, targets.old_logp, targets.ref_logp, targets.advantage, targets.mask, **settings)

    def weigh(mask):
        return token_weights(mask, loss_type=options.loss_type, max_completion_length=max_completion_tokens)

    return Objective(weigh, loss, options.temperature, per_micro_batch=options.loss_type == "bnpo")


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
        rollout: (params, frozen, batch, encoded, keys [P, G], num_tokens=, temperature=, top_p=) to Completions.
        score: (params, frozen, batch, encoded, tokens [P, G, T]) to log-probs [P, G, T] at the training temperature.
        update: (TrainState, frozen, batch, encoded, Targets) to (TrainState, metrics); the state is donated.
        init: params to TrainState.
    """

    encode: Callable
    rollout: Callable
    score: Callable
    update: Callable
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
) -> Programs:
    """Return the programs of a run over `mesh`."""
    # A trained encoder is run again with the parameters in question: those of the update, or of the reference.
    reencode = any(name.startswith("encoder.") for name in trainable)
    logprobs = _logprobs_of(definition, objective.temperature, remat=remat, chunk=logprob_chunk, reencode=reencode)

    def encode(params: Params, frozen: Params, batch: Batch):
        return definition.bind(frozen, params).encode(batch.features, batch.lengths)

    def rollout(params, frozen, batch, encoded, keys, *, num_tokens, temperature, top_p):
        model = definition.bind(frozen, params)
        return sample_completions(
            model, batch, encoded, keys, num_tokens=num_tokens, temperature=temperature, top_p=top_p
        )

    def score(params, frozen, batch, encoded, tokens):
        return logprobs(params, frozen, batch, encoded, tokens)[0]

    def piece_loss(params, frozen, batch, encoded, targets, weights, shares):
        logp, entropy = logprobs(params, frozen, batch, encoded, targets.tokens)
        loss, metrics = objective.token_loss(logp, targets)
        drift = jnp.where(targets.mask, jnp.abs(logp - targets.old_logp), 0.0)
        metrics = {**metrics, "entropy": entropy, "logp_drift": drift}
        sums = {name: jnp.sum(shares * value) for name, value in metrics.items()}
        total = jnp.sum(weights * loss)
        return total, (sums | {"loss": total}, {"logp_drift_max": drift.max()})

    def piece_gradient(params, frozen, piece):
        (_, (sums, peaks)), grads = jax.value_and_grad(piece_loss, has_aux=True)(params, frozen, *piece)
        return grads, sums, peaks

    def update(state: TrainState, frozen: Params, batch: Batch, encoded, targets: Targets):
        pieces = _split((batch, encoded, targets, *_weigh(objective, targets.mask, micro_batches)), micro_batches)

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
        metrics = {**sums, **peaks, "grad_norm": norm, "skipped": 1.0 - sound.astype(jnp.float32)}
        return select_tree(sound, new, state), metrics

    rows = batch_sharding(mesh)
    return Programs(
        encode=_on(mesh, jax.jit(encode, out_shardings=rows)),
        rollout=_on(mesh, jax.jit(rollout, static_argnames=("num_tokens", "temperature", "top_p"), out_shardings=rows)),
        score=_on(mesh, jax.jit(score, out_shardings=rows)),
        update=_on(mesh, jax.jit(update, donate_argnums=0)),
        init=lambda params: _initial_state(params, optimiser, mesh),
    )


def _logprobs_of(definition: ModelDef, temperature: float, *, remat: str, chunk: int, reencode: bool) -> Callable:
    """Return the function that scores completions: (log-probs, entropies) [P, G, T]."""

    def logprobs(params, frozen, batch, encoded, tokens):
        model = definition.bind(frozen, params)
        if reencode:
            encoded = model.encode(batch.features, batch.lengths, remat=remat)
        hidden = model.completion_hidden(batch, encoded, tokens, remat=remat)
        return chunked_logprobs(hidden, tokens, model.policy_logits, chunk_tokens=chunk, temperature=temperature)

    return logprobs


def _weigh(objective: Objective, mask, micro_batches: int):
    """Return the loss weights and the plain token shares [P, G, T]; both add up over micro-batches."""
    shares = token_weights(mask, loss_type="dapo")
    if not objective.per_micro_batch or micro_batches == 1:
        return objective.weigh(mask), shares
    weights = jax.vmap(objective.weigh)(_split(mask, micro_batches)) / micro_batches
    return _join(weights), shares


def _split(tree, pieces: int):
    """[P, ...] to [pieces, P / pieces, ...]; rows are dealt out in turn, so each piece stays split over the mesh."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 1, 0), tree)


def _join(x):
    """Undo `_split`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def _on(mesh: Mesh, program: Callable) -> Callable:
    """Run a jitted program with the mesh set, which `model_port.partition.constrain` reads."""

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


def place(tree, mesh: Mesh):
    """Put host arrays (or PRNG keys) whose first axis is prompts on the mesh; every process gives its own rows."""
    rows = batch_sharding(mesh)

    def put(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x)))
        return jax.make_array_from_process_local_data(rows, np.asarray(x))

    return jax.tree.map(put, tree)
