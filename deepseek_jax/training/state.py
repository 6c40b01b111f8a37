"""What a training run carries from one optimizer step to the next."""

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class TrainState:
  """The state of training, a pytree; `training.step` donates and returns it.

  There is no RNG key: every random choice derives from (seed, step), so that a
  resumed run needs nothing but the step.

  Attributes:
    step: int32 scalar, the number of optimizer steps taken.
    params: float32 master weights (V3 section 3.3.2), nested dictionaries.
    router_state: float32 router biases (V3 section 2.1.2), which the optimizer
      never sees.
    opt_state: optax state; moments in `precision.mu_dtype` and `nu_dtype`.
    amax: histories of delayed FP8 scaling, see `delayed.py`; else empty.
  """

  step: jax.Array
  params: Any
  router_state: Any
  opt_state: Any
  amax: Any = flax.struct.field(default_factory=dict)
