"""`jgrpo eval` with several metrics and beam search, beside the paper's numbers, and the choice of the best policy."""

import json
import statistics

import jiwer
import numpy as np
import pytest

from jgrpo import cli
from jgrpo.evaluation.evaluate import Evaluation, Passes
from jgrpo.evaluation.tables import evaluation_table
from jgrpo.paper.tables import COLUMNS, paper_row
from jgrpo.rewards import CorpusScore, corpus_scores
from jgrpo.runtime.metrics import MetricsWriter
from model_port import Processor, load_model
from model_port.beam import beam_search
from tests.e2e.conftest import read_rows, train, validated

METRICS = ("wer", "bleu", "rouge1", "rougeL", "user_rewards:is_short")


@pytest.fixture(scope="module")
def evaluated(work, sft_run):
    """(results.json, what was printed, directory of the predictions) of a policy scored by several metrics."""
    metrics = ("--eval.metrics", *METRICS, "--paper", "librisqa/2b/sft")
    # At a lower temperature the model says what it has memorised, whatever the seed.
    decoding = ("--eval.beams", 3, "--eval.temperature", 3, "--eval.top-p", 1)
    options = ("--data.test", work.train, work.test, *metrics, *decoding)
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *args, **_: lines.append(" ".join(map(str, args))))
        argv = ["eval", work.sft, "--run-dir", work.root / "several", "--policy", sft_run / "policy", *options]
        assert cli.main(list(map(str, argv))) == 0
    out = work.root / "several" / "eval" / "sft_run"
    return json.loads((out / "results.json").read_text()), "\n".join(lines), out


@pytest.mark.parametrize("name", ["train", "test"])
def test_every_metric_of_every_pass(work, evaluated, name):
    result, rows = evaluated[0][name], read_rows(evaluated[2] / f"{name}.jsonl")
    references = [row["reference"] for row in rows]
    columns = {"duration": [row["columns"]["duration"] for row in rows]}
    texts = {"greedy": [row["greedy"] for row in rows], "beam": [row["beam"] for row in rows]}
    sampled = [[row["sampled"][s] for row in rows] for s in (0, 1)]

    def score(metric, completions):
        return corpus_scores([metric], completions, references, columns=columns)[metric].value

    assert list(result["metrics"]) == list(METRICS)
    assert (result["examples"], result["seeds"], result["beams"]) == (len(read_rows(getattr(work, name))), [0, 1], 3)
    for metric, found in result["metrics"].items():
        assert set(found) == {"sampled", "greedy", "beam", "label", "lower_is_better"}
        for way, completions in texts.items():
            assert found[way] == score(metric, completions)
        scores = [score(metric, completions) for completions in sampled]
        sampled_scores = found["sampled"]["scores"]
        assert (sampled_scores, found["sampled"]["mean"]) == (scores, pytest.approx(statistics.fmean(scores)))
        assert found["sampled"]["sd"] == pytest.approx(statistics.stdev(scores))
    assert result["metrics"]["wer"]["greedy"] == pytest.approx(100 * jiwer.wer(references, texts["greedy"]))
    assert {name for name, found in result["metrics"].items() if found["lower_is_better"]} == {"wer"}
    assert sampled[0] != sampled[1]
    assert (result["metrics"]["bleu"]["beam"] > 50) == (name == "train")


def test_the_beam_pass_is_the_models_beam_search(work, sft_run, evaluated):
    asked = read_rows(work.train)
    processor = Processor.from_pretrained(work.base)
    batch = processor(audio=[row["audio"] for row in asked], prompts=[row["prompt"] for row in asked])
    out = beam_search(load_model(sft_run / "policy"), batch, num_beams=3, max_new_tokens=20)
    rows = read_rows(evaluated[2] / "train.jsonl")
    assert [row["beam"] for row in rows] == [texts[0] for texts in processor.decode(out)]


def test_what_is_printed(evaluated):
    """A row for each way to decode, the paper's row with the columns it has, and how each metric was computed."""
    result, printed = evaluated[0]["train"], evaluated[1]
    table = printed[printed.index("train: 4 examples, 2 seeds") :].splitlines()
    assert table[1].split() == ["WER", "BLEU", "ROUGE-1", "ROUGE-L", "user_rewards:is_short"]
    assert [line.split("  ")[0] for line in table[2:6]] == ["sampled", "greedy", "beam 3", "paper, librisqa/2b/sft"]
    assert table[3].split()[1:] == [f"{found['greedy']:.2f}" for found in result["metrics"].values()]
    assert table[5].split()[2:] == ["-", "40.88", "65.13", "61.50", "-"]
    assert len({len(line) for line in table[1:6]}) == 1
    for metric, found in result["metrics"].items():
        assert f"{metric}: {found['label']}" in table


