"""TPO and its variants against their formulas and against TRL 1.16.0, values and gradients.

PAPER holds the formulas once more: plain floats, one triple at a time. TRL's numbers stand in fixtures/trl_tpo.json (by
benchmarks/trl_fixtures.py).
"""

import json
import math
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import ROOT, lone_run, read_jsonl, script, train
from test_bad_input import attempt, refused, write_rows
from test_dpo_losses import SLOPE, close, f64, plain
from test_orpo_losses import ANSWERS

from common.runtime.flags import InputError
from common.tokenization import load_tokenizer, stop_ids

tpo, cpo = script("experimental/tpo"), script("experimental/cpo")
FIXTURE = json.loads((ROOT / "tests" / "fixtures" / "trl_tpo.json").read_text())
LOSSES = get_args(get_type_hints(tpo.Args)["loss_type"])
#           chosen      rejected     reference: log pi, tokens
TRIPLES = (((-4.0, 4), (-9.0, 3), (-3.0, 5)), ((-1.5, 3), (-3.0, 6), (-7.0, 2)), ((-9.0, 5), (-0.2, 1), (-1.0, 1)))


def smoothed(x, eps):
    return (1 - eps) * math.log(1 + math.exp(-x)) + eps * math.log(1 + math.exp(x))


# Of one triple: (log pi, tokens) of the chosen and the rejected completion, beta, gamma, eps.
PAPER = {
    "sigmoid": lambda w, x, beta, gamma, eps: smoothed(beta * (w[0] - x[0]), eps),
    "hinge": lambda w, x, beta, gamma, eps: max(0.0, 1 - beta * (w[0] - x[0])),
    "ipo": lambda w, x, beta, gamma, eps: (w[0] / w[1] - x[0] / x[1] - 1 / (2 * beta)) ** 2,
    "tpo-l": lambda w, x, beta, gamma, eps: smoothed(beta * (w[0] / w[1] - x[0] / x[1] - gamma / beta), eps),
}


def paper(name, triples, alpha=1.0, beta=0.3, gamma=0.5, eps=0.0):
    """Return the loss of every triple."""
    return [PAPER[name](w, x, beta, gamma, eps) - alpha * ref[0] / ref[1] for w, x, ref in triples]


def ours(triples=TRIPLES, roles=(0.0, 1.0, 2.0), **flags):
    """Return the loss of all triples, metrics, and d loss / d log pi, by the script's own function in float64."""
    turns = [completion for triple in triples for completion in triple]
    sums = f64([total for total, _ in turns], grad=True)
    lengths = torch.tensor([n for _, n in turns])
    loss, metrics = tpo.tpo_loss(sums, lengths, f64(list(roles) * len(triples)), tpo.Args(**{"beta": 0.3} | flags))
    (slope,) = torch.autograd.grad(loss, sums)
    return loss.detach(), metrics, slope


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    for eps in (0.0, 0.1) if name in tpo.SMOOTHED else (0.0,):
        loss, metrics, slope = ours(loss_type=name, tpo_alpha=0.7, label_smoothing=eps)
        close(loss, sum(paper(name, TRIPLES, alpha=0.7, eps=eps)))
        close(metrics["loss"], loss)
        close(metrics["nll"], 3 / 5 + 7 / 2 + 1)
        expected = []
        for row in range(3):
            for side in range(3):
                ends = []
                for sign in 1, -1:
                    moved = [list(triple) for triple in TRIPLES]
                    total, n = moved[row][side]
                    moved[row][side] = total + sign * 1e-5, n
                    ends.append(sum(paper(name, moved, alpha=0.7, eps=eps)))
                expected.append((ends[0] - ends[1]) / 2e-5)
        close(slope, expected, **SLOPE)


