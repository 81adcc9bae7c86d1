"""Every policy loss, ratio, mask and penalty of grpo.py and its variants against its formula, token by token.

The oracle below works on Python numbers: forward-mode derivatives (a value and its derivative by each log-prob) of the
formulas as printed, so it shares neither code nor automatic differentiation with what it tests. TIGHT: float64, a dozen
operations on numbers of size 10; a wrong factor, sign or denominator is off by more than 1e-3.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import ROOT, read_jsonl, script, tiny_rows, train
from hypothesis import given, settings
from hypothesis import strategies as st

from common.batches import order
from common.rewards import BUILT_IN
from common.runtime.flags import InputError
from common.tokenization import load_tokenizer

STEMS = ("grpo", "grpo_sequence", "grpo_token", "dppo", "gdpo", "gfpo", "dapo", "grpo_entropy")
MODULES = {stem: script(stem if stem == "grpo" else f"experimental/{stem}") for stem in STEMS}
grpo, gdpo, entropic = MODULES["grpo"], MODULES["gdpo"], MODULES["grpo_entropy"]
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
# Ten tokens in four sequences of 3, 1, 4 and 2; advantages of both signs; ratios inside and outside of every clip.
SEQ = (0, 0, 0, 1, 2, 2, 2, 2, 3, 3)
MEMBERS = ((0, 1, 2), (3,), (4, 5, 6, 7), (8, 9))
ADVANTAGES = (1.5, -0.7, -1.1, 0.4)
OLD = (-0.5, -1.0, -2.5, -0.8, -3.0, -0.7, -2.3, -0.9, -2.0, -0.3)
STEP = (0.3, -0.4, 0.05, 0.6, -0.5, 0.2, 1.8, -0.02, 0.15, -0.3)  # log pi - log pi_old
NEW = tuple(o + s for o, s in zip(OLD, STEP))
SAMPLER = tuple(o + s for o, s in zip(OLD, (0.1, -0.2, 0.05, -1.3, 0.3, 0.4, 0.2, 0.6, -0.1, 0.0)))
REF = tuple(n + s for n, s in zip(NEW, (0.5, -0.5, 0.1, 0.0, 1.0, -2.0, 0.3, 0.2, -0.1, 0.7)))
ENTROPY = (0.5, 1.5, 0.2, 0.9, 2.0, 0.1, 0.7, 0.3, 1.1, 0.4)
LIMIT = 8  # max_completion_length


def flags(stem="grpo", **more):
    return replace(MODULES[stem].Args(), max_completion_length=LIMIT, **more)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def batch_of(old=OLD, ref=None, sampler=SAMPLER, advantages=ADVANTAGES, seq=SEQ):
    """What a loss reads of a flat batch. Without a reference, or without the sampler, it has no such log-probs."""
    batch = {"old_logprobs": f64(old), "advantage": f64(advantages), "seq": torch.tensor(seq)}
    if ref is not None:
        batch["ref_logprobs"] = f64(ref)
    if sampler is not None:
        batch["sampler_logprobs"] = f64(sampler)
    return batch


def computed(logprobs=NEW, advantages=ADVANTAGES, ref=None, seq=SEQ, old=OLD, sampler=SAMPLER, counts=None, stem="grpo",
             **more):
    """STEM_loss -> loss, d loss / d logprobs, metrics. grpo_entropy's has tests of its own."""
    logprobs = f64(logprobs).requires_grad_()
    batch = batch_of(old=old, ref=ref, sampler=sampler, advantages=advantages, seq=seq)
    counts = counts or (len(seq), len(advantages))
    loss, metrics = getattr(MODULES[stem], f"{stem}_loss")(logprobs, batch, *counts, flags(stem, **more))
    loss.backward()
    assert not any(value.requires_grad for value in metrics.values())
    return loss.item(), logprobs.grad.tolist(), metrics


def test_a_run_with_what_sees_the_whole_step(tmp_path):
    """Truncated completions are in no denominator, but in the group's statistics and in what is said of lengths; the
    sampler's weights are 1 up to rounding on the CPU."""
    train("grpo", tmp_path, "--max_steps", 2, "--eval_rows", 4, "--max_completion_length", 34,
          "--mask_truncated_completions", "--importance_sampling_mode", "sequence_mask", "--loss_type", "grpo",
          "--reward", "accuracy", "format", ROOT / "common" / "examples" / "length_rewards.py:soft_overlong",
          "--kl_estimator", "k2", "--importance_sampling_level", "sequence", "--use_bias_correction_kl")  # fmt: skip
    steps, samples = read_jsonl(tmp_path / "metrics.jsonl"), read_jsonl(tmp_path / "samples.jsonl")
    first = next(line for line in steps if "loss" in line)
    assert 0 < first["truncated_frac"] < 0.95 and first["sampler_weight"] == pytest.approx(1, abs=1e-4)
    assert len(samples[0]["parts"]) == 3
    assert first["num_tokens"] < first["completion_len"] * 16 * 4
    penalties = [s["parts"][2] for s in samples if s["stop"] == "length"]
    assert penalties and {*penalties} == {-1.0}
    assert abs(sum(s["advantage"] for s in samples)) < 1e-6
    assert all(math.isfinite(line["loss"]) for line in steps if "loss" in line)


