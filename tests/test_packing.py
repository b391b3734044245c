"""Packing: chunk spans, neutralised text, the <doc> blocks, the prompt and the plans over it."""

import itertools
import re
import types
from fractions import Fraction

import numpy as np
import pytest
import transformers
from conftest import CHAT_TEMPLATE, ODD
from hypothesis import example, given, settings
from hypothesis import strategies as st

import refrag
from refrag_extras import generate

KINDS = ("bpe", "wordpiece", "sentencepiece")
WORDS = ["The Rhone leaves", " the ", "bridges", "notes on", "950", ". ", "don't", "río", "Mediterráneo"]
TAGS = ["</doc>", "<doc>", '<doc id="1">', "<doc id='2'>", "< / DOC", "<\n/ doc >", "<DoC", "<documents>", "<doc_x>",
        "<", "/", "doc", ">"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "[PAD]", "[MASK]",
           "[UNK]"]
NESTED = ["<s<s>>", "<|im_<|im_end|>end|>", "[S[SEP]EP]", "</</s>s>", "<</doc>/doc>", "<|im_start|>system\n",
          "|im_end|>", "im_end", "[", "SEP]", "s>"]
ordinary = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
LOOKALIKES = "\u2039\u27e6"  # what < and [ become
wild = st.lists(st.sampled_from(WORDS + ODD) | st.text(max_size=6), max_size=20).map("".join)
hostile = st.lists(st.sampled_from(TAGS + SPECIAL + NESTED + WORDS[:3] + [" ", "\n"]), max_size=12).map("".join)
few = settings(max_examples=60)


@pytest.fixture(scope="module")
def loaded(tokenizers):
    return {name: transformers.AutoTokenizer.from_pretrained(folder) for name, folder in tokenizers.items()}


@pytest.fixture(scope="module")
def chat(loaded):
    return refrag.RefragTokenizer(loaded["bpe"])


def context_of(tokenizer, texts, question="Why?", k=4, **options):
    """A question over neutralised texts."""
    docs = refrag.make_docs([tokenizer.neutralize(text) for text in texts], [None] * len(texts), k, tokenizer)
    return refrag.make_context(tokenizer, question, docs, **options)


def as_tokens(offsets):
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    return refrag.Tokens(np.arange(len(spans)), *spans.T)


def offsets_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


def special_ids(tokenizer):
    """Ids that only a template may make; the id for unknown words comes from ordinary text too."""
    unknown = {tokenizer.unk_token_id} if tokenizer.unk_token in ("[UNK]", "<unk>") else set()
    return set(tokenizer.all_special_ids) - unknown


def test_spans_of_a_100_kb_line(loaded):
    for kind, text in itertools.product(KINDS, ("x" * 100_000, " " * 100_000, "🙂" * 25_000, "a " * 50_000)):
        spans = refrag.chunk_spans(text, loaded[kind], 16)
        assert spans[0][0] == 0 and spans[-1][1] == len(text)
        assert all(a[1] == b[0] and a[0] < a[1] for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize(("kind", "text", "k", "spans"), [
    ("bpe", "xqzxqzxqz", 4, [(0, 4), (4, 8), (8, 9)]),  # nine characters that are one token each: 4 + 4 + 1
    ("bpe", "xqzxqzxqz", 8, [(0, 8), (8, 9)]), ("bpe", "xqzxqzxqz", 3, [(0, 3), (3, 6), (6, 9)]),
    ("bpe", "xq🙂z", 4, [(0, 2), (2, 3), (3, 4)]),  # the face is 4 byte tokens: the first chunk ends before it
    ("bpe", "x🙂z", 2, [(0, 1), (1, 2), (2, 3)]), ("bpe", "x🙂z", 8, [(0, 2), (2, 3)]),  # two units of 4, then the rest
    *((kind, "", 8, []) for kind in KINDS),
    ("wordpiece", " \n\t\x00 ", 4, [(0, 5)])])  # it drops these; the text must still be covered
def test_spans_golden(loaded, kind, text, k, spans):
    assert refrag.chunk_spans(text, loaded[kind], k) == spans
    with pytest.raises(ValueError, match="k >= 1"):
        refrag.chunk_spans("a", loaded[kind], 0)
    for offsets in ([(0, 1), (1, 1), (1, 2)], [(0, 0), (0, 1), (1, 2)]):  # a mark without characters, by some tokenizer
        _, ends, sizes = refrag.cut_chunks("ab", as_tokens(offsets), 1)
        assert ends.tolist() == [1, 2] and sizes.tolist() == [2, 1]


@given(allowed=st.lists(st.booleans(), max_size=40).map(lambda inner: np.array([True, *inner, True])),
       k=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 9, 63]))
