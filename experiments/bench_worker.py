"""One implementation under test, in a process of its own.

`bench.py` starts one worker per implementation and tells them in turn, over
stdin and stdout, to run: timings alternate, and peak memory is the process's.

    python -m experiments.bench_worker NAME '{"preset": "bench_cpu", ...}'

Each line of stdin names a task and its integers; the answer is one JSON line of
seconds.  NAME is `deepseek_jax` or `transformers:EXPERTS:ATTENTION`, e.g.
`transformers:grouped_mm:sdpa`.
"""

import json
import pathlib
import resource
import sys
import time

import numpy as np

from deepseek_jax import config as config_lib
from deepseek_jax import presets
from deepseek_jax.convert import hf_config
from experiments import large_pages

# The side of the square float32 product that measures a machine's own rate.
MATMUL = 2048


# Tokens of each prompt that is continued.
PROMPT = 64
BATCHES = (1, 8)


def _prompts(config: config_lib.Config, batch: int) -> list[list[int]]:
  rng = np.random.default_rng(0)
  shape = (batch, PROMPT)
  return rng.integers(0, config.model.vocab_size, shape).tolist()


def _tokens(config: config_lib.Config, seed: int) -> np.ndarray:
  shape = (config.data.batch_size, config.data.seq_len + 1)
  rng = np.random.default_rng(seed)
  return rng.integers(0, config.model.vocab_size, shape).astype(np.int32)


class JaxWorker:
  """This repository: `make_train_step` and the jitted forward."""

  def __init__(self, config: config_lib.Config):
    import jax

    from deepseek_jax.training import optimizer, process, schedules, step

    process.use_compilation_cache(config)
    self._jax, self._config, self._count = jax, config, 0
    self._model = step.build_model(config)
    tx = optimizer.adamw(config.optim, config.precision)
    self._state = step.init_state(self._model, tx, 0)
    self._train_step = step.make_train_step(self._model, config, tx)
    self._step = None  # Compiled by `ready`.
    self._hyper = schedules.Schedule(config).at
    self._forward = jax.jit(
      lambda params, state, tokens: self._model.apply(
        {'params': params, 'router_state': state}, tokens, method='logits'
      )
    )

  def _train_args(self):
    tokens = _tokens(self._config, self._count)
    b = self._config.micro_batch_size
    tokens = tokens.reshape(-1, b, tokens.shape[-1])
    batch = {'tokens': tokens, 'segments': np.ones_like(tokens)}
    return self._state, batch, self._hyper(self._count)

  def ready(self) -> None:
    """Traces and compiles the optimizer step."""
    self._step = self._train_step.lower(*self._train_args()).compile()

  def train(self) -> None:
    """One optimizer step."""
    self._state, metrics = self._step(*self._train_args())
    self._count += 1
    if not np.isfinite(float(metrics['loss'])):
      raise FloatingPointError('the benchmark diverged')

  def forward(self) -> None:
    """Logits of one batch."""
    state = self._state
    tokens = _tokens(self._config, 0)[:, :-1]
    self._jax.block_until_ready(
      self._forward(state.params, state.router_state, tokens)
    )

  def matmul(self) -> None:
    """A large float32 product."""
    x = self._jax.numpy.ones((MATMUL, MATMUL))
    self._jax.block_until_ready(x @ x)

  def memory(self) -> dict[str, float | str | None]:
    """The peak of the device's memory, or the process's; and the device."""
    from deepseek_jax.training import throughput

    device = self._jax.local_devices()[0]
    stats = device.memory_stats() or {}
    return {
      'peak_bytes': stats.get('peak_bytes_in_use', _peak_rss()),
      'peak_flops': throughput.peak_flops(device),
      'device': device.device_kind,
    }


class JaxDecoder:
  """This repository: `generate`, by fresh weights or those of a run."""

  def __init__(self, config: config_lib.Config, workdir: str = ''):
    """Without a `workdir`, `config` is that of the model."""
    from deepseek_jax.data import tokenizer
    from deepseek_jax.inference import weights
    from deepseek_jax.training import process, step, trained

    if workdir:
      path = pathlib.Path(workdir).expanduser()
      bos = tokenizer.Tokenizer.load(path / 'tokenizer.json').bos_id
      run = trained.load(path)
      self._model, variables = run.model, run.variables
    else:
      process.use_compilation_cache(config)
      self._model = step.build_model(config)
      variables = step.init_variables(self._model, 0)
    self._weights = weights.unstack(self._model, variables)
    self._prompts = _prompts(config, BATCHES[-1])
    if workdir:
      # Nothing else here is sure to be of the kind that the model knows.
      starts = [[bos]] * BATCHES[-1]
      written = self._write(starts, PROMPT - 1, temperature=1.0).tokens
      self._prompts = [[bos, *tokens] for tokens in written]

  def _write(self, prompts, new_tokens, **options):
    from deepseek_jax.inference import generate

    return generate.generate(
      self._model, self._weights, prompts, new_tokens, **options
    )

  def generate(
    self, batch: int, new_tokens: int, drafts: int = 0
  ) -> dict[str, float]:
    """Greedy continuation of prompts of `PROMPT` tokens; drafts that stood."""
    done = self._write(self._prompts[:batch], new_tokens, drafts=drafts)
    return {'stood': done.acceptance[0]} if drafts else {}


