"""Section 10: the curriculum, what each phase reads, the loop, its checkpoints, and phases one after the other."""

import itertools
import json
import math
import multiprocessing
import shutil
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import CORPUS, RUNTIME, TEXTS, build, trained
from safetensors.torch import load_file
from writers import write_rows

import refrag
from refrag_extras import reports, runs
from refrag_extras.train import text_kinds

PHASES = ("cpt_align", "cpt_recon", "cpt_next", "sft")
MIX = ("--mix", "recon=.3,next=.2,cloze=.5", "--mix_end", "qa=1")
START, END = 1, 2  # the tiny decoders' tokens for the start of a sequence and the end of an answer


@pytest.fixture(autouse=True)
def no_pictures(home, monkeypatch) -> None:  # they take longer than a step
    monkeypatch.setattr(reports, "draw_losses", lambda *_: None)


@pytest.fixture(scope="module")
def separate(llama, bert) -> refrag.ChunkEncoder:
    """The tiny BERT, which reads each chunk by itself."""
    return build(bert, llama).encoder


@pytest.fixture(params=["whole", "separate"])
def encoder(request) -> refrag.ChunkEncoder:
    return request.getfixturevalue(request.param)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_curriculum_is_the_published_one():
    """Rows of one chunk and of 256, as the paper prints them; all are geometric, and end with four times as many."""
    table = refrag.curriculum_table(9)
    printed = np.round(table).astype(int).tolist()
    assert printed[0] == [1333, 445, 148, 49, 16, 6, 2, 1, 0] and printed[8] == [1, 3, 9, 25, 73, 212, 618, 1802, 5259]
    assert table[:, 0].tolist() == [1333, 333, 83, 20, 5, 1, 1, 1, 1]
    assert table.sum(1) == pytest.approx([2000] * 3 + [4000] * 3 + [8000] * 3)
    ratios = table[:, 1:] / table[:, :-1]
    assert np.ptp(ratios, axis=1).max() < 1e-9 and (np.diff(ratios[:, 0]) > -1e-9).all()


@pytest.mark.parametrize(("kind", "lengths"), [("paper", refrag.curriculum_table(9).sum(0)), ("even", np.ones(9))])
def test_the_mixture_moves_from_short_texts_to_long_ones(kind, lengths):
    """In the end half of the samples are of the longest three of nine kinds, two in a hundred of the shortest. Stages
    are even, or as long as their samples."""
    weights = np.stack([refrag.curriculum_weights(p, 9, kind) for p in np.linspace(0, 0.999, 50)])
    assert weights.sum(1) == pytest.approx(np.ones(50)) and (weights > 0.01).all()  # nothing learned is left out
    assert weights[0, 0] > 0.5 and (np.diff(weights @ 2 ** np.arange(9)) > -1e-9).all()
    assert weights[-1, -3:].sum() > 0.5 and weights[-1, 0] == pytest.approx(0.02, abs=0.005)
    for end in (np.cumsum(lengths) / lengths.sum())[:-1]:
        before, after = (refrag.curriculum_weights(end + step, 9, kind) for step in (-1e-6, 1e-6))
        assert (before != after).any()
    assert refrag.curriculum_weights(0.5, 1, kind).tolist() == [1]
    assert refrag.curriculum_weights(0.5, 4, "none").tolist() == [0, 0, 0, 1]


def test_learning_rate_by_hand():
    """Ten steps, two of warm-up: 1/2, 1, then (1 + cos(pi n / 8)) / 2 for n = 0 .. 7."""
    factors = [refrag.learning_rate_factor(step, 10, 0.2) for step in range(10)]
    root = math.sqrt(0.5)  # cos(pi / 4)
    assert factors[:3] == [0.5, 1, 1] and min(factors) == factors[9] > 0
    assert factors[4:10:2] == pytest.approx([(1 + root) / 2, 0.5, (1 - root) / 2])
    assert [refrag.learning_rate_factor(step, 4, 0.0) for step in (0, 2)] == pytest.approx([1, 0.5])
    assert refrag.learning_rate_factor(0, 1, 0.04) == 1


# -- the token cache ---------------------------------------------------------------------

def test_cached_texts_are_their_tokens(tmp_path, whole):
    """Against the tokenizer itself. A cut may stand where what comes before decodes without a broken character."""
    decoder, path = whole.tokenizer.decoder, tmp_path / "texts.jsonl"
    texts = [*TEXTS, "\U0001f642 is four bytes."]
    read = refrag.Texts([str(write_rows(path, [{"text": text} for text in texts]))], whole.tokenizer, 10**6, 1)
    assert len(read) == len(read.table) == len(texts)
    for number, text in enumerate(texts):
        expected = decoder(text, add_special_tokens=False)["input_ids"]
        ids, cuts, context, where = read.read(number)
        assert ids.tolist() == expected and ids.dtype == np.int64
        clean = [not decoder.decode(expected[:i]).endswith("\ufffd") for i in range(len(expected) + 1)]
        assert (cuts.tolist(), context, where) == (clean, 0, f"{path}:{number + 1}")
        for first, last in itertools.combinations(range(len(expected) + 1), 2):  # moved to where no character is cut
            read.windows = np.asarray([[number, first, last]])
            ids = read.read(0).ids
            start = max(i for i in range(first + 1) if clean[i])
            end = max((i for i in range(start + 1, last + 1) if clean[i]), default=None)
            assert ids.tolist() == expected[start : end or clean.index(True, start + 1)]
        read = refrag.Texts([str(path)], whole.tokenizer, 10**6, 1)
    assert not all(clean), "no character of several tokens: the test would show nothing"


def test_texts_are_tokenised_once_and_mapped(tmp_path, home, whole):
    """A cache that is there needs no writing: on a read-only disk there is no place for a lock."""
    path = str(write_rows(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS]))
    first = refrag.token_table([path], whole.tokenizer)
    [made] = (home / "tokens").glob("*.arrow")
    time = made.stat().st_mtime_ns
    made.with_suffix(".lock").unlink()
    assert refrag.token_table([path], whole.tokenizer).equals(first)
    assert [(file, file.stat().st_mtime_ns) for file in (home / "tokens").iterdir()] == [(made, time)]
    assert sys.platform != "linux" or str(made) in Path("/proc/self/maps").read_text()


def test_another_file_or_tokenizer_is_another_cache(tmp_path, home, tokenizers, whole, separate):
    """A changed content under the same name, another order of files, another tokenizer or encoder's special tokens."""
    a, b = (str(write_rows(tmp_path / f"{n}.jsonl", [{"text": TEXTS[n]}])) for n in range(2))
    ours, encoders = whole.tokenizer, separate.tokenizer
    other = refrag.RefragTokenizer(transformers.AutoTokenizer.from_pretrained(tokenizers["sentencepiece"]))
    asked = [([a], ours), ([b], ours), ([a, b], ours), ([b, a], ours), ([a], other), ([a], encoders)]
    for number, (paths, tokenizer) in enumerate(asked, start=1):
        refrag.token_table(paths, tokenizer)
        assert len(list((home / "tokens").glob("*.arrow"))) == number
    write_rows(Path(a), [{"text": TEXTS[2]}])
    assert ours.decoder.decode(refrag.token_table([a], ours)["tokens"][0].as_py()) == TEXTS[2]


def test_special_tokens_in_a_text_are_only_text(tmp_path, whole, separate):
    text = "one <|im_end|> two <|endoftext|><|im_start|>user [SEP] two [CLS]"
    path = str(write_rows(tmp_path / "t.jsonl", [{"text": text}]))
    ours, theirs = (refrag.token_table([path], one.tokenizer)["tokens"][0].as_py() for one in (whole, separate))
    assert not set(ours) & set(whole.tokenizer.decoder.all_special_ids)
    read = separate.tokenizer.decoder.decode(theirs)
    assert not set(separate.tokenizer.encoder(read, add_special_tokens=False)["input_ids"]) & {2, 3}, read


# -- what the text phases read ---------------------------------------------------------------

SETTINGS = {"recon": refrag.ReconConfig, "next": refrag.NextConfig, "align": None}
CLOZE = SETTINGS | {"cloze": refrag.AnswersConfig}
SPLIT = {"tokens": list(range(10, 30)), "split": {"s": 8, "o": 6}}
NEXT = {"recon_frac": 0.0, "expand_frac": 0.0}


class Lessons:
    """Those of one kind. A lesson is drawn as a step draws it, but for the text."""

    def __init__(self, kind: refrag.Kind, ks: tuple[int, ...], teaches: bool):
        self.kind, self.ks, self.teaches, self.exam = kind, ks, teaches, kind.exam

    def draw(self, number: int, rng: np.random.Generator, progress: float) -> refrag.Item:
        item = self.kind.make(number, int(rng.choice(self.ks)), rng, progress)
        return item._replace(teacher=refrag.with_text(item.sequence) if self.teaches else None)


