"""Decoding by a vLLM server (`--engine vllm+http://HOST:PORT`): retrieval, gate, vectors and packing stay here.

A mixed prompt has no token ids: it goes to /v1/completions as `prompt_embeds`, a tensor (P, D) as torch.save writes it,
in base64. Token ids come back (`return_token_ids`) and become text, stops and citations as with a decoder of our own.
Only the decoder's token embeddings are loaded here, and the layers that the encoder is cut from. To make sure that the
server has the same decoder, it continues a fixed prompt, whose log probabilities `export --decoder` has kept.
"""

from __future__ import annotations

import contextlib
import copy
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import refrag

TIMEOUT = 600  # seconds without a byte of an answer: its server may have many others to write
MODELS_TIMEOUT = 30  # of the list of models, which is asked for first: at a wrong address nobody may answer at all
PROBE = ("Answer from the documents. Where do smiths cast bells?\n<doc id=\"1\">Copper and tin make bronze, which "
         "melts at 950 degrees. Smiths in the valley cast bells from it.</doc>\nAnswer: In the valley [1]. In 1896 the "
         "first modern games opened in Athens before 60,000 people, and 14 nations sent athletes.")
POSITIONS, TOP = 12, 5  # where in PROBE the next token's log probabilities are compared, and of how many tokens
LOGPROBS = 20  # that are asked for at each, the most that vLLM gives unless it was started with more
TOLERANCE = 0.2  # nats, on the mean: see docs/RESULTS.md for what other precisions and other decoders differ by


class Embeddings(nn.Module):
    """What is here of a decoder that a server runs: its token embeddings and its configuration."""

    def __init__(self, table: nn.Module, config: Any, server: Server):
        super().__init__()
        self.table, self.config, self.dtype, self.server = table, config, table.weight.dtype, server

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise refrag.UserError(f"{self.server.name}: the decoder's weights are there, but what was asked for (--gate "
                               "ppl, or the like) needs them here: choose another, or leave --engine out")


def load_model(models: refrag.ModelConfig, pack: refrag.PackConfig,
               runtime: refrag.RuntimeConfig) -> refrag.RefragModel:
    """The model with `Embeddings` in its decoder's place. Raises as `refrag.load_model`, and MissingError."""
    refrag.require(pack.gate != "ppl" and not pack.heuristic, f"--gate ppl and --heuristic need the decoder's weights "
                   f"here: choose another gate, or leave --engine {runtime.engine} out")
    server, model = Server(runtime.engine), refrag.load_model(models, runtime, encoder_only=True)
    decoder, table = model.decoder, model.decoder.get_input_embeddings()
    if "d" in model.config.training_model:  # the encoder has a copy of its own of the embeddings before
        name = next(name for name, parameter in decoder.named_parameters() if parameter is table.weight)
        tensors = refrag.find_checkpoint(models).tensors("decoder")
        [trained] = [tensor for key, tensor in tensors.items() if key.endswith(name)]
        table.weight.data.copy_(trained)
    model.decoder = Embeddings(table, decoder.config, server)
    server.adopt(model)
    return model


def make_stepper(decoder: Embeddings, engine: str) -> Server:
    """The server, once it is known to have the same decoder. Raises MismatchError."""
    decoder.server.check()
    return decoder.server


def reference_path(model: refrag.RefragModel) -> Path:
    digest = refrag.weights_fingerprint(model.decoder.get_input_embeddings(), model.checkpoint)
    return refrag.cache_home() / "decoders" / f"{digest}.json"


