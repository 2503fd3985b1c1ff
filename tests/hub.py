"""A model hub on this machine that speaks the protocol of huggingface_hub, and web servers."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = ".safetensors"
"""Files of this suffix are stored by their SHA-256, the others by git's SHA-1, as on the hub."""
TOKEN = "hf_" + "a" * 34


def blob_of(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_of(files: dict[str, bytes]) -> str:
    total = hashlib.sha1()
    for path, content in sorted(files.items()):
        total.update(f"{path} {blob_of(content)}".encode())
    return total.hexdigest()


@dataclass
class Hub:
    """The repositories of a hub: the files of each commit, and the commit of each branch or tag."""

    url: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    forbidden: set[str] = field(default_factory=set)
    """Owners to whose repositories the token may not write."""
    falsified: dict[str, bytes] = field(default_factory=dict)
    """What is sent instead of a file, by its path."""
    received: list[bytes] = field(default_factory=list)
    """Every byte that clients have sent: request lines, headers and bodies."""
    asked: list[str] = field(default_factory=list)
    """The method and path of each request."""

    def put(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        commit = commit_of(files)
        self.commits.setdefault(name, {})[commit] = files
        self.branches.setdefault(name, {})[branch] = commit
        return commit

    def put_folder(self, name: str, folder: Path, branch: str = "main") -> str:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return self.put(name, files, branch)

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.commits[name][self.branches[name][branch]]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, code: int, content: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def answer_json(self, content: object) -> None:
            self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

        def refuse(self, code: int, word: str, message: str = "") -> None:
            self.answer(code, b"{}", X_Error_Code=word, X_Error_Message=message or word)

        def body(self) -> bytes:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.received.append(f"{self.requestline}\n{self.headers}".encode() + content)
            hub.asked.append(f"{self.command} {self.path}")
            return content

        @property
        def known(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def missing(self, name: str) -> bool:
            """Whether the repository was refused."""
            if name in hub.gated:
                self.refuse(403, "GatedRepo")
            elif name not in hub.branches or (name in hub.private and not self.known):
                self.refuse(404 if self.known else 401, "RepoNotFound")
            else:
                return False
            return True

        def commit(self, name: str, revision: str) -> str | None:
            found = hub.branches[name].get(revision, revision)
            if found in hub.commits[name]:
                return found
            self.refuse(404, "RevisionNotFound")
            return None

        def do_GET(self) -> None:
            self.body()
            path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if path[:2] == ["api", "models"]:
                name, revision = "/".join(path[2:4]), path[5] if len(path) > 5 else "main"
                if not self.missing(name) and (commit := self.commit(name, revision)):
                    self.describe(name, commit)
            elif len(path) > 4 and path[2] == "resolve":
                name, revision, file = "/".join(path[:2]), path[3], "/".join(path[4:])
                if not self.missing(name) and (commit := self.commit(name, revision)):
                    self.send_file(name, commit, file)
            else:
                self.refuse(404, "Unknown")

        do_HEAD = do_GET  # noqa: N815

        def describe(self, name: str, commit: str) -> None:
            siblings: list[dict[str, object]] = []
            for path, content in hub.commits[name][commit].items():
                one: dict[str, object] = {"rfilename": path, "size": len(content)}
                if path.endswith(LARGE):
                    digest = hashlib.sha256(content).hexdigest()
                    pointer = {"sha256": digest, "size": len(content), "pointerSize": 134}
                    one |= {"blobId": "0" * 40, "lfs": pointer}
                else:
                    one["blobId"] = blob_of(content)
                siblings.append(one)
            self.answer_json({"id": name, "sha": commit, "siblings": siblings, "tags": []})

        def send_file(self, name: str, commit: str, file: str) -> None:
            content = hub.commits[name][commit].get(file)
            if content is None:
                self.refuse(404, "EntryNotFound")
                return
            content = hub.falsified.get(file, content)
            digest = hashlib.sha256(content).hexdigest()
            etag = digest if file.endswith(LARGE) else blob_of(content)
            self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit)

        def do_PUT(self) -> None:
            content = self.body()
            hub.large[hashlib.sha256(content).hexdigest()] = content
            self.answer(200)

        def do_POST(self) -> None:
            content = self.body()
            path = urlsplit(self.path).path.strip("/").split("/")
            if path[:2] == ["api", "validate-yaml"]:
                self.answer_json({"errors": [], "warnings": []})
            elif not self.known:
                self.refuse(401, "Unauthorized", "Invalid credentials in Authorization header")
            elif path == ["api", "repos", "create"]:
                self.create(json.loads(content))
            elif path[-1] == "batch":
                self.offer(json.loads(content))
            elif path[4:5] == ["preupload"]:
                self.modes(json.loads(content))
            elif path[4:5] == ["commit"]:
                self.receive("/".join(path[2:4]), content)
            else:
                self.refuse(404, "Unknown")

        def create(self, asked: dict[str, object]) -> None:
            owner = asked.get("organization") or "me"
            name = f"{owner}/{asked['name']}"
            if owner in hub.forbidden:
                self.refuse(403, "Forbidden", "You don't have the rights to create a model")
            elif name in hub.branches:
                self.answer(409, json.dumps({"url": f"{hub.url}/{name}"}).encode())
            else:
                hub.put(name, {".gitattributes": b"*.safetensors filter=lfs"})
                if asked.get("private") or asked.get("visibility") == "private":
                    hub.private.add(name)
                self.answer_json({"url": f"{hub.url}/{name}", "name": name})

        def modes(self, asked: dict[str, list[dict[str, str]]]) -> None:
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in asked["files"]
            ]
            self.answer_json({"files": files})

        def offer(self, asked: dict[str, list[dict[str, object]]]) -> None:
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/store/{one['oid']}"}}}
                for one in asked["objects"]
            ]
            self.answer_json({"transfer": "basic", "objects": objects})

        def receive(self, name: str, content: bytes) -> None:
            lines = [json.loads(line) for line in content.splitlines() if line]
            files = dict(hub.files(name))
            for line in lines:
                told = line["value"]
                if line["key"] == "file":
                    files[told["path"]] = base64.b64decode(told["content"])
                elif line["key"] == "lfsFile":
                    files[told["path"]] = hub.large[told["oid"]]
                elif line["key"] == "deletedFile":
                    del files[told["path"]]
            commit = hub.put(name, files)
            url = f"{hub.url}/{name}/commit/{commit}"
            self.answer_json({"success": True, "commitOid": commit, "commitUrl": url})

    return Handler


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on the loopback interface, for as long as the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def hub_server_here() -> Iterator[Hub]:
    hub = Hub()
    with serving(_handler(hub)) as hub.url:
        yield hub


@contextmanager
def file_server(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """A web server of these files, by path, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            content = files.get(urlsplit(self.path).path)
            to = parse_qs(urlsplit(self.path).query).get("to")
            if to:
                self.send_response(302)
                self.send_header("Location", to[0])
                self.end_headers()
                return
            self.send_response(404 if content is None else 200)
            length = self.path.endswith("?cut") * 10 + len(content or b"")
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content or b"")

    with serving(Handler) as url:
        yield url, asked
