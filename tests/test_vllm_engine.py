"""refrag_extras/vllm_engine.py, against a small server that speaks vLLM's protocol and decodes by plain forwards."""

import base64
import contextlib
import dataclasses
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers
from conftest import build, trained
from writers import lasting

import refrag
from refrag_extras import generate, serve, vllm_engine, weights

QUESTIONS = ["Where do smiths cast bells?", "Which river leaves Lake Geneva?", "When did the first modern games open?"]
TAKEN = {"model", "prompt_embeds", "max_tokens", "stream", "stop_token_ids", "return_token_ids", "temperature", "top_p",
         "seed", "top_k", "min_p", "repetition_penalty", "logprobs", "return_tokens_as_token_ids", "allowed_token_ids"}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def send(self, status, value):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def do_GET(self):
        self.send(200, {"data": [{"id": "served", "max_model_len": self.server.window}]} | self.server.listed)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions" and body["model"] == "served" and body["return_token_ids"]
        assert not body.keys() - TAKEN, "a field that vLLM does not know, or that the tests have not seen"
        prompts = body["prompt_embeds"] if isinstance(body["prompt_embeds"], list) else [body["prompt_embeds"]]
        prompts = [torch.load(io.BytesIO(base64.b64decode(one)), weights_only=True) for one in prompts]
        if refusal := self.server.refusal(prompts):
            return self.send(400, {"error": {"message": refusal}})
        self.server.asked.append(body)
        if body.get("stream"):
            return self.stream(prompts[0], body)
        self.send(200, {"choices": [self.server.next(i, one, body) for i, one in enumerate(prompts)]})

    def stream(self, inputs, body):
        self.send_response(200)
        self.end_headers()
        try:
            for event in self.server.events(inputs, body):
                self.wfile.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
        except OSError:
            self.server.cancelled.set()


