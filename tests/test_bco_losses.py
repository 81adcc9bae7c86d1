"""BCO against TRL 1.9.0, its last release that had it, and against its formula in plain floats; the density ratio of
prompts against a logistic regression of our own on the model's own hidden states."""

import json
import math
import shutil

import pytest
import torch
from conftest import ROOT, newest, read_jsonl, script, tiny_rows, train
from test_bad_input import attempt, refused
from test_dpo_losses import close, f64
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel
from transformers import PreTrainedTokenizerFast, T5Config, T5Model

from common.runtime.flags import InputError
from common.tokenization import load_tokenizer

bco = script("experimental/bco")
FIXTURE = json.loads((ROOT / "tests" / "fixtures" / "trl_bco.json").read_text())
MODEL = ROOT / "common" / "tiny" / "model"


def ours(rows, delta, ratios, **flags):
    """Return the sum of the rows' losses, metrics, and d loss / d log pi, by the script's own function in float64."""
    logprobs = f64(rows["logprobs"], grad=True)
    batch = {"ref_logprob": f64(rows["ref_logprobs"]), "desirable": f64(rows["desirable"])}
    batch["density_ratio"] = f64(ratios)
    loss, metrics = bco.bco_loss(logprobs, batch, delta, bco.Args(**flags))
    (slope,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), metrics, slope


def density_ratios(rows, udm):
    """Return how much each row counts: undesirable ones p / (1 - p), from 0.5 to 10."""
    ratios = [1.0] * sum(rows["desirable"])
    for p in rows["probabilities"]:
        ratios.append(min(10.0, max(0.5, p / (1 - p))) if udm else 1.0)
    return ratios


@pytest.mark.parametrize("beta, udm", ((0.1, False), (0.5, False), (0.5, True)))
def test_trl(beta, udm):
    """Three steps one after another: delta is the mean of all rewards so far, which TRL holds in fp32."""
    seen = []
    cases = [case for case in FIXTURE["cases"] if case["flags"] == {"beta": beta, "udm": udm}]
    assert len(cases) == 3
    for case in cases:
        rows = FIXTURE["batches"][case["batch"]]
        seen += [beta * (pi - ref) for pi, ref in zip(rows["logprobs"], rows["ref_logprobs"])]
        delta = sum(seen) / len(seen)
        close(delta, case["delta"], rtol=1e-6, atol=1e-7)
        loss, metrics, slope = ours(rows, delta, density_ratios(rows, udm), beta=beta)
        count = len(rows["logprobs"])
        close(loss / count, case["loss"], rtol=1e-6, atol=1e-7)
        close(slope / count, case["gradient"], rtol=1e-6, atol=1e-7)
        close(metrics["loss"], loss)


def test_by_hand():
    """Rewards 0.3 and -0.1 around a delta of 0.1: -log sigmoid(0.2) twice, the undesirable row three times."""
    rows = {"logprobs": [-1.0, -5.0], "ref_logprobs": [-4.0, -4.0], "desirable": [1, 0]}
    loss, metrics, slope = ours(rows, 0.1, [1.0, 3.0])
    close(loss, 4 * 0.5981388693815919, rtol=0, atol=1e-12)  # ln(1 + e^-0.2)
    close(slope, [-0.1 * 0.45016600268752216, 0.3 * 0.45016600268752216])  # beta sigmoid(-0.2)
    close(metrics["reward_chosen"], 0.3)
    close(metrics["reward_rejected"], -0.1)


def test_it_is_not_its_parents_loss():
    rows = FIXTURE["batches"]["first"]
    kto = script("kto")
    sums = [f64(rows[key]) for key in ("logprobs", "ref_logprobs", "desirable")]
    theirs, _ = kto.kto_loss(*sums, 0.0, kto.Args(beta=0.5))
    with pytest.raises(AssertionError):
        close(ours(rows, 0.0, [1.0] * 7, beta=0.5)[0], theirs)


# ---- the density ratio -----------------------------------------------------------------------------------------------


def sigma(x):
    return 1 / (1 + math.exp(-x))


def regression(desirable, undesirable):
    """Return the weights of a logistic regression by Newton's method, as scikit-learn's with class_weight="balanced"
    has them: each row counts n / (2 n_label) times, and half the squared norm of the weights but the bias is added."""
    rows = torch.cat([desirable, undesirable])
    labels = f64([1.0] * len(desirable) + [0.0] * len(undesirable))
    counts = f64([len(desirable)] * len(desirable) + [len(undesirable)] * len(undesirable))
    factors = len(rows) / (2 * counts)
    penalty = torch.ones(rows.shape[1], dtype=torch.float64)
    penalty[-1] = 0
    weights = torch.zeros_like(penalty)
    for _ in range(60):
        p = (rows @ weights).sigmoid()
        slope = rows.T @ (factors * (p - labels)) + penalty * weights
        curvature = (rows.T * (factors * p * (1 - p))) @ rows + penalty.diag()
        weights = weights - torch.linalg.solve(curvature, slope)
    assert slope.abs().max() < 1e-9
    return weights


