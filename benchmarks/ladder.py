"""
The ladder: every script of methods/ and methods/experimental/ as it stands, with no flags but --seed and --output_dir.
All start from the same model, and the scripts of a family have the same budget.

    python benchmarks/ladder.py [script ...]             run what has no valid result
    python benchmarks/ladder.py --verify [script ...]    say which results are still valid: five steps of each script

The first rung is the tiny lab, three seeds. The second, "hard", has sums of six digits, made by make_tiny.py: hardly a
question comes without a carry, the starting model knows them less well, and not every method arrives. It is a copy of
methods/ and common/ in runs/ladder/hard whose tiny lab is the harder one, with room for its longer answers. There
experimental scripts have one seed.

A run is a line of results/ladder.jsonl: its curve (step, trained tokens, sampled tokens, CPU seconds, accuracy), its
first five steps, and a digest of the text that made it. It is valid for that text, and for any other under which the
first five steps are the same bit for bit; --verify finds that out in seconds, on the machine and with the versions that
made it. A run with a valid result is skipped, so that this command goes on where it was stopped.

On the first rung a run passes when held-out accuracy has risen and is at least the script's floor, in less than SECONDS
of CPU time, start and evaluations included; exit code 1 if one does not. The runs of methods/ also leave run.json,
metrics.jsonl, ladder.json and, if there were any, alerts.jsonl in results/tiny-<script>-s<seed>/.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise, zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNGS, SEEDS = ("tiny", "hard"), (0, 1, 2)
FLOORS = {  # set before the runs
    "sft": 0.9, "dpo": 0.85, "reward": 0.9, "kto": 0.85, "grpo": 0.9, "rloo": 0.9, "distillation": 0.9,
    "sdft": 0.2, "opsd": 0.2, "sdpo": 0.2,  # of the 0.30 of their teacher, the starting model
}  # fmt: skip
SECONDS = 180  # CPU seconds of a whole run
VERIFIED = 5  # steps that must be the same, besides the evaluation before them
HARD = ["--digits", "6", "--start", "common/tiny/model", "--steps", "400"]  # for make_tiny.py
HARD_LENGTH = 96  # tokens of a completion that an online method samples; right answers have up to 65
POLL = 0.05  # seconds between two looks at a run


# ---- scripts ---------------------------------------------------------------------------------------------------------


def scripts():
    """-> [path from the root]: stable ones first."""
    found = sorted((ROOT / "methods").glob("*.py")) + sorted((ROOT / "methods" / "experimental").glob("*.py"))
    return [path.relative_to(ROOT).as_posix() for path in found]


def parent(script):
    """The path of the script that this one is a child of, or None."""
    named = re.search(r"^Parent: (\S+\.py)$", (ROOT / script).read_text(), re.M)
    return named[1] if named else None


def floor(script):
    """The accuracy that a run has to reach on the first rung. A script without a floor of its own has its parent's."""
    while Path(script).stem not in FLOORS:
        script = parent(script)
    return FLOORS[Path(script).stem]


def family(script):
    """Whom a script is compared with: those with a teacher; online, if it samples; else by what it learns from."""
    text, root = (ROOT / script).read_text(), script
    while parent(root):
        root = parent(root)
    if Path(root).stem == "distillation":
        return "distillation"
    if "# ---- rollout ---" in text:
        return "online"
    return "demonstrations" if 'tiny="demonstrations"' in text else "preference"


def is_planned(script, rung, seed):
    return rung == "tiny" or seed == 0 or Path(script).parent.name == "methods"


# ---- curves ----------------------------------------------------------------------------------------------------------


def sampled_tokens(line, flags):
    """Tokens that were sampled for a step: all completions, of the mean length of those that the step looks at."""
    if "completion_len" not in line or line.get("on_policy") == 0:
        return 0
    prompts = line.get("num_prompts", flags["batch_size"])
    return line["completion_len"] * prompts * flags.get("num_generations", 1)


def curve(metrics, stamps, flags):
    """-> [[step, trained tokens, sampled tokens, CPU seconds, held-out accuracy]] of all evaluations. stamps: CPU
    seconds of the process when each line of metrics was there. Start and evaluations do not count."""
    points, trained, sampled, cpu, before = [], 0, 0, 0.0, 0.0
    for line, stamp in zip(metrics, stamps, strict=True):
        if "num_tokens" in line:
            trained += round(line["num_tokens"])
            sampled += round(sampled_tokens(line, flags))
            cpu += stamp - before
        if "eval/accuracy" in line:
            points.append([line["step"], trained, sampled, round(cpu, 2), line["eval/accuracy"]])
        before = stamp
    return points


