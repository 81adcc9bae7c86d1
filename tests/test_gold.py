"""The loss of gold.py: over spans in plain float64 sums, TRL 1.16.0's with its gradient; with one tokenizer GKD's."""

import json
import math
from array import array
from types import SimpleNamespace

import pytest
import torch
from conftest import read_jsonl, script, tiny_rows, train
from test_alignment import aligner
from test_bad_input import attempt, refused, write_rows
from test_distillation import BETAS, CLOSE, FIXTURE, PLAIN, TINY, expected_norm, teacher_folder, trl_inputs
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.experimental import spans as subject
from common.experimental.alignment import span_rows
from common.experimental.spans import OtherTeacher, SpanPolicy

NAME = "experimental/gold"
ONE_STEP = ["--max_steps", 1, "--batch_size", 5, "--eval_every", 0, "--save_every", 0, "--eval_dataset", ""]


def outputs(student, teacher, tokens, spans, *, beta=0.5, matched=None, weights=(0.0, 1.0)):
    """What SpanPolicy reads of hidden states. student, teacher: hidden, weight, bias; tokens: of both, lists; spans: of
    one completion, lists of places with the base first."""
    policy = SpanPolicy.__new__(SpanPolicy)
    nn.Module.__init__(policy)
    head = SimpleNamespace(weight=student[1], bias=student[2])
    policy.lm, policy.transform = SimpleNamespace(get_output_embeddings=lambda: head), PLAIN
    policy.teacher = OtherTeacher(teacher[1], teacher[2], PLAIN, beta, matched=matched, weights=weights)
    completions = [{"ids": tokens[0], "teacher_ids": tokens[1], "spans": spans}]
    batch = {"labels": torch.tensor(tokens[0]), "teacher_labels": torch.tensor(tokens[1]), "teacher_hidden": teacher[0]}
    batch["student_spans"] = span_rows(completions, "ids", 0, "cpu")
    batch["teacher_spans"] = span_rows(completions, "teacher_ids", 1, "cpu")
    return policy.read(student[0], batch, ["divergence", "entropy"])


def masses(p, tokens, places):
    """A span's, (V,): the base's distribution times the probabilities of the other tokens. p (tokens, V)."""
    base, *rest = places
    return p[base] * math.prod([p[place, tokens[place]] for place in rest])


def by_hand(student, teacher, tokens, spans, beta, matched, weights):
    """The sum over spans in float64, with autograd."""
    p, q = [(h @ w.T + b).softmax(-1) for h, w, b in (student, teacher)]
    total = 0.0
    for first, second in spans:
        total = total + distance(masses(p, tokens[0], first), masses(q, tokens[1], second), beta, matched, weights)
    return total


def distance(mine, theirs, beta, matched, weights):
    """Of a span's masses, (V,) and (V',)."""
    total = 0.0
    if matched:
        own, other = [list(ids) for ids in zip(*matched)]
        a, b = mine[own], theirs[other]
        m = beta * b + (1 - beta) * a
        parts = beta * b * (b / m).log() + (1 - beta) * a * (a / m).log()
        if beta in (0, 1):
            parts = b * (b / a).log() if beta == 0 else a * (a / b).log()
        total = weights[0] * parts.sum()
        mine = mine[[v for v in range(len(mine)) if v not in own]]
        theirs = theirs[[v for v in range(len(theirs)) if v not in other]]
    ranked = [part.sort(descending=True).values for part in (mine, theirs)]
    width = max(len(mine), len(theirs))
    a, b = [nn.functional.pad(part, (0, width - len(part))) for part in ranked]
    return total + weights[1] * (a - b).abs().sum()