def test_the_classifier():
    generator = torch.Generator().manual_seed(1)
    desirable = torch.randn(30, 4, generator=generator, dtype=torch.float64) + 0.5
    undesirable = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    desirable[:, -1] = undesirable[:, -1] = 1
    close(bco.fit_classifier(desirable, undesirable), regression(desirable, undesirable), rtol=1e-4, atol=1e-5)


def test_a_classifier_of_one_number_by_hand():
    """Two desirable rows at 1 and one undesirable row at -1 balance each other: the bias is 0, and the weight w is
    where w = 3 sigmoid(-w), three rows' slopes against its own."""
    desirable, undesirable = f64([[1.0, 1.0], [1.0, 1.0]]), f64([[-1.0, 1.0]])
    weight, bias = bco.fit_classifier(desirable, undesirable).tolist()
    assert abs(bias) < 1e-6 and weight == pytest.approx(3 * sigma(-weight), rel=1e-6) and weight > 0.5


PROMPTS = "3+4=", "12+30=", "What is 5?", "7+7+7=", "1", "Say no", "8+1=", "What is it", "2+2=?"


def kept_ratios(folder, *flags, world=1):
    """Return the density ratio of every row of a run on PROMPTS, of which the first four are desirable, and its first
    training step's metrics."""
    rows = []
    for number, prompt in enumerate(PROMPTS):
        rows.append({"prompt": prompt, "completion": str(number), "label": number < 4})
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def patch(module):
        attach_ratios = module.attach_ratios

        def kept(policy, tokenizer, train, heldout, args, run):
            line = attach_ratios(policy, tokenizer, train, heldout, args, run)
            ratios = [group["completions"][0]["density_ratio"] for group in train]
            (folder / f"ratios{run.rank}.json").write_text(json.dumps(ratios))
            return line

        module.attach_ratios = kept

    common = ["--dataset", folder / "rows.jsonl", "--eval_dataset", "", "--batch_size", 9, "--max_steps", 1]
    train("experimental/bco", folder / "out", *common, "--save_every", 0, *flags, patch=patch, world=world)
    (line,) = read_jsonl(folder / "out" / "metrics.jsonl")
    ratios = [json.loads((folder / f"ratios{rank}.json").read_text()) for rank in range(world)]
    assert all(found == ratios[0] for found in ratios)
    return ratios[0], line


def test_a_run_with_density_ratios(tmp_path):
    """Policy = reference, and delta = 0: the loss is ln 2 times the mean ratio. Ranks share the prompts."""
    tokenizer, lm = load_tokenizer(str(MODEL)), AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    embeddings = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            mean = lm.base_model(ids).last_hidden_state[0].double().mean(0)
        embeddings.append(torch.cat([mean, f64([1.0])]))
    embeddings = torch.stack(embeddings)
    expected = (embeddings[4:] @ regression(embeddings[:4], embeddings[4:])).exp()
    limits = expected.sort().values[[0, -1]].tolist()
    low, high = limits[0] * 1.1, limits[1] / 1.1  # so that both of them cut
    flags = ["--min_density_ratio", low, "--max_density_ratio", high]
    ratios, line = kept_ratios(tmp_path / "one", *flags)
    assert ratios[:4] == [1.0] * 4 and min(ratios[4:]) == low and max(ratios[4:]) == high
    close(f64(ratios[4:]), expected.clamp(low, high), rtol=1e-4, atol=1e-5)
    assert line["loss"] == pytest.approx(math.log(2) * sum(ratios) / 9, rel=1e-5)
    two, _ = kept_ratios(tmp_path / "two", *flags, world=2)
    close(f64(two), f64(ratios), rtol=1e-4, atol=1e-5)
    without, line = kept_ratios(tmp_path / "without", "--no-udm")
    assert without == [1.0] * 9 and line["loss"] == pytest.approx(math.log(2), rel=1e-5)


# ---- another model for the prompts -----------------------------------------------------------------------------------


