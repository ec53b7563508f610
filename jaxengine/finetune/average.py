"""The average of what is trained, over its last steps: an exponential moving average (EMA) of decay d.

    mean_t = sum_i d^(t - i) theta_i / sum_i d^(t - i),    i = 1 .. t

over about the last 1 / (1 - d) steps, and over all of a run that is shorter (Polyak & Juditsky, SIAM J. Control Optim. 30,
1992; without the bias to where it began, as Adam's moments are: Kingma & Ba, arXiv:1412.6980, section 3). What it is kept as is
the average itself at every step,

    mean_t = mean_(t-1) + (1 - d) / (1 - d^t) (theta_t - mean_(t-1)),    mean_0 = 0

so that it can stand where the parameters do without another copy. It is the last part of an optimizer's state: it lives, is
split over devices, changed and saved as moments are, layer by layer where they come so, and is counted with them. It costs
4 bytes for each trained number.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


class Average(NamedTuple):
    """count: steps that it is over; mean: it, as what is trained."""

    count: Int[Array, "*L"]
    mean: Any


def averaging(decay: float) -> optax.GradientTransformation:
    """It changes no update: it is the last of a chain, where updates are what is added to the parameters."""

    def init(params: Any) -> Average:
        return Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Average, params: Any = None) -> tuple[Any, Average]:
        count = state.count + 1
        share = (1 - decay) / -jnp.expm1(math.log(decay) * count.astype(jnp.float32))
        new = optax.apply_updates(params, updates)
        return updates, Average(count, jax.tree.map(lambda mean, x: mean + share * (x - mean), state.mean, new))

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def exchanged(trained: Any, optimizer: Any) -> tuple[Any, Any]:
    """What is trained and an optimizer's state, with the averages there and what they are of in each other's places, which
    takes no more of any device: an array whose average lives elsewhere goes there before that comes, so that host memory holds
    one of them more meanwhile. Twice is as before. What was given is used up."""
    states, structure = jax.tree.flatten(optimizer, is_leaf=_is_average)
    where = [i for i, x in enumerate(states) if _is_average(x)]
    live, tree = jax.tree.flatten(trained)
    # an optimizer's states are laid out as what they are of, so that both come in the same order
    means, of = jax.tree.flatten([states[i].mean for i in where])
    pairs = [_exchanged(x, mean) for x, mean in zip(live, means, strict=True)]
    for i, mean in zip(where, of.unflatten([x for x, _ in pairs]), strict=True):
        states[i] = states[i]._replace(mean=mean)
    return tree.unflatten([mean for _, mean in pairs]), structure.unflatten(states)


def _is_average(x: Any) -> bool:
    return isinstance(x, Average)


def _exchanged(x: Array, mean: Array) -> tuple[Array, Array]:
    """(x where its mean stands, the mean where x stands)."""
    here, there = x.sharding, mean.sharding
    if here.memory_kind == there.memory_kind and here.is_equivalent_to(there, x.ndim):
        return x, mean
    gone = jax.device_put(x, there, may_alias=False).block_until_ready()
    x.delete()
    come = jax.device_put(mean, here, may_alias=False).block_until_ready()
    mean.delete()
    return gone, come