@pytest.mark.parametrize("chunk", [2**24, 8 * 20 * 2], ids=["whole", "chunks"])
@pytest.mark.parametrize("hybrid", [False, True], ids=["sorted", "hybrid"])
@pytest.mark.parametrize("beta", BETAS)
def test_by_hand(beta, hybrid, chunk, monkeypatch):
    """Value and gradients; and with one span of many tokens on both sides, one of a token each, tokens in none."""
    if beta != 0.5 and not hybrid:
        pytest.skip("beta is the hybrid's")
    monkeypatch.setitem(subject.CHUNK, "cpu", chunk)
    torch.manual_seed(1)
    student, teacher = [[torch.randn(8, d), torch.randn(v, d), torch.randn(v)] for d, v in ((3, 9), (4, 11))]
    tokens = [4, 1, 8, 0, 3, 3, 2, 7], [10, 9, 0, 2, 2, 5, 1, 6]
    spans = [([0], [0]), ([1, 2, 3], [2, 1]), ([6, 4, 5], [3])]
    matched, weights = ([(0, 3), (4, 10), (8, 1), (2, 2)], (0.4, 0.8)) if hybrid else (None, (0.0, 1.0))
    student = [x.requires_grad_() for x in student]
    exact = [x.detach().double().requires_grad_() for x in student]
    wanted = by_hand(exact, [x.double() for x in teacher], tokens, spans, beta, matched, weights)
    pairs = torch.tensor(matched).T if hybrid else None
    out = outputs(student, teacher, tokens, spans, beta=beta, matched=pairs, weights=weights)
    assert out["divergence"].shape == (3,) and out["entropy"].shape == (8,)
    assert out["divergence"].sum().item() == pytest.approx(wanted.item(), rel=1e-5)  # fp32 against float64
    got = torch.autograd.grad(out["divergence"].sum(), student)
    for a, b in zip(got, torch.autograd.grad(wanted, exact)):
        torch.testing.assert_close(a.double(), b, **CLOSE)


@pytest.mark.parametrize("case", FIXTURE["uld"], ids=lambda x: f"{x['strategy']}-{x['hybrid']}-{x['beta']}")
def test_trl(case):
    """TRL's mean over spans and over tokens; its ends of tokens, aligned here; its names of tokens, matched here."""
    given = FIXTURE["uld_inputs"]
    student, teacher = trl_inputs()
    own = [student[0][:5], *student[1:]]
    teacher = [teacher[0][:4], teacher[1][:7], teacher[2][:7]]
    pieces = []
    for ends in (given["student_ends"], given["teacher_ends"]):
        pieces.append([b"x" * (end - start) for start, end in zip([0, *ends], ends)])
    spans = script(NAME).Aligner.__init__.__globals__["equal_spans"](*pieces)
    if case["strategy"] == "bayesian":
        spans = [([*a[-1:], *a[:-1]], [*b[-1:], *b[:-1]]) for a, b in spans]
    matched = None
    names = given["student_names"], given["teacher_names"]
    if case["hybrid"]:
        pairs = [(names[0].index(name), k) for k, name in enumerate(names[1]) if name in names[0]]
        matched = torch.tensor(pairs).T
    share = 3 / 7
    tokens = given["student"][1:], given["teacher"][1:]
    out = outputs(own, teacher, tokens, spans, beta=case["beta"], matched=matched, weights=(share, 1 - share)
                  if case["hybrid"] else (0.0, 1.0))  # fmt: skip
    args = SimpleNamespace(uld_crossentropy_weight=case["weights"][0], uld_distillation_weight=case["weights"][1])
    loss = script(NAME).gold_loss(out, len(spans), len(tokens[0]), args)
    assert len(spans) == 3 and loss.item() == pytest.approx(case["loss"], rel=1e-5)
    hidden, weight, bias = torch.autograd.grad(loss, student)
    d_z = torch.tensor(case["d_logits"])
    torch.testing.assert_close(hidden, d_z @ student[1].detach(), **CLOSE)
    torch.testing.assert_close(weight, d_z.T @ student[0].detach(), **CLOSE)
    torch.testing.assert_close(bias, d_z.sum(0), **CLOSE)


def first_step(folder):
    (line,) = [line for line in read_jsonl(folder / "metrics.jsonl") if "grad_norm" in line]
    return line


def test_one_tokenizer_is_distillation(tmp_path):
    """With the hybrid loss: the generalised Jensen-Shannon divergence by transformers in float64, micro-batches and two
    ranks. The sorted distance alone would be another loss: by more than a tenth."""
    data = tiny_rows("distillation", tmp_path / "rows.jsonl", 5)
    flags = ["--dataset", data, "--teacher", "tiny", "--lmbda", 0, "--beta", 0.5, *ONE_STEP]
    flags += ["--tokens_per_microbatch", 100]
    train(NAME, tmp_path / "run", *flags, "--uld_use_hybrid_loss", world=2)
    loss, norm = expected_norm([json.loads(row) for row in open(data)], 0.5, 1.0)
    line = first_step(tmp_path / "run")
    assert line["loss"] == pytest.approx(loss, rel=1e-5) and line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert line["num_spans"] == line["num_tokens"] and line["lost_frac"] == 0
    train(NAME, tmp_path / "sorted", *flags, "--no-uld_use_hybrid_loss")
    assert abs(first_step(tmp_path / "sorted")["loss"] / loss - 1) > 0.1


