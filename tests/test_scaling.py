"""What does not grow, told without a clock: memory of the head with tokens x vocabulary, computed tokens with the
spread of lengths and the size of groups. How long a start may take, and that benchmarks/scaling.py does as it says."""
import json
import os
import random
import runpy
import sys
from array import array

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, once
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from common import logprobs
from common.batches import flat_batch, pack

sys.path.insert(0, str(ROOT / "benchmarks"))
import scaling

# ---- memory of the head ----------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """peak: bytes of the storages that operations made and somebody still holds, at the worst moment. A number that
    stands alone is not counted: there are thousands, and adding them up again and again takes longer than all else."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            new = isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in known
            if new and x.untyped_storage().nbytes() > 8:
                self.alive[x.untyped_storage()] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def head_peak(tokens, vocabulary, width=8, plain=False, want=()):
    """Peak bytes of a forward and backward, beyond weights, hidden states and labels."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(vocabulary, width, requires_grad=True), torch.randn(tokens, width, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,))
    with Alive() as alive:
        if plain:
            loss = F.cross_entropy(hidden @ weight.T, labels)
        else:
            out = logprobs.ScoredHead.apply(hidden, weight, None, labels, (1.0, 0.0, 1.0), want)
            loss = sum(x.sum() for x in out if x is not None and x.requires_grad)
        loss.backward()
    return alive.peak


CHUNK = 2**16  # logits: 256 KiB in fp32; the head's own limit is 64 MiB on a CPU


@pytest.mark.parametrize("want", [(), ("mean_logprob", "sum_p2", "entropy", "correct")])
def test_memory_of_the_head_does_not_grow_with_tokens_times_vocabulary(want, monkeypatch):
    """Bound, in fp32: gradients of weight and hidden states, a few numbers a token, and as many chunks as one line of
    the head can hold at once: logits, probabilities and a temporary of the old and of the new chunk. Tokens x
    vocabulary is 8 to 128 chunks."""
    monkeypatch.setitem(logprobs.CHUNK, "cpu", CHUNK)
    chunks = 6 if want else 4
    for tokens, vocabulary in (256, 2048), (1024, 2048), (4096, 2048), (1024, 512), (1024, 8192):
        assert tokens * vocabulary >= 8 * CHUNK
        bound = 4 * (8 * vocabulary + 8 * tokens + 40 * tokens) + chunks * 4 * CHUNK
        peak = head_peak(tokens, vocabulary, want=want)
        assert peak <= bound, f"{tokens} x {vocabulary}: {peak} bytes, at most {bound} expected"


def test_memory_of_plain_logits_does_grow():
    """The control: what is counted sees (tokens, vocabulary) logits, and their gradient."""
    for tokens, vocabulary in (256, 2048), (1024, 2048), (1024, 8192):
        logits = 4 * tokens * vocabulary
        assert 2 * logits <= head_peak(tokens, vocabulary, plain=True) <= 4 * logits


# ---- computed tokens -------------------------------------------------------------------------------------------------


def group_of(prompt, *completions):
    ids = [array("i", range(n)) for n in (prompt, *completions)]
    return {"prompt": ids[0], "completions": [{"ids": x, "scored": None} for x in ids[1:]], "row": 0}


def computed(groups, budget):
    """Tokens that go through the model in a step, and the largest micro-batch."""
    sizes = [len(flat_batch(members)["input_ids"]) for members in pack(groups, budget)]
    return sum(sizes), max(sizes)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0, 1.5])
def test_computed_tokens_do_not_grow_with_the_spread_of_lengths(sigma):
    """Every token of a row is computed once; padded to the longest of eight, up to several times."""
    draw = random.Random(0)
    rows = [min(1000, max(2, round(100 * draw.lognormvariate(0, sigma)))) for _ in range(200)]
    padded = sum(len(rows[i : i + 8]) * max(rows[i : i + 8]) for i in range(0, 200, 8)) / sum(rows)
    assert computed([group_of(1, n - 1) for n in rows], 1000)[0] == sum(rows)
    assert (padded == 1) == (sigma == 0) and (padded > 2) == (sigma >= 1)  # else the rows would show nothing


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_computed_tokens_fall_with_the_size_of_groups(size):
    """A prompt of 40 and 16 completions of 10 for each of three questions, asked in groups of `size`: 16 / size prompts
    each, where repeating them would compute 16."""
    groups = [group_of(40, *[10] * size) for _ in range(3 * 16 // size)]
    tokens, largest = computed(groups, 200)
    assert tokens == 3 * (16 * 10 + 16 // size * 40) and largest <= 200


def test_a_group_beyond_the_budget_repeats_its_prompt_once_a_micro_batch():
    """40 + 16 x 10 tokens at a budget of 100: six completions fit beside the prompt, so three micro-batches."""
    assert computed([group_of(40, *[10] * 16)], 100) == (3 * 40 + 160, 100)


# ---- start-up --------------------------------------------------------------------------------------------------------


# In CPU seconds of one thread: where a core is free as many pass on the clock, and other tests on it change little.


@pytest.mark.parametrize("what", ["--help", "flag error"])
@pytest.mark.parametrize("name", once("sft", "grpo"))
def test_flags_are_answered_within_a_second(name, what):
    """The best of three fresh processes."""
    assert min(scaling.startup(name, what, threads=1)[1] for _ in range(3)) < scaling.LIMITS[what]


@pytest.mark.parametrize("name", once("grpo"))
def test_first_step_of_the_tiny_lab(name):
    """As it stands, no flags: rows, evaluation before the first step and (dpo) all reference log-probs included."""
    assert scaling.startup(name, "first step", threads=1)[1] < scaling.LIMITS["first step"]


# ---- the benchmark itself --------------------------------------------------------------------------------------------


def test_flops_are_those_that_torch_counts():
    """Of the model's own forward and backward. Its eager attention computes the masked half, too: n x n pairs."""
    lm, n = scaling.make_model({"hidden": 64, "layers": 2, "vocabulary": 512}), 48
    lm.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        lm(torch.arange(n)[None]).logits.sum().backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    linear, attention = counts.pop("aten.mm"), counts.pop("aten.bmm")
    assert not counts and attention == 12 * n * n * 128  # 2 layers of 64
    assert scaling.flops(lm, [group_of(0, n)]) == linear + 12 * 128 * sum(range(1, n + 1))


