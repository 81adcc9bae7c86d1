"""
KTO: learn from single completions that are labelled desirable or undesirable. No pairs, no reward model, no sampling.

Paper   Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equation 8; apo_zero_unpaired: D'Oosterlinck et al.
        2024, https://arxiv.org/abs/2408.06266, equation 7 without pairs
Loss    L = w_y (1 - sigmoid( +-beta [ u(x, y) - kl ] )),   u(x, y) = log pi(y|x) - log ref(y|x),   + desirable, - not
        kl = max(0, mean over the step's rows i of u(x_i, y_j)), j the next row (the last one's: the first); no gradient
Tokens  completions only; log pi(y|x) is the SUM over the completion's tokens, its end-of-turn token included
Norm    mean over the rows of the optimizer step, over all micro-batches and ranks; kl too
Models  the policy (trained), sharded with FSDP2. The reference is the policy before its first step: its log-probs of
        every row and mismatched pair that the run will see are computed once and kept in ref_logprobs_*.safetensors
Data    {prompt, completion, label}, label true or false | {prompt, chosen, rejected}, which become two rows
Parent: none
Paper differences
  none. TRL takes rows in file order and a kl per micro-batch; here rows are shuffled and kl is of the whole step, so
  neither ranks nor micro-batches change it. It costs a forward without gradient per row; apo_zero_unpaired only logs it
Expect  tiny lab, 2 CPU cores: held-out accuracy 0.30 -> 0.95 within a minute (benchmarks/README.md)
Run     torchrun --nproc_per_node=8 methods/kto.py --model DIR --dataset labelled.jsonl --beta 0.1
        python methods/kto.py                                        (no flags: the tiny lab, on any machine)
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
    learning_rate: Annotated[float, arg(aliases=["--lr"])] = 1e-6  # peak (TRL: 1e-6)
    batch_size: int = 8  # rows per optimizer step, all ranks together (TRL: 8), at least 2
    beta: float = 0.1  # pull towards the reference: larger stays closer (TRL: 0.1)
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"  # apo_zero_unpaired: without the kl
    desirable_weight: float = 1.0  # of rows with label true (TRL: 1)
    undesirable_weight: float = 1.0  # of the others; weight x rows of the two kinds should be 1 to 4/3 : 1

    def check(self):
        super().check()
        if self.batch_size < 2:
            raise InputError("--batch_size 1: the KL term compares a step's rows. Raise it to 2 or more.")


def parse_args(argv=None):
    return parse_flags(Args, __doc__, argv, preset="kto", version=VERSION)


args = parse_args() if __name__ == "__main__" else None  # wrong flags end here, before the slow imports

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from common.batches import count_scored, fit, micro_batches, order, seq_sums, share
from common.data import fingerprint, load_rows, problem
from common.logprobs import Policy
from common.runtime.checkpoint import check_resume, finish, resume, save_or_stop, uncached
from common.runtime.encoding import encode_rows
from common.runtime.health import check, check_data, check_update
from common.runtime.launch import launch
from common.runtime.model import check_model, fit_memory, load_model, load_weights, longest
from common.runtime.parallel import all_sum, clip_grad_norm, local, param_groups, partial_parameters, tensor_parallel
from common.runtime.run import is_due, log, log_eval, performance, print_plan, say, schedule
from common.tokenization import encode_labelled, stop_ids


# ---- loss ----------------------------------------------------------------------------------------
def kto_loss(seq_logprobs, ref_logprobs, desirable, kl, args):
    """seq_logprobs, ref_logprobs (S,): summed over each completion; desirable (S,): 1 or 0; kl: a number. Returns the
    SUM of the loss over rows, and metrics as sums over rows; `means` divides."""
    rewards = args.beta * (seq_logprobs - ref_logprobs)  # implicit rewards
    undesirable = 1 - desirable
    weights = args.desirable_weight * desirable + args.undesirable_weight * undesirable
    shifted = rewards  # apo_zero_unpaired holds them against 0
    if args.loss_type == "kto":  # equation 8
        shifted = rewards - args.beta * kl
    sign = desirable - undesirable
    loss = weights * F.sigmoid(-sign * shifted)  # 1 - sigmoid(x) is sigmoid(-x)
    metrics = {
        "loss": loss,
        "desirable": desirable,
        "reward_chosen": rewards * desirable,
        "chosen_logprob": seq_logprobs * desirable,
        "reward_rejected": rewards * undesirable,
        "rejected_logprob": seq_logprobs * undesirable,
    }
    return loss.sum(), {name: value.detach().sum() for name, value in metrics.items()}


def means(totals, kl, num_rows, run):
    """Return metrics over the rows of all ranks, from this rank's sums. What is of one label is a mean over the rows
    with that label, or NaN (null in metrics.jsonl) where there are none."""
    sums = dict(zip(totals, all_sum(run, *totals.values())))
    metrics = {"loss": sums.pop("loss") / num_rows, "kl": kl}
    num_desirable = sums.pop("desirable")
    for name, value in sums.items():
        count = num_rows - num_desirable if "rejected" in name else num_desirable
        metrics[name] = value / count if count else math.nan
    metrics["reward_margin"] = metrics["reward_chosen"] - metrics["reward_rejected"]
    return metrics


def mismatched(rows):
    """Return the rows of a step in their order, each with a second completion after its prompt: the next row's, for the
    last row the first one's. All completions are copies: the reference's log-prob of one depends on the prompt."""
    pairs = []
    for row, following in zip(rows, rows[1:] + rows[:1]):
        completions = [dict(row["completions"][0]), dict(following["completions"][0])]
        pairs.append(row | {"completions": completions})
    return pairs


def with_one(pairs, index):
    """Return mismatched pairs with one of their completions: the row's (0) or the next row's (1)."""
    return [pair | {"completions": [pair["completions"][index]]} for pair in pairs]


@torch.no_grad()
def estimate_kl(policy, pairs, args, run):
    """Return the mean of log pi / ref over the next rows' completions, at least 0 (section 4.1): one number for all
    ranks, without gradient."""
    groups = with_one(pairs, 1)
    total = 0.0
    for batch in micro_batches(run, share(run, groups), spare=groups[0]):
        seq_logprobs = seq_sums(policy(batch)["logprobs"], batch)
        total += batch["weight"] * (seq_logprobs - batch["ref_logprob"]).sum()
    (total,) = all_sum(run, total)
    return max(0.0, total / len(pairs))


def forward(policy, batch, kl, args, want=()):
    """Return the policy's outputs for a micro-batch of rows, and kto_loss of them."""
    out = policy(batch, want)
    seq_logprobs = seq_sums(out["logprobs"], batch)
    return out, *kto_loss(seq_logprobs, batch["ref_logprob"], batch["desirable"], kl, args)