SORTED, HYBRID = "--no-uld_use_hybrid_loss", "--uld_use_hybrid_loss"


@pytest.mark.parametrize("flags, world", [
    ([SORTED], 1),
    ([HYBRID, "--beta", 0.3, "--temperature", 0.8, "--uld_crossentropy_weight", 0.3,
      "--uld_distillation_weight", 2], 2),
    ([HYBRID, "--beta", 1, "--uld_hybrid_matched_weight", 0.3, "--uld_hybrid_unmatched_weight", 2,
      "--no-use_extended_uld"], 1),
    ([SORTED, "--uld_token_merge_strategy", "bayesian", "--uld_skip_eos"], 1),
], ids=["sorted", "hybrid", "weights", "bayesian"])  # fmt: skip
def test_a_step_with_another_tokenizer(flags, world, tmp_path):
    """The whole step by transformers in float64, a row at a time; spans by the tokenizers' own offsets in the text;
    tokens that both have by their names, which here are what they spell."""
    data = tiny_rows("distillation", tmp_path / "rows.jsonl", 5)
    args = script(NAME).parse_args(["--model", "a", "--teacher", "b", "--dataset", "c", *map(str, flags)])
    train(NAME, tmp_path / "run", "--dataset", data, "--lmbda", 0, *ONE_STEP, "--tokens_per_microbatch", 100, *flags,
          world=world)  # fmt: skip
    names = "model", "other_teacher"
    tokenizers = [AutoTokenizer.from_pretrained(TINY / name) for name in names]
    student, teacher = [AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float64) for name in names]
    matched, weights = None, (0.0, 1.0)
    if args.uld_use_hybrid_loss:
        own, theirs = [tokenizer.get_vocab() for tokenizer in tokenizers]
        matched = [(number, theirs[token]) for token, number in own.items() if token in theirs]
        assert 2 < len(matched) < len(theirs)
        weights = len(matched) / len(theirs), 1 - len(matched) / len(theirs)
        if args.uld_hybrid_matched_weight is not None:
            weights = args.uld_hybrid_matched_weight, args.uld_hybrid_unmatched_weight
    total, cross_entropy, num_spans, num_tokens, covered = 0.0, 0.0, 0, 0, 0
    for row in map(json.loads, open(data)):
        text, sides = row["completion"][0]["content"], []
        for tokenizer, lm in zip(tokenizers, (student, teacher)):
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = [*found["input_ids"], tokenizer.eos_token_id]
            ends = [end for _, end in found["offset_mapping"]] + [len(text) + 1]
            logits = lm(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / args.temperature
            sides.append((logits.softmax(-1), ids, ends))
        (p, ids, ends), (q, teacher_ids, teacher_ends) = sides
        spans, start, teacher_start = [], 0, 0
        for end in sorted(set(ends) & set(teacher_ends)):
            stop, teacher_stop = ends.index(end) + 1, teacher_ends.index(end) + 1
            spans.append((list(range(start, stop)), list(range(teacher_start, teacher_stop))))
            start, teacher_start = stop, teacher_stop
        if not args.use_extended_uld:
            spans = [([k], [k]) for k in range(min(len(ids), len(teacher_ids)) - 1)]
            spans.append(([len(ids) - 1], [len(teacher_ids) - 1]))
        if args.uld_skip_eos:
            spans.pop()
        for first, second in spans:
            covered += len(first)
            if args.uld_token_merge_strategy == "bayesian":
                first, second = first[::-1], second[::-1]  # a product: the order of all but the base is nothing
            mine, theirs = masses(p, ids, first), masses(q.detach(), teacher_ids, second)
            total = total + distance(mine, theirs, args.beta, matched, weights)
        cross_entropy = cross_entropy - p[range(len(ids)), ids].log().sum()
        num_spans += len(spans)
        num_tokens += len(ids)
    loss = args.uld_distillation_weight * total / num_spans + args.uld_crossentropy_weight * cross_entropy / num_tokens
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in student.parameters()))
    line = first_step(tmp_path / "run")
    assert line["num_spans"] == num_spans < line["num_tokens"] == num_tokens
    assert line["lost_frac"] == pytest.approx(1 - covered / num_tokens, abs=1e-6)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)  # where two masses nearly tie, fp32 ranks otherwise


