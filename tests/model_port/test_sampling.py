import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model_port.errors import UserError
from model_port.partition import MeshConfig, make_mesh
from model_port.sampling import num_blocks, row_keys, sample, truncate_logits

P, G, V = 3, 5, 13


def log_softmax(logits):
    shifted = np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True)
    with np.errstate(divide="ignore"):
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def nucleus(logits, top_p):
    """The kept ids of one row, straight from the definition."""
    probs = np.exp(log_softmax(logits))
    kept, mass = [], 0.0
    for token in sorted(range(len(probs)), key=lambda i: (-logits[i], i)):
        if mass >= top_p:
            break
        kept.append(token)
        mass += probs[token]
    return sorted(kept)


def kept(logits):
    return np.flatnonzero(np.isfinite(np.asarray(logits))).tolist()


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.05, [2]), (0.39, [2]), (0.41, [0, 2]), (0.69, [0, 2]), (0.71, [0, 2, 3]), (0.95, [0, 1, 2, 3])],
)
def test_nucleus_by_hand(top_p, expected):
    # Probabilities 0.3 0.1 0.4 0.2; in order 0.4 0.3 0.2 0.1; mass before each 0 0.4 0.7 0.9.
    logits = jnp.log(jnp.array([0.3, 0.1, 0.4, 0.2]))
    out = truncate_logits(logits, top_p=top_p)
    assert kept(out) == expected
    assert np.asarray(out)[expected].tolist() == np.asarray(logits)[expected].tolist()


@pytest.mark.parametrize(("top_p", "expected"), [(0.25, [0]), (0.26, [0, 1]), (0.5, [0, 1]), (0.75, [0, 1, 2])])
def test_ties_are_kept_from_the_lower_id(top_p, expected):
    assert kept(truncate_logits(jnp.zeros(4), top_p=top_p)) == expected


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_nucleus_matches_the_definition(top_p):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2.0, size=(P, G, V)).astype(np.float32)
    logits[0] = np.round(logits[0])  # ties
    logits[1, :, ::3] = -np.inf  # forbidden ids
    out = np.asarray(truncate_logits(logits, top_p=top_p))
    for row, original in zip(out.reshape(-1, V), logits.reshape(-1, V), strict=True):
        assert kept(row) == nucleus(original, top_p)


def test_top_p_one_is_the_identity_without_a_sort():
    logits = np.random.default_rng(0).normal(size=(P, V)).astype(np.float32)
    np.testing.assert_array_equal(truncate_logits(logits, top_p=1.0), logits)
    assert not jax.make_jaxpr(lambda x: truncate_logits(x, top_p=1.0))(logits).jaxpr.eqns


def test_greedy_takes_the_first_maximum_and_reports_the_full_softmax():
    logits = np.random.default_rng(0).normal(size=(P, G, V)).astype(np.float32)
    logits[0, 0, [4, 9]] = 5.0
    keys = row_keys(jax.random.key(0), num_prompts=P, num_samples=G)
    tokens, logp = sample(keys, logits, temperature=0.0, top_p=0.5)
    assert tokens.dtype == jnp.int32 and tokens[0, 0] == 4
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_allclose(logp, log_softmax(logits).max(-1), rtol=1e-5)


@pytest.mark.parametrize("vocabulary", [13, 24, 60])  # one block of 13 ids, 8 of 3, 4 of 15
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (2.0, 0.8)])
def test_draws_follow_the_distribution_and_logp_is_that_distribution(vocabulary, temperature, top_p):
    num_prompts, num_samples = 20, 1000
    row = np.random.default_rng(1).normal(scale=3.0, size=vocabulary).astype(np.float32)
    row[3:6] = -np.inf  # a whole block of 24 ids
    scaled = row / temperature
    # Otherwise the order of temperature and truncation would go untested.
    assert top_p == 1 or nucleus(scaled, top_p) != nucleus(row, top_p)
    logits = np.where(np.isin(np.arange(vocabulary), nucleus(scaled, top_p)), scaled, -np.inf)
    expected = log_softmax(logits)
    keys = row_keys(jax.random.key(2), num_prompts=num_prompts, num_samples=num_samples)
    tokens, logp = jax.jit(lambda k, x: sample(k, x, temperature=temperature, top_p=top_p))(
        keys, jnp.broadcast_to(row, (num_prompts, num_samples, vocabulary))
    )
    np.testing.assert_allclose(logp, expected[tokens], rtol=1e-5, atol=1e-6)
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=vocabulary)
    probs = np.exp(expected)
    assert np.all(counts[probs == 0] == 0)
    # Six standard deviations of a binomial count.
    n = num_prompts * num_samples
    assert np.all(np.abs(counts - n * probs) <= 6 * np.sqrt(n * probs * (1 - probs)) + 1e-9)


