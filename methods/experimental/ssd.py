"""
SSD: simple self-distillation. A model learns from its own samples, drawn cooler than it is, which nobody judges.

Paper   2026, https://arxiv.org/abs/2604.01193 (not read: by the SSDTrainer that TRL had before 1.16)
Loss    L = - sum_t log student(y_t | y_<t) / num_tokens, over the sampled completions y that are not blank
        y is drawn at --temperature, --top_k and --top_p; the loss is at temperature 1. So each step moves the student
        towards a sharper copy of itself: what it writes now and then at temperature 1 it writes ever less
Tokens  every token of a completion, the stop token included
Norm    num_tokens: the tokens of the step's completions that are not blank, over all micro-batches and ranks
Models  the student (trained), sharded with FSDP2; an unsharded copy that samples
Data    {prompt}. A column answer or solution is for the evaluation only: nothing is verified
Parent: methods/distillation.py
Delta:
  args, Args.method, parse_args: its defaults and preset; no teacher
  forward, teacher_states, ssd_loss, evaluate: the log-likelihood of what was sampled; nothing to diverge from
  load_groups, on_policy: every step samples
  without_blank, sampling_metrics, check_rollout: blank completions count and are not learned from; see below
  load_teacher, whole_head, check_teacher: there are none
  main.setup, main.model, main.loop, main.rollout, main.step, main.update, main.eval: without a teacher; a step
    of blank completions alone is skipped
Paper differences
  not known, as the paper was not read. As TRL's did, every step samples from the student as it is now, not as it was at
  the start. TRL also left out completions of one line with less than ten letters, which may be answers; it took the
  mean over each micro-batch, this script over the step
Expect  tiny lab: the model is sure of what it writes, right or wrong, and only gets surer. In 15 steps its entropy fell
        from 0.017 to 0.006 nats a token, and held-out greedy accuracy stayed at 0.30
Run     python methods/experimental/ssd.py --temperature 0.6 --top_k 20 --top_p 0.95
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
    learning_rate: Annotated[float, arg(aliases=["--lr"])] = 5e-6  # peak (TRL: 5e-6 in its recipe, else 5e-5)
    batch_size: int = 8  # prompts per optimizer step, all ranks together
    num_generations: Annotated[int, arg(aliases=["--group-size"])] = 1  # completions per prompt (TRL: 1)
    max_completion_length: Annotated[int, arg(aliases=["--max-new-tokens"])] = 512  # tokens (TRL: 512)
    temperature: float = 0.6  # divides logits of the sampler, not of the loss (TRL: 0.6 in its recipe)
    top_k: int = 20  # the sampler draws from so many of the likeliest tokens; 0: from all (TRL: 20)
    top_p: float = 0.95  # and of these from the fewest that hold this share of the probability (TRL: 0.95)
    engine: Literal["auto", "loop", "continuous"] = "auto"  # of sampling; auto: continuous batching on CUDA, else loop

    # Not flags: what judges held-out completions, of rows that have an answer. Nothing is learned from it.
    reward = ("accuracy",)
    reward_weights = ()

    def check(self):
        super().check()
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise InputError("--temperature must be above 0, and --top_p above 0 and at most 1.")
        if self.batch_size * self.num_generations > 2**20:
            raise InputError("--num_generations: a step must be at most a million completions.")


def parse_args(argv=None):
    return parse_flags(Args, __doc__, argv, preset="ssd", version=VERSION)


args = parse_args() if __name__ == "__main__" else None  # wrong flags end here, before the slow imports

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from common.batches import count_scored, fit, micro_batches, order, share
from common.data import fingerprint, load_rows, problem
from common.logprobs import Policy
from common.rewards import accuracy, heldout_metrics, sample_and_judge, write_samples
from common.runtime.checkpoint import check_resume, finish, resume, save_or_stop
from common.runtime.encoding import encode_rows
from common.runtime.health import check, check_data, check_update
from common.runtime.launch import launch
from common.runtime.model import check_model, fit_memory, load_model, load_weights, longest, own_tensors
from common.runtime.parallel import all_sum, clip_grad_norm, full, local, param_groups, partial_parameters
from common.runtime.parallel import tensor_parallel
from common.runtime.run import is_due, log, log_eval, performance, print_plan, schedule, show_groups
from common.sampling import Sampler, gather_groups
from common.tokenization import encode_prompt, stop_ids


# ---- loss ----------------------------------------------------------------------------------------
def ssd_loss(logprobs, num_tokens):
    """logprobs (M,) of the tokens of completions that are not blank, with gradient; num_tokens: of the whole optimizer
    step, all ranks, 0 where all are blank. Returns this micro-batch's part of the mean over tokens."""
    if not num_tokens:
        return 0.0 * logprobs.sum()
    return -logprobs.sum() / num_tokens


