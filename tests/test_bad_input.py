"""Bad input, command by command: one line that names what is wrong, the exit code, and nothing begun or changed."""

import gzip
import json
import re
import shutil
import sys

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from conftest import TEXTS, passages_of
from writers import WRITERS, unchanged

pytestmark = pytest.mark.usefixtures("home")
NOWHERE = "/nowhere/model"
GOOD = {"id": "new", "text": "A good passage."}
LONG = f"{TEXTS[0]} {TEXTS[1]}"
ASKED = [{"question": "Who?", "answers": ["Ada"], "positive_ids": ["c"]},
         {"question": "Where?", "answers": ["Athens"], "positive_ids": ["f"]}]


def asked(**wrong: object) -> list[dict]:
    """Questions of which the third is as the others but for something."""
    return [*ASKED, {"question": "What?", "answers": ["bronze"], "positive_ids": ["b"]} | wrong]


CORPORA = [("c.txt", b"", "no passages in it"), ("c.txt", b"\n \r\n\t\n\n", "no passages in it"),
    ("c.jsonl", b"", "no passages in it"), ("c.txt", b"good\nb\xffd\n", r"c\.txt:2: invalid UTF-8: "),
    ("c.jsonl", b'{"text": "good"}\n{"text": \n', r"c\.jsonl:2: malformed JSON"),
    ("c.jsonl", [GOOD, {"id": "x", "text": "b"}, {"id": "new", "text": "c"}],
     r"duplicate id 'new' at \S*c\.jsonl:1 and \S*c\.jsonl:3"),
    ("c.txt.gz", gzip.compress(b"good\n" * 500)[:-9], "not a complete gzip file")]
TRAINING = [
    (b"", "no text to train on"), (b"\n \r\n\t\n\n", "no text to train on"), ([{"tokens": []}], "no text to train on"),
    ([{"text": ""}], "no text to train on"), (b'{"text": "good"}\n\n{"text": \n', "PATH:3: malformed JSON"),
    (b'{"text": "good"}\n["text"]\n', "PATH:2: expected a JSON object, got list"),
    ([{"title": "x"}], "PATH:1: no tokens (nor text) among its keys: title"),
    (b'{"text": "\\ud800"}\n', "PATH:1: text holds half of a surrogate pair"),
    (b'{"text": "good"}\n{"text": "b\xff"}\n', "PATH:2: invalid UTF-8"),
    *(([{"tokens": tokens}], "PATH:1: tokens must be whole numbers") for tokens in ([1, 2.5], [True] * 9, ["7"] * 9,
                                                                                     [5, -1])),
    ([{"text": LONG}, {"tokens": [600] * 9}], "PATH:2: token 600 is not one of the decoder"),
    ([{"tokens": [2**70] * 9}], "PATH:1: token"),
    *(([{"text": LONG, "split": split}], "PATH:1: split must be {s, o}") for split in (
        5, [], {"s": -1, "o": 9}, {"s": 9, "o": "a"}, {"s": True, "o": 9})),
    ([{"text": LONG, "split": {"s": 2**40, "o": 9}}], "PATH:1: split"),
    ([{"text": "ab"}] * 3, "PATH: every text is shorter than 5 tokens, which --k 4 needs")]
QUESTIONS = [(b"", "PATH: the file holds no question"), (b"\n \n", "PATH: the file holds no question"),
    (b'{"question": "a"}\n{"question": \n', "PATH:2: malformed JSON"),
    ([*ASKED, {"answers": ["x"]}], "PATH:3: no question (nor query, text) among its keys: answers"),
    (asked(question=" "), "PATH:3: the question is empty"),
    ([q | {"id": 7} for q in ASKED], "PATH: ids are not unique"),
    ([*ASKED, {"question": "Who?"}], "PATH: question 3 has no list of answers"),
    *((asked(answers=answers), "PATH: question 3 has no list of answers") for answers in (
        None, "Ada", [1843], ["Ada", " "])), ([q | {"answers": []} for q in ASKED], "PATH: no question has an answer"),
    (asked(answers=["\ud800"]), "PATH: question 3: an answer holds half of a surrogate pair"),
    *((asked(positive_ids=ids), "PATH: question 3: positive_ids must be a list of ids") for ids in (
        5, "abc", {"c": 1})), (asked(positive_ids=[["c"]]), "PATH: question 3: id must be a string, got list")]
