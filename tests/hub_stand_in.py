# Copyright 2026 The img2img-ddpo authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
A stand-in for the part of the Hugging Face Hub's API that creating, uploading and downloading a model need.

Clients find it through `HF_ENDPOINT`, which huggingface_hub reads when it is imported, with `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


TOKEN = "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"
USER = "tester"


class Hub:
    """The server and what it holds: `repos[id][path] -> bytes`. `foreign` repositories exist but are not the user's."""

    def __init__(self):
        self.repos, self.commits, self.blobs, self.foreign, self.requests = {}, [], {}, {"other/taken"}, []
        self.refuse_commits = False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def sha(self, repo: str) -> str:
        return hashlib.sha1(f"{repo} {self.commits.count(repo)}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def reply(self, status: int, body=b"", **headers) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def respond(self) -> None:
        path, hub = self.path.split("?")[0], self.hub
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(f"{self.command} {path}")
        if path.startswith("/lfs/"):  # signed links carry no token
            if self.command == "PUT":
                hub.blobs[path.rpartition("/")[2]] = body
            return self.reply(200, {})
        public = self.command in ("GET", "HEAD") and "auth-check" not in path  # anybody may read
        credentials = self.headers.get("Authorization")
        if credentials != f"Bearer {TOKEN}" and not (public and credentials is None):
            return self.reply(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization'] or USER}/{asked['name']}"
            known = repo in hub.repos or repo in hub.foreign
            if not known:
                hub.repos[repo] = {}
            return self.reply(409 if known else 200, {"url": f"{hub.endpoint}/{repo}", "error": "exists"})
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/auth-check(/write)?", path):
            return self.reply(403 if match[1] in hub.foreign else 200, {"error": "Forbidden"})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {**f, "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.reply(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            if hub.refuse_commits:
                return self.reply(403, {"error": "You have exceeded your storage quota"})
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.repos[match[1]][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    hub.repos[match[1]][value["path"]] = hub.blobs[value["oid"]]
            hub.commits.append(match[1])
            sha = hub.sha(match[1])
            return self.reply(200, {"commitOid": sha, "commitUrl": f"{hub.endpoint}/{match[1]}/commit/{sha}"})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = hub.repos.get(match[1], {}).get(match[2])
            if content is None:
                return self.reply(404, {"error": "not found"}, X_Error_Code="EntryNotFound")
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.reply(200, content, ETag=etag, X_Repo_Commit=hub.sha(match[1]))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            if match[1] in hub.repos:
                siblings = [{"rfilename": name} for name in hub.repos[match[1]]]
                return self.reply(200, {"id": match[1], "sha": hub.sha(match[1]), "siblings": siblings})
        return self.reply(404, {"error": "not found"}, X_Error_Code="RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = respond
