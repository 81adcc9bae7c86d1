"""
RAFT: sample several completions per prompt, keep the best by reward, and learn to write what was kept, as in SFT.

Paper   Dong et al. 2023, https://arxiv.org/abs/2304.06767, algorithm 1. Best of N: Nakano et al. 2021,
        https://arxiv.org/abs/2112.09332. Neither was read for this script
Loss    L = - sum_t log pi(y_t | y_<t) / num_tokens, over the kept completions y
        kept are the num_remains best of each prompt, of equal ones the first; or with --reward_bar all at or above it
Tokens  every token of a kept completion, the stop token included
Norm    num_tokens: the tokens of the kept completions of the optimizer step, over all micro-batches and ranks
Models  the policy (trained), sharded with FSDP2; an unsharded copy that samples
Data    {prompt, any columns}: the columns go to the reward functions
Parent: methods/grpo.py
Delta:
  Args.method, parse_args: what is kept; no ratios, no KL
  compute_advantages, keep_best: 1 for what is kept, else 0
  surrogate, importance_ratio, sampler_weight, kl_estimate, token_weight, raft_loss: the log-likelihood alone
  best_of, count_best, show_best, main.finish: the table of reward against N
  without_truncated, with_signal, kept_only: what is learned from
  rollout, check_rollout, imports, args, main.model, main.rollout: no reference and no old policy
  main.step, main.update: a step of which nothing is kept is skipped
Paper differences
  the best are those of each prompt, never of a whole batch of prompts; steps_per_generation and num_iterations say how
  long a round of sampling is learned from
  log pi is at --temperature, as in methods/grpo.py, on both sides: at 1, the default, it is methods/sft.py's
  a prompt of which no completion has a reward or reaches the bar counts in empty_frac; RAFT001: a step of such alone
  at the end: mean reward of the best of 1, 2, 4, ... completions over all rollouts, each prompt's by the unbiased
  estimate from its num_generations. With --learning_rate 0 these are all of one policy: best-of-N without training
Expect  tiny lab, 2 CPU cores: held-out greedy accuracy 0.30 -> 1.00 in a minute or two, at 1.00 by step 5
Run     python methods/experimental/raft.py --num_generations 16 --reward_bar 1
        python methods/experimental/raft.py --learning_rate 0                     (best of N, without training)
"""

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
    learning_rate: Annotated[float, arg(aliases=["--lr"])] = 2e-5  # peak (TRL: 2e-5 in its SFT); 0: only sample
    batch_size: int = 8  # prompts per optimizer step, all ranks together
    num_generations: Annotated[int, arg(aliases=["--group-size"])] = 8  # completions per prompt (TRL: 8; its RLOO: 2)
    max_completion_length: Annotated[int, arg(aliases=["--max-new-tokens"])] = 512  # tokens (TRL: 512)
    temperature: float = 1.0  # divides logits: of the sampler, the policy and the reference
    steps_per_generation: int = 1  # a rollout covers the prompts of so many optimizer steps
    num_iterations: int = 1  # passes over a rollout (mu in the paper)
    num_remains: int = 1  # best completions of each prompt that are learned from
    reward_bar: float | None = None  # instead: all completions whose reward is at least this
    mask_truncated_completions: bool = False  # completions without a stop token are never kept
    reward: tuple[str, ...] = ("accuracy",)  # accuracy, format, math, FILE.py:FUNCTION or reward models; they are added
    reward_weights: tuple[float, ...] = ()  # one per reward (1 each)
    reward_timeout: float = 60.0  # seconds a reward file may take to load, and per rollout; 0: no limit
    reward_memory: float = 8.0  # GB of address space for the process of a reward file; 0: no limit (CUDA needs that)
    eval_samples: int = 4  # completions per held-out prompt for pass@k; 0: greedy only
    engine: Literal["auto", "loop", "continuous"] = "auto"  # of sampling; auto: continuous batching on CUDA, else loop

    def check(self):
        super().check()
        most = 2**20 // (self.batch_size * self.steps_per_generation)
        if not 1 <= self.num_generations <= most or self.temperature <= 0:
            raise InputError("a rollout must be at most a million completions, and --temperature above 0.")
        if self.num_remains > self.num_generations:
            raise InputError(f"--num_remains {self.num_remains}: must be at most --num_generations.")


