"""What users' files hold becomes the rows that they mean, or one line that says which row, what is in it, what to type.

Expected values are written out, or made with pyarrow, pandas' own files and plain Python: nothing here calls what it
tests to know what is right.
"""

import gzip
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, STABLE, once, script
from test_bad_input import attempt, refused
from test_tokenization import CHATML, EOS, IM_END, make

from common import data
from common import tokenization as tok
from common.runtime.flags import InputError

ASKS, WRITES = {"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}


def load(path, dataset_split="", rename="", as_chat=False):
    return data.load_rows(str(path), SimpleNamespace(dataset_split=dataset_split, rename=rename, as_chat=as_chat))


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fails(match, path, *formats, **flags):
    """Reading the rows, or the columns of one of them, ends in one printable line."""
    with pytest.raises(InputError, match=match) as caught:
        for row in load(path, **flags):
            data.columns_of(row, *(formats or (["prompt", "completion"],)))
    text = str(caught.value)
    assert path.name in text and text.isprintable() and len(text) < 900
    return text


# ---- encodings and files ---------------------------------------------------------------------------------------------

ROWS = [{"prompt": "a", "completion": "\u00e9"}, {"prompt": "c", "completion": "d"}]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_byte_order_mark_and_gzip(tmp_path, suffix, packed):
    text = json.dumps(ROWS) if suffix == ".json" else "\n".join(map(json.dumps, ROWS))
    content = text.encode("utf-8-sig")
    path = tmp_path / f"x{suffix}{'.gz' * packed}"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert load(path) == ROWS
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / path.name)
    assert load(folder) == ROWS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_another_encoding_is_named(tmp_path, encoding, suffix):
    text = "prompt,completion\na,b\n" if suffix == ".csv" else json.dumps(ROWS[0])
    path = tmp_path / f"x{suffix}"
    path.write_bytes(text.encode(encoding))
    assert encoding.upper() in fails("UTF-8", path)


def test_a_broken_gzip_is_one_line(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}')[:-9])
    fails("cannot read the data", tmp_path / "x.jsonl.gz")
    (tmp_path / "y.jsonl.gz").write_bytes(b'{"prompt": "a"}')
    fails("cannot read the data.*gzip", tmp_path / "y.jsonl.gz")


def test_a_key_that_is_there_twice(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b", "prompt": "c"}'
    )
    assert "x.jsonl:2" in fails("twice.*prompt", tmp_path / "x.jsonl")
    (tmp_path / "x.json").write_text('[{"messages": [{"role": "user", "content": "a", "content": "b"}]}]')
    fails("twice.*content", tmp_path / "x.json", ["messages"])


@pytest.mark.parametrize(
    "text, match",
    [
        ("prompt,completion\na,x\nb,NA\n", r"x.csv:2.*null in completion.*|null in completion.*x.csv:2"),
        ("prompt,completion\na,x\nb\n", "null in completion.*x.csv:2"),
        ("prompt,completion\na,1\nb,2\n", "completion holds int.*x.csv:1.*CSV.*number.*JSON lines"),
        ("prompt,completion\na,NA\nb,2\n", "null in completion.*x.csv:1.*NA.*JSON lines"),
        ("prompt,completion\na,1.50\nb,2\n", "completion holds float.*x.csv:1.*JSON lines"),
        ("prompt,completion\na,true\nb,False\n", "completion holds bool.*x.csv:1.*JSON lines"),
        ("prompt,completion\na,b,c\nd,e,f\n", "more fields than its header"),
        ("prompt,prompt\na,b\n", r"prompt\.1"),
        ("", "cannot read the data"),
        ("prompt,completion\n", "x.csv"),
    ],
)
def test_csv_says_what_it_read(tmp_path, text, match):
    (tmp_path / "x.csv").write_text(text)
    fails(match, tmp_path / "x.csv")


