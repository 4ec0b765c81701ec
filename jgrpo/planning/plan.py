# SPDX-License-Identifier: Apache-2.0
"""jgrpo plan: what a run will need of a TPU slice, compiled for it by the TPU compiler on a machine without a TPU."""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jgrpo.config import RunConfig
from jgrpo.planning.arrays import Arrays, Clip, Lengths, chip_bytes, model_config, run_arrays
from jgrpo.planning.estimate import Estimate, estimate
from jgrpo.planning.measure import Compiled, compile_call, measure
from jgrpo.planning.programs import Call, abstract_run, calls
from jgrpo.planning.report import Plan, plan_json, plan_text
from jgrpo.planning.search import Candidate, candidates, search
from jgrpo.planning.topology import Slice, check_mesh
from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.partition import make_mesh

Compiler = Callable[[Call, Mesh], Compiled]


def plan_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options that are not the config's."""
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--topology", required=True, metavar="NAME", help="TPU slice, such as v5e:8x8")
    parser.add_argument("--model", metavar="SIZE", help="published model to plan for, such as granite-speech-3.3-8b")
    parser.add_argument("--mean-length", type=float, metavar="N", help="tokens of a completion; by default the limit")
    parser.add_argument("--sharing", type=float, default=1.0, metavar="X", help="tokens over distinct beginnings")
    parser.add_argument("--all-buckets", action="store_true", help="every audio bucket, not the longest alone")
    parser.add_argument("--search", action="store_true", help="try mesh shapes and micro-batches")
    parser.add_argument("--tries", type=int, default=4, metavar="N", help="candidates that --search compiles")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the plan there")
    return parser


def plan(
    config: RunConfig,
    options: argparse.Namespace,
    *,
    devices: list[Any] | None = None,
    compiler: Compiler = compile_call,
) -> bool:
    """Print the plan of a run, or of the best ways to run it that were found; return whether it fits.

    Args:
        options: of `plan_parser`.
        devices: to compile for; by default those of the topology.

    Raises:
        UserError: an unknown topology or model, no TPU compiler, or a mesh that is not the slice's or does not divide.
    """
    place, lengths = Slice.named(options.topology), _lengths(config, options)
    model, name = model_config(config, options.model), options.model or Path(config.model.path).name
    if not options.search:
        check_mesh(config.mesh, place)
        config.validate()
    # Another program of this machine may hold its accelerator; nothing here needs one.
    jax.config.update("jax_platforms", "cpu")
    devices = place.devices() if devices is None else devices
    planner = Planner(place, model, name, devices, compiler, lengths)
    if options.search:
        return _search(planner, config, options)
    seconds = config.data.audio_buckets if options.all_buckets else config.data.audio_buckets[-1:]
    plans = []
    for bucket in seconds:
        plans.append(planner.plan(config, bucket))
        print(plan_text(plans[-1]), flush=True)
    if options.json:
        _write(options.json, [plan_json(found) for found in plans])
    return all(found.fits for found in plans)


def _lengths(config: RunConfig, options: argparse.Namespace) -> Lengths:
    limit = config.max_completion_tokens
    if options.mean_length is not None and not 1 <= options.mean_length <= limit:
        raise UserError(
            f"--mean-length is {options.mean_length:g}; completions have at least 1 token and at most "
            f"max_completion_tokens, {limit}"
        )
    if not 1 <= options.sharing < float("inf"):
        raise UserError(f"--sharing is {options.sharing:g}; a group has at least as many tokens as distinct beginnings")
    if options.mean_length is None and options.sharing != 1:
        raise UserError("--sharing needs --mean-length: without it every completion counts as long as the limit allows")
    return Lengths(options.mean_length, options.sharing)


class Planner:
    """Plans configs of one model on one slice."""

    def __init__(
        self,
        place: Slice,
        model: GraniteSpeechConfig,
        name: str,
        devices: list[Any],
        compiler: Compiler,
        lengths: Lengths,
    ):
        self.place, self.model, self.name, self.devices, self.compiler = place, model, name, devices, compiler
        self.lengths = lengths

    def arrays(self, config: RunConfig) -> Arrays:
        """Return the arrays of a run as shapes."""
        return run_arrays(config, self.model, make_mesh(config.mesh, self.devices))

    def plan(self, config: RunConfig, seconds: float) -> Plan:
        """Compile every program of a run for clips of this bucket."""
        run = abstract_run(self.arrays(config), memory=self.place.chip.hbm)
        clip = Clip.of(run, seconds)
        resident = {
            "trained": chip_bytes(run.state.params),
            "optimiser": chip_bytes(run.state.opt_state),
            "reference": chip_bytes(run.ref_params),
            "frozen": chip_bytes(run.frozen),
        }
        programs = []
        for call in calls(run, clip, self.lengths):
            programs.append(measure(run, call, self.compiler))
            print(f"compiled {call.name} in {programs[-1].compile_seconds:.0f} s", file=sys.stderr, flush=True)
        layout = self.lengths.layout(run, clip)
        return Plan(
            self.place, config, self.name, clip, self.lengths, layout, run.weights[1], resident, tuple(programs)
        )


def _search(planner: Planner, config: RunConfig, options: argparse.Namespace) -> bool:
    """Print the ways to run a config that were compiled, the best first, and the plan of the best."""
    place, bucket = planner.place, config.data.audio_buckets[-1]

    def estimated(variant: RunConfig) -> Estimate:
        run = planner.arrays(variant)
        return estimate(run, Clip.of(run, bucket), place.chip, planner.lengths)

    found, dropped = candidates(config, place.chips, hbm=place.chip.hbm, estimate=estimated)
    print(f"{len(found)} ways to run it may fit" + (", and these do not:" if dropped else ""), flush=True)
    print("".join(f"  {line}\n" for line in dropped), end="", flush=True)
    show = functools.partial(print, flush=True)
    ranked = search(found, lambda variant: planner.plan(variant, bucket), tries=options.tries, say=show)
    print("\n" + "".join(f"{number}. {_line(*pair)}\n" for number, pair in enumerate(ranked, 1)))
    if options.json:
        _write(options.json, [{"options": candidate.options(), **plan_json(best)} for candidate, best in ranked])
    if ranked:
        print(plan_text(ranked[0][1]))
    return bool(ranked) and ranked[0][1].fits


def _line(candidate: Candidate, found: Plan) -> str:
    largest = max(program.memory.total for program in found.programs) / 2**30
    state = f"{found.step_seconds:.2f} s a step" if found.fits else "does not fit"
    return f"{candidate.options()}: {state}, {largest:.2f} GiB a chip"


def _write(path: Path, plans: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(plans, indent=2) + "\n")
