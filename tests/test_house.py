"""The rules of the repository hold, and the tools that keep them would notice if they did not."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("model_port", "jgrpo")


def lint_imports(directory):
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    result = subprocess.run(
        [*command, "--no-cache"], cwd=directory, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("model_port/config.py", "import jgrpo.config", "model_port never imports jgrpo BROKEN"),
        ("jgrpo/core/losses.py", "import jgrpo.config", "inside jgrpo, arrows run one way BROKEN"),
        ("jgrpo/runtime/metrics.py", "import jgrpo.rewards.wer", "inside jgrpo, arrows run one way BROKEN"),
        ("model_port/weights/convert.py", "import torch", "torch and its family belong to the tests BROKEN"),
        ("jgrpo/setup.py", "import transformers", "transformers only in model_port.processor and model_port.weights"),
        ("model_port/weights/convert.py", "import transformers", None),
    ],
)
def test_import_rules_notice(tmp_path, module, line, broken):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("jgrpo/core/losses.py", "jgrpo/runtime/metrics.py", "jgrpo/rewards/wer.py", "model_port/config.py"):
        write_module(tmp_path / name)
    for name in ("jgrpo/config/run.py", "jgrpo/setup.py", "model_port/weights/convert.py", "model_port/processor.py"):
        write_module(tmp_path / name)
    (tmp_path / module).write_text(line + "\n")
    status, output = lint_imports(tmp_path)
    assert "Contracts: 4 kept, 0 broken" in output if broken is None else broken in output
    assert status == (broken is not None)


def write_module(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "__init__.py").touch()
    (path.parent.parent / "__init__.py").touch()
    path.touch()


@pytest.mark.parametrize(("ci", "status"), [("true", pytest.ExitCode.TESTS_FAILED), ("", pytest.ExitCode.OK)])
def test_a_skip_fails_the_run_in_ci(tmp_path, ci, status):
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "test_parity.py").write_text("import pytest\n\n\ndef test_parity():\n    pytest.skip('no torch')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | {"CI": ci}, capture_output=True, text=True)
    assert result.returncode == status, result.stdout
    assert ("skipped tests fail the run in CI" in result.stdout) == bool(ci)


def modules():
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_files_and_functions_stay_readable():
    long_files = [path for path in modules() if len(path.read_text().splitlines()) > 400]
    assert not long_files, f"over 400 lines: {long_files}"
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{path}:{node.lineno} {node.name} has {length} lines; 80 is the limit"


def test_annotations_are_not_strings():
    """`from __future__ import annotations` would switch off the shape checks of every function in the file."""
    assert not [path for path in modules() if "from __future__ import annotations" in path.read_text()]
