"""A workplace as a user has it: a model directory, manifests, config files, rewards and the command line."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from jgrpo import cli
from jgrpo.runtime.metrics import MetricsWriter
from model_port.config import GraniteSpeechConfig
from model_port.paths import as_path
from tests.compiling import compiled_once, shared_by_workers
from tests.fake_gcs import Store, serve
from tests.hf_tiny import make_hf_model, save_hf_dir

ROOT = Path(__file__).parents[2]
LONGEST = 1.5  # seconds; the one audio bucket

WORDS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")

CONFIG = """\
from jgrpo.config import {kind}, DataOptions, EvalOptions, ModelOptions, OptimiserOptions{options_import}


def get_config():
    return {kind}(
        run_dir="runs/unnamed",
        model=ModelOptions(path={base!r}, trainable=("projector", "decoder")),
        data=DataOptions(train={train!r}, test=({test!r},), audio_buckets=({longest},), {cache}=True),
        num_steps={num_steps},
        prompts_per_step=4,
        max_completion_tokens=20,
        optimiser=OptimiserOptions(learning_rate=3e-2, warmup_fraction=0.0, schedule="constant"),
        eval=EvalOptions(seeds=(0, 1), batch_size=4),
        completions_every=2,{options}
    )
"""

REWARDS = '''\
"""Rewards of a user."""


def letter_e(completions, references, **columns):
    """How often a completion says e."""
    return [text.count("e") / 10 for text in completions]


def is_short(completions, references, *, duration, **columns):
    """Reads a column of the manifest."""
    assert all(0 < seconds < 2 for seconds in duration)
    return [1.0 / (1 + len(text)) for text in completions]


def breaks(completions, references, **columns):
    raise RuntimeError("out of luck")
'''


@dataclass(frozen=True)
class Workplace:
    """Paths of what a user starts with, and how a command is started there."""

    root: Path
    base: Path
    train: Path
    test: Path
    grpo: Path
    sft: Path

    def start(self, *argv: str | Path, before: str = "", devices: int = 1) -> subprocess.Popen:
        """Start `jgrpo` with these arguments in a process of its own, on CPU devices; `before` is code run first."""
        program = f"import sys\nfrom jgrpo.cli import main\n{before}\nsys.exit(main())"
        return subprocess.Popen(
            [sys.executable, "-c", program, *map(str, argv)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **self._environment()},
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(self.root)]),
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let all runs of the session, those in other processes too, share their compiled programs."""
    with compiled_once(shared_by_workers(tmp_path_factory) / "compiled"):
        yield


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """Make the workplace; what needs no change by a test is shared by all."""
    root = tmp_path_factory.mktemp("work")
    base, train, test = root / "base", root / "train.jsonl", root / "test.jsonl"
    make_base(base)
    # Words that tell the prompts apart let so small a model memorise the references in seconds.
    rows = [{**row, "prompt": f"{row['prompt']} {word}"} for row, word in zip(demo_rows(), WORDS, strict=False)]
    write_manifest(train, rows[:4])
    write_manifest(test, rows[4:])
    (root / "user_rewards.py").write_text(REWARDS)
    paths = {"base": str(base), "train": str(train), "test": str(test), "longest": LONGEST}
    grpo, sft = root / "grpo.py", root / "sft.py"
    options = '\n        grpo=GRPOOptions(num_samples=4, reward=("user_rewards:letter_e",)),'
    supervised = {"kind": "SFTConfig", "num_steps": 40, "cache": "cache_encoder", "options_import": "", "options": ""}
    reinforced = {"kind": "GRPOConfig", "num_steps": 6, "cache": "cache_features", "options_import": ", GRPOOptions"}
    sft.write_text(CONFIG.format(**supervised, **paths))
    grpo.write_text(CONFIG.format(**reinforced, options=options, **paths))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        patch.chdir(root)
        yield Workplace(root=root, base=base, train=train, test=test, grpo=grpo, sft=sft)


@pytest.fixture(scope="session")
def bucket() -> Iterator[Store]:
    """gs://bucket for this process and those that it starts."""
    with serve() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        yield store


@pytest.fixture(scope="session")
def grpo_run(work: Workplace) -> Path:
    """A finished GRPO run of six steps that nothing disturbed."""
    return train(work.grpo, work.root / "grpo_run")


@pytest.fixture(scope="session")
def sft_run(work: Workplace) -> Path:
    """A finished SFT run of forty steps that nothing disturbed, evaluated in between on what it trains on."""
    return train(work.sft, work.root / "sft_run", *validated(work))


def validated(work: Workplace) -> tuple[str, ...]:
    """Return the options that evaluate a run twice on its training set."""
    return ("--eval.every", "20", "--data.validation", str(work.train))


def train(config: Path, run_dir: str | Path, *options: str) -> Path:
    """Run the training command of a config file of `Workplace` to its end and return the run directory."""
    command = "grpo" if "GRPOConfig" in config.read_text() else "sft"
    assert cli.main([command, str(config), "--run-dir", str(run_dir), *options]) == 0
    return run_dir


def read_rows(path: Path) -> list[dict]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def interruption(step: int) -> Iterator[None]:
    """Interrupt a run in this process, as Ctrl-C does, once it has logged a step and before it saves that one."""

    def write(self, number, metrics):
        logged(self, number, metrics)
        if number == step:
            raise KeyboardInterrupt

    logged = MetricsWriter.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsWriter, "write", write)
        yield


def saved_arrays(run_dir: str | Path, step: int) -> dict[str, np.ndarray]:
    """Read all arrays of a checkpoint: parameters and optimiser state."""
    device = SingleDeviceSharding(jax.devices()[0])
    with ocp.training.Checkpointer(as_path(run_dir) / "checkpoints") as checkpoints:
        table = checkpoints.metadata(step).custom_metadata["arrays"]
        target = {
            name: jax.ShapeDtypeStruct(entry["shape"], entry["dtype"], sharding=device) for name, entry in table.items()
        }
        return jax.device_get(checkpoints.load(step, target))


def assert_same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Compare every bit of two dicts of arrays."""
    assert one.keys() == other.keys() and one
    different = [name for name in one if np.asarray(one[name]).tobytes() != np.asarray(other[name]).tobytes()]
    assert not different


def make_base(path: Path, **changes: int) -> None:
    """Write a tiny random model with an adapter as transformers stores it, and the demo's tokenizer."""
    tiny = GraniteSpeechConfig.tiny()
    decoder = dataclasses.replace(tiny.decoder, vocab_size=1024, **changes)
    save_hf_dir(make_hf_model(dataclasses.replace(tiny, decoder=decoder, audio_token_id=1023)), path)
    for file in (ROOT / "demo" / "tokenizer").iterdir():
        shutil.copy(file, path)


def demo_rows() -> list[dict]:
    """Rows of the demo's training manifest whose clips fit the bucket, with full paths."""
    rows = read_rows(ROOT / "demo" / "train.jsonl")
    return [{**row, "audio": str(ROOT / "demo" / row["audio"])} for row in rows if row["duration"] < LONGEST]


def write_manifest(path: Path, rows: Sequence[dict]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
