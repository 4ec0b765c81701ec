"""A workload without audio, whose decoder is a Llama: what systems without audio can do, too."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.workload import UNLIMITED, Size, Workload, model_config, random_params, run_config
from jgrpo.config import OptimiserOptions
from jgrpo.planning.arrays import run_arrays
from jgrpo.planning.programs import abstract_run
from jgrpo.runtime.rows import place
from model_port.batch import Batch
from model_port.config import GraniteSpeechConfig
from model_port.partition import make_mesh

ROPE_THETA = 1e6  # tunix 0.1.7 rotates its Llama by this base, whatever the config says
INNER = "language_model."  # in front of the decoder's tensors in a Hugging Face directory


def llama_config(name: str) -> GraniteSpeechConfig:
    """Return a model whose multipliers make its decoder a Llama with tied embeddings, without adapter."""
    config = model_config(name)
    plain = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0, "rope_theta": ROPE_THETA}
    decoder = dataclasses.replace(config.decoder, attention_multiplier=config.decoder.head_dim**-0.5, **plain)
    return dataclasses.replace(config, decoder=decoder, lora=None, tie_word_embeddings=True)


class TextWorkload(Workload):
    """A step on prompts without clips, which trains the whole decoder; see Workload."""

    def __init__(self, size: Size, *, beta: float, learning_rate: float):
        self.size, self.options = size, {}
        config = run_config(
            size,
            model={"trainable": ("decoder",)},
            grpo={"beta": beta},
            optimiser=OptimiserOptions(learning_rate=learning_rate, warmup_fraction=0.0, schedule="constant"),
        )
        self.run = abstract_run(run_arrays(config, llama_config(size.model), make_mesh(config.mesh)), memory=UNLIMITED)
        self.params = random_params(self.run)
        trained = self.run.ref_params
        self.frozen = {name: value for name, value in self.params.items() if name not in trained}
        copies = {name: jnp.array(self.params[name], jnp.float32, copy=True) for name in trained}
        self.state = self.run.programs.init(copies)
        self.batch = place(text_batch(self.run.model, size), self.run.mesh)
        self.encoded = self.encode()

    def export_llama(self, directory: Path) -> None:
        """Write the decoder's weights under Llama's names as `directory`/llama/model.safetensors."""
        self.export(directory / "model")
        tensors = load_file(directory / "model" / "model.safetensors")
        (directory / "llama").mkdir()
        llama = {name.removeprefix(INNER): value for name, value in tensors.items() if name.startswith(INNER)}
        save_file(llama, directory / "llama" / "model.safetensors")


def text_batch(model: GraniteSpeechConfig, size: Size) -> Batch:
    """Return prompts of random tokens and no clips."""
    shape = (size.prompts, size.text_tokens)
    tokens = np.random.default_rng(2).integers(1, model.audio_token_id, shape).astype(np.int32)
    return Batch(
        tokens=tokens,
        mask=np.ones(shape, bool),
        audio_slots=np.full(shape, -1, np.int32),
        features=np.zeros((size.prompts, 0, model.projector.window_size, model.encoder.input_dim), np.float32),
        lengths=np.zeros((size.prompts, 0), np.int32),
    )
