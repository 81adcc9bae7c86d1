"""Kill training runs with SIGKILL at random moments, resume them, and compare the end with an undisturbed run.

    python benchmarks/kill_campaign.py [--kills 20] [--seed 0] [--scripts sft dpo grpo] [--out FILE.jsonl]

Every script is run once undisturbed. Then runs of the same command are killed: the parent waits until the child is in
the phase that is this kill's aim, lets a random part of that phase's usual duration pass, and sends SIGKILL. One killed
run in three is killed again after its resume, and again. What ends is compared: in all checkpoints every tensor that
training keeps (weights, Adam, state), the state's numbers and the exported model; metrics.jsonl without perf/,
samples.jsonl and alerts.jsonl.

The first row of FILE.jsonl says what was run; then one row per kill:
    script, kill (number), run (kills of one run share it), aim, phase (where it really was), step (the last one begun),
    delay (seconds since its aim was reached), saved (step of the newest checkpoint then), equal, differs (in what)
Rows are appended when their run has ended; the same command goes on where it was interrupted.
"""
import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
PHASES = ["start", "rollout", "step", "save", "evaluation", "finish", "ended"]
ENTER = {  # function of the script -> phase while it runs; everything else in the loop is "step"
    "rollout": "rollout", "write_checkpoint": "save", "evaluate": "evaluation", "finish": "finish",
}  # fmt: skip
AIMS = {"grpo": ["rollout", "step", "save", "any"], "": ["step", "save", "any"]}  # in turn, so in equal shares
COMMON = "--max_steps 10 --batch_size 4 --save_every 2 --keep_last 99 --eval_every 5 --eval_rows 2 "
COMMON += "--eval_dataset tiny:test"
FLAGS = {  # two optimizer steps from each half of a rollout, a save after each: most kills fall inside a rollout
    "grpo": f"{COMMON} --save_every 1 --max_steps 8 --num_generations 4 --num_iterations 2 --steps_per_generation 2 "
    "--max_completion_length 40 --eval_samples 2 --beta 0.01 --reward accuracy format --reward_weights 0.7 0.1",
    "": COMMON,
}
LIMIT = 120  # seconds that a run may take


def load(name):
    """The script as a module; its imports are paid once, here, and every run is a fork."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "methods" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def child(module, flags, log, where):
    """One run. `where` is shared with the parent: phase, times a phase was entered, optimizer steps begun."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)  # of bits: the number of threads changes sums

    def enter(phase):
        where[0], where[1] = PHASES.index(phase), where[1] + 1

    def wrap(function, phase, after):
        def wrapped(*args, **kwargs):
            before = PHASES[where[0]]
            enter(phase or before)
            result = function(*args, **kwargs)
            enter(after or before)
            return result

        return wrapped

    for name, phase in ENTER.items():
        if hasattr(module, name):
            after = "save" if name == "write_checkpoint" else None  # the rename follows in the function that calls it
            setattr(module, name, wrap(getattr(module, name), phase, after))
    for name in ("resume", "save_or_stop"):
        setattr(module, name, wrap(getattr(module, name), None, "step"))
    schedule = module.schedule

    def counted(step, *args):
        where[2] = step + 1
        return schedule(step, *args)

    module.schedule = counted
    try:
        module.main(module.parse_args(flags))
        enter("ended")
        os._exit(0)
    except BaseException:  # of any kind: the parent shows the log
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def start(module, flags, log):
    fork = multiprocessing.get_context("fork")
    where = fork.Array("i", 3, lock=False)
    process = fork.Process(target=child, args=(module, flags, str(log), where))
    process.start()
    return process, where


def watch(process, where, entered=lambda phase, seconds: None):
    """Call entered(phase, seconds since the start) whenever the child enters a phase, until it is dead."""
    began, seen = time.monotonic(), -1
    while process.is_alive() and time.monotonic() - began < LIMIT:
        if where[1] != seen:
            seen = where[1]
            entered(PHASES[where[0]], time.monotonic() - began)
        time.sleep(0.0002)
    hung = process.is_alive()
    process.kill()
    process.join()
    assert not hung, f"a run hangs after {LIMIT} s"


def undisturbed(module, flags, log):
    """A whole run -> seconds it takes, and for each phase the durations of its visits."""
    process, where = start(module, flags, log)
    visits, last = {phase: [] for phase in PHASES}, ["start", 0.0]

    def entered(phase, now):
        visits[last[0]].append(now - last[1])
        last[:] = phase, now

    watch(process, where, entered)
    if process.exitcode:
        sys.exit(f"the undisturbed run failed:\n{log.read_text()[-3000:]}")
    return last[1], visits


def kill(module, flags, log, aim, total, visits, rng):
    """Run, and kill in a random visit of phase `aim` ("any": at any time) -> where it was, None if it ended first."""
    process, where = start(module, flags, log)
    often = [seconds for seconds in visits.get(aim, []) if seconds > 0.001]  # shorter: the crack between two calls
    nth, wait, entries, began = rng.randrange(max(1, len(often))), rng.random(), 0, time.monotonic()
    while process.is_alive():
        phase, inside = PHASES[where[0]], time.monotonic()
        if aim == "any":
            time.sleep(wait * total)
            break
        if phase == aim:
            if entries == nth:
                time.sleep(wait * often[nth % len(often)])
                break
            entries, now = entries + 1, where[1]
            while process.is_alive() and where[1] == now:
                time.sleep(0.0002)
        time.sleep(0.0002)
    process.kill()
    process.join()
    if process.exitcode == -signal.SIGKILL:
        delay = time.monotonic() - (began if aim == "any" else inside)
        return {"aim": aim, "phase": PHASES[where[0]], "step": where[2], "delay": round(delay, 4)}
    if process.exitcode:
        sys.exit(f"a run failed by itself:\n{log.read_text()[-3000:]}")
    return None