FILES = [*(("index", "--corpus", name, content, told) for name, content, told in CORPORA),
    *(("add", "--corpus", name, content, told) for name, content, told in CORPORA[3:5]),
    *(("cpt_next", "--train_json", "t.jsonl", content, told) for content, told in TRAINING),
    *(("cpt_next", "--eval_json", "t.jsonl", content, told) for content, told in TRAINING[4:6]),
    *((phase, "--train_json", "t.jsonl", *TRAINING[4]) for phase in ("cpt_align", "cpt_recon")),
    *(("cpt_recon", flag, "t.jsonl.gz", content, "PATH: not a complete gzip file")
      for flag in ("--train_json", "--eval_json") for content in (gzip.compress(LONG.encode() * 99)[:-9], b"no gzip")),
    *(("sft", "--rag_json", "q.jsonl", content, told) for content, told in QUESTIONS),
    ("sft", "--eval_json", "q.jsonl", asked(answers=None), "PATH: question 3 has no list of answers"),
    ("train", "--eval_rag_json", "q.jsonl", asked(answers=None), "--eval_rag_json PATH: question 3 has no list"),
    ("sft", "--rag_json", "q.jsonl.gz", gzip.compress(b"{}" * 999)[:-9], "PATH: not a complete gzip file"),
    ("sft", "--rag_json", "q.jsonl", [q | {"positive_ids": ["unknown"]} for q in ASKED], "positive_ids"),
    *(("eval", "--qa", "q.jsonl", [ASKED[0], ASKED[1] | wrong], told) for wrong, told in (
        ({"answers": None}, "question 2 has no list of answers"), ({"answers": "Ulm"}, "has no list of answers"),
        ({"positive_ids": "a"}, "positive_ids must be a list"))),
    ("train_gate", "--rag_json", "q.jsonl", asked(answers=None), "question 3 has no list of answers"),
    ("train_gate", "--rag_json", "q.jsonl", [ASKED[0] | {"answers": ["nowhere at all"]}], "not one question")]


def code_of(name: str, told: str) -> int:
    """Damage is 4, what does not belong together 5, any other bad input 2."""
    return 4 if "gzip" in told else 5 if "positive_ids" in told and "must" not in told else 2


@pytest.mark.parametrize(("command", "flag", "name", "content", "told"), FILES, ids=range(len(FILES)))
def test_a_bad_file_is_refused(run, refused, line, finished, write, tmp_path, command, flag, name, content, told):
    path, out = write(f"bad/{name}", content), tmp_path / "out"
    if command in ("index", "add"):
        shutil.copytree(finished.old("words"), out)
    with unchanged(tmp_path / "out"):
        message = refused(code_of(name, told), *line(command, out, flag, path))
    if flag == "--corpus":
        assert re.search(told, message)
    else:
        assert told.replace("PATH", str(path)) in message
    flags = run(line(command, out)[0], "--help")[1]
    assert [word for word in re.findall(r"--\w+", message) if word not in flags] == []
    assert command in ("index", "add") or not out.exists()


def test_the_texts_of_two_files_are_named_by_their_own_file(refused, line, write, tmp_path):
    names = [write("good.jsonl", [{"text": LONG}]), write("bad.jsonl", [{"text": LONG}, {"text": None}])]
    argv = line("cpt_next", tmp_path / "out", "--train_json", *names)
    assert f"{names[1]}:2: text must be a string" in refused(2, *argv)


def test_no_half_of_a_damaged_file_stays_in_the_cache_or_none_can_be_made(refused, done, line, write, home, tmp_path,
                                                                          monkeypatch):
    path = write("t.jsonl.gz", gzip.compress(json.dumps({"text": LONG}).encode() * 99)[:-9])
    argv = line("cpt_recon", tmp_path / "out", "--train_json", path, "--steps", 1)
    refused(4, *argv)
    path.write_bytes(gzip.compress(json.dumps({"text": LONG}).encode()))
    assert done(*argv)["steps"] == 1 and list((home / "tokens").glob(".*.tmp")) == []
    monkeypatch.setenv("REFRAG_HOME", str(write("file", "precious")))
    assert "Not a directory" in refused(2, *line("cpt_recon", tmp_path / "new"))


