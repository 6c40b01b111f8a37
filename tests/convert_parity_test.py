"""Converted models in `transformers`, and our own runs there and back."""

import copy
import functools
import json
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from absl.testing import absltest, parameterized
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from deepseek_jax import config as config_lib
from deepseek_jax import convert, presets
from deepseek_jax.convert import hf as hf_lib
from deepseek_jax.convert import hf_config, run
from deepseek_jax.data import tokenizer as tokenizer_lib
from deepseek_jax.models import deepseek
from deepseek_jax.ops import rope as rope_lib
from deepseek_jax.training import checkpoint, step
from deepseek_jax.training import state as state_lib
from tests import convert_support as support
from tests import tolerances

_ROOT = pathlib.Path(__file__).parent.parent


def _variables(config, seed=0):
  """Random float32 variables; every norm and bias is seen in the logits."""
  model = step.build_model(config)

  def leaf(path, x):
    rng = np.random.default_rng([seed, len(str(path))])
    name = path[-1].key
    mean, std = (1.0, 0.3) if name.endswith('norm') else (0.0, 0.1)
    if name == 'bias' and config.model.moe.score_func == 'softmax':
      std = 0.0
    return jnp.float32(mean + std * rng.standard_normal(x.shape))

  like = step.abstract_state(model, _NoOptimizer)
  tree = {'params': like.params, 'router_state': like.router_state}
  return jax.tree_util.tree_map_with_path(leaf, tree)


class _NoOptimizer:
  """Nothing but an empty state."""

  init = staticmethod(lambda params: ())


def _state(number, variables):
  return state_lib.TrainState(
    step=jnp.int32(number), opt_state={'count': jnp.int32(number)}, **variables
  )


def _run_config(kind, **changes):
  base = presets.tiny()
  model = config_lib.to_dict(support.model(kind, **changes))
  return config_lib.from_dict(
    config_lib.Config, config_lib.to_dict(base) | {'model': model}
  )


class TransformersTest(support.FolderTestCase):
  @parameterized.product(kind=('v3', 'v2', 'v2_lite'))
  def test_same_logits_and_same_text(self, kind):
    config = _run_config(kind)
    variables = _variables(config)
    convert.save_hf(self.folder / 'hf', config, variables)
    torch.set_num_threads(1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
      self.folder / 'hf', dtype=torch.float32, attn_implementation='eager'
    )
    prompt, n_new = np.arange(40)[None] * 7 % 512, 8  # Beyond 16: YaRN.
    forward = jax.jit(
      lambda variables, tokens: deepseek.Transformer(config.model).apply(
        variables, tokens, method='logits'
      )
    )
    logits = functools.partial(forward, variables)
    tokens = np.concatenate([prompt, np.zeros((1, n_new), int)], 1)
    with torch.inference_mode():
      expected = theirs(torch.tensor(tokens)).logits.numpy()
    tolerances.assert_close(
      logits(jnp.int32(tokens)), expected, tolerances.COMPONENT_PARITY, kind
    )
    for i in range(prompt.shape[1], tokens.shape[1]):
      tokens[0, i] = logits(jnp.int32(tokens))[0, i - 1].argmax()
    text = theirs.generate(
      torch.tensor(prompt), do_sample=False, max_new_tokens=n_new,
      min_new_tokens=n_new,
    )  # fmt: skip
    np.testing.assert_array_equal(text.numpy(), tokens)
    # The streamed conversion to BF16: these weights, in float32 on both sides.
    run.convert(self.folder / 'hf', self.folder / 'bf16', 'hf', 'bf16')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
      self.folder / 'bf16', attn_implementation='eager'
    )
    self.assertEqual(theirs.dtype, torch.bfloat16)
    with torch.inference_mode():
      expected = theirs.float()(torch.tensor(tokens)).logits.numpy()
    rounded = convert.load_hf(self.folder / 'bf16', 'f32')[1]
    tolerances.assert_close(
      forward(rounded, jnp.int32(tokens)),
      expected,
      tolerances.COMPONENT_PARITY,
      kind,
    )

  def test_what_transformers_saves_comes_in(self):
    config = _run_config('v3', n_mtp_layers=0)
    variables = _variables(config)
    convert.save_hf(self.folder / 'hf', config, variables)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
      self.folder / 'hf', dtype=torch.float32
    )
    theirs.save_pretrained(self.folder / 'theirs')
    loaded, back = convert.load_hf(self.folder / 'theirs')
    self.assertEqual(loaded.model, config.model)
    self.assertEqual(loaded.precision.compute_dtype, 'float32')
    # Evaluation of a released model must not take V3's batches of 15,360.
    self.assertEqual(loaded.data.batch_size, 1)
    chex.assert_trees_all_equal(back, variables)


