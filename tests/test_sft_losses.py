"""SFT's losses, noise, routers, averages and cut rows against the papers' formulas, transformers and TRL 1.16.0.

Oracles: numbers by hand, formulas written once more in plain torch and float64, transformers' own load-balancing loss
and NEFTune hook, and TRL's numbers in fixtures/trl_sft.json (by benchmarks/trl_sft_fixtures.py). What cuts a step, and
resuming, are in test_split and test_resume for all scripts; here also for a model with experts, which the lab lacks.
"""

import json
import math
from array import array
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, lone_run, newest, read_jsonl, script, tiny_rows, train, trainer_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import attempt, refused
from test_logprobs import assert_gradients, build, gradients, make_groups
from test_split import metric_differences
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from common.batches import flat_batch, order, pack, split_group
from common.logprobs import Policy
from common.tokenization import stop_ids

sft, neftune = script("sft"), script("experimental/neftune")
moe, bema = script("experimental/sft_moe"), script("experimental/sft_bema")
FIXTURE = json.loads((ROOT / "tests" / "fixtures" / "trl_sft.json").read_text())
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # a few dozen float64 operations on numbers of size 10
TINY = ROOT / "common" / "tiny" / "model"


def f64(values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def close(actual, expected, **tolerance):
    actual, expected = (x.detach() if isinstance(x, torch.Tensor) else f64(x) for x in (actual, expected))
    torch.testing.assert_close(actual.double(), expected.double(), **(tolerance or EXACT))


# ---- what a token costs ----------------------------------------------------------------------------------------------


def ours(logits, labels, **flags):
    """-> the script's sum over tokens, and its gradient by the logits (M, V), in float64."""
    logits = f64(logits, grad=True)
    logp = logits.log_softmax(-1)
    out = {"logprobs": logp.gather(1, torch.tensor(labels)[:, None])[:, 0], "mean_logprob": logp.mean(-1)}
    loss = sft.sft_loss(out, sft.Args(**flags))
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


LOGITS = [[0.0, 0.0, math.log(2)], [math.log(6), math.log(3), 0.0]]  # p = (1/4, 1/4, 1/2) and (6/10, 3/10, 1/10)
LABELS = [2, 1]


def test_dft_by_hand():
    """sum of p (-log p) = 0.5 ln 2 + 0.3 ln(10 / 3); the gradient of a token is nll's, p - e_y, times p_y."""
    loss, slope = ours(LOGITS, LABELS, loss_type="dft")
    close(loss, 0.34657359027997264 + 0.36119184129778087)
    close(slope, [[0.5 * 0.25, 0.5 * 0.25, -0.5 * 0.5], [0.3 * 0.6, -0.3 * 0.7, 0.3 * 0.1]])


def test_label_smoothing_by_hand():
    """The first token: 0.9 ln 2 + 0.1 (2 ln 4 + ln 2) / 3; the gradient is p minus the smoothed label."""
    loss, slope = ours(LOGITS[:1], LABELS[:1], label_smoothing_factor=0.1)
    close(loss, 0.9 * math.log(2) + 0.1 * 5 / 3 * math.log(2))
    close(slope, [[0.25 - 0.1 / 3, 0.25 - 0.1 / 3, 0.5 - 0.9 - 0.1 / 3]])


TOKENS = st.lists(st.tuples(st.lists(st.floats(-30, 30), min_size=5, max_size=5), st.integers(0, 4)), min_size=1,
                  max_size=6)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(TOKENS, st.floats(0.01, 0.99), st.data())
def test_identities(tokens, smoothing, data):
    """Without smoothing nll; dft's gradient is nll's weighted by p, so nothing where p is 0 or 1, and never more; a
    label smoothed by e is the mean over labels that are uniform with probability e; sums do not mind order or cuts."""
    logits, labels = zip(*tokens)
    nll, slope = ours(logits, labels)
    close(ours(logits, labels, label_smoothing_factor=0.0)[0], nll)
    p = f64(logits).softmax(-1).gather(1, torch.tensor(labels)[:, None])
    dft, dft_slope = ours(logits, labels, loss_type="dft")
    close(dft_slope, p * slope)
    assert 0 <= dft <= min(nll + 1e-12, len(tokens) / math.e + 1e-12)  # -p log p is at most 1 / e
    flipped = sum(ours(logits, [v] * len(labels))[0] for v in range(5)) / 5
    smooth = ours(logits, labels, label_smoothing_factor=smoothing)
    close(smooth[0], (1 - smoothing) * nll + smoothing * flipped, rtol=1e-9, atol=1e-9)
    at = data.draw(st.permutations(range(len(tokens))))
    for flags in {"loss_type": "dft"}, {"label_smoothing_factor": smoothing}:
        whole, by_logit = ours(logits, labels, **flags)
        assert whole.isfinite() and by_logit.isfinite().all()
        parts = [ours([logits[i]], [labels[i]], **flags) for i in at]
        close(sum(part[0] for part in parts), whole, rtol=1e-9, atol=1e-9)
        close(torch.cat([part[1] for part in parts]), by_logit[list(at)], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: f"{case['flags']} {case['tokens']}")
def test_trl(case):
    """The same value, and the same gradient of every logit; a step of more tokens than the micro-batch too."""
    rows = [(b, t + 1) for b, row in enumerate(FIXTURE["labels"]) for t in range(len(row) - 1) if row[t + 1] != -100]
    logits = [FIXTURE["logits"][b][t - 1] for b, t in rows]
    num_tokens = case["tokens"] or len(rows)
    loss, slope = ours(logits, [FIXTURE["labels"][b][t] for b, t in rows], **case["flags"])
    half = "label_smoothing_factor" in case["flags"]  # transformers sums over the vocabulary in float32
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if half else EXACT
    close(loss / num_tokens, case["loss"], **tolerance)
    close(slope / num_tokens, [case["gradient"][b][t - 1] for b, t in rows], **tolerance)


def test_the_fixture_is_of_this_trl_and_has_every_loss():
    assert FIXTURE["trl"] == "1.16.0" and len(FIXTURE["cases"]) == 8 and len(FIXTURE["bema"]) == 7
    assert {case["flags"].get("loss_type", "nll") for case in FIXTURE["cases"]} == {"nll", "dft"}


# ---- whole runs ------------------------------------------------------------------------------------------------------


def encode(path):
    """The file's rows through the script -> groups, tokenizer."""
    tokenizer, lm = AutoTokenizer.from_pretrained(TINY), AutoModelForCausalLM.from_pretrained(TINY)
    args = sft.Args()
    return sft.load_groups(path, tokenizer, stop_ids(tokenizer, lm.generation_config), args, lone_run(args))[0]


def per_token(groups):
    """(log p of the label, its mean over the vocabulary) of all scored tokens, by the tiny model one row at a time."""
    lm, found = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), []
    for group in groups:
        (completion,) = group["completions"]
        ids = torch.tensor([*group["prompt"], *completion["ids"]])
        scored = [False] * len(group["prompt"]) + list(completion["scored"] or [True] * len(completion["ids"]))
        with torch.no_grad():
            logp = lm(ids[None]).logits[0].double().log_softmax(-1)
        found += [(logp[t - 1, ids[t]].item(), logp[t - 1].mean().item()) for t in range(1, len(ids)) if scored[t]]
    return found


