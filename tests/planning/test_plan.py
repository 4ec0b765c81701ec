"""`jgrpo plan`: the table, the JSON, the exit, the search and the mistakes, with a compiler that is not the TPU's."""

import dataclasses
import importlib.util
import json

import jax
import pytest

from jgrpo.planning import plan as plans
from jgrpo.planning.chips import CHIPS, GIB
from jgrpo.planning.estimate import Estimate, divisors, estimate, meshes
from jgrpo.planning.search import candidates, search
from jgrpo.planning.topology import Slice
from model_port.errors import UserError
from model_port.partition import MeshConfig
from tests.planning.conftest import GATHERED, fake_compiler


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch, tiny):
    """The model of every config here."""
    monkeypatch.setattr(plans, "model_config", lambda config, name: tiny)


def run_plan(config, options, **compiler):
    return plans.plan(config, options, devices=jax.devices(), compiler=fake_compiler(**compiler))


def test_a_plan_that_fits(config, options, tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert run_plan(config, options(json=path))
    (found,) = json.loads(path.read_text())
    assert found["fits"] and found["chips"] == 8 and found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    programs = {program["name"]: program for program in found["programs"]}
    assert list(programs) == ["encode", "layout", "rollout", "score", "update"]
    memory = programs["rollout"]["memory"]
    assert memory["total"] == memory["arguments"] + memory["outputs"] + memory["temporaries"] + memory["beside"]
    assert memory["beside"] > sum(found["resident"].values())  # and the copy that decoding takes
    # Five tokens after the first, in each of them five layers.
    gather = programs["rollout"]["collectives"]["all-gather"]["over_tokens"]
    assert gather == {"count": 25, "bytes": 25 * GATHERED}
    assert programs["score"]["loops_counted_once"] == 1
    chip = CHIPS["v5e"]
    seconds = programs["rollout"]["seconds"]
    assert seconds["compute"] == pytest.approx(5 * 5 * 2 * 1024 / chip.flops)
    # A gather over a ring of 8 takes 4 hops, a sum of 2 there and back 2.
    assert programs["rollout"]["hops"] == 25 * 4 + 2
    assert seconds["network"] == pytest.approx((25 * GATHERED + 512) / chip.ici_bandwidth + 102e-6)
    steps = sum(program["calls_per_step"] * max(program["seconds"].values()) for program in programs.values())
    assert found["step_seconds"] == pytest.approx(steps)
    text = capsys.readouterr().out
    assert "v5e:2x4: 8 chips of 15.75 GiB; mesh data 2 x fsdp 2 x tensor 2" in text
    assert "8 prompts x 4 completions of 6 tokens, 2 micro-batches, remat full; clips of 1 s (50 frames)" in text
    assert "It fits:" in text and "An estimate, not a measurement" in text


def test_a_plan_that_does_not_fit(config, options, capsys):
    """One program is too large with what else is there, and one does not compile for that reason."""
    assert not run_plan(config, options(), temporaries=lambda call, _: 15.8 * GIB if call.name == "update" else 0)
    text = capsys.readouterr().out
    assert "TOO MUCH" in text and "It does not fit: update takes 15.80 of 15.75 GiB. Use more micro-batches" in text
    assert not run_plan(config, options(), temporaries=20 * GIB, text="")
    assert "20.00" in capsys.readouterr().out


def test_expected_lengths_give_the_time_and_the_largest_layout_the_memory(config, options, tmp_path, capsys):
    """A group of 4 x 40 tokens: 4 x 12 x 1.5 / 2 = 36 slots are expected, and (4, 39) is what memory must hold."""
    config = dataclasses.replace(config, max_completion_tokens=40)
    path = tmp_path / "plan.json"
    sizes = {}

    def temporaries(call, _):
        if call.name.startswith(("score", "update")):
            sizes[call.name] = call.arguments[-1] if call.name.startswith("score") else call.arguments[-1].trees
        return 15.8 * GIB if call.name == "update, largest" else 0

    assert not run_plan(config, options(json=path, mean_length=12.0, sharing=2.0), temporaries=temporaries)
    assert {name: trees.ends.shape for name, trees in sizes.items()} == {
        "score": (8, 1, 40), "score, largest": (8, 4, 39), "update": (8, 1, 40), "update, largest": (8, 4, 39)
    }  # fmt: skip
    (found,) = json.loads(path.read_text())
    assert (found["mean_length"], found["sharing"], found["trees"], found["slots"]) == (12.0, 2.0, 1, 40)
    times = {program["name"]: program["calls_per_step"] for program in found["programs"]}
    assert times["update"] == times["score"] == 1 and times["update, largest"] == times["score, largest"] == 0
    text = capsys.readouterr().out
    assert (
        "assumed: completions of 12 tokens, 2 times their distinct beginnings, the largest group of a step 1.5" in text
    )
    assert "1 trees of 40 slots; memory is that of the largest layout" in text
    assert "It does not fit: update, largest takes" in text
    run_plan(config, options())
    assert "assumed: every completion has all 40 tokens and shares none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"mean_length": 7.0},
            "--mean-length is 7; completions have at least 1 token and at most max_completion_tokens, 6",
        ),
        ({"mean_length": 0.0}, "--mean-length is 0"),
        ({"mean_length": 3.0, "sharing": 0.5}, "--sharing is 0.5; a group has at least as many tokens as"),
        ({"sharing": 2.0}, "--sharing needs --mean-length"),
    ],
)
def test_lengths_that_cannot_be(config, options, changes, says):
    with pytest.raises(UserError, match=says):
        run_plan(config, options(**changes))


