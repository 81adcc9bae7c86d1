"""The pages say what the files say: generated parts are current, every flag, file, command, alert and metric that is
named exists, and every alert, metric and flag of TRL that exists is named."""

import ast
import fnmatch
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README, BENCHMARKS = (ROOT / "README.md").read_text(), (ROOT / "benchmarks" / "README.md").read_text()
PAGES = {"README.md": README, "benchmarks/README.md": BENCHMARKS}
SOURCES = {p: p.read_text() for folder in ("methods", "benchmarks", "tests") for p in (ROOT / folder).rglob("*.py")}
METHODS = {p: text for p, text in SOURCES.items() if "methods" in p.relative_to(ROOT).parts}
TORCHRUN = {"nproc_per_node", "nnodes", "max_restarts", "local_addr"}
TORCHRUN |= {"rdzv_id", "rdzv_backend", "rdzv_endpoint", "rdzv_conf"}
SLURM = {"kill_on_bad_exit", "nodes", "ntasks_per_node", "gpus_per_node", "cpus_per_task", "requeue"}


def flags(sources):
    """Flags of scripts (fields of Args and their aliases) and of tools (argparse), with underscores."""
    names = {"help"}
    for text in sources:
        fields = text.partition("class Args:")[2].partition("\ndef ")[0]
        names |= set(re.findall(r"^    (\w+): (?:.* = |Annotated\[$)", fields, re.M))
        names |= {name.replace("-", "_") for name in re.findall(r'"--([\w-]+)"', text)}
    return names


def test_generated_parts_are_current(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks/plots.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "plots.py"), run_name="__main__")
    assert not ended.value.code, capsys.readouterr().out


def test_generated_parts_that_are_not_current_are_found(monkeypatch):
    plots = runpy.run_path(str(ROOT / "benchmarks" / "plots.py"))
    assert not plots["stale"]()
    for part in plots["PARTS"]:
        with monkeypatch.context() as patch:
            patch.setitem(plots["PARTS"], part, lambda: "another text\n")
            assert any(f"generated: {part} " in page for page in PAGES.values()), f"{part} is on no page"
            assert plots["stale_pages"]([part]), f"{part} changed, and no page is stale"


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    known = flags(SOURCES.values()) | TORCHRUN | SLURM | {"dist"}  # the last one is of pytest-xdist
    named = {name.replace("-", "_") for name in re.findall(r"(?<![\w|-])--([a-z][\w-]*)", PAGES[page])}
    assert len(named) > 2 and not named - known, f"{page} names flags that do not exist: {sorted(named - known)}"


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    """Paths under the folders of this repository; in benchmarks/README.md also results/..., from there."""
    text = PAGES[page]
    named = set(re.findall(r"(?<![\w/.])(?:methods|common|tests|benchmarks|\.ci)/[\w./*-]*[\w*/]", text))
    named |= set(re.findall(r"\]\(([\w./]+)[)#]", re.sub(r"```.*?```", "", text, flags=re.S)))
    missing = [name for name in sorted(named - {"methods/experimental", "methods/experimental/mine.py"})
               if not any(any(folder.glob(name)) for folder in (ROOT, (ROOT / page).parent))]
    assert len(named) > 4 and not missing, f"{page} names files that do not exist: {missing}"


def test_commands_are_those_of_ci():
    """The two commands that do all set-up, each pasted as it stands, are lines of .ci/run."""
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert len(commands) == 2 and "methods/grpo.py" in commands[0] and "pytest" in commands[1]
    assert all(command in lines for command in commands)


def test_every_pin_is_exact():
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert pins and all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins)


def test_every_alert_is_in_the_table_with_its_limits():
    rows = dict(re.findall(r"^\| ([A-Z]+\d{3}) (\|.*)$", README, re.M))
    trees = [ast.walk(ast.parse(text)) for text in METHODS.values()]
    nodes = [node for tree in trees for node in tree]
    codes = {n.value for n in nodes if isinstance(n, ast.Constant) and re.fullmatch(r"[A-Z]+\d{3}", str(n.value))}
    assert codes and rows.keys() == codes
    checked = set()
    for node in [n.elts for n in nodes if isinstance(n, ast.Tuple) and len(n.elts) > 5]:
        name = getattr(node[0], "value", None)  # (code, metric, value, warn, error, text)
        if name not in codes:
            continue
        # in the loop of grpo.py: (code, key, warn, error, patience, text)
        *limits, patience = node[2:5] if name.startswith("GRPO") else [*node[3:5], None]
        for level, limit in zip(("warn", "error"), limits):
            if isinstance(limit, ast.Name):  # NEVER
                assert f"{level}:" not in rows[name], f"{name} has no {level}"
            elif limit.value:
                shown = f"{level}: over {limit.value:g}", f"{level}: over {limit.value * 100:g} %"
                assert any(words in rows[name] for words in shown), f"{name}: {level} above {limit.value}"
        if isinstance(patience, ast.IfExp) or patience and patience.value > 1:
            times = ast.literal_eval(getattr(patience, "orelse", patience))
            assert f"{times} rollouts in a row" in rows[name], f"{name}: {times} in a row"
        checked.add(name)
    assert len(checked) >= 10


