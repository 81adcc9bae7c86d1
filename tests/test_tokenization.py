"""common/tokenization.py and common/batches.py against oracles that share no code with them: a character tokenizer
whose ids are spelled out by hand, expected texts with the scored parts in [[...]], naive double loops for batches, and
properties."""

import json
import re
import sys
import time
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import batches as batching
from common import data as rows_of
from common import templates
from common import tokenization as tok
from common.batches import attach_logprobs, count_scored, fit, flat_batch, micro_batches, order, pack
from common.batches import scored_flags, seq_sums, sequence_sum, share
from common.runtime.flags import InputError

SPECIAL = "<pad> <s> </s> <|im_start|> <|im_end|> <|start|> <|end|> <|eot|> <think> </think>".split()
CHARS = [chr(c) for c in range(32, 127)] + ["\n", "\x1b", "\u202e"]
VOCAB = {piece: i for i, piece in enumerate([*SPECIAL, *CHARS, "\n\n"])}
EOT, IM_END, END, EOS, BOS = (VOCAB[t] for t in ("<|eot|>", "<|im_end|>", "<|end|>", "</s>", "<s>"))

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>"
          "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}")
# the last assistant turn gets a think block (an empty one if it has none); earlier ones lose theirs
QWEN3 = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content.split('</think>')[-1].lstrip('\n') %}"
         "{% if m.role == 'assistant' and loop.last %}{% set r = m.content.split('</think>')[0].split('<think>')[-1] %}"
         "<think>{{ r if '</think>' in m.content else '\n\n' }}</think>\n{% endif %}{{ c }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# the generation prompt opens an empty think block that a finished turn does not show
FORCED = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}")
TOOLS = ("{% if tools %}T:{{ tools[0].name }};{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
         "{% if m.content is defined %}{{ m.content }}{% endif %}"
         "{% for c in m.tool_calls or [] %}CALL {{ c.name }}{% endfor %}<|im_end|>\n{% endfor %}"
         "{% if style is defined %}{{ style }}{% endif %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PHI = ("{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
       "{% if add_generation_prompt %}<|start|>assistant\n{% else %}{{ eos_token }}{% endif %}")
LLAMA2 = ("{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %} {{ m.content }} </s>{% endif %}"
          "{% endfor %}")


def make(template=None, bos=False, merge=False, metaspace=False, closes=False, **tokens):
    """A tokenizer of one token per character and special token; merge: two line breaks are one token."""
    vocab = {piece: i for piece, i in VOCAB.items() if piece != "\n\n" or merge}
    if metaspace:
        vocab = {piece.replace(" ", "\u2581"): i for piece, i in vocab.items()}
    core = Tokenizer(models.BPE(vocab, [("\n", "\n")] if merge else [], unk_token="<pad>"))
    core.decoder = decoders.Fuse()  # no spaces between the pieces
    if metaspace:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    if bos or closes:
        single = ["<s>"] * bos + ["$A"] + ["</s>"] * closes
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    defaults = {"eos_token": "</s>", "pad_token": "</s>", "bos_token": "<s>"} | tokens
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{k: v for k, v in defaults.items() if v})
    tokenizer.chat_template = template
    return tokenizer


def spell(text):
    """The ids of a text, by hand: special tokens whole, all else by character."""
    return [VOCAB[piece] for piece in re.findall("|".join(map(re.escape, SPECIAL)) + "|(?s:.)", text)]


def span(text):
    """'ab[[c]]d' -> ids of abcd and the flags of the scored ones."""
    ids, flags = [], []
    for k, part in enumerate(re.split(r"\[\[|\]\]", text)):
        ids += spell(part)
        flags += [k % 2 == 1] * len(spell(part))
    return ids, flags


def check(group, text, completion=0):
    """The group's ids are those of the text, scored exactly where it says [[...]], and the prompt ends at the first."""
    ids, flags = span(text)
    got = group["completions"][completion]
    assert list(group["prompt"]) + list(got["ids"]) == ids
    scored = got["scored"] if got["scored"] is not None else [True] * len(got["ids"])
    assert [False] * len(group["prompt"]) + list(scored) == flags
    assert isinstance(group["prompt"], array) and isinstance(got["ids"], array) and len(scored) == len(got["ids"])


def load(name, dataset_split="", rename=""):
    return rows_of.load_rows(name, SimpleNamespace(dataset_split=dataset_split, rename=rename, as_chat=False))


def says(*contents, first="user"):
    other = {"user": "assistant", "assistant": "user"}
    roles = [first if k % 2 == 0 else other[first] for k in range(len(contents))]
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


# ---- conversations --------------------------------------------------------------------------------------------------


def test_one_turn_ends_at_the_end_of_turn():
    (group,) = tok.encode_demonstration({"messages": says("hi", "yo")}, make(CHATML), [EOS, IM_END])
    check(group, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[yo<|im_end|>]]")
    assert group["completions"][0]["scored"] is None and "split" not in group


def test_a_newline_after_the_turn_is_context_but_not_scored():
    (group,) = tok.encode_demonstration({"messages": says("a", "b", "c", "d", "e")}, make(CHATML), [EOS, IM_END])
    check(group, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
                 "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]")  # the rest is cut


