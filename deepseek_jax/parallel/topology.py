"""Devices that this machine does not have, to compile for (V3 section 3.1).

`jax.jit(f).lower(shapes with shardings on these devices).compile()` gives HLO
and memory analysis of a program for one H100 or for thousands.  Needed are the
two wheels of JAX's CUDA plugin, of JAX's own version, and `ptxas`, by the third
wheel if CUDA is not installed:

    pip install --no-deps --target=cuda jax-cuda13-plugin==X \
      jax-cuda13-pjrt==X nvidia-cuda-nvcc
    PYTHONPATH=cuda JAX_PLATFORMS=cpu python ...

They lie in a folder of their own, since an installed plugin without a GPU makes
every program print a traceback when it starts, unless JAX_PLATFORMS=cpu.
"""

import jax
from jax.experimental import topologies

HOST_DEVICES = 8  # GPUs of a node, joined by NVLink; nodes by InfiniBand.

# NVIDIA's data sheets; both are the same processor with other memory.
_NAMES = {
  'h100': ('NVIDIA H100 80GB HBM3', 84_942_979_072, 3_352_320_000_000),
  'h200': ('NVIDIA H200', 150_754_820_096, 4_800_000_000_000),
}
_DESCRIPTION = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
runtime_version {{ major: 13 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""


def topology(name: str, n: int) -> list[jax.Device]:
  """`n` compile-only devices, node after node.

  Args:
    name: 'h100' or 'h200'.
    n: up to 8, or a multiple of 8.

  Raises:
    ValueError: on another name or number.
    RuntimeError: when the CUDA plugin is not installed.
  """
  if name not in _NAMES:
    raise ValueError(f'name={name!r}: use one of {", ".join(_NAMES)}')
  if n < 1 or (n > HOST_DEVICES and n % HOST_DEVICES):
    raise ValueError(f'n={n}: use 1 to 8 devices, or a multiple of 8')
  hosts = -(-n // HOST_DEVICES)
  device, memory, bandwidth = _NAMES[name]
  try:
    described = topologies.get_topology_desc(
      platform='cuda',
      topology_name='',
      target_config=_DESCRIPTION.format(
        name=device, memory=memory, bandwidth=bandwidth
      ),
      topology=f'1x{hosts}x{n // hosts}',
    )
  except (NotImplementedError, RuntimeError) as error:
    raise RuntimeError(
      'compiling for a GPU needs jax-cuda13-plugin and jax-cuda13-pjrt '
      f'{jax.__version__}, and JAX_PLATFORMS=cpu where there is no GPU; '
      'deepseek_jax/parallel/topology.py says how'
    ) from error
  return described.devices