_YARN = {
  'type': 'yarn', 'factor': 40.0, 'original_max_position_embeddings': 160,
  'mscale': 0.7, 'mscale_all_dim': 0.7, 'beta_fast': 8.0, 'beta_slow': 2.0,
}  # fmt: skip


class RopeTest(parameterized.TestCase):
  @parameterized.parameters(
    ({},),
    ({'beta_fast': ..., 'beta_slow': None},),
    ({'original_max_position_embeddings': ...},),
    ({'mscale': ..., 'attention_factor': 1.0},),
    ({'mscale': 0.0, 'mscale_all_dim': 0.0, 'attention_factor': 1.0},),
    ({'factor': 1.0, 'mscale': ..., 'mscale_all_dim': ...},),
    ({}, {'original_max_position_embeddings': 64}),
    ({}, {'rope_parameters': {'rope_type': 'default', 'rope_theta': 5.0}}),
  )
  def test_what_is_left_out_is_what_transformers_takes(self, changes, keys=()):
    """Angles and softmax scale; and written anew, without the source."""
    source = support.model('v3', **{'mla.qk_rope_head_dim': 64})
    hf = hf_config.from_model(source) | dict(keys)
    rope = {k: v for k, v in (_YARN | changes).items() if v is not ...}
    hf |= {'rope_scaling': rope, 'max_position_embeddings': 640}
    model = hf_config.to_model(hf)
    for written in (hf, hf_config.from_model(model)):
      theirs = transformers.DeepseekV3Config(**copy.deepcopy(written))
      angles = modeling_deepseek_v3.DeepseekV3RotaryEmbedding(theirs)
      size = theirs.qk_rope_head_dim
      np.testing.assert_allclose(
        rope_lib.frequencies(model.rope, size),
        angles.inv_freq,
        rtol=tolerances.COMPONENT_PARITY,
      )
      self.assertEqual(angles.attention_scaling, 1.0)
      scale = modeling_deepseek_v3.yarn_apply_mscale(
        theirs.rope_parameters, size**-0.5
      )
      self.assertAlmostEqual(rope_lib.softmax_scale(model.rope, size), scale)


def _other_tokenizer():
  """With another family's names, behind the bytes."""
  inner = tokenizers.Tokenizer(tokenizers.models.BPE())
  inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
  inner.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet)
  inner.train_from_iterator([], trainer)
  inner.add_special_tokens(['<s>', '</s>'])
  return tokenizer_lib.Tokenizer(inner.to_str())


