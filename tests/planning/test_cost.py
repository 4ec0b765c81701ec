"""What a program does is counted as it runs: loops by their trips, slices by their size, collectives by their group."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jgrpo.planning.cost import convolution_flops, group_size, program_cost
from jgrpo.planning.hlo import Module, parse_instruction
from model_port.partition import MeshConfig, make_mesh
from tests.planning.conftest import GATHERED, TEXT

V5E = (Path(__file__).parent / "v5e_2x2.hlo").read_text()
LAYERS, WIDTH, INNER, ROWS = 5, 512, 1024, 64  # of the program in that file


def test_loops_multiply():
    cost = program_cost(TEXT, devices=8, trips=3)
    assert cost.flops == 3 * 5 * 2 * (2 * 8 * 16 * 4)
    gather, reduce = sorted(cost.collectives, key=lambda one: one.kind)
    assert (gather.kind, gather.count, gather.sent, gather.loops) == ("all-gather", 15, 15 * GATHERED, (None, 5))
    assert (reduce.kind, reduce.count, reduce.sent, reduce.group, reduce.loops) == ("all-reduce", 1, 8 * 16 * 4, 2, ())
    assert cost.unknown_loops == 0


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    cost = program_cost(TEXT, devices=8)
    assert cost.flops == 5 * 2 * (2 * 8 * 16 * 4)
    assert cost.unknown_loops == 1


@pytest.mark.parametrize(("start", "step", "limit", "trips"), [(0, 1, 5, 5), (1, 1, 5, 4), (0, 2, 5, 3), (7, 1, 5, 0)])
def test_trips_follow_from_start_step_and_bound(start, step, limit, trips):
    text = TEXT.replace("%zero = s32[] constant(0)", f"%zero = s32[] constant({start})")
    text = text.replace("constant(1)", f"constant({step})").replace("constant(5)", f"constant({limit})")
    module = Module(text)
    assert module.trips(module.computations["token"]["loop"], "token") == trips


def test_a_program_of_the_tpu_compiler():
    """Products are convolutions there, weights are gathered in pieces, and arrays lie in tiles and in two memories."""
    cost = program_cost(V5E, devices=4, trips=20)
    assert cost.flops == pytest.approx(20 * LAYERS * 4 * (ROWS / 4) * WIDTH * INNER)
    over_tokens = [one for one in cost.collectives if None in one.loops]
    weights = 2 * WIDTH * INNER * 2
    sent = sum(one.sent for one in over_tokens if one.kind in ("all-gather", "collective-permute"))
    assert sent == pytest.approx(20 * LAYERS * weights * 3 / 4, rel=0.01)
    # Of the stack of all layers a trip reads one: a quarter of its weights is on the chip, then all of them are there.
    assert cost.hbm_bytes < 20 * LAYERS * weights * 4


def test_a_program_of_the_cpu_compiler():
    """Not only of a TPU: the same loops, compiled here."""
    mesh = make_mesh(MeshConfig(fsdp=8), jax.devices())

    def place(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    def step(x, weights):
        def layer(x, weight):
            y = jnp.tanh(x @ jax.lax.with_sharding_constraint(weight, place()))
            return jax.lax.with_sharding_constraint(y, place("fsdp")), None

        return jax.lax.scan(layer, x, weights)[0]

    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=place("fsdp"))
    weights = jax.ShapeDtypeStruct((7, 32, 32), jnp.float32, sharding=place(None, "fsdp"))
    cost = program_cost(jax.jit(step).lower(x, weights).compile().as_text(), devices=8)
    assert cost.flops == 7 * 2 * 2 * 32 * 32
    gathers = [one for one in cost.collectives if one.kind == "all-gather"]
    assert sum(one.count for one in gathers if one.loops == (7,)) == 7
    assert sum(one.sent for one in gathers) == 7 * 7 * 4 * 32 * 4


def test_a_slice_of_a_stack_costs_the_slice():
    text = """\
HloModule m

