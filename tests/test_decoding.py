"""common/decoding.py and common/sampling.py, against oracles that share no code: every row's logits from one forward of
its whole sequence in the model's own attention, tokens from one running sum in float64."""
import copy
import math
from array import array
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.distributed as dist
from conftest import ranks
from test_logprobs import FLAT, PADDED, V, build
from transformers import TopKLogitsWarper, TopPLogitsWarper

from common import decoding as subject
from common import sampling
from common.sampling import draw, from_tensors, gather_groups, generate, set_completions, to_tensors, truncated

LENGTHS = [6, 3, 9, 6, 1]  # of the prompts: two form a cohort; longer than the sliding window (4), and shorter


def prompts_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [array("i", torch.randint(3, V, (n,), generator=generator).tolist()) for n in lengths]


@torch.no_grad()
@pytest.mark.parametrize("name", [*FLAT, *PADDED])
def test_logits_of_every_row_are_those_of_its_own_sequence(name, monkeypatch):
    monkeypatch.setattr(subject, "ROOM", 2)  # caches grow on the way
    changes = {"num_hidden_layers": 4, "sliding_window": None} if name in PADDED else {}  # a fourth of Qwen's attend
    lm, prompts, copies = build(name, **changes), prompts_of(LENGTHS), 3
    kind = subject.FlatDecoder if name in FLAT else subject.CacheDecoder
    decoding = kind(copy.deepcopy(lm), prompts, copies)
    written = {row: list(prompts[row // copies]) for row in range(len(prompts) * copies)}
    rows, generator = decoding.rows, torch.Generator().manual_seed(1)
    assert sorted(rows.tolist()) == sorted(written)
    # every way to leave: from the middle, the last of a cohort, several at once, a whole cohort, nobody
    leave = {1: {4}, 3: {0, 2, 14}, 4: {6, 7, 8}, 6: {9, 1, 10}}
    for t in range(9):
        worst = max((decoding.logits[i] - lm(torch.tensor([written[row]])).logits[0, -1]).abs().max().item()
                    for i, row in enumerate(rows.tolist()))
        # 1.1e-5 seen: fp32 sums in another order. Recurrent states (by the step here, by chunks there): 9e-4, no growth
        # with t. The logits of a wrong row are whole units away.
        assert worst < (5e-5 if name in FLAT else 5e-3), (t, worst)
        tokens = torch.randint(3, V, (len(rows),), generator=generator)
        for row, token in zip(rows.tolist(), tokens.tolist()):
            written[row].append(token)
        ended = torch.tensor([row in leave.get(t, ()) for row in rows.tolist()])
        if ended.any():
            stay = decoding.drop(ended)
            assert sorted(rows[stay].tolist()) == sorted(rows[~ended].tolist())
            rows, tokens = rows[stay], tokens[stay]
        decoding.step(tokens)
    assert len(rows) == len(written) - 10


def test_caches_hold_what_lives():
    """Room for what was written and half as much again; a cohort that ended is gone."""
    with torch.no_grad():
        decoding = subject.FlatDecoder(build("Qwen3"), prompts_of([70, 40]), 2)
        for _ in range(100):
            decoding.step(torch.full((len(decoding.logits),), 5))
        for cohort in decoding.cohorts:
            assert len(cohort.cache) == 2 * 3  # keys and values of three layers
            for cache in cohort.cache.values():
                assert cohort.length <= cache.shape[2] <= 1.5 * cohort.length + subject.ROOM and len(cache) == 2
        decoding.drop(torch.tensor([False, True, True, True]))  # the cohort of the shorter prompt comes first
    assert [(cohort.length, cohort.count) for cohort in decoding.cohorts] == [(140, 1)]


@pytest.mark.parametrize("vocabulary", [7, 103, 512, 768, 50257])  # gcd with 256: 1, 1, 256, 256, 1
def test_draw_is_the_inverse_of_the_running_sum(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    p = (4 * torch.randn(64, vocabulary, generator=generator)).softmax(-1)
    p[::2, :: max(2, vocabulary // 3)] = 0  # tokens that nothing may draw, the first one among them
    p[:, -1] += 1e-30
    noise = torch.rand(64, generator=generator, dtype=torch.float64)
    noise[:4] = torch.tensor([1e-12, 1 - 2.0**-53, 0.5, 1e-300], dtype=torch.float64)
    sums = numpy.cumsum(p.double().numpy(), axis=1)
    wanted = [int((row < u * row[-1]).sum()) for row, u in zip(sums, noise.tolist())]
    drawn = draw(p, noise)
    assert (p.gather(1, drawn[:, None]) > 0).all()
    edges = numpy.abs(sums - noise[:, None].numpy() * sums[:, -1:]).min(1) < 1e-13  # where two roundings may disagree
    assert all(a == b or edge for a, b, edge in zip(drawn.tolist(), wanted, edges))
    assert sum(edges) <= 4


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.7), (8, 0.6), (1, 1.0), (0, 1e-9), (999, 0.99)])
def test_truncated_is_what_transformers_leaves(top_k, top_p):
    """By its own warpers of logits, first top_k, then top_p of what is left, but for a token at the very edge."""
    logits = 3 * torch.randn(64, 103, generator=torch.Generator().manual_seed(top_k))
    expected = logits.double()
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    p = logits.softmax(-1)
    found = truncated(p, top_k, top_p)
    assert torch.equal(found > 0, expected.softmax(-1) > 0) and (found > 0).any(-1).all()
    assert torch.equal(found[found > 0], p[found > 0])  # what is left keeps its probability: `draw` divides by the sum


@pytest.mark.parametrize("name", ["Llama", "Bloom"])
def test_truncated_draws_have_the_policys_logprobs(name):
    """Of the two likeliest tokens each time, with the log-prob that all tokens leave to them."""
    lm, prompts, stops = build(name, sliding_window=None), prompts_of(LENGTHS), [5, 11, 12, 13, 14, 40]
    args = SimpleNamespace(max_completion_length=12, temperature=0.7)
    noise = torch.rand(3 * len(prompts), 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    drawn = generate(copy.deepcopy(lm), prompts, 3, noise, stops, args, top_k=2)
    ranks = []
    for number, (ids, logprobs) in enumerate(drawn):
        prompt = prompts[number // 3]
        with torch.no_grad():
            z = lm(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
        own = z.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
        assert (own[:, 0] - logprobs).abs().max() < 1e-4
        ranks += (z.log_softmax(-1) > own).sum(-1).tolist()
    assert set(ranks) == {0, 1}


@pytest.mark.parametrize("name", ["Llama", "Bloom"])
def test_generate_stops_at_stop_tokens_and_scores_what_it_wrote(name, monkeypatch):
    """ids end with the stop token or at the limit; log-probs at the temperature; one prompt's copies side by side. Only
    a model that cannot run flat takes the slower decoder."""
    monkeypatch.setattr(sampling, "FlatDecoder" if name in PADDED else "CacheDecoder", None)
    lm, prompts, stops = build(name, sliding_window=None), prompts_of(LENGTHS), [5, 11, 12, 13, 14, 40]
    args = SimpleNamespace(max_completion_length=12, temperature=0.7)
    noise = torch.rand(3 * len(prompts), 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    drawn = generate(copy.deepcopy(lm), prompts, 3, noise, stops, args)
    greedy = generate(copy.deepcopy(lm), prompts, 1, None, stops, args)
    assert {ids[-1] in stops for ids, _ in drawn} == {True, False}
    for number, (ids, logprobs) in enumerate(drawn + greedy):
        stopped = ids[-1] in stops
        prompt = prompts[number // 3] if number < len(drawn) else prompts[number - len(drawn)]
        assert (stopped or len(ids) == 12) and not set(ids[:-1]) & set(stops) and len(logprobs) == len(ids)
        with torch.no_grad():
            z = lm(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
        own = z.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert (own - logprobs).abs().max() < 1e-4
        if number < len(drawn):
            sums = z.double().softmax(-1).cumsum(-1)
            assert (sums.gather(1, torch.tensor(ids)[:, None])[:, 0] > noise[number, : len(ids)] - 1e-5).all()
        else:
            assert z.argmax(-1).tolist() == ids


# ---- rollouts as tensors ---------------------------------------------------------------------------------------------


def make_rollout(places, copies=3, **more):
    """Groups as after sampling and judging, with numbers that no rounding survives, and a reward that is absent."""
    groups = []
    for place in places:
        generator = torch.Generator().manual_seed(place)
        group = {"prompt": array("i", [place] * 4), "row": 7 * place, "columns": {"answer": str(place)}, "place": place}
        group["completions"] = []
        for k in range(copies):
            n = 1 + (place + k) % 5
            completion = {"ids": array("i", range(k, k + n)), "stopped": k % 2 == 0, "scored": None}
            completion |= {name: torch.randn(n, generator=generator) for name in ("sampler_logprobs", *more)}
            rewards = [0.1 + place / 3, math.nan if k == 1 else -1e-17]
            completion |= {"rewards": rewards, "reward": sum(rewards), "advantage": 1 / (3 + k)}
            group["completions"].append(completion)
        groups.append(group)
    return groups


def same(a, b):
    """Equality of types and bits: NaN is NaN, tensors have one dtype."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and (a == b or (a != a and b != b))


def bare(groups):
    """The prompts of a rollout: its groups before anything was sampled."""
    return [{key: group[key] for key in ("prompt", "row", "columns")} | {"completions": []} for group in groups]


@pytest.mark.parametrize("more", [{}, {"old_logprobs": 1}, {"old_logprobs": 1, "ref_logprobs": 1}])
def test_tensors_are_the_whole_rollout(more):
    """There and back is what it was, groups in the order of places; what is not there yet is an empty tensor."""
    groups = make_rollout([0, 1, 2, 3], **more)
    tensors = to_tensors([groups[i] for i in (2, 0, 3, 1)])
    assert all(tensor.ndim == 1 for tensor in tensors.values())
    absent = {"old_logprobs", "ref_logprobs"} - set(more)
    assert {name for name, tensor in tensors.items() if len(tensor) == 0} == absent
    num_tokens = len(tensors["ids"])
    per_token = [tensor.nbytes for tensor in tensors.values() if len(tensor) == num_tokens]
    assert sum(per_token) == num_tokens * (8 + 4 * len(more))
    assert same(from_tensors(bare(groups), tensors), groups)
    some = from_tensors(bare(groups), to_tensors(groups[1:3]))  # a rank's part of a rollout
    assert same(some, groups[1:3])
    before = make_rollout([0])
    for completion in before[0]["completions"]:
        del completion["rewards"], completion["reward"], completion["advantage"]
    assert same(from_tensors(bare(before), to_tensors(before)), before)


def gathered(rank, world, places):
    groups = make_rollout(range(5), old_logprobs=1)
    return gather_groups(bare(groups), [groups[i] for i in places[rank]], dist.group.WORLD)


@pytest.mark.parametrize("places", [
    [[0, 1, 2, 3, 4]], [[0, 2, 4], [1, 3]], [[], [4, 1], [0, 3, 2]], [[], []], [[0, 2], [0, 2], [4, 1, 3], [4, 1, 3]],
])
def test_every_rank_gets_the_whole_rollout(places):
    """Whoever holds what, and also where a rank holds nothing, or two ranks the same."""
    groups = make_rollout(range(5), old_logprobs=1) if any(places) else []
    for found in ranks(len(places), gathered, places):
        assert same(found, groups)


def test_numbers_of_a_table():
    groups = make_rollout(range(3))
    set_completions(groups, "advantage", torch.arange(9, dtype=torch.float64).view(3, 3) / 7)
    assert [c["advantage"] for group in groups for c in group["completions"]] == [i / 7 for i in range(9)]