class WorkdirTest(support.FolderTestCase):
  def _train(self, shard=False, kind='v3', tokenizer=None):
    """A workdir as training leaves it, without training."""
    config = _run_config(kind)
    variables = _variables(config)
    if shard:
      mesh = jax.make_mesh((8,), ('x',))

      def place(x):
        axes = [i for i, n in enumerate(x.shape) if n % 8 == 0]
        spec = [None] * x.ndim
        if axes:
          spec[axes[0]] = 'x'
        spec = jax.sharding.PartitionSpec(*spec)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

      variables = jax.tree.map(place, variables)
    average = jax.tree.map(lambda x: np.asarray(x) / 2, variables['params'])
    state = _state(3, variables)
    workdir = self.folder / 'run'
    with checkpoint.Checkpointer(workdir, config) as saver:
      saver.save(state.replace(step=jnp.int32(2), params=average), {})
      saver.save(state, {}, average)
    texts = ['def f(x):\n  return x + 1\n' * 20]
    tokenizer = tokenizer or tokenizer_lib.Tokenizer.train(
      texts, config.model.vocab_size
    )
    tokenizer.save(workdir / 'tokenizer.json')
    (workdir / 'config.json').write_text(config_lib.to_json(config))
    return config, variables, average

  @parameterized.parameters(False, True)
  def test_a_run_there_and_back(self, shard):
    config, variables, average = self._train(shard)
    for use_ema, params in ((False, variables['params']), (True, average)):
      out = self.folder / f'hf{use_ema}'
      run.convert(self.folder / 'run', out, 'hf', use_ema=use_ema)
      loaded, back = convert.load_hf(out)
      self.assertEqual(loaded.model, config.model)
      chex.assert_trees_all_equal(
        back, {'params': params, 'router_state': variables['router_state']}
      )
    run.convert(out, self.folder / 'back', 'jax')
    _, back, step_number = checkpoint.load_for_inference(self.folder / 'back')
    self.assertEqual(step_number, 0)
    chex.assert_trees_all_equal(back['params'], average)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    ours = tokenizer_lib.Tokenizer.load(self.folder / 'run' / 'tokenizer.json')
    text = 'def f(y):\n  return y'
    self.assertEqual(
      theirs(text, add_special_tokens=False).input_ids, list(ours.encode(text))
    )
    self.assertEqual(theirs.eos_token_id, ours.eos_id)

  @parameterized.parameters(('v2', False), ('v3', True))
  def test_an_exported_run_stops_where_the_run_does(self, kind, is_other):
    """At its own tokenizer's token, or at that which a source named."""
    ours = _other_tokenizer() if is_other else None
    self._train(kind=kind, tokenizer=ours)
    src, official = self.folder / 'run', self.folder / 'official'
    ours = tokenizer_lib.Tokenizer.load(src / 'tokenizer.json')
    run.convert(src, official, 'official')
    run.convert(src, self.folder / 'hf', 'hf')
    for out in (official, self.folder / 'hf'):
      config = transformers.AutoConfig.from_pretrained(out)
      theirs = transformers.GenerationConfig.from_model_config(config)
      tokenizer = transformers.AutoTokenizer.from_pretrained(out)
      for found in (theirs, tokenizer):
        self.assertEqual(found.bos_token_id, ours.bos_id)
        self.assertEqual(found.eos_token_id, ours.eos_id)
    hf = hf_config.read(out / 'config.json') | {'eos_token_id': [7, 8]}
    del hf['bos_token_id']
    (out / 'config.json').write_text(json.dumps(hf))
    run.convert(out, self.folder / 'jax', 'jax')
    run.convert(self.folder / 'jax', self.folder / 'back', 'hf')
    self.assertEqual(hf_config.read(self.folder / 'back' / 'config.json'), hf)
    about = src / 'tokenizer_config.json'
    about.write_text('{"eos_token": "<end>"}')
    with self.assertRaisesRegex(ValueError, "_token='<.*>' is no token of"):
      run.plan(src, 'hf')

  def test_an_older_run_says_which_tokens_are_to_be_named(self):
    origin = self.folder / 'old'
    origin.mkdir()
    _other_tokenizer().save(origin / 'tokenizer.json')
    about = origin / 'tokenizer_config.json'
    for verb, text in ('write', ''), ('put into', '{"eos_token": "</s>"}'):
      about.unlink(missing_ok=True)
      if text:
        about.write_text(text)
      with self.assertRaises(ValueError) as raised:
        hf_lib.released_config(support.model('v3'), None, origin)
      message = str(raised.exception)
      self.assertIn(f'tokenizer.json; {verb} {about} {{"bos_token": ', message)
      self.assertEndsWith(message, 'among <s> </s>')
    about.write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    ids = hf_lib.released_config(support.model('v3'), None, origin)
    self.assertEqual((ids['bos_token_id'], ids['eos_token_id']), (256, 257))

  def test_a_run_without_ema_or_checkpoint(self):
    config, variables, _ = self._train()
    workdir = self.folder / 'plain'
    state = _state(1, variables)
    with checkpoint.Checkpointer(workdir, config) as saver:
      saver.save(state, {})
    with self.assertRaisesRegex(ValueError, '--ema.*has none'):
      run.plan(workdir, 'hf', use_ema=True)
    arrays = workdir / 'checkpoints/1/model/ocdbt.process_0/d'
    for path in arrays.iterdir():  # Of which some hold nothing that is read.
      os.truncate(path, path.stat().st_size // 2)
    with self.assertRaisesRegex(ValueError, 'chunk .* is missing or cut'):
      run.plan(workdir, 'hf')
    (self.folder / 'empty' / 'checkpoints').mkdir(parents=True)
    with self.assertRaisesRegex(ValueError, 'no checkpoint in it'):
      run.plan(self.folder / 'empty', 'hf')

  @pytest.mark.slow
  def test_commands(self):
    """convert, then generate from what it wrote; the plan; mistakes."""
    self._train()
    hf, back = self.folder / 'hf', self.folder / 'back'
    status, text, errors = _command(
      'convert', f'--src={self.folder / "run"}', f'--dst={hf}', '--to=hf',
      '--dry_run',
    )  # fmt: skip
    self.assertEqual(status, 0, errors)
    self.assertIn('model.safetensors', text)
    self.assertRegex(text, r'float32: [\d,]+ numbers in \d+ tensors')
    self.assertFalse(hf.exists())
    for src, dst, to in ((self.folder / 'run', hf, 'hf'), (hf, back, 'jax')):
      status, _, errors = _command(
        'convert', f'--src={src}', f'--dst={dst}', f'--to={to}'
      )
      self.assertEqual(status, 0, errors)
      self.assertIn('B/s', errors)
    arguments = ['--prompt=def f', '--max_new_tokens=3', '--temperature=0']
    outputs = [
      _command('generate', f'--workdir={d}', *arguments)
      for d in (self.folder / 'run', back)
    ]
    self.assertEqual(outputs[0][0], 0, outputs[0][2])
    self.assertEqual(outputs[1][:2], outputs[0][:2])

  @parameterized.parameters(
    (['--dst=x', '--to=hf'], '--src is missing'),
    (['--src=/no/such', '--dst=x', '--to=hf'], '/no/such: no such directory'),
    (['--src=x', '--dst=x', '--to=onnx'], 'should be one of'),
    (['--src=x', '--dst=x', '--to=hf', '--dtype=int4'], 'should be one of'),
    (['--src=tests', '--dst=x', '--to=hf'], 'has no config.json'),
  )
  def test_a_mistake_is_one_line(self, arguments, message):
    status, _, errors = _command('convert', *arguments)
    self.assertEqual(status, 2, errors)
    self.assertStartsWith(errors, 'ERROR: ')
    self.assertIn(message, errors)
    self.assertLen(errors.splitlines(), 1)


class BenchTest(parameterized.TestCase):
  def test_bench_runs(self):
    status, text, errors = _command(
      'bench_convert', '--preset=tiny', '--layers=1', '--rounds=1'
    )
    self.assertEqual(status, 0, errors)
    for line in ('copy of the files', 'Hugging Face to JAX'):
      self.assertRegex(text, line + r' +\d+ MB/s +\d+% of the copy')


def _command(program, *arguments):
  """(exit status, stdout, stderr) of `python -m experiments.<program>`."""
  done = subprocess.run(
    [sys.executable, '-m', f'experiments.{program}', *arguments],
    capture_output=True,
    text=True,
    cwd=_ROOT,
  )
  return done.returncode, done.stdout, done.stderr


if __name__ == '__main__':
  absltest.main()
