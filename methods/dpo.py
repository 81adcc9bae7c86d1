"""
DPO: learn from pairs of a chosen and a rejected completion. No reward model, no sampling.

Paper   Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7; those of the variants stand beside them
Loss    L = - log sigmoid( beta * [ (log pi - log ref)(y_w|x) - (log pi - log ref)(y_l|x) ] )
        or others of pair_loss: --loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1 is their weighted sum (MPO)
Tokens  completions only; log pi(y|x) is the SUM over the completion's tokens, its end-of-turn token included
Norm    mean over the pairs of the optimizer step, over all micro-batches and ranks (TRL: of micro-batches' means). The
        term sft is a mean per token of each chosen completion (Iterative RPO, MPO), not of all the micro-batch's tokens
        (TRL); label_smoothing also smooths sigmoid and sigmoid_norm (cDPO; TRL since 0.29: no more)
Models  the policy (trained), sharded with FSDP2. The reference is the policy before its first step: its log-probs are
        computed once and kept in ref_logprobs_*.safetensors; no second model is in memory
Data    {prompt, chosen, rejected} | {chosen, rejected} that begin alike
Parent: none
Expect  tiny lab, 2 CPU cores: held-out accuracy 0.30 -> 0.97 in a minute or two (benchmarks/README.md)
Run     torchrun --nproc_per_node=8 methods/dpo.py --model DIR --dataset pairs.jsonl --beta 0.1
        python methods/dpo.py                                        (no flags: the tiny lab, on any machine)
"""

import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

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
LossType = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "discopop", "sft",
]
# These see each reward by itself and not only the margin of the pair, so they need log pi / ref as it is.
POINTWISE = {"nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"}
SMOOTHED = {"sigmoid", "sigmoid_norm", "robust", "exo_pair"}  # by --label_smoothing


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
    batch_size: int = 8  # pairs per optimizer step, all ranks together (TRL: 8)
    beta: float = 0.1  # pull towards the reference: larger stays closer (TRL: 0.1)
    loss_type: tuple[LossType, ...] = ("sigmoid",)  # one of pair_loss, or several
    loss_weights: tuple[float, ...] = ()  # one for each loss_type; none: all 1
    label_smoothing: float = 0.0  # share of pairs labelled the wrong way round: sigmoid (cDPO), robust, exo_pair
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5  # of alpha_divergence, as TRL has it: 1 - the paper's alpha
    discopop_tau: float = 0.05  # of discopop: smaller is a sharper change from logistic to exponential
    reference_free: bool = False  # log ref = 0: a uniform reference
    use_weighting: bool = False  # WPO: pairs that the policy would not write count less
    ld_alpha: float = 1.0  # LD-DPO: weight of tokens beyond the shorter completion's length; 1: off (paper: 0.5)

    def check(self):
        super().check()
        losses = set(self.loss_type)
        epsilon = self.label_smoothing
        weights = self.loss_weights
        divergence = self.f_divergence_type
        pointwise = sorted(losses & POINTWISE)
        if not losses:
            raise InputError(f"--loss_type: name one of {', '.join(get_args(LossType))}, or several.")
        if weights and len(weights) != len(self.loss_type):
            raise InputError(f"--loss_weights {weights}: one for each --loss_type.")
        if not all(map(math.isfinite, weights)):
            raise InputError(f"--loss_weights {weights}: must be finite.")
        if epsilon >= 0.5:
            raise InputError(f"--label_smoothing {epsilon}: must be below 0.5, where labels say nothing.")
        if epsilon == 0 and "exo_pair" in losses:
            raise InputError("--label_smoothing 0: exo_pair takes its logarithm. Try 1e-3.")
        if epsilon and not losses & SMOOTHED:
            raise InputError(f"--label_smoothing {epsilon}: {self.loss_type} has no use for it. Use 0.")
        if self.beta == 0 and losses & {"ipo", "sppo_hard"}:
            raise InputError("--beta 0: ipo and sppo_hard divide by it. Try 0.1.")
        if self.discopop_tau == 0 and "discopop" in losses:
            raise InputError("--discopop_tau 0: discopop divides by it. Try 0.05.")
        if pointwise and divergence != "reverse_kl":
            raise InputError(f"--f_divergence_type {divergence}: not for {pointwise}. Use reverse_kl.")
        if pointwise and self.reference_free:
            raise InputError(f"--reference_free: not for {pointwise}, which need log pi / ref.")
        if self.reference_free and divergence != "reverse_kl":
            raise InputError("--reference_free: needs --f_divergence_type reverse_kl.")
        if divergence == "alpha_divergence" and self.f_alpha_divergence_coef == 1:
            raise InputError("--f_alpha_divergence_coef 1: divides by 0. Use reverse_kl, its limit.")
        if self.ld_alpha > 1:
            raise InputError(f"--ld_alpha {self.ld_alpha}: must be from 0 to 1.")
        if self.ld_alpha < 1 and "sft" in losses:
            raise InputError("--ld_alpha: sft needs whole completions. Use 1, or leave sft out.")


