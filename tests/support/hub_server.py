"""A loopback Hugging Face hub for tests: standard library only, plain HTTP, no xet, no tokens.

with HubServer({"org/data": {"a/0.parquet": b"...", "b.jsonl": Path("b.jsonl")}},
               models={"openai-community/gpt2": {"config.json": b"{}"}}) as hub:
    hub.endpoint                                  # http://127.0.0.1:PORT
    hub.sha("org/data")                           # commit sha that `main` points to
    hub.commit("org/data", {...})                 # a new commit on main; the older one stays served by its sha
    hub.fail("0.parquet", status=503, times=2)    # the next 2 requests whose path contains this answer 503
    hub.cut("0.parquet", after_bytes=10)          # the next body stops after 10 bytes, connection closed
    hub.requests                                  # [(method, path with its query, Range header or None), ...]
"""

import hashlib
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".parquet", ".safetensors", ".bin", ".arrow", ".gz", ".zst")
API = re.compile(r"/api/(models|datasets)/(.+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?$")
FILE = re.compile(r"(?:/cdn)?/(datasets/)?(.+?)/resolve/([^/]+)/(.+)$")


class File:
    def __init__(self, path, content):
        self.path, self.source = path, content if isinstance(content, bytes) else Path(content)
        self.size = len(content) if isinstance(content, bytes) else self.source.stat().st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % self.size)
        for chunk in self.chunks(0, self.size):
            sha256.update(chunk), git.update(chunk)
        self.oid, self.lfs, self.etag = git.hexdigest(), None, git.hexdigest()
        if path.endswith(LFS_SUFFIXES):  # as on the hub: the ETag of an LFS file is its sha256, of a git file its oid
            self.etag = sha256.hexdigest()
            self.lfs = {"oid": self.etag, "sha256": self.etag, "size": self.size, "pointerSize": 134}

    def chunks(self, start, stop, size=1 << 20):
        with io.BytesIO(self.source) if isinstance(self.source, bytes) else open(self.source, "rb") as f:
            f.seek(start)
            while chunk := f.read(min(size, stop - f.tell())):
                yield chunk

    def json(self):
        entry = {"type": "file", "path": self.path, "oid": self.oid, "size": self.size}
        return entry | ({"lfs": self.lfs} if self.lfs else {})


class HubServer:
    def __init__(self, datasets=None, models=None, page_size=1000, cdn=False):
        """cdn=True answers LFS files like the real hub: 302 to another host (here: http://localhost:PORT/cdn/...)."""
        self.page_size, self.cdn, self.requests, self.rules, self.lock = page_size, cdn, [], [], threading.Lock()
        self.repos = {}  # (kind, repo_id) -> {commit sha: {path: File}}, the last is main
        for kind, repos in (("datasets", datasets), ("models", models)):
            for repo_id, files in (repos or {}).items():
                self.commit(repo_id, files, kind)

    def __enter__(self):
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.http.block_on_close = False
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def commit(self, repo_id, files, kind="datasets"):
        files = {path: File(path, content) for path, content in sorted(files.items())}
        commits = self.repos.setdefault((kind, repo_id), {})
        oids = [(path, f.oid) for path, f in files.items()]
        sha = hashlib.sha1(repr([kind, repo_id, len(commits), oids]).encode()).hexdigest()
        commits[sha] = files
        return sha

    def sha(self, repo_id, kind="datasets"):
        return list(self.repos[kind, repo_id])[-1]

    def fail(self, path, status=503, times=1, method=None, headers=None):
        """The next `times` requests (of `method`, if given: "HEAD" or "GET") of that file or API path answer `status`;
        status=0: the connection is dropped without an answer."""
        self.rules.append(
            {"do": "fail", "path": path, "status": status, "left": times, "method": method, "headers": headers or {}}
        )

    def cut(self, path, after_bytes, times=1, hang=0, length=True, reset=False):
        """The next `times` GET bodies stop after N bytes; hang: seconds of silence before the connection is closed;
        reset: closed with a TCP reset; length=False: no Content-Length, so that a cut looks like the end."""
        self.rules.append(
            {
                "do": "cut",
                "path": path,
                "left": times,
                "method": "GET",
                "after": after_bytes,
                "hang": hang,
                "length": length,
                "reset": reset,
            }
        )

    def rule(self, do, method, path):
        with self.lock:
            for rule in self.rules:
                if rule["do"] == do and rule["left"] and rule["path"] in path and rule["method"] in (None, method):
                    rule["left"] -= 1
                    return rule


