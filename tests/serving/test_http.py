"""Bits over HTTP and by load, against an engine that only remembers what it was told."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from compress.errors import CompressError
from compress.vllm.http import BitsMiddleware
from compress.vllm.load import load_policy


class Engine:
    slow = 0  # seconds that a call takes

    def __init__(self, by_load=None):
        self.bits, self.resets = 8, 0
        self.vllm_config = SimpleNamespace(additional_config={"compress": {"by_load": by_load}})

    async def collective_rpc(self, name, args=()):
        await asyncio.sleep(self.slow)
        if name == "compress_bits":
            return [{"bits": self.bits, "held": [3, 8]}] * 2
        if args[0] > 8:
            return [f"{args[0]} bits are not available"] * 2
        self.bits = args[0]
        return [None, None]

    async def reset_prefix_cache(self):
        self.resets += 1


class Server:
    """The middleware around an application that answers when it is let."""

    def __init__(self, by_load=None, api_key=None):
        self.engine, self.go = Engine(by_load), asyncio.Event()
        self.middleware = BitsMiddleware(self._application)
        self.state = SimpleNamespace(engine_client=self.engine, args=SimpleNamespace(api_key=api_key))

    async def _application(self, scope, receive, send):
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(self, method, path, content=None, key=None):
        """Return the status, the headers and the content of an answer."""
        sent = []
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": headers,
            "app": SimpleNamespace(state=self.state),
        }

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            sent.append(message)

        await self.middleware(scope, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"]), json.loads(sent[1]["body"])

    async def bits(self, content, **more):
        status, _, answer = await self.ask("POST", "/compress/bits", content, **more)
        return status, answer


def test_bits_are_told_and_changed_and_what_was_kept_of_earlier_text_is_dropped():
    async def main():
        server = Server()
        assert await server.ask("GET", "/compress/bits") == (
            200,
            {b"content-type": b"application/json"},
            {"bits": 8, "held": [3, 8], "by_load": False},
        )
        assert await server.bits({"bits": 4}) == (200, {"bits": 4, "held": [3, 8], "by_load": False})
        assert (server.engine.bits, server.engine.resets) == (4, 1)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x", "send {"),
        ({"bit": 3}, "send {"),
        ([3], "send {"),
        ({"bits": True}, "bits True: send a number"),
        ({"bits": "four"}, "bits 'four': send a number"),
        ({"bits": 9}, "9 bits are not available"),
        ({"bits": "load"}, "this server was started without --bits-by-load"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(content, message):
    async def main():
        server = Server()
        status, answer = await server.bits(content)
        assert status == 400
        assert message in answer["error"]["message"]
        assert server.engine.bits == 8

    asyncio.run(main())


def test_bits_are_behind_the_servers_key():
    async def main():
        server = Server(api_key=["secret"])
        assert (await server.bits({"bits": 3}))[0] == 401
        assert (await server.bits({"bits": 3}, key="wrong"))[0] == 401
        assert (await server.bits({"bits": 3}, key="secret"))[0] == 200

    asyncio.run(main())


def test_an_answer_has_the_bits_that_it_met():
    async def main():
        server = Server()
        waiting = asyncio.create_task(server.ask("POST", "/v1/completions", {}))
        await asyncio.sleep(0.01)
        await server.bits({"bits": 3})
        server.go.set()
        assert (await waiting)[1] == {b"x-own": b"1", b"x-compress-bits": b"8,3"}
        assert (await server.ask("POST", "/v1/completions", {}))[1][b"x-compress-bits"] == b"3"

    asyncio.run(main())


def test_many_requests_get_fewer_bits_and_more_again_when_they_are_done():
    async def main():
        server = Server(by_load="8,4:3,3:6")
        waiting, seen = [], []
        for _ in range(7):
            waiting.append(asyncio.create_task(server.ask("POST", "/v1/completions", {})))
            for _ in range(20):
                await asyncio.sleep(0)
            seen.append(server.engine.bits)
        assert seen == [8, 8, 4, 4, 4, 3, 3]
        server.go.set()
        answers = await asyncio.gather(*waiting)
        assert server.engine.bits == 8
        assert answers[0][1][b"x-compress-bits"] == b"8,4,3"
        assert (await server.bits({"bits": 4}))[1]["by_load"] is False
        await server.ask("POST", "/v1/completions", {})
        assert server.engine.bits == 4  # whoever sets them decides, until "load" is sent
        assert (await server.bits({"bits": "load"}))[1]["by_load"] is True
        await server.ask("POST", "/v1/completions", {})
        assert server.engine.bits == 8

    asyncio.run(main())


def test_requests_that_end_during_a_change_count_too():
    async def main():
        server = Server(by_load="8,4:2,3:6")
        server.engine.slow = 0.01
        waiting = [asyncio.create_task(server.ask("POST", "/v1/completions", {})) for _ in range(8)]
        await asyncio.sleep(0.2)
        assert server.engine.bits == 3
        server.go.set()
        await asyncio.gather(*waiting)
        assert server.engine.bits == 8

    asyncio.run(main())


def test_bits_go_up_only_where_twice_the_requests_would_let_them():
    policy = load_policy("8,4,3")
    assert [policy.at(requests) for requests in (0, 3, 4, 15, 16, 500)] == [8, 8, 4, 4, 3, 3]
    assert policy.next(8, 3) is None
    assert policy.next(8, 4) == 4
    assert policy.next(4, 3) is None
    assert policy.next(4, 1) == 8
    assert policy.next(3, 7) == 4


@pytest.mark.parametrize("text", ["8", "4,8", "8,x", "8,4:4,3:4", "8:2,4", "8,,3", ""])
def test_a_policy_that_makes_no_sense_is_refused(text):
    with pytest.raises(CompressError, match="--bits-by-load"):
        load_policy(text)
