"""Break training runs in every way we can think of, resume them, and compare the end with an undisturbed run.

    python benchmarks/fault_campaign.py [--parts points random mesh] [--scripts sft reward dpo kto grpo rloo]
                                        [--worlds 1 2 4] [--faults 24] [--seed 0] [--out FILE.jsonl]

points  SIGKILL at every file-system event of a whole run of sft.py (a practice save, two saves, a rotation, final/) and
        of one that resumes past a damaged checkpoint, on one and on two ranks, each rank in turn. Sides of an event:
            before, after   the system call
            torn            half of what was written to the file that it opens
            power           before it, with all that no fsync has brought to the disk lost: the tails of files, and
                            renames whose folder was not synced (one rank)
        Events come from an audit hook. What Rust writes (safetensors' save_file, the tokenizer) opens no file that the
        hook could see: those functions are wrapped. A file that gets its name unseen fails the run, so that none is
        forgotten. So does a moment without a whole checkpoint once there was one, or with more than keep_last + 1.
random  faults at random moments of every script on 1, 2 and 4 ranks, one to three in a row (--faults for each pair):
            all, one        SIGKILL of all ranks, or of one: the others get the seconds they get under torchrun
            full            the disk fills up during a save: a small tmpfs where one can be mounted, else RLIMIT_FSIZE
            read-only       the output folder loses its write permission (root gives up the capability to ignore it)
            flip, cut, gone a file of the newest checkpoint loses a bit, its tail, or is removed
mesh    a run is killed and goes on with another number of ranks, several times: the table MESHES

Equal means bitwise: every tensor of every checkpoint, the state, the exported model; metrics.jsonl without perf/,
samples.jsonl, alerts.jsonl; and no file too many. For `mesh`: weights to 0.02 x learning rate per element, losses and
gradient norms to 1e-5 relative, the same sampled text. Besides, after every fault: each checkpoint that stands equals
the undisturbed run's, there are at most keep_last + 1, and one at least when there was one. Ranks that lost another one
leave with exit code 1, a full or locked disk with 2 and one line; a damaged checkpoint is named and not used.

The first row of FILE.jsonl says what was run; then one row per fault, appended when its run has ended. The same command
goes on where it was interrupted.
"""
import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU is what this is about
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

from common.runtime import checkpoint, folders
from common.runtime.launch import launch

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "common" / "tiny"
PHASES = ["start", "rollout", "step", "save", "rename", "evaluation", "finish", "ended"]
ENTER = {  # function -> phase while it runs; everything else in the loop is "step"
    "rollout": "rollout", "write_checkpoint": "save", "evaluate": "evaluation", "finish": "finish",
}  # fmt: skip
LIMIT = 120  # seconds that a run may take
GRACE = 5  # seconds that ranks get when one is lost
DISK = 192 << 20  # bytes of the tmpfs that fills up: more than a few checkpoints

# 12 rows of this file of common/tiny
ROWS = {"sft": "demonstrations", "reward": "pairs", "dpo": "pairs", "kto": "labelled"}
ROWS |= dict.fromkeys(("grpo", "rloo"), "prompts")
COMMON = "--batch_size 4 --max_steps 6 --save_every 1 --eval_every 3 --save_minutes 999 --lr_scheduler_type constant"
FLAGS = {  # grpo, rloo: two optimizer steps from each half of a rollout, so that most faults fall inside a rollout
    "sft": f"{COMMON} --learning_rate 1e-4",
    "reward": f"{COMMON} --learning_rate 1e-4",
    "dpo": f"{COMMON} --learning_rate 8e-5",
    "kto": f"{COMMON} --learning_rate 8e-5 --beta 1",
    "grpo": f"{COMMON} --learning_rate 5e-5 --num_generations 4 --num_iterations 2 --steps_per_generation 2 "
    "--max_completion_length 40 --eval_samples 2 --beta 0.01 --reward accuracy format --reward_weights 0.7 0.1",
}
FLAGS["rloo"] = f"{FLAGS['grpo']} --normalize_advantages"
KEEP = 2  # --keep_last of a run that is disturbed


# ---- ranks -----------------------------------------------------------------------------------------------------------


