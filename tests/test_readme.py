"""The pages say what the files say: generated parts are current, every flag, file, link, command, function, alert and
metric that is named exists, and every alert, metric, shared file and flag of TRL that exists is named."""

import ast
import fnmatch
import json
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import script

ROOT = Path(__file__).resolve().parents[1]
PLOTS = runpy.run_path(str(ROOT / "benchmarks" / "plots.py"))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*PLOTS["PAGES"], ROOT / "CHANGELOG.md"]}
README, METHODS_PAGE, COMMON_PAGE = PAGES["README.md"], PAGES["methods/README.md"], PAGES["common/README.md"]
SCRIPTS = "sft", "reward", "dpo", "kto", "grpo", "rloo", "distillation"
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in ("methods", "common", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TRAINING = [text for path, text in SOURCES.items() if path.startswith(("methods/", "common/"))]
# Flags of torchrun, Slurm and pytest, and every script's --help.
OTHER_FLAGS = """nproc_per_node nnodes max_restarts local_addr rdzv_id rdzv_backend rdzv_endpoint rdzv_conf
kill_on_bad_exit signal nodes ntasks_per_node gpus_per_node cpus_per_task requeue dist help""".split()


@cache
def script_flags(path):
    return set(PLOTS["script_flags"](path))


@cache
def known_flags():
    """Flags of scripts (fields of Args and their aliases) and of tools (argparse), with underscores."""
    names = set(OTHER_FLAGS)
    for path, text in SOURCES.items():
        if path.startswith("methods/"):
            names |= script_flags(path)
            names |= {f"no_{name}" for name in script_flags(path)}  # of flags that are on by default
        names |= {name.replace("-", "_") for name in re.findall(r'"--([\w-]+)"', text)}
    return names


def headings(text):
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# ---- generated parts -------------------------------------------------------------------------------------------------


def test_generated_parts_are_current(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks/plots.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "plots.py"), run_name="__main__")
    assert not ended.value.code, capsys.readouterr().out


def test_generated_parts_that_are_not_current_are_found(monkeypatch):
    for part in PLOTS["PARTS"]:
        with monkeypatch.context() as patch:
            patch.setitem(PLOTS["PARTS"], part, lambda: "another text\n")
            assert any(f"generated: {part} " in page for page in PAGES.values()), f"{part} is on no page"
            assert PLOTS["stale_pages"]([part]), f"{part} changed, and no page is stale"


def test_every_generated_part_says_something():
    empty = [name for page in PAGES.values() for name in re.findall(r"<!-- generated: (\w+) -->\n<!-- end -->", page)]
    assert not empty, f"nothing was found for {empty}"


# ---- what is named exists --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    named = {name.replace("-", "_") for name in re.findall(r"(?<![\w|-])--([a-z][\w-]*)", PAGES[page])}
    unknown = sorted(named - known_flags())
    assert not unknown, f"{page} names flags that do not exist: {unknown}"


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    """Paths under the folders of this repository, whatever the page."""
    text = re.sub(r"(?<!`)`benchmarks/\w+_reward\w*\.py`", "", PAGES[page]) if page == "CHANGELOG.md" else PAGES[page]
    named = set(re.findall(r"(?<![\w/.])(?:methods|common|tests|benchmarks|\.ci)/[\w./*-]*[\w*/]", text))
    missing = [name for name in sorted(named - {"methods/experimental"}) if not any(ROOT.glob(name))]
    assert not missing, f"{page} names files that do not exist: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    """Every link to a file of the repository, from the page's own folder, and to a heading."""
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links {target}, which does not exist"
        assert not anchor or anchor in headings(path.read_text()), f"{page} links {target}: no such heading"


def test_functions_that_are_linked_exist():
    """A link whose text is a name in code and whose target is a file of Python: the file defines that name."""
    linked = re.findall(r"\[`([\w.]+)`\]\(([\w/]+\.py)\)", README)
    linked = [(name, path) for name, path in linked if "test_" not in name and name != path]
    for name, path in linked:
        assert PLOTS["find_definition"](path, name), f"README names {name} in {path}, which does not define it"
    assert len(linked) == len(PLOTS["WHERE"]) > 8


@pytest.mark.parametrize("row", PLOTS["WHERE"], ids=lambda row: row[0])
def test_where_to_look(row):
    """The line of code that is shown stands in the function that is named."""
    what, path, name, piece = row
    assert PLOTS["line_of_code"](path, name, piece), f"{what}: no statement of {name} in {path} contains {piece!r}"
    assert f"| {what} | [`{name}`]({path})" in README


