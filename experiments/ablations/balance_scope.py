"""Should each sequence be balanced, or only the batch?

DeepSeek-V3 section 4.5.3, validation loss of a 1B model: sequence-wise
auxiliary loss 2.258, batch-wise 2.253, auxiliary-loss-free 2.253.

    python -m experiments.ablations.balance_scope  # 3 minutes on 2 cores

Mean±standard error of three seeds, 2026-11-22, two CPU cores:

| arm | seeds | val loss | vs first | MaxVio batch | MaxVio summed |
| --- | ---: | ---: | ---: | ---: | ---: |
| sequence-wise | 3 | 4.5577±0.0478 | – | 0.91±0.06 | 0.83±0.08 |
| batch-wise | 3 | 4.5644±0.0509 | +0.0067±0.0039 | 0.80±0.04 | 0.71±0.07 |
| bias | 3 | 4.5538±0.0462 | -0.0039±0.0046 | 0.43±0.03 | 0.09±0.01 |

The losses are no more than two standard errors apart: nothing of the paper's
0.005 is confirmed or denied.
"""

from experiments import sweep

_LOSS = {'optim.gamma': '0', 'optim.alpha': '0.01'}  # See balance.py.
ARMS = {
  'sequence-wise': _LOSS,
  'batch-wise': {**_LOSS, 'model.moe.aux_loss': 'batch'},
  'bias': {},
}

if __name__ == '__main__':
  sweep.ablation(ARMS, 'balance_scope', 'max_vio,max_vio_summed')
