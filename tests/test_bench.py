"""Section 13, speed: `bench` on tiny models, with known times instead of the machine's."""

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import refrag
from refrag_extras import bench, evaluate, runs

QUESTION = "Where do smiths cast bells?"


@pytest.fixture
def clock(monkeypatch) -> None:
    """A clock on which a position of a prompt takes 1 ms, a decoding step 10 ms, and nothing else any time."""
    now = [100.0]

    def timed(work, seconds):
        def call(*given, **inputs):
            now[0] += seconds(inputs)
            return work(*given, **inputs)

        return call

    monkeypatch.setattr(refrag, "Stopwatch", functools.partial(refrag.Stopwatch, clock=lambda: now[0]))
    monkeypatch.setattr(refrag, "forward_step", timed(refrag.forward_step, lambda inputs: 0.001 * (
        inputs["inputs_embeds"].shape[1] if "inputs_embeds" in inputs else 0)))
    monkeypatch.setattr(refrag, "decode_one_token", timed(refrag.decode_one_token, lambda _: 0.01))


@pytest.fixture
def argv(index_dir, llama):
    return lambda *more: ["bench", "--index_dir", index_dir, "--dec", llama, "--enc", "decoder:2", "--question",
                          QUESTION, "--contexts", "60,120", "--k", "4,8", "--p", "0", "--new", "3", "--repeats", "2",
                          *more]


@pytest.fixture
def run_bench(run, argv):
    """Run a bench that succeeds with --json; returns its result and what stderr said."""

    def call(*more: object) -> tuple[dict, str]:
        code, out, err = run(*argv("--json", *more))
        assert code == 0 and out.count("\n") == 1, err
        return json.loads(out), err

    return call


def rows_of(result: dict, mode: str, **values: object) -> list[dict]:
    return [r for r in result["rows"] if r["mode"] == mode and all(r[key] == value for key, value in values.items())]


def metrics(**changes: object) -> dict:
    stages = dict.fromkeys(("retrieve_s", "gate_s", "vectors_s", "pack_s", "prefill_s"), 0.125)
    return {"ttft_s": 1.0, "ttit_s": 0.5, "tokens_per_s": 2.0, "new_tokens": 3, "positions": 10, "full_positions": 40,
            "context_tokens": 32, "compression": 4.0, "p_realised": 0.0, "kv_bytes": 640, "stages": stages,
            "peak_rss_mb": 50.0} | changes


def trial(mode: str, ttft: list[float], k: int | None = None, p: float | None = None, **changes: object):
    runs = [metrics(ttft_s=seconds, ttit_s=seconds / 4) for seconds in ttft]
    setting = bench.Setting(mode, 512, k, p)._replace(**changes)
    return bench.Trial(setting, None, None, None, {}, runs, {"peak_rss_mb": 70.0, "peak_device_mb": None}, 0.1)


