"""The files in data/ hold what README_DATA.md says, and the made-up ones are what their script makes."""

import importlib
import json
import re
import sys
from collections import Counter

import pytest
from conftest import read_all
from writers import ROOT

DATA = ROOT / "data"
SIZES = {"small": 500, "medium": 2000, "large": 3000}
GENERATED = [*(f"corpus_{name}.txt" for name in SIZES), "rag_train.jsonl", "cpt_train.jsonl"]
NAMED_ONCE = ("city", "river", "alloy", "surname", "university", "event", "place")  # all but the region
sys.path.insert(0, str(DATA))
make_corpus = importlib.import_module("make_corpus")


def read_lines(path):
    """The lines of a file that must end with a newline."""
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n") and "\r" not in text
    return text[:-1].split("\n")


def read_jsonl(path):
    return [json.loads(line) for line in read_lines(path)]


def proper_names(facts):
    """The made-up names that belong to one passage alone; of an event "Velotell Regatta" that is "Velotell"."""
    return [facts[key].split()[0] for key in NAMED_ONCE if key in facts]


@pytest.fixture(scope="module")
def corpora():
    return {name: read_lines(DATA / f"corpus_{name}.txt") for name in SIZES}


def test_corpora_are_generated_again_have_their_sizes_are_prefixes_and_repeat_nothing(tmp_path, corpora):
    make_corpus.main(["--out_dir", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(GENERATED)
    for name in GENERATED:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name
    lines = corpora["large"]
    assert {name: len(lines) for name, lines in corpora.items()} == SIZES
    assert (lines[:500], lines[:2000]) == (corpora["small"], corpora["medium"])
    assert len(set(lines)) == SIZES["large"]
    assert not [line for line in lines if "{" in line or "}" in line]  # no placeholder is left
    assert all(40 <= len(line.split()) <= 110 for line in lines)
    chinese, spanish = (sum(bool(re.search(pattern, line)) for line in lines) / SIZES["large"]
                        for pattern in ("[\u4e00-\u9fff]", r" (se|de la|El|estudió) "))
    assert 0.03 <= chinese <= 0.07 and 0.07 <= spanish <= 0.13


def test_every_answer_occurs_in_its_passage(corpora):
    """Which the index knows by the id that the question names. They begin with the small corpus and spread evenly."""
    known = {record.id: record.text for record in read_all(DATA / "corpus_large.txt").records}
    questions = read_jsonl(DATA / "rag_train.jsonl")
    assert len(questions) == len({q["id"] for q in questions}) == len({q["question"] for q in questions}) == 1200
    lines = []
    for question in questions:
        (positive,) = question["positive_ids"]
        assert question["answers"] and all(answer in known[positive] for answer in question["answers"]), question["id"]
        lines.append(int(positive.removeprefix("corpus_large.txt:")))
        assert known[positive] == corpora["large"][lines[-1] - 1]
    assert max(lines[:400]) <= 500 < min(lines[400:])
    assert max(lines[400:800]) <= 2000 < min(lines[800:])


def test_every_fact_is_in_one_passage_only_and_in_no_article():
    world = make_corpus.make_world(1337)
    passages = [make_corpus.make_passage(world, index) for index in range(20_000)]
    occurrences = Counter(word for passage in passages for word in set(re.findall(r"\w+", passage.text)))
    for passage in passages:
        for name in proper_names(passage.facts):
            assert occurrences[name] == 1, name
    melting = [passage.facts["melting"] for passage in passages if "melting" in passage.facts]
    assert len(set(melting)) == len(melting)
    articles = {article["text"] for article in read_jsonl(DATA / "cpt_train.jsonl")}
    assert len(articles) == 400 and all(380 <= len(text.split()) <= 900 for text in articles)
    known = {name for passage in passages[: SIZES["large"]] for name in proper_names(passage.facts)}
    assert not known & {word for text in articles for word in re.findall(r"\w+", text)}


@pytest.mark.parametrize(("option", "message"), [
    (["--sizes", "tiny=10", "--qa", "31"], "--qa 31 is too many"), (["--seed", "-1"], "--seed"),
    *((["--sizes", sizes], "--sizes") for sizes in ("a=1,a=2", "a=0", "../a=1"))])
def test_a_bad_option_is_named_and_nothing_is_written(tmp_path, capsys, option, message):
    """With good ones, a tiny corpus has what it was asked for: as many questions as there are."""
    with pytest.raises(SystemExit):
        make_corpus.main(["--out_dir", str(tmp_path), *option])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    make_corpus.main(["--out_dir", str(tmp_path), "--sizes", "tiny=10", "--qa", "30", "--cpt", "0", "--seed", "7"])
    assert len(read_lines(tmp_path / "corpus_tiny.txt")) == 10 and not (tmp_path / "cpt_train.jsonl").read_bytes()
    assert len({question["question"] for question in read_jsonl(tmp_path / "rag_train.jsonl")}) == 30


def test_wiki_files_have_their_counts_fields_and_lengths():
    passages, questions = (read_jsonl(DATA / f"wiki_{name}.jsonl") for name in ("passages", "questions"))
    assert len(passages) == len({p["id"] for p in passages}) == len({p["text"] for p in passages}) == 300
    assert len(questions) == len({q["id"] for q in questions}) == len({q["question"] for q in questions}) == 100
    assert all(list(passage) == ["id", "title", "text"] for passage in passages)
    assert all(list(question) == ["id", "question", "answers", "positive_ids"] for question in questions)
    assert all(40 <= len(passage["text"].split()) <= 200 for passage in passages)
    by_id = {passage["id"]: passage for passage in passages}
    for question in questions:
        assert question["answers"] and question["positive_ids"]
        for id_ in question["positive_ids"]:
            assert all(answer in by_id[id_]["text"] for answer in question["answers"]), question["id"]
    asked = Counter(by_id[question["positive_ids"][0]]["title"] for question in questions)
    assert set(asked) == {passage["title"] for passage in passages} and min(asked.values()) >= 8
