"""
DPPO: GRPO whose trust region is the divergence of a token's probability from the sampler's, instead of their ratio.

Paper   Qi et al. 2026, https://arxiv.org/abs/2602.04879. A ratio of 1.5 is a lot for a token of probability 0.6 and
        nothing for one of 0.001, which clipping stops from learning
Loss    l_t = - sg[min(ratio_t, ratio_cap)] M_t A log pi(y_t),   ratio_t = pi(y_t) / mu(y_t), mu the sampler
        M_t = 0 where A pushes what is far further: A > 0, pi > mu, D > epsilon_high, or A < 0, pi < mu, D > epsilon
        binary_tv  D = |pi - mu|        binary_kl  D = mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi))
Tokens  as in methods/grpo.py
Norm    as in methods/grpo.py
Models  as in methods/grpo.py
Data    as in methods/grpo.py
State   as in methods/grpo.py
Parent: methods/grpo.py
Delta:
  Args.method: divergence_type, the size of the region; ratios are to the sampler, by token
  loss, surrogate, dppo_loss, check_flags: the region; no cispo
Paper differences
  none in the formulas, which are those of the authors' code, too (verl: dppo_tv, dppo_kl). The paper's (and old TRL's)
  divergences over the sampler's top 20 tokens are not here: no sampler hands them over
  ratio_cap is TRL's clip_ratio_c (20), old TRL's default of both epsilons is kept (0.15). It was in TRL up to 1.8
Expect  tiny lab, 2 CPU cores: as methods/grpo.py, since sampler and policy agree in the first step after a rollout
Run     python methods/experimental/dppo.py --num_iterations 2
        python methods/experimental/dppo.py --divergence_type binary_kl --epsilon 0.05 --num_iterations 2
"""

import copy
import hashlib
import importlib
import json
import logging
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import zlib
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import accumulate, groupby, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

from tyro.conf import arg

STOP = {"signal": 0, "run": None}  # set by the handler, read at step boundaries; `launch` asks the run why it stopped


def on_signal(number, _frame):
    if STOP["signal"]:
        os._exit(128 + number)  # a second Ctrl-C means now
    STOP["signal"] = number


if __name__ == "__main__":  # before the slow imports: a preemption during them must not kill the worker
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "common" / "tiny").is_dir())
sys.path.insert(0, str(ROOT))  # python and torchrun add the script's own folder only
from common.flags import read_flags


# ---- args ----------------------------------------------------------------------------------------
@dataclass
class Args:
    # ---- run -------------------------------------------------------------------------------------
    model: Annotated[str, arg(aliases=["--model-name-or-path"])] = "tiny"  # folder or hub id; tiny: common/tiny
    output_dir: str = ""  # default: runs/<script>, or the next free runs/<script>-2, -3
    resume: Annotated[str, arg(aliases=["--resume-from-checkpoint"])] = "never"  # never, auto (newest) or a folder
    allow_changes: bool = False  # resume although flags, data or model differ
    allow: tuple[str, ...] = ()  # alert codes that must not stop the run
    seed: int = 42  # data order and sampling noise
    replicate_size: int = 1  # copies of the sharded model (HSDP); ranks / (replicate_size * tp_size) shard one copy
    tp_size: int = 1  # ranks that share each layer's matrices (tensor parallelism), adjacent ones: one machine
    cpu_offload: bool = False  # parameters and optimizer in host memory
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"  # compute layers again in backward; auto: if needed
    compile: bool = False  # each decoder layer by torch.compile
    deterministic: bool = False  # bitwise reruns on CUDA too, slower
    ddp_timeout: float = 1800.0  # seconds without progress after which a run ends and names the rank
    eval_every: Annotated[int, arg(aliases=["--eval-steps"])] = 100  # optimizer steps; 0: only before and after
    save_every: Annotated[int, arg(aliases=["--save-steps"])] = 500  # optimizer steps; 0: only by time and at the end
    save_minutes: float = 30.0  # a checkpoint at least this often
    keep_last: Annotated[int, arg(aliases=["--save-total-limit"])] = 2  # checkpoints to keep
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # of exported weights; bfloat16 rounds small updates away
    report_to: Literal["none", "wandb", "trackio"] = "none"  # metrics.jsonl is written anyway
    # ---- data ------------------------------------------------------------------------------------
    dataset: Annotated[str, arg(aliases=["--dataset-name"])] = "tiny"  # file, folder, hub id or tiny; name:split
    dataset_split: str = ""  # of a hub dataset or folder (train)
    eval_dataset: str = ""  # held-out rows, same spellings; tiny:test
    eval_rows: int = 512  # at most so many held-out rows
    rename: str = ""  # foreign columns, e.g. answer:completion,question:prompt
    chat_template: Annotated[str, arg(aliases=["--chat-template-path"])] = ""  # jinja file for models without one
    chat_template_kwargs: str = "{}"  # JSON, handed to the template
    max_length: int = 1024  # tokens of prompt + completion
    overlong: Literal["drop", "truncate_prompt", "error"] = "drop"  # a completion is never cut
    # ---- optimisation ----------------------------------------------------------------------------
    max_steps: int = -1  # optimizer steps; -1: num_train_epochs decides
    num_train_epochs: Annotated[float, arg(aliases=["--epochs"])] = 3.0  # passes over the dataset
    warmup_steps: int = 0  # linear, from 0
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"  # after the warmup, to 0
    weight_decay: float = 0.0  # on matrices only
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0  # 0: no clipping
    tokens_per_microbatch: int = 8192  # the memory knob; never changes the mathematics
    # ---- method ----------------------------------------------------------------------------------
    learning_rate: Annotated[float, arg(aliases=["--lr"])] = 1e-6  # peak (TRL: 1e-6)
    batch_size: int = 8  # prompts per optimizer step, all ranks together
    num_generations: Annotated[int, arg(aliases=["--group-size"])] = 8  # completions per prompt (TRL: 8; its RLOO: 2)
    max_completion_length: Annotated[int, arg(aliases=["--max-new-tokens"])] = 512  # tokens (TRL: 512)
    temperature: float = 1.0  # divides logits: of the sampler, the policy and the reference
    steps_per_generation: int = 1  # a rollout covers the prompts of so many optimizer steps
    num_iterations: int = 1  # passes over a rollout (mu in the paper)
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"  # a key of NORMS (TRL: dapo)
    divergence_type: Literal["binary_tv", "binary_kl"] = "binary_tv"  # of two outcomes: this token, or any other
    epsilon: float = 0.15  # largest divergence where A < 0, and where A > 0 if epsilon_high is not given
    epsilon_high: float | None = None  # where A > 0
    importance_sampling_level: Literal["token"] = "token"  # of ratios
    importance_sampling_mode: Annotated[
        Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
        arg(aliases=["--vllm-importance-sampling-mode"]),
    ] = "none"  # weight old / sampler: truncated (TIS) or 0 outside (MIS, IcePop), of a token or a sequence
    importance_sampling_clip_min: Annotated[float, arg(aliases=["--vllm-importance-sampling-clip-min"])] = 0.0
    importance_sampling_clip_max: Annotated[float, arg(aliases=["--vllm-importance-sampling-clip-max"])] = 3.0
    old_logprobs: Literal["sampler"] = "sampler"  # ratios are to the sampler's log-probs
    ratio_cap: float = 20.0  # of these ratios
    beta: float = 0.0  # weight of the KL to the starting policy (TRL: 0, no reference in memory)
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # a key of KL (TRL: k3)
    use_bias_correction_kl: bool = False  # KL times the ratio: unbiased off-policy, too (TRL: yes)
    mask_truncated_completions: bool = False  # completions without a stop token are in no loss (DAPO: yes)
    scale_rewards: Literal["group", "batch", "none"] = "group"  # whose standard deviation divides (Dr. GRPO: none)
    reward: tuple[str, ...] = ("accuracy",)  # of BUILT_IN, FILE.py:FUNCTION or a reward model; several are added
    reward_weights: tuple[float, ...] = ()  # one per reward (1 each)
    reward_timeout: float = 60.0  # seconds a reward file may take to load, and per rollout; 0: no limit
    reward_memory: float = 8.0  # GB of address space for the process of a reward file; 0: no limit (CUDA needs that)
    eval_samples: int = 4  # completions per held-out prompt for pass@k; 0: greedy only
    engine: Literal["auto", "loop", "continuous"] = "auto"  # of sampling; auto: continuous batching on CUDA, else loop


def parse_args(argv=None):
    """Flags -> Args. With --model tiny, presets.json (by script, else by its Parent) fills what was not given."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip() + "\n")  # tyro would re-flow it
    args = read_flags(Args, argv)
    if args.model == "tiny":
        presets = json.loads((ROOT / "common/tiny/presets.json").read_text())
        names = [Path(__file__).stem, *re.findall(r"^Parent: \S*?(\w+)\.py", __doc__, re.M)]
        preset = next((presets[name] for name in names if name in presets), {})
        args = read_flags(Args, argv, default=replace(Args(), **preset))
    wrong = []
    for name, value in asdict(args).items():
        zero = isinstance(value, float) or name in ("eval_every", "save_every", "warmup_steps", "eval_samples")
        least, most = 0 if zero else 1, 2**20 if re.match("batch_size|num_gen|max_compl", name) else 2**53
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and name != "seed"
        if number and value != getattr(Args(), name) and not least <= value <= most:
            wrong.append(f"--{name} {value}: must be a number from {least} to {most}.")
    try:
        assert isinstance(json.loads(args.chat_template_kwargs), dict)
    except (ValueError, AssertionError, RecursionError):
        wrong.append(f"--chat_template_kwargs {args.chat_template_kwargs[:200]!a}: must be a JSON object.")
    if max(args.adam_beta1, args.adam_beta2) >= 1 or not 0 <= args.seed < 2**32:
        wrong.append("--adam_beta1 and --adam_beta2 must be below 1, --seed from 0 to 2**32 - 1.")
    if wrong:
        print(f"error: {wrong[0]}", file=sys.stderr)
        sys.exit(2)
    return args


args = parse_args() if __name__ == "__main__" else None  # flags are checked before the slow imports

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForSequenceClassification, ContinuousBatchingConfig, GenerationConfig
from transformers import AutoModelForCausalLM as AutoModelWithHead  # what --model and final/ hold
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer

from common.decoding import decoder
from common.logprobs import PAGED, Policy, Scorer, probe_groups, refuse_rotary, runs_paged
from common.rewards import RewardFile
from common.tokenization import InputError, Row, balance, encode_demonstration, encode_prompt, fingerprint, fit
from common.tokenization import flat_batch, load_rows, load_tokenizer, micro_batches, order, stop_ids, token_picture


# ---- rewards -------------------------------------------------------------------------------------
NUMBER = r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"


def accuracy(prompts, completions, answer=None, solution=None, **_):
    """1 where the completion's number is the answer's: the one after ####, else in \\boxed{}, else the last one. None
    where the row has no answer."""

    def final(text):
        text = text[-1]["content"] if isinstance(text, list) else str(text)
        marked = re.findall(r"####([^\n]*)", text) or re.findall(r"\\boxed\{([^{}]*)\}", text) or [text]
        numbers = re.findall(NUMBER, marked[-1])
        return float(numbers[-1].replace(",", "")) if numbers else None

    gold = [final("" if text is None else text) for text in answer or solution or [None] * len(completions)]
    return [None if g is None else float(final(c) == g) for c, g in zip(completions, gold)]


def format(prompts, completions, **_):
    """1 where the completion ends in `#### number`."""
    texts = [c[-1]["content"] if isinstance(c, list) else c for c in completions]
    return [float(bool(re.search(rf"####\s*{NUMBER}\s*$", text))) for text in texts]


BUILT_IN = {"accuracy": accuracy, "format": format}


class RewardModel:
    """--reward FOLDER: a sequence classifier with one label, as methods/reward.py saves it. Every rank holds it whole;
    prompt and completion are encoded as its training encoded them, and it reads the end-of-turn token."""

    def __init__(self, folder, args):
        cuda = torch.cuda.is_available()
        self.device, self.budget = torch.device("cuda" if cuda else "cpu"), args.tokens_per_microbatch
        try:
            assert AutoConfig.from_pretrained(folder, trust_remote_code=False).num_labels == 1, "it has not one label"
            lm, info = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.bfloat16 if cuda else torch.float32, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True,
            )
            assert not info["missing_keys"], "it is no sequence classifier"
        except Exception as e:  # the loader may raise anything, and what it reads is input
            raise InputError(f"--reward {folder}: {first_line(e)}. Give the folder of a reward model.") from e
        self.tokenizer = load_tokenizer(folder)
        self.stops, self.model = stop_ids(self.tokenizer), Scorer(lm.eval().to(self.device))

    @torch.no_grad()
    def __call__(self, prompts, completions, **_):
        groups, rewards = [], torch.zeros(len(completions))
        for prompt, completion in zip(prompts, completions):
            (group,) = encode_demonstration(Row(prompt=prompt, completion=completion), self.tokenizer, self.stops)
            groups.append(group | {"row": len(groups)})
        for members in micro_batches(groups, self.budget):
            values = self.model(flat_batch(members, self.device))["rewards"]
            rewards[[group["row"] for group in members]] = values.cpu()
        return rewards.tolist()


def load_rewards(args):
    """--reward -> functions reward(prompts, completions, **columns) -> list of numbers or None: TRL's signature."""
    functions = []
    for name in args.reward:
        try:
            if name not in BUILT_IN and os.path.isdir(name):
                functions.append(RewardModel(name, args))
                continue
            if ":" not in name and name not in BUILT_IN:
                raise ChildProcessError("there is no such reward")
            functions.append(BUILT_IN.get(name) or RewardFile(name, args.reward_timeout, args.reward_memory))
        except OSError as e:
            give = f"Give {', '.join(BUILT_IN)}, FILE.py:FUNCTION or the folder of a reward model."
            raise InputError(f"--reward {name}: {first_line(e)}. {give}") from e
    if len(args.reward_weights) not in (0, len(functions)):
        raise InputError(f"--reward_weights: {len(args.reward_weights)} values for {len(functions)} rewards.")
    return functions


