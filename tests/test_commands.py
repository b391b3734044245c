"""Section 2: the shape of the file, the command line, and how results and errors are printed."""

from __future__ import annotations

import ast
import errno
import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import refrag

SOURCE = Path(refrag.__file__).read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# =+\n# (\d+)\. (\w[\w ]*)\.", re.MULTILINE)
SECTIONS = {int(m[1]): (SOURCE[: m.start()].count("\n") + 1, m[2]) for m in BANNER.finditer(SOURCE)}
HEAVY = ("torch", "transformers", "numpy", "faiss", "bm25s", "filelock", "sentence_transformers")


# ---- The shape of the file ------------------------------------------------------------------------------------------


def section_of(node: ast.AST) -> int:
    """The number of the section a top-level statement stands in; 0 before the first banner."""
    return max((number for number, (line, _) in SECTIONS.items() if line <= node.lineno), default=0)


def bound_names(node: ast.AST) -> set[str]:
    """Names that a statement binds, not looking into functions, classes and comprehensions."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return set()
    own = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    own |= {node.name} if isinstance(node, ast.ExceptHandler) and node.name else set()
    return own.union(*(bound_names(child) for child in ast.iter_child_nodes(node)))


def free_names(node: ast.AST) -> set[str]:
    """Names that a statement reads and that are not bound by a function or comprehension around them."""
    names = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) else set()
    local: set[str] = set()
    if isinstance(node, ast.FunctionDef | ast.Lambda):
        a = node.args
        local = {arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg}
        body = node.body if isinstance(node.body, list) else []
        stated_global = {name for n in ast.walk(node) if isinstance(n, ast.Global) for name in n.names}
        local |= set().union(*(bound_names(statement) for statement in body)) - stated_global
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        local = set().union(*(bound_names(generator.target) for generator in node.generators))
    return names.union(*(free_names(child) for child in ast.iter_child_nodes(node))) - local


HOME = {name: section_of(node) for node in reversed(TREE.body) for name in bound_names(node)}  # the first one counts


def test_the_oracle_for_free_names_knows_locals_globals_and_comprehensions():
    source = "def f(a, *, b):\n    global g\n    c = a + g\n    return [d + c + h for d in b] + [(lambda x: x + i)(1)]"
    assert free_names(ast.parse(source).body[0]) == {"g", "h", "i"}


def test_contents_match_the_numbered_banners():
    listed = re.findall(r"^ {4}(\d+)\. (\w+) {2,}\S", refrag.__doc__, re.MULTILINE)
    assert listed == [(str(number), title) for number, (_, title) in SECTIONS.items()]
    assert list(SECTIONS) == sorted(SECTIONS)
    assert len(SECTIONS) == len(BANNER.findall(SOURCE)), "a number is used twice"


def test_a_section_uses_only_names_of_its_own_and_earlier_sections():
    """Annotations count too. Section 2 may name anything: its functions run after the whole file has been read."""
    later = {
        f"line {node.lineno}: section {section_of(node)} uses {name} of section {HOME[name]}"
        for node in TREE.body
        for name in free_names(node)
        if section_of(node) != 2 and HOME.get(name, 0) > section_of(node)
    }
    assert later == set()


def test_only_section_2_knows_argparse():
    users = {section_of(node) for node in TREE.body if "argparse" in free_names(node)}
    assert users == {2}


def test_the_heavy_libraries_are_imported_in_section_3():
    """Inside functions they may be imported anywhere."""
    for node in TREE.body:
        imports = [n for n in (node, *getattr(node, "body", ())) if isinstance(n, ast.Import | ast.ImportFrom)]
        modules = {a.name for n in imports for a in n.names} | {getattr(n, "module", "") for n in imports}
        if not isinstance(node, ast.FunctionDef) and {m.split(".")[0] for m in modules if m} & set(HEAVY):
            assert section_of(node) == 3


@pytest.mark.parametrize("name", refrag.COMMANDS)
def test_a_handler_is_thin(name):
    assert len(inspect.getsource(refrag.COMMANDS[name].handler).splitlines()) <= 25


def test_importing_does_nothing(tmp_path):
    """No output, no seeding, no thread setting, no signal handler, no file."""
    code = """