@torch.no_grad()
def attach_reference(policy, groups, name, args, run):
    """Set every completion["ref_logprob"] to its log pi_ref, that of the untrained policy. A file of the run keeps
    them: a resumed run need not compute again what is there."""
    values = torch.zeros(len(groups), 2, dtype=torch.float64, device=run.device)
    for part in uncached(run, policy, groups, name, values, args.max_length):
        for batch in micro_batches(run, share(run, part), spare=part[0]):
            seq_logprobs = seq_sums(policy(batch)["logprobs"], batch)
            numbers = [group["number"] for group in batch["groups"]]
            values[numbers] += batch["weight"] * seq_logprobs.view(-1, 2)
    for group, pair in zip(groups, values.tolist()):
        for completion, value in zip(group["completions"], pair):
            completion["ref_logprob"] = value


@torch.no_grad()
def evaluate(policy, heldout, args, run):
    """Return held-out means over rows of kto_loss's metrics, and accuracy: the share of desirable completions whose
    every token is the arg-max, which is what greedy decoding would have written."""
    kl = estimate_kl(policy, heldout, args, run)
    rows = with_one(heldout, 0)
    totals = defaultdict(float)
    for batch in micro_batches(run, share(run, rows), spare=rows[0]):
        out, _, metrics = forward(policy, batch, kl, args, want=["correct"])
        wrong = seq_sums((~out["correct"]).float(), batch)
        right = (wrong == 0).float()
        metrics["accuracy"] = (right * batch["desirable"]).sum()
        for name, value in metrics.items():
            totals[name] += batch["weight"] * value
    metrics = means(totals, kl, len(heldout), run)
    return {f"eval/{name}": value for name, value in metrics.items()}


# ---- data ----------------------------------------------------------------------------------------
def load_groups(name, tokenizer, stops, args, run):
    """Return the rows of a dataset as groups of one completion and a label, counts of what was dropped, and the rows'
    fingerprint. The label travels with the completion, too: 1 is desirable."""
    rows = load_rows(name, args, tiny="labelled")
    groups = []
    for group in encode_rows(run, rows, encode_labelled, tokenizer, stops):
        if len(group["completions"]) == 2:
            chosen, rejected = group["completions"]
            groups.append(labelled(group, chosen, True))
            groups.append(labelled(group, rejected, False))
        else:
            row = rows[group["row"]]
            if "label" not in row:
                wanted = "wanted columns prompt + completion + label | prompt + chosen + rejected; found"
                raise problem(row, wanted, sorted(row), "Type --rename old:new,old:new")
            label = row.get("label")
            if type(label) is not bool:
                raise problem(row, "label is neither true nor false", label, "Write true or false")
            groups.append(labelled(group, group["completions"][0], label))
    groups, counts = fit(groups, rows, args.max_length, args.overlong)
    return groups, counts, fingerprint(rows)


