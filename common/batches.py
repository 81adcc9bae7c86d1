"""From groups of token ids to flat batches without padding: the rows of a step, this rank's share of them, packing.

A *group* is what every script trains on: {"prompt": array("i"), "completions": [completion, ...], "row": its index in
the data}. A *completion* is {"ids": array("i"), "scored": ...}, see `scored_flags`. Scripts add entries of their own.
"""
import heapq
import time
from array import array
from functools import lru_cache
from itertools import accumulate, compress, islice

import numpy as np
import torch

from common.runtime.flags import InputError
from common.runtime.parallel import all_most


def scored_flags(completion):
    """Return a bool for each id: whether the loss counts it. Only this function knows of "scored": None (all)."""
    if completion["scored"] is None:
        return [True] * len(completion["ids"])
    return list(completion["scored"])


def predicted_flags(group, completion):
    """Return scored_flags, with False for the first id of a sequence without a prompt, which nothing can predict."""
    flags = scored_flags(completion)
    if flags and not group["prompt"]:
        flags[0] = False
    return flags


def count_scored(groups):
    """Return how many scored tokens of the groups something predicts: as many as `flat_batch` makes labels of them."""
    total = 0
    for group in groups:
        for completion in group["completions"]:
            total += sum(predicted_flags(group, completion))
    return total


def group_tokens(group):
    """Return how many tokens a forward computes for the group: its prompt once, and all of its completions."""
    return len(group["prompt"]) + sum(len(completion["ids"]) for completion in group["completions"])


def fit(groups, rows, max_length, overlong="drop", room=0):
    """Return the groups that training can use, and counts of rows: all, kept, overlong, equal (a pair of one text),
    refused (they became no group), or without a scored token in one of their completions; "longest" is the most tokens
    of a prompt and a completion. What is beyond max_length is dropped, is an error, or with "truncate_prompt" loses
    tokens on the left; no completion is ever cut. A row may have become several groups. room: tokens of a completion
    that is still to be sampled."""
    kept, too_long, unscored, equal = [], [], [], []
    longest = 0
    for group in groups:
        completions = group["completions"]
        answer_length = max([room, *(len(completion["ids"]) for completion in completions)])
        length = len(group["prompt"]) + answer_length
        longest = max(longest, length)
        is_overlong = length > max_length
        if is_overlong and overlong == "error":
            raise InputError(f"over --max_length {max_length}: tokens (row {group['row'] + 1}): {length}. "
                             f"Type --max_length {length}, or --overlong drop")
        if is_overlong and overlong == "drop":
            too_long.append(group)  # first of all: of a text that cannot fit only the beginning was read
        elif not all(any(predicted_flags(group, completion)) for completion in completions):
            unscored.append(group)
        elif "equal" in group:
            equal.append(group)
        elif is_overlong:
            too_long.append(group)
            left = max_length - answer_length
            if left > 0:
                kept.append({**group, "prompt": group["prompt"][-left:]})
        else:
            kept.append(group)
    counts = {"rows": len(rows), "longest": longest}
    for name, members in {"kept": kept, "overlong": too_long, "unscored": unscored, "equal": equal}.items():
        counts[name] = len({group["row"] for group in members})
    counts["refused"] = len(rows) - len({group["row"] for group in groups})
    return kept, counts


def split_group(group, max_length, bos=None):
    """Return [group], or if it is longer than max_length its pieces, for losses that are a sum over tokens. A piece
    begins with the row's BOS, if there is one, and the last token of the piece before, and sees nothing else of what
    stood there, not even the prompt. All but the last are marked "cut": they end in no stop token."""
    (completion,) = group["completions"]
    ids = group["prompt"] + completion["ids"]
    if len(ids) <= max_length:
        return [group]
    scored = [False] * len(group["prompt"]) + scored_flags(completion)
    begin = ids[:1] if ids[0] == bos else array("i")
    pieces = []
    context = array("i")
    start = 0
    while start < len(ids):
        end = start + max_length - len(context)
        piece = {"ids": ids[start:end], "scored": scored[start:end]}
        if any(piece["scored"]):
            pieces.append({**group, "prompt": context, "completions": [piece], "cut": end < len(ids)})
        context = begin + ids[end - 1 : end]
        start = end
    return pieces or [group]


