"""granite-speech-3.2-8b came with code of its own: other tensor names in the encoder, another config.json.

The names are spelled out here as that code builds them, independently of the table in model_port.weights.names.
"""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.weights.convert import convert, export, load_model, model_arrays
from tests.hf_tiny import load_hf_dir, make_hf_model, save_hf_dir

TINY = GraniteSpeechConfig.tiny()
# The remote code never says max_pos_emb: it is 512.
CONFIG = dataclasses.replace(TINY, encoder=dataclasses.replace(TINY.encoder, max_pos_emb=512))

BLOCK = {
    "ff1.pre_norm": "ff1.fn.norm",
    "ff1.up_proj": "ff1.fn.fn.net.0",
    "ff1.down_proj": "ff1.fn.fn.net.3",
    "attn.pre_norm": "attn.norm",
    "attn.to_q": "attn.fn.to_q",
    "attn.to_kv": "attn.fn.to_kv",
    "attn.to_out": "attn.fn.to_out",
    "attn.rel_pos_emb": "attn.fn.rel_pos_emb",
    "conv.norm": "conv.net.0",
    "conv.up_conv": "conv.net.2",
    "conv.depth_conv.conv": "conv.net.4.conv",
    "conv.batch_norm": "conv.net.5",
    "conv.down_conv": "conv.net.7",
    "ff2.pre_norm": "ff2.fn.norm",
    "ff2.up_proj": "ff2.fn.fn.net.0",
    "ff2.down_proj": "ff2.fn.fn.net.3",
    "post_norm": "post_norm",
}


def remote_name(name):
    """What a tensor of the published layout is called in granite-speech-3.2-8b."""
    if name.startswith("encoder.input_linear."):
        return name.replace("input_linear", "rnn_tr.0")
    if not name.startswith("encoder.layers."):
        return name
    layer, module = name.removeprefix("encoder.layers.").split(".", 1)
    module, leaf = module.rsplit(".", 1)
    return f"encoder.rnn_tr.{int(layer) + 1}.{BLOCK[module]}.{leaf}"


@pytest.fixture(scope="module")
def reference():
    return make_hf_model(CONFIG, seed=3)


@pytest.fixture(scope="module")
def published(reference, tmp_path_factory):
    return save_hf_dir(reference, tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def remote(published, tmp_path_factory):
    directory = tmp_path_factory.mktemp("remote") / "model"
    shutil.copytree(published, directory)
    tensors = load_file(published / "model.safetensors")
    save_file({remote_name(name): tensor for name, tensor in tensors.items()}, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    projector = config["projector_config"] | {name: config.pop(name) for name in ("window_size", "downsample_rate")}
    projector |= {"model_type": "granite_speech_qformer", "llm_dim": CONFIG.decoder.hidden_size}
    del config["encoder_config"]["max_pos_emb"], projector["cross_attention_frequency"]
    config |= {"projector_config": projector, "auto_map": {"AutoConfig": "configuration_granite_speech.Some"}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_it_reads_as_the_same_model(published, remote):
    ours, theirs = load_model(remote), load_model(published)
    assert ours.config == theirs.config == CONFIG
    expected = model_arrays(theirs)
    for name, array in model_arrays(ours).items():
        assert jnp.array_equal(array, expected[name]), name


def test_it_leaves_as_a_model_that_transformers_loads(published, remote, reference, tmp_path):
    convert(remote, tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back")
    back, source = (load_file(directory / "model.safetensors") for directory in (tmp_path / "back", published))
    assert back.keys() == source.keys()
    assert all(back[name].tobytes() == source[name].tobytes() for name in source)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["projector_config"]["model_type"] == "blip_2_qformer" and "auto_map" not in config
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        np.testing.assert_array_equal(
            load_hf_dir(tmp_path / "back")(input_ids=tokens).logits, reference(input_ids=tokens).logits
        )


def test_a_projector_for_another_decoder_is_refused(remote, tmp_path):
    shutil.copytree(remote, tmp_path / "wrong")
    config = json.loads((remote / "config.json").read_text())
    config["projector_config"]["llm_dim"] = 4096
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="llm_dim is 4096; it must be text_config.hidden_size 32"):
        load_model(tmp_path / "wrong")