def read_late(row: dict) -> int:
    """The positions of a prompt that are read while the clock runs."""
    return (row["positions"] - row["kinds"]["prefix"]) * row["batch"]


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    """Ratios 5, 2 and 9 by round; the ratio of the medians would be 20 / 10 = 2. Without full context there is none."""
    full, ours = trial("full", [10.0, 20.0, 90.0]), trial("refrag", [2.0, 10.0, 10.0], k=16, p=0.0)
    for run, seconds in zip(ours.runs, (0.1, 0.9, 0.2), strict=True):
        run["stages"] = run["stages"] | {"prefill_s": seconds}
    row = bench.bench_row(ours, full)
    assert (row["ttft_s"], row["ttft_ratio"], row["runs"]["ttft_ratio"]) == (10.0, 5.0, [5.0, 2.0, 9.0])
    assert (row["spread"]["ttft_s"], row["spread"]["ttft_ratio"]) == ([2.0, 10.0], [2.0, 9.0])
    assert (row["ttit_s"], row["ttit_ratio"], row["theoretical_ratio"]) == (2.5, 5.0, 16)
    assert row["stages"] == dict.fromkeys(row["stages"], 0.125) | {"prefill_s": 0.2}  # medians by themselves
    assert row["products_share"] == 1  # .1 s of the shortest prefill, .1
    assert bench.theoretical_ratio(16, 0.25) == pytest.approx(1 / (0.25 + 0.75 / 16))
    assert bench.bench_row(full, full)["ttft_ratio"] == 1.0
    assert bench.bench_row(trial("full", [1.0, 2.0, 4.0, 9.0]), None)["ttft_s"] == 3.0
    row = bench.bench_row(ours, None)
    assert row["ttft_ratio"] is row["ttit_ratio"] is None and "ttft_ratio" not in row["spread"]
    for run in full.runs:  # of one new token
        run.update(ttit_s=None, tokens_per_s=None)
    row = bench.bench_row(full, full)
    assert row["ttit_s"] is row["tokens_per_s"] is row["ttit_ratio"] is None
    assert bench.bench_cells(row)["TTIT ms"] == bench.bench_cells(row)["tokens/s"] == "-"


def test_known_times_give_known_rows(run_bench, clock):
    """A step takes the same time for all rows here, so that a batch of 4 makes four times the tokens."""
    result, _ = run_bench("--contexts", "60,120,60", "--p", "0", "0.3", "0.3")
    assert result["rounds"] == 2 == len(rows_of(result, "full"))
    batches, _ = run_bench("--batch_size", "1,2,4", "--contexts", 120, "--k", 4, "--repeats", 1)
    assert sorted(row["batch"] for row in batches["rows"]) == sorted([1, 2, 4] * 3)
    for row in [*result["rows"], *batches["rows"]]:
        assert (row["ttft_s"], row["stages"]["prefill_s"]) == pytest.approx((0.001 * read_late(row),) * 2)
        assert sum(row["kinds"].values()) == row["positions"]
        assert (row["ttit_s"], row["tokens_per_s"]) == pytest.approx((0.01, 100 * row["batch"]))
        assert row["kv_bytes"] == 384 * row["positions"] * row["batch"]
    for row in rows_of(batches, "refrag"):
        [full] = rows_of(batches, "full", batch=row["batch"])
        assert row["ttft_ratio"] == pytest.approx(read_late(full) / read_late(row), abs=1e-5)
    assert len(rows_of(result, "refrag")) == 2 * 2 * 2
    positions = {(r["k"], r["p"]): r["positions"] for r in rows_of(result, "refrag", context=120)}
    assert positions[8, 0.0] < positions[4, 0.0] < positions[4, 0.3] and positions[8, 0.0] < positions[8, 0.3]
    for row in rows_of(result, "refrag"):
        [full] = rows_of(result, "full", context=row["context"])
        assert full["positions"] == row["full_positions"] > row["positions"]
        assert full["context_tokens"] == row["context_tokens"] == full["kinds"]["text"]
        assert all(full["kinds"][name] == row["kinds"][name] > 0 for name in ("prefix", "tags", "question"))
        assert row["kinds"]["vectors"] > 0 == full["kinds"]["vectors"] and (row["kinds"]["text"] > 0) == (row["p"] > 0)
        assert row["ttft_ratio"] == pytest.approx(read_late(full) / read_late(row), abs=1e-5)
        assert row["ttit_ratio"] == pytest.approx(1)
        assert row["p_realised"] <= row["p"]
    [none] = rows_of(result, "none")
    assert (none["context"], none["context_tokens"], none["k"], none["ttft_ratio"]) == (0, 0, None, None)
    assert none["positions"] < min(r["positions"] for r in result["rows"] if r["mode"] != "none")


