"""
SDPO: reinforcement learning by self-distillation. Whoever solved a prompt shows the model how, and it teaches itself.

Paper   Huebotter et al. 2026, https://arxiv.org/abs/2601.20802 (not read: by TRL 1.16)
Loss    L = (1 - w) L_GRPO + w L_distill,   w the --distillation_weight; at 1, the default, there is no policy gradient
        L_distill  l_t = D(teacher(. | x', y_<t), student(. | x, y_<t)) at each token of a completion y that the student
                   sampled on the prompt x, D by --distillation_mode as in methods/experimental/sdft.py. x' is x with a
                   solution, the first other completion of x whose reward is at least --success_reward_threshold, and
                   with the feedback of the row. A completion that has neither is not taught: its l_t is 0
        L_GRPO     - A pi(y_t) / sg(pi(y_t)), A = (r - mean of the group) / (std of the group + 1e-4), as in
                   methods/grpo.py, whose ratio is 1 where each step has a rollout of its own
Tokens  every sampled token, the stop token included
Norm    L_distill: the mean over each completion's tokens, then over all completions of the step, also the untaught ones
        L_GRPO: the mean over all tokens of the step. Both over the whole optimizer step, all ranks together
Models  as in methods/experimental/sdft.py
Data    {prompt, any columns}: the columns go to the reward functions. privileged_context, text or messages, is feedback
        where a row has it. --teacher_prompt_template makes x' of all three, as the last turn or the whole plain text
Parent: methods/experimental/sdft.py
Delta:
  Args.method, args, parse_args, imports: its flags, defaults and preset; sampled from the student itself
  compute_advantages, sdpo_loss, evaluate: the policy gradient, and completions that are not taught; rewards judge
  with_context: a solution, and feedback that need not be there
  on_policy, rollout, add_teachers: who learns from whom
  sampling_metrics, check_rollout: what was solved, and what is taught
  main.model, main.loop, main.rollout, main.step, main.update, main.eval: where they are called; a step that nothing
    can be learned from is skipped
Paper differences
  not known, as the paper was not read. TRL's mean of L_GRPO (loss_type dapo) is a micro-batch's. TRL reads feedback on
  demand (include_environment_feedback) and cuts x' at 10240 tokens, where here a solution that leaves no room in
  --max_length is not shown; it weighs tokens by student / student when sampled, at most 2, where several steps learn
  from a rollout. Not here: a KL, other normalisers, solutions without their reasoning, --top_p and --top_k, under which
  sampled tokens are not the student's
Expect  tiny lab, 2 CPU cores: the tiny model cannot read a solution, so the lab's flags (w 0.5) show none, and teach by
        feedback, the question in words that it knows: held-out greedy accuracy 0.00 -> 0.30, as in
        methods/experimental/sdft.py. From a model that methods/sft.py taught to read one, as in tests/test_sdpo.py, by
        solutions alone 0.25 -> 0.70 in 25 steps; at a constant learning rate it fell to 0.49 by step 40 (one run)
Run     torchrun --nproc_per_node=8 methods/experimental/sdpo.py --model DIR --dataset prompts.jsonl --reward accuracy
        python methods/experimental/sdpo.py            (no flags: the tiny lab, on any machine)
"""