import os, signal, sys, torch
before = torch.initial_seed(), torch.get_num_threads(), signal.getsignal(signal.SIGTERM), dict(os.environ)
sys.argv = ["refrag.py", "no such command"]
import refrag
after = torch.initial_seed(), torch.get_num_threads(), signal.getsignal(signal.SIGTERM), dict(os.environ)
assert before == after, (before, after)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(refrag.__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ---- Before the heavy imports ---------------------------------------------------------------------------------------


@pytest.fixture
def without_heavy(tmp_path, program):
    """Run refrag.py as a process in which importing any of the heavy libraries fails."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')\n")
    return lambda *argv, **options: program(*argv, env=os.environ | {"PYTHONPATH": str(tmp_path)}, **options)


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([name, "--help"] for name in refrag.COMMANDS)], ids=str)
def test_help_and_version_need_no_library(without_heavy, argv):
    done = without_heavy(*argv)
    assert (done.returncode, done.stderr) == (0, "")
    if argv == ["--help"]:
        assert all(name in done.stdout for name in refrag.COMMANDS)
    elif "--help" in argv:
        assert all(f"--{option}" in done.stdout for option in refrag.config_fields(refrag.COMMANDS[argv[0]].configs))
    else:
        assert done.stdout == f"refrag.py {refrag.__version__}\n"


@pytest.mark.parametrize("name", refrag.COMMANDS)
def test_a_mistyped_flag_needs_no_library_and_gets_a_proposal(without_heavy, name):
    """The last two letters of an option change places, as in --index-dri."""
    option = next(option for option in refrag.config_fields(refrag.COMMANDS[name].configs) if "_" in option)
    done = without_heavy(name, f"--{option[:-2]}{option[:-3:-1]}".replace("_", "-"), "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert f"(did you mean --{option}?)" in done.stderr
    assert done.stderr.endswith(f": see python refrag.py {name} --help\n")
    assert done.stderr.count("\n") == 1


def test_the_libraries_are_really_blocked_in_these_tests(without_heavy):
    assert "was imported" in without_heavy("doctor").stderr


def test_serving_names_all_that_it_needs(run, monkeypatch):
    """Before anything is loaded."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, out, err = run("serve", "--index_dir", "nothing")
    assert (code, out) == (3, "") and err.endswith(": pip install pydantic starlette uvicorn\n")


def test_a_missing_library_is_named_with_the_command_that_mends_it(tmp_path, program):
    (tmp_path / "bm25s.py").write_text("raise ImportError('no bm25s here')\n")
    done = program("doctor", "--json", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 3
    assert done.stderr.startswith("error: library missing: no bm25s here: ")
    assert done.stderr.count("\n") == 1
    assert json.loads(done.stdout)["error"]["code"] == 3


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=str)
def test_ctrl_c_while_the_libraries_load(tmp_path, program, flags):
    """They take seconds, which is when a person notices a mistake. The first one imported sends the interrupt."""
    (tmp_path / "bm25s.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = program("doctor", *flags, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.stderr == "error: interrupted\n"
    assert done.returncode == 130
    assert not flags or json.loads(done.stdout)["error"]["code"] == 130


# ---- Flags ----------------------------------------------------------------------------------------------------------


def value_of(name: str, argv: list[str]) -> object:
    """The value an option has after parsing a command line."""
    return next(getattr(config, name) for config in refrag.parse(argv).configs if hasattr(config, name))


SEARCH = ["search", "--index_dir", "i", "--question", "q"]


@pytest.mark.parametrize("flag", ["--max_new", "--max-new"])
@pytest.mark.parametrize("joined", [True, False])
def test_flags_take_dashes_and_underscores(flag, joined):
    given = [f"{flag}=7"] if joined else [flag, "7"]
    assert value_of("max_new", ["generate", *given]) == 7


@pytest.mark.parametrize("flag", ["--no_stream", "--no-stream"])
def test_a_switch_that_is_on_can_be_turned_off(flag):
    assert value_of("stream", ["generate"]) is True
    assert value_of("stream", ["generate", flag]) is False


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--index_dir", "my-own-folder"], "index_dir", "my-own-folder"),
        (["--index-dir=my-own--folder"], "index_dir", "my-own--folder"),
        (["--question", "what is a well-known --flag-name for?"], "question", "what is a well-known --flag-name for?"),
        (["--question=--a-b"], "question", "--a-b"),
        (["--question", "-5 degrees"], "question", "-5 degrees"),
        (["--rerank", "cross-encoder/ms-marco-MiniLM-L6-v2"], "rerank", "cross-encoder/ms-marco-MiniLM-L6-v2"),
    ],
)
def test_values_with_dashes_stay_as_they_are(argv, name, value):
    assert value_of(name, ["search", *argv]) == value


@given(st.lists(st.text().filter(lambda s: not s.startswith("--")), max_size=4), st.lists(st.text(), max_size=3))
def test_only_flags_are_respelled(values, after):
    """What does not begin with two dashes, and everything after a bare --, is never touched."""
    assert refrag.underscore_flags([*values, "--", *after]) == [*values, "--", *after]


