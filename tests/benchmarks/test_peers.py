"""The conversation with a peer, its environments and its command lines, with a process that plays the peer."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.harness import arguments
from benchmarks.peers import against_generate, against_trl, against_tunix, environments
from benchmarks.peers.conversation import Peer
from benchmarks.peers.exchange import full_logprobs
from benchmarks.peers.text import TextWorkload
from benchmarks.workload import Size
from model_port.errors import UserError

ROOT = Path(__file__).parents[2]
GOOD = """
import sys
from benchmarks.peers.answers import run_side, serve

def side(line, settings):
    print("chatter of a library")
    line.answer(settings=settings)
    serve(line, {"double": lambda: {"value": 2 * settings["number"]}, "fail": lambda: 1 // 0})

run_side(side)
"""


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a peer whose process runs a program; all are ended afterwards."""
    peers = []

    def start(program, **options):
        log = tmp_path / "peer.log"
        peer = Peer("fake", [sys.executable, "-c", program], {"number": 21}, log=log, cwd=ROOT, **options)
        peers.append(peer)
        return peer

    yield start
    for peer in peers:
        peer.close()


def test_requests_are_answered_in_turn_whatever_the_libraries_print(start, tmp_path):
    with start(GOOD) as peer:
        assert peer.ready == {"settings": {"number": 21}}
        assert [peer.ask(do="double") for _ in range(2)] == [{"value": 42}] * 2
    assert "chatter" in (tmp_path / "peer.log").read_text()


def test_a_failure_of_the_peer_comes_with_its_log(start):
    peer = start(GOOD)
    with pytest.raises(UserError, match=r"the peer fake failed: ZeroDivisionError.*its log .*chatter"):
        raise_in_one_line(lambda: peer.ask(do="fail"))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.stdin.readline(); print('gone', file=sys.stderr); sys.exit(7)", "ended with status 7.*gone"),
        ("input(); print('hello')", "answered 'hello.*not a JSON object"),
        ("input(); print([1])", "answered '.1.*not a JSON object"),
        ("import time; time.sleep(60)", "gave no answer within 0.5 s"),
    ],
)
def test_a_peer_that_does_not_answer_is_named(start, program, message):
    with pytest.raises(UserError, match=message):
        raise_in_one_line(lambda: start(program, start_seconds=0.5 if "sleep" in program else 20))


def raise_in_one_line(function):
    """Let a pattern match over the lines of a message."""
    try:
        function()
    except UserError as error:
        raise UserError(str(error).replace("\n", " ")) from None


def test_a_peer_that_cannot_be_started_is_named(tmp_path):
    with pytest.raises(UserError, match="the peer fake cannot be started by /nowhere/python"):
        Peer("fake", ["/nowhere/python"], {}, log=tmp_path / "log", cwd=ROOT)


def test_the_log_may_be_empty(start):
    with pytest.raises(UserError, match="is empty"):
        start("pass")


def test_every_version_of_an_environment_is_pinned():
    for name, environment in environments.ENVIRONMENTS.items():
        lines = (Path(environments.__file__).parent / environment.requirements).read_text().splitlines()
        pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
        assert pinned, name
    assert pinned["google-tunix"] == "0.1.7"


def test_an_environment_that_is_missing_says_how_to_make_it(tmp_path):
    command = f"python -m benchmarks.peers.environments trl --environments {tmp_path}"
    with pytest.raises(UserError, match=command):
        environments.interpreter("trl", tmp_path)
    with pytest.raises(UserError, match="no environment 'verl'; there are trl, tunix"):
        environments.interpreter("verl", tmp_path)


def test_making_an_environment_runs_these_commands(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        subprocess, "run", lambda step, **options: ran.append(step) or subprocess.CompletedProcess([], 0)
    )
    python = environments.make("tunix", tmp_path, cuda=True)
    assert python == tmp_path / "tunix" / "bin" / "python"
    venv, install, check = (" ".join(step) for step in ran)
    assert venv.endswith(f"-m venv {tmp_path / 'tunix'}")
    assert "requirements-tunix.txt" in install and install.endswith("jax[cuda13]==0.10.2")
    assert check == f"{python} -c import tunix, jax"


def test_an_environment_that_cannot_be_made_is_a_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda step, **options: subprocess.CompletedProcess(step, 3))
    assert environments.main(["trl", "--environments", str(tmp_path)]) == 2
    assert "ended with status 3" in capsys.readouterr().err


@pytest.mark.parametrize("claim", [against_generate, against_trl, against_tunix])
def test_a_comparison_without_its_environment_ends_before_it_computes(claim, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claim, "compare", None)
    assert claim.main(["--environments", str(tmp_path)]) == 2
    assert "make it by `python -m benchmarks.peers.environments" in capsys.readouterr().err


def test_answers_are_one_object_a_line():
    program = "from benchmarks.peers.answers import Line; line = Line(); print('x'); line.answer(a=1); line.answer(b=2)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [json.loads(text) for text in done.stdout.splitlines()] == [{"a": 1}, {"b": 2}]
    assert done.stderr == "x\n"


def test_tunix_updates_on_what_ours_sampled(tmp_path):
    size = Size.of(
        arguments("", text_tokens=6).parse_args("--model tiny --prompts 2 --samples 2 --new-tokens 4".split())
    )
    workload = TextWorkload(size, beta=0.1, learning_rate=1e-3)
    completions = jax.device_get(workload.rollout())
    targets = workload.targets(completions)
    against_tunix.write(workload, completions, targets, tmp_path)
    with np.load(tmp_path / "inputs.npz") as written:
        assert written["tokens"].shape == (2, 6) and written["advantage"].shape == (2, 2)
        np.testing.assert_array_equal(written["completions"], completions.tokens)
        np.testing.assert_array_equal(written["ref_logp"], completions.logp)
    assert full_logprobs(workload, workload.batch, completions).shape == completions.tokens.shape
    assert np.isfinite(float(workload.update(targets)["loss"]))
