"""Every benchmark runs at a tiny size, and its figures are there and hang together."""

import json

import jax
import numpy as np
import pytest

from benchmarks import compile as compilation
from benchmarks import harness, memory, reward_overlap, rollout, scale, step, update, workload
from model_port import Processor, load_model
from model_port.errors import UserError
from model_port.params import split_model
from tests.compiling import compiled_once

SIZE = workload.Size(model="tiny", prompts=2, samples=2, seconds=1.0, new_tokens=4, text_tokens=4)
WORDS = "--model tiny --prompts 2 --samples 2 --seconds 1 --new-tokens 4 --text-tokens 4 --rounds 1".split()


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    """Programs are the same from test to test, and here nobody waits for fast ones."""
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


def run(benchmark, tmp_path, *words):
    path = tmp_path / "figures.json"
    benchmark.main([*WORDS, *words, "--json", str(path)])
    content = json.loads(path.read_text())
    assert set(content) >= {"benchmark", "date", "command", "machine", "versions", "settings", "rows", "notes"}
    assert content["benchmark"] == benchmark.__name__.rpartition(".")[2]
    return content


def by_case(content):
    return {row["case"]: row for row in content["rows"]}


def test_rollout(tmp_path):
    rows = by_case(run(rollout, tmp_path, "--only", "rollout"))
    whole, parts = rows["rollout"], rows["prefill"]["seconds"] + rows["decode"]["seconds"]
    assert parts == pytest.approx(whole["seconds"])
    assert whole["tokens_per_second"] == pytest.approx(16 / whole["seconds"])
    assert rows["one token of all rows"]["floor"] > 0
    assert set(rows) == {"encode", "prefill", "decode", "rollout", "one token of all rows"}


def test_update(tmp_path):
    content = run(update, tmp_path, "--only", "update")
    rows, settings = by_case(content), content["settings"]
    # What is done and not useful is masked or computed twice.
    assert 0.6 < settings["useful_flops"] / settings["done_flops"] < 1
    useful = settings["useful_flops"] / rows["update"]["seconds"]
    assert rows["update"]["utilisation"] == pytest.approx(useful / settings["matrix_peak"])
    assert rows["update"]["samples_per_second"] == pytest.approx(4 / rows["update"]["seconds"])


def test_without_a_shared_prefix_every_completion_has_its_prompt():
    base = workload.Workload(SIZE)
    targets = base.targets(base.rollout())
    other, apart = update._ungrouped(base, targets)
    assert (other.size.prompts, other.size.samples, apart.tokens.shape) == (4, 1, (4, 1, 4))
    for p in range(2):
        for g in range(2):
            np.testing.assert_array_equal(other.batch.tokens[2 * p + g], base.batch.tokens[p])
            np.testing.assert_array_equal(other.encoded[2 * p + g], base.encoded[p])
            np.testing.assert_array_equal(apart.tokens[2 * p + g, 0], targets.tokens[p, g])
            assert apart.advantage[2 * p + g, 0] == targets.advantage[p, g]


def test_an_update_that_differs_without_the_shared_prefix_is_an_error():
    report = harness.Report("update", {})
    same = {"loss": 0.5, "grad_norm": 1.0}
    update._check_same(report, same, same, rtol=1e-4)
    with pytest.raises(RuntimeError, match="grad_norm is 1.0 with the shared prefix and 1.01 without"):
        update._check_same(report, same, same | {"grad_norm": 1.01}, rtol=1e-4)


def test_step(tmp_path):
    (row,) = run(step, tmp_path, "--steps", "2", "--only", "step")["rows"]
    parts = sum(row[phase] for phase in ("data", "encode", "rollout", "reward", "score", "reward_wait", "update"))
    assert 0 < parts < 1.5 * row["step"]


