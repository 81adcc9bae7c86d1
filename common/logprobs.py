"""Log-probs of the scored tokens of a flat batch: attention without padding, a language-model head without logits.

`Policy(lm)` wraps a Hugging Face causal language model. A batch is one row of tokens cut into segments (`flat_batch` in
`common/tokenization.py`); completions of one prompt share its tokens. Hidden states are computed once per token, only
scored rows reach the head, a chunk at a time, and backward recomputes each chunk.

N tokens, M scored tokens, S completions, V vocabulary, D hidden size; log-probs and entropies in nats, always fp32.
"""
import inspect
from array import array
from collections import defaultdict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.generation.continuous_batching import PagedAttentionCache

from common.tokenization import InputError

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # never required: torch's own kernel lacks only the soft-cap
    flash_attn_varlen_func = None

ATTENTION = "flash_varlen"
PAGED = "flash_paged"  # continuous batching builds no mask for a name with "flash", and records CUDA graphs
CHUNK = {"cpu": 2**24, "cuda": 2**28}  # fp32 logits of a chunk: 64 MiB; 1 GiB, enough rows to keep a GPU's GEMM busy
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}  # torch 2.11 implies it


# ---- attention -------------------------------------------------------------------------------------------------------

def flat_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
                   softcap=None, s_aux=None, cu_seqlens_q=None, cu_seqlens_k=None, max_q=None, max_k=None,
                   kv_index=None, decoder=None, position_ids=None, use_cache=None, output_router_logits=None,
                   **unknown):
    """Causal attention inside the segments of one flat row; the model's layers call it (AttentionInterface).

    query (1, H, N, d), key (1, H_kv, N, d), value (1, H_kv, N, d_v). Segment i: queries cu_seqlens_q[i] to [i + 1] over
    the tokens kv_index[cu_seqlens_k[i]:cu_seqlens_k[i + 1]] (None: their own). Both end together: query r of n_q sees
    the keys up to r + n_k - n_q, of these the last `sliding_window`. s_aux (H,): a logit per head that only takes
    probability away. decoder: keeps keys and values, and attends (common/decoding.py). Returns (1, N, H, d_v), None.
    InputError where the layout is missing or more is asked for."""
    unknown = [name for name, x in unknown.items() if x is not None]
    if (cu_seqlens_q is None and decoder is None) or attention_mask is not None or dropout or unknown:
        raise InputError(f"{type(module).__name__} cannot run on flat batches, use another --model (segment borders: "
                         f"{cu_seqlens_q is not None}, mask: {attention_mask is not None}, {dropout=}, {unknown=})")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, d)
    if kv_index is not None:
        key, value = _take(key, kv_index), _take(value, kv_index)
    how = {"scaling": query.shape[-1] ** -0.5 if scaling is None else scaling, "window": sliding_window,
           "softcap": softcap, "sinks": s_aux}
    if decoder is not None:
        return decoder.attend_to(module.layer_idx, query, key, value, **how)[None], None
    # the fused kernels exist for half precision only
    flat = _fused_attention if query.is_cuda and query.dtype != torch.float32 else _segment_attention
    return flat(query, key, value, (cu_seqlens_q, cu_seqlens_k, max_q, max_k), **how)[None], None


def _take(x, index):
    """x[index] as an embedding, whose backward sums repeated rows two to three times as fast as index_select's."""
    return F.embedding(index, x.flatten(1)).view(-1, *x.shape[1:])