def test_scope_last_and_consecutive_assistant_turns():
    stops, tokenizer = [EOS, IM_END], make(CHATML)
    (group,) = tok.encode_demonstration({"messages": says("a", "b", "c", "d")}, tokenizer, stops, scope="last")
    check(group, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
                 "<|im_start|>assistant\n[[d<|im_end|>]]")
    messages = says("a", "b") + says("c", first="assistant")
    (group,) = tok.encode_demonstration({"messages": messages}, tokenizer, stops)
    check(group, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
                 "<|im_start|>assistant\n[[c<|im_end|>]]")


def test_bos_comes_once_from_a_template_that_writes_it():
    tokenizer = make(LLAMA3, bos=True)
    (group,) = tok.encode_demonstration({"messages": says("hi", " yo ")}, tokenizer, [EOT])
    check(group, "<s><|start|>user<|end|>\n\nhi<|eot|><|start|>assistant<|end|>\n\n[[yo<|eot|>]]")
    assert list(tok.encode_prompt({"prompt": says("hi")}, tokenizer)["prompt"]).count(BOS) == 1


def test_template_that_drops_reasoning_gives_one_group_per_turn():
    messages = says("a", "<think>r</think>\nb", "c", "<think>q</think>\nd")
    one, two = tok.encode_demonstration({"messages": messages}, make(QWEN3), [IM_END])
    check(one, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[<think>r</think>\nb<|im_end|>]]")
    check(two, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
               "<|im_start|>assistant\n[[<think>q</think>\nd<|im_end|>]]")
    assert one["split"] is two["split"] is True
    (single,) = tok.encode_demonstration({"messages": says("a", "b")}, make(QWEN3), [IM_END])
    check(single, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\nb<|im_end|>]]")
    assert "split" not in single


def test_generation_prompt_that_a_finished_turn_does_not_show():
    (group,) = tok.encode_demonstration({"messages": says("a", "b", "c", "d")}, make(FORCED), [IM_END])
    check(group, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
                 "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]")  # the template's own text
    assert "split" not in group


def test_what_a_template_adds_at_the_very_end_is_no_reason_to_split():
    (group,) = tok.encode_demonstration({"messages": says("a", "b", "c", "d")}, make(PHI), [EOS, END])
    check(group, "<|start|>user\na<|end|>\n<|start|>assistant\n[[b<|end|>]]\n<|start|>user\nc<|end|>\n"
                 "<|start|>assistant\n[[d<|end|>]]")


def test_token_that_straddles_the_border_keeps_the_prompt_and_the_text():
    tokenizer = make(CHATML, merge=True)
    (group,) = tok.encode_demonstration({"messages": says("a", "\nb", "c", "\n\nd")}, tokenizer, [IM_END])
    assert "split" not in group and group["prompt"] == tok.encode_prompt({"prompt": says("a")}, tokenizer)["prompt"]
    after = spell("<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")
    (completion,) = group["completions"]
    assert list(completion["ids"]) == spell("\nb") + after + [VOCAB["\n\n"]] + spell("d<|im_end|>")
    assert list(completion["scored"]) == [True] * 3 + [False] * (len(after) - 1) + [True] * 3


