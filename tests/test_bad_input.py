"""What users get wrong ends with one line that says what is wrong, where, and what to type; and with nothing lost."""

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import ROOT, script, tiny_flags, tiny_rows


def leave(name, *flags, patch=None, limit=60):
    """The script's way out, in a forked child: parse_args, then launch(main, args), as its last line does.
    Returns code (negative: a signal; None: still running after `limit` seconds), out, err."""
    module = script(name)  # imported here, once: a fork then costs nothing
    folder = Path(tempfile.mkdtemp(prefix="leave"))
    pid = os.fork()
    if not pid:
        try:
            os.setsid()
            for number, stream in (1, "stdout"), (2, "stderr"):  # pytest has replaced both the descriptor and the object
                os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
                setattr(sys, stream, os.fdopen(number, "w", buffering=1))
            torch.set_num_threads(1)
            if patch:
                patch(module)
            module.launch(module.main, module.parse_args([str(flag) for flag in flags]))
            os._exit(0)
        except SystemExit as e:
            sys.stdout.flush()
            os._exit(e.code if isinstance(e.code, int) else 1)
        except BaseException:  # what a terminal would show; the assertions are the parent's
            traceback.print_exc()
        finally:
            os._exit(1)
    end, status = time.monotonic() + limit, (0, 0)
    while not status[0] and time.monotonic() < end:
        status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
    if not status[0]:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    out, err = ((folder / stream).read_text(errors="replace") for stream in ("stdout", "stderr"))
    shutil.rmtree(folder)
    return SimpleNamespace(code=os.waitstatus_to_exitcode(status[1]) if status[0] else None, out=out, err=err)
