"""What packed matrices mean, in numpy float64, written from each layout's description and one element at a time.

Each function takes a matrix's tensors by the end of their names and gives the matrix [O, I]. Bits are picked out of words
as integers, by the index of the element; nothing of this is how the importer does it.

Layouts: GPTQ and AWQ as in the packing loops of AutoGPTQ (qlinear_cuda_old.py) and AutoAWQ (gemm.py); bitsandbytes
functional.py; compressed-tensors pack_quantized; DeepSeek-V3's fp8 (inference/kernel.py); OCP MX v1.0; ggml-quants.c.
"""

# ruff: noqa: E741

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

Parts = Mapping[str, np.ndarray]

# QLoRA (arXiv:2305.14314), appendix E
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def bits_at(words: Any, position: Any, bits: int) -> np.ndarray:
    """`bits` bits from bit `position` on of rows of 32-bit words [..., W]: the stream begins in the lowest bit of word 0."""
    words = np.asarray(words).astype(np.int64) & 0xFFFFFFFF
    wide = np.concatenate([words, np.zeros((*words.shape[:-1], 1), np.int64)], axis=-1)
    at = np.asarray(position) // 32
    both = wide[..., at] | (wide[..., at + 1] << 32)
    return (both >> (np.asarray(position) % 32)) & (2**bits - 1)


def fields(words: Any, bits: int, count: int) -> np.ndarray:
    """Codes of rows of words [..., W] as AutoGPTQ packs them: of 3 bits, 32 of them in three words, as its loop says."""
    if bits != 3:
        return bits_at(words, np.arange(count) * bits, bits)
    w = (np.asarray(words).astype(np.int64) & 0xFFFFFFFF).reshape(*np.shape(words)[:-1], -1, 3)
    a, b, c = w[..., 0], w[..., 1], w[..., 2]
    found = [(a >> 3 * k) & 7 for k in range(10)] + [(a >> 30) | ((b & 1) << 2)]
    found += [(b >> 3 * k + 1) & 7 for k in range(10)] + [(b >> 31) | ((c & 3) << 1)]
    found += [(c >> 3 * k + 2) & 7 for k in range(10)]
    return np.stack(found, axis=-1).reshape(*w.shape[:-2], -1)[..., :count]