def parse_args(argv=None):
    return parse_flags(Args, __doc__, argv, preset="dpo", version=VERSION)


args = parse_args() if __name__ == "__main__" else None  # wrong flags end here, before the slow imports

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from common.batches import count_scored, fit, micro_batches, order, seq_sums, share
from common.data import fingerprint, load_rows
from common.logprobs import Policy
from common.runtime.checkpoint import check_resume, finish, resume, save_or_stop, uncached
from common.runtime.encoding import encode_rows
from common.runtime.health import check, check_data, check_update
from common.runtime.launch import launch
from common.runtime.model import check_model, fit_memory, load_model, load_weights, longest
from common.runtime.parallel import all_sum, clip_grad_norm, local, param_groups, partial_parameters, tensor_parallel
from common.runtime.run import is_due, log, log_eval, performance, print_plan, schedule
from common.tokenization import encode_preference, stop_ids


# ---- loss ----------------------------------------------------------------------------------------
def divergence_score(log_ratio, args):
    """log_ratio (S,): log pi / ref of each completion. Returns its score (S,) under the f-divergence to the reference
    (f-DPO, https://arxiv.org/abs/2309.16240). e^40 is finite in fp32, also squared."""
    if args.f_divergence_type == "forward_kl":
        return 1 - (-log_ratio).clamp(max=40).exp()
    if args.f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratio)
    if args.f_divergence_type == "alpha_divergence":
        alpha = args.f_alpha_divergence_coef
        return ((alpha - 1) * log_ratio).clamp(max=40).expm1() / (alpha - 1)
    return log_ratio  # reverse_kl


def logistic(margin, epsilon=0.0):
    """-log sigmoid(margin), where a share epsilon of the pairs is labelled the other way round."""
    return -(1 - epsilon) * F.logsigmoid(margin) - epsilon * F.logsigmoid(-margin)


