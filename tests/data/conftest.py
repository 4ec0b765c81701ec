import json

import numpy as np
import pytest
import soundfile

from jgrpo.data.builders import build
from model_port.processor import Processor
from tests.data.corpora import make_covost2, make_librisqa
from tests.model_port.toy_tokenizer import make_model_dir

SECONDS = (0.3, 0.4, 0.5, 0.6, 0.7, 1.3, 1.9)


@pytest.fixture(scope="session")
def processor(tmp_path_factory):
    return Processor.from_pretrained(make_model_dir(tmp_path_factory.mktemp("model")))


@pytest.fixture
def write_manifest(tmp_path):
    """Write rows as JSON lines beside the audio files 0.wav ... 6.wav, which last SECONDS."""
    rng = np.random.default_rng(0)
    for k, seconds in enumerate(SECONDS):
        wave = 0.1 * rng.standard_normal(round(seconds * 16000))
        soundfile.write(tmp_path / f"{k}.wav", wave.astype(np.float32), 16000)

    def write(rows):
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / "train.jsonl"

    return write


@pytest.fixture
def rows():
    """Seven examples; row k has k times 'x' as its reference, so that rows can be told apart."""
    return [
        {"audio": f"{k}.wav", "prompt": "<|audio|> translate.", "reference": "x" * (k + 1), "topic": f"topic {k}"}
        for k in range(len(SECONDS))
    ]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Tiny data sets as `jgrpo data build` makes them: librisqa/part1, the same with features, covost2/en_de."""
    root = tmp_path_factory.mktemp("corpora")
    librisqa, covost2 = make_librisqa(root / "librisqa", archives=False), make_covost2(root / "covost2", archives=False)
    build("librisqa/part1", manual_dir=librisqa, out=root / "data", workers=0)
    build("librisqa/part1", manual_dir=librisqa, out=root / "data", workers=0, features=True)
    build("covost2/en_de", manual_dir=covost2, out=root / "data", workers=0)
    return root / "data"
