"""Bad inputs by the thousand: each ends in a run that is right, or in exit code 2 or 3 with one line to act on.

    python benchmarks/hostile.py [--cases 1200] [--seed 0] [--scripts NAME ...] [--only FAMILY ...] [--case N]
                                 [--out FILE.jsonl]

Case N of a seed and of these scripts is always the same: a small valid run of one of them, then one to three mutations
of its rows, files, template, tokenizer, configuration, weights, checkpoint, flags, folders or of what it alone reads.
Scripts run as their last line runs them (parse_args, launch), in a fork; every 20th case is a real `python
methods/x.py`. What is asked of the end:

    code 0  final/ loads and is finite, and holds the files of a model alone, none of them a link; metrics are finite
            (or TRAIN001 or GRPO003 says so), the rows kept are those that the generator expects; a resumed run ends
            with bitwise the weights of one that nobody touched
    code 2  one line `error: ...` that names an input of the case and what to type; alerts ([CODE ...]) may stand before
    code 3  the same, but what it names is the code of an alert
    always  no traceback, no hang, no control character on the terminal, nothing that looks finished after a failure,
            run.json agrees, planted code did not run, the file that the data points at was not read, and what belongs
            to others is there as it was, byte for byte
    values  the families from `scoring` on take one input at a time and know more of its end: what the picture of the
            first row scores, how many tokens, the loss by transformers, a metric, an alert, and words of the line;
            computed by hand, and by no code of ours

The first thousand cases are of sixteen families, those after them of eight more, which also run raft.py, prm.py and the
scripts of distillation.

Not promised: a template may fill the memory before its ten seconds are over; special tokens that the text of a row
spells out become those tokens; a checkpoint whose checksums were made right again after a change of its numbers is
believed; a config that asks for more memory than there is may end as the system ends it.

FILE.jsonl: a first row about the campaign, then a row per case: case, family, script, via, mutations, expected (good,
bad or either), code, error, seconds, ok, why (it is not). The same command goes on where it was interrupted.
"""
import argparse
import gzip
import hashlib
import importlib.util
import json
import math
import os
import pickle
import platform
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from dataclasses import fields
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # read at import
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU is what this is about
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from safetensors.torch import load_file, save_file

from common.runtime.flags import on_signal

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "common" / "tiny" / "model"
SCRIPTS = ["sft", "dpo", "grpo", "reward", "kto", "rloo"]
ONLINE, PAIRS = ("grpo", "rloo"), ("dpo", "reward")  # scripts that sample; scripts that read pairs, which kto may
STUDENTS = ("distillation", "gkd", "iw_opd")  # they have a --teacher
LATER_SCRIPTS = ["raft", "prm", *STUDENTS]  # of which only the later families are
TEACHER = ROOT / "common" / "tiny" / "teacher"
LIMIT = 60  # seconds that a case may take: most take one, a real process on a busy core ten
ROOM = 3 * 2**30  # bytes of memory that a case may ask for beyond the imports: a greedy one must not take the machine
SECRET = "SECRET-5f0c"  # in a file that rows, templates and indices point at
GRPO = ["--num_generations", "2", "--max_completion_length", "24", "--allow", "GRPO001", "GRPO002"]
BASE = "--batch_size 2 --max_steps 1 --max_length 200 --learning_rate 1e-4 --eval_every 0".split()
MORE_FLAGS = {
    "grpo": GRPO, "rloo": GRPO, "raft": [*GRPO, "RAFT001"],
    **dict.fromkeys(STUDENTS, [
        "--teacher", str(TEACHER), "--max_completion_length", "24", "--allow", "GRPO002"]),
}  # fmt: skip
ROWS = 8
FAMILIES, EXPECTED = {}, ("bad", "either", "good")


def mutation(family, often=1):
    """Enter a function of a case into the corpus. It changes the case and returns what must become of it."""

    def enter(function):
        FAMILIES.setdefault(family, []).extend([function] * often)
        return function

    return enter


class Poison:
    """What a pickle does when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


class Case:
    """A valid small run in a folder of its own; mutations change it before write() puts it on the disk."""

    def __init__(self, number, seed, folder, only=None, scripts=SCRIPTS):
        self.rng, self.number, self.folder = random.Random(f"{seed} {number}"), number, Path(folder)
        (families, number), names, turn = families_of(number, only), set(), len(scripts)
        self.script = scripts[number % turn]
        self.family = families[number // turn % len(families)] if families else None
        if self.family in LATER:  # another script each time that an input comes
            self.script = scripts[(number + number // turn // len(families)) % turn]
        self.canary, self.secret = self.folder / "canary", self.folder / "secret.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.secret.write_text(json.dumps({"text": SECRET, "prompt": SECRET, "completion": "x"}) + "\n")
        self.flags, self.names, self.kept, self.resumed, self.endless = {}, {"rows.jsonl"}, ROWS, False, False
        self.data, self.raw, self.chat, self.out, self.argv = self.folder / "rows.jsonl", None, True, "out", []
        self.want, self.only_plan, self.first, self.holder = {}, False, None, None
        self.python, self.environment = None, {}
        self.again = 0  # how often the same input came before
        self.others = {}  # path -> what it holds: what belongs to others
        self.is_closed = False  # whether no file may be added to the output folder, either
        self.panics = False  # whether the library of tokenizers may print lines of its own
        self.rows = self.base_rows()
        draw, chosen = self.rng, []
        count = draw.choice((1, 1, 2, 3)) if families else 0
        for k in range(1 if self.family in ALONE else count):
            easy = [name for name in ("rows", "text", "flags") if name in FAMILIES]
            pool = self.family if k == 0 else draw.choice(easy)
            mutate = draw.choice(FAMILIES[pool])
            if self.family in ALONE:
                inputs = FAMILIES[pool]
                rounds, place = divmod(number // turn // len(families) * turn + number % turn, len(inputs))
                mutate = inputs[place]
                self.again = rounds * inputs.count(mutate) + inputs[:place].count(mutate)
            if mutate not in [m for m, _ in chosen] and (k == 0 or self.family != "checkpoints"):
                self.names = {"rows.jsonl"}
                chosen.append((mutate, mutate(self)))
                names |= self.names
        self.names = names
        self.mutations = [m.__name__ for m, _ in chosen]
        self.expected = min((verdict for _, verdict in chosen), key=EXPECTED.index, default="good")
        if len(chosen) > 1:
            self.kept = None
            self.expected = "good" if self.expected == "good" else "either"  # one mutation may undo another

    def base_rows(self):
        """Eight rows of one of the script's formats."""
        rng, rows = self.rng, []
        kind = rng.choice({"sft": ("messages", "conversations", "text", "texts", "chats"),
                           "dpo": ("texts", "chats", "implicit"), "grpo": ("texts", "chats"),
                           "reward": ("texts", "chats", "implicit")}.get(self.script, ("texts", "chats")))
        self.kind, self.chat = kind, kind not in ("text", "texts")
        like = {"reward": "dpo", "rloo": "grpo", "raft": "grpo", **dict.fromkeys(STUDENTS, "sft")}
        like = like.get(self.script, self.script)
        for k in range(ROWS):
            a, b = rng.randrange(100, 999), rng.randrange(100, 999)
            q, right, wrong = f"What is {a} + {b}?", f"#### {a + b}", f"#### {a - b}"
            ask = [{"role": "user", "content": q}]
            say, err = ([{"role": "assistant", "content": text}] for text in (right, wrong))
            human = [{"from": "human", "value": q}, {"from": "gpt", "value": right}]
            rows.append({
                ("sft", "messages"): {"messages": ask + say}, ("sft", "conversations"): {"conversations": human},
                ("sft", "text"): {"text": f"{q} {right}"}, ("sft", "texts"): {"prompt": q, "completion": right},
                ("sft", "chats"): {"prompt": ask, "completion": say},
                ("dpo", "texts"): {"prompt": q, "chosen": right, "rejected": wrong},
                ("dpo", "chats"): {"prompt": ask, "chosen": say, "rejected": err},
                ("dpo", "implicit"): {"chosen": ask + say, "rejected": ask + err},
                ("grpo", "texts"): {"prompt": q, "answer": str(a + b)},
                ("grpo", "chats"): {"prompt": ask, "answer": str(a + b)},
                ("prm", "texts"): {"prompt": q, "completions": [f"{a}+{b}", right], "labels": [True, k % 2 == 1]},
                ("prm", "chats"): {"prompt": ask, "completions": [right, wrong, "done"], "labels": [True, False, True]},
                ("kto", "texts"): {"prompt": q, "completion": (wrong, right)[k % 2], "label": k % 2 == 1},
                ("kto", "chats"): {"prompt": ask, "completion": (err, say)[k % 2], "label": k % 2 == 1},
            }[like, kind])
        return json.loads(json.dumps(rows))  # no object is in two rows

    def become(self, script):
        """Another script's case, for what only it reads."""
        self.script, self.rows = script, []
        self.rows = self.base_rows()

    def each(self, values):
        """One of the values, the next one each time that this input comes."""
        return values[self.again % len(values)]

    def guard(self, path, is_closed=False):
        """What stands at this path belongs to others. is_closed: no file may be added there, either."""
        self.others[Path(path)] = inventory(path)
        self.is_closed |= is_closed

    def need_chat(self):
        while not self.chat:
            self.rows = self.base_rows()

    def row(self):
        return self.rng.choice(self.rows or [{}])

    def column(self, row):
        """A column that the script needs."""
        return self.rng.choice([name for name in row if name != "answer"] or ["prompt"])

    def messages(self):
        """-> a list of messages in a row; the case becomes one with messages."""
        self.need_chat()
        row = self.row()
        return self.rng.choice([value for value in row.values() if isinstance(value, list) and value] or [[{}]])

    def texts(self):
        """-> places (container, key) of all texts of a row."""
        row, found = self.row(), []
        for key, value in row.items():
            if isinstance(value, str):
                found.append((row, key))
            for message in value if isinstance(value, list) else []:
                found += [(message, k) for k in ("content", "value") if isinstance(message, dict) and k in message]
        return found or [(row, "prompt")]

    def lines(self):
        """The rows as lines of JSON, for what breaks them."""
        if self.raw is None:
            self.raw = [json.dumps(row).encode() for row in self.rows]
        return self.raw

    def model(self):
        """A copy of the tiny model that the case may damage."""
        folder = self.folder / "model"
        if not folder.exists():
            shutil.copytree(MODEL, folder)
            for path in folder.iterdir():
                path.chmod(0o644)
        self.flags["--model"] = str(folder)
        self.names |= {"--model", "model", "tokenizer"}
        return folder

    def edit(self, name, change):
        """change(settings) of a JSON file of the model; what it returns, if anything, is what is written."""
        path = self.model() / name
        settings = json.loads(path.read_text()) if path.is_file() else {}
        result = change(settings)
        path.write_text(json.dumps(settings if result is None else result))
        self.names |= {name}

    def write(self):
        """-> the command line."""
        if self.raw is not None:
            self.data.write_bytes(b"\n".join(self.raw))
        elif not self.data.exists():
            limit = sys.getrecursionlimit()
            sys.setrecursionlimit(9 * limit)  # ours only: a row may be as deep as the script's own limit, and deeper
            self.data.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            sys.setrecursionlimit(limit)
        flags = [*BASE, *MORE_FLAGS.get(self.script, []), "--dataset", str(self.data),
                 "--output_dir", str(self.folder / self.out)]
        flags += [] if "--eval_fraction" in self.argv else ["--eval_dataset", ""]
        if "--model" not in self.flags:
            flags += ["--model", str(MODEL)]
        for name, value in self.flags.items():
            flags += [name, value] if value is not None else [name]
        return [*flags, *self.argv]


# ---- rows ------------------------------------------------------------------------------------------------------------


WRONG = [None, 7, 1.5, True, False, [], {}, [1, 2], ["a"], [[]], [None], {"a": 1}, [{"role": "user"}], [{}], 10**30]


@mutation("rows")
def drop_column(case):
    row = case.row()
    row.pop(case.column(row), None)
    return "either" if case.script in PAIRS else "bad"


@mutation("rows", 3)
def wrong_type(case):
    row = case.row()
    value, implicit = case.rng.choice(WRONG), case.script in PAIRS and "prompt" not in row
    name = case.column(row)
    row[name] = value
    fine = implicit or case.script in PAIRS and value is None or name == "label" and type(value) is bool
    return "either" if fine else "bad"  # none: as if it were not there


@mutation("rows")
def wrong_type_everywhere(case):
    value, name = case.rng.choice(WRONG), case.column(case.row())
    for row in case.rows:
        row[name] = value
    return "bad" if value is not None or case.script not in PAIRS else "either"


@mutation("rows")
def strange_answer(case):
    case.row()["answer"] = case.rng.choice([*WRONG, "", "9" * 5000, "####", "\x1b[31m", "1e999", "-", ["a", {}]])
    case.names |= {"GRPO003"}
    return "either"


@mutation("rows", 2)
def extra_columns(case):
    names = ["x", "", " ", "row", "ids", "completions", "scored", "__class__", "self", "\u202e", "a\x1b[2J", "k" * 3000]
    for row in [case.row() for _ in range(3)]:
        row[case.rng.choice(names)] = case.rng.choice(WRONG)
    return "either" if case.script in ONLINE else "good"  # a reward function takes columns by name


@mutation("rows")
def other_spelling(case):
    row = case.row()
    name = case.column(row)
    row[case.rng.choice([name.upper(), name + " ", "\ufeff" + name, name + "\x00"])] = row.pop(name, "x")
    return "either" if case.script in PAIRS else "bad"


@mutation("rows")
def other_column_kind(case):
    """Messages where a text stands, and the reverse."""
    row = case.row()
    name = case.column(row)
    row[name] = "text" if isinstance(row.get(name), list) else [{"role": "user", "content": "hi"}]
    return "either"


@mutation("rows", 2)
def bad_message(case):
    message = case.rng.choice(case.messages())
    keys = [key for key in ("role", "content", "from", "value") if key in message] or ["role"]
    message[case.rng.choice(keys)] = case.rng.choice([*WRONG, "wizard\x1b[31m", "USER", [{"type": "image", "path":
                                                     str(case.secret)}], [{"type": "text", "text": 3}]])
    return "either"


@mutation("rows")
def message_that_is_none(case):
    messages = case.messages()
    messages[case.rng.randrange(len(messages))] = case.rng.choice([None, "hi", 3, [], ["role", "user"]])
    return "bad"


@mutation("rows")
def strange_turns(case):
    messages = case.messages()
    one = messages[-1]
    case.rng.choice([messages.reverse, messages.clear, lambda: messages.extend([dict(one)] * 500),
                     lambda: messages.insert(0, {"role": "system", "content": "s"}),
                     lambda: messages.insert(0, {"role": "assistant", "content": "s"}),
                     lambda: messages.append({"role": "tool", "content": "4"}),
                     lambda: messages.append({"role": "assistant", "tool_calls": [{"name": "f"}]}),
                     lambda: messages.append({"role": "assistant", "content": None, "tool_calls": 7})])()
    case.kept = None
    return "either"


@mutation("rows")
def template_arguments_in_a_row(case):
    case.need_chat()
    case.kept, attack = None, "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"
    case.row()["chat_template_kwargs"] = case.rng.choice([
        {"chat_template": attack.replace("CANARY", str(case.canary))}, {"chat_template": "x"},
        {"truncation": True, "max_length": 2}, {"tokenize": False},
        {"return_tensors": "pt"}, {"continue_final_message": True}, {"messages": []}, {"conversation": []},
        {"documents": 3}, {"return_dict": True}, {"padding": "max_length", "max_length": 10**9}, {"a": {"b": None}},
        {"tokenizer_kwargs": {"truncation": True, "max_length": 1}}, "no json", "[1]", 7, [1], "\x1b[31m", "null",
        {"add_generation_prompt": True}, {"tools": [1]}, {"x y": 1}, {"": 1}, {"eos_token": None}])
    return "either"


@mutation("rows")
def tools_in_a_row(case):
    case.need_chat()
    case.kept = None
    case.row()["tools"] = case.rng.choice([[{"name": "f"}], '[{"name": "f"}]', "[{", 7, {"a": 1}, [1], [[]], "",
                                           [{"name": "f", "parameters": {"file": str(case.secret)}}], "null"])
    return "either"


@mutation("rows")
def fewer_rows(case):
    del case.rows[case.rng.choice([0, 1, 2]):]
    case.kept = len(case.rows)
    return "good" if len(case.rows) > (case.script == "kto") else "bad"  # kto wants rows of both labels


@mutation("rows")
def deep_value(case):
    """Nested deeper than Python's stack, or nearly."""
    value, depth = 1, case.rng.choice([20, 200, 400, 700, 930, 990])
    for _ in range(depth):
        value = {"k": value} if case.rng.random() < 0.5 else [value]
    case.row()[case.rng.choice(["x", case.column(case.row())])] = value
    return "either"


# ---- text ------------------------------------------------------------------------------------------------------------

STRINGS = [
    " ", "\t\n", "\x00", "\x00" * 50, "\x1b]0;title\x07\x1b[2J", "\x1b[8m", "\u202eabc", "\u200b", "\ufeff",
    "\u2028a\x85b",
    "e" + "\u0301" * 60, "\U0001f9d1\u200d\U0001f4bb", "\U0010ffff", "\ufffe", "\u0627\u0644", "\u6f22\u5b57" * 20,
    "\r\n",
    "<|end|>", "<|im_end|>", "</s>", "<|user|>a<|assistant|>", "<|pad|>", "<|unk|>", "[INST]", "{{ 7 * 7 }}",
    "{% for %}",
    "{{ messages }}", "{% include 'secret.jsonl' %}", "%s%n{0}{x.__class__}", "$(touch canary)", "`touch canary`",
    "'; DROP TABLE rows; --", "../../secret.jsonl", "file:secret.jsonl", "\\u0000", "\\", '"', "null", "NaN", "####",
    "#### 1", "0" * 50, "a" * 60, "=cmd|'/c calc'!A0", "\x7f\x80\x9b31m", "#### \u0661\u0662", "-" * 30, "#" * 50,
]


@mutation("text", 5)
def strange_text(case):
    place, key = case.rng.choice(case.texts())
    place[key] = case.rng.choice(STRINGS)
    return "either" if case.script != "sft" else "good"  # pairs may lose their common message, answers their number


@mutation("text")
def strange_text_everywhere(case):
    text = case.rng.choice(STRINGS)
    for row in case.rows:
        for key, value in row.items():
            for message in value if isinstance(value, list) else []:
                if isinstance(message, dict):
                    message["content" if "content" in message else "value"] = text
            row[key] = value if isinstance(value, list) else text
    case.kept = None
    return "either"


@mutation("text")
def empty_text(case):
    place, key = case.rng.choice(case.texts())
    place[key], case.kept = "", None
    return "either"


@mutation("text")
def half_a_surrogate(case):
    place, key = case.rng.choice(case.texts())
    place[key] = case.rng.choice(["\ud800", "a\udfffb", "\udc00\ud800"])
    return "bad" if key != "answer" else "either"


@mutation("text", 2)
def huge_text(case):
    """Such a row is dropped, and counted."""
    place, key = case.rng.choice(case.texts())
    place[key] = case.rng.choice("a9 \n\U0001f600\u0301<") * case.rng.choice([1_000, 30_000, 1_000_000])
    case.names |= {"--max_length", "DATA005"}
    case.flags["--allow"] = "DATA005"
    if case.script in ONLINE:
        case.argv += ["--allow", "DATA005", "GRPO001", "GRPO002", "GRPO003"]
    case.kept = ROWS if key == "answer" else ROWS - 1
    return "good" if case.kind != "implicit" else "either"


@mutation("text")
def huge_text_is_an_error(case):
    place, key = case.rng.choice(case.texts())
    place[key] = "1 + 1 = 2 " * 300
    case.flags["--overlong"] = "error"
    case.names |= {"--max_length"}
    return "bad" if key != "answer" and case.kind != "implicit" else "either"


@mutation("text")
def text_cut_from_the_left(case):
    place, key = case.rng.choice(case.texts())
    place[key] = "1 + 1 = 2 " * 100
    case.flags |= {"--overlong": "truncate_prompt", "--allow": "DATA005"}
    if case.script in ONLINE:
        case.argv += ["--allow", "DATA005", "GRPO001", "GRPO002"]
    case.kept = None
    return "either"


# ---- lines of JSON ---------------------------------------------------------------------------------------------------


@mutation("lines", 3)
def broken_line(case):
    lines = case.lines()
    k = case.rng.randrange(len(lines))
    line = lines[k]
    lines[k] = case.rng.choice([
        line[: case.rng.randrange(1, len(line))], line + b"}", line + b",", line + line, line.replace(b'"', b"'"),
        b"// " + line, b"\x00", b"\xff\xfe", line.replace(b":", b": \xff", 1), b"3", b"null", b"[]", b"true", b'"text"',
        b"[" + line + b"]", b"NaN", b"-", b"{}", b'{"a": ' * 100_000, b'{"a": 1' + b"0" * 5000 + b"}", b'{"a"}',
        line.replace(b"{", b"{\n", 1), b"{" + line[1:-1] + b",}", b"\x1b[2J" + line, gzip.compress(line, mtime=0),
    ])
    return "bad"


@mutation("lines", 2)
def harmless_bytes(case):
    lines = case.lines()
    change = case.rng.randrange(7)
    if change == 0:
        lines[0] = b"\xef\xbb\xbf" + lines[0]
    elif change == 1:
        lines[:] = [line + b"\r" for line in lines]
    elif change == 2:
        lines[1:1] = [b"", b"   ", b"\t\r"]
    elif change == 3:
        lines[:] = [b"[" + b",\n".join(lines) + b"]"]
    elif change == 4:
        lines[0] = lines[0][:-1] + b', "x": NaN, "y": -Infinity, "z": 1e999}'
    elif change == 5:
        lines[0] = b"  " + lines[0] + b"  "
    else:
        lines[:] = [json.dumps(json.loads(line), ensure_ascii=False).encode() for line in lines]
    return "good"


