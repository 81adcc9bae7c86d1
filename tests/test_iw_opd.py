"""The loss of iw_opd.py: by hand, a token at a time in plain floats, and TRL 1.16.0's with its gradient."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import read_jsonl, script, tiny_rows, train
from test_distillation import CLOSE, FIXTURE, ours, trl_inputs

NAME = "experimental/iw_opd"


def by_hand(completions, gamma):
    """completions: lists of (student, teacher, sampler) log-probs. -> the sum of - w a log student."""
    total = 0.0
    for tokens in completions:
        sizes = [abs(teacher - sampler) for _, teacher, sampler in tokens]
        for t, (student, teacher, sampler) in enumerate(tokens):
            weight = 1 + gamma * (1 - sum(sizes[:t]) / max(sum(sizes), 1e-8))
            total -= weight * (teacher - sampler) * student
    return total


@pytest.mark.parametrize("gamma", (0.0, 0.5, 2.0))
def test_the_loss_by_hand(gamma):
    """Five completions in one micro-batch, one of a single token and one whose models agree everywhere."""
    draw = random.Random(3)
    completions = []
    for length in (4, 1, 30, 2, 7):
        completions.append([[-3 * draw.random() for _ in range(3)] for _ in range(length)])
    completions[3] = [[-1.0, -0.5, -0.5], [-2.0, -0.25, -0.25]]
    tokens = [values for tokens in completions for values in tokens]
    seq = [number for number, tokens in enumerate(completions) for _ in tokens]
    student, teacher, sampler = torch.tensor(tokens).T
    student.requires_grad_()
    out = {"logprobs": student, "teacher_logprobs": teacher}
    batch = {"sampler_logprobs": sampler, "seq": torch.tensor(seq)}
    loss, sampled_kl = script(NAME).iw_opd_loss(out, batch, SimpleNamespace(gamma=gamma))
    assert loss.item() == pytest.approx(by_hand(completions, gamma), rel=1e-5)  # fp32 against float64
    assert sampled_kl.item() == pytest.approx(sum(s - t for _, t, s in tokens), rel=1e-5)
    if gamma:  # the parent's weight of a token, 1, would not do
        assert abs(by_hand(completions, 0.0) / by_hand(completions, gamma) - 1) > 0.05


@pytest.mark.parametrize("case", FIXTURE["iw_opd"], ids=lambda case: str(case["gamma"]))
def test_trl(case):
    student, teacher = trl_inputs()
    out = ours(student, teacher, torch.tensor(case["labels"]), 1.0)
    batch = {"sampler_logprobs": torch.tensor(case["sampler_logprobs"]), "seq": torch.tensor(case["seq"])}
    loss, _ = script(NAME).iw_opd_loss(out, batch, SimpleNamespace(gamma=case["gamma"]))
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    hidden, weight, bias = torch.autograd.grad(loss, student)
    d_z = torch.tensor(case["d_logits"])
    torch.testing.assert_close(hidden, d_z @ student[1].detach(), **CLOSE)
    torch.testing.assert_close(weight, d_z.T @ student[0].detach(), **CLOSE)
    torch.testing.assert_close(bias, d_z.sum(0), **CLOSE)


def test_the_student_comes_nearer(tmp_path):
    """Twelve steps from samples alone: the divergence from the teacher falls, and the estimate of it is one."""
    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 64)
    flags = ["--dataset", data, "--max_steps", 12, "--batch_size", 16, "--learning_rate", 2e-4, "--top_p", 1]
    train(NAME, tmp_path / "run", *flags, "--eval_every", 0, "--save_every", 0, "--eval_dataset", "tiny:test[:64]")
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["eval/divergence"] < 0.8 * lines[0]["eval/divergence"]
    first = lines[1]
    assert math.isclose(first["sampled_kl"], lines[0]["eval/divergence"], rel_tol=1.0)  # one sample a token is noisy
