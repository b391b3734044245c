"""Do the tests find faults? Each of seeded_faults.toml is put into a copy of a checkout, alone, and its tests are run.

    python docs/seed_faults.py run OUT.jsonl [--tree DIR] [--only NAME ..] [--limit SECONDS]
    python docs/seed_faults.py check [--tree DIR]          has each fault its place, and does the program compile?
    python docs/seed_faults.py compare OLD.jsonl NEW.jsonl

`run` copies the last commit of the checkout, not what was changed since. OUT.jsonl has a line for each fault with the
test that found it, written at once: an interrupted run goes on. Tests that fail without any fault are left out.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

FAULTS = tomllib.loads(Path(__file__).with_name("seeded_faults.toml").read_text(encoding="utf-8"))["fault"]
SURVIVED, NO_PLACE, NO_TESTS, BROKEN, LATE = "SURVIVED", "no place for it", "no tests", "does not import", "time limit"


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def run_pytest(folder: Path, shown: int, argv: list[str]) -> None:
    """pytest in a forked process, whose libraries are loaded: to import them takes longer than most tests."""
    os.setsid()
    os.chdir(folder)
    os.dup2(shown, 1)
    os.dup2(shown, 2)
    sys.exit(pytest.main(["-q", "--tb=no", "-p", "no:cacheprovider", "-o", "timeout=0", *argv]))


class Run:
    """A copy of a checkout's last commit with one fault at a time, and what was found with it."""

    def __init__(self, tree: Path, folder: Path, out: Path, limit: float):
        self.folder, self.home, self.out, self.limit = folder, folder / "home", out, limit
        archive = subprocess.check_output(["git", "-C", tree, "archive", "HEAD"])
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        paths = [folder / "refrag.py", *sorted(folder.glob("refrag_extras/*.py"))]
        self.sources = {path: path.read_text(encoding="utf-8") for path in paths}
        tests = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("tests/[!s]*.py"))]
        self.digest = hashlib.sha256("".join([*self.sources.values(), *tests]).encode()).hexdigest()[:12]
        lines = [line for line in read_lines(out) if line["digest"] == self.digest]
        self.found = {line["fault"]: line["found"] for line in lines if "fault" in line}
        self.known = {(line["file"], line["k"]): line["failing"] for line in lines if "file" in line}
        sys.path[0] = str(folder)
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "REFRAG_HOME": str(self.home)}
        for name in ("sentence_transformers", "refrag"):  # for their libraries
            importlib.import_module(name)
        del sys.modules["refrag"]

    def write(self, **line: object) -> None:
        with self.out.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"digest": self.digest, **line}) + "\n")
        print(*line.values(), sep="  ", flush=True)

    def seed(self, fault: dict) -> bool:
        """Put a fault in the place of the one before. False where none of its edits has its one place."""
        texts = self.sources.values()
        edit = next((e for e in fault.get("edits", ()) if sum(text.count(e[0]) for text in texts) == 1), None)
        for path, text in self.sources.items():
            path.write_text(text.replace(*edit) if edit else text, encoding="utf-8")
        return edit is not None or not fault

    def failing(self, fault: dict, name: str, k: str, *options: str) -> list[str]:
        """The tests of a file that fail with a fault, or BROKEN or LATE."""
        for cache in ("tokens", "retrieved", "verified"):  # those of the run before may have another fault
            shutil.rmtree(self.home / cache, ignore_errors=True)
        self.seed(fault)
        with tempfile.TemporaryFile("w+", encoding="utf-8") as shown:
            given = (self.folder, shown.fileno(), [f"tests/test_{name}.py", "-k", k, *options])
            child = multiprocessing.get_context("fork").Process(target=run_pytest, args=given)
            child.start()
            try:
                child.join(self.limit if fault else None)
            finally:
                if late := child.is_alive():
                    os.killpg(child.pid, signal.SIGKILL)
            shown.seek(0)
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", shown.read(), re.MULTILINE)
        return [LATE] if late else failed or ([] if child.exitcode in (0, 5) else [BROKEN])  # 5: -k selects none

    def failing_anyway(self, name: str, whole: bool) -> list[str]:
        """The tests of a file, all or those that any fault names, that fail without a fault."""
        named = sorted({fault["tests"][name] for fault in FAULTS if name in fault["tests"]})
        k = "" if whole or "" in named else " or ".join(f"({one})" for one in named)
        if (name, k) not in self.known:
            self.known[name, k] = self.failing({}, name, k)
            self.write(file=name, k=k, failing=self.known[name, k])
        return self.known[name, k]

    def look_for(self, fault: dict) -> str:
        """The test that finds a fault, of those that it names and then of their whole files; or why there is none."""
        if not self.seed(fault):
            return NO_PLACE
        tests = {name: k for name, k in fault["tests"].items() if (self.folder / f"tests/test_{name}.py").exists()}
        for name, k in [*tests.items(), *((name, "") for name, k in tests.items() if k)]:
            left_out = [f"--deselect={test}" for test in self.failing_anyway(name, not k)]
            if failed := self.failing(fault, name, k, "-x", *left_out):
                return failed[0]
        return SURVIVED if tests else NO_TESTS


def main() -> None:
    parser, names = argparse.ArgumentParser(usage=__doc__), [fault["name"] for fault in FAULTS]
    parser.add_argument("action", choices=["check", "run", "compare"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--limit", type=float, default=900.0)
    args = parser.parse_args()
    assert len(args.files) == ["check", "run", "compare"].index(args.action), __doc__
    if args.action == "compare":
        sides = [{line["fault"]: line["found"] for line in read_lines(path) if "fault" in line} for path in args.files]
        for name in sides[0] | sides[1]:
            one, other = (side.get(name, "not looked for") for side in sides)
            if ("::" in one) != ("::" in other):
                print(f"{name}: {one} | {other}")
        return print("found:", *(f"{sum('::' in by for by in side.values())} of {len(side)}" for side in sides))
    os.nice(15)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args.tree, Path(folder), Path(*args.files).resolve(), args.limit)
        for fault in (fault for fault in FAULTS if fault["name"] in args.only):
            if args.action == "check":
                state = "has its place" if run.seed(fault) else NO_PLACE
                try:
                    [compile(path.read_text(encoding="utf-8"), path, "exec") for path in run.sources]
                except SyntaxError as error:
                    state = f"does not compile: {error}"
                print(f"{fault['name']:45} {state}")
            elif run.found.get(fault["name"], NO_PLACE) in (NO_PLACE, NO_TESTS):
                run.found[fault["name"]] = run.look_for(fault)
                run.write(fault=fault["name"], found=run.found[fault["name"]])
    print("", *(f"{name:45} {found}" for name, found in run.found.items()), sep="\n")


if __name__ == "__main__":
    main()