def reward_groups(groups, run):
    """Set completion["parts"], one number per reward function, and completion["reward"], their weighted sum. NaN where
    there is none: a function that raises, hangs or says None gave no reward, which is not a reward of 0. Beside the
    columns of the data a function gets completion_ids (a list each) and max_completion_length. Returns what is wrong
    with its answer, a text, or None."""
    pairs = [(group, completion) for group in groups for completion in group["completions"]]
    columns = {k: [g["columns"].get(k) for g, _ in pairs] for group in groups for k in group["columns"]}
    prompts, own = columns.get("prompt", []), ("prompt", "prompts", "completion", "completions")
    texts = [run.tokenizer.decode(c["ids"], skip_special_tokens=True) for _, c in pairs]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    answers = [chat if isinstance(prompt, list) else text for prompt, chat, text in zip(prompts, chats, texts)]
    others = {name: values for name, values in columns.items() if name not in own}
    others |= {"completion_ids": [[*c["ids"]] for _, c in pairs]}
    others |= {"max_completion_length": run.args.max_completion_length}
    parts, wrong = [], None
    for name, function in zip(run.args.reward, run.rewards) if pairs else ():
        try:
            values = function(prompts=prompts, completions=answers, **others)
        except Exception as e:  # rows may hold anything, and files do anything
            print(f"reward {name}: {type(e).__name__}: {first_line(e)}", file=sys.stderr, flush=True)
            values = [None] * len(pairs)
        if values is None:
            wrong = f"--reward {name} must return a list of {len(pairs)} numbers (or None), one for each completion."
        else:
            parts.append([math.nan if v is None or not math.isfinite(v) else v for v in values])
    weights = torch.tensor(run.args.reward_weights or [1.0] * len(parts), dtype=torch.float64)
    for (_, completion), values in zip(pairs, torch.tensor(parts, dtype=torch.float64).T):
        completion["parts"] = values.tolist()
        completion["reward"] = math.nan if values.isnan().all() else (weights * values).nansum().item()
    return wrong


# ---- loss ----------------------------------------------------------------------------------------
NORMS = {  # weight of a token in the loss, by the length of its sequence (M,), global counts and the length limit
    "dapo": lambda lengths, num_tokens, num_seqs, limit: 1 / num_tokens,
    "grpo": lambda lengths, num_tokens, num_seqs, limit: 1 / (lengths * num_seqs),
    "dr_grpo": lambda lengths, num_tokens, num_seqs, limit: 1 / (limit * num_seqs),
}
KL = {  # estimators from one token of the policy's, by log_ratio = log(ref / pi): http://joschu.net/blog/kl-approx.html
    "k1": lambda log_ratio: -log_ratio,  # unbiased, but its gradient is 0 on average: for a KL in the reward
    "k2": lambda log_ratio: log_ratio.square() / 2,  # biased, but its gradient on-policy is the KL's
    "k3": lambda log_ratio: log_ratio.exp() - log_ratio - 1,  # unbiased, never negative
}


def compute_advantages(rewards, args, run):
    """rewards (groups, num_generations), NaN where there is none. Returns the same shape: minus the group's mean, over
    the standard deviation (n - 1) of the group or of all ranks' batch; 0 for NaN, which no statistic includes."""
    rewards = rewards.double()  # or rounding would tell equal rewards apart
    count = (~rewards.isnan()).sum(1, keepdim=True)
    centered = rewards - rewards.nanmean(1, keepdim=True)
    std = (centered.square().nansum(1, keepdim=True) / (count - 1)).sqrt()
    if args.scale_rewards == "batch":
        total, n = all_sum(run, rewards.nansum(), count.sum())
        std = math.sqrt(all_sum(run, (rewards - total / max(1, n)).square().nansum())[0] / max(1, n - 1))
    return (centered if args.scale_rewards == "none" else centered / (std + 1e-4)).nan_to_num(0.0)


def surrogate(ratio, logprobs, sampler_logprobs, advantage, args):
    """What a token (M,) earns, negated: - sg[ratio] A log pi, or 0 outside of the region where A pushes further out.
    Returns too where it is 0."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    policy, sampler = logprobs.detach().clamp(max=-1e-7), sampler_logprobs.clamp(max=-1e-7)  # log(1 - p) is finite
    divergence = (policy.exp() - sampler.exp()).abs()
    if args.divergence_type == "binary_kl":
        rest = (sampler.expm1() / policy.expm1()).log()  # log((1 - mu) / (1 - pi))
        divergence = sampler.exp() * (sampler - policy) - sampler.expm1() * rest
    up, down = (policy > sampler) & (divergence > high), (policy < sampler) & (divergence > args.epsilon)
    outside = torch.where(advantage > 0, up, down)
    return -(ratio.detach() * ~outside * advantage * logprobs), outside


def sequence_sum(values, seq):
    """values, seq (M,) per token. Returns (M,): for each token the sum over its sequence. No sequence is empty."""
    return values.new_zeros(len(seq)).index_add(0, seq, values)[seq]


def importance_ratio(logprobs, old_logprobs, seq, args):
    """-> log(pi / pi_old) (M,) of a token or, at sequence level, the mean over its sequence, so that lengths do not
    matter: Zheng et al. 2025 (GSPO), https://arxiv.org/abs/2507.18071."""
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)
    if args.importance_sampling_level == "token":
        return log_ratio
    return sequence_sum(log_ratio, seq) / torch.bincount(seq)[seq]


def sampler_weight(old_logprobs, sampler_logprobs, seq, args):
    """-> pi_old / sampler (M,) of a token or the product over its sequence, without gradient: truncated (TIS,
    https://fengyao.notion.site/off-policy-rl) or, outside the bounds, 0 (MIS; IcePop, https://arxiv.org/abs/2510.18855)."""
    log_weight = old_logprobs - sampler_logprobs
    log_weight = sequence_sum(log_weight, seq) if args.importance_sampling_mode.startswith("sequence") else log_weight
    weight = log_weight.clamp(-20, 20).exp()
    inside = weight.clamp(args.importance_sampling_clip_min, args.importance_sampling_clip_max)
    return inside if args.importance_sampling_mode.endswith("truncate") else weight * (inside == weight)


def dppo_loss(logprobs, old_logprobs, ref_logprobs, sampler_logprobs, advantages, seq, num_tokens, num_seqs, args):
    """logprobs, old_logprobs, ref_logprobs (or None), sampler_logprobs, seq (M,) per token; advantages (S,);
    num_tokens, num_seqs global. The sampler's weights apply to what a token earns, not to the KL nor to denominators.
    Returns this micro-batch's part of the normalised loss, and metrics as sums over its tokens."""
    log_ratio, advantage = importance_ratio(logprobs, sampler_logprobs, seq, args), advantages[seq]
    ratio = log_ratio.exp()
    capped = ratio.clamp(max=args.ratio_cap) if args.old_logprobs == "sampler" else ratio
    loss, held = surrogate(capped, logprobs, sampler_logprobs, advantage, args)
    metrics = {"ratio_mean": capped, "clip_frac": held.float()}
    if args.importance_sampling_mode != "none":
        metrics["sampler_weight"] = sampler_weight(old_logprobs, sampler_logprobs, seq, args)
        loss = loss * metrics["sampler_weight"]
    if ref_logprobs is not None:
        metrics["kl"] = KL[args.kl_estimator]((ref_logprobs - logprobs).clamp(-20, 20))
        # times the ratio: an expectation over pi, from tokens of pi_old (DeepSeek-V3.2)
        loss = loss + args.beta * (metrics["kl"] * ratio if args.use_bias_correction_kl else metrics["kl"])
    lengths = torch.bincount(seq, minlength=len(advantages))[seq]
    loss = (loss * NORMS[args.loss_type](lengths, num_tokens, num_seqs, args.max_completion_length)).sum()
    return loss, {name: value.detach().sum() for name, value in metrics.items()}


def check_flags(args):
    """What has no meaning together stops the run before step 1."""
    for wrong, text in (
        (args.importance_sampling_level == "sequence" and args.loss_type != "grpo",
         f"--loss_type {args.loss_type}: weighs a sequence by its length, which does not fit one ratio. Use grpo."),
        (args.importance_sampling_mode != "none" and args.old_logprobs == "sampler",
         f"--importance_sampling_mode {args.importance_sampling_mode} needs --old_logprobs policy."),
        (args.importance_sampling_clip_min > args.importance_sampling_clip_max,
         "--importance_sampling_clip_min must not be above --importance_sampling_clip_max."),
        (args.use_bias_correction_kl and not args.beta, "--use_bias_correction_kl needs a --beta above 0."),
    ):  # fmt: skip
        if wrong:
            raise InputError(text)


