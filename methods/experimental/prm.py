"""
PRM: a process reward model, which says of every step of a solution whether it is right.

Paper   Uesato et al. 2022, https://arxiv.org/abs/2211.14275 (not read for this script; the form is TRL's, up to 1.9)
Loss    L = - sum_k log p(label of step k | prompt, steps 1 to k) / num_tokens, with two labels: 1 right, 0 wrong
        p(1 | ...) = sigmoid(z_1 - z_0) of the two logits z of a token classifier: the cross-entropy of two classes
Tokens  the last token of the separator behind each step, where the classifier has seen the step; no end-of-turn token.
        --train_on_last_step_only: that of the last step; evaluation takes all of them nevertheless, as in TRL
Norm    num_tokens: the labelled steps of the optimizer step, over all micro-batches and ranks
Models  the policy is a token classifier with two labels (trained), sharded with FSDP2. From a language model it takes
        all but the head, which starts at random; a process reward model goes on as it is
Data    {prompt, completions, labels}: a prompt, the list of its steps, which are text, and a list of true or false
Parent: methods/sft.py
Delta:
  imports, args: another model, and its data
  Args.method, parse_args: what a separator is, and which steps count
  prm_loss, evaluate: right or wrong, not the next token
  load_groups, step_labels: rows of steps with labels
  main.setup, main.data, main.model, main.step, main.finish: a classifier of tokens; the separator is saved with it
Paper differences
  prompt, steps and separators are encoded apart, as in TRL. BOS is there where the tokenizer writes it (TRL: wherever
  there is one), and rows beyond max_length are dropped (TRL: cut); a prompt may be messages, for the chat template
  online scripts take the folder as --reward: the least p(1) over a completion's steps; FOLDER:mean: the mean
Expect  tiny lab, 2 CPU cores: accuracy over held-out steps 0.43 -> 0.99 in a minute or two; 0.785 of them are right
Run     torchrun --nproc_per_node=8 methods/experimental/prm.py --model DIR --dataset steps.jsonl
        python methods/experimental/prm.py                           (no flags: the tiny lab, on any machine)
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
    learning_rate: Annotated[float, arg(aliases=["--lr"])] = 1e-5  # peak (TRL: 1e-5)
    batch_size: int = 8  # rows per optimizer step, all ranks together (TRL: 8)
    step_separator: str = "\n"  # text behind each step, \n for a new line (TRL: a new line)
    train_on_last_step_only: bool = False  # the other steps' labels are not trained on (TRL: no)


def parse_args(argv=None):
    return parse_flags(Args, __doc__, argv, preset="prm", version=VERSION)


args = parse_args() if __name__ == "__main__" else None  # wrong flags end here, before the slow imports

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoModelForTokenClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from common.batches import count_scored, fit, micro_batches, order, share
from common.data import fingerprint, load_rows, problem
from common.runtime.checkpoint import check_resume, finish, resume, save_or_stop
from common.runtime.encoding import encode_rows
from common.runtime.health import check_data, check_update
from common.runtime.launch import launch
from common.runtime.model import check_model, fit_memory, load_model, load_weights, longest
from common.runtime.parallel import all_sum, clip_grad_norm, local, param_groups, partial_parameters, tensor_parallel
from common.runtime.run import is_due, log, log_eval, performance, print_plan, schedule
from common.step_rewards import StepScorer, encode_steps, separator_ids
from common.tokenization import stop_ids


# ---- loss ----------------------------------------------------------------------------------------
def prm_loss(step_logits, is_right):
    """step_logits (M,): z_1 - z_0 behind each labelled step; is_right (M,): 1.0 or 0.0. Returns the SUM of the steps'
    losses, and metrics as sums over steps; main divides by their number."""
    for_label = torch.where(is_right > 0, step_logits, -step_logits)  # log-odds of the label that the step has
    loss = -F.logsigmoid(for_label)  # ln 2 where the model cannot tell
    metrics = {"loss": loss, "accuracy": (for_label > 0).float(), "right_frac": is_right}
    return loss.sum(), {name: value.detach().sum() for name, value in metrics.items()}


@torch.no_grad()
def evaluate(policy, heldout, args, run):
    """Return held-out means over steps of prm_loss's metrics. accuracy: the share of steps whose own label is the
    likelier one; right_frac: the share whose label is right, to compare it with."""
    totals = defaultdict(float)
    for batch in micro_batches(run, share(run, heldout), spare=heldout[0]):
        _, metrics = prm_loss(policy(batch)["step_logits"], batch["is_right"])
        for name, value in metrics.items():
            totals[name] += batch["weight"] * value
    sums = all_sum(run, *totals.values())
    (num_steps,) = all_sum(run, count_scored(share(run, heldout)))
    return {f"eval/{name}": value / num_steps for name, value in zip(totals, sums)}


# ---- data ----------------------------------------------------------------------------------------
def load_groups(name, tokenizer, stops, args, run, last_step_only=False):
    """Return the rows of a dataset as groups of one completion, each with is_right, a number for every step that is
    scored; counts of what was dropped, and the rows' fingerprint."""
    rows = load_rows(name, args, tiny="steps")
    separator = separator_ids(tokenizer, args.step_separator.replace("\\n", "\n"))
    groups = encode_rows(run, rows, encode_steps, tokenizer, stops, separator=separator)
    for group in groups:
        (completion,) = group["completions"]
        labels = step_labels(rows[group["row"]])
        if last_step_only:
            earlier = len(completion["ids"]) - 1
            completion["scored"] = [False] * earlier + [True]
            labels = labels[-1:]
        completion["is_right"] = torch.tensor(labels)
        group["cut"] = True  # it ends in a separator, not in a stop token: nothing is sampled from a classifier
    groups, counts = fit(groups, rows, args.max_length, args.overlong)
    return groups, counts, fingerprint(rows)


