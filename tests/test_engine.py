"""The continuous-batching engine of common/sampling.py against the plain loop and against Policy, on the CPU.

Two prompts are longer than a page (256 tokens), so that pages are shared, forked and, once the weights have changed,
stale. They are no text that the tiny model knows: rounding grows over their length to 1e-4 (against fp64: 8e-5 in the
engine, 4e-5 in the model's own forward), while a wrong key or a stale page is worth 1e-2 and more.
"""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, newest, read_jsonl, tiny_rows, train
from test_resume import assert_equal
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common import attention, decoding, logprobs, sampling
from common.batches import flat_batch
from common.tokenization import encode_prompt, stop_ids

COPIES, TEMPERATURE, LENGTH = 4, 1.2, 24
ROUNDING = 2e-4
FOLDER = ROOT / "common" / "tiny" / "model"


def make_sampler(cut=None, **changes):
    """A Sampler with the weights of the tiny model, and a run that has what it reads of one."""
    flags = {"num_generations": COPIES, "temperature": TEMPERATURE, "max_completion_length": LENGTH, "max_length": 1024}
    flags |= {"seed": 42, "deterministic": False, "engine": "auto", "model": "tiny"}
    args = SimpleNamespace(**flags | changes)
    run = SimpleNamespace(args=args, device=torch.device("cpu"), dtype=torch.float32, rank=0)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    stops = stop_ids(tokenizer, GenerationConfig.from_pretrained(FOLDER))
    sampler = sampling.Sampler(run, lm, tokenizer, stops, **cut or {})
    trained = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    sampler.lm.load_state_dict(trained.state_dict())
    sampler.start_engine()
    return sampler


@pytest.fixture(scope="module")
def sampler():
    return make_sampler(engine="continuous")


