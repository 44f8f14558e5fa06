"""A stand-in for the part of the Hugging Face Hub's API that creating and uploading a model need; see `HF_ENDPOINT`.
At `/score` it is a reward server."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


TOKEN = "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"
USER = "tester"


class Hub:
    """The server and what it holds: `repos[id][path] -> bytes`. `foreign` repositories exist but are not the user's."""

    def __init__(self):
        self.repos, self.foreign, self.refuse_commits = {}, {"other/taken"}, False
        self.server = serve(type("Bound", (HubHandler,), {"hub": self}))
        self.endpoint = self.server.url


def serve(handler: type) -> ThreadingHTTPServer:
    """A server in a thread, at a free port that its `url` names."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): ...

    def reply(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class HubHandler(Handler):
    hub: Hub

    def respond(self) -> None:
        path, hub = self.path.split("?")[0], self.hub
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        repo = "/".join(re.sub(r"^/api/models/|\.git/.*|^/", "", path).split("/")[:2])
        if path == "/score":  # a reward
            self.reply(200, {"rewards": list(map(len, json.loads(body)["images"]))})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid credentials in Authorization header"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization'] or USER}/{asked['name']}"
            known = repo in hub.repos or repo in hub.foreign
            hub.repos.setdefault(repo, {})
            self.reply(409 if known else 200, {"url": f"{hub.endpoint}/{repo}", "error": "exists"})
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif "/auth-check" in path:
            self.reply(403 if repo in hub.foreign else 200, {"error": "Forbidden"})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            for file in files:
                file |= {"uploadMode": "regular", "shouldIgnore": False}  # none by LFS, which is the library's matter
            self.reply(200, {"files": files})
        elif path.endswith("/commit/main") and hub.refuse_commits:
            self.reply(403, {"error": "You have exceeded your storage quota"})
        elif path.endswith("/commit/main"):
            for entry in map(json.loads, body.decode().splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            self.reply(200, {"commitOid": "0" * 40, "commitUrl": f"{hub.endpoint}/{repo}/commit/{'0' * 40}"})
        else:
            self.reply(404, {"error": "not found"})

    do_GET = do_POST = do_PUT = respond
