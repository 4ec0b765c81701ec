# SPDX-License-Identifier: Apache-2.0
"""What the PyTorch reference computes, stage by stage. The one module of the packages that needs torch, when called."""

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from model_port.config import GraniteSpeechConfig
from model_port.features import SAMPLE_RATE
from model_port.libraries import quiet
from model_port.weights import hf_files, names
from model_port.weights.config_files import ADAPTER_CONFIG, read_json, to_json
from model_port.weights.lazy import cast


@dataclass(frozen=True)
class Inputs:
    """One prompt with one clip.

    Attributes:
        wave: float32 samples at 16 kHz.
        features: [A, M], of which both sides compute.
        tokens: ids of the prompt, one audio token per embedding.
    """

    wave: np.ndarray
    features: np.ndarray
    tokens: np.ndarray


@dataclass
class Outputs:
    """What a model makes of `Inputs`, float32; an empty entry of `missing` says why a stage is absent.

    Attributes:
        stages: the arrays by name of the stage, in order.
        tokens: ids of the greedy completion.
        missing: {stage: why it was not computed}.
        remarks: what was done to make the reference comparable.
    """

    stages: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: list[int] | None = None
    missing: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def unavailable(config: GraniteSpeechConfig) -> str | None:
    """Say why the reference cannot run here, or return None."""
    for package in ("torch", "transformers", *(("peft",) if config.lora else ())):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed{', and the model has a LoRA adapter' if package == 'peft' else ''}"
    import transformers

    if not hasattr(transformers, _class_name(config)):
        return f"transformers {transformers.__version__} has no {_class_name(config)}"
    return None


def run_reference(
    src: str | os.PathLike,
    inputs: Inputs,
    config: GraniteSpeechConfig,
    *,
    lora: str,
    dtypes: Mapping[str, np.dtype],
    dtype: str,
    max_new_tokens: int,
) -> Outputs:
    """Load `src` with transformers and run it.

    Args:
        config: of `src`.
        lora: `keep` the adapter, `merge` it into the kernels, or `none`: without it.
        dtypes: of the checkpoint's arrays, by dotted path: the reference's weights are rounded to these.
        dtype: of the computation.
    """
    import torch

    out = Outputs()
    features = _features(inputs.wave)
    if isinstance(features, str):
        out.missing["features"] = features
    else:
        out.stages["features"] = features
    with _quiet(), torch.no_grad():
        model, wrong = _load(src, config, dtype if lora == "keep" else "float32")
        if wrong:
            out.missing["model"] = wrong
            return out
        if lora != "keep":
            _fold(model, keep=lora == "merge")
        _round(model, dtypes)
        model.to(getattr(torch, dtype))
        _run_stages(model, inputs, config, out)
        out.tokens = _greedy(model, inputs, config, max_new_tokens)
    return out


def _class_name(config: GraniteSpeechConfig) -> str:
    return f"GraniteSpeech{'Plus' if config.encoder.cat_hidden_layers else ''}ForConditionalGeneration"


def _features(wave: np.ndarray) -> np.ndarray | str:
    """Return the reference's features, or why there are none: its front end needs torchaudio, a broken one raises."""
    try:
        import torchaudio  # noqa: F401 (transformers looks for it when it is loaded, this asks whether it works now)
        from transformers import GraniteSpeechFeatureExtractor

        extractor = GraniteSpeechFeatureExtractor(sampling_rate=SAMPLE_RATE)
    except (ImportError, OSError, RuntimeError) as error:
        installed = importlib.util.find_spec("torchaudio") is not None
        return f"torchaudio cannot be used ({error})" if installed else "torchaudio is not installed"
    return extractor(wave)["input_features"][0].numpy()


def _load(src: str | os.PathLike, config: GraniteSpeechConfig, dtype: str) -> tuple[Any, str | None]:
    """Return the model in eval mode; and, if it has other weights than the files hold, what to say of that."""
    import torch
    import transformers

    with _its_own_base(src) as directory:
        model = getattr(transformers, _class_name(config)).from_pretrained(
            directory, dtype=getattr(torch, dtype), local_files_only=True
        )
        model = model.to(getattr(torch, dtype)).eval()
    wrong = sorted(_unlike_the_files(model, hf_files.survey(src, adapter=config.lora is not None).found, dtype))
    if not wrong:
        return model, None
    more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
    return model, (
        f"transformers {transformers.__version__} does not load what the files hold ({', '.join(wrong[:2])}{more}); "
        "compare with what `model-port export` makes of it"
    )


