"""Tiny random models and tokenizers, made here, so that the tests need no network and no installed model."""

import functools
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach out
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other

import hypothesis
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from writers import ROOT, STARTS, files, finished, forks, line, mount, write_rows  # noqa: F401 (fixtures)

sys.path.insert(0, str(ROOT))

import refrag
from refrag_extras import cpu_engine
from refrag_extras import index as writing
from refrag_extras.corpus import read_corpus

torch.set_num_threads(1)
CPU_HAS = refrag.cpu_has
refrag.cpu_has = lambda *_: False  # the same on every machine, as in the processes of writers.py
INT_MM = torch._int_mm

RUNTIME = refrag.RuntimeConfig(device="cpu", dtype="float32")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEXTS = ["The Rhone leaves Lake Geneva and crosses the old city under seven bridges. It floods in May.",
    "Copper and tin make bronze, which melts at 950 degrees. Smiths in the valley cast bells from it.",
    "Ada Lovelace wrote notes on the Analytical Engine; the notes hold an algorithm for Bernoulli numbers.",
    "El río Ebro nace en Cantabria y desemboca en el Mediterráneo. Its delta grows rice.",
    "长江是亚洲最长的河流。 The Yangtze rises in Qinghai and reaches the sea near Shanghai.",
    "In 1896 the first modern games opened in Athens before 60,000 people; 14 nations sent athletes."]
CORPUS = [{"id": "abcdef"[i], "title": f"Title {i}", "text": text} for i, text in enumerate(TEXTS)]
LONG = " ".join(f"river{i} word{i}." for i in range(60))
ODD = ["👨‍👩‍👧", "🏳️‍🌈", "🇫🇷🇪🇸", "🙂", "👍🏽", "e\u0301", "a\u0300\u0323", "\u0301",
       "长江", "日本語。", "한국", "ﷺ", "ﬁ", "\u200b", "\x00", "\x01\x02", "\x7f", "\ufffd", "\ufeff", "\u2028", " ",
       "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "▁", "Ġ", "\U0001d518", "\U0010ffff"]


def train_bpe(folder: Path, *, chat: bool = True) -> Path:
    """A byte-level BPE tokenizer like those of GPT-2 and Llama-3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS * 4, trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", chat_template=CHAT_TEMPLATE if chat else None).save_pretrained(folder)
    return folder


def train_wordpiece(folder: Path) -> Path:
    """An uncased WordPiece tokenizer like BERT's: it drops white space, case and accents."""
    normalizer = normalizers.BertNormalizer()
    text = normalizer.normalize_str(" ".join(TEXTS))
    characters, words = sorted(set(text) - {" "}), sorted({w for w in re.findall(r"[a-z]+", text) if len(w) > 1})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *("##" + c for c in characters), *words]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]").save_pretrained(folder)
    return folder


def train_sentencepiece(folder: Path) -> Path:
    """A SentencePiece-like tokenizer (unigram pieces, a mark for spaces, bytes for unknown characters)."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(TEXTS * 4, trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>",
                                         eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    return folder


SMALL = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 3, "max_position_embeddings": 2048,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
ATTENTION = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}
DECODERS = {"llama": lambda: transformers.LlamaConfig(**SMALL, **ATTENTION),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, **ATTENTION),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=600, n_embd=32, n_layer=3, n_head=4, n_positions=2048,
                                            bos_token_id=1, eos_token_id=2, pad_token_id=2),
    "mamba2": lambda: transformers.Mamba2Config(**{k: v for k, v in SMALL.items() if k != "max_position_embeddings"},
                                                **MAMBA, expand=2),
    "bamba": lambda: transformers.BambaConfig(**SMALL, **ATTENTION, attn_layer_indices=[1], mamba_n_heads=8,
                                              mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_expand=2,
                                              mamba_chunk_size=16)}


def save_decoder(kind: str, folder: Path, tokenizer: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(DECODERS[kind]())
    with torch.no_grad():  # the usual .02 makes all logits alike, so that any token could win
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def build(enc: object, dec: object, **options: object) -> refrag.RefragModel:
    """An untrained model of an encoder and a decoder folder, on the CPU in float32."""
    names = {"encoder_name_or_path": str(enc), "decoder_name_or_path": str(dec), "compression": 4}
    config = refrag.RefragConfig(**names | options)
    return refrag.build_model(config, torch.device("cpu"), torch.float32)


def disturb(module: torch.nn.Module, named: str = "") -> None:
    """Move the parameters with this in their names, all by default, by a little."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if named in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def trained(enc: object, dec: object, letters: str = "p", **options: object) -> refrag.RefragModel:
    """A model of which the projector, these parts, and with `lora` the decoder's adapters are not at their start."""
    model = build(enc, dec, training_model=letters, **options)
    for letter, part in {"p": model.projector, "e": model.encoder, "d": model.decoder}.items():
        if letter in letters + "p":
            disturb(part)
    if model.config.lora:
        refrag.add_lora(model.decoder, model.config.lora["r"])
        disturb(model.decoder, ".lora_")
    return model


