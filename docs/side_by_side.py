"""Times two checkouts of refrag.py side by side, by their command lines alone.

    python docs/side_by_side.py OLD NEW [--pairs 15] [--questions 8] [--ask "--mode full"]

Each measurement is a process of its own. Those of the two checkouts alternate, and from pair to pair it alternates
which goes first, so that drift of the machine hits both alike; one pair before the others warms up and does not count.
Each checkout indexes and answers with models that it converted itself, in a temporary folder.

    help_s, mistyped_s                   a whole process that prints the help, or an error about a flag
    index_passages_per_s, index_peak_mb  an index of data/wiki_passages.jsonl from nothing, by its own report
    search_s, search_peak_mb             a whole process that finds the passages for one question
    ttft_s, ttit_s, answer_peak_mb       medians over questions of one process, but for the first; --ask adds options

Printed are medians, the median of the ratios new / old of the pairs with its 95% bootstrap interval, and on the last
line one JSON object with all of it. On 2 quiet CPU threads a pair takes about 2 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

HIGHER_IS_BETTER = ("index_passages_per_s",)


class Checkout:
    """A refrag.py and the folder that it works in."""

    def __init__(self, source: Path, folder: Path, args: argparse.Namespace):
        self.source, self.folder, self.args = source.resolve(), folder, args
        self.answers: list[str] = []
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("REFRAG_", "PYTHON"))}
        self.environment = kept | {"REFRAG_HOME": str(folder / "home")}
        folder.mkdir()
        lines = (self.source / "data" / "wiki_questions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        number = args.questions + 1  # the first warms up
        (folder / "questions.jsonl").write_text("".join(lines[::len(lines) // number][:number]), encoding="utf-8")

    def run(self, command: str, code: int = 0) -> tuple[str, float, float]:
        """What a command prints, its seconds, and the most memory that it held, in MB."""
        words = [sys.executable, str(self.source / "refrag.py"), *shlex.split(command)]
        start = time.perf_counter()
        with subprocess.Popen(words, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.DEVNULL if code else None) as child:
            printed = child.stdout.read()
            _, status, usage = os.wait4(child.pid, 0)
            seconds, child.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
        if child.returncode != code:
            raise SystemExit(f"{shlex.join(words)}: exit code {child.returncode}")
        return printed, seconds, usage.ru_maxrss / (1 if sys.platform == "linux" else 1024) / 1024

    def start_up(self) -> dict[str, float]:
        """Help and a mistyped flag."""
        return {"help_s": self.run("--help")[1], "mistyped_s": self.run("generate --questoin x", code=2)[1]}

    def index(self) -> dict[str, float]:
        """An index from nothing."""
        shutil.rmtree(self.folder / "index", ignore_errors=True)
        corpus = shlex.quote(str(self.source / "data" / "wiki_passages.jsonl"))
        printed, _, peak = self.run(f"index --corpus {corpus} --index_dir index --json --quiet")
        return {"index_passages_per_s": json.loads(printed)["passages_per_s"], "index_peak_mb": peak}

    def search(self) -> dict[str, float]:
        """A search as one process."""
        _, seconds, peak = self.run('search --index_dir index --question "Who coined the term cells?" --json --quiet')
        return {"search_s": seconds, "search_peak_mb": peak}

    def answer(self) -> dict[str, float]:
        """Answers to several questions."""
        printed, _, peak = self.run("generate --index_dir index --questions questions.jsonl --max_new 24 --json --quiet"
                                    f" {self.args.ask}")
        results = json.loads(printed)["results"]
        self.answers = [result["answer"] for result in results]
        metrics = [result["metrics"] for result in results[1:]]  # the first question warms up
        return {"ttft_s": statistics.median(each["ttft_s"] for each in metrics),
                "ttit_s": statistics.median(each["ttit_s"] for each in metrics if each["ttit_s"] is not None),
                "answer_peak_mb": peak}


def interval(ratios: list[float]) -> tuple[float, float]:
    """The 95% bootstrap interval of the median."""
    draw = random.Random(1337)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[49], medians[1949]


def measure(old: Checkout, new: Checkout, pairs: int) -> dict[str, list[tuple[float, float]]]:
    """(old, new) of each pair, by figure."""
    rows = defaultdict(list)
    for turn in range(pairs + 1):
        for what in (Checkout.start_up, Checkout.index, Checkout.search, Checkout.answer):
            found = {side: what(side) for side in ((old, new) if turn % 2 else (new, old))}
            for name in found[old] if turn else ():
                rows[name].append((found[old][name], found[new][name]))
        print(f"pair {turn} of {pairs}", file=sys.stderr)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a folder with refrag.py and data/")
    parser.add_argument("new", type=Path, help="another")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--questions", type=int, default=8, help="questions that count in each process")
    parser.add_argument("--ask", default="", help="more options of generate")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        old, new = (Checkout(getattr(args, name), Path(folder) / name, args) for name in ("old", "new"))
        rows = measure(old, new, args.pairs)
    result = {}
    print(f"{'':24}{'old':>10}{'new':>10}{'new/old':>10}   95% interval")
    for name, values in rows.items():
        ratios = [b / a for a, b in values]
        (low, high), ratio = interval(ratios), statistics.median(ratios)
        before, after = (statistics.median(side) for side in zip(*values, strict=True))
        note = "  (more is better)" if name in HIGHER_IS_BETTER else ""
        print(f"{name:24}{before:10.4g}{after:10.4g}{ratio:10.3f}   {low:.3f} to {high:.3f}{note}")
        result[name] = {"old": before, "new": after, "ratio": ratio, "low": low, "high": high, "pairs": values}
    print(json.dumps({"pairs": args.pairs, "same_answers": old.answers == new.answers, "results": result}))


if __name__ == "__main__":
    main()