def test_csv_keeps_a_date_as_text(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,completion\na,2020-01-02\n")
    assert load(tmp_path / "x.csv") == [{"prompt": "a", "completion": "2020-01-02"}]


def test_parquet_that_holds_bytes_or_nulls(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a"], "completion": [b"b"]}), tmp_path / "x.parquet")
    fails("completion holds bytes.*x.parquet:1", tmp_path / "x.parquet")
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", None]}), tmp_path / "y.parquet")
    fails("null in completion.*y.parquet:2", tmp_path / "y.parquet")


def test_nulls_go_only_where_arrow_made_them(tmp_path):
    import datasets

    ours = {"prompt": "a", "completion": "b", "tools": [{"default": None, "enum": ["x", None]}], "n": None}
    path = lines(tmp_path / "x.jsonl", ours)
    assert load(path) == [ours]
    (tmp_path / "x.json").write_text(json.dumps([ours]))
    assert load(tmp_path / "x.json") == [ours]
    rows = [{"messages": [ASKS, {**WRITES, "name": "x"}]}, {"messages": [ASKS, WRITES]}]  # Arrow gives all a name
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    assert load(tmp_path / "x.parquet") == rows


def test_rows_with_different_columns(tmp_path):
    path = lines(tmp_path / "x.jsonl", {"messages": [ASKS, WRITES], "prompt": None}, {"prompt": "a", "completion": "b"})
    found = [data.columns_of(row, ["messages"], ["prompt", "completion"]) for row in load(path)]
    assert found == [[[ASKS, WRITES]], ["a", "b"]]


# ---- slices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, kept", [
    ("", range(10)), ("[:95%]", range(10)), ("[95%:]", []), ("[:3]", range(3)), ("[-2:]", [8, 9]),
    ("[20%:-10%]", range(2, 9)),
    ("[:100]", range(10)), ("[2:50%]", range(2, 5)), ("[:66.6%]", range(7)), ("[66.6%:]", [7, 8, 9]),
    ("[5:][:2]", [5, 6]),
    (":train[:2]", [0, 1]), (":train[:50%][:50%]", [0, 1]), ("[:]", range(10)),
])  # fmt: skip
def test_slices(tmp_path, text, kept):
    import datasets

    rows = [{"n": n} for n in range(10)]
    path = lines(tmp_path / "x.jsonl", *rows)
    folder = tmp_path / "many"
    folder.mkdir()
    lines(folder / "a.jsonl", *rows[:4])
    lines(folder / "b.jsonl", *rows[4:])
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    for name in path, folder, tmp_path / "saved", tmp_path / "x.parquet":
        if not list(kept):
            with pytest.raises(InputError, match=r"no rows in split.*95%"):
                load(f"{name}{text}")
            continue
        found = load(f"{name}{text}")
        assert [row["n"] for row in found] == list(kept), name
        assert [row.index for row in found] == list(range(len(found)))
        if name in (path, tmp_path / "x.parquet"):
            assert [row.where for row in found] == [f"{name}:{n + 1}" for n in kept]
    if text.startswith(":train["):
        assert [row["n"] for row in load(path, dataset_split=text[1:])] == list(kept)


def test_slices_are_those_of_datasets(tmp_path):
    import datasets

    path = lines(tmp_path / "x.jsonl", *({"n": n} for n in range(37)))
    for text in "[:95%]", "[95%:]", "[:3%]", "[-5%:]", "[10%:33%]", "[3:-3]", "[:10]":
        theirs = datasets.load_dataset("json", data_files=str(path), split=f"train{text}", cache_dir=tmp_path / "cache")
        assert [row["n"] for row in load(f"{path}:train{text}")] == theirs["n"], text


def test_a_file_whose_name_looks_like_a_slice(tmp_path):
    folder = tmp_path / "rows[:2]"
    folder.mkdir()
    lines(folder / "x.jsonl", {"n": 1}, {"n": 2}, {"n": 3})
    assert len(load(folder)) == 3 and len(load(f"{folder}[:2]")) == 2


