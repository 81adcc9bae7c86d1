"""RAFT: what is kept, by hand; its loss against sft.py's, on numbers and in runs; the table of the best of N against
every choice of N completions; and steps of which nothing is kept."""

import json
import math
from itertools import combinations

import pytest
import torch
from conftest import ROOT, newest, read_jsonl, script, tiny_rows, train
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import attempt, refused
from test_losses import close, f64
from test_split import RELATIVE, weight_differences
from transformers import AutoModelForCausalLM

from common.runtime.flags import InputError

raft, sft, grpo = script("experimental/raft"), script("sft"), script("grpo")
NAN = math.nan
ONE_STEP_A_ROLLOUT = ["--steps_per_generation", 1, "--num_iterations", 1, "--temperature", 1]


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, expected", (
    ({}, [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]),  # of equal ones the first; without rewards none
    ({"num_remains": 2}, [[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]),
    ({"num_remains": 4}, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]]),  # never one without a reward
    ({"reward_bar": 1.0}, [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),  # at the bar is enough
    ({"reward_bar": -2.0, "num_remains": 1}, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]]),
))  # fmt: skip
def test_what_is_kept(flags, expected):
    rewards = f64([0.5, 1.0, 3.0, -2.0], [0.0, 0.0, 0.0, 0.0], [-2.0, NAN, NAN, -1.0], [NAN] * 4)
    close(raft.keep_best(rewards, raft.Args(**flags)), expected)


def test_groups_of_what_is_kept():
    groups = [{"row": row, "completions": [{"k": k, "advantage": a} for k, a in enumerate(kept)]}
              for row, kept in enumerate(([0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]))]  # fmt: skip
    found = [(group["row"], [c["k"] for c in group["completions"]]) for group in raft.kept_only(groups)]
    assert found == [(0, [1, 2]), (2, [0])] and len(groups[0]["completions"]) == 3


# ---- loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_sft_and_not_of_the_parent():
    logprobs = f64(-0.5, -2.0, -0.25, -1.0, grad=True)
    loss = raft.raft_loss(logprobs, 10)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    close(loss, 0.375)  # 3.75 / 10
    close(gradient, [-0.1] * 4)
    close(loss, sft.sft_loss({"logprobs": logprobs}, sft.Args()) / 10)
    old = f64(-1.0, -1.0, -1.0, -1.0)  # two steps after a rollout: the parent weighs by ratios, and clips
    batch = {"old_logprobs": old, "sampler_logprobs": old, "seq": torch.tensor([0, 0, 1, 1]), "advantage": f64(1, 1)}
    parents, _ = grpo.grpo_loss(logprobs, batch, 10, 2, grpo.Args())
    (parents_gradient,) = torch.autograd.grad(parents, logprobs)
    for ours, theirs in (loss, parents), (gradient, parents_gradient):
        with pytest.raises(AssertionError):
            close(theirs, ours)


def test_where_nothing_is_kept_there_is_no_gradient():
    logprobs = f64(-0.5, -2.0, grad=True)
    loss = raft.raft_loss(logprobs, 0)
    assert loss.item() == 0 and not torch.autograd.grad(loss, logprobs)[0].any()


# ---- best of N -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-4, 4) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=7), st.data())
def test_the_best_of_n_is_a_mean_over_all_choices(rewards, data):
    n = data.draw(st.integers(1, len(rewards)))
    choices = [max(choice) for choice in combinations(rewards, n)]
    assert raft.best_of(rewards, n) == pytest.approx(sum(choices) / len(choices), rel=1e-12, abs=1e-12)


def test_the_best_of_n_by_hand():
    # of 1, 0, 0, 0 a pair holds the 1 in three of six cases
    assert [raft.best_of([0.0, 1.0, 0.0, 0.0], n) for n in (1, 2, 4)] == [0.25, 0.5, 1.0]


def test_the_table():
    """Of 6 completions: 1, 2, 4 and 6. A prompt with three rewards is in the first two rows only."""
    state = {}
    for rewards in [0.0, 1.0, 2.0, 0.0, 0.0, 0.0], [5.0, NAN, NAN, 1.0, NAN, 3.0]:
        raft.count_best(state, [{"completions": [{"reward": reward} for reward in rewards]}])
    table = json.loads(json.dumps(state["best_of"]))  # as a checkpoint has it
    # one: means 0.5 and 3. Pairs: 2 in 5 of 15, 1 in 4 of the others; 5 in two of three, else 3
    wanted = {"1": [3.5, 2], "2": [(5 * 2 + 4) / 15 + 13 / 3, 2], "4": [(10 * 2 + 4) / 15, 1], "6": [2.0, 1]}
    assert table.keys() == wanted.keys()
    for n, row in table.items():
        assert row == pytest.approx(wanted[n], rel=1e-12), n


