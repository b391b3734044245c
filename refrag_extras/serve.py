"""`refrag.py serve`: an OpenAI-compatible HTTP server, and a page to ask from."""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import functools
import hmac
import ipaddress
import itertools
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pydantic
import torch
import uvicorn
from pydantic import AfterValidator, BeforeValidator, Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

import refrag
from refrag_extras.chat import MODES, with_topic
from refrag_extras.generate import answering

# -- requests ---------------------------------------------------------------------

MOST_TOKENS = 1024  # that a request may ask for
BODY_BYTES = 1 << 20  # that a request may have
PAGES = Path(__file__).resolve().parent / "webapp"
API_NAMES = {"max_new": "max_tokens", "temperature": "temperature", "top_p": "top_p",  # of flags that clients can set
             **{name: f"refrag.{name}" for name in ("mode", "k", "p", "floor", "topk", "where", "hops")}}


class Refused(Exception):
    """A request that is answered with an error. status: HTTP's; code: a word for programs; param: the field."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refusal(error: Exception) -> Refused:
    """What a client is told of an error, in the API's words. What is no fault of the request goes to stderr too.

    Example: UserError("--p must lie between 0 and 1, got 2") -> "refrag.p must lie between 0 and 1, got 2", 400
    """
    if isinstance(error, Refused):
        return error
    if isinstance(error, ClientDisconnect):
        return Refused(499, "the client has gone", "client_gone")
    if isinstance(error, pydantic.ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        message = "not supported here, or not with this value" if first["type"] == "extra_forbidden" else first["msg"]
        message = message.removeprefix("Value error, ")
        return Refused(400, f"{place}: {message}" if place else message, first["type"], place or None)
    if isinstance(error, refrag.UserError):
        names = re.findall(rf"--({'|'.join(API_NAMES)})\b", str(error))
        message = re.sub(r"--(\w+)", lambda match: API_NAMES.get(match[1], match[0]), str(error))
        if isinstance(error, refrag.TooLongError):
            return Refused(400, message, "context_length_exceeded", "messages")
        return Refused(400, message, "invalid_value", API_NAMES[names[0]] if names else None)
    refrag.say(f"error: {refrag.one_line(error)}", file=sys.stderr)
    absent = isinstance(error, refrag.MissingError)  # the server that decodes, say
    return Refused(503 if absent else 500, f"{type(error).__name__}: {refrag.one_line(error)}", "internal_error")


def joined_parts(content: Any) -> Any:
    """A message's text, also where it comes in parts. Raises ValueError for a part that is no text."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
               for part in content):
        raise ValueError("only parts of type text are supported")
    return "".join(part["text"] for part in content)


def listed(value: Any) -> Any:
    """One text counts as a list of it."""
    return [value] if isinstance(value, str) else value


def ends_with_question(messages: list[Any]) -> list[Any]:
    """Raises ValueError unless the last message can be answered."""
    if messages[-1].role != "user" or not messages[-1].content.strip():
        raise ValueError("the last message must be the user's, and not empty")
    return messages


UNREAD = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
          "parallel_tool_calls", "name")  # official fields that change no answer
NEUTRAL = {"n": (1,), "logprobs": (False,), "response_format": ({"type": "text"},), "modalities": (["text"],),
           "service_tier": ("auto", "default"), "reasoning_effort": ("none",), "verbosity": ("medium",),
           **dict.fromkeys(("top_logprobs", "presence_penalty", "frequency_penalty"), (0,)), "logit_bias": ({},),
           **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
           **dict.fromkeys(("tools", "functions", "tool_calls", "annotations"), ([],))}


