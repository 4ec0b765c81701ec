"""The variants of the method, as options of one run: mixed policy, truncation, masks, minibatches, dynamic sampling."""

import dataclasses
import math

import numpy as np
import pytest

from jgrpo import cli
from jgrpo.config import DataOptions, GRPOConfig, GRPOOptions, ModelOptions
from jgrpo.rewards import RewardPool
from jgrpo.rollout import groups
from jgrpo.rollout.groups import GroupSampler
from model_port.errors import UserError
from model_port.partition import MeshConfig
from tests.e2e.conftest import (
    WORDS,
    assert_same_bits,
    demo_rows,
    interruption,
    read_rows,
    saved_arrays,
    train,
    write_manifest,
)

COARSE = '''\
"""A reward of few values, so that many groups are all alike."""


def many_e(completions, references, **columns):
    return [float(text.count("e") > 12) for text in completions]
'''


def completions(run, step):
    return read_rows(run / "completions" / f"step_{step:06}.jsonl")


def test_a_mixed_policy_run(work):
    """The reference ends every group, has the best reward, and what is said of samples leaves it out."""
    options = ("--grpo.mixed-policy", "--grpo.off-policy-shaping", "0.1", "--grpo.num-samples", "8")
    options += ("--grpo.reward", "exact", "--num-steps", "2", "--completions-every", "1")
    run = train(work.grpo, work.root / "mixed", *options)
    rows = read_rows(run / "metrics.jsonl")
    for row in rows:
        assert (row["reward"], row["reward_std"], row["mixed/reference_reward"]) == (0, 0, 1)
        assert row["frac_reward_zero_std"] == 0  # of whole groups
        assert row["mixed/reference_advantage"] == pytest.approx(2.475, abs=2e-3)
        assert 0 < row["mixed/reference_ratio"] < 0.01  # 1 / 1024 for a model that knows nothing
        assert row["logp_drift_max"] < 1e-4 and abs(row["ratio"] - 1) < 1e-4
        assert row["num_tokens"] == round(28 * row["completions/mean_length"]) and math.isfinite(row["loss"])
    assert rows[1]["mixed/reference_ratio"] > rows[0]["mixed/reference_ratio"]
    for group in completions(run, 2):
        assert group["completions"][-1].strip() == group["reference"]
        assert group["rewards"] == [0] * 7 + [1]
        np.testing.assert_allclose(group["advantages"], [-0.354] * 7 + [2.475], atol=2e-3)


def bounded(row, run):
    """Every completion of 20 tokens is at the limit, and no token is outside of what was sampled from."""
    assert row["rewards/overlong/mean"] == -0.5
    assert row["reward"] == pytest.approx(row["rewards/user_rewards:letter_e/mean"] - 0.5)
    assert row["logp_drift_max"] < 1e-5 and row["clip_delta"] == 0 and row["entropy"] < math.log(50)


def masked(row, run):
    """With this seed no completion ends by itself: nothing is learnt, nothing changes, and that is no failure."""
    assert row["completions/clipped_ratio"] == 1
    assert (row["empty"], row["skipped"], row["loss"], row["grad_norm"]) == (1, 0, 0, 0)
    moments = [value for name, value in saved_arrays(run, 1).items() if ".mu." in name]
    assert moments and not any(np.any(value) for value in moments)


def updated_often(row, run):
    """Two passes of two updates each: all but the first are off-policy."""
    assert row["logp_drift_max"] > 1e-2 and abs(row["ratio"] - 1) > 1e-4
    assert [value.item() for name, value in saved_arrays(run, 1).items() if name.endswith("count")] == [4, 4]


def scaled(row, run):
    """Rewards of mean 0 and deviation 1 within each group, of both components, which are logged as they are."""
    assert abs(row["reward"]) < 1e-9 and row["rewards/user_rewards:letter_e/mean"] > 0.1
    for group in completions(run, 1):
        letters = np.array([text.count("e") for text in group["completions"]])
        short = np.array([1 / (1 + len(text)) for text in group["completions"]])
        parts = [(part - part.mean()) / (part.std(ddof=1) + 1e-4) for part in (letters / 10, short)]
        np.testing.assert_allclose(group["rewards"], sum(parts), atol=1e-6)


VARIANTS = {
    bounded: "--grpo.top-p 0.8 --grpo.top-k 50 --grpo.min-p 0.01 --grpo.delta 2 --grpo.overlong-buffer 5 "
    "--grpo.overlong-penalty 0.5 --grpo.beta 0",
    masked: "--grpo.mask-truncated --grpo.filter-zero-variance --seed 1",
    updated_often: "--grpo.num-iterations 2 --grpo.num-minibatches 2",
    scaled: "--grpo.reward-scale group --grpo.reward user_rewards:letter_e user_rewards:is_short",
}


@pytest.mark.parametrize("check", VARIANTS, ids=lambda check: check.__name__)
def test_a_step_of_each_variant(work, check):
    run = train(work.grpo, work.root / check.__name__, "--num-steps", "1", *VARIANTS[check].split())
    (row,) = read_rows(run / "metrics.jsonl")
    assert all(isinstance(value, int) or math.isfinite(value) for value in row.values())
    check(row, run)


