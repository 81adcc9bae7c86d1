"""--dtype: bfloat16 layers on the CPU, with the numbers of a GPU. Healthy runs raise no alert, and each check of
numbers still sees its planted fault: wide limits would be no solution."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import STABLE, newest, ranks, read_jsonl, script, train, trainer_tensors
from safetensors.torch import load_file, save_file
from test_alerts import levels, provoke
from torch.distributed.device_mesh import init_device_mesh

from common import rewards
from common.runtime import checkpoint, health, launch, model, parallel
from common.runtime.flags import InputError
from common.runtime.parallel import local
from common.tokenization import load_tokenizer

BF16 = ["--dtype", "bfloat16"]


# ---- the flag ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, said", [
    ("float16", "gradients vanish without loss scaling"), ("double", "Give auto, float32 or bfloat16"),
])  # fmt: skip
def test_other_dtypes_are_one_line(value, said, capsys):
    with pytest.raises(SystemExit) as left:
        script("sft").parse_args(["--dtype", value])
    lines = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and len(lines) == 1 and f"--dtype {value}" in lines[0] and said in lines[0]


@pytest.mark.parametrize("flag, has_gpu, dtype", [
    ("auto", False, torch.float32), ("auto", True, torch.bfloat16), ("float32", True, torch.float32),
    ("bfloat16", False, torch.bfloat16),
])  # fmt: skip
def test_auto_is_bfloat16_on_a_gpu(flag, has_gpu, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert parallel.layer_dtype(SimpleNamespace(dtype=flag)) == dtype


# ---- what computes in which precision ------------------------------------------------------------


def _policy(world_flags):
    """A Run and the sharded policy of the tiny model, as main.model makes them."""
    module = script("sft")
    args = module.parse_args([*BF16, *world_flags])
    run = launch.setup(args, module.__file__)
    run.mesh = init_device_mesh("cpu", run.mesh_shape, mesh_dim_names=("replicate", "shard", "tp"))
    tokenizer, lm = module.load_model(module.AutoModelForCausalLM, args)
    policy = module.load_weights(run, module.shard(module.Policy(lm), run))
    return run, policy, tokenizer


def _dtypes(_rank, _world, out):
    run, policy, tokenizer = _policy(["--output_dir", out])
    seen = {}
    layer = policy.lm.model.layers[0]
    layer.register_forward_hook(lambda _m, _i, output: seen.update(layer=output.dtype))
    for group in model.probe_groups(len(tokenizer)):  # two micro-batches, whose gradients add up
        outputs = policy(model.flat_batch([group]), ["entropy"])
        outputs["logprobs"].sum().backward()
    seen.update(logprobs=outputs["logprobs"].dtype, entropy=outputs["entropy"].dtype)
    parameters = list(policy.parameters())
    seen["weights"] = {p.dtype for p in parameters}
    seen["gradients"] = {p.grad.dtype for p in parameters}
    # A sum in bfloat16 would leave nothing beyond eight bits.
    gradient = local(parameters[0].grad)
    seen["beyond bfloat16"] = bool((gradient != gradient.bfloat16().float()).any())
    return seen


@pytest.mark.parametrize("world", (1, 2))
def test_layers_are_bfloat16_and_all_else_is_float32(world, tmp_path):
    for seen in ranks(world, _dtypes, str(tmp_path / "out")):
        assert seen["layer"] == torch.bfloat16
        assert (seen["logprobs"], seen["entropy"]) == (torch.float32, torch.float32)
        assert seen["weights"] == {torch.float32} and seen["gradients"] == {torch.float32}
        assert seen["beyond bfloat16"]


@pytest.mark.parametrize("world", (pytest.param(1, marks=pytest.mark.slow), 2))
@pytest.mark.parametrize("name", STABLE)
def test_healthy_run(name, world, tmp_path):
    """Exit code 0 (train sees to it) and no alert. The weights move in steps that bfloat16 would lose."""
    out = tmp_path / "out"
    flags = ["--max_steps", 2, "--batch_size", 4, "--eval_rows", 4]
    train(name, out, *BF16, *flags, world=world)
    assert read_jsonl(out / "alerts.jsonl") == []
    weights = [t for key, t in trainer_tensors(newest(out)).items() if key.startswith("model.")]
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in weights)


# ---- MODEL001 ------------------------------------------------------------------------------------


def _shifted_keys(batch, _policy):
    batch["kv_index"] = (batch["kv_index"] - 1).clamp(min=0)


def _running_positions(batch, _policy):
    batch["position_ids"] = torch.arange(len(batch["position_ids"]))


def _gap_in_positions(batch, _policy):
    is_answer = torch.zeros(len(batch["position_ids"]), dtype=torch.long)
    borders = batch["cu_seqlens_q"].tolist()
    for segment in batch["seq_segment"].tolist():
        is_answer[borders[segment] : borders[segment + 1]] = 1
    batch["position_ids"] = batch["position_ids"] + is_answer


def _other_temperature(_batch, policy):
    policy.transform = (*policy.transform[:2], 1.05)


def _right(_batch, _policy):
    pass


def _check_model(_rank, _world, out, fault):
    run, policy, tokenizer = _policy(["--output_dir", out, "--allow", "MODEL001"])
    whole = model.flat_batch

    def wrong(*inputs):
        batch = whole(*inputs)
        fault(batch, policy)
        return batch

    model.flat_batch = wrong
    model.check_model(run, policy, tokenizer, model.probe_groups(len(tokenizer)))


@pytest.mark.parametrize("fault", (_right, _shifted_keys, _running_positions, _gap_in_positions, _other_temperature))
def test_model001_sees_each_fault(fault, tmp_path):
    ranks(1, _check_model, str(tmp_path / "out"), fault)
    found = [(alert["code"], alert["level"]) for alert in read_jsonl(tmp_path / "out" / "alerts.jsonl")]
    assert found == ([] if fault is _right else [("MODEL001", "error")])


def test_a_gap_means_the_same_on_every_scale():
    torch.manual_seed(0)
    right, noise = torch.randn(50), 0.01 * torch.randn(50)
    gaps = [health.spread_gap(scale * (right + noise), scale * right) for scale in (1, 7)]
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-4)
    assert health.spread_gap(torch.zeros(5), torch.zeros(5)) == 0  # a new head that says the same of everything


@pytest.mark.parametrize("dtype, found", [(torch.float32, "error"), (torch.bfloat16, None)])
def test_a_limit_rises_with_the_precision_alone(dtype, found, tmp_path):
    state = {"alerts": {}}
    run = SimpleNamespace(dtype=dtype, device=torch.device("meta"), state=state, out=tmp_path, rank=0, bar=None,
                          checkpoint=None)  # fmt: skip
    health.check(run, "MODEL001", 1, "gap", 0.03, "text", error=1e-4, rounding=0.05)
    lines = read_jsonl(tmp_path / "alerts.jsonl")
    assert [line["level"] for line in lines] == ([found] if found else [])


# ---- GRPO004, GRPO005 ----------------------------------------------------------------------------

ONLINE = [*BF16, "--num_generations", 4, "--steps_per_generation", 1, "--num_iterations", 1, "--beta", 0]


def test_grpo004_sees_a_temperature_5_percent_off(tmp_path):
    def patch(module):
        refresh = module.refresh

        def hotter(sampler, policy):
            refresh(sampler, policy)
            with torch.no_grad():
                sampler.lm.model.norm.weight /= 1.05  # and with it every logit

        module.refresh = hotter

    assert levels(provoke("grpo", tmp_path, *ONLINE, patch=patch), "GRPO004") == [(0, "warn")]


def test_grpo004_sees_weights_one_step_old(tmp_path):
    def patch(module):
        refresh, behind = module.refresh, []

        def late(sampler, policy):
            refresh(sampler, policy)
            newer = {name: tensor.clone() for name, tensor in sampler.lm.state_dict().items()}
            if behind:
                sampler.lm.load_state_dict(behind.pop())
            behind.append(newer)

        module.refresh = late

    flags = [*ONLINE, "--learning_rate", 1e-3, "--batch_size", 4, "--seed", 3]
    result = provoke("grpo", tmp_path, *flags, patch=patch, steps=3)
    assert result.code == 0, result.err
    found = levels(result, "GRPO004")
    assert found and {level for _, level in found} == {"error"}
    assert found[0][0] == 2  # the second rollout is step 2's


def test_grpo005_sees_dropout(tmp_path):
    """A tenth of what each layer adds, in every pass: the old log-probs and the new ones are of other models."""

    def patch(module):
        load = module.load_weights

        def with_dropout(run, policy):
            for layer in policy.lm.model.layers:
                for part in layer.self_attn.o_proj, layer.mlp.down_proj:
                    part.register_forward_hook(lambda _m, _i, out: torch.nn.functional.dropout(out, 0.1))
            return load(run, policy)

        module.load_weights = with_dropout

    flags = [*ONLINE, "--num_iterations", 2]
    result = provoke("grpo", tmp_path, *flags, patch=patch, allow=["MODEL001", "CKPT001", "GRPO004", "GRPO005"])
    assert ("error" in {level for _, level in levels(result, "GRPO005")}), result.err


# ---- PREF001, CKPT001 ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("dpo", "kto"))
def test_pref001_sees_a_reference_one_step_on(name, tmp_path):
    flags = [*BF16, "--batch_size", 32, "--learning_rate", 8e-5]
    trained = provoke(name, tmp_path, *flags, rows=64)
    assert (trained.code, trained.alerts) == (0, []), trained.err
    weights = load_file(trained.folder / "final" / "model.safetensors")

    def swap(policy, values):
        for key, p in policy.lm.named_parameters():
            local(p).data.copy_(values[key])

    def patch(module):
        attach = module.attach_reference

        def one_step_on(policy, *inputs):
            before = {key: local(p).detach().clone() for key, p in policy.lm.named_parameters()}
            swap(policy, weights)
            attach(policy, *inputs)
            swap(policy, before)

        module.attach_reference = one_step_on

    result = provoke(name, tmp_path, *flags, rows=64, patch=patch)
    assert (result.code, levels(result, "PREF001")) == (3, [(0, "error")]), result.err


def test_ckpt001_sees_one_changed_weight(tmp_path):
    """One number of a million, changed by a thousandth, which no log-prob in bfloat16 would show."""

    def patch(_module):
        write = checkpoint.write_checkpoint

        def spoiled(run, step, folder, *more):
            write(run, step, folder, *more)
            tensors = load_file(folder / "model.safetensors")
            tensors["model.layers.1.mlp.up_proj.weight"][3, 5] *= 1.001
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

        checkpoint.write_checkpoint = spoiled

    result = provoke("sft", tmp_path, *BF16, patch=patch)
    assert (result.code, levels(result, "CKPT001")) == (3, [(0, "error")]), result.err


# ---- models beside the policy --------------------------------------------------------------------


def test_a_reward_model_knows_the_number_of_its_gpu(tmp_path, monkeypatch):
    """A thread judges, and each thread has a current device of its own: 0. So the device carries its number."""
    folder = tmp_path / "reward"
    train("reward", folder, "--max_steps", 1, "--batch_size", 2, "--eval_dataset", "")
    tokenizer = load_tokenizer(folder / "final")
    loaded = rewards.RewardModel(str(folder / "final"), 4096, torch.bfloat16, tokenizer)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    prompt, completion = [{"role": "user", "content": "What is 3 + 4?"}], [{"role": "assistant", "content": "#### 7"}]
    ids = tokenizer.encode("#### 7<|end|>", add_special_tokens=False)
    score = loaded([prompt], [completion], [ids])
    assert json.dumps(score) and score == loaded([prompt], [completion], [ids])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    places = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: places.append(device) or module)
    rewards.RewardModel(str(folder / "final"), 4096, torch.float32, tokenizer)
    assert places == [torch.device("cuda", 3)]


def test_the_tests_hide_the_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


# ---- devices -------------------------------------------------------------------------------------


def test_a_process_without_a_gpu_of_its_own(monkeypatch):
    """LOCAL_RANK 1 where torch sees one GPU, as Slurm may start it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launch.find_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="^LOCAL_RANK is 1, but torch sees 1 GPUs"):
        launch.find_device()


