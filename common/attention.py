"""Attention without padding: the function that a model's layers call instead of their own.

A batch is one row of N tokens cut into segments (`flat_batch` in common/batches.py draws it). There are H heads, H_kv
of keys and values, of width d, and d_v for values. What this file does not know raises InputError: attention that
leaves something out returns wrong numbers without a word."""
import importlib.util
import inspect
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.generation.continuous_batching import PagedAttentionCache

from common.runtime.flags import InputError

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # It is never required: torch's own kernel lacks only the soft-cap.
    flash_attn_varlen_func = None

WIDEST = 256  # numbers in a head that a fused kernel can take
# Models find an attention by its name in their config. With "flash" in the name, continuous batching builds no mask
# and records CUDA graphs.
ATTENTION = "flash_varlen"
PAGED = "flash_paged"
# varlen_attn takes heads that share keys without being told in torch 2.11, and wants to be told later.
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def flat_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
                   softcap=None, s_aux=None, cu_seqlens_q=None, cu_seqlens_k=None, max_q=None, max_k=None,
                   kv_index=None, decoder=None, position_ids=None, use_cache=None, output_router_logits=None,
                   **unknown):
    """Causal attention inside segments, as an AttentionInterface: query (1, H, N, d), key (1, H_kv, N, d) and value
    (1, H_kv, N, d_v) become (1, N, H, d_v) and, in place of weights, None. s_aux (H,): attention sinks, a logit per
    head that takes probability away and adds nothing. A decoder (common/decoding.py) keeps keys and values itself."""
    # Segment i has the queries cu_seqlens_q[i] to cu_seqlens_q[i + 1] and the keys of the tokens
    # kv_index[cu_seqlens_k[i]:cu_seqlens_k[i + 1]], without kv_index its own. Both end together: query r of n_q sees
    # the keys up to r + n_k - n_q, of which a sliding window leaves the last `sliding_window`.
    unknown = [name for name, argument in unknown.items() if argument is not None]
    has_borders = cu_seqlens_q is not None
    has_mask = attention_mask is not None
    if not (has_borders or decoder) or has_mask or dropout or unknown:
        raise InputError(f"{type(module).__name__} cannot run on flat batches, use another --model (segment borders: "
                         f"{has_borders}, mask: {has_mask}, {dropout=}, {unknown=})")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, width)
    if kv_index is not None:
        key = select_rows(key, kv_index)
        value = select_rows(value, kv_index)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    options = {"scaling": scaling, "window": sliding_window, "softcap": softcap, "sinks": s_aux}
    layout = cu_seqlens_q, cu_seqlens_k, max_q, max_k
    if decoder:
        out = decoder.attend_to(module.layer_idx, query, key, value, **options)
    elif query.is_cuda and query.dtype != torch.float32:  # Fused kernels exist for half precision only.
        out = _fused_attention(query, key, value, layout, **options)
    else:
        out = _segment_attention(query, key, value, layout, **options)
    return out[None], None


def paged_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, cache=None,
                    logits_indices=None, logits_processor_args=None, is_causal=None, **layout):
    """flat_attention in the layout of transformers' continuous batching. The cache keeps the new keys and values, and
    returns those of every sequence from its first token on. Rows past the last segment are padding: not computed."""
    names = "cu_seq_lens_k", "max_length_k", "read_index", "write_index", "block_table"
    # update() replaces what is given per kind of layer by what belongs to this layer, so it gets a dict to write into.
    of_this_layer = {name: layout.pop(name) for name in names}
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=of_this_layer)
    return flat_attention(module, query, key, value, attention_mask, cu_seqlens_q=cu_seq_lens_q, max_q=max_length_q,
                          cu_seqlens_k=of_this_layer["cu_seq_lens_k"], max_k=of_this_layer["max_length_k"], **layout)


AttentionInterface.register(ATTENTION, flat_attention)
AttentionInterface.register(PAGED, paged_attention)


def select_rows(x, index):
    """Return x[index], by an embedding: its backward sums repeated rows faster than that of index_select."""
    return F.embedding(index, x.flatten(1)).view(-1, *x.shape[1:])


