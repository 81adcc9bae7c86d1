"""Flags: those that every script has, and how a command line becomes Args. Nothing slow is imported here, so that
--help and every wrong flag answer at once."""

import contextlib
import io
import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import arg

VERSION = "0.4"  # of common/; every script names the one that it was written for
COMMON = Path(__file__).resolve().parents[1]  # common/, with the data of the tiny lab
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last one is what schedulers send ahead of time
STOP = {"signal": 0}  # the number of the signal that told this process to stop; read where a step ends
# Counts that 0 turns off.
MAY_BE_ZERO = ("eval_every", "save_every", "warmup_steps", "eval_samples", "max_steps", "top_k", "loss_top_k")
MAY_BE_NEGATIVE = ("seed", "reward_bar", "success_reward_threshold")  # the seed has a check of its own below
SIZES = ("batch_size", "num_generations", "max_completion_length")  # counts that take memory: at most 2**20


class InputError(ValueError):
    """Bad flags, data, model or environment. The text is one line: what is wrong, where, what was found, what to do."""

    exit_code = 2


class HealthError(Exception):
    exit_code = 3  # the run cannot train


class Preempted(Exception):
    exit_code = 4  # the run was told to stop, and has saved


class PlanOnly(Exception):
    """--max_steps 0: the plan was shown, and the run is done."""


@dataclass
class RunFlags:
    model: Annotated[str, arg(aliases=["--model-name-or-path"])] = "tiny"  # folder, hub id, ID@REVISION; tiny: the lab
    output_dir: str = ""  # default: runs/<script>, or the next free runs/<script>-2, -3
    resume: Annotated[str, arg(aliases=["--resume-from-checkpoint"])] = "never"  # never, auto (newest) or a folder
    allow_changes: bool = False  # resume although flags, data or model differ
    allow: tuple[str, ...] = ()  # alert codes that must not stop the run
    seed: int = 42  # data order and sampling noise
    replicate_size: int = 1  # copies of the sharded model (HSDP); ranks / (replicate_size * tp_size) shard one copy
    tp_size: int = 1  # ranks that share each layer's matrices (tensor parallelism), adjacent ones: one machine
    cpu_offload: bool = False  # parameters and optimizer in host memory
    dtype: str = "auto"  # of the layers: float32 or bfloat16; auto: bfloat16 on CUDA, else float32. Weights stay fp32
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"  # compute layers again in backward; auto: if needed
    compile: bool = False  # each decoder layer by torch.compile
    deterministic: bool = False  # bitwise reruns on CUDA too, slower
    ddp_timeout: float = 1800.0  # seconds without progress after which a run ends and names the rank
    eval_every: Annotated[int, arg(aliases=["--eval-steps"])] = 100  # optimizer steps; 0: only before and after
    save_every: Annotated[int, arg(aliases=["--save-steps"])] = 500  # optimizer steps; 0: only by time and at the end
    save_minutes: float = 30.0  # a checkpoint at least this often
    keep_last: Annotated[int, arg(aliases=["--save-total-limit"])] = 2  # checkpoints to keep
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # of exported weights; bfloat16 rounds small updates away
    report_to: Literal["none", "wandb", "trackio"] = "none"  # metrics.jsonl is written anyway

    def check(self):
        """Raise InputError for values that no run can mean. A script's Args add the rules of the method."""
        default = type(self)()
        for name, value in vars(self).items():
            if type(value) not in (int, float) or value == getattr(default, name):
                continue
            least = 0 if type(value) is float or name in MAY_BE_ZERO else 1
            if name in MAY_BE_NEGATIVE:
                least = -(2**53)
            most = 2**20 if name in SIZES else 2**53
            if not least <= value <= most:  # false for nan, too
                raise InputError(f"--{name} {value}: must be a number from {least} to {most}.")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            fix = "Give auto, float32 or bfloat16: float16's gradients vanish without loss scaling."
            raise InputError(f"--dtype {self.dtype}: {fix}")
        try:
            dict(**json.loads(getattr(self, "chat_template_kwargs", "{}")))  # a TypeError for all but an object
        except (TypeError, ValueError, RecursionError):
            text = f"--chat_template_kwargs {self.chat_template_kwargs[:200]!a}: must be a JSON object."
            raise InputError(text) from None
        beta = max(getattr(self, "adam_beta1", 0), getattr(self, "adam_beta2", 0))
        if beta >= 1 or not 0 <= self.seed < 2**32:
            raise InputError("--adam_beta1 and --adam_beta2 must be below 1, --seed from 0 to 2**32 - 1.")