def test_a_driver_that_is_too_old(tmp_path, monkeypatch):
    """The wheel for CUDA 13 on a driver of CUDA 12: without a word torch would train on the CPU."""
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\nGCC version: 12\n")
    monkeypatch.setattr(launch, "NVIDIA_DRIVER", version)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launch.find_device() == torch.device("cpu")  # its owner wants the CPU
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(InputError, match="CUDA 13.0, which driver 535.104.05 does not run"):
        launch.find_device()


def test_a_sampler_that_does_not_fit(tmp_path):
    """Said in bytes, before a weight is read: the half million weights of the tiny model take 2 MB."""

    def patch(_module):
        model.free_bytes = lambda: 1e6

    result = provoke("grpo", tmp_path, patch=patch)
    assert result.code == 2 and "the copy that samples takes 0.0 GB on every rank" in result.err, result.err


def _all_reduces(_rank, _world, out):
    """How often FSDP2 sums gradients between copies of the model in each micro-batch of a step, and that sum's norm."""
    module = script("sft")
    args = module.parse_args(["--output_dir", out, "--replicate_size", "2", "--dtype", "bfloat16"])
    run = launch.setup(args, module.__file__)
    run.mesh = init_device_mesh("cpu", run.mesh_shape, mesh_dim_names=("replicate", "shard", "tp"))
    _, lm = module.load_model(module.AutoModelForCausalLM, args)
    policy = module.load_weights(run, module.shard(module.Policy(lm), run))
    args.tokens_per_microbatch = 1  # each group alone
    counts, norms, reduce = [], [], dist.all_reduce
    for once in True, False:
        for batch in module.micro_batches(run, model.probe_groups(100), spare=model.probe_groups(100)[0]):
            if not once:
                del batch["is_last"]  # an exchange for each micro-batch, as FSDP2 does it by itself
            loss = policy(batch)["logprobs"].sum()
            calls = []
            dist.all_reduce = lambda *a, calls=calls, **k: calls.append(0) or reduce(*a, **k)
            loss.backward()
            dist.all_reduce = reduce
            counts.append(len(calls))
        norms.append(parallel.gradient_norm(run, policy.parameters()))
        policy.zero_grad(set_to_none=True)
    return counts, norms


def test_copies_exchange_gradients_once_a_step(tmp_path):
    for counts, (once, always) in ranks(2, _all_reduces, str(tmp_path / "out")):
        half = len(counts) // 2
        assert half > 1 and counts[: half - 1] == [0] * (half - 1) and counts[half - 1] > 0
        assert min(counts[half:]) > 0
        assert once == pytest.approx(always, rel=1e-5)
