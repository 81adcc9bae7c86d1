"""benchmarks/versus_trl.py without TRL: its arithmetic against numbers worked by hand, and what it does where TRL is
missing, disagrees, dies or takes too long. TRL and our scripts are played by fakes, one per process."""
import copy
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, script

sys.path.insert(0, str(ROOT / "benchmarks"))
import trl_parity as parity  # noqa: E402
import trl_worker as worker  # noqa: E402
import versus_trl as versus  # noqa: E402

SHAPE = {"body": 10, "head": 7, "layers": 2, "width": 3, "parameters": 2**20}
GROUPS = [(2, [1, 3])]  # a prompt of 2 tokens, completions of 1 and 3
MACHINE = {"flops": 100.0, "bandwidth": 40.0, "imports_mb": 100.0}


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_useful_tokens():
    assert versus.useful_tokens(GROUPS) == (2 + 1) + (2 + 3)  # the prompt counts for every sequence


def test_forward_flops():
    """Token by token: 6 tokens in the body, 4 scored, and 1+2, 3 and 3+4+5 pairs in attention."""
    assert versus.forward_flops(GROUPS, SHAPE) == 2 * 10 * 6 + 2 * 7 * 4 + 4 * 2 * 3 * (1 + 2 + 3 + 3 + 4 + 5) == 608


def test_three_forwards_are_the_usual_formula():
    """6 N + 6 L H d S per token (prompt 1, all else a completion): exact but for the diagonal, 1 in S."""
    size = 4000
    usual = size * (6 * 17 + 6 * 2 * 3 * size)
    assert 3 * versus.forward_flops([(0, [size])], SHAPE) == pytest.approx(usual, rel=2 / size)


def test_limits():
    """608 operations at 100 a second: 6.08 s a forward; 3 decoded tokens read 4 x 17 bytes each at 40 a second: 5.1."""
    assert versus.limits(GROUPS, 3, False, SHAPE, MACHINE) == (pytest.approx(3 * 6.08), 0)
    assert versus.limits(GROUPS, 3, True, SHAPE, MACHINE) == (pytest.approx(4 * 6.08), pytest.approx(6.08))
    slow = MACHINE | {"bandwidth": 20.0}
    assert versus.limits(GROUPS, 3, True, SHAPE, slow) == (pytest.approx(3 * 6.08 + 10.2), pytest.approx(10.2))


def test_measure_leaves_out_the_warm_up_and_charges_the_reference():
    """Steps 2 and 3 of 3 are timed, from 10 s to 16 s; a reference pass of 3 s before step 1 is 1 s for each step."""
    case = {"method": "dpo", "steps": 3, "warm": 1, "batch": 1}
    run = {"at": {1: (10.0, 5.0), 3: (16.0, 9.0)}, "steps": [{}] * 3}
    run["events"] = [["precompute", 1.0, 3.0, 1.5], ["logprobs", 9.5, 0.4, 0.4], ["logprobs", 11.0, 1.0, 0.8]]
    row = versus.measure(run, case, [(9, [9, 9]), (2, [1, 3]), (4, [2, 2])], SHAPE, MACHINE)
    assert row["seconds_per_step"] == 3.0 + 1.0 and row["cpu_seconds_per_step"] == 2.0 + 0.5
    assert row["tokens_per_step"] == (3 + 5 + 6 + 6) / 2 and row["completion_tokens_per_step"] == (4 + 4) / 2
    assert row["parts"] == {"precompute": (1.0, 0.5), "logprobs": (0.5, 0.4)}
    second = 2 * 10 * 8 + 2 * 7 * 4 + 4 * 2 * 3 * (1 + 2 + 3 + 4 + 2 * (5 + 6))
    assert row["limit_seconds"] == [pytest.approx(4 * (608 + second) / 100 / 2), 0]


def test_the_reference_of_kto_sees_two_completions_of_a_prompt():
    """Rows (2, 1) and (3, 2) tokens: 218 and 488 operations, four times; with a neighbour's completion 454, 618."""
    case = {"method": "kto", "steps": 2, "warm": 1, "batch": 2}
    run = {"at": {1: (0.0, 0.0), 2: (1.0, 1.0)}, "steps": [{}] * 2, "events": []}
    row = versus.measure(run, case, [(9, [9]), (9, [9]), (2, [1]), (3, [2])], SHAPE, MACHINE)
    assert row["limit_seconds"] == [pytest.approx((4 * (218 + 488) + 454 + 618) / 100), 0]
    assert row["tokens_per_step"] == 2 + 1 + 3 + 2  # mismatched pairs train nothing


