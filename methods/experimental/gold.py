"""
GOLD: distillation from a teacher with another tokenizer, over spans where both models' tokens cover the same bytes.

Paper   Patino et al. 2025, https://huggingface.co/spaces/HuggingFaceH4/general-on-policy-logit-distillation; sorted
        distance (ULD): Boizard et al. 2024, https://arxiv.org/abs/2402.12030 (neither was read: by TRL 1.16)
Loss    l_g = sum over i of |P_(i) - Q_(i)|, of the masses that student and teacher give their tokens at a span g, each
        sorted from the largest, the shorter continued by zeros. A span runs from one place where tokens of both end to
        the next. P(v) = p(v | x, before g) * product of p(y_j | x, y_<j) over the span's tokens but its first; Q is the
        teacher's, who reads the same text as its own chat template and tokenizer write it
        --uld_token_merge_strategy bayesian: p is the distribution at the span's last token, the product over the others
        --uld_use_hybrid_loss: w_m D(Q, P) over tokens that both have, D as in methods/distillation.py, and
        w_u times the sorted distance of the others; w_m is the share of the teacher's tokens that the student has,
        w_u = 1 - w_m. With one tokenizer that is distillation.py, exactly: a span is a token, and w_m is 1
        loss = uld_distillation_weight * mean of l + uld_crossentropy_weight * mean of - log p(y_t)
Tokens  spans of the completion, the two stop tokens being one; a text's end that the teacher cannot encode has none
Norm    sum of l / spans, cross-entropy / num_tokens, over the whole optimizer step, all micro-batches and ranks
Models  as in methods/distillation.py
Data    as in methods/distillation.py; completions of one turn
Parent: methods/distillation.py
Delta:
  args, Args.method, parse_args: its flags and preset
  forward, teacher_states, attach_teacher, main.step: the teacher's tokens and the spans; means over spans
  gold_loss: cross-entropy beside the distance
  evaluate: the distance, mean over spans
  load_teacher, check_teacher: a head of another vocabulary, and the tokens that both have; any tokenizer will do
  main.setup, main.data, main.model: the aligner
Paper differences
  not known, as the papers were not read. TRL's strategy "observed" reads all probabilities one place too late, so
  that they are not those of the tokens that it multiplies; here the places are right, and "bayesian" is TRL's. TRL
  skips the stop tokens (--uld_skip_eos), takes the mean over spans of each completion first, and has temperatures
  of its own for ULD; --temperature divides all logits here. Tokens match by their bytes, in TRL by their names
Expect  tiny lab, 2 CPU cores: its flags have --uld_use_hybrid_loss; held-out greedy accuracy 0.30 -> 0.99 within a
        minute. By sorted masses alone it stayed at 0.29 (three seeds): they say how sure the teacher is, not of what.
        Nor did it rise with a teacher whose tokens join a carry to its digit, where no span tells the two apart
Run     torchrun --nproc_per_node=8 methods/experimental/gold.py --model DIR --teacher DIR --dataset rows.jsonl
        python methods/experimental/gold.py             (no flags: the tiny lab, on any machine)
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
    teacher: Annotated[str, arg(aliases=["--teacher-model-name-or-path"])] = ""  # folder or hub id; any tokenizer
    learning_rate: Annotated[float, arg(aliases=["--lr"])] = 1e-7  # peak (TRL: 1e-7)
    batch_size: int = 8  # prompts per optimizer step, all ranks together
    num_generations: Annotated[int, arg(aliases=["--group-size"])] = 1  # completions per prompt (TRL: 1)
    max_completion_length: Annotated[int, arg(aliases=["--max-new-tokens"])] = 128  # tokens (TRL: 128)
    temperature: float = 1.0  # divides logits: of the sampler, the student and the teacher (TRL: 0.9, of ULD 1)
    top_k: int = 0  # the sampler draws from so many of the likeliest tokens; 0: from all
    top_p: float = 0.95  # and of these from the fewest that hold this share (TRL: 0.95)
    beta: float = 0.5  # 0: KL(teacher || student), 1: KL(student || teacher), between: both, to a mixture (TRL: 0.5)
    lmbda: float = 0.5  # share of steps on the student's completions; the others take the data's (TRL: 0.5)
    use_extended_uld: bool = True  # spans; off: the k-th token answers to the teacher's k-th
    uld_token_merge_strategy: Literal["observed", "bayesian"] = "observed"  # see Loss
    uld_use_hybrid_loss: bool = False  # see Loss
    uld_hybrid_matched_weight: float | None = None  # w_m; None: by the vocabularies. Give both or none
    uld_hybrid_unmatched_weight: float | None = None  # w_u
    uld_crossentropy_weight: float = 0.0
    uld_distillation_weight: float = 1.0
    uld_skip_eos: bool = False  # no span of the stop tokens: nothing teaches when to stop (TRL: on)
    engine: Literal["auto", "loop", "continuous"] = "auto"  # of sampling; auto: continuous batching on CUDA, else loop

    # Not flags: what judges held-out completions, of rows that have an answer. Nothing is learned from it.
    reward = ("accuracy",)
    reward_weights = ()

    def check(self):
        super().check()
        if not self.teacher:
            raise InputError("--teacher: there is none. Give the folder or hub id of a model of any tokenizer.")
        for name in ("beta", "lmbda"):
            if vars(self)[name] > 1:
                raise InputError(f"--{name} {vars(self)[name]:g}: must be from 0 to 1.")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise InputError("--temperature must be above 0, and --top_p above 0 and at most 1.")
        if self.batch_size * self.num_generations > 2**20:
            raise InputError("--num_generations: a step must be at most a million completions.")
        if self.tp_size > 1:
            raise InputError(f"--tp_size {self.tp_size}: whole rows of probabilities are sorted here. Use --tp_size 1.")
        if (self.uld_hybrid_matched_weight is None) != (self.uld_hybrid_unmatched_weight is None):
            raise InputError("--uld_hybrid_matched_weight and --uld_hybrid_unmatched_weight: give both, or none.")


def parse_args(argv=None):
    return parse_flags(Args, __doc__, argv, preset="gold", version=VERSION)


args = parse_args() if __name__ == "__main__" else None  # wrong flags end here, before the slow imports

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from common.batches import count_scored, fit, micro_batches, order, share
from common.data import fingerprint, load_rows, problem
from common.experimental.alignment import Aligner, check_lost, teacher_batch
from common.experimental.spans import OtherTeacher, SpanPolicy
from common.logprobs import Policy
from common.rewards import accuracy, heldout_metrics, sample_and_judge, write_samples
from common.runtime.checkpoint import check_resume, finish, resume, save_or_stop
from common.runtime.encoding import encode_rows
from common.runtime.health import check, check_data, check_update
from common.runtime.launch import launch
from common.runtime.model import check_fits, check_model, fit_memory, load_model, load_weights, longest, own_tensors
from common.runtime.parallel import all_sum, clip_grad_norm, full, local, param_groups, partial_parameters
from common.runtime.parallel import tensor_parallel
from common.runtime.run import is_due, log, log_eval, performance, print_plan, schedule, show_groups
from common.sampling import Sampler, gather_groups, uniforms
from common.tokenization import encode_demonstration, encode_prompt, stop_ids


# ---- loss ----------------------------------------------------------------------------------------
def forward(policy, teacher, batch):
    """The student's outputs for a micro-batch: of every span its distance from the teacher, (G,), and of every scored
    token its log-prob, both with gradient, and its entropy, (M,)."""
    batch["teacher_hidden"] = teacher(teacher_batch(batch), want=["hidden"])["hidden"]
    return policy(batch, want=["divergence", "entropy"])


def attach_teacher(run, policy, groups, step_groups):
    """Give the completions of this rank's groups, and of the one that may run in their place, the teacher's tokens and
    the spans. Return of all ranks the number of spans, at least 1, and the share of tokens that are in none."""
    policy.aligner.attach(step_groups[:1])
    num_spans, covered = all_sum(run, *policy.aligner.attach(groups))
    return max(1.0, num_spans), 1 - covered / count_scored(step_groups)


def gold_loss(out, num_spans, num_tokens, args):
    """Return a micro-batch's part of the step's loss."""
    distance = out["divergence"].sum() / num_spans
    cross_entropy = -out["logprobs"].sum() / num_tokens
    return args.uld_distillation_weight * distance + args.uld_crossentropy_weight * cross_entropy


@torch.no_grad()
def evaluate(policy, teacher, sampler, heldout, args, run):
    """Return the accuracy of greedy decoding on held-out rows with an answer (NaN where there are none), and the mean
    over spans of the distance on completions that the student samples: what training on-policy minimises."""
    refresh(sampler, policy)
    groups = share(run, [group | {"place": place} for place, group in enumerate(heldout)])
    sample_and_judge(run, sampler, groups, 1, [accuracy], place=("eval",), greedy=True)
    show_groups(run, "greedy", groups[:2], sampler.tokenizer)
    metrics = heldout_metrics(run, groups)
    del metrics["eval/no_reward_frac"]
    sampled = rollout(sampler, heldout, 1, ("eval",), args, run)
    groups = share(run, sampled)
    num_spans, _ = attach_teacher(run, policy, groups, sampled)
    total = 0.0
    for batch in micro_batches(run, groups, spare=sampled[0]):
        total += batch["weight"] * forward(policy, teacher, batch)["divergence"].sum()
    (total,) = all_sum(run, total)
    metrics["eval/divergence"] = total / num_spans
    return metrics


# ---- data ----------------------------------------------------------------------------------------
def load_groups(name, tokenizer, stops, args, run):
    """Return the rows of a dataset as groups, with --lmbda below 1 with their completions, counts of what was dropped,
    and the rows' fingerprint."""
    rows = load_rows(name, args, tiny="prompts" if args.lmbda == 1 else "demonstrations")
    encode = encode_prompt
    if args.lmbda < 1:
        encode = encode_demonstration
        if not {"prompt", "completion"} <= rows[0].keys():
            raise problem(rows[0], "--lmbda below 1 needs the columns prompt and completion; found", sorted(rows[0]),
                          "Type --rename old:completion, or --lmbda 1")  # fmt: skip
    groups = encode_rows(run, rows, encode, tokenizer, stops)
    for group in groups:
        group["columns"] = rows[group["row"]]
        if not group["prompt"]:
            raise problem(rows[group["row"]], "no token in column prompt", "", "Write a prompt, or --rename old:prompt")
    overlong = args.overlong.replace("truncate_prompt", "drop")  # a prompt is never cut
    groups, counts = fit(groups, rows, args.max_length, overlong, room=args.max_completion_length)
    return groups, counts, fingerprint(rows)


