"""The one loop over layers, wherever they live.

    carry, states <- body(kind, weights, carry, state)          for each layer, in order

`body` knows neither the home nor the form. States (a layer's KV cache) are laid out as the bank's weights are: a tuple
of one state for each layer where the bank is unrolled, a tuple of one stacked state for each kind where it is scanned.
A scanned bank carries its stacked states through the loop and writes each layer's back in place: as scanned inputs and
outputs they would stand twice.

A body that uses traced values besides its arguments (where tokens stand) has them as its leaves: jax.tree_util.Partial(
function, *values).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jaxengine.homes.base import Bank, home
from jaxengine.weights.base import CONTRACTED
from pallas_kernels.attention.reference import ATTENDED

Body = Callable[[Hashable, Any, Any, Any], tuple[Any, Any]]

ENTERING = "entering"  # the name of what comes into a layer, for policies

# What is kept of a layer for its way back, apart from what comes into it. The weights of a streamed layer never are: they
# are fetched again.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,  # everything; of layers on the device alone; in a scan what is in _KEPT_BY_A_SCAN
    "full": jax.checkpoint_policies.nothing_saveable,  # nothing: the layer is run again
    "dots": jax.checkpoint_policies.save_only_these_names(CONTRACTED),  # what matrices gave
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # nothing, and what comes in goes to the host
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[ENTERING],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}

# What matrices and attention gave: the rest is cheap to make, and XLA writes all that a loop keeps, where outside of a loop it
# makes the same again inside of what takes it.
_KEPT_BY_A_SCAN = jax.checkpoint_policies.save_only_these_names(CONTRACTED, ATTENDED)


def walk(
    body: Body,
    carry: Any,
    banks: Sequence[Bank],
    states: Sequence[Any],
    *,
    remat: str = "none",
    gathers: bool = False,
    in_turn: bool = False,
) -> tuple[Any, tuple[Any, ...]]:
    """Run `body` through all layers of the banks; gives the last carry and the new states, laid out as `states`.

    remat: where a gradient is taken, what is kept of each layer for it (REMAT). A streamed layer is run again whatever
    is said, and with 'none' as with 'full'. gathers: layers are split over devices and brought together to be used (fsdp):
    resident ones in turn, each while the one before it is computed, so that two are whole at a time. (XLA brings them
    together as early as it can, and before a loop if they do not change in it: all of them would be whole.) in_turn: resident
    layers that are written out are used no earlier than what comes into them is there. (XLA would else narrow the matrices of
    all layers, where arithmetic is narrower than they are, before the first is used.)
    """
    done = []
    for bank, bank_states in zip(banks, states, strict=True):
        if bank.outside:
            raise ValueError(
                f"Layers of home {bank.home!r}, form 'python', are brought from outside of a compiled program: use"
                f" jaxengine.outside, or Model.logits and Model.generate"
            )
        loop = {"unrolled": _unrolled, "scan": _scanned, "ahead": _ahead}[bank.form]
        if gathers and loop is _unrolled:
            loop = _gathered
        elif (
            loop is _unrolled and home(bank.home).TIER == "device" and remat in ("full", "offload")
            and any(b.form == "ahead" for b in banks)
        ):  # fmt: skip
            loop = _written_out
        elif in_turn and loop is _unrolled:
            loop = functools.partial(_unrolled, in_turn=True)
        carry, new = loop(body, carry, bank, bank_states, remat)
        done.append(new)
    return carry, tuple(done)


def drive(run: Body, carry: Any, banks: Sequence[Bank], states: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """`walk` from outside of a compiled program, over banks of the form 'python'; `run` is a program of one layer.

    A layer's weights are brought while the one before it is computed. Programs are started without waiting for them, so
    that without the wait here the copies would run ahead until all layers stood on the device.
    """
    coming = itertools.chain.from_iterable(home(bank.home).stream(bank) for bank in banks)

    def bring() -> Any:
        with jax.profiler.TraceAnnotation("fetch"):
            return next(coming, None)

    done, ahead, before = [], bring(), carry
    for bank, bank_states in zip(banks, states, strict=True):
        new = []
        for kind, state in zip(bank.kinds * bank.repeats, bank_states, strict=True):
            weights, ahead = ahead, None
            with jax.profiler.TraceAnnotation("layer"):
                carry, state = run(kind, weights, carry, state)
            del weights
            new.append(state)
            jax.block_until_ready(before)
            before, ahead = carry, bring()
        done.append(tuple(new))
    return carry, tuple(done)


def _unrolled(body: Body, carry: Any, bank: Bank, states: Any, remat: str, *, in_turn: bool = False) -> tuple[Any, Any]:
    fetch, streamed = home(bank.home).fetch, home(bank.home).TIER != "device"
    new = []
    for kind, weights, state in zip(bank.kinds * bank.repeats, bank.weights, states, strict=True):
        bring = fetch
        if streamed or in_turn:
            # or all copies start with the program; gradients go to the weights themselves, not through the barrier
            held, carry = lax.optimization_barrier((lax.stop_gradient(weights), carry))
            bring = functools.partial(_brought, fetch, held)
        layer = functools.partial(_fetched, body, bring, kind)
        if (policy := _policy(remat, streamed)) is not None:
            layer = jax.checkpoint(layer, policy=policy)
        carry, state = layer(weights, carry, state)
        new.append(state)
    return carry, tuple(new)


def _gathered(body: Body, carry: Any, bank: Bank, states: Any, remat: str) -> tuple[Any, Any]:
    """As `_unrolled`, and a layer's weights are there no earlier than what comes into the one before it."""
    if home(bank.home).TIER != "device":  # each is brought in its turn, and brought together then
        return _unrolled(body, carry, bank, states, remat)
    new: list[Any] = []
    weights, carry = lax.optimization_barrier((bank.weights[0], carry))
    for i, (kind, state) in enumerate(zip(bank.kinds * bank.repeats, states, strict=True)):
        ahead = None
        if i + 1 < len(bank.weights):
            ahead, carry = lax.optimization_barrier((bank.weights[i + 1], carry))
        layer = functools.partial(_one, body, kind)
        if (policy := _policy(remat, streamed=False)) is not None:
            layer = jax.checkpoint(layer, policy=policy)
        carry, state = layer(weights, _entering(carry), state)
        new.append(state)
        weights = ahead
    return carry, tuple(new)


