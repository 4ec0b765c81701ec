"""A mistake of the user's is one clear message on standard error and exit status 2, before any model is loaded."""

import ast
import json
import re
import shutil

import numpy as np
import pytest
import soundfile

from jgrpo import cli, setup
from tests.e2e.conftest import make_base, read_rows, write_manifest


@pytest.fixture
def refuse(work, tmp_path, capsys, monkeypatch):
    """Run a command that must fail before it loads a model, and return its message."""

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(setup, "load_model", loaded)
    monkeypatch.setattr("model_port.load_model", loaded)

    def run(*argv):
        argv = [str(argument) for argument in argv]
        if argv and argv[0] in ("sft", "grpo") and "--run-dir" not in argv:
            argv += ["--run-dir", str(tmp_path / "run")]
        assert cli.main(argv) == 2
        out, errors = capsys.readouterr()
        assert "Traceback" not in errors and out == ""
        assert errors.endswith("\n") and not errors.endswith("\n\n")
        return errors

    return run


@pytest.fixture
def manifest(work, tmp_path):
    """Write the training manifest with one row changed, and return its path."""

    def write(line, **changes):
        rows = read_rows(work.train)
        rows[line - 1].update(changes)
        rows[line - 1] = {name: value for name, value in rows[line - 1].items() if value is not None}
        write_manifest(tmp_path / "changed.jsonl", rows)
        return tmp_path / "changed.jsonl"

    return write


def write_clip(path, seconds):
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(round(16000 * seconds)), 16000)
    return str(path)


def test_commands(refuse, capsys):
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"  jgrpo {command} " in usage
    assert refuse() == usage
    assert refuse("nonsense") == (
        "error: unknown command 'nonsense'; use one of demo, grpo, sft, eval, plan, data, generate (jgrpo --help)\n"
    )
    for command in ("grpo", "sft", "eval"):
        message = f"error: the config file comes first: jgrpo {command} CONFIG.py [OPTIONS]; configs/ has examples\n"
        assert refuse(command) == message if command == "eval" else refuse(command, "--num-steps", "3") == message
    assert refuse("demo", "--run-dir", "gs://bucket/demo") == (
        "error: --run-dir is gs://bucket/demo; the demo writes to a disk, give a directory\n"
    )


@pytest.mark.parametrize("command", ["grpo", "sft", "eval"])
def test_help_lists_every_option(work, command, capsys):
    """With a config file the defaults are the file's."""
    assert cli.main([command, "--help"]) == 0
    general = capsys.readouterr().out
    assert f"usage: jgrpo {command} CONFIG.py [-h] [OPTIONS]" in general and "get_config()" in general
    for option in ("--run-dir", "--num-steps", "--data.train", "--optimiser.learning-rate", "--eval.seeds"):
        assert option in general
    assert ("--grpo.num-samples" in general) == (command == "grpo")
    assert ("--policy MODEL" in general) == (command == "eval")
    config = work.grpo if command == "grpo" else work.sft
    assert cli.main([command, str(config), "--help"]) == 0
    specific = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert "(default: runs/unnamed)" in specific and "(required)" not in specific


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--num-step", "3"], ["Unrecognized options: --num-step", "Perhaps you meant", "--num-steps INT"]),
        (["--lr", "3"], ["Unrecognized options: --lr"]),
        (["--num-steps", "many"], ["Error parsing --num-steps", "'many'"]),
        (["--model.dtype", "float8"], ["invalid choice 'float8'", "'float32', 'bfloat16'"]),
        (["--num-steps"], ["Missing value for argument '--num-steps'"]),
    ],
)
def test_options(refuse, work, options, expected):
    message = re.sub(r"[\s│]+", " ", refuse("grpo", work.grpo, *options))
    for part in expected:
        assert part in message


# What is wrong in a config file, and a part of the message.
CONFIG_FAULTS = [
    ("num_steps=6", "num_step=6", "line 5: GRPOConfig has no field num_step; did you mean num_steps? It has run_dir,"),
    ("learning_rate=3e-2", "lr=3e-2", "line 12: OptimiserOptions has no field lr. It has learning_rate, warmup_frac"),
    ("num_steps=6", "num_steps='6'", "num_steps must be int, got '6'"),
    ("num_steps=6", "num_steps=True", "num_steps must be int, got True"),
    ('("projector", "decoder")', '("decoder")', "model.trainable must be a tuple of str, got 'decoder'"),
    ('schedule="constant"', 'schedule="flat"', "optimiser.schedule must be one of 'cosine', 'linear', 'constant'"),
    ("num_steps=6,", "", "line 5: TypeError: GRPOConfig.__init__() missing 1 required keyword-only argument"),
    ("num_steps=6,", "num_steps=6", "SyntaxError: invalid syntax. Perhaps you forgot a comma?"),
    ("get_config", "config", "it does not define get_config()"),
    ("return GRPOConfig(", "return dict(", "returned a dict; return an SFTConfig or a GRPOConfig"),
]