def area(points, budget):
    """points: [(tokens, accuracy)] from 0 tokens on. Returns the mean accuracy over the first `budget` tokens, with
    straight lines between the points; after its last point a curve stays where it ended."""
    total = 0.0
    end = max(budget, points[-1][0])
    for (x, y), (next_x, next_y) in pairwise([*points, (end, points[-1][1])]):
        if x >= budget:
            break
        if next_x > budget:
            next_y = y + (next_y - y) * (budget - x) / (next_x - x)
            next_x = budget
        total += (next_x - x) * (y + next_y) / 2
    return total / budget


def reached(points, level=0.9):
    """points: [(cost, accuracy)]. Returns the cost at which accuracy first is at the level, on a straight line between
    two evaluations, or None."""
    if points[0][1] >= level:
        return points[0][0]
    for (x, y), (next_x, next_y) in pairwise(points):
        if next_y >= level:
            return x + (next_x - x) * (level - y) / (next_y - y)
    return None


# ---- runs ------------------------------------------------------------------------------------------------------------


def root_of(rung):
    """The folder in which the scripts of a rung run. That of the harder one is made anew; its lab only where there is
    none."""
    if rung == "tiny":
        return ROOT
    lab, root = ROOT / "runs" / "ladder" / "hard-lab", ROOT / "runs" / "ladder" / "hard"
    if not (lab / "teacher" / "model.safetensors").is_file():  # which is made last
        subprocess.run([sys.executable, "benchmarks/make_tiny.py", "--out", str(lab), *HARD], cwd=ROOT, check=True)
    for name in "methods", "common":
        shutil.rmtree(root / name, ignore_errors=True)
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(root / "common" / "tiny")
    shutil.copytree(lab, root / "common" / "tiny")
    presets = json.loads((ROOT / "common" / "tiny" / "presets.json").read_text())
    for flags in presets.values():
        if "max_completion_length" in flags:
            flags["max_completion_length"] = HARD_LENGTH
    (root / "common" / "tiny" / "presets.json").write_text(json.dumps(presets))
    return root


def source(script, root):
    """A digest of all that decides a run: the script, common/ without its pages, and the lab."""
    files = [root / script]
    for path in sorted((root / "common").rglob("*")):
        if path.is_file() and path.suffix not in (".pyc", ".md"):
            files.append(path)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def cpu_seconds(pid):
    """CPU seconds of a process so far, with those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def run_script(script, seed, root, out, lines=None):
    """Run a script in the folder `root`, its output folder `out` named from there. Returns its exit code, the CPU
    seconds that it had used when each line of its metrics.jsonl was there, and those of all of it. It is stopped when
    it has written so many lines; None: never."""
    shutil.rmtree(root / out, ignore_errors=True)
    (root / out).parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, script, "--seed", str(seed), "--output_dir", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # more threads add up otherwise
    stamps, status = [], None
    with open(root / f"{out}.log", "w") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
        try:
            while status is None:
                time.sleep(POLL)
                used = cpu_seconds(process.pid)  # it is there, even if it has ended, until it is waited for
                metrics = root / out / "metrics.jsonl"
                written = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
                stamps += [used] * (written - len(stamps))
                if lines and written >= lines:
                    os.kill(process.pid, signal.SIGTERM)  # at every look: the second one ends it without a checkpoint
                ended, code, usage = os.wait4(process.pid, os.WNOHANG)
                if ended:
                    status = process.returncode = os.waitstatus_to_exitcode(code)
        except BaseException:  # Ctrl-C, too: the run does not go on alone
            process.kill()
            raise
    return status, stamps, usage.ru_utime + usage.ru_stime


def read_metrics(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def first_steps(metrics):
    """The lines of the first steps, without what differs from run to run."""
    kept = []
    for line in metrics:
        if line["step"] <= VERIFIED:
            kept.append({name: value for name, value in line.items() if not name.startswith("perf/")})
    return kept


def difference(stored, made):
    """Where the first steps of a result and those of a new run part, in words, or "". What the result knows must be
    the same in every bit; JSON keeps all of them."""
    for old, new in zip_longest(stored, made, fillvalue={}):
        for name, value in old.items():
            if new.get(name) != value:
                return f"step {old['step']}: {name} was {value!r}, is {new.get(name)!r}"
    return ""


def verify(row, root):
    """Run the first steps of a result's run. Returns where they differ from the result, in words, or ""."""
    wanted = row["first_steps"]
    out = Path("runs/ladder/verify")
    run_script(row["script"], row["seed"], root, out, lines=len(wanted))
    return difference(wanted, first_steps(read_metrics(root / out))[: len(wanted)])


