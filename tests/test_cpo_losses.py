"""CPO and its variants against their papers and against TRL 1.16.0, values and gradients.

PAPER holds the formulas once more: plain floats, one pair at a time, written from the papers and from nothing here.
TRL's numbers stand in fixtures/trl_cpo.json (by benchmarks/trl_fixtures.py).
"""

import json
import math
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import ROOT, script
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import attempt, refused
from test_dpo_losses import SLOPE, close, f64
from test_orpo_losses import CHOSEN, PAIRS, REJECTED, first_step

from common.runtime.flags import InputError

cpo, dpo = script("experimental/cpo"), script("dpo")
FIXTURE = json.loads((ROOT / "tests" / "fixtures" / "trl_cpo.json").read_text())
LOSSES = get_args(get_type_hints(cpo.Args)["loss_type"])


def minus_log_sigmoid(x):
    return math.log(1 + math.exp(-x))


def smoothed(x, eps):
    return (1 - eps) * minus_log_sigmoid(x) + eps * minus_log_sigmoid(-x)


def alpha_reward(total, n, alpha):
    """AlphaPO: (1 - p^-alpha) / alpha of the geometric mean p of the tokens' probabilities."""
    return (1 - (math.exp(total) ** (1 / n)) ** -alpha) / alpha


# Of one pair: (log pi, tokens) of the chosen and the rejected completion, beta, gamma, alpha, eps.
PAPER = {
    # CPO, equation 3: -log sigmoid(beta log pi(y_w|x) - beta log pi(y_l|x))
    "sigmoid": lambda w, x, beta, gamma, alpha, eps: smoothed(beta * w[0] - beta * x[0], eps),
    # SLiC: max(0, delta - log pi(y_w|x) + log pi(y_l|x)), here in units of 1 / beta
    "hinge": lambda w, x, beta, gamma, alpha, eps: max(0.0, 1 - beta * w[0] + beta * x[0]),
    # IPO, equation 17: (h - 1 / (2 tau))^2, h per token
    "ipo": lambda w, x, beta, gamma, alpha, eps: (w[0] / w[1] - x[0] / x[1] - 1 / (2 * beta)) ** 2,
    # SimPO, equation 6: -log sigmoid(beta / |y_w| log pi(y_w|x) - beta / |y_l| log pi(y_l|x) - gamma)
    "simpo": lambda w, x, beta, gamma, alpha, eps: smoothed(beta / w[1] * w[0] - beta / x[1] * x[0] - gamma, eps),
    "alphapo": lambda w, x, beta, gamma, alpha, eps: smoothed(
        beta * alpha_reward(*w, alpha) - beta * alpha_reward(*x, alpha) - gamma, eps),
}  # fmt: skip
NUMBERS = {"beta": 0.8, "gamma": 0.5, "alpha": 0.25, "eps": 0.0}


def paper(name, chosen, rejected, nll, **numbers):
    """Return the loss of every pair, with nll times the chosen completion's own per token."""
    numbers = NUMBERS | numbers
    return [PAPER[name](w, x, **numbers) - nll * w[0] / w[1] for w, x in zip(chosen, rejected)]


def slopes(name, nll, h=1e-5, **numbers):
    """Return d (sum of losses) / d log pi by central differences, chosen and rejected in turn."""
    found = []
    for pair in range(len(CHOSEN)):
        for side in 0, 1:
            ends = []
            for sign in 1, -1:
                halves = [list(CHOSEN), list(REJECTED)]
                total, n = halves[side][pair]
                halves[side][pair] = total + sign * h, n
                ends.append(sum(paper(name, *halves, nll, **numbers)))
            found.append((ends[0] - ends[1]) / (2 * h))
    return found


def ours(chosen=CHOSEN, rejected=REJECTED, **flags):
    """Return the loss of all pairs, metrics, and d loss / d log pi, by the script's own function in float64."""
    turns = [completion for pair in zip(chosen, rejected) for completion in pair]
    sums = f64([total for total, _ in turns], grad=True)
    loss, metrics = cpo.cpo_loss(sums, torch.tensor([n for _, n in turns]), cpo.Args(**flags))
    (slope,) = torch.autograd.grad(loss, sums)
    return loss.detach(), metrics, slope