@pytest.mark.parametrize(("errors", "passages", "counted"), [("skip", 2, "skipped"), ("replace", 3, "replaced")])
def test_what_was_wrong_with_the_input_is_counted(done, line, write, tmp_path, errors, passages, counted):
    corpus = write("c.txt", b"good\nb\xffd\nfine\n")
    result = done(*line("index", tmp_path / "out", "--corpus", corpus, "--errors", errors))
    assert (result["passages"], result[counted]) == (passages, 1)


OPTIONS = [  # command, options, message; the exit code is 2
    ("index", "--corpus nowhere.txt", "--corpus nowhere.txt: no such file or folder"),
    *((how, "--corpus nowhere.txt", "--corpus nowhere.txt: no such file or folder") for how in ("add", "sync")),
    *((how, "--index_dir TMP", "no index in this folder") for how in ("add", "delete")),
    ("search", "--question=", "question is empty"), ("search", "", "name one of --question and --questions"),
    ("search", "--question q --index_dir nowhere", "no such folder"),
    ("search", "--question q --index_dir TMP", "no index in this folder"),
    ("doctor", "--index_dir nowhere", "no such folder"), ("doctor", "--index_dir TMP", "no index in this folder"),
    ("doctor", "--load_dir nowhere", "--load_dir nowhere: no checkpoint in this folder"),
    ("align", "", "--text is missing"), ("align", "--text=", "--text is missing"),
    ("align", "--text a --load_dir nowhere", "--load_dir nowhere: "),
    *((phase, "--out_dir=", "--out_dir") for phase in ("cpt_recon", "sft", "eval")),
    ("cpt_recon", "--k 64 --seq_tokens 64", "every text is shorter than 64 tokens, which --k 64 needs"),
    ("cpt_next", "--seq_tokens 4", "--seq_tokens 4 leaves nothing beyond one chunk"),
    ("cpt_align", "--seq_tokens 4", "--seq_tokens 4 leaves nothing beyond one chunk"),
    ("train", "--text_tokens 6 --k 4,8", "--text_tokens 6 leaves nothing beyond one chunk of --k 8: give 8 or more"),
    ("cpt_recon", "--lr 1e39", "--lr must be more than 0"),
    ("cpt_recon", "--lora_r 4", "--lora_r needs the decoder in --train, got pe"),
    ("cpt_next", "--lora_r 4 --train p", "--lora_r needs the decoder in --train, got p"),
    *(("cpt_recon", f"--enc decoder:{n}", f"--enc decoder:{n}: the decoder has 3 layers") for n in (0, 4)),
    *(("cpt_recon", f"--enc {enc}", f"--enc {enc}: write decoder:N") for enc in ("decoder:x", "decoder:-1", "decoder")),
    ("cpt_recon", "--pooling cls", "--pooling cls needs a separate encoder"),
    *((command, f"{flag} {path}", f"{flag} {path}: no such file")
      for path in ("nowhere.jsonl", "/") for command, flag in (
          ("cpt_recon", "--train_json"), ("cpt_recon", "--eval_json"), ("sft", "--rag_json"), ("sft", "--eval_json"))),
    ("sft", "--index_dir nowhere", "--index_dir"), ("sft", "--index_dir TMP", "no index in this folder"),
    ("train_gate", "--p 0", "--p must"), ("train_gate", "--k 6", "chunks of 4 tokens do not make chunks of 6"),
    ("train_gate", "--rag_json nowhere.jsonl", "no such file"),
    ("eval", "--task retrieval --modes bm25 --retriever bm25", "use --modes"),
    ("eval", "--task retrieval --modes dense --index_dir WORDS", "dense: the index at --index_dir holds only bm25"),
    ("eval", "--qa nowhere.jsonl", "no such file"),
    ("eval", "--modes cosine_gate --retriever bm25", "cosine_gate needs an embedder"),
    ("eval", "--index_dir nowhere", "no such folder"),
    ("bench", "--contexts 512,0", "--contexts must be 1 or more"), ("bench", "--question= ", "the question is empty"),
    ("bench", "--index_dir nowhere", "--index_dir nowhere: no such folder"),
    ("generate", "--index_dir nowhere", "--index_dir nowhere: no such folder")]
LATE = ("--k 64 --seq_tokens 64", "--seq_tokens 4", "--text_tokens 6", "--enc", "--pooling", "--k 6", "--modes cos")


@pytest.fixture
def command(line, index_dir, files, llama, bert, tmp_path):
    """A command line that is good by itself: of a writer into tmp_path / "out", or of a reader."""
    readers = {"search": ["--index_dir", index_dir], "doctor": [], "align": ["--dec", llama, "--enc", bert]}

    def call(name: str, *more: object) -> list[object]:
        if name in readers:
            return [name, *readers[name], *more]
        return line(name, tmp_path / "out", *more)

    return call


