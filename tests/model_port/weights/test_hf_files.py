"""Reading and writing Hugging Face directories: every published variant, and a clear message for every damage."""

import dataclasses
import json
import shutil
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.libraries import quiet
from model_port.weights import names
from model_port.weights.hf_files import open_hf
from model_port.weights.hf_writer import write_hf
from tests.hf_tiny import ADAPTER_PREFIXES, adapter_state, base_state, load_hf_dir, make_hf_model, save_hf_dir

CONFIG = GraniteSpeechConfig.tiny()
OUT = "encoder.out.weight"


@pytest.fixture(scope="module")
def model():
    return make_hf_model(CONFIG)


@pytest.fixture(scope="module")
def published(model, tmp_path_factory):
    return save_hf_dir(model, tmp_path_factory.mktemp("published"))


@pytest.fixture
def copy(published, tmp_path):
    return shutil.copytree(published, tmp_path / "copy")


def read_hf(directory, **options):
    config, arrays = open_hf(directory, **options)
    return config, {name: array.load() for name, array in arrays.items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert ours[name].tobytes() == theirs[name].tobytes(), name


def edit(directory, change, file="model.safetensors"):
    """Rewrite a tensor file after `change` has altered its dict."""
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})


def edit_config(directory, **changes):
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, **changes}))


def message(directory, **options):
    with pytest.raises(UserError) as error:
        read_hf(directory, **options)
    return str(error.value)


# ---- what is read


def test_values_land_in_their_layer_and_layout(model, published):
    config, arrays = read_hf(published)
    assert config == CONFIG
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    attention = "model.language_model.layers.2.self_attn.q_proj"
    np.testing.assert_array_equal(
        arrays["decoder.layers.self_attn.q_proj.kernel"][2], state[f"{attention}.base_layer.weight"].T
    )
    np.testing.assert_array_equal(
        arrays["decoder.layers.self_attn.q_proj.lora.b"][2], state[f"{attention}.lora_B.default.weight"].T
    )
    variance = "model.encoder.layers.3.conv.batch_norm.running_var"
    np.testing.assert_array_equal(arrays["encoder.layers.conv.batch_norm.var"][3], state[variance])


