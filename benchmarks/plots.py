"""
The generated parts of the pages (README.md, those in methods/, common/ and benchmarks/, benchmarks/results/*.md) and
the pictures, from the committed results and the text of the scripts.

    python benchmarks/plots.py            write them
    python benchmarks/plots.py --check    say what is not current, exit code 1

A generated part stands between <!-- generated: NAME --> and <!-- end -->; the text around it is written by hand. A part
whose results do not exist is empty. A picture carries a digest of the numbers that it shows, so that checking it takes
no drawing.
"""

import argparse
import ast
import difflib
import fnmatch
import hashlib
import importlib.util
import json
import math
import re
import sys
import textwrap
from functools import cache, partial
from pathlib import Path
from statistics import mean, median, mode

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
METHODS = ROOT / "benchmarks" / "methods.json"
README, METHODS_PAGE = ROOT / "README.md", ROOT / "methods" / "README.md"
PAGES = [README, METHODS_PAGE, ROOT / "common" / "README.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted(RESULTS.glob("*.md"))
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)
ORDER = ["sft", "dpo", "reward", "kto", "grpo", "rloo", "distillation"]  # in reading order, others after
SHOWN = {  # what each script optimises: metric, axis label
    "sft": ("eval/loss", "held-out loss (nats a token)"),
    "dpo": ("reward_margin", "reward margin of the step"),
    "reward": ("eval/loss", "held-out loss (nats a pair)"),
    "kto": ("reward_margin", "reward margin of the step"),
    "grpo": ("reward", "mean reward of the step"),
    "rloo": ("reward", "mean reward of the step"),
    "distillation": ("eval/divergence", "held-out divergence (nats a token)"),
}
COLORS = {"sft": "#2f6f9f", "dpo": "#b5532a", "reward": "#7b4f9d", "kto": "#8a6d1f", "grpo": "#3c7d4f",
          "rloo": "#2b8c8c", "distillation": "#555555"}


@cache
def module(path):
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def results(pattern):
    """-> [(folder name, run.json, metrics)] of the committed runs, scripts in reading order."""
    found = [(p.parent.name, json.loads(p.read_text()), lines(p.with_name("metrics.jsonl")))
             for p in sorted(RESULTS.glob(f"{pattern}/run.json"))]
    places = {script: i for i, script in enumerate(ORDER)}
    return sorted(found, key=lambda r: places.get(r[0].split("-")[1].split("_")[0], len(places)))


def tiny():
    """-> {script: [(seed, run.json, metrics)]}"""
    scripts = {}
    for name, run, metrics in results("tiny-*-s*"):
        _, script, seed = name.split("-")
        scripts.setdefault(script, []).append((int(seed[1:]), run, metrics))
    return scripts


def seconds(metrics):
    return sum(line.get("perf/seconds", 0) for line in metrics)


def table(head, rows):
    """Markdown; a column whose head ends in : is right-aligned."""
    marks = ["--:" if h.endswith(":") else "---" for h in head]
    cells = [[h.removesuffix(":") for h in head], marks, *rows]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in cells)


def alerts(runs):
    total = {}
    for run in runs:
        for code, count in (run.get("alerts") or {}).items():
            total[code] = total.get(code, 0) + count
    return ", ".join(f"{code} {count}x" for code, count in sorted(total.items())) or "none"


def versions(run):
    v = run["versions"]
    return f"torch {v['torch']}, transformers {v['transformers']}, {v['device']}, {v['threads']} threads"


# ---- parts -----------------------------------------------------------------------------------------------------------


def folded(summary, text):
    """A part that is opened by a click. Markdown needs the blank lines."""
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n</details>\n"


def part_scripts():
    """methods/README: the scripts as a tree, with links from that page."""
    rows = module(ROOT / "tests" / "test_copies.py").table(ROOT)
    return rows.replace("](methods/", "](") + "\n"


def step_of(path):
    """The lines under the banner `step` of a script's main, up to its backward, without their indentation."""
    body = (ROOT / path).read_text().partition("\ndef main(")[2]
    step = re.search(r"\n        # ---- step -+\n(.*?\.backward\(\)[^\n]*)\n", body, re.S)
    return textwrap.dedent(step[1]).splitlines() if step else []


def part_diff():
    """README: how the step of dpo.py's loop differs from that of sft.py. A line that differs in its comment is the
    same."""
    sft, dpo = step_of("methods/sft.py"), step_of("methods/dpo.py")
    known = {line.partition("  # ")[0]: line for line in sft}
    dpo = [known.get(line.partition("  # ")[0], line) for line in dpo]
    hunk = list(difflib.unified_diff(sft, dpo, n=99, lineterm=""))[3:]  # without the three lines of its head
    return "```diff\n" + "".join(f"{line.rstrip()}\n" for line in hunk) + "```\n"


def part_rloo_diff():
    """methods/README: how rloo.py differs from grpo.py: all of it but the docstring."""
    texts = []
    for name in ("grpo.py", "rloo.py"):
        text = (ROOT / "methods" / name).read_text()
        texts.append(text.split('"""\n', 2)[2].splitlines())
    hunks = list(difflib.unified_diff(*texts, n=1, lineterm=""))[2:]
    lines = [re.sub("^@@.*", "@@", line).rstrip() for line in hunks]
    return "```diff\n" + "".join(f"{line}\n" for line in lines) + "```\n"


FAMILIES = {
    "sft": "SFT", "reward": "Reward models", "dpo": "DPO", "kto": "KTO", "grpo": "GRPO", "rloo": "RLOO",
    "distillation": "Distillation",
}  # by the first script of methods/ among a script and its parents
NEARER = {"prm": "reward"}  # where another script of methods/ is meant than the parent
OFFSHOOTS = {  # or by one of these, which do something else than their parent, or have none
    "orpo": "Pairs without a reference",
}


def family(path):
    """methods/experimental/dpo_batch.py -> dpo"""
    while Path(path).parent.name == "experimental" and Path(path).stem not in OFFSHOOTS:
        if Path(path).stem in NEARER:
            return NEARER[Path(path).stem]
        path = re.search(r"^Parent: (\S+)", (ROOT / path).read_text(), re.M)[1]
    return Path(path).stem


def part_families():
    """README: what each script of methods/ does, by its docstring, how many methods its family has, and what a run
    without flags reached on the tiny lab (held-out accuracy, means over the seeds)."""
    rows, counted = [], [family(row["command"].split()[0]) for row in json.loads(METHODS.read_text())]
    for script in FAMILIES:
        path = f"methods/{script}.py"
        _, _, what = (ROOT / path).read_text().splitlines()[1].partition(": ")
        runs = [run for _, run, _ in tiny().get(script, [])]
        reached = ""
        if runs:
            before = mean(run["before"]["eval/accuracy"] for run in runs)
            after = mean(run["last"]["eval/accuracy"] for run in runs)
            reached = f"{before:.3f} -> {after:.3f}"
        rows.append([f"[`{path}`]({path})", what, counted.count(script), reached])
    return table(("script", "what it does", "[methods](methods/README.md):", "tiny lab"), rows)


def part_methods():
    """methods/README: a row per method of methods.json, folded by family."""
    groups = {}
    for row in json.loads(METHODS.read_text()):
        name, (file, _, test) = row["name"], row["test"].partition("::")
        name = f"[{name}](https://arxiv.org/abs/{row['paper']})" if row["paper"] else name
        cells = [name, f"`{row['command']}`", f"`{row['formula']}`", f"[`{test}`](../{file})"]
        cells.append("yes" if row["trl"] else "no")
        groups.setdefault(family(row["command"].split()[0]), []).append((row["row"], cells))
    head, text = ("method", "script and flags", "formula", "test", "TRL 1.16"), ""
    for script, title in (FAMILIES | OFFSHOOTS).items():
        if rows := [cells for _, cells in sorted(groups.pop(script, []))]:
            new = sum(cells[-1] == "no" for cells in rows)
            summary = f"{title}: {len(rows)} method{'s' * (len(rows) > 1)}" + f", {new} not in TRL 1.16" * (new > 0)
            text += folded(summary, table(head, rows)) + "\n"
    assert not groups, f"no family for {sorted(groups)}"
    return text


