"""Faults that are planted one at a time, and the tests that have to see each.

Command:  python -m tests.mutations [WORD ...]     those with one of the words in them; all take ten minutes

Each is planted in a copy of the packages and tests, where the tests named with it run until the first one fails. One
that none of them sees, or whose line is no longer there, ends the command with status 1.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("jgrpo", "model_port", "tests", "configs", "demo", "benchmarks", "pyproject.toml")


class Mutation(NamedTuple):
    """A fault: `planted` in the place of `line` in a file, and the arguments of pytest that have to find it."""

    file: str
    line: str
    planted: str
    tests: str


MUTATIONS = [
    Mutation(
        "jgrpo/core/advantages.py",
        "axis=1, ddof=1",
        "axis=1, ddof=0",
        "tests/core",
    ),
    Mutation(
        "jgrpo/core/advantages.py",
        "xp.mean(rewards, axis=1, keepdims=True)",
        "xp.mean(rewards)",
        "tests/core",
    ),
    Mutation(
        "jgrpo/core/kl.py",
        "return jnp.expm1(d) - d",
        "return jnp.expm1(-d) + d",
        "tests/core",
    ),
    Mutation(
        "jgrpo/core/losses.py",
        "(advantage < 0) & (ratio < 1 -",
        "(advantage > 0) & (ratio < 1 -",
        "tests/core",
    ),
    Mutation(
        "jgrpo/core/losses.py",
        '"dapo": (_clipped, _by_token)',
        '"dapo": (_clipped, _by_sequence)',
        "tests/core",
    ),
    Mutation(
        "jgrpo/core/losses.py",
        "return jax.lax.stop_gradient(ratio) *",
        "return ratio *",
        "tests/core",
    ),
    Mutation(
        "jgrpo/core/logprobs.py",
        "logits if temperature == 1 else",
        "logits if temperature else",
        "tests/core",
    ),
    Mutation(
        "jgrpo/core/logprobs.py",
        ", keep=target_chunk",
        "",
        "tests/core",
    ),
    Mutation(
        "jgrpo/programs/steps.py",
        "leaf.shape, leaf.dtype), shapes)\n        (grads",
        "leaf.shape, leaf.dtype) + 1, shapes)\n        (grads",
        "tests/invariance/test_trees.py",
    ),
    Mutation(
        "jgrpo/programs/steps.py",
        "sound & ~empty, new, state",
        "sound, new, state",
        "tests/invariance/test_updates.py",
    ),
    Mutation(
        "jgrpo/programs/steps.py",
        '"temperature": objective.temperature, **',
        "**",
        "tests/invariance/test_generation.py",
    ),
    Mutation(
        "jgrpo/programs/layout.py",
        "value if stays(name, value) else move(name, value)",
        "value",
        "tests/invariance/test_mesh.py -k moves",
    ),
    Mutation(
        "model_port/sampling.py",
        "before < top_p",
        "reached < top_p",
        "tests/model_port/test_sampling.py",
    ),
    Mutation(
        "model_port/sampling.py",
        "lowest = jnp.take_along_axis(ordered, num_kept - 1",
        "lowest = jnp.take_along_axis(ordered, num_kept",
        "tests/model_port/test_sampling.py",
    ),
    Mutation(
        "model_port/generate.py",
        "cache, t - 1, **step",
        "cache, t, **step",
        "tests/invariance/test_generation.py",
    ),
    Mutation(
        "model_port/generate.py",
        "& (t + 1 < limits)",
        "& (t + 2 < limits)",
        "tests/benchmarks/test_benchmarks.py -k lengths",
    ),
    Mutation(
        "model_port/model.py",
        "(ids == self.config.audio_token_id) |",
        "(ids < 0) |",
        "tests/invariance/test_generation.py",
    ),
    Mutation(
        "model_port/model.py",
        "| (ids >= self.config.decoder.vocab_size)",
        "",
        "tests/invariance/test_vocabulary.py -k numbers",
    ),
    Mutation(
        "model_port/processor.py",
        "removeprefix(turn)",
        "removeprefix('')",
        "tests/model_port/test_processor.py",
    ),
    Mutation(
        "model_port/model.py",
        "return out / self.config.decoder.logits_scaling",
        "return out",
        "tests/invariance/test_generation.py tests/parity/test_model.py",
    ),
    Mutation(
        "model_port/decoder.py",
        "(slot[None, :] <= slot[:, None])",
        "(slot[None, :] < slot[:, None] + 2)",
        "tests/invariance/test_trees.py",
    ),
    Mutation(
        "model_port/decoder.py",
        "jnp.asarray(self.residual_multiplier, x.dtype)",
        "jnp.asarray(1.0, x.dtype)",
        "tests/parity/test_decoder.py",
    ),
    Mutation(
        "model_port/conformer.py",
        "jnp.where(keys, scores",
        "jnp.where(True, scores",
        "tests/invariance/test_padding.py",
    ),
    Mutation(
        "model_port/conformer.py",
        "offsets[:, None] - offsets[None, :]",
        "offsets[None, :] - offsets[:, None]",
        "tests/parity/test_encoder.py",
    ),
    Mutation(
        "model_port/lora.py",
        "product(product(x, a), b) * jnp.asarray(self.scaling, x.dtype)",
        "product(product(x, a), b)",
        "tests/parity/test_model.py",
    ),
    Mutation(
        "model_port/processor.py",
        "self._gap + text if text and not",
        "text if text and not",
        "tests/model_port/test_processor.py",
    ),
]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Plant faults, and say which test sees each.")
    parser.add_argument("words", nargs="*")
    words = parser.parse_args().words
    chosen = [each for each in MUTATIONS if not words or any(word in part for word in words for part in each)]
    seen = [_try(each) for each in chosen]
    return 0 if chosen and all(seen) else 1


def _try(mutation: Mutation) -> bool:
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        for name in COPIED:
            copy = shutil.copy2 if (ROOT / name).is_file() else shutil.copytree
            copy(ROOT / name, Path(folder) / name)
        file = Path(folder) / mutation.file
        source = file.read_text(encoding="utf-8")
        print(f"{mutation.file}: {mutation.line!r} -> {mutation.planted!r}", flush=True)
        if source.count(mutation.line) != 1:
            print(f"  the line stands there {source.count(mutation.line)} times", flush=True)
            return False
        file.write_text(source.replace(mutation.line, mutation.planted), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *mutation.tests.split()],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
    failed = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    print(f"  {failed[1] if failed else 'NOT SEEN by ' + mutation.tests}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