def test_the_tree_has_every_file():
    """README's tree names no file that does not exist, and leaves out none that a reader could meet."""
    tree = README.partition("\n## The files\n")[2].partition("```\n")[2].partition("```")[0]
    named, folder = set(), ""
    for line in tree.splitlines():
        word = line.split()[0]
        if not line.startswith(" ") and word.endswith("/"):
            folder = word
        else:
            named.add(word if "/" in word.rstrip("/") else folder + word)
        named |= {folder + name for name in re.findall(r"\b\w+\.py\b", line) if (ROOT / folder / name).is_file()}
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]
    folders = "methods|common|common/runtime|common/experimental|common/tools"
    wanted = [path for path in SOURCES if re.match(rf"({folders})/\w+\.py", path)]
    assert not set(wanted) - named, f"README's tree leaves out {sorted(set(wanted) - named)}"


def test_every_pin_is_exact():
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert pins and all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins)


def test_the_version_is_one():
    newest = re.search(r"^## ([\d.]+)$", PAGES["CHANGELOG.md"], re.M)[1]
    shared = re.search(r'^VERSION = "([\d.]+)"', SOURCES["common/runtime/flags.py"], re.M)[1]
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == newest
    assert newest.rpartition(".")[0] == shared and f"**Status: {newest}." in README


# ---- commands --------------------------------------------------------------------------------------------------------


def test_commands_are_those_of_ci():
    """The two commands that do all set-up, each pasted as it stands, are lines of .ci/run, which the workflow runs."""
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert len(commands) == 2 and "methods/grpo.py" in commands[0] and "pytest" in commands[1]
    assert all(command in lines for command in commands)
    assert "- run: .ci/run\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def real_commands():
    """-> [(script, its arguments)] of the block under Real models, with the shell's variables filled in."""
    block = README.partition("\n## Real models\n")[2].partition("```bash\n")[2].partition("```")[0]
    found, variables = [], {}
    for line in block.splitlines():
        name, assigned, value = line.partition("=")
        if assigned and re.fullmatch(r"[A-Z]+", name):
            variables[name] = value
            continue
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        python, path, *rest = shlex.split(line)
        assert python == "python"
        found.append((path, rest))
    return found


def test_the_commands_for_real_models_are_accepted_and_follow_from_each_other():
    """The block can be pasted whole: every run has a folder of its own, and no model is used before it is there."""
    made = []
    for path, arguments in real_commands():
        args = script(Path(path).stem).parse_args(arguments)  # a flag that does not exist leaves with code 2
        assert args.output_dir.startswith("runs/") and args.output_dir not in made
        for folder in (args.model, *getattr(args, "reward", ())):
            if folder.startswith("runs/"):
                assert folder.removesuffix("/final") in made, f"{path} uses {folder}, which nothing has written"
        made.append(args.output_dir)
    assert len(made) == 7


# ---- size and order --------------------------------------------------------------------------------------------------

SECTIONS = ["The seven scripts", "First run", "Data and rewards", "Real models", "Many GPUs", "What a run leaves"]
SECTIONS += ["How to use the result", "A method is a diff", "Flat batches", "Fork it", "The files"]
SECTIONS += ["Beside TRL, and limits"]


def test_readme_is_short_and_in_order():
    assert len(README.splitlines()) <= 250 and len(README.encode()) <= 20_000
    assert re.findall(r"^## (.*)$", README, re.M) == SECTIONS
    status = README.index("CUDA has not been run yet")
    assert status < README.index("\n## ") and "git clone" in README
    assert README.index("tiny_curves.png") < README.index("\n## First run")


def test_pages_are_ascii():
    assert not [page for page, text in PAGES.items() if not text.isascii()]


# ---- alerts and metrics ----------------------------------------------------------------------------------------------


def alert_calls():
    """-> [(code, {keyword: syntax tree})] of every call of `check`, and of `check_share` of health.py, in scripts and
    shared code."""
    found = []
    for text in TRAINING:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("check", "check_share"):
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                code = node.args[1] if len(node.args) > 1 else keywords.get("code")
                if isinstance(code, ast.Constant) and isinstance(code.value, str):
                    found.append((code.value, keywords))
    return found


def test_every_alert_is_in_the_table():
    rows = dict(re.findall(r"^\| ([A-Z]+\d{3}) (\|.*)$", COMMON_PAGE, re.M))
    constants = [n.value for text in TRAINING for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)]
    codes = {value for value in constants if isinstance(value, str) and re.fullmatch(r"[A-Z]+\d{3}", value)}
    assert codes and rows.keys() == codes