# README, "where to look": what one looks for, the file, the function, and a piece of the line of code that is shown.
WHERE = [
    ("the denominator: scored tokens of the whole step", "methods/sft.py", "main", "all_sum(run, count_scored"),
    ("gradients, a part of a global mean", "methods/sft.py", "main", ".backward()"),
    ("the optimizer steps", "methods/sft.py", "main", "optimizer.step()"),
    ("the model is sharded (FSDP2)", "methods/sft.py", "shard", "fully_shard(layer"),
    ("GRPO's baseline: the mean of the group", "methods/grpo.py", "compute_advantages", "nanmean(1"),
    ("RLOO's baseline: the mean of the others", "methods/rloo.py", "compute_advantages", "- rewards) / (count - 1)"),
    ("GRPO's KL is a term of the loss", "methods/grpo.py", "grpo_loss", "args.beta *"),
    ("RLOO's KL is taken off the reward", "methods/rloo.py", "penalized_rewards", "-= args.beta"),
    ("the trained weights enter the sampler", "methods/grpo.py", "refresh", "copy_("),
    ("what a checkpoint holds", "common/runtime/checkpoint.py", "trainer_tensors", "tensors["),
    ("what `final/` holds", "common/runtime/export.py", "export", "save_pretrained"),
]


def find_definition(path, name):
    """The syntax tree of a function or class of a file, "Class.method" of a method, or None."""
    path = ROOT / path
    node = ast.parse(path.read_text()) if path.is_file() else None
    for part in name.split("."):
        named = [child for child in getattr(node, "body", []) if getattr(child, "name", None) == part]
        node = named[0] if named else None
    return node


def line_of_code(path, name, piece):
    """The smallest statement of a function that contains `piece`, on one line without comments, or ""."""
    found = []
    for node in ast.walk(find_definition(path, name) or ast.Module([], [])):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            code = ast.get_source_segment((ROOT / path).read_text(), node)
            code = re.sub(r"\s+", " ", re.sub(r"  #[^\n]*", "", code))
            if piece in code:
                found.append(code)
    return min(found, key=len, default="")


def part_where():
    """README: where to look for what."""
    rows = []
    for what, path, name, piece in WHERE:
        code = line_of_code(path, name, piece).replace("|", "\\|")
        place = f"[`{name}`]({path}) in `{path.removeprefix('methods/').removeprefix('common/')}`"
        rows.append([what, place, f"`{code}`" if code else ""])
    return table(("where to look for", "in", "the line"), rows)


def is_class(node, name):
    return isinstance(node, ast.ClassDef) and node.name == name


def class_flags(tree, name):
    """{flag or alias: default} of a dataclass of flags."""
    found = {}
    (node,) = [node for node in tree.body if is_class(node, name)]
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            found[field.target.id] = value = ast.literal_eval(field.value)
            words = [part.value for part in ast.walk(field.annotation) if isinstance(part, ast.Constant)]
            aliases = [word for word in words if isinstance(word, str) and word.startswith("--")]
            found |= {alias[2:].replace("-", "_"): value for alias in aliases}
    return found


def script_flags(path):
    """{flag or alias: default} of a script, read from its text: those that all scripts have, then its own."""
    shared = ast.parse((ROOT / "common" / "runtime" / "flags.py").read_text())
    return class_flags(shared, "RunFlags") | class_flags(ast.parse((ROOT / path).read_text()), "Args")


# Fields of TRL's configs that have no row in the table of methods/README: not here, as long as no script has the name.
LEFT_OUT = {
    "sft": "loss_type router_aux_loss_coef",
    "dpo": "router_aux_loss_coef",
    "kto": "router_aux_loss_coef",
    "grpo": "router_aux_loss_coef top_entropy_quantile use_adaptive_entropy entropy_coef_min entropy_coef_max "
            "entropy_coef_delta entropy_target",
    "rloo": "router_aux_loss_coef",
}  # fmt: skip
ALL = "TrainingArguments"  # fields that every trainer of TRL has


def trl_names():
    """-> {script or ALL: {field of TRL's configs: (where, default here, TRL's)}}. where: "table", a script with a flag
    or alias of that name, "left out", or "" where nobody has said anything. Of ALL: what all seven scripts have."""
    configs = json.loads((ROOT / "tests" / "fixtures" / "trl_configs.json").read_text())
    section = METHODS_PAGE.read_text().partition("\n## Coming from TRL\n")[2].partition("\n## ")[0]
    table = re.findall(r"`([\w*]+)`", " ".join(re.findall(r"^\| ([^|]*) \|", section, re.M)))
    scripts = {f"methods/{name}.py": script_flags(f"methods/{name}.py") for name in FAMILIES}
    children = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "methods" / "experimental").glob("*.py"))
    names = {ALL: {}} | {script: {} for script in FAMILIES}
    for script, found in names.items():
        own = scripts if script == ALL else {f"methods/{script}.py": scripts[f"methods/{script}.py"]}
        more = {path: script_flags(path) for path in children if script == family(path)}
        for field, theirs in (configs[ALL] | configs[script]).items():
            places = [path for path, flags in (own | more).items() if field in flags]
            if script == ALL and not set(scripts) <= set(places) or script != ALL and field in names[ALL]:
                continue  # not in all seven, or said of all seven
            if any(fnmatch.fnmatch(field, pattern) for pattern in table):
                found[field] = "table", None, theirs
            elif places:
                found[field] = places[0], (own | more)[places[0]][field], theirs
            elif field in configs[script]:
                found[field] = "left out" * (field in LEFT_OUT.get(script, "").split()), None, theirs
    return names


def part_trl_names():
    """methods/README: names that are TRL's, a line per script. A default is written where it is another one."""
    names, none, text = trl_names(), (None, "", (), "{}", 0), ""
    for script, found in names.items():
        listed = {}
        for field, (where, ours, theirs) in sorted(found.items()):
            same = list(ours) == theirs if isinstance(ours, tuple) else ours == theirs
            if script == ALL or same or theirs is None and ours in none:
                words = f"`--{field}`"
            else:
                shown = " ".join(map(str, ours)) if isinstance(ours, tuple) else str(ours).lower()
                words = f"`--{field}` {shown} ({str(theirs).lower()})"
            if where.startswith("methods/"):
                listed.setdefault(where, []).append(words)
        for where, words in listed.items():
            title = "all scripts" if script == ALL else f"`{where}`"
            text += f"- {title}: {', '.join(words)}\n"
    missing = {}
    for script, found in names.items():
        for field, (where, _, _) in found.items():
            if where == "left out":
                missing.setdefault(field, []).append(script)
    words = (f"`{field}`" + f" ({', '.join(where)})" * (len(where) < 5) for field, where in sorted(missing.items()))
    return text + (f"- not here: {', '.join(words)}\n" if missing else "")


def part_tiny():
    """results/tiny_lab: a line per script."""
    rows = []
    for script, runs in tiny().items():
        before, after = ([run[key]["eval/accuracy"] for _, run, _ in runs] for key in ("before", "last"))
        span = f"{mean(after):.3f} ({min(after):.3f} to {max(after):.3f})"
        times = sorted(seconds(metrics) for _, _, metrics in runs)
        rows.append([f"`methods/{script}.py`", f"{mean(before):.3f}", span, runs[0][2][-1]["step"],
                     f"{median(times):.0f}", alerts(run for _, run, _ in runs)])
    seeds = max(map(len, tiny().values()), default=0)
    head = "no flags", "accuracy before:", f"after, {seeds} seeds:", "steps:", "seconds:", "alerts"
    return table(head, rows) if rows else ""


def part_tiny_runs():
    """results/tiny_lab: a line per run."""
    rows = []
    for script, runs in tiny().items():
        for seed, run, metrics in runs:
            before, after = run["before"], run["last"]
            key, steps = SHOWN.get(script, ("loss", ""))[0], [m for m in metrics if "loss" in m]
            shown = [m[key] for m in metrics if key in m]
            rest = [f"{k.removeprefix('eval/')} {before[k]:.3f} -> {after[k]:.3f}" for k in after
                    if k.startswith("eval/pass") or k in ("eval/token_accuracy", "eval/reward_acc")]
            path = RESULTS / f"tiny-{script}-s{seed}" / "ladder.json"
            judged = ["-", "-", "-"]
            if path.is_file():
                said = json.loads(path.read_text())
                cpu = f"{said['cpu_seconds']:.0f}" if "cpu_seconds" in said else "-"
                judged = [f"{said['floor']:g}", cpu, "yes" if said["passed"] else "NO"]
            rows.append([script, seed, f"{before['eval/accuracy']:.3f} -> {after['eval/accuracy']:.3f}", *judged,
                         f"{key} {shown[0]:.4f} -> {shown[-1]:.4f}", "; ".join(rest), len(steps),
                         f"{seconds(metrics):.0f}", f"{run['save_seconds'] / run['seconds']:.1%}",
                         f"{max(m['perf/peak_gb'] for m in steps):.2f}", alerts([run])])
    head = "script", "seed:", "held-out accuracy", "floor:", "CPU s:", "passes", "what it optimises", "besides"
    head = *head, "steps:", "s:", "saving:", "GB:", "alerts"
    made = {versions(run) for runs in tiny().values() for _, run, _ in runs}
    return table(head, rows) + f"\nMade with {'; '.join(sorted(made))}.\n" if rows else ""