def one(script, rung, seed, root):
    """Run a script, print what came out, and return its line of the results, or None where it failed."""
    name, now = f"{Path(script).stem}-s{seed}", source(script, root)
    status, stamps, cpu = run_script(script, seed, root, Path("runs/ladder") / name)
    out = root / "runs" / "ladder" / name
    if status:
        print(f"{rung} {script} seed {seed}: FAIL, exit code {status}, see {out.relative_to(ROOT)}.log", flush=True)
        return None
    run, metrics = json.loads((out / "run.json").read_text()), read_metrics(out)
    row = {
        "script": script, "rung": rung, "seed": seed, "source": now, "valid_for": now, "command": run["command"],
        "versions": run["versions"], "date": time.strftime("%Y-%m-%d"), "alerts": run["alerts"],
        "cpu_seconds": round(cpu, 1), "curve": curve(metrics, stamps, run["flags"]),
        "first_steps": first_steps(metrics),
    }  # fmt: skip
    start, end = row["curve"][0], row["curve"][-1]
    print(f"{rung} {script} seed {seed}: {'pass' if passes(row) else 'FAIL'}, accuracy {start[4]:.3f} -> {end[4]:.3f} "
          f"in {end[0]} steps, {cpu:.0f} CPU s, alerts {run['alerts'] or 'none'}", flush=True)
    if rung == "tiny" and Path(script).parent.name == "methods":
        keep(row, out)
    return row


def passes(row):
    """Whether a run did what is asked of it. Of the second rung nothing is."""
    before, after = row["curve"][0][4], row["curve"][-1][4]
    cpu = row["cpu_seconds"] or 0  # some runs are older than the measurement
    is_good = after > before and after >= floor(row["script"]) and cpu < SECONDS
    return is_good or row["rung"] != "tiny"


def keep(row, out):
    """Copy what a run of a stable script has written to the results."""
    folder = ROOT / "benchmarks" / "results" / f"tiny-{Path(row['script']).stem}-s{row['seed']}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in "run.json", "metrics.jsonl", "alerts.jsonl":
        if (out / name).is_file() and (out / name).stat().st_size:
            shutil.copy(out / name, folder / name)
    verdict = {"floor": floor(row["script"]), "cpu_seconds": row["cpu_seconds"], "cpu_limit": SECONDS}
    (folder / "ladder.json").write_text(json.dumps(verdict | {"passed": passes(row)}, indent=1) + "\n")


# ---- results ---------------------------------------------------------------------------------------------------------


def key(row):
    return row["rung"], row["script"], row["seed"]


def read_results():
    """-> {(rung, script, seed): line of the results}"""
    path = ROOT / "benchmarks" / "results" / "ladder.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {key(row): row for row in rows}


def write_results(rows):
    """One line a run, so that results from several hands merge."""
    path = ROOT / "benchmarks" / "results" / "ladder.jsonl"
    text = "".join(json.dumps(rows[name]) + "\n" for name in sorted(rows))
    path.with_suffix(".new").write_text(text)
    os.replace(path.with_suffix(".new"), path)


# ---- main ------------------------------------------------------------------------------------------------------------


def judge(rows, script, rung, root):
    """Whether the results of a script on a rung are valid for its text as it stands. Tries it out, for one seed, where
    the text is another one, and notes it in all seeds."""
    mine = [row for row in rows.values() if row["script"] == script and row["rung"] == rung]
    now = source(script, root)
    if not mine or all(row["valid_for"] == now for row in mine):
        return True
    where = verify(min(mine, key=key), root)
    print(f"{rung} {script}: {f'NOT valid: {where}' if where else 'valid: the first steps are the same'}", flush=True)
    for row in mine:
        row["valid_for"] = "" if where else now
    return not where


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", action="store_true", help="run nothing but first steps")
    parser.add_argument("--rung", choices=RUNGS, help="only this one")
    parser.add_argument("--seed", type=int, choices=SEEDS, help="only this one")
    parser.add_argument("scripts", nargs="*", metavar="script", help="dpo or methods/dpo.py; all")
    args = parser.parse_args()
    chosen = [path for path in scripts() if not args.scripts or {path, Path(path).stem} & set(args.scripts)]
    if not chosen:
        parser.error(f"no script of methods/ is called {' or '.join(args.scripts)}")
    good = True
    roots = {rung: root_of(rung) for rung in RUNGS if args.rung in (rung, None)}
    for rung, root in roots.items():
        for script in chosen:
            rows = read_results()
            good &= judge(rows, script, rung, root) or not args.verify
            write_results(rows)
    if args.verify:
        sys.exit(0 if good else 1)
    for seed in SEEDS if args.seed is None else (args.seed,):
        for rung, root in roots.items():
            for script in chosen:
                rows = read_results()
                known = rows.get((rung, script, seed))
                if not is_planned(script, rung, seed) or known and known["valid_for"]:
                    continue
                row = one(script, rung, seed, root)
                good &= row is not None and passes(row)
                if row:
                    write_results(read_results() | {key(row): row})
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
