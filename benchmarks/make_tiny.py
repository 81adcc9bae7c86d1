"""Make common/tiny: a character-level chat model that half-knows addition, and data for every family of methods.

    python benchmarks/make_tiny.py --out common/tiny --seed 0
    python benchmarks/make_tiny.py --out DIR --digits 6 --start common/tiny/model --steps 400

The task    "What is 347 + 285?" -> "7+5=12 4+8+1=13 3+2+1=6 #### 632": the columns from right to left, a carry as "+1",
            then the sum after "####". Every question has one right completion, so accuracy needs no judge.
The model   is pretrained on questions that never end in a file, by a writer who forgets each carry with probability
            FORGET, and then calculates on correctly. Random typing errors would vanish under greedy decoding; a habit
            does not. Greedy decoding therefore forgets every carry (only the ~30 % of questions without one come out
            right), while samples remember a carry in 35 of 100 cases: there is something to reinforce and something to
            prefer, and nearly all mistakes are well-formed answers.
The data    the same TRAIN questions in every train file, so that methods are compared on equal knowledge:
            demonstrations (right), pairs (right over slipped), triples (the right one again, as reference), labelled
            (right and slipped in turn), steps (the same, cut at blanks, each step with a label: as it should be or
            not), prompts (answer only), privileged (the first PRIVILEGED questions in words that the model does not
            know, with the words that it knows as privileged_context), and TEST held-out questions with all columns.

The teacher is the model after methods/sft.py with no flags, in bfloat16: it adds right. `--only teacher` makes it
            alone, from the model that is there, in half a minute.
other_teacher has tokens of one or two characters, half the width, and was pretrained on right answers: for methods
            that learn across tokenizers. `--only other_teacher` makes it alone, in a few minutes.

The second command makes the harder lab of benchmarks/ladder.py: the same task in longer rows, where hardly a question
comes without a carry. Its model is the tiny lab's, pretrained further on such rows by the same forgetful writer.

presets.json, the flags that the scripts use on all this, is not made here: it is edited by hand.
Deterministic on one machine with one set of library versions. Takes about four minutes on one core.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FORGET = 0.65  # above one half: the habit wins under greedy decoding; well below one: most groups of samples are mixed
TRAIN, TEST = 1500, 200
PRIVILEGED = 600  # rows with a context that only a teacher sees
STEPS, BATCH, LEARNING_RATE, WARMUP = 1000, 64, 3e-3, 50
# Tokens of two characters that the other teacher has. None where a carry is decided, after the digits of a column: what
# a token means that only one of two models has, distillation across tokenizers cannot compare.
PAIRS = ["Wh", "at", "is", "##", "+ "]

PAD, UNK, END, SYSTEM, USER, ASSISTANT = SPECIAL = "<|pad|> <|unk|> <|end|> <|system|> <|user|> <|assistant|>".split()
WELL_FORMED = re.compile(r"(\d(\+\d)+=\d{1,2} )+#### \d{3,}")
# A conversation's tokens are a prefix of those of its continuation, so an assistant turn can be found by difference.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{ raise_exception('unknown role ' + message['role']) }}
{%- endif -%}
{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""


# ---- the task --------------------------------------------------------------------------------------------------------


def write_out(*numbers, remembered=lambda column, carry: carry):
    """The written sum of numbers that have equally many digits; remembered(column, carry) is what the writer makes of a
    carry into a column."""
    columns = len(str(numbers[0]))
    parts, result, carry = [], "", 0
    for column in range(columns):
        digits = [number // 10**column % 10 for number in numbers]
        carry = remembered(column, carry)
        total = sum(digits) + carry
        shown = digits + [carry] if carry else digits
        parts.append(f"{'+'.join(map(str, shown))}={total}")
        result = (str(total % 10) if column < columns - 1 else str(total)) + result
        carry = total // 10
    return " ".join(parts) + " #### " + result


def forgetful(*numbers, rng):
    """The pretraining writer: each carry is forgotten with probability FORGET, and what follows agrees with that."""
    return write_out(*numbers, remembered=lambda column, carry: carry if carry and rng.random() >= FORGET else 0)


def slipped(*numbers, rng):
    """A well-formed wrong answer: the writer's own slip or, where there is no carry to forget, an invented one."""
    right = write_out(*numbers)
    if write_out(*numbers, remembered=lambda column, carry: 0) == right:
        where = rng.choice(range(1, len(str(numbers[0]))))
        return write_out(*numbers, remembered=lambda column, carry: int(column == where))
    while (wrong := forgetful(*numbers, rng=rng)) == right:
        pass
    return wrong