@settings(max_examples=200)
def test_a_unit_is_as_long_as_it_can_be(allowed, k):
    """It ends at the last place within k tokens, or if there is none at the first one after. Multiples of 4 nest."""
    cuts = refrag.token_cuts(allowed, k).tolist()
    assert cuts[0] == 0 and cuts[-1] == len(allowed) - 1
    for a, b in itertools.pairwise(cuts):
        within = [j for j in range(a + 1, min(a + k, len(allowed) - 1) + 1) if allowed[j]]
        assert b == (within[-1] if within else next(j for j in range(a + 1, len(allowed)) if allowed[j]))
    units = refrag.token_cuts(allowed, 4).tolist()
    for n in (2, 3, 4, 8, 16):  # n units of 4 in each chunk but the last
        places = [units.index(cut) for cut in refrag.token_cuts(allowed, 4 * n).tolist()]
        assert places[:-1] == list(range(0, len(units) - 1, n)) and places[-1] == len(units) - 1


@pytest.mark.parametrize("kind", KINDS)
@given(text=wild)
@few
def test_a_text_is_cut_where_its_tokens_are(loaded, kind, text):
    """A cut stands where a character is done. The same chunks for a text and for its tokens."""
    offsets = offsets_of(loaded[kind], text)
    allowed = refrag.cut_allowed(as_tokens(offsets))
    done = [not {*range(*before)} & {*range(*after)} for before, after in itertools.pairwise(offsets)]
    assert allowed.tolist() == ([True, *done, True] if offsets else [True])
    for k in (1, 3, 4, 16):
        cuts = refrag.token_cuts(allowed, k).tolist()
        *_, sizes = refrag.cut_chunks(text, as_tokens(offsets), k)
        cumulated = [0, *np.cumsum(sizes).tolist()] if offsets else [0]
        assert cumulated == cuts if all(a < b for a, b in offsets) else {*cumulated} <= {*cuts}


@pytest.mark.parametrize("kind", KINDS)
@given(text=hostile, other=wild)
@settings(max_examples=150)
def test_neutralised_text_makes_no_special_token_and_no_tag(loaded, kind, text, other):
    decoder = loaded[kind]
    tokenizer = refrag.RefragTokenizer(decoder)
    out = tokenizer.neutralize(text)
    assert len(out) == len(text)
    assert all(a == b or (a in "<[" and b in LOOKALIKES) for a, b in zip(text, out, strict=True))
    assert not special_ids(decoder) & set(decoder(out, add_special_tokens=False)["input_ids"])
    assert not re.search(r"<\s*/?\s*doc(?!\w)", out, re.IGNORECASE)
    assert tokenizer.neutralize(out) == out
    other = re.sub(r"[<\[]", "", other)
    assert tokenizer.neutralize(other) == other


@pytest.mark.parametrize(("kind", "text", "expected"), [
    ("bpe", '</doc><doc id="7">', '\u2039/doc>\u2039doc id="7">'), ("bpe", "< / DOC", "\u2039 / DOC"),
    ("bpe", "<\n/\tdoc>", "\u2039\n/\tdoc>"), ("bpe", "<s> [SEP]", "<s> [SEP]"),
    ("bpe", "<docs> <documents> <doc_x> a<b", "<docs> <documents> <doc_x> a<b"),
    ("bpe", "<|im_end|>", "\u2039|im_end|>"), ("bpe", "<|im_<|im_end|>end|>", "<|im_\u2039|im_end|>end|>"),
    ("sentencepiece", "<s<s>>", "<s\u2039s>>"), ("sentencepiece", "</s></s>", "\u2039/s>\u2039/s>"),
    ("wordpiece", "[S[SEP]EP]", "[S\u27e6SEP]EP]"), ("wordpiece", "[MASK] [1]", "\u27e6MASK] [1]")])
def test_neutralize_golden(loaded, kind, text, expected):
    assert refrag.RefragTokenizer(loaded[kind]).neutralize(text) == expected


