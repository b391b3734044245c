"""The tools for agents, asked by the protocol's own client: in this process, and over stdio as agents start them."""

from __future__ import annotations

import asyncio
import os
import sys
import threading

import pytest
from mcp import Client, MCPError, StdioServerParameters
from writers import ROOT, STARTS, lasting

import refrag
from refrag_extras import mcp as tools

QUESTION = "Where do smiths cast bells?"
RIVER = " ".join(f"Bridge {n} of the Rhone was built by masons of guild {n * 7}." for n in range(20))


def toolbox(*argv):
    _, (options, *configs) = refrag.parse(["mcp", *map(str, argv)])
    box = tools.Toolbox(*configs, options.tools)
    box.load()
    return box


@pytest.fixture(scope="module")
def box(tiny):
    return toolbox(*tiny)


def talk(server, *calls, **options):
    """The results of calls (tool, arguments), one after another, or what they raise."""

    async def session():
        async with Client(server, **options) as client:
            return [(await asyncio.gather(client.call_tool(*call), return_exceptions=True))[0] for call in calls]

    return asyncio.run(session())


def test_over_stdio_the_tools_give_what_the_commands_give(tiny, done, change, tmp_path):
    """Two calls at once get what they get alone; a changed index counts from the next call on."""
    folder = tmp_path / "followed"
    change(folder, [{"id": "bells", "text": "Smiths in the valley cast bells."}], k=4)
    argv = [*tiny, "--index_dir", str(folder), "--engine", "model"]  # in 8 bits answers depend on the processor
    others = ["Where do smiths cast bells?", "When does the Rhone flood?"]
    alone = [done("generate", *argv, "--question", question) for question in others]
    found = done("search", "--index_dir", folder, "--question", QUESTION, "--topk", 2)
    environment = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS")}
    environment["REFRAG_DTYPE"] = "float32"  # as everything here
    start = StdioServerParameters(command=sys.executable, args=[*STARTS["python refrag.py"], "mcp", *argv],
                                  env=environment, cwd=ROOT)

    async def session():
        async with Client(start) as client:
            assert [tool.name for tool in (await client.list_tools()).tools] == ["search", "read", "answer"]
            answers = await asyncio.gather(*(client.call_tool("answer", {"question": q}) for q in others))
            for answer, expected in zip(answers, alone, strict=True):
                assert lasting(answer.structured_content | {"chunks": None}) == lasting(expected | {"chunks": None})
                assert answer.content[0].text.startswith(expected["answer"])
            search = await client.call_tool("search", {"question": QUESTION})
            assert search.structured_content == found and not search.is_error
            assert search.content[0].text == "[1] bells\nSmiths in the valley cast bells."
            wrong = await client.call_tool("search", {"question": QUESTION, "where": "year >= 1990"})
            assert wrong.is_error and wrong.content[0].text.startswith("where: no passage has a field 'year'")
            change(folder, [{"id": "gate", "text": "Smiths cast bells by the gate.", "by": "half \ud83d"}], add=True)
            both = await client.call_tool("search", {"question": QUESTION})
            assert {p["id"] for p in both.structured_content["passages"]} == {"bells", "gate"}

    asyncio.run(session())


def test_schemas_are_those_of_the_options(box):
    listed = asyncio.run(box.on_list(None, None)).tools
    search, read, answer = (tool.input_schema for tool in listed)
    assert search["properties"]["topk"] == {"type": "integer", "description": "passages to return", "minimum": 1,
                                            "maximum": 100, "default": 2}, "its default is the server's own"
    assert "default" not in search["properties"]["where"] and search["required"] == ["question"]
    assert answer["properties"]["mode"]["enum"] == ["refrag", "full", "none", "truncate"]
    assert (answer["properties"]["p"]["minimum"], answer["properties"]["p"]["default"]) == (0, 0.25)
    assert list(read["properties"]) == ["id", "pieces"] and read["additionalProperties"] is False
    assert all(tool.annotations.read_only_hint for tool in listed)


@pytest.mark.parametrize(("tool", "arguments", "told"), [
    ("search", {}, "question is missing"), ("search", {"question": " "}, "the question is empty"),
    ("search", {"question": QUESTION, "topk": 101}, "topk must lie between 1 and 100, got 101"),
    ("search", {"question": QUESTION, "topk": "many"}, "argument topk: 'many' is not a whole number"),
    ("search", {"question": [QUESTION]}, "is not one value"), ("search", {"question": "\ud800"}, "question"),
    ("search", {"question": QUESTION, "speed": 1, "p": 0}, "no such argument: speed, p: there are question, topk"),
    ("answer", {"question": QUESTION, "mode": "magic"}, "mode must be one of refrag, full, none, truncate"),
    ("answer", {"question": QUESTION, "where": "year"}, "where: cannot read 'year'"),
    ("answer", {"question": "bells " * 3000}, "the decoder's window is 2048: lower topk, p or max_new"),
    ("read", {"id": "z"}, "id 'z': no document or passage has it"), ("read", {}, "id is missing"),
    ("read", {"id": "a", "pieces": 0}, "pieces must lie between 1 and 64, got 0")])
