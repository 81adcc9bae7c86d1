"""Spans of two tokenisations: by hand, and as properties over random texts and tokenizers of three kinds. What a token
spells is not asked of the code under test: a tokenizer's decode says it."""

from array import array
from functools import cache

import pytest
import test_templates
import test_tokenization
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.batches import flat_batch
from common.experimental.alignment import Aligner, equal_spans, teacher_batch, token_bytes

TINY = ROOT / "common" / "tiny"


@cache
def tokenizer(kind):
    if kind in ("model", "other_teacher"):
        return AutoTokenizer.from_pretrained(TINY / kind)
    core = Tokenizer.from_str(test_templates.trained(kind))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=test_templates.SPECIAL[0])


def aligner(own, other, **options):
    own, other = tokenizer(own), tokenizer(other)
    return Aligner(own, [own.eos_token_id], other, [other.eos_token_id], **options)


def attached(align, ids):
    """A completion of these ids, behind a prompt."""
    completion = {"ids": array("i", ids), "scored": None}
    prompt = array("i", align.teacher_tokenizer.encode("a", add_special_tokens=False))
    counts = align.attach([{"teacher_prompt": prompt, "completions": [completion]}])
    return completion, counts


def places(spans):
    return [tuple(list(side) for side in span) for span in spans]


@pytest.mark.parametrize("pieces, others, expected", [
    (["un", "believ", "able", " !"], ["unbe", "lievable", " !"], [([0, 1, 2], [0, 1]), ([3], [2])]),
    (["a", "b"], ["a", "b"], [([0], [0]), ([1], [1])]),
    (["ab", "c"], ["a", "b", "c"], [([0], [0, 1]), ([1], [2])]),
    (["a", "b", "c"], ["a", "x", "c"], [([0], [0])]),  # another text from there on
    (["a", "", "b"], ["a", "b"], [([0, 1], [0]), ([2], [1])]),  # a token of nothing goes with what is before
    (["ab", "c"], ["a", "b"], [([0], [0, 1])]), (["ab"], ["b"], []), ([], [], []),
])  # fmt: skip
def test_spans_by_hand(pieces, others, expected):
    found = equal_spans([x.encode() for x in pieces], [x.encode() for x in others])
    assert places(found) == expected


KINDS = ["bytes", "metaspace", "model", "other_teacher"]
TEXTS = st.text(alphabet=st.one_of(st.sampled_from("ab 1q=+#\n"), st.characters(codec="utf-8")), max_size=20)


