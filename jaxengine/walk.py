"""The one loop over layers, wherever they live.

    carry, states <- body(kind, weights, carry, state)          for each layer, in order

`body` knows neither the home nor the form. States (a layer's KV cache) are laid out as the bank's weights are: a tuple
of one state for each layer where the bank is unrolled, a tuple of one stacked state for each kind where it is scanned.
A scanned bank carries its stacked states through the loop and writes each layer's back in place: as scanned inputs and
outputs they would stand twice.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxengine.homes.base import Bank, home
from jaxengine.weights.base import CONTRACTED

Body = Callable[[Hashable, Any, Any, Any], tuple[Any, Any]]

ENTERING = "entering"  # the name of what comes into a layer, for policies

# What is kept of a layer for its way back, apart from what comes into it. The weights of a streamed layer never are: they
# are fetched again.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,  # everything; of layers on the device alone
    "full": jax.checkpoint_policies.nothing_saveable,  # nothing: the layer is run again
    "dots": jax.checkpoint_policies.save_only_these_names(CONTRACTED),  # what matrices gave
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # nothing, and what comes in goes to the host
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[ENTERING],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def walk(
    body: Body, carry: Any, banks: Sequence[Bank], states: Sequence[Any], *, remat: str = "none"
) -> tuple[Any, tuple[Any, ...]]:
    """Run `body` through all layers of the banks; gives the last carry and the new states, laid out as `states`.

    remat: where a gradient is taken, what is kept of each layer for it (REMAT). A streamed layer is run again whatever
    is said, and with 'none' as with 'full'.
    """
    done = []
    for bank, bank_states in zip(banks, states, strict=True):
        if bank.outside:
            raise ValueError(
                f"Layers of home {bank.home!r}, form 'python', are brought from outside of a compiled program: use"
                f" jaxengine.outside, or Model.logits and Model.generate"
            )
        loop = {"unrolled": _unrolled, "scan": _scanned, "ahead": _ahead}[bank.form]
        carry, new = loop(body, carry, bank, bank_states, remat)
        done.append(new)
    return carry, tuple(done)


def drive(run: Body, carry: Any, banks: Sequence[Bank], states: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """`walk` from outside of a compiled program, over banks of the form 'python'; `run` is a program of one layer.

    A layer's weights are brought while the one before it is computed. Programs are started without waiting for them, so
    that without the wait here the copies would run ahead until all layers stood on the device.
    """
    coming = itertools.chain.from_iterable(home(bank.home).stream(bank) for bank in banks)
    done, ahead, before = [], next(coming, None), carry
    for bank, bank_states in zip(banks, states, strict=True):
        new = []
        for kind, state in zip(bank.kinds * bank.repeats, bank_states, strict=True):
            weights, ahead = ahead, None
            carry, state = run(kind, weights, carry, state)
            del weights
            new.append(state)
            jax.block_until_ready(before)
            before, ahead = carry, next(coming, None)
        done.append(tuple(new))
    return carry, tuple(done)


def _unrolled(body: Body, carry: Any, bank: Bank, states: Any, remat: str) -> tuple[Any, Any]:
    fetch, streamed = home(bank.home).fetch, home(bank.home).TIER != "device"
    new = []
    for kind, weights, state in zip(bank.kinds * bank.repeats, bank.weights, states, strict=True):
        layer = functools.partial(_fetched, body, fetch, kind)
        if streamed:
            weights, carry = lax.optimization_barrier((weights, carry))  # or all copies start with the program
        if (policy := _policy(remat, streamed)) is not None:
            layer = jax.checkpoint(layer, policy=policy)
        carry, state = layer(weights, carry, state)
        new.append(state)
    return carry, tuple(new)


def _fetched(body: Body, fetch: Any, kind: Hashable, weights: Any, carry: Any, state: Any) -> tuple[Any, Any]:
    return body(kind, fetch(weights), _entering(carry), state)


def _entering(carry: Any) -> Any:
    return jax.tree.map(lambda x: checkpoint_name(x, ENTERING), carry)


def _policy(remat: str, streamed: bool) -> Callable[..., Any] | None:
    """Of what is kept of a layer; None: everything."""
    return REMAT["full" if streamed and remat == "none" else remat]


def _scanned(body: Body, carry: Any, bank: Bank, states: Any, remat: str) -> tuple[Any, Any]:
    fetch, last = home(bank.home).fetch, len(bank.kinds) - 1

    def period(loop: Any, slices: Any) -> tuple[Any, None]:
        i, carry, states = loop
        carry = _entering(carry)
        here, new = fetch(slices[0]), []
        for j, (kind, stack) in enumerate(zip(bank.kinds, states, strict=True)):
            ahead = None
            if j < last:
                ahead, carry = _ordered(fetch, bank.weights[j + 1], i, slices[j + 1], carry)
            carry, state = body(kind, here, carry, _at(stack, i))
            new.append(_put(stack, state, i))
            here = ahead
        return (i + 1, carry, tuple(new)), None

    # backwards each streamed layer is fetched again; kept, all of them would stand on the device
    if (policy := _policy(remat, home(bank.home).TIER != "device")) is not None:
        period = jax.checkpoint(period, policy=policy, prevent_cse=False)  # a scan is its own barrier
    (_, carry, states), _ = lax.scan(period, (jnp.int32(0), carry, states), bank.weights, length=bank.repeats)
    return carry, states


def _ahead(body: Body, carry: Any, bank: Bank, states: Any, remat: str) -> tuple[Any, Any]:
    """Each layer is fetched while the one before it is computed, over the border of a period too.

    The stacks have one layer less than there are turns, and that layer stands alone: the first kind's first, which is
    fetched before the loop, and the other kinds' last, which are used after it. All slices in the loop are therefore at
    the loop's own index, which is what makes DMA copies of them.
    """
    if remat != "none":
        raise ValueError(
            f"form 'ahead' keeps all that it fetched for the way back, and remat is {remat!r}: use form='scan'"
        )
    fetch, last = home(bank.home).fetch, len(bank.kinds) - 1
    ones, rests = tuple(w["one"] for w in bank.weights), tuple(w["rest"] for w in bank.weights)

    def period(loop: Any, slices: Any) -> tuple[Any, None]:
        i, carry, here, states = loop
        new = []
        for j, (kind, stack) in enumerate(zip(bank.kinds, states, strict=True)):
            following = (j + 1) % len(bank.kinds)
            if last:
                ahead, carry = _ordered(fetch, rests[following], i, slices[following], carry)
            else:
                ahead = fetch(slices[0])
            carry, state = body(kind, here, carry, _at(stack, i))
            new.append(_put(stack, state, i))
            here = ahead
        return (i + 1, carry, here, tuple(new)), None

    loop = (jnp.int32(0), carry, fetch(ones[0]), states)
    (_, carry, here, states), _ = lax.scan(period, loop, rests, length=bank.repeats - 1)
    new = []
    for j, (kind, stack) in enumerate(zip(bank.kinds, states, strict=True)):
        ahead = None
        if j < last:
            one, carry = lax.optimization_barrier((ones[j + 1], carry))
            ahead = fetch(one)
        carry, state = body(kind, here, carry, _at(stack, bank.repeats - 1))
        new.append(_put(stack, state, bank.repeats - 1))
        here = ahead
    return carry, tuple(new)


def _ordered(fetch: Any, stacks: Any, i: Any, slices: Any, carry: Any) -> tuple[Any, Any]:
    """stacks[i] fetched, and not before `carry` is there: without an order XLA starts all copies of a period at once and
    holds the whole period. The order is on the stack: on its slice it would not bind (AOT: 3.0 layers of a period of 3,
    in place of 2.0). Gradients go to `slices`, the scan's own view of stacks[i]."""
    stacked, carry = lax.optimization_barrier((lax.stop_gradient(stacks), carry))
    return jax.tree.map(_with_gradient_of, fetch(_at(stacked, i)), fetch(slices)), carry