def load(name):
    """The script as a module; its imports are paid once, here, and every rank is a fork."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "methods" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def flags(name, folder, *more):
    """The command line of a script on a few rows, which are written to `folder`."""
    for source, target, count in ((ROWS[name], name, 12), ("test", "heldout", 2)):
        lines = (TINY / f"{source}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{target}.jsonl").write_text("".join(lines[:count]))
    files = ["--dataset", folder / f"{name}.jsonl", "--eval_dataset", folder / "heldout.jsonl"]
    return [*FLAGS[name].split(), *map(str, files), "--resume", "auto", *map(str, more)]


def track(module, where):
    """Keep `where` = phase, times a phase was entered, optimizer steps begun; the parent reads it."""

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
        if name == "write_checkpoint":  # the rename follows in the function that calls it, in the same file
            checkpoint.write_checkpoint = wrap(checkpoint.write_checkpoint, phase, "save")
        elif hasattr(module, name):
            setattr(module, name, wrap(getattr(module, name), phase, None))
    for name in ("resume", "save_or_stop"):
        setattr(module, name, wrap(getattr(module, name), None, "step"))
    schedule = module.schedule

    def counted(step, *args):
        where[2] = step + 1
        return schedule(step, *args)

    def hook(event, args):
        if event == "os.rename" and str(args[0]).endswith(".tmp-checkpoint"):
            enter("rename")

    module.schedule = counted
    sys.addaudithook(hook)
    return enter


def child(rank, run, module, argv, where, plant):
    """One rank, from its first line to its exit code. plant(module, rank) prepares the fault."""
    descriptor = os.open(run.logs[rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)  # of bits: the number of threads changes sums
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(run.world))
    try:
        enter, store = track(module, where), f"file://{run.folder}/store"
        dist.init_process_group("gloo", store, timedelta(seconds=60), run.world, rank)
        if plant:
            plant(module, rank)
        launch(module.main, module.parse_args(argv), module.__file__)
        enter("ended")
        os._exit(0)
    except SystemExit as e:
        os._exit(e.code if isinstance(e.code, int) else 1)
    except BaseException:  # of any kind: the parent shows the log
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def start(module, argv, world, scratch, plant=None):
    """Forked ranks -> the run: processes, where (of rank 0), logs."""
    run, fork = SimpleNamespace(world=world, folder=Path(tempfile.mkdtemp(dir=scratch))), multiprocessing
    fork, places = fork.get_context("fork"), []
    run.logs, run.processes = [run.folder / f"log{rank}" for rank in range(world)], []
    for rank in range(world):
        places.append(fork.Array("i", 3, lock=False))
        run.processes.append(fork.Process(target=child, args=(rank, run, module, argv, places[-1], plant)))
    run.where, run.began = places[0], time.monotonic()
    for process in run.processes:
        process.start()
    return run


def ended(run, entered=None):
    """Wait for all ranks -> the run, with codes, text (rank 0's output) and errors (everybody's). When one has failed
    the others get GRACE seconds, then SIGKILL: torchrun does the like. entered(phase, seconds): of rank 0, in turn."""
    seen, end, failed = -1, time.monotonic() + LIMIT, False
    while any(p.exitcode is None for p in run.processes) and time.monotonic() < end:
        if entered and run.where[1] != seen:
            seen = run.where[1]
            entered(PHASES[run.where[0]], time.monotonic() - run.began)
        if not failed and any(p.exitcode for p in run.processes):
            failed, end = True, min(end, time.monotonic() + GRACE)
        time.sleep(0.0002 if entered else 0.005)
    hung = not failed and any(p.exitcode is None for p in run.processes)
    run.left_alone = [r for r, p in enumerate(run.processes) if p.exitcode is None]
    for process in run.processes:
        process.kill()
        process.join()
    run.codes = [process.exitcode for process in run.processes]
    texts = [log.read_text(errors="replace") if log.is_file() else "" for log in run.logs]
    run.text, run.errors = texts[0], "\n".join(text[-3000:] for text in texts)
    shutil.rmtree(run.folder)
    assert not hung, f"a run hangs after {LIMIT} s:\n{run.errors}"
    return run


def undisturbed(module, argv, world, scratch, plant=None):
    """A whole run -> the run, with its seconds, and for each phase of rank 0 the durations of its visits."""
    run, visits, last = start(module, argv, world, scratch, plant), {phase: [] for phase in PHASES}, ["start", 0.0]

    def entered(phase, now):
        visits[last[0]].append(now - last[1])
        last[:] = phase, now

    ended(run, entered)
    run.visits, run.seconds = visits, last[1]
    assert not any(run.codes), f"an undisturbed run failed with {run.codes}:\n{run.errors}"
    return run


# ---- what must be equal ----------------------------------------------------------------------------------------------


def contents(folder):
    """File of a checkpoint or an export -> digest of what it says; of meta.json the state."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md"):
        digest = hashlib.blake2b()
        if path.suffix == ".safetensors":
            for name, tensor in sorted(load_file(path).items()):  # by name: their order is nobody's business
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
                digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif path.name == "meta.json":  # alert counters, streaks, the best so far
            digest.update(json.dumps(json.loads(path.read_text())["state"], sort_keys=True).encode())
        else:
            digest.update(path.read_bytes())
        found[str(path.relative_to(folder))] = digest.hexdigest()
    return found


