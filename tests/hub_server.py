"""A local HTTP server that speaks as much of the Hugging Face hub as its client needs, and can misbehave on purpose."""

import base64, contextlib, hashlib, json, threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    "Repositories (name -> path -> content), the faults still to come for a path, and the requests that came in"

    repos: dict
    faults: dict = field(
        default_factory=dict
    )  # path -> list of faults, one used up by each GET; "forever" repeats the one before
    log: list = field(default_factory=list)  # (method, path, Range header or None)
    answers: list = field(default_factory=list)  # (status, headers, body) that the next listings get instead of one
    writers: dict = field(default_factory=dict)  # token -> account that it may write to
    refusals: dict = field(default_factory=dict)  # what a writer asks for (create, preupload, PUT, commit ...) -> (status, headers, body)
    large: dict = field(default_factory=dict)  # SHA-256 -> content that was put, before a commit names it
    commits: list = field(default_factory=list)  # (repository, message, names of its files)
    url: str = ""
    cdn: str = ""  # where large files are sent from: another host name

    def gets(self, end):
        return [r for method, path, r in self.log if method == "GET" and path.endswith(end)]

    def fault(self, path):
        todo = self.faults.get(path, [])
        if not todo:
            return None
        return todo[0] if todo[1:] == ["forever"] else todo.pop(0)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.written()

    def do_PUT(self):
        self.written()

    def written(self):
        "What a client with a token may do: make a repository, ask how to send, send, commit"
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.log.append((self.command, path, self.headers.get("Authorization")))
        parts = path.strip("/").split("/")
        what = "PUT" if self.command == "PUT" else next((w for w in ("create", "preupload", "batch", "verify", "commit") if w in parts), parts[-1])
        if what in hub.refusals:
            status, headers, said = hub.refusals[what]
            return self.reply(status, said, headers)
        if what == "PUT":
            hub.large[hashlib.sha256(body).hexdigest()] = body
            return self.reply(200, b"", {"ETag": '"x"'})
        account = hub.writers.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if account is None:
            return self.reply(401, b'{"error": "Invalid username or password."}')
        lines = [json.loads(line) for line in body.splitlines()] if what == "commit" else []
        asked = json.loads(body) if body and not lines else {}
        getattr(self, f"on_{what.replace('-', '_')}")(hub, account, parts, lines or asked)

    def tell(self, **facts):
        self.reply(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

    def on_create(self, hub, account, parts, asked):
        repo = f"{asked['organization'] or account}/{asked['name']}"
        if not repo.startswith(f"{account}/"):
            return self.reply(403, b'{"error": "You don\'t have the rights to create a model under this namespace"}')
        if repo in hub.repos:
            return self.reply(409, json.dumps({"error": "You already created this model repo", "url": f"{hub.url}/{repo}"}).encode())
        hub.repos[repo] = {}
        hub.log.append(("visibility", repo, asked.get("visibility")))
        self.tell(url=f"{hub.url}/{repo}")

    def on_validate_yaml(self, hub, account, parts, asked):
        self.tell(errors=[], warnings=[])

    def on_preupload(self, hub, account, parts, asked):
        large = lambda name: "lfs" if name.endswith((".pgolf", ".model")) else "regular"
        self.tell(files=[{"path": f["path"], "uploadMode": large(f["path"]), "shouldIgnore": False} for f in asked["files"]])

    def on_batch(self, hub, account, parts, asked):
        act = lambda o: {"upload": {"href": f"{hub.url}/put/{o['oid']}"}, "verify": {"href": f"{hub.url}/verify"}}
        self.tell(transfer="basic", objects=[{**o, "actions": act(o)} for o in asked["objects"]])

    def on_verify(self, hub, account, parts, asked):
        self.reply(200 if len(hub.large[asked["oid"]]) == asked["size"] else 422, b"{}")

    def on_commit(self, hub, account, parts, lines):
        repo, files = "/".join(parts[2:4]), {}
        for line in lines[1:]:
            value = line["value"]
            small = line["key"] == "file"
            files[value["path"]] = base64.b64decode(value["content"]) if small else hub.large[value["oid"]]
        hub.repos[repo] |= files
        hub.commits.append((repo, lines[0]["value"]["summary"], sorted(files)))
        self.tell(commitUrl=f"{hub.url}/{repo}/commit/{COMMIT}", commitOid=COMMIT)

    def answer(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.log.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            return self.listing(hub, "/".join(parts[2:4]))
        if parts[:2] == ["api", "models"] and "tree" in parts:
            return self.tree(hub, "/".join(parts[2:4]))
        if parts[:2] == ["api", "models"]:
            return self.listing(hub, "/".join(parts[2:4]))
        if parts[:1] == ["datasets"] and "resolve" in parts:
            return self.resolve(hub, "/".join(parts[1:3]), "/".join(parts[5:]))
        if parts[2:3] == ["resolve"]:
            return self.resolve(hub, "/".join(parts[:2]), "/".join(parts[4:]))
        if parts[:1] == ["cdn"]:
            return self.file(hub, "/".join(parts[1:3]), "/".join(parts[3:]))
        self.reply(404, b"{}")

    def reply(self, status, body, headers=None, keep=None):
        self.send_response(status)
        for k, v in ({"Content-Length": str(len(body)), "Connection": "close"} | (headers or {})).items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:keep])
        self.close_connection = True

    def listing(self, hub, repo):
        if hub.answers:
            status, headers, body = hub.answers.pop(0)
            return self.reply(status, body, headers)
        if repo not in hub.repos:
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        siblings = []
        for name, data in hub.repos[repo].items():
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(
                {"rfilename": name, "size": len(data), "blobId": git}
                | ({} if name.endswith(".json") else {"lfs": lfs})
            )
        info = {
            "_id": "0",
            "id": repo,
            "sha": COMMIT,
            "siblings": siblings,
            "private": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
        }
        self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def tree(self, hub, repo):
        "The same, as a client that takes a whole model asks for it"
        found = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
                 for name, data in hub.repos[repo].items()]
        self.reply(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def resolve(self, hub, repo, name):
        "Large files lie with a CDN, under a signed address; small ones are sent at once"
        data = hub.repos.get(repo, {}).get(name)
        if data is None or name.endswith(".json"):
            return self.file(hub, repo, name)
        sha = hashlib.sha256(data).hexdigest()
        self.reply(302, b"", {
            "Location": f"{hub.cdn}/cdn/{repo}/{quote(name)}?Expires=1&Signature=x",
            "X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": COMMIT,
            "ETag": '"pointer"', "X-Xet-Hash": sha, "Accept-Ranges": "bytes"})

    def file(self, hub, repo, name):
        data = hub.repos.get(repo, {}).get(name)
        if data is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'inline; filename="{name.split("/")[-1]}";',
        }
        first, fault = 0, hub.fault(name) if self.command == "GET" else None
        if asked := self.headers.get("Range"):
            first = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        body, kind = data[first:], fault and fault[0]
        if kind == "status":
            return self.reply(fault[1], b"", fault[2] if len(fault) > 2 else {})
        if kind == "break":
            return self.reply(
                206 if asked else 200, body, headers, keep=fault[1]
            )  # promises all, sends a part
        if kind == "short":
            body = body[: fault[1]]  # promises and sends a part
        if kind == "corrupt":
            body = body[:-2] + bytes(b ^ 255 for b in body[-2:])
        self.reply(206 if asked else 200, body, headers)


@contextlib.contextmanager
def serve(repos):
    "A hub on localhost for as long as the block lasts"
    hub = Hub({repo: dict(files) for repo, files in repos.items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub, server.daemon_threads = hub, True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.cdn = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
