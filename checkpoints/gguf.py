"""GGUF, llama.cpp's file (versions 2 and 3), as a checkpoint: one file with the tensors and what config.json would say.

    "GGUF", version, number of tensors, number of entries, the entries (key, type, value), then of each tensor its name,
    dims (the fastest first), type and offset; the tensors' bytes begin at the next multiple of general.alignment.

A `Gguf` offers its tensors under Hugging Face's names, with rows in Hugging Face's order: for the llama architecture the
writer has put the two halves of each head's rows of q and k in turns, to suit the other spelling of rope, and here they
are put back. Packed tensors read as rows of bytes, uint8 [O, bytes of a row]. `Blocks` takes them apart, as a method of
checkpoints/quantized does; a block is of one row:

    type    inputs bytes  w                     of a block, in order
    Q4_0    32     18     d (q - 8)             float16 d, 16 bytes: input i in the low bits, i + 16 in the high ones
    Q4_1    32     20     d q + m               float16 d, m, 16 bytes
    Q5_0    32     22     d (q - 16)            float16 d, 32 highest bits, 16 bytes
    Q5_1    32     24     d q + m               float16 d, m, 32 highest bits, 16 bytes
    Q8_0    32     34     d q                   float16 d, 32 int8
    Q2_K    256    84     d sc q - dmin m       16 bytes of 4-bit scales and minima, 64 bytes, float16 d, dmin
    Q3_K    256    110    d (sc - 32) (q - 4)   32 bytes of highest bits, 64 bytes, 12 of 6-bit scales of 16 groups, float16 d
    Q4_K    256    144    d sc q - dmin m       float16 d, dmin, 12 bytes of 6-bit scales and minima of 8 groups, 128 bytes
    Q5_K    256    176    d sc q - dmin m       as Q4_K, with 32 bytes of highest bits before the 128
    Q6_K    256    210    d sc (q - 32)         low four bits, high two bits, int8 scales of 16 groups, float16 d
    IQ4_NL  32     18     d table[q]            float16 d, 16 bytes
    IQ4_XS  256    136    d (sc - 32) table[q]  float16 d, 6-bit scales of 8 groups in 6 bytes, 128 bytes
    MXFP4   32     17     2^(e - 127) E2M1[q]   e, 16 bytes

Held, in bits (and in the file): Q2_K 3.1 (2.6), Q3_K 3.6 (3.4), Q4_K 4.6 (4.5), Q5_K 5.6 (5.5), Q6_K 8.6 (6.6), and those of
bytes Q5_0 (5.5) and IQ4 (4.3 to 4.5) between 8.5 and 9; the others as in the file, but for minima in float32.

Scales and minima of the K types stay the codes and float16 units that they are in the file (jaxengine/weights/kquant.py), and
products of two numbers, where they are made, are exact in float32. A minimum is taken as s (q - z), z = minimum / s in
float32: that is to one rounding of it. All else is what the file holds, to the bit. The table of IQ4 is of int8 numbers, so
that its codes are held as those. `quantize` gives the tensors of one file several types, also one matrix
in different layers.
"""

from __future__ import annotations

import difflib
import mmap
import os
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import ml_dtypes
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.quantized.base import Matrix, Stored, Tensors
from checkpoints.safetensors import TensorInfo

MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST = 2**31  # of entries, tensors or dims: anything above is damage
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Kind(NamedTuple):
    """A tensor type: inputs and bytes of a block; the dtype of one that is plain."""

    name: str
    inputs: int
    nbytes: int
    dtype: np.dtype | None = None


KINDS = {
    0: Kind("F32", 1, 4, np.dtype(np.float32)),
    1: Kind("F16", 1, 2, np.dtype(np.float16)),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    10: Kind("Q2_K", 256, 84),
    11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
    20: Kind("IQ4_NL", 32, 18),
    23: Kind("IQ4_XS", 256, 136),
    30: Kind("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
    39: Kind("MXFP4", 32, 17),
}
OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
}  # fmt: skip
READ = ", ".join(kind.name for kind in KINDS.values())

