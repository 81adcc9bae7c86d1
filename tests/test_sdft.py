"""sdft.py: three losses by hand and against TRL 1.16.0 (fixtures/trl_distillation.json), two prompts before the same
completions, three teachers, and rows that no teacher can read."""

import copy
import math
from array import array
from types import SimpleNamespace

import pytest
import torch
from conftest import read_jsonl, script, tiny_rows, train, trainer_tensors
from test_bad_input import attempt, refused, write_rows
from test_distillation import CLOSE, FIXTURE, PLAIN, differentiable, inputs, jsd, logits, trl_inputs
from test_logprobs import build

from common import logprobs as subject
from common.batches import flat_batch
from common.data import Row
from common.divergence import Teacher
from common.logprobs import Policy, ScoredHead, plain_logits

NAME = "experimental/sdft"


def ours(student, teacher, labels, beta, top_k):
    """-> {name: (M,)} of ScoredHead, where the student's top_k tokens count alone."""
    head = Teacher(teacher[1], teacher[2], PLAIN, beta, top_k, alone=True, hidden=teacher[0])
    out = ScoredHead.apply(*student, labels, PLAIN, ("divergence", "entropy"), None, head)
    return {name: values for name, values in zip(subject.OUTPUTS, out) if values is not None}


# ---- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", (1, 4, 29))
@pytest.mark.parametrize("beta", (0.0, 0.5, 1.0))
def test_the_top_k_alone(beta, k):
    """In float64 from the definition, both models renormalised to the student's likeliest tokens; k = V is the whole
    divergence. Gradients of all that the head may give, together, by autograd over whole rows."""
    student, teacher, labels = inputs()
    student = [x.requires_grad_() for x in student]
    out = ours(student, teacher, labels, beta, k)
    exact = [x.detach().double().requires_grad_() for x in student]
    z = logits(exact)
    kept = z.topk(k).indices
    p, q = z.gather(1, kept).softmax(-1), logits(teacher).gather(1, kept).softmax(-1)
    by_rows = torch.tensor([jsd(a, b, beta) for a, b in zip(p.tolist(), q.tolist())])
    torch.testing.assert_close(out["divergence"], by_rows, **CLOSE)
    whole = logits(exact).softmax(-1)
    if k == 29:
        full = differentiable(whole, logits(teacher).softmax(-1), beta)
        torch.testing.assert_close(out["divergence"].double(), full, **CLOSE)
    elif k > 1:  # neither the parent's tail nor its whole vocabulary would do
        for alone, count in ((False, k), (True, 0)):
            head = Teacher(*teacher[1:], PLAIN, beta, count, alone=alone, hidden=teacher[0])
            parent = ScoredHead.apply(*student, labels, PLAIN, ("divergence",), None, head)[5]
            assert (parent / out["divergence"] - 1).abs().max() > 0.1
    rows = torch.arange(len(labels))
    wanted = differentiable(p, q, beta).sum() + whole[rows, labels].log().sum() - (whole * whole.log()).sum()
    got = torch.autograd.grad(sum(out[name].sum() for name in ("divergence", "logprobs", "entropy")), student)
    for a, b in zip(got, torch.autograd.grad(wanted, exact)):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()  # fp32 against float64


@pytest.mark.parametrize("case", FIXTURE["sdft"], ids=lambda case: f"{case['mode']}-{case['alpha']}")
def test_trl(case):
    """SDFTTrainer's loss of two completions, of four and two tokens, with its gradients."""
    student, teacher = trl_inputs()
    top_k = case["top_k"] if case["mode"] == "topk_logits" else 0
    out = ours(student, teacher, torch.tensor(case["labels"]), case["alpha"], top_k)
    args = SimpleNamespace(distillation_mode=case["mode"])
    loss = script(NAME).sdft_loss(out, {"seq": torch.tensor(case["seq"])}, args) / 2
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    hidden, weight, bias = torch.autograd.grad(loss, student)
    d_z = torch.tensor(case["d_logits"])
    torch.testing.assert_close(hidden, d_z @ student[1].detach(), **CLOSE)
    torch.testing.assert_close(weight, d_z.T @ student[0].detach(), **CLOSE)
    torch.testing.assert_close(bias, d_z.sum(0), **CLOSE)


def test_every_completion_weighs_alike():
    """By hand: means of 1, 2 and 3 tokens, added. The parent's sum over tokens is another number."""
    divergence = torch.tensor([0.5, 1.0, 3.0, 2.0, 2.0, 5.0], requires_grad=True)
    batch = {"seq": torch.tensor([0, 1, 1, 2, 2, 2])}
    loss = script(NAME).sdft_loss({"divergence": divergence}, batch, SimpleNamespace(distillation_mode="full_logits"))
    assert loss.item() == 0.5 + 2.0 + 3.0 != divergence.sum().item()
    (gradient,) = torch.autograd.grad(loss, divergence)
    torch.testing.assert_close(gradient, torch.tensor([1, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3]))


# ---- two prompts -----------------------------------------------------------------------------------------------------


