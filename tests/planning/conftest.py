"""A tiny GRPO run over eight CPU devices as shapes, and compiled programs that take no compiler."""

import argparse
import dataclasses

import jax
import pytest

from jgrpo.config import DataOptions, GRPOConfig, GRPOOptions, ModelOptions, SFTConfig
from jgrpo.planning.arrays import Clip, run_arrays
from jgrpo.planning.measure import Compiled, Memory
from jgrpo.planning.programs import abstract_run
from model_port.config import GraniteSpeechConfig
from model_port.partition import MeshConfig, make_mesh

# Two products of 2 x 8 x 16 x 4 FLOPs in a loop over 5 layers, in a loop over tokens; one gathers its weights.
TEXT = """\
HloModule jit_step, num_partitions=8

%layers_condition (c: (s32[], f32[8,16])) -> pred[] {
  %c = (s32[], f32[8,16]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%count, %limit), direction=LT
}

%layers (s: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %s = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8,16]{1,0} get-tuple-element(%s), index=1
  %shard = f32[2,4]{1,0} constant({...})
  %whole = f32[16,4]{1,0} all-gather(%shard), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %y = f32[8,4]{1,0} dot(%x, %whole), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %back = f32[4,16]{1,0} constant({...})
  %z = f32[8,16]{1,0} dot(%y, %back), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[8,16]{1,0}) tuple(%next, %z)
}

%token (t: (f32[8,16], pred[])) -> (f32[8,16], pred[]) {
  %t = (f32[8,16]{1,0}, pred[]) parameter(0)
  %u = f32[8,16]{1,0} get-tuple-element(%t), index=0
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,16]{1,0}) tuple(%zero, %u)
  %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%layers_condition, body=%layers
  %v = f32[8,16]{1,0} get-tuple-element(%loop), index=1
  %on = pred[] get-tuple-element(%t), index=1
  ROOT %state = (f32[8,16]{1,0}, pred[]) tuple(%v, %on)
}

%running (r: (f32[8,16], pred[])) -> pred[] {
  %r = (f32[8,16]{1,0}, pred[]) parameter(0)
  ROOT %go = pred[] get-tuple-element(%r), index=1
}

ENTRY %main (a: f32[8,16], b: pred[]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = pred[] parameter(1)
  %sum = f32[8,16]{1,0} all-reduce(%a), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %first = (f32[8,16]{1,0}, pred[]) tuple(%sum, %b)
  %tokens = (f32[8,16]{1,0}, pred[]) while(%first), condition=%running, body=%token
  ROOT %last = f32[8,16]{1,0} get-tuple-element(%tokens), index=0
}
"""
GATHERED = 7 * 2 * 4 * 4  # bytes that a chip sends for one gather: its 2 x 4 floats to seven others


def fake_compiler(temporaries=1e6, text=TEXT):
    """Return a compiler that finds these temporaries, of a number or of a call and its mesh, and this program."""

    def compiler(call, mesh):
        size = temporaries(call, mesh) if callable(temporaries) else temporaries
        return Compiled(2.0, Memory(1e3, 1e2, float(size)), text)

    return compiler


@pytest.fixture
def config():
    """Tiny GRPO on data 2 x fsdp 2 x tensor 2; its model directory does not exist."""
    return GRPOConfig(
        run_dir="runs/tiny",
        model=ModelOptions(path="models/tiny", remat="full"),
        data=DataOptions(train="train.jsonl", audio_buckets=(0.5, 1.0), max_prompt_tokens=8),
        num_steps=10,
        prompts_per_step=8,
        micro_batches=2,
        max_completion_tokens=6,
        grpo=GRPOOptions(num_samples=4),
        mesh=MeshConfig(2, 2, 2),
    )


@pytest.fixture
def sft(config):
    """The same as supervised training."""
    fields = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config) if entry.name != "grpo"}
    return SFTConfig(**fields)


@pytest.fixture
def tiny():
    """The tiny model's config."""
    return GraniteSpeechConfig.tiny()


@pytest.fixture
def make_arrays(tiny):
    """Return a function from a config to (its arrays as shapes, the lengths of its longest clips)."""

    def make(config):
        arrays = run_arrays(config, tiny, make_mesh(config.mesh, jax.devices()[: config.mesh.size]))
        return arrays, Clip.of(arrays, config.data.audio_buckets[-1])

    return make


@pytest.fixture
def make_run(make_arrays):
    """Return a function from a config to (its run as shapes, the lengths of its longest clips)."""

    def make(config):
        arrays, clip = make_arrays(config)
        return abstract_run(arrays, memory=16e9), clip

    return make


@pytest.fixture
def options():
    """Return a function that makes the options of `jgrpo plan`, those of a plain plan for eight chips unless given."""

    def make(**changes):
        defaults = {
            "topology": "v5e:2x4",
            "model": None,
            "mean_length": None,
            "sharing": 1.0,
            "all_buckets": False,
            "search": False,
            "tries": 2,
            "json": None,
        }
        return argparse.Namespace(**(defaults | changes))

    return make