def test_in_memory_layout_reads_the_same(model, published, tmp_path):
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    edit(tmp_path, dict.clear)
    edit(tmp_path, lambda t: t.update({key: value.numpy() for key, value in base_state(model).items()}))
    assert_equal(read_hf(tmp_path)[1], read_hf(published)[1])


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("adapter_file", [True, False])
def test_model_saved_by_transformers_5_together_with_its_adapter(published, tmp_path, prefix, adapter_file):
    with quiet("transformers"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unable to fetch remote file|Could not find a config file", module="peft")
        make_hf_model(CONFIG).save_pretrained(str(tmp_path))
    edit(tmp_path, lambda t: [t.update({prefix + key: t.pop(key)}) for key in list(t)])
    assert any(".base_layer." in key for key in load_file(tmp_path / "model.safetensors"))
    if not adapter_file:
        (tmp_path / "adapter_model.safetensors").unlink()
    config, arrays = read_hf(tmp_path)
    assert config == CONFIG
    assert_equal(arrays, read_hf(published)[1])


@pytest.mark.parametrize("style", ADAPTER_PREFIXES)
def test_every_adapter_prefix(model, published, copy, style):
    edit(copy, dict.clear, "adapter_model.safetensors")
    tensors = {key: value.numpy() for key, value in adapter_state(model, style).items()}
    edit(copy, lambda t: t.update(tensors), "adapter_model.safetensors")
    assert_equal(read_hf(copy)[1], read_hf(published)[1])


def test_without_the_adapter(published):
    config, arrays = read_hf(published, adapter=False)
    assert config == dataclasses.replace(CONFIG, lora=None)
    assert not any(map(names.is_lora, arrays))


def test_counters_may_be_absent_and_constants_are_ignored(published, copy):
    def change(tensors):
        for key in [key for key in tensors if key.endswith("num_batches_tracked")]:
            del tensors[key]
        tensors["encoder.layers.0.attn.attention_dists"] = np.zeros((20, 20), np.int64)

    edit(copy, change)
    assert_equal(read_hf(copy)[1], read_hf(published)[1])


def test_only_files_of_the_index_are_read(model, tmp_path, published):
    save_hf_dir(model, tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    stale = {"encoder.out.weight": np.zeros((42, 32), np.float32)}
    save_file(stale, tmp_path / "model-00001-of-00099.safetensors")
    assert_equal(read_hf(tmp_path)[1], read_hf(published)[1])


def test_stored_head_that_equals_the_embedding_stays_tied(copy):
    def change(tensors):
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]

    edit(copy, change)
    config, arrays = read_hf(copy)
    assert config.tie_word_embeddings
    assert names.LM_HEAD not in arrays


def test_stored_head_that_differs_unties(copy):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"] + 1

    edit(copy, change)
    config, arrays = read_hf(copy)
    assert not config.tie_word_embeddings
    np.testing.assert_array_equal(arrays[names.LM_HEAD], arrays[names.EMBEDDING].T + 1)


def test_without_a_head_either_config_key_ties(copy):
    edit_config(copy, tie_word_embeddings=False)  # its text_config still says true, as transformers <= 5.9 reads it
    assert read_hf(copy)[0].tie_word_embeddings


def test_layers_of_different_dtypes_are_widened(copy):
    bias = "encoder.layers.{}.post_norm.bias"
    exact = np.arange(32).astype(np.float16)
    edit(copy, lambda t: t.update({bias.format(1): exact, bias.format(2): exact.astype(ml_dtypes.bfloat16)}))
    stacked = read_hf(copy)[1]["encoder.layers.post_norm.bias"]
    assert stacked.dtype == np.float32
    np.testing.assert_array_equal(stacked[1:3], [np.arange(32)] * 2)


def test_absent_adapter_is_said_aloud(copy, caplog):
    (copy / "adapter_model.safetensors").unlink()
    (copy / "adapter_config.json").unlink()
    assert read_hf(copy)[0].lora is None
    assert "has_lora_adapter" in caplog.text


# ---- what is refused


def test_missing_unexpected_and_misshapen_tensors_are_named_with_expected_and_found(copy):
    def change(tensors):
        del tensors["encoder.layers.2.attn.to_q.weight"]
        tensors["encoder.strange"] = np.zeros(3, np.float32)
        tensors[OUT] = np.zeros((42, 32), np.float32)

    edit(copy, change)
    text = message(copy)
    assert str(copy) in text
    assert "missing (1): encoder.layers.2.attn.to_q.weight (32, 32)" in text
    assert "unexpected (1): encoder.strange in model.safetensors" in text
    assert f"{OUT} in model.safetensors is (42, 32), config.json asks for (11, 32)" in text


def test_long_lists_are_cut(copy):
    edit(copy, lambda t: [t.pop(key) for key in list(t) if key.startswith("projector.") and "bias" in key])
    assert "missing (28): " in message(copy)
    assert " and 23 more" in message(copy)


def test_config_with_fewer_layers_than_the_file(copy):
    encoder = json.loads((copy / "config.json").read_text())["encoder_config"]
    edit_config(copy, encoder_config={**encoder, "num_layers": 3})
    text = message(copy)
    assert "encoder.layers.3.attn.pre_norm.bias in model.safetensors (config.json has 3 layers in the encoder)" in text


def test_one_tensor_under_two_names(copy):
    edit(copy, lambda t: t.update({f"model.{OUT}": t[OUT]}))
    assert f"duplicate (1): model.{OUT} in model.safetensors and {OUT} in model.safetensors" in message(copy)


def test_two_different_adapters(copy, model):
    tensors = {key: value.numpy() + 1 for key, value in adapter_state(model, "5.x").items()}
    edit(copy, lambda t: t.update(tensors))
    assert "and, different, base_model.model.model.language_model.layers.0.self_attn" in message(copy)


def test_integer_weights(copy):
    edit(copy, lambda t: t.update({OUT: t[OUT].astype(np.int8)}))
    assert f"{OUT} in model.safetensors is I8, not F32 or F16 or BF16" in message(copy)


def test_untied_model_without_its_head(copy):
    text_config = json.loads((copy / "config.json").read_text())["text_config"]
    edit_config(copy, tie_word_embeddings=False, text_config={**text_config, "tie_word_embeddings": False})
    assert "missing (1): language_model.lm_head.weight (128, 32)" in message(copy)


@pytest.mark.parametrize("size", [0, 1000, -3])
def test_truncated_file(copy, size):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert f"cannot read {file}" in message(copy)


def test_index_naming_an_absent_file(model, tmp_path):
    save_hf_dir(model, tmp_path, max_shard_size="100KB")
    gone = sorted(tmp_path.glob("model-*"))[1]
    gone.unlink()
    assert f"names {gone.name}, not in {tmp_path}" in message(tmp_path)


def test_index_promising_a_tensor_that_its_file_lacks(model, tmp_path):
    save_hf_dir(model, tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = index["weight_map"][OUT]
    edit(tmp_path, lambda t: t.pop(OUT), shard)
    text = message(tmp_path)
    assert f"promised by the index but absent (1): {OUT} in {shard}" in text
    assert f"missing (1): {OUT} (11, 32)" in text


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index(copy, content):
    (copy / "model.safetensors.index.json").write_text(content)
    assert "is not an index with a weight_map" in message(copy)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_config(copy, content):
    (copy / "config.json").write_text(content)
    assert str(copy / "config.json") in message(copy)


def test_no_weights(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "only safetensors weights can be read" in message(copy)


def test_adapter_without_config(copy):
    (copy / "adapter_config.json").unlink()
    assert "adapter_model.safetensors but no adapter_config.json" in message(copy)


def test_adapter_config_without_tensors(copy):
    (copy / "adapter_model.safetensors").unlink()
    assert "missing (12): language_model.model.layers.0.self_attn.q_proj.lora_A.weight (4, 32)" in message(copy)


def test_adapter_on_other_modules_than_its_config(copy):
    adapter = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**adapter, "target_modules": ["q_proj"]}))
    assert "v_proj.lora_A.weight in adapter_model.safetensors (adapter_config.json has target_modules" in message(copy)


