"""In-process servers with the protocols of vLLM and SGLang on a transformers model, with injected faults.

    with VLLMServer(model) as server:
        RemoteTeacher(server.url, top_k=8)

Written after the request and response formats of the projects. The log-probabilities are those of the model's forward
at temperature 1, as a float32 server computes them.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from hf_distill.core.logits import LazyLogits, SparseLogProbs
from hf_distill.core.signals import Signals
from hf_distill.teachers import FrozenTeacher

TOP_K = 8


class LocalTopK(FrozenTeacher):
    """The reference: the k most probable ids of the local model and the rest of the probability, at temperature 1."""

    top_k = TOP_K

    def forward(self, inputs, targets, feature_requests):
        logits = super().forward(inputs, targets, feature_requests).logits
        assert isinstance(logits, LazyLogits)
        log_probs, ids = torch.log_softmax(logits.project(), -1).topk(self.top_k)
        return Signals(SparseLogProbs(ids, log_probs, torch.log1p(-log_probs.exp().sum(-1))))


@dataclass
class Fault:
    """A fault of the next `times` requests whose path contains `match`.

    status:  HTTP status of an error response; 0: none
    headers: headers of the error response
    body:    text of the error response
    cut:     the connection is closed without a response
    slow:    seconds before the request is handled
    change:  changes the answer, a JSON value, before it is sent; it may return text that is no JSON
    """

    match: str = ""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"error": {"message": "an injected fault", "code": 500}}'
    cut: bool = False
    slow: float = 0.0
    change: Callable[[Any], Any] | None = None
    times: int = 1


class Refused(Exception):
    """A request that the server refuses, with a status and a message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Print nothing if a client closes its connection."""


class TeacherServer:
    """A server in a thread, on a free port of this machine.

    requests: path, body and headers of each request
    faults:   faults of the next requests
    """

    def __init__(self, model, *, name="teacher", tokenizer=None, context=64, max_top_k=20, key=None, port=0):
        self.model, self.name, self.tokenizer = model.eval(), name, tokenizer
        self.context, self.max_top_k, self.key = context, max_top_k, key
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        self.faults: list[Fault] = []
        self.lock, self.in_flight, self.max_in_flight = threading.Lock(), 0, 0
        self._server = _Server(("127.0.0.1", port), _handler(self))
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def bodies(self, path: str) -> list[Any]:
        """The bodies of all requests to a path."""
        return [body for each, body, _ in self.requests if each == path]

    def next_fault(self, path: str) -> Fault | None:
        """The fault of a request, which is used up."""
        with self.lock:
            for fault in self.faults:
                if fault.match in path and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> torch.Tensor:
        """Log-probabilities of the next token after each token, [S, V]."""
        with self.lock:
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), -1)

    def text(self, token_id: int) -> str | None:
        """The text of an id; None without a tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.decode([token_id])

    def answer(self, path: str, body: Any) -> Any:
        """The answer of a request."""
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": self.name, "root": "org/teacher", "max_model_len": self.context}]}
        if path == "/tokenize" and self.tokenizer is not None:
            ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return {"count": len(ids), "max_model_len": self.context, "tokens": ids}
        raise Refused(404, "Not Found")

    def check_ids(self, ids: list[int], tokens: int) -> None:
        """Refuse ids outside of the vocabulary and too long requests."""
        if len(ids) + tokens > self.context:
            raise Refused(400, f"This model's maximum context length is {self.context} tokens.")
        if max(ids) >= self.model.config.vocab_size:
            raise Refused(400, f"Token id {max(ids)} is out of vocabulary")


class VLLMServer(TeacherServer):
    """`/v1/completions` of vLLM with `prompt_logprobs`."""

    def answer(self, path, body):
        if path != "/v1/completions":
            return super().answer(path, body)
        ids, k = body["prompt"], body["prompt_logprobs"]
        if body["model"] != self.name:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        if k > self.max_top_k:
            raise Refused(400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_top_k}")
        self.check_ids(ids, body["max_tokens"])
        log_probs = self.log_probs(ids)
        values = [None] + [self._entries(log_probs[i], ids[i + 1], k) for i in range(len(ids) - 1)]
        choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_logprobs": values, "prompt_token_ids": ids}
        return {"id": "cmpl-1", "object": "text_completion", "model": self.name, "choices": [choice]}

    def _entries(self, log_probs, token_id, k):
        """The k most probable ids of a position, and the actual token."""
        ids = dict.fromkeys([token_id, *log_probs.topk(k).indices.tolist()])
        return {
            str(i): {
                "logprob": float(log_probs[i]),
                "rank": int((log_probs > log_probs[i]).sum()) + 1,
                "decoded_token": self.text(i),
            }
            for i in ids
        }


