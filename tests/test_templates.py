"""common/templates.py and what common/tokenization.py makes of its texts, over templates x tokenizers x chats. The
templates are short ones with the structure of real ones. Each text of a chat holds a word of its own, so the tests find
in the decoded tokens what is scored and never ask how it was found."""

import random
import re
import sys
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import tokenization as tok
from common.batches import fit
from common.runtime.flags import InputError

SPECIAL = "<s> </s> <|im_start|> <|im_end|> <|end|> <|user|> <|assistant|> <|final|> [INST] [/INST]".split()

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# a generation prompt that ends in a blank, and one that ends in a blank line
VICUNA = ("{% for m in messages %}{% if m.role == 'assistant' %}ASSISTANT: {{ m.content }}</s>\n"
          "{% else %}{{ m.role | upper }}: {{ m.content }}\n{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}ASSISTANT: {% endif %}")
ALPACA = ("{% for m in messages %}### {{ m.role }}:\n\n{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n\n"
          "{% endfor %}{% if add_generation_prompt %}### assistant:\n\n{% endif %}")
# Mistral: the system's text stands in the user's turn while that is the last message, and nowhere else
MISTRAL = ("<s>{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
           "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
           "{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
           "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}")
# the generation prompt closes a block of reasoning that the finished turn may fill
CLOSED = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
          "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}")
# the generation prompt opens a block that the finished turn does not have
OPEN = CHATML.replace("assistant\n{%", "assistant\n<think>\n{%")
# earlier turns lose their (empty) block
DROPS = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n"
         "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# Command: two control tokens end a turn, and the second one is the tokenizer's eos
COMMAND = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.role == 'assistant' %}<|final|>"
           "{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# GLM-4: the token of the next role is what ends a turn
GLM = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
       "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
TRIMS = CHATML.replace("m.content", "m.content | trim")
PHI = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
       "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}")
# a content is a list of parts; a string has none
LISTS = ("<s>{% for m in messages %}{{ m.role }}: {% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n"
         "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
TEMPLATES = dict(chatml=CHATML, vicuna=VICUNA, alpaca=ALPACA, mistral=MISTRAL, closed=CLOSED, open=OPEN, drops=DROPS,
                 command=COMMAND, glm=GLM, trims=TRIMS, phi=PHI)
REWRITES = {"drops", "mistral with a system text"}

CORPUS = ["ASSISTANT: USER: ### assistant:\n\n### user:\n\n<think>\n\n</think>\n\n", "user\nassistant\nsystem\n\n\n",
          "The answer is this one.\n\nAnd that was it: 1 2 3.\n    return  it\n\n    more", " a b: ab  b:ab\n\nab",
          "q0 q1 q2 a0 a1 a2 1q0 1q1 1q2 1a0 1a1 1a2 q01 q11 q21 a01 a11 a21 s0 be brief"] * 8


@cache
def trained(kind):
    """A small tokenizer that merges blanks and line breaks with their neighbours, as those of real models do."""
    if kind == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=440, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                      show_progress=False)
    elif kind == "metaspace":
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        core.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        letters = [chr(code) for code in range(33, 127)] + ["\n"]
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, special_tokens=["<unk>"],
                                      show_progress=False)
    else:
        core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        core.normalizer = normalizers.Lowercase()
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.decoder = decoders.WordPiece()
        letters = [chr(code) for code in range(33, 127)]
        trainer = trainers.WordPieceTrainer(vocab_size=400, initial_alphabet=letters, special_tokens=["[UNK]"],
                                            show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return core.to_str()


def make(template, kind="bytes", eos="</s>"):
    core = Tokenizer.from_str(trained(kind))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def asks(*contents):
    """Messages of a user and an assistant in turns."""
    return [turn("assistant" if k % 2 else "user", content) for k, content in enumerate(contents)]


def encoded(tokenizer, messages, **options):
    stops = tok.stop_ids(tokenizer, GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids("<|user|>")))
    return tok.encode_demonstration({"messages": messages}, tokenizer, stops, **options)


