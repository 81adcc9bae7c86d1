"""kto.py: its loss against numbers worked out by hand; a whole step against the two models themselves, one sequence at
a time; what becomes of labels and pairs.

The oracle of a step is written from equation 8 and section 4.1 of the paper. It shares the order of rows with the
script, and the ids of a row; not a line that shares prompts, cuts batches, mismatches or averages.
"""

import json
import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from conftest import ROOT, read_jsonl, script, tiny_rows, train
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_bad_input import attempt, refused, write_rows
from test_losses import close, f64
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.batches import order

kto = script("kto")
TINY = ROOT / "common" / "tiny" / "model"


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- loss ----------------------------------------------------------------------------------------
#          label       log pi   log ref   u
# row 0    desirable   -10      -12       +2
# row 1    not         -8       -7        -1
# row 2    desirable   -5       -5         0
# row 3    not         -9       -14       +5
ROWS = (-10.0, -8.0, -5.0, -9.0), (-12.0, -7.0, -5.0, -14.0), (1.0, 0.0, 1.0, 0.0)


def loss_of(rows=ROWS, kl=1.5, **more):
    logprobs, ref, desirable = (f64(*column) for column in rows)
    logprobs.requires_grad_()
    usual = {"beta": 0.1, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0}
    loss, metrics = kto.kto_loss(logprobs, ref, desirable, kl, SimpleNamespace(**(usual | more)))
    loss.backward()
    assert not any(value.requires_grad for value in metrics.values())
    return loss.item(), metrics, logprobs.grad


def test_value_metrics_and_gradient():
    """1 - sigmoid(beta (u - kl)) for desirable rows, 1 - sigmoid(beta (kl - u)) for the others; kl is 1.5."""
    loss, metrics, grad = loss_of(desirable_weight=1.2, undesirable_weight=0.7)
    values = [sigmoid(0.1 * (2 - 1.5)), sigmoid(0.1 * (1.5 + 1)), sigmoid(0.1 * (0 - 1.5)), sigmoid(0.1 * (1.5 - 5))]
    weights = [1.2, 0.7, 1.2, 0.7]
    close(loss, sum(w * (1 - v) for w, v in zip(weights, values)))
    close(loss, 1.9470276932535193)
    close(metrics["loss"], loss)
    signs = [-1, 1, -1, 1]  # up with the log-prob of desirable rows, down with the others
    close(grad, [s * w * 0.1 * v * (1 - v) for s, w, v in zip(signs, weights, values)])
    close(metrics["desirable"], 2.0)
    close(metrics["reward_chosen"], 0.2 + 0.0)
    close(metrics["reward_rejected"], -0.1 + 0.5)
    close(metrics["chosen_logprob"], -15.0)
    close(metrics["rejected_logprob"], -17.0)


def test_apo_zero_is_the_same_without_kl():
    loss, metrics, grad = loss_of(loss_type="apo_zero_unpaired")
    # 1 - sigmoid(beta u) and sigmoid(beta u)
    close(loss, 1 - sigmoid(0.2) + sigmoid(-0.1) + 1 - sigmoid(0.0) + sigmoid(0.5))
    for a, b in zip((loss, grad), (loss_of(kl=0.0)[i] for i in (0, 2))):
        close(a, b)
    assert set(get_args(kto.Args.__annotations__["loss_type"])) == {"kto", "apo_zero_unpaired"}


def test_half_of_the_weight_where_policy_and_reference_agree():
    loss, _, grad = loss_of((ROWS[0], ROWS[0], ROWS[2]), kl=0.0, desirable_weight=3.0)
    close(loss, (3 + 1 + 3 + 1) / 2)
    close(grad, [-0.075, 0.025, -0.075, 0.025])  # weight x beta / 4


@pytest.mark.parametrize("far", (50.0, -50.0, 10_000.0, -10_000.0))
def test_far_apart_stays_finite(far):
    loss, _, grad = loss_of(((far, far), (0.0, 0.0), (1.0, 0.0)), kl=0.0, beta=1.0)
    close(loss, 1.0)  # one of the two is as wrong as can be, the other as right
    assert grad.isfinite().all() and grad.abs().max() < 1e-12


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(-50, 0), st.floats(-50, 0), st.sampled_from((0.0, 1.0))), min_size=1, max_size=6),
       st.floats(0, 9), st.randoms(use_true_random=False))  # fmt: skip