def test_a_step_whose_completions_are_all_cut(tmp_path):
    """Nothing is left to learn from: a gradient of 0 on every rank, and the run goes on."""
    train("grpo", tmp_path, "--max_steps", 2, "--batch_size", 2, "--num_generations", 2, "--max_completion_length", 2,
          "--mask_truncated_completions", "--eval_dataset", "", "--allow", "GRPO001", "GRPO002", world=2)  # fmt: skip
    steps = read_jsonl(tmp_path / "metrics.jsonl")
    found = [[line[key] for key in ("truncated_frac", "num_tokens", "loss", "grad_norm")] for line in steps]
    assert found == [[1, 0, 0, 0]] * 2


def dapo_rows(used, size, rounds, count, seed):
    """Dynamic sampling, row by row: odd rows have a signal. -> rows sampled, rows of the rollout."""
    sampled, kept = [], []
    for _ in range(rounds):
        drawn = order(count, seed, used + len(sampled), size - len(kept))
        sampled, kept = sampled + drawn, kept + [row for row in drawn if row % 2]
        if len(kept) == size:
            break
    return sampled, (kept + [row for row in sampled if row % 2 == 0])[:size]


@pytest.mark.parametrize("rounds", (2, 9))
def test_dynamic_sampling(rounds, tmp_path):
    """Rows 1, 3, 5, ... have a signal, row 0 has no rewards at all: what is trained on, and what is said of all that
    was sampled, on two ranks. Two rounds do not suffice for six groups; nine do."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": i}) + "\n" for i in range(10)))

    def patch(module):
        def parity(prompts, completions, answer, **_):
            return [None if a == 0 else float(k % 2) if a % 2 else 1.0 for k, a in enumerate(answer)]

        BUILT_IN["accuracy"] = parity

    train("experimental/dapo", tmp_path / "run", "--dataset", data, "--eval_dataset", "", "--max_steps", 4,
          "--num_iterations", 1, "--batch_size", 3, "--sampling_rounds", rounds, "--temperature", 1.2,
          "--allow", "GRPO003", "GRPO002", patch=patch, world=2)  # fmt: skip
    steps, samples = read_jsonl(tmp_path / "run" / "metrics.jsonl"), read_jsonl(tmp_path / "run" / "samples.jsonl")
    used, trained, filled = 0, [], []
    for line in steps[::2]:
        sampled, kept = dapo_rows(used, 6, rounds, 10, 42)
        used += len(sampled)
        trained += kept
        filled += [row for row in kept if row % 2 == 0]
        silent, lost = (sum(map(test, sampled)) for test in (lambda row: row % 2 == 0, lambda row: row == 0))
        wanted = {"num_prompts": len(sampled), "epoch": used / 10, "silent_frac": silent / len(sampled)}
        wanted |= {"no_reward_frac": lost / len(sampled)}
        wanted |= {"reward": (silent - lost + (len(sampled) - silent) / 2) / (len(sampled) - lost)}
        assert {key: line[key] for key in wanted} == pytest.approx(wanted)
    assert [sample["row"] for sample in samples[::4]] == trained and len(trained) == 12
    assert bool(filled) == (rounds == 2)
    again = [s["completion"] for s in samples]  # a row that comes twice is sampled twice
    assert len({*again}) > 4 * len({*trained}) / 2


def test_gfpo_learns_from_the_shortest(tmp_path):
    """The first rollout is grpo.py's; of each group of four the two shortest stay, and are normalised by themselves."""
    flags = ["--dataset", tiny_rows("grpo", tmp_path / "rows.jsonl", 12), "--eval_dataset", "", "--max_steps", 2]
    flags += ["--batch_size", 6, "--num_iterations", 1]

    def patch(module):
        BUILT_IN["accuracy"] = lambda prompts, **_: [float(k % 4) for k in range(len(prompts))]

    train("grpo", tmp_path / "grpo", *flags, patch=patch)
    more = "--num_remains_in_group", 2, "--group_filter", "shortest"
    train("experimental/gfpo", tmp_path / "gfpo", *flags, *more, patch=patch)
    tokenizer = load_tokenizer(str(ROOT / "common" / "tiny" / "model"))
    length = lambda s: len(tokenizer(s["completion"], add_special_tokens=False)["input_ids"])  # noqa: E731
    samples, wanted = read_jsonl(tmp_path / "grpo" / "samples.jsonl"), []
    for i in range(0, len(samples), 4):
        shortest = sorted(range(i, i + 4), key=lambda k: length(samples[k]))[:2]
        kept = [samples[k] for k in sorted(shortest)]
        wanted += [s | {"advantage": a} for s, a in zip(kept, scaled([s["reward"] for s in kept]))]
    got = read_jsonl(tmp_path / "gfpo" / "samples.jsonl")
    assert len(got) == 24 and [s["completion"] for s in got] == [s["completion"] for s in wanted]
    assert [s["advantage"] for s in got] == pytest.approx([s["advantage"] for s in wanted], abs=1e-9)
    assert all(s["advantage"] for s in got)


