"""--activation_checkpointing and --compile: what they save, when auto decides for it, and that nothing else changes.

The oracle of "what autograd keeps": all storages that the forward allocated and that are alive after it, counted by a
dispatch mode, on a batch of another size than the probe of the script.
"""
import gc
import re
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import pytest
import torch
from conftest import newest, ranks, read_jsonl, script, tiny_rows, train
from test_logprobs import FLAT, build, gradients, make_groups
from test_split import metric_differences, weight_differences
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from common.batches import flat_batch, probe_groups
from common.logprobs import Policy
from common.runtime import model
from common.runtime.launch import setup
from common.runtime.parallel import full

ROWS = {"sft": 1e-4, "dpo": 8e-5, "grpo": 5e-5}  # learning rates of the fast flags


class Alive(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.storages = WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.storages[x.untyped_storage()] = x.untyped_storage().nbytes()
        return out


def alive_after_forward(policy, groups):
    """Bytes, and tokens of the batch."""
    batch, mode = flat_batch(groups), Alive()
    with mode:
        out = policy(batch)["logprobs"]
    gc.collect()
    kept = sum(mode.storages.values()) - out.untyped_storage().nbytes()
    return kept, len(batch["input_ids"]), out


def make_policy(rank, world, folder, flag, free, tokens=100, **more):
    """The script's own policy of the tiny model after fit_memory, with `free` bytes on this rank; what it keeps of a
    batch and its gradients there."""
    sft = script("sft")
    argv = ["--output_dir", f"{folder}/{rank}-{flag}", "--activation_checkpointing", flag]
    argv += [w for k, v in more.items() for w in (f"--{k}", str(v))]
    model.free_bytes = lambda: free[rank] if isinstance(free, list) else free
    args = sft.parse_args(argv)
    run = setup(args, sft.__file__)
    run.mesh = init_device_mesh("cpu", run.mesh_shape, mesh_dim_names=("replicate", "shard", "tp"))
    tokenizer, lm = model.load_model(AutoModelForCausalLM, args)
    policy = model.load_weights(run, sft.shard(Policy(lm), run))
    said = model.fit_memory(run, policy, tokenizer, tokens)
    groups = probe_groups(lm.config.vocab_size) * 7
    kept, count, out = alive_after_forward(policy, groups)
    out.sum().backward()
    grads = {name: full(p.grad).clone() for name, p in policy.named_parameters()}
    again = [m.forward.func.__name__ == "checkpoint" if hasattr(m.forward, "func") else False for m in policy.modules()
             if isinstance(m, sft.GradientCheckpointingLayer)]
    return SimpleNamespace(kept=kept, tokens=count, grads=grads, again=set(again), said=said)


def test_layers_that_are_computed_again_keep_their_input_only(tmp_path):
    (off,), (on,) = (ranks(1, make_policy, str(tmp_path), flag, 1e15) for flag in ("off", "on"))
    assert (off.again, on.again) == ({False}, {True})
    assert on.kept < off.kept / 3, (on.kept, off.kept)  # four layers keep little more than their inputs
    for name, grad in off.grads.items():
        assert torch.equal(grad, on.grads[name]), name  # the same kernels on the same numbers


def test_auto_knows_what_a_micro_batch_will_keep(tmp_path):
    (found,) = ranks(1, make_policy, str(tmp_path), "auto", 1e15, 280)
    (fine,) = ranks(1, make_policy, str(tmp_path / "more"), "auto", 1e15, 280_000)
    said = float(re.search(r"up to ([\d.]+) GB of activations", fine.said)[1]) * 1e9 / 280_000
    assert found.again == {False} and said == pytest.approx(found.kept / found.tokens, rel=0.05)  # other scored shares


@pytest.mark.parametrize("free, again", [(1e15, {False}), (0, {True}), ([1e15, 0], {True})])
def test_auto_decides_by_bytes_and_all_ranks_alike(free, again, tmp_path):
    assert [r.again for r in ranks(2, make_policy, str(tmp_path), "auto", free)] == [again, again]


@pytest.mark.parametrize("name, world, more", [
    ("grpo", 1, ()), pytest.param("dpo", 2, (), marks=pytest.mark.slow), ("sft", 2, ("--tp_size", 2))])
def test_a_run_ends_the_same(name, world, more, tmp_path):
    rows, runs = tiny_rows(name, tmp_path / "rows.jsonl", 10), {}
    for flag in "off", "on":
        train(name, tmp_path / flag, "--dataset", rows, "--batch_size", 5, "--max_steps", 2, "--save_every", 0,
              "--eval_every", 0, "--eval_rows", 2, "--activation_checkpointing", flag, *more, world=world)
        runs[flag] = read_jsonl(tmp_path / flag / "metrics.jsonl")
    assert not metric_differences(runs["off"], runs["on"])
    assert not weight_differences(newest(tmp_path / "off"), newest(tmp_path / "on"), ROWS[name])


def counted(path, free):
    """`free` bytes on every rank; the numbers of gathers and reductions that FSDP2 has begun go to `path`, step by
    step."""

    def patch(module):
        calls = {"foreach_all_gather": 0, "foreach_reduce": 0}
        model.free_bytes = lambda: free
        for name in calls:
            function = getattr(_fsdp_param_group, name)

            def count(*args, name=name, function=function, **options):
                calls[name] += 1
                return function(*args, **options)

            setattr(_fsdp_param_group, name, count)
        clip_grad_norm, all_sum = module.clip_grad_norm, module.all_sum

        def begun(run, *values):
            calls["foreach_all_gather"] = calls["foreach_reduce"] = 0
            module.all_sum = all_sum  # the next one is at the end of the micro-batches
            return all_sum(run, *values)

        def ended(run, *rest):
            module.all_sum = begun
            with open(f"{path}-{run.rank}", "a") as file:
                file.write(f"{calls['foreach_all_gather']} {calls['foreach_reduce']}\n")
            return clip_grad_norm(run, *rest)

        module.all_sum, module.clip_grad_norm = begun, ended

    return patch


@pytest.mark.parametrize("more", [(), ("--dtype", "bfloat16"), ("--replicate_size", 2)])
def test_ranks_exchange_once_a_step_where_memory_allows(more, tmp_path):
    """With room for whole weights and gradients every layer is gathered and reduced once a step, not in each
    micro-batch; numbers differ by the order of a sum only, and evaluations in between find the weights sharded."""
    rows = tiny_rows("sft", tmp_path / "rows.jsonl", 8)
    flags = ["--dataset", rows, "--eval_dataset", rows, "--batch_size", 8, "--tokens_per_microbatch", 60]
    flags += ["--max_steps", 2, "--save_every", 0, "--eval_every", 1, *more]
    runs, calls = {}, {}
    for name, free in ("often", 0), ("once", 1e15):
        train("sft", tmp_path / name, *flags, world=2, patch=counted(tmp_path / f"calls-{name}", free))
        runs[name] = read_jsonl(tmp_path / name / "metrics.jsonl")
        lines = (tmp_path / f"calls-{name}-0").read_text().splitlines()
        calls[name] = {tuple(map(int, line.split())) for line in lines}
    ((gathers, reductions),) = calls["once"]
    assert reductions == 4  # three layers and the root
    assert gathers == (0 if "--replicate_size" in more else 4)  # a replica of one rank has nothing to gather
    assert all(often[1] >= 4 * reductions for often in calls["often"])
    if "bfloat16" not in more:
        assert not metric_differences(runs["often"], runs["once"])
        assert not weight_differences(newest(tmp_path / "often"), newest(tmp_path / "once"), ROWS["sft"])


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Qwen3Moe", "Gemma3Text"])
def test_compiled_layers_agree_and_are_compiled_a_few_times(name, monkeypatch):
    """Batches of six shapes: other tokens, segments, completions of one prompt. Each graph is compiled for the first
    shape and once more for all others, not per shape."""
    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compiled(f, backend=counter, **kw))
    lm = build(name)
    plain, policy = Policy(build(name)), Policy(lm)
    args = SimpleNamespace(compile=True, activation_checkpointing="off")
    model.fit_memory(SimpleNamespace(args=args), policy, None, 1)
    assert name in FLAT
    graphs = []
    for seed, take in enumerate([slice(0, 4), slice(0, 2), slice(1, 3), slice(2, 4), slice(0, 1), slice(0, 3)]):
        groups = make_groups(seed)[take] + make_groups(seed + 9)[: seed]
        wanted, got = (p(flat_batch(groups))["logprobs"] for p in (plain, policy))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        a, b = gradients(plain, wanted.sum()), gradients(policy, got.sum())
        worst = max(((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-3)).item() for k in a)
        assert worst < 1e-4
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs[-1] == graphs[2], graphs  # nothing new after the third shape


def test_free_bytes_of_a_gpu_leave_out_the_pools_of_graphs(monkeypatch):
    segments = [{"segment_pool_id": pool, "total_size": size, "allocated_size": used}
                for pool, size, used in [((0, 0), 100, 40), ((0, 1), 1000, 0)]]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7, 80))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1100)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 40)
    assert model.free_bytes() == 7 + 60