# A process of its own, because in this one the test hooks check the fields of dataclasses first.
RUN_ALL = """
import contextlib, io
for path in sys.argv[1:]:
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        print(main(["grpo", path]), end=" ")
    print(repr(errors.getvalue()))
sys.exit()
"""


def test_config_files(work, tmp_path):
    paths = [tmp_path / f"{number}.py" for number in range(len(CONFIG_FAULTS))]
    for path, (old, new, _) in zip(paths, CONFIG_FAULTS, strict=True):
        assert old in work.grpo.read_text()
        path.write_text(work.grpo.read_text().replace(old, new))
    out, errors = work.start(*paths, before=RUN_ALL).communicate(timeout=120)
    assert errors == ""
    for line, path, (_, _, expected) in zip(out.splitlines(), paths, CONFIG_FAULTS, strict=True):
        status, message = line.split(" ", 1)
        assert (status, ast.literal_eval(message).count("\n")) == ("2", 1)
        assert expected in ast.literal_eval(message)
        assert str(path) in message or " must be " in message


def test_wrong_kinds_of_file(refuse, work, tmp_path):
    assert "missing.py does not exist" in refuse("grpo", tmp_path / "missing.py")
    assert "is not a Python file" in refuse("grpo", work.train)
    assert refuse("sft", work.grpo) == f"error: {work.grpo} returns a GRPOConfig, and jgrpo sft needs an SFTConfig\n"


@pytest.mark.parametrize(
    "options, expected",
    [
        ("--mesh.data 4 --mesh.tensor 4", "mesh data=4 x fsdp=1 x tensor=4 needs 16 devices; this process sees 8"),
        ("--mesh.data 4 --prompts-per-step 6", "prompts per micro-batch is 6, which does not divide over data x fsdp"),
        ("--mesh.fsdp 4 --micro-batches 2", "prompts per micro-batch is 2, which does not divide"),
        ("--mesh.data 0", "mesh.data must be at least 1, got 0"),
        ("--mesh.tensor 3", "choose a tensor size that divides"),
        ("--prompts-per-step 6 --micro-batches 4", "must be a multiple of micro_batches 4"),
        ("--prompts-per-step 0", "prompts_per_step must be at least 1, got 0"),
        ("--checkpoint.every 0", "checkpoint.every must be at least 1, got 0"),
        ("--eval.every 5", "eval.every is set but data.validation is not"),
        ("--optimiser.beta2 1", "beta2 is 1.0; it must lie in [0, 1)"),
        ("--data.audio-buckets 3 2", "data.audio_buckets must be rising seconds, got (3.0, 2.0)"),
        ("--grpo.num-samples 1", "a group needs at least 2 samples"),
        ("--grpo.temperature 0", "grpo.temperature is 0"),
        ("--grpo.beta -1", "grpo.beta must be at least 0, got -1.0"),
        ("--grpo.reward blue", "reward 'blue' is unknown: use one of bleu, chrf, "),
        ("--grpo.reward nowhere:f", "module 'nowhere' cannot be imported"),
        ("--grpo.reward user_rewards:g", "module 'user_rewards' has no function 'g'"),
        ("--grpo.reward bleu wer --grpo.reward-weights 1", "names 2 components and reward_weights gives 1"),
        ("--model.path /nowhere", "/nowhere is not a model directory"),
        ("--model.trainable projector lorra", "trainable pattern 'lorra' matches no parameter; the model has decoder"),
        ("--model.trainable all --data.cache-encoder", "data.cache_encoder is on but model.trainable has the encoder"),
        ("--model.lora none --model.trainable lora", "and no LoRA adapter"),
        ("--model.lora fresh --model.lora-targets q_prj", "model.lora_targets names q_prj; allowed are q_proj"),
        ("--data.train /nowhere.jsonl", "/nowhere.jsonl: no such manifest"),
    ],
)
def test_impossible_runs(refuse, work, options, expected, tmp_path):
    message = refuse("grpo", work.grpo, *options.split())
    assert message.startswith("error: ") and expected in message
    assert not (tmp_path / "run").exists()


def test_manifests(refuse, manifest, work, tmp_path):
    """Every fault names the line and says what is needed."""

    def message(line, **changes):
        return refuse("sft", work.sft, "--data.train", manifest(line, **changes))

    assert "line 3: 'reference' is missing" in message(3, reference=None)
    assert "line 2: the prompt holds 0 <|audio|> markers for 1 audio files" in message(2, prompt="translate")
    silent = write_clip(tmp_path / "empty.wav", 0)
    assert re.search(r"line 1: .*empty\.wav: 0 samples at 16000 Hz are too short", message(1, audio=silent))
    (tmp_path / "text.wav").write_text("no sound")
    assert re.search(r"line 4: .*text\.wav: not a readable audio file", message(4, audio=str(tmp_path / "text.wav")))
    assert re.search(r"line 4: .*gone\.wav: no such audio file", message(4, audio=str(tmp_path / "gone.wav")))
    long = write_clip(tmp_path / "long.wav", 1.6)
    assert re.search(
        r"line 2: .*long\.wav lasts 1\.60 s and the longest audio bucket holds 1\.5", message(2, audio=long)
    )
    wordy = message(3, reference="lang " * 30)
    assert re.search(r"line 3: the reference has \d+ tokens with its end token; completions hold 20", wordy)
    assert "max_prompt_tokens is 256" in message(1, prompt="<|audio|> " + "very " * 300)
    (tmp_path / "changed.jsonl").write_text("{}\n[1]\n{")
    several = refuse("sft", work.sft, "--data.train", tmp_path / "changed.jsonl")
    assert all(f"line {line}: " in several for line in (1, 2, 3))


