"""Logit processors in numpy float64, one row at a time, written as loops over the definitions.

Sources: CTRL, arXiv:1909.05858, section 4.1 (repetition penalty, extended to negative logits as transformers does);
OpenAI's API reference (presence and frequency); arXiv:1904.09751 (top-p); arXiv:2407.01082 (min-p).

Each filter also tells how near its decisions were to going the other way. A float32 implementation must agree whenever
they were further than its rounding error.
"""

import math
from dataclasses import dataclass

import numpy as np

U = 2.0**-24  # float32's unit roundoff


def repetition(z, seen, penalty):
    """z [V]; seen: ids in the prompt or generated."""
    z = np.array(z, np.float64)
    for v in set(seen):
        z[v] = z[v] * penalty if z[v] < 0 else z[v] / penalty
    return z


def presence_frequency(z, generated, presence, frequency):
    """generated: ids in the order generated, with repeats."""
    z = np.array(z, np.float64)
    for v in set(generated):
        z[v] -= presence
    for v in generated:
        z[v] -= frequency
    return z


def top_k(z, k):
    """Everything that is not less than the k-th largest; slack in logits."""
    kth = sorted(z, reverse=True)[min(k, len(z)) - 1]
    out = np.array([v if v >= kth else -math.inf for v in z])
    return out, min((abs(v - kth) for v in z if v != kth and v != -math.inf), default=math.inf)


def probabilities(z):
    top = max(z)
    mass = np.array([math.exp(v - top) for v in z])
    return mass / math.fsum(mass)


def top_p(z, p):
    """The likeliest tokens, smaller id first among equals, until their probability is p.

    Besides: for each token but the first the probabilities (before it, from it on) that decide whether it stays, and
    the slack in logits, which is the step down from the last token kept to the first removed (true ties have none).
    """
    probs = probabilities(z)
    out = np.full(len(z), -math.inf)
    order = sorted(range(len(z)), key=lambda v: (-z[v], v))
    splits = [(math.fsum(probs[order[:i]]), math.fsum(probs[order[i:]])) for i in range(1, len(z))]
    n_kept = 1 + sum(before < p for before, _ in splits)
    for v in order[:n_kept]:
        out[v] = z[v]
    step = math.inf
    if n_kept < len(z) and z[order[n_kept]] != z[order[n_kept - 1]]:
        step = z[order[n_kept - 1]] - z[order[n_kept]]
    return out, splits, step


def min_p(z, p):
    """Everything at least p times as likely as the likeliest; slack in logits."""
    if p == 0:
        return np.array(z), math.inf
    edge = max(z) + math.log(p)
    out = np.array([v if v >= edge else -math.inf for v in z])
    return out, min((abs(v - edge) for v in z if v != max(z) and v != -math.inf), default=math.inf)


@dataclass
class Outcome:
    logits: np.ndarray  # [V], -inf where removed
    largest: float  # the largest finite magnitude met on the way: float32 rounds in proportion to it
    logit_slack: float
    splits: list[tuple[float, float]]  # of top-p


def process(s, logits, prompt=(), generated=()):
    """`s` has the fields of a Sampling; transformers' order. temperature 0 stops after the penalties."""
    z = repetition(logits, [*prompt, *generated], s.repetition_penalty)
    met = [*logits, *z]
    z = presence_frequency(z, generated, s.presence_penalty, s.frequency_penalty)
    met += [*z, abs(s.presence_penalty), abs(s.frequency_penalty) * len(generated)]
    logit_slack, splits = math.inf, []
    temperature = s.temperature or 1.0
    z = z / temperature
    if s.temperature:
        if s.top_k is not None:
            z, logit_slack = top_k(z, s.top_k)
        if s.top_p is not None and s.top_p < 1:
            z, splits, slack = top_p(z, s.top_p)
            logit_slack = min(logit_slack, slack)
        if s.min_p is not None:
            z, slack = min_p(z, s.min_p)
            logit_slack = min(logit_slack, slack)
    largest = max((abs(v) for v in met if math.isfinite(v)), default=0.0) / temperature
    return Outcome(z, largest, logit_slack, splits)


def log_softmax(logits):
    z = np.array(logits, np.float64)
    top = max(z)
    return z - top - math.log(math.fsum(math.exp(v - top) for v in z))


def logit_error(outcome, s):
    """At most 12 roundings (two penalties with their parameters, the temperature, min-p's edge), each relative to the
    largest number met."""
    return 12 * U * (outcome.largest + abs(math.log(s.min_p or 1.0)))


def decided(outcome, s):
    """No comparison was closer than rounding.

    Top-p compares a tail's share f with 1 - p. Errors in the exponents (two logit errors, a subtraction, 4 u of exp,
    in numerator and denominator) move log(f / (1 - f)); sums of V terms and the product add (V + 3) u to either side.
    """
    if outcome.logit_slack <= 2 * logit_error(outcome, s):
        return False
    exponent = 2 * (2 * logit_error(outcome, s) + 2 * U * outcome.largest + 4 * U)
    sums = 2 * (len(outcome.logits) + 3) * U
    for before, tail in outcome.splits:
        low, high = (tail * math.exp(e) / (before + tail * math.exp(e)) for e in (-exponent, exponent))
        if low * (1 - sums) <= 1 - s.top_p <= high * (1 + sums):
            return False
    return True
