"""
CPO: learn from pairs without a reference model, as CPO or as a variant: hinge, IPO, SimPO, CPO-SimPO, AlphaPO.

Paper   CPO: Xu et al. 2024, https://arxiv.org/abs/2401.08417, equations 3 and 5; hinge: SLiC, Zhao et al. 2023,
        https://arxiv.org/abs/2305.10425; ipo: Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17; simpo:
        Meng et al. 2024, https://arxiv.org/abs/2405.14734, equation 6; alphapo: Gupta et al. 2025,
        https://arxiv.org/abs/2501.03884
Loss    L = - log sigmoid( beta * [ S(y_w) - S(y_l) ] ) - cpo_alpha * S(y_w) / |y_w|,   S(y) = log pi(y|x)
        --loss_type puts in place of the first term, where m(y) = S(y) / |y|:
        hinge    max(0, 1 - beta * [ S(y_w) - S(y_l) ])
        ipo      ( m(y_w) - m(y_l) - 1 / (2 beta) )^2
        simpo    - log sigmoid( beta * [ m(y_w) - m(y_l) ] - simpo_gamma )
        alphapo  as simpo, with ( 1 - exp(-alpha * m(y)) ) / alpha instead of m(y)
Tokens  completions only; S(y) is the SUM of log pi over the completion's tokens, its end-of-turn token included
Norm    mean over the pairs of the optimizer step, over all micro-batches and ranks; |y| is a number of scored tokens
Models  the policy (trained), sharded with FSDP2
Data    {prompt, chosen, rejected} | {chosen, rejected} that begin alike
Parent: methods/experimental/orpo.py
Delta:
  imports, args: InputError, and what the loss types have in common
  Args.method, parse_args: the loss types and their numbers, and the preset
  logistic, cpo_loss: a loss of the margin between the two completions, and the weight of the chosen one's own loss
Paper differences
  papers not read: formulas as in TRL, and CPO's equations as quoted elsewhere;
  equation 5 has S(y_w) for the second term, here as in TRL a mean per token: of a completion (TRL: of a micro-batch).
  cpo_alpha is 1, with simpo and alphapo 0 as in their papers (TRL: 1 with simpo too, which is CPO-SimPO)
Expect  tiny lab, 2 CPU cores: held-out accuracy 0.30 -> 0.99 within a minute (benchmarks/README.md)
Run     torchrun --nproc_per_node=8 methods/experimental/cpo.py --model DIR --dataset pairs.jsonl
        python methods/experimental/cpo.py --loss_type simpo --beta 2.5 --simpo_gamma 1.375
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
SMOOTHED = {"sigmoid", "simpo", "alphapo"}  # by --label_smoothing
SELF_SUFFICIENT = {"simpo", "alphapo"}  # without a loss of the chosen completion, unless --cpo_alpha asks for it
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
    beta: float = 0.1  # scale of the margin (TRL: 0.1; simpo and alphapo are used with 2 to 10)
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = "sigmoid"
    cpo_alpha: float | None = None  # weight of the chosen completion's own loss; none: 1, simpo and alphapo 0
    simpo_gamma: float = 0.5  # margin that simpo and alphapo ask for (TRL: 0.5)
    alpha: float = 0.25  # of alphapo: the shape of its reward; 0 is simpo (TRL: 0, 0.25 in recipes)
    label_smoothing: float = 0.0  # share of pairs labelled the wrong way round: sigmoid, simpo, alphapo

    def check(self):
        super().check()
        epsilon = self.label_smoothing
        if epsilon >= 0.5:
            raise InputError(f"--label_smoothing {epsilon}: must be below 0.5, where labels say nothing.")
        if epsilon and self.loss_type not in SMOOTHED:
            raise InputError(f"--label_smoothing {epsilon}: {self.loss_type} has no use for it. Use 0.")
        if self.beta == 0:
            raise InputError("--beta 0: the completions of a pair would not be compared. Try 0.1.")


def parse_args(argv=None):
    return parse_flags(Args, __doc__, argv, preset="cpo", version=VERSION)


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
from common.runtime.checkpoint import check_resume, finish, resume, save_or_stop
from common.runtime.encoding import encode_rows
from common.runtime.health import check_data, check_update
from common.runtime.launch import launch
from common.runtime.model import check_model, fit_memory, load_model, load_weights, longest
from common.runtime.parallel import all_sum, clip_grad_norm, local, param_groups, partial_parameters, tensor_parallel
from common.runtime.run import is_due, log, log_eval, performance, print_plan, schedule
from common.tokenization import encode_preference, stop_ids


# ---- loss ----------------------------------------------------------------------------------------
def logistic(margin, epsilon):
    """-log sigmoid(margin), where a share epsilon of the pairs is labelled the other way round."""
    return -(1 - epsilon) * F.logsigmoid(margin) - epsilon * F.logsigmoid(-margin)


def cpo_loss(seq_logprobs, lengths, args):
    """seq_logprobs (S,): log pi summed over each completion, chosen and rejected in turn; lengths (S,): their scored
    tokens. Returns the SUM of the loss over pairs, and metrics as sums over pairs; main divides by their number."""
    mean_logprobs = seq_logprobs / lengths
    scores = mean_logprobs  # ipo, simpo
    if args.loss_type in ("sigmoid", "hinge"):
        scores = seq_logprobs
    if args.loss_type == "alphapo" and args.alpha:  # at alpha 0 its limit, simpo. e^40 is finite in fp32, also squared
        scores = -(-args.alpha * mean_logprobs).clamp(max=40).expm1() / args.alpha
    chosen, rejected = (args.beta * scores).view(-1, 2).unbind(1)  # implicit rewards
    margin = chosen - rejected
    if args.loss_type == "hinge":
        loss = F.relu(1 - margin)
    elif args.loss_type == "ipo":
        loss = (margin - 0.5).square() / args.beta**2
    elif args.loss_type == "sigmoid":
        loss = logistic(margin, args.label_smoothing)
    else:
        loss = logistic(margin - args.simpo_gamma, args.label_smoothing)
    weight = args.cpo_alpha
    if weight is None:
        weight = 0.0 if args.loss_type in SELF_SUFFICIENT else 1.0
    nll = -mean_logprobs[::2]
    loss = loss + weight * nll
    metrics = {
        "loss": loss,
        "nll": nll,
        "reward_margin": margin,
        "reward_acc": (chosen > rejected).float(),
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "chosen_logprob": seq_logprobs[::2],
        "rejected_logprob": seq_logprobs[1::2],
    }
    return loss.sum(), {name: value.detach().sum() for name, value in metrics.items()}


def forward(policy, batch, args, want=()):
    """Return the policy's outputs for a micro-batch of pairs, and cpo_loss of them."""
    out = policy(batch, want)
    seq_logprobs = seq_sums(out["logprobs"], batch)
    lengths = seq_sums(torch.ones_like(out["logprobs"]), batch)
    return out, *cpo_loss(seq_logprobs, lengths, args)


@torch.no_grad()
def evaluate(policy, heldout, args, run):
    """Return held-out means over pairs of cpo_loss's metrics, and accuracy: the share of chosen completions whose
    every token is the arg-max, which is what greedy decoding would have written."""
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
