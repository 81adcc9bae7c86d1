"""common/decoding.py and the sampling of methods/grpo.py, against oracles that share no code: every row's logits from
one forward of its whole sequence in the model's own attention, tokens from one running sum in float64."""
import copy
from array import array
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import script
from test_logprobs import FLAT, PADDED, V, build

from common import decoding as subject

LENGTHS = [6, 3, 9, 6, 1]  # of the prompts: two form a set; longer than the sliding window (4), and shorter


def prompts_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [array("i", torch.randint(3, V, (n,), generator=generator).tolist()) for n in lengths]


@torch.no_grad()
@pytest.mark.parametrize("name", [*FLAT, *PADDED])
def test_logits_of_every_row_are_those_of_its_own_sequence(name, monkeypatch):
    monkeypatch.setattr(subject, "ROOM", 2)  # caches grow on the way
    changes = {"num_hidden_layers": 4, "sliding_window": None} if name in PADDED else {}  # a fourth of Qwen's attend
    lm, prompts, copies = build(name, **changes), prompts_of(LENGTHS), 3
    decoding = subject.decoder(copy.deepcopy(lm), prompts, copies)
    assert type(decoding).__name__ == ("FlatDecoder" if name in FLAT else "CacheDecoder")
    written = {row: list(prompts[row // copies]) for row in range(len(prompts) * copies)}
    rows, generator = decoding.rows, torch.Generator().manual_seed(1)
    assert sorted(rows.tolist()) == sorted(written)
    # every way to leave: from the middle, the last of a set, several at once, a whole set, nobody
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
    """Room for what was written and half as much again; a set that ended is gone."""
    with torch.no_grad():
        decoding = subject.decoder(build("Qwen3"), prompts_of([70, 40]), 2)
        for _ in range(100):
            decoding.step(torch.full((len(decoding.logits),), 5))
        for each in decoding.sets:
            for cache in each.cache[0]:
                assert each.length <= cache.shape[2] <= 1.5 * each.length + subject.ROOM and len(cache) == 2
        decoding.drop(torch.tensor([False, True, True, True]))  # the shorter prompt's set comes first
    assert [(each.length, each.count) for each in decoding.sets] == [(140, 1)]


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
    drawn = script("grpo").draw(p, noise)
    assert (p.gather(1, drawn[:, None]) > 0).all()
    edges = numpy.abs(sums - noise[:, None].numpy() * sums[:, -1:]).min(1) < 1e-13  # where two roundings may disagree
    assert all(a == b or edge for a, b, edge in zip(drawn.tolist(), wanted, edges))
    assert sum(edges) <= 4


def test_generate_stops_at_stop_tokens_and_scores_what_it_wrote():
    """ids end with the stop token or at the limit; log-probs at the temperature; one prompt's copies side by side."""
    lm, prompts, stops = build("Llama"), prompts_of(LENGTHS), [5, 11, 12, 13, 14, 40]
    args = SimpleNamespace(max_completion_length=12, temperature=0.7)
    noise = torch.rand(3 * len(prompts), 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    drawn = script("grpo").generate(copy.deepcopy(lm), prompts, 3, noise, stops, args)
    greedy = script("grpo").generate(copy.deepcopy(lm), prompts, 1, None, stops, args)
    assert {stopped for _, _, stopped in drawn} == {True, False}
    for number, (ids, logprobs, stopped) in enumerate(drawn + greedy):
        prompt = prompts[number // 3] if number < len(drawn) else prompts[number - len(drawn)]
        assert stopped == (ids[-1] in stops) and (stopped or len(ids) == 12) and not set(ids[:-1]) & set(stops)
        with torch.no_grad():
            z = lm(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
        own = z.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert (own - logprobs).abs().max() < 1e-4
        if number < len(drawn):
            sums = z.double().softmax(-1).cumsum(-1)
            assert (sums.gather(1, torch.tensor(ids)[:, None])[:, 0] > noise[number, : len(ids)] - 1e-5).all()
        else:
            assert z.argmax(-1).tolist() == ids.tolist()
