"""What methods/grpo.py leaves out, since it would change nothing, changes nothing: groups without a signal, and with
--old_logprobs sampler the pass for old log-probs. Equality as in test_split.py."""
import math

import pytest
import torch
from conftest import newest, read_jsonl, tiny_rows, train
from test_split import metric_differences, weight_differences

from common import batches

LR = 5e-5
OF_LIVE_TOKENS = ("ratio_mean", "clip_frac", "entropy", "sampler_gap")  # means over what was computed


def run(out, tmp_path, *flags, world=1, patch=None):
    data = tiny_rows("grpo", tmp_path / "rows.jsonl", 12)
    train("grpo", out, "--dataset", data, "--batch_size", 5, "--max_steps", 8, "--beta", 0, "--save_every", 0,
          "--eval_every", 0, "--eval_rows", 1, *flags, world=world, patch=patch)
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if "loss" in row]
    return [{k: v for k, v in row.items() if k not in OF_LIVE_TOKENS} for row in rows]


def nothing_is_silent(module):
    """Zeros become 1e-30, too little to move an fp32 sum but not nothing: every group goes through the forward."""
    compute = module.compute_advantages
    module.compute_advantages = lambda *some: torch.where((got := compute(*some)) == 0, 1e-30, got)


def mostly_silent(module, until=4):
    """Every fifth row has a signal, whoever holds it; in the second rollout (steps 5 to 8) none has,
    and so all are computed."""
    sample_and_judge = module.sample_and_judge

    def judged(run, sampler, groups, *more, **named):
        sample_and_judge(run, sampler, groups, *more, **named)
        for group in groups:
            for k, completion in enumerate(group["completions"]):
                reward = float(k % 2 and group["row"] % 5 == 0 and run.step < until)
                completion.update(rewards=[reward], reward=reward)

    module.sample_and_judge = judged


def count_tokens(seen):
    def patch(module):
        mostly_silent(module, until=8)
        original = batches.flat_batch

        def counted(groups, device="cpu"):
            with open(seen, "a") as f:
                f.write(f"{sum(len(c['ids']) for g in groups for c in g['completions'])}\n")
            return original(groups, device)

        batches.flat_batch = counted

    return patch


@pytest.mark.parametrize("world, budget", [(1, 4096), (2, 90)])
def test_groups_without_a_signal_are_not_computed(world, budget, tmp_path):
    def everything(module):
        mostly_silent(module)
        nothing_is_silent(module)

    flags = "--tokens_per_microbatch", budget
    whole = run(tmp_path / "whole", tmp_path, "--tokens_per_microbatch", 4096, patch=everything)
    left = run(tmp_path / "left", tmp_path, *flags, world=world, patch=mostly_silent)
    assert any(row["silent_frac"] == 1 for row in left) and any(row["grad_norm"] > 0 for row in left)
    for row in whole:
        row["grad_norm"] *= row["grad_norm"] > 1e-20  # of the 1e-30 that stand for 0
    assert not metric_differences(whole, left)
    assert not weight_differences(newest(tmp_path / "whole"), newest(tmp_path / "left"), LR)


def test_fewer_tokens_are_computed(tmp_path):
    counts = {}
    for name, patches in {"whole": [nothing_is_silent], "left": []}.items():
        def patch(module, name=name, patches=patches):
            count_tokens(tmp_path / name)(module)
            for each in patches:
                each(module)
        run(tmp_path / f"run-{name}", tmp_path, "--old_logprobs", "sampler", patch=patch)
        counts[name] = sum(map(int, (tmp_path / name).read_text().split()))
    assert counts["left"] < 0.5 * counts["whole"], counts


def test_the_sampler_may_say_what_was_likely(tmp_path):
    """On the CPU both sides compute in fp32: the sampler's log-probs are the policy's but for rounding, no ratio gets
    near the cap, and so the runs agree; the pass that is saved is one of three over the tokens of a rollout."""
    two = run(tmp_path / "pass", tmp_path)
    one = run(tmp_path / "no pass", tmp_path, "--old_logprobs", "sampler")
    for a, b in zip(two, one, strict=True):
        for key in "loss", "grad_norm", "reward":
            assert math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-6), (a["step"], key, a[key], b[key])
    assert not weight_differences(newest(tmp_path / "pass"), newest(tmp_path / "no pass"), LR)