@pytest.mark.parametrize("fraction", ["0.05", "0.25", "0.333"])
def test_eval_fraction_is_two_slices(tmp_path, fraction):
    path = lines(tmp_path / "x.jsonl", *({"n": n} for n in range(40)))
    flags = ["--model", "m", "--dataset", str(path), "--eval_fraction", fraction]
    args = script("sft").parse_args(flags)
    train, heldout = load(args.dataset), load(args.eval_dataset)
    assert train + heldout == load(path) and len(heldout) == round(40 * float(fraction))
    assert args.eval_fraction == 0  # the printed command has the slices, which mean the same


@pytest.mark.parametrize("flags", (["--eval_fraction", "1"], ["--eval_fraction", "0.1", "--eval_dataset", "x.jsonl"]))
def test_eval_fraction_that_has_no_meaning(flags, capsys):
    with pytest.raises(SystemExit) as left:
        script("sft").parse_args(["--model", "m", *flags])
    assert left.value.code == 2 and "--eval_fraction" in capsys.readouterr().err


# ---- columns ---------------------------------------------------------------------------------------------------------

ALPACA = {"instruction": "Add.", "input": "3+4", "output": "7"}


@pytest.mark.parametrize("row, rename, expected", [
    (ALPACA, r"{instruction}\n{input}:prompt,output:completion", {"prompt": "Add.\n3+4", "completion": "7"}),
    (ALPACA | {"input": ""}, r"{instruction}\n{input}:prompt,output:completion", {"prompt": "Add.", "completion": "7"}),
    (ALPACA | {"input": None}, "{instruction}\n{input}:prompt,output:completion",
     {"prompt": "Add.", "completion": "7"}),
    ({"instruction": "Q", "context": "", "response": "A"}, r"{context}\n{instruction}:prompt,response:completion",
     {"prompt": "Q", "completion": "A"}),
    (ALPACA, r"### Do this, please:\n{instruction}\n{input}\n\n### Answer:\n:prompt,output:completion",
     {"prompt": "### Do this, please:\nAdd.\n3+4\n\n### Answer:\n", "completion": "7"}),
    ({"reward_model": {"ground_truth": "7", "style": "rule"}, "prompt": "a"}, "reward_model.ground_truth:answer",
     {"answer": "7", "prompt": "a"}),
    ({"answers": {"text": ["7", "8"]}, "q": "a"}, "answers.text.0:completion,q:prompt",
     {"completion": "7", "prompt": "a"}),
    ({"a.b": "x", "a": {"b": "y"}}, "a.b:prompt", {"prompt": "x"}),
    ({"a": 3, "b": 4.5}, "{a} + {b} = \\boxed{}:prompt", {"prompt": "3 + 4.5 = \\boxed{}"}),
    ({"a": "{b}", "b": "x"}, "{a}{b}:prompt", {"prompt": "{b}x"}),
    ({"prompt": "x", "completion": "y"}, "prompt:completion,completion:prompt", {"prompt": "y", "completion": "x"}),
    ({"prompt": "x"}, "Say {prompt}:prompt", {"prompt": "Say x"}),
])  # fmt: skip
def test_rename(tmp_path, row, rename, expected):
    (found,) = load(lines(tmp_path / "x.jsonl", row), rename=rename)
    assert {name: found[name] for name in expected} == expected
    assert not found.unread - (set(row) | set(expected))


@pytest.mark.parametrize(
    "rename",
    [
        "{instruction}{inptu}:prompt",
        "instruction.x:prompt",
        "a:b,c",
        "{instruction}:",
        "ratio 3:2, {input}:prompt",
        "hello:prompt",
        "{}:prompt",
        "instruction:prompt;output:completion",
    ],
)
def test_rename_that_does_not_fit(tmp_path, rename):
    fails("--rename.*does not fit columns.*instruction", lines(tmp_path / "x.jsonl", ALPACA), rename=rename)


def test_rename_fills_in_no_lists(tmp_path):
    path = lines(tmp_path / "x.jsonl", {"choices": ["a", "b"], "output": "7"})
    assert "x.jsonl:1" in fails("choices", path, rename="Which? {choices}:prompt,output:completion")


