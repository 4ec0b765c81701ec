"""Orbax model directories: every bit comes back, on any mesh, alone or with a base."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.partition import MeshConfig, make_mesh
from model_port.weights import chunk_files
from model_port.weights.lazy import LazyArray
from model_port.weights.orbax_files import open_orbax, read_manifest, read_orbax, write_orbax

CONFIG = GraniteSpeechConfig.tiny()


def some_arrays(dtype):
    """Awkward values: NaN, infinities, negative zero, subnormals."""
    values = np.array([[np.nan, np.inf, -np.inf, -0.0], [1e-40, 1.0, 3.1415927, -65504.0]], np.float32)
    return {"encoder.out.kernel": values.astype(dtype), "projector.query": np.zeros((1, 3, 4), dtype)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", [False, True])
def test_round_trip_is_bit_equal(tmp_path, dtype, device):
    arrays = some_arrays(jnp.dtype(dtype))
    write_orbax(tmp_path / "out", CONFIG, {k: jnp.asarray(v) if device else v for k, v in arrays.items()})
    config, restored = read_orbax(tmp_path / "out")
    assert config == CONFIG
    assert read_manifest(tmp_path / "out").dtype == dtype
    assert restored.keys() == arrays.keys()
    for name, array in arrays.items():
        assert isinstance(restored[name], np.ndarray)
        assert restored[name].dtype == array.dtype
        assert restored[name].tobytes() == array.tobytes()


def test_arrays_land_on_the_mesh_they_are_asked_for(tmp_path):
    arrays = {"projector.linear.kernel": np.arange(16.0, dtype=np.float32).reshape(4, 4)}
    write_orbax(tmp_path / "out", CONFIG, arrays)
    sharding = NamedSharding(make_mesh(MeshConfig(fsdp=4, tensor=2)), PartitionSpec("fsdp", "tensor"))
    restored = read_orbax(tmp_path / "out", dict.fromkeys(arrays, sharding))[1]["projector.linear.kernel"]
    assert isinstance(restored, jax.Array) and restored.sharding == sharding
    np.testing.assert_array_equal(restored, arrays["projector.linear.kernel"])


def unread(array, *, stacked, layers=None):
    """Return an array that is still to be read, its matrices transposed in memory as they come from a file."""
    parts = [np.asfortranarray(layer) for layer in (array if stacked else [array])]
    return LazyArray("x", array.shape, array.dtype, stacked, lambda: [lambda _, p=p: p for p in parts[:layers]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "stacked", "chunks", "files"),
    [
        ((3, 20, 14), True, (1, 5, 7), 24),
        ((3, 18, 2, 20), True, (1, 5, 2, 5), 48),  # the last rows do not fill a file
        ((33, 6), False, (17, 6), 2),
        ((3, 5), True, (3, 5), 1),
        ((7,), False, (7,), 1),
    ],
)
def test_arrays_written_as_they_are_read_are_bit_equal(tmp_path, monkeypatch, shape, stacked, chunks, files, dtype):
    values = np.random.default_rng(0).integers(0, 256, (*shape, jnp.dtype(dtype).itemsize), np.uint8)
    expected = values.view(dtype)[..., 0]
    monkeypatch.setattr(chunk_files, "CHUNK_BYTES", 52 * expected.itemsize if stacked else 130 * expected.itemsize)
    arrays = {"projector.linear.kernel": unread(expected, stacked=stacked), "other": np.ones(3, np.float32)}
    write_orbax(tmp_path / "out", CONFIG, arrays)
    directory = tmp_path / "out" / "params" / "state" / "projector.linear.kernel"
    assert tuple(json.loads((directory / ".zarray").read_text())["chunks"]) == chunks
    assert len(list(directory.glob("[0-9]*"))) == files
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(directory)}}
    for found in (
        read_orbax(tmp_path / "out")[1]["projector.linear.kernel"],
        np.asarray(open_orbax(tmp_path / "out")[1]["projector.linear.kernel"]),
        tensorstore.open(spec, open=True).result().read().result(),
    ):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()


def test_shards_of_an_array_written_as_it_was_read(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_files, "CHUNK_BYTES", 2**8)
    expected = np.arange(3 * 20 * 14, dtype=np.float32).reshape(3, 20, 14)
    write_orbax(tmp_path / "out", CONFIG, {"projector.linear.kernel": unread(expected, stacked=True)})
    sharding = NamedSharding(make_mesh(MeshConfig(fsdp=4, tensor=2)), PartitionSpec(None, "fsdp", "tensor"))
    restored = read_orbax(tmp_path / "out", {"projector.linear.kernel": sharding})[1]["projector.linear.kernel"]
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, expected)


def test_an_array_with_too_few_layers_is_not_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_files, "CHUNK_BYTES", 2**8)
    arrays = {"projector.linear.kernel": unread(np.zeros((3, 20, 14), np.float32), stacked=True, layers=2)}
    with pytest.raises(ValueError, match="zip"):
        write_orbax(tmp_path / "out", CONFIG, arrays)
    assert not list(tmp_path.iterdir())


def test_small_files_are_copied_byte_for_byte(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    values, adapter = CONFIG.to_hf()
    files = {
        "config.json": json.dumps({**values, "anything": "else"}),
        "adapter_config.json": json.dumps(adapter, indent=7),
        "tokenizer.json": "{ }",
        "tokenizer_config.json": "{}",
        "special_tokens_map.json": "{}",
        "added_tokens.json": "{}",
        "vocab.json": "{}",
        "merges.txt": "a b",
        "preprocessor_config.json": "{}",
        "processor_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": "{}",
    }
    for name, content in {**files, "README.md": "", "stale.safetensors": ""}.items():
        (source / name).write_text(content)
    write_orbax(tmp_path / "out", CONFIG, some_arrays(np.float32), source_dir=source)
    written = {file.name: file for file in (tmp_path / "out").iterdir()}
    assert set(written) == {*files, "params", "model_port.json"}
    assert {name: written[name].read_text() for name in files} == files


def test_base_beside_the_checkpoint_moves_with_it(tmp_path):
    (tmp_path / "run" / "base").mkdir(parents=True)
    write_orbax(tmp_path / "run" / "policy", CONFIG, some_arrays(np.float32), base=tmp_path / "run" / "base")
    assert json.loads((tmp_path / "run" / "policy" / "model_port.json").read_text())["base"] == "../base"
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert read_manifest(tmp_path / "moved" / "policy").base == str(tmp_path / "moved" / "base")


def test_base_elsewhere_is_remembered_by_its_full_path(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    write_orbax("run/policy", CONFIG, some_arrays(np.float32), base="models", base_lora="merge")
    manifest = read_manifest("run/policy")
    assert (manifest.base, manifest.base_lora) == (str(tmp_path / "models"), "merge")


def test_missing_base_says_where_it_was(tmp_path):
    write_orbax(tmp_path / "policy", CONFIG, some_arrays(np.float32), base=tmp_path / "base")
    with pytest.raises(UserError, match="holds only the trained parameters; the rest is in its base .*/base, which"):
        read_manifest(tmp_path / "policy")


def test_other_format_is_refused(tmp_path):
    write_orbax(tmp_path / "out", CONFIG, some_arrays(np.float32))
    (tmp_path / "out" / "model_port.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="format 2; this version reads format 1"):
        read_manifest(tmp_path / "out")


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("victim", ["a data file", "all data files", "everything"])
def test_damaged_params_are_named(tmp_path, victim, read):
    noise = np.random.default_rng(0).normal(size=(500, 500)).astype(np.float32)
    write_orbax(tmp_path / "out", CONFIG, {"projector.linear.kernel": noise if read else unread(noise, stacked=False)})
    params = tmp_path / "out" / "params"
    data = sorted((params / "state" / "projector.linear.kernel").glob("[0-9]*"))
    assert data
    if victim == "a data file":
        data[-1].write_bytes(data[-1].read_bytes()[:1000])
    elif victim == "all data files":
        for file in data:
            file.unlink()
    else:
        shutil.rmtree(params)
        params.mkdir()
    with pytest.raises(UserError, match="cannot read .*/params, it is damaged"):
        read_orbax(tmp_path / "out")


def test_absent_params_are_named(tmp_path):
    write_orbax(tmp_path / "out", CONFIG, some_arrays(np.float32))
    shutil.rmtree(tmp_path / "out" / "params")
    with pytest.raises(UserError, match="has no params/; the checkpoint is incomplete"):
        read_orbax(tmp_path / "out")


def test_existing_output_is_left_alone(tmp_path):
    write_orbax(tmp_path / "out", CONFIG, some_arrays(np.float32))
    with pytest.raises(UserError, match="exists and is not empty"):
        write_orbax(tmp_path / "out", CONFIG, some_arrays(np.float32))
