"""Every GPU case in one command: first whether the numbers are right, then how fast, against the limits of the device.

    python benchmarks/gpu.py --half 1            under 5 minutes on one H100 or H200 -> results/gpu.jsonl
    python benchmarks/gpu.py --half 2            the rest, mostly speed; without --half both
    python benchmarks/gpu.py --tiny              the same cases whole, with tiny shapes on the CPU, in a minute or two
    python benchmarks/gpu.py --only sft_1.7b     one of them, or several

First whole scripts, as users start them, on the tiny lab: no alert, a reward model that judges in a thread,
--cpu_offload, --deterministic twice. Then random weights of real shapes. No download, no network. Needs torch,
transformers and the wheels of tyro; torch 2.11 and transformers 5.17 will do (continuous batching from 5.20 on). TRL
and Liger are compared where they can be imported. Without a GPU: --tiny.

Checks     attention: flat_attention (torch's varlen kernel) forward and backward against dense attention in fp32, with
           grouped heads, shared prompts and a window. logprobs: the sharded policy in bf16 against one sequence at a
           time in fp32. rollout_logprobs_*: the sampler's against the policy's. Loss and gradient norm of one step:
           shared prompts against repeated ones, --compile and --activation_checkpointing on against off, ours against
           TRL's. Each check has a limit, written into its row.
Timing     wall time between synchronisations: windows of one optimizer step (or one rollout), after a warm-up, variants
           in turn; median, smallest and largest. Memory: the largest of all windows, allocated and reserved.
MFU        useful FLOPs over time over the rate: 6 per weight of a matrix and token (the head: per scored token) and
           12 L H d per visible pair of query and key, which is 6 L H d S per token of a whole sequence. Recomputation
           and repeated prompts are not useful. Rates: the data sheet's 989e12, and matmuls of 8192 on this device.
Bound      of a rollout: the time in which the memory gives every step the weights and the keys and values of all live
           sequences once, at the rate of a copy on this device, and the matmul rate the prompts.

Every case runs in a process of its own with a time limit: one that fails, or runs out of memory or time, costs one line
and its own row. A row: case, ok, checks, numbers, device, versions, command, sha256 of this file and of what it runs.
Exit code 0 where all are ok, else 2. Cases that the time cannot hold are named and left out.
"""

import argparse
import copy
import gc
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from array import array
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for a GPU must not start CUDA in the parent

from common.attention import flat_attention
from common.batches import count_scored, flat_batch, micro_batches, seq_sums
from common.logprobs import ScoredHead, plain_logprobs
from common.runtime.health import check_update
from common.runtime.launch import setup
from common.runtime.model import fit_memory, longest, materialize
from common.runtime.parallel import all_sum, clip_grad_norm, local
from common.sampling import Sampler
from common.tokenization import load_tokenizer, stop_ids