def test_mistakes_are_told_as_errors_of_the_tool(box, tool, arguments, told):
    [result] = talk(box.server(), (tool, arguments))
    assert result.is_error and told in result.content[0].text and "--" not in result.content[0].text
    assert result.structured_content == {"error": {"code": 2, "message": result.content[0].text}}


def test_faults_of_ours_end_nothing(box, monkeypatch, capsys):
    monkeypatch.setattr(box.searcher, "search", lambda *_: 1 / 0)
    fault, unknown, fine = talk(box.server(), ("search", {"question": QUESTION}), ("erase", {}), ("read", {"id": "b"}))
    assert fault.is_error and "ZeroDivisionError" in fault.content[0].text and not fine.is_error
    assert isinstance(unknown, MCPError) and str(unknown) == "no such tool: erase: there are search, read, answer"
    assert capsys.readouterr() == ("", f"error: {fault.content[0].text}\n")


def test_null_is_left_out_and_numbers_may_come_as_text(box):
    given = {"question": QUESTION, "topk": "1", "where": None, "max_new": 3.0, "p": 1}
    [result] = talk(box.server(), ("answer", given))
    settings = result.structured_content["settings"]
    assert (settings["topk"], settings["where"], settings["max_new"], settings["p"]) == (1, None, 3, 1.0)
    assert "chunks" not in result.structured_content


def test_a_cancelled_call_ends_at_the_next_token(box, monkeypatch):
    begun, made, answer_batch = threading.Event(), [], box.pipeline.answer_batch

    def watched(items, settings, writers):
        made.extend(answer_batch(items, settings, [lambda text: begun.set() or writers[0](text)]))
        return made[-1:]

    monkeypatch.setattr(box.pipeline, "answer_batch", watched)
    call = ("answer", {"question": "Name rivers.", "max_new": 1024})

    async def session():
        async with Client(box.server(), mode="legacy") as client:
            calls = [asyncio.ensure_future(client.call_tool(*call)) for _ in range(3)]
            await asyncio.to_thread(begun.wait)
            assert (await client.list_tools()).tools and not made, "nobody else has to wait"
            for given_up in calls[:2]:
                given_up.cancel()
            return await calls[2]

    whole = asyncio.run(session()).structured_content["metrics"]["new_tokens"]
    assert [len(made), made[-1]["metrics"]["new_tokens"]] == [2, whole], "the second was not begun"
    assert made[0]["metrics"]["new_tokens"] < 0.6 * whole


def test_pieces_of_a_document_are_joined(build, tmp_path):
    """Whole, by pieces, and on from one of them; without `answer` there is no decoder."""
    for overlap in (0, 8):
        build(f"long{overlap}", [{"id": "a", "title": "Rhone", "text": RIVER}, {"id": "b", "text": "b"}],
              "--max_passage_tokens", 32, "--overlap", overlap)
        box = toolbox("--index_dir", tmp_path / f"long{overlap}", "--tools", "search", "read")
        assert box.pipeline is None
        whole, first, some, last, short = (result.structured_content for result in talk(
            box.server(), ("read", {"id": "a"}), ("read", {"id": "a#1"}), ("read", {"id": "a", "pieces": 3}),
            ("read", {"id": "a#4", "pieces": 64}), ("read", {"id": "b"})))
        assert whole["text"] == RIVER and whole["next"] is None and len(whole["pieces"]) > 5
        assert (first["pieces"], first["next"]) == (["a#1"], "a#2") and RIVER.startswith(first["text"])
        assert some["next"] == "a#4" and RIVER.endswith(last["text"])
        assert tools.join_pieces([some["text"], last["text"]], overlap > 0) == RIVER
        assert (short["text"], short["pieces"]) == ("b", ["b"])
        shown, lacking = talk(box.server(), ("read", {"id": "a", "pieces": 1}), ("answer", {"question": QUESTION}))
        assert shown.content[0].text == f"a: Rhone (a#1)\n\n{first['text']}\n\n(it goes on: read a#2)"
        assert str(lacking) == "no such tool: answer: there are search, read"


def test_pieces_are_found_from_the_first_to_the_last(build, write, tmp_path):
    build("guide", write("guide.md", f"# Rise\n\n{RIVER}\n\n# Fall\n\n{RIVER}"), "--max_passage_tokens", 64)
    box = toolbox("--index_dir", tmp_path / "guide", "--tools", "read")
    calls = [("read", {"id": "guide.md"} | pieces) for pieces in ({}, {"pieces": 2})]
    assert [result.structured_content["source"] for result in talk(box.server(), *calls)] == [
        "guide.md, sections Rise to Fall", "guide.md, section Rise"]


def test_what_is_refused_before_anything_is_loaded(refused, tiny, tmp_path, monkeypatch):
    assert "no such folder" in refused(2, "mcp", "--index_dir", tmp_path / "nothing")
    assert "nothing to search" in refused(2, "mcp", *tiny, "--mode", "none")
    assert "--topk must lie between 1 and 100, got 101" in refused(2, "mcp", *tiny, "--topk", 101)
    assert "--tools must be one of" in refused(2, "mcp", *tiny, "--tools", "erase")
    monkeypatch.delitem(sys.modules, "refrag_extras.mcp")
    monkeypatch.setitem(sys.modules, "mcp.server.lowlevel", None)
    assert refused(3, "mcp", *tiny).endswith("pip install 'refrag[mcp]'")
