"""Alerts: what cannot train, or does not, is said with a code, a number and the flag to change."""

import json
import math
import sys
from itertools import compress

from common.batches import flat_batch, pack, scored_flags
from common.runtime.flags import HealthError, InputError
from common.runtime.parallel import all_sum, gradient_norm, local
from common.runtime.run import say, write


def check(run, code, step, metric, value, message, *, warn=math.inf, error=math.inf, patience=1, fix=None):
    """Raise an alert, a line in alerts.jsonl and on stderr (at powers of two only), when `value` has been above a limit
    `patience` times in a row; nan is above any. An error before step 1 ends the run unless --allow names the code. fix:
    a flag, its value, a better one. Numbers and fixed text only: neither data nor model may speak to agents here."""
    level = None
    for name, limit in {"warn": warn, "error": error}.items():
        if streak(run.state, f"{code} {metric} {name}", not value <= limit) >= patience:
            level, passed = name, limit
    if level is None:
        return
    streak(run.state["alerts"], code, True)
    count = streak(run.state, f"{code} {level} alerts", True)
    was_said = run.checkpoint and step == 0  # by the run that is resumed
    if count & (count - 1) == 0 and not was_said:
        fixes, advice = [], ""
        if fix:
            flag, old, new = fix
            fixes = [{"flag": flag, "from": old, "to": new}]
            advice = f"; try {flag} {new}"
        alert = {"step": step, "code": code, "level": level, "metric": metric, "value": value, "limit": passed}
        write(run, "alerts.jsonl", {**alert, "message": message, "fix": fixes, "count": count})
        say(run, f"[{code} {level} step {step}] {message} ({metric} {value:.4g}){advice}", file=sys.stderr)
    if level == "error" and step == 0 and code not in run.args.allow:
        raise HealthError(f"{code}: {message}. --allow {code} goes on nevertheless.")


def streak(counts, name, holds):
    """Return how many times in a row something has held, this time included, and keep that in `counts`."""
    counts[name] = counts.get(name, 0) + 1 if holds else 0
    return counts[name]


# ---- data ----------------------------------------------------------------------------------------
def check_data(run, groups, counts, tokenizer, generation_config, stops):
    """DATA001-006: what would train on nothing, or on the wrong tokens, says so before step 1. groups and counts are
    those of `fit`, stops the ids that end a turn in training, generation_config is the one that the model came with."""
    rows = counts["rows"]
    check_share(run, "DATA001", counts["unscored"], rows, "rows have no scored token", warn=0, error=0.01)
    wrong = list(wrong_starts(groups[:100], tokenizer))
    check_share(run, "DATA002", sum(wrong), len(wrong), "rows begin with two BOS tokens or lack theirs", error=0)
    wrong = list(wrong_ends(groups, stops))
    check_share(run, "DATA003", sum(wrong), len(wrong), "completions end in no stop token", error=0.05)
    split = {group["row"] for group in groups if group.get("split")}
    check_share(run, "DATA004", len(split), rows, "the template rewrites earlier turns: split by turn", warn=0)
    fix = ("--max_length", run.args.max_length, counts["longest"])
    check_share(run, "DATA005", counts["overlong"], rows, "rows exceed --max_length", warn=0.01, error=0.2, fix=fix)
    known = generation_config.eos_token_id
    new = set(stops).difference(known if isinstance(known, list) else [known])
    check(run, "DATA006", 0, "tokens", len(new), "stop tokens the generation config lacks: saved ones get them", warn=0)
    if not groups:
        raise InputError(f"--dataset {run.args.dataset}: no row is left ({counts}). Raise --max_length or fix rows.")


def check_share(run, code, part, whole, message, **limits):
    check(run, code, 0, "share", part / max(1, whole), message, **limits)


def wrong_starts(groups, tokenizer):
    """Yield for each group whether it begins with two BOS tokens, or without one where the tokenizer sets one."""
    bos = tokenizer.bos_token_id
    sets_bos = tokenizer("a")["input_ids"][:1] == [bos]  # never where there is none
    for group in groups:
        start = list(group["prompt"])
        for completion in group["completions"][:1]:
            start.extend(completion["ids"])
        yield start[:2] == [bos, bos] or (sets_bos and start[:1] != [bos])


def wrong_ends(groups, stops):
    """Yield for each completion whether its last scored token is no stop token. Cut groups go on: left out."""
    for group in groups:
        if not group.get("cut"):
            for completion in group["completions"]:
                *_, last = compress(completion["ids"], scored_flags(completion))
                yield last not in stops


# ---- training ------------------------------------------------------------------------------------
def check_update(run, step, policy, groups, metrics):
    """TRAIN001-003, after the optimizer's step `step` (from 0) and before zero_grad: the gradients are clipped by now.
    groups are this rank's. All ranks decide alike: loss, grad_norm (before clipping), num_tokens and lr are global."""
    step += 1  # alerts and files count from 1
    norm = metrics["grad_norm"]
    finite = math.isfinite(metrics["loss"]) and math.isfinite(norm)
    if not finite:
        rows = []
        for group in groups:
            completions = [completion["ids"] for completion in group["completions"]]
            rows.append([group["row"], group["prompt"], completions])
        path = run.out / "debug" / f"step-{step}-rank-{run.rank}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows, default=list))  # arrays as lists
    elif step & (step - 1) == 0:  # 1, 2, 4, 8, ...
        check_counts(run, step, policy, groups, metrics["num_tokens"])
    text = "loss or gradient is not finite: step skipped, its rows (row, prompt, completions) are in debug/"
    fix = ("--learning_rate", run.args.learning_rate, run.args.learning_rate / 2)
    check(run, "TRAIN001", step, "steps skipped", float(not finite), text, error=0, fix=fix)
    if streak(run.state, "skipped", not finite) == 3:
        raise HealthError("TRAIN001: three steps in a row were not finite.")
    still = float(norm == 0 and metrics.get("silent_frac", 0) < 1)  # 1: all rewards are equal
    if step == 4:  # a copy of the parameter in the middle: in an embedding, a token that did not occur stays
        trained = [p for p in policy.parameters() if p.grad is not None]
        weights = trained[len(trained) // 2]
        run.watched = (weights, local(weights).detach().clone())
    if step == 5 and run.watched and finite and norm > 0 and metrics["lr"] > 0:
        weights, before = run.watched
        moved, count = all_sum(run, (local(weights) != before).sum(), before.numel())
        still = 1 - moved / count
        run.watched = ()
    text = "the weights do not move: all frozen, or the learning rate too small for their precision?"
    patience = 1 if step == 5 else 3
    check(run, "TRAIN002", step, "share of weights that stay", still, text, error=0.95, patience=patience)


def check_counts(run, step, policy, groups, num_tokens):
    """TRAIN003: the norm after clipping, and the denominator, both computed again."""
    limit = 1.01 * (run.args.max_grad_norm or math.inf)
    norm = gradient_norm(run, policy.parameters())
    check(run, "TRAIN003", step, "clipped norm", norm, "clipping did not clip", error=limit)
    packs = pack(groups, run.args.tokens_per_microbatch)
    (scored,) = all_sum(run, sum(len(flat_batch(members)["labels"]) for members in packs))
    text = "the denominator is not the number of scored tokens"
    check(run, "TRAIN003", step, "tokens too many", abs(scored - num_tokens), text, error=0)
