"""How fast clips become features and batches, how long a training step waits for them, and in how much memory.

    python benchmarks/data.py [--only clips threads waiting memory records] [--json FILE]

needs no data: the clips are noise with the spectrum and the rhythm of speech, 10 s of flac at 16 kHz and 5 s of mp3 at
48 kHz. It prints one table:
    clips     clips per second of one core, by the CPU seconds of this process, for decode -> mono -> 16 kHz -> log-mel;
              the plain loop is soundfile, soxr and torchaudio's MelSpectrogram in one thread. Variants take turns in
              every round, and the median round counts.
    threads   clips per second through the training stream, batches of 8, with so many grain threads
    waiting   what a step of so many milliseconds, in which the host is idle, then waits for its batch
    memory    resident after 5 %, 50 % and all of the records, which are 16 clips of half a second again and again
    records   clips per second out of ArrayRecord files, features stored or computed, one thread
"""

import argparse
import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import grain
import numpy as np
import soundfile
import soxr
import torch
import torchaudio

from jgrpo.data import PromptBatch, PromptData, pipeline, read_manifest
from jgrpo.data.builders import build
from jgrpo.data.built import read_built
from model_port.audio import load_audio
from model_port.features import FFT_SIZE, HOP, NUM_MELS, SAMPLE_RATE, WINDOW, log_mel
from model_port.processor import Processor

FORMATS = {"flac": (16_000, 10.0), "mp3": (48_000, 5.0)}
ROWS = 8  # of a batch
THREADS = (1, 2, 4)
STEPS_MS = (25, 50, 100)
MODEL = Path(__file__).parents[1] / "demo" / "base"

Row = tuple[str, str, float, str]


def speech(seconds: float, rate: int, seed: int) -> np.ndarray:
    """Noise that falls by 6 dB an octave above 300 Hz, in syllables, four a second."""
    rng = np.random.default_rng(seed)
    n = round(seconds * rate)
    spectrum = np.fft.rfft(rng.standard_normal(n)) / np.maximum(np.fft.rfftfreq(n, 1 / rate), 300)
    wave = np.fft.irfft(spectrum, n) * np.maximum(0, np.sin(2 * np.pi * 4 * np.arange(n) / rate + seed)) ** 0.5
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def write_clips(folder: Path, kind: str, *, count: int, seconds: float | None = None) -> list[Path]:
    """Write clips that differ and return their paths."""
    rate, usual = FORMATS[kind]
    folder.mkdir()
    paths = [folder / f"{k}.{kind}" for k in range(count)]
    for k, path in enumerate(paths):
        soundfile.write(path, speech(seconds or usual, rate, k), rate)
    return paths


@functools.cache
def mel_spectrogram() -> torch.nn.Module:
    return torchaudio.transforms.MelSpectrogram(
        sample_rate=SAMPLE_RATE, n_fft=FFT_SIZE, win_length=WINDOW, hop_length=HOP, n_mels=NUM_MELS
    )


