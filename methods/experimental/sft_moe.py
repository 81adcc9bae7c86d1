"""
SFT of a mixture of experts, with the auxiliary loss that keeps its routers from sending all tokens to a few experts.

Paper   Switch Transformer: Fedus et al. 2021, https://arxiv.org/abs/2101.03961, equations 4 to 6
Loss    as in methods/sft.py, + router_aux_loss_coef * E * sum_e f_e P_e over the E experts, where of all tokens in all
        MoE layers f_e is how often expert e is among the num_experts_per_tok chosen (no gradient), and P_e the mean of
        its router probability. Both are of the WHOLE step, over all micro-batches and ranks, so they take two passes:
        f, without gradient; then the gradient, which is linear in the probabilities. TRL: a loss per micro-batch and
        rank, averaged, which asks every micro-batch by itself to use all experts
Tokens  as in methods/sft.py; f and P count every token of every row, prompts too. Rows that fill up idle ranks do not
        count
Norm    num_tokens as in methods/sft.py; f and P: layers times tokens of the step
Models  the policy (trained), sharded with FSDP2
Data    as in methods/sft.py
Parent: methods/sft.py
Delta:
  Args.method: router_aux_loss_coef
  routed_forward, count_experts, aux_loss: router logits, and the two statistics of a micro-batch
  main.model, main.step: the coefficient; a pass for f, then the sum of both losses
Expect  tiny lab: its model has no experts, so this is methods/sft.py
Run     torchrun --nproc_per_node=8 methods/experimental/sft_moe.py --model DIR --dataset rows.jsonl
        python methods/experimental/sft_moe.py                       (no flags: the tiny lab, on any machine)
"""

import math
import os
import sys
import time
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
    learning_rate: Annotated[float, arg(aliases=["--lr"])] = 2e-5  # peak (TRL: 2e-5)
    batch_size: int = 8  # rows per optimizer step, all ranks together (TRL: 8)
    loss_type: Literal["nll", "dft"] = "nll"  # dft: a token counts as much as the policy believes in it
    label_smoothing_factor: float = 0.0  # share of each label that is spread over the vocabulary, with nll
    train_on: Literal["all", "last"] = "all"  # which assistant turns of a chat are scored
    split_overlong: bool = False  # rows beyond max_length become several, instead of what --overlong says
    router_aux_loss_coef: float = -1.0  # weight of the auxiliary loss; -1: the model's own (TRL); 0: off

    def check(self):
        super().check()
        if self.label_smoothing_factor and (self.loss_type != "nll" or self.label_smoothing_factor >= 1):
            raise InputError("--label_smoothing_factor must be below 1, and 0 with any --loss_type but nll.")
        if self.split_overlong and self.max_length < 3:
            raise InputError(f"--max_length {self.max_length} is too short for --split_overlong: at least 3.")


def parse_args(argv=None):
    return parse_flags(Args, __doc__, argv, preset="sft", version=VERSION)


args = parse_args() if __name__ == "__main__" else None  # wrong flags end here, before the slow imports

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from common.batches import count_scored, fit, micro_batches, order, seq_sums, share, split_group
from common.data import fingerprint, load_rows
from common.logprobs import Policy
from common.runtime.checkpoint import check_resume, finish, resume, save_or_stop
from common.runtime.encoding import encode_rows
from common.runtime.health import check_data, check_update
from common.runtime.launch import launch
from common.runtime.model import check_model, fit_memory, load_model, load_weights, longest
from common.runtime.parallel import all_sum, clip_grad_norm, local, param_groups, partial_parameters, tensor_parallel
from common.runtime.run import is_due, log, log_eval, performance, print_plan, schedule
from common.tokenization import encode_demonstration, stop_ids


# ---- loss ----------------------------------------------------------------------------------------
def sft_moe_loss(out, args):
    """out: logprobs (M,), log pi of the scored tokens; with label smoothing also mean_logprob (M,), the mean of log pi
    over the vocabulary. Returns the SUM of the tokens' losses; main divides by num_tokens."""
    logprobs = out["logprobs"]
    smoothing = args.label_smoothing_factor
    if args.loss_type == "dft":
        return -(logprobs.detach().exp() * logprobs).sum()
    if smoothing:
        return -((1 - smoothing) * logprobs + smoothing * out["mean_logprob"]).sum()
    return -logprobs.sum()


