"""Generation as a user meets it, on a tiny checkpoint with a tokenizer made here.

What greedy decoding must give stands in the golden files (tests/test_models.py); here is everything around it: batches,
samples, stops, streams, log-probabilities, how often something is compiled, and what bad input is told.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import jaxengine
from jaxengine import engine, outside
from jaxengine.model import Model
from pallas_kernels import aot

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a byte-level tokenizer as large as its vocabulary: some tokens are halves of characters."""
    path = tmp_path_factory.mktemp("llama")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / "llama" / name, path / name)
    V = json.loads((path / "config.json").read_text())["vocab_size"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = [c for c in alphabet if c.isascii()][:60]
    vocab = {c: i for i, c in enumerate(first + [c for c in alphabet if c not in first][: V - 60])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return jaxengine.load(folder)


PROMPTS = [[5, 9, 33], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [40]]


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.2}],
    ids=["greedy", "sampled"],
)
def test_each_row_gives_what_it_gives_alone(model: Model, how: dict[str, float]) -> None:
    together = model.generate(PROMPTS, max_new_tokens=12, **how)
    for i, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt, max_new_tokens=12, **how)
        assert [together[i].tokens] == [c.tokens for c in alone]
        assert together[i].prompt == i


def test_cached_decoding_is_the_whole_forward_again(model: Model) -> None:
    """Every token chosen is the argmax of an uncached forward over all before it, and has its log-probability."""
    found = model.generate(PROMPTS[1], max_new_tokens=10, logprobs=3)[0]
    assert found.logprobs is not None
    assert found.top_logprobs is not None
    sequence = PROMPTS[1] + found.tokens
    logits = np.asarray(model.logits(sequence)[0], np.float64)[len(PROMPTS[1]) - 1 : -1]
    assert found.tokens == logits.argmax(-1).tolist()
    logp = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    np.testing.assert_allclose(found.logprobs, logp.max(-1), atol=2e-4)
    for row, top in zip(logp, found.top_logprobs, strict=True):
        assert list(top) == np.argsort(-row)[:3].tolist()


def test_lengths_share_programs(model: Model) -> None:
    """A second prompt of another length in the same bucket, another temperature, more tokens: nothing compiles again."""
    model.generate([1, 2, 3], max_new_tokens=5, temperature=0.5, seed=1)
    before = engine.prefill.on("cpu")._cache_size(), engine.decode.on("cpu")._cache_size()
    for length, new, temperature in ((1, 9, 0.7), (7, 5, 1.5), (16, 40, 0.1), (11, 3, 0.9)):
        model.generate(list(range(1, length + 1)), max_new_tokens=new, temperature=temperature, seed=2)
    assert (engine.prefill.on("cpu")._cache_size(), engine.decode.on("cpu")._cache_size()) == before
    model.generate(list(range(1, 30)), max_new_tokens=5, temperature=0.5)
    assert engine.prefill.on("cpu")._cache_size() == before[0] + 1  # the next bucket of prompt lengths
    model.generate([1, 2, 3], max_new_tokens=5, temperature=0.5, stop_ids=[7, 8, 9])
    assert engine.decode.on("cpu")._cache_size() == before[1]  # the cache is as long as before: the same loop