import copy
import json
import math
import os
import re
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
    teacher_model_kind: Literal["base", "live", "ema"] = "ema"  # starting weights, the student's, or their average
    teacher_update_rate: float = 0.05  # of ema: the student's share in an update (TRL: 0.05)
    teacher_sync_steps: int = 1  # of ema: steps from one update to the next (TRL: 1)
    teacher_prompt_template: str = (  # what the teacher reads; a line whose {name} has no value is left out
        "{prompt}\\n\\nA solution: {solution}\\nFeedback: {privileged_context}\\n\\nNow solve it in your own words."
    )
    success_reward_threshold: float = 1.0  # a completion with this reward or more is a solution (TRL: 1)
    distillation_weight: float = 1.0  # w of Loss, from 0 to 1 (TRL: 1)
    learning_rate: Annotated[float, arg(aliases=["--lr"])] = 5e-5  # peak (TRL: 5e-5)
    batch_size: int = 8  # prompts per optimizer step, all ranks together
    num_generations: Annotated[int, arg(aliases=["--group-size"])] = 8  # completions per prompt (TRL: 8)
    max_completion_length: Annotated[int, arg(aliases=["--max-new-tokens"])] = 256  # tokens (TRL: 256)
    temperature: float = 1.0  # divides logits: of the sampler, the student and the teacher (TRL: 1)
    distillation_mode: Literal["topk_logits", "full_logits", "sampled_token"] = "sampled_token"  # see Loss
    beta: Annotated[float, arg(aliases=["--distillation-alpha"])] = 1.0  # 0: KL(teacher || student), 1: the reverse
    loss_top_k: Annotated[int, arg(aliases=["--distillation-topk"])] = 100  # of topk_logits (TRL: 100)
    reward: tuple[str, ...] = ("accuracy",)  # accuracy, format, math, FILE.py:FUNCTION or reward models; they are added
    reward_weights: tuple[float, ...] = ()  # one per reward (1 each)
    reward_timeout: float = 60.0  # seconds a reward file may take to load, and per rollout; 0: no limit
    reward_memory: float = 8.0  # GB of address space for the process of a reward file; 0: no limit (CUDA needs that)
    engine: Literal["auto", "loop", "continuous"] = "auto"  # of sampling; auto: continuous batching on CUDA, else loop

    def check(self):
        super().check()
        for name in ("beta", "teacher_update_rate", "distillation_weight"):
            if vars(self)[name] > 1:
                raise InputError(f"--{name} {vars(self)[name]:g}: must be from 0 to 1.")
        names = set(re.findall(r"{([^{}]+)}", self.teacher_prompt_template))
        if names - {"prompt"} != {"solution", "privileged_context"}:
            raise InputError(
                "--teacher_prompt_template: must contain {solution} and {privileged_context}, mostly {prompt}, and no "
                "other {name}."
            )
        if self.distillation_mode == "sampled_token" and self.beta != 1:
            raise InputError(f"--distillation_mode sampled_token: needs --beta 1, not {self.beta:g}.")
        if self.teacher_sync_steps < 1 or self.loss_top_k < 1 or self.temperature <= 0:
            raise InputError("--teacher_sync_steps and --loss_top_k must be at least 1, --temperature above 0.")
        if self.batch_size * self.num_generations > 2**20:
            raise InputError("--num_generations: a step must be at most a million completions.")
        if self.distillation_mode == "topk_logits" and self.tp_size > 1:
            raise InputError("--distillation_mode topk_logits: needs --tp_size 1.")


def parse_args(argv=None):
    return parse_flags(Args, __doc__, argv, preset="sdpo", version=VERSION)


args = parse_args() if __name__ == "__main__" else None  # wrong flags end here, before the slow imports

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from common.batches import count_scored, fit, flat_batch, micro_batches, order, sequence_size, share
from common.data import columns_of, fill, fingerprint, load_rows, problem
from common.divergence import Teacher
from common.logprobs import Policy
from common.rewards import check_rewards, heldout_metrics, load_rewards, reward_table, rollout_metrics, sample_and_judge
from common.rewards import write_samples
from common.runtime.checkpoint import check_resume, finish, resume, save_or_stop
from common.runtime.encoding import encode_rows
from common.runtime.health import check, check_data, check_update
from common.runtime.launch import launch
from common.runtime.model import check_fits, check_model, fit_memory, load_model, load_weights, longest, own_tensors
from common.runtime.parallel import all_sum, clip_grad_norm, full, local, param_groups, partial_parameters
from common.runtime.parallel import tensor_parallel
from common.runtime.run import is_due, log, log_eval, performance, print_plan, schedule, show_groups
from common.sampling import Sampler, gather_groups, set_completions
from common.tokenization import encode_prompt, stop_ids


