"""
GRPO: sample a group of completions per prompt, reward each, and raise the likelihood of those above their group's mean.

Paper   Shao et al. 2024, https://arxiv.org/abs/2402.03300, equation 3. Default normaliser and clip-higher: Yu et al.
        2025 (DAPO), https://arxiv.org/abs/2503.14476, equation 8; dr_grpo: Liu et al. 2025, https://arxiv.org/abs/2503.20783
        cispo: MiniMax-M1, https://arxiv.org/abs/2506.13585. Other losses: methods/experimental/grpo_*.py
Loss    l_t = - min(ratio_t A, clip(ratio_t, 1 - epsilon, 1 + epsilon_high) A) + beta (ref/pi - log(ref/pi) - 1)
        ratio_t = pi(y_t) / pi_old(y_t),   A = (r - mean of the group) / (std of the group + 1e-4)
Tokens  every sampled token, the stop token included
Norm    dapo: sum of l / num_tokens; grpo: mean over sequences of their token means; dr_grpo: sum / (num_seqs x
        max_completion_length). Always over the whole optimizer step, all micro-batches and ranks, so that bnpo, whose
        denominator is a micro-batch's in TRL, is dapo here
Models  the policy (trained), sharded with FSDP2; an unsharded copy that samples; with beta > 0 a frozen reference
Data    {prompt, any columns}: the columns go to the reward functions
Parent: none
Paper differences
  the first step after a rollout takes pi_old = pi: the ratio is exactly 1 and a second forward is saved (as TRL does)
  one optimizer step takes whole groups, and counts their tokens only; TRL shuffles completions over a rollout's steps
  cispo caps ratios at epsilon_high itself, as TRL does, and has no lower clip; the paper writes 1 + epsilon_high
Expect  tiny lab, 2 CPU cores: held-out greedy accuracy 0.30 -> 1.00 in a minute or two (benchmarks/README.md)
Run     torchrun --nproc_per_node=8 methods/grpo.py --model DIR --dataset prompts.jsonl --reward accuracy
        python methods/grpo.py                                       (no flags: the tiny lab, on any machine)
"""

import copy
import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

VERSION = "0.4"  # of common/, which this script was written for
places = [*Path(__file__).resolve().parents, Path(os.environ.get("CLEANPOST", "/"))]
root = next((place for place in places if (place / "common" / "runtime" / "flags.py").is_file()), None)
if not root:
    print(f"error: no common/ of CleanPost above {__file__} or in CLEANPOST. Copy common/ beside it.", file=sys.stderr)
    sys.exit(2)
sys.path.insert(0, str(root))
from common.runtime.flags import InputError, RunFlags, parse_flags