@mutation("lines")
def keys_twice(case):
    lines = case.lines()
    name = case.column(case.row())
    lines[0] = lines[0][:-1] + f', "{name}": {case.rng.choice(["7", "null", "[]"])}}}'.encode()
    return "either"


@mutation("lines", 2)
def not_lines(case):
    whole = b"\n".join(case.lines())
    noise = bytes(case.rng.randrange(256) for _ in range(500))
    case.raw = [case.rng.choice([
        b"", b"\n\n \n", whole.decode().encode("utf-16"), gzip.compress(whole, mtime=0), noise, b"PAR1" + noise,
        b'{"data": [' + b",".join(whole.split(b"\n")) + b"]}", b"[" + whole + b"]", b"[]", b"[[]]", b"{}", b"[1, 2]",
        b"prompt,completion\na,b\n", b"<html>", b"\x00" * 1000, b"[" * 100_000, whole[: len(whole) // 2 - 2],
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ])]
    return "bad"


# ---- tables and folders ----------------------------------------------------------------------------------------------


def table(case):
    import pyarrow

    return pyarrow.Table.from_pylist(case.rows)


def as_parquet(case, content):
    import pyarrow.parquet

    case.data = case.folder / "rows.parquet"
    pyarrow.parquet.write_table(content, case.data)
    case.names = {"rows.parquet"}


@mutation("tables")
def whole_parquet(case):
    as_parquet(case, table(case))
    return "good"


@mutation("tables", 2)
def damaged_parquet(case):
    as_parquet(case, table(case))
    data = bytearray(case.data.read_bytes())
    how, verdict = case.rng.randrange(5), "bad"
    if how == 0:
        data = data[: case.rng.randrange(len(data))]
    elif how == 1:
        data = data[case.rng.randrange(1, len(data)):]
    elif how == 2:
        data, verdict = data.replace(b"PAR1", b"PAR2"), "bad"
    elif how == 3:
        verdict, case.kept = "either", None
        for _ in range(case.rng.choice([1, 5, 50])):
            data[case.rng.randrange(len(data))] ^= 1 << case.rng.randrange(8)
    else:
        data = bytearray()
    case.data.write_bytes(data)
    return verdict


@mutation("tables", 2)
def strange_columns(case):
    import pyarrow

    content, name = table(case), case.column(case.row())
    n, how = len(case.rows), case.rng.randrange(8)
    column = pyarrow.array([str(k) for k in range(n)])
    at = content.column_names.index(name)
    verdict = "either" if case.script in PAIRS else "bad"
    if how == 0:
        content = content.set_column(at, name, pyarrow.array(range(n)))
    elif how == 1:
        content = content.set_column(at, name, pyarrow.nulls(n))
    elif how == 2:
        content = content.set_column(at, name, pyarrow.array([b"\xff\x00"] * n))
    elif how == 3:
        content = content.set_column(at, name, pyarrow.array([[[["deep"]]]] * n))
    elif how == 4:
        content, verdict = content.append_column(name, column), "either"  # the name twice
    elif how == 5:
        content, verdict = content.append_column("x", pyarrow.nulls(n)), "good"
    elif how == 6:
        content = content.slice(0, 0)
    else:
        content, verdict = content.append_column("y", column.dictionary_encode()), "good"
    as_parquet(case, content)
    return verdict if case.script not in ONLINE or verdict != "good" else "either"


@mutation("tables", 2)
def strange_csv(case):
    if case.chat:
        case.kind, case.chat = "texts", False
        case.rows = [{"prompt": f"What is {k} + 1?", "completion": "two words", "chosen": "two words",
                      "rejected": "three", "answer": str(k + 1)} for k in range(ROWS)]
    if case.script == "kto":  # text of a table is no label
        case.rows = [{"prompt": "What is 1 + 1?", "chosen": "two words", "rejected": "three"} for _ in range(ROWS)]
    names = list(case.rows[0])
    lines = [",".join(names), *(",".join(f'"{row[name]}"' for name in names) for row in case.rows)]
    text, verdict = "\n".join(lines) + "\n", "bad"
    how = case.rng.randrange(10)
    if how == 0:
        verdict = "good"
    elif how == 1:
        text = "\n".join(lines[1:])  # no header
    elif how == 2:
        text = lines[0] + "\n"
    elif how == 3:
        text, verdict = text.replace('"', "", 1), "either"
    elif how == 4:
        text = text.replace(",", ";")
    elif how == 5:
        text, verdict = "\ufeff" + text.replace("\n", "\r\n"), "good"
    elif how == 6:
        text, verdict = text + '"a"\n' + ",".join(['"a"'] * 30) + "\n", "bad"
    elif how == 7:
        text, verdict = text + '"\x00","\x1b[31m"\n', "either"
    elif how == 8:
        text, verdict = f"{lines[0]},{names[0]}\n" + "".join(line + ',"z"\n' for line in lines[1:]), "either"
    else:
        text = ""
    case.data = case.folder / "rows.csv"
    case.data.write_text(text, encoding="utf-8")
    case.names = {"rows.csv"}
    case.kept = ROWS if verdict == "good" else None
    return verdict


@mutation("tables", 2)
def saved_folder(case):
    """As `datasets` saves one, and then not quite."""
    import datasets

    datasets.disable_progress_bars()
    case.data = case.folder / "saved"
    datasets.Dataset.from_list(case.rows).save_to_disk(str(case.data))
    case.names = {"saved"}
    files = sorted(case.data.iterdir())
    path, how = case.rng.choice(files), case.rng.randrange(5)
    if how == 0:
        return "good"
    case.kept = None
    if how == 1:
        path.unlink()
    elif how == 2:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == 3:
        path.write_text("{}")
    else:
        state = case.data / "state.json"
        state.write_text(state.read_text().replace("data-00000-of-00001.arrow", "../secret.jsonl"))
    return "either"


@mutation("tables", 2)
def strange_folder(case):
    case.data = folder = case.folder / "folder"
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in case.rows)
    case.names, how = {"folder"}, case.rng.randrange(8)
    if how == 0:
        return "bad"
    (folder / "train-0.jsonl").write_text(text)
    if how == 1:
        (folder / "train-1.jsonl").mkdir()
        return "bad"
    if how == 2:
        (folder / "train-1.jsonl").symlink_to(folder / "train-1.jsonl")
        return "bad"
    if how == 3:
        (folder / "train\x1b[31m\n.jsonl").write_text("{")
        case.names = {"train\\x1b[31m\\n.jsonl"}
        return "bad"
    if how == 4:
        for name in "notes.txt", "x.bin", "evil.py", "y.pkl":
            (folder / name).write_bytes(pickle.dumps(Poison(case.canary)))
        return "good"
    if how == 5:
        (folder / "train-1.jsonl").write_text(text)
        case.kept = 2 * ROWS
        return "good"
    if how == 6:
        case.flags["--dataset_split"] = case.rng.choice(["validation", "", "*", "../x", "train[:2]", "\x1b[31m"])
        case.kept = None
        return "either"
    (folder / "train-1.parquet").write_bytes(b"PAR1")
    return "bad"


@mutation("tables")
def datasets_that_are_none(case):
    name = case.rng.choice([
        "", "/", ".", "..", "no/such", "no/such/rows.jsonl", "tiny:", "tiny:nothing", "tiny:../../secret", ":", "a:b:c",
        "x" * 300, "x" * 5000, "a\nb", "\x1b[31m", "{}", "s3://bucket/x.jsonl", "http://127.0.0.1:9/x.jsonl", "-",
        "hf://datasets/a/b", "/dev/null", "/dev/null.jsonl", "~", "$HOME", "rows.pkl", "no such.jsonl", "a b/c d",
        "../" * 50 + "x.csv", "\u202ex.jsonl", "tiny:\x1b[31m", "squad:train:test", "__pycache__", ".jsonl",
        "x.jsonl:y",
        str(case.folder / "poison.pkl"), str(case.folder / "script.py"),
    ])
    (case.folder / "poison.pkl").write_bytes(pickle.dumps(Poison(case.canary)))
    (case.folder / "script.py").write_text(f"open({str(case.canary)!r}, 'w')\n")
    case.argv += ["--dataset", name]
    case.names = {"--dataset"}
    return "bad"


@mutation("tables")
def evaluation_data(case):
    """The held-out rows are as hostile as those to train on."""
    path = case.folder / "heldout.jsonl"
    how = case.rng.randrange(5)
    path.write_text(["", "{", json.dumps({"x": 1}), "".join(json.dumps(row) + "\n" for row in case.rows[:3]),
                     json.dumps({"prompt": "a" * 999, "completion": "b", "chosen": "b", "rejected": "c"})][how])
    case.argv += ["--eval_dataset", str(path), *(["--eval_samples", "1"] if case.script in ONLINE else [])]
    case.names = {"heldout.jsonl"}
    return "good" if how == 3 else "bad"


@mutation("tables")
def renamed_columns(case):
    name = case.column(case.row())
    how = case.rng.choice([f"{name}:", f":{name}", ":", "a", "a:b:c", f"{name}:x", ",,,", "no\x1b[31m:prompt", "::::",
                           f"{name}:{name}", "x" * 3000, f"{name}:x,x:{name}", "\n:\n"])
    case.flags["--rename"] = how
    case.names |= {"--rename"}
    return "good" if how in (",,,", f"{name}:{name}") else "either"


# ---- templates -------------------------------------------------------------------------------------------------------

CHAT = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
BAD_TEMPLATES = [
    "{{ messages[0].content.no.such }}", "{% for %}", "{% for m in messages %}", "{{ messages | nofilter }}", "{{",
    "{% nosuchtag %}", "{{ raise_exception('three\nlines\x1b[31m') }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}", "{% include 'SECRET' %}",
    "{% import 'SECRET' as x %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{% extends 'SECRET' %}", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{{ range(10 ** 9) | list }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 'a' * 10 ** 11 }}",
    "{% set n = namespace(s='ab') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "{{ '%d' % 'x' }}",
    "{{ messages[99] + 1 }}", "{{ none.x }}", "{{ messages | map('no') | list }}", "{{ 'a' + 1 }}", "{{ {}[[]] }}",
    "{% for i in range(60000) %}{% for j in range(600) %}aaaaaaaaaaaaaaaa{% endfor %}{% endfor %}", "{{ 9 ** 9 ** 9 }}",
    "{{ '%999999999999d' % 1 }}", "{{ 'x'.format_map(messages) + 1 }}",
    "{{ ''.join(messages) }}", "{{ messages.__class__ }}{{ raise_exception() }}", "{{ x.y.z }}",
    "{{ (1).__class__() }}",
    "{% set x = messages[0].update({'a': 1}) %}", "{{ messages | attr('clear')() }}", "{{ self.__init__.__globals__ }}",
    "{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}", "{{ 'a' * 2 ** 31 }}", "{{ dict(**3) }}",
]
STRANGE_TEMPLATES = [
    "{{ messages | batch(0) | list }}",
    "", " ", "constant", "{{ nope }}", "{{ messages | length }}", "{{ messages }}", "<|end|>", "{{ eos_token * 50 }}",
    "{% if add_generation_prompt %}x{% endif %}", "{{ messages[0].role }}", "{{ bos_token }}" + CHAT, "{# #}", CHAT * 2,
    "{% for i in range(5000) %}<|end|>{% endfor %}" + CHAT, "{{ messages | tojson }}", CHAT[::-1], CHAT[:60], "\ufeff",
    CHAT.replace("<|end|>", ""), CHAT.replace("m.content", "''"), "{{ strftime_now('%Y') }}" + CHAT, "\x1b[2J" + CHAT,
    "{% if messages | length > 1 %}x{% endif %}" + CHAT, "{{ messages[-1].content }}", "{{ messages[::-1] }}",
    "{{ 7 }}",
    "{% generation %}" + CHAT + "{% endgeneration %}", CHAT.replace("content", "content[::-1]"), "\U0001f600" + CHAT,
    CHAT + "\u2028{{ undefined_name }}", "{{ range(3) | list }}" + CHAT, "{% set messages = [] %}" + CHAT, "x" * 50_000,
]


@mutation("templates", 4)
def bad_template(case):
    case.need_chat()
    path = case.folder / "chat.jinja"
    text = case.rng.choice(BAD_TEMPLATES)
    path.write_text(text.replace("CANARY", str(case.canary)).replace("SECRET", str(case.secret)))
    case.flags["--chat_template"] = str(path)
    case.names |= {"--chat_template"}
    return "bad"


@mutation("templates", 2)
def strange_template(case):
    case.need_chat()
    path = case.folder / "chat.jinja"
    path.write_text(case.rng.choice(STRANGE_TEMPLATES), encoding="utf-8")
    case.flags["--chat_template"] = str(path)
    case.names |= {"--chat_template", "--dataset", "DATA"}
    case.kept = None
    return "either"


@mutation("templates")
def template_that_is_no_file(case):
    (case.folder / "latin.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    name = case.rng.choice(["no/such.jinja", "/", str(case.folder), "latin.jinja", "{{ messages }}", "x" * 5000, "\n"])
    case.flags["--chat_template"] = str(case.folder / name) if name == "latin.jinja" else name
    case.names |= {"--chat_template"}
    return "bad"


@mutation("templates", 2)
def template_arguments(case):
    case.need_chat()
    case.kept = None
    case.flags["--chat_template_kwargs"] = case.rng.choice([
        "", "{", "[1]", "7", "null", '"x"', "{'a': 1}", '{"tokenize": true}', '{"chat_template": "{{ 1 / 0 }}"}',
        '{"return_tensors": "pt"}', '{"truncation": true, "max_length": 1}', '{"add_generation_prompt": 1}', "{}x",
        '{"continue_final_message": true}', '{"a": NaN}', '{"messages": [], "tools": 3}', '{"\\u001b[31m": "\\ud800"}',
        '{"return_dict": true}', "{" * 5000, '{"documents": "x"}', '{"raise_exception": 1}',
        '{"a":' * 2000 + "1" + "}" * 2000,
    ])
    case.names |= {"--chat_template"}
    return "either"


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def junk(rng):
    return rng.choice([None, 0, -1, 10**9, 2**70, 1.5, math.nan, True, "", "x", "\x1b[31m", [], {}, [1], ["x"],
        {"a": 1},
                       [None], "<|end|>", [2, "x"], [[2]], "../secret.jsonl", 1e30])


@mutation("tokenizers", 2)
def no_special_tokens(case):
    names = case.rng.sample(["eos_token", "pad_token", "unk_token", "bos_token"], case.rng.randrange(1, 4))
    case.edit("tokenizer_config.json", lambda settings: [settings.pop(name, None) for name in names] and None)
    if case.rng.random() < 0.5:
        case.edit("generation_config.json", lambda settings: settings.pop("eos_token_id") and None)
        case.edit("config.json", lambda settings: settings.pop("eos_token_id") and None)
    if case.rng.random() < 0.5:
        (case.model() / "chat_template.jinja").unlink(missing_ok=True)
        case.names |= {"--chat_template"}
    case.names |= {"eos_token"}
    return "either"


@mutation("tokenizers", 2)
def strange_tokenizer_config(case):
    name = case.rng.choice([
        "eos_token", "pad_token", "bos_token", "unk_token", "model_max_length", "tokenizer_class", "padding_side",
        "chat_template", "backend", "added_tokens_decoder", "extra_special_tokens", "add_bos_token", "auto_map",
        "tokenizer_file", "vocab_file", "name_or_path", "additional_special_tokens", "split_special_tokens",
        "model_input_names", "legacy", "truncation_side", "tokenizer_type", "processor_class", "init_inputs",
        "do_lower_case",
    ])
    value = junk(case.rng)
    case.edit("tokenizer_config.json", lambda settings: settings.update({name: value}))
    case.mutated = f"{name}"
    return "either"


@mutation("tokenizers", 2)
def strange_tokenizer(case):
    name = case.rng.choice([
        "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "truncation", "padding",
        "version"])
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    value = case.rng.choice([junk(case.rng), cut, {"type": "Lowercase"}, {"type": "Nonsense"}, {"type": "ByteLevel"}])

    def change(settings):
        if case.rng.random() < 0.3:
            settings.pop(name, None)
        else:
            settings[name] = value

    case.edit("tokenizer.json", change)
    return "either"


@mutation("tokenizers", 2)
def tokens_beyond_the_model(case):
    token = case.rng.choice([103, 104, 5000, 2**20, 2**31, 2**40, -1])

    def change(settings):
        where = case.rng.randrange(3)
        if where == 0:
            settings["added_tokens"].append(settings["added_tokens"][0] | {"id": token, "content": "What"})
        elif where == 1:
            settings["model"]["vocab"]["a"] = token
        else:
            settings["added_tokens"][2]["id"] = token

    case.edit("tokenizer.json", change)
    return "either"


@mutation("tokenizers", 2)
def broken_tokenizer_file(case):
    name = case.rng.choice(["tokenizer.json", "tokenizer_config.json"])
    path = case.model() / name
    data = path.read_bytes()
    path.unlink()
    content = case.rng.choice([None, b"", b"{", b"{}", b"[]", b"null", b"7", data[: len(data) // 2],
        data.replace(b":", b";"),
                               b"\xff\xfe", b"\x00" * 100, data.replace(b'"vocab"', b'"vocabulary"'),
                               pickle.dumps(Poison(case.canary)), b'{"a":' * 100_000, "folder", "loop"])
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content == "loop":
        path.symlink_to(path)
    return "either" if name == "tokenizer_config.json" else "bad"


@mutation("tokenizers")
def tokenizer_with_code(case):
    folder = case.model()
    for name in "mine.py", "tokenization_mine.py", "__init__.py", "configuration_mine.py":
        (folder / name).write_text(f"open({str(case.canary)!r}, 'w')\n")
    target = case.rng.choice(["mine.Tokenizer", ["mine.Slow", "mine.Fast"], [None, "mine.Fast"], "x--mine.Tokenizer"])
    settings = {"auto_map": {"AutoTokenizer": target}, "tokenizer_class": case.rng.choice(["Tokenizer",
        "mine.Tokenizer"])}
    case.edit("tokenizer_config.json", lambda old: old.update(settings))
    return "either"


@mutation("tokenizers")
def strange_template_file(case):
    path = case.model() / "chat_template.jinja"
    case.need_chat()
    path.unlink()
    content = case.rng.choice([None, b"", b"\xff", b"{% for %}", b"{{ nope.x }}", "folder", b"{{ 1 / 0 }}"])
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    case.names |= {"--chat_template", "DATA"}
    return "bad"


# ---- configurations --------------------------------------------------------------------------------------------------


@mutation("configs", 2)
def missing_field(case):
    name = case.rng.choice(sorted(json.loads((MODEL / "config.json").read_text())))
    case.edit("config.json", lambda settings: settings.pop(name) and None)
    return "either"


@mutation("configs", 4)
def strange_field(case):
    names = sorted(json.loads((MODEL / "config.json").read_text()))
    name = case.rng.choice([*names, "sliding_window", "layer_types", "quantization_config", "attn_implementation",
                            "_attn_implementation", "torch_dtype", "rope_scaling", "is_decoder", "base_model_tp_plan"])
    small = [None, 0, -1, 1, 3, 64, 1.5, math.nan, True, "", "x", "\x1b[31m", [], {}, [1], {"a": 1},
        "someone/kernel", 1e30]
    small += [10**9] if name not in ("num_hidden_layers",) else []
    value = case.rng.choice(small)
    case.edit("config.json", lambda settings: settings.update({name: value}))
    return "either"


@mutation("configs")
def other_model_type(case):
    kind = case.rng.choice(["bert", "t5", "gpt2", "mamba", "whisper", "no-such", "", 7, None, [], "qwen3", "llama4",
    "clip"])
    arch = case.rng.choice([["X"], [], None, "x", ["BertForMaskedLM"], ["LlamaForCausalLM"], [7]])
    case.edit("config.json", lambda settings: settings.update(model_type=kind, architectures=arch))
    return "either"


@mutation("configs", 2)
def strange_generation_config(case):
    name = case.rng.choice(["eos_token_id", "eos_token_id", "pad_token_id", "bos_token_id", "max_length", "temperature",
                            "do_sample", "transformers_version", "cache_implementation", "custom_generate", "x"])
    value = junk(case.rng)
    case.edit("generation_config.json", lambda settings: settings.update({name: value}))
    case.names |= {"eos_token"}
    return "either"


@mutation("configs", 2)
def broken_config_file(case):
    name = case.rng.choice(["config.json", "config.json", "generation_config.json"])
    path = case.model() / name
    data = path.read_bytes()
    path.unlink()
    content = case.rng.choice([None, b"", b"{", b"{}", b"[]", b"null", b"7", data[: len(data) // 2], b"\xff\xfe",
                               b"\x00" * 100, data.replace(b":", b";"), pickle.dumps(Poison(case.canary)),
                               b'{"a":' * 99_999,
                               data + data])
    if content is not None:
        path.write_bytes(content)
    return "either"


@mutation("configs")
def model_with_code(case):
    folder = case.model()
    for name in "mine.py", "modeling_mine.py", "generate.py", "__init__.py", "custom_generate/generate.py":
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(case.canary)!r}, 'w')\ndef generate(*a, **k): return None\n")
    target = case.rng.choice(["mine.Model", "x--mine.Model", ["mine.Model"], "../mine.Model", 7])
    settings = {"auto_map": {"AutoConfig": target, "AutoModelForCausalLM": target}}
    kind = case.rng.choice([{}, {"model_type": "mine"}])
    case.edit("config.json", lambda old: old.update(settings | kind))
    return "either"


@mutation("configs")
def models_that_are_none(case):
    case.flags["--model"] = case.rng.choice([
        "", " ", "/", ".", "..", "no/such", "no such", "x" * 300, "x" * 5000, "a\nb", "\x1b[31m", "a/b/c/d", "-",
        "model.gguf",
        str(case.data), str(case.folder), "http://127.0.0.1:9/m", "/dev/null", "~", "\u202e", "Tiny", "tiny ", "--",
        "{}",
        "a" * 96 + "/b", "..model", "s3://x/y"])
    case.names = {"--model"}
    return "bad"


# ---- weights ---------------------------------------------------------------------------------------------------------


def shards(case):
    """The model's weights as two files and an index -> folder, index."""
    folder = case.model()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for k, part in enumerate((names[::2], names[1::2]), 1):
        name = f"model-0000{k}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, index


@mutation("weights", 3)
def damaged_weights(case):
    path = case.model() / "model.safetensors"
    data = bytearray(path.read_bytes())
    how, verdict, size = case.rng.randrange(9), "bad", int.from_bytes(data[:8], "little")
    if how == 0:
        data = data[: case.rng.randrange(len(data))]
    elif how == 1:
        data[:8] = case.rng.choice([0, 1, 2**63, 2**64 - 1, len(data), size + 1]).to_bytes(8, "little")
    elif how == 2:
        data[8 + case.rng.randrange(size)] ^= 1 << case.rng.randrange(8)
        verdict = "either"
    elif how == 3:
        data[8 + size + case.rng.randrange(len(data) - size - 8)] ^= 1 << case.rng.randrange(8)
        verdict = "either"
    elif how == 4:
        data = data + b"more"
    elif how == 5:
        data = bytearray(pickle.dumps(Poison(case.canary)))
    elif how == 6:
        data[8 : 8 + size] = data[8 : 8 + size].replace(b"BF16", b"NONE")
    elif how == 7:
        data = data[:8] + b" " * size + data[8 + size :]
    else:
        data = bytearray(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1014264\n")
    path.write_bytes(data)
    return verdict


@mutation("weights", 3)
def other_tensors(case):
    path = case.model() / "model.safetensors"
    tensors = load_file(path)
    name, how, verdict = case.rng.choice(sorted(tensors)), case.rng.randrange(9), "bad"
    tensor = tensors[name]
    if how == 0:
        del tensors[name]
    elif how == 1:
        tensors[name] = tensor[:-1].clone()
    elif how == 2:
        tensors[name] = tensor.flatten()[:0].clone()
    elif how == 3:
        tensors[name] = torch.full_like(tensor, case.rng.choice([math.nan, math.inf]))
    elif how == 4:
        tensors[name], verdict = torch.zeros_like(tensor), "either"
    elif how == 5:
        tensors["model.more.weight"], verdict = tensor.clone(), "either"
    elif how == 6:
        tensors[name], verdict = tensor.to(case.rng.choice([torch.int64, torch.bool, torch.float64])), "either"
    elif how == 7:
        tensors[f"{name}.more"] = tensors.pop(name)
    else:
        tensors[name], verdict = torch.full_like(tensor, 3e38), "either"
    save_file(tensors, path, metadata={"format": "pt"})
    return verdict


@mutation("weights", 4)
def damaged_shards(case):
    folder, index = shards(case)
    files, where = sorted(set(index["weight_map"].values())), index["weight_map"]
    name, how, verdict = case.rng.choice(sorted(where)), case.rng.randrange(11), "bad"
    path = folder / "model.safetensors.index.json"
    case.names |= {path.name}
    outside = case.folder / "outside.safetensors"
    save_file({key: x * math.nan for key, x in load_file(folder / files[0]).items()}, outside)
    if how in (1, 2, 3, 4, 5):
        verdict = "either"  # refused, or the folder's own files are read
    if how == 0:
        (folder / files[1]).unlink()
    elif how == 1:
        index["weight_map"] = {k: v if v != files[0] else "../outside.safetensors" for k, v in where.items()}
    elif how == 2:
        index["weight_map"] = {k: v if v != files[0] else str(outside) for k, v in where.items()}
    elif how == 3:
        where[name] = case.rng.choice(["nowhere.safetensors", "", None, 7, [], "../../secret.jsonl", "config.json",
            "\x1b[31m"])
    elif how == 4:
        index = case.rng.choice([{}, [], {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}, 7])
    elif how == 5:
        path.write_text(json.dumps(index)[:200])
        return "either"
    elif how == 6:
        (folder / files[0]).write_bytes((folder / files[0]).read_bytes()[:10_000])
    elif how == 7:
        (folder / files[0]).write_bytes((folder / files[1]).read_bytes())
    elif how == 8:
        del where[name]
        verdict = "either"
    elif how == 9:
        where["model.more.weight"] = files[0]
        verdict = "either"
    else:
        verdict = "good"
    path.write_text(json.dumps(index))
    return verdict


@mutation("weights", 2)
def weights_that_are_pickles(case):
    folder = case.model()
    poison = pickle.dumps(Poison(case.canary))
    names = ["pytorch_model.bin", "model.pt", "model.pkl", "tf_model.h5", "adapter_model.bin", "training_args.bin"]
    for name in names:
        (folder / name).write_bytes(poison)
    if case.rng.random() < 0.3:
        return "good"
    (folder / "model.safetensors").unlink()
    if case.rng.random() < 0.5:
        where = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(where))
        if case.rng.random() < 0.5:
            (folder / "model.safetensors.index.json").write_text(json.dumps(where))
    return "bad"


@mutation("weights")
def adapters(case):
    """A folder that says that it is an adapter of something else."""
    folder = case.model()
    settings = {"base_model_name_or_path": case.rng.choice(["no/such", str(MODEL), str(case.secret), "../x", 7, None])}
    settings |= {"peft_type": case.rng.choice(["LORA", "x", 7]), "auto_mapping": {"parent_library": "os",
        "base_model_class": "x"}}
    (folder / "adapter_config.json").write_text(case.rng.choice([json.dumps(settings), "{", "[]"]))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Poison(case.canary)))
    return "either"