def labelled(group, completion, label):
    """Return the group with this completion alone. A pair's labels are True for chosen and False for rejected."""
    completion["desirable"] = float(label)
    return group | {"completions": [completion], "label": label}


def label_balance(groups, args):
    """Return a line for the plan that says whether the weights even out the labels as the paper advises (section 4.2):
    weight times rows of the desirable ones should be 1 to 4/3 times that of the others."""
    desirable = sum(group["label"] for group in groups)
    if not 0 < desirable < len(groups):
        raise InputError(f"--dataset {args.dataset}: {desirable} of {len(groups)} labels are true. Give rows of both.")
    least = args.undesirable_weight * (len(groups) - desirable) / desirable
    most = least * 4 / 3
    weight = args.desirable_weight
    place = "inside" if least <= weight <= most else "OUTSIDE"
    advice = f"--desirable_weight {weight:g} is {place} the advised range of {least:.3g} to {most:.3g}"
    return f"labels    {desirable} of {len(groups)} are true; {advice}"


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
    policy = load_weights(run, shard(Policy(lm), run))  # every rank reads its own slices of the files
    check_model(run, policy, tokenizer, train + heldout)  # MODEL001: the same log-probs as the model's own forward
    memory = fit_memory(run, policy, tokenizer, longest(train))
    # ---- optimizer -------------------------------------------------------------------------------
    parameters = param_groups(policy, args.weight_decay)  # matrices decay; norms and biases do not
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=betas, eps=1e-8, fused=True)
    # ---- reference -------------------------------------------------------------------------------
    balance = label_balance(train, args)
    pairs = []  # of all steps, one after another
    for step in range(steps):
        rows = order(len(train), args.seed, step * args.batch_size, args.batch_size)
        pairs += mismatched([train[row] for row in rows])
    heldout = mismatched(heldout)
    groups_by_name = {"train": pairs, "heldout": heldout}
    for name, groups in groups_by_name.items():
        if groups:
            attach_reference(policy, groups, name, args, run)  # before a checkpoint is loaded
    # ---- resume ----------------------------------------------------------------------------------
    models, optimizers = {"policy": policy}, {"policy": optimizer}
    resume(run, models, optimizers, tokenizer)
    print_plan(run, policy, tokenizer, train=train, heldout=heldout, counts=counts, steps=steps, memory=memory)
    say(run, balance)
    # ---- loop ------------------------------------------------------------------------------------
    if heldout and run.step == 0:
        log_eval(run, 0, evaluate(policy, heldout, args, run), steps)
    for step in range(run.step, steps):
        started = time.perf_counter()
        # ---- step --------------------------------------------------------------------------------
        step_pairs = pairs[step * args.batch_size : (step + 1) * args.batch_size]
        kl = estimate_kl(policy, step_pairs, args, run)  # a pass of its own: every row's gradient needs it
        groups = share(run, with_one(step_pairs, 0))  # this rank's rows, balanced by tokens
        (num_tokens,) = all_sum(run, count_scored(groups))
        totals = defaultdict(float)
        for batch in micro_batches(run, groups, spare=groups[0]):
            _, loss, metrics = forward(policy, batch, kl, args)
            loss = loss * batch["weight"] * run.dp_size / args.batch_size  # the mean over the rows of all ranks:
            loss.backward()  # FSDP2 averages gradients over ranks, hence dp_size
            for name, value in metrics.items():
                totals[name] += batch["weight"] * value
        metrics = means(totals, kl, args.batch_size, run)
        metrics["num_tokens"] = num_tokens
        if step == 0:
            weights = [args.desirable_weight if pair["label"] else args.undesirable_weight for pair in step_pairs]
            half = sum(weights) / len(weights) / 2
            check(
                run, "PREF001", step=0, metric="loss - weight / 2", value=abs(metrics["loss"] - half), error=0.01,
                message="the reference is not the starting policy: the first loss must be half the mean weight",
            )
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
    finish(run, policy, tokenizer, heldout or train)


if __name__ == "__main__":
    launch(main, args, __file__)