def make_groups():
    """Three questions, one of them twice, a prompt of a single token and two that share their first 256."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    rows = (ROOT / "common" / "tiny" / "prompts.jsonl").read_text().splitlines()[:3]
    short = [encode_prompt(json.loads(row), tokenizer)["prompt"] for row in rows]
    prompts = [*short, short[0], short[1][:1], 15 * short[2] + short[0], 15 * short[2] + short[1]]
    assert len(15 * short[2]) > 256
    return [{"prompt": prompt, "completions": [], "place": place} for place, prompt in enumerate(prompts)]


def sampled(sampler, copies=COPIES, place=("train", 0), greedy=False):
    groups = make_groups()
    sampler.sample(groups, copies, place, greedy)
    return groups


def ids(groups):
    return [[*c["ids"]] for group in groups for c in group["completions"]]


def gap(sampler, groups):
    """Largest difference of the sampler's log-probs from Policy's of the same ids under the weights as they are now."""
    theirs = torch.cat([c["sampler_logprobs"] for group in groups for c in group["completions"]])
    with torch.no_grad():
        ours = logprobs.Policy(sampler.lm, TEMPERATURE)(flat_batch(groups, "cpu"))["logprobs"]
    assert theirs.dtype == torch.float32 and theirs.shape == ours.shape
    return (ours - theirs).abs().max().item()


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [False, True])
def test_the_loop_fits_into_the_free_memory(greedy, monkeypatch):
    """What buffers of keys and values take, counted as they are made, stays within half of what is free, and fewer
    prompts at a time draw the same tokens."""
    loop = make_sampler(engine="loop")
    whole = sampled(loop, greedy=greedy)
    free, peaks = 26e6, []
    remember, generate = decoding.FlatDecoder.remember, sampling.generate

    def counted(self, *rest):
        found = remember(self, *rest)
        peaks[-1] = max(peaks[-1], sum(buffer.nbytes for cohort in self.cohorts for buffer in cohort.cache.values()))
        return found

    def begun(*rest, **cut):
        peaks.append(0)
        return generate(*rest, **cut)

    monkeypatch.setattr(decoding.FlatDecoder, "remember", counted)
    monkeypatch.setattr(sampling, "generate", begun)
    sampled(loop, greedy=greedy)
    assert len(peaks) == 1 and peaks[0] > free / 2, "the test's memory is not short"
    peaks.clear()
    monkeypatch.setattr(sampling, "free_bytes", lambda: free)
    parts = sampled(loop, greedy=greedy)
    assert len(peaks) > 1 and free / 8 < max(peaks) <= free / 2
    assert ids(parts) == ids(whole)


def test_greedy_is_the_loops(sampler, monkeypatch):
    """Token for token, whatever the batch, the length of the prompt and the fork."""
    expected = sampled(sampler, 1, greedy=True)
    monkeypatch.setattr(sampler.engine.batch_processor.model_runner, "do_sample", False)
    groups = sampled(sampler)
    for group, loop in zip(groups, expected):
        assert [[*c["ids"]] for c in group["completions"]] == COPIES * [[*loop["completions"][0]["ids"]]]
        assert all(c["stopped"] == loop["completions"][0]["stopped"] for c in group["completions"])
    assert len({*map(tuple, ids(groups))}) == len(groups) - 1  # the same question twice


def test_draws_follow_the_model(sampler, monkeypatch):
    """Of 2000 forks the first tokens have the model's frequencies at the temperature: forks draw for themselves from
    the start. Within 4.5 standard deviations each, and more than one token is likely."""
    prompt, copies = make_groups()[4]["prompt"], 2000
    groups = [{"prompt": prompt, "completions": [], "place": 0}]
    monkeypatch.setattr(sampler.engine.generation_config, "max_new_tokens", 1)
    sampler.sample(groups, copies, ("train", 0))
    assert all(len(x) == 1 for x in ids(groups))
    lm = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    counts = torch.tensor([x[0] for x in ids(groups)]).bincount(minlength=lm.config.vocab_size)
    with torch.no_grad():
        p = (lm(torch.tensor([prompt])).logits[0, -1].double() / TEMPERATURE).softmax(-1)
    z = (counts - copies * p) / (copies * p * (1 - p)).sqrt().clamp(min=1)
    assert z.abs().max() < 4.5 and (copies * p > 20).sum() >= 2


@pytest.mark.parametrize("cut, likely", [({"top_k": 2}, 2), ({"top_p": 0.9}, None)], ids=str)
def test_truncated_draws(cut, likely):
    """Of the likeliest tokens only, in their proportions; log-probs are still the policy's, of all tokens."""
    sampler = make_sampler(cut, engine="continuous")
    groups = sampled(sampler, 8)
    assert gap(sampler, groups) < ROUNDING
    lm = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    for group in groups:
        for completion in group["completions"]:
            ids = torch.tensor([[*group["prompt"], *completion["ids"]]])
            with torch.no_grad():
                p = (lm(ids).logits[0, len(group["prompt"]) - 1 : -1].double() / TEMPERATURE).softmax(-1)
            own = p.gather(1, torch.tensor(completion["ids"])[:, None])
            more_likely = p * (p > own * (1 + 1e-6))
            if likely:
                assert ((more_likely > 0).sum(-1) < likely).all()
            else:
                assert (more_likely.sum(-1) < cut["top_p"] + 1e-5).all()


def test_stop_tokens_and_lengths(sampler):
    """A completion ends with its first stop token, which belongs to it, or at the limit."""
    groups = sampled(sampler)
    for completion in (c for group in groups for c in group["completions"]):
        tokens = [*completion["ids"]]
        assert not {*tokens[:-1]} & {*sampler.stops} and len(tokens) == len(completion["sampler_logprobs"])
        assert completion["stopped"] == (tokens[-1] in sampler.stops)
        assert completion["stopped"] or len(tokens) == LENGTH
    assert {c["stopped"] for group in groups for c in group["completions"]} == {True, False}