def save_bert(folder):
    """Save an encoder that looks both ways, with a tokenizer of characters that reads 7 of them,
    and writes a control token before them if it may."""
    letters = "0123456789+=What isSyno?"
    vocabulary = {letter: number for number, letter in enumerate(["?!", *dict.fromkeys(letters)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("?! $0", special_tokens=[("?!", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?!", model_max_length=7).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=7, initializer_range=0.5, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


def save_decoder(folder):
    """Save another causal model for the tokens that the policy has."""
    tokenizer = load_tokenizer(str(MODEL))
    config = AutoModelForCausalLM.from_pretrained(MODEL).config
    config.hidden_size, config.num_hidden_layers, config.initializer_range = 32, 1, 0.5
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def other_ratios(folder):
    """Return what the undesirable rows of PROMPTS count by the embeddings of the model in the folder, unlimited."""
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float64)
    embeddings = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        if folder.name == "bert":
            ids = ids[:, :7]
        with torch.no_grad():
            mean = lm(input_ids=ids).last_hidden_state[0].mean(0)
        embeddings.append(torch.cat([mean, f64([1.0])]))
    embeddings = torch.stack(embeddings)
    return (embeddings[4:] @ regression(embeddings[:4], embeddings[4:])).exp()


@pytest.mark.parametrize("save", (save_bert, save_decoder))
def test_another_models_embeddings(save, tmp_path):
    """One after the other they are what transformers says; ranks share them, and a resumed run has them again."""
    folder = save(tmp_path / save.__name__.removeprefix("save_"))
    expected = other_ratios(folder)
    flags = ["--embedding_model", folder, "--min_density_ratio", 0.0, "--max_density_ratio", 1e9]
    ratios, line = kept_ratios(tmp_path / "one", *flags)
    close(f64(ratios[4:]), expected, rtol=1e-4, atol=1e-5)  # the minimum is found to 1e-5, the states are fp32
    assert ratios[:4] == [1.0] * 4 and line["loss"] == pytest.approx(math.log(2) * sum(ratios) / 9, rel=1e-5)
    two, _ = kept_ratios(tmp_path / "two", *flags, world=2)
    close(f64(two), f64(ratios), rtol=1e-4, atol=1e-5)
    policys, _ = kept_ratios(tmp_path / "policy", *flags[2:])
    with pytest.raises(AssertionError):
        close(f64(policys), f64(ratios), rtol=1e-2, atol=1e-2)


def test_a_resumed_run_reads_the_same_embeddings(tmp_path):
    bert = save_bert(tmp_path / "bert")
    rows = tiny_rows("experimental/bco", tmp_path / "rows.jsonl", 16)
    flags = ["--dataset", rows, "--eval_dataset", "", "--udm", "--embedding_model", bert, "--batch_size", 4]
    flags += ["--max_steps", 4, "--save_every", 2, "--learning_rate", "1e-3"]
    train("experimental/bco", tmp_path / "whole", *flags)
    train("experimental/bco", tmp_path / "cut", *flags)
    shutil.rmtree(newest(tmp_path / "cut"))
    shutil.rmtree(tmp_path / "cut" / "final")
    train("experimental/bco", tmp_path / "cut", *flags, "--resume", "auto")
    weights = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_a_model_that_cannot_embed(tmp_path):
    """Nothing there, no tokenizer, no weights, weights of another shape, and an encoder with a decoder."""
    bert = save_bert(tmp_path / "bert")
    untold, empty, torn, halves = (tmp_path / name for name in ("untold", "empty", "torn", "halves"))
    BertModel.from_pretrained(bert).save_pretrained(untold)
    AutoTokenizer.from_pretrained(bert).save_pretrained(empty)
    AutoTokenizer.from_pretrained(bert).save_pretrained(torn)
    lm = BertModel.from_pretrained(bert)
    lm.save_pretrained(torn)
    config = json.loads((torn / "config.json").read_text())
    (torn / "config.json").write_text(json.dumps(config | {"hidden_size": 26}))
    AutoTokenizer.from_pretrained(bert).save_pretrained(halves)
    T5Model(T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(halves)
    for folder in tmp_path / "absent", untold, empty, torn, halves:
        place = tmp_path / f"run-{folder.name}"
        result = attempt("experimental/bco", place, "--udm", "--embedding_model", folder)
        refused(result, place, folder.name)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_delta_is_the_mean_of_all_rewards(tmp_path):
    """Four steps, each of the same five pairs: what the state holds at the end is made of the logged rewards."""
    rows = tiny_rows("dpo", tmp_path / "rows.jsonl", 5)
    flags = ["--dataset", rows, "--eval_dataset", rows, "--batch_size", 10, "--max_steps", 4, "--save_every", 0]
    train("experimental/bco", tmp_path / "out", *flags, "--no-udm", "--learning_rate", "1e-4", "--eval_every", 0)
    first, *lines, last = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    means = [(line["reward_chosen"] + line["reward_rejected"]) / 2 for line in lines]
    for step, line in enumerate(lines, 1):
        assert line["delta"] == pytest.approx(sum(means[:step]) / step, rel=1e-5, abs=1e-5)
    assert abs(lines[-1]["delta"]) > 1e-3 and first["eval/delta"] == 0 and last["eval/delta"] == lines[-1]["delta"]
    state = json.loads((newest(tmp_path / "out") / "trainer" / "meta.json").read_text())["state"]
    assert state["delta"] == lines[-1]["delta"]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # all rewards are 0, and so is delta


def test_flags_without_a_meaning(tmp_path):
    with pytest.raises(InputError, match="--min_density_ratio"):
        bco.Args(min_density_ratio=2.0, max_density_ratio=1.0).check()
    with pytest.raises(InputError, match="--embedding_model: needs --udm"):
        bco.Args(embedding_model="folder").check()


def test_rows_of_one_label_stop_before_step_1(tmp_path):
    """Held-out rows may have one."""
    rows = tmp_path / "mine.jsonl"
    asked, said = [{"role": "user", "content": "3+4="}], [{"role": "assistant", "content": "7"}]
    rows.write_text((json.dumps({"prompt": asked, "completion": said, "label": True}) + "\n") * 8)
    refused(attempt("experimental/bco", tmp_path, "--dataset", rows), tmp_path, "--dataset", "one label")
    assert attempt("experimental/bco", tmp_path / "heldout", "--eval_dataset", rows).code == 0
