"""Every benchmark runs at a tiny size, and its figures are there and hang together."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks import compile as compilation
from benchmarks import harness, memory, reward_overlap, rollout, scale, step, update, workload
from jgrpo.core.tree import sort_rows
from model_port import Processor, load_model
from model_port.errors import UserError
from model_port.params import split_model
from tests.compiling import compiled_once, shared_by_workers

SIZE = workload.Size(model="tiny", prompts=2, samples=2, seconds=1.0, new_tokens=4, text_tokens=4)
WORDS = "--model tiny --prompts 2 --samples 2 --seconds 1 --new-tokens 4 --text-tokens 4 --rounds 1".split()


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    """Programs are the same from test to test, and here nobody waits for fast ones."""
    with compiled_once(shared_by_workers(tmp_path_factory) / "compiled"):
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
    completions = base.completions()
    targets = base.targets(completions)
    other, apart = update._ungrouped(base, completions)
    assert (other.size.prompts, other.size.samples, apart.mask.shape) == (4, 1, (4, 1, 4))
    for p in range(2):
        for g in range(2):
            np.testing.assert_array_equal(other.batch.tokens[2 * p + g], base.batch.tokens[p])
            np.testing.assert_array_equal(other.encoded[2 * p + g], base.encoded[p])
            own = apart.trees.node_of[2 * p + g, 0]
            np.testing.assert_array_equal(apart.trees.tokens[2 * p + g][own], completions.tokens[p, g])
            assert apart.advantage[2 * p + g, 0] == targets.advantage[p, g]


def test_an_update_that_differs_without_the_shared_prefix_is_an_error():
    report = harness.Report("update", {})
    same = {"loss": 0.5, "grad_norm": 1.0}
    update._check_same(report, "rows", same, same, rtol=1e-4)
    with pytest.raises(RuntimeError, match="grad_norm is 1.0 in an update and 1.01 with rows"):
        update._check_same(report, "rows", same, same | {"grad_norm": 1.01}, rtol=1e-4)


def test_step(tmp_path):
    lengths = "--new-tokens 40 --mean-length 6 --sharing 1.3 --samples 4".split()
    content = run(step, tmp_path, *lengths, "--steps", "2", "--only", "step")
    (row,) = content["rows"]
    assert content["notes"][0].startswith("trees x slots of a group: 1 x ")
    parts = sum(row[phase] for phase in ("data", "encode", "rollout", "reward", "score", "reward_wait", "update"))
    assert 0 < parts < 1.5 * row["step"]


def test_completions_of_other_lengths(tmp_path):
    """One of 32 is at the limit, their mean is what was asked for, and beginnings are shared as much."""
    size = workload.Size(model="tiny", prompts=8, samples=8, seconds=1.0, new_tokens=40, text_tokens=4)
    size = dataclasses.replace(size, mean_length=8.0, sharing=1.5)
    lengths, shared = workload.completion_shapes(size)
    assert (lengths == 40).sum() == 2 and 7.5 < lengths.mean() < 8.5
    base = workload.Workload(size)
    out = base.completions()
    np.testing.assert_array_equal(out.mask.sum(-1), lengths)
    rows = sort_rows(out.tokens, out.mask)
    assert lengths.sum() / rows.distinct.sum() == pytest.approx(1.5, rel=0.1)
    common, groups = np.arange(40) < shared[..., None], (np.arange(8), lengths.argmax(1))
    for values in (out.tokens, out.logp):
        np.testing.assert_array_equal((values == values[groups][:, None])[common], True)
    with pytest.raises(UserError, match="--mean-length is 39.9: with 2 of 64 completions at the limit"):
        workload.completion_shapes(dataclasses.replace(size, mean_length=39.9, new_tokens=30))
    with pytest.raises(UserError, match="--sharing is 9; completions of these lengths share between 1 and"):
        workload.completion_shapes(dataclasses.replace(size, sharing=9.0))


def test_an_update_at_other_lengths(tmp_path):
    """Its loss and gradient are those of completions that share nothing, or the benchmark fails."""
    words = "--new-tokens 40 --mean-length 6 --sharing 1.3 --samples 4 --only update rows".split()
    content = run(update, tmp_path, *words)
    assert {row["case"] for row in content["rows"]} == {"update", "rows"}
    assert any("1.23 times their distinct" in note and "1 trees of" in note for note in content["notes"])


def test_growth_with_the_limit_alone(tmp_path):
    words = "--only limit --factors 1 4 --programs encode --device-counts".split()
    (row,) = run(scale, tmp_path, *words)["rows"]
    assert row["case"] == "limit 8, 32"


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
    small, large, *layouts = run(memory, tmp_path, *words, "--limit", "40")["rows"]
    assert [row["program"] for row in layouts][-1] == "score, 2 x 39" and len(layouts) > 1
    assert [row["temporaries_mb"] for row in layouts] == sorted(row["temporaries_mb"] for row in layouts)
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


@pytest.mark.slow
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
