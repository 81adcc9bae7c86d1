"""
BCO: learn from single completions that are labelled desirable or undesirable, as a binary classifier of their rewards.

Paper   Jung et al. 2024, https://arxiv.org/abs/2404.04656
Loss    L = - log sigmoid( +-[ r(x, y) - delta ] ),   r = beta * [ log pi(y|x) - log ref(y|x) ],   + desirable, - not
        delta: the mean of r over all rows of the run so far, those of the step too; no gradient
        --udm: undesirable rows count w(x) = p(x) / (1 - p(x)) times, p the probability that a prompt like x is a
        desirable row's, by a logistic regression on the means of the starting policy's last hidden states over x, or
        those of --embedding_model
Tokens  completions only; log pi(y|x) is the SUM over the completion's tokens, its end-of-turn token included
Norm    mean over the rows of the optimizer step, over all micro-batches and ranks; delta too
Models  the policy (trained), sharded with FSDP2. The reference is the policy before its first step: its log-probs are
        computed once and kept in ref_logprobs_*.safetensors; no second model is in memory
Data    {prompt, completion, label}, label true or false | {prompt, chosen, rejected}, which become two rows
Parent: methods/kto.py
Delta:
  imports, args: prompt_embeddings, and a model of any kind for them
  Args.method, parse_args: beta and the density ratio, and the preset
  bco_loss, means, forward, evaluate: delta instead of the KL term
  estimate_kl, mismatched, with_one, label_balance, running_mean: no mismatched pairs; a step's rewards, for delta
  attach_reference, main.reference: one completion a row; density ratios
  Embedder, fit_classifier, attach_ratios: which undesirable rows count how much; rows of both labels
  labelled: rows count alike
  main.step: delta
Paper differences
  none known (paper not read: formulas as in TRL up to 1.9, which takes delta of a micro-batch after the other)
Expect  tiny lab, 2 CPU cores: held-out accuracy 0.30 -> 0.98 within a minute (benchmarks/README.md)
Run     torchrun --nproc_per_node=8 methods/experimental/bco.py --model DIR --dataset labelled.jsonl --udm
        python methods/experimental/bco.py                           (no flags: the tiny lab, on any machine)
"""

import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
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
    learning_rate: Annotated[float, arg(aliases=["--lr"])] = 5e-7  # peak (TRL: 5e-7)
    batch_size: int = 8  # rows per optimizer step, all ranks together (TRL: 8)
    beta: float = 0.1  # pull towards the reference: larger stays closer (TRL: 0.1)
    udm: bool = False  # undesirable rows count by the density ratio of their prompts (BCO-UDM)
    embedding_model: str = ""  # folder or hub id of another model for the prompts of --udm; none: the policy
    prompt_sample_size: int = 1024  # prompts of each label from which the density ratio is learnt (TRL: 1024)
    min_density_ratio: float = 0.5  # of a row (TRL: 0.5)
    max_density_ratio: float = 10.0  # of a row (TRL: 10)

    def check(self):
        super().check()
        if self.min_density_ratio > self.max_density_ratio:
            raise InputError("--min_density_ratio must not be above --max_density_ratio.")
        if self.embedding_model and not self.udm:
            raise InputError("--embedding_model: needs --udm.")


def parse_args(argv=None):
    return parse_flags(Args, __doc__, argv, preset="bco", version=VERSION)


args = parse_args() if __name__ == "__main__" else None  # wrong flags end here, before the slow imports

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from common.batches import count_scored, fit, micro_batches, order, seq_sums, share
from common.data import fingerprint, load_rows, problem
from common.experimental.embeddings import prompt_embeddings
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
def bco_loss(seq_logprobs, batch, delta, args):
    """seq_logprobs (S,): summed over each completion, as in the batch ref_logprob; desirable: 1 or 0; delta: a number.
    Returns the SUM of the loss over rows, and metrics as sums over rows; `means` divides."""
    desirable = batch["desirable"]
    rewards = args.beta * (seq_logprobs - batch["ref_logprob"])  # implicit rewards
    undesirable = 1 - desirable
    sign = desirable - undesirable
    loss = -batch["density_ratio"] * F.logsigmoid(sign * (rewards - delta))  # a desirable row's is 1
    metrics = {
        "loss": loss,
        "desirable": desirable,
        "reward_chosen": rewards * desirable,
        "chosen_logprob": seq_logprobs * desirable,
        "reward_rejected": rewards * undesirable,
        "rejected_logprob": seq_logprobs * undesirable,
    }
    return loss.sum(), {name: value.detach().sum() for name, value in metrics.items()}


