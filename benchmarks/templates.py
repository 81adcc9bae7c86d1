"""
Which chats of a folder of chat templates are trained as the template writes them: a table of template x chat.

    python benchmarks/templates.py --folder DIR --tokenizer DIR [DIR ...]

--folder     files *.jinja, one chat template each
--tokenizer  model folders; the control tokens that a template spells are added to their tokenizers

Each text of a chat holds a word of its own (Q1, A1, R1, ...), so what is scored is known by its words. A cell says
  ok       prompt and scored text are the template's own, each assistant's text is scored once, nobody else's is
  lost     the template leaves out a content, a reasoning or a call of a scored turn, and the row says so (DATA010)
  split    ok, one row a turn, because the template rewrites earlier turns (DATA004)
  refused  the template refuses the chat, or the tokenizer has no token that ends it
  WRONG    anything else: doubled characters, another message's text, a loss that nothing says
The exit code is 1 if a cell says WRONG.
"""

import argparse
import re
import sys
from pathlib import Path

from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.runtime.flags import InputError  # noqa: E402  the repository is on the path only now
from common.tokenization import encode_demonstration, stop_ids  # noqa: E402

CONTROL = re.compile(r"<[|\uff5c][^<>\s'\"+]+?[|\uff5c]>|<(?:start|end)_of_\w+>|</s>|\[/?INST\]|\[gMASK\]|<sop>")
CALL = {"type": "function", "id": "call00001", "function": {"name": "lookup_C1", "arguments": {"place": "Rome C2"}}}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def chats():
    """Return the chats by name. A word of a capital and a digit stands once in a chat: in one text of one message."""
    pair = [turn("user", "What is it? Q1"), turn("assistant", "It is this. A1")]
    more = [turn("user", "And then? Q2"), turn("assistant", "Then that. A2")]
    system = [turn("system", "Be brief. S1")]
    lines = [turn("user", "Code, please. Q1"), turn("assistant", "\n\n    return A1\n")]
    thought = [pair[0], turn("assistant", "It is this. A1", reasoning_content="Let me think. R1")]
    inline = [pair[0], turn("assistant", "<think>\nLet me think. R1\n</think>\n\nIt is this. A1")]
    call = [pair[0], turn("assistant", "", tool_calls=[CALL]), turn("tool", "sunny T1", name="lookup_C1"), more[1]]
    spells = [pair[0], turn("assistant", "The token STOP ends a turn. STOP A1"), *more]
    return {
        "one": pair, "many": pair + more, "system": system + pair, "system, many": system + pair + more,
        "white space": lines, "white space, many": lines + more, "reasoning": thought, "inline reasoning": inline,
        "reasoning, many": thought + more, "tool call": call, "stop token": spells,
    }


def words(text):
    return re.findall(r"[A-Z]\d", text)


def own_words(messages):
    """Return the words that only assistants write, those that others write, and those of all contents."""
    own, others = [], []
    for message in messages:
        said = own if message["role"] == "assistant" else others
        said += words(f"{message['content']} {message.get('reasoning_content', '')} {message.get('tool_calls', '')}")
    return own, [word for word in others if word not in own]


def judge(tokenizer, stops, messages):
    """Return what the cell says of the chat. Nothing here looks into how the groups were made."""
    try:
        groups = encode_demonstration({"messages": messages}, tokenizer, stops)
    except InputError as error:
        return "refused" if "template fails" in str(error) else f"WRONG: {error}"
    texts = []  # what the template writes up to each turn, and to the message after it
    for end, message in enumerate(messages):
        if message["role"] == "assistant":
            texts.append(tokenizer.apply_chat_template(messages[: end + 1], tokenize=False))
            texts.append(tokenizer.apply_chat_template(messages[: end + 2], tokenize=False))
    scored_words = []
    for group in groups:
        (completion,) = group["completions"]
        ids = list(completion["ids"])
        flags = completion["scored"] or [True] * len(ids)
        whole = tokenizer.decode(list(group["prompt"]) + ids)
        answer = tokenizer.decode(ids)
        written = [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        if not any(text.startswith(whole) for text in written):
            # A template that moves a text for the last question: the prompt is its own, and so is the answer.
            before = [tokenizer.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=True)
                      for end in range(1, len(messages)) if messages[end]["role"] == "assistant"]
            prompts = [tokenizer.encode(text, add_special_tokens=False) for text in before]
            if list(group["prompt"]) not in prompts or not any(answer in text for text in written):
                return "WRONG: not the template's text"
        scored_words += words(tokenizer.decode([token for token, flag in zip(ids, flags) if flag]))
    own, others = own_words(messages)
    if set(scored_words) & set(others) or any("foreign" in group for group in groups):
        return "WRONG: another message's text"
    if len(scored_words) != len(set(scored_words)):
        return "WRONG: scored twice"
    is_lost, says_lost = set(own) != set(scored_words), any("lost" in group for group in groups)
    if is_lost != says_lost:
        return f"WRONG: lost {sorted(set(own) - set(scored_words))}, said {says_lost}"
    if is_lost:
        return "lost"
    return "split" if any("split" in group for group in groups) else "ok"


def load(folder, template):
    """Return the tokenizer of the folder with the template, the template's control tokens among its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    missing = {name: token for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"))
               if getattr(tokenizer, name) is None}
    tokenizer.add_special_tokens({**missing, "additional_special_tokens": sorted(set(CONTROL.findall(template)))})
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tokenizer", nargs="+", required=True)
    args = parser.parse_args()
    is_wrong = False
    for folder in args.tokenizer:
        print(f"\n## {Path(folder).name}\n\n| template | {' | '.join(chats())} |\n|---{'|---' * len(chats())}|")
        for path in sorted(args.folder.glob("*.jinja")):
            tokenizer = load(folder, path.read_text(encoding="utf-8"))
            cells = []
            for messages in chats().values():
                try:
                    stops = stop_ids(tokenizer)
                except InputError:
                    cells.append("refused")
                    continue
                stop = tokenizer.decode(stops[-1:])
                messages = [{**message, "content": message["content"].replace("STOP", stop)} for message in messages]
                cells.append(judge(tokenizer, stops, messages))
            is_wrong = is_wrong or any(cell.startswith("WRONG") for cell in cells)
            print(f"| {path.stem} | {' | '.join(cells)} |", flush=True)
    sys.exit(1 if is_wrong else 0)


if __name__ == "__main__":
    main()
