"""From the downloads of the paper's data sets to a step of GRPO on them, by the commands that a user types."""

import json
import re

import numpy as np
import pytest

from jgrpo import cli
from jgrpo.data import pipeline
from jgrpo.data.prompts import TASKS
from model_port.audio import load_audio
from model_port.errors import UserError
from tests.data.corpora import make_covost2, make_librisqa
from tests.e2e.conftest import read_rows

CONFIG = """\
from jgrpo.config import DataOptions, EvalOptions, GRPOConfig, GRPOOptions, ModelOptions
from jgrpo.config import SourceOptions


def get_config():
    return GRPOConfig(
        run_dir="runs/unnamed",
        model=ModelOptions(path={base!r}),
        data=DataOptions({data}, audio_buckets=(1.5,), min_seconds=0.45),
        num_steps=1,
        prompts_per_step=4,
        max_completion_tokens=16,
        eval=EvalOptions(seeds=(), batch_size=4),
        completions_every=1,
        grpo=GRPOOptions(num_samples=2),
    )
"""
SQA = "data/librisqa/part1_speaker"
AST = "data/covost2/en_de"
DATA = {
    "librisqa": f'train="{SQA}:train", validation="{SQA}:validation", test=("{SQA}:test[:2]",)',
    "covost2": f'train="{AST}:train[:80%]"',
    "mixture": (
        f'mixture=(SourceOptions("{SQA}:train", reward=("rouge1", "wer")), SourceOptions("{AST}:train", 2.0, "ast"))'
    ),
}


@pytest.fixture(scope="module")
def place(work, tmp_path_factory):
    """A directory with both data sets, one built from archives and one from folders."""
    root = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(pipeline, "TEXT_STEP", 64)  # all runs have one shape, and share what is compiled for it
        librisqa = make_librisqa(root / "librisqa_downloads", archives=True)
        covost2 = make_covost2(root / "covost2_downloads", archives=False)
        common = ["--out", "data", "--workers", "0"]
        split = ["--grouping", "speaker"]
        assert cli.main(["data", "build", "librisqa/part1", "--manual-dir", str(librisqa), *common, *split]) == 0
        assert cli.main(["data", "build", "covost2/en_de", "--manual-dir", str(covost2), *common]) == 0
        for name, data in DATA.items():
            (root / f"{name}.py").write_text(CONFIG.format(base=str(work.base), data=data))
        yield root


@pytest.fixture
def grpo(place, monkeypatch, capsys):
    """Run a config to its end; return its directory and what was printed."""

    def run(name, *options):
        monkeypatch.chdir(place)
        directory = place / "runs" / name
        capsys.readouterr()
        assert cli.main(["grpo", f"{name}.py", "--run-dir", str(directory), *options]) == 0
        return directory, capsys.readouterr().out

    return run


def index(place, data, split):
    rows = read_rows(place / data / "1.0.0" / "index" / f"{split}.jsonl")
    return {row["id"]: row for row in rows}


def asked(row, task, columns):
    """Whether a prompt is one of the task's for these columns."""
    return row["prompt"] in [template.format(**columns) for template in TASKS[task].prompts]