def remains(out):
    """What must be equal: name -> digest or lines."""
    digest, checkpoints = {}, sorted(out.glob("checkpoint-*"))
    for path in [p for folder in [*checkpoints, out / "final"] for p in folder.rglob("*.safetensors")]:
        for name, tensor in sorted(load_file(path).items()):  # by name: their order in the file is nobody's business
            digest.setdefault(path, hashlib.sha256()).update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest[path].update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    found = {str(path.relative_to(out)): value.hexdigest() for path, value in digest.items()}
    for path in out.glob("checkpoint-*/trainer/meta.json"):  # alert counters, streaks, the best so far
        found[str(path.relative_to(out))] = json.loads(path.read_text())["state"]
    for name in ("metrics.jsonl", "samples.jsonl", "alerts.jsonl"):
        lines = (out / name).read_text().splitlines() if (out / name).is_file() else []
        found[name] = [{k: v for k, v in json.loads(x).items() if not k.startswith("perf/")} for x in lines]
    found["leftovers"] = sorted(p.name for p in out.glob(".*"))
    return found


def campaign(name, args, rows, folder):
    """All kills of one script; rows: those of an earlier, interrupted campaign."""
    module, log = load(name), folder / f"{name}.log"
    flags = FLAGS.get(name, FLAGS[""]).split()
    at = lambda out: [*flags, "--output_dir", str(folder / out), "--resume", "auto"]  # noqa: E731
    total, visits = undisturbed(module, at(f"{name}-whole"), log)
    whole, done = remains(folder / f"{name}-whole"), [row for row in rows if row["script"] == name]
    assert len(whole) > 8 and whole["metrics.jsonl"] and not whole["leftovers"]
    run, aims = max((row["run"] for row in done), default=0), AIMS.get(name, AIMS[""])
    while len(done) < args.kills:
        run, kills = run + 1, []
        rng, out = random.Random(f"{args.seed} {name} {run}"), f"{name}-{run}"
        while len(done) + len(kills) < args.kills:
            aim = aims[(len(done) + len(kills)) % len(aims)]
            row = kill(module, at(out), log, aim, total, visits, rng)
            if row is None and not kills:
                shutil.rmtree(folder / out)  # it was quicker than the aim: once more from the start
                continue
            if row is None:
                break
            saved = [int(p.name[-6:]) for p in (folder / out).glob("checkpoint-*")]
            number = {"script": name, "kill": len(done) + len(kills) + 1, "run": run}
            kills.append(number | row | {"saved": max(saved, default=0)})
            if rng.random() > 1 / 3:
                break
        undisturbed(module, at(out), log)  # to the end
        ended = remains(folder / out)
        differs = sorted(key for key in whole.keys() | ended.keys() if whole.get(key) != ended.get(key))
        kills = [row | {"equal": not differs, "differs": differs} for row in kills]
        with open(args.out, "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in kills)
        for row in kills:
            print("  ".join(f"{k} {v}" for k, v in row.items() if k != "differs" or v), flush=True)
        done += kills
        shutil.rmtree(folder / out)


def about(args):
    """The first row. Nothing in it changes while a campaign is interrupted, so that the same command can go on."""
    files = [*(f"methods/{name}.py" for name in args.scripts), "common/logprobs.py", "common/tokenization.py"]
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    flags = f"--kills {args.kills} --seed {args.seed} --scripts {' '.join(args.scripts)}"
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, transformers)}
    return {
        "command": f"python benchmarks/kill_campaign.py {flags}",
        "git": git,
        "sha256": {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in files},
        "versions": versions,
        "device": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread, 1 rank",
        "flags": {name: FLAGS.get(name, FLAGS[""]) for name in args.scripts},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="per script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scripts", nargs="+", default=["sft", "dpo", "grpo"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kill_campaign.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    head, rows = about(args), []
    if args.out.is_file():
        first, *rows = (json.loads(line) for line in args.out.read_text().splitlines())
        if {**first, "git": ""} != {**head, "git": ""}:
            sys.exit(f"error: {args.out} holds another campaign (other scripts or flags): remove it, or name another.")
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(head) + "\n")
    with tempfile.TemporaryDirectory(prefix="kill_campaign") as folder:
        for name in args.scripts:
            campaign(name, args, rows, Path(folder))
    rows = [json.loads(line) for line in args.out.read_text().splitlines()[1:]]
    for name in args.scripts:
        mine = [row for row in rows if row["script"] == name]
        phases = {p: sum(row["phase"] == p for row in mine) for p in PHASES}
        print(f"{name:6} {sum(row['equal'] for row in mine)} of {len(mine)} equal; killed in {phases}")
    print(f"{sum(row['equal'] for row in rows)} of {len(rows)} equal")
    sys.exit(0 if all(row["equal"] for row in rows) else 1)


if __name__ == "__main__":
    main()
