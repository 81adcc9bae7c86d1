"""From rows of any supported format to groups of token ids with scored spans (groups: see common/batches.py)."""
import hashlib
import json
import re
import reprlib
import signal
import threading
from array import array
from itertools import groupby
from os.path import commonprefix, exists, isdir, isfile  # Path's own raise where a name is too long
from pathlib import Path

from common.batches import predicted_flags
from common.runtime.flags import InputError

FILES = (".jsonl", ".json", ".parquet", ".csv")
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = dict(human="user", gpt="assistant", function_call="assistant", function="tool", observation="tool")
TEXT = re.compile("[^\ud800-\udfff]*")  # no half of a surrogate pair, which JSON can write and no tokenizer takes
PATIENCE = 10  # seconds that a chat template may take for one conversation; milliseconds are usual
SHORT = reprlib.Repr()
SHORT.maxstring, SHORT.maxother, SHORT.maxlist = 160, 160, 20


class Row(dict):
    index, where = 0, "row"  # its index in the data set, and FILE:ROW for messages


def problem(where, what, seen, fix):
    """Return an InputError about a Row or a name; what was seen there becomes a short repr that no terminal obeys."""
    return InputError(f"{what} ({getattr(where, 'where', where)}): {SHORT.repr(seen)}. {fix}")


def strip_none(value):
    """Return the value without keys that hold None: Arrow writes them, and chat templates take them for values."""
    if isinstance(value, dict):
        return {key: strip_none(item) for key, item in value.items() if item is not None}
    return [strip_none(item) for item in value] if isinstance(value, list) else value


def read_rows(name, split):
    """Return (FILE:ROW, object) pairs of a file, a folder saved by `datasets` or a hub id (split: or CONFIG/SPLIT)."""
    path, rows, line = Path(name), [], 0
    try:
        if path.suffix in (".jsonl", ".json"):
            content = path.read_bytes()
            if content.lstrip()[:1] == b"[":
                rows = enumerate(json.loads(content), 1)
            else:
                for line, text in enumerate(content.split(b"\n"), 1):
                    if text.strip():
                        rows.append((line, json.loads(text)))
        else:
            import datasets  # takes a second, and most runs do not need it
            datasets.disable_progress_bars()
            datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error says it
            if isdir(name):
                table = datasets.load_from_disk(name)
                table = table[split] if isinstance(table, dict) else table
            elif path.suffix in FILES:
                table = datasets.load_dataset(path.suffix[1:], data_files=name, split="train")
            else:
                config, _, split = split.rpartition("/")
                table = datasets.load_dataset(name, config or None, split=split)
            rows = enumerate(table.to_list(), 1)
    except Exception as error:  # readers share no class of errors; all of them are about the input, and stay chained
        raise problem(f"{name}:{line}" if line else name, "cannot read the data", error.__cause__ or error,
                      "Type --dataset or --eval_dataset FILE (an object a line), FOLDER or HUB_ID:SPLIT") from error
    return [(f"{name}:{line}", row) for line, row in rows]


def load_rows(name, args, tiny="demonstrations"):
    """Return the Rows of a data set in file order. name: a file, a folder (files SPLIT*, or saved by `datasets`), a hub
    id, or "tiny" for a file of common/tiny (`tiny` is its split). NAME:SPLIT chooses a split; without one
    args.dataset_split does, else it is "train". args.rename, "old:new,old:new", gives columns other names."""
    split, rename = args.dataset_split, args.rename
    if ":" in name:
        name, split = (name, "") if exists(name) else name.rsplit(":", 1)
    if not name:
        raise problem("--dataset", "no data set", name, "Type --dataset FILE, FOLDER or HUB_ID")
    path = Path(name)
    if name == "tiny":  # its splits are files of their own: tiny:test
        path, split = Path(__file__).parent / "tiny" / f"{split or tiny}.jsonl", ""
    split = split or "train"
    if path.suffix in FILES and split != "train":
        raise problem(name, "a single file has no splits", split, "Give the file of that split as --dataset")
    files = [path]
    if isdir(path) and not exists(path / "state.json") and not exists(path / "dataset_dict.json"):
        every_file = sorted(file for file in path.iterdir() if file.suffix in FILES)
        named = [file for file in every_file if file.name.startswith(split)]
        files = every_file if split == "train" and not named else named
    names = dict(pair.partition(":")[::2] for pair in rename.split(",") if pair)  # old: new
    rows, columns = [], set()
    for file in files:
        for where, value in read_rows(str(file), split):
            if not isinstance(value, dict):
                raise problem(where, "a row is not an object", value, "Write one JSON object per line")
            columns.update(value)
            try:
                value = strip_none(value)
            except RecursionError as error:
                raise problem(where, "nested too deep", value, "Write flat columns") from error
            row = Row({old: item for old, item in value.items() if old not in names})
            row.update({new: value[old] for old, new in names.items() if old in value})
            row.index, row.where = len(rows), where
            rows.append(row)
    if not rows:
        raise problem(name, "no rows in split", split, f"Type --dataset FILE, or FOLDER of SPLIT*{'|'.join(FILES)}")
    if "" in names.values() or names.keys() - columns:
        raise problem(name, f"--rename {rename} does not fit columns", sorted(columns), "Type --rename old:new,old:new")
    return rows


