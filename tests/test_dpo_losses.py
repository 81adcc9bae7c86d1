"""Every loss of the DPO family against the papers' formulas and against TRL 1.16.0, values and gradients.

PAPER holds the formulas once more: plain floats, one pair at a time, written from the papers and from nothing here.
Their derivatives are central differences. TRL's numbers stand in fixtures/trl_dpo.json (by benchmarks/trl_fixtures.py).
"""

import json
import math
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from conftest import ROOT, lone_run, newest, read_jsonl, script, tiny_rows, train, trainer_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import attempt, refused
from transformers import AutoModelForCausalLM

from common.runtime.flags import InputError
from common.tokenization import load_tokenizer, stop_ids

dpo, batch_dpo = script("dpo"), script("experimental/dpo_batch")
FIXTURE = json.loads((ROOT / "tests" / "fixtures" / "trl_dpo.json").read_text())
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # a few dozen float64 operations on numbers of size 10
SLOPE = {"rtol": 1e-6, "atol": 1e-7}  # central differences with h = 1e-5: errors of h^2 and of 1e-16 / h
ALL = sorted(get_args(dpo.LossType))
ALL_OF_BATCH = sorted(get_args(batch_dpo.LossType))
MARGINS = sorted(set(ALL) - dpo.POINTWISE)  # losses of a margin, under any divergence
BATCHED = "aot", "aot_unpaired", "kto_pair", "bco_pair"


