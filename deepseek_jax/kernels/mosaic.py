"""What the kernels share of Pallas' Mosaic GPU backend, from jax 0.10 to 0.12.

The backend is young, and its names move: whatever differs between releases
stands here, and the kernels name neither a version nor a private module.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

SMEM_BYTES = 232448  # What one block can have on Hopper: 227 KiB.
_ARRAY = object()  # In the place of an array.
_H100 = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')


def launch(
  body: Callable[..., None],
  out_type: Any,
  *,
  grid: tuple[int, ...],
  grid_names: tuple[str, ...],
  warpgroups: int = 1,
  scratch: dict[str, Any] | None = None,
  lane: bool = False,
  **params: Any,
) -> Callable[..., Any]:
  """`plgpu.kernel` with what may not be left to a release's defaults.

  Args:
    body: takes input refs, output refs, and `scratch` by name.
    out_type: `jax.ShapeDtypeStruct`s.
    grid: blocks; their axes have `grid_names`.
    grid_names: see `grid`.
    warpgroups: of each block; their axis is 'wg'.
    scratch: name -> memory, for all warpgroups of a block.
    lane: the kernel states its register layouts (Lane semantics); otherwise
      they are inferred (Warpgroup semantics).
    **params: of `plgpu.CompilerParams`.
  """
  semantics = plgpu.LoweringSemantics
  params['lowering_semantics'] = semantics.Lane if lane else semantics.Warpgroup
  threads = {'num_threads': warpgroups, 'thread_name': 'wg'}
  return plgpu.kernel(
    body,
    out_type=out_type,
    scratch_types=scratch or {},
    grid=grid,
    grid_names=grid_names,
    compiler_params=plgpu.CompilerParams(**params),
    **(threads if warpgroups > 1 else {}),
  )


def traced_once(f: Callable[..., Any]) -> Callable[..., Any]:
  """Decorates a function that calls `launch`; equal calls share its kernel.

  JAX lowers a kernel that it meets again from its cache, but takes one that was
  traced anew for another, and a step calls these hundreds of times.  Calls are
  equal if their arrays have the same types, and whatever else is among their
  arguments, which has to be hashable, is equal.
  """

  def is_array(x):
    return isinstance(x, (jax.Array, np.ndarray))

  @functools.partial(jax.jit, static_argnums=0, inline=True)
  def traced(key, arrays):
    tree, others = key
    arrays = iter(arrays)
    leaves = (next(arrays) if x is _ARRAY else x for x in others)
    args, kwargs = jax.tree.unflatten(tree, leaves)
    return f(*args, **kwargs)

  @functools.wraps(f)
  def call(*args, **kwargs):
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = list(filter(is_array, leaves))
    others = tuple(_ARRAY if is_array(x) else x for x in leaves)
    return traced((tree, others), arrays)

  return call


def swizzle(columns: int, dtype: Any, most: int = 128) -> tuple[Any, ...]:
  """Transforms of a tile in shared memory for TMA and wgmma.

  Rows are cut into pieces of at most `most` bytes, which are permuted so that
  eight rows do not meet in one bank.
  """
  size = jnp.dtype(dtype).itemsize
  width = min(most, plgpu.find_swizzle(columns * size * 8))
  return (
    plgpu.TilingTransform((8, width // size)),
    plgpu.SwizzleTransform(width),
  )


def tile(
  rows: int,
  columns: int,
  dtype: Any,
  *,
  buffers: tuple = (),
  most: int = 128,
) -> Any:
  """A swizzled tile in shared memory, or `buffers` of them."""
  return plgpu.SMEM(
    (*buffers, rows, columns), dtype, transforms=swizzle(columns, dtype, most)
  )


def target() -> Any:
  """The device that is traced for: the mesh's, or the first one.

  It has `device_kind`, and `platform`; no device is asked if a mesh says it.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device if device is not None else jax.devices()[0]


