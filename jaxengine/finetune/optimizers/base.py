"""An optimizer by name: a file of this folder, which makes an optax transformation.

A file has
    ORDER    the derivatives that it asks for: 1, a gradient; 0, losses alone
    make(how, decayed, matrices) -> optax.GradientTransformation
    temporaries(shape, matrix) -> bytes that stand while a parameter is changed, beside its gradient and state
    TOGETHER     whether those of all parameters stand at a time, where all are changed in one go
    ROWS         so many elements of a parameter outside the layers, or a multiple, may be changed apart from the others (1:
                 each by its own gradient); 0: what one changes by depends on all
    DIVIDES      whether it divides by what eps alone keeps from being 0
where `decayed` is optax's mask of the leaves that weight decay acts on: matrices, not norms and biases; and matrices(tree)
says of each leaf how it is a matrix or vector inside a layer (Matrix), or None (both may be None: everything that has two
dims). A stack of layers' changes as each layer alone would.
Parameters, gradients and states are float32 unless the file says otherwise, and every state is zeros before the first step.
"""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxengine import technique
from jaxengine.finetune.average import averaging

OPTIMIZERS = "jaxengine.finetune.optimizers"
SCHEDULES = ("constant", "linear", "cosine")


def optimizer(name: str) -> ModuleType:
    """The optimizer of this name; ValueError names those there are."""
    return technique.find(OPTIMIZERS, name)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """[stacked..., out..., in...]: the numbers of dims that are stacked, and of outputs; out 0: it is a vector (norm, bias)."""

    stacked: int = 0
    out: int = 1


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How parameters are changed by their gradients.

    learning_rate: the highest; schedule: what follows `warmup` steps of a linear rise from 0, until `steps`: 'constant',
    'linear' or 'cosine' to 0. weight_decay: decoupled, times the learning rate. b1, b2, eps: as in the optimizer's paper.
    ema: decay of an average of the parameters, kept beside them (average.py); 0: none.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup: int = 0
    steps: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    ema: float = 0.0

    def __post_init__(self) -> None:
        optimizer(self.name)
        for field in ("learning_rate", "weight_decay", "b1", "b2", "eps"):
            given = getattr(self, field)
            if not (math.isfinite(given) and given >= 0):
                raise ValueError(f"optimizer: {field} is {given}; it is a number of at least 0")
        if optimizer(self.name).DIVIDES and self.eps < (least := float(jnp.finfo(jnp.float32).tiny)):
            raise ValueError(
                f"optimizer: eps is {self.eps}, and {self.name!r} divides by it where a gradient is 0: at least {least:.2g}, such"
                f" as 1e-8"
            )
        if max(self.b1, self.b2) >= 1:
            raise ValueError(f"optimizer: b1 and b2 are {self.b1} and {self.b2}; they are below 1")
        if not 0 <= self.ema < 1:
            raise ValueError(
                f"optimizer: ema is {self.ema}; it is at least 0, which keeps no average, and below 1, such as 0.99 (an average"
                f" over about 100 steps)"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer: schedule is {self.schedule!r}; it can be {', '.join(SCHEDULES)}")
        if self.warmup < 0 or (self.schedule != "constant" and self.steps <= self.warmup):
            raise ValueError(
                f"optimizer: warmup is {self.warmup} and steps {self.steps}; a {self.schedule} schedule ends at `steps`,"
                f" after the warmup: at most {max(self.steps - 1, 0)} steps of warmup, or schedule='constant'"
            )

    @property
    def order(self) -> int:
        """Of the derivatives that it asks for."""
        return optimizer(self.name).ORDER

    def rate(self) -> optax.Schedule:
        """The learning rate of a step, by its number from 0."""

        def loosely(schedule: optax.Schedule) -> optax.Schedule:
            def rate(count: Any) -> Any:
                with jax.numpy_dtype_promotion("standard"):
                    return schedule(count)

            return rate

        after = {
            "constant": lambda: optax.constant_schedule(self.learning_rate),
            "linear": lambda: optax.linear_schedule(self.learning_rate, 0.0, self.steps - self.warmup),
            "cosine": lambda: optax.cosine_decay_schedule(self.learning_rate, self.steps - self.warmup),
        }[self.schedule]()
        if not self.warmup:
            return loosely(after)
        rise = optax.linear_schedule(0.0, self.learning_rate, self.warmup)
        return loosely(optax.join_schedules([rise, after], [self.warmup]))

    def make(self, decayed: Any = None, matrices: Any = None) -> optax.GradientTransformation:
        """The transformation: gradients in, what is added to the parameters out."""
        made = optimizer(self.name).make(self, decayed, matrices)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            with jax.numpy_dtype_promotion("standard"):  # optax takes powers of a float by an integer's count
                return made.update(updates, state, params, **extra)

        own = optax.GradientTransformation(made.init, update)
        return optax.chain(own, averaging(self.ema)) if self.ema else own

    def finish(self, scale: optax.GradientTransformation, decayed: Any) -> optax.GradientTransformation:
        """What comes after an optimizer's own scaling: decay, then the learning rate."""
        decay = [optax.add_decayed_weights(self.weight_decay, decayed)] if self.weight_decay else []
        return optax.chain(scale, *decay, optax.scale_by_learning_rate(self.rate()))
