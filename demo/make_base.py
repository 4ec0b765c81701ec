# ruff: noqa: T201 (a program that talks to a person)
"""Make demo/base, the small pretrained Granite Speech that the demo starts from, with the project's own training code.

    python -m demo.make_corpus --set all      # speech for it, in demo/build/ (needs espeak-ng)
    python -m demo.make_base

1. The encoder learns to spell (CTC, demo/train_encoder.py).
2. Projector and decoder learn translation, transcription and question answering on it (configs/demo_base.py).
3. The result is written as a Hugging Face directory in float16.

The same versions on the same kind of machine give the same files.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

from configs.demo_base import get_config
from demo.base_model import CONFIG, initial_model
from demo.train_encoder import train_encoder, word_errors
from jgrpo.train_sft import train_sft
from model_port.weights.convert import export
from model_port.weights.hf_writer import write_hf

HERE = Path(__file__).parent


def main() -> None:
    """Train both stages and write demo/base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "base", help="directory to write; it is replaced")
    parser.add_argument("--ctc-steps", type=int, default=600, help="updates of the encoder")
    options = parser.parse_args()
    encoder = HERE / "build" / "encoder"
    if not encoder.exists():
        make_encoder(encoder, steps=options.ctc_steps)
    train_sft(get_config())
    shutil.rmtree(options.out, ignore_errors=True)
    export(HERE / "build" / "base_run" / "policy", options.out, dtype="float16")
    print(f"wrote {options.out}")


def make_encoder(out: Path, *, steps: int) -> None:
    """Train the encoder and write a model directory with the rest of the model still random."""
    definition, params = initial_model(seed=0)
    params = train_encoder(definition, params, HERE / "build" / "ctc.jsonl", steps=steps)
    for name in ("val", "test_voices"):
        print(f"word error rate on {name}: {word_errors(definition, params, HERE / f'{name}.jsonl'):.3f}")
    write_hf(out, CONFIG, {name: np.asarray(value) for name, value in params.items()}, source_dir=HERE / "tokenizer")


if __name__ == "__main__":
    main()
