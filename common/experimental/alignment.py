"""Two tokenisations of one text: which tokens of the one cover the same bytes as which of the other.

A student has sampled, or read, a completion; a teacher with another tokenizer reads the same text. Between two places
where tokens of both end, a span, lie some tokens of the student and some of the teacher that spell the same bytes:

    student   "un" "believ" "able" " !"           spans: (0-2, 0-1), (3, 2)
    teacher   "unbe" "lievable"    " !"
"""
import re
from array import array
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from os.path import commonprefix

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from common.batches import flat_batch
from common.data import problem
from common.runtime.encoding import encode_rows
from common.runtime.health import check
from common.tokenization import encode_apart, encode_prompt, ids_of

BLANK = "\u2581"  # how SentencePiece writes a blank
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # of byte-level vocabularies


@lru_cache(maxsize=4)
def token_bytes(tokenizer):
    """Return {id: bytes}, the UTF-8 that each token stands for: in byte-level vocabularies, in those of SentencePiece
    with its <0x0A> for single bytes, and in those whose tokens are plain text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = repr(backend.decoder) if backend else BLANK  # without it: the SentencePiece library itself
    added = tokenizer.added_tokens_decoder
    found = {}
    for token, number in tokenizer.get_vocab().items():
        if number in added:
            found[number] = token.encode()
        elif "ByteLevel" in decoder and BYTES.keys() >= set(token):
            found[number] = bytes(BYTES[character] for character in token)
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            found[number] = bytes.fromhex(token[3:5])
        else:
            text = token.replace(BLANK, " ") if BLANK in decoder else token
            found[number] = text.encode()
    return found


def equal_spans(pieces, other_pieces):
    """Return the spans of two lists of bytes, each a pair of ranges of places in the two, in order. Where the texts
    begin to differ, because one tokenizer does not know a character or rewrites it, or ends inside one, spans end."""
    agreed = len(commonprefix([b"".join(pieces), b"".join(other_pieces)]))
    ends = list(accumulate(map(len, pieces)))
    other_ends = list(accumulate(map(len, other_pieces)))
    spans = []
    start = other_start = 0
    for end in sorted(set(ends) & set(other_ends)):
        if end <= agreed:
            stop, other_stop = bisect_right(ends, end), bisect_right(other_ends, end)
            spans.append((range(start, stop), range(other_start, other_stop)))
            start, other_start = stop, other_stop
    return spans


class Aligner:
    """Two tokenizers, with the ids that end a completion in each. by_bytes False: the k-th token of the one answers to
    the k-th of the other, whatever they cover. with_stop: the two stop tokens are a span as well. last_is_base: which
    token's distribution stands for a span, the last one's or the first one's; in `spans` it comes first."""

    def __init__(self, tokenizer, stops, teacher_tokenizer, teacher_stops, *, by_bytes=True, with_stop=True,
                 last_is_base=False):
        self.tokenizer, self.teacher_tokenizer = tokenizer, teacher_tokenizer
        self.by_bytes, self.with_stop, self.last_is_base = by_bytes, with_stop, last_is_base
        own, theirs = token_bytes(tokenizer), token_bytes(teacher_tokenizer)
        usual = teacher_tokenizer.eos_token_id
        if usual not in teacher_stops:
            usual = teacher_stops[0]
        spelled = {theirs[stop]: stop for stop in reversed(teacher_stops)}
        self.stops = {stop: spelled.get(own[stop], usual) for stop in stops}  # of the student: the teacher's

    def prepare(self, run, groups):
        """Return the groups with teacher_prompt, what the teacher reads as their prompt; a row that its chat template
        refuses is left out. TEACH002: how much of what the first prompts say it cannot follow."""
        if not groups:
            return groups
        rows = {group["row"]: group["columns"] for group in groups}
        read = encode_rows(run, list(rows.values()), encode_prompt, self.teacher_tokenizer, ())
        prompts = {group["row"]: group["prompt"] for group in read}
        groups = [{**group, "teacher_prompt": prompts[group["row"]]} for group in groups if group["row"] in prompts]
        covered = total = 0
        for group in groups[:64]:  # what a prompt says, as if it were a completion
            prompt = group["columns"]["prompt"]
            texts = [prompt] if isinstance(prompt, str) else [str(message["content"]) for message in prompt]
            samples = [{"ids": array("i", ids_of(self.tokenizer, text))} for text in texts if text]
            covered += self.attach([{**group, "completions": samples}])[1]
            total += sum(len(sample["ids"]) for sample in samples)
        check_lost(run, 0, 1 - covered / max(1, total))
        for group in groups:
            if any(completion["scored"] for completion in group["completions"]):
                raise problem(group["columns"], "a completion has several turns", "", "Write one turn, or --lmbda 1")
        return groups

    def attach(self, groups):
        """Set of every completion teacher_ids, the teacher's tokens of its text and a stop token, and spans: pairs of
        places in ids and in teacher_ids. Bytes that are no whole character end what is aligned. Return how many spans
        there are, and how many of the student's tokens are in them."""
        own, theirs = token_bytes(self.tokenizer), token_bytes(self.teacher_tokenizer)
        num_spans = covered = 0
        for group in groups:
            for completion in group["completions"]:
                ids = completion["ids"].tolist()
                stop = ids.pop() if ids[-1] in self.stops else None
                pieces = [own.get(token, b"\xff") for token in ids]  # an id that no text has is no character
                text = whole_characters(b"".join(pieces))
                teacher_ids = encode_apart(self.teacher_tokenizer, group["teacher_prompt"].tolist(), text)
                spans = equal_spans(pieces, [theirs[token] for token in teacher_ids])
                last, teacher_last = len(ids), len(teacher_ids)
                is_whole = span_ends(spans) == (last, teacher_last)
                if not self.by_bytes:
                    spans = [(range(k, k + 1), range(k, k + 1)) for k in range(min(last, teacher_last))]
                if stop is not None and self.with_stop and (is_whole or not self.by_bytes):
                    spans.append((range(last, last + 1), range(teacher_last, teacher_last + 1)))
                teacher_ids.append(self.stops.get(stop, min(self.stops.values())))  # without a span nobody looks at it
                if self.last_is_base:
                    spans = [tuple([*side[-1:], *side[:-1]] for side in span) for span in spans]
                completion.update(teacher_ids=array("i", teacher_ids), spans=spans)
                num_spans += len(spans)
                covered += sum(len(places) for places, _ in spans)
        return num_spans, covered

    def matched_ids(self):
        """Return (2, K): ids of the student and of the teacher that stand for the same bytes, or that end a completion.
        Control tokens match control tokens only, and of several alike the first the first."""
        ids_by_key = []
        for tokenizer in (self.tokenizer, self.teacher_tokenizer):
            control, seen, ids = tokenizer.added_tokens_decoder, {}, {}
            for number, spelled in sorted(token_bytes(tokenizer).items()):
                kind = number in control, spelled
                seen[kind] = seen.get(kind, 0) + 1
                ids[*kind, seen[kind]] = number
            ids_by_key.append(ids)
        own, theirs = ids_by_key
        pairs = {own[key]: theirs[key] for key in own if key in theirs}
        for stop, teacher_stop in self.stops.items():
            if stop not in pairs and teacher_stop not in pairs.values():
                pairs[stop] = teacher_stop
        return torch.tensor(sorted(pairs.items())).view(-1, 2).T


