"""The output folder: which one, whose it is, which of its checkpoints are whole. And what is no file of strangers."""

import fcntl
import json
import os
import platform
import re
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import CHAT_TEMPLATE_DIR

from common.runtime.flags import InputError, printable
from common.runtime.parallel import exchange
from common.runtime.run import LOGS, first_line, fsync, open_own, read_json

META = "trainer/meta.json"  # of a checkpoint, its last file
STATE = "trainer/state.safetensors"
OPENED = ("run.json", "run.lock", "debug", *LOGS)  # what a run writes in place
PASSING = re.compile(r"\.tmp-(checkpoint|rehearsal|final|logprobs)|\.old-(checkpoint-\d+|final)")  # left by a kill
MADE = re.compile(rf"{PASSING.pattern}|run\.json|{'|'.join(map(re.escape, LOGS))}|checkpoint-\d+|final")


# ---- input folders -------------------------------------------------------------------------------
def check_inputs(args):
    """Refuse files and folders of --model, --teacher, --reference and --reward that are not what they seem."""
    named = [("--reward", name) for name in getattr(args, "reward", ())]
    for flag in ("model", "teacher", "reference"):
        value = vars(args).get(flag, "")
        names = [value] if isinstance(value, str) else [name.partition("=")[2] or name for name in value]
        named += [(f"--{flag}", name) for name in names]
    for flag, name in named:
        file = name.rpartition(":")[0]  # of FILE.py:FUNCTION
        try:
            if os.path.isdir(name) and name != "tiny":
                check_links(name)
            elif os.path.isdir(file):
                check_links(file)  # FOLDER:mean
            elif os.path.exists(file) and not os.path.isfile(file):
                raise ValueError("it is no file")
        except (OSError, ValueError) as e:
            raise InputError(f"{flag} {name}: {first_line(e)}. Remove or replace it, or name another.") from e


def check_links(folder):
    """Raise a ValueError about what is no file of a model folder. A stranger's link may lead to a secret, which would
    be published with the model, and a pipe has no end. In the hub's cache files are links to its blobs."""
    folder = Path(folder).resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parents[1] / "blobs")
    for path in [*folder.iterdir(), *folder.glob(f"{CHAT_TEMPLATE_DIR}/*")]:
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(home) for home in homes):
            raise ValueError(f"its {path.name} is a link that leads out of the folder")
        if target.exists() and not target.is_file() and not target.is_dir():
            raise ValueError(f"its {path.name} is a pipe or a device, and no file")


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
        if not given and not checkpoints(out) and foreign_files(out):
            names = ", ".join(foreign_files(out))
            raise InputError(f"--output_dir {out} holds other files ({names}). Move them away, or name another.")
        elsewhere = given and given.parent.resolve() != out.resolve()
        if not locked and is_taken(out) and (elsewhere or not resumes):
            raise InputError(f"--output_dir {out} holds another run: --resume auto continues it, or name another.")
        if given and not (given / "trainer").is_dir():
            raise InputError(f"--resume {given}: there is no such checkpoint. Name another, or auto.")
        for path in [out / name for name in OPENED]:
            if path.is_symlink() or path.is_fifo():
                raise InputError(f"{path} is a link or a pipe. Remove it, or name another --output_dir.")
        if not locked and not lock(out):
            holder = (out / "run.lock").read_text(errors="replace")
            raise InputError(f"--output_dir {out} is in use by {holder}. Wait for its end, or name another.")
        exit_code = read_json(out / "run.json").get("exit_code")
        if attempt != "0" and exit_code in (2, 3):
            sys.exit(exit_code)  # torchrun has started a command again that would end the same way
        if resumes:
            checkpoint = find_checkpoint(out, given)
        leftovers = [path for path in out.iterdir() if PASSING.fullmatch(path.name)]
        if not checkpoint:
            leftovers += [out / name for name in (*LOGS, "run.json")]  # the last one says whose the others are
        for path in leftovers:
            remove(path)
    except InputError as e:
        error = str(e)
    except (OSError, RecursionError) as e:
        error = f"--output_dir {out}: {first_line(e)}. Name a folder that can be written."
    return [out, checkpoint, error]


def foreign_files(out):
    """Return the names of what a run in this folder would cut, replace or remove, and none of ours has made: there is
    no run.json of ours. Whatever has other names is left alone in any case."""
    if read_json(out / "run.json").keys() >= {"status", "pid", "command", "versions"}:
        return []
    return sorted(path.name for path in out.glob("*") if MADE.fullmatch(path.name))


def is_taken(out):
    """Return whether a folder holds a run, or what could be one's. One that ended without a checkpoint by --max_steps
    0, for a wrong flag (exit code 2) or before its first step (exit code 4) is none."""
    if (out / "final").exists() or any(out.glob("checkpoint-*")) or foreign_files(out):
        return True
    about = read_json(out / "run.json")
    return bool(about) and about.get("status") != "planned" and about.get("exit_code") not in (2, 4)


def lock(out):
    """Make the folder and lock it for this process, to its end, however that comes. Return whether no other run holds
    it. Such locks are not inherited: a child that outlives us keeps nothing."""
    out.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    descriptor = os.open(out / "run.lock", flags, 0o666)  # never closed: that would give the lock back
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # what says so differs
        return False
    except OSError as e:
        text = f"{out} cannot be locked ({first_line(e)}): see to it that no second run writes there"
        print(printable(text), flush=True)
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}".encode())
    return True


