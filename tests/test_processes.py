"""Two processes with two devices each: layers are streamed from each one's host memory, and what comes out is that of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxengine

PROMPTS = ["2 + 2 =", "for i in range("]
WAYS: dict[str, dict[str, Any]] = {
    "host": {"home": "host", "mesh": "fsdp=4", "sharding": "fsdp"},
    "budget": {"memory": "1GB", "ram": "4GB", "mesh": "fsdp=4", "sharding": "fsdp"},
    "split": {"home": "split", "resident": 1, "mesh": "data=2,tensor=2", "sharding": "tensor"},
}
CODE = """
import itertools, json, sys, types
import numpy as np
from sharding.mesh import initialize_distributed
initialize_distributed()
import jax, jaxengine
from jax.experimental import multihost_utils
prompts, ways = json.loads(sys.argv[1])
found = {}
for name, how in ways.items():
    model = jaxengine.load(jaxengine.demo_folder(), dtype="float32", **how)
    streamed = [x for x in jax.tree.leaves(model.params["banks"]) if x.sharding.memory_kind == "pinned_host"]
    logits = multihost_utils.process_allgather(model.logits(np.arange(24).reshape(2, 12)), tiled=True)
    made = model.generate(prompts, max_new_tokens=8, n=2, logprobs=1)
    drawn = model.generate(prompts, max_new_tokens=8, n=2, temperature=1.0) if name == "split" else []
    clock = itertools.count(0, 0 if jax.process_index() else 1)  # one is slow, one is fast
    jaxengine.model.time = types.SimpleNamespace(perf_counter=clock.__next__)
    text = "".join(model.stream(prompts[1], max_new_tokens=40, stop="str"))
    found[name] = {
        "text": text,
        "logits": np.asarray(logits).tolist(),
        "made": [[c.tokens, c.logprobs] for c in made],
        "drawn": [c.tokens for c in drawn],
        "streamed": [len(streamed), sum(len(x.addressable_shards) == 2 and not x.is_fully_addressable for x in streamed)],
    }
for what in (lambda: jaxengine.load(jaxengine.demo_folder(), home="disk", mesh="fsdp=4", sharding="fsdp"),
             lambda: model.save(sys.argv[2]),
             lambda: jaxengine.load(jaxengine.demo_folder(), memory="1GB", mesh="fsdp=4", sharding="fsdp")):
    try:
        what()
    except ValueError as error:
        found.setdefault("refused", []).append(str(error))
own = jaxengine.load(jaxengine.demo_folder(), dtype="float32")  # on this process's first device
if jax.process_index() == 0:
    found["alone"] = [c.tokens for c in own.generate(prompts, max_new_tokens=8)]
drawn = own.generate(prompts, max_new_tokens=24, temperature=1.0)
folder = sys.argv[2] + str(jax.process_index())
own.save(folder)
try:
    own.save(folder + "o", format="orbax")
except ValueError as error:
    found["refused"].append(str(error))
found["own"] = [c.tokens for c in drawn]
with open(sys.argv[3] + str(jax.process_index()), "w") as file:
    json.dump(found, file)
"""


@pytest.mark.thorough
def test_streamed_layers_of_two_processes_give_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_NUM_PROCESSES": "2",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    words = [sys.executable, "-c", CODE, json.dumps([PROMPTS, WAYS]), str(tmp_path / "saved"), str(tmp_path / "found")]
    with (tmp_path / "log").open("w") as log:
        jobs = [subprocess.Popen(words, env=env | {"JAX_PROCESS_ID": i}, stdout=log, stderr=log) for i in ("0", "1")]
        try:
            for job in jobs:
                assert job.wait(300) == 0, (tmp_path / "log").read_text()
        finally:
            for job in jobs:
                job.kill()
                job.wait()
    found = [json.loads((tmp_path / f"found{i}").read_text()) for i in (0, 1)]
    alone, own = found[0].pop("alone"), [f.pop("own") for f in found]
    assert found[0] == found[1]
    model = jaxengine.load(jaxengine.demo_folder(), dtype="float32")
    logits = np.asarray(model.logits(np.arange(24).reshape(2, 12)))
    made = model.generate(PROMPTS, max_new_tokens=8, n=2, logprobs=1)
    text = "".join(model.stream(PROMPTS[1], max_new_tokens=40, stop="str"))
    for name in WAYS:
        assert found[0][name]["text"] == text
        streamed, shared = found[0][name]["streamed"]
        assert shared == streamed
        assert (streamed > 0) == (name != "budget")  # which holds all
        np.testing.assert_allclose(found[0][name]["logits"], logits, rtol=0, atol=1e-4)
        assert [tokens for tokens, _ in found[0][name]["made"]] == [c.tokens for c in made]
        theirs, ours = (
            [p for c in each for p in c]
            for each in ([x[1] for x in found[0][name]["made"]], [c.logprobs for c in made])
        )
        np.testing.assert_allclose(theirs, ours, atol=1e-4)
    drawn = found[0]["split"]["drawn"]
    assert len({tuple(tokens) for tokens in drawn}) == len(drawn) == 4
    disk, save, budget, orbax = found[0]["refused"]
    assert "home is 'disk', and the mesh 'fsdp=4' is of 2 processes: layers are read from disk by one" in disk
    assert "save: one process writes a model, and the mesh 'data=2,tensor=2' is of 2: load it on devices" in save
    assert not (tmp_path / "saved").exists()
    assert "memory is '1GB', and the mesh 'fsdp=4' is of 2 processes, of which each may" in budget
    # a model that is in one process is that one's alone
    assert alone == [c.tokens for c in model.generate(PROMPTS, max_new_tokens=8)]
    assert own[0] != own[1]
    assert "save: orbax writes with all 2 processes, and this model is in one of them" in orbax
    for folder in (tmp_path / "saved0", tmp_path / "saved1"):
        again = jaxengine.load(folder, dtype="float32")
        assert [c.tokens for c in again.generate(PROMPTS, max_new_tokens=8)] == alone