def processors(blocks: int) -> int:
  """How many persistent blocks are started for `blocks` pieces of work."""
  device = target()
  if device.platform != 'gpu':
    return min(blocks, _H100.num_cores)
  cores = getattr(device, 'num_cores', None) or device.core_count
  return min(blocks, cores)


def snake(index: jax.Array, rows: int, columns: int, width: int = 8):
  """(row, column) of piece `index`, so that neighbours share operands in L2.

  Columns are walked in strips of `width`, up and down.
  """
  return plgpu.planar_snake(index, (rows, columns), 1, width)


def for_each(blocks: Any, axis: str = 'sm') -> Callable[..., Any]:
  """Decorates the body of a persistent loop: it gets each piece's index."""

  def run(body):
    @plgpu.nd_loop((blocks,), collective_axes=axis)
    def _(info):
      body(info.index[0])

  return run


def store(smem: Any, gmem: Any) -> None:
  """Sends a written tile to global memory; `plgpu.wait_smem_to_gmem` waits."""
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(smem, gmem)


@contextlib.contextmanager
def for_hopper() -> Iterator[None]:
  """Within it programs are traced for one H100, present or not."""
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=_H100)
  with jax.sharding.use_abstract_mesh(mesh):
    yield


def lower(f: Callable[..., Any], *args: Any) -> str:
  """The StableHLO of `f` for CUDA, whatever the machine.

  Layouts, shared memory and TMA descriptors are checked on the way; the
  translation of the kernels to PTX is not part of it.
  """
  with for_hopper():
    traced = jax.jit(f).trace(*args)
    return traced.lower(lowering_platforms=('cuda',)).as_text()


def interprets_fp8() -> bool:
  """Whether this jax, 0.11 or later, interprets all that the kernels do.

  0.10 does not interpret FP8 or transposed operands of wgmma, nor copies that
  reach beyond an edge.
  """
  return jax.__version_info__ >= (0, 11)


def producer_registers() -> int:
  """Registers of the warpgroup that only copies, beside a wide FP8 tile.

  What is left for the two multiplying warpgroups, 216 or, from 0.12 on, 208
  each, is what ptxas gets along with: neighbouring numbers spill up to 16 of
  the tile (experiments/LOG.md, "registers of the wide FP8 tile").
  """
  return 72 if jax.__version_info__ < (0, 12) else 88


def turns_codes() -> bool:
  """Whether registers of FP8 codes find a layout to be turned: from 0.11 on."""
  return jax.__version_info__ >= (0, 11)


@contextlib.contextmanager
def interpreted(pads: bool = False) -> Iterator[None]:
  """Within it kernels run on the CPU, step by step: slow, and exact.

  Args:
    pads: what lies beyond an array reads as zeros, as TMA has it, and so does
      memory that was not written; otherwise an error, and NaN.
  """
  from jax._src.interpreters import mlir
  from jax._src.pallas.mosaic_gpu import core
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call, params

  if not interprets_fp8():  # jax 0.10 stops at what is nothing on a CPU.
    mlir.register_lowering(
      core.layout_cast_p, lambda _, x, **__: [x], platform='cpu'
    )
  interpret_pallas_call.gpu_callbacks.reset_gpu_interpret_mode_state()
  chosen = params.InterpretGPUParams(
    out_of_bounds_reads='uninitialized' if pads else 'raise',
    uninitialized_memory='zero' if pads else 'nan',
  )
  with params.force_gpu_interpret_mode(chosen):
    yield


def is_interpreted() -> bool:
  """Whether what is traced now will be interpreted."""
  from jax._src import config

  context = config.pallas_tpu_interpret_mode_context_manager
  return context.value is not None


def load(ref: Any, layout: Any) -> jax.Array:
  """What `ref` holds, in registers laid out as stated."""
  if interprets_fp8():  # jax 0.11 dropped the index.
    return plgpu.load(ref, layout=layout)
  return plgpu.load(ref, (), layout=layout)
