"""A server that speaks the routes of `vllm serve` 0.33 that dvpo uses, in the schema of its source, on a tiny model.

Real HTTP on a port of this machine; responses are drawn by transformers, a row at a time, from the seed of the request.
"""

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dvpo.policy import open_policy
from dvpo.sampling import HuggingFaceSampler
from dvpo.settings import SamplingConfig

KNOWN = {
    *("prompt", "max_tokens", "seed", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "logprobs"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "skip_special_tokens", "return_token_ids"),
    *("return_tokens_as_token_ids", "return_weight_versions"),
}
"""Fields of vLLM's CompletionRequest; vLLM lets others pass, this server does not."""


class FaultError(Exception):
    """An HTTP status and its message."""


class FakeVllm:
    """Use as a context manager; `address` is where it listens.

    Attributes:
        intercept: called with the path before each answer; may sleep, raise `FaultError`, or restart the server.
        asked: the paths of all requests so far.
    """

    def __init__(self, model: str | Path, processed: bool = True, context: int = 4096) -> None:
        self.model, self.processed, self.context = model, processed, context
        self.intercept: Callable[[str], None] = lambda path: None
        self.asked: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.dev_mode = True
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._http: ThreadingHTTPServer | None = None
        self.start()

    def start(self) -> None:
        """As a fresh process: the weights are those of its model, and have no name."""
        self.policy = open_policy(self.model, torch.device("cpu"))
        self.version = "default"
        self._stopped.clear()
        handler = type("Handler", (Handler,), {"fake": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._http.daemon_threads = False  # one that is inside torch when Python ends would abort it
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Ends what it is at, too."""
        self._stopped.set()
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def hang(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise ConnectionAbortedError

    def __enter__(self) -> "FakeVllm":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def forget(self) -> None:
        """What a restart does to the weights, without the minutes."""
        self.policy, self.version = open_policy(self.model, torch.device("cpu")), "default"

    # Routes

    def get(self, path: str) -> dict[str, Any]:
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": str(self.model), "max_model_len": self.context}]}
        if path == "/weight_info" and self.dev_mode:
            return {"weight_version": self.version}
        raise FaultError(404, "Not Found")

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/completions":
            return self.complete(body)
        if not self.dev_mode:
            raise FaultError(404, "Not Found")
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            return self.reload(Path(body["kwargs"]["weights_path"]))
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return {"success": True, "new_version": self.version}
        raise FaultError(404, "Not Found")

    def reload(self, folder: Path) -> dict[str, Any]:
        try:
            weights: dict[str, torch.Tensor] = {}
            for file in sorted(folder.glob("*.safetensors")):
                weights |= load_file(file)
            unknown = self.policy.model.load_state_dict(weights, strict=False)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise FaultError(500, str(error).splitlines()[-1].strip()) from None
        tied = {"lm_head.weight"}
        if not weights or unknown.unexpected_keys or set(unknown.missing_keys) - tied:
            raise FaultError(500, f"weights of another model in {folder}")
        return {"results": [None]}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if unknown := body.keys() - KNOWN:
            raise FaultError(400, f"unknown fields {sorted(unknown)}")
        self.requests.append(body)
        prompt, budget = body["prompt"], body["max_tokens"]
        if len(prompt) + budget > self.context:
            raise FaultError(400, f"This model's maximum context length is {self.context} tokens")
        version, greedy = self.version, body["temperature"] == 0
        settings = SamplingConfig(temperature=body["temperature"] or 1.0, stop=body["stop"])
        assert set(body["stop_token_ids"]) == self.policy.end_ids
        turn = HuggingFaceSampler(self.policy, settings, greedy).sample([prompt], [budget], [body["seed"]])[0]
        logprobs = turn.logprobs if self.processed else self.raw(prompt, turn.tokens)
        spans = [{"version": version, "start": 0, "end": len(turn.tokens)}]
        if self.version != version:  # the weights changed while this response was being drawn
            spans.append({"version": self.version, "start": len(turn.tokens) - 1, "end": len(turn.tokens)})
        choice = {
            "index": 0,
            "text": "",
            "logprobs": {"tokens": [f"token_id:{t}" for t in turn.tokens], "token_logprobs": logprobs},
            "finish_reason": "stop" if turn.finished else "length",
            "stop_reason": None,
            "token_ids": turn.tokens,
            "prompt_token_ids": prompt,
            "weight_versions": spans,
        }
        return {"id": "cmpl-0", "object": "text_completion", "model": str(self.model), "choices": [choice]}

    @torch.no_grad()
    def raw(self, prompt: list[int], tokens: list[int]) -> list[float]:
        """Log-probs before the temperature: what vLLM gives by default."""
        logits_SV = self.policy.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        return logits_SV.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()


class Handler(BaseHTTPRequestHandler):
    """JSON in, JSON out."""

    fake: FakeVllm

    def do_GET(self) -> None:
        self.answer(lambda: self.fake.get(self.path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        self.answer(lambda: self.fake.post(self.path, body))

    def answer(self, route: Callable[[], dict[str, Any]]) -> None:
        self.fake.asked.append(self.path)
        try:
            self.fake.intercept(self.path)
            with self.fake._lock:  # one engine
                status, said = 200, route()
        except FaultError as fault:
            status, message = fault.args
            said = {"error": {"message": message, "type": "error", "code": status}}
        except ConnectionAbortedError:
            self.close_connection = True
            return
        text = json.dumps(said).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
        except OSError:
            pass  # who asked no longer waits

    def log_message(self, *_: object) -> None: ...


def slowly(fake: FakeVllm, path: str, seconds: float, times: int = 1) -> Callable[[str], None]:
    """An `intercept` that lets the first requests to a path hang."""
    left = [times]

    def intercept(asked: str) -> None:
        if asked == path and left[0] > 0:
            left[0] -= 1
            fake.hang(seconds)

    return intercept
