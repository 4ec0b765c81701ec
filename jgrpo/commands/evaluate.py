# SPDX-License-Identifier: Apache-2.0
"""jgrpo eval: the scores of a model on the config's test sets, beside the paper's."""

import argparse
import json
import os
from pathlib import PurePath
from typing import Any

import jax

from jgrpo.commands.configs import override, read_config
from jgrpo.config import RunConfig, with_model
from jgrpo.data.run import evaluation_data
from jgrpo.data.sources import set_names
from jgrpo.evaluation.evaluate import Passes, check_metrics, evaluate, write_predictions
from jgrpo.evaluation.tables import evaluation_table
from jgrpo.paper.tables import base_row
from jgrpo.programs.encode import ClipEncoder
from jgrpo.programs.steps import sft_objective
from jgrpo.runtime.distributed import joined
from jgrpo.runtime.rows import own_rows
from jgrpo.setup import check_config, load_policy, policy_programs
from model_port.libraries import keep_compiled
from model_port.partition import make_mesh
from model_port.paths import as_path, resolved, write_whole
from model_port.processor import Processor


def run_eval(arguments: list[str]) -> None:
    """Evaluate a run's policy, its base where it has none yet, or another model on the config's test sets."""
    summary = (
        "The scores of eval.metrics on the sets of data.test: of the policy in the run directory, of the base "
        "where there is none yet, or of the model directory given as --policy MODEL."
    )
    config, rest = read_config("eval", arguments, RunConfig, summary)
    parser = argparse.ArgumentParser(prog=f"jgrpo eval {arguments[0]}", add_help=False, allow_abbrev=False)
    parser.add_argument("--policy", metavar="MODEL")
    chosen, rest = parser.parse_known_args(rest)
    config = override(config, rest, prog=f"jgrpo eval {arguments[0]} [--policy MODEL]")
    sets = set_names(config.data.test)
    base, run_dir = config.model.path, as_path(config.run_dir)
    trained = run_dir / "policy"
    policy = chosen.policy or (trained if trained.exists() else None)
    if policy is None:
        print(f"{trained} does not exist yet: evaluating the base, {config.model.path}")
    else:
        config = with_model(config, policy)
        print(f"evaluating {policy}")
    is_base = resolved(config.model.path) == resolved(base)
    paper = base_row(config.paper) if config.paper and is_base else config.paper
    out = run_dir / "eval" / result_name(as_path(config.model.path), trained)
    keep_compiled()
    with joined(config.distributed):
        results = evaluate_model(config, sets, out=out)
    for name, result in results.items():
        print(f"\n{evaluation_table(name, result, paper=paper)}")
    print(f"predictions and results.json are in {out}")


def result_name(model: PurePath, trained: PurePath) -> str:
    """Return the directory of a model's results; a policy of another run goes by that run's name."""
    return model.parent.name if model.name == "policy" and model != trained else model.name


def evaluate_model(config: RunConfig, paths: dict[str, str], *, out: str | os.PathLike) -> dict[str, Any]:
    """Evaluate `config.model` on data sets by name; write predictions and results.json under `out`; return those."""
    out = as_path(out)
    check_config(config)
    check_metrics(config)
    processor = Processor.from_pretrained(config.model.path)
    rows = own_rows(make_mesh(config.mesh), config.eval.batch_size)
    sets = {name: evaluation_data(config, path, processor, rows=rows) for name, path in paths.items()}
    policy = load_policy(config, processor)
    programs = policy_programs(policy, sft_objective(), updates=1)
    encode = ClipEncoder(programs, policy.frozen, policy.mesh)
    arrays = (policy.trained, policy.frozen)
    settings = {"mesh": policy.mesh, "config": config, "passes": Passes.final(config.eval)}
    results = {}
    for name, data in sets.items():
        result = evaluate(programs, encode, *arrays, data, processor, **settings)
        write_predictions(result, out / f"{name}.jsonl")
        results[name] = result.summary()
    if jax.process_index() == 0:
        write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")
    return results