def _fused_attention(query, key, value, layout, scaling, window, softcap, sinks):
    if sinks is not None or (softcap and flash_attn_varlen_func is None):
        raise InputError("no fused kernel has attention sinks, only flash_attn has soft-caps: use another --model")
    d_v, width = value.shape[-1], -(-query.shape[-1] // 8) * 8  # zeros up to one width for all, a multiple of 8
    query, key, value = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    window = (-1 if window is None else window - 1, 0)  # keys to the left (the own one is not counted), to the right
    if softcap:
        out = flash_attn_varlen_func(query, key, value, *layout, softmax_scale=scaling, causal=True, window_size=window,
                                     softcap=softcap)
    else:
        out = varlen_attn(query, key, value, *layout, scale=scaling, window_size=window, **GQA)
    return out[..., :d_v]


def _lengths(cu_seqlens):
    return cu_seqlens.diff().tolist()


@torch.compiler.disable  # a loop over segments would be compiled again for every batch
def _segment_attention(query, key, value, layout, **how):
    """Equal shapes in one call. split, because the backward of each slice x[a:b] allocates a gradient as large as x."""
    n_q, n_k = map(_lengths, layout[:2])
    pieces = query.split(n_q), key.split(n_k), value.split(n_k)
    same_shape, out = defaultdict(list), [None] * len(n_q)
    for i, shape in enumerate(zip(n_q, n_k)):
        same_shape[shape].append(i)
    for members in same_shape.values():
        q, k, v = (torch.stack([x[i] for i in members]).transpose(1, 2) for x in pieces)
        for i, piece in zip(members, attend(q, k, v, **how).transpose(1, 2).unbind()):
            out[i] = piece
    return torch.cat(out)


def attend(q, k, v, scaling, window, softcap, sinks):
    """Segments of one shape, (segments, heads, tokens, d) -> (segments, H, n_q, d_v); k and v may have fewer heads."""
    n_q, n_k, mask = q.shape[2], k.shape[2], None
    explicit = bool(softcap) or sinks is not None
    if explicit or 1 < n_q < n_k or (window or n_k) < n_k:
        age = torch.arange(n_k - n_q, n_k, device=q.device)[:, None] - torch.arange(n_k, device=q.device)
        mask = (age >= 0) & (age < (window or n_k))  # (n_q, n_k), True: seen
    if not explicit and n_q == 1 and mask is None:  # heads that share keys become queries: the keys are read once
        out = F.scaled_dot_product_attention(q.reshape(len(q), k.shape[1], -1, q.shape[3]), k, v, scale=scaling)
        return out.reshape(*q.shape[:3], -1)
    if not explicit:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling,
                                              enable_gqa=q.shape[1] != k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).float() * scaling
    scores = (softcap * (scores / softcap).tanh() if softcap else scores).masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(-1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    return scores.softmax(-1)[..., :n_k].to(v.dtype) @ v


AttentionInterface.register(ATTENTION, flat_attention)


def paged_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, cache=None,
                    logits_indices=None, logits_processor_args=None, is_causal=None, **layout):
    """flat_attention in the layout of transformers' continuous batching: the cache keeps the new keys and values, and
    returns those of every sequence from its first token on. Rows past the last segment are padding: not computed."""
    names = "cu_seq_lens_k", "max_length_k", "read_index", "write_index", "block_table"
    own = {name: layout.pop(name) for name in names}  # update() replaces what is kept per kind of layer by this layer's
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=own)
    return flat_attention(module, query, key, value, attention_mask, cu_seqlens_q=cu_seq_lens_q,
                          cu_seqlens_k=own["cu_seq_lens_k"], max_q=max_length_q, max_k=own["max_length_k"], **layout)


AttentionInterface.register(PAGED, paged_attention)


def runs_paged(lm, device_type):
    """True when continuous batching can use paged_attention: as of transformers 5.20 the cache takes such keywords."""
    return runs_flat(lm, device_type) and "kwargs" in inspect.signature(PagedAttentionCache.update).parameters


def runs_flat(lm, device_type):
    """True when tokens meet only inside flat_attention: no recurrent state, convolution or chunked mask. On CUDA also
    neither sinks nor, without flash_attn, soft-caps: torch's kernel has no gradient for what could replace them."""
    config = lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    fused = flash_attn_varlen_func if getattr(config, "attn_logit_softcapping", None) else lm._supports_sdpa
    flat = lm._supports_attention_backend and not lm._is_stateful and kinds <= {"full_attention", "sliding_attention"}
    return bool(flat and (fused or device_type != "cuda"))


def refuse_rotary(config, max_length):
    """InputError for rotary tables that the longest row changes for its whole batch, if rows may get that long."""
    config = config.get_text_config()
    tables = getattr(config, "rope_parameters", None) or {}
    for table in [x for x in tables.values() if isinstance(x, dict)] or [tables]:  # one per kind of layer, or just one
        kind = table.get("rope_type")
        limit = {"longrope": table.get("original_max_position_embeddings"),
                 "dynamic": getattr(config, "max_position_embeddings", None)}.get(kind)
        if limit is not None and max_length > limit:
            raise InputError(f"{kind} rotary embeddings change for a whole batch when one row passes {limit} tokens: "
                             f"--max_length {max_length} must be at most {limit}")


# ---- head ------------------------------------------------------------------------------------------------------------

OUTPUTS = ("logprobs", "mean_logprob", "topk", "sum_p2", "entropy", "topk_ids", "correct")


