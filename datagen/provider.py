"""One request to an OpenAI-compatible server: what it accepts, how often to try, when to give up."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import openai
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential, wait_random

from tunewright.datagen.budget import Budget, Reservation
from tunewright.datagen.endpoint import Endpoint
from tunewright.datagen.grid import Message
from tunewright.datagen.limiter import Limiter
from tunewright.datagen.reply_log import ReplyLog
from tunewright.datagen.settings import DatagenConfig
from tunewright.errors import ConfigError, PeerError

ATTEMPTS = 8
HURRIED = 40  # refusals for haste until a request is given up
LONGEST_WAIT = 300.0
BACKOFF = wait_exponential(0.5, max=30) + wait_random(0, 0.25)
TOOL = "write"
TOO_LONG = re.compile(r"context.{0,20}(length|size|window)", re.IGNORECASE)
# From strict to none: a server that refuses one is asked with the next. Whatever it accepts, replies are checked here,
# since many servers take a schema and ignore it.
LADDER = ("json_schema", "tool", "json_object", "plain")


class RequestFailed(PeerError):
    """This request got no reply; another one may."""


class _Again(Exception):
    """A request is to be sent again, after so many seconds where that is known."""

    def __init__(self, wait: float | None) -> None:
        self.wait = wait


@dataclass
class Ask:
    """One request: its messages, the shape of the reply, and how often it was sent."""

    messages: list[Message]
    key: str  # under which the log has it
    schema: dict[str, Any] | None = None  # None: plain text
    model: str | None = None
    temperature: float | None = None
    tries: int = 0
    unknown: int = 0  # tries whose cost nobody told
    hurried: int = 0  # tries that were refused for haste

    @property
    def marks(self) -> dict[str, Any]:
        """What the log says of the request, to know its price."""
        return {"judge": self.model} if self.model else {}


class Provider:
    """Asks with bounded retries; a refusal for haste holds back every request, not only the one that met it."""

    def __init__(
        self, config: DatagenConfig, endpoint: Endpoint, budget: Budget, limiter: Limiter, log: ReplyLog, say: Any
    ) -> None:
        self._config, self._endpoint, self._log, self._say = config, endpoint, log, say
        self.budget, self.limiter = budget, limiter
        self._client = client_of(endpoint, config.timeout)
        self._limit_key = "max_tokens"
        self._rung = 0
        self._refusals = 0  # of the current rung
        self._alive = False
        self.negotiated = False  # a structured request was accepted: the rung is settled

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, request: Ask) -> dict[str, Any]:
        """Return what the model replied, good or bad, as a record for the log.

        Raises:
            RequestFailed: no reply after every retry, or the server refuses this request.
            BudgetSpent: the request does not fit into what may be spent.
            Stopped: nothing may be sent any more.
            ConfigError, PeerError: no request can succeed (key, model, quota).
        """
        asking = AsyncRetrying(retry=retry_if_exception_type(_Again), wait=_wait, sleep=self.limiter.pause)
        return await asking(self._try, request)

    def _again(self, request: Ask, reason: str, *, wait: float | None = None, connected: bool = True) -> Exception:
        """Return what sends a request again, or what says that it was sent often enough."""
        # Being told to slow down is no failure of the request: it may happen many times.
        failed = request.tries - request.hurried
        if failed >= (ATTEMPTS if connected or self._alive else 3) or request.hurried >= HURRIED:
            return RequestFailed(f"{self._endpoint.base_url}: {reason}, tried {request.tries} times.")
        return _Again(wait)

    async def _try(self, request: Ask) -> dict[str, Any]:
        """Send a request once."""
        async with self.limiter.slot():
            body, held = self.body(request), self.worst_case(request)
            self.budget.reserve(held)
            request.tries += 1
            lost = (request.unknown + 1) * held.tokens_in, (request.unknown + 1) * held.tokens_out
            self._log.note_sent(request.key, as_usage(*lost), request.tries, **request.marks)
            try:
                # The client checks what is no extra of the body part by part, which takes longer than all the rest.
                rest = {key: value for key, value in body.items() if key not in ("model", "messages")}
                creating = self._client.chat.completions.with_raw_response.create(
                    model=body["model"], messages=body["messages"], extra_body=rest
                )
                raw = await asyncio.wait_for(creating, self._config.timeout)
                reply = raw.parse()
            except openai.APIStatusError as error:
                self.budget.settle(held, 0, 0)  # a refused request is not billed
                self._alive = True
                raise self._refusal(error, request) from error
            except BaseException as error:
                self._lost(request, held)
                if isinstance(error, (openai.APITimeoutError, asyncio.TimeoutError)):
                    raise self._again(request, f"no reply within {self._config.timeout:g} s") from error
                if isinstance(error, openai.APIConnectionError):
                    reason = f"cannot connect ({type(error.__cause__).__name__})"
                    raise self._again(request, reason, connected=False) from error
                if isinstance(error, (openai.APIResponseValidationError, ValueError)):
                    raise self._again(request, "the reply is not JSON") from error
                raise
            if not isinstance(getattr(reply, "choices", None), list):
                self._lost(request, held)
                raise self._again(request, "the reply is not a chat completion")
            self._alive, self.negotiated = True, self.negotiated or request.schema is not None
            self.limiter.answered(raw.headers)
            record = self.record(reply, request)
            usage = record.get("usage") or {}
            self.budget.settle(held, usage.get("prompt_tokens"), usage.get("completion_tokens"))
            return record

    def _refusal(self, error: openai.APIStatusError, request: Ask) -> Exception:
        """Return what a refusal means: nothing more to be asked, not this request, or again, and when."""
        url, status = self._endpoint.base_url, error.status_code
        reason = f"HTTP {status}: {self._words(error)}"
        self._check_fatal(error, reason, request)
        if self._adapt(error, request):
            return _Again(0)
        if status < 500 and status not in (408, 409, 429):
            settled = request.schema and self.negotiated
            return RequestFailed(reason) if settled else ConfigError(f"{url} refuses the request, {reason}")
        wait = _retry_after(error.response.headers)
        if wait is not None and wait > LONGEST_WAIT:
            return PeerError(f"{url} asks to wait {wait:.0f} s. The same command continues.")
        if wait is not None or status in (429, 503):
            self.limiter.refused(wait)
        request.hurried += status == 429
        return self._again(request, reason, wait=None if wait is None else 0)  # the limiter holds it back

    def _lost(self, request: Ask, held: Reservation) -> None:
        """Count a try that may have been billed at its worst."""
        self.budget.settle(held, None, None)
        request.unknown += 1

    def worst_case(self, request: Ask, *, batch: bool = False) -> Reservation:
        return self.budget.worst_case(self.body(request), self._config.max_tokens, request.model, batch=batch)

    def lost(self, request: Ask) -> dict[str, Any]:
        """Return what the tries without an answer may have cost, for the log."""
        held, count = self.worst_case(request), request.unknown
        return {"lost": as_usage(count * held.tokens_in, count * held.tokens_out)} if count else {}

    def body(self, request: Ask) -> dict[str, Any]:
        return request_body(self._config, request, LADDER[self._rung], self._limit_key)

    def record(self, reply: Any, request: Ask, *, batch: bool = False) -> dict[str, Any]:
        """Return a chat completion as a record for the log, whatever it may hold."""
        choice = reply.choices[0] if reply.choices else None
        message, usage = getattr(choice, "message", None), getattr(reply, "usage", None)
        texts = {name: getattr(message, name, None) for name in ("content", "refusal")}
        calls = getattr(message, "tool_calls", None)
        if isinstance(calls, list) and calls:
            texts["content"] = getattr(getattr(calls[0], "function", None), "arguments", None)
        counted = {name: getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
        known = all(isinstance(count, int) and count >= 0 for count in counted.values())
        cost: dict[str, Any]
        if known:
            cost = {"usage": counted}
        else:
            held = self.worst_case(request, batch=batch)
            cost = {"worst_case": as_usage(held.tokens_in, held.tokens_out)}
        return {
            **{name: text if isinstance(text, str) else None for name, text in texts.items()},
            "finish_reason": getattr(choice, "finish_reason", None),
            **cost,
            "model": getattr(reply, "model", None),
            "format": LADDER[self._rung] if request.schema else "text",
            "tries": request.tries,
            **request.marks,
        }

    def _check_fatal(self, error: openai.APIStatusError, reason: str, request: Ask) -> None:
        model, url, key = request.model or self._config.model, self._endpoint.base_url, self._endpoint.key_name
        if error.status_code == 401:
            raise ConfigError(f"{url} does not accept the key in {key}, {reason}") from error
        if error.status_code == 403:
            raise ConfigError(f"The key in {key} may not use model '{model}' at {url}, {reason}") from error
        if error.status_code == 404:
            raise ConfigError(f"{url} has no model '{model}', or the address is wrong, {reason}") from error
        if "insufficient_quota" in (error.code, error.type):
            raise PeerError(f"The account behind {key} has no credit left at {url}, {reason}") from error
        if error.code == "context_length_exceeded" or (error.status_code == 400 and TOO_LONG.search(reason)):
            raise ConfigError(
                f"The request is longer than '{model}' can read: shorten the task or the sources, or lower max_tokens, "
                f"{reason}"
            ) from error

    def _adapt(self, error: openai.APIStatusError, request: Ask) -> bool:
        """Change the request to what the server takes; true when it is worth asking again at once."""
        if error.status_code == 400 and "max_completion_tokens" in str(error) and self._limit_key == "max_tokens":
            self._limit_key = "max_completion_tokens"
            return True
        if not request.schema or self.negotiated or error.status_code not in (400, 422, 500):
            return False
        self._refusals += 1
        # Some servers refuse with a 500. One of them can be an accident, so it takes two.
        if self._rung + 1 == len(LADDER) or (error.status_code == 500 and self._refusals < 2):
            return False
        self._say(f"The server refuses {LADDER[self._rung]}; asking for {LADDER[self._rung + 1]} instead.")
        self._rung, self._refusals = self._rung + 1, 0
        return True

    def _words(self, error: openai.APIStatusError) -> str:
        return self._endpoint.scrub(" ".join(error.message.split()))[:300]


def client_of(endpoint: Endpoint, timeout: float) -> openai.AsyncOpenAI:
    """Return the client of an endpoint; repeating is ours, since the client repeats what cannot succeed as well."""
    if endpoint.azure_version:
        return openai.AsyncAzureOpenAI(
            api_key=endpoint.key,
            azure_endpoint=endpoint.base_url,
            api_version=endpoint.azure_version,
            max_retries=0,
            timeout=timeout,
        )
    return openai.AsyncOpenAI(api_key=endpoint.key, base_url=endpoint.base_url, max_retries=0, timeout=timeout)


def request_body(config: DatagenConfig, request: Ask, rung: str, limit_key: str) -> dict[str, Any]:
    """Return the body of a chat-completions request."""
    body: dict[str, Any] = {"model": request.model or config.model, "messages": request.messages}
    body[limit_key] = config.max_tokens
    if config.temperature is not None:
        body["temperature"] = config.temperature if request.temperature is None else request.temperature
    if request.schema is None:
        return body
    if rung == "json_schema":
        schema = {"name": "reply", "strict": True, "schema": request.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif rung == "tool":
        body["tools"] = [{"type": "function", "function": {"name": TOOL, "parameters": request.schema}}]
        body["tool_choice"] = {"type": "function", "function": {"name": TOOL}}
    elif rung == "json_object":
        body["response_format"] = {"type": "json_object"}
    return body


def as_usage(tokens_in: int, tokens_out: int) -> dict[str, int]:
    return {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}


def _wait(state: RetryCallState) -> float:
    again = state.outcome.exception() if state.outcome else None
    return again.wait if isinstance(again, _Again) and again.wait is not None else BACKOFF(state)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue  # absent, or a date
    return None
