"""The loss of gopd.py: by hand; its mean over the vocabulary against the gradient of the KL to what it aims at; at a
scale of 1 its parent's; and a reference of another folder."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_jsonl, script, tiny_rows, train
from test_bad_input import attempt, refused
from test_distillation import TINY, swap_two, teacher_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "experimental/gopd"
STEP = ["--batch_size", 3, "--eval_every", 0, "--save_every", 0, "--eval_dataset", ""]


def ours(student, teacher, sampler, reference, scale):
    out, batch = {"logprobs": student, "teacher_logprobs": teacher}, {"sampler_logprobs": sampler}
    return script(NAME).gopd_loss(out, batch | {"ref_logprobs": reference}, SimpleNamespace(reward_scale=scale))


@pytest.mark.parametrize("scale", (0.0, 1.0, 1.25, 3.0))
def test_the_loss_by_hand(scale):
    draw = random.Random(1)
    tokens = [[-3 * draw.random() for _ in range(4)] for _ in range(20)]
    student, teacher, sampler, reference = torch.tensor(tokens).T
    student = student.clone().requires_grad_()
    loss, sampled_kl = ours(student, teacher, sampler, reference, scale)
    advantages = [scale * (t - r) - (s - r) for _, t, s, r in tokens]
    expected = -sum(advantage * row[0] for advantage, row in zip(advantages, tokens))
    assert loss.item() == pytest.approx(expected, rel=1e-5)  # fp32 against float64
    assert sampled_kl.item() == pytest.approx(sum(s - t for _, t, s, _ in tokens), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], -torch.tensor(advantages), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", (0.0, 1.0, 1.25, 3.0))
def test_on_average_it_is_the_gradient_of_the_kl_to_its_aim(scale):
    """Every token of a vocabulary with its probability, in float64, against autograd of KL(student || q), where q is
    teacher^scale ref^(1 - scale), normalised."""
    torch.manual_seed(0)
    z = torch.randn(29, dtype=torch.float64, requires_grad=True)
    logp = z.log_softmax(-1)
    logq, log_ref = torch.randn(2, 29, dtype=torch.float64).log_softmax(-1)
    aim = (scale * logq + (1 - scale) * log_ref).log_softmax(-1)
    (wanted,) = torch.autograd.grad((logp.exp() * (logp - aim)).sum(), z, retain_graph=True)
    total = 0.0
    for v in range(29):
        at = slice(v, v + 1)
        total = total + logp[v].exp().detach() * ours(logp[at], logq[at], logp[at].detach(), log_ref[at], scale)[0]
    (found,) = torch.autograd.grad(total, z)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_at_a_scale_of_1_the_reference_cancels():
    """What is left is iw_opd.py without its weights; at any other scale it is not."""
    torch.manual_seed(0)
    student, teacher, sampler = -3 * torch.rand(3, 12)
    seq = torch.arange(12) // 4
    batch = {"sampler_logprobs": sampler, "seq": seq}
    parents, _ = script("experimental/iw_opd").iw_opd_loss(
        {"logprobs": student, "teacher_logprobs": teacher}, batch, SimpleNamespace(gamma=0.0)
    )
    for reference in -3 * torch.rand(2, 12):
        assert ours(student, teacher, sampler, reference, 1.0)[0].item() == pytest.approx(parents.item(), rel=1e-5)
        assert abs(ours(student, teacher, sampler, reference, 1.25)[0].item() / parents.item() - 1) > 0.01


@pytest.mark.parametrize("reference, world", [("", 2), (str(TINY / "teacher"), 1)], ids=["start", "folder"])
def test_a_step(reference, world, tmp_path):
    """The loss of a step, cut into micro-batches and over ranks, by transformers in float64 on what was sampled, all
    three models at a temperature. Before the first step the starting policy is its own reference: a is the scale times
    log teacher - log student."""
    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 3)
    flags = ["--dataset", data, "--reference", reference, "--reward_scale", 2, "--num_generations", 3, *STEP]
    flags += ["--temperature", 0.8]
    train(NAME, tmp_path / "run", *flags, "--max_steps", 1, "--tokens_per_microbatch", 100, world=world)
    (line,) = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in line]
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    load = AutoModelForCausalLM.from_pretrained
    student, teacher = (load(TINY / name, dtype=torch.float64) for name in ("model", "teacher"))
    total, sampled_kl, count = 0.0, 0.0, 0
    for sample in read_jsonl(tmp_path / "run" / "samples.jsonl"):
        prompt, answer = [tokenizer(sample[name], add_special_tokens=False)["input_ids"]
                          for name in ("prompt", "completion")]  # fmt: skip
        values = []
        for lm in (student, teacher):
            logits = lm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.8
            values.append(logits.log_softmax(-1)[range(len(answer)), answer])
        logp, logq = values
        log_ref = logq if reference else logp.detach()
        advantage = 2 * (logq - log_ref) - (logp - log_ref)
        total = total - (advantage.detach() * logp).sum()
        sampled_kl += (logp - logq).sum().item()
        count += len(answer)
    (total / count).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in student.parameters()))
    assert line["loss"] == pytest.approx((total / count).item(), rel=1e-4)  # fp32: log-probs near 0 of a sure model
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert line["sampled_kl"] == pytest.approx(sampled_kl / count, rel=1e-4) and line["num_tokens"] == count


def test_what_is_logged_is_the_divergence_of_student_from_teacher(tmp_path):
    """On the same held-out samples: the number of distillation.py --beta 1, whatever the loss."""
    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 3)
    found = []
    for name, flags in [(NAME, []), ("distillation", ["--lmbda", 1, "--beta", 1])]:
        out = tmp_path / f"run{len(found)}"
        flags = [*flags, "--dataset", data, *STEP, "--eval_dataset", data, "--max_steps", 1, "--top_p", 1]
        train(name, out, *flags, "--temperature", 1, "--max_completion_length", 40)
        found.append(read_jsonl(out / "metrics.jsonl")[0]["eval/divergence"])
    assert found[0] == found[1] > 0.01


def test_by_default_it_goes_beyond_the_teacher():
    """ExOPD: what the paper's title is about."""
    assert script(NAME).parse_args(["--model", "a", "--teacher", "b", "--dataset", "c"]).reward_scale == 1.25


def test_references_that_are_refused(tmp_path):
    for name, change, size, needle in [("other", swap_two, 103, "its tokenizer is another"),
                                       ("wide", None, 128, "have [103, 128] embeddings")]:  # fmt: skip
        folder = teacher_folder(tmp_path / name, tokenizer=change, vocab_size=size)
        place = tmp_path / f"run_{name}"
        refused(attempt(NAME, place, "--reference", folder), place, f"--reference {folder}", needle)
    folder = teacher_folder(tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    place = tmp_path / "run_cut"
    refused(attempt(NAME, place, "--reference", folder), place, f"--reference {folder}")
    place = tmp_path / "missing"
    refused(attempt(NAME, place, "--reference", ROOT / "nowhere"), place, f"--reference {ROOT / 'nowhere'}")