def step_labels(row):
    """Return the labels of a row's steps as numbers, 1.0 for right and 0.0 for wrong."""
    labels = row.get("labels")
    if not isinstance(labels, list) or any(label not in (0, 1) for label in labels):  # true and false are 1 and 0
        raise problem(row, "column labels is no list of true and false", labels, "Write one for each step, or --rename")
    steps = row.get("completions")
    if len(labels) != len(steps):
        raise problem(row, f"{len(labels)} labels for {len(steps)} steps", labels, "Write one label for each step")
    return [float(label) for label in labels]


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
    tokenizer, lm = load_model(AutoModelForTokenClassification, args, **StepScorer.head_config)  # on the meta device
    stops = stop_ids(tokenizer, lm.generation_config)
    # ---- data ------------------------------------------------------------------------------------
    train, counts, run.data = load_groups(
        args.dataset, tokenizer, stops, args, run, last_step_only=args.train_on_last_step_only
    )
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
    lm.config.step_separator = args.step_separator.replace("\\n", "\n")  # whoever asks the model must part steps by it
    policy = load_weights(run, shard(StepScorer(lm), run))  # every rank reads its own slices of the files
    check_model(run, policy, tokenizer, train + heldout)  # MODEL001: the same logits as the model's own forward
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
        groups = share(run, [train[row] for row in rows])  # this rank's rows, balanced by tokens
        (num_tokens,) = all_sum(run, count_scored(groups))
        totals = defaultdict(float)
        for batch in micro_batches(run, groups, spare=groups[0]):
            loss, metrics = prm_loss(policy(batch)["step_logits"], batch["is_right"])
            loss = batch["weight"] * loss / num_tokens
            (loss * run.dp_size).backward()  # this rank's part of a global mean, and FSDP2 averages over ranks
            for name, value in metrics.items():
                totals[name] += batch["weight"] * value
        sums = all_sum(run, *totals.values())
        metrics = {name: value / num_tokens for name, value in zip(totals, sums)}
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