# ---- runs ------------------------------------------------------------------------------------------------------------


def run(folder, *flags, rows=6, name="out"):
    data = tiny_rows("experimental/raft", folder / "rows.jsonl", rows)
    usual = ["--dataset", data, "--eval_dataset", "", "--batch_size", 3, "--save_every", 0, "--max_steps", 2]
    train("experimental/raft", folder / name, *usual, *ONE_STEP_A_ROLLOUT, *flags)
    return folder / name


def test_one_completion_and_no_bar_is_sft_on_own_samples(tmp_path):
    flags = ["--learning_rate", "1e-3", "--batch_size", 5]
    out = run(tmp_path, "--num_generations", 1, "--num_remains", 1, "--max_steps", 1, *flags)
    samples = read_jsonl(out / "samples.jsonl")
    assert len(samples) == 5 and {row["stop"] for row in samples} == {"stop"}
    rows = []
    for row in samples:
        question = row["prompt"].removeprefix("<|user|>").partition("<|end|>")[0]
        turns = [{"role": "user", "content": question}]
        answer = [{"role": "assistant", "content": row["completion"].removesuffix("<|end|>")}]
        rows.append(json.dumps({"prompt": turns, "completion": answer}) + "\n")
    (tmp_path / "own.jsonl").write_text("".join(rows))
    usual = ["--dataset", tmp_path / "own.jsonl", "--eval_dataset", "", "--max_steps", 1, "--save_every", 0]
    train("sft", tmp_path / "sft", *usual, *flags)
    (ours,), (theirs,) = (read_jsonl(folder / "metrics.jsonl") for folder in (out, tmp_path / "sft"))
    for key in "loss", "grad_norm", "num_tokens", "lr":
        assert ours[key] == pytest.approx(theirs[key], rel=RELATIVE), key
    # Adam's first step is a learning rate whatever the size of a gradient: one that is mere rounding may go either way
    assert not weight_differences(newest(out), newest(tmp_path / "sft"), 1e-3, strays=1e-4)


def test_the_best_of_each_prompt_is_learned_from(tmp_path):
    """By samples.jsonl: its tokens are those of the step, at 1 they are kept, and the loss is their mean under the
    model that sampled them."""
    (tmp_path / "digits.py").write_text(
        "def digits(prompts, completions, **_):\n"
        "    return [sum(letter in '13579' for letter in c[0]['content']) for c in completions]\n"
    )
    out = run(tmp_path, "--reward", f"{tmp_path}/digits.py:digits", "--max_steps", 1, "--num_remains", 2)
    samples, (line,) = read_jsonl(out / "samples.jsonl"), read_jsonl(out / "metrics.jsonl")
    lm = AutoModelForCausalLM.from_pretrained(ROOT / "common" / "tiny" / "model", dtype=torch.float32)
    tokenizer = raft.load_model(AutoModelForCausalLM, raft.Args())[0]
    total = num_tokens = kept_reward = 0
    for first in range(0, 12, 4):
        group = samples[first : first + 4]
        rewards = [row["reward"] for row in group]
        best = sorted(range(4), key=lambda k: (-rewards[k], k))[:2]
        assert [row["advantage"] for row in group] == [float(k in best) for k in range(4)]
        for k in best:
            kept_reward += rewards[k] / 6
            prompt = tokenizer.encode(group[k]["prompt"], add_special_tokens=False)
            answer = tokenizer.encode(group[k]["completion"], add_special_tokens=False)
            with torch.no_grad():
                logp = lm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total -= logp[range(len(answer)), answer].sum().item()
            num_tokens += len(answer)
    assert line["num_tokens"] == num_tokens and line["kept_reward"] == pytest.approx(kept_reward)
    assert line["loss"] == pytest.approx(total / num_tokens, rel=1e-5)
    assert line["empty_frac"] == 0 and line["kept_reward"] > line["reward"]


def weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())


