"""A build can be interrupted anywhere, never looks complete before it is, and holds few clips at a time."""

import gzip
import io
import json
import os
import sys
import tarfile
import tracemalloc

import pytest
import tensorflow_datasets as tfds

from jgrpo.commands.data import run_data
from jgrpo.data.builders import build as build_data
from jgrpo.data.builders import builder as builder_module
from jgrpo.data.builders import checks, corpus
from jgrpo.data.builders.build import _alone
from jgrpo.data.builders.checks import Workers, check_clip
from jgrpo.data.builders.downloads import Archive, Folder, is_audio
from model_port.errors import UserError
from tests.data.corpora import make_librisqa


@pytest.fixture(scope="session")
def manual(tmp_path_factory):
    return make_librisqa(tmp_path_factory.mktemp("manual"), archives=True)


@pytest.fixture(scope="session")
def whole(manual, tmp_path_factory):
    """A build that nothing disturbed."""
    return build(manual, tmp_path_factory.mktemp("whole"))


def build(manual, out, **options):
    return build_data("librisqa/part1", manual_dir=manual, out=out, **{"workers": 0} | options)


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "array_record" not in path.name
    }


def stop_after(count, calls, error=KeyboardInterrupt):
    """A check that is interrupted at its `count`-th clip."""

    def check(name, data):
        if len(calls) == count:
            raise error
        calls.append(name)
        return check_clip(name, data)

    return check


def test_an_interrupted_build_goes_on_without_decoding_again(manual, whole, tmp_path, monkeypatch):
    calls = []
    log = tmp_path / ".building" / "librisqa-part1-checks.jsonl"
    for stop in (7, 10):
        monkeypatch.setattr(corpus, "check_clip", stop_after(stop, calls))
        with pytest.raises(KeyboardInterrupt):
            build(manual, tmp_path)
        assert not list(tmp_path.rglob("jgrpo.json")) and not (tmp_path / "librisqa").exists()
        assert len(log.read_text().splitlines()) == stop
        with log.open("a") as file:  # what a kill leaves of a line that it cut
            file.write('{"name": "LibriSpeech/tr')
        (log.parent / "librisqa-part1" / "librisqa").mkdir(parents=True)  # and of a record file
    monkeypatch.setattr(corpus, "check_clip", stop_after(-1, calls))
    built = build(manual, tmp_path)
    assert len(set(calls)) == len(calls) == 20
    assert contents(built) == contents(whole)
    assert not (tmp_path / ".building").exists()


