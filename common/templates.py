"""From messages to the texts of a chat template: what stands before a turn, and the turn itself."""
import json
import re
import signal
import threading
from os.path import commonprefix

from common.data import REASONING, problem
from common.runtime.flags import InputError

PATIENCE = 10  # seconds that a chat template may take for one conversation; milliseconds are usual


class Refusal(InputError):
    """The chat template refuses a row: the others may be right."""


def expire(*_):
    raise TimeoutError(f"no end after {PATIENCE} seconds")


def render(row, tokenizer, options, messages, generation):
    """Return the text of the messages in the chat template, with the beginning of an assistant's turn after them if
    generation. The row's columns tools and chat_template_kwargs, values or JSON, go before the options."""
    if not tokenizer.chat_template:
        raise problem(row, "messages, but the tokenizer has no chat template", messages, "Type --chat_template FILE")
    try:
        columns = row.get("tools"), row.get("chat_template_kwargs")
        tools, extra = [json.loads(value) if isinstance(value, str) else value for value in columns]
        special = {*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, *tokenizer.special_tokens_map}.intersection(extra or ())
        if special:  # the template would take a row's text for them
            raise ValueError(f"chat_template_kwargs sets {', '.join(special)}")
        can_limit = threading.current_thread() is threading.main_thread()  # no other thread (rewards) can set an alarm
        if can_limit:
            signal.signal(signal.SIGALRM, expire)
            signal.setitimer(signal.ITIMER_REAL, PATIENCE, 0.1)  # again and again: jinja swallows it in constants
        try:
            text = tokenizer.apply_chat_template(  # spelled out: what a row must not replace
                messages, tools=tools, chat_template=None, add_generation_prompt=generation, tokenize=False,
                continue_final_message=False, **{**(options or {}), **(extra or {})})
        finally:
            if can_limit:
                signal.setitimer(signal.ITIMER_REAL, 0)
        if len(text) > 2**24:
            raise ValueError(f"it writes {len(text)} characters")
        text.encode()  # fails where no tokenizer could take the text
        return text
    except Exception as error:  # a template is a program of its own, and may raise anything
        kind = InputError if isinstance(error, TimeoutError) else Refusal
        fix = "Fix the row, or type --chat_template FILE"
        raise problem(row, "the chat template fails", error, fix, kind) from error


def own_texts(message):
    """Return the texts that a message itself brings, in the order in which templates write them."""
    texts = [message[key] for key in REASONING if isinstance(message.get(key), str)]
    texts.append(message["content"])
    values = [message.get("tool_calls")]
    while values:
        value = values.pop(0)
        if isinstance(value, dict):
            values = [item for key, item in value.items() if key not in ("id", "type", "index")] + values
        elif isinstance(value, list):
            values = value + values
        elif isinstance(value, str):
            texts.append(value)
    return [text.strip() for text in texts if text.strip()]


def is_written(text, whole):
    """Return whether the whole holds the text, as it is or as JSON spells it; templates set white space anew."""
    spellings = text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]
    return text in whole or any("".join(spelling.split()) in "".join(whole.split()) for spelling in spellings)


def holds_other(messages, text, start, own):
    """Return whether the text from start on holds the end of one of the messages, which the text before then lacks.
    What the turn's own content says, too, is its own."""
    contents = [message["content"].strip() for message in messages]
    for content in contents:
        if content in own:
            continue
        is_near = content in text[max(0, start - len(content) + 1) :]
        if is_near and text.count(content, 0, start) < contents.count(content):
            return True
    return False


def end_of_turn(message, text, stop_pattern):
    """Return where the text of the message's turn ends: after the first stop token behind all that the message itself
    says, since it may speak of stop tokens. None without one."""
    said = 0
    for own in own_texts(message):
        for piece in re.split(f"(?={stop_pattern})", own):  # in pieces: templates take <think> out of a content
            piece = piece.strip()
            if piece not in text[said:]:
                piece = json.dumps(piece, ensure_ascii=False)[1:-1]
            said = max(said, text.find(piece, said) + len(piece)) if piece in text[said:] else said
    stop = re.compile(stop_pattern).search(text, said)
    return stop.end() if stop else None


def write_turn(row, tokenizer, stops, options, messages, turn):
    """Return the text before messages[turn], the text of this turn to its stop token, and facts about them. The first
    is what inference renders; where the template writes a turn otherwise than it opens one (with reasoning in a block
    that the opening has closed), it ends where the two differ."""
    stop_pattern = "|".join(re.escape(tokenizer.decode([stop])) for stop in stops)
    earlier, message = messages[:turn], messages[turn]
    before = render(row, tokenizer, options, earlier, True)
    whole = render(row, tokenizer, options, messages[: turn + 1], False)
    start = len(before) if whole.startswith(before) else len(commonprefix([before, whole]))
    opening = whole[:start]
    if start < len(before) and not whole.startswith(render(row, tokenizer, options, earlier, False)):
        # Mistral writes the system's text into a question, but only while that is the last message.
        question = earlier[-1]["content"].strip()
        asked = before[before.rfind(question) :] if question in before else ""
        if asked and asked in whole:
            opening, start = before, whole.rfind(asked) + len(asked)
    facts = {"foreign"} if holds_other(earlier, whole, start, message["content"]) else set()
    text = whole[start:]
    end = end_of_turn(message, text, stop_pattern)
    if end is None:  # GLM-4 ends a turn with the token of the next role
        following = messages[turn + 1 : turn + 2] or [{"role": "user", "content": "QUESTION"}]
        longer = render(row, tokenizer, options, messages[: turn + 1] + following, False)
        stop = re.match(rf"\s*({stop_pattern})", longer.removeprefix(whole))
        text += stop.group() if stop else ""
    else:
        text = text[:end]
    for own in own_texts(message):
        begin = max(0, len(opening) - len(own) + 1)  # the opening may hold the <think> of a content already
        if not is_written(own, opening[begin:] + text):
            facts.add("lost")
    return opening, text, facts