def _one(body: Body, kind: Hashable, weights: Any, carry: Any, state: Any) -> tuple[Any, Any]:
    """One layer, under its name in a profile; what a streamed home brings is 'fetch' there."""
    with jax.named_scope("layer"):
        return body(kind, weights, carry, state)


def _fetched(body: Body, fetch: Any, kind: Hashable, weights: Any, carry: Any, state: Any) -> tuple[Any, Any]:
    return _one(body, kind, fetch(weights), _entering(carry), state)


def _brought(fetch: Any, held: Any, weights: Any) -> Any:
    """`held`, which are the weights in their order, fetched; gradients go to the weights."""
    return jax.tree.map(_with_gradient_of, fetch(held), fetch(weights))


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
            carry, state = _one(body, kind, here, carry, _at(stack, i))
            new.append(_put(stack, state, i))
            here = ahead
        return (i + 1, carry, tuple(new)), None

    streamed = home(bank.home).TIER != "device"
    if streamed and last and remat != "dots":
        form = _Alternating(bank.home, bank.kinds, bank.repeats, remat == "offload")
        return _with_way_back(form, body, bank.weights, states, carry)
    # backwards each streamed layer is fetched again; kept, all of them would stand on the device
    policy = _policy(remat, streamed) or _KEPT_BY_A_SCAN
    period = jax.checkpoint(period, policy=policy, prevent_cse=False)  # a scan is its own barrier
    (_, carry, states), _ = lax.scan(period, (jnp.int32(0), carry, states), bank.weights, length=bank.repeats)
    return carry, states


def _ahead(body: Body, carry: Any, bank: Bank, states: Any, remat: str) -> tuple[Any, Any]:
    if remat == "dots":
        raise ValueError(
            f"form 'ahead' keeps of a layer what comes into it alone, and remat is {remat!r}: use remat='full', or form='scan'"
        )
    form = _OneAhead(bank.home, bank.kinds, bank.repeats, remat == "offload")
    return _with_way_back(form, body, bank.weights, states, carry)


