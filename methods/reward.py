"""
Reward model: give completions a number so that the chosen one of a pair gets the larger (Bradley and Terry 1952).

Paper   Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 1. Margin: Touvron et al. 2023 (Llama 2),
        https://arxiv.org/abs/2307.09288, equation 2. Centering: Eisenstein et al. 2023,
        https://arxiv.org/abs/2312.09244
Loss    L = - log sigmoid( r(x, y_w) - r(x, y_l) - margin ) + center_rewards_coefficient * [ r(x, y_w) + r(x, y_l) ]^2
Tokens  r(x, y) is the score head on the hidden state of the last token of prompt + completion: its end-of-turn token
Norm    mean over the pairs of the optimizer step, over all micro-batches and ranks
Models  the policy is a sequence classifier with one label (trained), sharded with FSDP2. From a language model it takes
        all but the head, which starts at random; a reward model goes on as it is
Data    {prompt, chosen, rejected} | {chosen, rejected} that begin alike; a column margin may be with them (else 0)
Parent: none
Paper differences
  a step takes pairs; Ouyang et al. take all pairs of a prompt's ranking together. Their prompts are shared here too
Expect  tiny lab, 2 CPU cores: held-out pair accuracy 0.5 -> 0.99 within a minute (benchmarks/README.md)
Run     torchrun --nproc_per_node=8 methods/reward.py --model DIR --dataset pairs.jsonl
        python methods/reward.py                                     (no flags: the tiny lab, on any machine)
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
from common.runtime.flags import RunFlags, parse_flags


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
    learning_rate: Annotated[float, arg(aliases=["--lr"])] = 1e-4  # peak (TRL: 1e-4)
    batch_size: int = 8  # pairs per optimizer step, all ranks together (TRL: 8)
    center_rewards_coefficient: float = 0.0  # pulls the rewards' mean to 0 (TRL: none, 0.01 in recipes)


def parse_args(argv=None):
    return parse_flags(Args, __doc__, argv, preset="reward", version=VERSION)


args = parse_args() if __name__ == "__main__" else None  # wrong flags end here, before the slow imports

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoModelForSequenceClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from common.batches import count_scored, fit, micro_batches, order, share
from common.data import fingerprint, load_rows, problem
from common.logprobs import Scorer
from common.runtime.checkpoint import check_resume, finish, resume, save_or_stop
from common.runtime.encoding import encode_rows
from common.runtime.health import check_data, check_update
from common.runtime.launch import launch
from common.runtime.model import check_model, fit_memory, load_model, load_weights, longest
from common.runtime.parallel import all_sum, clip_grad_norm, local, param_groups, partial_parameters, tensor_parallel
from common.runtime.run import is_due, log, log_eval, performance, print_plan, schedule
from common.tokenization import encode_preference, stop_ids


# ---- loss ----------------------------------------------------------------------------------------
def reward_loss(rewards, margins, args):
    """rewards (S,): chosen and rejected in turn; margins (S / 2,). Returns the SUM of the loss over pairs, and metrics
    as sums over pairs; main divides by their number."""
    chosen, rejected = rewards.view(-1, 2).unbind(1)
    loss = -F.logsigmoid(chosen - rejected - margins)  # ln 2 where both are equal and there is no margin
    loss = loss + args.center_rewards_coefficient * (chosen + rejected) ** 2
    metrics = {
        "loss": loss,
        "accuracy": (chosen > rejected).float(),
        "reward_margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
    return loss.sum(), {name: value.detach().sum() for name, value in metrics.items()}


def forward(policy, batch, rewards, args):
    """Return reward_loss of a micro-batch of numbered pairs, and write its rewards to the rows of the table `rewards`
    (pairs, 2) that their numbers name."""
    scores = policy(batch)["rewards"]
    numbers = [group["number"] for group in batch["groups"]]
    rewards[numbers] += batch["weight"] * scores.detach().view(-1, 2)
    margins = batch["margin"][::2]  # both completions of a pair have it
    return reward_loss(scores, margins, args)


def numbered(groups):
    """Return the groups with their places among the pairs of all ranks, which say where `forward` puts rewards."""
    return [group | {"number": number} for number, group in enumerate(groups)]


def spread(rewards):
    """Return mean, standard deviation, least and largest of a list: the rewards of all completions of a step."""
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards) / len(rewards)
    return {
        "reward_mean": mean,
        "reward_std": math.sqrt(variance),
        "reward_min": min(rewards),
        "reward_max": max(rewards),
    }


@torch.no_grad()
def evaluate(policy, heldout, args, run):
    """Return held-out means over pairs of reward_loss's metrics (accuracy: the chosen completion has the larger
    reward), and the spread of all rewards."""
    pairs = numbered(heldout)
    rewards = torch.zeros(len(pairs), 2, device=run.device)
    totals = defaultdict(float)
    for batch in micro_batches(run, share(run, pairs), spare=pairs[0]):
        _, metrics = forward(policy, batch, rewards, args)
        for name, value in metrics.items():
            totals[name] += batch["weight"] * value
    sums = all_sum(run, *totals.values())
    metrics = {name: value / len(pairs) for name, value in zip(totals, sums)}
    all_rewards = all_sum(run, *rewards.flatten())
    metrics |= spread(all_rewards)
    return {f"eval/{name}": value for name, value in metrics.items()}


# ---- data ----------------------------------------------------------------------------------------
def load_groups(name, tokenizer, stops, args, run):
    """Return the rows of a dataset as groups of a chosen and a rejected completion, each with the pair's margin, counts
    of what was dropped, and the rows' fingerprint."""
    rows = load_rows(name, args, tiny="pairs")
    groups = encode_rows(run, rows, encode_preference, tokenizer, stops)
    for group in groups:
        row = rows[group["row"]]
        margin = row.get("margin", 0.0)
        is_number = type(margin) in (int, float)  # neither text nor true
        if not is_number or not abs(margin) < 1e6:
            raise problem(row, "margin is not a number below 1e6", margin, "Write numbers, or --rename margin:other")
        for completion in group["completions"]:
            completion["margin"] = float(margin)
    groups, counts = fit(groups, rows, args.max_length, args.overlong)
    return groups, counts, fingerprint(rows)


