"""Alerts: what cannot train, or does not, is said with a code, a number and the flag to change."""

import json
import math
import sys
from itertools import compress

import torch

from common.batches import flat_batch, pack, scored_flags
from common.runtime.flags import HealthError, InputError
from common.runtime.parallel import all_sum, gradient_norm, local
from common.runtime.run import open_own, say, show_groups, write


def check(run, code, step, metric, value, message, *, warn=math.inf, error=math.inf, patience=1, fix=None,
          rounding=0.0):
    """Raise an alert, a line in alerts.jsonl and on stderr (at powers of two only), when `value` has been above a limit
    `patience` times in a row; nan is above any. An error before step 1 ends the run unless --allow names the code. fix:
    a flag, its value, a better one. rounding: what both limits rise by where layers compute in bfloat16. Numbers and
    fixed text only: neither data nor model may speak to agents here."""
    level = None
    if run.dtype != torch.bfloat16:
        rounding = 0.0
    for name, limit in {"warn": warn + rounding, "error": error + rounding}.items():
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


def spread_gap(values, expected):
    """Return the mean difference of two tensors over the standard deviation of what is expected: a gap that means the
    same for every model. The floor is for models whose outputs are all but equal."""
    spread = expected.std().clamp(min=1e-2)
    gap = (values - expected).abs().mean() / spread
    return gap.item()


# ---- data ----------------------------------------------------------------------------------------
def check_data(run, groups, counts, tokenizer, generation_config, stops):
    """DATA001-012: what would train on nothing, or on the wrong tokens, says so before step 1. groups and counts are
    those of `fit`, stops the ids that end a turn in training, generation_config is the one that the model came with."""
    rows = counts["rows"]
    check_share(run, "DATA001", counts["unscored"], rows, "rows have no scored token", warn=0, error=0.01)
    wrong = [group for group in groups[:100] if starts_wrong(group, tokenizer)]
    show_groups(run, "DATA002", wrong[:1], tokenizer)
    text = "rows begin with two BOS tokens or lack theirs: mend --chat_template, or add_bos_token of the tokenizer"
    check_share(run, "DATA002", len(wrong), len(groups[:100]), text, error=0)
    wrong = [group for group in groups if ends_wrong(group, stops)]
    show_groups(run, "DATA003", wrong[:1], tokenizer)
    text = "rows have a completion that ends in no stop token: mend --chat_template, or eos_token_id of the model"
    check_share(run, "DATA003", len(wrong), len(groups), text, error=0.05)
    check_marks(run, "DATA004", groups, "split", "the template rewrites earlier turns: split by turn", warn=0)
    fix = ("--max_length", run.args.max_length, counts["longest"])
    check_share(run, "DATA005", counts["overlong"], rows, "rows exceed --max_length", warn=0.01, error=0.2, fix=fix)
    known = generation_config.eos_token_id
    if not isinstance(known, list):
        known = [known]
    new = set(stops).difference(known)
    check(run, "DATA006", 0, "tokens", len(new), "stop tokens the generation config lacks: saved ones get them", warn=0)
    text = "rows are plain text, and this model has a chat template, which they do not go through"
    check_marks(run, "DATA007", groups, "plain", text, warn=0, fix=("--as_chat", False, True))
    text = "rows are refused by the chat template: mend them, or --chat_template"
    check_share(run, "DATA008", counts["refused"], rows, text, warn=0, error=0.01)
    check_share(run, "DATA009", counts["equal"], rows, "pairs have two equal completions: dropped", warn=0.01)
    text = "rows have scored turns whose text, reasoning or tool call the chat template leaves out"
    check_marks(run, "DATA010", groups, "lost", text, warn=0, error=0.01)
    check_marks(run, "DATA011", groups, "spelled", "rows spell control tokens of the model in their text", warn=0)
    text = "rows have scored tokens of a message that the assistant did not write"
    check_marks(run, "DATA012", groups, "foreign", text, error=0)
    if not groups:
        raise InputError(f"--dataset {run.args.dataset}: no row is left ({counts}). Raise --max_length or fix rows.")


def check_share(run, code, part, whole, message, **limits):
    check(run, code, 0, "share", part / max(1, whole), message, **limits)


def check_marks(run, code, groups, mark, message, **limits):
    """Check the share of rows with a group that encoding has marked."""
    rows = {group["row"] for group in groups}
    marked = {group["row"] for group in groups if mark in group}
    check_share(run, code, len(marked), len(rows), message, **limits)


def starts_wrong(group, tokenizer):
    """Return whether a group begins with two BOS tokens, or without one where the tokenizer sets one."""
    start = list(group["prompt"][:2])
    for completion in group["completions"][:1]:
        start.extend(completion["ids"][:2])
    bos = tokenizer.bos_token_id
    if start[:2] == [bos, bos]:
        return True
    sets_bos = tokenizer.encode("a")[:1] == [bos]  # never where there is none
    return sets_bos and start[:1] != [bos]


def ends_wrong(group, stops):
    """Return whether the last scored token of a completion is no stop token. A cut group goes on."""
    if group.get("cut"):
        return False
    for completion in group["completions"]:
        *_, last = compress(completion["ids"], scored_flags(completion))
        if last not in stops:
            return True
    return False


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
        with open_own(path, "w") as file:
            json.dump(rows, file, default=list)  # arrays as lists
    elif step & (step - 1) == 0:  # 1, 2, 4, 8, ...
        check_counts(run, step, policy, groups, metrics["num_tokens"])
    text = "loss or gradient is not finite: step skipped, its rows (row, prompt, completions) are in debug/"
    fix = ("--learning_rate", run.args.learning_rate, run.args.learning_rate / 2)
    check(run, "TRAIN001", step, "steps skipped", float(not finite), text, error=0, fix=fix)
    if streak(run.state, "skipped", not finite) == 3:
        raise HealthError("TRAIN001: three steps in a row were not finite.")
    # What cancels leaves rounding, 2e-8 to 2e-6 in pairs of one text, and Adam makes steps of it. Norms are 0.01 to 20.
    still = float(norm < 1e-5 and metrics.get("silent_frac", 0) < 1)  # 1: all rewards are equal
    if step == 4:
        trained = [p for p in policy.parameters() if p.grad is not None]
        if trained:  # the parameter in the middle: of an embedding, the row of an absent token stays as it was
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
    num_labels = sum(len(flat_batch(members)["labels"]) for members in packs)
    (scored,) = all_sum(run, num_labels)
    text = "the denominator is not the number of scored tokens"
    check(run, "TRAIN003", step, "tokens too many", abs(scored - num_tokens), text, error=0)