def test_all_buckets(config, options, capsys):
    assert run_plan(config, options(all_buckets=True))
    text = capsys.readouterr().out
    assert "clips of 0.5 s" in text and "clips of 1 s" in text


def test_sft_and_validation(sft, options, capsys):
    validated = dataclasses.replace(
        sft, eval=dataclasses.replace(sft.eval, every=1), data=dataclasses.replace(sft.data, validation="v.jsonl")
    )
    assert run_plan(validated, options())
    text = capsys.readouterr().out
    assert "validation rollout" in text and "score" not in text.split("An estimate")[0].replace("scores", "")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e", "topology 'v5e' is not known; use a generation and its shape, such as"),
        ("v3:8x8", "v4:2x2x1"),
        ("v5p:8x8", "v5p:2x2x1, v5p:2x2x2"),
        ("v6e:0x8", "v6e:1x1, v6e:2x2"),
    ],
)
def test_an_unknown_topology(config, options, name, says):
    with pytest.raises(UserError) as error:
        run_plan(config, options(topology=name))
    assert says in str(error.value)


@pytest.mark.parametrize(("name", "chips"), [("v4:4x4x4", 64), ("v5e:16x16", 256), ("v5p:2x2x1", 4), ("v6e:8x16", 128)])
def test_topologies(name, chips):
    assert Slice.named(name).chips == chips


def test_the_mesh_must_be_the_slice(config, options):
    says = "mesh data=2 x fsdp=2 x tensor=2 is 8 chips and v5e:4x4 has 16; set for example --mesh.data 1 --mesh.fsdp 16"
    with pytest.raises(UserError, match=says):
        run_plan(config, options(topology="v5e:4x4"))


def test_axes_that_do_not_divide(config, options):
    odd = dataclasses.replace(config, mesh=MeshConfig(1, 1, 3))
    with pytest.raises(UserError, match="does not divide over mesh axis 'tensor' of size 3"):
        plans.plan(odd, options(topology="v5e:1x3"), devices=jax.devices()[:3], compiler=fake_compiler())


def test_without_the_tpu_compiler(config, options, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"libtpu\) is not installed; it needs no TPU.*pip install 'jgrpo\[tpu\]'"):
        plans.plan(config, options())


def test_the_parser():
    parser = plans.plan_parser("jgrpo plan config.py")
    options, rest = parser.parse_known_args(["--topology", "v6e:8x8", "--search", "--model.path", "m", "--seed", "3"])
    assert (options.topology, options.search, options.model, rest) == (
        "v6e:8x8", True, None, ["--model.path", "m", "--seed", "3"]
    )  # fmt: skip


# Search