def test_rounds_hold_every_combination_once_in_changing_order(run_bench, monkeypatch):
    """The first round warms up: what it measures, here an absurd time, is in no row. The seed gives the order."""
    turns, orders = [], []
    monkeypatch.setattr(bench.Trial, "run", lambda self, item: (
        turns.append(self.setting), metrics(ttft_s=1e6 if len(turns) <= 7 else 0.5))[1])
    for seed in (1, 1, 2):
        turns.clear()
        result, _ = run_bench("--repeats", 4, "--seed", seed)
        orders.append(refrag.batched(turns, 7))  # 2 contexts of full text and of two k, and the question alone
        assert [len(set(one)) for one in orders[-1]] == [7] * 5
        assert all(a != b for a, b in itertools.pairwise(orders[-1]))
        assert all(row["runs"]["ttft_s"] == [0.5] * 4 for row in result["rows"])
    assert orders[0] == orders[1] != orders[2]


def test_a_context_is_filled_with_whole_passages(run_bench, index_dir, llama, monkeypatch):
    """No passage more would fit, though the search begins with one. The oracle counts tokens, best passage first."""
    monkeypatch.setattr(refrag.SearchConfig, "topk", 1)
    result, _ = run_bench("--contexts", "30,60,120", "--modes", "full", "--repeats", 1)
    tokenizer = refrag.AutoTokenizer.from_pretrained(llama)
    searcher = refrag.load_searcher(refrag.IndexConfig(index_dir=str(index_dir)), refrag.SearchConfig(),
                                    refrag.RuntimeConfig())
    totals = np.cumsum([len(tokenizer(p.content)["input_ids"]) for p in searcher.search(QUESTION, 6)])
    for row in result["rows"]:
        fitting = [total for total in totals if total <= row["context"]]
        assert abs(row["context_tokens"] - fitting[-1]) <= len(fitting)  # a token may span a border of the content
        assert row["context_tokens"] <= row["context"]
    assert [row["context"] for row in result["rows"]] == [30, 60, 120]


def test_contexts_that_the_index_can_not_fill_are_left_out_and_told(run_bench):
    """All its passages may fill one exactly."""
    result, err = run_bench("--contexts", "3,120,100000", "--repeats", 1)
    assert {row["context"] for row in result["rows"]} == {0, 120}
    short, long = result["left_out"]
    assert short == "--contexts 3 left out: the best passage alone is longer"
    assert long.startswith("--contexts 100000 left out: all 6 passages that the question finds hold ")
    assert all(f"{text}\n" in err for text in (short, long))
    tokens = int(long.split()[-2])
    result, _ = run_bench("--contexts", f"{tokens},{tokens + 1}", "--modes", "full", "--repeats", 1)
    [row] = result["rows"]
    assert (row["context"], row["context_tokens"], len(result["left_out"])) == (tokens, tokens, 1)


def test_what_exceeds_the_window_is_left_out_and_told(run_bench, refused, argv, monkeypatch):
    """Where full context has one position too few, compressed context has room. Where nothing fits it is an error."""
    message = refused(2, *argv("--modes", "full", "--contexts", 100000, "--quiet"))
    assert message.startswith("nothing to time: --contexts 100000 left out: ")
    short = ["--contexts", 120, "--k", 8, "--repeats", 1]
    [full] = rows_of(run_bench(*short)[0], "full")
    monkeypatch.setattr(refrag.RefragModel, "window", full["positions"] + 3)
    assert run_bench(*short)[0]["left_out"] == []
    monkeypatch.setattr(refrag.RefragModel, "window", full["positions"] + 2)
    result, err = run_bench(*short)
    [row] = rows_of(result, "refrag")
    assert rows_of(result, "full") == [] and row["ttft_ratio"] is None
    assert result["left_out"] == [f"full at --contexts 120 left out: {full['positions']} positions and --new 3 exceed "
                                  f"the decoder's window {full['positions'] + 2}"]
    assert f"{result['left_out'][0]}\n" in err


