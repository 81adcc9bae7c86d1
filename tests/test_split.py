"""How a step is cut, into micro-batches and over ranks, must not change what is computed.

Equal means, over 10 steps at a constant learning rate at which a headline number moves by more than 5 %:
    grad_norm       1e-5 relative
    every metric    1e-5 relative, plus the absolute floors below where a number is a difference that cancels
    weights         0.02 x learning rate per element, in fp32
    completions     the same ids, where there are any
Experimental scripts are compared over the 3 steps of test_smoke; here only those that compute in float64, and all with
--slow, over 10 steps.
Measured: 6e-6, 2e-6 and 0.003 x learning rate. A factor 2 anywhere moves grad_norm by 2 and Adam by whole steps.
Three scripts compute in float64 here, where numbers are 1e-13 apart, see IN_FLOAT64.
Five rows a step on 1, 2 and 4 ranks and three held-out rows: nothing divides evenly, and ranks run out of work.
"""
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import FAST, ROOT, SCRIPTS, STABLE, newest, once, read_jsonl, script, tiny_flags, tiny_rows, train
from conftest import trainer_tensors
from transformers import AutoModelForCausalLM

from common.sampling import uniforms
from common.tokenization import load_tokenizer

STEPS, FEWER, BATCH, ROWS, HELDOUT = 10, 3, 5, 15, 3  # FEWER: of what computes in float64, which is slow
BIG = 4096  # tokens: the whole step in one micro-batch
RELATIVE, PER_LR = 1e-5, 0.02

# A log-prob of some -10 in fp32 is known to 10 x 2^-24 = 6e-7, and many metrics are differences of two (sampler_gap,
# kl, reward_margin): below 1e-6 they are rounding. Losses are means of many such and 1e-7 is one bit of a term near 1:
# grpo's advantages cancel within a group. The gradient norm is a sum of squares: nothing cancels, no floor.
FLOOR = {"grad_norm": 0.0, "loss": 1e-7, "eval/loss": 1e-7}
DEFAULT_FLOOR = 1e-6
# kto, at --beta 1: differences of log-probs that sum to as much as -150 (kl is about completions that do not answer
# their prompts), each known to 1e-5. rloo: a ratio is e to the sum of some 30 differences of log-probs, each known to
# 6e-7: 2e-5, over the root of 20 sequences in a step 4e-6. Gradient norm and weights are held to what the others are.
COARSE = ["kl", "reward_chosen", "reward_rejected", "reward_margin"]
FLOORS = {"kto": FLOOR | {stage + key: 1e-5 for stage in ("", "eval/") for key in COARSE},
          "rloo": FLOOR | {"loss": 4e-6}}  # fmt: skip
# What a model samples has a gradient that nearly cancels (ssd), and where a teacher is sure of other words it is a
# hundred times larger than elsewhere (sdft, opsd): in fp32 their gradient norms round to 1e-5 to 3e-5 of themselves.
# In float64 everything is equal to 7e-14, or to 4e-16 where it is a difference that cancels.
IN_FLOAT64 = ["experimental/ssd", "experimental/sdft", "experimental/opsd"]
RELATIVE_FLOAT64, FLOOR_FLOAT64 = 1e-11, 1e-13
NOISE = {("reward_acc", 1), ("eval/reward_acc", 0)}  # policy = reference: the sign of a rounding error


def in_float64():
    """From here on this process, a forked rank, computes in float64 what it would compute in fp32."""
    torch.float32 = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)