def make_groups():
    """Three prompts of other lengths than the teacher's, one to three completions each."""
    ids = iter(range(5, 100))

    def take(count):
        return array("i", [next(ids) % 40 for _ in range(count)])

    groups = []
    for row, (own, other, lengths) in enumerate([(3, 8, (4, 1)), (5, 2, (3,)), (2, 9, (2, 2, 5))]):
        completions = [{"ids": take(length), "scored": None} for length in lengths]
        groups.append({"prompt": take(own), "teacher_prompt": take(other), "completions": completions, "row": row})
    return groups


@pytest.mark.parametrize("kind", ("Llama", "Gemma2"))
def test_both_batches_score_the_same_tokens(kind):
    """Token by token: the divergence of each is that of transformers' two forwards, one behind either prompt. Against
    the parent's teacher, which reads the student's prompt, it is another number."""
    torch.manual_seed(5)
    lm, other = (build(kind, vocab_size=40) for _ in range(2))
    groups = make_groups()
    views = script(NAME).teacher_groups(groups)
    both = []
    for model, seen in ((lm, groups), (other, views)):
        both.append(torch.cat([plain(model, group) for group in seen]))
    expected = differentiable(both[0].softmax(-1), both[1].softmax(-1), 0.5)
    policy, teacher = Policy(lm), Policy(other)
    policy.teacher = Teacher(teacher.head().weight.detach(), None, teacher.transform, beta=0.5)
    batch = flat_batch(groups)
    out = script(NAME).forward(policy, teacher, batch)
    torch.testing.assert_close(out["divergence"].double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(flat_batch(views)["labels"], batch["labels"])
    assert torch.equal(flat_batch(views)["seq"], batch["seq"])
    parent = script("distillation").forward(policy, teacher, batch)["divergence"]
    assert (parent - out["divergence"]).abs().max() > 0.01


@torch.no_grad()
def plain(lm, group):
    """(tokens, V) float64: the logits that predict a group's completions, one sequence at a time."""
    lm = copy.deepcopy(lm)
    lm.config._attn_implementation = "eager"
    rows = []
    for _, completion, ids, z in plain_logits(lm, [group]):
        rows.append(z[len(ids) - len(completion["ids"]) - 1 : -1].double())
    return torch.cat(rows)


@pytest.mark.parametrize("case", FIXTURE["teacher_prompts"], ids=str)
def test_the_teachers_prompt_is_trls(case):
    row = Row(prompt=case["prompt"], privileged_context=case["privileged_context"])
    before = copy.deepcopy(row)
    made = script(NAME).with_context(row, case["template"])
    assert made["prompt"] == case["teacher"] and row == before
    assert script(NAME).with_context(row, case["template"].replace("\n", "\\n")) == made  # as shells pass it


def test_a_column_system_is_read_once():
    row = Row(prompt=[{"role": "user", "content": "3+4?"}], privileged_context="7", system="Add.")
    made = script(NAME).with_context(row, "{prompt} {privileged_context}")
    assert made["prompt"] == [{"role": "system", "content": "Add."}, {"role": "user", "content": "3+4? 7"}]
    assert "system" not in made


# ---- runs ------------------------------------------------------------------------------------------------------------


def weights_of(folder, step, name):
    tensors = trainer_tensors(folder / f"checkpoint-{step:06d}")
    prefix = f"model.{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def test_three_teachers(tmp_path):
    """ema: after every second step 0.3 of the student, as saved; only it is saved. The first step is the same for all
    three teachers, which are then the starting weights; later steps are not."""
    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 8)
    flags = ["--dataset", data, "--max_steps", 4, "--batch_size", 2, "--eval_every", 0, "--save_every", 1]
    flags += ["--keep_last", 9, "--teacher_update_rate", 0.3, "--teacher_sync_steps", 2, "--learning_rate", 1e-3]
    losses = {}
    for kind in ("base", "live", "ema"):
        train(NAME, tmp_path / kind, *flags, "--teacher_model_kind", kind)
        losses[kind] = [line["loss"] for line in read_jsonl(tmp_path / kind / "metrics.jsonl") if "loss" in line]
        assert bool(weights_of(tmp_path / kind, 4, "teacher")) is (kind == "ema")
    assert losses["base"][0] == losses["live"][0] == losses["ema"][0]
    assert losses["base"][1] == losses["ema"][1] != losses["live"][1]  # ema moves after step 2 for the first time
    assert len({losses[kind][2] for kind in losses}) == 3
    saved = [weights_of(tmp_path / "ema", step, "teacher") for step in (1, 2, 3, 4)]
    students = [weights_of(tmp_path / "ema", step, "policy") for step in (1, 2, 3, 4)]
    for name, start in saved[0].items():
        assert torch.equal(saved[2][name], saved[1][name])
        second = 0.7 * start.double() + 0.3 * students[1][name].double()
        torch.testing.assert_close(saved[1][name].double(), second, rtol=1e-6, atol=1e-8)  # one rounding in fp32
        fourth = 0.7 * saved[1][name].double() + 0.3 * students[3][name].double()
        torch.testing.assert_close(saved[3][name].double(), fourth, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ("live", pytest.param("ema", marks=pytest.mark.slow)))  # ema's split is test_split's
