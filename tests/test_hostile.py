"""A slice of benchmarks/hostile.py, whether its judge sees what it is there for, and what no source may call."""

import ast
import importlib.util
import os
import random
import re
import sys

import pytest
from conftest import METHODS, ROOT

SEED, ROUNDS = 11, 4  # of one case per family and round, half of them with --slow; the scripts take turns


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("hostile", ROOT / "benchmarks" / "hostile.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    before, module.root = dict(os.environ), tmp_path_factory.mktemp("hostile")
    module.quiet_world(module.root)
    module.prepare(module.root)
    yield module
    os.environ.clear()
    os.environ.update(before)


def number(hostile, family, turn):
    """The case of a family in a round, with another script in each."""
    families, first = (LATER, 1000) if family in LATER else (FAMILIES, 0)
    scripts, place = len(hostile.SCRIPTS), families.index(family)
    return first + scripts * (len(families) * turn + place) + (turn + place) % scripts


FAMILIES = ("rows text lines tables templates tokenizers configs weights checkpoints flags folders own "
            "scoring columns models judging").split()  # fmt: skip
LATER = "pipes links neighbours strangers failing spellings teachers experimental".split()


@pytest.mark.parametrize("family", [*FAMILIES, *LATER])
def test_a_slice_ends_as_asked(hostile, family, request):
    assert list(hostile.FAMILIES) == [*FAMILIES, *LATER]
    rounds = 2 if family in LATER else ROUNDS
    for turn in range(rounds if request.config.getoption("--slow") else rounds // 2):
        row, _ = hostile.attempt(number(hostile, family, turn), SEED, hostile.root, via="fork")
        assert row["family"] == family
        assert row["ok"], row


@pytest.mark.parametrize("case", [222, 725, 777, 917, 942])
def test_cases_that_once_failed(hostile, case):
    """A forged meta.json, a file named final, an eos_token_id that is an object, a window that is not a number."""
    first = ["sft", "dpo", "grpo"]  # the numbers count these scripts, and the families before `own`
    before = FAMILIES[: FAMILIES.index("own")]
    row, _ = hostile.attempt(case, 0, hostile.root / "once", before, via="fork", scripts=first)
    assert row["ok"], row


def test_a_case_as_a_process(hostile):
    row, _ = hostile.attempt(number(hostile, "rows", 0), SEED, hostile.root / "process", via="process")
    assert row["ok"], row


def test_the_same_seed_is_the_same_case(hostile):
    rows = [hostile.attempt(number(hostile, "lines", 0), SEED, hostile.root / f"again{k}", via="fork")[0] for k in "ab"]
    assert {**rows[0], "seconds": 0} == {**rows[1], "seconds": 0}
    made = [hostile.Case(k, SEED, hostile.root / f"made{k}") for k in range(99)]
    assert len({tuple(case.mutations) for case in made}) > 60


# ---- the judge -----------------------------------------------------------------------------------

ENDS = {  # what a child does instead of launching -> what the judge has to say
    "a traceback": (lambda args: 1 / 0, "traceback"),
    "a crash": (lambda args: os._exit(1), "code 1"),
    "silence": (lambda args: os._exit(2), "0 error lines"),
    "no name": (lambda args: leave("error: something is wrong. Type --help"), "names no input"),
    "no remedy": (lambda args: leave("error: rows.jsonl is wrong"), "nothing to type"),
    "two lines": (lambda args: leave("error: rows.jsonl\nerror: Type --dataset"), "2 error lines"),
    "an escape": (lambda args: leave("error: rows.jsonl \x1b[31m. Type --dataset"), "control characters"),
    "chatter": (lambda args: leave("a warning\nerror: rows.jsonl. Type --dataset"), "other lines"),
    "a folder": (lambda args: unfinished(args), "final/ stands"),
    "nothing done": (lambda args: os._exit(0), "expected [2, 3]"),
    "planted code": (lambda args: os.system("touch canary") or leave("error: rows.jsonl. Type --dataset"), "planted"),
    "the secret": (lambda args: leave("error: rows.jsonl: SECRET-5f0c. Type --dataset"), "was read"),
}


def leave(text):
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
    os._exit(2)


def unfinished(args):
    os.makedirs(os.path.join(args.output_dir, "final"))
    leave("error: rows.jsonl. Type --dataset")


@pytest.mark.parametrize("end", ENDS)
def test_the_judge_sees(hostile, end, monkeypatch):
    act, needle = ENDS[end]
    bad = next(k for k in range(999) if k % 6 == 0 and k // 6 % len(FAMILIES) == FAMILIES.index("lines")
               and hostile.Case(k, SEED, hostile.root / "look").expected == "bad")
    monkeypatch.setattr(hostile.MODULES["sft"], "launch", lambda main, args, script: act(args))
    row, _ = hostile.attempt(bad, SEED, hostile.root / f"judge-{end.replace(' ', '-')}", via="fork")
    assert not row["ok"] and needle in str(row["why"]), row


def test_the_judge_counts_rows_and_wants_the_weights_of_an_undisturbed_run(hostile, monkeypatch):
    """A script that drops a row, and a resume that starts with other weights."""
    module = hostile.MODULES["sft"]
    rows = module.load_rows
    monkeypatch.setattr(module, "load_rows", lambda *args, **more: rows(*args, **more)[:-1])
    case = hostile.Case(0, SEED, hostile.root / "count", [])
    code, out, err, _ = hostile.forked(case, case.write())
    assert "7 of 7 rows kept, expected 8" in str(hostile.judge(case, code, out, err, {}))
    monkeypatch.undo()
    monkeypatch.setattr(module, "schedule", lambda step, steps, args: 0.5)
    case = hostile.Case(0, SEED, hostile.root / "resume", [])
    hostile.earlier(case)
    code, out, err, _ = hostile.forked(case, case.write())
    assert "ended elsewhere" in str(hostile.judge(case, code, out, err, {})), err


WANTED = [  # what a case may ask for, and what the judge says of a run that does otherwise
    ({"scored": ["other<|end|>"]}, "expected ['other<|end|>']"), ({"scored_first": "other"}, "expected 'other' first"),
    ({"scored_ends": ["other"]}, "does not end in 'other'"), ({"num_tokens": 7}, "tokens scored, expected 7"),
    ({"loss": 0.5}, "expected 0.50000"), ({"metrics": {"lr": 2.0}}, "expected 2.0"), ({"out": ["no such"]}, "no such"),
    ({"alert": "DATA011"}, "no alert DATA011"),
]  # fmt: skip


def touch_others(folder, name):
    """What a run must not do to files of others: change one, remove one, follow a link, add one."""
    path = folder / name
    if name == "added":
        path.write_text("x")
    elif name == "removed":
        path.unlink()
    elif name == "link":
        path.unlink()
        path.symlink_to(folder / "changed")
    else:
        path.write_bytes(b"other")


@pytest.mark.parametrize("name", ["changed", "removed", "link", "added"])
def test_the_judge_sees_what_belongs_to_others(hostile, name):
    case = hostile.Case(0, SEED, hostile.root / f"others-{name}", [])
    folder = case.folder / "theirs"
    folder.mkdir()
    for file in "changed", "removed", "link":
        (folder / file).write_bytes(b"\xff")
    case.guard(folder, is_closed=True)
    assert hostile.taken(case) == []
    touch_others(folder, name)
    assert name in str(hostile.taken(case))


def test_the_judge_looks_at_what_is_published(hostile):
    """A file of no model, a link, an address of code, a file that its owner alone may read; and a secret anywhere."""
    case = hostile.Case(0, SEED, hostile.root / "published", [])
    code, out, err, _ = hostile.forked(case, case.write())
    final = case.folder / "out" / "final"
    assert hostile.judge(case, code, out, err, {}) == []
    (final / "notes.txt").write_text(hostile.SECRET)
    (final / "chat.jinja").symlink_to(case.secret)
    (final / "config.json").write_text('{"auto_map": {}}')
    (final / "tokenizer.json").chmod(0o600)
    wrong = str(hostile.published(final))
    for needle in "holds notes.txt", "chat.jinja is no file", "config.json says where code is", "modes":
        assert needle in wrong, needle
    assert "notes.txt holds what a path" in str(hostile.judge(case, code, out, err, {}))


def test_the_judge_compares_what_a_case_asks_for(hostile):
    case = hostile.Case(0, SEED, hostile.root / "wanted", [])
    code, out, err, _ = hostile.forked(case, case.write())
    for asked, needle in WANTED:
        case.want = {"line": [], "alert": None, **asked}
        assert needle in str(hostile.judge(case, code, out, err, {})), needle
    case.want = {"line": [], "alert": None, "out": ["rows kept"]}
    assert hostile.judge(case, code, out, err, {}) == []
    case.want = {"line": ["no such word"], "alert": None}
    assert "lacks no such word" in str(hostile.as_wanted(case, 2, "", "error: rows.jsonl is wrong", case.folder))


# ---- sources -------------------------------------------------------------------------------------

MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml", "code", "codeop", "pty"}
CALLS = {"torch.load", "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "np.load",
         "dcp.FileSystemReader", "runpy.run_path", "jinja2.Template", "jinja2.Environment"}  # fmt: skip


def arguments(call, tree):
    """Return {name: text} of a call's keywords, with those of a `**options` that is a dict display of the file. The
    name may stand for one display only: two functions may not mean different ones by it."""
    given = {}
    for keyword in call.keywords:
        if keyword.arg:
            given[keyword.arg] = ast.unparse(keyword.value)
            continue
        for display in displays(ast.unparse(keyword.value), tree):
            for key, value in zip(display.keys, display.values):
                name = key and ast.literal_eval(key)  # None: another ** inside
                assert given.setdefault(name, ast.unparse(value)) == ast.unparse(value), ast.unparse(call)
    return given


def displays(name, tree):
    """Return the dict displays that a file assigns to a name."""
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    values = [node.value for node in assigned if name in map(ast.unparse, node.targets)]
    return [value for value in values if isinstance(value, ast.Dict)]


COMMON = ROOT / "common"
SOURCES = [*METHODS.rglob("*.py"), *COMMON.glob("*.py"), *COMMON.glob("runtime/*.py"), *COMMON.glob("tools/*.py")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_runs_what_it_reads(path):
    """As syntax, so that neither a comment nor an alias of an import decides."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & MODULES, ast.unparse(node)
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in CALLS, ast.unparse(node)
            given = arguments(node, tree)
            assert given.get("shell", "False") == "False" and given.get("weights_only", "True") == "True"
            loads = ast.unparse(node.func).endswith(".from_pretrained")
            if loads and not ast.unparse(node.func).startswith("GenerationConfig"):  # that one reads JSON only
                assert given.get("trust_remote_code") == "False", ast.unparse(node)
                if re.search("Model|auto_class", ast.unparse(node.func)):
                    assert given.get("use_safetensors") == "True", ast.unparse(node)


def test_cases_are_drawn_from_their_own_dice(hostile):
    random.seed(1)
    first = hostile.Case(5, SEED, hostile.root / "dice1").mutations
    random.seed(2)
    assert hostile.Case(5, SEED, hostile.root / "dice2").mutations == first
