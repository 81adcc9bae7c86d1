"""TRL's own losses and gradients on numbers that are written down: what tests/ compares the scripts with.

    PYTHON benchmarks/trl_fixtures.py [FAMILY ...]     (PYTHON: of an environment with TRL 1.16.0; none: all it has)

A family is a function below that returns {"batches": name -> inputs, "cases": [{flags, batch, loss, gradient}]}, one of
FAMILIES; its result becomes tests/fixtures/trl_FAMILY.json with the versions, one batch or case per line. Inputs stand
in the file, so a test needs neither TRL nor the random numbers of another torch. TRL's trainers are not started: the
method that computes the loss is called on a trainer without an __init__, with a model that returns given log-probs.
"""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl

VERSION = "1.16.0"
FOLDER = Path(__file__).resolve().parents[1] / "tests" / "fixtures"

# ---- dpo -------------------------------------------------------------------------------------------------------------

PROMPT = 2  # tokens before each completion
LENGTHS = {  # of the chosen and the rejected completions; equal: where a mean over tokens is one over completions
    "mixed": ([3, 5, 2, 4], [4, 2, 6, 4]),
    "equal": ([4, 4, 4], [4, 4, 4]),
}
DIVERGENCES = "forward_kl", "js_divergence", "alpha_divergence"
MARGINS = "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"  # allowed under any divergence
OTHERS = "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired"


