"""
The tiny lab in both precisions: every script as it stands, with no flags but --dtype, --seed and --output_dir.

    python benchmarks/precision.py [--work DIR] [--output FILE] [script ...]       default: every script

One run at a time, on the CPU. Each adds a row to results/precision.jsonl: script, dtype, exit code, alerts, seconds,
the evaluations before and after, versions, and the sha256 of the script and common/. What has a row is skipped, so that
the same command goes on where it was stopped; remove rows to run them again. Exit code 1 if a run failed or raised an
alert.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = ROOT / "methods"
DTYPES = "float32", "bfloat16"


def measure(script, dtype, work):
    """Run a script and return its row."""
    out = Path(tempfile.mkdtemp(dir=work)) / "run"
    flags = ["--dtype", dtype, "--seed", "0", "--output_dir", str(out)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    started = time.monotonic()
    with open(out.with_suffix(".log"), "w") as log:
        command = [sys.executable, str(METHODS / f"{script}.py"), *flags]
        code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
    row = {"script": script, "dtype": dtype, "exit_code": code, "seconds": round(time.monotonic() - started, 1)}
    alerts = out / "alerts.jsonl"
    row["alerts"] = [json.loads(line) for line in alerts.read_text().splitlines()] if alerts.is_file() else []
    known = json.loads((out / "run.json").read_text()) if (out / "run.json").is_file() else {}
    for name in "before", "last", "versions", "script_sha256", "git":
        row[name] = known.get(name)
    row["command"] = f"python methods/{script}.py --dtype {dtype} --seed 0"
    return row


def main():
    scripts = sorted(str(path.relative_to(METHODS).with_suffix("")) for path in METHODS.rglob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where the runs live; a temporary folder")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "precision.jsonl")
    parser.add_argument("scripts", nargs="*", default=scripts, metavar="script", help=" ".join(scripts))
    args = parser.parse_args()
    if unknown := set(args.scripts) - set(scripts):
        parser.error(f"no script {', '.join(sorted(unknown))}: name some of {', '.join(scripts)}")
    known = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.is_file() else []
    done = {(row["script"], row["dtype"]) for row in known}
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for script in args.scripts:
            for dtype in DTYPES:
                if (script, dtype) in done:
                    continue
                row = measure(script, dtype, args.work or scratch)
                with open(args.output, "a") as file:
                    print(json.dumps(row), file=file)
                before, last = row["before"] or {}, row["last"] or {}
                accuracy = f"{before.get('eval/accuracy', 0):.3f} -> {last.get('eval/accuracy', 0):.3f}"
                print(f"{script:<26}{dtype:<10}exit {row['exit_code']}  {len(row['alerts'])} alerts  "
                      f"accuracy {accuracy}  {row['seconds']:.0f} s", flush=True)  # fmt: skip
                failed += row["exit_code"] != 0 or bool(row["alerts"])
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