def parse_args(argv=None):
    return parse_flags(Args, __doc__, argv, preset="raft", version=VERSION)


args = parse_args() if __name__ == "__main__" else None  # wrong flags end here, before the slow imports

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from common.batches import count_scored, fit, micro_batches, order, share
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
from common.runtime.run import is_due, log, log_eval, performance, print_plan, record, say, schedule, show_groups
from common.sampling import Sampler, from_tensors, gather_groups, set_completions, to_tensors
from common.tokenization import encode_prompt, stop_ids


# ---- loss ----------------------------------------------------------------------------------------
def keep_best(rewards, args):
    """rewards (groups, num_generations) of the whole rollout, NaN where there is none, which is never kept. Returns the
    same shape: 1 for a completion that is learned from, else 0."""
    if args.reward_bar is not None:
        return (rewards >= args.reward_bar).double()  # false for NaN
    ranking = rewards.nan_to_num(nan=-math.inf).argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(rewards).scatter(1, ranking[:, : args.num_remains], 1.0)
    return kept * ~rewards.isnan()


def raft_loss(logprobs, num_tokens):
    """logprobs (M,) of the tokens of kept completions, with gradient; num_tokens: of the whole optimizer step, all
    ranks, 0 where nothing is kept. Returns this micro-batch's part of the mean over tokens."""
    if not num_tokens:
        return 0.0 * logprobs.sum()
    return -logprobs.sum() / num_tokens


def best_of(rewards, n):
    """Return the mean, over all choices of n of a prompt's rewards, of the best of them: an estimate without bias of
    the best reward of n new samples. The i-th smallest, i from 0, is the best of comb(i, n - 1) choices."""
    total = 0.0
    for i, reward in enumerate(sorted(rewards)):
        total += math.comb(i, n - 1) * reward
    return total / math.comb(len(rewards), n)


def count_best(state, groups):
    """Add best_of every prompt, for n = 1, 2, 4, ... and all, to the state: {n: [sum, prompts]}. n is a text, which it
    would become in a checkpoint anyway. A prompt with fewer rewards than n is in the other rows only."""
    table = state.setdefault("best_of", {})
    for group in groups:
        size = len(group["completions"])
        rewards = [completion["reward"] for completion in group["completions"] if not math.isnan(completion["reward"])]
        for n in sorted({size, *(2**k for k in range(size.bit_length()))}):
            row = table.setdefault(str(n), [0.0, 0])
            if n <= len(rewards):
                row[0] += best_of(rewards, n)
                row[1] += 1


def show_best(run):
    """Print the table, and write it to run.json as best_of_n."""
    means = {}
    for n, (total, prompts) in run.state["best_of"].items():
        means[n] = total / prompts if prompts else math.nan
        say(run, f"best of {n:<6} mean reward {means[n]:.4f}, of {prompts} prompts")
    if run.rank == 0:
        record(run.out, best_of_n=means)


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
def rollout(policy, sampler, reward_functions, prompts, index, args, run):
    """Complete and judge all prompts of rollout `index`. Returns the groups of ALL ranks, on every rank. Advantages are
    1 for completions that are kept, else 0."""
    refresh(sampler, policy)
    prompts = [group | {"place": place} for place, group in enumerate(prompts)]
    groups = prompts[run.dp_rank :: run.dp_size][run.rank % args.tp_size :: args.tp_size]  # what this rank samples
    sample_and_judge(run, sampler, groups, args.num_generations, reward_functions, place=("train", index))
    groups = gather_groups(prompts, groups, run.mesh["tp"].get_group())  # ranks that share layers score the same rows
    groups = gather_groups(prompts, groups, run.group)
    rewards = reward_table(groups)
    if args.mask_truncated_completions:
        stopped = reward_table(groups, "stopped")
        rewards[stopped == 0] = math.nan
    set_completions(groups, "advantage", keep_best(rewards, args))
    return groups


