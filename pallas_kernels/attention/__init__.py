"""Attention by positions. One implementation so far: the reference, in plain jnp."""

from pallas_kernels.attention.reference import attention

__all__ = ["attention"]
