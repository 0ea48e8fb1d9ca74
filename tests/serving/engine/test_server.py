"""Servers that ``compress serve`` starts, and real clients that talk to them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
from engine_helpers import greedy_text

TEMPLATE = "{% for message in messages %}# {{ message['content'] }}\n{% endfor %}def "
KEY = "secret"
PROMPTS = ["def main():", "import os\nimport", "class Node:", "for i in range(", "return self."]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(folder, *options, port=None, key=KEY, limit=240):
    """Run ``compress serve`` until it says that it is ready; end it as Ctrl-C does, and see that it ends cleanly."""
    port = port or free_port()
    command = [sys.executable, "-m", "compress.cli", "serve", str(folder), "--port", str(port), *options]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **({"VLLM_API_KEY": key} if key else {})}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    said, timer = [], threading.Timer(limit, process.kill)
    timer.start()
    for line in process.stdout:
        said.append(line)
        if line.startswith("curl "):
            break
    timer.cancel()
    assert said and said[-1].startswith("curl "), "".join(said)
    threading.Thread(target=process.stdout.read, daemon=True).start()
    try:
        yield port, "".join(said)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def call(port, path, content=None, key=KEY):
    """Return the status and the content of an answer."""
    data = content if isinstance(content, bytes | None) else json.dumps(content).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    """A checkpoint of a model that has a chat template."""
    found = tmp_path_factory.mktemp("chat") / "chatty"
    shutil.copytree(checkpoints("shared"), found)
    (found / "chat_template.jinja").write_text(TEMPLATE)
    return found


@pytest.fixture(scope="module")
def running(folder):
    options = ("--bits", "4", "--held-bits", "6", "--", "--dtype", "float32", "--max-model-len", "256")
    with server(folder, *options) as (port, said):
        assert "serves chatty at 4 bits: " in said
        assert f"http://127.0.0.1:{port}/v1 (Ctrl-C ends it)" in said
        yield port


@pytest.fixture
def client(running):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{running}/v1", api_key=KEY, max_retries=0)


def set_bits(port, bits):
    assert call(port, "/compress/bits", {"bits": bits}) == (200, {"bits": bits, "held": [2, 6], "by_load": False})


def told_in_the_end(port):
    """Return what the server says of its bits once they no longer change: a change may follow an answer."""
    before, told = None, call(port, "/compress/bits")[1]
    while before != told:
        time.sleep(1)
        before, told = told, call(port, "/compress/bits")[1]
    return told


def complete(client, prompt, **more):
    return client.completions.create(model="chatty", prompt=prompt, temperature=0, max_tokens=16, **more).choices[0]


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_completions_are_those_of_the_library_at_every_number_of_bits(client, running, folder, bits):
    set_bits(running, bits)
    assert [complete(client, prompt).text for prompt in PROMPTS] == greedy_text(folder, bits, PROMPTS, 16)


def test_an_answer_says_its_bits(client, running):
    set_bits(running, 3)
    raw = client.completions.with_raw_response.create(model="chatty", prompt="x", max_tokens=2)
    assert raw.headers["x-compress-bits"] == "3"


def test_chat_uses_the_models_template_and_streams(client, running, folder):
    set_bits(running, 4)
    asked = {"model": "chatty", "temperature": 0, "max_tokens": 16}
    messages = [{"role": "user", "content": "Sort a list."}]
    whole = client.chat.completions.create(messages=messages, **asked).choices[0].message.content
    assert [whole] == greedy_text(folder, 4, ["# Sort a list.\ndef "], 16)
    parts = client.chat.completions.create(messages=messages, stream=True, **asked)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole


def test_stop_strings_and_log_probabilities(client, running):
    set_bits(running, 4)
    found = complete(client, "import os\nimport", logprobs=3)
    assert len(found.logprobs.tokens) == 16
    assert all(value <= 0 for value in found.logprobs.token_logprobs)
    stop = found.text[4:7]
    ended = complete(client, "import os\nimport", stop=[stop])
    assert ended.finish_reason == "stop"
    assert ended.text == found.text[: found.text.index(stop)]


def test_requests_at_once_say_what_each_says_alone(client, running):
    set_bits(running, 4)
    alone = [complete(client, prompt).text for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(lambda prompt: complete(client, prompt).text, PROMPTS)) == alone


def test_no_request_of_many_is_lost_while_bits_change(client, running):
    """200 requests of 16 clients."""
    done = threading.Event()

    def keep_changing():
        place = 0
        while not done.wait(1):
            set_bits(running, (2, 6, 4)[place % 3])
            place += 1
        return place

    with ThreadPoolExecutor(17) as pool:
        changes = pool.submit(keep_changing)
        answers = list(pool.map(lambda i: complete(client, f"x{i} ="), range(200)))
        done.set()
        assert changes.result() >= 1
    assert len(answers) == 200
    assert all(answer.finish_reason in ("length", "stop") for answer in answers)
    set_bits(running, 4)


def test_a_client_that_goes_away_leaves_the_others_alone(client, running):
    stream = client.completions.create(model="chatty", prompt="def ", max_tokens=200, stream=True, temperature=0)
    next(iter(stream))
    stream.close()
    assert complete(client, "def ").finish_reason == "length"


def test_mistakes_of_a_client_are_told(client, running):
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        complete(client, "x " * 2000)
    status, text = call(running, "/v1/completions", b"{malformed")
    assert status in (400, 422)
    assert "JSON" in text
    assert call(running, "/v1/completions", {"model": "chatty", "prompt": "x"}, key="wrong")[0] == 401
    assert call(running, "/compress/bits", {"bits": 3}, key="wrong")[0] == 401
    assert "9 bits are not available" in call(running, "/compress/bits", {"bits": 9})[1]
    assert complete(client, "def ").finish_reason == "length"


def test_bits_by_load_and_a_server_that_is_started_again(folder):
    """At the same port, after the first was ended."""
    port = free_port()
    options = ("--bits-by-load", "6,4:3,2:8", "--", "--max-model-len", "128")
    for _ in range(2):
        with server(folder, *options, port=port) as (_, said):
            assert "at 6 bits" in said
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)

            def bits_of(number, client=client):
                raw = client.completions.with_raw_response
                return raw.create(model="chatty", prompt=f"{number}", max_tokens=100).headers["x-compress-bits"]

            assert bits_of(0) == "6"
            with ThreadPoolExecutor(24) as pool:
                met = set(",".join(pool.map(bits_of, range(24))).split(","))
            assert met == {"6", "4", "2"}
            assert told_in_the_end(port) == {"bits": 6, "held": [2, 6], "by_load": True}


def test_transformers_own_server_says_what_the_library_says(folder):
    with server(folder, "--bits", "3", "--engine", "transformers", key=None) as (port, said):
        assert "transformers" in said
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        found = [complete(client, prompt).text for prompt in PROMPTS[:2]]
    assert found == greedy_text(folder, 3, PROMPTS[:2], 16)
