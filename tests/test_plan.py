"""What benchmarks/plan.py predicts, against arithmetic, published sizes, traces of whole models and real ranks."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import plan  # noqa: E402
import plan_models  # noqa: E402
import plan_real  # noqa: E402

from common.batches import flat_batch, pack  # noqa: E402

D, INNER, LAYERS, HEADS, WIDTH, VOCAB = 64, 96, 4, 4, 16, 80
NUMBERS = {"model_type": "llama", "hidden_size": D, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
           "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": WIDTH, "vocab_size": VOCAB}


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setitem(plan.MODELS, "small", (0, NUMBERS | {"tie_word_embeddings": False}))
    return "small"


def shapes():
    """(rows, columns, how tensor parallelism cuts) of every tensor of the small model, from the architecture alone."""
    layer = [(D, D, 0)] * 3 + [(D, D, 1)] + [(INNER, D, 0)] * 2 + [(D, INNER, 1)] + [(D, 1, None)] * 2
    return layer * LAYERS + [(VOCAB, D, 0)] * 2 + [(D, 1, None)]


def part(total, parts, rank):
    """Of `total` rows in chunks of the same size, the last ones smaller or empty."""
    chunk = -(-total // parts)
    return max(0, min(chunk, total - rank * chunk))


MESHES = [(1, 1, 1), (6, 1, 1), (4, 2, 1), (8, 2, 2), (512, 1, 1), (1024, 4, 4)]


@pytest.mark.parametrize("world, tp, replicate", MESHES)
def test_static_bytes_are_those_of_the_shards(model, world, tp, replicate):
    for rank in {0, world - 1}:
        found, numel, _ = plan.apart(plan.whole_model, "sft", model, rank, world, tp, replicate, True)
        group = world // tp // replicate
        at, numbers = rank // tp % group, 0
        for rows, columns, cut in shapes():
            numbers += part(rows // (tp if cut == 0 else 1), group, at) * columns // (tp if cut == 1 else 1)
        assert numel == sum(rows * columns for rows, columns, _ in shapes())
        steps = 4 * len(shapes())  # Adam counts its steps for every tensor
        assert found == {"parameters": 4 * numbers, "gradients": 4 * numbers, "optimizer": 8 * numbers + steps}


def test_few_layers_stand_for_all(model):
    """A model of four layers, from two and three and as it is."""
    some, whole = (plan.plan("dpo", model, 4, 2, 1, 512, 64, few=few) for few in (2, LAYERS))
    assert some["traced"] == [2, 3] and whole["traced"] == [LAYERS, LAYERS]
    assert some["activations"] == whole["activations"] > 0 and some["moved"] == whole["moved"]
    assert some["working"] == pytest.approx(whole["working"], rel=0.02)


@pytest.mark.parametrize("name", plan_models.OFFLINE)
def test_rows_fill_the_budget(name):
    lists = pack(plan.rows(name, 64, 512), 512)
    assert [len(flat_batch(groups)["input_ids"]) for groups in lists] == [512]


def test_traffic_is_that_of_the_shards(model):
    """Everything is gathered twice in bf16, for forward and for backward; gradients are reduced once, in fp32."""
    found = plan.plan("sft", model, 4, 1, 1, 256, 64, micro_batches=3)
    numel = sum(rows * columns for rows, columns, _ in shapes())
    bf16, fp32 = 2 * numel * 3 // 4, 4 * numel * 3 // 4  # three quarters are on other ranks
    assert found["moved"] == {"shard all_gather": 3 * 2 * bf16, "shard reduce_scatter": 3 * fp32}


@pytest.mark.parametrize("name", plan_models.MODELS)
def test_published_sizes(name):
    published = plan_models.MODELS[name][0]
    digits = len(str(published).partition(".")[2])
    assert round(sum(p.numel() for p in plan.weightless(name).parameters()) / 1e9, digits) == published


def test_ranks_beyond_the_experts_hold_padding(monkeypatch):
    """8 experts on 16 ranks: rank 0 is as heavy as on 8, the last has no expert, and twice as much is gathered."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "num_hidden_layers": 2}
    monkeypatch.setitem(plan.MODELS, "experts", (0, {**NUMBERS, "model_type": "qwen3_moe", **experts}))
    few, many, copies = (plan.plan("sft", "experts", gpus, 1, copies, 64, 64, few=1)
                         for gpus, copies in ((8, 1), (16, 1), (16, 2)))
    assert many["parameters"] > 0.9 * few["parameters"] and many["last_rank"] < 0.1 * few["last_rank"]
    assert many["moved"]["shard all_gather"] > 1.8 * few["moved"]["shard all_gather"]
    assert copies["moved"]["shard all_gather"] == few["moved"]["shard all_gather"]


def test_a_real_run_holds_what_is_predicted():
    case = plan_real.validate("sft", "Qwen3 tied", 2, 1, 1)
    for measured, predicted in zip(case["measured"], case["predicted"]):
        for key in "parameters", "gradients", "optimizer", "moved":
            assert measured[key] == predicted[key], key
        assert predicted["activations"] == pytest.approx(measured["activations"], rel=0.05)
        assert predicted["working"] == pytest.approx(measured["working"], rel=0.05)


def test_committed_results_are_within_their_limits():
    rows = [row for row in plan.read_results() if row["kind"] == "real"]
    assert {row["ranks"] for row in rows} == {1, 2, 4} and {row["script"] for row in rows} == set(plan_models.OFFLINE)
    for row in rows:
        for measured, predicted in zip(row["measured"], row["predicted"]):
            assert all(measured[key] == predicted[key] for key in ("parameters", "gradients", "optimizer", "moved"))
            assert predicted["activations"] == pytest.approx(measured["activations"], rel=0.05)
    table = {(row["model"], row["script"]) for row in plan.read_results() if row["kind"] == "plan"}
    assert table == {(case[0], name) for case in plan_models.TABLE for name in plan_models.OFFLINE}


@pytest.mark.parametrize("flags, said", [
    ([], "is needed"), (["--model", "Qwen3-8B", "--gpus", "6", "--tp_size", "4"], "divides --gpus"),
    (["--model", "nowhere"], "--model nowhere"),
    (["--model", "Qwen3-30B-A3B", "--gpus", "2", "--tp_size", "2"], "--tp_size 2 does not fit"),
])  # fmt: skip
def test_bad_flags_are_one_line(flags, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan.py", *flags])
    with pytest.raises(SystemExit) as ended:
        plan.main()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and said in last and "error:" in last