def test_flops_of_a_group_compute_the_prompt_once():
    """By hand: tokens of the prompt see 1 to 5 tokens, those of the completions 6 to 8 and 6 to 7."""
    lm = scaling.make_model({"hidden": 64, "layers": 2, "vocabulary": 512})
    layer = 4 * 64 * 64 - 2 * 64 * 32 + 3 * 64 * 192  # one of two heads has keys and values
    pairs = sum([1, 2, 3, 4, 5, 6, 7, 8, 6, 7])
    assert scaling.flops(lm, [group_of(5, 3, 2)]) == 6 * (10 * 2 * layer + 5 * 64 * 512) + 12 * 128 * pairs


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_benchmark_runs_and_replaces_whole_parts_only(tmp_path, monkeypatch, capsys):
    """The smallest run, its picture and its table; then one in which a process dies: its part keeps its old rows."""
    out, flags = tmp_path / "scaling.jsonl", ["--tiny", "--rounds", "1", "--threads", "1"]
    flags += ["--out", str(out), "--only", "length", "vocabulary", "--repeats"]
    monkeypatch.setattr(scaling, "matmul_rate", lambda: 1e10)  # twice a point, and the heap of the tests once:
    monkeypatch.setattr(scaling.gc, "collect", lambda: 0)  # most of the time here
    assert scaling.main([*flags, "1"]) == 0
    first = rows_of(out)
    assert [row["part"] for row in first] == ["length"] * 5 + ["vocabulary"] * 16
    assert all(row["computed_tokens"] == row["useful_tokens"] == 512 for row in first[:5])
    assert all(len(row["seconds"]) == 1 and row["flops"] > 0 and row["command"] and row["sha256"] for row in first)

    plots = runpy.run_path(str(ROOT / "benchmarks" / "plots.py"))
    monkeypatch.setitem(plots["part_scaling"].__globals__, "RESULTS", tmp_path)
    page = plots["part_scaling"]()
    assert page.count("### ") == 2 and page.count("\n| ") == 2 * 2 + 5 + 16
    for part in "length", "vocabulary":
        path = tmp_path / f"scaling_{part}.png"
        plots["draw"](path)
        assert plots["digest"](plots["scaling_panels"](part)).encode() in path.read_bytes()

    work = scaling.trunk
    monkeypatch.setattr(scaling, "trunk", lambda point: os.kill(os.getpid(), 9) or work(point))
    assert scaling.main([*flags, "2"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: length, length 16") and "-9" in error
    second = rows_of(out)
    assert second[:5] == first[:5] and [len(row["seconds"]) for row in second] == [1] * 5 + [2] * 16
    assert os.listdir(tmp_path).count("scaling.tmp") == 0