def first_step(folder, name, *flags, rows=None):
    """The metrics of a run of one step over the first six rows."""
    rows = rows or tiny_rows("sft", folder / "rows.jsonl", 6)
    common = ["--dataset", rows, "--eval_dataset", "", "--batch_size", 6, "--max_steps", 1, "--save_every", 0]
    train(name, folder / "out", *common, *flags)
    (line,) = read_jsonl(folder / "out" / "metrics.jsonl")
    alerts = folder / "out" / "alerts.jsonl"
    found = read_jsonl(alerts) if alerts.exists() else []
    assert {alert["code"] for alert in found} <= {"DATA007"}  # rows of plain text
    return line


@pytest.mark.parametrize("flags, token_loss", (
    (["--loss_type", "dft"], lambda x, mean: -math.exp(x) * x),
    (["--label_smoothing_factor", 0.2], lambda x, mean: -0.8 * x - 0.2 * mean),
), ids=("dft", "smoothing"))  # fmt: skip
def test_a_run(flags, token_loss, tmp_path):
    """The loss of step 1 in several micro-batches, by the model's own logits: a mean over all scored tokens."""
    line = first_step(tmp_path, "sft", *flags, "--tokens_per_microbatch", 100)
    tokens = per_token(encode(str(tmp_path / "rows.jsonl")))
    expected = sum(token_loss(*token) for token in tokens) / len(tokens)
    assert line["num_tokens"] == len(tokens) and line["loss"] == pytest.approx(expected, rel=1e-5)