# ---- loss ----------------------------------------------------------------------------------------
def forward(policy, teacher, batch):
    """The student's outputs for a micro-batch, (M,) each: at every scored token its divergence from the teacher and its
    log-prob, with gradient, the teacher's log-prob and the student's entropy."""
    batch["teacher_hidden"] = teacher_states(teacher, batch)
    return policy(batch, want=["divergence", "entropy"])


@torch.no_grad()
def teacher_states(teacher, batch):
    """Return the teacher's hidden states (M, D) at the rows that predict. Its batch is another one, with prompts of
    other lengths before the same completions in the same order: row m of both predicts the same token."""
    return teacher(flat_batch(teacher_groups(batch["groups"]), batch["labels"].device), want=["hidden"])["hidden"]


def teacher_groups(groups):
    """Return the groups as the teacher reads them."""
    return [{**group, "prompt": group["teacher_prompt"]} for group in groups]


def compute_advantages(rewards):
    """rewards (prompts, num_generations), float64, NaN where there is none. Returns the same shape: minus the mean of
    the prompt's rewards, over their standard deviation (n - 1); 0 for NaN, which no statistic includes."""
    count = (~rewards.isnan()).sum(1, keepdim=True)
    centered = rewards - rewards.nanmean(1, keepdim=True)
    std = (centered.square().nansum(1, keepdim=True) / (count - 1)).sqrt()
    return (centered / (std + 1e-4)).nan_to_num(0.0)


def sdpo_loss(out, batch, num_tokens, num_completions, args):
    """num_tokens, num_completions: of the whole optimizer step, all ranks; in the batch taught and advantage, (S,).
    Returns this micro-batch's part of the normalised loss."""
    logprobs, seq, weight = out["logprobs"], batch["seq"], args.distillation_weight
    loss = out["divergence"]
    if args.distillation_mode == "sampled_token":
        log_ratio = logprobs.detach() - out["teacher_logprobs"]
        loss = log_ratio * logprobs
    loss = batch["taught"][seq] * loss / sequence_size(seq)
    ratio = (logprobs - logprobs.detach()).exp()  # 1, with the gradient of log pi
    policy_loss = -batch["advantage"][seq] * ratio
    return weight * loss.sum() / num_completions + (1 - weight) * policy_loss.sum() / num_tokens


def evaluate(policy, sampler, heldout, reward_functions, step, args, run):
    """Return the accuracy of greedy decoding on held-out rows: the share for which the first reward function gives 1 or
    more, of those to which it gives a number."""
    refresh(sampler, policy)
    groups = share(run, [group | {"place": place} for place, group in enumerate(heldout)])
    sample_and_judge(run, sampler, groups, 1, reward_functions, place=("eval",), greedy=True)
    show_groups(run, "greedy", groups[:2], sampler.tokenizer)
    metrics = heldout_metrics(run, groups)
    check_rewards(run, "GRPO003", step=step, metric="eval/no_reward_frac", share=metrics["eval/no_reward_frac"])
    return metrics


# ---- data ----------------------------------------------------------------------------------------
def load_groups(name, tokenizer, stops, args, run):
    """Return the rows of a dataset as groups with both prompts, of which the longer must fit, counts of what was
    dropped, and the rows' fingerprint."""
    rows = load_rows(name, args, tiny="privileged")
    teacher_rows = [with_context(row, args.teacher_prompt_template) for row in rows]
    teacher_prompts = {}
    for group in encode_rows(run, teacher_rows, encode_prompt, tokenizer, stops):
        teacher_prompts[group["row"]] = group["prompt"]
    groups = []
    for group in encode_rows(run, rows, encode_prompt, tokenizer, stops):
        if group["row"] in teacher_prompts:  # else the chat template refuses it
            both = [group["prompt"], teacher_prompts[group["row"]]]
            group.update(student_prompt=both[0], teacher_prompt=both[1], prompt=max(both, key=len))
            groups.append({**group, "columns": rows[group["row"]]})
    overlong = args.overlong.replace("truncate_prompt", "drop")  # a prompt is never cut
    groups, counts = fit(groups, rows, args.max_length, overlong, room=args.max_completion_length)
    for group in groups:
        group["prompt"] = group.pop("student_prompt")
    return groups, counts, fingerprint(rows)


