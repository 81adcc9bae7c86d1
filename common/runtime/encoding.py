"""All rows of a data set become groups: shared by ranks and processes, and brought together as tensors."""

import json
import multiprocessing
import os
from array import array
from contextlib import suppress
from itertools import islice
from multiprocessing import connection

import torch

from common.data import problem
from common.runtime.flags import InputError, printable
from common.runtime.parallel import agree, gather_tensors
from common.runtime.run import progress, say
from common.templates import Refusal
from common.tokenization import Panic

CHUNK_ROWS = 256  # of a part that is encoded between two signs of life
MANY_ROWS = 2000  # fewer are encoded sooner than processes start
MARKS = ("split", "lost", "spelled", "foreign", "plain", "equal")  # keys of a group, where true: see `check_data`


def encode_rows(run, rows, encode, tokenizer, stops, **options):
    """Return the groups that `encode`, a function of common/tokenization.py, makes of all rows, in the rows' order.
    Every rank encodes its part of the rows, in several processes if it is alone, and receives those of the others. A
    row that the chat template refuses becomes no group; if it refuses every row, its first complaint ends the run."""
    options["template_kwargs"] = json.loads(run.args.chat_template_kwargs)
    if run.args.overlong != "truncate_prompt" and not getattr(run.args, "split_overlong", False):
        tokenizer.most_tokens = run.args.max_length  # else a part of a long row is used
    chunks = [rows[first : first + CHUNK_ROWS] for first in range(0, len(rows), CHUNK_ROWS)]
    own_chunks = chunks[run.rank :: run.world]
    settings = encode, tokenizer, stops, options
    encode_chunk(rows[:1], *settings)  # in every process, as the columns that it reads leave `unread` there
    run.unread = run.unread or rows[0].unread
    processes = 1
    if run.world == 1 and len(rows) >= MANY_ROWS:
        processes = min(os.cpu_count(), len(chunks))
    groups, refusals, errors = [], [], []
    for results in progress(run, "tokenise", encode_chunks(own_chunks, settings, processes), len(own_chunks)):
        groups += results[0]
        refusals += results[1]
        errors += results[2]
    agree(run, errors[0] if errors else None)
    if run.world > 1:
        gathered = gather_tensors(groups_to_tensors(groups, run.device), run.group)
        groups = []
        for tensors in gathered:
            groups += tensors_to_groups(tensors)
    if not groups:
        agree(run, refusals[0] if refusals else None)
    if refusals:
        say(run, f"refused   {printable(refusals[0])}")
    return sorted(groups, key=lambda group: group["row"])


def encode_chunks(chunks, settings, processes):
    """Yield `encode_chunk` of every chunk, in any order."""
    if processes == 1:
        for chunk in chunks:
            yield encode_chunk(chunk, *settings)
        return
    context = multiprocessing.get_context("fork")  # a child has the rows already, and only its groups travel
    readers = []
    for number in range(processes):
        reader, writer = context.Pipe(duplex=False)
        context.Process(target=send_chunks, args=(writer, chunks[number::processes], settings), daemon=True).start()
        writer.close()  # the child's copy is now the only one: when the child is gone, reading ends
        readers.append(reader)
    missing = len(chunks)
    while readers:
        for reader in connection.wait(readers):
            try:
                yield reader.recv()
                missing -= 1
            except EOFError:
                readers.remove(reader)
    if missing:
        raise RuntimeError(f"a process that tokenises rows was killed: {missing} of {len(chunks)} parts are missing")


def send_chunks(writer, chunks, settings):
    """Be a child of `encode_chunks`. Without its parent there is no one to send to, and it ends."""
    with suppress(BrokenPipeError):
        for chunk in chunks:
            writer.send(encode_chunk(chunk, *settings))


def encode_chunk(rows, encode, tokenizer, stops, options):
    """Return the rows' groups, what the chat template said of rows that it refused, and the first error of a row."""
    groups, refusals = [], []
    for row in rows:
        try:
            made = encode(row, tokenizer, stops, **options)
        except Refusal as refusal:
            refusals.append(str(refusal))
        except Panic as error:
            return groups, refusals, [str(problem(row, "cannot be encoded", error, "Mend the row"))]
        except InputError as error:
            return groups, refusals, [str(error)]
        else:
            groups += made if isinstance(made, list) else [made]
    return groups, refusals, []


def groups_to_tensors(groups, device):
    """Return groups as `encode` makes them as tensors that ranks can exchange: four bytes a token and a few a group."""
    numbers, lengths = [], []
    ids, scored = array("i"), array("b")
    for group in groups:
        marks = [int(mark in group) for mark in MARKS]
        numbers.append([group["row"], len(group["prompt"]), len(group["completions"]), *marks])
        ids.extend(group["prompt"])
        for completion in group["completions"]:
            flags = array("b", completion["scored"] or [])
            lengths.append([len(completion["ids"]), len(flags)])
            ids.extend(completion["ids"])
            scored.extend(flags)
    tensors = {
        "numbers": torch.tensor(numbers, dtype=torch.int64).view(-1, 3 + len(MARKS)),
        "lengths": torch.tensor(lengths, dtype=torch.int64).view(-1, 2),
        "ids": torch.tensor(ids, dtype=torch.int32),
        "scored": torch.tensor(scored, dtype=torch.int8),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def tensors_to_groups(tensors):
    """Return the groups of `groups_to_tensors`."""
    groups = []
    ids = array("i", tensors["ids"].cpu().numpy().tobytes())
    scored = tensors["scored"].bool().tolist()
    lengths = iter(tensors["lengths"].tolist())
    token = flag = 0
    for row, prompt_length, num_completions, *marks in tensors["numbers"].tolist():
        prompt = ids[token : token + prompt_length]
        token += prompt_length
        completions = []
        for length, num_flags in islice(lengths, num_completions):
            flags = scored[flag : flag + num_flags] if num_flags else None
            completions.append({"ids": ids[token : token + length], "scored": flags})
            token += length
            flag += num_flags
        group = {"prompt": prompt, "completions": completions, "row": row}
        group.update({mark: True for mark, is_set in zip(MARKS, marks) if is_set})
        groups.append(group)
    return groups