@pytest.mark.parametrize("nll", (0.0, 0.7))
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, nll):
    """Three pairs: chosen better, equal per token, worse; lengths differ. At two betas, and with smoothed labels."""
    for eps in (0.0, 0.1) if name in cpo.SMOOTHED else (0.0,):
        for beta in 0.1, 0.8:
            loss, metrics, slope = ours(loss_type=name, beta=beta, cpo_alpha=nll, label_smoothing=eps)
            close(loss, sum(paper(name, CHOSEN, REJECTED, nll, beta=beta, eps=eps)))
            close(metrics["loss"], loss)
            close(slope, slopes(name, nll, beta=beta, eps=eps), **SLOPE)


def test_some_losses_by_hand():
    """Sums -2 and -6 of two and three tokens, means -1 and -2, in decimals, so that an error in PAPER cannot hide in
    both."""
    pair = {"chosen": [(-2.0, 2)], "rejected": [(-6.0, 3)], "cpo_alpha": 0.0}
    expected = {
        "sigmoid": 0.5130152523999526,  # ln(1 + e^-0.4)
        "hinge": 0.6,  # 1 - 0.1 * 4
        "ipo": 16.0,  # (1 - 5)^2
        "simpo": 0.9130152523999526,  # ln(1 + e^0.4) = 0.4 + ln(1 + e^-0.4)
    }
    for name, value in expected.items():
        close(ours(loss_type=name, **pair)[0], value, rtol=0, atol=1e-12)
    close(ours(loss_type="hinge", **pair | {"cpo_alpha": 2.0})[0], 2.6, rtol=0, atol=1e-12)
    # alpha 1: rewards 1 - e and 1 - e^2, 4.670774270471606 apart
    loss = ours(loss_type="alphapo", alpha=1.0, beta=1.0, simpo_gamma=4.670774270471606, **pair)[0]
    close(loss, math.log(2), rtol=0, atol=1e-12)


def test_the_chosen_completions_own_loss_is_there_unless_the_paper_has_none():
    for name in LOSSES:
        weight = 0.0 if name in ("simpo", "alphapo") else 1.0
        close(ours(loss_type=name)[0], ours(loss_type=name, cpo_alpha=weight)[0])
        assert abs(ours(loss_type=name)[0] - ours(loss_type=name, cpo_alpha=1 - weight)[0]) > 0.1


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_passes_for_another(name):
    """Neither for one of this script nor for that of its parent."""
    expected = sum(paper(name, CHOSEN, REJECTED, 0.7))
    flags = {"beta": 0.8, "cpo_alpha": 0.7}
    orpo = script("experimental/orpo")
    turns = [completion for pair in zip(CHOSEN, REJECTED) for completion in pair]
    sums, lengths = f64([total for total, _ in turns]), torch.tensor([n for _, n in turns])
    others = [ours(loss_type=other, **flags)[0] for other in LOSSES if other != name]
    others.append(orpo.orpo_loss(sums, lengths, orpo.Args(beta=0.8))[0])
    for other in others:
        with pytest.raises(AssertionError):
            close(other, expected)


@pytest.mark.parametrize("length", (1, 7))
def test_simpo_without_a_margin_at_equal_lengths_is_the_loss_without_a_reference_at_beta_over_length(length):
    chosen, rejected = [[(total, length) for total, _ in half] for half in (CHOSEN, REJECTED)]
    loss, _, slope = ours(chosen, rejected, loss_type="simpo", simpo_gamma=0.0, beta=1.4)
    sums = f64([total for pair in zip(chosen, rejected) for total, _ in pair], grad=True)
    args = dpo.Args(beta=1.4 / length, reference_free=True)
    free, _ = dpo.dpo_loss(sums, torch.zeros_like(sums), torch.full_like(sums, length), None, args)
    close(loss, free)
    close(slope, torch.autograd.grad(free, sums)[0])


