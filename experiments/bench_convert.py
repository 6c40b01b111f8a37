"""Speed of a conversion that keeps the dtype, beside a plain file copy.

    python -m experiments.bench_convert                # 2.7 GB, three times
    python -m experiments.bench_convert --layers=6     # 5.6 GB
    python -m experiments.bench_convert --preset=tiny --layers=1 --rounds=1

Makes a synthetic FP8 checkpoint with V3's layout: its experts' matrices of 14.7
MB, but 16 of 256, and the rest as much smaller, so that the shares of the bytes
are V3's.  Then copies its files, converts them to a workdir, and converts that
back, in turn and each until the disk has it all.  Prints the rates and their
ratios to the copy's.
"""

import os
import pathlib
import shutil
import statistics
import tempfile
import time

import numpy as np
from absl import flags as absl_flags

from deepseek_jax import config as config_lib
from deepseek_jax import flags, presets
from deepseek_jax.convert import hf, names, run, sources, stream
from deepseek_jax.convert.safetensors_io import Spec

_LAYERS = absl_flags.DEFINE_integer(
  'layers', 2, "MoE layers, 0.7 GB each, beside MTP's.", lower_bound=1
)
_ROUNDS = absl_flags.DEFINE_integer('rounds', 3, 'Timed.', lower_bound=1)
_FOLDER = absl_flags.DEFINE_string(
  'folder', None, 'Where the disk is to be measured (default: the temporary).'
)
_PRESET = absl_flags.DEFINE_enum(
  'preset', 'v3', ['v3', 'tiny'], 'tiny: to try the program.'
)


def _model() -> config_lib.ModelConfig:
  layers = {'n_layers': 1 + _LAYERS.value, 'n_dense_layers': 1}
  if _PRESET.value == 'tiny':
    return config_lib.replace(presets.tiny().model, layers)
  fewer = {
    'vocab_size': 2048,
    'inter_dim': 1152,
    'n_heads': 8,
    'mla.q_lora_rank': 384,
    'moe.n_routed_experts': 16,
  }
  return config_lib.replace(presets.deepseek_v3().model, fewer | layers)


class _Random(sources.Source):
  """FP8 matrices of random bytes, with scales; copies that are equal."""

  def __init__(self, model: config_lib.ModelConfig):
    bare = _Bare(model)
    self.specs = sources.Cast(bare, model, 'fp8').specs
    self._copies = {t.name: t.copy_of for t in names.tensors(model)}

  def read(self, name: str) -> np.ndarray:
    """The same for the same name."""
    spec = self.specs[name]
    name = self._copies.get(name) or name
    if name.endswith(names.SCALE):
      return np.full(spec.shape, 1e-3, spec.dtype)
    data = np.random.default_rng(len(name)).bytes(spec.nbytes)
    return np.frombuffer(data, spec.dtype).reshape(spec.shape)


class _Bare(sources.Source):
  """Shapes alone."""

  def __init__(self, model: config_lib.ModelConfig):
    self.specs = {
      t.name: Spec(np.dtype(np.float32), t.shape) for t in names.tensors(model)
    }

  def read(self, name: str) -> np.ndarray:
    """Is not called."""
    raise NotImplementedError(name)


def _make(directory: pathlib.Path) -> int:
  """Writes the checkpoint; its bytes."""
  model = _model()
  source = _Random(model)
  stream.write(hf.files(source), source, directory)
  hf.write_companions(directory, source, model, None, None)
  return sum(p.stat().st_size for p in directory.iterdir())


def _timed(work, *args) -> float:
  os.sync()
  started = time.perf_counter()
  work(*args)
  os.sync()
  return time.perf_counter() - started


def main() -> None:
  """Prints one line for each way of carrying the bytes."""
  with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
    root = pathlib.Path(folder)
    size = _make(root / 'hf')
    jobs = {
      'copy of the files': (shutil.copytree, root / 'hf', root / 'copy'),
      'Hugging Face to JAX': (run.convert, root / 'hf', root / 'jax', 'jax'),
      'JAX to Hugging Face': (run.convert, root / 'jax', root / 'back', 'hf'),
    }
    seconds = {name: [] for name in jobs}
    for _ in range(_ROUNDS.value):
      for name, (work, *args) in jobs.items():
        seconds[name].append(_timed(work, *args))
        if name != 'Hugging Face to JAX':
          shutil.rmtree(args[1])
      shutil.rmtree(root / 'jax')
  print(f'{size / 1e9:.2f} GB in {_ROUNDS.value} alternating rounds (medians)')
  medians = {name: statistics.median(s) for name, s in seconds.items()}
  base = medians['copy of the files']
  for name, s in medians.items():
    print(f'{name:20} {size / s / 1e6:6.0f} MB/s   {base / s:5.0%} of the copy')


if __name__ == '__main__':
  flags.run(main)
