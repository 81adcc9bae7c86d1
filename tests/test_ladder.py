"""benchmarks/ladder.py judges a run by its floor and its time; benchmarks/real_runs.py splits, ranks and bootstraps as
its docstring says. Numbers are worked by hand or from a formula of their own; no run starts."""
import json
import math
import random
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import ladder
import real_runs

# ---- ladder ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """-> judge(before, after, seconds): what `one` says of a finished run of dpo.py with these figures."""
    monkeypatch.setattr(ladder, "ROOT", tmp_path)
    monkeypatch.setattr(ladder, "source", lambda script: "text")

    def judge(before, after, seconds):
        (tmp_path / "dpo-s0" / "final").mkdir(parents=True, exist_ok=True)
        run = {"before": {"eval/accuracy": before}, "last": {"eval/accuracy": after}, "alerts": {}}
        (tmp_path / "dpo-s0" / "run.json").write_text(json.dumps(run))
        (tmp_path / "dpo-s0" / "metrics.jsonl").write_text('{"step": 60}\n')
        (tmp_path / "dpo-s0.json").write_text(json.dumps({"source": "text", "seconds": seconds}))
        passed = ladder.one("dpo", 0, tmp_path)
        verdict = json.loads((tmp_path / "benchmarks/results/tiny-dpo-s0/ladder.json").read_text())
        assert verdict == {"floor": 0.85, "wall_seconds": seconds, "wall_limit": 180, "passed": passed}
        return passed

    return judge


@pytest.mark.parametrize("before, after, seconds, passed", [
    (0.3, 0.85, 179.0, True), (0.3, 0.84, 60.0, False), (0.95, 0.95, 60.0, False), (0.3, 0.99, 180.0, False),
])
def test_a_run_passes_when_it_rose_to_its_floor_in_time(finished, before, after, seconds, passed):
    assert finished(before, after, seconds) is passed


def test_a_run_of_an_older_text_is_made_again_and_a_failed_one_does_not_pass(finished, tmp_path, monkeypatch, capsys):
    finished(0.3, 0.99, 60.0)
    monkeypatch.setattr(ladder, "source", lambda script: "another text")
    monkeypatch.setattr(ladder.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=3))
    assert ladder.one("dpo", 0, tmp_path) is False and not (tmp_path / "dpo-s0").exists()
    assert "FAIL: exit code 3" in capsys.readouterr().out


def test_what_decides_a_run(monkeypatch, tmp_path):
    """The script, and all of common/ but its pages and what Python caches."""
    monkeypatch.setattr(ladder, "ROOT", tmp_path)

    def source_with(path):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(path)
        return ladder.source("dpo")

    before = source_with("methods/dpo.py")
    for path in "common/README.md", "common/runtime/__pycache__/run.pyc", "methods/grpo.py":
        assert source_with(path) == before, path
    for path in "common/batches.py", "common/runtime/run.py", "common/tiny/pairs.jsonl":
        after = source_with(path)
        assert after != before, path
        before = after


@pytest.mark.parametrize("failing, code", [(None, 0), ("kto", 1)])
def test_exit_code(monkeypatch, tmp_path, failing, code):
    seen = []
    monkeypatch.setattr(ladder, "one", lambda script, seed, work: seen.append((script, seed)) or script != failing)
    monkeypatch.setattr(sys, "argv", ["ladder.py", "--work", str(tmp_path)])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as e:
        ladder.main()
    assert e.value.code == code and len(set(seen)) == 6 * 3  # all run, whatever one of them does


def test_every_stable_script_has_a_floor():
    assert set(ladder.FLOORS) == {p.stem for p in (ROOT / "methods").glob("*.py")}


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