@mutation("weights")
def weights_that_are_no_file(case):
    path = case.model() / "model.safetensors"
    path.unlink()
    how = case.rng.randrange(4)
    if how == 0:
        path.mkdir()
    elif how == 1:
        path.symlink_to(path)
    elif how == 2:
        path.symlink_to(case.folder / "nowhere")
    else:
        path.symlink_to(case.secret)
    return "bad"


# ---- checkpoints -----------------------------------------------------------------------------------------------------
# A run that was killed after step 2 of 3, with checkpoints 1 and 2. Whatever happens to the newest one, --resume auto
# ends with the weights of a run that nobody touched.

STEPS = ["--max_steps", "3", "--save_every", "1", "--keep_last", "9"]


def earlier(case):
    """-> the two checkpoint folders; what the case's run is compared with is made by `whole_runs`."""
    out = case.folder / "out"
    if not out.exists():
        shutil.copytree(WHOLE[case.script], out, symlinks=True)
        shutil.rmtree(out / "final")
        shutil.rmtree(out / "checkpoint-000003")
        shutil.copy(WHOLE[case.script].parent / "rows.jsonl", case.data)
        case.argv += [*STEPS, "--resume", "auto"]
        case.names, case.resumed, case.kept = {"out", "checkpoint-", "--resume"}, True, ROWS
    return out / "checkpoint-000001", out / "checkpoint-000002"


def damage(case, folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = case.rng.choice(files)
    data, how = bytearray(path.read_bytes()), case.rng.randrange(8)
    if how == 0 and data:
        data[case.rng.randrange(len(data))] ^= 1 << case.rng.randrange(8)
    elif how == 1:
        data = data[: case.rng.randrange(max(1, len(data)))]
    elif how == 2:
        path.unlink()
        return
    elif how == 3:
        data = bytearray()
    elif how == 4:
        data = bytearray(pickle.dumps(Poison(case.canary)))
    elif how == 5:
        data = bytearray(case.rng.choice([p for p in files if p.read_bytes() != data]).read_bytes())
    elif how == 6:
        shutil.rmtree(folder / "trainer")
        return
    else:
        data = data + b"\n"
    path.write_bytes(data)


def sign(folder, change):
    """A forged checkpoint: changed, and all sums made right again."""
    path = folder / "trainer" / "meta.json"
    meta = json.loads(path.read_text())
    meta.pop("own_crc32")
    change(meta)
    for name in meta.get("crc32") if isinstance(meta.get("crc32"), dict) else []:
        if (folder / name).is_file():
            meta["crc32"][name] = zlib.crc32((folder / name).read_bytes())
    meta["own_crc32"] = zlib.crc32(json.dumps(meta).encode())
    path.write_text(json.dumps(meta, indent=1))


@mutation("checkpoints", 4)
def damaged_newest(case):
    damage(case, earlier(case)[1])
    return "good"


@mutation("checkpoints", 2)
def damaged_both(case):
    for folder in earlier(case):
        damage(case, folder)
    return "either"  # from the start, or not at all


@mutation("checkpoints", 2)
def damaged_and_asked_for(case):
    folder = earlier(case)[1]
    damage(case, folder)
    case.argv += ["--resume", str(folder)]
    return "bad"


@mutation("checkpoints")
def planted_pickles(case):
    poison = pickle.dumps(Poison(case.canary))
    for folder in earlier(case):
        for name in ".metadata", "trainer/.metadata", "optimizer.pt", "trainer/rng.pkl", "pytorch_model.bin":
            (folder / name).write_bytes(poison)
    return "good"


@mutation("checkpoints", 2)
def forged_meta(case):
    folder = earlier(case)[1]
    name = case.rng.choice(["step", "flags", "data", "versions", "state", "offsets", "crc32"])
    value = case.rng.choice(["drop", None, "x", [], 1.5, {"../../secret.jsonl": 1}, {"/etc/passwd": 0}])
    sign(folder, lambda meta: meta.pop(name) if value == "drop" else meta.update({name: value}))
    return "either"


@mutation("checkpoints", 2)
def forged_tensors(case):
    folder = earlier(case)[1]
    path = case.rng.choice(sorted((folder / "trainer").glob("*.safetensors")))
    tensors = load_file(path)
    name = case.rng.choice(sorted(tensors) or ["x"])
    tensor, how = tensors.get(name, torch.zeros(3)), case.rng.randrange(3)
    if how == 0:
        tensors.pop(name, None)
    elif how == 1:
        tensors[name] = tensor.flatten()[:1].clone()
    else:
        tensors["optim.more"] = torch.zeros(3)
    save_file(tensors, path)
    sign(folder, lambda meta: None)
    return "either"


@mutation("checkpoints", 2)
def strange_run_files(case):
    out = earlier(case)[0].parent
    name = case.rng.choice(["run.json", "metrics.jsonl", "alerts.jsonl", "samples.jsonl"])
    content = case.rng.choice(["", "{", "[]", "null", "7", "\x00" * 9, '{"pid": 1}', '{"exit_code": 2}', None,
        "folder", "loop"])
    path = out / name
    path.unlink(missing_ok=True)
    if content == "folder":
        path.mkdir()
    elif content == "loop":
        path.symlink_to(path)
    elif content is not None:
        path.write_text(content)
    case.names |= {name}
    return "good" if name == "run.json" and content not in ("folder", "loop") else "either"


@mutation("checkpoints", 2)
def strange_neighbours(case):
    out = earlier(case)[0].parent
    (out / "checkpoint-000009").mkdir()
    (out / "checkpoint-").mkdir()
    (out / "checkpoint-x").write_text("x")
    (out / "checkpoint-000007" / "trainer").mkdir(parents=True)
    (out / "checkpoint-000007" / "trainer" / "meta.json").write_text(case.rng.choice(["{}", "[]", "7", "",
    '{"crc32": {}}']))
    (out / ".tmp-x").write_text("x")
    (out / ".old-x").mkdir()
    (case.folder / "precious").mkdir()
    (case.folder / "precious" / "file").write_text("x")
    if case.rng.random() < 0.5:
        (out / ".tmp-link").symlink_to(case.folder / "precious")
    return "either"


@mutation("checkpoints", 2)
def resume_from_elsewhere(case):
    out = earlier(case)[0].parent
    where = case.rng.choice(["out", "out/checkpoint-000009", "rows.jsonl", "out/run.json", "nowhere", "", "x" * 300,
        "a\nb",
                             "..", "out/final", "\x1b[31m", "/", "always", "x" * 5000])
    case.argv += ["--resume", str(out.parent / where) if where.startswith("out") else where]
    case.names |= {"--output_dir"}
    return "bad"


@mutation("checkpoints")
def resume_something_else(case):
    earlier(case)
    change = case.rng.choice([["--learning_rate", "1e-3"], ["--seed", "7"], ["--batch_size", "3"], ["--max_length",
    "150"],
                              ["--adam_beta1", "0.5"], ["--warmup_steps", "1"], ["--weight_decay", "0.1"]])
    case.argv += change
    case.names |= {"--allow_changes"}
    return "bad"


@mutation("checkpoints")
def resume_another_model(case):
    earlier(case)
    case.edit("config.json", lambda settings: settings.update(num_hidden_layers=2))
    case.argv += ["--allow_changes"]
    return "bad"


# ---- flags -----------------------------------------------------------------------------------------------------------

NUMBERS = ["0", "1", "-1", "-0", "1e-300", "1e300", "2147483648", "9223372036854775808", "1" + "0" * 30, "nan",
"inf", "-inf",
           "", " ", "x", "1e3", " 1", "1_000", "\u0661", "0x10", "1.0", "None", "True", "--", "1" + "0" * 4400,
           "1e400", "3"]
TEXTS = ["", " ", "\n", "a\x1b[31mb", "x" * 5000, "..", "/", "~", "\u00e9", "\udcff", "--", "-", "$(touch canary)",
"{}", "%s",
         "; touch canary", "\u202e", "None", "a,b", "a:b", "0", "tiny"]


@mutation("flags", 6)
def strange_number(case):
    names = [f.name for f in fields(MODULES[case.script].Args) if re.search("int|float", str(f.type))]
    name, value = case.rng.choice([n for n in names if n != "reward_weights"]), case.rng.choice(NUMBERS)
    value = "nan" if name == "ddp_timeout" else value  # a second would be a crash that was asked for
    case.argv += [f"--{name}", value]
    case.names = {f"--{name}", f"--{name.replace('_', '-')}", "--max_length", "--temperature", "--learning_rate",
    "DATA005"}
    case.names |= {"memory", "TRAIN001", "MODEL001"}
    case.kept, case.endless = None, name == "max_steps"
    return "either"


@mutation("flags", 3)
def strange_string(case):
    kinds = {f.name: str(f.type) for f in fields(MODULES[case.script].Args)}
    name = case.rng.choice([n for n, kind in kinds.items() if "str" in kind or "Literal" in kind])
    value = case.rng.choice(TEXTS)
    if name == "output_dir" and value in ("", "/", "..", "~", "."):  # "" is the default folder, which is not looked at
        value = "out"
    case.argv += [f"--{name}", value]
    case.names = {f"--{name}", f"--{name.replace('_', '-')}", "tokenizer", "memory"}
    case.kept, case.out = None, case.out if name != "output_dir" else value
    return "either"


@mutation("flags", 2)
def no_such_flag(case):
    flag = case.rng.choice(["--learning_rat", "--max_legnth", "stray", "--no-seed", "-x", "--\x1b[31m",
    "--batch-size=many",
                            "--output_dir", "--seed", "--model=", "---", "--trust_remote_code", "--lr", "--resume=",
                            "--allow_changes=yes", "--overlong=cut", "--report_to=nowhere", "--\u202e", "--a\nb",
                            "--=1"])
    case.argv += [flag]
    case.names = {flag.split("=")[0].replace("_", "-"), flag.split("=")[0], "Unrecognized", "option", "--model",
    "--resume"}
    return "bad" if flag not in ("--resume=",) else "either"


@mutation("flags")
def many_flags(case):
    case.argv += case.rng.choice([["--seed", "1"] * 300, ["--allow", *["X"] * 3000], ["--allow"], ["--allow",
    "\x1b[31m"],
                                  ["--allow-changes"], ["--no-allow-changes"], ["--allow", "DATA005", "--seed", "3"]])
    case.names |= {"--seed", "--allow"}
    return "either"


@mutation("flags", 2)
def numbers_together(case):
    """Each may be right alone."""
    pairs = [["--max_length", "2000000000"], ["--num_train_epochs", "1e300"], ["--warmup_steps", "100"],
        ["--batch_size", "64"],
             ["--learning_rate", "1e30"], ["--weight_decay", "1e30"], ["--adam_beta1", "0"], ["--adam_beta2", "0"],
             ["--max_grad_norm", "1e-30"], ["--tokens_per_microbatch", "1"], ["--max_length", "3"], ["--max_length",
             "60"],
             ["--save_minutes", "0"], ["--eval_rows", "1"], ["--keep_last", "1"], ["--save_dtype", "bfloat16"],
             ["--learning_rate", "0"], ["--batch_size", "1000000000"], ["--batch_size", "500"], ["--seed",
             "4294967295"],
             ["--lr_scheduler_type", "cosine"], ["--max_grad_norm", "0"], ["--save_every", "1"]]
    more = {"sft": [["--train_on", "last"]], "dpo": [["--beta", "0"], ["--beta", "1e30"]],
            "reward": [["--center_rewards_coefficient", "1e30"], ["--center_rewards_coefficient", "0"],
                       ["--center_rewards_coefficient", "1e-300"], ["--batch_size", "1"]],
            "kto": [["--beta", "0"], ["--beta", "1e30"], ["--desirable_weight", "0"], ["--undesirable_weight", "1e30"],
                    ["--loss_type", "apo_zero_unpaired"], ["--batch_size", "1"],
                    ["--desirable_weight", "0", "--undesirable_weight", "0"]],
            "rloo": [["--num_generations", "1"], ["--beta", "1e30"], ["--beta", "0"], ["--normalize_advantages"],
                     ["--reward_clip_range", "1", "0"], ["--reward_clip_range", "0", "0"], ["--reward_clip_range", "1"],
                     ["--reward_clip_range", "-1e30", "1e30"], ["--reward_clip_range", "nan", "1"],
                     ["--kl_estimator", "k3"], ["--old_logprobs", "sampler"], ["--num_iterations", "1000000000"],
                     ["--scale_rewards", "batch"], ["--importance_sampling_level", "token"], ["--temperature", "1e30"]],
            "grpo": [["--num_generations", "1000000000"], ["--max_completion_length", "1000000000", "--max_length",
            "2000000000"],
                     ["--temperature", "1e-30"], ["--temperature", "1e30"], ["--num_generations", "1"], ["--beta",
                     "1e30"],
                     ["--epsilon", "0"], ["--epsilon_high", "1e30"], ["--steps_per_generation", "1000000000"],
                     ["--temperature", "0"],
                     ["--num_iterations", "1000000000"], ["--reward_weights", "1", "2"], ["--reward", "no.py:f"],
                     ["--reward"],
                     ["--reward", "format", "accuracy", "--reward_weights", "nan", "1"], ["--max_completion_length",
                     "1"],
                     ["--reward_timeout", "1e300"], ["--reward_timeout", "1e-9"], ["--reward", "accuracy", "accuracy"]]}
    for pair in case.rng.sample(pairs + 2 * more[case.script], 3):
        case.argv += pair
    case.names = {word for word in case.argv if word.startswith("--")} | {"DATA005", "TRAIN001", "GRPO003", "memory",
    "MODEL001"}
    case.kept = None
    return "either"


# ---- folders ---------------------------------------------------------------------------------------------------------


@mutation("folders", 3)
def strange_output(case):
    (case.folder / "file").write_text("x")
    (case.folder / "loop").symlink_to(case.folder / "loop")
    (case.folder / "other").mkdir()
    (case.folder / "link").symlink_to(case.folder / "other")
    (case.folder / "dangling").symlink_to(case.folder / "nowhere")
    case.out, verdict = case.rng.choice([
        ("file", "bad"), ("file/out", "bad"), ("loop", "bad"), ("loop/out", "bad"), ("x" * 300, "bad"), ("a/" * 2000,
        "bad"),
        ("a b/c d", "good"), ("other/../new", "good"), ("link", "good"), ("link/deep/er", "good"), ("dangling",
        "either"),
        ("\u00e9\u6f22\U0001f600", "good"), ("a\nb", "either"), ("\x1b[31m", "either"), ("-x", "good"), ("./.",
        "either"),
        ("a'b\"c", "good"), ("$(touch canary)", "good"), ("{x}%s", "good"), (".hidden", "good"), ("[a-z]*", "good"),
        ("checkpoint-000001", "good"), ("final", "good"), ("runs/../../" + case.folder.name + "/back", "either"),
    ])
    case.names = {"--output_dir"}
    return verdict


@mutation("folders", 2)
def output_in_use(case):
    """Something stands in the folder already."""
    out = case.folder / "out"
    out.mkdir()
    verdict, name, content = case.rng.choice([
        ("bad", "run.json", "{}"), ("bad", "run.json", "["), ("bad", "run.json", "[]"), ("bad", "run.json", ""),
        ("good", "notes.txt", "x"), ("bad", "metrics.jsonl", "old\n"), ("good", "rows.jsonl", "{}\n"),
        ("bad", "metrics.jsonl/", ""), ("bad", "alerts.jsonl/", ""), ("bad", ".tmp-checkpoint/x", "x"),
        ("bad", "final/config.json", "{}"), ("bad", "checkpoint-000001/x", "x"), ("either", ".run.json/", ""),
        ("bad", "run.json/", ""), ("bad", ".tmp-rehearsal", "x"), ("bad", "checkpoint-000001", "x"),
        ("bad", "final", "x"),
    ])
    if name.endswith("/"):
        (out / name).mkdir(parents=True)
    else:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(content)
    case.names = {"--output_dir", "out"}
    if name == "run.json" and case.rng.random() < 0.5:
        case.flags["--resume"] = "auto"
    return verdict


@mutation("folders")
def full_disk(case):
    """Files may not grow: at once, or when the first checkpoint is written."""
    case.file_size = case.rng.choice([20_000, 100_000, 700_000, 2_000_000])
    case.names = {"out", "save"}
    return "bad"


@mutation("folders")
def output_that_cannot_be(case):
    case.argv += ["--output_dir", case.rng.choice(["/proc/cleanpost", "/dev/null", "/dev/null/x", "/sys/x",
    "/proc/1/x"])]
    case.names = {"--output_dir"}
    return "bad"


# ---- what one method reads -------------------------------------------------------------------------------------------


@mutation("own", 2)
def strange_margin(case):
    case.become("reward")
    value = case.rng.choice([*WRONG, "1", "", "\x1b[31m", "nan", math.nan, math.inf, 1e6, -1e6, 1e300, 999999, -3, 0.5])
    for row in case.rows if case.rng.random() < 0.3 else [case.row()]:
        row["margin"] = value
    case.names |= {"TRAIN001", "TRAIN002"}
    number = type(value) in (int, float) and abs(value) < 1e6
    return "either" if value is None or number and abs(value) > 9 else "good" if number else "bad"


@mutation("own", 2)
def strange_label(case):
    case.become("kto")
    value = case.rng.choice([*WRONG, "true", "True", "", "1", 0, 1, 1.0, math.nan, "\x1b[31m"])
    case.row()["label"] = value
    return "either" if type(value) is bool else "bad"


@mutation("own")
def labels_alike(case):
    case.become("kto")
    value = case.rng.random() < 0.5
    for row in case.rows:
        row["label"] = value
    case.names |= {"--dataset"}
    return "bad"


@mutation("own", 2)
def pairs_among_labels(case):
    """kto takes pairs as two rows; a row with half of either is none."""
    case.become("kto")
    how, row = case.rng.randrange(4), case.row()
    for one in case.rows if how == 0 else [row]:
        said = one["completion"]
        one.pop("label"), one.pop("completion")
        other = "no" if isinstance(said, str) else [{"role": "assistant", "content": "no"}]
        one |= {"chosen": said, "rejected": other}
    if how == 2:
        row |= {"label": True}
    elif how == 3:
        row.pop(case.rng.choice(["chosen", "rejected"]))
    case.kept = None
    return "good" if how < 2 else "bad"


@mutation("own", 4)
def strange_reward_model(case):
    """--reward FOLDER: what reward.py saved, and then not quite."""
    case.become(case.rng.choice(ONLINE))
    folder = case.folder / "scorer"
    shutil.copytree(WHOLE["reward"] / "final", folder)
    config, weights, how, verdict = folder / "config.json", folder / "model.safetensors", case.rng.randrange(14), "bad"
    if how == 0:
        verdict = "good"
    elif how == 1:
        case.rng.choice([config, weights, folder / "tokenizer.json"]).unlink()
    elif how == 2:
        path = case.rng.choice([config, weights, folder / "tokenizer.json"])
        path.write_bytes(path.read_bytes()[: case.rng.randrange(path.stat().st_size)])
    elif how == 3:  # a language model
        folder = MODEL
    elif how == 4:
        settings = json.loads(config.read_text())
        labels = case.rng.choice([{"0": "a", "1": "b"}, {}, 7, None, []])
        config.write_text(json.dumps(settings | {"id2label": labels}))
        verdict = "either"
    elif how == 5:
        tensors = load_file(weights)
        tensors["score.weight"] = torch.full_like(tensors["score.weight"], case.rng.choice([math.nan, math.inf]))
        save_file(tensors, weights, metadata={"format": "pt"})
        case.names |= {"GRPO003"}
        verdict = "either"
    elif how == 6:
        tensors = load_file(weights)
        tensors.pop("score.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == 7:
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Poison(case.canary)))
    elif how == 8:
        (folder / "mine.py").write_text(f"open({str(case.canary)!r}, 'w')\n")
        auto = {"AutoConfig": "mine.C", "AutoModelForSequenceClassification": "mine.M", "AutoTokenizer": ["mine.T"]}
        config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": auto, "model_type": "mine"}))
    elif how == 9:
        folder = case.folder / case.rng.choice(["nowhere", "rows.jsonl", "empty"])
        (case.folder / "empty").mkdir()
    elif how == 10:  # tokens beyond its embeddings
        settings = json.loads((folder / "tokenizer.json").read_text())
        settings["model"]["vocab"]["What"] = 5000
        (folder / "tokenizer.json").write_text(json.dumps(settings))
        case.names |= {"GRPO003"}
        verdict = "either"
    elif how == 11:
        (folder / "chat_template.jinja").write_text(case.rng.choice(BAD_TEMPLATES[:9] + STRANGE_TEMPLATES[:9]))
        case.names |= {"GRPO003"}
        verdict = "either"
    elif how == 12:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        case.names |= {"GRPO003"}
        verdict = "either"
    else:
        case.argv += ["--reward_weights", case.rng.choice(["1", "0", "1e30", "-1", "nan", "1 2"])]
        verdict = "either"
    case.argv += ["--reward", str(folder), *(["accuracy"] if case.rng.random() < 0.3 and how < 13 else [])]
    case.names |= {"--reward", "scorer", "--chat_template"}
    return verdict