def test_entropy_control_over_steps(tmp_path):
    """Each step's coefficient follows from the entropies before it, and its bonus from its own: Skywork-OR1."""
    train("experimental/grpo_entropy", tmp_path / "run", "--max_steps", 6, "--eval_dataset", "", "--batch_size", 5,
          "--dataset", tiny_rows("experimental/grpo_entropy", tmp_path / "rows.jsonl", 15), world=2)  # fmt: skip
    steps, kept = read_jsonl(tmp_path / "run" / "metrics.jsonl"), 0.01
    low = [line["entropy"] <= 0.035 for line in steps]
    for line, below in zip(steps, low):
        assert line["entropy_coef"] == pytest.approx(kept if below else 0.0)
        kept = min(max(kept + (0.005 if below else -0.005), 0.0), 1.0)
    assert {*low} == {True, False}  # or this shows nothing


# ---- the formulas --------------------------------------------------------------------------------
# Each returns (loss, gradient by the log-prob of every token), from numbers alone. w: weight of each token's loss.


def token_mean():
    return [1 / 10] * 10


def sequence_mean():
    return [1 / (4 * len(MEMBERS[s])) for s in SEQ]


def ppo(ratio, advantage, low, high, delta=math.inf):
    """-> loss and d loss / d ratio of - min(min(ratio, delta) A, clip(ratio) A)."""
    plain, clipped = min(ratio, delta) * advantage, max(low, min(high, ratio)) * advantage
    if plain <= clipped:
        return -plain, -advantage if ratio < delta else 0.0
    return -clipped, -advantage if low < ratio < high else 0.0


def clipped_tokens(weights, high=1.2, delta=math.inf):
    loss, gradient = 0.0, []
    for step, s, w in zip(STEP, SEQ, weights):
        value, slope = ppo(math.exp(step), ADVANTAGES[s], 0.8, high, delta)
        loss, gradient = loss + w * value, [*gradient, w * slope * math.exp(step)]
    return loss, gradient


def sequence_ratio(i):
    return math.exp(sum(STEP[t] for t in MEMBERS[i]) / len(MEMBERS[i]))


def gspo(per_sequence):
    """Sequence ratio s_i = (product of ratios)^(1 / |y|); d s_i / d logprob = s_i / |y|. per_sequence: the weight of
    sequence i's one loss."""
    loss, gradient = 0.0, [0.0] * 10
    for i, tokens in enumerate(MEMBERS):
        value, slope = ppo(sequence_ratio(i), ADVANTAGES[i], 0.8, 1.2)
        loss += per_sequence(i) * value
        for t in tokens:
            gradient[t] = per_sequence(i) * slope * sequence_ratio(i) / len(tokens)
    return loss, gradient


def gspo_token():
    """s_{i,t} = sg[s_i] pi / sg[pi]: the value of s_i, the gradient of the token's own log-prob, the mean over tokens
    inside the mean over sequences. With one advantage per sequence the gradient is GSPO's."""
    return gspo(lambda i: 1 / 4)


def cispo_tokens(cap=5.0):
    weights = [0.1 * min(math.exp(s), cap) * ADVANTAGES[i] for s, i in zip(STEP, SEQ)]
    return -sum(w * n for w, n in zip(weights, NEW)), [-w for w in weights]


def sapo_tokens():
    loss, gradient = 0.0, []
    for step, s, w in zip(STEP, SEQ, sequence_mean()):
        tau = 1.0 if ADVANTAGES[s] > 0 else 1.05
        gate = 1 / (1 + math.exp(-tau * (math.exp(step) - 1)))
        loss -= w * 4 / tau * gate * ADVANTAGES[s]
        gradient.append(-w * 4 * gate * (1 - gate) * ADVANTAGES[s] * math.exp(step))
    return loss, gradient


def vespo_tokens():
    loss, gradient = 0.0, []
    for n, s in zip(NEW, SEQ):
        product = math.prod(math.exp(STEP[t]) for t in MEMBERS[s])
        k, rate = (2, 3) if ADVANTAGES[s] >= 0 else (3, 2)
        weight = product**k * math.exp(rate * (1 - product)) * ADVANTAGES[s] / 10
        loss, gradient = loss - weight * n, [*gradient, -weight]
    return loss, gradient


def gmpo_sequences(low=-0.2, high=0.4):
    loss, gradient = 0.0, [0.0] * 10
    for i, tokens in enumerate(MEMBERS):
        kept = [min(STEP[t], high) if ADVANTAGES[i] >= 0 else max(STEP[t], low) for t in tokens]
        mean = math.prod(map(math.exp, kept)) ** (1 / len(tokens))
        loss -= mean * ADVANTAGES[i] / 4
        for t, z in zip(tokens, kept):
            gradient[t] = -mean * ADVANTAGES[i] / 4 / len(tokens) if z == STEP[t] else 0.0
    return loss, gradient


