"""What a directory is, from headers alone: every kind, every layout, and every damage listed."""

import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.libraries import quiet
from model_port.published import PUBLISHED
from model_port.weights import hf_files, names, tree
from model_port.weights.convert import convert, load_model, save_model
from model_port.weights.inspection import inspect
from model_port.weights.lazy import LazyArray
from tests.hf_tiny import ADAPTER_PREFIXES, adapter_state, base_state, make_hf_model, save_hf_dir

CONFIG = GraniteSpeechConfig.tiny()
OUT = "encoder.out.weight"


@pytest.fixture(scope="module")
def model():
    return make_hf_model(CONFIG)


@pytest.fixture(scope="module")
def published(model, tmp_path_factory):
    return save_hf_dir(model, tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def checkpoint(published, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(published, out, dtype="bfloat16")
    return out


@pytest.fixture(scope="module")
def policy(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "policy"
    model = load_model(checkpoint, dtype="bfloat16")
    save_model(model, out, source_dir=checkpoint, base=checkpoint, only=["projector.query", "projector.linear.bias"])
    return out


@pytest.fixture
def copy(published, tmp_path):
    return shutil.copytree(published, tmp_path / "copy")


@pytest.fixture(autouse=True)
def headers_only(monkeypatch):
    """Fail whatever reads a weight."""

    def read(*args):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(hf_files.Stored, "read", read)
    monkeypatch.setattr(LazyArray, "load", read)


def edit(directory, change, file="model.safetensors"):
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})


def facts(found):
    return dict(found.facts)


def headers_of(config, path):
    """Write the directory of a model of any size: headers, and nothing where the weights would be."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config.to_hf()[0]))
    header, end = {}, 0
    for name, shape in tree.shapes(config).items():
        entry = names.BY_PATH[name]
        stored = entry.transform.stored_shape(shape[1:] if entry.stacked else shape)
        for layer in range(shape[0]) if entry.stacked else (None,):
            begin, end = end, end + 2 * int(np.prod(stored))
            header[entry.name.format(l=layer)] = {"dtype": "BF16", "shape": stored, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


# ---- Hugging Face


def test_a_sound_directory(published):
    found = inspect(published)
    assert found.sound
    assert list(found.sizes) == ["encoder", "BatchNorm statistics", "projector", "embedding", "decoder", "adapter"]
    expected = sum(np.prod(shape) for shape in tree.shapes(CONFIG).values())
    assert sum(size.parameters for size in found.sizes.values()) == expected
    assert found.sizes["BatchNorm statistics"].parameters == 4 * 2 * 64
    assert found.sizes["adapter"].tensors == 12
    assert all(size.nbytes == 4 * size.parameters and size.dtypes == ("float32",) for size in found.sizes.values())
    text = found.text()
    assert text.endswith("sound: all weights are there, in the shapes that config.json asks for, and no others")
    for line in (
        "  kind       Hugging Face directory",
        "  model      not one of the released architectures",
        "  encoder    4 layers of width 32, CTC 11",
        "  head       the embedding (tied)",
        "  adapter    LoRA of rank 4, alpha 8, on q_proj, v_proj",
        "  layout     published (encoder.*, projector.*, language_model.*)",
        f"  files      model.safetensors, {(published / 'model.safetensors').stat().st_size:,} bytes",
        "  absent     tokenizer, tokenizer_config.json, a chat template: needed to run the model on text",
    ):
        assert line in text.splitlines(), line
    assert len(text.splitlines()) <= 40


@pytest.mark.parametrize("name", ["granite-speech-3.2-8b", "granite-4.0-1b-speech"])
def test_a_released_model_is_known_by_its_dimensions_and_counted(name, tmp_path):
    headers_of(dataclasses.replace(PUBLISHED[name], lora=None), tmp_path / "model")
    found = inspect(tmp_path / "model")
    assert found.sound
    if name == "granite-speech-3.2-8b":
        assert facts(found)["model"] == f"the architecture of {name}"
        assert "head" not in found.sizes
    else:
        assert facts(found)["model"] == f"the architecture of {name} and granite-speech-4.1-2b"
        assert facts(found)["head"] == "a kernel of its own (untied)"
        assert found.sizes["head"].parameters == 205_522_944
        parameters = sum(size.parameters for part, size in found.sizes.items() if part != "BatchNorm statistics")
        assert parameters == 2_313_141_596


def test_everything_wrong_is_listed_and_counted(copy):
    def change(tensors):
        for layer in range(3):
            del tensors[f"encoder.layers.{layer}.attn.to_q.weight"]
        tensors["encoder.strange"] = np.zeros(3, np.float32)
        tensors[OUT] = np.zeros((42, 32), np.float32)
        tensors["model.encoder.out.bias"] = tensors["encoder.out.bias"]

    edit(copy, change)
    found = inspect(copy)
    assert not found.sound
    assert {kind: len(listed) for kind, listed in found.problems.items()} == {
        "missing": 3,
        "unexpected": 1,
        "wrong shape": 1,
        "duplicate": 1,
    }
    text = found.text()
    assert "not sound:" in text
    assert "missing (3): encoder.layers.0.attn.to_q.weight (32, 32), encoder.layers.1.attn.to_q.weight" in text
    assert f"{OUT} in model.safetensors is (42, 32), config.json asks for (11, 32)" in text


def test_absent_shards_and_stale_files(model, tmp_path):
    save_hf_dir(model, tmp_path, max_shard_size="100KB")
    (tmp_path / "model-00001-of-00099.safetensors").touch()
    found = inspect(tmp_path)
    assert found.sound
    assert facts(found)["not read"] == "model-00001-of-00099.safetensors"
    assert "that the index names" in facts(found)["files"]
    gone, cut, *_ = sorted(tmp_path.glob("model-*-of-0000*.safetensors"))
    lost = [key for file in (gone, cut) for key in load_file(file) if "num_batches_tracked" not in key]
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:100])
    found = inspect(tmp_path)
    assert f"names {gone.name}, not in {tmp_path}" in found.problems["files"][0]
    assert f"cannot read {cut}" in found.problems["files"][1]
    assert len(found.problems["missing"]) == len(lost)


def test_layouts(model, copy, tmp_path):
    edit(copy, dict.clear)
    edit(copy, lambda t: t.update({key: value.numpy() for key, value in base_state(model).items()}))
    assert facts(inspect(copy))["layout"].startswith("in memory since transformers 5.10")
    with quiet("transformers"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unable to fetch remote file|Could not find a config file", module="peft")
        make_hf_model(CONFIG).save_pretrained(str(tmp_path / "damaged"))
    found = inspect(tmp_path / "damaged")
    assert found.sound
    assert facts(found)["layout"].startswith("saved by transformers 5 together with its adapter")


def test_a_head_beside_a_tied_embedding_is_not_read(copy):
    key = "language_model.lm_head.weight"
    edit(copy, lambda t: t.update({key: t["language_model.model.embed_tokens.weight"]}))
    found = inspect(copy)
    assert found.sound
    expected = f"{key} in model.safetensors; whether both are equal shows when they are read"
    assert facts(found)["twice"] == expected
    assert facts(found)["head"] == "the embedding (tied)"


def test_the_names_of_the_first_release(copy):
    def change(tensors):
        for key in list(tensors):
            if key.startswith("encoder.input_linear."):
                tensors[key.replace("encoder.input_linear", "encoder.rnn_tr.0")] = tensors.pop(key)

    edit(copy, change)
    found = inspect(copy)
    assert found.sound
    assert facts(found)["layout"].startswith("granite-speech-3.2-8b's own code")


@pytest.mark.parametrize(
    ("style", "words"), [("published", "published"), ("4.x", "transformers 4"), ("5.x", "transformers 5")]
)
def test_adapter_keys(model, copy, style, words):
    edit(copy, dict.clear, "adapter_model.safetensors")
    tensors = {key: value.numpy() for key, value in adapter_state(model, style).items()}
    edit(copy, lambda t: t.update(tensors), "adapter_model.safetensors")
    found = inspect(copy)
    assert found.sound and set(ADAPTER_PREFIXES) == {"published", "4.x", "5.x"}
    assert words in facts(found)[""]


def test_files_of_the_processor(copy):
    (copy / "tokenizer.json").touch()
    (copy / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (copy / "preprocessor_config.json").touch()
    found = facts(inspect(copy))
    assert found["processor"] == "tokenizer.json, tokenizer_config.json, preprocessor_config.json"
    assert "absent" not in found


# ---- Orbax


def test_orbax_directory(checkpoint, published):
    found = inspect(checkpoint)
    assert found.sound
    assert facts(found)["kind"] == "Orbax model directory"
    source = inspect(published)
    assert found.sizes.keys() == source.sizes.keys()
    for name, size in found.sizes.items():
        assert (size.tensors, size.parameters) == (source.sizes[name].tensors, source.sizes[name].parameters)
        assert size.dtypes == ("bfloat16",) and size.nbytes == 2 * size.parameters


def test_partial_directory_is_counted_with_its_base(policy, checkpoint):
    found = inspect(policy)
    assert found.sound
    assert facts(found)["kind"] == "Orbax model directory, partial: it holds 2 arrays, its base the others"
    assert facts(found)["base"] == f"{checkpoint} (Orbax model directory)"
    assert found.sizes == inspect(checkpoint).sizes


@pytest.mark.parametrize(("fate", "adapter"), [("merge", "folded in"), ("none", "left out")])
def test_base_of_hugging_face_without_its_adapter(published, tmp_path, fate, adapter, monkeypatch):
    monkeypatch.undo()
    model = load_model(published, lora=fate)
    save_model(
        model, tmp_path / "policy", source_dir=published, base=published, base_lora=fate, only=["projector.query"]
    )
    found = inspect(tmp_path / "policy")
    assert found.sound and "adapter" not in found.sizes
    assert facts(found)["base"] == f"{published} (Hugging Face directory; its adapter is {adapter})"


def test_damage_of_the_base_and_its_absence(policy, copy, tmp_path):
    moved = shutil.copytree(policy, tmp_path / "policy")
    manifest = json.loads((moved / "model_port.json").read_text())
    edit(copy, lambda t: t.pop(OUT))
    (moved / "model_port.json").write_text(json.dumps({**manifest, "base": str(copy)}))
    found = inspect(moved)
    assert not found.sound
    assert found.problems == {"base, missing": [f"{OUT} (11, 32)"]}
    shutil.rmtree(copy)
    found = inspect(moved)
    assert not found.sound
    assert f"its base {copy}, which does not exist" in found.problems["base"][0]


def test_arrays_that_the_config_does_not_ask_for(checkpoint, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    (other / "adapter_config.json").unlink()
    found = inspect(other)
    assert not found.sound
    assert found.problems["unexpected"] == [name for name in tree.shapes(CONFIG) if names.is_lora(name)]


# ---- others


def test_an_adapter_alone(copy):
    (copy / "model.safetensors").unlink()
    found = inspect(copy)
    assert found.sound
    assert facts(found)["kind"].startswith("LoRA adapter only")
    assert facts(found)["on"] == "decoder layers 0 to 2"
    assert list(found.sizes) == ["adapter"]
    lost = "language_model.model.layers.1.self_attn.q_proj.lora_A.weight"
    edit(copy, lambda t: t.pop(lost), "adapter_model.safetensors")
    adapter = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**adapter, "r": 8}))
    found = inspect(copy)
    assert found.problems["missing"] == [lost]
    assert len(found.problems["wrong rank"]) == 11


def test_neither(tmp_path, copy):
    with pytest.raises(UserError, match="is no model directory"):
        inspect(tmp_path)
    (copy / "model.safetensors").unlink()
    (copy / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="has adapter_model.safetensors but no adapter_config.json"):
        inspect(copy)