LADDER = {  # families of ladder.py: title, and the script whose tokens are the family's budget
    "demonstrations": ("From demonstrations", "sft"),
    "preference": ("From preferences and labels", "dpo"),
    "online": ("Online: from samples of its own", "grpo"),
    "distillation": ("From a teacher", "distillation"),
}
JUDGED = {"reward": "of pairs", "prm": "of steps"}  # scripts whose held-out accuracy is not of written answers
TRAINED, SAMPLED, CPU, ACCURACY = 1, 2, 3, 4  # places in a point of ladder.py's curves


def ladder(rung):
    """-> {script: [line of the results]}, seeds in order."""
    found = {}
    for (at, script, _), row in sorted(module(ROOT / "benchmarks" / "ladder.py").read_results().items()):
        if at == rung:
            found.setdefault(script, []).append(row)
    return found


def ladder_first(name, rung):
    """The lines of the first script of a family, whatever folder it is in."""
    rows = [rows for script, rows in ladder(rung).items() if Path(script).stem == LADDER[name][1]]
    return rows[0] if rows else []


def ladder_area(rows, first, cost):
    """Mean over the seeds of the area under accuracy over trained or sampled tokens, as far as the first script of the
    family went; None where one of the two has not run."""
    area = module(ROOT / "benchmarks" / "ladder.py").area
    if not rows or not first:
        return None
    budget = first[0]["curve"][-1][cost]
    return mean(area([(point[cost], point[ACCURACY]) for point in row["curve"]], budget) for row in rows)


def ladder_cost(rows, cost):
    """What it took to reach 0.9, a mean over the seeds, or how many of them did."""
    reached = module(ROOT / "benchmarks" / "ladder.py").reached
    rows = [row for row in rows if row["curve"][0][cost] is not None]
    costs = [reached([(point[cost], point[ACCURACY]) for point in row["curve"]]) for row in rows]
    found = [value for value in costs if value is not None]
    if len(found) < len(rows):
        return f"{len(found)} of {len(rows)}" if found else "-"
    return f"{mean(found):.1f}" if cost == CPU else f"{mean(found) / 1000:.1f}k"


def ladder_rows(name):
    """A row of the table for each script of a family and each rung."""
    tools, rows = module(ROOT / "benchmarks" / "ladder.py"), []
    scripts = [script for script in tools.scripts() if tools.family(script) == name]
    costs = [TRAINED, SAMPLED] if name in ("online", "distillation") else [TRAINED]
    for rung in tools.RUNGS:
        found = ladder(rung)
        first = ladder_first(name, rung)
        for script in scripts:
            stem, above = Path(script).stem, tools.parent(script)
            cells = [f"[`{stem}.py`]({script.removeprefix('methods/')})", Path(above).stem if above else "", rung]
            mine = found.get(script)
            if not mine:
                rows.append([*cells, "not run"])
                continue
            before = mean(row["curve"][0][ACCURACY] for row in mine)
            after = [row["curve"][-1][ACCURACY] for row in mine]
            spread = f" ({min(after):.3f} to {max(after):.3f})" if len(after) > 1 else ""
            cells += [len(mine), f"{before:.3f} -> {mean(after):.3f}{spread} {JUDGED.get(stem, '')}".strip()]
            for cost in costs:
                pair = ladder_area(mine, first, cost), ladder_area(found.get(above), first, cost)
                cells += ["" if area is None else f"{area:.3f}" for area in pair]
            cells += [ladder_cost(mine, cost) for cost in [*costs, CPU]]
            rows.append([*cells, alerts(mine)])
    return rows


def part_ladder():
    """methods/README: a picture and a table for each family."""
    text = ""
    for name, (title, first) in LADDER.items():
        head = ["script", "parent", "rung", "seeds:", "held-out accuracy", "area:", "parent's:"]
        if name in ("online", "distillation"):
            head += ["area, sampled:", "parent's:", "trained to 0.9:", "sampled to 0.9:"]
        else:
            head += ["tokens to 0.9:"]
        rows = ladder_rows(name)
        budgets = [f"{ladder_first(name, rung)[0]['curve'][-1][TRAINED] / 1000:.0f}k on {rung}"
                   for rung in ("tiny", "hard") if ladder_first(name, rung)]
        text += f"### {title}\n\n![{title}: held-out accuracy](../benchmarks/results/ladder_{name}.png)\n\n"
        text += f"Area over the trained tokens of `{first}.py`: {', '.join(budgets)}.\n\n" if budgets else ""
        head += ["CPU s to 0.9:", "alerts"]
        text += table(head, [row + [""] * (len(head) - len(row)) for row in rows]) + "\n"
    made = {versions(row) for rung in ("tiny", "hard") for rows in ladder(rung).values() for row in rows}
    return text + f"Made with {'; '.join(sorted(made))}.\n"


REAL = {  # part of real_runs.py: what it is
    "sft": "GSM8K demonstrations", "dpo": "pairs of right and wrong GSM8K solutions",
    "reward": "a right and a wrong GSM8K solution of each question", "kto": "the same solutions, each with a label",
    "cold": "tiny lab's demonstrations: a cold start", "grpo": "tiny lab's prompts, from the cold start",
    "grpo_gsm8k": "GSM8K prompts, from the SFT model", "sft_bfloat16": "GSM8K demonstrations, layers in bfloat16",
    "distillation": "GSM8K prompts: half of the layers learn from all of them, on their own completions",
    "orpo": "DPO's pairs", "simpo": "DPO's pairs: SimPO",
}