def fingerprint(rows):
    """Return 16 hex digits that change when a row, or the order of rows, does."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def load_tokenizer(path, chat_template=""):
    """Return the tokenizer of a model folder or hub id. chat_template: a FILE of jinja that replaces its template."""
    from transformers import AutoTokenizer  # takes seconds
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
    """Return the sorted ids that end a completion, in the loss, in sampling and in the saved generation_config alike. A
    template's end of turn is the first control token after an answer; Llama-2's space would end each at its first."""
    eos = getattr(generation_config, "eos_token_id", None)
    eos = eos if isinstance(eos, list) else [eos]
    vocabulary = tokenizer.get_vocab().values()
    if not all(stop is None or (type(stop) is int and stop in vocabulary) for stop in eos):
        raise problem(tokenizer.name_or_path, "no tokens of the tokenizer", eos, "Fix eos_token_id in its *config.json")
    stops = {tokenizer.eos_token_id, *eos} - {None}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
        _, _, after_answer = render(Row(), tokenizer, None, turns, False, tokenize=False).rpartition("ANSWER")
        ids = tokenizer.encode(after_answer, add_special_tokens=False)
        stops.update([token for token in ids if token in tokenizer.added_tokens_decoder][:1])
    if not stops:
        raise problem(tokenizer.name_or_path, "no token ends a completion", tokenizer.special_tokens_map,
                      "Set eos_token in tokenizer_config.json, or type --chat_template FILE with an end of turn")
    return sorted(stops)


def template_options(args):
    return json.loads(args.chat_template_kwargs)


def expire(*_):
    raise TimeoutError(f"no end after {PATIENCE} seconds")


def render(row, tokenizer, options, messages, generation, tokenize=True):
    """Return the ids (or text) of the messages in the chat template, with the beginning of an assistant's turn after
    them if generation. The row's columns tools and chat_template_kwargs, values or JSON, go before the options."""
    if not tokenizer.chat_template:
        raise problem(row, "messages, but the tokenizer has no chat template", messages, "Type --chat_template FILE")
    try:
        columns = row.get("tools"), row.get("chat_template_kwargs")
        tools, extra = [json.loads(value) if isinstance(value, str) else value for value in columns]
        can_limit = threading.current_thread() is threading.main_thread()  # no other thread (rewards) can set an alarm
        if can_limit:
            signal.signal(signal.SIGALRM, expire)
            signal.alarm(PATIENCE)
        try:
            text = tokenizer.apply_chat_template(  # spelled out: what a row must not replace
                messages, tools=tools, chat_template=None, add_generation_prompt=generation, tokenize=False,
                continue_final_message=False, **{**(options or {}), **(extra or {})})
        finally:
            if can_limit:
                signal.alarm(0)
        if len(text) > 2**24:
            raise ValueError(f"it writes {len(text)} characters")
        return tokenizer.encode(text, add_special_tokens=False) if tokenize else text
    except Exception as error:  # a template is a program of its own, and may raise anything
        raise problem(row, "the chat template fails", error, "Fix the row, or type --chat_template FILE") from error