def evaluate(policy, sampler, heldout, run):
    """Return the accuracy of greedy decoding on held-out rows with an answer (NaN where there are none)."""
    refresh(sampler, policy)
    groups = share(run, [group | {"place": place} for place, group in enumerate(heldout)])
    sample_and_judge(run, sampler, groups, 1, [accuracy], place=("eval",), greedy=True)
    show_groups(run, "greedy", groups[:2], sampler.tokenizer)
    metrics = heldout_metrics(run, groups)
    del metrics["eval/no_reward_frac"]
    return metrics


# ---- data ----------------------------------------------------------------------------------------
def load_groups(name, tokenizer, stops, args, run):
    """Return the rows of a dataset as groups without completions yet, counts of what was dropped, and the rows'
    fingerprint."""
    rows = load_rows(name, args, tiny="prompts")
    groups = encode_rows(run, rows, encode_prompt, tokenizer, stops)
    for group in groups:
        group["columns"] = rows[group["row"]]
        if not group["prompt"]:
            raise problem(rows[group["row"]], "no token in column prompt", "", "Write a prompt, or --rename old:prompt")
    overlong = args.overlong.replace("truncate_prompt", "drop")  # a prompt is never cut
    groups, counts = fit(groups, rows, args.max_length, overlong, room=args.max_completion_length)
    return groups, counts, fingerprint(rows)


# ---- rollout -------------------------------------------------------------------------------------
def rollout(sampler, prompts, copies, place, args, run):
    """Complete all prompts. Returns the groups of ALL ranks, on every rank."""
    prompts = [group | {"place": number} for number, group in enumerate(prompts)]
    groups = prompts[run.dp_rank :: run.dp_size][run.rank % args.tp_size :: args.tp_size]  # what this rank samples
    sample_and_judge(run, sampler, groups, copies, [], place)
    return gather_groups(prompts, groups, run.group)


@torch.no_grad()
def refresh(sampler, policy):
    """Copy the policy's weights into the sampler, in place. full() gathers a sharded tensor (DTensor.full_tensor): a
    collective, so all ranks do it in the same order."""
    weights = own_tensors(policy.lm)
    for name, tensor in own_tensors(sampler.lm).items():
        tensor.copy_(full(weights[name]))


def without_blank(groups, tokenizer):
    """Return the groups without the completions that hold nothing but special tokens and spaces, and without the groups
    of which nothing is left."""
    remaining = []
    for group in groups:
        completions = []
        for completion in group["completions"]:
            if tokenizer.decode(completion["ids"], skip_special_tokens=True).strip():
                completions.append(completion)
        if completions:
            remaining.append(group | {"completions": completions})
    return remaining


def sampling_metrics(groups, trained):
    """Return, of all completions, the share without a stop token, the mean length, and the share of blank ones."""
    completions = [completion for group in groups for completion in group["completions"]]
    num_trained = sum(len(group["completions"]) for group in trained)
    return {
        "truncated_frac": sum(not c["stopped"] for c in completions) / len(completions),
        "completion_len": sum(len(c["ids"]) for c in completions) / len(completions),
        "blank_frac": 1 - num_trained / len(completions),
    }