def test_as_chat(tmp_path):
    rows = {"prompt": "3+4?", "completion": "7"}, {"prompt": [ASKS], "completion": "7", "text": "t"}
    found = load(lines(tmp_path / "x.jsonl", *rows), as_chat=True)
    assert [(row["prompt"], row["completion"]) for row in found] == [([ASKS], [WRITES])] * 2 and found[1]["text"] == "t"
    found = load(lines(tmp_path / "x.jsonl", {"prompt": "3+4?", "chosen": "7", "rejected": "8"}), as_chat=True)
    assert found == [{"prompt": [ASKS], "chosen": [WRITES], "rejected": [{"role": "assistant", "content": "8"}]}]
    (group,) = tok.encode_demonstration({"prompt": [ASKS], "completion": [WRITES]}, make(CHATML), [EOS, IM_END])
    (wrapped,) = tok.encode_demonstration(load(lines(tmp_path / "x.jsonl", rows[0]), as_chat=True)[0], make(CHATML),
                                          [EOS, IM_END])  # fmt: skip
    assert wrapped == group


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("row, formats, expected", [
    ({"conversations": [{"from": "human", "value": "3+4?"}, {"from": "gpt", "value": "7"}]}, ["conversations"], None),
    ({"prompt": [ASKS], "completion": [WRITES]}, ["prompt", "completion"], [[SYSTEM, ASKS], [WRITES]]),
    ({"prompt": [ASKS], "completion": [ASKS, WRITES]}, ["prompt", "completion"],
     [[SYSTEM, ASKS], [SYSTEM, ASKS, WRITES]]),
    ({"chosen": [ASKS, WRITES], "rejected": [ASKS, WRITES]}, ["chosen", "rejected"], [[SYSTEM, ASKS, WRITES]] * 2),
    ({"prompt": "a", "completion": "b"}, ["prompt", "completion"], ["a", "b"]),
])  # fmt: skip
def test_a_column_system_is_the_first_turn(row, formats, expected):
    found = data.columns_of({**row, "system": "Be brief."}, formats)
    roles = [[{key: turn[key] for key in ("role", "content")} for turn in turns] if isinstance(turns, list) else turns
             for turns in found]  # fmt: skip
    assert roles == (expected or [[SYSTEM, ASKS, WRITES]])
    assert data.columns_of({**row, "system": ""}, formats) == data.columns_of(row, formats)


def test_two_systems_are_refused(tmp_path):
    row = {"messages": [SYSTEM, ASKS, WRITES], "system": "Be long."}
    fails("system", lines(tmp_path / "x.jsonl", row), ["messages"])


@pytest.mark.parametrize(
    "name, value",
    [
        ("history", [["q", "a"]]),
        ("images", ["x.png"]),
        ("image", {"bytes": "x"}),
        ("videos", ["x"]),
        ("audio", "x"),
    ],
)
def test_columns_that_a_model_would_miss(tmp_path, name, value):
    good = {"prompt": "a", "completion": "b"}
    assert "x.jsonl:2" in fails(
        f"not column {name}.*--rename {name}:other", lines(tmp_path / "x.jsonl", good, good | {name: value})
    )
    rows = load(lines(tmp_path / "x.jsonl", good | {name: value}), rename=f"{name}:other")
    assert data.columns_of(rows[0], ["prompt", "completion"]) == ["a", "b"]
    for empty in None, [], "":
        assert data.columns_of(good | {name: empty}, ["prompt", "completion"]) == ["a", "b"]


# ---- tools -----------------------------------------------------------------------------------------------------------

CALL = {"name": "weather", "arguments": {"city": "Bern", "unit": None}}
TEXT = json.dumps(CALL["arguments"])


@pytest.mark.parametrize("message, expected", [
    ({"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {
        "name": "weather", "arguments": TEXT}}]}, [{"id": "1", "type": "function", "function": CALL}]),
    ({"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
     [{"type": "function", "function": CALL}]),
    ({"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": TEXT}]}, [CALL]),
    ({"role": "assistant", "tool_calls": json.dumps([CALL])}, [CALL]),
    ({"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": TEXT},
      "tool_calls": None},
     [{"type": "function", "function": CALL}]),
    ({"from": "function_call", "value": json.dumps(CALL)}, [{"type": "function", "function": CALL}]),
    ({"from": "function_call", "value": json.dumps([CALL, {"name": "f", "arguments": ""}])},
     [{"type": "function", "function": CALL}, {"type": "function", "function": {"name": "f", "arguments": {}}}]),
])  # fmt: skip
def test_calls_of_tools(message, expected):
    found = data.convert_message({}, "messages", message)
    assert (found["role"], found["content"], found["tool_calls"]) == ("assistant", "", expected)
    assert "function_call" not in found


