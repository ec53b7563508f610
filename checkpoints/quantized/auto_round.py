"""AutoRound (Cheng et al., arXiv:2309.05516), which packs as others do and says as whom in packing_format.

    auto_round:auto_gptq   GPTQ's tensors, zero points less one        auto_round:auto_awq   AWQ's
    anything else          GPTQ's tensors, zero points as they are

extra_config has what is different in some modules, by name; 16 bits are plain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from checkpoints.errors import CheckpointError
from checkpoints.quantized.awq import AWQ
from checkpoints.quantized.base import Method, one_of, setting
from checkpoints.quantized.gptq import GPTQ

PLAIN_BITS = 16


def auto_round(config: Mapping[str, Any]) -> Method:
    """The method that an AutoRound config names."""
    nearest = "Export anew with a W4A16 scheme"
    one_of(config, "data_type", setting(config, "data_type", str, "int"), ("int",), nearest)
    if setting(config, "act_bits", int, PLAIN_BITS) < PLAIN_BITS:
        raise CheckpointError(
            f"quantization_config: act_bits is {config['act_bits']}; only weights are read. {nearest}"
        )
    layout = setting(config, "packing_format", str, "auto_round:auto_gptq")
    given: Mapping[str, Any] = setting(config, "extra_config", Mapping, {})
    plain = [name for name, own in given.items() if own.get("bits", config.get("bits")) >= PLAIN_BITS]
    if "awq" in layout:
        if others := [name for name in given if name not in plain]:
            raise CheckpointError(
                f"quantization_config: extra_config gives {others[0]} bits of its own, which packing_format {layout!r} has"
                f" for all alike; export anew as auto_round:auto_gptq"
            )
        return AWQ({**config, "version": "gemm", "modules_to_not_convert": plain})
    version = "gptq" if "gptq" in layout and "gptqmodel" not in layout else "gptq_v2"
    own = {("-:" if n in plain else "+:") + re.escape(n) + "$": how for n, how in given.items()}
    return GPTQ({**config, "checkpoint_format": version, "dynamic": own})