# ---- what real folders and rows hold ---------------------------------------------------------------------------------
# The families below take their inputs one at a time, in turn, and say more about the end: case.want is what the line,
# the alerts, the picture of the first row, a metric or the plan must say, computed by hand or by transformers.


FIRST_CASES = 1000  # of the families before these:
LATER = ("pipes", "links", "neighbours", "strangers", "failing", "spellings", "teachers", "experimental")
ALONE = ("scoring", "columns", "models", "judging", *LATER)


def families_of(number, only):
    """-> the families that take turns with a case, and its number among theirs."""
    if only is not None:
        return only, number
    if number < FIRST_CASES:
        return [family for family in FAMILIES if family not in LATER], number
    return list(LATER), number - FIRST_CASES


def want(case, verdict, line=(), alert=None, **more):
    """What must become of a case. line: patterns that the error line must hold, all of them."""
    case.want = {"line": [line] if isinstance(line, str) else list(line), "alert": alert, **more}
    case.names |= {"row", "--dataset", "DATA", *case.want["line"]}
    case.kept = more.get("kept")
    return verdict


def only_row(case, row, count=ROWS):
    """The same row everywhere, all of them in the one step."""
    case.rows = json.loads(json.dumps([row] * count))
    case.flags["--batch_size"] = str(count)


def chat_row(case, *texts):
    """A row of sft: user and assistant take turns."""
    case.become("sft")
    case.chat = True
    roles = ["user", "assistant"] * len(texts)
    only_row(case, {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts)]})


def words(case, length=None):
    """Some text that no template writes and no token is more than a character of."""
    return "".join(case.rng.choice("cdefghjkmnpqrstuvwxyz") for _ in range(length or case.rng.randrange(3, 9)))


def merge_tokens(case):
    """The tiny tokenizer with tokens of two characters, which may straddle the end of a prompt."""

    def change(settings):
        vocab = settings["model"]["vocab"]
        for rare, (first, second) in zip("~}{`^_", ("\n\n", ": ", "  ", " c", "\n ", "> ")):
            vocab[first + second] = vocab.pop(rare)
        settings["model"]["merges"] = [[first, second] for first, second in ("\n\n", ": ", "  ", " c", "\n ", "> ")]

    case.edit("tokenizer.json", change)


def use_template(case, text):
    (case.folder / "chat.jinja").write_text(text)
    case.flags["--chat_template"] = str(case.folder / "chat.jinja")
    case.names |= {"--chat_template", "--chat_template_kwargs"}


def own_template(user, assistant, opening, system="{c}"):
    """A template of three pieces; {c} is a message's content."""
    pieces = [("user", user), ("assistant", assistant), ("system", system)]
    text = "{%- for m in messages -%}"
    for role, piece in pieces:
        before, after = piece.split("{c}")
        text += f"{{%- if m.role == '{role}' -%}}{{{{ {before!r} ~ m.content ~ {after!r} }}}}{{%- endif -%}}"
    return text + f"{{%- endfor -%}}{{%- if add_generation_prompt -%}}{{{{ {opening!r} }}}}{{%- endif -%}}"


APPENDING = {  # user's turn, assistant's turn, generation prompt -> what is scored before the content, and after it
    "qwen": ("<|user|>\n{c}<|end|>\n", "<|assistant|>\n{c}<|end|>\n", "<|assistant|>\n", "", "<|end|>"),
    "vicuna": ("USER: {c} ", "ASSISTANT: {c}<|end|>", "ASSISTANT:", " ", "<|end|>"),
    "blank": ("USER: {c} ", "ASSISTANT: {c}<|end|>", "ASSISTANT: ", "", "<|end|>"),
    "alpaca": ("### Question:\n{c}\n\n", "### Answer:\n\n{c}<|end|>\n\n", "### Answer:\n\n", "", "<|end|>"),
    "header": ("<|user|>\n\n{c}<|end|>", "<|assistant|>\n\n{c}<|end|>", "<|assistant|>\n\n", "", "<|end|>"),
    "none": ("<|user|>{c}<|end|>", "{c}<|end|>", "", "", "<|end|>"),
    "command": ("<|user|>{c}<|end|>", "<|assistant|>{c}<|system|><|end|>", "<|assistant|>", "", "<|system|><|end|>"),
    "no thought": ("<|user|>{c}<|end|>", "<|assistant|>{c}<|end|>", "<|assistant|><think>\n\n</think>\n\n", "",
                   "<|end|>"),
    "open thought": ("<|user|>{c}<|end|>", "<|assistant|>{c}<|end|>", "<|assistant|><think>\n", "", "<|end|>"),
    "written thought": ("<|user|>{c}<|end|>", "<|assistant|><think>\n\n</think>\n\n{c}<|end|>",
                        "<|assistant|><think>\n\n</think>\n\n", "", "<|end|>"),
}  # fmt: skip
STARTS = ["", " ", "  ", "\n", "\n\n", "\n  ", " \n", "\t", "    return ", "> ", ": ", "c"]


@mutation("scoring")
def white_space_at_the_border(case):
    """Whatever stands at the border of prompt and answer is scored once, and is the template's own text."""
    user, assistant, opening, before, after = APPENDING[case.rng.choice(list(APPENDING))]
    answer = case.rng.choice(STARTS) + words(case)
    chat_row(case, words(case), answer)
    if case.rng.random() < 0.6:
        merge_tokens(case)
    use_template(case, own_template(user, assistant, opening))
    verdict = "either" if "<think>" in opening and "<think>" not in assistant else "good"
    return want(case, verdict, "--chat_template", scored=[before + answer + after], kept=ROWS)


@mutation("scoring")
def border_of_a_later_turn(case):
    """The same for the second answer, by the number of scored tokens: the tokenizer's are characters."""
    user, assistant, opening, before, after = APPENDING[case.rng.choice(["qwen", "vicuna", "blank", "header"])]
    first, second = (case.rng.choice(STARTS) + words(case) for _ in range(2))
    chat_row(case, words(case), first, words(case), second)
    use_template(case, own_template(user, assistant, opening))
    scored = [before + first + after, before + second + after]
    return want(case, "good", scored=scored, num_tokens=ROWS * (sum(len(before) + len(x) + 1 for x in (first, second))))


CONTROL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>", "<|unk|>"]


@mutation("scoring")
def control_token_in_an_answer(case):
    """An answer is never cut at a stop token that it spells, and somebody says that it does."""
    token = case.rng.choice(CONTROL[:4])
    parts = [words(case), words(case)]
    answer = case.rng.choice(["{0} {t} {1}", "{t}{0}", "{0}{t}", "{0} {t}{t} {1}", "{0}\n{t}\n{1}"])
    answer = answer.format(*parts, t=token)
    chat_row(case, words(case), answer)
    tokens = len(answer.replace(token, "#")) + 1
    return want(case, "good", alert="DATA011", scored=[answer + "<|end|>"], num_tokens=ROWS * tokens)


@mutation("scoring")
def control_token_in_another_role(case):
    token, role = case.rng.choice(CONTROL), case.rng.choice(["user", "system"])
    chat_row(case, words(case), "fine")
    content = f"{words(case)} {token} {words(case)}"
    for row in case.rows:
        if role == "system":
            row["messages"].insert(0, {"role": "system", "content": content})
        else:
            row["messages"][0]["content"] = content
    return want(case, "good", alert="DATA011", scored=["fine<|end|>"], num_tokens=ROWS * 5)


@mutation("scoring")
def control_token_in_a_pair(case):
    """Both answers would be equal if they were cut there."""
    case.become(case.rng.choice(PAIRS))
    same, token = words(case), case.rng.choice(CONTROL[:3])
    only_row(case, {"prompt": [{"role": "user", "content": words(case)}],
                    "chosen": [{"role": "assistant", "content": f"{same} {token} right"}],
                    "rejected": [{"role": "assistant", "content": f"{same} {token} wrong"}]})
    return want(case, "good", alert="DATA011", no_alert="DATA009", kept=ROWS)


MISTRAL = """{%- set start = 1 if messages[0].role == 'system' else 0 -%}
{%- for m in messages[start:] -%}
{%- if m.role == 'user' -%}
{{- '<|user|>' -}}{%- if loop.last and start -%}{{ messages[0].content + '\\n\\n' }}{%- endif -%}
{{- m.content + '[/I]' -}}
{%- else -%}{{ ' ' + m.content + '<|end|>' }}{%- endif -%}
{%- endfor -%}"""


@mutation("scoring")
def system_text_in_the_last_question(case):
    """Mistral's templates: after the answer the system's text is gone. No question may be scored."""
    turns = case.rng.choice([1, 2, 3])
    answers = [words(case) for _ in range(turns)]
    texts = [text for answer in answers for text in (words(case), answer)]
    chat_row(case, *texts)
    for row in case.rows:
        row["messages"].insert(0, {"role": "system", "content": "Be " + case.rng.choice(["brief", "kind"]) + "."})
    use_template(case, MISTRAL)
    case.flags["--batch_size"] = str(ROWS * turns)  # one group a turn
    case.flags["--allow"] = "DATA004"
    tokens = ROWS * sum(1 + len(answer) + 1 for answer in answers)
    return want(case, "good", no_alert="DATA012", scored_first=f" {answers[0]}<|end|>", num_tokens=tokens)


@mutation("scoring")
def system_text_in_the_last_question_of_a_pair(case):
    case.become(case.rng.choice(PAIRS))
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": words(case)}]
    only_row(case, {"prompt": prompt, "chosen": [{"role": "assistant", "content": "right"}],
                    "rejected": [{"role": "assistant", "content": words(case)}]})
    use_template(case, MISTRAL)
    scored = {"scored_first": " right<|end|>"} if case.script == "dpo" else {}
    return want(case, "good", no_alert="DATA012", kept=ROWS, **scored)


@mutation("scoring")
def answer_that_the_template_leaves_out(case):
    """Tool calls, reasoning and contents that are not in the text: most templates write none of the first two."""
    lost = case.rng.choice(["tool_calls", "reasoning_content", "content"])
    chat_row(case, words(case), words(case))
    call = {"type": "function", "function": {"name": words(case), "arguments": {words(case): case.rng.randrange(9)}}}
    value = {"tool_calls": [call], "reasoning_content": words(case, 12), "content": words(case)}[lost]
    count = case.rng.choice([1, ROWS])
    for row in case.rows[:count]:
        row["messages"][1][lost] = value
        if lost == "tool_calls":
            row["messages"][1]["content"] = case.rng.choice(["", words(case)])
    text = own_template("<|user|>{c}<|end|>", "<|assistant|>{c}<|end|>", "<|assistant|>")
    if lost == "content":
        text = text.replace("'<|assistant|>' ~ m.content", "'<|assistant|>' ~ m.content[:2]")
    use_template(case, text)
    return want(case, "bad", "DATA010")


@mutation("scoring")
def tool_call_that_is_written(case):
    """As an object and as a string of JSON, with a null of the user's own: one text."""
    chat_row(case, words(case), "")
    arguments = case.rng.choice([{"a": 1}, {"city": words(case), "days": None}, {"x": {"y": [1, None]}}, {}])
    name = words(case)
    given = json.dumps(arguments) if case.rng.random() < 0.6 else arguments
    for row in case.rows:
        row["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": name, "arguments": given}}]
        if case.rng.random() < 0.5:
            row["messages"][1]["content"] = None
    call = "{%- for t in m.tool_calls or [] -%}{{ t.function.name ~ '(' ~ (t.function.arguments | tojson) ~ ')' }}"
    text = own_template("<|user|>{c}<|end|>", "<|assistant|>{c}", "<|assistant|>")
    text = text.replace("{%- endfor -%}{%- if add_gen", "{%- if m.role == 'assistant' -%}" + call + "{%- endfor -%}"
                        "{{ '<|end|>' }}{%- endif -%}{%- endfor -%}{%- if add_gen")
    use_template(case, text)
    scored = f"{name}({json.dumps(arguments)})<|end|>"
    return want(case, "good", no_alert="DATA010", scored=[scored], num_tokens=ROWS * (len(scored) - 6))


@mutation("scoring")
def reasoning_that_is_written(case):
    """The generation prompt has an empty or an open block; the turn has its own."""
    thought, answer = words(case), words(case)
    chat_row(case, words(case), answer)
    for row in case.rows:
        row["messages"][1]["reasoning_content"] = thought
    opening = case.rng.choice(["<think>\n\n</think>\n\n", "<think>\n", ""])
    text = own_template("<|user|>{c}<|end|>", "<|assistant|>{c}<|end|>", "<|assistant|>" + opening)
    text = text.replace("m.content ~ '<|end|>' }}{%- endif -%}{%- if m.role == 'system'",
                        "'<think>\\n' ~ m.reasoning_content ~ '\\n</think>\\n\\n' ~ m.content ~ '<|end|>' }}"
                        "{%- endif -%}{%- if m.role == 'system'")
    use_template(case, text)
    shared = {"": "", "<think>\n": "<think>\n", "<think>\n\n</think>\n\n": "<think>\n"}[opening]
    written = f"<think>\n{thought}\n</think>\n\n{answer}<|end|>"
    return want(case, "good", no_alert="DATA010", scored=[written.removeprefix(shared)])


@mutation("scoring")
def stop_that_is_the_next_role(case):
    """GLM-4: a turn ends where the next begins, and generation config stops there."""
    answers = [words(case) for _ in range(case.rng.choice([1, 2]))]
    chat_row(case, *[text for answer in answers for text in (words(case), answer)])
    case.edit("generation_config.json", lambda settings: settings.update(eos_token_id=[2, 4]))
    use_template(case, own_template("<|user|>{c}", "<|assistant|>{c}", "<|assistant|>"))
    return want(case, "good", scored=[answer + "<|user|>" for answer in answers])


@mutation("scoring")
def template_for_lists_of_content(case):
    """A template of a model that sees pictures: it loops over the parts of a content. A string has none."""
    chat_row(case, words(case), words(case))
    use_template(case, "{{ '<|pad|>' }}{%- for m in messages -%}{{ '<|' ~ m.role ~ '|>' }}{%- for part in m.content -%}"
                       "{{ part.text }}{%- endfor -%}{{ '<|end|>' }}{%- endfor -%}"
                       "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}")
    answer = case.rows[0]["messages"][1]["content"]
    return want(case, "either", "DATA010|--chat_template", scored=[answer + "<|end|>"])


@mutation("scoring")
def turn_of_no_weight(case):
    """weight: 0 and train: false leave a turn unscored."""
    answers = [words(case) for _ in range(3)]
    chat_row(case, *[text for answer in answers for text in (words(case), answer)])
    silent = case.rng.choice([[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]])
    key, value = case.rng.choice([("weight", 0), ("weight", 0.0), ("train", False)])
    for row in case.rows:
        for turn in silent:
            row["messages"][2 * turn + 1][key] = value
        for turn in {0, 1, 2} - {*silent}:
            row["messages"][2 * turn + 1][key] = {"weight": 1, "train": True}[key]
    scored = [answer + "<|end|>" for turn, answer in enumerate(answers) if turn not in silent]
    if not scored:
        return want(case, "bad", "DATA001|weight|train")
    return want(case, "good", scored=scored, num_tokens=ROWS * sum(len(x) - 6 for x in scored))


@mutation("scoring")
def implicit_prompt_inside_a_token(case):
    """Two answers that share the first character of a token: the prompt ends before it."""
    case.become(case.rng.choice(PAIRS))
    merge_tokens(case)
    shared, (one, other) = words(case), case.rng.choice([("\n\n", "\n"), (": ", ":"), (" c", " "), ("  ", " ")])
    only_row(case, {"chosen": f"{shared}{one}right", "rejected": f"{shared}{other}wrong"})
    whole = {"scored_ends": [f"{one}right<|end|>", f"{other}wrong<|end|>"]} if case.script == "dpo" else {}
    return want(case, "good", kept=ROWS, **whole)


@mutation("scoring")
def pair_that_shares_nothing(case):
    case.become(case.rng.choice(PAIRS))
    row = {"chosen": "right " + words(case), "rejected": "wrong " + words(case)}
    if case.rng.random() < 0.4:
        row["prompt"] = ""
        only_row(case, row)
        return want(case, "either", "prompt|begin")
    if case.rng.random() < 0.3:
        row = {key: [{"role": "assistant", "content": value}] for key, value in row.items()}
    only_row(case, row)
    return want(case, "bad", "prompt|begin|common")


@mutation("scoring")
def pair_that_repeats_its_prompt(case):
    """The prompt stands in a column of its own, and in front of the answers, too."""
    case.become(case.rng.choice(PAIRS))
    ask = words(case) + " " + words(case) + " "
    if case.rng.random() < 0.5:
        row = {"prompt": ask, "chosen": ask + "right", "rejected": ask + "wrong"}
    else:
        turn = [{"role": "user", "content": ask.strip()}]
        row = {"prompt": turn, "chosen": [*turn, {"role": "assistant", "content": "right"}],
               "rejected": [*turn, {"role": "assistant", "content": "wrong"}]}
    only_row(case, row)
    scored = {"scored_first": "right<|end|>"} if case.script == "dpo" else {}
    return want(case, "either", "prompt", **scored)