# ---- rows that are too long ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_pieces_score_every_token_once(data):
    size, prompt = data.draw(st.integers(2, 40)), data.draw(st.integers(0, 20))
    ids = array("i", range(100, 100 + prompt + size))
    bos = data.draw(st.sampled_from([None, 100, 7]))  # 100: the row begins with it
    scored = data.draw(st.none() | st.lists(st.booleans(), min_size=size, max_size=size))
    group = {"prompt": ids[:prompt], "completions": [{"ids": ids[prompt:], "scored": scored}], "row": 5, "split": True}
    limit = data.draw(st.integers(3, 70))
    pieces = split_group(group, limit, bos)
    if len(ids) <= limit:
        assert pieces == [group]
        return
    expected = flat_batch([group])["labels"].tolist()
    if not expected:
        return  # nothing is scored: fit() counts the row and drops it
    assert [x for piece in pieces for x in flat_batch([piece])["labels"].tolist()] == expected
    for piece in pieces:
        (completion,) = piece["completions"]
        whole = [*piece["prompt"], *completion["ids"]]
        assert len(whole) <= limit and (piece["row"], piece["split"]) == (5, True)
        begin = bos if bos == 100 and whole[0] == 100 and len(whole) > 1 and whole[1] != 101 else None
        inner = whole[1:] if begin else whole  # consecutive tokens of the row, behind its BOS
        assert inner == list(range(inner[0], inner[0] + len(inner)))
        assert bos != 100 or whole[0] == 100
        assert piece["cut"] == (whole[-1] != ids[-1])
        assert all(x > inner[0] for x in flat_batch([piece])["labels"].tolist())  # each label has its predecessor


def test_pieces_by_hand():
    """Nine tokens, BOS 1, at most four: [1 2 3 4] [1 4 5 6] [1 6 7 8] [1 8 9]; in the row the first two are prompt."""
    group = {"prompt": array("i", [1, 2]), "completions": [{"ids": array("i", range(3, 10)), "scored": None}], "row": 0}
    pieces = split_group(group, 4, bos=1)
    assert [[*p["prompt"], *p["completions"][0]["ids"]] for p in pieces] == [[1, 2, 3, 4], [1, 4, 5, 6], [1, 6, 7, 8],
                                                                            [1, 8, 9]]  # fmt: skip
    assert [flat_batch([p])["labels"].tolist() for p in pieces] == [[3, 4], [5, 6], [7, 8], [9]]
    assert [p["cut"] for p in pieces] == [True, True, True, False]
    late = {**group, "completions": [{"ids": array("i", range(3, 10)), "scored": [False] * 6 + [True]}]}
    (piece,) = split_group(late, 4, bos=1)  # nothing to learn from the others
    assert flat_batch([piece])["labels"].tolist() == [9]


def test_a_run_over_pieces(tmp_path):
    """Texts and prompts with answers of up to 60 tokens at a --max_length of 20: no alert, every token in the loss, and
    the loss is that of the pieces. Without the flag the same rows are dropped."""
    rows = [{"text": "3+4=7, " * 8 + str(k)} for k in range(3)]
    rows += [{"prompt": "1+2=", "completion": "3 " * k} for k in (3, 25)] + [{"text": "short"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "rows.jsonl")
    whole = encode(path)
    pieces = [piece for group in whole for piece in split_group(group, 20)]
    assert len(whole) == 6 and len(pieces) > 12
    line = first_step(tmp_path, "sft", "--split_overlong", "--max_length", 20, "--batch_size", len(pieces), rows=path)
    tokens = per_token(pieces)
    assert line["num_tokens"] == len(tokens) == len(per_token(whole))
    assert line["loss"] == pytest.approx(-sum(x for x, _ in tokens) / len(tokens), rel=1e-5)
    assert attempt("sft", tmp_path / "dropped", "--dataset", path, "--max_length", 20).code == 3  # DATA005


# ---- NEFTune ---------------------------------------------------------------------------------------------------------


def noise(length, width=64, alpha=5.0, seed=42, place=3):
    group = {"prompt": array("i", range(length - 4)), "completions": [{"ids": array("i", range(4)), "scored": None}]}
    args = neftune.Args(neftune_noise_alpha=alpha, seed=seed)
    return neftune.embedding_noise(group | {"place": place}, width, args, SimpleNamespace(device=torch.device("cpu")))


def transformers_bound(length, width, alpha, monkeypatch):
    """What transformers' own hook adds where its uniform numbers are all at their upper end."""
    module = torch.nn.Embedding(9, width).train()
    module.neftune_noise_alpha = alpha
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda x, low, high: x.fill_(float(high)))
    zeros = torch.zeros(1, length, width)
    return neftune_post_forward_hook(module, None, zeros)[0, 0, 0].item()


