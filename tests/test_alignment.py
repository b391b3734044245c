"""Section 7: anchors between two tokenizers, what their spans cost, the losses read out at them, and `align`."""

import functools
import itertools
import math
import unicodedata

import numpy as np
import pytest
import torch
import transformers
from conftest import ODD, TEXTS, build
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders

import refrag
from refrag_extras import align

KINDS = ("bpe", "wordpiece", "sentencepiece")
PAIRS = list(itertools.product(KINDS, KINDS))
WORDS = sorted({word for text in TEXTS for word in text.split()})
wild = st.lists(st.sampled_from(WORDS + ODD) | st.text(max_size=4), max_size=12).map("".join)


@pytest.fixture(scope="module")
def loaded(tokenizers):
    """The three kinds of tokenizers; WordPiece decodes as BERT's does, "##" joins."""
    made = {kind: transformers.AutoTokenizer.from_pretrained(tokenizers[kind]) for kind in KINDS}
    made["wordpiece"].backend_tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return made


def anchor_table(text, first, second):
    """The definition of `align.exact_anchors` as a table: (M, N) bool, O(M N) comparisons of decoded prefixes.
    A prefix that ends inside a character decodes to a replacement mark and equals nothing."""
    prefixes = []
    for tokenizer in (first, second):
        ids, seen = tokenizer(text, add_special_tokens=False)["input_ids"], {""}
        column = []
        for i in range(len(ids)):
            prefix = tokenizer.decode(ids[: i + 1], clean_up_tokenization_spaces=False)
            column.append(None if prefix in seen or prefix.endswith("\ufffd") else prefix)
            seen.add(prefix)
        prefixes.append(column)
    return np.asarray([[p is not None and p == q for q in prefixes[1]] for p in prefixes[0]], dtype=bool).reshape(
        len(prefixes[0]), len(prefixes[1]))


def both_sides(loaded, text, pair):
    return tuple(refrag.tokenize_pieces(text, loaded[kind]) for kind in pair)


@pytest.mark.parametrize("kind", KINDS)
@given(text=wild)
@settings(max_examples=60)
def test_pieces_join_to_the_decoded_text(loaded, kind, text):
    """All prefixes of the pieces are decoded prefixes. A mark of replacement at the end waits for what follows it."""
    tokens, tokenizer = refrag.tokenize_pieces(text, loaded[kind]), loaded[kind]
    assert tokens.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens.pieces) == len(tokens.ends) == len(tokens.ids)
    for n in range(1, len(tokens.ids) + 1):
        decoded = tokenizer.decode(tokens.ids[:n], clean_up_tokenization_spaces=False)
        joined = "".join(tokens.pieces[:n])
        assert joined == decoded or (decoded.startswith(joined) and decoded.endswith("\ufffd"))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for (_, end), (following, _), found in zip(offsets, [*offsets[1:], (len(text), 0)], tokens.ends, strict=False):
        assert found == (end if end <= following else -1)  # never inside a character


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@given(text=wild | st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join))
@settings(max_examples=25)
def test_exact_anchors_equal_the_table(loaded, pair, text):
    table = anchor_table(text, *(loaded[kind] for kind in pair))
    a, b = both_sides(loaded, text, pair)
    assert table.shape == (len(a.ids), len(b.ids))
    assert align.exact_anchors(a, b) == [tuple(place) for place in np.argwhere(table).tolist()]


def plain_distance(a, b):
    """The same costs by plain recursion over both strings' beginnings. A ligature counts as its first letter."""
    def letter(c):
        return unicodedata.normalize("NFKD", c)[0].lower()

    def gap(c):
        return 0.1 if c.isspace() else 1.0

    @functools.cache
    def least(i, j):
        if not i or not j:
            return sum(map(gap, a[:i])) + sum(map(gap, b[:j]))
        x, y = a[i - 1], b[j - 1]
        change = 0.0 if x == y else 0.1 if letter(x) == letter(y) else 1.0
        return min(least(i - 1, j - 1) + change, least(i - 1, j) + gap(x), least(i, j - 1) + gap(y))

    return least(len(a), len(b))


letters = st.text(alphabet="aAáÁbBcCéeEfﬁ \t\n,.1长", max_size=9)


@given(a=letters, b=letters)
@example(a="kitten", b="sitting")  # 3, Wagner and Fischer's own
@example(a="\ufb01n", b="fin")
@settings(max_examples=300)
def test_edit_distance_equals_plain_recursion(a, b):
    assert refrag.edit_distance(a, b) == pytest.approx(plain_distance(a, b))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@given(text=wild)
@settings(max_examples=25)
def test_cost_anchors_stand_where_both_end_and_rows_hold_all_tokens_in_order(loaded, pair, text):
    """Every common end in the source text is one anchor, in order; a cost is a share."""
    a, b = both_sides(loaded, text, pair)
    rows, anchors = align.anchor_rows(a, b), refrag.cost_anchors(a, b)
    assert [a.ends[x.i] for x in anchors] == [b.ends[x.j] for x in anchors]
    assert {a.ends[x.i] for x in anchors} == (set(a.ends) & set(b.ends)) - {-1, 0}
    assert all(x.i < y.i and x.j < y.j for x, y in itertools.pairwise(anchors))
    assert all(0.0 <= x.cost <= 1.0 for x in anchors)
    assert [piece for row in rows for piece in row["encoder"]] == a.pieces
    assert [piece for row in rows for piece in row["decoder"]] == b.pieces
    assert [row["cost"] for row in rows if row["cost"] is not None] == [round(x.cost, 4) for x in anchors]
    assert all(row["cost"] is not None for row in rows[:-1])
    assert all(row["encoder"] or row["decoder"] for row in rows)
    assert all(row["cost"] is not None for row in rows if row["exact"])
    assert sum(row["exact"] for row in rows) == len({(x.i, x.j) for x in anchors} & set(align.exact_anchors(a, b)))


