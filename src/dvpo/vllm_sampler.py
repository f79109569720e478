"""Sampling by a vLLM server: token ids go out, token ids and log-probs come back, and the weights are the trainer's.

The server is a plain `vllm serve` with its development routes (examples/vllm/serve.sh); nothing of vLLM is imported.

    weights    laid into a folder as a Hugging Face model, which the server's workers read (`reload_weights`); then its
               prefix cache is emptied, and the weights get a name, `weight_version`
    turns      one request each to /v1/completions, with the prompt as token ids and a seed of its own; the answer names
               the weights that drew it

A server that was restarted has forgotten the name, so it is given the weights again before anything is drawn; a
response that other weights had a part in is drawn again.
"""

import http.client
import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch

from dvpo.durable import DiskFullError, disk_full_named
from dvpo.errors import InputError, RunStoppedError
from dvpo.lora import merged
from dvpo.policy import Policy
from dvpo.sampling import HuggingFaceSampler, Sampler, Turn
from dvpo.settings import SamplingConfig

X = TypeVar("X")
Y = TypeVar("Y")

START = "start it as examples/vllm/serve.sh does"
QUICK = 30.0
"""Seconds for a question that costs the server nothing."""
PAUSE = 1.0
"""Seconds between two attempts."""
TOKENS_IN_TIME = 4096
"""So many may be written in `sampling.vllm.timeout`; a longer turn has as much more time."""
KEY = "VLLM_API_KEY"
"""Environment variable that vLLM itself reads: the key that the server asks for, if it asks for one."""
PROBE_ROWS, PROBE_LENGTH, PROBE_BOUND = 4, 16, 0.1
"""Responses and tokens of the first comparison, and how far, in nats on average, the log-probs may lie apart."""


class AwayError(Exception):
    """No answer, or none now: the same question may have one later."""


class RefusedError(Exception):
    """An answer that says no, or makes no sense: asking again will not help."""


def open_sampler(
    settings: SamplingConfig, policy: Policy, version: Callable[[], object], output: Path
) -> Callable[[bool], Sampler]:
    """Who draws, by `sampling.engine`: a function of *greedy*.

    Args:
        settings: lengths, temperature, engine.
        policy: whose weights draw.
        version: changes whenever the policy's weights do.
        output: the run's folder, where the weights are laid for the server unless `sampling.vllm.folder` is set.

    Raises:
        InputError: there is no such server, or it does not serve this model.
    """
    if settings.engine == "transformers":
        return lambda greedy: HuggingFaceSampler(policy, settings, greedy)
    server = VllmServer(settings, policy, version, output)
    server.compare()
    return lambda greedy: VllmSampler(server, settings, policy, greedy)


def refuse_absent_server(settings: SamplingConfig) -> None:
    """Ask the server, if there is to be one, whether it is there and has room: before a model is loaded.

    Raises:
        InputError: no answer, no vLLM, or a context too short for `sampling`.
    """
    if settings.engine != "vllm":
        return
    address, room = settings.vllm.address, settings.max_prompt_length + settings.max_completion_length
    http_server = HttpServer(address)
    try:
        served = http_server.ask("/v1/models", timeout=QUICK)["data"][0]
        context = int(served["max_model_len"])
        http_server.ask("/weight_info", timeout=QUICK)
    except AwayError as error:
        raise InputError(
            f"sampling.vllm.address = {address}: no vLLM server answers there ({error}): {START}"
        ) from None
    except (RefusedError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"sampling.vllm.address = {address}: what answers there is no vLLM server of version 0.33 or later with "
            f"its development routes ({error}): {START}"
        ) from None
    if context < room:
        raise InputError(
            f"sampling.max_prompt_length + sampling.max_completion_length = {room}, but the vLLM server at {address} "
            f"has a context of {context} tokens: start it with --max-model-len {room}, or lower one of them"
        )


