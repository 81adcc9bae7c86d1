"""From rows to groups of token ids with scored spans (rows: common/data.py, groups: common/batches.py)."""
import math
import re
from array import array
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from os.path import commonprefix, isfile  # Path's own raises where a name is too long
from pathlib import Path

from common.batches import predicted_flags
from common.data import Row, columns_of, problem
from common.runtime.flags import COMMON, InputError, spelled_out
from common.templates import render, write_turn


class Panic(InputError):
    """The tokenizers library has failed."""


@contextmanager
def no_panic():
    """Make an Exception of a panic, in a block or a function. The library is written in Rust, whose panics are
    BaseExceptions of a class that cannot be imported: they would pass every handler, in threads and processes, too."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise Panic(f"the tokenizers library fails: {str(error)[:200]!a}. Pass another --model.") from error


def load_tokenizer(path, chat_template=""):
    """Return the tokenizer of a model folder or hub id. chat_template: a FILE of jinja that replaces its template, or
    the name of one of common/chat_templates, for a model without one. Its control tokens must be tokens: spelled in
    pieces, they would end no turn."""
    from transformers import AutoTokenizer  # takes seconds
    is_named = chat_template in ("chatml", "plain") and not isfile(chat_template)
    file = COMMON / "chat_templates" / f"{chat_template}.jinja" if is_named else chat_template
    if chat_template and not isfile(file):
        raise problem(chat_template, "no chat template", "no such file", "Type --chat_template FILE, chatml or plain")
    try:
        with no_panic():
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer.encode, tokenizer.decode = no_panic()(tokenizer.encode), no_panic()(tokenizer.decode)
        if chat_template:
            tokenizer.chat_template = Path(file).read_text(encoding="utf-8")
        begin = tokenizer.encode("a")[:1]  # what is broken inside shows only now
    except Exception as error:  # these loaders raise anything, plain Exception too; the files are input
        raise problem(path, "cannot load the tokenizer", error, "Check --model and --chat_template FILE") from error
    if is_named:
        absent = set(re.findall(r"<\|\w+\|>", tokenizer.chat_template)) - tokenizer.get_added_vocab().keys()
        if absent or tokenizer.eos_token is None:
            raise problem(path, f"--chat_template {chat_template} needs control tokens that the tokenizer lacks",
                          sorted(absent) or "eos_token", "Type --chat_template plain, which ends turns with eos_token")
        if begin == [tokenizer.bos_token_id]:  # it writes BOS before every text
            tokenizer.chat_template = "{{- bos_token }}" + tokenizer.chat_template
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
        _, answer, after_answer = render(Row(), tokenizer, None, turns, False).rpartition("ANSWER")
        control = {added.content: token for token, added in tokenizer.added_tokens_decoder.items()}
        pattern = "|".join(re.escape(text) for text in control if text.strip())
        ending = re.search(f"(?:{pattern})+", after_answer if answer else "")  # some write no content that is a string
        ids = []
        if pattern and ending:
            ids = [control[text] for text in re.findall(pattern, ending.group())]
        if not stops.intersection(ids):  # Command ends an answer, then the turn, and its eos is the second
            stops.update(ids[:1])
    if not stops:
        raise problem(tokenizer.name_or_path, "no token ends a completion", tokenizer.special_tokens_map,
                      "Set eos_token in tokenizer_config.json, or type --chat_template FILE with an end of turn")
    return sorted(stops)


@lru_cache(maxsize=4)
def longest_token(tokenizer):
    """Return the characters of the longest token; a byte of a byte-level vocabulary counts as one."""
    return max(map(len, tokenizer.get_vocab()))


def ids_of(tokenizer, text):
    """Return the ids of a text. Where encode_rows has set tokenizer.most_tokens, the most that a row may have, a text
    of more characters than twice as many of the longest tokens is cut there, since its row will be dropped: tokens take
    up to 180 bytes a character. A normalizer may shrink a text, so the tokens of the beginning decide."""
    most = 2 * getattr(tokenizer, "most_tokens", math.inf)  # twice: where the text is cut, tokens may be others
    if len(text) > most * longest_token(tokenizer):
        beginning = text[: most * longest_token(tokenizer)]
        if any(token.lstrip for token in tokenizer.added_tokens_decoder.values()):
            beginning = beginning.rstrip()  # such a token takes all the white space before it
        ids = tokenizer.encode(beginning, add_special_tokens=False)
        if len(ids) >= most:
            return ids
    return tokenizer.encode(text, add_special_tokens=False)


def encode_text(tokenizer, text):
    """Return the ids of a text that begins a sequence: BOS once if the tokenizer adds it to texts, no EOS."""
    ids = ids_of(tokenizer, text)
    begin = tokenizer.encode("")[:1]
    return begin + ids if begin == [tokenizer.bos_token_id] and ids[:1] != begin else ids


def encode_apart(tokenizer, ids, text):
    """Return ids of the text that decode to it behind the ids, which stay as they are. SentencePiece writes a blank
    before a text that is encoded alone, so the text is encoded behind a lead, too, which is taken off again."""
    alone = ids_of(tokenizer, text)
    as_it_is = {"clean_up_tokenization_spaces": False}
    shown = tokenizer.decode(ids, **as_it_is) + tokenizer.decode(alone, **as_it_is)
    for lead in ("", "\n", ".", "a"):
        begin, found = ids_of(tokenizer, lead), ids_of(tokenizer, lead + text)
        rest = found[len(begin) :]
        both = tokenizer.decode(ids + rest, **as_it_is)
        if found[: len(begin)] == begin and both == shown:
            return rest
    return alone  # from a tokenizer that joins texts by blanks, as WordPiece


def encode_after(tokenizer, ids, before, text):
    """Return ids of the text as it goes on after the text `before`, which has the ids. A control token cuts a text:
    what stands since the last one is all that can merge with what follows, so a long chat is encoded once."""
    control = tokenizer.added_tokens_decoder
    start = anchor = 0  # where the last control token stands in the text, and in the ids
    for index in range(len(ids) - 1, -1, -1):
        if ids[index] in control:
            start, anchor = before.rfind(control[ids[index]].content), index
            break
    known = ids[anchor:] if start >= 0 else ids
    whole = ids_of(tokenizer, before[max(0, start) :] + text)
    if whole[: len(known)] == known:
        return whole[len(known) :]
    return encode_apart(tokenizer, ids, text)  # a token of both would straddle the border


def make_group(row, prompt, ids, scored=None, facts=()):
    """Return a group of one completion. facts: keys, such as "split", that are true of it; see common/README.md."""
    completion = {"ids": array("i", ids), "scored": scored}
    group = {"prompt": array("i", prompt), "completions": [completion], "row": getattr(row, "index", 0)}
    return {**group, **dict.fromkeys(facts, True)}


@lru_cache(maxsize=4)
def control_pattern(tokenizer):
    """Return the pattern of the texts that the tokenizer takes for control tokens, wherever they stand."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, special)) or "(?!)")


