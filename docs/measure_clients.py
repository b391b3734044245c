"""Asks the server through the clients that people have: their answers and vectors against the command line's.

    python3 -m venv runs/clients
    runs/clients/bin/pip install openai langchain-openai llama-index-llms-openai-like 'lm_eval[api]'
    python docs/measure_clients.py --index_dir runs/wiki --questions data/wiki_questions.jsonl --clients runs/clients

The clients have an environment of their own, in which this file runs again with the server's address. No hub is asked.
Prints a table on stderr and one JSON object; exit code 1 if something differs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none is needed"}
TASK = """\
task: refrag_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answers[0]}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: {max_new}, temperature: 0.0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


# -- in the clients' environment ------------------------------------------------


def ask_openai(work: SimpleNamespace) -> Iterator[tuple[str, str, list]]:
    """(call, what it gives, the results) of the openai client."""
    import openai

    client = openai.OpenAI(base_url=work.url, api_key="none is needed")

    def chat(question: str, **more: Any) -> Any:
        messages = [{"role": "user", "content": question}]
        return client.chat.completions.create(model="refrag", messages=messages, max_tokens=work.max_new, **more)

    def embed(inputs: list, **more: Any) -> list:
        return [item.embedding for item in client.embeddings.create(model=work.embedder, input=inputs, **more).data]

    yield "chat", "answers", [chat(question).choices[0].message.content for question in work.questions]
    yield "stream", "answers", ["".join(part.choices[0].delta.content or "" for part in chat(question, stream=True)
                                        if part.choices).strip() for question in work.questions]
    yield "embeddings", "vectors", embed(work.texts)
    yield "embeddings, floats", "vectors", embed(work.texts, encoding_format="float")


def ask_langchain(work: SimpleNamespace) -> Iterator[tuple[str, str, list]]:
    """The same of langchain-openai."""
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    chat = ChatOpenAI(model="refrag", base_url=work.url, max_tokens=work.max_new, temperature=0)
    yield "ChatOpenAI.invoke", "answers", [chat.invoke(question).content for question in work.questions]
    yield "ChatOpenAI.stream", "answers", ["".join(part.content for part in chat.stream(question)).strip()
                                           for question in work.questions]
    embed = OpenAIEmbeddings(model=work.embedder, base_url=work.url, check_embedding_ctx_length=False)
    yield "OpenAIEmbeddings.embed_documents", "vectors", embed.embed_documents(work.texts)
    yield "OpenAIEmbeddings.embed_query", "vectors alone", [embed.embed_query(text) for text in work.texts]


def ask_langchain_default(work: SimpleNamespace) -> Iterator[tuple[str, str, list]]:
    """OpenAIEmbeddings as it is without check_embedding_ctx_length=False: token ids of OpenAI's vocabulary."""
    from langchain_openai import OpenAIEmbeddings

    embed = OpenAIEmbeddings(model=work.embedder, base_url=work.url, max_retries=0)
    yield "OpenAIEmbeddings, its default", "refused", embed.embed_documents(work.texts)


def ask_llama_index(work: SimpleNamespace) -> Iterator[tuple[str, str, list]]:
    """The same of LlamaIndex."""
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(model="refrag", api_base=work.url, api_key="none is needed", is_chat_model=True, temperature=0,
                       max_tokens=work.max_new)
    asked = [[ChatMessage(role="user", content=question)] for question in work.questions]
    yield "OpenAILike.chat", "answers", [model.chat(messages).message.content for messages in asked]
    streams = (model.stream_chat(messages) for messages in asked)
    yield "OpenAILike.stream_chat", "answers", ["".join(part.delta or "" for part in stream).strip()
                                                for stream in streams]


def ask_lm_eval(work: SimpleNamespace) -> Iterator[tuple[str, str, list]]:
    """The same of lm_eval, with a task of our own."""
    folder = Path(work.folder)
    (folder / "refrag_questions.yaml").write_text(
        TASK.format(questions=folder / "questions.jsonl", max_new=work.max_new), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions", "--model_args",
         f"model=refrag,base_url={work.url}/chat/completions,tokenizer_backend=None,max_retries=1", "--tasks",
         "refrag_questions", "--include_path", str(folder), "--apply_chat_template", "--log_samples", "--output_path",
         str(folder / "lm_eval")], capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-300:])
    [samples] = (folder / "lm_eval").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    yield "local-chat-completions", "answers", [row["resps"][0][0] for row in sorted(rows, key=lambda r: r["doc_id"])]


