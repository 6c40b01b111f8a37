"""Large conversions: memory, kills, damaged sources, all of R1's tensors."""

import collections
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import numpy as np
import pytest
import tensorstore as ts
from absl.testing import absltest, parameterized

from deepseek_jax import presets
from deepseek_jax.convert import (
  check,
  hf,
  names,
  official,
  orbax_io,
  run,
  sources,
  stream,
)
from deepseek_jax.convert.safetensors_io import Spec
from tests import convert_support as support

_ROOT = pathlib.Path(__file__).parent.parent
# 124 MB in BF16, and no tensor above 2.1 MB.
_LARGE = {
  'vocab_size': 2048, 'dim': 512, 'inter_dim': 1024, 'n_layers': 4,
  'moe.moe_inter_dim': 512, 'moe.n_routed_experts': 32,
  'mla.kv_lora_rank': 256, 'n_heads': 8,
}  # fmt: skip


class R1Test(parameterized.TestCase):
  @pytest.mark.slow
  def test_all_tensors_of_the_released_checkpoint(self):
    """FACTS 1.8: 91,991 tensors, and the published totals by dtype."""
    model = presets.deepseek_v3().model
    source = sources.Cast(_Abstract(model), model, 'fp8')
    self.assertLen(source.specs, 91_991)
    totals = collections.Counter()
    for spec in source.specs.values():
      totals[spec.dtype.name] += math.prod(spec.shape)
    self.assertEqual(
      totals,
      {
        'float8_e4m3fn': 680_571_043_840,
        'bfloat16': 3_918_786_560,
        'float32': 41_555_600,
      },
    )
    some = {
      'model.layers.0.mlp.gate_proj.weight': (18432, 7168),
      'model.layers.60.mlp.experts.255.down_proj.weight': (7168, 2048),
      'model.layers.60.mlp.experts.255.down_proj.weight_scale_inv': (56, 16),
      'model.layers.61.self_attn.kv_a_proj_with_mqa.weight_scale_inv': (5, 56),
      'model.layers.61.eh_proj.weight': (7168, 14336),
      'model.layers.61.shared_head.head.weight': (129280, 7168),
      'model.layers.3.mlp.gate.e_score_correction_bias': (256,),
    }
    for name, shape in some.items():
      self.assertEqual(source.specs[name].shape, shape)
    # What a conversion would write holds each of them once.
    for files in (hf.files(source), orbax_io.files(source, model)):
      found = collections.Counter(p.name for f in files for p in f.parts)
      lost = source.specs.keys() - found.keys()
      self.assertLen(lost, 2 if files[0].path.startswith('checkpoints') else 0)
      self.assertTrue(all(name.startswith('model.layers.61.') for name in lost))
      self.assertEqual(set(found.values()), {1})
    with self.assertRaisesRegex(ValueError, 'cuts blocks'):
      official.files(source, model, 32)
    # 16 ranks, as in the official README: experts once, the rest 16 times.
    ranks = official.files(source, model, 16)
    self.assertLen(ranks, 17)
    self.assertLen({f.nbytes - len(f.header) for f in ranks[:16]}, 1)


class _Abstract(sources.Source):
  """A BF16 checkpoint without numbers."""

  def __init__(self, model):
    self.specs = {
      t.name: Spec(
        np.dtype(
          np.float32 if t.leaf[:1] == ('router_state',) else support.BF16
        ),
        t.shape,
      )
      for t in names.tensors(model)
    }

  def read(self, name):
    raise AssertionError(f'{name} is read')

  def equal(self, a, b):
    return self.specs[a] == self.specs[b]


def _link_to_itself(path):
  path.unlink()
  path.symlink_to(path)