@mutation("scoring", 2)
def text_that_comes_again(case):
    """An answer that says what the question, the system or the template says, and a question that holds the answer."""
    name = case.rng.choice(["qwen", "vicuna", "alpaca", "header", "command"])
    user, assistant, opening, before, after = APPENDING[name]
    ask, say, then, more = (words(case) for _ in range(4))
    texts = case.rng.choice([
        [ask, ask, then, then], [ask, ask, ask, ask], [ask, say, say, ask], [f"{say} {ask}", say, say, f"{say} {ask}"],
        [ask, f"You said {ask}: {say}", then, f"You said {ask} and {then}"], ["a", "a", "b", "a"], [ask, say, ask, say],
        [ask, "USER: x ASSISTANT: y", then, more], [ask, "### Answer:\n\n" + say, then, "### Question:\n" + ask],
        [ask, assistant.split("{c}")[0].strip("<|>\n ") + say, then, say], ["", say, "", more],
    ])
    system = case.rng.random() < 0.4
    chat_row(case, *texts)
    for row in case.rows:
        if system:
            row["messages"].insert(0, {"role": "system", "content": texts[1] if texts[1].isalpha() else "Be brief."})
    use_template(case, own_template(user, assistant, opening, "<|system|>{c}<|end|>"))
    scored = [before + text + after for text in texts[1::2]]
    return want(case, "good", no_alert="DATA012", scored=scored, kept=ROWS)


@mutation("scoring")
def content_that_is_trimmed(case):
    """Templates that trim: the text that they write is what is scored, and nothing is lost."""
    say, more = words(case), words(case)
    texts = [case.rng.choice([" {}", "{} ", "\n{}\n", "  {}\n\n"]).format(text) for text in (say, more)]
    chat_row(case, words(case), texts[0], words(case), texts[1])
    text = own_template("<|user|>{c}<|end|>", "<|assistant|>\n{c}<|end|>", "<|assistant|>\n")
    use_template(case, text.replace("m.content", "(m.content | trim)"))
    scored = [say + "<|end|>", more + "<|end|>"]
    return want(case, "good", no_alert="DATA010", scored=scored, num_tokens=ROWS * (len(say) + len(more) + 2))


@mutation("scoring")
def reasoning_of_earlier_turns(case):
    """Qwen3 writes the reasoning of the last turn only: each turn is trained as it is at inference, with its own."""
    thoughts, answers = [words(case), words(case)], [words(case), words(case)]
    chat_row(case, words(case), answers[0], words(case), answers[1])
    for row in case.rows:
        for turn in (0, 1):
            row["messages"][2 * turn + 1]["reasoning_content"] = thoughts[turn]
    text = own_template("<|user|>{c}<|end|>", "<|assistant|>{c}<|end|>", "<|assistant|>")
    thought = "('<think>' ~ m.reasoning_content ~ '</think>' if loop.last and m.reasoning_content else '')"
    text = text.replace("'<|assistant|>' ~ m.content", f"'<|assistant|>' ~ {thought} ~ m.content")
    use_template(case, text)
    case.flags |= {"--batch_size": str(2 * ROWS), "--allow": "DATA004"}
    scored = [f"<think>{thought}</think>{answer}<|end|>" for thought, answer in zip(thoughts, answers)]
    tokens = ROWS * sum(len(text) - 6 for text in scored)
    return want(case, "good", no_alert="DATA010", scored_first=scored[0], num_tokens=tokens)


@mutation("scoring")
def answer_of_nothing(case):
    """An empty answer, or one of white space, is the stop token; it ends no turn before it."""
    user, assistant, opening, before, after = APPENDING[case.rng.choice(["qwen", "blank", "alpaca", "header"])]
    empty, say = case.rng.choice(["", " ", "\n", "\n\n", "\t"]), words(case)
    texts = [empty, say] if case.rng.random() < 0.5 else [say, empty]
    chat_row(case, words(case), texts[0], words(case), texts[1])
    use_template(case, own_template(user, assistant, opening))
    return want(case, "good", no_alert="DATA010", scored=[before + text + after for text in texts])


# ---- columns ---------------------------------------------------------------------------------------------------------


def rows_as(case, name, data):
    case.data = case.folder / name
    case.data.write_bytes(data)
    case.names |= {name}


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@mutation("columns")
def byte_order_mark(case):
    kind = case.rng.choice(["jsonl", "json"])
    text = lines_of(case.rows) if kind == "jsonl" else json.dumps(case.rows)
    rows_as(case, f"rows.{kind}", b"\xef\xbb\xbf" + text.encode())
    return want(case, "good", kept=ROWS)


@mutation("columns")
def other_encoding(case):
    kind, encoding = case.rng.choice(["jsonl", "json"]), case.rng.choice(["utf-16", "utf-16-le", "utf-16-be"])
    text = lines_of(case.rows) if kind == "jsonl" else json.dumps(case.rows, indent=case.rng.choice([None, 1]))
    rows_as(case, f"rows.{kind}", text.encode(encoding))
    return want(case, "bad", "(?i)utf-?16")


@mutation("columns")
def compressed(case):
    data = gzip.compress(lines_of(case.rows).encode())
    how = case.rng.randrange(4)
    if how == 1:
        data = data[: case.rng.randrange(2, len(data) - 9)]
    elif how == 2:
        data = lines_of(case.rows).encode()  # a name that promises what is not there
    elif how == 3:
        data = b"\xef\xbb\xbf" + lines_of(case.rows).encode()
        data = gzip.compress(data)
    rows_as(case, "rows.jsonl.gz", data)
    return want(case, "bad" if how in (1, 2) else "good", "gz", kept=ROWS)


@mutation("columns")
def null_in_a_row(case):
    """The line says which row, and that it is null."""
    case.become(case.rng.choice(["sft", "grpo", "dpo"]))
    at = case.rng.randrange(ROWS)
    case.rows = [{"prompt": words(case), "completion": words(case), "answer": "1", "chosen": "a", "rejected": "b"}
                 for _ in range(ROWS)]  # fmt: skip
    name = {"sft": "completion", "grpo": "prompt", "dpo": case.rng.choice(["chosen", "rejected"])}[case.script]
    keep = {"sft": ["prompt", "completion"], "grpo": ["prompt", "answer"], "dpo": ["prompt", "chosen", "rejected"]}
    case.rows = [{key: row[key] for key in keep[case.script]} for row in case.rows]
    case.rows[at][name] = None
    kind = case.rng.choice(["jsonl", "json", "parquet"])
    if kind == "parquet":
        as_parquet(case, table(case))
    elif kind == "json":
        rows_as(case, "rows.json", json.dumps(case.rows).encode())
    return want(case, "bad", [rf"(row |line |:)({at}|{at + 1})\b", "null|None|empty", name])


@mutation("columns")
def missing_value_in_a_csv(case):
    case.become("sft")
    at, spelling = case.rng.randrange(1, ROWS), case.rng.choice(["NA", "null", "NaN", "", "N/A", "None", "nan"])
    texts = [words(case) for _ in range(ROWS)]
    texts[at] = spelling
    rows_as(case, "rows.csv", ("prompt,completion\n" + "".join(f"ask,{text}\n" for text in texts)).encode())
    return want(case, "either", [rf"(row |line |:)({at}|{at + 1}|{at + 2})\b", "null|None|empty|CSV"], kept=ROWS)


@mutation("columns")
def numbers_in_a_csv(case):
    """7 is a text here, and CSV reads a number."""
    case.become("sft")
    texts = case.rng.choice([[str(k) for k in range(ROWS)], [f"{k}.50" for k in range(ROWS)], ["True", "False"] * 4])
    rows_as(case, "rows.csv", ("prompt,completion\n" + "".join(f"ask,{text}\n" for text in texts)).encode())
    tokens = sum(len(text) + 1 for text in texts)
    case.flags["--batch_size"] = str(ROWS)
    return want(case, "either", "(?i)csv", num_tokens=tokens, kept=ROWS)


@mutation("columns")
def sharegpt_system(case):
    """A column `system` beside conversations."""
    case.become("sft")
    text = words(case)
    only_row(case, {"system": text, "conversations": [{"from": "human", "value": "ask"}, {"from": "gpt",
                                                                                        "value": "say"}]})
    return want(case, "good", out=[rf"first row +<\|system\|>{text}<\|end\|><\|user\|>ask"], scored=["say<|end|>"])


@mutation("columns")
def history(case):
    case.become("sft")
    row = {"prompt": "ask", "completion": "say", "history": [[words(case), words(case)]]}
    if case.rng.random() < 0.5:
        row = {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}],
               "history": [["a", "b"]]}
    only_row(case, row)
    return want(case, "bad", "history")


@mutation("columns")
def pictures(case):
    """A column of images, or parts of a content that are none of text."""
    case.need_chat()
    kind = case.rng.choice(["images", "image", "part", "part url", "audio"])
    for row in case.rows:
        if kind in ("images", "image"):
            row[kind] = [str(case.secret)] if kind == "images" else str(case.secret)
            continue
        value = next(value for value in row.values() if isinstance(value, list) and value)
        part = {"part": {"type": "image"}, "part url": {"type": "image_url", "image_url": {"url": str(case.secret)}},
                "audio": {"type": "input_audio", "input_audio": {}}}[kind]
        key = "content" if "content" in value[0] else "value"
        value[0][key] = [part, {"type": "text", "text": "What is this?"}]
    return want(case, "bad", "(?i)image|audio|text")


@mutation("columns")
def old_function_call(case):
    """OpenAI's function_call: trained as a tool call, or named."""
    chat_row(case, words(case), "")
    name, arguments = words(case), {"k": case.rng.randrange(99)}
    for row in case.rows:
        row["messages"][1] |= {"function_call": {"name": name, "arguments": json.dumps(arguments)},
                               "content": case.rng.choice([None, ""])}
    call = "{%- for t in m.tool_calls or [] -%}{{ t.function.name }}{%- endfor -%}"
    text = own_template("<|user|>{c}<|end|>", "<|assistant|>{c}", "<|assistant|>")
    use_template(case, text.replace("{%- endfor -%}{%- if add_gen", "{%- if m.role == 'assistant' -%}" + call +
                                    "{{ '<|end|>' }}{%- endif -%}{%- endfor -%}{%- if add_gen"))
    return want(case, "either", "function_call", scored=[name + "<|end|>"])


@mutation("columns")
def content_that_is_null(case):
    """OpenAI's rows of tools."""
    chat_row(case, words(case), "", "4", "done")
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    for row in case.rows:
        row["messages"][1] |= {"content": None, "tool_calls": [call]}
        row["messages"][2] = {"role": "tool", "tool_call_id": "c1", "content": "4"}
    text = "{%- for m in messages -%}{{ '<|' ~ (m.role if m.role != 'tool' else 'user') ~ '|>' ~ m.content }}"
    text += "{%- for t in m.tool_calls or [] -%}{{ t.function.name ~ t.function.arguments.a }}{%- endfor -%}"
    text += "{{ '<|end|>' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
    use_template(case, text)
    if case.rng.random() < 0.4:
        as_parquet(case, table(case))
    return want(case, "either", "DATA010", scored=["add1<|end|>", "done<|end|>"])


@mutation("columns")
def unread_columns(case):
    name = "extra_" + words(case)
    for row in case.rows if case.rng.random() < 0.5 else case.rows[:1]:
        row[name] = case.rng.choice([1, "x", [1], {"a": 1}])
    if case.script in ONLINE:  # its reward is given all columns
        return want(case, "good", kept=ROWS)
    return want(case, "good", out=[name], kept=ROWS)


@mutation("columns")
def no_answer_column(case):
    """`accuracy` has nothing to read: said before anything is loaded."""
    case.become(case.rng.choice(ONLINE))
    name = case.rng.choice(["label", "target", "ground_truth", "Answer", "gold"])
    for row in case.rows:
        row[name] = row.pop("answer")
    return want(case, "bad", ["answer", "solution", rf"\b{name}\b"])


@mutation("columns")
def one_row_that_the_template_refuses(case):
    """One of many is dropped, one of few ends the run."""
    chat_row(case, "ask", "say")
    many = case.rng.random() < 0.5
    count = 150 if many else ROWS
    only_row(case, case.rows[0], count)
    case.flags["--batch_size"] = "8"
    at = case.rng.randrange(count)
    messages = case.rows[at]["messages"]
    case.rng.choice([lambda: messages[0].update(role="tool"), lambda: messages[0].update(role="developer"),
                     lambda: messages.insert(0, {"role": "developer", "content": "x"})])()
    return want(case, "good" if many else "bad", "DATA008", alert="DATA008", kept=149 if many else None)


SLICES = {"[:5]": 5, "[:50%]": 4, "[-3:]": 3, "[25%:75%]": 4, "[2:]": 6, "[:-1]": 7, "[1:2]": 1, "[:100%]": 8,
          "[:9]": 8, "[8:]": 0, "[5:2]": 0, "[a:]": 0, "[:200%]": None, "[": 0, "[::2]": None, "[1.5:]": 0,
          "[:1%]": None, "[0:0]": 0}  # fmt: skip


@mutation("columns")
def slice_of_a_file(case):
    case.become("sft")
    part, name = case.rng.choice(list(SLICES)), case.rng.choice(["train", "train", "train", "test"])
    kind = case.rng.choice(["jsonl", "json", "parquet"])
    if kind == "parquet":
        as_parquet(case, table(case))
    else:
        text = lines_of(case.rows) if kind == "jsonl" else json.dumps(case.rows)
        rows_as(case, f"rows.{kind}", text.encode())
    case.flags["--batch_size"] = "1"
    case.argv += ["--dataset", f"{case.data}:{name}{part}"]
    kept = SLICES[part]
    if name == "test":  # a file has no split but train
        return want(case, "bad", "train|split|cannot read")
    return want(case, "either" if kept is None else "good" if kept else "bad", kept=kept)


@mutation("columns")
def part_held_out(case):
    case.become("sft")
    value, held = case.rng.choice([("0.25", 2), ("0.5", 4), ("0.125", 1), ("0.9", None), ("0", None), ("1", 0),
                                   ("-0.1", 0), ("1.5", 0), ("nan", 0), ("x", 0), ("0.01", None)])  # fmt: skip
    case.argv += ["--eval_fraction", value]
    case.names |= {"--eval_fraction", "--eval-fraction", "eval_fraction"}
    if held and case.rng.random() < 0.3:
        case.argv += ["--eval_dataset", str(case.data)]
        return want(case, "bad", "eval.fraction")
    case.argv += ["--eval_every", "1"]
    out = [rf"\b{ROWS - held} of \d+ rows kept", rf"\b{held} rows held out"] if held else []
    return want(case, "either" if held is None else "good" if held else "bad", "eval.fraction", out=out)


@mutation("columns")
def strings_as_chats(case):
    """--as_chat wraps plain strings into turns; without it they stay as they are, and DATA007 says so."""
    case.become(case.rng.choice(["sft", "dpo"]))
    if case.script == "sft":
        only_row(case, {"prompt": "ask", "completion": "say"})
    else:
        only_row(case, {"prompt": "ask", "chosen": "say", "rejected": "no"})
    if case.rng.random() < 0.5:
        return want(case, "good", alert="DATA007", kept=ROWS, scored_first="say<|end|>", out=[r"first row +ask\s*>>"])
    case.argv += ["--as_chat"]
    return want(case, "good", no_alert="DATA007", kept=ROWS, scored_first="say<|end|>",
                out=[r"first row +<\|user\|>ask<\|end\|><\|assistant\|>\s*>>"])


@mutation("columns")
def named_template(case):
    """chatml on a model that does not have its tokens: right by the text, or refused."""
    chat_row(case, "ask", "say")
    case.flags["--chat_template"] = case.rng.choice(["chatml", "chatml", "chatlm", "no-such"])
    case.names |= {"chat template", "--chat_template"}
    return want(case, "either" if case.flags["--chat_template"] == "chatml" else "bad", "chat.template")


@mutation("columns")
def columns_by_rename(case):
    """Alpaca, Dolly and a nested column: dotted names, several columns into one."""
    how = case.rng.choice(["alpaca", "dolly", "nested", "nested wrong", "template wrong", "old", "twice", "empty"])
    if how == "nested" or how == "nested wrong":
        case.become("grpo")
        name = "ground_truth" if how == "nested" else "truth"
        case.rows = [{"prompt": "1+2=", "reward_model": {"ground_truth": "3"}} for _ in range(ROWS)]
        case.argv += ["--rename", f"reward_model.{name}:answer"]
        case.names |= {"--rename", "reward_model"}
        return want(case, "good" if how == "nested" else "bad", "rename|reward_model|answer", kept=ROWS)
    case.become("sft")
    rows = {"alpaca": {"instruction": "ask", "input": words(case), "output": "say"},
            "dolly": {"instruction": "ask", "context": words(case), "response": "say"}}
    row = rows["dolly" if how == "dolly" else "alpaca"]
    only_row(case, row)
    more, answer = ("context", "response") if how == "dolly" else ("input", "output")
    flags = {"alpaca": "{instruction}\n{input}:prompt,output:completion",
             "dolly": "{instruction}\n{context}:prompt,response:completion",
             "template wrong": "{instruction} {nothing}:prompt,output:completion",
             "old": "instruction:prompt,output:completion", "twice": "instruction:prompt,output:prompt",
             "empty": case.rng.choice([":", "instruction:", ":prompt", "{}:prompt", "{instruction:prompt", ",,"])}
    case.argv += ["--rename", flags[how]]
    case.names |= {"--rename"}
    if how in ("alpaca", "dolly", "old"):
        prompt = "ask" if how == "old" else f"ask\\\\n{row[more]}"
        return want(case, "good", out=[rf"first row +{prompt}>>"], scored=[f"{row[answer]}<|end|>"], kept=ROWS)
    return want(case, "bad", "rename")


@mutation("columns")
def no_steps(case):
    """--max_steps 0 prints the plan and the first rows, and ends."""
    case.argv += ["--max_steps", "0"]
    case.only_plan = True
    return want(case, "good", out=["first row", rf"{ROWS} of {ROWS} rows kept"])


@mutation("columns")
def folder_of_a_run_that_was_refused(case):
    """What ended in exit code 2 without a checkpoint does not occupy its folder."""
    case.first = case.rng.choice([["--dataset", "no/such.jsonl"], ["--dtype", "int8"], ["--rename", "x:y"],
                                  ["--dataset", str(case.secret), "--rename", "prompt:prompt2"]])  # fmt: skip
    return want(case, "good", kept=ROWS)


# ---- models ----------------------------------------------------------------------------------------------------------


def loss_of(folder, rows, tied=None):
    """The mean negative log-likelihood of the completions, by transformers alone."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    total = count = 0
    with torch.no_grad():
        for row in rows:
            prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            ids = prompt + tokenizer(row["completion"] + "<|end|>", add_special_tokens=False)["input_ids"]
            scores = lm(torch.tensor([ids])).logits[0].log_softmax(-1)
            total -= sum(scores[at - 1, ids[at]].item() for at in range(len(prompt), len(ids)))
            count += len(ids) - len(prompt)
    return total / count


def text_rows(case):
    case.become("sft")
    case.rows = [{"prompt": f"What is {k} + 2?", "completion": f"#### {k + 2}"} for k in range(ROWS)]
    case.chat = False
    case.flags["--batch_size"] = str(ROWS)


@mutation("models")
def second_file_of_weights(case):
    """A variant, old shards or consolidated weights beside model.safetensors."""
    text_rows(case)
    folder = case.model()
    factor = case.rng.choice([0.5, -1.0])
    other = {name: factor * tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    name = case.rng.choice(["model.fp16.safetensors", "consolidated.safetensors", "zzz.safetensors", "a.safetensors",
                            "model-00001-of-00001.safetensors", "pytorch_model.safetensors", "weights.safetensors",
                            "model.safetensors.bak.safetensors", "original/consolidated.safetensors"])  # fmt: skip
    (folder / name).parent.mkdir(exist_ok=True)
    save_file(other, folder / name, metadata={"format": "pt"})
    if name == "model-00001-of-00001.safetensors" and case.rng.random() < 0.5:  # and its index
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(other, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return want(case, "either", [re.escape(name)], loss=loss_of(folder, case.rows), kept=ROWS)


@mutation("models")
def old_shards_beside_an_index(case):
    """The index names two files; a third and a fourth are of an older save."""
    text_rows(case)
    folder = case.model()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    index = {}
    for number, half in enumerate(halves, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(half, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    expected = loss_of(folder, case.rows)
    old = {name: -tensors[name] for name in case.rng.choice(halves)}
    save_file(old, folder / case.rng.choice(["model-00003-of-00003.safetensors", "model-00001-of-00003.safetensors",
                                             "model.v2.safetensors"]), metadata={"format": "pt"})  # fmt: skip
    return want(case, "either", "safetensors", loss=expected, kept=ROWS)


@mutation("models")
def head_beside_a_tied_embedding(case):
    """tie_word_embeddings is true, and the file has a head of its own: transformers' value, or a refusal."""
    text_rows(case)
    folder = case.model()
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() * case.rng.choice([1.0, 0.5, -1.0, 1.25])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return want(case, "either", "lm_head|tie_word|head", loss=loss_of(folder, case.rows), kept=ROWS)


@mutation("models")
def learned_positions(case):
    """A row beyond a table of positions is refused before the first step."""
    text_rows(case)
    folder, size = case.model(), case.rng.choice([24, 32, 64, 128])
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    kind = case.rng.choice(["gpt2", "opt"])
    torch.manual_seed(1)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=103, n_positions=size, n_embd=32, n_layer=2, n_head=2,
                                         bos_token_id=None, eos_token_id=2)  # fmt: skip
    else:
        config = transformers.OPTConfig(vocab_size=103, max_position_embeddings=size, hidden_size=32, ffn_dim=64,
                                        num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32,
                                        pad_token_id=0, bos_token_id=None, eos_token_id=2)  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    generation = json.dumps({"eos_token_id": 2, "pad_token_id": 0})
    (folder / "generation_config.json").write_text(generation)
    longest = size + case.rng.choice([-3, -1, 0, 1, 2, 40])
    case.rows[case.rng.randrange(ROWS)] = {"prompt": "a" * 8, "completion": "b" * (longest - 9)}
    longest = max([longest, *(len(row["prompt"]) + len(row["completion"]) + 1 for row in case.rows)])
    case.flags |= {"--max_length": "512", "--allow": "MODEL001"}
    case.names |= {"--max_length"}
    return want(case, "good" if longest <= size else "bad", "max_length|position")


