"""A script may be copied: under any name, anywhere, an unedited copy gives what the script gives, or says in one line
what it needs. And `python tests/test_copies.py --fork PARENT NEW` writes a new script that passes as it stands."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import conftest
import pytest
import test_copies
from conftest import METHODS, ROOT, SCRIPTS, script, tiny_flags
from test_bundle import result, train_file
from test_copies import ForkError, check, fork, load, plant, with_banners

WITHOUT = "error: no common/ of CleanPost above {path} or in CLEANPOST. Copy common/ beside it.\n"


def run(folder, *command, **environment):
    """Run `python ...` in a folder, without CLEANPOST unless it is given. Return the exit code, stdout and stderr."""
    variables = {name: value for name, value in os.environ.items() if name not in ("CLEANPOST", "PYTHONPATH")}
    variables |= {name: str(value) for name, value in environment.items()}
    words = [sys.executable, *map(str, command)]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=variables)
    return ran.returncode, ran.stdout, ran.stderr


def copy(name, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(METHODS / f"{name}.py", path)
    return path


# ---- copies anywhere -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_copy_under_another_name_reads_the_same_flags(name, tmp_path, monkeypatch):
    """The preset of the tiny lab belongs to the script, not to its file name."""
    monkeypatch.setenv("CLEANPOST", str(ROOT))
    monkeypatch.setattr(sys, "path", sys.path[:])
    spec = importlib.util.spec_from_file_location("another_name", copy(name, tmp_path / "another_name.py"))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "another_name", module)
    spec.loader.exec_module(module)
    flags = vars(module.parse_args([]))
    assert flags == vars(script(name).parse_args([]))
    assert flags["max_steps"] > 0, "no preset"


@pytest.mark.parametrize("name", ["sft", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_copy_trains_to_the_same_bytes(name, tmp_path):
    argv = [*tiny_flags(name), "--max_steps", "2", "--batch_size", "4"]
    folder = tmp_path / "somewhere"
    (folder / "methods").mkdir(parents=True)
    by_script = train_file(METHODS / f"{name}.py", tmp_path, *argv)
    path = copy(name, folder / "another_name.py")
    (folder / "common").symlink_to(ROOT / "common")
    by_copy = train_file(path, folder, *argv)
    assert result(by_copy) == result(by_script)


@pytest.fixture
def alone(tmp_path):
    return copy("sft", tmp_path / "somewhere" / "mine.py")


def test_a_copy_without_common_says_what_to_do(alone):
    assert run(alone.parent, alone, "--help") == (2, "", WITHOUT.format(path=alone))


def test_cleanpost_says_where_common_is(alone):
    code, shown, said = run(alone.parent, alone, "--help", CLEANPOST=ROOT)
    assert code == 0 and "--batch-size" in shown.replace("_", "-") and said == ""


@pytest.mark.parametrize("place", ["/nowhere", "", "relative/folder", __file__])
def test_cleanpost_points_nowhere(alone, place):
    assert run(alone.parent, alone, "--help", CLEANPOST=place) == (2, "", WITHOUT.format(path=alone))


def test_common_is_recognised_by_its_files(alone):
    """Another project's folder of that name is nearer, and is not ours."""
    (alone.parent / "common").mkdir()
    (alone.parent / "common" / "__init__.py").write_text("raise ValueError('not this one')\n")
    (alone.parent / "common" / "flags.py").touch()
    assert run(alone.parent, alone, "--help") == (2, "", WITHOUT.format(path=alone))


def test_common_in_a_parent_of_the_copy(alone):
    (alone.parent.parent / "common").symlink_to(ROOT / "common")
    code, shown, _ = run("/", alone, "--help")
    assert code == 0 and "SFT:" in shown