def test_tools_calls_template_kwargs_and_json_columns():
    messages = [*says("a"), {"role": "assistant", "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "4"},
                *says("b", first="assistant")]
    want = ("T:f;<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[CALL f<|im_end|>]]\n"
            "<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]")
    for tools in [{"name": "f"}], '[{"name": "f"}]':
        (group,) = tok.encode_demonstration({"messages": messages, "tools": tools}, make(TOOLS), [IM_END])
        check(group, want)
    prompt = {"prompt": says("a"), "chat_template_kwargs": {"style": "X"}}
    tail = spell("X<|im_start|>assistant\n")
    assert list(tok.encode_prompt(prompt, make(TOOLS), template_kwargs={"style": "Y"})["prompt"])[-len(tail):] == tail
    assert VOCAB["Y"] in tok.encode_prompt({"prompt": says("a")}, make(TOOLS), template_kwargs={"style": "Y"})["prompt"]


def test_sharegpt_and_text_parts():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    want = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]"
    (group,) = tok.encode_demonstration({"conversations": turns}, make(CHATML), [IM_END])
    check(group, want)
    parts = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "a"}]},
             {"role": "assistant", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": ""}]}]
    check(tok.encode_demonstration({"messages": parts}, make(CHATML), [IM_END])[0], want)


# ---- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_text_and_prompt_completion(bos):
    tokenizer, lead = make(bos=bos), "<s>" * bos
    (group,) = tok.encode_demonstration({"prompt": "ab", "completion": " c"}, tokenizer, [EOS])
    check(group, lead + "ab[[ c</s>]]")
    (group,) = tok.encode_demonstration({"prompt": lead + "ab", "completion": "c</s>"}, tokenizer, [EOS])
    check(group, lead + "ab[[c</s>]]")  # neither BOS nor EOS twice
    (group,) = tok.encode_demonstration({"text": "abc"}, tokenizer, [EOS])
    batch = flat_batch([group])
    assert batch["input_ids"].tolist() == spell(lead + "abc</s>")
    assert batch["labels"].tolist() == spell(lead + "abc</s>")[1:]  # all but the first
    assert list(tok.encode_prompt({"prompt": "ab"}, tokenizer)["prompt"]) == spell(lead + "ab")


def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt():
    (group,) = tok.encode_demonstration({"prompt": "ab", "completion": "c"}, make(bos=True, closes=True), [EOS])
    check(group, "<s>ab[[c</s>]]")


def test_sentencepiece_space_is_not_invented_inside():
    tokenizer = make(metaspace=True)
    (group,) = tok.encode_demonstration({"prompt": "ab", "completion": "c"}, tokenizer, [EOS])
    check(group, " ab[[c</s>]]")


def test_completion_whose_first_token_straddles_keeps_the_prompt():
    tokenizer = make(merge=True)
    (group,) = tok.encode_demonstration({"prompt": "a\n", "completion": "\nb"}, tokenizer, [EOS])
    check(group, "a\n[[\nb</s>]]")


def test_pad_equal_to_eos_still_scores_eos():
    tokenizer = make()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (group,) = tok.encode_demonstration({"prompt": "a", "completion": "b"}, tokenizer, [EOS])
    assert flat_batch([group])["labels"].tolist() == [VOCAB["b"], EOS]


def test_conversational_prompt_completion():
    row = {"prompt": says("a"), "completion": says("b", first="assistant")}
    (group,) = tok.encode_demonstration(row, make(CHATML), [IM_END])
    check(group, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]")


# ---- preference -----------------------------------------------------------------------------------------------------

PAIR = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("row", [
    {"prompt": says("a"), "chosen": says("b", first="assistant"), "rejected": says("c", first="assistant")},
    {"chosen": says("a", "b"), "rejected": says("a", "c")},
    {"prompt": says("a"), "chosen": says("a", "b"), "rejected": says("a", "c")},  # the prompt repeated
    {"prompt": "a", "chosen": says("a", "b"), "rejected": says("a", "c")},
])
def test_conversational_pairs(row):
    group = tok.encode_preference(row, make(CHATML), [IM_END])
    check(group, PAIR + "[[b<|im_end|>]]")
    check(group, PAIR + "[[c<|im_end|>]]", 1)


def test_text_pairs():
    group = tok.encode_preference({"prompt": "q:", "chosen": "yes", "rejected": "no"}, make(bos=True), [EOS])
    check(group, "<s>q:[[yes</s>]]")
    check(group, "<s>q:[[no</s>]]", 1)
    group = tok.encode_preference({"chosen": "q: yes", "rejected": "q: no"}, make(), [EOS])
    check(group, "q:[[ yes</s>]]")  # the space goes with the word
    check(group, "q:[[ no</s>]]", 1)


def test_pair_that_diverges_early_scores_assistant_turns_only():
    row = {"chosen": says("a", "b", "c", "d"), "rejected": says("a", "x")}
    group = tok.encode_preference(row, make(CHATML), [IM_END])
    check(group, PAIR + "[[b<|im_end|>]]\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]")
    check(group, PAIR + "[[x<|im_end|>]]", 1)


def test_equal_answers_are_still_a_pair():
    group = tok.encode_preference({"chosen": says("a", "b"), "rejected": says("a", "b")}, make(CHATML), [IM_END])
    check(group, PAIR + "[[b<|im_end|>]]", 0)
    check(group, PAIR + "[[b<|im_end|>]]", 1)


# ---- stop ids -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template, config, tokens, want", [
    (CHATML, None, {}, {EOS, IM_END}),
    (LLAMA3, GenerationConfig(eos_token_id=[EOS, END]), {}, {EOS, END, EOT}),
    (PHI, GenerationConfig(eos_token_id=END), {}, {EOS, END}),
    (LLAMA2, None, {}, {EOS}),  # a space stands between the answer and its end; it must not stop anything
    (None, None, {}, {EOS}),
    (None, GenerationConfig(eos_token_id=EOT), {"eos_token": None, "pad_token": None, "bos_token": None}, {EOT}),
    (CHATML, None, {"eos_token": None, "pad_token": None, "bos_token": None}, {IM_END}),
])
def test_stop_ids(template, config, tokens, want):
    assert tok.stop_ids(make(template, **tokens), config) == sorted(want)


def test_no_eos_at_all():
    tokenizer = make(eos_token=None, pad_token=None, bos_token=None)
    with pytest.raises(InputError, match="no token ends.*eos_token"):
        tok.stop_ids(tokenizer)
    (group,) = tok.encode_demonstration({"prompt": "a", "completion": "b"}, tokenizer, [EOT])
    check(group, "a[[b<|eot|>]]")


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_rows_of_every_kind_of_file(tmp_path):
    import datasets

    rows = [{"text": "a\u2028b", "n": 1}, {"text": "c", "n": 2}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "x.jsonl").write_text("\ufeff" + lines.replace("\n", "\r\n\r\n") + "\n", encoding="utf-8")
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "x.parquet")
    data.to_csv(tmp_path / "x.csv")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "splits")
    names = ["x.jsonl", "x.json", "lines.json", "x.parquet", "x.csv", "x.jsonl:train", "saved", "splits:test"]
    for name in names:
        got = load(str(tmp_path / name))
        assert got == rows, name
        assert [row.index for row in got] == [0, 1]
    assert load(str(tmp_path / "x.jsonl"))[1].where == f"{tmp_path / 'x.jsonl'}:3"  # the line, for an editor


