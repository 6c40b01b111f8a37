"""Packaging: `pip install -e .`, or with extras, `-e '.[test]'`."""

import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent
_VERSION = re.search(
  r"__version__ = '(.+?)'", (_ROOT / 'deepseek_jax/__init__.py').read_text()
).group(1)

NOTEBOOKS = ['ipykernel', 'nbclient', 'nbformat']
TEST = [
  'pytest',
  'pytest-xdist',
  'ruff',
  'safetensors',
  # The reference implementations of the parity tests and of bench.py.  This
  # torch has a CPU build where the tests run, for Python 3.11 alone.
  'torch==2.13.0; python_version < "3.12"',
  'transformers',
]

setuptools.setup(
  name='deepseek_jax',
  version=_VERSION,
  description='The DeepSeek-V3 system in JAX and Flax',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['deepseek_jax*', 'experiments*']),
  package_data={'deepseek_jax.kernels': ['*.cc']},
  install_requires=[
    'absl-py',
    'chex',
    'flax>=0.12',
    'grain>=0.2.18',
    'jax>=0.10.2',
    'jinja2',
    'matplotlib',
    'ml_dtypes',
    'numpy',
    'optax',
    'orbax-checkpoint>=0.11',
    'pyarrow',
    'tensorboardX',
    'tensorstore',
    'tokenizers',
    'tqdm',
  ],
  extras_require={
    'cuda': ['jax[cuda13]>=0.10.2'],
    'notebooks': NOTEBOOKS,
    'test': TEST + NOTEBOOKS,
  },
)