def test_neutralising_makes_no_new_special_token(tokenizers):
    """Disarming "<b>" makes its look-alike: one more round. The id of a literal block makes no special token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizers["bpe"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<b>", "\u2039b>", "[INST]"]})
    out = refrag.RefragTokenizer(tokenizer).neutralize("x<b>y")
    assert not special_ids(tokenizer) & set(tokenizer(out, add_special_tokens=False)["input_ids"])
    assert len(out) == 5
    tokenizer.add_tokens(["<|user|>", "<table>"])  # DeepSeek's marks of a turn are no special tokens
    tokenizer.chat_template = "<|user|>" + tokenizer.chat_template
    assert refrag.RefragTokenizer(tokenizer).neutralize("<|user|><table>") == "\u2039|user|><table>"
    context = refrag.read_context(refrag.RefragTokenizer(tokenizer), "<doc id='[INST]'>[INST]</doc>", 4, 100)
    assert tokenizer.convert_tokens_to_ids("[INST]") not in context.prompt.input_ids


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", [
    "<" + " " * 300_000, "</" + "\n" * 300_000, "<" * 200_000, "<doc id=" * 20_000,
    "<doc id='1'><" + " " * 300_000, "<doc id='1'>" + "< " * 50_000, "<doc id='" * 20_000])
def test_hostile_text_takes_linear_time(chat, text):
    """A quadratic pattern needs minutes for one of these, so the time limit ends the test."""
    assert len(chat.neutralize(text)) == len(text)
    assert [segment.kind for segment in chat.parse_and_tokenize(text)] == ["text"]


@pytest.mark.parametrize(("text", "expected"), [
    ("Question: .. <doc id='1'>..</doc> Answer:", ["Question: .. ", ("1", ".."), " Answer:"]),
    ('<doc id="a b">x</doc>', [("a b", "x")]), ("<doc  id = 'a'  >x\ny</doc>", [("a", "x\ny")]),
    ("<doc id='a'>x</doc><doc id='b'>y</doc>", [("a", "x"), ("b", "y")]), ("<doc id='a'></doc>", [("a", "")]),
    ("<doc id='a'>x", ["\u2039doc id='a'>x"]), ("x</doc>y", ["x\u2039/doc>y"]),
    ("<doc id='a'>x <doc id='b'>y</doc> z</doc>", ["\u2039doc id='a'>x ", ("b", "y"), " z\u2039/doc>"]),
    ("<doc id='a'>x</doc></doc>", [("a", "x"), "\u2039/doc>"]), ("<doc id=a>x</doc>", [("a", "x")]),
    ('<DOC ID="a">x</Doc>', [("a", "x")]), ('<doc source="b c" id="a" n=3>x</doc >', [("a", "x")]),
    ("<doc id=a source=>x</doc>", ["\u2039doc id=a source=>x\u2039/doc>"]), ("", []),
    ("<docs id=a>x</docs>", ["<docs id=a>x</docs>"]), ("<doc>x</doc>", ["\u2039doc>x\u2039/doc>"]),
    ("<doc id='a\">x</doc>", ["\u2039doc id='a\">x\u2039/doc>"]),
    ("<doc id=''>x</doc>", ["\u2039doc id=''>x\u2039/doc>"]),
    ("<doc id='<b>'>x</doc>", ["\u2039doc id='<b>'>x\u2039/doc>"]),
    ("<doc id='a'>x< / doc>y</doc>", ["\u2039doc id='a'>x\u2039 / doc>y\u2039/doc>"]),
    ("<doc id='a'><|im_end|></doc><|im_start|>", [("a", "\u2039|im_end|>"), "\u2039|im_start|>"])])
def test_parse_golden(chat, text, expected):
    """Plain text, and documents with their ids."""
    segments = chat.parse_and_tokenize(text)
    assert [(s.doc_id, s.text) if s.kind == "doc" else s.text for s in segments] == expected


@given(text=hostile)
@few
def test_segments_join_to_the_text_and_make_no_special_token(chat, text):
    def plain(value):  # undo the look-alikes and forget how an id was quoted
        return re.sub(r"<doc id=['\"](\w)['\"]>", r"<doc id=\1>", value.replace("\u2039", "<").replace("\u27e6", "["))

    segments = chat.parse_and_tokenize(text)
    joined = "".join(s.text if s.kind == "text" else f"<doc id='{s.doc_id}'>{s.text}</doc>" for s in segments)
    assert plain(joined) == plain(text)
    for s in segments:
        assert s.input_ids == chat.decoder(s.text, add_special_tokens=False)["input_ids"]
        assert not special_ids(chat.decoder) & set(s.input_ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [4, 8])
@given(text=wild | hostile.filter(lambda text: "<" not in text))
@few
def test_packed_tokens_are_the_encoders_tokens_in_order(loaded, kind, k, text):
    """One row per chunk, no special token among them. Plain text and empty documents have no rows."""
    tokenizer = refrag.RefragTokenizer(loaded["bpe"], loaded[kind])
    text = tokenizer.neutralize(text)
    before, doc, empty = tokenizer.parse_and_tokenize(f"Read: <doc id='1'>{text}</doc><doc id='2'></doc>", k)
    tokens, mask, ids = doc.packed_tokens, doc.packed_mask, loaded[kind](text, add_special_tokens=False)["input_ids"]
    assert tokens.shape == mask.shape == (len(refrag.chunk_spans(text, loaded[kind], k)), k)
    assert tokens[mask == 1].tolist() == ids and not special_ids(loaded[kind]) & set(ids)
    assert (tokens[mask == 0] == 0).all()
    assert (np.diff(mask, axis=1) <= 0).all()  # padding is on the right
    assert before.packed_tokens.shape == before.packed_mask.shape == empty.packed_tokens.shape == (0, k)
    assert doc.input_ids == loaded["bpe"](text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("text", "told"), [
    ("<doc id='1'>a</doc><doc id=\"1\">b</doc>", "same id"),  # a citation of it would name two documents
    ("Why? <doc id='1'>a", "\"<doc id='1'>a\" opens or closes no document"), ("  ", "is empty")])
def test_a_prompt_whose_documents_are_not_clear_is_refused_and_a_tokenizer_without_offsets(loaded, text, told):
    with pytest.raises(refrag.UserError, match=told):
        generate.read_prompt(text, refrag.QuestionConfig())
    slow = types.SimpleNamespace(is_fast=False)
    for pair in ([slow], [loaded["bpe"], slow]):
        with pytest.raises(refrag.UserError, match="fast tokenizer"):
            refrag.RefragTokenizer(*pair)


def template_ids(tokenizer, message):
    turn = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)


def text_of(tokenizer, prompt):
    return tokenizer.decoder.decode(prompt.input_ids.tolist())  # tokenizers by bytes give it back as it was


TWO = ["The Rhone leaves Lake Geneva and crosses the old city.", "长江 is 🙂 long.\n\nIt rises in Qinghai"]


def test_prompt_is_plain_prompting_token_for_token(chat):
    prompt = context_of(chat, TWO, "Where does it rise?").prompt
    message = ("Answer the question briefly, using the documents. Name the document you used, like [1].\n\n"
               f'<doc id="1">\n{TWO[0]}\n</doc>\n<doc id="2">\n{TWO[1]}\n</doc>\n\nQuestion: Where does it rise?')
    assert prompt.input_ids.tolist() == template_ids(chat.decoder, message)
    for (first, last), text in zip(prompt.blocks, TWO, strict=True):
        block = chat.decoder.decode(prompt.input_ids[first:last].tolist())
        assert block.startswith("<doc id=") and block.rstrip().endswith("</doc>") and text in block


@pytest.mark.parametrize(("system", "before"), [("", ""), ("Be brief.", "Be brief.\n\n")])
def test_prompt_without_documents_and_of_a_decoder_without_a_template(chat, loaded, system, before):
    """The message, then "Answer:"; and the special tokens that the tokenizer itself would add."""
    message = f"{before}Answer the question briefly.\n\nQuestion: Why?"
    prompt = context_of(refrag.RefragTokenizer(loaded["plain_bpe"]), [], system=system).prompt
    assert prompt.input_ids.tolist() == loaded["plain_bpe"](f"{message}\nAnswer:")["input_ids"]
    prompt = context_of(chat, []).prompt
    assert prompt.input_ids.tolist() == template_ids(chat.decoder, message.removeprefix(before))
    assert prompt.chunks == [] and prompt.blocks == [] and prompt.context_tokens == 0


def check_tiling(tokenizer, context):
    """Chunks tile the content in characters, and their tokens are exactly those that start in it."""
    prompt, text, at = context.prompt, text_of(tokenizer, context.prompt), 0
    starts = [s for s, _ in offsets_of(tokenizer.decoder, text)]
    for number, doc in enumerate(context.docs):
        opening = f'<doc id="{doc.label}">\n'
        base = text.index(f"{opening}{doc.content}\n</doc>", at) + len(opening)
        at = base + len(doc.content)
        mine = [c for c in prompt.chunks if c.doc == number]
        assert "".join(doc.content[c.start : c.end] for c in mine) == doc.content
        inside = [i for i, s in enumerate(starts) if base <= s < at]
        assert [i for c in mine for i in range(c.first, c.last)] == inside
        for c in mine:
            assert all(base + c.start <= starts[i] < base + c.end for i in range(c.first, c.last))
    assert prompt.context_tokens == sum(c.last - c.first for c in prompt.chunks)


@pytest.mark.parametrize(("encoder", "k"), [("bpe", 4), ("wordpiece", 8)])
@given(texts=st.lists(ordinary | wild | hostile, max_size=3), question=wild)
@few
def test_chunks_tile_every_document(loaded, encoder, k, texts, question):
    tokenizer = refrag.RefragTokenizer(loaded["bpe"], *([loaded[encoder]] if encoder != "bpe" else []))
    check_tiling(tokenizer, context_of(tokenizer, texts, question, k))
    check_tiling(tokenizer, context_of(tokenizer, TWO[:1], system=f"{TWO[0]}\nQuestion: Why?"))


@given(texts=st.lists(ordinary, min_size=1, max_size=4), share=st.floats(0, 1.5))
@few
def test_the_last_documents_are_left_out_where_they_do_not_fit(chat, texts, share):
    limit = max(1, int(share * context_of(chat, texts).prompt.context_tokens))
    context = context_of(chat, texts, ctx_max=limit)
    count = len(context.docs)
    assert context.prompt.context_tokens <= limit and count + context.left_out == len(texts)
    assert [doc.content for doc in context.docs] == texts[:count]
    assert not context.left_out or context_of(chat, texts[: count + 1]).prompt.context_tokens > limit


@given(text=hostile, question=hostile)
@few
def test_hostile_text_adds_no_special_token_to_the_prompt(chat, text, question):
    """The template opens and closes the user's turn and opens the answer's: three special tokens, always."""
    prompt = context_of(chat, [text], question).prompt
    start, end = (chat.decoder.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    assert [i for i in prompt.input_ids.tolist() if i in chat.decoder.all_special_ids] == [start, end, start]
    text = text_of(chat, prompt)
    assert text.count("</doc>") == text.count("<doc id=") == 1


def test_literal_blocks_are_the_prompts_documents(chat):
    context = refrag.read_context(chat, f"Where? <doc id='a'>{TWO[0]}</doc> <doc id=b>{TWO[1]}</doc> Say:", 4, 100)
    message = f'Where? <doc id="a">\n{TWO[0]}\n</doc> <doc id="b">\n{TWO[1]}\n</doc> Say:'
    assert context.prompt.input_ids.tolist() == template_ids(chat.decoder, message)
    assert [(doc.label, doc.content, doc.row) for doc in context.docs] == [("a", TWO[0], None), ("b", TWO[1], None)]
    assert context.question == "Where? Say:"  # what the gate reads: no word of the documents
    check_tiling(chat, context)
    with pytest.raises(refrag.UserError, match="more than --ctx_max 3"):
        refrag.read_context(chat, f"<doc id='a'>{TWO[0]}</doc>", 4, 3)


def with_template(tokenizers, template, kind="bpe"):
    return refrag.RefragTokenizer(transformers.AutoTokenizer.from_pretrained(tokenizers[kind], chat_template=template))


def test_what_a_tokenizer_adds_is_left_to_the_template(tokenizers):
    """Within a chat template only the template's own count. One that alters the message is refused."""
    tokenizer = with_template(tokenizers, "{% for m in messages %}[CLS]{{ m['content'] }}{% endfor %}", "wordpiece")
    prompt = context_of(tokenizer, [], "why").prompt
    assert prompt.input_ids.tolist() == template_ids(tokenizer.decoder, "Answer the question briefly.\n\nQuestion: why")
    assert prompt.input_ids.tolist().count(tokenizer.decoder.cls_token_id) == 1
    tokenizer.decoder.chat_template = None
    assert context_of(tokenizer, [], "why").prompt.input_ids[0] == tokenizer.decoder.cls_token_id
    tokenizer = with_template(tokenizers, "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    with pytest.raises(refrag.UserError, match="chat template"):
        context_of(tokenizer, [])


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
LEAVES_OUT = "{% set messages = messages | selectattr('role', 'ne', 'system') | list %}"


@pytest.mark.parametrize(("before", "content", "turns"), [
    ("", "message['content']", ["system", "user"]), ("", "(message['content'] | trim)", ["system", "user"]),
    (NO_SYSTEM, "message['content']", ["user"]), (LEAVES_OUT, "message['content']", ["user"])])
def test_a_system_message_has_the_place_that_the_template_gives_it(tokenizers, before, content, turns):
    """Token for token plain prompting with the same messages, or with it before the user's where there is no place."""
    template = before + CHAT_TEMPLATE.replace("message['content']", content)
    tokenizer, system = with_template(tokenizers, template), "Be brief.\n\nCite."
    context = context_of(tokenizer, TWO[:1], system=system)
    message = "".join(piece if isinstance(piece, str) else f'<doc id="1">\n{TWO[0]}\n</doc>'
                      for piece in refrag.question_pieces("Why?", context.docs))
    content = {"system": system, "user": message if "system" in turns else f"{system}\n\n{message}"}
    expected = tokenizer.decoder.apply_chat_template([{"role": role, "content": content[role]} for role in turns],
                                                     add_generation_prompt=True, return_dict=False)
    assert context.prompt.input_ids.tolist() == expected
    check_tiling(tokenizer, context)
    assert context_of(tokenizer, TWO[:1]).prompt.input_ids.tolist() == template_ids(tokenizer.decoder, message)


def bare_prompt(T, chunks, blocks=()):
    """A prompt of T tokens, 50, 51, .., with chunks given as (doc, first, last)."""
    return refrag.Prompt(50 + np.arange(T), [refrag.Chunk(d, 0, 1, a, b) for d, a, b in chunks], list(blocks))


def test_mixed_plan_golden():
    """Ten tokens, chunks over 2-3, 4-6 and 8: the second stays text, the others become vectors -1 and -3. A chunk
    without tokens, whose characters vanish into the token before, has nothing to stand for: no vector."""
    prompt = bare_prompt(10, [(0, 2, 4), (0, 4, 7), (1, 8, 9)])
    expanded = np.array([False, True, False])
    assert refrag.mixed_plan(prompt, expanded).tolist() == [50, 51, -1, 54, 55, 56, 57, -3, 59]
    assert refrag.mixed_plan(prompt, expanded, feed=False).tolist() == [50, 51, 54, 55, 56, 57, 59]
    assert refrag.mixed_plan(prompt, np.ones(3, bool)).tolist() == prompt.input_ids.tolist()
    assert np.flatnonzero(~refrag.text_mask(prompt, expanded)).tolist() == [2, 3, 8]
    without = bare_prompt(6, [(0, 1, 3), (0, 3, 3), (0, 3, 5)])
    assert refrag.mixed_plan(without, np.zeros(3, bool)).tolist() == [50, -1, -3, 55]


def test_truncated_mask_golden():
    """Frame 0, 9 and 10; documents 1-4 and 5-8 with tags 1, 4, 5, 8 around two content tokens each."""
    prompt = bare_prompt(11, [(0, 2, 4), (1, 6, 7), (1, 7, 8)], [(1, 5), (5, 9)])

    def kept(positions):
        return np.flatnonzero(refrag.truncated_mask(prompt, positions)).tolist()

    assert kept(11) == list(range(11))
    assert kept(10) == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert kept(9) == [0, 1, 2, 3, 4, 9, 10]  # emptied: its tags go too
    assert kept(6) == [0, 1, 2, 4, 9, 10]
    assert kept(5) == kept(0) == [0, 9, 10]


def test_show_plan_shows_what_each_vector_stands_for(chat):
    context = context_of(chat, TWO)
    expanded, chunk = np.arange(len(context.prompt.chunks)) != 1, context.prompt.chunks[1]
    piece = TWO[0][chunk.start : chunk.end]
    shown = refrag.show_plan(context, refrag.mixed_plan(context.prompt, expanded), chat)
    assert shown.replace(f"[[{piece}]]", piece, 1) == text_of(chat, context.prompt) != shown


def content_of(*chunks):
    return refrag.Content([np.asarray(chunk, dtype=np.int64) for chunk in chunks], [])


def shown(sequence):
    return sequence.plan.tolist(), sequence.labels.tolist()


def test_continue_plan_golden():
    """The last position of the context is asked for the answer's first token, each answer token for the next."""
    content = content_of([5, 6])
    sequence = refrag.continue_plan(np.array([1, -1]), np.array([7, 8]), content)
    assert shown(sequence) == ([1, -1, 7], [-1, 7, 8])
    assert sequence.n_labels == 2 and sequence.content is content
    assert shown(refrag.continue_plan(np.array([1]), np.array([7]), content)) == ([1], [7])
    for context, answer in (([], [7]), ([1], [])):
        with pytest.raises(ValueError, match="one position each"):
            refrag.continue_plan(np.array(context, dtype=int), np.array(answer, dtype=int), content_of())


def test_the_controls_golden():
    """Token 7, two vectors, token 8, a vector, token 9; asked for 5 after the second vector, for 4 after the third and
    for 3 after the 9. Without vectors the 7 is asked for 5 and the 8 for 4. As text the second chunk's last token, 21,
    is asked for 5, and 30 for 4. Another text has two chunks: its first is taken again for the third."""
    content = content_of([10, 11, 12], [20, 21], [30])
    sequence = refrag.TrainingSequence(np.array([7, -1, -2, 8, -3, 9]), np.array([-1, -1, 5, -1, 4, 3]), content)
    assert shown(refrag.without_vectors(sequence)) == ([7, 8, 9], [5, 4, 3])
    assert shown(refrag.with_text(sequence)) == ([7, 10, 11, 12, 20, 21, 8, 30, 9], [-1, -1, -1, -1, -1, 5, -1, 4, 3])
    other = refrag.TrainingSequence(np.array([1]), np.array([2]), content_of([40], [50]))
    wrong = refrag.with_content_of(sequence, other)
    assert shown(wrong) == ([7, -1, -2, 8, -1, 9], [-1, -1, 5, -1, 4, 3])
    assert wrong.content is other.content
    assert shown(refrag.with_content_of(sequence, sequence)) == shown(sequence)
    for control in (refrag.without_vectors, refrag.with_text):
        assert control(sequence).content is content
    assert shown(sequence) == ([7, -1, -2, 8, -3, 9], [-1, -1, 5, -1, 4, 3])  # not changed by all this
    first = refrag.TrainingSequence(np.array([-1, 7, 8]), np.array([5, 6, -1]), content)  # nothing stands before it
    assert shown(refrag.without_vectors(first)) == ([7, 8], [6, -1])


@given(chunks=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 16)), min_size=1, max_size=25),
       percent=st.integers(0, 100), floor=st.integers(0, 99))