def shown(tokenizer, group, completion=0):
    """The group as text, the scored parts in {{...}}."""
    ids, flags = group["completions"][completion].values()
    text, before = tokenizer.decode(list(group["prompt"])), list(group["prompt"])
    was_scored = False
    for token, is_scored in zip(ids, flags or [True] * len(ids)):
        text += "{{" * (is_scored and not was_scored) + "}}" * (was_scored and not is_scored)
        text += tokenizer.decode([*before, token]).removeprefix(tokenizer.decode(before))
        before, was_scored = [*before, token], is_scored
    return text + "}}" * was_scored


# ---- the border between a prompt and its answer --------------------------------------------------------------------


@pytest.mark.parametrize("template, answer, want", [
    (CHATML, "\n  return 1", "<|im_start|>assistant\n{{\n  return 1<|im_end|>}}"),
    (CHATML, "\n\n\n1", "<|im_start|>assistant\n{{\n\n\n1<|im_end|>}}"),
    (VICUNA, "ab", "ASSISTANT: {{ab</s>}}"),
    (VICUNA, " ab", "ASSISTANT: {{ ab</s>}}"),
    (ALPACA, "\n\nab", "### assistant:\n\n{{\n\nab</s>}}"),
])
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_white_space_at_the_border_is_trained_once(kind, template, answer, want):
    tokenizer = make(template, kind)
    for messages in asks("hi", answer), asks("hi", answer, "and?", answer):
        (group,) = encoded(tokenizer, messages)
        text = shown(tokenizer, group)
        assert text.endswith(want) and text.count("{{") == len(messages) // 2 and "split" not in group
        assert text.replace("{{", "").replace("}}", "") in tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tok.encode_prompt({"prompt": asks("hi")}, tokenizer)["prompt"]
    assert group["prompt"] == prompt  # as at inference


def test_text_behind_a_text_gets_no_blank():
    """A Metaspace tokenizer writes a blank before what is encoded alone, where a token would straddle the border."""
    tokenizer = make(None, "metaspace")
    for prompt, answer in ("b:", "ab"), (" a b", ":ab"), ("a", "b: ab"), ("\n", "\nab"):
        (group,) = tok.encode_demonstration({"prompt": prompt, "completion": answer}, tokenizer, [1])
        ids = list(group["prompt"]) + list(group["completions"][0]["ids"])[:-1]
        assert tokenizer.decode(ids).strip(" ") == (prompt + answer).strip(" ")
        assert list(group["prompt"]) == tok.encode_text(tokenizer, prompt)


# ---- whose text is scored ------------------------------------------------------------------------------------------


def test_a_question_that_the_template_moves_is_not_scored():
    tokenizer = make(MISTRAL)
    for question in ("Now? Q1", "Be", "Be brief"):  # it may begin as the system's text does
        system = [turn("system", "Be brief. S1"), *asks(question, "So. A1", "And? Q2", "Then. A2")]
        (group,) = encoded(tokenizer, system[:3])
        assert shown(tokenizer, group) == f"<s>[INST] Be brief. S1\n\n{question}[/INST]{{{{ So. A1</s>}}}}"
        one, two = encoded(tokenizer, system)
        assert shown(tokenizer, one) == shown(tokenizer, group) and one["split"] and "foreign" not in one
        assert shown(tokenizer, two) == (f"<s>[INST] {question}[/INST] So. A1</s>[INST] Be brief. S1\n\nAnd? Q2[/INST]"
                                         "{{ Then. A2</s>}}")
        row = {"prompt": system[:2], "chosen": system[2:3], "rejected": [turn("assistant", "No. A3")]}
        pair = tok.encode_preference(row, tokenizer, tok.stop_ids(tokenizer))
        assert shown(tokenizer, pair, 1).endswith("[/INST]{{ No. A3</s>}}") and "foreign" not in pair


