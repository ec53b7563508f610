"""Bytes on disk and arrays in their place, one tensor at a time: safetensors and orbax, both ways.

Nothing here knows a model. `table` says what a family's tensors are called, `safetensors` and `orbax` read and write
them, `output` lets a result appear whole or not at all.
"""

from checkpoints.errors import CheckpointError

__all__ = ["CheckpointError"]
