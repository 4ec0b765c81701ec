# SPDX-License-Identifier: Apache-2.0
"""Estimators of KL(pi_theta || pi_ref) from the log-probabilities of sampled tokens.

With d = log pi_ref - log pi_theta at a token sampled from pi_theta:

| name | formula        | as a value                                     | expected gradient, as a term of the loss    |
|------|----------------|------------------------------------------------|---------------------------------------------|
| k1   | -d             | unbiased, high variance, may be negative       | 0: it holds the policy nowhere; for logging |
| k2   | d^2 / 2        | biased (little while d is small), low variance | that of KL(pi_theta || pi_ref)              |
| k3   | exp(d) - d - 1 | unbiased, low variance, never negative         | that of KL(pi_ref || pi_theta)              |

Source: Schulman, "Approximating KL divergence" (2020); k3 is DeepSeekMath (arXiv 2402.03300) eq. 4. The last column is
E[f'(d) * -grad log pi_theta] over tokens sampled from pi_theta.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from model_port.errors import UserError


def k1(logp: Float[jax.Array, "..."], ref_logp: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
    """log pi_theta - log pi_ref."""
    return logp - ref_logp


def k2(logp: Float[jax.Array, "..."], ref_logp: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
    """Half the squared log-ratio."""
    return 0.5 * jnp.square(ref_logp - logp)


def k3(logp: Float[jax.Array, "..."], ref_logp: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
    """exp(d) - d - 1; expm1 keeps the digits that matter when the policies are close."""
    d = ref_logp - logp
    return jnp.expm1(d) - d


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def kl_estimate(
    logp: Float[jax.Array, "*shape"], ref_logp: Float[jax.Array, "*shape"], *, kind: str = "k3"
) -> Float[jax.Array, "*shape"]:
    """Per-token estimate of KL(pi_theta || pi_ref), differentiable in both arguments.

    >>> round(float(kl_estimate(jnp.log(0.5), jnp.log(0.25), kind="k3")), 4)
    0.1931
    """
    if kind not in ESTIMATORS:
        raise UserError(f"KL estimator {kind!r} is unknown: use one of {', '.join(ESTIMATORS)}.")
    return ESTIMATORS[kind](logp, ref_logp)