@given(st.from_regex(r"[a-z]+(-[a-z]+)*", fullmatch=True), st.text())
def test_the_value_joined_to_a_flag_is_not_respelled(name, value):
    assert refrag.underscore_flags([f"--{name}={value}"]) == [f"--{name.replace('-', '_')}={value}"]


@pytest.mark.parametrize("short", ["--top", "--index", "--que"])
def test_flags_are_not_abbreviated(short):
    with pytest.raises(refrag.UserError, match=f"unrecognized arguments: {short} "):
        refrag.parse([*SEARCH, short, "1"])


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["search", "--tpk", "3"], "did you mean --topk?"),
        (["search", "--tpk=3"], "did you mean --topk?"),
        (["index", "--embed-modle", "x"], "did you mean --embed_model?"),
        (["generate", "--no-steam"], "did you mean --no_stream?"),
        (["search", "--zzzzzz"], "unrecognized arguments: --zzzzzz: see python refrag.py search --help"),
        (["search", "stray"], "unrecognized arguments: stray (write --question before it)"),
        (["generate", "Who built it?", "--index_dir", "i"], "Who built it? (write --question before it)"),
        (["index", "notes"], "notes (write --corpus before it)"),
        (["doctor", "all"], "all (write a flag before it)"),
        (["search", "--topk"], "--topk: expected one argument"),
        (["search", "--topk", "many"], "--topk: invalid int value: 'many'"),
        (["search", "--retriever", "magic"], "choose from 'hybrid', 'dense', 'bm25'"),
        (["search", "--topk", "0"], "--topk must be 1 or more, got 0"),
        (["bench", "--k", "8,x"], "--k: k must be a int, got 'x'"),
        (["bench", "--k", "8,,16"], "--k: k must be a int, got ''"),
        (["bench", "--k", "1.5"], "--k: k must be a int, got '1.5'"),
        (["bench", "--p", ".1,many"], "--p: p must be a float, got 'many'"),
        (["bench", "--k"], "--k: expected at least one argument"),
        (["bench", "--modes", "full,magic"], "--modes: modes must be one of full, refrag, none, got 'magic'"),
        (["sft", "--rag_json", __file__, "--out_dir", "run", "--topk", "2", "--topk_min", "3"],
         "--topk_min 3 is more than --topk 2"),
        (["serch"], "invalid choice: 'serch' (choose from 'index', 'search'"),
        (["--json"], "unrecognized arguments: --json"),
        (["--json", "search", "--question", "x"], "options go after the command"),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(run, argv, told):
    code, out, err = run(*argv)
    assert (code, out) == (2, "") or "--json" in argv
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err


def test_the_hint_after_an_unknown_command_is_a_command_that_works(run):
    _, _, err = run("serch")
    assert err.endswith(": see python refrag.py --help\n")


def test_without_a_command_the_help_and_the_commands_are_shown(run):
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("usage: refrag.py")
    assert err.splitlines()[-1] == f"error: no command: name one of {', '.join(refrag.COMMANDS)}"


BENCH = ["bench", "--index_dir", "i"]


@pytest.mark.parametrize("words", [["8", "16", "32"], ["8,16,32"], ["8,16", "32"], ["8,", "16,", "32"]], ids=str)
def test_numbers_stand_between_spaces_or_commas(words, monkeypatch, toml):
    """After the flag, in the environment and in a file."""
    for name, command in (("k", BENCH), ("k", ["cpt_recon", "--train_json", __file__, "--out_dir", "run"])):
        assert value_of(name, [*command, f"--{name}", *words]) == (8, 16, 32)
        assert value_of(name, [*command, "--config", toml(f"k = '{' '.join(words)}'")]) == (8, 16, 32)
        monkeypatch.setenv("REFRAG_K", " ".join(words))
        assert value_of(name, command) == (8, 16, 32)
        monkeypatch.delenv("REFRAG_K")


def test_fractions_and_choices_may_stand_between_commas_too(toml):
    assert value_of("p", [*BENCH, "--p", "0,.1", "1e-2"]) == (0.0, 0.1, 0.01)
    assert value_of("p", [*BENCH, "--config", toml("p = [0, 0.5]")]) == (0.0, 0.5)
    assert value_of("modes", [*BENCH, "--modes", "full,none"]) == ("full", "none")
    assert value_of("modes", [*BENCH, "--modes", "full", "none"]) == ("full", "none")