def steps_and_labels(text, right):
    """The steps of an answer and whether each is what stands in its place in the right one, as columns of a row."""
    steps, right_steps = text.split(" "), right.split(" ")
    labels = [step == right_step for step, right_step in zip(steps, right_steps, strict=True)]
    return {"completions": steps, "labels": labels}


def question(rng, digits=3, summands=2):
    """A question's numbers, as a tuple."""
    return tuple(rng.randint(10 ** (digits - 1), 10**digits - 1) for _ in range(summands))


def user(*numbers):
    return [{"role": "user", "content": f"What is {' + '.join(map(str, numbers))}?"}]


def reworded(*numbers):
    """The question in words that pretraining has never seen: the writer is lost."""
    return [{"role": "user", "content": f"How much is {' + '.join(map(str, numbers))}?"}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def make_data(out, rng, digits=3, summands=2):
    """Writes the jsonl files; returns the set of all their questions, and the test questions."""
    questions = []
    while len(questions) < TRAIN + TEST:
        if (numbers := question(rng, digits, summands)) not in questions:
            questions.append(numbers)
    names = ("demonstrations", "pairs", "triples", "labelled", "steps", "prompts", "privileged", "test")
    files = {name: [] for name in names}
    for i, numbers in enumerate(questions):
        prompt, answer = user(*numbers), str(sum(numbers))
        right_text, wrong_text = write_out(*numbers), slipped(*numbers, rng=rng)
        right, wrong = assistant(right_text), assistant(wrong_text)
        steps = steps_and_labels(wrong_text if i % 2 else right_text, right_text)
        if i >= TRAIN:
            row = {"prompt": prompt, "completion": right, "chosen": right, "rejected": wrong, "answer": answer}
            files["test"].append(row | steps | {"privileged_context": prompt[0]["content"]})
            continue
        files["demonstrations"].append({"prompt": prompt, "completion": right})
        files["pairs"].append({"prompt": prompt, "chosen": right, "rejected": wrong})
        files["triples"].append({"prompt": prompt, "chosen": right, "rejected": wrong, "reference": right})
        files["labelled"].append({"prompt": prompt, "completion": wrong if i % 2 else right, "label": i % 2 == 0})
        files["steps"].append({"prompt": prompt} | steps)
        files["prompts"].append({"prompt": prompt, "answer": answer})
        known = {"privileged_context": prompt[0]["content"], "answer": answer}
        if len(files["privileged"]) < PRIVILEGED:
            files["privileged"].append({"prompt": reworded(*numbers)} | known)
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return set(questions), questions[TRAIN:]


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def make_tokenizer(pairs=()):
    """One token per character, as BPE without merges has it; and a token for each of the pairs."""
    characters = ["\n", "\t"] + [chr(code) for code in range(32, 127)]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *pairs, *characters])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair) for pair in pairs], unk_token=UNK))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, unk_token=UNK, eos_token=END, chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False, model_max_length=512, padding_side="left",
    )  # fmt: skip


# ---- model -----------------------------------------------------------------------------------------------------------


def make_model(tokenizer, width=128):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def prompt_text(tokenizer, *numbers):
    return tokenizer.apply_chat_template(user(*numbers), tokenize=False, add_generation_prompt=True)


def encode(tokenizer, texts):
    """Texts as right-padded ids, and which of them are the assistant's: the text after its mark, with its <|end|>."""
    rows = [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    spoken = (ids == tokenizer.convert_tokens_to_ids(ASSISTANT)).cumsum(1).bool()
    spoken = spoken & (ids != tokenizer.convert_tokens_to_ids(ASSISTANT)) & (ids != tokenizer.pad_token_id)
    return ids, spoken


def pretrain(model, tokenizer, held, rng, *, steps=STEPS, digits=3, summands=2, writer=forgetful):
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    start = time.time()
    for step in range(steps):
        texts = []
        while len(texts) < BATCH:
            numbers = question(rng, digits, summands)
            if numbers not in held:
                texts.append(prompt_text(tokenizer, *numbers) + writer(*numbers, rng=rng) + END)
        ids, spoken = encode(tokenizer, texts)
        logits = model(input_ids=ids[:, :-1]).logits  # right padding: causal attention needs no mask
        loss = torch.nn.functional.cross_entropy(logits[spoken[:, 1:]], ids[:, 1:][spoken[:, 1:]])
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * cosine
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)