def pytest_collection_modifyitems(items: list) -> None:
    """The longest tests first, so that of two processes none ends long before the other."""
    items.sort(key=lambda item: item.path.name not in ("test_readme.py", "test_docs.py"))


def pytest_configure(config) -> None:
    """What a library is going to take away is not used anywhere. No example has a time limit of its own."""
    config.addinivalue_line("filterwarnings", "error::FutureWarning")
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def speaking(monkeypatch) -> None:
    monkeypatch.setattr(refrag, "QUIET", False)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("tokenizers")
    return {"bpe": train_bpe(home / "bpe"), "wordpiece": train_wordpiece(home / "wordpiece"),
            "sentencepiece": train_sentencepiece(home / "sentencepiece"),
            "plain_bpe": train_bpe(home / "plain", chat=False)}


@pytest.fixture(scope="session", params=list(DECODERS))
def any_decoder(request, tmp_path_factory, tokenizers) -> Path:
    source = tokenizers["plain_bpe" if request.param == "gpt2" else "bpe"]
    return save_decoder(request.param, tmp_path_factory.mktemp(request.param), source)


@pytest.fixture(scope="session")
def llama(tmp_path_factory, tokenizers) -> Path:
    return save_decoder("llama", tmp_path_factory.mktemp("tiny-llama"), tokenizers["bpe"])


