"""What our side and a peer's share: the exported weights, the inputs, and the turns of a comparison."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from benchmarks.harness import Report, Timing
from benchmarks.peers.conversation import Peer
from benchmarks.peers.environments import ROOT, add_argument, interpreter
from benchmarks.workload import Size, Workload, completion_shapes
from jgrpo.core.logprobs import chunked_logprobs
from model_port.batch import Batch, Completions
from model_port.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what every comparison with a peer asks for."""
    add_argument(parser)
    parser.add_argument("--log", type=Path, default=Path("build") / "peer.log", help="file for what the peer prints")
    return parser


def run(compare: Callable[[argparse.Namespace], None], options: argparse.Namespace, *, environment: str) -> int:
    """Make a comparison if the peer's environment is there; print what the user can mend and return the exit status."""
    try:
        interpreter(environment, options.environments)
        compare(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


@contextmanager
def exported(workload: Workload) -> Iterator[Path]:
    """Write a workload as `model/` and `inputs.npz`, which the torch peers read; yield their directory."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        workload.export(directory / "model")
        batch = jax.device_get(workload.batch)
        queries = batch.audio_slots.max() + 1
        np.savez(
            directory / "inputs.npz",
            tokens=batch.tokens,
            features=batch.features[:, 0],
            audio=np.ones((len(batch.tokens), queries), bool),
        )
        yield directory


def torch_settings(workload: Workload, directory: Path, **more: Any) -> dict[str, Any]:
    """Return the settings of a torch peer."""
    size = workload.size
    return {
        "directory": str(directory),
        "samples": size.samples,
        **dict(zip(("lengths", "shared"), (x.tolist() for x in completion_shapes(size)), strict=True)),
        "new_tokens": size.new_tokens,
        "dtype": size.dtype,
        "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
        **more,
    }


def start(side: str, environment: str, settings: dict[str, Any], arguments: argparse.Namespace) -> Peer:
    """Start a peer's side, `side_NAME`, in its environment."""
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    # Not resolved: a virtual environment is known by the path of its interpreter, which is a link.
    python = interpreter(environment, arguments.environments.absolute())
    command = [str(python), "-m", f"benchmarks.peers.side_{side}"]
    return Peer(side, command, settings, log=arguments.log.absolute(), cwd=ROOT)


def full_logprobs(workload: Workload, batch: Batch, completions: Completions) -> np.ndarray:
    """Return log-probs [P, G, T] over all of the vocabulary: the peers do not leave `<|audio|>` out of it."""
    run, trees = workload.run, workload.trees(completions)

    @jax.jit
    def compute(params, frozen):
        model = run.definition.bind(frozen, params)
        hidden = model.completion_hidden(batch, model.encode(batch.features, batch.lengths), trees)
        return chunked_logprobs(hidden, trees.tokens, model.logits, chunk_tokens=4096, temperature=1.0)[0]

    with jax.set_mesh(run.mesh):
        nodes, node_of = np.asarray(compute(workload.state.params, workload.frozen)), np.asarray(trees.node_of)
    return np.take_along_axis(nodes, node_of.reshape(len(nodes), -1), axis=1).reshape(node_of.shape)


def timing_rows(report: Report, size: Size, timings: dict[str, Timing]) -> None:
    """Add a row per system; tokens per second are those of all completions."""
    tokens = int(completion_shapes(size)[0].sum())
    for name, timing in timings.items():
        columns = {"seconds": timing.median, "low": timing.low, "high": timing.high, "first_call": timing.first}
        report.row(system=name, **columns, tokens_per_second=tokens / timing.median)


def judge(report: Report, what: str, ratio: float, target: float) -> None:
    """Note whether a ratio meets its target."""
    report.note(f"{'PASS' if ratio >= target else 'FAIL'}: {what} {ratio:.2f} x, target {target:g} x")