def with_context(row, template, solution=""):
    """Return the row as the teacher reads it: the last turn of its prompt, or a prompt of plain text, is the template
    with the row's prompt, its feedback and the solution in their places. Of messages as feedback the contents count."""
    prompt, *feedback = columns_of(row, ["prompt", "privileged_context"], ["prompt"])
    context = feedback[0] if feedback else ""
    if isinstance(context, list):
        context = "\n".join(message["content"] for message in context if message["content"])
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    texts = {"prompt": question, "privileged_context": context, "solution": solution}
    text = fill(texts, template, set())
    teacher_row = copy.copy(row)
    teacher_row.pop("system", None)  # a prompt of messages has it by now
    teacher_row["prompt"] = text
    if isinstance(prompt, list):
        if prompt[-1]["role"] != "user":
            raise problem(row, "the template makes the teacher's last turn, so it must be a user's", prompt[-1],
                          "Leave the row out")  # fmt: skip
        teacher_row["prompt"] = [*prompt[:-1], {"role": "user", "content": text}]
    return teacher_row


# ---- rollout -------------------------------------------------------------------------------------
def rollout(sampler, prompts, reward_functions, place, args, run):
    """Complete and judge all prompts. Returns the groups of ALL ranks, on every rank, with advantages."""
    prompts = [group | {"place": number} for number, group in enumerate(prompts)]
    groups = prompts[run.dp_rank :: run.dp_size][run.rank % args.tp_size :: args.tp_size]  # what this rank samples
    sample_and_judge(run, sampler, groups, args.num_generations, reward_functions, place)
    groups = gather_groups(prompts, groups, run.group)
    set_completions(groups, "advantage", compute_advantages(reward_table(groups)))
    return groups


@torch.no_grad()
def refresh(sampler, policy):
    """Copy the policy's weights into the sampler, in place. full() gathers a sharded tensor (DTensor.full_tensor): a
    collective, so all ranks do it in the same order."""
    weights = own_tensors(policy.lm)
    for name, tensor in own_tensors(sampler.lm).items():
        tensor.copy_(full(weights[name]))


def add_teachers(groups, tokenizer, args):
    """Return the groups cut up by what teachers read: a completion is taught with the first other one of its prompt
    that is a solution and fits in --max_length. completion["taught"] is 1.0, or 0.0 without a solution and feedback."""
    cut_groups = []
    for group in groups:
        completions, row = group["completions"], group["columns"]
        prompts = {}  # of two solutions, by their index: the teacher's prompt that shows it
        for k, completion in enumerate(completions):
            if completion["reward"] >= args.success_reward_threshold and len(prompts) < 2:
                solution = tokenizer.decode(list(completion["ids"]), skip_special_tokens=True)
                teacher_row = with_context(row, args.teacher_prompt_template, solution)
                prompt = encode_prompt(teacher_row, tokenizer, (), json.loads(args.chat_template_kwargs))["prompt"]
                if len(prompt) + args.max_completion_length <= args.max_length:
                    prompts[k] = prompt
        learners = defaultdict(list)  # by the index of the solution that they are shown
        for k, completion in enumerate(completions):
            others = [index for index in prompts if index != k]  # nobody learns from itself
            shown = others[0] if others else None
            completion["taught"] = float(shown is not None or bool(row.get("privileged_context")))
            learners[shown].append(completion)
        for shown, members in learners.items():
            teacher_prompt = prompts.get(shown, group["teacher_prompt"])
            cut_groups.append({**group, "teacher_prompt": teacher_prompt, "completions": members})
    return cut_groups


def sampling_metrics(groups, args):
    """Return what rewards say, and the shares of completions that are solutions, and that are taught."""
    completions = [completion for group in groups for completion in group["completions"]]
    return rollout_metrics(groups) | {
        "success_frac": sum(c["reward"] >= args.success_reward_threshold for c in completions) / len(completions),
        "reprompted_frac": sum(c["taught"] for c in completions) / len(completions),
    }


