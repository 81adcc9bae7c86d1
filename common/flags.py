"""Flags, before the slow imports: what tyro says about wrong ones, in one line."""
import contextlib
import io
import re
import sys

import tyro


def read_flags(kind, argv, **more):
    """-> tyro.cli(kind, args=argv, ...). Wrong flags: `error: ...` and exit code 2."""
    said = io.StringIO()
    try:
        " ".join(argv).encode()  # bytes that are no text would fail where a file is written, hours later
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=argv, **more)
    except (SystemExit, UnicodeEncodeError) as e:
        if getattr(e, "code", 2):  # tyro draws a frame of many lines, and shows what was typed as it is
            text = said.getvalue() or f"a flag is not UTF-8: {e.object[max(0, e.start - 60) : e.end]!a}. Type text"
            text = " ".join(re.sub("[^ -~]+|-{9,}", " ", text).split())
            print("error:", text if len(text) < 900 else f"{text[:400]} ... {text[-450:]}", file=sys.stderr)
        sys.exit(getattr(e, "code", 2))
