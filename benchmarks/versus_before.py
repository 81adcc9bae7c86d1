"""Speed and memory of our scripts beside themselves at an older revision, on the work of versus_trl.py.

    python benchmarks/versus_before.py 363da32 [--only sft-mixed ...]     -> results/versus_before.jsonl

The ratios to TRL in results/versus_trl.md belong to the text that they were measured on. This says, without TRL, if a
later text is as fast: both texts train on the same rows with the same flags, in turn, --rounds times. The ratio is
CPU seconds a step of the text of now over those of then (below 1: faster now), from the arrival of the first "step"
line to that of the last, so that start and export are not in it. CPU seconds, not wall seconds: other work on the
machine does not count, though it does slow caches down. Losses of offline cases must be equal to 1e-4; completions of
online ones may be sampled otherwise, so there the ratio is of seconds a token.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import trl_parity as parity
import versus_trl
from trl_parity import RESULTS, ROOT, Problem
from trl_worker import ONLINE

FILE = RESULTS / "versus_before.jsonl"
ONLY = ["sft-mixed", "dpo-short", "grpo-8", "reward"]
STEPS = 10  # of which the first is not timed


def cost(run, method):
    """Return the CPU seconds of a timed step; of an online method, of a thousand sampled tokens."""
    last = STEPS
    seconds = run["at"][last][1] - run["at"][1][1]
    if method not in ONLINE:
        return seconds / (last - 1)
    tokens = sum(step["num_tokens"] for step in run["steps"][1:])
    return 1000 * seconds / tokens


def compare(name, revision, tree, options):
    """Return a row for each round of a case."""
    case = versus_trl.CASES[name] | {"steps": STEPS}
    method = case["method"]
    flags, _ = versus_trl.prepare(case, options)
    if method in ONLINE:
        flags = flags | parity.reward_flags()
    rows = []
    for number in range(1, options.rounds + 1):
        before = parity.ours(method, flags, options, [tree / "methods" / f"{method}.py"])
        now = parity.ours(method, flags, options)
        if method not in ONLINE:
            versus_trl.loss_gap(now, before)
        row = {"case": name, "round": number, "before": revision, "unit": "CPU s a step"}
        if method in ONLINE:
            row["unit"] = "CPU s a thousand tokens"
        row["cpu_before"] = cost(before, method)
        row["cpu_now"] = cost(now, method)
        row["mb_before"] = before["peak_mb"]
        row["mb_now"] = now["peak_mb"]
        rows.append(row)
        ratio = row["cpu_now"] / row["cpu_before"]
        print(f"{name:<10} round {number}: {ratio:.3f} of the CPU time, {row['mb_now']:.0f} MB, then "
              f"{row['mb_before']:.0f} MB", flush=True)  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="of the text to compare with")
    parser.add_argument("--only", nargs="*", choices=list(versus_trl.CASES), default=ONLY, help="these cases")
    parser.add_argument("--rounds", type=int, default=3)
    options = parity.read_options(parser)
    known = []
    if FILE.is_file():
        known = [row for row in parity.read(FILE) if row["case"] not in options.only]
    with tempfile.TemporaryDirectory(prefix="versus-before-") as scratch:
        options.scratch = Path(scratch)
        tree = options.scratch / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", tree, options.revision], check=True)
        try:
            for name in options.only:
                command = f"python benchmarks/versus_before.py {options.revision} --threads {options.threads}"
                about = parity.about(f"{command} --only {name}", options.threads)
                rows = compare(name, options.revision, tree, options)
                known += [about | row for row in rows]
                FILE.write_text("".join(json.dumps(row) + "\n" for row in known))
                ratios = [row["cpu_now"] / row["cpu_before"] for row in rows]
                print(f"{name:<10} {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        except Problem as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 2
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