# ---- args ----------------------------------------------------------------------------------------
@dataclass
class Args(RunFlags):
    # ---- data ------------------------------------------------------------------------------------
    dataset: Annotated[str, arg(aliases=["--dataset-name"])] = "tiny"  # file, folder, hub id or tiny; name:split
    dataset_split: str = ""  # of a hub dataset or folder (train)
    eval_dataset: str = ""  # held-out rows, same spellings; tiny:test, rows.jsonl[95%:]
    eval_fraction: float = 0.0  # instead: this share of the dataset is held out, its last rows
    eval_rows: int = 512  # at most so many held-out rows
    rename: str = ""  # foreign columns: question:prompt,reward.truth:answer,"{one}\n{two}:completion"
    as_chat: bool = False  # plain strings become a user's prompt and an assistant's answer, in the chat template
    chat_template: Annotated[str, arg(aliases=["--chat-template-path"])] = ""  # jinja file, chatml or plain
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
    loss_type: Literal["dapo", "grpo", "dr_grpo", "cispo"] = "dapo"  # how tokens are weighed, see Norm (TRL: dapo)
    epsilon: float = 0.2  # lower clip, and upper where epsilon_high is not given (TRL: 0.2)
    epsilon_high: float | None = None  # upper clip (DAPO: 0.28)
    importance_sampling_level: Literal["token", "sequence"] = "token"  # of ratios (GSPO: sequence)
    importance_sampling_mode: Annotated[
        Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
        arg(aliases=["--vllm-importance-sampling-mode"]),
    ] = "none"  # weight old / sampler: truncated (TIS) or 0 outside (MIS, IcePop), of a token or a sequence
    importance_sampling_clip_min: Annotated[float, arg(aliases=["--vllm-importance-sampling-clip-min"])] = 0.0
    importance_sampling_clip_max: Annotated[float, arg(aliases=["--vllm-importance-sampling-clip-max"])] = 3.0
    old_logprobs: Literal["policy", "sampler"] = "policy"  # of a rollout's later steps: one more pass, or the sampler's
    ratio_cap: float = 2.0  # of ratios to the sampler's log-probs, which also hold its rounding (truncated IS)
    beta: float = 0.0  # weight of the KL to the starting policy (TRL: 0, no reference in memory)
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # see kl_estimate (TRL: k3)
    use_bias_correction_kl: bool = False  # KL times the ratio: unbiased off-policy, too (TRL: yes)
    mask_truncated_completions: bool = False  # completions without a stop token are in no loss (DAPO: yes)
    scale_rewards: Literal["group", "batch", "none"] = "group"  # whose standard deviation divides (Dr. GRPO: none)
    reward: tuple[str, ...] = ("accuracy",)  # accuracy, format, math, FILE.py:FUNCTION or reward models; they are added
    reward_weights: tuple[float, ...] = ()  # one per reward (1 each)
    reward_timeout: float = 60.0  # seconds a reward file may take to load, and per rollout; 0: no limit
    reward_memory: float = 8.0  # GB of address space for the process of a reward file; 0: no limit (CUDA needs that)
    eval_samples: int = 4  # completions per held-out prompt for pass@k; 0: greedy only
    engine: Literal["auto", "loop", "continuous"] = "auto"  # of sampling; auto: continuous batching on CUDA, else loop

    def check(self):
        super().check()
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        most = 2**20 // (self.batch_size * self.steps_per_generation)
        if not 2 <= self.num_generations <= most or self.temperature <= 0:
            raise InputError(
                "--num_generations must be at least 2 and a rollout at most a million, --temperature above 0."
            )
        if self.loss_type == "cispo" and high < 1:
            raise InputError(f"--epsilon_high {high:g}: cispo caps ratios at it, 1 or more (5).")
        if self.importance_sampling_level == "sequence" and self.loss_type != "grpo":
            raise InputError(
                f"--loss_type {self.loss_type}: weighs a sequence by its length, which does not fit one ratio. "
                "Use grpo."
            )
        if self.importance_sampling_mode != "none" and self.old_logprobs == "sampler":
            raise InputError(
                f"--importance_sampling_mode {self.importance_sampling_mode} needs --old_logprobs policy."
            )
        if self.importance_sampling_clip_min > self.importance_sampling_clip_max:
            raise InputError("--importance_sampling_clip_min must not be above --importance_sampling_clip_max.")
        if self.use_bias_correction_kl and not self.beta:
            raise InputError("--use_bias_correction_kl needs a --beta above 0.")


def parse_args(argv=None):
    return parse_flags(Args, __doc__, argv, preset="grpo", version=VERSION)


args = parse_args() if __name__ == "__main__" else None  # wrong flags end here, before the slow imports

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from common.batches import attach_logprobs, count_scored, fit, micro_batches, order, sequence_size, sequence_sum, share
from common.data import fingerprint, load_rows
from common.logprobs import Policy
from common.rewards import check_rewards, heldout_metrics, load_rewards, reward_table, rollout_metrics, sample_and_judge
from common.rewards import write_samples
from common.runtime.checkpoint import check_resume, finish, resume, save_or_stop
from common.runtime.encoding import encode_rows
from common.runtime.health import check, check_data, check_update
from common.runtime.launch import launch
from common.runtime.model import check_model, fit_memory, load_model, load_weights, longest, own_tensors
from common.runtime.parallel import all_sum, clip_grad_norm, full, local, param_groups, partial_parameters
from common.runtime.parallel import tensor_parallel
from common.runtime.run import is_due, log, log_eval, performance, print_plan, schedule, show_groups
from common.sampling import Sampler, from_tensors, gather_groups, set_completions, to_tensors
from common.tokenization import encode_prompt, stop_ids