def logged(path):
    """Lines of a run's file, without what is about time and memory."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [{k: v for k, v in json.loads(x).items() if not k.startswith("perf/")} for x in lines]


def remains(out):
    """All that a finished run leaves and that must be equal, by name."""
    found = {folder.name: contents(folder) for folder in [*out.glob("checkpoint-*"), out / "final"]}
    found |= {name: logged(out / name) for name in ("metrics.jsonl", "samples.jsonl", "alerts.jsonl")}
    found["run.json"] = {k: v for k, v in json.loads((out / "run.json").read_text()).items() if k in ENDED}
    return found | {"others": sorted({p.name for p in out.iterdir()} - found.keys())}


ENDED = "status", "exit_code", "before", "last", "best", "alerts"


def differences(reference, found):
    return sorted(key for key in reference.keys() | found.keys() if reference.get(key) != found.get(key))


def kept(reference, steps):
    """What of an undisturbed run, which kept all its checkpoints, one leaves that keeps those of `steps`."""
    names = {f"checkpoint-{step:06d}" for step in steps}
    return {k: v for k, v in reference.items() if not k.startswith("checkpoint-") or k in names}


# ---- points ----------------------------------------------------------------------------------------------------------


def sound(folder):
    """Is a checkpoint as its meta.json says? Read from the format, not with the script's own functions."""
    try:
        meta = json.loads((folder / "trainer" / "meta.json").read_text())
        return all(zlib.crc32((folder / name).read_bytes()) == crc for name, crc in meta["crc32"].items())
    except (OSError, ValueError, KeyError):
        return False