class CompletionServer(TeacherServer):
    """`/v1/completions` and `/v1/chat/completions` of an OpenAI-compatible server.

    separates_reasoning: whether chat completions have reasoning, in a field of its own
    has_log_probs:       whether answers have log-probabilities
    """

    separates_reasoning, has_log_probs = False, True

    def answer(self, path, body):
        if path not in ("/v1/completions", "/v1/chat/completions"):
            return super().answer(path, body)
        if body["model"] != self.name:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        is_chat = path == "/v1/chat/completions"
        prompt = (
            self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            if is_chat
            else body["prompt"]
        )
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
        self.check_ids(ids, body["max_tokens"])
        if not is_chat and (body.get("logprobs") or 0) > self.max_top_k:
            raise Refused(
                400,
                f"Requested sample logprobs of {body['logprobs']}, which is greater than max allowed: {self.max_top_k}",
            )
        new, values, reason = self._sample(ids, body)
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        for stop in body.get("stop", ()):
            text = text.partition(stop)[0]
        choice = {"index": 0, "finish_reason": reason, "logprobs": None}
        if is_chat:
            choice["message"] = {"role": "assistant", "content": text}
            if self.separates_reasoning:
                choice["message"]["reasoning_content"] = "thoughts"
            if body.get("logprobs") and self.has_log_probs:
                choice["logprobs"] = {"content": [{"token": "", "logprob": value} for value in values]}
        else:
            choice["text"] = text
            if body.get("logprobs") is not None and self.has_log_probs:
                choice["logprobs"] = {"token_logprobs": values}
                if body.get("return_tokens_as_token_ids"):
                    choice["logprobs"] |= self._token_entries(ids, new, body["logprobs"])
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(new)}
        return {"id": "1", "model": self.name, "choices": [choice], "usage": usage}

    def _token_entries(self, ids, new, k):
        """Tokens by their ids, and the k most probable ones of each position with the generated one."""
        log_probs = self.log_probs(ids + new)[len(ids) - 1 : -1]
        entries = []
        for row, token in zip(log_probs, new, strict=True):
            kept = dict.fromkeys([token, *row.topk(k).indices.tolist()])
            entries.append({f"token_id:{i}": float(row[i]) for i in kept})
        return {"tokens": [f"token_id:{i}" for i in new], "top_logprobs": entries}

    def _sample(self, ids, body):
        generator = torch.Generator().manual_seed(body["seed"])
        new, values, reason = [], [], "length"
        while len(new) < body["max_tokens"] and reason == "length":
            log_probs = self.log_probs(ids + new)[-1]
            if body["temperature"]:
                probs = torch.softmax(log_probs / body["temperature"], -1)
                new.append(int(torch.multinomial(probs, 1, generator=generator)))
            else:
                new.append(int(log_probs.argmax()))
            values.append(float(log_probs[new[-1]]))
            text = self.tokenizer.decode(new)
            if new[-1] == self.tokenizer.eos_token_id or any(stop in text for stop in body.get("stop", ())):
                reason = "stop"
        return new, values, reason


class VLLMCompletionServer(CompletionServer, VLLMServer):
    """`/v1/completions` of vLLM, with prompt log-probabilities or with completions."""

    def answer(self, path, body):
        if path == "/v1/completions" and "prompt_logprobs" in body:
            return VLLMServer.answer(self, path, body)
        return CompletionServer.answer(self, path, body)


class SGLangServer(TeacherServer):
    """`/generate` of SGLang with `return_logprob`."""

    def answer(self, path, body):
        if path != "/generate":
            return super().answer(path, body)
        ids, start, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
        self.check_ids(ids, 6)
        log_probs, text = self.log_probs(ids), self.text if body.get("return_text_in_logprobs") else lambda i: None
        shown = [i if i < self.model.config.vocab_size - 1 else 0 for i in ids]
        tokens = [[None, shown[start], text(shown[start])]]
        top: list[Any] = [None]
        for i in range(start, len(ids) - 1):
            tokens.append([float(log_probs[i, ids[i + 1]]), shown[i + 1], text(shown[i + 1])])
            best = log_probs[i].topk(k)
            top.append([[v, j, text(j)] for v, j in zip(best.values.tolist(), best.indices.tolist(), strict=True)])
        meta = {"id": "1", "prompt_tokens": len(ids), "input_token_logprobs": tokens, "input_top_logprobs": top}
        return {"text": "", "output_ids": [], "meta_info": meta}


def _handler(server: TeacherServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            self.handle_request(None)

        def do_POST(self):
            self.handle_request(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def handle_request(self, body):
            with server.lock:
                server.requests.append((self.path, body, dict(self.headers)))
                server.in_flight += 1
                server.max_in_flight = max(server.max_in_flight, server.in_flight)
            try:
                self.respond(body, server.next_fault(self.path))
            except (BrokenPipeError, ConnectionResetError):  # the client is gone, or a test closes the connection
                self.close_connection = True
            finally:
                with server.lock:
                    server.in_flight -= 1

        def respond(self, body, fault):
            if fault is not None:
                time.sleep(fault.slow)
                if fault.cut:
                    self.close_connection = True
                    return
                if fault.status:
                    self.send(fault.status, fault.body, fault.headers)
                    return
            if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
                self.send(401, json.dumps({"error": f"Unauthorized: {self.headers.get('Authorization')}"}))
                return
            try:
                answer = server.answer(self.path, body)
            except Refused as error:
                self.send(error.status, json.dumps({"error": {"message": str(error), "code": error.status}}))
                return
            if fault is not None and fault.change is not None:
                answer = fault.change(answer)
            self.send(200, answer if isinstance(answer, str) else json.dumps(answer))

        def send(self, status, text, headers=None):
            data = text.encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler
