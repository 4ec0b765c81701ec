"""What the GPU compiler makes of a step's programs, on a machine without a GPU; nothing runs, and nothing is timed.

    pip install --no-deps jax-cuda12-pjrt==0.10.2 jax-cuda12-plugin==0.10.2 nvidia-cuda-nvcc-cu12
    python -m benchmarks.gpu_programs --json gpu_programs.json

Compiled for one H200 at the 2B's true size. Temporaries are what a program needs beside its arguments. Of the decoding
loop: launches a token (kernels and library calls; loops over layers counted as often as they run), and the megabytes
that it copies out of stacked arrays, of weights above all, before a product reads them. Without a GPU the compiler
cannot try its variants of a product: all of them are left to cuBLAS here.
"""

import dataclasses
import math
import os
from typing import Any

import jax
from jax.experimental import topologies

from benchmarks.harness import Report, arguments, chosen, run
from benchmarks.workload import Size, plan
from jgrpo.planning.hlo import Module
from jgrpo.planning.measure import compile_call
from jgrpo.planning.programs import calls
from model_port.errors import UserError

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 patch: 0 }
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H200"
"""
# The plugin looks for CUDA's libraries when it starts, and for a GPU to try variants of a product on.
WITHOUT_GPU = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false"}
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "after-all")
LAYOUTS = {"rollout, layers scanned": "scanned", "rollout, layers unrolled": "unrolled"}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; return what is written as JSON."""
    parser = arguments(__doc__, model="granite-speech-3.3-2b", dtype="bfloat16")
    options = parser.parse_args(argv)
    size = Size.of(options)
    report = Report("gpu_programs", dataclasses.asdict(size))
    devices = h200()
    cases = dict.fromkeys(("encode", *LAYOUTS, "score", "update", "update, remat full"))
    for name in chosen(cases, options.only):
        program, _, variant = name.partition(", ")
        changes = {"rollout_layers": LAYOUTS[name]} if name in LAYOUTS else {}
        if variant == "remat full":
            changes["model"] = {"remat": "full"}
        abstract, clip = plan(size, devices=devices, **changes)
        call = next(call for call in calls(abstract, clip) if call.name == program)
        found = compile_call(call, abstract.mesh, ("cuda",))
        columns = {"arguments_GB": found.memory.arguments / 1e9, "temporaries_GB": found.memory.temporaries / 1e9}
        if program == "rollout":
            columns |= decoding(Module(found.text))
        report.row(case=name, compile_seconds=found.seconds, **columns)
    return report.finish(options.json)


def h200() -> list[Any]:
    """Return an H200 as a device to compile for.

    Raises:
        UserError: the GPU compiler, JAX's plugin for CUDA, is not installed.
    """
    jax.config.update("jax_platforms", "cpu,cuda")
    for name, value in WITHOUT_GPU.items():
        os.environ[name] = f"{os.environ.get(name, '')} {value}".strip()
    try:
        return topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1").devices
    except NotImplementedError as error:
        raise UserError(
            "JAX's plugin for CUDA is not installed; it needs no GPU to compile for one: install jax-cuda12-plugin and "
            "jax-cuda12-pjrt in the version of jax, and nvidia-cuda-nvcc-cu12"
        ) from error


def decoding(module: Module) -> dict[str, float]:
    """Return the launches of a token and the megabytes copied out of stacked arrays, in the loop over tokens."""
    entry = module.computations[module.entry]
    loops = [each for each in entry.values() if each.operation == "while"]
    tokens = [loop for loop in loops if module.trips(loop, module.entry) is None][-1]  # of the first stage
    launches, copied = _inside(module, tokens.attribute("body"))
    return {"launches_a_token": launches, "copied_MB_a_token": copied / 1e6}


def _inside(module: Module, body: str) -> tuple[int, float]:
    launches, copied = 0, 0.0
    for each in module.computations[body].values():
        if each.operation == "while":
            times = module.trips(each, body) or 1
            inner = _inside(module, each.attribute("body"))
            launches, copied = launches + times * inner[0], copied + times * inner[1]
        elif each.operation not in FREE:
            launches += 1
            copied += _sliced(module, each.attribute("calls"))
    return launches, copied


def _sliced(module: Module, fusion: str | None) -> float:
    """Return the bytes that a fusion copies, if it only takes a slice of an array."""
    parts = module.computations.get(fusion, {}).values()
    slices = [part for part in parts if part.operation == "dynamic-slice"]
    others = {part.operation for part in parts} - {"parameter", "constant", "dynamic-slice", "bitcast", "copy"}
    return math.fsum(part.result[0].bytes for part in slices) if slices and not others else 0.0


if __name__ == "__main__":
    run(main)
