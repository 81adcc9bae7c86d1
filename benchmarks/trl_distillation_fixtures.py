"""TRL's own divergence between two models on numbers that are written down, for tests/test_distillation.py.

    PYTHON benchmarks/trl_distillation_fixtures.py     (PYTHON: of an environment with TRL 1.16.0)

Writes tests/fixtures/trl_distillation.json: the versions; hidden states and heads of a student and a teacher; for each
beta and temperature what ChunkedDivergenceFunction, the loss of DistillationTrainer, says of every token, the student's
entropy, and the gradients of the sum by the student's hidden states, weight and bias; in float64 the sum and its
gradient by the logits from IWOPDTrainer.generalized_jsd_loss with its top_k and tail, and from GKDTrainer's; and in
float64 the loss and gradient of its IW-OPD objective, for two completions of other lengths, of GOLD's ULDLoss, for a
teacher with seven of the nine tokens, of which three have names that the student has, and another tokenisation, and of
SDFTTrainer's three modes, with the teacher's prompts that it composes; and the same of SDPOTrainer, with a policy loss
beside it and completions that nobody teaches, the prompts composed of rewards and feedback.
"""

import json
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import trl
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold.gold_trainer import ULDLoss
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer, SuccessfulRolloutTeacherContextBuilder
from trl.experimental.sdft.sdft_trainer import DemonstrationTeacherContextBuilder, DistillationLogits, SDFTTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

VERSION, TARGET = "1.16.0", Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "trl_distillation.json"
TOKENS, VOCABULARY, WIDTHS = 6, 9, (3, 4)
BETAS, TEMPERATURES, TOP_K = (0.0, 0.3, 0.5, 1.0), (1.0, 0.7), (1, 3)
NAMES = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias")


def make_inputs():
    """-> {name: nested list} of multiples of 1/64, which every precision holds."""
    torch.manual_seed(0)
    tensors = []
    for width in WIDTHS:
        tensors += [torch.randn(TOKENS, width), torch.randn(VOCABULARY, width), torch.randn(VOCABULARY)]
    return {name: (tensor * 64).round().div(64).tolist() for name, tensor in zip(NAMES, tensors)}


def distillation(inputs, beta, temperature):
    tensors = [torch.tensor(inputs[name]) for name in NAMES]
    for tensor in tensors[:3]:
        tensor.requires_grad_()
    divergence, entropy = ChunkedDivergenceFunction.apply(*tensors, beta, temperature)
    gradients = torch.autograd.grad(divergence.sum(), tensors[:3])
    case = {"beta": beta, "temperature": temperature, "divergence": divergence.tolist(), "entropy": entropy.tolist()}
    return case | {f"d_{name}": gradient.tolist() for name, gradient in zip(NAMES, gradients)}


def logits_of(inputs):
    hidden, weight, bias, *teacher = [torch.tensor(inputs[name], dtype=torch.float64) for name in NAMES]
    teacher_hidden, teacher_weight, teacher_bias = teacher
    return (hidden @ weight.T + bias)[None].requires_grad_(), (teacher_hidden @ teacher_weight.T + teacher_bias)[None]


def by_logits(function, inputs, **settings):
    """-> the sum over tokens by a function of logits, and its gradient by the student's, which the models' share."""
    student, teacher = logits_of(inputs)
    loss = function(student, teacher, reduction="sum", **settings)
    (gradient,) = torch.autograd.grad(loss, student)
    return settings | {"loss": loss.item(), "d_logits": gradient[0].tolist()}


def two_completions(*logits):
    """Six rows of logits (1, 6, V) as two completions, of four and two tokens, padded to four."""
    padded = [torch.zeros(2, 4, VOCABULARY, dtype=torch.float64) for _ in logits]
    for target, source in zip(padded, logits):
        target[0] = source[0, :4]
        target[1, :2] = source[0, 4:]
    return padded


