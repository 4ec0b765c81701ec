"""The calls of a run as shapes are those of the run: its programs take them, and its arrays lie like them."""

import bisect
import dataclasses
import json

import jax
import numpy as np
import pytest

from jgrpo.config import EvalOptions, GRPOOptions
from jgrpo.planning.arrays import chip_bytes, model_config
from jgrpo.planning.cost import program_cost
from jgrpo.planning.programs import calls
from jgrpo.programs.layout import choose_weights
from model_port.errors import UserError
from model_port.partition import MeshConfig
from model_port.published import PUBLISHED


def change(config, **fields):
    """Replace fields; dicts replace fields of the parts."""
    parts = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return dataclasses.replace(config, **parts)


def zeros(shapes):
    """Return arrays of these shapes, laid out like them."""
    return {name: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding) for name, leaf in shapes.items()}


def names(run, clip):
    return [(call.name, call.times) for call in calls(run, clip)]


def test_calls_of_grpo(config, make_run):
    assert names(*make_run(config)) == [("encode", 1), ("layout", 1), ("rollout", 1), ("score", 1), ("update", 1)]
    without = change(config, grpo={"beta": 0.0, "num_iterations": 2, "rollout_chunks": 2}, data={"cache_encoder": True})
    assert names(*make_run(without)) == [("layout", 1), ("rollout", 2), ("update", 2)]
    # In float32 stationary weights lie as in training, so that nothing is moved for the rollout.
    stationary = dataclasses.replace(without, rollout_weights="stationary")
    assert names(*make_run(stationary)) == [("rollout", 2), ("update", 2)]


@pytest.mark.parametrize(("layers", "trips"), [("scanned", 199), ("unrolled", 50)])
def test_the_stages_of_decoding_share_its_tokens(config, make_run, layers, trips):
    run, clip = make_run(dataclasses.replace(config, max_completion_tokens=200, rollout_layers=layers))
    assert {call.trips for call in calls(run, clip) if call.name == "rollout"} == {trips}


def test_weights_are_gathered_where_memory_holds_a_copy_or_two_where_layers_are_unrolled(config, make_run):
    run, _ = make_run(config)
    shapes = {**run.frozen, **run.state.params}

    def least(unrolled):
        """Return the least memory, in steps of a tenth, with which they are gathered."""

        def gathered(step):
            options = {"memory": int(1e4 * 1.1**step), "unrolled": unrolled}
            return choose_weights("auto", shapes, run.definition, run.mesh, **options)[0] == "gathered"

        return 1e4 * 1.1 ** bisect.bisect_left(range(100), True, key=gathered)

    assert run.mesh.shape["fsdp"] > 1 and least(True) > 1.3 * least(False)


def test_calls_of_sft_with_a_validation(sft, make_run):
    run, clip = make_run(dataclasses.replace(sft, eval=EvalOptions(every=5, validation_seeds=(0, 1), batch_size=8)))
    assert names(run, clip) == [("encode", 1), ("update", 1), ("validation encode", 0), ("validation rollout", 0)]
    *_, update, _, rollout = calls(run, clip)
    assert update.arguments[-1].mask.shape == (8, 1, 6)
    assert rollout.arguments[-1].shape == (8, 2) and rollout.options["top_p"] == 0.9


def test_the_programs_take_the_calls(config, make_run):
    """They are traced with these shapes, and give what the next one takes."""
    run, clip = make_run(change(config, grpo={"mixed_policy": True}))
    found = {call.name: call for call in calls(run, clip)}
    outs = {}
    with jax.set_mesh(run.mesh):
        for name, call in found.items():
            outs[name] = call.program.eval_shape(*call.arguments, **call.options)
    encoded = found["update"].arguments[3]
    assert (outs["encode"].shape, outs["encode"].dtype) == (encoded.shape, encoded.dtype)
    assert outs["rollout"].tokens.shape == (8, 3, 6)
    assert outs["score"].shape == found["update"].arguments[-1].ref_logp.shape
    state = outs["update"][0]
    assert jax.tree.map(lambda leaf: leaf.shape, state) == jax.tree.map(lambda leaf: leaf.shape, run.state)


def test_the_optimiser_state_lies_as_in_a_run(config, make_run):
    run, _ = make_run(config)
    state = run.programs.init(zeros(run.state.params))
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(run.state.opt_state)
    for real, shape in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(run.state.opt_state), strict=True):
        assert (real.shape, real.dtype) == (shape.shape, shape.dtype)
        assert real.sharding.is_equivalent_to(shape.sharding, real.ndim)


def test_decoding_takes_what_the_layout_gives(config, make_run):
    run, _ = make_run(config)
    for real, shapes in zip(run.programs.layout(zeros(run.state.params), zeros(run.frozen)), run.decoding, strict=True):
        for name, shape in shapes.items():
            assert real[name].dtype == shape.dtype
            assert real[name].sharding.is_equivalent_to(shape.sharding, shape.ndim), name


def test_bytes_of_a_chip(config, make_run):
    run, _ = make_run(config)
    whole = sum(leaf.size * 4 for leaf in run.state.params.values())
    assert whole / 4 < chip_bytes(run.state.params) < whole / 2  # split over fsdp x tensor, but for biases and norms
    assert chip_bytes([run.state.params, run.state.params]) == chip_bytes(run.state.params)


def test_expected_flops_are_those_of_the_program(config, make_run):
    """A chip does its share of them."""
    run, clip = make_run(change(config, mesh=MeshConfig(2, 4, 1), micro_batches=1))
    call = next(call for call in calls(run, clip) if call.name == "score")
    with jax.set_mesh(run.mesh):
        lowered = call.program.lower(*call.arguments, **call.options)
    text = lowered.compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()
    assert program_cost(text, devices=8).flops == pytest.approx(call.flops / 8, rel=0.25)


def test_flops_of_training(config, make_run):
    """The update does three times the work of scoring where only an adapter is trained and layers run again."""
    run, clip = make_run(config)
    found = {call.name: call.flops for call in calls(run, clip)}
    assert found["update"] / found["score"] == pytest.approx(3, rel=0.1)
    plain = change(config, model={"remat": "none", "trainable": ("all",)})
    run, clip = make_run(plain)
    found = {call.name: call.flops for call in calls(run, clip)}
    encoder = 3 * found["encode"]
    assert (found["update"] - encoder) / found["score"] == pytest.approx(3, rel=0.1)


def test_the_model_is_that_of_its_directory_or_of_its_name(config, tmp_path, tiny):
    named = change(config, model={"path": "models/granite-speech-3.3-8b"})
    assert model_config(named) == PUBLISHED["granite-speech-3.3-8b"]
    assert model_config(change(named, model={"lora": "none"})).lora is None
    assert model_config(named, "granite-speech-3.3-2b") == PUBLISHED["granite-speech-3.3-2b"]
    fresh = change(named, model={"lora": "fresh", "lora_rank": 3})
    assert model_config(fresh).lora.rank == 3
    with pytest.raises(UserError, match="no model directory models/tiny, and 'tiny' is no published model.*--model"):
        model_config(config)
    hf, adapter = tiny.to_hf()
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert adapter is None or (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    assert model_config(change(config, model={"path": str(tmp_path)})) == tiny


def test_shapes_follow_the_options(config, make_run):
    run, clip = make_run(change(config, grpo=GRPOOptions(num_samples=4, num_minibatches=2), micro_batches=1))
    update = calls(run, clip)[-1]
    assert (update.name, update.times) == ("update", 2)
    assert update.arguments[2].tokens.shape == (4, clip.tokens)
    assert (clip.frames, clip.tokens) == (50, 8 + 3 * 4)
