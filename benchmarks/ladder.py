"""
The tiny lab, three seeds: every script as it stands, with no flags but --seed and --output_dir.

    python benchmarks/ladder.py [--work DIR] [script ...]

One run at a time. Each leaves run.json, metrics.jsonl and, if there were any, alerts.jsonl in
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)


def source(script):
    """A digest of all that decides a default run: the script, common/ and the tiny lab."""
    files = [ROOT / "methods" / f"{script}.py", *sorted(p for p in (ROOT / "common").rglob("*") if p.suffix != ".pyc")]
    return hashlib.sha256(b"".join(p.read_bytes() for p in files if p.is_file())).hexdigest()


def one(script, seed, work):
    out, results = work / f"{script}-s{seed}", ROOT / "benchmarks" / "results" / f"tiny-{script}-s{seed}"
    mark, now = work / f"{script}-s{seed}.source", source(script)
    if out.is_dir() and not (mark.is_file() and mark.read_text() == now):
        shutil.rmtree(out)
    mark.write_text(now)
    if not (out / "final").is_dir():
        command = [sys.executable, f"methods/{script}.py", "--seed", str(seed), "--output_dir", str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        with open(work / f"{script}-s{seed}.log", "a") as log:
            done = subprocess.run([*command, "--resume", "auto"], env=environment, stdout=log, stderr=log)
        if done.returncode:
            sys.exit(f"{script} seed {seed}: exit code {done.returncode}, see {log.name}")
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    for name in "run.json", "metrics.jsonl", "alerts.jsonl":
        if (out / name).is_file() and (out / name).stat().st_size:
            shutil.copy(out / name, results / name)
    run = json.loads((out / "run.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    before, after = run["before"]["eval/accuracy"], run["last"]["eval/accuracy"]
    print(f"{script:<6} seed {seed}  held-out accuracy {before:.3f} -> {after:.3f}  in {lines[-1]['step']} steps, "
          f"{sum(line.get('perf/seconds', 0) for line in lines):.0f} s  alerts {run['alerts'] or 'none'}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/ladder"), help="where the runs live; runs/ladder")
    every = sorted(p.stem for p in (ROOT / "methods").glob("*.py"))
    parser.add_argument("scripts", nargs="*", default=every, metavar="script", help=" ".join(every))
    args = parser.parse_args()
    os.chdir(ROOT)  # so that the commands in run.json name nobody's folders
    args.work.mkdir(parents=True, exist_ok=True)
    for script in args.scripts:
        for seed in SEEDS:
            one(script, seed, args.work)


if __name__ == "__main__":
    main()