def _written_out(body: Body, carry: Any, bank: Bank, states: Any, remat: str) -> tuple[Any, Any]:
    form = _WrittenOut(bank.kinds * bank.repeats, remat == "offload")
    return _with_way_back(form, body, tuple(bank.weights), tuple(states), carry)


@dataclasses.dataclass(frozen=True)
class _WrittenOut:
    """Resident layers before ones that are fetched ahead, for `_with_way_back`: run again one after another on the way back,
    each once its gradient is there. (The first layer of a stack is fetched there with nothing beside it but what does not
    wait for it, and XLA's scheduler runs all resident layers again in its window, and keeps what they make.)"""

    kinds: tuple[Hashable, ...]
    offload: bool

    def forward(self, body: Any, weights: Any, states: Any, carry: Any, *, keep: bool) -> tuple[Any, Any]:
        new, entered = [], []
        for kind, one, state in zip(self.kinds, weights, states, strict=True):
            entered.append(_away(carry, self.offload) if keep else ())
            held, carry = lax.optimization_barrier((one, carry))
            carry, state = _one(body, kind, held, carry, state)
            new.append(state)
        return (carry, tuple(new)), tuple(entered)

    def backward(
        self, body: Any, weights: Any, states: Any, entered: Any, wanted: Any, g: Any, of_states: Any
    ) -> list[Any]:
        of_body, of_weights, of_held, of_carry = wanted
        total, found = [jnp.zeros_like(x) for x in _chosen(body, of_body)], []
        for j, kind in reversed(list(enumerate(self.kinds))):
            held, g = lax.optimization_barrier((weights[j], g))
            given = (body, held, states[j], _back_again(entered[j], self.offload))
            asked, came = (of_body, of_weights[j], of_held[j]), (g, of_states[j])
            more, of_one, of_state, g = _layer_back(kind, given, asked, came, weights[j], several=True)
            total = jax.tree.map(jnp.add, total, more)
            found.insert(0, (of_one, of_state))
        return [*total, *(w for f in found for w in f[0]), *(x for f in found for x in f[1]), *_carried(g, of_carry)]


@dataclasses.dataclass(frozen=True)
class _Alternating:
    """A scan over a period of unlike streamed layers, for `_with_way_back`."""

    home: str
    kinds: tuple[Hashable, ...]
    repeats: int
    offload: bool

    def forward(self, body: Any, weights: Any, states: Any, carry: Any, *, keep: bool) -> tuple[Any, Any]:
        fetch, last = home(self.home).fetch, len(self.kinds) - 1

        def period(loop: Any, slices: Any) -> tuple[Any, Any]:
            i, carry, states = loop
            here, new, entered = fetch(slices[0]), [], []
            for j, (kind, stack) in enumerate(zip(self.kinds, states, strict=True)):
                ahead = None
                entered.append(_away(carry, self.offload) if keep else ())
                if j < last:
                    ahead, carry = _fetched_after(fetch, weights[j + 1], i, carry)
                carry, state = _one(body, kind, here, carry, _at(stack, i))
                new.append(_put(stack, state, i))
                here = ahead
            return (i + 1, carry, tuple(new)), tuple(entered)

        (_, carry, states), entered = lax.scan(period, (jnp.int32(0), carry, states), weights, length=self.repeats)
        return (carry, states), entered

    def backward(
        self, body: Any, weights: Any, states: Any, entered: Any, wanted: Any, g: Any, of_states: Any
    ) -> list[Any]:
        fetch, (of_body, of_weights, of_held, of_carry) = home(self.home).fetch, wanted

        def period(loop: Any, entered: Any) -> tuple[Any, Any]:
            i, g, total = loop
            here, g = _fetched_after(fetch, weights[-1], i, g)
            found: list[Any] = [None] * len(self.kinds)
            for j in reversed(range(len(self.kinds))):
                ahead = None
                if j:
                    ahead, g = _fetched_after(fetch, weights[j - 1], i, g)
                given = (body, here, _at(states[j], i), _back_again(entered[j], self.offload))
                asked, came = (of_body, of_weights[j], of_held[j]), (g, _at(of_states[j], i))
                more, *found[j], g = _layer_back(self.kinds[j], given, asked, came, weights[j], several=True)
                total = jax.tree.map(jnp.add, total, more)
                here = ahead
            return (i - 1, g, total), tuple(found)

        start = (jnp.int32(self.repeats - 1), g, [jnp.zeros_like(x) for x in _chosen(body, of_body)])
        (_, g, total), found = lax.scan(period, start, entered, length=self.repeats, reverse=True)
        return [*total, *(w for f in found for w in f[0]), *(s for f in found for s in f[1]), *_carried(g, of_carry)]


