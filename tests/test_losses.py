"""Losses, advantages and rewards against numbers worked out by hand.

Everything runs in float64, and the expected values are written out as arithmetic from the formulas of the docstrings,
not from the code. TIGHT is what a dozen float64 operations on numbers of size 10 may lose: a wrong factor, sign or
denominator is off by more than 1e-2.
"""

import inspect
import math
from array import array
from dataclasses import asdict
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from conftest import FAST, SCRIPTS, script, tiny_flags
from hypothesis import given, settings
from hypothesis import strategies as st

from common.batches import flat_batch
from common.rewards import BUILT_IN, accuracy

TIGHT = {"rtol": 0, "atol": 1e-12}
NAN = math.nan
sft, dpo, grpo = script("sft"), script("dpo"), script("grpo")


def f64(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def close(actual, expected, **tolerance):
    expected = expected if isinstance(expected, torch.Tensor) else torch.tensor(expected, dtype=torch.float64)
    actual = actual.detach() if isinstance(actual, torch.Tensor) else torch.tensor(actual, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, **(tolerance or TIGHT))


# ---- sft -----------------------------------------------------------------------------------------


def sft_loss(logprobs):
    return sft.sft_loss({"logprobs": logprobs}, sft.Args())  # more of it in test_sft_losses.py


def test_sft_loss_is_the_sum_of_negative_logprobs():
    logprobs = f64(-0.5, -1.25, -2.0, 0.0, grad=True)
    loss = sft_loss(logprobs)
    close(loss, 3.75)  # 0.5 + 1.25 + 2 + 0: a sum, the division by num_tokens is main's
    loss.backward()
    close(logprobs.grad, f64(-1, -1, -1, -1))


def test_sft_loss_adds_up_over_any_cut():
    logprobs = torch.randn(11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for cut in range(12):
        close(sft_loss(logprobs[:cut]) + sft_loss(logprobs[cut:]), sft_loss(logprobs))


# ---- dpo -----------------------------------------------------------------------------------------
#             chosen                     rejected
# pair 0      pi -10, ref -12: +2        pi -11, ref -10: -1
# pair 1      pi  -8, ref  -8:  0        pi  -9, ref -14: +5
PAIRS = (-10.0, -11.0, -8.0, -9.0), (-12.0, -10.0, -8.0, -14.0)


def dpo_args(**more):
    return dpo.Args(**more)  # beta 0.1, sigmoid


def dpo_loss(logprobs, ref, args):
    """Completions of one token: where a loss divides by their lengths, it divides by 1."""
    return dpo.dpo_loss(logprobs, ref, torch.ones_like(ref), None, args)


def test_dpo_loss_value_metrics_and_gradient():
    logprobs, ref = f64(*PAIRS[0], grad=True), f64(*PAIRS[1])
    loss, metrics = dpo_loss(logprobs, ref, dpo_args())
    # margins: 0.1 * (2 - -1) = 0.3 and 0.1 * (0 - 5) = -0.5
    losses = math.log(1 + math.exp(-0.3)), math.log(1 + math.exp(0.5))
    close(f64(*losses), [0.5543552444685271, 0.9740769841801067])
    close(loss, sum(losses))
    close(metrics["loss"], sum(losses))
    close(metrics["reward_chosen"], 0.2 + 0.0)
    close(metrics["reward_rejected"], -0.1 + 0.5)
    close(metrics["reward_margin"], 0.3 - 0.5)
    close(metrics["chosen_logprob"], -10.0 - 8.0)
    close(metrics["rejected_logprob"], -11.0 - 9.0)
    assert metrics["reward_acc"].item() == 1  # the first pair only
    assert not any(value.requires_grad for value in metrics.values())
    loss.backward()
    # d/dm -log sigmoid(m) = -sigmoid(-m); dm/d chosen = beta, dm/d rejected = -beta
    first, second = 0.1 / (1 + math.exp(0.3)), 0.1 / (1 + math.exp(-0.5))
    close(logprobs.grad, f64(-first, first, -second, second))


def test_dpo_loss_is_ln2_where_policy_and_reference_agree():
    loss, metrics = dpo_loss(f64(*PAIRS[0]), f64(*PAIRS[0]), dpo_args())
    close(loss, 2 * math.log(2))
    assert metrics["reward_margin"].item() == 0 and metrics["reward_acc"].item() == 0  # a tie is not a win


def test_dpo_loss_is_finite_and_linear_far_out():
    # -log sigmoid(m) -> -m for m -> -inf, 0 for +inf: 1 + e^1000 as written would overflow
    logprobs = f64(-10_000.0, 0.0, 0.0, -10_000.0, grad=True)
    loss, _ = dpo_loss(logprobs, f64(0, 0, 0, 0), dpo_args())
    close(loss, 1000.0 + 0.0)
    loss.backward()
    close(logprobs.grad, f64(-0.1, 0.1, 0, 0))


@pytest.mark.parametrize("loss_type", sorted(get_args(dpo.LossType)))
def test_every_dpo_loss_pushes_the_chosen_up_at_the_start(loss_type):
    """At a margin of 0 each loss of the table falls with the chosen log-prob and rises with the rejected one; but
    apo_down has nothing to say about the chosen one there, sft never about the rejected one, and discopop with its tau
    of 0.05 climbs, as in the paper's figure: d/dm = (1 - ln 2) / (4 tau) - 3/4 = 0.784."""
    logprobs = f64(-3.0, -4.0, grad=True)
    smoothing = 1e-3 if loss_type == "exo_pair" else 0
    loss, _ = dpo_loss(logprobs, f64(-3.0, -4.0), dpo_args(loss_type=(loss_type,), label_smoothing=smoothing))
    loss.backward()
    chosen, rejected = logprobs.grad.tolist()
    assert math.isfinite(loss.item())
    if loss_type == "discopop":
        return close(logprobs.grad, f64(1, -1) * 0.1 * ((1 - math.log(2)) / 0.2 - 0.75))
    assert chosen < 0 or loss_type == "apo_down" and abs(chosen) < 1e-12
    assert rejected > 0 or loss_type == "sft" and rejected == 0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[st.floats(-50, 0)] * 4), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_dpo_loss_does_not_depend_on_the_order_of_pairs(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    sums = []
    for rows in pairs, shuffled:
        table = torch.tensor(rows, dtype=torch.float64)
        loss, metrics = dpo_loss(table[:, :2].flatten(), table[:, 2:].flatten(), dpo_args())
        sums.append([loss, *metrics.values()])
    for a, b in zip(*sums, strict=True):
        close(a, b, rtol=1e-12, atol=1e-9)  # sums of up to 5 numbers of up to 50, in two orders


# ---- grpo ----------------------------------------------------------------------------------------
# Six tokens in three sequences; A = 2, -1, 0.5; epsilon 0.2 on both sides.
#   seq   ratio   A      ratio A   clipped A   min      token loss   d loss / d logprob
#   0     1.5     2      3.0       2.4         2.4      -2.4         0        above 1.2 with A > 0: clipped
#   1     1.5    -1     -1.5      -1.2        -1.5       1.5         1.5      above 1.2 with A < 0: must come back
#   1     0.5    -1     -0.5      -0.8        -0.8       0.8         0        below 0.8 with A < 0: clipped
#   1     1.1    -1     -1.1      -1.1        -1.1       1.1         1.1
#   2     0.5     0.5    0.25      0.4         0.25     -0.25       -0.25     below 0.8 with A > 0: must come back
#   2     1.0     0.5    0.5       0.5         0.5      -0.5        -0.5
RATIOS, SEQ, ADVANTAGES = (1.5, 1.5, 0.5, 1.1, 0.5, 1.0), (0, 1, 1, 1, 2, 2), (2.0, -1.0, 0.5)
TOKEN_LOSS, TOKEN_GRAD = (-2.4, 1.5, 0.8, 1.1, -0.25, -0.5), (0.0, 1.5, 0.0, 1.1, -0.25, -0.5)
WEIGHT = {"rtol": 0, "atol": 1e-7}  # the grpo normaliser divides by integer lengths, which torch does in float32
NORMS = {  # weight of each token: 10 tokens and 4 sequences in the whole step, max_completion_length 8
    "dapo": [1 / 10] * 6,
    "grpo": [1 / 4, 1 / 12, 1 / 12, 1 / 12, 1 / 8, 1 / 8],  # 1 / (own length x 4)
    "dr_grpo": [1 / 32] * 6,  # 1 / (8 x 4)
}


def grpo_args(**more):
    default = {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": None, "beta": 0.0, "max_completion_length": 8,
               "old_logprobs": "policy", "ratio_cap": 2.0}
    return SimpleNamespace(**(asdict(grpo.Args()) | default | more))


def surrogate(ratios=RATIOS, seq=SEQ, advantages=ADVANTAGES, ref=None, num_tokens=10, num_seqs=4, **args):
    """grpo_loss at the given ratios -> loss, metrics, d loss / d logprobs."""
    old = torch.linspace(-3, -1, len(ratios), dtype=torch.float64)
    logprobs = (old + f64(*ratios).log()).requires_grad_()
    batch = {"old_logprobs": old, "sampler_logprobs": old, "advantage": f64(*advantages), "seq": torch.tensor(seq)}
    if ref is not None:
        batch["ref_logprobs"] = logprobs.detach() + f64(*ref)  # given as log(ref / pi)
    loss, metrics = grpo.grpo_loss(logprobs, batch, num_tokens, num_seqs, grpo_args(**args))
    loss.backward()
    assert not any(value.requires_grad for value in metrics.values())
    return loss.item(), metrics, logprobs.grad


@pytest.mark.parametrize("loss_type", sorted(NORMS))
def test_grpo_loss_value_metrics_and_gradient(loss_type):
    loss, metrics, grad = surrogate(loss_type=loss_type)
    weights = NORMS[loss_type]
    close(loss, sum(w * x for w, x in zip(weights, TOKEN_LOSS)), **WEIGHT)
    close(grad, [w * x for w, x in zip(weights, TOKEN_GRAD)], **WEIGHT)
    close(metrics["ratio_mean"], 6.1)
    assert metrics["clip_frac"].item() == 2  # sums over tokens: main divides


def test_grpo_normalisers_as_decimals():
    """The same three sums in plain decimals, so that an error in the table above cannot hide in both."""
    close(surrogate(loss_type="dapo")[0], 0.025)  # 0.25 / 10
    close(surrogate(loss_type="grpo")[0], -0.4104166666666667, **WEIGHT)  # (-2.4 / 1 + 3.4 / 3 - 0.75 / 2) / 4
    close(surrogate(loss_type="dr_grpo")[0], 0.0078125)  # 0.25 / 32


def test_every_normaliser_of_the_table_is_covered():
    loss_types = get_args(grpo.Args.__annotations__["loss_type"])
    assert {*loss_types} == {*NORMS, "cispo"}  # dapo's, under another loss: test_grpo_losses.py


def test_grpo_normalisers_count_the_whole_step():
    """Two micro-batches with the step's global counts add up to the step computed at once."""
    for loss_type in NORMS:
        whole = surrogate(loss_type=loss_type)[0]
        first = surrogate(RATIOS[:4], SEQ[:4], ADVANTAGES[:2], loss_type=loss_type)[0]
        second = surrogate(RATIOS[4:], (0, 0), ADVANTAGES[2:], loss_type=loss_type)[0]
        close(first + second, whole)


def test_clip_higher_moves_the_upper_side_only():
    loss, metrics, grad = surrogate(epsilon_high=0.6, num_tokens=1)
    close(loss, -3.0 + 1.5 + 0.8 + 1.1 - 0.25 - 0.5)  # 1.5 is inside 1.6 now
    close(grad, [-3.0, 1.5, 0.0, 1.1, -0.25, -0.5])
    assert metrics["clip_frac"].item() == 1


def test_epsilon_high_of_zero_is_not_the_default():
    """0 is a value: no ratio above 1 earns anything."""
    loss, _, grad = surrogate((1.1, 0.9), (0, 0), (1.0,), epsilon_high=0.0, num_tokens=1)
    close(loss, -1.0 - 0.9)
    close(grad, [0.0, -0.9])


@settings(deadline=None, max_examples=100)
@given(st.floats(0.05, 5), st.floats(-3, 3).filter(lambda a: abs(a) > 0.01))
def test_clipping_stops_the_gradient_on_one_side_only(ratio, advantage):
    _, metrics, grad = surrogate((ratio,), (0,), (advantage,), num_tokens=1)
    pushed_out = ratio > 1.2 if advantage > 0 else ratio < 0.8
    close(grad, [0.0 if pushed_out else -advantage * ratio], rtol=1e-9, atol=1e-12)  # exp(log x) loses an ulp or two
    assert metrics["clip_frac"].item() == pushed_out


@pytest.mark.parametrize("loss_type", sorted(NORMS))
def test_ratio_of_one_gives_the_gradient_of_reinforce(loss_type):
    """On-policy, d loss / d logprob = -A times the token's weight: nothing is clipped, whatever epsilon."""
    loss, _, grad = surrogate((1.0,) * 6, loss_type=loss_type, epsilon=0.0)
    advantages = [ADVANTAGES[s] for s in SEQ]
    close(grad, [-a * w for a, w in zip(advantages, NORMS[loss_type])], **WEIGHT)
    close(loss, -sum(a * w for a, w in zip(advantages, NORMS[loss_type])), **WEIGHT)


def test_ratios_to_the_sampler_are_capped():
    """A < 0 is where the surrogate grows with the ratio without end: at 3 it counts as 2 and gives no gradient."""
    ratios, advantages = (3.0, 1.9, 3.0), (-1.0,)
    loss, _, grad = surrogate(ratios, (0, 0, 0), advantages, num_tokens=1, old_logprobs="sampler")
    close(loss, 2.0 + 1.9 + 2.0)
    close(grad, [0.0, 1.9, 0.0])
    close(surrogate(ratios, (0, 0, 0), advantages, num_tokens=1)[0], 3.0 + 1.9 + 3.0)


def test_k3_value_and_gradient():
    # d = log(ref / pi):  k3 = e^d - d - 1,  d k3 / d logprob = 1 - e^d
    ref = (0.0, 0.5, -0.5, 1.0, -2.0, 0.1)
    kl = [math.exp(d) - d - 1 for d in ref]
    close(f64(*kl[1:3]), [0.14872127070012819, 0.10653065971263342])
    loss, metrics, grad = surrogate((1.0,) * 6, advantages=(0.0, 0.0, 0.0), ref=ref, beta=0.3)
    close(metrics["kl"], sum(kl))
    close(loss, 0.3 * sum(kl) / 10)
    close(grad, [0.3 * (1 - math.exp(d)) / 10 for d in ref])


def test_k3_joins_the_surrogate_under_every_normaliser():
    for loss_type, weights in NORMS.items():
        loss, _, grad = surrogate(ref=(0.5,) * 6, beta=0.2, loss_type=loss_type)
        kl, slope = math.exp(0.5) - 1.5, 1 - math.exp(0.5)
        close(loss, sum(w * (x + 0.2 * kl) for w, x in zip(weights, TOKEN_LOSS)), **WEIGHT)
        close(grad, [w * (x + 0.2 * slope) for w, x in zip(weights, TOKEN_GRAD)], **WEIGHT)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6))