def means(totals, delta, num_rows, run):
    """Return metrics over the rows of all ranks, from this rank's sums. What is of one label is a mean over the rows
    with that label, or NaN (null in metrics.jsonl) where there are none."""
    sums = dict(zip(totals, all_sum(run, *totals.values())))
    metrics = {"loss": sums.pop("loss") / num_rows, "delta": delta}
    num_desirable = sums.pop("desirable")
    for name, value in sums.items():
        count = num_rows - num_desirable if "rejected" in name else num_desirable
        metrics[name] = value / count if count else math.nan
    metrics["reward_margin"] = metrics["reward_chosen"] - metrics["reward_rejected"]
    return metrics


@torch.no_grad()
def running_mean(policy, groups, step, args, run):
    """Return the mean of the rewards of all rows of the run so far, those of this step included, and keep it."""
    total = 0.0
    for batch in micro_batches(run, share(run, groups), spare=groups[0]):
        seq_logprobs = seq_sums(policy(batch)["logprobs"], batch)
        total += batch["weight"] * (seq_logprobs - batch["ref_logprob"]).sum()
    (total,) = all_sum(run, total)
    delta = run.state.get("delta", 0.0)  # the mean over all steps before, which had as many rows
    delta += (args.beta * total / len(groups) - delta) / (step + 1)
    run.state["delta"] = delta
    return delta


def forward(policy, batch, delta, args, want=()):
    """Return the policy's outputs for a micro-batch of rows, and bco_loss of them."""
    out = policy(batch, want)
    seq_logprobs = seq_sums(out["logprobs"], batch)
    return out, *bco_loss(seq_logprobs, batch, delta, args)


@torch.no_grad()
def attach_reference(policy, groups, name, args, run):
    """Set every completion["ref_logprob"] to its log pi_ref, that of the untrained policy. A file of the run keeps
    them: a resumed run need not compute again what is there."""
    values = torch.zeros(len(groups), 1, dtype=torch.float64, device=run.device)
    for part in uncached(run, policy, groups, name, values, args.max_length):
        for batch in micro_batches(run, share(run, part), spare=part[0]):
            seq_logprobs = seq_sums(policy(batch)["logprobs"], batch)
            numbers = [group["number"] for group in batch["groups"]]
            values[numbers] += batch["weight"] * seq_logprobs.view(-1, 1)
    for group, pair in zip(groups, values.tolist()):
        for completion, value in zip(group["completions"], pair):
            completion["ref_logprob"] = value


class Embedder(torch.nn.Module):
    """--embedding_model, any encoder or decoder of transformers, called as `prompt_embeddings` calls a policy. It is
    whole on every rank and reads one prompt at a time. A tokenizer without files knows special tokens only."""

    auto_class, head_config, new = AutoModel, {}, frozenset()

    def __init__(self, tokenizer, args):
        super().__init__()
        self.tokenizer = tokenizer
        self.reader, self.lm = load_model(AutoModel, replace(args, chat_template=""), flag="embedding_model")
        if self.lm.config.is_encoder_decoder or len(self.reader) == len(self.reader.all_special_tokens):
            raise InputError(f"--embedding_model {args.embedding_model}: is no encoder or decoder with a tokenizer.")

    def forward(self, batch, want):
        """Return (M, D): for every token of a prompt the mean of the last hidden states over the prompt's text, which
        is in the policy's chat template, cut at the most that the model reads, and without further control tokens."""
        means = []
        for ids in batch["input_ids"].split(batch["cu_seqlens_q"].diff().tolist()):
            # The last id is only predicted.
            own_ids = self.reader.encode(self.tokenizer.decode(ids[:-1]), add_special_tokens=False, truncation=True)
            hidden = self.lm(ids.new_tensor([own_ids])).last_hidden_state
            means.append(hidden.mean(1).expand(len(ids) - 1, -1))
        return {"hidden": torch.cat(means)}