def test_every_metric_is_defined():
    section = BENCHMARKS.partition("\n## Metrics")[2]
    cells = re.findall(r"^\| (`[^|]*`) \|", section, re.M)
    defined = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    files = sorted((ROOT / "benchmarks" / "results").glob("*/metrics.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    written = {re.sub(r"@\d+", "@k", key) for row in rows for key in row}
    assert len(files) >= 9 and not written - defined, f"not defined: {sorted(written - defined)}"
    code = "\n".join(METHODS.values())
    invented = [name for name in defined if not re.search(rf'["/]{name.removeprefix("eval/").removesuffix("k")}', code)]
    assert not invented, f"defined, but no script writes it: {invented}"


def test_readme_is_short_and_ascii():
    """Below 300 lines written by hand: generated ones are tables to look things up in, most of them folded."""
    by_hand = re.sub(r"<!-- generated: \w+ -->\n.*?<!-- end -->\n", "", README, flags=re.S)
    assert len(by_hand.splitlines()) < 300
    assert README.isascii() and BENCHMARKS.isascii()


# ---- coming from TRL -------------------------------------------------------------------------------------------------

SCRIPTS = "sft", "reward", "dpo", "kto", "grpo", "rloo"
CONFIGS = json.loads((ROOT / "tests" / "fixtures" / "trl_configs.json").read_text())
TABLE = [row.split(" | ") for row in re.findall(r"^\| (`.*) \|$", README.partition("\n## Coming from TRL\n")[2], re.M)]
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
    """`--flag`: of all six scripts; "grpo, rloo: `--flag`": of these; "`methods/experimental/x.py`: `--flag`"."""
    _, here, differs = row
    assert "`" in here or here in ("always", "none"), here
    for part in here.split("; "):
        names, _, ours = part.rpartition(": ")
        paths = [word if "/" in word else f"methods/{word}.py" for word in names.replace("`", "").split(", ") if word]
        for path in paths or [f"methods/{name}.py" for name in SCRIPTS]:
            named = re.findall(r"`--(\w+)`", ours)
            assert named or ours in ("always", "none"), part
            assert set(named) <= flags([(ROOT / path).read_text()]), (path, named)
    online = flags([(ROOT / "methods" / "grpo.py").read_text()])
    assert set(re.findall(r"--(\w+)", differs)) <= online


def test_every_field_of_trl_is_here_in_the_table_or_left_out():
    plots = runpy.run_path(str(ROOT / "benchmarks" / "plots.py"))
    names = plots["trl_names"]()
    lost = {script: [field for field, (where, *_) in found.items() if not where] for script, found in names.items()}
    assert not any(lost.values()), f"say in README's table what they are called, or in LEFT_OUT of plots.py: {lost}"
    for script in SCRIPTS:  # every own field, or it is one that all six have
        assert CONFIGS[script].keys() <= names[script].keys() | names["TrainingArguments"].keys()
        for field, (where, *_) in names[script].items():
            assert not where.startswith("methods/") or field in flags([(ROOT / where).read_text()])


def test_flags_are_read_as_they_are():
    """What plots.py reads off the text of the stable scripts is what Args has, by the contract."""
    plots = runpy.run_path(str(ROOT / "benchmarks" / "plots.py"))
    contract = json.loads((ROOT / "tests" / "fixtures" / "contract.json").read_text())["scripts"]
    for script in SCRIPTS:
        found = {}
        for name, text in contract[script]["flags"].items():
            _, _, default = text.partition(" = ")
            for alias in re.findall(r"--(\w+)", text):
                found[alias] = re.sub(r" \(--.*\)$", "", default)
            found[name] = re.sub(r" \(--.*\)$", "", default)
        assert {name: repr(value) for name, value in plots["script_flags"](f"methods/{script}.py").items()} == found