FAMILIES = ("llama", "qwen2", "qwen3")  # general.architecture, and config.json's model_type
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
ROPE = (
    "rope_freqs.weight"  # what Llama 3.1's rope divides its frequencies by; config.json has the numbers it is made of
)
ROPE_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class _Cursor:
    """Numbers and strings out of the file, one after another."""

    def __init__(self, path: Path, data: Any):
        self.path, self.data, self.at = path, data, 0

    def take(self, layout: str) -> Any:
        size = struct.calcsize("<" + layout)
        if self.at + size > len(self.data):
            raise CheckpointError(f"{self.path} ends inside its header ({len(self.data)} bytes). Download it again")
        (found,) = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += size
        return found

    def count(self, what: str) -> int:
        if (found := self.take("Q")) >= MOST:
            raise CheckpointError(f"{self.path} says that it has {found} {what}: it is damaged. Download it again")
        return found

    def string(self) -> str:
        size = self.count("bytes of a string")
        if self.at + size > len(self.data):
            raise CheckpointError(f"{self.path} ends inside its header ({len(self.data)} bytes). Download it again")
        found = bytes(self.data[self.at : self.at + size])
        self.at += size
        return found.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, size = self.take("I"), self.count("elements")
            return [self.value(inner) for _ in range(size)]
        if kind not in SCALARS:
            raise CheckpointError(f"{self.path}: an entry is of type {kind}, which GGUF has not: it is damaged")
        return self.take(SCALARS[kind])