def test_adapter_of_several_ranks(copy):
    adapter = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**adapter, "alpha_pattern": {"q_proj": 3}}))
    assert "alpha_pattern" in message(copy)


# ---- what is written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000])
def test_written_tensors_are_those_that_were_read(tmp_path, dtype, max_shard_bytes):
    source = save_hf_dir(make_hf_model(CONFIG, seed=1).to(dtype), tmp_path / "source")
    config, arrays = read_hf(source)
    write_hf(tmp_path / "out", config, arrays, source_dir=source, max_shard_bytes=max_shard_bytes, same_weights=True)
    files = sorted(file.name for file in (tmp_path / "out").glob("model*.safetensors"))
    assert len(files) == 1 if max_shard_bytes == 10**9 else len(files) > 1
    written = {key: value for file in files for key, value in load_file(tmp_path / "out" / file).items()}
    assert_equal(written, load_file(source / "model.safetensors"))
    whole = ["model.safetensors"] if len(files) == 1 else []
    for file in (*whole, "adapter_model.safetensors", "adapter_config.json", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    load_hf_dir(tmp_path / "out")


def test_sharding_obeys_the_limit(published, tmp_path):
    config, arrays = read_hf(published)
    write_hf(tmp_path / "out", config, arrays, max_shard_bytes=50_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = {}
    for file in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "out" / file)
        assert set(tensors) == {key for key, where in index["weight_map"].items() if where == file}
        sizes[file] = sum(tensor.nbytes for tensor in tensors.values())
    assert max(sizes.values()) <= 50_000
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert sorted(sizes)[0] == f"model-00001-of-{len(sizes):05d}.safetensors"


def test_written_without_a_source_loads_in_transformers(published, model, tmp_path):
    config, arrays = read_hf(published)
    write_hf(tmp_path / "out", config, arrays)
    assert read_hf(tmp_path / "out")[0] == config
    tokens = torch.arange(20)[None]
    reloaded = load_hf_dir(tmp_path / "out")
    assert torch.equal(reloaded(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_existing_output_is_left_alone(published, tmp_path):
    (tmp_path / "out").mkdir()
    config, arrays = read_hf(published)
    write_hf(tmp_path / "out", config, arrays)  # an empty directory will do
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists and is not empty"):
        write_hf(tmp_path / "out", config, arrays)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_failure_leaves_nothing_behind(published, tmp_path):
    config, arrays = read_hf(published)
    arrays["encoder.layers.conv.up_conv.kernel"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="axes"):
        write_hf(tmp_path / "out", config, arrays)
    assert not list(tmp_path.iterdir())


def test_leftover_of_a_killed_process_is_replaced(published, tmp_path):
    (tmp_path / "out.partial-write").mkdir()
    (tmp_path / "out.partial-write" / "stale").touch()
    config, arrays = read_hf(published)
    write_hf(tmp_path / "out", config, arrays)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "stale").exists()


@pytest.mark.parametrize("named", [{}, {"base_model_name_or_path": "ibm-granite/granite-speech"}])
@pytest.mark.parametrize("same_weights", [True, False])
def test_an_adapter_names_its_base(copy, tmp_path, named, same_weights):
    # transformers 4 loads the base from there, whatever lies beside the adapter.
    adapter = json.loads((copy / "adapter_config.json").read_text())
    del adapter["base_model_name_or_path"]
    (copy / "adapter_config.json").write_text(json.dumps({**adapter, **named}))
    config, arrays = read_hf(copy)
    write_hf(tmp_path / "out", config, arrays, source_dir=copy, same_weights=same_weights)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    itself = {"base_model_name_or_path": str(tmp_path / "out")}
    assert written == {**adapter, **(named if same_weights and named else itself)}