def test_meshes():
    assert sorted(meshes(4)) == [(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def by_mesh(config):
    """More tensor is slower, fewer micro-batches need more memory."""
    return Estimate(memory=8.0 / config.micro_batches, seconds=config.mesh.tensor + config.micro_batches / 10)


def test_candidates_that_may_fit(config):
    found, dropped = candidates(config, 8, hbm=4.0, estimate=by_mesh)
    assert all(candidate.estimate.memory <= 4 and candidate.config.mesh.size == 8 for candidate in found)
    assert [c.estimate.seconds for c in found] == sorted(c.estimate.seconds for c in found)
    assert len(found) > 3 and "data 8 x fsdp 1 x tensor 1, 1 micro-batches: needs at least" in dropped[0]
    assert {candidate.config.prompts_per_step for candidate in found} == {config.prompts_per_step}
    assert all(
        candidate.config.eval.batch_size % (candidate.config.mesh.data * candidate.config.mesh.fsdp) == 0
        for candidate in found
    )


def test_candidates_that_cannot_be(config):
    def refuse(variant):
        if variant.mesh.tensor > 1:
            raise UserError("no such split")
        return by_mesh(variant)

    found, dropped = candidates(config, 8, hbm=100.0, estimate=refuse)
    assert {candidate.config.mesh.tensor for candidate in found} == {1}
    assert dropped.count("data 1 x fsdp 1 x tensor 8: no such split") == 1
    odd = dataclasses.replace(config, prompts_per_step=7, micro_batches=1)
    assert {c.config.mesh for c in candidates(odd, 8, hbm=100.0, estimate=by_mesh)[0]} == {MeshConfig(1, 1, 8)}
    with pytest.raises(UserError, match="data 1 x fsdp 1 x tensor 8: no such split"):
        candidates(odd, 8, hbm=100.0, estimate=refuse)
    halves = dataclasses.replace(odd, grpo=dataclasses.replace(config.grpo, num_minibatches=2))
    with pytest.raises(UserError, match="no mesh of 8 chips can run this: prompts_per_step 7 must be a multiple of"):
        candidates(halves, 8, hbm=100.0, estimate=by_mesh)


@dataclasses.dataclass
class Outcome:
    fits: bool
    step_seconds: float


def test_search_ranks_what_it_compiled(config):
    """Only the promising ones are compiled; after one that does not fit, its mesh is tried with more micro-batches."""
    found, _ = candidates(config, 8, hbm=4.0, estimate=by_mesh)
    seen, said = [], []

    def compiled(variant):
        seen.append((variant.mesh, variant.micro_batches))
        fits = variant.mesh.fsdp > 1 or variant.micro_batches > 4
        return Outcome(fits, 10.0 - variant.mesh.fsdp if fits else 1.0)

    ranked = search(found, compiled, tries=7, say=said.append)
    assert len(seen) == len(said) == len(ranked) == 7
    assert [outcome.fits for _, outcome in ranked] == sorted((outcome.fits for _, outcome in ranked), reverse=True)
    seconds = [outcome.step_seconds for _, outcome in ranked if outcome.fits]
    assert seconds == sorted(seconds) and seconds[0] == 10.0 - max(mesh.fsdp for mesh, _ in seen)
    by_size = {mesh: [pieces for other, pieces in seen if other == mesh] for mesh, _ in seen}
    assert all(len(pieces) == 1 for mesh, pieces in by_size.items() if mesh.fsdp > 1)
    assert any("does not fit" in line for line in said)


def test_search_from_end_to_end(config, options, tmp_path, capsys):
    path = tmp_path / "plans.json"
    assert run_plan(config, options(search=True, json=path))
    text = capsys.readouterr().out
    assert "ways to run it may fit" in text and "1. --mesh.data" in text and "It fits:" in text
    found = json.loads(path.read_text())
    assert len(found) == 2 and found[0]["step_seconds"] <= found[1]["step_seconds"]
    assert found[0]["options"].startswith("--mesh.data ")


def test_search_that_finds_nothing(config, options, capsys):
    assert not run_plan(config, options(search=True, tries=1), temporaries=20 * GIB)
    assert "does not fit" in capsys.readouterr().out


def test_estimates_follow_the_config(config, make_arrays):
    """More micro-batches need less memory; a longer completion needs more time and memory."""
    chip = CHIPS["v5e"]
    plain = estimate(*make_arrays(dataclasses.replace(config, micro_batches=1)), chip)
    pieces = estimate(*make_arrays(config), chip)
    longer = estimate(*make_arrays(dataclasses.replace(config, max_completion_tokens=60)), chip)
    assert pieces.memory < plain.memory < longer.memory
    assert longer.seconds > pieces.seconds >= plain.seconds
