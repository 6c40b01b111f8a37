"""Is a shared expert worth more than one more routed expert?

DeepSeekMoE, arXiv 2401.06066, section 4.4: isolating a shared expert improves
most benchmarks.  Section 4.5: disabled in a trained model, for one more routed
expert, the Pile loss rises from 1.808 to 2.414.

    python -m experiments.ablations.shared_expert  # 3 minutes on 2 cores

Mean±standard error of three seeds, 2026-11-22, two CPU cores:

| arm | seeds | val loss | vs first | parameters | active |
| --- | ---: | ---: | ---: | ---: | ---: |
| shared + 4 of 16 | 3 | 4.5538±0.0462 | – | 416,812 | 203,820 |
| 5 of 17 | 3 | 4.5691±0.0444 | +0.0153±0.0019 | 416,942 | 203,950 |

Trained without it, the loss is 0.015 higher, in each of the three seeds: the
paper's direction.
"""

from experiments import sweep

# Both have 17 experts, of which a token uses 5; only the gate has a row more.
ARMS = {
  'shared + 4 of 16': {},
  '5 of 17': {
    'model.moe.n_shared_experts': 0,
    'model.moe.n_routed_experts': 17,
    'model.moe.n_activated_experts': 5,
  },
}

if __name__ == '__main__':
  sweep.ablation(ARMS, 'shared_expert', 'parameters,active_parameters')