def _put(stacks: Any, layer: Any, i: Any) -> Any:
    return jax.tree.map(lambda s, x: lax.dynamic_update_index_in_dim(s, x, i, 0), stacks, layer)


def _at(stacks: Any, i: Any) -> Any:
    return jax.tree.map(lambda s: lax.dynamic_index_in_dim(s, i, keepdims=False), stacks)


@jax.custom_vjp
def _with_gradient_of(value: jax.Array, slice_: jax.Array) -> jax.Array:
    """value; its gradient goes to slice_, the same numbers as the scan gives them: they stack their gradients where the
    weights are, while jax's rule for a slice of a stack makes a stack of zeros on the device at every turn."""
    del slice_
    return value


_with_gradient_of.defvjp(lambda value, slice_: (value, None), lambda _, g: (None, g))


def lay_out(banks: Sequence[Bank], make: Callable[[Hashable], Any]) -> tuple[Any, ...]:
    """States for `walk`: make(kind) for each layer, stacked where the bank is scanned."""

    def of(bank: Bank) -> tuple[Any, ...]:
        if not bank.stacked:
            return tuple(make(kind) for kind in bank.kinds * bank.repeats)
        return tuple(
            jax.tree.map(lambda x: jnp.broadcast_to(x[None], (bank.repeats, *x.shape)), make(kind))
            for kind in bank.kinds
        )

    return tuple(of(bank) for bank in banks)
