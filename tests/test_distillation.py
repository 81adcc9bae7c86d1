"""The divergence between a student and a teacher, in float64 from its definition and against TRL 1.16.0, with its
gradients; and runs of distillation.py: what a step minimises, which teachers are refused.

`jsd` is the definition once more, from probabilities, a row at a time, in plain floats; its gradients are autograd's,
of the same sums over whole rows of probabilities. TRL's numbers stand in fixtures/trl_distillation.json (by
benchmarks/trl_distillation_fixtures.py).
"""

import json
import math
import shutil
from array import array

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import ROOT, lone_run, ranks, read_jsonl, script, tiny_rows, train
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import attempt, refused, write_rows
from test_logprobs import build
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import logprobs as subject
from common.batches import flat_batch
from common.divergence import Teacher
from common.logprobs import Policy, ScoredHead
from common.runtime import model

NAME, TINY = "distillation", ROOT / "common" / "tiny"
FIXTURE = json.loads((ROOT / "tests" / "fixtures" / "trl_distillation.json").read_text())
PLAIN = (1.0, 0.0, 1.0)  # scale, cap, temperature
CLOSE = {"rtol": 1e-5, "atol": 2e-6}  # fp32 log-probs of some -10 against float64
BETAS = (0.0, 0.3, 0.5, 1.0)


# ---- the definition --------------------------------------------------------------------------------------------------


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def jsd(p, q, beta):
    """Of the student's p from the teacher's q, lists of probabilities."""
    if beta == 0:
        return kl(q, p)
    if beta == 1:
        return kl(p, q)
    m = [beta * b + (1 - beta) * a for a, b in zip(p, q)]
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def differentiable(p, q, beta):
    """The same sums for whole rows, (rows, V) float64, so that autograd has gradients to compare with."""
    m = beta * q + (1 - beta) * p
    first, second = (q * (q / m).log()).sum(-1), (p * (p / m).log()).sum(-1)
    if beta in (0, 1):
        return (q * (q / p).log()).sum(-1) if beta == 0 else (p * (p / q).log()).sum(-1)
    return beta * first + (1 - beta) * second


def buckets(p, q, beta, k):
    """p and q of a row with all but the likeliest tokens added up, as lists."""
    kept = set()
    if beta < 1:
        kept |= set(sorted(range(len(q)), key=lambda v: -q[v])[:k])
    if beta > 0:
        kept |= set(sorted(range(len(p)), key=lambda v: -p[v])[:k])
    rest = [v for v in range(len(p)) if v not in kept]
    out = []
    for x in (p, q):
        out.append([x[v] for v in sorted(kept)] + ([sum(x[v] for v in rest)] if rest else []))
    return out


def inputs(rows=17, vocabulary=29, widths=(5, 7), bias=True, seed=0):
    """-> of the student and of the teacher: hidden, weight, bias; and labels."""
    torch.manual_seed(seed)
    models = []
    for width in widths:
        head = torch.randn(vocabulary, width) if bias else None
        models.append([torch.randn(rows, width), torch.randn(vocabulary, width), None if head is None else head[:, 0]])
    return *models, torch.randint(vocabulary, (rows,))


def ours(student, teacher, labels, beta, *, top_k=0, transform=PLAIN, teacher_transform=PLAIN, want=("entropy",)):
    """-> {name: (M,)} of ScoredHead."""
    head = Teacher(teacher[1], teacher[2], teacher_transform, beta, top_k, hidden=teacher[0])
    out = ScoredHead.apply(*student, labels, transform, ("divergence", *want), None, head)
    return {name: values for name, values in zip(subject.OUTPUTS, out) if values is not None}


def logits(model, transform=PLAIN):
    """In float64, as ScoredHead's docstring has them."""
    scale, cap, temperature = transform
    hidden, weight, bias = [None if x is None else x.double() for x in model]
    z = scale * (hidden @ weight.T + (0 if bias is None else bias))
    return (cap * torch.tanh(z / cap) if cap else z) / temperature