def test_names_of_files_keep_their_commas(monkeypatch, toml):
    assert value_of("corpus", ["index", "--corpus", "a,b.txt", "c d.txt"]) == ("a,b.txt", "c d.txt")
    assert value_of("corpus", ["index", "--config", toml("corpus = ['a,b c.txt']")]) == ("a,b c.txt",)
    monkeypatch.setenv("REFRAG_CORPUS", "a,b.txt c.txt")
    assert value_of("corpus", ["index"]) == ("a,b.txt", "c.txt")


def test_the_last_of_two_lists_counts():
    assert value_of("k", [*BENCH, "--k", "4,8", "--k", "16"]) == (16,)


def test_help_shows_several_defaults_as_they_are_written(run):
    _, out, _ = run("bench", "--help")
    text = " ".join(out.split())
    assert "--contexts INT [INT ...]" in text
    assert "as many as fit (default 512 1024 2048 4096 8192)" in text
    assert "--modes {full,refrag,none} [{full,refrag,none} ...]" in text


# ---- Flag, environment, file, default -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """The environment holds no option."""
    for name in [n for n in os.environ if n.startswith("REFRAG_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def toml(tmp_path):
    """Write a TOML file; returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "refrag.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(toml, monkeypatch):
    assert value_of("topk", SEARCH) == refrag.SearchConfig.topk == 8
    path = toml("topk = 2")
    assert value_of("topk", [*SEARCH, "--config", path]) == 2
    monkeypatch.setenv("REFRAG_TOPK", "3")
    assert value_of("topk", [*SEARCH, "--config", path]) == 3
    assert value_of("topk", [*SEARCH, "--config", path, "--topk", "4"]) == 4


def test_the_config_file_may_be_named_in_the_environment(toml, monkeypatch):
    monkeypatch.setenv("REFRAG_CONFIG", toml("topk = 2"))
    assert value_of("topk", SEARCH) == 2


def test_a_table_of_the_command_beats_the_top_level_and_other_tables_do_not_count(toml):
    path = toml("topk = 2\nquiet = true\n[search]\ntopk = 3\nindex-dir = 'there'\n[generate]\ntopk = 4\nmax_new = 5\n")
    assert value_of("topk", ["search", "--config", path]) == 3
    assert value_of("index_dir", ["search", "--config", path]) == "there"
    assert value_of("quiet", ["search", "--config", path]) is True
    assert value_of("topk", ["generate", "--config", path]) == 4
    assert value_of("max_new", ["generate", "--config", path]) == 5


def test_top_level_keys_of_other_commands_are_allowed(toml):
    """One file serves all commands: max_new means nothing to `search`."""
    assert value_of("topk", [*SEARCH, "--config", toml("max_new = 3\ntopk = 5")]) == 5


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("corpus = ['a b.txt', 'c.txt']", "corpus", ("a b.txt", "c.txt")),
        ("corpus = 'a.txt'", "corpus", ("a.txt",)),
        ("corpus = ['a.txt']\nlimit = 3", "limit", 3),
        ("corpus = ['a.txt']\nadd = true", "add", True),
        ("corpus = ['a.txt']\nadd = false", "add", False),
    ],
)
def test_values_of_a_file_have_the_type_of_the_option(toml, text, name, value):
    assert value_of(name, ["index", "--config", toml(text)]) == value


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("REFRAG_CORPUS", "a.txt b.txt", "corpus", ("a.txt", "b.txt")),
        ("REFRAG_LIMIT", "5", "limit", 5),
        *(("REFRAG_ADD", text, "add", True) for text in ("1", "true", "YES")),
        *(("REFRAG_ADD", text, "add", False) for text in ("0", "False", "no")),
    ],
)
def test_values_of_the_environment_have_the_type_of_the_option(monkeypatch, variable, text, name, value):
    monkeypatch.setenv(variable, text)
    assert value_of(name, ["index", *(() if name == "corpus" else ("--corpus", "a.txt"))]) == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tokp = 3", "unknown option 'tokp'"),
        ("[serch]\ntopk = 3", "unknown option 'serch'"),
        ("[search]\ntokp = 3", "unknown option 'tokp'"),
        ("search = 3", "unknown option 'search'"),
        ("topk = 'many'", "topk must be a int, got 'many'"),
        ("topk = [1, 2]", "topk must be a int, got [1, 2]"),
        ("topk = {a = 1}", "topk must be a int"),
        ("quiet = 'perhaps'", "quiet must be a bool, got 'perhaps'"),
        ("retriever = 'magic'", "retriever must be one of hybrid, dense, bm25, got 'magic'"),
        ("topk = 0", "--topk must be 1 or more, got 0"),
        ("topk = ", "Invalid value"),
        ("topk = 3.7", "topk must be"),
        ("topk = true", "topk must be"),
        ("question = ['a', 'b']", "question must be"),
        ("[search]\nmax_new = 3", "unknown option 'max_new'"),
    ],
)
def test_a_bad_config_file_is_refused(run, toml, text, told):
    path = toml(text)
    code, out, err = run("search", "--index_dir", "i", "--config", path)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err
    if "--topk" not in told:
        assert f"--config {path}: " in err


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_config_file_that_can_not_be_read_is_refused(run, tmp_path, name):
    code, _, err = run("search", "--config", tmp_path / name)
    assert code == 2
    assert err.startswith(f"error: --config {tmp_path / name}: ")


def test_a_config_file_of_other_bytes_is_refused(run, tmp_path):
    (tmp_path / "a.toml").write_bytes(b"topk = \xff")
    assert run("search", "--config", tmp_path / "a.toml")[0] == 2


@pytest.mark.parametrize(
    ("variable", "text", "told"),
    [
        ("REFRAG_TOPK", "many", "environment variable REFRAG_TOPK: topk must be a int, got 'many'"),
        ("REFRAG_TOPK", "", "environment variable REFRAG_TOPK: topk must be a int, got ''"),
        ("REFRAG_QUIET", "perhaps", "environment variable REFRAG_QUIET: quiet must be a bool, got 'perhaps'"),
        ("REFRAG_RETRIEVER", "magic", "environment variable REFRAG_RETRIEVER: retriever must be one of hybrid"),
        ("REFRAG_TOPK", "0", "--topk must be 1 or more, got 0"),
    ],
)
def test_a_bad_environment_variable_is_refused(run, monkeypatch, variable, text, told):
    monkeypatch.setenv(variable, text)
    code, out, err = run(*SEARCH)
    assert (code, out) == (2, "")
    assert told in err


# Options without a default that stands by itself; training files must be there, and this is one.
NEEDED = {"corpus": "a.txt", "text": "a", "train_json": __file__, "rag_json": __file__, "out_dir": "run",
          "qa": __file__}


def test_every_option_can_be_set_in_a_file(toml):
    """The defaults written as TOML are read back as the defaults."""
    for name, cmd in refrag.COMMANDS.items():
        options = {key: f.default for key, (f, _) in refrag.config_fields(cmd.configs).items()}
        needed = {key: value for key, value in NEEDED.items() if key in options}
        options |= {key: [value] if options[key] == () else value for key, value in needed.items()}
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items() if value is not None)
        assert tomllib.loads(text)
        expected = refrag.parse([name, *(word for key, value in needed.items() for word in (f"--{key}", value))])
        assert refrag.parse([name, "--config", toml(text)]).configs[:-1] == expected.configs[:-1]


# ---- Results and errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["search", "--topk", "0", "--json"], 2),
        (["search", "--tpk", "3", "--json"], 2),
        (["serch", "--json"], 2),
        (["--json"], 2),
        (["search", "--json", "--index_dir", "nowhere", "--question", "q"], 2),
        (["search", "--json", "--question", ""], 2),
        (["doctor", "--json", "--index_dir", "nowhere"], 2),
        (["index", "--json", "--corpus", "nowhere.txt"], 2),
        (["search", "--json", "--index_dir", "INDEX", "--question", "q", "--embed_model", "./nowhere"], 3),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else str(v),
)
def test_json_errors_are_one_object_on_stdout_and_one_line_on_stderr(run, index_dir, argv, code):
    got, out, err = run(*(index_dir if a == "INDEX" else a for a in argv))
    assert got == code
    body = json.loads(out)
    assert out.count("\n") == 1
    assert body == {"error": {"code": code, "message": body["error"]["message"]}}
    assert err == f"error: {body['error']['message']}\n"


def test_json_set_in_the_environment_holds_for_wrong_options_too(run, monkeypatch):
    monkeypatch.setenv("REFRAG_JSON", "1")
    _, out, _ = run("search", "--topk", "0")
    assert json.loads(out)["error"]["code"] == 2


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("sig", "code"),
    [("SIGINT", 130), ("SIGTERM", 143)],
)
def test_an_interrupted_command_says_so(run, monkeypatch, sig, code):
    monkeypatch.setattr(refrag, "read_questions", lambda _: signal.raise_signal(getattr(signal, sig)))
    got, out, err = run("search", "--json")
    assert (got, err) == (code, "error: interrupted\n")
    assert json.loads(out)["error"]["code"] == code


@pytest.mark.skipif(os.name == "nt", reason="arguments are bytes on POSIX only")
def test_an_argument_that_is_no_utf8_is_refused_like_any_other(program):
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = program("search", "--json", "--config", os.fsdecode(b"\xff"), env=environment)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert json.loads(done.stdout)["error"]["code"] == 2


def test_json_holds_for_results(run, index_dir):
    code, out, err = run("search", "--index_dir", index_dir, "--question", "bridges", "--retriever", "bm25", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out)["question"] == "bridges"


def test_a_traceback_is_shown_with_debug_only(run):
    plain, debug = (run("search", "--index_dir", "nowhere", "--question", "q", *extra) for extra in ((), ("--debug",)))
    assert plain[0] == debug[0] == 2
    assert "Traceback" not in plain[2]
    assert debug[2].startswith("Traceback")
    assert debug[2].endswith(plain[2])


def test_a_result_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        refrag.dumps({"score": float("nan")})


def test_leaving_flushes_runs_what_was_registered_and_keeps_the_code(tmp_path):
    """The interpreter's tidying up is left out, these are not."""
    code = ("import atexit, pathlib, sys, refrag\n"
            f"atexit.register(pathlib.Path({str(tmp_path / 'mark')!r}).touch)\n"
            "sys.stdout.write('half a line'); sys.stderr.write('and here')\n"
            "refrag.leave(7)\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120,
                          cwd=os.path.dirname(refrag.__file__))
    assert (done.returncode, done.stdout, done.stderr) == (7, "half a line", "and here")
    assert (tmp_path / "mark").exists()


@pytest.fixture
def deaf_stderr(monkeypatch):
    """A stderr whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield stream
        monkeypatch.undo()


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX pipes")
def test_work_goes_on_when_nobody_reads_stderr(deaf_stderr, monkeypatch):
    """Neither a notice nor a bar nor an error's line ends it, and the exit code stays what it is."""
    monkeypatch.setattr(refrag, "QUIET", False)
    refrag.notice("a notice")
    with refrag.progress(None, "work", 2, "step") as bar:
        bar.delay = 0
        bar.update()
        bar.refresh()
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    with pytest.MonkeyPatch.context() as patched:  # the error's own line can not be printed either
        patched.setattr(sys, "stdout", Full())
        assert refrag.report(OSError(errno.ENOSPC, "full"), as_json=True) == 6
    assert refrag.report(refrag.UserError("a mistake"), as_json=False, debug=True) == 2


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX pipes")
def test_an_index_is_built_though_nobody_reads_stderr(tmp_path, corpus, embedder, llama):
    argv = ["index", "--corpus", corpus, "--index_dir", tmp_path / "index", "--embed_model", embedder, "--dec", llama,
            "--max_passage_tokens", 300, "--json"]
    process = subprocess.Popen([sys.executable, refrag.__file__, *map(str, argv)], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stderr.close()
    out = process.stdout.read()
    assert process.wait(timeout=120) == 0
    assert json.loads(out)["passages"] >= 6 and (tmp_path / "index" / "manifest.json").is_file()


def closed_stdout(*argv: object, buffered: bool = True) -> tuple[int, str]:
    """Exit code and stderr of the program whose reader has gone, as with `| head`."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, refrag.__file__, *map(str, argv)], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX pipes")
def test_results_for_a_reader_that_has_gone(index_dir):
    argv = ["search", "--index_dir", index_dir, "--question", "bridges", "--retriever", "bm25"]
    assert closed_stdout(*argv) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX pipes")
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("argv", [["--help"], ["search", "--help"], ["--version"]], ids=str)
def test_help_for_a_reader_that_has_gone(argv, buffered):
    assert closed_stdout(*argv, buffered=buffered) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX pipes")
@pytest.mark.parametrize("buffered", [True, False])
def test_an_error_for_a_reader_that_has_gone(buffered):
    code, err = closed_stdout("search", "--json", "--topk", "0", buffered=buffered)
    assert err == "error: --topk must be 1 or more, got 0\n"
    assert code == 2


def test_memory_that_torch_does_not_get_is_memory_that_ran_out():
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert refrag.classify(caught.value)[0] == 6


@pytest.mark.skipif(os.name == "nt", reason="other limits")
def test_a_path_of_an_option_that_can_not_even_be_looked_at(run):
    code, out, err = run("export", "--out_dir", "x" * 300, "--question", "q", "--json")
    assert code == 2 and json.loads(out)["error"]["code"] == 2 and "File name too long" in err


def test_help_shows_a_default_of_zero(run):
    assert "(default 0)" in run("sft", "--help")[1]


def test_what_stdout_can_not_spell_does_not_end_the_work(program, tmp_path):
    """Redirected on Windows, say, stdout is of a code page."""
    corpus = tmp_path / "c.jsonl"
    corpus.write_text(json.dumps({"id": "a", "text": "\u6771\u4eac towers"}) + "\n", encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    argv = ["--index_dir", tmp_path / "index", "--retriever", "bm25"]
    assert program("index", "--corpus", corpus, *argv, env=environment).returncode == 0
    done = program("search", "--question", "towers", *argv, env=environment, encoding="utf-8")
    assert done.returncode == 0 and "\u6771\u4eac towers" in done.stdout


# ---- Streams that were closed, and odd surroundings -----------------------------------------------------------------


def in_shell(words: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the program by a shell. words: what stands after the command."""
    return subprocess.run(["sh", "-c", f'"$0" "$@" {words}', sys.executable, refrag.__file__, *argv], text=True,
                          env=os.environ | environment, capture_output=True, timeout=120)


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("argv", "code"), [("--help", 0), ("--version", 0), ("search --topk 0", 2),
                                            ("search --topk 0 --json", 2)])
def test_streams_that_were_closed_before_the_start(closed, argv, code):
    done = in_shell(closed, *argv.split())
    assert done.returncode == code
    assert done.stderr == ("error: --topk must be 1 or more, got 0\n" if code and "2>" not in closed else "")


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_what_is_written_to_a_closed_stdout_goes_to_no_file(tmp_path, index_dir):
    """Files opened later must not get its number."""
    (tmp_path / "q.jsonl").write_text('{"question": "bridges"}\n')
    done = in_shell(">&- 2>&-", "search", "--index_dir", str(index_dir), "--questions", str(tmp_path / "q.jsonl"))
    assert done.returncode == 0 and (tmp_path / "q.jsonl").read_text() == '{"question": "bridges"}\n'


def test_docstrings_that_are_stripped_are_named(program):
    """The libraries need theirs; our own are but the texts of --help."""
    environment = os.environ | {"PYTHONOPTIMIZE": "2"}
    assert "--index_dir" in program("search", "--help", env=environment).stdout
    done = program("doctor", "--json", env=environment)
    assert done.returncode == 2 and "PYTHONOPTIMIZE=2" in json.loads(done.stdout)["error"]["message"]
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="a folder in use can not go there")
def test_a_current_folder_that_is_gone(tmp_path, monkeypatch, run):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert run("doctor") == (2, "", "error: the current folder is not there any more: change to another\n")
    monkeypatch.chdir(tmp_path)


def test_without_a_home_the_variable_is_named(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("REFRAG_HOME", raising=False)
    with pytest.raises(refrag.UserError, match="set REFRAG_HOME"):
        refrag.cache_home()
    monkeypatch.setenv("REFRAG_HOME", "there")
    assert refrag.cache_home() == Path("there")


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_an_index_whose_name_is_no_utf8(index_dir, tmp_path, run):
    folder = tmp_path / os.fsdecode(b"index\xff")
    shutil.copytree(index_dir, folder)
    assert run("search", "--index_dir", folder, "--question", "bridges", "--quiet")[0] == 0


# ---- What a terminal is shown ---------------------------------------------------------------------------------------

HOSTILE = "\x1b[2Jred\x07 \u202eevil\u2066 \x9b31m\r\u200f\u2028end\x00"
SHOWN = "\\x1b[2Jred\\x07 \\u202eevil\\u2066 \\x9b31m\\r\\u200f\\u2028end\\x00"


def test_what_moves_the_cursor_or_turns_words_round_is_escaped():
    assert refrag.visible(HOSTILE) == SHOWN
    plain = "Ebro\u2013r\u00edo\t\u957f\u6c5f\n\u0644\u0627 \u200d"
    assert refrag.visible(plain) == plain


@given(st.text())
def test_nothing_visible_controls_a_terminal(text):
    """By the Unicode database instead of a list: no control characters, and no class of embeddings and isolates."""
    shown = refrag.visible(text)
    assert not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in shown if c not in "\n\t")
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not any(unicodedata.bidirectional(c) in turning for c in shown)
    assert refrag.visible(shown) == shown


@pytest.fixture
def hostile(tmp_path, run, llama):
    """An index of words alone whose passage, title and id hold what a terminal obeys."""
    corpus, folder = tmp_path / "c.jsonl", tmp_path / "index"
    passage = {"id": f"id{HOSTILE}", "title": f"title{HOSTILE}", "text": f"bridges {HOSTILE}"}
    corpus.write_text(json.dumps(passage) + "\n")
    assert run("index", "--corpus", corpus, "--index_dir", folder, "--retriever", "bm25", "--dec", llama)[0] == 0
    return ["--index_dir", folder, "--question", f"bridges{HOSTILE}"]


def obeyed(text: str) -> set[str]:
    """The characters of HOSTILE that a text holds as they are."""
    return set(HOSTILE) & set(text) - set("[2Jred evil31mn")


def test_search_shows_control_characters_and_json_keeps_them(run, hostile):
    _, out, err = run("search", *hostile)
    assert obeyed(out + err) == set() and out.count("\\x1b[2J") == 4 and "\\u202eevil" in out
    passage = json.loads(run("search", *hostile, "--json")[1])["passages"][0]
    assert passage["title"] == f"title{HOSTILE}" and passage["id"] == f"id{HOSTILE}"


def test_an_answer_and_its_prompt_show_control_characters(run, hostile, llama, monkeypatch):
    monkeypatch.setattr(refrag.TextStream, "__call__", lambda self, tokens, final=False: self.write(HOSTILE))
    common = ["generate", *hostile, "--dec", llama, "--max_new", 2, "--show_prompt", "--explain"]
    for more in ([], ["--no_stream"], ["--p", "1"]):
        code, out, err = run(*common, *more)
        assert code == 0 and obeyed(out + err) == set() and "bridges\\x1b[2J" in err


def test_chat_shows_control_characters(run, hostile, llama, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"bridges{HOSTILE}\n/docs\n/history\n/x\x1b[2J\n"))
    code, out, err = run("chat", *hostile[:2], "--dec", llama, "--max_new", 2)
    assert code == 0 and obeyed(out + err) == set() and "title\\x1b[2J" in err and "/x\\x1b[2J: no such" in err


