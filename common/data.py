"""From a data set of any supported format to rows, and from a row to its columns: text, or messages."""
import gzip
import hashlib
import json
import reprlib
import re
from os.path import exists, isdir, isfile  # Path's own raise where a name is too long
from pathlib import Path

from common.runtime.flags import InputError

FILES = (".jsonl", ".json", ".parquet", ".csv")  # each also with .gz behind it
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = dict(human="user", gpt="assistant", function_call="assistant", function="tool", observation="tool")
WRITERS = dict(prompt="user", completion="assistant", chosen="assistant", rejected="assistant")  # of --as_chat's turns
NOT_READ = ("image", "images", "video", "videos", "audio", "audios", "history")  # a model would answer what it misses
REASONING = ("reasoning_content", "reasoning", "thinking")
TEXT = re.compile("[^\ud800-\udfff]*")  # no half of a surrogate pair, which JSON can write and no tokenizer takes
BOUND = r"(-?\d+(?:\.\d+)?%|-?\d+)?"  # of a slice
SLICE = re.compile(rf"(.*)\[{BOUND}:{BOUND}\]", re.S)
PAIR = re.compile(r"(.+?):([\w.-]+)(?:,|$)", re.S)  # of --rename: ends at a ":name" before a comma or the end
FIELD = re.compile(r"\{([^{}\n]+)\}")  # of a template in --rename
SHORT = reprlib.Repr()
SHORT.maxstring, SHORT.maxother, SHORT.maxlist = 160, 160, 20


class Row(dict):
    index, where = 0, "row"  # its index in the data set, and FILE:ROW for messages
    unread = set()  # columns that nothing has asked for yet: one set for all rows of a data set

    def get(self, name, default=None):
        self.unread.discard(name)
        return super().get(name, default)


def problem(where, what, seen, fix, kind=InputError):
    """Return an InputError about a Row or a name; what was seen there becomes a short repr that no terminal obeys."""
    return kind(f"{what} ({getattr(where, 'where', where)}): {SHORT.repr(seen)}. {fix}")


# ---- files ---------------------------------------------------------------------------------------
def strip_none(value):
    """Return the value without keys that hold None: Arrow writes them, and chat templates take them for values."""
    if isinstance(value, dict):
        return {key: strip_none(item) for key, item in value.items() if item is not None}
    return [strip_none(item) for item in value] if isinstance(value, list) else value


