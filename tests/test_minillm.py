"""The loss of minillm.py: by hand, and its expectation against the gradient of the KL of whole completions, of which
there are few enough to add them all up. TRL 1.16.0 has no MiniLLM any more."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import read_jsonl, script, tiny_rows, train
from test_bad_input import attempt, refused
from test_distillation import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "experimental/minillm"


def settings(gamma=1.0, normalized=False, single_step=True):
    return SimpleNamespace(gamma=gamma, length_normalization=normalized, single_step_decomposition=single_step)


def by_hand(completions, args):
    """completions: lists of (student, teacher, divergence). -> the sum of l."""
    total = 0.0
    for tokens in completions:
        for t, (student, _, divergence) in enumerate(tokens):
            advantage, weights = 0.0, 0.0
            for k in range(t, len(tokens)):
                weights += args.gamma ** (k - t)
                if k > t or not args.single_step_decomposition:
                    advantage += args.gamma ** (k - t) * (tokens[k][1] - tokens[k][0])
            if args.length_normalization:
                advantage /= weights
            total -= advantage * student
            if args.single_step_decomposition:
                total += divergence
    return total


@pytest.mark.parametrize("single_step", (True, False))
@pytest.mark.parametrize("normalized", (True, False))
@pytest.mark.parametrize("gamma", (0.0, 0.7, 1.0))
def test_the_loss_by_hand(gamma, normalized, single_step):
    """Five completions in one micro-batch, one of a single token."""
    draw = random.Random(3)
    completions = []
    for length in (4, 1, 33, 2, 7):
        completions.append([[-3 * draw.random() for _ in range(3)] for _ in range(length)])
    seq = torch.tensor([number for number, tokens in enumerate(completions) for _ in tokens])
    student, teacher, divergence = torch.tensor([values for tokens in completions for values in tokens]).T
    student, divergence = student.clone().requires_grad_(), divergence.clone().requires_grad_()
    out = {"logprobs": student, "teacher_logprobs": teacher, "divergence": divergence}
    args = settings(gamma, normalized, single_step)
    loss, sampled_kl = script(NAME).minillm_loss(out, {"seq": seq}, args)
    assert loss.item() == pytest.approx(by_hand(completions, args), rel=1e-5)  # fp32 against float64
    assert sampled_kl.item() == pytest.approx((student - teacher).sum().item(), rel=1e-5)
    # No gradient flows through an advantage: the last token's is 0, or its own r.
    by_student, by_divergence = torch.autograd.grad(loss, [student, divergence], allow_unused=True)
    last = 0.0 if single_step else (student - teacher)[-1].item()
    assert by_student[-1].item() == pytest.approx(last, abs=1e-6)
    if single_step:
        assert torch.equal(by_divergence, torch.ones_like(by_divergence))


@pytest.mark.parametrize("single_step", (True, False))
def test_on_average_it_is_the_gradient_of_the_kl_of_completions(single_step):
    """All 27 completions of three tokens, each with its probability: at gamma 1, sums not means, both forms are the
    gradient of sum_y p(y) log(p(y) / q(y)), by autograd. The parent's loss,
    where a token answers for itself alone, is not."""
    torch.manual_seed(0)
    prefixes = [prefix for n in range(3) for prefix in itertools.product(range(3), repeat=n)]
    student = torch.randn(len(prefixes), 3, dtype=torch.float64, requires_grad=True)
    logp, logq = student.log_softmax(-1), torch.randn(len(prefixes), 3, dtype=torch.float64).log_softmax(-1)
    divergences = (logp.exp() * (logp - logq)).sum(-1)
    exact, losses, parents = 0.0, 0.0, 0.0
    for tokens in itertools.product(range(3), repeat=3):
        places = [prefixes.index(tokens[:n]) for n in range(3)]
        out = {"logprobs": logp[places, tokens], "teacher_logprobs": logq[places, tokens]}
        out["divergence"] = divergences[places]
        log_ratio = (out["logprobs"] - out["teacher_logprobs"]).sum()
        weight = out["logprobs"].sum().exp()
        exact = exact + weight * log_ratio
        loss, _ = script(NAME).minillm_loss(out, {"seq": torch.zeros(3).long()}, settings(single_step=single_step))
        losses = losses + weight.detach() * loss
        batch = {"seq": torch.zeros(3).long(), "sampler_logprobs": out["logprobs"].detach()}
        parents = parents + weight.detach() * script("experimental/iw_opd").iw_opd_loss(out, batch, settings(0.0))[0]
    (wanted,) = torch.autograd.grad(exact, student, retain_graph=True)
    (found,) = torch.autograd.grad(losses, student, retain_graph=True)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # the advantages are rounded to fp32
    (other,) = torch.autograd.grad(parents, student)
    assert (other - wanted).abs().max() > 0.01


def test_without_a_future_it_is_the_divergence():
    """At gamma 0 the loss and its gradient are those of distillation.py."""
    student = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    divergence = torch.tensor([0.5, 0.25, 1.0], requires_grad=True)
    out = {"logprobs": student, "teacher_logprobs": torch.tensor([-0.5, -3.0, -0.5]), "divergence": divergence}
    loss, _ = script(NAME).minillm_loss(out, {"seq": torch.tensor([0, 0, 1])}, settings(0.0, normalized=True))
    assert loss.item() == script("distillation").distillation_loss(out).item() == 1.75
    assert torch.autograd.grad(loss, student)[0].abs().max() == 0


@pytest.mark.parametrize("world, options", [(2, ["--gamma", 0.9]), (1, ["--no-single_step_decomposition"])],
                         ids=["usual", "sampled"])  # fmt: skip
def test_a_step(world, options, tmp_path):
    """The loss of a step at a temperature, cut into micro-batches and over ranks, by transformers in float64 on what
    was sampled. The divergence is KL(student || teacher) over the vocabulary."""
    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 3)
    flags = ["--dataset", data, "--num_generations", 3, "--temperature", 0.8, "--max_steps", 1, "--batch_size", 3]
    flags += ["--eval_every", 0, "--save_every", 0, "--eval_dataset", "", "--tokens_per_microbatch", 100, *options]
    train(NAME, tmp_path / "run", *flags, world=world)
    (line,) = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in line]
    args = settings(0.9, normalized=True) if world == 2 else settings(1.0, normalized=True, single_step=False)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    load = AutoModelForCausalLM.from_pretrained
    models = [load(TINY / name, dtype=torch.float64) for name in ("model", "teacher")]
    total, sampled_kl, count = 0.0, 0.0, 0
    for sample in read_jsonl(tmp_path / "run" / "samples.jsonl"):
        prompt, answer = [tokenizer(sample[name], add_special_tokens=False)["input_ids"]
                          for name in ("prompt", "completion")]  # fmt: skip
        logp, logq = [(lm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
                      for lm in models]  # fmt: skip
        logq = logq.detach()
        divergences = (logp.exp() * (logp - logq)).sum(-1)
        of_student, of_teacher = [values[range(len(answer)), answer] for values in (logp, logq)]
        gaps = (of_teacher - of_student).tolist()
        for t in range(len(answer)):
            weights = [args.gamma ** (k - t) for k in range(t, len(answer))]
            parts = [weight * gap for weight, gap in zip(weights, gaps[t:])]
            if args.single_step_decomposition:
                parts = parts[1:]
                total = total + divergences[t]
            total = total - sum(parts) / sum(weights) * of_student[t]
        sampled_kl -= sum(gaps)
        count += len(answer)
    (total / count).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in models[0].parameters()))
    assert line["loss"] == pytest.approx((total / count).item(), rel=1e-4)  # fp32: log-probs near 0 of a sure model
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert line["sampled_kl"] == pytest.approx(sampled_kl / count, rel=1e-4) and line["num_tokens"] == count


def test_the_defaults_are_the_form_that_is_described():
    """A discount of 1, where TRL has 0, means over later tokens, and the token's own part over the vocabulary."""
    args = script(NAME).parse_args(["--model", "a", "--teacher", "b", "--dataset", "c"])
    assert (args.gamma, args.length_normalization, args.single_step_decomposition) == (1.0, True, True)


def test_the_student_comes_nearer(tmp_path):
    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 32)
    flags = ["--dataset", data, "--max_steps", 8, "--batch_size", 8, "--learning_rate", 2e-4]
    train(NAME, tmp_path / "run", *flags, "--eval_every", 0, "--save_every", 0, "--eval_rows", 16)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["eval/divergence"] < 0.8 * lines[0]["eval/divergence"]


def test_gamma_is_at_most_1(tmp_path):
    refused(attempt(NAME, tmp_path, "--gamma", 1.5), tmp_path, "--gamma 1.5", "from 0 to 1")