@lru_cache(maxsize=8)
def permutation(n, seed, epoch):
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def order(n, seed, start, count):
    """Return which of n rows stand at the positions start to start + count - 1 of training. Every n positions are an
    epoch with its own permutation, the same on every rank; there is no state that a restart could lose."""
    return [permutation(n, seed, position // n)[position % n] for position in range(start, start + count)]


def share(run, groups):
    """Return this rank's share of a step's groups: the largest groups first, each to the rank with the fewest tokens so
    far. Nothing ties, so that every rank computes the same. Ranks of tensor parallelism share their groups, too."""
    costs = [group_tokens(group) for group in groups]
    shares = [[] for _ in range(run.dp_size)]
    heap = [(0, 0, rank) for rank in range(run.dp_size)]  # (tokens, number of groups, rank)
    for index in sorted(range(len(groups)), key=costs.__getitem__, reverse=True):
        tokens, size, rank = heap[0]
        shares[rank].append(index)
        heapq.heapreplace(heap, (tokens + costs[index], size + 1, rank))
    return [groups[index] for index in sorted(shares[run.dp_rank])]


def cut_group(group, budget):
    """Return the group in pieces of at most budget tokens, each with the whole prompt, if it has three or more
    completions; a pair stays together, and a completion is never cut, whatever its length."""
    if len(group["completions"]) <= 2:
        return [group]
    pieces = []
    room = 0
    for completion in group["completions"]:
        length = len(completion["ids"])
        if not pieces or length > room:
            pieces.append({**group, "completions": []})
            room = budget - len(group["prompt"])
        pieces[-1]["completions"].append(completion)
        room -= length
    return pieces


def pack(groups, budget):
    """Return lists of groups with at most budget tokens each (a prompt counts once), by first-fit decreasing: the
    largest group first, each into the first list that has room. A piece that is larger than budget stands alone."""
    pieces = []
    for group in groups:
        pieces.extend(cut_group(group, budget))
    lists, rooms = [], []
    for piece in sorted(pieces, key=group_tokens, reverse=True):
        size = group_tokens(piece)
        place = next((i for i, room in enumerate(rooms) if size <= room), len(lists))
        if place == len(lists):
            lists.append([])
            rooms.append(budget)
        lists[place].append(piece)
        rooms[place] -= size
    return lists


def flat_batch(groups, device="cpu"):
    """Return the groups as one flat row of N tokens without padding, M of them scored, in S completions. Completions of
    one prompt share its tokens: the prompt is a segment, and so is each completion, which sees the prompt and itself.
    (A prompt with one completion is one segment with it.) A prompt p of three tokens with the completions a and b:

                        prompt        | completion 1 | completion 2
        row              0   1    2   |   3    4     |   5      6        7
        input_ids       p0  p1   p2   |  a0   a1     |  b0     b1       b2
        position_ids     0   1    2   |   3    4     |   3      4        5
        sees rows        0  0-1  0-2  | 0-3  0-4     | 0-2,5  0-2,5-6  0-2,5-7
        predicts         -   -  a0,b0 |  a1    -     |  b1     b2        -

    Besides it holds, in torch.long unless noted,
    cu_seqlens_q, max_q          int32, the borders of the segments among the rows, and the length of the longest
    cu_seqlens_k, max_k          int32, the same of the keys that each segment sees
    kv_index (K,)                rows of the keys, a shared prompt's first; None where they are the queries' rows
    rows, labels, seq (M,)       of each scored token the row that predicts it, its id, and its completion, 0 to S - 1.
                                 The shift by one between rows and labels is made here only.
    seq_segment (S,), num_seqs   the segment in which each completion ends, and S
    groups, completions          what the batch is made of; further entries of completions: see `carried_entries`."""
    numbers = array("i", range(sum(group_tokens(group) for group in groups)))  # its slices are made faster than ranges
    segments = []  # pairs: ids, and the rows of the shared prompt that they see besides themselves
    rows, labels, seq = array("i"), array("i"), array("i")
    completions, seq_segment = [], []
    num_tokens = 0
    for group in groups:
        prompt = group["prompt"]
        prompt_rows = ()
        if len(group["completions"]) > 1:
            prompt_rows = numbers[num_tokens : num_tokens + len(prompt)]
        if prompt_rows:
            segments.append((prompt, ()))
            num_tokens += len(prompt)
        for completion in group["completions"]:
            answer = completion["ids"]
            segment = answer if prompt_rows else prompt + answer
            seq_segment.append(len(segments))
            segments.append((segment, prompt_rows))
            num_tokens += len(segment)
            # Each token is predicted by the row before it, which is the prompt's last for the first token.
            predictors = array("i", range(num_tokens - len(answer) - 1, num_tokens - 1))
            if prompt_rows and predictors:
                predictors[0] = prompt_rows[-1]
            flags = predicted_flags(group, completion)
            if not all(flags):
                predictors = array("i", compress(predictors, flags))
                answer = array("i", compress(answer, flags))
            rows.extend(predictors)
            labels.extend(answer)
            seq.extend(array("i", [len(completions)]) * len(answer))
            completions.append(completion)
    ids, positions, key_rows = array("i"), array("i"), array("i")
    query_lengths, key_lengths = [], []
    for segment, prompt_rows in segments:
        start = len(ids)
        ids.extend(segment)
        query_lengths.append(len(segment))
        key_lengths.append(len(prompt_rows) + len(segment))
        positions.extend(numbers[len(prompt_rows) : key_lengths[-1]])
        key_rows.extend(prompt_rows)
        key_rows.extend(numbers[start : len(ids)])
    arrays = {"input_ids": ids, "position_ids": positions, "kv_index": key_rows, "seq_segment": seq_segment}
    arrays.update({"rows": rows, "labels": labels, "seq": seq})
    batch = {"groups": groups, "completions": completions, "num_seqs": len(completions)}
    for name, integers in arrays.items():
        batch[name] = torch.from_numpy(np.asarray(integers)).to(device, torch.long)
    if len(key_rows) == len(ids):
        batch["kv_index"] = None
    for side, lengths in {"q": query_lengths, "k": key_lengths}.items():
        batch[f"max_{side}"] = max(lengths, default=0)
        batch[f"cu_seqlens_{side}"] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return {**batch, **carried_entries(completions, device)}


def probe_groups(vocab_size):
    """Return two groups of fixed ids with shared prompts, 40 tokens: there a Policy meets its plain forward."""
    ids = iter([(7919 * i + 13) % vocab_size for i in range(40)])
    groups = []
    for row, lengths in enumerate([(7, 5, 9, 3), (8, 6, 2)]):  # of a prompt and its completions
        prompt, *answers = [array("i", islice(ids, length)) for length in lengths]
        completions = [{"ids": answer, "scored": None} for answer in answers]
        groups.append({"prompt": prompt, "completions": completions, "row": row})
    return groups


def carried_entries(completions, device):
    """Return what scripts attached to the completions, under the same names: tensors of a value for each scored token,
    together (M,), and Python floats, together (S,) in float32. Other types stay. What the first has, all must have."""
    entries = {}
    first = completions[0] if completions else {}
    for name, value in first.items():
        values = [completion.get(name) for completion in completions]
        if isinstance(value, torch.Tensor):
            entries[name] = torch.cat(values).to(device)
        elif isinstance(value, float):
            entries[name] = torch.tensor(values, dtype=torch.float32, device=device)
    return entries


def micro_batches(run, groups, spare):
    """Yield this rank's groups as flat batches of at most --tokens_per_microbatch tokens, made one at a time. Forwards
    are collectives, so every rank gets the same number of batches, at least one; agreeing on it is a collective, too.
    Multiply what is summed over batches by batch["weight"]: 0.0 where a rank with less work runs the group `spare`."""
    batches = pack(groups, run.args.tokens_per_microbatch)
    count = int(all_most(run, max(1, len(batches))))
    for k in range(count):
        run.beat = time.monotonic()  # progress, for the watchdog
        has_work = k < len(batches)
        batch = flat_batch(batches[k] if has_work else [spare], run.device)
        batch["weight"] = 1.0 if has_work else 0.0
        batch["is_last"] = k + 1 == count
        yield batch


@torch.no_grad()
def attach_logprobs(run, model, groups, name):
    """Set completion[name], on the CPU, to the model's log-probs of its scored tokens, from a pass without gradients.
    Every rank has to call it, with at least one group."""
    for batch in micro_batches(run, groups, spare=groups[0]):
        logprobs = model(batch)["logprobs"].cpu()
        lengths = torch.bincount(batch["seq"].cpu(), minlength=batch["num_seqs"]).tolist()
        pieces = logprobs.split(lengths)
        if batch["weight"] > 0:
            for completion, piece in zip(batch["completions"], pieces):
                completion[name] = piece


def seq_sums(values, batch):
    """Return the sums (S,) over each completion of values (M,), which are one for each scored token."""
    return values.new_zeros(batch["num_seqs"]).index_add_(0, batch["seq"], values)


def sequence_sum(values, seq):
    """Return for each scored token (M,) the sum of the values (M,) over its completion. No completion is empty."""
    return values.new_zeros(len(seq)).index_add(0, seq, values)[seq]


def sequence_size(seq):
    """Return for each scored token (M,) how many its completion has. torch.bincount would wait for the GPU, which then
    has nothing to do until the backward pass is queued."""
    return sequence_sum(torch.ones_like(seq), seq)