def routed_forward(policy, batch, want=()):
    """Return policy(batch, want), and the fp32 logits (layers, N, E) with which every MoE layer chose among its E
    experts for the N tokens of the batch. Each of its groups has one completion."""
    backbone = policy.lm.base_model
    layers = []

    def ask_for_logits(module, inputs, options):
        return inputs, options | {"output_router_logits": True}

    def keep_logits(module, inputs, out):
        layers.extend(out.router_logits)

    asking = backbone.register_forward_pre_hook(ask_for_logits, with_kwargs=True)
    keeping = backbone.register_forward_hook(keep_logits)
    out = policy(batch, want)
    asking.remove()
    keeping.remove()
    logits = torch.stack(layers).float()
    if policy.road == "padded":
        lengths = batch["cu_seqlens_q"].diff()
        columns = torch.arange(batch["max_q"], device=lengths.device)
        is_token = columns < lengths[:, None]  # (S, longest): the rest is padding
        logits = logits[:, is_token.flatten()]
    return out, logits


def count_experts(logits, top_k):
    """Return how often each expert (E,) is among the top_k of the logits (layers, N, E)."""
    return torch.zeros_like(logits).scatter_(-1, logits.topk(top_k).indices, 1.0).sum((0, 1))


def aux_loss(logits, expert_counts, top_k):
    """Return this micro-batch's part of E * sum_e f_e P_e. expert_counts (E,) are count_experts of the whole step."""
    num_tokens = expert_counts.sum() / top_k  # of the step, times layers
    frequencies = expert_counts / num_tokens
    probabilities = logits.softmax(-1).sum((0, 1))
    return len(frequencies) * (frequencies @ probabilities) / num_tokens


@torch.no_grad()
def evaluate(policy, heldout, args, run):
    """Return the held-out -log pi (a mean over tokens, whatever the loss) and accuracy: the share of rows whose every
    scored token is the arg-max, which is what greedy decoding would have written."""
    loss = correct = right = num_tokens = 0.0
    for batch in micro_batches(run, share(run, heldout), spare=heldout[0]):
        out = policy(batch, want=["correct"])
        wrong = seq_sums((~out["correct"]).float(), batch)  # (S,): wrong tokens of each completion
        loss -= batch["weight"] * out["logprobs"].sum()
        correct += batch["weight"] * out["correct"].sum()
        right += batch["weight"] * (wrong == 0).sum()
        num_tokens += batch["weight"] * len(batch["labels"])
    loss, correct, right, num_tokens = all_sum(run, loss, correct, right, num_tokens)
    accuracies = {"eval/token_accuracy": correct / num_tokens, "eval/accuracy": right / len(heldout)}
    return {"eval/loss": loss / num_tokens, **accuracies}


# ---- data ----------------------------------------------------------------------------------------
def load_groups(name, tokenizer, stops, args, run):
    """Return the rows of a dataset as groups of one completion, counts of what was dropped, and the rows'
    fingerprint."""
    rows = load_rows(name, args, tiny="demonstrations")
    groups = encode_rows(run, rows, encode_demonstration, tokenizer, stops, scope=args.train_on)
    if args.split_overlong:
        pieces = []
        for group in groups:
            pieces += split_group(group, args.max_length, tokenizer.bos_token_id)
        groups = pieces
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
    config = lm.config.get_text_config()
    coefficient = args.router_aux_loss_coef
    if coefficient < 0:
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if coefficient and not hasattr(config, "router_aux_loss_coef"):
        raise InputError(f"--router_aux_loss_coef must be 0: {type(lm).__name__} has no experts with such a loss.")
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
        expert_counts = 0
        if coefficient:
            for batch in micro_batches(run, groups, spare=groups[0]):
                with torch.no_grad():
                    _, logits = routed_forward(policy, batch)
                expert_counts += batch["weight"] * count_experts(logits, config.num_experts_per_tok)
            expert_counts = torch.tensor(all_sum(run, *expert_counts), device=run.device)
        loss_sum = torch.zeros((), device=run.device)
        aux_sum = 0.0
        want = ["mean_logprob"] if args.label_smoothing_factor else []
        for batch in micro_batches(run, groups, spare=groups[0]):
            if coefficient:
                out, logits = routed_forward(policy, batch, want)
                aux = batch["weight"] * aux_loss(logits, expert_counts, config.num_experts_per_tok)
                aux_sum += aux.detach()
            else:
                out = policy(batch, want)
                aux = 0.0
            loss = batch["weight"] * sft_moe_loss(out, args) / num_tokens + coefficient * aux
            (loss * run.dp_size).backward()  # this rank's part of a global mean, and FSDP2 averages over ranks
            loss_sum += loss.detach()
        loss, aux = all_sum(run, loss_sum, aux_sum)
        metrics = {"loss": loss, "aux_loss": aux, "num_tokens": num_tokens}
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
