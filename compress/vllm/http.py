"""Bits over HTTP: ``vllm serve … --middleware compress.vllm.http.BitsMiddleware`` adds this to vLLM's server.

``GET /compress/bits`` tells them, ``POST /compress/bits`` with ``{"bits": 3}`` changes them in all workers, between two steps of the engine;
``{"bits": "load"}`` lets the number of requests decide again. Every answer to a POST under ``/v1/`` has in its header
``x-compress-bits`` the bits in use from its arrival to the beginning of its answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from compress.vllm.load import LoadPolicy, load_policy

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]

PATH, HEADER = "/compress/bits", b"x-compress-bits"
_MOST_BYTES = 10_000


class BitsMiddleware:
    """Tell and change the bits of an engine; ASGI middleware around the application of vLLM's server."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._told: dict[str, Any] = {}  # what the workers say of their bits; empty until they have been asked
        self._policy: LoadPolicy | None = None
        self._by_load = False
        self._seen: dict[int, list[Any]] = {}  # for every request on its way, the bits that it has met
        self._changing = asyncio.Lock()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Answer what is about bits, and mark other answers with them."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and path == PATH:
            status, answer = await self._answer(scope, receive)
            await _send_json(send, status, answer)
        elif scope["type"] == "http" and scope["method"] == "POST" and path.startswith("/v1/"):
            await self._pass_on(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _pass_on(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Let vLLM answer a request, at the bits for so many."""
        engine, key = scope["app"].state.engine_client, id(scope)
        if not self._told:
            await self._ask(engine)
        self._seen[key] = []
        await self._adapt(engine)
        self._seen[key].append(self._told.get("bits"))

        async def marked(message: _Message) -> None:
            if message["type"] == "http.response.start":
                met = ",".join(dict.fromkeys(map(str, self._seen[key])))
                message = {**message, "headers": [*message.get("headers", []), (HEADER, met.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, marked)
        finally:
            del self._seen[key]
            await self._adapt(engine)

    async def _ask(self, engine: Any) -> None:
        """Learn the bits of the workers, which all have the same."""
        self._told = (await engine.collective_rpc("compress_bits"))[0]
        extra = (engine.vllm_config.additional_config or {}).get("compress") or {}
        if extra.get("by_load"):
            self._policy, self._by_load = load_policy(extra["by_load"]), True

    async def _adapt(self, engine: Any) -> None:
        """Change the bits as long as the number of requests asks for it; who comes meanwhile leaves it to that."""
        if self._policy is None or not self._by_load or self._changing.locked():
            return
        async with self._changing:
            while (bits := self._policy.next(self._told["bits"], len(self._seen))) is not None:
                if await self._set(engine, bits) is not None:
                    break

    async def _set(self, engine: Any, bits: Any) -> str | None:
        """Set the bits of all workers, by whoever holds the lock; return what is wrong with them, or None."""
        wrong: str | None = (await engine.collective_rpc("compress_set_bits", args=(bits,)))[0]
        if wrong is None:
            self._told = (await engine.collective_rpc("compress_bits"))[0]
            await engine.reset_prefix_cache()
            for met in self._seen.values():
                met.append(self._told["bits"])
        return wrong

    async def _answer(self, scope: _Message, receive: _Receive) -> tuple[int, Any]:
        """Return the status and the content for a request about bits."""
        state = scope["app"].state
        if not _may(scope, getattr(state.args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]):
            return 401, _error("give the server's API key as 'Authorization: Bearer KEY'.")
        engine = state.engine_client
        try:
            await self._ask(engine) if not self._told else None
            if scope["method"] == "POST":
                asked = _asked(await _body(receive))
                if asked == "load" and self._policy is None:
                    raise ValueError("this server was started without --bits-by-load.")
                self._by_load = asked == "load"
                if not self._by_load:
                    async with self._changing:
                        wrong = await self._set(engine, asked)
                    if wrong is not None:
                        raise ValueError(wrong)
            elif scope["method"] != "GET":
                return 405, _error(f"{PATH} knows GET and POST.")
        except ValueError as error:
            return 400, _error(str(error))
        return 200, {**self._told, "by_load": self._by_load}


def _asked(body: bytes) -> Any:
    """Read the bits that a request asks for."""
    try:
        asked = json.loads(body)["bits"]
    except (ValueError, KeyError, TypeError):
        raise ValueError('send {"bits": 4}, a mean such as 3.5, or "load".') from None
    if asked != "load" and (isinstance(asked, bool) or not isinstance(asked, int | float)):
        raise ValueError(f'bits {asked!r}: send a number, a mean such as 3.5, or "load".')
    return asked


def _may(scope: _Message, keys: list[str | None]) -> bool:
    """Tell whether a request has one of the keys, if there are any: vLLM guards its own paths alone."""
    given = dict(scope["headers"]).get(b"authorization", b"")
    wanted = [f"Bearer {key}".encode() for key in keys if key]
    return not wanted or any(secrets.compare_digest(given, one) for one in wanted)


async def _body(receive: _Receive) -> bytes:
    body, more = b"", True
    while more and len(body) < _MOST_BYTES:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}


async def _send_json(send: _Send, status: int, content: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode() + b"\n"})