def test_chunks_sample_the_same_and_score_meanwhile(work, grpo_run, monkeypatch):
    """All chunks are in the device's queue before one is fetched, and rewards of one start before the next is."""
    events = []

    def logged(owner, name):
        wrapped = getattr(owner, name)

        def call(*args, **options):
            events.append(name)
            return wrapped(*args, **options)

        monkeypatch.setattr(owner, name, call)

    logged(GroupSampler, "_start")
    logged(groups, "fetch")
    logged(RewardPool, "submit")
    run = train(work.grpo, work.root / "chunks", "--grpo.rollout-chunks", "2", "--num-steps", "1")
    assert events == ["_start", "fetch", "submit", "fetch", "submit"]
    for ours, whole in zip(completions(run, 1), completions(grpo_run, 1), strict=True):
        for name in ("index", "reference", "completions", "rewards", "advantages"):
            assert ours[name] == whole[name]
    (row,) = read_rows(run / "metrics.jsonl")
    assert 0 <= row["seconds/reward_wait"] < row["seconds"]


def timeless(run):
    rows = read_rows(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def test_dynamic_sampling_replaces_and_resumes(work):
    """Groups that are all alike give way to others; a run that was interrupted draws the same ones again."""
    (work.root / "coarse_reward.py").write_text(COARSE)
    rows = [{**row, "prompt": f"{row['prompt']} {word}"} for row, word in zip(demo_rows(), WORDS, strict=False)]
    write_manifest(work.root / "ten.jsonl", rows)
    options = ("--data.train", str(work.root / "ten.jsonl"), "--grpo.reward", "coarse_reward:many_e")
    options += ("--grpo.dynamic-sampling", "2", "--grpo.rollout-chunks", "2", "--completions-every", "1")
    options += ("--num-steps", "3", "--checkpoint.every", "1")
    whole = train(work.grpo, work.root / "dynamic", *options)
    run = work.root / "dynamic_interrupted"
    with interruption(2):
        assert cli.main(["grpo", str(work.grpo), "--run-dir", str(run), *options]) == 130
    train(work.grpo, run, *options)
    assert timeless(run) == timeless(whole)
    assert_same_bits(saved_arrays(run, 3), saved_arrays(whole, 3))

    found = read_rows(whole / "metrics.jsonl")
    assert sum(row["dynamic/replaced"] for row in found) >= 2
    for row in found:
        assert row["dynamic/rounds"] <= 2 and row["dynamic/replaced"] <= 4
        # A round is asked for only where something is missing, and it stops when nothing is.
        assert (row["dynamic/rounds"] == 2) or row["frac_reward_zero_std"] == 0
        assert row["logp_drift_max"] < 1e-4  # each group has kept its own log-probs
    for step in range(1, 4):
        groups = completions(whole, step)
        assert len({group["index"] for group in groups}) == 4
        for group in groups:
            assert group["reference"] == rows[group["index"]]["reference"]
            assert group["rewards"] == [float(text.count("e") > 12) for text in group["completions"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": 1.2}, r"grpo.delta is 1.2; it bounds the ratio beyond the clip and must be above .* = 1.2"),
        ({"delta": 2.0, "loss_type": "cispo", "epsilon_high": 5.0}, "cispo bounds the ratio by epsilon_high alone"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"min_p": 1.1}, "min_p must be at least 0 and at most 1, got 1.1"),
        ({"top_k": 1}, "grpo.top_k is 1: greedy samples of a prompt are all alike"),
        ({"min_p": 1.0}, "grpo.min_p is 1: greedy samples"),
        ({"mixed_policy": True, "num_samples": 1, "advantage_scale": "none"}, "one must be sampled; use 2 or more"),
        ({"off_policy_shaping": 0.1}, "mixed_policy is off: there is nothing to shape"),
        ({"off_policy_shaping": -0.1, "mixed_policy": True}, "grpo.off_policy_shaping must be at least 0, got -0.1"),
        ({"overlong_buffer": 21}, "grpo.overlong_buffer is 21 tokens and max_completion_tokens is 20"),
        ({"overlong_penalty": -1.0}, "grpo.overlong_penalty must be at least 0"),
        ({"filter_zero_variance": True, "num_samples": 1, "advantage_scale": "none"}, "for filter_zero_variance a"),
        ({"dynamic_sampling": 1, "num_samples": 1, "advantage_scale": "none"}, "for dynamic_sampling a group needs"),
        ({"num_iterations": 0}, "grpo.num_iterations must be at least 1, got 0"),
        ({"num_minibatches": 3}, "prompts_per_step 8 must be a multiple of grpo.num_minibatches 3 x micro_batches 2"),
        ({"num_minibatches": 4}, "prompts per minibatch and micro-batch is 1, which does not divide over"),
        ({"rollout_chunks": 3}, "prompts_per_step 8 must be a multiple of rollout_chunks 3"),
        ({"rollout_chunks": 8}, "prompts per rollout chunk is 1, which does not divide over"),
        ({"reward_workers": -1}, "grpo.reward_workers must be at least 0"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(changes, message):
    config = GRPOConfig(
        run_dir="nowhere",
        model=ModelOptions(path="nowhere"),
        data=DataOptions(train="nowhere"),
        num_steps=3,
        prompts_per_step=8,
        micro_batches=2,
        max_completion_tokens=20,
        mesh=MeshConfig(data=2),
    )
    config.validate()
    wrong = dataclasses.replace(config, grpo=dataclasses.replace(GRPOOptions(), **changes))
    with pytest.raises(UserError, match=message):
        wrong.validate()
