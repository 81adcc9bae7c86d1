"""Speed and memory of our scripts beside TRL 1.16.0 on the same work, on the CPU.

    python benchmarks/versus_trl.py --trl_python DIR/bin/python                     -> results/versus_trl.jsonl
    python benchmarks/versus_trl.py --trl_python DIR/bin/python --only sft-long     only the rows of these cases
    python benchmarks/versus_trl.py --make_venv DIR                                 the environment for TRL, and the run

A case (CASES) is some work: a model, rows, their order, the optimizer, fp32 weights on both sides. For each
1  the machine: rate of a 1024^3 fp32 product, memory bandwidth, and what importing torch and transformers takes;
2  our run, and TRL with every candidate setting (`candidates`): the one that takes the least CPU time per useful token
   is TRL's best. One that fails, or whose losses are not ours, cannot be. All are kept in the results, side "search".
   TRL lean: the fewest rows at a time, with its activation checkpointing. We have two settings: as CASES says, and
   lean, the same with --activation_checkpointing on, held against TRL's best and TRL lean. head: TRL's kernel, and
   plain cross-entropy;
3  rounds of ours, ours lean, TRL's defaults, TRL's best, ours, ...: every run a process of its own. The losses of the
   first three steps must agree in every round; grpo and rloo sample anew on each side, so there TRL first takes three
   updates on the completions of our run. Where they differ there is one line, and no ratio.

distillation takes the data's completions on both sides (--lmbda 0 here; TRL, which always samples, is handed them where
it would). Completions that each side samples differ, and with them the work, and TRL can only follow a run of ours by
leaving its sampling out: what is left is this. The cost of sampling is in the cases of grpo. The teacher is a model of
random weights, too, of other ones, with twice the layers. orpo: the first term of TRL's loss is over the tokens of the
prompt, too. For the same work it is replaced by ours, from log-probs that TRL has (trl_worker.py). It still computes
its own, but takes no gradient of it, which is in its favour.

Useful tokens   what a user trains on: of every sequence the prompt and the completion, without padding, whatever is
                shared, recomputed or scored twice, and without kto's mismatched pairs. The same number for both sides
                (grpo, rloo: each its own completions).
Time            per optimizer step after the warm-up, from the arrival of the lines "step N". The ratio of CPU seconds
                per useful token is the one to trust on a machine that others use, too. A pass over all rows before
                the first step (of a reference) is charged to the steps: one epoch, the dearest case for it.
Memory          peak resident size up to the last step (then we save, which TRL is told not to); "above": less 16 bytes
                a parameter (weights, gradients, Adam's two moments), less 4 bytes a parameter of a teacher (weights),
                which is a model that both sides need, less what importing torch and transformers takes. Our copy of the
                student, which samples where --lmbda is above 0 and is made in any case, counts as ours.
Limit           time of the useful floating-point operations at the measured rate, over the measured time: 2 a weight
                and token forwards, twice that backwards, 4 a head width and pair of positions in attention; a prompt
                once per group, the head for completion tokens only (reward: no head); distillation: a forward of the
                teacher, of its own size. Sampling: the weights read once
                per token of a completion of mean length, if that takes longer.
Parts           grpo, rloo: the seconds inside sampling and inside passes without gradients, of the same runs.

TRL's best is looked for among: no activation checkpointing; all rows of a step at once, or 1/2, 1/4, 1/8 of them at a
time (less padding); sft: padding_free (rows of a step in one, with the mask that transformers makes for sdpa); eager
attention; dpo, kto: precomputed reference log-probs; grpo, rloo: continuous batching, its cache as large as the work;
--compile: torch_compile, which works but compiles for minutes, the first time in the warm-up. kto has a kl for each
micro-batch there, so only all rows at once are our work; and rows go to it backwards, step by step (trl_parity.py).
Left out: bf16 (other numbers); packing (another choice of rows per step; padding_free is the same without it); dpo's
padding_free (switched off in 1.16); flash attention and Liger (no CPU kernels), flex attention (no CPU backward);
workers of the data loader (the cores are busy). On a CPU TRL's head scores every position, on a GPU only labelled ones:
long prompts cost it less there.

Exit code 2, one line each, where a case cannot run or disagrees; the other cases still run. A case's rows replace its
old ones when it is complete, in one go.
"""

import argparse
import importlib
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import trl_parity as parity
from trl_parity import FILES, OURS, RESULTS, TINY, Problem, read, write
from trl_worker import ONLINE, timed

FILE, LEAN = RESULTS / "versus_trl.jsonl", "ours, lean"

# ---- cases -----------------------------------------------------------------------------------------------------------

