"""Sections 1 and 12: the shape of the file, the command line, and how results and errors are printed."""

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from writers import STARTS

import refrag
from refrag_extras import search

SOURCE = Path(refrag.__file__).read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# =+\n# (\d+)\. (\w[\w ]*)\.", re.MULTILINE)
SECTIONS = {int(m[1]): (SOURCE[: m.start()].count("\n") + 1, m[2]) for m in BANNER.finditer(SOURCE)}
HEAVY = ("torch", "transformers", "numpy", "faiss", "bm25s", "filelock", "sentence_transformers")
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals, pipes and names")


def section_of(node: ast.AST) -> int:
    """The number of the section a top-level statement stands in; 0 before the first banner."""
    return max((number for number, (line, _) in SECTIONS.items() if line <= node.lineno), default=0)


def bound_names(node: ast.AST) -> set[str]:
    """Names of the file that a top-level statement binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    imported = {(a.asname or a.name).split(".")[0] for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)
                for a in n.names}
    return imported | {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def read_names(node: ast.AST) -> set[str]:
    """Names that a statement reads, annotations too, and binds nowhere inside."""
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    local = {n.id for n in names if isinstance(n.ctx, ast.Store)} | {
        n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    return {n.id for n in names if isinstance(n.ctx, ast.Load)} - local


HOME = {name: section_of(node) for node in reversed(TREE.body) for name in bound_names(node)}  # the first one counts


def test_contents_and_the_ten_steps_name_what_stands_in_the_numbered_sections():
    listed = re.findall(r"^ {4}(\d+)\. (\w+) {2,}\S", refrag.__doc__, re.MULTILINE)
    assert listed == [(str(number), title) for number, (_, title) in SECTIONS.items()]
    assert [int(number) for number, _ in listed] == list(range(1, len(BANNER.findall(SOURCE)) + 1))
    steps = refrag.__doc__.split("ten steps")[1].split("Three commands")[0]
    lines = re.findall(r"^ +\d+\. .+(?:\n {20,}.+)?", steps, re.MULTILINE)
    assert len(lines) == 10
    for line in lines:
        section = int(re.search(r"\[(\d+)\]", line)[1])
        for name in re.findall(r"\b(?:[A-Z]\w+(?:\.\w+)?|\w+_\w+|rrf|prefill|decode|cite)\b", line.split(".", 1)[1]):
            top, _, attribute = name.partition(".")
            assert HOME[top] == section, name
            assert not attribute or hasattr(getattr(refrag, top), attribute), name


def test_a_section_uses_only_names_of_its_own_and_earlier_sections():
    later = {f"line {node.lineno}: section {section_of(node)} uses {name} of section {HOME[name]}"
             for node in TREE.body for name in read_names(node) if HOME.get(name, 0) > section_of(node)}
    assert later == set()
    assert HOME["parse"] == 1 and HOME["torch"] == 2 and HOME["main"] == len(SECTIONS)
    # only options know argparse; only section 2 imports the heavy libraries, but inside functions they may be anywhere
    assert {section_of(node) for node in TREE.body if "argparse" in read_names(node)} == {1}
    for node in TREE.body:
        modules = {m.split(".")[0] for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)
                   for m in (*(a.name for a in n.names), getattr(n, "module", ""))}
        assert section_of(node) == 2 or isinstance(node, ast.FunctionDef | ast.ClassDef) or not modules & set(HEAVY)


@pytest.fixture
def without_heavy(tmp_path, program):
    """Run refrag.py as a process in which importing any of the heavy libraries fails."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')\n")
    return lambda *argv, **options: program(*argv, env=os.environ | {"PYTHONPATH": str(tmp_path)}, **options)


@pytest.mark.parametrize("start", STARTS)
def test_help_version_and_mistakes_need_no_library(without_heavy, start):
    done = without_heavy("--help", start=start)
    assert (done.returncode, done.stderr) == (0, "") and all(name in done.stdout for name in refrag.COMMANDS)
    assert done.stdout.startswith(f"usage: {start} [-h]")
    none = without_heavy(start=start)
    assert (none.returncode, none.stdout) == (2, "") and none.stderr.startswith(done.stdout.rstrip())
    assert none.stderr.endswith(f"error: the following arguments are required: COMMAND: see {start} --help\n")
    assert without_heavy("--version", start=start).stdout == f"refrag.py {refrag.__version__}\n"
    assert "--index_dir" in without_heavy("search", "--help", start=start).stdout
    done = without_heavy("search", "--index-dri", "x", start=start)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.endswith(f"see {start} search --help\n")
    assert "was imported" in without_heavy("doctor", start=start).stderr  # they are really blocked


