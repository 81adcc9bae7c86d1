"""
The scripts on a real model and real data, on the CPU: SmolLM2-135M-Instruct and GSM8K.

    python benchmarks/real_runs.py --model DIR --data DIR [--work DIR] [part ...]

--model  a Hugging Face folder of SmolLM2-135M-Instruct
--data   a folder with gsm8k_train.jsonl, gsm8k_test.jsonl (question, answer) and gsm8k_example_model_solutions.jsonl
         (per question four model solutions with is_correct), all from openai/grade-school-math (MIT)

Parts: sft, sft_bfloat16, dpo, cold, grpo, grpo_gsm8k, reward and kto run one script each and leave run.json and
metrics.jsonl in benchmarks/results/smollm2-<part>/. A part that was stopped goes on where it was; one that is finished
is skipped. orpo and simpo, experimental scripts, take dpo's pairs, steps and learning rate. In distillation a student
of every second layer of SmolLM2 (made here, in DIR/half of --work) learns from SmolLM2 on its own completions of GSM8K
questions. It writes no stop token at first, so --allow GRPO002. GSM8K accuracy is 0 throughout and says nothing; the
held-out divergence does. It is --beta 0, KL(teacher || student): by the reverse KL, the default, such a student, whose
text is no language at first, learned within fifteen steps to write nothing but line breaks (TEACH003 at step 16).
SmolLM2 cannot add three-digit numbers, so GRPO on the tiny lab's questions starts from `cold`, a short SFT on the tiny
lab's demonstrations: groups then hold right and wrong answers.

dpo_interval and reward_interval bootstrap over held-out questions what the trained model makes of them: the mean
margin; pair accuracy, and beside it that of a ranker, trained on the same pairs, that sees only which words, numbers
and signs a solution has and how often. reward and kto take the 560 shortest of the 731 questions that have a right and
a wrong solution, since the CPU pays by the token. Of 200 of them all pairs are held out; of each other one pair, drawn
at random, is trained on (kto: its two solutions are rows with a label, no pair).

orpo_interval and simpo_interval do the same for how much farther apart, in nats, training has moved the two
log-likelihoods of a held-out question: log pi(chosen) - log pi(rejected), less the same of the starting model, which is
dpo's margin over beta.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU is what this is about
ROOT = Path(__file__).resolve().parent.parent
PARTS = (
    "sft", "sft_bfloat16", "dpo", "dpo_interval", "cold", "grpo", "grpo_gsm8k", "reward", "reward_interval", "kto",
    "distillation", "orpo", "orpo_interval", "simpo", "simpo_interval",
)  # fmt: skip
HELD_OUT = 120  # questions with a right and a wrong solution that DPO never trains on
RANKED, TRAINED = 200, 360  # the same for reward and kto, and the questions that they train on
DRAWS = 10_000  # of a bootstrap


def both_kinds(row):
    """-> the right and the wrong solutions of a question, of the worst model first, calculator marks removed."""
    answers = [v for v in row.values() if isinstance(v, dict)]
    return [[re.sub(r"<<.*?>>", "", a["solution"]).strip() for a in answers if a["is_correct"] is kind]
            for kind in (True, False)]


def preference(question, chosen, rejected):
    return {"prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}]}


def pairs(solutions):
    """One pair per question: the right solution of the best model that has one, the wrong one of the worst, calculator
    marks removed; the shorter half of the pairs, since the CPU pays by the token."""
    found = []
    for row in solutions:
        right, wrong = both_kinds(row)
        if right and wrong:
            found.append(preference(row["question"], right[-1], wrong[0]))
    found.sort(key=lambda pair: sum(len(messages[0]["content"]) for messages in pair.values()))
    return found[: len(found) // 2]


def ranking(solutions):
    """-> training pairs, one of each of TRAINED questions, drawn at random among its right and its wrong solutions; and
    all pairs of RANKED other questions."""
    draw = random.Random(0)
    questions = [(row["question"], *both_kinds(row)) for row in solutions]
    questions = sorted((q for q in questions if q[1] and q[2]), key=lambda q: len("".join([q[0], *q[1], *q[2]])))
    questions = questions[: RANKED + TRAINED]
    draw.shuffle(questions)
    train = [preference(q, draw.choice(right), draw.choice(wrong)) for q, right, wrong in questions[RANKED:]]
    heldout = [preference(q, r, w) for q, right, wrong in questions[:RANKED] for r in right for w in wrong]
    draw.shuffle(heldout)  # the script itself looks at the first of them only
    return train, heldout


def unpaired(rows):
    """Pairs -> labelled rows in random order."""
    rows = [{"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
            for pair in rows for name in ("chosen", "rejected")]
    random.Random(0).shuffle(rows)
    return rows


def prepare(data, work):
    def rows(name):
        return [json.loads(line) for line in (data / name).read_text().splitlines()]

    def write(name, items):
        (work / name).write_text("".join(json.dumps(item) + "\n" for item in items))

    for split in "train", "test":
        chats = [(r["question"], re.sub(r"<<.*?>>", "", r["answer"])) for r in rows(f"gsm8k_{split}.jsonl")]
        write(f"sft_{split}.jsonl", [{"prompt": [{"role": "user", "content": q}],
                                      "completion": [{"role": "assistant", "content": a}]} for q, a in chats])
        write(f"prompts_{split}.jsonl", [{"prompt": [{"role": "user", "content": q}], "answer": a} for q, a in chats])
    solutions = rows("gsm8k_example_model_solutions.jsonl")
    both = pairs(solutions)
    random.Random(0).shuffle(both)
    write("pairs_test.jsonl", both[:HELD_OUT])
    write("pairs_train.jsonl", both[HELD_OUT:])
    for split, ranked in zip(("train", "test"), ranking(solutions)):
        write(f"ranked_{split}.jsonl", ranked)
        write(f"labelled_{split}.jsonl", unpaired(ranked))


def commands(model, work):
    """Sizes for two cores, which train about 100 tokens of this model a second."""
    few = "--save_every 10 --keep_last 1 --tokens_per_microbatch 1024"
    gsm8k, tiny = f"--model {model} --max_length 400", f"--model {model} --max_length 128"
    pairs_of_dpo = (f"{gsm8k} --dataset {work}/pairs_train.jsonl --eval_dataset {work}/pairs_test.jsonl "
                    f"--eval_rows {HELD_OUT} --eval_every 0 --max_steps 40 --batch_size 6 --learning_rate 1e-5 {few}")
    sft = (f"sft.py {gsm8k} --dataset {work}/sft_train.jsonl --eval_dataset {work}/sft_test.jsonl --eval_rows 24 "
           f"--eval_every 0 --max_steps 60 --batch_size 2 --learning_rate 2e-5 {few}")
    return {
        "sft": sft,
        "sft_bfloat16": f"{sft} --dtype bfloat16",
        "dpo": f"dpo.py {gsm8k} --dataset {work}/pairs_train.jsonl --eval_dataset {work}/pairs_test.jsonl "
               f"--eval_rows {HELD_OUT} --eval_every 0 --max_steps 40 --batch_size 6 --learning_rate 1e-5 {few}",
        "cold": f"sft.py {tiny} --dataset tiny --eval_dataset tiny:test --eval_rows 32 --eval_every 0 --max_steps 30 "
                f"--batch_size 12 --learning_rate 2e-4 {few}",
        "grpo": f"grpo.py --model {work}/cold/final --max_length 128 --dataset tiny --eval_dataset tiny:test "
                "--eval_rows 64 --eval_samples 0 --eval_every 0 --max_completion_length 48 --max_steps 40 "
                f"--batch_size 8 --num_generations 8 --learning_rate 5e-6 --lr_scheduler_type constant {few}",
        "grpo_gsm8k": f"grpo.py --model {work}/sft/final --max_length 400 --dataset {work}/prompts_train.jsonl "
                      "--max_completion_length 160 --max_steps 3 --batch_size 2 --num_generations 4 "
                      f"--reward accuracy format --reward_weights 1.0 0.1 --learning_rate 1e-6 {few}",
        "reward": f"reward.py --model {model} --dataset {work}/ranked_train.jsonl "
                  f"--eval_dataset {work}/ranked_test.jsonl --eval_rows 64 --eval_every 0 --num_train_epochs 1 "
                  f"--batch_size 8 --warmup_steps 6 --learning_rate 5e-5 {few}",
        "kto": f"kto.py --model {model} --dataset {work}/labelled_train.jsonl "
               f"--eval_dataset {work}/labelled_test.jsonl --eval_rows 32 --eval_every 0 --max_steps 12 --batch_size 8 "
               f"--learning_rate 1e-5 {few}",
        "distillation": f"distillation.py --model {work}/half --teacher {model} --max_length 400 "
                        f"--dataset {work}/prompts_train.jsonl --eval_dataset {work}/prompts_test.jsonl "
                        "--eval_rows 24 --eval_every 20 --max_completion_length 64 --max_steps 40 --batch_size 4 "
                        f"--beta 0 --learning_rate 5e-5 --warmup_steps 4 --allow GRPO002 {few}",
        "orpo": f"experimental/orpo.py {pairs_of_dpo}",
        "simpo": f"experimental/cpo.py {pairs_of_dpo} --loss_type simpo --beta 2 --cpo_alpha 0",
    }


def bootstrap(values):
    """95 % interval of the mean of values, one for each question, drawn again with replacement."""
    import torch

    draws = torch.randint(len(values), (DRAWS, len(values)), generator=torch.Generator().manual_seed(0))
    means = torch.tensor(values)[draws].mean(1).sort().values
    return [means[DRAWS // 40 - 1].item(), means[DRAWS - DRAWS // 40 - 1].item()]


def dpo_interval(work):
    """The mean of the trained policy's held-out margins and its 95 % interval, bootstrapped over questions."""
    sys.path.insert(0, str(ROOT))
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from common.batches import fit, flat_batch, seq_sums
    from common.logprobs import Policy
    from common.data import load_rows
    from common.tokenization import encode_preference, load_tokenizer, stop_ids

    run = json.loads((work / "dpo" / "run.json").read_text())
    tokenizer = load_tokenizer(str(work / "dpo" / "final"))
    lm = AutoModelForCausalLM.from_pretrained(work / "dpo" / "final", dtype=torch.float32).eval()
    stops = stop_ids(tokenizer, lm.generation_config)
    rows = load_rows(str(work / "pairs_test.jsonl"), SimpleNamespace(**run["flags"]))
    groups = [encode_preference(row, tokenizer, stops) for row in rows]
    groups, _ = fit(groups, rows, run["flags"]["max_length"])
    (ref,) = load_file(work / "dpo" / "ref_logprobs_heldout.safetensors").values()
    policy, margins = Policy(lm), []
    with torch.no_grad():
        for group, reference in zip(groups[:HELD_OUT], ref):
            batch = flat_batch([group])
            sums = seq_sums(policy(batch)["logprobs"], batch) - reference
            margins.append(run["flags"]["beta"] * (sums[0] - sums[1]).item())
    result = {"questions": len(margins), "mean_margin": sum(margins) / len(margins), "bootstrap_draws": DRAWS,
              "interval_95": bootstrap(margins),
              "pairs_right": sum(m > 0 for m in margins) / len(margins), "margins": margins}
    (ROOT / "benchmarks/results/smollm2-dpo/interval.json").write_text(json.dumps(result, indent=1) + "\n")
    print({k: v for k, v in result.items() if k != "margins"})