@mutation("models")
def rows_beyond_the_configs_length(case):
    """Rotary positions go on for ever, but the model has never seen such: a warning."""
    text_rows(case)
    longest = max(len(row["prompt"]) + len(row["completion"]) + 1 for row in case.rows)
    limit = case.rng.choice([8, 16, longest - 1, longest, longest + 1, 400])
    case.edit("config.json", lambda settings: settings.update(max_position_embeddings=limit))
    case.flags["--max_length"] = "200"
    case.names |= {"--max_length"}
    if limit < longest:
        return want(case, "good", alert="MODEL002", kept=ROWS)
    return want(case, "good", no_alert="MODEL002", kept=ROWS)


@mutation("models")
def folder_that_a_run_holds(case):
    """Another run, alive, or killed a moment ago, has the folder."""
    case.become("sft")
    case.holder = case.rng.choice(["alive", "killed", "alive without resume"])
    if case.holder != "alive without resume":
        case.argv += ["--resume", "auto", "--allow_changes"]
    case.names |= {"out", "--resume", "pid", "--output_dir"}
    if case.holder == "killed":
        return want(case, "good")
    return want(case, "bad", r"\d{2,}" if case.holder == "alive" else ())


@mutation("models")
def other_batch_size_on_resume(case):
    """--allow_changes says at which row it goes on."""
    earlier(case)
    case.resumed = False
    size = case.rng.choice([1, 3, 4, 5])
    case.argv += ["--batch_size", str(size), "--allow_changes", "--max_steps", "3"]
    return want(case, "good", out=[r"row\w* \d+|\d+ rows?|row of"])


@mutation("models")
def optimised_python(case):
    """python -O and -OO: no guard is an assert, and no docstring is needed."""
    how = case.rng.choice(["-O", "-OO"])
    case.python = [how]
    if case.script in ONLINE and case.rng.random() < 0.5:
        case.argv += ["--reward", str(MODEL)]  # a language model
        case.names |= {"--reward"}
        return want(case, "bad", "reward")
    return want(case, "good", kept=ROWS)


@mutation("models")
def terminal_without_unicode(case):
    text = case.rng.choice(["\u6f22\u5b57", "\u00e9t\u00e9", "\U0001f600", "na\u00efve \u2192"])
    case.python, case.environment = [], case.rng.choice([{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "LANG": "C",
        "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "latin-1"}])  # fmt: skip
    case.become("sft")
    only_row(case, {"prompt": text, "completion": text})
    return want(case, "good", kept=ROWS)


# ---- judging ---------------------------------------------------------------------------------------------------------


NOT_ONE_NUMBER = ["3/4", "(1, 2)", "\\frac{5}{7}", "x + 1", "", "yes", "1 or 2", "\\sqrt{2}", "2^3", "5, 6", "[1, 2]",
                  "3:4", "1 2", "n = m", "-", "####", "\\boxed{\\frac{1}{9}}", "#### 8/9", "1e", "0x10"]  # fmt: skip
ONE_NUMBER = ["7", "-3", "+4", "1,234", "12.0", "$5", "#### 7", "\\boxed{9}", "The sum is\n#### 1,000", "50%", "0.5",
              " 8 ", "3.", "-0.25", "1e3", ["12"], 7, 2.5, -3]  # fmt: skip


@mutation("judging")
def answer_that_is_not_one_number(case):
    """accuracy pays for none of them."""
    case.become(case.rng.choice(ONLINE))
    gold = case.rng.choice(NOT_ONE_NUMBER)
    for row in case.rows:
        row["answer"] = gold
    return want(case, "bad", "GRPO003|answer")


@mutation("judging")
def answer_that_is_one_number(case):
    case.become(case.rng.choice(ONLINE))
    gold = case.rng.choice(ONE_NUMBER)
    for row in case.rows:
        row["answer"] = gold
    return want(case, "good", no_alert="GRPO003", kept=ROWS)


@mutation("judging")
def answer_in_a_list(case):
    case.become(case.rng.choice(ONLINE))
    gold = case.rng.choice([["1", "2"], [], [[]], [["7"]], [None], [{"a": 1}], ["x"], [3, 4]])
    for row in case.rows if case.rng.random() < 0.5 else case.rows[:1]:
        row["answer"] = gold
    return want(case, "either", "GRPO003|answer")


@mutation("judging")
def held_out_prompts_without_a_reward(case):
    """Their share, by hand; they are neither right nor wrong."""
    case.become(case.rng.choice(ONLINE))
    count, silent = 20, case.rng.choice([0, 1, 2, 10, 20])
    rows = [{"prompt": f"{k}+1=", "answer": str(k + 1)} for k in range(count)]
    for row in rows[:silent]:
        row["answer"] = case.rng.choice(NOT_ONE_NUMBER[:8])
    (case.folder / "held.jsonl").write_text(lines_of(rows))
    case.argv += ["--eval_dataset", str(case.folder / "held.jsonl"), "--eval_every", "1", "--eval_samples", "1"]
    if silent > 2:
        return want(case, "bad", "GRPO003")
    metrics = {"eval/no_reward_frac": silent / count}
    return want(case, "good", alert="GRPO003" if silent else None, metrics=metrics, kept=ROWS)


@mutation("judging")
def same_prompt_again(case):
    """Its place is part of the noise: not the same completions again."""
    case.become(case.rng.choice(ONLINE))
    count = case.rng.choice([1, 2, 8])
    case.rows = [{"prompt": "Tell me", "answer": "5"} for _ in range(count)]
    case.flags |= {"--batch_size": str(max(2, count) if count > 1 else 1), "--temperature": "1.2"}
    case.argv += ["--max_steps", "4", "--steps_per_generation", "1", "--num_iterations", "1"]
    return want(case, "good", other_completions=True, kept=count)


RETURNS = {  # what a reward function returns -> whether it counts
    "numpy.arange(float(n))": True, "torch.arange(n)": True, "torch.ones(n, dtype=torch.bfloat16)": True,
    "[numpy.float32(k) for k in range(n)]": True, "[torch.tensor(float(k)) for k in range(n)]": True,
    "tuple(range(n))": True, "numpy.ones(n, dtype=bool)": True, "torch.ones(n, 1)": None, "numpy.ones((n, 2))": False,
    "numpy.array(1.0)": False, "torch.tensor(2.0)": False, "numpy.array(['a'] * n)": False,
    "{k: 1.0 for k in range(n)}": False,
    "(1.0 for _ in range(n))": None, "numpy.full(n, numpy.nan)": None, "[numpy.datetime64('2020')] * n": False,
    "torch.zeros(n + 1)": False, "[torch.zeros(2)] * n": False, "[1 + 2j] * n": False, "[None] * (n - 1) + [1]": None,
    "[numpy.int64(2)] * n": True, "torch.zeros(n, requires_grad=True)": True, "numpy.full(n, 1e39)": None,
}  # fmt: skip


@mutation("judging", 2)
def what_a_reward_returns(case):
    case.become(case.rng.choice(ONLINE))
    value = case.rng.choice(list(RETURNS))
    lines = [f"import {name}\n" for name in ("numpy", "torch") if name + "." in value]
    text = "def mine(prompts, completions, **columns):\n    n = len(completions)\n"
    (case.folder / "mine.py").write_text("".join(lines) + text + f"    return {value}\n")
    case.argv += ["--reward", f"{case.folder}/mine.py:mine"]
    case.names |= {"--reward", "mine", "GRPO003"}
    right = RETURNS[value]
    return want(case, "either" if right is None else "good" if right else "bad", "GRPO003|reward|mine",
                no_alert="GRPO003" if right else None)  # fmt: skip


@mutation("judging")
def reward_by_name(case):
    """`math` needs a package; a name that is none is refused."""
    case.become(case.rng.choice(ONLINE))
    name = case.rng.choice(["math", "math", "mathh", "Accuracy", "maths"])
    case.argv += ["--reward", name]
    case.names |= {"--reward", "math"}
    if name == "math":
        found = importlib.util.find_spec("math_verify")
        return want(case, "good" if found else "bad", "math.verify", kept=ROWS)
    return want(case, "bad", "reward")


@mutation("judging")
def pairs_that_are_equal(case):
    """They teach nothing: dropped and counted."""
    case.become(case.rng.choice(PAIRS))
    few = case.rng.random() < 0.4
    count = 200 if few else ROWS
    chat = case.rng.random() < 0.5
    rows = []
    for k in range(count):
        right, wrong = f"say {k}", f"no {k}"
        row = {"prompt": "ask " + words(case), "chosen": right, "rejected": wrong}
        if chat:
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            row = {name: [{"role": roles[name], "content": text}] for name, text in row.items()}
        rows.append(row)
    equal = 1 if few else case.rng.choice([1, 3, ROWS])
    for k in case.rng.sample(range(count), equal):
        rows[k]["rejected"] = rows[k]["chosen"]
    case.rows = rows
    if few:
        return want(case, "good", kept=count - 1, out=[rf"{count - 1} of {count} rows kept"])
    return want(case, "bad" if equal == ROWS else "either", "DATA009|equal", alert="DATA009", kept=ROWS - equal)


# ---- pipes -----------------------------------------------------------------------------------------------------------
# What has no end, or is no file: whoever opens a pipe whose other end nobody has waits for ever.


def no_file(case, path, kind):
    """Put at a path, instead of what stands there, a pipe, a socket, a folder, or a link to a device."""
    if path.is_file() or path.is_symlink():
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    case.names |= {path.name}


@mutation("pipes")
def pipe_in_a_model(case):
    name = case.each(["tokenizer_config.json", "generation_config.json", "chat_template.jinja", "README.md",
                      "additional_chat_templates/other.jinja"])  # fmt: skip
    kind = case.each(["pipe", "socket", "/dev/zero", "pipe", "/dev/urandom"])
    no_file(case, case.model() / name, kind)
    return want(case, "bad", [Path(name).name, "--model"])


@mutation("pipes")
def pipe_of_rows(case):
    name = case.each(["rows.csv", "rows.json", "saved/state.json", "split/train-0.parquet", "rows.json.gz"])
    no_file(case, case.folder / name, case.each(["pipe", "pipe", "pipe", "pipe", "/dev/zero"]))
    held_out = case.again % 2 == 1
    case.argv += ["--eval_dataset" if held_out else "--dataset", str(case.folder / Path(name).parts[0])]
    return want(case, "bad", Path(name).parts[0])


@mutation("pipes")
def pipe_in_a_checkpoint(case):
    """Damaged, so that the one before is resumed."""
    newest = earlier(case)[1]
    name = case.each(["config.json", "tokenizer.json", "trainer/.metadata", "trainer/meta.json",
                      "trainer/state.safetensors"])  # fmt: skip
    no_file(case, newest / name, case.each(["pipe", "/dev/zero", "pipe", "socket", "/dev/urandom"]))
    return want(case, "good" if (newest / name).exists() else "either")


@mutation("pipes")
def pipe_where_a_run_writes(case):
    name = case.each(["samples.jsonl", "alerts.jsonl", "run.lock", "debug", "metrics.jsonl"])
    if case.again % 2:
        earlier(case)
        case.resumed = False
    (case.folder / "out").mkdir(exist_ok=True)
    no_file(case, case.folder / "out" / name, "pipe")
    case.guard(case.folder / "out", is_closed=True)
    return want(case, "bad", [re.escape(name), "--output_dir"])


@mutation("pipes")
def pipe_of_a_reward(case):
    case.become(case.each(["grpo", "rloo", "raft", "grpo", "raft"]))
    name = case.each(["mine.py", "mine.py", "scorer/tokenizer_config.json", "scorer/README.md", "mine.py"])
    path = case.folder / name
    if name.startswith("scorer"):
        shutil.copytree(WHOLE["reward"] / "final", case.folder / "scorer")
    no_file(case, path, case.each(["pipe", "socket", "pipe", "/dev/zero", "folder"]))
    case.argv += ["--reward", f"{path}:mine" if name == "mine.py" else str(case.folder / "scorer")]
    return want(case, "bad", ["--reward", path.name])


@mutation("pipes")
def pipe_of_a_template(case):
    case.need_chat()
    path = case.folder / "mine.jinja"
    no_file(case, path, case.each(["pipe", "socket", "/dev/zero", "folder", "/dev/urandom"]))
    case.flags["--chat_template"] = str(path)
    return want(case, "bad", "--chat_template")


# ---- links -----------------------------------------------------------------------------------------------------------
# git keeps links: a folder that was cloned may hold some to its user's own files.


def outside(case):
    """-> where a link may lead that leads out: to a file with a secret, to this process's environment, to a folder."""
    (case.folder / "others").mkdir(exist_ok=True)
    (case.folder / "others" / "key").write_text(SECRET)
    case.guard(case.folder / "others", is_closed=True)
    key = case.folder / "others" / "key"
    return case.each([case.secret, "/proc/self/environ", "../others", "../secret.jsonl", key])


def link(case, path, target):
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)
    case.names |= {path.name}


@mutation("links")
def link_out_of_a_model(case):
    name = case.each(["chat_template.jinja", "notes.txt", "more", "generation_config.json",
                      "additional_chat_templates/rag.jinja"])  # fmt: skip
    link(case, case.model() / name, outside(case))
    return want(case, "bad", [Path(name).name, "--model", "link"])


@mutation("links")
def link_within_a_model(case):
    """It may hold those; what is published holds files."""
    folder = case.model()
    name = case.each(["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja",
                      "generation_config.json"])  # fmt: skip
    (folder / name).rename(folder / f"real-{name}")
    link(case, folder / name, case.each([f"real-{name}", f"./real-{name}", folder / f"real-{name}"]))
    return want(case, "good", kept=ROWS)


@mutation("links")
def link_out_of_a_reward_model(case):
    case.become(case.each(["rloo", "grpo", "raft", "rloo", "grpo"]))
    shutil.copytree(WHOLE["reward"] / "final", case.folder / "scorer")
    name = case.each(["chat_template.jinja", "README.md", "more", "tokenizer_config.json", ".hidden"])
    link(case, case.folder / "scorer" / name, outside(case))
    case.argv += ["--reward", str(case.folder / "scorer")]
    return want(case, "bad", [Path(name).name, "--reward", "link"])


@mutation("links")
def link_in_a_checkpoint(case):
    """A file that it names is a link: damaged. One more that it does not name: of no interest."""
    newest = earlier(case)[1]
    target = outside(case)
    name = case.each(["notes.txt", "tokenizer.json", "more", "config.json", "trainer/meta.json"])
    if (newest / name).is_file():
        (newest / name).rename(case.folder / "moved")
        target = case.folder / "moved"
    link(case, newest / name, target)
    return want(case, "good")


@mutation("links")
def link_where_a_run_writes(case):
    """Through none of them anything is cut, appended to or replaced."""
    resumes = case.again % 2 == 0
    if resumes:
        earlier(case)
        case.resumed = False
    name = case.each(["metrics.jsonl", "samples.jsonl", "run.lock", "alerts.jsonl", "debug"])
    target = outside(case)
    (case.folder / "out").mkdir(exist_ok=True)
    link(case, case.folder / "out" / name, target if name != "debug" else "../others")
    case.guard(case.folder / "out", is_closed=True)
    case.guard(case.secret)
    return want(case, "bad", ["link|other files", "--output_dir"])


@mutation("links")
def link_with_a_passing_name(case):
    """The link goes, where a kill may have left a folder of this name; what it leads to stays."""
    out = earlier(case)[0].parent
    outside(case)
    name = case.each([".tmp-checkpoint", ".tmp-final", ".old-final", ".tmp-rehearsal", ".old-checkpoint-000001"])
    link(case, out / name, "../others")
    return want(case, "good")


@mutation("links")
def link_to_a_checkpoint_elsewhere(case):
    """An earlier one, moved to another disk: it is rotated by removing the link."""
    first, newest = earlier(case)
    moved = case.each([first, newest, first, newest, first])
    moved.rename(case.folder / "disk")
    moved.symlink_to(case.each(["../disk", case.folder / "disk"]))
    case.guard(case.folder / "disk")
    case.argv += ["--keep_last", "1"]
    return want(case, "good")


# ---- neighbours ------------------------------------------------------------------------------------------------------
# An output folder that holds other people's work.

WAYS_TO_START = [
    [], ["--resume", "auto"], ["--resume", "auto", "--allow_changes"], ["--max_steps", "0"],
    ["--save_every", "1", "--keep_last", "1"], ["--resume", "auto", "--max_steps", "0"], ["--save_minutes", "0"],
]  # fmt: skip


def any_script(case):
    case.become(random.Random(f"{case.number}").choice([*SCRIPTS, *LATER_SCRIPTS]))


def foreign(case, names):
    """An output folder with files of others: texts, bytes that are no text, an empty one."""
    out = case.folder / "out"
    for number, name in enumerate(names):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes([b"chapter 1\n", b"\xff\xd8\x00", b"", b'{"status": "done"}\n'][number % 4])
    return out


@mutation("neighbours")
def names_of_others(case):
    """Of no interest to a run: it goes on beside them."""
    any_script(case)
    out = foreign(case, case.each([
        [".old-letters/1.txt", ".old-letters/2.txt", ".tmp-notes", "rows.jsonl"],
        [".tmp-final.txt", ".tmp-check/x", ".old-checkpoint-x/y", "old.jsonl"],
        [".tmp-checkpoint.bak", ".old-final.zip", "final.txt", "checkpoint.txt", "metrics.json"],
        [".tmp-\u00e9\u6f22", ".old- ", "a b.jsonl", "Metrics.jsonl", "alerts.jsonl.1"],
        [".tmp-000001/model.safetensors", ".old-1/trainer/meta.json", "run.json.bak", "samples.jsonl~"],
    ]))
    case.guard(out)
    return want(case, "good", kept=ROWS)


@mutation("neighbours")
def names_that_a_run_takes(case):
    """Refused, and nothing is touched."""
    any_script(case)
    out = foreign(case, case.each([
        [".old-trip/1.jpg", ".tmp-book/2.tex", "metrics.jsonl"], [".old-x", "alerts.jsonl"],
        [".tmp-y/z", "samples.jsonl", "notes.jsonl"], ["final/paper.pdf", ".old-final/draft"],
        [".tmp-checkpoint/notes", "x.jsonl"],
    ]))  # fmt: skip
    case.argv += WAYS_TO_START[case.number % len(WAYS_TO_START)]
    case.guard(out, is_closed=True)
    return want(case, "bad", ["holds other files", "--output_dir"])


@mutation("neighbours")
def run_of_another_program(case):
    """Its run.json is none of ours."""
    any_script(case)
    about = case.each([{"status": "finished"}, {"pid": 1, "command": "make"}, {"status": "failed", "exit_code": 2},
                       {"versions": {}, "pid": 7, "status": "running"}, {"exit_code": 4}])  # fmt: skip
    out = foreign(case, [".tmp-checkpoint/a", ".old-checkpoint-000003/b", "metrics.jsonl", "c.jsonl"])
    (out / "run.json").write_text(json.dumps(about))
    case.argv += WAYS_TO_START[(case.number + 3) % len(WAYS_TO_START)]
    case.guard(out, is_closed=True)
    return want(case, "bad", ["run.json|metrics.jsonl", "--output_dir"])


@mutation("neighbours")
def others_beside_a_run_of_ours(case):
    """It is resumed, and rotates its own checkpoints."""
    out = earlier(case)[0].parent
    theirs = case.each([
        [".old-photos/1.jpg", ".tmp-thesis", "rows.jsonl"], [".tmp-save/x", ".old-checkpoint-last/x", "a.jsonl"],
        [".tmp-checkpoint2/x", ".old-finals", "b.jsonl"], ["debug.txt", ".tmp-rehearsal.txt", "final.jsonl"],
        [".tmp-logs/x", ".old-", "checkpoint-best.txt", "wandb/run.jsonl"],
    ])  # fmt: skip
    for name in theirs:
        foreign(case, [name])
        case.guard(out / name)
    case.argv += ["--keep_last", "1"]
    return want(case, "good")


@mutation("neighbours")
def others_beside_a_run_that_was_refused(case):
    """A run that ended with exit code 2 has left the folder; the next one begins there, and removes its files only."""
    names = case.each([[".old-a/1", "x.jsonl"], [".tmp-a", "y.jsonl"], [".tmp-b/2", ".old-b"], ["z.jsonl", ".tmp-c/3"],
                       [".old-c.jsonl", ".tmp-d.jsonl"]])  # fmt: skip
    case.guard(foreign(case, names))
    case.first = case.each([["--dataset", "no/such.jsonl"], ["--rename", "x:y"], ["--model", "no/such"],
                            ["--chat_template", "no/such.jinja"], ["--max_length", "1"]])  # fmt: skip
    return want(case, "good", kept=ROWS)


@mutation("neighbours")
def files_beside_the_weights(case):
    """A model folder holds more than a model; final/ does not, and no template that is not in use."""
    any_script(case)
    folder = case.model()
    names = case.each([[".env", "id_rsa"], ["training_args.bin", "optimizer.pt"], ["train.py", "notes.ipynb"],
                       ["additional_chat_templates/secret.jinja", ".git/config"], ["README.md", "eval.jsonl"]])
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(SECRET)
    return want(case, "good", kept=ROWS)


# ---- strangers -------------------------------------------------------------------------------------------------------
# What a stranger's model says of itself, and what a stranger's checkpoint says of its run.


@mutation("strangers")
def tokenizer_that_panics(case):
    """A regular expression that has too many ways to read a text: the library panics, which is no Exception."""
    pattern, text = case.each([("(7+)+x", "7" * 45), ("(a|aa)+b", "a" * 60), ("(\\s*\\s*)*Q", " " * 45),
                               ("([^x]*)*y", "z" * 40), ("(.*.*)*=", "e" * 40)])  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    case.become(case.each(["sft", "raft", "kto", "distillation", "reward"]))
    case.edit("tokenizer.json", lambda settings: settings.update(pre_tokenizer=split))
    place, key = case.texts()[0]
    place[key] = text
    case.panics = True
    return want(case, "either", "retry-limit|rows.jsonl|row")


@mutation("strangers")
def config_beyond_its_tensors(case):
    """Refused before it is built; the memory of a case is bounded, its time too."""
    fields_of = case.each([{"num_hidden_layers": 10**7}, {"vocab_size": 2**40}, {"hidden_size": 2**33},
                           {"num_key_value_heads": 10**8}, {"head_dim": 10**9}, {"intermediate_size": 2**35},
                           {"num_hidden_layers": 2**70}])  # fmt: skip
    case.edit("config.json", lambda settings: settings.update(fields_of))
    return want(case, "bad", "--model")


@mutation("strangers")
def config_of_another_kind(case):
    """The same with names that other kinds of models have."""
    fields_of = case.each([
        {"model_type": "mistral", "num_hidden_layers": 10**8}, {"model_type": "gpt_neox", "num_hidden_layers": 10**8},
        {"model_type": "opt", "num_hidden_layers": 10**8}, {"model_type": "qwen3_moe", "num_experts": 10**8},
        {"model_type": "bloom", "n_layer": 10**8},
    ])  # fmt: skip
    case.edit("config.json", lambda settings: settings.update(fields_of))
    return want(case, "bad", "--model")


@mutation("strangers")
def generation_settings(case):
    """The last samples are greedy and by our own settings, whatever the folder says."""
    fields_of = case.each([
        {"stop_strings": ["#", "4"], "num_beams": 4}, {"max_new_tokens": 0, "min_new_tokens": 99},
        {"do_sample": True, "temperature": 0.0, "top_k": 0}, {"penalty_alpha": 0.6, "top_k": 4},
        {"prompt_lookup_num_tokens": 3, "assistant_early_exit": 1}, {"watermarking_config": {"bias": 2.0}},
        {"forced_eos_token_id": 2, "suppress_tokens": [2], "bad_words_ids": [[5]]},
    ])  # fmt: skip
    case.edit("generation_config.json", lambda settings: settings.update(fields_of))
    return want(case, "either", "generation_config|--model")


FORGED = [  # changes of a checkpoint's meta.json, its sums made right again
    lambda meta: meta.update(step=-7), lambda meta: meta.update(step=10**12),
    lambda meta: meta["offsets"].update({"metrics.jsonl": -5}), lambda meta: meta["state"].update(alerts=[1]),
    lambda meta: meta["state"].update(before={"loss": "x"}), lambda meta: meta["flags"].update(batch_size="2"),
    lambda meta: meta["offsets"].update({"metrics.jsonl": 1.5}), lambda meta: meta["state"].update(last=7),
]  # fmt: skip


@mutation("strangers", 2)
def forged_numbers(case):
    """A run cannot have written them: a damaged checkpoint, and the one before is resumed. With other flags, too."""
    sign(earlier(case)[1], case.each(FORGED))
    case.argv += ["--allow_changes"] if case.again % 2 else []
    return want(case, "good")


@mutation("strangers")
def address_of_code(case):
    """It is neither run nor passed on: see `published`."""
    where = {"AutoConfig": "evil/repo--x.C", "AutoModelForCausalLM": "evil/repo--x.M", "AutoTokenizer": ["x.T", None]}
    name = case.each(["config.json", "tokenizer_config.json", "generation_config.json", "config.json", "config.json"])
    value = case.each([where, {"AutoTokenizer": ["evil/repo--x.T", None]}, where, [where], {"AutoConfig": 7}])
    key = case.each(["auto_map", "auto_map", "auto_map", "inner", "auto_map"])
    case.edit(name, lambda settings: settings.update({key: {"auto_map": value} if key == "inner" else value}))
    return want(case, "either", "--model|auto_map")


# ---- failing ---------------------------------------------------------------------------------------------------------
# Rewards that fail: a row's error costs its reward, a call's its call, and the third rollout without any the run.

HEAD = "import os, sys, time\nCALLS = [0]\ndef mine(prompts, completions, **columns):\n    CALLS[0] += 1\n"
ESCAPE = "'\\x1b]0;owned\\x07\\x1b[2J'"


def reward_of(case, body, steps=1):
    """A reward file of this body; n is the number of completions of a call, and CALLS[0] the number of calls."""
    case.become(case.each(["grpo", "rloo", "raft", "rloo", "grpo"]))
    (case.folder / "mine.py").write_text(f"{HEAD}    n = len(completions)\n    {body}\n")
    case.argv += ["--reward", f"{case.folder}/mine.py:mine", "--reward_timeout", "3", "--max_steps", str(steps)]
    case.argv += ["--steps_per_generation", "1", "--num_iterations", "1"]
    case.names |= {"--reward", "mine", "GRPO003"}


@mutation("failing")
def reward_that_always_fails(case):
    """One or two rollouts without any reward are skipped, and said; the third ends the run."""
    steps = case.each([1, 2, 3, 4, 2])
    reward_of(case, case.each(["raise KeyError('answer')", "os._exit(3)", "raise SystemExit(0)", "[].pop()",
                               "raise BaseException('x')"]), steps)  # fmt: skip
    return want(case, "good" if steps < 3 else "bad", "GRPO003", alert="GRPO003")


@mutation("failing")
def reward_that_fails_once(case):
    """Its first call, or a later one, of three: the run goes on."""
    at = case.each([1, 2, 3, 1, 2])
    act = case.each(["raise ValueError('no')", "os.kill(os.getpid(), 9)", "time.sleep(60)", "os.abort()",
                     "return ['7'] * n if False else 1 / 0"])  # fmt: skip
    body = f"if CALLS[0] == {at} and not os.path.exists('failed'):\n        open('failed', 'w').close()\n        {act}"
    reward_of(case, f"{body}\n    return [float(k) for k in range(n)]", steps=3)
    return want(case, "good", "GRPO003", alert="GRPO003")


@mutation("failing")
def reward_of_some_rows(case):
    """None in some places is no reward there; before step 1 more than a tenth of them ends the run."""
    values = case.each(["[None] + [1.0] * (n - 1)", "[float('nan')] * n", "[None, float('inf')] * (n // 2)",
                        "[1.0 if k else None for k in range(n)]", "[None] * n"])  # fmt: skip
    reward_of(case, f"return {values}")
    return want(case, "bad", "GRPO003", alert="GRPO003")


@mutation("failing")
def reward_that_speaks(case):
    """What a reward raises or prints may hold what a terminal obeys, and be long."""
    act = case.each([f"raise ValueError({ESCAPE} + str(completions))", f"raise ValueError({ESCAPE} * 10**6)",
                     f"class Odd(Exception):\n        def __str__(self):\n            raise ValueError({ESCAPE})\n"
                     "    raise Odd()", "raise ValueError('a\\nb\\r\\x9b31m')", "raise UnicodeError('\\ud800\\u202e')"])
    reward_of(case, act, steps=2)
    return want(case, "good", "GRPO003", alert="GRPO003")


@mutation("failing")
def reward_of_another_size(case):
    values = case.each(["[1.0] * (n + 1)", "[1.0] * 10**6", "'1' * n", "[[1.0]] * n", "None"])
    reward_of(case, f"return {values}")
    return want(case, "bad", "GRPO003|--reward")


@mutation("failing")
def row_that_a_reward_cannot_judge(case):
    """`accuracy` takes each row by itself: the others keep their reward."""
    case.become(case.each(["grpo", "raft", "rloo", "raft", "grpo"]))
    case.rows = [json.loads(json.dumps(case.rows[0])) for _ in range(40)]
    value = case.each([["4"], {"a": 1}, [[]], 1e400, {"answer": ["1"]}])
    case.rows[case.rng.randrange(40)]["answer"] = value
    case.flags["--batch_size"] = "40"
    return want(case, "good", kept=40)


# ---- spellings -------------------------------------------------------------------------------------------------------
# What a terminal obeys, special tokens in a row's arguments, ids of the hub with revisions.


@mutation("spellings")
def special_token_in_a_row(case):
    """A row's chat_template_kwargs may set none: its text would be taken for it."""
    case.need_chat()
    name = case.each(["eos_token", "bos_token", "pad_token", "unk_token", "eos_token", "sep_token"])
    value = case.each(["<|user|>", "", 7, None, ["<|end|>"], "x"])
    row = case.row()
    row["chat_template_kwargs"] = {name: value} if case.again % 2 else json.dumps({name: value, "a": 1})
    return want(case, "bad", ["DATA008|chat_template_kwargs"])


@mutation("spellings")
def special_token_by_flag(case):
    """The flag is its user's own."""
    case.need_chat()
    value = case.each(['{"eos_token": "<|end|>"}', '{"bos_token": ""}', '{"pad_token": null}', '{"eos_token": 7}',
                       '{"unk_token": ["x"]}'])  # fmt: skip
    case.flags["--chat_template_kwargs"] = value
    case.names |= {"--chat_template"}
    return want(case, "either", "chat_template")


@mutation("spellings", 2)
def revisions(case):
    """Nothing of it is in the cache, and there is no network: one line with the id."""
    name = case.each(["a/model@", "a/model@main", "a/model@v1@v2", "a/model@../../x", "tiny@main", f"{MODEL}@main",
                      "a/model@\x1b[31m", "a/model@refs/pr/1", "@main", "@", "a/model@" + "a" * 3000,
                      "a/model@0123456789abcdef0123456789abcdef01234567"])  # fmt: skip
    flag = "--model"
    if case.number % 3 == 0:
        case.become(case.each(STUDENTS))
        flag = "--teacher"
    case.flags[flag] = name
    return want(case, "bad", flag)


@mutation("spellings")
def revisions_elsewhere(case):
    """A dataset and a reward have none."""
    name = case.each(["someone/rows@main", "tiny@main", "rows.jsonl@v1", "someone/rows@v1:train", "@"])
    flag = case.each(["--dataset", "--eval_dataset"])
    if case.again == 4:
        case.become("grpo")
        flag, name = "--reward", "someone/model@main"
    case.argv += [flag, name]
    return want(case, "bad", flag if flag == "--reward" else "dataset")


@mutation("spellings")
def names_that_a_terminal_obeys(case):
    """Of folders beside checkpoints, of columns, files, rewards and templates."""
    escape = case.each(["\x1b]0;owned\x07", "\x1b[2J\x1b[1;1H", "\r\x1b[K", "\x9b31m", "\u202e\u2066"])
    where = case.each(["checkpoint", "column", "file", "reward", "template"])
    if where == "checkpoint":
        out = earlier(case)[0].parent
        shutil.copytree(out / "checkpoint-000002", out / f"checkpoint-000003{escape}")
        return want(case, "either")
    if where == "column":
        for row in case.rows:
            row[f"x{escape}"] = escape
        return want(case, "good", kept=ROWS)
    if where == "file":
        rows_as(case, f"rows{escape}.jsonl", b"{")
        return want(case, "bad", "rows")
    if where == "reward":
        case.become("raft")
        case.argv += ["--reward", f"no{escape}.py:mine"]
        return want(case, "bad", "--reward")
    case.need_chat()
    use_template(case, "{{ raise_exception('" + escape + "') }}")
    return want(case, "bad", "DATA|chat_template")


@mutation("spellings")
def texts_that_a_terminal_obeys(case):
    """In rows of each script, whose texts its picture and samples.jsonl hold."""
    any_script(case)
    escape = case.each(["\x1b]8;;http://x\x07here", "\x1b[6n", "\x1b\\\x1bP", "\x0e\x0f\x08", "\x7f\x84\x1b[?1049h"])
    for row in case.rows:
        for value in [row.get("prompt"), *row.values()]:
            for message in value if isinstance(value, list) and value and isinstance(value[0], dict) else []:
                message["content" if "content" in message else "value"] += escape
        if isinstance(row.get("prompt"), str):
            row["prompt"] = escape + row["prompt"]
    return want(case, "either", "DATA|row")


# ---- teachers --------------------------------------------------------------------------------------------------------


def teacher(case, script=None):
    """A copy of the tiny teacher, of one of the scripts that have one, which the case may damage."""
    case.become(script or STUDENTS[case.number % len(STUDENTS)])
    folder = case.folder / "teacher"
    shutil.copytree(TEACHER, folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    case.flags["--teacher"] = str(folder)
    case.names |= {"--teacher", "teacher"}
    return folder


def change(path, edit):
    settings = json.loads(path.read_text())
    edit(settings)
    path.write_text(json.dumps(settings))


@mutation("teachers")
def teacher_with_another_tokenizer(case):
    """Two ids exchanged, a token less, another token, another id: the student's tokens must be the teacher's."""
    folder = teacher(case)
    token, other = ("a", "b") if case.again < 2 else ("0", "1")

    def edit(settings):
        vocab = settings["model"]["vocab"]
        how = case.again % 5
        if how == 0:
            vocab[token], vocab[other] = vocab[other], vocab[token]
        elif how == 1:
            vocab["\u00e9"] = vocab.pop(token)
        elif how == 2:
            vocab.pop(token)
        elif how == 3:
            vocab[token] = max(vocab.values()) + 1
        else:
            settings["added_tokens"][-1]["content"] = "<|other|>"

    change(folder / "tokenizer.json", edit)
    return want(case, "bad", "--teacher")


@mutation("teachers")
def teacher_that_is_none(case):
    case.become(STUDENTS[case.number % len(STUDENTS)])
    (case.folder / "empty").mkdir()
    (case.folder / "file").write_text("{}")
    case.flags["--teacher"] = case.each(["", "no/such", str(case.folder / "empty"), str(case.folder / "file"), "a\nb",
                                         "\x1b[31m", "x" * 5000, "tiny "])  # fmt: skip
    return want(case, "bad", "--teacher")


@mutation("teachers")
def teacher_that_is_no_file(case):
    """Pipes and links that lead out, as in a model."""
    folder = teacher(case)
    name = case.each(["generation_config.json", "notes.txt", "tokenizer.json", "model.safetensors", "config.json"])
    kind = case.each(["pipe", str(case.secret), "/dev/zero", "socket", "/proc/self/environ"])
    no_file(case, folder / name, kind)
    return want(case, "bad", ["--teacher", name])


@mutation("teachers")
def damaged_teacher(case):
    folder = teacher(case)
    weights = folder / "model.safetensors"
    how = case.again % 6
    if how == 0:
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == 1:
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Poison(case.canary)))
    elif how == 2:
        change(folder / "config.json", lambda settings: settings.update(num_hidden_layers=10**9))
    elif how == 3:
        tensors = load_file(weights)
        name = sorted(tensors)[0]
        save_file(tensors | {name: torch.full_like(tensors[name], math.nan)}, weights, metadata={"format": "pt"})
    elif how == 4:
        (folder / "config.json").write_text("{")
    else:
        change(folder / "config.json", lambda settings: settings.update(model_type="bert"))
    case.names |= {"TRAIN001", "MODEL001"}
    return want(case, "bad")


@mutation("teachers")
def teacher_of_another_shape(case):
    """One that ends its turns otherwise would teach not to stop; a reward model is none; the student itself is one."""
    folder = teacher(case)
    how = case.again % 5
    if how == 0:
        change(folder / "generation_config.json", lambda settings: settings.update(eos_token_id=3))
        change(folder / "config.json", lambda settings: settings.update(eos_token_id=3))
        change(folder / "tokenizer_config.json", lambda settings: settings.update(eos_token="<|user|>"))
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text().replace("<|end|>", "<|user|>"))
        return want(case, "bad", "TEACH001", alert="TEACH001")
    if how == 1:
        case.flags["--teacher"] = str(WHOLE["reward"] / "final")
        return want(case, "bad", "--teacher")
    if how == 2:
        case.flags["--teacher"] = str(MODEL)
        return want(case, "good", kept=ROWS)
    if how == 3:
        case.flags["--teacher"] = str(WHOLE["dpo"] / "final")
        return want(case, "good", kept=ROWS)
    change(folder / "config.json", lambda settings: settings.update(rope_theta=0, rope_parameters=None))
    return want(case, "either", "--teacher|TRAIN001|MODEL")


