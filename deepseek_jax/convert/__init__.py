"""Checkpoints to and from PyTorch: `load_hf`, `save_hf`; files: `run`."""

from deepseek_jax.convert.hf import load_hf, save_hf

__all__ = ['load_hf', 'save_hf']
