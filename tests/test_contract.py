"""The contract of the stable scripts: flags with types, defaults and aliases, the presets of the tiny lab, dataset
columns, built-in rewards, metric keys, files, alert codes and exit codes are those of tests/fixtures/contract.json. Its
version is the newest one of CHANGELOG.md.

    python tests/test_contract.py                 after a change: say what changed, and write it if CHANGELOG.md begins
                                                  with a new version
    python tests/test_contract.py --same-version  the same for a version that nobody has yet
"""
import argparse
import ast
import contextlib
import inspect
import io
import json
import os
import re
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, get_args, get_origin, get_type_hints
from unittest.mock import patch

import pytest
import torch.distributed as dist
from conftest import METHODS, ROOT, STABLE, lone_run, script, train

from common.rewards import BUILT_IN
from common.runtime import launch
from common.runtime.flags import HealthError, InputError, Preempted
from common.runtime.health import check
from common.tokenization import load_tokenizer, stop_ids

SNAPSHOT = ROOT / "tests" / "fixtures" / "contract.json"
TEXT = {"text": "1+1= 2", "prompt": "1+1=", "completion": " 2", "chosen": "1+1= 2", "rejected": "1+1= 3"}
ASKED, RIGHT, WRONG = ({"role": role, "content": text} for role, text in
                       (("user", "1+1="), ("assistant", "2"), ("assistant", "3")))  # fmt: skip