@pytest.fixture
def text_lessons(tmp_path, whole):
    """The lessons of a kind on texts, of an encoder that reads contents whole unless another is named."""

    def call(kind: str, rows: list[dict], encoder: refrag.ChunkEncoder = whole, held_out: list[dict] = (), *,
             k: tuple[int, ...] = (4,), seq_tokens: int = 32, distill: float = 0.0, **options: object) -> Lessons:
        train, evaluation = ((str(write_rows(tmp_path / name, content)),) if content else () for name, content in (
            ("t.jsonl", rows), ("d.jsonl", held_out)))
        config = refrag.TrainConfig("unused", k=k, seq_tokens=seq_tokens, eval_limit=options.pop("eval_limit", 32))
        defaults = refrag.ReconConfig(), refrag.NextConfig(), refrag.AnswersConfig(), refrag.SearchConfig()
        settings = [CLOZE[kind](**options)] if CLOZE[kind] else []
        given = {type(c): c for c in (*defaults, *settings, config, refrag.TextConfig(train, evaluation))}
        return Lessons(text_kinds([kind], given, encoder)[kind], k, bool(distill) or kind == "align")

    return call


def asked(sequence: refrag.TrainingSequence) -> list[int]:
    return sequence.labels[sequence.labels >= 0].tolist()


def test_reconstruction_reads_all_vectors_then_the_mark_then_the_text(tmp_path, text_lessons, whole):
    """Ten tokens, k = 4: chunks of 4, 4 and 2. The last token is only said, never read."""
    ids = list(range(10, 20))
    item = text_lessons("recon", [{"tokens": ids}], curriculum="none").draw(0, rng(), 0.0)
    repeat = whole.tokenizer.decoder("\n\nRepeat:\n", add_special_tokens=False)["input_ids"]
    plan, labels, content = item.sequence
    assert plan.tolist() == [START, -1, -2, -3, *repeat, *ids[:-1]]
    assert labels.tolist() == [-1] * (3 + len(repeat)) + ids
    assert [chunk.tolist() for chunk in content.chunks] == [ids[:4], ids[4:8], ids[8:]]
    [(read, owner)] = content.rows
    assert read.tolist() == ids and owner.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert item.teacher is None and item.where == f"{tmp_path / 't.jsonl'}:1"
    assert (item.positions, item.tokens) == (4 + len(repeat) + 9, 1 + len(repeat) + 9 + 10)


def test_reconstruction_draws_runs_of_the_curriculums_lengths(text_lessons):
    """1, 2, 4 or 8 chunks of 4 tokens from anywhere in the text, short ones first; of a shorter text, all."""
    lessons = text_lessons("recon", [{"tokens": list(range(100, 140))}, {"tokens": [7, 8, 9, 10, 11]}], seq_tokens=40)
    first, last, *short = ([asked(lessons.draw(text, rng(n), progress).sequence) for n in range(60)]
                           for text in (0, 1) for progress in (0.0, 0.99))
    assert all(ids == list(range(ids[0], ids[0] + len(ids))) for ids in [*first, *last])
    starts, early, late = {ids[0] for ids in [*first, *last]}, Counter(map(len, first)), Counter(map(len, last))
    assert set(early) | set(late) == {4, 8, 16, 32} and early[4] > 30 and late[32] > late[4]
    assert min(starts) == 100 and max(starts) > 130
    short = [*short[0], *short[1]]
    assert [7, 8, 9, 10, 11] in short and {len(ids) for ids in short} == {4, 5}


def test_long_texts_become_several_windows_and_short_ones_are_told(text_lessons, capsys):
    """54 tokens in windows of 24, 24 and 6, each read whole; 3 tokens are no chunk of 4."""
    rows = [{"tokens": list(range(100, 154))}, {"tokens": [5, 6, 7]}, {"tokens": list(range(30, 35))}]
    lessons = text_lessons("recon", rows, curriculum="none", seq_tokens=24)
    said = [asked(lessons.draw(n, rng(), 0.0).sequence) for n in range(lessons.kind.count)]
    assert said == [list(range(100, 124)), list(range(124, 148)), list(range(148, 154)), list(range(30, 35))]
    assert "1 texts of fewer than 4 tokens are left out" in capsys.readouterr().err
    rows = [{"tokens": list(range(100, 140)), "split": {"s": 6, "o": 34}}]  # the first window's; then halves
    lessons = text_lessons("next", rows, seq_tokens=16, **NEXT)
    assert [len(asked(lessons.draw(n, rng(), 0.0).sequence)) for n in range(3)] == [10, 8, 4]


def test_next_compresses_the_context_and_asks_for_what_follows(text_lessons):
    """s = 8 and o = 6 of 20 tokens: two vectors, six tokens asked, six never seen. A teacher reads it all as text."""
    ids = SPLIT["tokens"]
    item = text_lessons("next", [SPLIT], **NEXT).draw(0, rng(), 0.0)
    assert item.sequence.plan.tolist() == [START, -1, -2, *ids[8:13]]
    assert item.sequence.labels.tolist() == [-1, -1, *ids[8:14]]
    assert [chunk.tolist() for chunk in item.sequence.content.chunks] == [ids[:4], ids[4:8]]
    assert item.teacher is None
    item = text_lessons("next", [SPLIT], distill=1.0, **NEXT).draw(0, rng(), 0.0)
    assert item.teacher.plan.tolist() == [START, *ids[:13]]
    assert item.teacher.labels.tolist() == [-1] * 8 + ids[8:14]
    assert item.positions == 14


@pytest.mark.parametrize(("tokens", "split", "context"), [
    (20, {}, 10), (21, {}, 10), (10, {"s": 8, "o": 6}, 8), (9, {"s": 8, "o": 6}, 8), (8, {"s": 8, "o": 6}, 4),
    (5, {"s": 8, "o": 6}, 2), (20, {"s": 1, "o": 19}, 1), (20, {"s": 19, "o": 1}, 19), (20, {"s": 8}, 8)])
def test_texts_shorter_than_their_split_are_used(text_lessons, tokens, split, context):
    """As far as the split goes; where nothing would be left to predict, half of the text is. Without o, all is said."""
    rows = [{"tokens": list(range(10, 10 + tokens)), "split": split}]
    sequence = text_lessons("next", rows, **NEXT).draw(0, rng(), 0.0).sequence
    assert sum(map(len, sequence.content.chunks)) == context
    assert asked(sequence) == list(range(10 + context, 10 + tokens))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_share_of_the_chunks_stays_text_on_average(text_lessons, share):
    """40 chunks, 120 draws: the mean is within .06 of the share; order and place stay as they were."""
    ids, shares = list(range(100, 300)), []
    lessons = text_lessons("next", [{"tokens": ids, "split": {"s": 160, "o": 40}}], seq_tokens=200,
                           recon_frac=0.0, expand_frac=share)
    for n in range(120):
        sequence = lessons.draw(0, rng(n), 0.0).sequence
        assert refrag.with_text(sequence).plan.tolist() == [START, *ids[:-1]]
        assert asked(sequence) == ids[160:]
        shares.append(1 - (sequence.plan < 0).sum() / 40)
    assert np.mean(shares) == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_contexts_is_reconstructed_instead(text_lessons, whole, share):
    ids, mark = SPLIT["tokens"], whole.tokenizer.decoder("\n\nRepeat:\n", add_special_tokens=False)["input_ids"]
    lessons = text_lessons("next", [SPLIT], recon_frac=share, expand_frac=0.0)
    drawn = [lessons.draw(0, rng(n), 0.0).sequence for n in range(200)]
    repeated = [s for s in drawn if asked(s) == ids[:8]]
    assert len(repeated) / 200 == pytest.approx(share, abs=0.1)
    assert all(asked(s) == ids[8:14] for s in drawn if not any(s is r for r in repeated))
    assert all(s.plan.tolist() == [START, -1, -2, *mark, *ids[:7]] for s in repeated)


def test_alignment_asks_teacher_and_student_the_same(text_lessons):
    """Chunks of 4, 4 and 2 tokens: after the first two, what comes next; nothing is known after the last."""
    ids = list(range(10, 20))
    item = text_lessons("align", [{"tokens": ids}]).draw(0, rng(), 0.0)
    assert item.sequence.plan.tolist() == [START, -1, -2, -3]
    assert item.sequence.labels.tolist() == [-1, 14, 18, -1]
    assert item.teacher.plan.tolist() == [START, *ids]
    assert item.teacher.labels.tolist() == [-1, -1, -1, -1, 14, -1, -1, -1, 18, -1, -1]