class Events:
    """The file-system events of one rank below `out`, in order. With `at` and `side`: SIGKILL there. `report` gets what
    happened: a line for each event, and each breach of what holds at every moment (rank 0)."""

    def __init__(self, rank, out, report, keep, at=None, side=None):
        self.out, self.report, self.keep, self.at, self.side = out, report, keep, at, side
        self.rank, self.count, self.busy, self.torn, self.written = rank, 0, False, None, set()
        self.synced, self.renames = {}, []  # file -> bytes that are on the disk; renames of folders that may be lost
        self.whole = {p.name: self.sizes(p) for p in out.glob("checkpoint-*") if sound(p)}
        self.fsync = os.fsync
        os.fsync = self.on_fsync
        self.wrap(folders, "save_file", lambda tensors, path, *_, **__: path)
        self.wrap(transformers.modeling_utils, "safe_save_file", lambda tensors, path, *_, **__: path)
        tokenizer = transformers.tokenization_utils_tokenizers.TokenizersBackend
        self.wrap(tokenizer, "_save_pretrained", lambda _, **named: f"{named['save_directory']}/tokenizer.json")
        sys.addaudithook(self.hook)

    @staticmethod
    def sizes(folder):
        return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}

    def note(self, *line):
        with open(self.report, "a") as f:
            f.write(json.dumps(line) + "\n")

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, owner, name, path_of):
        """Of a function that writes a file with a system call of its own."""
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            path = Path(path_of(*args, **kwargs))
            mine = self.begin("write", path)
            result = function(*args, **kwargs)
            if mine and self.at == self.count and self.side in ("torn", "after"):
                self.busy = True
                os.truncate(path, path.stat().st_size // 2 if self.side == "torn" else path.stat().st_size)
                self.die()
            return result

        setattr(owner, name, wrapped)

    def begin(self, event, path, args=()):
        """Before an event; True if it is one of ours."""
        if self.busy or not path.is_relative_to(self.out):
            return False
        self.busy = True
        try:
            self.tear()
            self.count += 1
            if self.rank == 0:
                self.guard(event, path)
            self.note("event", event, str(path.relative_to(self.out)))
            if self.count == self.at:
                self.strike(event, path, args)
            self.remember(event, path, args)
        finally:
            self.busy = False
        return True

    def tear(self):
        """At the first sign that the file was written. An opener is an event of its own, before there is a file."""
        if self.torn and self.torn[0].is_file():
            file, base = self.torn
            os.truncate(file, base + (file.stat().st_size - base) // 2)
            self.die()

    def strike(self, event, path, args):
        if self.side == "power":
            for file, size in self.synced.items():
                if file.is_file() and file.stat().st_size > size:
                    os.truncate(file, size)
            for source, target in self.renames[::-1]:
                if target.exists() and not source.exists():
                    os.rename(target, source)
        if self.side in ("before", "power"):
            self.die()
        if self.side == "torn" and event == "open":
            base = path.stat().st_size if path.is_file() and not args[2] & os.O_TRUNC else 0
            self.torn = path, base
        if self.side == "after" and event != "write":
            with contextlib.suppress(OSError):  # as the call itself would fail: mkdir(exist_ok=True)
                self.perform(event, args)
            self.die()

    @staticmethod
    def perform(event, args):
        folder = lambda i: {"dir_fd": args[i]} if len(args) > i and args[i] != -1 else {}  # noqa: E731
        if event == "open":
            os.close(os.open(args[0], args[2] & ~os.O_EXCL, 0o666))
        elif event == "os.rename":
            os.rename(args[0], args[1])
        elif event == "os.truncate":
            os.truncate(args[0], args[1])
        elif event == "os.mkdir":
            os.mkdir(args[0], args[1], **folder(2))
        else:
            {"os.remove": os.remove, "os.rmdir": os.rmdir}[event](args[0], **folder(1))

    def remember(self, event, path, args):
        if event == "open" or event == "write":
            fresh = event == "write" or args[2] & os.O_TRUNC or not path.is_file()
            self.synced[path] = 0 if fresh else self.synced.get(path, path.stat().st_size)
            self.written.add(path)
        elif event == "os.rename":
            target = Path(args[1])
            moved = {p: target / p.relative_to(path) for p in self.synced if p.is_relative_to(path)}
            self.synced = {moved.get(p, p): size for p, size in self.synced.items()}
            if path.is_dir():
                self.renames.append((path, target))

    def on_fsync(self, descriptor):
        self.busy = True
        self.tear()
        self.busy, path = False, Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.fsync(descriptor)
        if path in self.synced:
            self.synced[path] = path.stat().st_size
        self.renames = [(a, b) for a, b in self.renames if path not in (a.parent, b.parent)]

    def guard(self, event, path):
        """What holds at every event: one whole checkpoint, if there ever was one; at most keep_last + 1 folders; and
        only what is whole, and was seen being written, gets its name."""
        for folder in self.out.glob("checkpoint-*"):
            if folder.name not in self.whole and sound(folder):
                self.whole[folder.name] = self.sizes(folder)
        folders = [p for p in self.out.iterdir() if (p / "trainer").is_dir()] if self.out.is_dir() else []
        if self.whole and not any(self.sizes(p) == self.whole.get(p.name) for p in folders):
            self.note("breach", f"no whole checkpoint before {event} {path}")
        if len(folders) > self.keep + 1:
            self.note("breach", f"{sorted(p.name for p in folders)} before {event} {path}")
        if event == "os.rename" and path.name == ".tmp-checkpoint":
            files = {p for p in path.rglob("*") if p.is_file() and p.name[:11] not in OTHERS}
            if not sound(path) or len(files) < 8 or files - self.written:
                self.note("breach", f"{path} gets its name: sound {sound(path)}, unseen {files - self.written}")

    def hook(self, event, args):
        if event not in KINDS or self.busy or not args or isinstance(args[0], int):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        place = KINDS[event]
        parent = f"/proc/self/fd/{args[place]}" if place and len(args) > place and args[place] != -1 else ""
        path = os.path.join(os.readlink(parent) if parent else os.getcwd(), os.fsdecode(args[0]))
        self.begin(event, Path(path), args)


OTHERS = [f"shard-{rank:05d}" for rank in range(2, 9)]  # written by other ranks
KINDS = {  # event -> which of its arguments is the folder that its path is relative to
    "open": 0, "os.rename": 2, "os.remove": 1, "os.mkdir": 2, "os.rmdir": 1, "os.truncate": 0,
}  # fmt: skip


def sides(event, world):
    """What is done at an event, each in a run of its own."""
    return ["before", *(["torn"] if event in ("open", "write") else []), "after", *(["power"] if world == 1 else [])]


def scene(scenario, folder, out):
    """The folder that a run of `points` starts with."""
    if scenario == "resumed":  # as a kill leaves it between a rename and the rotation; then the newest loses a bit
        shutil.copytree(folder / "whole", out)
        shutil.rmtree(out / "final")
        damage("flip", next((out / "checkpoint-000002" / "trainer").glob("shard-00001*")), random.Random(0))
        (out / ".old-checkpoint-000000").mkdir()
        with open(out / "metrics.jsonl", "a") as f:
            f.write('{"step": 3, "lo')


def survey(module, world, folder):
    """-> what crash() needs to know, and all points: (scenario, rank, number of the event, side)."""
    about = SimpleNamespace(module=module, world=world, folder=folder, points=[], events={})
    about.argv = flags("sft", folder, "--max_steps", 2, "--batch_size", 2, "--eval_every", 0)
    argv = [*about.argv, "--keep_last", "99", "--output_dir", str(folder / "whole")]
    undisturbed(module, argv, world, folder)
    about.reference = kept(remains(folder / "whole"), [2])
    for scenario in ("fresh", "resumed"):
        row = crash(about, scenario, None, None, None)
        assert row["equal"], row
        for rank, events in enumerate(row["events"]):
            about.events[scenario, rank] = events
            points = [(scenario, rank, i, side) for i, (e, _) in enumerate(events, 1) for side in sides(e, world)]
            assert len(points) > (100 if rank == 0 else 1), points
            about.points += points
    return about


def crash(about, scenario, victim, number, side):
    """One run that dies at one point and is resumed -> its row. Without a victim: a run that only lists its events."""
    out, reports = about.folder / "crash", [about.folder / f"events{rank}" for rank in range(about.world)]
    argv = [*about.argv, "--keep_last", "1", "--output_dir", str(out)]

    def watched(at):
        for report in reports:
            report.unlink(missing_ok=True)
        plant = lambda _, rank: Events(  # noqa: E731
            rank, out, reports[rank], 1, at if rank == victim else None, side)
        run = ended(start(about.module, argv, about.world, about.folder, plant))
        notes = [[json.loads(x) for x in report.read_text().splitlines()] for report in reports if report.is_file()]
        wrong.extend(text for notes in notes for kind, text, *_ in notes if kind == "breach")
        return run, [[(e, path) for kind, e, *more in notes if kind == "event" for path in more] for notes in notes]

    wrong, what = [], ""
    scene(scenario, about.folder, out)
    if victim is not None:
        run, events = watched(number)
        what = " ".join(events[victim][number - 1])
        wrong += [f"rank {r} ended with {code}" for r, code in enumerate(run.codes) if code not in (0, 1, -9)]
        wrong += [] if run.codes[victim] == -signal.SIGKILL else [f"was not killed: {run.errors}"]
    run, events = watched(None)
    wrong += [f"resuming ended with {run.codes}: {run.errors}"] if any(run.codes) else []
    wrong += [] if wrong else differences(about.reference, remains(out))
    assert out.is_dir(), wrong
    shutil.rmtree(out)
    row = {"part": "points", "scenario": scenario, "world": about.world, "rank": victim, "event": number}
    row |= {"what": what, "side": side, "equal": not wrong, "differs": wrong}
    return row | ({"events": events} if victim is None else {})


def damage(kind, path, rng):
    """A bit flipped, a tail cut off, or a file removed."""
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        path.unlink()


# ---- random ----------------------------------------------------------------------------------------------------------

FAULTS = "one all full one flip all read-only one all cut one full gone all one".split()  # in turn
AIMS = {"": ["step", "save", "rename", "any"]}
AIMS |= dict.fromkeys(("grpo", "rloo"), ["rollout", *AIMS[""]])
NO_ROOT = [0x20080522, 0], [0] * 6  # capset(2): version 3, this thread; no capabilities at all


def moment(run, aim, visits, seconds, rng):
    """Wait for a random moment of a random visit of phase `aim` ("any": of the run) -> where it is then."""
    often = [seconds for seconds in visits.get(aim, []) if seconds > 0.0005]  # shorter: the crack between two calls
    nth, wait, entries = rng.randrange(max(1, len(often))), rng.random(), 0
    if aim == "any":
        time.sleep(wait * seconds)
    while aim != "any" and all(p.exitcode is None for p in run.processes):
        if PHASES[run.where[0]] == aim:
            if entries == nth:
                time.sleep(wait * often[nth % len(often)] if often else 0)
                break
            entries, now = entries + 1, run.where[1]
            while all(p.exitcode is None for p in run.processes) and run.where[1] == now:
                time.sleep(0.0002)
        time.sleep(0.0002)
    return {"phase": PHASES[run.where[0]], "step": run.where[2], "at": round(time.monotonic() - run.began, 3)}


def filling(disk, victim, nth, rng):
    """A plant: when the victim writes its nth checkpoint, the disk has room for a part of one. Without a disk of our
    own files may not grow beyond a size: the error then is EFBIG instead of ENOSPC."""
    room = int(2 ** rng.uniform(10, 23)) if disk else int(2 ** rng.uniform(15, 21))

    def full():
        if disk:
            stat = os.statvfs(disk)
            with open(disk / "filler", "wb") as f:
                os.posix_fallocate(f.fileno(), 0, max(1, stat.f_bavail * stat.f_frsize - room))
        else:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    def plant(_module, rank):
        write, calls = checkpoint.write_checkpoint, []

        def counted(*args):
            calls.append(1)
            if len(calls) == nth:
                full()
            return write(*args)

        if rank == victim:
            checkpoint.write_checkpoint = counted

    return plant, {"disk": "tmpfs" if disk else "RLIMIT_FSIZE", "room": room, "save": nth}


def no_root(_module, _rank):
    """Root may write where nobody may; without its capabilities it is a user like others."""
    if os.geteuid() == 0:
        header, sets = ((ctypes.c_uint32 * len(values))(*values) for values in NO_ROOT)
        if ctypes.CDLL(None, use_errno=True).capset(header, sets):
            raise OSError(ctypes.get_errno(), "capset")


def one_line(run):
    """What is wrong with the way in which a run left that cannot save."""
    lines = [line for line in run.text.splitlines() if line.startswith("error: ")]
    good = run.codes[0] == 2 and len(lines) == 1 and "Traceback" not in run.text
    return [] if good else [f"left with {run.codes}: {run.errors}"]


def disturb(case, kind, aim, out, rng):
    """One start of a run, and one fault -> row, what is wrong; None if the run ended before the fault came."""
    victim, plant, row = rng.randrange(case.world), None, {"kind": kind, "aim": aim}
    if kind == "full":
        plant, more = filling(case.disk, 0 if case.disk else victim, rng.randrange(1, 7), rng)
        row = {"kind": kind, **more}
    elif kind == "read-only":
        plant = no_root
    run, wrong = start(case.module, case.at(out), case.world, case.scratch, plant), []
    if kind != "full":
        row |= moment(run, aim, case.visits, case.seconds, rng)
        if kind == "read-only" and out.is_dir():
            os.chmod(out, 0o555)
        for process in run.processes if kind not in ("one", "read-only") else [run.processes[victim]][kind != "one" :]:
            process.kill()
    ended(run)
    if case.disk:
        (case.disk / "filler").unlink(missing_ok=True)
    if out.is_dir():
        os.chmod(out, 0o755)
    if not any(run.codes):
        return None, []
    if kind in ("full", "read-only"):
        wrong += one_line(run)
    else:
        row |= {"victim": victim, "codes": run.codes} if kind == "one" else {}
        wrong += [f"ranks left with {run.codes}: {run.errors}"] if {*run.codes} - {0, 1, -signal.SIGKILL} else []
        wrong += [f"nobody was killed: {run.errors}"] if -signal.SIGKILL not in run.codes else []
    standing = sorted(out.glob("checkpoint-*"))
    for folder in standing:
        different = contents(folder) != case.reference.get(folder.name)
        wrong += [f"{folder.name} is another one after {kind}"] if different else []
    wrong += [f"{len(standing)} checkpoints after {kind}"] if len(standing) > KEEP + 1 else []
    return row | {"saved": [int(folder.name[-6:]) for folder in standing]}, wrong


def spoil(kind, out, row, rng):
    """Damage the newest checkpoint -> what the next start has to say, and which folder it may not resume from."""
    newest, *before = sorted(out.glob("checkpoint-*"))[::-1]
    path = rng.choice(sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size > 0))
    damage(kind, path, rng)
    row["file"] = str(path.relative_to(out))
    return [f"skipped {newest}: damaged", f"resumed   {before[0]}" if before else "no checkpoint is whole"]


def campaign(name, world, args, done, folder, disk):
    """All random faults of one script on so many ranks; done: the rows of an earlier, interrupted campaign."""
    case = SimpleNamespace(module=load(name), world=world, disk=disk, scratch=folder)
    place, prefix = disk or folder, f"{name}-{world}"
    base = flags(name, folder)
    case.at = lambda out: [*base, "--keep_last", str(KEEP), "--output_dir", str(out)]
    whole = undisturbed(case.module, [*case.at(place / prefix), "--keep_last", "99"], world, folder)
    case.visits, case.seconds, case.reference = whole.visits, whole.seconds, remains(place / prefix)
    assert len([k for k in case.reference if k.startswith("checkpoint-")]) == 6 and case.reference["metrics.jsonl"]
    shutil.rmtree(place / prefix)
    final = kept(case.reference, (5, 6))
    number, aims = max((row["run"] for row in done), default=0), AIMS.get(name, AIMS[""])
    while len(done) < args.faults:
        number, rows, wrong, began = number + 1, [], [], time.monotonic()
        rng, out, says = random.Random(f"{args.seed} {name} {world} {number}"), place / f"{prefix}-{number}", []
        while len(done) + len(rows) < args.faults and not wrong:
            at = len(done) + len(rows)
            kind, aim = args.kinds[at % len(args.kinds)], aims[at % len(aims)]
            if kind in ("flip", "cut", "gone"):
                aim = "rename"
            elif kind == "read-only" and aim == "any":
                aim = "save"
            row, more = disturb(case, kind, aim, out, rng)
            wrong += more
            if row is None:
                break
            rows.append({"part": "random", "script": name, "world": world, "fault": at + 1, "run": number} | row)
            if kind in ("flip", "cut", "gone"):
                if row["saved"]:
                    says = spoil(kind, out, rows[-1], rng)
                    break
                rows[-1]["kind"] = "all"  # there was nothing yet to damage
            if rng.random() > 1 / 2:
                break
        if not rows and not wrong:  # it was quicker than the fault: once more from the start
            shutil.rmtree(out)
            continue
        run = ended(start(case.module, case.at(out), world, folder))
        if says and "no checkpoint is whole" in says:  # it does not start over by itself
            wrong += [] if run.codes[0] == 2 else [f"it started over: {run.codes}"]
            wrong += [f"it did not say: {text}" for text in says if text not in run.text]
            says = [shutil.rmtree(damaged) for damaged in out.glob("checkpoint-*")] and []
            run = ended(start(case.module, case.at(out), world, folder))
        wrong += [f"resuming ended with {run.codes}: {run.errors}"] if any(run.codes) else []
        wrong += [f"it did not say: {text}\n{run.text[-3000:]}" for text in says if text not in run.text]
        wrong += [] if wrong else differences(final, remains(out))
        shutil.rmtree(out)
        seconds = round((time.monotonic() - began) / len(rows), 1)
        rows = [row | {"seconds": seconds, "equal": not wrong, "differs": wrong} for row in rows]
        yield rows
        done = done + rows


# ---- mesh ------------------------------------------------------------------------------------------------------------

MESHES = {  # name -> stages: ranks, and flags besides. All but the last are killed when their part of the steps is done
    "1-2-4-1": [(1, ""), (2, ""), (4, ""), (1, "")],
    "4-1-2": [(4, ""), (1, ""), (2, "")],
    "fsdp-tp": [(2, ""), (2, "--tp_size 2"), (4, "--tp_size 2"), (1, "")],
    "hsdp-tp": [(4, "--replicate_size 2"), (4, "--tp_size 4"), (4, "--replicate_size 2 --tp_size 2"), (2, "")],
}
STEPS = 10
RELATIVE, PER_LR = 1e-5, 0.02  # of losses and gradient norms; of weights, in learning rates
FLOOR = {"loss": 1e-7}  # one bit of a term near 1: the terms of grpo's loss cancel


def weights(checkpoint):
    """fp32 weights of a checkpoint, whole, however many ranks wrote them."""
    found = HuggingFaceStorageReader(str(checkpoint / "trainer")).read_metadata().state_dict_metadata
    tensors = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in found.items() if k.startswith("model.")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "torch.distributed is uninitialized": as it should be here
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint / "trainer")), no_dist=True)
    return tensors