class StandIn(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.decoder = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.asked, self.said, self.cancelled, self.lock = [], [], threading.Event(), threading.Lock()
        self.enabled, self.window, self.pause, self.breaks, self.barrier = True, 2048, 0, None, None
        self.listed = {}
        self.engine = f"vllm+http://127.0.0.1:{self.server_address[1]}"

    def refusal(self, prompts):
        if not self.enabled:
            return "You must set `--enable-prompt-embeds` to input `prompt_embeds`."
        width = self.decoder.config.hidden_size
        if any(one.shape[1] != width for one in prompts):
            return f"`prompt_embeds` hidden_size {prompts[0].shape[1]} does not match the model's {width}."

    @torch.inference_mode()
    def logits(self, inputs):
        with self.lock:
            return self.decoder(inputs_embeds=inputs[None], use_cache=False).logits[0, -1]

    def next(self, index, inputs, body):
        assert body["max_tokens"] == 1 and body["temperature"] == 0
        logprobs = self.logits(inputs).log_softmax(-1)
        allowed = body.get("allowed_token_ids", range(len(logprobs)))
        choice = {"index": index, "token_ids": [max(allowed, key=lambda token: float(logprobs[token]))]}
        if "logprobs" in body:
            top = logprobs.topk(body["logprobs"])
            named = {f"token_id:{i}": v for v, i in zip(*(part.tolist() for part in top), strict=True)}
            choice["logprobs"] = {"top_logprobs": [named]}
        return choice

    def events(self, inputs, body):
        """Two tokens an event, as vLLM may send them; the token that ends the answer is among them."""
        new, told, table = [], 0, self.decoder.get_input_embeddings().weight.detach()
        if self.barrier is not None:
            self.barrier.wait(20)
        while told < len(new) or len(new) < body["max_tokens"]:
            time.sleep(self.pause)
            new.append(int(self.logits(torch.cat([inputs, table[new]])).argmax()))
            stopped = new[-1] in body["stop_token_ids"]
            reason = "stop" if stopped else "length" if len(new) == body["max_tokens"] else None
            if self.breaks is not None and len(new) > 2:
                yield from self.breaks
                return
            if reason:
                self.said.append(new)
            if reason or len(new) % 2 == 0:
                yield {"choices": [{"index": 0, "text": "", "token_ids": new[told:], "finish_reason": reason}]}
                told = len(new)
            if reason:
                yield "[DONE]"
                return


@pytest.fixture(scope="module")
def tiny(tiny):
    return [*tiny, "--topk", "3"]


@pytest.fixture
def serving():
    """Start a server for a decoder's folder."""
    with contextlib.ExitStack() as held:

        def call(folder):
            server = StandIn(folder)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            held.callback(server.server_close)
            held.callback(server.shutdown)
            return server

        yield call


@pytest.fixture
def exported(home, done, tmp_path):
    """Export the decoder of a command line; its folder."""
    return lambda argv: Path(done("export", *argv, "--question", QUESTIONS[0], "--out_dir", tmp_path / "out",
                                  "--decoder")["out_dir"]) / "decoder"


@pytest.fixture
def served(exported, serving, tiny):
    return serving(exported(tiny))


@pytest.fixture
def asked(write):
    rows = [{"question": text, "answers": ["valley"], "positive_ids": ["b"]} for text in QUESTIONS]
    return write("questions.jsonl", rows)


def same(result):
    """What must not depend on who decodes."""
    facts = result["metrics"]
    return ([result[name] for name in ("question", "answer", "citations", "chunks", "passages", "ended")],
            [facts[name] for name in ("new_tokens", "positions", "full_positions", "p_realised")],
            {name: value for name, value in result["settings"].items() if name != "engine"})


@pytest.mark.parametrize("mode", ["refrag", "full", "none", "truncate"])
def test_answers_and_citations_are_those_of_the_decoder_here(served, tiny, asked, done, mode):
    argv = ["generate", *tiny, "--questions", asked, "--mode", mode, "--max_new", "12"]
    here = done(*argv, "--engine", "model")["results"]
    there = done(*argv, "--engine", served.engine, "--batch_size", "3")["results"]
    assert list(map(same, there)) == list(map(same, here))
    assert {one["settings"]["engine"] for one in there} == {"vllm"}
    assert any(c["chosen"] for one in here for c in one["citations"]) == (mode != "none")
    assert any("allowed_token_ids" in body for body in served.asked) == (mode != "none")


@pytest.mark.parametrize("how", [{"letters": "pd"}, {"lora": {"r": 2}}], ids=["whole", "adapters"])
def test_a_trained_decoder_is_the_one_that_is_exported(exported, serving, tiny, llama, done, refused, how, tmp_path):
    """Its token embeddings come from the checkpoint, the encoder's do not; the one before training is found out."""
    trained("decoder:2", llama, **how).save_pretrained(tmp_path / "trained")
    argv = [*tiny, "--load_dir", tmp_path / "trained"]
    engine, ask = serving(exported(argv)).engine, ["generate", *argv, "--question", QUESTIONS[1]]
    assert same(done(*ask, "--engine", engine)) == same(done(*ask, "--engine", "model"))
    assert "another decoder" in refused(5, *ask, "--engine", serving(llama).engine, "--quiet")


def pipeline_of(server, tiny):
    _, configs = refrag.parse(["chat", *map(str, tiny), "--engine", server.engine])
    return generate.answering(None, *configs)


def test_of_the_decoder_only_the_embeddings_are_here(served, tiny):
    pipeline = pipeline_of(served, tiny)
    assert [name for name, _ in pipeline.model.decoder.named_parameters()] == ["table.weight"]
    assert len(pipeline.model.encoder.backbone.layers) == 2
    with pytest.raises(refrag.UserError, match="--gate ppl"):
        pipeline.answer(QUESTIONS[0], gate="ppl")
    with pytest.raises(refrag.UserError, match="--enc decoder:99: the decoder has"):
        pipeline_of(served, [*tiny, "--enc", "decoder:99"])
    served.window = 64
    with pytest.raises(refrag.TooLongError, match="window is 64"):
        pipeline_of(served, tiny).answer(QUESTIONS[0])


def test_the_first_layers_alone_make_the_same_encoder_and_the_same_inputs(any_decoder):
    """Whatever the decoder's architecture: indexes are read by the encoder's fingerprint."""
    device, config = torch.device("cpu"), refrag.RefragConfig(encoder_name_or_path="decoder:2",
                                                              decoder_name_or_path=str(any_decoder))
    first = weights.load_first_layers(config, device, torch.float32)
    alone, whole = refrag.build_model(config, device, torch.float32, decoder=first), build("decoder:2", any_decoder)
    assert alone.encoder.fingerprint == whole.encoder.fingerprint and alone.window == whole.window
    inputs = [model.decoder.get_input_embeddings()(torch.arange(9)) for model in (alone, whole)]
    assert torch.equal(*inputs) and len(list(first.parameters())) < len(list(whole.decoder.parameters()))


def test_a_stop_or_a_client_that_goes_ends_the_work_there(served, tiny, done):
    """The server writes to a closed connection long before its last token."""
    ask = ["generate", *tiny, "--question", QUESTIONS[0], "--max_new", "300"]
    stop = done(*ask, "--engine", "model", "--max_new", "8", "--no_cite")["answer"][3:6]
    here = done(*ask, "--engine", "model", "--stop", stop)
    served.pause = 0.01
    assert same(done(*ask, "--engine", served.engine, "--stop", stop)) == same(here) and here["ended"]
    assert served.cancelled.wait(5)


def test_the_token_that_ends_an_answer_is_none_of_it(served, tiny, done, monkeypatch):
    ask = ["generate", *tiny, "--question", QUESTIONS[0], "--engine"]
    done(*ask, served.engine)
    tokens = served.said[-1]
    at = max(i for i, token in enumerate(tokens) if token not in tokens[:i])
    monkeypatch.setattr(refrag, "stop_tokens", lambda *_: frozenset(tokens[at : at + 1]))
    here = done(*ask, "model")
    assert same(done(*ask, served.engine)) == same(here) and here["ended"] and here["metrics"]["new_tokens"] == at > 0


def test_sampling_is_the_servers_with_our_settings(served, tiny, done):
    done("generate", *tiny, "--question", QUESTIONS[0], "--engine", served.engine, "--temperature", "0.7", "--top_p",
         "0.9", "--seed", "5", "--no_cite")
    body, stops = served.asked[-1], refrag.stop_tokens(served.decoder, None)
    assert {name: body[name] for name in ("temperature", "top_p", "seed", "top_k", "min_p", "repetition_penalty")} == {
        "temperature": 0.7, "top_p": 0.9, "seed": 5, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
    assert stops <= {*body["stop_token_ids"]} and body["max_tokens"] == 6


@pytest.mark.parametrize(("code", "says", "fault"), [
    (2, "--enable-prompt-embeds", {"enabled": False}), (5, "another decoder", {"other": {}}),
    (5, "hidden_size", {"other": {"hidden_size": 48}}), (3, "broke off", {"breaks": []}),
    (3, "out of memory", {"breaks": [{"error": {"message": "out of memory"}}]}), (3, "no vLLM server", {"gone": True}),
    (3, "export --decoder", {"unknown": True}), (3, "no vLLM server: name", {"listed": {"data": [{"id": "refrag"}]}})])
def test_what_is_wrong_with_a_server(served, serving, tiny, refused, llama, tmp_path, home, code, says, fault):
    """One line each, before the first answer."""
    if "other" in fault:
        config = dataclasses.replace(transformers.AutoConfig.from_pretrained(llama), **fault["other"])
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
        served = serving(tmp_path / "other")
    if "gone" in fault:
        served.shutdown()
        served.server_close()
    if "unknown" in fault:
        [path] = (home / "decoders").iterdir()
        path.unlink()
    vars(served).update({name: fault[name] for name in ("enabled", "breaks", "listed") if name in fault})
    ask = ["generate", *tiny, "--question", QUESTIONS[0], "--engine", served.engine, "--quiet"]
    assert says in refused(code, *ask)


@pytest.mark.parametrize(("argv", "says"), [
    (["generate", "--question", "a", "--gate", "ppl"], "--gate ppl"), (["chat", "--heuristic"], "--heuristic"),
    (["bench"], "bench"), (["export", "--question", "a", "--out_dir", "new"], "export"),
    (["eval", "--task", "ppl", "--texts"], "--task ppl"), (["chat", "--engine", "vllm"], "vllm+http")])
def test_what_cannot_work_is_refused_before_anything_is_loaded(refused, index_dir, corpus, argv, says, monkeypatch):
    monkeypatch.setattr(vllm_engine, "Server", None)
    monkeypatch.setattr(refrag, "load_model", None)
    more = [corpus] if argv[0] == "eval" else []
    engine = [] if "--engine" in argv else ["--engine", "vllm+http://127.0.0.1:9"]
    assert says in refused(2, *argv, *more, *engine, "--index_dir", index_dir)


def test_clients_of_our_server_are_answered_together(served, tiny):
    """The server holds each answer until it has eight to write."""
    pipeline, told = pipeline_of(served, tiny), {}
    alone = {text: pipeline.answer(text, stop=("zzz",))["answer"] for text in QUESTIONS}
    engine, served.barrier = serve.Engine(pipeline, refrag.ServeConfig()), threading.Barrier(8)
    for number in range(8):
        asked = serve.ChatRequest(QUESTIONS[number % 3], pipeline.settings)
        engine.submit(serve.Job(asked, 30, lambda *said, at=number: told.setdefault(at, []).append(said)))
    engine.thread.shutdown()
    for number in range(8):
        *texts, (kind, result) = told[number]
        assert kind == "done", result
        assert result["answer"] == alone[QUESTIONS[number % 3]] == "".join(text for _, text in texts).strip()
    assert engine.counts["answers_total"] == 8


def test_eval_measures_the_same(served, index_dir, llama, asked, done):
    argv = ["eval", "--qa", asked, "--p", "0.25", "--max_new", "6", "--batch_size", "3", "--index_dir", index_dir,
            "--threads", "1", "--dec", llama, "--enc", "decoder:2"]
    here, there = (lasting(done(*argv, "--engine", engine)["results"]) for engine in ("model", served.engine))
    assert there == here and {"full", "refrag", "wrong_vectors"} <= here.keys()
