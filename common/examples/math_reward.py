"""`--reward math`: 1 where the package math-verify finds the completion's final answer equal to the row's, 0 where not.

It reads LaTeX and plain text: fractions, roots, intervals, sets, units. The row's answer is its column `answer` or
`solution`, a text with or without \\boxed{} or $. None, which is no reward, where math-verify finds no answer in it.
"""
try:
    from math_verify import parse, verify
except ImportError as e:
    raise ImportError("it needs the package math-verify: pip install math-verify") from e


def equal_in_math(prompts, completions, answer=None, solution=None, **_):
    golds = answer or solution or [None] * len(completions)
    rewards = []
    for gold, completion in zip(golds, completions):
        try:
            rewards.append(judge(gold, completion))
        except Exception as e:  # of a parser that reads anything: an odd row costs its own reward only
            print(f"math_reward: a row raised {type(e).__name__}: {str(e)[:200]!a}", flush=True)
            rewards.append(None)
    return rewards


def judge(gold, completion):
    if gold is None:
        return None
    gold = after_mark(str(gold))
    if "$" not in gold and "\\boxed" not in gold:
        gold = f"${gold}$"  # else LaTeX is not seen as such
    wanted = parse(gold)
    if not wanted:
        return None
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return float(verify(wanted, parse(after_mark(text))))


def after_mark(text):
    """Return what the rows of GSM8K call the answer, the rest of the line after the last ####, else the whole text."""
    if "####" not in text:
        return text
    return text.split("####")[-1].strip().split("\n")[0]