def find_checkpoint(out, given):
    """Return the checkpoint to resume from: the given one, else the newest that is whole; None where there is none."""
    folders = [given] if given else checkpoints(out)
    for folder in reversed(folders):
        if is_whole(folder):
            return folder
        print(printable(f"skipped {folder}: damaged"), flush=True)
    if folders:  # a disk that cannot be read today may be read tomorrow
        raise InputError(f"--resume {given or out}: no checkpoint is whole. Name another, or move them away.")


def cut_logs(out, sizes):
    """Cut the run's logs back to the sizes that a checkpoint has noted: no line is missing or there twice."""
    for log in [out / name for name in LOGS if (out / name).is_file()]:
        with open_own(log, "r+") as file:
            file.truncate(min(os.fstat(file.fileno()).st_size, sizes.get(log.name, 0)))


# ---- checkpoints ---------------------------------------------------------------------------------
def checkpoints(out):
    """Return the checkpoint folders by step. They were whole when they got their names, see is_whole."""
    folders = [path.parent for path in out.glob("checkpoint-*/trainer") if step_of(path.parent).isdecimal()]
    return sorted(folders, key=lambda folder: int(step_of(folder)))


def step_of(folder):
    return folder.name.removeprefix("checkpoint-")


def is_whole(folder):
    """Return whether meta.json of a checkpoint, and every file that it names, is as it was written, and no link."""
    kinds = {"step": int, "flags": dict, "data": str, "versions": dict, "state": dict, "offsets": dict, "crc32": dict}
    try:
        files = regular_files(folder)
        meta = read_json(folder / META) if META in files else {}
        is_sound = meta.pop("own_crc32", None) == zlib.crc32(json.dumps(meta).encode())  # of the rest
        if not is_sound or {name: type(meta.get(name)) for name in kinds} != kinds or STATE not in meta["crc32"]:
            return False
        paths = [files[name] for name in meta["crc32"] if name in files]
        return dict(checksums(folder, paths)) == meta["crc32"] and is_possible(folder, meta)
    except (OSError, SafetensorError):
        return False


def is_possible(folder, meta):
    """Return whether a run can have written this: whoever forges a meta.json makes its checksums, too."""
    name, step = step_of(folder), meta["step"]
    if step < 0 or (name.isdecimal() and int(name) != step) or type(meta["flags"].get("batch_size")) is not int:
        return False
    if any(type(size) is not int or size < 0 for size in meta["offsets"].values()):
        return False
    with safe_open(folder / STATE, "pt") as tensors:
        for name in tensors.keys():
            if name.count("/") != 1 or name.split("/")[0] in meta["state"]:
                return False
    state = {"alerts": {}, "before": {}, "last": {}, "best": {"accuracy": 0}}  # of shared code; the rest is a script's
    state.update({name: value for name, value in meta["state"].items() if name in state})
    for values in state.values():
        if not isinstance(values, dict) or any(type(value) not in (int, float) for value in values.values()):
            return False
    return state["last"].keys() <= state["before"].keys() and "accuracy" in state["best"]


def keep_earlier(out, resumed, step, count):
    """Remove all checkpoints but the resumed one and the last `count` up to its step: others are damaged, too new, or
    were left by a kill before the rotation."""
    earlier = [folder for folder in checkpoints(out) if int(step_of(folder)) <= step]
    for folder in checkpoints(out):
        if folder not in [resumed, *earlier[-count:]]:
            discard(folder)


def copy_model(checkpoint, folder):
    """Copy the files that a checkpoint names, without trainer/, and nothing else that lies there by now."""
    folder.mkdir()
    for name in read_json(checkpoint / META)["crc32"]:
        if not name.startswith("trainer/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(checkpoint / name, folder / name)


def write_tensors(tensors, path, metadata=None):
    """Write a file of tensors with the permissions of every new file: save_file gives them to its owner only."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def publish(folder, name):
    """Give a written folder its final name, for good: a crash leaves the old one there, or the new one."""
    discard(name)  # of a damaged checkpoint there may be a rest
    os.rename(folder, name)
    fsync(name.parent)


def discard(folder):
    """Remove a folder without a moment in which half of it stands under its name, not even after a power cut."""
    if os.path.lexists(folder):
        removed = folder.with_name(f".old-{folder.name}")
        os.rename(folder, removed)
        fsync(folder.parent)
        remove(removed)


def remove(path):
    """Remove a file or a folder. Of a link, such as to a checkpoint on another disk, what it leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def regular_files(folder):
    """Return {name: path} of all files in a folder and in folders of it; behind links nothing is looked for."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): path for path in paths}


def sum_written(run, folder):
    """Bring the files of a new checkpoint to the disk and return {name: CRC-32} of them. Each rank does that for what
    it has written: on a network file system no other rank can, and none need see it yet."""
    written = [*folder.glob(f"trainer/shard-{run.rank + 1:05}-*")]  # dcp's names: its ranks begin with 1
    if run.rank == 0:
        written += [path for path in regular_files(folder).values() if not path.name.startswith("shard-")]
    sums = {}
    for name, value in checksums(folder, written):
        fsync(folder / name)
        sums[name] = value
        run.beat = time.monotonic()
    for part in exchange(sums, run.device, run.group):
        sums.update(part)
    return sums


def checksums(folder, paths):
    """Yield (name, CRC-32) of those of the paths in a folder that are files. Several are read at a time."""
    files = [path for path in paths if path.is_file()]
    with ThreadPoolExecutor(max_workers=8) as pool:
        for path, value in zip(files, pool.map(checksum, files)):
            yield str(path.relative_to(folder)), value


def checksum(path):
    """Return the CRC-32 of a file, which is read 1 MB at a time: eight are read at once."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value
