import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgrpo.core.logprobs import chunked_logprobs
from model_port.errors import UserError

P, N, D, V = 6, 11, 5, 37
FORBIDDEN = 31  # ids from here on


def make_inputs(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(P, N, D)).astype(np.float32)
    kernel = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(0, FORBIDDEN, (P, N)).astype(np.int32)
    weights = rng.normal(size=(P, N)).astype(np.float32)
    return hidden, kernel, targets, weights


def project(hidden, kernel, floor=-jnp.inf):
    logits = jnp.einsum("PND,DV->PNV", hidden, kernel)
    return jnp.where(jnp.arange(V)[None, None] < FORBIDDEN, logits, floor)


def reference(hidden, kernel, targets, temperature):
    """Log-probabilities, entropies, and d sum(weights * logp) / d hidden and d kernel as functions, in float64."""
    logits = (hidden.astype(np.float64) @ kernel.astype(np.float64) / temperature)[..., :FORBIDDEN]
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    logp = np.log(np.take_along_axis(probs, targets[..., None], -1))[..., 0]
    entropy = -(probs * np.log(probs)).sum(-1)
    error = (np.eye(V)[targets] - np.pad(probs, [(0, 0)] * 2 + [(0, V - FORBIDDEN)])) / temperature
    return logp, entropy, error


@pytest.mark.parametrize(("temperature", "floor"), [(1.0, -np.inf), (0.7, -1e30)])
@pytest.mark.parametrize("chunk_tokens", [1, 2 * P + 1, 4 * P, 10_000])
def test_value_and_gradient_equal_the_whole_computation(chunk_tokens, temperature, floor):
    hidden, kernel, targets, weights = make_inputs()

    def f(hidden, kernel):
        logp, entropy = chunked_logprobs(
            hidden, targets, lambda x: project(x, kernel, floor), chunk_tokens=chunk_tokens, temperature=temperature
        )
        return jnp.sum(weights * logp), (logp, entropy)

    (_, (logp, entropy)), gradients = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, kernel)
    want_logp, want_entropy, error = reference(hidden, kernel, targets, temperature)
    np.testing.assert_allclose(logp, want_logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, want_entropy, rtol=1e-5, atol=1e-5)
    error = weights[..., None] * error
    np.testing.assert_allclose(gradients[0], error @ kernel.T.astype(np.float64), rtol=1e-4, atol=1e-5)
    want_kernel = np.einsum("PND,PNV->DV", hidden.astype(np.float64), error)
    np.testing.assert_allclose(gradients[1], want_kernel, rtol=1e-4, atol=1e-5)


def test_by_hand():
    # Logits ln 1, ln 2, ln 1 and a forbidden id: probabilities 1/4, 1/2, 1/4; entropy 1.5 ln 2.
    hidden = jnp.log(jnp.array([[[1.0, 2.0, 1.0, 0.0]]]))
    logp, entropy = chunked_logprobs(hidden, jnp.array([[1]]), lambda x: x, chunk_tokens=1)
    np.testing.assert_allclose(logp, [[-np.log(2)]], rtol=1e-6)
    np.testing.assert_allclose(entropy, [[1.5 * np.log(2)]], rtol=1e-6)


def truncated(logits, target, top_p, top_k, min_p):
    """Probabilities of one position in the order top_k, top_p, min_p; the target is in their support in any case."""
    probs = np.exp(logits - logits.max())
    order = np.argsort(-probs, kind="stable")
    kept = order[: top_k or len(order)]
    mass = np.cumsum(probs[kept]) / probs[kept].sum()
    kept = kept[np.concatenate([[0.0], mass[:-1]]) < top_p]
    kept = kept[probs[kept] >= min_p * probs.max()]
    inside = np.isin(np.arange(len(probs)), [*kept, target])
    return np.where(inside, probs, 0.0) / probs[inside].sum(), target in kept