@pytest.fixture(scope="session")
def bert(tmp_path_factory, tokenizers) -> Path:
    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=400, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=48, max_position_embeddings=128)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizers["wordpiece"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def whole(llama) -> refrag.ChunkEncoder:
    """The first two layers of the tiny Llama, which read a content whole."""
    return build("decoder:2", llama).encoder


def save_embedder(folder: Path, backbone: Path, seed: int) -> Path:
    """A sentence-transformers folder: the backbone with mean pooling and normalisation."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(backbone), max_seq_length=64)
    torch.manual_seed(seed)
    for parameter in transformer.parameters():
        if parameter.ndim == 2:  # the norms stay as they are: noise in them would drown the texts' differences
            torch.nn.init.normal_(parameter)
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="session")
def embedder(tmp_path_factory, bert) -> Path:
    return save_embedder(tmp_path_factory.mktemp("tiny-embedder") / "model", bert, seed=1)


@pytest.fixture(scope="session")
def other_embedder(tmp_path_factory, bert) -> Path:
    return save_embedder(tmp_path_factory.mktemp("other-embedder") / "model", bert, seed=2)


SHARED: dict[object, object] = {}  # see `shared`


@pytest.fixture
def integers(monkeypatch):
    """A CPU that multiplies integers: by floats, which hold the sums exactly. Without VNNI the kernel is wrong."""
    monkeypatch.setattr(cpu_engine, "multiplies_integers", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", lambda x, y: (x.float() @ y.float()).int())


@pytest.fixture
def shared(monkeypatch) -> None:
    """Commands that only read the bundled models load them once for all tests. The phases have a ModelConfig."""

    def once(load, what, how, *more, **named):
        place = (what, getattr(how, "device", how), getattr(how, "dtype", None))
        if type(what) is refrag.ModelConfig or named:
            return load(what, how, *more, **named)
        return SHARED[place] if place in SHARED else SHARED.setdefault(place, load(what, how, *more))

    for owner, name in ((refrag, "load_embedder"), (refrag, "load_model"), (cpu_engine, "make_stepper")):
        monkeypatch.setattr(owner, name, functools.partial(once, getattr(owner, name)))


@pytest.fixture
def run(capsys):
    """Run a command line inside this process: run("search", "--topk", "3") -> (exit code, stdout, stderr)."""

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what fixtures printed is not this command's
        try:
            code = refrag.main([str(a) for a in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def program():
    """Run refrag.py as its own process: program("search", ...) -> CompletedProcess with text output."""
    return lambda *argv, start="python refrag.py", **options: subprocess.run(
        [sys.executable, *STARTS[start], *map(str, argv)], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", CORPUS)


@pytest.fixture(scope="session")
def index_dir(tmp_path_factory, change) -> Path:
    folder = tmp_path_factory.mktemp("index") / "index"
    change(folder, CORPUS, k=4)
    return folder


@pytest.fixture(scope="session")
def tiny(index_dir, llama) -> list[str]:
    """Options with which the tiny models answer over the small index."""
    return ["--index_dir", str(index_dir), "--dec", str(llama), "--enc", "decoder:2", "--max_new", "6", "--topk", "2",
            "--compressed", "feed", "--p", "0.25", "--floor", "0", "--threads", "1"]


def read_all(*paths: object, sources: dict[str, str] | None = None, **options: object) -> types.SimpleNamespace:
    """Read a whole corpus: records, their ids and texts, the counts skipped, replaced and ignored, and the sources.
    sources: those of earlier additions, with their labels."""
    counts, sources = {"skipped": 0, "replaced": 0}, dict(sources or {})
    records = list(read_corpus(refrag.CorpusConfig(tuple(map(str, paths)), **options), counts, sources))
    return types.SimpleNamespace(records=records, sources=sources, ids=[r.id for r in records],
                                 texts=[r.text for r in records], **counts)


def passages_of(folder):
    return list(refrag.open_index(str(folder)))


@pytest.fixture(name="build")
def build_index(tmp_path, write, done, embedder, llama):
    """Index rows or the file of a corpus, if any: build("name" or address, rows, *flags) -> what the command says."""

    def call(name, corpus, *flags):
        corpus = write("rows.jsonl", corpus) if isinstance(corpus, list) else corpus
        model = [] if {"--add", "--sync"} & {*flags} else ["--embed_model", embedder]
        corpus = [] if corpus is None else ["--corpus", corpus]
        index_dir = name if "+" in str(name) else tmp_path / name
        return done("index", *corpus, "--index_dir", index_dir, "--dec", llama, *model, *flags)

    return call


@pytest.fixture(scope="session")
def change(embedder, llama):
    """Build or change an index: change(folder, rows, retriever, sync=True, ..) -> counts and the index, opened."""

    def call(folder, rows, retriever=None, size=None, **options):
        path, build = write_rows(folder.with_suffix(".jsonl"), rows or ()), refrag.BuildConfig(**options)
        names = () if rows is None else (str(path),)
        corpus = refrag.CorpusConfig(names, max_passage_tokens=size, overlap=size and size // 4)
        index = refrag.IndexConfig(str(folder), retriever, None if build.changes else str(embedder))
        with writing.lock(str(folder)):
            models = refrag.ModelConfig(dec=str(llama), enc="decoder:2")
            counts = writing.load_build(corpus, index, build, models, RUNTIME).run(corpus)
        return counts, refrag.open_index(str(folder))

    return call


@pytest.fixture
def ask(done):
    """Search by the command line: ask(index, question, *flags) -> the JSON object."""
    return lambda index, question, *flags: done("search", "--index_dir", index, "--question", question, *flags)


# ---- Input, damage, refusals ----------------------------------------------------------------------------------------

@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("REFRAG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def write(tmp_path):
    """Write a file of bytes, text or JSON rows; returns its path."""

    def call(name: str, content: bytes | str | list[dict]) -> Path:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return call


@pytest.fixture
def refused(run):
    """Run a command that must fail: one line on stderr and the same as one JSON object on stdout; the message."""

    def call(code: int, *argv: object) -> str:
        got, out, err = run(*argv, "--json")
        message = err.removeprefix("error: ").rstrip("\n")
        assert err == f"error: {message}\n" and "\n" not in message, err
        assert (got, message) == (code, message), f"exit code {got}: {message}"
        assert out == json.dumps({"error": {"code": code, "message": message}}, ensure_ascii=False) + "\n"
        return message

    return call


@pytest.fixture
def done(run):
    """Run a command that must succeed and say nothing on stderr; its JSON."""

    def call(*argv: object) -> dict:
        code, out, err = run(*argv, "--quiet", "--json")
        assert (code, err) == (0, ""), err
        return json.loads(out)

    return call
