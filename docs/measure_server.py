"""Loads a server with many clients at once, and with one: the same answers, times and memory. Prints one JSON object.

    python docs/measure_server.py --index_dir runs/wiki --questions data/wiki_questions.jsonl --clients 16 --seconds 120

First every question is asked alone; then the clients ask them again and again, each in an order of its own, by streams.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
import numpy as np
from measure import print_result

import refrag


def start(args: argparse.Namespace) -> tuple[subprocess.Popen, str]:
    """A server and its address."""
    process = subprocess.Popen([sys.executable, refrag.__file__, "serve", "--index_dir", args.index_dir, "--port", "0",
                                "--max_new", str(args.max_new)],
                               stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if found := re.match(r"serving on (http://\S+) ", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, found[1]
    raise SystemExit("the server did not start")


def ask(client: httpx.Client, question: str) -> tuple[str, float, float, dict]:
    """(answer, seconds to the first text, seconds in all, the server's metrics) of a streamed answer."""
    begun, first, text, metrics = time.perf_counter(), None, "", {}
    body = {"model": "refrag", "stream": True, "messages": [{"role": "user", "content": question}]}
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            part = event["choices"][0]["delta"].get("content")
            first = first or (time.perf_counter() if part else None)
            text += part or ""
            metrics = event.get("refrag", {}).get("metrics", metrics)
    return text, (first or time.perf_counter()) - begun, time.perf_counter() - begun, metrics


def resident_mb(pid: int) -> float:
    """Memory of a process, where /proc tells it."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return round(int(found[1]) / 1024, 1)


def load(url: str, questions: list[str], alone: dict[str, str], clients: int, seconds: float) -> dict:
    """What so many clients see in so many seconds."""
    end, done, faults = time.monotonic() + seconds, [], []

    def one(number: int) -> None:
        order = random.Random(number)
        with httpx.Client(base_url=url, timeout=300) as client:
            while time.monotonic() < end:
                question = order.choice(questions)
                try:
                    answer, *measured = ask(client, question)
                    done.append((measured, answer == alone[question]))
                except httpx.HTTPError as error:
                    faults.append(repr(error))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(clients)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - begun
    first = [1e3 * measured[0] for measured, _ in done]
    metrics = [measured[2] for measured, _ in done]
    prefill = [1e3 * one["stages"]["prefill_s"] for one in metrics]
    before = [1e3 * one["ttft_s"] - decoder for one, decoder in zip(metrics, prefill, strict=True)]
    return {"clients": clients, "answers": len(done), "faults": len(faults),
            "other_than_alone": sum(not same for _, same in done),
            **{f"ttft_p{q}_ms": round(float(np.percentile(first, q))) for q in (50, 99)},
            "before_prefill_p50_ms": round(float(np.median(before))),
            "prefill_p50_ms": round(float(np.median(prefill))),
            "answers_per_s": round(len(done) / took, 3),
            "tokens_per_s": round(sum(one["new_tokens"] for one in metrics) / took, 1)}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--index_dir", required=True)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--max_new", type=int, default=32)
    args = parser.parse_args()
    questions = [item["question"] for item in refrag.read_question_file(args.questions, "--questions")][: args.limit]
    process, url = start(args)
    try:
        with httpx.Client(base_url=url, timeout=300) as client:
            alone = {question: ask(client, question)[0] for question in questions}
        rows, memory = [], {"after_each_once": resident_mb(process.pid)}
        for clients, share in ((1, 0.25), (args.clients, 0.5), (args.clients, 0.5)):
            rows.append(load(url, questions, alone, clients, share * args.seconds))
            memory[f"after_row_{len(rows)}"] = resident_mb(process.pid)
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    finally:
        process.terminate()
        process.wait(timeout=30)
    print_result("server", {"n": len(questions), "rows": rows, "memory_mb": memory})


if __name__ == "__main__":
    main()
