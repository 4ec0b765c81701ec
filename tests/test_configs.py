"""Every config of the project: loaded, checked, laid over a mesh, and run at full size as shapes."""

import ast
import dataclasses
import re
import shlex
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jgrpo import cli
from jgrpo.commands import evaluate, train
from jgrpo.config import GRPOConfig, GRPOOptions, SFTConfig, load_config
from jgrpo.core.tree import pack, sort_rows
from jgrpo.data.builders.build import names
from jgrpo.data.built import parse_split
from jgrpo.paper.recipes import CORPORA
from jgrpo.paper.tables import COLUMNS, ROWS, base_row, paper_row
from jgrpo.programs.steps import Targets, TrainState, grpo_objective, make_programs, sft_objective
from jgrpo.runtime.optimiser import make_optimiser
from jgrpo.setup import check_config
from model_port.batch import Batch
from model_port.errors import UserError
from model_port.features import SAMPLE_RATE, num_frames
from model_port.params import select, split_model
from model_port.partition import MeshConfig, make_mesh, param_shardings
from model_port.published import PUBLISHED
from model_port.weights.tree import abstract_model

ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.py"))}
OF_THE_PAPER = [name for name in CONFIGS if not name.startswith("demo")]
# What a run is evaluated with besides its own samples; several programs of a config have these shapes in common.
BEAMS = 4


def header(name):
    return ast.get_docstring(ast.parse(CONFIGS[name].read_text()), clean=False)


def differences(one, other, prefix=""):
    """Dotted names of the fields in which two configs differ."""
    found = set()
    for entry in dataclasses.fields(one):
        a, b = getattr(one, entry.name), getattr(other, entry.name)
        if dataclasses.is_dataclass(a):
            found |= differences(a, b, f"{prefix}{entry.name}.")
        elif a != b:
            found.add(prefix + entry.name)
    return found


def shape(size, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(size, dtype)


class FullSize:
    """The programs of a config at full size, as shapes; each is traced once for all configs that share it."""

    def __init__(self):
        self.models, self.traced = {}, set()

    def model(self, config):
        name = Path(config.model.path).name
        if name not in self.models:
            self.models[name] = split_model(abstract_model(PUBLISHED[name], config.model.dtype))
        return PUBLISHED[name], *self.models[name]

    def check(self, config):
        """Trace rollout, score and update, and what an evaluation runs, for clips of the longest bucket."""
        model, definition, params = self.model(config)
        chosen = select(definition, config.model.trainable)
        trained = {name: shape(params[name].shape) for name in chosen}
        frozen = {name: leaf for name, leaf in params.items() if name not in chosen}
        grpo, limit = getattr(config, "grpo", None), config.max_completion_tokens
        programs = make_programs(
            definition,
            mesh=make_mesh(config.mesh),
            optimiser=(optimiser := make_optimiser(config.num_steps, **vars(config.optimiser))),
            objective=grpo_objective(grpo, limit) if grpo else sft_objective(),
            trainable=chosen,
            remat=config.model.remat,
            logprob_chunk=config.model.logprob_chunk,
            micro_batches=config.micro_batches,
        )

        def trace(program, rows, *arrays, state=trained, **options):
            kind = str(grpo) if program == "update" else ""
            key = (config.model.path, program, rows, kind, str(arrays), str(options))
            if key in self.traced:
                return None
            self.traced.add(key)
            inputs = self.inputs(config, model, rows)
            return getattr(programs, program).__wrapped__.eval_shape(state, frozen, *inputs, *arrays, **options)

        groups = (config.prompts_per_step, grpo.num_samples if grpo else 1, limit)
        trees = pack(sort_rows(np.zeros(groups, np.int32), np.ones(groups, bool)), (groups[1], limit - 1))
        if grpo:
            sampled = (groups[0], groups[1] - grpo.mixed_policy)
            out = trace("rollout", sampled[0], key_shape(*sampled), num_tokens=limit, temperature=grpo.temperature)
            assert out is None or out.tokens.shape == (*sampled, limit)
            trace("score", groups[0], jax.tree.map(lambda x: shape(x.shape, x.dtype), trees))
        targets = Targets(
            trees=trees,
            mask=np.ones(groups, bool),
            old_logp=np.zeros(groups, np.float32),
            ref_logp=np.zeros(groups, np.float32) if grpo else None,
            advantage=np.zeros(groups[:2], np.float32),
            is_off_policy=np.zeros(groups[:2], bool) if grpo and grpo.mixed_policy else None,
        )
        targets = jax.tree.map(lambda x: shape(x.shape, x.dtype), targets)
        state = TrainState(params=trained, opt_state=jax.eval_shape(optimiser.init, trained))
        out = trace("update", groups[0], targets, state=state)
        assert out is None or jax.tree.map(lambda x: x.shape, out[0].params) == {n: x.shape for n, x in trained.items()}
        rows, seeds = config.eval.batch_size, len(config.eval.seeds)
        sampling = {"temperature": config.eval.temperature, "top_p": config.eval.top_p}
        trace("rollout", rows, key_shape(rows, seeds), num_tokens=limit, **sampling)
        trace("beam", rows, num_beams=BEAMS, num_tokens=limit)

    def inputs(self, config, model, rows):
        """The shapes of a batch and its encoder output."""
        frames = num_frames(round(SAMPLE_RATE * config.data.audio_buckets[-1]))
        tokens = config.data.max_prompt_tokens + model.projector.num_slots(frames)
        batch = Batch(
            tokens=np.zeros((rows, tokens), np.int32),
            mask=np.zeros((rows, tokens), bool),
            audio_slots=np.zeros((rows, tokens), np.int32),
            features=np.zeros((rows, 1, frames, model.encoder.input_dim), np.float32),
            lengths=np.zeros((rows, 1), np.int32),
        )
        encoded = shape((rows, 1, frames, model.encoder.hidden_dim), config.model.dtype)
        return jax.tree.map(lambda x: shape(x.shape, x.dtype), batch), encoded


def key_shape(*size):
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))


