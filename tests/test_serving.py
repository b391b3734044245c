"""Section 14: the conversation, typed into a terminal and piped."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest

import refrag

TOWER = ("When was the Eiffel Tower in Paris finished?", "It was finished in 1889 [1]")


class TestTopic:
    @pytest.mark.parametrize(("question", "asked"), [
        ("Who designed it?", "Who designed it (Eiffel Tower, Paris)?"),
        ("And in Lyon?", "And in Lyon (Eiffel Tower, Paris)?"),
        ("Why?", "Why (Eiffel Tower, Paris)?"),
        ("how about 1950", "how about 1950 (Eiffel Tower, Paris)?"),
        ("So is the Eiffel Tower beautiful?", "So is the Eiffel Tower beautiful (Paris)?"),
    ])
    def test_a_question_that_refers_back_is_given_the_names_of_the_last(self, question, asked):
        assert refrag.with_topic(question, [TOWER]) == asked

    @pytest.mark.parametrize("question", ["Which river flows through the city of Geneva?", "Who was Marie Curie?",
                                          "What do smiths cast in old towns?"])
    def test_one_that_stands_alone_is_left_as_it_is(self, question):
        assert refrag.with_topic(question, [TOWER]) == question

    def test_the_first_question_has_nothing_to_refer_to(self):
        assert refrag.with_topic("Who designed it?", []) == "Who designed it?"

    def test_without_names_in_the_question_those_of_its_answer_count(self):
        before = [("who built the tallest tower?", "The company of Gustave Eiffel [2]")]
        assert refrag.with_topic("When was he born?", before) == "When was he born (Gustave Eiffel)?"

    def test_without_any_names_the_question_itself_is_the_topic(self):
        before = [("what do smiths cast?", "bells")]
        assert refrag.with_topic("Where is that done?", before) == "Where is that done (what do smiths cast)?"

    def test_a_topic_is_carried_from_turn_to_turn(self):
        first = refrag.with_topic("Who designed it?", [TOWER])
        second = refrag.with_topic("Did she like it?", [TOWER, (first, "no one knows")])
        assert second == "Did she like it (Eiffel Tower, Paris)?"

    def test_a_question_that_names_the_topic_itself_is_left(self):
        question = "Is that the Eiffel Tower in Paris?"
        assert refrag.with_topic(question, [TOWER]) == question

    def test_names(self):
        assert refrag.names_in("Did Charles de Gaulle meet Churchill in 1944, in London?") == [
            "Charles de Gaulle", "Churchill", "1944", "London"]
        assert refrag.names_in("") == refrag.names_in("   ") == refrag.names_in("Who") == []


@pytest.fixture
def argv(index_dir, llama):
    return ["chat", "--index_dir", str(index_dir), "--dec", str(llama), "--enc", "decoder:2", "--max_new", "4",
            "--topk", "2", "--compressed", "feed", "--no_cite"]


def piped(argv, text, *more):
    """Exit code, stdout and stderr of a conversation from a pipe."""
    done = subprocess.run([sys.executable, refrag.__file__, *argv, *more], input=text, capture_output=True, text=True,
                          timeout=120)
    return done.returncode, done.stdout, done.stderr


class TestPiped:
    def test_a_question_a_line_and_an_answer_an_object(self, argv, tmp_path):
        saved = tmp_path / "talk.jsonl"
        text = f"Where do smiths cast bells?\n\n  And where is it?\n/save {saved}\n/quit\nnever asked\n"
        code, out, err = piped(argv, text, "--json")
        assert code == 0, err
        turns = [json.loads(line) for line in out.splitlines()]
        assert [turn["asked"] for turn in turns] == ["Where do smiths cast bells?", "And where is it?"]
        assert turns[1]["question"] == "And where is it (Where do smiths cast bells)?"
        assert f"asked as: {turns[1]['question']}" in err
        assert [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()] == turns

    def test_commands_and_mistakes_end_nothing(self, argv, tmp_path):
        text = ("/docs\n/nothing\n/p much\n/p 2\n/mode magic\n/save\n/save /nowhere/at/all\n/help\n"
                "Where do smiths cast bells?\n/docs\n/history\n/mode full\n/p 1\nWhere do smiths cast bells?\n"
                "/clear\n/history\n")
        code, out, err = piped(argv, text, "--json")
        first, second = (json.loads(line) for line in out.splitlines())
        assert code == 0
        assert first["answer"] and second["metrics"]["positions"] == second["metrics"]["full_positions"]
        assert second["settings"]["mode"] == "full"
        for told in ("error: /docs: nothing has been asked yet", "error: /nothing: no such command, see /help",
                     "error: /p: a share between 0 and 1, got 'much'", "error: --p must lie between 0 and 1, got 2.0",
                     "error: /mode: one of refrag, full, none, truncate, got 'magic'", "error: /save: name a file",
                     "error: /save /nowhere/at/all: ", "/history the questions", "1. Where do smiths cast bells?"):
            assert told in err, told
        opened = sum(chunk["expanded"] for chunk in first["chunks"])
        shown = err[err.index("chunks read as text"):]
        assert 0 < opened < len(first["chunks"]) and shown.count("[[") == len(first["chunks"]) - opened

    def test_text_for_people(self, argv):
        code, out, _ = piped(argv, "Where do smiths cast bells?\n")
        assert code == 0 and "positions of full context ->" in out

    def test_options_that_are_not_for_a_conversation(self, argv):
        code, _, err = piped(argv, "", "--prompt", "x")
        assert code == 2 and "--prompt goes with generate" in err
        code, _, err = piped(argv, "", "--out", "x")
        assert code == 2 and "--out goes with --questions" in err


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
class TestTerminal:
    @pytest.fixture
    def terminal(self, argv, tmp_path):
        """(write, wait for a text, process): a conversation in a pseudo-terminal."""
        import pty

        ours, theirs = pty.openpty()
        environment = os.environ | {"REFRAG_HOME": str(tmp_path / "home"), "TERM": "dumb"}
        process = subprocess.Popen([sys.executable, refrag.__file__, *argv, "--max_new", "400"], stdin=theirs,
                                   stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
        os.close(theirs)
        seen = bytearray()

        def wait_for(text, seconds=90.0):
            end = time.monotonic() + seconds
            while text.encode() not in seen:
                assert time.monotonic() < end, f"{text!r} did not come: {seen.decode(errors='replace')}"
                if select.select([ours], [], [], 0.2)[0]:
                    try:
                        seen.extend(os.read(ours, 4096))
                    except OSError:  # the other end has gone
                        pytest.fail(f"{text!r} did not come: {seen.decode(errors='replace')}")
            del seen[: seen.index(text.encode()) + len(text.encode())]

        yield lambda text: os.write(ours, text.encode()), wait_for, process
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(ours)

    def test_a_conversation(self, terminal, tmp_path):
        write, wait_for, process = terminal
        wait_for("> ")
        write("Where do smiths cast bells?\n")
        wait_for("positions of full context")
        wait_for("> ")
        write("/history\n")
        wait_for("1. Where do smiths cast bells?")
        write("\x1b[A\x1b[A\n")  # two lines up in the history: the question again
        wait_for("positions of full context")
        write("\x04")
        assert process.wait(timeout=30) == 0
        assert "Where do smiths cast bells?" in (tmp_path / "home/chat_history").read_text(encoding="utf-8")

    def test_ctrl_c_stops_the_answer_and_not_the_program(self, terminal):
        write, wait_for, process = terminal
        wait_for("> ")
        write("Where do smiths cast bells?\n")
        wait_for("bells?")
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        wait_for("(stopped; /quit leaves)")
        wait_for("> ")
        write("/p 1\n/quit\n")
        assert process.wait(timeout=30) == 0
