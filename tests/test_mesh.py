"""Sharding, replicas and tensor parallelism must not change what is computed.

Models: `Policy` under the scripts' own `shard` against the unsharded Hugging Face model, one sequence at a time: every
output to 1e-5, the norm of all gradients to 1e-5 relative, each to 5e-5 of its parameter's largest: rounding of sums in
another order, 2.1e-5 at worst, where a head norm whose gradient is not summed over tp is off by a tenth and more.
Runs: whole scripts on meshes against one process, equal as test_split defines it. `pytest tests/test_mesh.py --slow`
takes every script, mesh and model and writes benchmarks/results/meshes.jsonl; without it, half the steps of a few.
"""
import json
import math
from types import SimpleNamespace

import pytest
import test_logprobs
import torch
import torch.distributed as dist
import transformers
from conftest import LOOPS, ROOT, SCRIPTS, newest, ranks, read_jsonl, script, tiny_rows, train, trainer_tensors
from test_logprobs import WANT, build, make_groups, oracle
from test_split import DEFAULT_FLOOR, metric_differences, weight_differences
from torch.distributed.device_mesh import init_device_mesh

from common.batches import flat_batch
from common.logprobs import Policy
from common.runtime import parallel
from common.runtime.flags import InputError

MESHES = {  # name -> ranks, replicate_size, tp_size
    "fsdp2": (2, 1, 1), "fsdp4": (4, 1, 1), "tp2": (2, 1, 2), "tp4": (4, 1, 4), "fsdp2 x tp2": (4, 1, 2),
    "hsdp 2x2": (4, 2, 1), "replicas2 x tp2": (4, 2, 2),
}  # fmt: skip
OLMO = {"num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
test_logprobs.FLAT |= {"Phi3": {}, "Olmo3": OLMO, "Starcoder2": {}, "Mistral": {}, "Glm4": {}, "SmolLM3": {}}
FAMILIES = [("Llama tied", {"tie_word_embeddings": True}), ("Llama untied", {"tie_word_embeddings": False}),
            ("Qwen3 tied", {"tie_word_embeddings": True}), ("Qwen3 untied", {"tie_word_embeddings": False}),
            ("Qwen3 odd vocabulary", {"vocab_size": 97, "tie_word_embeddings": True}), ("Gemma3Text", {}),
            ("Gemma2", {}), ("Granite", {}), ("Mistral", {}), ("Phi3", {}), ("Olmo3", {}), ("Starcoder2", {}),
            ("Glm4", {}), ("SmolLM3", {})]  # fmt: skip
REFUSED = {"Mixtral": "moe_tp_experts", "Qwen3Moe": "moe_tp_experts", "GptOss": "None", "GPT2": "no plan",
           "Llama heads": "num_key_value_heads"}  # fmt: skip


def fake_run(world, replicate, tp):
    args = SimpleNamespace(tp_size=tp, replicate_size=replicate, cpu_offload=False)
    shape = replicate, world // (replicate * tp), tp
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tp"))
    return SimpleNamespace(args=args, mesh=mesh, device=torch.device("cpu"), world=world, rank=dist.get_rank(),
                           dtype=torch.float32, group=dist.group.WORLD, dp_size=world // tp,
                           dp_rank=dist.get_rank() // tp)


def sharded(rank, world, name, changes, replicate, tp):
    """-> outputs, gradients whole by name, and the gradient norm that the script computes."""
    module, run = script("sft"), fake_run(world, replicate, tp)
    lm = build(name, **{"vocab_size": 100, **changes})
    policy = module.shard(Policy(lm, 0.7), run)
    out = policy(flat_batch(make_groups()), want=WANT)
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for k, x in out.items() if x.is_floating_point())
    loss.backward()
    for p in parallel.partial_parameters(policy):
        dist.all_reduce(p.grad.to_local(), group=run.mesh["tp"].get_group())
    norm = parallel.gradient_norm(run, [p for p in policy.parameters() if p.grad is not None])
    grads = {name: parallel.full(p.grad) for name, p in policy.lm.named_parameters()}
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    return {k: x.detach() for k, x in out.items()}, grads, norm, tied


def whole(name, changes):
    """The same from the unsharded model through lm(ids).logits, one sequence at a time."""
    lm = build(name, **{"vocab_size": 100, **changes})
    out = oracle(lm, make_groups(), 0.7)
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for k, x in out.items() if x.is_floating_point())
    loss.backward()
    return {k: x.detach() for k, x in out.items()}, {name: p.grad for name, p in lm.named_parameters()}


