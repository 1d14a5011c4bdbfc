# SPDX-License-Identifier: Apache-2.0
"""A server on this machine that speaks the Hub's protocol, for the real huggingface_hub client to talk to.

It answers what uploads and downloads of models, and downloads of data sets, ask: creation, access, branches,
preupload, LFS in one part or many, commits, info, trees, and files with ranges and etags. It has users with tokens,
private repositories and a validation of cards, and it can be told to fail.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".png", ".parquet")


@dataclass(frozen=True)
class User:
    """Who a token belongs to, and whether it may write to their namespaces."""

    name: str
    organisations: tuple[str, ...] = ()
    may_write: bool = True


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        header = f"blob {len(self.content)}\0".encode()
        return hashlib.sha1(header + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str
    message: str
    files: dict[str, File]


@dataclass
class Repository:
    """Branches of commits, oldest first."""

    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch or an id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = (commit for branch in self.branches.values() for commit in branch)
        return next((commit for commit in commits if commit.oid == revision), None)


@dataclass
class Fault:
    """
    What befalls the next `times` requests whose method and path match: a status, or `drop` (no answer, nothing done),
    `lost` (done, but no answer), `half` (of an answer), `pass` (nothing, before the next fault).
    """

    pattern: str
    how: int | str
    times: int


class FakeHub:
    """
    What was created, uploaded and asked for.

    Attributes:
        users (`dict[str, User]`):
            By token.
        repos (`dict[str, Repository]`):
            By id.
        lfs (`dict[str, bytes]`):
            Large files by SHA-256.
        received (`list[str]`):
            The SHA-256 of each large file that was sent, in order, twice if it was sent twice.
        requests (`list[str]`):
            `METHOD /path` of each request.
        tokens (`set[str]`):
            The tokens that came with requests.
        part_size (`int`, *optional*):
            Ask for large files in parts of so many bytes.
    """

    def __init__(self) -> None:
        self.users = {
            "secret-token": User("someone", ("our",)),
            "read-only-token": User("someone", ("our",), may_write=False),
            "visitor-token": User("visitor"),
        }
        self.repos: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.received: list[str] = []
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.part_size: int | None = None
        self.endpoint = ""
        self._faults: list[Fault] = []
        self._parts: dict[str, dict[int, bytes]] = {}
        self._lock = threading.RLock()

    def fail(self, pattern: str, how: int | str, times: int = 1) -> None:
        """Let requests fail: `pattern` is searched in `METHOD /path`."""
        self._faults.append(Fault(pattern, how, times))

    def recover(self) -> None:
        """Forget what was to fail."""
        self._faults.clear()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        commit = self.repos[repo_id].find(revision)
        assert commit is not None
        return {path: file.content for path, file in commit.files.items() if path != ".gitattributes"}

    def commits(self, repo_id: str, revision: str = "main") -> list[str]:
        """Messages of the commits after the first one, oldest first."""
        return [commit.message for commit in self.repos[repo_id].branches[revision][1:]]

    def create(self, repo_id: str, private: bool = False) -> Repository:
        """A new repository, with the file that the Hub puts into each."""
        attributes = File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", is_lfs=False)
        first = Commit(self._new_oid(), "initial commit", {".gitattributes": attributes})
        self.repos[repo_id] = Repository(private, {"main": [first]})
        return self.repos[repo_id]

    def commit(self, repo_id: str, revision: str, message: str, files: dict[str, File]) -> Commit:
        """Put a state at the end of a branch."""
        commit = Commit(self._new_oid(), message, files)
        self.repos[repo_id].branches[revision].append(commit)
        return commit

    def _new_oid(self) -> str:
        count = sum(len(branch) for repo in self.repos.values() for branch in repo.branches.values())
        return hashlib.sha1(f"{len(self.repos)} {count}".encode()).hexdigest()

    def fault(self, request: str) -> int | str | None:
        """What is to befall this request."""
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault.how
        return None

    def put_part(self, oid: str, number: int, content: bytes) -> None:
        """Note a part of a large file."""
        with self._lock:
            self._parts.setdefault(oid, {})[number] = content

    def join_parts(self, oid: str) -> None:
        """All parts are there."""
        parts = self._parts.pop(oid)
        self.put_lfs(oid, b"".join(parts[number] for number in sorted(parts)))

    def put_lfs(self, oid: str, content: bytes) -> None:
        """Note a large file."""
        assert hashlib.sha256(content).hexdigest() == oid
        with self._lock:
            self.received.append(oid)
            self.lfs[oid] = content


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def check_card(text: str) -> list[str]:
    """What the Hub finds wrong with a card's metadata: its rules for the keys that are used here."""
    block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if block is None:
        return []
    data = yaml.safe_load(block.group(1)) or {}
    repo_id = re.compile(r"[\w.-]+(/[\w.-]+)?")
    errors = []
    for key in ("datasets", "base_model"):
        values = data.get(key, [])
        for value in [values] if isinstance(values, str) else values:
            if not repo_id.fullmatch(value):
                errors.append(f'"{key}" with value "{value}" is not valid: use an id of the Hub.')
    if "license" in data and not re.fullmatch(r"[a-z0-9.+-]+", data["license"]):
        errors.append(f'"license" must be an identifier, got {data["license"]!r}.')
    if data.get("license") == "other" and not {"license_name", "license_link"} & set(data):
        errors.append('"license" other needs a name or a link.')
    for key in ("tags", "metrics"):
        if key in data and not all(isinstance(entry, str) for entry in data[key]):
            errors.append(f'"{key}" must be a list of strings.')
    for key in ("library_name", "pipeline_tag", "instance_prompt"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string.')
    for entry in data.get("widget", []):
        if not isinstance(entry.get("text"), str) or not isinstance(entry["output"]["url"], str):
            errors.append('"widget" needs a text and the url of an output.')
    for model in data.get("model-index", []):
        for result in model.get("results", [{}]):
            if not result.get("task", {}).get("type"):
                errors.append('"model-index" needs a task type.')
            if not result.get("dataset", {}).get("type") or not result["dataset"].get("name"):
                errors.append('"model-index" needs the type and the name of the dataset.')
            for metric in result.get("metrics", [{}]):
                if not metric.get("type") or metric.get("value") is None:
                    errors.append('"model-index" needs the type and the value of a metric.')
    return errors


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        # What the requests of repositories look like, and who answers them.
        routes = (
            ("GET", r"/api/whoami-v2", "_whoami"),
            ("POST", r"/api/repos/create", "_create"),
            ("POST", r"/api/validate-yaml", "_validate"),
            ("GET", r"/api/\w+/(?P<repo>[^/]+/[^/]+)", "_info"),
            ("GET", r"/api/\w+/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "_info"),
            ("GET", r"/api/\w+/(?P<repo>[^/]+/[^/]+)/auth-check(?P<write>/write)?", "_access"),
            ("POST", r"/api/\w+/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "_branch"),
            ("GET", r"/api/\w+/(?P<repo>[^/]+/[^/]+)/refs", "_refs"),
            (
                "GET",
                r"/api/\w+/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<under>.*))?",
                "_tree",
            ),
            ("POST", r"/api/\w+/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "_paths"),
            ("POST", r"/api/\w+/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "_preupload"),
            ("POST", r"/api/\w+/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "_commit"),
            ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "_batch"),
            ("PUT", r"/lfs/(?P<oid>\w+)(/(?P<part>\d+))?", "_put"),
            ("POST", r"/lfs/(?P<oid>\w+)/(?P<action>complete|verify)", "_after_put"),
            ("HEAD", r"/(datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "_resolve"),
            ("GET", r"/(datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "_resolve"),
        )

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self._serve()

        do_HEAD = do_POST = do_PUT = do_GET

        def _serve(self) -> None:
            self.url = urlsplit(self.path)
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = f"{self.command} {self.url.path}"
            hub.requests.append(request)
            how = hub.fault(request)
            self.half, self.lost = how == "half", how == "lost"
            try:
                if how == "drop":
                    self.close_connection = True
                    self.connection.close()
                    return
                if isinstance(how, int):
                    raise Refusal(how, "The server has a bad day.")
                for method, pattern, name in self.routes:
                    found = re.fullmatch(pattern, self.url.path)
                    if method == self.command and found:
                        arguments = {k: v and unquote(v) for k, v in found.groupdict().items()}
                        self.user = self._who()
                        getattr(self, name)(**arguments)
                        return
                raise Refusal(404, f"Unknown request {request}")
            except Refusal as refusal:
                headers = {"X-Error-Message": refusal.message}
                if refusal.code is not None:
                    headers["X-Error-Code"] = refusal.code
                self._answer({"error": refusal.message}, refusal.status, headers)

        def _answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            if self.lost:
                self.connection.close()
                return
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            if not isinstance(content, bytes):
                self.send_header("Content-Type", "application/json")
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            if "Content-Length" not in (headers or {}):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if self.half else body)

        # Who may do what

        def _who(self) -> User | None:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if not token:
                return None
            hub.tokens.add(token)
            if token not in hub.users:
                raise Refusal(401, "Invalid credentials in Authorization header")
            return hub.users[token]

        def _owns(self, repo: str) -> bool:
            return self.user is not None and repo.split("/")[0] in (self.user.name, *self.user.organisations)

        def _find(self, repo: str, write: bool = False) -> Repository:
            found = hub.repos.get(repo)
            if found is None or (found.private and not self._owns(repo)):
                raise Refusal(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
            if write and self.user is None:
                raise Refusal(401, "Invalid username or password.")
            if write and not (self._owns(repo) and self.user is not None and self.user.may_write):
                raise Refusal(403, "You don't have the required permissions to write to this repository")
            return found

        def _find_commit(self, repo: str, revision: str) -> Commit:
            commit = self._find(repo).find(revision)
            if commit is None:
                raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return commit

        # Repositories

        def _whoami(self) -> None:
            if self.user is None:
                raise Refusal(401, "Invalid username or password.")
            self._answer({"type": "user", "name": self.user.name, "orgs": []})

        def _create(self) -> None:
            if self.user is None:
                raise Refusal(401, "Invalid username or password.")
            request = json.loads(self.body)
            repo = f"{request.get('organization') or self.user.name}/{request['name']}"
            if not self._owns(repo) or not self.user.may_write:
                raise Refusal(403, f"You don't have the rights to create a model under the namespace {repo}")
            if repo in hub.repos:
                url = f"{hub.endpoint}/{repo}"
                self._answer({"error": "You already created this model repo", "url": url}, 409)
                return
            hub.create(repo, private=request.get("visibility") == "private" or request.get("private") is True)
            self._answer({"url": f"{hub.endpoint}/{repo}", "name": repo, "id": repo})

        def _access(self, repo: str, write: str | None) -> None:
            self._find(repo, write=write is not None)
            self._answer({"ok": True})

        def _branch(self, repo: str, branch: str) -> None:
            found = self._find(repo, write=True)
            if branch in found.branches:
                raise Refusal(409, "Reference already exists")
            found.branches[branch] = list(found.branches["main"])
            self._answer({"ok": True}, 201)

        def _refs(self, repo: str) -> None:
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].oid}
                for name, commits in self._find(repo).branches.items()
            ]
            self._answer({"branches": branches, "tags": [], "converts": []})

        def _info(self, repo: str, revision: str = "main") -> None:
            commit = self._find_commit(repo, revision)
            siblings = [{"rfilename": path} for path in commit.files]
            private = hub.repos[repo].private
            self._answer({"id": repo, "sha": commit.oid, "siblings": siblings, "private": private, "tags": []})

        def _entry(self, path: str, file: File) -> dict:
            lfs = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
            entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
            return entry | ({"lfs": lfs} if file.is_lfs else {})

        def _tree(self, repo: str, revision: str, under: str | None = None) -> None:
            files = self._find_commit(repo, revision).files
            inside = {path: file for path, file in files.items() if not under or path.startswith(f"{under}/")}
            if under and not inside:
                raise Refusal(404, f"{under} does not exist", "EntryNotFound")
            if "recursive" not in parse_qs(self.url.query, keep_blank_values=True):
                depth = len(under.split("/")) if under else 0
                inside = {path: file for path, file in inside.items() if path.count("/") == depth}
            self._answer([self._entry(path, file) for path, file in inside.items()])

        def _paths(self, repo: str, revision: str) -> None:
            files = self._find_commit(repo, revision).files
            wanted = json.loads(self.body)["paths"]
            self._answer([self._entry(path, files[path]) for path in wanted if path in files])

        # Uploads

        def _validate(self) -> None:
            errors = [{"message": error} for error in check_card(json.loads(self.body)["content"])]
            self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

        def _preupload(self, repo: str, revision: str) -> None:
            self._find(repo, write=True)
            present = self._find_commit(repo, revision).files
            answers = []
            for file in json.loads(self.body)["files"]:
                path = file["path"]
                mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
                oid = present[path].etag if path in present else None
                answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._answer({"files": answers})

        def _batch(self, repo: str) -> None:
            self._find(repo, write=True)
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                entry = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in hub.lfs:
                    url, header = f"{hub.endpoint}/lfs/{wanted['oid']}", {}
                    if hub.part_size is not None:
                        count = -(-wanted["size"] // hub.part_size)
                        header = {f"{i:05d}": f"{url}/{i}" for i in range(1, count + 1)}
                        header["chunk_size"] = str(hub.part_size)
                    upload = {"href": f"{url}/complete" if header else url, "header": header}
                    entry["actions"] = {"upload": upload, "verify": {"href": f"{url}/verify", "header": {}}}
                objects.append(entry)
            self._answer({"transfer": "basic" if hub.part_size is None else "multipart", "objects": objects})

        def _put(self, oid: str, part: str | None) -> None:
            if part is None:
                hub.put_lfs(oid, self.body)
            else:
                hub.put_part(oid, int(part), self.body)
            self._answer(b"", headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

        def _after_put(self, oid: str, action: str) -> None:
            if action == "complete":
                hub.join_parts(oid)
            elif oid not in hub.lfs:
                raise Refusal(404, "The large file has not arrived")
            self._answer({"ok": True})

        def _commit(self, repo: str, revision: str) -> None:
            self._find(repo, write=True)
            files = dict(self._find_commit(repo, revision).files)
            message = ""
            for line in self.body.splitlines():
                entry = json.loads(line)
                key, value = entry["key"], entry["value"]
                if key == "header":
                    message = value["summary"]
                elif key == "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
                elif key == "lfsFile":
                    if value["oid"] not in hub.lfs:
                        raise Refusal(400, f"The large file {value['path']} has not arrived")
                    files[value["path"]] = File(hub.lfs[value["oid"]], is_lfs=True)
                elif key == "deletedFile":
                    files.pop(value["path"])
                else:
                    raise Refusal(400, f"Unknown operation {key}")
            commit = hub.commit(repo, revision, message, files)
            url = f"{hub.endpoint}/{repo}/commit/{commit.oid}"
            self._answer({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

        # Downloads

        def _resolve(self, repo: str, revision: str, path: str) -> None:
            commit = self._find_commit(repo, revision)
            if path not in commit.files:
                raise Refusal(404, f"{path} does not exist", "EntryNotFound")
            file = commit.files[path]
            headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
            if file.is_lfs:
                headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if span is None:
                self._answer(file.content, headers=headers)
                return
            first = int(span.group(1))
            last = int(span.group(2) or len(file.content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(file.content)}"
            self._answer(file.content[first : last + 1], 206, headers)

    return Handler


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A Hub at `endpoint` while the context lasts."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