def text_facts(tokenizer, prompt, answer=""):
    """Return {"spelled"} if a control token stands in the text, save BOS before it and EOS after it; else {"plain"} if
    there is a prompt that the tokenizer's chat template could write."""
    text = prompt + answer
    text = text.removeprefix(tokenizer.bos_token or "")
    text = text.removesuffix(tokenizer.eos_token or "")
    if control_pattern(tokenizer).search(text):
        return {"spelled"}
    return {"plain"} if prompt and tokenizer.chat_template else set()


def chat_facts(tokenizer, messages):
    spelled = any(control_pattern(tokenizer).search(message["content"]) for message in messages)
    return {"spelled"} if spelled else set()


def encode_turns(tokenizer, parts):
    """Return the prompt's ids, those after it, and which are scored. parts: (text before a turn, its text, facts), all
    of one text."""
    text = parts[0][0]
    prompt = ids_of(tokenizer, text)
    ids, scored = [], []
    for opening, answer, _ in parts:
        between = encode_after(tokenizer, prompt + ids, text, opening[len(text) :])
        ids += between
        written = encode_after(tokenizer, prompt + ids, opening, answer)
        ids += written
        scored += [False] * len(between) + [True] * len(written)
        text = opening + answer
    return prompt, ids, scored if len(parts) > 1 else None