ROOT = Path(__file__).resolve().parents[1]
COMMON = {"vocab_size": 151936, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
          "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
          "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}  # fmt: skip
SHAPES = {  # Qwen3's config.json
    "0.6b": COMMON | {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7b": COMMON | {"hidden_size": 2048, "intermediate_size": 6144},
}
TINY = COMMON | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
# Lengths in tokens. Completions are lognormal around their length, sampled ones end by one of `stops` token ids.
REAL_SIZE = {"row": 8192, "rows": 2, "budget": 16384, "pairs": 32, "prompts": 8, "group": 8, "prompt": 512,
             "completion": 500, "rollouts": 32, "new": 256, "stops": 300, "matmul": 8192, "copy": 2**31,
             "head": 16384, "windows": 5, "warmup": 2}  # fmt: skip
TINY_SIZE = {"row": 96, "rows": 2, "budget": 192, "pairs": 3, "prompts": 2, "group": 3, "prompt": 24,
             "completion": 16, "rollouts": 3, "new": 12, "stops": 30, "matmul": 128, "copy": 2**20,
             "head": 64, "windows": 2, "warmup": 1}  # fmt: skip
DATASHEET = 989e12  # FLOP/s of an H100 or H200 in bf16, dense
TOTAL = 300  # seconds that each half may take
LEARNING_RATE = 1e-6


# ---- what cases share ------------------------------------------------------------------------------------------------


class Lab:
    """One case's device, sizes and results."""

    def __init__(self, tiny):
        import torch

        self.tiny, self.size, self.torch = tiny, TINY_SIZE if tiny else REAL_SIZE, torch
        self.device = torch.device("cpu" if tiny else "cuda")
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.checks, self.numbers = [], {}

    def check(self, name, value, limit):
        self.checks.append({"name": name, "value": float(value), "limit": limit})

    def synchronize(self):
        if not self.tiny:
            self.torch.cuda.synchronize()

    def measure(self, steps):
        """{name: function} -> {name: seconds, range, memory}; the functions take turns, window by window."""
        times, memory = {name: [] for name in steps}, {name: {} for name in steps}
        for window in range(-self.size["warmup"], self.size["windows"]):
            for name, step in steps.items():
                if not self.tiny:
                    self.torch.cuda.reset_peak_memory_stats()
                self.synchronize()
                started = time.perf_counter()
                step()
                self.synchronize()
                if window >= 0:
                    times[name].append(time.perf_counter() - started)
                    memory[name] = {k: max(v, memory[name].get(k, 0)) for k, v in self.peak().items()}
        return {name: {"seconds": statistics.median(t), "range": [min(t), max(t)], **memory[name]}
                for name, t in times.items()}  # fmt: skip

    def peak(self):
        if self.tiny:
            return {"resident_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        cuda = self.torch.cuda
        return {"allocated_gb": cuda.max_memory_allocated() / 1e9, "reserved_gb": cuda.max_memory_reserved() / 1e9}

    def rates(self):
        """FLOP/s of a square matmul in the training's dtype, bytes/s that a copy reads and writes."""
        n, torch = self.size["matmul"], self.torch
        a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in range(2))
        source = torch.zeros(self.size["copy"], dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        found = self.measure({"matmul": lambda: [a @ b for _ in range(10)], "copy": lambda: target.copy_(source)})
        matmul, memory = 20 * n**3 / found["matmul"]["seconds"], 2 * len(source) / found["copy"]["seconds"]
        return {"matmul_flops": matmul, "copy_bytes_per_s": memory}

    def prepare(self, method, shape, **flags):
        """methods/<method>.py as a module, its run, and a model of this shape on the meta device. Flags of another
        script are left out."""
        from torch.distributed.device_mesh import init_device_mesh
        from transformers import AutoConfig, AutoModelForCausalLM

        module = script(method)
        known = {field.name for field in fields(module.Args)}
        args = replace(module.Args(), output_dir=str(Path(tempfile.mkdtemp(dir=os.environ["GPU_SCRATCH"]), "run")),
                       **{name: value for name, value in flags.items() if name in known})  # fmt: skip
        run = setup(args, module.__file__)
        run.mesh = init_device_mesh(run.device.type, run.mesh_shape, mesh_dim_names=("replicate", "shard", "tp"))
        config = AutoConfig.for_model("qwen3", **(TINY if self.tiny else SHAPES[shape]))
        with self.torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, dtype=self.torch.float32)
        return module, run, lm.eval()

    def policy(self, module, run, lm):
        """As main.model does, with random weights for the file's."""
        policy = module.shard(module.Policy(lm), run)
        self.fill(run, policy.lm)
        return policy

    def fill(self, run, lm):
        """Memory, and the same random weights every time: matrices as transformers draws them, norms 1, biases 0."""
        materialize(lm, run.device, run.device)
        self.torch.manual_seed(0)
        for name, p in lm.named_parameters():
            values = local(p.detach())  # all of them: this process is the only rank
            if p.ndim > 1:
                values.normal_(0, 0.02)
            else:
                values.fill_(float(name.endswith("norm.weight")))

    def trainer(self, method, shape, groups, **flags):
        """As main.model and main.optimizer do: module, run, policy, optimizer."""
        module, run, lm = self.prepare(method, shape, **flags)
        policy = self.policy(module, run, lm)
        ids = range(lm.config.vocab_size)  # in place of a tokenizer, which is only asked how many there are
        fit_memory(run, policy, ids, longest(groups))
        optimizer = self.torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        return module, run, policy, optimizer

    def speed(self, name, found, tokens, flops, rates):
        """Useful tokens per second and MFU of a variant."""
        seconds = found["seconds"]
        self.numbers[name] = found | {
            "tokens": tokens, "tokens_per_s": tokens / seconds, "mfu_datasheet": flops / seconds / DATASHEET,
            "mfu_measured": flops / seconds / rates["matmul_flops"],
        }  # fmt: skip


def script(name):
    """methods/<name>.py as a module; importing one parses no flags."""
    known = f"script_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, ROOT / "methods" / f"{name}.py")
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


def make_groups(lab, count, completions, prompt, completion, vocabulary=None, seed=0):
    """Random ids; lengths lognormal around the given ones, but at most twice as long."""
    vocabulary = vocabulary or (TINY if lab.tiny else COMMON)["vocab_size"]
    noise, groups = random.Random(seed), []

    def ids(length):
        return array("i", [noise.randrange(vocabulary) for _ in range(length)])

    def spread(length):
        return max(2, min(2 * length, round(length * noise.lognormvariate(-0.08, 0.4))))

    for row in range(count):
        drawn = [{"ids": ids(spread(completion)), "scored": None} for _ in range(completions)]
        groups.append({"prompt": ids(spread(prompt) if prompt else 0), "completions": drawn, "row": row, "place": row})
    return groups


def repeat_prompts(groups):
    """The same work without sharing: every completion carries its prompt, which is not scored."""

    def alone(prompt, c):
        return c | {"ids": prompt + c["ids"], "scored": [0] * len(prompt) + [1] * len(c["ids"])}

    own = [[alone(group["prompt"], c) for c in group["completions"]] for group in groups]
    return [group | {"prompt": array("i"), "completions": completions} for group, completions in zip(groups, own)]


def count_flops(lm, batches):
    """-> tokens, FLOPs of forward and backward over these flat batches, as useful as the batches are."""
    config, head = lm.config, lm.config.vocab_size * lm.config.hidden_size
    body = sum(p.numel() for name, p in lm.named_parameters() if p.ndim == 2 and "embed" not in name)
    body -= 0 if config.tie_word_embeddings else head
    per_pair = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    tokens = flops = 0
    for batch in batches:
        own, seen = (batch[f"cu_seqlens_{x}"].diff().tolist() for x in "qk")
        pairs = sum(q * (k - q) + q * (q + 1) / 2 for q, k in zip(own, seen))
        tokens += len(batch["input_ids"])
        flops += 6 * (body * len(batch["input_ids"]) + head * len(batch["labels"])) + per_pair * pairs
    return tokens, flops


# ---- one optimizer step of each method, as in its main.step ---------------------------------------------------------


def sft_step(module, run, policy, optimizer, groups):
    (num_tokens,) = all_sum(run, count_scored(groups))
    total = 0.0
    for batch in micro_batches(run, groups, spare=groups[0]):
        loss = batch["weight"] * module.sft_loss(policy(batch), run.args) / num_tokens
        loss.backward()
        total += loss.detach()
    return finish(run, policy, optimizer, groups, total, num_tokens)


def dpo_step(module, run, policy, optimizer, groups):
    total = 0.0
    for batch in micro_batches(run, groups, spare=groups[0]):
        _, loss, _ = module.forward(policy, batch, run.args)
        loss = batch["weight"] * loss / len(groups)
        loss.backward()
        total += loss.detach()
    return finish(run, policy, optimizer, groups, total, count_scored(groups))


def grpo_step(module, run, policy, optimizer, groups):
    num_tokens = count_scored(groups)
    num_seqs = sum(len(group["completions"]) for group in groups)
    total = 0.0
    for batch in micro_batches(run, groups, spare=groups[0]):
        logprobs = policy(batch, want=["entropy"])["logprobs"]
        batch["old_logprobs"] = logprobs.detach()
        loss, _ = module.grpo_loss(logprobs, batch, num_tokens, num_seqs, run.args)
        (batch["weight"] * loss).backward()
        total += batch["weight"] * loss.detach()
    return finish(run, policy, optimizer, groups, total, num_tokens)


def finish(run, policy, optimizer, groups, loss, num_tokens):
    """As main.update does, for step 6: `check_update` looks closer at steps 1, 2, 4, 5 and 8. Returns the loss and the
    gradient's norm."""
    (loss,) = all_sum(run, loss)
    metrics = {"loss": loss, "num_tokens": num_tokens, "lr": LEARNING_RATE}
    metrics["grad_norm"] = clip_grad_norm(run, policy, run.args.max_grad_norm)
    if math.isfinite(loss) and math.isfinite(metrics["grad_norm"]):
        optimizer.step()
    check_update(run, 5, policy, groups, metrics)
    optimizer.zero_grad(set_to_none=True)
    return loss, metrics["grad_norm"]


# ---- checks ----------------------------------------------------------------------------------------------------------


def attention(lab):
    """flat_attention on shared prompts against dense attention with a mask of its own, in fp32 from the same inputs."""
    torch = lab.torch
    heads, kv_heads, width = (4, 2, 16) if lab.tiny else (16, 8, 128)
    batch = flat_batch(make_groups(lab, 2, 3, lab.size["prompt"], lab.size["completion"]), lab.device)
    n, names = len(batch["input_ids"]), ("cu_seqlens_q", "cu_seqlens_k", "max_q", "max_k", "kv_index")
    torch.manual_seed(0)
    sizes = (1, heads, n, width), (1, kv_heads, n, width), (1, kv_heads, n, width), (1, n, heads, width)
    q, k, v, slope = (torch.randn(size, device=lab.device, dtype=lab.dtype) for size in sizes)
    borders = [list(pairwise(batch[name].tolist())) for name in ("cu_seqlens_q", "cu_seqlens_k")]
    for window in (None, 8 if lab.tiny else 100):
        seen = torch.zeros(n, n, dtype=torch.bool, device=lab.device)
        for (a, b), (c, d) in zip(*borders):
            keys = batch["kv_index"][c:d]
            at = torch.arange(d - c, device=lab.device)
            age = at[a - b :, None] - at
            seen[a:b, keys] = (age >= 0) & (age < (window or n))
        results = []
        for flat in (True, False):
            inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
            if flat:
                out, _ = flat_attention(None, *inputs, None, sliding_window=window, **{x: batch[x] for x in names})
            else:
                query, key, value = (x.float() for x in inputs)
                key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
                scores = (query @ key.transpose(2, 3) / math.sqrt(width)).masked_fill(~seen, -torch.inf)
                out = (scores.softmax(-1) @ value).transpose(1, 2)
            out.float().mul(slope.float()).sum().backward()
            results.append([out.detach(), *(x.grad for x in inputs)])
        for name, ours, theirs in zip(("out", "dq", "dk", "dv"), *results):
            error = (ours.float() - theirs.float()).norm() / theirs.float().norm()  # bf16 rounds by 2**-9 at most
            lab.check(f"{name}, window {window}: relative error", error, 1e-5 if lab.tiny else 2e-2)


def logprobs(lab):
    """The sharded policy against one sequence at a time in a model of its own, in fp32 (tiny: fp64)."""
    module, run, lm = lab.prepare("sft", "0.6b")
    single = copy.deepcopy(lm)
    policy = lab.policy(module, run, lm)
    lab.fill(run, single)
    groups = make_groups(lab, 2, 3, lab.size["prompt"], lab.size["completion"])
    with lab.torch.no_grad():
        ours = policy(flat_batch(groups, run.device))["logprobs"]
        gap = (ours - plain_logprobs(single.double() if lab.tiny else single, groups)).abs()
    lab.check("log-probs: mean difference", gap.mean(), 1e-5 if lab.tiny else 2e-2)
    lab.check("log-probs: largest difference", gap.max(), 1e-4 if lab.tiny else 2e-1)


def make_sampler(lab, engine, prompts, copies, new):
    """grpo's sampler and policy with the same random weights, as main.model makes them; prompts without completions.
    -> module, run, sampler, policy, groups."""
    flags = {"engine": engine, "num_generations": copies, "max_completion_length": new, "eval_samples": 0}
    flags |= {"max_length": 2 * lab.size["prompt"] + new, "tokens_per_microbatch": lab.size["budget"]}
    module, run, lm = lab.prepare("grpo", "0.6b", **flags)
    sampler = Sampler(run, lm, None, stops=list(range(lab.size["stops"])))  # nothing here becomes text
    policy = lab.policy(module, run, lm)
    sampler.start_engine()
    if engine == "continuous" and sampler.engine is None:
        lab.numbers["note"] = "transformers is too old for continuous batching: the loop ran instead"
    module.refresh(sampler, policy)
    return module, run, sampler, policy, make_groups(lab, prompts, 0, lab.size["prompt"], 1)


def rollout_logprobs(lab, engine):
    """The sampler's log-probs against the policy's, before and after the weights change: stale pages would show."""
    module, run, sampler, policy, groups = make_sampler(lab, engine, 4, 4, min(64, lab.size["new"]))
    groups[0]["prompt"] = (groups[0]["prompt"] * 20)[:600]  # longer than two pages of the engine
    for index in range(2):
        sampler.sample(groups, 4, ("train", index))
        with lab.torch.no_grad():
            ours = policy(flat_batch(groups, run.device))["logprobs"].cpu()
            theirs = lab.torch.cat([c["sampler_logprobs"] for g in groups for c in g["completions"]])
            gap = (ours - theirs).abs()
            lab.check(f"weights {index}: mean difference", gap.mean(), 1e-5 if lab.tiny else 2e-2)
            lab.check(f"weights {index}: largest difference", gap.max(), 1e-4 if lab.tiny else 2e-1)
            for p in policy.parameters():
                p.mul_(1.3)
        module.refresh(sampler, policy)


# ---- timing ----------------------------------------------------------------------------------------------------------


def time_sft(lab, shape, **flags):
    """Rows of one length, all tokens scored. -> loss and gradient norm of the first step; times, tokens, FLOPs."""
    groups = make_groups(lab, lab.size["rows"], 1, 0, 1)
    noise, vocabulary = random.Random(1), (TINY if lab.tiny else COMMON)["vocab_size"]
    for group in groups:
        group["completions"][0]["ids"] = array("i", [noise.randrange(vocabulary) for _ in range(lab.size["row"])])
    module, run, policy, optimizer = lab.trainer("sft", shape, groups, tokens_per_microbatch=lab.size["row"], **flags)
    tokens, flops = count_flops(policy.lm, [flat_batch([group]) for group in groups])
    first = sft_step(module, run, policy, optimizer, groups)
    found = lab.measure({"step": lambda: sft_step(module, run, policy, optimizer, groups)})["step"]
    return first, (found, tokens, flops)


def sft(lab, shape):
    rates = lab.rates()
    lab.numbers |= rates
    lab.speed("step", *time_sft(lab, shape)[1], rates)


def sft_flag(lab, flag, values):
    """The same steps with a flag of the scripts off and on, one after the other: another speed, the same first step."""
    rates, firsts = lab.rates(), []
    for value in values:
        first, found = time_sft(lab, "0.6b", **{flag: value})
        firsts.append(first)
        lab.speed(f"{flag} {value}", *found, rates)
        gc.collect()  # FSDP's modules are in cycles: their memory would count as the next variant's
        if not lab.tiny:
            lab.torch.cuda.empty_cache()
    for name, a, b in zip(("loss", "gradient norm"), *firsts):
        lab.check(f"{name}: relative difference", abs(a - b) / abs(a), 1e-5 if lab.tiny else 2e-2)


def shared_update(lab, method, step, groups):
    """An optimizer step with shared prompts, and the same with prompts repeated: one loss, two amounts of work."""
    rates, flags = lab.rates(), {"tokens_per_microbatch": lab.size["budget"], "num_generations": lab.size["group"]}
    module, run, policy, optimizer = lab.trainer(method, "0.6b", groups, **flags)
    variants, first = {"shared": groups, "repeated": repeat_prompts(groups)}, {}
    tokens, flops = count_flops(policy.lm, [flat_batch([group]) for group in groups])
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    for name, rows in variants.items():
        first[name] = step(module, run, policy, optimizer, rows)
        with lab.torch.no_grad():
            for key, p in policy.named_parameters():
                p.copy_(before[key])
    del before
    for name, a, b in zip(("loss", "gradient norm"), first["shared"], first["repeated"]):
        gap = abs(a - b) / max(1, abs(a))
        lab.check(f"{name}, shared against repeated prompts: difference", gap, 1e-5 if lab.tiny else 2e-2)
    found = lab.measure({name: lambda rows=rows: step(module, run, policy, optimizer, rows)
                         for name, rows in variants.items()})  # fmt: skip
    for name in variants:
        lab.speed(name, found[name], tokens, flops, rates)
    lab.numbers["ratio repeated"] = found["repeated"]["seconds"] / found["shared"]["seconds"]


def make_pairs(lab):
    groups = make_groups(lab, lab.size["pairs"], 2, lab.size["prompt"], lab.size["completion"] // 2)
    for group in groups:
        for number, completion in enumerate(group["completions"]):
            uniform = -math.log((TINY if lab.tiny else COMMON)["vocab_size"])  # what random weights say, nearly
            completion["ref_logprob"] = uniform * len(completion["ids"]) - number
    return groups


def make_rollout(lab):
    groups = make_groups(lab, lab.size["prompts"], lab.size["group"], lab.size["prompt"], lab.size["completion"])
    for group in groups:
        for number, completion in enumerate(group["completions"]):
            completion["advantage"] = number - (lab.size["group"] - 1) / 2
    return groups


def rollout(lab, engine):
    """New tokens per second; the weights do not change, so that all windows do the same work."""
    rates = lab.rates()
    _, _, sampler, _, groups = make_sampler(lab, engine, lab.size["rollouts"], lab.size["group"], lab.size["new"])

    def sample():
        sampler.sample(groups, lab.size["group"], ("train", 0))

    started = time.perf_counter()
    sample()
    first = time.perf_counter() - started
    lab.size = lab.size | {"warmup": 0, "windows": 2}  # that was the warm-up, and one takes up to 20 s
    found = lab.measure({"rollout": sample})["rollout"]
    lengths = [(len(g["prompt"]), len(c["ids"])) for g in groups for c in g["completions"]]
    config, weights = sampler.lm.config, sum(p.numel() for p in sampler.lm.parameters()) * lab.dtype.itemsize
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * lab.dtype.itemsize
    steps = max(n for _, n in lengths) - 1
    read = steps * weights + kv * sum((n - 1) * p + n * (n - 1) / 2 for p, n in lengths)
    prompts = [{"prompt": array("i"), "completions": [{"ids": g["prompt"], "scored": None}]} for g in groups]
    _, flops = count_flops(sampler.lm, [flat_batch(prompts)])
    bound = read / rates["copy_bytes_per_s"] + flops / 3 / rates["matmul_flops"]  # forward only
    new = sum(n for _, n in lengths)
    lab.numbers |= rates | found | {
        "first_seconds": first, "tokens": new, "tokens_per_s": new / found["seconds"],
        "bound_tokens_per_s": new / bound, "share_of_bound": bound / found["seconds"],
    }  # fmt: skip


def head(lab):
    """Log-probs of M tokens and their gradients: ours, plain cross-entropy over all logits, and what is installed."""
    torch, config = lab.torch, TINY if lab.tiny else SHAPES["0.6b"]
    m, width, vocabulary = lab.size["head"], config["hidden_size"], config["vocab_size"]
    torch.manual_seed(0)
    hidden = torch.randn(m, width, device=lab.device, dtype=lab.dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, width, device=lab.device)).to(lab.dtype).requires_grad_()
    labels = torch.randint(vocabulary, (m,), device=lab.device)
    losses = {
        "ours": lambda: -ScoredHead.apply(hidden, weight, None, labels, (1.0, 0.0, 1.0), (), None)[0].mean(),
        "cross_entropy": lambda: torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels),
    }
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        more = 1.0, 8192, None, 1.0, ()  # temperature, columns of a tile, cap, scale, no further outputs
        losses["trl"] = lambda: -ChunkedLogProbFunction.apply(hidden, weight, None, labels, *more)[0].mean()
    except ImportError:
        lab.numbers["note_trl"] = "trl is not installed here"
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        losses["liger"] = lambda: liger(weight, hidden, labels)
    except ImportError:
        lab.numbers["note_liger"] = "liger_kernel is not installed here"
    rates, gradients = lab.rates(), {}

    def step(loss):
        hidden.grad = weight.grad = None
        loss().backward()

    for name in "ours", "cross_entropy":
        step(losses[name])
        gradients[name] = hidden.grad, weight.grad
    for what, ours, theirs in zip(("hidden", "weight"), *gradients.values()):
        error = (ours.float() - theirs.float()).norm() / ours.float().norm()
        lab.check(f"gradient of {what}, relative difference", error, 1e-5 if lab.tiny else 2e-2)
    gradients.clear()
    flops = 6 * m * width * vocabulary
    for name, found in lab.measure({name: lambda loss=loss: step(loss) for name, loss in losses.items()}).items():
        lab.speed(name, found, m, flops, rates)


# ---- TRL -------------------------------------------------------------------------------------------------------------

TRL = {  # what is changed of TRL's defaults, whose micro-batches are of 8 sequences or pairs
    "default": {},
    "best": {"gradient_checkpointing": False},
}


def trl_update(lab, method):
    """Our optimizer step, and TRL's in its settings: the same rows, weights, completions and rewards. DPO's reference
    log-probs are computed before, on both sides in the best setting, and once a step by TRL in its default."""
    try:
        from trl_worker import make_trainer  # of this folder
        import trl  # noqa: F401
    except ImportError:
        lab.numbers["note"] = "trl is not installed here: no comparison"
        return
    torch, size, rates = lab.torch, lab.size, lab.rates()
    flags = {"tokens_per_microbatch": size["budget"], "num_generations": size["group"], "max_length": 2**20}
    flags |= {"max_completion_length": 2 * size["completion"]}
    largest = make_groups(lab, 1, size["group"], 2 * size["prompt"], 2 * size["completion"])
    module, run, policy, optimizer = lab.trainer(method, "0.6b", largest, **flags)
    tokenizer = load_tokenizer(str(ROOT / "common" / "tiny" / "model"))
    stops, scratch, noise = stop_ids(tokenizer, policy.lm.generation_config), Path(run.out), random.Random(0)

    def message(role, length):
        digits = noise.choices("0123456789", k=round(length * noise.uniform(0.6, 1.4)))
        return [{"role": role, "content": "".join(digits)}]

    count, rows = size["pairs"] if method == "dpo" else size["prompts"], []
    for _ in range(count):
        answers = [message("assistant", size["completion"] // 2) for _ in range(2 * (method == "dpo"))]
        rows.append({"prompt": message("user", size["prompt"]), **dict(zip(("chosen", "rejected"), answers))})
    (scratch / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = module.load_groups(str(scratch / "rows.jsonl"), tokenizer, stops, run.args, run)[0]
    rewards = [noise.random() for _ in range(count * size["group"])]
    if method == "grpo":
        for group in groups:
            texts = [message("assistant", size["completion"])[0]["content"] for _ in range(size["group"])]
            ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], stops[0]] for text in texts]
            group["completions"] = [{"ids": array("i", x), "scored": None} for x in ids]
        advantages = module.compute_advantages(torch.tensor(rewards).view(count, -1), run.args)
        for group, values in zip(groups, advantages.tolist()):
            for completion, value in zip(group["completions"], values):
                completion["advantage"] = value
    else:
        for batch in micro_batches(run, groups, spare=groups[0]):
            with torch.no_grad():
                values = seq_sums(policy(batch)["logprobs"], batch).tolist()
            for completion, value in zip(batch["completions"], values):
                completion["ref_logprob"] = value
    tokens, flops = count_flops(policy.lm, [flat_batch([group]) for group in groups])
    step = {"dpo": dpo_step, "grpo": grpo_step}[method]
    first = step(module, run, policy, optimizer, groups)
    found = lab.measure({"ours": lambda: step(module, run, policy, optimizer, groups)})["ours"]
    lab.speed("ours", found, tokens, flops, rates)
    shape, policy, optimizer = policy.lm.config, None, None
    for name, setting in TRL.items():
        with torch.device("meta"):
            lm = module.AutoModelForCausalLM.from_config(shape, dtype=torch.float32, attn_implementation="sdpa")
        lab.fill(run, lm)
        at, micro = [], 8 if count % 8 == 0 else 1
        sequences = count * (size["group"] if method == "grpo" else 1)
        config = {"use_cpu": lab.tiny, "bf16": not lab.tiny, "learning_rate": 1e-6, "lr_scheduler_type": "constant"}
        config |= {"max_steps": 1 + size["warmup"] + size["windows"], "per_device_train_batch_size": micro}
        config |= {"gradient_accumulation_steps": sequences // micro, "save_strategy": "no"} | setting
        if method == "grpo":
            config |= {"num_generations": size["group"], "max_completion_length": 2 * size["completion"]}
            config |= {"shuffle_dataset": False, "beta": 0.0}
        else:
            config |= {"max_length": None, "precompute_ref_log_probs": name == "best"}
        spec = {"method": method, "data": str(scratch / "rows.jsonl"), "model": lm, "config": config}
        spec |= {"scratch": str(scratch / name)}
        rewarded = {"reward_funcs": lambda prompts, completions, **_: rewards}
        more = rewarded if method == "grpo" else {"ref_model": copy.deepcopy(lm)}
        trainer, record = make_trainer(spec, processing_class=tokenizer, **more)
        if method == "grpo":
            completions = [[*c["ids"]] for group in groups for c in group["completions"]]
            trainer._generate_single_turn = lambda prompt_ids, *_, completions=completions, **__: (completions, None)
        on_log = record.on_log

        def logged(*inputs, on_log=on_log, at=at, **more):
            lab.synchronize()
            at.append(time.perf_counter())
            on_log(*inputs, **more)

        record.on_log = logged
        if not lab.tiny:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        times = [b - a for a, b in pairwise(at)][size["warmup"] : size["warmup"] + size["windows"]]
        found = {"seconds": statistics.median(times), "range": [min(times), max(times)], **lab.peak()}
        lab.speed(f"trl {name}", found, tokens, flops, rates)
        loss, norm = record.steps[0]["loss"], record.steps[0]["grad_norm"]
        lab.check(f"trl {name}: loss, difference", abs(first[0] - loss), 1e-4 if lab.tiny else 2e-2)
        lab.check(f"trl {name}: gradient norm, relative", abs(first[1] - norm) / norm, 1e-3 if lab.tiny else 5e-2)
        if all(check["value"] <= check["limit"] for check in lab.checks):  # else it is not the same work
            lab.numbers[f"ratio {name}"] = found["seconds"] / lab.numbers["ours"]["seconds"]
        del trainer, lm


# ---- whole scripts ---------------------------------------------------------------------------------------------------


def whole_run(lab, name, *flags):
    """A script from its flags to final/, on the tiny lab; returns its folder. An alert breaks a limit."""
    module = script(name)
    out = Path(tempfile.mkdtemp(dir=os.environ["GPU_SCRATCH"]), "run")
    short = ["--max_steps", "2", "--batch_size", "4", "--eval_rows", "4", "--dtype", "bfloat16"]
    args = module.parse_args([*short, "--output_dir", str(out), *flags])
    module.main(args, setup(args, module.__file__))
    alerts = out / "alerts.jsonl"
    count = len(alerts.read_text().splitlines()) if alerts.is_file() else 0
    lab.check(f"{name} {' '.join(flags)}: alerts", count, 0)
    lab.check(f"{name} {' '.join(flags)}: no final model", not (out / "final" / "model.safetensors").is_file(), 0)
    return out


def whole_scripts(lab):
    """The six stable ones. Several log-probs of a rollout are compared where it spans more than one step."""
    for name in "sft", "dpo", "reward", "kto":
        whole_run(lab, name)
    for name in "grpo", "rloo":
        whole_run(lab, name, "--num_iterations", "2", "--engine", "loop")
        whole_run(lab, name, "--num_iterations", "2")


def reward_model(lab):
    """A reward model on this process's GPU, where the thread that judges must find it."""
    trained = whole_run(lab, "reward")
    whole_run(lab, "rloo", "--reward", str(trained / "final"))


def cpu_offload(lab):
    whole_run(lab, "sft", "--cpu_offload")


def deterministic(lab):
    """The same weights twice, to the bit."""
    first, second = (whole_run(lab, "sft", "--deterministic") / "final" / "model.safetensors" for _ in range(2))
    lab.check("two runs differ", first.read_bytes() != second.read_bytes(), 0)


# name: function, arguments, seconds that it may take; the most telling first
CASES = {
    "scripts": (whole_scripts, (), 120),
    "reward_model": (reward_model, (), 60),
    "cpu_offload": (cpu_offload, (), 60),
    "deterministic": (deterministic, (), 60),
    "attention": (attention, (), 60),
    "logprobs": (logprobs, (), 60),
    "rollout_logprobs_loop": (rollout_logprobs, ("loop",), 90),
    "rollout_logprobs_continuous": (rollout_logprobs, ("continuous",), 120),
    "sft_1.7b": (sft, ("1.7b",), 90),
    "sft_0.6b": (sft, ("0.6b",), 60),
    "dpo_update": (lambda lab: shared_update(lab, "dpo", dpo_step, make_pairs(lab)), (), 90),
    "grpo_update": (lambda lab: shared_update(lab, "grpo", grpo_step, make_rollout(lab)), (), 90),
    "head": (head, (), 60),
    "trl_dpo": (trl_update, ("dpo",), 120),
    "trl_grpo": (trl_update, ("grpo",), 120),
    "rollout_continuous": (rollout, ("continuous",), 120),
    "rollout_loop": (rollout, ("loop",), 120),
    "compile": (sft_flag, ("compile", (False, True)), 150),
    "activation_checkpointing": (sft_flag, ("activation_checkpointing", ("off", "on")), 90),
}

SPEED = ("sft_0.6b", "dpo_update", "grpo_update", "trl_dpo", "trl_grpo", "rollout_continuous", "rollout_loop",
         "compile", "activation_checkpointing")  # fmt: skip
HALVES = {1: [name for name in CASES if name not in SPEED], 2: list(SPEED)}


# ---- processes -------------------------------------------------------------------------------------------------------


def child(name, tiny, path):
    """Run a case and leave its row, or one line that says what went wrong. All else that it prints goes to path.log."""
    log = os.open(f"{path}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    started, lab = time.perf_counter(), None
    row = {"case": name, "tiny": tiny, "ok": False}
    try:
        import torch
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda}
        row |= {"device": platform.machine() if tiny else torch.cuda.get_device_name(), "versions": versions}
        lab = Lab(tiny)
        function, arguments, _ = CASES[name]
        function(lab, *arguments)
        versions |= {"trl": sys.modules["trl"].__version__} if "trl" in sys.modules else {}
        row["ok"] = all(check["value"] <= check["limit"] for check in lab.checks)  # False for NaN
    except BaseException as e:  # of any kind, SystemExit included: it costs this case only
        traceback.print_exc()
        row["error"] = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:200]}"
    if lab:
        row |= {"checks": lab.checks, "numbers": lab.numbers}
    row["case_seconds"] = time.perf_counter() - started
    Path(path).write_text(json.dumps(row))
    sys.stdout.flush()
    os._exit(0)  # threads of a case that failed do not hold it up