def compare(name, changes, world, replicate, tp):
    expected, gradients = whole(name, changes)
    for out, grads, norm, tied in ranks(world, sharded, name, changes, replicate, tp):
        for key in expected:
            torch.testing.assert_close(out[key], expected[key], rtol=0, atol=1e-5)
        assert grads.keys() == gradients.keys() and tied == changes.get("tie_word_embeddings", tied)
        for key, gradient in gradients.items():
            worst = (grads[key] - gradient).abs().max() / gradient.abs().max()
            assert worst < 5e-5, f"{key}: {worst}"
        assert norm == pytest.approx(sum(g.double().square().sum() for g in gradients.values()).sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("name, changes", FAMILIES, ids=[name for name, _ in FAMILIES])
def test_tensor_parallel_families(name, changes):
    compare(name, changes, 2, 1, 2)


@pytest.mark.parametrize("mesh", MESHES)
def test_meshes(mesh):
    compare("Qwen3 tied", {"tie_word_embeddings": True, "num_key_value_heads": 4}, *MESHES[mesh])


@pytest.mark.parametrize("mesh", ["fsdp4", "hsdp 2x2"])
def test_experts_shard(mesh):
    compare("Qwen3Moe", {}, *MESHES[mesh])


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_weight(name):
    def refuse(rank, world):
        changes = {"num_key_value_heads": 1} if "heads" in name else {}
        with torch.device("meta"):
            lm = transformers.AutoModelForCausalLM.from_config(build(name, **changes).config)
        with pytest.raises(InputError, match=REFUSED[name]):
            script("sft").shard(Policy(lm), fake_run(world, 1, 2))

    ranks(2, refuse)


# ---- whole runs ------------------------------------------------------------------------------------------------------

STEPS, FEWER, BATCH, ROWS = 10, 5, 5, 15
LR = {"sft": "1e-3", "dpo": "1e-4", "reward": "1e-3", "kto": "1e-4", "grpo": "5e-4", "rloo": "5e-4",
      "experimental/dpo_batch": "1e-4", "experimental/tr_dpo": "1e-4", "experimental/neftune": "1e-3",
      "experimental/sft_moe": "1e-3", "experimental/sft_bema": "1e-3", "experimental/orpo": "5e-4",
      "experimental/cpo": "5e-4", "experimental/tpo": "5e-4", "experimental/bco": "1e-4",
      "experimental/prm": "1e-3"}  # fmt: skip
ONLINE = [name for name in SCRIPTS if "reward" in script(name).Args.__dataclass_fields__]
TAUGHT = [name for name in SCRIPTS if "teacher" in script(name).Args.__dataclass_fields__]
SAMPLING = [name for name in SCRIPTS if "max_completion_length" in script(name).Args.__dataclass_fields__]
LR |= {name: "5e-4" for name in SAMPLING if "/" in name}
KINDS = {  # random models over the tiny lab's tokens; 4 heads, so that four tp ranks share them
    "Llama tied": {"tie_word_embeddings": True}, "Llama untied": {"tie_word_embeddings": False},
    "Qwen3 tied": {"tie_word_embeddings": True}, "Qwen3 untied": {"tie_word_embeddings": False}, "Qwen3Moe": {},
}  # fmt: skip
# Digits, and the characters' codes so that no completion has exactly its group's mean: at an advantage of 0 the first
# gradient of a token that occurs in that completion alone is 0, too (the policy is the reference still, so the KL gives
# none), and 1e-10 of rounding on a mesh, which is 0.02 learning rates after Adam with its 1e-8. Of a Qwen3 on tp4, 113
# weights of 62,832, 110 of them such, moved step 3's kl by 6e-5; set to one process's values they left it to 1e-8.
REWARD = """
def digits(prompts, completions, **_):
    texts = [c[-1]["content"] for c in completions]
    return [sum(x.isdigit() + ord(x) / 1000 for x in text) / max(1, len(text)) for text in texts]
"""


def make_model(kind, folder):
    """Random weights, then sixty steps of SFT: some gradients of a model that knows nothing are mere rounding, and Adam
    makes whole steps of them."""
    raw = folder.parent / "raw"
    lm = build(kind, vocab_size=104, num_key_value_heads=4, hidden_size=64, num_hidden_layers=2, eos_token_id=2,
               max_position_embeddings=512, sliding_window=None, bos_token_id=None, **KINDS[kind])
    with torch.no_grad():  # build() widens them to make attention sharp, which also amplifies rounding over ten steps
        for p in lm.parameters():
            p.mul_(0.5 if p.ndim > 1 else 1.0)
    lm.save_pretrained(raw)
    for name in "tokenizer.json", "tokenizer_config.json", "chat_template.jinja":
        (raw / name).write_bytes((ROOT / "common/tiny/model" / name).read_bytes())
    flags = ["--model", raw, "--dataset", "tiny", "--batch_size", 16, "--learning_rate", "3e-3", "--max_steps", 60]
    train("sft", folder.parent / "trained", *flags, "--eval_every", 0, "--save_every", 0, "--max_length", 200)
    (folder.parent / "trained" / "final").rename(folder)


def run(name, model, out, mesh, batch=BATCH, steps=STEPS, more=()):
    """-> the run's folder; (1, 1, 1) is one process."""
    world, replicate, tp = mesh
    out.parent.mkdir(parents=True, exist_ok=True)
    test = (ROOT / "common" / "tiny" / "test.jsonl").read_text().splitlines(keepends=True)
    (out.parent / "heldout.jsonl").write_text("".join(test[:3]))
    flags = ["--model", model, "--dataset", tiny_rows(name, out.parent / "rows.jsonl", ROWS), "--max_steps", steps]
    flags += ["--eval_dataset", out.parent / "heldout.jsonl", "--batch_size", batch, "--eval_every", 0]
    flags += ["--save_every", 0, "--learning_rate", LR[name], "--replicate_size", replicate, "--tp_size", tp]
    if name == "reward":  # of the head that 42 draws a weight strays, and every reward with it
        flags += ["--seed", 1]
    if name in ONLINE:
        (out.parent / "reward.py").write_text(REWARD)
        flags += ["--reward", f"{out.parent}/reward.py:digits"]
    if name in TAUGHT:  # by a model of random weights
        flags += ["--teacher", model.parent / "raw"]
    if name == "experimental/sdpo":  # of the digits' reward that is a solution
        flags += ["--success_reward_threshold", "0.4"]
    if name in SAMPLING:
        flags += ["--max_completion_length", 40, "--allow", "GRPO001", "GRPO002"]
    train(name, out, *flags, *more, world=world)
    return out


def case_list():
    return [(name, kind, mesh) for name in LOOPS for kind in KINDS for mesh in MESHES
            if (kind != "Qwen3Moe" and name != "experimental/gold") or MESHES[mesh][2] == 1]


SLICE = [("sft", "Llama untied", "fsdp2 x tp2"), ("dpo", "Qwen3 tied", "replicas2 x tp2"),
         ("grpo", "Qwen3 tied", "tp2"), ("grpo", "Qwen3 tied", "hsdp 2x2"), ("sft", "Qwen3Moe", "fsdp2"),
         ("reward", "Qwen3 tied", "fsdp2 x tp2")]  # fmt: skip


@pytest.fixture(scope="module")
def single(tmp_path_factory, request):
    """(script, model) -> model folder and the run of one process, each made once."""
    models, made = {}, {}

    def reference(name, kind):
        if kind not in models:
            models[kind] = tmp_path_factory.mktemp(kind.replace(" ", "-")) / "model"
            make_model(kind, models[kind])
        if (name, kind) not in made:
            steps = STEPS if request.config.getoption("--slow") else FEWER
            made[name, kind] = run(name, models[kind], models[kind].parent / name / "single", (1, 1, 1), steps=steps)
        return models[kind], made[name, kind]

    return reference


@pytest.mark.parametrize("name, kind, mesh", case_list())
def test_runs(name, kind, mesh, single, tmp_path, request):
    slow = request.config.getoption("--slow")
    if not slow and (name, kind, mesh) not in SLICE:
        pytest.skip("--slow takes every case")
    model, reference = single(name, kind)
    out = run(name, model, tmp_path / "out", MESHES[mesh], steps=STEPS if slow else FEWER)
    lines, others = (read_jsonl(folder / "metrics.jsonl") for folder in (reference, out))
    # rewards of dpo, kto: 0.1 (tr_dpo 0.5, bco 0.3) times differences of log-probs that sum to some -100, known to 8e-6
    coarse = {"dpo": 4e-6, "kto": 4e-6, "experimental/dpo_batch": 4e-6, "experimental/tr_dpo": 2e-5,
              "experimental/bco": 1.2e-5}
    wrong = metric_differences(lines, others, coarse.get(name, DEFAULT_FLOOR), name)
    # Adam's first step is one learning rate, whatever the size of a gradient: a weight whose first gradient is only
    # rounding (1e-9 beside 1e-3) goes where rounding says. Measured: at most 4 of some 100,000 weights.
    wrong += weight_differences(newest(reference), newest(out), float(LR[name]), strays=1e-4)
    texts = [[row["completion"] for row in read_jsonl(folder / "samples.jsonl")] for folder in (reference, out)]
    wrong += [f"{sum(a != b for a, b in zip(*texts))} completions differ"] if texts[0] != texts[1] else []
    if slow:
        if name == "grpo":  # a KL of k nats: log-probs that changed by about sqrt(2 k)
            moved = math.sqrt(2 * lines[-2]["kl"])
        else:
            first, last = (sum(line["loss"] for line in part) / 3 for part in (lines[1:4], lines[7:10]))  # same rows
            moved = abs(last / first - 1)
        norms = [(x["grad_norm"], y["grad_norm"]) for x, y in zip(lines, others) if "grad_norm" in x]
        a, b = (trainer_tensors(newest(folder)) for folder in (reference, out))
        weights = max((a[k] - b[k]).abs().max().item() for k in a if k.startswith("model.")) / float(LR[name])
        row = {"script": name, "model": kind, "mesh": mesh, "norms_apart": max(abs(x - y) / x for x, y in norms)}
        row |= {"learning_rates_apart": weights, "completions": len(texts[0]), "moved": moved, "wrong": wrong}
        with open(ROOT / "benchmarks/results/meshes.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        assert moved > 0.05, f"the headline moved by {moved}: nothing was compared"
    assert not wrong, "\n".join(wrong[:20])


def test_fewer_prompts_than_ranks(single, tmp_path):
    """Two prompts a step and four ranks: one of each pair has nothing to sample, and no reward to ask for. Over two
    steps, each with a rollout of its own."""
    model, _ = single("grpo", "Qwen3 tied")
    short = ["--steps_per_generation", 1, "--num_iterations", 1]
    outs = [run("grpo", model, tmp_path / name, mesh, batch=2, steps=2, more=short)
            for name, mesh in (("single", (1, 1, 1)), ("mesh", (4, 1, 2)))]
    assert not metric_differences(*(read_jsonl(out / "metrics.jsonl") for out in outs))
    assert len({json.dumps(read_jsonl(out / "samples.jsonl")) for out in outs}) == 1