def test_alphapo_begins_at_simpo():
    simpo = ours(loss_type="simpo", beta=2.0)[0]
    close(ours(loss_type="alphapo", beta=2.0, alpha=0.0)[0], simpo)
    close(ours(loss_type="alphapo", beta=2.0, alpha=1e-9)[0], simpo, rtol=1e-7, atol=0)


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: f"{case['batch']} {list(case['flags'].values())}")
def test_trl(case):
    """Where the chosen completions differ in length, TRL's own loss of them is a mean over the micro-batch's tokens."""
    batch = FIXTURE["batches"][case["batch"]]
    tokens = f64([x for row in batch["logprobs"] for x in row], grad=True)
    lengths = torch.tensor([len(row) for row in batch["logprobs"]])
    seq = torch.arange(len(lengths)).repeat_interleave(lengths)
    sums = torch.zeros(len(lengths), dtype=torch.float64).index_add(0, seq, tokens)
    flags = case["flags"]
    loss = cpo.cpo_loss(sums, lengths, cpo.Args(**flags))[0] / (len(lengths) // 2)
    if case["batch"] == "mixed" and flags.get("cpo_alpha"):
        is_chosen = (seq % 2 == 0).double()
        per_pair = (sums / lengths)[::2].mean()
        per_token = (is_chosen * tokens).sum() / is_chosen.sum()
        assert abs(loss.item() - case["loss"]) > 1e-3
        loss = loss + flags["cpo_alpha"] * (per_pair - per_token)
    close(loss, case["loss"], rtol=1e-9, atol=1e-10)
    theirs = [x for row in case["gradient"] for x in row]
    close(torch.autograd.grad(loss, tokens)[0], theirs, rtol=1e-9, atol=1e-10)


def test_the_fixture_has_every_loss():
    assert {case["flags"]["loss_type"] for case in FIXTURE["cases"]} == set(LOSSES)


@settings(deadline=None, max_examples=20)
@given(PAIRS)
def test_any_numbers_give_finite_ones(pairs):
    """In the precision of training, at AlphaPO's exponentials too."""
    turns = [completion for pair in pairs for completion in pair]
    lengths = torch.tensor([n for _, n in turns])
    for name in LOSSES:
        for alpha in 0.0, 0.25, 2.0:
            sums = torch.tensor([total for total, _ in turns], requires_grad=True)
            args = cpo.Args(loss_type=name, alpha=alpha, beta=2.5)
            loss, metrics = cpo.cpo_loss(sums, lengths, args)
            (slope,) = torch.autograd.grad(loss, sums)
            assert loss.isfinite() and slope.isfinite().all()
            assert all(value.isfinite() for value in metrics.values())


@settings(deadline=None, max_examples=12)
@given(PAIRS, st.integers(0, 6))
def test_where_a_step_is_cut_changes_nothing(pairs, cut):
    chosen, rejected = [list(half) for half in zip(*pairs)]
    for name in LOSSES:
        whole, _, slope = ours(chosen, rejected, loss_type=name)
        parts = []
        for part in slice(cut), slice(cut, None):
            if chosen[part]:
                parts.append(ours(chosen[part], rejected[part], loss_type=name))
        close(sum(part[0] for part in parts), whole, rtol=1e-9, atol=1e-9)
        close(torch.cat([part[2] for part in parts]), slope)


@pytest.mark.parametrize("name", ("sigmoid", "simpo"))
def test_a_run(name, tmp_path):
    flags = ["--loss_type", name, "--beta", 0.4, "--label_smoothing", 0.1, "--cpo_alpha", 0.7]
    line, chosen, rejected = first_step("experimental/cpo", tmp_path, *flags)
    assert line["loss"] == pytest.approx(sum(paper(name, chosen, rejected, 0.7, beta=0.4, eps=0.1)) / 5, rel=1e-5)
    assert line["nll"] == pytest.approx(-sum(total / n for total, n in chosen) / 5, rel=1e-5)


REFUSED = {  # flags -> the flag to change
    "labels that say nothing": ({"label_smoothing": 0.5}, "--label_smoothing"),
    "smoothing for nobody": ({"loss_type": "hinge", "label_smoothing": 0.1}, "--label_smoothing"),
    "nothing to compare": ({"beta": 0.0}, "--beta"),
    "no number": ({"cpo_alpha": math.nan}, "--cpo_alpha"),
    "a negative weight": ({"cpo_alpha": -1.0}, "--cpo_alpha"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_flags_without_a_meaning(case):
    flags, named = REFUSED[case]
    with pytest.raises(InputError) as e:
        cpo.Args(**flags).check()
    assert str(e.value).startswith(named), e.value


@pytest.mark.parametrize("flags, needle", (
    (["--loss_type", "ipo", "--beta", "0"], "--beta"),
    (["--loss_type", "simple"], "simpo"),
))  # fmt: skip
def test_runs_that_stop_before_step_1(flags, needle, tmp_path):
    refused(attempt("experimental/cpo", tmp_path, *flags), tmp_path, needle)
