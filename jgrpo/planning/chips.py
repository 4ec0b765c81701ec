# SPDX-License-Identifier: Apache-2.0
"""What one TPU chip of each generation can do at most, as its makers state it.

Sources: the pages on system architecture of Cloud TPU (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e) for compute,
HBM bandwidth and interconnect; the TPU compiler for the HBM that a program may use, which it names when one does not
fit. The interconnect is what a chip sends: half of the bidirectional bandwidth stated for v5e, v5p and v6e (400, 1200
and 800 GB/s), and for v4 the all-reduce bandwidth of a pod (1.1 PB/s) over its 4096 chips. A collective along one axis
of a mesh uses only some of a chip's links, so that times found with all of them are lower bounds.
"""

from dataclasses import dataclass

GIB = 2**30
# From a chip to its neighbour, however little is sent. Source: "How to Scale Your Model" on collectives that latency
# bounds, jax-ml.github.io/scaling-book.
HOP_SECONDS = 1e-6


@dataclass(frozen=True)
class Chip:
    """A TPU chip.

    Attributes:
        flops: bf16 FLOP/s.
        hbm: bytes that a program may use.
        hbm_bandwidth: bytes/s.
        ici_bandwidth: bytes/s that a chip sends to its neighbours, over all links.
        dimensions: of the slices, 2 or 3.
        shapes: common slices.
        options: for the compiler, so that one device is one chip.
    """

    name: str
    flops: float
    hbm: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dimensions: int
    shapes: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 30.75 * GIB, 1200e9, 268e9, 3, CUBES, (("chip_config_name", "megacore"),)),
        Chip("v5e", 197e12, 15.75 * GIB, 819e9, 200e9, 2, FLAT),
        Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 600e9, 3, CUBES),
        Chip("v6e", 918e12, 31.25 * GIB, 1638e9, 400e9, 2, FLAT),
    )
}
