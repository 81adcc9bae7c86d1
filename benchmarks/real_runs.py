"""
The three scripts on a real model and real data, on the CPU: SmolLM2-135M-Instruct and GSM8K.

    python benchmarks/real_runs.py --model DIR --data DIR [--work DIR] [sft dpo dpo_interval cold grpo grpo_gsm8k]

--model  a Hugging Face folder of SmolLM2-135M-Instruct
--data   a folder with gsm8k_train.jsonl, gsm8k_test.jsonl (question, answer) and gsm8k_example_model_solutions.jsonl
         (per question four model solutions with is_correct), all from openai/grade-school-math (MIT)

Every part runs one script (or, dpo_interval, bootstraps the held-out margins over questions) and leaves run.json and
metrics.jsonl in benchmarks/results/smollm2-<part>/. A part that was stopped goes on where it was; one that is finished
is skipped. SmolLM2 cannot add three-digit numbers, so GRPO on the tiny lab's questions starts from `cold`, a short SFT
on the tiny lab's demonstrations: groups then hold right and wrong answers.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("sft", "dpo", "dpo_interval", "cold", "grpo", "grpo_gsm8k")
HELD_OUT = 120  # questions with a right and a wrong solution that DPO never trains on


def pairs(solutions):
    """One pair per question: the right solution of the best model that has one, the wrong one of the worst, calculator
    marks removed; the shorter half of the pairs, since the CPU pays by the token."""
    found = []
    for row in solutions:
        answers = [v for v in row.values() if isinstance(v, dict)]
        right = [a["solution"] for a in answers if a["is_correct"]]
        wrong = [a["solution"] for a in answers if not a["is_correct"]]
        if right and wrong:
            chosen, rejected = (re.sub(r"<<.*?>>", "", text).strip() for text in (right[-1], wrong[0]))  # worst first
            found.append({"prompt": [{"role": "user", "content": row["question"]}],
                          "chosen": [{"role": "assistant", "content": chosen}],
                          "rejected": [{"role": "assistant", "content": rejected}]})
    found.sort(key=lambda pair: sum(len(messages[0]["content"]) for messages in pair.values()))
    return found[: len(found) // 2]


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
    both = pairs(rows("gsm8k_example_model_solutions.jsonl"))
    random.Random(0).shuffle(both)
    write("pairs_test.jsonl", both[:HELD_OUT])
    write("pairs_train.jsonl", both[HELD_OUT:])


def commands(model, work):
    """Sizes for two cores, which train about 100 tokens of this model a second."""
    few = "--save_every 10 --keep_last 1 --tokens_per_microbatch 1024"
    gsm8k, tiny = f"--model {model} --max_length 400", f"--model {model} --max_length 128"
    return {
        "sft": f"sft.py {gsm8k} --dataset {work}/sft_train.jsonl --eval_dataset {work}/sft_test.jsonl --eval_rows 24 "
               f"--eval_every 0 --max_steps 60 --batch_size 2 --learning_rate 2e-5 {few}",
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
    }


def interval(work):
    """The mean of the trained policy's held-out margins and its 95 % interval, bootstrapped over questions."""
    sys.path.insert(0, str(ROOT))
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from common.logprobs import Policy
    from common.tokenization import encode_preference, fit, flat_batch, load_rows, load_tokenizer, stop_ids

    run = json.loads((work / "dpo" / "run.json").read_text())
    tokenizer = load_tokenizer(str(work / "dpo" / "final"))
    lm = AutoModelForCausalLM.from_pretrained(work / "dpo" / "final", dtype=torch.float32).eval()
    stops = stop_ids(tokenizer, lm.generation_config)
    groups = [encode_preference(row, tokenizer, stops) for row in load_rows(str(work / "pairs_test.jsonl"))]
    groups, _ = fit(groups, run["flags"]["max_length"])
    (ref,) = load_file(work / "dpo" / "ref_logprobs_heldout.safetensors").values()
    policy, margins = Policy(lm), []
    with torch.no_grad():
        for group, reference in zip(groups[:HELD_OUT], ref):
            batch = flat_batch([group])
            sums = torch.zeros(2).index_add_(0, batch["seq"], policy(batch)["logprobs"]) - reference
            margins.append(run["flags"]["beta"] * (sums[0] - sums[1]).item())
    draws = torch.randint(len(margins), (10_000, len(margins)), generator=torch.Generator().manual_seed(0))
    means = torch.tensor(margins)[draws].mean(1).sort().values
    result = {"questions": len(margins), "mean_margin": sum(margins) / len(margins), "bootstrap_draws": 10_000,
              "interval_95": [means[249].item(), means[9749].item()],
              "pairs_right": sum(m > 0 for m in margins) / len(margins), "margins": margins}
    (ROOT / "benchmarks/results/smollm2-dpo/interval.json").write_text(json.dumps(result, indent=1) + "\n")
    print({k: v for k, v in result.items() if k != "margins"})


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
        if part == "dpo_interval":
            interval(args.work)
            continue
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