# tokens of prompts and completions: medians, how widely they spread (log-normal), and the most of each
ROWS = {
    "short": (32, 32, 0.4, 96, 96), "mixed": (48, 96, 1.0, 192, 448), "long": (128, 320, 0.3, 256, 512),
    "prompts": (160, 48, 0.4, 320, 128),
}  # fmt: skip
# passes: forwards that a step needs besides sampling: a backward is two, dpo has a reference, kto the policy's kl
# (`measure` adds kto's reference, grpo's and rloo's where there is one, and a teacher, which has another size). parts:
# functions that are timed, of our script or of common/, and under which name: see `timed_function`
SAMPLING = {"common.sampling.Sampler.sample": "rollout", "refresh": "rollout",
            "common.rewards.reward_groups": "reward", "attach_logprobs": "logprobs"}  # fmt: skip
METHODS = {
    "sft": {"passes": 3, "flags": {"learning_rate": 1e-5}, "parts": {}},
    "reward": {"passes": 3, "flags": {"learning_rate": 1e-5}, "parts": {}},
    "dpo": {"passes": 4, "flags": {"learning_rate": 1e-5, "beta": 0.1}, "parts": {"attach_reference": "precompute"}},
    "kto": {"passes": 4, "flags": {"learning_rate": 1e-5, "beta": 0.1}, "parts": {"attach_reference": "precompute"}},
    "orpo": {"passes": 3, "flags": {"learning_rate": 1e-5, "beta": 0.1}, "parts": {}},
    "distillation": {"passes": 3, "flags": {"learning_rate": 1e-5, "lmbda": 0}, "parts": {}},
    "grpo": {"passes": 3, "flags": parity.GRPO | {"learning_rate": 1e-6, "max_completion_length": 96},
             "parts": SAMPLING},
    "rloo": {"passes": 3, "flags": parity.RLOO | {"learning_rate": 1e-6, "max_completion_length": 96},
             "parts": SAMPLING},
}  # fmt: skip
# batch: rows, pairs or prompts per step; of the steps the first `warm` are not timed. rows: of ROWS, or tiny: the lab
# that comes with the scripts. More flags of our script go both ways.
LAB, TINY_LAB = {"steps": 4, "warm": 1, "micro": 512}, {"rows": "tiny", "micro": 4096}
CASES = {
    "sft-short": LAB | {"method": "sft", "rows": "short", "batch": 8},
    "sft-mixed": LAB | {"method": "sft", "rows": "mixed", "batch": 8},
    "sft-long": LAB | {"method": "sft", "rows": "long", "batch": 2},
    "reward": LAB | {"method": "reward", "rows": "short", "batch": 8},
    "dpo-short": LAB | {"method": "dpo", "rows": "short", "batch": 4},
    "dpo-prompts": LAB | {"method": "dpo", "rows": "prompts", "batch": 2},
    "kto": LAB | {"method": "kto", "rows": "short", "batch": 8},
    "orpo": LAB | {"method": "orpo", "rows": "short", "batch": 4},
    "distillation": LAB | {"method": "distillation", "rows": "short", "batch": 8},
    "grpo-4": LAB | {"method": "grpo", "rows": "short", "batch": 4, "flags": {"num_generations": 4}},
    "grpo-8": LAB | {"method": "grpo", "rows": "short", "batch": 2, "flags": {"num_generations": 8}},
    "grpo-16": LAB | {"method": "grpo", "rows": "short", "batch": 2, "flags": {"num_generations": 16}},
    "grpo-prompts": LAB | {"method": "grpo", "rows": "prompts", "batch": 2, "flags": {"num_generations": 8}},
    "grpo-kl": LAB | {"method": "grpo", "rows": "short", "batch": 2, "flags": {"num_generations": 8, "beta": 0.04}},
    "rloo": LAB | {"method": "rloo", "rows": "short", "batch": 2, "flags": {"num_generations": 8}},
    "head": {"method": "head", "tokens": 1024, "hidden": 576, "vocabulary": 49152, "repeats": 4},
    "tiny-sft": TINY_LAB | {"method": "sft", "batch": 32, "steps": 24, "warm": 8},
    "tiny-dpo": TINY_LAB | {"method": "dpo", "batch": 32, "steps": 12, "warm": 4},
    "tiny-grpo": TINY_LAB | {"method": "grpo", "batch": 16, "steps": 8, "warm": 3, "micro": 8192,
                             "flags": {"max_completion_length": 48}},
}  # fmt: skip


def flags_of(case):
    """Flags of our script."""
    flags = METHODS[case["method"]]["flags"] | case.get("flags", {})
    flags |= {"batch_size": case["batch"], "max_steps": case["steps"], "tokens_per_microbatch": case["micro"]}
    return flags | {"max_length": 256 if case["rows"] == "tiny" else 1024}


def size_of(case):
    """What TRL's batch sizes count: rows, pairs, or completions."""
    return case["batch"] * (flags_of(case)["num_generations"] if case["method"] in ONLINE else 1)


def cut(case, rows):
    """TRL's arguments that take a step in pieces of so many rows."""
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": size_of(case) // rows}


