"""Weights pass through little memory, and a disk that fills up or a user who interrupts leaves nothing behind."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import namedtuple

import ml_dtypes
import numpy as np
import pytest

from model_port import cli
from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.weights import chunk_files, names, tree
from model_port.weights.convert import convert, export, load_model, open_model
from model_port.weights.hf_writer import write_hf
from model_port.weights.lazy import LazyArray, copy
from tests.disks import files_at_most

TINY = GraniteSpeechConfig.tiny()
WIDE = dataclasses.replace(
    TINY,
    decoder=dataclasses.replace(TINY.decoder, hidden_size=256, intermediate_size=2048, num_hidden_layers=8),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of 30 MB, noise in bfloat16."""
    random = np.random.default_rng(0)
    arrays = {path: random.normal(size=shape).astype(ml_dtypes.bfloat16) for path, shape in tree.shapes(WIDE).items()}
    directory = tmp_path_factory.mktemp("wide") / "source"
    write_hf(directory, WIDE, arrays)
    return directory


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wide_orbax") / "out"
    convert(source, out)
    return out


# ---- memory


@contextlib.contextmanager
def at_most(limit):
    """What Python and NumPy allocate in the block stays below `limit` bytes."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def test_a_conversion_holds_some_layers_and_an_export_one_stacked_parameter(source, tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_files, "CHUNK_BYTES", 2**19)
    sizes = sorted(array.nbytes for array in open_model(source)[1].values())
    assert sum(sizes) > 3 * sizes[-1] > 2**24
    with at_most(sizes[-1]):
        convert(source, tmp_path / "orbax")
    with at_most(sizes[-1] + 2**23):
        export(tmp_path / "orbax", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_merged_and_cast_weights_stream_too(source, tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_files, "CHUNK_BYTES", 2**19)
    largest = max(array.nbytes for array in open_model(source)[1].values())
    with at_most(largest + 2**23):
        convert(source, tmp_path / "orbax", lora="merge", dtype="float32")


@pytest.mark.parametrize("shape", [(3, 5), (300, 200), (130, 2, 140), (7,), (1030, 515)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_tiles_cover_a_transposed_array(shape, dtype):
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape).astype(dtype)
    out = np.zeros(shape[::-1], dtype)
    copy(out, value.T, "x")
    assert out.tobytes() == np.ascontiguousarray(value.T).tobytes()


def test_an_array_with_too_few_layers_is_not_half_read():
    lazy = LazyArray("x", (3, 2), np.dtype(np.float32), True, lambda: [lambda scratch: np.zeros(2, np.float32)] * 2)
    with pytest.raises(ValueError, match="zip"):
        lazy.load()


def test_a_shard_that_vanishes_while_it_is_read_is_named(source, tmp_path):
    shutil.copytree(source, tmp_path / "copy")
    _, arrays = open_model(tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
        arrays[names.EMBEDDING].load()


# ---- disks and interruptions


@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_disk_that_fills_up_is_named_and_nothing_is_left(command, source, checkpoint, tmp_path, capsys):
    with files_at_most(2**20):
        status = cli.main([command, str({"convert": source, "export": checkpoint}[command]), str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert status == 2 and "cannot write" in message and "make room or choose another" in message
    assert "Traceback" not in message and not list(tmp_path.iterdir())


def test_a_disk_without_room_is_known_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(UserError, match=r"has 0\.00 GB free and the weights take 0\.03 GB"):
        convert(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["convert", "export"])
def test_an_interruption_leaves_nothing_and_the_command_runs_again(
    command, source, checkpoint, tmp_path, capsys, monkeypatch
):
    arguments = [command, str({"convert": source, "export": checkpoint}[command]), str(tmp_path / "out")]

    @contextlib.contextmanager
    def interrupted(total):
        def stop(size):
            if size:  # no sooner than something is written
                raise KeyboardInterrupt

        yield stop

    with monkeypatch.context() as patch:
        patch.setattr(cli, "_bar", interrupted)
        assert cli.main(arguments) == 130
    assert "interrupted" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert cli.main(arguments) == 0
    assert load_model(tmp_path / "out", dtype="bfloat16").config == WIDE


def test_a_killed_conversion_looks_like_none_and_runs_again(source, tmp_path):
    code = (
        "import os, signal; from model_port.weights import orbax_files\n"
        "orbax_files.to_json = lambda value: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"from model_port.weights.convert import convert; convert({str(source)!r}, {str(tmp_path / 'out')!r})"
    )
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial-write"]
    convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / "model_port.json").read_text())["dtype"] == "bfloat16"


def test_progress_counts_every_byte(source, checkpoint, tmp_path):
    def run(function, *paths):
        totals, done = [], []

        @contextlib.contextmanager
        def progress(total):
            totals.append(total)
            yield done.append

        function(*paths, progress=progress)
        return totals, sum(done)

    size = sum(array.nbytes for array in open_model(source)[1].values())
    assert run(convert, source, tmp_path / "orbax") == ([size], size)
    totals, done = run(export, checkpoint, tmp_path / "back")
    counters = 8 * WIDE.encoder.num_layers  # BatchNorm's, which transformers expects in a file
    assert (totals, done) == ([size], size + counters)