@pytest.mark.parametrize("k", [2, 4, 8])
def test_alignment_with_a_separate_encoder_cuts_at_anchors(text_lessons, separate, k):
    """Each run of k tokens ends at the last place, at or before its end, where both tokenizers end a token."""
    lessons = text_lessons("align", [{"text": text} for text in TEXTS], separate, k=(k,), seq_tokens=512)
    encoder, decoder = separate.tokenizer.encoder, separate.tokenizer.decoder
    for number, text in enumerate(TEXTS):
        item = lessons.draw(number, rng(), 0.0)
        student, teacher = item.sequence, item.teacher
        chunks = student.content.chunks
        assert np.concatenate(chunks).tolist() == decoder(text, add_special_tokens=False)["input_ids"]
        assert student.plan.tolist() == [START, *range(-1, -len(chunks) - 1, -1)]
        assert asked(student) == asked(teacher) == [chunk[0] for chunk in chunks[1:]]
        both = [{end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"]} for tokenizer in (encoder, decoder)]
        runs = separate.tokenizer.cut([text], k)[0].ends.tolist()
        expected = {max((end for end in both[0] & both[1] if end <= run), default=0) for run in runs[:-1]} - {0}
        ends = np.cumsum([len(decoder.decode(chunk.tolist())) for chunk in chunks]).tolist()
        assert ends == [*sorted(expected), len(text)] and len(ends) > 1
        assert [owner.max() for _, owner in student.content.rows] == list(range(len(chunks)))
        assert [ids.tolist() for ids, _ in student.content.rows] == [
            encoder(text[a:b])["input_ids"] for a, b in itertools.pairwise([0, *ends])]


def test_next_feeds_no_vector_of_a_chunk_without_tokens_of_the_decoder(text_lessons, separate):
    rows = [{"text": f"{TEXTS[4].partition(' ')[0] * 2} {TEXTS[1]}"}]
    lessons = text_lessons("next", rows, separate, seq_tokens=512, k=(1,), **NEXT)
    sequence = lessons.draw(0, rng(), 0.0).sequence
    fed = {-v - 1 for v in sequence.plan.tolist() if v < 0}
    empty = {n for n, chunk in enumerate(sequence.content.chunks) if not len(chunk)}
    assert empty and fed == set(range(len(sequence.content.chunks))) - empty


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_separate_encoder_reads_no_half_characters(text_lessons, separate, kind):
    """Windows and runs may begin inside a character of several tokens; what is read as text may not."""
    lessons = text_lessons(kind, [{"text": "río más allá 🙂🙂 ñandú año " * 3}], separate, seq_tokens=21)
    drawn = [lessons.draw(n, rng(seed), 0.0) for n in range(lessons.kind.count) for seed in range(9)]
    texts = [separate.tokenizer.decoder.decode(np.concatenate(i.sequence.content.chunks).tolist()) for i in drawn]
    assert [text for text in texts if "\ufffd" in text] == []


@pytest.mark.parametrize(("kind", "names"), [
    ("next", "k4 k8"), ("align", "k4 k8"), ("recon", "k4/1 k4/2 k4/4 k4/8 k8/1 k8/2 k8/4")])
def test_the_exam_is_always_the_same_and_has_each_k(tmp_path, text_lessons, kind, names):
    rows = [{"tokens": list(range(n, n + 32))} for n in (100, 200, 300)]
    assert text_lessons(kind, rows).exam == {}
    exam, again = (text_lessons(kind, rows, held_out=rows, k=(4, 8), eval_limit=2).exam for _ in range(2))
    assert list(exam) == names.split()
    for name, items in exam.items():
        assert [item.where for item in items] == [f"{tmp_path / 'd.jsonl'}:{n}" for n in (1, 3)]
        assert all(np.array_equal(a.sequence.plan, b.sequence.plan) for a, b in zip(items, again[name], strict=True))


@pytest.mark.parametrize("kind", ["cloze", "align"])
def test_the_exam_leaves_out_what_asks_nothing(text_lessons, kind):
    """A text without a name to leave out, or of one chunk: their loss would be 0."""
    rows = [{"text": "and so on " * 2}, {"text": f"so it is in Rome {'and so on ' * 9}"}]
    exam = text_lessons(kind, rows, held_out=rows, k=(4, 32), seq_tokens=200).exam
    assert [item.where[-1] for item in exam["k32"]] == ["2"]


def test_the_exam_compresses_all_has_each_length_and_repeats_nothing(text_lessons):
    rows = [{"tokens": list(range(100, 140))}, {"tokens": list(range(200, 210))}]
    exam = text_lessons("next", rows, held_out=rows, recon_frac=1.0, expand_frac=1.0, seq_tokens=40).exam
    assert [item.sequence.plan.tolist() for item in exam["k4"]] == [
        [START, -1, -2, -3, -4, -5, *range(120, 139)], [START, -1, -2, *range(205, 209)]]
    exam = text_lessons("recon", rows, held_out=rows).exam
    assert {name: [len(asked(i.sequence)) for i in items] for name, items in exam.items()} == {
        "k4/1": [4, 4, 4], "k4/2": [8, 8, 8], "k4/4": [16], "k4/8": [32]}


@pytest.mark.parametrize(("text", "blanks"), [
    ("Rain fell. The tower by Gustave Eiffel is old.", {("The tower by ____ is old.", "Gustave Eiffel")}),
    ("It opened on May 31, 1889, in Paris. Then 7 left.", {
        ("It opened on ____ 31, 1889, in Paris.", "May"), ("It opened on May 31, ____, in Paris.", "1889"),
        ("It opened on May ____, 1889, in Paris.", "31"), ("It opened on May 31, 1889, in ____.", "Paris")}),
    ("Paris is where Paris is.", set()), ("no name here. None there.", set()), (f"In {'x ' * 200} Paris.", set())])
def test_a_name_or_number_of_a_sentence_is_left_out(text, blanks):
    assert {refrag.blank_out(text, rng(seed)) for seed in range(60)} - {None} == blanks


def test_a_blank_is_filled_from_one_of_several_passages(text_lessons, whole):
    """The answer fills the gap and cites its passage, at any place; all is compressed, or a share stays text."""
    rows, decoder = [{"text": text} for text in TEXTS], whole.tokenizer.decoder
    lessons, counts, places = text_lessons("cloze", rows, seq_tokens=2000, p=(0.0, 0.5)), Counter(), set()
    for number, seed in itertools.product(range(len(TEXTS)), range(20)):
        item = lessons.draw(number, rng(20 * number + seed), 0.0)
        if not item.sequence.n_labels:
            counts["without"] += 1
            assert refrag.blank_out(TEXTS[number], rng()) is None
            continue
        full = refrag.with_text(item.sequence).plan
        prompt, said = decoder.decode(full.tolist()), decoder.decode(asked(item.sequence))
        answer, label = said.removesuffix("<|im_end|>").rsplit(" [", 1)
        question = prompt.rpartition("Fill in the blank: ")[2].partition("<|im_end|>")[0]
        assert question.replace("____", answer) in TEXTS[number]
        [shown] = [part for part in prompt.split("<doc id=") if part.startswith(f'"{label[:-1]}"')]
        assert TEXTS[number] in shown and number in item.sources and len(set(item.sources)) == len(item.sources)
        counts[len(item.sources)] += 1
        places.add((len(item.sources), label))
        counts["text"] += any(len(item.sequence.content.chunks[n]) for n in open_chunks(item))
    assert {1, 2, 4} <= set(counts) and {(3, "1]"), (3, "2]"), (3, "3]")} <= places
    assert 20 < counts["text"] < 80
    assert (lessons.draw(0, rng(), 1.0).sequence.plan < 0).any()  # the evaluation compresses all


# -- what the answer phase reads ---------------------------------------------------------------

QUESTIONS = [
    {"id": "q1", "question": "Which river crosses the old city?", "answers": ["Rhone"], "positive_ids": ["a"]},
    {"id": "q2", "question": "What do smiths in the valley cast?", "answers": ["bells"], "positive_ids": ["b"]},
    {"id": "q3", "question": "Where did the first modern games open?", "answers": ["Athens"], "positive_ids": ["f"]},
    {"id": "q4", "question": "Who wrote notes on the engine?", "answers": ["Ada Lovelace", "Lovelace"]}]
GOLD = [0, 1, 5, 2]  # the text that answers each


@pytest.fixture(scope="module")
def words(tmp_path_factory, change) -> Path:
    """An index of the six texts by their words only."""
    folder = tmp_path_factory.mktemp("words") / "index"
    change(folder, CORPUS, "bm25")
    return folder


class Answers(refrag.Questions):
    """Drawn as a step draws them, but for the question."""

    def draw(self, number: int, rng: np.random.Generator, progress: float) -> refrag.Item:
        item = super().draw(number, int(rng.choice(self.train.k)), rng, progress)
        return item._replace(teacher=refrag.with_text(item.sequence) if self.train.distill else None)


@pytest.fixture
def lessons_on(tmp_path, whole, words):
    """Lessons on the four questions, or on others; each has an answer unless that is asked for."""

    def call(rows: list[dict] = QUESTIONS, index: Path = words, encoder: refrag.ChunkEncoder = whole, *, topk: int = 3,
             k: tuple = (4,), seq_tokens: int = 512, distill: float = 0.0, held_out: object = None,
             **options: object) -> Answers:
        questions = str(write_rows(tmp_path / "q.jsonl", rows))
        search = refrag.SearchConfig(topk=topk)
        searcher = refrag.load_searcher(refrag.IndexConfig(index_dir=str(index)), search, RUNTIME)
        config = refrag.TrainConfig("unused", k=k, seq_tokens=seq_tokens, distill=distill)
        settings = refrag.AnswersConfig(**{"no_answer_frac": 0.0} | options)
        files = {"--rag_json": questions, "--eval_json": held_out}
        return Answers(encoder, config, settings, searcher, search, files)

    return call


def read(lessons: Answers, item: refrag.Item) -> tuple[str, list[int], str]:
    """An item's prompt, its vectors spelled out; which texts it shows, whole, with title and tag; and what is said."""
    sequence, decoder = refrag.with_text(item.sequence), lessons.encoder.tokenizer.decoder
    prompt = decoder.decode(sequence.plan[: int((sequence.labels >= 0).argmax()) + 1].tolist())
    at = {prompt.find(f"\nTitle {n}\n{text}\n</doc>"): n for n, text in enumerate(TEXTS)}
    passages = [at[place] for place in sorted(at) if place >= 0]
    assert all(f'<doc id="{number}">\nTitle {n}\n' in prompt for number, n in enumerate(passages, start=1))
    assert prompt.count("<doc id=") == len(passages)
    return prompt, passages, decoder.decode(asked(item.sequence))


NONE = "Not in the documents.<|im_end|>"


@pytest.fixture
def ranked(monkeypatch):
    """Let every search find these of the six texts, in this order."""
    return lambda *rows: monkeypatch.setattr(refrag.Searcher, "search", lambda searcher, question, topk, *options: [
        types.SimpleNamespace(row=row) for row in rows[:topk]])


@pytest.mark.parametrize("topk", [1, 6])
def test_the_right_passage_is_shown_and_cited(lessons_on, encoder, topk):
    lessons, answers = lessons_on(encoder=encoder, topk=topk), Counter()
    for number, seed in itertools.product(range(4), range(8)):
        item, question = lessons.draw(number, rng(seed), 0.0), QUESTIONS[number]
        prompt, passages, said = read(lessons, item)
        assert prompt.endswith(f"Question: {question['question']}<|im_end|>\n<|im_start|>assistant\n")
        assert GOLD[number] in passages and len(passages) <= topk
        assert said in {f"{one} [{passages.index(GOLD[number]) + 1}]<|im_end|>" for one in question["answers"]}
        asks = item.sequence.labels >= 0
        assert asks[int(asks.argmax()) :].all() and asked(item.sequence)[-1] == END
        assert item.where == f"question {question['id']}" and item.teacher is None
        answers[said] += 1
    assert len(answers) > 4  # both wordings of the last question come


def test_passages_come_by_rank_and_a_missed_one_somewhere(lessons_on, ranked):
    """One that is not found is put among the others, which lose their last; topk_min to topk in all."""
    ranked(3, 4, 5, 0, 1)
    lessons = lessons_on(topk=4, topk_min=2)
    seen = [read(lessons, lessons.draw(0, rng(seed), 0.0))[1] for seed in range(40)]
    assert {len(rows) for rows in seen} == {2, 3, 4} and all(GOLD[0] in rows for rows in seen)
    ranked(3, 0, 4, 1)
    lessons, places = lessons_on([QUESTIONS[2] | {"question": "Which river crosses the old city?"}]), Counter()
    for seed in range(30):
        passages = read(lessons, lessons.draw(0, rng(seed), 0.0))[1]
        places[passages.index(5)] += 1
        assert [n for n in passages if n != 5] == [3, 0]
    assert set(places) == {0, 1, 2}


def test_a_passage_taken_away_means_no_answer(lessons_on, ranked):
    """Others are shown instead, as many as there would have been; none that holds the answer, if it is not named."""
    ranked(0, 1, 5, 2, 3)
    lessons = lessons_on(no_answer_frac=1.0)
    for number, expected in enumerate([[1, 5, 2], [0, 5, 2], [0, 1, 2], [0, 1, 5]]):
        assert read(lessons, lessons.draw(number, rng(number), 0.0))[1:] == (expected, NONE)
    lessons = lessons_on([QUESTIONS[0] | {"positive_ids": ["f"]}], no_answer_frac=1.0)
    assert "Rhone" not in read(lessons, lessons.draw(0, rng(), 0.0))[0]
    lessons = lessons_on([QUESTIONS[0] | {"answers": ["e"]}], no_answer_frac=1.0)  # which all the others hold
    assert read(lessons, lessons.draw(0, rng(), 0.0))[2].startswith("e [")
    lessons = lessons_on([{"question": "Which river floods in May?", "answers": ["Title 0"]}], no_answer_frac=0.0)
    assert read(lessons, lessons.draw(0, rng(), 0.0))[2].startswith("Title 0 ["), "a title is read, too"


def test_a_share_of_the_questions_has_no_answer_and_those_without_a_right_passage(lessons_on, capsys):
    """Without any true answer they are left out and counted."""
    few = lessons_on([QUESTIONS[0], *({"question": q, "answers": []} for q in ("Who?", "Why?"))])
    assert len(few.questions) == 1
    assert ": left out 2 without answers\n" in capsys.readouterr().err
    lessons = lessons_on(no_answer_frac=0.3)
    said = [read(lessons, lessons.draw(0, rng(seed), 0.0))[2] for seed in range(100)]
    assert 0.15 < said.count(NONE) / 100 < 0.45
    lessons = lessons_on([{"question": "Which is it?", "answers": ["Nobody at all"]}, QUESTIONS[0],
                          {"question": "Which is it?", "answers": ["Rhone"], "positive_ids": ["elsewhere"]}])
    assert [read(lessons, lessons.draw(n, rng(), 0.0))[2] == NONE for n in range(3)] == [True, False, True]


def test_a_share_of_the_questions_asks_for_the_sentence(lessons_on):
    lessons, counts = lessons_on(quote_frac=0.4), Counter()
    for seed in range(100):
        prompt, _, said = read(lessons, lessons.draw(0, rng(seed), 0.0))
        told = prompt.rpartition("Question: ")[2].startswith("Quote the sentence that answers this ")
        assert said.partition(" [")[0] == (TEXTS[0].partition(" It floods")[0] if told else "Rhone")
        counts[told] += 1
    assert 20 <= counts[True] <= 60
    # of several sentences, the one that has most of the question's words; the first of equal ones
    for answer, text, sentence in (
            ("1896", "It is old. It was built in 1896! Nobody knows.", "It was built in 1896!"),
            ("the RHONE", "The Rhone floods. We saw the Rhone at Lyon.", "The Rhone floods."),
            ("Lyon", "Lyon lies low. Which river floods Lyon? The Rhone.", "Which river floods Lyon?"),
            ("\u6cb3", "\u5c71\u3002\u6cb3\u6c34\u3002\u65e5\u3002", "\u6cb3\u6c34\u3002"), ("absent", "Old.", None)):
        assert refrag.sentence_with(answer, text, "Which river floods?") == sentence


def test_a_share_of_the_questions_comes_with_its_text_chunks_alone(lessons_on):
    """Where there is text and something beside it; what is fed is then those chunks, in their order, and the tags."""
    lessons, counts = lessons_on(p=(0.3,), expanded_only_frac=0.5), Counter()
    for seed in range(60):
        plan = lessons.draw(0, rng(seed), 0.0).sequence.plan
        counts[bool((plan < 0).any())] += 1
    assert counts[True] > 15 and counts[False] > 15
    for p in (0.0, 1.0):
        lessons = lessons_on(p=(p,), expanded_only_frac=1.0)
        assert bool((lessons.draw(0, rng(), 0.0).sequence.plan < 0).any()) == (p == 0)


def test_everything_as_text_is_the_plain_prompt(lessons_on):
    """p = 1: token for token what `build_prompt` makes of the same passages, then the answer; so a teacher reads."""
    lessons = lessons_on(p=(1.0,))
    for number in range(4):
        item = lessons.draw(number, rng(number), 0.0)
        plan, said = item.sequence.plan, asked(item.sequence)
        contents = [f"Title {n}\n{TEXTS[n]}" for n in read(lessons, item)[1]]
        docs = refrag.make_docs(contents, [None] * len(contents), 4, lessons.encoder.tokenizer)
        prompt = refrag.make_context(lessons.encoder.tokenizer, QUESTIONS[number]["question"], docs).prompt
        assert plan.tolist() == [*prompt.input_ids.tolist(), *said[:-1]]
        teacher = lessons_on(distill=1.0, p=(0.1,)).draw(number, rng(number), 0.0).teacher
        assert teacher.plan.tolist() == plan.tolist() and asked(teacher) == said


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.6])
def test_no_more_than_a_share_of_the_context_stays_text(lessons_on, encoder, p):
    lessons = lessons_on(encoder=encoder, p=(p,))
    for number, seed in itertools.product(range(4), range(4)):
        item = lessons.draw(number, rng(seed), 0.0)
        sizes = [len(chunk) for chunk in item.sequence.content.chunks]
        realised = sum(sizes[n] for n in open_chunks(item)) / sum(sizes)
        assert p - (max(sizes) + 1) / sum(sizes) < realised <= p  # what is left does not hold the next chunk
    lessons = lessons_on(encoder=encoder, p=(0.0, 1.0))
    assert [bool(open_chunks(lessons.draw(0, rng(seed), 0.0))) for seed in range(20)].count(True) in range(4, 17)


