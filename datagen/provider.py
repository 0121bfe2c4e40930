"""One request to an OpenAI-compatible server, until it is answered or clearly will not be."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import Any

import openai

from datagen.cells import JSON_SCHEMA
from datagen.settings import DatagenConfig, Endpoint
from launch.errors import ConfigError, PeerError

ATTEMPTS = 8
LONGEST_WAIT = 300.0
# From strict to none: a server that refuses one is asked with the next. Whatever it accepts, replies are checked here.
FORMATS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "json_schema",
        {"type": "json_schema", "json_schema": {"name": "example", "strict": True, "schema": JSON_SCHEMA}},
    ),
    ("json_object", {"type": "json_object"}),
    ("plain", {}),
)


class RequestFailed(PeerError):
    """This request got no reply; another one may."""


class Provider:
    """Asks with bounded retries; a 429 holds back every request, not only the one that met it."""

    def __init__(self, config: DatagenConfig, endpoint: Endpoint, say: Callable[[str], None]) -> None:
        self._config, self._endpoint, self._say = config, endpoint, say
        self._client = openai.AsyncOpenAI(
            api_key=endpoint.key, base_url=endpoint.base_url, max_retries=0, timeout=config.timeout
        )
        self._limit_key = "max_tokens"
        self._format = 0
        self._refusals = 0  # of the current format
        self._open_at = 0.0  # nothing is sent before this time of the loop's clock
        self._alive = False
        self.negotiated = False  # a structured request was accepted: the format is settled

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, prompt: str, *, structured: bool = False) -> dict[str, Any]:
        """Return what the model replied, good or bad, as a record for the log.

        Raises:
            RequestFailed: no reply after every retry, or the server refuses this request.
            ConfigError, PeerError: no request can succeed (key, model, quota).
        """
        for attempt in range(1, 1_000_000):
            await self._cool_down()
            wait, connected = None, True
            try:
                reply = await self._client.chat.completions.create(**self._request(prompt, structured))
            except openai.APIStatusError as error:
                self._alive = True
                reason = f"HTTP {error.status_code}: {self._words(error)}"
                self._check_fatal(error, reason)
                if self._adapt(error, structured):
                    continue
                if error.status_code < 500 and error.status_code not in (408, 409, 429):
                    if structured and self.negotiated:
                        raise RequestFailed(reason) from error
                    raise ConfigError(f"{self._endpoint.base_url} refuses the request, {reason}") from error
                wait = _retry_after(error.response.headers)
                if wait is None and error.status_code == 429:
                    wait = _backoff(attempt)
            except openai.APITimeoutError:
                reason = f"no reply within {self._config.timeout:g} s"
            except openai.APIConnectionError as error:
                reason, connected = f"cannot connect ({type(error.__cause__).__name__})", False
            except (openai.APIResponseValidationError, ValueError):
                reason = "the reply is not JSON"
            else:
                if isinstance(getattr(reply, "choices", None), list):
                    self._alive, self.negotiated = True, self.negotiated or structured
                    return self._record(reply, structured)
                reason = "the reply is not a chat completion"
            if attempt >= (ATTEMPTS if connected or self._alive else 3):
                raise RequestFailed(f"{self._endpoint.base_url}: {reason}, tried {attempt} times.")
            if wait is None:
                await asyncio.sleep(_backoff(attempt))
            elif wait > LONGEST_WAIT:
                raise PeerError(f"{self._endpoint.base_url} asks to wait {wait:.0f} s. The same command continues.")
            else:
                self._open_at = max(self._open_at, asyncio.get_running_loop().time() + wait)
        raise AssertionError("unreachable")

    def _request(self, prompt: str, structured: bool) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._config.model, "messages": [{"role": "user", "content": prompt}]}
        body[self._limit_key] = self._config.max_tokens
        if self._config.temperature is not None:
            body["temperature"] = self._config.temperature
        if structured and FORMATS[self._format][1]:
            body["response_format"] = FORMATS[self._format][1]
        return body

    def _record(self, reply: Any, structured: bool) -> dict[str, Any]:
        choice = reply.choices[0] if reply.choices else None
        message, usage = getattr(choice, "message", None), getattr(reply, "usage", None)
        texts = {name: getattr(message, name, None) for name in ("content", "refusal")}
        return {
            **{name: self._endpoint.scrub(text) if isinstance(text, str) else None for name, text in texts.items()},
            "finish_reason": getattr(choice, "finish_reason", None),
            "usage": {name: getattr(usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens")},
            "model": getattr(reply, "model", None),
            "format": FORMATS[self._format][0] if structured else "text",
        }

    def _check_fatal(self, error: openai.APIStatusError, reason: str) -> None:
        model, url = self._config.model, self._endpoint.base_url
        if error.status_code == 401:
            raise ConfigError(f"{url} does not accept the key in OPENAI_API_KEY, {reason}") from error
        if error.status_code == 403:
            raise ConfigError(f"The key in OPENAI_API_KEY may not use model '{model}' at {url}, {reason}") from error
        if error.status_code == 404:
            raise ConfigError(f"{url} has no model '{model}', or the address is wrong, {reason}") from error
        if "insufficient_quota" in (error.code, error.type):
            raise PeerError(f"The account behind OPENAI_API_KEY has no credit left at {url}, {reason}") from error

    def _adapt(self, error: openai.APIStatusError, structured: bool) -> bool:
        """Change the request to what the server takes; true when it is worth asking again at once."""
        if error.status_code == 400 and "max_completion_tokens" in str(error) and self._limit_key == "max_tokens":
            self._limit_key = "max_completion_tokens"
            return True
        if not structured or self.negotiated or error.status_code not in (400, 422, 500):
            return False
        self._refusals += 1
        # Some servers refuse with a 500. One of them can be an accident, so it takes two.
        if self._format + 1 == len(FORMATS) or (error.status_code == 500 and self._refusals < 2):
            return False
        self._say(f"The server refuses {FORMATS[self._format][0]}; asking for {FORMATS[self._format + 1][0]} instead.")
        self._format, self._refusals = self._format + 1, 0
        return True

    async def _cool_down(self) -> None:
        clock = asyncio.get_running_loop().time
        while (left := self._open_at - clock()) > 0:
            await asyncio.sleep(left + random.uniform(0, 0.2))

    def _words(self, error: openai.APIStatusError) -> str:
        return self._endpoint.scrub(" ".join(error.message.split()))[:300]


def _backoff(attempt: int) -> float:
    return min(30.0, 0.5 * 2 ** (attempt - 1)) * random.uniform(0.75, 1.25)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue  # absent, or a date
    return None
