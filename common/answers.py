"""Numbers as answers: what a row's column and a completion say, read strictly. What is part of a fraction, a list or a
formula is no number here; `--reward math` reads such answers, too.
"""
import re
from decimal import Decimal

NUMBER = r"[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?"
# What stands right before an answer's number and after it, and what makes it a part of a list, a fraction or a formula.
BEFORE, GOES_ON = r"(?:^|[\s=:\"'`])$", r"(?:[-+/*^(\[{<>\u00d7\u00f7\u2013]|[0-9]|[0-9)\]}][,;:]) ?$"
AFTER = r"%?[.,;:!?)\]\"'`]*(?=\s|$)(?! *[-+/*^(\[{<\\0-9]| +(?:hundred|thousand|million|billion|trillion|dozen|pi)\b)"


def gold_number(gold):
    """Return the number that a column holds, bare or marked as a completion marks it, else None: 3/4, (1, 2) and 5 x
    are not one number."""
    while isinstance(gold, list) and len(gold) == 1 and not isinstance(gold[0], dict):
        gold = gold[0]
    text = last_text(gold)
    marked = marked_answer(text)
    answer = plain(text if marked is None else marked)
    found = re.fullmatch(rf"({NUMBER})%?", answer.removesuffix("."))
    return Decimal(found[1].replace(",", "")) if found else None


def final_number(completion):
    """Return the number that a completion marks as its answer, else the last one in its text. None where that is a part
    of something longer (7/4), or where what is marked holds several numbers."""
    text = last_text(completion)
    marked = marked_answer(text)
    answer = plain(text if marked is None else marked)
    found = list(re.finditer(NUMBER, answer))
    if not found or (marked is not None and len(found) > 1):
        return None
    number = found[-1]
    before, after = answer[: number.start()], answer[number.end() :]
    if re.search(BEFORE, before) and not re.search(GOES_ON, before) and re.match(AFTER, after):
        return Decimal(number[0].replace(",", ""))
    return None


def marked_answer(text):
    """Return what stands in the last \\boxed{} or behind the last ####, whichever comes later, else None."""
    start = max(text.rfind("####"), text.rfind("\\boxed{"))
    if start < 0:
        return None
    if text.startswith("####", start):
        return text[start + 4 :].split("\n")[0]
    start += len("\\boxed{")
    depth = 1
    for brace in re.finditer("[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()]
    return text[start:]


def plain(text):
    """Return text without what LaTeX, Markdown and tags put around a number."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\!", "")
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r" \1", text)  # units
    text = re.sub(r"\\?[$\u20ac\u00a3]|\^\{?\\circ\}?|\u00b0", "", text).replace("\\%", "%")
    return re.sub(r"\*\*|\\[()\[\]]|</?\w+>", " ", text).strip()


def last_text(answer):
    """Return the text of a completion or a column: messages stand for the last of them."""
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict):
        answer = answer[-1].get("content")
    return str(answer)
