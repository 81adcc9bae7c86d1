"""The output folder: which one, whose it is, and which of its checkpoints are whole."""

import fcntl
import json
import os
import platform
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from common.runtime.flags import InputError
from common.runtime.run import LOGS, first_line, fsync, read_json

META = "trainer/meta.json"  # of a checkpoint, its last file


# ---- output folder -------------------------------------------------------------------------------
def prepare_folder(args, script, attempt):
    """On rank 0, find and clean the output folder: --output_dir, else that of the checkpoint which --resume names, else
    the first of runs/<script>, runs/<script>-2, ... that is free. attempt: how often torchrun has started over. Return
    the folder, the checkpoint to resume from or None, and what is wrong or None."""
    resumes = args.resume != "never" or attempt != "0"
    given = None if args.resume in ("never", "auto") else Path(args.resume)
    name = args.output_dir or f"runs/{Path(script).stem}"
    out = given.parent if given and not args.output_dir else Path(name)
    checkpoint = error = None
    number = 1
    locked = False
    try:
        while not args.output_dir and not resumes and not locked:
            locked = not is_taken(out) and lock(out)
            if not locked:
                number += 1
                out = Path(f"{name}-{number}")
        elsewhere = given and given.parent.resolve() != out.resolve()
        if not locked and is_taken(out) and (elsewhere or not resumes):
            raise InputError(f"--output_dir {out} holds another run: --resume auto continues it, or name another.")
        if given and not given.is_dir():
            raise InputError(f"--resume {given}: there is no such checkpoint. Name another, or auto.")
        if not locked and not lock(out):
            holder = (out / "run.lock").read_text(errors="replace")
            raise InputError(f"--output_dir {out} is in use by {holder}. Wait for its end, or name another.")
        exit_code = read_json(out / "run.json").get("exit_code")
        if attempt != "0" and exit_code in (2, 3):
            sys.exit(exit_code)  # torchrun has started a command again that would end the same way
        if resumes:
            checkpoint = find_checkpoint(out, given)
        leftovers = [*out.glob(".tmp-*"), *out.glob(".old-*")]  # of a run that was killed
        if not checkpoint:
            leftovers += [out / log for log in ("run.json", *LOGS)]
        for path in leftovers:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except InputError as e:
        error = str(e)
    except (OSError, RecursionError) as e:
        error = f"--output_dir {out}: {first_line(e)}. Name a folder that can be written."
    return [out, checkpoint, error]


def is_taken(out):
    """Return whether a folder holds a run. One that ended without a checkpoint by --max_steps 0, for a wrong
    flag (exit code 2) or before its first step (exit code 4) is none."""
    if (out / "final").exists() or any(out.glob("checkpoint-*")):
        return True
    if (out / "run.json").exists():
        about = read_json(out / "run.json")
        return about.get("status") != "planned" and about.get("exit_code") not in (2, 4)
    return any((out / log).exists() for log in LOGS)


def lock(out):
    """Make the folder and lock it for this process, to its end, however that comes. Return whether no other run holds
    it. Such locks are not inherited: a child that outlives us keeps nothing."""
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / "run.lock", os.O_RDWR | os.O_CREAT)  # never closed: that would give the lock back
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # what says so differs
        return False
    except OSError as e:
        print(f"{out} cannot be locked ({first_line(e)}): see to it that no second run writes there", flush=True)
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}".encode())
    return True


def find_checkpoint(out, given):
    """Return the checkpoint to resume from: the given one, else the newest that is whole; None where there is none."""
    folders = [given] if given else checkpoints(out)
    for folder in reversed(folders):
        if is_whole(folder):
            return folder
        print(f"skipped {folder}: damaged", flush=True)
    if folders:  # a disk that cannot be read today may be read tomorrow
        raise InputError(f"--resume {given or out}: no checkpoint is whole. Name another, or move them away.")


# ---- checkpoints ---------------------------------------------------------------------------------
def checkpoints(out):
    """Return the checkpoint folders by step. They were whole when they got their names, see is_whole."""
    folders = [path.parent for path in out.glob("checkpoint-*/trainer") if step_of(path.parent).isdecimal()]
    return sorted(folders, key=lambda folder: int(step_of(folder)))


def step_of(folder):
    return folder.name.removeprefix("checkpoint-")


def is_whole(folder):
    """Return whether every file of a checkpoint, meta.json too, is as it was written."""
    kinds = {"step": int, "flags": dict, "data": str, "versions": dict, "state": dict, "offsets": dict, "crc32": dict}
    meta = read_json(folder / META)
    is_sound = meta.pop("own_crc32", None) == zlib.crc32(json.dumps(meta).encode())  # of the rest
    if not is_sound or {name: type(meta.get(name)) for name in kinds} != kinds:
        return False
    try:
        return meta["crc32"].items() <= dict(checksums(folder, folder.rglob("*"))).items()
    except OSError:
        return False


def publish(folder, name):
    """Give a written folder its final name, for good: a crash leaves the old one there, or the new one."""
    discard(name)  # of a damaged checkpoint there may be a rest
    os.rename(folder, name)
    fsync(name.parent)


def discard(folder):
    """Remove a folder without a moment in which half of it stands under its name, not even after a power cut."""
    if folder.exists():
        removed = folder.with_name(f".old-{folder.name}")
        os.rename(folder, removed)
        fsync(folder.parent)
        shutil.rmtree(removed)


def sum_written(run, folder):
    """Bring the files of a new checkpoint to the disk and return {name: CRC-32} of them. Each rank does that for what
    it has written: on a network file system no other rank can, and none need see it yet."""
    written = [*folder.glob(f"trainer/shard-{run.rank + 1:05}-*")]  # dcp's names: its ranks begin with 1
    if run.rank == 0:
        written += [path for path in folder.rglob("*") if not path.name.startswith("shard-")]
    sums = {}
    for name, value in checksums(folder, written):
        fsync(folder / name)
        sums[name] = value
        run.beat = time.monotonic()
    sums_of_ranks = [None] * run.world
    dist.all_gather_object(sums_of_ranks, sums, group=run.group)
    for part in sums_of_ranks:
        sums.update(part)
    return sums


def checksums(folder, paths):
    """Yield (name, CRC-32) of those of the paths in a folder that are files. Several are read at a time."""
    files = [path for path in paths if path.is_file()]
    with ThreadPoolExecutor(max_workers=8) as pool:
        for path, value in zip(files, pool.map(checksum, files)):
            yield str(path.relative_to(folder)), value


def checksum(path):
    """Return the CRC-32 of a file, which is read 16 MB at a time."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value
