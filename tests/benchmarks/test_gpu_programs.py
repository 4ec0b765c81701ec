"""What is counted in a program compiled for a GPU, by hand; and what happens without the compiler."""

import jax
import pytest

from benchmarks import gpu_programs
from jgrpo.planning.hlo import Module
from model_port.errors import UserError

# Five launches of a token: one kernel, and twice a layer's slice and product. A slice is 2 x 4 x 8 x 2 bytes.
TEXT = """HloModule jit_rollout, is_scheduled=true

%slice (p.0: bf16[2,4,8], p.1: s32[]) -> bf16[1,4,8] {
  %p.0 = bf16[2,4,8]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %taken = bf16[1,4,8]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,4,8}
}

%layer (state: (s32[], bf16[2,4,8])) -> (s32[], bf16[2,4,8]) {
  %state = (s32[], bf16[2,4,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %weights = bf16[2,4,8]{2,1,0} get-tuple-element(%state), index=1
  %weight = bf16[1,4,8]{2,1,0} fusion(%weights, %i), kind=kCustom, calls=%slice
  %product = bf16[4,8]{1,0} custom-call(%weight), custom_call_target="__cublas$gemm"
  ROOT %out = (s32[], bf16[2,4,8]{2,1,0}) tuple(%i, %weights)
}

%fewer (state.1: (s32[], bf16[2,4,8])) -> pred[] {
  %state.1 = (s32[], bf16[2,4,8]{2,1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

%token (state.2: (s32[], bf16[2,4,8])) -> (s32[], bf16[2,4,8]) {
  %state.2 = (s32[], bf16[2,4,8]{2,1,0}) parameter(0)
  %copy = s32[] copy(%state.2)
  ROOT %layers = (s32[], bf16[2,4,8]{2,1,0}) while(%state.2), condition=%fewer, body=%layer, \
backend_config={"known_trip_count":{"n":"2"}}
}

ENTRY %main (w: bf16[2,4,8]) -> (s32[], bf16[2,4,8]) {
  %w = bf16[2,4,8]{2,1,0} parameter(0)
  %start = s32[] constant(1)
  %begin = (s32[], bf16[2,4,8]{2,1,0}) tuple(%start, %w)
  ROOT %tokens = (s32[], bf16[2,4,8]{2,1,0}) while(%begin), condition=%fewer, body=%token
}
"""


def test_launches_and_copies_of_a_token_are_counted_as_often_as_layers_run():
    found = gpu_programs.decoding(Module(TEXT))
    assert found == {"launches_a_token": 5, "copied_MB_a_token": pytest.approx(2 * 4 * 8 * 2 / 1e6)}


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    def missing(**options):
        raise NotImplementedError("topology not implemented for cuda")

    for name in gpu_programs.WITHOUT_GPU:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(gpu_programs.topologies, "get_topology_desc", missing)
    platforms = jax.config.jax_platforms
    try:
        with pytest.raises(UserError, match="install jax-cuda12-plugin"):
            gpu_programs.main([])
    finally:
        jax.config.update("jax_platforms", platforms)