def encode_chat(row, prompt, answer, tokenizer, stops, options, scope):
    """Return groups with the answer's assistant turns (scope "last": the last one) scored, each to its stop token: one
    group if the template only ever appends, else one a turn, as it is at inference, marked "split". A message with
    weight 0 or train false is not scored."""
    messages = answer if answer[: len(prompt)] == prompt else prompt + answer  # some data repeat the prompt
    first = max(len(prompt), 1)
    turns = [k for k in range(first, len(messages)) if messages[k]["role"] == "assistant"]
    if not turns or (prompt and turns[0] != len(prompt)):
        raise problem(row, "no assistant turn after the prompt", messages, "Let an assistant's message follow a user's")
    turns = [k for k in turns if messages[k].get("weight") != 0]
    turns = [k for k in turns if messages[k].get("train") is not False]
    if not turns:
        return [make_group(row, [], [])]  # without a scored token: dropped and counted
    if scope == "last":
        turns = turns[-1:]
    parts = [write_turn(row, tokenizer, stops, options, messages, turn) for turn in turns]
    last_opening, last_text, _ = parts[-1]
    whole = last_opening + last_text
    facts = chat_facts(tokenizer, messages)
    only_appends = True
    end = 0  # of the turn before
    for opening, text, facts_of_turn in parts:
        facts |= facts_of_turn
        only_appends = only_appends and len(opening) >= end and whole.startswith(opening + text)
        end = len(opening + text)
    if only_appends:
        return [make_group(row, *encode_turns(tokenizer, parts), facts)]
    return [make_group(row, *encode_turns(tokenizer, [part]), facts | {"split"}) for part in parts]


