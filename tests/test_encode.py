"""Kept encoder output goes to the rows it belongs to, whatever the order and the padding of a batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.data.pipeline import PromptBatch, PromptData
from jgrpo.programs.encode import ClipEncoder
from jgrpo.programs.steps import Programs
from jgrpo.runtime.rows import place
from model_port.batch import Batch
from model_port.partition import MeshConfig, make_mesh

GAIN = {"gain": jnp.float32(2.0)}
LENGTHS = [3, 7, 5, 2, 6]  # frames per clip, one clip an example


def prompts(indices, *, frames):
    """A batch whose clip i holds 10 i + 1, 10 i + 2, ... and zeros after its length."""
    features = np.zeros((len(indices), 1, frames, 160), np.float32)
    for row, i in enumerate(indices):
        features[row, 0, : LENGTHS[i]] = 10 * i + 1 + np.arange(LENGTHS[i])[:, None]
    text = np.zeros((len(indices), 4), np.int32)
    batch = Batch(
        tokens=text,
        mask=text == 0,
        audio_slots=text,
        features=features,
        lengths=np.array([[LENGTHS[i]] for i in indices], np.int32),
    )
    return PromptBatch(
        batch=batch,
        indices=np.array(indices),
        references=[],
        columns={},
    )


class Data(PromptData):
    """A manifest of five clips, in batches of two; the last one repeats a row."""

    def __init__(self):
        pass

    def __len__(self):
        return 5

    def epoch(self):
        yield prompts([0, 1], frames=8)
        yield prompts([2, 3], frames=6)
        yield prompts([4, 4], frames=8)


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig())


@pytest.fixture
def encoder(mesh):
    calls = []

    def encode(params, frozen, batch):
        calls.append(1)
        return batch.features[..., :3] * params["gain"]

    programs = Programs(**{field.name: encode for field in dataclasses.fields(Programs)})
    encoder = ClipEncoder(programs, {}, mesh)
    encoder.calls = calls
    return encoder


@pytest.mark.parametrize("frames", [7, 8, 11])
@pytest.mark.parametrize("indices", [[4, 0, 1], [1, 1, 2], [3]])
def test_kept_output_is_what_encoding_the_batch_gives(encoder, mesh, indices, frames):
    data = Data()
    encoder.keep(GAIN, data)
    assert len(encoder.calls) == 3
    asked = prompts(indices, frames=frames)
    found = encoder(GAIN, data, asked, place(asked.batch, mesh))
    assert len(encoder.calls) == 3
    np.testing.assert_array_equal(jax.device_get(found), asked.batch.features[..., :3] * 2.0)


def test_other_data_is_encoded_every_time(encoder, mesh):
    encoder.keep(GAIN, Data())
    other = Data()
    asked = prompts([1, 0], frames=8)
    found = encoder(GAIN, other, asked, place(asked.batch, mesh))
    assert len(encoder.calls) == 4
    np.testing.assert_array_equal(jax.device_get(found), asked.batch.features[..., :3] * 2.0)
