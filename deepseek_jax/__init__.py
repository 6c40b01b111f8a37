"""DeepSeek-V3 in JAX and Flax: model, training, inference and conversion."""

__version__ = '0.1.0'