def config_of(case):
    """TRL's arguments for the same work, its defaults otherwise: it takes 8 rows at a time, and checkpoints."""
    flags, size = flags_of(case), size_of(case)
    if case["method"] in ONLINE:
        config = parity.replay_config(flags)
        del config["gradient_checkpointing"]
    else:
        config = {name: value for name, value in flags.items() if name not in OURS}
        config["max_length"] = flags["max_length"]
    if case["method"] == "distillation":  # its own loader, as grpo's; no row is too long
        del config["max_length"]
        config["shuffle_dataset"] = False
    return config | cut(case, 8 if size % 8 == 0 else size)


def candidates(case, compiled=False):
    """-> {side: settings to try}: where two sides are to be measured, the best of each is."""
    size, off = size_of(case), {"gradient_checkpointing": False}
    pieces = [off | cut(case, size // k) for k in (1, 2, 4, 8) if size % k == 0 and size // k]
    pieces = pieces[:1] if case["method"] == "kto" else pieces
    eager = pieces[0] | {"model_init_kwargs": {"attn_implementation": "eager"}}
    if case["method"] == "distillation":
        eager["teacher_model_init_kwargs"] = eager["model_init_kwargs"]
    sides = {"TRL best": [*pieces, eager], "TRL lean": [{k: v for k, v in pieces[-1].items() if k not in off}]}
    if case["method"] == "sft":
        sides["TRL best"] += [piece | {"padding_free": True, "max_length": None} for piece in pieces[:2]]
    if case["method"] in ("dpo", "kto"):
        sides["TRL best, precomputed"] = [piece | {"precompute_ref_log_probs": True} for piece in pieces]
    if case["method"] in ONLINE:
        cache = {"page_size": 32, "num_blocks": 512, "max_batch_tokens": 1024}  # its default takes half of the memory
        engine = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": cache}
        sides["TRL best"].append(pieces[0] | engine)
    if compiled:
        sides["TRL best"].append(pieces[0] | {"torch_compile": True})
    return sides


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def useful_tokens(groups):
    """groups: (prompt tokens, [completion tokens, ...]). Every sequence whole, as TRL sees it without padding."""
    return sum(prompt + completion for prompt, completions in groups for completion in completions)


def forward_flops(groups, shape):
    """One forward over prompts once per group and all completions, the head for completion tokens. shape: body, head
    (matrix entries), layers, width (of all query heads together)."""
    total = 0
    for prompt, completions in groups:
        scored = sum(completions)
        pairs = prompt * (prompt + 1) / 2 + sum(c * prompt + c * (c + 1) / 2 for c in completions)
        total += 2 * shape["body"] * (prompt + scored) + 2 * shape["head"] * scored
        total += 4 * shape["layers"] * shape["width"] * pairs
    return total


def limits(groups, passes, sampled, shape, machine):
    """Seconds that a step, and its sampling if it samples, cannot go below. machine: flops and bandwidth, a second."""
    forward = forward_flops(groups, shape) / machine["flops"]
    decoded = max(completion for _, completions in groups for completion in completions)
    reads = 4 * (shape["body"] + shape["head"]) * decoded / machine["bandwidth"]
    rollout = max(forward, reads) if sampled else 0.0
    return passes * forward + rollout, rollout


def measure(run, case, lengths, shape, machine):
    """Numbers of one run, per step after the warm-up. run: at {step: (wall, CPU seconds)}, steps (as logged), events
    [part, start, wall, CPU seconds]; lengths: (prompt, [completion, ...]) tokens of every row, in order."""
    steps, warm, batch, sampled = case["steps"], case["warm"], case["batch"], case["method"] in ONLINE
    (begin, busy), (end, busy_end), count, parts = run["at"][warm], run["at"][steps], steps - warm, {}
    for part, start, wall, cpu in run["events"]:
        if part == "precompute" or begin <= start < end:
            over, old = steps if part == "precompute" else count, parts.get(part, (0, 0))
            parts[part] = old[0] + wall / over, old[1] + cpu / over
    tokens, scored, bounds, passes = 0, 0, [], METHODS[case["method"]]["passes"]
    for step in range(warm, steps):
        groups, logged = lengths[step * batch : (step + 1) * batch], run["steps"][step]
        if sampled:  # the logs of both sides have a mean; attention aside, it is all that matters
            length = logged["completion_len" if "completion_len" in logged else "completions/mean_length"]
            groups = [(prompt, [length] * flags_of(case)["num_generations"]) for prompt, _ in groups]
        tokens += useful_tokens(groups)
        scored += sum(sum(completions) for _, completions in groups)
        reference = sampled and flags_of(case)["beta"] > 0
        bounds.append(limits(groups, passes + reference, sampled, shape, machine))
        if case["method"] == "kto":  # a prompt with its own completion and a neighbour's
            pairs = [(prompt, own + groups[i - 1][1]) for i, (prompt, own) in enumerate(groups)]
            bounds.append([a + b for a, b in zip(bounds.pop(), limits(pairs, 1, False, shape, machine))])
        if "teacher" in shape:
            forward = limits(groups, 1, False, shape["teacher"], machine)
            bounds.append([a + b for a, b in zip(bounds.pop(), forward)])
    once = parts.get("precompute", (0, 0))
    row = {"seconds_per_step": (end - begin) / count + once[0]}
    row |= {"cpu_seconds_per_step": (busy_end - busy) / count + once[1], "tokens_per_step": tokens / count}
    row |= {"completion_tokens_per_step": scored / count, "parts": parts}
    return row | {"limit_seconds": [sum(values) / count for values in zip(*bounds)]}


def views(row):
    """-> {name: (seconds, CPU seconds, useful tokens, limit in seconds or None)}: the whole step, and its parts."""
    whole = row["seconds_per_step"], row["cpu_seconds_per_step"]
    found, parts = {"": (*whole, row["tokens_per_step"], row["limit_seconds"][0])}, row["parts"]
    if "rollout" in parts:
        rest = [a - sum(part[i] for part in parts.values()) for i, a in enumerate(whole)]
        found["rollout only"] = *parts["rollout"], row["completion_tokens_per_step"], row["limit_seconds"][1]
        if "logprobs" in parts:
            found["log-probs only"] = *parts["logprobs"], row["tokens_per_step"], None
        found["update only"] = *rest, row["tokens_per_step"], None
    return found


def compared(name, view, pairs):
    """The line of `summary` for one part of a step. pairs: (our run, TRL's) of every round."""
    line = {"case": name, "view": view, "side": pairs[0][1]["side"], "setting": pairs[0][1].get("setting", {})}
    costs = [(views(a)[view], views(b)[view]) for a, b in pairs]
    line["cpu"] = [b[1] / b[2] / (a[1] / a[2]) for a, b in costs]
    line["wall"] = [b[0] / b[2] / (a[0] / a[2]) for a, b in costs]
    line["tokens"] = [[cost[i][2] / cost[i][0] for cost in costs] for i in (0, 1)]
    shares = [[cost[i][3] and cost[i][3] / cost[i][0] for cost in costs] for i in (0, 1)]
    line["share"] = shares if None not in shares[0] else None
    if not view:
        line["peak"] = [[row["peak_mb"] for row in side_rows] for side_rows in zip(*pairs)]
        line["above"] = [[row["above_mb"] for row in side_rows] for side_rows in zip(*pairs)]
        line["process"] = [b["process_seconds"] / a["process_seconds"] for a, b in pairs]
    return line


def summary(rows):
    """-> a line for every case, part of a step and side of TRL: ratios within a round, TRL over ours, above 1 where we
    need less. `best`: of all sides the one that needs the least CPU time for the whole step. "lean": the whole step of
    our lean run, beside that one and beside TRL lean."""
    lines = []
    for name in dict.fromkeys(row["case"] for row in rows if "round" in row):
        runs = [row for row in rows if row["case"] == name and "round" in row]
        ours, lean = ({row["round"]: row for row in runs if row["side"] == side} for side in ("ours", LEAN))
        found = []
        for side in dict.fromkeys(row["side"] for row in runs if row["side"] not in ("ours", LEAN)):
            theirs = [row for row in runs if row["side"] == side]
            found += [compared(name, view, [(ours[row["round"]], row) for row in theirs]) for view in views(theirs[0])]
        whole = [line for line in found if not line["view"]]
        best = min(whole, key=lambda line: statistics.median(line["cpu"]))["side"]
        lines += [line | {"best": line["side"] == best} for line in found]
        for side in (best, "TRL lean") if lean else ():
            pairs = [(lean[row["round"]], row) for row in runs if row["side"] == side]
            lines.append(compared(name, "", pairs) | {"best": side == best, "view": "lean"})
    return lines


def show(values, digits=2):
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def above_ratio(line):
    """Of memory above what the model itself takes; None where ours takes nothing there."""
    mine, theirs = line["above"]
    return [b / a for a, b in zip(mine, theirs)] if min(mine) > 0 else None


def words(setting):
    """TRL's setting in few words."""
    short = {"gradient_checkpointing": "checkpointing", "per_device_train_batch_size": "batch",
             "gradient_accumulation_steps": "accumulation", "precompute_ref_log_probs": "precomputed",
             "use_transformers_continuous_batching": "continuous batching"}  # fmt: skip
    rest = {"model_init_kwargs": "eager attention", "teacher_model_init_kwargs": "", "max_length": "",
            "transformers_continuous_batching_config": ""}  # fmt: skip
    parts = [rest[k] if k in rest else short.get(k, k) + ("" if v is True else f" {v}") for k, v in setting.items()
             if v is not False]  # fmt: skip
    return ", ".join(filter(None, ["no checkpointing"] * (False in setting.values()) + parts)) or "defaults"


def table(rows):
    """Markdown: medians with ranges over the rounds."""
    names = ["case", "TRL", "tokens/s ours", "tokens/s TRL", "CPU time ratio", "time ratio", "MB ours", "MB TRL",
             "memory ratio above the model", "process time ratio", "share of the limit: ours, TRL"]  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for line in summary(rows):
        cells = [f"{line['case']} {line['view']}".strip(), f"{line['side'].removeprefix('TRL ')}: "
                 f"{words(line['setting'])}" if line["setting"] else line["side"].removeprefix("TRL ")]
        cells += [show(values, 0) for values in line["tokens"]] + [show(line["cpu"]), show(line["wall"])]
        if "above" not in line:
            cells += [""] * 4
        else:
            above = above_ratio(line)
            cells += [show(values, 0) for values in line["peak"]] + [show(above) if above else "-"]
            cells.append(show(line["process"]))
        share = line["share"]
        cells.append(", ".join(f"{statistics.median(values):.0%}" for values in share) if share else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- what needs torch (run by `here`) --------------------------------------------------------------------------------


def lab(spec):
    """A model with random weights, 12.9M of them, 30 % of the matrices in the head (Qwen3-0.6B: 26 %), and data. One
    word in 48 is a stop token, and no row has one: the lengths of completions are geometric, as if it had learned.
    teacher/: another with twice the layers and opinions: five times the spread of its weights, or both would find all
    tokens nearly equally likely, and the loss would hardly depend on which tokens count."""
    import random

    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder, draw = Path(spec["to"]), random.Random(0)
    special = re.findall(r'"(<\|\w+\|>)"', (TINY / "model" / "tokenizer_config.json").read_text())
    special = list(dict.fromkeys([*special, "<|system|>", "<|user|>", "<|assistant|>"]))
    texts = [f"w{i}" for i in range(12000 - len(special))]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(special + texts)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    known = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "unk_token": "<|unk|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **known)
    fast.chat_template = (TINY / "model" / "chat_template.jinja").read_text()
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    ends = {"eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    sizes = {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=len(fast), num_key_value_heads=4, tie_word_embeddings=True, bos_token_id=None,
                         max_position_embeddings=1024, **sizes, **ends)  # fmt: skip
    lm, stops = LlamaForCausalLM(config), texts[::48]
    ids = [fast.eos_token_id, *fast.convert_tokens_to_ids(stops)]
    lm.generation_config = GenerationConfig(**ends | {"eos_token_id": ids})
    lm.save_pretrained(folder)
    torch.manual_seed(1)
    config.num_hidden_layers, config.initializer_range = 16, 0.1
    teacher = LlamaForCausalLM(config)
    teacher.generation_config = lm.generation_config
    for part in teacher, fast:
        part.save_pretrained(folder / "teacher")
    usual = sorted({*texts} - {*stops})

    def text(median, spread, most):
        count = min(most, max(4, round(median * draw.lognormvariate(0, spread))))
        return " ".join(draw.choice(usual) for _ in range(count))

    for name, (prompts, completions, spread, longest, most) in ROWS.items():
        rows = []
        for _ in range(128):
            chats = [[{"role": "assistant", "content": text(completions, spread, most)}] for _ in range(2)]
            prompt = [{"role": "user", "content": text(prompts, spread, longest)}]
            rows.append({"prompt": prompt, "completion": chats[0], "chosen": chats[0], "rejected": chats[1],
                         "label": len(rows) % 2 == 0})  # fmt: skip
        (folder / name).mkdir()
        for method, columns in COLUMNS.items():
            write(folder / name / FILES[method], [{k: row[k] for k in columns} for row in rows])


COLUMNS = {"sft": ["prompt", "completion"], "dpo": ["prompt", "chosen", "rejected"],
           "kto": ["prompt", "completion", "label"], "grpo": ["prompt"]}  # fmt: skip


def lengths(spec):
    """(prompt, [completion, ...]) tokens of every row."""
    from transformers import GenerationConfig

    from common.tokenization import encode_demonstration, encode_preference, encode_prompt, load_tokenizer, stop_ids

    tokenizer, found = load_tokenizer(spec["model"]), []
    stops = stop_ids(tokenizer, GenerationConfig.from_pretrained(spec["model"]))
    for row in read(spec["data"]):
        if "completion" in row:
            groups = encode_demonstration(row, tokenizer, stops)
        else:
            groups = [encode_preference(row, tokenizer, stops)] if "chosen" in row else []
        found += [(len(group["prompt"]), [len(c["ids"]) for c in group["completions"]]) for group in groups]
        found += [] if groups else [(len(encode_prompt(row, tokenizer)["prompt"]), [])]
    return found


def shape(spec):
    """What forward_flops needs of a model, and its number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(spec["model"])
    scores = config.architectures[0].endswith("ForSequenceClassification")  # by one token of a sequence: no head
    with torch.device("meta"):
        lm = (AutoModelForSequenceClassification if scores else AutoModelForCausalLM).from_config(config)
    head = None if scores else lm.get_output_embeddings()
    layers = [m for m in lm.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    width = config.num_attention_heads * (getattr(config, "head_dim", None)
                                          or config.hidden_size // config.num_attention_heads)  # fmt: skip
    found = {"body": sum(m.weight.numel() for m in layers), "width": width}
    found["head"] = 0 if scores else head.weight.numel()
    return found | {"layers": config.num_hidden_layers, "parameters": sum(p.numel() for p in lm.parameters())}


def peak():
    """Peak resident MB of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def machine(spec):
    """Memory of an idle process with torch and transformers; then fp32 operations and bytes a second."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    found = {"imports_mb": peak()}
    x, w, v = torch.randn(1024, 1024), torch.randn(8192, 8192), torch.randn(8192)
    for name, work, function in ("flops", 2 * 1024**3, lambda: x @ x), ("bandwidth", 4 * 8192**2, lambda: w @ v):
        times = []
        for _ in range(23):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        found[name] = work / statistics.median(times[3:])
    return found


def facts(spec):
    """All three, of the machine first: nothing else is in memory then."""
    found = {"machine": machine(spec), "shape": shape(spec), "lengths": lengths(spec)}
    if "teacher" in spec:
        found["shape"]["teacher"] = shape({"model": spec["teacher"]})
    return found


def head(spec):
    """Log-probs of labels from hidden states and their gradients, by one of three. -> seconds, and what must agree."""
    import torch

    torch.manual_seed(0)
    count, width, vocabulary = spec["tokens"], spec["hidden"], spec["vocabulary"]
    hidden, weight = torch.randn(count, width), torch.randn(vocabulary, width) * 0.02
    labels, factor = torch.randint(vocabulary, (count,)), torch.rand(count)
    hidden.requires_grad_(), weight.requires_grad_()
    if spec["kind"] == "ours":
        from common.logprobs import ScoredHead

        function, rest = ScoredHead.apply, (None, labels, (1.0, 0.0, 1.0), ())
    elif spec["kind"] == "TRL kernel":
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk  # what its trainers pass

        function, rest = ChunkedLogProbFunction.apply, (None, labels, 1.0, chunk, None, 1.0, ())
    else:
        def function(hidden, weight):
            return [-torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")]

        rest = ()
    marks = []
    for _ in range(spec["repeats"]):
        hidden.grad = weight.grad = None
        marks.append((time.perf_counter(), time.process_time()))
        loss = (factor * function(hidden, weight, *rest)[0]).sum()
        loss.backward()
    marks.append((time.perf_counter(), time.process_time()))
    first, last, count = marks[1], marks[-1], spec["repeats"] - 1  # the first one is the warm-up
    most, probe = peak(), torch.randn(vocabulary, width)
    values = loss, (hidden.grad * probe[: len(hidden)]).sum(), (weight.grad * probe).sum()
    sizes = (hidden.grad * probe[: len(hidden)]).norm(), (weight.grad * probe).norm()  # what rounding refers to
    found = {"seconds": (last[0] - first[0]) / count, "cpu_seconds": (last[1] - first[1]) / count, "peak_mb": most}
    return found | {"values": [x.item() for x in values], "sizes": [abs(loss.item()), *(x.item() for x in sizes)]}


def timed_function(module, function):
    """Return where a function of `parts` is looked up when it is called, and its name there: in the script, or for a
    dotted name in a file of common/ or a class of that file."""
    *path, name = function.split(".")
    owner = module
    if path:
        owner = importlib.import_module(".".join(path[:2]))
    for part in path[2:]:
        owner = getattr(owner, part)
    return owner, name


def script(argv):
    """Our script as `python methods/METHOD.py FLAGS` runs it, with timers around some of its functions."""
    method, events_path, *words = argv
    module, events = parity.load_script(method), []
    for function, part in METHODS[method]["parts"].items():
        owner, name = timed_function(module, function)
        setattr(owner, name, timed(getattr(owner, name), part, events))
    sys.argv = [str(parity.script_path(method)), *words]
    module.launch(module.main, module.parse_args(), module.__file__)  # leaves with the exit code where it is not 0
    Path(events_path).write_text(json.dumps(events))
    return 0


# ---- running ---------------------------------------------------------------------------------------------------------


def run_ours(method, flags, options):
    events = Path(tempfile.mkdtemp(dir=options.scratch)) / "events.json"
    flags = flags | (parity.reward_flags() if method in ONLINE else {})
    run = parity.ours(method, flags, options, [Path(__file__).resolve(), "--script", method, events])
    return run | {"events": json.loads(events.read_text())}


def here(mode, spec, options, **more):
    return parity.here(mode, spec, options, __file__, **more)


def prepare(case, options):
    """-> flags of our script, TRL's spec, on one epoch of the same rows: both sides see every row once."""
    method, folder = case["method"], TINY if case["rows"] == "tiny" else options.scratch / "lab"
    if case["rows"] != "tiny" and not folder.exists():
        here("lab", {"to": str(folder)}, options)
    model, source = (TINY / "model", TINY) if case["rows"] == "tiny" else (folder, folder / case["rows"])
    work = Path(tempfile.mkdtemp(dir=options.scratch))
    count = case["steps"] * case["batch"]
    taken = read(source / FILES[method])[:count]
    write(work / "rows.jsonl", (taken * -(-count // len(taken)))[:count])
    slices = [(step * case["batch"], case["batch"]) for step in range(case["steps"])]
    spec = {"data": str(work / "rows.jsonl"), "slices": slices, "to": str(work / "sorted.jsonl")}
    parity.here("prepare", spec | {"reverse": method == "kto"}, options)
    if method == "reward":
        parity.here("classifier", {"model": str(model), "to": str(work / "classifier")}, options)
        model = work / "classifier"
    flags = flags_of(case) | {"model": model, "dataset": work / "rows.jsonl"}
    for_trl = {"model": str(model), "data": spec["to"], "config": config_of(case)}
    if method == "distillation":
        flags["teacher"] = folder / "teacher"
        for_trl["teacher"] = str(folder / "teacher")
    return flags, for_trl


def loss_gap(mine, theirs):
    """Of the first three steps; Problem above 1e-4."""
    first = [[step["loss"] for step in run["steps"][:3]] for run in (mine, theirs)]
    gaps = [abs(a - b) / max(1, abs(b)) for a, b in zip(*first, strict=True)]
    if not max(gaps) <= 1e-4:  # a NaN is none, either
        raise Problem(f"the losses of the first steps are {first[0]}, TRL's {first[1]}: not the same work, no ratio")
    return max(gaps)


def search(case, spec, settings, options):
    """Every setting in turn in one process of TRL's; where that dies, a new one goes on after it. -> runs."""
    found = []
    while len(found) < len(settings):
        result = Path(tempfile.mkdtemp(dir=options.scratch)) / "result.json"
        rest = {"search": settings[len(found) :], "result": str(result)}
        try:
            found += parity.trl(case["method"], spec | rest, options)["search"]
        except Problem as e:
            found += json.loads(result.read_text())["search"] if result.is_file() else []
            found.append({"error": str(e)})
    return found[: len(settings)]


def choose(case, flags, spec, work, options):
    """Our run and TRL's candidates. -> {side: (setting, gap of the losses)} and a row for every candidate."""
    sampled = case["method"] in ONLINE
    if sampled:
        mine = parity.sampled(case["method"], flags | {"max_steps": 3}, flags["dataset"], options)
    else:
        mine = run_ours(case["method"], flags, options)

    def gap(setting, run):
        if not sampled:
            return loss_gap(mine, run)
        replayed = parity.replay(mine, spec["config"] | setting | {"max_steps": 3}, options)
        return replayed["worst"]["loss"]["worst"]

    chosen, rows = {}, []
    sides = candidates(case, options.compile)
    runs = iter(search(case, spec, [{}, *(s for settings in sides.values() for s in settings)], options))
    for side, settings in {"TRL default": [{}], **sides}.items():
        tried = []
        for setting, run in zip(settings, runs):  # settings first: zip must not take a run too many
            row = {"side": f"search: {side}", "setting": setting}
            if "error" in run:
                row["error"] = run["error"]
            else:
                run["at"] = {int(step): at for step, at in run["at"].items()}
                row |= measure(run, case, *work)
                tried.append((row["cpu_seconds_per_step"] / row["tokens_per_step"], setting, run, row))
            rows.append(row)
        for _, setting, run, row in sorted(tried, key=lambda x: x[0]):
            try:
                chosen[side] = setting, gap(setting, run)
                break
            except Problem as e:
                row["error"] = str(e)
        if side not in chosen:
            errors = [row["error"] for row in rows if row["side"] == f"search: {side}"]
            raise Problem(f"{side}: {errors[-1]}")
    for row in rows:
        what = row.get("error") or f"{row['cpu_seconds_per_step']:.3f} CPU s/step"
        print(f"{row['side']:<32} {words(row['setting']):<60} {what}", flush=True)
    return chosen, rows


def training(name, case, options):
    """A case of a script. -> rows."""
    flags, spec = prepare(case, options)
    known = here("facts", {key: spec[key] for key in ("model", "teacher", "data") if key in spec}, options)
    work = known["lengths"], known["shape"], known["machine"]
    longest = max(prompt + max(completions, default=0) for prompt, completions in known["lengths"])
    assert longest <= flags["max_length"], "we would drop a row"
    chosen, found = choose(case, flags, spec, work, options)
    weights = 16 * known["shape"]["parameters"]
    if "teacher" in known["shape"]:
        weights += 4 * known["shape"]["teacher"]["parameters"]
    own = weights / 2**20 + known["machine"]["imports_mb"]
    for number in range(1, options.rounds + 1):
        runs = {"ours": run_ours(case["method"], flags, options)}
        runs[LEAN] = run_ours(case["method"], flags | {"activation_checkpointing": "on"}, options)
        loss_gap(runs["ours"], runs[LEAN])
        for side, (setting, gap) in chosen.items():
            runs[side] = parity.trl(case["method"], spec | {"config": spec["config"] | setting}, options)
            if case["method"] not in ONLINE:
                gap = loss_gap(runs["ours"], runs[side])
            runs[side] |= {"setting": setting, "first_losses_differ_by": gap}
        for side, run in runs.items():
            row = {"side": side, "round": number} | measure(run, case, *work)
            row |= {key: run[key] for key in ("peak_mb", "process_mb")} | {"above_mb": run["peak_mb"] - own}
            row["process_seconds"] = run["wall"]
            row |= {key: run[key] for key in ("setting", "first_losses_differ_by") if key in run}
            found.append(row)
            print(f"{name:<14} {side:<24} round {number}  {row['cpu_seconds_per_step']:.3f} CPU s/step  "
                  f"{row['seconds_per_step']:.3f} s/step  {row['peak_mb']:.0f} MB  {run['wall']:.1f} s in all",
                  flush=True)  # fmt: skip
    mine = json.loads((runs["ours"]["folder"] / "run.json").read_text())["versions"]
    about = {"machine": known["machine"], "shape": known["shape"]}
    return [about | {"versions": {"ours": mine, "trl": run["versions"]}}, *found]


def alone(name, case, options):
    """The head alone, against plain cross-entropy and TRL's kernel. -> rows."""
    bounds, found = here("machine", {}, options), []
    count, width, vocabulary = (case[key] for key in ("tokens", "hidden", "vocabulary"))
    own = 8 * width * (count + vocabulary) / 2**20 + bounds["imports_mb"]  # hidden, weight and their gradients
    kinds = {"ours": "ours", "TRL default": "TRL kernel", "plain cross-entropy": "plain"}
    for number in range(1, options.rounds + 1):
        runs = {}
        for side, kind in kinds.items():
            python = options.trl_python if kind == "TRL kernel" else sys.executable
            started = time.perf_counter()
            runs[side] = run = here("head", case | {"kind": kind}, options, python=python)
            mine = runs["ours"]
            gaps = [abs(a - b) / size for a, b, size in zip(mine["values"], run["values"], mine["sizes"])]
            if not max(gaps) <= 1e-4:
                raise Problem(f"loss and gradients are {mine['values']}, those of {side} {run['values']}: no ratio")
            row = {"side": side, "round": number, "seconds_per_step": run["seconds"], "parts": {}}
            row |= {"cpu_seconds_per_step": run["cpu_seconds"], "tokens_per_step": count, "peak_mb": run["peak_mb"]}
            row |= {"limit_seconds": [6 * count * width * vocabulary / bounds["flops"], 0.0]}
            row |= {"above_mb": run["peak_mb"] - own, "process_seconds": time.perf_counter() - started}
            found.append(row | {"values_differ_by": max(gaps)})
            print(f"{name:<14} {side:<24} round {number}  {run['cpu_seconds']:.3f} CPU s  {run['seconds']:.3f} s  "
                  f"{run['peak_mb']:.0f} MB", flush=True)  # fmt: skip
    return [{"machine": bounds}, *found]


def store(name, rows):
    """Put the rows of a finished case in the place of its old ones."""
    order = list(CASES)
    old = [row for row in (read(FILE) if FILE.is_file() else []) if row["case"] != name and row["case"] in order]
    rows = sorted(old + [{"case": name} | row for row in rows], key=lambda row: order.index(row["case"]))
    parity.replace(FILE, "".join(json.dumps(row) + "\n" for row in rows))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES), help="these cases")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="try torch_compile for TRL, too: minutes per case")
    options = parity.read_options(parser, argv)
    if options.worker:
        return parity.answer(options.worker, (lab, facts, machine, head))
    try:
        parity.check_trl(options)
    except Problem as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    flags = [f"--rounds {options.rounds} --threads {options.threads}", *(["--compile"] if options.compile else [])]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="versus-trl-") as scratch:
        options.scratch = Path(scratch)
        for name in options.only:
            command = " ".join(["python benchmarks/versus_trl.py --trl_python TRL_PYTHON", *flags, f"--only {name}"])
            before, case = parity.about(command, options.threads), CASES[name]
            try:
                first, *rows = (alone if case["method"] == "head" else training)(name, case, options)
                if before != parity.about(command, options.threads):
                    raise Problem("the scripts changed during the run: nothing written")
                store(name, [before | {"work": case} | first, *rows])
            except Problem as e:
                print(f"error: {name}: {e}", file=sys.stderr, flush=True)
                failed += 1
    if FILE.is_file():
        print("\n" + table([row for row in read(FILE) if row["case"] in options.only]))
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(script(sys.argv[2:]) if sys.argv[1:2] == ["--script"] else main())