class Form(pydantic.BaseModel, extra="forbid", strict=True, allow_inf_nan=False):
    """What the requests have in common. null counts as left out; an unknown field is refused, since to ignore it may
    change the answer."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def without_neutral(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None and key not in UNREAD
                and value not in NEUTRAL.get(key, ())} if isinstance(data, dict) else data


class Message(Form):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(joined_parts)]


class RefragFields(Form):
    mode: Literal[MODES] = ""
    k: int = 0
    p: float = 0
    floor: int = 0
    topk: int = Field(0, le=100)
    where: str = Field("", max_length=1000)
    hops: int = Field(0, le=4)


class StreamOptions(Form):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatForm(Form):
    model: str
    messages: Annotated[list[Message], Field(min_length=1), AfterValidator(ends_with_question)]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int = Field(None, le=MOST_TOKENS)
    max_completion_tokens: int = Field(None, le=MOST_TOKENS)
    temperature: float = Field(0, le=100)
    top_p: float = 1
    seed: int = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=4),
                    BeforeValidator(listed)] = ()
    refrag: RefragFields = RefragFields()


class EmbeddingsForm(Form):
    model: str
    input: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=2048),
                     BeforeValidator(listed)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int = None


class ChatRequest(NamedTuple):
    """A request for an answer, understood."""

    question: str
    settings: refrag.Settings
    stream: bool = False
    usage: bool = False  # whether a stream ends with the counts of tokens

    @classmethod
    def read(cls, data: bytes, pipeline: refrag.Pipeline) -> ChatRequest:
        """Raises Refused and what `refusal` makes one of."""
        body, usual = ChatForm.model_validate_json(data), pipeline.settings
        check_served(body.model, ["refrag"])
        question, system = asked_by(body.messages)
        counts = (body.max_completion_tokens, body.max_tokens, min(usual.max_new, MOST_TOKENS))
        changes = {"system": system, "stop": tuple(body.stop) or usual.stop,
                   "max_new": next(count for count in counts if count is not None),
                   **body.model_dump(include={"temperature", "top_p"}, exclude_unset=True),
                   **body.refrag.model_dump(exclude_unset=True)}
        if changes.get("mode", usual.mode) != "none" and pipeline.searcher is None:
            raise Refused(400, "this server was started without an index: only the mode none is left", "invalid_value",
                          "refrag.mode")
        seed = body.seed
        if seed is None:
            sampled = changes.get("temperature", usual.temperature) > 0
            seed = secrets.randbelow(2**53) if sampled else pipeline.seed  # JavaScript keeps 53 bits
        sampler = torch.Generator().manual_seed(seed % 2**63)
        return cls(question, pipeline.settings_for(**changes, sampler=sampler), body.stream,
                   body.stream_options.include_usage)


def asked_by(messages: Sequence[Any]) -> tuple[str, str]:
    """(the last message's question, with the topic of those before; the system messages)."""
    before: list[tuple[str, str]] = []
    for message in messages[:-1]:
        if message.role == "user":
            before.append((with_topic(message.content, before), ""))
        elif message.role == "assistant" and before:
            before[-1] = (before[-1][0], message.content)
    system = [message.content.strip() for message in messages if message.role in ("system", "developer")]
    return with_topic(messages[-1].content, before), "\n\n".join(filter(None, system))


def check_served(model: str, names: Sequence[str]) -> None:
    if model not in names:
        raise Refused(404, f"the model {model!r} does not exist here: {', '.join(names)}", "model_not_found", "model")


# -- work -------------------------------------------------------------


class Job:
    """A request at work. tell(kind, value): "text" as it comes, then "done" with the result or "error" with Refused."""

    numbers = itertools.count(1)

    def __init__(self, asked: ChatRequest, timeout: float, tell: Callable[[str, Any], None]):
        self.asked, self.tell, self.deadline = asked, tell, time.monotonic() + timeout
        self.id, self.created = f"chatcmpl-{os.getpid()}-{next(self.numbers)}", int(time.time())
        self.cancelled = False  # set when the client has gone

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def pass_on(self, text: str) -> bool:
        """Tell a part of the answer. Returns True when no more of it is wanted."""
        if text:
            self.tell("text", text)
        return self.cancelled or self.late


class Engine:
    """Answers one question after another, in a thread of its own: each client gets the answer that it gets alone. Where
    a server decodes, answers overlap."""

    def __init__(self, pipeline: refrag.Pipeline, serve: refrag.ServeConfig):
        self.pipeline, self.serve = pipeline, serve
        self.thread = ThreadPoolExecutor(serve.waiting if pipeline.remote else 1, "engine")
        self.models = threading.Lock()  # models and tokenizers serve one thread at a time
        self.waiting: set[Job] = set()
        self.counts: collections.Counter = collections.Counter()

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn. Raises Refused when too many wait."""
        if sum(not other.cancelled for other in list(self.waiting)) >= self.serve.waiting:
            raise Refused(429, "too many requests are waiting: come again later", "queue_full")
        self.waiting.add(job)
        self.thread.submit(self.work, job)

    def work(self, job: Job) -> None:
        self.waiting.discard(job)
        if job.cancelled:
            return
        late = Refused(504, "the answer took longer than this server allows", "timeout")
        try:
            if job.late:
                raise late
            item = {"id": job.id, "question": job.asked.question}
            with contextlib.ExitStack() as held:
                held.enter_context(self.models)
                self.pipeline.refresh()
                reading = self.pipeline.prepare(item, job.asked.settings)
                if self.pipeline.remote:
                    held.close()  # the next one may be prepared while a server writes this one's answer
                [result] = self.pipeline.generate([reading], [job.pass_on])
            facts = result["metrics"]
            with self.models:
                self.counts.update(answers_total=1, new_tokens_total=facts["new_tokens"],
                                   positions_total=facts["positions"], full_positions_total=facts["full_positions"],
                                   ttft_seconds_total=facts["ttft_s"])
            if job.late and not result["ended"]:
                raise late
            job.tell("done", result)
        except Exception as error:
            job.tell("error", refusal(error))

    def metrics_text(self) -> str:
        lines = [f"refrag_requests_waiting {len(self.waiting)}",
                 f"refrag_peak_rss_bytes {int(refrag.peak_rss_mb() * 2**20)}"]
        lines += [f"refrag_{name} {value}" for name, value in sorted(self.counts.items())]
        return "\n".join(lines) + "\n"

    def embed(self, texts: list[str]) -> tuple[np.ndarray, int]:
        """(N, dim) float32 of texts, and how many tokens were read. Raises Refused. Waits for one answer at most."""
        embedder = self.pipeline.embedder
        with self.models:
            rows = embedder.tokenizer([embedder.prompt + text for text in texts], verbose=False)["input_ids"]
            longest = max(map(len, rows))
            if longest > embedder.max_tokens:  # a vector of a part would look like one of the whole
                raise Refused(400, f"an input has {longest} tokens, more than the {embedder.max_tokens} that "
                              f"{embedder.name} reads: split it", "context_length_exceeded", "input")
            return embedder.embed_passages(texts), sum(map(len, rows))


# -- HTTP ---------------------------------------------------------------


def reply(job: Job, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """An object of a reply."""
    return {"id": job.id, "object": kind, "created": job.created, "model": "refrag", "choices": choices, **more}


def choice(part: dict[str, Any], ended: bool | None) -> dict[str, Any]:
    """The choice of a reply. part: its message or delta; ended: whether the answer ended itself, None if it goes on."""
    return {"index": 0, **part, "logprobs": None,
            "finish_reason": None if ended is None else "stop" if ended else "length"}


def usage_of(result: dict[str, Any]) -> dict[str, int]:
    """OpenAI's counts: positions fed, tokens made."""
    read, written = result["metrics"]["positions"], result["metrics"]["new_tokens"]
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def refrag_fields(result: dict[str, Any]) -> dict[str, Any]:
    names = ("question", "citations", "passages", "chunks", "dropped_passages", "metrics", "settings")
    return {name: result[name] for name in names}


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(refrag.dumps(data), status, headers, "application/json")


def event(data: Any) -> str:
    return f"data: {data if isinstance(data, str) else refrag.dumps(data)}\n\n"


def stream_events(job: Job, kind: str, value: Any) -> Iterator[str]:
    chunk = functools.partial(reply, job, "chat.completion.chunk")
    if kind == "error":
        yield event(value.body())
    elif kind == "text":
        yield event(chunk([choice({"delta": {"content": value}}, None)]))
    else:
        yield event(chunk([choice({"delta": {}}, value["ended"])], refrag=refrag_fields(value)))
        if job.asked.usage:
            yield event(chunk([], usage=usage_of(value)))
        yield event("[DONE]")


async def read_body(request: Request, timeout: float) -> bytes:
    """A request's body; refused when it is too large or arrives too slowly. Raises Refused."""
    data = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for part in request.stream():
                data += part
                if len(data) > BODY_BYTES:
                    raise Refused(413, f"the request is longer than {BODY_BYTES} bytes", "too_large")
    except TimeoutError:
        raise Refused(408, "the request did not come to its end in time", "timeout") from None
    return bytes(data)


class Service:
    """What the addresses of the server do. Its methods take and return Starlette's requests and responses."""

    def __init__(self, engine: Engine, serve: refrag.ServeConfig, uploads: Any = None):
        self.engine, self.serve, self.uploads = engine, serve, uploads
        embedder = engine.pipeline.embedder
        self.models = {"refrag": "answers"} | ({embedder.name: "embeddings"} if embedder is not None else {})

    def routes(self) -> list[Route]:
        table = (("/v1/chat/completions", self.chat, "POST"), ("/v1/embeddings", self.embeddings, "POST"),
                 ("/v1/models", self.list_models, "GET"), ("/v1/models/{name:path}", self.one_model, "GET"),
                 ("/healthz", self.health, "GET"), ("/metrics", self.metrics, "GET"), ("/docs", self.docs, "GET"),
                 ("/", self.page, "GET"), *([("/v1/documents", self.uploads.post, "POST")] if self.uploads else ()))
        return [Route(path, self.guarded(answer), methods=[method]) for path, answer, method in table]

    def guarded(self, answer: Callable) -> Callable:
        """An address behind the key, whose refusals become replies. What is none is a fault of ours: 500."""

        async def respond(request: Request) -> Any:
            try:
                self.check_origin(request)
                if answer not in (self.health, self.page, self.docs):
                    self.check_key(request)
                response = await answer(request)
            except Exception as error:
                refused = refusal(error)
                again = {"Retry-After": "1"} if refused.status == 429 else {}
                response = json_response(refused.body(), refused.status, again)
            self.engine.counts[f'responses_total{{status="{response.status_code}"}}'] += 1
            return response

        return respond

    async def no_route(self, request: Request, error: Any) -> Response:
        """An address or a method that is not there, as a reply. error: Starlette's HTTPException."""
        message = f"{request.method} {request.url.path}: {error.detail}; see GET /docs"
        refused = Refused(error.status_code, message, error.detail.lower().replace(" ", "_"))
        return json_response(refused.body(), error.status_code, error.headers)

    def check_origin(self, request: Request) -> None:
        """Raises Refused for what a page from elsewhere asks in the name of the person who opened it.

        CORSMiddleware keeps such a page from reading the reply, but would let it post.
        """
        origin = request.headers.get("origin")
        own = origin is None or origin.partition("://")[2] == request.headers.get("host")
        if not own and origin not in self.serve.cors:
            raise Refused(403, f"pages of {origin} may not ask this server: see its --cors", "foreign_origin")

    def check_key(self, request: Request) -> None:
        given, wanted = request.headers.get("authorization", ""), f"Bearer {self.serve.api_key}"
        if self.serve.api_key is not None and not hmac.compare_digest(given.encode(), wanted.encode()):
            raise Refused(401, "the API key is missing or wrong", "invalid_api_key")

    async def chat(self, request: Request) -> Response:
        asked = ChatRequest.read(await read_body(request, self.serve.timeout), self.engine.pipeline)
        loop, updates = asyncio.get_running_loop(), asyncio.Queue()
        job = Job(asked, self.serve.timeout, lambda *update: loop.call_soon_threadsafe(updates.put_nowait, update))
        self.engine.submit(job)
        try:
            kind, value = await self.next_update(request, updates)  # an error has its own status still
            while kind == "text" and not asked.stream:
                kind, value = await self.next_update(request, updates)
        except BaseException:
            job.cancelled = True
            raise
        if asked.stream:
            return StreamingResponse(self.in_pieces(job, updates, kind, value), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache"})
        message = {"role": "assistant", "content": value["answer"], "refusal": None}
        return json_response(reply(job, "chat.completion", [choice({"message": message}, value["ended"])],
                                   usage=usage_of(value), refrag=refrag_fields(value)))

    async def next_update(self, request: Request, updates: asyncio.Queue) -> tuple[str, Any]:
        """What a job tells next. Raises Refused for an error, ClientDisconnect when the client has gone."""
        waiting = asyncio.ensure_future(updates.get())
        try:
            while not (await asyncio.wait([waiting], timeout=0.25))[0]:
                if await request.is_disconnected():
                    raise ClientDisconnect
        finally:
            if not waiting.done():
                waiting.cancel()
        kind, value = waiting.result()
        if kind == "error":
            raise value
        return kind, value

    async def in_pieces(self, job: Job, updates: asyncio.Queue, kind: str, value: Any) -> AsyncIterator[str]:
        """The reply as events. When the client goes, Starlette ends this, and that ends the job."""
        try:
            role = choice({"delta": {"role": "assistant", "content": ""}}, None)
            yield event(reply(job, "chat.completion.chunk", [role]))
            while True:
                for part in stream_events(job, kind, value):
                    yield part
                if kind != "text":
                    return
                kind, value = await updates.get()
        finally:
            job.cancelled = True

    async def embeddings(self, request: Request) -> Response:
        form = EmbeddingsForm.model_validate_json(await read_body(request, self.serve.timeout))
        check_served(form.model, [model for model, use in self.models.items() if use == "embeddings"])
        dim = self.engine.pipeline.embedder.dim
        if form.dimensions not in (None, dim):
            raise Refused(400, f"dimensions: the vectors of {form.model} have {dim}", "invalid_value", "dimensions")
        vectors, tokens = await asyncio.get_running_loop().run_in_executor(None, self.engine.embed, form.input)
        coded = form.encoding_format == "base64"
        rows = [base64.b64encode(row.astype("<f4").tobytes()).decode() if coded else row.tolist() for row in vectors]
        return json_response({
            "object": "list", "model": form.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]})

    def model_facts(self, name: str) -> dict[str, Any]:
        facts = {"id": name, "object": "model", "created": 0, "owned_by": "refrag", "use": self.models[name]}
        if name == "refrag":
            pipeline = self.engine.pipeline
            settings = pipeline.describe(pipeline.settings)
            facts |= {"decoder": Path(settings["dec"]).name, "engine": settings["engine"], "device": settings["device"],
                      "passages": 0 if pipeline.index is None else len(pipeline.index),
                      "takes": self.uploads.limits() if self.uploads else None}
        return facts

    async def list_models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self.model_facts(name) for name in self.models]})

    async def one_model(self, request: Request) -> Response:
        check_served(request.path_params["name"], list(self.models))
        return json_response(self.model_facts(request.path_params["name"]))

    async def health(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.engine.metrics_text(), media_type="text/plain; version=0.0.4")

    async def docs(self, request: Request) -> Response:
        return PlainTextResponse((PAGES / "docs.txt").read_text(encoding="utf-8"))

    async def page(self, request: Request) -> Response:
        return HTMLResponse((PAGES / "index.html").read_text(encoding="utf-8"))