def dpo_cases():
    """(flags, batch): every loss at two betas, under every divergence, weighted, shortened, smoothed, mixed."""
    for name in MARGINS + OTHERS:
        smoothing = {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
        for beta in 0.1, 0.6:
            yield {"loss_type": [name], "beta": beta} | smoothing, "mixed"
        if name in MARGINS:
            for divergence in DIVERGENCES:
                yield {"loss_type": [name], "f_divergence_type": divergence} | smoothing, "mixed"
        if not name.startswith("aot"):
            yield {"loss_type": [name], "use_weighting": True} | smoothing, "mixed"
        yield {"loss_type": [name], "ld_alpha": 0.5} | smoothing, "mixed"
    for coefficient in 0.0, 0.2, 0.8:
        yield {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": coefficient, "beta": 1.0}, "mixed"
    yield {"loss_type": ["discopop"], "discopop_tau": 0.5}, "mixed"
    for name in "aot", "aot_unpaired":
        yield {"loss_type": [name], "label_smoothing": 0.2}, "mixed"
    yield {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.005]}, "equal"  # RPO
    yield {"loss_type": ["sigmoid", "sft"]}, "equal"  # Iterative RPO
    yield {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, "equal"  # MPO
    yield {"loss_type": ["sft"]}, "mixed"  # where TRL's mean over tokens is not ours
    yield {"loss_type": ["ipo", "nca_pair"], "loss_weights": [0.25, 2.0], "use_weighting": True}, "mixed"


def dpo_batch(chosen, rejected, generator):
    """Per token, completions in the order chosen, rejected, chosen, ...: log pi, log ref, log sum p^2."""
    lengths = [n for pair in zip(chosen, rejected) for n in pair]

    def uniform(n, low, high):
        return [round(x, 3) for x in (low + (high - low) * torch.rand(n, generator=generator)).tolist()]

    logprobs = [uniform(n, -2.5, -0.05) for n in lengths]
    shifts = [uniform(n, -1.2, 1.2) for n in lengths]
    ref = [[round(min(x + d, -0.01), 3) for x, d in zip(xs, ds)] for xs, ds in zip(logprobs, shifts)]
    return {"logprobs": logprobs, "ref_logprobs": ref, "log_sum_p2": [uniform(n, -1.5, -0.1) for n in lengths]}


def dpo_trainer(flags, outputs):
    """What DPOTrainer._compute_loss reads of its trainer."""
    config = trl.DPOConfig
    default = {name: config.__dataclass_fields__[name].default for name in (
        "beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "use_weighting",
        "ld_alpha", "loss_weights")}  # fmt: skip
    values = default | {"loss_type": ["sigmoid"]} | flags
    trainer = object.__new__(trl.DPOTrainer)
    vars(trainer).update(values)
    trainer.f_divergence_type = getattr(values["f_divergence_type"], "value", values["f_divergence_type"])
    trainer.loss_types, trainer.loss_weights = values["loss_type"], values["loss_weights"]
    trainer.loss_weights = trainer.loss_weights or [1.0] * len(trainer.loss_types)
    trainer.args = SimpleNamespace(discopop_tau=values["discopop_tau"], gradient_checkpointing_kwargs=None)
    same = lambda x: x  # noqa: E731
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    trainer.model = torch.nn.Identity()
    trainer.model.is_gradient_checkpointing = False
    trainer.ref_model = lambda **_: SimpleNamespace(log_probs=outputs["ref_logprobs"])
    trainer.precompute_ref_logps = trainer.aux_loss_enabled = False
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    return trainer


def dpo():
    generator = torch.Generator().manual_seed(0)
    batches = {name: dpo_batch(*lengths, generator) for name, lengths in LENGTHS.items()}
    cases = []
    for flags, name in dpo_cases():
        # TRL clamps exponents by a table of dtypes that lacks float64
        dtype = torch.float32 if flags.get("f_divergence_type") == "alpha_divergence" else torch.float64
        rows = len(batches[name]["logprobs"])
        order = [*range(0, rows, 2), *range(1, rows, 2)]  # TRL: all chosen, then all rejected
        lengths = [len(batches[name]["logprobs"][i]) for i in order]
        mask = torch.tensor([[0] * PROMPT + [1] * n + [0] * (max(lengths) - n) for n in lengths])
        outputs = {}
        for key, lists in batches[name].items():
            outputs[key] = torch.zeros(mask[:, 1:].shape, dtype=dtype)
            for row, i in enumerate(order):
                outputs[key][row, PROMPT - 1 : PROMPT - 1 + lengths[row]] = torch.tensor(lists[i], dtype=dtype)
        outputs["logprobs"].requires_grad_()
        zeros = torch.zeros_like(outputs["ref_logprobs"])
        result = SimpleNamespace(log_probs=outputs["logprobs"], log_sum_sq_probs=outputs["log_sum_p2"], entropy=zeros,
                                 mean_logits=zeros, is_top1=zeros.bool())  # fmt: skip
        inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
        loss = dpo_trainer(flags, outputs)._compute_loss(lambda result=result, **_: result, inputs, False)
        gradient = [None] * rows
        try:
            loss.backward()
        except RuntimeError as e:  # TRL multiplies by the weights in place, which the backward of hinge's relu refuses
            cases.append({"flags": flags, "batch": name, "loss": loss.item(), "gradient": None, "error": str(e)[:94]})
            continue
        for row, i in enumerate(order):
            part = outputs["logprobs"].grad[row, PROMPT - 1 : PROMPT - 1 + lengths[row]]
            gradient[i] = [float(f"{x:.12g}") for x in part.tolist()]
        assert math.isfinite(loss.item()) and any(map(any, gradient)), flags
        cases.append({"flags": flags, "batch": name, "loss": loss.item(), "gradient": gradient})
    return {"batches": batches, "cases": cases}


# ---- orpo, cpo -------------------------------------------------------------------------------------------------------

CHOSEN_ALIKE = {  # where the chosen ones are alike, TRL's mean over a micro-batch's tokens is one over completions
    "mixed": ([3, 5, 2, 4], [4, 2, 6, 4]),
    "alike": ([4, 4, 4], [3, 6, 4]),
}


def without_reference_batch(chosen, rejected, prompt, generator):
    """Per token, completions in the order chosen, rejected, chosen, ...: log pi; of the prompts' tokens but the first,
    which nothing predicts, too."""
    lengths = [n for pair in zip(chosen, rejected) for n in pair]

    def uniform(n):
        return [round(x, 3) for x in (-2.5 + 2.45 * torch.rand(n, generator=generator)).tolist()]

    prompts = [uniform(prompt - 1) for _ in chosen]
    return {"logprobs": [uniform(n) for n in lengths], "prompt_logprobs": prompts}


def trl_without_reference(trainer, batch):
    """Return TRL's loss of the batch, d loss / d log pi of the completions, and its metrics. A model of two words gives
    the second one, of which all rows consist, the log-probs that are wanted."""
    prompts = torch.tensor(batch["prompt_logprobs"], dtype=torch.float64)
    logprobs = [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in batch["logprobs"]]
    order = [*range(0, len(logprobs), 2), *range(1, len(logprobs), 2)]  # TRL: all chosen, then all rejected
    rows, inputs = [], {}
    for side, start in {"chosen": 0, "rejected": 1}.items():
        parts = logprobs[start::2]
        longest = max(map(len, parts))
        labels = torch.full((len(parts), 1 + prompts.shape[1] + longest), -100)
        attention = torch.zeros_like(labels)
        for row, part in enumerate(parts):
            attention[row, : 1 + prompts.shape[1] + len(part)] = 1
            labels[row, 1 + prompts.shape[1] : 1 + prompts.shape[1] + len(part)] = 1
        inputs[f"{side}_input_ids"] = torch.ones_like(labels)
        inputs[f"{side}_attention_mask"], inputs[f"{side}_labels"] = attention, labels
    width = max(inputs[f"{side}_labels"].shape[1] for side in ("chosen", "rejected"))
    for index in order:
        values = torch.cat([prompts[index // 2], logprobs[index]])
        rows.append(torch.nn.functional.pad(values, (0, width - len(values)), value=-1.0))
    log_p = torch.stack(rows)
    logits = torch.stack([(-log_p.expm1()).log(), log_p], dim=-1)
    loss, metrics = trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), inputs)
    gradient = torch.autograd.grad(loss, logprobs)
    return loss.item(), [[float(f"{x:.12g}") for x in part.tolist()] for part in gradient], metrics


def without_reference_trainer(kind, values):
    """What get_batch_loss_metrics of TRL's trainers without a reference reads of its trainer."""
    trainer = object.__new__(kind)
    vars(trainer).update(values, is_encoder_decoder=False, aux_loss_enabled=False, pad_token_id=0, padding_value=0)
    same = lambda x: x  # noqa: E731
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    return trainer


def without_reference_batches(prompt):
    generator = torch.Generator().manual_seed(0)
    return {name: without_reference_batch(*lengths, prompt, generator) for name, lengths in CHOSEN_ALIKE.items()}


def orpo():
    """A prompt of one token, which nothing predicts: its loss is in TRL's, and in nobody else's. Then one of three."""
    from trl.experimental.orpo import ORPOTrainer

    batches = {"alike": without_reference_batches(1)["alike"], "prompt": without_reference_batches(3)["alike"]}
    cases = []
    for beta in 0.1, 0.7:
        for name, batch in batches.items():
            trainer = without_reference_trainer(ORPOTrainer, {"beta": beta})
            loss, gradient, metrics = trl_without_reference(trainer, batch)
            log_odds = metrics["log_odds_chosen"]
            case = {"flags": {"beta": beta}, "batch": name, "loss": loss, "log_odds_ratio": log_odds}
            cases.append(case | {"gradient": gradient})
    return {"batches": batches, "cases": cases}


def cpo_cases():
    """(flags, batch): every loss, alone and with the chosen completions' loss."""
    for name in "sigmoid", "hinge", "ipo", "simpo":
        for beta in 0.1, 2.5:
            yield {"loss_type": name, "beta": beta, "cpo_alpha": 0.0}, "mixed"
            yield {"loss_type": name, "beta": beta, "cpo_alpha": 0.6}, "alike"
    yield {"loss_type": "sigmoid", "cpo_alpha": 0.6}, "mixed"  # where TRL's mean over tokens is not ours
    yield {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.375, "cpo_alpha": 1.0}, "alike"  # CPO-SimPO
    for name in "sigmoid", "simpo":
        yield {"loss_type": name, "label_smoothing": 0.2, "cpo_alpha": 0.0}, "mixed"
    for alpha in 0.0, 0.25, 1.0:
        yield {"loss_type": "alphapo", "beta": 2.5, "simpo_gamma": 0.1, "alpha": alpha}, "mixed"


def cpo():
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    fields = "beta", "label_smoothing", "loss_type", "cpo_alpha", "simpo_gamma", "alpha"
    batches = without_reference_batches(2)
    cases = []
    for flags, name in cpo_cases():
        config = CPOConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, **flags)
        trainer = without_reference_trainer(CPOTrainer, {field: getattr(config, field) for field in fields})
        loss, gradient, _ = trl_without_reference(trainer, batches[name])
        cases.append({"flags": flags, "batch": name, "loss": loss, "gradient": gradient})
    return {"batches": batches, "cases": cases}


# ---- tpo -------------------------------------------------------------------------------------------------------------


def tpo_cases():
    for name in "sigmoid", "hinge", "ipo", "tpo-l":
        for beta in 0.01, 2.5:
            yield {"loss_type": name, "beta": beta, "tpo_alpha": 0.6}, "alike"
        yield {"loss_type": name, "beta": 0.3, "tpo_alpha": 0.6}, "mixed"  # where TRL's mean over tokens is not ours
    for name in "sigmoid", "tpo-l":
        yield {"loss_type": name, "label_smoothing": 0.2, "tpo_l_gamma": 1.2}, "alike"


def tpo():
    """Completions in the order chosen, rejected, reference, chosen, ...; as in the models of two words above."""
    from trl.experimental.tpo import TPOConfig, TPOTrainer

    generator = torch.Generator().manual_seed(0)
    lengths = {"alike": ([4, 3, 2], [3, 6, 4], [5, 5, 5]), "mixed": ([4, 3, 2], [3, 6, 4], [1, 5, 3])}
    batches, cases = {}, []
    for name, sides in lengths.items():
        counts = [count for triple in zip(*sides) for count in triple]
        uniform = [(-2.5 + 2.45 * torch.rand(count, generator=generator)).tolist() for count in counts]
        batches[name] = {"logprobs": [[round(x, 3) for x in values] for values in uniform]}
    fields = "beta", "label_smoothing", "loss_type", "tpo_alpha", "tpo_l_gamma"
    for flags, name in tpo_cases():
        config = TPOConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, **flags)
        trainer = without_reference_trainer(TPOTrainer, {field: getattr(config, field) for field in fields})
        trainer.model, trainer._tp_size, trainer._total_train_tokens = torch.nn.Identity(), 1, 0
        trainer._metrics = defaultdict(lambda: defaultdict(list))
        given = batches[name]["logprobs"]
        logprobs = [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in given]
        order = [*range(0, 9, 3), *range(1, 9, 3), *range(2, 9, 3)]  # TRL: all chosen, all rejected, all references
        width = max(map(len, logprobs))
        rows = [torch.nn.functional.pad(logprobs[k], (0, width - len(logprobs[k]) + 1), value=-1.0) for k in order]
        log_p = torch.stack(rows)
        logits = torch.stack([(-log_p.expm1()).log(), log_p], dim=-1)
        mask = torch.tensor([[0] + [1] * len(logprobs[k]) + [0] * (width - len(logprobs[k])) for k in order])
        inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
        loss = trainer._compute_loss(lambda logits=logits, **_: SimpleNamespace(logits=logits), inputs, False)
        gradient = torch.autograd.grad(loss, logprobs)
        parts = [[float(f"{x:.12g}") for x in part.tolist()] for part in gradient]
        cases.append({"flags": flags, "batch": name, "loss": loss.item(), "gradient": parts})
    return {"batches": batches, "cases": cases}


# ---- bco -------------------------------------------------------------------------------------------------------------


def bco():
    """Steps one after another, with the running mean of all rewards; with the density ratio that TRL makes of given
    probabilities (a classifier's, of prompts) where they are there."""
    from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments

    generator = torch.Generator().manual_seed(0)
    batches, cases = {}, []
    for name, sizes in {"first": (3, 4), "second": (2, 2), "third": (1, 5)}.items():
        rows = {"desirable": [1] * sizes[0] + [0] * sizes[1]}
        for key in "logprobs", "ref_logprobs":
            rows[key] = [round(x, 3) for x in (-20 * torch.rand(sum(sizes), generator=generator)).tolist()]
        rows["probabilities"] = [round(x, 3) for x in torch.rand(sizes[1], generator=generator).tolist()]
        batches[name] = rows
    for beta, matched in (0.1, False), (0.5, False), (0.5, True):
        trainer = object.__new__(BCOTrainer)
        trainer.beta = beta
        trainer.running = RunningMoments(accelerator=SimpleNamespace(use_distributed=False))
        trainer.embedding_func = trainer.embedding_tokenizer = "given" if matched else None
        trainer.args = SimpleNamespace(min_density_ratio=0.5, max_density_ratio=10.0)
        trainer._get_chosen_prob = lambda probabilities: probabilities
        for name, rows in batches.items():
            count = sum(rows["desirable"])
            logprobs = torch.tensor(rows["logprobs"], dtype=torch.float64, requires_grad=True)
            ref = torch.tensor(rows["ref_logprobs"], dtype=torch.float64)
            given = torch.tensor(rows["probabilities"], dtype=torch.float64)
            parts = logprobs[:count], logprobs[count:], ref[:count], ref[count:]
            losses, _, _, delta = trainer.bco_loss(*parts, None, given)
            loss = losses.nanmean()
            (gradient,) = torch.autograd.grad(loss, logprobs)
            case = {"flags": {"beta": beta, "udm": matched}, "batch": name, "loss": loss.item(), "delta": delta.item()}
            cases.append(case | {"gradient": [float(f"{x:.12g}") for x in gradient.tolist()]})
    return {"batches": batches, "cases": cases}


# ---- prm -------------------------------------------------------------------------------------------------------------

STEPS = [  # prompt, steps, labels
    ("3+4?", ["3+4=7", "#### 7"], [True, True]),
    ("What is 12 + 9?", ["2+9=11", "1+1=2", "so 21", ""], [True, True, False, True]),
    ("no\nsteps\n", [" in one\ntwo lines "], [False]),
]


def prm():
    """Token ids and labels of rows by PRMTrainer, and the loss of a token classifier's logits at the labels, which is
    that of transformers: TRL leaves it to the model."""
    from transformers import AutoTokenizer
    from transformers.loss.loss_utils import ForTokenClassification
    from trl.experimental.prm.prm_trainer import PRMTrainer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER.parents[1] / "common" / "tiny" / "model")
    generator = torch.Generator().manual_seed(0)
    settings = {"separator": ("\n", False, False), "blank": (" ", False, False), "two tokens": (" \n", False, False),
                "last": ("\n", True, False), "last, held out": ("\n", True, True)}  # fmt: skip
    batches, cases = {}, []
    for name, (separator, last_only, is_eval) in settings.items():
        rows = []
        for prompt, steps, labels in STEPS:
            row = {"prompt": prompt, "completions": steps, "labels": labels}
            rows.append(PRMTrainer.tokenize_row(row, tokenizer, separator, 1024, None, last_only, is_eval))
        batches[name] = {"separator": separator, "last_only": last_only, "is_eval": is_eval, "rows": rows}
        targets = torch.tensor([label for row in rows for label in row["labels"]])
        at = (targets >= 0).nonzero()[:, 0]
        given = [[round(x, 3) for x in pair] for pair in (4 * torch.randn(len(at), 2, generator=generator)).tolist()]
        logits = torch.zeros(len(targets), 2)
        logits[at] = torch.tensor(given)
        logits.requires_grad_()
        config = SimpleNamespace(num_labels=2)
        loss = ForTokenClassification(logits, targets, config, num_items_in_batch=len(at))
        (gradient,) = torch.autograd.grad(loss, logits)
        numbers = {"logits": given, "loss": loss.item(), "gradient": gradient[at].tolist()}
        cases.append({"flags": {"train_on_last_step_only": last_only}, "batch": name} | numbers)
    rows = [{"prompt": prompt, "completions": steps, "labels": labels} for prompt, steps, labels in STEPS]
    return {"batches": {"data": rows} | batches, "cases": cases}