class Gguf:
    """The tensors of one GGUF file under Hugging Face's names; what `safetensors.Reader` offers, and `config`."""

    index_metadata = None

    def __init__(self, path: Path):
        self.path, self.folder, self.source = path, path.parent, str(path)
        self.metadata: dict[str, dict[str, str] | None] = {}
        self.weight_map: dict[str, str] = {}
        self._descriptor: int | None = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            if os.fstat(self._descriptor).st_size < 24:
                raise CheckpointError(f"{path} has fewer than 24 bytes: it is no GGUF file. Download it again")
            with mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ) as data:
                self._parse(_Cursor(path, data))
        except BaseException:
            self.close()
            raise

    def _parse(self, cursor: _Cursor) -> None:
        if (magic := bytes(cursor.data[:4])) != MAGIC:
            raise CheckpointError(f"{self.path} begins with {magic!r}; a GGUF file with {MAGIC!r}")
        cursor.at = 4
        if (version := cursor.take("I")) not in VERSIONS:
            raise CheckpointError(
                f"{self.path} is of GGUF version {version}; read are {VERSIONS[0]} and {VERSIONS[1]}, little-endian:"
                f" convert it anew with llama.cpp"
            )
        count, entries = cursor.count("tensors"), cursor.count("entries")
        self.fields: dict[str, Any] = {}
        for _ in range(entries):
            key = cursor.string()
            self.fields[key] = cursor.value(cursor.take("I"))
        if self.fields.get("split.count", 1) > 1:
            raise CheckpointError(
                f"{self.path} is one of {self.fields['split.count']} parts; merge them first: llama-gguf-split --merge"
            )
        self.config = self._config()
        heads = {"q": self.config["num_attention_heads"], "k": self.config["num_key_value_heads"]}
        infos = [
            (
                cursor.string(),
                [cursor.count("inputs") for _ in range(cursor.take("I"))],
                cursor.take("I"),
                cursor.take("Q"),
            )
            for _ in range(count)
        ]
        align = self.fields.get("general.alignment", 32)
        start, size = -(-cursor.at // align) * align, len(cursor.data)
        self._tensors: dict[str, TensorInfo] = {}
        self.kinds: dict[str, Kind] = {}
        self._turned: dict[str, int] = {}  # {name: heads} whose halves are in turns
        freqs = None
        for theirs, dims, number, offset in infos:
            if number not in KINDS:
                raise CheckpointError(
                    f"{self.path}: {theirs} is of type {OTHERS.get(number, number)}; read are {READ}. Quantise it anew, e.g."
                    f" as Q4_K_M"
                )
            kind, shape = KINDS[number], tuple(reversed(dims))
            if not shape or shape[-1] % kind.inputs:
                raise CheckpointError(
                    f"{self.path}: {theirs} is {list(shape)} in blocks of {kind.inputs}, which do not divide its rows"
                )
            stored = (*shape[:-1], shape[-1] // kind.inputs * kind.nbytes) if kind.dtype is None else shape
            dtype = np.dtype(np.uint8) if kind.dtype is None else kind.dtype
            first = start + offset
            last = first + int(np.prod(stored)) * dtype.itemsize
            if last > size:
                raise CheckpointError(f"{self.path}: {theirs} is in bytes {first} to {last} of {size}: it is cut off")
            name = hugging_face_name(theirs)
            info = TensorInfo(name, dtype, stored, self.path, first, last)
            if theirs == ROPE:
                freqs = info
                continue
            self._tensors[name], self.kinds[name] = info, kind
            if self.config["model_type"] == "llama" and (
                found := re.fullmatch(r".*\.attn_([qk])\.(weight|bias)", theirs)
            ):
                self._turned[name] = heads[found[1]]
        self._finish(freqs)

    def _finish(self, freqs: TensorInfo | None) -> None:
        """The fields of config.json that the tensors say."""
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path} has no token_embd.weight: it holds no language model, or a part of one")
        self.config["vocab_size"] = embedding.shape[0]
        self.config["tie_word_embeddings"] = "lm_head.weight" not in self._tensors
        kinds = {self.kinds[n].name for n, info in self._tensors.items() if len(info.shape) == 2}
        plain = {"F32": "float32", "F16": "float16"}
        self.config["dtype"] = plain[kinds.pop()] if len(kinds) == 1 and kinds <= plain.keys() else "bfloat16"
        if any(n.endswith("q_proj.bias") for n in self._tensors) and self.config["model_type"] == "llama":
            self.config["attention_bias"] = True
        if freqs is None:
            return
        factors = self._read(freqs, slice(0, freqs.shape[0])).astype(np.float64)
        factor = float(factors.max())
        if factor == 1:
            return
        if not np.allclose(factors, _llama3_factors(self.config, factor), rtol=1e-4):
            raise CheckpointError(
                f"{self.path}: {ROPE} divides frequencies by {factors.min():.4g} to {factor:.4g}, not as Llama 3.1's rope"
                f" with that factor does; take the checkpoint that it was converted from"
            )
        self.config["rope_scaling"] = {"rope_type": "llama3", "factor": factor, **ROPE_3}

    def _config(self) -> dict[str, Any]:
        """config.json's fields out of the entries."""
        family = self.fields.get("general.architecture")
        if family not in FAMILIES:
            near = difflib.get_close_matches(str(family), FAMILIES, n=1)
            hint = f" Nearest: {near[0]!r}." if near else ""
            raise CheckpointError(
                f"{self.path}: general.architecture is {family!r}; of GGUF files are read {', '.join(FAMILIES)}.{hint} Take"
                f" the safetensors folder that it was converted from"
            )

        def of(key: str, default: Any = ...) -> Any:
            found = self.fields.get(f"{family}.{key}", default)
            if found is ...:
                raise CheckpointError(f"{self.path} has no {family}.{key}, which a model of it needs")
            return found

        hidden, heads = of("embedding_length"), of("attention.head_count")
        head_dim = of("attention.key_length", hidden // heads)
        raw: dict[str, Any] = {
            "model_type": family, "hidden_size": hidden, "num_attention_heads": heads, "head_dim": head_dim,
            "intermediate_size": of("feed_forward_length"), "num_hidden_layers": of("block_count"),
            "num_key_value_heads": of("attention.head_count_kv", heads), "max_position_embeddings": of("context_length"),
            "rms_norm_eps": of("attention.layer_norm_rms_epsilon"), "rope_theta": of("rope.freq_base", 10000.0),
        }  # fmt: skip
        if family == "qwen2":
            del raw["head_dim"]  # it has none of its own
        if (rotated := of("rope.dimension_count", head_dim)) != head_dim:
            raise CheckpointError(
                f"{self.path}: rope turns {rotated} of {head_dim} numbers of a head; whole heads are what is read of {family}"
            )
        scaling = of("rope.scaling.type", "none")
        if scaling == "linear":
            raw["rope_scaling"] = {"rope_type": "linear", "factor": of("rope.scaling.factor")}
        elif scaling == "yarn":
            raw["rope_scaling"] = {
                "rope_type": "yarn", "factor": of("rope.scaling.factor"),
                "original_max_position_embeddings": of("rope.scaling.original_context_length"),
            }  # fmt: skip
        elif scaling != "none":
            raise CheckpointError(f"{self.path}: rope.scaling.type is {scaling!r}; read are none, linear, yarn")
        for ours, theirs in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
            if (found := self.fields.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
                raw[ours] = found
        return raw

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise CheckpointError(f"There is no tensor {name!r} in {self.path}.")
        return self._tensors[name]

    def read(self, name: str, rows: slice | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """The tensor, or `rows` of its first dim, rows in Hugging Face's order."""
        info = self.info(name)
        first, last, step = (slice(None) if rows is None else rows).indices(info.shape[0])
        if step != 1:
            raise ValueError(f"rows={rows} of {name}: only consecutive rows (step 1) are read")
        if name in self._turned:
            order = _turned_back(info.shape[0], self._turned[name])[first:last]
            near = slice(order.min(), order.max() + 1) if order.size else slice(0, 0)
            found = np.ascontiguousarray(self._read(info, near)[order - (near.start or 0)])
        else:
            found = self._read(info, slice(first, max(first, last)))
        if out is None:
            return found
        np.copyto(out, found)
        return out

    def _read(self, info: TensorInfo, rows: slice) -> np.ndarray:
        if self._descriptor is None:
            raise ValueError(f"The reader of {self.path} is closed.")
        out = np.empty((rows.stop - rows.start, *info.shape[1:]), info.dtype)
        view = out.reshape(-1).view(np.uint8).data if out.size else memoryview(b"")
        at, done = info.start + rows.start * (info.nbytes // info.shape[0]), 0
        while done < len(view):
            got = os.preadv(self._descriptor, [view[done : done + 2**30]], at + done)
            if not got:
                raise CheckpointError(f"{self.path} ended inside {info.name!r}: it became shorter since it was opened.")
            done += got
        return out

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def hugging_face_name(theirs: str) -> str:
    """'model.layers.3.self_attn.q_proj.weight' of 'blk.3.attn_q.weight'; a name that is not known as it is."""
    stem, _, last = theirs.rpartition(".")
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        return f"model.layers.{found[1]}.{NAMES[found[2]]}.{last}" if found[2] in NAMES else theirs
    return f"{NAMES[stem]}.{last}" if stem in NAMES else theirs


def _turned_back(rows: int, heads: int) -> np.ndarray:
    """Where the rows of q or k stand that llama.cpp's converter put in turns: 0 h/2 1 h/2+1 ... of each head."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _llama3_factors(config: Mapping[str, Any], factor: float) -> np.ndarray:
    """What Llama 3.1's rope divides frequencies by: 1 for short waves, `factor` for long ones, between them smoothly."""
    low, high, length = ROPE_3.values()
    H = config["head_dim"]
    wave = 2 * np.pi * config["rope_theta"] ** (np.arange(0, H, 2) / H)
    smooth = np.clip((length / wave - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


# --- blocks --------------------------------------------------------------------------------------------------------------


class Blocks:
    """How a GGUF file's packed tensors are taken apart: a `checkpoints.quantized.Method`."""

    def __init__(self, file: Gguf):
        self._kinds = file.kinds

    def owner(self, name: str, info: TensorInfo) -> str | None:
        del info
        return name if self._kinds[name].dtype is None else None

    def excepted(self, module: str) -> str | None:
        del module
        return None

    def describe(self, tensors: Tensors, name: str, outputs: int, inputs: int) -> Stored:
        kind, info = self._kinds[name], tensors.info(name)
        needed = (outputs, inputs // kind.inputs * kind.nbytes)
        if info.shape != needed or inputs % kind.inputs:
            found = [info.shape[0], info.shape[-1] // kind.nbytes * kind.inputs]
            raise CheckpointError(f"{name} is {found} in {kind.name}; the model needs {[outputs, inputs]}")
        given = TAKEN[kind.name][0]
        return Stored(name, {"blocks": name}, outputs=outputs, inputs=inputs, by_rows=True, detail=kind.name, **given)

    def read(self, tensors: Tensors, stored: Stored, rows: slice) -> Matrix:
        size = next(kind.nbytes for kind in KINDS.values() if kind.name == stored.detail)
        blocks = tensors.read(stored.tensors["blocks"], rows=rows).reshape(-1, size)
        codes, scale, zero, *units = TAKEN[stored.detail][1](blocks)
        count = rows.stop - rows.start
        return Matrix(
            codes.reshape(count, stored.inputs),
            scale.reshape(count, -1),
            None if zero is None else zero.reshape(count, -1),
            units=units[0].reshape(count, -1, units[0].shape[-1]) if units else None,
        )


IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)  # ggml's table
Block = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # codes [B, inputs], scale and zero [B, groups]
KBlock = tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]  # scales and minima as codes, and their units


def _float16(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """[B, 32 n] of [B, 16 n]: of each 16 bytes all low four bits, then all high ones."""
    raw = raw.reshape(len(raw), -1, 16)
    return np.stack([raw & 15, raw >> 4], axis=2).reshape(len(raw), -1)


def _highest(raw: np.ndarray) -> np.ndarray:
    """[B, 32] of the 32 bits in four bytes, 16 where one is set."""
    return np.unpackbits(raw, axis=1, bitorder="little") << 4


def _less(codes: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> Block:
    """scale code - offset as s (q - z); codes [B, groups, G], the others [B, groups]."""
    # a group whose scale is zero is all -offset, which is s (q - z) with one step for it
    flat = (scale == 0) & (offset != 0)
    codes[flat] = 0
    scale = np.where(flat, offset, scale)
    zero = np.divide(offset, scale, out=np.zeros_like(scale), where=scale != 0)
    return codes.reshape(len(codes), -1), scale, zero


def _q4_0(blocks: np.ndarray) -> Block:
    return _nibbles(blocks[:, 2:]), _float16(blocks[:, :2]), None


def _q4_1(blocks: np.ndarray) -> Block:
    d, m = (_float16(blocks[:, i : i + 2]).astype(np.float32) for i in (0, 2))
    return _less(_nibbles(blocks[:, 4:])[:, None], d, -m)


def _q5_0(blocks: np.ndarray) -> Block:
    codes = _nibbles(blocks[:, 6:]) | _highest(blocks[:, 2:6])
    return codes.view(np.int8) - np.int8(16), _float16(blocks[:, :2]), None


def _q5_1(blocks: np.ndarray) -> Block:
    d, m = (_float16(blocks[:, i : i + 2]).astype(np.float32) for i in (0, 2))
    return _less((_nibbles(blocks[:, 8:]) | _highest(blocks[:, 4:8]))[:, None], d, -m)


def _q8_0(blocks: np.ndarray) -> Block:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _float16(blocks[:, :2]), None


def _in_steps(codes: np.ndarray, step: np.ndarray, least: np.ndarray, units: np.ndarray) -> KBlock:
    """d step code - dmin least; codes [B, groups, G], step and least [B, groups], units [B, 2] d and dmin."""
    d, dmin = units[:, :1], units[:, 1:]
    # a group whose step is zero is all -minimum, which is held so that its codes are zero
    codes[((step == 0) | (d == 0)) & (least != 0) & (dmin != 0)] = 0
    return codes.reshape(len(codes), -1), step, least, units


def _q2_k(blocks: np.ndarray) -> KBlock:
    scales, packed = blocks[:, :16], blocks[:, 16:80].reshape(-1, 2, 1, 32)
    codes = (packed >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    return _in_steps(codes.reshape(-1, 16, 16), scales & 15, scales >> 4, _float16(blocks[:, 80:84]))


def _q3_k(blocks: np.ndarray) -> KBlock:
    highest, packed, scales = blocks[:, None, :32], blocks[:, 32:96].reshape(-1, 2, 1, 32), blocks[:, 96:108]
    low = (packed >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    high = (highest >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = low.reshape(-1, 256) | (high.reshape(-1, 256) << 2)
    # the low four bits of 16 scales are in eight bytes, their high two in four, 4 scales apart
    lows = np.concatenate([scales[:, :8] & 15, scales[:, :8] >> 4], axis=1)
    highs = np.concatenate([(scales[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    return codes, (lows | (highs << 4)).view(np.int8) - np.int8(32), None, _float16(blocks[:, 108:])


def _steps(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the scales and minima of Q4_K's and Q5_K's 8 groups."""
    # bytes 0-3 and 4-7: scales and minima of groups 0-3, and above them the high two bits of those of groups 4-7, whose
    # low four bits are in bytes 8-11
    first, second, third = (blocks[:, 4 + i : 8 + i] for i in (0, 4, 8))
    sc = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    m = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return sc, m


def _halves(raw: np.ndarray) -> np.ndarray:
    """[B, 8, 32] of 128 bytes: of each 32 of them all low four bits, then all high ones."""
    packed = raw.reshape(len(raw), 4, 32)
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(raw), 8, 32)


def _q4_k(blocks: np.ndarray) -> KBlock:
    return _in_steps(_halves(blocks[:, 16:]), *_steps(blocks), _float16(blocks[:, :4]))


def _q5_k(blocks: np.ndarray) -> KBlock:
    high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return _in_steps(_halves(blocks[:, 48:]) | (high << 4), *_steps(blocks), _float16(blocks[:, :4]))


def _q6_k(blocks: np.ndarray) -> KBlock:
    low, high = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 32)
    step = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    # of each half: 64 bytes hold the low bits of inputs 0-63 and, above, of 64-127; 32 bytes the high bits, 32 at a time
    lows = np.concatenate([low & 15, low >> 4], axis=2)
    highs = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=2)
    return (lows | (highs << 4)).reshape(-1, 256), step, None, _float16(blocks[:, 208:])


def _iq4_nl(blocks: np.ndarray) -> Block:
    return IQ4[_nibbles(blocks[:, 2:])], _float16(blocks[:, :2]), None


def _iq4_xs(blocks: np.ndarray) -> Block:
    d, high = _float16(blocks[:, :2]).astype(np.float32), np.ascontiguousarray(blocks[:, 2:4]).view("<u2")
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    highs = (high >> np.arange(0, 16, 2, dtype=np.uint16)) & np.uint16(3)
    scale = (low + 16 * highs).astype(np.float32) - 32
    return IQ4[_nibbles(blocks[:, 8:])], d * scale, None


def _mxfp4(blocks: np.ndarray) -> Block:
    return _nibbles(blocks[:, 1:]), blocks[:, :1], None


# of each packed type: what it is held as (`Stored`), and how blocks are taken apart
TAKEN: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], Block | KBlock]]] = {
    "Q4_0": ({"kind": "int4", "group": 32, "scale": "float16"}, _q4_0),
    "Q4_1": ({"kind": "int4", "group": 32, "affine": True}, _q4_1),
    # as bytes, which every kernel reads: it stands in for Q4_K and Q5_K in small models, whose inputs 256 does not divide.
    # int5 would hold it in its own 5.5 bits, but is read by XLA alone: a row takes five times as long on a CPU (1.4 ms of int8
    # and 7.4 of int5, `bench_quant.py --rows 1 --group-size 32 --shape 4096x4096`)
    "Q5_0": ({"kind": "int8", "group": 32, "scale": "float16"}, _q5_0),
    "Q5_1": ({"kind": "int5", "group": 32, "affine": True}, _q5_1),
    "Q8_0": ({"kind": "int8", "group": 32, "scale": "float16"}, _q8_0),
    "Q2_K": ({"kind": "kquant2", "group": 16, "affine": True}, _q2_k),
    "Q3_K": ({"kind": "kquant3", "group": 16}, _q3_k),
    "Q4_K": ({"kind": "kquant4", "group": 32, "affine": True}, _q4_k),
    "Q5_K": ({"kind": "kquant5", "group": 32, "affine": True}, _q5_k),
    "Q6_K": ({"kind": "kquant6", "group": 16}, _q6_k),
    "IQ4_NL": ({"kind": "int8", "group": 32, "scale": "float16"}, _iq4_nl),
    "IQ4_XS": ({"kind": "int8", "group": 32}, _iq4_xs),
    "MXFP4": ({"kind": "mxfp4", "group": 32}, _mxfp4),
}