@dataclasses.dataclass(frozen=True)
class _OneAhead:
    """Each layer is fetched while the one before it is computed, over the border of a period too; for `_with_way_back`.

    The stacks have one layer less than there are turns, and that layer stands alone: the first kind's first, which is
    fetched before the loop, and the other kinds' last, which are used after it. All slices in the loop are therefore at
    the loop's own index, which is what makes DMA copies of them. The way back goes through the same: the last turn's other
    kinds, in a loop the first kind of a turn and the other kinds of the one before it, and the first layer.
    """

    home: str
    kinds: tuple[Hashable, ...]
    repeats: int
    offload: bool

    def forward(self, body: Any, weights: Any, states: Any, carry: Any, *, keep: bool) -> tuple[Any, Any]:
        fetch, last, R = home(self.home).fetch, len(self.kinds) - 1, self.repeats
        ones, rests = tuple(w["one"] for w in weights), tuple(w["rest"] for w in weights)

        def kept(carry: Any) -> Any:
            return _away(carry, self.offload) if keep else ()

        def period(loop: Any, slices: Any) -> tuple[Any, Any]:
            i, carry, here, states = loop
            new, entered = [], []
            for j, (kind, stack) in enumerate(zip(self.kinds, states, strict=True)):
                following = (j + 1) % len(self.kinds)
                entered.append(kept(carry))
                if last:
                    ahead, carry = _fetched_after(fetch, rests[following], i, carry)
                else:
                    ahead = fetch(slices[0])
                carry, state = _one(body, kind, here, carry, _at(stack, i))
                new.append(_put(stack, state, i))
                here = ahead
            return (i + 1, carry, here, tuple(new)), (kept(carry), *entered[1:])

        first = kept(carry)
        loop = (jnp.int32(0), carry, fetch(ones[0]), states)
        (_, carry, here, states), between = lax.scan(period, loop, rests, length=R - 1)
        new, after = [], []
        for j, (kind, stack) in enumerate(zip(self.kinds, states, strict=True)):
            ahead = None
            after.append(kept(carry))
            if j < last:
                one, carry = lax.optimization_barrier((ones[j + 1], carry))
                ahead = fetch(one)
            carry, state = _one(body, kind, here, carry, _at(stack, R - 1))
            new.append(_put(stack, state, R - 1))
            here = ahead
        return (carry, tuple(new)), (first, between, tuple(after[1:]))

    def backward(
        self, body: Any, weights: Any, states: Any, entered: Any, wanted: Any, g: Any, of_states: Any
    ) -> list[Any]:
        fetch, (of_body, of_weights, of_held, of_carry) = home(self.home).fetch, wanted
        ones, rests = tuple(w["one"] for w in weights), tuple(w["rest"] for w in weights)
        (first, between, after), R, K = entered, self.repeats, len(self.kinds)

        def through(j: int, turn: Any, here: Any, x: Any, g: Any, place: str, *, several: bool) -> Any:
            given = (body, here, _at(states[j], turn), _back_again(x, self.offload))
            asked, came = (of_body, of_weights[j][place], of_held[j]), (g, _at(of_states[j], turn))
            return _layer_back(self.kinds[j], given, asked, came, weights[j][place], several=several)

        def alone(j: int, turn: int, x: Any, g: Any) -> Any:
            one, g = lax.optimization_barrier((ones[j], g))
            return through(j, turn, fetch(one), x, g, "one", several=True)

        def period(loop: Any, between: Any) -> tuple[Any, Any]:
            i, g, total = loop
            order = [0, *reversed(range(1, K))]
            here, g = _fetched_after(fetch, rests[0], i, g)
            found: list[Any] = [None] * K
            for j, following in zip(order, [*order[1:], None], strict=True):
                ahead = None
                if following is not None:
                    ahead, g = _fetched_after(fetch, rests[following], i, g)
                more, *found[j], g = through(j, i if j else i + 1, here, between[j], g, "rest", several=K > 1)
                total = jax.tree.map(jnp.add, total, more)
                here = ahead
            return (i - 1, g, total), tuple(found)

        total, single = [jnp.zeros_like(x) for x in _chosen(body, of_body)], [[]] * K
        for j in reversed(range(1, K)):
            more, *single[j], g = alone(j, R - 1, after[j - 1], g)
            total = jax.tree.map(jnp.add, total, more)
        (_, g, total), found = lax.scan(period, (jnp.int32(R - 2), g, total), between, length=R - 1, reverse=True)
        more, *single[0], g = alone(0, 0, first, g)
        total = jax.tree.map(jnp.add, total, more)
        of_all = [w for one, rest in zip(single, found, strict=True) for w in (*one[0], *rest[0])]
        turns = []
        for j, (one, rest) in enumerate(zip(single, found, strict=True)):
            for alone_, stack in zip(one[1], rest[1], strict=True):
                rows = (stack, alone_[None]) if j else (alone_[None], stack)
                turns.append(jnp.concatenate(rows))
        return [*total, *of_all, *turns, *_carried(g, of_carry)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Kept:
    """What a way back needs: what the bank was given, what came into each layer, and which of the former's leaves have a
    gradient."""

    given: Any
    entered: Any
    wanted: tuple[bool, ...] = dataclasses.field(metadata={"static": True})


def _with_way_back(
    form: _WrittenOut | _Alternating | _OneAhead, body: Body, weights: Any, states: Any, carry: Any
) -> Any:
    """(carry, states) of layers in a form that says how it is gone back through.

    jax's own way back would take a layer at an index that was saved going forward: an array, and of a stack at such an
    index XLA makes no DMA copy; what was fetched ahead it would keep. Here the way back has a loop of its own, whose index
    is where every slice is. What comes into each layer is all that is kept, each layer is fetched again, and run again.

        forward(body, weights, states, carry, keep) -> ((carry, states), what came into each layer)
        backward(body, weights, states, entered, wanted, g, of_states) -> gradients of the leaves of (body, weights, states,
            carry) that are wanted (a tree of bools), in order; g, of_states: of what came out, None for what is no float
    """
    body = body if isinstance(body, jax.tree_util.Partial) else jax.tree_util.Partial(body)
    given, tree = jax.tree.flatten((body, weights, states, carry))

    @jax.custom_vjp
    def run(*given: Any) -> Any:
        return form.forward(*jax.tree.unflatten(tree, given), keep=False)[0]

    def there(*given: Any) -> Any:
        held = [x.value for x in given]
        out, entered = form.forward(*jax.tree.unflatten(tree, held), keep=True)
        return out, _Kept(tuple(held), entered, tuple(x.perturbed and _is_float(x.value) for x in given))

    def back(kept: _Kept, g: Any) -> tuple[Any, ...]:
        body, weights, states, _ = jax.tree.unflatten(tree, kept.given)
        of_carry, of_states = jax.tree.map(_cotangent, g, is_leaf=_is_zero)
        wanted = jax.tree.unflatten(tree, kept.wanted)
        found = iter(form.backward(body, weights, states, kept.entered, wanted, of_carry, of_states))
        return tuple(next(found) if w else None for w in kept.wanted)

    run.defvjp(there, back, symbolic_zeros=True)
    return run(*given)


def _layer_back(
    kind: Hashable, given: tuple[Any, ...], wanted: tuple[Any, ...], g: Any, stands: Any, *, several: bool
) -> Any:
    """Back through one layer: its gradients that are wanted of (body, weights, state), those of weights where `stands` is,
    and that of x. given: (body, weights, state, x).

    several: of a turn. A layer is then run again once g is there, and all its gradients are made before the next one's: XLA
    would else hold together what each of them keeps."""
    if several:
        *held, x = given
        x, g = lax.optimization_barrier((x, g))
        given = (*held, x)

    def layer(body: Any, weights: Any, state: Any, x: Any) -> Any:
        return _one(body, kind, weights, x, state)

    floats = jax.tree.map(_is_float, given[3])
    found = _pulled(layer, given, (*wanted, floats), g)
    of_body, of_weights, of_state, of_x = lax.optimization_barrier(found) if several else found
    spaces = [jax.typeof(s).memory_space for s in _chosen(stands, wanted[1])]
    of_weights = [jax.device_put(w, space) for w, space in zip(of_weights, spaces, strict=True)]
    return of_body, of_weights, of_state, _filled(given[3], floats, of_x)


def _away(x: Any, offload: bool) -> Any:
    """What came into a layer, to where it waits."""
    return _floats_to(jax.memory.Space.Host, x) if offload else x


def _back_again(x: Any, offload: bool) -> Any:
    return _floats_to(jax.memory.Space.Device, x) if offload else x


def _floats_to(space: Any, tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, space) if _is_float(x) else x, tree)


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _is_zero(g: Any) -> bool:
    return isinstance(g, SymbolicZero)


