"""`refrag.py mcp`: search, read and answer as tools for agents, by the Model Context Protocol over stdin and stdout."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import re
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import refrag
from refrag import like, opt
from refrag_extras.generate import HOW_READ, answering, unfounded

try:
    from mcp.server.lowlevel import Server
    from mcp.server.stdio import stdio_server
    from mcp.shared.exceptions import MCPError
    from mcp.types import INVALID_PARAMS, CallToolResult, ListToolsResult, TextContent, Tool, ToolAnnotations
except ImportError as missing:
    raise refrag.MissingError(f"the tools need the protocol's package ({missing}): pip install 'refrag[mcp]'") from None

INSTRUCTIONS = ("Documents, cut into passages. `search` finds passages, `read` gives a passage or a document by the id "
                "that a search or a citation names, `answer` lets a language model answer from what is found.")

# -- arguments. Each tool is a class of options: fields of the commands', with their help and ranges ---------------


class SearchTool(refrag.Options):
    """Find the passages that answer a question, best first, each with its id, text and score."""
    question: str | None = like(refrag.QuestionConfig, "question", needed=True)
    topk: int = like(refrag.SearchConfig, "topk", limits={"low": 1, "high": 100})
    where: str | None = like(refrag.SearchConfig, "where")
    hops: int = like(refrag.SearchConfig, "hops")

    def check(self) -> None:
        refrag.check_question(self.question, "question")
        if self.where is not None:
            refrag.parse_where(self.where)


class AnswerTool(SearchTool):
    """Answer a question from the passages that are found, with citations: [1] is the first of them."""
    mode: str = like(refrag.PackConfig, "mode")
    p: float = like(refrag.PackConfig, "p")
    max_new: int = like(refrag.GenerateConfig, "max_new", limits={"low": 1, "high": 1024})


MOST_PIECES = 64  # of a document in one reply: some 16,000 tokens


class ReadTool(refrag.Options):
    """Read a passage or a whole document by its id. A long document goes on at the id that the reply calls next."""
    id: str | None = opt(None, "that of a passage (notes.pdf#3) or of a document (notes.pdf)", needed=True)
    pieces: int | None = opt(None, "passages to read, from this one on; default 1 of a passage's id, else "
                             f"{MOST_PIECES}", low=1, high=MOST_PIECES)


TOOLS: dict[str, type[refrag.Options]] = {"search": SearchTool, "read": ReadTool, "answer": AnswerTool}
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
KEYWORDS = {"low": "minimum", "above": "exclusiveMinimum", "high": "maximum", "below": "exclusiveMaximum"}


def input_schema(tool: type[refrag.Options], usual: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a tool's arguments. usual: values of arguments that a call leaves out."""
    properties, needed = {}, []
    for name, (f, kind) in refrag.config_fields([tool]).items():
        rule, default = f.metadata, usual.get(name, f.default)
        properties[name] = ({"type": TYPES[kind], "description": rule["help"]}
                            | ({"enum": list(rule["choices"])} if rule["choices"] else {})
                            | {KEYWORDS[key]: limit for key, limit in rule["limits"].items()}
                            | ({} if default is None else {"default": default}))
        needed += [name] * rule["needed"]
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def read_arguments(tool: type[refrag.Options], given: dict[str, Any], usual: dict[str, Any]) -> refrag.Options:
    """A tool's options. usual: see `input_schema`. Raises UserError, which names an argument as a flag."""
    fields = refrag.config_fields([tool])
    unknown = ", ".join(name for name in given if name not in fields)
    refrag.require(not unknown, f"no such argument: {unknown}: there are {', '.join(fields)}")
    whole = {name: int(value) for name, value in given.items() if isinstance(value, float) and value.is_integer()}
    values = {name: refrag.convert("", value, *fields[name])
              for name, value in (given | whole).items() if value is not None}  # some programs know no integers: 8.0
    return tool(**{name: usual[name] for name in fields if name in usual} | values)


# -- results, as JSON and for reading --------------------------------------------------


