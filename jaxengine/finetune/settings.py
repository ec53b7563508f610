"""What a run of fine-tuning is told (Settings), and the part of it that decides bytes (Task), which a plan is made of.

A plan that is asked for beforehand (`jaxengine plan --task`) and a run make a Task of the same Settings: so what one refuses
the other does, and both count the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from jaxengine.architecture import Architecture
from jaxengine.engine import Engine
from jaxengine.finetune import sampled, tiles
from jaxengine.finetune.optimizers.base import SCHEDULES, Optimizer, optimizer
from jaxengine.finetune.sampled import SAMPLED
from jaxengine.finetune.step import Tuning
from jaxengine.finetune.trained._lowrank import LowRank
from jaxengine.finetune.trained.base import trained
from jaxengine.plan import Plan
from jaxengine.walk import REMAT

TASKS = {  # what is planned for by name: what is trained, and by which optimizer
    "lora": ("lora", "adamw"), "dora": ("dora", "adamw"), "full": ("all", "adamw"),
    **{name: (name, "adamw") for name in SAMPLED}, "mezo": ("all", "mezo"),
}  # fmt: skip
ADAPTERS = ("lora", "dora")  # what is written as a PEFT folder
COMPUTE = ("bfloat16", "float32")
RATES = {"lora": 2e-4, "dora": 2e-4} | dict.fromkeys(
    ("all", *SAMPLED), 1e-5
)  # learning rates that are usual with AdamW
LION = 1 / 3  # of AdamW's, as its paper says
MEZO = {"lora": (5e-5, 1e-2), "dora": (5e-5, 1e-2), "all": (1e-6, 1e-3)}  # learning rates and eps that its paper takes


@dataclasses.dataclass(frozen=True)
class Task:
    """What is fine-tuned, as far as bytes and seconds go (planning.task makes one). compute: the dtype of the arithmetic ('':
    the plan's); accumulate: parts of a batch; the rest as in Settings."""

    train: str
    options: Any
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    compute: str = ""
    accumulate: int = 1
    clip: float = 1.0
    loss_chunk: int = 0
    tile: int = 0

    def tuning(self, architecture: Architecture, plan: Plan, mesh: Any) -> Tuning:
        """The step that this task and plan make."""
        dtype = self.compute or plan.dtype
        engine = Engine(architecture, plan.caching, dtype, plan.sharding_rules(), mesh, attention=plan.attention)
        return Tuning(
            engine, self.train, self.options, self.optimizer, plan.remat or "full", self.clip, self.loss_chunk, self.tile,
        )  # fmt: skip

    def layered(self, plan: Plan) -> bool:
        """Whether each layer's gradient is used as it is made: where every parameter is trained and not all are on the
        device."""
        return self.train == "all" and plan.home != "device" and self.optimizer.order > 0

    def runs_ahead(self, remat: str) -> bool:
        """Whether its step can fetch each streamed layer while the one before it is computed."""
        return self.beside and self.optimizer.order > 0 and remat != "dots"

    @property
    def name(self) -> str:
        """As TASKS has it."""
        return ("full" if self.optimizer.order else "mezo") if self.train == "all" else self.train

    @property
    def said(self) -> dict[str, Any]:
        """Its options by name, those that mean something for it."""
        own = {f.name: getattr(self.options, f.name) for f in dataclasses.fields(self.options)}
        found = {n: own[n] for n in ("rank", "targets", "layers") if n in own} | {"optimizer": self.optimizer.name}
        found |= {n: getattr(self, n) for n in ("compute", "accumulate", "loss_chunk")}
        return found | (
            {"clip": self.clip, "ema": self.optimizer.ema, "tile": self.tile} if self.optimizer.order else {}
        )

    @property
    def beside(self) -> bool:
        """Whether what is trained stands beside weights, of any format, and not in their place."""
        return self.train in ADAPTERS

    @property
    def sampled(self) -> bool:
        """Whether layers are trained in turn."""
        return self.train in sampled.SAMPLED


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides the losses, but for the model and the data.

    train: 'lora', 'dora', 'all', or some layers at a time: 'lisa', 'badam' or 'hift'. rank, alpha, rs, targets: of LoRA and
    DoRA (trained/_lowrank.py); layers, every, order: of those that train some layers at a time (trained/lisa.py and the
    others; None: as their papers). optimizer: its name;
    learning_rate: the highest (None: 2e-4 beside frozen matrices, 1e-5 of all parameters, a third of it under 'lion', 5e-5
    and 1e-6 under 'mezo'); schedule: what follows the warmup, 'constant', 'linear' or 'cosine' to 0; warmup: steps of a
    linear rise, or below 1 the part of all steps; b1: None is 0.9, of 'muon' 0.95; b2: None is 0.999, of 'lion' 0.99; eps:
    None is 1e-8, of 'mezo', where it is the size of the noise, 1e-2 and 1e-3. clip: the largest global norm of a gradient
    (0: any; None: 1). ema: decay of an average of what is trained, which is then what is evaluated and written (average.py; 0:
    none). compute: dtype of the arithmetic. remat: what is kept of a layer for its way back (walk.REMAT).
    loss_chunk: tokens of each row whose logits stand at a time (0: as many as fit 256 MB); tile: tokens of each row that a
    layer's feed-forward block takes at a time (0: all). A step is on batch x accumulate
    rows of `context` tokens, `batch` at a time. steps or epochs: how long (one epoch, if neither is said). seed: of A's
    beginning, the packing, the order of rows, draws of layers and MeZO's noise.
    """

    train: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    rs: bool = False
    targets: tuple[str, ...] = ("*",)
    layers: int | None = None
    every: int | None = None
    order: str | None = None
    optimizer: str = "adamw"
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    clip: float | None = None
    ema: float = 0.0
    compute: str = "bfloat16"
    remat: str = "full"
    loss_chunk: int = 0
    tile: int = 0
    batch: int = 4
    accumulate: int = 1
    context: int = 1024
    steps: int = 0
    epochs: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        trained(self.train)
        if self.train not in RATES:
            raise ValueError(f"train is {self.train!r}; a run trains {', '.join(RATES)}")
        for name in ("rank", "batch", "accumulate", "context", "steps", "epochs", "seed", "loss_chunk", "tile"):
            given, least = getattr(self, name), int(name in ("rank", "batch", "accumulate", "context"))
            if not isinstance(given, int) or isinstance(given, bool) or given < least:
                raise ValueError(f"{name} is {given!r}; it is a whole number, at least {least}")
        for name in ("alpha", "learning_rate", "warmup", "weight_decay", "b1", "b2", "eps", "clip", "ema"):
            given = getattr(self, name)
            number = isinstance(given, int | float) and not isinstance(given, bool)
            if not (number and math.isfinite(given) and given >= 0) and not (given is None and name in _USUAL):
                raise ValueError(f"{name} is {given!r}; it is a number, at least 0")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(
                f"warmup is {self.warmup}; it is a whole number of steps, or below 1 the part of all steps"
            )
        if self.steps and self.epochs:
            raise ValueError(
                f"steps is {self.steps} and epochs {self.epochs}; one of them says how long: leave one out"
            )
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}; it is below 2^32")
        if self.compute not in COMPUTE:
            said = "; gradients in float16 would need a loss scale" if self.compute == "float16" else ""
            raise ValueError(f"compute is {self.compute!r}; it can be {' or '.join(COMPUTE)}{said}")
        for name, known in (("remat", tuple(REMAT)), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it can be {', '.join(known)}")
        if not isinstance(self.targets, tuple) or not all(isinstance(t, str) for t in self.targets):
            raise ValueError(f"targets is {self.targets!r}; it is a tuple of names or patterns, such as ('q', 'v')")
        # as it will be used, so that equal choices are equal settings
        made: dict[str, Any] = {"epochs": self.epochs or int(not self.steps)}
        if self.learning_rate is None:
            if self.optimizer == "sgd":
                raise ValueError("learning_rate is not given, and none is usual with sgd: try 0.1, and 10 times less")
            made["learning_rate"] = RATES[self.train] * (LION if self.optimizer == "lion" else 1)
            if self.optimizer == "mezo":
                made["learning_rate"] = MEZO.get(self.train, MEZO["all"])[0]
        if self.b1 is None:
            made["b1"] = 0.95 if self.optimizer == "muon" else 0.9
        if self.b2 is None:
            made["b2"] = 0.99 if self.optimizer == "lion" else 0.999
        if self.eps is None:
            made["eps"] = MEZO.get(self.train, MEZO["all"])[1] if self.optimizer == "mezo" else 1e-8
        if self.clip is None:
            made["clip"] = 0.0 if self.optimizer == "mezo" else 1.0
        own = {f.name: f.default for f in dataclasses.fields(trained(self.train).Options)}
        for name in ("layers", "every", "order"):
            if name in own and getattr(self, name) is None:
                made[name] = own[name]
            elif name not in own and getattr(self, name) is not None:
                kinds = [n for n in SAMPLED if name in {f.name for f in dataclasses.fields(trained(n).Options)}]
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, and train is {self.train!r}: it goes with {', '.join(kinds)}"
                )
        usual = {f.name: f.default for f in dataclasses.fields(LowRank)}
        for name in usual.keys() - own.keys():
            if getattr(self, name) != usual[name]:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, and train is {self.train!r}, which puts nothing beside a matrix: it"
                    f" goes with {', '.join(ADAPTERS)}; leave it out"
                )
        if self.train in SAMPLED:
            sampled.check_remat(self.train, self.remat)
            if self.ema:
                whole = ", ".join(n for n in RATES if n not in SAMPLED)
                raise ValueError(
                    f"ema is {self.ema:g}, and train is {self.train!r}, which keeps nothing of layers that are not in turn: an"
                    f" average goes with {whole}; leave it out"
                )
        tiles.check(self.tile, self.remat)
        for name, value in made.items():
            object.__setattr__(self, name, value)
        _ = self.options, self.make_optimizer(self.steps, "" if self.steps else "constant")
        if not self.backward:
            _check_zeroth_order(self)

    @property
    def backward(self) -> bool:
        """Whether a step goes back through the layers, for a gradient."""
        return optimizer(self.optimizer).ORDER > 0

    @property
    def narrow(self) -> bool:
        """Whether what is trained of the model itself may be narrower than float32."""
        return not self.backward

    @property
    def options(self) -> Any:
        """What is said of what is trained."""
        kind = trained(self.train).Options
        return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind)})

    def steps_over(self, rows: int) -> int:
        """Steps of a run over so many packed rows."""
        return self.steps or math.ceil(self.epochs * rows / (self.batch * self.accumulate))

    def make_optimizer(self, steps: int, schedule: str = "") -> Optimizer:
        """For a run of so many steps."""
        assert self.learning_rate is not None
        assert self.b1 is not None
        assert self.b2 is not None
        assert self.eps is not None
        warmup = int(self.warmup if self.warmup >= 1 else self.warmup * steps)
        return Optimizer(
            self.optimizer, self.learning_rate, schedule or self.schedule, warmup, steps, self.weight_decay, self.b1,
            self.b2, self.eps, self.ema,
        )  # fmt: skip

    @property
    def task(self) -> Task:
        """What is planned for."""
        assert self.clip is not None
        return Task(
            self.train, self.options, self.make_optimizer(0, "constant"), self.compute, self.accumulate, self.clip,
            self.loss_chunk, self.tile,
        )  # fmt: skip

    def to_json(self) -> str:
        """As JSON text, every field written out."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """From `to_json`'s text; a field that is not known is refused by name."""
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise ValueError(f"Settings: the JSON text holds {type(raw).__name__}, not an object of a run's settings")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise ValueError(f"Settings: unknown field {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        if isinstance(raw.get("targets"), list):
            raw["targets"] = tuple(raw["targets"])
        return cls(**raw)


_USUAL = ("learning_rate", "b1", "b2", "eps", "clip")  # fields that may be left to what is usual


def _check_zeroth_order(settings: Settings) -> None:
    """Refuse what says how a gradient is made or used, where none is."""
    name, given = settings.optimizer, settings.train
    if given not in MEZO:
        raise ValueError(f"train is {given!r} and optimizer {name!r}, which trains {', '.join(MEZO)}")
    if not settings.eps:
        raise ValueError(f"eps is 0; of {name!r} it is the size of the noise, such as {MEZO[given][1]:g}")
    for field, usual in (("clip", 0), ("remat", "full"), ("b1", 0.9), ("b2", 0.999), ("ema", 0)):
        if (said := getattr(settings, field)) != usual:
            raise ValueError(
                f"{field} is {said!r}, and {name!r} makes no gradient and keeps nothing of a layer or a step: leave it out"
            )