def fit_classifier(desirable, undesirable):
    """desirable, undesirable (rows, D + 1): embeddings. Returns the weights (D + 1,) of a logistic regression in which
    both labels count as half of the rows, with half the squared norm of all weights but the last added to its loss."""
    half = (len(desirable) + len(undesirable)) / 2
    weights = torch.zeros(desirable.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=1000, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        fit_to_labels = F.logsigmoid(desirable @ weights).mean() + F.logsigmoid(-(undesirable @ weights)).mean()
        loss = weights[:-1].square().sum() / 2 - half * fit_to_labels
        loss.backward()
        return loss

    solver.step(closure)
    return weights.detach()


def attach_ratios(policy, tokenizer, train, heldout, args, run):
    """With --udm, set the completion["density_ratio"] of undesirable rows to e to the log-odds of their prompts. Return
    a line for the plan."""
    desirable = [group for group in train if group["label"]]
    undesirable = [group for group in train if not group["label"]]
    if not desirable or not undesirable:
        raise InputError(f"--dataset {args.dataset}: all rows have one label. Give rows of both.")
    if args.udm:
        embedder = policy
        if args.embedding_model:
            embedder = load_weights(run, Embedder(tokenizer, args), flag="embedding_model")
        embeddings = []
        for rows in desirable, undesirable:
            places = order(len(rows), args.seed, 0, min(len(rows), args.prompt_sample_size))
            embeddings.append(prompt_embeddings(run, embedder, [rows[place] for place in places]))
        weights = fit_classifier(*embeddings)
        undesirable += [group for group in heldout if not group["label"]]
        for start in range(0, len(undesirable), 1024):  # embeddings take more memory than rows
            part = undesirable[start : start + 1024]
            ratios = (prompt_embeddings(run, embedder, part) @ weights).exp()  # p / (1 - p)
            for group, ratio in zip(part, ratios.clamp(args.min_density_ratio, args.max_density_ratio).tolist()):
                group["completions"][0]["density_ratio"] = ratio
    return f"labels    {len(desirable)} of {len(train)} are true"


@torch.no_grad()
def evaluate(policy, heldout, args, run):
    """Return held-out means over rows of bco_loss's metrics, and accuracy: the share of desirable completions whose
    every token is the arg-max, which is what greedy decoding would have written."""
    delta = run.state.get("delta", 0.0)
    totals = defaultdict(float)
    for batch in micro_batches(run, share(run, heldout), spare=heldout[0]):
        out, _, metrics = forward(policy, batch, delta, args, want=["correct"])
        wrong = seq_sums((~out["correct"]).float(), batch)
        right = (wrong == 0).float()
        metrics["accuracy"] = (right * batch["desirable"]).sum()
        for name, value in metrics.items():
            totals[name] += batch["weight"] * value
    metrics = means(totals, delta, len(heldout), run)
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
    completion["density_ratio"] = 1.0  # how much the row counts, see attach_ratios
    return group | {"completions": [completion], "label": label}


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
    balance = attach_ratios(policy, tokenizer, train, heldout, args, run)
    used = set(order(len(train), args.seed, 0, min(len(train), steps * args.batch_size)))
    groups_by_name = {"train": [train[row] for row in sorted(used)], "heldout": heldout}
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
        rows = order(len(train), args.seed, step * args.batch_size, args.batch_size)
        step_rows = [train[row] for row in rows]
        delta = running_mean(policy, step_rows, step, args, run)  # a pass of its own: all gradients need it
        groups = share(run, step_rows)  # this rank's rows, balanced by tokens
        (num_tokens,) = all_sum(run, count_scored(groups))
        totals = defaultdict(float)
        for batch in micro_batches(run, groups, spare=groups[0]):
            _, loss, metrics = forward(policy, batch, delta, args)
            loss = loss * batch["weight"] * run.dp_size / args.batch_size  # the mean over the rows of all ranks:
            loss.backward()  # FSDP2 averages gradients over ranks, hence dp_size
            for name, value in metrics.items():
                totals[name] += batch["weight"] * value
        metrics = means(totals, delta, args.batch_size, run)
        metrics["num_tokens"] = num_tokens
        if step == 0:
            check(
                run, "PREF001", step=0, metric="mean reward", value=abs(delta), error=args.beta / 5,  # 0.2 nats
                message="the reference is not the starting policy: the first rewards must be 0",
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