def test_folder_splits_rename_none_and_fingerprint(tmp_path):
    for name, text in ("train-0.jsonl", "a"), ("train-1.jsonl", "b"), ("test.jsonl", "c"):
        row = {"q": text, "x": None, "list": [{"k": None, "v": 1}], "deep": {"k": {"z": None}}}
        (tmp_path / name).write_text(json.dumps(row))
    rows = load(str(tmp_path), rename="q:prompt")
    rest = {"x": None, "list": [{"k": None, "v": 1}], "deep": {"k": {"z": None}}}  # a JSON line's nulls are its own
    assert rows == [{"prompt": t, **rest} for t in "ab"]
    assert [row["q"] for row in load(f"{tmp_path}:test")] == ["c"]
    assert load(str(tmp_path), dataset_split="test") == load(f"{tmp_path}:test")
    assert [row["q"] for row in load(f"{tmp_path}:train", dataset_split="test")] == ["a", "b"]  # NAME:SPLIT goes before
    digest = rows_of.fingerprint(rows)
    assert re.fullmatch("[0-9a-f]{16}", digest)
    assert digest == rows_of.fingerprint([dict(reversed(row.items())) for row in rows])
    assert digest != rows_of.fingerprint(rows[::-1]) and digest != rows_of.fingerprint(rows[:1])


def test_load_tokenizer(tmp_path):
    make(CHATML).save_pretrained(tmp_path / "m")
    (tmp_path / "t.jinja").write_text(PHI)
    assert tok.load_tokenizer(tmp_path / "m").chat_template == CHATML
    assert tok.load_tokenizer(str(tmp_path / "m"), str(tmp_path / "t.jinja")).chat_template == PHI


# ---- errors ---------------------------------------------------------------------------------------------------------

ROW_ERRORS = [
    ({"question": "a"}, CHATML, r"messages \| conversations \| prompt \+ completion \| text.*question.*--rename"),
    ({"messages": "text"}, CHATML, "column messages"),
    ({"messages": []}, CHATML, "column messages"),
    ({"messages": ["a"]}, CHATML, "role"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, CHATML, "wizard.*assistant"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, CHATML, "role"),
    ({"messages": says("a", 4)}, CHATML, "not text.*4"),
    ({"messages": says("a", None)}, CHATML, "not text.*None"),
    ({"messages": says("a", [{"type": "image"}])}, CHATML, "not text.*image"),
    ({"messages": says("a", "\ud800")}, CHATML, r"not text.*\\ud800"),
    ({"messages": says("a")}, CHATML, "no assistant turn"),
    ({"messages": says("b", first="assistant")}, CHATML, "no assistant turn"),
    ({"messages": says("a", "b")}, None, "no chat template.*--chat_template FILE"),
    ({"messages": says("a", "b")}, "{{ undefined.x }}", "template fails.*undefined.*--chat_template FILE"),
    ({"messages": says("a", "b")}, "{{ raise_exception('roles\nmust') }}", "template fails.*roles"),
    ({"messages": says("a", "b")}, "{% if %}", "template fails"),
    ({"messages": says("a", "b")}, "{{ ''.__class__.__mro__ }}", "template fails.*unsafe"),
    ({"messages": says("a", "b"), "tools": "[{"}, TOOLS, "template fails"),
    ({"messages": says("a", "b"), "tools": 7}, TOOLS, "template fails"),
    ({"messages": says("a", "b"), "chat_template_kwargs": {"tokenize": False}}, TOOLS, "template fails.*tokenize"),
    ({"messages": says("a", "b"), "chat_template_kwargs": {"chat_template": "x"}}, CHATML, "fails.*chat_template"),
    ({"messages": says("a", "b"), "chat_template_kwargs": {"continue_final_message": True}}, CHATML, "continue_final"),
    ({"messages": says("a", "b")}, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "template fails.*recursion"),
    ({"messages": says("a", "b")}, "{{ 'x' * 2 ** 25 }}", "template fails.*33554432 characters"),
    ({"text": ["a"]}, CHATML, "column text"),
    ({"text": 1.5}, CHATML, "not text.*1.5"),
    ({"prompt": "a", "completion": []}, CHATML, r"not text.*\[\]"),
    ({"messages": says("a", [])}, CHATML, r"not text.*\[\]"),
    ({"prompt": "a", "completion": says("b", first="user")}, CHATML, "no assistant turn"),
    ({"prompt": says("a"), "completion": "b"}, CHATML, "mixed"),
    ({"prompt": says("a", "b"), "completion": says("c", first="assistant")}, CHATML, "ends with the assistant"),
]


@pytest.mark.parametrize("row, template, match", ROW_ERRORS)
def test_rows_that_cannot_be_encoded(row, template, match):
    row = rows_of.Row(row)
    row.where = "data.jsonl:7"
    with pytest.raises(InputError, match=match) as caught:
        tok.encode_demonstration(row, make(template), [EOS, IM_END])
    text = str(caught.value)
    assert "data.jsonl:7" in text and text.isprintable() and "\n" not in text and len(text) < 700


def test_a_template_without_an_end(monkeypatch):
    monkeypatch.setattr(templates, "PATIENCE", 1)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match="template fails.*no end after 1 seconds.*--chat_template FILE"):
        tok.encode_demonstration({"messages": says("a", "b")}, make(loops), [EOS])


def test_template_arguments_cut_nothing():
    """What a tokenizer would take for an order to truncate or to pad is a name in the template, and no more."""
    row = {"messages": says("a", "b"), "chat_template_kwargs": {"truncation": True, "max_length": 2, "padding": "left"}}
    (group,) = tok.encode_demonstration(row, make(CHATML), [EOS, IM_END])
    check(group, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]")


