"""What a process knows about its run, what the run writes into its folder, and what it shows."""

import json
import math
import os
import resource
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from common.attention import kernel_name
from common.batches import group_tokens
from common.runtime.flags import InputError, PlanOnly, printable, spelled_out
from common.tokenization import token_picture

LOGS = ("metrics.jsonl", "samples.jsonl", "alerts.jsonl")  # what a resume cuts back; other files are not ours


@dataclass
class Run:
    """What a process knows about its run. Models, data and optimizers are locals of the script's main."""

    args: object  # the script's Args
    script: Path  # the script's file
    rank: int
    world: int  # number of ranks
    dp_rank: int
    dp_size: int  # number of ranks with rows of their own: those that share layers (tp) share their rows, too
    group: object  # the process group of every collective in shared code
    device: torch.device
    dtype: torch.dtype  # that the layers compute in; weights and gradients are float32
    out: Path  # the output folder
    checkpoint: Path | None  # the folder that is resumed
    mesh_shape: tuple  # sizes of the mesh's dimensions: replicate, shard, tp
    command: str  # starts this run again
    versions: dict  # what a bitwise equal run needs to have, too
    mesh: object = None  # set by main
    step: int = 0  # optimizer steps that are done
    in_steps: bool = False  # the first step has begun: a signal to stop waits for the end of a step, and saves
    state: dict = field(default_factory=lambda: {"alerts": {}})  # saved with every checkpoint
    data: str = ""  # fingerprint of the training rows
    unread: set = field(default_factory=set)  # columns of the rows that nothing has asked for
    weights: int = 0  # how many the model in training has
    tracker: object = None  # the module wandb or trackio, on rank 0
    bar: object = None  # tqdm's, on rank 0 and a terminal
    started: float = field(default_factory=time.monotonic)
    saved_at: float = field(default_factory=time.monotonic)  # time of the newest checkpoint
    saving: float = 0.0  # seconds spent on saving
    lost_calls: bool = False  # on any rank, a call of a reward function has failed since the last check_rewards
    beat: float = field(default_factory=time.monotonic)  # time of the last progress, for `watch`
    watched: tuple = ()  # weights, and a copy of them after step 4, for `check_update`


# ---- files ---------------------------------------------------------------------------------------
def record(out, **fields):
    """Update run.json, from the first moment to the exit code; the file is replaced whole. For rank 0 only."""
    path = out / ".run.json"
    path.unlink(missing_ok=True)  # of a run that was killed, or a link
    with open_own(path, "x") as file:
        file.write(json.dumps(strict(read_json(out / "run.json") | fields), indent=1))
    fsync(path)
    os.replace(path, out / "run.json")


def open_own(path, mode):
    """Open a file in the output folder for writing: the file itself, never what a link leads to, and without waiting
    for the reader of a pipe."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666))


def read_json(path):
    """Return the object in a file, or {} where there is none that can be read. Of a pipe or device there is no end."""
    try:
        if not path.is_file():
            return {}
        return {**json.loads(path.read_text())}  # a TypeError for all but an object
    except (OSError, TypeError, ValueError, RecursionError):
        return {}


def fsync(path):
    """Return when a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write(run, name, fields):
    """Append one line of JSON to a file of the run (rank 0)."""
    if run.rank == 0:
        with open_own(run.out / name, "a") as file:
            print(json.dumps(strict(fields)), file=file)


def strict(fields):
    """Return fields as every reader of JSON takes them: a number that is not finite becomes null."""
    return json.loads(json.dumps(fields), parse_constant=lambda _: None)


def first_line(error):
    return (str(error).strip() or repr(error)).split("\n")[0][:300]


# ---- console -------------------------------------------------------------------------------------
def log(run, step, metrics, steps, stays=False):
    """Write metrics to metrics.jsonl and the tracker, and show them: in a bar on a terminal, as a line elsewhere, and
    there, too, if the line stays."""
    run.beat = time.monotonic()
    fields = {"step": step, **metrics}
    write(run, "metrics.jsonl", fields)
    if run.tracker:
        run.tracker.log(fields, step=step)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "perf/tokens_per_s")
    if stays or run.rank != 0 or not sys.stdout.isatty():
        say(run, f"step {step}  {shown}")
        return
    if run.bar is None:
        layout = "step {n_fmt}/{total_fmt} [{bar:16}] {elapsed}<{remaining}  {desc}"
        run.bar = tqdm(total=steps, initial=step, bar_format=layout, dynamic_ncols=True, file=sys.stdout)
    run.bar.n = step
    room = shutil.get_terminal_size().columns - 50  # what the bar leaves
    while len(shown) > room and "  " in shown:
        shown = shown.rpartition("  ")[0]  # a metric is shown whole or not at all
    run.bar.set_description_str(shown)
    if step == steps:
        run.bar.close()


