"""transformers' side of `against_generate`: `generate` with num_return_sequences on an exported Granite Speech.

Settings: directory with `model/` and `inputs.npz` (tokens [P, L], features [P, A, M], audio [P, slots]), samples,
new_tokens, dtype, device, attention and cache. The answer to {"do": "rollout"} has the seconds of a rollout.
"""

import importlib.metadata
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GraniteSpeechForConditionalGeneration
from transformers.utils import logging

from benchmarks.peers.answers import Line, run_side, serve

PACKAGES = ("transformers", "torch", "trl", "accelerate")


def load_model(settings: dict[str, Any]) -> GraniteSpeechForConditionalGeneration:
    """Return the exported model in eval mode."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = GraniteSpeechForConditionalGeneration.from_pretrained(
        Path(settings["directory"]) / "model",
        dtype=getattr(torch, settings["dtype"]),
        attn_implementation=settings["attention"],
    )
    return model.to(settings["device"]).eval()


def load_inputs(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return what `generate` takes, P rows; the features were made ahead of time."""
    with np.load(Path(settings["directory"]) / "inputs.npz") as arrays:
        inputs = {
            "input_ids": torch.from_numpy(arrays["tokens"]).long(),
            "input_features": torch.from_numpy(arrays["features"]).to(getattr(torch, settings["dtype"])),
            "input_features_mask": torch.from_numpy(arrays["audio"]),
        }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return {name: value.to(settings["device"]) for name, value in inputs.items()}


def divide_logits(model: torch.nn.Module) -> None:
    """Divide what the head gives by `logits_scaling`, which this release of transformers does not do."""
    scaling = model.config.text_config.logits_scaling
    if scaling != 1:
        model.lm_head.register_forward_hook(lambda module, inputs, output: output / scaling)


def versions() -> dict[str, str]:
    """Return the versions of what computes here."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def wait(device: str) -> None:
    """Wait until the device has done everything."""
    if device == "cuda":
        torch.cuda.synchronize()


def side(line: Line, settings: dict[str, Any]) -> None:
    """Serve rollouts; no token ends a sequence and none is truncated away, so each has `new_tokens` tokens."""
    model, inputs = load_model(settings), load_inputs(settings)
    divide_logits(model)
    sampling = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    model.generation_config.eos_token_id = None
    if settings["cache"] != "dynamic":
        sampling["cache_implementation"] = settings["cache"]
    sampling |= {"num_return_sequences": settings["samples"], "max_new_tokens": settings["new_tokens"]}
    torch.manual_seed(0)

    def rollout() -> dict[str, Any]:
        wait(settings["device"])
        start = time.perf_counter()
        with torch.inference_mode():
            tokens = model.generate(**inputs, **sampling)
        tokens = tokens[:, inputs["input_ids"].shape[1] :].cpu()
        seconds = time.perf_counter() - start
        rows = inputs["input_ids"].shape[0] * settings["samples"]
        if tokens.shape != (rows, settings["new_tokens"]):
            raise ValueError(f"generate gave tokens of shape {tuple(tokens.shape)}")
        return {"seconds": seconds}

    line.answer(versions=versions(), threads=torch.get_num_threads())
    serve(line, {"rollout": rollout})


if __name__ == "__main__":
    run_side(side)