def apart(reference, out, lr):
    """Two runs on other ranks -> the worst weight in learning rates, and what is too far apart."""
    (a, b), wrong = (weights(max(folder.glob("checkpoint-*"))) for folder in (reference, out)), []
    worst = max((a[k] - b[k]).abs().max().item() / lr for k in a) if a.keys() == b.keys() else math.inf
    wrong += [f"weights are {worst:.4f} learning rates apart"] if not worst <= PER_LR else []
    a, b = (logged(folder / "metrics.jsonl") for folder in (reference, out))
    wrong += ["other steps"] if [x["step"] for x in a] != [x["step"] for x in b] else []
    for x, y in zip(a, b):
        for key in x.keys() & {"loss", "eval/loss", "grad_norm", "num_tokens", "reward", "eval/accuracy"}:
            close = math.isclose(x[key], y.get(key, math.nan), rel_tol=RELATIVE, abs_tol=FLOOR.get(key, 0))
            wrong += [] if close else [f"step {x['step']}: {key} {x[key]!r} {y.get(key)!r}"]
    a, b = ([(x["prompt"], x["completion"]) for x in logged(folder / "samples.jsonl")] for folder in (reference, out))
    wrong += [f"{sum(x != y for x, y in zip(a, b))} of {len(a)} samples differ"] if a != b else []
    return round(worst, 5), wrong