def open_chunks(item: refrag.Item) -> set[int]:
    return set(range(len(item.sequence.content.chunks))) - {-v - 1 for v in item.sequence.plan.tolist() if v < 0}


@pytest.mark.parametrize("gate", ["learned", "blend"])
def test_the_gate_chooses_the_text_as_in_use(lessons_on, index_dir, words, llama, gate):
    """The chunks that `generate` opens over the same passages; by words only if the index has no vectors."""
    index, same = index_dir if gate == "learned" else words, 0
    lessons = lessons_on(index=index, gate_frac=1.0, p=(0.9,), k=(16,))
    pipeline = refrag.open_pipeline(index, dec=str(llama), enc="decoder:2", topk=3, k=16, p=0.9, floor=0, gate="blend",
                                    device="cpu", dtype="float32")
    if gate == "learned":
        torch.manual_seed(1)
        lessons.gate = pipeline.trained_gates["learned"] = refrag.QueryGate(dim=pipeline.embedder.dim).eval()
    for number, question in enumerate(QUESTIONS):
        item = lessons.draw(number, rng(number), 0.0)
        reading = pipeline.prepare(question, pipeline.settings_for(gate=gate))
        if read(lessons, item)[1] == [passage.row for passage in reading.passages]:
            assert open_chunks(item) == set(np.flatnonzero(reading.expanded).tolist()) != set()
            same += 1
    assert same >= 3