CHAT = {"prompt": [ASKED], "completion": [RIGHT], "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]}
CHAT |= {"messages": [ASKED, RIGHT], "conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]}
FORMATS = ["text", "messages", "conversations", "prompt", "prompt completion", "chosen rejected"]
FORMATS += ["prompt chosen rejected", "text label", "messages label", "prompt completion label"]
MORE = {name: ["--importance_sampling_mode", "token_truncate"] for name in ("grpo", "rloo")}  # with a metric of its own
MEANT = """
If that is meant, begin CHANGELOG.md with a new version and a line on it, and run python tests/test_contract.py"""


def newest_version():
    """Of CHANGELOG.md, whose first heading is the newest."""
    return re.search(r"^## ([\d.]+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]


# ---- what a script promises ------------------------------------------------------------------------------------------


def flags(module):
    """{flag: "type = default (aliases)"}, in the order of --help."""
    found = {}
    for name, kind in get_type_hints(module.Args, include_extras=True).items():
        more = ()
        if get_origin(kind) is Annotated:
            kind, *more = get_args(kind)
        aliases = [alias.replace("-", "_").replace("__", "--", 1) for m in more for alias in m.aliases or ()]
        text = kind.__name__ if kind in (str, int, float, bool) else repr(kind).replace("typing.", "")
        default = next(field.default for field in fields(module.Args) if field.name == name)
        found[name] = f"{text} = {default!r}" + f" ({', '.join(aliases)})" * bool(aliases)
    return found


def presets(module):
    """{flag: value} that --model tiny sets."""
    default = asdict(module.Args())
    return {name: value for name, value in asdict(module.parse_args([])).items() if value != default[name]}


def columns(module, tmp):
    """The formats that the script reads, of FORMATS as text and as messages; and whether it reads a margin."""
    args, found = module.parse_args([]), []
    tokenizer = load_tokenizer(ROOT / "common" / "tiny" / "model")
    more = {"label": True, "margin": "no number"}
    rows = {f"{names} ({kind})": {name: (values | more).get(name) for name in names.split()}
            for kind, values in (("text", TEXT), ("messages", CHAT)) for names in FORMATS}
    rows["margin"] = {name: TEXT[name] for name in ("prompt", "chosen", "rejected")} | {"margin": 0.5}
    refused = rows["margin"] | {"margin": "no number"}
    for names, row in rows.items():
        if None not in row.values() and loads(module, row, tokenizer, args, tmp):
            found += [names] * (names != "margin" or not loads(module, refused, tokenizer, args, tmp))
    return found


def loads(module, row, tokenizer, args, tmp):
    path = tmp / "row.jsonl"
    path.write_text(json.dumps(row) + "\n")
    try:
        return len(module.load_groups(str(path), tokenizer, stop_ids(tokenizer), args, lone_run(args))[0])
    except InputError:
        return 0


def exit_codes(module):
    """{what happens: the process's exit code}."""
    errors = {"done": None, "crash": ValueError(""), "bad input": InputError(""), "disk": OSError(""),
              "out of memory": MemoryError(""), "health": HealthError(""), "preempted": Preempted("")}  # fmt: skip
    codes, args = {}, SimpleNamespace(output_dir="")
    for name, error in errors.items():
        def run(_args, _run, error=error):
            if error:
                raise error

        no_end = patch.object(os, "_exit", sys.exit), patch.object(dist, "destroy_process_group", lambda: None)
        with no_end[0], no_end[1], patch.object(launch, "setup", lambda *_: None):
            try:
                launch.launch(run, args, module.__file__)
                codes[name] = 0
            except SystemExit as ended:
                codes[name] = ended.code
            except ValueError:  # Python's own exit code for what nobody caught
                codes[name] = 1
    try:
        module.parse_args(["--no-such-flag"])
    except SystemExit as ended:
        codes["bad flag"] = ended.code
    return codes


def files(out):
    """{file that a run leaves: the keys of its objects, of files that this project defines}, steps left out."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = re.sub(r"\d{6}(?=/)", "STEP", path.relative_to(out).as_posix())
        text = path.read_text() if path.suffix in (".json", ".jsonl") else ""
        objects = map(json.loads, text.splitlines() if path.suffix == ".jsonl" else [text])
        ours = name in ("run.json", "samples.jsonl") or name.endswith("meta.json")
        found[name] = sorted({key for value in objects for key in value}) if ours else ""
    return found


def alert(module, tmp):
    """Keys of a line in alerts.jsonl."""
    args = SimpleNamespace(allow=())
    run = SimpleNamespace(state={"alerts": {}}, checkpoint=None, rank=0, out=tmp, args=args, bar=None,
                          dtype=None)
    check(run, "TEST001", step=1, metric="share", value=1.0, error=0.5, message="a test", fix=("--flag", 1, 2))
    return list(json.loads((tmp / "alerts.jsonl").read_text()))


def contract(name):
    """What methods/NAME.py promises, found out from its code and from a run of three steps."""
    module = script(name)
    codes = set()
    shared = (path for path in (ROOT / "common").rglob("*.py") if path.parent.name != "experimental")
    for path in METHODS / f"{name}.py", *shared:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and re.fullmatch(r"[A-Z]+\d{3}", str(node.value)):
                codes.add(node.value)
    with tempfile.TemporaryDirectory() as folder:
        tmp, out = Path(folder), Path(folder) / "run"
        few = "--max_steps", "3", "--save_every", "2", "--eval_every", "2", "--eval_rows", "4", "--batch_size", "4"
        train(name, out, *few, *MORE.get(name, []))
        built_in = BUILT_IN if hasattr(module, "rollout") else {}
        rewards = {key: list(inspect.signature(function).parameters) for key, function in built_in.items()}
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        metrics = {re.sub(r"@\d+", "@k", key) for line in lines for key in line}
        with contextlib.redirect_stderr(io.StringIO()):  # what alerts and errors say
            return {
                "flags": flags(module), "presets": presets(module), "columns": columns(module, tmp),
                "rewards": rewards, "metrics": sorted(metrics), "files": files(out), "alert": alert(module, tmp),
                "alerts": sorted(codes), "exit codes": exit_codes(module),
            }  # fmt: skip


# ---- comparison ------------------------------------------------------------------------------------------------------


def flat(value, path=()):
    """{path: leaf}; members of a list are paths, so that one more is one difference."""
    if isinstance(value, dict) and value:
        return {k: v for key, part in value.items() for k, v in flat(part, (*path, key)).items()}
    if isinstance(value, list) and value:
        return {(*path, str(part)): "" for part in value}
    return {path: value}


def differences(old, new):
    """-> lines "dpo flags beta: float = 0.1 -> gone"."""
    old, new = flat(old), flat(new)
    shown = {path: [side.get(path, "gone" if side is new else "none") for side in (old, new)]
             for path in dict.fromkeys([*old, *new]) if path not in old or path not in new or old[path] != new[path]}
    return [f"{' '.join(path)}: {was if was != '' else 'there'} -> {now if now != '' else 'there'}"
            for path, (was, now) in shown.items()]


@pytest.fixture(scope="module")
def snapshot():
    return json.loads(SNAPSHOT.read_text())


@pytest.mark.parametrize("name", STABLE)
def test_contract(name, snapshot):
    changed = differences({name: snapshot["scripts"].get(name)}, {name: contract(name)})
    assert not changed, "\n  ".join([f"methods/{name}.py breaks its contract:", *changed]) + MEANT


def test_no_script_left_the_contract(snapshot):
    assert sorted(snapshot["scripts"]) == STABLE


def test_the_version_is_that_of_the_changelog(snapshot):
    said = "python tests/test_contract.py, or CHANGELOG.md, is not up to date"
    assert snapshot["version"] == newest_version(), said


BREAKS = {  # what may change, and how it is said
    "flag added": (lambda c: c["flags"].update(new="int = 1"), "dpo flags new: none -> int = 1"),
    "flag gone": (lambda c: c["flags"].pop("seed"), "dpo flags seed: int = 42 -> gone"),
    "default": (lambda c: c["flags"].update(seed="int = 43"), "dpo flags seed: int = 42 -> int = 43"),
    "preset": (lambda c: c["presets"].update(batch_size=1), "dpo presets batch_size: 32 -> 1"),
    "reward": (lambda c: c["rewards"].update(new=["prompts"]), "dpo rewards new prompts: none -> there"),
    "column": (lambda c: c["columns"].append("margin"), "dpo columns margin: none -> there"),
    "metric": (lambda c: c["metrics"].remove("reward_acc"), "dpo metrics reward_acc: there -> gone"),
    "file": (lambda c: c["files"].pop("run.json"), "dpo files run.json seconds: there -> gone"),
    "key": (lambda c: c["files"]["run.json"].remove("status"), "dpo files run.json status: there -> gone"),
    "alert": (lambda c: c["alerts"].append("NEW001"), "dpo alerts NEW001: none -> there"),
    "exit code": (lambda c: c["exit codes"].update(health=4), "dpo exit codes health: 3 -> 4"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_differences_are_named(kind, snapshot):
    old, new = ({"dpo": json.loads(json.dumps(snapshot["scripts"]["dpo"]))} for _ in range(2))
    assert differences(old, new) == []
    change, said = BREAKS[kind]
    change(new["dpo"])
    assert said in differences(old, new)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--same-version", action="store_true", help="for a version that nobody has yet")
    same = parser.parse_args().same_version
    old = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.is_file() else {"version": "", "scripts": {}}
    new = {"version": newest_version(), "scripts": {name: contract(name) for name in STABLE}}
    changed = differences(old["scripts"], new["scripts"])
    print("\n".join(changed) or "nothing changed")
    if changed and new["version"] == old["version"] and not same:
        sys.exit(f"error: not written. CHANGELOG.md begins with {old['version']}, which promised something else: "
                 "begin it with a new version and a line on this change.")
    SNAPSHOT.write_text(json.dumps(new, indent=1) + "\n")


if __name__ == "__main__":
    main()