def test_another_messages_text_in_a_scored_span_is_a_fact():
    moves = "{% for m in messages[1:] %}{{ m.content }}\n{% endfor %}{{ messages[0].content }}"
    (group,) = encoded(make(moves), [turn("system", "Be brief."), *asks("hi", "yo")])
    assert group["foreign"]
    echoes = [asks("yes", "yes"), asks("yes", "yes", "yes", "yes"), asks("im", "im_end"), asks("a", "a", "a", "b")]
    for messages in echoes:  # no other's text
        assert all("foreign" not in group for group in encoded(make(CHATML), messages))


@pytest.mark.parametrize("reasoning", ["why R1", "\nwhy R1"])
def test_reasoning_is_not_scored_behind_a_closed_block(reasoning):
    tokenizer = make(CLOSED)
    (group,) = encoded(tokenizer, [*asks("hi"), turn("assistant", "yo", reasoning_content=reasoning)])
    text = shown(tokenizer, group)
    whole = text.replace("{{", "").replace("}}", "")
    assert whole.endswith(f"assistant\n<think>\n{reasoning}\n</think>\n\nyo<|im_end|>")
    assert "</think>" not in text.partition("{{")[0] and "lost" not in group
    (group,) = encoded(tokenizer, asks("hi", "yo"))
    assert shown(tokenizer, group).endswith("<think>\n\n</think>\n\n{{yo<|im_end|>}}")
    (group,) = encoded(make(OPEN), asks("hi", "yo"))
    assert shown(tokenizer, group).endswith("assistant\n{{yo<|im_end|>}}")


def test_a_pair_of_which_one_reasons_shares_its_prompt():
    tokenizer = make(CLOSED)
    chosen = [turn("assistant", "yo", reasoning_content="why")]
    row = {"prompt": asks("hi"), "chosen": chosen, "rejected": [turn("assistant", "no")]}
    for pair in row, {**row, "chosen": row["rejected"], "rejected": chosen}:
        group = tok.encode_preference(pair, tokenizer, tok.stop_ids(tokenizer))
        texts = [shown(tokenizer, group, k).replace("{{", "").replace("}}", "") for k in (0, 1)]
        for text, end in zip(texts, (pair["chosen"][0], pair["rejected"][0])):
            assert text.endswith(f"<think>\n{end.get('reasoning_content', '')}\n</think>\n\n{end['content']}<|im_end|>")


# ---- where a turn ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template, stop", [
    (CHATML, "<|im_end|>"), (PHI, "<|end|>"), (MISTRAL, "</s>"), (GLM, "<|user|>"),
])
@pytest.mark.parametrize("spelled", ["The token {} ends a turn. More", "{}", "{}{} and {}", "{} {}", "ends in {}"])
def test_an_answer_may_spell_its_stop_token(template, stop, spelled):
    tokenizer, answer = make(template), spelled.replace("{}", stop)
    (group,) = encoded(tokenizer, asks("hi", answer, "and?", "yo"))
    scored = re.findall(r"\{\{(.*?)\}\}", shown(tokenizer, group), re.S)
    assert [text.strip() for text in scored] == [answer + stop, "yo" + stop] and group["spelled"]
    row = {"prompt": asks("hi"), "chosen": [turn("assistant", answer + " 1")], "rejected": [turn("assistant", answer)]}
    assert "equal" not in tok.encode_preference(row, tokenizer, [*tok.stop_ids(tokenizer)])


def test_a_tool_call_may_spell_the_stop_token():
    writes_calls = "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    calls = CHATML.replace("{{ m.content }}", writes_calls)
    call = {"function": {"name": "find", "arguments": {"text": 'the "end" is\n<|im_end|> "here"'}}}
    (group,) = encoded(make(calls), [*asks("hi"), turn("assistant", "", tool_calls=[call])])
    assert shown(make(calls), group).endswith('\\"here\\""}}}]<|im_end|>}}') and "lost" not in group