def test_every_stop_token_stops():
    """A list of them: also one that the tokenizer does not know as such."""
    sampler = make_sampler(engine="continuous")
    sampler.stops.append(max(sum(ids(sampled(sampler)), []), key=sum(ids(sampled(sampler)), []).count))
    sampler.start_engine()
    assert any(sampler.stops[-1] in x for x in ids(sampled(sampler)))
    assert not any({*x[:-1]} & {*sampler.stops} for x in ids(sampled(sampler)))


@pytest.mark.parametrize("engine", ["loop", "continuous"])
def test_a_prompt_twice_gets_other_completions(engine):
    """In one batch and in the next, as at the border of an epoch: its place in the rollout is part of the noise."""
    sampler = make_sampler(engine=engine)
    one = make_groups()[4] | {"row": 0}  # a single token: much may follow
    groups = [one | {"place": place} for place in range(4)]
    sampler.sample(groups[:2], COPIES, ("train", 0))
    sampler.sample(groups[2:], COPIES, ("train", 0))
    assert len({str(ids([group])) for group in groups}) == 4


def test_the_loops_noise_is_that_of_the_place():
    """The same tokens in any batch, in any order, under any number of a row."""
    sampler = make_sampler(engine="loop")
    together = sampled(sampler)
    alone = [group | {"row": 7} for group in reversed(make_groups())]
    for group in alone:
        sampler.sample([group], COPIES, ("train", 0))
    assert ids(alone[::-1]) == ids(together)


def test_noise(sampler):
    """From the seed, the place and the rank; what was sampled in between does not matter."""
    first, other = ids(sampled(sampler)), ids(sampled(sampler, place=("train", 1)))
    assert ids(sampled(sampler)) == first != other
    sampler.run.rank = 1
    assert ids(sampled(sampler)) not in (first, other)
    sampler.run.rank = 0


# ---- log-probs -------------------------------------------------------------------------------------------------------


def test_logprobs_are_the_policys(sampler):
    groups = sampled(sampler)
    assert gap(sampler, groups) < ROUNDING
    assert gap(sampler, groups[:4]) < 1e-5  # known text


def test_little_room(monkeypatch):
    """16 pages for 28 sequences, some of two pages: forks that find no room begin again with the prompt."""
    from transformers.generation.continuous_batching.requests import RequestState

    again, whole = [], RequestState.create_equivalent_initial_request
    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", lambda s: again.append(s) or whole(s))
    sampler = make_sampler(engine="continuous", max_length=256)
    assert sampler.engine.batch_processor.cache.num_blocks == 16
    groups = sampled(sampler)
    assert again
    assert gap(sampler, groups) < ROUNDING
    assert all(c["stopped"] or len(c["ids"]) == LENGTH for group in groups for c in group["completions"])


@pytest.mark.parametrize("dropped", [True, False])
def test_new_weights(dropped, monkeypatch):
    """After the weights have changed in place, the log-probs are the new ones'. Without dropping pages they are not:
    this test sees what it is for."""
    sampler = make_sampler(engine="continuous")
    if not dropped:
        monkeypatch.setattr(sampler.engine.batch_processor.cache, "reset", lambda: None)
    assert gap(sampler, sampled(sampler)) < ROUNDING
    with torch.no_grad():
        for layer in sampler.lm.model.layers:
            layer.self_attn.v_proj.weight.mul_(1.5)
    groups = sampled(sampler)
    assert gap(sampler, groups[:5]) < ROUNDING  # shorter than a page: never shared
    assert gap(sampler, groups) < ROUNDING if dropped else gap(sampler, groups) > 1e-2


# ---- choice ----------------------------------------------------------------------------------------------------------


def test_state_is_left(sampler):
    """Between calls there is no thread, and loop and engine find the attention that is theirs, whoever came before."""
    first, greedy = sampled(sampler), sampled(sampler, 1, greedy=True)
    assert not sampler.engine.is_running() and not sampler.lm.training
    assert ids(sampled(sampler)) == ids(first) and ids(sampled(sampler, 1, greedy=True)) == ids(greedy)
    assert gap(sampler, first) < ROUNDING and gap(sampler, greedy) < ROUNDING