def dppo_tokens(kind, low, high, cap=20.0):
    """Ratios to the sampler; D of two outcomes, this token or any other."""
    loss, gradient = 0.0, []
    for new, mu, s in zip(NEW, map(math.exp, SAMPLER), SEQ):
        pi, advantage = math.exp(new), ADVANTAGES[s]
        distance = {"binary_tv": abs(pi - mu),
                    "binary_kl": mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))}[kind]  # fmt: skip
        outside = pi > mu and distance > high if advantage > 0 else pi < mu and distance > low
        weight = 0.0 if outside else min(pi / mu, cap) * advantage / 10
        loss, gradient = loss - weight * new, [*gradient, -weight]
    return loss, gradient


SEQUENCE = {"importance_sampling_level": "sequence"}
LOSSES = {  # name: script, formula, flags
    "dapo": ("grpo", lambda: clipped_tokens(token_mean()), {}),
    "grpo": ("grpo", lambda: clipped_tokens(sequence_mean()), {"loss_type": "grpo"}),
    "dr_grpo": ("grpo", lambda: clipped_tokens([1 / 32] * 10), {"loss_type": "dr_grpo"}),
    "clip higher": ("grpo", lambda: clipped_tokens(token_mean(), high=1.5), {"epsilon_high": 0.5}),
    "delta": ("grpo_token", lambda: clipped_tokens(token_mean(), delta=1.6), {"loss_type": "dapo", "delta": 1.6}),
    "gspo": ("grpo", lambda: gspo(lambda i: 1 / 4), {"loss_type": "grpo"} | SEQUENCE),
    "gspo_token": ("grpo_sequence", gspo_token, {"loss_type": "grpo", "importance_sampling_level": "sequence_token"}),
    "luspo": ("grpo_sequence", lambda: gspo(lambda i: len(MEMBERS[i]) / 4), {"loss_type": "luspo"} | SEQUENCE),
    "cispo": ("grpo", cispo_tokens, {"loss_type": "cispo", "epsilon_high": 5.0}),
    "cispo, capped": ("grpo", lambda: cispo_tokens(1.3), {"loss_type": "cispo", "epsilon_high": 1.3}),
    "sapo": ("grpo_token", sapo_tokens, {"loss_type": "sapo"}),
    "vespo": ("grpo_sequence", vespo_tokens, {"loss_type": "vespo"}),
    "gmpo": ("grpo_sequence", gmpo_sequences, {"loss_type": "gmpo", "epsilon_high": 0.4}),
    "binary_tv": ("dppo", lambda: dppo_tokens("binary_tv", 0.02, 0.12), {"epsilon": 0.02, "epsilon_high": 0.12}),
    "binary_kl": ("dppo", lambda: dppo_tokens("binary_kl", 0.004, 0.04),
                  {"divergence_type": "binary_kl", "epsilon": 0.004, "epsilon_high": 0.04}),
    "binary_tv, capped": ("dppo", lambda: dppo_tokens("binary_tv", 0.15, 0.15, 1.3), {"ratio_cap": 1.3}),
}


for child in "grpo_sequence", "grpo_token":  # what they have of grpo.py goes through a surrogate that they changed
    LOSSES |= {f"{name} in {child}": (child, formula, {"loss_type": "dapo"} | more)
               for name, (stem, formula, more) in LOSSES.items() if stem == "grpo"}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_policy_losses(name):
    stem, formula, more = LOSSES[name]
    loss, gradient = formula()
    got = computed(stem=stem, **more)
    assert got[0] == pytest.approx(loss, abs=1e-7)  # a normaliser by integer lengths is float32
    assert got[1] == pytest.approx(gradient, rel=1e-6, abs=1e-9)
    assert any(abs(g) > 1e-3 for g in gradient)


@pytest.mark.parametrize("stem", STEMS)
def test_every_loss_type_has_a_formula(stem):
    hints = MODULES[stem].Args.__annotations__
    covered = {more.get("loss_type", "dapo") for _, _, more in LOSSES.values()}
    assert covered >= {*get_args(hints["loss_type"])}
    more = [more for owner, _, more in LOSSES.values() if owner == stem]
    for flag in "importance_sampling_level", "divergence_type":
        default = getattr(MODULES[stem].Args(), flag, None)
        assert not more or {m.get(flag, default) for m in more} >= {*getattr(hints.get(flag), "__args__", ())}


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up(name):
    """Sequences 0 and 1, then 2 and 3, with the counts of the whole step."""
    stem, _, more = LOSSES[name]
    more = more | {"beta": 0.1, "stem": stem} | ({"off_policy_mask_threshold": 0.0} if stem == "grpo_sequence" else {})
    whole = computed(ref=REF, counts=(10, 4), **more)
    first = computed(NEW[:4], ADVANTAGES[:2], REF[:4], SEQ[:4], OLD[:4], SAMPLER[:4], (10, 4), **more)
    later = tuple(s - 2 for s in SEQ[4:])
    second = computed(NEW[4:], ADVANTAGES[2:], REF[4:], later, OLD[4:], SAMPLER[4:], (10, 4), **more)
    assert first[0] + second[0] == pytest.approx(whole[0], rel=1e-6, abs=1e-9)
    assert first[1] + second[1] == pytest.approx(whole[1], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_ratio_of_one_gives_the_gradient_of_reinforce(name):
    """- A times the token's weight, whatever the loss: on-policy all of them are the same method."""
    stem, _, more = LOSSES[name]
    norm = dict.fromkeys(("grpo", "sapo", "gmpo"), sequence_mean()) | {"dr_grpo": [1 / 32] * 10, "luspo": [1 / 4] * 10}
    got = computed(logprobs=OLD, sampler=OLD, stem=stem, **more)[1]
    weights = norm.get(more.get("loss_type", "dapo"), token_mean())
    assert got == pytest.approx([-ADVANTAGES[s] * w for s, w in zip(SEQ, weights)], rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(10)))
