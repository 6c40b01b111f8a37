"""What of a run's records must be the same on any machine."""

from deepseek_jax.training import checkpoint

# All of a record but how fast the machine was.
_SPEEDS = ('step_seconds', 'tokens_per_second', 'mfu')


def without_speeds(records):
  """Records of metrics.jsonl that can be compared."""
  return [
    {k: v for k, v in record.items() if k not in _SPEEDS} for record in records
  ]


def first_gradients(workdir):
  """Those of step 1, clipped, in its checkpoint, as Adam's first moments."""
  with checkpoint._manager(workdir, read_only=True, create=False) as manager:
    state = checkpoint._read_as_saved(manager, 1, 'opt_state', None)
  return state['mu']
