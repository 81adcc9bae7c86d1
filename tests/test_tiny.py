"""The tiny lab is what its page says: small, free of leaks, right where it says right, and a model that half-knows."""

import json
import random
import re
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(ROOT / "benchmarks"))
import make_tiny

TINY = ROOT / "common" / "tiny"
TRAIN = ("demonstrations", "pairs", "triples", "labelled", "steps", "prompts")
COLUMNS = {
    "demonstrations": {"prompt", "completion"},
    "pairs": {"prompt", "chosen", "rejected"},
    "triples": {"prompt", "chosen", "rejected", "reference"},
    "labelled": {"prompt", "completion", "label"},
    "steps": {"prompt", "completions", "labels"},
    "prompts": {"prompt", "answer"},
    "privileged": {"prompt", "answer", "privileged_context"},
    "test": {"prompt", "completion", "chosen", "rejected", "completions", "labels", "answer", "privileged_context"},
}
WELL_FORMED = re.compile(r"(\d\+\d(\+1)?=\d{1,2} ){3}#### \d{3,4}")


def load(name):
    return [json.loads(line) for line in (TINY / f"{name}.jsonl").read_text().splitlines()]


def text(messages, role):
    (message,) = messages
    assert set(message) == {"role", "content"} and message["role"] == role
    return message["content"]


def operands(row):
    known = re.fullmatch(r"What is (\d{3}) \+ (\d{3})\?", row.get("privileged_context", text(row["prompt"], "user")))
    return int(known[1]), int(known[2])


def adder(a, b):
    """Addition as taught at school, digit strings only: independent of the generator's arithmetic."""
    columns, result, carry = [], "", False
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = str(int(x) + int(y) + (1 if carry else 0))
        columns.append(x + "+" + y + ("+1" if carry else "") + "=" + total)
        carry = len(total) == 2
        result = total[-1] + result
    result = ("1" if carry else "") + result
    assert int(result) == a + b
    return " ".join([*columns, "####", result])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32).eval()


def test_sizes(model, tokenizer):
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4 * 2**20
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".jinja", ".safetensors"}  # data only
    assert sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.vocab_size == len(tokenizer)
    assert len(load("test")) == 200
    assert all(1500 <= len(load(name)) <= 2000 for name in TRAIN)


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_and_questions(name):
    rows = load(name)
    assert all(set(row) == COLUMNS[name] for row in rows)
    questions = [operands(row) for row in rows]
    assert len(set(questions)) == len(questions)
    if name != "test":
        held = {operands(row) for row in load("test")}
        assert not held & set(questions)


@pytest.mark.parametrize("name", COLUMNS)
def test_right_is_right_and_wrong_is_wrong(name):
    for row in load(name):
        a, b = operands(row)
        gold = adder(a, b)
        assert row.get("answer", str(a + b)) == str(a + b)
        if "chosen" in row:
            wrong = text(row["rejected"], "assistant")
            assert text(row["chosen"], "assistant") == gold
            assert row.get("reference", row["chosen"]) == row["chosen"]
            assert WELL_FORMED.fullmatch(wrong) and int(wrong.split()[-1]) != a + b
        if "completion" in row:
            completion = text(row["completion"], "assistant")
            assert WELL_FORMED.fullmatch(completion)
            assert (completion == gold) is (int(completion.split()[-1]) == a + b) is row.get("label", True)


@pytest.mark.parametrize("name", ("steps", "test"))
def test_steps_and_their_labels(name):
    """Half of the rows are right; in the others at least one step is wrong, and the sum with it."""
    all_right = 0
    for row in load(name):
        gold = adder(*operands(row)).split(" ")
        assert row["labels"] == [step == wanted for step, wanted in zip(row["completions"], gold, strict=True)]
        assert WELL_FORMED.fullmatch(" ".join(row["completions"]))
        all_right += all(row["labels"])
        assert all(row["labels"]) or (not row["labels"][-1] and sum(row["labels"]) <= 3)
    assert all_right == len(load(name)) / 2


def test_privileged_contexts():
    """The same question in the words of pretraining; the prompt of the training rows has others."""
    for name, words in (("privileged", "How much is"), ("test", "What is")):
        for row in load(name):
            assert text(row["prompt"], "user") == row["privileged_context"].replace("What is", words)
    assert len(load("privileged")) == 600


def test_both_labels_are_common():
    labels = [row["label"] for row in load("labelled")]
    assert 0.4 <= sum(labels) / len(labels) <= 0.6


@pytest.mark.parametrize("name", COLUMNS)
def test_tokenizer_round_trips_every_text(tokenizer, name):
    values = [value for row in load(name) for key, value in row.items() if isinstance(value, list) and key != "labels"]
    texts = {m if isinstance(m, str) else m["content"] for value in values for m in value}
    for content in texts:
        ids = tokenizer(content)["input_ids"]
        assert len(ids) == len(content)  # characters, and no special token is added
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == content


def test_tokenizer_knows_ascii_and_only_ascii(tokenizer):
    ascii_text = "".join(map(chr, range(32, 127))) + "\n\t"
    ids = tokenizer(ascii_text)["input_ids"]
    assert tokenizer.decode(ids) == ascii_text and len(set(ids)) == len(ascii_text)
    assert tokenizer("\u00e9\u4e2d")["input_ids"] == [tokenizer.unk_token_id] * 2
    specials = {tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id}
    assert len(specials) == 3 and tokenizer.bos_token_id is None
    for content in (" 1 , 2 ! don't", "  two  spaces  ", "a<|end|>b"):
        assert tokenizer.decode(tokenizer(content)["input_ids"]) == content


