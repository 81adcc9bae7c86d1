"""Rows of any supported format -> token ids with a scored span -> flat batches. Nothing here knows a method.

A *group* is what every method trains on: {"prompt": array("i"), "completions": [completion, ...], "row": its index};
a *completion* is {"ids": array("i"), "scored": list[bool], or None: every token}. Scripts add keys of their own.
"""

import hashlib
import heapq
import json
import re
import reprlib
import signal
import threading
from array import array
from functools import lru_cache, partial
from itertools import compress, groupby, pairwise, repeat
from os.path import commonprefix, exists, isdir, isfile  # Path's own raise where a name is too long
from pathlib import Path

import torch

FILES = (".jsonl", ".json", ".parquet", ".csv")
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = dict(human="user", gpt="assistant", function_call="assistant", function="tool", observation="tool")
TEXT = re.compile("[^\ud800-\udfff]*")  # no half of a surrogate pair, which JSON can write and no tokenizer takes
PATIENCE = 10  # seconds that a chat template may take for one conversation; milliseconds are usual
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 160
SHORT.maxlist = 20


class InputError(ValueError):
    """One line: what is wrong (where): what was found. What to type. Scripts print it and exit with code 2."""


class Row(dict):
    index, where = 0, "row"  # its index in the data set, and FILE:ROW for messages


def problem(where, what, seen, fix):
    """-> InputError about a row or a name. What was found is shown as a short repr: one line that no terminal obeys."""
    return InputError(f"{what} ({getattr(where, 'where', where)}): {SHORT.repr(seen)}. {fix}")


# ---- rows -----------------------------------------------------------------------------------------------------------


def strip_none(value):
    """Arrow gives each row the keys of all rows, filled with None, which chat templates take for values."""
    if isinstance(value, dict):
        return {key: strip_none(item) for key, item in value.items() if item is not None}
    return [strip_none(item) for item in value] if isinstance(value, list) else value


def read_rows(name, split):
    """-> [(FILE:ROW, object)] of a file, a folder that `datasets` saved, or a hub id (split: also CONFIG/SPLIT)."""
    path, rows, line = Path(name), [], 0
    try:
        if path.suffix in (".jsonl", ".json"):
            data = path.read_bytes()
            if data.lstrip()[:1] == b"[":
                rows = list(enumerate(json.loads(data), 1))
            else:
                for line, text in enumerate(data.split(b"\n"), 1):
                    if text.strip():
                        rows.append((line, json.loads(text)))
        else:
            import datasets  # takes a second, and most runs do not need it

            datasets.disable_progress_bars()
            datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error says it
            if isdir(name):
                data = datasets.load_from_disk(name)
                data = data[split] if isinstance(data, dict) else data
            elif path.suffix in FILES:
                data = datasets.load_dataset(path.suffix[1:], data_files=name, split="train")
            else:
                config, _, split = split.rpartition("/")
                data = datasets.load_dataset(name, config or None, split=split)
            rows = list(enumerate(data.to_list(), 1))
        return [(f"{name}:{line}", row) for line, row in rows]
    except Exception as error:  # readers share no class of errors; all of them are about the input, and stay chained
        raise problem(f"{name}:{line}" if line else name, "cannot read the data", error.__cause__ or error,
                      "Type --dataset FILE (.jsonl: an object per line), FOLDER, HUB_ID or HUB_ID:SPLIT") from error


