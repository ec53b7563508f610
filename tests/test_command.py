"""The command as it is typed: what it prints, where, its exit status, and which errors it shows without a trace.

Most runs are in this process; those about a process (signals, pipes, the compilation cache) have one of their own.
"""

from __future__ import annotations

import inspect
import io
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import jax
import pytest
from click.testing import CliRunner, Result

import jaxengine
from checkpoints.errors import CheckpointError
from checkpoints.safetensors import Reader
from jaxengine import command, export
from jaxengine.config import ConfigError
from jaxengine.plan import Plan

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
COMMANDS: dict[str, click.Command] = dict(command.app.commands)
LOADING: list[click.Option] = command.loads(lambda: None).__click_params__  # pyright: ignore[reportFunctionMemberAccess]


def invoke(*words: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(command.app, words, input=stdin)


def environment(cache: Path | None = None) -> dict[str, str]:
    kept = os.environ | ({"XDG_CACHE_HOME": str(cache)} if cache else {"JAX_ENABLE_COMPILATION_CACHE": "false"})
    for name in ("JAX_COMPILATION_CACHE_DIR", "PYTHONUNBUFFERED"):
        kept.pop(name, None)
    return kept


def start(*words: str, **streams: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *words], text=True, env=environment(), cwd=ROOT, **streams)