def test_order_of_tokens_changes_nothing(name, order):
    moved = ([x[i] for i in order] for x in (NEW, REF, SEQ, OLD, SAMPLER))
    new, ref, seq, old, sampler = moved
    stem, _, more = LOSSES[name]
    plain = computed(ref=REF, beta=0.1, stem=stem, **more)
    got = computed(new, ADVANTAGES, ref, seq, old, sampler, beta=0.1, stem=stem, **more)
    assert got[0] == pytest.approx(plain[0], rel=1e-6, abs=1e-9)
    assert got[1] == pytest.approx([plain[1][i] for i in order], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", ("none", "token_truncate", "sequence_mask"))
@pytest.mark.parametrize("distance", (50.0, -50.0))
def test_far_log_ratios_stay_finite_in_float32(name, mode, distance):
    logprobs = torch.full((4,), -60.0 + distance, requires_grad=True)
    old = torch.full((4,), -60.0)
    batch = {"old_logprobs": old, "ref_logprobs": old, "sampler_logprobs": old - distance}
    batch["advantage"] = torch.tensor([1.0, -1.0])
    batch["seq"] = torch.tensor([0, 0, 1, 1])
    stem, _, more = LOSSES[name]
    more = more | {"importance_sampling_mode": mode, "beta": 0.1, "use_bias_correction_kl": True}
    more |= {"off_policy_mask_threshold": 0.5} if stem == "grpo_sequence" else {}
    loss, metrics = getattr(MODULES[stem], f"{stem}_loss")(logprobs, batch, 4, 2, flags(stem, **more))
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all() and all(v.isfinite() for v in metrics.values())


@settings(deadline=None, max_examples=60)
@given(st.floats(-2, 2), st.sampled_from((-1.0, 1.0)), st.sampled_from(("token", "sequence")))
def test_outside_the_clip_there_is_no_gradient(step, advantage, level):
    more = {"loss_type": "grpo", "importance_sampling_level": level}
    gradient = computed([-1 + step] * 3, [advantage], None, (0, 0, 0), [-1.0] * 3, None, **more)[1]
    outside = step > math.log(1.2) + 1e-9 if advantage > 0 else step < math.log(0.8) - 1e-9
    inside = step < math.log(1.2) - 1e-9 if advantage > 0 else step > math.log(0.8) + 1e-9
    assert not outside or gradient == [0, 0, 0]
    assert not inside or gradient == pytest.approx([-advantage * math.exp(step) / 3] * 3, rel=1e-6)


# ---- weights, masks, KL --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"))
@pytest.mark.parametrize("low, high", ((0.0, 3.0), (0.7, 1.2), (0.0, 1.0)))
def test_sampler_weights(mode, low, high):
    """pi_old / sampler of a token, or its product over the sequence; inside the bounds as it is."""
    weights = []
    for t, s in enumerate(SEQ):
        members = (t,) if mode.startswith("token") else MEMBERS[s]
        w = math.prod(math.exp(OLD[m] - SAMPLER[m]) for m in members)
        weights.append(min(max(w, low), high) if mode.endswith("truncate") else w if low <= w <= high else 0.0)
    bounds = {"importance_sampling_clip_min": low, "importance_sampling_clip_max": high}
    got = computed(importance_sampling_mode=mode, ref=REF, beta=0.3, **bounds)
    plain, kl = computed(), computed(advantages=(0.0,) * 4, ref=REF, beta=0.3)  # the KL has no weight
    assert got[1] == pytest.approx([w * p + k for w, p, k in zip(weights, plain[1], kl[1])], rel=1e-7, abs=1e-9)
    assert got[2]["sampler_weight"].item() == pytest.approx(sum(weights), rel=1e-9)
    assert len({*map(lambda w: round(w, 6), weights)}) > 1


def test_off_policy_sequences_are_left_out():
    """Only where A < 0 and the mean of log(sampler / pi) passes the threshold: sequences 1 and 2 have A < 0, with means
    -1.9 and (0.8 + 0.2 - 1.6 + 0.62) / 4 = 0.005; 0 and 3 stay whatever their mean."""
    means = [sum(SAMPLER[t] - NEW[t] for t in tokens) / len(tokens) for tokens in MEMBERS]
    assert means[1:3] == pytest.approx([-1.9, 0.005]) and means[3] > 0
    plain = computed()[1]
    for threshold, dropped in (0.01, ()), (0.0, (2,)), (-1.0, (2,)), (-2.0, (1, 2)):
        got = computed(stem="grpo_sequence", loss_type="dapo", off_policy_mask_threshold=threshold)[1]
        assert got == [0 if s in dropped else g for g, s in zip(plain, SEQ)]


@pytest.mark.parametrize("kind", ("k1", "k2", "k3"))
def test_kl_estimators(kind):
    gaps = [r - n for r, n in zip(REF, NEW)]  # log(ref / pi), which falls as the log-prob rises
    value = {"k1": lambda d: -d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(d) - d - 1}[kind]
    slope = {"k1": lambda d: 1, "k2": lambda d: -d, "k3": lambda d: 1 - math.exp(d)}[kind]
    got = computed(advantages=(0.0,) * 4, ref=REF, beta=0.3, kl_estimator=kind)
    assert got[0] == pytest.approx(0.03 * sum(map(value, gaps)), rel=1e-9)
    assert got[1] == pytest.approx([0.03 * slope(d) for d in gaps], rel=1e-9, abs=1e-12)
    assert got[2]["kl"].item() == pytest.approx(sum(map(value, gaps)), rel=1e-9)
    unbiased = computed(advantages=(0.0,) * 4, ref=REF, beta=0.3, kl_estimator=kind, use_bias_correction_kl=True)
    ratios = [math.exp(s) for s in STEP]  # times the ratio, whose own gradient counts
    assert unbiased[0] == pytest.approx(0.03 * sum(r * value(d) for r, d in zip(ratios, gaps)), rel=1e-9)
    wanted = [0.03 * r * (value(d) + slope(d)) for r, d in zip(ratios, gaps)]
    assert unbiased[1] == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_unbiased_kl_has_the_gradient_of_the_kl():
    """Over a vocabulary of three, tokens drawn from pi_old != pi, each weighed by its probability: the expected
    gradient is that of sum p log(p / q) by the logits, for k1 and for k3; without the ratio it is not."""
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    q, old = (torch.tensor(x, dtype=torch.float64) for x in ((0.2, 0.5, 0.3), (0.4, 0.4, 0.2)))
    p = logits.softmax(0)
    (wanted,) = torch.autograd.grad((p * (p / q).log()).sum(), logits)
    for kind, unbiased in ("k1", True), ("k3", True), ("k3", False):
        total = 0.0
        for token in range(3):
            logprob = logits.log_softmax(0)[token : token + 1]
            args = flags(beta=1.0, kl_estimator=kind, use_bias_correction_kl=unbiased)
            at = slice(token, token + 1)
            batch = {"old_logprobs": old.log()[at], "ref_logprobs": q.log()[at]}
            batch |= {"advantage": torch.zeros(1, dtype=torch.float64), "seq": torch.tensor([0])}
            loss, _ = grpo.grpo_loss(logprob, batch, 1, 1, args)
            total = total + old[token] * loss
        (got,) = torch.autograd.grad(total, logits)
        assert torch.allclose(got, wanted, **TIGHT) == unbiased


# ---- filters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, wanted", (("shortest", [1, 3, 4]), ("token_efficiency", [0, 1, 2])))
def test_gfpo_filters(kind, wanted):
    """Rewards per token: 1/4, 1/2, 2/5, none, 0. Of three that have two tokens and three places, all; ties by place."""
    lengths, rewards = (4, 2, 5, 2, 2), (1.0, 1.0, 2.0, math.nan, 0.0)
    completions = [{"ids": [7] * n, "reward": r, "place": k} for k, (n, r) in enumerate(zip(lengths, rewards))]
    args = flags("gfpo", num_remains_in_group=3, group_filter=kind)
    assert [c["place"] for c in MODULES["gfpo"].keep(completions, args)] == wanted
    one = replace(args, num_remains_in_group=1)
    assert [c["place"] for c in MODULES["gfpo"].keep(completions, one)] == [1]


# ---- entropy -------------------------------------------------------------------------------------


def entropy_loss(threshold=-math.inf, coef=0.0, **more):
    logprobs, entropy = f64(NEW).requires_grad_(), f64(ENTROPY).requires_grad_()
    batch = batch_of(ref=REF if more.get("beta") else None) | {"entropy": entropy}
    args = flags("grpo_entropy", **more)
    loss, _ = entropic.grpo_entropy_loss(logprobs, batch, 10, 4, args, threshold, coef)
    loss.backward()
    return loss.item(), logprobs.grad.tolist(), entropy.grad.tolist()


@pytest.mark.parametrize("loss_type", ("dapo", "grpo"))
def test_entropy_bonus(loss_type):
    """The mean over all tokens, whatever the norm of the rest."""
    plain, got = computed(loss_type=loss_type), entropy_loss(loss_type=loss_type, coef=0.3)
    assert got[0] == pytest.approx(plain[0] - 0.3 * sum(ENTROPY) / 10, rel=1e-9)
    assert got[1] == plain[1] and got[2] == pytest.approx([-0.03] * 10)


@pytest.mark.parametrize("loss_type, norm", (("dapo", token_mean()), ("grpo", sequence_mean())))
def test_only_high_entropy_tokens_earn(loss_type, norm):
    """The five highest of ten: the others have weight 0, in the same denominators. The KL is everybody's."""
    threshold = entropic.entropy_threshold(torch.tensor(ENTROPY), 0.5)  # 1 + floor(4.5)
    high = [e >= 0.7 for e in ENTROPY]
    assert sum(high) == 5 and threshold == pytest.approx(0.6)
    wanted = clipped_tokens([w * h for w, h in zip(norm, high)])
    got = entropy_loss(threshold, loss_type=loss_type)
    assert got[0] == pytest.approx(wanted[0], abs=1e-7) and got[1] == pytest.approx(wanted[1], rel=1e-6, abs=1e-9)
    kl = computed(advantages=(0.0,) * 4, ref=REF, beta=0.3, loss_type=loss_type)
    both = entropy_loss(threshold, loss_type=loss_type, beta=0.3)
    assert both[1] == pytest.approx([a + b for a, b in zip(got[1], kl[1])], rel=1e-6, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 5), min_size=2, max_size=40, unique_by=lambda x: round(x, 3)), st.integers(1, 8))