@pytest.mark.parametrize("length, alpha", ((10, 5.0), (50, 15.0)))
def test_noise_is_uniform_and_as_large_as_transformers_noise(length, alpha, monkeypatch):
    x = noise(length, alpha=alpha).double()
    bound = alpha / math.sqrt(length * 64)
    assert transformers_bound(length, 64, alpha, monkeypatch) == pytest.approx(bound, rel=1e-6)
    assert x.shape == (length, 64) and x.abs().max() <= bound * (1 + 1e-6)
    # Kolmogorov-Smirnov: sorted, the k-th of n lies by (2 k / n - 1) bound, further than 2 / sqrt(n) once in 3000 seeds
    grid = (2 * torch.arange(1, x.numel() + 1) / x.numel() - 1) * bound
    assert (x.flatten().sort().values - grid).abs().max() < 2 * bound * 2 / math.sqrt(x.numel())
    close(x / alpha, noise(length, alpha=1.0), rtol=1e-6, atol=1e-9)


def test_noise_depends_on_seed_and_place_alone():
    assert torch.equal(noise(10), noise(10))
    others = [noise(10), noise(10, seed=43), noise(10, place=4), noise(10, seed=3, place=42)]
    for i, x in enumerate(others):
        assert all((x - y).abs().max() > 0.05 for y in others[:i])  # of at most 0.4
    assert torch.equal(noise(10, alpha=0.0), torch.zeros(10, 64))


@pytest.mark.parametrize("name", ("Llama", "Qwen3Next"))
def test_the_policy_under_noise(name):
    """Log-probs and gradients in two micro-batches: each row by itself, its embeddings handed to the model with the
    noise on them; on the padded road too. Afterwards nothing is left of it."""
    lm, run = build(name), SimpleNamespace(device=torch.device("cpu"))
    args = neftune.Args(neftune_noise_alpha=30.0)
    groups = [group | {"place": k} for k, group in enumerate(make_groups()[2:] + make_groups(1)[2:])]
    lm.set_attn_implementation("eager")
    expected = []
    for group in groups:
        ids = torch.tensor([*group["prompt"], *group["completions"][0]["ids"]])
        extra = neftune.embedding_noise(group, 48, args, run)
        embeddings = lm.get_input_embeddings()(ids) + extra
        logp = lm(inputs_embeds=embeddings[None], use_cache=False).logits[0].log_softmax(-1)
        first = max(1, len(group["prompt"]))
        expected.append(logp[torch.arange(first - 1, len(ids) - 1), ids[first:]])
    wanted = gradients(lm, -torch.cat(expected).sum())
    policy, got = Policy(lm), []
    clean = policy(flat_batch(groups))["logprobs"]
    for part in groups[:3], groups[3:]:
        got.append(neftune.noisy_forward(policy, flat_batch(part), (), args, run)["logprobs"])
    close(torch.cat(got), torch.cat(expected), rtol=1e-5, atol=2e-5)  # fp32: sums over 48 to 97 numbers
    assert (torch.cat(got) - clean).abs().max() > 0.1
    tolerance = 1e-5 if name == "Llama" else 1e-4  # as in test_logprobs
    assert_gradients(gradients(policy, -torch.cat(got).sum()), wanted, tolerance)
    assert torch.equal(policy(flat_batch(groups))["logprobs"], clean)


