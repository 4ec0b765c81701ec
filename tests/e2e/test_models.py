"""What a run leaves is a model: evaluated, asked, trained further, converted and loaded by transformers."""

import json
import re
import statistics

import numpy as np
import pytest
import sacrebleu

import model_port.cli
from jgrpo import cli
from model_port import Processor, load_model
from model_port.weights.convert import model_arrays, open_model
from tests.e2e.conftest import assert_same_bits, read_rows, train
from tests.hf_tiny import load_hf_dir
from tests.parity.pairs import hf_logits


@pytest.fixture(scope="module")
def exported(work, sft_run):
    """The SFT policy as a Hugging Face directory."""
    out = work.root / "exported"
    assert model_port.cli.main(["export", str(sft_run / "policy"), str(out)]) == 0
    return out


def evaluate(work, run, *options):
    """Run `jgrpo eval` on the test manifest and the training manifest."""
    manifests = ("--data.test", str(work.test), str(work.train))
    assert cli.main(["eval", str(work.sft), "--run-dir", str(run), *manifests, *options]) == 0


def test_eval_of_a_policy(work, sft_run, capsys):
    """Scores are sacrebleu's of the predictions on disk; what was memorised scores high, what was not does not."""
    evaluate(work, sft_run)
    out = sft_run / "eval" / "policy"
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"test", "train"}
    for name, manifest in (("test", work.test), ("train", work.train)):
        rows, result = read_rows(out / f"{name}.jsonl"), results[name]
        asked = read_rows(manifest)
        assert [row["reference"] for row in rows] == [row["reference"] for row in asked]
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in asked]
        assert [row["columns"]["id"] for row in rows] == [row["id"] for row in asked]
        assert result["examples"] == len(rows) == len(asked)
        references = [[row["reference"] for row in rows]]
        bleu = sacrebleu.BLEU()
        scores = [bleu.corpus_score([row["sampled"][s] for row in rows], references).score for s in (0, 1)]
        found = result["metrics"]["bleu"]
        sampled = found["sampled"]
        assert (result["seeds"], sampled["scores"]) == ([0, 1], pytest.approx(scores))
        assert sampled["mean"] == pytest.approx(statistics.fmean(scores))
        assert sampled["sd"] == pytest.approx(statistics.stdev(scores))
        assert found["greedy"] == pytest.approx(bleu.corpus_score([row["greedy"] for row in rows], references).score)
        assert found["label"] == f"BLEU {bleu.get_signature()}"
        assert (found["beam"], result["average"]) == (None, None)
    known, new = (results[name]["metrics"]["bleu"] for name in ("train", "test"))
    assert known["greedy"] > 50 > 5 > new["greedy"]
    printed = capsys.readouterr().out
    assert f"evaluating {sft_run / 'policy'}" in printed and f"results.json are in {out}" in printed
    assert "train: 4 examples, 2 seeds\n" in printed and f"\nbleu: {known['label']}\n" in printed
    assert re.search(rf"\nsampled +{known['sampled']['mean']:.2f} ± \d", printed)
    assert re.search(rf"\ngreedy +{known['greedy']:.2f}\n", printed)


def test_eval_of_the_base_and_of_another_policy(work, sft_run, capsys):
    """A run without a policy evaluates its base; --policy names any model directory. Same seed, same predictions."""
    run = work.root / "not_yet_trained"
    evaluate(work, run, "--eval.no-greedy")
    assert "does not exist yet: evaluating the base" in capsys.readouterr().out
    results = json.loads((run / "eval" / "base" / "results.json").read_text())
    found = results["train"]["metrics"]["bleu"]
    assert found["sampled"]["mean"] < 1 and found["greedy"] is None
    policy = sft_run / "policy"
    evaluate(work, run, "--policy", str(policy))
    mine, own = run / "eval" / "sft_run" / "train.jsonl", sft_run / "eval" / "policy" / "train.jsonl"
    if not own.exists():
        evaluate(work, sft_run)
    assert mine.read_text() == own.read_text()


def test_generate_gives_the_memorised_answer(work, sft_run, capsys):
    row = read_rows(work.train)[0]
    ask = ["generate", str(sft_run / "policy"), "--audio", row["audio"], "--prompt", row["prompt"]]
    assert cli.main([*ask, "--max-new-tokens", "20", "--num-samples", "2"]) == 0
    assert capsys.readouterr().out == 2 * f"{row['reference']}\n"


def test_a_run_from_a_converted_model_is_the_same_run(work, sft_run):
    """Hugging Face or Orbax, the encoder's output kept or computed at every step: the numbers are the same."""
    converted = work.root / "converted"
    assert model_port.cli.main(["convert", str(work.base), str(converted)]) == 0
    options = ("--model.path", str(converted), "--data.no-cache-encoder", "--num-steps", "3")
    run = train(work.sft, work.root / "from_orbax", *options)
    rows, kept = (read_rows(path / "metrics.jsonl") for path in (run, sft_run))
    for row, expected in zip(rows, kept, strict=False):
        np.testing.assert_allclose(row["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(row["grad_norm"], expected["grad_norm"], rtol=1e-4)
    assert json.loads((run / "policy" / "model_port.json").read_text())["base"] == str(converted)
    config, arrays = open_model(run / "policy")
    assert config == open_model(work.base)[0]
    base = open_model(work.base)[1]
    moved = {name for name in arrays if np.asarray(arrays[name]).tobytes() != np.asarray(base[name]).tobytes()}
    assert moved and all(name.startswith(("projector.", "decoder.")) for name in moved)


def test_an_exported_policy_is_the_policy(sft_run, exported):
    assert_same_bits(model_arrays(load_model(exported)), model_arrays(load_model(sft_run / "policy")))


def test_transformers_computes_what_the_policy_computes(work, sft_run, exported):
    policy, processor = load_model(sft_run / "policy"), Processor.from_pretrained(exported)
    reference = load_hf_dir(exported)
    rows = read_rows(work.test)[:2]
    batch = processor(audio=[row["audio"] for row in rows], prompts=[row["prompt"] for row in rows])
    logits = np.asarray(policy(batch))
    for p in range(len(rows)):
        clip = batch.features[p, 0, : batch.lengths[p, 0]]
        expected = hf_logits(reference, batch.tokens[p][batch.mask[p]], [clip])
        np.testing.assert_allclose(logits[p, : len(expected)], expected, rtol=1e-4, atol=1e-4)


def test_a_fresh_adapter_is_trained_alone_and_exported(work, tmp_path):
    """The released adapter is folded in, a new one is trained on top, and transformers loads base and adapter."""
    options = ("--model.lora", "fresh", "--model.lora-rank", "3", "--model.trainable", "lora", "--num-steps", "2")
    run = train(work.sft, tmp_path / "run", *options)
    policy = load_model(run / "policy")
    assert policy.config.lora.rank == 3
    arrays, merged = model_arrays(policy), open_model(work.base, lora="merge")[1]
    adapter = {name for name in arrays if ".lora." in name}
    assert adapter and all(np.any(arrays[name]) for name in adapter)
    assert_same_bits({name: arrays[name] for name in merged}, merged)
    assert arrays.keys() == adapter | merged.keys()
    assert model_port.cli.main(["export", str(run / "policy"), str(tmp_path / "hf")]) == 0
    load_hf_dir(tmp_path / "hf")
    assert_same_bits(model_arrays(load_model(tmp_path / "hf")), arrays)
