"""`refrag.py chat`: the conversation on a terminal, each question in the light of those before it."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import refrag
from refrag_extras.generate import answer_text, answering

OPTIONS = refrag.config_fields([refrag.PackConfig, refrag.SearchConfig])
MODES = OPTIONS["mode"][0].metadata["choices"]
REFERS_BACK = re.compile(r"^\W*(and|but|so|why|(what|how) about)\b|\b(he|him|his|she|hers?|its?|they|them|theirs?|this|"
                         r"that|these|those|there|then|ones?|same|others?|former|latter)\b", re.IGNORECASE)
NAME = re.compile(rf"(?:[{refrag.CAPITALS}][\w'\u2019-]*|[0-9][\w.,]*)(?:(?: (?:of|the|de|la|van|von|and))* "
                  rf"(?:[{refrag.CAPITALS}][\w'\u2019-]*|[0-9][\w.,]*\b))*")


def names_in(text: str, answer: bool = False) -> list[str]:
    """Names and numbers of a text, each once.

    The word that a question begins with is capitalised anyway and counts as none; an answer often begins with a name.
    Examples: "When was the Eiffel Tower in Paris finished?" -> ["Eiffel Tower", "Paris"]; "Ada Lovelace" -> the same
    """
    first = 0 if answer or not text.strip() else len(text) - len(text.lstrip()) + len(text.split(maxsplit=1)[0])
    names = dict.fromkeys(match[0].rstrip(".,") for match in NAME.finditer(text, first))
    return [name for name in names if name.casefold() not in refrag.STOPWORDS]


def with_topic(question: str, before: Sequence[tuple[str, str]]) -> str:
    """A question that can be understood alone. before: (question, answer) so far, the questions as they came out here.

    One that refers back ("she", "there", "what about 1950?") is given what the last question was about: its names, else
    those of its answer, else itself.

    Example: "Who designed it?" after "When was the Eiffel Tower finished?" -> "Who designed it (Eiffel Tower)?"
    """
    if not before:
        return question
    short = len(refrag.index_terms(question)) < 3 and not names_in(question)
    if not short and not REFERS_BACK.search(question):
        return question
    (last, answer), known = before[-1], set(refrag.words(question))
    names = names_in(last) or names_in(refrag.CITATION.sub(" ", answer), answer=True)
    new = [name for name in names if not known.issuperset(refrag.words(name))]
    topic = ", ".join(new) if names else last.strip().rstrip("?.!")
    stripped = question.strip()
    body = stripped.rstrip("?.!\u3002\uff1f\uff01 ")
    return f"{body} ({topic}){stripped[len(body) :].strip() or '?'}" if topic else question


HELP = """/docs what was retrieved for the last question, compressed parts in [[..]]
/history the questions and answers so far
/clear forget them
/mode refrag|full|none|truncate
/p SHARE of the context that stays text
/where year >= 1990 to search only passages whose fields pass, /where off to end that
/save FILE the conversation as JSON lines
/quit"""


def tell(text: str) -> None:
    """Show what a command asks for, which is no notice: also with --quiet."""
    refrag.say(text, file=sys.stderr)


class Chat:
    """A conversation: questions and commands in, answers on stdout, all else on stderr."""

    def __init__(self, pipeline: refrag.Pipeline, as_json: bool):
        self.pipeline, self.settings, self.as_json = pipeline, pipeline.settings, as_json
        self.turns: list[dict[str, Any]] = []  # results, with `asked`: the question as it was typed
        self.commands = {"docs": self.show_docs, "history": self.show_history, "save": self.save,
                         "help": lambda rest: tell(HELP), "clear": lambda rest: self.turns.clear(),
                         **{name: functools.partial(self.change, name) for name in ("mode", "p", "where")}}

    def take(self, line: str) -> bool:
        """Answer a question, or obey a command. Returns False when the conversation is to end."""
        line = line.strip()
        if line in ("/quit", "/exit"):
            return False
        try:
            if line.startswith("/"):
                name, _, rest = line[1:].partition(" ")
                refrag.require(name in self.commands, f"/{name}: no such command, see /help")
                self.commands[name](rest.strip())
            elif line:
                self.answer(line)
        except refrag.RefragError as error:
            tell(f"error: {error}")
            if self.as_json and not line.startswith("/"):  # one object for each question
                print(refrag.dumps({"error": {"code": error.code, "message": refrag.one_line(error)}}), flush=True)
        return True

    def converse(self) -> None:
        """Questions from a terminal, with line editing and a history that is kept. Ctrl-C stops an answer alone."""
        refrag.notice("ask away; /help lists the commands")
        keep_history()
        while True:
            try:
                if not self.take(input("> ")):
                    return
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(stopped; /quit leaves)", file=sys.stderr)

    def answer(self, question: str) -> None:
        asked = with_topic(question, [(turn["question"], turn["answer"]) for turn in self.turns])
        if asked != question:
            refrag.notice(f"asked as: {asked}")
        item = {"id": str(len(self.turns) + 1), "question": refrag.check_question(asked, "question")}
        self.pipeline.refresh()
        live = functools.partial(refrag.say, end="") if self.settings.stream and not self.as_json else None
        [result] = self.pipeline.answer_batch([item], self.settings, [live])
        self.turns.append(result | {"asked": question})
        if self.as_json:
            print(refrag.dumps(self.turns[-1]))
        else:
            refrag.say(answer_text(result, shown=live is not None))
        sys.stdout.flush()

    def show_docs(self, rest: str) -> None:
        refrag.require(bool(self.turns), "/docs: nothing has been asked yet")
        last = self.turns[-1]
        for passage in last["passages"]:
            content = refrag.passage_content(passage["title"], passage["text"])
            chunks = [c for c in last["chunks"] if c["passage_id"] == passage["id"]]
            shown = "".join(part if c["expanded"] else f"[[{part}]]" for c in chunks
                            if (part := content[c["start"] : c["end"]]))
            tell(f"[{passage['rank']}] {passage['source']}: {sum(c['expanded'] for c in chunks)} of {len(chunks)} "
                 f"chunks read as text\n{shown}\n")

    def show_history(self, rest: str) -> None:
        for number, turn in enumerate(self.turns, start=1):
            tell(f"{number}. {turn['asked']}\n   {turn['answer']}")

    def change(self, name: str, rest: str) -> None:
        """Set an option to what was typed, and show it."""
        if rest:
            value = None if (name, rest) == ("where", "off") else refrag.convert("", rest, *OPTIONS[name])
            settings = dataclasses.replace(self.settings, **{name: value})
            refrag.require(settings.mode == "none" or self.pipeline.searcher is not None,
                           "/mode: this chat was begun without an index")
            self.settings = settings
        value = getattr(self.settings, name)
        tell(f"{name}: {'off' if value is None else value}")

    def save(self, rest: str) -> None:
        refrag.require(bool(rest), "/save: name a file")
        try:
            refrag.write_atomic(Path(rest).expanduser(), "".join(refrag.dumps(turn) + "\n" for turn in self.turns))
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: of ".", RuntimeError: of ~nobody
            raise refrag.UserError(f"/save {rest}: {getattr(error, 'strerror', None) or error}") from None
        tell(f"{len(self.turns)} turns in {rest}")


def keep_history() -> None:
    """Line editing for `input`, with the lines of earlier conversations, where the platform has it."""
    try:
        import readline
    except ImportError:  # Windows: its console edits lines itself
        return
    path = refrag.cache_home() / "chat_history"

    def write() -> None:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)

    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(path)
    readline.set_history_length(1000)
    atexit.register(write)


def run(*configs: Any) -> None:
    chat = Chat(answering(None, *configs), as_json=configs[-1].json)
    sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is refused as a question, and no more
    if sys.stdin.isatty():
        chat.converse()
    else:
        for line in sys.stdin:
            if not chat.take(line):
                break
