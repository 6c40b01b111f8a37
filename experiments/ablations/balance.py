"""Does balancing by a bias cost less loss than balancing by a loss?

DeepSeek-V3 section 2.1.2 and table 5 (Pile bits per byte of the small model:
auxiliary loss 0.727, without 0.724); Loss-Free Balancing, arXiv 2408.15664,
table 2 (1B: perplexity 9.56 and 9.50, MaxVio global 0.72 and 0.04).

    python -m experiments.ablations.balance  # 4 minutes on 2 cores

Mean±standard error of three seeds, 2026-11-22, two CPU cores:

| arm | seeds | val loss | vs first | MaxVio batch | MaxVio summed |
| --- | ---: | ---: | ---: | ---: | ---: |
| bias | 3 | 4.5538±0.0462 | – | 0.43±0.03 | 0.09±0.01 |
| alpha 0.001 | 3 | 4.5697±0.0571 | +0.0159±0.0111 | 2.13±0.16 | 2.09±0.17 |
| alpha 0.01 | 3 | 4.5577±0.0478 | +0.0039±0.0046 | 0.91±0.06 | 0.83±0.08 |
| none | 3 | 4.5711±0.0585 | +0.0173±0.0130 | 2.35±0.04 | 2.32±0.05 |

The bias balances: MaxVio falls 25-fold.  An auxiliary loss of the published
weight, 0.001, hardly acts in 120 steps; one of 0.01 does two thirds of it.  In
the loss no arm differs beyond noise, and the paper's 0.006 nats are below it.
"Summed" are the loads of the last fifth of training, in which the bias moves;
the paper's "global" are those of the validation set.
"""

from experiments import sweep

# A bias speed of 0 holds the bias at 0: what is left is the loss alone, or
# nothing.  So written, one compiled program serves all the arms.
ARMS = {
  'bias': {},
  'alpha 0.001': {'optim.gamma': '0', 'optim.alpha': '0.001'},
  'alpha 0.01': {'optim.gamma': '0', 'optim.alpha': '0.01'},
  'none': {'optim.gamma': '0', 'optim.alpha': '0'},
}

if __name__ == '__main__':
  sweep.ablation(ARMS, 'balance', 'max_vio,max_vio_summed')
