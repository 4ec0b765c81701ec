"""What README, CONTRIBUTING and docs tell a person to type or to open is there."""

import ast
import dataclasses
import functools
import importlib
import re
import shlex
import typing
from pathlib import Path

import pytest

from jgrpo import cli
from jgrpo.commands import data
from jgrpo.config import GRPOConfig, RunConfig, SFTConfig
from jgrpo.planning.plan import plan_parser
from model_port import cli as model_port_cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The log and the plans' tables tell of commits that are gone.
HISTORY = ("log.md",)
PRESENT = [path for path in DOCUMENTS if path.name not in HISTORY]
# What commands write, or a person names.
MADE = ("runs/", "checkpoints/", "data/", "downloads/", "my/", "models/", "clips/", "build/", "demo/build")


def blocks(document, language):
    return [text for kind, text in BLOCK.findall(document.read_text()) if kind == language]


def shell_lines():
    for document in DOCUMENTS:
        text = "".join(blocks(document, "")).replace("\\\n", " ") + "".join(
            f"{line}\n" for line in re.findall(r"`((?:jgrpo|model-port|make|python -m) [^`\n]+)`", document.read_text())
        )
        for line in text.splitlines() if document.name not in HISTORY else ():
            for command in re.split(r" && |; ", line.split(" # ")[0].split("   ")[0].strip()):
                if re.match(r"(jgrpo|model-port|make|python -m|tpu_scripts/\S+) ?", command):
                    yield pytest.param(command, id=f"{document.stem}: {command[:60]}")


@functools.cache
def config_options(kind):
    """Every option of a config: the fields of a dataclass and of those in it."""
    found = set()
    for name, hint in typing.get_type_hints(kind).items():
        option = f"--{name.replace('_', '-')}"
        inner = config_options(hint) if dataclasses.is_dataclass(hint) else {option, option.replace("--", "--no-")}
        found |= {f"{option}.{one.removeprefix('--')}" for one in inner} if dataclasses.is_dataclass(hint) else inner
    return found


@functools.cache
def parsers(module):
    (commands,) = (action for action in module._parser()._actions if action.choices and action.dest != "help")
    return {name: set(parser._option_string_actions) for name, parser in commands.choices.items()}


def options_of(words):
    """Return the options that a command knows; an AssertionError names a command that there is not."""
    program, command = words[0], words[1] if len(words) > 1 else ""
    if program == "model-port":
        return parsers(model_port_cli)[command]
    if command == "generate":
        return parsers(model_port_cli)["generate"]
    if command == "data":
        return parsers(data)[words[2]] if len(words) > 2 and words[2] in parsers(data) else set()
    if command == "demo":
        return {"--run-dir", "--seed"}
    assert command in cli.COMMANDS or command.startswith("--"), f"jgrpo has no {command}"
    known = config_options({"grpo": GRPOConfig, "sft": SFTConfig}.get(command, RunConfig)) | {"--help", "--version"}
    if command in ("plan", "eval"):
        known |= config_options(GRPOConfig) | {"--policy"} | set(plan_parser("")._option_string_actions)
    return known


@pytest.mark.parametrize("command", list(shell_lines()))
def test_a_command_is_one_that_there_is(command):
    words = shlex.split(re.sub(r"[\[\]|…]|\.\.\.", " ", command))
    given = {word.split("=")[0] for word in words if re.match(r"--\w", word)}
    if words[0] in ("jgrpo", "model-port"):
        assert given <= options_of(words)
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:2]) <= set(targets)
    elif words[0] == "python":
        module = words[2]
        if module.startswith("benchmarks.") and module != "benchmarks.NAME":
            source = importlib.import_module(module).__file__
            known = Path(source).read_text() + (ROOT / "benchmarks/harness.py").read_text()
            known += (ROOT / "benchmarks/peers/exchange.py").read_text()
            assert not [option for option in given if f'"{option}"' not in known]
        else:
            assert module in ("pytest", "jgrpo", "venv", "pip", "benchmarks.NAME")
    else:
        assert (ROOT / words[0]).exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_python_imports_what_there_is(document):
    for text in blocks(document, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert not [name.name for name in node.names if not hasattr(module, name.name)]
            elif isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)


@pytest.mark.parametrize("document", PRESENT, ids=lambda path: path.stem)
def test_files_that_are_named_are_there(document):
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    assert not [link for link in links if not (document.parent / link).exists()]
    rooms = "deploy|jgrpo|model_port|docs|configs|tests|benchmarks|tpu_scripts|demo"
    named = re.findall(rf"(?<![\w/.-])((?:{rooms})/[\w./-]*\w)", re.sub(r"https?://\S+", "", text))
    missing = {path for path in named if not (ROOT / path).exists() and not list(ROOT.glob(f"{path}*"))}
    assert not {path for path in missing if not path.startswith(MADE)}