def test_k3_is_never_negative_and_zero_only_at_equality(ref):
    ones, seq = (1.0,) * len(ref), (0,) * len(ref)
    kl = surrogate(ones, seq, (0.0,), ref=ref, beta=1.0)[1]["kl"].item()
    # e^d - d - 1 >= d^2 / (2 + 2 |d|) on both sides; 1e-14 a token: rounding of e^d near 1
    assert kl >= sum(d * d / (2 + 2 * abs(d)) for d in ref) - 1e-14 * len(ref) - 1e-9 * kl
    equal = surrogate(ones, seq, (0.0,), ref=(0.0,) * len(ref), beta=1.0)
    assert equal[1]["kl"].item() == 0 and equal[0] == 0


@pytest.mark.parametrize("loss_type", sorted(NORMS))
@pytest.mark.parametrize("distance", (50.0, -50.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_far_log_ratios_stay_finite(loss_type, distance, dtype):
    """e^50 = 5e21 squared would leave float32; one such token must not end a run."""
    logprobs = torch.full((4,), -60.0 + distance, dtype=dtype, requires_grad=True)
    others = torch.full((4,), -60.0, dtype=dtype)
    batch = dict.fromkeys(("old_logprobs", "sampler_logprobs", "ref_logprobs"), others)
    batch["advantage"] = torch.tensor([1.0, -1.0], dtype=dtype)
    batch["seq"] = torch.tensor([0, 0, 1, 1])
    args = grpo_args(loss_type=loss_type, beta=0.1)
    loss, metrics = grpo.grpo_loss(logprobs, batch, 4, 2, args)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_grpo_loss_does_not_depend_on_the_order_of_tokens(data):
    size = data.draw(st.integers(1, 8))
    ratios = data.draw(st.lists(st.floats(0.3, 3), min_size=size, max_size=size))
    drawn = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    seq = [sorted(set(drawn)).index(number) for number in drawn]  # no completion is empty
    ref = data.draw(st.lists(st.floats(-1, 1), min_size=size, max_size=size))
    where = data.draw(st.permutations(range(size)))
    for loss_type in NORMS:
        plain = surrogate(ratios, seq, ADVANTAGES, ref, loss_type=loss_type, beta=0.1)
        moved = surrogate(*([x[i] for i in where] for x in (ratios, seq)), ADVANTAGES, [ref[i] for i in where],
                          loss_type=loss_type, beta=0.1)  # fmt: skip
        close(moved[0], plain[0], rtol=1e-9, atol=1e-12)  # `old` differs by position, so log-ratios round apart
        close(moved[2], plain[2][list(where)], rtol=1e-9, atol=1e-12)


# ---- advantages ----------------------------------------------------------------------------------


def advantages(rewards, scale, dtype=torch.float64):
    table = torch.tensor(rewards, dtype=dtype)
    result = grpo.compute_advantages(table, SimpleNamespace(scale_rewards=scale))
    assert result.shape == table.shape and result.isfinite().all()
    return result


def test_group_advantages():
    # (1, 0, 0, 1): mean 0.5, std sqrt(4 * 0.25 / 3); (0, 0, 0, 2): mean 0.5, std sqrt((3 * 0.25 + 2.25) / 3) = 1
    got = advantages([[1, 0, 0, 1], [0, 0, 0, 2]], "group")
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-4), 0.5 / (1 + 1e-4)
    close(got, [[a, -a, -a, a], [-b, -b, -b, 3 * b]])


def test_batch_advantages():
    # centred by the group's mean, divided by the deviation of all eight
    rewards = [[1, 0, 0, 1], [0, 0, 0, 2]]
    flat = [1, 0, 0, 1, 0, 0, 0, 2]  # mean 0.5; sum of squares 2 * 0.25 + 5 * 0.25 + 2.25 = 4; over n - 1 = 7
    assert sum((x - 0.5) ** 2 for x in flat) == 4
    std = math.sqrt(4 / 7) + 1e-4
    wanted = [[0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std], [-0.5 / std, -0.5 / std, -0.5 / std, 1.5 / std]]
    close(advantages(rewards, "batch"), wanted)


def test_unscaled_advantages():
    close(advantages([[1, 0, 0, 1], [0, 0, 0, 2]], "none"), [[0.5, -0.5, -0.5, 0.5], [-0.5, -0.5, -0.5, 1.5]])


def test_a_missing_reward_is_in_no_statistic():
    # (1, 0, nan): mean 0.5 and std sqrt(0.5) of two values; the third learns nothing
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    close(advantages([[1, 0, NAN]], "group"), [[a, -a, 0]])
    close(advantages([[1, 0, NAN]], "none"), [[0.5, -0.5, 0]])
    # batch: four values 1 0 3 3, mean 1.75, squares 0.5625 + 3.0625 + 2 * 1.5625 = 6.75, over 3
    std = math.sqrt(6.75 / 3) + 1e-4
    close(advantages([[1, 0, NAN], [3, 3, NAN]], "batch"), [[0.5 / std, -0.5 / std, 0], [0, 0, 0]])


@pytest.mark.parametrize("scale", ("group", "batch", "none"))
@pytest.mark.parametrize("rewards", (
    [[NAN, 1.0, NAN]],  # one valid reward: it is its own mean
    [[NAN, NAN, NAN]],  # none: a reward function that failed on everything; check_rollout must get to say so
    [[2.0, 2.0, 2.0]],  # all equal
    [[0.0, 0.0, 0.0], [NAN, NAN, NAN]],
))  # fmt: skip
def test_groups_without_differences_teach_nothing(rewards, scale):
    close(advantages(rewards, scale), torch.zeros(len(rewards), 3, dtype=torch.float64))


@pytest.mark.parametrize("scale", ("group", "batch"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_equal_rewards_that_no_float_holds_teach_nothing(scale, dtype):
    """The mean of seven times 0.7 is not 0.7 in float32: divided by a deviation of 6e-8 + 1e-4, the rounding of the
    mean would push all seven the same way, by 6e-4. (Over the batch's deviation of 0.3 it is 2e-7.)"""
    got = advantages([[0.1] * 7, [0.7] * 7], scale, dtype)
    close(got.double(), torch.zeros(2, 7, dtype=torch.float64), rtol=0, atol=1e-6)


reward_tables = st.integers(2, 5).flatmap(
    lambda n: st.lists(st.lists(st.floats(-4, 4) | st.just(NAN), min_size=n, max_size=n), min_size=1, max_size=4)
)


@pytest.mark.parametrize("scale", ("group", "batch", "none"))
@settings(deadline=None, max_examples=60)
@given(rewards=reward_tables, shift=st.floats(-8, 8))
def test_a_constant_added_to_all_rewards_changes_nothing(scale, rewards, shift):
    if all(math.isnan(x) for row in rewards for x in row):
        rewards = [[0.0] * len(row) for row in rewards]  # nothing valid at all is a test of its own above
    plain = advantages(rewards, scale)
    moved = advantages([[x + shift for x in row] for row in rewards], scale)
    # x + shift rounds at 1e-15, and dividing by 1e-4 at the least makes that 1e-11
    close(moved, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", ("group", "batch", "none"))
@settings(deadline=None, max_examples=60)
@given(rewards=reward_tables, data=st.data())
def test_advantages_move_with_their_rows(scale, rewards, data):
    if all(math.isnan(x) for row in rewards for x in row):
        rewards = [[0.0] * len(row) for row in rewards]
    rows = data.draw(st.permutations(range(len(rewards))))
    columns = data.draw(st.permutations(range(len(rewards[0]))))
    plain = advantages(rewards, scale)[list(rows)][:, list(columns)]
    close(advantages([[rewards[i][j] for j in columns] for i in rows], scale), plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", ("group", "batch", "none"))
def test_advantages_sum_to_zero_in_every_group(scale):
    rewards = [[1.0, 0.25, NAN, -3.0], [0.0, 0.0, 0.0, 1.0]]
    close(advantages(rewards, scale).sum(1), [0.0, 0.0])


# ---- rewards -------------------------------------------------------------------------------------


def chat(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("completion, answer, reward", (
    ("48 + 24 = 72\n#### 72", "72", 1),
    ("#### 1,234", "1234", 1),
    ("#### 1234", "He has 5 * 2 = 10.\n#### 1,234", 1),  # GSM8K's answer column: reasoning, then ####
    ("#### 1,234,567.50", "1234567.5", 1),
    ("so \\boxed{7}", "7", 1),
    ("\\boxed{8} ... no, \\boxed{7}", "7", 1),  # the last box counts
    ("\\boxed{7} is what I said, and 9 I did not", "7", 1),
    ("\\boxed{9}\n#### 7", "7", 1),  # #### goes before a box
    ("The answer is 7.", "7", 1),
    ("The answer is 7.", "7.0", 1),
    ("first 5, then 6, in all 11", "11", 1),
    ("first 5, then 6, in all 11", "6", 0),
    ("#### -3", "-3", 1),
    ("#### -3", "3", 0),
    ("#### 0.5", "0.5", 1),
    ("#### 0.50", ".5", 1),  # a decimal without its zero
    ("#### .5", "0.5", 1),
    ("#### $12", "12", 1),
    ("#### 12 apples", "12", 1),
    ("#### 72 or #### 73", "73", 1),
    ("no number", "7", 0),
    ("", "7", 0),
    ("#### seven", "7", 0),  # an empty mark is an answer without a number, not a licence to search elsewhere
    ("7 #### ", "7", 0),
    ("7", 7, 1),  # columns may hold numbers
    ("0", 0, 1),  # also this one
    ("7", 0, 0),
    ("7.5", 7.5, 1),
    ("anything 3", None, None),  # no gold, no reward: not 0
    ("anything 3", "no number here", None),
))  # fmt: skip
def test_accuracy(completion, answer, reward):
    for wrap in str, chat:
        got = accuracy(["?"], [wrap(completion)], answer=[answer])
        assert got == [reward], (wrap, got)
    gold = chat(answer) if isinstance(answer, str) else answer
    assert accuracy(["?"], [completion], solution=[gold]) == [reward]


def test_accuracy_takes_lists_and_ignores_other_columns():
    prompts, completions = [chat("?")] * 3, ["#### 1", "#### 2", "#### 3"]
    assert accuracy(prompts, completions, answer=["1", "0", None], level=["a", "b", "c"]) == [1.0, 0.0, None]
    assert accuracy(prompts=prompts, completions=completions) == [None] * 3  # no column with the answer
    assert accuracy(prompts, completions, answer=["1"] * 3, solution=["9"] * 3) == [1.0, 0.0, 0.0]
    assert accuracy([], [], answer=[]) == []


@pytest.mark.parametrize("completion, reward", (
    ("4+4=8 #### 1458", 1),
    ("#### 1,458\n", 1),
    ("####-3.5", 1),
    ("#### 1458 and more", 0),
    ("1458", 0),
    ("####", 0),
    ("#### ,", 0),  # punctuation is no number: a policy would find this out
    ("#### .", 0),
    ("### 7", 0),
    ("", 0),
))  # fmt: skip
def test_format(completion, reward):
    assert BUILT_IN["format"](["?"], [completion]) == [reward]
    assert BUILT_IN["format"](["?"], [chat(completion)], answer=["1458"]) == [reward]


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60), st.text(max_size=60) | st.none() | st.integers() | st.floats())
def test_rewards_survive_any_text(completion, answer):
    for completions in [completion], [chat(completion)]:
        assert accuracy(["?"], completions, answer=[answer])[0] in (None, 0.0, 1.0)
        assert BUILT_IN["format"](["?"], completions)[0] in (0.0, 1.0)


@settings(deadline=None, max_examples=100)
@given(st.integers(-(10**9), 10**9))
def test_accuracy_finds_an_integer_however_it_is_written(n):
    for text in f"#### {n}", f"#### {n:,}", f"\\boxed{{{n}}}", f"it is {n}.", f"#### {n}.00":
        assert accuracy(["?"], [text], answer=[str(n)]) == [1.0], text
        assert accuracy(["?"], [text], answer=[str(n + 1)]) == [0.0], text


# ---- no wait for a GPU ---------------------------------------------------------------------------

SHAPES = {  # flags of other roads through a loss
    "dpo": ["--use_weighting", "--ld_alpha", "0.5"],
    "experimental/cpo": ["--loss_type", "simpo"],
    "experimental/gdpo": ["--loss_type", "grpo", "--importance_sampling_level", "sequence"],
    "grpo": ["--loss_type", "grpo", "--importance_sampling_level", "sequence"],
    "experimental/grpo_sequence": ["--loss_type", "gmpo", "--importance_sampling_level", "token",
                                   "--off_policy_mask_threshold", "0.1"],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_loss_does_not_ask_a_gpu(name):
    """On the meta device tensors have no values: whatever would wait for a GPU to know a number, a count or a maximum
    (bincount, a mask as an index, item) fails there. The backward pass is queued while the forward still runs."""
    module = script(name)
    args = module.parse_args([*tiny_flags(name), *SHAPES.get(name, [])])
    counts = 3 if FAST[name]["data"] == "triples" else 2
    groups = []
    for row in range(2):
        completions = []
        for k in range(counts):
            entries = {"role": float(k), "ref_logprob": -1.0, "desirable": float(k), "advantage": 1.0}
            entries |= {"density_ratio": 1.0, "taught": 1.0}
            tokens = {x: torch.zeros(3) for x in ("old_logprobs", "sampler_logprobs", "ref_logprobs", "entropy")}
            ids = array("i", [5, 6, 7])
            completions.append({"ids": ids, "scored": None, "margin": 1.0} | entries | tokens)
        groups.append({"prompt": array("i", [1, 2]), "completions": completions, "row": row, "number": row})
    batch = flat_batch(groups, "meta")
    logprobs = torch.zeros(len(batch["seq"]), device="meta", requires_grad=True)
    out = dict.fromkeys(("logprobs", "mean_logprob", "sum_p2", "entropy"), logprobs)
    out |= {"divergence": logprobs, "teacher_logprobs": logprobs.detach()}
    out["rewards"] = torch.zeros(batch["num_seqs"], device="meta", requires_grad=True)
    policy = lambda batch, want=(): out  # noqa: E731
    known = {"policy": policy, "reference": policy, "batch": batch, "args": args, "out": out, "logprobs": logprobs}
    known |= {"num_tokens": 12, "num_completions": 4}
    known |= {"num_seqs": 4, "num_spans": 12, "kl": 0.1, "delta": 0.1, "threshold": 0.5, "coef": 0.1}
    known |= {"rewards": torch.zeros(2, 2, device="meta"), "step_logits": logprobs, "is_right": logprobs.detach()}
    batch["weight"] = 1.0
    loss = getattr(module, f"{name.split('/')[-1]}_loss", None)
    forward = getattr(module, "forward", None)
    if forward and "teacher" not in inspect.signature(forward).parameters:  # else it needs a second model
        loss = forward
    if name == "experimental/dpo_batch":
        loss = module.per_completion
    result = loss(**{key: known[key] for key in inspect.signature(loss).parameters if key in known})
    assert all(x.is_meta for x in (result if isinstance(result, tuple) else [result]) if isinstance(x, torch.Tensor))