def _fused_attention(query, key, value, layout, scaling, window, softcap, sinks):
    """All segments in one kernel, which exists on CUDA in half precision."""
    if sinks is not None or (softcap and flash_attn_varlen_func is None):
        raise InputError("no fused kernel has attention sinks, only flash_attn has soft-caps: use another --model")
    # The kernels want one width for all three, a multiple of 8. Zeros fill it up: they change no score and no sum.
    width = -(-query.shape[-1] // 8) * 8
    widened = [_widen(x, width) for x in (query, key, value)]
    keys_to_the_left = -1 if window is None else window - 1  # -1: no limit. A kernel does not count the token itself.
    sides = keys_to_the_left, 0
    if softcap:
        out = flash_attn_varlen_func(*widened, *layout, softmax_scale=scaling, causal=True, window_size=sides,
                                     softcap=softcap, deterministic=torch.are_deterministic_algorithms_enabled())
    else:
        out = varlen_attn(*widened, *layout, scale=scaling, window_size=sides, **GQA)
    return out[..., :value.shape[-1]]


def _widen(x, width):
    missing = width - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


@torch.compiler.disable  # A loop over segments would be compiled again for every batch.
def _segment_attention(query, key, value, layout, **options):
    """Everywhere else: the segments of one shape in one call."""
    lengths_q, lengths_k = map(_lengths, layout[:2])
    # split it is, because the backward of a slice x[a:b] allocates a gradient as large as x for every segment.
    tensors = query.split(lengths_q), key.split(lengths_k), value.split(lengths_k)
    segments_of_shape = defaultdict(list)
    for segment, shape in enumerate(zip(lengths_q, lengths_k)):
        segments_of_shape[shape].append(segment)
    outputs = [None] * len(lengths_q)
    for segments in segments_of_shape.values():
        stacks = [torch.stack([pieces[segment] for segment in segments]) for pieces in tensors]
        q, k, v = (stack.transpose(1, 2) for stack in stacks)  # (segments, heads, tokens, width)
        out = attend(q, k, v, **options).transpose(1, 2)
        for segment, piece in zip(segments, out.unbind()):
            outputs[segment] = piece
    return torch.cat(outputs)


def _lengths(cu_seqlens):
    return cu_seqlens.diff().tolist()


def attend(q, k, v, scaling, window, softcap, sinks):
    """Return the attention (segments, H, n_q, d_v) of segments of one shape: q is (segments, H, n_q, d), k and v are
    (segments, H_kv, n_k, d or d_v); H is a multiple of H_kv. Without a window, a soft-cap or sinks these are None."""
    n_q, n_k = q.shape[2], k.shape[2]
    window = window or n_k
    explicit = bool(softcap) or sinks is not None  # torch's function knows neither
    mask = None
    if explicit or window < n_k or 1 < n_q < n_k:
        positions = torch.arange(n_k, device=q.device)
        age = positions[n_k - n_q:, None] - positions
        mask = (age >= 0) & (age < window)  # (n_q, n_k), True where a query sees a key
    if explicit:
        return _explicit_attention(q, k, v, mask, scaling, softcap, sinks)
    if n_q == 1 and mask is None:
        # Sampling: heads that share keys become queries of these keys, so that the keys are read once.
        heads_as_queries = q.reshape(len(q), k.shape[1], -1, q.shape[3])
        out = F.scaled_dot_product_attention(heads_as_queries, k, v, scale=scaling)
        return out.reshape(*q.shape[:3], -1)
    shares_keys = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=shares_keys)


def _explicit_attention(q, k, v, visible, scaling, softcap, sinks):
    """The formula itself, in fp32: scores, their soft-cap, sinks as one more key without a value, softmax, sum."""
    queries_per_key = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(queries_per_key, dim=1)
    v = v.repeat_interleave(queries_per_key, dim=1)
    scores = (q @ k.transpose(2, 3)).float() * scaling
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink_scores = sinks.float().view(-1, 1, 1).expand_as(scores[..., :1])
        scores = torch.cat([scores, sink_scores], dim=-1)
    probabilities = scores.softmax(-1)[..., :k.shape[2]]
    return probabilities.to(v.dtype) @ v


def runs_flat(lm, device_type):
    """Return whether tokens meet only inside flat_attention: no recurrent state, no convolution, no chunked mask. On
    CUDA no wide heads and no sinks either and, without flash_attn, no soft-caps: torch's kernel has no gradient for a
    replacement."""
    config = lm.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        return False
    if lm._is_stateful or not lm._supports_attention_backend:
        return False
    if device_type != "cuda":
        return True
    for module in lm.modules():  # layers of one model may differ
        if max(getattr(module, "head_dim", None) or 0, getattr(module, "qk_head_dim", None) or 0) > WIDEST:
            return False
    if getattr(config, "attn_logit_softcapping", None):
        return flash_attn_varlen_func is not None
    return bool(lm._supports_sdpa)


def use_newest_kernel():
    """Let torch's fused attention run on FlashAttention 3 where its package and a GPU for it are there."""
    if importlib.util.find_spec("flash_attn_interface") and torch.cuda.get_device_capability()[0] == 9:
        activate_flash_attention_impl("FA3")


def kernel_name(lm, device_type, dtype):
    """Return what computes the attention of a model that runs flat, for the plan."""
    if device_type != "cuda" or dtype == torch.float32:
        return "scaled_dot_product_attention by segment"
    if getattr(lm.config.get_text_config(), "attn_logit_softcapping", None):
        return "flash_attn"
    return f"varlen_attn ({current_flash_attention_impl() or 'FA2'})"


def runs_paged(lm, device_type):
    """Return whether continuous batching can use paged_attention: as of transformers 5.20 its cache takes `kwargs`."""
    parameters = inspect.signature(PagedAttentionCache.update).parameters
    return "kwargs" in parameters and runs_flat(lm, device_type)


def refuse_rotary(config, max_length):
    """Raise InputError if rows may get so long that the longest one changes the rotary table of its whole batch."""
    config = config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    tables = [table for table in parameters.values() if isinstance(table, dict)]  # one for each kind of layer
    for table in tables or [parameters]:
        limits = {"longrope": table.get("original_max_position_embeddings"),
                  "dynamic": getattr(config, "max_position_embeddings", None)}
        kind = table.get("rope_type")
        limit = limits.get(kind)
        if limit is not None and max_length > limit:
            raise InputError(f"{kind} rotary embeddings change for a whole batch when one row passes {limit} tokens: "
                             f"--max_length {max_length} must be at most {limit}")