# ---- loss ----------------------------------------------------------------------------------------
def compute_advantages(rewards, args):
    """rewards (groups, num_generations) of the whole rollout, NaN where there is none. Returns the same shape: minus
    the group's mean, over the standard deviation (n - 1) of the group or of the rollout; 0 for NaN, which no statistic
    includes."""
    rewards = rewards.double()  # or rounding would tell equal rewards apart
    count = (~rewards.isnan()).sum(1, keepdim=True)
    centered = rewards - rewards.nanmean(1, keepdim=True)
    if args.scale_rewards == "group":
        std = (centered.square().nansum(1, keepdim=True) / (count - 1)).sqrt()
        centered = centered / (std + 1e-4)
    elif args.scale_rewards == "batch":
        mean = rewards.nansum() / count.sum().clamp(min=1)
        variance = (rewards - mean).square().nansum() / (count.sum() - 1).clamp(min=1)
        centered = centered / (variance.sqrt() + 1e-4)
    return centered.nan_to_num(0.0)


def surrogate(ratio, logprobs, advantage, args):
    """What a token (M,) earns, negated: - min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A). cispo:
    - sg[min(ratio, epsilon_high)] A log pi, so that a token beyond the cap still learns. Returns also where a bound
    holds."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type == "cispo":
        return -ratio.detach().clamp(max=high) * advantage * logprobs, ratio > high
    clipped = ratio.clamp(1 - args.epsilon, 1 + high) * advantage
    return -torch.min(ratio * advantage, clipped), clipped < ratio * advantage


def importance_ratio(logprobs, old_logprobs, seq, args):
    """Return log(pi / pi_old) (M,) of each token or, at sequence level, what stands for all its tokens:
    the mean over its sequence, so that lengths do not matter (Zheng et al. 2025, GSPO, https://arxiv.org/abs/2507.18071)."""
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)
    if args.importance_sampling_level == "token":
        return log_ratio
    return sequence_sum(log_ratio, seq) / sequence_size(seq)


def sampler_weight(old_logprobs, sampler_logprobs, seq, args):
    """Return pi_old / sampler (M,) of each token or the product over its sequence, without gradient: truncated (TIS,
    https://fengyao.notion.site/off-policy-rl) or, outside the bounds, 0 (MIS; IcePop, https://arxiv.org/abs/2510.18855)."""
    log_weight = old_logprobs - sampler_logprobs
    if args.importance_sampling_mode.startswith("sequence"):
        log_weight = sequence_sum(log_weight, seq)
    weight = log_weight.clamp(-20, 20).exp()
    inside = weight.clamp(args.importance_sampling_clip_min, args.importance_sampling_clip_max)
    if args.importance_sampling_mode.endswith("truncate"):
        return inside
    return weight * (inside == weight)


def kl_estimate(log_ratio, args):
    """log_ratio (M,): log(ref / pi) of tokens that pi sampled. Returns an estimate of KL(pi || ref) from each of them,
    http://joschu.net/blog/kl-approx.html."""
    if args.kl_estimator == "k1":  # unbiased, but its gradient is 0 on average: for a KL in the reward
        return -log_ratio
    if args.kl_estimator == "k2":  # biased, but its gradient on-policy is the KL's
        return log_ratio.square() / 2
    return log_ratio.exp() - log_ratio - 1  # k3: unbiased, never negative


