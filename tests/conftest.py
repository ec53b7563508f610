"""Every test runs strict: no silent dtype or rank promotion, and eight simulated devices to shard over.

Most of the time goes into compiling small programs for the CPU, and half of that into LLVM's optimisation. So it is left out
where only a CPU is there. With XLA's GPU compiler beside it, programs are made as users' are: CI runs the suite both ways.
"""

import importlib.util
import os
import signal
import zlib
from collections.abc import Iterator

flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

COMPILER = importlib.util.find_spec("jax_cuda13_plugin") is not None  # XLA's for GPUs
if "xla_backend_optimization_level" not in flags and not COMPILER:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"

# the compile-only CUDA wheels (tests/test_aot.py) look for a driver and cuDNN when jax starts, and need neither
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax  # noqa: E402  (the flag above must be set before the backend starts)
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# XLA has as many threads as there are devices or cores, and those of eight simulated devices that wait for each other hold one
# each: a step was seen to stand still for ever in two runs of the suite (scripts/LOG.md, "steps of eight simulated devices
# that stood still"). XLA reads how many when it starts; processes that tests start have as many as they would.
given = os.environ.get("NPROC")
os.environ["NPROC"] = "16"
jax.devices()
os.environ.pop("NPROC")
if given is not None:
    os.environ["NPROC"] = given


# one more of the same, family after family and format after format, which differs little from one jax to the next
THOROUGH = (
    "test_attention_matrix.py", "test_bench_attention.py", "test_bench_quant.py", "test_calibration.py",
    "test_compressed_export.py", "test_demo.py", "test_export.py", "test_finetune_formats.py", "test_finetune_golden.py",
    "test_finetune_killed.py", "test_float_formats.py", "test_gguf.py", "test_gpu_suite.py", "test_integer_formats.py",
    "test_lossless.py", "test_optimizers.py", "test_orders.py", "test_outliers.py", "test_packed.py", "test_quant_table.py",
    "test_quantized_checkpoints.py", "test_sampling.py", "test_stay.py", "test_weights.py",
)  # fmt: skip
BY_FAMILY, FURTHER = ("test_homes.py", "test_models.py"), ("gemma3_text", "gpt2", "mistral", "phi3", "qwen2", "qwen3")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what CI's second leg leaves out, as it has XLA's GPU compiler to ask as well (`thorough`), and, where no test is named
    or picked, most rows of tests that take long and have many (`rest`): five of six, or of few two of three, or with that
    compiler, of what needs it not, all but one."""

    def marked(item: pytest.Item, name: str) -> bool:
        return item.get_closest_marker(name) is not None

    picked = config.option.keyword or config.getoption("lf", False) or any("::" in a for a in config.args)
    rows: dict[str, list[pytest.Item]] = {}
    for item in items:
        further = item.path.name in BY_FAMILY and any(family in item.name for family in FURTHER)
        if (further or item.path.name in THOROUGH) and not marked(item, "aot"):
            item.add_marker(pytest.mark.thorough)
        if not picked and marked(item, "some_rows") and not (COMPILER and marked(item, "thorough")):
            rows.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, each in rows.items():
        # by the name, so that what stands last in one test's rows (a family, a format) comes first in another's
        again = COMPILER and not marked(each[0], "aot")  # in the first leg a sixth of them
        step = len(each) if again else 6 if len(each) >= 6 else min(3, len(each))
        start = zlib.crc32(name.encode()) + int(again)
        for i, item in enumerate(each):
            if i % step != start % step:
                item.add_marker(pytest.mark.rest)


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go() -> Iterator[None]:
    """Each compiled program is some mappings of memory, of which a process may have 65,530; the next one then ends it."""
    yield
    jax.clear_caches()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as where a shell waits for a command: what it starts in the background ignores it, and what that starts does too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def one_quiet_torch_thread() -> Iterator[None]:
    """One order of summation in torch, and no progress bars of transformers."""
    import torch
    import transformers

    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