def test_programs_for_a_gpu_carry_the_options_that_streaming_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that run, not only those that are compiled to be looked at, which pallas_kernels/aot.py gives the same."""
    wanted = {
        "xla_gpu_enable_latency_hiding_scheduler": True, "xla_gpu_experimental_parallel_async_compute_limit": 16,
        "xla_gpu_dot_merger_threshold_mb": 0, "xla_gpu_enable_pipelined_host_offloading": False,
        "xla_gpu_memory_limit_slop_factor": 100_000,
    }  # fmt: skip
    doubled = wanted | {"xla_gpu_enable_while_loop_double_buffering": True}
    given: list[Any] = []

    def jit(function: Any, *, compiler_options: Any, **how: Any) -> Any:
        given.append(compiler_options)
        return lambda *args: None

    monkeypatch.setattr(jax, "jit", jit)
    for program in (engine.score, engine.prefill, engine.decode, outside.enter, outside.layer, outside.next_tokens):
        engine.Program.on.__wrapped__(program, "gpu")  # what is kept of it is of the platform that this runs on
    assert given == [wanted] * 6
    assert wanted == aot.OPTIONS
    device = SimpleNamespace(platform="gpu")
    how: Any = SimpleNamespace(mesh=SimpleNamespace(size=1, devices=np.array([device])))
    ahead, plain = (engine.Bank((), ("a",), 4, "host", form) for form in ("ahead", "scan"))
    for bank, doubles, options in ((ahead, True, doubled), (ahead, False, wanted), (plain, True, wanted)):
        given.clear()
        engine.Program(lambda how, bank: None, static=(0,), doubles=doubles)(how, bank)
        assert given == [options]
    given.clear()
    device.platform = "cpu"
    engine.Program(lambda how, bank: None, static=(0,), doubles=True)(how, ahead)
    assert given == [None]


def test_more_tokens_than_one_call_makes(model: Model) -> None:
    """Calls of CHUNK steps join without a seam."""
    few = model.generate([3, 4], max_new_tokens=engine.CHUNK - 3, stop_ids=())[0].tokens
    many = model.generate([3, 4], max_new_tokens=engine.CHUNK + 6, stop_ids=())[0].tokens
    assert len(many) == engine.CHUNK + 6
    assert many[: len(few)] == few


def test_samples_differ_and_seeds_repeat(model: Model) -> None:
    one = model.generate(PROMPTS[:2], max_new_tokens=12, temperature=1.0, seed=7, n=3)
    assert [c.prompt for c in one] == [0, 0, 0, 1, 1, 1]
    assert len({tuple(c.tokens) for c in one[:3]}) == 3
    again = model.generate(PROMPTS[0], max_new_tokens=12, temperature=1.0, seed=7, n=3)
    assert [c.tokens for c in one[:3]] == [c.tokens for c in again]
    other = model.generate(PROMPTS[0], max_new_tokens=12, temperature=1.0, seed=8, n=3)
    assert [c.tokens for c in other] != [c.tokens for c in again]


def test_stop_ids_end_a_row_and_only_that_row(model: Model) -> None:
    free = model.generate(PROMPTS, max_new_tokens=12, stop_ids=())
    stop = free[0].tokens[4]
    found = model.generate(PROMPTS, max_new_tokens=12, stop_ids=[stop])
    for before, after in zip(free, found, strict=True):
        if stop in before.tokens:
            end = before.tokens.index(stop) + 1
            assert (after.tokens, after.finish_reason) == (before.tokens[:end], "stop")
            assert after.text == model.tokenizer.decode(after.tokens[:-1])  # pyright: ignore[reportOptionalMemberAccess]
        else:
            assert (after.tokens, after.finish_reason) == (before.tokens, "length")


def test_stop_strings_are_cut_out(model: Model) -> None:
    free = model.generate(PROMPTS[1], max_new_tokens=40, stop_ids=())[0]
    middle = free.text[9:12]
    found = model.generate(PROMPTS[1], max_new_tokens=40, stop_ids=(), stop=middle)[0]
    assert found.finish_reason == "stop"
    assert found.text == free.text[: free.text.index(middle)]
    assert found.tokens == free.tokens[: len(found.tokens)]
    assert len(found.tokens) < 40
    pieces = list(model.stream(PROMPTS[1], max_new_tokens=40, stop_ids=(), stop=[middle]))
    assert "".join(pieces) == found.text


def test_stream_is_generate_in_pieces(model: Model) -> None:
    for how in ({}, {"temperature": 1.3, "seed": 5}):
        whole = model.generate(PROMPTS[1], max_new_tokens=30, stop_ids=(), **how)[0]
        pieces = list(model.stream(PROMPTS[1], max_new_tokens=30, stop_ids=(), **how))
        assert "".join(pieces) == whole.text == model.tokenizer.decode(whole.tokens)  # pyright: ignore[reportOptionalMemberAccess]
        assert len(pieces) > 1


def test_prompts_are_strings_or_ids(model: Model) -> None:
    ids = model.tokenizer.encode("abc")  # pyright: ignore[reportOptionalMemberAccess]
    assert model.generate("abc", max_new_tokens=4)[0].tokens == model.generate([ids], max_new_tokens=4)[0].tokens


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ([], {}, "no prompt"),
        ([[]], {}, "Prompt 0 is empty"),
        ([[1], [2, 5000]], {}, "Prompt 1 has token id 5000"),
        ([[1, -2]], {}, "token id -2"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"n": 0}, "n is 0"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"logprobs": 100000}, "vocabulary has"),
        ([1], {"stop": [""]}, "stop"),
        ([[1.5]], {}, "list of ids"),
    ],
)
def test_bad_requests_are_refused(model: Model, prompts: list, options: dict, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        model.generate(prompts, **options)


def test_chat_without_a_template_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="template"):
        model.generate([{"role": "user", "content": "hello"}])


def test_learned_positions_end() -> None:
    model = jaxengine.load(GOLDEN / "gpt2")
    most = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"max_new_tokens={most - 3}"):
        model.generate([1, 2, 3], max_new_tokens=most)


def test_logits_of_padded_rows(model: Model) -> None:
    rows = np.array([[5, 6, 7, 8], [9, 10, 0, 0]])
    found = np.asarray(model.logits(rows, lengths=[4, 2]))
    np.testing.assert_allclose(found[1, :2], np.asarray(model.logits([9, 10]))[0], atol=1e-5)
    for bad in ([[1, 2], [3]], [[]], [1.5]):
        with pytest.raises(ValueError, match="logits"):
            model.logits(bad)


@pytest.mark.parametrize("ids", [101, (2, -1)])
def test_a_stop_id_that_is_no_token_is_refused(ids: object) -> None:
    model = jaxengine.load(GOLDEN / "llama")
    with pytest.raises(ValueError, match=r"stop_ids: (101|-1) is no token; ids are 0 to 100"):
        model.generate([5, 6], max_new_tokens=2, stop_ids=ids)


def test_a_text_that_is_too_long_to_score_is_told_in_its_own_words() -> None:
    model = jaxengine.load(GOLDEN / "opt")
    most = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"has {most + 1} tokens and max_position_embeddings.*At most {most} tokens"):
        model.logits([5] * (most + 1))