def pair_loss(loss_type, scores, seq_logprobs, lengths, args):
    """scores (S,): beta times each completion's score; seq_logprobs, lengths (S,); chosen and rejected in turn.
    Returns one loss for each pair (S / 2,); the papers are arXiv numbers."""
    chosen, rejected = scores.view(-1, 2).unbind(1)
    chosen_length, rejected_length = lengths.view(-1, 2).unbind(1)
    margin = chosen - rejected
    margin_per_token = chosen / chosen_length - rejected / rejected_length
    epsilon = args.label_smoothing
    if loss_type == "sigmoid":  # equation 7; with epsilon: cDPO
        return logistic(margin, epsilon)
    if loss_type == "sigmoid_norm":  # Tulu 3, 2411.15124
        return logistic(margin_per_token, epsilon)
    if loss_type == "hinge":  # SLiC, 2305.10425; RSO, 2309.06657
        return F.relu(1 - margin)
    if loss_type == "ipo":  # 2310.12036, equation 17, per token
        return (margin_per_token - 0.5).square() / args.beta**2
    if loss_type == "robust":  # 2403.00409: its mean over flipped labels is -log sigmoid of the right ones
        return ((1 - epsilon) * logistic(margin) - epsilon * logistic(-margin)) / (1 - 2 * epsilon)
    if loss_type == "exo_pair":  # 2402.00856, equation 16: KL of (q, 1 - q) from the labels (1 - epsilon, epsilon)
        log_q = F.logsigmoid(margin)
        log_rest = F.logsigmoid(-margin)
        return log_q.exp() * (log_q - math.log(1 - epsilon)) + log_rest.exp() * (log_rest - math.log(epsilon))
    if loss_type == "discopop":  # 2406.08414, equation 5, as one exp: the product with a sigmoid may be 0 * inf
        exponential = (F.logsigmoid(margin / args.discopop_tau) - margin).exp()
        return F.sigmoid(-margin / args.discopop_tau) * logistic(margin) + exponential
    if loss_type == "sft":  # Iterative RPO, 2404.19733; RPO, 2405.16436; MPO, 2411.10442
        return -seq_logprobs[::2] / chosen_length
    if loss_type == "nca_pair":  # 2402.05369
        return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))
    if loss_type == "bco_pair":  # 2404.04656 without its running shift delta
        return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)
    if loss_type == "sppo_hard":  # 2405.00675
        return ((chosen - 0.5).square() + (rejected + 0.5).square()) / args.beta**2
    if loss_type == "apo_zero":  # 2408.06266, equation 7
        return F.sigmoid(-chosen) + F.sigmoid(rejected)
    return F.sigmoid(chosen) + F.sigmoid(-margin)  # apo_down, equation 8


def dpo_loss(seq_logprobs, ref_logprobs, lengths, weights, args):
    """seq_logprobs, ref_logprobs (S,): summed over each completion, chosen and rejected in turn; lengths (S,) in scored
    tokens; weights (S,) or None. Returns the SUM of the loss over pairs, and metrics as sums over pairs; main divides
    by their number. The rewards among them are beta * log pi / ref under every divergence."""
    log_ratio = seq_logprobs - ref_logprobs
    scores = args.beta * divergence_score(log_ratio, args)
    factors = args.loss_weights or [1.0] * len(args.loss_type)
    loss = 0  # ln 2 a pair where policy and reference agree
    for loss_type, factor in zip(args.loss_type, factors):
        loss = loss + factor * pair_loss(loss_type, scores, seq_logprobs, lengths, args)
    if weights is not None:
        loss = loss * weights.view(-1, 2).prod(1)
    chosen, rejected = (args.beta * log_ratio).view(-1, 2).unbind(1)  # implicit rewards
    metrics = {
        "loss": loss,
        "reward_margin": chosen - rejected,
        "reward_acc": (chosen > rejected).float(),
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "chosen_logprob": seq_logprobs[::2],
        "rejected_logprob": seq_logprobs[1::2],
    }
    return loss.sum(), {name: value.detach().sum() for name, value in metrics.items()}


def per_completion(out, batch, args):
    """The policy's outputs (M,) become log pi(y), the scored tokens and, with --use_weighting, WPO's weight (else None)
    of each completion, (S,) each. LD-DPO (2409.06411): tokens beyond the shorter completion's length count ld_alpha
    times. WPO (2406.11827, equation 2): exp of the mean of log p(y_t) - log sum_v p(v)^2, without gradient."""
    logprobs = out["logprobs"]
    seq = batch["seq"]
    lengths = seq_sums(torch.ones_like(logprobs), batch)
    weights = None
    if "sum_p2" in out:
        log_weights = (logprobs - out["sum_p2"].log()).detach()
        weights = (seq_sums(log_weights, batch) / lengths).exp()
    if args.ld_alpha != 1:
        first = lengths.cumsum(0) - lengths  # (S,): where a completion's tokens begin
        position = torch.arange(len(seq), device=seq.device) - first[seq]
        shorter = lengths.view(-1, 2).amin(1).repeat_interleave(2)
        logprobs = torch.where(position < shorter[seq], logprobs, args.ld_alpha * logprobs)
    return seq_sums(logprobs, batch), lengths, weights