class VllmSampler:
    """Draws turns on a `VllmServer`: the `Sampler` of `sampling.engine: vllm`."""

    def __init__(self, server: "VllmServer", settings: SamplingConfig, policy: Policy, greedy: bool = False) -> None:
        self.server, self.settings = server, settings
        # Everything is said, or the server would take what the model folder's generation config says.
        self._common = {
            "temperature": 0.0 if greedy else settings.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": list(settings.stop),
            "stop_token_ids": sorted(policy.end_ids),
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
            "return_weight_versions": True,
        }

    def sample(self, contexts: Sequence[Sequence[int]], budgets: Sequence[int], seeds: Sequence[int]) -> list[Turn]:
        """As `Sampler.sample` says; log-probs are those of the temperature-scaled, untruncated distribution."""
        rows = zip(contexts, budgets, seeds, strict=True)
        requests = [{"prompt": list(c), "max_tokens": b, "seed": s, **self._common} for c, b, s in rows]
        return self.server.draw(requests)

    def figures(self) -> dict[str, float]:
        """What the server cost since this was last asked."""
        return self.server.figures()

    def close(self) -> None:
        """Leave the server, which keeps the weights that it has."""
        self.server.close()


class VllmServer:
    """A vLLM server and which weights it holds.

    Args:
        settings: address, patience, what is drawn.
        policy: whose weights it is given.
        version: changes whenever they do.
        output: the run's folder.
    """

    def __init__(self, settings: SamplingConfig, policy: Policy, version: Callable[[], object], output: Path) -> None:
        self.settings, self.policy, self.version = settings, policy, version
        self._how = settings.vllm
        self._http = HttpServer(self._how.address)
        self._name = f"dvpo-{uuid.uuid4().hex[:12]}"  # no two runs give weights the same name
        self._label = ""
        self._laid: Path | None = None
        self._base = Path(self._how.folder or output / "vllm-weights").absolute()
        self._spent, self._pushes, self._repeats = 0.0, 0, 0
        # For a run that failed before it could be closed.
        weakref.finalize(self, _remove_laid, self._base, self._name, owner=os.getpid())

    def draw(self, requests: Sequence[Mapping[str, Any]]) -> list[Turn]:
        """Every request's turn, drawn by the present weights, however often it has to be asked for.

        Raises:
            RunStoppedError: the server refuses, there is no progress for `sampling.vllm.patience` seconds, or no room
                for the weights.
        """
        turns: list[Turn | None] = [None] * len(requests)
        progress = time.monotonic()
        reason: Exception | None
        while missing := [i for i, turn in enumerate(turns) if turn is None]:
            began, reason = time.monotonic(), None
            try:
                self._bring_weights()
                answers = side_by_side(self._turn, [requests[i] for i in missing], self._how.concurrency)
            except (AwayError, RefusedError) as error:
                answers, reason = [], error
            except DiskFullError as error:
                self.close()  # the checkpoint may need the room
                raise RunStoppedError(
                    f"the disk is full: the weights for the vLLM server could not be laid in {self._base}: free some "
                    "space, then start this run again with --resume"
                ) from error
            for i, answer in zip(missing, answers, strict=False):
                if isinstance(answer, Turn):
                    turns[i], progress = answer, time.monotonic()
                else:
                    reason = answer
                    self._repeats += 1
                    if isinstance(answer, RefusedError):
                        break
            if isinstance(reason, RefusedError):
                raise RunStoppedError(f"the vLLM server at {self._how.address} refuses: {reason}")
            if reason is not None and began - progress >= self._how.patience:  # a turn's own limit is no impatience
                raise RunStoppedError(
                    f"the vLLM server at {self._how.address} has given no answer for sampling.vllm.patience = "
                    f"{self._how.patience:g} seconds ({reason}): start it again, then this run with --resume"
                )
            if reason is not None:
                time.sleep(min(PAUSE, self._how.patience))
        return [turn for turn in turns if turn is not None]

    @torch.no_grad()
    def compare(self) -> None:
        """Give the server the weights and compare its log-probs of a few responses with the trainer's.

        Raises:
            InputError: it does not take them, or it draws by another distribution.
        """
        address = self._how.address
        rows = torch.arange(PROBE_ROWS * 8).remainder(self.policy.vocabulary).view(PROBE_ROWS, 8).tolist()
        sampler = VllmSampler(self, self.settings, self.policy)
        try:
            self._bring_weights()
            common = sampler._common
            drawn = [
                self._turn({"prompt": row, "max_tokens": PROBE_LENGTH, "seed": i, **common})
                for i, row in enumerate(rows)
            ]
        except (AwayError, RefusedError) as error:
            raise InputError(
                f"sampling.vllm.address = {address}: the server does not take this run's weights or draw with them "
                f"({error}): {START}, with the model of model.path"
            ) from None
        gaps = torch.cat([self._gaps(row, turn) for row, turn in zip(rows, drawn, strict=True)])
        if not float(gaps.mean()) <= PROBE_BOUND:
            raise InputError(
                f"sampling.vllm.address = {address}: with this run's weights the server's log-probs lie "
                f"{float(gaps.mean()):.2g} nats from the trainer's on average, more than {PROBE_BOUND}: {START}, "
                "with the model of model.path and --logprobs-mode processed_logprobs"
            )

    def figures(self) -> dict[str, float]:
        """Since the last call: seconds spent on bringing weights, how often, and responses asked for again."""
        figures = {
            "time/push_weights": self._spent,
            "sampler/pushes": float(self._pushes),
            "sampler/repeats": float(self._repeats),
        }
        self._spent, self._pushes, self._repeats = 0.0, 0, 0
        return figures

    def close(self) -> None:
        """Remove the weights that were laid for the server, also those whose writing was cut short."""
        self._laid, self._label = None, ""
        _remove_laid(self._base, self._name)

    def _bring_weights(self) -> None:
        """Let the server hold the policy's present weights, unless it does."""
        wanted = f"{self._name}-{self.version()}"
        started = time.monotonic()
        if self._label == wanted and self._http.ask("/weight_info", timeout=QUICK).get("weight_version") == wanted:
            return
        if self._label != wanted:
            self._lay(self._base / wanted)
        read = {"method": "reload_weights", "kwargs": {"weights_path": str(self._base / wanted)}}
        self._http.ask("/collective_rpc", read, self._how.timeout)
        if not self._http.ask("/reset_prefix_cache", {}, QUICK).get("success"):
            raise AwayError("/reset_prefix_cache: its blocks are in use")
        # Last: a server that has the name has had all the rest.
        self._http.ask("/update_weight_version", {"new_version": wanted}, QUICK)
        self._label = wanted
        self._pushes += 1
        self._spent += time.monotonic() - started

    def _lay(self, folder: Path) -> None:
        """Write the weights in the compute type; into a new folder, since the server may still map the last one."""
        if self._laid == folder:
            return
        self._laid = None
        made: dict[int, torch.Tensor] = {}  # tied weights stay one tensor

        def converted(tensor: torch.Tensor) -> torch.Tensor:
            return made.setdefault(tensor.data_ptr(), tensor.detach().to(self.policy.dtype))

        weights = merged(self.policy.model, self.policy.model.state_dict())
        state = {name: converted(tensor) for name, tensor in weights.items()}
        with disk_full_named(folder):
            self.policy.model.save_pretrained(folder, state_dict=state)
        self._laid = folder
        _remove_laid(self._base, self._name, but=folder)

    def _turn(self, request: Mapping[str, Any]) -> Turn:
        limit = self._how.timeout * max(1.0, request["max_tokens"] / TOKENS_IN_TIME)
        answer = self._http.ask("/v1/completions", request, limit)
        try:
            choice = answer["choices"][0]
            tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            prompt, reason = choice["prompt_token_ids"], choice["finish_reason"]
            drawn_by = {span["version"] for span in choice["weight_versions"]}
        except (LookupError, TypeError) as error:
            raise RefusedError(f"/v1/completions lacks {error}; {START}") from None
        if reason not in ("stop", "length"):
            raise AwayError(f"/v1/completions: a response ended by {reason}")
        if drawn_by != {self._label}:
            raise AwayError(f"/v1/completions: weights {', '.join(sorted(drawn_by))} drew in place of {self._label}")
        if prompt != request["prompt"]:
            raise RefusedError("/v1/completions: the prompt came back changed")
        if not tokens or len(tokens) != len(logprobs) or max(tokens) >= self.policy.vocabulary:
            raise RefusedError("/v1/completions: tokens and log-probs do not fit each other, or not this vocabulary")
        if reason == "length" and len(tokens) < request["max_tokens"]:
            raise RefusedError(
                "/v1/completions: responses are cut short; start the server with --generation-config vllm"
            )
        return Turn(tokens, logprobs, finished=reason == "stop")

    def _gaps(self, context: list[int], turn: Turn) -> torch.Tensor:
        """Absolute differences of the server's and the trainer's log-probs of a response."""
        tokens_1S = torch.tensor([[*context, *turn.tokens]], device=self.policy.device)
        states_TD = self.policy.hidden_states(tokens_1S, torch.ones_like(tokens_1S, dtype=torch.bool))[0]
        states_TD = states_TD[len(context) - 1 : -1]
        own_T, _ = self.policy.token_logprobs(states_TD, tokens_1S[0, len(context) :], self.settings.temperature)
        return (own_T.cpu() - torch.tensor(turn.logprobs)).abs()