def test_eval_options(refuse, work, tmp_path):
    def message(*options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builtins.print", quiet_print)
            return refuse("eval", work.sft, "--run-dir", tmp_path / "run", *options)

    def quiet_print(*args, file=None, **kwargs):
        if file is not None:
            file.write(" ".join(map(str, args)) + "\n")

    assert "data.test names nothing" in message("--data.test")
    other = tmp_path / "test.jsonl"
    shutil.copy(work.test, other)
    assert "data.test has test twice" in message("--data.test", work.test, other)
    assert "is not a model directory" in message("--policy", tmp_path / "nothing")
    assert "expected one argument" in message("--policy")


def test_generate_options(refuse, work):
    clip = read_rows(work.train)[0]["audio"]
    assert "is not a model directory" in refuse("generate", "/nowhere", "--audio", clip, "--prompt", "<|audio|>")
    assert "no such audio file" in refuse("generate", work.base, "--audio", "/none.wav", "--prompt", "<|audio|>")
    assert "1 clips were given" in refuse("generate", work.base, "--audio", clip, "--prompt", "no marker")
    cold = refuse("generate", work.base, "--audio", clip, "--prompt", "<|audio|>", "--temperature", "-1")
    assert "temperature must be 0 (greedy) or a positive number, got -1.0" in cold
    assert "arguments are required: --audio, --prompt" in refuse("generate", work.base)


def test_run_directories(refuse, work, sft_run, tmp_path):
    """A directory with another run in it, or one that cannot be made."""
    message = refuse("sft", work.sft, "--run-dir", sft_run, "--seed", "5", "--optimiser.learning-rate", "0.1")
    assert message == (
        f"error: {sft_run} holds a run with another config:\n  seed: 0 there, 5 now\n"
        "  optimiser.learning_rate: 0.03 there, 0.1 now\nuse another --run-dir or the same config\n"
    )
    assert "kind: 'SFTConfig' there, 'GRPOConfig' now" in refuse("grpo", work.grpo, "--run-dir", sft_run)
    (tmp_path / "file").write_text("")
    assert "cannot write to the run directory" in refuse("sft", work.sft, "--run-dir", tmp_path / "file" / "run")
    shutil.copytree(sft_run, tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text('{"kind": "SFT')
    assert "config.json is damaged" in refuse("sft", work.sft, "--run-dir", tmp_path / "torn")


def test_a_checkpoint_of_another_model(work, sft_run, tmp_path, capsys):
    """The config is the same and the directory it names holds another model; no step is taken."""
    shutil.copytree(sft_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["path"] = str(tmp_path / "base")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    make_base(tmp_path / "base", num_hidden_layers=2)
    argv = ["sft", str(work.sft), "--run-dir", str(tmp_path / "run"), "--model.path", str(tmp_path / "base")]
    assert cli.main(argv) == 2
    message = capsys.readouterr().err
    assert "is of another model or configuration: " in message and "[3, 32]" in message and "[2, 32]" in message


def test_a_model_directory_without_weights(refuse, work, tmp_path):
    shutil.copytree(work.base, tmp_path / "base", ignore=shutil.ignore_patterns("model.safetensors"))
    message = refuse("sft", work.sft, "--model.path", tmp_path / "base")
    assert "is no model directory: it needs config.json and either model.safetensors or" in message


def test_an_end_token_that_does_not_end(refuse, work, tmp_path):
    shutil.copytree(work.base, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 5
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    message = refuse("sft", work.sft, "--model.path", tmp_path / "base")
    assert "the tokenizer ends a text with token 0, and sampling stops at 5 as" in message


def test_faults_that_show_while_training(work, manifest, tmp_path, capsys):
    """A reward that fails and a clip that ends early stop the run with a message; the files are closed and complete."""
    run = tmp_path / "reward"
    options = ("--grpo.reward", "user_rewards:breaks")
    assert cli.main(["grpo", str(work.grpo), "--run-dir", str(run), *options]) == 2
    message = capsys.readouterr().err
    assert "error: reward 'user_rewards:breaks' failed with RuntimeError: out of luck, at example 0" in message
    assert read_rows(run / "metrics.jsonl") == []
    clip = tmp_path / "cut.flac"
    write_clip(clip, 1.0)
    clip.write_bytes(clip.read_bytes()[:20000])
    run = tmp_path / "audio"
    argv = ["sft", str(work.sft), "--run-dir", str(run), "--data.train", str(manifest(1, audio=str(clip)))]
    assert cli.main(argv) == 2
    assert re.search(r"^error: .*cut\.flac: ", capsys.readouterr().err)