def test_as_many_as_the_quantile_leaves(entropy, eighths):
    entropy, share = torch.tensor(entropy, dtype=torch.float64), eighths / 8
    kept = entropy >= entropic.entropy_threshold(entropy, share)
    assert kept.tolist() == (entropy >= entropy.quantile(1 - share)).tolist()


def test_entropy_of_a_step_without_tokens():
    assert entropic.entropy_threshold(torch.zeros(0), 0.2) == -math.inf


def test_entropy_control():
    args = flags("grpo_entropy", entropy_coef=0.01, entropy_coef_max=0.02, entropy_coef_delta=0.008)  # target 0.2
    cases = {(0.01, 0.1): (0.01, 0.018), (0.01, 0.2): (0.01, 0.018), (0.01, 0.3): (0, 0.002)}
    cases |= {(0.018, 0.1): (0.018, 0.02), (0.002, 0.3): (0, 0)}  # the ends
    for (coef, entropy), wanted in cases.items():
        assert entropic.control_entropy(coef, entropy, args) == pytest.approx(wanted)


# ---- TRL -----------------------------------------------------------------------------------------

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "trl_grpo.json").read_text())


def home(flags):
    """The script that has the flags of a case, and what they are called there."""
    kind = flags.get("loss_type", "dapo")
    if flags.get("rloo"):
        return "rloo", {k: v for k, v in flags.items() if k != "rloo"}
    if kind in ("luspo", "vespo", "gmpo") or "off_policy_mask_threshold" in flags:
        return "grpo_sequence", flags
    stem = "grpo_entropy" if "entropy_coef" in flags else "grpo_token" if kind == "sapo" or "delta" in flags else "grpo"
    return stem, flags | {"loss_type": "dapo" if kind == "bnpo" else kind}  # of one micro-batch they are the same


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: " ".join(map(str, sum(case["flags"].items(), ()))))
def test_equals_trl(case):
    """Loss and gradients of TRL's own code (benchmarks/trl_grpo_fixtures.py) on the same log-probs. TRL's steps are the
    same in float64 but for our float32 normaliser by integer lengths."""
    stem, more = home(case["flags"])
    module = MODULES.get(stem) or script(stem)
    seq = torch.arange(len(FIXTURE["lengths"])).repeat_interleave(torch.tensor(FIXTURE["lengths"]))
    args = replace(module.Args(), max_completion_length=FIXTURE["max_completion_length"], **more)
    logprobs, entropy = f64(FIXTURE["new"]).requires_grad_(), f64(FIXTURE["entropy"]).requires_grad_()
    others = {name: FIXTURE[name] for name in ("old", "sampler", "advantages")}
    batch = batch_of(**others, ref=FIXTURE["ref"] if args.beta else None, seq=seq.tolist())
    more = ()
    if stem == "grpo_entropy":
        batch["entropy"] = entropy
        more = -math.inf, args.entropy_coef
    loss, _ = getattr(module, f"{stem}_loss")(logprobs, batch, len(seq), len(FIXTURE["advantages"]), args, *more)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6, abs=1e-7)
    assert logprobs.grad.tolist() == pytest.approx(case["gradient"], rel=1e-6, abs=1e-8)
    by_entropy = torch.zeros_like(logprobs) if entropy.grad is None else entropy.grad
    assert by_entropy.tolist() == pytest.approx(case["entropy_gradient"], rel=1e-6)


