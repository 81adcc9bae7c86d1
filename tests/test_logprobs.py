"""common/logprobs.py and common/attention.py against oracles that share no code with them: one sequence at a time
through lm(ids).logits, and plain autograd in float64."""
import copy
import os
import re
import sys
from array import array
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from common import attention  # noqa: E402
from common import logprobs as subject  # noqa: E402
from common.attention import refuse_rotary, runs_flat  # noqa: E402
from common.batches import flat_batch, pack, probe_groups  # noqa: E402
from common.logprobs import Policy, ScoredHead, plain_logprobs  # noqa: E402
from common.runtime.flags import InputError  # noqa: E402

torch.set_num_threads(1)
V = 97
WANT = ("entropy", "mean_logprob", "sum_p2", "correct")
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MLA = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "head_dim": 8,
       "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "num_key_value_heads": 4,
       "first_k_dense_replace": 1}
GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 4, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
FLAT = {
    "Llama": {}, "Qwen3": {"tie_word_embeddings": True}, "Qwen3 untied": {"tie_word_embeddings": False},
    "Gemma3Text": {"final_logit_softcapping": 3.0}, "Mixtral": MOE, "Qwen3Moe": MOE, "GPT2": GPT2, "Phi": {},
    "DeepseekV3": {**MOE, **MLA}, "GptOss": MOE, "Gemma2": {"attn_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.5},
    # with its default multiplier, 1, the scores are so large that fp32 loses 5e-5 of the gradients
    "Granite": {"logits_scaling": 4.0, "attention_multiplier": 0.25},
}
PADDED = {"Qwen3Next": {**MOE, **LINEAR, "shared_expert_intermediate_size": 24}, "Qwen3_5Text": LINEAR, "Bloom": {}}


def build(name, **changes):
    """A random model whose outputs are not flat (log-probs spread by about 2), window 4, heads grouped 2 to 1."""
    shape = {"vocab_size": V, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 12,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "sliding_window": 4,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    kind = name.split()[0]
    shape |= (FLAT | PADDED).get(name, {}) | changes
    config = getattr(transformers, kind + "Config")(**shape)
    if kind in ("Gemma2", "Gemma3Text", "GptOss"):
        config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    head = lm.get_output_embeddings()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        if head.bias is not None:
            head.bias.normal_()
        for module in lm.modules():
            if hasattr(module, "sinks"):
                module.sinks.normal_()
    return lm.eval()


def make_groups(seed=0):
    """Two shared prompts (a hole in one mask, two completions of one shape), a single, and a text without prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = lambda n: array("i", torch.randint(3, V, (n,), generator=generator).tolist())  # noqa: E731
    groups = [{"prompt": ids(p), "completions": [{"ids": ids(n), "scored": None} for n in lengths], "row": row}
              for row, (p, lengths) in enumerate([(7, (5, 9, 5)), (11, (6, 2)), (6, (7,)), (0, (8,))])]
    groups[0]["completions"][1]["scored"] = [True, False, False, True, True, True, False, True, True]
    return groups


def scores(logp, labels):
    """What Policy returns, by plain differentiable torch from (rows, V) log-probs."""
    p, index = logp.exp(), torch.arange(len(labels))
    return {"logprobs": logp[index, labels], "entropy": -(p * logp).sum(-1), "mean_logprob": logp.mean(-1),
            "sum_p2": (p * p).sum(-1), "correct": logp.argmax(-1) == labels}


def oracle(lm, groups, temperature):
    out = []
    for group in groups:
        for completion in group["completions"]:
            ids = torch.tensor(list(group["prompt"]) + list(completion["ids"]))
            keep = [i for i, yes in enumerate(completion["scored"] or [True] * len(completion["ids"])) if yes]
            at = [i + len(group["prompt"]) for i in keep if i + len(group["prompt"])]
            logits = lm(ids[None], use_cache=False).logits[0] / temperature
            out.append(scores(logits.log_softmax(-1)[[i - 1 for i in at]], ids[at]))
    return {name: torch.cat([x[name] for x in out]) for name in out[0]}


def objective(out):
    """A scalar that reaches every differentiable output with weights of both signs."""
    terms = [(out[name] * torch.linspace(-1, 1.3, out[name].numel()).view_as(out[name]).to(out[name])).sum()
             for name in ("logprobs", "entropy", "mean_logprob", "sum_p2") if name in out]
    return sum(terms)


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name.removeprefix("lm."): p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_gradients(got, wanted, tolerance):
    assert got.keys() == wanted.keys()
    # a bias of the keys has gradient 0 (softmax ignores a shift), so the scale of all gradients is a floor
    floor = 1e-3 * max(x.abs().max() for x in wanted.values())
    for name, x in wanted.items():
        error = (got[name] - x).abs().max() / x.abs().max().clamp(min=floor)
        assert error <= tolerance, f"{name}: {error:.1e}"


# ---- whole models ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*FLAT, *PADDED])
def test_equals_one_sequence_at_a_time(name):
    lm, groups = build(name), make_groups()
    lm.set_attn_implementation("eager")
    expected = oracle(lm, groups, 0.7)
    expected_gradients = gradients(lm, objective(expected))
    assert expected["logprobs"].std() > 0.3, "flat outputs would hide mistakes"
    policy = Policy(lm, temperature=0.7)
    assert policy.road == ("padded" if name in PADDED else "flat")
    out = policy(flat_batch(groups), WANT)
    for key, x in expected.items():
        if x.dtype == torch.bool:
            assert torch.equal(out[key], x)
        else:  # fp32: sums over 48 to 97 numbers in another order, divided by the temperature; logits of up to 30
            torch.testing.assert_close(out[key], x.detach(), rtol=1e-5, atol=2e-5)
    tolerance = 1e-4 if name == "Qwen3Next" else 1e-5
    assert_gradients(gradients(policy, objective(out)), expected_gradients, tolerance)


def test_single_completions_share_nothing():
    groups = [group for group in make_groups() if len(group["completions"]) == 1]
    lm, batch = build("Gemma3Text"), flat_batch(groups)
    expected = oracle(lm, groups, 1.0)["logprobs"]
    assert batch["kv_index"] is None
    torch.testing.assert_close(Policy(lm)(batch)["logprobs"], expected, rtol=0, atol=1e-5)  # fp32 rounding


def test_probe_and_plain_forward():
    groups, lm = probe_groups(V), build("Mixtral")
    assert sum(len(g["prompt"]) + sum(len(c["ids"]) for c in g["completions"]) for g in groups) <= 40
    expected = plain_logprobs(lm, groups, 0.7)
    torch.testing.assert_close(expected, oracle(lm, groups, 0.7)["logprobs"], rtol=0, atol=1e-6)  # the same sums
    policy = Policy(lm, temperature=0.7)
    got = policy(flat_batch(groups))["logprobs"]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # fp32 rounding
    assert torch.equal(policy.plain_forward(groups), expected) and not torch.equal(got, expected)
    assert torch.equal(policy(flat_batch(groups))["logprobs"], got)  # its own attention went back
    with pytest.raises(InputError, match="segment borders: False"):
        plain_logprobs(lm, groups)  # too late: Policy has replaced the attention
    mixed = make_groups()
    lm = build("Llama")
    torch.testing.assert_close(plain_logprobs(lm, mixed), oracle(lm, mixed, 1.0)["logprobs"], rtol=0, atol=1e-6)


def test_cuts_and_checkpointing_change_nothing():
    lm, groups = build("Qwen3"), make_groups()
    policy = Policy(lm)
    plain = policy(flat_batch(groups))
    wanted = gradients(policy, plain["logprobs"].sum())
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    lm.train()
    got = {name: torch.zeros_like(x) for name, x in wanted.items()}
    total = 0.0
    for batch in pack(groups, 20):
        loss = policy(flat_batch(batch))["logprobs"].sum()
        total += loss.item()
        for name, x in gradients(policy, loss).items():
            got[name] += x
    assert total == pytest.approx(plain["logprobs"].sum().item(), rel=1e-6)  # fp32 sums in another order
    assert_gradients(got, wanted, 1e-5)  # fp32 sums in another order


# ---- the head alone --------------------------------------------------------------------------------------------------

def head_inputs(rows=23, width=16, vocabulary=V, bias=True):
    torch.manual_seed(1)
    tensors = torch.randn(rows, width), 0.6 * torch.randn(vocabulary, width), torch.randn(vocabulary) if bias else None
    return [x if x is None else x.requires_grad_() for x in tensors], torch.randint(vocabulary, (rows,))


@pytest.mark.parametrize("want", [(), *((name,) for name in WANT), WANT])
@pytest.mark.parametrize("shape", [(1.0, 0.0, 1.0), (0.5, 2.0, 0.7)])  # scale, cap, temperature
def test_head_gradients_in_float64(want, shape):
    tensors, labels = head_inputs()
    out = ScoredHead.apply(*tensors, labels, shape, want)
    out = {name: x for name, x in zip(subject.OUTPUTS, out) if x is not None}
    assert out.keys() == {"logprobs", *want}
    exact = [x.detach().double().requires_grad_() for x in tensors]
    z = shape[0] * (exact[0] @ exact[1].T + exact[2])
    z = shape[1] * torch.tanh(z / shape[1]) if shape[1] else z
    expected = {name: x for name, x in scores((z / shape[2]).log_softmax(-1), labels).items() if name in out}
    for name, x in expected.items():
        torch.testing.assert_close(out[name], x.to(out[name].dtype), rtol=1e-5, atol=1e-5)  # fp32 against float64
    got = torch.autograd.grad(objective(out), tensors)
    for a, b in zip(got, torch.autograd.grad(objective(expected), exact)):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()  # fp32 against float64
    if "entropy" in want:  # an output alone: the others' gradients are then None
        got = torch.autograd.grad(ScoredHead.apply(*tensors, labels, shape, want)[3].sum(), tensors)
        z = shape[0] * (exact[0] @ exact[1].T + exact[2])
        z = (shape[1] * torch.tanh(z / shape[1]) if shape[1] else z) / shape[2]
        for a, b in zip(got, torch.autograd.grad(-(z.softmax(-1) * z.log_softmax(-1)).sum(), exact)):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()  # fp32 against float64


def test_chunks_change_nothing(monkeypatch):
    tensors, labels = head_inputs()
    runs = []
    for rows in (1, 7, len(labels), 10**6):
        monkeypatch.setitem(subject.CHUNK, "cpu", rows * V)
        out = dict(zip(subject.OUTPUTS[:5], ScoredHead.apply(*tensors, labels, (1.0, 0.0, 1.0), WANT)))
        runs.append((out, torch.autograd.grad(objective(out), tensors)))
    for out, grads in runs[1:]:
        for name, x in runs[0][0].items():
            torch.testing.assert_close(out[name], x, rtol=1e-6, atol=1e-6)  # GEMMs of another height round differently
        for a, b in zip(grads, runs[0][1]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # weight gradients add up in another order


def test_bf16_weights_keep_fp32_logits_and_sums(monkeypatch):
    tensors, labels = head_inputs(rows=400)
    tensors = [x.detach().bfloat16().requires_grad_() for x in tensors]
    monkeypatch.setitem(subject.CHUNK, "cpu", V)  # one row a chunk: 400 sums into the weight's gradient
    logprobs, *_ = ScoredHead.apply(*tensors, labels, (1.0, 0.0, 1.0), ())
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = (exact[0] @ exact[1].T + exact[2]).log_softmax(-1)[torch.arange(400), labels]
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)  # bf16 logits would be off by 1e-2
    for a, b in zip(torch.autograd.grad(logprobs.sum(), tensors), torch.autograd.grad(expected.sum(), exact)):
        assert a.dtype == torch.bfloat16
        # rounded once to 8 bits: half a unit in the last place, and fp32 rounding where the sum cancels
        assert ((a - b).abs() <= 2**-8 * b.abs() + 1e-4).all()


def test_nothing_scored_and_frozen_weights():
    tensors, labels = head_inputs()
    empty = ScoredHead.apply(tensors[0][:0], *tensors[1:], labels[:0], (1.0, 0.0, 1.0), WANT)
    grads = torch.autograd.grad(empty[0].sum(), tensors[1:])
    assert [len(x) for x in empty[:5]] == [0] * 5 and all(g.eq(0).all() for g in grads)
    tensors[1].requires_grad_(False)
    ScoredHead.apply(*tensors, labels, (1.0, 0.0, 1.0), ())[0].sum().backward()
    assert tensors[1].grad is None and tensors[0].grad.abs().sum() > 0


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.numel = max(getattr(self, "numel", 0), x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def test_no_tensor_of_tokens_by_vocabulary(monkeypatch):
    rows, vocabulary, chunk = 640, 2000, 16
    monkeypatch.setitem(subject.CHUNK, "cpu", chunk * vocabulary)
    tensors, labels = head_inputs(rows, 8, vocabulary)
    saved = []
    watch = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x)
    with Largest() as seen, watch:
        out = dict(zip(subject.OUTPUTS[:5], ScoredHead.apply(*tensors, labels, (1.0, 3.0, 0.7), WANT)))
        forward = seen.numel
        seen.numel = 0
        grads = torch.autograd.grad(objective(out), tensors)
    assert grads[1].abs().sum() > 0
    assert 0 < forward <= chunk * vocabulary and 0 < seen.numel <= chunk * vocabulary
    assert sum(saved) < rows * vocabulary / 10
    saved.clear()
    with torch.no_grad(), watch:
        ScoredHead.apply(*tensors, labels, (1.0, 0.0, 1.0), WANT)
    assert not saved


# ---- what must be refused --------------------------------------------------------------------------------------------

def test_wrong_implementation_is_caught():
    for name in ("Llama", "Bloom"):
        lm, batch = build(name), flat_batch(make_groups())
        policy = Policy(lm)
        policy(batch)
        lm.config._attn_implementation = "sdpa" if name == "Llama" else attention.ATTENTION
        with pytest.raises(InputError, match=lm.config._attn_implementation):
            policy(batch)


def test_attention_refuses_what_it_would_leave_out():
    q = torch.randn(1, 2, 6, 8)
    borders = {name: torch.tensor([0, 6], dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    module = torch.nn.Identity()
    attention.flat_attention(module, q, q, q, None, position_ids=0, use_cache=False, alibi=None, **borders)
    for wrong in ({"alibi": 1}, {"cache": object()}, {"dropout": 0.1}, {"is_causal": False}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            attention.flat_attention(module, q, q, q, None, **wrong, **borders)
    with pytest.raises(InputError, match="mask: True"):
        attention.flat_attention(module, q, q, q, torch.ones(6, 6), **borders)
    with pytest.raises(InputError, match="borders: False"):
        attention.flat_attention(module, q, q, q, None)
    for wrong in ({"softcap": 1.0}, {"sinks": torch.zeros(2)}):
        arguments = dict.fromkeys(("query", "key", "value", "layout", "scaling", "window", "softcap", "sinks")) | wrong
        with pytest.raises(InputError, match="fused"):
            attention._fused_attention(**arguments)


def reference_kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size, softcap=0.0, **_):
    """varlen_attn's contract, one segment and one head at a time, with its demands on dtypes, widths and strides."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
    assert q.shape[-1] % 8 == 0 and q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    left, right = window_size
    out = []
    for start_q, end_q, start_k, end_k in zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:]):
        n_q, n_k = end_q - start_q, end_k - start_k
        assert n_q <= max_q and n_k <= max_k
        distance = torch.arange(n_k) - (torch.arange(n_q)[:, None] + n_k - n_q)
        hidden = distance > right
        if left >= 0:
            hidden |= distance < -left
        heads = []
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            scores = q[start_q:end_q, head] @ k[start_k:end_k, shared].T * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[start_k:end_k, shared])
        out.append(torch.stack(heads, 1))
    return torch.cat(out)