def test_some_losses_by_hand():
    """Sums -2 and -6 of two and three tokens, a reference of -3 and four tokens: 0.75 of its own, twice."""
    expected = {
        "sigmoid": 0.5130152523999526,  # ln(1 + e^-0.4)
        "hinge": 0.6,  # 1 - 0.1 * 4
        "ipo": 16.0,  # (1 - 5)^2
        "tpo-l": 0.9130152523999526,  # ln(1 + e^0.4) = 0.4 + ln(1 + e^-0.4)
    }
    for name, value in expected.items():
        loss = ours([((-2.0, 2), (-6.0, 3), (-3.0, 4))], loss_type=name, beta=0.1, tpo_alpha=2.0)[0]
        close(loss, value + 1.5, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_passes_for_another(name):
    """Neither for one of this script nor for its parent's, which imitates the chosen completions; where these are the
    references it is the parent's loss."""
    expected = sum(paper(name, TRIPLES))
    pairs = [completion for triple in TRIPLES for completion in triple[:2]]
    sums, lengths = f64([total for total, _ in pairs]), torch.tensor([n for _, n in pairs])
    args = cpo.Args(loss_type=name.replace("tpo-l", "simpo"), beta=0.3, cpo_alpha=1.0)
    parents, _ = cpo.cpo_loss(sums, lengths, args)
    close(ours([(w, x, w) for w, x, _ in TRIPLES], loss_type=name)[0], parents)
    for other in [parents, *(ours(loss_type=other)[0] for other in LOSSES if other != name)]:
        with pytest.raises(AssertionError):
            close(other, expected)


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: f"{case['batch']} {list(case['flags'].values())}")
def test_trl(case):
    """Where references differ in length, TRL's loss of them is a mean over the micro-batch's tokens."""
    batch = FIXTURE["batches"][case["batch"]]
    tokens = f64([x for row in batch["logprobs"] for x in row], grad=True)
    lengths = torch.tensor([len(row) for row in batch["logprobs"]])
    seq = torch.arange(len(lengths)).repeat_interleave(lengths)
    sums = torch.zeros(len(lengths), dtype=torch.float64).index_add(0, seq, tokens)
    args = tpo.Args(**case["flags"])
    loss = tpo.tpo_loss(sums, lengths, f64([0.0, 1.0, 2.0] * 3), args)[0] / 3
    if case["batch"] == "mixed":
        is_reference = (seq % 3 == 2).double()
        per_triple = (sums / lengths)[2::3].mean()
        per_token = (is_reference * tokens).sum() / is_reference.sum()
        assert abs(loss.item() - case["loss"]) > 1e-3
        loss = loss + args.tpo_alpha * (per_triple - per_token)
    close(loss, case["loss"], rtol=1e-9, atol=1e-10)
    theirs = [x for row in case["gradient"] for x in row]
    close(torch.autograd.grad(loss, tokens)[0], theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_pairs_and_references_may_be_apart(name):
    """A micro-batch of pairs alone, and one of references alone: their losses and slopes add up."""
    whole, _, slope = ours(loss_type=name)
    pairs, metrics, of_pairs = ours([triple[:2] for triple in TRIPLES], (0.0, 1.0), loss_type=name)
    references, _, of_references = ours([triple[2:] for triple in TRIPLES], (2.0,), loss_type=name)
    close(pairs + references, whole)
    assert metrics["nll"] == 0
    close(torch.cat([of_pairs.view(3, 2), of_references.view(3, 1)], 1).flatten(), slope)


# ---- data and runs ---------------------------------------------------------------------------------------------------


def triple(number, chosen, rejected):
    return {"prompt": f"3+{number}=", "chosen": chosen, "rejected": rejected, "reference": f"is {number}!"}


def test_a_run(tmp_path):
    """The first step against the tiny model's own logits; a budget that has no room for three completions changes
    nothing, nor does another name of the column."""
    rows = [triple(number, *pair) for number, pair in enumerate(ANSWERS)]
    path = write_rows(tmp_path, *rows)
    flags = ["--eval_dataset", "", "--batch_size", 5, "--max_steps", 1, "--save_every", 0, "--tpo_alpha", 0.7]
    flags += ["--beta", 0.4]
    lines = []
    for name, more in {"whole": [], "small": ["--tokens_per_microbatch", 8]}.items():
        train("experimental/tpo", tmp_path / name, "--dataset", path, *flags, *more)
        lines += read_jsonl(tmp_path / name / "metrics.jsonl")
    pairs = plain(str(path))
    references = tmp_path / "references.jsonl"
    references.write_text("".join(json.dumps(row | {"chosen": row["reference"]}) + "\n" for row in rows))
    triples = []
    for pair, (reference, _) in zip(pairs, plain(str(references))):
        triples.append([(logp.sum().item(), len(logp)) for logp, _ in (*pair, reference)])
    for line in lines:
        assert line["loss"] == pytest.approx(sum(paper("tpo-l", triples, alpha=0.7, beta=0.4)) / 5, rel=1e-5)
        assert line["nll"] == pytest.approx(-sum(total / n for _, _, (total, n) in triples) / 5, rel=1e-5)


def test_a_row_becomes_three_completions_of_one_prompt(tmp_path):
    tokenizer = load_tokenizer(str(ROOT / "common" / "tiny" / "model"))
    asks = {"role": "user", "content": "3+4?"}
    answers = {key: [{"role": "assistant", "content": text}] for key, text in
               {"chosen": "7", "rejected": "8", "reference": "It is 7."}.items()}  # fmt: skip
    as_completion = {"completion" if key == "reference" else key: value for key, value in answers.items()}
    path = write_rows(tmp_path, {"prompt": [asks], **answers}, {"prompt": [asks], **as_completion})
    args = tpo.Args()
    groups, _, _ = tpo.load_groups(str(path), tokenizer, stop_ids(tokenizer), args, lone_run(args))
    for group in groups:
        assert tokenizer.decode(group["prompt"]) == "<|user|>3+4?<|end|><|assistant|>"
        texts = [tokenizer.decode(completion["ids"]) for completion in group["completions"]]
        assert texts == ["7<|end|>", "8<|end|>", "It is 7.<|end|>"]
    parts = tpo.pairs_and_references(groups)
    assert [[completion["role"] for completion in part["completions"]] for part in parts] == [[0.0, 1.0], [2.0]] * 2


@pytest.mark.parametrize("row, needle", (
    ({"prompt": "3+4=", "chosen": "7", "rejected": "8"}, "reference"),
    ({"prompt": "3+4=", "chosen": "7", "rejected": "8", "reference": 7}, "reference"),
))  # fmt: skip
def test_rows_without_a_reference_stop_before_step_1(row, needle, tmp_path):
    data = write_rows(tmp_path, row, row)
    refused(attempt("experimental/tpo", tmp_path, "--dataset", data), tmp_path, needle)


@pytest.mark.parametrize("flags, named", (
    ({"label_smoothing": 0.5}, "--label_smoothing"),
    ({"loss_type": "ipo", "label_smoothing": 0.1}, "--label_smoothing"),
    ({"beta": 0.0}, "--beta"),
))  # fmt: skip
def test_flags_without_a_meaning(flags, named):
    with pytest.raises(InputError, match=named):
        tpo.Args(**flags).check()