def load_rows(name, split=None, rename="", tiny="demonstrations"):
    """-> rows in file order. name: "tiny" | file | folder (files SPLIT*, or saved by `datasets`) | hub id; all :SPLIT.
    rename: "old:new,old:new". Keys that hold None are dropped, nested ones too."""
    if split is None and ":" in name and not exists(name):
        name, split = name.rsplit(":", 1)
    path = Path(name)
    if not name:
        raise problem("--dataset", "no data set", name, "Type --dataset FILE, FOLDER or HUB_ID")
    if name == "tiny":  # its splits are files of their own: tiny:test
        path, split = Path(__file__).parent / "tiny" / f"{split or tiny}.jsonl", None
    split = split or "train"
    files = [str(path)]
    if path.suffix in FILES and split != "train":
        raise problem(name, "a single file has no splits", split, "Give the file of that split as --dataset")
    if isdir(path) and not any((path / mark).exists() for mark in ("state.json", "dataset_dict.json")):
        every = sorted(file for file in path.iterdir() if file.suffix in FILES)
        mine = [file for file in every if file.name.startswith(split)]
        files = [str(file) for file in mine or (every if split == "train" else [])]
    rows, columns, names = [], set(), dict(pair.partition(":")[::2] for pair in rename.split(",") if pair)
    for where, value in (found for file in files for found in read_rows(file, split)):
        if not isinstance(value, dict):
            raise problem(where, "a row is not an object", value, "Write one JSON object per line")
        columns.update(value)
        try:
            row = Row(strip_none(value))
        except RecursionError as error:
            raise problem(where, "nested too deep", value, "Write flat columns") from error
        row |= {new: row.pop(old) for old, new in names.items() if old in row}
        row.index, row.where = len(rows), where
        rows.append(row)
    if not rows:
        raise problem(name, "no rows in split", split, f"Type --dataset FILE, or FOLDER of SPLIT*{'|'.join(FILES)}")
    if "" in names.values() or names.keys() - columns:
        raise problem(name, f"--rename {rename} does not fit columns", sorted(columns), "Type --rename old:new,old:new")
    return rows


def fingerprint(rows):
    """-> 16 hex digits that change when a row, or the order of rows, does."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


# ---- tokens ---------------------------------------------------------------------------------------------------------


def load_tokenizer(path, chat_template=""):
    """-> tokenizer of a model folder or hub id; chat_template: FILE with a jinja template that replaces its own."""
    from transformers import AutoTokenizer

    if chat_template and not isfile(chat_template):
        raise problem(chat_template, "no chat template", "no such file", "Type --chat_template FILE")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if chat_template:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        tokenizer.encode("a")  # what is broken inside shows only now
    except Exception as error:  # these loaders raise anything, plain Exception too; the files are input
        raise problem(path, "cannot load the tokenizer", error, "Check --model and --chat_template FILE") from error
    return tokenizer


def stop_ids(tokenizer, generation_config=None):
    """-> sorted ids that end a completion: in the loss, in sampling and in the saved generation_config alike.

    The template's end of turn is the first control token that it puts after an assistant's content; an ordinary token
    there, such as Llama-2's space, would end every answer at its first space."""
    eos = getattr(generation_config, "eos_token_id", None)
    eos, known = eos if isinstance(eos, list) else [eos], tokenizer.get_vocab().values()
    if not all(stop is None or type(stop) is int and stop in known for stop in eos):
        raise problem(tokenizer.name_or_path, "no tokens of the tokenizer", eos, "Fix eos_token_id in its *config.json")
    stops = {tokenizer.eos_token_id, *eos}
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
        after = render(Row(), tokenizer, None, turn, False, tokenize=False).rpartition("ANSWER")[2]
        ids = tokenizer.encode(after, add_special_tokens=False)
        stops.add(next((token for token in ids if token in tokenizer.added_tokens_decoder), None))
    if stops == {None}:
        raise problem(tokenizer.name_or_path, "no token ends a completion", tokenizer.special_tokens_map,
                      "Set eos_token in tokenizer_config.json, or type --chat_template FILE with an end of turn")
    return sorted(stops - {None})


def expire(*_):
    raise TimeoutError(f"no end after {PATIENCE} seconds")