@torch.inference_mode()
def plain(path: Path) -> np.ndarray:
    """What one would write with soundfile, soxr and torchaudio."""
    wave, rate = soundfile.read(path, dtype="float32")
    if wave.ndim == 2:
        wave = wave.mean(axis=1)
    if rate != SAMPLE_RATE:
        wave = soxr.resample(wave, rate, SAMPLE_RATE)
    log = mel_spectrogram()(torch.from_numpy(wave)).T.clamp_(min=1e-10).log10_()
    mel = torch.maximum(log, log.max() - 8).div_(4).add_(1)
    return mel[: len(mel) // 2 * 2].reshape(-1, 2 * NUM_MELS).numpy()


def ours(source: Path | bytes) -> np.ndarray:
    """What the package does for each clip of a batch."""
    return log_mel(load_audio(source))


def all_of(function: Callable, sources: Sequence) -> Callable[[], None]:
    def run() -> None:
        for source in sources:
            function(source)

    return run


def take_turns(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each variant."""
    seconds = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def clips(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Decoding to features, ours against the plain loop."""
    torch.set_num_threads(1)
    rows = []
    for kind in FORMATS:
        paths = write_clips(folder / kind, kind, count=arguments.clips)
        data = [path.read_bytes() for path in paths]
        difference = max(np.abs(plain(path) - ours(path)).max() for path in paths)
        assert difference < 1e-3, f"the plain loop computes something else: {difference}"  # it is float32 throughout

        variants = {
            "plain loop": all_of(plain, paths),
            "ours": all_of(ours, paths),
            "ours, from bytes": all_of(ours, data),
            "of that decode and resample": all_of(load_audio, data),
        }
        seconds = take_turns(variants, arguments.rounds)
        rows += [("clips", f"{kind}, {name}", len(paths) / seconds[name], "clips/s of a core") for name in variants]
        rows.append(("clips", f"{kind}, ours / plain loop", seconds["plain loop"] / seconds["ours"], "times"))
    return rows


def manifest(paths: list[Path], lines: int) -> Path:
    """Write a manifest that names the clips in turn."""
    path = paths[0].parent / "train.jsonl"
    texts = {"prompt": "<|audio|> What?", "reference": "That."}
    rows = ({"audio": str(paths[k % len(paths)])} | texts for k in range(lines))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stream(paths: list[Path], *, lines: int, bucket: float, rows: int = ROWS) -> Iterator[PromptBatch]:
    """Return the training stream over a manifest of these clips."""
    data = PromptData(
        read_manifest(manifest(paths, lines)), processor(), prompts_per_step=rows, audio_buckets_seconds=(bucket,)
    )
    return data.stream(seed=0)


@functools.cache
def processor() -> Processor:
    return Processor.from_pretrained(MODEL)


def threads(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Batches as fast as they come, in turns so that a busy machine hits all alike."""
    rates = {(kind, count): [] for kind in FORMATS for count in THREADS}
    paths = {kind: write_clips(folder / f"threads-{kind}", kind, count=arguments.clips) for kind in FORMATS}
    batches, skipped = 16, max(THREADS) + pipeline.READ_OPTIONS.prefetch_buffer_size
    for _ in range(min(arguments.rounds, 5)):
        for kind, count in rates:
            with_threads(count)
            batch = stream(paths[kind], lines=ROWS * 32, bucket=FORMATS[kind][1])
            for _ in islice(batch, skipped):  # until as much is consumed as is begun
                pass
            start = time.perf_counter()
            for _ in islice(batch, batches):
                pass
            rates[kind, count].append(batches * ROWS / (time.perf_counter() - start))
    return [
        ("threads", f"{kind}, {count} thread{'s' if count > 1 else ''}", statistics.median(values), "clips/s")
        for (kind, count), values in rates.items()
    ]


def with_threads(count: int) -> None:
    pipeline.READ_OPTIONS = grain.ReadOptions(
        num_threads=count, prefetch_buffer_size=pipeline.READ_OPTIONS.prefetch_buffer_size
    )


def waiting(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Time between asking for a batch and having it, behind a step that leaves the host alone."""
    with_threads(4)
    paths = write_clips(folder / "waiting", "flac", count=arguments.clips)
    rows = []
    for step in STEPS_MS:
        batch = stream(paths, lines=ROWS * 32, bucket=FORMATS["flac"][1])
        waits = []
        for _ in range(40):
            start = time.perf_counter()
            next(batch)
            waits.append(time.perf_counter() - start)
            time.sleep(step / 1000)
        rows.append(("waiting", f"{ROWS} flac, step of {step} ms, first batch", 1000 * waits[0], "ms"))
        rows.append(("waiting", f"{ROWS} flac, step of {step} ms, median", 1000 * statistics.median(waits[1:]), "ms"))
    return rows


def memory(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Resident memory while the records of a manifest and of ArrayRecord files go by."""
    with_threads(4)
    paths = write_clips(folder / "memory", "flac", count=16, seconds=0.5)
    built = make_built(folder / "memory-built", paths, features=False)
    data = PromptData(
        read_built(f"{built}:train"), processor(), prompts_per_step=2 * ROWS, audio_buckets_seconds=(1.0,)
    )
    streams = {
        "manifest": stream(paths, lines=arguments.records, bucket=1.0, rows=2 * ROWS),
        "ArrayRecord": data.stream(seed=0),
    }
    rows, total = [], arguments.records // (2 * ROWS)
    for name, batches in streams.items():
        done = 0
        for share in (0.05, 0.5, 1.0):
            for _ in islice(batches, round(share * total) - done):
                pass
            done = round(share * total)
            rows.append(("memory", f"{name}, after {done * 2 * ROWS:,} records", resident(), "MB"))
    return rows


def resident() -> float:
    """Resident memory of this process in MB, from Linux's /proc."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def records(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Examples out of a built data set, whose records hold the features or only the audio."""
    paths = write_clips(folder / "records", "flac", count=2 * arguments.clips)
    variants, sizes = {}, {}
    for name, features in (("computed", False), ("stored", True)):
        directory = make_built(folder / f"records-{name}", paths, features=features)
        examples = read_built(f"{directory}:train")
        count = len(examples)
        variants[name] = all_of(examples.features, range(count))
        sizes[name] = sum(file.stat().st_size for file in directory.glob("*train.array_record*")) / count
    seconds = take_turns(variants, arguments.rounds)
    rows = [("records", f"10 s of flac, features {name}", count / seconds[name], "clips/s") for name in variants]
    return rows + [("records", f"10 s of flac, features {name}", size / 1000, "kB") for name, size in sizes.items()]


def make_built(folder: Path, paths: list[Path], *, features: bool) -> Path:
    """Build LibriSQA of these flac files, as if they were LibriSpeech; all but the last are the split train."""
    downloads = folder / "downloads"
    entries: dict[str, list] = {"train": [], "test": []}
    for k, path in enumerate(paths):
        split, audio = ("test", "test-clean") if k == len(paths) - 1 else ("train", "train-clean-360")
        name = f"{k + 1}-1-0000"
        utterance = downloads / "LibriSpeech" / audio / str(k + 1) / "1" / f"{name}.flac"
        utterance.parent.mkdir(parents=True)
        utterance.write_bytes(path.read_bytes())
        entries[split].append({"speech_path": f"{name}.wav", "question": "What?", "answer": "That.", "text": "THAT"})
    for split, rows in entries.items():
        (downloads / f"LibriSQA-PartI-{split}.json").write_text(json.dumps(rows))
    return build(
        "librisqa/part1", manual_dir=downloads, out=folder, features=features, workers=0, validation_fraction=0.0
    )


PARTS = {"clips": clips, "threads": threads, "waiting": waiting, "memory": memory, "records": records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts of the table")
    parser.add_argument("--clips", type=int, default=16, help="clips that differ, of each format")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--records", type=int, default=20_000, help="that memory is watched over")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            rows += PARTS[name](Path(folder), arguments)
    machine = {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "threads_of_torch": 1,
        **{module.__name__: module.__version__ for module in (np, soundfile, soxr, torch, torchaudio, grain)},
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for part, case, value, unit in rows:
        print(f"{part:<10}{case:<46}{value:>10,.{2 if unit == 'times' else 1}f} {unit}")
    if arguments.json:
        figures = [dict(zip(("part", "case", "value", "unit"), row, strict=True)) for row in rows]
        arguments.json.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