def run(name, tmp_path, world, budget, steps, more=(), patch=None):
    out = tmp_path / f"{world}x{budget}{'-patched' if patch else ''}"

    def prepare(module):
        if name in IN_FLOAT64:
            in_float64()
        if patch:
            patch(module)

    test = (ROOT / "common" / "tiny" / "test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "heldout.jsonl").write_text("".join(test[:HELDOUT]))
    flags = ["--dataset", tiny_rows(name, tmp_path / "rows.jsonl", ROWS), "--eval_dataset", tmp_path / "heldout.jsonl"]
    flags += ["--batch_size", BATCH, "--max_steps", steps, "--eval_every", 0, "--save_every", 0]
    train(name, out, *flags, *more, "--tokens_per_microbatch", budget, world=world, patch=prepare)
    return out


def metric_differences(a, b, floor=DEFAULT_FLOOR, name=None, float64=False):
    """Lines of two metrics.jsonl (of the script `name`, computed in float64) -> what differs, in words."""
    relative, floors = RELATIVE, FLOORS.get(name, FLOOR)
    if float64:
        relative, floors, floor = RELATIVE_FLOAT64, {}, FLOOR_FLOAT64
    out = [] if [x["step"] for x in a] == [x["step"] for x in b] else ["other steps"]
    for x, y in zip(a, b):
        out += [] if x.keys() == y.keys() else [f"step {x['step']}: other keys {x.keys() ^ y.keys()}"]
        for key in x.keys() & y.keys():
            if (key, x["step"]) in NOISE:
                continue
            if not math.isclose(x[key], y[key], rel_tol=relative, abs_tol=floors.get(key, floor)):
                out.append(f"step {x['step']}: {key} {x[key]!r} {y[key]!r}")
    return out


def weight_differences(a, b, lr, strays=0.0):
    """Two checkpoints -> their worst weight, when it is further apart than PER_LR learning rates. strays: the share of
    all weights that may be, up to 0.2 of one."""
    a, b = trainer_tensors(a), trainer_tensors(b)
    assert a.keys() == b.keys()
    gaps = {k: (v - b[k]).abs().flatten() / lr for k, v in a.items() if k.startswith("model.")}
    assert all(a[k].dtype in (torch.float32, torch.float64) for k in gaps) and len(gaps) > 10
    worst = max(gaps, key=lambda k: gaps[k].max())
    apart, every = gaps[worst].max().item(), torch.cat(list(gaps.values()))
    share = (every > PER_LR).double().mean().item()
    return [f"{worst}: {apart:.4f} learning rates apart"] if share > strays or apart > 0.2 else []


def differences(name, a, b, more=()):
    """The folders of two runs with the same flags `more` -> what differs, in words."""
    lines, others = (read_jsonl(folder / "metrics.jsonl") for folder in (a, b))
    wrong = metric_differences(lines, others, name=name, float64=name in IN_FLOAT64)
    lr = script(name).parse_args(tiny_flags(name)).learning_rate
    wrong += weight_differences(newest(a), newest(b), lr)
    wrong += sample_differences(name, a, b, more) if (a / "samples.jsonl").is_file() else []
    return wrong


def sample_differences(name, a, b, more):
    """Two runs -> the first completion that differs, with the distance of its first other token from the edge of the
    token's interval: what rounding moved over an edge is a hair away from it, what is wrong is anywhere."""
    flags = script(name).parse_args([*tiny_flags(name), *map(str, more)])
    rows, others = (read_jsonl(folder / "samples.jsonl") for folder in (a, b))
    if len(rows) != len(others):
        return [f"{len(rows)} samples, {len(others)} samples"]
    for i, (x, y) in enumerate(zip(rows, others)):
        if x["completion"] == y["completion"]:
            continue
        again = a.with_name(a.name + "-again")  # the weights that sampled it: the same run up to its step
        if x["step"] > 1:
            run(name, a.parent, 1, BIG, x["step"] - 1, more).rename(again)
        source = newest(again) if x["step"] > 1 else ROOT / "common" / "tiny" / "model"
        lm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = load_tokenizer(str(source))
        texts = x["prompt"], x["completion"], y["completion"]
        prompt, *ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        at = next(t for t, (p, q) in enumerate(zip(*ids)) if p != q)
        logits = lm(torch.tensor([prompt + ids[0][:at]])).logits[0, -1] / flags.temperature
        cdf = logits.double().softmax(-1).cumsum(-1)
        index = (x["step"] - 1) // (flags.steps_per_generation * flags.num_iterations)
        size = flags.batch_size * flags.steps_per_generation  # a rollout's prompts
        place = ("train", index, i // flags.num_generations % size, i % flags.num_generations)
        noise = uniforms(place, flags.seed, at + 1)[at]
        edge = (cdf / cdf[-1] - noise).abs().min().item()
        return [f"sample {i}, token {at}: {ids[0][at]} or {ids[1][at]}, {edge:.1e} from the edge of its interval"]
    return []


@pytest.fixture(scope="module")
def steps_of(request):
    """name -> how many steps are compared."""
    slow = request.config.getoption("--slow")
    return lambda name: FEWER if name in IN_FLOAT64 and not slow else STEPS


@pytest.fixture(scope="module")
def references(tmp_path_factory, steps_of):
    """name -> the run on one rank with one micro-batch per step, made once."""
    made = {}

    def reference(name):
        if name not in made:
            made[name] = run(name, tmp_path_factory.mktemp(name.replace("/", "_")), 1, BIG, steps_of(name))
        return made[name]

    return reference


@pytest.mark.parametrize("name", SCRIPTS)
def test_fast_flags(name):
    """Every script is in conftest's table: a new one without coverage fails here."""
    assert script(name).parse_args(tiny_flags(name)).learning_rate > 0


@pytest.mark.parametrize("name", once(*STABLE))
def test_learning_rate_moves(name, references):
    """The comparison sees training, not three digits of noise: from the first pass over the rows to the last a headline
    number moves by more than 5 %. Three steps are a pass, so both means are over the same rows."""
    lines = [x for x in read_jsonl(references(name) / "metrics.jsonl") if "grad_norm" in x]
    assert len(lines) == STEPS and ROWS == 3 * BATCH
    moved = {}
    for key in ("reward", "entropy") if "reward" in lines[0] else ("loss",):  # online, the loss is about 0
        first, last = (sum(x[key] for x in part) / 3 for part in (lines[:3], lines[6:9]))
        moved[key] = abs(last - first) / abs(first)
    assert max(moved.values()) > 0.05, moved


CUTS = [(1, True), (2, False), (4, True), (2, True)]  # ranks, and whether every row is a micro-batch


def cuts():
    """One cut of a script; all of sft, and two of grpo, since how a step is cut is shared."""
    for name in SCRIPTS:
        for world, small in CUTS:
            usual = name == "sft" or (world, small) == CUTS[-1] or (name, world) == ("grpo", 1)
            in_smoke = name not in STABLE + IN_FLOAT64  # test_smoke cuts its three steps
            marks = [] if usual and not in_smoke else [pytest.mark.slow]
            yield pytest.param(name, world, small, marks=marks)


@pytest.mark.parametrize("name, world, small", list(cuts()))
def test_split(name, world, small, references, tmp_path, steps_of):
    reference = references(name)
    out = run(name, tmp_path, world, FAST[name]["micro"] if small else BIG, steps_of(name))
    lines = read_jsonl(reference / "metrics.jsonl")
    assert sum("grad_norm" in x for x in lines) == steps_of(name)
    assert len(lines) - steps_of(name) == 2  # an evaluation before and one after
    wrong = differences(name, reference, out)
    assert not wrong, "\n".join(wrong[:20])


def local_denominators(module):
    """Counts are summed over this rank only: the denominators of two ranks become half of what they are."""
    whole = dist.all_reduce

    def all_reduce(tensor, op=dist.ReduceOp.SUM, **kwargs):
        return None if op == dist.ReduceOp.SUM and tensor.ndim == 1 else whole(tensor, op=op, **kwargs)

    dist.all_reduce = all_reduce


def grow_on_one_rank(module, growth):
    """The loss of rank 1's micro-batches counts 1 + growth times."""
    name = f"{Path(module.__file__).stem}_loss"
    loss = getattr(module, name)

    def grown(*args):
        value, factor = loss(*args), 1 + growth * dist.get_rank()
        return (value[0] * factor, *value[1:]) if isinstance(value, tuple) else value * factor

    setattr(module, name, grown)


def double_on_one_rank(module):
    grow_on_one_rank(module, 1)


def plants():
    """A wrong denominator in all kinds of scripts, and a wrong loss in one."""
    for name in SCRIPTS:
        for plant in local_denominators, double_on_one_rank:
            usual = name == "sft" or (name in ("dpo", "grpo") and plant == local_denominators)
            yield pytest.param(name, plant, marks=[] if usual else pytest.mark.slow, id=f"{name}-{plant.__name__}")


@pytest.mark.parametrize("name, plant", list(plants()))
def test_planted_factor_is_seen(name, plant, references, tmp_path):
    """The comparison bites: with a factor 2 in a denominator the very first gradient norm differs."""
    out = run(name, tmp_path, 2, BIG, steps=2, patch=plant)
    lines = [[x for x in read_jsonl(o / "metrics.jsonl") if "grad_norm" in x][:2] for o in (references(name), out)]
    assert any(text.startswith("step 1: grad_norm") for text in metric_differences(*lines))


@pytest.mark.parametrize("name", [IN_FLOAT64[0], *(pytest.param(n, marks=pytest.mark.slow) for n in IN_FLOAT64[1:])])
def test_a_factor_of_1_0005_is_seen(name, references, tmp_path):
    """What rounds more than others is not held to less: a small factor in one rank's loss is seen."""
    out = run(name, tmp_path, 2, BIG, steps=1, patch=lambda module: grow_on_one_rank(module, 0.0005))
    lines = [[x for x in read_jsonl(o / "metrics.jsonl") if "grad_norm" in x][:1] for o in (references(name), out)]
    assert any(text.startswith("step 1: grad_norm") for text in metric_differences(*lines, float64=True))