@pytest.mark.parametrize(
    "options", [{"top_p": 0.7}, {"top_k": 4}, {"min_p": 0.2}, {"top_p": 0.8, "top_k": 6, "min_p": 0.1}], ids=str
)
def test_truncated_distribution_with_the_target_in_it(options):
    hidden, kernel, targets, weights = make_inputs()

    def f(hidden):
        logp, entropy = chunked_logprobs(
            hidden, targets, lambda x: project(x, kernel), chunk_tokens=12, temperature=0.7, **options
        )
        return jnp.sum(weights * logp), (logp, entropy)

    (_, (logp, entropy)), gradient = jax.jit(jax.value_and_grad(f, has_aux=True))(hidden)
    logits = np.asarray(project(hidden, kernel), np.float64) / 0.7
    outside = 0
    for index in np.ndindex(P, N):
        settings = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, **options}
        probs, ranked = truncated(logits[index], targets[index], **settings)
        outside += not ranked
        assert logp[index] == pytest.approx(np.log(probs[targets[index]]), abs=1e-5)
        some = probs[probs > 0]
        assert entropy[index] == pytest.approx(-(some * np.log(some)).sum(), abs=1e-5)
        slope = weights[index] * (np.eye(V)[targets[index]] - probs) @ kernel.T.astype(np.float64) / 0.7
        np.testing.assert_allclose(gradient[index], slope, rtol=1e-4, atol=1e-5)
    assert 0 < outside < P * N


def test_entropy_has_no_gradient():
    hidden, kernel, targets, _ = make_inputs()
    gradient = jax.grad(
        lambda x: jnp.sum(chunked_logprobs(x, targets, lambda y: project(y, kernel), chunk_tokens=12)[1])
    )
    assert np.all(np.asarray(gradient(hidden)) == 0)


def test_a_forbidden_target_spoils_no_other_position():
    # Padding may hold a forbidden id: its own log-probability is -inf, and masked positions get no cotangent.
    hidden, kernel, targets, weights = make_inputs()
    targets[0, -1] = FORBIDDEN

    def f(hidden):
        logp, entropy = chunked_logprobs(hidden, targets, lambda x: project(x, kernel), chunk_tokens=12)
        return jnp.sum(jnp.where(targets < FORBIDDEN, weights * logp, 0.0)), (logp, entropy)

    (_, (logp, entropy)), gradient = jax.value_and_grad(f, has_aux=True)(hidden)
    assert np.isneginf(logp[0, -1]) and np.sum(~np.isfinite(np.asarray(logp))) == 1
    assert np.all(np.isfinite(entropy)) and np.all(np.isfinite(gradient)) and np.all(gradient[0, -1] == 0)


def array_sizes(jaxpr):
    """Sizes of every array in a jaxpr, those inside its loops and remats too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from array_sizes(getattr(inner, "jaxpr", inner))


def test_no_array_of_all_logits_forward_or_backward():
    hidden, kernel, targets, weights = make_inputs()

    def loss(hidden, kernel, chunk_tokens):
        logp, _ = chunked_logprobs(hidden, targets, lambda x: project(x, kernel), chunk_tokens=chunk_tokens)
        return jnp.sum(weights * logp)

    step = jax.value_and_grad(loss, (0, 1))
    all_logits = P * N * V
    chunk = 2 * P
    sizes = list(array_sizes(jax.make_jaxpr(step, static_argnums=2)(hidden, kernel, chunk).jaxpr))
    assert max(sizes) == chunk * V < all_logits
    # The inspection would see them: in one chunk they exist.
    assert max(array_sizes(jax.make_jaxpr(step, static_argnums=2)(hidden, kernel, P * N).jaxpr)) == all_logits
    text = jax.jit(step, static_argnums=2).lower(hidden, kernel, chunk).compile().as_text()
    assert f"f32[{P},2,{V}]" in text and f",{N},{V}]" not in text and f"[6,{P},2,{V}]" not in text


def test_prompts_stay_sharded():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    hidden, kernel, targets, _ = make_inputs()
    score = jax.jit(lambda h, t: chunked_logprobs(h, t, lambda x: project(x, kernel), chunk_tokens=12))
    placed = score.lower(jax.device_put(hidden, rows), jax.device_put(targets, rows)).compile()
    logp, _ = placed(jax.device_put(hidden, rows), jax.device_put(targets, rows))
    assert logp.sharding.is_equivalent_to(rows, 2)
    assert "all-gather" not in placed.as_text() and "all-reduce" not in placed.as_text()
    np.testing.assert_allclose(logp, score(hidden, targets)[0], rtol=1e-6)


def test_wrong_numbers_are_refused():
    hidden, kernel, targets, _ = make_inputs()
    with pytest.raises(UserError, match="chunk_tokens must be at least 1, got 0"):
        chunked_logprobs(hidden, targets, lambda x: project(x, kernel), chunk_tokens=0)
    with pytest.raises(UserError, match="temperature above 0, got 0"):
        chunked_logprobs(hidden, targets, lambda x: project(x, kernel), chunk_tokens=8, temperature=0.0)