def token_weight(seq, num_tokens, num_seqs, args):
    """seq (M,) per token; num_tokens, num_seqs: of the whole optimizer step, all ranks. Returns what a token's loss is
    multiplied by before the sum: the denominators of Norm."""
    if args.loss_type == "grpo":
        return 1 / (sequence_size(seq) * num_seqs)
    if args.loss_type == "dr_grpo":
        return 1 / (args.max_completion_length * num_seqs)
    return 1 / num_tokens  # dapo, cispo


def grpo_loss(logprobs, batch, num_tokens, num_seqs, args):
    """logprobs (M,), with gradient; in the batch old_logprobs, sampler_logprobs and with a reference ref_logprobs, (M,)
    each, and advantage (S,). The sampler's weights apply to what a token earns, not to the KL nor to denominators.
    Returns this micro-batch's part of the normalised loss, and metrics as sums over its tokens."""
    seq = batch["seq"]
    old_logprobs = batch["old_logprobs"]
    log_ratio = importance_ratio(logprobs, old_logprobs, seq, args)
    ratio = log_ratio.exp()
    capped = ratio.clamp(max=args.ratio_cap) if args.old_logprobs == "sampler" else ratio
    loss, clipped = surrogate(capped, logprobs, batch["advantage"][seq], args)
    metrics = {"ratio_mean": capped, "clip_frac": clipped.float()}
    if args.importance_sampling_mode != "none":
        metrics["sampler_weight"] = sampler_weight(old_logprobs, batch["sampler_logprobs"], seq, args)
        loss = loss * metrics["sampler_weight"]
    if args.beta:
        metrics["kl"] = kl_estimate((batch["ref_logprobs"] - logprobs).clamp(-20, 20), args)
        correction = ratio if args.use_bias_correction_kl else 1.0  # to an expectation over pi (DeepSeek-V3.2)
        loss = loss + args.beta * (metrics["kl"] * correction)
    loss = (loss * token_weight(seq, num_tokens, num_seqs, args)).sum()
    return loss, {name: value.detach().sum() for name, value in metrics.items()}


def evaluate(policy, sampler, heldout, reward_functions, step, args, run):
    """Return the held-out accuracy of greedy decoding, and pass@k of eval_samples: the share of prompts for which the
    first reward function gives 1 or more, to any of k samples. Prompts without a reward are in neither."""
    refresh(sampler, policy)
    groups = share(run, [group | {"place": place} for place, group in enumerate(heldout)])
    sample_and_judge(run, sampler, groups, 1, reward_functions, place=("eval",), greedy=True)
    show_groups(run, "greedy", groups[:2], sampler.tokenizer)
    metrics = heldout_metrics(run, groups)
    missing = metrics["eval/no_reward_frac"]
    if args.eval_samples:
        sample_and_judge(run, sampler, groups, args.eval_samples, reward_functions, place=("eval",))
        sampled = heldout_metrics(run, groups)
        metrics[f"eval/pass@{args.eval_samples}"] = sampled["eval/accuracy"]
        missing = max(missing, sampled["eval/no_reward_frac"])
    check_rewards(run, "GRPO003", step=step, metric="eval/no_reward_frac", share=missing)
    return metrics


# ---- data ----------------------------------------------------------------------------------------
def load_groups(name, tokenizer, stops, args, run):
    """Return the rows of a dataset as groups without completions yet, counts of what was dropped, and the rows'
    fingerprint."""
    rows = load_rows(name, args, tiny="prompts")
    groups = encode_rows(run, rows, encode_prompt, tokenizer, stops)
    for group in groups:
        group["columns"] = rows[group["row"]]
    overlong = args.overlong.replace("truncate_prompt", "drop")  # a prompt is never cut
    groups, counts = fit(groups, rows, args.max_length - args.max_completion_length, overlong)
    counts["longest"] += args.max_completion_length
    return groups, counts, fingerprint(rows)