def once(pairs):
    """Return the object of JSON's pairs. A key that is there twice would lose a value without a word."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a key is there twice: {[key for key, _ in pairs]}")
    return value


def selected(count, slices):
    """Return the range of `count` rows that slices leave, one after the other: pairs of texts such as "95%" or ""."""
    left = range(count)
    for texts in slices:
        bounds = []
        for text in texts:
            if text.endswith("%"):
                text = round(float(text[:-1]) * len(left) / 100)
            bounds.append(None if text == "" else int(text))
        left = left[slice(*bounds)]
    return left


def read_rows(name, split, slices):
    """Return (FILE:ROW, object) pairs of a file, a folder saved by `datasets` or a hub id (split: or CONFIG/SPLIT)."""
    kind, rows, line = Path(name.removesuffix(".gz")).suffix, [], 0
    try:
        for part in Path(name).rglob("*") if isdir(name) else [name]:
            if exists(part) and not isdir(part) and not isfile(part):
                raise ValueError(f"{part} is a pipe or a device, which may have no end")
        if kind in (".jsonl", ".json", ".csv"):
            with (gzip.open if name.endswith(".gz") else open)(name, "rb") as file:
                content = file.read(4 if kind == ".csv" else -1)
            encoding = json.detect_encoding(content)
            if not encoding.startswith("utf-8"):
                raise ValueError(f"its text is {encoding.upper()}, save it as UTF-8")
            content = content.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        if kind in (".jsonl", ".json"):
            if content.lstrip()[:1] == b"[":
                rows = list(enumerate(json.loads(content, object_pairs_hook=once), 1))
            else:
                for line, text in enumerate(content.split(b"\n"), 1):
                    if text.strip():
                        rows.append((line, json.loads(text, object_pairs_hook=once)))
                        strip_none(rows[-1][1])  # only to see that it is not nested too deep
            rows = [rows[k] for k in selected(len(rows), slices)]
        else:
            import datasets  # takes a second, and most runs do not need it
            datasets.disable_progress_bars()
            datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error says it
            if isdir(name):
                table = datasets.load_from_disk(name)
                table = table[split] if isinstance(table, dict) else table
            elif kind in FILES:
                table = datasets.load_dataset(kind[1:], data_files=name, split="train")
                if kind == ".csv" and "__index_level_0__" in table.column_names:
                    raise ValueError("its rows have more fields than its header")  # each would be in the wrong column
            else:
                config, _, split = split.rpartition("/")
                table = datasets.load_dataset(name, config or None, split=split)
            places = selected(len(table), slices)
            for place, row in zip(places, table.select(list(places)).to_list()):
                rows.append((place + 1, {key: strip_none(value) for key, value in row.items()}))
    except Exception as error:  # readers share no class of errors; all of them are about the input, and stay chained
        raise problem(f"{name}:{line}" if line else name, "cannot read the data", error.__cause__ or error,
                      "Type --dataset or --eval_dataset FILE (an object a line), FOLDER or HUB_ID:SPLIT") from error
    return [(f"{name}:{line}", row) for line, row in rows]


def is_data(path):
    return Path(path.name.removesuffix(".gz")).suffix in FILES


def load_rows(name, args, tiny="demonstrations"):
    """Return the Rows of a data set in file order. name: a file, a folder (files SPLIT*, or saved by `datasets`), a hub
    id, or "tiny" for a file of common/tiny (`tiny` is its split). NAME:SPLIT chooses a split; without one
    args.dataset_split does, else it is "train". A slice behind either is part of it: [:1000], [95%:]."""
    slices = []
    while not exists(name) and (found := SLICE.fullmatch(name)):
        name, *bounds = found.groups(default="")
        slices.insert(0, bounds)
    split = ""
    if ":" in name and not exists(name):
        name, split = name.rsplit(":", 1)
        if not split:
            raise problem(name, "no split behind the colon", split, "Type --dataset NAME, or NAME:SPLIT")
    split = split or args.dataset_split
    while found := SLICE.fullmatch(split):
        split, *bounds = found.groups(default="")
        slices.insert(0, bounds)
    if not name:
        raise problem("--dataset", "no data set", name, "Type --dataset FILE, FOLDER or HUB_ID")
    path = Path(name)
    if name == "tiny":  # its splits are files of their own: tiny:test
        path, split = Path(__file__).parent / "tiny" / f"{split or tiny}.jsonl", ""
    split = split or "train"
    if is_data(path) and split != "train":
        raise problem(name, "a single file has no splits", split, "Give the file of that split as --dataset")
    files = [path]
    if isdir(path) and not exists(path / "state.json") and not exists(path / "dataset_dict.json"):
        every_file = sorted(file for file in path.iterdir() if is_data(file))
        named = [file for file in every_file if file.name.startswith(split)]
        files = every_file if split == "train" and not named else named
    found = []
    for file in files:
        found += read_rows(str(file), split, slices if len(files) == 1 else [])
    if len(files) > 1:
        found = [found[k] for k in selected(len(found), slices)]
    rows, columns = [], set()
    for where, value in found:
        if not isinstance(value, dict):
            raise problem(where, "a row is not an object", value, "Write one JSON object per line")
        columns.update(value)
        row = Row(value)
        row.index, row.where = len(rows), where
        rows.append(row)
    if not rows:
        split += "".join(f"[{start}:{stop}]" for start, stop in slices)
        raise problem(name, "no rows in split", split, f"Type --dataset FILE, or FOLDER of SPLIT*{'|'.join(FILES)}")
    columns |= rename_columns(name, rows, columns, args.rename)
    for row in rows:
        row.unread = columns
        for writes, role in WRITERS.items():
            if args.as_chat and isinstance(row.get(writes), str):
                row[writes] = [{"role": role, "content": row[writes]}]
    return rows


# ---- columns -------------------------------------------------------------------------------------
def rename_columns(name, rows, columns, rename):
    """Give columns other names, "old:new,old:new". old: a column, a place inside of one (`reward.truth`, `answers.0`),
    or a template of these, "{instruction}\\n{input}". Take what it reads out of `columns`, and return the new names."""
    pairs = PAIR.findall(rename)
    wanted, seen = set(), set()
    for old, _ in pairs:
        wanted.update(FIELD.findall(old) or [old])
    for row in rows if pairs else []:
        values = {}
        for old, new in pairs:
            value = fill(row, old, seen) if FIELD.search(old) else value_at(row, old, seen)
            if value is not None or old in row:
                values[new] = value
        for old, _ in pairs:
            row.pop(old, None)
        row.update(values)
    if wanted - seen or PAIR.sub("", rename):
        fix = r'Type --rename old:new,outer.inner:new,"{one}\n{two}:new"'
        raise problem(name, f"--rename {rename} does not fit columns", sorted(columns), fix)
    columns.difference_update(seen, [path.partition(".")[0] for path in seen])
    return {new for _, new in pairs}


def value_at(row, path, seen):
    """Return what the row holds at a path, a column or else steps into objects and lists, or None. `seen` gets paths
    that some row has."""
    steps = [path] if path in row else path.split(".")
    value = row
    for step in steps:
        if isinstance(value, list) and step.isdecimal():
            value = dict(enumerate(value))
            step = int(step)
        value = value[step] if isinstance(value, dict) and step in value else None
    if value is not None or path in row:
        seen.add(path)
    return value


def fill(row, template, seen):
    """Return the template with the row's values for {names}. A line is left out where all of its names are empty."""
    lines = []
    for line in template.replace("\\n", "\n").split("\n"):
        pieces = FIELD.split(line)  # every second one is a path
        for k in range(1, len(pieces), 2):
            value = value_at(row, pieces[k], seen)
            if not isinstance(value, str | int | float | None):
                raise problem(row, f"--rename fills in text, and {pieces[k]} is none", value, "Name a part of it")
            pieces[k] = "" if value is None else str(value)
        if len(pieces) == 1 or any(pieces[1::2]):
            lines.append("".join(pieces))
    return "\n".join(lines)


