"""The model card of a checkpoint, and its upload to a stand-in for the hub's HTTP interface."""

import base64
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import yaml
from huggingface_hub import ModelCard

import compress
from compress.card import add_measured, write_card
from compress.errors import CompressError
from compress.publish import push


class Hub(BaseHTTPRequestHandler):
    """Answer as the hub does to who uploads a folder, and keep the files: safetensors as large ones, others within the commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        here, path = self.server, self.path
        here.asked.append((path, self.headers.get("Authorization")))
        if path == "/api/repos/create":
            here.created = json.loads(body)
            return self.answer({"url": f"{here.address}/me/small", "name": "me/small", "id": "me/small"})
        if path == "/api/validate-yaml":
            here.card = json.loads(body)["content"]
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            large = {file["path"]: file["path"].endswith("safetensors") for file in json.loads(body)["files"]}
            modes = [
                {"path": p, "uploadMode": "lfs" if big else "regular", "shouldIgnore": False}
                for p, big in large.items()
            ]
            return self.answer({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{here.address}/put/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        assert path.endswith("/commit/main"), path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                here.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "lfsFile":
                here.files[line["value"]["path"]] = here.sent[line["value"]["oid"]]
        return self.answer({"commitUrl": f"{here.address}/me/small/commit/{'a' * 40}", "commitOid": "a" * 40})

    def do_PUT(self):
        self.server.sent[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_GET(self):
        self.answer({"id": "me/small", "sha": "a" * 40, "siblings": [], "private": False, "tags": [], "downloads": 0})

    def answer(self, what):
        body = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.files, server.sent, server.card, server.created = [], {}, {}, "", {}
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()


@pytest.mark.slow
def test_a_checkpoint_is_pushed_with_its_card(hub, compressed):
    given = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [
        sys.executable,
        "-m",
        "compress.cli",
        "push",
        str(compressed),
        "me/small",
        "--private",
        "--token",
        "hf_x",
    ]
    process = subprocess.run(command, capture_output=True, text=True, env=given)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == f"{hub.address}/me/small"
    there = {path.relative_to(compressed).as_posix(): path for path in compressed.rglob("*") if path.is_file()}
    assert {name: len(content) for name, content in hub.files.items()} == {
        n: p.stat().st_size for n, p in there.items()
    }
    assert all(hub.files[name] == path.read_bytes() for name, path in there.items())
    assert hub.created.get("private") or hub.created["visibility"] == "private"  # by release of huggingface_hub
    assert hub.card == (compressed / "README.md").read_text()
    assert {token for _, token in hub.asked} == {"Bearer hf_x"}


def test_what_cannot_be_pushed_is_refused_in_a_sentence(compressed, tiny_llama, tmp_path):
    with pytest.raises(CompressError, match="is no checkpoint that compress wrote"):
        push(tiny_llama, "me/small")
    with pytest.raises(CompressError, match="give the repository as OWNER/NAME"):
        push(compressed, "small")
    with pytest.raises(CompressError, match="me/small: the hub did not take the checkpoint"):
        push(compressed, "me/small")  # offline, as tests are


def test_a_card_says_what_the_checkpoint_is(compressed):
    card = ModelCard.load(compressed / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["compress", "any_precision"]
    assert card.data.base_model is None  # a folder, which nobody else has
    at = compress.manifest.read_manifest(compressed)["sizes"]["tensors_at_bits"]
    for bits, size in at.items():
        assert f"| {bits} bits | {size / 1e6:.2f} |" in card.text
        assert f'compress.load("ORG/NAME", bits={bits})' in card.text
        assert f"--hf-overrides.compress_bits {bits}" in card.text
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe["passes"] == [{"kind": "any_precision", "parent_bits": 6}]
    assert "/" not in recipe["model"] + recipe["calibration"]["text"]


@pytest.mark.slow
def test_a_card_has_licence_and_base_and_may_be_written_again(recipe, make_model, tmp_path, monkeypatch, verify):
    """The licence is the dense model's; a table comes when there is one, and ``verify`` takes either card."""
    source = make_model("llama", intermediate_size=64)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: them/parent\n---\nTheirs.\n")
    recipe |= {"model": str(source), "passes": [{"kind": "rtn", "bits": 4}]}
    folder = compress.run(recipe, tmp_path / "model")
    assert ModelCard.load(folder / "README.md").data.license == "apache-2.0"
    assert ModelCard.load(folder / "README.md").data.base_model is None
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMine.\n")
    for loss in ("1.5", "1.4"):
        add_measured(folder, f"| bits | loss |\n|---|---:|\n| 4 | {loss} |")
    card = ModelCard.load(folder / "README.md")
    assert card.text.count("## Measured\n\n| bits | loss |") == 1
    assert "1.4" in card.text
    assert "1.5" not in card.text
    assert (
        card.text.index("## Load")
        < card.text.index("## Measured")
        < card.text.index("## Recipe")
        < card.text.index("Mine.")
    )
    assert card.data.license == "apache-2.0"
    assert verify(folder)
    (source / "README.md").unlink()


def test_a_card_names_the_base_on_the_hub(compressed, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(compressed, folder)
    manifest = json.loads((folder / "compression.json").read_text())
    manifest["recipe"]["model"] = {"name": "them/parent", "revision": "v1"}
    (folder / "compression.json").write_text(json.dumps(manifest))
    write_card(folder, source=tmp_path)
    assert ModelCard.load(folder / "README.md").data.base_model == "them/parent"


def test_a_card_whose_metadata_is_no_yaml_is_refused(compressed, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(CompressError, match="its metadata is not YAML"):
        write_card(compressed, source=tmp_path)