def test_what_is_evaluated_is_what_is_trained(tmp_path):
    """On the same samples of the same rows: the mean over spans, not over tokens."""

    def patch(module):
        rollout = module.rollout
        module.rollout = lambda sampler, prompts, copies, _, *rest: rollout(sampler, prompts, 1, ("eval",), *rest)
        module.order = lambda count, seed, start, size: list(range(size))

    data = tiny_rows("distillation", tmp_path / "rows.jsonl", 5)
    flags = ["--dataset", data, "--lmbda", 1, *ONE_STEP, "--tokens_per_microbatch", 100, "--eval_dataset", data]
    flags += ["--eval_rows", 5]
    train(NAME, tmp_path / "run", *flags, world=2, patch=patch)
    before = read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    line = first_step(tmp_path / "run")
    assert line["loss"] == pytest.approx(before["eval/divergence"], rel=1e-6) and line["num_spans"] < line["num_tokens"]


def test_the_defaults_are_the_form_that_is_described():
    args = script(NAME).parse_args(["--model", "a", "--teacher", "b", "--dataset", "c"])
    assert (args.uld_distillation_weight, args.uld_crossentropy_weight, args.use_extended_uld) == (1.0, 0.0, True)
    assert (args.uld_token_merge_strategy, args.uld_skip_eos) == ("observed", False)


def test_the_student_comes_nearer(tmp_path):
    """On its own samples, from a teacher with other tokens."""
    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 64)
    flags = ["--dataset", data, "--max_steps", 12, "--batch_size", 16, "--learning_rate", 2e-4, "--lmbda", 1]
    flags += ["--eval_rows", 64, "--eval_every", 0, "--save_every", 0]
    train(NAME, tmp_path / "run", *flags, "--num_generations", 1)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["eval/divergence"] < 0.9 * lines[0]["eval/divergence"]


@pytest.mark.parametrize("flags, needles", [
    (["--teacher", ""], ["--teacher"]), (["--beta", 1.5], ["--beta 1.5"]),
    (["--tp_size", 2], ["--tp_size 2", "sorted"]), (["--uld_hybrid_matched_weight", 1], ["give both"]),
], ids=["no teacher", "beta", "tp", "one weight"])  # fmt: skip
def test_flags_that_are_refused(flags, needles, tmp_path):
    refused(attempt(NAME, tmp_path, *flags), tmp_path, *needles)


def test_several_turns(tmp_path):
    turns = [{"role": "assistant", "content": "7"}, {"role": "user", "content": "3+5?"}]
    answer = [*turns, {"role": "assistant", "content": "8"}]
    row = {"prompt": [{"role": "user", "content": "3+4?"}], "completion": answer}
    data = write_rows(tmp_path, row, row)
    result = attempt(NAME, tmp_path, "--dataset", data, "--lmbda", 0)
    refused(result, tmp_path, "a completion has several turns", "mine.jsonl:1")


def test_a_teacher_that_cannot_write_the_text(tmp_path):
    """TEACH002: without most letters in its tokenizer. Allowed, the run says at every step how much is lost."""

    def change(known):
        for letter in "Whatis":
            known["model"]["vocab"][f"unused {letter}"] = known["model"]["vocab"].pop(letter)

    folder = teacher_folder(tmp_path / "teacher", tokenizer=change)
    result = attempt(NAME, tmp_path, "--teacher", folder, "--allow", "GRPO002")
    assert result.code == 3 and "TEACH002" in result.err, result.err
    second = tmp_path / "second"
    result = attempt(NAME, second, "--teacher", folder, "--allow", "GRPO002", "TEACH002")
    assert result.code == 0, result.err
    assert all("lost_frac" in line for line in read_jsonl(second / "out" / "metrics.jsonl") if "grad_norm" in line)


def test_no_span_at_all():
    """An empty micro-batch of spans: no distance, no gradient, and no error."""
    student, teacher = [[torch.randn(2, 3).requires_grad_(), torch.randn(5, 3), None] for _ in range(2)]
    out = outputs(student, [x if x is None else x.detach() for x in teacher], ([1, 2], [3, 4]), [])
    assert out["divergence"].shape == (0,)
    (gradient,) = torch.autograd.grad(out["divergence"].sum() + 0 * out["logprobs"].sum(), student[0])
    assert gradient.abs().max() == 0


def test_a_completion_that_is_a_stop_token_alone():
    align = aligner("model", "other_teacher")
    stop = align.tokenizer.eos_token_id
    completion = {"ids": array("i", [stop]), "scored": None}
    assert align.attach([{"teacher_prompt": array("i", [9]), "completions": [completion]}]) == (1, 1)