def test_a_step_on_librisqa_and_an_evaluation(place, grpo):
    directory, printed = grpo("librisqa", "--eval.every", "1")
    rows, (metrics,) = index(place, SQA, "train"), read_rows(directory / "metrics.jsonl")
    short = [row for row in rows.values() if row["samples"] < 0.45 * 16000]
    assert short and f"{SQA}:train: {len(rows) - len(short)} examples" in printed
    assert f"{len(short)} dropped: {len(short)} shorter than 0.45 s" in printed
    assert re.search(r"shapes of training batches: 1.5 s of audio with \d+ tokens\n", printed)
    assert [row["id"] for row in read_rows(directory / "dropped.jsonl")] == [row["id"] for row in short]
    by_answer = {row["answer"]: row for row in rows.values()}
    groups = read_rows(directory / "completions" / "step_000001.jsonl")
    assert len(groups) == 4
    for group in groups:
        row = by_answer[group["reference"]]
        assert row not in short and asked(group, "librisqa_part1", row)
    assert metrics["data/skipped_clips"] == 0 and metrics["seconds/data"] >= 0 and np.isfinite(metrics["eval/bleu"])

    assert cli.main(["eval", "librisqa.py", "--run-dir", str(directory), "--policy", str(directory / "policy")]) == 0
    (predictions,) = (directory / "eval").rglob("*test*.jsonl")
    found, test = read_rows(predictions), list(index(place, SQA, "test").values())
    assert [row["prompt"] for row in found] == [
        f"Listen to the audio <|audio|> and answer the following question:{row['question']}" for row in test[:2]
    ]
    assert [row["columns"]["id"] for row in found] == [row["id"] for row in test[:2]]


def test_a_step_on_covost2(place, grpo):
    directory, _ = grpo("covost2")
    by_text = {row["translation"]: row for row in index(place, AST, "train").values()}
    for group in read_rows(directory / "completions" / "step_000001.jsonl"):
        assert group["reference"] in by_text and asked(group, "covost2", {"language": "German"})


def test_steps_on_a_mixture_each_source_with_its_own_reward(grpo, place):
    directory, printed = grpo("mixture", "--num-steps", "3", "--grpo.dynamic-sampling", "1")
    assert f"part1_speaker ({SQA}:train): " in printed and f"ast ({AST}:train): " in printed
    sources = []
    for step, metrics in enumerate(read_rows(directory / "metrics.jsonl"), start=1):
        groups = read_rows(directory / "completions" / f"step_{step:06d}.jsonl")
        rewards = {name: [] for name in ("part1_speaker", "ast")}
        for group in groups:
            rewards[group["source"]].append(np.mean(group["rewards"]))
            task, columns = ("covost2", {"language": "German"}) if group["source"] == "ast" else (None, None)
            assert (task is None) == ("It is" in group["reference"])
            assert task is None or asked(group, task, columns)
        sources += [group["source"] for group in groups]
        for name, values in rewards.items():
            assert (f"reward/{name}" in metrics) == bool(values)
            if values:
                assert metrics[f"reward/{name}"] == pytest.approx(np.mean(values))
        for component in ("rouge1", "wer"):
            assert (f"rewards/{component}/mean" in metrics) == bool(rewards["part1_speaker"])
        assert ("rewards/bleu/mean" in metrics) == bool(rewards["ast"])
        if rewards["part1_speaker"]:
            both = metrics["rewards/rouge1/mean"] + metrics["rewards/wer/mean"]
            assert metrics["reward/part1_speaker"] == pytest.approx(both)
    assert set(sources) == {"part1_speaker", "ast"}


def test_a_run_goes_on_without_what_it_cannot_read(place, work, tmp_path, monkeypatch, capsys):
    """A clip that was sound when the run began and is damaged when it is read."""
    monkeypatch.chdir(tmp_path)
    rows = read_rows(work.train) + read_rows(work.test)
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spoilt = rows[2]["audio"]

    def load(source, name=None):
        if str(source) == spoilt:
            raise UserError(f"{spoilt}: torn by the test")
        return load_audio(source, name)

    monkeypatch.setattr("jgrpo.data.examples.load_audio", load)
    options = ("--data.train", str(manifest), "--num-steps", "3", "--data.no-cache-encoder")
    argv = ["sft", str(work.sft), "--run-dir", "run", *options]
    assert cli.main(argv) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    found = re.findall(r"step \d: line 3 of .* cannot be read, and line \d+ of .* takes its place: .*torn by", printed)
    skipped = [row["data/skipped_clips"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert sum(skipped) == len(found) > 0 and max(skipped) == 1
    assert cli.main([*argv, "--run-dir", "strict", "--data.max-unreadable", "0"]) == 2
    assert "1 example cannot be read and data.max_unreadable is 0" in capsys.readouterr().err