@pytest.mark.parametrize("name", refrag.COMMANDS)
def test_help_lists_every_option_and_a_mistyped_flag_gets_a_proposal(run, name):
    options = refrag.config_fields(refrag.COMMANDS[name].configs)
    assert options.keys() >= {"device", "dtype", "threads", "seed", "json", "quiet", "offline", "debug", "config"}
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "") and [f for f in options if f"--{f} " not in out and f"--{f}]" not in out] == []
    assert refrag.COMMANDS[name].help in " ".join(out.split())
    if name == "bench":  # several defaults stand as they are typed
        assert "as many as fit (default 512 1024 2048 4096 8192)" in " ".join(out.split())
        assert "--modes [{full,refrag,none} ...]" in out and "(default 0)" in out
    option = next(option for option in options if "_" in option)
    typed = f"--{option[:-2]}{option[:-3:-1]}".replace("_", "-")  # the last two letters change places
    code, out, err = run(name, typed, "x")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"(did you mean --{option}?): see python refrag.py {name} --help" in err


def test_a_missing_library_is_named_with_the_command_that_mends_it(tmp_path, program, run, monkeypatch):
    (tmp_path / "bm25s.py").write_text("raise ImportError('no bm25s here')\n")
    done = program("doctor", "--json", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == json.loads(done.stdout)["error"]["code"] == 3
    assert done.stderr.startswith("error: library missing: no bm25s here: run ./refrag_quickstart")
    assert done.stderr.count("\n") == 1
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "refrag_extras.serve", raising=False)
    code, out, err = run("serve", "--index_dir", "nothing")  # before anything is loaded
    assert (code, out) == (3, "") and "uvicorn" in err and err.endswith("pip install .\n")


