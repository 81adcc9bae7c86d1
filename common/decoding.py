"""Next-token logits of many sequences of several lengths, without padding: what a sampling loop needs from a model.

`decoder(lm, prompts, copies)` computes each prompt once and continues it `copies` times. Sequences of one length form a
set. The tokens of all sets go through the model's matrices together and meet their own past set by set.

R live sequences ("rows"), V vocabulary, d head size; logits and caches in the model's dtype.
"""
from collections import defaultdict
from itertools import chain
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from common.logprobs import ATTENTION, attend, runs_flat

ROOM = 64  # tokens by which a cache grows at least; then by half of its length


def decoder(lm, prompts, copies):
    """-> `rows` (R,): which sequence a row continues, prompt * copies + copy; `logits` (R, V) of its next token;
    step(tokens (R,)): append one to each row; drop(ended (R,) bool) -> (R',): the rows that stay, in their new order.
    prompts: token ids, none empty. lm is a copy that nobody trains: its attention may be replaced."""
    return (FlatDecoder if runs_flat(lm, lm.device.type) else CacheDecoder)(lm, prompts, copies)


def sets_of(prompts, copies, device):
    """-> [a set per length: its prompts (n, length), count of rows], the rows' sequences (R,) in the sets' order."""
    members = defaultdict(list)
    for i, prompt in enumerate(prompts):
        members[len(prompt)].append(i)
    sets = [SimpleNamespace(prompts=torch.tensor([list(prompts[i]) for i in same], device=device), length=length,
                            count=len(same), cache={}) for length, same in sorted(members.items())]
    order = torch.tensor([i for _, same in sorted(members.items()) for i in same], device=device)
    return sets, (order[:, None] * copies + torch.arange(copies, device=device)).flatten()


def without(sets, ended, move):
    """Drop rows of all sets: the last live rows take the places of ended ones. move(set, holes, fillers) does it to a
    set's cache. -> (sets that are left, rows that stay in their new order)."""
    left, stay, first = [], [], 0
    for each, gone in zip(sets, ended.split([each.count for each in sets])):
        index = torch.arange(first, first + each.count, device=gone.device)
        first, each.count = first + each.count, each.count - int(gone.sum())
        holes, fillers = gone[: each.count].nonzero()[:, 0], each.count + (~gone[each.count :]).nonzero()[:, 0]
        index[holes] = index[fillers]
        stay.append(index[: each.count])
        if each.count:
            left.append(each)
        if 0 < each.count < len(gone):
            move(each, holes, fillers)
    return left, torch.cat(stay)


class FlatDecoder:
    """Where tokens meet in flat_attention only: one row of tokens, as in training, and one forward for all sets.

    A set's cache is a buffer (rows, heads, room, d) for keys and one for values, per layer, written in place:
    DynamicCache copies all of it for every token, and again for every row that ends."""

    def __init__(self, lm, prompts, copies):
        lm.config._attn_implementation = ATTENTION  # set_attn_implementation would look for a package of this name
        self.lm, self.copies = lm, copies
        self.sets, self.rows = sets_of(prompts, copies, lm.device)
        self.new = [each.length for each in self.sets]  # tokens of a sequence in this forward
        ids = torch.cat([each.prompts.flatten() for each in self.sets])
        last = torch.tensor([n for n, each in zip(self.new, self.sets) for _ in range(each.count)]).cumsum(0) - 1
        self.logits = self._forward(ids, last.to(lm.device)).repeat_interleave(copies, 0)
        for each in self.sets:
            each.count *= copies

    def _forward(self, ids, last):
        """ids (N,) -> logits of the rows `last` of the forward."""
        at = [range(each.length - n, each.length) for n, each in zip(self.new, self.sets) for _ in range(each.count)]
        at = torch.tensor([*chain(*at)], device=ids.device)
        return self.lm(input_ids=ids[None], position_ids=at[None], use_cache=False, logits_to_keep=last,
                       decoder=self).logits[0]

    def attend_to(self, layer, *tensors, **how):
        """query, key, value (tokens, heads, d) of this forward -> each row's attention over its own past."""
        out = []
        sizes = [n * each.count for n, each in zip(self.new, self.sets)]
        for each, n, *parts in zip(self.sets, self.new, *(x.split(sizes) for x in tensors)):
            q, *kv = (x.unflatten(0, (each.count, n)).transpose(1, 2) for x in parts)  # (rows, heads, n, d)
            if layer not in each.cache:  # the prompt
                each.cache[layer] = [enlarged(x.repeat_interleave(self.copies, 0)) for x in kv]
            else:
                if each.length > each.cache[layer][0].shape[2]:
                    each.cache[layer] = [enlarged(x[: each.count]) for x in each.cache[layer]]
                for i, (cache, x) in enumerate(zip(each.cache[layer], kv)):
                    cache[: each.count, :, each.length - 1] = x[:, :, 0]
                    kv[i] = cache[: each.count, :, : each.length]
            out.append(attend(q, *kv, **how).transpose(1, 2).flatten(0, 1))
        return torch.cat(out)

    def step(self, tokens):
        self.new = [1] * len(self.sets)
        for each in self.sets:
            each.length += 1
        self.logits = self._forward(tokens, slice(None))

    def drop(self, ended):
        def move(each, holes, fillers):
            for cache in chain(*each.cache.values()):
                cache[holes] = cache[fillers]

        self.sets, stay = without(self.sets, ended, move)
        return stay


def enlarged(cache):
    """(rows, heads, length, d) with free room at the end of every row."""
    return F.pad(cache, (0, 0, 0, max(ROOM, cache.shape[2] // 2)))


class CacheDecoder:
    """Any other model (recurrent states, chunked masks): transformers' own cache, one forward per set."""

    def __init__(self, lm, prompts, copies):
        self.lm, (self.sets, self.rows) = lm, sets_of(prompts, copies, lm.device)
        first = []
        for each in self.sets:
            each.cache = DynamicCache(config=lm.config)
            out = lm(input_ids=each.prompts, past_key_values=each.cache, use_cache=True, logits_to_keep=1)
            first.append(out.logits[:, -1])
            each.cache.reorder_cache(torch.arange(each.count, device=lm.device).repeat_interleave(copies))
            each.count *= copies
        self.logits = torch.cat(first).repeat_interleave(copies, 0)

    def step(self, tokens):
        out = []
        for each, ids in zip(self.sets, tokens[:, None].split([each.count for each in self.sets])):
            at = torch.full_like(ids, each.length)
            out.append(self.lm(input_ids=ids, position_ids=at, past_key_values=each.cache, use_cache=True).logits)
            each.length += 1
        self.logits = torch.cat(out)[:, -1]

    def drop(self, ended):
        def move(each, holes, fillers):
            index = torch.arange(each.count, device=ended.device)
            index[holes] = fillers
            each.cache.reorder_cache(index)  # index_select on the rows of every layer, recurrent ones too

        self.sets, stay = without(self.sets, ended, move)
        return stay
