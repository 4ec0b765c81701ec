"""`jgrpo sft` and `jgrpo grpo` from a config file to a finished run directory."""

import json
import math

import numpy as np

from tests.e2e.conftest import read_rows, train

TIMES = {"seconds", "tokens_per_second"}


def test_a_grpo_run_leaves_what_the_design_promises(grpo_run):
    config = json.loads((grpo_run / "config.json").read_text())
    assert (config["kind"], config["run_dir"], config["num_steps"]) == ("GRPOConfig", str(grpo_run), 6)
    assert config["grpo"]["reward"] == ["user_rewards:letter_e"]
    rows = read_rows(grpo_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        for name in ("loss", "reward", "reward_std", "kl", "grad_norm", "entropy", "ratio", *TIMES):
            assert math.isfinite(row[name]), name
        assert row["rewards/user_rewards:letter_e/mean"] == row["reward"]
        shortest, mean, longest = (row[f"completions/{name}_length"] for name in ("min", "mean", "max"))
        assert 1 <= shortest <= mean <= longest <= 20
        assert row["num_tokens"] == round(mean * 16)
        assert row["skipped"] == 0
        phases = [row[f"seconds/{phase}"] for phase in ("data", "encode", "rollout", "reward", "score", "update")]
        assert 0 < sum(phases) <= row["seconds"]
        assert row["tokens_per_second"] == row["num_tokens"] / row["seconds"]
    # One bucket of audio: encode and rollout, and score and update for every layout of trees that has come up.
    layouts = [(row["tree/trees"], row["tree/slots"]) for row in rows]
    assert [row["compilations"] for row in rows] == [2 + 2 * len(set(layouts[: step + 1])) for step in range(6)]
    for row in rows:
        assert row["tree/tokens_per_node"] >= 1
        assert 0 <= row["padding/nodes"] < 1 and 0 < row["padding/prompts"] < 1
    assert [path.name for path in sorted((grpo_run / "checkpoints").iterdir())] == ["6"]
    assert list((grpo_run / "tensorboard").glob("events.out.tfevents.*"))
    assert (grpo_run / "policy" / "model_port.json").is_file()


def test_the_first_step_is_on_policy(grpo_run):
    """Rollout and update agree about the log-probs, and the policy is the reference."""
    first, *later = read_rows(grpo_run / "metrics.jsonl")
    assert abs(first["kl"]) < 1e-6 and abs(first["ratio"] - 1) < 1e-4
    assert first["logp_drift_max"] < 1e-4
    assert all(row["kl"] > 1e-4 for row in later[1:])


def test_completions_hold_the_groups_that_metrics_describe(grpo_run):
    rows = {row["step"]: row for row in read_rows(grpo_run / "metrics.jsonl")}
    files = sorted((grpo_run / "completions").iterdir())
    assert [path.name for path in files] == ["step_000001.jsonl", "step_000003.jsonl", "step_000005.jsonl"]
    groups = read_rows(files[1])
    assert len({group["index"] for group in groups}) == 4
    rewards = np.array([group["rewards"] for group in groups])
    assert rewards.shape == (4, 4)
    expected = [[text.count("e") / 10 for text in group["completions"]] for group in groups]
    np.testing.assert_array_equal(rewards, expected)
    assert rewards.mean() == rows[3]["reward"]
    np.testing.assert_allclose(rewards.std(axis=1, ddof=1).mean(), rows[3]["reward_std"], rtol=1e-6)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    advantages = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose([group["advantages"] for group in groups], advantages, rtol=1e-5, atol=1e-6)


def test_grpo_raises_a_reward_that_a_user_wrote(work, grpo_run):
    """The share of the letter e more than doubles in 40 steps; another seed draws other samples."""
    run = train(work.grpo, work.root / "rising", "--num-steps", "40", "--completions-every", "0", "--seed", "1")
    rewards = [row["reward"] for row in read_rows(run / "metrics.jsonl")]
    assert np.mean(rewards[-5:]) > 2 * np.mean(rewards[:5])
    assert rewards[0] != read_rows(grpo_run / "metrics.jsonl")[0]["reward"]
    assert not list((run / "completions").iterdir())


def test_no_reference_and_two_updates_per_rollout(work):
    """beta 0 needs no reference, and the second update of a rollout is off-policy."""
    options = ("--grpo.beta", "0", "--grpo.num-iterations", "2", "--num-steps", "3")
    rewards = ("--grpo.reward", "bleu", "user_rewards:is_short", "--grpo.reward-weights", "0.5", "2")
    run = train(work.grpo, work.root / "two_updates", *options, *rewards)
    rows = read_rows(run / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert "kl" not in row
        assert row["logp_drift"] > 1e-3
        expected = 0.5 * row["rewards/bleu/mean"] + 2 * row["rewards/user_rewards:is_short/mean"]
        np.testing.assert_allclose(row["reward"], expected, rtol=1e-12)


def test_sft_memorises_four_references(sft_run):
    rows = read_rows(sft_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[0]["loss"] > 6
    assert rows[-1]["loss"] < 0.5
    assert "reward" not in rows[0] and "logp_drift" not in rows[0]
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss", "grad_norm", "entropy", *TIMES))
    assert [row["step"] for row in rows if "eval/bleu" in row] == [20, 40]
    assert rows[39]["eval/bleu"] > max(rows[19]["eval/bleu"], 30)
    assert (sft_run / "policy" / "model_port.json").is_file()