def pair_margins(folder, rows):
    """-> log pi(chosen) - log pi(rejected) of every pair, by the model of a folder."""
    import torch
    from transformers import AutoModelForCausalLM

    from common.batches import flat_batch, seq_sums
    from common.logprobs import Policy
    from common.tokenization import encode_preference, load_tokenizer, stop_ids

    tokenizer = load_tokenizer(str(folder))
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stops = stop_ids(tokenizer, lm.generation_config)
    policy, margins = Policy(lm), []
    with torch.no_grad():
        for row in rows:
            batch = flat_batch([encode_preference(row, tokenizer, stops)])
            chosen, rejected = seq_sums(policy(batch)["logprobs"], batch).tolist()
            margins.append(chosen - rejected)
    return margins


def pair_interval(work, part):
    """How much training has moved the two log-likelihoods of a pair apart, and its 95 % interval over questions."""
    sys.path.insert(0, str(ROOT))
    run = json.loads((work / part / "run.json").read_text())
    rows = [json.loads(line) for line in (work / "pairs_test.jsonl").read_text().splitlines()]
    before, after = (pair_margins(folder, rows) for folder in (run["flags"]["model"], work / part / "final"))
    moved = [b - a for a, b in zip(before, after)]
    result = {"questions": len(moved), "mean_nats": sum(moved) / len(moved), "bootstrap_draws": DRAWS,
              "interval_95": bootstrap(moved), "pairs_moved_apart": sum(m > 0 for m in moved) / len(moved)}
    print(part, result)
    result["nats"] = moved
    target = ROOT / "benchmarks" / "results" / f"smollm2-{part}" / "interval.json"
    target.write_text(json.dumps(result, indent=1) + "\n")