@pytest.mark.parametrize(("vocabulary", "blocks"), [(49160, 40), (49155, 145), (100352, 256), (100353, 33), (1024, 64)])
def test_blocks_divide_the_vocabulary_as_devices_do(vocabulary, blocks):
    assert num_blocks(vocabulary) == blocks and vocabulary % blocks == 0
    assert all(blocks % tensor == 0 for tensor in (1, 2, 4, 8) if vocabulary % tensor == 0)


def test_the_noise_of_a_row_is_far_less_than_one_number_for_every_id():
    keys = row_keys(jax.random.key(0), num_prompts=1, num_samples=1)
    jaxpr = jax.make_jaxpr(lambda logits: sample(keys, logits, temperature=1.0))(jnp.zeros((1, 1, 49160)))
    drawn = [eqn.outvars[0].aval.shape for eqn in jaxpr.jaxpr.eqns if "gumbel" in str(eqn.params.get("name"))]
    assert drawn == [(1, 1, 40 + 1229)]


def test_rows_draw_independently_and_repeatably():
    logits = jnp.zeros((P, G, V))
    first, _ = sample(row_keys(jax.random.key(0), num_prompts=P, num_samples=G), logits, temperature=1.0, top_p=1.0)
    again, _ = sample(row_keys(jax.random.key(0), num_prompts=P, num_samples=G), logits, temperature=1.0, top_p=1.0)
    other, _ = sample(row_keys(jax.random.key(1), num_prompts=P, num_samples=G), logits, temperature=1.0, top_p=1.0)
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other) and len(np.unique(first)) > 4


def test_keys_belong_to_global_rows():
    whole = jax.random.key_data(row_keys(jax.random.key(7), num_prompts=P, num_samples=G))
    assert len(np.unique(np.asarray(whole).reshape(P * G, -1), axis=0)) == P * G
    for prompt in range(P):
        part = row_keys(jax.random.key(7), num_prompts=1, num_samples=G, first_row=prompt * G)
        np.testing.assert_array_equal(jax.random.key_data(part)[0], whole[prompt])
    traced = jax.jit(lambda first: row_keys(jax.random.key(7), num_prompts=1, num_samples=G, first_row=first))(2 * G)
    np.testing.assert_array_equal(jax.random.key_data(traced)[0], whole[2])


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_draws_do_not_depend_on_the_mesh(top_p):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3, 24)), jnp.float32)

    def draw(logits):
        keys = row_keys(jax.random.key(3), num_prompts=8, num_samples=3)
        return sample(keys, logits, temperature=1.0, top_p=top_p)

    alone = jax.jit(draw)(logits)
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    for spec in (("data",), (("data", "tensor"),), ("data", None, "tensor")):
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        tokens, logp = jax.jit(draw)(jax.device_put(logits, rows))
        np.testing.assert_array_equal(tokens, alone[0])
        np.testing.assert_allclose(logp, alone[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"temperature": 0.0, "top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"temperature": -1.0, "top_p": 1.0}, "temperature must be 0 .greedy. or more, got -1.0"),
    ],
)
def test_wrong_numbers_are_refused(options, message):
    keys = row_keys(jax.random.key(0), num_prompts=P, num_samples=G)
    with pytest.raises(UserError, match=message):
        sample(keys, jnp.zeros((P, G, V)), **options)