def run(*words: str, cache: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment(cache), cwd=ROOT, check=False, **options
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Options and help


def test_help_lists_the_commands() -> None:
    shown = invoke("--help")
    assert shown.exit_code == 0
    assert list(COMMANDS) == ["generate", "plan", "convert", "layers", "finetune", "quantize"]
    for name in COMMANDS:
        assert f"\n  {name} " in shown.output


def defaults(name: str) -> dict[str, Any]:
    """What a command is called with where no option is given."""
    words = {
        "generate": ["a", "b"], "convert": ["a", "b", "--to", "hf"], "plan": ["a", "--gpu", "h200"], "layers": [],
        "finetune": ["a", __file__], "quantize": ["a", __file__, "--out", "c"],
    }[name]  # fmt: skip
    return COMMANDS[name].make_context(name, words).params


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_sentence_for_each_option_and_its_default(name: str) -> None:
    shown = " ".join(invoke(name, "--help").output.split())
    options = [p for p in COMMANDS[name].params if isinstance(p, click.Option)]
    assert options
    for option in options:
        assert option.help is not None
        assert option.help.endswith(".")
        assert option.help in shown
        assert len(option.help) < 90
        value = defaults(name)[option.name or ""]
        if not option.required and value not in (None, False, True, (), "hf"):
            assert f"{option.help} [default: {value}" in shown


def test_the_options_of_load_are_all_there_with_the_plans_defaults() -> None:
    options = {o.name: o for o in LOADING}
    assert set(options) == set(inspect.signature(jaxengine.load).parameters) - {"folder", "progress"}
    given = defaults("generate")
    fields = {"weights": "weights", "home": "home", "kv": "kv_codec", "kv_layout": "kv_layout"}
    assert options["sharding"].show_default == "as --mesh"  # where there is one
    for name, option in options.items():
        assert given[name] == (() if option.multiple else None)  # so that a plan's own field stands
        if name in fields:
            assert option.show_default == getattr(Plan(), fields[name])


@pytest.mark.parametrize("name", ["generate", "convert"])
def test_scripts_are_the_commands(name: str) -> None:
    script = run(f"scripts/{name}.py", "--help")
    assert script.returncode == 0
    ours = run("-m", "jaxengine.command", name, "--help")
    assert ours.stdout.splitlines()[1:] == script.stdout.splitlines()[1:]


@pytest.mark.parametrize("name", ["generate", "convert", "eval", "bench", "train_demo"])
def test_scripts_start_jax_and_then_parse(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed_before: list[str] = []
    monkeypatch.setattr(command, "start_jax", lambda: printed_before.append(capsys.readouterr().out))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    assert printed_before == [""]
    shown = capsys.readouterr().out
    assert name in shown.splitlines()[0]
    if name in ("generate", "eval"):
        for option in LOADING:
            assert f"  {option.opts[0]} " in shown


def test_help_does_not_wait_for_jax() -> None:
    done = run("-c", "import sys, jaxengine.command; sys.exit('jax' in sys.modules or 'rich' in sys.modules)")
    assert done.returncode == 0


@pytest.mark.parametrize("imported", [True, False])
def test_start_jax_keeps_programs_unless_it_is_said_where(imported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: dict[str, object] = {}
    stand_in = types.SimpleNamespace(config=types.SimpleNamespace(update=updates.__setitem__))
    folder, names = "/cache/jaxengine/xla", ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    for given in ({}, {names[0]: "/mine", names[1]: "3"}):
        said = {"XDG_CACHE_HOME": "/cache", **given}
        updates.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", said)
            if imported:
                patch.setitem(sys.modules, "jax", stand_in)
            else:
                patch.delitem(sys.modules, "jax")
            command.start_jax()
        assert [said[n] for n in names] == (["/mine", "3"] if given else [folder, "0.2"])
        wanted = {names[0].lower(): folder, names[1].lower(): 0.2} if imported and not given else {}
        assert updates == wanted


# ---------------------------------------------------------------------------------------------------------------------
# What they do


def test_convert_writes_a_folder(tmp_path: Path) -> None:
    done = invoke("convert", str(GOLDEN / "llama"), str(tmp_path / "out"), "--to", "hf", "--dtype", "bfloat16")
    assert (done.exit_code, done.output) == (0, f"wrote {tmp_path / 'out'}\n")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 0.6 * (
        GOLDEN / "llama" / "model.safetensors"
    ).stat().st_size


def test_convert_splits_by_a_size_that_is_given(tmp_path: Path) -> None:
    words = ("convert", str(GOLDEN / "llama"), str(tmp_path / "out"), "--to")
    assert invoke(*words, "hf", "--max-shard-size", "100kB").exit_code == 0
    sizes = [p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 1
    refused = invoke(*words, "orbax", "--max-shard-size", "100kB", "--overwrite")
    assert refused.exit_code == 2
    assert (tmp_path / "out" / "config.json").exists()


def test_text_from_the_demo_and_programs_are_kept(tmp_path: Path) -> None:
    """Streamed text, JSON lines from standard input, and a compilation cache that the second run finds."""
    words = ("-m", "jaxengine.command", "generate", "demo", "import ", "--max-new-tokens", "12")
    first = run(*words, cache=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("import ")
    assert len(first.stdout.strip()) > len("import ")
    kept = {p.name for p in (tmp_path / "jaxengine" / "xla").iterdir()}
    assert any("jit_decode" in n for n in kept)
    again = run(*words[:4], "-", *words[5:], "--json", input="import ", cache=tmp_path)
    assert again.returncode == 0, again.stderr
    assert first.stdout == "import " + json.loads(again.stdout)["text"] + "\n"
    assert {n for n in kept if "jit_decode" in n and n.endswith("-cache")} >= {
        p.name
        for p in (tmp_path / "jaxengine" / "xla").iterdir()
        if "jit_decode" in p.name and p.name.endswith("-cache")
    }


def test_json_of_the_demo_with_log_probabilities_and_a_stop_id(monkeypatch: pytest.MonkeyPatch) -> None:
    model = jaxengine.load(jaxengine.demo_folder())
    monkeypatch.setattr(jaxengine, "load", lambda folder, **options: model)
    words = ("generate", "demo", "import ", "--max-new-tokens", "6", "--json", "--logprobs", "3")
    row = json.loads(invoke(*words).stdout)
    assert len(row["tokens"]) == len(row["logprobs"]) == len(row["top_logprobs"]) == 6
    for token, logprob, likeliest in zip(row["tokens"], row["logprobs"], row["top_logprobs"], strict=True):
        assert len(likeliest) == 3
        assert likeliest[str(token)] == logprob == max(likeliest.values())  # greedy
        assert sum(map(math.exp, likeliest.values())) <= 1 + 2.0**-20
    third = row["tokens"][2]
    for ids in ((third,), (model.config.vocab_size - 1, third)):
        stopped = json.loads(invoke(*words, *(w for i in ids for w in ("--stop-id", str(i)))).stdout)
        assert stopped["tokens"] == row["tokens"][: row["tokens"].index(third) + 1]
        assert stopped["finish_reason"] == "stop"


class Recorded:
    """A model that says what it was asked, and gives what it was made with."""

    def __init__(self, *texts: str):
        self.texts, self.asked = texts, list[tuple[Any, dict[str, Any]]]()

    def generate(self, prompt: Any, **options: Any) -> list[jaxengine.Completion]:
        self.asked.append((prompt, options))
        beside = [-0.5], [{1: -0.5, 7: -2.0}]
        return [jaxengine.Completion(text, [1], "length", 0, *beside) for text in self.texts]

    def stream(self, prompt: Any, **options: Any) -> Iterator[str]:
        self.asked.append((prompt, options))
        return iter(self.texts)


def test_prompts_chats_and_several_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Recorded("one", "zwei\n")
    monkeypatch.setattr(jaxengine, "load", lambda folder, **options: model)
    assert invoke("generate", "demo", "a ").stdout == "a onezwei\n\n"
    assert invoke("generate", "demo", "-", stdin="a\n ").stdout == "a\n onezwei\n\n"
    assert invoke("generate", "demo", "a", "-n", "2").stdout == "--- 1\naone\n--- 2\nazwei\n\n"
    assert invoke("generate", "demo", "a", "-n", "2", "--chat").stdout == "--- 1\none\n--- 2\nzwei\n\n"
    assert invoke("generate", "demo", "a", "--chat").stdout == "onezwei\n\n"
    rows = invoke("generate", "demo", "a", "--chat", "--json").stdout.splitlines()
    assert [json.loads(row)["text"] for row in rows] == list(model.texts)
    chat = [{"role": "user", "content": "a"}]
    assert [prompt for prompt, _ in model.asked] == ["a ", "a\n ", "a", chat, chat, chat]
    assert [options.get("n") for _, options in model.asked] == [None, None, 2, 2, None, 1]


def test_json_holds_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxengine, "load", lambda folder, **options: Recorded("x", "y"))
    row: dict[str, Any] = {"text": "x", "tokens": [1], "finish_reason": "length"}
    own: dict[str, Any] = {"logprobs": [-0.5]}
    for words, beside in (
        ((), {}),
        (("--logprobs", "0"), own),
        (("--logprobs", "2"), own | {"top_logprobs": [{"1": -0.5, "7": -2.0}]}),
    ):
        lines = invoke("generate", "demo", "a", "--json", "-n", "2", *words).stdout.splitlines()
        assert [json.loads(line) for line in lines] == [row | beside, row | {"text": "y"} | beside]


@pytest.mark.parametrize("given", [(), ("--json",)])
def test_options_of_generate_arrive(given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every keyword of `Model.generate` is an option, and what is not given is its default."""
    model = Recorded("x")
    monkeypatch.setattr(jaxengine, "load", lambda folder, **options: model)
    chosen: dict[str, Any] = {
        "max_new_tokens": 7, "temperature": 0.5, "top_k": 4, "top_p": 0.75, "min_p": 0.25, "repetition_penalty": 1.5,
        "presence_penalty": 0.125, "frequency_penalty": -0.5, "seed": 9,
    }  # fmt: skip
    words = [w for name, value in chosen.items() for w in ("--" + name.replace("_", "-"), str(value))]
    several = ("--stop", "a b", "--stop", "c", "--stop-id", "3", "--stop-id", "0")
    beside: dict[str, Any] = {"n": 1, "logprobs": 2} if given else {}
    invoke("generate", "demo", "x", *words, *several, *given, *(("--logprobs", "2") if given else ()))
    invoke("generate", "demo", "x", *given)
    assert model.asked[0][1] == chosen | beside | {"stop": ("a b", "c"), "stop_ids": (3, 0)}
    keywords = inspect.signature(jaxengine.Model.generate).parameters.values()
    usual = {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY}
    assert model.asked[1][1] == {k: v for k, v in usual.items() if given or k not in ("n", "logprobs")}


def test_options_go_before_the_fields_of_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"weights": "int8", "kv_codec": "int8", "home": "host"}))
    words = ("generate", "demo", "x", "--max-new-tokens", "1", "--show-plan", "--plan", str(path))
    done = invoke(*words, "--kv", "raw", "--home", "device", "--form", "unrolled", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    wanted = Plan(weights="int8", kv_codec="raw", home="device", form="unrolled", dtype="float32")
    assert str(wanted) in done.output


def test_eval_takes_the_demo_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class FoundError(Exception): ...

    def load(folder: str, **options: Any) -> None:
        given.append((folder, options))
        raise FoundError

    given: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(jaxengine, "load", load)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    main = runpy.run_path(str(ROOT / "scripts" / "eval.py"))["main"]
    for words in (["--weights", "int8"], ["demo", "--weights", "int8"]):
        assert isinstance(CliRunner().invoke(main, words).exception, FoundError)
    assert given[0][0] == given[1][0] == jaxengine.demo_folder()
    chosen = {k: v for k, v in given[0][1].items() if k != "progress" and v is not None}
    assert chosen == {"weights": "int8"}


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_errors_are_one_line_and_status_2(tmp_path: Path) -> None:
    for words in (
        ("generate", str(tmp_path), "hello"),
        ("generate", str(tmp_path / "nowhere"), "hello"),
        ("generate", str(GOLDEN / "llama"), "hello"),
        ("generate", str(GOLDEN / "llama"), "hello", "--memory", "1kB"),
        ("generate", str(GOLDEN / "llama"), "hello", "--form", "sideways"),
        ("convert", str(GOLDEN / "llama"), str(GOLDEN / "llama"), "--to", "hf"),
        ("convert", str(GOLDEN / "llama"), str(tmp_path / "x"), "--to", "gguf"),
        ("convert", str(GOLDEN / "llama"), str(tmp_path / "x"), "--to", "hf", "--max-shard-size", "much"),
    ):
        done = invoke(*words)
        assert done.exit_code == 2, (words, done.exception)
        assert done.output.startswith("error: ")
        assert done.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_errors_go_to_standard_error(tmp_path: Path) -> None:
    done = run("-m", "jaxengine.command", "generate", str(tmp_path), "hello")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_bad_options_are_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxengine, "load", None)
    bad = {name: tmp_path / name for name in ("text", "list", "field")}
    for path, text in zip(bad.values(), ("{", "[1, 2]", '{"wieghts": "int8"}'), strict=True):
        path.write_text(text)
    for words, said in (
        (("--logprobs", "2"), "give --json too"),
        (("--logprobs", "-1", "--json"), "--logprobs"),
        (("--stop-id", "-1"), "--stop-id"),
        (("-n", "0"), "-n"),
        (("--max-new-tokens", "0"), "--max-new-tokens"),
        (("--top-p", "1.5"), "top_p=1.5"),
        (("--plan", str(tmp_path / "none")), "does not exist"),
        (("--plan", str(bad["text"])), "is not JSON"),
        (("--plan", str(bad["list"])), "holds [1, 2]"),
        (("--plan", str(bad["field"])), "unknown field wieghts"),
    ):
        done = invoke("generate", "demo", "hello", *words)
        assert done.exit_code == 2, (words, done.exception)
        assert said in done.output
    done = invoke("generate", "demo", "-", stdin=b"\xff\xfe")
    assert done.exit_code == 2
    assert "standard input is not utf-8 text" in done.output


SIZE = "write a size such as '16GB' (10^9 bytes), '15.5GiB' (2^30), or a number of bytes"


def test_the_last_line_says_what_was_given_and_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sizes that are none, whichever command they are given to, and of a card that is not known."""
    monkeypatch.setattr(Reader, "read", lambda *given, **options: pytest.fail("it was read"))
    (tmp_path / "data.jsonl").write_text('{"text": "ab"}\n')
    llama, out = str(GOLDEN / "llama"), tmp_path / "out"
    plan, generate = ["plan", llama, "--gpu", "h200", "--no-compile"], ["generate", llama, "a"]
    finetune = ["finetune", llama, str(tmp_path / "data.jsonl"), "--out", str(out)]
    for words, said in (
        *(
            ([*words, option, value], f"Error: Invalid value for '{option}': {value} is not in the range x>=1.")
            for words in (plan, generate, finetune)
            for option, value in (("--context", "-1"), ("--batch", "0"))
        ),
        *(([*words, "--memory", "-1GB"], f"error: memory is '-1GB'; {SIZE}") for words in (plan, generate, finetune)),
        ([*plan, "--ram", "-2GB"], f"error: ram is '-2GB'; {SIZE}"),
        ([*generate, "--memory", "1GB", "--ram", "-2GB"], f"error: ram is '-2GB'; {SIZE}"),
        ([*finetune, "--memory", "1GB", "--ram", "-2GB"], f"error: ram is '-2GB'; {SIZE}"),
        (
            ["plan", llama, "--gpu", "rtx409", "--no-compile"],
            "error: no card is known as 'rtx409'; the nearest are RTX 4090, L40S, RTX 3090; or give the card by numbers, such as"
            " 'sm_89,memory=24GB,bandwidth=1008GB/s,link=25GB/s,cores=128'",
        ),
    ):
        done = invoke(*words)
        assert (done.exit_code, done.stdout) == (2, ""), (words, done.exception)
        assert done.stderr.splitlines()[-1] == said
    assert not out.exists()


RAISED = {
    "jax's": "return jnp.broadcast_to(jnp.ones(3), (2,))",
    "jax's, without its frames": "return jax.vmap(jnp.add)(jnp.ones(3), jnp.ones(4))",
    "jax's, without its frames, in a block": "with jax.named_scope('x'):\n  return jax.vmap(jnp.add)(jnp.ones(3), jnp.ones(4))",
    "numpy's": "return np.ones(2) + np.ones(3)",
    "Python's": "return int('x')",
    "another module's": "import json\n return json.loads('{')",
}
REFUSED = {
    "ours": "raise ValueError('the rule')",
    "ours, in a block": "with jax.named_scope('x'):\n  raise ValueError(\n   'the rule'\n  )",
    "ours, from another": "try:\n  int('x')\n except ValueError as e:\n  raise ValueError('the rule') from e",
}
MODES = ("off", "tracebackhide", "remove_frames", "quiet_remove_frames")


@pytest.fixture(params=MODES)
def filtering(request: pytest.FixtureRequest) -> Iterator[str]:
    """jax's ways of taking its frames out of tracebacks."""
    before = jax.config.values["jax_traceback_filtering"]
    jax.config.update("jax_traceback_filtering", request.param)
    yield request.param
    jax.config.update("jax_traceback_filtering", before)


def inject(body: str, module: str = "jaxengine.injected") -> Callable[..., Any]:
    """A function of a module of that name, which takes the place of `load`."""
    place: dict[str, Any] = {"__name__": module}
    exec(
        f"import jax, jax.numpy as jnp, numpy as np\ndef refuse():\n {body}\ndef load(*a, **k):\n return refuse()",
        place,
    )
    return place["load"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", RAISED)
def test_errors_that_others_raise_in_our_code_keep_their_trace(
    case: str, compiled: bool, filtering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = inject(RAISED[case])
    monkeypatch.setattr(jaxengine, "load", (lambda *a, **k: jax.jit(load)()) if compiled else load)
    done = CliRunner().invoke(command.app, ["generate", "demo", "x"])
    assert done.exit_code == 1
    assert type(done.exception).__mro__[-4:-2] == (ValueError, Exception)
    assert done.output == ""
    if "without its frames" in case and filtering.endswith("remove_frames"):  # the case is what it says
        assert done.exc_info is not None
        trace = done.exc_info[2]
        while trace.tb_next is not None:
            trace = trace.tb_next
        assert trace.tb_frame.f_globals["__name__"] == "jaxengine.injected"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_errors_that_we_raise_are_one_line(
    case: str, compiled: bool, filtering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("jaxengine", "sharding.rules", "checkpoints.table", "pallas_kernels.x"):
        load = inject(REFUSED[case], module)
        monkeypatch.setattr(jaxengine, "load", (lambda *a, load=load, **k: jax.jit(load)()) if compiled else load)
        done = invoke("generate", "demo", "x")
        assert (done.exit_code, done.output) == (2, "error: the rule\n")
    monkeypatch.setattr(jaxengine, "load", inject(REFUSED[case], "jaxengineering"))
    assert invoke("generate", "demo", "x").exit_code == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CheckpointError("the file"), "the file"),
        (ConfigError("the field"), "the field"),
        (FileNotFoundError(2, "No such file or directory", "x/y"), "x/y: No such file or directory"),
        (FileExistsError("there already"), "there already"),
        (NotADirectoryError(20, "Not a directory", "x"), "x: Not a directory"),
        (PermissionError(13, "Permission denied", "x"), "x: Permission denied"),
        (KeyError("x"), None),
        (TypeError("x"), None),
        (OSError(28, "No space left on device", "x"), "x: No space left on device"),
        (OSError(27, "File too large", "x"), "x: File too large"),
        (OSError(5, "Input/output error", "x"), None),
    ],
)
def test_errors_by_their_type(error: Exception, line: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*a: Any, **k: Any) -> None:
        raise error

    monkeypatch.setattr(jaxengine, "load", load)
    done = invoke("generate", "demo", "x")
    assert (done.exit_code, done.output) == ((1, "") if line is None else (2, f"error: {line}\n"))
    assert line is not None or done.exception is error


STAND_IN = """
import signal, sys, time, types, jax, jax.numpy as jnp, jaxengine
from jaxengine import command
def wait():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
def when_told():
    print("ready", file=sys.stderr, flush=True)
    sys.stdin.readline()
    row = types.SimpleNamespace(text="line", tokens=[1], finish_reason="length")
    return types.SimpleNamespace(stream=lambda *a, **k: iter(["line"]), generate=lambda *a, **k: [row, row], disk_stats=None)
jaxengine.load = lambda *a, **k: {}
command.main()
"""


def test_a_fault_shows_its_trace() -> None:
    done = run("-c", STAND_IN.format("jax.vmap(jnp.add)(jnp.ones(3), jnp.ones(4))"), "generate", "demo", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" in done.stderr
    assert "ValueError: vmap got inconsistent sizes" in done.stderr


def test_ctrl_c_ends_with_130_and_without_a_trace() -> None:
    with start("-c", STAND_IN.format("wait()"), "generate", "demo", "x", stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait() == 130


@pytest.mark.parametrize("words", [(), ("--json",), ("-n", "2")])
def test_a_reader_that_has_gone_is_no_error(words: tuple[str, ...]) -> None:
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with start("-c", STAND_IN.format("when_told()"), "generate", "demo", "", *words, **streams) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


# ---------------------------------------------------------------------------------------------------------------------
# The progress bar

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor


class Terminal(io.StringIO):
    """Standard error as a terminal, which keeps what it is told."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("end", [None, CheckpointError("torn"), KeyError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["generate", "convert"])
def test_the_bar_gives_the_terminal_back_however_it_ends(
    name: str, end: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)

    def half(*given: Any, **options: Any) -> Any:
        (options.get("progress") or options["track"])("first", 5, 10)
        assert HIDE in terminal.getvalue()
        assert SHOW not in terminal.getvalue()
        if end is not None:
            raise end
        return types.SimpleNamespace(stream=lambda *a, **k: iter(()), disk_stats=None)

    monkeypatch.setattr(jaxengine, "load", half)
    monkeypatch.setattr(export, "convert", half)
    words = {"generate": ["demo", "x"], "convert": ["demo", "x", "--to", "hf"]}[name]
    status = {type(None): 0, CheckpointError: 2, KeyboardInterrupt: 130}.get(type(end))
    with pytest.raises(KeyError if status is None else SystemExit) as ended:
        COMMANDS[name].main(words, prog_name=name)
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == status
    shown, said, after = terminal.getvalue().partition(SHOW)
    assert shown.count(HIDE) == 1
    assert said
    assert ("error: torn" in after) == (status == 2)
    assert "torn" not in shown


def test_the_bar_is_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with command.Reading() as bar:
        bar("first", 5, 10)
        bar("last", 10, 10)
    assert capsys.readouterr() == ("", "")


STARTED = """
import os, sys
from jaxengine import command, machine
asked = []
machine.ask_for_large_pages = lambda environ: not asked.append(environ.update({machine.TUNABLES: "x"}))
command.start_anew_with_large_pages()
anew = command.ANEW in sys._xoptions
print(len(asked), sys.flags.utf8_mode, anew, sys.argv[1:], os.environ.get(machine.TUNABLES))
"""


@pytest.mark.parametrize("way", ["file", "-c", "stdin", "no interpreter", "cleared"])
def test_a_process_starts_anew_once(way: str, tmp_path: Path) -> None:
    """Whatever the environment then is; with its own arguments and interpreter's options; not where its text would be lost."""
    file = tmp_path / "program.py"
    text = (
        STARTED if way != "no interpreter" else STARTED.replace("command.start", "sys.executable = None; command.start")
    )
    file.write_text(text)
    python = Path(sys.executable)
    if way == "cleared":  # a launcher that hands nothing on
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nunset GLIBC_TUNABLES\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        file.write_text(text.replace("command.start", f"sys.executable = {str(python)!r}; command.start"))
    what = {"-c": ["-c", text], "stdin": ["-"]}.get(way, [str(file)])
    environ = {n: v for n, v in os.environ.items() if n != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [str(python), "-X", "utf8", *what, "a", "b"], input=text if way == "stdin" else None, env=environ,
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    again = way in ("file", "-c", "cleared")
    told = "x" if way in ("file", "-c") else None
    assert done.stdout.split("\n")[-2] == f"0 1 {again} ['a', 'b'] {told}"