def forward(policy, batch, args, want=()):
    """The policy's outputs for a micro-batch of pairs, and dpo_loss of them."""
    if args.use_weighting:
        want = [*want, "sum_p2"]
    out = policy(batch, want)
    seq_logprobs, lengths, weights = per_completion(out, batch, args)
    return out, *dpo_loss(seq_logprobs, batch["ref_logprob"], lengths, weights, args)


@torch.no_grad()
def attach_reference(policy, groups, name, args, run):
    """Set every completion["ref_logprob"] to its log pi_ref, that of the untrained policy. A file of the run keeps
    them: a resumed run need not compute again what is there."""
    values = torch.zeros(len(groups), 2, dtype=torch.float64, device=run.device)
    for part in uncached(run, policy, groups, name, values, args.max_length, args.ld_alpha):
        for batch in micro_batches(run, share(run, part), spare=part[0]):
            seq_logprobs, _, _ = per_completion(policy(batch), batch, args)
            numbers = [group["number"] for group in batch["groups"]]
            values[numbers] += batch["weight"] * seq_logprobs.view(-1, 2)
    for group, pair in zip(groups, values.tolist()):
        for completion, value in zip(group["completions"], pair):
            completion["ref_logprob"] = value


@torch.no_grad()
def evaluate(policy, heldout, args, run):
    """Return held-out means over pairs of dpo_loss's metrics, and accuracy: the share of chosen completions whose every
    token is the arg-max, which is what greedy decoding would have written."""
    totals = defaultdict(float)
    for batch in micro_batches(run, share(run, heldout), spare=heldout[0]):
        out, _, metrics = forward(policy, batch, args, want=["correct"])
        wrong = seq_sums((~out["correct"]).float(), batch)
        metrics["accuracy"] = (wrong[::2] == 0).float().sum()
        for name, value in metrics.items():
            totals[name] += batch["weight"] * value
    sums = all_sum(run, *totals.values())
    return {f"eval/{name}": value / len(heldout) for name, value in zip(totals, sums)}


# ---- data ----------------------------------------------------------------------------------------
def load_groups(name, tokenizer, stops, args, run):
    """Return the rows of a dataset as groups of a chosen and a rejected completion, counts of what was dropped, and the
    rows' fingerprint."""
    rows = load_rows(name, args, tiny="pairs")
    groups = encode_rows(run, rows, encode_preference, tokenizer, stops)
    groups, counts = fit(groups, rows, args.max_length, args.overlong)
    return groups, counts, fingerprint(rows)


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
    used = set(order(len(train), args.seed, 0, min(len(train), steps * args.batch_size)))
    groups_by_name = {"train": [train[row] for row in sorted(used)], "heldout": heldout}
    for name, groups in groups_by_name.items():
        if args.reference_free:
            for group in groups:
                for completion in group["completions"]:
                    completion["ref_logprob"] = 0.0
        elif groups:
            attach_reference(policy, groups, name, args, run)  # before a checkpoint is loaded
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
        groups = share(run, [train[row] for row in rows])  # this rank's pairs, balanced by tokens
        (num_tokens,) = all_sum(run, count_scored(groups))
        totals = defaultdict(float)
        for batch in micro_batches(run, groups, spare=groups[0]):
            _, loss, metrics = forward(policy, batch, args)
            loss = loss * batch["weight"] * run.dp_size / args.batch_size  # the mean over the pairs of all ranks:
            loss.backward()  # FSDP2 averages gradients over ranks, hence dp_size
            for name, value in metrics.items():
                totals[name] += batch["weight"] * value
        sums = all_sum(run, *totals.values())
        metrics = {name: value / args.batch_size for name, value in zip(totals, sums)}
        metrics["num_tokens"] = num_tokens
        if step == 0 and not args.reference_free:
            check(
                run, "PREF001", step=0, metric="reward margin", value=abs(metrics["reward_margin"]),
                error=args.beta / 50,  # 0.02 nats; bfloat16 moves each token's log-prob by some 0.015, up or down
                rounding=args.beta * 0.05 * math.sqrt(num_tokens) / args.batch_size,
                message="the reference is not the starting policy: the first margin must be 0",
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