def test_common_of_another_version(alone):
    """Said in one line, with both versions and the script's place; a bad flag does not come first."""
    text = alone.read_text()
    old = re.sub(r'^VERSION = "[\d.]+"', 'VERSION = "0.0.1"', text, flags=re.M)
    assert old != text
    alone.write_text(old)
    code, shown, said = run(alone.parent, alone, "--no-such-flag", CLEANPOST=ROOT)
    assert code == 2 and shown == "" and said.count("\n") == 1
    assert said.startswith("error: ") and "0.0.1" in said and str(alone) in said and str(ROOT / "common") in said


def test_through_a_symlink(tmp_path):
    link = tmp_path / "link.py"
    link.symlink_to(METHODS / "sft.py")
    code, shown, said = run(tmp_path, link, "--help")
    assert code == 0 and "SFT:" in shown and said == ""


def test_by_python_m(tmp_path):
    code, shown, said = run(ROOT, "-m", "methods.sft", "--help")
    assert code == 0 and "SFT:" in shown and said == ""
    copy("sft", tmp_path / "package" / "mine.py")
    code, shown, said = run(tmp_path, "-m", "package.mine", "--help")
    assert (code, shown) == (2, "") and said == WITHOUT.format(path=tmp_path / "package" / "mine.py")
    code, shown, said = run(tmp_path, "-m", "package.mine", "--help", CLEANPOST=ROOT)
    assert code == 0 and "SFT:" in shown and said == ""


# ---- --fork ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", ["my_own", "my_own.py", "methods/experimental/my_own.py"])
@pytest.mark.parametrize("parent", ["methods/dpo.py", "methods/experimental/ipo.py"])
def test_a_fork_passes_as_it_stands(parent, new, tmp_path):
    plant(tmp_path)
    stem = load(tmp_path)[parent].stem
    path = fork(tmp_path, parent, new)
    assert path.as_posix() == "methods/experimental/my_own.py"
    assert check(tmp_path) == []
    text = (tmp_path / path).read_text()
    assert f"Parent: {parent}\nDelta:\nExpect" in text
    assert "def my_own_loss(" in text and "= my_own_loss(" in text.replace("2 * ", "") and f"{stem}_loss" not in text
    parents_body = with_banners((tmp_path / parent).read_text().split('"""')[2])
    assert text.split('"""')[2] == re.sub(rf"\b{stem}_(?=loss|clip)", "my_own_", parents_body)


def test_an_edit_of_a_fork_has_to_be_declared(tmp_path):
    plant(tmp_path)
    path = tmp_path / fork(tmp_path, "methods/dpo.py", "my_own")
    path.write_text(path.read_text().replace("print(loss)", "print(-loss)"))
    assert check(tmp_path) == [
        "methods/experimental/my_own.py: 'main.log' differs from methods/dpo.py: declare it under Delta or run --fix"]
    path.write_text(path.read_text().replace("Delta:\n", "Delta:\n  main.log: the sign\n"))
    assert check(tmp_path) == []


def test_a_fork_in_forks_is_nobodys_business(tmp_path):
    plant(tmp_path)
    path = fork(tmp_path, "methods/dpo.py", "forks/my_own.py")
    (tmp_path / path).write_text((tmp_path / path).read_text() + "what = ever\n")
    assert check(tmp_path) == [] and "forks/my_own.py" not in load(tmp_path)
    assert "forks/" in (ROOT / ".gitignore").read_text().splitlines()