def moved(name, folder, stages_of, rng, undone):
    """Runs of one script that go from mesh to mesh -> a row each."""
    module, base = load(name), flags(name, folder, "--max_steps", STEPS, "--keep_last", KEEP)
    lr = module.parse_args(base).learning_rate
    undisturbed(module, [*base, "--output_dir", str(folder / "one")], 1, folder)
    for mesh in undone:
        out, kills, wrong, began = folder / "moved", [], [], time.monotonic()
        stages = stages_of[mesh]
        for stage, (world, more) in enumerate(stages, 1):
            run = start(module, [*base, *more.split(), "--output_dir", str(out)], world, folder)
            last = STEPS * stage // len(stages)
            while stage < len(stages) and run.where[2] <= last and all(p.exitcode is None for p in run.processes):
                time.sleep(0.002)
            if stage < len(stages):
                time.sleep(rng.random() * 0.1)
                kills.append({"world": world, "flags": more, "phase": PHASES[run.where[0]], "step": run.where[2]})
                for process in run.processes:
                    process.kill()
            ended(run)
            expected = {-signal.SIGKILL, 1} if stage < len(stages) else {0}  # 1: of one that saw another one die
            wrong += [f"stage {stage} ended with {run.codes}: {run.errors}"] if {*run.codes} - expected else []
        worst, more = apart(folder / "one", out, lr) if not wrong else (None, [])
        row = {"part": "mesh", "script": name, "mesh": mesh, "kills": kills, "learning_rates_apart": worst}
        row |= {"seconds": round(time.monotonic() - began, 1), "equal": not wrong + more, "differs": wrong + more}
        shutil.rmtree(out)
        yield row
    shutil.rmtree(folder / "one")


