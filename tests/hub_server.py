"""A small Hugging Face hub on loopback: the requests that huggingface_hub makes to create, upload, list and download.

`with hub() as server: server.url, server.repos, server.requests`. Repositories live in memory.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_secretsecretsecret"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.route("GET")

    def do_HEAD(self):
        self.route("HEAD")

    def do_POST(self):
        self.route("POST")

    def route(self, method):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = self.path.split("?")[0]
        self.server.requests.append((method, path))
        for pattern, answer in (
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self.commit),
            (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self.branch),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.info),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ):
            if match := re.fullmatch(pattern, path):
                return answer(body, *match.groups())
        return self.say(404, {"error": f"no route {path}"})

    def say(self, status, value=None, data=None, **headers):
        data = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def signed_in(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.say(401, {"error": "Invalid username or password."})
        return False

    def files(self, repo, revision):
        """(commit, files), or None after the hub's answer for what is not there."""
        branches = self.server.repos.get(repo)
        if branches is None:
            self.say(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
            return None
        for name, (commit, files) in branches.items():
            if revision in (name, commit):
                return commit, files
        self.say(404, {"error": "Revision not found"}, **{"X-Error-Code": "RevisionNotFound"})
        return None

    def create(self, body):
        asked = json.loads(body)
        if not self.signed_in():
            return
        owner = asked.get("organization") or "me"
        repo = f"{owner}/{asked['name']}"
        if repo in self.server.repos:
            self.say(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"})
        else:
            self.server.repos[repo] = {"main": ("0" * 40, {})}
            self.say(200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": "1"})

    def validate(self, body):
        import yaml

        try:
            header = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            assert isinstance(header["tags"], list)
        except Exception as error:
            return self.say(400, {"error": str(error)})
        return self.say(200, {"errors": [], "warnings": []})

    def preupload(self, body, repo, revision):
        if self.files(repo, revision):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.say(200, {"files": files})

    def commit(self, body, repo, revision):
        if not self.signed_in():
            return
        found = self.files(repo, revision)
        if not found:
            return
        files = dict(found[1])
        for line in body.splitlines():
            step = json.loads(line)
            if step["key"] == "file":
                files[step["value"]["path"]] = base64.b64decode(step["value"]["content"])
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.server.repos[repo][revision] = (commit, files)
        self.say(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{repo}/commit/{commit}"})

    def branch(self, body, repo, name):
        if self.files(repo, "main"):
            self.server.repos[repo].setdefault(name, self.server.repos[repo]["main"])
            self.say(200, {})

    def info(self, body, repo, revision):
        found = self.files(repo, revision or "main")
        if found:
            siblings = [{"rfilename": name} for name in found[1]]
            self.say(200, {"id": repo, "modelId": repo, "sha": found[0], "siblings": siblings, "private": False})

    def tree(self, body, repo, revision):
        found = self.files(repo, revision)
        if found:
            self.say(
                200,
                [
                    {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in found[1].items()
                ],
            )

    def resolve(self, body, repo, revision, name):
        found = self.files(repo, revision)
        if not found:
            return
        commit, files = found
        if name not in files:
            return self.say(404, {"error": "Entry not found"}, **{"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        return self.say(200, data=files[name], **{"ETag": etag, "X-Repo-Commit": commit})


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.requests = {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