def run_case(name, tiny, limit, scratch):
    """-> the row of a case that ended, failed, or was ended."""
    path, started = scratch / f"{name}.json", time.perf_counter()
    start = multiprocessing.get_context("fork" if tiny else "spawn")
    process = start.Process(target=child, args=(name, tiny, str(path)))
    process.start()
    process.join(limit)
    late = process.is_alive()
    process.kill()
    process.join()
    if path.is_file():
        return json.loads(path.read_text())
    error = f"ended after {limit:.0f} s, its limit" if late else f"its process ended with {process.exitcode}"
    return {"case": name, "tiny": tiny, "ok": False, "error": error, "case_seconds": time.perf_counter() - started}


def describe(row):
    """The line of a case."""
    checks, numbers = row.get("checks", []), row.get("numbers", {})
    words = [row["error"]] if "error" in row else []
    words += [f"{c['name']} {c['value']:.2g} > {c['limit']:g}" for c in checks if not c["value"] <= c["limit"]]
    if row["ok"] and checks:
        worst = max(c["value"] / c["limit"] if c["limit"] else 0.0 for c in checks)
        words.append(f"{len(checks)} checks, the worst at {worst:.2g} of its limit")
    for name, found in {row["case"]: numbers, **numbers}.items():
        if isinstance(found, dict) and "tokens_per_s" in found:
            memory = found.get("allocated_gb", found.get("resident_gb", 0))
            limit = f"{found['share_of_bound']:.0%} of the bound" if "share_of_bound" in found else ""
            limit = limit or f"MFU {found['mfu_datasheet']:.1%} / {found['mfu_measured']:.1%}"
            words.append(f"{name} {found['seconds']:.3g} s, {found['tokens_per_s']:.0f} tokens/s, {limit}, "
                         f"{memory:.3g} GB")  # fmt: skip
    words += [value for key, value in numbers.items() if key.startswith("note")]
    for key, what in ("ratio repeated", "repeated prompts"), ("ratio default", "TRL"), ("ratio best", "TRL's best"):
        words += [f"{what}: {numbers[key]:.2f} times our time"] if key in numbers else []
    return f"{'ok' if row['ok'] else 'FAILED':<7}{row['case']:<28}{row['case_seconds']:>4.0f} s  {'; '.join(words)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, rows only with --output")
    parser.add_argument("--half", type=int, choices=HALVES, help="1: whole scripts and numbers, 2: speed")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--output", type=Path, help="rows are added to this file; benchmarks/results/gpu.jsonl")
    options = parser.parse_args()
    options.only = options.only or HALVES.get(options.half) or list(CASES)
    total = TOTAL if options.half else len(HALVES) * TOTAL
    import torch

    tiny, started = options.tiny or not torch.cuda.is_available(), time.perf_counter()
    output = options.output or (None if tiny else ROOT / "benchmarks" / "results" / "gpu.jsonl")
    if tiny:
        torch.set_num_threads(1)  # a pool of threads does not survive the fork
        for method in "sft", "dpo", "reward", "kto", "grpo", "rloo":
            script(method)  # imported once: a fork is all that a case costs
    if tiny and not options.tiny:
        print("no GPU here: tiny shapes on the CPU, whose times mean nothing")
    sources = [Path(__file__), *sorted((ROOT / "common").rglob("*.py")), *sorted((ROOT / "methods").glob("*.py"))]
    about = {"command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
             "sha256": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()}  # fmt: skip
    failed = 0
    with tempfile.TemporaryDirectory(prefix="gpu") as scratch:
        os.environ["GPU_SCRATCH"] = scratch
        for name in options.only:
            left = total - (time.perf_counter() - started)
            if left < 20:
                print(f"left out {name}: {total} s are over; --only {name} runs it alone", flush=True)
                failed += 1
                continue
            row = run_case(name, tiny, min(left, CASES[name][2]), Path(scratch)) | about
            print(describe(row), flush=True)
            failed += not row["ok"]
            if output:
                with open(output, "a") as f:
                    f.write(json.dumps(row) + "\n")
    print(f"{len(options.only) - failed} of {len(options.only)} cases ok, {time.perf_counter() - started:.0f} s")
    sys.exit(2 if failed else 0)


if __name__ == "__main__":
    main()
