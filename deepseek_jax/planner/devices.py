"""What a GPU can do, by name: data sheets, and V3 section 3.1 for the H800."""

from typing import NamedTuple

NODE = 8  # GPUs that NVLink joins.


class Device(NamedTuple):
  """One GPU.

  Attributes:
    bf16: dense FLOP/s.
    fp8: dense FLOP/s.
    memory: bytes.
    nvlink: bytes/s in one direction within a node.
    network: bytes/s in one direction between nodes, InfiniBand.
  """

  bf16: float
  fp8: float
  memory: int
  nvlink: float
  network: float


DEVICES = {
  # Of the H800's 200 GB/s of NVLink 160 can be had (ISCA 2025, section 4).
  'h800': Device(989.5e12, 1979e12, 84_942_979_072, 160e9, 50e9),
  'h100': Device(989.5e12, 1979e12, 84_942_979_072, 450e9, 50e9),
  'h200': Device(989.5e12, 1979e12, 150_754_820_096, 450e9, 50e9),
}