def check_rollout(run, step, metrics):
    """SDPO001, GRPO002-004, TEACH003: completions nobody teaches, cut or not judged; another sampler; a collapse."""
    if step > 0:
        step += 1  # the first rollout is judged before step 1
    check(
        run, "SDPO001", step=step, metric="untaught_frac", value=1 - metrics["reprompted_frac"], warn=0.8, error=0.999,
        patience=10, message="completions have neither a solution beside them nor feedback: nobody teaches them",
    )
    length = run.args.max_completion_length
    check(
        run, "GRPO002", step=step, metric="truncated_frac", value=metrics["truncated_frac"], warn=0.5, error=0.95,
        patience=1 if metrics["truncated_frac"] == 1 else 3, message="no stop token",
        fix=("--max_completion_length", length, 2 * length),
    )
    check_rewards(run, "GRPO003", step=step, metric="no_reward_frac", share=metrics["no_reward_frac"])
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
def load_teacher(run, lm, policy, tokenizer, groups):
    """Return the teacher, and a sentence for the plan. live: the policy. Else the starting model once more, sharded as
    the policy is, without gradients: base in --dtype, ema in fp32, for its updates are smaller than bfloat16 rounds."""
    args = run.args
    kind = args.teacher_model_kind
    if kind == "live":
        return policy, "; teacher: the policy itself"
    lm.requires_grad_(False)
    if kind == "base":
        for parameter in lm.parameters():  # not the buffers: rotary tables stay fp32
            parameter.data = parameter.to(run.dtype)
    size = sum(parameter.nbytes for parameter in lm.parameters()) * args.replicate_size / run.world
    check_fits(f"--teacher_model_kind {kind}: its share of the weights takes", size)
    teacher = load_weights(run, shard(Policy(lm, args.temperature), run))
    check_model(run, teacher, tokenizer, teacher_groups(groups))
    return teacher, f"; teacher: {kind}, {size / 1e9:.2f} GB a rank"


@torch.no_grad()
def attach_head(run, policy, teacher):
    """Set policy.teacher, the teacher's head, whole on every rank: the student's forward and backward need it where
    FSDP2 has it in parts. A collective."""
    args = run.args
    top_k = args.loss_top_k if args.distillation_mode == "topk_logits" else 0
    weight, bias = whole_head(run, teacher, len(teacher.head().weight))
    policy.teacher = Teacher(weight, bias, teacher.transform, args.beta, top_k, alone=True)