def choose_padding(tokenizer, lm, stops):
    """Set a padding token for whoever will use the model. A classifier reads the last token that is not padding, so it
    must be none that a completion ends in: the tokenizer's, another added one, or the last of the vocabulary. Padding
    goes to the right, where every position is what it was in training."""
    candidates = [tokenizer.pad_token_id, *tokenizer.added_tokens_decoder, *range(len(tokenizer) - 1, 0, -1)]
    padding = next(token for token in candidates if token not in (None, *stops))
    tokenizer.pad_token_id = padding
    tokenizer.padding_side = "right"
    lm.config.get_text_config().pad_token_id = padding


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
    tokenizer, lm = load_model(AutoModelForSequenceClassification, args, **Scorer.head_config)  # on the meta device
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
    choose_padding(tokenizer, lm, stops)
    policy = load_weights(run, shard(Scorer(lm), run))  # every rank reads its own slices of the files
    check_model(run, policy, tokenizer, train + heldout)  # MODEL001: the same rewards as the model's own forward
    memory = fit_memory(run, policy, tokenizer, longest(train))
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
        log_eval(run, 0, evaluate(policy, heldout, args, run), steps)
    for step in range(run.step, steps):
        started = time.perf_counter()
        # ---- step --------------------------------------------------------------------------------
        rows = order(len(train), args.seed, step * args.batch_size, args.batch_size)
        pairs = numbered([train[row] for row in rows])
        groups = share(run, pairs)  # this rank's pairs, balanced by tokens
        (num_tokens,) = all_sum(run, count_scored(groups))
        rewards = torch.zeros(len(pairs), 2, device=run.device)  # of the pairs of all ranks
        totals = defaultdict(float)
        for batch in micro_batches(run, groups, spare=groups[0]):
            loss, metrics = forward(policy, batch, rewards, args)
            loss = loss * batch["weight"] * run.dp_size / args.batch_size  # the mean over the pairs of all ranks:
            loss.backward()  # FSDP2 averages gradients over ranks, hence dp_size
            for name, value in metrics.items():
                totals[name] += batch["weight"] * value
        sums = all_sum(run, *totals.values())
        metrics = {name: value / args.batch_size for name, value in zip(totals, sums)}
        all_rewards = all_sum(run, *rewards.flatten())
        metrics |= spread(all_rewards)
        metrics["num_tokens"] = num_tokens
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
            log_eval(run, step + 1, evaluate(policy, heldout, args, run), steps)
        # ---- save --------------------------------------------------------------------------------
        save_or_stop(run, step + 1, steps, models, optimizers, tokenizer)
    # ---- finish ----------------------------------------------------------------------------------
    finish(run, policy, tokenizer, [])  # it completes no prompts


if __name__ == "__main__":
    launch(main, args, __file__)
