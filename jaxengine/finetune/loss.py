"""Cross-entropy that never holds [tokens, vocab].

    loss = sum_t w_t (logsumexp(z_t) - z_t[y_t])          z_t = head(x_t)

Logits are made for some tokens of each row at a time, and with them the gradient of the loss with respect to those tokens'
x and to the head's own parameters, in the same turn (as in Wijmans et al., arXiv:2411.09009, and Hsu et al.,
arXiv:2410.10989): the backward pass finds them made and makes no logits again. What is kept is [B, T, D].

B batch, T tokens, D model, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def cross_entropy(
    head: Callable[[Any, Array], Array],
    trained: Any,
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
    differentiate: bool = True,
) -> Float[Array, ""]:
    """The weighted sum of the tokens' losses in nats, float32.

    head(trained, x [B, C, D]) -> float32 logits [B, C, V]; gradients go to x and to `trained` (a tree; () where the head
    is frozen). chunk: tokens of each row whose logits stand at a time. differentiate: False where no gradient is asked
    for, which spares making it.
    """
    B, T, _ = x.shape
    chunk = min(chunk, T)
    pad = -T % chunk
    if pad:
        x, targets, weights = (jnp.pad(a, ((0, 0), (0, pad), *((0, 0),) * (a.ndim - 2))) for a in (x, targets, weights))
    pieces = (T + pad) // chunk

    def split(a: Array) -> Array:
        return a.reshape(B, pieces, chunk, *a.shape[2:]).swapaxes(0, 1)

    def some(trained: Any, x: Array, targets: Array, weights: Array) -> Array:
        logits = head(trained, x)
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return (weights * (jax.nn.logsumexp(logits, axis=-1) - own)).sum()

    held = lax.stop_gradient((trained, x))
    rows = (split(held[1]), split(targets), split(weights))
    if not differentiate:
        return lax.scan(lambda total, r: (total + some(held[0], *r), None), jnp.float32(0), rows)[0]

    def turn(carry: Any, row: Any) -> Any:
        total, gathered = carry
        value, (of_head, of_x) = jax.value_and_grad(some, (0, 1))(held[0], *row)
        return (total + value, jax.tree.map(jnp.add, gathered, of_head)), of_x

    start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, held[0]))
    (total, of_head), of_x = lax.scan(turn, start, rows)
    of_x = of_x.swapaxes(0, 1).reshape(x.shape)
    return _with_gradients(total, (trained, x), (of_head, of_x))


@jax.custom_vjp
def _with_gradients(value: Array, arguments: Any, gradients: Any) -> Array:
    """value, whose gradient with respect to `arguments` is `gradients`, made already."""
    del arguments, gradients
    return value


def _forward(value: Array, arguments: Any, gradients: Any) -> tuple[Array, Any]:
    del arguments
    return value, gradients


def _backward(gradients: Any, g: Array) -> Any:
    scaled = jax.tree.map(lambda a: (g * a.astype(jnp.float32)).astype(a.dtype), gradients)
    return jnp.zeros_like(g), scaled, jax.tree.map(jnp.zeros_like, gradients)


_with_gradients.defvjp(_forward, _backward)
