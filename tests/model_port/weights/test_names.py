"""The table of names: complete, one to one, and saying the right thing about layouts."""

import dataclasses

import numpy as np
import pytest
import torch

from model_port.config import LORA_TARGETS, GraniteSpeechConfig, LoraConfig
from model_port.weights import names, tree
from tests.hf_tiny import make_hf_model

EVERYTHING = GraniteSpeechConfig.tiny(lora=LoraConfig(rank=4, target_modules=LORA_TARGETS), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def shapes():
    return tree.shapes(EVERYTHING)


@pytest.fixture(scope="module")
def state():
    """The state dict of transformers, under published names."""
    tensors = make_hf_model(EVERYTHING).state_dict()
    return {name: value.numpy() for key, value in tensors.items() if (name := names.normalise(key))}


def test_table_has_exactly_the_parameters_of_the_model(shapes):
    assert set(names.BY_PATH) == set(shapes)
    assert len(names.BY_PATH) == len(names.BY_NAME) == len(names.TABLE)


def test_table_has_exactly_the_tensors_of_transformers(shapes, state):
    assert not [name for name in state if names.lookup(name) is None]
    layers = {entry: range(shapes[entry.path][0]) if entry.stacked else [None] for entry in names.TABLE}
    assert {names.lookup(name) for name in state} == {(entry, layer) for entry in layers for layer in layers[entry]}


@pytest.mark.parametrize("entry", names.TABLE, ids=lambda entry: entry.path)
def test_transforms_are_inverse_and_give_the_shapes_of_transformers(entry, shapes, state):
    stored = state[entry.name.format(l=1)]
    ours = entry.transform.read(stored)
    np.testing.assert_array_equal(entry.transform.write(ours), stored)
    shape = shapes[entry.path]
    assert ours.shape == (shape[1:] if entry.stacked else shape)
    assert entry.transform.stored_shape(ours.shape) == stored.shape


def test_linear_layers_compute_what_torch_computes():
    x, weight = np.float32([1, 10]), np.float32([[1, 2], [3, 4], [5, 6]])  # (out 3, in 2)
    expected = torch.nn.functional.linear(torch.tensor(x), torch.tensor(weight)).numpy()
    np.testing.assert_array_equal(expected, [21, 43, 65])
    np.testing.assert_array_equal(x @ names.TRANSPOSED.read(weight), expected)
    np.testing.assert_array_equal(x @ names.POINTWISE.read(weight[:, :, None]), expected)


def test_a_pair_is_the_first_half_of_the_rows_then_the_second():
    x, weight = np.float32([1, 10]), np.float32([[1, 0], [0, 1], [2, 0], [0, 2]])  # (2 * out 2, in 2)
    first, second = np.einsum("i,ipo->po", x, names.PAIR.read(weight))
    np.testing.assert_array_equal(first, [1, 10])
    np.testing.assert_array_equal(second, [2, 20])
    np.testing.assert_array_equal(names.POINTWISE_PAIR.read(weight[:, :, None]), names.PAIR.read(weight))
    np.testing.assert_array_equal(names.VECTOR_PAIR.read(np.float32([1, 2, 3, 4])), [[1, 2], [3, 4]])


def test_depthwise_keeps_the_order_of_taps():
    weight = np.float32([[[1, 2, 3]], [[4, 5, 6]]])  # (channels 2, 1, width 3)
    np.testing.assert_array_equal(names.DEPTHWISE.read(weight), [[1, 4], [2, 5], [3, 6]])


@pytest.mark.parametrize(
    ("key", "published"),
    [
        ("encoder.out.bias", "encoder.out.bias"),
        ("model.encoder.out.bias", "encoder.out.bias"),
        ("base_model.model.model.encoder.out.bias", "encoder.out.bias"),
        ("base_model.model.encoder.out.bias", "encoder.out.bias"),
        ("model.projector.query", "projector.query"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("language_model.lm_head.weight", "language_model.lm_head.weight"),
        ("model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("model.language_model.layers.0.q_proj.base_layer.weight", "language_model.model.layers.0.q_proj.weight"),
        ("base_model.model.language_model.model.norm.weight", "language_model.model.norm.weight"),
        ("language_model.model.q_proj.lora_A.default.weight", "language_model.model.q_proj.lora_A.weight"),
        ("base_model.model.model.language_model.q_proj.lora_B.weight", "language_model.model.q_proj.lora_B.weight"),
        ("encoder.layers.3.conv.batch_norm.num_batches_tracked", None),
        ("model.encoder.attention_dists", None),
    ],
)
def test_normalise_undoes_every_known_spelling(key, published):
    assert names.normalise(key) == published


def test_lookup_finds_the_layer_and_refuses_strangers():
    entry, layer = names.lookup("encoder.layers.12.attn.to_kv.weight")
    assert (entry.path, layer) == ("encoder.layers.attn.to_kv.kernel", 12)
    assert names.lookup("encoder.layers.12.attn.to_nothing.weight") is None
    assert names.lookup("encoder.layers.twelve.attn.to_kv.weight") is None
    # A stack's row names a layer, always.
    assert names.lookup("encoder.layers.{l}.attn.to_kv.weight") is None


def test_a_tied_model_lacks_the_head_alone(shapes):
    tied = dataclasses.replace(EVERYTHING, tie_word_embeddings=True)
    assert set(shapes) - set(tree.shapes(tied)) == {names.LM_HEAD}