def evaluate(policy, heldout, args, run):
    """Held-out accuracy of greedy decoding, and pass@k of eval_samples: the first reward function gives 1 or more."""
    refresh(run.sampler, policy)
    mine = [group | {"weight": 1} for group in share(heldout, run)]
    mine = mine or [heldout[0] | {"weight": 0}]  # rewards are collective: nobody stays away
    result = {}
    for name, copies in {"eval/accuracy": 1, f"eval/pass@{args.eval_samples}": args.eval_samples}.items():
        if copies:
            collect(mine, copies, ("eval",) if "pass" in name else None, run)
            right = sum(g["weight"] * any(c["parts"][0] >= 1 for c in g["completions"]) for g in mine)
            length = sum(g["weight"] * len(c["ids"]) / copies for g in mine for c in g["completions"])
            right, length = all_sum(run, right, length)
            result = {name: right / len(heldout), "eval/completion_len": length / len(heldout)} | result
            for group in mine[:2] if copies == 1 else []:
                say(run, picture("greedy", group, run.tokenizer))
    return result


# ---- data ----------------------------------------------------------------------------------------
TINY = "prompts"  # the file of common/tiny that --dataset tiny reads
HEAD = {}  # what a head needs in the model's config


def load_groups(name, tokenizer, stops, args):
    """Rows of a dataset -> (groups without completions, counts of what was dropped, fingerprint of the rows)."""
    rows = load_rows(name, None if ":" in name else args.dataset_split or None, args.rename, TINY)
    kwargs = json.loads(args.chat_template_kwargs)
    prompts = [encode_prompt(row, tokenizer, kwargs) for row in rows]
    groups = [{"prompt": p, "completions": [], "columns": row, "row": row.index} for p, row in zip(prompts, rows)]
    room = args.max_length - args.max_completion_length  # a prompt is never cut
    groups, counts = fit(groups, room, args.overlong.replace("truncate_prompt", "drop"))
    counts["longest"] += args.max_completion_length
    return groups, counts, fingerprint(rows)


# ---- rollout -------------------------------------------------------------------------------------
def uniforms(place, seed, count):
    """The noise of one completion, from its place alone: the same on any rank, in any batch, after any resume."""
    key = int.from_bytes(hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest(), "little") >> 1
    return torch.rand(count, generator=torch.Generator().manual_seed(key), dtype=torch.float64)


def draw(p, noise):
    """p (R, V), noise uniform (R,) -> tokens (R,): the first whose running sum passes noise * the sum of p. In float64,
    or the tail of a large vocabulary would be lost; over blocks first, so that only one block needs running sums."""
    width = math.gcd(p.shape[1], 256)
    blocks = p.unflatten(1, (-1, width))
    mass = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    at = noise[:, None] * mass[:, -1:]
    block = torch.searchsorted(mass, at).clamp(max=mass.shape[1] - 1)
    inner = blocks.gather(1, block[..., None].expand(-1, 1, width))[:, 0].double().cumsum(-1)
    at = at - F.pad(mass, (1, 0)).gather(1, block)
    return (block * width + torch.searchsorted(inner, at.minimum(inner[:, -1:])).clamp(max=width - 1))[:, 0]


@torch.no_grad()
def generate(lm, prompts, copies, noise, stops, args):
    """`copies` completions of each prompt -> as many (ids, log-probs, stopped), a prompt's side by side. Sequences that
    end leave the batch. noise: uniform (prompts * copies, max_completion_length); None: greedy."""
    decoding, stops = decoder(lm, prompts, copies), torch.tensor(stops, device=lm.device)
    live = decoding.rows
    ids = torch.zeros(len(live), args.max_completion_length, dtype=torch.long, device=lm.device)
    logprobs, lengths = torch.zeros(ids.shape, device=lm.device), torch.zeros_like(live)
    stopped = torch.zeros_like(live, dtype=torch.bool)
    for t in range(args.max_completion_length):
        p = (decoding.logits.float() / args.temperature).softmax(-1)
        token = p.argmax(-1) if noise is None else draw(p, noise[live, t])
        ended = torch.isin(token, stops)
        ids[live, t], logprobs[live, t], lengths[live] = token, p.gather(1, token[:, None])[:, 0].log(), t + 1
        stopped[live] = ended
        if t + 1 == args.max_completion_length or ended.all():
            break
        if ended.any():
            stay = decoding.drop(ended)
            live, token = live[stay], token[stay]
        decoding.step(token)
    pieces = zip(ids.cpu(), logprobs.cpu(), lengths.tolist(), stopped.tolist())
    return [(array("i", ids[:n].tolist()), logprobs[:n].clone(), stop) for ids, logprobs, n, stop in pieces]


PAGE = 256  # tokens of the engine's cache that are kept, shared and dropped together


def start_engine(lm, run):
    """transformers' continuous batching over lm as --engine says, or None: the loop. Pages and CUDA graphs last for the
    run, its thread for one call."""
    args, cuda = run.args, run.device.type == "cuda"
    if args.engine == "loop" or args.engine == "auto" and (not cuda or args.deterministic):
        return None
    if not runs_paged(lm, run.device.type):
        say(run, "sampling  in the loop: continuous batching needs transformers 5.20 and a model on the flat road")
        return None
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # it warns of packages it can do without
    # Not the default, 0.9 of what is free: gradients, Adam's moments (12 bytes a weight) and activations are to come.
    # Beside Qwen3-1.7B 0.3 of 80 GB hold some 170,000 tokens; what does not fit waits. On the CPU, where it runs for
    # tests only: two groups.
    pages = 2 * args.num_generations * (1 + args.max_length // PAGE)
    size = {"max_memory_percent": 0.3} if cuda else {"num_blocks": pages, "max_batch_tokens": 1024}
    size |= {"page_size": PAGE, "max_requests_per_batch": 256}
    rules = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0, "eos_token_id": run.stops}
    own, lm.config._attn_implementation = lm.config._attn_implementation, PAGED
    engine = lm.init_continuous_batching(
        GenerationConfig(**rules, max_new_tokens=args.max_completion_length),
        ContinuousBatchingConfig(return_logprobs=True, auto_switch_to_flash=False, **size),  # True: may download
    )
    engine.warmup()  # memory is taken, and graphs are recorded, now
    lm.config._attn_implementation = own
    return engine