@mutation("teachers")
def teacher_with_code(case):
    folder = teacher(case)
    (folder / "mine.py").write_text(f"open({str(case.canary)!r}, 'w')\n")
    where = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoTokenizer": ["mine.T", None]}
    name = case.each(["config.json", "tokenizer_config.json", "config.json", "generation_config.json", "config.json"])
    kind = case.each([{}, {"tokenizer_class": "T"}, {"model_type": "mine"}, {"custom_generate": "mine"},
                      {"architectures": ["M"]}])  # fmt: skip
    change(folder / name, lambda settings: settings.update({"auto_map": where, **kind}))
    return want(case, "either", "teacher")


@mutation("teachers")
def rows_for_a_teacher(case):
    """gkd needs completions, or a teacher that writes them; the others need prompts alone."""
    script = case.each(["gkd", "distillation", "iw_opd", "gkd", "distillation"])
    teacher(case, script)
    flags = case.each([[], ["--lmbda", "0.5"], [], ["--seq_kd", "--lmbda", "0"], ["--lmbda", "1"]])
    for row in case.rows:
        row.pop("completion")
    case.argv += flags
    return want(case, case.each(["bad", "bad", "good", "good", "good"]), "completion", kept=ROWS)


# ---- experimental ----------------------------------------------------------------------------------------------------
# Flags and rows of raft.py, prm.py and the scripts of distillation.


@mutation("experimental")
def shares_out_of_range(case):
    """--beta and --lmbda are from 0 to 1."""
    case.become(case.each(["distillation", "gkd"]))
    flag, value = case.each([("--lmbda", "-0.1"), ("--lmbda", "1.01"), ("--beta", "2"), ("--beta", "nan"),
                             ("--lmbda", "inf"), ("--beta", "-1e-9")])  # fmt: skip
    case.argv += [flag, value]
    return want(case, "bad", flag)


@mutation("experimental")
def what_is_drawn_from(case):
    """--top_k and --top_p of the sampler, --loss_top_k of the loss: the tiny vocabulary has 103 tokens."""
    case.become(case.each(["gkd", "distillation"]))
    flag, value, verdict = case.each([
        ("--top_p", "0", "bad"), ("--top_p", "1.5", "bad"), ("--top_k", "-1", "bad"), ("--loss_top_k", "1.5", "bad"),
        ("--loss_top_k", "104", "bad"), ("--loss_top_k", "103", "good"), ("--top_k", "1", "good"),
    ])  # fmt: skip
    case.argv += [flag, value]
    case.names |= {flag}
    return want(case, verdict, flag)


@mutation("experimental")
def extremes_of_a_student(case):
    """Within the range, and as far as it goes."""
    case.become(case.each(["iw_opd", "distillation", "gkd"]))
    flags = case.each([["--gamma", "1e300"], ["--top_p", "1e-300"], ["--lmbda", "1e-300"], ["--top_k", "1000000000"],
                       ["--temperature", "1e-30"], ["--beta", "0", "--loss_top_k", "1"], ["--gamma", "-1"]])
    case.argv += flags
    case.names |= {*flags, "TRAIN001", "--temperature", "--learning_rate"}
    return want(case, "either", "--|TRAIN001")


@mutation("experimental")
def what_raft_keeps(case):
    """As many as there are at most, or what reaches a bar; a step of which nothing is kept is skipped."""
    case.become("raft")
    flags, verdict = case.each([
        (["--num_remains", "3"], "bad"), (["--reward_bar", "nan"], "bad"), (["--num_remains", "0"], "bad"),
        (["--reward_bar", "1e300"], "either"), (["--reward_bar", "-inf"], "bad"), (["--num_remains", "2"], "good"),
        (["--reward_bar", "-1e300", "--mask_truncated_completions"], "either"),
    ])  # fmt: skip
    case.argv += flags
    case.names |= {"RAFT001", "--reward_bar", "--num_remains"}
    return want(case, verdict, flags[0] if verdict == "bad" else "RAFT001|--")


@mutation("experimental")
def labels_of_steps(case):
    """A list with true or false for each step."""
    case.become("prm")
    row = case.row()
    labels = case.each([row["labels"] + [True], row["labels"][1:], ["true"] * len(row["labels"]), None,
                        [0.5] * len(row["labels"]), "yes", [None] * len(row["labels"]), [[True]] * len(row["labels"])])
    row["labels"] = labels
    return want(case, "bad", "label")


@mutation("experimental")
def steps_of_a_row(case):
    """A list of texts, one at least."""
    case.become("prm")
    row = case.row()
    steps, verdict = case.each([([], "bad"), ("one text", "bad"), ([None, "a", "b"], "bad"), ([1, 2, 3], "bad"),
                                ({"a": 1}, "bad"), ([["a"], ["b"]], "bad"), (["", " ", "\t"], "either"),
                                (["\ud800", "a"], "bad")])  # fmt: skip
    row["completions"] = steps
    row["labels"] = [True] * (len(steps) if verdict == "either" else 2)
    return want(case, verdict, "step|completions")


@mutation("experimental")
def separators(case):
    """Text that the tokenizer knows, or one line."""
    case.become("prm")
    value, verdict = case.each([
        ("", "bad"), ("\\n\\n", "good"), ("\u6f22", "bad"), ("<|end|>", "either"), ("zz", "good"), ("\x1b[2J", "bad"),
        (" ", "good"), ("x" * 5000, "either"),
    ])  # fmt: skip
    case.argv += ["--step_separator", value]
    case.names |= {"--step_separator", "DATA005", "--max_length"}
    return want(case, verdict, "step_separator|max_length|DATA")


@mutation("experimental")
def judge_of_steps(case):
    """--reward FOLDER of a token classifier, and then not quite."""
    case.become(case.each(["raft", "grpo", "rloo"]))
    folder = case.folder / "scorer"
    shutil.copytree(WHOLE["reward"] / "final", folder)
    tensors = load_file(folder / "model.safetensors")
    score = tensors["score.weight"].float()
    tensors |= {"score.weight": torch.cat([score, -score]), "score.bias": torch.zeros(2)}
    about = {"architectures": ["LlamaForTokenClassification"], "step_separator": "\n", "num_labels": 2,
             "id2label": {"0": "wrong", "1": "right"}, "label2id": {"wrong": 0, "right": 1}}  # fmt: skip
    how, verdict, mean = case.again % 7, "bad", ""
    if how == 0:
        verdict = "good"
    elif how == 1:
        about["step_separator"] = None
    elif how == 2:
        about["step_separator"] = "\u6f22"
    elif how == 3:
        tensors.pop("score.bias")
    elif how == 4:
        about["step_separator"] = ["\n"]
    elif how == 5:
        verdict, mean = "good", ":mean"
    else:
        mean = ":sum"
    change(folder / "config.json", lambda settings: settings.update(about))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    case.argv += ["--reward", f"{folder}{mean}"]
    case.names |= {"--reward", "scorer"}
    return want(case, verdict, "--reward")