def make_app(engine: Engine, serve: refrag.ServeConfig, address: str, uploads: Any = None) -> Starlette:
    """The server as a Starlette application. address: what it listens on; uploads: with --writable. Raises UserError.

    On a loopback address it answers to this machine's names alone: a page elsewhere could have its own name resolve to
    127.0.0.1 and would then be no page from elsewhere.
    """
    service, layers = Service(engine, serve, uploads), []
    if ipaddress.ip_address(address).is_loopback:
        own = f"[{address}]" if ":" in address else address
        layers.append(Middleware(TrustedHostMiddleware, www_redirect=False,
                                 allowed_hosts=["localhost", "127.0.0.1", "[::1]", own, serve.host]))
    elif serve.api_key is None:
        refrag.require(not serve.writable, f"--writable: {address} lets other machines in: set an --api_key")
        refrag.notice(f"warning: {address} lets other machines in, and there is no --api_key: whoever reaches this "
                      "server can read its passages")
    if serve.cors:
        layers.append(Middleware(CORSMiddleware, allow_origins=serve.cors, allow_methods=["GET", "POST"],
                                 allow_headers=["*"]))
    return Starlette(routes=service.routes(), middleware=layers, exception_handlers={HTTPException: service.no_route})


def run(serve: refrag.ServeConfig, *configs: Any) -> None:
    """Serve until SIGINT or SIGTERM; then requests in work are finished, for ten seconds at most."""
    uploads = None
    if serve.writable:
        from refrag_extras.uploads import Uploads

        uploads = Uploads(serve.timeout, configs[0], *configs[-2:])
    with listening_socket(serve) as listener:  # before the models are loaded: a port that is taken is told at once
        engine = Engine(answering(None, *configs), serve)
        host, port = listener.getsockname()[:2]
        app = make_app(engine, serve, host, uploads)
        name = f"[{host}]" if ":" in host else host
        refrag.notice(f"serving on http://{name}:{port} (page at /, description at /docs)")
        level = "warning" if configs[-1].debug else "critical"  # else with a traceback of whatever its end cuts off
        config = uvicorn.Config(app, log_level=level, timeout_keep_alive=5, timeout_graceful_shutdown=10,
                                server_header=False)
        uvicorn.Server(config).run(sockets=[listener])


def listening_socket(serve: refrag.ServeConfig) -> socket.socket:
    """A socket on --host and --port. Raises UserError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(serve.host, serve.port, type=socket.SOCK_STREAM)[0]
        both = serve.host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:  # the second for a name that can be none
        reason = getattr(error, "strerror", None) or refrag.one_line(error)
        raise refrag.UserError(f"--host {serve.host} --port {serve.port}: {reason}") from None