def test_spelled_control_tokens_are_a_fact_in_any_role():
    tokenizer = make(CHATML)
    for k in range(3):
        messages = [turn("system", "s"), *asks("a", "b")]
        messages[k]["content"] = "see <s> there"
        assert encoded(tokenizer, messages)[0]["spelled"]
    assert tok.encode_prompt({"prompt": asks("</s>")}, tokenizer)["spelled"]
    assert tok.encode_demonstration({"prompt": "a <|end|>", "completion": "b"}, tokenizer, [1])[0]["spelled"]
    assert "spelled" not in tok.encode_demonstration({"prompt": "<s>a", "completion": "b</s>"}, tokenizer, [1])[0]
    assert "spelled" not in encoded(tokenizer, asks("a <think>", "b < s >"))[0]


def test_stop_ids_of_odd_templates():
    ids = make(None).convert_tokens_to_ids
    assert tok.stop_ids(make(COMMAND)) == [ids("</s>")]  # the turn ends with the second token, which is the eos
    (group,) = encoded(make(COMMAND), asks("hi", "yo", "and?", "so"))
    assert re.findall(r"\{\{(.*?)\}\}", shown(make(COMMAND), group)) == ["yo<|final|></s>", "so<|final|></s>"]
    assert tok.stop_ids(make(COMMAND, eos="<|end|>")) == sorted([ids("<|end|>"), ids("<|final|>")])
    assert tok.stop_ids(make(LISTS)) == [ids("</s>")]  # no BOS
    (group,) = encoded(make(GLM), asks("hi", "yo", "and?", "so"))
    assert shown(make(GLM), group) == "<|user|>\nhi<|assistant|>\n{{yo<|user|>}}\nand?<|assistant|>\n{{so<|user|>}}"


# ---- what is lost, left out or equal -------------------------------------------------------------------------------


def test_what_the_template_does_not_write_is_a_fact():
    call = {"id": "call9", "type": "function", "function": {"name": "find", "arguments": {"place": "Rome"}}}
    writes_names = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    names = CHATML.replace("{{ m.content }}", writes_names)
    lost = [(CHATML, turn("assistant", "", tool_calls=[call])), (names, turn("assistant", "", tool_calls=[call])),
            (CHATML, turn("assistant", "b", reasoning_content="why")), (CHATML, turn("assistant", "b", thinking="why")),
            (LISTS, turn("assistant", "b"))]
    for template, message in lost:
        assert encoded(make(template), [*asks("hi"), message])[0]["lost"], message
    writes = names.replace("c.function.name", "c.function | tojson")
    kept = [(writes, turn("assistant", "", tool_calls=[call])), (TRIMS, turn("assistant", " b\n")),
            (CLOSED, turn("assistant", "b", reasoning_content="why")), (CHATML, turn("assistant", "")),
            (CHATML, turn("assistant", " b\nc "))]
    for template, message in kept:
        assert "lost" not in encoded(make(template), [*asks("hi"), message])[0], message


@pytest.mark.parametrize("unscored", [{"weight": 0}, {"train": False}])
def test_messages_that_are_left_unscored(unscored):
    tokenizer, messages = make(CHATML), asks("a", "b", "c", "d", "e", "f")
    messages[3] |= unscored
    (group,) = encoded(tokenizer, messages)
    assert re.findall(r"\{\{(.*?)\}\}", shown(tokenizer, group)) == ["b<|im_end|>", "f<|im_end|>"]
    messages[5] |= {"weight": 1, "train": True}
    assert encoded(tokenizer, messages) == [group]
    messages[1] |= unscored
    messages[5] |= unscored
    (group,) = encoded(tokenizer, messages)
    assert fit([group], [0], 99)[1]["unscored"] == 1  # of the row nothing is left: it is dropped and counted


def test_messages_before_texts_are_one_line():
    row = {"prompt": asks("hi"), "chosen": "hi yes", "rejected": "hi no"}
    with pytest.raises(InputError, match="text and messages are mixed"):
        tok.encode_preference(row, make(CHATML), [1])