# ---- main ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder):
    """A folder of DISK bytes, where this user may mount one; else None."""
    place = folder / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)]
    mounted = mounted and not subprocess.run(words, capture_output=True).returncode
    try:
        yield place if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def about(args):
    """The first row. Nothing in it changes while a campaign is interrupted, so that the same command can go on."""
    shared = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "common").rglob("*.py"))]
    files = [*(f"methods/{name}.py" for name in args.scripts), *shared]
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    words = f"--parts {' '.join(args.parts)} --scripts {' '.join(args.scripts)} "
    words += f"--worlds {' '.join(map(str, args.worlds))} --faults {args.faults} --seed {args.seed}"
    words += f" --kinds {' '.join(args.kinds)}" if args.kinds != FAULTS else ""
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, transformers)}
    return {
        "command": f"python benchmarks/fault_campaign.py {words}",
        "git": git,
        "sha256": {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in files},
        "versions": versions,
        "device": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread a rank",
        "flags": {name: FLAGS[name] for name in args.scripts},
    }


def rows_of(args, rows, folder, disk):
    """All rows that are not there yet, in bunches that belong together."""
    worlds = [world for world in (1, 2) if world in args.worlds] if "points" in args.parts else []
    for world in worlds:
        place = folder / f"points{world}"
        place.mkdir()
        found = survey(load("sft"), world, place)
        done = {(r["scenario"], r["rank"], r["event"], r["side"]) for r in rows
                if r["part"] == "points" and r["world"] == world}
        print(f"{len(found.points)} points on {world} ranks, {len(done)} done", flush=True)
        for point in found.points:
            if point not in done:
                yield [crash(found, *point)]
    for name in args.scripts if "random" in args.parts else []:
        for world in args.worlds:
            done = [r for r in rows if r["part"] == "random" and (r["script"], r["world"]) == (name, world)]
            yield from campaign(name, world, args, done, folder, disk)
    for name in args.scripts if "mesh" in args.parts else []:
        done = {r["mesh"] for r in rows if r["part"] == "mesh" and r["script"] == name}
        undone = [mesh for mesh in MESHES if mesh not in done]
        for row in moved(name, folder, MESHES, random.Random(args.seed), undone) if undone else []:
            yield [row]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["points", "random", "mesh"])
    parser.add_argument("--scripts", nargs="+", default=list(FLAGS))
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--faults", type=int, default=24, help="random ones, per script and number of ranks")
    parser.add_argument("--kinds", nargs="+", default=FAULTS, help="of random faults, in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "fault_campaign.jsonl")
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
    with tempfile.TemporaryDirectory(prefix="fault_campaign") as name, small_disk(Path(name)) as disk:
        for bunch in rows_of(args, rows, Path(name), disk):
            with open(args.out, "a") as f:
                f.writelines(json.dumps(row) + "\n" for row in bunch)
            for row in bunch:
                print("  ".join(f"{k} {v}" for k, v in row.items() if k != "differs" or v), flush=True)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()[1:]]
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        print(f"{part:7} {sum(row['equal'] for row in mine)} of {len(mine)} equal")
    sys.exit(0 if all(row["equal"] for row in rows) else 1)


if __name__ == "__main__":
    main()