@pytest.mark.parametrize("calls", ["{", [7], [{"function": 7}], [{"function": {"name": "f", "arguments": "[1]"}}],
                                   [{"name": "f", "arguments": "{'a': 1}"}], [{"arguments": "{}"}]])  # fmt: skip
def test_calls_that_are_none(tmp_path, calls):
    row = {"messages": [ASKS, {"role": "assistant", "content": "", "tool_calls": calls}]}
    assert "x.jsonl:1" in fails("tool call.*arguments", lines(tmp_path / "x.jsonl", row), ["messages"])


@pytest.mark.parametrize(
    "message, is_empty",
    [
        ({"role": "tool", "content": None}, True),
        ({"role": "assistant", "content": None, "reasoning_content": "so"}, True),
        ({"role": "assistant", "content": None, "tool_calls": []}, False),
        ({"role": "assistant", "content": None}, False),
        ({"role": "user", "content": None}, False),
    ],
)
def test_content_that_is_null(message, is_empty):
    if is_empty:
        assert data.convert_message({}, "messages", message)["content"] == ""
        return
    with pytest.raises(InputError, match="not text.*None"):
        data.convert_message({}, "messages", message)


def test_what_is_not_converted_stays_on_the_message():
    message = {
        "role": "assistant",
        "content": "a",
        "weight": 0,
        "train": False,
        "reasoning_content": "b",
        "function_call": None,
    }
    del message["function_call"]
    assert data.convert_message({}, "messages", message | {"function_call": None, "tool_calls": None}) == message


# ---- chat templates that ship ----------------------------------------------------------------------------------------


def saved(folder, **options):
    make(None, **options).save_pretrained(folder)
    return str(folder)


def test_chatml_by_name(tmp_path):
    tokenizer = tok.load_tokenizer(saved(tmp_path), "chatml")
    stops = tok.stop_ids(tokenizer)
    assert stops == sorted([EOS, IM_END])
    (group,) = tok.encode_demonstration({"messages": [SYSTEM, ASKS, WRITES]}, tokenizer, stops)
    (expected,) = tok.encode_demonstration({"messages": [SYSTEM, ASKS, WRITES]}, make(CHATML), stops)
    assert group == expected


def test_chatml_without_its_tokens_is_refused(tmp_path):
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({c: n for n, c in enumerate("<|im_start>ed/uar:s{}\n 7")}, [], unk_token="7"))
    core.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"chatml.*<\|im_end\|>.*--chat_template plain"):
        tok.load_tokenizer(str(tmp_path), "chatml")
    assert tok.load_tokenizer(str(tmp_path), "plain").chat_template


@pytest.mark.parametrize("bos", [False, True])
def test_plain_ends_turns_with_the_models_own_token(tmp_path, bos):
    tokenizer = tok.load_tokenizer(saved(tmp_path, bos=bos), "plain")
    stops = tok.stop_ids(tokenizer)
    assert stops == [EOS]
    (group,) = tok.encode_demonstration({"messages": [SYSTEM, ASKS, WRITES, ASKS, WRITES]}, tokenizer, stops)
    (completion,) = group["completions"]
    ids = [*group["prompt"], *completion["ids"]]
    first, second = "System: Be brief.\n\nUser: 3+4?\n\nAssistant:", "\n\nUser: 3+4?\n\nAssistant:"
    assert tokenizer.decode(ids) == f"{'<s>' * bos}{first} 7</s>{second} 7</s>"
    scored = [token for token, flag in zip(completion["ids"], completion["scored"]) if flag]
    assert tokenizer.decode(scored) == " 7</s> 7</s>"