def test_a_shared_text_ends_where_the_tokenisations_agree():
    tokenizer = make(None)
    for chosen, rejected in ("The answer is this one", "The answer is that"), ("It: return", "It: result"):
        group = tok.encode_preference({"chosen": chosen, "rejected": rejected}, tokenizer, [1])
        for completion, text in zip(group["completions"], (chosen, rejected)):
            assert list(group["prompt"]) + list(completion["ids"])[:-1] == tok.encode_text(tokenizer, text)
    with pytest.raises(InputError, match="no common text.*Add a column prompt"):
        tok.encode_preference({"chosen": "yes", "rejected": "no"}, tokenizer, [1])
    with pytest.raises(InputError, match="repeat the prompt"):
        row = {"prompt": "What is it?", "chosen": "What is it? This.", "rejected": "What is it? That."}
        tok.encode_preference(row, tokenizer, [1])


def test_facts_about_equal_pairs_and_plain_texts():
    tokenizer, chat = make(CHATML), asks("a", "b")
    row = {"prompt": chat[:1], "chosen": chat[1:], "rejected": chat[1:]}
    assert tok.encode_preference(row, tokenizer, [3])["equal"]
    trims = {**row, "rejected": [turn("assistant", " b ")]}
    assert tok.encode_preference(trims, make(TRIMS), [3])["equal"]
    assert "equal" not in tok.encode_preference(trims, tokenizer, [3])
    texts = {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}
    for template, is_plain in (CHATML, True), (None, False):
        tokenizer = make(template)
        groups = [*tok.encode_demonstration(texts, tokenizer, [1]), tok.encode_preference(texts, tokenizer, [1]),
                  tok.encode_prompt(texts, tokenizer)]
        assert [group.get("plain", False) for group in groups] == [is_plain] * 3
    assert "plain" not in encoded(make(CHATML), chat)[0]
    assert "plain" not in tok.encode_demonstration({"text": "a"}, make(CHATML), [1])[0]


# ---- templates x tokenizers x chats --------------------------------------------------------------------------------


def some_chats(seed):
    """Chats whose texts hold a word of their own each, between white space, signs and characters of several bytes."""
    draw = random.Random(seed)
    space = ["", " ", "\n", "\n\n", "  ", "\n    ", "1", ": ", "\u2026", "- "]
    for turns in 1, 2, 3:
        texts = [f"{draw.choice(space)}{word}{k}{draw.choice(space)}" for k in range(turns) for word in ("Q", "A")]
        system = [turn("system", "S0 be brief")]
        yield asks(*texts)
        yield system + asks(*texts)


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "wordpiece"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_scored_is_what_the_assistant_writes(name, kind):
    tokenizer = make(TEMPLATES[name], kind)
    for messages in chain.from_iterable(some_chats(seed) for seed in range(6)):
        groups = encoded(tokenizer, messages)
        has_system = messages[0]["role"] == "system"
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        rewrites = name == "drops" or (name == "mistral" and has_system)
        assert len(groups) == (len(answers) if rewrites else 1)
        assert all(("split" in group) == (rewrites and len(answers) > 1) for group in groups)
        assert not any("foreign" in group or "lost" in group for group in groups)
        scored = []
        for k, group in enumerate(groups):
            ids = list(group["completions"][0]["ids"])
            flags = group["completions"][0]["scored"] or [True] * len(ids)
            whole = tokenizer.decode(list(group["prompt"]) + ids)
            end = 2 * (k if len(groups) > 1 else len(answers) - 1) + has_system + 2
            texts = [tokenizer.apply_chat_template(messages[:end] + more, tokenize=False) for more in ([], asks("x"))]
            if name == "mistral" and has_system:  # the prompt is what inference renders, which no finished chat has
                asked = tokenizer.apply_chat_template(messages[: end - 1], tokenize=False)
                texts = [f"{asked} {answers[k]}</s>"]
            written = [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
            assert any(text.startswith(whole.rstrip()) for text in written), (messages, whole, written)
            assert whole.count("\u2026") == texts[0].count("\u2026") or kind != "bytes"
            text = tokenizer.decode([token for token, flag in zip(ids, flags) if flag]).lower()
            scored += re.findall(r"[qas]\d", re.sub(r"\s|##", "", text))
        assert scored == [f"a{k}" for k in range(len(answers))], messages
