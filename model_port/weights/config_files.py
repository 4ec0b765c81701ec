# SPDX-License-Identifier: Apache-2.0
"""The small files beside the weights: config.json, adapter_config.json, tokenizer and processor files."""

import dataclasses
import json
import logging
import os
from typing import Any

from etils import epath

from model_port.config import GraniteSpeechConfig, native
from model_port.errors import UserError

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"

COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.*",
    "generation_config.json",
)

# PEFT matches module names by their ends, and the encoder's feed-forward layers end in up_proj and down_proj, too.
DECODER_ONLY = r".*encoder\..*"

# Settings of PEFT that change what an adapter computes beyond rank, alpha and target modules.
ADAPTER_EXTRAS = (
    "alpha_pattern",
    "rank_pattern",
    "layers_to_transform",
    "layer_replication",
    "modules_to_save",
    "exclude_modules",
    "target_parameters",
    "trainable_token_indices",
    "lora_bias",
    "fan_in_fan_out",
)


def read_config(path: str | os.PathLike, *, adapter: bool = True) -> GraniteSpeechConfig:
    """Read the config of a model directory; with `adapter=False` as if it had no LoRA adapter.

    Raises:
        UserError: a file is absent or not JSON, or it asks for something that this implementation does not compute.
    """
    path = epath.Path(path)
    if not (path / CONFIG).exists():
        raise UserError(f"{path} has no {CONFIG}; give the directory of a Granite Speech model")
    config = read_json(path / CONFIG)
    has_adapter = adapter and (path / ADAPTER_CONFIG).exists()
    if adapter and not has_adapter and config.get("has_lora_adapter"):
        logging.getLogger(__name__).warning(
            "%s/%s says has_lora_adapter, but there is no %s: the model is used without an adapter",
            path,
            CONFIG,
            ADAPTER_CONFIG,
        )
    lora = _read_adapter_config(path / ADAPTER_CONFIG) if has_adapter else None
    try:
        return GraniteSpeechConfig.from_hf(config, lora)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def write_config_files(
    out: epath.Path,
    config: GraniteSpeechConfig,
    *,
    source_dir: str | os.PathLike | None,
    dtype: str | None = None,
) -> None:
    """Write config.json, adapter_config.json and the tokenizer and processor files of `source_dir` into `out`.

    The source's files are copied byte for byte as long as they describe `config`; where they do not, the entries
    that differ are updated.

    Args:
        dtype: if given, the parameter dtype that config.json has to name: transformers casts to it on loading.
    """
    source = None if source_dir is None else epath.Path(source_dir)
    for name, content in _config_files(config, source, dtype).items():
        (out / name).write_bytes(content)
    for pattern in COPIED if source is not None else ():
        for file in source.glob(pattern):
            if file.is_file():
                (out / file.name).write_bytes(file.read_bytes())


def read_json(file: epath.Path) -> dict[str, Any]:
    """Parse a JSON object; a UserError names the file that is not one."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a {type(value).__name__}, not a JSON object")
    return value


def to_json(value: dict[str, Any]) -> bytes:
    """Serialise as Hugging Face does: two spaces of indent and a final newline."""
    return (json.dumps(value, indent=2) + "\n").encode()


def _read_adapter_config(file: epath.Path) -> dict[str, Any]:
    adapter = read_json(file)
    if adapter.get("exclude_modules") == DECODER_ONLY:
        adapter["exclude_modules"] = None
    extras = {name: adapter[name] for name in ADAPTER_EXTRAS if adapter.get(name)}
    if extras:
        raise UserError(f"{file} sets {extras}; only adapters of one rank and alpha on all layers are supported")
    return adapter


def _config_files(config: GraniteSpeechConfig, source: epath.Path | None, dtype: str | None) -> dict[str, bytes]:
    """Contents of config.json and, with LoRA, adapter_config.json."""
    ours, our_adapter = config.to_hf()
    files = {CONFIG: to_json({**ours, "torch_dtype": dtype} if dtype else ours)}
    if our_adapter is not None:
        files[ADAPTER_CONFIG] = to_json({**our_adapter, "exclude_modules": DECODER_ONLY})
    if source is None or not (source / CONFIG).exists():
        return files
    if config.lora is not None and (source / ADAPTER_CONFIG).exists() and read_config(source).lora == config.lora:
        files[ADAPTER_CONFIG] = (source / ADAPTER_CONFIG).read_bytes()
    theirs = read_json(source / CONFIG)
    updated = _update(native(theirs), config, dtype)
    if updated == theirs:
        files[CONFIG] = (source / CONFIG).read_bytes()
    elif GraniteSpeechConfig.from_hf(updated, our_adapter) == config:
        files[CONFIG] = to_json(updated)
    return files


def _update(theirs: dict[str, Any], config: GraniteSpeechConfig, dtype: str | None) -> dict[str, Any]:
    """Return config.json with the entries changed that adapters, tied heads and casts make untrue."""
    updated = {**theirs}
    if theirs.get("has_lora_adapter", True) != (config.lora is not None):
        updated["has_lora_adapter"] = config.lora is not None
    without_lora = dataclasses.replace(config, lora=None)
    if GraniteSpeechConfig.from_hf(theirs) != without_lora:
        updated["tie_word_embeddings"] = config.tie_word_embeddings
        updated["text_config"] = {**theirs["text_config"], "tie_word_embeddings": config.tie_word_embeddings}
    parts = {name: part for name, part in updated.items() if isinstance(part, dict)}
    for name, part in {None: updated, **parts}.items():
        changed = {key: dtype for key in ("torch_dtype", "dtype") if dtype and part.get(key, dtype) != dtype}
        if name is None:
            updated = {**updated, **changed}
        elif changed:
            updated[name] = {**part, **changed}
    return updated