class DamageTest(support.FolderTestCase):
  """Nothing is written, and the message names what is wrong."""

  def setUp(self):
    super().setUp()
    self.model = support.model('v3')
    self.arrays = support.random_tensors(self.model, fp8=True)
    self.src = self.folder / 'src'

  def _refused(self, message, **options):
    for to in run.TARGETS:
      with self.assertRaisesRegex(ValueError, message):
        run.convert(self.src, self.folder / 'dst', to, **options)
    self.assertEqual(list(self.folder.iterdir()), [self.src])

  @parameterized.parameters(
    ('model.norm.weight', 'missing: model.norm.weight'),
    ('model.layers.1.mlp.experts.3.up_proj.weight_scale_inv',
     'missing: model.layers.1.mlp.experts.3.up_proj.weight_scale_inv'),
    ('model.layers.3.eh_proj.weight', 'missing.*model.layers.3.eh_proj'),
  )  # fmt: skip
  def test_missing(self, name, message):
    del self.arrays[name]
    support.write(self.src, self.model, self.arrays)
    self._refused(message)

  @parameterized.parameters(
    ('model.layers.9.x.weight', 'extra.*model.layers.9.x.weight'),
    ('model.norm.weight_scale_inv', 'extra.*model.norm.weight_scale_inv'),
  )
  def test_extra(self, name, message):
    self.arrays[name] = np.ones((1, 1), np.float32)
    support.write(self.src, self.model, self.arrays)
    self._refused(message)

  def test_wrong_shape(self):
    name = 'model.layers.2.self_attn.o_proj.weight'
    self.arrays[name] = self.arrays[name].T[:-1]
    support.write(self.src, self.model, self.arrays)
    self._refused(name + ' has shape')

  def test_wrong_dtypes(self):
    name = 'model.layers.2.mlp.gate.weight'
    before = self.arrays[name]
    self.arrays[name] = before.astype(support.FP8)
    support.write(self.src, self.model, self.arrays)
    self._refused(name + ' is FP8')
    self.arrays[name] = before.astype(np.int64)
    support.write(self.folder / 'int', self.model, self.arrays)
    with self.assertRaisesRegex(ValueError, name + ' is int64'):
      run.plan(self.folder / 'int', 'jax')
    self.arrays[name] = before.astype(np.float32)
    support.write(self.folder / 'mixed', self.model, self.arrays)
    run.plan(self.folder / 'mixed', 'hf')
    with self.assertRaisesRegex(ValueError, 'layers are stacked'):
      run.plan(self.folder / 'mixed', 'jax')

  def test_nan_scale(self):
    name = 'model.layers.2.mlp.experts.3.up_proj.weight_scale_inv'
    self.arrays[name][0, 0] = np.nan
    support.write(self.src, self.model, self.arrays)
    self._refused(name.replace('.', r'\.') + r'\[0, 0\] is nan')

  @parameterized.parameters(0, 4, 100, -1, -1000)
  def test_truncated_files(self, size):
    support.write(self.src, self.model, self.arrays)
    path = self.src / 'model-00002-of-00003.safetensors'
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    self._refused(f'{path.name}.*truncated')

  @parameterized.product(
    chunk=(
      'params.moe_layers.ffn.w1/1.3.0.0',
      'router_state.moe_layers.ffn.bias/1.0',
    ),
    is_cut=(False, True),
  )
  def test_a_chunk_of_a_workdir(self, chunk, is_cut):
    support.write(self.folder / 'hf', self.model, self.arrays)
    run.convert(self.folder / 'hf', self.src, 'jax')
    shutil.rmtree(self.folder / 'hf')
    path = self.src / 'checkpoints/0/model' / chunk
    if is_cut:
      os.truncate(path, path.stat().st_size - 1)
    else:
      path.unlink()
    for dtype in hf.DTYPES:
      self._refused(
        chunk.replace('/', ': chunk ') + ' is missing or cut', dtype=dtype
      )

  @parameterized.parameters(
    ('', 'meta/metadata: no such file'),
    ('meta/metadata', 'metadata is not JSON'),
    ('model/_METADATA', '_METADATA is not JSON'),
    ('model/params.norm/.zarray', 'params.norm'),
  )
  def test_a_damaged_checkpoint(self, name, message):
    support.write(self.folder / 'hf', self.model, self.arrays)
    run.convert(self.folder / 'hf', self.src, 'jax')
    shutil.rmtree(self.folder / 'hf')
    newest = self.src / 'checkpoints/5'
    if name:
      shutil.copytree(self.src / 'checkpoints/0', newest)
      os.truncate(newest / name, 9)
    else:
      newest.mkdir()
    self._refused(message)

  @parameterized.parameters(
    (os.unlink, 'chunk 0 is missing or cut'),
    (lambda path: os.truncate(path, 0), 'chunk 0 is missing or cut'),
    (_link_to_itself, 'symbolic links.*may be whole'),
  )
  def test_a_chunk_in_a_file_of_many(self, change, message):
    """A storage that does not answer has lost nothing."""
    spec = {
      'driver': 'zarr',
      'kvstore': {'driver': 'ocdbt', 'base': f'file://{self.folder}/'},
      'metadata': {'shape': [400], 'chunks': [400], 'dtype': '<f4'},
    }
    numbers = np.random.default_rng(0).random(400, np.float32)
    array = ts.open(spec, create=True).result()
    array.write(numbers).result()
    orbax_io._check_chunks('x', array)
    files = (p for p in self.folder.rglob('*') if p.is_file())
    change(max(files, key=lambda p: p.stat().st_size))
    with self.assertRaisesRegex(ValueError, message):
      orbax_io._check_chunks('x', array)

  def test_files_and_index_that_disagree(self):
    support.write(self.src, self.model, self.arrays)
    path = self.src / 'model.safetensors.index.json'
    index = json.loads(path.read_text())
    index['weight_map']['lm_head.weight'] = 'other.safetensors'
    path.write_text(json.dumps(index))
    self._refused('other.safetensors: the index names it')
    index['weight_map'].pop('lm_head.weight')
    path.write_text(json.dumps(index))
    self._refused('lm_head.weight is in model')
    path.write_text(json.dumps({'weight_map': {'lm_head.weight': 1}}))
    self._refused('no weight_map of names')

  @parameterized.parameters(
    ({'dtype': 'F9'}, 'unknown dtype F9'),
    ({'data_offsets': [1, 5]}, 'lies at 1:5'),
    ({'shape': [3]}, r'F32\[3\]'),
    ({'shape': None}, 'no safetensors header'),
  )
  def test_bad_headers(self, change, message):
    row = {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]} | change
    text = json.dumps({'x': row}).encode()
    path = self.folder / 'x.safetensors'
    path.write_bytes(len(text).to_bytes(8, 'little') + text + b'1234')
    with self.assertRaisesRegex(ValueError, message):
      sources.Files([path])

  def test_quantization_config_and_tensors_disagree(self):
    support.write(self.src, self.model, self.arrays)
    path = self.src / 'config.json'
    good = json.loads(path.read_text())
    bad = dict(good)
    del bad['quantization_config']
    path.write_text(json.dumps(bad))
    self._refused('quantization_config')
    other = good['quantization_config'] | {'weight_block_size': [64, 64]}
    path.write_text(json.dumps(good | {'quantization_config': other}))
    self._refused('weight_block_size')
    path.write_text(json.dumps(good | {'quantization_config': ['fp8']}))
    self._refused('must be an object')

  def test_targets_and_arguments(self):
    support.write(self.src, self.model, self.arrays)
    below = self.src / 'config.json' / 'x' / 'y'
    for dst, message in (
      (self.src, 'not empty'),
      (below, 'config.json is no directory'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        run.plan_to(dst, self.src, 'hf')
    for options, message in (
      ({'to': 'torch'}, '--to=torch'),
      ({'to': 'hf', 'mp': 2}, '--mp=2'),
      ({'to': 'hf', 'dtype': 'int4'}, "dtype='int4'"),
      ({'to': 'hf', 'use_ema': True}, '--ema'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        run.plan(self.src, **options)
    with self.assertRaisesRegex(ValueError, 'no such directory'):
      run.plan(self.folder / 'none', 'hf')
    (self.src / 'config.json').unlink()
    with self.assertRaisesRegex(ValueError, 'has no config.json'):
      run.plan(self.src, 'hf')
    empty = self.folder / 'empty'
    empty.mkdir()
    (empty / 'config.json').write_text(
      json.dumps(hf.hf_config.from_model(self.model))
    )
    with self.assertRaisesRegex(ValueError, 'neither checkpoints'):
      run.plan(empty, 'hf')

  def test_a_full_disk_is_noticed_before(self):
    support.write(self.src, self.model, self.arrays)
    usage = mock.Mock(free=1000)
    with (
      mock.patch('shutil.disk_usage', return_value=usage),
      self.assertRaisesRegex(ValueError, 'bytes needed, 1,000 are free'),
    ):
      run.convert(self.src, self.folder / 'dst', 'hf')


class RestartTest(support.FolderTestCase):
  def _large(self, **changes):
    model = support.model('v3', **_LARGE | changes)
    arrays = support.random_tensors(model)
    return support.write(self.folder / 'src', model, arrays), arrays

  def test_an_error_leaves_finished_files_which_are_not_made_again(self):
    src, arrays = self._large(**{'moe.n_routed_experts': 8, 'n_layers': 2})
    dst = self.folder / 'dst'
    with mock.patch.object(hf, '_MAX_FILE', 4_000_000):
      n_files = len(run.plan(src, 'hf', 'f32').files)
      self.assertGreater(n_files, 8)
      reads = collections.Counter()
      original = sources.Files.read

      def read(self, name, fail_after=None):
        reads[name] += 1
        if fail_after and sum(reads.values()) > fail_after:
          raise OSError('the disk fell off')
        return original(self, name)

      def failing(self, name):
        return read(self, name, len(arrays) // 2)

      with (
        mock.patch.object(sources.Files, 'read', failing),
        self.assertRaisesRegex(OSError, 'fell off'),
      ):
        run.convert(src, dst, 'hf', 'f32')
      self.assertFalse(dst.exists())
      partial = self.folder / 'dst.partial'
      done = {
        p.name: p.stat().st_mtime_ns for p in partial.glob('model*.safetensors')
      }
      self.assertBetween(len(done), 1, n_files - 1)
      with self.assertRaisesRegex(ValueError, 'of another conversion'):
        run.plan_to(dst, src, 'hf', 'bf16')
      finished = {
        p.name
        for f in run.plan(src, 'hf', 'f32').files
        if f.path in done
        for p in f.parts
      }
      reads.clear()
      with mock.patch.object(sources.Files, 'read', read):
        run.convert(src, dst, 'hf', 'f32')
    self.assertEmpty(finished & reads.keys())
    for name, when in done.items():
      self.assertEqual((dst / name).stat().st_mtime_ns, when)
    self.assertEmpty(list(dst.rglob('*partial*')))
    expected = {n: x.astype(np.float32) for n, x in arrays.items()}
    support.assert_same(support.read(dst), expected)

  @pytest.mark.slow
  def test_a_kill_in_the_middle(self):
    src, _ = self._large()
    command = [sys.executable, '-m', 'experiments.convert', f'--src={src}',
               '--to=jax', '--dtype=fp8']  # fmt: skip
    partial = self.folder / 'dst.partial'
    process = subprocess.Popen(
      [*command, f'--dst={self.folder / "dst"}'],
      cwd=_ROOT,
      stderr=subprocess.DEVNULL,
    )
    chunks = 'checkpoints/0/model/*/[0-9]*'
    while process.poll() is None and len(list(partial.glob(chunks))) < 5:
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    self.assertEqual(process.wait(), -signal.SIGKILL)
    self.assertFalse((self.folder / 'dst').exists())
    done = {p: p.stat().st_mtime_ns for p in partial.glob(chunks)}
    total = len(run.plan(src, 'jax', 'fp8').files)
    self.assertBetween(len(done), 5, total - 1)
    for name in ('dst', 'other'):  # One goes on, one is never interrupted.
      target = f'--dst={self.folder / name}'
      done_now = subprocess.run(
        [*command, target], cwd=_ROOT, capture_output=True, text=True
      )
      self.assertEqual(done_now.returncode, 0, done_now.stderr)
      self.assertRegex(done_now.stderr, r'100%.*B/s')
    a, b = self.folder / 'dst', self.folder / 'other'
    for path, when in done.items():
      self.assertEqual((a / path.relative_to(partial)).stat().st_mtime_ns, when)
    files = sorted(p.relative_to(b) for p in b.rglob('*') if p.is_file())
    self.assertEqual(
      files, sorted(p.relative_to(a) for p in a.rglob('*') if p.is_file())
    )
    for path in files:
      self.assertEqual((a / path).read_bytes(), (b / path).read_bytes(), path)


class MemoryTest(support.FolderTestCase):
  @parameterized.parameters('hf', 'jax')
  @pytest.mark.slow
  def test_peak_does_not_grow_with_the_checkpoint(self, to):
    model = support.model('v3', **_LARGE)
    arrays = support.random_tensors(model)
    src = support.write(self.folder / 'hf', model, arrays)
    if to == 'hf':  # Sources of both kinds.
      run.convert(src, self.folder / 'jax', 'jax')
      src = self.folder / 'jax'
    code = (
      'import resource, sys\n'
      'import tensorstore\n'
      'from deepseek_jax.convert import run\n'
      'def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
      'run.plan(sys.argv[1], sys.argv[3], "f32")\n'
      'before = peak()\n'
      'run.convert(*sys.argv[1:4], "f32")\n'
      'print((peak() - before) * 1024)\n'
    )
    done = subprocess.run(
      [sys.executable, '-c', code, src, self.folder / 'dst', to],
      cwd=_ROOT,
      capture_output=True,
      text=True,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    sizes = [2 * x.nbytes for x in arrays.values()]
    # The budget and the cache of chunks, 64 MB each, are the constant.
    limit = 2 * max(sizes) + (128 << 20)
    self.assertGreater(sum(sizes), 1.5 * limit)
    self.assertLess(int(done.stdout), limit)

  def test_threads_share_a_budget(self):
    budget, held = stream._Budget(100), []
    budget.acquire(60)
    thread = threading.Thread(
      target=lambda: (budget.acquire(50), held.append(1))
    )
    thread.start()
    time.sleep(0.05)
    self.assertEmpty(held)
    budget.release(60)
    thread.join(10)
    self.assertEqual(held, [1])


class CheckTest(parameterized.TestCase):
  def test_a_whole_source_has_nothing_extra(self):
    model = presets.tiny().model
    self.assertEqual(check.check(_Abstract(model), model), [])


if __name__ == '__main__':
  absltest.main()
