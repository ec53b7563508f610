"""Every test runs strict: no silent dtype or rank promotion, and eight simulated devices to shard over."""

import os

flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

# the compile-only CUDA wheels (tests/test_aot.py) look for a driver and cuDNN when jax starts, and need neither
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax  # noqa: E402  (the flag above must be set before the backend starts)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
