"""How far a student is from a teacher with another tokenizer, at spans of tokens (alignment.py), chunk by chunk.

A span of the student's tokens y_1 .. y_n has the masses P(v) = p(v) prod_j p(y_j), v all tokens of its vocabulary: p(v)
is the distribution at one place, the base, and the product is over the conditional probabilities of the tokens at the
other places. The teacher has Q likewise, over its own vocabulary. G spans; of one token each, they are distributions.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from common.divergence import Teacher, divergence
from common.head import HeadGradients, row_log_probs
from common.logprobs import CHUNK, Policy, ScoredHead
from common.runtime.parallel import local


@dataclass
class OtherTeacher(Teacher):
    """A teacher with another vocabulary. matched (2, K): tokens of student and teacher that mean the same. Their masses
    are compared by `divergence`, with the first of the weights, all others by `sorted_distance`, with the second."""

    matched: torch.Tensor | None = None
    weights: tuple = (0.0, 1.0)


def sorted_distance(masses, other_masses):
    """Return sum_i abs(P_(i) - Q_(i)), (rows,), of masses (rows, V) and (rows, V'), each row sorted, the largest first,
    the shorter one continued by zeros (Boizard et al. 2024, https://arxiv.org/abs/2402.12030)."""
    width = max(masses.shape[1], other_masses.shape[1])
    ranked = []
    for part in (masses, other_masses):
        ordered = part.sort(dim=-1, descending=True).values
        ranked.append(F.pad(ordered, (0, width - part.shape[1])))
    return (ranked[0] - ranked[1]).abs().sum(-1)


def span_distance(logp, logq, teacher):
    """Return the distance of each row (rows,): logp (rows, V), logq (rows, V') are the logarithms of P and Q."""
    if teacher.matched is None:
        return sorted_distance(logp.exp(), logq.exp())
    matched, rests = [], []
    for logs, ids in zip((logp, logq), teacher.matched):
        is_rest = torch.ones(logs.shape[1], dtype=torch.bool, device=logs.device)
        is_rest[ids] = False
        matched.append(logs[:, ids])
        rests.append(logs[:, is_rest].exp())
    matched_weight, rest_weight = teacher.weights
    return matched_weight * divergence(*matched, teacher) + rest_weight * sorted_distance(*rests)


class SpanHead(torch.autograd.Function):
    """Hidden states at the bases of the student's spans, (G, D), and log prod_j p(y_j), (G,), become `span_distance`,
    (G,). The teacher has the same of its own. Rows of masses are made one chunk at a time, and again in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, log_product, transform, teacher, teacher_log_product):
        columns = 8 * (len(weight) + len(teacher.weight))  # backward has masses sorted, their places, slopes, ...
        rows = max(1, CHUNK.get(hidden.device.type, 2**28) // columns)
        ctx.chunks = [slice(start, start + rows) for start in range(0, max(1, len(hidden)), rows)]
        ctx.transform, ctx.teacher = transform, teacher
        distances = []
        for chunk in ctx.chunks:
            logp, _ = row_log_probs(hidden[chunk], weight, bias, transform, None)
            logp += log_product[chunk, None]
            logq = teacher_masses(teacher, teacher_log_product, chunk)
            distances.append(span_distance(logp, logq, teacher))
        ctx.save_for_backward(hidden, weight, bias, log_product, teacher_log_product)
        return torch.cat(distances)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_distances):
        hidden, weight, bias, log_product, teacher_log_product = ctx.saved_tensors
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad)
        d_log_product = torch.zeros_like(log_product)
        for chunk in ctx.chunks:
            logp, slope = row_log_probs(hidden[chunk], weight, bias, ctx.transform, None)
            p = logp.exp()
            logp += log_product[chunk, None]
            logq = teacher_masses(ctx.teacher, teacher_log_product, chunk)
            with torch.enable_grad():
                distances = span_distance(logp.requires_grad_(), logq, ctx.teacher)
            (d_logp,) = torch.autograd.grad(distances, logp, d_distances[chunk])
            total = d_logp.sum(-1, keepdim=True)
            d_log_product[chunk] = total[:, 0]
            gradients.add(d_logp - p * total, slope, chunk)  # through log softmax
        return *gradients.all(), d_log_product, None, None, None


def teacher_masses(teacher, log_product, chunk):
    """Return log Q of a chunk of spans, (rows, V')."""
    logq, _ = row_log_probs(teacher.hidden[chunk], teacher.weight, teacher.bias, teacher.transform, None)
    return logq + log_product[chunk, None]


def log_products(logprobs, spans):
    """Return (G,), sums over the tokens of each span but its base. logprobs (K,): theirs. spans: by `span_rows`."""
    bases, _, owners = spans
    return logprobs.new_zeros(len(bases)).index_add(0, owners, logprobs)


class SpanPolicy(Policy):
    """A policy whose divergence from an OtherTeacher is that of the batch's spans, (G,) instead of (M,). aligner: the
    script sets it."""

    aligner = None

    def read(self, hidden, batch, want):
        if "student_spans" not in batch:
            return super().read(hidden, batch, want)
        out = super().read(hidden, batch, [name for name in want if name != "divergence"])
        bases, others, _ = spans = batch["student_spans"]
        teacher_bases, teacher_others, _ = teacher_spans = batch["teacher_spans"]
        states = batch["teacher_hidden"]
        teacher = replace(self.teacher, hidden=states[teacher_bases])
        labels = batch["teacher_labels"][teacher_others]
        inputs = states[teacher_others], teacher.weight, teacher.bias, labels, teacher.transform
        with torch.no_grad():
            teacher_logprobs = ScoredHead.apply(*inputs, ())[0]
        products = log_products(out["logprobs"][others], spans)
        teacher_products = log_products(teacher_logprobs, teacher_spans)
        head = self.head()
        inputs = hidden[bases], local(head.weight), local(head.bias), products, self.transform
        out["divergence"] = SpanHead.apply(*inputs, teacher, teacher_products)
        return out