@pytest.mark.parametrize("softcap", (None, 2.0))
@pytest.mark.parametrize("window", (None, 1, 4, 100))
@pytest.mark.parametrize("heads, heads_kv", [(4, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("width, width_v", [(16, 16), (12, 12), (24, 20), (64, 64)])
def test_the_fused_road_is_the_segment_road(width, width_v, heads, heads_kv, window, softcap, monkeypatch):
    """Through a reference kernel in place of torch's and flash_attn's, forward and gradients, in float64."""
    flash = lambda *inputs, softmax_scale, causal, **more: reference_kernel(*inputs, scale=softmax_scale, **more)  # noqa: E731
    monkeypatch.setattr(attention, "varlen_attn", reference_kernel)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", flash)
    batch = flat_batch(make_groups())
    torch.manual_seed(0)
    count = len(batch["input_ids"])
    shapes = [(count, heads, width), (count, heads_kv, width), (count, heads_kv, width_v)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    layout = tuple(batch[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_q", "max_k"))
    weights = torch.linspace(-1, 1, count * heads * width_v, dtype=torch.float64).view(count, heads, width_v)
    answers = []
    for road in attention._segment_attention, attention._fused_attention:
        key, value = (attention.select_rows(x, batch["kv_index"]) for x in leaves[1:])
        options = {"scaling": width**-0.5, "window": window, "softcap": softcap, "sinks": None}
        out = road(leaves[0], key, value, layout, **options)
        answers.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for segments, fused in zip(*answers):
        assert (segments - fused).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ("head_dim", "qk_head_dim"))
def test_no_kernel_takes_heads_wider_than_256(name):
    lm = build("Qwen3")
    setattr(lm.model.layers[1].self_attn, name, 512)  # one layer of many, as in Gemma 4
    assert runs_flat(lm, "cpu") and not runs_flat(lm, "cuda")


def test_the_plan_names_the_kernel():
    names = {device: attention.kernel_name(build("Llama"), device, torch.bfloat16) for device in ("cpu", "cuda")}
    assert names == {"cpu": "scaled_dot_product_attention by segment", "cuda": "varlen_attn (FA2)"}
    assert attention.kernel_name(build("Gemma2"), "cuda", torch.bfloat16) == "flash_attn"
    assert attention.kernel_name(build("Llama"), "cuda", torch.float32) == names["cpu"]


def test_flash_attention_3_where_it_is_installed(monkeypatch):
    """On the GPUs that it is for, and only there: 9 is the H100 and H200."""
    chosen = []
    monkeypatch.setattr(attention, "activate_flash_attention_impl", chosen.append)
    for installed, major in ((None, 9), ("a spec", 8), ("a spec", 9)):
        monkeypatch.setattr(attention.importlib.util, "find_spec", lambda _, found=installed: found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number=major: (number, 0))
        attention.use_newest_kernel()
    assert chosen == ["FA3"]


def test_roads():
    for name in FLAT:
        lm = build(name)
        assert runs_flat(lm, "cpu")
        assert runs_flat(lm, "cuda") == (name not in ("Gemma2", "GptOss")), name
    for name in [*PADDED, "StableLm", "FalconH1", "Llama4Text"]:
        assert not runs_flat(build(name, **(MOE if name == "Llama4Text" else {})), "cpu"), name
    for flag, value in (("_is_stateful", True), ("_supports_attention_backend", False)):  # each alone is reason enough
        lm = build("Llama")
        setattr(lm, flag, value)
        assert not runs_flat(lm, "cpu"), flag


def test_rotary_tables_that_depend_on_the_batch():
    factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "original_max_position_embeddings": 32}
    config = transformers.Phi3Config(hidden_size=48, num_attention_heads=4, max_position_embeddings=128,
                                     original_max_position_embeddings=32,
                                     rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors})
    refuse_rotary(config, 32)
    with pytest.raises(InputError, match="longrope.*--max_length 33 must be at most 32"):
        refuse_rotary(config, 33)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = transformers.LlamaConfig(max_position_embeddings=64, rope_parameters=dynamic)
    refuse_rotary(config, 64)
    with pytest.raises(InputError, match="dynamic.*64"):
        refuse_rotary(config, 65)
    config = transformers.Gemma3TextConfig(max_position_embeddings=64)
    refuse_rotary(config, 10**6)
    config.rope_parameters["full_attention"]["rope_type"] = "dynamic"
    with pytest.raises(InputError, match="dynamic"):
        refuse_rotary(config, 65)
    for config in (transformers.GPT2Config(), transformers.BloomConfig()):  # learned positions; none at all
        refuse_rotary(config, 10**6)


def test_head_must_be_linear_and_registered_once():
    lm = build("Llama")
    with pytest.raises(InputError, match="causal language model"):
        Policy(transformers.LlamaForSequenceClassification(lm.config))
    with pytest.raises(ValueError):
        Policy(lm)(flat_batch(make_groups()), ("logits",))
    names = [name for name, _ in Policy(build("Qwen3")).named_parameters(remove_duplicate=False)]
    assert all(name.startswith("lm.") for name in names)
    assert len(names) == len({re.sub("lm_head", "model.embed_tokens", name) for name in names}) + 1  # the tied alias


# ---- fully_shard -----------------------------------------------------------------------------------------------------

class Unread(list):
    """FSDP2 walks through every list that a forward is given; with a flag for each token that takes long."""

    def __iter__(self):
        raise AssertionError("the list reached the hooks of FSDP2")


def shard_and_differentiate(rank, folder, lm, recompute):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    policy = Policy(lm, temperature=0.7)
    if recompute:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train()
    for layer in lm.model.layers:
        fully_shard(layer)
    fully_shard(policy)
    register_fsdp_forward_method(policy, "plain_forward")
    plain = policy.plain_forward(make_groups())  # the layers are gathered for every sequence: as many on every rank
    groups = make_groups()[2 * rank:2 * rank + 2]
    out = policy({**flat_batch(groups), "groups": Unread(groups)}, WANT)
    loss = out["logprobs"].sum() + out["entropy"].sum() + out["sum_p2"].sum()
    (2 * loss).backward()  # FSDP2 takes the mean over the two ranks
    grads = {name: p.grad.full_tensor() for name, p in policy.named_parameters()}
    torch.save({"grads": grads, "plain": plain, "logprobs": out["logprobs"].detach()}, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("name, recompute", [("Qwen3", False), ("Qwen3 untied", True)])
def test_fully_shard_equals_one_process(name, recompute, tmp_path):
    lm, groups = build(name), make_groups()
    policy = Policy(copy.deepcopy(lm), temperature=0.7)
    plain = policy.plain_forward(groups)
    out = policy(flat_batch(groups), WANT)
    expected = gradients(policy, out["logprobs"].sum() + out["entropy"].sum() + out["sum_p2"].sum())
    torch.multiprocessing.start_processes(shard_and_differentiate, (str(tmp_path), lm, recompute), nprocs=2,
                                          start_method="fork")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    got = torch.cat([x["logprobs"] for x in ranks])
    torch.testing.assert_close(got, out["logprobs"].detach(), rtol=0, atol=1e-5)  # fp32 rounding, other GEMM heights
    for rank in ranks:
        torch.testing.assert_close(rank["plain"], plain, rtol=0, atol=1e-6)  # the same sums
        grads = {name.removeprefix("lm."): x for name, x in rank["grads"].items()}
        assert_gradients(grads, expected, 1e-5)  # one addition more, across ranks