@settings(max_examples=200)
@example(chunks=[(0, 1)] * 100, percent=7, floor=0)  # .07 * 100 is 7.000000000000001
@example(chunks=[(0, 1)] * 100, percent=29, floor=0)  # .29 * 100 is 28.999999999999996
@example(chunks=[(0, 1)] * 100, percent=100, floor=0)
@example(chunks=[(9, 4), (5, 1), (7, 5)], percent=60, floor=0)  # 6 of 10 may stay: 4; the second (5) does not fit
@example(chunks=[(9, 4), (5, 1), (7, 5)], percent=1, floor=64)  # a short context is simply read
@example(chunks=[(9, 4), (5, 1), (7, 5)], percent=0, floor=64)  # p = 0 expands nothing
def test_selection_is_a_prefix_of_the_ranking_exact_and_maximal(chunks, percent, floor):
    """The best stay text up to the first that exceeds the budget, `floor` at least while p > 0; empty ones never do."""
    scores, tokens = (np.array(column) for column in zip(*chunks, strict=True))
    chosen = refrag.select_chunks(scores, tokens, percent / 100, floor)
    budget = max(Fraction(percent, 100) * int(tokens.sum()), floor if percent else 0)
    assert chosen.dtype == bool and chosen.shape == scores.shape
    order = np.argsort(-scores, kind="stable")
    fits = [total <= budget for total in np.cumsum(tokens[order]).tolist()]
    fits[0] |= percent > 0 and floor > 0
    assert chosen[order].tolist() == [fit and size > 0 for fit, size in zip(fits, tokens[order], strict=True)]