@torch.inference_mode()
def write_reference(model: refrag.RefragModel) -> None:
    """Keep the decoder's log probabilities for PROBE, for `Server.check` here or on another machine."""
    path, ids = reference_path(model), model.encoder.tokenizer.decoder(PROBE)["input_ids"]
    lengths = [len(ids) * n // POSITIONS for n in range(1, POSITIONS + 1)]
    logits = model.decoder(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]  # (T, V)
    top = logits[[n - 1 for n in lengths]].float().log_softmax(-1).topk(TOP)  # (POSITIONS, TOP)
    path.parent.mkdir(parents=True, exist_ok=True)
    refrag.write_atomic(path, json.dumps({"ids": ids, "lengths": lengths, "tokens": top.indices.tolist(),
                                          "logprobs": top.values.tolist()}))


def difference(served: list[dict[str, float]], reference: dict[str, Any]) -> float:
    """Mean distance of log probabilities from those kept, in nats. served: the most probable ones, by "token_id:N", at
    each of POSITIONS."""
    pairs = [(top.get(f"token_id:{token}", min(top.values())), logprob)
             for top, *kept in zip(served, reference["tokens"], reference["logprobs"], strict=True)
             for token, logprob in zip(*kept, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def in_base64(inputs: Tensor) -> str:
    """A prompt (P, D) as vLLM takes it."""
    data = io.BytesIO()
    torch.save(inputs.detach().cpu().clone(), data)  # of a view, all that it looks at would be saved
    return b64encode(data.getvalue()).decode()


class Server:
    """A vLLM server in the place of a decoder. Raises MissingError when it is not there, UserError when it refuses."""

    engine = "vllm"

    def __init__(self, engine: str):
        self.name, self.url = f"--engine {engine}", engine.removeprefix("vllm+").rstrip("/")
        try:
            served = next(self.replies("/v1/models"))["data"][0]
            self.model, self.window = served["id"], served["max_model_len"]
        except (StopIteration, LookupError, TypeError):  # `refrag.py serve`, say, has the same port and another list
            raise refrag.MissingError(f"{self.name}: what answers there is no vLLM server: name another port") from None

    def adopt(self, model: refrag.RefragModel) -> None:
        """Take from a model what `write` and `check` need: tokenizer, embeddings, its log probabilities for PROBE."""
        self.tokenizer = copy.deepcopy(model.encoder.tokenizer.decoder)  # threads that write must not share it
        self.table, path = model.decoder.table, reference_path(model)
        try:
            self.reference = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise refrag.MissingError(f"{self.name}: nothing here tells its decoder from others: run refrag.py export "
                                      f"--decoder, or copy {path} from where it ran") from None

    def replies(self, path: str, **body: Any) -> Iterator[dict[str, Any]]:
        """The JSON object of a reply, or those of a stream. To close it is to close the connection, on which vLLM ends
        the work."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps({"model": self.model, **body}).encode() if body else None
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT if body else MODELS_TIMEOUT) as reply:
                for line in reply:
                    text = line.removeprefix(b"data: ")
                    if text.startswith(b"{"):  # else a blank line, or the end of a stream
                        event = json.loads(text)
                        if "error" in event:
                            raise http.client.HTTPException(refrag.one_line(event["error"]["message"]))
                        yield event
        except urllib.error.HTTPError as error:
            reason = refrag.one_line(error.read(4096).decode("utf-8", "replace"))
            kind = refrag.UserError if error.code < 500 else refrag.MissingError
            raise kind(f"{self.name}: HTTP {error.code}: {reason[:300]}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = refrag.one_line(getattr(error, "reason", error))
            raise refrag.MissingError(f"{self.name}: no vLLM server answers there ({reason[:200]}): start one by vllm "
                                      "serve DECODER --enable-prompt-embeds") from None

    def next_token(self, prompts: list[Tensor], **options: Any) -> list[dict[str, Any]]:
        """vLLM's choices for the next token of each prompt (P, D), the most probable one."""
        [reply] = self.replies("/v1/completions", prompt_embeds=list(map(in_base64, prompts)), max_tokens=1,
                               temperature=0, return_token_ids=True, **options)
        return sorted(reply["choices"], key=lambda choice: choice["index"])

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> Tensor:
        return self.table(torch.tensor(ids, dtype=torch.long, device=self.table.weight.device))  # (T, D)

    def check(self) -> None:
        """Raise MismatchError unless the server's log probabilities for PROBE are the decoder's."""
        inputs = self.embed(self.reference["ids"])
        try:
            choices = self.next_token([inputs[:n] for n in self.reference["lengths"]], logprobs=LOGPROBS,
                                      return_tokens_as_token_ids=True)
        except refrag.UserError as error:
            raise refrag.MismatchError(str(error)) if "hidden_size" in str(error) else error from None
        self.differs_by = difference([choice["logprobs"]["top_logprobs"][0] for choice in choices], self.reference)
        if not self.differs_by <= TOLERANCE:
            raise refrag.MismatchError(f"{self.name} serves {self.model}, another decoder than that of --dec and "
                                       f"--load_dir (log probabilities differ by {self.differs_by:.2f} nats): let it "
                                       "serve the folder that export --decoder writes")

    def write(self, readings: Sequence[refrag.Reading],
              on_token: Callable[[int, list[int]], bool | None] | None) -> refrag.Written:
        """The answer of one reading: see `Pipeline.write`."""
        [reading] = readings
        start = time.perf_counter()
        out = self.decode(reading.inputs, reading.settings, on_token)
        read = list(out.tokens)

        def best(row: int, tokens: list[int], allowed: list[int]) -> int:
            read.extend(tokens)
            [choice] = self.next_token([torch.cat([reading.inputs, self.embed(read)])], allowed_token_ids=allowed)
            return choice["token_ids"][0]

        return refrag.Written([out], [out.times[0] - start], None, best)

    def decode(self, inputs: Tensor, settings: refrag.Settings,
               on_token: Callable[[int, list[int]], bool | None] | None) -> refrag.Decoded:
        """As `refrag.decode` with one sequence; a token's time is that of its arrival."""
        out, reason = refrag.Decoded([], [], False), None
        with contextlib.closing(self.replies(
                "/v1/completions", prompt_embeds=in_base64(inputs), max_tokens=settings.max_new, stream=True,
                stop_token_ids=sorted(settings.stop_tokens), return_token_ids=True, **sampling(settings))) as events:
            for event in events:
                [choice] = event["choices"]
                reason, new = choice["finish_reason"], choice["token_ids"]
                last = len(new) - (reason == "stop")  # what ended the answer is none of it
                for token in new[:last]:
                    out.times.append(time.perf_counter())
                    out.tokens.append(token)
                    if on_token is not None and on_token(0, out.tokens):
                        return out
                out.times.extend(time.perf_counter() for _ in new[last:])
        if reason is None or not out.times:
            raise refrag.MissingError(f"{self.name}: the answer broke off: see the server's log")
        return out._replace(ended=reason == "stop")


def sampling(settings: refrag.Settings) -> dict[str, Any]:
    """How to draw tokens, with all that a served model's generation_config.json could set otherwise."""
    return {"temperature": settings.temperature if settings.temperature >= 1e-6 else 0, "top_p": settings.top_p,
            "seed": settings.sampler.initial_seed() % 2**63, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