def test_the_gate_chooses_for_a_share_of_the_questions(lessons_on):
    lessons, chosen = (lessons_on(gate_frac=share, p=(0.25,)) for share in (0.5, 1.0))
    first = open_chunks(chosen.draw(0, rng(), 0.0))
    assert 35 <= sum(open_chunks(lessons.draw(0, rng(seed), 0.0)) == first for seed in range(100)) <= 65


@pytest.mark.parametrize("seq_tokens", [8, 60, 100])
def test_passages_fit_and_the_right_one_stays(lessons_on, encoder, ranked, seq_tokens):
    """The last ones by rank are left out; the right one stays, whatever its rank, even if it alone is too long."""
    order, counts = [4, 1, 0, 5, 2, 3], []
    ranked(*order)
    lessons = lessons_on(encoder=encoder, seq_tokens=seq_tokens, p=(0.0,), topk=6)
    contents = [f"Title {n}\n{TEXTS[n]}" for n in order]
    lengths = [len(ids) for ids in lessons.encoder.tokenizer.encoder(contents, add_special_tokens=False)["input_ids"]]
    for number, gold in enumerate(GOLD):
        _, passages, said = read(lessons, lessons.draw(number, rng(), 0.0))
        assert f"[{passages.index(gold) + 1}]" in said
        kept = list(range(6))
        while len(kept) > 1 and sum(lengths[n] for n in kept) > seq_tokens:
            kept.remove([n for n in kept if order[n] != gold][-1])
        assert passages == [order[n] for n in kept]
        counts.append(len(passages))
    assert (max(counts) > 1) == (seq_tokens > 8) and max(counts) < 6


def test_questions_and_answers_make_no_special_token(lessons_on):
    lessons = lessons_on([{"question": "Who <|im_end|> </doc>?", "answers": ["the <|im_end|> Rhone"],
                           "positive_ids": ["a"]}])
    ids = [*refrag.with_text(lessons.draw(0, rng(), 0.0).sequence).plan.tolist(), END]
    assert [i for i in ids if i in lessons.encoder.tokenizer.decoder.all_special_ids] == [START, END, START, END]


def test_every_chunk_is_encoded_from_its_own_text(lessons_on, encoder):
    lessons, rows, chunks = lessons_on(encoder=encoder, p=(0.25,)), [], 0
    item = lessons.draw(0, rng(), 0.0)
    for n in read(lessons, item)[1]:
        text = f"Title {n}\n{TEXTS[n]}"
        alone = encoder.content_of_text(text, encoder.tokenizer.cut([text], 4)[0])
        rows += [(ids.tolist(), np.where(owner < 0, -1, owner + chunks).tolist()) for ids, owner in alone.rows]
        chunks += len(alone.chunks)
    assert [(ids.tolist(), owner.tolist()) for ids, owner in item.sequence.content.rows] == rows
    assert len(item.sequence.content.chunks) == chunks


def test_the_exam_has_each_k_and_p_takes_nothing_away_and_asks_for_answers(tmp_path, lessons_on):
    path = write_rows(tmp_path / "held_out.jsonl", QUESTIONS)
    lessons = lessons_on(k=(4, 8), p=(0.0, 0.25), no_answer_frac=1.0, quote_frac=1.0,
                         expanded_only_frac=1.0, held_out=str(path))
    exam, again = lessons.exam(), lessons.exam()
    assert set(exam) == {"k4/p0", "k4/p0.25", "k8/p0", "k8/p0.25"}
    for name, items in exam.items():
        assert len(items) == 4 and not any("Not in" in read(lessons, item)[2] for item in items)
        assert all(item.sources and set(item.sources) <= set(range(len(lessons.index))) for item in items)
        assert not any("Quote the sentence" in read(lessons, item)[0] for item in items)
        assert all(np.array_equal(a.sequence.plan, b.sequence.plan) for a, b in zip(items, again[name], strict=True))


# -- the order of the data -------------------------------------------------------------------

MIXED = [int(size) for size in np.random.default_rng(0).choice([3, 5, 9, 17, 33, 64], 40)]


def sized(sizes: list[int]) -> refrag.Kind:
    """Items of so many positions; each also shows its random generator and the progress."""

    def make(number: int, k: int, rng: np.random.Generator, progress: float) -> refrag.Item:
        plan, where = np.arange(sizes[number]) + 3, f"{number} {rng.random():.9f} {progress:.4f}"
        return refrag.Item(refrag.TrainingSequence(plan, plan, refrag.Content([], [])), where)

    return refrag.Kind(len(sizes), make, {})


def steps(sizes: list[int] = MIXED, processes: int = 1, process: int = 0, seed: int = 1, window: int | None = None,
          **options: object) -> refrag.Steps:
    train = refrag.TrainConfig("unused", seq_tokens=64, **{"batch_size": 4, "steps": 30} | options)
    return refrag.Steps({"qa": sized(sizes)}, ({"qa": 1.0}, {"qa": 1.0}), train, teaches=False, window=window,
                        processes=processes, process=process, seed=seed)


def places(*made: refrag.Step) -> list[str]:
    return sorted(place for step in made for one in step.passes for place in one.places)


@pytest.mark.parametrize("options", [{"processes": 2}, {"grad_accum": 2}], ids=str)
def test_passes_share_one_order(options):
    one = steps()
    every = [steps(batch_size=2, process=n, **options) for n in range(options.get("processes", 1))]
    for step in range(30):
        assert places(one[step]) == places(*(two[step] for two in every))
        assert {two[step].label_weight for two in every} == {one[step].label_weight}


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_made_ahead_are_those_steps(workers):
    plain, ahead = steps(steps=6), steps(steps=6, workers=workers)
    for first in (0, 4):
        made = list(ahead.run(first, torch.device("cpu")))
        assert [places(step) for step in made] == [places(plain[step]) for step in range(first, 6)]
        for step, expected in zip(made, map(plain.__getitem__, range(first, 6)), strict=True):
            for a, b in zip(step.passes, expected.passes, strict=True):
                assert torch.equal(a.batch.plan, b.batch.plan) and torch.equal(a.weights, b.weights)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_wrong_with_a_text_is_told_whoever_reads_it(workers):
    one = steps([40], window=39, workers=workers)
    with pytest.raises(refrag.UserError, match=r"^a sequence has 40 positions, the decoder's window is 39: lower"):
        next(one.run(0, torch.device("cpu")))
    assert not multiprocessing.active_children()  # they would be waited for at the program's end


@pytest.mark.parametrize("timed", [False, True])
def test_kinds_are_drawn_by_their_shares_and_their_labels_weighted(timed):
    """Whatever shares add up to, by steps or by the clock; weights only where kinds are mixed."""
    kinds = {"recon": sized([3] * 10), "qa": sized([5] * 10)}
    train = refrag.TrainConfig("unused", seq_tokens=64, steps=100, seconds=1.0 if timed else None)
    made = refrag.Steps(kinds, ({"recon": 3.0}, {"qa": 1.0}), train, teaches=False, window=None, seed=1)
    for step, low, high in ((0, 0.0, 0.0), (50, 0.4, 0.6), (90, 0.85, 0.95)):
        made.clock.fill_(step / 100)
        items = [made.draw(0 if timed else step, number) for number in range(400)]
        assert low <= np.mean([item.positions == 5 for item in items]) <= high
        assert {(item.positions, item.weight) for item in items} <= {(3, 0.15), (5, 1.0)}
    assert steps()[0].passes[0].weights.unique().tolist() == [1.0]
    one = made[0]
    assert one.label_weight == pytest.approx(sum(float(each.weights.sum()) for each in one.passes))


