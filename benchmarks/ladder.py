"""
The tiny lab, three seeds: every script as it stands, with no flags but --seed and --output_dir.

    python benchmarks/ladder.py [--work DIR] [script ...]

One run at a time. A run passes when held-out accuracy (of reward.py: pair accuracy) has risen and is at least the
script's floor, in less than SECONDS of wall time, start, evaluations and checkpoints included; exit code 1 if one does
not. Each leaves run.json, metrics.jsonl, ladder.json and, if there were any, alerts.jsonl in
benchmarks/results/tiny-<script>-s<seed>/. A run that was stopped goes on where it was; one that is finished, by the
text of the script and of common/ as they stand now, is skipped; one that an older text made is thrown away.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
FLOORS = {"sft": 0.9, "dpo": 0.85, "reward": 0.9, "kto": 0.85, "grpo": 0.9, "rloo": 0.9}  # set before the runs
SECONDS = 180  # on two cores with nothing else on them


def source(script):
    """A digest of all that decides a default run: the script, common/ without its pages, and the tiny lab."""
    files = [ROOT / "methods" / f"{script}.py"]
    for path in sorted((ROOT / "common").rglob("*")):
        if path.is_file() and path.suffix not in (".pyc", ".md"):
            files.append(path)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def one(script, seed, work):
    """Run it, or go on with it, and print what came out. Returns whether it passed."""
    out, results = work / f"{script}-s{seed}", ROOT / "benchmarks" / "results" / f"tiny-{script}-s{seed}"
    mark, now = work / f"{script}-s{seed}.json", source(script)
    known = json.loads(mark.read_text()) if mark.is_file() else {}
    if known.get("source") != now:
        shutil.rmtree(out, ignore_errors=True)
        known = {"source": now, "seconds": 0.0}
        mark.write_text(json.dumps(known))
    if not (out / "final").is_dir():
        command = [sys.executable, f"methods/{script}.py", "--seed", str(seed), "--output_dir", str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        started = time.monotonic()
        try:
            with open(work / f"{script}-s{seed}.log", "a") as log:
                done = subprocess.run([*command, "--resume", "auto"], env=environment, stdout=log, stderr=log)
        finally:  # also of an attempt that Ctrl-C ended
            known["seconds"] += time.monotonic() - started
            mark.write_text(json.dumps(known))
        if done.returncode:
            print(f"{script:<6} seed {seed}  FAIL: exit code {done.returncode}, see {log.name}", flush=True)
            return False
    run = json.loads((out / "run.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    before, after = run["before"]["eval/accuracy"], run["last"]["eval/accuracy"]
    passed = after > before and after >= FLOORS[script] and known["seconds"] < SECONDS
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    for name in "run.json", "metrics.jsonl", "alerts.jsonl":
        if (out / name).is_file() and (out / name).stat().st_size:
            shutil.copy(out / name, results / name)
    verdict = {"floor": FLOORS[script], "wall_seconds": known["seconds"], "wall_limit": SECONDS, "passed": passed}
    (results / "ladder.json").write_text(json.dumps(verdict, indent=1) + "\n")
    print(f"{script:<6} seed {seed}  {'pass' if passed else 'FAIL'}: accuracy {before:.3f} -> {after:.3f} "
          f"(floor {FLOORS[script]:g}) in {lines[-1]['step']} steps, {known['seconds']:.0f} s (limit {SECONDS})  "
          f"alerts {run['alerts'] or 'none'}", flush=True)
    return passed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/ladder"), help="where the runs live; runs/ladder")
    parser.add_argument("scripts", nargs="*", default=list(FLOORS), metavar="script", help=" ".join(FLOORS))
    args = parser.parse_args()
    if unknown := set(args.scripts) - set(FLOORS):
        parser.error(f"no floor for {', '.join(sorted(unknown))}: name some of {', '.join(FLOORS)}")
    os.chdir(ROOT)  # so that the commands in run.json name nobody's folders
    args.work.mkdir(parents=True, exist_ok=True)
    passed = [one(script, seed, args.work) for script in args.scripts for seed in SEEDS]
    print(f"{sum(passed)} of {len(passed)} pass")
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
