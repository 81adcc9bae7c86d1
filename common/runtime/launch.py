"""The way into a run and out of it: process group, output folder, checkpoint to resume from, watchdog, exit codes."""

import hashlib
import importlib
import logging
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from common.attention import use_newest_kernel
from common.runtime.flags import COMMON, STOP, STOP_SIGNALS, HealthError, InputError, PlanOnly, Preempted, printable
from common.runtime.flags import spelled_out
from common.runtime.folders import check_inputs, prepare_folder
from common.runtime.parallel import exchange, layer_dtype
from common.runtime.run import Run, first_line, peak_bytes, read_json, record

SILENCE = 20.0  # seconds from a signal to stop, or the last progress after it, to a roll call; torchrun kills after 30
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


# ---- start ---------------------------------------------------------------------------------------
def setup(args, script):
    """Return the Run, with its process group, output folder, run.json, tracker and watchdog."""
    device = find_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        use_newest_kernel()
    # A gather over tp and shard takes two steps, and torch warns of each.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    timeout = timedelta(seconds=2 * args.ddp_timeout)  # `watch` speaks first, and knows more
    # Groups that init_device_mesh makes take torch's defaults, which are 10 minutes on a GPU.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout
    lasting = dist.HashStore()  # outlives an attempt, where torchrun keeps it
    if not dist.is_initialized():
        store, rank, world = lasting, 0, 1
        if "RANK" in os.environ:  # torchrun has started this process, and others
            store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
            lasting = store
            if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":  # else each attempt has a store of its own
                store = dist.PrefixStore(attempt, store)  # keys of an earlier attempt would break a restart
        dist.init_process_group(store=store, rank=rank, world_size=world, timeout=timeout)
    rank, world = dist.get_rank(), dist.get_world_size()
    check_inputs(args)
    if rank == 0 and attempt != "0" and lasting.check(["folder"]):
        args.output_dir = lasting.get("folder").decode()  # that of the attempt before, not the first of its name
    found = prepare_folder(args, script, attempt) if rank == 0 else []
    texts = [path and str(path) for path in found]
    args.output_dir, checkpoint, error = exchange(texts, device, dist.group.WORLD)[0]
    if error:
        raise InputError(error)
    out = Path(args.output_dir)
    checkpoint = checkpoint and Path(checkpoint)
    if rank == 0:
        lasting.set("folder", args.output_dir)
    if world % (args.tp_size * args.replicate_size):
        sizes = f"--tp_size {args.tp_size} x --replicate_size {args.replicate_size}"
        raise InputError(f"{sizes} must divide the {world} ranks.")
    copies = world // args.tp_size
    if args.batch_size < copies:
        raise InputError(f"--batch_size {args.batch_size} is too small for {copies} ranks: at least {copies}.")
    mesh_shape = (args.replicate_size, copies // args.replicate_size, args.tp_size)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"mesh": "x".join(map(str, mesh_shape)), "threads": torch.get_num_threads()}
    versions["device"] = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    run = Run(
        args=args, script=Path(script), rank=rank, world=world, dp_rank=rank // args.tp_size, dp_size=copies,
        group=dist.group.WORLD, device=device, dtype=layer_dtype(args), out=out, checkpoint=checkpoint,
        mesh_shape=mesh_shape, versions=versions, command=command_line(args, script),
    )
    if rank == 0:
        about = {"status": "running", "exit_code": None, "pid": os.getpid(), "command": run.command}
        if args.report_to != "none" and args.max_steps != 0:
            about["tracker_id"] = start_tracker(run)
        source = b"".join(path.read_bytes() for path in [run.script, *sorted(COMMON.rglob("*.py"))])
        failed, git = subprocess.getstatusoutput(f"git -C {shlex.quote(str(COMMON))} rev-parse HEAD")
        about |= {"script_sha256": hashlib.sha256(source).hexdigest(), "git": None if failed else git}
        record(out, **about, versions=versions, flags=vars(args))
    exchange("", device, dist.group.WORLD)  # before a rank may write that it failed, run.json says whose the folder is
    threading.Thread(target=watch, args=[run, signals_heard()], daemon=True).start()
    return run


def find_device():
    """Return this process's GPU, by LOCAL_RANK, or the CPU. A GPU that torch cannot use is not passed over."""
    if torch.cuda.is_available():
        number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= count:
            text = "Start one process for each GPU, or unset LOCAL_RANK where each process sees one GPU only."
            raise InputError(f"LOCAL_RANK is {number}, but torch sees {count} GPUs, from 0 on. {text}")
        return torch.device("cuda", number)
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda and NVIDIA_DRIVER.is_file() and not is_hidden:
        driver = re.search(r"\d+\.[\d.]+", NVIDIA_DRIVER.read_text())[0]
        text = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, which driver {driver} does not run"
        raise InputError(f"{text}. Update the driver, install a torch for it, or set CUDA_VISIBLE_DEVICES= (CPU).")
    return torch.device("cpu")


def start_tracker(run):
    """Set run.tracker, and return its run's id. A resumed run goes on in that of the same id, which run.json keeps."""
    name = run.args.report_to
    try:
        run.tracker = importlib.import_module(name)
    except ImportError as e:
        raise InputError(f"--report_to {name} is not installed: pip install {name}") from e
    saved = read_json(run.out / "run.json").get("tracker_id") if run.checkpoint else None
    tracker_id = saved or f"{run.out.name}-{os.urandom(4).hex()}"
    options = {"project": "cleanpost", "config": vars(run.args), "resume": "allow"}
    if name == "trackio":
        run.tracker.init(name=tracker_id, **options)  # it knows a run by its name
    else:
        run.tracker.init(id=tracker_id, name=run.out.name, **options)
    return tracker_id


def command_line(args, script):
    """Return the command of this run with its preset spelled out: every flag that differs from its default."""
    words = ["python", os.path.relpath(script)]
    default = type(args)()
    for name, value in vars(args).items():
        if value == getattr(default, name) or name in ("resume", "allow_changes"):
            continue
        words.append(f"--no-{name}" if value is False else f"--{name}")
        if isinstance(value, tuple):
            words += map(str, value)
        elif not isinstance(value, bool):
            words.append(str(value))
    return shlex.join(words)


# ---- watchdog ------------------------------------------------------------------------------------
def signals_heard():
    """Return a pipe into which the numbers of signals come at once, even while the main thread waits in a collective or
    for the GPU, where Python's handlers cannot run. Children of ours hear for themselves."""
    heard, written = os.pipe()
    os.set_blocking(heard, False)
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=partial(signal.set_wakeup_fd, -1))
    return heard