def span_ends(spans):
    """Return how many tokens of the two lie in the spans or before."""
    return (spans[-1][0].stop, spans[-1][1].stop) if spans else (0, 0)


def whole_characters(data):
    """Return the text of the bytes up to the first that belongs to no whole character."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def check_lost(run, step, lost_frac):
    """TEACH002: the share of the student's tokens that are in no span."""
    check(
        run, "TEACH002", step=step, metric="lost_frac", value=lost_frac, warn=0.05, error=0.5,
        message="of the tokens the teacher's tokenizer cannot follow the text, and nothing is learned there",
    )  # fmt: skip


def teacher_batch(batch):
    """Return the teacher's flat batch for a student's, whose groups went through Aligner.attach, and set in the latter
    student_spans and teacher_spans, see `span_rows`, and teacher_labels (T,): the teacher's tokens."""
    groups = []
    for group in batch["groups"]:
        completions = [{"ids": completion["teacher_ids"], "scored": None} for completion in group["completions"]]
        groups.append({"prompt": group["teacher_prompt"], "completions": completions, "row": group["row"]})
    device = batch["rows"].device
    teacher = flat_batch(groups, device)
    batch["student_spans"] = span_rows(batch["completions"], "ids", 0, device)
    batch["teacher_spans"] = span_rows(batch["completions"], "teacher_ids", 1, device)
    batch["teacher_labels"] = teacher["labels"]
    return teacher


def span_rows(completions, ids, side, device):
    """Return of the G spans of all completions the base's place among all tokens, (G,), and of the K other tokens in
    spans the place and the span, (K,) each. ids, side: "ids" and 0 for the student's, "teacher_ids" and 1."""
    bases, others, owners = [], [], []
    start = 0
    for completion in completions:
        for span in completion["spans"]:
            base, *rest = [start + place for place in span[side]]
            others += rest
            owners += [len(bases)] * len(rest)
            bases.append(base)
        start += len(completion[ids])
    return tuple(torch.tensor(numbers, dtype=torch.long, device=device) for numbers in (bases, others, owners))
