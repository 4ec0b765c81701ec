"""The whole way: transformers -> load_model -> Orbax -> transformers, with adapters kept, merged and dropped."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

from model_port import cli
from model_port.batch import Batch
from model_port.config import LORA_TARGETS, GraniteSpeechConfig, LoraConfig
from model_port.errors import UserError
from model_port.partition import MeshConfig, make_mesh, param_shardings
from model_port.published import PUBLISHED
from model_port.weights import names, tree
from model_port.weights.convert import (
    build_model,
    convert,
    export,
    load_model,
    merge,
    model_arrays,
    open_model,
    save_model,
)
from model_port.weights.hf_writer import write_hf
from tests.hf_tiny import load_hf_dir, make_hf_model, save_hf_dir

TINY = GraniteSpeechConfig.tiny()
VARIANTS = {
    "lora": TINY,
    "all-linear lora": dataclasses.replace(TINY, lora=LoraConfig(rank=4, target_modules=LORA_TARGETS)),
    "untied": dataclasses.replace(TINY, lora=None, tie_word_embeddings=False),
    "plus": dataclasses.replace(
        TINY,
        encoder=dataclasses.replace(TINY.encoder, cat_hidden_layers=(1,)),
        projector=dataclasses.replace(TINY.projector, encoder_hidden_size=64),
        lora=None,
    ),
}
FRAMES, SLOTS = 32, 9


@pytest.fixture(scope="module")
def model():
    return make_hf_model(TINY)


@pytest.fixture(scope="module")
def published(model, tmp_path_factory):
    directory = save_hf_dir(model, tmp_path_factory.mktemp("published"))
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def checkpoint(published, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(published, out)
    return out


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        one, other = np.asarray(ours[name]), np.asarray(theirs[name])
        assert one.dtype == other.dtype, name
        assert one.tobytes() == other.tobytes(), name


def hf_logits(model):
    """Logits of one audio prompt, divided by logits_scaling as the reference forgets to."""
    tokens, features = prompt()
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens), input_features=torch.tensor(features))
    return out.logits.numpy() / TINY.decoder.logits_scaling


def our_logits(model):
    tokens, features = prompt()
    slots = np.where(tokens == TINY.audio_token_id, np.cumsum(tokens == TINY.audio_token_id, axis=1) - 1, -1)
    batch = Batch(
        tokens=jnp.asarray(tokens),
        mask=jnp.ones(tokens.shape, bool),
        audio_slots=jnp.asarray(slots, jnp.int32),
        features=jnp.asarray(features[:, None]),
        lengths=jnp.full((1, 1), FRAMES, jnp.int32),
    )
    return np.asarray(model(batch))


def prompt():
    tokens = np.array([[5, *[TINY.audio_token_id] * SLOTS, 17, 3, 99]], np.int32)
    return tokens, np.random.default_rng(0).normal(size=(1, FRAMES, 160)).astype(np.float32)


# ---- there and back


def shrunk(config):
    """A member of the family with its depths, heads, ties, adapter and special tokens, but narrow."""
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    plus = bool(config.encoder.cat_hidden_layers)
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, hidden_dim=16, num_heads=2, dim_head=8, feedforward_mult=2),
        projector=dataclasses.replace(config.projector, **small, encoder_hidden_size=32 if plus else 16),
        decoder=dataclasses.replace(config.decoder, **small, num_key_value_heads=1),
        lora=config.lora and dataclasses.replace(config.lora, rank=3),
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_member_of_the_family_comes_back_bit_by_bit(tmp_path, name):
    config = shrunk(PUBLISHED[name])
    random = np.random.default_rng(0)
    arrays = {
        path: random.normal(size=shape).astype(np.float32).astype(jnp.bfloat16)
        for path, shape in tree.shapes(config).items()
    }
    write_hf(tmp_path / "source", config, arrays, max_shard_bytes=10**6)
    convert(tmp_path / "source", tmp_path / "orbax")
    assert_equal(model_arrays(load_model(tmp_path / "orbax", dtype="bfloat16")), arrays)
    export(tmp_path / "orbax", tmp_path / "back", max_shard_bytes=10**6)
    source, back = ({file.name: file.read_bytes() for file in (tmp_path / d).iterdir()} for d in ("source", "back"))
    assert back == source
    assert ("adapter_model.safetensors" in back) == (config.lora is not None)
    assert len(back) > 4


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_through_orbax_is_bit_equal_and_loads_in_transformers(tmp_path, config, dtype):
    reference = make_hf_model(config, seed=2).to(getattr(torch, dtype))
    source = save_hf_dir(reference, tmp_path / "source")
    convert(source, tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back")
    for file in ("model.safetensors", *(["adapter_model.safetensors"] if config.lora else [])):
        assert_equal(load_file(tmp_path / "back" / file), load_file(source / file))
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    tokens = torch.arange(20)[None]
    before, after = load_hf_dir(source), load_hf_dir(tmp_path / "back")
    assert after.dtype == reference.dtype
    with torch.no_grad():
        assert torch.equal(after(input_ids=tokens).logits, before(input_ids=tokens).logits)


@pytest.mark.parity
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_loaded_model_computes_what_transformers_computes(tmp_path, config):
    """A round trip cannot see halves, layers or names that are swapped on the way in and back on the way out."""
    reference = make_hf_model(config, seed=3)
    ours = load_model(save_hf_dir(reference, tmp_path))
    np.testing.assert_allclose(our_logits(ours), hf_logits(reference), atol=1e-4)


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_saved_model_holds_every_bit_of_the_loaded_one(published, checkpoint, tmp_path, kind):
    loaded = load_model({"hf": published, "orbax": checkpoint}[kind])
    assert_equal(model_arrays(loaded), open_model(published)[1])
    save_model(loaded, tmp_path / "saved", source_dir=published)
    assert_equal(model_arrays(load_model(tmp_path / "saved")), model_arrays(loaded))
    for name in ("config.json", "adapter_config.json", "tokenizer.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (published / name).read_bytes()


# ---- dtypes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_variable_is_cast(checkpoint, published, dtype):
    exact = open_model(published)[1]
    for directory in (checkpoint, published):
        loaded = load_model(directory, dtype=dtype)
        assert loaded.dtype == jnp.dtype(dtype)
        assert_equal(model_arrays(loaded), {name: value.astype(jnp.dtype(dtype)) for name, value in exact.items()})


def test_export_names_the_dtype_it_wrote(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "out", dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_hf_dir(tmp_path / "out").dtype == torch.bfloat16


def test_overflow_in_float16_is_refused(checkpoint, tmp_path):
    loaded = load_model(checkpoint)
    loaded.projector.linear.bias[...] = jnp.full_like(loaded.projector.linear.bias[...], 1e5)
    save_model(loaded, tmp_path / "large")
    with pytest.raises(UserError, match="projector.linear.bias holds values beyond the range of float16"):
        load_model(tmp_path / "large", dtype="float16")


# ---- adapters


@pytest.mark.parametrize("config", [VARIANTS["lora"], VARIANTS["all-linear lora"]], ids=["lora", "all-linear lora"])
def test_merging_equals_peft(tmp_path, config):
    reference = make_hf_model(config, seed=4)
    source = save_hf_dir(reference, tmp_path / "source")
    loaded = load_model(source, lora="merge")
    assert loaded.config == dataclasses.replace(config, lora=None)
    for module in [module for module in reference.modules() if hasattr(module, "merge")]:
        module.merge()
    merged = {names.normalise(key): value.numpy() for key, value in reference.state_dict().items()}
    convert(source, tmp_path / "orbax", lora="merge")
    export(tmp_path / "orbax", tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["has_lora_adapter"] is False
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in written.items():
        np.testing.assert_allclose(tensor, merged.get(name, 0), atol=1e-6, err_msg=name)
    assert_equal(model_arrays(loaded), model_arrays(load_model(tmp_path / "merged")))
    np.testing.assert_allclose(hf_logits(load_hf_dir(tmp_path / "merged")), hf_logits(reference), atol=1e-5)


def test_merging_rounds_once():
    config = GraniteSpeechConfig.tiny(lora=LoraConfig(rank=1, alpha=0.5))
    module = "decoder.layers.self_attn.q_proj"
    # In bfloat16 1 + 1/256 rounds to 1, in float32 it is exact: 1 + 0.5 * (1/64 * 1/2).
    arrays = {
        f"{module}.kernel": np.full((1, 1, 1), 1, jnp.bfloat16),
        f"{module}.lora.a": np.full((1, 1, 1), 1 / 64, jnp.bfloat16),
        f"{module}.lora.b": np.full((1, 1, 1), 1 / 2, jnp.bfloat16),
    }
    merged_config, merged = merge(config, arrays)
    assert merged_config.lora is None and merged.keys() == {f"{module}.kernel"}
    assert merged[f"{module}.kernel"].astype("float32").load() == np.float32(1 + 1 / 256)
    kept = merged[f"{module}.kernel"].load()
    assert kept.dtype == jnp.bfloat16 and kept == 1


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_dropping_leaves_the_base(published, checkpoint, kind):
    loaded = load_model({"hf": published, "orbax": checkpoint}[kind], lora="none")
    base = {name: array for name, array in open_model(published)[1].items() if not names.is_lora(name)}
    assert loaded.config.lora is None
    assert_equal(model_arrays(loaded), base)


# ---- meshes


@pytest.mark.parametrize("kind", ["hf", "orbax"])
@pytest.mark.parametrize(("lora", "dtype"), [("keep", "float32"), ("keep", "bfloat16"), ("merge", "float32")])
def test_arrays_land_on_the_mesh(published, checkpoint, kind, lora, dtype):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    directory = {"hf": published, "orbax": checkpoint}[kind]
    loaded = load_model(directory, mesh=mesh, lora=lora, dtype=dtype)
    shardings = param_shardings(nnx.state(loaded), mesh)
    assert {name: array.sharding for name, array in model_arrays(loaded).items()} == shardings
    assert_equal(model_arrays(loaded), model_arrays(load_model(directory, lora=lora, dtype=dtype)))


# ---- partial checkpoints


def test_policy_is_its_base_with_the_trained_parts_in_place(published, tmp_path):
    policy = load_model(published)
    trained = [name for name in model_arrays(policy) if name.startswith("projector") or names.is_lora(name)]
    policy = build_model(TINY, {name: a + (name in trained) for name, a in model_arrays(policy).items()})
    save_model(policy, tmp_path / "policy", source_dir=published, base=published, only=trained)
    stored = sum(file.stat().st_size for file in (tmp_path / "policy").rglob("*") if file.is_file())
    assert stored < (published / "model.safetensors").stat().st_size
    assert_equal(model_arrays(load_model(tmp_path / "policy")), model_arrays(policy))
    mesh = make_mesh(MeshConfig(fsdp=2))
    assert_equal(model_arrays(load_model(tmp_path / "policy", mesh=mesh)), model_arrays(policy))
    export(tmp_path / "policy", tmp_path / "exported")
    assert_equal(open_model(tmp_path / "exported")[1], model_arrays(policy))
    assert (tmp_path / "exported" / "tokenizer.json").exists()


def test_base_may_be_a_policy_itself(checkpoint, tmp_path):
    model = load_model(checkpoint)
    save_model(model, tmp_path / "one", base=checkpoint, only=["projector.query"])
    model.projector.linear.bias[...] = model.projector.linear.bias[...] * 2
    save_model(model, tmp_path / "two", base=tmp_path / "one", only=["projector.linear.bias"])
    assert_equal(model_arrays(load_model(tmp_path / "two")), model_arrays(model))


def test_fresh_adapter_on_a_merged_base(published, tmp_path):
    config, arrays = open_model(published, lora="merge")
    fresh = LoraConfig(rank=2, alpha=2.0, target_modules=("k_proj",))
    config = dataclasses.replace(config, lora=fresh)
    added = {name: np.full(shape, 0.5, np.float32) for name, shape in tree.shapes(config).items()}
    model = build_model(config, {**added, **arrays})
    adapter = [name for name in model_arrays(model) if names.is_lora(name)]
    save_model(model, tmp_path / "policy", source_dir=published, base=published, base_lora="merge", only=adapter)
    loaded = load_model(tmp_path / "policy")
    assert loaded.config.lora == fresh
    assert_equal(model_arrays(loaded), model_arrays(model))


def test_a_part_needs_a_base_and_known_names(checkpoint, tmp_path):
    model = load_model(checkpoint)
    with pytest.raises(UserError, match="no base"):
        save_model(model, tmp_path / "policy", only=["projector.query"])
    with pytest.raises(UserError, match=r"no parameters \['projector.quary'\]"):
        save_model(model, tmp_path / "policy", base=checkpoint, only=["projector.quary"])


def test_incomplete_checkpoint_names_what_is_missing(checkpoint, tmp_path):
    save_model(load_model(checkpoint), tmp_path / "policy", base=checkpoint, only=["projector.query"])
    manifest = tmp_path / "policy" / "model_port.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "base": None}))
    with pytest.raises(UserError, match=r"missing \(\d+\): decoder.embed_tokens.embedding \(128, 32\)"):
        load_model(tmp_path / "policy")


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "float64"}, "dtype 'float64' is not one of float32, bfloat16, float16"),
        ({"lora": "fold"}, "lora 'fold' is not one of keep, merge, none"),
    ],
)
def test_wrong_choices_name_the_right_ones(checkpoint, options, text):
    with pytest.raises(UserError, match=text):
        load_model(checkpoint, **options)


def test_other_directories_are_refused_with_what_they_hold(tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="it has nothing"):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="it has pytorch_model.bin"):
        load_model(tmp_path)


# ---- the command line


@pytest.mark.e2e
def test_command_line_converts_and_exports(published, tmp_path, capsys):
    orbax, back = str(tmp_path / "orbax"), str(tmp_path / "back")
    assert cli.main(["convert", str(published), orbax, "--dtype", "bfloat16", "--lora", "merge"]) == 0
    assert cli.main(["export", orbax, back]) == 0
    assert capsys.readouterr().out == f"wrote {orbax}\nwrote {back}\n"
    config, arrays = open_model(back)
    assert config.lora is None
    assert {array.dtype for array in arrays.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.e2e
def test_command_line_explains_mistakes_without_a_traceback(published, tmp_path, capsys):
    broken = shutil.copytree(published, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"")
    assert cli.main(["convert", str(broken), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("model-port: cannot read") and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_jax_stays_on_its_default_device(checkpoint):
    devices = {device for array in model_arrays(load_model(checkpoint)).values() for device in array.devices()}
    assert devices == {jax.devices()[0]}