class ScoredHead(torch.autograd.Function):
    """hidden (M, D), labels (M,) -> OUTPUTS of p = softmax(z / temperature), z = cap * tanh(scale * (h W^T + b) / cap)
    (cap 0: no tanh), each (M,) or (M, topk), None if not in `want`. Weight gradients are summed in fp32. The gradients
    of a row with respect to z / temperature, where e_y is 1 at y and 0 elsewhere:

        logprobs = log p_y     e_y - p      sum_p2 s = sum p^2          2 p (p - s)
        topk = log p_k         e_k - p      entropy H = -sum p log p    -p (log p + H)
        mean_logprob           1/V - p      (the mean of log p over the vocabulary)

    group: W and b are this rank's V / len(group) rows of the vocabulary; only numbers per scored token are exchanged.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, shape, want, topk, group=None):
        rows, out = max(1, CHUNK.get(hidden.device.type, 2**28) // len(weight)), defaultdict(list)
        first = len(weight) * dist.get_rank(group) if group else 0  # of this rank's rows in the whole vocabulary
        for h, y in zip(hidden.split(rows), labels.split(rows)):
            z, slope = _logits(h, weight, bias, *shape)
            logp = _log_softmax(z, group)
            at, own = _own(y, first, len(weight))
            out["logprobs"].append(logp.gather(1, at[:, None])[:, 0] * own)
            if "mean_logprob" in want:
                out["mean_logprob"].append(logp.mean(-1))
            if "correct" in want:
                out["correct"].append(logp.amax(-1))
            if "topk" in want:
                for name, x in zip(("topk", "topk_ids"), logp.topk(min(topk, len(weight)))):
                    out[name].append(x)
            for part in _parts(logp) if "sum_p2" in want or "entropy" in want else ():
                p = part.exp()
                if "sum_p2" in want:
                    out["sum_p2"].append(torch.linalg.vecdot(p, p))
                if "entropy" in want:
                    out["entropy"].append(-torch.linalg.vecdot(p, part))
        out = {name: torch.cat(chunks) for name, chunks in out.items()}
        if "topk" in want and group:
            values, ids = (_gather(x, group) for x in (out["topk"], out["topk_ids"] + first))
            out["topk"], at = values.topk(topk)
            out["topk_ids"] = ids.gather(1, at)
        for name in out.keys() - {"topk", "topk_ids"} if group else ():
            dist.all_reduce(out[name], dist.ReduceOp.MAX if name == "correct" else dist.ReduceOp.SUM, group)
        if "mean_logprob" in want and group:
            out["mean_logprob"] /= group.size()
        if "correct" in want:
            out["correct"] = out["logprobs"] == out["correct"]
        ctx.rows, ctx.shape, ctx.group, ctx.first = rows, shape, group, first
        ctx.last = logp, slope  # backward begins with this chunk, and would need as much memory to compute it again
        ctx.save_for_backward(hidden, weight, bias, labels, *(out.get(x) for x in ("topk_ids", "sum_p2", "entropy")))
        ctx.mark_non_differentiable(*(out[name] for name in ("topk_ids", "correct") if name in out))
        ctx.set_materialize_grads(False)  # None: nobody wants this gradient
        return tuple(out.get(name) for name in OUTPUTS)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logprobs, g_mean, g_topk, g_sum_p2, g_entropy, *_):
        hidden, weight, bias, labels, topk_ids, sum_p2, entropy = ctx.saved_tensors
        half, vocabulary = hidden.is_cuda and hidden.dtype != torch.float32, len(weight)
        g_logprobs = torch.zeros_like(labels, dtype=torch.float32) if g_logprobs is None else g_logprobs
        total = g_logprobs + (0 if g_mean is None else g_mean) + (0 if g_topk is None else g_topk.sum(-1))
        d_hidden, d_weight, d_bias = (
            torch.zeros_like(x, dtype=torch.float32 if x is not hidden else None) if wanted else None
            for x, wanted in zip((hidden, weight, bias), ctx.needs_input_grad))
        for i in reversed(range(0, len(labels), ctx.rows)):
            part, (logp, slope), ctx.last = slice(i, i + ctx.rows), ctx.last, (None, None)
            if logp is None:
                z, slope = _logits(hidden[part], weight, bias, *ctx.shape)
                logp, z = _log_softmax(z, ctx.group), None
            p = logp.exp_() if g_entropy is None else logp.exp()
            factor = -total[part, None]  # d_z is p times this, plus single entries
            if g_sum_p2 is not None:
                factor = factor + 2 * g_sum_p2[part, None] * (p - sum_p2[part, None])
            if g_entropy is not None:
                factor = factor - g_entropy[part, None] * logp.add_(entropy[part, None])
            at, own = _own(labels[part, None], ctx.first, vocabulary)
            d_z = p.mul_(factor).scatter_add_(1, at, g_logprobs[part, None] * own)
            if g_topk is not None:
                at, own = _own(topk_ids[part], ctx.first, vocabulary)
                d_z.scatter_add_(1, at, g_topk[part] * own)
            if g_mean is not None:
                d_z += g_mean[part, None] / (vocabulary * (ctx.group.size() if ctx.group else 1))
            if ctx.shape[1] or slope != 1:  # a cap: one number per logit
                d_z.mul_(slope)
            d_z = d_z.to(hidden.dtype) if half else d_z
            if d_bias is not None:
                d_bias += d_z.sum(0, dtype=torch.float32)
            if d_hidden is not None:
                d_hidden[part] = d_z @ weight.to(d_z.dtype)
            if d_weight is not None and half:
                torch.addmm(d_weight, d_z.T, hidden[part], out_dtype=torch.float32, out=d_weight)
            elif d_weight is not None:
                d_weight.addmm_(d_z.T, hidden[part].float())
        if d_hidden is not None and ctx.group:
            dist.all_reduce(d_hidden, group=ctx.group)  # every rank has its own columns' share
        return d_hidden, *(d if d is None else d.to(weight.dtype) for d in (d_weight, d_bias)), *[None] * 5


def _own(ids, first, count):
    """Ids of the whole vocabulary -> ids among this rank's `count` from `first` on, and whether they are among them."""
    at = ids - first
    return at.clamp(0, count - 1), (at >= 0) & (at < count)