def make_half(model, folder):
    """A student: the model without every second layer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lm.model.layers = torch.nn.ModuleList(list(lm.model.layers)[::2])
    lm.config.num_hidden_layers = len(lm.model.layers)
    if getattr(lm.config, "layer_types", None):
        lm.config.layer_types = lm.config.layer_types[::2]
    lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def by_question(rows):
    """Pairs -> {question: its solutions, each once}, and the pairs as [(question, right, wrong)]."""
    texts = [tuple(row[name][0]["content"] for name in ("prompt", "chosen", "rejected")) for row in rows]
    questions = {}
    for question, *solutions in texts:
        questions.setdefault(question, {}).update(dict.fromkeys(solutions))
    return {question: list(solutions) for question, solutions in questions.items()}, texts


def pair_accuracy(scores, texts):
    """scores {(question, solution): a number} -> for each question the share of its pairs in which the right solution
    has the larger one; a tie counts half."""
    found = {}
    for question, right, wrong in texts:
        better = scores[question, right] - scores[question, wrong]
        found.setdefault(question, []).append((better > 0) + (better == 0) / 2)
    return [sum(values) / len(values) for values in found.values()]


def bag_of_words(train, heldout):
    """-> {(question, solution): score}: logistic regression on the difference of log(1 + count) of a pair's words,
    numbers and signs, those of two training solutions or more, in lower case; |w|^2 / 2 beside the sum over pairs."""
    import torch

    split = re.compile(r"[a-z]+|\d+(?:\.\d+)?|[^\w\s]").findall
    _, texts = by_question(train)
    seen = Counter(word for _, *pair in texts for text in pair for word in set(split(text.lower())))
    column = {word: i for i, word in enumerate(sorted(word for word, n in seen.items() if n > 1))}

    def features(text):
        counts = torch.zeros(len(column), dtype=torch.float64)
        for word in split(text.lower()):
            if word in column:
                counts[column[word]] += 1
        return counts.log1p()

    x = torch.stack([features(right) - features(wrong) for _, right, wrong in texts])
    w = torch.zeros(len(column), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -torch.nn.functional.logsigmoid(x @ w).sum() + w.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    questions, _ = by_question(heldout)
    return {(q, text): (features(text) @ w).item() for q, solutions in questions.items() for text in solutions}


def reward_model_scores(folder, rows):
    """-> {(question, solution): score} of a trained reward model; a question's solutions share its tokens."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from common.batches import flat_batch
    from common.logprobs import Scorer
    from common.tokenization import encode_preference, load_tokenizer, stop_ids

    tokenizer, scores = load_tokenizer(str(folder)), {}
    lm = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    scorer, stops = Scorer(lm), stop_ids(tokenizer)
    for question, solutions in by_question(rows)[0].items():
        completions = []
        for text in solutions:
            group = encode_preference(preference(question, text, text), tokenizer, stops)
            completions.append(group["completions"][0])
        with torch.no_grad():
            rewards = scorer(flat_batch([group | {"completions": completions}]))["rewards"]
        scores |= {(question, text): reward for text, reward in zip(solutions, rewards.tolist())}
    return scores


