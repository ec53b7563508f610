"""How a format rounds, one run of inputs at a time: what GPTQ asks column by column, and AWQ for whole matrices.

    w ~ s (q - z)        q = 0 .. 2^bits - 1

Steps and zeros are chosen by the formats' own rule, for the run as it stands when its turn comes. Zeros are whole
numbers in every format (int3 and int2 would have finer ones), because that is what pack-quantized files hold.

O outputs, I inputs, G group size, NG groups of a row.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxengine import formats
from jaxengine.weights import _grouped
from jaxengine.weights._codebook import group_of

FORMATS = ("int8", "int4", "int3", "int2")


@dataclasses.dataclass(frozen=True)
class Grid:
    """A format for rows of `inputs`. group: inputs that share a step; affine: it has zeros beside them."""

    format: str
    inputs: int
    bits: int
    group: int
    affine: bool
    ordered: bool
    scale: str

    @classmethod
    def of(cls, text: str, inputs: int) -> Grid:
        """The grid of a format as a plan names it; ValueError for one whose codes are no integers, and for groups that do
        not divide the inputs."""
        fmt = formats.find(text)
        if fmt.name not in FORMATS:
            raise ValueError(
                f"weights={text!r}: codes are chosen of integer formats: {', '.join(FORMATS)}. Others are rounded to nearest"
                f" when a model is loaded: jaxengine.load(folder, weights={text!r})"
            )
        if dict(fmt.options).get("outliers"):
            raise ValueError(
                f"weights={text!r}: pack-quantized files have no place for columns kept beside the codes: leave outliers out,"
                f" or load with it, rounded to nearest: jaxengine.load(folder, weights={text!r})"
            )
        # what the format itself refuses, before anything is written
        jax.eval_shape(lambda w: fmt.encode(w, out=1), jax.ShapeDtypeStruct((1, inputs), jnp.float32))
        chosen = {n: p.default for n, p in inspect.signature(fmt.module.encode).parameters.items()} | dict(fmt.options)
        size = chosen["group_size"]
        group = group_of(inputs, size) if size else inputs
        if inputs > group and inputs % group:
            near = [g for g in fmt.module.OPTIONS["group_size"] if g and inputs % g == 0]
            would = f"group_size={max(near)} does" if near else "no group size of the format does"
            raise ValueError(
                f"weights={text!r}: a row of {inputs} inputs is not whole groups of {group}, which pack-quantized files"
                f" hold alone: {would}"
            )
        return cls(
            text, inputs, int(fmt.name[3:]), group, chosen.get("affine", False), bool(chosen.get("act_order")),
            chosen.get("scale", "float32"),
        )  # fmt: skip

    @property
    def whole(self) -> bool:
        """Whether a row has one step, told without groups (int8)."""
        return dict(formats.find(self.format).options).get("group_size", 0) == 0 and self.bits == 8

    def steps(self, run: Float[Array, "O G"]) -> tuple[Float[Array, "O"], Float[Array, "O"]]:
        """(s, z) of the inputs that share them, as they are stored, in float32."""
        if self.whole:
            s = formats.find(self.format).encode(run, out=1).scale
            return s, jnp.full_like(s, 128.0)
        made = _grouped.encode(
            run, out=1, bits=self.bits, group_size=self.group, scale=self.scale, grid=1.0 if self.affine else None
        )
        s = made.scale[:, 0].astype(jnp.float32)
        middle = jnp.full_like(s, 2.0 ** (self.bits - 1))
        return s, middle if made.zero is None else made.zero[:, 0].astype(jnp.float32)

    def codes(self, w: Array, s: Array, z: Array) -> Array:
        """The nearest codes, as float32."""
        return jnp.clip(jnp.round(w / s + z), 0, 2**self.bits - 1)

    def held(self, codes: Array, s: Float[Array, "O NG"], z: Float[Array, "O NG"]) -> Float[Array, "O I"]:
        """What codes stand for."""
        each = -(-self.inputs // s.shape[1])
        spread = lambda a: jnp.repeat(a, each, axis=1)[:, : self.inputs]  # noqa: E731
        return spread(s) * (codes.astype(jnp.float32) - spread(z))

    def joined(self, matrices: Sequence[Array]) -> Float[Array, "O I"]:
        """The rows of matrices that read the same inputs, one after the other."""
        return jnp.concatenate([w.reshape(-1, self.inputs).astype(jnp.float32) for w in matrices])

    def apart(self, rows: Any, matrices: Sequence[Any]) -> list[Any]:
        """The rows of each of these matrices, of all of them; what there is of a row may be of another length."""
        ends = list(itertools.accumulate(w.size // self.inputs for w in matrices))
        return [rows[a:b] for a, b in zip([0, *ends], ends, strict=False)]