def encode_answers(row, prompt, answers, tokenizer, stops, options, scope="all", implicit=False):
    """Return the groups of all answers, at least one of each. prompt and answers: text, or messages. implicit: the
    prompt is the text that the answers share; it may end inside a word, so it ends where all tokenisations agree."""
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
    wholes = [encode_text(tokenizer, prompt + answer) for answer in answers]
    if implicit:
        prompt_ids = commonprefix([prompt_ids, *wholes])
    for answer, ids in zip(answers, wholes):  # SentencePiece adds a space to a text that stands alone
        straddles = ids[: len(prompt_ids)] != prompt_ids  # a token of both
        ids = encode_apart(tokenizer, prompt_ids, answer) if straddles else ids[len(prompt_ids) :]
        if not ids or ids[-1] not in stops:
            ids.append(stops[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id)
        groups.append(make_group(row, prompt_ids, ids, None, text_facts(tokenizer, prompt, answer)))
    return groups


def encode_demonstration(row, tokenizer, stops, template_kwargs=None, scope="all"):
    """Return groups of one completion. Scored: assistant turns (scope "all" | "last"), the completion, or all text."""
    *before, answer = columns_of(row, ["messages"], ["conversations"], ["prompt", "completion"], ["text"])
    prompt = before[0] if before else type(answer)()  # an empty text, or no messages
    return encode_answers(row, prompt, [answer], tokenizer, stops, template_kwargs, scope)


def encode_preference(row, tokenizer, stops, template_kwargs=None):
    """Return a group with the completions [chosen, rejected]; without a column prompt it is what both begin with."""
    *before, chosen, rejected = columns_of(row, ["prompt", "chosen", "rejected"], ["chosen", "rejected"])
    if before:
        prompt = before[0]
        are_texts = all(isinstance(text, str) for text in (prompt, chosen, rejected))
        if are_texts and " " in prompt.strip() and chosen.startswith(prompt) and rejected.startswith(prompt):
            raise problem(row, "chosen and rejected repeat the prompt", prompt, "Type --rename prompt:question")
    else:
        length, shorter = 0, min(len(chosen), len(rejected))
        while length < shorter and chosen[length] == rejected[length]:
            length += 1
        if isinstance(chosen, list):
            length = min(length, shorter - 1)  # a completion needs a message
        else:
            length = len(chosen[:length].removesuffix(" "))  # a space goes with the word after it
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
        if prompt == []:
            raise problem(row, "chosen and rejected begin with no common message", chosen, "Add a column prompt")
    groups = encode_answers(row, prompt, [chosen, rejected], tokenizer, stops, template_kwargs, implicit=not before)
    if len(groups) > 2:
        raise problem(row, "the template rewrites earlier turns of an answer that has several", chosen,
                      "Keep one assistant turn in chosen and rejected, or type --chat_template FILE")
    prompts = [list(group["prompt"]) for group in groups]
    shared = commonprefix(prompts)  # they differ where a template opens one answer otherwise, with reasoning for one
    if not before and isinstance(prompt, str) and shared == encode_text(tokenizer, ""):
        raise problem(row, "chosen and rejected begin with no common text", chosen, "Add a column prompt")
    completions = []
    for group, begin in zip(groups, prompts):
        (completion,) = group["completions"]
        moved = begin[len(shared) :]
        scored = completion["scored"] and [True] * len(moved) + completion["scored"]
        completions.append({"ids": array("i", moved) + completion["ids"], "scored": scored})
    if completions[0]["ids"] == completions[1]["ids"]:
        groups[0]["equal"] = True
    return {**groups[1], **groups[0], "prompt": array("i", shared), "completions": completions}


def encode_labelled(row, tokenizer, stops, template_kwargs=None):
    """Return groups of one completion, or of a row with a pair instead of a label the group of both."""
    if "chosen" in row and "label" not in row:
        return encode_preference(row, tokenizer, stops, template_kwargs)
    return encode_demonstration(row, tokenizer, stops, template_kwargs)


def encode_prompt(row, tokenizer, stops=(), template_kwargs=None):
    """Return a group without completions: what the model sees before its own first token."""
    (prompt,) = columns_of(row, ["prompt"])
    if isinstance(prompt, str):
        ids, facts = encode_text(tokenizer, prompt), text_facts(tokenizer, prompt)
    else:
        ids = ids_of(tokenizer, render(row, tokenizer, template_kwargs, prompt, True))
        facts = chat_facts(tokenizer, prompt)
    if not ids:
        raise problem(row, "no token in column prompt", prompt, "Write a prompt, or --rename old:new")
    return {**make_group(row, ids, (), None, facts), "completions": []}


def visible_text(tokenizer, ids, limit):
    """Return the ids' text without control characters, escaped, and beyond the limit without its middle."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False)
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
    return spelled_out(text)


def token_picture(group, tokenizer, color=True):
    """Return the group as text: prompt dim, scored tokens green (without color >>so<<), the rest plain."""
    dim, green, plain = "\x1b[2m{}\x1b[0m", "\x1b[32m{}\x1b[0m", "\x1b[0m{}\x1b[0m"
    if not color:
        dim, green, plain = "{}", ">>{}<<", "{}"
    picture = dim.format(visible_text(tokenizer, group["prompt"], limit=400))
    for completion in group["completions"]:
        if len(group["completions"]) > 1:
            picture += "\n  "
        tokens = zip(completion["ids"], predicted_flags(group, completion))
        for is_scored, pairs in groupby(tokens, key=itemgetter(1)):
            text = visible_text(tokenizer, [token for token, _ in pairs], limit=1600)
            picture += (green if is_scored else plain).format(text)
    return picture
