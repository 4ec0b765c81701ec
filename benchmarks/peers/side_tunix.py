"""tunix's side of `against_tunix`: rollout and update of its GRPO learner on its Llama, without audio.

Settings: directory with `llama/model.safetensors` and `inputs.npz` (tokens [P, L], completions [P, G, T], advantage
[P, G], ref_logp [P, G, T]), the sizes of the model, samples, new_tokens, dtype, beta and learning_rate.
{"do": "rollout"} samples as its cluster does, {"do": "update"} takes the trainer's compiled step on the completions
given, {"do": "check"} gives the log-probs of these completions before any update.
"""

import hashlib
import importlib.metadata
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.models.llama3 import model as llama3
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.rl import common, rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner, TrainExample
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks.peers.answers import Line, run_side, serve

PACKAGES = ("google-tunix", "jax", "flax", "optax")


class Words:
    """A tokenizer whose words are the numbers of tokens; padding and end lie past the vocabulary."""

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))

    def pad_id(self) -> int:
        return self.vocabulary

    def eos_id(self) -> int:
        return self.vocabulary + 1

    def bos_id(self) -> int:
        return 0  # the sampler puts none in front then


def load_model(settings: dict[str, Any], mesh: jax.sharding.Mesh) -> llama3.Llama3:
    """Return tunix's Llama with the weights given."""
    config = llama3.ModelConfig(**settings["model"], weight_tying=True, remat_config=llama3.RematConfig.NONE)
    directory = str(Path(settings["directory"]) / "llama")
    return create_model_from_safe_tensors(directory, config, mesh, dtype=getattr(jnp, settings["dtype"]))


def make_cluster(settings: dict[str, Any], length: int) -> rl_cluster.RLCluster:
    """Return the cluster of a run, actor and rollout on the same devices, with the learner's loss in its trainer."""
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1, 1), ("fsdp", "tp"))
    model = load_model(settings, mesh)
    new_tokens = settings["new_tokens"]
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(settings["learning_rate"], weight_decay=0.0))
    cluster = rl_cluster.RLCluster(
        actor=model,
        reference=model,
        tokenizer=Words(model.config.vocab_size),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optimiser, eval_every_n_steps=1, max_steps=1, mini_batch_size=1
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=new_tokens,
                max_prompt_length=length,
                kv_cache_size=length + new_tokens,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
            ),
        ),
    )
    algorithm = GRPOConfig(num_generations=settings["samples"], beta=settings["beta"], kl_loss_mode="low_var_kl")
    GRPOLearner(cluster, algorithm, reward_fns=lambda prompts, completions, **columns: [0.0] * len(prompts))
    return cluster


def side(line: Line, settings: dict[str, Any]) -> None:
    """Serve rollouts and updates."""
    with np.load(Path(settings["directory"]) / "inputs.npz") as arrays:
        given = dict(arrays)
    samples, length = settings["samples"], given["tokens"].shape[1]
    cluster = make_cluster(settings, length)
    tokens = np.repeat(given["tokens"], samples, axis=0)
    texts = [" ".join(map(str, row)) for row in tokens.tolist()]
    flat = {name: jnp.asarray(given[name].reshape(len(tokens), -1)) for name in ("completions", "ref_logp")}
    example = TrainExample(
        prompt_ids=jnp.asarray(tokens),
        prompt_mask=jnp.ones(tokens.shape, bool),
        completion_ids=flat["completions"],
        completion_mask=jnp.ones(flat["completions"].shape, bool),
        advantages=jnp.asarray(given["advantage"].reshape(-1)),
        ref_per_token_logps=flat["ref_logp"],
        old_per_token_logps=None,
    )
    train_step, _ = cluster.actor_trainer.jit_train_and_eval_step(cache_nnx_graph=True)

    def rollout() -> dict[str, Any]:
        start = time.perf_counter()
        out = cluster.generate(texts)
        seconds = time.perf_counter() - start
        if {len(row) for row in out.tokens} != {settings["new_tokens"]}:
            raise ValueError(f"tunix sampled {sorted({len(row) for row in out.tokens})} tokens")
        return {"seconds": seconds, "digest": hashlib.sha256(np.stack(out.tokens).tobytes()).hexdigest()}

    def update() -> dict[str, Any]:
        start = time.perf_counter()
        loss, _, norm = jax.block_until_ready(train_step(example))
        return {"seconds": time.perf_counter() - start, "loss": float(loss), "norm": float(norm)}

    def check() -> dict[str, Any]:
        graph, state = cluster.rollout._sampler.model_def_and_state()
        ids = {"pad_id": cluster.rollout.pad_id(), "eos_id": cluster.rollout.eos_id()}
        logps = common.compute_per_token_logps(graph, state, example.prompt_ids, example.completion_ids, **ids)
        return {"logps": np.asarray(logps).tolist()}

    line.answer(versions={name: importlib.metadata.version(name) for name in PACKAGES}, devices=str(jax.devices()))
    serve(line, {"rollout": rollout, "update": update, "check": check})


if __name__ == "__main__":
    run_side(side)