@pytest.mark.parametrize("own", KINDS)
@pytest.mark.parametrize("other", KINDS)
@settings(max_examples=10, deadline=None)
@given(TEXTS)
@example("q0 a1  b:ab\n\n1 2 3")
@example("\u00e9\u4e2d\U0001f600 a")
@example(" ab")
def test_spans_cover_the_same_bytes_in_order(own, other, text):
    """What the spans' tokens decode to, in pieces, is the same text on both sides, from its beginning on; they leave
    nothing out but what stands behind a character that one of the two does not know."""
    mine, theirs = tokenizer(own), tokenizer(other)
    ids = mine.encode(text, add_special_tokens=False)
    completion, (num_spans, covered) = attached(aligner(own, other), [*ids, mine.eos_token_id])
    read = completion["teacher_ids"].tolist()
    spans = places(completion["spans"])
    assert num_spans == len(spans)
    for side in (0, 1):
        flat = [place for span in spans for place in span[side]]
        assert flat == list(range(len(flat)))
        assert all(span[side] for span in spans)
    spell = [token_bytes(mine), token_bytes(theirs)]
    for first, second in spans[: len(spans) - (covered == len(ids) + 1)]:
        assert b"".join(spell[0][ids[k]] for k in first) == b"".join(spell[1][read[k]] for k in second)
    if covered == len(ids) + 1:  # with the stop token, which stands alone
        assert spans[-1] == ([len(ids)], [len(read) - 1]) and read[-1] == theirs.eos_token_id
    known = [all(t.unk_token_id is None or t.unk_token_id not in t.encode(text) for t in (mine, theirs))]
    if known == [True] and "<unk>" not in mine.convert_ids_to_tokens(ids) + theirs.convert_ids_to_tokens(read):
        assert covered == len(ids) + 1, (text, ids, read)
    if own == other and covered == len(ids) + 1 and read[:-1] == ids:
        assert spans == [([k], [k]) for k in range(len(ids) + 1)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(st.text(alphabet="ab 1q=+#\n", max_size=20))
def test_tokens_spell_what_they_decode_to(kind, text):
    """Behind other text, since SentencePiece drops a blank at the beginning."""
    mine = tokenizer(kind)
    ids = mine.encode("a" + text, add_special_tokens=False)
    spelled = b"".join(token_bytes(mine)[number] for number in ids).decode()
    assert spelled.removeprefix(" ") == mine.decode(ids, clean_up_tokenization_spaces=False) == "a" + text


def test_a_text_that_ends_inside_a_character():
    """A completion that was cut after the first of a character's three bytes: what is before it is aligned."""
    mine = tokenizer("bytes")
    ids = mine.encode("ab \u4e2d", add_special_tokens=False)[:-2]
    assert mine.decode(ids).endswith("\ufffd")
    completion, (num_spans, covered) = attached(aligner("bytes", "bytes"), ids)
    assert covered == len(ids) - 1 == num_spans
    stopped, (_, covered) = attached(aligner("bytes", "bytes"), [*ids, mine.eos_token_id])
    assert covered == len(ids) - 1  # no span of the stop tokens where the texts differ


def test_a_character_that_the_teacher_does_not_know():
    mine = tokenizer("bytes")
    ids = mine.encode("12\u00e97", add_special_tokens=False)
    completion, (_, covered) = attached(aligner("bytes", "model"), [*ids, mine.eos_token_id])
    assert mine.decode(ids[:covered]) == "12"


def test_an_id_without_a_token():
    """Of a head that is padded: no text has it, and what follows is not aligned."""
    completion, (_, covered) = attached(aligner("model", "model"), [10, 11, 5000, 12])
    assert covered == 2


def test_the_stop_tokens_and_the_order():
    """Student 1 2 # # stop, teacher 1 2 ## stop."""
    mine, theirs = tokenizer("model"), tokenizer("other_teacher")
    ids = [*mine.encode("12##"), mine.eos_token_id]
    completion, counts = attached(aligner("model", "other_teacher"), ids)
    assert places(completion["spans"]) == [([0], [0]), ([1], [1]), ([2, 3], [2]), ([4], [3])] and counts == (4, 5)
    assert completion["teacher_ids"].tolist() == [*theirs.encode("12##"), theirs.eos_token_id]
    completion, counts = attached(aligner("model", "other_teacher", with_stop=False), ids)
    assert places(completion["spans"])[-1] == ([2, 3], [2]) and counts == (3, 4)
    completion, _ = attached(aligner("model", "other_teacher"), ids[:-1])  # cut off
    assert places(completion["spans"])[-1] == ([2, 3], [2])
    completion, _ = attached(aligner("model", "other_teacher", last_is_base=True), ids)
    assert places(completion["spans"])[-2:] == [([3, 2], [2]), ([4], [3])]
    completion, _ = attached(aligner("model", "other_teacher", by_bytes=False), ids)
    assert places(completion["spans"]) == [([0], [0]), ([1], [1]), ([2], [2]), ([4], [3])]
    completion, _ = attached(aligner("other_teacher", "model"), completion["teacher_ids"])
    assert places(completion["spans"])[-2:] == [([2], [2, 3]), ([3], [4])]


def test_tokens_that_both_have():
    same = aligner("model", "model").matched_ids()
    assert same[0].tolist() == same[1].tolist() == sorted(tokenizer("model").get_vocab().values())
    mine, theirs = tokenizer("bytes"), tokenizer("metaspace")
    pairs = aligner("bytes", "metaspace").matched_ids().T.tolist()
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    assert [mine.eos_token_id, theirs.eos_token_id] in pairs
    assert [mine.get_vocab()["\u0120a"], theirs.get_vocab()["\u2581a"]] in pairs  # " a", under two names
    for a, b in pairs:
        assert mine.decode([0, a])[-1:] == theirs.decode([5, b])[-1:] or a == mine.eos_token_id


def test_bytes_of_sentencepiece():
    """<0x0A> is a byte, and the blank's sign a blank."""
    core = test_tokenization.make(metaspace=True)
    core.backend_tokenizer.decoder = decoders.Metaspace()  # which the test's tokenizer lacks
    assert token_bytes(core)[core.get_vocab()["\u2581"]] == b" "


def test_rows_of_a_batch():
    """Two completions of one prompt: places among all of the micro-batch's tokens."""
    mine = tokenizer("model")
    completions = [{"ids": array("i", mine.encode(text)), "scored": None} for text in ("1##", "12####")]
    group = {"prompt": array("i", [7]), "teacher_prompt": array("i", [9, 9]), "completions": completions, "row": 0}
    aligner("model", "other_teacher").attach([group])
    batch = flat_batch([group])
    teacher = teacher_batch(batch)
    bases, others, owners = (part.tolist() for part in batch["student_spans"])
    assert (bases, others, owners) == ([0, 1, 3, 4, 5, 7], [2, 6, 8], [1, 4, 5])
    bases, others, owners = (part.tolist() for part in batch["teacher_spans"])
    assert (bases, others, owners) == ([0, 1, 3, 4, 5, 6], [], [])  # 2 is the token that nobody looks at
    assert teacher["labels"].tolist() == batch["teacher_labels"].tolist() and len(teacher["labels"]) == 8