def test_a_prompt_without_a_token():
    with pytest.raises(InputError, match="no token in column prompt.*--rename"):
        tok.encode_prompt({"prompt": ""}, make())
    assert list(tok.encode_prompt({"prompt": ""}, make(bos=True))["prompt"]) == [BOS]


@pytest.mark.parametrize("eos", ["</s>", [EOS, "x"], 10**9, -1, True, 1.5, [EOS, 7.0]])
def test_stop_ids_that_are_no_tokens(eos):
    with pytest.raises(InputError, match="no tokens of the tokenizer.*eos_token_id"):
        tok.stop_ids(make(), GenerationConfig(eos_token_id=eos))


@pytest.mark.parametrize("row, match", [
    ({"prompt": "a", "chosen": "b"}, r"prompt \+ chosen \+ rejected \| chosen \+ rejected.*found"),
    ({"chosen": says("a", "b"), "rejected": says("x", "b")}, "no common message.*prompt"),
    ({"chosen": says("a", "b"), "rejected": "a"}, "mixed|common"),
    ({"prompt": "a", "chosen": "b", "rejected": says("a", "b")}, "mixed"),
])
def test_pairs_that_cannot_be_encoded(row, match):
    with pytest.raises(InputError, match=match):
        tok.encode_preference(row, make(CHATML), [IM_END])
    with pytest.raises(InputError, match="wanted columns prompt"):
        tok.encode_prompt({"question": "a"}, make(CHATML))


def test_pair_of_several_turns_in_a_rewriting_template_is_refused():
    row = {"chosen": says("a", "b", "c", "d"), "rejected": says("a", "x")}
    with pytest.raises(InputError, match="rewrites earlier turns"):
        tok.encode_preference(row, make(QWEN3), [IM_END])


@pytest.mark.parametrize("files, name, kwargs, match", [
    ({}, "none.jsonl", {}, r"none.jsonl.*--dataset"),
    ({"a.jsonl": b""}, "a.jsonl", {}, "no rows"),
    ({"a.jsonl": b'{"a": 1}\n{"a": \n'}, "a.jsonl", {}, r"a.jsonl:2\).*JSON"),
    ({"a.jsonl": b'{"a": "\xff"}'}, "a.jsonl", {}, r"a.jsonl:1\)"),
    ({"a.jsonl": b'{"a": 1}\n3\n'}, "a.jsonl", {}, r"a.jsonl:2\): 3"),
    ({"a.jsonl": b'{"a":' * 100_000}, "a.jsonl", {}, "a.jsonl"),
    ({"a.jsonl": b'{"b": 1}\n{"a":' + b'{"a":' * 900 + b"1" + b"}" * 901}, "a.jsonl", {}, r"a.jsonl:2\)"),
    ({"a.json": b'[{"a": 1}, 3'}, "a.json", {}, "a.json"),
    ({"a.parquet": b"no"}, "a.parquet", {}, "a.parquet"),
    ({"a.txt": b"x"}, ".", {}, "no rows"),
    ({"train.jsonl": b'{"a": 1}'}, ".", {"dataset_split": "test"}, "no rows in split.*test"),
    ({"a.jsonl": b'{"a": 1}'}, "a.jsonl", {"dataset_split": "test"}, "no splits.*test"),
    ({"a.jsonl": b'{"a": 1}'}, "a.jsonl", {"rename": "b:c"}, r"--rename b:c.*\['a'\]"),
    ({"a.jsonl": b'{"a": 1}'}, "a.jsonl", {"rename": "a"}, "--rename a "),
])
def test_files_that_cannot_be_read(tmp_path, files, name, kwargs, match):
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError, match=match) as caught:
        load(str(tmp_path / name), **kwargs)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot load the tokenizer.*--model"):
        tok.load_tokenizer(str(tmp_path))
    make().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="--chat_template FILE"):
        tok.load_tokenizer(str(tmp_path), "absent.jinja")


# ---- picture --------------------------------------------------------------------------------------------------------


def test_token_picture():
    group = tok.encode_preference({"prompt": "a\n\x1b[31m", "chosen": "b", "rejected": "c\u202e"}, make(), [EOS])
    assert tok.token_picture(group, make(), color=False) == "a\\n\\x1b[31m\n  >>b</s><<\n  >>c\\u202e</s><<"
    colored = tok.token_picture(group, make())
    assert colored.startswith("\x1b[2ma\\n\\x1b[31m\x1b[0m") and "\x1b[32mb</s>\x1b[0m" in colored
    (group,) = tok.encode_demonstration({"messages": says("a", "b", "c", "d")}, make(CHATML), [IM_END])
    assert "b<|im_end|><<\\n<|im_start|>user" in tok.token_picture(group, make(CHATML), color=False)
    (group,) = tok.encode_demonstration({"text": "xyz"}, make(), [EOS])
    assert tok.token_picture(group, make(), color=False) == "x>>yz</s><<"
    (group,) = tok.encode_demonstration({"prompt": "p" * 9000, "completion": "b"}, make(), [EOS])
    assert 400 < len(tok.token_picture(group, make(), color=False)) < 440


# ---- batches --------------------------------------------------------------------------------------------------------


def bare(prompt, *completions, row=0):
    """prompt: list of ids; completion: list of ids, or (ids, flags)."""
    pairs = [c if isinstance(c, tuple) else (c, None) for c in completions]
    return {"prompt": array("i", prompt), "row": row,
            "completions": [{"ids": array("i", ids), "scored": scored} for ids, scored in pairs]}