@pytest.mark.parametrize("transforms", [(PLAIN, PLAIN), ((0.5, 2.0, 0.7), (1.5, 0.0, 0.7))], ids=["plain", "capped"])
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients(beta, transforms):
    """Of everything that a loss may use, together; with a factor for each row, so that none can be mistaken."""
    student, teacher, labels = inputs()
    student = [x.requires_grad_() for x in student]
    out = ours(student, teacher, labels, beta, transform=transforms[0], teacher_transform=transforms[1])
    exact = [x.detach().double().requires_grad_() for x in student]
    p, q = logits(exact, transforms[0]).softmax(-1), logits(teacher, transforms[1]).softmax(-1)
    rows = torch.arange(len(labels))
    expected = {"divergence": differentiable(p, q, beta), "logprobs": p[rows, labels].log()}
    expected |= {"entropy": -(p * p.log()).sum(-1), "teacher_logprobs": q[rows, labels].log()}
    assert out.keys() == expected.keys()
    by_rows = [jsd(a, b, beta) for a, b in zip(p.tolist(), q.tolist())]
    torch.testing.assert_close(expected["divergence"], torch.tensor(by_rows, dtype=torch.float64), rtol=1e-12, atol=0)
    for name, values in expected.items():
        torch.testing.assert_close(out[name].double(), values, **CLOSE)
    assert out["divergence"].dtype == torch.float32 and not out["teacher_logprobs"].requires_grad
    for names in [["divergence"], ["logprobs"], ["divergence", "logprobs", "entropy"]]:
        factors = torch.linspace(0.5, 2, len(labels))
        got = torch.autograd.grad(sum((out[n] * factors).sum() for n in names), student, retain_graph=True)
        wanted = sum((expected[n] * factors.double()).sum() for n in names)
        for a, b in zip(got, torch.autograd.grad(wanted, exact, retain_graph=True)):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()  # fp32 against float64
        out = ours(student, teacher, labels, beta, transform=transforms[0], teacher_transform=transforms[1])


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_its_teacher(beta):
    """Nothing to learn: 0, and no gradient beyond the rounding of fp32."""
    student, _, labels = inputs()
    student = [x.requires_grad_() for x in student]
    out = ours(student, [x.detach() for x in student], labels, beta)
    assert out["divergence"].abs().max() < 1e-6
    assert all(g.abs().max() < 1e-5 for g in torch.autograd.grad(out["divergence"].sum(), student))


def test_the_ends_are_the_two_kls():
    """And not their mixture's limits, which are 0: at 0.99 the divergence is about a hundredth of the KL."""
    student, teacher, labels = inputs()
    student[1], teacher[1] = student[1] / 4, teacher[1] / 4
    p, q = logits(student).softmax(-1).tolist(), logits(teacher).softmax(-1).tolist()
    forward, reverse = ([kl(a, b) for a, b in zip(*pair)] for pair in ((q, p), (p, q)))
    for beta, wanted in ((0.0, forward), (1.0, reverse)):
        torch.testing.assert_close(ours(student, teacher, labels, beta)["divergence"], torch.tensor(wanted), **CLOSE)
    near = ours(student, teacher, labels, 0.99)["divergence"] / 0.01
    torch.testing.assert_close(near, torch.tensor(reverse), rtol=0.2, atol=0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.01, 0.99))
def test_the_mixture_is_symmetric_and_bounded(seed, beta):
    """JSD_beta of p from q is JSD_(1 - beta) of q from p, from 0 to the entropy of (beta, 1 - beta)."""
    student, teacher, labels = inputs(seed=seed)
    one, other = ours(student, teacher, labels, beta), ours(teacher, student, labels, 1 - beta)
    torch.testing.assert_close(one["divergence"], other["divergence"], rtol=1e-4, atol=1e-6)
    most = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert one["divergence"].min() > -1e-6 and one["divergence"].max() < most + 1e-6


