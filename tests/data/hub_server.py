"""A Hugging Face Hub as far as reading datasets goes, over HTTP on 127.0.0.1 (``HF_ENDPOINT``).

The Hub's own client talks to it, so what is tested is what goes over the wire; what it does not know it refuses.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


class HubServer(ThreadingHTTPServer):
    """Holds datasets in memory: name to branch to the branch's files."""

    daemon_threads = True

    def __init__(self, datasets: dict[str, dict[str, Files]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, dict[str, Files]] = {name: {} for name in datasets}
        self.branches: dict[str, dict[str, str]] = {name: {} for name in datasets}
        for name, branches in datasets.items():
            for branch, files in branches.items():
                self.push(name, branch, files)
        self.requests: list[str] = []
        """Method and path of each request."""
        self.sent: dict[str, int] = {}
        """Bytes of each file that were asked for."""
        self.hangs_up: Callable[[], bool] = lambda: False
        """Asked before a file is sent."""

    def push(self, name: str, branch: str, files: Files) -> str:
        """Makes these the files of a branch; returns the commit."""
        listed = repr([(path, sha1(data).hexdigest()) for path, data in sorted(files.items())])
        commit = sha1(f"{name} {branch} {listed}".encode()).hexdigest()
        self.commits[name][commit], self.branches[name][branch] = files, commit
        return commit


@contextmanager
def serve(datasets: dict[str, dict[str, Files]]) -> Iterator[HubServer]:
    """Runs a server for as long as the context is open."""
    with HubServer(datasets) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class Handler(BaseHTTPRequestHandler):
    """The client's questions about a dataset and its requests for files."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {unquote(path)}")
        api = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if found is None or found.group(1) not in self.server.commits:
            return self.fail("RepoNotFound")
        name = found.group(1)
        revision = unquote((file.group(2) if file else api and api.group(3)) or "main")
        commit = self.server.branches[name].get(revision, revision)
        files = self.server.commits[name].get(commit)
        if files is None:
            return self.fail("RevisionNotFound")
        if file:
            return self.send_file(files, unquote(file.group(3)), commit)
        kind, below = api.group(2), unquote(api.group(4) or "")
        if kind == "paths-info":
            text = body.decode()
            wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
            return self.reply([entry for entry in entries(files) if entry["path"] in wanted])
        if kind == "tree":
            inside = [entry for entry in entries(files) if not below or entry["path"].startswith(below + "/")]
            deep = "recursive=true" in self.path.lower()
            inside = [entry for entry in inside if deep or "/" not in entry["path"][len(below) :].strip("/")]
            return self.reply(inside) if inside or not below else self.fail("EntryNotFound")
        siblings = [{"rfilename": path} for path in sorted(files)]
        return self.reply({"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    do_POST = do_HEAD = do_GET

    def send_file(self, files: Files, path: str, commit: str) -> None:
        if path not in files:
            return self.fail("EntryNotFound", commit)
        data, status = files[path], 200
        headers = {"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, stop = int(found.group(1)), min(int(found.group(2)) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        if self.command == "GET":
            if self.server.hangs_up():
                self.close_connection = True
                return None
            self.server.sent[path] = self.server.sent.get(path, 0) + len(data)
        return self.reply(data, status, headers)

    def fail(self, code: str, commit: str = "") -> None:
        self.reply({"error": code}, 404, {"X-Error-Code": code, "X-Repo-Commit": commit})

    def reply(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


def entries(files: Files) -> list[dict[str, object]]:
    """Files and folders as the Hub lists them."""
    folders = {"/".join(path.split("/")[: i + 1]) for path in files for i in range(path.count("/"))}
    listed: list[dict[str, object]] = [
        {"type": "directory", "path": path, "size": 0, "oid": sha1(path.encode()).hexdigest()} for path in folders
    ]
    listed += [
        {"type": "file", "path": path, "size": len(data), "oid": sha1(data).hexdigest()} for path, data in files.items()
    ]
    return sorted(listed, key=lambda entry: str(entry["path"]))
