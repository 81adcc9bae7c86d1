"""ORPO against its paper and against TRL 1.16.0, values and gradients.

`paper` holds the formulas once more: plain floats, one pair at a time, from probabilities and odds as they are. TRL's
numbers stand in fixtures/trl_orpo.json (by benchmarks/trl_fixtures.py).
"""

import json
import math

import pytest
import torch
from conftest import ROOT, read_jsonl, script, train
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dpo_losses import SLOPE, close, f64, plain

orpo = script("experimental/orpo")
FIXTURE = json.loads((ROOT / "tests" / "fixtures" / "trl_orpo.json").read_text())
#         log pi of a completion, its tokens: chosen better, equal per token, worse
CHOSEN = ((-4.0, 4), (-1.5, 3), (-9.0, 5))
REJECTED = ((-9.0, 3), (-3.0, 6), (-0.2, 1))


def paper(chosen, rejected, beta):
    """Return the loss of every pair. P: the geometric mean of the tokens' probabilities (equation 3); then 4, 6, 7."""
    losses = []
    for (sum_w, n_w), (sum_l, n_l) in zip(chosen, rejected):
        p_w, p_l = math.exp(sum_w) ** (1 / n_w), math.exp(sum_l) ** (1 / n_l)
        ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
        losses.append(-math.log(p_w) + beta * math.log(1 + 1 / ratio))  # -log sigmoid(log r) = log(1 + 1 / r)
    return losses


def slopes(chosen, rejected, beta, h=1e-5):
    """Return d (sum of losses) / d log pi by central differences, chosen and rejected in turn."""
    found = []
    for pair in range(len(chosen)):
        for side in 0, 1:
            ends = []
            for sign in 1, -1:
                halves = [list(chosen), list(rejected)]
                total, n = halves[side][pair]
                halves[side][pair] = total + sign * h, n
                ends.append(sum(paper(*halves, beta)))
            found.append((ends[0] - ends[1]) / (2 * h))
    return found


def ours(chosen=CHOSEN, rejected=REJECTED, **flags):
    """Return the loss of all pairs, metrics, and d loss / d log pi, by the script's own function in float64."""
    turns = [completion for pair in zip(chosen, rejected) for completion in pair]
    sums = f64([total for total, _ in turns], grad=True)
    lengths = torch.tensor([n for _, n in turns])
    loss, metrics = orpo.orpo_loss(sums, lengths, orpo.Args(**flags))
    (slope,) = torch.autograd.grad(loss, sums)
    return loss.detach(), metrics, slope


@pytest.mark.parametrize("beta", (0.1, 0.7))
def test_loss(beta):
    loss, metrics, slope = ours(beta=beta)
    close(loss, sum(paper(CHOSEN, REJECTED, beta)))
    close(metrics["loss"], loss)
    close(slope, slopes(CHOSEN, REJECTED, beta), **SLOPE)


def test_by_hand():
    """P 0.5 and 0.2, of two tokens and of one: odds 1 and 0.25, their ratio 4, sigmoid(log 4) = 0.8. In decimals, so
    that an error in `paper` cannot hide in both."""
    pair = {"chosen": [(2 * math.log(0.5), 2)], "rejected": [(math.log(0.2), 1)]}
    loss, metrics, _ = ours(beta=0.5, **pair)
    close(loss, 0.6931471805599453 + 0.5 * 0.2231435513142097, rtol=0, atol=1e-12)  # ln 2, ln 1.25
    close(metrics["nll"], 0.6931471805599453, rtol=0, atol=1e-12)
    close(metrics["log_odds_ratio"], 1.3862943611198906, rtol=0, atol=1e-12)  # ln 4
    close(metrics["reward_margin"], 0.5 * (math.log(0.5) - math.log(0.2)))
    close(metrics["chosen_logprob"], -1.3862943611198906)


@pytest.mark.parametrize("mean", (-3.0, -0.7, -1e-3))
def test_equal_likelihoods_are_ln_2(mean):
    """Per token: lengths do not matter."""
    loss, metrics, slope = ours([(4 * mean, 4)], [(9 * mean, 9)], beta=0.3)
    close(loss, -mean + 0.3 * math.log(2))
    close(metrics["log_odds_ratio"], 0.0, rtol=0, atol=1e-12)
    odds = 0.5 * 0.3 / (1 - math.exp(mean))  # d log odds / d log P = 1 / (1 - P)
    close(slope, [(-1 - odds) / 4, odds / 9])


