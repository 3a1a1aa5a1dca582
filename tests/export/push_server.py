"""A local server with the part of the Hugging Face Hub that receives uploads (``HF_ENDPOINT``).

The Hub's own client talks to it, so what is tested is what goes over the wire; what it does not know it refuses.
"""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class PushServer(ThreadingHTTPServer):
    """Takes uploads into memory."""

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.token = token
        self.created: list[dict] = []
        """What the client asked for, of each new repository."""
        self.files: dict[str, bytes] = {}
        """What was committed."""


@contextmanager
def serve(token: str) -> Iterator[PushServer]:
    """Runs a server for as long as the context is open."""
    with PushServer(token) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class Handler(BaseHTTPRequestHandler):
    """Makes a repository, says how each file is to come, and takes the commit. Each answer ends its connection."""

    protocol_version = "HTTP/1.1"
    server: PushServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.reply({"error": "Invalid username or password."}, 401)
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.reply({"url": f"{self.server.url}/org/name"})
        if self.path == "/api/models/org/name/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self.reply({"files": modes})
        if re.fullmatch(r"/api/models/org/name/commit/main(\?.*)?", self.path):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.reply({"commitUrl": f"{self.server.url}/org/name/commit/1", "commitOid": "1"})
        return self.reply({"error": f"unknown: {self.path}"}, 404)

    def do_GET(self) -> None:
        self.reply({"error": f"unknown: {self.path}"}, 404)

    def reply(self, content: object, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""
