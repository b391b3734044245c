"""Fills the tables of docs/RESULTS.md from the JSON files in docs/results, each with its command, commit and device.

    python docs/make_results.py                        writes the tables anew
    python docs/make_results.py --check                exit status 1 if they are not what the files say
    python docs/make_results.py --add NAME FILE        keeps a results.json or bench.json as docs/results/NAME.json

A table stands between `<!-- results: NAME [NAME ..] -->` and `<!-- end -->`. A file is what `refrag.py eval` or `bench`
wrote to --out_dir, what a measure script printed, or {columns, rows, command, commit, device} with the cells as text.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path, PurePath
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from refrag_extras import bench, evaluate

PAGE, FOLDER = Path(__file__).resolve().with_name("RESULTS.md"), Path(__file__).resolve().with_name("results")
BLOCK = re.compile(r"(<!-- results: (?P<names>[\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table_of(result: dict) -> str:
    """The table of one file, in Markdown."""
    if "task" in result:
        return evaluate.TASKS[result["task"]].table(result)
    if "rounds" in result:
        return bench.bench_text(result)
    if "what" in result:
        columns = list(dict.fromkeys(name for row in result["rows"] for name in row))
        return evaluate.markdown_table(columns, [[row.get(name) for name in columns] for row in result["rows"]])
    return evaluate.markdown_table(result["columns"], result["rows"])


def device_of(result: dict) -> str:
    """What it ran on, in words."""
    device = result["device"]
    if isinstance(device, str):
        return device
    name = device.get("name") or f"{device['device']}, {device['cpu_threads']} threads"
    return f"{name}, {device['dtype']}, torch {result['versions']['torch']}"


def block_of(names: list[str]) -> str:
    """The tables of some files, each above where it comes from."""
    parts = []
    for name in names:
        result = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        command = result["command"] if isinstance(result["command"], str) else shlex.join(result["command"])
        source = f"n = {result['n']}; " if "n" in result else ""
        parts.append(f"{table_of(result)}\n\n`{command}`; {source}commit {result['commit'][:7]}; {device_of(result)}; "
                     f"[{name}.json](results/{name}.json)\n\n")
    return "".join(parts)


def without_paths(value: Any) -> Any:
    """A JSON value in which paths of this machine are their last two names."""
    if isinstance(value, dict):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    is_path = isinstance(value, str) and value.startswith("/")
    return str(PurePath(*PurePath(value).parts[-2:])) if is_path else value


def add(name: str, path: Path) -> None:
    """Keep a result under a name, without the paths of this machine."""
    result = without_paths(json.loads(path.read_text(encoding="utf-8")))
    program = PurePath(result["command"][0])
    result["command"][0] = program.name if program.name == "refrag.py" else f"docs/{program.name}"
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a table is stale")
    parser.add_argument("--add", nargs=2, metavar=("NAME", "FILE"), help="keep a result first")
    args = parser.parse_args()
    if args.add:
        add(args.add[0], Path(args.add[1]))
    page = PAGE.read_text(encoding="utf-8")
    made = BLOCK.sub(lambda found: found[1] + "\n" + block_of(found["names"].split()) + found[3], page)
    if args.check:
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