def test_the_table_of_alerts_has_their_limits():
    rows = dict(re.findall(r"^\| ([A-Z]+\d{3}) (\|.*)$", COMMON_PAGE, re.M))
    calls = alert_calls()
    for code, keywords in calls:
        row = rows[code]
        for level in ("warn", "error"):
            limit = keywords.get(level)
            if isinstance(limit, ast.Constant) and limit.value:
                shown = f"over {limit.value:g}", f"over {limit.value * 100:g} %"
                text = row.partition(f"{level}: ")[2]
                assert any(words in text for words in shown), f"{code}: {level} above {limit.value}"
        patience = keywords.get("patience")
        patience = getattr(patience, "orelse", patience)  # of `1 if ... else 3` the 3
        if isinstance(patience, ast.Constant) and patience.value > 1:
            assert f"{patience.value} " in row and "in a row" in row, f"{code}: {patience.value} in a row"
    for code in {code for code, _ in calls}:
        for level in ("warn", "error"):
            limits = [keywords[level] for other, keywords in calls if other == code and level in keywords]
            used = any(getattr(limit, "id", "") != "NEVER" for limit in limits)
            assert used == (f"{level}: " in rows[code]), f"{code}: {level}"
    assert len({code for code, _ in calls}) >= 10


def defined_metrics():
    cells = re.findall(r"^\| (`[^|]*`) \|", COMMON_PAGE.partition("\n## Metrics\n")[2].partition("\n## ")[0], re.M)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_every_metric_is_defined():
    defined = defined_metrics()
    files = sorted((ROOT / "benchmarks" / "results").glob("*/metrics.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    written = {re.sub(r"@\d+", "@k", key) for row in rows for key in row}
    assert len(files) >= 9 and not written - defined, f"not defined: {sorted(written - defined)}"
    code = "\n".join(TRAINING)
    invented = [name for name in defined if not re.search(rf'["/]{name.removeprefix("eval/").removesuffix("k")}', code)]
    assert not invented, f"defined, but nothing writes it: {invented}"


# ---- coming from TRL -------------------------------------------------------------------------------------------------

CONFIGS = json.loads((ROOT / "tests" / "fixtures" / "trl_configs.json").read_text())
COMING = METHODS_PAGE.partition("\n## Coming from TRL\n")[2]
TABLE = [row.split(" | ") for row in re.findall(r"^\| (`.*) \|$", COMING, re.M)]
# What is no field of a config: arguments of trainers, of TRL's command line (ModelConfig, ScriptArguments) and, the
# first one, of older versions.
OTHERS = """max_prompt_length reward_funcs ref_model callbacks compute_metrics formatting_func optimizers tools
rollout_func environment_factory dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming
dtype use_peft lora_r load_in_4bit model_revision attn_implementation""".split()


def test_names_of_trl_exist():
    known = set(OTHERS).union(*(CONFIGS[script] for script in SCRIPTS), CONFIGS["TrainingArguments"])
    named = [name for theirs, _, _ in TABLE for name in re.findall(r"`([^`]+)`", theirs)]
    assert len(TABLE) > 20 and not [name for name in named if not fnmatch.filter(known, name)]
    assert len(set(named)) == len(named)
    assert not [name for name in OTHERS if not any(fnmatch.fnmatch(name, pattern) for pattern in named)]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0].split("`")[1])
def test_flags_beside_a_name_of_trl_are_in_their_scripts(row):
    """`--flag`: of all seven scripts; "grpo, rloo: `--flag`": of these; "`methods/experimental/x.py`: `--flag`"."""
    _, here, differs = row
    assert "`" in here or here in ("always", "none"), here
    for part in here.split("; "):
        names, _, ours = part.rpartition(": ")
        paths = [word if "/" in word else f"methods/{word}.py" for word in names.replace("`", "").split(", ") if word]
        for path in paths or [f"methods/{name}.py" for name in SCRIPTS]:
            named = re.findall(r"`--(\w+)`", ours)
            assert named or ours in ("always", "none"), part
            assert set(named) <= script_flags(path), (path, named)
    assert set(re.findall(r"--(\w+)", differs)) <= script_flags("methods/grpo.py")


def test_every_field_of_trl_is_here_in_the_table_or_left_out():
    names = PLOTS["trl_names"]()
    lost = {name: [field for field, (where, *_) in found.items() if not where] for name, found in names.items()}
    assert not any(lost.values()), f"say in the table what they are called, or in LEFT_OUT of plots.py: {lost}"
    for name in SCRIPTS:  # every own field, or it is one that all seven have
        assert CONFIGS[name].keys() <= names[name].keys() | names["TrainingArguments"].keys()
        for field, (where, *_) in names[name].items():
            assert not where.startswith("methods/") or field in script_flags(where)


def test_flags_are_read_as_they_are():
    """What plots.py reads off the text of the stable scripts is what Args has, by the contract."""
    contract = json.loads((ROOT / "tests" / "fixtures" / "contract.json").read_text())["scripts"]
    for name in SCRIPTS:
        found = {}
        for flag, text in contract[name]["flags"].items():
            _, _, default = text.partition(" = ")
            for alias in re.findall(r"--(\w+)", text):
                found[alias] = re.sub(r" \(--.*\)$", "", default)
            found[flag] = re.sub(r" \(--.*\)$", "", default)
        assert {flag: repr(value) for flag, value in PLOTS["script_flags"](f"methods/{name}.py").items()} == found