# ---- running ---------------------------------------------------------------------------------------------------------

MODULES, WHOLE = {}, {}


def source(name):
    """The path of a script, relative to the repository."""
    path = f"methods/{name}.py"
    return path if (ROOT / path).is_file() else f"methods/experimental/{name}.py"


def load(name):
    """The script as a module; its imports are paid once, here, and every run is a fork."""
    spec = importlib.util.spec_from_file_location(f"hostile_{name}", ROOT / source(name))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def prepare(folder):
    """Modules, and for every script a run of three steps that nobody touches; imports that every case needs."""
    import datasets
    import pyarrow.parquet  # noqa: F401

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in [*SCRIPTS, *LATER_SCRIPTS]:
        MODULES[name] = load(name)
    datasets.enable_progress_bars()  # as a user's process has them
    for name in SCRIPTS:
        case = Case(SCRIPTS.index(name), "whole", Path(folder) / f"whole-{name}", [])
        case.argv = list(STEPS)
        code, _, err, _ = forked(case, case.write())
        assert code == 0, err
        WHOLE[name] = case.folder / "out"


def size_now():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def child(case, argv, out, err):
    """Never returns. What the script's last line does, and what a terminal shows if it is not enough."""
    try:
        os.setsid()
        for number, path, stream in (1, out, "stdout"), (2, err, "stderr"):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            setattr(sys, stream, os.fdopen(number, "w", buffering=1))
        limits(case)
        os.chdir(case.folder)
        sys.argv = [source(case.script), *argv]
        torch.set_num_threads(1)
        module = MODULES[case.script]
        signal.signal(signal.SIGTERM, on_signal)
        module.launch(module.main, module.parse_args(argv), module.__file__)
        os._exit(0)
    except SystemExit as e:
        sys.stdout.flush()
        os._exit(e.code if isinstance(e.code, int) else 1)
    except BaseException:  # of any kind: the parent reads it
        traceback.print_exc()
    finally:
        os._exit(1)


def limits(case):
    if Path("/proc/self/statm").exists():
        most = size_now() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if hasattr(case, "file_size"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_size, case.file_size))


def watch(case, alive, pid, end):
    """Wait for a process; one with endless steps is told to stop when it has made one."""
    metrics, told = case.folder / case.out / "metrics.jsonl", False
    while alive() and time.monotonic() < end:
        time.sleep(0.01)
        if case.endless and not told and os.path.isfile(metrics) and metrics.stat().st_size:
            os.kill(pid, signal.SIGTERM)
            told = True
    if alive():
        os.killpg(pid, signal.SIGKILL)
        return True
    return False


def forked(case, argv):
    """-> exit code (None: it hangs; negative: a signal), stdout, stderr, seconds."""
    out, err = case.folder / "stdout", case.folder / "stderr"
    began, pid = time.monotonic(), os.fork()
    if not pid:
        child(case, argv, out, err)
    state = []

    def alive():
        if not state:
            found, status = os.waitpid(pid, os.WNOHANG)
            state.extend([os.waitstatus_to_exitcode(status)] if found else [])
        return not state

    hung = watch(case, alive, pid, began + LIMIT)
    if hung:
        os.waitpid(pid, 0)
    texts = [path.read_text(errors="backslashreplace") if path.exists() else "" for path in (out, err)]
    return None if hung else state[0], *texts, time.monotonic() - began


def process(case, argv):
    """The same as a user types it."""
    out, err, began = case.folder / "stdout", case.folder / "stderr", time.monotonic()
    with open(out, "w") as o, open(err, "w") as e:
        command = [sys.executable, *(case.python or []), str(ROOT / source(case.script)), *argv]
        run = subprocess.Popen(command, cwd=case.folder, stdout=o, stderr=e, start_new_session=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"} | case.environment)
        hung = watch(case, lambda: run.poll() is None, run.pid, began + LIMIT)
        run.wait()
    texts = [path.read_text(errors="backslashreplace") for path in (out, err)]
    return None if hung else run.returncode, *texts, time.monotonic() - began


def hold(case, argv):
    """Another run in the case's folder, in its steps; dead if that is the case. -> its process id."""
    pid = os.fork()
    if not pid:
        log = case.folder / "holder"
        child(case, [*argv, "--max_steps", "100000", "--save_every", "1"], log, log)
    metrics, end = case.folder / case.out / "metrics.jsonl", time.monotonic() + LIMIT
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < end:
        time.sleep(0.01)
    if case.holder == "killed":
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return pid


def held(case, argv):
    """As forked, while (or after) another run holds the folder -> also what is wrong with how it took that."""
    pid = hold(case, argv)
    if case.holder == "killed":
        steps = len((case.folder / case.out / "metrics.jsonl").read_text().splitlines()) + 3
        return forked(case, [*argv, "--max_steps", str(steps)]), []
    result = forked(case, argv)
    known, wrong = read(case.folder / case.out / "run.json"), []
    if (known.get("pid"), known.get("status")) != (pid, "running"):
        wrong.append(f"run.json of the run that holds the folder says {known.get('pid')}, {known.get('status')}")
    found, _ = os.waitpid(pid, os.WNOHANG)
    if found:
        wrong.append("the run that held the folder has ended")
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if case.holder == "alive" and str(pid) not in result[2]:
        wrong.append("the line does not say who holds the folder")
    return result, wrong


# ---- what is asked ---------------------------------------------------------------------------------------------------

ACT = re.compile(r"--\w|\b(Write|Type|Give|Use|Set|Pass|Name|Fix|Check|Raise|Lower|[Mm]ove|Keep|Let|Add|Make|must)\b")


def obeyed(text):
    """Characters that a terminal would act on."""
    return sorted({c for c in text if not c.isprintable() and c != "\n"})


def contents(folder):
    """Files of checkpoints -> digests."""
    paths = [Path(top, name) for top, _, names in os.walk(folder) for name in names]
    paths = [path for path in paths if str(path.relative_to(folder)).startswith("checkpoint-") and os.path.isfile(path)]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def inventory(path):
    """What a file, or every name of a folder, is: bytes, where a link leads, or its kind."""
    found = {}
    for one in [Path(path), *Path(path).rglob("*")]:
        name = str(one.relative_to(path))
        if one.is_symlink():
            found[name] = os.readlink(one)
        elif one.is_file():
            found[name] = one.read_bytes()
        elif os.path.lexists(one):
            found[name] = stat.S_IFMT(one.lstat().st_mode)
    return found


def taken(case):
    """-> what of the others' files is not as it was."""
    wrong = []
    for path, before in case.others.items():
        now = inventory(path)
        changed = sorted(name for name in before if now.get(name) != before[name])
        added = sorted(now.keys() - before.keys())
        if changed:
            wrong.append(f"{path.name} of others: {changed[:3]} changed")
        if case.is_closed and added:
            wrong.append(f"{path.name} of others: {added[:3]} added")
    return wrong


def judge(case, code, out, err, before):
    """-> what is wrong with how the case ended; nothing if it ended as asked."""
    wrong, folder = [], case.folder / case.out
    if code is None:
        return ["hangs"]
    if "Traceback" in out + err:
        wrong.append("traceback")
    if case.canary.exists():
        wrong.append("planted code ran")
    if strange := obeyed(err):
        wrong.append(f"control characters on stderr: {strange[:5]}")
    typed = case.argv or not case.out.isprintable()  # a run's own command is echoed as it was typed
    if not typed and (strange := obeyed(out)):
        wrong.append(f"control characters on stdout: {strange[:5]}")
    wrong += taken(case)
    left = [Path(top, name) for top, _, names in os.walk(folder) for name in names]
    for path in [path for path in left if path != case.secret and not path.is_symlink() and path.is_file()]:
        if SECRET.encode() in path.read_bytes():
            wrong.append(f"{path.name} holds what a path in the data points at")
    if SECRET in out + err:
        wrong.append("a file that a path in the data points at was read")
    if case.mutations == ["damaged_shards"] and "MODEL001" in err:
        wrong.append("weights from outside of the folder were read")
    lines = [line for line in err.split("\n") if line]
    if case.panics and "error: " in err:
        lines = lines[next(k for k, line in enumerate(lines) if line.startswith("error: ")) :]
    known = read(folder / "run.json")
    allowed = {0} if case.expected == "good" else {2, 3} if case.expected == "bad" else {0, 2, 3}
    allowed |= {4} if case.endless else set()
    if code not in allowed:
        wrong.append(f"code {code}, expected {sorted(allowed)}")
    if code == 0:
        wrong += right(case, folder, out, err, known)
    elif code in (2, 3):
        wrong += refused(case, code, folder, lines, known, before)
    return wrong + (as_wanted(case, code, out, err, folder) if case.want else [])


def visible(text):
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def as_wanted(case, code, out, err, folder):
    """-> what a case of the families that stand alone asks for and did not get."""
    wrong, asked = [], case.want
    errors = [line for line in err.split("\n") if line.startswith("error: ")]
    log = folder / "alerts.jsonl"
    said = log.read_text(errors="replace") if log.is_file() else ""  # others' log may hold anything
    alerts = set(re.findall(r'"code": "([A-Z]+\d{3})"', said))
    alerts |= set(re.findall(r"\b([A-Z]+\d{3})\b", err))
    if code in (2, 3):
        line = (errors or [""])[-1]
        wrong += [f"the line lacks {pattern}" for pattern in asked["line"] if not re.search(pattern, line)]
    if asked["alert"] and asked["alert"] not in alerts and code != 2:
        wrong.append(f"no alert {asked['alert']}, but {sorted(map(str, alerts))}")
    if asked.get("no_alert") in alerts:
        wrong.append(f"alert {asked['no_alert']}")
    if code == 0:
        wrong += values_as_wanted(case, asked, out, folder)
    return wrong


def values_as_wanted(case, asked, out, folder):
    wrong, metrics = [], folder / "metrics.jsonl"
    picture = re.search(r"^first row .*?(?=^first row|^data )", out, re.M | re.S)
    spans = re.findall(">>(.*?)<<", picture[0].replace("|>>>", "|> >>")) if picture else []
    if "scored" in asked and spans != [visible(text) for text in asked["scored"]]:
        wrong.append(f"scored {spans}, expected {[visible(text) for text in asked['scored']]}")
    if "scored_first" in asked and spans[:1] != [visible(asked["scored_first"])]:
        wrong.append(f"scored {spans}, expected {visible(asked['scored_first'])!r} first")
    for span, text in zip([*spans, "", ""], asked.get("scored_ends", [])):
        if not span.endswith(visible(text)):
            wrong.append(f"scored {span!r}, which does not end in {visible(text)!r}")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else [{}]
    first = next((row for row in rows if "num_tokens" in row), {})
    if "num_tokens" in asked and first.get("num_tokens") != asked["num_tokens"]:
        wrong.append(f"{first.get('num_tokens')} tokens scored, expected {asked['num_tokens']}")
    if "loss" in asked and not math.isclose(first.get("loss") or 0, asked["loss"], rel_tol=1e-3, abs_tol=1e-4):
        wrong.append(f"loss {first.get('loss')}, expected {asked['loss']:.5f}")
    for name, value in asked.get("metrics", {}).items():
        seen = [row[name] for row in rows if name in row]
        if not seen or not math.isclose(seen[0], value, abs_tol=1e-6):
            wrong.append(f"{name} is {seen[:1]}, expected {value}")
    wrong += [f"the plan lacks {pattern}" for pattern in asked.get("out", []) if not re.search(pattern, out)]
    if asked.get("other_completions"):
        texts = [json.loads(line)["completion"] for line in (folder / "samples.jsonl").read_text().splitlines()]
        pairs = list(zip(texts[::2], texts[1::2]))
        if len(set(pairs)) < 0.7 * len(pairs):
            wrong.append(f"{len(set(pairs))} kinds of completions from {len(pairs)} groups")
    return wrong


def read(path):
    """-> the object that a file of JSON holds, {} where there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        value = {}
    return value if isinstance(value, dict) else {}


def refused(case, code, folder, lines, known, before):
    wrong = []
    errors = [line for line in lines if line.startswith("error: ")]
    others = [line for line in lines if not re.match(r"error: |\[[A-Z]+\d{3} |skipped |reward ", line)]
    if len(errors) != 1 or lines[-1:] != errors:
        return [f"{len(errors)} error lines, last line {lines[-1:]}"]
    if others:
        wrong.append(f"{len(others)} other lines: {others[0][:200]}")
    (line,) = errors
    if not line.isprintable() or len(line) > 1200:
        wrong.append(f"error line of {len(line)} characters")
    if code == 2 and not any(name and name in line for name in case.names):
        wrong.append("the line names no input")
    if not ACT.search(line):
        wrong.append("the line says nothing to type")
    if code == 3 and not re.search(r"[A-Z]{4,}\d{3}", line):
        wrong.append("no code")
    if case.holder or (case.is_closed and folder in case.others):
        return wrong  # run.json and checkpoints are another run's
    if os.path.exists(folder / "final") and case.family != "folders":
        wrong.append("final/ stands")
    if contents(folder) != before and not case.resumed:
        wrong.append("a checkpoint stands")
    if case.resumed and not before.items() <= contents(folder).items():
        wrong.append("an earlier checkpoint was harmed")
    if known.get("exit_code", code) != code and known.get("status") != "finished":
        wrong.append(f"run.json says {known.get('exit_code')}")
    if known.get("status") == "running":
        wrong.append("run.json says that it runs")
    return wrong


def right(case, folder, out, err, known):
    wrong = []
    if case.endless:
        return wrong
    if case.only_plan:
        trained = (folder / "final").exists() or re.search(r"^step 1 ", out, re.M)
        return ["it trained"] if trained or known.get("status") in ("failed", "running") else []
    if (known.get("status"), known.get("exit_code")) != ("finished", 0):
        wrong.append(f"run.json says {known.get('status')}, {known.get('exit_code')}")
    hidden = {path.name for path in folder.glob(".*")}
    others = {".tmp-x", ".old-x"} if "strange_neighbours" in case.mutations else set()
    for path, found in case.others.items():
        if path.is_relative_to(folder):
            names = [(path / name).relative_to(folder).parts[:1] for name in found]
            others |= {first for name in names for first in name if first.startswith(".")}
    if leftovers := hidden - others - {".tmp-link"}:
        wrong.append(f"leftovers: {leftovers}")
    if others - hidden:
        wrong.append(f"files of others are gone: {others - hidden}")
    said = re.search(r"^data +(\d+) of (\d+) rows kept", out, re.M)
    if not said:
        return [*wrong, "no plan"]
    if case.kept is not None and int(said[1]) != case.kept:
        wrong.append(f"{said[1]} of {said[2]} rows kept, expected {case.kept}")
    try:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if "loss" in row]
        broken = [] if steps == list(range(1, len(steps) + 1)) and steps else [f"steps {steps}"]
    except (ValueError, TypeError):
        rows, steps, broken = [], [], ["metrics.jsonl is broken"]
    if {"strange_run_files", "forged_meta"} & set(case.mutations):  # the log, or where it is cut, was junk before
        steps, broken = [1, 2, 3], []
    wrong += broken
    nulls = {name for row in rows for name, value in row.items() if value is None}
    if case.script == "kto":  # a step may lack rows of one label
        nulls = {name for name in nulls if not re.search("chosen|rejected|reward_margin", name)}
    if nulls and not re.search("TRAIN001|GRPO003", err):
        wrong.append("a metric is not finite, and nothing says so")
    wrong += published(folder / "final")
    try:
        weights = load_file(folder / "final" / "model.safetensors")
        kind = {"reward": "SequenceClassification", "prm": "TokenClassification"}.get(case.script, "CausalLM")
        lm, info = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
            folder / "final", use_safetensors=True, trust_remote_code=False, output_loading_info=True)
        transformers.AutoTokenizer.from_pretrained(folder / "final", trust_remote_code=False)
        if info["missing_keys"] or info["unexpected_keys"]:
            wrong.append("final/ lacks tensors")
        if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            wrong.append("final/ is not finite")
    except Exception as error:  # of any kind: it does not load
        return [*wrong, f"final/ does not load: {error}"]
    if case.resumed:
        want = load_file(WHOLE[case.script] / "final" / "model.safetensors")
        if steps != [1, 2, 3] or want.keys() != weights.keys() or not all(torch.equal(want[k],
        weights[k]) for k in want):
            wrong.append("the resumed run ended elsewhere")
    for saved in folder.glob("checkpoint-*"):
        meta = read(saved / "trainer" / "meta.json")
        sums = meta.get("crc32") if isinstance(meta.get("crc32"), dict) else {}
        bad = [name for name, value in sums.items() if not (saved / name).is_file()
               or zlib.crc32((saved / name).read_bytes()) != value]
        if bad and not case.resumed:
            wrong.append(f"{saved.name}: {bad[0]} is not as it was written")
    return wrong


PUBLISHED = re.compile(r"README\.md|(config|generation_config|tokenizer|tokenizer_config)\.json|"
                       r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|"
                       r"(additional_chat_templates/[\w-]+|chat_template)\.jinja")  # fmt: skip


def published(final):
    """-> what is wrong with the names in final/, and with what they lead to."""
    wrong, modes = [], set()
    for path in final.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            continue
        name = str(path.relative_to(final))
        if path.is_symlink() or not path.is_file():
            wrong.append(f"final/{name} is no file")
        elif not PUBLISHED.fullmatch(name):
            wrong.append(f"final/ holds {name}")
        elif path.suffix == ".json" and "auto_map" in path.read_text(errors="replace"):
            wrong.append(f"final/{name} says where code is")
        modes.add(stat.S_IMODE(path.lstat().st_mode))
    return wrong + ([f"final/ has files of modes {sorted(map(oct, modes))}"] if len(modes) > 1 else [])


def attempt(number, seed, root, only=None, via=None, scripts=SCRIPTS):
    """Make and run a case -> its row."""
    case = Case(number, seed, Path(root) / f"case-{number}", only, scripts)
    argv = case.write()
    real = number % 20 == 7 and not hasattr(case, "file_size") if via is None else via == "process"
    real = real and all("\x00" not in word for word in argv)
    real = real or case.python is not None
    if case.first:
        forked(case, [*argv, *case.first])
        for name in "stdout", "stderr":
            (case.folder / name).unlink(missing_ok=True)
    before = contents(case.folder / case.out)
    if case.holder:
        (code, out, err, seconds), wrong = held(case, argv)
        wrong += judge(case, code, out, err, before)
    else:
        code, out, err, seconds = (process if real else forked)(case, argv)
        wrong = judge(case, code, out, err, before)
    error = next((line for line in err.split("\n") if line.startswith("error: ")), err[-300:] if code else "")
    error = error.replace(str(case.folder), ".").replace(str(ROOT), "ROOT").replace(str(root), "ALL")
    return {"case": number, "family": case.family, "script": case.script, "via": "process" if real else "fork",
            "mutations": case.mutations, "expected": case.expected, "code": code, "error": error[:1200],
            "seconds": round(seconds, 2), "ok": not wrong, "why": wrong}, case


def about(args):
    """The first row: what was run. Nothing in it changes while a campaign is interrupted."""
    shared = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "common").rglob("*.py"))]
    files = [*map(source, [*args.scripts, *LATER_SCRIPTS]), *shared, "benchmarks/hostile.py"]
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, transformers)}
    words = f" --scripts {' '.join(args.scripts)}" if args.scripts != SCRIPTS else ""
    return {"command": f"python benchmarks/hostile.py --cases {args.cases} --seed {args.seed}{words}", "git": git,
            "sha256": {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in files},
            "versions": versions, "device": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread"}


def quiet_world(folder):
    """Caches of its own, for what is imported from now on and for processes."""
    os.environ.update(HF_HOME=f"{folder}/hf", PYTHONDONTWRITEBYTECODE="1")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--only", nargs="+", choices=sorted(FAMILIES), help="these families, without writing FILE")
    parser.add_argument("--case", type=int, help="one case, with what it printed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "hostile.jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hostile") as folder:
        quiet_world(folder)
        prepare(folder)
        if args.case is not None:
            row, case = attempt(args.case, args.seed, folder, args.only, scripts=args.scripts)
            print(json.dumps(row, indent=1), case.write(), (case.folder / "stdout").read_text(errors="replace"),
                  (case.folder / "stderr").read_text(errors="replace"), sep="\n")
            return
        rows, head = [], about(args)
        if not args.only and args.out.is_file():
            first, *rows = (json.loads(line) for line in args.out.read_text().splitlines())
            if {**first, "git": ""} != {**head, "git": ""}:
                sys.exit(f"error: {args.out} holds another campaign (other scripts or seed): remove it, or give --out.")
        elif not args.only:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(head) + "\n")
        for number in range(len(rows), args.cases):
            row, case = attempt(number, args.seed, folder, args.only, scripts=args.scripts)
            rows.append(row)
            if not args.only:
                with open(args.out, "a") as f:
                    f.write(json.dumps(row) + "\n")
            if not row["ok"]:
                about_it = {key: row[key] for key in ("family", "script", "mutations", "via", "code", "why")}
                print(f"case {number}: {about_it}\n    {row['error'][:300]!r}", flush=True)
            shutil.rmtree(case.folder, ignore_errors=True)
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = [row for row in rows if row["family"] == family]
        print(f"{family:12} {sum(row['ok'] for row in mine)} of {len(mine)} as asked; "
              f"codes {dict(Counter(row['code'] for row in mine))}; {sum(row['seconds'] for row in mine):.0f} s")
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} as asked")
    sys.exit(0 if all(row["ok"] for row in rows) else 1)


if __name__ == "__main__":
    main()
