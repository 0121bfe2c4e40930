"""One request to an OpenAI-compatible server: what it accepts, how often to try, when to give up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import openai

from datagen.budget import Budget
from datagen.cells import Message
from datagen.limiter import Limiter
from datagen.settings import DatagenConfig, Endpoint
from launch.errors import ConfigError, PeerError

ATTEMPTS = 8
LONGEST_WAIT = 300.0
TOOL = "write"
# From strict to none: a server that refuses one is asked with the next. Whatever it accepts, replies are checked here,
# since many servers take a schema and ignore it.
LADDER = ("json_schema", "tool", "json_object", "plain")


class RequestFailed(PeerError):
    """This request got no reply; another one may."""


@dataclass
class Ask:
    """One request: its messages, the shape of the reply, and how often it was sent."""

    messages: list[Message]
    schema: dict[str, Any] | None = None  # None: plain text
    model: str | None = None
    temperature: float | None = None
    tries: int = 0
    unknown: int = 0  # tries whose cost nobody told
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        return "\n".join(message["content"] for message in self.messages)


class Provider:
    """Asks with bounded retries; a refusal for haste holds back every request, not only the one that met it."""

    def __init__(self, config: DatagenConfig, endpoint: Endpoint, budget: Budget, limiter: Limiter, say: Any) -> None:
        self._config, self._endpoint, self._say = config, endpoint, say
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
            ConfigError, PeerError: no request can succeed (key, model, quota).
        """
        while True:
            await self.limiter.opened()
            held = self.budget.worst_case(request.prompt, self._config.max_tokens)
            self.budget.reserve(held)
            request.tries += 1
            wait, connected = None, True
            try:
                raw = await self._client.chat.completions.with_raw_response.create(**self._body(request))
                reply = raw.parse()
            except asyncio.CancelledError:
                self._lost(request, held)
                raise
            except openai.APIStatusError as error:
                self.budget.settle(held, 0, 0)  # a refused request is not billed
                self._alive = True
                reason = f"HTTP {error.status_code}: {self._words(error)}"
                self._check_fatal(error, reason)
                if self._adapt(error, request):
                    continue
                if error.status_code < 500 and error.status_code not in (408, 409, 429):
                    if request.schema and self.negotiated:
                        raise RequestFailed(reason) from error
                    raise ConfigError(f"{self._endpoint.base_url} refuses the request, {reason}") from error
                wait = _retry_after(error.response.headers)
                if wait is None and error.status_code == 429:
                    wait = _backoff(request.tries)
                if error.status_code in (429, 503):
                    self.limiter.refused(None)
            except openai.APITimeoutError:
                self._lost(request, held)
                reason = f"no reply within {self._config.timeout:g} s"
            except openai.APIConnectionError as error:
                self._lost(request, held)
                reason, connected = f"cannot connect ({type(error.__cause__).__name__})", False
            except (openai.APIResponseValidationError, ValueError):
                self._lost(request, held)
                reason = "the reply is not JSON"
            else:
                if isinstance(getattr(reply, "choices", None), list):
                    self._alive, self.negotiated = True, self.negotiated or request.schema is not None
                    self.limiter.answered(raw.headers)
                    record = self._record(reply, request)
                    usage = record["usage"] or {}
                    self.budget.settle(held, usage.get("prompt_tokens"), usage.get("completion_tokens"))
                    return record if record["usage"] else {**record, "worst_case": _as_usage(held)}
                self._lost(request, held)
                reason = "the reply is not a chat completion"
            if request.tries >= (ATTEMPTS if connected or self._alive else 3):
                raise RequestFailed(f"{self._endpoint.base_url}: {reason}, tried {request.tries} times.")
            if wait is None:
                await asyncio.sleep(_backoff(request.tries))
            elif wait > LONGEST_WAIT:
                raise PeerError(f"{self._endpoint.base_url} asks to wait {wait:.0f} s. The same command continues.")
            else:
                self.limiter.refused(wait)

    def _lost(self, request: Ask, held: Any) -> None:
        """Count a try that may have been billed at its worst."""
        self.budget.settle(held, None, None)
        request.unknown += 1

    def worst_case(self, request: Ask) -> dict[str, int]:
        """Return what the tries without an answer may have cost, for the log."""
        held = self.budget.worst_case(request.prompt, self._config.max_tokens)
        return {key: request.unknown * value for key, value in _as_usage(held).items()}

    def _body(self, request: Ask) -> dict[str, Any]:
        return request_body(self._config, request, LADDER[self._rung], self._limit_key)

    def _record(self, reply: Any, request: Ask) -> dict[str, Any]:
        choice = reply.choices[0] if reply.choices else None
        message, usage = getattr(choice, "message", None), getattr(reply, "usage", None)
        texts = {name: getattr(message, name, None) for name in ("content", "refusal")}
        calls = getattr(message, "tool_calls", None)
        if calls:
            texts["content"] = getattr(getattr(calls[0], "function", None), "arguments", None)
        counted = {name: getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
        return {
            **{name: self._endpoint.scrub(text) if isinstance(text, str) else None for name, text in texts.items()},
            "finish_reason": getattr(choice, "finish_reason", None),
            "usage": counted if all(isinstance(count, int) for count in counted.values()) else None,
            "model": getattr(reply, "model", None),
            "format": LADDER[self._rung] if request.schema else "text",
            "tries": request.tries,
        }

    def _check_fatal(self, error: openai.APIStatusError, reason: str) -> None:
        model, url, key = self._config.model, self._endpoint.base_url, self._endpoint.key_name
        if error.status_code == 401:
            raise ConfigError(f"{url} does not accept the key in {key}, {reason}") from error
        if error.status_code == 403:
            raise ConfigError(f"The key in {key} may not use model '{model}' at {url}, {reason}") from error
        if error.status_code == 404:
            raise ConfigError(f"{url} has no model '{model}', or the address is wrong, {reason}") from error
        if "insufficient_quota" in (error.code, error.type):
            raise PeerError(f"The account behind {key} has no credit left at {url}, {reason}") from error
        if error.code == "context_length_exceeded":
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


def request_body(config: DatagenConfig, request: Ask, rung: str, limit_key: str = "max_tokens") -> dict[str, Any]:
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


def _as_usage(held: Any) -> dict[str, int]:
    return {"prompt_tokens": held.tokens_in, "completion_tokens": held.tokens_out}


def _backoff(attempt: int) -> float:
    return min(30.0, 0.5 * 2 ** (attempt - 1)) * random.uniform(0.75, 1.25)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue  # absent, or a date
    return None
