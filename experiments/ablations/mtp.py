"""Does predicting the token after the next help to predict the next?

DeepSeek-V3 section 2.2 and table 4: depth 1 leaves the Pile bits per byte as
they were (0.729 and 0.729 in the small model, 0.658 and 0.657 in the large) and
improves most benchmarks.  Acceptance of the second token: 85 to 90 %.

    python -m experiments.ablations.mtp  # 3 minutes on 2 cores

Mean±standard error of three seeds, 2026-11-22, two CPU cores:

| arm | seeds | val loss | vs first | MTP accepted |
| --- | ---: | ---: | ---: | ---: |
| without MTP | 3 | 4.5538±0.0462 | – | – |
| MTP depth 1 | 3 | 4.6178±0.0528 | +0.0640±0.0066 | 0.665±0.012 |

Here MTP costs the main loss 0.064, ten standard errors: 61,000 tokens are too
few to learn the next one, and the token after it takes capacity.  The paper saw
no change after 1.33T.  A draft is accepted often since both heads still say
what is frequent.
"""

from experiments import sweep

ARMS = {
  'without MTP': {},
  'MTP depth 1': {'model.n_mtp_layers': 1},
}

if __name__ == '__main__':
  sweep.ablation(ARMS, 'mtp', 'val_mtp_1_acceptance')