def iw_opd(inputs, gamma):
    """TRL takes (B, T) with -100 where nothing is scored."""
    student, teacher = logits_of(inputs)
    tokens = [[1, 5, 2, 7], [3, 0, 0, 0]]
    labels = torch.tensor([[1, 5, 2, 7], [3, 0, -100, -100]])
    student_logits, teacher_logits = two_completions(student, teacher)
    index = torch.tensor(tokens)[..., None]
    sampler = student_logits.detach().log_softmax(-1).gather(-1, index)[..., 0] - 0.125
    metrics = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        temperature=1.0, iw_opd_gamma=gamma, iw_opd_epsilon=1e-8, model=SimpleNamespace(training=True), _metrics=metrics
    )
    loss = IWOPDTrainer._compute_iw_opd_loss(
        trainer, student_logits, torch.tensor(tokens), labels,
        teacher_logits.log_softmax(-1).gather(-1, index)[..., 0], sampler, num_items_in_batch=1,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, student)
    case = {"gamma": gamma, "labels": [1, 5, 2, 7, 3, 0], "seq": [0, 0, 0, 0, 1, 1], "loss": loss.item()}
    case["sampler_logprobs"] = [*sampler[0].tolist(), *sampler[1, :2].tolist()]
    return case | {"d_logits": gradient[0].tolist()}


# A prompt of one token, then the completion: its tokens and where, in bytes, each of them ends.
STUDENT, STUDENT_ENDS = [0, 5, 2, 7, 1, 8], [2, 3, 6, 7, 8]
TEACHER, TEACHER_ENDS = [0, 3, 6, 1, 2], [3, 4, 6, 8]
STUDENT_NAMES, TEACHER_NAMES = list("abcdefghi"), list("cxaybzw")


def uld(inputs, strategy, hybrid, beta, weights=(0.0, 1.0)):
    """TRL reads the probabilities of "observed" one place too late: it gets every row one place later, too."""
    student, teacher = logits_of(inputs)
    logits = [student[0], teacher[0, :5, :7]]
    if strategy == "observed":
        logits = [torch.cat([rows[:1], rows[:-1]]) for rows in logits]
    names = [{name: number for number, name in enumerate(names)} for names in (STUDENT_NAMES, TEACHER_NAMES)]
    tokenizers = [SimpleNamespace(get_vocab=lambda vocabulary=vocabulary: vocabulary) for vocabulary in names]
    config = SimpleNamespace(
        uld_crossentropy_weight=weights[0], uld_distillation_weight=weights[1], uld_student_temperature=1.0,
        uld_teacher_temperature=1.0, uld_skip_student_eos=False, uld_skip_teacher_eos=False, use_extended_uld=True,
        uld_token_merge_strategy=strategy, uld_use_hybrid_loss=hybrid, beta=beta,
    )  # fmt: skip
    offsets = []
    for ends in (STUDENT_ENDS, TEACHER_ENDS):
        offsets.append(torch.tensor([[(0, 0), *zip([0, *ends], ends)]]))
    ids = [torch.tensor([tokens]) for tokens in (STUDENT, TEACHER)]
    labels = [tokens.clone() for tokens in ids]
    for row in labels:
        row[0, 0] = -100
    loss = ULDLoss(config, *tokenizers)(*[rows[None] for rows in logits], *labels, *ids, *offsets)
    (gradient,) = torch.autograd.grad(loss, student)
    case = {"strategy": strategy, "hybrid": hybrid, "beta": beta, "weights": weights, "loss": loss.item()}
    return case | {"d_logits": gradient[0].tolist()}


