"""From a data set of any supported format to rows, and from a row to its columns: text, or messages."""
import hashlib
import json
import reprlib
import re
from os.path import exists, isdir  # Path's own raise where a name is too long
from pathlib import Path

from common.runtime.flags import InputError

FILES = (".jsonl", ".json", ".parquet", ".csv")
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = dict(human="user", gpt="assistant", function_call="assistant", function="tool", observation="tool")
TEXT = re.compile("[^\ud800-\udfff]*")  # no half of a surrogate pair, which JSON can write and no tokenizer takes
SHORT = reprlib.Repr()
SHORT.maxstring, SHORT.maxother, SHORT.maxlist = 160, 160, 20


class Row(dict):
    index, where = 0, "row"  # its index in the data set, and FILE:ROW for messages


def problem(where, what, seen, fix, kind=InputError):
    """Return an InputError about a Row or a name; what was seen there becomes a short repr that no terminal obeys."""
    return kind(f"{what} ({getattr(where, 'where', where)}): {SHORT.repr(seen)}. {fix}")


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


def columns_of(row, *formats):
    """Return the columns of the first format (a list of names) that the row has, each text or messages."""
    for names in formats:
        if all(name in row for name in names):
            return [column(row, name) for name in names]
    wanted = " | ".join(" + ".join(names) for names in formats)
    raise problem(row, f"wanted columns {wanted}; found", sorted(row), "Type --rename old:new,old:new")


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