def test_runs_with_and_without_noise(tmp_path):
    """alpha 0 is sft to the bit, other alphas are not; nothing changes where layers are computed again in backward."""
    rows, lines = tiny_rows("sft", tmp_path / "rows.jsonl", 6), {}
    for name, *flags in (("sft",), ("neftune", "--neftune_noise_alpha", 0), ("neftune",),
                         ("neftune", "--activation_checkpointing", "on")):  # fmt: skip
        out = tmp_path / f"{len(lines)}"
        common = ["--dataset", rows, "--eval_dataset", rows, "--batch_size", 6, "--max_steps", 2, "--save_every", 0]
        common += ["--learning_rate", "1e-4"]
        train(name if name == "sft" else f"experimental/{name}", out, *common, *flags)
        lines[len(lines)] = read_jsonl(out / "metrics.jsonl")
    assert lines[0] == lines[1] and lines[0] != lines[2] and lines[0][0] == lines[2][0]  # the first evaluation
    assert abs(lines[0][1]["loss"] - lines[2][1]["loss"]) > 1e-4
    assert metric_differences(lines[2], lines[3]) == []


# ---- experts ---------------------------------------------------------------------------------------------------------

EXPERTS = "Mixtral", "Qwen3Moe", "Qwen3Next"  # the last one on the padded road


def expert_loss(lm, groups):
    """transformers' own loss on the router logits of all sequences of the step, one at a time, as one batch."""
    logits = []
    for group in groups:
        for completion in group["completions"]:
            ids = torch.tensor([*group["prompt"], *completion["ids"]])
            logits.append(lm(ids[None], use_cache=False, output_router_logits=True).router_logits)
    layers = tuple(torch.cat(same) for same in zip(*logits))
    return load_balancing_loss_func(layers, layers[0].shape[-1], lm.config.num_experts_per_tok)


@pytest.mark.parametrize("budget", (4096, 20))
@pytest.mark.parametrize("name", EXPERTS)
def test_the_auxiliary_loss_is_of_the_whole_step(name, budget):
    """Value and gradient against one whole batch, in one micro-batch and in many. A row has one completion, and a batch
    at weight 0 counts for nothing."""
    lm = build(name)
    groups = [group | {"completions": [c]} for group in make_groups() for c in group["completions"]]
    lm.set_attn_implementation("eager")
    expected = expert_loss(lm, groups)
    wanted = gradients(lm, expected)
    policy, parts = Policy(lm), [(part, 1.0) for part in pack(groups, budget)]
    parts = [(flat_batch(part), weight) for part, weight in [*parts, (make_groups(1)[2:3], 0.0)]]
    assert policy.road == ("padded" if name == "Qwen3Next" else "flat") and (len(parts) > 4) == (budget == 20)
    counts, total = 0, 0
    for batch, weight in parts:
        with torch.no_grad():
            out, logits = moe.routed_forward(policy, batch, ("mean_logprob",))
        plain = policy(batch, ("mean_logprob",))
        assert all(torch.equal(out[key], plain[key]) for key in ("logprobs", "mean_logprob"))
        counts = counts + weight * moe.count_experts(logits, 2)
    layers = 2 if name == "Qwen3Next" and lm.config.mlp_only_layers else 3
    tokens = sum(len(g["prompt"]) + len(c["ids"]) for g in groups for c in g["completions"])
    assert counts.sum() == 2 * layers * tokens  # each of them chooses two experts in each layer
    for batch, weight in parts:
        _, logits = moe.routed_forward(policy, batch)
        total = total + weight * moe.aux_loss(logits, counts, 2)
    close(total, expected, rtol=1e-5, atol=0)  # sums of some 500 fp32 probabilities
    got = {key: x for key, x in gradients(policy, total).items() if key in wanted}
    scale = max(x.abs().max() for x in wanted.values())
    assert scale > 1e-3 and len(got) == len(wanted)
    for key, x in wanted.items():  # small differences of softmaxes, summed in another order
        assert (got[key] - x).abs().max() < 2e-4 * scale, key


def test_the_mean_of_micro_batches_is_another_loss():
    """What TRL adds: this loss of each micro-batch, averaged. It asks more: here by a tenth."""
    lm, groups = build("Mixtral"), make_groups()
    whole = expert_loss(lm, groups)
    parts = [expert_loss(lm, [group]) for group in groups]
    assert sum(parts) / len(parts) > 1.02 * whole