@pytest.mark.parametrize(("name", "options", "told"), OPTIONS, ids=[f"{name} {o}" for name, o, _ in OPTIONS])
def test_a_bad_option_is_refused_before_anything_is_made(refused, command, finished, tmp_path, name, options, told):
    """And, unless it takes the models to see it, before they are looked for."""
    words = [word for word in re.split(" (?=[-\\w/.])", options) if word]
    words = [tmp_path if word == "TMP" else finished.old("words") if word == "WORDS" else word for word in words]
    nowhere = ["--dec", NOWHERE] if name not in ("search", "doctor") and not options.startswith(LATE) else []
    assert told in refused(2, *command(name, *nowhere, *words))
    assert not (tmp_path / "out").exists()


def without(argv: list[object], flag: str) -> list[object]:
    at = argv.index(flag)
    return [*argv[:at], *argv[at + 2 :]]


NEEDED = [*((name, "--out_dir") for name in ("cpt_align", "cpt_recon", "cpt_next", "sft", "train_gate", "export")),
          *((name, "--train_json") for name in ("cpt_align", "cpt_recon", "cpt_next")), ("sft", "--rag_json"),
          *((name, "--index_dir") for name in ("sft", "eval", "bench", "generate", "search")), ("eval", "--qa")]


@pytest.mark.parametrize(("name", "flag"), NEEDED)
def test_what_must_be_named_is_asked_for(refused, command, tmp_path, name, flag):
    argv = without(command(name, *(["--question", "q"] if name == "search" else [])), flag)
    assert f"{flag} is missing" in refused(2, *argv) and not (tmp_path / "out").exists()


FOREIGN = {"index": ["thesis.tex", "gen-1.txt", "my-gen-1", "manifest.json.bak"], "eval": ["thesis.tex"],
           "cpt_recon": ["thesis.tex", "step-last", "my-run.json", "model.safetensors"], "train_gate": ["x"],
           "export": ["x"]}


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, foreign in FOREIGN.items() for file in foreign])
def test_a_foreign_folder_is_refused(refused, command, write, tmp_path, name, file):
    write(f"out/{file}", "precious")
    told = f"holds other files ({file})" if name not in ("train_gate", "export") else "there already"
    for argv in (command(name), [word for word in command(name, "--dec", NOWHERE) if word != "--resume"]):
        with unchanged(tmp_path / "out"):
            message = refused(2, *argv)
            assert told in message or (told == "there already" and "new folder" in message)
        assert [p.name for p in (tmp_path / "out").iterdir()] == [file]
    shutil.rmtree(tmp_path / "out")
    write("out", "precious")
    assert str(tmp_path / "out") in refused(2, *command(name, "--dec", NOWHERE))
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("name", ["index", "cpt_recon"])
def test_an_empty_folder_and_what_systems_leave_in_one_are_accepted(done, command, line, tmp_path, name):
    """A file manager's .DS_Store in an index is no reason to refuse an addition, and stays."""
    (tmp_path / "out").mkdir()
    done(*command(name))
    if name == "index":
        for left in (".DS_Store", "Thumbs.db", "desktop.ini"):
            (tmp_path / "out" / left).write_text("a system's")
        done(*line("same", tmp_path / "out"))
        assert (tmp_path / "out" / ".DS_Store").read_text() == "a system's"


@pytest.mark.parametrize("name", ["index", "cpt_recon", "eval"])
def test_a_read_only_folder_is_refused_before_any_work(run, refused, finished, mount, line, tmp_path, name):
    """It can still be read: that takes no lock."""
    made = finished.old("words") if name == "index" else finished(WRITERS[name]).folder
    locked = mount("-o", "bind,ro", shutil.copytree(made, tmp_path / "made"))
    with unchanged(locked):
        for folder in (locked, locked / "new"):
            assert "Read-only file system" in refused(2, *line(name, folder, "--dec", NOWHERE))
        if name == "index":
            assert run("search", "--index_dir", locked, "--question", "q", "--quiet")[0] == 0
        if name == "cpt_recon":
            assert run(*line(name, tmp_path / "next", "--steps", 1, "--load_dir", locked))[0] == 0