def gptq(parts: Parts, O: int, I: int, bits: int, group: int, *, v2: bool = False) -> np.ndarray:
    q = fields(parts["qweight"].T, bits, I)  # [O, I]
    z = fields(parts["qzeros"], bits, O).T  # [O, G]
    z = z if v2 else (z + 1) % 2**bits
    g = parts.get("g_idx", np.arange(I) // (group if group > 0 else I))
    s = parts["scales"].astype(np.float64).T
    return s[:, g] * (q - z[:, g])


def awq(parts: Parts, O: int, I: int, group: int) -> np.ndarray:
    place = {output: nibble for nibble, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7])}
    position = np.array([32 * (o // 8) + 4 * place[o % 8] for o in range(O)])
    g = np.arange(I) // (group if group > 0 else I)
    q, z = bits_at(parts["qweight"], position, 4), bits_at(parts["qzeros"], position, 4)
    return (parts["scales"].astype(np.float64)[g] * (q - z[g])).T


def nf4(parts: Parts, O: int, I: int) -> np.ndarray:
    state = json.loads(parts["weight.quant_state.bitsandbytes__nf4"].tobytes())
    data = parts["weight"].reshape(-1).view(np.uint8)
    k = np.arange(O * I)
    code = np.where(k % 2 == 0, data[k // 2] >> 4, data[k // 2] & 15)
    absmax = parts["weight.absmax"]
    if "nested_offset" in state:
        n = np.arange(len(absmax))
        table = parts["weight.nested_quant_map"].astype(np.float64)
        outer = parts["weight.nested_absmax"].astype(np.float64)
        absmax = table[absmax] * outer[n // state["nested_blocksize"]] + state["nested_offset"]
    return (np.array(NF4)[code] * np.asarray(absmax, np.float64)[k // state["blocksize"]]).reshape(O, I)


def int8_rows(parts: Parts) -> np.ndarray:
    return parts["weight"].astype(np.float64) * parts["SCB"].astype(np.float64)[:, None] / 127


def packed_integers(parts: Parts, O: int, I: int, bits: int, *, symmetric: bool) -> np.ndarray:
    """compressed-tensors' integers, packed or one a byte."""
    if "weight_packed" in parts:
        q = bits_at(parts["weight_packed"], np.arange(I) * bits, bits) - 2 ** (bits - 1)
    else:
        q = parts["weight"].astype(np.int64)
    s = parts["weight_scale"].astype(np.float64)
    s = np.broadcast_to(s.reshape(-1, 1), (O, 1)) if s.size in (1, O) else s  # [O, G], G 1 for a row or all of them
    g = parts.get("weight_g_idx", np.arange(I) // (I // s.shape[1]))
    if symmetric:
        return s[:, g] * q
    z = parts["weight_zero_point"].astype(np.int64)
    if "weight_packed" in parts:
        z = bits_at(z.T, np.arange(O) * bits, bits).T - 2 ** (bits - 1)
    return s[:, g] * (q - z[:, g])


def float8(codes: np.ndarray, exponent: int = 4, mantissa: int = 3) -> np.ndarray:
    """An 8-bit float's value out of its bits: sign, `exponent` bits, `mantissa` bits."""
    raw = codes.view(np.uint8).astype(np.int64)
    e, m = (raw >> mantissa) & (2**exponent - 1), raw & (2**mantissa - 1)
    bias = 2 ** (exponent - 1) - 1
    value = np.where(e == 0, m / 2**mantissa * 2.0 ** (1 - bias), (1 + m / 2**mantissa) * 2.0 ** (e - bias))
    return np.where(raw >> 7 == 1, -value, value)


def fp8(codes: np.ndarray, scale: np.ndarray, block: tuple[int, int] | None = None) -> np.ndarray:
    O, I = codes.shape
    if block is None:
        return float8(codes) * scale.astype(np.float64).reshape(-1, 1)
    rows, columns = np.arange(O) // block[0], np.arange(I) // block[1]
    return float8(codes) * scale.astype(np.float64)[rows][:, columns]


def mxfp4(packed: np.ndarray, exponents: np.ndarray, I: int) -> np.ndarray:
    """packed uint8 [O, I / 2], the even element low; exponents uint8 [O, I / 32]."""
    k = np.arange(I)
    code = (packed.astype(np.int64)[:, k // 2] >> (4 * (k % 2))) & 15
    e, m = (code >> 1) & 3, code & 1
    value = np.where(e == 0, m / 2, (1 + m / 2) * 2.0 ** (e - 1)) * np.where(code >> 3 == 1, -1, 1)
    return value * 2.0 ** (exponents.astype(np.int64)[:, k // 32] - 127)


# --- ggml's blocks, as ggml-quants.c takes them apart; raw uint8 [B, bytes] -> float64 [B, inputs] ----------------------


def half(raw: np.ndarray, at: int) -> np.ndarray:
    """The float16 in two bytes of each block, out of its bits."""
    bits = raw[:, at].astype(np.int64) | (raw[:, at + 1].astype(np.int64) << 8)
    e, m = (bits >> 10) & 31, bits & 1023
    value = np.where(e == 0, m * 2.0**-24, (1 + m / 1024) * 2.0 ** (e - 15))
    return np.where(bits >> 15 == 1, -value, value)


def q4_0(raw: np.ndarray) -> np.ndarray:
    raw = raw.astype(np.int64)
    y = [(raw[:, 2 + i % 16] >> (4 * (i // 16))) & 15 for i in range(32)]
    return half(raw, 0)[:, None] * (np.stack(y, axis=1) - 8)


def q8_0(raw: np.ndarray) -> np.ndarray:
    signed = raw[:, 2:].astype(np.int64)
    return half(raw, 0)[:, None] * np.where(signed > 127, signed - 256, signed)


def q4_k(raw: np.ndarray) -> np.ndarray:
    raw, y = raw.astype(np.int64), []
    q = raw[:, 4:16]
    for i in range(256):
        j = i // 32
        if j < 4:
            sc, m = q[:, j] & 63, q[:, j + 4] & 63
        else:
            sc = (q[:, j + 4] & 15) | ((q[:, j - 4] >> 6) << 4)
            m = (q[:, j + 4] >> 4) | ((q[:, j] >> 6) << 4)
        code = (raw[:, 16 + 32 * (i // 64) + i % 32] >> (4 * (j % 2))) & 15
        y.append(half(raw, 0) * sc * code - half(raw, 2) * m)
    return np.stack(y, axis=1)


def q6_k(raw: np.ndarray) -> np.ndarray:
    raw, y = raw.astype(np.int64), []
    for i in range(256):
        n, k = i // 128, i % 128
        quarter, l = k // 32, k % 32
        low = (raw[:, 64 * n + l + 32 * (quarter % 2)] >> (4 * (quarter // 2))) & 15
        high = (raw[:, 128 + 32 * n + l] >> (2 * quarter)) & 3
        sc = raw[:, 192 + i // 16]
        y.append(half(raw, 208) * np.where(sc > 127, sc - 256, sc) * ((low | (high << 4)) - 32))
    return np.stack(y, axis=1)
