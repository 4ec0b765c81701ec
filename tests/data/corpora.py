"""LibriSQA and CoVoST2 as they are downloaded, in small: real layouts, synthesised speech, and all that goes wrong.

What the builders must find is written down beside what is made: see LIBRISQA_* and COVOST2_*.
"""

import itertools
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import soundfile
import soxr

from model_port.audio import load_audio

ROOT = Path(__file__).parents[2]
M4A = Path(__file__).parent / "clip.m4a"  # 0.3 s of AAC in an MP4 container, which libsndfile does not decode
SPEECH = ROOT / "demo" / "audio" / "train"

# Speaker -> chapter, of LibriSpeech train-clean-360; three utterances each.
LIBRISQA_TRAIN = {"14": "208", "16": "122", "17": "363", "19": "198"}
LIBRISQA_DROPS = {
    "train": [
        ("20-205-0001", "undecodable"),  # of a flac file the end is missed only when it is reached
        ("20-205-0002", "empty clip"),
        ("20-205-0003", "missing clip"),
        ("14-208-0001", "duplicate id"),
        ("20-205-0000", "empty text"),
        ("20-205-0004", "bad row"),
        ("notes", "bad row"),
        ("", "bad row"),
    ],
    "test": [("61-70968-0002", "too short")],
}
COVOST2_DROPS = {
    "train": [
        ("common_voice_en_100", "truncated"),
        ("common_voice_en_101", "empty clip"),
        ("common_voice_en_102", "missing clip"),
        ("common_voice_en_103", "unsupported format"),
        ("common_voice_en_104", "empty text"),
        ("common_voice_en_105", "REMOVE"),
        ("common_voice_en_2", "duplicate id"),
        ("common_voice_en_106", "no transcript"),
    ],
    "validation": [("common_voice_en_107", "unsupported format")],
    "test": [("common_voice_en_108", "too short")],
    "unknown": [("", "bad row"), ("common_voice_en_109", "bad row")],
}
QUOTED = 'He said: "wait, and left.'  # a quote that nothing closes


def speech(count: int) -> list[np.ndarray]:
    """Return pieces of the demo's clips at 16 kHz, of 0.4 to 1.5 seconds."""
    files = sorted(SPEECH.glob("*.opus"))[:4]
    waves = [load_audio(file) for file in files]
    lengths = np.linspace(6400, 24000, count).astype(int)
    return [np.resize(waves[i % len(waves)], length) for i, length in enumerate(lengths.tolist())]


def make_librisqa(root: Path, archives: bool) -> Path:
    """Write both parts of LibriSQA and their audio below `root`, as archives or unpacked."""
    train = [f"{voice}-{chapter}-{k:04d}" for voice, chapter in LIBRISQA_TRAIN.items() for k in range(3)]
    train += [f"20-205-{k:04d}" for k in (0, 1, 2)]
    test = [f"{voice}-70968-{k:04d}" for voice in ("61", "121") for k in range(3)]
    waves = iter(speech(len(train) + len(test)))
    for split, names in (("train-clean-360", train), ("test-clean", test)):
        for name, wave in zip(names, waves, strict=False):
            path = _utterance(root, split, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, wave, 16000, subtype="PCM_16")
            with (path.parent / f"{name.rsplit('-', 1)[0]}.trans.txt").open("a") as file:
                file.write(f"{name} THE WORDS OF {name}\n")
    cut = _utterance(root, "train-clean-360", "20-205-0001")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    _utterance(root, "train-clean-360", "20-205-0002").write_bytes(b"")
    soundfile.write(_utterance(root, "test-clean", "61-70968-0002"), np.zeros(200), 16000, subtype="PCM_16")
    (root / "LibriSpeech" / "README.TXT").write_text("LibriSpeech\n")
    for part in ("PartI", "PartII"):
        _write_librisqa_json(root, part, train, test)
    if archives:
        for split in ("train-clean-360", "test-clean"):
            _pack(root / f"{split}.tar.gz", root, [Path("LibriSpeech", split), Path("LibriSpeech", "README.TXT")])
        shutil.rmtree(root / "LibriSpeech")
    return root


def _utterance(root: Path, split: str, name: str) -> Path:
    return root / "LibriSpeech" / split / Path(*name.split("-")[:2]) / f"{name}.flac"


def _write_librisqa_json(root: Path, part: str, train: list[str], test: list[str]) -> None:
    rows = {split: [_entry(part, split, name) for name in names] for split, names in (("train", train), ("test", test))}
    broken = _entry(part, "train", "20-205-0004")
    del broken["answer"]
    rows["train"] += [
        _entry(part, "train", "20-205-0003"),
        _entry(part, "train", "14-208-0001"),
        broken,
        _entry(part, "train", "notes"),
        "not an object",
    ]
    rows["train"][train.index("20-205-0000")]["answer"] = " "
    folder = root / f"LibriSQA-{part}"
    folder.mkdir()
    for split, entries in rows.items():
        (folder / f"LibriSQA-{part}-{split}.json").write_text(json.dumps(entries, indent=1))


