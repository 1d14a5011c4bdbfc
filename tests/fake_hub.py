# SPDX-License-Identifier: Apache-2.0
"""A server on this machine that speaks the part of the Hub's protocol that an upload needs."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """
    What was created and uploaded.

    Attributes:
        repos (`dict[str, dict]`):
            The requests that created repositories, by id.
        files (`dict[str, dict[str, bytes]]`):
            Files by repository and path.
        tokens (`set[str]`):
            The tokens that came with requests.
        refuse_commits (`bool`):
            Whether to answer commits with an error.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.tokens: set[str] = set()
        self.refuse_commits = False
        self.endpoint = ""


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, content: object, status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            repo = "/".join(self.path.split("/")[3:5])
            if self.path.startswith("/api/models/") and repo in hub.repos:
                siblings = [{"rfilename": name} for name in hub.files.get(repo, {})]
                self._answer({"id": repo, "sha": "0" * 40, "siblings": siblings, "private": False, "tags": []})
            else:
                self._answer({"error": "Not found"}, 404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.tokens.add((self.headers.get("Authorization") or "").removeprefix("Bearer "))
            if self.path == "/api/repos/create":
                request = json.loads(body)
                repo = f"{request.get('organization') or 'someone'}/{request['name']}"
                hub.repos[repo] = request
                self._answer({"url": f"{hub.endpoint}/{repo}", "name": repo, "id": repo})
                return
            if self.path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
                return
            repo = "/".join(self.path.split("/")[3:5])
            if "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
                self._answer({"files": files})
            elif "/commit/" in self.path and hub.refuse_commits:
                self._answer({"error": "No space is left for this repository"}, 403)
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        hub.files.setdefault(repo, {})[entry["value"]["path"]] = content
                url = f"{hub.endpoint}/{repo}/commit/{'1' * 40}"
                self._answer({"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})
            else:
                self._answer({"error": f"Unknown request {self.path}"}, 404)

    return Handler


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A Hub at `endpoint` while the context lasts."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
