"""A W&B server for datasets only: accepts a logged artifact and returns it, over HTTP on 127.0.0.1.

W&B's own client talks to it (``WANDB_BASE_URL``), so the tests cover what goes over the wire. Unknown operations are
refused. Replies have the shape that the client of the pinned version expects.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


@dataclass
class Version:
    """One version of an artifact."""

    entity: str
    project: str
    name: str
    index: int
    type: str
    digest: str
    metadata: str
    files: dict[str, bytes] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    state: str = "PENDING"


class WandbServer(ThreadingHTTPServer):
    """Stores versions in memory. ``projects`` are the existing projects."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.projects: set[tuple[str, str]] = set()
        self.versions: list[Version] = []
        self.downloads: list[str] = []
        """Names of downloaded files."""

    def find(self, entity: str, project: str, name: str) -> Version | None:
        """Return the version for ``name:alias``; ``latest`` is the newest."""
        name, _, alias = name.partition(":")
        found = [v for v in self.versions if (v.entity, v.project, v.name) == (entity, project, name)]
        found = [v for v in found if v.state == "COMMITTED" and alias in ("latest", f"v{v.index}")]
        return found[-1] if found else None


@contextmanager
def serve() -> Iterator[WandbServer]:
    """Run a server while the context is open."""
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class Handler(BaseHTTPRequestHandler):
    """Has one method per GraphQL operation, with the name that the client uses; files by GET and PUT."""

    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_GET(self) -> None:
        _, kind, number, name = unquote(self.path).split("/", 3)
        if kind == "manifest":
            return self.reply(json.dumps(self.server.versions[int(number)].manifest).encode())
        content = self.server.versions[int(number)].files.get(name) if kind == "file" else None
        if content is None:
            return self.reply(b"no such file", 404)
        self.server.downloads.append(name)
        return self.reply(content)

    def do_PUT(self) -> None:
        _, kind, number, name = unquote(self.path).split("/", 3)
        content = self.body()
        if kind == "manifest":
            self.server.versions[int(number)].manifest = json.loads(content)
        elif kind == "file":
            self.server.versions[int(number)].files[name] = content
        self.reply(b"")

    def do_POST(self) -> None:
        content = self.body()
        if self.path != "/graphql":  # metrics of the run, telemetry
            return self.reply(b"{}")
        request = json.loads(content)
        name = re.search(r"(query|mutation)\s+(\w+)", request["query"]).group(2)
        operation = getattr(self, name, None)
        if operation is None:
            answer = {"errors": [{"message": f"this server does not know {name}"}]}
        else:
            answer = {"data": operation(**(request.get("variables") or {}))}
        return self.reply(json.dumps(answer).encode())

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass

    def file_url(self, version: Version, name: str, kind: str = "file") -> str:
        return f"{self.server.url}/{kind}/{self.server.versions.index(version)}/{name}"

    # --- account and run ---

    def Viewer(self) -> dict[str, Any]:
        viewer = {"id": "user", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    def ServerFeaturesQuery(self) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def UpsertBucket(self, name: str, project: str, entity: str | None, **_: Any) -> dict[str, Any]:
        self.server.projects.add((entity or "me", project))
        owner = {"id": "project", "name": project, "entity": {"id": "entity", "name": entity or "me"}}
        nothing = {"description": None, "config": "{}", "sweepName": None, "historyLineCount": 0}
        bucket = {"id": "run", "name": name, "displayName": name, "project": owner, **nothing}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def CreateRunFiles(self, files: list[str], **_: Any) -> dict[str, Any]:
        urls = [{"name": name, "uploadUrl": f"{self.server.url}/run/0/{name}"} for name in files]
        return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": urls}}

    # --- logging ---

    def ArtifactType(self, **_: Any) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def CreateArtifact(self, input: dict[str, Any]) -> dict[str, Any]:
        place = (input["entityName"] or "me", input["projectName"], input["artifactCollectionName"])
        index = sum((v.entity, v.project, v.name) == place for v in self.server.versions)
        version = Version(*place, index, input["artifactTypeName"], input["digest"], input["metadata"])
        self.server.versions.append(version)
        number = str(len(self.server.versions) - 1)
        return {"createArtifact": {"artifact": self.artifact(version, number) | {"state": "PENDING"}}}

    def CreateArtifactManifest(self, artifactID: str, **_: Any) -> dict[str, Any]:
        return {"createArtifactManifest": {"artifactManifest": self.manifest_file(artifactID)}}

    def UpdateArtifactManifest(self, artifactManifestID: str, **_: Any) -> dict[str, Any]:
        return {"updateArtifactManifest": {"artifactManifest": self.manifest_file(artifactManifestID)}}

    def manifest_file(self, number: str) -> dict[str, Any]:
        url = self.file_url(self.server.versions[int(number)], "wandb_manifest.json", "manifest")
        return {"id": number, "file": {"id": number, "uploadUrl": url, "uploadHeaders": []}}

    def CreateArtifactFiles(self, input: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for file in input["artifactFiles"]:
            url = self.file_url(self.server.versions[int(file["artifactID"])], file["name"])
            node = {"storagePath": file["name"], "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
            nodes.append({"node": {**node, "artifact": {"id": file["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def CommitArtifact(self, artifactID: str) -> dict[str, Any]:
        version = self.server.versions[int(artifactID)]
        version.state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifactID, "digest": version.digest}}}

    # --- downloading ---

    def ArtifactByID(self, id: str) -> dict[str, Any]:
        return {"artifact": self.artifact(self.server.versions[int(id)], id)}

    def ArtifactMembershipByName(self, entity: str, project: str, name: str, **_: Any) -> dict[str, Any]:
        if (entity, project) not in self.server.projects:
            return {"project": None}
        version = self.server.find(entity, project, name)
        if version is None:
            return {"project": {"artifactCollectionMembership": None}}
        membership = {
            "__typename": "ArtifactCollectionMembership",
            "id": "membership",
            "versionIndex": version.index,
            "createdAt": "2026-01-01T00:00:00Z",
            "aliases": [],
            "artifactCollection": self.collection(version),
            "artifact": self.artifact(version, str(self.server.versions.index(version))),
        }
        return {"project": {"artifactCollectionMembership": membership}}

    def FetchArtifactManifest(self, id: str) -> dict[str, Any]:
        url = self.file_url(self.server.versions[int(id)], "wandb_manifest.json", "manifest")
        return {"artifact": {"currentManifest": {"file": {"directUrl": url}}}}

    def GetArtifactMembershipFileUrls(
        self, entity: str, project: str, collection: str, alias: str, **_: Any
    ) -> dict[str, Any]:
        version = self.server.find(entity, project, f"{collection}:{alias}")
        assert version is not None
        names = version.manifest["contents"]
        nodes = [{"__typename": "File", "name": name, "directUrl": self.file_url(version, name)} for name in names]
        last = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        page = {"edges": [{"node": node} for node in nodes], "pageInfo": last}
        found = {"__typename": "ArtifactSequence", "artifactMembership": {"files": page}}
        return {"project": {"artifactCollection": found}}

    def collection(self, version: Version) -> dict[str, Any]:
        project = {"id": "project", "internalId": "1", "name": version.project, "entity": {"name": version.entity}}
        return {"__typename": "ArtifactSequence", "name": version.name, "project": project}

    def artifact(self, version: Version, number: str) -> dict[str, Any]:
        size = sum(map(len, version.files.values()))
        return {
            "__typename": "Artifact",
            "id": number,
            "artifactSequence": self.collection(version) | {"latestArtifact": None},
            "versionIndex": version.index,
            "artifactType": {"name": version.type},
            "description": None,
            "metadata": version.metadata,
            "ttlDurationSeconds": -1,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": version.state,
            "size": size,
            "digest": version.digest,
            "commitHash": None,
            "fileCount": len(version.files),
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": None,
            "aliases": [],
        }