def sample_continuous(groups, copies, place, run):
    """`sample` by run.engine, all prompts in one batch, each computed once and forked. It draws from torch's generator:
    the noise depends on the seed, the place, the rank and what else is in the batch."""
    engine, config, names, done = run.engine, run.sampler.config, [], {}
    own, config._attn_implementation = config._attn_implementation, PAGED
    if run.device.type == "cuda":
        torch.cuda.synchronize()  # `refresh` wrote the weights on a stream that the engine's does not wait for
    engine.start()
    try:
        with engine.pause():  # until all prompts are there: what is computed together does not depend on the clock
            torch.manual_seed(int(uniforms((*place, run.rank), run.args.seed, 1) * 2**53))
            for group in groups:
                # the fork is made where one token is left, and there has to be a token before it (transformers 5.23)
                forks = engine.num_return_sequences = 1 if len(group["prompt"]) % PAGE == 1 else copies
                parents = [engine.add_request([*group["prompt"]]) for _ in range(copies // forks)]
                children = ["", *(f"__child#{i}" for i in range(forks - 1))]
                names.append([parent + child for parent in parents for child in children])
        while len(done) < len(groups) * copies:
            out = engine.get_result(timeout=1)
            if out and out.error or not out and not engine.is_running():
                raise RuntimeError(f"continuous batching failed: {out.error if out else 'its thread is gone'}")
            done |= {out.request_id: out} if out else {}
    finally:
        engine.stop(keep_for_next_session=True, hard_stop=True)  # its thread would outlive an error
    engine.batch_processor.cache.reset()  # or a later rollout would find its prompts' pages of these weights
    config._attn_implementation = own
    for group, own_names in zip(groups, names):
        group["completions"] = [
            {"ids": array("i", out.generated_tokens), "sampler_logprobs": torch.tensor(out.logprobs),
             "stopped": out.generated_tokens[-1] in run.stops, "scored": None} for out in map(done.get, own_names)
        ]  # fmt: skip


def sample(groups, copies, place, run):
    """Fill every group["completions"]: `copies` samples, or greedy ones where place is None."""
    if run.engine and place:  # which can draw, or be greedy, but not both
        return sample_continuous(groups, copies, place, run)
    noise, length = None, run.args.max_completion_length
    if place:
        places = [(*place, group["row"], k) for group in groups for k in range(copies)]
        noise = torch.stack([uniforms(p, run.args.seed, length) for p in places]).to(run.device)
    drawn = generate(run.sampler, [group["prompt"] for group in groups], copies, noise, run.stops, run.args)
    for i, group in enumerate(groups):
        keys, mine = ("ids", "sampler_logprobs", "stopped"), drawn[i * copies : (i + 1) * copies]
        group["completions"] = [dict(zip(keys, values)) | {"scored": None} for values in mine]


def collect(groups, copies, place, run):
    """Completions and their rewards, 256 sequences at a time: while the next ones are sampled, those before are judged
    (in a thread, which waits for a process, or for a reward model)."""
    size, answers = max(1, 256 // copies), []
    with ThreadPoolExecutor(1) as judge:
        for i in range(0, len(groups), size):
            sample(groups[i : i + size], copies, place, run)
            answers.append(judge.submit(reward_groups, groups[i : i + size], run))
        agree(run, next(filter(None, [answer.result() for answer in answers]), None))


@torch.no_grad()
def refresh(sampler, policy):
    """The policy's weights into the sampler, in place. full_tensor() is a collective: all ranks, in the same order."""
    weights = own_tensors(policy.lm)
    for name, mine in own_tensors(sampler).items():
        mine.copy_(full(weights[name]))


@torch.no_grad()
def attach_logprobs(model, groups, name, args, run):
    """Set completion[name] (L,): the model's log-probs, from one pass without gradients."""
    for batch, members, weight in rank_batches(groups, groups[0], args, run):
        lengths = torch.bincount(batch["seq"], minlength=len(batch["seq_segment"])).tolist()
        pieces = model(batch)["logprobs"].cpu().split(lengths)
        for completion, piece in zip((c for g in members for c in g["completions"]), pieces):
            completion[name] = piece if weight else completion[name]


def gather(groups, ranks):
    """The groups of all these ranks (a process group; None: all), in their order."""
    everyone = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(everyone, groups, group=ranks)
    return sorted((g for share in everyone for g in share), key=lambda g: g["at"])


def rollout(policy, prompts, index, step, run):
    """Completions, rewards and advantages for this rank's prompts of rollout `index`, with the log-probs that later
    steps will need of the policy as it is now. All of it goes to samples.jsonl, and to the state if it is to last."""
    args = run.args
    mine = [g | {"at": i} for i, g in enumerate(prompts) if i % run.dp_size == run.dp_rank]
    groups = mine[run.rank % args.tp_size :: args.tp_size]  # ranks that share layers and rows share the sampling, too
    lasting = args.steps_per_generation * args.num_iterations > 1
    refresh(run.sampler, policy)
    collect(groups, args.num_generations, ("train", index), run)
    groups = gather(groups, run.mesh["tp"].get_group())
    again = lasting and args.old_logprobs == "policy"
    for name, model in ("old_logprobs", policy if again else None), ("ref_logprobs", run.ref):
        if model:
            attach_logprobs(model, groups, name, args, run)
    rewards = torch.tensor([[c["reward"] for c in g["completions"]] for g in groups], dtype=torch.float64)
    table = compute_advantages(rewards, args, run)
    for group, advantages in zip(groups, table.tolist()):
        for completion, advantage in zip(group["completions"], advantages):
            completion["advantage"] = advantage
    everyone = gather(groups if run.rank % args.tp_size == 0 else [], None)
    for group, c in [(g, c) for g in everyone for c in g["completions"]] if run.rank == 0 else []:
        line = {"step": step + 1, "row": group["row"], "prompt": run.tokenizer.decode(group["prompt"])}
        line |= {"completion": run.tokenizer.decode(c["ids"]), "reward": c["reward"], "advantage": c["advantage"]}
        write(run, "samples.jsonl", line | {"parts": c["parts"], "stop": "stop" if c["stopped"] else "length"})
    run.state |= pack(everyone) if lasting else {}
    return groups


def pack(groups):
    """A rollout as tensors for the state: a kill between its steps must not lead to one from later weights."""
    exact = {float: torch.float64, list: torch.float64}  # a Python float would become fp32, and metrics with it
    each = ((f"rollout/{g['at']}/{k}/", c) for g in groups for k, c in enumerate(g["completions"]))
    fields = ((at + key, value) for at, c in each for key, value in c.items() if value is not None)
    return {name: torch.as_tensor(value, dtype=exact.get(type(value))) for name, value in fields}


def unpack(prompts, run):
    """The inverse, for this rank's prompts; the number of ranks may be another one."""
    size, mine = run.args.num_generations, range(run.dp_rank, len(prompts), run.dp_size)
    groups = {i: prompts[i] | {"at": i, "completions": [{"scored": None} for _ in range(size)]} for i in mine}
    for name, value in run.state.items():
        head, at, k, key = (*name.split("/"), "", "", "")[:4]
        if head == "rollout" and int(at) in groups:
            value = value if key.endswith("logprobs") else array("i", value) if key == "ids" else value.tolist()
            groups[int(at)]["completions"][int(k)][key] = value
    return [*groups.values()]


def main(args):
    # ---- setup -----------------------------------------------------------------------------------
    run = setup(args)
    tokenizer, lm = load_model(args, run)
    stops = stop_ids(tokenizer, lm.generation_config)
    # ---- data ------------------------------------------------------------------------------------
    train, counts, run.data = load_groups(args.dataset, tokenizer, stops, args)
    heldout = load_groups(args.eval_dataset, tokenizer, stops, args)[0][: args.eval_rows] if args.eval_dataset else []
    check_data(train, counts, tokenizer, stops, lm.generation_config, run)
    check_resume(run)
    passes = args.num_train_epochs * args.num_iterations
    steps = args.max_steps if args.max_steps >= 0 else math.ceil(passes * len(train) / args.batch_size)
    # ---- model -----------------------------------------------------------------------------------
    check_flags(args)
    lm.generation_config.eos_token_id = stops  # what training teaches to stop at is what every engine stops at
    if not 2 <= args.num_generations <= 2**20 // (args.batch_size * args.steps_per_generation) or args.temperature <= 0:
        raise InputError("--num_generations must be at least 2 and a rollout at most a million, --temperature above 0.")
    run.tokenizer, run.stops, run.rewards, mine = tokenizer, stops, load_rewards(args), None
    run.sampler, starting = copy.deepcopy(lm), copy.deepcopy(lm)
    for p in run.sampler.parameters():  # not the buffers: rotary tables stay fp32
        p.data = p.to(torch.bfloat16 if run.device.type == "cuda" else torch.float32)
    materialize(run.sampler, run.device, run)
    run.ref = load_weights(shard(Policy(starting, args.temperature), run), run) if args.beta else None
    policy = load_weights(shard(Policy(lm, args.temperature), run), run)
    check_model(policy, run)
    run.engine = start_engine(run.sampler, run)
    fit_memory(policy, longest(train, args.num_generations * args.max_completion_length), run)
    # ---- optimizer -------------------------------------------------------------------------------
    kinds = {}  # norms and biases do not decay; the fused step wants one mesh per group
    for p in policy.parameters():
        kinds.setdefault((args.weight_decay if p.ndim > 1 else 0.0, getattr(p, "device_mesh", None)), []).append(p)
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for (decay, _), params in kinds.items()],
        lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=1e-8, fused=True,
    )
    # ---- resume ----------------------------------------------------------------------------------
    resume(policy, optimizer, tokenizer, run)
    print_plan(policy, tokenizer, train, heldout, counts, steps, run)
    # ---- loop ------------------------------------------------------------------------------------
    if heldout and run.step == 0:
        log(run, {"step": 0} | evaluate(policy, heldout, args, run), steps)
    for step in range(run.step, steps):
        started = time.perf_counter()
        # ---- rollout -----------------------------------------------------------------------------
        index, inner = divmod(step, args.steps_per_generation * args.num_iterations)
        size = args.batch_size * args.steps_per_generation
        prompts = [train[i] for i in order(len(train), args.seed, index * size, size)]
        if inner == 0:
            mine = rollout(policy, prompts, index, step, run)
        elif mine is None:  # resumed inside a rollout
            mine = unpack(prompts, run)
        sampled = time.perf_counter()
        # ---- step --------------------------------------------------------------------------------
        whole = [g for g in mine if g["at"] // args.batch_size == inner % args.steps_per_generation]
        completions, groups = [c for group in whole for c in group["completions"]], whole
        if args.mask_truncated_completions:  # DAPO's overlong filtering: cut ones still count as sequences, as in TRL
            groups = [g | {"completions": [c for c in g["completions"] if c["stopped"]]} for g in whole]
            groups = [g for g in groups if g["completions"]]
        # Advantages that are all 0 give no gradient: without a KL, such groups only count in the denominators. If there
        # are no others, all are computed: a sampler that writes nonsense, and earns nothing, must not go unnoticed.
        live = [g for g in groups if args.beta or any(c["advantage"] for c in g["completions"])]
        live = live if all_sum(run, len(live))[0] else groups
        batches = rank_batches(live, mine[0], args, run)
        counts = sum(len(c["ids"]) for g in groups for c in g["completions"]), len(completions)
        counts += sum(w * len(b["labels"]) for b, _, w in batches), sum(len(c["ids"]) for c in completions)
        num_tokens, num_seqs, num_live, sampled_tokens = all_sum(run, *counts)
        totals = {}
        for batch, members, weight in batches:
            part = [c for group in members for c in group["completions"]]
            tokens = {k: torch.cat([c[k] for c in part]).to(run.device) for k in part[0] if k.endswith("logprobs")}
            advantages = torch.tensor([c["advantage"] for c in part], device=run.device)
            out = policy(batch, want=("entropy",))
            now = out["logprobs"].detach()
            old = now if inner == 0 else tokens.get("old_logprobs", tokens["sampler_logprobs"])
            others = tokens.get("ref_logprobs"), tokens["sampler_logprobs"]
            counts = max(1, num_tokens), num_seqs
            loss, metrics = dppo_loss(out["logprobs"], old, *others, advantages, batch["seq"], *counts, args)
            (loss * weight * run.dp_size).backward()  # a part of a global mean; FSDP2 averages over ranks
            metrics |= {"loss": loss.detach() * num_live, "entropy": out["entropy"].detach().sum()}
            metrics["sampler_gap"] = (now - tokens["sampler_logprobs"]).abs().sum()
            metrics["unequal"] = ((now - tokens.get("old_logprobs", now)).abs() > 1e-3).sum()
            totals = {name: totals.get(name, 0) + weight * value for name, value in metrics.items()}
        means = {name: value / max(1, num_live) for name, value in zip(totals, all_sum(run, *totals.values()))}
        rewards = [[c["reward"] for c in g["completions"] if not math.isnan(c["reward"])] for g in whole]
        equal, cut = sum(len({*r}) < 2 for r in rewards), sum(not c["stopped"] for c in completions)
        sums = sum(map(sum, rewards)), sum(map(len, rewards)), equal, cut, len(whole)
        total, scored, silent, endless, num_groups = all_sum(run, *sums)
        metrics = {"reward": total / max(1, scored), "silent_frac": silent / num_groups}
        metrics |= {"no_reward_frac": 1 - scored / num_seqs, "truncated_frac": endless / num_seqs}
        metrics |= {"completion_len": sampled_tokens / num_seqs, "num_tokens": num_tokens, **means}
        metrics["perf/rollout_seconds"] = sampled - started
        unequal, at = metrics.pop("unequal"), step + (step > 0)  # the first rollout is judged before step 1
        if inner == 0:
            longer = [("--max_completion_length", args.max_completion_length, 2 * args.max_completion_length)]
            for code, key, warn, error, patience, text, *fix in (
                ("GRPO001", "silent_frac", 0.8, 0.999, 10, "groups have equal rewards: nothing to learn from"),
                ("GRPO002", "truncated_frac", 0.5, 0.95, 1 if endless == num_seqs else 3, "no stop token", *longer),
                ("GRPO003", "no_reward_frac", 0, 0.1, 1, "completions got no reward: it raised, hung or was None"),
                ("GRPO004", "sampler_gap", 0.02, 0.1, 1, "sampler and trainer disagree on the same tokens"),
            ):
                check(run, at, code, key, metrics[key], warn, error, text, fix, patience)
            text = "the same weights gave other log-probs than a moment ago: dropout, or train mode?"
            check(run, at, "GRPO005", "share of tokens", unequal, NEVER, 0, text)
            if not scored:
                raise HealthError("GRPO003: no completion of this rollout got a reward. Check --reward.")
        if inner + 1 == args.steps_per_generation * args.num_iterations:
            run.state = {k: v for k, v in run.state.items() if not k.startswith("rollout/")}
        # ---- update ------------------------------------------------------------------------------
        lr = args.learning_rate * schedule(step, steps, args)
        metrics |= {"grad_norm": update(policy, optimizer, lr, metrics, groups, step, run), "lr": lr}
        # ---- log ---------------------------------------------------------------------------------
        log(run, {"step": step + 1} | metrics | performance(started, groups), steps)
        # ---- eval --------------------------------------------------------------------------------
        if heldout and (step + 1 == steps or args.eval_every and (step + 1) % args.eval_every == 0):
            log(run, {"step": step + 1} | evaluate(policy, heldout, args, run), steps)
        # ---- save --------------------------------------------------------------------------------
        save_or_stop(policy, optimizer, tokenizer, step + 1, steps, run)
    # ---- finish ----------------------------------------------------------------------------------
    finish(policy, tokenizer, heldout or train, run)


# ---- model ---------------------------------------------------------------------------------------
STYLES = {  # of a model's own tp_plan, as torch has them; any other stops the run
    "colwise": ColwiseParallel(),
    "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel(),
    "rowwise_split_input": RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": RowwiseParallel(input_layouts=Replicate()),
    "replicated_with_grad_allreduce": None,  # left whole; `update` sums its gradients
}


def load_model(args, run):
    """-> tokenizer, model without memory (on the meta device). Dropout is 0 and the module stays in eval mode: shared
    prompts, recomputation in backward and the ratio to old log-probs all need a forward that repeats itself."""
    path = str(ROOT / "common" / "tiny" / "model") if args.model == "tiny" else args.model
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # its tables quote the folder; what matters is said below
    try:
        if not Path(path).is_dir():
            from huggingface_hub import snapshot_download

            path = snapshot_download(path, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"])
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **HEAD)
        with torch.device("meta"):
            lm = AutoModelWithHead.from_config(config, dtype=torch.float32, trust_remote_code=False)
        lm.generation_config = GenerationConfig.from_model_config(config)
        if (Path(path) / "generation_config.json").is_file():
            lm.generation_config = GenerationConfig.from_pretrained(path)
        transformers.DynamicCache(config=lm.config)  # sampling needs it, be it at the end of the run
    except Exception as e:  # the loader may raise anything, and what it reads is input
        raise InputError(f"--model {args.model}: {first_line(e)}. Pass a Hugging Face model folder or hub id.") from e
    tokenizer = load_tokenizer(path, args.chat_template)
    ids, rows = max(tokenizer.get_vocab().values(), default=0) + 1, lm.get_input_embeddings().num_embeddings
    if ids > rows:
        raise InputError(f"--model {args.model}: {rows} embeddings, but {ids} token ids. Pass another.")
    refuse_rotary(lm.config, args.max_length)
    for module in lm.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (isinstance(module, torch.nn.Dropout) or name.endswith("dropout")):
                setattr(module, name, 0.0)
    run.model_path, run.save_dtype = path, getattr(torch, args.save_dtype)
    run.probe = probe_groups(len(tokenizer))
    return tokenizer, lm.eval()


def tensor_parallel(lm, run):
    """Cut every layer over the tp ranks by the model's own tp_plan; embedding and head by vocabulary where its size
    allows. No weight has been read yet. Returns the modules that stay whole inside a cut: their gradients are parts."""
    size, config, plan = run.args.tp_size, lm.config.get_text_config(), {}
    stop = f"--tp_size {size} does not fit {type(lm).__name__}"
    for name, part in [*lm.named_modules(), *lm.named_parameters()]:
        style = (lm.tp_plan or {}).get(re.sub(r"(?<=\.)\d+(?=\.)", "*", name))
        experts = isinstance(part, torch.nn.Parameter) and part.ndim > 2
        if style not in (None, *STYLES) or experts and not style:
            raise InputError(f"{stop}: its plan for {name} is {style}, which torch has no style for. Use --tp_size 1.")
        plan |= {name: style} if style else {}
    ends = {name: module for name, module in lm.named_modules()
            if module in (lm.get_input_embeddings(), lm.get_output_embeddings())}
    if not plan.keys() - ends.keys():
        raise InputError(f"{stop}: the model has no plan for its layers. Use --tp_size 1.")
    for name in "num_attention_heads", "num_key_value_heads":
        if (heads := getattr(config, name, None) or size) % size:
            raise InputError(f"{stop}: {name} is {heads}. Choose a divisor of it.")
    odd = any(module.weight.shape[0] % size for module in ends.values())
    for name, module in ends.items():
        plan[name] = "embedding_rowwise" if module is lm.get_input_embeddings() else "colwise_gather_output"
    plan = {name: style for name, style in plan.items() if not (odd and name in ends)}
    for name, style in plan.items():
        shape = lm.get_submodule(name).weight.shape
        if STYLES[style] and shape[int(style.startswith("rowwise"))] % size:
            raise InputError(f"{stop}: {name} is {tuple(shape)}. Choose a divisor.")
    parallelize_module(lm, run.mesh["tp"], {name: STYLES[style] for name, style in plan.items() if STYLES[style]})
    lm.tie_weights()  # the head became a parameter of its own
    return [lm.get_submodule(name) for name, style in plan.items() if not STYLES[style]]


def shard(policy, run):
    """Tensor parallelism, then FSDP2: one all-gather per decoder layer; embedding, final norm and head stay in the root
    group, tied or not. fp32 master weights; on GPU bf16 compute with fp32 reduction, on CPU fp32 throughout. One CPU
    process has nothing to share or to convert, where FSDP2 would copy every weight and gradient: left as it is."""
    policy.partial = tensor_parallel(policy.lm, run) if run.args.tp_size > 1 else []
    cuda = run.device.type == "cuda"
    if run.world == 1 and not cuda:
        return policy
    how = {
        "mesh": run.mesh["shard"] if run.args.replicate_size == 1 else run.mesh["replicate", "shard"],
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16 if cuda else torch.float32, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=cuda) if run.args.cpu_offload else OffloadPolicy(),
    }
    for module in policy.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, **how)
    # Without the last argument a forward under no_grad leaves the root's parameters whole, and an optimizer or a
    # checkpoint made then would hold tensors that nobody updates.
    return fully_shard(policy, **how, reshard_after_forward=True)


