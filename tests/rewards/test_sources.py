"""Rewards of a mixture: each example is scored by the components of its own source."""

import numpy as np
import pytest

from jgrpo.config import GRPOOptions
from jgrpo.core.advantages import group_advantages
from jgrpo.rewards import RewardPool, make_reward
from jgrpo.rollout.metrics import rollout_metrics, source_metrics
from jgrpo.rollout.scoring import score_groups
from model_port.errors import UserError

SPECS = ({"rouge1": 1.0, "wer": 0.5}, {"bleu": 2.0, "rouge1": 0.25})
COMPLETIONS = [f"the number {k % 5} is here" + " again" * (k % 3) for k in range(12)]
REFERENCES = [f"the number {k % 4} is here" for k in range(12)]
SOURCES = [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]  # four prompts of three samples


@pytest.fixture(scope="module", params=[0, 2])
def pool(request):
    with RewardPool(SPECS, request.param) as pool:
        yield pool


def test_each_example_has_the_components_of_its_source(pool):
    found = pool.submit(COMPLETIONS, REFERENCES, {}, SOURCES).result()
    assert list(found) == ["rouge1", "wer", "bleu"] == list(pool.reward.names)
    alone = make_reward(dict.fromkeys(found, 1.0)).components(COMPLETIONS, REFERENCES)
    for name, values in found.items():
        known = np.array([name in SPECS[source] for source in SOURCES])
        np.testing.assert_array_equal(values[known], alone[name][known])
        assert np.isnan(values[~known]).all()


def test_an_example_that_fails_is_known_by_its_number_among_all(tmp_path, monkeypatch):
    (tmp_path / "fragile_rewards.py").write_text(
        "def fragile(texts, _, **columns):\n    return [1 / len(t) for t in texts]"
    )
    monkeypatch.syspath_prepend(tmp_path)
    completions = [*COMPLETIONS[:9], "", *COMPLETIONS[10:]]
    with RewardPool((SPECS[0], {"fragile_rewards:fragile": 1.0}), 0) as pool:
        with pytest.raises(UserError, match="'fragile_rewards:fragile' failed with ZeroDivisionError.*at example 9: "):
            pool.submit(completions, REFERENCES, {}, SOURCES).result()
        assert np.isfinite(pool.submit(completions, REFERENCES, {}, [0] * 12).result()["wer"]).all()
    with RewardPool(SPECS, 0) as pool, pytest.raises(UserError, match="12 completions but 11 values"):
        pool.submit(COMPLETIONS, REFERENCES[:11], {}, SOURCES)


@pytest.mark.parametrize("scale", ["none", "group"])
def test_the_total_weighs_what_the_source_has(scale):
    with RewardPool(SPECS, 0, scale=scale) as pool:
        found = pool.submit(COMPLETIONS, REFERENCES, {}, SOURCES).result()
    components = {name: values.reshape(4, 3) for name, values in found.items()}
    sources, lengths = np.array([0, 1, 0, 1]), np.full((4, 3), 5)
    total, named = score_groups(pool.reward, components, lengths, GRPOOptions(), limit=9, sources=sources)

    def scaled(name):
        return group_advantages(components[name], "group") if scale == "group" else components[name]

    with np.errstate(invalid="ignore"):
        first, second = scaled("rouge1") + 0.5 * scaled("wer"), 2 * scaled("bleu") + 0.25 * scaled("rouge1")
    expected = np.where(sources[:, None] == 0, first, second)
    np.testing.assert_allclose(total, expected, rtol=1e-12)
    assert np.isfinite(total).all() and named is components


def test_one_source_is_what_a_single_reward_gives(pool):
    single = make_reward(SPECS[1])
    wanted = single.components(COMPLETIONS, REFERENCES)
    found = pool.submit(COMPLETIONS, REFERENCES, {}, [1] * 12).result()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)
    np.testing.assert_array_equal(pool.reward.total(found, np.ones(12, int)), single.total(wanted))


def test_metrics_are_means_over_those_that_have_it():
    rewards = np.array([[0.0, 1.0], [2.0, 4.0]])
    half = np.array([[0.5, 1.5], [np.nan, np.nan]])
    components = {"wer": half, "bleu": half[::-1], "chrf": half * np.nan}
    metrics = rollout_metrics(rewards, components, np.full((2, 2), 3), np.ones((2, 2), bool))
    assert metrics["rewards/wer/mean"] == metrics["rewards/bleu/mean"] == 1.0 and "rewards/chrf/mean" not in metrics
    names = ("sqa", "none", "ast")
    assert source_metrics(np.array([2, 0]), names, rewards) == {"reward/ast": 0.5, "reward/sqa": 3.0}
    assert source_metrics(None, (), rewards) == {}