def test_the_order_of_rows_does_not_matter(rows, kl, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    sums = [[loss, *metrics.values()] for loss, metrics, _ in (loss_of([*zip(*x)], kl) for x in (rows, shuffled))]
    for a, b in zip(*sums, strict=True):
        close(a, b, rtol=1e-12, atol=1e-9)  # sums of up to 6 numbers of up to 50, in two orders


def test_everyone_gets_the_next_rows_completion():
    rows = [{"prompt": k, "row": k, "label": k > 1, "completions": [{"ids": 10 * k}]} for k in range(4)]
    found = kto.mismatched(rows)
    assert [[c["ids"] for c in g["completions"]] for g in found] == [[0, 10], [10, 20], [20, 30], [30, 0]]
    assert [(g["prompt"], g["label"]) for g in found] == [(0, False), (1, False), (2, True), (3, True)]
    found[0]["completions"][1]["ref_logprob"] = -1.0  # of this prompt: row 1 must not know it
    assert "ref_logprob" not in found[1]["completions"][0] and "ref_logprob" not in rows[1]["completions"][0]
    assert kto.mismatched([]) == []


# ---- a whole step --------------------------------------------------------------------------------


def texts(rows):
    """Prompt and completion ids of chat rows, by the tokenizer alone; its end of turn closes a completion."""
    tokenizer, out = AutoTokenizer.from_pretrained(TINY), []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        out.append((prompt, tokenizer(row["completion"][0]["content"])["input_ids"] + [tokenizer.eos_token_id]))
    return out


def logprob(lm, prompt, completion):
    logp = lm(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logp.gather(1, torch.tensor(completion)[:, None]).sum()


@pytest.mark.parametrize("loss_type", ("kto", "apo_zero_unpaired"))
def test_a_step(loss_type, tmp_path):
    """Loss, kl, metrics and gradient norm of the step with the largest kl, from the checkpoint before it and the model
    that training began with. Log-probs that sum to -150 are known to 1e-5, means of five differences to a bit less."""
    rows, size = [json.loads(x) for x in open(tiny_rows("kto", tmp_path / "rows.jsonl", 15))], 5
    flags = ["--dataset", tmp_path / "rows.jsonl", "--batch_size", size, "--max_steps", 9, "--save_every", 1]
    flags += ["--eval_dataset", "", "--loss_type", loss_type, "--desirable_weight", 1.3, "--undesirable_weight", 0.8]
    flags += ["--beta", 0.5, "--max_grad_norm", 0, "--keep_last", 9]
    train("kto", tmp_path / "out", *flags, world=2 if loss_type == "kto" else 1)
    lines = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    at = max(range(1, 9), key=lambda i: lines[i]["kl"])
    before = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / f"out/checkpoint-{at:06d}", dtype=torch.float32).eval()
    step = order(len(rows), 15, at * size, size)
    encoded, labels = texts([rows[i] for i in step]), [rows[i]["label"] for i in step]
    with torch.no_grad():
        others = [(encoded[i][0], encoded[(i + 1) % size][1]) for i in range(size)]
        kl = sum(logprob(policy, *pair) - logprob(before, *pair) for pair in others) / size
        ref = [logprob(before, *pair) for pair in encoded]
    kl = max(0.0, kl.item())
    u = [logprob(policy, *pair) - r for pair, r in zip(encoded, ref)]
    shift = kl if loss_type == "kto" else 0.0
    losses = [1.3 * (1 - torch.sigmoid(0.5 * (x - shift))) if label else 0.8 * (1 - torch.sigmoid(0.5 * (shift - x)))
              for x, label in zip(u, labels)]
    loss = sum(losses) / size
    loss.backward()
    norm = torch.stack([p.grad.double().square().sum() for p in policy.parameters()]).sum().sqrt()
    chosen, rejected = ([0.5 * x.item() for x, label in zip(u, labels) if label is kind] for kind in (True, False))
    chosen, rejected = sum(chosen) / len(chosen), sum(rejected) / len(rejected)
    assert {True, False} == set(labels) and abs(chosen - rejected) > 0.05 and kl > 0.05
    found = lines[at]
    assert found["kl"] == pytest.approx(kl, abs=2e-5) and min(line["kl"] for line in lines[1:]) == 0.0  # never below
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert found["reward_chosen"] == pytest.approx(chosen, abs=1e-5)
    assert found["reward_rejected"] == pytest.approx(rejected, abs=1e-5)
    assert found["reward_margin"] == pytest.approx(chosen - rejected, abs=1e-5)
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    weights = sum(1.3 if rows[i]["label"] else 0.8 for i in order(len(rows), 15, 0, size))
    assert lines[0]["loss"] == pytest.approx(weights / size / 2, abs=1e-6) and lines[0]["kl"] < 1e-5


# ---- data ----------------------------------------------------------------------------------------

ASKS, RIGHT, WRONG = ([{"role": role, "content": text}] for role, text in
                      (("user", "3+4?"), ("assistant", "7"), ("assistant", "8")))  # fmt: skip


def test_a_pair_becomes_two_rows(tmp_path):
    """The same run from pairs as from their two halves with labels."""
    pairs = write_rows(tmp_path, *[{"prompt": ASKS, "chosen": RIGHT, "rejected": WRONG}] * 2)
    halves = [{"prompt": ASKS, "completion": text, "label": label} for text, label in ((RIGHT, True), (WRONG, False))]
    (tmp_path / "halves").mkdir()
    flags = ["--batch_size", 4, "--max_steps", 3, "--eval_dataset", "", "--save_every", 0]
    train("kto", tmp_path / "a", "--dataset", pairs, *flags)
    train("kto", tmp_path / "b", "--dataset", write_rows(tmp_path / "halves", *halves * 2), *flags)
    a, b = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert a == b and abs(a[-1]["reward_margin"]) > 1e-3


def test_a_step_without_one_label_says_null(tmp_path):
    """Two rows a step of six, five of them right: a mean over nothing is no number."""
    rows = [{"prompt": ASKS, "completion": RIGHT, "label": True}] * 5
    data = write_rows(tmp_path, *rows, {"prompt": ASKS, "completion": WRONG, "label": False})
    train("kto", tmp_path / "out", "--dataset", data, "--batch_size", 2, "--max_steps", 3, "--eval_dataset", "")
    lines = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert [line["reward_rejected"] is None for line in lines].count(True) == 2
    assert all(line["reward_chosen"] is not None and line["loss"] > 0 for line in lines)
    assert [line["reward_margin"] is None for line in lines] == [line["reward_rejected"] is None for line in lines]


def advice(right, wrong, **more):
    args = kto.Args(**{"batch_size": 2, **more})
    return kto.label_balance([{"label": True}] * right + [{"label": False}] * wrong, args)


def test_the_balance_of_weights_is_said():
    """weight x count of the desirable rows: 1 to 4/3 times that of the others (paper, section 4.2)."""
    assert advice(4, 4) == ("labels    4 of 8 are true; --desirable_weight 1 is inside the advised range of 1 to 1.33")
    assert "is OUTSIDE the advised range of 2 to 2.67" in advice(2, 4)
    assert "--desirable_weight 2.5 is inside" in advice(2, 4, desirable_weight=2.5)
    assert "inside the advised range of 0.8 to 1.07" in advice(4, 4, undesirable_weight=0.8)


@pytest.mark.parametrize("label", (1, 0, "true", 0.5, [True]))
def test_labels_that_are_neither_true_nor_false(label, tmp_path):
    rows = [{"prompt": "3+4=", "completion": "7", "label": x} for x in (True, False, label)]
    refused(attempt("kto", tmp_path, "--dataset", write_rows(tmp_path, *rows)), tmp_path, "mine.jsonl:3", "label")


@pytest.mark.parametrize("label", (True, False))
def test_labels_that_are_all_alike(label, tmp_path):
    asked = [{"role": "user", "content": "3+4="}]
    rows = []
    for x in range(4):
        rows.append({"prompt": asked, "completion": [{"role": "assistant", "content": str(x)}], "label": label})
    wanted = f"{4 * label} of 4 labels are true"
    refused(attempt("kto", tmp_path, "--dataset", write_rows(tmp_path, *rows)), tmp_path, wanted)


def test_one_row_a_step_has_no_other(tmp_path):
    refused(attempt("kto", tmp_path, "--batch_size", 1), tmp_path, "--batch_size 1", "2 or more")


def test_the_reference_is_kept_for_the_pairs_it_is_of(tmp_path):
    """Another batch size mismatches the same rows otherwise: the file of the first run must not serve the second."""
    data = tiny_rows("kto", tmp_path / "rows.jsonl", 8)
    flags = ["--dataset", data, "--eval_dataset", "", "--max_steps", 2, "--save_every", 0]
    train("kto", tmp_path / "out", *flags, "--batch_size", 4)
    alone = tmp_path / "alone"
    train("kto", alone, *flags, "--batch_size", 8, "--max_steps", 1)
    (tmp_path / "next").mkdir()
    (tmp_path / "out" / "ref_logprobs_train.safetensors").rename(tmp_path / "next" / "ref_logprobs_train.safetensors")
    train("kto", tmp_path / "next", *flags, "--batch_size", 8, "--max_steps", 1)
    a, b = (load_file(folder / "ref_logprobs_train.safetensors") for folder in (tmp_path / "next", alone))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