# ---- rollout -------------------------------------------------------------------------------------
def rollout(policy, reference, sampler, reward_functions, prompts, index, args, run):
    """Complete and judge all prompts of rollout `index`. Returns the groups of ALL ranks, on every rank, with the
    log-probs that later steps will need of the policy as it is now, and with advantages."""
    refresh(sampler, policy)
    prompts = [group | {"place": place} for place, group in enumerate(prompts)]
    groups = prompts[run.dp_rank :: run.dp_size][run.rank % args.tp_size :: args.tp_size]  # what this rank samples
    sample_and_judge(run, sampler, groups, args.num_generations, reward_functions, place=("train", index))
    groups = gather_groups(prompts, groups, run.mesh["tp"].get_group())  # ranks that share layers score the same rows
    if args.steps_per_generation * args.num_iterations > 1 and args.old_logprobs == "policy":
        attach_logprobs(run, policy, groups, "old_logprobs")
    if reference:
        attach_logprobs(run, reference, groups, "ref_logprobs")
    groups = gather_groups(prompts, groups, run.group)
    advantages = compute_advantages(reward_table(groups), args)
    set_completions(groups, "advantage", advantages)
    return groups


@torch.no_grad()
def refresh(sampler, policy):
    """Copy the policy's weights into the sampler, in place. full() gathers a sharded tensor (DTensor.full_tensor): a
    collective, so all ranks do it in the same order."""
    weights = own_tensors(policy.lm)
    for name, tensor in own_tensors(sampler.lm).items():
        tensor.copy_(full(weights[name]))


def without_truncated(groups):
    """The groups without the completions that found no stop token (DAPO's overlong filtering)."""
    remaining = []
    for group in groups:
        completions = [completion for completion in group["completions"] if completion["stopped"]]
        if completions:
            remaining.append(group | {"completions": completions})
    return remaining


def with_signal(groups, args):
    """The groups that move the policy. Advantages that are all 0 give no gradient: without a KL, such groups only count
    in the denominators. If there are no others, all are computed: a sampler that writes nonsense, and earns nothing,
    must not go unnoticed."""
    if args.beta:
        return groups
    moving = []
    for group in groups:
        if any(completion["advantage"] for completion in group["completions"]):
            moving.append(group)
    return moving or groups


def check_rollout(run, step, metrics, unequal):
    """GRPO001-005: a rollout that nothing can be learned from, or that the trainer sees with other eyes. metrics: of
    the rollout, the trainer's own of its first step."""
    if step > 0:
        step += 1  # the first rollout is judged before step 1
    check(
        run, "GRPO001", step=step, metric="silent_frac", value=metrics["silent_frac"], warn=0.8, error=0.999,
        patience=10, message="groups have equal rewards: nothing to learn from",
    )
    length = run.args.max_completion_length
    entropy = max(metrics["entropy"], 1e-3)  # rounding moves the log-probs of a confident model less
    check(
        run, "GRPO002", step=step, metric="truncated_frac", value=metrics["truncated_frac"], warn=0.5, error=0.95,
        patience=1 if metrics["truncated_frac"] == 1 else 3, message="no stop token",
        fix=("--max_completion_length", length, 2 * length),
    )
    check_rewards(run, "GRPO003", step=step, metric="no_reward_frac", share=metrics["no_reward_frac"])
    check(
        run, "GRPO004", step=step, metric="sampler_gap / entropy", value=metrics["sampler_gap"] / entropy,
        warn=0.025, error=0.2, message="sampler and trainer disagree on the same tokens",
    )
    check(
        run, "GRPO005", step=step, metric="difference / entropy", value=unequal / entropy, error=1e-4, rounding=0.05,
        message="the same weights gave other log-probs than a moment ago: dropout, or train mode?",
    )


