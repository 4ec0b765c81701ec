"""The profile's kinds, by hand, and on a tiny step."""

import pytest

from benchmarks import profile
from jgrpo.planning.hlo import Module
from tests.benchmarks.test_benchmarks import run

TEXT = """HloModule small

%inside (p: f32[4,4]) -> f32[4] {
  %p = f32[4,4]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %twice = f32[4,4]{1,0} add(%p, %p)
  ROOT %sum = f32[4]{0} reduce(%twice, %zero), dimensions={1}
}

ENTRY %main (x: f32[4,4]) -> f32[4] {
  %x = f32[4,4]{1,0} parameter(0)
  %both = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %turned = f32[4,4]{0,1} transpose(%both), dimensions={1,0}
  %library = f32[4,4]{1,0} custom-call(%turned), custom_call_target="__cublas$gemm"
  ROOT %all = f32[4]{0} fusion(%library), kind=kLoop, calls=%inside
}
"""


def test_operations_have_kinds_and_fusions_that_of_their_weightiest_part():
    kinds = profile.kinds_of(Module(TEXT))
    wanted = {"both": "products", "library": "products", "turned": "copies", "all": "reductions"}
    assert {name: kinds[name] for name in wanted} == wanted
    assert "x" not in kinds


def test_events_of_a_program_are_added_up_and_others_left_out():
    events = [("both", 1.0), ("%both = f32[4,4] dot(...)", 2.0), ("all", 0.5), ("ThunkExecutor::Execute", 9.0)]
    assert profile.by_kind(iter(events), {"both": "products", "all": "reductions"}) == {
        "products": 3.0,
        "reductions": 0.5,
    }


def test_profile(tmp_path):
    rows = run(profile, tmp_path, "--only", "rollout", "update")["rows"]
    for name in ("rollout", "update"):
        own = {row["kind"]: row for row in rows if row["case"] == name}
        assert sum(row["share"] for row in own.values()) == pytest.approx(1)
        assert own["products"]["busy"] > 0 and own["elementwise"]["busy"] > 0