def test_cost_anchors_their_rows_and_text_golden():
    """the -> The changes one letter of 3; cafe -> Café two of 5 (with the blank); then a rest. The decoder's cut inside
    "Café" is no anchor. Exact is what also decodes alike from the start: the first span differs, so no later one is."""
    a = refrag.Pieces([1, 2], [3, 8], ["the", " cafe"])
    b = refrag.Pieces([4, 5, 6, 7], [3, 5, 8, 9], ["The", " C", "afé", "\n"])
    anchors = refrag.cost_anchors(a, b)
    assert [(x.i, x.j) for x in anchors] == [(0, 0), (1, 2)]
    assert [x.cost for x in anchors] == pytest.approx([0.1 / 3, 0.2 / 5])
    nothing = refrag.Pieces([1, 2], [1, 2], ["", "x"])
    assert refrag.cost_anchors(nothing, nothing) == [(0, 0, 0.0), (1, 1, 0.0)]
    rows = align.anchor_rows(a, b)
    assert rows == [dict(zip(("encoder", "decoder", "exact", "cost"), row, strict=True)) for row in (
        (["the"], ["The"], False, 0.0333), ([" cafe"], [" C", "afé"], False, 0.04), ([], ["\n"], False, None))]
    assert align.anchor_text(rows).splitlines() == [
        "encoder  decoder     cost", "'the'    'The'       0.03", "' cafe'  ' C' 'afé'  0.04",
        r"         '\n'        -"]
    same = refrag.Pieces([1], [1], ["x"])
    assert align.anchor_text(align.anchor_rows(same, same)).splitlines()[1] == "'x'      'x'      ="
    assert align.anchor_text([]) == "encoder  decoder  cost"


def test_divergence_golden_and_as_torch_has_it():
    """Teacher (1/2, 1/2), student (3/4, 1/4): .5 ln(.5/.75) + .5 ln(.5/.25) = .5 ln(4/3) = .1438."""
    student, teacher = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    assert refrag.divergence(student, teacher).tolist() == pytest.approx([0.5 * math.log(4 / 3)])
    assert refrag.divergence(teacher, student).tolist() == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5)])
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = (torch.randn(7, 50, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (0, 1))
        expected = torch.nn.functional.kl_div(student.float().log_softmax(-1), teacher.float().softmax(-1),
                                              reduction="none").sum(-1)
        got = refrag.divergence(student, teacher)
        assert got.dtype == torch.float32 and got.shape == (7,) and (got > 0).all()
        torch.testing.assert_close(got, expected)


def test_align_shows_where_the_tokens_end_together(run, done, bert, llama, tokenizers):
    """The tiny BERT beside the tiny Llama, as JSON and as a table with the counts in the last line."""
    text = f"{TEXTS[2]}\n\u6c34"  # water, a character that this BERT does not have: [UNK] costs 1
    argv = ["align", "--enc", bert, "--dec", llama, "--text", text]
    result = done(*argv)
    a, b = (refrag.tokenize_pieces(text, transformers.AutoTokenizer.from_pretrained(tokenizers[kind]))
            for kind in ("wordpiece", "bpe"))
    costs, exact = [anchor.cost for anchor in refrag.cost_anchors(a, b)], len(align.exact_anchors(a, b))
    good = sum(cost <= 0.5 for cost in costs)
    assert result == result | {"encoder_tokens": len(a.ids), "decoder_tokens": len(b.ids), "exact_anchors": exact,
                               "anchors": good, "spans": align.anchor_rows(a, b)} and 0 < good < len(costs)
    code, out, err = run(*argv, "--quiet")
    assert (code, err) == (0, "") and out == (
        f"{align.anchor_text(result['spans'])}\nencoder tokens: {len(a.ids)}, decoder tokens: {len(b.ids)}, "
        f"exact anchors: {exact}, anchors: {good} (cost 0.5 or less)\n")


def test_align_of_a_decoder_with_its_own_layers_or_a_checkpoint(done, tmp_path, bert, llama):
    """decoder:N: every token that ends a character is an exact anchor. A checkpoint names the two models."""
    result = done("align", "--enc", "decoder:2", "--dec", llama, "--text", "The 🙂 notes")
    count = result["encoder_tokens"] - 3
    assert result["decoder_tokens"] - 3 == result["anchors"] == result["exact_anchors"] == len(result["spans"]) == count
    assert all(span["encoder"] == span["decoder"] and span["exact"] and span["cost"] == 0 for span in result["spans"])
    build(bert, llama).save_pretrained(tmp_path / "c")
    named = done("align", "--enc", bert, "--dec", llama, "--text", TEXTS[0])
    assert named == done("align", "--load_dir", tmp_path / "c", "--text", TEXTS[0])