CLIENTS: list[tuple[str, Callable[[SimpleNamespace], Iterator]]] = [
    ("openai", ask_openai), ("langchain-openai", ask_langchain), ("langchain-openai", ask_langchain_default),
    ("llama-index-llms-openai-like", ask_llama_index), ("lm_eval", ask_lm_eval)]


def ask_all(work: SimpleNamespace) -> list[dict[str, Any]]:
    """What each client's calls gave; a client that fails says how."""
    rows = []
    for package, ask in CLIENTS:
        about = {"client": f"{package} {importlib.metadata.version(package)}"}
        try:
            rows += [about | {"call": call, "kind": kind, "results": results} for call, kind, results in ask(work)]
        except Exception as error:
            rows.append(about | {"call": ask.__name__, "kind": "error",
                                 "error": f"{type(error).__name__}: {error}".replace("\n", " ")[:300]})
    return rows


# -- in the project's environment -----------------------------------------------


def command_line(args: argparse.Namespace, folder: Path) -> list[str]:
    """The answers that `generate --json` gives, each question asked alone."""
    import refrag

    out = folder / "answers.jsonl"
    subprocess.run([sys.executable, refrag.__file__, "generate", "--index_dir", args.index_dir, "--questions",
                    str(folder / "questions.jsonl"), "--max_new", str(args.max_new), "--out", str(out), "--quiet"],
                   check=True)
    return [json.loads(line)["answer"] for line in out.read_text(encoding="utf-8").splitlines()]


def compare(row: dict[str, Any], expected: dict[str, list]) -> dict[str, Any]:
    """A row of the table: how many results are those of the command line. Vectors: to the last bit."""
    about = {name: row[name] for name in ("client", "call")}
    if row["kind"] in expected:
        same = sum(ours == theirs for ours, theirs in zip(expected[row["kind"]], row["results"], strict=True))
        return about | {"n": len(row["results"]), "same": same, "ok": same == len(row["results"])}
    # What it sends are ids of OpenAI's vocabulary: the client must fail, and never hand out vectors
    fails = row["kind"] == "error" and row["call"] == ask_langchain_default.__name__
    return about | {"n": 0, "same": 0, "ok": fails, "says": row.get("error", "vectors, of other texts")}


def main() -> None:
    """Parse, serve, ask, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--index_dir", required=True)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--clients", required=True, help="the virtual environment that holds the clients")
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--max_new", type=int, default=32)
    args = parser.parse_args()
    from measure import print_result
    from measure_server import start

    import refrag

    items = refrag.read_question_file(args.questions, "--questions")[: args.limit]
    embedder = refrag.load_embedder(None, refrag.RuntimeConfig())
    texts = [item["question"] for item in items]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "questions.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        expected = {"answers": command_line(args, folder), "vectors": embedder.embed_passages(texts).tolist(),
                    "vectors alone": [embedder.embed_passages([text])[0].tolist() for text in texts]}
        process, url = start(args)
        try:
            work = {"url": f"{url}/v1", "embedder": embedder.name, "questions": texts, "texts": texts,
                    "folder": name, "max_new": args.max_new}
            python = Path(args.clients) / ("Scripts/python" if os.name == "nt" else "bin/python")
            done = subprocess.run([str(python), __file__, "--ask"], input=json.dumps(work), stdout=subprocess.PIPE,
                                  text=True, check=True, env=os.environ | OFFLINE | {"HF_HOME": f"{name}/hub"})
        finally:
            process.terminate()
            process.wait(timeout=30)
    rows = [compare(row, expected) for row in json.loads(done.stdout.splitlines()[-1])]
    for row in rows:
        told = row.get("says") or f"{row['same']} of {row['n']} as on the command line"
        print(f"{'ok ' if row['ok'] else 'NOT'} {row['client']:38} {row['call']:34} {told}", file=sys.stderr)
    print_result("clients", {"n": len(items), "rows": rows})
    sys.exit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    if sys.argv[1:] == ["--ask"]:
        print(json.dumps(ask_all(SimpleNamespace(**json.load(sys.stdin)))))
    else:
        main()