def test_reward_overlap(tmp_path, monkeypatch):
    phases = {"rollout": 4.0, "reward": 1.0, "score": 2.0, "reward_wait": 0.25, "update": 2.0}
    steps = [{"seconds": 10.0, **{f"seconds/{phase}": value for phase, value in phases.items()}}]

    def in_turns(work, cases, *, rounds, steps):
        for options in cases.values():
            work.config(1, **options).validate()
        return {name: free if name.endswith("length") else timed for name in cases}

    timed, free = steps, [{**steps[0], "seconds": 8.0}]
    monkeypatch.setattr(reward_overlap, "in_turns", in_turns)
    one, two = run(reward_overlap, tmp_path)["rows"]
    # With two chunks, the texts of the first are made while the device samples the second.
    assert (one["case"], one["waiting"], one["idle_share"]) == ("1 chunk", 1.25, 0.125)
    assert (two["case"], two["waiting"], two["against_length"]) == ("2 chunks", 0.75, 1.25)


def test_memory(tmp_path):
    words = "--only score --factors 1 --chunk 4 --vocabularies 128 4096".split()
    small, large = run(memory, tmp_path, *words)["rows"]
    assert small["vocabulary_mb"] == 0
    assert large["vocabulary_mb"] > 0
    assert large["logits_mb"] == pytest.approx(16 * 4096 * 4 / 1e6)


def test_compile(tmp_path):
    rows = by_case(run(compilation, tmp_path, "--only", "layers", "--layers", "3"))
    assert set(rows) == {"3 layers, rollout", "3 layers, update"}
    assert all(row["seconds"] > 0 for row in rows.values())


def test_compilations_are_counted_by_program():
    def double(x):
        return x + x

    with compilation.compilations() as count:
        for length in (3, 4, 3):
            jax.jit(double)(np.zeros(length))
    jax.jit(double)(np.zeros(5))
    assert count == {"jit(double)": 2}


def test_scale(tmp_path):
    words = "--only new_tokens --factors 0.5 1 --programs encode rollout --device-counts".split()
    rows = run(scale, tmp_path, *words)["rows"]
    assert [row["program"] for row in rows] == ["encode", "rollout"]
    for row in rows:
        assert row["exponent"] == pytest.approx(np.log2(row["x1"] / row["x0.5"]))


def test_more_prompts_are_also_updated_in_micro_batches(tmp_path):
    words = "--only prompts --factors 1 2 --programs update --device-counts".split()
    rows = run(scale, tmp_path, *words)["rows"]
    assert [row["program"] for row in rows] == ["update", "update in micro-batches"]
    assert all(row["x2"] > 0 for row in rows)


def test_cases_take_turns(monkeypatch):
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = harness.measure(cases, rounds=2, warmup=2)
    assert "".join(calls) == "aabb" + "abab"
    assert [len(timing.seconds) for timing in timings.values()] == [2, 2]
    assert harness.Timing(9.0, [3.0, 1.0, 2.0]).median == 2.0


def test_an_unknown_case_is_refused():
    with pytest.raises(UserError, match="--only names c; the cases are a, b"):
        harness.chosen({"a": 1, "b": 2}, ["c", "a"])


def test_table():
    assert harness.table([{"case": "a", "n": 1000, "x": 0.12345}, {"case": "longer", "x": 12345.6}]) == (
        "case        n       x\na       1,000  0.1235\nlonger         12,346"
    )


def test_every_completion_has_all_its_tokens_and_an_export_is_the_same_model(tmp_path):
    work = workload.Workload(SIZE)
    out = work.rollout()
    assert np.asarray(out.mask).all() and out.tokens.shape == (2, 2, 4)
    work.export(tmp_path / "model")
    processor, model = Processor.from_pretrained(tmp_path / "model"), load_model(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, processor(work.clips, work.texts), work.batch)
    arrays = split_model(model)[1]
    assert arrays.keys() == work.params.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, work.params[name])
    padding = processor.pad_id
    words = [workload.word(token) for token in out.tokens[0, 0].tolist() if token != padding]
    assert processor.decode(out)[0][0].split() == words