# ---- all families ----------------------------------------------------------------------------------------------------

FAMILIES = {"dpo": dpo, "orpo": orpo, "cpo": cpo, "tpo": tpo, "bco": bco, "prm": prm}
LAST_RELEASE = {"bco": "1.9.0", "prm": "1.9.0"}  # with what VERSION has no more: put its wheel, unpacked, in PYTHONPATH


def main():
    for name in sys.argv[1:] or [name for name in FAMILIES if name not in LAST_RELEASE]:
        if name not in FAMILIES:
            raise SystemExit(f"error: {name}: choose from {', '.join(FAMILIES)}")
        version = LAST_RELEASE.get(name, VERSION)
        if trl.__version__ != version:
            raise SystemExit(f"error: TRL {trl.__version__} is installed, the fixtures of {name} are of {version}")
        made = FAMILIES[name]()
        batches = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(batch)}" for key, batch in made["batches"].items())
        cases = ",\n  ".join(json.dumps(case) for case in made["cases"])
        head = f'"trl": "{trl.__version__}", "torch": "{torch.__version__}", "made_by": "benchmarks/trl_fixtures.py"'
        text = f'{{{head},\n "batches": {{\n  {batches}\n }},\n "cases": [\n  {cases}\n ]\n}}\n'
        json.loads(text)
        (FOLDER / f"trl_{name}.json").write_text(text)
        print(f"{name}: {len(made['cases'])} cases")


if __name__ == "__main__":
    main()