def sdft(inputs, mode, alpha):
    """The mean over two completions of the means over their tokens."""
    student, teacher = logits_of(inputs)
    settings = SimpleNamespace(
        distillation_mode=mode, distillation_alpha=alpha, distillation_topk=3, distillation_add_tail=False,
        distillation_is_clip=2.0,
    )  # fmt: skip
    trainer = SimpleNamespace(
        args=settings, _log_self_distillation_metric=lambda *_: None, accelerator=SimpleNamespace(gather=lambda x: x)
    )
    tokens, mask = torch.tensor([[1, 5, 2, 7], [3, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    given = DistillationLogits(tokens, mask, *two_completions(student, teacher))
    model = SimpleNamespace(training=True)
    loss = SDFTTrainer._compute_self_distillation_loss(trainer, model, {}, given)
    (gradient,) = torch.autograd.grad(loss, student)
    case = {"mode": mode, "alpha": alpha, "top_k": 3, "labels": [1, 5, 2, 7, 3, 0], "seq": [0, 0, 0, 0, 1, 1]}
    return case | {"loss": loss.item(), "d_logits": gradient[0].tolist()}


def sdpo(inputs, mode, alpha, weight, taught):
    """By its compute_loss, which is given the logits of both models in place of the models."""
    student, teacher = logits_of(inputs)
    student_logits, teacher_logits = two_completions(student, teacher)
    tokens, mask = torch.tensor([[1, 5, 2, 7], [3, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    advantages = [0.75, -0.5]
    given = {
        "prompt_ids": tokens[:, :0], "prompt_mask": mask[:, :0], "completion_ids": tokens, "completion_mask": mask,
        "advantages": torch.tensor(advantages, dtype=torch.float64),
    }  # fmt: skip
    loss_mask = mask * torch.tensor(taught)[:, None]
    both = SimpleNamespace(
        completion_ids=tokens, completion_mask=mask, loss_mask=loss_mask, student_logits=student_logits,
        teacher_logits=teacher_logits,
    )  # fmt: skip
    settings = SimpleNamespace(
        distillation_mode=mode, distillation_alpha=alpha, distillation_topk=3, distillation_add_tail=False,
        distillation_is_clip=2.0, distillation_weight=weight,
    )  # fmt: skip
    trainer = SimpleNamespace(
        args=settings, _log_self_distillation_metric=lambda *_: None, accelerator=SimpleNamespace(gather=lambda x: x),
        model=SimpleNamespace(training=True), teacher_model=None, use_teacher_server=False, loss_type="dapo",
        importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.2, current_gradient_accumulation_steps=1,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    trainer._forward_logits = lambda **_: student_logits
    trainer._compute_teacher_student_logits = lambda *_: both
    trainer._compute_policy_loss = partial(SDPOTrainer._compute_policy_loss, trainer)
    trainer._compute_self_distillation_loss = partial(SDPOTrainer._compute_self_distillation_loss, trainer)
    loss = SDPOTrainer.compute_loss(trainer, trainer.model, given)
    (gradient,) = torch.autograd.grad(loss, student)
    case = {"mode": mode, "alpha": alpha, "weight": weight, "taught": taught, "advantages": advantages, "top_k": 3}
    case |= {"labels": [1, 5, 2, 7, 3, 0], "seq": [0, 0, 0, 0, 1, 1]}
    return case | {"loss": loss.item(), "d_logits": gradient[0].tolist()}


def solutions():
    """What SDPOTrainer lets its teacher read of rewards and feedback, in groups of four completions, "0" to "3"."""
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            device="cpu", process_index=0, gather=lambda x: x, pad_across_processes=lambda x, **_: x
        ),
        model=SimpleNamespace(training=True), num_generations=4, _tokenizer=SimpleNamespace(pad_token_id=9),
        processing_class=SimpleNamespace(decode=lambda ids, **_: str(ids.item())),
        args=SimpleNamespace(
            success_reward_threshold=0.5, dont_reprompt_on_self_success=True, use_successful_as_teacher=True,
            environment_feedback_only_without_solution=False, include_environment_feedback=True, max_reprompt_len=99,
            remove_thinking_from_demonstration=False, solution_template="\nSolution: {successful_previous_attempt}",
            feedback_template="\nFeedback: {feedback_raw}", reprompt_template="{prompt}{solution}{feedback}\nSolve it.",
        ),
    )  # fmt: skip
    read = []

    def tokenize(prompts):
        read.extend(prompts)
        return [[0] for _ in prompts]

    trainer._tokenize_prompts_untruncated = tokenize
    found = []
    for rewards in ([0, 0, 0, 0], [0, 0.25, 0.75, 0], [1, 0, 0.5, 1], [0, 1, 1, 0], [1, 1, 1, 1]):
        for feedback in ("", "no {carry}"):
            for prompt in ("3+4=", [{"role": "system", "content": "Add."}, {"role": "user", "content": "3+4?"}]):
                read.clear()
                ids, mask = torch.arange(4)[:, None], torch.ones(4, 1, dtype=torch.long)
                output = {"completion_ids": ids, "completion_mask": mask}
                builder = SuccessfulRolloutTeacherContextBuilder(trainer)
                made = builder.build(output, [prompt] * 4, torch.tensor(rewards, dtype=torch.float64), [feedback] * 4)
                case = {"rewards": rewards, "privileged_context": feedback, "prompt": prompt, "teacher": list(read)}
                found.append(case | {"taught": made["self_distillation_mask"].tolist()})
    return found


def teacher_prompts():
    """What SDFTTrainer makes of prompts and contexts, text and messages."""
    system, user = {"role": "system", "content": "Add."}, {"role": "user", "content": "3 + 4 {privileged_context}?"}
    context = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "7 {prompt}"}]
    found = []
    for template in ("{prompt}\n\n{privileged_context}", "{privileged_context} | {prompt}"):
        trainer = SimpleNamespace(args=SimpleNamespace(teacher_prompt_template=template))
        builder = DemonstrationTeacherContextBuilder(trainer)
        for prompt in ("3+4=", [user], [system, user]):
            for privileged in ("7", context):
                case = {"template": template, "prompt": prompt, "privileged_context": privileged}
                found.append(case | {"teacher": builder._compose_teacher_prompt(prompt, privileged)})
    return found


def main():
    if trl.__version__ != VERSION:
        sys.exit(f"TRL {trl.__version__} is installed, {VERSION} is wanted.")
    inputs = make_inputs()
    found = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    found["inputs"] = inputs
    found["cases"] = [distillation(inputs, beta, temperature) for beta in BETAS for temperature in TEMPERATURES]
    top_k, gkd = IWOPDTrainer.generalized_jsd_loss, GKDTrainer.generalized_jsd_loss
    found["top_k"] = [by_logits(top_k, inputs, beta=beta, top_k=k) for beta in BETAS for k in TOP_K]
    found["gkd"] = []
    for beta in BETAS:
        student, teacher = logits_of(inputs)
        labels = torch.zeros(1, TOKENS, dtype=torch.long)
        loss = gkd(student, teacher, labels, beta=beta, num_items_in_batch=1)
        (gradient,) = torch.autograd.grad(loss, student)
        found["gkd"].append({"beta": beta, "loss": loss.item(), "d_logits": gradient[0].tolist()})
    found["iw_opd"] = [iw_opd(inputs, gamma) for gamma in (0.0, 0.5)]
    names = "STUDENT STUDENT_ENDS TEACHER TEACHER_ENDS STUDENT_NAMES TEACHER_NAMES".split()
    found["uld_inputs"] = {name.lower(): globals()[name] for name in names}
    found["uld"] = []
    for strategy in ("observed", "bayesian"):
        found["uld"].append(uld(inputs, strategy, False, 0.5))
        found["uld"] += [uld(inputs, strategy, True, beta) for beta in BETAS]
    found["uld"].append(uld(inputs, "bayesian", False, 0.5, (0.3, 0.7)))  # the cross-entropy is at the right places
    found["sdft"] = [sdft(inputs, mode, a) for mode in ("topk_logits", "full_logits") for a in (0.0, 0.5, 1.0)]
    found["sdft"].append(sdft(inputs, "sampled_token", 1.0))
    found["teacher_prompts"] = teacher_prompts()
    found["sdpo"] = []
    for mode, alpha in (("topk_logits", 0.5), ("full_logits", 1.0), ("sampled_token", 1.0)):
        for weight in (0.0, 0.25, 1.0):
            for taught in ([1, 1], [0, 1], [0, 0]):
                found["sdpo"].append(sdpo(inputs, mode, alpha, weight, taught))
    found["solutions"] = solutions()
    TARGET.write_text(json.dumps(found) + "\n")
    print(f"{TARGET.name}: {len(found['cases'])} cases, {len(found['top_k'])} with top_k, {len(found['gkd'])} of GKD")


if __name__ == "__main__":
    main()
