"""Beam search against transformers and against a search without a cache."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
import torch

from model_port.beam import beam_search
from model_port.errors import UserError
from model_port.generate import generate
from model_port.params import split_model
from model_port.weights.convert import build_model
from tests.compiling import compiled_quickly
from tests.invariance.tiny import at, clip, full_forward, make_batch
from tests.parity.pairs import DIVIDES, UNTIED, make_pair, torch_of

T = 9
# One clip each: for beams, transformers repeats clip by clip and not row by row, and mixes up those of a prompt.
PROMPTS = [
    [5, 6, clip(13), 17, 3],
    [5, clip(15, seed=3), 9],
    [clip(37), 17, 3, 40, 41, 42, 43],
    [7, 8, clip(21, seed=1), 9],
]
# Wide enough apart that several hypotheses live, close enough that some of them end early.
EOS = tuple(range(20, 44))


@contextlib.contextmanager
def policy_head(reference):
    """Let the reference's head give policy logits: scaled, and without the audio token before the softmax."""

    def hook(module, inputs, logits):
        logits = logits if DIVIDES else logits / reference.config.text_config.logits_scaling
        logits[..., reference.config.audio_token_id] = float("-inf")
        return logits

    handle = reference.get_output_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def hf_beams(reference, batch, p, **options):
    """The reference's tokens for one prompt by itself, up to and including the end token."""
    ids = torch_of(batch.tokens[p][batch.mask[p]])[None]
    clips = torch.stack([torch_of(item) for item in PROMPTS[p] if not isinstance(item, int)])
    fixed = {"max_new_tokens": T, "do_sample": False, "early_stopping": False, "pad_token_id": 0}
    with policy_head(reference), torch.no_grad():
        mask = torch.ones_like(ids)
        out = reference.generate(ids, input_features=clips, attention_mask=mask, **fixed, **options)
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """Accelerators would multiply in fewer bits than float32 has. Compiling takes longer than running here."""
    with compiled_quickly(), jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(transformers model, our model)."""
    return make_pair(UNTIED, tmp_path_factory.mktemp("beam"))


@pytest.fixture(scope="module")
def batch(pair):
    return make_batch(pair[1].config, PROMPTS, frames=50, tokens=40)


def ending_at(model, *eos):
    """The model with other end tokens."""
    return build_model(dataclasses.replace(model.config, eos_token_ids=eos), dict(split_model(model)[1]))


def completions(out):
    """The tokens of each prompt's completion."""
    tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
    return [row[0][keep[0]].tolist() for row, keep in zip(tokens, mask, strict=True)]


@pytest.mark.parity
@pytest.mark.parametrize("num_beams, length_penalty, eos", [(2, 1.0, EOS[:3]), (4, 1.0, EOS), (3, 0.0, EOS)])
def test_equals_transformers_token_for_token(pair, batch, num_beams, length_penalty, eos):
    reference, model = pair
    options = {"num_beams": num_beams, "length_penalty": length_penalty}
    expected = [hf_beams(reference, batch, p, eos_token_id=list(eos), **options) for p in range(len(PROMPTS))]
    ours = completions(beam_search(ending_at(model, *eos), batch, max_new_tokens=T, **options))
    assert ours == expected


@pytest.fixture(scope="module")
def found(pair, batch):
    """(model, its completions by four beams)."""
    model = ending_at(pair[1], *EOS)
    return model, beam_search(model, batch, num_beams=4, max_new_tokens=T)


def test_some_completions_end_early_and_some_do_not(found):
    lengths = {len(row) for row in completions(found[1])}
    assert len(lengths) > 1


def test_log_probs_are_those_of_a_full_forward_pass(found, batch):
    model, out = found
    mask = np.asarray(out.mask)
    logp = at(full_forward(model, batch, out.tokens), out.tokens)
    np.testing.assert_allclose(np.asarray(out.logp)[mask], logp[mask], atol=1e-4)
    assert not np.asarray(out.logp)[~mask].any() and not np.asarray(out.tokens)[~mask].any()


def test_finds_the_best_of_all_completions_where_nothing_is_pruned(pair, batch):
    """With a beam for every token, two steps are an exhaustive search."""
    model = ending_at(pair[1], *EOS)
    vocab = model.config.decoder.vocab_size
    out = beam_search(model, batch, num_beams=vocab, max_new_tokens=2)
    tokens = np.zeros((len(PROMPTS), vocab, 2), np.int32)
    tokens[:, :, 0] = np.arange(vocab)
    logp = full_forward(model, batch, tokens)
    first, second = logp[:, 0, 0], logp[:, :, 1]
    one = np.where(np.isin(np.arange(vocab), EOS), first, -np.inf)
    two = (np.where(np.isin(np.arange(vocab), EOS), -np.inf, first) + second.max(-1)) / 2
    for p, row in enumerate(completions(out)):
        assert len(row) == (1 if one[p].max() > two[p].max() else 2)
        best = one[p].argmax() if len(row) == 1 else two[p].argmax()
        assert row == [best, second[p, best].argmax()][: len(row)]


def test_one_beam_is_greedy(pair, batch):
    model = ending_at(pair[1], *EOS)
    greedy = generate(model, batch, max_new_tokens=T, temperature=0)
    out = beam_search(model, batch, num_beams=1, max_new_tokens=T)
    assert completions(out) == completions(greedy)


def test_a_prompt_is_searched_as_if_alone(found, batch):
    model, out = found
    for p in range(len(PROMPTS)):
        alone = beam_search(model, jax.tree.map(lambda x, p=p: x[p : p + 1], batch), num_beams=4, max_new_tokens=T)
        assert completions(alone) == completions(out)[p : p + 1]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"num_beams": 0}, "num_beams must be at least 1, which decodes greedily, got 0"),
        ({"num_beams": 2, "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty must be a finite number, got nan"),
    ],
)
def test_options_out_of_range(pair, batch, options, expected):
    with pytest.raises(UserError, match=expected):
        beam_search(pair[1], batch, **options)