def test_best_of_n_without_training(tmp_path):
    """The table in run.json, of all samples of the run; the model stays as it was."""
    out = run(tmp_path, "--learning_rate", 0, "--max_steps", 2)
    samples = read_jsonl(out / "samples.jsonl")
    groups = [[row["reward"] for row in samples[k : k + 4]] for k in range(0, len(samples), 4)]
    assert len(groups) == 6
    table = json.loads((out / "run.json").read_text())["best_of_n"]
    assert list(table) == ["1", "2", "4"]
    for n, mean in table.items():
        choices = [[max(choice) for choice in combinations(group, int(n))] for group in groups]
        assert mean == pytest.approx(sum(sum(c) / len(c) for c in choices) / 6, rel=1e-12)
    assert table["1"] < table["2"] < table["4"]
    before, after = weights(ROOT / "common" / "tiny" / "model"), weights(out / "final")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_raft001_a_step_of_which_nothing_is_kept_is_skipped(tmp_path):
    """The first rollout reaches the bar, so Adam has moments; the second does not, and nothing moves."""
    (tmp_path / "later.py").write_text(
        "calls = []\ndef first(prompts, completions, **_):\n"
        "    calls.append(0)\n    return [1.0 if len(calls) == 1 else 0.0] * len(completions)\n"
    )
    flags = ["--reward", f"{tmp_path}/later.py:first", "--reward_bar", 1]
    out = run(tmp_path, *flags, "--save_every", 1)
    alerts = [(line["step"], line["code"], line["level"]) for line in read_jsonl(out / "alerts.jsonl")]
    assert alerts == [(2, "RAFT001", "warn")]
    known = json.loads((out / "run.json").read_text())
    assert (known["status"], known["alerts"]) == ("finished", {"RAFT001": 1})
    first, second = read_jsonl(out / "metrics.jsonl")
    assert (first["empty_frac"], first["kept_reward"]) == (0, 1) and first["grad_norm"] > 0
    assert (second["empty_frac"], second["kept_reward"]) == (1, None)
    assert (second["num_tokens"], second["loss"], second["grad_norm"]) == (0, 0, 0)
    start, one, two = (weights(folder) for folder in (
        ROOT / "common" / "tiny" / "model", out / "checkpoint-000001", out / "checkpoint-000002"))  # fmt: skip
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(start[name], one[name]) for name in one)


def test_many_skipped_steps_do_not_end_the_run(tmp_path):
    out = run(tmp_path, "--reward_bar", 2, "--max_steps", 5)
    assert [line["count"] for line in read_jsonl(out / "alerts.jsonl")] == [1, 2, 4]
    assert json.loads((out / "run.json").read_text())["alerts"] == {"RAFT001": 5}
    before, after = weights(ROOT / "common" / "tiny" / "model"), weights(out / "final")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_prompts_without_a_kept_completion_are_counted(tmp_path):
    """Of two ranks' worth of prompts one has no reward, one is below the bar, and one teaches."""
    (tmp_path / "some.py").write_text(
        "def some(prompts, completions, answer, **_):\n"
        "    kinds = sorted(set(answer))\n"
        "    return [(None, 0.0, 1.0)[kinds.index(a)] for a in answer]\n"
    )
    out = run(tmp_path, "--reward", f"{tmp_path}/some.py:some", "--reward_bar", 0.5, "--max_steps", 1, "--allow",
              "GRPO003", rows=3)  # fmt: skip
    (line,) = read_jsonl(out / "metrics.jsonl")
    assert line["empty_frac"] == pytest.approx(2 / 3) and line["kept_reward"] == 1 and line["num_tokens"] > 0


def test_truncated_completions_may_be_left_out(tmp_path):
    flags = ["--max_completion_length", 30, "--num_remains", 4, "--max_steps", 1, "--allow", "GRPO002"]
    kept = {}
    for mask in False, True:
        more = ["--mask_truncated_completions"] if mask else []
        samples = read_jsonl(run(tmp_path, *flags, *more, name=f"{mask}") / "samples.jsonl")
        assert {row["stop"] for row in samples} == {"stop", "length"}
        kept[mask] = {(row["stop"], row["advantage"]) for row in samples}
    assert kept == {False: {("stop", 1.0), ("length", 1.0)}, True: {("stop", 1.0), ("length", 0.0)}}


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, named", (
    ({"num_remains": 9}, "--num_remains"),
    ({"reward_bar": NAN}, "--reward_bar"),
    ({"reward_bar": math.inf}, "--reward_bar"),
    ({"temperature": 0.0}, "--temperature"),
))  # fmt: skip
def test_flags_without_a_meaning(flags, named):
    with pytest.raises(InputError, match=named):
        raft.Args(**flags).check()
    raft.Args(num_generations=1, reward_bar=-3.0).check()


def test_no_reward_at_all_ends_the_run(tmp_path):
    (tmp_path / "none.py").write_text("def none(prompts, completions, **_):\n    return [None] * len(completions)\n")
    flags = ["--reward", f"{tmp_path}/none.py:none", *ONE_STEP_A_ROLLOUT, "--allow", "GRPO003"]
    result = attempt("experimental/raft", tmp_path, *flags, "--max_steps", 3)
    assert result.code == 3 and "GRPO003: three rollouts in a row" in result.err
    refused(result, tmp_path, "GRPO003", code=3)