def parse_flags(kind, doc, argv=None, preset="", version=VERSION):
    """Return a command line as `kind`, a script's Args. --help prints `doc` first; with --model tiny, the preset fills
    in what was not given. Without argv it is that of the process, and from here on a signal to stop gets an
    answer and exit code 4."""
    if argv is None:
        for number in STOP_SIGNALS:
            signal.signal(number, on_signal)
        argv = sys.argv[1:]
        for stream in sys.stdout, sys.stderr:
            stream.reconfigure(errors="backslashreplace")  # text that a terminal has no letters for must not end a run
    if version != VERSION:
        script = sys.modules[kind.__module__].__file__
        refuse(f"{script} was written for common/ {version}, but {COMMON} is {VERSION}. Use those of one release.")
    if doc and ("-h" in argv or "--help" in argv):
        print(doc.strip() + "\n")  # tyro would re-flow it
    args = read_flags(kind(), argv)
    if args.model == "tiny" and preset:
        folder = COMMON / "tiny"
        if not folder.is_dir():  # a script that was bundled with common/ into one file
            refuse(f"--model tiny: there is no folder {folder}. Copy common/tiny there, or pass --model and --dataset.")
        presets = json.loads((folder / "presets.json").read_text())
        args = read_flags(kind(**presets[preset]), argv)
    try:
        args.check()
    except InputError as e:
        refuse(str(e))
    if sys.flags.optimize > 1:  # python -OO: without docstrings, which transformers completes when it loads a model
        import transformers.utils

        transformers.utils.auto_docstring = leave_docstring
    if getattr(args, "eval_fraction", 0):
        hold_out(args)
    return args


def leave_docstring(item=None, **_):
    """Do nothing to a class or function, as a decorator with or without arguments."""
    return leave_docstring if item is None else item


def hold_out(args):
    """Write --eval_fraction as two slices of --dataset, so that a resume and the printed command name the same rows."""
    if args.eval_dataset or not 0 < args.eval_fraction < 1:
        refuse(f"--eval_fraction {args.eval_fraction:g}: must be below 1, and without --eval_dataset. Choose one.")
    border = f"{100 - 100 * args.eval_fraction:g}%"
    args.dataset, args.eval_dataset = f"{args.dataset}[:{border}]", f"{args.dataset}[{border}:]"
    args.eval_fraction = 0.0


def read_flags(default, argv):
    """Return the Args that argv makes of the default ones. The frame that tyro draws around an error becomes a line."""
    frame = io.StringIO()
    try:
        " ".join(argv).encode()  # bytes that are no text would fail where a file is written, hours later
        with contextlib.redirect_stderr(frame):
            return tyro.cli(type(default), args=argv, default=default)
    except UnicodeEncodeError:
        refuse(f"a flag is not UTF-8: {' '.join(argv)!a}. Type text.")
    except SystemExit as e:
        if not e.code:  # --help
            raise
    refuse(" ".join(re.sub("[^ -~]+|-{9,}", " ", frame.getvalue()).split()))


def refuse(message):
    print("error:", printable(message), file=sys.stderr)
    sys.exit(2)


def printable(message):
    """Return the message for a terminal: without its middle if it is long, control characters spelled out."""
    if len(message) >= 900:
        message = f"{message[:400]} ... {message[-450:]}"
    return spelled_out(message)


def spelled_out(text):
    """Return the text with its control characters as Python spells them: what data, models or folders are called must
    not move a cursor, clear a terminal or name its window."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def on_signal(number, _frame):
    """Say that a signal to stop was heard, and leave: before setup there is nothing to save. `launch` takes over."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{signal.Signals(number).name} was heard: there is nothing to save yet, the run leaves\n".encode())
    os._exit(4)