# ---- rollout -------------------------------------------------------------------------------------
def on_policy(step, args):
    """Return whether a step takes the student's completions: true with probability --lmbda, and the same on all ranks
    and after a resume."""
    return uniforms(("on_policy", step), args.seed, 1).item() < args.lmbda


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


def sampling_metrics(groups):
    """Return the share of completions without a stop token (of the data's: 0) and their mean length."""
    completions = [completion for group in groups for completion in group["completions"]]
    return {
        "truncated_frac": sum(not c.get("stopped", True) for c in completions) / len(completions),
        "completion_len": sum(len(c["ids"]) for c in completions) / len(completions),
    }


def check_rollout(run, step, metrics):
    """GRPO002, GRPO004, TEACH003: completions that were cut, a sampler that is not the student, and a collapse."""
    if step > 0:
        step += 1  # the first rollout is judged before step 1
    length = run.args.max_completion_length
    check(
        run, "GRPO002", step=step, metric="truncated_frac", value=metrics["truncated_frac"], warn=0.5, error=0.95,
        patience=1 if metrics["truncated_frac"] == 1 else 3, message="no stop token",
        fix=("--max_completion_length", length, 2 * length),
    )
    entropy = max(metrics["entropy"], 1e-3)  # rounding moves the log-probs of a confident model less
    check(
        run, "GRPO004", step=step, metric="sampler_gap / entropy", value=metrics["sampler_gap"] / entropy,
        warn=0.025, error=0.2, message="sampler and trainer disagree on the same tokens",
    )
    disagreement = metrics["loss"] if metrics["entropy"] < 0.05 else 0.0  # of a student that never hesitates
    check(
        run, "TEACH003", step=step, metric="loss", value=disagreement, warn=1.0, patience=3,
        message="the student has one thing to say, and its teacher would say another: it has collapsed",
        fix=("--learning_rate", run.args.learning_rate, run.args.learning_rate / 2),
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


@torch.no_grad()
def load_teacher(run, lm, policy, groups):
    """Return the teacher with its weights, frozen and in --dtype, sharded as the student is, and a sentence for the
    plan. Set policy.teacher, the teacher's head, whole on every rank: the student's forward and backward need it where
    FSDP2 has it in parts. With --uld_use_hybrid_loss it knows the tokens that both have."""
    args = run.args
    lm.requires_grad_(False)
    for parameter in lm.parameters():  # not the buffers: rotary tables stay fp32
        parameter.data = parameter.to(run.dtype)
    teacher = Policy(lm, args.temperature)
    num_weights = sum(parameter.numel() for parameter in lm.parameters())
    weights = num_weights * run.dtype.itemsize * args.replicate_size / run.world
    head = teacher.head().weight.nbytes
    check_fits(f"--teacher {args.teacher}: its share of the weights and its whole head take", weights + head)
    teacher = load_weights(run, shard(teacher, run), flag="teacher")
    teacher_tokenizer = policy.aligner.teacher_tokenizer
    check_model(run, teacher, teacher_tokenizer, [{**group, "prompt": group["teacher_prompt"]} for group in groups])
    weight, bias = whole_head(run, teacher, len(teacher.head().weight))
    policy.teacher = OtherTeacher(weight, bias, teacher.transform, args.beta)
    dtype = str(run.dtype).removeprefix("torch.")
    size = f"{num_weights / 1e6:.1f}M weights in {dtype}, {weights / 1e9:.2f} GB a rank"
    sentence = f"; teacher: {size}, its whole head {head / 1e9:.2f} GB more, {teacher.road} road"
    if args.uld_use_hybrid_loss:
        matched = policy.aligner.matched_ids().to(run.device)
        matched_frac = matched.shape[1] / len(teacher_tokenizer.get_vocab())
        weights = args.uld_hybrid_matched_weight, args.uld_hybrid_unmatched_weight
        if None in weights:
            weights = matched_frac, 1 - matched_frac
        policy.teacher.matched, policy.teacher.weights = matched, weights
        sentence += f"; {matched_frac:.0%} of the teacher's tokens are the student's, too"
    return teacher, sentence


def whole_head(run, model, columns):
    """Return the first columns of a model's head in --dtype, weight (columns, D) and bias (columns,) or None, whole on
    every rank, but for the rows of the other tp ranks. A collective."""
    tensors = []
    for tensor in (model.head().weight, model.head().bias):
        if tensor is not None:
            tensor = full(tensor.detach())[:columns].to(run.device, run.dtype)
            if columns % run.args.tp_size == 0:  # else tensor parallelism leaves heads whole
                tensor = tensor.chunk(run.args.tp_size)[run.rank % run.args.tp_size]
        tensors.append(tensor)
    return tensors


# ---- main ----------------------------------------------------------------------------------------
def main(args, run):
    # ---- setup -----------------------------------------------------------------------------------
    run.mesh = init_device_mesh(run.device.type, run.mesh_shape, mesh_dim_names=("replicate", "shard", "tp"))
    tokenizer, lm = load_model(AutoModelForCausalLM, args)  # on the meta device: no memory yet
    stops = stop_ids(tokenizer, lm.generation_config)
    teacher_tokenizer, teacher_lm = load_model(AutoModelForCausalLM, args, flag="teacher")
    teacher_stops = stop_ids(teacher_tokenizer, teacher_lm.generation_config)
    aligner = Aligner(
        tokenizer, stops, teacher_tokenizer, teacher_stops, by_bytes=args.use_extended_uld,
        with_stop=not args.uld_skip_eos, last_is_base=args.uld_token_merge_strategy == "bayesian",
    )  # fmt: skip
    # ---- data ------------------------------------------------------------------------------------
    train, counts, run.data = load_groups(args.dataset, tokenizer, stops, args, run)
    heldout = []
    if args.eval_dataset:
        heldout = load_groups(args.eval_dataset, tokenizer, stops, args, run)[0][: args.eval_rows]
    check_data(run, train, counts, tokenizer, lm.generation_config, stops)
    train, heldout = [aligner.prepare(run, groups) for groups in (train, heldout)]
    check_resume(run)
    steps = args.max_steps
    if steps < 0:
        steps = math.ceil(args.num_train_epochs * len(train) / args.batch_size)
    # ---- model -----------------------------------------------------------------------------------
    lm.generation_config.eos_token_id = stops  # what training teaches to stop at is what every engine stops at
    sampler = Sampler(run, lm, tokenizer, stops, args.top_k, args.top_p)  # an unsharded copy
    policy = load_weights(run, shard(SpanPolicy(lm, args.temperature), run))  # every rank reads its own slices
    policy.aligner = aligner
    check_model(run, policy, tokenizer, train + heldout)  # MODEL001: the same log-probs as the model's own forward
    teacher, sentence = load_teacher(run, teacher_lm, policy, train + heldout)
    sampler.start_engine()
    most_tokens = longest(train, args.num_generations * args.max_completion_length)
    memory = fit_memory(run, policy, tokenizer, most_tokens) + sentence
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
        log_eval(run, 0, evaluate(policy, teacher, sampler, heldout, args, run), steps)
    for step in range(run.step, steps):
        started = time.perf_counter()
        # ---- rollout -----------------------------------------------------------------------------
        rows = order(len(train), args.seed, step * args.batch_size, args.batch_size)
        step_groups = [train[row] for row in rows]  # of all ranks, with the data's completions if there are any
        sampled = on_policy(step, args)
        if sampled:
            refresh(sampler, policy)
            step_groups = rollout(sampler, step_groups, args.num_generations, ("train", step), args, run)
            write_samples(run, step + 1, step_groups, tokenizer)
        rollout_seconds = time.perf_counter() - started
        # ---- step --------------------------------------------------------------------------------
        groups = share(run, step_groups)  # this rank's groups
        num_tokens = count_scored(step_groups)  # of all ranks
        num_spans, lost_frac = attach_teacher(run, policy, groups, step_groups)
        totals = defaultdict(float)
        for batch in micro_batches(run, groups, spare=step_groups[0]):
            out = forward(policy, teacher, batch)
            loss = batch["weight"] * gold_loss(out, num_spans, num_tokens, args)
            (loss * run.dp_size).backward()  # a part of a global mean; FSDP2 averages over ranks
            totals["loss"] += loss.detach()
            totals["entropy"] += batch["weight"] * out["entropy"].sum() / num_tokens
            if sampled:
                gap = (out["logprobs"].detach() - batch["sampler_logprobs"]).abs()
                totals["sampler_gap"] += batch["weight"] * gap.sum() / num_tokens
        sums = dict(zip(totals, all_sum(run, *totals.values())))
        metrics = {"loss": sums["loss"], "num_tokens": num_tokens, "on_policy": float(sampled)}
        metrics |= sampling_metrics(step_groups) | {"num_spans": num_spans, "lost_frac": lost_frac}
        check_lost(run, step + 1, lost_frac)
        metrics |= {"entropy": sums["entropy"], "sampler_gap": sums.get("sampler_gap", 0.0)}
        metrics["perf/rollout_seconds"] = rollout_seconds
        if sampled:
            check_rollout(run, step, metrics)
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
            log_eval(run, step + 1, evaluate(policy, teacher, sampler, heldout, args, run), steps)
        # ---- save --------------------------------------------------------------------------------
        save_or_stop(run, step + 1, steps, models, optimizers, tokenizer)
    # ---- finish ----------------------------------------------------------------------------------
    finish(run, policy, tokenizer, heldout or train)


if __name__ == "__main__":
    launch(main, args, __file__)
