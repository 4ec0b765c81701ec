"""A conversion is checked against its source: equal ones pass, and whatever differs is named."""

import dataclasses
import importlib.machinery
import json
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model_port.config import GraniteSpeechConfig, LoraConfig
from model_port.errors import UserError
from model_port.published import PUBLISHED
from model_port.weights import reference
from model_port.weights.convert import convert, export, open_model
from model_port.weights.hf_writer import write_hf
from model_port.weights.orbax_files import write_orbax
from model_port.weights.verify import verify
from tests.hf_tiny import make_hf_model, save_hf_dir
from tests.model_port.toy_tokenizer import make_model_dir

STAGES = ["features", "encoder", "projector", "logits", "greedy text"]


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    """A model with an adapter and a tokenizer."""
    path = make_model_dir(tmp_path_factory.mktemp("src"))
    config = GraniteSpeechConfig.from_hf(json.loads((path / "config.json").read_text()))
    return save_hf_dir(make_hf_model(dataclasses.replace(config, lora=LoraConfig(rank=4, alpha=8.0))), path)


@pytest.fixture(scope="module")
def checkpoint(src, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(src, out)
    return out


def changed(src, out, change, *, write=write_hf, lora="keep"):
    """Write what `src` converts to, with its arrays changed."""
    config, arrays = open_model(src, lora=lora)
    arrays = {name: array.load() for name, array in arrays.items()}
    change(arrays)
    write(out, config, arrays, source_dir=src)
    return out


# ---- tensors


def test_a_conversion_is_equal(src, checkpoint):
    found = verify(src, checkpoint, stages=False)
    assert found.passed
    stored = [key for name in ("model", "adapter_model") for key in load_file(src / f"{name}.safetensors")]
    assert sum(part.equal for part in found.tensors.values()) == len([k for k in stored if "num_batches" not in k])
    assert "  as stored: no cast, no merge\n" in found.text()
    assert found.text().endswith("stages not compared: not asked for\n\npassed")


@pytest.mark.parametrize("write", [write_orbax, write_hf])
def test_one_changed_weight_fails_and_is_named(src, tmp_path, write):
    def change(arrays):
        arrays["encoder.layers.attn.to_q.kernel"][2, 5, 7] += 1e-3

    found = verify(src, changed(src, tmp_path / "out", change, write=write), stages=False)
    assert not found.passed
    assert found.tensors["encoder"].differ == ["encoder.layers.2.attn.to_q.weight"]
    assert found.tensors["encoder"].largest == pytest.approx(1e-3, rel=1e-3)
    assert not any(part.differ for name, part in found.tensors.items() if name != "encoder")
    assert "differ (1): encoder.layers.2.attn.to_q.weight" in found.text()
    assert found.text().endswith("DIFFERS")


@pytest.mark.parametrize(("lora", "differ"), [("keep", 1), ("merge", 0)])
def test_the_last_bit_counts_but_in_a_sum(src, tmp_path, lora, differ):
    def change(arrays):
        kernel = arrays["decoder.layers.self_attn.q_proj.kernel"]
        kernel[1, 2, 3] = np.nextafter(kernel[1, 2, 3], np.float32(9))

    found = verify(src, changed(src, tmp_path / "out", change, lora=lora), stages=False)
    assert len(found.tensors["decoder"].differ) == differ


def test_a_nan_fails(src, tmp_path):
    found = verify(src, changed(src, tmp_path / "out", lambda a: a["projector.query"].fill(np.nan)), stages=False)
    assert found.tensors["projector"].differ == ["projector.query"]
    assert np.isnan(found.tensors["projector"].largest)


def test_swapped_tensors_of_one_shape_fail(src, tmp_path):
    def change(arrays):
        one, other = (f"decoder.layers.self_attn.{name}_proj.kernel" for name in "kv")
        arrays[one], arrays[other] = arrays[other], arrays[one]

    assert len(verify(src, changed(src, tmp_path / "out", change), stages=False).tensors["decoder"].differ) == 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_source_is_cast_as_the_checkpoint_was(src, tmp_path, dtype):
    export(src, tmp_path / "out", dtype=dtype)
    found = verify(src, tmp_path / "out", stages=False)
    assert found.passed
    assert f"the source's weights are cast from float32 to {dtype}, as in the checkpoint" in found.settings


def test_an_export_is_equal(src, checkpoint, tmp_path):
    export(checkpoint, tmp_path / "hf")
    assert verify(src, tmp_path / "hf", stages=False).passed


def test_a_merged_adapter(src, tmp_path):
    export(src, tmp_path / "out", lora="merge")
    found = verify(src, tmp_path / "out", stages=False)
    assert found.passed
    assert found.settings == ["the source's adapter is merged into its kernels, as in the checkpoint"]
    assert "adapter" not in found.tensors

    def change(arrays):
        arrays["decoder.layers.self_attn.v_proj.kernel"][1, 2, 3] += 1e-3

    changed(src, tmp_path / "changed", change, lora="merge")
    differ = verify(src, tmp_path / "changed", stages=False).tensors["decoder"].differ
    assert differ == ["language_model.model.layers.1.self_attn.v_proj.weight"]


def test_an_adapter_left_out(src, tmp_path):
    found = verify(src, changed(src, tmp_path / "out", lambda arrays: None, lora="none"), stages=False)
    assert found.passed
    assert found.settings == ["the source's adapter is left out, as in the checkpoint"]


def test_settings_and_files_count_too(src, checkpoint, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["logits_scaling"] = 4.0
    (other / "config.json").write_text(json.dumps(config))
    (other / "tokenizer_config.json").write_text("{}")
    (other / "tokenizer.json").unlink()
    found = verify(src, other, stages=False)
    assert not found.passed
    assert found.problems["setting"] == ["decoder.logits_scaling is 3.0 and 4.0"]
    assert sorted(found.problems["file"]) == ["tokenizer.json is absent", "tokenizer_config.json has another content"]


def test_another_model(src, tmp_path):
    other = save_hf_dir(make_hf_model(GraniteSpeechConfig.tiny(lora=None, tie_word_embeddings=False)), tmp_path / "hf")
    found = verify(src, other)
    assert not found.passed
    assert found.problems["unexpected"] == ["lm_head.kernel"]
    assert found.tensors["embedding"].differ == ["language_model.model.embed_tokens.weight (320, 32) and (128, 32)"]
    assert found.remarks == ["stages not compared: the models have other shapes"]


def test_mistakes(src, checkpoint):
    with pytest.raises(UserError, match="is no Hugging Face directory; give the source first"):
        verify(checkpoint, checkpoint)
    with pytest.raises(UserError, match="dtype must be one of float32, bfloat16, float16"):
        verify(src, checkpoint, dtype="float64")


# ---- stages


@pytest.mark.parity
def test_stages_agree_with_the_reference(src, checkpoint):
    found = verify(src, checkpoint, max_new_tokens=4)
    assert found.passed
    assert {stage.name: stage.ok for stage in found.stages} == dict.fromkeys(STAGES, True)
    assert all(float(stage.found) < 1e-5 for stage in found.stages[:-1])
    assert found.stages[-1].found == "4 of 4 tokens"
    assert found.remarks[-1].startswith("text: ")
    assert "logits_scaling: its logits are divided by 3" in found.remarks[0]


@pytest.mark.parity
def test_a_stage_that_differs_is_named(src, tmp_path):
    out = changed(src, tmp_path / "out", lambda arrays: arrays["decoder.norm.scale"].__imul__(np.float32(1.01)))
    found = verify(src, out, max_new_tokens=4)
    assert not found.passed
    verdicts = {stage.name: stage.ok for stage in found.stages[:-1]}
    assert verdicts == {"features": True, "encoder": True, "projector": True, "logits": False}
    assert any(line.startswith("  logits") and line.endswith("DIFFERS") for line in found.text().splitlines())


@pytest.mark.parity
def test_merged_and_cast_without_a_tokenizer(src, tmp_path, monkeypatch):
    """The reference is merged and rounded likewise: bfloat16 against float32 would differ by 1e-2."""
    bare = shutil.copytree(src, tmp_path / "bare", ignore=lambda path, files: [f for f in files if "token" in f])
    convert(bare, tmp_path / "out", lora="merge", dtype="bfloat16")
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    found = verify(bare, tmp_path / "out", max_new_tokens=4)
    assert found.passed
    assert found.stages[0].found.startswith("not compared: torchaudio is not installed")
    assert all(float(stage.found) < 1e-4 for stage in found.stages[1:-1])


@pytest.mark.parametrize("package", ["torch", "transformers", "peft"])
def test_without_a_package_the_tensors_are_compared(src, monkeypatch, package):
    monkeypatch.setattr("model_port.weights.comparison._inputs", lambda *args: (None, None))
    monkeypatch.setitem(sys.modules, package, None)
    found = verify(src, src)
    assert found.passed and found.stages == [] and found.tensors["encoder"].equal
    assert found.remarks[0].startswith(f"stages not compared: {package} is not installed")
    assert ("and the model has a LoRA adapter" in found.remarks[0]) == (package == "peft")


def test_a_release_of_transformers_without_the_model(monkeypatch):
    old = types.ModuleType("transformers")
    old.__spec__, old.__version__ = importlib.machinery.ModuleSpec("transformers", None), "4.57.6"
    monkeypatch.setitem(sys.modules, "transformers", old)
    reason = reference.unavailable(PUBLISHED["granite-speech-4.1-2b-plus"])
    assert reason == "transformers 4.57.6 has no GraniteSpeechPlusForConditionalGeneration"


@pytest.mark.parity
def test_a_directory_in_which_transformers_does_not_find_its_weights(src, tmp_path):
    """We read the names of the first release; no release of transformers does."""
    other = shutil.copytree(src, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    for leaf in ("weight", "bias"):
        tensors[f"encoder.rnn_tr.0.{leaf}"] = tensors.pop(f"encoder.input_linear.{leaf}")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    found = verify(other, src, max_new_tokens=4)
    assert found.passed and found.stages == []
    names = "encoder.input_linear.bias, encoder.input_linear.weight"
    assert f"does not load what the files hold ({names})" in found.remarks[0]


def test_nothing_imports_torch_before_it_is_needed():
    code = "import sys; sys.modules['torch'] = None; import model_port.weights.verify, model_port.cli"
    subprocess.run([sys.executable, "-c", code], check=True)