def materialize(lm, device, run):
    """Memory for a model on the meta device: parameters not set yet, buffers (rotary tables) as transformers does."""
    lm.to_empty(device=device)
    for p in lm.parameters():
        p._is_hf_initialized = True
    lm.initialize_weights()
    lm.tie_weights()
    for buffer in lm.buffers():
        buffer.data = buffer.to(run.device)
    return lm


def own_tensors(policy):
    """Weights and persistent buffers by name, sharded. A tied alias appears once."""
    known = dict(policy.named_parameters()).keys() | dict(policy.named_buffers()).keys()
    return {name: tensor for name, tensor in policy.state_dict().items() if name in known}


def load_weights(policy, run):
    """Every rank reads its own slices of the safetensors files. Where their names are not the model's (a layout that
    transformers converts, as for some experts), or a new head is not in them, rank 0 reads the model, which makes the
    head, and broadcasts it, tensor by tensor."""
    lm = materialize(policy.lm, "cpu" if run.args.cpu_offload else run.device, run)
    tensors, error = own_tensors(lm), None
    reader = HuggingFaceStorageReader(run.model_path)
    try:
        if tensors.keys() <= reader.read_metadata().state_dict_metadata.keys():
            dcp.load(tensors, storage_reader=reader)
            return policy
        whole = {}
        if run.rank == 0:
            named = read_json(Path(run.model_path, "model.safetensors.index.json")).get("weight_map", {}).values()
            if outside := [name for name in named if Path(name).name != name]:
                raise ValueError(f"its index names {outside[0]}, which is not in the folder")
            torch.manual_seed(run.args.seed)  # of a new head
            model, info = AutoModelWithHead.from_pretrained(
                run.model_path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True, **HEAD,
            )
            whole, missing = model.state_dict(), sorted(set(info["missing_keys"]) - policy.new)
            error = f"its weights lack {len(missing)} tensors, {missing[0]} for one" if missing else None
    except (Exception, CheckpointException) as e:  # readers may raise anything; the last is a BaseException
        error = first_line(e)
    agree(run, error and f"--model {run.args.model}: {error}. Pass a Hugging Face model folder or hub id.")
    set_model_state_dict(lm, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return policy


@torch.no_grad()
def check_model(policy, run):
    """MODEL001: what training will compute against the model in its own attention and head, one sequence at a time."""
    gap = (policy(flat_batch(run.probe, run.device))[policy.output] - policy(run.probe, own=True)).abs()
    value, limit = (gap.mean(), 5e-2) if run.device.type == "cuda" else (gap.max(), 1e-3)  # bf16, fp32
    text = f"{policy.output} on the {policy.road} road differ from the model's own forward: this model is not supported"
    check(run, 0, "MODEL001", f"{policy.output} difference", value.item(), NEVER, limit, text)


def longest(groups, completion=0):
    """Tokens of the largest group, its completions at least so many together."""
    return max(len(g["prompt"]) + max(completion, sum(len(c["ids"]) for c in g["completions"])) for g in groups)


def fit_memory(policy, tokens, run):
    """--compile, and --activation_checkpointing: layers keep nothing for backward and are computed again in it. auto:
    where what autograd would keep of the largest micro-batch does not fit beside gradients and Adam. tokens: of the
    largest group. All ranks decide alike: layers under tensor parallelism are collective whenever they are computed."""
    args, layers = run.args, [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)]
    again, run.memory = args.activation_checkpointing == "on", "not looked at"
    if args.activation_checkpointing == "auto":
        kept, batch = [], flat_batch(run.probe, run.device)

        def keep(x):
            mine = x._local_tensor if isinstance(x, DTensor) else x
            kept.append(getattr(mine, "elem", mine).untyped_storage())  # elem: of a collective on its way
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = policy(batch)[policy.output].sum()
        own = [local(p) for p in policy.parameters()]
        kept = {x.data_ptr(): x.nbytes() for x in kept} | {p.untyped_storage().data_ptr(): 0 for p in own}
        loss.backward()  # FSDP2 counts on it
        policy.zero_grad(set_to_none=True)
        most = max(tokens, min(args.tokens_per_microbatch, args.batch_size * tokens))
        activations = sum(kept.values()) / len(batch["input_ids"]) * most
        need = activations + 12 * sum(p.numel() for p in own)  # gradients, two moments
        again = all_most(run, need > 0.8 * free_bytes()) == 1  # the rest: logits of a chunk, a layer's gradients
        run.memory = f"up to {activations / 1e9:.2f} GB of activations, of {most} tokens{': too many' * again}"
    for layer in layers if args.compile else ():
        layer.forward = torch.compile(layer.forward, dynamic=True)  # every micro-batch has a size of its own
    run.memory += ", layers are computed again in backward" * again
    for layer in layers if again else ():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def share(groups, run):
    """This rank's share of a step's groups, balanced by tokens; every rank computes the same shares. Ranks that share
    layers (tp) share their rows too."""
    costs = [len(group["prompt"]) + sum(len(c["ids"]) for c in group["completions"]) for group in groups]
    return [groups[i] for i in balance(costs, run.dp_size)[run.dp_rank]]


def rank_batches(mine, spare, args, run):
    """This rank's groups in micro-batches [(flat batch, its groups, weight)]. All ranks get the same number, because
    every forward is a collective, and at least one, for a gradient of 0; a rank with fewer runs `spare` at weight 0."""
    batches = micro_batches(mine, args.tokens_per_microbatch)
    most = int(all_most(run, max(1, len(batches))))
    padded = [(groups, 1.0) for groups in batches] + [([spare], 0.0)] * (most - len(batches))
    return [(flat_batch(groups, run.device), groups, weight) for groups, weight in padded]


def schedule(step, steps, args):
    """Factor of the learning rate at optimizer step `step` (from 0), as transformers computes it: no state."""
    if step < args.warmup_steps:
        return step / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    return {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}[
        args.lr_scheduler_type
    ]


def all_sum(run, *values):
    """Numbers summed over the data-parallel ranks, as floats, in one all-reduce: the only way a metric leaves its rank.
    The tp ranks of one share hold the same numbers and count once."""
    total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=run.device).detach() for v in values])
    dist.all_reduce(total)
    return (total / run.args.tp_size).tolist()