@torch.no_grad()
def complete(model, tokenizer, questions, samples=0):
    """Completions up to and including <|end|>: the greedy one of each question, or so many samples in sequence."""
    texts = [prompt_text(tokenizer, *numbers) for numbers in questions]
    inputs = tokenizer(texts, return_tensors="pt", add_special_tokens=False)
    longest = max(len(write_out(*numbers)) + 1 for numbers in questions)
    ways = {"do_sample": True, "top_k": 0, "num_return_sequences": samples} if samples else {"do_sample": False}
    ids = model.generate(**inputs, max_new_tokens=int(1.3 * longest), **ways)[:, inputs["input_ids"].shape[1] :]
    return [text.replace(PAD, "") for text in tokenizer.batch_decode(ids)]


def measure(model, tokenizer, questions):
    gold = [write_out(*numbers) + END for numbers in questions]
    greedy = complete(model, tokenizer, questions)
    drawn = complete(model, tokenizer, questions, samples=8)
    right = [[drawn[8 * i + k] == gold[i] for k in range(8)] for i in range(len(gold))]
    wrong = [text for text, want in zip(greedy, gold, strict=True) if text != want]
    wrong_drawn = [text for i, text in enumerate(drawn) if text != gold[i // 8]]

    def formed(texts):
        return sum(bool(WELL_FORMED.fullmatch(text.removesuffix(END))) and END in text for text in texts) / len(texts)

    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "greedy accuracy": 1 - len(wrong) / len(gold),
        "sampled accuracy": sum(map(sum, right)) / len(drawn),
        "mixed groups of 8": sum(0 < sum(row) < 8 for row in right) / len(gold),
        "greedy mistakes well-formed": formed(wrong),
        "sampled mistakes well-formed": formed(wrong_drawn),
        "samples without an end": sum(END not in text for text in drawn) / len(drawn),
    }


# ---- teacher ---------------------------------------------------------------------------------------------------------


def make_teacher(out, seed):
    """Train out/model by methods/sft.py with the flags of its preset, and write out/teacher."""
    root = Path(__file__).resolve().parents[1]
    flags = json.loads((root / "common" / "tiny" / "presets.json").read_text())["sft"]
    flags |= {"model": out / "model", "dataset": out / "demonstrations.jsonl", "eval_dataset": out / "test.jsonl"}
    flags |= {"seed": seed, "save_dtype": "bfloat16"}
    shutil.rmtree(out / "teacher", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, root / "methods" / "sft.py", "--output_dir", run]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, check=True, env=environment)
        (run / "final" / "README.md").unlink()  # it names the temporary folder
        shutil.copytree(run / "final", out / "teacher")
    (out / "teacher" / "model.safetensors").chmod(0o644)


def right(*numbers, rng):
    return write_out(*numbers)


def make_other_teacher(out, seed):
    """Write out/other_teacher: a small model, pretrained on right answers, whose tokens are others than out/model's. It
    is for methods that learn across tokenizers."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    held = set()
    for name in ("prompts", "test"):
        for line in (out / f"{name}.jsonl").read_text().splitlines():
            (message,) = json.loads(line)["prompt"]
            held.add(tuple(map(int, re.findall(r"\d+", message["content"]))))
    tokenizer = make_tokenizer(PAIRS)
    model = make_model(tokenizer, width=64)
    pretrain(model, tokenizer, held, random.Random(seed), steps=700, writer=right)
    save(model, tokenizer, out / "other_teacher")


def save(model, tokenizer, folder):
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


# ---- main ------------------------------------------------------------------------------------------------------------


TEACHERS = {"teacher": make_teacher, "other_teacher": make_other_teacher}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("common/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(TEACHERS), help="make this, and leave the rest as it is")
    parser.add_argument("--digits", type=int, default=3, help="of every number; 3")
    parser.add_argument("--summands", type=int, default=2, help="of every question; 2")
    parser.add_argument("--start", default="", help="folder of a model to pretrain further; a new model")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of pretraining; {STEPS}")
    args = parser.parse_args()
    if args.only:
        TEACHERS[args.only](args.out, args.seed)
        return
    torch.set_num_threads(1)  # another number of threads adds up in another order, and ends at other weights
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    held, test = make_data(args.out, rng, args.digits, args.summands)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    if args.start:
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    pretrain(model, tokenizer, held, rng, steps=args.steps, digits=args.digits, summands=args.summands)
    save(model, tokenizer, args.out / "model")
    model = LlamaForCausalLM.from_pretrained(args.out / "model", dtype=torch.float32)  # what the scripts will load
    for name, value in measure(model, tokenizer, test).items():
        print(f"{name:30s} {value:.3f}" if isinstance(value, float) else f"{name:30s} {value}")
    for make in TEACHERS.values():
        make(args.out, args.seed)


if __name__ == "__main__":
    main()
