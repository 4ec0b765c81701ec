"""A fresh adapter on a whole model. The adapter itself is model_port.layers.LoRA; loading merges or drops one."""

import dataclasses

from flax import nnx

from model_port.config import LoraConfig
from model_port.errors import UserError
from model_port.layers import Linear, LoRA
from model_port.model import GraniteSpeech


def add_lora(model: GraniteSpeech, config: LoraConfig, *, rngs: nnx.Rngs) -> None:
    """Give a model without an adapter a fresh one; B starts at zero, so nothing changes until it is trained.

    Raises:
        UserError: the model has an adapter already.
    """
    if model.config.lora is not None:
        raise UserError(
            "the model already has an adapter; load it with lora='merge' or 'none' before adding a fresh one"
        )
    for name, linear in _linears(model):
        if name in config.target_modules:
            layers, in_size, out_size = linear.kernel.shape
            adapter = LoRA(
                in_size,
                out_size,
                axes=linear.kernel.get_metadata("axes")[1:],
                rank=config.rank,
                scaling=config.scaling,
                rngs=rngs,
                stack=(layers,),
                dtype=linear.kernel.dtype,
            )
            linear.lora = nnx.data(adapter)
    model.config = dataclasses.replace(model.config, lora=config)


def _linears(model: GraniteSpeech):
    for room in (model.decoder.layers.self_attn, model.decoder.layers.mlp):
        yield from ((name, module) for name, module in vars(room).items() if isinstance(module, Linear))