def test_a_template_that_does_not_exist(tmp_path):
    with pytest.raises(InputError, match="nosuch.*--chat_template FILE, chatml or plain"):
        tok.load_tokenizer(saved(tmp_path), "nosuch")


# ---- through the command line ----------------------------------------------------------------------------------------


def test_columns_that_nothing_reads_are_in_the_plan(tmp_path):
    row = {"prompt": "3+4=", "completion": "7", "label": True, "topic": "sums", "q": {"a": "b"}}
    path = lines(tmp_path / "mine.jsonl", *[row, row | {"label": False}] * 4)
    result = attempt("sft", tmp_path / "sft", "--dataset", path, "--rename", "q.a:id")
    assert result.code == 0, result.err
    assert "unread    columns id, label, topic\n" in result.out
    result = attempt("kto", tmp_path / "kto", "--dataset", path)
    assert result.code == 0 and "unread    columns q, topic\n" in result.out, result.err


@pytest.mark.parametrize("name", once("grpo", "rloo"))
def test_accuracy_without_an_answer_stops_before_the_weights(name, tmp_path):
    path = lines(tmp_path / "mine.jsonl", *[{"prompt": [{"role": "user", "content": "3+4="}], "ground_truth": "7"}] * 8)
    refused(attempt(name, tmp_path, "--dataset", path), tmp_path, "accuracy", "ground_truth", "--rename")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    result = attempt(name, tmp_path / "renamed", "--dataset", path, "--rename", "ground_truth:answer", "--max_steps", 1)
    assert result.code == 0 and "unread" not in result.out, result.err


@pytest.mark.parametrize("name", ("tiny:", "tiny:[:9]"))
def test_a_colon_without_a_split_is_no_default(name, tmp_path):
    refused(attempt("sft", tmp_path, "--dataset", name), tmp_path, "no split", "--dataset")


def test_flags_of_the_command_line(tmp_path):
    """--eval_fraction, --as_chat, a template string and a template by name, in one run; its command says the same."""
    path = lines(tmp_path / "mine.jsonl", *[ALPACA] * 20)
    flags = [
        "--dataset",
        path,
        "--eval_fraction",
        0.1,
        "--as_chat",
        "--rename",
        r"{instruction}\n{input}:prompt,output:completion",
    ]
    result = attempt("sft", tmp_path, *flags)
    assert result.code == 0, result.err
    assert "18 of 18 rows kept" in result.out and "2 rows held out" in result.out
    known = json.loads((tmp_path / "out" / "run.json").read_text())["flags"]
    assert known["dataset"] == f"{path}[:90%]" and known["eval_dataset"] == f"{path}[90%:]"
    result = attempt("sft", tmp_path, *flags, "--resume", "auto", "--max_steps", 3, "--allow_changes")
    assert result.code == 0, result.err


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("env", [pytest.param({"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.slow), ASCII],
                         ids=["ioencoding", "locale"])  # fmt: skip
def test_a_terminal_without_letters_does_not_end_a_run(env, tmp_path):
    """Of the first row, the plan, the alerts and --help."""
    rows = [{"prompt": "3+4=", "completion": "7", "\u00e9t\u00e9": "1"}] * 8
    path = lines(tmp_path / "mine.jsonl", *rows)
    command = [sys.executable, str(ROOT / "methods" / "sft.py")]
    flags = ["--dataset", str(path), "--eval_dataset", "", "--max_steps", "1", "--batch_size", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    run = subprocess.run([*command, *flags, "--output_dir", str(tmp_path / "out")], env=env, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    assert rb"unread    columns \xe9t\xe9" in run.stdout
    run = subprocess.run([*command, "--help"], env=env, capture_output=True)
    assert run.returncode == 0 and b"--eval-fraction" in run.stdout, run.stderr.decode()


@pytest.mark.parametrize("name", STABLE)
def test_new_flags_are_in_every_script(name):
    args = script(name).parse_args(["--as_chat", "--chat_template", "chatml"])
    assert args.as_chat and args.chat_template == "chatml"
