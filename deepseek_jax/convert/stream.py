"""Writes many files from a source, in parallel, in little memory.

Each file is written under a temporary name and renamed when it is whole, so
that a run after a kill finds what is finished and skips it.  Bytes that lie in
one piece in the source are copied as they are.
"""

import dataclasses
import os
import pathlib
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import BinaryIO

import numpy as np
import tqdm

from deepseek_jax.convert import names
from deepseek_jax.convert import safetensors_io as st
from deepseek_jax.convert.safetensors_io import Extent, Spec
from deepseek_jax.convert.sources import Source

_MIN_BUDGET = 64 << 20  # Bytes of arrays in flight, if no tensor needs more.
_COPY = 256 << 10  # Bytes copied at a time where nothing is converted.


@dataclasses.dataclass(frozen=True)
class Part:
  """A tensor, or a slice of one, in a file.

  Attributes:
    name: Hugging Face's.
    spec: of what is written.
    cut: (axis, start, stop) of the tensor; None: all of it.
    place: write our slice of the leaf rather than the released array.
  """

  name: str
  spec: Spec
  cut: tuple[int, int, int] | None = None
  place: names.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class File:
  """A file to write: its header and the parts that follow."""

  path: str
  parts: tuple[Part, ...]
  header: bytes = b''

  @property
  def nbytes(self) -> int:
    """Size on disk."""
    return len(self.header) + sum(p.spec.nbytes for p in self.parts)


def safetensors_file(path: str, parts: dict[str, Part]) -> File:
  """A safetensors file of parts by the names that they have in it."""
  order = st.aligned({name: part.spec for name, part in parts.items()})
  return File(path, tuple(parts[name] for name in order), st.header(order))


def write(
  files: Sequence[File],
  source: Source,
  directory: pathlib.Path,
  progress: bool = False,
) -> None:
  """Writes those of `files` that `directory` lacks.

  Arrays in flight take at most twice the bytes of the largest tensor, or 64 MB.

  Args:
    files: to write; a file of the right size is taken for finished.
    source: of the parts.
    directory: is made if need be.
    progress: show a bar with bytes per second.

  Raises:
    ValueError: if a weight cannot be quantised, or a source file changed.
    OSError: whatever the disk says.
  """
  todo = [f for f in files if not _is_finished(directory / f.path, f.nbytes)]
  for parent in {(directory / f.path).parent for f in files}:
    parent.mkdir(parents=True, exist_ok=True)
  costs = (_cost(source, part) for f in todo for part in f.parts)
  budget = _Budget(max(_MIN_BUDGET, max(costs, default=0)))
  total = sum(f.nbytes for f in files)
  done = total - sum(f.nbytes for f in todo)
  with (
    tqdm.tqdm(
      total=total,
      initial=done,
      unit='B',
      unit_scale=True,
      disable=not progress,
    ) as bar,
    futures.ThreadPoolExecutor(os.cpu_count()) as pool,
  ):
    advance = _locked(bar.update)
    jobs = []
    for file in todo:
      target = _Target(file, directory / file.path)
      offset = len(file.header)
      advance(offset)
      for part in file.parts:
        args = (target, offset, part, source, budget, advance)
        jobs.append(pool.submit(_write_part, *args))
        offset += part.spec.nbytes
    try:
      for job in futures.as_completed(jobs):
        job.result()
    except BaseException:
      budget.stop()
      pool.shutdown(cancel_futures=True)
      raise


class _Budget:
  """Bytes that all threads together may hold."""

  def __init__(self, limit: int):
    self._limit, self._held, self._stopped = limit, 0, False
    self._changed = threading.Condition()

  def acquire(self, nbytes: int) -> None:
    """Waits until `nbytes` are free."""
    with self._changed:
      self._changed.wait_for(
        lambda: self._stopped or self._held + nbytes <= self._limit
      )
      if self._stopped:
        raise futures.CancelledError
      self._held += nbytes

  def release(self, nbytes: int) -> None:
    """Gives them back."""
    with self._changed:
      self._held -= nbytes
      self._changed.notify_all()

  def stop(self) -> None:
    """Makes every `acquire` raise, so that files under way are given up."""
    with self._changed:
      self._stopped = True
      self._changed.notify_all()