def test_the_teacher_of_distillation_goes_forward_once():
    """Rows of 218 and 488 operations, three times; the teacher's layers are twice as many, of twice as many weights."""
    case = {"method": "distillation", "steps": 2, "warm": 1, "batch": 2}
    run = {"at": {1: (0.0, 0.0), 2: (1.0, 1.0)}, "steps": [{}] * 2, "events": []}
    shape = SHAPE | {"teacher": {"body": 20, "head": 7, "layers": 4, "width": 3, "parameters": 2**21}}
    row = versus.measure(run, case, [(9, [9]), (9, [9]), (2, [1]), (3, [2])], shape, MACHINE)
    teacher = 2 * 20 * (3 + 5) + 2 * 7 * (1 + 2) + 4 * 4 * 3 * (1 + 2 + 3 + 1 + 2 + 3 + 4 + 5)
    assert row["limit_seconds"] == [pytest.approx((3 * (218 + 488) + teacher) / 100), 0]


def test_a_reward_model_has_no_head(tmp_path):
    path = ROOT / "common" / "tiny" / "model" / "config.json"
    config = json.loads(path.read_text())
    lm = versus.shape({"model": str(path.parent)})
    assert lm["head"] == config["vocab_size"] * config["hidden_size"]
    scorer = config | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (tmp_path / "config.json").write_text(json.dumps(scorer))
    found = versus.shape({"model": str(tmp_path)})
    assert found["head"] == 0 and found["body"] == lm["body"] + config["hidden_size"]  # the score of every token


@pytest.mark.parametrize("key", ["completion_len", "completions/mean_length"])
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_measure_takes_sampled_lengths_from_the_log(method, key):
    case = {"method": method, "rows": "tiny", "steps": 2, "warm": 1, "batch": 2, "micro": 1}
    case["flags"] = {"num_generations": 4}
    run = {"at": {1: (0.0, 0.0), 2: (8.0, 8.0)}, "steps": [{key: 99.0}, {key: 2.5}]}
    run["events"] = [["rollout", 1.0, 3.0, 2.0], ["reward", 4.0, 0.5, 0.5]]
    row = versus.measure(run, case, [(9, []), (9, []), (3, []), (5, [])], SHAPE, MACHINE)
    assert row["tokens_per_step"] == 4 * (3 + 2.5) + 4 * (5 + 2.5) and row["completion_tokens_per_step"] == 8 * 2.5
    found = versus.views(row)
    assert found["rollout only"][:3] == (3.0, 2.0, 20.0) and found["update only"][:3] == (4.5, 5.5, 52.0)


def run_row(side, number, seconds, tokens=10.0, **more):
    row = {"case": "sft-short", "side": side, "round": number, "seconds_per_step": 2 * seconds, "parts": {}}
    row |= {"cpu_seconds_per_step": seconds, "tokens_per_step": tokens, "limit_seconds": [1.0, 0.0]}
    return row | {"peak_mb": 300.0, "above_mb": 50.0, "process_seconds": 9.0} | more