def test_balanced_experts_cost_top_k():
    """All probabilities alike and each expert chosen as often: E * sum_e (k / E) (1 / E) = k, the least there is."""
    logits = 1e-6 * torch.eye(4).roll(1, 0)[None] + 2e-6 * torch.eye(4)[None]  # (1, 4, 4): token t prefers t, then t+1
    counts = moe.count_experts(logits, 2)
    assert counts.tolist() == [2, 2, 2, 2]
    close(moe.aux_loss(logits, counts, 2), 2.0, rtol=1e-5, atol=0)
    alone = torch.tensor([[[20.0, 10.0, 0.0, 0.0]] * 3])  # always the same two: E (1 * 1 + 1 * 0)
    close(moe.aux_loss(alone, moe.count_experts(alone, 2), 2), 4.0, rtol=1e-3, atol=0)


def expert_run(folder, out, *flags, world=1):
    """The metrics of two steps of five rows by a random model with experts, folder/model, on the lab's tokens."""
    common = ["--model", folder / "model", "--dataset", folder / "rows.jsonl", "--batch_size", 5, "--max_steps", 2]
    common += ["--save_every", 0, "--learning_rate", "1e-3", "--router_aux_loss_coef", 0.5, "--max_length", 200]
    common += ["--eval_dataset", ""]
    train("experimental/sft_moe", folder / out, *common, "--label_smoothing_factor", 0, *flags, world=world)
    return read_jsonl(folder / out / "metrics.jsonl")


def test_runs_with_experts(tmp_path):
    """Two ranks, rows one by one, an idle rank, layers computed again: the same as one process with one batch, whose
    first auxiliary loss is transformers'. It reaches the weights, and its coefficient is the model's own where none is
    given."""
    lm = build("Qwen3Moe", vocab_size=104, max_position_embeddings=512, sliding_window=None, bos_token_id=None)
    lm.save_pretrained(tmp_path / "model")
    for name in "tokenizer.json", "tokenizer_config.json", "chat_template.jinja":
        (tmp_path / "model" / name).write_bytes((TINY / name).read_bytes())
    rows = [encode(tiny_rows("sft", tmp_path / "rows.jsonl", 10))[i] for i in order(10, 42, 0, 5)]
    lines = expert_run(tmp_path, "whole")
    assert lines[0]["aux_loss"] == pytest.approx(expert_loss(lm, rows).item(), rel=1e-5)
    flags = ["--tokens_per_microbatch", 60, "--activation_checkpointing", "on"]
    assert metric_differences(lines, expert_run(tmp_path, "cut", *flags, world=2)) == []
    own = expert_run(tmp_path, "own", "--router_aux_loss_coef", -1)
    nll = lines[0]["loss"] - 0.5 * lines[0]["aux_loss"]
    assert own[0]["loss"] == pytest.approx(nll + lm.config.router_aux_loss_coef * lines[0]["aux_loss"], rel=1e-6)
    assert own[0]["grad_norm"] != lines[0]["grad_norm"] and own[1]["aux_loss"] > lines[1]["aux_loss"]


# ---- averaged weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FIXTURE["bema"], ids=lambda case: str(case["flags"]))
def test_trl_averages(case):
    """TRL's averaged weights after every step. Before its first move TRL holds the weights of step 0, here they are the
    policy's until --update_after."""
    path, args = f64(FIXTURE["path"]), bema.Args(**case["flags"])
    weights = [path[0].clone() for _ in range(4)]
    models = [SimpleNamespace(parameters=lambda p=p: [p]) for p in weights]  # policy, average, ema, start
    moved = 0
    for step in range(1, len(path)):
        weights[0].copy_(path[step])
        bema.move_average(*models, step, args)
        late = step - args.update_after
        expected = case["weights"][step] if late >= args.update_freq else path[max(0, min(step, args.update_after))]
        close(weights[1], expected)
        assert torch.equal(weights[0], path[step])
        moved += late >= args.update_freq
    assert moved > 1 and not torch.equal(weights[1], path[-1])