@pytest.mark.parametrize(("name", "options"), [
    ("cpt_recon", "--dec"), ("cpt_recon", "--enc"), ("align", "--dec"), ("eval", "--dec"), ("bench", "--dec"),
    ("generate", "--dec"), ("index", "--dec"), ("vectors", "--embed_model")])
def test_models_that_are_not_there(refused, command, tmp_path, name, options):
    more = ["--text", "a"] if name == "align" else []
    assert f"model folder {NOWHERE} is not there" in refused(3, *command(name, *more, options, NOWHERE))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("[!.]*"))


def test_a_hub_that_nobody_reaches_is_told_at_once(refused, command, monkeypatch):
    """Its library would try every file again and again, and say so each time."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.utils._http, "time", None)  # by which it would wait between two tries
    for name, flag in (("generate", "--dec"), ("vectors", "--embed_model")):
        assert "model no/such could not be loaded" in refused(3, *command(name, flag, "no/such"))


@pytest.mark.parametrize("library", ["accelerate", "peft"])
def test_a_library_that_is_missing(refused, command, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    message = refused(3, *command("cpt_recon", "--train", "d", "--lora_r", 2))
    assert re.search(rf"library missing: .*{library}.*pip install", message) and not (tmp_path / "out").exists()


def test_a_decoder_with_too_few_positions_or_without_an_end_token(refused, command, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('embeddings": 2048', 'embeddings": 32'))
    argv = command("cpt_recon", "--dec", folder, "--curriculum", "none", "--seq_tokens", 64)
    assert "the decoder's window is 32: lower --seq_tokens" in refused(2, *argv)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    assert "the decoder's tokenizer has no end token" in refused(2, *command("sft", "--dec", folder))


def test_an_index_of_other_models_does_not_fit(refused, command, line, other_embedder, index_dir, tmp_path):
    index = shutil.copytree(index_dir, tmp_path / "index")
    again = "use the same --embed_model or build the index again"
    with unchanged(index):
        for argv in (command("search", "--question", "q", "--index_dir", index), command("sft", "--index_dir", index),
                     line("vectors", index, "--add")):
            assert again in refused(5, *argv, "--embed_model", other_embedder)
        for name in ("generate", "bench"):
            assert "another encoder" in refused(5, *command(name, "--enc", "decoder:1"))


@pytest.mark.parametrize(("flag", "value"), [
    ("--dec", "/another/decoder"), ("--dec", "SmolLM2-135M-Instruct"), ("--enc", "decoder:1"), ("--enc", "decoder:8"),
    ("--enc", "all-MiniLM-L6-v2"), ("--pooling", "cls"), ("--projector", "mlp")])
def test_a_checkpoint_of_other_models_does_not_fit(refused, command, finished, flag, value):
    folder = finished.old("checkpoint")
    with unchanged(folder):
        argv = without(without(command("cpt_recon", "--load_dir", folder), "--dec"), "--enc")
        message = refused(5, *argv, flag, value)
    assert re.search(rf"--load_dir \S+ was made with {flag} \S+, not {value}:", message)


def test_what_is_no_checkpoint(refused, command, finished, llama, write, tmp_path):
    (tmp_path / "empty").mkdir()
    write("begun/run.json", "{}")
    folder = finished.old("checkpoint")
    for path, told in ((tmp_path / "nothing", "no checkpoint in this folder"), (llama, "no checkpoint in this folder"),
                       (tmp_path / "empty", "no checkpoint in this folder"), (write("file", "precious"), "is a file"),
                       (tmp_path / "begun", "no checkpoint in this folder"), (folder / "config.json", "is a file"),
                       (folder / "projector.safetensors", "a pickle can run code")):
        argv = command("cpt_recon", "--load_dir", path)
        assert f"--load_dir {path}" in (message := refused(2, *argv)) and told in message


@pytest.mark.parametrize("phase", ["cpt_align", "cpt_recon", "cpt_next", "sft"])
def test_a_loss_that_is_no_number_names_the_step_and_the_texts(refused, command, llama, files, tmp_path, phase):
    ill = shutil.copytree(llama, tmp_path / "ill")
    tensors = safetensors.torch.load_file(ill / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = torch.nan
    safetensors.torch.save_file(tensors, ill / "model.safetensors", metadata={"format": "pt"})
    place = r"question q\d" if phase == "sft" else rf"{re.escape(str(files / 'texts.jsonl'))}:[1-6]"
    argv = command(phase, "--dec", ill)
    assert "step 0: the held-out loss is nan" in refused(2, *argv)
    message = refused(2, *without(argv, "--eval_json"))
    assert re.search(rf"step 1: the loss is nan on {place}(, {place})*( and \d+ more)?: lower", message)
    assert list((tmp_path / "out").glob("*step-*")) == []


def test_a_learning_rate_beyond_all_measure(run, refused, command, files, tmp_path):
    """The checkpoint before it stays, and can be read; one that holds values that are no numbers is not written."""
    argv = without(command("cpt_recon", "--lr", "1e30", "--train", "ped", "--save_every", 1), "--eval_json")
    place = rf"{re.escape(str(files / 'texts.jsonl'))}:[1-6]"
    assert re.search(rf"step 2: the (loss|gradient) is (nan|inf) on {place}(, |: )", refused(2, *argv))
    assert [p.name for p in (tmp_path / "out").glob("*step-*")] == ["step-000001"]
    code, _, err = run("generate", "--prompt", "<doc id='1'>a</doc>b", "--load_dir", tmp_path / "out", "--max_new", 1)
    assert code == 0 or "not finite" in err, err  # it can be read, whatever it is worth
    message = refused(2, *without(command("cpt_recon", "--weight_decay", "1e38", "--lr", "1e30", "--out_dir",
                                          tmp_path / "none", "--steps", 1), "--eval_json"))
    assert re.search(r"step 1: .* contains NaN or infinity, so this checkpoint is not written", message)
    assert list((tmp_path / "none").glob("*step-*")) == []


@pytest.mark.parametrize("text", ["\U0001f642" * 12, " \n\t" * 20], ids=["one token", "blanks"])
def test_texts_without_an_anchor_inside(refused, done, command, write, bert, text):
    """To the encoder each is one token, or none: there is nothing to align within. Among others they are left out."""
    odd = write("odd.jsonl", [{"text": text}] * 3)
    argv = without(command("cpt_align", "--train_json", odd, "--enc", bert), "--eval_json")
    assert re.search(rf"{odd}:[1-3] and the other texts leave nothing to predict", refused(2, *argv))
    mixed = write("mixed.jsonl", [{"text": text}] * 9 + [{"text": LONG}])
    assert done(*argv, "--train_json", mixed, "--batch_size", 1)["steps"] == 5


SPECIAL = "end<|im_end|>of [SEP] a [MASK] line <|endoftext|>"


@pytest.mark.parametrize("text", [" ", "\n \t\n", "a\0b", "\u0301", "\U0001f642" * 3, "\u200b", "\ufeffx", "x" * 3000,
                                  SPECIAL])
def test_align_shows_all_of_any_text(run, done, command, text):
    """Special tokens in it are text, as they are in training."""
    result = done(*command("align", "--text", text))
    pieces = [piece for span in result["spans"] for piece in span["decoder"]]
    odd = [a for a, b in zip("".join(pieces), text, strict=True) if a != b and b not in "<["]
    assert odd == [] and not {"<|im_end|>", "<|endoftext|>"} & set(pieces)
    assert run(*command("align", "--text", text))[0] == 0
    assert text.strip() or (result["encoder_tokens"], result["anchors"]) == (0, 0)


@pytest.mark.parametrize("wrong", [{}, {"positive_ids": None}, {"positive_ids": []}, {"positive_ids": ["c#1"]}],
                         ids=str)
def test_questions_may_name_no_passage_or_a_piece_of_one(done, command, line, write, tmp_path, wrong):
    index = tmp_path / "pieces"
    done(*line("words", index, "--max_passage_tokens", 16, "--overlap", 0))
    questions = write("q.jsonl", [{key: q[key] for key in ("question", "answers")} | wrong for q in ASKED])
    assert done(*command("sft", "--rag_json", questions, "--eval_json", questions, "--index_dir", index,
                         "--steps", 1))["steps"] == 1


def test_no_passage_is_empty(done, line, write, tmp_path):
    """The decoder's tokenizer, which splits for BM25, spells white space in tokens of its own."""
    corpus = write("c.jsonl", [{"id": "a", "text": "start" + "\n \t" * 60 + "end of it"}])
    done(*line("index", tmp_path / "out", "--corpus", corpus, "--max_passage_tokens", 8, "--overlap", 0))
    assert all(passage.text for passage in passages_of(tmp_path / "out"))
