"""Alerts: what cannot train, or does not, is said with a code, a number and the flag to change."""

import json
import math
import sys
from itertools import compress

from common.batches import flat_batch, pack, scored_flags
from common.runtime.flags import HealthError, InputError
from common.runtime.parallel import all_sum, gradient_norm, local
from common.runtime.run import say, write

NEVER = math.inf  # a limit that no value passes


def check(run, code, *, step, metric, value, message, warn=NEVER, error=NEVER, patience=1, fix=None):
    """Raise an alert when `value` has been above `error`, else above `warn`, `patience` times in a row or more; nan is
    above any limit. It is one line in alerts.jsonl and on stderr, the first time and then at powers of two. An error
    before step 1 ends the run with exit code 3 unless --allow names the code. fix: a flag, its value and a better one.
    Numbers and fixed text only: agents read alerts, and neither data nor model may speak to them."""
    above_error = streak(run, f"{code} {metric} error", not value <= error)
    above_warn = streak(run, f"{code} {metric} warn", not value <= warn)
    if max(above_error, above_warn) < patience:
        return
    level, limit = ("error", error) if above_error >= patience else ("warn", warn)
    run.state["alerts"][code] = run.state["alerts"].get(code, 0) + 1
    count = streak(run, f"{code} {level} alerts", True)
    was_said = run.checkpoint and step == 0  # by the run that is resumed
    if count & (count - 1) == 0 and not was_said:
        fixes = [{"flag": fix[0], "from": fix[1], "to": fix[2]}] if fix else []
        alert = {"step": step, "code": code, "level": level, "metric": metric, "value": value, "limit": limit}
        write(run, "alerts.jsonl", {**alert, "message": message, "fix": fixes, "count": count})
        advice = f"; try {fix[0]} {fix[2]}" if fix else ""
        say(run, f"[{code} {level} step {step}] {message} ({metric} {value:.4g}){advice}", file=sys.stderr)
    if level == "error" and step == 0 and code not in run.args.allow:
        raise HealthError(f"{code}: {message}. --allow {code} goes on nevertheless.")


def streak(run, name, holds):
    """Return how many times in a row something has held, this time included. The state counts."""
    run.state[name] = run.state.get(name, 0) + 1 if holds else 0
    return run.state[name]


# ---- data ----------------------------------------------------------------------------------------
def check_data(run, groups, counts, tokenizer, generation_config, stops):
    """DATA001-006: what would train on nothing, or on the wrong tokens, says so before step 1. groups and counts are
    those of `fit`, stops the ids that end a turn in training, generation_config is the one that the model came with."""
    rows = max(1, counts["rows"])
    check_share(run, "DATA001", counts["unscored"] / rows, "rows have no scored token", warn=0, error=0.01)
    bos = wrong_starts(groups[:100], tokenizer)
    check_share(run, "DATA002", bos, "rows begin with two BOS tokens or lack theirs", error=0)
    check_share(run, "DATA003", endless(groups, stops), "completions end in no stop token", error=0.05)
    split = {group["row"] for group in groups if group.get("split")}
    check_share(run, "DATA004", len(split) / rows, "the template rewrites earlier turns: split by turn", warn=0)
    fix = ("--max_length", run.args.max_length, counts["longest"])
    check_share(run, "DATA005", counts["overlong"] / rows, "rows exceed --max_length", warn=0.01, error=0.2, fix=fix)
    known = generation_config.eos_token_id
    new = len(set(stops) - set(known if isinstance(known, list) else [known]))
    text = "stop tokens the generation config lacks: saved ones get them"
    check(run, "DATA006", step=0, metric="tokens", value=new, message=text, warn=0)
    if not groups:
        raise InputError(f"--dataset {run.args.dataset}: no row is left ({counts}). Raise --max_length or fix rows.")


def check_share(run, code, value, message, **limits):
    check(run, code, step=0, metric="share", value=value, message=message, **limits)


