"""Checkpoints come back bit for bit, and damage is found and survived."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jgrpo.runtime.checkpoint import RunCheckpoints
from model_port.errors import UserError
from tests.disks import files_at_most


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.sharding == y.sharding
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def small_tree(step):
    """w is large enough for a data file of its own, and does not compress."""
    w = np.random.default_rng(step).normal(size=(29, 31)).astype(np.float32)
    return {"w": jnp.asarray(w), "b": jnp.full((3,), step, jnp.bfloat16)}


def save_steps(directory, *steps, **options):
    with RunCheckpoints(directory, **options) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, small_tree(step), {"step": step})


def test_every_kind_of_leaf_returns_bit_for_bit(tmp_path):
    odd = np.array([0x7FC00001, 0x80000000, 0x00000001, 0x7F800000], np.uint32).view(np.float32)  # NaN payload, -0, ...
    tree = {
        "float32": jnp.asarray(odd),
        "bfloat16": jnp.arange(15, dtype=jnp.bfloat16).reshape(3, 5) / 7,
        "int32": jnp.array(-7),
        "bool": jnp.array([True, False]),
        "typed_key": jax.random.key(3),
        "raw_key": jax.random.PRNGKey(4),
    }
    host = {"step": 5, "best": {"bleu": 0.1, "step": 3}, "seed": 7, "name": "ü"}
    with RunCheckpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.save(5, tree, host)
    with RunCheckpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.restore(abstract(tree))
    same_bits(restored.arrays, tree)
    assert restored.host == host and restored.step == 5


def test_nnx_state_and_optimiser_state_return_in_their_types(tmp_path):
    params = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    _, state = optimiser.update(jax.tree.map(jnp.ones_like, params), optimiser.init(params), params)
    tree = {"params": params, "optimiser": state}
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {})
        same_bits(checkpoints.restore(abstract(tree)).arrays, tree)


def test_restores_onto_another_mesh_and_buffers_may_be_donated(tmp_path):
    def sharding(data, tensor, *spec):
        mesh = jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        return NamedSharding(mesh, P(*spec))

    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    tree = {"w": jax.device_put(values, sharding(4, 2, "data", "tensor"))}
    overwrite = jax.jit(lambda x: jax.tree.map(jnp.zeros_like, x), donate_argnums=0)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {})
        jax.block_until_ready(overwrite(tree))
        target = sharding(2, 4, "tensor", None)
        restored = checkpoints.restore({"w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=target)})
    assert restored.arrays["w"].sharding == target
    np.testing.assert_array_equal(np.asarray(restored.arrays["w"]), values)


def test_saves_on_its_interval_and_keeps_the_newest(tmp_path):
    with RunCheckpoints(tmp_path, keep=2, save_every=2) as checkpoints:
        assert checkpoints.latest_step() is None
        saved = [step for step in range(1, 8) if checkpoints.save(step, small_tree(step), {})]
        assert checkpoints.save(7, small_tree(7), {}, force=True)
        assert not checkpoints.save(7, small_tree(7), {}, force=True)
        assert checkpoints.latest_step() == 7
    assert saved == [2, 4, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "7"]


def data_file(step_directory: Path) -> Path:
    files = (step_directory / "state" / "ocdbt.process_0" / "d").iterdir()
    return max(files, key=lambda path: path.stat().st_size)


def truncate(step_directory):
    path = data_file(step_directory)
    path.write_bytes(path.read_bytes()[:1000])


def flip_a_bit(step_directory):
    path = data_file(step_directory)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def remove_a_file(step_directory):
    (step_directory / "state" / "_METADATA").unlink()


def remove_the_record(step_directory):
    (step_directory / "_CHECKPOINT_METADATA").unlink()


def change_the_record(step_directory):
    path = step_directory / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["custom_metadata"]["host"]["step"] = 99
    path.write_text(json.dumps(content))


def empty(step_directory):
    shutil.rmtree(step_directory)
    step_directory.mkdir()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove_a_file, remove_the_record, change_the_record, empty])
def test_a_damaged_newest_checkpoint_falls_back_aloud(tmp_path, caplog, damage):
    save_steps(tmp_path, 3, 4)
    damage(tmp_path / "4")
    with RunCheckpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(small_tree(0)))
        same_bits(restored.arrays, small_tree(3))
        assert restored.step == 3 and restored.host == {"step": 3}
        assert f"{tmp_path / '4'} is damaged" in caplog.text
        assert checkpoints.latest_step() == 3
        assert checkpoints.save(4, small_tree(4), {"step": 4})
        assert checkpoints.restore(abstract(small_tree(0))).step == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4", "damaged-4"]


def test_a_save_that_was_killed_is_ignored_aloud_and_removed(tmp_path, caplog):
    save_steps(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    (tmp_path / "2.orbax-checkpoint-tmp" / "commit_success.txt").unlink()
    with RunCheckpoints(tmp_path) as checkpoints:
        assert "2.orbax-checkpoint-tmp is a checkpoint whose save was interrupted" in caplog.text
        assert checkpoints.restore(abstract(small_tree(0))).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_disk_that_is_full_is_said_and_the_checkpoints_before_stay(tmp_path):
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, small_tree(1), {})
        checkpoints.wait()
        with files_at_most(2000), pytest.raises(UserError, match=r"cannot write .*: File too large; make room"):
            checkpoints.save(2, small_tree(2), {})
            checkpoints.wait()
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.restore(abstract(small_tree(0))).step == 1
        assert checkpoints.save(2, small_tree(2), {})
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_nothing_sound_and_nothing_at_all_are_said(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="no checkpoint in"):
        checkpoints.restore(abstract(small_tree(0)))
    save_steps(tmp_path, 1, 2)
    for step in ("1", "2"):
        truncate(tmp_path / step)
    with RunCheckpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=r"is damaged \(steps 1, 2\)"):
        checkpoints.restore(abstract(small_tree(0)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"], "nothing is set aside without a replacement"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": jnp.zeros((2, 4))}, r"w is float32\[29, 31\] in the checkpoint and float32\[2, 4\] in this run"),
        ({"b": jnp.zeros((3,))}, r"b is bfloat16\[3\] in the checkpoint and float32\[3\] in this run"),
        ({"new": jnp.zeros((3,))}, r"new is absent in the checkpoint and float32\[3\] in this run"),
        ({"b": None}, r"b is bfloat16\[3\] in the checkpoint and absent in this run"),
    ],
)
def test_a_checkpoint_of_another_model_names_the_parameter(tmp_path, change, message):
    save_steps(tmp_path, 1)
    with RunCheckpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore(abstract(small_tree(0) | change))


def test_intervals_below_one_are_refused(tmp_path):
    with pytest.raises(UserError, match="save_every is 0"):
        RunCheckpoints(tmp_path, save_every=0)
