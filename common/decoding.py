"""Next-token logits of many sequences of several lengths, without padding: what a sampling loop needs from a model.

A decoder computes each prompt once and continues it `copies` times. A row is a sequence that goes on, a cohort the rows
of one length. R is the number of rows, V the vocabulary, d the size of a head. Logits have the model's dtype.
"""
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from common.attention import ATTENTION, attend

ROOM = 64  # tokens by which a cache grows at least; a longer one grows by half of its length


class Decoder:
    """What both decoders have: `rows` (R,), the sequence that each row continues (prompt * copies + copy), and `logits`
    (R, V) of its next token. Rows stand cohort by cohort. A cohort has `count` rows of `length` tokens, of which the
    running forward takes the last `new`: the whole prompt at first, then one token. No prompt may be empty, and nobody
    may train the model, since its attention may be replaced."""

    def __init__(self, lm, prompts, copies):
        self.lm = lm
        self.copies = copies
        self.cohorts = []
        for length, count in sorted(Counter(map(len, prompts)).items()):
            self.cohorts.append(SimpleNamespace(count=count, length=length, new=length, cache={}))
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        rows = torch.arange(len(prompts) * copies, device=lm.device)
        self.rows = rows.view(-1, copies)[order].flatten()
        ids = list(chain.from_iterable(prompts[i] for i in order))
        self.logits = self.forward(torch.tensor(ids, device=lm.device)).repeat_interleave(copies, 0)
        for cohort in self.cohorts:
            cohort.count *= copies
            cohort.new = 1

    def step(self, tokens):
        """Append one token to each row: tokens (R,)."""
        for cohort in self.cohorts:
            cohort.length += 1
        self.logits = self.forward(tokens)

    def sizes(self):
        """Return the number of new tokens of each cohort, which is its number of rows once the prompts are read."""
        return [cohort.count * cohort.new for cohort in self.cohorts]

    def drop(self, ended):
        """Remove the rows where `ended` (R,) is true: in each cohort the last rows that stay take the places of the
        ended ones. Return the rows that stay, (R',), in their new order."""
        stay = []
        first = 0  # row of the cohort
        for cohort, gone in zip(self.cohorts, ended.split(self.sizes())):
            left = cohort.count - int(gone.sum())
            order = torch.arange(left, device=gone.device)
            order[gone[:left]] = left + (~gone[left:]).nonzero()[:, 0]
            if 0 < left < cohort.count:
                self.select(cohort, order)
            stay.append(first + order)
            first += cohort.count
            cohort.count = left
        self.cohorts = [cohort for cohort in self.cohorts if cohort.count]
        return torch.cat(stay)


class FlatDecoder(Decoder):
    """For models that run flat: all cohorts in one forward, as in training. A cohort's cache
    has, for each layer, a buffer (rows, heads, room, d) for keys and one for values, written in place: DynamicCache
    copies all of it for every token, and again for every row that ends."""

    def forward(self, ids):
        """ids (N,): the new tokens of all rows, row by row. Return the logits (R, V) after the last one of each row."""
        self.lm.config._attn_implementation = ATTENTION  # set_attn_implementation would look for a package of this name
        positions, last = [], []
        for cohort in self.cohorts:
            for _ in range(cohort.count):
                positions.extend(range(cohort.length - cohort.new, cohort.length))
                last.append(len(positions) - 1)
        positions = torch.tensor([positions], device=ids.device)
        last = torch.tensor(last, device=ids.device)
        out = self.lm(ids[None], position_ids=positions, use_cache=False, logits_to_keep=last, decoder=self)
        return out.logits[0]

    def attend_to(self, layer, query, key, value, **options):
        """flat_attention calls this in every layer. query, key, value (N, heads, d): of the new tokens. Return
        (N, heads, d): the attention of each row over its own past."""
        sizes = self.sizes()
        results = []
        pieces = zip(query.split(sizes), key.split(sizes), value.split(sizes))
        for cohort, new in zip(self.cohorts, pieces):
            q, k, v = [x.unflatten(0, (cohort.count, -1)).transpose(1, 2) for x in new]  # (rows, heads, new, d)
            k = self.remember(cohort, (layer, "keys"), k)
            v = self.remember(cohort, (layer, "values"), v)
            results.append(attend(q, k, v, **options).transpose(1, 2).flatten(0, 1))
        return torch.cat(results)

    def remember(self, cohort, name, new):
        """new (rows, heads, new, d): keys or values of a layer. Return those of the whole past of each row."""
        if name not in cohort.cache:  # the prompt, which `copies` rows will continue
            cohort.cache[name] = new.repeat_interleave(self.copies, 0)
            return new
        buffer = cohort.cache[name]
        if cohort.length > buffer.shape[2]:
            room = max(ROOM, buffer.shape[2] // 2)
            buffer = F.pad(buffer[: cohort.count], (0, 0, 0, room))
            cohort.cache[name] = buffer
        buffer[: cohort.count, :, cohort.length - 1] = new[:, :, 0]
        return buffer[: cohort.count, :, : cohort.length]

    def select(self, cohort, order):
        moved = (order >= len(order)).nonzero()[:, 0]
        for buffer in cohort.cache.values():
            buffer[moved] = buffer[order[moved]]


class CacheDecoder(Decoder):
    """For any other model (recurrent states, chunked masks): transformers' own cache, one forward for each cohort."""

    def forward(self, ids):
        logits = []
        for cohort, new in zip(self.cohorts, ids.split(self.sizes())):
            is_prompt = not cohort.cache
            if is_prompt:
                cohort.cache = DynamicCache(config=self.lm.config)
            new = new.view(cohort.count, -1)
            positions = torch.arange(cohort.length - cohort.new, cohort.length, device=ids.device).expand_as(new)
            out = self.lm(new, position_ids=positions, past_key_values=cohort.cache, use_cache=True, logits_to_keep=1)
            logits.append(out.logits[:, -1])
            if is_prompt:
                rows = torch.arange(cohort.count, device=ids.device)
                self.select(cohort, rows.repeat_interleave(self.copies))
        return torch.cat(logits)

    def select(self, cohort, order):
        cohort.cache.reorder_cache(order)  # selects rows in every layer, recurrent states too