def test_seeds_steps_and_draws_differ():
    orders = []
    for seed in range(3):
        for step in range(3):
            drawn = [steps(seed=seed).draw(step, number).where.split() for number in range(60)]
            orders.append(tuple(number for number, *_ in drawn))
            assert len({chance for _, chance, _ in drawn}) == 60 and len(set(orders[-1])) > 20
    assert len(set(orders)) == 9
    assert {place.split()[2] for place in places(steps(steps=8)[6])} == {"0.7500"}  # the share of the steps


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("passes", [1, 4])
def test_passes_are_of_like_size(processes, passes):
    """As many as --grad_accum says; each process has a part in every one, of --batch_size and some items more."""
    samples = steps(batch_size=16 // passes, grad_accum=passes, processes=processes)
    for step in range(30):
        made = refrag.share_out(samples.items(step), processes, samples.positions)
        assert 0 <= sum(item.positions for items in made for item in items) - 16 * 64 * processes < 64
        assert len(made) == passes
        for items in made:
            for own in (items[process::processes] for process in range(processes)):
                assert own and abs(sum(item.positions for item in own) - 16 * 64 // passes) <= 2 * 64


def test_an_item_longer_than_all_passes_together_is_used():
    samples = steps([*MIXED, 500], batch_size=1)
    assert len({place.split()[0] for step in range(200) for place in places(samples[step])}) == 41
    for processes in (1, 4):
        samples = steps([900, 3], batch_size=1, grad_accum=4 // processes, processes=processes)
        for step in range(8):
            assert all(len(one.places) > 0 for one in samples[step].passes)


def test_loss_terms_by_hand():
    """Text: -ln 1/4 - ln 1/2 = ln 8. KL of a teacher (1/2, 1/2) from (3/4, 1/4): ln(2/3)/2 + ln(2)/2 = ln(4/3)/2; from
    itself: 0. Argmax: the teacher's likeliest tokens are 0 by a tie and 1: -ln 3/4 - ln 1/2. Error: squares 1 and 1 by
    a mean square of (0 + 4) / 2 = 2 are 1/2, times two positions."""
    logits, none = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log(), torch.zeros(0, 2)
    teacher = torch.tensor([[0.5001, 0.4999], [0.4999, 0.5001]]).log()
    labels, weights = torch.tensor([1, 0]), dict.fromkeys(("text", "kl", "argmax", "mse"), 1.0)
    output = refrag.Output(logits, torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 2.0]]))
    each = torch.ones(2)
    terms = {name: term.item() for name, term in refrag.loss_terms(output, labels, teacher, weights, each).items()}
    expected = {"text": math.log(8), "kl": math.log(4 / 3) / 2, "argmax": math.log(4 / 3) + math.log(2), "mse": 1.0}
    assert terms == pytest.approx(expected, abs=1e-3)
    half = refrag.loss_terms(output, labels, teacher, weights, torch.tensor([0.5, 0.0]))  # of the first label
    assert half["text"].item() == pytest.approx(math.log(2), abs=1e-3) and half["mse"].item() == pytest.approx(0.25)
    without = refrag.Output(logits, none, none)  # vectors: then there is no error of theirs
    assert set(refrag.loss_terms(without, labels, None, {"text": 1.0, "mse": 1.0}, each)) == {"text"}
    assert set(refrag.loss_terms(without, labels, teacher, {"text": 0.0, "kl": 0.5}, each)) == {"kl"}