def test_stored_vectors_serve_the_multiples_of_their_k(run_bench, monkeypatch):
    """k = 4 is stored. k = 6 is none of its multiples: its vectors are made in each run, and that is told."""
    encoded, encode = [], refrag.ChunkEncoder.encode
    monkeypatch.setattr(refrag.ChunkEncoder, "encode", lambda self, contents, k: (
        encoded.append(k), encode(self, contents, k))[1])
    result, err = run_bench("--contexts", 120, "--k", "4,8,6", "--repeats", 2)
    assert {row["k"]: row["stored_vectors"] for row in rows_of(result, "refrag")} == {4: True, 8: True, 6: False}
    assert [row["stored_vectors"] for row in result["rows"] if row["mode"] != "refrag"] == [None, None]
    assert encoded.count(6) == 4  # one warm-up, one for the matrix products, and two rounds
    assert 4 not in encoded and 8 not in encoded
    assert "--k 6: the index holds no vectors that serve it: they are computed while the clock runs\n" in err
    assert "--k 4" not in err and "--k 8" not in err


def test_batches_of_a_decoder_that_takes_none_are_left_out_and_told(run_bench, monkeypatch):
    """It answers one question after another; its times would be those of no batch."""
    monkeypatch.setattr(refrag.Pipeline, "batches", False)
    result, err = run_bench("--contexts", 120, "--modes", "none", "--batch_size", "1,2", "--repeats", 1)
    assert [row["batch"] for row in result["rows"]] == [1]
    assert result["left_out"] and all(line.startswith("--batch_size 2 left out") for line in result["left_out"])
    assert result["left_out"][0] in err


def test_all_text_reads_no_vectors_and_no_end_token_stops_a_run(run_bench, monkeypatch):
    monkeypatch.setattr(refrag, "stop_tokens", lambda *_: frozenset(range(600)))
    result, err = run_bench("--contexts", 120, "--k", 6, "--p", 1, "--repeats", 1, "--new", 7)
    assert [row["new_tokens"] for row in result["rows"]] == [7, 7, 7]
    [row], [full] = rows_of(result, "refrag"), rows_of(result, "full")
    assert (row["stored_vectors"], row["positions"], row["theoretical_ratio"]) == (None, full["positions"], 1)
    assert "no vectors that serve it" not in err


def test_the_folder_holds_result_report_and_pictures(run_bench, tmp_path, clock, monkeypatch):
    folder = tmp_path / "deep" / "bench"
    monkeypatch.setattr(sys, "argv", ["refrag.py", "bench", "\udcff", "a b"])
    result, _ = run_bench("--out_dir", folder, "--contexts", "30,60,120")
    assert result.keys() >= {"device", "rows", "rounds", "settings", "versions", "command", "commit"}
    assert (result["device"]["device"], result["versions"]) == ("cpu", runs.library_versions())
    assert result["settings"].items() >= {"contexts": [30, 60, 120], "new": 3, "gate": "blend"}.items()
    assert all({"mode", "context", "k", "p", "batch", "positions", "ttft_s", "ttit_s", "tokens_per_s", "peak_rss_mb",
                "kv_bytes"} <= set(row) and row["peak_rss_mb"] > 0 for row in result["rows"])
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"bench.json", "report.md", "ttft.png", "ratio.png"}
    assert json.loads((folder / "bench.json").read_text(encoding="utf-8")) == result
    for name in bench.BENCH_PICTURES:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "Command: `refrag.py bench '?' 'a b'`" in report
    assert "![](ttft.png)" in report and "![](ratio.png)" in report
    _, _, *table = [line.split("|")[1:] for line in report.splitlines() if line.startswith("|")]
    for cells, row in zip(table, result["rows"], strict=True):
        assert cells[0].strip() == row["mode"] and f"{1000 * row['ttft_s']:,.1f} (" in cells[5]