@pytest.mark.parametrize("k", (1, 4, 28, 29))
@pytest.mark.parametrize("beta", BETAS)
def test_top_k_counts_the_others_as_one(beta, k):
    """k = V is the whole divergence. Gradients by central differences of the definition, a logit at a time."""
    student, teacher, labels = inputs(rows=3, widths=(29, 7), bias=False)
    student[1] = torch.eye(29).requires_grad_()  # its hidden states are the logits
    student[0].requires_grad_()
    out = ours(student, teacher, labels, beta, top_k=k)["divergence"]
    (got,) = torch.autograd.grad(out.sum(), student[0])
    q = logits(teacher).softmax(-1).tolist()

    def expected(z):
        return [jsd(*buckets(a, b, beta, k), beta) for a, b in zip(z.softmax(-1).tolist(), q)]

    z = student[0].detach().double()
    torch.testing.assert_close(out.double(), torch.tensor(expected(z), dtype=torch.float64), **CLOSE)
    if k == 29:
        torch.testing.assert_close(out, ours(student, teacher, labels, beta)["divergence"], rtol=1e-6, atol=1e-7)
    for v in range(0, 29, 3):
        step = torch.zeros_like(z)
        step[:, v] = 1e-5
        slope = [(a - b) / 2e-5 for a, b in zip(expected(z + step), expected(z - step))]
        torch.testing.assert_close(got[:, v].double(), torch.tensor(slope, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_chunks_change_nothing(monkeypatch):
    student, teacher, labels = inputs(rows=40)
    student = [x.requires_grad_() for x in student]
    runs = []
    for rows in (1, 7, 40, 10**6):
        monkeypatch.setitem(subject.CHUNK, "cpu", 2 * rows * 29)  # two models' logits in a chunk
        out = ours(student, teacher, labels, 0.3)
        runs.append((out, torch.autograd.grad((out["divergence"] + out["logprobs"]).sum(), student)))
    for out, gradients in runs[1:]:
        for name, values in runs[0][0].items():
            torch.testing.assert_close(out[name], values, rtol=1e-5, atol=1e-6)  # GEMMs of another height round
        for a, b in zip(gradients, runs[0][1]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)  # weight gradients add up in another order


def test_a_vocabulary_that_ranks_share():
    """Under tensor parallelism a rank has half of the columns of both heads: the same numbers and gradients."""
    student, teacher, labels = inputs(vocabulary=28)

    def compare(rank, world, beta):
        parts = [[model[0], *(x.chunk(world)[rank] for x in model[1:])] for model in (student, teacher)]
        own = [x.detach().clone().requires_grad_() for x in parts[0]]
        head = Teacher(*parts[1][1:], PLAIN, beta, hidden=teacher[0])
        group = dist.group.WORLD if world > 1 else None
        out = ScoredHead.apply(*own, labels, PLAIN, ("divergence", "entropy"), group, head)
        out = [values for values in out if values is not None]
        loss = sum((values * torch.linspace(0.5, 2, 17)).sum() for values in out if values.requires_grad)
        return [values.detach() for values in out], torch.autograd.grad(loss, own)

    for beta in BETAS:
        (values, gradients), *_ = ranks(1, compare, beta)
        halves = ranks(2, compare, beta)
        for half in halves:
            torch.testing.assert_close(half[0], values, **CLOSE)
            torch.testing.assert_close(half[1][0], gradients[0], rtol=1e-4, atol=1e-5)
        for i in (1, 2):  # weight and bias
            whole = torch.cat([half[1][i] for half in halves])
            torch.testing.assert_close(whole, gradients[i], rtol=1e-4, atol=1e-5)


# ---- TRL -------------------------------------------------------------------------------------------------------------


def trl_inputs():
    given = FIXTURE["inputs"]
    names = ("hidden", "weight", "bias")
    student = [torch.tensor(given[name]).requires_grad_() for name in names]
    return student, [torch.tensor(given[f"teacher_{name}"]) for name in names]


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: f"{case['beta']}-{case['temperature']}")
def test_trl(case):
    """DistillationTrainer's loss: per token, with the gradients of its sum. TRL computes in fp32, too."""
    assert FIXTURE["trl"] == "1.16.0"
    student, teacher = trl_inputs()
    transform = 1.0, 0.0, case["temperature"]
    labels = torch.zeros(len(student[0]), dtype=torch.long)
    out = ours(student, teacher, labels, case["beta"], transform=transform, teacher_transform=transform)
    for name in "divergence", "entropy":
        torch.testing.assert_close(out[name], torch.tensor(case[name]), **CLOSE)
    gradients = torch.autograd.grad(out["divergence"].sum(), student)
    for name, gradient in zip(("hidden", "weight", "bias"), gradients):
        torch.testing.assert_close(gradient, torch.tensor(case[f"d_{name}"]), **CLOSE)


def compare_by_logits(case, top_k):
    """TRL's functions of logits, in float64: the sum, and its gradient by logits taken to weight and bias."""
    student, teacher = trl_inputs()
    labels = torch.zeros(len(student[0]), dtype=torch.long)
    out = ours(student, teacher, labels, case["beta"], top_k=top_k)
    loss = out["divergence"].sum()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    hidden, weight, bias = torch.autograd.grad(loss, student)
    d_z = torch.tensor(case["d_logits"])
    torch.testing.assert_close(hidden, d_z @ student[1].detach(), **CLOSE)
    torch.testing.assert_close(weight, d_z.T @ student[0].detach(), **CLOSE)
    torch.testing.assert_close(bias, d_z.sum(0), **CLOSE)


@pytest.mark.parametrize("case", FIXTURE["top_k"], ids=lambda case: f"{case['top_k']}-{case['beta']}")
def test_trl_top_k(case):
    compare_by_logits(case, case["top_k"])


@pytest.mark.parametrize("case", FIXTURE["gkd"], ids=lambda case: str(case["beta"]))
def test_trl_gkd(case):
    compare_by_logits(case, 0)


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(40, 48), (48, 40), (40, 40)], ids=str)
def test_vocabularies_that_are_padded(sizes):
    """Student and teacher of other kinds and widths: softmax over the columns that both have, whatever the others say.
    A token that the teacher has not counts as the last one that it has."""
    torch.manual_seed(3)
    student, teacher = build("Llama", vocab_size=sizes[0]), build("Qwen3", vocab_size=sizes[1], hidden_size=48)
    columns, ids = min(sizes), array("i", [3, 7, 39, 12, 5])
    groups = [{"prompt": ids[:2], "completions": [{"ids": ids[2:], "scored": None}], "row": 0}]
    plain = [lm(torch.tensor([list(ids)])).logits[0, 1:-1, :columns].double() for lm in (student, teacher)]
    expected = differentiable(plain[0].softmax(-1), plain[1].softmax(-1).detach(), 0.5)
    distillation = script(NAME)
    policy, judge = Policy(student), Policy(teacher)
    head = judge.head()
    policy.teacher = Teacher(head.weight.detach()[:columns], None, judge.transform, beta=0.5)
    out = distillation.forward(policy, judge, flat_batch(groups))
    torch.testing.assert_close(out["divergence"].double(), expected, rtol=1e-4, atol=1e-5)
    weight = student.get_output_embeddings().weight
    (got,) = torch.autograd.grad(out["divergence"].sum(), weight, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.sum(), weight)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    if sizes[0] > sizes[1]:
        unknown = array("i", [3, 7, 45, 12, 5])
        known = [flat_batch([{**groups[0], "completions": [{"ids": x[2:], "scored": None}]}]) for x in (ids, unknown)]
        states = [distillation.teacher_states(judge, batch) for batch in known]
        torch.testing.assert_close(*states, rtol=0, atol=0)
        assert distillation.forward(policy, judge, known[1])["divergence"].isfinite().all()