def check_rollout(run, step, metrics):
    """GRPO002, GRPO004, SSD001: completions that were cut, a sampler that is not the student, blank completions."""
    if step > 0:
        step += 1  # the first rollout is judged before step 1
    length = run.args.max_completion_length
    check(
        run, "GRPO002", step=step, metric="truncated_frac", value=metrics["truncated_frac"], warn=0.5, error=0.95,
        patience=1 if metrics["truncated_frac"] == 1 else 3, message="no stop token",
        fix=("--max_completion_length", length, 2 * length),
    )
    entropy = max(metrics["entropy"], 1e-3)  # rounding moves the log-probs of a confident model less
    if run.args.temperature == 1:  # the sampler's log-probs are those at its temperature, the trainer's at 1
        check(
            run, "GRPO004", step=step, metric="sampler_gap / entropy", value=metrics["sampler_gap"] / entropy,
            warn=0.025, error=0.2, message="sampler and trainer disagree on the same tokens",
        )
    check(
        run, "SSD001", step=step, metric="blank_frac", value=metrics["blank_frac"], warn=0.5,
        patience=1 if metrics["blank_frac"] == 1 else 3, message="of the completions hold no text: nobody learns them",
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
        steps = math.ceil(args.num_train_epochs * len(train) / args.batch_size)
    # ---- model -----------------------------------------------------------------------------------
    lm.generation_config.eos_token_id = stops  # what training teaches to stop at is what every engine stops at
    sampler = Sampler(run, lm, tokenizer, stops, args.top_k, args.top_p)  # an unsharded copy
    policy = load_weights(run, shard(Policy(lm), run))  # every rank reads its own slices of the files
    check_model(run, policy, tokenizer, train + heldout)  # MODEL001: the same log-probs as the model's own forward
    sampler.start_engine()
    most_tokens = longest(train, args.num_generations * args.max_completion_length)
    memory = fit_memory(run, policy, tokenizer, most_tokens)
    # ---- optimizer -------------------------------------------------------------------------------
    parameters = param_groups(policy, args.weight_decay)  # matrices decay; norms and biases do not
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=betas, eps=1e-8, fused=True)
    # ---- resume ----------------------------------------------------------------------------------
    models, optimizers = {"policy": policy}, {"policy": optimizer}
    resume(run, models, optimizers, tokenizer)
    print_plan(run, policy, tokenizer, train=train, heldout=heldout, counts=counts, steps=steps, memory=memory)
    # ---- loop ------------------------------------------------------------------------------------
    if heldout and run.step == 0:
        log_eval(run, 0, evaluate(policy, sampler, heldout, run), steps)
    for step in range(run.step, steps):
        started = time.perf_counter()
        # ---- rollout -----------------------------------------------------------------------------
        rows = order(len(train), args.seed, step * args.batch_size, args.batch_size)
        refresh(sampler, policy)
        prompts = [train[row] for row in rows]
        step_groups = rollout(sampler, prompts, args.num_generations, ("train", step), args, run)  # of all ranks
        write_samples(run, step + 1, step_groups, tokenizer)
        rollout_seconds = time.perf_counter() - started
        # ---- step --------------------------------------------------------------------------------
        trained = without_blank(step_groups, tokenizer)
        groups = share(run, trained)  # this rank's groups
        num_tokens = count_scored(trained)  # of all ranks
        computed = trained or step_groups  # forwards are collectives, and entropy is of interest then, too
        totals = defaultdict(float)
        for batch in micro_batches(run, share(run, computed), spare=step_groups[0]):
            out = policy(batch, want=["entropy"])
            loss = batch["weight"] * ssd_loss(out["logprobs"], num_tokens)
            (loss * run.dp_size).backward()  # a part of a global mean; FSDP2 averages over ranks
            totals["loss"] += loss.detach()
            totals["entropy"] += batch["weight"] * out["entropy"].detach().sum()
            gap = (out["logprobs"].detach() - batch["sampler_logprobs"]).abs()
            totals["sampler_gap"] += batch["weight"] * gap.sum()
        sums = dict(zip(totals, all_sum(run, *totals.values())))
        metrics = {"loss": sums["loss"], "num_tokens": num_tokens} | sampling_metrics(step_groups, trained)
        num_computed = count_scored(computed)
        metrics["entropy"] = sums["entropy"] / num_computed
        metrics["sampler_gap"] = sums["sampler_gap"] / num_computed
        metrics["perf/rollout_seconds"] = rollout_seconds
        check_rollout(run, step, metrics)
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
            log_eval(run, step + 1, evaluate(policy, sampler, heldout, run), steps)
        # ---- save --------------------------------------------------------------------------------
        save_or_stop(run, step + 1, steps, models, optimizers, tokenizer)
    # ---- finish ----------------------------------------------------------------------------------
    finish(run, policy, tokenizer, heldout or train)


if __name__ == "__main__":
    launch(main, args, __file__)