def _gather(x, group):
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group)
    return torch.cat(parts, dim=-1)


def _parts(z):
    """A sixteenth of the rows at a time: a result that replaces them, or is a number each, needs no second chunk."""
    return z.split(max(1, len(z) // 16))


def _log_softmax(z, group):
    """Over all columns, in place; z has this rank's."""
    if not group:
        for part in _parts(z):
            part.copy_(part.log_softmax(-1))
        return z
    top = z.amax(-1, keepdim=True)
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    z.sub_(top)
    total = torch.cat([part.exp().sum(-1, keepdim=True) for part in _parts(z)])
    dist.all_reduce(total, group=group)
    return z.sub_(total.log_())


def _logits(hidden, weight, bias, scale, cap, temperature):
    """fp32 logits of a chunk (rows, V) in memory of their own, and their derivative by h W^T + b."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        z = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        z = hidden.float() @ weight.float().T
    z = z if bias is None else z.add_(bias)
    slope = scale / temperature
    if cap:
        z.mul_(scale / cap).tanh_()
        return z * (cap / temperature), z.square_().neg_().add_(1).mul_(slope)
    return z.mul_(slope) if slope != 1 else z, slope


# ---- policy ----------------------------------------------------------------------------------------------------------

class Policy(nn.Module):
    """`lm` as a function from a flat batch to log-probs of its scored tokens; the root module for fully_shard.

    road: "flat", or "padded" for models that runs_flat refuses. There every completion is a right-padded row with its
    own copy of the prompt, in the model's own attention; no mask, since a causal layer never looks to the right.
    output: the one that is always there. new: weights that a model folder may lack."""

    output, new = "logprobs", frozenset()

    def __init__(self, lm, temperature=1.0, topk=0):
        super().__init__()
        self.lm, self.topk = lm, topk
        if not isinstance(self.head(), nn.Linear):
            raise InputError(f"{type(lm).__name__} has no linear head: --model must be a causal language model")
        # What ForCausalLM.forward does after the head. One name may mean two things in two families, so the comparison
        # with reference_logprobs before step 1 decides, not this table.
        number = lambda name, absent: getattr(lm.config.get_text_config(), name, None) or absent  # noqa: E731
        scale = number("logit_scale", 1.0) * number("lm_head_multiplier", 1.0) / number("logits_scaling", 1.0)
        self.shape = scale, number("final_logit_softcapping", 0.0) or number("logits_soft_cap", 0.0), temperature
        # lm may move to the GPU after this line: the machine counts, not where the weights are now
        self.own = lm.config._attn_implementation
        self.road = "flat" if runs_flat(lm, "cuda" if torch.cuda.is_available() else "cpu") else "padded"
        if self.road == "flat":
            lm.config._attn_implementation = ATTENTION  # set_attn_implementation would look for a package of this name
        self.implementation = lm.config._attn_implementation

    def forward(self, batch, want=(), own=False):
        """flat_batch -> {"logprobs": (M,)} and those of "entropy", "mean_logprob" (over the vocabulary), "sum_p2" (sum
        of p^2), "topk" (M, topk) with "topk_ids", "correct" (the label is the arg-max) that are in `want`. All are fp32
        at the policy's temperature, with gradients except for "topk_ids" and "correct". own: the batch is a list of
        groups, and the answer reference_logprobs of the model in its own attention; here, since FSDP2 gathers the
        weights only inside the forward of its root."""
        assert set(want) < set(OUTPUTS), want
        if own:
            self.lm.config._attn_implementation = self.own
            answer = self.reference(self.lm, batch)
            self.lm.config._attn_implementation = self.implementation
            return answer
        # any other implementation would ignore the layout and return wrong numbers without a word
        assert self.lm.config._attn_implementation == self.implementation, self.lm.config._attn_implementation
        inputs, rows = self._flat(batch) if self.road == "flat" else self._padded(batch)
        backbone = self.lm.base_model if self.lm.base_model is not self.lm else self.lm.model  # Llama-4's has no name
        return self.read(_take(backbone(use_cache=False, **inputs).last_hidden_state.flatten(0, 1), rows), batch, want)

    def head(self):
        return self.lm.get_output_embeddings()

    def reference(self, lm, groups):
        return reference_logprobs(lm, groups, self.shape[-1])

    def read(self, hidden, batch, want):
        weight, bias, group = self.head().weight, self.head().bias, None
        if isinstance(weight, DTensor):  # sharded over the vocabulary by tensor parallelism
            group = weight.device_mesh.get_group()
            weight, bias = weight.to_local(), bias if bias is None else bias.to_local()
        out = ScoredHead.apply(hidden, weight, bias, batch["labels"], self.shape, tuple(want), self.topk, group)
        return {name: x for name, x in zip(OUTPUTS, out) if x is not None}

    def _flat(self, batch):
        layout = {name: batch[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_q", "max_k", "kv_index")}
        return {name: batch[name][None] for name in ("input_ids", "position_ids")} | layout, batch["rows"]

    def _padded(self, batch):
        ids, borders = batch["input_ids"], batch["cu_seqlens_k"].tolist()
        ids = ids if batch["kv_index"] is None else ids[batch["kv_index"]]
        ids = nn.utils.rnn.pad_sequence([ids[borders[i]:borders[i + 1]] for i in batch["seq_segment"].tolist()], True)
        return {"input_ids": ids}, batch["seq"] * ids.shape[1] + batch["position_ids"][batch["rows"]]


class Scorer(Policy):
    """`lm`, a sequence classifier of one label, as a function from a flat batch to {"rewards": (S,)}, fp32: the head
    `score` on the last token of each completion, its end-of-turn token, where the classifier itself reads it too."""

    output, new = "rewards", frozenset({"score.weight"})

    def forward(self, batch, want=(), own=False):
        if not own:
            last = batch["cu_seqlens_q"][batch["seq_segment"] + 1].long() - 1
            batch = {**batch, "rows": last, "seq": torch.arange(len(last), device=last.device)}
        return super().forward(batch, want, own)

    def head(self):
        return getattr(self.lm, "score", None)

    @torch.no_grad()
    def reference(self, lm, groups):
        sequences = [[*group["prompt"], *completion["ids"]] for group in groups for completion in group["completions"]]
        sequences = [torch.tensor([ids], device=lm.device) for ids in sequences]
        return torch.cat([lm(ids, use_cache=False).logits[0].float() for ids in sequences])

    def read(self, hidden, batch, want):
        return {"rewards": hidden.float() @ self.head().weight[0].float()}


# ---- probe -----------------------------------------------------------------------------------------------------------

def probe_groups(vocab_size):
    """Two groups of fixed ids with shared prompts, 40 tokens: where Policy and reference_logprobs are compared."""
    ids = array("i", [(7919 * i + 13) % vocab_size for i in range(40)])
    groups = (ids[:7], ids[7:12], ids[12:21], ids[21:24]), (ids[24:32], ids[32:38], ids[38:])
    return [{"prompt": prompt, "completions": [{"ids": x, "scored": None} for x in completions], "row": row}
            for row, (prompt, *completions) in enumerate(groups)]


@torch.no_grad()
def reference_logprobs(lm, groups, temperature=1.0):
    """(M,) fp32 in flat_batch's order from lm(ids).logits of one sequence at a time: nothing shared, the model's own
    attention and head. To be called before Policy(lm), which replaces that attention."""
    out = []
    for group in groups:
        for completion in group["completions"]:
            ids = torch.tensor([*group["prompt"], *completion["ids"]], device=lm.device)
            scored = [False] * len(group["prompt"]) + list(completion["scored"] or [True] * len(completion["ids"]))
            at = torch.tensor(scored[1:], device=lm.device).nonzero()[:, 0]  # nothing predicts the very first token
            logp = (lm(ids[None], use_cache=False).logits[0].float() / temperature).log_softmax(-1)
            out.append(logp[at, ids[at + 1]])
    return torch.cat(out)