def render(row, tokenizer, options, messages, generation, tokenize=True):
    """-> ids (or text) of the messages; the row's columns tools and chat_template_kwargs, values or JSON, take part."""
    if not tokenizer.chat_template:
        raise problem(row, "messages, but the tokenizer has no chat template", messages, "Type --chat_template FILE")
    try:
        tools, extra = (json.loads(value) if isinstance(value, str) else value
                        for value in (row.get("tools"), row.get("chat_template_kwargs")))
        limited = threading.current_thread() is threading.main_thread()  # in another one (rewards) no alarm can be set
        if limited:
            signal.signal(signal.SIGALRM, expire)
            signal.alarm(PATIENCE)
        try:
            text = tokenizer.apply_chat_template(  # spelled out: what a row must not replace
                messages, tools=tools, chat_template=None, add_generation_prompt=generation, tokenize=False,
                continue_final_message=False, **{**(options or {}), **(extra or {})})
        finally:
            signal.alarm(0) if limited else None
        if len(text) > 2**24:
            raise ValueError(f"it writes {len(text)} characters")
        return tokenizer.encode(text, add_special_tokens=False) if tokenize else text
    except Exception as error:  # a template is a program of its own, and may raise anything
        raise problem(row, "the chat template fails", error, "Fix the row, or type --chat_template FILE") from error


def column(row, name):
    """-> text, or messages with a known role and text content (ShareGPT's from/value converted, text parts joined)."""
    value, messages = row[name], []
    chat = isinstance(value, list) and len(value) > 0
    if chat != {"text": False, "messages": True, "conversations": True}.get(name, chat):
        raise problem(row, f"wrong kind of column {name}", value, 'Write text or [{"role": "user", "content": ""}]')
    for message in value if chat else [{"role": "user", "content": value}]:
        message = message if isinstance(message, dict) else {"role": message}
        role, content = str(message.get("role", message.get("from"))), message.get("content", message.get("value"))
        role = SHAREGPT.get(role, role)
        if role not in ROLES:
            raise problem(row, f"unknown role in column {name}", role, f"Use {', '.join(ROLES)}")
        parts = content if isinstance(content, list) else []
        if parts and all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
            content = "".join(str(part.get("text", "")) for part in content)
        calls = content is None and message.get("tool_calls")
        if not calls and not (isinstance(content, str) and re.fullmatch(TEXT, content)):
            raise problem(row, f"column {name} holds what is not text", content, "Write a string, or --rename old:new")
        messages.append({**message, "role": role, "content": content})
    if name == "prompt" and messages[-1]["role"] == "assistant":
        raise problem(row, "the prompt ends with the assistant", messages[-1], "Move that message into the completion")
    return messages if chat else content


def columns_of(row, *formats):
    """-> the columns of the first format that the row has, each text or messages."""
    for names in formats:
        if all(name in row for name in names):
            return [column(row, name) for name in names]
    wanted = " | ".join(" + ".join(names) for names in formats)
    raise problem(row, f"wanted columns {wanted}; found", sorted(row), "Type --rename old:new,old:new")


def encode_text(tokenizer, text):
    """-> ids of a text that begins a sequence: BOS once if the tokenizer adds it to texts, nothing at the end."""
    ids, bos = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode("")[:1]
    return ids if bos != [tokenizer.bos_token_id] or ids[:1] == bos else bos + ids


def make_group(row, prompt, ids, scored=None, **more):
    completion = {"ids": array("i", ids), "scored": scored}
    return {"prompt": array("i", prompt), "completions": [completion], "row": getattr(row, "index", 0), **more}