@pytest.fixture(scope="module")
def full_size():
    return FullSize()


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def task_of(name):
    """The task of a run, as its file's name says it."""
    return re.match(r"(librisqa|covost2_en_de)_", name)[1]


def test_every_task_can_be_built():
    assert {task.data for task in CORPORA.values()} <= set(names())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_sound(name):
    config = load_config(CONFIGS[name])
    config.validate()
    assert isinstance(config, GRPOConfig if "grpo" in name else SFTConfig)


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_programs_trace_at_full_size(name, full_size):
    full_size.check(load_config(CONFIGS[name]))


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_the_header_tells_what_the_paper_has(name):
    """The rows that the run stands beside, to the digit, and as many steps as the file's arithmetic comes to."""
    config, text = load_config(CONFIGS[name]), header(name)
    rows = {config.paper, "librisqa/2b/grpo" if "_grpo_" in name else base_row(config.paper)}
    for key in rows:
        # As decimals: one mean lies halfway between two figures, where floats round as their version of Python sums.
        average = sum(Decimal(str(value)) for value in ROWS[key]) / len(COLUMNS)
        values = [*(f"{value:.2f}" for value in ROWS[key]), str(average.quantize(Decimal("0.01"), ROUND_HALF_UP))]
        assert re.search(" +".join(values), text), key
    examples, prompts, steps = (
        int(number.replace(",", ""))
        for number in re.search(r"([\d,]+) / (\d+) prompts = ([\d,]+) steps", text).groups()
    )
    assert (prompts, steps) == (config.prompts_per_step, config.num_steps)
    assert (steps - 1) * prompts < examples <= steps * prompts
    assert config.run_dir == f"runs/{name}"
    assert config.data.train == f"data/{CORPORA[task_of(name)].data}:train"
    assert parse_split(config.data.validation) and all(map(parse_split, config.data.test))
    assert Path(config.model.path).name.split("-")[-1] in name


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_the_commands_of_the_header_work(name, monkeypatch):
    """What it says to type is accepted, and what it says of devices fits the model's arrays."""
    seen = []
    path = CONFIGS[name].relative_to(ROOT)
    monkeypatch.setattr(train, "train", lambda method, config: seen.append(config))
    monkeypatch.setattr(evaluate, "evaluate_model", lambda config, manifests, *, out: seen.append(config) or {})
    text = header(name)
    lines = [line.strip() for line in text.splitlines()]
    training = next(line for line in lines if line.startswith(("jgrpo sft", "jgrpo grpo")))
    build, *commands = [line for line in lines if line.startswith("jgrpo ")]
    assert build == f"jgrpo data build {CORPORA[task_of(name)].data} --manual-dir downloads --out data"
    assert commands == [f"jgrpo eval {path} --policy {load_config(path).model.path}", training, f"jgrpo eval {path}"]
    commands += [f"{training} {line}" for line in lines if line.startswith("--run-dir")]
    joined = " ".join(lines)
    meshes = re.findall(r"--mesh.fsdp [\d]+(?: --[a-z.-]+ \d+)*", joined)
    sizes = {int(size) for size in re.findall(r"--mesh.fsdp (\d)", joined)} | (
        {4, 8} if "2, 4 or 8" in joined else set()
    )
    commands += [f"{training} {options}" for options in meshes]
    commands.append(f"{training} {re.search(r'--eval.metrics( [a-zA-Z0-9]+){5}', joined)[0]}")
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, command
    assert len(seen) == len(commands)
    model = nnx.state(abstract_model(PUBLISHED[Path(seen[0].model.path).name]))
    for config in seen:
        config.validate()
    for size in sizes:
        param_shardings(model, make_mesh(MeshConfig(fsdp=size)))
        assert any(config.prompts_per_step // config.micro_batches % size == 0 for config in seen)


def test_variants_differ_in_what_their_name_says():
    """From the plain GRPO run of the same task and model, beside the name of the run and the row of the paper."""
    for name in OF_THE_PAPER:
        plain = re.sub("_(mp_)?grpo.*", "_grpo", name)
        if "grpo" in name and plain != name:
            found = differences(load_config(CONFIGS[name]), load_config(CONFIGS[plain])) - {"run_dir", "paper"}
            assert found == {"grpo.mixed_policy" if "_mp_" in name else "grpo.reward"}


def test_every_trained_row_of_the_paper_has_a_config():
    rows = {load_config(CONFIGS[name]).paper for name in OF_THE_PAPER}
    assert rows == {key for key in ROWS if not key.endswith(("base", "sota"))}


def test_the_papers_averages():
    """Table 3 has them; they are the plain means of the columns."""
    for reward, average in {"": 65.77, "-rouge1": 63.35, "-rouge2": 63.04, "-rougeL": 63.12, "-meteor": 63.89}.items():
        values = paper_row(f"librisqa/2b/grpo{reward}").values()
        assert round(sum(values) / len(COLUMNS), 2) == average


def test_a_row_that_the_paper_does_not_have():
    config = dataclasses.replace(load_config(CONFIGS["librisqa_2b_grpo"]), paper="librisqa/4b/grpo")
    with pytest.raises(UserError, match="paper 'librisqa/4b/grpo' names no row of the paper's tables; they are libri"):
        check_config(config)


def test_help_describes_every_field_of_grpo(capsys):
    assert cli.main(["grpo", str(CONFIGS["librisqa_2b_grpo"]), "--help"]) == 0
    printed = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    source = ast.parse((ROOT / "jgrpo" / "config" / "options.py").read_text())
    (body,) = (node.body for node in source.body if isinstance(node, ast.ClassDef) and node.name == "GRPOOptions")
    texts = {
        field.target.id: after.value.value
        for field, after in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr)
    }
    assert list(texts) == [entry.name for entry in dataclasses.fields(GRPOOptions)]
    for name, text in texts.items():
        option = name.replace("_", "-")
        assert f"--grpo.{option}" in printed or f"--grpo.no-{option}" in printed, name
        assert re.sub(r"\s+", " ", text) in printed, name