def wrong_starts(groups, tokenizer):
    """Return the share of groups that begin with two BOS tokens, or without one where the tokenizer sets one."""
    bos = tokenizer.bos_token_id
    sets_bos = tokenizer("a")["input_ids"][:1] == [bos]  # never where there is none
    wrong = []
    for group in groups:
        completions = group["completions"] or [{"ids": []}]
        start = [*group["prompt"], *completions[0]["ids"]]
        wrong.append(start[:2] == [bos, bos] or (sets_bos and start[:1] != [bos]))
    return wrong.count(True) / max(1, len(groups))


def endless(groups, stops):
    """Return the share of completions whose last scored token is no stop token. Cut groups go on, and do not count."""
    ends = []
    for group in groups:
        for completion in group["completions"]:
            if not group.get("cut"):
                *_, last = compress(completion["ids"], scored_flags(completion))
                ends.append(last in stops)
    return ends.count(False) / max(1, len(ends))


# ---- training ------------------------------------------------------------------------------------
def check_update(run, step, policy, groups, metrics):
    """TRAIN001-003, after the optimizer's step `step` (from 0) and before zero_grad: the gradients are clipped by now.
    groups are this rank's. Of metrics it needs loss, grad_norm (before clipping), num_tokens and lr, all global, so
    that all ranks decide alike."""
    step += 1  # alerts and files count from 1
    finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
    if not finite:
        rows = []
        for group in groups:
            rows.append([group["row"], list(group["prompt"]), [list(c["ids"]) for c in group["completions"]]])
        (run.out / "debug").mkdir(exist_ok=True)
        (run.out / "debug" / f"step-{step}-rank-{run.rank}.json").write_text(json.dumps(rows))
    elif step & (step - 1) == 0:  # 1, 2, 4, 8, ...
        check_counts(run, step, policy, groups, metrics["num_tokens"])
    text = "loss or gradient is not finite: step skipped, its rows (row, prompt, completions) are in debug/"
    fix = ("--learning_rate", run.args.learning_rate, run.args.learning_rate / 2)
    check(run, "TRAIN001", step=step, metric="steps skipped", value=float(not finite), message=text, error=0, fix=fix)
    if streak(run, "skipped", not finite) == 3:
        raise HealthError("TRAIN001: three steps in a row were not finite.")
    still = float(metrics["grad_norm"] == 0 and metrics.get("silent_frac", 0) < 1)  # 1: all rewards are equal
    if step == 4:  # a copy of the parameter in the middle: in an embedding, a token that did not occur stays
        trained = [p for p in policy.parameters() if p.grad is not None]
        weights = trained[len(trained) // 2]
        run.watched = (weights, local(weights).detach().clone())
    if step == 5 and run.watched and finite and metrics["grad_norm"] > 0 and metrics["lr"] > 0:
        weights, before = run.watched
        moved, count = all_sum(run, (local(weights) != before).sum(), before.numel())
        still = 1 - moved / count
        run.watched = ()
    text = "the weights do not move: all frozen, or the learning rate too small for their precision?"
    metric = "share of weights that stay"
    often = 1 if step == 5 else 3
    check(run, "TRAIN002", step=step, metric=metric, value=still, message=text, error=0.95, patience=often)


def check_counts(run, step, policy, groups, num_tokens):
    """TRAIN003: the norm after clipping, and the denominator, both computed again."""
    limit = 1.01 * (run.args.max_grad_norm or math.inf)
    norm = gradient_norm(run, policy.parameters())
    check(run, "TRAIN003", step=step, metric="clipped norm", value=norm, message="clipping did not clip", error=limit)
    packs = pack(groups, run.args.tokens_per_microbatch)
    (scored,) = all_sum(run, sum(len(flat_batch(members)["labels"]) for members in packs))
    text = "the denominator is not the number of scored tokens"
    check(run, "TRAIN003", step=step, metric="tokens too many", value=abs(scored - num_tokens), message=text, error=0)