def encode_chat(row, render, stops, prompt, answer, scope):
    """-> groups with the answer's assistant turns scored, each to its stop id: one group if the template only ever
    appends, else one per turn, as it is at inference, marked split."""
    messages = prompt + answer
    turns = [k for k in range(max(len(prompt), 1), len(messages)) if messages[k]["role"] == "assistant"]
    if not turns or (prompt and turns[0] != len(prompt)):
        raise problem(row, "no assistant turn after the prompt", messages, "Let an assistant's message follow a user's")
    parts, appends = [], True
    for k in turns[-1:] if scope == "last" else turns:
        before, after = render(messages[:k], True), render(messages[: k + 1], False)
        same = len(commonprefix([before, after]))  # less than before if a turn is opened otherwise than it is written
        end = next((n for n in range(same, len(after)) if after[n] in stops), len(after) - 1) + 1
        parts.append((before, after[same:end]))
        appends = appends and same == len(before)
    first, whole = len(parts[0][0]), parts[-1][0] + parts[-1][1]
    if not appends or any(whole[: len(before) + len(ids)] != before + ids for before, ids in parts):
        return [make_group(row, before, ids, split=True) for before, ids in parts]
    scored = [False] * len(whole)
    for before, ids in parts:
        scored[len(before) : len(before) + len(ids)] = [True] * len(ids)
    return [make_group(row, whole[:first], whole[first:], scored[first:] if len(parts) > 1 else None)]