def reward_interval(work):
    """Pair accuracy on all pairs of the held-out questions, of the reward model and of the bag of words: per question,
    averaged over questions, with 95 % intervals, also of the difference question by question."""
    sys.path.insert(0, str(ROOT))
    train, heldout = ([json.loads(line) for line in (work / f"ranked_{split}.jsonl").read_text().splitlines()]
                      for split in ("train", "test"))
    texts = by_question(heldout)[1]
    accuracy = {"reward_model": pair_accuracy(reward_model_scores(work / "reward" / "final", heldout), texts),
                "bag_of_words": pair_accuracy(bag_of_words(train, heldout), texts)}
    accuracy["difference"] = [a - b for a, b in zip(*accuracy.values())]
    result = {"questions": len(accuracy["difference"]), "pairs": len(heldout), "training_pairs": len(train),
              "bootstrap_draws": DRAWS}
    result |= {name: {"mean": sum(values) / len(values), "interval_95": bootstrap(values)}
               for name, values in accuracy.items()}
    print(result)
    result["by_question"] = {name: accuracy[name] for name in ("reward_model", "bag_of_words")}
    (ROOT / "benchmarks/results/smollm2-reward/interval.json").write_text(json.dumps(result, indent=1) + "\n")


INTERVALS = {
    "dpo_interval": dpo_interval, "reward_interval": reward_interval,
    "orpo_interval": partial(pair_interval, part="orpo"), "simpo_interval": partial(pair_interval, part="simpo"),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/real"))
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="part", help=" ".join(PARTS))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args.data, args.work)
    for part in args.parts:
        out, results = args.work / part, ROOT / "benchmarks" / "results" / f"smollm2-{part}"
        if part in INTERVALS:
            INTERVALS[part](args.work)
            continue
        if part == "distillation" and not (args.work / "half").is_dir():
            make_half(args.model, args.work / "half")
        if not (out / "final").is_dir():
            script, *flags = commands(args.model, args.work)[part].split()
            command = [sys.executable, str(ROOT / "methods" / script), *flags, "--output_dir", str(out)]
            subprocess.run([*command, "--resume", "auto"], check=True)
        results.mkdir(parents=True, exist_ok=True)
        for name in "run.json", "metrics.jsonl", "alerts.jsonl":
            if (out / name).is_file():
                shutil.copy(out / name, results / name)


if __name__ == "__main__":
    main()