@contextlib.contextmanager
def _its_own_base(src: str | os.PathLike) -> Iterator[str]:
    """Yield a directory of links to the files of `src`, with an adapter that names this directory as its base.

    transformers 4 loads the base of a directory with an adapter from wherever adapter_config.json says it once was.
    """
    with tempfile.TemporaryDirectory() as directory:
        links = Path(directory)
        for file in Path(src).iterdir():
            (links / file.name).symlink_to(file.resolve())
        adapter = links / ADAPTER_CONFIG
        if adapter.exists():
            values = {**read_json(epath.Path(adapter)), "base_model_name_or_path": directory}
            adapter.unlink()
            adapter.write_bytes(to_json(values))
        yield directory


def _unlike_the_files(model: Any, found: Mapping[hf_files.Slot, hf_files.Stored], dtype: str) -> Iterator[str]:
    """Yield the names of weights that transformers left at random, altered or did not use: its own report is not whole.

    Of a model with an adapter it tells about the adapter alone.
    """
    unused = dict(found)
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        name = names.normalise(key)
        row = names.lookup(name) if name else None
        if row is None:
            continue
        stored = unused.pop((row[0].path, row[1]), None)
        if stored is None or not np.array_equal(
            cast(stored.read(), np.dtype(dtype), key).astype(np.float32), tensor.float().numpy()
        ):
            yield str(name)
    yield from (names.BY_PATH[path].name.format(l=layer) for path, layer in unused)


def _fold(model: Any, *, keep: bool) -> None:
    """Add the adapter to the weights it sits on if `keep`, and switch it off in any case."""
    for module in model.modules():
        if hasattr(module, "get_delta_weight"):
            for name, up in module.lora_B.items():
                if keep:
                    module.base_layer.weight += module.get_delta_weight(name)
                up.weight.zero_()


def _round(model: Any, dtypes: Mapping[str, np.dtype]) -> None:
    """Round every weight to the dtype that the checkpoint stores it in."""
    import torch

    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        name = names.normalise(key)
        row = names.lookup(name) if name else None
        dtype = dtypes.get(row[0].path) if row else None
        if dtype is not None and dtype != np.float32:
            tensor.copy_(tensor.to(getattr(torch, dtype.name)))


def _run_stages(model: Any, inputs: Inputs, config: GraniteSpeechConfig, out: Outputs) -> None:
    """Run the prompt once and note what goes out of the encoder, the projector and the head."""
    import torch

    inner = model.model if hasattr(getattr(model, "model", None), "encoder") else model
    head = model.get_output_embeddings()
    seen: dict[str, Any] = {}
    hooks = [
        module.register_forward_hook(lambda module, given, result, name=name: seen.update({name: result}))
        for name, module in (("encoder", inner.encoder), ("projector", inner.projector), ("head", head))
    ]
    try:
        tokens, features = _tensors(inputs, model)
        logits = model(input_ids=tokens, input_features=features).logits[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    scaling = config.decoder.logits_scaling
    if scaling != 1 and torch.equal(logits, seen["head"][0].float()):
        import transformers

        logits = logits / scaling
        out.remarks.append(
            f"transformers {transformers.__version__} leaves out logits_scaling: its logits are divided by {scaling:g}"
        )
    encoded = getattr(seen["encoder"], "last_hidden_state", seen["encoder"])
    out.stages["encoder"] = encoded[0].float().numpy()
    out.stages["projector"] = seen["projector"].flatten(0, -2).float().numpy()
    out.stages["logits"] = logits.numpy()


def _greedy(model: Any, inputs: Inputs, config: GraniteSpeechConfig, max_new_tokens: int) -> list[int]:
    """Return the greedy completion, up to and including an end token; `<|audio|>` is never written."""
    import torch

    tokens, features = _tensors(inputs, model)
    out = model.generate(
        tokens,
        input_features=features,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        suppress_tokens=[config.audio_token_id],
        eos_token_id=list(config.eos_token_ids),
        pad_token_id=config.pad_token_id,
    )
    return out[0, tokens.shape[1] :].tolist()


def _tensors(inputs: Inputs, model: Any) -> tuple[Any, Any]:
    import torch

    return torch.from_numpy(inputs.tokens)[None].long(), torch.from_numpy(inputs.features)[None].to(model.dtype)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from its advice and its progress bars."""
    from transformers.utils import logging as theirs

    bars = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        with quiet("transformers"):
            yield
    finally:
        if bars:
            theirs.enable_progress_bar()