def test_an_error_shows_control_characters_and_json_keeps_them(run):
    code, out, err = run("search", "--index_dir", f"no{HOSTILE[:-1]}", "--question", "q", "--json")
    assert code == 2 and obeyed(err) == set() and err.count("\n") == 1
    assert "\u202e" in json.loads(out)["error"]["message"]


# ---- TREC -----------------------------------------------------------------------------------------------------------


def found(*ids: str) -> list[refrag.Passage]:
    """Passages of documents with these ids, best first."""
    return [refrag.Passage(n, i, "", "text", 1 / n, n, i) for n, i in enumerate(ids, start=1)]


def test_trec_ids_are_columns_of_their_own():
    results = [{"id": "q 1", "passages": found("a b", "c")}, {"id": "q2", "passages": found("c", "a b")}]
    assert [line.split()[:4] for line in refrag.trec_text(results).splitlines()] == [
        ["q_1", "Q0", "a_b", "1"], ["q_1", "Q0", "c", "2"], ["q2", "Q0", "c", "1"], ["q2", "Q0", "a_b", "2"]]


@pytest.mark.parametrize(("results", "told"), [
    ([("1", ["a b", "a_b"])], "document ids 'a b' and 'a_b' would both be a_b"),
    ([("1", ["a b"]), ("2", ["a\tb"])], "document ids 'a b' and 'a\\tb' would both be a_b"),
    ([("q 1", ["a"]), ("q_1", ["a"])], "question ids 'q 1' and 'q_1' would both be q_1"),
    ([("1", ["a", ""])], "the id of a document is empty"),
    ([("", ["a"])], "the id of a question is empty"),
], ids=str)
def test_trec_ids_that_collide_or_are_empty_are_refused(results, told):
    with pytest.raises(refrag.UserError, match=re.escape(f"--format trec: {'' if 'empty' in told else 'the '}{told}")):
        refrag.trec_text([{"id": name, "passages": found(*ids)} for name, ids in results])


def test_nothing_is_printed_before_ids_are_refused(run, tmp_path, llama):
    corpus, questions = tmp_path / "c.jsonl", tmp_path / "q.jsonl"
    records = [{"id": "x y", "text": "seven bridges"}, {"id": "x_y", "text": "bridges"}]
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    questions.write_text('{"id": "first", "question": "bridges"}\n')
    folder = tmp_path / "index"
    assert run("index", "--corpus", corpus, "--index_dir", folder, "--retriever", "bm25", "--dec", llama)[0] == 0
    code, out, err = run("search", "--index_dir", folder, "--questions", questions, "--format", "trec")
    assert (code, out) == (2, "") and "'x_y' and 'x y'" in err
