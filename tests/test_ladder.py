"""benchmarks/ladder.py judges a run by its floor and its time, and keeps a result while its first steps are the same;
benchmarks/real_runs.py splits, ranks and bootstraps as its docstring says. Numbers are worked by hand or from a formula
of their own; no run of a script starts."""
import json
import math
import random
import runpy
import signal
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import ladder
import real_runs

PLOTS = runpy.run_path(str(ROOT / "benchmarks" / "plots.py"))

# ---- ladder ----------------------------------------------------------------------------------------------------------


def result(script="methods/dpo.py", rung="tiny", seed=0, accuracies=(0.3, 0.9), cpu=60.0, **more):
    """A line of the results whose evaluations were 100 trained tokens apart."""
    points = [[10 * i, 100 * i, 0, 1.0 * i, accuracy] for i, accuracy in enumerate(accuracies)]
    fields = {"script": script, "rung": rung, "seed": seed, "curve": points, "cpu_seconds": cpu, "valid_for": "text"}
    return fields | {"source": "text", "first_steps": [{"step": 0, "eval/accuracy": 0.3}]} | more


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with methods/dpo.py, its child methods/experimental/child.py, and a place for results."""
    monkeypatch.setattr(ladder, "ROOT", tmp_path)
    (tmp_path / "methods" / "experimental").mkdir(parents=True)
    (tmp_path / "common").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "methods" / "dpo.py").write_text('Parent: none\nload_rows(name, args, tiny="pairs")\n')
    child = tmp_path / "methods" / "experimental" / "child.py"
    child.write_text("Parent: methods/dpo.py\n        # ---- rollout -----\n")
    return tmp_path


@pytest.mark.parametrize("before, after, seconds, passed", [
    (0.3, 0.85, 179.0, True), (0.3, 0.84, 60.0, False), (0.95, 0.95, 60.0, False), (0.3, 0.99, 180.0, False),
])
def test_a_run_passes_when_it_rose_to_its_floor_in_time(tree, before, after, seconds, passed):
    assert ladder.passes(result(accuracies=(before, after), cpu=seconds)) is passed
    child = result("methods/experimental/child.py", accuracies=(before, after), cpu=seconds)
    assert ladder.passes(child) is passed  # a script has its parent's floor
    assert ladder.passes(result(rung="hard", accuracies=(before, after), cpu=seconds))  # of which nothing is asked


def test_area():
    """Trapezoids by hand; a curve that ends early stays, and one that goes on is cut between two evaluations."""
    rising = [(0, 0.2), (100, 0.6), (200, 1.0)]
    assert ladder.area(rising, 200) == pytest.approx((100 * 0.4 + 100 * 0.8) / 200)
    assert ladder.area(rising, 400) == pytest.approx((120 + 200 * 1.0) / 400)
    assert ladder.area(rising, 150) == pytest.approx((40 + 50 * (0.6 + 0.8) / 2) / 150)
    assert ladder.area(rising, 50) == pytest.approx((0.2 + 0.4) / 2)
    assert ladder.area([(0, 0.3)], 100) == pytest.approx(0.3)
    early, late = [(0, 0.0), (10, 1.0), (100, 1.0)], [(0, 0.0), (90, 0.0), (100, 1.0)]
    assert ladder.area(early, 100) == pytest.approx(0.95) and ladder.area(late, 100) == pytest.approx(0.05)


def test_what_it_took_to_get_there():
    rising = [(0, 0.2), (100, 0.8), (200, 1.0)]
    assert ladder.reached(rising) == pytest.approx(150)  # half way from 0.8 to 1.0
    assert ladder.reached(rising, level=0.5) == pytest.approx(50)
    assert ladder.reached([(0, 0.95), (100, 0.5)]) == 0
    assert ladder.reached([(0, 0.1), (100, 0.95), (200, 0.2), (300, 0.99)]) == pytest.approx(100 * 0.8 / 0.85)
    assert ladder.reached([(0, 0.1), (100, 0.89)]) is None


def test_curve():
    """Two rollouts of 4 prompts x 8 completions of 10 tokens, and one that had to sample 6 prompts for its 4. The
    process has used 5 CPU seconds before the first evaluation, and every evaluation takes 10: they do not count."""
    metrics = [
        {"step": 0, "eval/accuracy": 0.3},
        {"step": 1, "num_tokens": 320.0, "completion_len": 10.0},
        {"step": 2, "num_tokens": 200.0, "completion_len": 10.0, "num_prompts": 6},
        {"step": 2, "eval/accuracy": 0.5},
        {"step": 3, "num_tokens": 320.0, "completion_len": 10.0},
        {"step": 3, "eval/accuracy": 0.7},
        {"step": 4, "num_tokens": 320.0, "completion_len": 10.0, "on_policy": 0.0},
        {"step": 4, "eval/accuracy": 0.8},
    ]
    stamps = [15.0, 16.5, 18.0, 28.0, 30.0, 40.0, 41.0, 51.0]
    points = ladder.curve(metrics, stamps, {"batch_size": 4, "num_generations": 8})
    assert points[:3] == [[0, 0, 0, 0.0, 0.3], [2, 520, 800, 3.0, 0.5], [3, 840, 1120, 5.0, 0.7]]
    assert points[3] == [4, 1160, 1120, 6.0, 0.8]  # this step learned from a file, or from what a teacher wrote
    offline = [{"step": 0, "eval/accuracy": 0.3}, {"step": 1, "num_tokens": 7.0}, {"step": 1, "eval/accuracy": 0.4}]
    assert ladder.curve(offline, [1.0, 2.0, 3.0], {"batch_size": 4}) == [[0, 0, 0, 0.0, 0.3], [1, 7, 0, 1.0, 0.4]]


def test_the_first_steps_are_the_same_bit_for_bit():
    """What a step cost may differ, and a new metric may come; the last bit of a number may not."""
    old = [{"step": n, "loss": 0.1 * n, "perf/seconds": 1.0} for n in range(8)]
    stored = ladder.first_steps(old)
    assert [line["step"] for line in stored] == [0, 1, 2, 3, 4, 5] and not any("perf/seconds" in x for x in stored)
    stored = json.loads(json.dumps(stored))
    slower = ladder.first_steps([line | {"perf/seconds": 9.0, "entropy": 0.5} for line in old])
    assert ladder.difference(stored, slower) == ""
    moved = [line | {"loss": math.nextafter(line["loss"], 1)} if line["step"] == 3 else line for line in old]
    assert ladder.difference(stored, moved).startswith("step 3: loss was 0.3")
    assert ladder.difference(stored, old[:4]).startswith("step 4: step was 4, is None")
    assert ladder.difference(stored, []) == "step 0: step was 0, is None"
    renamed = [{"step": line["step"], "nll": line["loss"]} for line in old]
    assert ladder.difference(stored, renamed) == "step 0: loss was 0.0, is None"


def test_a_run_is_followed_and_stopped(tree):
    """A process of its own instead of a script: it writes a line of metrics every so much CPU time."""
    (tree / "methods" / "dpo.py").write_text("""
import pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
out.mkdir()
for step in range(3):
    begun = time.process_time()
    while time.process_time() - begun < 0.1:
        pass
    with open(out / "metrics.jsonl", "a") as file:
        print('{"step": %d}' % step, file=file)
    time.sleep(0.2)
sys.exit(3)
""")
    out = Path("runs/ladder/dpo-s0")
    status, stamps, cpu = ladder.run_script("methods/dpo.py", 0, tree, out)
    assert status == 3 and len(stamps) == 3 and stamps == sorted(stamps)
    for n, stamp in enumerate(stamps, start=1):  # hundredths of a second are what the kernel counts in
        assert 0.1 * n - 0.03 <= stamp <= cpu + 0.03
    status, stamps, _ = ladder.run_script("methods/dpo.py", 0, tree, out, lines=1)
    assert status == -signal.SIGTERM and len(stamps) >= 1 and len(ladder.read_metrics(tree / out)) < 3


def test_what_decides_a_run(tree):
    """The script, and all of common/ but its pages and what Python caches."""

    def source_with(path):
        file = tree / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(path)
        return ladder.source("methods/dpo.py", tree)

    before = source_with("methods/dpo.py")
    for path in "common/README.md", "common/runtime/__pycache__/run.pyc", "methods/grpo.py":
        assert source_with(path) == before, path
    for path in "common/batches.py", "common/runtime/run.py", "common/tiny/pairs.jsonl":
        after = source_with(path)
        assert after != before, path
        before = after


def ladder_main(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["ladder.py", *argv])
    with pytest.raises(SystemExit) as e:
        ladder.main()
    return e.value.code


@pytest.mark.parametrize("failing, code", [(None, 0), ("methods/dpo.py", 1)])
def test_every_script_is_run_once(tree, monkeypatch, failing, code):
    """All scripts that are there, three seeds of each on the first rung; on the second one of an experimental script.
    One that fails does not end the others, and is tried again; one with a result is not."""
    seen = []

    def one(script, rung, seed, root):
        seen.append((rung, script, seed))
        return None if script == failing else result(script, rung, seed)

    monkeypatch.setattr(ladder, "one", one)
    monkeypatch.setattr(ladder, "root_of", lambda rung: tree)
    monkeypatch.setattr(ladder, "source", lambda script, root: "text")
    assert ladder_main(monkeypatch) == code
    both = ("methods/dpo.py", "methods/experimental/child.py")
    planned = {("tiny", script, seed) for script in both for seed in range(3)}
    planned |= {("hard", both[0], seed) for seed in range(3)} | {("hard", both[1], 0)}
    assert set(seen) == planned and len(seen) == 10
    assert [seed for _, _, seed in seen] == sorted(seed for _, _, seed in seen)  # all have one seed before any has two
    seen.clear()
    ladder_main(monkeypatch)
    assert len(seen) == (6 if failing else 0) and {script for _, script, _ in seen} <= {failing}


@pytest.mark.parametrize("where", ["", "step 3: loss was 1, is 2"])
def test_a_new_text_voids_a_result_only_when_its_first_steps_differ(tree, monkeypatch, capsys, where):
    tried, run = [], []
    monkeypatch.setattr(ladder, "root_of", lambda rung: tree)
    monkeypatch.setattr(ladder, "source", lambda script, root: "another text")
    monkeypatch.setattr(ladder, "verify", lambda row, root: tried.append(row["seed"]) or where)
    monkeypatch.setattr(ladder, "one", lambda *where: run.append(where[2]) or result(seed=where[2], valid_for="new"))
    ladder.write_results({ladder.key(row): row for row in (result(seed=0), result(seed=1), result(seed=2))})
    assert ladder_main(monkeypatch, "--verify", "--rung", "tiny", "dpo") == (1 if where else 0)
    assert tried == [0] and ("NOT valid" in capsys.readouterr().out) == bool(where) and not run
    valid = {row["valid_for"] for row in ladder.read_results().values()}
    assert valid == ({""} if where else {"another text"})
    assert {row["source"] for row in ladder.read_results().values()} == {"text"}  # what made it
    ladder_main(monkeypatch, "--rung", "tiny", "dpo")
    assert run == ([0, 1, 2] if where else [])


def test_families_and_parents(tree):
    assert ladder.family("methods/dpo.py") == "preference" and ladder.parent("methods/dpo.py") is None
    child = "methods/experimental/child.py"
    assert ladder.family(child) == "online" and ladder.parent(child) == "methods/dpo.py"
    assert ladder.scripts() == ["methods/dpo.py", child]


def test_a_child_of_distillation_is_compared_with_it(tree):
    (tree / "methods" / "distillation.py").write_text("Parent: none\n")
    (tree / "methods" / "experimental" / "gkd.py").write_text("Parent: methods/distillation.py\n")
    assert ladder.family("methods/experimental/gkd.py") == "distillation"


def test_every_stable_script_has_a_floor():
    assert set(ladder.FLOORS) >= {p.stem for p in (ROOT / "methods").glob("*.py")}


@pytest.mark.parametrize("path", ladder.scripts())
def test_results(path):
    """A stable script has three seeds on the first rung that passed. Whatever has a result keeps to the form."""
    rows = [row for (_, script, _), row in sorted(ladder.read_results().items()) if script == path]
    if Path(path).parent.name == "methods":
        assert [row["seed"] for row in rows if row["rung"] == "tiny" and ladder.passes(row)] == [0, 1, 2]
    family = ladder.family(path)
    assert family in PLOTS["LADDER"] and ladder.floor(path)
    for row in rows:
        steps, trained, sampled, cpu, accuracies = zip(*row["curve"])
        assert all(list(part) == sorted(part) and part[0] == 0 for part in (steps, trained, sampled))
        assert all(0 <= accuracy <= 1 for accuracy in accuracies)
        assert (sampled[-1] > 0) == (family in ("online", "distillation"))
        if row["cpu_seconds"]:
            assert list(cpu) == sorted(cpu) and cpu[0] == 0 and cpu[-1] < row["cpu_seconds"]
        assert {line["step"] for line in row["first_steps"]} == set(range(6))
        assert row["versions"]["threads"] == 1 and row["valid_for"]


@pytest.mark.parametrize("rung", ladder.RUNGS)
def test_all_start_from_the_same_model(rung):
    """But for scores, whose heads are drawn by the seed; rows with a privileged context ask in words that the model
    does not know. 0.01: two of 200 answers may turn on a rounding."""
    starts, privileged = [], []
    for (at, script, _), row in ladder.read_results().items():
        if at == rung and Path(script).stem not in PLOTS["JUDGED"]:
            found = privileged if "tiny:privileged" in row["command"] else starts
            found.append(row["curve"][0][4])
    assert max(starts) - min(starts) <= 0.01 and min(starts) > 0
    assert privileged and max(privileged) <= 0.01


# ---- real runs -------------------------------------------------------------------------------------------------------


def solution(text, right):
    return {"solution": f"{text}<<1+1=2>>", "is_correct": right}


def test_split_by_question():
    """600 questions with two right and two wrong solutions: the shortest 560 are used. 50 more have no wrong one."""
    rows = [{"question": f"{n:03} {'x' * n}"} | {f"m{k}": solution(f"{n:03} {k}", k < 2) for k in range(4)}
            for n in range(600)]
    rows += [{"question": f"easy {n}", "m0": solution("right", True)} for n in range(50)]
    train, heldout = real_runs.ranking(rows)
    questions = [{int(row["prompt"][0]["content"][:3]) for row in part} for part in (train, heldout)]
    assert len(train) == len(questions[0]) == 360 and len(questions[1]) == 200 and len(heldout) == 200 * 4
    assert set.union(*questions) == set(range(560)) and not set.intersection(*questions)
    for row in train + heldout:
        assert all(row[name][0]["content"][:3] == row["prompt"][0]["content"][:3] for name in ("chosen", "rejected"))
        assert row["chosen"][0]["content"][4:] in "01" and row["rejected"][0]["content"][4:] in "23"
    assert len({str(row) for row in heldout}) == len(heldout)
    assert {row["chosen"][0]["content"][4:] for row in train} == {"0", "1"}  # drawn, not always the first
    assert real_runs.ranking(rows) == (train, heldout)

    labelled = real_runs.unpaired(train)
    pairs = {(row["prompt"][0]["content"], row["completion"][0]["content"], row["label"]) for row in labelled}
    wanted = {(row["prompt"][0]["content"], row[name][0]["content"], name == "chosen")
              for row in train for name in ("chosen", "rejected")}
    assert pairs == wanted and len(labelled) == 720


def test_pair_accuracy():
    """Question a: right, wrong and a tie; question b: wrong. Their mean counts questions, not pairs."""
    texts = [("a", "r", "w1"), ("b", "r", "w1"), ("a", "r", "w2"), ("a", "r", "w3")]
    scores = {("a", "r"): 1.0, ("a", "w1"): 0.5, ("a", "w2"): 2.0, ("a", "w3"): 1.0, ("b", "r"): 0.0, ("b", "w1"): 9.0}
    assert real_runs.pair_accuracy(scores, texts) == [(1 + 0 + 0.5) / 3, 0.0]


def test_bootstrap():
    """Against the normal approximation, which 400 draws of a normal variable follow to a few percent of a standard
    error; 10,000 draws leave about 3 % of one in either end."""
    draw = random.Random(0)
    values = [draw.gauss(2.0, 5.0) for _ in range(400)]
    mean = sum(values) / 400
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 400 / 400)
    low, high = real_runs.bootstrap(values)
    assert abs(low - (mean - 1.96 * error)) < 0.1 * error and abs(high - (mean + 1.96 * error)) < 0.1 * error


def test_bag_of_words():
    """Ten pairs that differ in one word each way: the optimum of 10 log(1 + exp(-2 w log 2)) + w^2, weights w and -w,
    by bisection. Words of one solution only have no weight; order and case do not matter.
    1e-4: L-BFGS ends where a step changes the loss by less than 1e-9, hence w by the root of that."""
    rows = [real_runs.preference("q", f"Good word, only{n}", f"word bad, rare{n}") for n in "abcdefghij"]
    low, high = 0.0, 100.0
    for _ in range(80):
        w = (low + high) / 2
        slope = 2 * w - 10 * 2 * math.log(2) / (1 + math.exp(2 * w * math.log(2)))
        low, high = (w, high) if slope < 0 else (low, w)
    heldout = [real_runs.preference("p", "good 3 onlyb", "BAD, rarea"), real_runs.preference("p", "good good", "3")]
    scores = real_runs.bag_of_words(rows, heldout)
    assert scores["p", "good 3 onlyb"] == pytest.approx(w * math.log(2), rel=1e-4)
    assert scores["p", "BAD, rarea"] == pytest.approx(-w * math.log(2), rel=1e-4)  # the comma is in both of a pair
    assert scores["p", "good good"] == pytest.approx(w * math.log(3), rel=1e-4) and scores["p", "3"] == 0
    assert len(scores) == 4


def test_scores_are_the_classifiers_own():
    """Each solution alone, as plain tokens through the classifier itself: shared prompts change nothing."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = ROOT / "common" / "tiny" / "model"
    rows = [real_runs.preference("What is 1 + 2?", "1+2=3 #### 3", "1+2=4 #### 4"),
            real_runs.preference("What is 5 + 2?", "5+2=7 #### 7", "#### 9"),
            real_runs.preference("What is 1 + 2?", "1+2=3 #### 3", "#### 12")]
    torch.manual_seed(0)  # of the head
    scores = real_runs.reward_model_scores(folder, rows)
    torch.manual_seed(0)
    lm = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [["1+2=3 #### 3", "1+2=4 #### 4", "#### 12"], ["5+2=7 #### 7", "#### 9"]]
    assert list(scores) == [(f"What is {n} + 2?", text) for n, own in zip((1, 5), texts) for text in own]
    for (question, text), score in scores.items():
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        last = len(ids) - 1 - ids[::-1].index(tokenizer.eos_token_id)
        with torch.no_grad():
            hidden = lm.model(torch.tensor([ids[: last + 1]])).last_hidden_state[0, -1]
        assert score == pytest.approx((hidden @ lm.score.weight[0]).item(), abs=1e-5)