def log_eval(run, step, metrics, steps):
    """The same for an evaluation, whose line stays. The state keeps the first, last and best one."""
    log(run, step, metrics, steps, stays=True)
    run.in_steps = True
    run.state.setdefault("before", metrics)
    run.state["last"] = metrics
    if metrics["eval/accuracy"] > run.state.get("best", {"accuracy": -1})["accuracy"]:
        run.state["best"] = {"accuracy": metrics["eval/accuracy"], "step": step}


def say(run, line, file=None):
    """Print a line on rank 0, to stdout or another file; control characters in it are spelled out."""
    show(run, spelled_out(line), file)


def show(run, text, file=None):
    """Print a text as it is; where there is a bar, above it."""
    if run.bar is not None:
        run.bar.write(text, file=file)
    elif run.rank == 0:
        print(text, file=file, flush=True)


def progress(run, title, items, total):
    """Yield the items. Each counts as progress for the watchdog and, on a terminal, moves a bar that then vanishes."""
    tqdm.monitor_interval = 0  # no thread that looks after bars: it would still run when the process ends
    hidden = run.rank != 0 or not sys.stdout.isatty()
    with tqdm(desc=title, total=total, disable=hidden, leave=False, dynamic_ncols=True, file=sys.stdout) as bar:
        for item in items:
            run.beat = time.monotonic()
            yield item
            bar.update()


def show_groups(run, title, groups, tokenizer):
    for group in groups:
        show(run, f"{title:<10}{token_picture(group, tokenizer, sys.stdout.isatty())}")


def print_plan(run, policy, tokenizer, *, train, heldout, counts, steps, memory):
    only_plan = run.args.max_steps == 0
    if steps < 1 and not only_plan:
        raise InputError("no optimizer step is planned: raise --max_steps or --num_train_epochs.")
    if run.args.eval_dataset and not heldout:
        raise InputError(f"--eval_dataset {run.args.eval_dataset}: no row is left. Raise --max_length or fix rows.")
    folder = Path(policy.lm.name_or_path)
    commit = folder.name if folder.parent.name == "snapshots" else None  # of a hub id
    if run.rank == 0:
        record(run.out, data=run.data, steps=steps, model_commit=commit)
    tokens = sum(map(group_tokens, train))
    show_groups(run, "first row", train[: 3 if only_plan else 1], tokenizer)
    say(run, f"data      {counts['kept']} of {counts['rows']} rows kept, {tokens} tokens; {len(heldout)} rows held out")
    if run.unread:
        say(run, f"unread    columns {printable(', '.join(sorted(run.unread)))}")
    say(run, f"run       {steps} steps of {run.args.batch_size} rows on {run.world} x {run.versions['device']}")
    dtype = str(run.dtype).removeprefix("torch.")
    model = f"{run.weights / 1e6:.1f}M weights in float32, layers in {dtype}, {policy.road} road, dropout 0"
    kernel = "the model's own"
    if policy.road == "flat":
        kernel = kernel_name(policy.lm, run.device.type, run.dtype)
    static = 16e-9 * run.weights * run.args.replicate_size / run.world  # fp32 weights, gradients, Adam's two moments
    say(run, f"model     {model}; weights, gradients and Adam take {static:.2f} GB a rank")
    if commit:
        say(run, f"commit    {commit} of --model {run.args.model}")
    say(run, f"attention {kernel}")
    machines = run.world // int(os.environ.get("LOCAL_WORLD_SIZE", run.world))
    if machines > 1 and run.args.replicate_size == 1:
        text = "every layer's weights cross the network; if one holds the model, they need not with --replicate_size"
        say(run, f"machines  {machines}: {text} {machines}")
    say(run, f"memory    {memory}")
    say(run, f"command   {run.command}")
    if only_plan:
        if run.rank == 0:
            record(run.out, status="planned", exit_code=0)
        raise PlanOnly
    run.in_steps = run.step > 0 or not heldout  # else the first evaluation comes before


# ---- steps ---------------------------------------------------------------------------------------
def schedule(step, steps, args):
    """Return the factor of the learning rate at optimizer step `step` (from 0), as transformers computes it."""
    if step < args.warmup_steps:
        return step / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    if args.lr_scheduler_type == "linear":
        return 1 - progress
    if args.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


def is_due(step, steps, every):
    """Return whether something is to happen after this step: at every so many steps (0: none), and at the end."""
    return step == steps or (every > 0 and step % every == 0)


def performance(started, groups):
    """Return seconds of the step, this rank's tokens per second (a prompt counts once) and its peak memory."""
    seconds = time.perf_counter() - started
    rate = sum(map(group_tokens, groups)) / seconds
    return {"perf/seconds": seconds, "perf/tokens_per_s": rate, "perf/peak_gb": peak_bytes() / 1e9}


def peak_bytes():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
