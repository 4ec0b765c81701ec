"""Fault 9: loss, gradient and samples are the same on any mesh and for any number of micro-batches.

Rematerialisation and the chunks that log-probs are computed in change nothing either.
"""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.compiling import compiled_fully
from tests.invariance.compiled import decoding_collectives
from tests.invariance.run import Run, gradient_error

MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2)]
TOLERANCE = 1e-5


def assert_same_update(ours, expected):
    (gradient, metrics), (expected_gradient, expected_metrics) = ours, expected
    assert metrics.keys() == expected_metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=TOLERANCE, atol=1e-6, err_msg=name)
    error, name = gradient_error(gradient, expected_gradient)
    assert error < TOLERANCE, f"{name}: {error:.1e} of its largest component"


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_samples_loss_and_gradient_do_not_depend_on_the_mesh(mesh, run, out, targets, gradient):
    ours = Run(mesh=mesh)
    split = [leaf for leaf in ours.trained.values() if not leaf.sharding.is_fully_replicated]
    assert bool(split) == (mesh[1] * mesh[2] > 1)
    encoded = ours.encode()
    assert len(encoded.sharding.device_set) == 8
    np.testing.assert_allclose(encoded, run.encode(), atol=TOLERANCE)
    samples = jax.device_get(ours.rollout())
    np.testing.assert_array_equal(samples.tokens, out.tokens)
    np.testing.assert_array_equal(samples.mask, out.mask)
    np.testing.assert_allclose(samples.logp, out.logp, atol=TOLERANCE)
    assert_same_update(ours.gradient(targets), gradient)


def weight_shapes(run):
    """Shapes of the decoder's weights, of one layer where they are stacked, as they would be whole over fsdp."""
    shapes = set()
    for name, value in {**run.trained, **run.frozen}.items():
        if name.startswith(("decoder.", "lm_head.")) and value.ndim > 1:
            whole = tuple(axis if axis != "fsdp" else None for axis in value.sharding.spec)
            shard = NamedSharding(run.mesh, PartitionSpec(*whole)).shard_shape(value.shape)
            shard = shard[1:] if ".layers." in name else shard
            shapes |= {shard, shard[::-1], value.shape, value.shape[-2:]}
    return shapes


@pytest.mark.parametrize("layers", ["scanned", "unrolled"])
@pytest.mark.parametrize(("weights", "mesh"), [("gathered", (2, 2, 2)), ("stationary", (1, 4, 2))], ids=str)
def test_decoding_a_token_moves_no_weights(weights, mesh, layers, out):
    """Neither layout gathers a weight inside the decoding loop, and neither changes a sample.

    Of the program that runs: the compiler's optimisations move collectives, so all of them are on.
    """
    ours = Run(mesh=mesh, rollout_weights=weights, rollout_layers=layers)
    with compiled_fully():
        samples, text = ours.compiled_rollout()
    np.testing.assert_array_equal(samples.tokens, out.tokens)
    np.testing.assert_allclose(samples.logp, out.logp, atol=TOLERANCE)
    found = decoding_collectives(text)
    assert any(each.operation == "all-reduce" for each in found)
    moved = {array.dims for each in found if each.operation == "all-gather" for array in each.result}
    assert not moved & weight_shapes(ours)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ((1, 1, 1), {"micro_batches": 4, "logprob_chunk": 24}),
        ((2, 2, 2), {"micro_batches": 2, "remat": "full"}),
    ],
    ids=str,
)
def test_loss_and_gradient_do_not_depend_on_micro_batches(mesh, options, targets, gradient):
    """The completions differ in length, so a mean over micro-batches of their means would be another loss."""
    assert len(set(targets.mask.sum((1, 2)))) > 1
    assert_same_update(Run(mesh=mesh, **options).gradient(targets), gradient)
