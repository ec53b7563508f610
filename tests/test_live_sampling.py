"""Sampling against transformers: each processor alone, in the order that `generate` applies them, and `generate`.

Both sides compute in float32, so both may round. Kept logits must agree within two roundings' sums, removed sets must
be equal wherever the float64 oracle says that no comparison was closer than rounding (the share of such rows is held).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from oracles import sampling as oracle  # noqa: E402
from oracles.sampling import decided, logit_error  # noqa: E402

from jaxengine.sampling import (  # noqa: E402
    Sampling,
    Steps,
    init_counts,
    process,
    top_logprobs,
    update_counts,
    values,
)

pytestmark = pytest.mark.oracle

B, V, T = 16, 50, 9
process_jit = jax.jit(process, static_argnums=0)


def theirs(s):
    """transformers' processors for the settings, in the order of its `_get_logits_processor`."""
    out = transformers.LogitsProcessorList()
    if s.repetition_penalty != 1.0:
        out.append(transformers.RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.temperature not in (0.0, 1.0):
        out.append(transformers.TemperatureLogitsWarper(s.temperature))
    if s.top_k is not None:
        out.append(transformers.TopKLogitsWarper(s.top_k))
    if s.top_p is not None:
        out.append(transformers.TopPLogitsWarper(s.top_p))
    if s.min_p is not None:
        out.append(transformers.MinPLogitsWarper(s.min_p))
    return out


def processed(s, logits, prompt, generated):
    """Ours: logits [B, V], prompt [B, T] and generated [B, T'] ids, as numpy."""
    steps = Steps.of([s])
    ids = jnp.asarray(prompt.astype(np.int32))
    counts = init_counts(steps, ids, jnp.ones(ids.shape, bool), V)
    for token in generated.T.astype(np.int32):
        counts = update_counts(steps, counts, jnp.asarray(token))
    return np.asarray(process_jit(steps, values(steps, [s] * len(logits)), jnp.asarray(logits), counts))


def compare(ours, want, outcomes, s, least=0.9):
    ours, want = np.asarray(ours, np.float64), np.asarray(want, np.float64)
    rows = [b for b, o in enumerate(outcomes) if decided(o, s)]
    assert len(rows) >= least * len(outcomes), "too few rows are far enough from rounding to be compared"
    for b in rows:
        np.testing.assert_array_equal(np.isneginf(ours[b]), np.isneginf(want[b]), err_msg=f"{s} row {b}")
        kept = ~np.isneginf(want[b])
        np.testing.assert_allclose(ours[b][kept], want[b][kept], rtol=0, atol=2 * logit_error(outcomes[b], s) + 1e-37)


SETTINGS = [
    Sampling(repetition_penalty=1.3),
    Sampling(repetition_penalty=0.8),
    Sampling(0.7),
    Sampling(1e-4),
    Sampling(2.5),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_k=7),
    Sampling(1.0, top_k=V),
    Sampling(1.0, top_k=10 * V),
    Sampling(1.0, top_p=0.01),
    Sampling(1.0, top_p=0.5),
    Sampling(1.0, top_p=0.99),
    Sampling(1.0, top_p=1.0),
    Sampling(1.0, min_p=0.0),
    Sampling(1.0, min_p=0.02),
    Sampling(1.0, min_p=1.0),
    Sampling(0.8, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    Sampling(1.6, top_k=30, top_p=0.7),
    Sampling(1.3, top_k=5, min_p=0.2),
    Sampling(0.5, top_p=0.95, min_p=0.01, repetition_penalty=0.9),
]


@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_processors(s):
    rng = np.random.default_rng(3)
    logits = (rng.normal(size=(B, V)) * 3).astype(np.float32)
    ids = rng.integers(0, V, (B, T))
    want = theirs(s)(torch.from_numpy(ids), torch.from_numpy(logits.copy())).numpy()
    split = T // 2  # transformers does not tell prompt from text, and nor may the repetition penalty
    ours = processed(s, logits, ids[:, :split], ids[:, split:])
    compare(ours, want, [oracle.process(s, z, row) for z, row in zip(logits, ids.tolist(), strict=True)], s)


@pytest.mark.parametrize("grid", [0.5, 2.0])
@pytest.mark.parametrize("s", [Sampling(1.0, top_k=7), Sampling(1.0, top_p=0.6), Sampling(1.0, min_p=0.5)], ids=str)
def test_ties(s, grid):
    """Logits on a grid. Top-k and min-p keep the same tokens; top-p, where transformers' unstable sort chooses among
    equals, keeps as many of each value."""
    logits = (np.round(np.random.default_rng(4).normal(size=(B, V)) * 3 / grid) * grid).astype(np.float32)
    none = np.zeros((B, 0))
    ours = processed(s, logits, none, none)
    want = theirs(s)(None, torch.from_numpy(logits.copy())).numpy()
    assert all(decided(oracle.process(s, z), s) for z in logits)
    if s.top_p is not None:
        ours, want = np.sort(ours, axis=1), np.sort(want, axis=1)
    np.testing.assert_array_equal(ours, want)


def tiny_model():
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=1.0,  # so that logits differ
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "s",
    [
        Sampling(0.8, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.4),
        Sampling(1.5, top_k=12, top_p=0.8),
        Sampling(repetition_penalty=1.5),
    ],
    ids=str,
)
def test_generate(s):
    """Every step of a real `generate`: from its raw logits and its own text so far to its processed scores."""
    prompt = np.random.default_rng(5).integers(1, V, (4, 5))
    torch.manual_seed(1)
    chosen = {} if s.greedy else {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "min_p": s.min_p}
    out = tiny_model().generate(
        torch.from_numpy(prompt),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        do_sample=not s.greedy,
        repetition_penalty=s.repetition_penalty,
        max_new_tokens=8,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **chosen,
    )
    text = out.sequences.numpy()[:, prompt.shape[1] :]
    assert text.shape == (4, 8)
    ours, outcomes = [], []
    for t in range(8):
        raw = out.logits[t].numpy()
        ours.append(processed(s, raw, prompt, text[:, :t]))
        outcomes += [
            oracle.process(s, z, p, g) for z, p, g in zip(raw, prompt.tolist(), text[:, :t].tolist(), strict=True)
        ]
        if s.greedy:
            np.testing.assert_array_equal(ours[-1].argmax(axis=1), text[:, t])
    compare(np.concatenate(ours), np.concatenate([x.numpy() for x in out.scores]), outcomes, s)


def test_logprob_is_log_softmax():
    """torch's own log_softmax of the raw logits, at a large vocabulary's scale."""
    logits = (np.random.default_rng(6).normal(size=(4, 32_000)) * 4).astype(np.float32)
    ids, logprobs = jax.jit(top_logprobs, static_argnums=1)(jnp.asarray(logits), 20)
    want = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1).topk(20)
    np.testing.assert_array_equal(ids, want.indices.numpy())
    # a sum of V terms in any order is off by V u at the most, and its logarithm by as much
    np.testing.assert_allclose(logprobs, want.values.numpy(), rtol=0, atol=2.0**-24 * (32_000 + 8 + 4 * 40))
