"""Makes the tables that stand on the trained checkpoint again, or trains that checkpoint again.

    python docs/reproduce.py DATA OUT                       every table
    python docs/reproduce.py DATA OUT --only answers_squad  some of them, with what they need
    python docs/reproduce.py DATA OUT --train               the checkpoint: hours on two CPU cores
    python docs/reproduce.py DATA OUT --list                the commands alone

DATA holds squad/, nq/, multihop/ and text/: JSON lines, gzipped, {id,title,text,split} in passages, {question,answers,
positive_ids} in qa.train and qa.dev, {text} in text/. OUT receives corpora, indexes and runs. What a command has done
is not done again, and what was interrupted goes on. A table's result is kept with `docs/make_results.py --add`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVERY_MODE = "full,none,refrag,truncate,expanded_only,random_gate,cosine_gate,wrong_vectors,oracle_gate"
MAIN_MODES = "full,none,refrag,truncate,expanded_only,random_gate,wrong_vectors"
VECTORS_ALONE = "refrag,truncate,wrong_vectors"  # expanded_only at p = 0 is the same prompt for every k
TRAINING = "--lora_r 32 --dtype bfloat16 --save_every 50"


def read(path: Path) -> Iterator[dict]:
    """The records of a gzipped JSON lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def write(path: Path, records: list[dict], *names: str) -> None:
    """Write records as JSON lines, of each these fields that it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = ({name: record[name] for name in names if name in record} for record in records)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8")


def make_corpora(data: Path, out: Path) -> None:
    """Passages to answer from: SQuAD's development articles among 3,000 others, and all of NQ among the same."""
    squad, nq = list(read(data / "squad/passages.jsonl.gz")), list(read(data / "nq/passages.jsonl.gz"))
    dev, others = ([p for p in squad if p["split"] == split] for split in ("dev", "train"))
    random.Random(0).shuffle(others)
    write(out / "squad_dev.jsonl", dev + others[:3000], "id", "title", "text")
    write(out / "nq_all.jsonl", nq + others[:3000], "id", "title", "text")
    write(out / "held_out.jsonl", dev, "text")
    novels = [book["text"] for book in read(data / "text/books.train.jsonl.gz")][::9]  # none was trained on
    write(out / "novels.jsonl", [{"text": text[len(text) // 2 :][:12_000]} for text in novels], "text")


def make_lessons(data: Path, out: Path) -> None:
    """Passages and questions to learn answering from; none of a development article."""
    squad, nq, hops = (list(read(data / name / "passages.jsonl.gz")) for name in ("squad", "nq", "multihop"))
    questions = {name: list(read(data / name / "qa.train.jsonl.gz")) for name in ("squad", "nq", "multihop")}
    closed = {i for name in questions for q in read(data / name / "qa.dev.jsonl.gz") for i in q["positive_ids"]}
    around = {i for q in questions["multihop"] for i in q["context_ids"]}
    passages = [p for p in squad + nq if p["split"] == "train"] + [p for p in hops if p["id"] in around]
    passages = [p for p in passages if p["id"] not in closed]
    known = {p["id"] for p in passages}
    write(out / "lessons.jsonl", passages, "id", "title", "text")
    rng = random.Random(1337)
    rng.shuffle(questions["squad"])
    shuffled = rng.getstate()
    for name, first, last in (("first", 0, 9000), ("then", 9000, 17500), ("last", 17500, 21500)):
        chosen = questions["squad"][first:last] + questions["nq"] + questions["multihop"]
        chosen = [q for q in chosen if set(q["positive_ids"]) <= known]
        rng.setstate(shuffled)
        rng.shuffle(chosen)
        write(out / f"{name}_qa.jsonl", chosen, "id", "question", "answers", "positive_ids")
    make_low_p_lessons(squad, questions["squad"], out)


def make_low_p_lessons(passages: list[dict], questions: list[dict], out: Path) -> None:
    """4,000 of SQuAD's training passages and all their questions, to answer from a little text and many vectors."""
    rng, ids = random.Random(5), sorted(p["id"] for p in passages if p["split"] == "train")
    drawn = set(rng.sample(ids, min(4000, len(ids))))
    chosen = [q for q in questions if set(q["positive_ids"]) <= drawn]
    rng.shuffle(chosen)
    write(out / "low_p.jsonl", [p for p in passages if p["id"] in drawn], "id", "title", "text")
    write(out / "low_p_qa.jsonl", chosen, "id", "question", "answers", "positive_ids")


def index(corpus: Path, folder: Path, *options: str) -> list[str]:
    """The command that indexes a corpus."""
    return ["index", "--corpus", str(corpus), "--index_dir", str(folder), *options]


def answers(questions: list[str], index_dir: Path, k: str, p: str, modes: str, out_dir: Path) -> list[str]:
    """The command that has questions answered; one at a time, so that no answer depends on a batch's padding."""
    return ["eval", "--task", "qa", *questions, "--index_dir", str(index_dir), "--k", k, "--p", *p.split(), "--modes",
            modes, "--batch_size", "1", "--max_new", "32", "--dtype", "bfloat16", "--out_dir", str(out_dir)]


def probe(task: str, texts: Path, options: str, out_dir: Path) -> list[str]:
    """The command that measures what the decoder makes of vectors, teacher forced."""
    return ["eval", "--task", task, "--texts", str(texts), *options.split(), "--dtype", "bfloat16", "--out_dir",
            str(out_dir)]


def tune(folder: Path, before: Path, questions: Path, index_dir: Path, options: str) -> list[str]:
    """The command that goes on training a checkpoint on answering."""
    return ["sft", "--load_dir", str(before), "--rag_json", str(questions), "--index_dir", str(index_dir),
            *f"{TRAINING} {options}".split(), "--out_dir", str(folder)]


def tables(data: Path, out: Path) -> dict[str, list[str]]:
    """The commands in order, by the name of their result; those that only prepare begin with an underscore."""
    squad, more = (["--qa", str(data / "squad/qa.dev.jsonl.gz"), "--limit", limit] for limit in ("501", "1001"))
    nq = ["--qa", str(data / "nq/qa.dev.jsonl.gz")]
    wiki = data / "text/wikitext2.valid.jsonl.gz"
    windows = "--k 4 8 16 32 --limit 200"
    full = answers(squad, out / "squad", "16", "1", "full", out / "answers_ceiling")
    return {
        "_squad": index(out / "squad_dev.jsonl", out / "squad", "--k", "16"),
        "_squad4": index(out / "squad_dev.jsonl", out / "squad4", "--k", "4"),
        "_nq": index(out / "nq_all.jsonl", out / "nq", "--k", "16"),
        "_nq4": index(out / "nq_all.jsonl", out / "nq4", "--k", "4"),
        "answers_squad": answers(squad, out / "squad", "16", "0 0.1 0.25 0.5 1", EVERY_MODE, out / "answers_squad"),
        "answers_squad_more": answers(more, out / "squad", "16", "0 0.1 0.25", MAIN_MODES, out / "answers_squad_more"),
        "answers_low_p": answers(more, out / "squad", "16", "0.05 0.1", "refrag", out / "answers_low_p"),
        "answers_nq": answers(nq, out / "nq", "16", "0 0.1 0.25", MAIN_MODES, out / "answers_nq"),
        **{f"answers_{name}_k{k}": answers(asked, out / f"{name}4", k, "0", VECTORS_ALONE, out / f"answers_{name}_k{k}")
           for name, asked in (("squad", more), ("nq", nq)) for k in ("4", "8", "32")},
        "next_tokens_wiki": probe("ppl", wiki, windows, out / "next_tokens_wiki"),
        "next_tokens_novels": probe("ppl", out / "novels.jsonl", windows, out / "next_tokens_novels"),
        "recon_reader": probe("recon", out / "held_out.jsonl", "--k 4 8 --limit 20 --context_tokens 64",
                              out / "recon_reader"),
        "_lessons": index(out / "lessons.jsonl", out / "lessons"),
        "_ceiling": tune(out / "ceiling", ROOT / "data/reader", out / "last_qa.jsonl", out / "lessons", "--train d "
                         "--topk 8 --topk_min 3 --p 1 --quote_frac .2 --no_answer_frac .02 --seq_tokens 1536 "
                         "--batch_size 2 --lr 1e-4 --steps 300 --seed 13"),
        "answers_ceiling": [*full, "--load_dir", str(out / "ceiling")],
    }


def lessons(data: Path, out: Path) -> dict[str, list[str]]:
    """The commands that train the checkpoint, in order. Each phase begins with what the one before has written."""
    texts = ["--train_json", str(data / "text/wiki_squad_train_articles.jsonl.gz"),
             "--eval_json", str(out / "held_out.jsonl")]

    def recon(name: str, options: str) -> list[str]:
        return ["cpt_recon", *texts, *f"{TRAINING} --seq_tokens 64 --batch_size 16 --lr 1e-3 --projector_lr 2e-3 "
                f"--train ped --eval_every 400 --eval_limit 16 {options}".split(), "--out_dir", str(out / name)]

    def sft(name: str, before: str, questions: str, options: str) -> list[str]:
        return tune(out / name, out / before, out / questions, out / "lessons", f"--train pd {options}")

    def low_p(name: str, before: str, options: str) -> list[str]:
        return tune(out / name, out / before, out / "low_p_qa.jsonl", out / "low_p", "--topk 8 --gate_frac .9 "
                    f"--no_answer_frac .03 --seq_tokens 1536 --batch_size 2 --lr 3e-4 {options}")

    return {
        "_lessons": index(out / "lessons.jsonl", out / "lessons"),
        "_recon4": recon("recon4", "--enc decoder:4 --k 4 --steps 1200"),
        "_recon": [*recon("recon", "--k 4 8 16 --steps 1600"), "--load_dir", str(out / "recon4")],
        "_sft1": sft("sft1", "recon", "first_qa.jsonl", "--topk 5 --k 4 8 16 16 --p 0 0 .1 .1 .25 .25 .5 1 "
                     "--seq_tokens 1024 --batch_size 4 --lr 4e-4 --steps 240"),
        "_sft2": sft("sft2", "sft1", "first_qa.jsonl", "--topk 6 --topk_min 1 --k 4 4 4 8 8 8 16 16 16 32 --p 0 0 0 "
                     "0 .1 .1 .25 1 --no_answer_frac .05 --seq_tokens 1024 --batch_size 2 --lr 3e-4 --steps 700 "
                     "--seed 7"),
        "_sft": sft("sft", "sft2", "then_qa.jsonl", "--topk 8 --topk_min 2 --k 4 4 4 4 8 8 8 16 16 32 --p 0 0 0 .1 .1 "
                    ".25 .5 1 --no_answer_frac .05 --quote_frac .3 --seq_tokens 1536 --batch_size 2 --lr 3e-4 --steps "
                    "620 --seed 11"),
        "_low_p": index(out / "low_p.jsonl", out / "low_p"),
        "_low_p1": low_p("low_p1", "sft", "--train pd --topk_min 3 --k 16 16 16 8 4 32 --p .05 .1 .1 .1 .25 .05 0 1 "
                         "--steps 320 --seed 77"),
        "_low_p2": low_p("low_p2", "low_p1", "--train ped --topk_min 2 --k 4 8 16 16 32 --p 0 0 0 .05 .05 .1 .25 1 "
                         "--quote_frac .1 --projector_lr 6e-4 --steps 300 --warmup .05 --seed 123"),
    }


def made(argv: list[str]) -> str:
    """The folder that a command writes."""
    return argv[argv.index("--out_dir" if "--out_dir" in argv else "--index_dir") + 1]


def needed(commands: dict[str, list[str]], only: list[str]) -> dict[str, list[str]]:
    """The tables that are asked for, every one where none is, and the commands before them whose folders they read."""
    wanted: dict[str, list[str]] = {}
    for name, argv in reversed(commands.items()):
        asked = name in only if only else not name.startswith("_")
        if asked or any(made(argv) in later for later in wanted.values()):
            wanted[name] = argv
    return dict(reversed(wanted.items()))


def again(argv: list[str]) -> list[str]:
    """What continues a command that was begun, or is done already; the command itself where nothing was."""
    begun = any((Path(made(argv)) / name).is_file() for name in ("run.json", "questions.jsonl"))
    return [*argv, "--resume"] if begun else argv


def run(name: str, argv: list[str]) -> None:
    """Run a command of refrag.py unless its index is there; keep the result of an evaluation."""
    print("\n$ python refrag.py " + shlex.join(argv), flush=True)
    if argv[0] == "index" and (Path(made(argv)) / "manifest.json").is_file():
        return
    subprocess.run([sys.executable, ROOT / "refrag.py", *again(argv)], check=True)
    if not name.startswith("_"):
        result = Path(made(argv)) / "results.json"
        subprocess.run([sys.executable, ROOT / "docs/make_results.py", "--add", name, result], check=True)


def main() -> None:
    """Make what the commands read, then run them in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="these tables alone")
    parser.add_argument("--train", action="store_true", help="train the checkpoint instead of making tables")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    args = parser.parse_args()
    commands = lessons(args.data, args.out) if args.train else tables(args.data, args.out)
    unknown = set(args.only) - commands.keys()
    if unknown:
        parser.error(f"--only {' '.join(sorted(unknown))}: known are {' '.join(n for n in commands if n[0] != '_')}")
    wanted = commands if args.train else needed(commands, args.only)
    if args.list:
        print("\n".join("python refrag.py " + shlex.join(argv) for argv in wanted.values()))
        return
    missing = [f"{name}/" for name in ("squad", "nq", "multihop", "text") if not (args.data / name).is_dir()]
    if missing:
        parser.error(f"{args.data}: no {', '.join(missing)} there; --help tells what DATA holds")
    makers: list[Callable[[Path, Path], None]] = [make_corpora, *([make_lessons] if "_lessons" in wanted else [])]
    for make in makers:
        make(args.data, args.out)
    for name, argv in wanted.items():
        run(name, argv)
    if args.train:
        shipping = [ROOT / "docs/ship_reader.py", args.out / "low_p2", ROOT / "data/reader"]
        subprocess.run([sys.executable, *shipping], check=True)


if __name__ == "__main__":
    main()