def test_hidden_states_alone():
    """What attaches to them is another head's: no log-probs, no copy of the vocabulary."""
    policy = Policy(build("Llama"))
    batch = flat_batch([{"prompt": array("i", [3, 7]), "completions": [{"ids": array("i", [5, 6]), "scored": None}]}])
    out = policy(batch, ["hidden"])
    assert list(out) == ["hidden"] and out["hidden"].shape == (2, policy.lm.config.hidden_size)
    with pytest.raises(ValueError, match="must be some of"):
        policy(batch, ["hiden"])


# ---- runs ------------------------------------------------------------------------------------------------------------

OFFLINE = ["--lmbda", 0, "--eval_every", 0, "--save_every", 0]


def expected_norm(rows, beta, temperature):
    """The norm of the gradient of the mean over all completion tokens, by transformers alone, a row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    load = AutoModelForCausalLM.from_pretrained
    student, teacher = (load(TINY / name, dtype=torch.float64) for name in ("model", "teacher"))
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        z = [lm(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1] / temperature for lm in (student, teacher)]
        total = total + differentiable(z[0].softmax(-1), z[1].softmax(-1).detach(), beta).sum()
        count += len(ids) - len(prompt)
    (total / count).backward()
    return (total / count).item(), math.sqrt(sum(p.grad.square().sum().item() for p in student.parameters()))


@pytest.mark.parametrize("beta, temperature, world", [(0.0, 1.0, 2), (0.5, 0.8, 1), (1.0, 1.0, 1)])
def test_a_step_on_the_data(beta, temperature, world, tmp_path):
    """Loss and gradient of a whole step, cut into micro-batches and over ranks: transformers' in float64."""
    data = tiny_rows(NAME, tmp_path / "rows.jsonl", 5)
    flags = ["--dataset", data, "--batch_size", 5, "--max_steps", 1, "--beta", beta, "--temperature", temperature]
    train(NAME, tmp_path / "run", *flags, *OFFLINE, "--tokens_per_microbatch", 100, world=world)
    (line,) = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in line]
    loss, norm = expected_norm([json.loads(row) for row in open(data)], beta, temperature)
    assert line["loss"] == pytest.approx(loss, rel=1e-5) and line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert line["on_policy"] == 0