def test_summary_divides_within_rounds_per_useful_token():
    rows = [{"case": "sft-short", "command": "x"}, {"case": "sft-short", "side": "search: TRL best"}]
    for number, (mine, default, best) in enumerate([(1.0, 6.0, 2.0), (2.0, 8.0, 3.0)], 1):
        rows.append(run_row("ours", number, mine))
        rows.append(run_row("ours, lean", number, 2 * mine, above_mb=25.0))
        rows.append(run_row("TRL default", number, default, tokens=20.0, above_mb=150.0))
        rows.append(run_row("TRL best", number, best, setting={"gradient_checkpointing": False}, above_mb=200.0))
        rows.append(run_row("TRL lean", number, 9.0, above_mb=75.0))
    default, best, leanest, lean, both = versus.summary(rows)
    assert default["cpu"] == pytest.approx([3.0, 2.0]) == default["wall"]  # (6 / 20) / (1 / 10), (8 / 20) / (2 / 10)
    assert best["cpu"] == pytest.approx([2.0, 1.5]) and best["best"] and not default["best"]
    assert versus.above_ratio(best) == [4.0, 4.0] and best["tokens"][0] == [5.0, 2.5]
    assert best["tokens"][1] == pytest.approx([2.5, 10 / 6])
    assert best["share"][0] == [0.5, 0.25] and best["share"][1] == pytest.approx([0.25, 1 / 6])
    text = versus.table(rows).splitlines()
    assert lean["cpu"] == pytest.approx([1.0, 0.75]) and lean["best"] and versus.above_ratio(lean) == [8.0, 8.0]
    assert lean["view"] == "lean" and lean["setting"] == best["setting"] and "| sft-short lean |" in text[5]
    assert both["cpu"] == pytest.approx([4.5, 2.25]) and not both["best"] and versus.above_ratio(both) == [3.0, 3.0]
    assert leanest["cpu"] == pytest.approx([9.0, 4.5]) and versus.above_ratio(leanest) == [1.5, 1.5]
    assert len(text) == 7 and "| 1.75 (1.50-2.00) |" in text[3] and "best: no checkpointing" in text[3]


@pytest.mark.parametrize("name", [name for name, case in versus.CASES.items() if case["method"] != "head"])
def test_every_candidate_takes_the_whole_step(name):
    case = versus.CASES[name]
    sides = versus.candidates(case, True)
    assert set(sides) <= {"TRL best", "TRL lean", "TRL best, precomputed"} and 1 <= case["warm"] <= case["steps"] - 3
    for setting in [{}, *(s for settings in sides.values() for s in settings)]:
        config = versus.config_of(case) | setting
        rows = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
        assert rows == case["batch"] * config.get("num_generations", 1)
    assert "gradient_checkpointing" not in versus.config_of(case) and "model" not in versus.config_of(case)


def test_timed_functions_exist():
    """A part whose function was renamed would silently become a part of the update."""
    for method, about in versus.METHODS.items():
        for function in about["parts"]:
            owner, name = versus.timed_function(script(method), function)
            assert callable(getattr(owner, name)), (method, function)
            if "." not in function:  # main and what it calls ask the script for it
                text = (ROOT / "methods" / f"{method}.py").read_text()
                assert re.search(rf"^ .*\b{name}\(", text, re.M), (method, function)


# ---- whole runs, with fakes ------------------------------------------------------------------------------------------


ALL = "ours", versus.LEAN, "TRL default", "TRL best", "TRL lean"