class TorchWorker:
  """`transformers`, in float32 on the CPU (or the GPU, where there is one)."""

  def __init__(self, config: config_lib.Config, experts: str, attention: str):
    import torch
    import transformers

    self._torch, self._config, self._count = torch, config, 0
    self._device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(0)
    fields = hf_config.from_model(config.model)
    hf = transformers.AutoConfig.for_model(**fields)  # V3's class, or V2's.
    hf._attn_implementation = attention
    hf._experts_implementation = experts
    with self._torch.device(self._device):
      self._model = transformers.AutoModelForCausalLM.from_config(hf)
    o = config.optim
    self._optimizer = torch.optim.AdamW(
      self._model.parameters(),
      lr=1e-4,
      betas=(o.b1, o.b2),
      eps=o.eps,
      weight_decay=o.weight_decay,
      fused=True,
    )

  def _batch(self, seed):
    tokens = _tokens(self._config, seed).astype(np.int64)
    return self._torch.from_numpy(tokens).to(self._device)

  def ready(self) -> None:
    """Nothing is compiled."""

  def train(self) -> None:
    """One optimizer step: forward, backward, clip, AdamW."""
    tokens = self._batch(self._count)
    self._count += 1
    logits = self._model(tokens[:, :-1], use_cache=False).logits
    loss = self._torch.nn.functional.cross_entropy(
      logits.flatten(0, 1), tokens[:, 1:].flatten()
    )
    self._optimizer.zero_grad(set_to_none=True)
    loss.backward()
    self._torch.nn.utils.clip_grad_norm_(
      self._model.parameters(), self._config.optim.clip_norm
    )
    self._optimizer.step()
    if not np.isfinite(loss.item()):
      raise FloatingPointError('the benchmark diverged')

  def forward(self) -> None:
    """Logits of one batch."""
    with self._torch.inference_mode():
      logits = self._model(self._batch(0)[:, :-1], use_cache=False).logits
      logits[0, 0, 0].item()

  def generate(self, batch: int, new_tokens: int, static: int = 0) -> None:
    """Greedy continuation, with `transformers`' static or dynamic cache."""
    prompts = self._torch.tensor(_prompts(self._config, batch))
    prompts = prompts.to(self._device)
    with self._torch.inference_mode():
      self._model.generate(
        prompts,
        attention_mask=self._torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        cache_implementation='static' if static else None,
      )[0, 0].item()

  def matmul(self) -> None:
    """A large float32 product."""
    x = self._torch.ones(MATMUL, MATMUL, device=self._device)
    (x @ x)[0, 0].item()

  def memory(self) -> dict[str, float]:
    """The process's peak."""
    if self._device == 'cuda':
      return {'peak_bytes': self._torch.cuda.max_memory_allocated()}
    return {'peak_bytes': _peak_rss()}


def _peak_rss() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _build(name: str, options: dict):
  config = presets.PRESETS[options['preset']]()
  config = config_lib.replace(config, options['updates'])
  if name == 'deepseek_jax':
    if options['decodes']:
      return JaxDecoder(config, options['workdir'])
    return JaxWorker(config)
  _, experts, attention = name.split(':')
  return TorchWorker(config, experts, attention)


def main() -> None:
  """Builds the implementation, then serves tasks until stdin ends."""
  started = time.perf_counter()
  answers, sys.stdout = sys.stdout, sys.stderr  # Libraries may print.
  worker = _build(sys.argv[1], json.loads(sys.argv[2]))
  print(json.dumps({'seconds': time.perf_counter() - started}), file=answers)
  answers.flush()
  for line in sys.stdin:
    started = time.perf_counter()
    task, *numbers = line.split()
    result = getattr(worker, task)(*map(int, numbers)) or {}
    seconds = time.perf_counter() - started
    print(json.dumps({'seconds': seconds, **result}), file=answers)
    answers.flush()


if __name__ == '__main__':
  if sys.argv[1] == 'deepseek_jax':  # As its programs do.
    large_pages.use()
  main()
