"""Uploads to the Hugging Face hub, on a server of its interface in this process."""

import base64
import http.server
import json
import threading

import huggingface_hub
import pytest
from huggingface_hub import constants

from cddistill import commands, hub


class Hub(http.server.BaseHTTPRequestHandler):
    """Takes every file as a regular one, and keeps what is sent."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self.chunk, b""))
        server = self.server
        server.tokens.add(self.headers.get("Authorization"))
        if server.refuses:
            return self.answer({"error": "you may not write here"}, 403)
        if self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            return self.answer({"url": f"http://127.0.0.1:{server.server_port}/me/student"})
        if self.path == "/api/validate-yaml":
            return self.answer({})
        if self.path.startswith(f"/api/{server.kind}/me/student/preupload/"):
            files = [
                {"path": x["path"], "uploadMode": "regular", "shouldIgnore": False} for x in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        assert self.path.startswith(f"/api/{server.kind}/me/student/commit/"), self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.path}/0"})

    def chunk(self):
        """The next part of a body whose length was not known."""
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A hub; .files are what was committed, and with .refuses it takes nothing."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.tokens, server.refuses, server.kind, server.created = {}, set(), False, "models", []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def student(tmp_path):
    (tmp_path / "student" / "unet").mkdir(parents=True)
    (tmp_path / "student" / "README.md").write_text("---\nlibrary_name: diffusers\n---\n# A student\n")
    (tmp_path / "student" / "unet" / "config.json").write_text("{}")
    (tmp_path / "student" / "unet" / "weights.safetensors").write_bytes(bytes(range(256)))
    return tmp_path / "student"


def test_a_folder_is_uploaded_with_its_card(server, student):
    hub.check("me/student")
    assert hub.push(student, "me/student", "Export") == f"{constants.ENDPOINT}/me/student"
    assert {*server.files} == {"README.md", "unet/config.json", "unet/weights.safetensors"}
    assert server.files["unet/weights.safetensors"] == bytes(range(256))
    assert b"# A student" in server.files["README.md"]
    assert server.tokens == {"Bearer hf_secret"}


def test_a_space_is_uploaded_as_one(server, student):
    server.kind = "spaces"
    hub.push(student, "me/student", "Export", space=True)
    assert (server.created[0]["type"], server.created[0]["sdk"]) == ("space", "gradio")
    assert "README.md" in server.files


def test_a_refusal_is_one_sentence_without_the_token(server, student):
    server.refuses = True
    with pytest.raises(ValueError, match=r"--push_to_hub=me/student failed \(.*403.*\): check the name") as refused:
        hub.push(student, "me/student", "Export")
    assert "\n" not in str(refused.value)
    assert "hf_secret" not in str(refused.value)


def test_a_hub_that_is_not_there_is_one_sentence(server, student, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"--push_to_hub=me/student failed"):
        hub.push(student, "me/student", "Export")


def test_a_missing_token_and_a_wrong_name_are_found_before_anything_is_computed(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"--push_to_hub=me/student needs a token: set HF_TOKEN"):
        hub.check("me/student")
    for name in ("student", "me/you/student", "me/a student", "/"):
        with pytest.raises(ValueError, match="is no name of a repository: write user/name"):
            hub.check(name)
    with pytest.raises(ValueError, match="--push_to_hub is for an export as a folder"):
        commands.export_run({}, tmp_path / "run", f"{tmp_path}/student.onnx", "latest", "me/student")
    with pytest.raises(ValueError, match="needs a token"):
        commands.export_run({}, tmp_path / "run", f"{tmp_path}/student", "latest", "me/student")