def all_most(run, value):
    most = torch.tensor(float(value), dtype=torch.float64, device=run.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.item()


def agree(run, error):
    """What is wrong on one rank (text, or None) ends the run on all ranks."""
    everyone = [None] * run.world
    dist.all_gather_object(everyone, error)
    if any(everyone):
        raise InputError(next(filter(None, everyone)))


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(parameters, run):
    """Over all shards of one replica. clip_grad_norm_ refuses parameters of different meshes: those that tensor
    parallelism cuts have one more dimension."""
    squares = 0.0
    for p in parameters:
        names = p.device_mesh.mesh_dim_names if isinstance(p, DTensor) else ()
        cut = "tp" in names and p.placements[-1].is_shard()  # else every tp rank has the same
        parts = local(p.grad).flatten().split(2**20)  # a CPU converts whatever it is given as a whole
        square = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) ** 2 for part in parts]).sum()
        squares += square * (run.args.tp_size if cut else 1)
    return math.sqrt(all_sum(run, squares)[0] / run.args.replicate_size)


def update(policy, optimizer, lr, metrics, groups, step, run):
    """Clip by the global gradient norm and step; returns the norm before clipping. A loss or norm that is not finite
    skips the update, on all ranks alike since both numbers are global; the third in a row ends the run."""
    parameters = [p for p in policy.parameters() if p.grad is not None]
    watched = parameters[len(parameters) // 2]  # not the embedding: a token that did not occur has no gradient there
    limit, before = run.args.max_grad_norm or math.inf, local(watched).clone() if step == 4 else None
    for p in (p for module in policy.partial for p in module.parameters()):
        dist.all_reduce(local(p.grad), group=run.mesh["tp"].get_group())  # each rank has its own heads' part
    grad_norm = gradient_norm(parameters, run)
    factor = min(1.0, limit / (grad_norm + 1e-6))
    for p in parameters if factor < 1 else ():
        local(p.grad).mul_(factor)
    finite = math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)
    if finite and not (step + 1) & step:  # at steps 1, 2, 4, 8, ...
        clipped = gradient_norm(parameters, run)
        check(run, step + 1, "TRAIN003", "clipped norm", clipped, NEVER, limit * 1.01, "clipping did not clip")
        flags = [(c["scored"] or [True] * len(c["ids"]))[not g["prompt"] :] for g in groups for c in g["completions"]]
        (scored,) = all_sum(run, sum(map(sum, flags)))  # nothing predicts a first token; flat_batch has no part in this
        text = "the denominator is not the number of scored tokens"
        check(run, step + 1, "TRAIN003", "tokens too many", abs(scored - metrics["num_tokens"]), NEVER, 0, text)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not finite:
        rows = [[g["row"], [*g["prompt"]], [[*c["ids"]] for c in g["completions"]]] for g in groups]
        (run.out / "debug").mkdir(exist_ok=True)
        (run.out / "debug" / f"step-{step + 1}-rank-{run.rank}.json").write_text(json.dumps(rows))
    text = "loss or gradient is not finite: step skipped, its rows (row, prompt, completions) are in debug/"
    fix = [("--learning_rate", run.args.learning_rate, run.args.learning_rate / 2)]
    check(run, step + 1, "TRAIN001", "steps skipped", float(not finite), NEVER, 0, text, fix)
    if streak(run, "skipped", not finite) == 3:
        raise HealthError("TRAIN001: three steps in a row were not finite.")
    still = float(grad_norm == 0 and metrics.get("silent_frac", 0) < 1)
    if step == 4 and finite and lr > 0 and grad_norm > 0:
        moved, count = all_sum(run, (local(watched) != before).sum(), before.numel())
        still = 1 - moved / count
    text = "the weights do not move: all frozen, or the learning rate too small for their precision?"
    check(run, step + 1, "TRAIN002", "share of weights that stay", still, NEVER, 0.95, text, (), 1 if step == 4 else 3)
    return grad_norm


# ---- checkpoint ----------------------------------------------------------------------------------
FILE_BYTES = 2**32  # of an exported model


def trainer_tensors(policy, optimizer):
    """What training needs back, by name: fp32 weights and Adam's moments, sharded."""
    named, tensors = dict(policy.named_parameters()), {f"model.{k}": v for k, v in own_tensors(policy).items()}
    for name, p in named.items():
        if not optimizer.state[p]:  # as AdamW would make it at its first step: loading needs a place to load into
            optimizer.state[p]["step"] = torch.zeros((), device=p.device)
            optimizer.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        tensors |= {f"optim.{name}.{key}": value for key, value in optimizer.state[p].items()}
    return tensors


