"""`python -m common.tools.bundle SCRIPT` writes one standalone file: in a folder without common/ it trains to the bytes
of the script, resumes what the script saved, and says what it needs where something is missing."""

import ast
import json
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from conftest import ROOT, STABLE, ended, read_jsonl, tiny_flags, tiny_rows

from common.tools.bundle import BundleError, bundle, replaced, without_spare_imports

REWARD = "def evens(prompts, completions, **_):\n    return [float(c[0]['content'].count('2')) for c in completions]\n"


# ---- files that run as a user runs them ------------------------------------------------------------------------------


def run_as_main(path, folder, argv, log):
    """What the child does: the file as __main__, in another folder, where nobody has imported common/ yet."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)  # pytest has its own
    torch.set_num_threads(1)
    os.environ.pop("CLEANPOST", None)
    os.chdir(folder)
    sys.path[:] = [entry for entry in sys.path if not Path(entry).resolve().is_relative_to(ROOT)]
    for name in list(sys.modules):
        if name.split(".")[0] == "common":
            del sys.modules[name]
    sys.argv = [str(path), *map(str, argv)]
    code = 0
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as e:
        code = e.code or 0
    except BaseException:  # of any kind: the log shows it
        traceback.print_exc()
        code = 1
    os._exit(code)


def run_file(path, folder, *argv):
    """Run a file in a fork, which saves the seconds of its slow imports. Return its exit code and its output."""
    log = tempfile.mktemp(prefix="command")
    worker = multiprocessing.get_context("fork").Process(target=run_as_main, args=(path, folder, argv, log))
    worker.start()
    worker.log = log
    return ended(worker)


def train_file(path, folder, *argv):
    """As run_file, where the run has to end well. Return its output folder: --output_dir is out."""
    code, text = run_file(path, folder, *argv, "--output_dir", "out")
    assert code == 0, text[-3000:]
    return folder / "out"


def result(out):
    """Return the bytes of the trained weights, and the metrics without what is about time."""
    return (out / "final" / "model.safetensors").read_bytes(), read_jsonl(out / "metrics.jsonl")


def fresh(folder, *files):
    """Make a folder that holds these files only. Return it."""
    folder.mkdir()
    for name, text in files:
        (folder / name).write_text(text)
    return folder


# ---- the bundle trains -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, rows and a reward file that are not in the repository."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(ROOT / "common" / "tiny" / "model", folder / "model")
    (folder / "evens.py").write_text(REWARD)
    return folder


def flags(name, inputs):
    rows = tiny_rows(name, inputs / f"{name}.jsonl", 12)
    argv = ["--model", inputs / "model", "--dataset", rows, "--eval_dataset", rows, "--eval_rows", "4"]
    argv += ["--batch_size", "4", "--max_length", "256", "--max_steps", "3", "--save_every", "2", "--eval_every", "2"]
    if name == "grpo":
        argv += ["--reward", f"{inputs / 'evens.py'}:evens"]
    return [*tiny_flags(name), *argv]


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_a_bundle_trains_and_resumes_to_the_scripts_bytes(name, inputs, tmp_path):
    argv = flags(name, inputs)
    by_script = train_file(ROOT / "methods" / f"{name}.py", fresh(tmp_path / "script"), *argv)
    alone = fresh(tmp_path / "alone", ("alone.py", bundle(ROOT / "methods" / f"{name}.py")))
    assert [path.name for path in alone.iterdir()] == ["alone.py"]
    by_bundle = train_file(alone / "alone.py", alone, *argv)
    weights, metrics = result(by_script)
    assert len(metrics) >= 5 and result(by_bundle) == (weights, metrics)
    assert weights != (inputs / "model" / "model.safetensors").read_bytes()

    resumed = fresh(tmp_path / "resumed", ("alone.py", bundle(ROOT / "methods" / f"{name}.py")))
    shutil.copytree(by_script, resumed / "out")
    shutil.rmtree(resumed / "out" / "final")
    shutil.rmtree(resumed / "out" / "checkpoint-000003")
    out = train_file(resumed / "alone.py", resumed, *argv, "--resume", "auto")
    assert result(out) == (weights, metrics)
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


def test_a_bundle_answers_help_and_wrong_flags_at_once(tmp_path):
    path = fresh(tmp_path / "alone", ("alone.py", bundle(ROOT / "methods" / "sft.py"))) / "alone.py"
    command = [sys.executable, "-X", "importtime", path]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=path.parent)
    assert shown.returncode == 0 and "SFT:" in shown.stdout and "--learning-rate" in shown.stdout.replace("_", "-")
    assert not re.search(r"\| +torch$", shown.stderr, re.M)  # what every import took: torch was none of them
    wrong = subprocess.run([*command, "--no-such-flag"], capture_output=True, text=True, cwd=path.parent)
    assert wrong.returncode == 2 and "\nerror: " in wrong.stderr
    assert not re.search(r"\| +torch$", wrong.stderr, re.M)


def test_a_bundle_without_the_tiny_lab_says_so(tmp_path):
    folder = fresh(tmp_path / "alone", ("alone.py", bundle(ROOT / "methods" / "sft.py")))
    code, text = run_file(folder / "alone.py", folder)
    assert code == 2 and text.count("\n") == 1, text
    assert text.startswith("error: ") and f"{folder}/common/tiny" in text and "--model" in text
    assert [path.name for path in folder.iterdir()] == ["alone.py"]


def test_a_bundle_finds_the_tiny_lab_beside_it(tmp_path):
    folder = fresh(tmp_path / "alone", ("alone.py", bundle(ROOT / "methods" / "sft.py")))
    (folder / "common").mkdir()
    (folder / "common" / "tiny").symlink_to(ROOT / "common" / "tiny")
    out = train_file(folder / "alone.py", folder, "--max_steps", "1")
    assert (out / "final" / "model.safetensors").is_file()


# ---- its text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STABLE)
def test_a_bundle_is_one_clean_file(name, tmp_path):
    path = tmp_path / "alone.py"
    command = [sys.executable, "-m", "common.tools.bundle", f"methods/{name}.py"]
    path.write_text(subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout)
    text = path.read_text()
    compile(text, str(path), "exec")
    assert not re.search(r"^ *(from|import) common\b", text, re.M)
    assert text.startswith('"""') and f"def {name}_loss(" in text and "\nclass RunFlags:" in text
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", path]
    checked = subprocess.run(ruff, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout[-3000:]


def test_replaced_counts_columns_and_lines():
    text = "a = (1 +\n     2)  # three\nb = f(x, y)\n"
    tree = ast.parse(text)
    first, call = tree.body[0].value, tree.body[1].value
    changes = [(first, "3"), (call.args[0], "long"), (call.args[1], "")]
    assert replaced(text, changes) == "a = (3)  # three\nb = f(long, )\n"


def test_imports_stand_once_where_they_are_first_used():
    text = "import os\nimport json, re\nfrom a import b, c\nx = json, b\nimport json\nfrom a import c\ny = c\n"
    assert without_spare_imports(text) == "import json\nfrom a import b, c\nx = json, b\ny = c\n"


def plant(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


SCRIPT = '''"""A script."""
import os
import sys
from pathlib import Path

VERSION = "1"
root = "nowhere"
sys.path.insert(0, str(root))
from common.runtime.flags import parse_flags

flags = parse_flags("script")

import math

from common.a import a
from common.b import b


def main():
    from common.late import late
    return a(), b(), late(), math.pi


print(*flags, *main())
'''
FILES = {
    "script.py": SCRIPT,
    "common/runtime/flags.py": "import os\nimport sys\n\nVERSION = '1'\n\n\ndef parse_flags(x):\n    return [x]\n",
    "common/a.py": '"""A\nuses b."""\nimport math\n\nfrom common.b import b\n\nTWICE = 2 * b()\n\n\ndef a():\n'
                   "    return TWICE + math.floor(1.5)\n",
    "common/b.py": "from pathlib import Path\n\nFOLDER = Path(__file__).parent.name\n\n\ndef b():\n    return 10\n",
    "common/late.py": "from common.a import a\n\n\ndef late():\n    return a() + 1\n",
    "common/unused.py": "raise ValueError\n",
}  # fmt: skip


def test_files_stand_in_the_order_in_which_they_need_each_other(tmp_path, monkeypatch):
    plant(tmp_path, FILES)
    monkeypatch.setitem(bundle.__globals__, "ROOT", tmp_path)
    text = bundle(tmp_path / "script.py")
    titles = re.findall(r"^# ==== (\S+)", text, re.M)
    assert titles == ["common/runtime/flags.py", str(tmp_path / "script.py"), "common/b.py", "common/a.py",
                      "common/late.py", str(tmp_path / "script.py")]  # fmt: skip
    assert "# A\n# uses b.\n" in text and text.count("import math") == 1
    (tmp_path / "elsewhere").mkdir()
    alone = tmp_path / "elsewhere" / "alone.py"
    alone.write_text(text)
    ran = subprocess.run([sys.executable, alone], capture_output=True, text=True, cwd=alone.parent)
    assert ran.stdout.split() == ["script", "21", "10", "22", "3.141592653589793"], ran.stderr


FAULTS = {
    "no such script": ({}, "missing.py", "No such file"),
    "no Python": ({"script.py": "def ("}, "script.py", "invalid syntax"),
    "no finder": ({"script.py": "from common.a import a\n"}, "script.py", "does not find common/"),
    "another version": ({"common/runtime/flags.py": "VERSION = '2'\n"}, "script.py", "written for common/ 1, and"),
    "no such file of common": ({"common/b.py": "from common.c import c\n"}, "script.py", "common/c.py"),
}


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_what_no_bundle_can_be_made_of(case, tmp_path, monkeypatch):
    files, name, message = case
    plant(tmp_path, FILES | files)
    monkeypatch.setitem(bundle.__globals__, "ROOT", tmp_path)
    with pytest.raises(BundleError, match=re.escape(message)) as raised:
        bundle(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_the_command_says_what_is_wrong_in_one_line():
    command = [sys.executable, "-m", "common.tools.bundle", "methods/none.py"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 2 and ran.stdout == "" and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("error: methods/none.py: ")