def encode_answers(row, prompt, answers, tokenizer, stops, options, scope="all"):
    """-> for each answer its groups. prompt and answers: text, or messages."""
    if isinstance(prompt, str) and isinstance(answers[0], list):
        prompt = [{"role": "user", "content": prompt}]  # a common layout: the question, then whole conversations
    if any(type(answer) is not type(prompt) for answer in answers):
        raise problem(row, "text and messages are mixed", [prompt, *answers], "Write prompt and answers alike")
    if isinstance(prompt, list):
        fresh = [answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer for answer in answers]
        return [encode_chat(row, partial(render, row, tokenizer, options), stops, prompt, a, scope) for a in fresh]
    groups, start = [], encode_text(tokenizer, prompt)
    for answer in answers:
        ids = encode_text(tokenizer, prompt + answer)  # SentencePiece adds a space to a text that stands alone
        clean = ids[: len(start)] == start  # else a token straddles the border
        ids = ids[len(start) :] if clean else tokenizer.encode(answer, add_special_tokens=False)
        if not ids or ids[-1] not in stops:
            ids.append(stops[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id)
        groups.append([make_group(row, start, ids)])
    return groups


def encode_demonstration(row, tokenizer, stops, scope="all", template_kwargs=None):
    """-> groups of one completion. Scored: the assistant's turns of messages or conversations (scope "all" | "last"),
    the completion after a prompt, every token of text but its first."""
    *prompt, answer = columns_of(row, ["messages"], ["conversations"], ["prompt", "completion"], ["text"])
    prompt = prompt[0] if prompt else answer[:0]
    return encode_answers(row, prompt, [answer], tokenizer, stops, template_kwargs, scope)[0]


def encode_preference(row, tokenizer, stops, template_kwargs=None):
    """-> group with completions [chosen, rejected]; without a column prompt it is what both begin with."""
    *prompt, chosen, rejected = columns_of(row, ["prompt", "chosen", "rejected"], ["chosen", "rejected"])
    if not prompt:
        size = min(len(chosen), len(rejected))
        same = next((k for k in range(size) if chosen[k] != rejected[k]), size)
        same = min(same, size - 1) if isinstance(chosen, list) else len(chosen[:same].removesuffix(" "))
        prompt, chosen, rejected = [chosen[:same]], chosen[same:], rejected[same:]
        if prompt == [[]]:
            raise problem(row, "chosen and rejected begin with no common message", chosen, "Add a column prompt")
    pair = encode_answers(row, prompt[0], [chosen, rejected], tokenizer, stops, template_kwargs)
    if max(map(len, pair)) > 1:
        raise problem(row, "the template rewrites earlier turns of an answer that has several", chosen,
                      "Keep one assistant turn in chosen and rejected, or type --chat_template FILE")
    return {**pair[0][0], "completions": [group["completions"][0] for (group,) in pair]}


def encode_prompt(row, tokenizer, template_kwargs=None):
    """-> array("i"): what the model sees before its own first token."""
    (prompt,) = columns_of(row, ["prompt"])
    text = isinstance(prompt, str)
    ids = encode_text(tokenizer, prompt) if text else render(row, tokenizer, template_kwargs, prompt, True)
    if not ids:
        raise problem(row, "no token in column prompt", prompt, "Write a prompt, or --rename old:new")
    return array("i", ids)


def token_picture(group, tokenizer, color=True):
    """-> text: prompt dim, scored tokens green (without color >>so<<), the rest plain; control characters escaped."""
    def paint(ids, style, limit=1600):
        text = tokenizer.decode(list(ids), skip_special_tokens=False)
        text = text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        return f"\x1b[{style}m{text}\x1b[0m" if color else f">>{text}<<" if style == 32 else text

    picture = paint(group["prompt"], 2, 400)
    for completion in group["completions"]:
        flags = completion["scored"] or [True] * len(completion["ids"])
        flags = flags if group["prompt"] else [False, *flags[1:]]  # nothing predicts the first token of a sequence
        picture += "\n  " * (len(group["completions"]) > 1)
        for on, run in groupby(zip(completion["ids"], flags), key=lambda pair: pair[1]):
            picture += paint([token for token, _ in run], 32 if on else 0)
    return picture


# ---- batches --------------------------------------------------------------------------------------------------------


def fit(groups, max_length, overlong="drop"):
    """-> (kept groups, counts of rows). Length: prompt + longest completion, in tokens; no completion is ever cut.

    overlong: "drop" | "truncate_prompt" (from its left) | "error". A completion without a scored token drops its group.
    """
    kept, longest, long, unscored = [], 0, set(), set()
    for group in groups:
        prompt, completions, skip = group["prompt"], group["completions"], 0 if group["prompt"] else 1
        answer = max((len(completion["ids"]) for completion in completions), default=0)
        length = len(prompt) + answer
        longest = max(longest, length)
        if not all(any(c["scored"][skip:]) if c["scored"] else len(c["ids"]) > skip for c in completions):
            unscored.add(group["row"])
        elif length <= max_length:
            kept.append(group)
        elif overlong == "error":
            raise problem(f"row {group['row'] + 1}", f"over --max_length {max_length}: tokens", length,
                          f"Type --max_length {length}, or --overlong drop")
        else:
            long.add(group["row"])
            if overlong == "truncate_prompt" and answer < max_length:
                kept.append({**group, "prompt": prompt[answer - max_length :]})
    rows = [{group["row"] for group in some} for some in (groups, kept)]  # a row may have become several groups
    counts = {"rows": len(rows[0]), "kept": len(rows[1]), "overlong": len(long), "unscored": len(unscored)}
    return kept, counts | {"longest": longest}


def split_group(group, max_length, bos=None):
    """-> [group], or if it is longer its pieces of at most max_length tokens, for losses that are a sum over tokens.

    A piece is a sequence of its own, without what stood before it: a long answer goes on without its prompt. It begins
    with the row's BOS, if there is one, and the last token of the piece before, so that each scored token is scored
    once; pieces without any are left out. All but the last are marked cut: they end in no stop token."""
    (completion,) = group["completions"]
    ids, context, start, pieces = group["prompt"] + completion["ids"], array("i"), 0, []
    scored = [False] * len(group["prompt"]) + list(completion["scored"] or [True] * len(completion["ids"]))
    while len(ids) > max_length and start < len(ids):
        end = start + max_length - len(context)
        piece = {"ids": ids[start:end], "scored": scored[start:end]}
        pieces += [{**group, "prompt": context, "completions": [piece], "cut": end < len(ids)}] * any(piece["scored"])
        context, start = ids[: ids[0] == bos] + ids[end - 1 : end], end
    return pieces or [group]


@lru_cache(maxsize=8)
def permutation(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def order(n, seed, start, count):
    """-> rows at the global positions start..start+count-1: n positions are an epoch, each its own permutation."""
    return [permutation(n, seed, position // n)[position % n] for position in range(start, start + count)]


def balance(costs, parts):
    """-> for each part its sorted indices into costs: longest first, each to the part with the least work so far."""
    shares, heap = [[] for _ in range(parts)], [(0, 0, part) for part in range(parts)]  # (work, indices, part)
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):  # stable, no two entries tie: the same on all ranks
        work, size, part = heap[0]
        shares[part].append(k)
        heapq.heapreplace(heap, (work + costs[k], size + 1, part))
    return [sorted(share) for share in shares]


def micro_batches(groups, budget):
    """-> lists of groups of at most budget tokens (a prompt counts once): first-fit decreasing, so the largest first.
    A group of three or more completions may be cut, its prompt repeated; what is then still larger stands alone."""
    pieces = []
    for group in groups:
        for k, completion in enumerate(group["completions"]):
            size = len(completion["ids"])
            if k == 0 or (len(group["completions"]) > 2 and pieces[-1][0] + size > budget):
                pieces.append([len(group["prompt"]), {**group, "completions": []}])
            pieces[-1][0] += size
            pieces[-1][1]["completions"].append(completion)
    batches, rooms = [], []
    for size, group in sorted(pieces, key=lambda piece: -piece[0]):
        k = next((k for k, room in enumerate(rooms) if size <= room), len(rooms))
        if k == len(rooms):
            batches.append([])
            rooms.append(budget)
        batches[k].append(group)
        rooms[k] -= size
    return batches


def flat_batch(groups, device="cpu"):
    """-> one flat row of N tokens, M of them scored, in S completions numbered through the groups.

    A completion is a segment [prompt + completion]; several of one prompt: a segment for the prompt, then one for each.
    input_ids, position_ids (N,); cu_seqlens_q, cu_seqlens_k int32, max_q, max_k: segments, their keys; kv_index (K,):
    the keys' rows, a shared prompt's first (None: keys = queries); seq_segment (S,): the segment of a completion;
    rows, labels, seq (M,): row that predicts, token predicted, its completion. The shift by one is here only."""
    ids, positions, keys, rows, labels, seq, seq_segment = (array("i") for _ in range(7))
    cu_q, cu_k = array("i", [0]), array("i", [0])
    for group in groups:
        prompt, completions, context = group["prompt"], group["completions"], array("i")
        shared = len(completions) > 1 and len(prompt) > 0
        for completion in [None] * shared + completions:  # None: the shared prompt
            tokens = completion["ids"] if completion else array("i")
            begin, start = len(ids), len(rows)
            ids.extend(tokens if shared and completion else prompt + tokens)
            positions.extend(range(len(context), len(context) + len(ids) - begin))
            keys.extend(context)
            keys.extend(range(begin, len(ids)))
            cu_q.append(len(ids))
            cu_k.append(len(keys))
            if not completion:
                context = array("i", range(begin, len(ids)))
                continue
            skip = 0 if prompt else 1  # nothing predicts the first token of a sequence
            rows.extend(range(len(ids) - len(tokens) + skip - 1, len(ids) - 1))
            labels.extend(tokens[skip:])
            if shared and tokens:
                rows[start] = context[-1]
            if completion["scored"] is not None:
                for values in rows, labels:
                    values[start:] = array("i", compress(values[start:], completion["scored"][skip:]))
            seq.extend(repeat(len(seq_segment), len(rows) - start))
            seq_segment.append(len(cu_q) - 2)
    batch = {"input_ids": ids, "position_ids": positions, "rows": rows, "labels": labels, "seq": seq, "kv_index": keys,
             "seq_segment": seq_segment, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    for name, values in batch.items():
        tensor = torch.frombuffer(values, dtype=torch.int32) if values else torch.empty(0, dtype=torch.int32)
        batch[name] = tensor.to(device, torch.int32 if name.startswith("cu_") else torch.long)
    batch |= {"max_" + x: max((b - a for a, b in pairwise(cu)), default=0) for x, cu in (("q", cu_q), ("k", cu_k))}
    return batch if len(keys) > len(ids) else {**batch, "kv_index": None}