class HttpServer:
    """Questions and answers in JSON. Proxies of the environment are not asked: the server is one's own."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, path: str, body: Mapping[str, Any] | None = None, timeout: float = QUICK) -> dict[str, Any]:
        """GET, or POST with a body.

        Raises:
            AwayError: no connection, no answer in `timeout` seconds, or a fault inside the server.
            RefusedError: the server does not know the path or does not like the body.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                text = answer.read()
            return dict(json.loads(text)) if text else {}
        except urllib.error.HTTPError as error:
            said = f"{path}: {error.code} {_first_line(error)}"
            raise (AwayError if error.code in (408, 429) or error.code >= 500 else RefusedError)(said) from None
        except TimeoutError:
            raise AwayError(f"{path}: no answer within {timeout:g} seconds") from None
        except urllib.error.URLError as error:
            raise AwayError(f"{path}: {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise AwayError(f"{path}: {error or type(error).__name__}") from None
        except ValueError:
            raise RefusedError(f"{path}: the answer is no JSON") from None


def side_by_side(function: Callable[[X], Y], items: Sequence[X], workers: int) -> list[Y | AwayError | RefusedError]:
    """function(item) of each, at most `workers` at a time; an `AwayError` or `RefusedError` takes its result's place.

    Daemon threads: a signal ends the wait, and what they still wait for holds up nobody.
    """
    results: list[Any] = [AwayError("not asked")] * len(items)
    waiting: SimpleQueue[int] = SimpleQueue()
    for i in range(len(items)):
        waiting.put(i)

    def work() -> None:
        while True:
            try:
                i = waiting.get_nowait()
            except Empty:
                return
            try:
                results[i] = function(items[i])
            except (AwayError, RefusedError) as error:
                results[i] = error
            except BaseException as error:  # a fault of ours: told by the thread that waits
                results[i] = error
                return

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(items)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        while not waiting.empty():  # the others stop after what they have begun
            waiting.get()
        raise
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, AwayError | RefusedError):
            raise result
    return results


def _remove_laid(base: Path, name: str, but: Path | None = None, owner: int | None = None) -> None:
    """Remove a run's folders of weights, and the folder around them if it is empty: others may use it."""
    if owner not in (None, os.getpid()):  # a fork of the run comes to its end
        return
    for folder in base.glob(f"{name}-*"):
        if folder != but:
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        base.rmdir()


def _first_line(error: urllib.error.HTTPError) -> str:
    """What the server says about it: vLLM's message, or the beginning of the text."""
    text = error.read(4096).decode(errors="replace")
    try:
        fault = json.loads(text)["error"]
        text = str(fault["message"] if isinstance(fault, dict) else fault)
    except (ValueError, LookupError, TypeError):
        pass
    return " ".join(text.split())[:300] or str(error.reason)
