"""A local Hugging Face hub for tests, with the standard library alone: plain HTTP, no xet, no access tokens.

with HubServer({"org/data": {"a/0.parquet": b"...", "b.jsonl": Path("b.jsonl")}},
               models={"openai-community/gpt2": {"config.json": b"{}"}}) as hub:
    hub.endpoint                                  # http://127.0.0.1:PORT
    hub.sha("org/data")                           # sha of the commit that `main` points to
    hub.commit("org/data", {...})                 # a new commit on main; older ones are served by their sha
    hub.fail("0.parquet", status=503, times=2)    # the next 2 requests with a path that contains this are answered 503
    hub.truncate("0.parquet", after_bytes=10)     # the next body ends after 10 bytes; the connection is closed
    hub.requests                                  # [(method, path with query, Range header or None), ...]
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
        sha256, git_sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % self.size)
        for chunk in self.chunks(0, self.size):
            sha256.update(chunk), git_sha1.update(chunk)
        self.oid, self.lfs, self.etag = git_sha1.hexdigest(), None, git_sha1.hexdigest()
        if path.endswith(LFS_SUFFIXES):  # on the hub, the ETag is the sha256 of an LFS file, or the oid of a git file
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
        """With `cdn`, LFS files are redirected to another host as on the hub, here to http://localhost:PORT/cdn/..."""
        self.page_size, self.cdn, self.requests, self.rules, self.lock = page_size, cdn, [], [], threading.Lock()
        self.repos = {}  # (kind, repo_id) -> {commit sha: {path: File}}; the last commit is main
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
        """Answer the next `times` requests for a file or API path with `status`; 0 closes the connection without an
        answer. `method` ("HEAD" or "GET") restricts the requests."""
        rule = {"action": "fail", "path": path, "remaining": times, "method": method}
        self.rules.append(rule | {"status": status, "headers": headers or {}})

    def truncate(self, path, after_bytes, times=1, hang=0, length=True, reset=False):
        """End the next `times` bodies of GET requests after `after_bytes`, and close the connection.

        hang: wait this many seconds before closing. reset: close with a TCP reset. length=False: send no
        Content-Length, so that the client cannot see that the body is truncated.
        """
        rule = {"action": "truncate", "path": path, "remaining": times, "method": "GET"}
        self.rules.append(rule | {"after": after_bytes, "hang": hang, "length": length, "reset": reset})

    def use_rule(self, action, method, path):
        """Return the rule for a request and count its use, or None if there is none."""
        with self.lock:
            for rule in self.rules:
                matches = rule["action"] == action and rule["path"] in path and rule["method"] in (None, method)
                if matches and rule["remaining"]:
                    rule["remaining"] -= 1
                    return rule


class Handler(BaseHTTPRequestHandler):
    protocol_version, log_message = "HTTP/1.1", lambda *_: None

    def send(self, status, body, headers=None):
        """Send bytes, or any other body as JSON. If `body` is None, the caller sends it and sets Content-Length."""
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
        if rule := self.hub.use_rule("fail", self.command, unquote(url.path)):
            self.close_connection = rule["status"] == 0
            return rule["status"] and self.send(rule["status"], {"error": "injected failure"}, rule["headers"])
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
        handlers = {"tree": self.tree, "paths-info": self.paths_info, "resolve": self.file}
        handlers.get(verb, self.info)(unquote(repo_id), sha, commits[sha], unquote(path or ""), parse_qs(url.query))

    do_HEAD = do_POST = do_GET

    def info(self, repo_id, sha, files, path, query):
        extra = ("size", "oid", "lfs") if "blobs" in query else ()  # as on the hub, sizes only with files_metadata=True
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
        directories = {str(parent) for path in files for parent in Path(path).parents} - {"."}
        directories = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in directories]
        return sorted(directories + [f.json() for f in files.values()], key=lambda e: e["path"])

    def tree(self, repo_id, sha, files, path, query):
        entries = [e for e in self.entries(files) if e["path"].startswith(path + "/" if path else "")]
        if path and not entries:
            return self.error(404, "EntryNotFound", f"{path} does not exist on this revision")
        if query.get("recursive") != ["true"]:
            entries = [e for e in entries if "/" not in e["path"][len(path) + 1 if path else 0 :]]
        start, page = int(query.get("cursor", ["0"])[0]), self.hub.page_size
        url = self.hub.endpoint + urlsplit(self.path).path
        link = f'<{url}?recursive={query.get("recursive", ["false"])[0]}&cursor={start + page}>; rel="next"'
        self.send(200, entries[start : start + page], {"Link": link} if len(entries) > start + page else None)

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
        truncation = self.hub.use_rule("truncate", self.command, unquote(self.path))
        headers |= {"Connection": "close"} if truncation else {}
        headers |= {"Content-Length": stop - start} if not truncation or truncation["length"] else {}
        self.send(status, None, headers)
        if self.command == "HEAD":
            stop = start
        elif truncation:
            stop = min(stop, start + truncation["after"])
        try:
            for chunk in f.chunks(start, stop):
                self.wfile.write(chunk)
            time.sleep(truncation["hang"] if truncation else 0)
            if truncation and truncation["reset"]:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.server.close_request(self.request)
        except OSError:  # the client closed the connection
            self.close_connection = True


def downloads(server: HubServer) -> list[str]:
    """Return the names of the files that were downloaded from a server, in order."""
    return [path.rsplit("/", 1)[-1] for method, path, _ in server.requests if method == "GET" and "/resolve/" in path]


def run_python(code: str, hub: HubServer, tmp_path: Path) -> subprocess.CompletedProcess:
    """Run code in another process that uses this hub, with its cache in `tmp_path`."""
    env = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
