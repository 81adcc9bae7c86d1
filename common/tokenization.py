"""From rows to groups of token ids with scored spans (rows: common/data.py, groups: common/batches.py)."""
import json
import re
import signal
import threading
from array import array
from itertools import groupby
from os.path import commonprefix, isfile  # Path's own raises where a name is too long
from pathlib import Path

from common.batches import predicted_flags
from common.data import Row, columns_of, problem
from common.runtime.flags import COMMON

PATIENCE = 10  # seconds that a chat template may take for one conversation; milliseconds are usual


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
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
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
        _, _, after_answer = render(Row(), tokenizer, None, turns, False, tokenize=False).rpartition("ANSWER")
        ids = tokenizer.encode(after_answer, add_special_tokens=False)
        stops.update([token for token in ids if token in tokenizer.added_tokens_decoder][:1])
    if not stops:
        raise problem(tokenizer.name_or_path, "no token ends a completion", tokenizer.special_tokens_map,
                      "Set eos_token in tokenizer_config.json, or type --chat_template FILE with an end of turn")
    return sorted(stops)


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


def encode_rows(run, rows, encode, tokenizer, stops, **options):
    """Return the groups that `encode`, a function below, makes of all rows, in the order of the rows."""
    template_kwargs = json.loads(run.args.chat_template_kwargs)
    groups = []
    run.unread = run.unread or rows[0].unread  # the set itself: what is read from here on leaves it
    for row in rows:
        made = encode(row, tokenizer, stops, template_kwargs, **options)
        groups += made if isinstance(made, list) else [made]
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


def encode_prompt(row, tokenizer, stops=(), template_kwargs=None):
    """Return a group without completions: what the model sees before its own first token."""
    (prompt,) = columns_of(row, ["prompt"])
    is_text = isinstance(prompt, str)
    ids = encode_text(tokenizer, prompt) if is_text else render(row, tokenizer, template_kwargs, prompt, True)
    if not ids:
        raise problem(row, "no token in column prompt", prompt, "Write a prompt, or --rename old:new")
    return {"prompt": array("i", ids), "completions": [], "row": getattr(row, "index", 0)}


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