def column(row, name):
    """Return the column: text, or messages, each with a known role and text as its content."""
    value = row[name]
    is_chat = isinstance(value, list) and value != []
    if (name == "text" and is_chat) or (name in ("messages", "conversations") and not is_chat):
        raise problem(row, f"wrong kind of column {name}", value, 'Write text or [{"role": "user", "content": ""}]')
    if not is_chat:
        return convert_message(row, name, {"role": "user", "content": value})["content"]
    messages = [convert_message(row, name, message) for message in value]
    if name == "prompt" and messages[-1]["role"] == "assistant":
        raise problem(row, "the prompt ends with the assistant", messages[-1], "Move that message into the completion")
    return messages


def convert_message(row, name, message):
    """Return the message with "role" and "content": ShareGPT's from and value are converted, text parts are joined."""
    message = message if isinstance(message, dict) else {"role": message}
    role = str(message.get("role", message.get("from")))
    role = SHAREGPT.get(role, role)
    if role not in ROLES:
        raise problem(row, f"unknown role in column {name}", role, f"Use {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    parts = content if isinstance(content, list) else []
    if parts and all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        content = "".join(str(part.get("text", "")) for part in parts)
    only_calls_tools = content is None and message.get("tool_calls")
    if not only_calls_tools and not (isinstance(content, str) and TEXT.fullmatch(content)):
        raise problem(row, f"column {name} holds what is not text", content, "Write a string, or --rename old:new")
    return {**message, "role": role, "content": content}


def columns_of(row, *formats):
    """Return the columns of the first format (a list of names) that the row has, each text or messages."""
    for names in formats:
        if all(name in row for name in names):
            return [column(row, name) for name in names]
    wanted = " | ".join(" + ".join(names) for names in formats)
    raise problem(row, f"wanted columns {wanted}; found", sorted(row), "Type --rename old:new,old:new")


def encode_text(tokenizer, text):
    """Return the ids of a text that begins a sequence: BOS once if the tokenizer adds it to texts, no EOS."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    begin = tokenizer.encode("")[:1]
    return begin + ids if begin == [tokenizer.bos_token_id] and ids[:1] != begin else ids


def make_group(row, prompt, ids, scored=None, **entries):
    completion = {"ids": array("i", ids), "scored": scored}
    return {"prompt": array("i", prompt), "completions": [completion], "row": getattr(row, "index", 0), **entries}


def encode_chat(row, prompt, answer, tokenizer, stops, options, scope):
    """Return groups with the answer's assistant turns (scope "last": the last one) scored, each to its stop id: one
    group if the template only ever appends, else one a turn, as it is at inference, marked "split"."""
    messages = answer if answer[: len(prompt)] == prompt else prompt + answer  # some data repeat the prompt
    turns = [k for k in range(max(len(prompt), 1), len(messages)) if messages[k]["role"] == "assistant"]
    if not turns or (prompt and turns[0] != len(prompt)):
        raise problem(row, "no assistant turn after the prompt", messages, "Let an assistant's message follow a user's")
    if scope == "last":
        turns = turns[-1:]
    parts, only_appends = [], True  # parts: (ids before a turn, ids of the turn)
    for turn in turns:
        before = render(row, tokenizer, options, messages[:turn], True)
        after = render(row, tokenizer, options, messages[: turn + 1], False)
        start = len(commonprefix([before, after]))
        end = start
        while end < len(after) and after[end] not in stops:
            end += 1
        ids = after[start : end + 1]
        parts.append((before, ids))
        only_appends = only_appends and start == len(before)  # else a turn is opened otherwise than it is written
    sequence = before + ids  # of the last turn
    scored = [False] * len(sequence)
    for before, ids in parts:
        end = len(before) + len(ids)
        scored[len(before) : end] = [True] * len(ids)
        only_appends = only_appends and sequence[:end] == before + ids
    if not only_appends:
        return [make_group(row, before, ids, split=True) for before, ids in parts]
    begin = len(parts[0][0])
    return [make_group(row, sequence[:begin], sequence[begin:], scored[begin:] if len(parts) > 1 else None)]


def encode_answers(row, prompt, answers, tokenizer, stops, options, scope="all"):
    """Return the groups of all answers, at least one of each. prompt and answers: text, or messages."""
    if isinstance(prompt, str) and isinstance(answers[0], list):
        prompt = [{"role": "user", "content": prompt}]  # a common layout: the question, then whole conversations
    if any(type(answer) is not type(prompt) for answer in answers):
        raise problem(row, "text and messages are mixed", [prompt, *answers], "Write prompt and answers alike")
    groups = []
    if isinstance(prompt, list):
        for answer in answers:
            groups += encode_chat(row, prompt, answer, tokenizer, stops, options, scope)
        return groups
    prompt_ids = encode_text(tokenizer, prompt)
    for answer in answers:
        ids = encode_text(tokenizer, prompt + answer)  # SentencePiece adds a space to a text that stands alone
        straddles = ids[: len(prompt_ids)] != prompt_ids  # a token of both
        ids = tokenizer.encode(answer, add_special_tokens=False) if straddles else ids[len(prompt_ids) :]
        if not ids or ids[-1] not in stops:
            ids.append(stops[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id)
        groups.append(make_group(row, prompt_ids, ids))
    return groups


def encode_demonstration(row, tokenizer, stops, scope="all", template_kwargs=None):
    """Return groups of one completion. Scored: assistant turns (scope "all" | "last"), the completion, or all text."""
    *before, answer = columns_of(row, ["messages"], ["conversations"], ["prompt", "completion"], ["text"])
    prompt = before[0] if before else type(answer)()  # an empty text, or no messages
    return encode_answers(row, prompt, [answer], tokenizer, stops, template_kwargs, scope)


def encode_preference(row, tokenizer, stops, template_kwargs=None):
    """Return a group with the completions [chosen, rejected]; without a column prompt it is what both begin with."""
    *before, chosen, rejected = columns_of(row, ["prompt", "chosen", "rejected"], ["chosen", "rejected"])
    if before:
        prompt = before[0]
    else:
        length, shorter = 0, min(len(chosen), len(rejected))
        while length < shorter and chosen[length] == rejected[length]:
            length += 1
        # A completion needs a message; a space goes with the word after it.
        length = min(length, shorter - 1) if isinstance(chosen, list) else len(chosen[:length].removesuffix(" "))
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
        if prompt == []:
            raise problem(row, "chosen and rejected begin with no common message", chosen, "Add a column prompt")
    groups = encode_answers(row, prompt, [chosen, rejected], tokenizer, stops, template_kwargs)
    if len(groups) > 2:
        raise problem(row, "the template rewrites earlier turns of an answer that has several", chosen,
                      "Keep one assistant turn in chosen and rejected, or type --chat_template FILE")
    return {**groups[0], "completions": groups[0]["completions"] + groups[1]["completions"]}


def encode_prompt(row, tokenizer, template_kwargs=None):
    """Return array("i"): what the model sees before its own first token."""
    (prompt,) = columns_of(row, ["prompt"])
    is_text = isinstance(prompt, str)
    ids = encode_text(tokenizer, prompt) if is_text else render(row, tokenizer, template_kwargs, prompt, True)
    if not ids:
        raise problem(row, "no token in column prompt", prompt, "Write a prompt, or --rename old:new")
    return array("i", ids)


def visible_text(tokenizer, ids, limit):
    """Return the ids' text without control characters, escaped, and beyond the limit without its middle."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False)
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def token_picture(group, tokenizer, color=True):
    """Return the group as text: prompt dim, scored tokens green (without color >>so<<), the rest plain."""
    dim, green, plain = "\x1b[2m{}\x1b[0m", "\x1b[32m{}\x1b[0m", "\x1b[0m{}\x1b[0m"
    if not color:
        dim, green, plain = "{}", ">>{}<<", "{}"
    picture = dim.format(visible_text(tokenizer, group["prompt"], limit=400))
    for completion in group["completions"]:
        if len(group["completions"]) > 1:
            picture += "\n  "
        flags = predicted_flags(group, completion)
        for is_scored, pairs in groupby(zip(completion["ids"], flags), key=lambda pair: pair[1]):
            text = visible_text(tokenizer, [token for token, _ in pairs], limit=1600)
            picture += (green if is_scored else plain).format(text)
    return picture