def test_trl_has_cases_of_every_loss_type():
    covered = {case["flags"].get("loss_type", "dapo") for case in FIXTURE["cases"]}
    known = [get_args(module.Args.__annotations__["loss_type"]) for module in MODULES.values()]
    assert FIXTURE["trl"] == "1.16.0" and covered == {"bnpo"}.union(*known)


# ---- several rewards -----------------------------------------------------------------------------


def scaled(values):
    """(x - mean) / (std + 1e-4), std with n - 1."""
    mean = sum(values) / len(values)
    return [(x - mean) / (math.sqrt(sum((y - mean) ** 2 for y in values) / (len(values) - 1)) + 1e-4) for x in values]


def test_gdpo():
    """Two rewards of very different spread, two groups of three, weights 1 and 2."""
    first, second = [[1.0, 0, 0], [1, 1, 0]], [[10.0, 0, 20], [0, 0, 0]]
    totals = [a + 2 * b for g, h in zip(first, second) for a, b in zip(scaled(g), scaled(h))]
    parts = torch.tensor([first, second], dtype=torch.float64).permute(1, 2, 0)
    got = gdpo.normalize_then_sum(parts, flags("gdpo", reward_weights=(1.0, 2.0)))
    assert got.flatten().tolist() == pytest.approx(scaled(totals), rel=1e-9)


