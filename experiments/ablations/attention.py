"""What do smaller key-value caches cost, at equal parameters?

DeepSeek-V2, arXiv 2405.04434, appendix D: MHA beats GQA, and GQA MQA (7B,
dense, by benchmarks); MLA beats MHA with 14 % of its cache (15.7B and 15.8B
parameters: BBH 37.9 to 39.0, MMLU 48.7 to 50.0).

    python -m experiments.ablations.attention  # 6 minutes on 2 cores

Mean±standard error of three seeds, 2026-11-22, two CPU cores:

| arm | seeds | val loss | vs first | cache B/token | parameters |
| --- | ---: | ---: | ---: | ---: | ---: |
| MLA | 3 | 4.5538±0.0462 | – | 240 | 416,812 |
| MHA | 3 | 4.8114±0.0140 | +0.2576±0.0374 | 768 | 416,224 |
| GQA, 2 kv heads | 3 | 5.2036±0.0819 | +0.6498±0.0357 | 384 | 416,224 |
| MQA | 3 | 5.2322±0.1072 | +0.6784±0.0809 | 192 | 416,224 |

Fewer key-value heads learn more slowly, GQA and MQA alike within noise, and MLA
fastest.  That is how attention begins, not how it ends: after 600 steps of one
seed MLA is at 3.408, MHA 3.435, GQA 3.690 and MQA 3.595.
"""

from experiments import sweep

# Query heads take what key-value heads leave: MHA, GQA and MQA have exactly the
# same number of parameters, and MLA 1.2 % more in its attention.
ARMS = {
  'MLA': {},
  'MHA': {'model.attention': 'mha'},
  'GQA, 2 kv heads': {
    'model.attention': 'gqa',
    'model.gqa.n_kv_heads': 2,
    'model.n_heads': 6,
  },
  'MQA': {'model.attention': 'mqa', 'model.n_heads': 7},
}

if __name__ == '__main__':
  sweep.ablation(ARMS, 'attention', 'cache_bytes_per_token,parameters')
