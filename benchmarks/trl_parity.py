"""Our scripts against TRL 1.16.0: the same losses, step for step, and then the same work for time and memory.

    python benchmarks/trl_parity.py --make_venv DIR                    once: an environment of its own for TRL
    python benchmarks/trl_parity.py --trl_python DIR/bin/python        parity -> results/trl_parity.json
    python benchmarks/trl_parity.py --trl_python DIR/bin/python --speed        -> results/trl_speed.jsonl

Run it with the python of our own requirements.txt. TRL runs in processes of its own (trl_worker.py); nothing of it is
imported here, and the two sides exchange files only. All in fp32 on the CPU, on rows in one order.

Parity      sft, reward, dpo, kto: 20 optimizer steps of the tiny lab; the ids and the scored tokens of every row; loss,
            gradient norm and rewards of every step, without and (not kto) with gradient accumulation.
            grpo, one batch: loss, every parameter's gradient and the advantages from the same completions, rewards and
            old and reference log-probs, over normalisers, KL, clipping and reward scaling; a None reward included.
            grpo, a run: TRL is given the completions and rewards of our run and must follow it, 20 updates long.
Speed       rounds of ours, then TRL in each of its settings; seconds and CPU seconds per optimizer step from the
            arrival of the lines "step N" on both sides, after the warm-up; peak resident memory and wall time of the
            process. The ratio of CPU seconds is the one to trust on a machine that others use, too.
            A ratio is printed only where the first losses agree.

Exit code 2, one line each, where a case cannot run or disagrees; the other cases still run. A result file is replaced
only by a run in which nothing failed.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
TINY = ROOT / "common" / "tiny"
OURS = ("model", "dataset", "batch_size", "max_length", "tokens_per_microbatch", "allow")  # flags that TRL lacks
FILES = {"sft": "demonstrations.jsonl", "reward": "pairs.jsonl", "dpo": "pairs.jsonl", "kto": "labelled.jsonl",
         "grpo": "prompts.jsonl"}  # fmt: skip
TRL, SEED, STEPS, BATCH = "1.16.0", 42, 20, 8
WHOLE = 2**20  # --tokens_per_microbatch: a step in one micro-batch
CHECKPOINTING = {"default": {}, "no checkpointing": {"gradient_checkpointing": False}}  # TRL turns it on by default

# ours, TRL's, limit, of what: metrics of every step. A loss is held to an absolute limit; a norm is of any size.
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
        ("kl", "kl", 1e-5, "absolute"), ("clip_frac", "clip_ratio/region_mean", 1e-6, "absolute"),
    ],
}  # fmt: skip


class Problem(Exception):
    """One line for the reader: a case could not run, or the two sides disagree."""


# ---- processes -------------------------------------------------------------------------------------------------------


def launch(command, options, what):
    """Run a process, note when each line "step N" arrives. -> wall seconds, peak MB, {step: (wall, CPU seconds)}. This
    process stays small and imports no torch: on Linux a child's peak starts at the size of whoever started it."""
    env = os.environ | {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    env |= {"CUDA_VISIBLE_DEVICES": ""}
    started, steps = time.perf_counter(), {}
    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env, text=True,
                                       cwd=options.scratch)  # fmt: skip
        except OSError as e:
            raise Problem(f"{what}: {e.strerror}: {command[0]}") from e
        for line in process.stdout:
            if (found := re.match(r"step +(\d+)", line)) and int(found[1]) not in steps:
                steps[int(found[1])] = time.perf_counter(), cpu_seconds(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            last = ([line.strip() for line in errors if line.strip()] or ["no message"])[-1]
            raise Problem(f"{what} ended with exit code {process.returncode}: {last[:300]}")
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB here
    return {"wall": time.perf_counter() - started, "peak_mb": peak, "at": steps}


def cpu_seconds(pid):
    """User and system time of a running process, or nan where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ours(method, flags, options):
    """One run of methods/<method>.py as anyone would run it. -> what launch says, its metrics by step, its folder."""
    out = Path(tempfile.mkdtemp(dir=options.scratch)) / "run"
    fixed = {"output_dir": out, "seed": SEED, "eval_every": 0, "save_every": 0, "lr_scheduler_type": "linear"}
    fixed |= {"warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 1.0, "tokens_per_microbatch": WHOLE}
    words = [w for name, value in (fixed | flags).items() for w in (f"--{name}", str(value))]
    run = launch([sys.executable, ROOT / "methods" / f"{method}.py", *words], options, f"methods/{method}.py")
    run["steps"] = [row for row in read(out / "metrics.jsonl") if "loss" in row]
    if len(run["steps"]) != flags["max_steps"] or len(run["at"]) < flags["max_steps"]:
        raise Problem(f"methods/{method}.py logged {len(run['steps'])} steps and printed {len(run['at'])}, not "
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


def here(mode, spec, options):
    """Run one of the functions below that need torch, in a process of ours. -> what it returns."""
    path = Path(tempfile.mkdtemp(dir=options.scratch)) / "spec.json"
    path.write_text(json.dumps(spec | {"result": str(path.with_name("result.json"))}))
    launch([sys.executable, Path(__file__).resolve(), "--worker", mode, path], options, mode)
    return json.loads(path.with_name("result.json").read_text())


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- what needs torch (run by `here`) --------------------------------------------------------------------------------


def prepare(spec):
    """Rows of a dataset in the order in which our script takes them."""
    from common.tokenization import order

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

    from common.tokenization import encode_demonstration, encode_preference, flat_batch, load_tokenizer, stop_ids

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

    module_spec = importlib.util.spec_from_file_location(method, ROOT / "methods" / f"{method}.py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[method] = module
    module_spec.loader.exec_module(module)
    return module


def grpo_batch(spec):
    """Our loss and gradients of one batch, per case, cut into several micro-batches. Writes the batch for TRL."""
    import random
    from array import array

    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from common.logprobs import Policy
    from common.tokenization import flat_batch, load_tokenizer, micro_batches

    script, tokenizer, draw = load_script("grpo"), load_tokenizer(spec["model"]), random.Random(0)
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    run = types.SimpleNamespace(device=torch.device("cpu"), rank=0, world=1, args=types.SimpleNamespace(tp_size=1))
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
    table = torch.tensor([[float("nan") if r is None else r for r in row] for row in rewards])
    policy = Policy(AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval())
    completions = [c for group in groups for c in group["completions"]]
    lengths, noise = [len(c["ids"]) for c in completions], torch.Generator().manual_seed(0)
    with torch.no_grad():  # so far off that a good part of the ratios is clipped on either side, and KL is not small
        own = policy(flat_batch(groups))["logprobs"]
        old, ref = (own + 0.3 * torch.randn(own.shape, generator=noise) for _ in range(2))
    for c, *values in zip(completions, old.split(lengths), ref.split(lengths)):
        c["old"], c["ref"] = values
    results = []
    for number, case in enumerate(spec["cases"]):
        args = script.parse_args(["--model", spec["model"], *case["ours"]])
        advantages = script.compute_advantages(table, args, run)
        for c, a in zip(completions, advantages.flatten().tolist()):
            c["advantage"] = a
        policy.zero_grad()
        loss, sums, batches = 0.0, {"clip_frac": 0.0, "kl": 0.0}, micro_batches(groups, spec["budget"])
        for members in batches:
            part, batch = [c for group in members for c in group["completions"]], flat_batch(members)
            logprobs = policy(batch)["logprobs"]
            before = torch.cat([c["old"] for c in part]) if case["old"] else logprobs.detach()
            after = torch.cat([c["ref"] for c in part]) if case["ref"] else None
            advantage = torch.tensor([c["advantage"] for c in part])
            counts = sum(lengths), len(completions)
            piece, metrics = script.grpo_loss(logprobs, before, after, advantage, batch["seq"], *counts, args)
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
    """Per case the largest difference of a parameter's gradient, relative to that gradient's largest entry."""
    from safetensors.torch import load_file

    worst = []
    for number in range(spec["count"]):
        a, b = load_file(f"{spec['ours']}.{number}"), load_file(f"{spec['trl']}.{number}")
        assert a.keys() == b.keys(), "the two sides name their parameters differently"
        worst.append(max(((a[n] - b[n]).abs().max() / b[n].abs().max()).item() for n in a))
    return worst


def middle(spec):
    """A model of middle size with random weights, and data: 32,000 words, so that the head weighs what it does in real
    models, six layers of 256, rows of log-normal length."""
    import random

    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder, draw = Path(spec["to"]), random.Random(0)
    special = re.findall(r'"(<\|\w+\|>)"', (TINY / "model" / "tokenizer_config.json").read_text())
    special = list(dict.fromkeys([*special, "<|system|>", "<|user|>", "<|assistant|>"]))
    words = [f"w{i}" for i in range(32000 - len(special))]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(special + words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    known = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "unk_token": "<|unk|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **known)
    fast.chat_template = (TINY / "model" / "chat_template.jinja").read_text()
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    ends = {"eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=len(fast), num_key_value_heads=4, tie_word_embeddings=True, bos_token_id=None,
                         max_position_embeddings=1024, **sizes, **ends)  # fmt: skip
    lm = LlamaForCausalLM(config)
    lm.generation_config = GenerationConfig(**ends)
    lm.save_pretrained(folder)

    def text(median, most):
        count = min(most, max(4, round(median * draw.lognormvariate(0, 0.5))))
        return " ".join(draw.choice(words) for _ in range(count))

    rows = {name: [] for name in FILES}
    for _ in range(200):
        prompt = [{"role": "user", "content": text(64, 192)}]
        good, bad = ([{"role": "assistant", "content": text(96, 256)}] for _ in range(2))
        rows["sft"].append({"prompt": prompt, "completion": good})
        rows["dpo"].append({"prompt": prompt, "chosen": good, "rejected": bad})
        rows["grpo"].append({"prompt": prompt})
    for name, file in FILES.items():
        write(folder / file, rows[name])


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
    """TRL's arguments for our grpo flags, all completions of an update in one micro-batch."""
    config = {name: value for name, value in flags.items() if name not in OURS}
    config |= {"epsilon": 0.2, "temperature": 1.0, "shuffle_dataset": False, "use_bias_correction_kl": False}
    size = flags["batch_size"] * flags["num_generations"]
    return config | {"per_device_train_batch_size": size, "gradient_checkpointing": False}


def rollouts(flags):
    """(start, count) of the prompts of each rollout of a grpo run, for `order`."""
    size, count = flags["batch_size"], -(-flags["max_steps"] // flags["num_iterations"])
    return [(i * size, size) for i in range(count)]


GRPO = {"batch_size": 4, "num_generations": 8, "max_completion_length": 48, "max_length": 256, "max_steps": STEPS,
        "learning_rate": 1e-4, "beta": 0.0, "loss_type": "dapo", "epsilon_high": 0.28, "scale_rewards": "group",
        "num_iterations": 1}  # fmt: skip


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


def parity_replay(change, config, options, model=TINY / "model", folder=TINY):
    """grpo: our run samples; TRL is handed its completions and rewards in order and has to take the same updates."""
    flags, data, sorted_rows = GRPO | change, folder / FILES["grpo"], options.scratch / "grpo.jsonl"
    mine = ours("grpo", flags | {"model": model, "dataset": data} | reward_flags(), options)
    here("prepare", {"data": str(data), "slices": rollouts(flags), "to": str(sorted_rows)}, options)
    spec = {"model": str(model), "data": str(sorted_rows), "replay": str(mine["folder"] / "samples.jsonl")}
    theirs = trl("grpo", spec | {"config": replay_config(flags) | config}, options)
    # one rollout serves num_iterations updates, and TRL logs what belongs to it only once
    for i, row in enumerate(theirs["steps"]):
        for key in ("reward", "completions/mean_length"):
            row.setdefault(key, theirs["steps"][i - 1].get(key))
    # TRL averages these over micro-batches whatever their number of tokens: other numbers, for the log only
    skip = ("entropy", "kl", "clip_frac") if "gradient_accumulation_steps" in config else ()
    result = {"steps": flags["max_steps"], "worst": compare("grpo", mine["steps"], theirs["steps"], skip)}
    result |= {"clip_frac": max(s["clip_frac"] for s in mine["steps"])}
    if not all(any(s[name] for s in mine["steps"]) for name in ("loss", "grad_norm")):
        raise Problem("grpo: no group had different rewards, agreement would say nothing")
    return result | {"loss_ours": [s["loss"] for s in mine["steps"]], "loss_trl": [s["loss"] for s in theirs["steps"]],
                     "samples": mine["folder"] / "samples.jsonl", "rows": sorted_rows, "versions": theirs["versions"]}


def reward_flags():
    return {"reward": f"{ROOT / 'benchmarks' / 'trl_worker.py'}:even_digits"}


def parity_batch(options, samples, rows):
    """grpo: loss, gradients, advantages of one batch over the cases that a formula can get wrong."""
    size, groups, cases = 8, 8, []
    for loss_type, scale in ("dapo", "group"), ("grpo", "batch"), ("dr_grpo", "none"):
        for beta in (0.0, 0.04):
            for old in (False, True):
                same = {"loss_type": loss_type, "beta": beta, "epsilon_high": 0.28, "scale_rewards": scale}
                words = [w for k, v in (same | {"max_completion_length": 48}).items() for w in (f"--{k}", str(v))]
                name = f"{loss_type}, scaled by {scale}, beta {beta:g}, {'clipped' if old else 'ratio 1'}"
                cases.append({"name": name, "ours": words, "trl": same, "old": old, "ref": beta > 0})
    batch, data = options.scratch / "batch.json", options.scratch / "batch.jsonl"
    write(data, read(rows)[:groups])
    spec = {"model": str(TINY / "model"), "samples": str(samples), "count": size * groups}
    mine = here("grpo_batch", spec | {"size": size, "budget": 1500, "cases": cases, "batch": str(batch)}, options)
    config = {"per_device_train_batch_size": size * groups, "num_generations": size, "max_completion_length": 48,
              "use_bias_correction_kl": False, "gradient_checkpointing": False, "max_steps": 1}  # fmt: skip
    theirs = trl("grpo", {"model": spec["model"], "data": str(data), "batch": str(batch), "config": config}, options)
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
        if idle or not (loss <= 1e-5 and gradient <= 1e-4 and advantage <= 1e-6):
            wrong.append(f"{case['name']}: loss {loss:.1e}, gradient {gradient:.1e}, advantage {advantage:.1e}")
    if wrong:
        raise Problem(f"grpo batch: {'; '.join(wrong)} (limits 1e-5, 1e-4, 1e-6)")
    limits = {"loss": 1e-5, "gradient": 1e-4, "advantage": 1e-6}
    return {"cases": results, "limits": limits, "versions": theirs["versions"]}


def parity(options):
    """All cases -> results, number of failures."""
    results, failed, first = {}, 0, {}

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
    first = case("grpo run, dapo, beta 0.04", parity_replay, {"beta": 0.04}, {}, options)
    if first:
        kept = options.scratch / "kept.jsonl"
        shutil.copy(first["rows"], kept)  # the next run writes its own
    case("grpo run, dapo, accumulated 2 x 16", parity_replay, {},
         {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}, options)  # fmt: skip
    two = {"num_iterations": 2, "loss_type": "grpo", "scale_rewards": "batch", "learning_rate": 3e-4}
    case("grpo run, grpo, 2 iterations", parity_replay, two, {}, options)
    if first:
        case("grpo batch", parity_batch, options, first["samples"], kept)
    return results, failed


# ---- speed -----------------------------------------------------------------------------------------------------------

# steps and, of these, warm-up; rows (sft), pairs (dpo), prompts (grpo) per step
WORK = {
    "tiny": {"sft": (24, 8, 32), "dpo": (16, 4, 32), "grpo": (8, 3, 16)},
    "middle": {"sft": (4, 1, 8), "dpo": (4, 1, 4), "grpo": (4, 1, 4)},
}
# one micro-batch per step, as TRL has it, and not much more: our pass for DPO's reference takes as much at a time
MICRO = {"tiny": {"sft": 4096, "dpo": 4096, "grpo": 8192}, "middle": {"sft": 8192, "dpo": 8192, "grpo": 8192}}
SETTINGS = {
    "sft": CHECKPOINTING,
    "dpo": {
        "default": {},
        "no checkpointing": {"gradient_checkpointing": False},
        "no checkpointing, precomputed": {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
    },
    "grpo": CHECKPOINTING,
}


def speed_case(method, size, options):
    """Rounds of ours and TRL's settings -> one row per run. Problem unless both do the same work."""
    steps, warm, batch = WORK[size][method]
    folder = TINY if size == "tiny" else options.scratch / "middle"
    model, data = (TINY / "model" if size == "tiny" else folder), folder / FILES[method]
    flags = {"model": model, "dataset": data, "batch_size": batch, "max_steps": steps}
    flags |= {"max_length": 256 if size == "tiny" else 512, "tokens_per_microbatch": MICRO[size][method]}
    config = {"max_steps": steps, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1}
    rows = options.scratch / f"{method}-{size}.jsonl"
    if method == "grpo":
        flags = GRPO | flags | {"learning_rate": 1e-6, "max_completion_length": 48 if size == "tiny" else 64}
        # random weights know no stop token: every completion is cut at the limit, and we would stop with GRPO002
        flags |= {} if size == "tiny" else {"allow": "GRPO002"}
        agree = parity_replay(flags | {"max_steps": 2}, {}, options, model, folder)
        gap, slices = agree["worst"]["loss"]["worst"], rollouts(flags)
        config, flags = replay_config(flags), flags | reward_flags()
        del config["gradient_checkpointing"]
    else:
        flags["learning_rate"] = config["learning_rate"] = 1e-5
        config["max_length"], slices = flags["max_length"], [(0, steps * batch)]
    here("prepare", {"data": str(data), "slices": slices, "to": str(rows)}, options)
    spec = {"model": str(model), "data": str(rows)}
    found = []
    for number in range(options.rounds):
        runs = {"ours": ours(method, flags, options)}
        for name, setting in SETTINGS[method].items():
            runs[name] = trl(method, spec | {"config": config | setting}, options)
        for name, run in runs.items():
            if method == "grpo":  # each side samples for itself: the same prompts, and as many tokens
                length = "completion_len" if name == "ours" else "completions/mean_length"
                work = [statistics.mean(s[length] for s in r["steps"][warm:]) for r, length in
                        ((runs["ours"], "completion_len"), (run, length))]  # fmt: skip
                if abs(work[0] / work[1] - 1) > 0.05:
                    raise Problem(f"grpo {size}: {work[0]:.1f} tokens a completion against TRL's {work[1]:.1f}")
            else:
                first = [[s["loss"] for s in r["steps"][:3]] for r in (runs["ours"], run)]
                gap = max(abs(a - b) / max(1, abs(b)) for a, b in zip(*first, strict=True))
                if not gap <= 1e-4:
                    raise Problem(f"{method} {size}, TRL {name}: the first losses differ by {gap:.1e}: no ratio")
            (begin, busy), (end, busy_end) = run["at"][warm], run["at"][steps]
            side = name if name == "ours" else f"TRL, {name}"
            row = {"method": method, "size": size, "side": side, "round": number + 1}
            row |= {"seconds_per_step": (end - begin) / (steps - warm), "peak_mb": run["peak_mb"]}
            row |= {"cpu_seconds_per_step": (busy_end - busy) / (steps - warm), "process_seconds": run["wall"]}
            found.append(row | {"steps": steps, "warmup": warm, "batch": batch, "first_losses_differ_by": gap})
            print(f"{method:<5} {size:<7} {row['side']:<36} round {number + 1}  {row['seconds_per_step']:.4f} s/step  "
                  f"{row['cpu_seconds_per_step']:.4f} CPU s/step  {row['peak_mb']:.0f} MB  {run['wall']:.1f} s in all",
                  flush=True)  # fmt: skip
    versions = runs["ours"]["folder"] / "run.json"
    about = {"trl": run["versions"], "ours": json.loads(versions.read_text())["versions"]}
    return [row | {"versions": about} for row in found]


def table(rows):
    """Markdown: medians with ranges over the rounds; ratios within a round, TRL over ours (above 1: we win)."""

    def show(values, digits):
        return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"

    names = ["method", "size", "TRL setting", "s/step ours", "s/step TRL", "time ratio", "CPU time ratio"]
    names += ["MB ours", "MB TRL", "memory ratio", "process ratio"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    key = lambda row: (row["method"], row["size"], row["side"])  # noqa: E731
    for method, size, side in dict.fromkeys(map(key, rows)):
        if side == "ours":
            continue
        theirs = [row for row in rows if key(row) == (method, size, side)]
        mine = [next(r for r in rows if key(r) == (method, size, "ours") and r["round"] == t["round"]) for t in theirs]
        cells = [method, size, side.removeprefix("TRL, ")]
        cells += [show([row["seconds_per_step"] for row in side_rows], 3) for side_rows in (mine, theirs)]
        for name in ("seconds_per_step", "cpu_seconds_per_step", "peak_mb", "process_seconds"):
            if name == "peak_mb":
                cells += [show([row[name] for row in side_rows], 0) for side_rows in (mine, theirs)]
            cells.append(show([t[name] / m[name] for t, m in zip(theirs, mine)], 2))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed(options):
    """All cases -> rows, number of failures."""
    rows, failed = [], 0
    if "middle" in options.sizes:
        here("middle", {"to": str(options.scratch / "middle")}, options)
    for size in options.sizes:
        for method in [name for name in options.only or FILES if name in WORK[size]]:
            try:
                rows += speed_case(method, size, options)
            except Problem as e:
                print(f"error: {method} {size}: {e}", file=sys.stderr, flush=True)
                failed += 1
    return rows, failed


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


def about(options):
    """What a reader needs to repeat this: revision and content of what ran, machine, threads. No paths."""
    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()

    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", info.read_text() if info.is_file() else "", re.M)
    device = f"{platform.machine()} {found[1] if found else ''}, {os.cpu_count()} logical CPUs"
    patterns = ("methods/*.py", "common/*.py", "benchmarks/trl_*.py")
    files = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    sha = {p.relative_to(ROOT).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files}
    words = ["--speed", f"--rounds {options.rounds}", f"--sizes {' '.join(options.sizes)}"] if options.speed else []
    words += [f"--threads {options.threads}"] + ([f"--only {' '.join(options.only)}"] if options.only else [])
    result = {"command": " ".join(["python benchmarks/trl_parity.py --trl_python TRL_PYTHON", *words]), "sha256": sha}
    result |= {"git": git("rev-parse", "HEAD"), "uncommitted": bool(git("status", "--porcelain", "methods", "common"))}
    return result | {"device": device, "threads": options.threads, "date": time.strftime("%Y-%m-%d")}


def replace(path, text):
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl_python", help="python of an environment with TRL")
    parser.add_argument("--make_venv", metavar="DIR", help="make that environment with pip, and use it")
    parser.add_argument("--speed", action="store_true", help="time and memory instead of parity")
    parser.add_argument("--only", nargs="*", choices=list(FILES), help="these methods; the result file is not replaced "
                        "by a parity run, and gets only their rows from --speed")  # fmt: skip
    parser.add_argument("--sizes", nargs="*", choices=list(WORK), default=list(WORK), help="workloads of --speed")
    parser.add_argument("--rounds", type=int, default=3, help="of --speed")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on both sides")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        mode, path = options.worker
        spec = json.loads(Path(path).read_text())
        functions = {f.__name__: f for f in (prepare, classifier, tokens, grpo_batch, gradients, middle)}
        Path(spec["result"]).write_text(json.dumps(functions[mode](spec)))
        return 0
    try:
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
    except Problem as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="trl-parity-") as scratch:
        options.scratch = Path(scratch)
        before = about(options)
        if options.speed:
            rows, failed = speed(options)
            if rows:
                print("\n" + table(rows))
            rows, path = [row | before for row in rows], RESULTS / "trl_speed.jsonl"
            done = {(row["method"], row["size"]) for row in rows}
            old = [row for row in (read(path) if path.is_file() else []) if (row["method"], row["size"]) not in done]
            if rows and before == about(options):
                replace(path, "".join(json.dumps(row) + "\n" for row in old + rows))
        else:
            results, failed = parity(options)
            if not failed and not options.only and before == about(options):
                replace(RESULTS / "trl_parity.json", json.dumps(before | {"results": results}, indent=1) + "\n")
        if before != about(options):
            print("error: the scripts changed during the run: nothing written", file=sys.stderr)
            failed += 1
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