def both_names(**more):
    """A logged step that has what either side's would have."""
    names = [name for metric in parity.COMPARED["grpo"] for name in metric[:2]]
    return dict.fromkeys(names, 1.0) | {"completion_len": 4.0, "completions/mean_length": 4.0} | more


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Two small cases whose processes are played by `launch` below. -> what a test may change."""
    case = {"method": "sft", "rows": "tiny", "micro": 64, "batch": 2, "steps": 4, "warm": 1}
    monkeypatch.setattr(versus, "CASES", {"first": case, "second": copy.deepcopy(case)})
    monkeypatch.setattr(versus, "FILE", tmp_path / "versus_trl.jsonl")
    losses = [3.0, 2.0, 1.5, 1.2]
    play = SimpleNamespace(losses=losses, trl=lambda config: losses, file=versus.FILE, specs=[], ours=[], asked=[])
    play.lean = 0.0  # what our lean run's losses differ by

    def launch(command, options, what):
        command = [str(word) for word in command]
        at = {step: (float(step), 0.5 * step) for step in range(1, 5)}
        run = {"wall": 9.0, "peak_mb": 900.0, "process_mb": 950.0, "at": at}
        if "--worker" in command:
            mode, path = command[-2:]
            spec = json.loads(open(path).read())
            play.asked.append(spec)
            known = {"shape": SHAPE, "machine": MACHINE, "lengths": [(5, [4])] * 12}
            known = {"prepare": None, "classifier": None, "facts": known}
            open(spec["result"], "w").write(json.dumps(known[mode]))
        elif "--output_dir" in command:
            play.ours.append(command)
            folder = parity.Path(command[command.index("--output_dir") + 1])
            folder.mkdir(parents=True)
            steps = play.losses[: int(command[command.index("--max_steps") + 1])]
            steps = [x + play.lean * ("--activation_checkpointing" in command) for x in steps]
            parity.write(folder / "metrics.jsonl", [both_names(loss=x) for x in steps])
            (folder / "run.json").write_text(json.dumps({"versions": {"torch": "x"}}))
            if "--script" in command:
                open(command[command.index("--script") + 2], "w").write("[]")
        else:
            spec = json.loads(open(command[-1]).read())
            play.specs.append(spec)
            result, times = {"versions": {"trl": parity.TRL}}, {step: (2 * a, 2 * b) for step, (a, b) in at.items()}
            for setting in spec.get("search", []):
                answer = play.trl(spec["config"] | setting)
                steps = answer if isinstance(answer, dict) else {"steps": [both_names(loss=x) for x in answer]}
                result.setdefault("search", []).append({"at": times, "events": []} | steps)
                open(spec["result"], "w").write(json.dumps(result))
            if "search" not in spec:
                steps = play.trl(spec["config"])[: spec["config"]["max_steps"]]
                result |= {"steps": [both_names(loss=x) for x in steps], "events": []}
                open(spec["result"], "w").write(json.dumps(result))
            run["at"] = times
        return run

    monkeypatch.setattr(parity, "launch", launch)
    monkeypatch.setattr(parity, "check_trl", lambda options: None)
    return play


def test_rows_of_a_finished_case_replace_its_old_ones(fake):
    parity.write(fake.file, [{"case": "first", "old": True}, {"case": "second", "old": True}])
    assert versus.main(["--rounds", "2", "--only", "second"]) == 0
    rows = parity.read(fake.file)
    assert rows[0] == {"case": "first", "old": True} and not any("old" in row for row in rows[1:])
    sides = [(row["side"], row["round"]) for row in rows if "round" in row]
    assert sides == [(side, n) for n in (1, 2) for side in ALL]  # by turns
    searched = [row for row in rows if row.get("side", "").startswith("search")]
    assert len(searched) == 2 + len(versus.candidates(versus.CASES["second"])["TRL best"])
    assert all(line["cpu"] == [2.0, 2.0] for line in versus.summary(rows[1:]))
    assert {"command", "sha256", "git", "device", "machine", "versions", "work"} <= rows[1].keys()


def test_losses_that_disagree_stop_a_case_and_leave_its_old_rows(fake, capsys):
    """TRL's second loss differs in the first case only (batch 3)."""
    versus.CASES["first"]["batch"] = 3
    fake.trl = lambda config: [3.0, 2.0 + 1e-3 * (config["per_device_train_batch_size"] == 3), 1.5, 1.2]
    parity.write(fake.file, [{"case": "first", "old": True}])
    assert versus.main(["--rounds", "1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: first: TRL default: the losses") and "no ratio" in err
    rows = parity.read(fake.file)
    assert [row for row in rows if row["case"] == "first"] == [{"case": "first", "old": True}]
    assert sum(row["case"] == "second" for row in rows) > 5


def test_losses_are_compared_in_every_round(fake, capsys):
    count = len(versus.candidates(versus.CASES["first"])["TRL best"]) + 1
    calls = iter([fake.losses] * (count + 1) + [[float("nan")] * 4] * 99)  # the first run of the rounds, then NaN
    fake.trl = lambda config: next(calls)
    assert versus.main(["--only", "first", "--rounds", "1"]) == 2
    assert "not the same work" in capsys.readouterr().err and not fake.file.exists()


def test_our_lean_run_must_agree_too(fake, capsys):
    fake.lean = 1e-3
    assert versus.main(["--only", "first", "--rounds", "1"]) == 2
    assert "not the same work" in capsys.readouterr().err and not fake.file.exists()


def test_a_candidate_that_fails_or_disagrees_is_not_the_best(fake):
    def play(config):
        if config.get("padding_free"):
            return {"error": "ValueError: no"}
        return [9.0] * 4 if "model_init_kwargs" in config else fake.losses

    fake.trl = play
    assert versus.main(["--only", "first", "--rounds", "1"]) == 0
    rows = parity.read(fake.file)
    wrong = [row for row in rows if row.get("error")]
    assert [row["error"] for row in wrong if "padding_free" in row["setting"]] == ["ValueError: no"] * 2
    best = next(row["setting"] for row in rows if row.get("side") == "TRL best")
    assert "padding_free" not in best and "model_init_kwargs" not in best


def test_kto_has_all_rows_at_once_and_backwards(fake):
    """TRL has a kl for each micro-batch, and takes the completion of the row before where we take that of the next."""
    versus.CASES["first"] |= {"method": "kto"}
    assert versus.main(["--only", "first", "--rounds", "1"]) == 0
    order = next(spec for spec in fake.asked if "slices" in spec)
    assert order["reverse"] and order["slices"] == [[2 * step, 2] for step in range(4)]
    assert all(spec["config"]["per_device_train_batch_size"] == 2 for spec in fake.specs)
    sides = {row.get("side") for row in parity.read(fake.file)}
    assert {*ALL, "TRL best, precomputed"} <= sides


def test_reward_models_begin_with_one_head(fake):
    """Both sides are handed the same classifier; a language model's head would be made at random, twice."""
    versus.CASES["first"] |= {"method": "reward"}
    assert versus.main(["--only", "first", "--rounds", "1"]) == 0
    made = next(spec for spec in fake.asked if str(spec.get("to", "")).endswith("classifier"))
    assert made["model"] == str(parity.TINY / "model")
    assert {spec["model"] for spec in fake.specs} == {made["to"]}
    assert all(command[command.index("--model") + 1] == made["to"] for command in fake.ours)


def test_distillation_has_a_teacher_on_both_sides(fake, monkeypatch):
    """Its weights are no memory above the models: 16 bytes for each of 1 Mi parameters, and 4 for each of its 3 Mi."""
    case = {"method": "distillation", "rows": "long", "micro": 64, "batch": 2, "steps": 4, "warm": 1}
    versus.CASES["first"] |= case
    teacher = SHAPE | {"parameters": 3 * 2**20}
    play = versus.here

    def here(mode, spec, options, **more):
        if mode == "lab":
            folder = parity.Path(spec["to"])
            (folder / "long").mkdir(parents=True)
            return parity.write(folder / "long" / "demonstrations.jsonl", [{}] * 128)
        answer = play(mode, spec, options, **more)
        fake.teachers.append(spec["teacher"])
        return answer | {"shape": answer["shape"] | {"teacher": teacher}}

    fake.teachers = []
    monkeypatch.setattr(versus, "here", here)
    assert versus.main(["--only", "first", "--rounds", "1"]) == 0
    row = next(row for row in parity.read(fake.file) if row.get("side") == "ours")
    assert row["above_mb"] == 900 - 16 - 4 * 3 - MACHINE["imports_mb"]
    fake.teachers += [spec["teacher"] for spec in fake.specs]
    for command in fake.ours:
        assert command[command.index("--lmbda") + 1] == "0"
        fake.teachers.append(command[command.index("--teacher") + 1])
    assert len(fake.teachers) > 5 and len(set(fake.teachers)) == 1
    assert all(not {"lmbda", "teacher", "max_length"} & spec["config"].keys() for spec in fake.specs)


def test_the_completions_that_trl_is_handed():
    """Of the next rows, as the template has them after the prompt."""
    tokenizer = SimpleNamespace(apply_chat_template=lambda chat, return_dict: {"input_ids": [*"".join(chat)]})
    rows = [{"prompt": [prompt], "completion": [text]} for prompt, text in (("ab", "cd"), ("e", "fgh"), ("i", "j"))]
    written, trainer = worker.given_completions(rows), SimpleNamespace(_tokenizer=tokenizer)
    assert written(trainer, [["a", "b"], ["e"]], None, {}) == [["c", "d"], ["f", "g", "h"]]
    assert written(trainer, [["i"]], None, {}) == [["j"]]
    with pytest.raises(AssertionError, match="how the whole row begins"):
        worker.given_completions(rows)(trainer, [["x"]], None, {})


def test_orpos_first_term():
    """The mean over pairs of - log P(chosen), whatever TRL's was."""
    found = torch.tensor([-1.0, -4.0]), torch.tensor([-2.0, -3.0]), "logits", "logits", 9.0
    answer = worker.with_our_first_term(lambda trainer, model, batch: found)(None, None, {})
    assert answer[:4] == found[:4] and answer[4].item() == 2.5


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_sampling_methods_are_compared_on_our_completions(method, fake, capsys):
    """TRL replays three updates of ours, by its defaults and by its best; a candidate with other losses is not it."""
    case = {"method": method, "rows": "tiny", "micro": 64, "batch": 2, "steps": 4, "warm": 1}
    versus.CASES["first"] = case | {"flags": {"num_generations": 4, "max_completion_length": 8}}
    fake.trl = lambda config: fake.losses if config["max_steps"] == 3 else [9.0] * 4  # of completions of its own
    assert versus.main(["--only", "first", "--rounds", "1"]) == 0
    replays = [spec for spec in fake.specs if "replay" in spec]
    assert len(replays) == 3 and all(spec["config"]["max_steps"] == 3 for spec in replays)
    foreign = {*parity.OURS, "reward", "output_dir", "method", *(["loss_type"] if method == "rloo" else [])}
    assert all(not foreign & spec["config"].keys() and spec["config"]["num_generations"] == 4 for spec in fake.specs)
    assert len(fake.ours) == 3 and all(c[c.index("--reward") + 1].endswith(":even_digits") for c in fake.ours)
    kept = fake.file.read_text()
    fake.trl = lambda config: [x + 1e-3 for x in fake.losses]
    assert versus.main(["--only", "first", "--rounds", "1"]) == 2
    assert f"error: first: TRL default: {method}: loss differs at step 1" in capsys.readouterr().err
    assert fake.file.read_text() == kept


def test_a_search_goes_on_after_the_candidate_that_ended_its_process(fake, monkeypatch):
    real, calls = parity.launch, []

    def launch(command, options, what):
        spec = json.loads(open(command[-1]).read()) if "--script" not in command else {}
        calls.append(spec.get("search"))
        real(command, options, what)
        result = parity.Path(spec["result"])
        if len(spec["search"]) > 1:  # two are done, the third takes the process with it
            result.write_text(json.dumps({"search": json.loads(result.read_text())["search"][:2]}))
            raise parity.Problem("TRL's sft was killed: out of memory?")
        return {"wall": 1.0, "peak_mb": 1.0, "process_mb": 1.0, "at": {}}

    monkeypatch.setattr(parity, "launch", launch)
    options = SimpleNamespace(scratch=fake.file.parent, trl_python="x", threads=1, limit=60)
    settings = [{"per_device_train_batch_size": n} for n in range(4)]
    found = versus.search(versus.CASES["first"], {"config": {}}, settings, options)
    assert [run.get("error", "") for run in found] == ["", "", "TRL's sft was killed: out of memory?", ""]
    assert calls == [settings, settings[3:]]


def test_nothing_is_written_where_the_scripts_changed(fake, monkeypatch, capsys):
    numbers = iter(range(99))
    monkeypatch.setattr(parity, "about", lambda command, threads: {"command": command, "number": next(numbers)})
    assert versus.main(["--only", "first", "--rounds", "1"]) == 2
    assert "the scripts changed" in capsys.readouterr().err and not fake.file.exists()


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, words", [
    ("#!/bin/sh\necho 1.15.0\n", "--trl_python has TRL 1.15.0, 1.16.0 is wanted"),
    ("#!/bin/sh\nexit 1\n", "--trl_python has no TRL, 1.16.0 is wanted"),
    (None, "No such file or directory"),
])  # fmt: skip
def test_a_python_without_the_right_trl(text, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(versus, "FILE", tmp_path / "versus_trl.jsonl")
    python = tmp_path / "python"
    if text:
        python.write_text(text)
        python.chmod(0o755)
    assert versus.main(["--trl_python", str(python)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err and not out
    assert not versus.FILE.exists()


def test_no_python_is_named(capsys):
    assert versus.main([]) == 2 and "--trl_python PATH is missing" in capsys.readouterr().err


@pytest.mark.parametrize("code, limit, words", [
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 60, "was killed: out of memory?"),
    ("import time; time.sleep(60)", 0.5, "was killed: it took over 0.5 s"),
    ("raise MemoryError", 60, "ended with exit code 1: MemoryError"),
])  # fmt: skip
def test_a_process_that_does_not_end_well(code, limit, words, tmp_path):
    options = SimpleNamespace(threads=1, scratch=tmp_path, limit=limit)
    with pytest.raises(parity.Problem, match=words.replace("?", r"\?")):
        parity.launch([sys.executable, "-c", code], options, "TRL's sft")