def test_lmbda_is_the_share_of_steps_on_policy():
    distillation = script(NAME)
    found = []
    for share in (0.0, 0.3, 1.0):
        args = distillation.Args(teacher="x", lmbda=share)
        found.append(sum(distillation.on_policy(step, args) for step in range(2000)) / 2000)
    assert found[0] == 0 and found[2] == 1 and abs(found[1] - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / 2000)


def test_samples_are_the_students(tmp_path):
    """On-policy at beta 1 on rows without answers: the accuracy is null, and the divergence falls."""
    data = write_rows(tmp_path, *[{"prompt": json.loads(line)["prompt"]} for line in open(TINY / "prompts.jsonl")][:40])
    flags = ["--dataset", data, "--eval_dataset", f"{data}[32:]", "--max_steps", 8, "--batch_size", 8, "--lmbda", 1]
    flags += ["--beta", 1, "--learning_rate", 1e-4, "--eval_every", 0, "--save_every", 0, "--top_k", 3, "--top_p", 0.9]
    train(NAME, tmp_path / "run", *flags, "--eval_rows", 8)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["eval/accuracy"] is None and lines[-1]["eval/divergence"] < 0.5 * lines[0]["eval/divergence"]
    assert all(line["on_policy"] == 1 and line["sampler_gap"] < 1e-5 for line in lines[1:-1])


# ---- bad input -------------------------------------------------------------------------------------------------------


def teacher_folder(folder, *, config=None, tokenizer=None, generation=None, vocab_size=103):
    """A teacher of random weights beside the tiny model, with changes to its JSON files."""
    lm = build("Llama", vocab_size=vocab_size, max_position_embeddings=512)
    lm.save_pretrained(folder)
    for name in "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json":
        shutil.copy(TINY / "model" / name, folder)
    for name, change in {"config": config, "tokenizer": tokenizer, "generation_config": generation}.items():
        if change:
            path = folder / f"{name}.json"
            known = json.loads(path.read_text())
            change(known)
            path.write_text(json.dumps(known))
    return folder