class Handler(BaseHTTPRequestHandler):
    protocol_version, log_message = "HTTP/1.1", lambda *_: None

    def send(self, status, body, headers=None):
        """body: bytes, or what becomes JSON, or None where the caller sends it (and its Content-Length)."""
        if body is not None:
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status, code, message, headers=None):
        self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def do_GET(self):
        self.form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        self.hub.requests.append((self.command, unquote(self.path), self.headers.get("Range")))
        url = urlsplit(self.path)
        if rule := self.hub.rule("fail", self.command, unquote(url.path)):
            self.close_connection = rule["status"] == 0
            return rule["status"] and self.send(rule["status"], {"error": "told to fail"}, rule["headers"])
        if match := API.match(url.path):
            kind, repo_id, verb, revision, path = match.groups()
        elif match := FILE.match(url.path):
            (kind, repo_id, revision, path), verb = match.groups(default="models/"), "resolve"
            kind = kind[:-1]
        else:
            return self.error(404, "NotFound", "Not Found")
        if (commits := self.hub.repos.get((kind, unquote(repo_id)))) is None:
            return self.error(404, "RepoNotFound", "Repository not found")
        if (sha := list(commits)[-1] if revision in (None, "main") else unquote(revision)) not in commits:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {sha}")
        answer = {"tree": self.tree, "paths-info": self.paths_info, "resolve": self.file}
        answer.get(verb, self.info)(unquote(repo_id), sha, commits[sha], unquote(path or ""), parse_qs(url.query))

    do_HEAD = do_POST = do_GET

    def info(self, repo_id, sha, files, path, query):
        extra = ("size", "oid", "lfs") if "blobs" in query else ()  # as on the hub: sizes only with files_metadata=True
        siblings = [{"rfilename": f.path, **{k: v for k, v in f.json().items() if k in extra}} for f in files.values()]
        self.send(
            200,
            {
                "id": repo_id,
                "sha": sha,
                "private": False,
                "gated": False,
                "tags": [],
                "siblings": siblings,
                "lastModified": "2024-01-01T00:00:00.000Z",
            },
        )

    def entries(self, files):
        folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
        folders = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
        return sorted(folders + [f.json() for f in files.values()], key=lambda e: e["path"])

    def tree(self, repo_id, sha, files, path, query):
        found = [e for e in self.entries(files) if e["path"].startswith(path + "/" if path else "")]
        if path and not found:
            return self.error(404, "EntryNotFound", f"{path} does not exist on this revision")
        if query.get("recursive") != ["true"]:
            found = [e for e in found if "/" not in e["path"][len(path) + 1 if path else 0 :]]
        start, page = int(query.get("cursor", ["0"])[0]), self.hub.page_size
        here = self.hub.endpoint + urlsplit(self.path).path
        link = f'<{here}?recursive={query.get("recursive", ["false"])[0]}&cursor={start + page}>; rel="next"'
        self.send(200, found[start : start + page], {"Link": link} if len(found) > start + page else None)

    def paths_info(self, repo_id, sha, files, path, query):
        self.send(200, [e for e in self.entries(files) if e["path"] in self.form.get("paths", [])])

    def file(self, repo_id, sha, files, path, query):
        if (f := files.get(path)) is None:
            return self.error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        headers = {"ETag": f'"{f.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if not self.path.startswith("/cdn/"):
            headers["X-Repo-Commit"] = sha
            headers |= {"X-Linked-Size": f.size, "X-Linked-Etag": f'"{f.etag}"'} if f.lfs else {}
            if f.lfs and self.hub.cdn:
                location = f"http://localhost:{self.server.server_port}/cdn{self.path}"
                return self.send(302, b"", headers | {"Location": location})
        start, stop, status = 0, f.size, 200
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            first, last = match.groups()
            start = int(first) if first else max(f.size - int(last), 0)
            stop = min(int(last) + 1, f.size) if first and last else f.size
            if start >= stop:
                return self.send(416, b"", {"Content-Range": f"bytes */{f.size}"})
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{f.size}"
        cut = self.hub.rule("cut", self.command, unquote(self.path))
        headers |= {"Connection": "close"} if cut else {}
        headers |= {"Content-Length": stop - start} if not cut or cut["length"] else {}
        self.send(status, None, headers)
        stop = start if self.command == "HEAD" else min(stop, start + cut["after"]) if cut else stop
        try:
            for chunk in f.chunks(start, stop):
                self.wfile.write(chunk)
            time.sleep(cut["hang"] if cut else 0)
            if cut and cut["reset"]:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.server.close_request(self.request)
        except OSError:  # the client went away
            self.close_connection = True


def downloads(server: HubServer) -> list[str]:
    """The files that were downloaded from a server."""
    return [path.rsplit("/", 1)[-1] for method, path, _ in server.requests if method == "GET" and "/resolve/" in path]


def python(code: str, hub, tmp_path) -> subprocess.CompletedProcess:
    """Runs code against a server, with nothing in the cache."""
    env = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
