"""rloo.py: the leave-one-out baseline, what the rewards lose to the KL, and the ratio of a whole sequence.

Everything runs in float64 against numbers written out by hand, as in test_losses.py.
"""

import math
from dataclasses import replace

import pytest
import torch
from conftest import script
from hypothesis import given, settings
from hypothesis import strategies as st

from common.runtime.flags import InputError

rloo, NAN = script("rloo"), math.nan


def advantages(rewards, **more):
    table = torch.tensor(rewards, dtype=torch.float64)
    return rloo.compute_advantages(table, replace(rloo.Args(), **more))


def test_the_baseline_is_the_mean_of_the_others():
    # (4, 1, 1): others' means 1, 2.5, 2.5; (0, 2, -2): 0, -1, 1
    got = advantages([[4, 1, 1], [0, 2, -2]])
    assert got.tolist() == [[3, -1.5, -1.5], [0, 3, -3]]


def test_missing_rewards_are_nobodys_others():
    got = advantages([[4, 1, NAN], [5, NAN, NAN], [NAN, NAN, NAN]])
    assert got.tolist() == [[3, -3, 0], [0, 0, 0], [0, 0, 0]]


def test_global_normalisation():
    """All advantages minus their mean, over their deviation: 3, -1.5, -1.5, 0, 3, -3 have mean 0, squares 31.5 over 5.
    One that is missing is in neither."""
    std = math.sqrt(31.5 / 5) + 1e-4
    got = advantages([[4, 1, 1], [0, 2, -2]], normalize_advantages=True)
    assert got.flatten().tolist() == pytest.approx([a / std for a in (3, -1.5, -1.5, 0, 3, -3)], rel=1e-12)
    std = math.sqrt(18 + 0.0) + 1e-4  # 3 and -3 only: mean 0, squares 18, over 2 - 1
    got = advantages([[4, 1, NAN]], normalize_advantages=True)
    assert got.flatten().tolist() == pytest.approx([3 / std, -3 / std, 0], rel=1e-12)


tables = st.integers(2, 6).flatmap(lambda n: st.lists(st.lists(st.floats(-4, 4), min_size=n, max_size=n), min_size=1))


@settings(deadline=None, max_examples=60)
@given(rewards=tables.filter(lambda t: len(t) < 5), shift=st.floats(-8, 8))
def test_advantages_are_the_centred_rewards_enlarged(rewards, shift):
    """G / (G - 1) x (r - mean), whatever is added to all; they sum to 0 in every group."""
    size = len(rewards[0])
    wanted = [[size / (size - 1) * (r - sum(row) / size) for r in row] for row in rewards]
    for table in rewards, [[r + shift for r in row] for row in rewards]:
        got = advantages(table)
        assert got.flatten().tolist() == pytest.approx([a for row in wanted for a in row], abs=1e-9)
        assert got.sum(1).tolist() == pytest.approx([0] * len(rewards), abs=1e-9)


def penalized(completion, args):
    """What penalized_rewards makes of the reward of one completion."""
    return rloo.penalized_rewards([{"completions": [completion]}], args).item()


@pytest.mark.parametrize("kind, kl", (
    ("k1", 0.5 - 0.25 + 0.1),  # log(pi_old / ref), summed over the tokens
    ("k2", (0.25 + 0.0625 + 0.01) / 2),
    ("k3", math.exp(-0.5) + math.exp(0.25) + math.exp(-0.1) + 0.35 - 3),
))  # fmt: skip
def test_the_kl_lowers_the_reward_after_clipping(kind, kl):
    ref = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    completion = {"reward": 5.0, "old_logprobs": ref + torch.tensor([0.5, -0.25, 0.1], dtype=torch.float64),
                  "ref_logprobs": ref, "sampler_logprobs": ref + 9}  # fmt: skip
    args = replace(rloo.Args(), beta=0.2, kl_estimator=kind)
    assert penalized(completion, args) == pytest.approx(5 - 0.2 * kl, rel=1e-12)
    args = replace(args, reward_clip_range=(-1.0, 2.0))
    assert penalized(completion, args) == pytest.approx(2 - 0.2 * kl, rel=1e-12)
    assert penalized(completion | {"reward": -7.0}, args) == pytest.approx(-1 - 0.2 * kl, rel=1e-12)
    assert math.isnan(penalized(completion | {"reward": NAN}, args))
    without = {"reward": 5.0, "sampler_logprobs": ref}
    assert penalized(without, replace(rloo.Args(), beta=0.0)) == 5


# Two sequences of 3 and 2 tokens. Sums of log-ratios: 0.3 - 0.2 + 0.05 = 0.15 and 0.5 - 0.1 = 0.4
STEP, SEQ = (0.3, -0.2, 0.05, 0.5, -0.1), (0, 0, 0, 1, 1)


def loss_of(advantages, step=STEP, seq=SEQ, ref=None, beta=0.0):
    """Return loss, d loss / d logprobs and metrics. With a beta there has to be a reference."""
    old = torch.linspace(-2, -1, len(step), dtype=torch.float64)
    logprobs = (old + torch.tensor(step, dtype=torch.float64)).requires_grad_()
    args = replace(rloo.Args(), beta=beta)
    batch = {"old_logprobs": old, "sampler_logprobs": old, "ref_logprobs": ref, "seq": torch.tensor(seq)}
    batch["advantage"] = torch.tensor(advantages, dtype=torch.float64)
    loss, metrics = rloo.rloo_loss(logprobs, batch, len(step), len(advantages), args)
    loss.backward()
    return loss.item(), logprobs.grad.tolist(), metrics


@pytest.mark.parametrize("first", (2.0, -2.0))
@pytest.mark.parametrize("second", (1.0, -1.0))
def test_loss_of_whole_sequences(first, second):
    """e^0.15 = 1.16 is inside the clip, e^0.4 = 1.49 above it: with A > 0 it counts as 1.2 and gives no gradient."""
    one, two = math.exp(0.15), math.exp(0.4)
    loss, gradient, _ = loss_of((first, second))
    assert loss == pytest.approx(-(one * first + (1.2 if second > 0 else two) * second) / 2, abs=1e-7)
    tail = 0.0 if second > 0 else -two * second / 2
    assert gradient == pytest.approx([-one * first / 2] * 3 + [tail] * 2, abs=1e-6)


def test_ratio_of_one_gives_the_gradient_of_reinforce():
    """- A / num_seqs for every token: the log-prob of the whole completion, not its mean."""
    assert loss_of((2.0, -1.0), step=(0.0,) * 5)[1] == pytest.approx([-1] * 3 + [0.5] * 2, abs=1e-6)


def test_there_is_no_kl_in_the_loss():
    ref = torch.full((5,), -3.0, dtype=torch.float64)
    plain, with_ref = loss_of((2.0, -1.0)), loss_of((2.0, -1.0), ref=ref, beta=5.0)
    assert plain[:2] == with_ref[:2] and with_ref[2]["kl"] != 0


@pytest.mark.parametrize("far", (50.0, -50.0))
def test_far_ratios_stay_finite(far):
    loss, gradient, _ = loss_of((1.0, -1.0), step=(far,) * 5)
    assert math.isfinite(loss) and all(map(math.isfinite, gradient))


@pytest.mark.parametrize("more, flag", (
    ({"reward_clip_range": (2.0, 1.0)}, "--reward_clip_range"),
    ({"loss_type": "dapo"}, "--loss_type dapo"),
), ids=str)  # fmt: skip
def test_flags_without_a_meaning(more, flag):
    with pytest.raises(InputError, match=flag):
        replace(rloo.Args(), **more).check()
    rloo.Args().check()
