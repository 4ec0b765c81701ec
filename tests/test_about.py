"""What a run was made by, and the files that a wheel carries for use outside a checkout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jgrpo import __version__, about, cli
from jgrpo.commands import demo
from jgrpo.config import load_config, run
from jgrpo.config.saved import check_same_run, save_config
from model_port.errors import UserError

ROOT = Path(__file__).parent.parent
CONFIG = "configs/demo_grpo.py"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A directory that is no checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_version_is_told(capsys):
    assert cli.main(["--version"]) == 0
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == f"jgrpo {__version__}"
    assert second == f"commit {about.commit() or 'unknown: not a checkout'}"
    assert f"python {sys.version.split()[0]}" in rest and rest[-1].startswith("devices ")


def test_the_commit_is_that_of_the_checkout_and_none_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(about, "ROOT", tmp_path)
    assert about.commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert about.commit() == f"{head[:12]}-dirty"


def test_a_run_says_what_made_it_and_goes_on_when_that_changes(tmp_path, monkeypatch):
    config, path = load_config(ROOT / CONFIG), tmp_path / "config.json"
    monkeypatch.setattr(sys, "argv", ["jgrpo", "grpo", CONFIG])
    save_config(config, path)
    saved = json.loads(path.read_text())
    assert saved["made_by"]["command"] == ["jgrpo", "grpo", CONFIG]
    assert saved["made_by"]["versions"]["jgrpo"] == __version__
    saved["made_by"]["versions"]["jax"] = "another"
    path.write_text(json.dumps(saved))
    check_same_run(config, path)
    path.write_text(json.dumps(saved | {"seed": 1}))
    with pytest.raises(UserError, match="seed: 1 there, 0 now"):
        check_same_run(config, path)


def test_a_config_of_the_package_is_found_by_its_name(elsewhere, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        load_config(CONFIG)
    monkeypatch.setattr(run, "DATA", ROOT)
    assert load_config(CONFIG) == load_config(ROOT / CONFIG)


def test_the_demo_takes_the_package_s_files_where_there_is_no_checkout(elsewhere, monkeypatch):
    with pytest.raises(UserError, match="the demo needs demo/base, .*: start it in the root of a checkout, or install"):
        demo.demo(Path("runs/demo"))
    seen = []
    monkeypatch.setattr(demo, "DATA", ROOT)
    monkeypatch.setattr(demo, "_demo", lambda run_dir, seed: seen.append((run_dir, Path.cwd(), seed)) or {})
    demo.demo(Path("runs/demo"), seed=3)
    assert seen == [(elsewhere / "runs/demo", ROOT, 3)]
    assert Path.cwd() == elsewhere
