"""Proves that two checkouts of refrag.py give the same results, by their command lines alone.

    python docs/same_results.py record CHECKOUT OUT_DIR [--only PART ..]
    python docs/same_results.py compare OUT_A OUT_B [--only PART ..] [--tolerance 1e-5] [--ignore KEY ..]

`record` runs the commands of TABLE in CHECKOUT, on its data/ and the bundled models, on one thread, at low priority.
Each part becomes OUT_DIR/PART.json: what its commands printed and every file that they wrote, JSON by its values, all
else by its SHA-256. A part that is there is skipped. `compare` prints every value that differs and the largest relative
difference of each part, and exits with 1 if any differs. Numbers must be equal exactly; of what is IGNORED only the
presence counts. In phases of training --tolerance allows a relative difference and skips digests.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

IGNORED = r"(_s|_m[sb]|/(seconds|ms_per_question|stages|spread|runs|versions|commit|run|ttft_ratio|ttit_ratio|digest))$"
IGNORED += r"|/manifest\.json/files$"

# Each line is the name of a part and one of its commands. {here} is the part's own folder, {index} and the like another
# part's; {few} and {held} are files of SAMPLES, words in capitals stand in SHORT.
SAMPLES = {"few": ("data/wiki_questions.jsonl", slice(0, None, 40)), "held": ("data/rag_train.jsonl", slice(200, 210))}
SHORT = {
    "ANSWER": "generate --index_dir {index} --questions data/wiki_questions.jsonl --max_new 16 --resume "
              "--out {here}/answers.jsonl",
    "ASK": 'generate --index_dir {index} --question "Who coined the term cells?" --max_new 16 JSON',
    "FEW": "generate --index_dir {index} --questions {few} --max_new 16 JSON",
    "EVAL": "eval --index_dir {index} --out_dir {here} JSON",
    "TEXTS": "--train_json data/cpt_train.jsonl --eval_json data/cpt_train.jsonl --seq_tokens 64 STEPS",
    "LESSONS": "--index_dir {index_small} --rag_json data/rag_train.jsonl --eval_json {held}",
    "STEPS": "--steps 20 --batch_size 2 --log_every 1 --eval_limit 2 --dtype float32 --out_dir {here} JSON",
    "JSON": "--json --quiet",
}
TABLE = """
index             index --corpus data/wiki_passages.jsonl --index_dir {here} JSON
index_k4          index --corpus data/wiki_passages.jsonl --index_dir {here} --k 4 --load_dir auto JSON
index_small       index --corpus data/corpus_large.txt --limit 500 --index_dir {here} JSON
index_bm25        index --corpus data/corpus_medium.txt --retriever bm25 --index_dir {here} JSON
index_add         index --corpus data/corpus_small.txt --limit 30 --faiss hnsw --index_dir {here} --k 16 JSON
index_add         index --corpus data/corpus_small.txt --limit 50 --add --index_dir {here} --k 16 JSON
search_hybrid     search --index_dir {index} --questions data/wiki_questions.jsonl JSON
search_bm25       search --index_dir {index_bm25} --questions data/rag_train.jsonl --format trec --quiet
search_hops       search --index_dir {index_k4} --questions {few} --hops 2 JSON
eval_retrieval    EVAL --task retrieval --qa data/wiki_questions.jsonl
eval_gate         EVAL --task gate --qa data/wiki_questions.jsonl
json_doctor       doctor --index_dir {index} JSON
json_align        align --text "Zürich, naïve café, 日本語: unbelievable tokenisation, 3.14 km." JSON
json_compare      ASK --compare
json_explain      ASK --explain --show_prompt
json_prompt       generate --prompt '<doc id="a">Mont Blanc is 4,806 m high.</doc> How high is it?' --max_new 16 JSON
json_chat         chat --index_dir {index} --max_new 16 JSON
json_export       export --index_dir {index} --question "Who coined the term cells?" --out_dir {here} JSON
json_bench        bench --index_dir {index} --contexts 256 --k 16 --p 0.1 --new 2 --repeats 1 --out_dir {here} JSON
json_eval_qa      EVAL --task qa --qa {few} --limit 2 --max_new 8 --p 0.1
json_eval_ppl     EVAL --task ppl --texts data/cpt_train.jsonl --limit 2 --context_tokens 64 --next_tokens 32
json_eval_recon   EVAL --task recon --texts data/cpt_train.jsonl --limit 2 --context_tokens 32
phase_align       cpt_align TEXTS
phase_recon       cpt_recon TEXTS
phase_next        cpt_next TEXTS
phase_next_lora   cpt_next TEXTS --lora_r 8 --k 8 16 --distill 0.5 --load_dir data/reader
phase_sft         sft LESSONS --limit 40 --topk 2 STEPS --seq_tokens 256 --batch_size 1
phase_gate        train_gate LESSONS --limit 80 --epochs 5 --batch_size 8 --topk 4 --out_dir {here} JSON
phase_policy      train_policy LESSONS --limit 20 --steps 20 --batch_size 1 --group 2 --topk 3 --out_dir {here} JSON
phase_policy      FEW --gate policy --load_dir {here}
vary_untrained    FEW --engine model --load_dir none
vary_int4         FEW --engine int4
vary_bfloat16     FEW --dtype bfloat16
vary_batch        FEW --batch_size 3
vary_sampled      FEW --temperature 0.8 --top_p 0.9 --seed 7
vary_ppl          FEW --gate ppl
vary_stored       FEW --index_dir {index_k4} --k 8
answers_none      ANSWER --mode none
answers_refrag_p0 ANSWER --p 0
answers_refrag    ANSWER
answers_truncate  ANSWER --mode truncate
answers_full      ANSWER --mode full
"""
for word, meaning in SHORT.items():
    TABLE = re.sub(rf"\b{word}\b", meaning, TABLE)
PARTS: dict[str, list[str]] = {}
for part, command in (line.split(maxsplit=1) for line in TABLE.strip().splitlines()):
    PARTS.setdefault(part, []).append(command)


def parsed(text: str) -> Any:
    """A JSON value, else JSON lines, else lines of text."""
    for read in (json.loads, lambda text: [json.loads(line) for line in text.splitlines()]):
        with contextlib.suppress(ValueError):
            return read(text)
    return text.splitlines()


def record(name: str, args: argparse.Namespace) -> bool:
    """Run the commands of a part and write OUT_DIR/NAME.json, if it is not there yet. True unless one failed."""
    checkout, out = (folder.resolve() for folder in args.folders)
    paths, start = {part: out / "files" / part for part in PARTS}, time.monotonic()
    here = paths[name]
    if (out / f"{name}.json").exists():
        return True
    if "--resume" not in PARTS[name][0]:
        shutil.rmtree(here, ignore_errors=True)
    (here if "{here}/" in PARTS[name][0] else here.parent).mkdir(parents=True, exist_ok=True)
    for sample, (source, lines) in SAMPLES.items():
        paths[sample] = out / f"{sample}.jsonl"
        texts = (checkout / source).read_text(encoding="utf-8").splitlines(keepends=True)
        paths[sample].write_text("".join(texts[lines]), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("REFRAG_", "PYTHON"))}
    environment |= {"OMP_NUM_THREADS": "1", "REFRAG_HOME": str(out / "home")}
    facts: dict[str, Any] = {"commands": PARTS[name], "printed": [], "files": {}}
    for command in PARTS[name]:
        words = shlex.split(command.format(here=here, **paths))
        done = subprocess.run([sys.executable, str(checkout / "refrag.py"), *words], cwd=checkout, env=environment,
                              capture_output=True, text=True, input="Who coined the term cells?\nWhen was it?\n")
        if done.returncode:
            print(f"{name}: {command}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}", flush=True)
            return False
        facts["printed"].append(parsed(done.stdout))
    for path in sorted(path for path in here.rglob("*") if path.is_file()):
        content = np.load(path).tobytes() if path.suffix == ".npy" else path.read_bytes()
        fact: Any = hashlib.sha256(content).hexdigest()
        if path.suffix in (".json", ".jsonl"):
            fact = parsed(path.read_text(encoding="utf-8"))
        facts["files"][str(path.relative_to(here))] = "there" if path.suffix in (".md", ".png", "") else fact
    text = json.dumps(facts, indent=1).replace(str(out), "OUT").replace(str(checkout), "CHECKOUT")
    for manifest in (out / "files").glob("index*/manifest.json"):  # an index is named by its files' digest
        digest = json.loads(manifest.read_text(encoding="utf-8"))["digest"]
        text = text.replace(digest, manifest.parent.name).replace(digest[:16], manifest.parent.name)
    (out / f"{name}.new").write_text(text + "\n", encoding="utf-8")
    (out / f"{name}.new").rename(out / f"{name}.json")
    if not name.startswith("index"):  # these are read by other parts
        shutil.rmtree(here, ignore_errors=True)
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return True


def leaves(value: Any, ignored: str, path: str = "") -> dict[str, Any]:
    """The path and the value of everything within a JSON value; of what is ignored, that it is there."""
    within = value.items() if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else ()
    found = {} if within else {path: value}
    for key, inner in within:
        found |= leaves("ignored" if re.search(ignored, f"{path}/{key}") else inner, ignored, f"{path}/{key}")
    return found


def compare(name: str, args: argparse.Namespace) -> bool:
    """Print what differs in a part. True if nothing does."""
    ignored = "|".join([IGNORED, *(f"/{re.escape(key)}$" for key in args.ignore)])
    files = [folder / f"{name}.json" for folder in args.folders]
    if not all(file.exists() for file in files):
        print(f"{name}: not recorded in both")
        return False
    a, b = (leaves(json.loads(file.read_text(encoding="utf-8")), ignored) for file in files)
    training, found, largest = name.startswith("phase"), [], 0.0
    for path in dict.fromkeys([*a, *b]):
        x, y = (json.dumps(side[path], ensure_ascii=False) if path in side else "(absent)" for side in (a, b))
        numbers = all(type(side.get(path)) in (int, float) for side in (a, b))
        apart = abs(a[path] - b[path]) / max(abs(a[path]), abs(b[path]), 1e-30) if numbers else 0.0
        largest = max(largest, apart)
        close = apart <= args.tolerance if numbers else re.fullmatch(r'"[0-9a-f]{64}"', x)
        if x != y and not (training and args.tolerance and close):
            found.append(f"  {path}: {x[:300]} != {y[:300]}")
    print(f"{name}: {len(found):,} of {len(a):,} values differ, by at most {largest:.3g} relatively", *found, sep="\n")
    return not found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("folders", nargs=2, type=Path, metavar="FOLDER", help="CHECKOUT OUT_DIR, or OUT_A OUT_B")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="parts, by how their names begin")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative difference allowed in training")
    parser.add_argument("--ignore", nargs="+", default=[], metavar="KEY", help="more keys whose values may differ")
    args = parser.parse_args()
    if args.action == "record":
        os.nice(max(0, 10 - os.nice(0)))
        args.only.append("index")  # what other parts read
    act, problem = {"record": (record, "failed"), "compare": (compare, "differ")}[args.action]
    chosen = [name for name in PARTS if name.startswith(tuple(args.only))]
    bad = [name for name in chosen if not act(name, args)]
    print(f"{len(chosen)} parts, {len(bad)} {problem}: {' '.join(bad) or 'none'}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