def test_without_full_context_or_matplotlib_the_older_pictures_go(run_bench, tmp_path, monkeypatch):
    def files(*more):
        _, err = run_bench("--out_dir", tmp_path / "b", "--repeats", 1, "--contexts", 60, *more)
        return {path.name for path in (tmp_path / "b").iterdir()} - {".lock", "bench.json", "report.md"}, err

    assert files()[0] == {"ttft.png", "ratio.png"}
    assert files("--modes", "refrag")[0] == {"ttft.png"}
    assert "ratio.png" not in (tmp_path / "b" / "report.md").read_text(encoding="utf-8")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    left, err = files()
    assert left == set() and "pip install matplotlib, for ttft.png" in err


def test_a_layers_products_are_counted(monkeypatch):
    """y = x W forward, dW = x' dy and dx = dy W' backward, the first of them twice; a linear map in inference mode."""
    x, w = torch.ones(5, 3, requires_grad=True), torch.ones(3, 7, requires_grad=True)
    with bench.Products() as products:
        (x @ w).sum().backward()
        torch.mm(x.detach(), w.detach()) + 1
        with torch.inference_mode():
            torch.nn.functional.linear(x, torch.ones(2, 3))
    shapes = {tuple(shape for shape, *_ in factors): count for factors, count in products.seen.items()}
    assert shapes == {((5, 3), (3, 7)): 2, ((3, 5), (5, 7)): 1, ((5, 7), (7, 3)): 1, ((5, 3), (3, 2)): 1}
    seconds = iter([9, 2, 5, 1, 9, 2, 9, 4])  # the least of two for each, the first counts twice
    monkeypatch.setattr(bench, "timed", lambda device, work: work() is None or next(seconds))
    assert products.seconds(torch.device("cpu"), 1) == 2 * 2 + 1 + 2 + 4


@pytest.mark.parametrize("options", [[], ["--lora_r", 2, "--dtype", "bfloat16"]], ids=["full", "lora"])
def test_a_step_of_training_is_timed(done, llama, tmp_path, options):
    """A start, the vectors, the mark and the text but for its last token, of each text."""
    out = tmp_path / "out"
    result = done("bench", "--task", "train", "--dec", llama, "--enc", "decoder:2", "--contexts", 24, "--k", "4,8",
                  "--batch_size", 2, "--repeats", 1, "--out_dir", out, *options)
    mark = len(refrag.load_tokenizer(str(llama))(refrag.RECONSTRUCT)["input_ids"])
    assert [(row["k"], row["positions"]) for row in result["rows"]] == [
        (k, 2 * (1 + 24 // k + mark + 24 - 1)) for k in (4, 8)]
    for row in result["rows"]:
        assert 0 < row["products_s"] < row["step_s"]
        assert row["products_share"] == pytest.approx(row["products_s"] / row["step_s"], abs=1e-3)
        assert row["positions_per_s"] == pytest.approx(row["positions"] / row["step_s"], rel=1e-3)
    assert json.loads((out / "bench.json").read_text())["rows"] == result["rows"]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system keeps the peak of memory")
def test_the_peak_of_memory_begins_anew():
    block = np.ones(20_000_000)  # 153 MiB
    high = refrag.peak_rss_mb()
    del block
    bench.reset_peak_memory(torch.device("cpu"))
    assert refrag.peak_rss_mb() < high - 100
    assert bench.peak_device_mb(torch.device("cpu")) is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_the_file(tmp_path, monkeypatch):
    """None outside a checkout, for a file that a checkout does not track and without git; a + after a change."""
    program = tmp_path / "program.py"
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(refrag, "__file__", str(program))

    def commit(*words: str, content: str = "a") -> str | None:
        program.write_text(content)
        git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        assert not words or subprocess.run([*git, *words]).returncode == 0
        return evaluate.source_commit()

    assert commit() is commit("init", "-q") is None
    commit("add", "program.py")
    head = commit("commit", "-qm", "first")
    assert head == next((tmp_path / ".git/refs/heads").iterdir()).read_text().strip()
    assert commit(content="b") == f"{head}+"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert evaluate.source_commit() is None