def f64(values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def close(actual, expected, **tolerance):
    expected = expected if isinstance(expected, torch.Tensor) else f64(expected)
    actual = actual.detach() if isinstance(actual, torch.Tensor) else f64(actual)
    torch.testing.assert_close(actual.double(), expected.double(), **(tolerance or EXACT))


# ---- the papers ------------------------------------------------------------------------------------------------------


def sigma(x):
    return 1 / (1 + math.exp(-x))


def log_odds_loss(x):
    return math.log(1 + math.exp(-x))


# Of one pair: u = log pi / ref of the chosen (w) and the rejected (l) completion, n tokens, log pi itself, beta, eps.
PAPER = {
    # DPO, equation 7; cDPO: -(1 - eps) log sigma(beta h) - eps log sigma(-beta h)
    "sigmoid": lambda x: (1 - x.eps) * log_odds_loss(x.beta * (x.u_w - x.u_l))
    + x.eps * log_odds_loss(-x.beta * (x.u_w - x.u_l)),
    # Tulu 3: each log-ratio over its own length
    "sigmoid_norm": lambda x: (1 - x.eps) * log_odds_loss(x.beta * (x.u_w / x.n_w - x.u_l / x.n_l))
    + x.eps * log_odds_loss(-x.beta * (x.u_w / x.n_w - x.u_l / x.n_l)),
    "hinge": lambda x: max(0.0, 1 - x.beta * (x.u_w - x.u_l)),
    # IPO, equation 17: (h - 1 / (2 tau))^2, h per token
    "ipo": lambda x: (x.u_w / x.n_w - x.u_l / x.n_l - 1 / (2 * x.beta)) ** 2,
    # robust DPO: ((1 - eps) L(w, l) - eps L(l, w)) / (1 - 2 eps)
    "robust": lambda x: ((1 - x.eps) * log_odds_loss(x.beta * (x.u_w - x.u_l))
                         - x.eps * log_odds_loss(x.beta * (x.u_l - x.u_w))) / (1 - 2 * x.eps),
    # EXO: KL between softmax(beta u_w, beta u_l) and (1 - eps, eps)
    "exo_pair": lambda x: sum(q * math.log(q / p) for q, p in (
        (math.exp(x.beta * x.u_w) / (math.exp(x.beta * x.u_w) + math.exp(x.beta * x.u_l)), 1 - x.eps),
        (math.exp(x.beta * x.u_l) / (math.exp(x.beta * x.u_w) + math.exp(x.beta * x.u_l)), x.eps))),
    # NCA with rewards 1 and 0 of two answers: -log sigma(r_w) - 1/2 sum over both of log sigma(-r)
    "nca_pair": lambda x: log_odds_loss(x.beta * x.u_w)
    + 0.5 * (log_odds_loss(-x.beta * x.u_w) + log_odds_loss(-x.beta * x.u_l)),
    # BCO, the binary classifier, here with delta = 0
    "bco_pair": lambda x: -math.log(sigma(x.beta * x.u_w - x.delta)) - math.log(sigma(-(x.beta * x.u_l - x.delta))),
    # SPPO with win probabilities 1 and 0: eta = 1 / beta
    "sppo_hard": lambda x: (x.u_w - 0.5 / x.beta) ** 2 + (x.u_l + 0.5 / x.beta) ** 2,
    "apo_zero": lambda x: 1 - sigma(x.beta * x.u_w) + sigma(x.beta * x.u_l),
    "apo_down": lambda x: sigma(x.beta * x.u_w) + 1 - sigma(x.beta * x.u_w - x.beta * x.u_l),
    # DiscoPOP (LRML): (1 - m) log(1 + e^-x) + m e^-x, m = sigma(x / tau)
    "discopop": lambda x: (1 - sigma(x.beta * (x.u_w - x.u_l) / x.tau)) * log_odds_loss(x.beta * (x.u_w - x.u_l))
    + sigma(x.beta * (x.u_w - x.u_l) / x.tau) * math.exp(-x.beta * (x.u_w - x.u_l)),
    # Iterative RPO and MPO: - log pi(y_w) / |y_w|
    "sft": lambda x: -x.pi_w / x.n_w,
}  # fmt: skip
SCORES = {  # f-DPO: f'(t) of t = pi / ref, constants left out (they cancel in the margin)
    "reverse_kl": lambda u, alpha: math.log(math.exp(u)),
    "forward_kl": lambda u, alpha: 1 - 1 / math.exp(u),
    "js_divergence": lambda u, alpha: math.log(2 * math.exp(u) / (1 + math.exp(u))),
    # the paper's (1 - t^-a) / a with a = 1 - alpha
    "alpha_divergence": lambda u, alpha: (1 - math.exp(u) ** (alpha - 1)) / (1 - alpha),
}
#            log pi          log ref         tokens
CHOSEN = ((-10.0, -12.0, 4), (-8.0, -8.5, 2), (-3.0, -2.2, 5))
REJECTED = ((-11.0, -10.0, 3), (-9.4, -13.0, 6), (-4.7, -4.1, 1))


def paper_loss(names, weights, chosen, rejected, divergence="reverse_kl", alpha=0.5, **constants):
    """-> loss of every pair."""
    out, constants = [], {"beta": 0.1, "eps": 0.0, "tau": 0.05, "delta": 0.0} | constants
    for (pi_w, ref_w, n_w), (pi_l, ref_l, n_l) in zip(chosen, rejected):
        u_w, u_l = (SCORES[divergence](pi - ref, alpha) for pi, ref in ((pi_w, ref_w), (pi_l, ref_l)))
        x = SimpleNamespace(u_w=u_w, u_l=u_l, n_w=n_w, n_l=n_l, pi_w=pi_w, **constants)
        out.append(sum(w * PAPER[name](x) for name, w in zip(names, weights)))
    return out


def slopes(loss, chosen, rejected, h=1e-5):
    """d sum(loss) / d log pi by central differences, chosen and rejected in turn."""
    pairs, result = [list(chosen), list(rejected)], []
    for k, side in product(range(len(chosen)), (0, 1)):
        ends = []
        for sign in 1, -1:
            moved = [list(half) for half in pairs]
            pi, *rest = moved[side][k]
            moved[side][k] = (pi + sign * h, *rest)
            ends.append(sum(loss(*moved)))
        result.append((ends[0] - ends[1]) / (2 * h))
    return result


def ours(module, chosen=CHOSEN, rejected=REJECTED, last=None, **flags):
    """-> loss of all pairs, metrics, d loss / d log pi: the script's own function in float64."""
    pi, ref, n = (f64([x[i] for pair in zip(chosen, rejected) for x in pair]) for i in range(3))
    pi.requires_grad_()
    loss_fn = module.dpo_loss if module is dpo else module.dpo_batch_loss
    loss, metrics = loss_fn(pi, ref, n, last, module.Args(**flags))
    (slope,) = torch.autograd.grad(loss, pi)
    return loss.detach(), metrics, slope


def spelled(name, eps, **more):
    return {"loss_type": (name,), "label_smoothing": eps, **more}


@pytest.mark.parametrize("beta", (0.1, 0.7))
@pytest.mark.parametrize("name", ALL)
def test_losses(name, beta):
    """Three pairs: chosen better than its reference, equal-ish, worse; lengths differ."""
    for eps in (0.1, 0.3) if name == "exo_pair" else (0.0, 0.1) if name in dpo.SMOOTHED else (0.0,):
        loss, _, slope = ours(dpo, **spelled(name, eps, beta=beta))
        expected = partial(paper_loss, [name], [1.0], beta=beta, eps=eps)
        close(loss, sum(expected(CHOSEN, REJECTED)))
        close(slope, slopes(expected, CHOSEN, REJECTED), **SLOPE)


def test_some_losses_by_hand():
    """u = (2, -1) at beta 0.1 in decimals, so that an error in PAPER cannot hide in both."""
    pair = {"chosen": CHOSEN[:1], "rejected": REJECTED[:1]}
    expected = {
        "sigmoid": 0.5543552444685271,  # ln(1 + e^-0.3)
        "hinge": 0.7,  # 1 - 0.3
        "ipo": (2 / 4 + 1 / 3 - 5) ** 2,  # 17.36111
        "bco_pair": 0.5981388693815919 + 0.6443966600735709,  # ln(1 + e^-0.2) + ln(1 + e^-0.1)
        "sppo_hard": 9.0 + 16.0,  # (2 - 5)^2 + (-1 + 5)^2
        "apo_zero": 0.45016600268752216 + 0.47502081252106,  # sigma(-0.2) + sigma(-0.1)
        "sft": 2.5,  # 10 / 4
    }
    for name, value in expected.items():
        close(ours(dpo, loss_type=(name,), **pair)[0], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("divergence", sorted(SCORES))
@pytest.mark.parametrize("name", MARGINS)
def test_divergences(name, divergence):
    eps = 0.1 if name == "exo_pair" else 0.0
    for alpha in (0.2, 0.5, 1.5) if divergence == "alpha_divergence" else (0.5,):
        more = {"f_divergence_type": divergence, "f_alpha_divergence_coef": alpha, "beta": 0.4}
        loss, _, slope = ours(dpo, **spelled(name, eps, **more))
        expected = partial(paper_loss, [name], [1.0], eps=eps, divergence=divergence, alpha=alpha, beta=0.4)
        close(loss, sum(expected(CHOSEN, REJECTED)))
        close(slope, slopes(expected, CHOSEN, REJECTED), **SLOPE)


def test_alpha_divergence_has_forward_and_reverse_kl_as_its_ends():
    for alpha, end in (1e-12, "forward_kl"), (1 - 1e-9, "reverse_kl"):
        one = ours(dpo, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha)[0]
        close(one, ours(dpo, f_divergence_type=end)[0], rtol=1e-6, atol=0)


MIXES = {  # rows 41 to 45 of TRL's history
    "RPO": (("sigmoid", "sft"), (1.0, 0.005)),
    "Iterative RPO": (("sigmoid", "sft"), ()),
    "MPO": (("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0)),
    "any": (("ipo", "nca_pair", "hinge", "sigmoid"), (0.5, 2.0, -0.25, 0.0)),
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix):
    names, weights = MIXES[mix]
    loss, metrics, slope = ours(dpo, loss_type=names, loss_weights=weights)
    expected = partial(paper_loss, names, weights or (1.0,) * len(names))
    close(loss, sum(expected(CHOSEN, REJECTED)))
    close(metrics["loss"], loss)
    close(slope, slopes(expected, CHOSEN, REJECTED), **SLOPE)


def test_robust_is_unbiased_under_flipped_labels():
    """The mean over labels that are wrong with probability eps is the loss of the right ones."""
    right, wrong = (ours(dpo, chosen=a, rejected=b, **spelled("robust", 0.2))[0]
                    for a, b in ((CHOSEN, REJECTED), (REJECTED, CHOSEN)))  # fmt: skip
    close(0.8 * right + 0.2 * wrong, ours(dpo)[0])


def test_pairs_are_weighted_by_both_completions():
    weights = f64([0.5, 0.8, 1.5, 0.1, 1.0, 2.0])
    for names in ("sigmoid",), ("hinge", "bco_pair"):
        loss, _, slope = ours(dpo, last=weights, loss_type=names)
        each = paper_loss(names, (1.0, 1.0), CHOSEN, REJECTED)
        close(loss, 0.5 * 0.8 * each[0] + 1.5 * 0.1 * each[1] + 1.0 * 2.0 * each[2])
        close(slope, ours(dpo, loss_type=names)[2] * f64([0.4, 0.4, 0.15, 0.15, 2.0, 2.0]))


# ---- losses over the whole step --------------------------------------------------------------------------------------


def aot(chosen, rejected, paired, beta=0.1, eps=0.0):
    """AOT: the k-th smallest of one sample against the k-th smallest of the other."""
    if paired:
        one = sorted(w[0] - r[0] for w, r in zip(chosen, rejected))
        other = sorted(w[1] - r[1] for w, r in zip(chosen, rejected))
    else:
        one, other = (sorted(x[0] - x[1] for x in half) for half in (chosen, rejected))
    pairs = [beta * (a - b) for a, b in zip(one, other)]
    return [(1 - eps) * log_odds_loss(d) + eps * log_odds_loss(-d) for d in pairs]


def kto_pair(chosen, rejected, beta=0.1, fixed=None):
    """KTO: each half's mean u, not below 0, is the other half's point of reference. fixed: those means, held still."""
    u_w, u_l = ([x[0] - x[1] for x in half] for half in (chosen, rejected))
    kl_w, kl_l = fixed or (max(0.0, sum(u) / len(u)) for u in (u_w, u_l))
    wins, losses = ([1 - sigma(beta * (u - kl_l)) for u in u_w], [1 - sigma(beta * (kl_w - u)) for u in u_l])
    return [(a + b) / 2 for a, b in zip(wins, losses)]


@pytest.mark.parametrize("eps", (0.0, 0.2))
@pytest.mark.parametrize("name", ("aot", "aot_unpaired"))
def test_aot(name, eps):
    loss, _, slope = ours(batch_dpo, last=0.0, beta=0.5, **spelled(name, eps))
    expected = partial(aot, paired=name == "aot", beta=0.5, eps=eps)
    close(loss, sum(expected(CHOSEN, REJECTED)))
    close(slope, slopes(expected, CHOSEN, REJECTED), **SLOPE)
    assert abs(loss - ours(batch_dpo, last=0.0, beta=0.5, **spelled("sigmoid", eps))[0]) > 1e-3  # sorting did something


def test_kto_pair():
    # u_w = 2, 0.5, -0.8: mean 0.5667; u_l = -1, 3.6, -0.6: mean 0.6667
    loss, _, slope = ours(batch_dpo, last=0.0, loss_type=("kto_pair",))
    means = (2 + 0.5 - 0.8) / 3, (-1 + 3.6 - 0.6) / 3
    close(loss, sum(kto_pair(CHOSEN, REJECTED)))
    close(slope, slopes(partial(kto_pair, fixed=means), CHOSEN, REJECTED), **SLOPE)  # no gradient of the means
    down = [(pi - 30, ref, n) for pi, ref, n in REJECTED]  # a negative mean counts as 0
    close(ours(batch_dpo, last=0.0, rejected=down, loss_type=("kto_pair",))[0], sum(kto_pair(CHOSEN, down)))


@pytest.mark.parametrize("delta", (0.0, 0.35, -2.0))
def test_bco_pair_with_its_shift(delta):
    loss, _, slope = ours(batch_dpo, last=delta, loss_type=("bco_pair",))
    expected = partial(paper_loss, ["bco_pair"], [1.0], delta=delta)
    close(loss, sum(expected(CHOSEN, REJECTED)))
    close(slope, slopes(expected, CHOSEN, REJECTED), **SLOPE)


def test_the_rest_of_the_table_is_the_parents():
    for name in set(ALL) - {"bco_pair"}:
        eps = 0.1 if name == "exo_pair" else 0.0
        assert torch.equal(ours(dpo, **spelled(name, eps))[0], ours(batch_dpo, last=0.0, **spelled(name, eps))[0])
    assert set(ALL_OF_BATCH) == set(ALL) | set(BATCHED)


# ---- TRL -------------------------------------------------------------------------------------------------------------


def case_name(case):
    return " ".join(f"{k}={v}" for k, v in case["flags"].items()) + f" {case['batch']}"


def from_tokens(case):
    """-> mean loss over pairs and its gradient per token, through per_completion, of a case of the fixture."""
    flags = {k: tuple(v) if isinstance(v, list) else v for k, v in case["flags"].items()}
    module = batch_dpo if any(name.startswith("aot") for name in flags.get("loss_type", ())) else dpo
    args, data = module.Args(**{"loss_type": ("sigmoid",), **flags}), FIXTURE["batches"][case["batch"]]
    seq = torch.tensor([i for i, values in enumerate(data["logprobs"]) for _ in values])
    logprobs, ref, log_sum = (f64([x for values in data[key] for x in values]) for key in
                              ("logprobs", "ref_logprobs", "log_sum_p2"))  # fmt: skip
    logprobs.requires_grad_()
    batch, out = {"seq": seq, "num_seqs": len(data["logprobs"])}, {"logprobs": logprobs}
    ref_sums = module.per_completion({"logprobs": ref}, batch, args)[0]
    out |= {"sum_p2": log_sum.exp()} if args.use_weighting else {}
    sums, lengths, weights = module.per_completion(out, batch, args)
    if module is dpo:
        loss, _ = module.dpo_loss(sums, ref_sums, lengths, weights, args)
    else:
        loss, _ = module.dpo_batch_loss(sums, ref_sums, lengths, 0.0, args)
    loss = loss / (len(data["logprobs"]) // 2)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient


SAME = [case for case in FIXTURE["cases"] if case["flags"].get("loss_type") != ["sft"]]


@pytest.mark.parametrize("case", SAME, ids=case_name)
def test_trl(case):
    """The same value and the same gradient of every token."""
    loss, gradient = from_tokens(case)
    half = case["flags"].get("f_divergence_type") == "alpha_divergence"  # which TRL knows in float32 only
    tolerance = {"rtol": 2e-5, "atol": 1e-6} if half else EXACT
    if case["flags"].get("loss_type") == ["exo_pair"]:  # TRL rounds its epsilon of 0.1 to float32: by 1.5e-8
        tolerance = {"rtol": 2e-7, "atol": 1e-12} if not half else tolerance
    close(loss, case["loss"], **tolerance)
    if case["gradient"] is None:  # TRL cannot: its hinge with weights fails in backward
        assert case["flags"]["use_weighting"] and "inplace" in case["error"]
    else:
        close(gradient, [x for values in case["gradient"] for x in values], **tolerance)


def test_trl_averages_sft_over_tokens():
    """TRL: over all chosen tokens of the micro-batch, so that long answers weigh more; the papers: each answer by its
    length. With other lengths these are other numbers, and both are what their formula says."""
    (case,) = [case for case in FIXTURE["cases"] if case["flags"].get("loss_type") == ["sft"]]
    chosen = FIXTURE["batches"][case["batch"]]["logprobs"][::2]
    close(case["loss"], -sum(map(sum, chosen)) / sum(map(len, chosen)))
    loss, _ = from_tokens(case)
    close(loss, -sum(sum(values) / len(values) for values in chosen) / len(chosen))
    assert abs(loss - case["loss"]) > 0.01


def test_the_fixture_covers_all_that_trl_has():
    assert FIXTURE["trl"] == "1.16.0"
    names = {name for case in FIXTURE["cases"] for name in case["flags"].get("loss_type", ["sigmoid"])}
    assert names == set(ALL_OF_BATCH) - {"kto_pair"}
    divergences = get_args(dpo.Args.__annotations__["f_divergence_type"])
    assert {case["flags"].get("f_divergence_type", "reverse_kl") for case in SAME} == set(divergences)
    assert set(ALL) == set(PAPER) and set(divergences) == set(SCORES)


# ---- identities ------------------------------------------------------------------------------------------------------

LOGPROB = st.floats(-60, 0)
PAIRS = st.lists(st.tuples(*[LOGPROB] * 4, *[st.integers(1, 9)] * 2), min_size=1, max_size=6)


def halves(pairs):
    return [x[:3] for x in ((w, rw, n) for w, rw, _, _, n, _ in pairs)], [(r, rr, n) for _, _, r, rr, _, n in pairs]


def every(divergences=("reverse_kl",)):
    """(module, flags) of every loss, and under every divergence that it may have."""
    for name, divergence in product(ALL_OF_BATCH, divergences):
        if divergence == "reverse_kl" or name in MARGINS:
            module = batch_dpo if name in BATCHED else dpo
            yield module, spelled(name, 0.1 if name in module.SMOOTHED else 0.0, f_divergence_type=divergence)


@settings(deadline=None, max_examples=30)
@given(PAIRS, st.floats(0.01, 5))
def test_at_the_reference_the_loss_is_ln2_and_the_margin_0(pairs, beta):
    chosen, rejected = ([(ref, ref, n) for _, ref, n in half] for half in halves(pairs))
    for name in "sigmoid", "sigmoid_norm", "aot", "aot_unpaired":
        for divergence in sorted(SCORES) if name in MARGINS else ["reverse_kl"]:
            module = dpo if name in MARGINS else batch_dpo
            loss, metrics, _ = ours(module, chosen, rejected, 0.0 if module is batch_dpo else None, beta=beta,
                                    loss_type=(name,), f_divergence_type=divergence)  # fmt: skip
            close(loss, len(pairs) * math.log(2), rtol=1e-9, atol=1e-9)
            assert metrics["reward_margin"] == 0 and metrics["reward_acc"] == 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("signs", list(product((-50.0, 50.0), repeat=2)), ids=str)
def test_finite_at_log_ratios_of_50(signs, dtype):
    """e^50 squared is no number of float32; one such pair must not end a run. Under every divergence."""
    for module, flags in every(sorted(SCORES)):
        pi = torch.tensor([-60.0 + sign for sign in (*signs, 0.5, -0.5)], dtype=dtype, requires_grad=True)
        ref, ones = torch.full_like(pi, -60.0).detach(), torch.ones(4, dtype=dtype)
        loss_fn = module.dpo_loss if module is dpo else module.dpo_batch_loss
        for beta in 0.1, 2.0:
            last = None if module is dpo else 0.3
            loss, metrics = loss_fn(pi, ref, ones, last, module.Args(**flags, beta=beta))
            (slope,) = torch.autograd.grad(loss, pi)
            assert loss.isfinite() and slope.isfinite().all(), (flags, beta, loss, slope)
            assert all(value.isfinite() for value in metrics.values())


@settings(deadline=None, max_examples=20)
@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_of_pairs_changes_nothing(pairs, random):
    where = list(range(len(pairs)))
    random.shuffle(where)
    chosen, rejected = halves(pairs)
    for module, flags in every():
        last, shuffled = None if module is dpo else 0.3, ([half[i] for i in where] for half in (chosen, rejected))
        one, metrics, slope = ours(module, chosen, rejected, last, **flags)
        other, moved_metrics, moved = ours(module, *shuffled, last, **flags)
        close(other, one, rtol=1e-9, atol=1e-9)
        for name in metrics:
            close(moved_metrics[name], metrics[name], rtol=1e-9, atol=1e-9)
        if flags["loss_type"][0] not in ("aot", "aot_unpaired"):  # equal margins are ordered by place: a tie is free
            close(moved.view(-1, 2), slope.view(-1, 2)[where], rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=12)
@given(PAIRS, st.integers(0, 6))
def test_where_a_step_is_cut_changes_nothing(pairs, cut):
    """Sums over pairs add up over any cut; what does not (sorts, means) is in dpo_batch.py, which takes whole steps:
    there test_split compares runs."""
    chosen, rejected = halves(pairs)
    for module, flags in every(sorted(SCORES)):
        if module is dpo:
            whole, _, slope = ours(dpo, chosen, rejected, **flags)
            parts = [ours(dpo, chosen[part], rejected[part], **flags) for part in (slice(cut), slice(cut, None))
                     if chosen[part]]  # fmt: skip
            close(sum(part[0] for part in parts), whole, rtol=1e-9, atol=1e-9)
            close(torch.cat([part[2] for part in parts]), slope)


@settings(deadline=None, max_examples=30)
@given(PAIRS, st.floats(-20, 20))
def test_margins_ignore_what_both_completions_share(pairs, shift):
    """The same constant added to both log-ratios changes no loss of the margin."""
    chosen, rejected = halves(pairs)
    moved = [[(pi, ref + shift, n) for pi, ref, n in half] for half in (chosen, rejected)]
    for name in "sigmoid", "hinge", "robust", "exo_pair", "discopop":
        flags = spelled(name, 0.1 if name in dpo.SMOOTHED else 0.0)
        close(ours(dpo, *moved, **flags)[0], ours(dpo, chosen, rejected, **flags)[0], rtol=1e-8, atol=1e-8)


def test_a_uniform_reference_is_no_reference():
    """reference_free: the loss where log ref is the same for both, as 0 is."""
    free = [[(pi, 0.0, n) for pi, _, n in half] for half in (CHOSEN, REJECTED)]
    close(ours(dpo, *free)[0], sum(log_odds_loss(0.1 * (w[0] - x[0])) for w, x in zip(CHOSEN, REJECTED)))


# ---- per completion --------------------------------------------------------------------------------------------------


def test_per_completion_by_hand():
    """Completions of 3, 1, 2 and 2 tokens: beyond the shorter of a pair, LD-DPO's alpha counts."""
    logprobs = f64([-1.0, -2.0, -4.0, -8.0, -1.5, -0.5, -3.0, -0.25], grad=True)
    batch = {"seq": torch.tensor([0, 0, 0, 1, 2, 2, 3, 3]), "num_seqs": 4}
    sums, lengths, weights = dpo.per_completion({"logprobs": logprobs}, batch, dpo.Args())
    close(sums, [-7.0, -8.0, -2.0, -3.25])
    close(lengths, [3.0, 1.0, 2.0, 2.0])
    assert weights is None
    sums, lengths, _ = dpo.per_completion({"logprobs": logprobs}, batch, dpo.Args(ld_alpha=0.25))
    close(sums, [-1.0 - 0.25 * 6, -8.0, -2.0, -3.25])
    close(lengths, [3.0, 1.0, 2.0, 2.0])
    close(torch.autograd.grad(sums.sum(), logprobs)[0], [1, 0.25, 0.25, 1, 1, 1, 1, 1])


def test_wpo_weights_by_hand():
    """Two tokens with p = 0.5 of (0.5, 0.25, 0.25): log 0.5 - log 0.375 each, so the mean is the same; no gradient."""
    logprobs = f64([math.log(0.5)] * 2 + [math.log(0.25)], grad=True)
    out = {"logprobs": logprobs, "sum_p2": f64([0.375] * 3)}
    batch = {"seq": torch.tensor([0, 0, 1]), "num_seqs": 2}
    weights = dpo.per_completion(out, batch, dpo.Args(use_weighting=True))[2]
    close(weights, [0.5 / 0.375, 0.25 / 0.375])
    assert not weights.requires_grad


# ---- whole runs ------------------------------------------------------------------------------------------------------


def plain(rows, weights=None):
    """A file of pairs through the tiny model's own logits, one sequence at a time, where wanted with other weights:
    [(chosen, rejected)], each (log p (T,), sum_v p^2 (T,)) of the completion's tokens."""
    path = ROOT / "common" / "tiny" / "model"
    tokenizer, lm = load_tokenizer(str(path)), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    lm.load_state_dict(weights or {}, strict=False)
    args = dpo.Args()
    groups, _, _ = dpo.load_groups(rows, tokenizer, stop_ids(tokenizer, lm.generation_config), args, lone_run(args))
    scored = []
    for group in groups:
        for completion in group["completions"]:
            ids = torch.tensor([*group["prompt"], *completion["ids"]])
            with torch.no_grad():
                logp = lm(ids[None]).logits[0].double().log_softmax(-1)[len(group["prompt"]) - 1 : -1]
            labels = ids[len(group["prompt"]) :, None]
            scored.append((logp.gather(1, labels)[:, 0], logp.exp().square().sum(-1)))
    return list(zip(scored[::2], scored[1::2]))


def first_step(folder, *flags):
    """The metrics of step 1, and `plain` of the five pairs that it takes."""
    answers = ("7", "8, or 9"), ("3+4=7", "3"), ("no", "12+30"), ("1 2 3", "1 2 4"), ("a sum of 7", "seven")
    pairs = [{"prompt": f"3+{k}=", "chosen": w, "rejected": x} for k, (w, x) in enumerate(answers)]  # other lengths
    (folder / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    rows = str(folder / "rows.jsonl")
    common = ["--dataset", rows, "--eval_dataset", "", "--batch_size", 5, "--max_steps", 1, "--save_every", 0]
    train("dpo", folder / "out", *common, *flags)
    (line,) = read_jsonl(folder / "out" / "metrics.jsonl")
    return line, plain(rows)


def test_a_run_without_a_reference(tmp_path):
    line, pairs = first_step(tmp_path, "--reference_free")
    margins = [0.1 * (w[0].sum() - x[0].sum()).item() for w, x in pairs]
    assert line["loss"] == pytest.approx(sum(map(log_odds_loss, margins)) / 5, rel=1e-5)
    assert not list((tmp_path / "out").glob("ref_logprobs*"))
    assert {alert["code"] for alert in read_jsonl(tmp_path / "out" / "alerts.jsonl")} == {"DATA007"}  # plain text


def test_a_run_with_weights_and_shortened_tails(tmp_path):
    """Policy = reference, so every margin is 0 whatever the tails: the loss is ln 2 times the mean weight."""
    line, pairs = first_step(tmp_path, "--use_weighting", "--ld_alpha", 0.5)
    weights, sums = [], []
    for pair in pairs:
        weights.append(math.prod((logp - s.log()).mean().exp().item() for logp, s in pair))
        short = min(len(logp) for logp, _ in pair)
        sums.append((pair[0][0][:short].sum() + 0.5 * pair[0][0][short:].sum()).item())
    assert abs(sum(sums) - sum(w[0].sum().item() for w, _ in pairs)) > 1  # tails there are
    assert line["loss"] == pytest.approx(math.log(2) * sum(weights) / 5, rel=1e-5)
    assert line["chosen_logprob"] == pytest.approx(sum(sums) / 5, rel=1e-5)


def test_the_running_shift_is_the_mean_of_all_rewards(tmp_path):
    """bco_pair over four steps: what the state holds at the end is made of the logged rewards of each."""
    rows = tiny_rows("dpo", tmp_path / "rows.jsonl", 15)
    flags = ["--dataset", rows, "--eval_dataset", "", "--batch_size", 5, "--max_steps", 4, "--save_every", 0]
    flags += ["--loss_type", "bco_pair", "--loss_weights", "1", "--learning_rate", "1e-4"]
    train("experimental/dpo_batch", tmp_path / "out", *flags)
    lines = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    rewards = [5 * (line["reward_chosen"] + line["reward_rejected"]) for line in lines]
    total, count = json.loads((newest(tmp_path / "out") / "trainer" / "meta.json").read_text())["state"]["rewards"]
    assert count == 4 * 10
    assert total == pytest.approx(sum(rewards), rel=1e-9) and abs(total) > 1e-3
    assert lines[0]["loss"] == pytest.approx(2 * math.log(2), abs=1e-6)  # all rewards are 0, and so is delta


# ---- moving references -----------------------------------------------------------------------------------------------


def reference_run(folder, *flags):
    """Five steps with a checkpoint after each -> metrics, [weights after step 0, 1, ...], [references likewise]."""
    rows = tiny_rows("dpo", folder / "rows.jsonl", 15)
    usual = ["--dataset", rows, "--eval_dataset", rows, "--eval_rows", 4, "--eval_every", 1, "--batch_size", 5]
    usual += ["--max_steps", 5, "--save_every", 1, "--keep_last", 9, "--ref_model_sync_steps", 2]
    usual += ["--learning_rate", "1e-4"]
    train("experimental/tr_dpo", folder / "out", *usual, *flags)
    start = AutoModelForCausalLM.from_pretrained(ROOT / "common" / "tiny" / "model", dtype=torch.float32)
    policy, reference = [dict(start.named_parameters())], [None]
    for step in range(1, 6):
        tensors = trainer_tensors(folder / "out" / f"checkpoint-{step:06d}")
        policy.append({name: tensors[f"model.policy.lm.{name}"] for name in policy[0]})
        reference.append({name: tensors[f"model.reference.lm.{name}"] for name in policy[0]})
    reference[0] = policy[0]
    return read_jsonl(folder / "out" / "metrics.jsonl"), policy, reference


def apart(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_a_hard_update_makes_the_policy_its_own_reference(tmp_path):
    """alpha = 1, every second update: at steps 1, 3 and 5 every margin is 0 and the loss ln 2, at 2 and 4 it is not;
    and the rows held out are compared with the reference of the step, too."""
    lines, policy, reference = reference_run(tmp_path, "--no-bema", "--ref_model_mixup_alpha", 1)
    for line in [line for line in lines if "grad_norm" in line]:
        still = line["step"] % 2 == 1
        assert (abs(line["loss"] - math.log(2)) < 1e-6) == still, line
        assert (abs(line["reward_margin"]) < 1e-6) == still
    held = [line["eval/reward_margin"] for line in lines if "eval/loss" in line]
    for step in 2, 3, 5:  # the first four rows, by the weights as they are in the files
        ours, theirs = (plain(str(tmp_path / "rows.jsonl"), both[step])[:4] for both in (policy, reference))
        margins = [0.5 * (a[0][0].sum() - b[0][0].sum() - a[1][0].sum() + b[1][0].sum()) for a, b in zip(ours, theirs)]
        assert held[step] == pytest.approx(sum(margins).item() / 4, rel=1e-3) and abs(held[step]) > 1e-3
    assert apart(reference[2], policy[0]) == 0 and apart(reference[3], policy[2]) == 0
    assert apart(reference[5], policy[4]) == 0 and apart(policy[4], policy[0]) > 1e-5


def test_soft_updates_mix_the_weights(tmp_path):
    _, policy, reference = reference_run(tmp_path, "--no-bema", "--ref_model_mixup_alpha", 0.3)
    first = {name: 0.7 * policy[0][name] + 0.3 * policy[2][name] for name in policy[0]}
    second = {name: 0.7 * first[name] + 0.3 * policy[4][name] for name in first}
    assert apart(reference[2], policy[0]) == 0
    assert apart(reference[4], first) < 1e-6 < apart(reference[4], policy[0])  # weights of up to about 1, fp32
    assert apart(reference[5], second) < 1e-6


def test_bema_corrects_its_average(tmp_path):
    """ref = ema + a (pi - pi_0), ema <- (1 - b) ema + b pi; a = (lag + t)^-0.2 and b = (lag + t)^-0.5 at t = 2, 4."""
    _, policy, reference = reference_run(tmp_path, "--bema", "--lag", 3, "--bias_power", 0.2)
    ema = policy[0]
    for t, shown in (2, 3), (4, 5):
        a, b = (3 + t) ** -0.2, (3 + t) ** -0.5
        ema = {name: (1 - b) * ema[name] + b * policy[t][name] for name in ema}
        expected = {name: ema[name] + a * (policy[t][name] - policy[0][name]) for name in ema}
        assert apart(reference[shown], expected) < 1e-6 < apart(reference[shown], ema)


# ---- what may not be combined ----------------------------------------------------------------------------------------

REFUSED = {  # flags -> the flag to change
    "exo_pair without smoothing": ({"loss_type": ("exo_pair",)}, "--label_smoothing"),
    "no loss": ({"loss_type": ()}, "--loss_type"),
    "too few weights": ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0,)}, "--loss_weights"),
    "too many weights": ({"loss_weights": (1.0, 1.0)}, "--loss_weights"),
    "a weight that is none": ({"loss_weights": (math.nan,)}, "--loss_weights"),
    "labels that say nothing": ({"label_smoothing": 0.5}, "--label_smoothing"),
    "smoothing for nobody": ({"loss_type": ("hinge",), "label_smoothing": 0.1}, "--label_smoothing"),
    "ipo at beta 0": ({"loss_type": ("ipo",), "beta": 0.0}, "--beta"),
    "sppo at beta 0": ({"loss_type": ("sppo_hard",), "beta": 0.0}, "--beta"),
    "discopop at tau 0": ({"loss_type": ("discopop",), "discopop_tau": 0.0}, "--discopop_tau"),
    "a divergence of no margin": ({"loss_type": ("bco_pair",), "f_divergence_type": "forward_kl"},
                                  "--f_divergence_type"),
    "the limit of alpha": ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
                           "--f_alpha_divergence_coef"),
    "rewards without a reference": ({"loss_type": ("nca_pair",), "reference_free": True}, "--reference_free"),
    "a divergence from nothing": ({"f_divergence_type": "js_divergence", "reference_free": True}, "--reference_free"),
    "longer tails": ({"ld_alpha": 1.5}, "--ld_alpha"),
    "half an answer to imitate": ({"loss_type": ("sigmoid", "sft"), "ld_alpha": 0.5}, "--ld_alpha"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_flags_without_a_meaning(case):
    flags, named = REFUSED[case]
    for module in dpo, batch_dpo, script("experimental/tr_dpo"):
        with pytest.raises(InputError) as e:
            module.Args(**{"loss_type": ("sigmoid",)} | flags).check()
        assert str(e.value).startswith(named), e.value


def test_a_sort_takes_no_weights_of_pairs():
    with pytest.raises(InputError, match="--use_weighting"):
        batch_dpo.Args(use_weighting=True).check()
    batch_dpo.Args(loss_type=("aot_unpaired", "sft"), label_smoothing=0.1).check()


@pytest.mark.parametrize("name, flags, needle", (
    ("dpo", ["--loss_type", "exo_pair"], "--label_smoothing"),
    ("dpo", ["--loss_type", "sigmoid", "--loss_weights", "1", "2"], "--loss_weights"),
    ("dpo", ["--loss_type", "sigmoidal"], "sigmoid_norm"),
    ("experimental/dpo_batch", ["--loss_type", "aot", "--loss_weights", "1", "--f_divergence_type", "forward_kl"],
     "--f_divergence_type"),
    ("experimental/tr_dpo", ["--ref_model_mixup_alpha", "1.5"], "--ref_model_mixup_alpha"),
    ("experimental/tr_dpo", ["--reference_free"], "--reference_free"),
))  # fmt: skip
def test_runs_that_stop_before_step_1(name, flags, needle, tmp_path):
    refused(attempt(name, tmp_path, *flags), tmp_path, needle)