SHORT = ("--k", "4", "--seq_tokens", "32", "--batch_size", "2", "--steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def sources(tmp_path_factory, words) -> dict[str, list[object]]:
    folder = tmp_path_factory.mktemp("data")
    texts = ["--train_json", write_rows(folder / "t.jsonl", [{"text": text} for text in TEXTS])]
    questions = ["--rag_json", write_rows(folder / "q.jsonl", QUESTIONS), "--index_dir", words, "--topk", "2"]
    return {"cpt_align": texts, "cpt_recon": texts, "cpt_next": texts, "sft": questions,
            "train": [*texts, *questions, *MIX, "--eval_json", texts[1], "--eval_rag_json", questions[1]]}


@pytest.fixture
def train(done, sources, llama, tmp_path):
    """Run a phase into a folder of the test; returns its summary. Without --load_dir, from the tiny Llama."""

    def call(phase: str, out: object, *options: object) -> dict:
        models = [] if {"--load_dir", "--dec"} & set(options) else ["--dec", llama, "--enc", "decoder:2"]
        own = [word for pair in refrag.batched(sources[phase], 2) if pair[0] not in options for word in pair]
        return done(phase, *own, *models, *SHORT, "--out_dir", tmp_path / out, *options)

    return call


def tensors(folder: object, **options: object) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's model, those it does not hold from the models it stands on."""
    return refrag.RefragModel.from_pretrained(folder, **options).state_dict()


def different(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged(folder: Path) -> list[dict]:
    return [record for record in metrics(folder) if "loss" in record]


@pytest.fixture(scope="module")
def start(tmp_path_factory, llama) -> Path:
    """A checkpoint whose projector is not at its start, where the encoder would have no gradient."""
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    trained("decoder:2", llama).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("phase", "letters", "options"), [
    *(("cpt_next", letters, ["--train", letters]) for letters in ("p", "e", "d", "pe", "dep")),
    *((phase, letters, []) for phase, letters in zip(PHASES, ("p", "pe", "ped", "ped"), strict=True))])
def test_exactly_the_named_parts_move(train, start, tmp_path, phase, letters, options):
    """Only they are saved, beside the projector. Token embeddings in a cut encoder stay the untrained one's."""
    summary = train(phase, "run", "--load_dir", start, "--steps", 3, "--lr", "1e-2", *options)
    before, after = tensors(start), tensors(summary["checkpoint"])
    named = {name for name in before if name[0] in letters} - {"encoder.backbone.embed_tokens.weight"}
    assert different(before, after) == named
    if "e" in letters:
        assert "backbone.embed_tokens.weight" not in load_file(Path(summary["checkpoint"]) / "encoder.safetensors")
    saved = {path.stem for path in Path(summary["checkpoint"]).glob("*.safetensors")}
    assert saved == {"projector", "trainer", *(part for part in ("encoder", "decoder") if part[0] in letters)}
    assert summary["trained_parameters"] == sum(before[name].numel() for name in named)
    config = refrag.Checkpoint(Path(summary["checkpoint"])).config
    assert config.training_model == "".join(x for x in "ped" if x in {"p", *letters})
    assert config.history[0]["train"] == letters


@pytest.mark.parametrize(("phase", "letters"), list(zip(PHASES, ("d", "ped", "d", "ped"), strict=True)))
def test_adapters_move_instead_of_the_decoder(train, start, phase, letters):
    """Its weights stay bit for bit; loading adds B A times alpha / r = 2 to each of the matrices."""
    summary = train(phase, "run", "--load_dir", start, "--train", letters, "--lora_r", 2, "--steps", 3, "--lr", "1e-2")
    folder, before = Path(summary["checkpoint"]), tensors(start)
    assert {path.stem for path in folder.glob("*.safetensors")} == {
        "projector", "trainer", "lora", *(["encoder"] if "e" in letters else [])}
    adapters = load_file(folder / "lora.safetensors")
    kept = {name.replace(".base_layer.", "."): value for name, value in
            tensors(folder, train="d", lora_r=2).items() if ".lora_" not in name}
    assert {name[0] for name in different(before, kept)} == set(letters) - {"d"}
    merged = tensors(folder)
    moved = {name for name in different(before, merged) if name.startswith("decoder.")}
    assert moved == {f"decoder.{name.replace('lora_A.default.', '')}" for name in adapters if ".lora_A." in name}
    assert len(moved) == 3 * 7  # all linear layers of three layers, the head left out
    for name in moved:
        a, b = (adapters[name.removeprefix("decoder.").replace(".weight", f".lora_{x}.default.weight")] for x in "AB")
        assert (a.shape[0], b.shape[1]) == (2, 2) and b.any()
        torch.testing.assert_close(merged[name], before[name] + 2 * b @ a)


def test_only_matrices_decay(llama):
    """And every trained parameter is in one group, with its learning rate as the peak."""
    model = build("decoder:2", llama)
    model.encoder.requires_grad_(False)
    rates = {"lr": 0.5, "projector_lr": 0.25, "encoder_lr": 1.0}
    groups = refrag.parameter_groups(model, refrag.TrainConfig("x", weight_decay=0.125, **rates))
    placed = {id(p): group for group in groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if not name.startswith("encoder.")}
    assert len(placed) == len(named) == sum(len(group["params"]) for group in groups)
    for name, parameter in named.items():
        lr, decay = 0.25 if name.startswith("projector.") else 0.5, 0.125 if parameter.ndim == 2 else 0.0
        assert placed[id(parameter)].items() >= {"lr": lr, "peak": lr, "weight_decay": decay}.items(), name


# -- phases one after the other -------------------------------------------------------------------

VARIANTS = {"full": ["--train", "ped"], "lora": ["--train", "ped", "--lora_r", "2"]}
FIRSTS: dict[tuple[str, str], Path] = {}  # runs that others go on from, by phase and variant


@pytest.mark.parametrize("second", PHASES)
@pytest.mark.parametrize("first", PHASES)
def test_every_phase_goes_on_from_every_other(train, done, tmp_path_factory, first, second):
    """Over the sixteen pairs each is first and second with the whole decoder and with adapters in either."""
    place = (PHASES.index(first) + 2 * PHASES.index(second)) % 4
    ways = [("full", "full"), ("lora", "full"), ("full", "lora"), ("lora", "lora")][place]
    if (first, ways[0]) not in FIRSTS:
        folder = tmp_path_factory.mktemp(f"{first}-{ways[0]}") / "run"
        train(first, folder, *VARIANTS[ways[0]])
        FIRSTS[first, ways[0]] = folder
        check_answers(done, folder)
    summary = train(second, "second", "--load_dir", FIRSTS[first, ways[0]], *VARIANTS[ways[1]])
    folder = Path(summary["checkpoint"])
    config = refrag.Checkpoint(folder).config
    assert [(entry["phase"], entry["steps"]) for entry in config.history] == [(first, 2), (second, 2)]
    assert config.lora == ({"r": 2} if ways[1] == "lora" else None)
    has = {"projector", "encoder", "trainer", *(["lora"] if ways[1] == "lora" else []),
           *(["decoder"] if ways != ("lora", "lora") else [])}
    assert {path.stem for path in folder.glob("*.safetensors")} == has
    check_answers(done, folder.parent)


def check_answers(done: object, folder: Path) -> None:
    """`generate` answers with the checkpoint, from a run's folder or its own."""
    prompt = f"Where? <doc id='a'>{TEXTS[0]}</doc> Say:"
    assert done("generate", "--prompt", prompt, "--load_dir", folder, "--k", 4, "--p", 0, "--max_new", 2,
                "--compressed", "feed", "--device", "cpu")["metrics"]["positions"] > 0


@pytest.mark.parametrize(("phase", "options"), [*((phase, "") for phase in PHASES), ("sft", "--lora_r 4 --lr 2e-2")])
def test_a_few_steps_learn_a_small_text(train, tmp_path, llama, phase, options):
    row = QUESTIONS[0] if phase == "sft" else {"text": "The Rhone floods in May. The bells ring."}
    one = write_rows(tmp_path / "one.jsonl", [row])
    data = ["--rag_json", one, "--no_answer_frac", 0] if phase == "sft" else ["--train_json", one]
    data += {"cpt_recon": ["--curriculum", "none"], "cpt_next": ["--expand_frac", 0]}.get(phase, [])
    train(phase, "run", *data, "--train", "ped", "--steps", 20, "--lr", "3e-3", "--log_every", 1, *options.split())
    losses = [record["loss"] for record in logged(tmp_path / "run")]
    assert len(losses) == 20 and np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


def test_a_mixture_trains_all_its_kinds(train, done, tmp_path):
    """Its evaluation has each kind under its name. Killed and continued, it ends with the same weights."""
    options = ["--steps", 4, "--save_every", 2, "--eval_limit", 2, "--batch_size", 8, "--lora_r", 2, "--distill", 0.5]
    summary = train("train", "run", *options)
    assert {name.split()[0] for name in summary["eval"]} == {"recon", "next", "cloze", "qa"}
    last = tmp_path / "run" / "step-000004"
    expected = tensors(last)
    shutil.rmtree(last)
    train("train", "run", *options, "--workers", 2, "--resume")
    assert different(tensors(last), expected) == set()
    check_answers(done, tmp_path / "run")


def test_a_run_may_end_by_the_clock(train, tmp_path, monkeypatch):
    """After so many seconds of training, those before a stop included; until then the learning rate falls."""
    options = "--steps", 1, "--log_every", 1, "--warmup", 0
    summary = train("cpt_recon", "run", "--seconds", 1.5, *options)
    rates = [record["lr"] for record in logged(tmp_path / "run")]
    assert summary["steps"] > 1 and 1.5 <= summary["seconds"] < 30 and 2e-4 == rates[0] > rates[-1]
    seen: list[float] = []  # at what progress lessons are drawn
    monkeypatch.setattr(refrag, "blended", lambda start, end, progress: seen.append(progress) or start)
    assert train("cpt_recon", "run", "--seconds", 2.5, *options, "--resume")["seconds"] >= 2.5 and min(seen[1:]) > 0.5


def test_a_run_says_what_it_takes_to_make_it_again(train, sources, tmp_path, llama, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["refrag.py", "cpt_next", "--and_so_on"])
    train("cpt_next", "run", "--seed", 7, "--lr", "1e-3")
    facts, data = json.loads((tmp_path / "run" / "run.json").read_text()), Path(sources["cpt_next"][1])
    chosen = {"phase": "cpt_next", "seed": 7, "lr": 1e-3, "steps": 2, "k": [4], "train_json": [str(data)], "lora_r": 0,
              "dec": str(llama), "enc": "decoder:2", "expand_frac": 0.25, "warmup": 0.04, "resume": False}
    assert {name: facts["settings"][name] for name in chosen} == chosen
    assert facts["data"] == [{"file": str(data), "bytes": data.stat().st_size, "sha256": refrag.sha256_file(data)}]
    assert facts == facts | {"device": "cpu", "processes": 1, "versions": runs.library_versions(),
                             "command": ["refrag.py", "cpt_next", "--and_so_on"]}


def test_steps_are_logged_at_the_intervals_asked_for(train, sources, tmp_path):
    train("cpt_next", "run", "--steps", 8, "--log_every", 3, "--eval_every", 4, "--eval_json", sources["cpt_next"][1],
          "--eval_limit", 1)
    records = metrics(tmp_path / "run")
    assert [r["step"] for r in logged(tmp_path / "run")] == [3, 6, 8]
    assert [r["step"] for r in records if "eval" in r] == [0, 4, 8]
    record = records[1]
    assert {"text", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "seconds"} <= set(record)
    assert record["loss"] == pytest.approx(record["text"])
    assert [r["lr"] for r in records if "lr" in r] == pytest.approx(
        [5e-5 * refrag.learning_rate_factor(step, 8, 0.04) for step in (2, 5, 7)])


def test_the_model_card_tells_models_phases_and_results():
    entry = {"phase": "cpt_recon", "steps": 1200, "tokens": 3456789, "train": "pe", "device": "cuda", "run": "runs/a",
             "data": [{"file": "/data/a.jsonl"}, {"file": "b.jsonl.gz"}]}
    history = [entry, entry | {"phase": "sft", "train": "ped (LoRA 8)", "data": [{"file": "q.jsonl"}]}]
    config = refrag.RefragConfig(encoder_name_or_path="decoder:3", decoder_name_or_path="some/decoder", history=history)
    measured = {kind: {"loss": 1.0, "accuracy": value} for kind, value in (
        ("vectors", 0.5), ("none", 0.25), ("full", 0.75))}  # of one text there are no wrong ones
    card = reports.model_card(config, [{"step": 0, "eval": {"k4": {}}}, {"step": 7, "eval": {"k8": measured}}])
    assert "Decoder: some/decoder. Encoder: decoder:3, mean pooling. Projector: residual_mlp." in card
    assert [line for line in card.splitlines() if line.startswith("| ")] == [
        "| Phase | Steps or epochs | Tokens or questions | Trained | Device | Data |",
        "| cpt_recon | 1,200 | 3,456,789 | pe | cuda | a.jsonl, b.jsonl.gz |",
        "| sft | 1,200 | 3,456,789 | ped (LoRA 8) | cuda | q.jsonl |",
        "| Set | Vectors | None | Wrong | Full |", "| k8 | 0.500 | 0.250 | - | 0.750 |"]
    assert "after step 7" in card and "Held-out" not in reports.model_card(config, [{"step": 0, "eval": {}}])


@pytest.mark.parametrize("options", [["--lora_r", "2"], ["--train", "pe"]], ids=["lora", "frozen"])
def test_activations_computed_again_change_nothing(train, start, monkeypatch, options):
    marked, calls, made = refrag.mark_trained, Counter(), {}

    def watch(model, *rest):
        model.decoder.base_model.layers[1].mlp.register_forward_pre_hook(
            lambda *_: calls.update([now] * torch.is_grad_enabled()))  # not in the trial of `can_pack`
        return marked(model, *rest)

    monkeypatch.setattr(refrag, "mark_trained", watch)
    for now, extra in (("plain", []), ("again", ["--activation_checkpointing"])):
        made[now] = tensors(train("cpt_next", now, "--load_dir", start, "--lr", "1e-2", *options, *extra)["checkpoint"])
    for name, tensor in made["plain"].items():
        torch.testing.assert_close(made["again"][name], tensor, rtol=1e-3, atol=1e-4)
    assert different(made["plain"], tensors(start)) and calls["again"] == 2 * calls["plain"] >= 4


@pytest.mark.parametrize(("phase", "options", "weights"), [
    ("sft", "--distill 0.5", {"text": 1, "kl": 0.5}), ("cpt_align", "", {"mse": 1, "kl": 1, "argmax": 0.2}),
    ("cpt_next", "--distill 0.5 --recon_frac 0.5", {"text": 1, "kl": 0.5})])
def test_the_loss_is_the_weighted_sum_of_its_terms(train, start, tmp_path, phase, options, weights):
    train(phase, "run", "--load_dir", start, "--log_every", 1, "--batch_size", 4, *options.split())
    for record in logged(tmp_path / "run"):
        expected = sum(weight * record[name] for name, weight in weights.items())
        assert record["loss"] == pytest.approx(expected, rel=1e-4) and min(record[name] for name in weights) > 0


@pytest.mark.parametrize("way", ["full", "lora"])
def test_the_teacher_is_the_decoder_before_the_phase(train, tmp_path, way):
    """At p = 1 both read the same: before the first step there is no divergence, then the trained one goes its way."""
    train("cpt_next", "first", "--lr", "1e-2", *VARIANTS[way])
    train("sft", "second", "--distill", 1, "--load_dir", tmp_path / "first", "--lr", "1e-2", "--p", 1, "--steps", 3,
          "--log_every", 1, *VARIANTS[way])
    first, *_, last = [record["kl"] for record in logged(tmp_path / "second")]
    assert first == pytest.approx(0, abs=1e-5) and last > 1e-3


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_with_a_separate_encoder(train, done, sources, llama, bert, tmp_path, phase):
    """As in the paper without the residual. All parts move, but for BERT's pooler, which nothing reads."""
    models = ["--dec", llama, "--enc", bert, "--projector", "mlp", "--pooling", "cls", "--k", 2, 4, 8]
    held_out = ["--eval_json", sources[phase][1], "--eval_limit", 2]
    summary = train(phase, "run", *models, *held_out, "--train", "ped", "--weight_decay", 0)
    assert {name.partition("/")[0] for name in summary["eval"]} == {"k2", "k4", "k8"}
    config = refrag.Checkpoint(Path(summary["checkpoint"])).config
    assert (config.projector, config.pooling, config.encoder_name_or_path) == ("mlp", "cls", str(bert))
    assert config.compression == 8
    moved = different(build(bert, llama, projector="mlp").state_dict(), tensors(summary["checkpoint"]))
    assert {name[0] for name in moved} == set("ped") and not any("pooler" in name for name in moved)
    check_answers(done, tmp_path / "run")


@pytest.mark.parametrize(("phase", "options"), [("cpt_next", ""), ("sft", "--train ped --lora_r 2")])
def test_every_architecture_trains_and_answers(train, done, any_decoder, tmp_path, phase, options):
    """But for adapters in a decoder of nothing but recurrent layers, which peft refuses."""
    if options and any_decoder.name.startswith("mamba2"):
        with pytest.raises(AssertionError, match="error: --lora_r: this decoder takes no adapters"):
            train(phase, "run", "--dec", any_decoder, "--enc", "decoder:2", *options.split())
        return
    summary = train(phase, "run", "--dec", any_decoder, "--enc", "decoder:2", *options.split())
    assert math.isfinite(summary["loss"])
    check_answers(done, tmp_path / "run")


def sequence(first: int, chunks: int) -> refrag.TrainingSequence:
    """A start, so many vectors of two tokens each, and two tokens to say."""
    parts = [np.asarray([first + 2 * n, first + 2 * n + 1]) for n in range(chunks)]
    rows = [(np.concatenate(parts), np.repeat(np.arange(chunks), 2))] if chunks else []
    context = np.concatenate([[START], -np.arange(chunks) - 1])
    return refrag.continue_plan(context, np.asarray([first + 90, first + 91]), refrag.Content(parts, rows))


@pytest.mark.parametrize(("names", "others"), [
    ("a a b b b", [3, 3, 0, 0, 0]), ("ab ab e cd bc", [3, 3, 3, 0, 0]), ("a a a a a", [])])
def test_the_wrong_vectors_are_of_another_text(names, others):
    """The next window of the same text would tell what comes next; so would a passage that both questions find, which
    only the last of five must take. The third has no vectors to lend."""
    made = [sequence(100 * n, chunks) for n, chunks in enumerate((2, 2, 0, 2, 2))]
    wrong = refrag.control("wrong", made, [frozenset(name) for name in names.split()])
    assert [s.content is made[n].content for s, n in zip(wrong, others, strict=True)] == [True] * len(others)


def test_an_evaluation_is_what_the_decoder_says(train, sources, start, tmp_path, text_lessons):
    """The losses by hand: the decoder's own forward over embeddings laid by a loop, one text at a time."""
    summary = train("cpt_next", "run", "--load_dir", start, "--eval_json", sources["cpt_next"][1])
    model, rows = refrag.RefragModel.from_pretrained(tmp_path / "run"), [{"text": text} for text in TEXTS]
    sequences = [item.sequence for item in text_lessons("next", rows, held_out=rows).exam["k4"]]
    embed, measured, full, vectors = model.decoder.get_input_embeddings(), {}, [], []
    with torch.no_grad():
        for s in sequences:
            ids = torch.from_numpy(np.concatenate(s.content.chunks))
            states = model.encoder.backbone(ids[None]).last_hidden_state[0]
            pooled = torch.stack([states[i : i + 4].mean(0) for i in range(0, len(ids), 4)])
            means = torch.stack([embed(ids[i : i + 4]).mean(0) for i in range(0, len(ids), 4)])
            vectors.append(model.projector(pooled, means))
            full.append(embed(ids))
        wrong = [torch.cat([other] * (len(own) // len(other) + 1))[: len(own)]
                 for own, other in zip(vectors, [*vectors[1:], vectors[0]], strict=True)]
        none = [own[:0] for own in vectors]
        for kind, contexts in {"vectors": vectors, "none": none, "wrong": wrong, "full": full}.items():
            logits, answers = [], [torch.tensor(asked(s)) for s in sequences]
            for context, said in zip(contexts, answers, strict=True):
                inputs = torch.cat([embed(torch.tensor([START])), context, embed(said[:-1])])
                logits.append(model.decoder(inputs_embeds=inputs[None]).logits[0, -len(said) :])
            logits, said = torch.cat(logits), torch.cat(answers)
            loss = torch.nn.functional.cross_entropy(logits, said).item()
            measured[kind] = {"loss": loss, "accuracy": (logits.argmax(-1) == said).float().mean().item()}
    for kind, values in measured.items():
        assert summary["eval"]["k4"][kind] == pytest.approx(values, abs=2e-4), kind
    assert len({round(values["loss"], 3) for values in measured.values()}) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
@pytest.mark.slow
@pytest.mark.parametrize(("phase", "options"), [
    ("cpt_recon", "--batch_size {}"), ("sft", "--batch_size {} --seq_tokens 128 --distill 1 --lora_r 2")],
    ids=["cpt_recon", "sft"])
def test_two_processes_or_two_passes_are_one_large_batch(train, forks, sources, llama, tmp_path, phase, options):
    """Four sequences a step. The two processes then go on from their first checkpoint, to the same weights."""
    given = ["--train", "ped", "--steps", 4, "--lr", "1e-3", "--log_every", 1, "--eval_json", sources[phase][1],
             "--eval_limit", 2, "--save_every", 2]
    train(phase, "one", *given, *options.format(4).split())
    train(phase, "passes", *given, *options.format(2).split(), "--grad_accum", 2)
    folder = tmp_path / "processes"

    def launch(*more: object) -> dict:
        argv = [phase, *sources[phase], "--dec", llama, "--enc", "decoder:2", *SHORT, "--quiet", "--json", *given,
                *options.format(2).split(), "--out_dir", folder, *more]
        first, second = forks.run_two(argv)
        assert '"steps"' not in second
        return json.loads(first.splitlines()[-1])  # one summary, from the first process

    assert launch()["steps"] == 4
    assert json.loads((folder / "run.json").read_text())["processes"] == 2
    one, passes, processes = (metrics(tmp_path / name) for name in ("one", "passes", "processes"))
    for others in (passes, processes):
        for a, b in zip(one, others, strict=True):
            assert a.keys() == b.keys() and a.get("tokens") == b.get("tokens")
            for name in set(a) & {"loss", "text", "kl", "grad_norm"}:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), (a["step"], name)
    last = [tensors(tmp_path / name) for name in ("one", "passes", "processes")]
    for name, tensor in last[0].items():
        for other in last[1:]:
            torch.testing.assert_close(other[name], tensor, rtol=1e-2, atol=1e-3)
    if phase == "cpt_recon":
        shutil.rmtree(folder / "step-000004")
        assert launch("--resume")["steps"] == 4
        assert different(tensors(folder), last[2]) == set()
        assert [record["loss"] for record in logged(folder)] == [r["loss"] for r in processes if "loss" in r]