def swap_two(known):
    vocabulary = known["model"]["vocab"]
    vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]


@pytest.mark.parametrize("flags, needles", [
    (["--teacher", ""], ["--teacher"]), (["--teacher", "/no/such/folder"], ["--teacher /no/such/folder"]),
    (["--beta", 1.5], ["--beta 1.5", "from 0 to 1"]), (["--lmbda", 2], ["--lmbda 2", "from 0 to 1"]),
    (["--top_p", 0], ["--top_p"]), (["--loss_top_k", 104], ["--loss_top_k 104", "103"]),
    (["--loss_top_k", 3, "--tp_size", 2], ["--loss_top_k 3", "--tp_size 1"]),
], ids=lambda x: "_".join(map(str, x)).strip("-").replace("/", ".") if len(x) > 1 else None)  # fmt: skip
def test_flags_that_are_refused(flags, needles, tmp_path):
    refused(attempt(NAME, tmp_path, *flags), tmp_path, *needles)


def test_a_teacher_with_another_tokenizer(tmp_path):
    folder = teacher_folder(tmp_path / "teacher", tokenizer=swap_two)
    result = attempt(NAME, tmp_path, "--teacher", folder)
    refused(result, tmp_path, f"--teacher {folder}", "2 of 103 tokens have another id", "gold.py")


def test_a_teacher_with_more_tokens_is_welcome_and_one_with_fewer_is_not(tmp_path):
    """Its embedding padded to 128; or, where the student knows a token more, no answer to what that means."""
    larger = teacher_folder(tmp_path / "larger", vocab_size=128)
    result = attempt(NAME, tmp_path, "--teacher", larger, "--allow", "GRPO002")
    assert result.code == 0 and "have [103, 128] columns of the vocabulary, 103 are compared" in result.out, result.err

    def drop_one(known):
        known["model"]["vocab"].pop("~")

    smaller = teacher_folder(tmp_path / "smaller", tokenizer=drop_one)
    second = tmp_path / "second"
    refused(attempt(NAME, second, "--teacher", smaller), second, f"--teacher {smaller}", "1 of 103 tokens", "'~'")


def test_a_teacher_that_does_not_fit(tmp_path):
    """In bytes, before a weight is read: half a million weights and a head in float32."""

    def patch(module):
        load_teacher = module.load_teacher

        def with_little_room(*args):
            model.free_bytes = lambda: 1e6
            return load_teacher(*args)

        module.load_teacher = with_little_room

    result = attempt(NAME, tmp_path, patch=patch)
    refused(result, tmp_path, "--teacher tiny: its share of the weights and its whole head take 0.0 GB on every rank")


@pytest.mark.parametrize("stop, code", [(2, 0), (7, 3)])
def test_a_teacher_that_stops_otherwise(stop, code, tmp_path):
    """TEACH001: by another token only, it ends the run before step 1."""

    def change(known):
        known["eos_token_id"] = stop

    folder = teacher_folder(tmp_path / "teacher", generation=change)
    if stop == 7:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "7"}))
        (folder / "chat_template.jinja").unlink()
    result = attempt(NAME, tmp_path, "--teacher", folder, "--allow", "GRPO002")
    assert result.code == code, result.err
    assert ("TEACH001" in result.err) is (code == 3)
    if code:
        result = attempt(NAME, tmp_path / "second", "--teacher", folder, "--allow", "GRPO002", "TEACH001")
        assert result.code == 0, result.err


ON_POLICY = ["--lmbda", 1, "--beta", 1]  # of distillation.py; iw_opd.py knows nothing else


@pytest.mark.parametrize("name, more, certainty, collapsed", [
    (NAME, ON_POLICY, 100, True), (NAME, ON_POLICY, 5, False), ("experimental/iw_opd", [], 100, True)])
