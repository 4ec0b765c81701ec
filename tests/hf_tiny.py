"""Small random reference models in torch, and the ways in which transformers and PEFT have stored them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig as PeftConfig
from safetensors.torch import save_file

from model_port.config import GraniteSpeechConfig
from model_port.libraries import quiet

CLASSES = {
    "granite_speech": (transformers.GraniteSpeechConfig, transformers.GraniteSpeechForConditionalGeneration),
    "granite_speech_plus": (
        transformers.GraniteSpeechPlusConfig,
        transformers.GraniteSpeechPlusForConditionalGeneration,
    ),
}

# What an adapter file's keys begin with: IBM's published files, transformers 4.52 to 4.57, transformers 5.
ADAPTER_PREFIXES = {
    "published": "language_model.model.",
    "4.x": "base_model.model.language_model.model.",
    "5.x": "base_model.model.model.language_model.",
}


def make_hf_model(config: GraniteSpeechConfig, seed: int = 0) -> torch.nn.Module:
    """Build the transformers model of `config`, in eval mode; with `config.lora` a PEFT adapter is on.

    Every parameter and BatchNorm statistic is random, the adapter's B included, so that none can be left out or
    confused with another unnoticed. transformers 5.10 to 5.23 do not divide logits by logits_scaling.
    """
    values, adapter = config.to_hf()
    config_class, model_class = CLASSES[values["model_type"]]
    model = model_class(config_class(**values)).eval()
    if adapter is not None:
        keys = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "task_type")
        # PEFT would adapt the encoder's feed-forward layers, too, where their names end alike.
        exclude = r".*encoder\..*" if set(adapter["target_modules"]) & {"up_proj", "down_proj"} else None
        model.add_adapter(PeftConfig(**{key: adapter[key] for key in keys}, exclude_modules=exclude))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _randomise(name, tensor, generator)
    return model


def save_hf_dir(
    model: torch.nn.Module,
    path: str | Path,
    *,
    adapter: str | None = "published",
    tokenizer: Any = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a model as published: legacy tensor names, the adapter apart, under one of ADAPTER_PREFIXES or left out.

    transformers 5 damages a model that it saves with its adapter loaded, so the base is written from a model without.
    """
    path = Path(path)
    config = type(model.config)(**model.config.to_dict())
    base = type(model)(config).to(model.dtype)
    base.load_state_dict(base_state(model))
    base.config.has_lora_adapter = bool(adapter) and has_adapter(model)
    with quiet("transformers"):
        base.save_pretrained(path, max_shard_size=max_shard_size)
        if base.config.has_lora_adapter:
            peft_config = dataclasses.replace(model.peft_config["default"], inference_mode=True)
            peft_config.save_pretrained(path)
            save_file(adapter_state(model, adapter), path / "adapter_model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
    return path


def load_hf_dir(path: str | Path) -> torch.nn.Module:
    """Load a directory with transformers, in eval mode; anything missing, unexpected or misshapen fails the test."""
    kind = json.loads((Path(path) / "config.json").read_text())["model_type"]
    with quiet("transformers"):
        model, report = CLASSES[kind][1].from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether a PEFT adapter is attached."""
    return any(".lora_" in name for name, _ in model.named_parameters())


def base_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict that the model would have without its adapter."""
    state = model.state_dict()
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def adapter_state(model: torch.nn.Module, style: str) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors as an adapter file of `style` names them."""
    return {
        ADAPTER_PREFIXES[style] + name.removeprefix("model.language_model.").replace(".default", ""): value.contiguous()
        for name, value in model.state_dict().items()
        if ".lora_" in name
    }


def _randomise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    if name.endswith("running_var"):
        tensor.uniform_(0.5, 2.0, generator=generator)
    elif "norm" in name.lower() and name.endswith("weight"):
        tensor.normal_(1.0, 0.2, generator=generator)
    elif name.endswith(("bias", "running_mean")):
        tensor.normal_(0.0, 0.2, generator=generator)
    elif name.endswith(("weight", "query")):
        tensor.normal_(0.0, 0.1 if tensor.ndim < 2 else tensor.shape[1] ** -0.5, generator=generator)
