"""What of a run's metrics must be the same on any machine."""

# All of a record but how fast the machine was.
_SPEEDS = ('step_seconds', 'tokens_per_second', 'mfu')


def without_speeds(records):
  """Records of metrics.jsonl that can be compared."""
  return [
    {k: v for k, v in record.items() if k not in _SPEEDS} for record in records
  ]