@st.composite
def groups_of(draw, most=5, completions=(1, 4)):
    ids = st.lists(st.integers(0, 99), min_size=1, max_size=6)
    groups = []
    for row in range(draw(st.integers(1, most))):
        parts = []
        for part in draw(st.lists(ids, min_size=completions[0], max_size=completions[1])):
            flags = draw(st.none() | st.lists(st.booleans(), min_size=len(part), max_size=len(part)))
            parts.append((part, flags))
        groups.append(bare(draw(st.lists(st.integers(0, 99), max_size=6)), *parts, row=row))
    return groups


def seen_by(batch, i):
    """[(id, position)] that query row i sees, oldest first: from the layout alone, as an attention kernel does."""
    q, k = batch["cu_seqlens_q"].tolist(), batch["cu_seqlens_k"].tolist()
    keys = batch["kv_index"].tolist() if batch["kv_index"] is not None else list(range(q[-1]))
    s = next(s for s in range(len(q) - 1) if q[s] <= i < q[s + 1])
    last = k[s + 1] - (q[s + 1] - i) + 1  # causal from the bottom right
    return [(int(batch["input_ids"][r]), int(batch["position_ids"][r])) for r in keys[k[s]:last]]


def naive(groups):
    """[(history, label, completion)] of every scored token, sequence by sequence."""
    out, number = [], 0
    for group in groups:
        for completion in group["completions"]:
            ids = list(group["prompt"]) + list(completion["ids"])
            for t in range(max(1, len(group["prompt"])), len(ids)):
                k = t - len(group["prompt"])
                if completion["scored"] is None or completion["scored"][k]:
                    out.append(([(token, p) for p, token in enumerate(ids[:t])], ids[t], number))
            number += 1
    return out


def predictions(batch):
    triples = zip(batch["rows"].tolist(), batch["labels"].tolist(), batch["seq"].tolist())
    return [(seen_by(batch, row), label, seq) for row, label, seq in triples]


@settings(max_examples=150, deadline=None)
@given(groups_of())
def test_flat_batch_equals_the_naive_double_loop(groups):
    batch = flat_batch(groups)
    assert predictions(batch) == naive(groups)
    q, k = batch["cu_seqlens_q"], batch["cu_seqlens_k"]
    assert q.dtype == k.dtype == torch.int32 and q[0] == k[0] == 0 and len(q) == len(k)
    for name in "input_ids", "position_ids", "rows", "labels", "seq", "seq_segment":
        assert batch[name].dtype == torch.long
    assert q[-1] == len(batch["input_ids"]) == len(batch["position_ids"])
    assert (batch["max_q"], batch["max_k"]) == (int(q.diff().max()), int(k.diff().max()))
    assert type(batch["max_q"]) is type(batch["max_k"]) is int
    shared = any(len(g["completions"]) > 1 and len(g["prompt"]) for g in groups)
    assert (batch["kv_index"] is not None) == shared
    assert k[-1] == (len(batch["kv_index"]) if shared else q[-1])
    cost = sum(len(g["prompt"]) + sum(len(c["ids"]) for c in g["completions"]) for g in groups)
    assert len(batch["input_ids"]) == cost  # a prompt is computed once, and nothing is padding
    completions = [c for g in groups for c in g["completions"]]
    assert len(batch["seq_segment"]) == len(completions)
    for s, completion in zip(batch["seq_segment"].tolist(), completions):
        end = int(q[s + 1])
        assert batch["input_ids"][end - len(completion["ids"]):end].tolist() == list(completion["ids"])


@settings(max_examples=50, deadline=None)
@given(groups_of(), st.randoms())
def test_order_of_groups_only_permutes(groups, random):
    shuffled = groups[:]
    random.shuffle(shuffled)
    a, b = (sorted((h, label) for h, label, _ in predictions(flat_batch(g))) for g in (groups, shuffled))
    assert a == b


def test_flat_batch_by_hand():
    batch = flat_batch([bare([1, 2], [3, 4], ([5, 6], [True, False])), bare([], [7, 8])])
    expected = {
        "input_ids": [1, 2, 3, 4, 5, 6, 7, 8], "position_ids": [0, 1, 2, 3, 2, 3, 0, 1],
        "cu_seqlens_q": [0, 2, 4, 6, 8], "cu_seqlens_k": [0, 2, 6, 10, 12],
        "kv_index": [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7],
        "rows": [1, 2, 1, 6], "labels": [3, 4, 5, 8], "seq": [0, 0, 1, 2], "seq_segment": [1, 2, 3],
    }
    assert {name: batch[name].tolist() for name in expected} == expected
    assert (batch["max_q"], batch["max_k"]) == (2, 4)


def test_flat_batch_is_the_picture_of_its_docstring():
    batch = flat_batch([bare([10, 11, 12], [20, 21], [30, 31, 32])])
    sees = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4],
            [0, 1, 2, 5], [0, 1, 2, 5, 6], [0, 1, 2, 5, 6, 7]]
    ids, positions = [10, 11, 12, 20, 21, 30, 31, 32], [0, 1, 2, 3, 4, 3, 4, 5]
    for i, rows in enumerate(sees):
        assert seen_by(batch, i) == [(ids[row], positions[row]) for row in rows]
    assert list(zip(batch["rows"].tolist(), batch["labels"].tolist())) == [(2, 20), (3, 21), (2, 30), (5, 31), (6, 32)]