REFUSED = {
    "the parent does not exist": ("methods/none.py", "my_own", "methods/none.py is no script. The scripts are m"),
    "the parent is not a script": ("common/rows.py", "my_own", "common/rows.py is no script."),
    "a script of that name": ("methods/dpo.py", "ipo", "'ipo' exists: methods/experimental/ipo.py."),
    "a stable script of that name": ("methods/dpo.py", "methods/experimental/sft.py", "'sft' exists: methods/sft.py."),
    "a file of that name": ("methods/dpo.py", "forks/there.py", "forks/there.py exists."),
    "a word of the scripts": ("methods/dpo.py", "collate", "'collate' is a word of methods/"),
    "a part of a name": ("methods/dpo.py", "advantages", "'advantages' is a word of methods/"),
    "a word of shared code": ("methods/dpo.py", "activation", "'activation' is a word of common/rows.py"),
    "hyphen": ("methods/dpo.py", "my-own", "'my-own' is no module name"),
    "digit first": ("methods/dpo.py", "2nd", "'2nd' is no module name"),
    "keyword": ("methods/dpo.py", "lambda", "'lambda' is no module name"),
    "dot": ("methods/dpo.py", "my.own", "'my.own' is no module name"),
    "space": ("methods/dpo.py", "my own", "'my own' is no module name"),
    "capital": ("methods/dpo.py", "Mine", "'Mine' is no module name"),
    "empty": ("methods/dpo.py", "", "is no module name"),
    "not ASCII": ("methods/dpo.py", "m\u00fcll", "is no module name"),
    "a module of Python": ("methods/dpo.py", "random", "'random' is a module that Python would no longer find"),
    "a package": ("methods/dpo.py", "transformers", "'transformers' is a module that Python would no longer find"),
    "the stable folder": ("methods/dpo.py", "methods/my_own.py", "a new script stands in methods/experimental/ or"),
    "another folder": ("methods/dpo.py", "/tmp/my_own.py", "a new script stands in methods/experimental/ or"),
    "a folder above": ("methods/dpo.py", "../my_own.py", "a new script stands in methods/experimental/ or"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_forked_says_so_in_one_line(case, tmp_path, monkeypatch, capsys):
    parent, new, message = case
    plant(tmp_path)
    (tmp_path / "forks").mkdir()
    (tmp_path / "forks" / "there.py").touch()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ForkError, match=re.escape(message)):
        fork(tmp_path, parent, new)
    monkeypatch.setattr(test_copies, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["test_copies.py", "--fork", parent, new])
    with pytest.raises(SystemExit) as ended:
        test_copies.main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# ---- a fork in a copy of this repository -----------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    """A copy of what is not large, and links to the rest."""
    for folder in ("methods", "tests", "benchmarks", "common"):
        ignored = shutil.ignore_patterns("results", "tiny", "__pycache__", "*.orig*")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for name in ("benchmarks/results", "common/tiny"):
        (tmp_path / name).symlink_to(ROOT / name)
    for path in [path for path in ROOT.iterdir() if path.is_file()]:
        shutil.copy(path, tmp_path)
    for folder in (".ci", ".github"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def test_the_command_writes_a_script_and_the_pages(project, monkeypatch):
    code, shown, said = run(project, "tests/test_copies.py", "--fork", "methods/grpo.py", "my_own")
    assert code == 0 and said == ""
    assert shown.startswith("methods/experimental/my_own.py written, a copy of methods/grpo.py. ")
    assert not check(project)
    assert "experimental/my_own.py" in (project / "methods" / "README.md").read_text()
    monkeypatch.setattr(conftest, "ROOT", project)
    assert conftest.with_row({"sft": 1, "grpo": 2}, "experimental/my_own") == "grpo"  # its fast flags, for one
    code, shown, _ = run(project, "methods/experimental/my_own.py", "--help")
    assert code == 0 and "--num-generations" in shown.replace("_", "-")


@pytest.mark.parametrize("parent", ["methods/sft.py", "methods/grpo.py"])
def test_every_test_of_a_fork_passes(parent, project, request):
    if not request.config.getoption("--slow"):
        pytest.skip("--slow: two minutes")
    run(project, "tests/test_copies.py", "--fork", parent, "my_own")
    files = ["test_smoke", "test_split", "test_readme", "test_resume", "test_copies", "test_method_table"]
    paths = [f"tests/{name}.py" for name in files]
    code, shown, said = run(project, "-m", "pytest", "-q", "-k", "my_own or readme or copies or table", *paths)
    assert code == 0, shown[-5000:] + said[-2000:]