def write_checkpoint(policy, optimizer, tokenizer, step, folder, run):
    """A Hugging Face folder, and trainer/ with the rest, meta.json last: on the disk on return, and so are the logs."""
    tensors, trainer = trainer_tensors(policy, optimizer), folder / "trainer"
    if run.rank == 0:
        trainer.mkdir(parents=True)
    dist.barrier()
    ends = [*accumulate(tensor.numel() for tensor in tensors.values())]
    size = min(2**26, max(2**22, ends[-1] // 16))  # 16 to 256 MB a file
    numbers = {name: 1 + end // size for name, end in zip(tensors, ends)}
    try:  # the writer builds each file in memory, twice; with more than its one thread it may swallow a full disk
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(trainer), numbers, save_distributed=True))
        export(policy, folder, run)
        if run.rank == 0:
            tokenizer.save_pretrained(folder)
            held = {k: v for k, v in run.state.items() if isinstance(v, torch.Tensor)}
            save_file(held, trainer / "state.safetensors")
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            meta = {"step": step, "flags": asdict(run.args), "data": run.data, "versions": run.versions}
            meta["state"] = {k: v for k, v in run.state.items() if k not in held}
            meta["offsets"] = {k: (run.out / k).stat().st_size for k in LOGS if (run.out / k).is_file()}
            meta["crc32"] = {str(p.relative_to(folder)): crc32(p) for p in files}
            meta["own_crc32"] = zlib.crc32(json.dumps(meta).encode())
            (trainer / "meta.json").write_text(json.dumps(meta, indent=1))
            for path in [*map(run.out.joinpath, meta["offsets"]), *files, trainer / "meta.json", trainer, folder]:
                fsync(path)
    except (OSError, ValueError, SafetensorError, CheckpointException) as e:  # the last one is a BaseException
        text = "Check the disk and the model's generation_config.json; the checkpoint before is whole."
        raise InputError(f"could not save to {folder.parent}: {first_line(e)}. {text}") from e
    dist.barrier()


def export(policy, folder, run):
    """The Hugging Face files, names and layouts as transformers stores them. Weights go out in files of whole layers,
    each gathered, tensor by tensor, on the rank that writes it: no rank ever holds more."""
    weights, files, size = own_tensors(policy.lm), [[]], 0
    for _, layer in groupby(weights, key=lambda name: re.match(r"(.*?\.\d+\.)?", name)[0]):
        files, size = (files, size) if size < FILE_BYTES else ([*files, []], 0)
        files[-1] += layer
        size = sum(weights[name].numel() for name in files[-1]) * run.save_dtype.itemsize
    index = {}
    for number, names in enumerate(files):
        held, writer = {}, number % run.world
        for name in names:
            tensor = full(weights[name]).detach()  # all ranks take part
            if not tensor.isfinite().all():
                raise HealthError("TRAIN001: weights that are not finite are not saved. Lower --learning_rate.")
            held |= {name: tensor.to("cpu", run.save_dtype)} if run.rank == writer else {}
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        if held:
            held = revert_weight_conversion(policy.lm, held)
            save_file({name: x.contiguous() for name, x in held.items()}, folder / file, metadata={"format": "pt"})
            fsync(folder / file)  # by its writer: rank 0, which syncs all the rest, may be far away
        index |= dict.fromkeys(held, file)
    everyone = [None] * run.world
    dist.all_gather_object(everyone, index)
    if run.rank == 0:
        if len(files) > 1:
            index = {"metadata": {}, "weight_map": {name: file for part in everyone for name, file in part.items()}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        config = copy.deepcopy(policy.lm.config)  # the live one must go on naming the attention we train with
        config.dtype, config.architectures = run.save_dtype, [type(policy.lm).__name__]
        config.save_pretrained(folder)
        policy.lm.generation_config.save_pretrained(folder)


def save_or_stop(policy, optimizer, tokenizer, step, steps, run):
    """checkpoint-<step> every save_every steps, every save_minutes by rank 0's clock, at the last step, and when any
    rank was told to stop (SIGTERM, Ctrl-C): then the run leaves with exit code 4. All ranks decide alike."""
    overdue = run.rank == 0 and time.monotonic() - run.saved_at > 60 * run.args.save_minutes
    run.step, run.beat = step, time.monotonic()
    stop, overdue = all_sum(run, bool(STOP["signal"]), overdue)
    if stop or overdue or step == steps or run.args.save_every and step % run.args.save_every == 0:
        begun = time.monotonic()
        write_checkpoint(policy, optimizer, tokenizer, step, run.out / ".tmp-checkpoint", run)
        if run.rank == 0:
            discard(run.out / f"checkpoint-{step:06d}")  # of a damaged one there may be a rest
            os.rename(run.out / ".tmp-checkpoint", run.out / f"checkpoint-{step:06d}")
            fsync(run.out)
            for old in checkpoints(run.out)[: -run.args.keep_last]:
                discard(old)
        run.saved_at = time.monotonic()
        run.saving += run.saved_at - begun
    if stop and step < steps:
        raise Preempted(f"stopped and saved after step {step}; to go on: {run.command} --resume auto")


def check_resume(run):
    """A run goes on only as what it was: the same flags and rows, unless --allow_changes says otherwise."""
    if not run.checkpoint:
        return
    meta = json.loads((run.checkpoint / "trainer" / "meta.json").read_text())
    now = json.loads(json.dumps(asdict(run.args))) | {"data": run.data}
    free = "output_dir resume allow allow_changes dataset eval_dataset eval_rows eval_every save_every save_minutes "
    free += "keep_last report_to tp_size replicate_size cpu_offload deterministic ddp_timeout"
    then = {k: v for k, v in (meta["flags"] | {"data": meta["data"]}).items() if k not in free.split()}
    differ = [f"{k} was {v}, is {now.get(k)}" for k, v in then.items() if now.get(k) != v]
    if differ and not run.args.allow_changes:
        raise InputError(f"{run.checkpoint}: {'; '.join(differ)}. --allow_changes resumes nevertheless.")
    if meta["versions"] != run.versions:
        say(run, f"resume    is not bitwise exact: saved with {meta['versions']}, now {run.versions}")


def resume(policy, optimizer, tokenizer, run):
    """Load run.checkpoint, if there is one, and cut the run's files back to it: no doubles, no gaps. A fresh run saves
    once for practice, so that a full disk or a model that does not survive saving shows in minute one."""
    if not run.checkpoint:
        need = 3 * sum(p.numel() for p in policy.parameters()) * (12 + run.save_dtype.itemsize)
        if (free := shutil.disk_usage(run.out).free) < need:
            raise InputError(f"{run.out}: three checkpoints need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free.")
        write_checkpoint(policy, optimizer, tokenizer, 0, run.out / ".tmp-rehearsal", run)
        check_export(policy, run.out / ".tmp-rehearsal", run)
        return shutil.rmtree(run.out / ".tmp-rehearsal") if run.rank == 0 else None
    tensors, source = trainer_tensors(policy, optimizer), HuggingFaceStorageReader(str(run.checkpoint / "trainer"))
    try:
        saved = {k for k in source.read_metadata().state_dict_metadata if k.startswith(("model.", "optim."))}
        if saved != tensors.keys():
            raise CheckpointException(f"{len(saved ^ tensors.keys())} tensors are in one of the two only", {})
        dcp.load(tensors, storage_reader=source)  # in place
    except CheckpointException as e:
        raise InputError(f"{run.checkpoint} does not fit --model {run.args.model}: {first_line(e)}") from e
    meta = json.loads((run.checkpoint / "trainer" / "meta.json").read_text())
    run.step = meta["step"]
    run.state = {"alerts": {}} | meta["state"] | load_file(run.checkpoint / "trainer" / "state.safetensors")
    if run.rank == 0:
        for path in [run.out / name for name in LOGS if (run.out / name).is_file()]:
            os.truncate(path, min(path.stat().st_size, meta["offsets"].get(path.name, 0)))
        newer = [p for p in checkpoints(run.out) if p.name > run.checkpoint.name]  # damaged, or an older one is given
        for folder in newer + checkpoints(run.out)[: -run.args.keep_last - len(newer)]:  # a kill came before rotation
            discard(folder)
    say(run, f"resumed   {run.checkpoint}")


@torch.no_grad()
def check_export(policy, folder, run):
    """CKPT001: a saved folder loads with AutoModelWithHead, no tensor missing, ties tied, every weight as we hold it
    (in save_dtype), and says what the policy says. Returns the reloaded model on rank 0; up to 1 GB in fp32 only."""
    reloaded, same, trained = None, True, policy(flat_batch(run.probe, run.device))[policy.output].cpu()
    if sum(p.numel() for p in policy.parameters()) > 250e6:
        return None
    if run.rank == 0:
        reloaded, info = AutoModelWithHead.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    theirs = dict(reloaded.named_parameters()) if reloaded else {}
    for name, p in policy.lm.named_parameters():
        ours = full(p).detach().to("cpu", run.save_dtype).float()
        same = (name in theirs and torch.equal(theirs.pop(name), ours)) and same
    if run.rank == 0:
        broken = bool(info["missing_keys"] or info["unexpected_keys"] or theirs or not same)  # theirs: untied, for one
        text = f"{folder.name} does not reload as the model in training: keep the checkpoint before it"
        check(run, run.step, "CKPT001", "keys, ties or weights differ", broken, NEVER, 0, text)
        if run.save_dtype == torch.float32:  # bf16 rounds
            gap = (policy.reference(reloaded.eval(), run.probe) - trained).abs().max().item()
            check(run, run.step, "CKPT001", f"{policy.output} difference", gap, NEVER, 1e-3, text)
    return reloaded


def finish(policy, tokenizer, heldout, run):
    """final/: the model of the last checkpoint; reloaded, it completes two prompts for the eye."""
    final = run.out / "final"
    if run.rank == 0:
        shutil.copytree(checkpoints(run.out)[-1], run.out / ".tmp-final", ignore=shutil.ignore_patterns("trainer"))
        (run.out / ".tmp-final" / "README.md").write_text(f"Made by `{run.command}`.\n")
        for path in [*(run.out / ".tmp-final").iterdir(), run.out / ".tmp-final"]:
            fsync(path)
        discard(final)
        os.rename(run.out / ".tmp-final", final)
        fsync(run.out)
    dist.barrier()
    reloaded = check_export(policy, final, run)
    for group in heldout[:2] if reloaded else []:
        completion = next(iter(group["completions"]), {"ids": [], "scored": None})
        prompt = [*group["prompt"], *completion["ids"][: (completion["scored"] or [True]).index(True)]]
        prompt = prompt or [*completion["ids"][:1]]
        written = reloaded.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, pad_token_id=0)
        completion = {"ids": written[0, len(prompt) :].tolist(), "scored": None}
        say(run, picture("sample", {"prompt": prompt, "completions": [completion]}, tokenizer))
    for key, value in run.state.get("last", {}).items():
        say(run, f"{key:<24} {run.state['before'][key]:.4f} -> {value:.4f}")
    say(run, f'\n  lm = {AutoModelWithHead.__name__}.from_pretrained("{final}")')
    say(run, f'  tokenizer = AutoTokenizer.from_pretrained("{final}")')
    summary = {key: run.state.get(key) for key in ("before", "last", "best", "alerts")}
    times = {"seconds": time.monotonic() - run.started, "save_seconds": run.saving}
    record(run.rank, run.out, status="finished", exit_code=0, **summary, **times)
    if run.tracker:
        run.tracker.finish()


def checkpoints(out):
    """Checkpoint folders, oldest first: whole when they got their name, but since then something may have happened."""
    return sorted(path.parent for path in out.glob("checkpoint-*/trainer"))


def whole(folder):
    """Every file, meta.json too, is as it was written."""
    try:
        meta = json.loads((folder / "trainer" / "meta.json").read_text())
        own = meta.pop("own_crc32") == zlib.crc32(json.dumps(meta).encode())
        kinds = {"step": int, "flags": dict, "data": str, "versions": dict, "state": dict, "offsets": dict}
        own = own and all(type(meta[key]) is kind for key, kind in kinds.items())
        here = {str(p.relative_to(folder)) for p in folder.rglob("*")}  # no name in meta.json leads out of the folder
        return own and all(name in here and crc32(folder / name) == crc for name, crc in meta["crc32"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return False


def discard(folder):
    """Remove a folder without a moment in which half of it stands under its name, not even after a power cut."""
    if folder.exists():
        os.rename(folder, folder.with_name(f".old-{folder.name}"))
        fsync(folder.parent)
        shutil.rmtree(folder.with_name(f".old-{folder.name}"))


def crc32(path):
    value = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---- health --------------------------------------------------------------------------------------
NEVER = math.inf  # a limit that no value passes
LOGS = "metrics.jsonl", "samples.jsonl", "alerts.jsonl"  # what a resume cuts back; other files are not ours


class HealthError(Exception):
    """A run that cannot train: exit code 3."""


class Preempted(Exception):
    """Told to stop, and saved: exit code 4."""


def setup(args):
    """Process group, mesh, output folder, checkpoint to resume from -> run, what the blocks share."""
    cuda, attempt = torch.cuda.is_available(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # a gather over tp and shard takes two steps, and torch warns of each
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    timeout = timedelta(seconds=2 * args.ddp_timeout)  # `watch` speaks first, and knows more
    if "RANK" in os.environ and not dist.is_initialized():  # torchrun; keys of an earlier attempt would break a restart
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
        own = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"  # each attempt has a store of its own
        store = dist.PrefixStore("0" if own else attempt, store)
        dist.init_process_group(store=store, rank=rank, world_size=world, timeout=timeout)
    elif not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    found = [prepare_folder(args, attempt) if rank == 0 else None]
    dist.broadcast_object_list(found, src=0)
    args.output_dir, checkpoint, error = found[0]
    copies, rest = divmod(world, args.tp_size)
    if not error and (rest or copies % args.replicate_size):
        error = f"--tp_size {args.tp_size} x --replicate_size {args.replicate_size} must divide the {world} ranks."
    if error or args.batch_size < copies:
        raise InputError(error or f"--batch_size {args.batch_size} is too small for {copies} ranks: at least {copies}.")
    run = SimpleNamespace(args=args, rank=rank, world=world, out=Path(args.output_dir), checkpoint=checkpoint, step=0)
    run.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    shape = args.replicate_size, copies // args.replicate_size, args.tp_size
    run.mesh = init_device_mesh(run.device.type, shape, mesh_dim_names=("replicate", "shard", "tp"))
    run.dp_size, run.dp_rank = copies, rank // args.tp_size
    run.state, run.command, run.saved_at, run.tracker = {"alerts": {}}, command_line(args), time.monotonic(), None
    run.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    run.versions |= {"mesh": "x".join(map(str, shape)), "threads": torch.get_num_threads()}
    run.versions["device"] = torch.cuda.get_device_name() if cuda else platform.machine()
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    git = shutil.which("git") and subprocess.run(head, capture_output=True, text=True).stdout.strip()
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    about = {"command": run.command, "flags": asdict(args), "versions": run.versions, "git": git}
    record(rank, run.out, status="running", exit_code=None, pid=os.getpid(), script_sha256=script, **about)
    if rank == 0 and args.report_to != "none":
        try:
            run.tracker = importlib.import_module(args.report_to)
        except ImportError as e:
            raise InputError(f"--report_to {args.report_to} is not installed: pip install {args.report_to}") from e
        run.tracker.init(project="cleanpost", name=run.out.name, config=asdict(args))
    run.weights, run.started, run.saving, STOP["run"] = 0, time.monotonic(), 0.0, run
    watch(run)
    return run


def watch(run):
    """A thread on every rank: ddp_timeout seconds without a step or an evaluation end the run."""
    run.main_thread, run.beat = threading.get_ident(), time.monotonic()

    def wait():
        while time.monotonic() - run.beat < run.args.ddp_timeout:
            time.sleep(min(1.0, run.args.ddp_timeout / 10))
        roll_call(run, f"no progress for {run.args.ddp_timeout:g} s (longer steps need a longer --ddp_timeout)")

    threading.Thread(target=wait, daemon=True).start()


def roll_call(run, why):
    """All ranks say where they stand, the first that can prints it, and the process ends. Who is dead, stopped or keeps
    the interpreter is named by silence."""
    store, keys = dist.distributed_c10d._get_default_store(), [f"roll call/{rank}" for rank in range(run.world)]
    stack = traceback.extract_stack(sys._current_frames()[run.main_thread])
    own = [f.name for f in stack if f.filename == __file__ and f.name not in ("<module>", "launch", "roll_call")]
    silent = "does not answer"
    try:
        store.set(keys[run.rank], f"is in {(own or ['start'])[-1]} ({stack[-1].name})")
        time.sleep(min(3.0, run.args.ddp_timeout))
        said = [store.get(key).decode() if store.check([key]) else silent for key in keys]
    except RuntimeError:  # the store died with its rank
        said = [silent if rank == 0 else "is alive" for rank in range(run.world)]
    if run.rank == next((rank for rank in range(run.world) if said[rank] != silent), run.rank):
        where = "; ".join(f"rank {rank} {text}" for rank, text in enumerate(said))
        print(f"error: step {run.step + 1}: {why}: {where}. To go on: {run.command} --resume auto", file=sys.stderr,
              flush=True)
        record(0, run.out, status="failed", exit_code=1)
    else:
        time.sleep(min(3.0, run.args.ddp_timeout))  # leaving breaks the printing rank's collectives
    os._exit(1)


def prepare_folder(args, attempt):
    """Rank 0 -> output folder, checkpoint to resume from or None, what is wrong or None. Cleans what a kill left."""
    given = None if args.resume in ("never", "auto") else Path(args.resume)
    again, default = args.resume != "never" or attempt != "0", f"runs/{Path(__file__).stem}"
    unused = (n for n in (default, *(f"{default}-{i}" for i in range(2, 9999))) if again or not Path(n).exists())
    out = Path(args.output_dir or (given.parent if given else next(unused)))
    ended = read_json(out / "run.json")
    try:
        taken = [p for p in (out / "run.json", out / "final", *out.glob("checkpoint-*")) if p.exists()]  # or in the way
        if taken and (not again or given and given.parent.resolve() != out.resolve()):
            return str(out), None, f"--output_dir {out} holds another run: --resume auto continues it, or name another."
        if attempt != "0" and ended.get("exit_code") in (2, 3):
            sys.exit(ended["exit_code"])  # torchrun restarted a command that would end the same way
        if given and not (given in checkpoints(given.parent) and whole(given)):
            return str(out), None, f"--resume {given} is not a whole checkpoint folder. Name another, or --resume auto."
        out.mkdir(parents=True, exist_ok=True)
        candidates = [given] if given else checkpoints(out)[::-1] if again else []
        checkpoint = next((folder for folder in candidates if whole(folder)), None)
        for damaged in candidates[: candidates.index(checkpoint) if checkpoint else None]:
            print(f"skipped {damaged}: damaged", file=sys.stderr, flush=True)
        if candidates and not checkpoint:  # a disk that cannot be read today may be read tomorrow
            return str(out), None, f"{out}: no checkpoint is whole. To start over, move them away."
        for path in [*out.glob(".tmp-*"), *out.glob(".old-*"), *([] if checkpoint else map(out.joinpath, LOGS))]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        return str(out), checkpoint, None
    except (OSError, RecursionError) as e:
        return str(out), None, f"--output_dir {out}: {first_line(e)}. Name a folder that can be written."


def command_line(args):
    """The command of this run with its presets spelled out: whatever differs from the defaults."""
    words = []
    for name, value in asdict(args).items():
        if value != getattr(Args(), name) and name not in ("resume", "allow_changes"):
            words += [f"--no-{name}" if value is False else f"--{name}"]
            words += map(str, value) if isinstance(value, tuple) else [] if isinstance(value, bool) else [str(value)]
    return shlex.join(["python", os.path.relpath(__file__), *words])


def record(rank, out, **fields):
    """run.json, from the first moment to the exit code; replaced whole."""
    if rank == 0:
        (out / ".run.json").write_text(json.dumps(read_json(out / "run.json") | fields, indent=1))
        fsync(out / ".run.json")
        os.replace(out / ".run.json", out / "run.json")


def read_json(path):
    """-> the object in a file, or {} where there is none that can be read."""
    try:
        value = json.loads(path.read_text())
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def streak(run, name, now):
    """How many times in a row `now` held, counted in the state."""
    run.state[name] = run.state.get(name, 0) + 1 if now else 0
    return run.state[name]


def check(run, step, code, metric, value, warn, error, message, fix=(), patience=1):
    """An alert when `value` has been above `error`, else above `warn`, `patience` times in a row or more: one coded
    line in alerts.jsonl and on stderr, the first time and then at powers of two. An error before step 1 ends the run
    with exit code 3 unless --allow names it. fix: [(flag, from, to)]. Numbers and fixed text only: agents read alerts,
    and neither data nor model may speak to them."""
    limits = {"error": error, "warn": warn}
    rows = {level: streak(run, f"{code} {metric} {level}", not value <= limits[level]) for level in limits}
    level = next((level for level in limits if rows[level] >= patience), None)
    if not level:
        return
    run.state["alerts"][code] = run.state["alerts"].get(code, 0) + 1
    count = streak(run, f"{code} {level} alerts", True)
    known = run.checkpoint and step == 0  # said by the run that is resumed
    if run.rank == 0 and not known and not count & (count - 1):
        hint = "".join(f"; try {flag} {to}" for flag, _, to in fix)
        fix = [dict(zip(("flag", "from", "to"), f)) for f in fix]
        line = {"step": step, "code": code, "level": level, "metric": metric, "value": value, "limit": limits[level]}
        write(run, "alerts.jsonl", line | {"message": message, "fix": fix, "count": count})
        print(f"[{code} {level} step {step}] {message} ({metric} {value:.4g}){hint}", file=sys.stderr, flush=True)
    if level == "error" and step == 0 and code not in run.args.allow:
        raise HealthError(f"{code}: {message}. --allow {code} goes on nevertheless.")


def check_data(groups, counts, tokenizer, stops, generation_config, run):
    """DATA001-006: what would train on nothing, or on the wrong tokens, says so before step 1."""
    rows, bos, eos = max(1, counts["rows"]), tokenizer.bos_token_id, generation_config.eos_token_id
    starts = [[*g["prompt"][:2], *(i for c in g["completions"][:1] for i in c["ids"][:2])][:2] for g in groups[:100]]
    wants = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    wrong = sum(bos is not None and ids == [bos, bos] or wants and ids[:1] != [bos] for ids in starts)
    completions = [c for g in groups if not g.get("cut") for c in g["completions"]]  # cut: it goes on in the next group
    ends = [[i for i, on in zip(c["ids"], c["scored"] or repeat(1)) if on][-1] for c in completions]
    endless, split = sum(i not in stops for i in ends), len({g["row"] for g in groups if g.get("split")})
    new = set(stops) - set(eos if isinstance(eos, list) else [eos])
    longer = [("--max_length", run.args.max_length, counts["longest"])]
    for code, metric, value, warn, error, text, *fix in (
        ("DATA001", "share", counts["unscored"] / rows, 0, 0.01, "rows have no scored token"),
        ("DATA002", "share", wrong / max(1, len(starts)), 0, 0, "rows begin with two BOS tokens or lack theirs"),
        ("DATA003", "share", endless / max(1, len(ends)), NEVER, 0.05, "completions end in no stop token"),
        ("DATA004", "share", split / rows, 0, NEVER, "the template rewrites earlier turns: split by turn"),
        ("DATA005", "share", counts["overlong"] / rows, 0.01, 0.2, "rows exceed --max_length", *longer),
        ("DATA006", "tokens", len(new), 0, NEVER, "stop tokens the generation config lacks: saved ones get them"),
    ):
        check(run, 0, code, metric, value, warn, error, text, fix)
    if not groups:
        raise InputError(f"--dataset {run.args.dataset}: no row is left ({counts}). Raise --max_length or fix rows.")


def performance(started, groups):
    """perf/...: seconds of the step, this rank's tokens per second (a prompt counts once), its peak memory."""
    seconds = time.perf_counter() - started
    tokens = sum(len(g["prompt"]) + sum(len(c["ids"]) for c in g["completions"]) for g in groups)
    return {"perf/seconds": seconds, "perf/tokens_per_s": tokens / seconds, "perf/peak_gb": peak_bytes() / 1e9}


def peak_bytes():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_bytes():
    """What this rank may still allocate."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+)", info.read_text() if info.is_file() else "")
    return int(found[1]) * 1024 / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if found else math.inf


def log(run, metrics, steps):
    """metrics.jsonl, the console, the tracker. Evaluations also go to the state: the first, the last, the best."""
    if "eval/accuracy" in metrics:
        last = {k: v for k, v in metrics.items() if k.startswith("eval/")}
        run.state |= {"before": run.state.get("before", last), "last": last}
        if last["eval/accuracy"] > run.state.get("best", {"accuracy": -1})["accuracy"]:
            run.state["best"] = {"accuracy": last["eval/accuracy"], "step": metrics["step"]}
    run.beat = time.monotonic()
    write(run, "metrics.jsonl", metrics)
    if run.tracker:
        run.tracker.log(metrics, step=metrics["step"])
    line, end = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k != "perf/tokens_per_s"), "\n"
    if sys.stdout.isatty():  # the bar stays on one line, evaluations push it down
        done, bar = 20 * metrics["step"] // steps, "eval/accuracy" not in metrics and metrics["step"] < steps
        line = f"[{'=' * done}{' ' * (20 - done)}] {line}"[: shutil.get_terminal_size().columns]
        line, end = f"\r\x1b[2K{line}", "" if bar else "\n"
    say(run, line, end)


def write(run, name, fields):
    """Append one line of strict JSON (rank 0): what is not finite becomes null."""
    fields = json.loads(json.dumps(fields), parse_constant=lambda _: None)
    if run.rank == 0:
        with open(run.out / name, "a") as f:
            f.write(json.dumps(fields) + "\n")


def say(run, text, end="\n"):
    if run.rank == 0:
        print(text, end=end, flush=True)


def picture(title, group, tokenizer):
    return f"{title:<10}{token_picture(group, tokenizer, sys.stdout.isatty())}"


def print_plan(policy, tokenizer, train, heldout, counts, steps, run):
    """The first row token by token, and the run in numbers."""
    if steps < 1:
        raise InputError("no optimizer step is planned: raise --max_steps or --num_train_epochs.")
    if run.args.eval_dataset and not heldout:
        raise InputError(f"--eval_dataset {run.args.eval_dataset}: no row is left. Raise --max_length or fix rows.")
    record(run.rank, run.out, data=run.data, steps=steps)
    weights = run.weights = sum(p.numel() for p in policy.parameters())
    tokens = sum(len(g["prompt"]) + sum(len(c["ids"]) for c in g["completions"]) for g in train)
    say(run, picture("first row", train[0], tokenizer))
    say(run, f"data      {counts['kept']} of {counts['rows']} rows kept, {tokens} tokens; {len(heldout)} rows held out")
    say(run, f"run       {steps} steps of {run.args.batch_size} rows on {run.world} x {run.versions['device']}")
    say(run, f"model     {weights / 1e6:.1f}M weights, {policy.road} road, dropout 0; weights, gradients and Adam take "
        f"{16 * weights * run.args.replicate_size / run.world / 1e9:.2f} GB a rank")
    say(run, f"memory    {run.memory}")
    say(run, f"command   {run.command}")


def first_line(error):
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]


def memory_advice(run):
    """The largest term of this rank's memory, and the flag to lower."""
    static, peak = 16 * run.weights * run.args.replicate_size / run.world / 1e9, peak_bytes() / 1e9
    if static > peak - static:
        return f"weights, gradients and Adam take {static:.1f} of {peak:.1f} GB. Use more ranks, or --cpu_offload."
    half = max(1, run.args.tokens_per_microbatch // 2)
    return (f"step {run.step + 1} computes with {peak - static:.1f} of {peak:.1f} GB. Lower --tokens_per_microbatch to "
            f"{half}, and --max_length if rows are longer.")


def launch(main, args):
    """Run main and leave with its exit code, also in run.json: 0 done, 1 crash, 2 bad flags, data, model or
    environment, 3 health error, 4 preempted after saving."""
    codes, code, rank = {InputError: 2, OSError: 2, HealthError: 3, Preempted: 4}, 1, int(os.environ.get("RANK", "0"))
    try:
        main(args)
        code = 0
    except (MemoryError, RuntimeError, *codes) as e:
        memory = isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)
        code, run = 2 if memory else next((n for kind, n in codes.items() if isinstance(e, kind)), 1), STOP["run"]
        if code == 1 and run and re.search("[Gg]loo|NCCL|[Cc]onnection", str(e)):
            roll_call(run, first_line(e))
        if code == 1:
            raise
        text = f"{e}. Check --output_dir and the disk." if isinstance(e, OSError) else str(e)
        if memory:
            text = f"out of memory: {memory_advice(run) if run else 'use a smaller --model or more ranks.'}"
        text = text if len(text) < 1000 else f"{text[:500]} ... {text[-450:]}"
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)  # data may have named itself
        if rank == 0 or code == 2:
            print(f"error: {text}" if code < 4 else text, file=sys.stderr, flush=True)
    finally:
        try:
            if code and read_json(Path(args.output_dir or "-") / "run.json").get("pid") == os.getpid():  # our own
                record(rank, Path(args.output_dir), status="stopped" if code == 4 else "failed", exit_code=code)
        except OSError:
            pass  # the disk that is full or locked may be why we leave, which has been said
    dist.destroy_process_group() if code == 0 else os._exit(code)  # a failed rank does not wait for the others


if __name__ == "__main__":
    launch(main, args)