@settings(max_examples=100, deadline=None)
@given(groups_of())
def test_what_scripts_attach_to_completions_travels(groups):
    """A tensor of one value per scored token becomes (M,), a float (S,); other entries, and the groups, stay as they
    are. Where nothing stands before a sequence its first id is not scored, whatever its flag says."""
    completions, oracle = [c for g in groups for c in g["completions"]], naive(groups)
    for s, completion in enumerate(completions):
        labels = [label for _, label, number in oracle if number == s]
        completion.update({"double": 2.0 * torch.tensor(labels, dtype=torch.float64), "weight_of_it": s / 4})
        completion.update({"stopped": s % 2 == 0, "rewards": [1.0], "count": s, "note": None})
        assert scored_flags(completion) == (completion["scored"] or [True] * len(completion["ids"]))
    batch = flat_batch(groups)
    assert batch["double"].dtype == torch.float64 and batch["weight_of_it"].dtype == torch.float32
    assert batch["double"].tolist() == [2.0 * label for _, label, _ in oracle]
    assert batch["weight_of_it"].tolist() == [s / 4 for s in range(len(completions))]
    assert not {"stopped", "rewards", "count", "note", "ids", "scored"} & set(batch)
    assert batch["num_seqs"] == len(completions) and type(batch["num_seqs"]) is int
    assert batch["groups"] == groups and all(a is b for a, b in zip(batch["completions"], completions, strict=True))
    assert count_scored(groups) == len(oracle)


def test_sums_of_a_batch_over_its_completions():
    batch = flat_batch([bare([1], [2, 3], ([4, 5], [False, False])), bare([], [6, 7, 8])])
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert seq_sums(values, batch).tolist() == [3.0, 0.0, 12.0]  # one without scored tokens has a sum, too
    assert sequence_sum(values, batch["seq"]).tolist() == [3.0, 3.0, 12.0, 12.0]


def test_flat_batch_does_not_change_or_alias_its_groups_and_takes_none():
    group = bare([1, 2], [3, 4])
    batch = flat_batch([group])
    batch["input_ids"].fill_(9)
    group["prompt"].append(5)
    group["completions"][0]["ids"].append(5)
    assert batch["input_ids"].tolist() == [9] * 4
    assert len(flat_batch([])["input_ids"]) == 0


def test_flat_batch_is_quick():
    groups = [bare(range(512), *[range(250)] * 14) for _ in range(2)]
    best = min(-time.perf_counter() + [flat_batch(groups), time.perf_counter()][1] for _ in range(5))
    assert best < 0.05  # measured: a tenth of that; the bound is for a busy machine