def watch(run, heard):
    """In a thread of every rank: end the run after ddp_timeout seconds without progress: no chunk of rows encoded, no
    micro-batch computed, no step done. When a signal to stop brings no progress either, another rank may have died, of
    which NCCL does not tell: say where each rank stands before torchrun kills all."""
    asked = math.inf  # time of a signal to stop
    while time.monotonic() - run.beat < run.args.ddp_timeout:
        time.sleep(min(1.0, run.args.ddp_timeout / 10))
        with suppress(BlockingIOError):
            if not set(STOP_SIGNALS).isdisjoint(os.read(heard, 64)):
                asked = time.monotonic()
        if time.monotonic() - max(asked, run.beat) > SILENCE:
            roll_call(run, f"no progress for {SILENCE:g} s since a signal to stop", ends=False)
            asked = math.inf
    roll_call(run, f"no progress for {run.args.ddp_timeout:g} s (longer steps need a longer --ddp_timeout)")


def roll_call(run, why, ends=True):
    """Each rank says which function of this project it is in, the first to do so prints what all said, and all end
    (ends=False: they go on). Who is dead, stopped or keeps the interpreter is named by silence."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    functions = [frame.name for frame in stack if frame.filename.startswith((str(run.script), str(COMMON)))]
    store = dist.distributed_c10d._get_default_store()
    answers = []
    try:
        store.set(f"rank {run.rank} {ends}", f"is in {functions[-1]}")
        is_first = store.add(f"roll call {ends}", 1) == 1
        time.sleep(3)
        for rank in range(run.world):
            key = f"rank {rank} {ends}"
            answer = store.get(key).decode() if store.check([key]) else "does not answer"
            answers.append(f"rank {rank} {answer}")
    except RuntimeError:  # the store died with its rank
        answers = ["rank 0 does not answer"]
        is_first = run.rank == 1
    if is_first:
        message = f"step {run.step + 1}: {why}: {'; '.join(answers)}. To go on: {run.command} --resume auto"
        print("\nerror:", spelled_out(message), file=sys.stderr, flush=True)  # below a bar
    if not ends:
        return
    if not is_first:
        time.sleep(3)  # leaving breaks the collectives of the rank that prints
    elif read_json(run.out / "run.json").get("exit_code") is None:  # else a rank has left for a known reason
        with suppress(OSError):  # of a full disk: this thread has to end the process in any case
            record(run.out, status="failed", exit_code=1)
    os._exit(1)


# ---- end -----------------------------------------------------------------------------------------
def launch(main, args, script):
    """Set up and run main, and leave with the exit code, also in run.json: 0 done, 1 crash, 2 bad flags, data, model or
    environment, 3 health error, 4 told to stop."""
    rank = int(os.environ.get("RANK", "0"))
    run = None
    code = 1
    try:
        run = setup(args, script)
        for number in STOP_SIGNALS:
            signal.signal(number, partial(on_stop, run, os.getpid()))
        with suppress(PlanOnly):
            main(args, run)
        code = 0
    except (MemoryError, RuntimeError, OSError, InputError, HealthError, Preempted) as e:
        if run and run.bar:
            run.bar.close()
        message = str(e)
        code = getattr(e, "exit_code", 2 if isinstance(e, OSError) else 1)
        if isinstance(e, OSError):
            message += ". Check --output_dir and the disk."
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in message:
            code = 2
            message = f"out of memory: {memory_advice(run)}"
        if code == 1:
            if run and re.search("[Gg]loo|NCCL|[Cc]onnection", message):
                roll_call(run, first_line(e))
            raise
        if code == 2 or rank == 0:
            print("" if code == 4 else "error: ", printable(message), sep="", file=sys.stderr, flush=True)
    finally:
        with suppress(OSError):  # the disk that is full or locked may be why we leave, which has been said
            # Without a run the folder may be another one's. What a restart would only meet again, any rank may say.
            if code and run and (rank == 0 or code in (2, 3)):
                record(run.out, status="stopped" if code == 4 else "failed", exit_code=code)
    if code:
        os._exit(code)  # a failed rank does not wait for the others
    dist.destroy_process_group()


def on_stop(run, pid, number, _frame):
    """Say at once that a signal to stop was heard. Before the first step there is nothing to save, and the process
    leaves; later the run saves and leaves where the step ends. A second signal means now."""
    if STOP["signal"] or os.getpid() != pid:  # a child of ours has no run of its own
        os._exit(128 + number)
    STOP["signal"] = number
    text = "there is nothing to save yet, the run leaves"
    if run.in_steps:
        text = "the run saves where this step ends, and leaves; once more leaves now"
    if run.rank == 0:
        os.write(2, f"{signal.Signals(number).name} was heard: {text}\n".encode())  # print could meet a print
    if not run.in_steps:
        with suppress(OSError):
            if run.rank == 0:
                record(run.out, status="stopped", exit_code=4)
        os._exit(4)


def memory_advice(run):
    """Return what the run was doing, and the flags to lower. run: None before setup is done."""
    if run is None:
        return "use a smaller --model or more ranks."
    half = max(1, run.args.tokens_per_microbatch // 2)
    use = f"step {run.step + 1} computes with {peak_bytes() / 1e9:.1f} GB"
    return f"{use}. Lower --tokens_per_microbatch to {half} (and --max_length), or use more ranks or --cpu_offload."
