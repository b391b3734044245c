"""The scripts in docs/: the proof that vectors are read, and the measurements, all scaled down."""

import gzip
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys

import pytest
import yaml
from writers import ROOT

import refrag
from refrag_extras import index


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script as Python does, but in this process: script(path, "--flag") -> its stdout. Its exit status is 0."""

    def run(path, *argv, status=0):
        monkeypatch.syspath_prepend(path.parent)
        monkeypatch.setattr(sys, "argv", list(map(str, [path, *argv])))
        try:
            runpy.run_path(str(path), run_name="__main__")
            left = 0
        except SystemExit as stop:
            left = stop.code
        out, err = capsys.readouterr()
        assert left == status, err
        return out

    return run


@pytest.mark.slow
def test_vectors_are_read_by_models_from_scratch(tmp_path, monkeypatch, script):
    """Of 400,000 random weights. Without vectors, or with those of another text, it can only guess at letters."""
    monkeypatch.setenv("REFRAG_HOME", str(tmp_path / "home"))
    out = script(ROOT / "docs/prove_reading.py", "--out_dir", tmp_path / "proof", "--steps", 150, "--seq_tokens", 16,
                 "--hidden", 96, "--layers", 3)
    rows = {int(size): tuple(map(float, rest)) for size, *rest in re.findall(
        r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)$", out, re.MULTILINE)}
    assert list(rows) == [4, 8, 16]
    assert all(vectors > max(others) + 0.1 for vectors, *others in rows.values()), out


def test_the_results_page_is_what_its_files_say(script, write):
    """Every table names its command, commit and device, and no path of this machine. A stale one is told."""
    script(ROOT / "docs/make_results.py", "--check")  # status 1: python docs/make_results.py was not run
    docs = write("docs/RESULTS.md", "Before\n<!-- results: recon -->\nold\n<!-- end -->\nAfter\n").parent
    shutil.copy(ROOT / "docs/make_results.py", docs)
    result = {"task": "recon", "n": 3, "seed": 1, "command": ["/a/refrag.py", "eval", "--texts", "/a/b/c.jsonl"],
              "results": {"4": {"accuracy": 0.5, "no_vectors": 0.1, "wrong_vectors": 0.1, "full_text": 1.0}},
              "device": {"device": "cpu", "dtype": "float32", "cpu_threads": 2}, "versions": {"torch": "2.13.0"},
              "commit": "0123456789"}
    script(docs / "make_results.py", "--add", "recon", write("results.json", json.dumps(result)))
    page = (docs / "RESULTS.md").read_text(encoding="utf-8")
    assert "| 4 |    0.500 |" in page and "old" not in page
    assert "`refrag.py eval --texts b/c.jsonl`; n = 3; commit 0123456; cpu, 2 threads, float32, torch 2.13.0" in page
    assert page.startswith("Before\n") and page.endswith("After\n")
    script(docs / "make_results.py", "--check")
    (docs / "RESULTS.md").write_text(page.replace("0.500", "0.900"), encoding="utf-8")
    script(docs / "make_results.py", "--check", status=1)


def test_the_commands_that_make_the_tables_are_valid(write, tmp_path, monkeypatch):
    """Over data in small: of each set a passage for training and one for development, with a question each."""
    for name in ("squad", "nq", "multihop"):
        passages = [{"id": f"{name}:{split}", "title": "A", "text": f"It is {split}.", "split": split}
                    for split in ("train", "dev")]
        for file, rows in (("passages", passages), *(
                (f"qa.{split}", [{"question": "What?", "answers": [split], "positive_ids": [f"{name}:{split}"],
                                  "context_ids": [f"{name}:{split}"]}]) for split in ("train", "dev"))):
            write(f"data/{name}/{file}.jsonl.gz", gzip.compress(
                "".join(json.dumps(row) + "\n" for row in rows).encode()))
    for name in ("wiki_squad_train_articles", "wikitext2.valid", "books.train"):
        write(f"data/text/{name}.jsonl.gz", gzip.compress(b'{"text": "A text."}\n'))
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    reproduce = importlib.import_module("reproduce")
    data = tmp_path / "data"
    reproduce.make_corpora(data, tmp_path)
    reproduce.make_lessons(data, tmp_path)
    for commands in (reproduce.tables(data, tmp_path), reproduce.lessons(data, tmp_path)):
        made = {str(reproduce.ROOT / "data/reader")}
        for argv in commands.values():
            refrag.parse(argv)
            for flag in ("--index_dir", "--load_dir"):
                assert flag not in argv or argv[0] == "index" or argv[argv.index(flag) + 1] in made
            made |= {argv[argv.index(flag) + 1] for flag in ("--index_dir", "--out_dir") if flag in argv}
    # no development article is learned from
    ids = [json.loads(line)["id"] for line in (tmp_path / "lessons.jsonl").read_text().splitlines()]
    assert ids == ["squad:train", "nq:train", "multihop:train"]
    for name, count in (("first_qa", 3), ("then_qa", 2)):  # the one question of SQuAD is in the first alone
        questions = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [q["answers"][0] for q in questions] == ["train"] * count
    for name in ("low_p", "low_p_qa"):
        text = (tmp_path / f"{name}.jsonl").read_text()
        assert "train" in text and "dev" not in text


@pytest.mark.models
class TestMeasurements:
    """Each runs, on little, and says what is compared."""

    @pytest.fixture
    def measure(self, script, monkeypatch):
        for owner, *names in ((refrag, "load_embedder", "build_tokenizer", "index_terms", "QUIET"),
                              (index.Build, "read", "compute"), (index, "BLOCK")):
            for name in names:  # a measurement may replace it: back it goes
                monkeypatch.setattr(owner, name, getattr(owner, name))
        return lambda name, *argv: json.loads(script(ROOT / "docs" / name, *argv))

    def test_decoding(self, measure):
        made = measure("measure.py", "decode", "--prompt", 8, "--new", 3, "--repeats", 1)
        rows = {row["engine"]: row for row in made["rows"]}
        assert list(rows) == ["generate", "model", "int8", "int4"]
        assert rows["int4"]["mb"] < rows["int8"]["mb"] < rows["model"]["mb"] / 3
        assert rows["generate"]["times_faster_than_generate"] == 1
        assert made["command"][1:3] == ["decode", "--prompt"]

    def test_a_drawn_index_is_built_added_to_and_searched(self, measure, write, tmp_path):
        texts = write("texts.jsonl.gz", gzip.compress((ROOT / "data/wiki_passages.jsonl").read_bytes()))
        place = ["--corpus", texts, "--index_dir", tmp_path / "index"]
        built = measure("measure_index.py", "build", "--passages", 40, *place)
        added = measure("measure_index.py", "add", "--passages", 5, *place)
        found = measure("measure_index.py", "search", "--questions", 3, "--where", "hundredth = 7", *place)
        assert (built["passages"], added["passages"], found["passages"]) == (40, 45, 45)
        assert built["bytes_per_passage"]["vectors"] == 4 * 384 and next(iter(built["steps_s"])) == "passages.arrow"
        assert [(row["where"], row["retriever"]) for row in found["rows"]] == [("", "embedding")] + [
            (where, retriever) for where in ("", "hundredth = 7") for retriever in ("bm25", "dense", "hybrid")]
        drawn = refrag.open_index(tmp_path / "index")
        assert [drawn[row].id for row in (0, 44)] == ["0", "44"] and drawn.filter.allowed("hundredth = 7").sum() == 1


@pytest.mark.models
def test_the_python_interface_works_as_documented(tmp_path, shared, monkeypatch, capsys):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/API.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    names: dict = {}
    exec(compile(code, "docs/API.md", "exec"), names)
    assert names["result"]["answer"] in capsys.readouterr().out
    assert names["model"].config.compression == 4


def test_the_cluster_s_files_and_commands_fit_the_program(monkeypatch, write):
    monkeypatch.chdir(ROOT)
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for service in services.values():
        assert services.keys() >= service.get("depends_on", {}).keys() and "healthcheck" in services["vllm"]
    run = yaml.safe_load((ROOT / "docs/cluster/sky.yaml").read_text())["run"]
    text = f"{run}\n{(ROOT / 'docs/CLUSTER.md').read_text()}".replace("\\\n", " ")
    lines = re.findall(r"^.*(?:launch|refrag|refrag\.py) +((?:index|export|train|cpt_recon) .+)$", text, re.MULTILINE)
    assert len(lines) == 8
    for argv in (services["refrag"]["command"], *map(shlex.split, lines)):
        argv = [str(write("texts", "x")) if re.search(r"TEXTS|QUESTIONS|\.jsonl", word) else word for word in argv]
        assert refrag.parse(argv)[0] == argv[0]