%pick (p0: f32[40,128,128], p1: s32[]) -> f32[1,128,128] {
  %p0 = f32[40,128,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %none = s32[] constant(0)
  ROOT %one = f32[1,128,128]{2,1,0} dynamic-slice(%p0, %p1, %none, %none), dynamic_slice_sizes={1,128,128}
}

%put (q0: f32[40,128,128], q1: f32[1,128,128], q2: s32[]) -> f32[40,128,128] {
  %q0 = f32[40,128,128]{2,1,0} parameter(0)
  %q1 = f32[1,128,128]{2,1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %nil = s32[] constant(0)
  ROOT %all = f32[40,128,128]{2,1,0} dynamic-update-slice(%q0, %q1, %q2, %nil, %nil)
}

ENTRY %main (a: f32[40,128,128], i: s32[]) -> f32[40,128,128] {
  %a = f32[40,128,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %layer = f32[1,128,128]{2,1,0} fusion(%a, %i), kind=kLoop, calls=%pick
  ROOT %new = f32[40,128,128]{2,1,0} fusion(%a, %layer, %i), kind=kLoop, calls=%put
}
"""
    layer = 128 * 128 * 4
    assert program_cost(text, devices=1).hbm_bytes == pytest.approx(4 * layer, abs=64)


def test_a_collective_that_overlaps_with_a_loop_counts_once():
    """It starts before the loop, goes on in it and ends after it: three fusions of one channel."""
    part = """\
%{name} (p: f32[8,16]) -> f32[64,16] {{
  %p.{name} = f32[8,16]{{1,0}} parameter(0)
  ROOT %g.{name} = f32[64,16]{{1,0}} all-gather(%p.{name}), channel_id=9, replica_groups=[1,8]<=[8], dimensions={{0}}
}}

"""
    fusion = "  %{name} = f32[64,16]{{1,0}} fusion(%{of}), kind=kCustom, calls=%{calls}\n"
    text = TEXT.replace("%layers_condition (c:", part.format(name="start") + "%layers_condition (c:", 1)
    text = text.replace("%layers_condition (c:", part.format(name="going") + "%layers_condition (c:", 1)
    text = text.replace("  %shard =", fusion.format(name="f1", of="x", calls="going") + "  %shard =")
    text = text.replace("  %sum =", fusion.format(name="f2", of="a", calls="start") + "  %sum =")
    (found,) = [one for one in program_cost(text, devices=8, trips=3).collectives if one.sent == 7 * 8 * 16 * 4]
    assert (found.count, found.loops) == (1, ())


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups=[4,16]<=[64]", 16),
        ("replica_groups=[4,16]<=[16,4]T(1,0)", 16),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_0'}", 16),
        ("replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_0', 'axis_1'}", 64),
        ("replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_0':(2)4}", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=16], device_ids=([16,4]T(1,0)) {'axis_0'}", 4),
        ("replica_groups={}", 64),
    ],
)
def test_group_size(attributes, size):
    assert group_size(attributes, 64) == size


@pytest.mark.parametrize(
    ("kind", "operand", "factor"),
    [
        ("all-gather", "f32[8]", 3),
        ("all-reduce", "f32[8]", 1.5),
        ("reduce-scatter", "f32[8]", 0.75),
        ("all-to-all", "f32[8]", 0.75),
    ],
)
def test_bytes_sent_by_the_ring_algorithm(kind, operand, factor):
    text = f"""\
HloModule m

ENTRY %main (a: {operand}) -> {operand} {{
  %a = {operand}{{0}} parameter(0)
  ROOT %b = {operand}{{0}} {kind}(%a), channel_id=1, replica_groups=[1,4]<=[4]
}}
"""
    (found,) = program_cost(text, devices=4).collectives
    assert found.sent == factor * 32


def test_memory_and_tiles():
    """Arrays in the chip's own memory cost no HBM traffic, and tiles are moved whole."""
    line = "%a = bf16[40,8,64]{2,1,0:T(8,128)(2,1)} parameter(0)"
    (tiled,) = parse_instruction(line).result
    (near,) = parse_instruction(line.replace("(2,1)}", "(2,1)S(1)}")).result
    assert (tiled.bytes, tiled.hbm_bytes, near.hbm_bytes) == (40 * 8 * 64 * 2, 40 * 8 * 128 * 2, 0)


def test_a_batched_product_as_a_convolution():
    """The compiler writes a batch of products as a window that meets each input once."""
    line = (
        "%c = f32[16,4,3,5]{3,2,1,0} convolution(%a, %b), window={size=16x4 stride=15x3 lhs_dilate=16x4}, "
        "dim_labels=0b1f_0o1i->01bf"
    )
    left = parse_instruction("%a = f32[16,3,4,7]{3,2,1,0} parameter(0)").result[0]
    right = parse_instruction("%b = f32[16,5,4,7]{3,2,1,0} parameter(1)").result[0]
    assert convolution_flops(parse_instruction(line), left, right) == 2 * 16 * 4 * 3 * 5 * 7


def test_other_conditions_are_not_taken_for_a_count():
    module = Module(TEXT.replace("direction=LT", "direction=NE"))
    assert module.trips(module.computations["token"]["loop"], "token") is None
    cost = program_cost(TEXT.replace("direction=LT", "direction=NE"), devices=8, trips=3)
    assert (cost.flops, cost.unknown_loops) == (3 * 2 * (2 * 8 * 16 * 4), 1)
