"""One step of fine-tuning, as a pure function: (frozen parameters, state, batch) -> state.

A batch is [A, B, T]: A parts of B rows, whose gradients are added before the parameters change. The loss is the mean over
all weighted tokens of the A parts, so that how they are divided makes no difference. What is trained is float32; the
arithmetic is in the engine's dtype.

A accumulated parts, B batch, T tokens, D model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxengine.cache.base import PlainAttend
from jaxengine.engine import Engine, embed, gathers, head, program
from jaxengine.finetune import tiles
from jaxengine.finetune.loss import cross_entropy
from jaxengine.finetune.optimizers.base import Matrix, Optimizer
from jaxengine.finetune.trained.base import trained as find_trained
from jaxengine.walk import REMAT, lay_out, walk
from jaxengine.weights.base import Weight
from sharding.rules import constrain

LOGITS = 2**28  # bytes of float32 logits that stand at a time, where the user does not say how many tokens


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What a step is compiled for, apart from shapes.

    train: what is trained, a file of trained/, with its options. remat: what is kept of a layer for its way back
    (walk.REMAT). clip: the largest global norm of a gradient (0: any). loss_chunk: tokens of each row whose logits stand at
    a time (0: as many as fit 256 MB). tile: tokens of each row that a layer's feed-forward block takes at a time (0: all;
    tiles.py).
    """

    engine: Engine
    train: str = "lora"
    options: Hashable = None
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    remat: str = "full"
    clip: float = 1.0
    loss_chunk: int = 0
    tile: int = 0

    def __post_init__(self) -> None:
        find_trained(self.train)
        if self.remat not in REMAT:
            raise ValueError(f"remat is {self.remat!r}; it can be {', '.join(REMAT)}")
        if self.clip < 0:
            raise ValueError(f"clip is {self.clip}; it is the largest norm of a gradient, or 0 for any")
        tiles.check(self.tile, self.remat)

    @property
    def mesh(self) -> Any:
        """Of the engine; a Program asks for it."""
        return self.engine.mesh

    def chunk(self, batch: int, tokens: int) -> int:
        """Tokens of each row whose logits stand at a time."""
        if self.loss_chunk:
            return min(self.loss_chunk, tokens)
        return max(1, min(tokens, LOGITS // (4 * batch * self.engine.architecture.config.vocab_size)))

    def optax(self) -> optax.GradientTransformation:
        """The optimizer's transformation over the trained tree."""
        return self.optimizer.make(self._decayed, self._matrices)

    def _decayed(self, tree: Any) -> Any:
        """Which leaves weight decay acts on: not vectors, and nothing that stays as it is."""
        specs, frozen = self.engine.architecture.specs(), find_trained(self.train).FROZEN
        vectors = {n.rpartition(".")[2] for n, s in specs.items() if s.out is None}

        def of(path: Any, leaf: Any) -> bool:
            del leaf
            names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
            return names[-1] not in frozen and not vectors & set(names)

        return jax.tree_util.tree_map_with_path(of, tree)

    def _matrices(self, tree: Any) -> Any:
        """How each leaf is a matrix or vector inside a layer, or one that stands beside it (a [r, in...], b [out..., r], DoRA's
        numbers [out...]); None of what is outside the layers, embedding and head too."""
        specs = {
            n.rpartition(".")[2]: s for n, s in self.engine.architecture.specs().items() if n.startswith("layers.")
        }

        def of(path: Any, leaf: Any) -> Matrix | None:
            names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
            spec = next((specs[n] for n in names if n in specs), None)
            if spec is None or "outer" in names:
                return None
            dims, outs = len(spec.shape), spec.out or 0
            beside = {"a": (1 + dims - outs, 1), "b": (outs + 1, outs), "magnitude": (outs, 0), "square": (outs, 0)}
            own = beside.get(names[-1], (dims, outs))
            return Matrix(leaf.ndim - own[0], own[1])

        return jax.tree_util.tree_map_with_path(of, tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step changes. step: the number of steps made."""

    trained: Any
    optimizer: Any
    step: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows. targets: each token's next one; weights: of the targets in the loss; positions: of each token in its
    document, -1 for padding; segments: which document it is of."""

    tokens: Int[Array, "*A B T"]
    targets: Int[Array, "*A B T"]
    weights: Float[Array, "*A B T"]
    positions: Int[Array, "*A B T"]
    segments: Int[Array, "*A B T"]


def loss_sum(tuning: Tuning, params: Any, trained: Any, batch: Batch, *, differentiate: bool = True) -> Array:
    """The weighted sum of the losses of one part's tokens, nats."""
    engine = tuning.engine
    whole = find_trained(tuning.train).combine(tuning.options, params, trained)
    attend = PlainAttend(batch.positions, batch.segments)
    x = embed(engine, whole, batch.tokens, attend)
    nothing = lay_out(whole["banks"], lambda kind: ())
    held = jax.tree.leaves(params["banks"], is_leaf=lambda w: isinstance(w, Weight))
    plain = [a for a in held if not isinstance(a, Weight) and a.ndim > 1]  # matrices in no format
    wider = any(jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize > x.dtype.itemsize for a in plain)
    how = {"remat": tuning.remat, "gathers": gathers(engine), "in_turn": wider and tuning.train != "all"}
    x, _ = walk(tiles.body(engine, attend, tuning.tile), x, whole["banks"], nothing, **how)
    outer = whole["outer"]
    read = {n: outer[n] for n in trained["outer"] if n in head_names(outer)}
    if not read and gathers(engine):
        outer, x = _together(engine, outer, x)

    def logits(of_head: Any, x: Array) -> Array:
        return head(engine, {"outer": outer | of_head}, x)

    B, T = batch.tokens.shape
    return cross_entropy(
        logits, read, x, batch.targets, batch.weights, chunk=tuning.chunk(B, T), differentiate=differentiate
    )


def _together(engine: Engine, outer: Any, x: Array) -> tuple[Any, Array]:
    """What the head reads of frozen parameters, brought together once (fsdp), after x is there: not in each piece of the loss."""
    rules, specs = engine.rules.override(("embed", None), ("latent", None)), engine.architecture.outer()[1]
    plain = {n: outer[n] for n in head_names(outer) if isinstance(outer[n], jax.Array)}
    plain, x = lax.optimization_barrier((plain, x))
    whole = {n: constrain(w, rules, engine.mesh, specs[n].axes) for n, w in plain.items()}
    return outer | whole, x


def head_names(outer: Any) -> tuple[str, ...]:
    """What the head reads of the parameters outside the layers."""
    return tuple(n for n in outer if not n.endswith("positions") and not (n == "embedding" and "lm_head" in outer))


def gradients(tuning: Tuning, params: Any, trained: Any, batch: Batch) -> tuple[Array, Any]:
    """The mean loss over all parts' weighted tokens, and its gradient with respect to what is trained, float32."""
    total = jnp.maximum(batch.weights.sum(), 1)
    add = functools.partial(jax.tree.map, jnp.add)
    one = jax.value_and_grad(functools.partial(loss_sum, tuning, params))

    def part(carry: Any, batch: Batch) -> Any:
        value, gradient = one(trained, batch)
        return (carry[0] + value, add(carry[1], gradient)), None

    if batch.tokens.shape[0] == 1:
        loss, gradient = one(trained, jax.tree.map(lambda x: x[0], batch))
    else:
        start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
        (loss, gradient), _ = lax.scan(part, start, batch)
    return loss / total, jax.tree.map(lambda g: g / total, gradient)


@program(0, donate=(2,))
def step(tuning: Tuning, params: Any, state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
    """One step; gives the new state, and the loss before it (nats a token), the gradient's norm, the tokens that counted."""
    loss, gradient = gradients(tuning, params, state.trained, batch)
    norm = optax.tree.norm(gradient)
    if tuning.clip:
        gradient = jax.tree.map(lambda g: g * jnp.minimum(1, tuning.clip / (norm + 1e-6)), gradient)
    updates, optimizer = tuning.optax().update(gradient, state.optimizer, state.trained)
    new = State(optax.apply_updates(state.trained, updates), optimizer, state.step + 1)
    rate = tuning.optimizer.rate()(state.step)
    measured = {"loss": loss, "gradient_norm": norm, "tokens": batch.weights.sum(), "learning_rate": jnp.asarray(rate)}
    return new, measured


@program(0)
def evaluate(tuning: Tuning, params: Any, trained: Any, batch: Batch) -> tuple[Array, Array]:
    """(sum of losses, sum of weights) of a batch [B, T], to be added up over a held-out set."""
    return loss_sum(tuning, params, trained, batch, differentiate=False), batch.weights.sum()


@program(0)
def begin(tuning: Tuning, trained: Any) -> State:
    """The state before the first step."""
    return State(trained, tuning.optax().init(trained), jnp.int32(0))