@torch.no_grad()
def follow(run, policy, teacher, step):
    """Let the teacher follow the policy after `step` updates of it, and take its new head."""
    args = run.args
    if args.teacher_model_kind == "ema" and step % args.teacher_sync_steps == 0:
        for average, parameter in zip(teacher.parameters(), policy.parameters()):
            local(average).lerp_(local(parameter), args.teacher_update_rate)
    if args.teacher_model_kind != "base":
        attach_head(run, policy, teacher)


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
    vocabulary = lm.get_input_embeddings().num_embeddings
    if args.distillation_mode == "topk_logits" and args.loss_top_k > vocabulary:
        raise InputError(f"--loss_top_k {args.loss_top_k}: the vocabulary has {vocabulary} tokens.")
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
    reward_functions = load_rewards(args, train, tokenizer)
    sampler = Sampler(run, lm, tokenizer, stops)  # an unsharded copy
    teacher_lm = copy.deepcopy(lm)
    policy = load_weights(run, shard(Policy(lm, args.temperature), run))  # every rank reads its own slices of the files
    check_model(run, policy, tokenizer, train + heldout)  # MODEL001: the same log-probs as the model's own forward
    teacher, sentence = load_teacher(run, teacher_lm, policy, tokenizer, train + heldout)
    sampler.start_engine()
    most_tokens = longest(train, args.num_generations * args.max_completion_length)
    memory = fit_memory(run, policy, tokenizer, most_tokens) + sentence
    # ---- optimizer -------------------------------------------------------------------------------
    parameters = param_groups(policy, args.weight_decay)  # matrices decay; norms and biases do not
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=betas, eps=1e-8, fused=True)
    # ---- resume ----------------------------------------------------------------------------------
    models, optimizers = {"policy": policy}, {"policy": optimizer}
    if args.teacher_model_kind == "ema":
        models["teacher"] = teacher
    resume(run, models, optimizers, tokenizer)
    attach_head(run, policy, teacher)
    print_plan(run, policy, tokenizer, train=train, heldout=heldout, counts=counts, steps=steps, memory=memory)
    # ---- loop ------------------------------------------------------------------------------------
    if heldout and run.step == 0:
        log_eval(run, 0, evaluate(policy, sampler, heldout, reward_functions, 0, args, run), steps)
    for step in range(run.step, steps):
        started = time.perf_counter()
        # ---- rollout -----------------------------------------------------------------------------
        rows = order(len(train), args.seed, step * args.batch_size, args.batch_size)
        refresh(sampler, policy)
        step_groups = rollout(sampler, [train[row] for row in rows], reward_functions, ("train", step), args, run)
        write_samples(run, step + 1, step_groups, tokenizer)
        rollout_seconds = time.perf_counter() - started
        # ---- step --------------------------------------------------------------------------------
        cut_groups = add_teachers(step_groups, tokenizer, args)
        trained = [group for group in cut_groups if group["completions"][0]["taught"]]  # all of a group are, or none
        if args.distillation_weight < 1:
            trained = cut_groups  # advantages need no teacher
        computed = trained or cut_groups  # a sampler that writes nonsense, and solves nothing, must not go unnoticed
        groups = share(run, computed)  # this rank's groups
        num_tokens = count_scored(computed)  # of all ranks
        num_completions = len(step_groups) * args.num_generations
        totals = defaultdict(float)
        for batch in micro_batches(run, groups, spare=computed[0]):
            out = forward(policy, teacher, batch)
            loss = batch["weight"] * sdpo_loss(out, batch, num_tokens, num_completions, args)
            (loss * run.dp_size).backward()  # a part of a global mean; FSDP2 averages over ranks
            totals["loss"] += loss.detach()
            totals["entropy"] += batch["weight"] * out["entropy"].sum() / num_tokens
            gap = (out["logprobs"].detach() - batch["sampler_logprobs"]).abs()
            totals["sampler_gap"] += batch["weight"] * gap.sum() / num_tokens
        sums = dict(zip(totals, all_sum(run, *totals.values())))
        metrics = {"loss": sums["loss"], "num_tokens": num_tokens} | sampling_metrics(step_groups, args)
        metrics |= {"entropy": sums["entropy"], "sampler_gap": sums["sampler_gap"]}
        metrics["perf/rollout_seconds"] = rollout_seconds
        check_rollout(run, step, metrics)
        # ---- update ------------------------------------------------------------------------------
        for parameter in partial_parameters(policy):  # whole under tensor parallelism: each rank has its heads' part
            dist.all_reduce(local(parameter.grad), group=run.mesh["tp"].get_group())
        metrics["grad_norm"] = clip_grad_norm(run, policy, args.max_grad_norm)
        metrics["lr"] = args.learning_rate * schedule(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = metrics["lr"]
        if trained and metrics["no_reward_frac"] < 1:  # else neither the weights nor Adam's moments move
            if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):  # all ranks step, or none
                optimizer.step()
            check_update(run, step, policy, groups, metrics)  # TRAIN001-003
        optimizer.zero_grad(set_to_none=True)
        follow(run, policy, teacher, step + 1)
        # ---- log ---------------------------------------------------------------------------------
        log(run, step + 1, metrics | performance(started, groups), steps)
        # ---- eval --------------------------------------------------------------------------------
        if heldout and is_due(step + 1, steps, args.eval_every):
            log_eval(run, step + 1, evaluate(policy, sampler, heldout, reward_functions, step + 1, args, run), steps)
        # ---- save --------------------------------------------------------------------------------
        save_or_stop(run, step + 1, steps, models, optimizers, tokenizer)
    # ---- finish ----------------------------------------------------------------------------------
    finish(run, policy, tokenizer, heldout or train)


if __name__ == "__main__":
    launch(main, args, __file__)