def test_a_student_that_has_one_thing_to_say(name, more, certainty, collapsed, tmp_path):
    """TEACH003: it writes line breaks whatever stands before them, and the teacher would not. In the third step it is
    said. A student that likes them, but may write anything, has only much to learn."""
    lm = AutoModelForCausalLM.from_pretrained(TINY / "model", tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    weights = lm.state_dict()
    for key, weight in weights.items():
        if "o_proj" in key or "down_proj" in key or "lm_head" in key:
            weight.zero_()
    weights["model.embed_tokens.weight"].fill_(1.0)  # all hidden states are now alike: the last norm's weight
    hidden = weights["model.norm.weight"]
    weights["lm_head.weight"][tokenizer.encode("\n")[-1]] = certainty * hidden / hidden.square().sum()
    lm.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    flags = ["--model", tmp_path / "student", *more, "--learning_rate", "1e-6", "--max_steps", 3]
    result = attempt(name, tmp_path, *flags, "--allow", "GRPO002")  # line breaks end no completion
    assert result.code == 0, result.err
    said = [alert["step"] for alert in read_jsonl(tmp_path / "out" / "alerts.jsonl") if alert["code"] == "TEACH003"]
    assert said == ([3] if collapsed else [])


@pytest.mark.parametrize("entropies, said", [([0, 0, 0], True), ([0, 0, 1, 0, 0], False), ([1, 1, 1], False)])
def test_a_collapse_lasts_three_rollouts(entropies, said):
    """TEACH003 counts rollouts in a row. On rank 1, where alerts are counted and nothing is written."""
    distillation = script(NAME)
    run = lone_run(distillation.Args())
    run.rank, run.dtype, run.checkpoint, run.state = 1, torch.float32, None, {"alerts": {}}
    for step, entropy in enumerate(entropies):
        metrics = {"loss": 2.0, "entropy": entropy, "truncated_frac": 0.0, "sampler_gap": 0.0}
        distillation.check_rollout(run, step, metrics)
    assert list(run.state["alerts"]) == (["TEACH003"] if said else [])


def test_rows_without_completions(tmp_path):
    """With --lmbda below 1 the data's completions are needed; without, they are not read."""
    data = write_rows(tmp_path, {"prompt": "3+4="}, {"prompt": "4+4="})
    refused(attempt(NAME, tmp_path, "--dataset", data), tmp_path, "--lmbda below 1 needs", "mine.jsonl:1")
    result = attempt(NAME, tmp_path / "second", "--dataset", data, "--lmbda", 1, "--allow", "DATA007", "GRPO002")
    assert result.code == 0, result.err


def test_tensor_parallelism_wants_equal_vocabularies(tmp_path):
    larger = teacher_folder(tmp_path / "larger", vocab_size=128)
    distillation = script(NAME)
    args = distillation.parse_args(["--teacher", str(larger), "--tp_size", "2"])
    tokenizer, lm = distillation.load_model(AutoModelForCausalLM, args)
    found = distillation.load_model(AutoModelForCausalLM, args, flag="teacher")
    run = type("Run", (), {"args": args})
    with pytest.raises(distillation.InputError, match=r"--tp_size 2: student and teacher have \[103, 128\]"):
        distillation.check_teacher(run, tokenizer, [2], lm, *found)


def test_the_tiny_teacher_adds():
    """In bfloat16, as benchmarks/make_tiny.py --only teacher made it: of twenty held-out questions it knows all."""
    assert transformers.AutoConfig.from_pretrained(TINY / "teacher").dtype == torch.bfloat16
    lm = AutoModelForCausalLM.from_pretrained(TINY / "teacher", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "teacher")
    for line in (TINY / "test.jsonl").read_text().splitlines()[:20]:
        row = json.loads(line)
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt",
                                            return_dict=False)  # fmt: skip
        text = tokenizer.decode(lm.generate(ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :])
        assert text == row["completion"][0]["content"] + tokenizer.eos_token