def test_a_clip_that_changed_is_decoded_again(manual, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(corpus, "check_clip", stop_after(7, calls))
    with pytest.raises(KeyboardInterrupt):
        build(manual, tmp_path)
    log = tmp_path / ".building" / "librisqa-part1-checks.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows[0]["size"] += 1
    rows[1]["changed"] += 1
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(corpus, "check_clip", stop_after(-1, calls))
    build(manual, tmp_path)
    assert {name for name in calls if calls.count(name) == 2} == {row["name"] for row in rows[:2]}


def test_a_failure_while_writing_leaves_nothing_that_looks_complete(manual, whole, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device", str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(builder_module.SpeechBuilder, "_write_sides", fail)
        with pytest.raises(UserError, match="No space left on device; the same command goes on"):
            build(manual, tmp_path)
    assert [path.name for path in (tmp_path / ".building").iterdir()] == ["librisqa-part1-checks.jsonl"]
    monkeypatch.setattr(corpus, "check_clip", stop_after(0, []))
    assert contents(build(manual, tmp_path)) == contents(whole)


def test_what_is_built_stays_until_it_is_built_again(manual, tmp_path, monkeypatch, whole):
    built = build(manual, tmp_path)
    assert build(tmp_path / "gone", tmp_path) == built  # nothing is read
    before = contents(built)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "check_clip", stop_after(7, []))
        with pytest.raises(KeyboardInterrupt):
            build(manual, tmp_path, overwrite=True)
    assert contents(built) == before
    (built / "jgrpo.json").write_text("{}")
    assert build(manual, tmp_path, overwrite=True) == built
    assert contents(built) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["librisqa"]


def test_a_directory_of_somebody_else_is_left_alone(manual, tmp_path):
    mine = tmp_path / "librisqa" / "part1" / "1.0.0"
    mine.mkdir(parents=True)
    with pytest.raises(UserError, match="exists and is not a data set of jgrpo's"):
        build(manual, tmp_path)


def test_two_builds_of_the_same_do_not_meet(manual, tmp_path):
    with _alone(tmp_path / ".building", "librisqa-part1"):
        with pytest.raises(UserError, match="is being built by another process"):
            build(manual, tmp_path)
    build(manual, tmp_path)


def test_a_download_that_ends_early_is_refused(manual, tmp_path):
    for path in manual.iterdir():
        (tmp_path / path.name).symlink_to(path)
    whole = (manual / "train-clean-360.tar.gz").read_bytes()
    (tmp_path / "train-clean-360.tar.gz").unlink()
    for broken in (whole[:-4], whole[: len(whole) // 2], b"\x1f\x8b" + whole[1000:], whole[1000:]):
        (tmp_path / "train-clean-360.tar.gz").write_bytes(broken)
        with pytest.raises(UserError, match="train-clean-360.tar.gz: the archive is damaged or ends early"):
            build(tmp_path, tmp_path / "out")


def test_the_checksum_of_an_archive_is_reached(tmp_path):
    """Also where zeros follow the last file, which tarfile does not read."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("clips/1.mp3"), io.BytesIO())
    packed = gzip.compress(file.getvalue() + bytes(1_000_000))
    path = tmp_path / "en.tar.gz"
    path.write_bytes(packed)
    assert len(list(Archive(path).members(lambda name: True))) == 1
    path.write_bytes(packed[:-4])
    with pytest.raises(UserError, match="damaged or ends early"):
        list(Archive(path).members(lambda name: True))


def test_an_output_that_is_no_directory_is_said(manual, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file.*: Not a directory"):
        build(manual, tmp_path / "file")


def test_a_disk_that_is_too_small_is_known_before_writing(manual, tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(builder_module.shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match="0.0 GB are free; make room, or choose another --out"):
        build(manual, tmp_path)


def test_records_keep_their_order_over_many_shards(manual, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(builder_module, "SHARD_BYTES", 20_000)
    built = build(manual, tmp_path)
    assert len(list(built.glob("librisqa-train.array_record-*"))) > 3
    source = tfds.builder_from_directory(built).as_data_source("train")
    ids = [json.loads(line)["id"] for line in (whole / "index" / "train.jsonl").read_text().splitlines()]
    assert [source[i]["id"].decode() for i in range(len(source))] == ids


def test_processes_find_the_same_and_hold_few_clips(manual, whole, tmp_path):
    assert contents(build(manual, tmp_path, workers=2)) == contents(whole)
    drawn = []

    def clips():
        for number in range(50):
            drawn.append(number)
            yield str(number), b"", number

    with Workers(2) as workers:
        for name, _, number, found in workers.map(check_clip, clips()):
            assert len(drawn) <= number + 2 * checks.IN_FLIGHT + 1
            assert name == str(number) and found[:2] == (0, "empty clip")
        assert len(drawn) == 50
        with pytest.raises(UserError, match="a process that decodes audio died.*--workers 0"):
            list(workers.map(leave, [("0", b"")]))


def leave(name, data):
    """Die as a process that is killed does."""
    os._exit(1)


def test_an_archive_of_many_files_is_read_in_little_memory(tmp_path):
    path = tmp_path / "many.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(1500):
            entry = tarfile.TarInfo(f"clips/{number}.mp3")
            entry.size = 100
            tar.addfile(entry, io.BytesIO(bytes(100)))
    tracemalloc.start()
    assert sum(len(member.read()) for member in Archive(path).members(lambda name: True)) == 150_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


def test_hidden_companions_are_no_clips(tmp_path):
    for name in ("b/1.flac", "a/2.flac", "a/._2.flac", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [member.name for member in Folder(tmp_path).members(lambda name: name.endswith("flac"))]
    assert found == ["a/._2.flac", "a/2.flac", "b/1.flac"]
    assert [name for name in found if is_audio(name)] == ["a/2.flac", "b/1.flac"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "librispeech",
            {},
            "there is no data set 'librispeech'; there are librisqa/part1, librisqa/part2, covost2/en_ar",
        ),
        ("covost2/de_fr", {}, "there is no data set 'covost2/de_fr'"),
        (
            "covost2/en_de",
            {"seed": 1},
            "comes with a validation split; leave seed, grouping and validation fraction out",
        ),
        ("librisqa/part1", {"workers": -1}, "workers are -1"),
    ],
)
def test_mistakes_are_said(manual, tmp_path, name, options, message):
    with pytest.raises(UserError, match=message):
        build_data(name, manual_dir=manual, out=tmp_path, **options)


def test_the_command_reports_what_became_of_every_row(manual, tmp_path, capsys, monkeypatch):
    command = ["build", "librisqa/part1", "--manual-dir", str(manual), "--out", str(tmp_path), "--workers", "0"]
    run_data(command)
    said = capsys.readouterr().out
    directory = tmp_path / "librisqa" / "part1" / "1.0.0"
    assert said.startswith(f"built {directory}\n")
    for line in ("train: 9 records, 0.00 hours", "dropped from train: 3 bad row", "dropped from test: 1 too short"):
        assert line in said.splitlines()
    run_data(command)
    assert capsys.readouterr().out.startswith(f"{directory} is there already; --overwrite builds it again\n")
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "check_clip", stop_after(3, []))
        with pytest.raises(SystemExit) as caught:
            run_data([*command, "--overwrite"])
    assert caught.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        run_data(["build", "librisqa/part1"])
    assert caught.value.code == 2 and "--manual-dir" in capsys.readouterr().err
    run_data(["inspect", str(directory), "--records", "1"])
    assert "records" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing.jsonl"):
        run_data(["manifest", str(tmp_path / "nothing.jsonl")])
    assert "tensorflow" not in sys.modules