def scores(value):
    """Scores of a pass by the paper's metrics, whose values are value, value + 1, ..."""
    return {name: CorpusScore(value + i, f"how {name}") for i, name in enumerate(COLUMNS)}


def test_the_papers_average():
    """AVG is the plain mean of the six columns, of each pass by itself."""
    passes = Passes(seeds=(4, 5), greedy=True)
    found = Evaluation(passes, (scores(10.0), scores(20.0)), scores(30.0), None, seconds=1.0, predictions=[])
    summary = found.summary()
    assert summary["average"]["sampled"] == {"mean": 17.5, "sd": pytest.approx(50**0.5), "scores": [12.5, 22.5]}
    assert (summary["average"]["greedy"], summary["average"]["beam"]) == (32.5, None)
    table = evaluation_table("test", summary, paper="librisqa/2b/grpo").splitlines()
    assert table[1].split() == ["BLEU", "BERTScore", "ROUGE-1", "ROUGE-2", "ROUGE-L", "METEOR", "AVG"]
    assert table[4].split()[2:] == [*(f"{value:.2f}" for value in paper_row("librisqa/2b/grpo").values()), "65.77"]
    assert table[-1] == "meteor: how meteor"
    assert "paper" not in evaluation_table("test", summary)
    assert evaluation_table("test", summary, paper="librisqa/sota").splitlines()[4].split()[-2:] == ["-", "-"]


def test_the_base_stands_beside_the_papers_base(work, capsys):
    """Whatever row the config names for its policy."""
    options = ("--eval.seeds", "--data.test", str(work.test), "--paper", "covost2/8b/grpo")
    run_dir = str(work.root / "base_only")
    assert cli.main(["eval", str(work.sft), "--run-dir", run_dir, *options]) == 0
    printed = capsys.readouterr().out
    assert "paper, covost2/8b/base  32.48" in printed and "sampled" not in printed


def test_generate_by_beam_search(work, sft_run, evaluated, capsys):
    row = read_rows(work.train)[0]
    ask = ["generate", str(sft_run / "policy"), "--audio", row["audio"], "--prompt", row["prompt"]]
    assert cli.main([*ask, "--max-new-tokens", "20", "--beams", "3"]) == 0
    assert capsys.readouterr().out == read_rows(evaluated[2] / "train.jsonl")[0]["beam"].strip() + "\n"
    assert cli.main([*ask, "--beams", "3", "--num-samples", "2"]) == 2
    assert "beam search gives one answer" in capsys.readouterr().err


def test_the_first_metric_chooses_the_best_policy(work, tmp_path, monkeypatch):
    """Of an error rate the lowest: the policy that stays is the one of the step with the lowest WER."""
    found = []

    def write(self, number, metrics):
        logged(self, number, metrics)
        found.append(metrics["eval/wer"])

    logged = MetricsWriter.write
    monkeypatch.setattr(MetricsWriter, "write", write)
    saved = []
    monkeypatch.setattr("jgrpo.loop.save_policy", lambda run: saved.append(run.step))
    options = (*validated(work), "--eval.metrics", "wer", "chrf", "--num-steps", "6")
    run = train(work.sft, tmp_path / "run", *options, "--eval.every", "1", "--optimiser.learning-rate", "0.1")
    rows = read_rows(run / "metrics.jsonl")
    assert all(row["eval/wer"] >= 0 and 0 <= row["eval/chrf"] <= 100 and "eval/bleu" not in row for row in rows)
    assert saved == [step + 1 for step in range(6) if found[step] < min(found[:step], default=np.inf)]
    assert 1 < len(set(found)) and len(saved) < 6


@pytest.mark.parametrize(
    "options, expected",
    [
        (("--eval.metrics",), "eval.metrics is empty"),
        (("--eval.metrics", "bleu", "wer", "bleu"), "eval.metrics names bleu twice"),
        (("--eval.metrics", "blue"), "reward 'blue' is unknown"),
        (("--eval.metrics", "bertscore"), "bertscore needs a model: set metrics.bertscore_model"),
        (("--eval.beams", "1"), "eval.beams is 1, which is greedy decoding"),
        (("--eval.beams", "-2"), "eval.beams must be at least 0, got -2"),
        (("--eval.seeds", "--eval.no-greedy"), "nothing would be evaluated"),
        (("--paper", "librisqa/3b/sft"), "names no row of the paper's tables"),
    ],
)
def test_mistakes_show_before_the_model_is_loaded(work, capsys, monkeypatch, tmp_path, options, expected):
    monkeypatch.setattr("jgrpo.setup.load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    for command in ("eval", "sft"):
        argv = [command, str(work.sft), "--run-dir", str(tmp_path / "run"), *validated(work), *options]
        assert cli.main(argv) == 2
        assert expected in capsys.readouterr().err
