"""Log-probs of the scored tokens of a flat batch, without padding and without a (tokens, vocabulary) tensor.

The model's layers run on one row of tokens (common/attention.py), so the hidden states of a shared prompt are computed
once. Only scored rows reach the language-model head; logits exist one chunk of rows at a time, and backward computes
them again. There are M scored tokens and S completions; V is the vocabulary, D the hidden size. Log-probs are in nats.
"""
from collections import defaultdict
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from common.attention import ATTENTION, runs_flat, select_rows
from common.batches import scored_flags
from common.divergence import divergence, divergence_slope
from common.head import HeadGradients, row_log_probs, row_pieces
from common.runtime.flags import InputError
from common.runtime.model import check_config, stored_tensors
from common.runtime.parallel import local

# fp32 logits in a chunk, in numbers: 64 MiB on a CPU; 1 GiB on a GPU, enough rows to keep its matrix units busy.
CHUNK = {"cpu": 2**24, "cuda": 2**28}
OUTPUTS = ("logprobs", "mean_logprob", "sum_p2", "entropy", "correct", "divergence", "teacher_logprobs")


class ScoredHead(torch.autograd.Function):
    """hidden (M, D) and labels (M,) become OUTPUTS, each (M,), or None where it is not in `want`.

    The logits are z = cap * tanh(scale * (h W^T + b) / cap) / temperature, without the tanh if cap is 0; `transform` is
    (scale, cap, temperature). With p = softmax(z), y the label and e_y the vector that is 1 at y and 0 elsewhere, the
    outputs of a row and their gradients with respect to z are

        logprobs          log p_y                      e_y - p
        mean_logprob      1/V sum_v log p_v            1/V - p
        sum_p2            s = sum_v p_v^2              2 p (p - s)
        entropy           H = -sum_v p_v log p_v       -p (log p + H)
        correct           whether y is the arg-max     none
        divergence        of p from q, the teacher's   see common/divergence.py
        teacher_logprobs  log q_y                      none

    The last two are there if there is a teacher. Under tensor parallelism W and b are this rank's rows of the
    vocabulary, which the ranks of `group` share; only numbers per scored token are exchanged. Gradients of W and b are
    summed over chunks in fp32."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, transform, want, group=None, teacher=None):
        models = 2 if teacher else 1
        ctx.rows = max(1, CHUNK.get(hidden.device.type, 2**28) // (models * len(weight)))  # of a chunk
        ctx.transform, ctx.group, ctx.teacher = transform, group, teacher
        if group:
            labels = labels - len(weight) * dist.get_rank(group)  # the labels' rows of W, where this rank has them
        chunks = defaultdict(list)
        for start in range(0, max(1, len(labels)), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            logp = logq = slope = None  # frees the chunk before
            logp, logq, slope = _both_log_probs(ctx, hidden, weight, bias, chunk)
            column, is_here = _label_columns(labels[chunk], len(weight))
            log_p_y = logp.gather(1, column) * is_here  # 0 where another rank has the label
            chunks["logprobs"].append(log_p_y[:, 0])
            if "mean_logprob" in want:
                chunks["mean_logprob"].append(logp.mean(-1))
            if "sum_p2" in want:
                probabilities = (part.exp() for part in row_pieces(logp))
                chunks["sum_p2"] += [torch.linalg.vecdot(p, p) for p in probabilities]
            if "entropy" in want:
                chunks["entropy"] += [-torch.linalg.vecdot(part.exp(), part) for part in row_pieces(logp)]
            if "correct" in want:
                chunks["highest"].append(logp.amax(-1))
            if teacher:
                chunks["divergence"].append(divergence(logp, logq, teacher))
                chunks["teacher_logprobs"].append((logq.gather(1, column) * is_here)[:, 0])
        out = {name: torch.cat(pieces) for name, pieces in chunks.items()}
        if group:  # the vocabulary's numbers from those of each rank's part of it
            for name, values in out.items():
                dist.all_reduce(values, dist.ReduceOp.MAX if name == "highest" else dist.ReduceOp.SUM, group)
            if "mean_logprob" in want:
                out["mean_logprob"] /= group.size()
        if "correct" in want:
            out["correct"] = out["logprobs"] == out["highest"]
        ctx.mark_non_differentiable(*[out[name] for name in ("correct", "teacher_logprobs") if name in out])
        ctx.last_chunk = logp, logq, slope  # backward begins with it, and would need as much memory to compute it again
        ctx.save_for_backward(hidden, weight, bias, labels, out.get("sum_p2"), out.get("entropy"))
        ctx.set_materialize_grads(False)  # backward gets None for an output that the loss does not use
        return tuple(out.get(name) for name in OUTPUTS)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *d_outputs):
        hidden, weight, bias, labels, sum_p2, entropy = ctx.saved_tensors
        grads = {name: grad[:, None] for name, grad in zip(OUTPUTS, d_outputs) if grad is not None}
        if "logprobs" not in grads:
            grads["logprobs"] = torch.zeros_like(labels[:, None], dtype=torch.float32)
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad)
        for start in reversed(range(0, len(labels), ctx.rows)):
            chunk = slice(start, start + ctx.rows)
            logp, logq, slope = ctx.last_chunk
            ctx.last_chunk = None, None, None
            if logp is None:
                logp, logq, slope = _both_log_probs(ctx, hidden, weight, bias, chunk)
            # d loss / d z
            from_teacher = None
            if "divergence" in grads:
                from_teacher = divergence_slope(logp, logq, ctx.teacher, ctx.group) * grads["divergence"][chunk]
            d_z = _multiple_of_p(logp, grads, sum_p2, entropy, chunk)
            if from_teacher is not None:
                d_z += from_teacher
            column, is_here = _label_columns(labels[chunk], len(weight))
            d_z.scatter_add_(1, column, grads["logprobs"][chunk] * is_here)  # log p_y: the entry of e_y
            if "mean_logprob" in grads:  # 1/V in every column
                vocabulary = len(weight) * (ctx.group.size() if ctx.group else 1)
                d_z += grads["mean_logprob"][chunk] / vocabulary
            gradients.add(d_z, slope, chunk)
        if ctx.group:
            dist.all_reduce(gradients.d_hidden, group=ctx.group)  # each rank has the share of its own rows of W
        return *gradients.all(), *[None] * 5  # autograd rounds them to the dtypes of the inputs


def _both_log_probs(ctx, hidden, weight, bias, chunk):
    """Return `row_log_probs` of a chunk of rows, with the teacher's log q, or None, in the middle."""
    logp, slope = row_log_probs(hidden[chunk], weight, bias, ctx.transform, ctx.group)
    teacher = ctx.teacher
    if not teacher:
        return logp, None, slope
    logq, _ = row_log_probs(teacher.hidden[chunk], teacher.weight, teacher.bias, teacher.transform, ctx.group)
    return logp, logq, slope