def test_gdpo_without_some_rewards():
    """NaN in one reward: the other one counts. NaN in all: no advantage, and no part in the batch's deviation."""
    nan = math.nan
    parts = torch.tensor([[[1, nan], [0, 2], [nan, nan], [1, 5]]], dtype=torch.float64)
    one, two = scaled([1.0, 0, 1]), scaled([2.0, 5])
    totals = scaled([one[0], one[1] + two[0], one[2] + two[1]])
    got = gdpo.normalize_then_sum(parts, flags("gdpo"))[0].tolist()
    assert got == pytest.approx([*totals[:2], 0.0, totals[2]], rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-4, 4), min_size=4, max_size=4), st.floats(-8, 8))
def test_gdpo_does_not_see_constants(rewards, shift):
    parts = torch.tensor([rewards, [0, 1, 2, 3]], dtype=torch.float64)[..., None].expand(2, 4, 2).clone()
    plain = gdpo.normalize_then_sum(parts, flags("gdpo"))
    parts[..., 1] += shift
    torch.testing.assert_close(gdpo.normalize_then_sum(parts, flags("gdpo")), plain, rtol=1e-7, atol=1e-7)


# ---- flags that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize("stem, more, flag", (
    ("grpo", {"loss_type": "cispo"}, "--epsilon_high"),
    ("grpo", {"loss_type": "cispo", "epsilon_high": 0.9}, "--epsilon_high"),
    ("grpo", {"importance_sampling_level": "sequence"}, "--loss_type"),
    ("grpo", {"importance_sampling_mode": "token_mask", "old_logprobs": "sampler"}, "--old_logprobs"),
    ("grpo", {"importance_sampling_clip_min": 4.0}, "--importance_sampling_clip_min"),
    ("grpo", {"use_bias_correction_kl": True}, "--beta"),
    ("grpo_sequence", {"importance_sampling_level": "sequence_token", "loss_type": "dr_grpo"}, "--loss_type"),
    ("grpo_sequence", {"importance_sampling_level": "sequence", "loss_type": "vespo"}, "--loss_type"),
    ("grpo_sequence", {"importance_sampling_level": "sequence", "loss_type": "gmpo"}, "--loss_type"),
    ("grpo_sequence", {"loss_type": "luspo"}, "--importance_sampling_level"),
    ("grpo_sequence", {"importance_sampling_mode": "token_mask", "loss_type": "vespo"}, "--importance_sampling_mode"),
    ("grpo_token", {"delta": 1.1, "loss_type": "dapo"}, "--delta"),
    ("grpo_token", {"delta": 4.0, "loss_type": "sapo"}, "--delta"),
    ("grpo_token", {"sapo_temperature_neg": 0.0}, "--sapo_temperature_pos"),
    ("dppo", {"importance_sampling_mode": "token_mask"}, "--importance_sampling_mode"),
    ("gdpo", {"reward": ("accuracy",)}, "--reward"),
    ("gfpo", {"num_remains_in_group": 8}, "--num_remains_in_group"),
    ("grpo_entropy", {"top_entropy_quantile": 1.0}, "--entropy_coef"),
    ("grpo_entropy", {"top_entropy_quantile": 0.0}, "--top_entropy_quantile"),
    ("grpo_entropy", {"entropy_coef": 2.0}, "--entropy_coef_max"),
), ids=str)  # fmt: skip
def test_flags_without_a_meaning(stem, more, flag):
    with pytest.raises(InputError, match=flag):
        flags(stem, **more).check()


@pytest.mark.parametrize("name", LOSSES)
def test_flags_with_a_meaning(name):
    stem, _, more = LOSSES[name]
    flags(stem, **more).check()