@torch.no_grad()
def refresh(sampler, policy):
    """Copy the policy's weights into the sampler, in place. full() gathers a sharded tensor (DTensor.full_tensor): a
    collective, so all ranks do it in the same order."""
    weights = own_tensors(policy.lm)
    for name, tensor in own_tensors(sampler.lm).items():
        tensor.copy_(full(weights[name]))


def kept_only(groups):
    """The groups without the completions that are not learned from, and without the groups of which nothing is."""
    remaining = []
    for group in groups:
        completions = [completion for completion in group["completions"] if completion["advantage"] > 0]
        if completions:
            remaining.append(group | {"completions": completions})
    return remaining


def check_rollout(run, step, metrics):
    """GRPO002-004: a rollout that nothing can be learned from, or that the trainer sees with other eyes."""
    if step > 0:
        step += 1  # the first rollout is judged before step 1
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
            sampled = rollout(policy, sampler, reward_functions, prompts, index, args, run)
            write_samples(run, step + 1, sampled, tokenizer)
            count_best(run.state, sampled)
            run.state["rollout"] = to_tensors(sampled)
        sampled = from_tensors(prompts, run.state["rollout"])  # also after a resume in the middle of a rollout
        rollout_seconds = time.perf_counter() - started
        # ---- step --------------------------------------------------------------------------------
        begin = inner % args.steps_per_generation * args.batch_size
        step_groups = sampled[begin : begin + args.batch_size]
        trained = kept_only(step_groups)
        groups = share(run, trained)  # this rank's groups
        num_tokens = count_scored(trained)  # of all ranks, like everything that is counted here
        computed = trained or step_groups  # a sampler that writes nonsense, and earns nothing, must not go unnoticed
        totals = defaultdict(float)
        for batch in micro_batches(run, share(run, computed), spare=step_groups[0]):
            out = policy(batch, want=["entropy"])
            loss = raft_loss(out["logprobs"], num_tokens)
            (loss * batch["weight"] * run.dp_size).backward()  # a part of a global mean; FSDP2 averages over ranks
            sampler_gap = (out["logprobs"].detach() - batch["sampler_logprobs"]).abs().sum()
            metrics = {"loss": loss.detach(), "entropy": out["entropy"].detach().sum(), "sampler_gap": sampler_gap}
            for name, value in metrics.items():
                totals[name] += batch["weight"] * value
        sums = dict(zip(totals, all_sum(run, *totals.values())))
        metrics = {"loss": sums.pop("loss"), "num_tokens": num_tokens} | rollout_metrics(step_groups)
        metrics["kept_reward"] = rollout_metrics(trained)["reward"] if trained else math.nan
        metrics["empty_frac"] = 1 - len(trained) / len(step_groups)
        num_computed = max(1, count_scored(computed))
        for name, value in sums.items():
            metrics[name] = value / num_computed  # a mean over the tokens that were computed
        metrics["perf/rollout_seconds"] = rollout_seconds
        if inner == 0:
            check_rollout(run, step, metrics | rollout_metrics(sampled))
        if inner + 1 == steps_per_rollout:
            del run.state["rollout"]
        check(
            run, "RAFT001", step=step + 1, metric="steps skipped", value=float(not trained), warn=0,
            message="no completion has a reward that is kept: the step is skipped",
        )
        # ---- update ------------------------------------------------------------------------------
        for parameter in partial_parameters(policy):  # whole under tensor parallelism: each rank has its heads' part
            dist.all_reduce(local(parameter.grad), group=run.mesh["tp"].get_group())
        metrics["grad_norm"] = clip_grad_norm(run, policy, args.max_grad_norm)
        metrics["lr"] = args.learning_rate * schedule(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = metrics["lr"]
        if trained:  # else neither the weights nor Adam's moments move
            if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):  # all ranks step, or none
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
    show_best(run)
    finish(run, policy, tokenizer, heldout or train)


if __name__ == "__main__":
    launch(main, args, __file__)