def _locked(update: Callable[[int], None]) -> Callable[[int], None]:
  lock = threading.Lock()

  def advance(nbytes):
    with lock:
      update(nbytes)

  return advance


def _is_finished(path, nbytes):
  return path.is_file() and path.stat().st_size == nbytes


class _Target:
  """A file that several threads write; the last of them renames it."""

  def __init__(self, file: File, path: pathlib.Path):
    self._file, self._path = file, path
    self._partial = path.with_name(f'.{path.name}.partial')
    self._left, self._begun = len(file.parts), False
    self._lock = threading.Lock()

  def open(self) -> BinaryIO:
    """The file under its temporary name, to write a part."""
    with self._lock:
      if not self._begun:
        self._partial.write_bytes(self._file.header)
        self._begun = True
    return self._partial.open('r+b', buffering=0)

  def finish_part(self) -> None:
    """Counts the parts that are written."""
    with self._lock:
      self._left -= 1
      if not self._left:
        self._partial.rename(self._path)


def _write_part(target, offset, part, source, budget, advance):
  cost = _cost(source, part)
  budget.acquire(cost)
  try:
    with target.open() as out:
      out.seek(offset)
      _write_bytes(out, part, source, advance)
      _begin_writeback(out, offset, part.spec.nbytes)
  finally:
    budget.release(cost)
  target.finish_part()


def _begin_writeback(out, offset, nbytes):
  """Has the kernel write now what it would keep until gigabytes are dirty.

  The disk then works beside the copies, not after them.
  """
  if hasattr(os, 'posix_fadvise'):  # Linux, but not macOS.
    os.posix_fadvise(out.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)


def _cost(source, part):
  """Bytes held while a part is made: the tensor, and its new form."""
  if _extent(source, part):
    return 0
  size = source.specs[part.name].nbytes
  is_copied = part.cut or (part.place and not is_verbatim(part.place))
  return max(source.cost(part.name), size + bool(is_copied) * part.spec.nbytes)


def _extent(source, part) -> Extent | None:
  """Where exactly the bytes of a part lie, if anywhere."""
  if part.place and not is_verbatim(part.place):
    return None
  extent = source.extent(part.name)
  if extent is None or part.cut is None:
    return extent
  axis, start, _ = part.cut
  if axis:
    return None
  shape = source.specs[part.name].shape
  offset = extent.nbytes // shape[0] * start
  return Extent(extent.path, extent.offset + offset, part.spec.nbytes)


def is_verbatim(tensor: names.Tensor) -> bool:
  """Whether our slice in Fortran order is the released array's bytes."""
  shape = tensor.shape[::-1] if tensor.is_transposed else tensor.shape
  return tensor.shape_jax == shape


def _write_bytes(out, part, source, advance):
  extent = _extent(source, part)
  if extent:
    _copy(out, extent, advance)
    return
  array = source.read(part.name)
  if part.cut:
    axis, start, stop = part.cut
    array = array[(slice(None),) * axis + (slice(start, stop),)]
  if part.place and not is_verbatim(part.place):
    array = part.place.to_jax(array)
  _write_all(out, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  advance(part.spec.nbytes)


def _copy(out, extent, advance):
  """Copies through a buffer that stays in the processor's cache.

  Where a tensor does not begin with a page, this is twice as fast as a copy
  within the kernel.
  """
  buffer = memoryview(bytearray(min(_COPY, extent.nbytes)))
  with open(extent.path, 'rb', buffering=0) as file:
    done = 0
    while done < extent.nbytes:
      want = min(_COPY, extent.nbytes - done)
      got = os.preadv(file.fileno(), [buffer[:want]], extent.offset + done)
      if not got:
        raise ValueError(f'{extent.path}: became shorter while it was read')
      _write_all(out, buffer[:got])
      done += got
      advance(got)


def _write_all(out, data):
  view = memoryview(data)
  while view:
    view = view[out.write(view) :]