@posix
@pytest.mark.parametrize("start", STARTS)
def test_ctrl_c_while_the_libraries_load(tmp_path, program, start):
    """They take seconds, which is when a person notices a mistake. The first one imported sends the interrupt."""
    (tmp_path / "bm25s.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = program("doctor", "--json", start=start, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
    assert json.loads(done.stdout)["error"]["code"] == 130


def value_of(name: str, argv: list[str]) -> object:
    return next(getattr(config, name) for config in refrag.parse(argv)[1] if hasattr(config, name))


SEARCH = ["search", "--index_dir", "i", "--question", "q"]
BENCH = ["bench", "--index_dir", "i"]


@pytest.mark.parametrize(("argv", "name", "value"), [
    *((["generate", flag, "7"], "max_new", 7) for flag in ("--max_new", "--max-new")),
    (["generate", "--max-new=7"], "max_new", 7), (["generate"], "stream", True),
    *((["generate", flag], "stream", False) for flag in ("--no_stream", "--no-stream")),
    (["search", "--index-dir=my-own--folder"], "index_dir", "my-own--folder"),
    *((["search", "--question", words], "question", words) for words in (
        "what is a well-known --flag-name for?", "--who-is that?", "-5 degrees")),
    (["search", "--question=--a-b"], "question", "--a-b"), ([*BENCH, "--p", "0,.1", "1e-2"], "p", (0.0, 0.1, 0.01)),
    *(([*BENCH, "--modes", *words], "modes", ("full", "none")) for words in (["full,none"], ["full", "none"])),
    ([*BENCH, "--k", "4,8", "--k", "16"], "k", (16,)),
    (["index", "--corpus", "a,b.txt", "c d.txt", "--corpus", "e"], "corpus", ("a,b.txt", "c d.txt", "e"))], ids=str)
def test_flags_take_dashes_and_values_stay_as_they_are(argv, name, value):
    assert value_of(name, argv) == value


@pytest.mark.parametrize(("argv", "told"), [
    *(([*SEARCH, short, "1"], f"unrecognized arguments: {short} 1") for short in ("--top", "--index", "--que")),
    (["search", "--tpk=3"], "did you mean --topk?"), (["generate", "--no-steam"], "did you mean --no_stream?"),
    (["search", "--zzzzzz"], "unrecognized arguments: --zzzzzz: see python refrag.py search --help"),
    (["generate", "Who built it?", "--index_dir", "i"], "Who built it? (write --question before it)"),
    (["index", "notes"], "notes (write --corpus before it)"), (["doctor", "all"], "all (write a flag before it)"),
    (["search", "--topk"], "--topk: expected one argument"),
    (["search", "--topk", "many"], "--topk: 'many' is not a whole number"),
    (["search", "--retriever", "magic"], "--retriever must be one of hybrid, dense, bm25, got 'magic'"),
    (["search", "--topk", "0"], "--topk must be 1 or more, got 0"),
    *((["bench", "--k", words], f"--k: ['{words}'] is not a whole number") for words in ("8,x", "8,,16", "1.5")),
    (["bench", "--p", ".1,many"], "--p: ['.1,many'] is not a number"), (["bench", "--k"], "--k is empty"),
    (["bench", "--modes", "full,magic"], "--modes must be one of full, refrag, none, got 'magic'"),
    (["sft", "--rag_json", __file__, "--out_dir", "run", "--topk", "2", "--topk_min", "3"],
     "--topk_min 3 is more than --topk 2"), (["generate", "--resume", "--question", "q"], "--resume needs --out FILE"),
    (["chat", "--prompt", "x"], "--prompt goes with generate"), (["chat", "--out", "x"], "--out goes with --questions"),
    (["align", "--text", "a\udcffb"], "half of a surrogate pair"),
    *((["serch"], told) for told in ("invalid choice: 'serch' (choose from 'index', 'search'",
                                     ": see python refrag.py --help\n")),
    (["--json", "search", "--question", "x"], "the following arguments are required: COMMAND: see python refrag.py"),
], ids=str)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(run, argv, told):
    code, out, err = run(*argv)
    assert (code, out) == (2, "") or "--json" in argv
    assert err.startswith("error: ") and err.count("\n") == 1 and told in err


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in [n for n in os.environ if n.startswith("REFRAG_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def toml(write):
    return lambda text: str(write("refrag.toml", text))


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(toml, monkeypatch):
    assert value_of("topk", SEARCH) == refrag.SearchConfig.topk == 8
    path = toml("topk = 2")
    assert value_of("topk", [*SEARCH, "--config", path]) == 2
    monkeypatch.setenv("REFRAG_CONFIG", path)
    assert value_of("topk", SEARCH) == 2
    monkeypatch.setenv("REFRAG_TOPK", "3")
    assert value_of("topk", SEARCH) == 3
    assert value_of("topk", [*SEARCH, "--topk", "4"]) == 4


def test_one_file_serves_all_commands_and_a_table_of_the_command_beats_the_top_level(toml):
    path = toml("topk = 2\nquiet = true\nmax-new = 9\n[search]\ntopk = 3\nindex-dir = 'there'\n[generate]\ntopk = 4\n"
                "max_new = 5\nstream = false\n")
    assert [value_of(name, ["search", "--config", path]) for name in ("topk", "index_dir", "quiet")] == [
        3, "there", True]
    assert [value_of(name, ["generate", "--config", path]) for name in ("topk", "max_new", "stream")] == [4, 5, False]
    assert value_of("max_new", ["chat", "--config", path]) == 9


@pytest.mark.parametrize(("stored", "name", "value"), [
    ("corpus = ['a b.txt', 'c,d.txt']", "corpus", ("a b.txt", "c,d.txt")), ("corpus = 'a.txt'", "corpus", ("a.txt",)),
    ("corpus = ['a.txt']\nlimit = 3", "limit", 3),
    *((f"corpus = ['a.txt']\nadd = {text}", "add", text == "true") for text in ("true", "false")),
    ({"REFRAG_CORPUS": "a,b.txt c.txt"}, "corpus", ("a,b.txt", "c.txt")),
    ({"REFRAG_CORPUS": "a.txt", "REFRAG_LIMIT": "5"}, "limit", 5),
    *(({"REFRAG_CORPUS": "a.txt", "REFRAG_ADD": text}, "add", text in ("1", "true", "YES"))
      for text in ("1", "true", "YES", "0", "False", "no"))], ids=str)
def test_stored_values_have_the_type_of_the_option(toml, monkeypatch, stored, name, value):
    for variable, text in stored.items() if isinstance(stored, dict) else ():
        monkeypatch.setenv(variable, text)
    assert value_of(name, ["index", *(("--config", toml(stored)) if isinstance(stored, str) else ())]) == value


@pytest.mark.parametrize("words", [["8", "16", "32"], ["8,16,32"], ["8,16", "32"], ["8,", "16,", "32"]], ids=str)
def test_numbers_stand_between_spaces_or_commas_everywhere(words, monkeypatch, toml):
    for more in (["--k", *words], ["--config", toml(f"k = '{' '.join(words)}'")]):
        assert value_of("k", [*BENCH, *more]) == (8, 16, 32)
    monkeypatch.setenv("REFRAG_K", " ".join(words))
    assert value_of("k", BENCH) == (8, 16, 32)


@pytest.mark.parametrize(("stored", "told"), [
    ("tokp = 3", "unknown option 'tokp'"), ("[serch]\ntopk = 3", "unknown option 'serch'"),
    ("search = 3", "unknown option 'search'"), ("[search]\nmax_new = 3", "unknown option 'max_new' in [search]"),
    ("[generate]\ntokp = 3", "unknown option 'tokp' in [generate]"),
    *((f"topk = {value}", f"argument --topk: {told}") for value, told in [
        ("'many'", "'many' is not a whole number"), ("3.7", "3.7 is not a whole number"),
        ("true", "True is not a whole number"), ("[1, 2]", "[1, 2] is not a whole number"),
        ("{a = 1}", "{'a': 1} is not a whole number")]),
    ("quiet = 'perhaps'", "argument --quiet: 'perhaps' is not true or false"),
    ("question = ['a', 'b']", "argument --question: ['a', 'b'] is not one value"), ("topk = ", "Invalid value"),
    (b"topk = \xff", ""), (None, "No such file"),
    ({"REFRAG_TOPK": "many"}, "argument --topk: 'many' is not a whole number"),
    ({"REFRAG_TOPK": ""}, "argument --topk: '' is not a whole number"),
    ({"REFRAG_QUIET": "perhaps"}, "argument --quiet: 'perhaps' is not true or false")], ids=str)
def test_a_bad_stored_value_is_refused_with_the_place_where_it_stands(run, toml, monkeypatch, stored, told):
    for variable, text in stored.items() if isinstance(stored, dict) else ():
        monkeypatch.setenv(variable, text)
    path = toml(stored) if isinstance(stored, str | bytes) else None if stored else "missing.toml"
    code, out, err = run(*SEARCH, *(("--config", path) if path else ()))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: --config {path}: {told}" if path else f"error: {next(iter(stored))}: {told}")


# Options without a default that stands by itself; training files must be there, and this is one.
NEEDED = {"corpus": "a.txt", "text": "a", "train_json": __file__, "rag_json": __file__, "out_dir": "run",
          "qa": __file__}


@pytest.mark.parametrize("name", refrag.COMMANDS)
def test_every_option_can_be_set_in_a_file(toml, name):
    """The defaults written as TOML are read back as the defaults."""
    options = {key: f.default for key, (f, _) in refrag.config_fields(refrag.COMMANDS[name].configs).items()}
    needed = {key: value for key, value in NEEDED.items() if key in options}
    options |= {key: [value] if options[key] == () else value for key, value in needed.items()}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items() if value is not None)
    expected = refrag.parse([name, *(word for key, value in needed.items() for word in (f"--{key}", value))])
    assert refrag.parse([name, "--config", toml(text)])[1][:-1] == expected[1][:-1]


@pytest.mark.parametrize(("argv", "code"), [(["search", "--topk", "0"], 2), (["search", "--tpk", "3"], 2), ([], 2),
    (["export", "--out_dir", "x" * 300, "--question", "q"], 2),  # it cannot even be looked at
    (["search", "--index_dir", "INDEX", "--question", "q", "--embed_model", "./nowhere"], 3)], ids=str)
def test_json_errors_are_one_object_on_stdout_and_one_line_on_stderr(refused, run, monkeypatch, index_dir, argv, code):
    """Also if --json stands in the environment. A traceback is shown with --debug only."""
    argv = [index_dir if a == "INDEX" else a for a in argv]
    message = refused(code, *argv)
    debug = run(*argv, "--debug")[2]
    assert debug.startswith("Traceback") and debug.endswith(f"{message}\n")
    monkeypatch.setenv("REFRAG_JSON", "1")
    assert json.loads(run(*argv)[1]) == {"error": {"code": code, "message": message}}


@given(st.text(st.characters(), max_size=20))
def test_json_keeps_every_text_and_can_always_be_written(text):
    """Halves of surrogate pairs too, which names of files may hold. Only what is no number is refused."""
    assert json.loads(refrag.dumps({"text": text}).encode("utf-8")) == {"text": text}
    with pytest.raises(ValueError, match="JSON compliant"):
        refrag.dumps({"score": float("nan")})


def test_importing_does_nothing_and_leaving_flushes(tmp_path):
    """No output, no seeding, no thread setting, no signal handler, no file. Leaving runs what was registered."""
    code = """
import atexit, os, pathlib, signal, sys, torch
state = lambda: (torch.initial_seed(), torch.get_num_threads(), signal.getsignal(signal.SIGTERM), dict(os.environ))
before, sys.argv = state(), ["refrag.py", "no such command"]
import refrag
assert state() == before and os.listdir() == []
atexit.register(pathlib.Path("mark").touch)
sys.stdout.write('half a line')
sys.stderr.write('and here')
refrag.leave(7)
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {
        "PYTHONPATH": str(Path(refrag.__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, "half a line", "and here")
    assert [path.name for path in tmp_path.iterdir()] == ["mark"]


def unread(stream: str, *argv: object, unbuffered: str = "") -> tuple[int, str]:
    """Exit code and other stream of the program, when nobody reads its stdout or stderr any more, as with `| head`."""
    process = subprocess.Popen([sys.executable, refrag.__file__, *map(str, argv)], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    getattr(process, stream).close()
    text = getattr(process, "stdout" if stream == "stderr" else "stderr").read()
    return process.wait(timeout=120), text


@posix
def test_indexing_results_help_and_errors_for_a_reader_that_has_gone(forks, tmp_path, corpus, index_dir, llama):
    code, out = unread("stderr", "index", "--corpus", corpus, "--index_dir", tmp_path / "index", "--retriever", "bm25",
                       "--dec", llama, "--json")
    assert code == 0 and json.loads(out)["passages"] == 6 and (tmp_path / "index" / "manifest.json").is_file()
    for unbuffered in ("", "1"):
        assert unread("stdout", "--help", unbuffered=unbuffered) == (0, "")
        assert unread("stdout", "search", "--json", "--topk", "0", unbuffered=unbuffered) == (
            2, "error: --topk must be 1 or more, got 0\n")
    found = ["search", "--index_dir", str(index_dir), "--question", "bridges", "--retriever", "bm25"]
    closed = "import os; reading, writing = os.pipe(); os.close(reading); os.dup2(writing, 1);"
    assert (forks.run(["-c", f"{closed} refrag.leave(refrag.main({found!r}))"]), forks.err) == (0, "")


def test_what_stdout_can_not_spell_does_not_end_the_work(monkeypatch, done, write, tmp_path, llama):
    """Redirected on Windows, say, stdout is of a code page."""
    corpus = write("c.jsonl", [{"id": "a", "text": "\u6771\u4eac towers"}])
    done("index", "--corpus", corpus, "--index_dir", tmp_path / "i", "--retriever", "bm25", "--dec", llama)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown := io.BytesIO(), "cp1252"))
    assert refrag.main(["search", "--question", "towers", "--index_dir", str(tmp_path / "i")]) == 0
    assert "\u6771\u4eac towers" in shown.getvalue().decode()


@posix
def test_streams_that_were_closed_before_the_start(tmp_path, index_dir):
    """Files opened later must not get the number of a closed stdout."""
    def in_shell(words: str, *argv: str) -> tuple[int, str]:
        done = subprocess.run(["sh", "-c", f'"$0" "$@" {words}', sys.executable, refrag.__file__, *argv], text=True,
                              capture_output=True, timeout=120)
        return done.returncode, done.stderr

    for closed in (">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"):
        assert in_shell(closed, "--help") == (0, "")
        told = "error: --topk must be 1 or more, got 0\n" if "2>" not in closed else ""
        assert in_shell(closed, "search", "--topk", "0", "--json") == (2, told)
    (tmp_path / "q.jsonl").write_text('{"question": "bridges"}\n')
    argv = ["search", "--index_dir", str(index_dir), "--questions", str(tmp_path / "q.jsonl")]
    assert in_shell(">&- 2>&-", *argv)[0] == 0 and (tmp_path / "q.jsonl").read_text() == '{"question": "bridges"}\n'


@posix
def test_names_that_are_no_utf8_and_a_current_folder_that_is_gone(tmp_path, monkeypatch, run, program, index_dir):
    folder = shutil.copytree(index_dir, tmp_path / os.fsdecode(b"index\xff"))
    code, out, err = run("search", "--index_dir", folder, "--question", "bridges", "--retriever", "bm25", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1) and json.loads(out)["question"] == "bridges"
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = program("search", "--json", "--config", os.fsdecode(b"\xff"), env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and json.loads(done.stdout)["error"]["code"] == 2
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    code, out, err = run("doctor")
    assert (code, out) == (2, "") and err.startswith("error: the current folder: No such file or directory: ")
    monkeypatch.chdir(tmp_path)


HOSTILE = "\x1b[2Jred\x07 \u202eevil\u2066 \x9b31m\r\u200f\u2028end\x00"
SHOWN = "\\x1b[2Jred\\x07 \\u202eevil\\u2066 \\x9b31m\\r\\u200f\\u2028end\\x00"


@given(st.text())
@example("Ebro\u2013r\u00edo\t\u957f\u6c5f\n\u0644\u0627 \u200d")
def test_nothing_visible_controls_a_terminal(text):
    """By the Unicode database instead of a list: no control characters, and no class of embeddings and isolates."""
    shown = refrag.visible(text)
    assert not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in shown if c not in "\n\t")
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not any(unicodedata.bidirectional(c) in turning for c in shown)
    assert refrag.visible(shown) == shown
    assert text.isprintable() <= (shown == text) and refrag.visible(HOSTILE) == SHOWN


def obeyed(text: str) -> set[str]:
    return set(HOSTILE) & set(text) - set("[2Jred evil31mn")


def test_people_are_shown_control_characters_and_json_keeps_them(run, build, llama, monkeypatch, tmp_path):
    """Of a passage, its title and its id, of a question and of names."""
    build("index", [{name: f"{name} bridges {HOSTILE}" for name in ("id", "title", "text")}], "--retriever", "bm25")
    hostile = ["--index_dir", tmp_path / "index", "--question", f"bridges{HOSTILE}"]
    _, out, err = run("search", *hostile)
    assert obeyed(out + err) == set() and out.count("\\x1b[2J") == 4 and "\\u202eevil" in out
    passage = json.loads(run("search", *hostile, "--json")[1])["passages"][0]
    assert [passage[name] for name in ("id", "title")] == [f"{name} bridges {HOSTILE}" for name in ("id", "title")]
    code, out, err = run("search", "--index_dir", f"no{HOSTILE[:-1]}", "--question", "q", "--json")
    assert code == 2 and obeyed(err) == set() and err.count("\n") == 1
    assert "\u202e" in json.loads(out)["error"]["message"]
    monkeypatch.setattr(refrag.TextStream, "__call__", lambda self, tokens, final=False: self.write(HOSTILE))
    common = ["generate", *hostile, "--dec", llama, "--max_new", 2, "--show_prompt", "--explain"]
    for more in ([], ["--no_stream"], ["--p", "1"]):
        code, out, err = run(*common, *more)
        assert code == 0 and obeyed(out + err) == set() and "bridges \\x1b[2J" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(
            f"bridges{HOSTILE}\n/docs\n/history\n/x\x1b[2J\n".encode()), "utf-8"))
    code, out, err = run("chat", *hostile[:2], "--dec", llama, "--max_new", 2)
    assert code == 0 and obeyed(out + err) == set()
    assert "title bridges \\x1b[2J" in err and "/x\\x1b[2J: no such" in err


def trec(*results: tuple[str, list[str]]) -> str:
    """The TREC run of questions, each with the ids of its documents, best first."""
    return search.trec_text([
        {"id": question, "passages": [refrag.Passage(n, i, "", "text", 1 / n, n, i) for n, i in enumerate(ids, 1)]}
        for question, ids in results])


@pytest.mark.parametrize(("results", "told"), [
    ([("1", ["a b", "a_b"])], "document"), ([("1", ["a b"]), ("2", ["a\tb"])], "document"),
    ([("q 1", ["a"]), ("q_1", ["a"])], "question"), ([("1", ["a", ""])], "document"), ([("", ["a"])], "question"),
], ids=str)
def test_trec_ids_are_columns_of_their_own_or_refused(results, told):
    assert trec(("q 1", ["a b"])).startswith("q_1 Q0 a_b 1 ")
    with pytest.raises(refrag.UserError, match=f"--format trec: {told} ids that are empty, or alike"):
        trec(*results)