def heading(found: dict[str, Any]) -> str:
    """Example: "manual.pdf#3: Manual (manual.pdf, page 12)" """
    title = f": {found['title']}" if found["title"] else ""
    return f"{found['id']}{title}" + (f" ({found['source']})" if found["source"] != found["id"] else "")


def join_pieces(texts: Sequence[str], overlap: bool) -> str:
    """Neighbouring pieces as one text. overlap: the end of each begins the next; it stands once.

    Example: ["Ada wrote notes.", "notes. They hold"] -> "Ada wrote notes. They hold"
    """
    whole = texts[0]
    for text in texts[1:]:
        lengths = range(min(len(whole), len(text)) if overlap else 0, 0, -1)
        shared = next((n for n in lengths if whole.endswith(text[:n])), 0)
        whole += text[shared:] if shared else f" {text}"
    return whole


def source_of(first: refrag.Passage, last: refrag.Passage) -> str:
    """Where people find neighbouring pieces. Example: page 1 and pages 5-6 -> "manual.pdf, pages 1-6" """
    begins, ends = (json.loads(piece.metadata or "{}") for piece in (first, last))
    lasts = {name: ends.get(f"last_{name}", ends.get(name)) for name in refrag.PLACES}
    more = {f"last_{name}": value for name, value in lasts.items() if value != begins.get(name)}
    return dataclasses.replace(first, metadata=json.dumps(begins | more)).source


def search_text(result: dict[str, Any]) -> str:
    return "\n\n".join(f"[{p['rank']}] {heading(p)}\n{p['text']}" for p in result["passages"]) or "no passage was found"


def read_text(result: dict[str, Any]) -> str:
    more = f"\n\n(it goes on: read {result['next']})" if result["next"] else ""
    return f"{heading(result)}\n\n{result['text']}{more}"


def answer_text(result: dict[str, Any]) -> str:
    lines = [result["answer"], ""]
    for c in result["citations"]:
        how = "not among the passages given" if c["forged"] else HOW_READ[c["read"]]
        lines.append(f"[{c['label']}] {heading(c)}, {how}")
    if not result["passages"]:
        lines.append(unfounded(result))
    return "\n".join(lines).strip()