def part_real():
    """results/real_model: a line per run, and how sure the two pairwise results are."""
    rows = []
    for name, run, metrics in results("smollm2-*"):
        part, flags = name.removeprefix("smollm2-"), run["flags"]
        script = re.search(r"methods/((experimental/)?\w+\.py)", run["command"])[1]
        steps = [m for m in metrics if "loss" in m]
        if run["status"] != "finished" or not steps:
            continue
        key = "reward" if "reward" in steps[0] else "loss"
        few = max(1, len(steps) // 5)  # single steps are noisy: the first and the last fifth
        shown = [f"{key} of a step {mean(m[key] for m in steps[:few]):.3f} -> {mean(m[key] for m in steps[-few:]):.3f}"]
        known = ("eval/loss", "eval/token_accuracy", "eval/accuracy", "eval/reward_margin", "eval/reward_acc",
                 "eval/divergence")
        last = run.get("last") or {}
        held = [f"{k.removeprefix('eval/')} {run['before'][k]:.3f} -> {last[k]:.3f}" for k in known if k in last]
        held = [h.replace("accuracy", "pair accuracy") for h in held] if script == "reward.py" else held
        rows.append([REAL.get(part, part), f"`methods/{script}`", "; ".join(held) or "-", shown[0], len(steps),
                     flags["batch_size"], f"{seconds(metrics) / 60:.0f}", alerts([run])])
    head = "run", "script", "held out, before -> after", "training", "steps:", "batch:", "minutes:", "alerts"
    text = table(head, rows) if rows else ""
    path = RESULTS / "smollm2-dpo" / "interval.json"
    if rows and path.is_file():
        i = json.loads(path.read_text())
        text += (f"\nDPO's held-out margin: mean {i['mean_margin']:.4f}, 95 % interval {i['interval_95'][0]:.4f} to "
                 f"{i['interval_95'][1]:.4f} over {i['questions']} questions ({i['bootstrap_draws']} bootstrap draws); "
                 f"{i['pairs_right']:.0%} of pairs the right way round.\n")
    moved = []
    for part, name in ("orpo", "ORPO"), ("simpo", "SimPO"):
        path = RESULTS / f"smollm2-{part}" / "interval.json"
        if path.is_file():
            i = json.loads(path.read_text())
            moved.append([name, f"{i['mean_nats']:.2f}", "{:.2f} to {:.2f}".format(*i["interval_95"]),
                          f"{i['pairs_moved_apart']:.0%}"])
    if moved:
        i = json.loads((RESULTS / "smollm2-dpo" / "interval.json").read_text())
        beta = json.loads((RESULTS / "smollm2-dpo" / "run.json").read_text())["flags"]["beta"]
        low, high = (end / beta for end in i["interval_95"])
        nats = i["mean_margin"] / beta
        moved.insert(0, ["DPO", f"{nats:.2f}", f"{low:.2f} to {high:.2f}", f"{i['pairs_right']:.0%}"])
        text += ("\nBy how many nats training has moved the two log-likelihoods of a held-out pair apart, in as many "
                 "steps on the same pairs:\n\n")
        text += table(("method", "nats:", "95 % interval", "pairs moved apart:"), moved)
    path = RESULTS / "smollm2-reward" / "interval.json"
    if rows and path.is_file():
        i = json.loads(path.read_text())
        text += (f"\nThe reward model on all {i['pairs']} pairs of {i['questions']} held-out questions, beside a bag "
                 f"of words trained on the same {i['training_pairs']} pairs.\nPair accuracy of a question, averaged "
                 f"over questions; {i['bootstrap_draws']} bootstrap draws over questions; chance is 0.5:\n\n")
        named = ("reward model", "reward_model"), ("bag of words", "bag_of_words"), ("difference", "difference")
        text += table(("ranker", "pair accuracy:", "95 % interval"), [
            [name, f"{i[key]['mean']:.3f}", "{:.3f} to {:.3f}".format(*i[key]["interval_95"])] for name, key in named])
        (low, high), (less, more) = i["reward_model"]["interval_95"], i["difference"]["interval_95"]
        if low <= 0.5 <= high:
            text += "\nThe model's interval holds 0.5: so few pairs did not teach it to tell right from wrong.\n"
        than = "better" if less > 0 else "worse" if more < 0 else "neither better nor worse"
        text += (f"\nThat is {than} than counting words, as far as these questions tell. One run, nothing tuned, the "
                 "shorter questions only.\n")
    return text


def parity():
    path = RESULTS / "trl_parity.json"
    return json.loads(path.read_text()) if path.is_file() else None


def versus():
    """-> versus_trl.py and its lines of benchmarks/results, or nothing."""
    found = lines(RESULTS / "versus_trl.jsonl")
    return (module(ROOT / "benchmarks" / "versus_trl.py"), found) if found else (None, [])


def ratios():
    """-> {case and part of a step, or lean: {"default" and "best" (TRL's): [CPU time, memory] as (median, lowest,
    highest of the rounds) of TRL over ours, memory None for a part}}. What the tables and the picture show."""
    tool, found = versus()
    spread, shown = lambda values: values and (median(values), min(values), max(values)), {}
    for line in tool.summary(found) if found else []:
        row = shown.setdefault(f"{line['case']} {line['view']}".strip(), {})
        for key, wanted in ("default", line["side"] == "TRL default"), ("best", line["best"]):
            if wanted:
                row[key] = spread(line["cpu"]), spread(tool.above_ratio(line)) if "above" in line else None
    return shown


def worst_differences():
    """-> {method: cases and the largest difference of a loss (absolute) and of a gradient or its norm (relative)}"""
    found, rows = parity(), {}
    for name, result in found["results"].items() if found else ():
        kind = " ".join(re.findall(r"^\w+|batch$|run", name))
        row = rows.setdefault(kind, {"cases": 0, "loss": 0.0, "gradient": 0.0})
        worst = {metric: w["worst"] for metric, w in result.get("worst", {}).items()}
        cases = [(c["loss_difference"], c["gradient_difference"]) for c in result.get("cases", [])]
        cases = cases or [(worst["loss"], worst["grad_norm"])]
        row["cases"] += len(cases)
        for key, values in zip(("loss", "gradient"), zip(*cases)):
            row[key] = max(row[key], *values)
    return rows


def part_parity():
    """results/trl_parity: the worst of each method, then every case and metric."""
    found = parity()
    if not found:
        return ""
    version = next(iter(found["results"].values()))["versions"]["trl"]
    text = f"TRL {version}; `{found['command']}`, {found['date']}, {found['device']}.\n\n"
    cells = [[kind, r["cases"], f"{r['loss']:.1e}", f"{r['gradient']:.1e}"] for kind, r in worst_differences().items()]
    text += table(("method", "cases:", "loss:", "gradient:"), cells) + "\n"
    rows = []
    for name, result in found["results"].items():
        if worst := result.get("worst"):
            shown = (f"{metric} {w['worst']:.1e} ({w['limit']:g})" for metric, w in worst.items())
            rows.append([name, ", ".join(shown)])
        for case in result.get("cases", []):
            shown = (f"{k} {case[f'{k}_difference']:.1e} ({limit:g})" for k, limit in result["limits"].items())
            rows.append([f"{name}: {case['case']}", ", ".join(shown)])
    return text + table(("case", "largest difference (limit)"), rows)


def ratio_groups():
    """-> {family of cases: rows of `ratios`, whole steps only, "lean" beside "default" and "best"}"""
    groups, found = {}, ratios()
    for name, row in found.items():
        if " " not in name:
            row["lean"] = found.get(f"{name} lean", {}).get("best", (None, None))
            groups.setdefault(name.split("-")[0], []).append(row)
    return groups


def ratio_span(rows, side, which):
    """The lowest and the highest median over the cases `rows`; which: 0 for time, 1 for memory."""
    values = [row[side][which][0] for row in rows if row[side][which]]
    if not values:
        return "-"
    return f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def part_versus():
    """results/versus_trl: a line per family of cases, then the table that the benchmark itself prints."""
    tool, speed = versus()
    if not speed:
        return ""
    columns = [(side, which) for which in (0, 1) for side in ("default", "best", "lean")]
    rows = [[family, len(cases), *(ratio_span(cases, *column) for column in columns)]
            for family, cases in ratio_groups().items()]
    head = [f"{what}, {side}:" for what in ("time", "memory") for side in ("defaults", "best", "lean")]
    text = table(("cases", "number:", *head), rows) + "\n![TRL over ours, by case](versus_trl.png)\n\n"
    text += tool.table(speed) + "\n\n"
    heads = [row for row in speed if "command" in row]
    commands = dict.fromkeys(re.sub(r" --only .*", "", row["command"]) for row in heads)
    rates = [row["machine"]["flops"] / 1e9 for row in heads], [row["machine"]["bandwidth"] / 1e9 for row in heads]
    text += "; ".join(f"`{command}`" for command in commands) + f", {heads[0]['device']}; "
    text += f"{median(rates[0]):.0f} GFLOP/s, {median(rates[1]):.1f} GB/s.\n"
    texts = {}
    for row in heads:
        texts.setdefault((row["date"], row["git"][:8]), []).append(row["case"])
    return text + "; ".join(f"{', '.join(cases)}: {date}, commit {git}" for (date, git), cases in texts.items()) + ".\n"


def part_compare():
    """README: five rows beside TRL."""
    checked, groups = worst_differences(), ratio_groups()
    cases, gradient = sum(row["cases"] for row in checked.values()), max(r["gradient"] for r in checked.values())
    steps = [row for family, rows in groups.items() if family not in ("head", "tiny") for row in rows]
    lines = {name: len((ROOT / "methods" / f"{name}.py").read_text().splitlines()) for name in ("sft", "grpo")}
    rows = [
        ["to change a method", f"copy one file ({lines['sft']} lines for SFT, {lines['grpo']} for GRPO) and edit it",
         "subclass a trainer, or use its options"],
        ["same numbers", f"yes: {cases} cases, gradients within {gradient:.0e} of TRL's", "-"],
        ["CPU time a token, TRL / ours", "1",
         f"{ratio_span(steps, 'default', 0)} as it comes; {ratio_span(steps, 'best', 0)} at its fastest"],
        ["memory above the model, TRL / ours", "1",
         f"{ratio_span(steps, 'default', 1)} as it comes; {ratio_span(steps, 'best', 1)} at its fastest"],
        ["LoRA, quantised weights, images, tools, vLLM", "no", "yes"],
    ]
    return table(("", "CleanPost", "TRL 1.16"), rows)


ATTACKS = ("forge", "reach", "burden", "memo")  # kinds of code_attacks.py that are attacks


def part_summary():
    """benchmarks/README: every question, its answer in a line, and where the data is."""
    rows = []

    def answer(question, text, page):
        rows.append([question, text, f"[{page}](results/{page}.md)"])

    scripts = tiny()
    if scripts:
        worst = {name: min(run["last"]["eval/accuracy"] for _, run, _ in runs) for name, runs in scripts.items()}
        shown = ", ".join(f"{name} {value:.3f}" for name, value in worst.items())
        text = f"held-out accuracy after a run without flags, worst seed: {shown}"
        answer("Does every script learn?", text, "tiny_lab")
    real = results("smollm2-*")
    if real:
        text = f"{len(real)} short runs of SmolLM2-135M-Instruct on the CPU"
        answer("Does it train a real model?", text, "real_model")
    checked = worst_differences()
    if checked:
        loss, gradient = (max(row[key] for row in checked.values()) for key in ("loss", "gradient"))
        number = sum(row["cases"] for row in checked.values())
        text = f"{number} cases: losses differ by at most {loss:.0e}, gradients by {gradient:.0e} relative"
        answer("Are the numbers TRL's?", text, "trl_parity")
    groups = ratio_groups()
    if groups:
        steps = [row for family, rows in groups.items() if family not in ("head", "tiny") for row in rows]
        for question, which in ("Is it fast?", 0), ("Is it lean?", 1):
            what = "CPU time a token" if which == 0 else "memory above the model"
            text = f"TRL's {what} over ours, {len(steps)} cases: {ratio_span(steps, 'default', which)} at its "
            text += f"defaults, {ratio_span(steps, 'best', which)} at its fastest setting"
            answer(question, text, "versus_trl")
    meshes = lines(RESULTS / "meshes.jsonl")
    if meshes:
        equal = sum(not row["wrong"] for row in meshes)
        answer("Does a mesh change the result?", f"{equal} of {len(meshes)} runs equal those of one process", "meshes")
    faults = [row for path in sorted(RESULTS.glob("fault_*.jsonl")) for row in lines(path)[1:]]
    if faults:
        unequal = sum(not row["equal"] for row in faults)
        answer("Can a run be lost?", f"{len(faults)} broken runs, resumed: {unequal} ended differently", "faults")
    hostile = lines(RESULTS / "hostile.jsonl")[1:]
    if hostile:
        wrong = sum(not row["ok"] for row in hostile)
        text = f"{len(hostile)} bad inputs: {wrong} that did not end as they should"
        answer("What does bad input do?", text, "hostile")
    attacks = [row for row in lines(RESULTS / "code_attacks.jsonl")[1:] if row["kind"] in ATTACKS]
    if attacks:
        through = sum(not row["held"] for row in attacks)
        text = f"{len(attacks)} attacks on the code reward, as root and as a user: {through} that got anything"
        answer("What does a model's code reach?", text, "code_attacks")
    precise = lines(RESULTS / "precision.jsonl")
    if precise:
        good = sum(row["exit_code"] == 0 and not row["alerts"] for row in precise)
        text = f"{len(precise)} runs in float32 or bfloat16: {good} ended well, without an alert"
        answer("Does it train in bfloat16?", text, "precision")
    if (RESULTS / "loading.json").is_file():
        answer("What does loading take?", "memory and seconds by number of ranks", "loading")
    points = {(row["part"], json.dumps(row["point"])) for row in lines(RESULTS / "scaling.jsonl")}
    if points:
        text = f"{len(points)} points: length, group, vocabulary, model, processes, spread, start-up"
        answer("How does the cost of a token grow?", text, "scaling")
    planned_runs = lines(RESULTS / "plan.jsonl")
    if planned_runs:
        count = sum(row["kind"] == "plan" for row in planned_runs)
        text = f"predicted for {count} set-ups up to 671B weights; the prediction beside real CPU runs"
        answer("What would large models take?", text, "plan")
    return table(("question", "answer", "data"), rows)


def part_faults():
    """results/faults: points by scenario and side, random faults by kind, and moves between meshes."""
    files = [lines(path) for path in sorted(RESULTS.glob("fault_*.jsonl"))]
    found, heads = [row for file in files for row in file[1:]], [file[0] for file in files if file]
    parts = {part: [row for row in found if row["part"] == part] for part in ("points", "random", "mesh")}
    text, unequal = "", lambda rows: sum(not row["equal"] for row in rows)
    if rows := parts["points"]:
        sides = [side for side in ("before", "torn", "after", "power") if any(row["side"] == side for row in rows)]
        groups = {}
        for row in rows:
            groups.setdefault((row["scenario"], row["world"], row["rank"]), []).append(row)
        shown = [[*key, *(sum(row["side"] == side for row in rows) for side in sides), unequal(rows)]
                 for key, rows in groups.items()]
        head = "run", "ranks:", "killed rank:", *(f"{side}:" for side in sides), "ended differently:"
        text += f"At every file-system event:\n\n{table(head, shown)}\n"
    if rows := parts["random"]:
        kinds = list(dict.fromkeys(row["kind"] for row in rows))
        groups = {}
        for row in rows:
            groups.setdefault((row["script"], row["world"]), []).append(row)
        shown = [[*key, *(sum(row["kind"] == kind for row in rows) for kind in kinds), unequal(rows)]
                 for key, rows in groups.items()]
        shown.append(["all", "", *(sum(row["kind"] == kind for row in rows) for kind in kinds), unequal(rows)])
        head = "script", "ranks:", *(f"{kind}:" for kind in kinds), "ended differently:"
        text += f"At random moments:\n\n{table(head, shown)}\n"
        phases = [row["phase"] for row in rows if "phase" in row]
        hits = ", ".join(f"{phase} ({phases.count(phase)})" for phase in dict.fromkeys(phases))
        text += f"SIGKILL and a locked folder hit in {hits}.\n\n"
    if rows := parts["mesh"]:
        shown = [[row["script"], row["mesh"], row["learning_rates_apart"], unequal([row])] for row in rows]
        head = "script", "ranks", "weights apart, in learning rates:", "ended differently:"
        text += f"From one number of ranks to another:\n\n{table(head, shown)}\n"
    about = "; ".join(f"`{head['command']}`, {head['device']}" for head in heads)
    return f"{text}{about}.\n" if text else ""


def part_meshes():
    """results/meshes: whole runs on meshes against one process: the worst of the models of each script and mesh."""
    found = lines(RESULTS / "meshes.jsonl")
    groups = {}
    for row in found:
        groups.setdefault((row["script"], row["mesh"]), []).append(row)
    shown = [[*key, ", ".join(row["model"] for row in rows), f"{max(row['norms_apart'] for row in rows):.0e}",
              f"{max(row['learning_rates_apart'] for row in rows):.4f}", sum(row["completions"] for row in rows),
              sum(bool(row["wrong"]) for row in rows)]
             for key, rows in groups.items()]
    head = "script", "mesh", "models", "gradient norms:", "weights:", "same completions:", "unequal runs:"
    return table(head, shown) if found else ""


def part_loading():
    """results/loading: memory and time to load a model into its shards, by ranks and road."""
    path = RESULTS / "loading.json"
    about = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    groups = {}
    for row in about["rows"]:
        groups.setdefault((row["world"], row["road"]), []).append(row)
    shown = []
    for key, rows in groups.items():
        others = [row["peak_gb"] for row in rows if row["rank"]]
        numbers = median(row["peak_gb"] for row in rows if row["rank"] == 0), median(others) if others else None
        numbers = *numbers, rows[0]["shard_gb"], median(row["seconds"] for row in rows)
        shown.append([*key, *("" if number is None else f"{number:.2f}" for number in numbers)])
    head = "ranks:", "road", "rank 0, GB:", "other ranks, GB:", "shard, GB:", "seconds:"
    made = f"\n{about.get('weights', 0) / 1e6:.0f}M weights; `{about.get('command')}`, {about.get('device')}.\n"
    return table(head, shown) + made if about["rows"] else ""


def part_precision():
    """results/precision: the default run of every script with float32 and with bfloat16 layers."""
    found = {}
    for row in lines(RESULTS / "precision.jsonl"):
        found.setdefault(row["script"], {})[row["dtype"]] = row
    shown, failed = [], 0
    for script, rows in sorted(found.items(), key=lambda pair: ("/" in pair[0], pair[0])):
        cells = [f"`methods/{script}.py`"]
        for dtype in ("float32", "bfloat16"):
            row = rows.get(dtype)
            accuracies = [row[when].get("eval/accuracy", math.nan) for when in ("before", "last")] if row else []
            cells.append(" -> ".join(f"{value:.3f}" for value in accuracies))
        alerts = {alert["code"] for row in rows.values() for alert in row["alerts"]}
        failed += any(row["exit_code"] for row in rows.values())
        shown.append([*cells, ", ".join(sorted(alerts)) or "none"])
    head = "script", "float32", "bfloat16", "alerts"
    return table(head, shown) + f"\n{failed} scripts failed. `python benchmarks/precision.py`, CPU.\n" if found else ""


def part_hostile():
    """results/hostile: bad inputs by family and by how they ended."""
    first, *found = lines(RESULTS / "hostile.jsonl") or [{}]
    families = {}
    for row in found:
        families.setdefault(row["family"], []).append(row)
    codes = sorted({row["code"] for row in found}, key=str)
    shown = [[family, len(rows), *(sum(row["code"] == code for row in rows) for code in codes),
              sum(not row["ok"] for row in rows)] for family, rows in [*families.items(), ("all", found)]]
    head = "family", "cases:", *(f"exit code {code}:" for code in codes), "not as asked:"
    about = f"\n`{first.get('command')}`, {first.get('device')}.\n"
    return table(head, shown) + about if found else ""


def part_attacks():
    """results/code_attacks: attacks on the code reward, and right answers beside them, by user and kind."""
    first, *found = lines(RESULTS / "code_attacks.jsonl") or [{}]
    kinds = {}
    for row in found:
        kinds.setdefault((row["user"], row["kind"]), []).append(row)
    shown = []
    for (user, kind), rows in kinds.items():
        judged = [reward for row in rows for reward in row["rewards"]]
        rewards = [judged.count(value) for value in (1.0, 0.0, None)]
        shown.append([user, kind, len(rows), *rewards, sum(not row["held"] for row in rows)])
    head = "user", "kind", "cases:", "reward 1:", "reward 0:", "no reward:", "not held:"
    about = f"\n`{first.get('command')}`, Linux {first.get('kernel')}, {first.get('device')}.\n"
    return table(head, shown) + about if found else ""


SCALED = {  # part of scaling.py: title, what is measured
    "length": ("Length of rows", """The same number of tokens in longer and longer rows, in micro-batches of one size.
Attention's FLOPs grow with length, and with them the least time."""),
    "group": ("Completions of a prompt", """The same number of completions, more and more of them to a prompt, which is
computed once for all of them."""),
    "vocabulary": ("Vocabulary", """The head alone, forward and backward, beside plain logits and `cross_entropy`. Least
time: 6 FLOPs a weight and token; ours computes the logits again in backward, 8. Memory: beyond the weights, the hidden
states and the weights' gradient."""),
    "size": ("Size of the model", """Forward, backward and AdamW. Memory: of the process, beyond what it had before the
model; weights, gradients and Adam's two moments in fp32 are 16 bytes a weight."""),
    "ranks": ("Processes", """`methods/sft.py` itself with gloo, the same rows, micro-batches of 256 and of 2048 tokens.
More processes than cores cannot be faster, and one is not sharded. Each: weights are gathered and gradients reduced in
every micro-batch, as where memory is short, and not once a step. CPU time: of all processes. Memory: of the process
with most, the model's included."""),
    "spread": ("Spread of lengths", """Rows of log-normal length, the same number of tokens in all. Padded: what batches
of 8 of these rows would compute, each as long as its longest."""),
}  # fmt: skip


DRAWN = [part for part in SCALED if part != "ranks"]  # there the table says it all


def scaling(part):
    """-> [(a point with what is known of it, {figure: values over rounds and repetitions})]. ms, cpu: milliseconds per
    useful token; least: what its FLOPs take at the matrix product's rate; times: ms / least, in one process; mb: how
    far memory rises; computed, padded: tokens per useful token."""
    points, found = {}, []
    for row in lines(RESULTS / "scaling.jsonl"):
        if row["part"] == part:
            points.setdefault(json.dumps(row["point"]), []).append(row)
    for rows in points.values():
        figures = {name: [] for name in ("ms", "cpu", "least", "times", "mb", "computed", "padded")}
        for row in rows:
            tokens, rates = row["useful_tokens"], row.get("matmul_flops_per_second")
            figures["ms"] += [1e3 * s / tokens for s in row["seconds"]]
            figures["cpu"] += [1e3 * s / tokens for s in row["cpu_seconds"]]
            figures["mb"].append(row["rise_bytes"] / 1e6)
            figures["computed"].append(row.get("computed_tokens", tokens) / tokens)
            figures["padded"].append(row.get("padded_tokens", tokens) / tokens)
            figures["least"] += [1e3 * row["flops"] / mean(rates) / tokens] if rates else []
            figures["times"] += [s * mean(rates) / row["flops"] for s in row["seconds"]] if rates else []
        found.append(({"setting": ""} | rows[0] | rows[0]["point"], figures))
    return found


def scaling_panels(part):
    """-> [(x label, y label, {line: [(x, values)]})], what a picture shows. Lines named (...) are dashed."""
    points, least = scaling(part), "(least time)"
    if not points:
        return []

    def line(x, figure, points=points):
        return [(x(row), figure(row, f) if callable(figure) else f[figure]) for row, f in points]

    if part == "vocabulary":
        panels = []
        for key, other, label in (("vocabulary", "tokens", "words of the vocabulary"),
                                  ("tokens", "vocabulary", "scored tokens")):
            usual = mode(row[other] for row, _ in points)
            chosen = sorted((p for p in points if p[0][other] == usual), key=lambda p: p[0][key])  # noqa: B023
            for y, figure in (("time / least time", "times"), ("MB beyond the gradient", head_memory)):
                sides = {side: [p for p in chosen if p[0]["side"] == side] for side in ("ours", "plain")}
                panels.append((f"{label} ({other}: {usual})", y, {
                    side: line(lambda row: row[key], figure, some) for side, some in sides.items()}))  # noqa: B023
        return panels
    x, label = {
        "length": (lambda row: row["length"], "tokens of a row"),
        "group": (lambda row: row["group"], "completions of a prompt"),
        "size": (lambda row: row["weights"] / 1e6, "million weights"),
        "spread": (lambda row: row["sigma"], "sigma of log(length)"),
    }[part]
    time, memory = {"ours": line(x, "ms"), least: line(x, "least")}, {"ours": line(x, "mb")}
    computed = {"ours": line(x, "computed")}
    if part == "length":
        return [(label, "ms per token", time), (label, "MB above the model's", memory)]
    if part == "group":
        repeated = {"(prompt repeated)": line(x, lambda row, _: [1 + row["prompt"] / row["completion"]])}
        return [(label, "ms per completion token", time), (label, "MB above the model's", memory),
                (label, "tokens computed\nper completion token", computed | repeated)]
    if part == "size":
        whole = {"process": line(x, lambda row, f: [row["model_bytes"] / 1e6 + mb for mb in f["mb"]])}
        whole |= {"(16 bytes a weight)": line(x, lambda row, _: [16e-6 * row["weights"]])}
        return [(label, "time / least time", {"ours": line(x, "times")}), (label, "MB", whole)]
    return [(label, "ms per token", time),
            (label, "tokens computed\nper token of a row", computed | {"padded": line(x, "padded")})]


def head_memory(row, figures):
    return [mb - 4e-6 * row["weights"] for mb in figures["mb"]]


def span(values):
    """Median and range."""
    low, middle, high = (f"{x:.3g}" for x in (min(values), median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def profiled():
    """Where a step of two ranks goes: milliseconds a token by purpose of an operator, medians over rounds."""
    points = {}
    for row in lines(RESULTS / "scaling.jsonl"):
        if row["part"] == "profile":
            points.setdefault((row["point"]["budget"], row["point"]["setting"]), []).append(row)
    if not points:
        return ""
    purposes = list(next(iter(points.values()))[0]["purposes"])
    cells = []
    for (budget, setting), rows in points.items():
        whole = median(1e3 * row["seconds"][0] / row["useful_tokens"] for row in rows)
        spent = [median(1e3 * row["purposes"][name] / row["useful_tokens"] for row in rows) for name in purposes]
        cells.append([budget, setting, *(f"{value:.2f}" for value in (whole, *spent))])
    head = "tokens a micro-batch:", "how", "ms a token:", *(f"{name}:" for name in purposes)
    about = """Where the time of one such step goes on rank 0, by what an operator is for, as torch.profiler has it:
medians. A step has two micro-batches and exchanges all weights and gradients once, whatever its size: what is waited
and copied for that is nearly as much as the matrix products of 490 tokens, and a seventh of those of 3,992."""
    return f"{about}\n\n{table(head, cells)}\n"


def part_scaling():
    """results/scaling: a picture and a table of every part of scaling.py."""
    text, made = "", {}
    for row in lines(RESULTS / "scaling.jsonl"):
        made[f"`{row['command']}`, {row['date']}, {row['device']}, {row['threads']} threads, torch {row['torch']}"] = 1
    times = {"ms a token:": "ms", "CPU ms a token:": "cpu", "times the least:": "times"}
    columns = {
        "length": {"tokens of a row:": "length"} | times | {"MB:": "mb"},
        "group": {"completions:": "group"} | times | {"tokens computed:": "computed", "MB:": "mb"},
        "vocabulary": {"words:": "vocabulary", "tokens:": "tokens", "head": "side"} | times | {"MB:": head_memory},
        "size": {"weights:": "weights", "layers:": "layers", "hidden:": "hidden"} | times
        | {"MB, model and Adam:": lambda row, _: [row["model_bytes"] / 1e6], "MB, the work:": "mb"},
        "ranks": {"tokens a micro-batch:": "budget", "processes:": "ranks", "how": "setting"}
        | {"ms a token:": "ms", "CPU ms a token:": "cpu"}
        | {f"{key}, MB:": lambda row, _, key=key: [row[key] / 1e6] for key in ("parameters", "gradients", "optimizer")}
        | {"process, MB:": "mb"},
        "spread": {"sigma:": "sigma"} | times | {"tokens computed:": "computed", "padded:": "padded", "MB:": "mb"},
    }  # fmt: skip
    for part, (title, about) in SCALED.items():
        points = scaling(part)
        cells = [[row[c] if c in (*row["point"], "weights", "setting") else span(c(row, f) if callable(c) else f[c])
                  for c in columns[part].values()] for row, f in points]
        picture = f"![{title}](scaling_{part}.png)\n\n" if part in DRAWN else ""
        text += f"### {title}\n\n{about}\n\n{picture}{table(columns[part], cells)}\n" if points else ""
        if part == "ranks":
            text += profiled()
    starts = {}
    for row in lines(RESULTS / "scaling.jsonl"):
        if row["part"] == "startup":
            point = starts.setdefault(row["point"]["script"], {}).setdefault(row["point"]["what"], [])
            point += row["seconds"]
    if starts:
        whats = list(next(iter(starts.values())))
        cells = [[f"`methods/{name}.py`", *(span(found[what]) for what in whats)] for name, found in starts.items()]
        text += "### Start-up\n\nSeconds of a fresh process; the first step is the tiny lab's.\n\n"
        text += table(("script", *(f"{what}:" for what in whats)), cells) + "\n"
    return f"{text}{'; '.join(made)}.\n" if text else ""


def planned(kind):
    """Lines of plan.py, and how they were made."""
    found = [row for row in lines(RESULTS / "plan.jsonl") if row["kind"] == kind]
    return found, "".join(f"\n`{row['command']}`, torch {row['versions']['torch']}, transformers "
                          f"{row['versions']['transformers']}.\n" for row in found[:1])


def part_plan_real():
    """results/plan: a line per run: of its ranks, the one where prediction and measurement differ most."""
    (found, made), rows = planned("real"), []
    for case in found:
        sides = [[rank | {"peak": rank["activations"] + rank["working"], "received": sum(rank["moved"].values())}
                  for rank in case[side]] for side in ("predicted", "measured")]
        cells = []
        for key in ("parameters", "gradients", "optimizer", "activations", "peak", "received"):
            p, m = max(((p[key], m[key]) for p, m in zip(*sides)), key=lambda pair: abs(pair[0] - pair[1]))
            cells.append(f"{m}" if p == m else f"{m} ({(p - m) / m:+.2%})")
        mesh = f"{case['ranks']}, {case['tp_size']}, {case['replicate_size']}"
        rows.append([case["script"], case["model"], mesh, *cells, max(r["process"] for r in case["measured"]) // 10**6])
    head = "parameters:", "gradients:", "optimizer:", "activations:", "peak:", "received:", "process, MB:"
    return table(("script", "model", "ranks, tp, replicas", *head), rows) + made if found else ""


def gb(n):
    return f"{n / 1e9:.1f}" if n < 1e11 else f"{n / 1e9:.0f}"


def part_plan():
    """results/plan: a line per script, model and mesh."""
    (found, made), rows = planned("plan"), []
    fabric = module(ROOT / "benchmarks" / "plan_models.py").FABRIC
    for p in found:
        flags = ("tokens_per_microbatch", "tp_size", "replicate_size")
        flags = " ".join(f"--{key} {p[key]}" for key in flags if p[key] > 1)
        static, received = sum(p[k] for k in ("parameters", "gradients", "optimizer")), sum(p["moved"].values())
        wait = sum(n / fabric[key.split()[0]] for key, n in p["moved"].items())
        memory = map(gb, (static, p["activations"], p["working"], p["total"]))
        rows.append([p["script"], p["model"], p["gpus"], f"`{flags}`", *memory, p["fits"], gb(p["checkpointed"]),
                     gb(received), f"{wait:.2f}"])
    head = "static:", "activations:", "working:", "total:", "fits", "recomputed:", "received:", "s:"
    return table(("script", "model", "GPUs:", "flags", *head), rows) + made if found else ""


def part_plan_experts():
    """results/plan: a line per mixture of experts and mesh: whole layers gathered, or tokens sent to their experts."""
    found, rows = [p for p in planned("plan")[0] if p["routed"] and p["script"] == "sft"], []
    fabric = module(ROOT / "benchmarks" / "plan_models.py").FABRIC["shard"]
    for p in found:
        gathered = sum(n for key, n in p["moved"].items() if key.startswith("shard"))
        first = sum(p[k] for k in ("parameters", "gradients", "optimizer"))
        rows.append([p["model"], p["gpus"], p["replicate_size"], gb(first), gb(p["last_rank"]), gb(p["layer"]),
                     p["tokens_per_microbatch"], gb(gathered), f"{gathered / fabric:.1f}", gb(p["routed"])])
    head = "static, rank 0:", "last rank:", "a layer gathered:", "tokens:", "received:", "s:", "with routed tokens:"
    return table(("model", "GPUs:", "replicas:", *head), rows) if found else ""


PARTS = {name.removeprefix("part_"): function for name, function in list(globals().items()) if name[:5] == "part_"}


# ---- pictures --------------------------------------------------------------------------------------------------------


def curves():
    """-> {script: {metric: {seed: [(step, value)]}}}, what the picture shows."""
    return {script: {metric: {seed: [(m["step"], m[metric]) for m in metrics if metric in m]
                              for seed, _, metrics in runs}
                     for metric in ("eval/accuracy", SHOWN[script][0])}
            for script, runs in tiny().items() if script in SHOWN}


def digest(numbers):
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
        "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.8, "axes.axisbelow": True,
        "xtick.color": "#555555", "ytick.color": "#555555", "axes.labelcolor": "#333333",
        "lines.solid_capstyle": "round",
    }
    return plt


def draw_curves(shown):
    """A column per script, three beside each other: held-out accuracy, and what the script optimises."""
    wide = min(3, len(shown))
    high = -(-len(shown) // wide)
    figure = pyplot().figure(figsize=(3.3 * wide, 4.9 * high), layout="constrained")
    parts = figure.subfigures(high, squeeze=False).flat
    blocks = [part.subplots(2, wide, sharex="col", squeeze=False) for part in parts]
    columns = [column for block in blocks for column in block.T]
    for axis in blocks[-1][:, (len(shown) - 1) % wide + 1 :].flat:
        axis.set_visible(False)
    for column, (script, metrics) in zip(columns, shown.items()):
        for axis, seeds in zip(column, metrics.values()):
            color = COLORS[script]
            for points in seeds.values():
                axis.plot(*zip(*points), color=color, linewidth=0.9, alpha=0.4)
            steps = [step for step, _ in next(iter(seeds.values()))]
            average = [mean(values) for values in zip(*([v for _, v in points] for points in seeds.values()))]
            axis.plot(steps, average, color=color, linewidth=2.4)
            rising, digits = average[-1] > average[0], 4 if max(average) < 0.1 else 3
            ends = [(0, "left", not rising), (-1, "right", True)] if len(steps) < 12 else []  # labels hide noisy lines
            for at, side, above in ends:
                axis.annotate(f"{average[at]:.{digits}f}", (steps[at], average[at]), textcoords="offset points",
                              xytext=(5 if side == "left" else 0, 6 if above else -13), ha=side, color=color,
                              fontweight="bold")
            axis.margins(x=0.03, y=0.16)
        title = f"{script}.py{' (of pairs)' if script == 'reward' else ''}"
        column[0].set_title(title, color=COLORS[script], fontweight="bold", loc="left", fontsize=11)
        column[0].set_ylim(0, 1.12)
        column[0].set_yticks([0, 0.25, 0.5, 0.75, 1])
        column[1].set_ylabel(SHOWN[script][1])
        column[1].set_xlabel("optimizer step")
    for block in blocks:
        block[0][0].set_ylabel("held-out accuracy")
        for axis in block[0][1:]:
            axis.tick_params(left=False, labelleft=False)
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    return figure


def ladder_curves(name):
    """-> {rung: {script: [[trained tokens, accuracy]]}}: means over the seeds, evaluated at the same steps."""
    tools, shown = module(ROOT / "benchmarks" / "ladder.py"), {}
    for rung in tools.RUNGS:
        for script, rows in ladder(rung).items():
            if (ROOT / script).is_file() and tools.family(script) == name:
                points = zip(*(row["curve"] for row in rows))
                averages = [[mean(point[at] for point in same) for at in (TRAINED, ACCURACY)] for same in points]
                shown.setdefault(rung, {})[script] = averages
    return shown


def draw_ladder(shown):
    """A panel for each rung, a line for each script; the scripts of methods/ are thick."""
    plt = pyplot()
    size = (4.2 * len(shown) + 1.6, 3.9)
    figure, axes = plt.subplots(1, len(shown), figsize=size, sharey=True, squeeze=False, layout="constrained")
    named = sorted({script for lines in shown.values() for script in lines}, key=lambda path: (path.count("/"), path))
    looks = {script: (plt.get_cmap("tab20")(i % 20), "-" if i < 10 else "--") for i, script in enumerate(named)}
    for axis, (rung, lines) in zip(axes.flat, shown.items()):
        for script, points in lines.items():
            color, dashes = looks[script]
            stem, is_stable = Path(script).stem, "experimental" not in script
            label = f"{stem} ({JUDGED[stem]})" if stem in JUDGED else stem
            axis.plot([tokens / 1000 for tokens, _ in points], [accuracy for _, accuracy in points], label=label,
                      color=color, linestyle=dashes, linewidth=3.5 if is_stable else 1.3, zorder=2 if is_stable else 3)
        axis.set_title(f"rung {rung}", loc="left", fontsize=11)
        axis.set_xlabel("thousand trained tokens")
        axis.set_ylim(0, 1.04)
    axes.flat[0].set_ylabel("held-out accuracy")
    named = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles))
    figure.legend(named.values(), named, loc="outside right upper", frameon=False, fontsize=8.5)
    return figure


def draw_ratios(shown):
    """A line per case and part of a step: TRL over ours, medians and the range over the rounds."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9.9, 0.3 * len(shown) + 1.1), sharey=True, width_ratios=(3, 2))
    for key, label, color in ("default", "TRL's defaults", "#a8a8a8"), ("best", "TRL's best setting", "#2f6f9f"):
        for i, axis in enumerate(axes):
            points = [(y, *row[key][i]) for y, row in enumerate(shown.values()) if key in row and row[key][i]]
            for y, middle, low, high in points:
                axis.plot((low, high), (y, y), color=color, linewidth=2)
                below = key == "default"
                axis.annotate(f"{middle:.2f}", (middle, y), textcoords="offset points", ha="center", fontsize=7,
                              xytext=(0, -10 if below else 5), color=color)
            axis.plot([p[1] for p in points], [p[0] for p in points], "o", color=color, markersize=5, label=label)
    for axis, text in zip(axes, ("CPU time per useful token, TRL / ours", "memory above the model, TRL / ours")):
        axis.axvline(1, color="#888888", linewidth=1)
        axis.set_xlim(left=0)
        axis.set_xlabel(text)
    axes[0].set_yticks(range(len(shown)), list(shown))
    axes[0].set_ylim(len(shown) - 0.4, -0.8)
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    figure.tight_layout()
    return figure


def draw_growth(panels):
    """Medians, with a bar from the least to the most."""
    plt = pyplot()
    height, width = (2, 2) if len(panels) == 4 else (1, len(panels))
    figure, axes = plt.subplots(height, width, figsize=(10.2 if width == 3 else 8.4, 2.9 * height), squeeze=False)
    for axis, (x_label, y_label, shown) in zip(axes.flat, panels):
        for color, (name, points) in zip(("#2f6f9f", "#b5532a"), shown.items()):
            places, values = [x for x, _ in points], [v for _, v in points]
            middle = [median(v) for v in values]
            if name.startswith("("):
                axis.plot(places, middle, color="#888888", linewidth=1.4, linestyle="--", label=name.strip("()"))
                continue
            axis.plot(places, middle, color=color, linewidth=2.2, marker="o", markersize=4.5, label=name)
            axis.vlines(places, [min(v) for v in values], [max(v) for v in values], color=color, linewidth=1)
        if min(places) > 0:
            axis.set_xscale("log", base=2)
            axis.minorticks_off()
        axis.set_xticks(places, [f"{x / 1000:g}k" if x >= 10_000 else f"{x:.3g}" if x < 100 else f"{x:.0f}"
                                 for x in places])
        axis.set_ylim(0, 1.35 * axis.dataLim.y1)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        if len(shown) > 1:
            axis.legend(frameon=False, fontsize=8.5, loc="upper left", ncols=2, handlelength=1.4, columnspacing=1)
    figure.tight_layout(h_pad=1.4, w_pad=1.8)
    return figure


PICTURES = {"tiny_curves.png": (curves, draw_curves), "versus_trl.png": (ratios, draw_ratios)}
PICTURES |= {f"scaling_{part}.png": (partial(scaling_panels, part), draw_growth) for part in DRAWN}
PICTURES |= {f"ladder_{name}.png": (partial(ladder_curves, name), draw_ladder) for name in LADDER}


def draw(path):
    numbers, function = PICTURES[path.name]
    function(numbers()).savefig(path, dpi=130, metadata={"Description": digest(numbers()), "Software": None})


# ---- main ------------------------------------------------------------------------------------------------------------


def stale_pages(names=tuple(PARTS)):
    """-> the text of pages as it should be, by path, where one of the parts `names` is not current."""
    pages = {page: page.read_text() for page in PAGES}
    new = {page: PART.sub(lambda m: m[1] + (PARTS[m[2]]() + m[3] if m[2] in names else m[0][len(m[1]) :]), text)
           for page, text in pages.items()}
    return {page: text for page, text in new.items() if text != pages[page]}


def stale():
    """-> what is not current: the pages' text as it should be, by path, and pictures."""
    wrong = stale_pages()
    for name, (numbers, _) in PICTURES.items():
        path, shown = RESULTS / name, numbers()
        if shown and (not path.is_file() or digest(shown).encode() not in path.read_bytes()):
            wrong[path] = None
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    wrong = stale()
    for path, text in wrong.items():
        print(f"{path.relative_to(ROOT)} {'is not current: python benchmarks/plots.py' if check else 'written'}")
        if not check and text is None:
            draw(path)
        elif not check:
            path.write_text(text)
    return 1 if check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