def test_choice(monkeypatch, capsys):
    monkeypatch.setattr(sampling, "say", lambda run, text: print(text))
    assert make_sampler().engine is None and make_sampler(engine="loop").engine is None
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(attention.PagedAttentionCache, "update", lambda self, key, value, layer, read, write: None)
    sampler = make_sampler(engine="continuous")
    assert sampler.engine is None and "transformers 5.20" in capsys.readouterr().out
    assert all(ids(sampled(sampler)))


def test_failure_is_said(monkeypatch):
    """Not a hang, and no thread is left behind."""
    sampler = make_sampler(engine="continuous")

    def broken(*args):
        raise ValueError("broken on purpose")

    monkeypatch.setattr(sampler.engine.batch_processor, "_generation_step", broken)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        sampled(sampler)
    assert not sampler.engine.is_running()


# ---- runs ------------------------------------------------------------------------------------------------------------


def small(folder):
    flags = ["--dataset", tiny_rows("grpo", folder / "rows.jsonl", 4), "--batch_size", 2, "--eval_rows", 2]
    return [*flags, "--engine", "continuous"]


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_run(world, tmp_path):
    """Whole runs: sampler and trainer agree, the ranks' engines do not disturb each other."""
    train("grpo", tmp_path / "run", *small(tmp_path), "--max_steps", 4, world=world)
    steps = [x for x in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "sampler_gap" in x]
    assert len(steps) == 4 and steps[0]["sampler_gap"] < 1e-5
    meta = json.loads((newest(tmp_path / "run") / "trainer" / "meta.json").read_text())
    assert meta["flags"]["engine"] == "continuous"


def test_a_file_with_one_row(tmp_path):
    """Its prompt fills the rollout, across five borders of an epoch: no two groups are the same."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text((ROOT / "common" / "tiny" / "prompts.jsonl").read_text().splitlines()[0] + "\n")
    train("grpo", tmp_path / "run", "--dataset", rows, "--batch_size", 6, "--max_steps", 1, "--temperature", 2)
    samples = [x["completion"] for x in read_jsonl(tmp_path / "run" / "samples.jsonl")]
    size = len(samples) // 6
    assert len({tuple(samples[i : i + size]) for i in range(0, len(samples), size)}) == 6


def test_resume(tmp_path):
    """Step 3 is inside a rollout, step 4 is between two: the same bytes as the run that was not interrupted."""
    flags = [*small(tmp_path), "--max_steps", 5, "--save_every", 1, "--keep_last", 99]
    train("grpo", tmp_path / "whole", *flags)
    for step in (3, 4):
        out = tmp_path / f"from{step}"
        shutil.copytree(tmp_path / "whole", out)
        for path in [*out.glob("checkpoint-*"), out / "final"]:
            if path.name == "final" or int(path.name[-6:]) > step:
                shutil.rmtree(path)
        train("grpo", out, *flags, "--resume", "auto")
        assert_equal(out, tmp_path / "whole", (5,))


def test_an_engine_that_does_not_start(monkeypatch, capsys):
    """auto says so and takes the loop; who asks for the engine gets the error."""

    def broken(*_):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(FOLDER))],
                        "init_continuous_batching", broken)
    with pytest.raises(RuntimeError):
        make_sampler(engine="continuous")
    loop = make_sampler(engine="loop")
    loop.run.args.engine, loop.run.device, loop.run.bar = "auto", SimpleNamespace(type="cuda"), None
    monkeypatch.setattr(sampling, "runs_paged", lambda *_: True)
    loop.start_engine()
    assert loop.engine is None
    assert "in the loop: the engine does not start here: no kernel image" in capsys.readouterr().out
