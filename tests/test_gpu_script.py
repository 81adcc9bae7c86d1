"""benchmarks/gpu.py whole, with tiny shapes on the CPU: every case ends, every check has a limit and holds, and fails
if the thing that it checks is wrong. What only a GPU can show is not tested here."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, ranks, script

from common import batches
from common.batches import flat_batch

NUMERIC = {"scripts": 16, "reward_model": 4, "cpu_offload": 2, "deterministic": 5, "attention": 8,
           "logprobs": 2, "rollout_logprobs_loop": 4, "rollout_logprobs_continuous": 4, "dpo_update": 2,
           "grpo_update": 2, "head": 2, "compile": 2, "activation_checkpointing": 2}  # fmt: skip
QUICK = ["attention", "logprobs", "rollout_logprobs_continuous", "sft_0.6b", "grpo_update", "head", "trl_dpo",
         "rollout_loop", "activation_checkpointing"]  # one of each function that makes cases
TIMED = ["sft_1.7b", "sft_0.6b", "dpo_update", "grpo_update", "head", "rollout_continuous", "rollout_loop", "compile"]


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "script", script)
    monkeypatch.setenv("GPU_SCRATCH", str(tmp_path))
    return module


@pytest.mark.parametrize("cases", [QUICK, pytest.param([], marks=pytest.mark.slow)], ids=["quick", "all"])
def test_tiny(cases, tmp_path):
    """As a user runs it: one row a case, none with an error, all with the command and digest that made them."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--output", str(tmp_path / "gpu.jsonl")]
    command += ["--only", *cases] if cases else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["case"]: row for row in map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())}
    lines = done.stdout.splitlines()
    assert len(lines) == len(rows) + 1 and all(line.startswith("ok ") for line in lines[:-1])
    for name, row in rows.items():
        assert row["ok"] and "error" not in row, row
        assert row["sha256"] and "--tiny" in row["command"] and row["versions"]["torch"] and row["device"]
        assert len(row["checks"]) >= NUMERIC.get(name, 0)
        assert all(0 <= check["value"] <= check["limit"] for check in row["checks"])
    assert cases == [] or sorted(rows) == sorted(cases)
    for name in [name for name in TIMED if name in rows]:
        numbers = rows[name]["numbers"]
        variants = [x for x in [numbers, *numbers.values()] if isinstance(x, dict) and "tokens_per_s" in x]
        assert variants and all(x["range"][0] <= x["seconds"] <= x["range"][1] and x["tokens"] > 0 for x in variants)


def test_halves(gpu):
    """Each case is in one half, and the first half holds what is about numbers."""
    assert sorted(gpu.HALVES[1] + gpu.HALVES[2]) == sorted(gpu.CASES)
    assert {"scripts", "reward_model", "cpu_offload", "deterministic", "attention", "logprobs"} <= set(gpu.HALVES[1])


def test_scripts_see_an_alert(gpu, monkeypatch):
    """A run that ends well and warns is not ok."""
    monkeypatch.setitem(gpu.CASES, "warns", (lambda lab: gpu.whole_run(lab, "sft"), (), 60))
    health = importlib.import_module("common.runtime.health")
    whole = health.check_share

    def warns(run, code, part, *more, **limits):
        whole(run, code, part, *more, **limits)
        if code == "DATA005":
            health.check(run, code, 0, "share", 1.0, "a test", warn=0)

    monkeypatch.setattr(health, "check_share", warns)
    row = forked(gpu, "warns")
    assert not row["ok"] and [c["value"] for c in row["checks"]] == [1, 0], row


# ---- a check sees what it is for -------------------------------------------------------------------------------------


def broken(gpu, name):
    """The checks of a case that are over their limits."""
    lab = gpu.Lab(tiny=True)
    gpu.CASES[name][0](lab, *gpu.CASES[name][1])
    return [check["name"] for check in lab.checks if not check["value"] <= check["limit"]]


def forked(gpu, name):
    """As `broken`, in a process of its own: process groups and patches stay there."""
    return gpu.run_case(name, True, 120, gpu.Path(os.environ["GPU_SCRATCH"]))


def test_attention_sees_a_forgotten_window(gpu, monkeypatch):
    assert broken(gpu, "attention") == []
    whole = gpu.flat_attention
    wrong = lambda *inputs, sliding_window=None, **more: whole(*inputs, **more)  # noqa: E731
    monkeypatch.setattr(gpu, "flat_attention", wrong)
    found = {name.split(":")[0] for name in broken(gpu, "attention")}
    assert found == {f"{x}, window 8" for x in ("out", "dq", "dk", "dv")}


def test_rollout_sees_stale_pages(gpu, monkeypatch):
    from transformers.generation.continuous_batching import PagedAttentionCache

    monkeypatch.setattr(PagedAttentionCache, "reset", lambda self: None)
    row = forked(gpu, "rollout_logprobs_continuous")
    wrong = [check["name"] for check in row["checks"] if check["value"] > check["limit"]]
    assert not row["ok"] and wrong and all(name.startswith("weights 1") for name in wrong)


def test_update_sees_a_wrong_prompt(gpu, monkeypatch):
    """Keys of a shared prompt that are shifted by one change the loss, and no repeated prompt has any."""
    whole = batches.flat_batch

    def shifted(*inputs):
        batch = whole(*inputs)
        return batch if batch["kv_index"] is None else batch | {"kv_index": (batch["kv_index"] - 1).clamp(min=0)}

    monkeypatch.setattr(batches, "flat_batch", shifted)  # where micro_batches calls it
    row = forked(gpu, "dpo_update")
    assert not row["ok"] and any(check["value"] > check["limit"] for check in row["checks"])


# ---- a case that fails costs itself ----------------------------------------------------------------------------------


def raises(lab):
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


def wrong(lab):
    lab.check("something", float("nan"), 1.0)


@pytest.mark.parametrize("fault, said", [
    (raises, "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB."), (wrong, "something nan > 1"),
    (lambda lab: os.kill(os.getpid(), 9), "its process ended with -9"),
    (lambda lab: time.sleep(60), "ended after 2 s, its limit"), (lambda lab: sys.exit(3), "SystemExit: 3"),
])  # fmt: skip
def test_failure_is_one_line(gpu, tmp_path, fault, said):
    gpu.CASES["fault"] = fault, (), 2
    row = gpu.run_case("fault", True, 2, tmp_path)
    line = gpu.describe(row)
    assert not row["ok"] and line.startswith("FAILED") and line.endswith(said) and "\n" not in line


def _count(_rank, _world, gpu):
    _, _, lm = gpu.Lab(tiny=True).prepare("sft", "0.6b")
    group = {"prompt": gpu.array("i"), "completions": [{"ids": gpu.array("i", range(96)), "scored": None}]}
    return gpu.count_flops(lm, [flat_batch([group])])


def test_useful_flops(gpu):
    """The docstring's formula for one whole sequence, by hand: D 64, I 128, V 512, 2 layers of 4 and 2 heads of 16."""
    ((tokens, flops),) = ranks(1, _count, gpu)
    layer = 64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 128
    assert tokens == 96
    assert flops == 6 * (2 * layer * 96 + 512 * 64 * 95) + 12 * 2 * 4 * 16 * 96 * 97 / 2  # 95: the first is not scored