def _entry(part: str, split: str, name: str) -> dict:
    """Return an entry as published: its path ends in .wav and is none of LibriSpeech's."""
    folder = {"train": "train-clean-360", "test": "test-clean"}[split]
    entry = {"speech_path": f"{folder}/{'/'.join(name.split('-')[:2])}/{name}.wav"}
    if part == "PartI":
        entry |= {"question": f"What is {name}?", "answer": f"It is “{name}”."}
    else:
        entry |= {"question_and_option": f"What is {name}?\nA. one\nB. two", "answer": "B"}
        entry |= {"answer_and_analysis": f"B. two, as {name} says."}
    return entry | {"text": f"THE WORDS OF {name}", "duration": 1.0}


def make_covost2(root: Path, archives: bool) -> Path:
    """Write Common Voice 4's English and CoVoST2's en_de below `root`, as archives or unpacked."""
    splits = [*["train"] * 6, *["train_covost"] * 4, *["dev"] * 3, *["test"] * 3]
    folder = root / "en"
    (folder / "clips").mkdir(parents=True)
    table = [("path", "translation", "split")]
    validated = [("client_id", "path", "sentence", "up_votes", "down_votes", "age", "gender", "accent")]
    for number, (split, wave) in enumerate(zip(splits, speech(len(splits)), strict=True)):
        path = _clip(folder, number, wave)
        table.append((path.name, f"Satz Nummer {number}, hörbar.", split))
        validated.append(_validated(f"{number // 2:08x}", path.name, f"Sentence number {number}."))
    table[5] = (table[5][0], f'"{table[5][1]}', "train")
    validated[5] = _validated("quoter", table[5][0], QUOTED)
    table[7] = (table[7][0], "Eins\\\tzwei", "train_covost")  # a tab that a backslash keeps in its cell
    _add_oddities(folder, table, validated)
    (root / "covost_v2.en_de.tsv").write_text(_lines(table), encoding="utf-8")
    (folder / "validated.tsv").write_text(_lines(validated), encoding="utf-8")
    (folder / "invalidated.tsv").write_text(_lines(validated[:1]), encoding="utf-8")
    if archives:
        _pack(root / "en.tar.gz", folder, [Path("clips"), Path("invalidated.tsv"), Path("validated.tsv")])
        _pack(root / "covost_v2.en_de.tsv.tar.gz", root, [Path("covost_v2.en_de.tsv")])
        shutil.rmtree(folder)
        (root / "covost_v2.en_de.tsv").unlink()
    return root


def _add_oddities(folder: Path, table: list, validated: list) -> None:
    wave = speech(1)[0]
    for number in (100, 101, 104, 105, 106):
        _clip(folder, number, wave)
    _clip(folder, 999, wave)  # nobody has translated this one
    cut = folder / "clips" / "common_voice_en_100.mp3"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (folder / "clips" / "common_voice_en_101.mp3").write_bytes(b"")
    shutil.copy(M4A, folder / "clips" / "common_voice_en_103.m4a")
    (folder / "clips" / "common_voice_en_107.mp3").write_bytes(b"<html>404 Not Found</html>" * 40)
    _clip(folder, 108, np.zeros(160))
    translations = {104: " ", 105: "REMOVE (not a sentence)"}
    for number, split in itertools.chain(((n, "train") for n in range(100, 107)), ((107, "dev"), (108, "test"))):
        name = f"common_voice_en_{number}.{'m4a' if number == 103 else 'mp3'}"
        table.append((name, translations.get(number, "Ein Satz."), split))
        if number != 106:
            validated.append(_validated("someone", name, "A sentence."))
    table.append(("common_voice_en_2.mp3", "Noch einmal.", "train"))
    table.append(("common_voice_en_109.mp3", "Ein Satz.", "validated"))
    table.append(("common_voice_en_110.mp3", "Zu", "viele", "train"))
    validated.append(validated[1])  # a clip that is listed twice
    validated.append(("someone", "common_voice_en_3.mp3"))  # a line that was cut


def _clip(folder: Path, number: int, wave: np.ndarray) -> Path:
    path = folder / "clips" / f"common_voice_en_{number}.mp3"
    soundfile.write(path, soxr.resample(wave, 16000, 48000), 48000, format="MP3", subtype="MPEG_LAYER_III")
    return path


def _validated(speaker: str, name: str, sentence: str) -> tuple[str, ...]:
    return speaker, name, sentence, "2", "0", "", "", "us"


def _lines(rows: list[tuple[str, ...]]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


def _pack(archive: Path, folder: Path, names: list[Path]) -> None:
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name in names:
            tar.add(folder / name, arcname=str(name))


def read_lines(path):
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