def test_ranks_and_micro_batches_change_nothing(kind, tmp_path):
    """The head is whole on every rank, and moves: two ranks in small pieces against one process in one."""
    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 8)
    flags = ["--dataset", data, "--max_steps", 3, "--batch_size", 4, "--eval_every", 0, "--save_every", 0]
    flags += ["--teacher_model_kind", kind, "--teacher_sync_steps", 1, "--distillation_mode", "full_logits"]
    lines = {}
    for world, budget in ((1, 8192), (2, 60)):
        train(NAME, tmp_path / str(world), *flags, "--tokens_per_microbatch", budget, world=world)
        lines[world] = [x for x in read_jsonl(tmp_path / str(world) / "metrics.jsonl") if "loss" in x]
    for one, two in zip(lines[1], lines[2]):
        for name in ("loss", "grad_norm", "entropy"):
            assert math.isclose(one[name], two[name], rel_tol=2e-5), (name, one[name], two[name])


def test_the_student_learns_what_the_context_says(tmp_path):
    """Questions in words that the tiny model does not know; as context the same in words that it knows. By sampled
    tokens alone, with a teacher that moves: 16 steps take off a third of the divergence and more."""
    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 80)
    flags = ["--dataset", f"{data}[:64]", "--eval_dataset", f"{data}[64:]", "--max_steps", 16, "--batch_size", 8]
    flags += ["--learning_rate", 2e-4, "--eval_every", 0, "--save_every", 0, "--distillation_mode", "sampled_token"]
    train(NAME, tmp_path / "run", *flags, "--beta", 1)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["eval/divergence"] < 0.67 * lines[0]["eval/divergence"]
    assert all(line["on_policy"] == 1 and line["sampler_gap"] < 1e-5 for line in lines[1:-1])


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, needles", [
    (["--beta", 1.5], ["--beta 1.5", "from 0 to 1"]),
    (["--teacher_update_rate", 2], ["--teacher_update_rate 2", "from 0 to 1"]),
    (["--distillation_mode", "sampled_token"], ["sampled_token", "--beta 1", "0.5"]),
    (["--loss_top_k", 104], ["--loss_top_k 104", "103"]), (["--loss_top_k", 0], ["--loss_top_k"]),
    (["--teacher_sync_steps", 0], ["--teacher_sync_steps"]), (["--tp_size", 2], ["topk_logits", "--tp_size 1"]),
    (["--teacher_prompt_template", "{prompt}"], ["--teacher_prompt_template", "{privileged_context}"]),
], ids=lambda x: "_".join(map(str, x)).strip("-") if len(x) > 1 else None)  # fmt: skip
def test_flags_that_are_refused(flags, needles, tmp_path):
    refused(attempt(NAME, tmp_path, *flags), tmp_path, *needles)


ASKS = {"role": "user", "content": "3+4?"}


@pytest.mark.parametrize("row, needles", [
    ({"prompt": "4+4="}, ["wanted columns prompt + privileged_context", "mine.jsonl:2"]),
    ({"prompt": "4+4=", "privileged_context": None}, ["null in privileged_context", "mine.jsonl:2"]),
    ({"prompt": "4+4=", "privileged_context": 8}, ["privileged_context holds int", "mine.jsonl:2"]),
    ({"prompt": [ASKS, {"role": "tool", "content": "7"}], "privileged_context": "8"}, ["a user's", "mine.jsonl:2"]),
], ids=["absent", "null", "number", "not a user"])  # fmt: skip
def test_rows_that_no_teacher_can_read(row, needles, tmp_path):
    data = write_rows(tmp_path, {"prompt": "3+4=", "privileged_context": "7"}, row)
    refused(attempt(NAME, tmp_path, "--dataset", data), tmp_path, *needles)


def test_the_teachers_prompt_must_fit_too(tmp_path):
    """Of three rows one has a context that leaves no room for a completion: it is dropped, and counted."""
    rows = [{"prompt": f"{n}+4=", "privileged_context": "7" * (900 if n == 1 else 3)} for n in range(3)]
    data = write_rows(tmp_path, *rows)
    result = attempt(NAME, tmp_path, "--dataset", data, "--max_length", 256, "--allow", "DATA005", "DATA007", "GRPO002")
    assert "2 of 3 rows kept" in result.out, result.err


def test_a_teacher_that_does_not_fit(tmp_path):
    def patch(module):
        load_teacher = module.load_teacher

        def with_little_room(*args):
            module.check_fits.__globals__["free_bytes"] = lambda: 1e6
            return load_teacher(*args)

        module.load_teacher = with_little_room

    result = attempt(NAME, tmp_path, patch=patch)
    refused(result, tmp_path, "--teacher_model_kind ema: its share of the weights takes 0.0 GB on every rank")