def fingerprint(rows):
    """Return 16 hex digits that change when a row, or the order of rows, does."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def columns_of(row, *formats):
    """Return the columns of the first format (a list of names) that the row has, each text or messages. A column system
    becomes the first turn of messages."""
    for name in NOT_READ:
        if row.get(name):
            fix = f"Write its turns as messages, or leave it out: --rename {name}:other"
            raise problem(row, f"only text and messages are read, not column {name}", row[name], fix)
    for names in formats:
        if any(row.get(name) is None for name in names):
            continue
        columns = [column(row, name) for name in names]
        if isinstance(columns[0], list) and row.get("system"):
            turn = convert_message(row, "system", {"role": "system", "content": row["system"]})
            first = columns[0][0]
            if first["role"] == "system":
                raise problem(row, "a system turn, and a column system", row["system"], "Type --rename system:other")
            columns = [[turn, *answer] if answer[:1] == [first] else answer for answer in columns]
        return columns
    wanted = " | ".join(" + ".join(names) for names in formats)
    nulls = [name for name in row if row[name] is None and name in wanted.split()]
    found = f"null in {', '.join(nulls)}; found" if nulls else "found"
    raise problem(row, f"wanted columns {wanted}; {found}", sorted(row), f"Type --rename old:new,old:new{csv(row)}")


def csv(row):
    """Return advice if the row is of a CSV file, whose reader guesses what a field is."""
    is_csv = ".csv" in getattr(row, "where", "")
    return ". CSV reads 7 as a number, NA or nothing as null: write JSON lines, with quotes" if is_csv else ""


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
    """Return the message with "role" and "content": ShareGPT's from and value are converted, text parts are joined, and
    calls of tools, also those of the old key or role function_call, become tool_calls with objects as arguments."""
    message = dict(message) if isinstance(message, dict) else {"role": message}
    kind = str(message.get("role", message.get("from")))
    role = SHAREGPT.get(kind, kind)
    if role not in ROLES:
        raise problem(row, f"unknown role in column {name}", role, f"Use {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    calls, old_call = message.pop("tool_calls", None), message.pop("function_call", None)
    if kind == "function_call":
        old_call, content = content, ""
    if calls or old_call:
        message["tool_calls"] = parse_calls(row, calls or old_call, is_old=not calls)
    parts = content if isinstance(content, list) else []
    if parts and all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        content = "".join(str(part.get("text", "")) for part in parts)
    if content is None and (role == "tool" or "tool_calls" in message or any(map(message.get, REASONING))):
        content = ""  # as OpenAI writes a turn that only calls tools
    if not (isinstance(content, str) and TEXT.fullmatch(content)):
        what = "half a character" if isinstance(content, str) else type(content).__name__
        raise problem(row, f"column {name} holds {what}, not text", content,
                      f"Write a string, or --rename old:new{csv(row)}")
    return {**message, "role": role, "content": content}


def parse_calls(row, calls, is_old):
    """Return a list of calls {"function": {"name", "arguments"}} or {"name", "arguments"}, as chat templates take them.
    What is JSON in it becomes an object: a template would encode a text a second time."""
    try:
        parsed = json.loads(calls) if isinstance(calls, str) else calls
        found = []
        for call in parsed if isinstance(parsed, list) else [parsed]:
            if is_old:
                call = {"type": "function", "function": call}
            function = dict(call.get("function", call))
            arguments = function.get("arguments") or {}
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            if not (isinstance(function["name"], str) and isinstance(arguments, dict)):
                raise TypeError(arguments)
            function["arguments"] = arguments
            found.append({**call, "function": function} if "function" in call else function)
        return found
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise problem(row, "a tool call that is none", calls, 'Write {"name": "", "arguments": {}}') from error