def bema_run(folder, *flags):
    """Four steps with a checkpoint after each -> metrics, the policy's weights, and the averages, from step 0 on."""
    rows = tiny_rows("sft", folder / "rows.jsonl", 15)
    usual = ["--dataset", rows, "--eval_dataset", rows, "--eval_rows", 4, "--eval_every", 1, "--batch_size", 5]
    usual += ["--max_steps", 4, "--save_every", 1, "--keep_last", 9, "--update_after", 0, "--loss_type", "nll"]
    train("experimental/sft_bema", folder / "out", *usual, *flags)
    start = dict(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).named_parameters())
    policy, average = [start], [start]
    for step in range(1, 5):
        tensors = trainer_tensors(folder / "out" / f"checkpoint-{step:06d}")
        average.append({name: tensors[f"model.average.lm.{name}"] for name in start})
        policy.append({name: tensors[f"model.policy.lm.{name}"] for name in start})
    return read_jsonl(folder / "out" / "metrics.jsonl"), policy, average


def apart(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_a_run_saves_and_evaluates_its_average(tmp_path):
    """The policy trains as sft does, to the bit; the averages are the paper's formula of its weights; final/ holds the
    last one, and its loss on the held-out rows is what was logged."""
    moves = ["--update_freq", 2, "--lag", 3, "--bias_power", 0.2, "--learning_rate", "1e-3"]
    lines, policy, average = bema_run(tmp_path, *moves)
    flags = ["--dataset", tmp_path / "rows.jsonl", "--batch_size", 5, "--max_steps", 4, "--save_every", 0]
    train("sft", tmp_path / "sft", *flags, "--eval_dataset", "", "--learning_rate", "1e-3")
    plain = trainer_tensors(newest(tmp_path / "sft"))
    assert all(torch.equal(x, plain[f"model.policy.lm.{name}"]) for name, x in policy[4].items())
    losses = [[x["loss"] for x in y if "loss" in x] for y in (lines, read_jsonl(tmp_path / "sft" / "metrics.jsonl"))]
    assert losses[0] == losses[1]
    ema, expected = policy[0], policy[0]
    for t in range(1, 5):
        if t % 2 == 0:
            a, b = (3 + t) ** -0.2, (3 + t) ** -0.5
            ema = {name: (1 - b) * ema[name] + b * policy[t][name] for name in ema}
            expected = {name: ema[name] + a * (policy[t][name] - policy[0][name]) for name in ema}
        assert apart(average[t], expected) < 1e-6  # weights of up to about 1, fp32
    assert apart(average[4], policy[4]) > 1e-4 and apart(average[4], ema) > 1e-4
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final", dtype=torch.float32)
    assert all(torch.equal(x, average[4][name]) for name, x in final.named_parameters())
    assert not (tmp_path / "out" / "alerts.jsonl").exists()  # CKPT001 compares the policy with final/
    held, total = encode(str(tmp_path / "rows.jsonl"))[:4], []
    for group in held:
        ids = torch.tensor([*group["prompt"], *group["completions"][0]["ids"]])
        logp = final(ids[None]).logits[0].log_softmax(-1)
        total += [logp[t - 1, ids[t]].item() for t in range(len(group["prompt"]), len(ids))]
    last = [line for line in lines if "eval/loss" in line][-1]
    assert last["eval/loss"] == pytest.approx(-sum(total) / len(total), rel=1e-4)


# ---- what may not be combined ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, flags, needle", (
    ("sft", ["--loss_type", "dft", "--label_smoothing_factor", "0.1"], "--label_smoothing_factor"),
    ("sft", ["--label_smoothing_factor", "1"], "--label_smoothing_factor"),
    ("sft", ["--label_smoothing_factor", "-0.1"], "--label_smoothing_factor"),
    ("sft", ["--loss_type", "dtf"], "dft"),
    ("sft", ["--split_overlong", "--max_length", "2"], "--max_length"),
    ("experimental/neftune", ["--neftune_noise_alpha", "nan"], "--neftune_noise_alpha"),
    ("experimental/sft_moe", ["--router_aux_loss_coef", "0.01"], "--router_aux_loss_coef"),
    ("experimental/sft_bema", ["--update_freq", "400"], "--update_freq"),
    ("experimental/sft_bema", ["--min_ema_multiplier", "1.5"], "--min_ema_multiplier"),
))  # fmt: skip
def test_runs_that_stop_before_step_1(name, flags, needle, tmp_path):
    refused(attempt(name, tmp_path, *flags), tmp_path, needle)