class Toolbox:
    """The tools at work, one call after another in a thread of its own: models serve one thread at a time."""

    def __init__(self, index: refrag.IndexConfig, search: refrag.SearchConfig, pack: refrag.PackConfig,
                 generate: refrag.GenerateConfig, models: refrag.ReaderConfig, runtime: refrag.RuntimeConfig,
                 names: Sequence[str] = tuple(TOOLS)):
        self.configs, self.runtime = (index, search, pack, generate, models, runtime), runtime
        self.names = tuple(dict.fromkeys(names))
        self.usual = vars(search) | vars(pack) | vars(generate)
        self.searcher: refrag.Searcher | None = None
        self.pipeline: refrag.Pipeline | None = None
        self.thread = ThreadPoolExecutor(1, "tools")

    def load(self) -> None:
        """Without `answer` no decoder is needed."""
        if "answer" in self.names:
            self.pipeline = answering(None, *self.configs)
            self.searcher = self.pipeline.searcher
        else:
            self.searcher = refrag.load_searcher(self.configs[0], self.configs[1], self.runtime)

    def search(self, args: SearchTool, cancelled: threading.Event) -> dict[str, Any]:
        passages = self.searcher.search(args.question, args.topk, args.hops, args.where)
        return {"id": "1", "question": args.question, "passages": [p.to_json() for p in passages]}

    def read(self, args: ReadTool, cancelled: threading.Event) -> dict[str, Any]:
        index = self.searcher.index
        found = index.rows_of([args.id]).get(args.id)
        refrag.require(found is not None, f"id {args.id!r}: no document or passage has it: take one that search found")
        first = min((index[row] for row in found), key=lambda passage: passage.part)
        document = sorted((index[row] for row in index.rows_with([first.document_id])), key=lambda p: p.part)
        pieces = document[document.index(first):]
        count = args.pieces or (1 if first.part and first.id == args.id else MOST_PIECES)
        some, rest = pieces[:count], pieces[count:]
        text = join_pieces([piece.text for piece in some], index.manifest["settings"]["overlap"] > 0)
        return {"id": args.id, "title": first.title, "text": text, "source": source_of(first, some[-1]),
                "pieces": [piece.id for piece in some], "next": rest[0].id if rest else None}

    def answer(self, args: AnswerTool, cancelled: threading.Event) -> dict[str, Any]:
        """As of `generate`; without the list of all chunks, which is longer than the rest, unless --explain is set."""
        sampler = torch.Generator().manual_seed(self.pipeline.seed)
        result = self.pipeline.answer(on_text=lambda text: cancelled.is_set(), sampler=sampler, **vars(args))
        if not self.pipeline.settings.explain:
            del result["chunks"]
        return result

    def call(self, name: str, arguments: dict[str, Any], cancelled: threading.Event) -> CallToolResult:
        """The result of a tool, which may be an error."""
        tool, shown = TOOLS[name], {"search": search_text, "read": read_text, "answer": answer_text}[name]
        try:
            args = read_arguments(tool, arguments, self.usual)
            self.searcher.index.refresh()
            result = json.dumps(getattr(self, name)(args, cancelled), ensure_ascii=False)
            result = json.loads(result.encode("utf-8", "replace"))  # a record's field may hold half a surrogate pair
            return CallToolResult(content=[TextContent(text=shown(result))], structured_content=result)
        except Exception as error:
            code, message = refrag.classify(error)
            if code == 1:
                refrag.report(error, self.runtime)
            message = re.sub(rf"--({'|'.join(refrag.config_fields([tool]))})\b", r"\1", message)
            return CallToolResult(content=[TextContent(text=message)], is_error=True,
                                  structured_content={"error": {"code": code, "message": message}})

    async def on_call(self, context: Any, params: Any) -> CallToolResult:
        """Raises MCPError for a tool that is not offered. A call that its client cancels ends at the next token."""
        if params.name not in self.names:
            raise MCPError(INVALID_PARAMS, f"no such tool: {params.name}: there are {', '.join(self.names)}")
        cancelled = threading.Event()
        work = functools.partial(self.call, params.name, params.arguments or {}, cancelled)
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, work)
        finally:
            cancelled.set()

    async def on_list(self, context: Any, params: Any) -> ListToolsResult:
        return ListToolsResult(tools=[
            Tool(name=name, description=TOOLS[name].__doc__, input_schema=input_schema(TOOLS[name], self.usual),
                 annotations=ToolAnnotations(read_only_hint=True, open_world_hint=False)) for name in self.names])

    def server(self) -> Server:
        return Server("refrag", version=refrag.__version__, instructions=INSTRUCTIONS, on_list_tools=self.on_list,
                      on_call_tool=self.on_call)

    def load_or_leave(self) -> None:
        try:
            self.load()
            refrag.notice(f"{', '.join(self.names)}: {len(self.searcher.index):,} passages, for an agent program that "
                          "speaks the Model Context Protocol over stdin and stdout")
        except BaseException as error:  # nothing else ends a process that reads from standard input
            refrag.leave(refrag.report(error, self.runtime))

    async def serve(self) -> None:
        """Until standard input ends. What a call needs is loaded meanwhile: clients wait only so long for the first
        reply. Whatever prints to standard output, the protocol's package sends to standard error."""
        server = self.server()
        async with stdio_server() as (received, sent):
            self.thread.submit(self.load_or_leave)
            await server.run(received, sent, server.create_initialization_options())


def run(mcp: refrag.McpConfig, *configs: Any) -> None:
    index, _, pack, generate, *_ = configs
    refrag.require(pack.mode != "none" and generate.prompt is None, "--mode none and --prompt leave nothing to search")
    refrag.index_manifest(index.index_dir)
    box = Toolbox(*configs, mcp.tools)
    read_arguments(AnswerTool, {"question": "which flags are beyond the limits of an argument?"}, box.usual)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: refrag.leave(128 + number))
    try:
        asyncio.run(box.serve())
    except* BrokenPipeError:
        refrag.notice("the client has gone")