def _cotangent(g: Any) -> Any:
    """A cotangent as an array; of what is no float None."""
    if _is_zero(g):
        return jnp.zeros(g.aval.shape, g.aval.dtype) if _is_float(g.aval) else None
    return g if _is_float(g) else None


def _chosen(tree: Any, wanted: Any) -> list[Any]:
    """The leaves that are wanted."""
    return [x for x, w in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True) if w]


def _carried(g: Any, wanted: Any) -> list[Any]:
    """The leaves of a carry's gradient that are wanted; what is no float has none, and None in its place."""
    return _chosen(g, jax.tree.map(lambda w, x: None if x is None else w, wanted, g))


def _filled(tree: Any, wanted: Any, chosen: Sequence[Any]) -> Any:
    """A tree with `chosen` in the places of leaves that are wanted, None in the others'."""
    rest = iter(chosen)
    return jax.tree.map(lambda _, w: next(rest) if w else None, tree, wanted)


def _pulled(layer: Any, given: tuple[Any, ...], wanted: tuple[Any, ...], g: Any) -> list[list[Any]]:
    """The gradients of those leaves of each argument that are wanted; g: of what layer(*given) gives, None for no float."""

    def on(*chosen: list[Any]) -> list[Any]:
        rests = [iter(c) for c in chosen]
        args = [
            jax.tree.map(lambda x, w, rest=rest: next(rest) if w else x, tree, asked)
            for tree, asked, rest in zip(given, wanted, rests, strict=True)
        ]
        return [x for x in jax.tree.leaves(layer(*args)) if _is_float(x)]

    _, pull = jax.vjp(on, *map(_chosen, given, wanted))
    return list(pull(jax.tree.leaves(g)))


def _ordered(fetch: Any, stacks: Any, i: Any, slices: Any, carry: Any) -> tuple[Any, Any]:
    """stacks[i] fetched, and not before `carry` is there: without an order XLA starts all copies of a period at once and
    holds the whole period. The order is on the stack: on its slice it would not bind (AOT: 3.0 layers of a period of 3,
    in place of 2.0). Gradients go to `slices`, the scan's own view of stacks[i]."""
    here, carry = _fetched_after(fetch, lax.stop_gradient(stacks), i, carry)
    return jax.tree.map(_with_gradient_of, here, fetch(slices)), carry


def _fetched_after(fetch: Any, stacks: Any, i: Any, carry: Any) -> tuple[Any, Any]:
    """stacks[i] fetched after `carry`, without a gradient: see `_ordered`."""
    stacked, carry = lax.optimization_barrier((stacks, carry))
    return fetch(_at(stacked, i)), carry


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