def test_without_the_odds_it_is_the_parents_loss_of_the_chosen_ones_and_with_them_it_is_not():
    sft = script("sft")
    parents = sum(sft.sft_loss({"logprobs": f64([total / n] * n)}, sft.Args()) / n for total, n in CHOSEN)
    close(ours(beta=0)[0], parents)
    with pytest.raises(AssertionError):
        close(parents, sum(paper(CHOSEN, REJECTED, 0.1)))


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: f"{case['batch']} {case['flags']['beta']}")
def test_trl(case):
    """The odds in fp32, as TRL takes them. Where prompts have several tokens its first term is over these, too."""
    batch = FIXTURE["batches"][case["batch"]]
    tokens = f64([x for row in batch["logprobs"] for x in row], grad=True)
    lengths = torch.tensor([len(row) for row in batch["logprobs"]])
    seq = torch.arange(len(lengths)).repeat_interleave(lengths)
    sums = torch.zeros(len(lengths), dtype=torch.float64).index_add(0, seq, tokens)
    loss, metrics = orpo.orpo_loss(sums, lengths, orpo.Args(**case["flags"]))
    pairs = len(lengths) // 2
    loss = loss / pairs
    close(metrics["log_odds_ratio"] / pairs, case["log_odds_ratio"], rtol=2e-6, atol=1e-6)
    theirs = torch.tensor([x for row in case["gradient"] for x in row], dtype=torch.float64)
    prompt = sum(sum(row) for row in batch["prompt_logprobs"])
    if prompt:
        answers = int(lengths[::2].sum())
        all_tokens = answers + sum(len(row) for row in batch["prompt_logprobs"])
        nll = sum(sum(row) for row in batch["logprobs"][::2])
        first_term = -(nll + prompt) / all_tokens  # TRL's, and not the paper's
        assert abs(loss.item() - case["loss"]) > 0.01
        loss = loss + nll / answers + first_term
        is_chosen = (seq % 2 == 0).double()
        theirs = theirs + is_chosen * (1 / all_tokens - 1 / answers)
    close(loss, case["loss"], rtol=1e-6, atol=1e-7)
    close(torch.autograd.grad(loss, tokens)[0], theirs, rtol=1e-6, atol=1e-7)


NUMBERS = st.tuples(st.floats(-800, 0), st.integers(1, 40))
PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(PAIRS)
def test_any_numbers_give_finite_ones(pairs):
    """Certain completions too, which have no finite odds; in the precision of training."""
    turns = [completion for pair in pairs for completion in pair]
    sums = torch.tensor([total for total, _ in turns], requires_grad=True)
    lengths = torch.tensor([n for _, n in turns])
    loss, metrics = orpo.orpo_loss(sums, lengths, orpo.Args())
    (slope,) = torch.autograd.grad(loss, sums)
    assert loss.isfinite() and slope.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


@settings(deadline=None, max_examples=20)
@given(PAIRS, st.integers(0, 6))
def test_where_a_step_is_cut_changes_nothing(pairs, cut):
    chosen, rejected = [list(half) for half in zip(*pairs)]
    whole, _, slope = ours(chosen, rejected)
    parts = []
    for part in slice(cut), slice(cut, None):
        if chosen[part]:
            parts.append(ours(chosen[part], rejected[part]))
    close(sum(part[0] for part in parts), whole, rtol=1e-9, atol=1e-9)
    close(torch.cat([part[2] for part in parts]), slope)


ANSWERS = ("7", "8, or 9"), ("3+4=7", "3"), ("no", "12+30"), ("1 2 3", "1 2 4"), ("a sum of 7", "seven")  # of 3+k=


def first_step(name, folder, *flags):
    """Return the metrics of step 1 of a run, and of each of its five pairs (sum of log p, tokens) by the tiny model's
    own logits, one sequence at a time."""
    rows = folder / "rows.jsonl"
    pairs = [{"prompt": f"3+{k}=", "chosen": w, "rejected": x} for k, (w, x) in enumerate(ANSWERS)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    common = ["--dataset", rows, "--eval_dataset", "", "--batch_size", 5, "--max_steps", 1, "--save_every", 0]
    train(name, folder / "out", *common, *flags)
    (line,) = read_jsonl(folder / "out" / "metrics.jsonl")
    assert {alert["code"] for alert in read_jsonl(folder / "out" / "alerts.jsonl")} == {"DATA007"}  # plain text
    assert not list((folder / "out").glob("ref_logprobs*"))
    scored = [[(logp.sum().item(), len(logp)) for logp, _ in pair] for pair in plain(str(rows))]
    return line, *zip(*scored)


def test_a_run(tmp_path):
    line, chosen, rejected = first_step("experimental/orpo", tmp_path, "--beta", 0.4)
    assert line["loss"] == pytest.approx(sum(paper(chosen, rejected, 0.4)) / 5, rel=1e-5)
    assert line["nll"] == pytest.approx(-sum(total / n for total, n in chosen) / 5, rel=1e-5)
