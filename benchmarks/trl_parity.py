"""Our scripts against TRL 1.16.0: the same losses, step for step.

    python benchmarks/trl_parity.py --make_venv DIR                    once: an environment of its own for TRL
    python benchmarks/trl_parity.py --trl_python DIR/bin/python        -> results/trl_parity.json

Run it with the python of our own requirements.txt. TRL runs in processes of its own (trl_worker.py); nothing of it is
imported here, and the two sides exchange files only. All in fp32 on the CPU, on rows in one order. Time and memory of
the same work: versus_trl.py.

sft, reward,     20 optimizer steps of the tiny lab; the ids and the scored tokens of every row; loss, gradient norm
dpo, kto         and rewards of every step, without and (not kto) with gradient accumulation.
grpo, rloo,      loss, every parameter's gradient and the advantages from the same completions, rewards and old and
one batch        reference log-probs, over normalisers, KL, clipping, scaling and clipping of rewards; a None reward
                 included.
grpo, rloo,      TRL is given the completions and rewards of our run and must follow it, 20 updates long.
a run

orpo and distillation have no case here. tests/test_orpo_losses.py and tests/test_distillation.py hold losses and
gradients to TRL's own values, and versus_trl.py the losses of three steps.

Exit code 2, one line each, where a case cannot run or disagrees; the other cases still run. The result file is replaced
only by a run in which nothing failed.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
TINY = ROOT / "common" / "tiny"
OURS = ("model", "teacher", "dataset", "batch_size", "max_length", "tokens_per_microbatch", "allow",
        "lmbda")  # flags that TRL lacks
FILES = {"sft": "demonstrations.jsonl", "reward": "pairs.jsonl", "dpo": "pairs.jsonl", "kto": "labelled.jsonl",
         "grpo": "prompts.jsonl", "rloo": "prompts.jsonl", "orpo": "pairs.jsonl",
         "distillation": "demonstrations.jsonl"}  # fmt: skip
TRL, SEED, STEPS, BATCH = "1.16.0", 42, 20, 8
WHOLE = 2**20  # --tokens_per_microbatch: a step in one micro-batch

# ours, TRL's, limit, of what: metrics of every step. A loss is held to an absolute limit; a norm is of any size, and so
# is grpo's kl: its estimator is exponential in log-probs, so that one rare token makes most of it, and of its rounding.
LOSS, NORM = ("loss", "loss", 1e-4, "absolute"), ("grad_norm", "grad_norm", 1e-3, "relative")
COMPARED = {
    "sft": [LOSS, NORM],
    "reward": [
        LOSS, NORM, ("accuracy", "accuracy", 1e-6, "absolute"), ("reward_margin", "margin", 1e-4, "absolute"),
        ("reward_mean", "mean_reward", 1e-4, "absolute"),
    ],
    "kto": [
        LOSS, NORM, ("kl", "kl", 1e-3, "absolute"), ("reward_chosen", "rewards/chosen", 1e-4, "absolute"),
        ("reward_rejected", "rewards/rejected", 1e-4, "absolute"),
    ],
    "dpo": [
        LOSS, NORM, ("reward_margin", "rewards/margins", 1e-4, "absolute"),
        ("reward_chosen", "rewards/chosen", 1e-4, "absolute"), ("reward_acc", "rewards/accuracies", 1e-6, "absolute"),
    ],
    "grpo": [
        ("loss", "loss", 1e-5, "absolute"), NORM, ("reward", "reward", 1e-6, "absolute"),
        ("completion_len", "completions/mean_length", 1e-4, "absolute"), ("entropy", "entropy", 1e-4, "absolute"),
        ("kl", "kl", 1e-3, "relative"), ("clip_frac", "clip_ratio/region_mean", 1e-6, "absolute"),
    ],
}  # fmt: skip
COMPARED["rloo"] = [("kl", "kl", 1e-5, "absolute") if metric[0] == "kl" else metric for metric in COMPARED["grpo"]]


class Problem(Exception):
    """One line for the reader: a case could not run, or the two sides disagree."""


# ---- processes -------------------------------------------------------------------------------------------------------


def launch(command, options, what):
    """Run a process, note when each line "step N" arrives. -> wall seconds, peak MB up to the last step (without steps,
    or without /proc: of the whole process, which may save a model), {step: (wall, CPU seconds)}. Problem where it is
    killed, fails, or takes longer than options.limit seconds. This process stays small and imports no torch: on Linux a
    child's peak starts at the size of whoever started it."""
    env = os.environ | {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    env |= {"CUDA_VISIBLE_DEVICES": ""}
    started, steps, trained = time.perf_counter(), {}, None
    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env, text=True,
                                       cwd=options.scratch)  # fmt: skip
        except OSError as e:
            raise Problem(f"{what}: {e.strerror}: {command[0]}") from e
        timer = threading.Timer(options.limit, process.kill)
        timer.daemon = True
        timer.start()
        for line in process.stdout:
            if (found := re.match(r"step +(\d+)", line)) and int(found[1]) not in steps:
                steps[int(found[1])] = time.perf_counter(), cpu_seconds(process.pid)
                trained = peak_mb(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode == -signal.SIGKILL:
            late = time.perf_counter() - started >= options.limit
            why = f"it took over {options.limit:g} s (--limit)" if late else "out of memory?"
            raise Problem(f"{what} was killed: {why}")
        if process.returncode:
            errors.seek(0)
            last = ([line.strip() for line in errors if line.strip()] or ["no message"])[-1]
            raise Problem(f"{what} ended with exit code {process.returncode}: {last[:300]}")
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB here
    return {"wall": time.perf_counter() - started, "peak_mb": trained or peak, "process_mb": peak, "at": steps}


def peak_mb(pid):
    """Peak resident MB of a running process so far, or None where there is no /proc."""
    try:
        return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 2**10
    except OSError:
        return None


def cpu_seconds(pid):
    """User and system time of a running process, or nan where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def script_path(method):
    """Our script: in methods/ or in methods/experimental/."""
    (path,) = ROOT.glob(f"methods/**/{method}.py")
    return path


def ours(method, flags, options, via=()):
    """One run of our script as anyone would run it, or by the command words `via`. -> what launch says, its
    metrics by step, its folder."""
    out = Path(tempfile.mkdtemp(dir=options.scratch)) / "run"
    fixed = {"output_dir": out, "seed": SEED, "eval_every": 0, "save_every": 0, "lr_scheduler_type": "linear"}
    fixed |= {"warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 1.0, "tokens_per_microbatch": WHOLE}
    words = [w for name, value in (fixed | flags).items() for w in (f"--{name}", str(value))]
    run = launch([sys.executable, *(via or [script_path(method)]), *words], options, f"our {method}.py")
    run["steps"] = [row for row in read(out / "metrics.jsonl") if "loss" in row]
    if len(run["steps"]) != flags["max_steps"] or len(run["at"]) < flags["max_steps"]:
        raise Problem(f"our {method}.py logged {len(run['steps'])} steps and printed {len(run['at'])}, not "
                      f"{flags['max_steps']}")
    return run | {"folder": out}


def trl(method, spec, options):
    """One run of trl_worker.py. -> what launch says, and what the worker wrote."""
    scratch = Path(tempfile.mkdtemp(dir=options.scratch))
    spec = {"method": method, "scratch": str(scratch / "out"), "result": str(scratch / "result.json")} | spec
    (scratch / "spec.json").write_text(json.dumps(spec))
    worker = ROOT / "benchmarks" / "trl_worker.py"
    run = launch([options.trl_python, worker, scratch / "spec.json"], options, f"TRL's {method}")
    return run | json.loads(Path(spec["result"]).read_text()) | {"path": spec["result"]}


def here(mode, spec, options, file=__file__, python=sys.executable):
    """Run one of the functions of `file` that need torch, in a process of its own. -> what it returns."""
    path = Path(tempfile.mkdtemp(dir=options.scratch)) / "spec.json"
    path.write_text(json.dumps(spec | {"result": str(path.with_name("result.json"))}))
    launch([python, Path(file).resolve(), "--worker", mode, path], options, mode)
    return json.loads(path.with_name("result.json").read_text())


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- what needs torch (run by `here`) --------------------------------------------------------------------------------


def prepare(spec):
    """Rows of a dataset in the order in which our script takes them."""
    from common.batches import order

    rows = read(spec["data"])
    turn = -1 if spec.get("reverse") else 1
    picked = [i for start, count in spec["slices"] for i in order(len(rows), SEED, start, count)[::turn]]
    write(Path(spec["to"]), [rows[i] for i in picked])


def classifier(spec):
    """The model with a head of one label, so that both sides begin with the same one."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

    torch.manual_seed(SEED)
    lm = AutoModelForSequenceClassification.from_pretrained(spec["model"], dtype=torch.float32, num_labels=1)
    lm.save_pretrained(spec["to"])
    for part in AutoTokenizer, GenerationConfig:
        part.from_pretrained(spec["model"]).save_pretrained(spec["to"])


def tokens(spec):
    """The ids of every row and the positions that our loss scores, in the form of trl_worker.scored_ids."""
    from transformers import GenerationConfig

    from common.batches import flat_batch
    from common.tokenization import encode_demonstration, encode_preference, load_tokenizer, stop_ids

    tokenizer, sequences = load_tokenizer(spec["model"]), []
    stops = stop_ids(tokenizer, GenerationConfig.from_pretrained(spec["model"]))
    for row in read(spec["data"])[: spec["tokens"]]:
        encode = encode_preference if "chosen" in row else encode_demonstration
        groups = encode(row, tokenizer, stops)
        for group in groups if isinstance(groups, list) else [groups]:
            for completion in group["completions"]:  # one at a time; the shift by one is flat_batch's
                batch = flat_batch([group | {"completions": [completion]}])
                scored = (batch["rows"] + 1).tolist()
                sequences.append([batch["input_ids"].tolist(), scored[-1:] if spec["method"] == "reward" else scored])
    return sequences


def load_script(method):
    import importlib.util

    module_spec = importlib.util.spec_from_file_location(method, script_path(method))
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[method] = module
    module_spec.loader.exec_module(module)
    return module


def part_of_loss(script, policy, with_old, counts, args, groups):
    """The part that these groups have in the loss of a batch with `counts` tokens and sequences, and their metrics."""
    from common.batches import flat_batch

    batch = flat_batch(groups)  # with what the completions carry
    logprobs = policy(batch)["logprobs"]
    batch["old_logprobs"] = batch["old"] if with_old else logprobs.detach()
    batch["sampler_logprobs"] = batch["old_logprobs"]
    return getattr(script, f"{script.__name__}_loss")(logprobs, batch, *counts, args)


def online_batch(spec):
    """grpo, rloo: our loss and gradients of one batch, per case, cut into micro-batches, and for each parameter the
    sum of |the gradient of a sequence| over all sequences: what `gradients` refers to. Writes the batch for TRL."""
    import random
    from array import array

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from common.batches import flat_batch, pack
    from common.logprobs import Policy
    from common.rewards import reward_table
    from common.tokenization import load_tokenizer

    script, tokenizer, draw = load_script(spec["method"]), load_tokenizer(spec["model"]), random.Random(0)
    lines, size, groups = read(spec["samples"])[: spec["count"]], spec["size"], []
    for i in range(0, len(lines), size):
        members = lines[i : i + size]
        texts = [members[0]["prompt"], *(line["completion"] for line in members)]
        prompt, *ids = (array("i", tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        assert all(tokenizer.decode(x) == text for x, text in zip((prompt, *ids), texts)), "lossy text"
        groups.append({"prompt": prompt, "completions": [{"ids": x, "scored": None} for x in ids], "row": i})
    # varied rewards, one group without differences, one completion that no reward function could score
    rewards = [[draw.choice((0.0, 0.25, 0.5, 1.0)) for _ in group["completions"]] for group in groups]
    rewards[1], rewards[2][3] = [0.5] * size, None
    policy = Policy(AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval())
    completions = [c for group in groups for c in group["completions"]]
    lengths, noise = [len(c["ids"]) for c in completions], torch.Generator().manual_seed(0)
    with torch.no_grad():  # so far off that a good part of the ratios is clipped on either side, and KL is not small
        own = policy(flat_batch(groups))["logprobs"]
        old, ref = (own + spec["noise"] * torch.randn(own.shape, generator=noise) for _ in range(2))
        ref = ref - spec["noise"]  # or rloo's estimate of the KL would be 0 on average
    flat = [math.nan if r is None else r for row in rewards for r in row]
    for c, reward, *values in zip(completions, flat, *(x.split(lengths) for x in (own, old, ref)), strict=True):
        c["reward"], (c["own"], c["old"], c["ref"]) = reward, values
    results = []
    for number, case in enumerate(spec["cases"]):
        args = script.parse_args(["--model", spec["model"], *case["ours"]])
        for c in completions:
            c["sampler_logprobs"], c["ref_logprobs"] = c["old"] if case["old"] else c["own"], c["ref"]
        rewards_of = script.penalized_rewards if spec["method"] == "rloo" else lambda groups, _: reward_table(groups)
        advantages = script.compute_advantages(rewards_of(groups, args), args)
        for c, a in zip(completions, advantages.flatten().tolist()):
            c["advantage"] = a
        loss, sums, batches = 0.0, {"clip_frac": 0.0, "kl": 0.0}, pack(groups, spec["budget"])
        counts = sum(lengths), len(completions)
        loss_of_part = functools.partial(part_of_loss, script, policy, case["old"], counts, args)
        magnitudes = {n: torch.zeros_like(p) for n, p in policy.lm.named_parameters()}
        for group in groups:
            for completion in group["completions"]:
                policy.zero_grad()
                loss_of_part([group | {"completions": [completion]}])[0].backward()
                for n, p in policy.lm.named_parameters():
                    magnitudes[n] += p.grad.abs()
        save_file(magnitudes, f"{spec['result']}.{number}.magnitudes")
        policy.zero_grad()
        for members in batches:
            piece, metrics = loss_of_part(members)
            piece.backward()
            loss += piece.item()
            sums = {name: value + float(metrics.get(name, 0)) / counts[0] for name, value in sums.items()}
        save_file({n: p.grad for n, p in policy.lm.named_parameters()}, f"{spec['result']}.{number}")
        sums |= {"loss": loss, "advantages": advantages.flatten().tolist(), "micro_batches": len(batches)}
        results.append(sums)
    batch = {"groups": [], "cases": spec["cases"], "old": [c["old"].tolist() for c in completions]}
    batch["ref"] = [c["ref"].tolist() for c in completions]
    for group, row in zip(groups, rewards):
        ids = [[*c["ids"]] for c in group["completions"]]
        batch["groups"].append({"prompt": [*group["prompt"]], "completions": ids, "rewards": row})
    Path(spec["batch"]).write_text(json.dumps(batch))
    return {"cases": results, "path": spec["result"]}


def gradients(spec):
    """Per case the largest difference of a parameter's gradient, relative to the largest entry of what is summed to it:
    |the part of a sequence|, over all sequences. Advantages have both signs, and what is left of the sum can be 25
    times smaller than what went into it, but the rounding is that of the parts.

    The difference is mostly TRL's rounding. Its head takes p = exp(z - log_z) with an fp32 log_z, which at a log_z of
    20 makes every p of a row wrong by 1e-6 of itself; for a token of which the model is sure, 1 - p is hardly larger.
    Beside the formula written out in float64, one sequence at a time, a case of rloo was at 6e-6 here and TRL at
    1.9e-5; TRL at 1.8e-5 with its model in float64 but not that log_z, and at 2e-6 with float64 in the head alone. One
    part in 1,000 too much on one side is 3e-4 here."""
    from safetensors.torch import load_file

    worst = []
    for number in range(spec["count"]):
        a, b = load_file(f"{spec['ours']}.{number}"), load_file(f"{spec['trl']}.{number}")
        assert a.keys() == b.keys(), "the two sides name their parameters differently"
        scale = load_file(f"{spec['ours']}.{number}.magnitudes")
        worst.append(max(((a[n] - b[n]).abs().max() / scale[n].max()).item() for n in a))
    return worst


def answer(words, functions):
    """What `here` asked of this process."""
    mode, path = words
    spec = json.loads(Path(path).read_text())
    Path(spec["result"]).write_text(json.dumps({f.__name__: f for f in functions}[mode](spec)))
    return 0


# ---- parity ----------------------------------------------------------------------------------------------------------


def compare(method, mine, theirs, skip=()):
    """-> {metric: worst difference over the steps}; Problem where one is over its limit, missing on one side or NaN."""
    if len(mine) != len(theirs):
        raise Problem(f"{method}: {len(mine)} steps of ours, {len(theirs)} of TRL's")
    worst = {}
    for name, name_trl, limit, kind in COMPARED[method]:
        if name in skip or (name == "kl" and name not in mine[0] and name_trl not in theirs[0]):
            continue  # beta 0: no reference on either side
        if name not in mine[0] or name_trl not in theirs[0]:
            raise Problem(f"{method}: {name} or TRL's {name_trl} is not logged (ours: {', '.join(mine[0])})")
        pairs = [(a[name], b.get(name_trl)) for a, b in zip(mine, theirs)]
        pairs = [(a, math.nan if b is None else b) for a, b in pairs if (a, b) != (None, None)]  # a label without rows
        floor = 1e-3 * max(abs(b) for _, b in pairs) + 1e-12  # a step whose groups are all silent has no gradient
        gaps = [abs(a - b) / (max(abs(b), floor) if kind == "relative" else 1) for a, b in pairs]
        gap = max(gaps)
        if not gap <= limit:
            step = next(i for i, g in enumerate(gaps) if not g <= limit)
            raise Problem(f"{method}: {name} differs at step {step + 1}: ours {pairs[step][0]:.7g}, TRL "
                          f"{pairs[step][1]:.7g}; {gap:.2e} {kind} over the steps, limit {limit:g}")
        worst[name] = {"worst": gap, "limit": limit, "kind": kind}
    return worst


def replay_config(flags):
    """TRL's arguments for our flags of a method that samples, all completions of an update in one micro-batch."""
    config = {name: value for name, value in flags.items() if name not in OURS}
    config |= {"epsilon": 0.2, "temperature": 1.0, "shuffle_dataset": False}
    config |= {"use_bias_correction_kl": False} if "loss_type" in flags else {}  # grpo's KL is in the loss
    size = flags["batch_size"] * flags["num_generations"]
    return config | {"per_device_train_batch_size": size, "gradient_checkpointing": False}


def rollouts(flags):
    """(start, count) of the prompts of each rollout of a run, for `order`."""
    size, count = flags["batch_size"], -(-flags["max_steps"] // flags["num_iterations"])
    return [(i * size, size) for i in range(count)]


GRPO = {"batch_size": 4, "num_generations": 8, "max_completion_length": 48, "max_length": 256, "max_steps": STEPS,
        "learning_rate": 1e-4, "beta": 0.0, "loss_type": "dapo", "epsilon_high": 0.28, "scale_rewards": "group",
        "num_iterations": 1}  # fmt: skip
RLOO = {name: value for name, value in GRPO.items() if name not in ("loss_type", "scale_rewards", "epsilon_high")}
RLOO |= {"beta": 0.05}  # the default of both sides


def parity_offline(method, accumulate, options):
    """sft, reward, dpo, kto: the same rows through both, 20 updates of 8 rows; accumulate: TRL in 4 micro-batches of 2,
    ours by 256 tokens, so that both cut the step, and differently. kto: TRL gives a row the completion of the one
    before, we that of the next, so its rows go in backwards, step by step; and it has a kl for each micro-batch."""
    model, data = TINY / "model", TINY / FILES[method]
    sorted_rows = options.scratch / f"{method}.jsonl"
    slices = [(step * BATCH, BATCH) for step in range(STEPS)]
    about = {"data": str(data), "slices": slices, "to": str(sorted_rows), "reverse": method == "kto"}
    here("prepare", about, options)
    if method == "reward":
        here("classifier", {"model": str(model), "to": str(options.scratch / "classifier")}, options)
        model = options.scratch / "classifier"
    flags = {"model": model, "dataset": data, "max_length": 256, "batch_size": BATCH, "max_steps": STEPS}
    flags |= {"learning_rate": 1e-4, "tokens_per_microbatch": 256 if accumulate else WHOLE}
    config = {"max_length": 256, "max_steps": STEPS, "learning_rate": 1e-4, "gradient_checkpointing": False}
    config |= {"per_device_train_batch_size": 2 if accumulate else BATCH}
    config |= {"gradient_accumulation_steps": 4 if accumulate else 1}
    more = {"dpo": {"beta": 0.1}, "kto": {"beta": 0.5, "learning_rate": 3e-4, "desirable_weight": 1.3},
            "reward": {"learning_rate": 1e-3, "center_rewards_coefficient": 0.01}}.get(method, {})  # fmt: skip
    flags, config = flags | more, config | more
    count = STEPS * BATCH
    mine = ours(method, flags, options)
    theirs = trl(method, {"model": str(model), "data": str(sorted_rows), "config": config, "tokens": count}, options)
    about = {"method": method, "model": str(model), "data": str(sorted_rows), "tokens": count}
    scored = here("tokens", about, options)
    if scored != theirs["tokens"]:
        row = next(i for i, (a, b) in enumerate(zip(scored, theirs["tokens"])) if a != b)
        raise Problem(f"{method}: sequence {row} differs: ours {scored[row]}, TRL {theirs['tokens'][row]}")
    worst = compare(method, mine["steps"], theirs["steps"])
    moved = abs(mine["steps"][-1]["loss"] - mine["steps"][0]["loss"]) / mine["steps"][0]["loss"]
    if moved < 0.05:
        raise Problem(f"{method}: the loss moved by {moved:.1%} only, agreement would say little")
    if method == "kto" and sum(step["kl"] > 0.01 for step in mine["steps"]) < 3:
        raise Problem("kto: kl is hardly ever above 0, agreement would say little")
    result = {"steps": STEPS, "worst": worst, "equal_sequences": len(scored)}
    result |= {"scored_tokens": sum(len(s) for _, s in scored), "versions": theirs["versions"]}
    return result | {"loss_ours": [s["loss"] for s in mine["steps"]], "loss_trl": [s["loss"] for s in theirs["steps"]]}


def sampled(method, flags, data, options):
    """Our run of a method that samples. -> the run with what TRL needs to follow it."""
    mine, rows = ours(method, flags | reward_flags(), options), options.scratch / f"{method}.jsonl"
    here("prepare", {"data": str(data), "slices": rollouts(flags), "to": str(rows)}, options)
    return mine | {"method": method, "samples": mine["folder"] / "samples.jsonl", "rows": rows, "flags": flags}


def replay(mine, config, options):
    """TRL is handed the completions and rewards of `sampled` in order and has to take the same updates. -> what its
    worker wrote, and the worst differences."""
    method = mine["method"]
    spec = {"model": str(mine["flags"]["model"]), "data": str(mine["rows"]), "replay": str(mine["samples"])}
    theirs = trl(method, spec | {"config": replay_config(mine["flags"]) | config}, options)
    # one rollout serves num_iterations updates, and TRL logs what belongs to it only once
    for i, row in enumerate(theirs["steps"]):
        for key in ("reward", "completions/mean_length"):
            row.setdefault(key, theirs["steps"][i - 1].get(key))
    if not all(any(s[name] for s in mine["steps"]) for name in ("loss", "grad_norm")):
        raise Problem(f"{method}: no group had different rewards, agreement would say nothing")
    # TRL averages these over micro-batches whatever their number of tokens: other numbers, for the log only
    skip = ("entropy", "kl", "clip_frac") if config.get("gradient_accumulation_steps", 1) > 1 else ()
    if method == "rloo" and mine["flags"]["num_iterations"] > 1:
        skip = ("kl", "clip_frac")  # TRL's is the rollout's, ours the step's; it counts sequences, we their tokens
    return theirs | {"worst": compare(method, mine["steps"], theirs["steps"], skip)}


def parity_replay(method, change, config, options):
    flags = {"grpo": GRPO, "rloo": RLOO}[method] | change | {"model": TINY / "model", "dataset": TINY / FILES[method]}
    mine = sampled(method, flags, flags["dataset"], options)
    theirs = replay(mine, config, options)
    result = {"steps": flags["max_steps"], "worst": theirs["worst"]}
    result |= {"clip_frac": max(s["clip_frac"] for s in mine["steps"])}
    return result | {"loss_ours": [s["loss"] for s in mine["steps"]], "loss_trl": [s["loss"] for s in theirs["steps"]],
                     "samples": mine["samples"], "rows": mine["rows"], "versions": theirs["versions"]}


def reward_flags():
    return {"reward": f"{ROOT / 'benchmarks' / 'trl_worker.py'}:even_digits"}


BATCHES = {  # method -> what a case is called, flags of both sides: what a formula can get wrong
    "grpo": {f"{loss_type}, scaled by {scale}": {"loss_type": loss_type, "scale_rewards": scale}
             for loss_type, scale in (("dapo", "group"), ("grpo", "batch"), ("dr_grpo", "none"))},
    "rloo": {"plain": {}, "normalized": {"normalize_advantages": True},
             "clipped rewards": {"reward_clip_range": [0.3, 0.8]}},
}  # fmt: skip


def words_of(flags):
    """Flags as a command line has them."""
    return [word for name, value in flags.items() for word in
            (f"--{name}", *([] if value is True else map(str, value if isinstance(value, list) else [value])))]


def parity_batch(method, options, samples, rows):
    """grpo, rloo: loss, gradients, advantages of one batch."""
    size, groups, cases = 8, 8, []
    for name, flags in BATCHES[method].items():
        for beta in (0.0, 0.04):
            for old in (False, True):
                same = flags | {"beta": beta, "epsilon_high": 0.28}
                title = f"{name}, beta {beta:g}, {'clipped' if old else 'ratio 1'}"
                words = words_of(same | {"max_completion_length": 48})
                cases.append({"name": title, "ours": words, "trl": same, "old": old, "ref": beta > 0})
    batch, data = options.scratch / "batch.json", options.scratch / "batch.jsonl"
    write(data, read(rows)[:groups])
    spec = {"method": method, "model": str(TINY / "model"), "samples": str(samples), "count": size * groups}
    # of a token's log-probs: a good part of the ratios, which rloo has of whole sequences, is clipped
    spec |= {"noise": {"grpo": 0.3, "rloo": 0.06}[method]}
    mine = here("online_batch", spec | {"size": size, "budget": 1500, "cases": cases, "batch": str(batch)}, options)
    config = {"per_device_train_batch_size": size * groups, "num_generations": size, "max_completion_length": 48,
              "gradient_checkpointing": False, "max_steps": 1}  # fmt: skip
    config |= {"use_bias_correction_kl": False} if method == "grpo" else {}
    theirs = trl(method, {"model": spec["model"], "data": str(data), "batch": str(batch), "config": config}, options)
    worst = here("gradients", {"ours": mine["path"], "trl": theirs["path"], "count": len(cases)}, options)
    results, wrong = [], []
    for case, a, b, gradient in zip(cases, mine["cases"], theirs["cases"], worst, strict=True):
        advantage = max(abs(x - y) for x, y in zip(a["advantages"], b["advantages"], strict=True))
        # at ratio 1 the parts cancel and the sum may be 0: the size of what is summed is what rounding refers to
        scale = max(abs(b["loss"]), statistics.mean(map(abs, b["advantages"])))
        loss = abs(a["loss"] - b["loss"]) / scale
        line = {"case": case["name"], "loss_ours": a["loss"], "loss_trl": b["loss"], "loss_difference": loss}
        line |= {"gradient_difference": gradient, "advantage_difference": advantage, "clip_frac": a["clip_frac"]}
        results.append(line | {"kl": a["kl"], "micro_batches": a["micro_batches"]})
        idle = case["old"] and a["clip_frac"] < 0.05 or case["ref"] and a["kl"] < 0.01  # the case would test nothing
        if idle or not (loss <= 1e-5 and gradient <= 5e-5 and advantage <= 1e-6):
            wrong.append(f"{case['name']}: loss {loss:.1e}, gradient {gradient:.1e}, advantage {advantage:.1e}")
    if wrong:
        raise Problem(f"{method} batch: {'; '.join(wrong)} (limits 1e-5, 5e-5, 1e-6)")
    limits = {"loss": 1e-5, "gradient": 5e-5, "advantage": 1e-6}
    return {"cases": results, "limits": limits, "versions": theirs["versions"]}


def parity(options):
    """All cases -> results, number of failures."""
    results, failed = {}, 0

    def case(name, function, *args):
        nonlocal failed
        if options.only and name.split()[0] not in options.only:
            return None
        try:
            results[name] = result = function(*args)
        except Problem as e:
            print(f"error: {name}: {e}", file=sys.stderr, flush=True)
            failed += 1
            return None
        for metric, w in result.get("worst", {}).items():
            print(f"{name:<44} {metric:<16} {w['worst']:.1e} {w['kind']} (limit {w['limit']:g})", flush=True)
        for line in result.get("cases", []):
            gaps = (f"{k} {line[f'{k}_difference']:.1e}" for k in ("loss", "gradient", "advantage"))
            about = f"clipped {line['clip_frac']:.2f}  kl {line['kl']:.3f}"
            print(f"{name:<12} {line['case']:<46} {'  '.join(gaps)}  {about}", flush=True)
        return {k: result.pop(k) for k in ("samples", "rows") if k in result}

    for method in ("sft", "reward", "dpo"):
        case(f"{method} batch 8", parity_offline, method, False, options)
        case(f"{method} accumulated 4 x 2", parity_offline, method, True, options)
    case("kto batch 8", parity_offline, "kto", False, options)
    # beta > 0, or entropy and clip_frac would be means over the groups that have a signal, TRL's over all of them
    two = {"num_iterations": 2, "learning_rate": 3e-4}
    sliced = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
    for method, what, changes in (
        ("grpo", "dapo, ", ({"beta": 0.04}, {}, two | {"loss_type": "grpo", "scale_rewards": "batch", "beta": 1e-9})),
        ("rloo", "", ({}, {}, two)),
    ):
        name = f"{method} run, {what}beta {(RLOO | changes[0])['beta']}"
        first = case(name, parity_replay, method, changes[0], {}, options)
        if first:
            kept = options.scratch / "kept.jsonl"
            shutil.copy(first["rows"], kept)  # the next run writes its own
        case(f"{method} run, {what}accumulated 2 x 16", parity_replay, method, changes[1], sliced, options)
        case(f"{method} run, 2 iterations", parity_replay, method, changes[2], {}, options)
        if first:
            case(f"{method} batch", parity_batch, method, options, first["samples"], kept)
    return results, failed


# ---- main ------------------------------------------------------------------------------------------------------------


def make_venv(folder):
    """TRL and our pins of what both sides share, in an environment of its own. -> its python."""
    pins = dict(re.findall(r"^(\w+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.M))
    wanted = [f"trl=={TRL}", *(f"{name}=={pins[name]}" for name in ("torch", "transformers", "datasets"))]
    python = Path(folder).resolve() / ("Scripts" if os.name == "nt" else "bin") / "python"
    for command in [sys.executable, "-m", "venv", folder], [python, "-m", "pip", "install", *wanted]:
        if subprocess.run(command).returncode:
            raise Problem(f"{' '.join(map(str, command[-6:]))} failed: see pip's message above")
    return str(python)


def check_trl(options):
    """options.trl_python becomes a python whose TRL has the wanted version, or Problem."""
    if options.make_venv:
        options.trl_python = make_venv(options.make_venv)
    if not options.trl_python:
        raise Problem("--trl_python PATH is missing: a python with TRL. --make_venv DIR makes one.")
    # not resolve(): python of a venv is a link, and only under its own name does it find the venv's packages
    options.trl_python = os.path.abspath(options.trl_python)
    ask = [options.trl_python, "-c", "import importlib.metadata as m; print(m.version('trl'))"]
    try:
        found = subprocess.run(ask, capture_output=True, text=True)
    except OSError as e:
        raise Problem(f"--trl_python {options.trl_python}: {e.strerror}") from e
    if found.returncode or found.stdout.strip() != TRL:
        what = f"TRL {found.stdout.strip()}" if not found.returncode else "no TRL"
        raise Problem(f"--trl_python has {what}, {TRL} is wanted. --make_venv DIR makes such an environment.")


def about(command, threads):
    """What a reader needs to repeat this: revision and content of what ran, machine, threads. No paths."""
    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()

    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", info.read_text() if info.is_file() else "", re.M)
    device = f"{platform.machine()} {found[1] if found else ''}, {os.cpu_count()} logical CPUs"
    patterns = ("common/**/*.py", "benchmarks/*trl*.py")
    files = sorted(script_path(method) for method in FILES)
    files += [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    sha = {p.relative_to(ROOT).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files}
    result = {"command": command, "sha256": sha, "git": git("rev-parse", "HEAD")}
    result |= {"uncommitted": bool(git("status", "--porcelain", "methods", "common"))}
    return result | {"device": device, "threads": threads, "date": time.strftime("%Y-%m-%d")}


def replace(path, text):
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def read_options(parser, argv=None):
    """The options that versus_trl.py shares with this."""
    parser.add_argument("--trl_python", help="python of an environment with TRL")
    parser.add_argument("--make_venv", metavar="DIR", help="make that environment with pip, and use it")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on both sides")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds that one process may take")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = "these methods; the result file is not replaced"
    parser.add_argument("--only", nargs="*", choices=list(COMPARED), help=only)
    options = read_options(parser)
    if options.worker:
        return answer(options.worker, (prepare, classifier, tokens, online_batch, gradients))
    try:
        check_trl(options)
    except Problem as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    command = f"python benchmarks/trl_parity.py --trl_python TRL_PYTHON --threads {options.threads}"
    with tempfile.TemporaryDirectory(prefix="trl-parity-") as scratch:
        options.scratch = Path(scratch)
        before = about(command, options.threads)
        results, failed = parity(options)
        if before != about(command, options.threads):
            print("error: the scripts changed during the run: nothing written", file=sys.stderr)
            failed += 1
        if not failed and not options.only:
            replace(RESULTS / "trl_parity.json", json.dumps(before | {"results": results}, indent=1) + "\n")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