def test_fit():
    groups = [bare([1] * 4, [2] * 3, [2] * 5), bare([1] * 9, [2] * 2), bare([1], [2] * 10), bare([], [1]),
              bare([1], ([2, 3], [False, False])), bare([], ([2, 3], [True, False])), bare([1] * 7, [2] * 3)]
    groups = [{**group, "row": i} for i, group in enumerate(groups)]
    kept, counts = fit(groups, groups, 10)
    assert kept == [groups[0], groups[6]]
    assert counts == {"rows": 7, "kept": 2, "overlong": 2, "unscored": 3, "longest": 11, "refused": 0, "equal": 0}
    kept, counts = fit(groups, groups, 10, "truncate_prompt")
    assert kept == [groups[0], {**bare([1] * 8, [2] * 2), "row": 1}, groups[6]]
    assert counts["kept"] == 3 and counts["overlong"] == 2
    assert len(groups[1]["prompt"]) == 9  # the caller's group stays whole
    cut, _ = fit([bare(range(6), [9, 9])], [0], 5, "truncate_prompt")
    assert list(cut[0]["prompt"]) == [3, 4, 5]  # the prompt's end is kept, the completion is whole
    with pytest.raises(InputError, match="row 2.*11.*--max_length 11"):
        fit([groups[0], {**groups[1], "row": 1}], [0, 1], 10, "error")
    none = {"overlong": 0, "unscored": 0, "refused": 0, "equal": 0}
    assert fit([], [], 10) == ([], {"rows": 0, "kept": 0, "longest": 0, **none})
    parts = [{**bare([1] * n, [2]), "row": 7} for n in (1, 2, 9)]  # one row that became three groups
    assert fit(parts, [0], 5)[1] == {**none, "rows": 1, "kept": 1, "overlong": 1, "longest": 10}
    prompts = [{"prompt": array("i", [1] * 3), "completions": [], "row": 0}]
    assert fit(prompts, [0], 3)[0] == prompts and fit(prompts, [0], 2)[0] == []


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 100), st.integers(0, 100))
def test_order_visits_every_row_once_per_epoch_and_is_stateless(n, seed, start, count):
    whole = order(n, seed, 0, start + count)
    assert order(n, seed, start, count) == whole[start:]
    for epoch in range(len(whole) // n):
        assert sorted(whole[epoch * n:(epoch + 1) * n]) == list(range(n))


def test_order_depends_on_seed_and_epoch():
    first, second = order(50, 1, 0, 50), order(50, 1, 50, 50)
    assert first != second and first != order(50, 2, 0, 50) and first != list(range(50))


def tokens(group):
    return len(group["prompt"]) + sum(len(c["ids"]) for c in group["completions"])


@settings(max_examples=150, deadline=None)
@given(groups_of(most=8, completions=(1, 5)), st.integers(1, 40))
def test_micro_batches_partition_within_budget(groups, budget):
    batches = pack(groups, budget)
    assert batches == pack(groups, budget)
    placed = [(g["row"], id(c)) for batch in batches for g in batch for c in g["completions"]]
    assert sorted(placed) == sorted((g["row"], id(c)) for g in groups for c in g["completions"])  # the same dicts, once
    for batch in batches:
        if sum(map(tokens, batch)) > budget:
            (group,) = batch  # alone, and as small as the rules allow
            assert len(group["completions"]) == 1 or len(groups[group["row"]]["completions"]) == 2
        for group in batch:
            assert group["prompt"] == groups[group["row"]]["prompt"]
            if len(groups[group["row"]]["completions"]) <= 2 or tokens(groups[group["row"]]) <= budget:
                assert len(group["completions"]) == len(groups[group["row"]]["completions"])


def test_micro_batches_are_first_fit_decreasing():
    groups = [bare([1] * n, [2]) for n in (3, 5, 1, 4)]  # 4, 6, 2 and 5 tokens
    assert [[tokens(g) for g in batch] for batch in pack(groups, 8)] == [[6, 2], [5], [4]]
    assert [[tokens(g) for g in batch] for batch in pack(groups, 5)] == [[6], [5], [4], [2]]
    pieces = pack([bare([1] * 2, [3] * 3, [4] * 3, [5] * 3)], 8)
    assert [[list(c["ids"]) for c in batch[0]["completions"]] for batch in pieces] == [[[3] * 3, [4] * 3], [[5] * 3]]
    assert pack([], 8) == []


def one_rank(budget, dp_size=1, dp_rank=0):
    return SimpleNamespace(args=SimpleNamespace(tokens_per_microbatch=budget), device=torch.device("cpu"),
                           dp_size=dp_size, dp_rank=dp_rank)


def all_shares(groups, ranks):
    return [share(one_rank(8, ranks, rank), groups) for rank in range(ranks)]


@settings(max_examples=100, deadline=None)
@given(groups_of(most=8, completions=(1, 5)), st.integers(1, 6))
def test_shares_are_a_partition_balanced_by_tokens(groups, ranks):
    shares = all_shares(groups, ranks)
    assert sorted(g["row"] for part in shares for g in part) == [g["row"] for g in groups]
    assert all(part == sorted(part, key=lambda g: g["row"]) for part in shares) and shares == all_shares(groups, ranks)
    work = [sum(map(tokens, part)) for part in shares]
    assert max(work) - min(work) <= max(map(tokens, groups))  # what the longest-first rule guarantees


def test_shares_by_hand():
    def shared(*costs):
        groups = [bare([1] * cost, row=row) for row, cost in enumerate(costs)]
        return [[group["row"] for group in part] for part in all_shares(groups, 2)]

    assert shared(5, 3, 3, 2, 2, 1) == [[0, 3, 5], [1, 2, 4]]
    assert shared(0, 0, 0, 0) == [[0, 2], [1, 3]]  # empty work is spread too


@pytest.mark.parametrize("most", [0, 3, 5])
def test_every_rank_gets_the_same_number_of_micro_batches(monkeypatch, most):
    """most: what the busiest other rank has. A rank with less runs the stand-in, which has no weight; batches are made
    when they are asked for, after the ranks agreed."""
    asked, made = [], []
    monkeypatch.setattr(batching, "all_most", lambda run, value: asked.append(value) or float(max(value, most)))
    monkeypatch.setattr(batching, "flat_batch", lambda *args: made.append(args) or flat_batch(*args))
    groups, spare = [bare([1] * n, [2], row=n) for n in (3, 5, 1, 4)], bare([9], [9])
    batches = micro_batches(one_rank(8), groups, spare)
    assert not asked and not made
    first = next(batches)
    assert asked == [3] and len(made) == 1
    batches = [first, *batches]
    assert [[tokens(g) for g in batch["groups"]] for batch in batches[:3]] == [[6, 2], [5], [4]]
    assert [batch["weight"] for batch in batches] == [1.0] * 3 + [0.0] * (max(3, most) - 3)
    assert all(batch["groups"] == [spare] for batch in batches[3:])
    idle = list(micro_batches(one_rank(8), [], spare))
    assert asked[-1] == 1 and [batch["weight"] for batch in idle] == [0.0] * max(1, most)


@settings(max_examples=50, deadline=None)
@given(groups_of(most=6, completions=(1, 5)), st.integers(1, 30), st.integers(0, 12))
def test_attach_logprobs_gives_each_completion_those_of_its_tokens(groups, budget, most):
    def model(batch):
        assert not torch.is_grad_enabled()
        shift = 0 if batch["weight"] else 1  # what the stand-in has must not be taken
        return {"logprobs": -batch["labels"].float() - shift}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "all_most", lambda run, value: float(max(value, most)))
        attach_logprobs(one_rank(budget), model, groups, "old_logprobs")
    oracle = naive(groups)
    for s, completion in enumerate(c for g in groups for c in g["completions"]):
        assert completion["old_logprobs"].tolist() == [-float(label) for _, label, number in oracle if number == s]
    assert flat_batch(groups)["old_logprobs"].tolist() == [-float(label) for _, label, _ in oracle]


def test_nothing_compares_with_the_padding_id():
    source = Path(tok.__file__).read_text() + Path(batching.__file__).read_text()
    assert "pad_token" not in source and "pad_id" not in source and "except:" not in source