# ---- fsdp ----------------------------------------------------------------------------------------
def shard(policy, run):
    """Tensor parallelism, then FSDP2: one all-gather per decoder layer; embedding, final norm and head stay in the root
    group, tied or not. Master weights and reduction are fp32, layers compute in --dtype. One CPU process in fp32 has
    nothing to share or to convert, where FSDP2 would copy every weight and gradient: left as it is."""
    policy.partial = tensor_parallel(run, policy.lm)  # cuts nothing at --tp_size 1
    cuda = run.device.type == "cuda"
    if run.world == 1 and run.dtype == torch.float32 and not cuda:
        return policy
    options = {
        "mesh": run.mesh["shard"] if run.args.replicate_size == 1 else run.mesh["replicate", "shard"],
        "mp_policy": MixedPrecisionPolicy(run.dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=cuda) if run.args.cpu_offload else OffloadPolicy(),
    }
    for layer in policy.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            fully_shard(layer, **options)
    # Without the last argument a forward under no_grad leaves the root's parameters whole, and an optimizer or a
    # checkpoint made then would hold tensors that nobody updates.
    return fully_shard(policy, **options, reshard_after_forward=True)


# ---- main ----------------------------------------------------------------------------------------
def main(args, run):
    # ---- setup -----------------------------------------------------------------------------------
    run.mesh = init_device_mesh(run.device.type, run.mesh_shape, mesh_dim_names=("replicate", "shard", "tp"))
    tokenizer, lm = load_model(AutoModelForCausalLM, args)  # on the meta device: no memory yet
    stops = stop_ids(tokenizer, lm.generation_config)
    # ---- data ------------------------------------------------------------------------------------
    train, counts, run.data = load_groups(args.dataset, tokenizer, stops, args, run)
    heldout = []
    if args.eval_dataset:
        heldout = load_groups(args.eval_dataset, tokenizer, stops, args, run)[0][: args.eval_rows]
    check_data(run, train, counts, tokenizer, lm.generation_config, stops)
    check_resume(run)
    steps = args.max_steps
    if steps < 0:
        steps = math.ceil(args.num_train_epochs * args.num_iterations * len(train) / args.batch_size)
    # ---- model -----------------------------------------------------------------------------------
    lm.generation_config.eos_token_id = stops  # what training teaches to stop at is what every engine stops at
    reward_functions = load_rewards(args, train, tokenizer)
    sampler = Sampler(run, lm, tokenizer, stops)  # an unsharded copy
    reference = load_weights(run, shard(Policy(copy.deepcopy(lm), args.temperature), run)) if args.beta else None
    policy = load_weights(run, shard(Policy(lm, args.temperature), run))  # every rank reads its own slices of the files
    check_model(run, policy, tokenizer, train + heldout)  # MODEL001: the same log-probs as the model's own forward
    sampler.start_engine()
    memory = fit_memory(run, policy, tokenizer, longest(train, args.num_generations * args.max_completion_length))
    # ---- optimizer -------------------------------------------------------------------------------
    parameters = param_groups(policy, args.weight_decay)  # matrices decay; norms and biases do not
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=betas, eps=1e-8, fused=True)
    # ---- resume ----------------------------------------------------------------------------------
    models, optimizers = {"policy": policy}, {"policy": optimizer}
    resume(run, models, optimizers, tokenizer)
    print_plan(run, policy, tokenizer, train=train, heldout=heldout, counts=counts, steps=steps, memory=memory)
    # ---- loop ------------------------------------------------------------------------------------
    steps_per_rollout = args.steps_per_generation * args.num_iterations
    if heldout and run.step == 0:
        log_eval(run, 0, evaluate(policy, sampler, heldout, reward_functions, 0, args, run), steps)
    for step in range(run.step, steps):
        started = time.perf_counter()
        # ---- rollout -----------------------------------------------------------------------------
        index, inner = divmod(step, steps_per_rollout)
        size = args.batch_size * args.steps_per_generation
        prompts = [train[row] for row in order(len(train), args.seed, index * size, size)]
        if inner == 0:
            sampled = rollout(policy, reference, sampler, reward_functions, prompts, index, args, run)
            write_samples(run, step + 1, sampled, tokenizer)
            run.state["rollout"] = to_tensors(sampled)
        sampled = from_tensors(prompts, run.state["rollout"])  # also after a resume in the middle of a rollout
        rollout_seconds = time.perf_counter() - started
        # ---- step --------------------------------------------------------------------------------
        begin = inner % args.steps_per_generation * args.batch_size
        step_groups = sampled[begin : begin + args.batch_size]
        trained = without_truncated(step_groups) if args.mask_truncated_completions else step_groups
        groups = share(run, trained)  # this rank's groups
        num_tokens = count_scored(trained)  # of all ranks, like everything that is counted here
        num_seqs = args.batch_size * args.num_generations  # truncated ones count as sequences, as in TRL
        computed = with_signal(trained, args)
        totals = defaultdict(float)
        for batch in micro_batches(run, share(run, computed), spare=step_groups[0]):
            out = policy(batch, want=["entropy"])
            logprobs = out["logprobs"].detach()
            attached = batch.get("old_logprobs", logprobs)
            if inner == 0:
                batch["old_logprobs"] = logprobs  # the ratio is exactly 1
            elif args.old_logprobs == "sampler":
                batch["old_logprobs"] = batch["sampler_logprobs"]
            loss, metrics = grpo_loss(out["logprobs"], batch, max(1, num_tokens), num_seqs, args)
            (loss * batch["weight"] * run.dp_size).backward()  # a part of a global mean; FSDP2 averages over ranks
            metrics["entropy"] = out["entropy"].detach().sum()
            metrics["sampler_gap"] = (logprobs - batch["sampler_logprobs"]).abs().sum()
            metrics["unequal"] = (logprobs - attached).abs().sum()
            metrics["loss"] = loss.detach()
            for name, value in metrics.items():
                totals[name] += batch["weight"] * value
        sums = dict(zip(totals, all_sum(run, *totals.values())))
        metrics = {"loss": sums.pop("loss"), "num_tokens": num_tokens} | rollout_metrics(step_groups)
        num_computed = max(1, count_scored(computed))
        for name, value in sums.items():
            metrics[name] = value / num_computed  # a mean over the tokens that were computed
        metrics["perf/rollout_seconds"] = rollout_seconds
        unequal = metrics.pop("unequal")
        if inner == 0:
            check_rollout(run, step, metrics | rollout_metrics(sampled), unequal)
        if metrics["no_reward_frac"] == 1:  # no reward says what is better: AdamW passes over what has no gradient
            optimizer.zero_grad(set_to_none=True)
        if inner + 1 == steps_per_rollout:
            del run.state["rollout"]
        # ---- update ------------------------------------------------------------------------------
        for parameter in partial_parameters(policy):  # whole under tensor parallelism: each rank has its heads' part
            dist.all_reduce(local(parameter.grad), group=run.mesh["tp"].get_group())
        metrics["grad_norm"] = clip_grad_norm(run, policy, args.max_grad_norm)
        metrics["lr"] = args.learning_rate * schedule(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = metrics["lr"]
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):  # global: all ranks step, or none
            optimizer.step()
        check_update(run, step, policy, groups, metrics)  # TRAIN001-003
        optimizer.zero_grad(set_to_none=True)
        # ---- log ---------------------------------------------------------------------------------
        log(run, step + 1, metrics | performance(started, groups), steps)
        # ---- eval --------------------------------------------------------------------------------
        if heldout and is_due(step + 1, steps, args.eval_every):
            log_eval(run, step + 1, evaluate(policy, sampler, heldout, reward_functions, step + 1, args, run), steps)
        # ---- save --------------------------------------------------------------------------------
        save_or_stop(run, step + 1, steps, models, optimizers, tokenizer)
    # ---- finish ----------------------------------------------------------------------------------
    finish(run, policy, tokenizer, heldout or train)


if __name__ == "__main__":
    launch(main, args, __file__)