def _label_columns(labels, num_columns):
    """Return the labels' columns among those of this rank, and whether they are among them, both (rows, 1)."""
    column = labels[:, None]
    is_here = (column >= 0) & (column < num_columns)
    return column.clamp(0, num_columns - 1), is_here


def _multiple_of_p(logp, grads, sum_p2, entropy, chunk):
    """Return what of d loss / d z is p times something, in the memory of logp unless the entropy still needs that."""
    p = logp.exp() if "entropy" in grads else logp.exp_()
    factor = grads["logprobs"][chunk]  # log p_y: e_y - p
    if "mean_logprob" in grads:  # 1/V - p
        factor = factor + grads["mean_logprob"][chunk]
    factor = -factor
    if "sum_p2" in grads:  # 2 p (p - s)
        factor = factor + 2 * grads["sum_p2"][chunk] * (p - sum_p2[chunk, None])
    if "entropy" in grads:  # -p (log p + H)
        factor = factor - grads["entropy"][chunk] * logp.add_(entropy[chunk, None])
    return p.mul_(factor)


class Policy(nn.Module):
    """A causal language model as a function from a flat batch to log-probs of its scored tokens; the root module for
    fully_shard, since the head belongs to it. road is "flat", or "padded" for models that runs_flat refuses: there
    completions are right-padded rows with prompts of their own, in the model's attention, which never looks right."""

    output = "logprobs"  # the output that is always there
    new = frozenset()  # weights that a model folder may lack
    auto_class = AutoModelForCausalLM
    head_config = {}  # what auto_class must be told about the head
    teacher = None  # a Teacher, where the script sets one
    stays_whole = False  # weights and gradients do, from a step's first micro-batch to its last: see fit_memory

    def __init__(self, lm, temperature=1.0):
        super().__init__()
        self.lm = lm
        self.temperature = temperature
        if not isinstance(self.head(), nn.Linear):
            raise InputError(f"{type(lm).__name__} has no linear head: --model must be a causal language model")
        # What ForCausalLM.forward does after the head. It is not these names that decide, which may mean two things in
        # two families, but the comparison with plain_forward before step 1. A missing number is None or 0.
        config = lm.config.get_text_config()
        names = "logit_scale", "lm_head_multiplier", "logits_scaling"
        factor, multiplier, divisor = [getattr(config, name, None) or 1.0 for name in names]
        cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None) or 0.0
        self.transform = factor * multiplier / divisor, cap, temperature
        self.plain_implementation = lm.config._attn_implementation
        # lm may move to the GPU after this line: the machine counts, not where the weights are now.
        flat = runs_flat(lm, "cuda" if torch.cuda.is_available() else "cpu")
        self.road = "flat" if flat else "padded"
        if flat:
            lm.config._attn_implementation = ATTENTION  # set_attn_implementation would look for a package of this name
        self.implementation = lm.config._attn_implementation

    def __call__(self, batch, want=()):
        if isinstance(self, FSDPModule):
            is_last = batch.get("is_last", True)
            self.set_requires_all_reduce(is_last)  # copies of the model (--replicate_size) exchange once a step
            if self.stays_whole:
                self.set_requires_gradient_sync(is_last)
                self.set_reshard_after_backward(is_last)
                self.set_reshard_after_forward(not torch.is_grad_enabled())
        # FSDP2 walks through all lists that a forward is given: 0.2 s for the flags of 16,000 tokens.
        without_lists = {name: value for name, value in batch.items() if not isinstance(value, list)}
        return super().__call__(without_lists, want)

    def forward(self, batch, want=()):
        """Return a dict of "logprobs" and what of OUTPUTS is in `want`, (M,) fp32 each, at the policy's temperature.
        "correct", bool, and "teacher_logprobs" have no gradient. "divergence" comes with the latter, needs
        policy.teacher and in the batch teacher_hidden (M, D'). want ["hidden"]: what the head would read, (M, D)."""
        if not set(want) <= {*OUTPUTS, "hidden"}:
            raise ValueError(f"want {want} must be some of {', '.join(OUTPUTS)}")
        implementation = self.lm.config._attn_implementation
        if implementation != self.implementation:
            raise InputError(f"the model's attention became {implementation}, which would ignore where completions "
                             f"end and return wrong numbers: it must stay {self.implementation}")
        if self.road == "padded":
            inputs, rows = self._padded(batch)
        else:
            inputs = {name: batch[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_q", "max_k", "kv_index")}
            inputs["input_ids"] = batch["input_ids"][None]
            inputs["position_ids"] = batch["position_ids"][None]
            rows = batch["rows"]
        backbone = self.lm.base_model if self.lm.base_model is not self.lm else self.lm.model  # Llama-4's has no name
        hidden = select_rows(backbone(use_cache=False, **inputs).last_hidden_state.flatten(0, 1), rows)
        return {"hidden": hidden} if "hidden" in want else self.read(hidden, batch, want)

    def _padded(self, batch):
        """Return the model's inputs, S rows of [prompt + completion + padding], and the rows that predict."""
        ids = batch["input_ids"]
        if batch["kv_index"] is not None:
            ids = ids[batch["kv_index"]]  # the prompt's before those of every completion
        segments = ids.split(batch["cu_seqlens_k"].diff().tolist())
        sequences = [segments[segment] for segment in batch["seq_segment"].tolist()]
        padded = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        columns = batch["position_ids"][batch["rows"]]
        return {"input_ids": padded}, batch["seq"] * padded.shape[1] + columns

    def head(self):
        return self.lm.get_output_embeddings()

    def read(self, hidden, batch, want):
        """Return the outputs of the head for hidden states (M, D)."""
        head = self.head()
        group = None
        if isinstance(head.weight, DTensor):  # tensor parallelism shards it over the vocabulary
            group = head.weight.device_mesh.get_group()
        weight, bias = local(head.weight), local(head.bias)
        teacher = None
        if "divergence" in want:
            teacher = replace(self.teacher, hidden=batch["teacher_hidden"])
            columns = len(teacher.weight)
            if columns < len(weight):  # a vocabulary that is padded further: softmax is over what both have
                weight, bias = weight[:columns], None if bias is None else bias[:columns]
        out = ScoredHead.apply(hidden, weight, bias, batch["labels"], self.transform, want, group, teacher)
        return {name: values for name, values in zip(OUTPUTS, out) if values is not None}

    def plain_forward(self, groups):
        """Return plain_answer of the groups in the model's own attention. FSDP2 gathers weights around forward only: a
        sharded policy needs register_fsdp_forward_method for this method, and the same groups on every rank."""
        self.lm.config._attn_implementation = self.plain_implementation
        answer = self.plain_answer(self.lm, groups)
        self.lm.config._attn_implementation = self.implementation
        return answer

    def plain_answer(self, lm, groups):
        """Return lm's log-probs (M,) of the groups, one sequence at a time, in whatever attention lm has."""
        return plain_logprobs(lm, groups, self.temperature)


class Scorer(Policy):
    """A sequence classifier of one label as a function from a flat batch to {"rewards": (S,)}, fp32. Its head `score`
    reads the last token of each completion, its end-of-turn token, as the classifier itself does."""

    kind = "sequence classifier with one label"
    output = "rewards"
    new = frozenset({"score.weight"})
    auto_class = AutoModelForSequenceClassification
    head_config = {"num_labels": 1}

    def forward(self, batch, want=()):
        last = batch["cu_seqlens_q"][batch["seq_segment"] + 1].long() - 1
        every_seq = torch.arange(len(last), device=last.device)
        return super().forward({**batch, "rows": last, "seq": every_seq}, want)

    def head(self):
        return getattr(self.lm, "score", None)

    def read(self, hidden, batch, want):
        return {"rewards": hidden.float() @ self.head().weight[0].float()}

    @torch.no_grad()
    def plain_answer(self, lm, groups):
        """Return lm's scores (S,) of the groups, one sequence at a time."""
        return torch.cat([logits for *_, logits in plain_logits(lm, groups)])


def load_judge(policy_class, folder, dtype):
    """Return a policy of this class, a trained classifier's, in a folder: all of it on this rank's device. It judges,
    and is not trained."""
    check_config(folder, stored_tensors(folder))
    lm, info = policy_class.auto_class.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if info["missing_keys"] or lm.config.num_labels != policy_class.head_config["num_labels"]:
        raise ValueError(f"it is no {policy_class.kind}")
    device = torch.device("cpu")
    if torch.cuda.is_available():  # with its number: the thread that judges has a current device of its own, 0
        device = torch.device("cuda", torch.cuda.current_device())
    return policy_class(lm.to(device))


def plain_logits(lm, groups):
    """Yield (group, completion, ids, logits) from lm(ids) of one sequence at a time: nothing is shared or flat."""
    for group in groups:
        for completion in group["completions"]:
            ids = torch.tensor([*group["prompt"], *completion["ids"]], device=lm.device)
            yield group, completion, ids, lm(ids[None], use_cache=False).logits[0].float()


@torch.no_grad()
def plain_logprobs(lm, groups, temperature=1.0):
    """Return log-probs (M,), fp32, in flat_batch's order. Call it before Policy(lm), which replaces the attention."""
    out = []
    for group, completion, ids, logits in plain_logits(lm, groups):
        scored = [False] * len(group["prompt"]) + scored_flags(completion)
        # Row i of the logits predicts token i + 1, and nothing predicts the first.
        rows = torch.tensor(scored[1:], device=lm.device).nonzero()[:, 0]
        logp = (logits / temperature).log_softmax(-1)
        out.append(logp[rows, ids[rows + 1]])
    return torch.cat(out)