def test_chat_template_is_prefix_stable(tokenizer):
    messages = [{"role": "system", "content": "Add."}]
    for i in range(3):
        messages += [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"#### {i}"}]
    ids = [tokenizer.apply_chat_template(messages[:n], return_dict=False) for n in range(1, len(messages) + 1)]
    for n, message in enumerate(messages[:-1], start=1):
        assert ids[n][: len(ids[n - 1])] == ids[n - 1]
        if message["role"] == "user":
            prompt = tokenizer.apply_chat_template(messages[:n], add_generation_prompt=True, return_dict=False)
            content = tokenizer(messages[n]["content"])["input_ids"]
            assert ids[n] == prompt + content + [tokenizer.eos_token_id]  # the end of the turn is the eos
    assert "generation %}" not in tokenizer.chat_template
    with pytest.raises(Exception, match="unknown role"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "7"}])


def test_presets():
    presets = json.loads((TINY / "presets.json").read_text())
    assert {"sft", "dpo", "grpo"} <= set(presets)
    for flags in presets.values():
        assert flags.pop("eval_dataset") in ("tiny:test", "tiny:privileged[500:]")
        assert flags.pop("dataset", "tiny:privileged[:500]") == "tiny:privileged[:500]"
        assert "{" in flags.pop("teacher_prompt_template", "{}") and ":" in flags.pop("rename", ":")
        assert flags.pop("teacher", "tiny") in ("tiny", "tiny:other_teacher", ["tiny"])
        assert flags.pop("step_separator", " ") == " "
        assert all(re.fullmatch("[a-z_]+", name) and isinstance(value, int | float) for name, value in flags.items())


@torch.no_grad()
def test_the_model_half_knows(model, tokenizer):
    rows = load("test")
    template = {"add_generation_prompt": True, "return_dict": False}
    prompts = [tokenizer.apply_chat_template(row["prompt"], **template) for row in rows]
    (length,) = {len(ids) for ids in prompts}  # all of one length, so that a batch needs no padding
    gold = [text(row["completion"], "assistant") + tokenizer.eos_token for row in rows]
    limit = int(1.3 * max(len(tokenizer(answer)["input_ids"]) for answer in gold))

    def decode(ids):
        return [out.replace(tokenizer.pad_token, "") for out in tokenizer.batch_decode(ids[:, length:])]

    greedy = decode(model.generate(torch.tensor(prompts), do_sample=False, max_new_tokens=limit))
    mistakes = [out for out, want in zip(greedy, gold, strict=True) if out != want]
    assert 0.25 <= 1 - len(mistakes) / len(rows) <= 0.45
    well_formed = [out for out in mistakes if WELL_FORMED.fullmatch(out.removesuffix(tokenizer.eos_token))]
    assert len(well_formed) >= 0.8 * len(mistakes) and all(out.endswith(tokenizer.eos_token) for out in well_formed)

    torch.manual_seed(0)
    some = torch.tensor(prompts[:100])
    sampled = decode(model.generate(some, do_sample=True, top_k=0, num_return_sequences=8, max_new_tokens=limit))
    right = torch.tensor([out == gold[i // 8] for i, out in enumerate(sampled)]).view(-1, 8).sum(1)
    assert ((right > 0) & (right < 8)).float().mean() >= 0.5  # something to learn from in most groups
    assert 0.35 <= right.sum() / (8 * len(some)) <= 0.6
    assert sum(not out.endswith(tokenizer.eos_token) for out in sampled) <= 0.01 * len(sampled)


# ---- harder rows -----------------------------------------------------------------------------------------------------


def long_sum(numbers):
    """Addition as taught at school for any number of numbers: a carry is read off the digits of a column's total."""
    columns, result, carry = [], "", ""
    for digits in zip(*(reversed(str(number)) for number in numbers), strict=True):
        terms = [*digits, carry] if carry not in ("", "0") else list(digits)
        total = str(sum(map(int, terms)))
        columns.append("+".join(terms) + "=" + total)
        carry, result = total[:-1], total[-1] + result
    return " ".join([*columns, "####", carry + result])


@pytest.mark.parametrize("digits, summands", [(3, 2), (4, 3), (6, 2)])
def test_rows_of_any_length(digits, summands):
    """What is written out is right, a slip is a well-formed wrong answer, and a carry is forgotten in 65 of 100 cases
    (500 questions: two standard errors of a share are below 0.04)."""
    rng = random.Random(0)
    forgotten = carries = 0
    for _ in range(500):
        numbers = make_tiny.question(rng, digits, summands)
        assert len(numbers) == summands and all(len(str(number)) == digits for number in numbers)
        right, wrong = make_tiny.write_out(*numbers), make_tiny.slipped(*numbers, rng=rng)
        assert right == long_sum(numbers) and int(right.split()[-1]) == sum(numbers)
        assert make_tiny.WELL_FORMED.fullmatch(right) and make_tiny.WELL_FORMED.fullmatch(wrong)
        assert int(wrong.split()[-1]) != sum(numbers)
        if len(right.split()[0].split("=")[1]) == 2:  # the first column has a carry, so the second is to begin with it
            carries += 1
            second = make_tiny.forgetful(*numbers, rng=rng).split()[1]
            forgotten += second.count("+") == summands - 1
    assert forgotten / carries == pytest.approx(make_tiny.FORGET, abs=0.08)
    (message,) = make_tiny.user(*numbers)
    assert message["content"] == f"What is {' + '.join(map(str, numbers))}?"
