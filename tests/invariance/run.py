"""The programs of one step on a tiny policy, laid out over a mesh as a run lays it out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jgrpo.config import GRPOOptions
from jgrpo.core.tree import holds, pack, smallest, sort_rows
from jgrpo.programs.steps import Targets, grpo_objective, make_programs
from jgrpo.rollout.scoring import step_keys
from jgrpo.runtime.rows import place
from model_port.params import select, split_model
from model_port.partition import MeshConfig, make_mesh, param_shardings
from model_port.weights.tree import abstract_model
from tests.invariance.tiny import CONFIG, PROMPTS, G, T, make_batch, make_params

TEMPERATURE, BETA = 0.8, 0.1
OBJECTIVE = grpo_objective(GRPOOptions(num_samples=G, temperature=TEMPERATURE, beta=BETA), T)
TRAINABLE = ("projector", "lora", "decoder.layers.mlp.gate_proj.kernel")


def keep_gradient():
    """An optimiser that leaves the parameters alone and keeps the gradient as its state."""
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    )


class Run:
    """A tiny policy on a mesh, with its programs and a batch; arrays given to a method replace those."""

    def __init__(
        self, config=CONFIG, *, mesh=(1, 1, 1), model=None, trainable=TRAINABLE, optimiser=None, batch=None, **options
    ):
        self.config, self.mesh = config, make_mesh(MeshConfig(*mesh))
        self.batch = make_batch(config, PROMPTS) if batch is None else batch
        self.definition, params = make_params(config) if model is None else split_model(model)
        shardings = param_shardings(nnx.state(abstract_model(self.definition.skeleton().config)), self.mesh)
        params = {name: jax.device_put(value, shardings[name]) for name, value in params.items()}
        chosen = select(self.definition, trainable)
        self.trained = {name: params.pop(name) for name in chosen}
        self.frozen = params
        self.programs = make_programs(
            self.definition,
            mesh=self.mesh,
            optimiser=optimiser or keep_gradient(),
            trainable=chosen,
            **{"objective": OBJECTIVE, **options},
        )

    def encode(self, batch=None):
        return self.programs.encode(self.trained, self.frozen, place(batch or self.batch, self.mesh))

    def rollout(self, batch=None, *, keys=None, step=0, temperature=TEMPERATURE, **truncation):
        batch = batch or self.batch
        keys = step_keys(0, step, num_prompts=len(batch.tokens), num_samples=G) if keys is None else keys
        sampling = {"num_tokens": T, "temperature": temperature, **truncation}
        arrays = place(batch, self.mesh), self.encode(batch), place(keys, self.mesh)
        return self.programs.rollout(*self.programs.layout(self.trained, self.frozen), *arrays, **sampling)

    def compiled_rollout(self):
        """Return the completions of `rollout`, and its compiled program as text."""
        keys = step_keys(0, 0, num_prompts=len(self.batch.tokens), num_samples=G)
        arrays = place(self.batch, self.mesh), self.encode(), place(keys, self.mesh)
        params = self.programs.layout(self.trained, self.frozen)
        with jax.set_mesh(self.mesh):
            program = self.programs.rollout.__wrapped__
            compiled = program.lower(*params, *arrays, num_tokens=T, temperature=TEMPERATURE).compile()
            return jax.device_get(compiled(*params, *arrays)), compiled.as_text()

    def score(self, tokens, batch=None, *, encoded=None, **packing):
        """Return log-probs of all tokens [P, G, T], those after the end too; see `make_trees`."""
        encoded = self.encode(batch) if encoded is None else encoded
        arrays = place(batch or self.batch, self.mesh), encoded, place(make_trees(tokens, **packing), self.mesh)
        return np.asarray(self.programs.score(self.trained, self.frozen, *arrays))

    def update(self, targets, batch=None, *, encoded=None, state=None):
        """Return (new state, metrics); with the default optimiser the new optimiser state is the gradient."""
        state = state or self.programs.init(jax.tree.map(lambda leaf: leaf.copy(), self.trained))
        encoded = self.encode(batch) if encoded is None else encoded
        arrays = place(batch or self.batch, self.mesh), encoded, place(targets, self.mesh)
        return jax.device_get(self.programs.update(state, self.frozen, *arrays))

    def gradient(self, targets, batch=None, **options):
        """Return {name: gradient} and the metrics of an update."""
        state, metrics = self.update(targets, batch, **options)
        return state.opt_state, metrics


def make_trees(tokens, mask=None, *, layout=None, share=True):
    """Completions as prefix trees, in the smallest layout that holds them if no other is asked for."""
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    rows, (_, samples, length) = sort_rows(tokens, mask, share=share), tokens.shape
    choices = [(1, 8), (1, 16), (2, 8), (samples, max(length - 1, 1))]
    return pack(rows, layout or smallest(holds(rows, choices), choices))


def make_targets(out, *, tokens=None, layout=None, share=True, **changes):
    """Targets with random advantages whose old and reference log-probs are near the policy's, some ratios clipped."""
    rng = np.random.default_rng(11)
    names = ("old_logp", "ref_logp")
    near = {name: (out.logp + rng.normal(0, 0.2, out.logp.shape)).astype(np.float32) for name in names}
    advantage = rng.normal(size=out.mask.shape[:2]).astype(np.float32)
    trees = make_trees(out.tokens if tokens is None else tokens, out.mask, layout=layout, share=share)
    return dataclasses.replace(Targets(trees=trees, mask=out.mask, advantage=advantage, **near), **changes)


def gradient_error(ours, theirs):
    """Return (the largest difference in any parameter as a share of its largest component, the parameter's name)."""
    assert ours.keys() == theirs.keys()
    return max((_relative(name, ours, theirs), name) for name in theirs)


def _relative(name, ours, theirs):
    # A key bias adds the same to all scores of a query: its gradient is zero but for rounding.
    scale = np.abs(theirs[name.replace("key.bias", "query.bias")]).max()
    assert scale > 1e-4, f"{name} has no gradient to compare"
    return float(np.abs(np.asarray(ours[name]) - np.asarray(theirs[name])).max() / scale)
