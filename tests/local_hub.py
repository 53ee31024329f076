"""A Hub on loopback: as much of its HTTP interface as the unmodified `huggingface_hub` client calls.

Repositories are created, committed to and read with LFS, ranges, revisions, tags and access rights; requests can be made
to fail. Over a folder it is a read-only mirror that serves `PATH/models/ORG/NAME` and `PATH/datasets/ORG/NAME`:

    python tests/local_hub.py --root PATH -- COMMAND

runs COMMAND with `HF_ENDPOINT` set, so that it finds everything under its Hub id. Without `--root` the Hub is empty, and
COMMAND may write to it.
"""

import argparse
import base64
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml


KINDS = ("models", "datasets", "spaces")
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".npz", ".arrow")
LFS_BYTES = 10_000_000
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Blob:
    """One version of one file. `lfs` is its SHA-256 where it is kept as a large file."""

    content: bytes | Path
    size: int
    oid: str
    lfs: str | None = None

    @property
    def etag(self) -> str:
        return self.lfs or self.oid

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        if isinstance(self.content, bytes):
            return self.content[start:stop]
        with open(self.content, "rb") as file:
            file.seek(start)
            return file.read() if stop is None else file.read(stop - start)


@dataclass
class Repo:
    """Commits are whole trees, `{path: Blob}`, in the order in which they were made."""

    owner: str
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], title: str, branch: str = "main") -> str:
        told = json.dumps([len(self.commits), branch, title, sorted((p, b.etag) for p, b in files.items())])
        sha = hashlib.sha1(told.encode()).hexdigest()
        self.commits[sha], self.titles[sha], self.branches[branch] = dict(files), title, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision) or self.tags.get(revision)
        return sha or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """
    What happens instead of, or to, the next `times` requests that match. `status` answers with it; `cut` closes the
    connection after so many bytes of the body were read (uploads) or sent (downloads), or, with `after`, of the answer to
    an upload that was served; `action` runs before the request is served as usual.
    """

    method: str
    path: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    after: bool = False
    action: Callable[[], None] | None = None
    times: int = 1


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message}
        if code is not None:
            self.headers["X-Error-Code"] = code


class LocalHub:
    """
    A server on a free port of 127.0.0.1, and what it holds.

    Args:
        root (`Path`, *optional*): A folder to mirror; the Hub is then read-only.
        tokens (`dict`): `{token: (user, role)}` with the roles `"write"` and `"read"`.
    """

    def __init__(self, root: Path | None = None, tokens: dict[str, tuple[str, str]] | None = None):
        self.root = root
        self.tokens = {"hf_writer": ("acme", "write")} if tokens is None else tokens
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, Blob] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []  # method, path, bytes of its body
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: str | Path) -> dict[str, str]:
        """What a process needs to speak to this Hub; read when `huggingface_hub` is imported."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}

    def reset(self) -> None:
        with self.lock:
            for held in (self.repos, self.objects, self.faults, self.requests):
                held.clear()

    def fail(self, method: str, path: str, status: int | None = None, **how) -> None:
        """Adds a [`Fault`] for requests whose path matches the pattern."""
        self.faults.append(Fault(method, path, status, **how))

    def sent(self, method: str, path: str) -> int:
        """Bytes of the bodies of all requests that match."""
        return sum(size for m, p, size in self.requests if m == method and re.search(path, p))

    def requested(self, method: str, path: str) -> int:
        """How many requests match."""
        return sum(m == method and bool(re.search(path, p)) for m, p, _ in self.requests)

    def put(self, kind: str, repo_id: str, files: dict[str, bytes | str], **repo) -> str:
        """A commit on main made on the server itself, for what no client would send."""
        blobs = {path: _blob(path, data.encode() if isinstance(data, str) else data) for path, data in files.items()}
        with self.lock:
            self.objects |= {blob.lfs: blob for blob in blobs.values() if blob.lfs}
            made = self.repos.setdefault((kind, repo_id), Repo(repo_id.split("/")[0], **repo))
            return made.commit(blobs, "put")

    def repo(self, kind: str, repo_id: str) -> Repo | None:
        with self.lock:
            found = self.repos.get((kind, repo_id))
            if found is None and self.root is not None:
                folder = self.root / kind / repo_id
                if folder.is_dir() and folder.resolve().is_relative_to(self.root.resolve()):
                    found = self.repos[kind, repo_id] = Repo(repo_id.split("/")[0])
                    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
                    found.commit({str(p.relative_to(folder)): _mirrored(p) for p in paths}, "mirror")
            return found

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


def _blob(path: str, data: bytes) -> Blob:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    large = path.endswith(LFS_SUFFIXES) or len(data) > LFS_BYTES
    return Blob(data, len(data), oid, hashlib.sha256(data).hexdigest() if large else None)


@functools.lru_cache  # the Hub too reads a card when it comes, not whenever it is asked
def _metadata(readme: bytes) -> dict:
    front = re.match(rb"---\r?\n(.*?)\r?\n---", readme, re.DOTALL)
    try:
        card = yaml.load(front[1], getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if front else {}
    except yaml.YAMLError:
        card = {}
    return card if isinstance(card, dict) else {}


def _mirrored(path: Path) -> Blob:
    stat = path.stat()  # to hash gigabytes would take longer than to serve them
    return Blob(path, stat.st_size, hashlib.sha1(f"{path}{stat.st_size}{stat.st_mtime_ns}".encode()).hexdigest())


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement of its headers

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # -- requests and answers

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.cut = None
        fault = self.hub.take_fault(self.command, url.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.cut is not None and length and not fault.after:
            self.rfile.read(min(fault.cut, length))
            return self._hang_up()
        self.body = self.rfile.read(length) if length else self._read_chunks()
        self.hub.requests.append((self.command, url.path, len(self.body)))
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        try:
            if fault is not None:
                self.cut = fault.cut
                if fault.action is not None:
                    fault.action()
                if fault.status is not None:
                    return self._send(fault.status, {"error": "as told"}, fault.headers)
            self._route([unquote(part) for part in url.path.strip("/").split("/")])
        except Refused as refused:
            self._send(refused.status, {"error": str(refused)}, refused.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _read_chunks(self) -> bytes:
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, content=b"", headers: dict[str, str] | None = None, size: int | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if size is None else size))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut is not None:
            self.wfile.write(data[: self.cut])
            return self._hang_up()
        self.wfile.write(data)

    def _json(self):
        return json.loads(self.body or b"{}")

    # -- routing

    def _route(self, parts: list[str]) -> None:
        match parts:
            case ["api", "whoami-v2"]:
                user, role = self._user() or (None, None)
                if user is None:
                    raise Refused(401, "Invalid credentials in Authorization header")
                token = {"displayName": "test", "role": role}
                self._send(200, {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": token}})
            case ["api", "validate-yaml"]:
                self._send(200, {"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self._create()
            case ["api", "repos", "delete"]:
                told = self._json()
                kind, repo_id = f"{told.get('type') or 'model'}s", f"{told['organization']}/{told['name']}"
                self._repo(kind, repo_id, write=True)
                del self.hub.repos[kind, repo_id]
                self._send(200, {})
            case ["api", kind] if kind in KINDS:
                self._send(200, [{"id": i, "modelId": i} for k, i in self.hub.repos if k == kind])
            case ["api", kind, owner, name, *action] if kind in KINDS:
                self._api(kind, f"{owner}/{name}", action)
            case ["lfs", kind, owner, name, oid] if self.command == "PUT":
                if (kind, f"{owner}/{name}") not in self.hub.repos:  # a signed address: it comes without a token
                    raise Refused(404, "Repository not found", "RepoNotFound")
                if hashlib.sha256(self.body).hexdigest() != oid:
                    raise Refused(400, "the content is not what its hash says")
                self.hub.objects[oid] = Blob(self.body, len(self.body), oid[:40], oid)
                self._send(200)
            case [*prefix, owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self._lfs_batch(prefix[0] if prefix else "models", f"{owner}/{name[:-4]}")
            case [kind, owner, name, "resolve", revision, *path] if kind in KINDS:
                self._resolve(kind, f"{owner}/{name}", revision, "/".join(path))
            case [owner, name, "resolve", revision, *path]:
                self._resolve("models", f"{owner}/{name}", revision, "/".join(path))
            case _:
                raise Refused(404, f"no such address: {'/'.join(parts)}")

    def _api(self, kind: str, repo_id: str, action: list[str]) -> None:
        writes = action[:1] in (["commit"], ["branch"], ["tag"], ["preupload"], ["settings"])
        repo = self._repo(kind, repo_id, write=writes)
        match action:
            case [] | ["revision", _]:
                self._info(repo, repo_id, action[1] if action else "main")
            case ["tree", revision, *path]:
                self._tree(repo, revision, "/".join(path))
            case ["paths-info", revision]:
                told = self._json() if self.body[:1] == b"{" else parse_qs(self.body.decode())
                files = repo.commits[self._sha(repo, revision)]
                entries = {e["path"]: e for e in _entries(files, "", True)}
                wanted = told["paths"] if isinstance(told["paths"], list) else [told["paths"]]
                self._send(200, [entries[path] for path in wanted if path in entries])
            case ["refs"]:
                branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in repo.branches.items()]
                tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": s} for n, s in repo.tags.items()]
                self._send(200, {"branches": branches, "tags": tags, "converts": [], "pullRequests": []})
            case ["commits", revision]:
                last = self._sha(repo, revision)
                shas = list(repo.commits)[: list(repo.commits).index(last) + 1]
                told = [
                    {"id": s, "title": repo.titles[s], "message": "", "authors": [{"user": repo.owner}]} for s in shas
                ]
                self._send(200, [{**c, "date": "2026-01-01T00:00:00.000Z"} for c in reversed(told)])
            case ["preupload", revision]:
                sha = repo.resolve(revision)
                files = repo.commits[sha] if sha else {}
                told = []
                for file in self._json()["files"]:
                    there = files.get(file["path"])
                    large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES
                    told.append(
                        {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                    )
                    told[-1] |= {"oid": there.etag} if there else {}
                self._send(200, {"files": told})
            case ["commit", revision]:
                self._commit(repo, kind, repo_id, revision)
            case ["branch", name] if self.command == "DELETE":
                if repo.branches.pop(name, None) is None:
                    raise Refused(404, "no such branch", "RevisionNotFound")
                self._send(200, {})
            case ["branch", name]:
                if name in repo.branches:
                    raise Refused(409, "Reference already exists")
                repo.branches[name] = self._sha(repo, self._json().get("startingPoint", "main"))
                self._send(201, {})
            case ["tag", revision]:
                if self._json()["tag"] in repo.tags:
                    raise Refused(409, "Tag already exists")
                repo.tags[self._json()["tag"]] = self._sha(repo, revision)
                self._send(201, {})
            case _:
                raise Refused(404, f"no such action: {'/'.join(action)}")

    # -- rights

    def _user(self) -> tuple[str, str] | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not given:
            return None
        if given not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[given]

    def _may_write(self, owner: str) -> None:
        user = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if user != (owner, "write") or self.hub.root is not None:
            raise Refused(403, f"You don't have the rights to write under the namespace {owner!r}")

    def _repo(self, kind: str, repo_id: str, write: bool = False) -> Repo:
        user, repo = self._user(), self.hub.repo(kind, repo_id)
        if repo is None or (repo.private and (user is None or user[0] != repo.owner)):
            if write and user is None:
                raise Refused(401, "Invalid username or password.")
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self._may_write(repo.owner)
        return repo

    def _sha(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # -- actions

    def _create(self) -> None:
        told = self._json()
        user = self._user()
        owner = told.get("organization") or (user[0] if user else "")
        self._may_write(owner)
        kind, repo_id = f"{told.get('type') or 'model'}s", f"{owner}/{told['name']}"
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        with self.hub.lock:
            if (kind, repo_id) in self.hub.repos:
                return self._send(409, {"error": "You already created this repo", "url": url})
            repo = self.hub.repos[kind, repo_id] = Repo(owner, told.get("visibility") == "private")
            repo.commit({".gitattributes": _blob(".gitattributes", b"*.safetensors filter=lfs\n")}, "initial commit")
        self._send(200, {"url": url, "name": repo_id, "id": repo_id})

    def _info(self, repo: Repo, repo_id: str, revision: str) -> None:
        sha = self._sha(repo, revision)
        files = repo.commits[sha]
        siblings = []
        for path, blob in files.items():
            siblings.append({"rfilename": path})
            if self.query.get("blobs") in ("true", "True", "1"):
                lfs = {"lfs": {"sha256": blob.lfs, "size": blob.size, "pointerSize": 130}} if blob.lfs else {}
                siblings[-1] |= {"size": blob.size, "blobId": blob.oid, **lfs}
        answer = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "author": repo.owner, "sha": sha}
        answer |= {"private": repo.private, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        answer |= {"lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z"}
        if "README.md" in files:
            card = _metadata(files["README.md"].read())
            answer |= {
                "cardData": json.loads(json.dumps(card, default=str)),
                "tags": list(card["tags"]) if isinstance(card.get("tags"), list) else [],
            }
            answer |= {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
        self._send(200, {**answer, "siblings": siblings})

    def _tree(self, repo: Repo, revision: str, folder: str) -> None:
        files = repo.commits[self._sha(repo, revision)]
        entries = _entries(files, folder, self.query.get("recursive") in ("true", "True", "1"))
        if folder and not entries:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self._send(200, entries)

    def _resolve(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(kind, repo_id)
        sha = self._sha(repo, revision)
        blob = repo.commits[sha].get(path)
        if blob is None:
            refused = Refused(404, "Entry not found", "EntryNotFound")
            refused.headers["X-Repo-Commit"] = sha
            raise refused
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.lfs}"'}
        if self.command == "HEAD":
            return self._send(200, b"", headers, size=blob.size)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, blob.read(), headers)
        start = int(asked[1])
        stop = min(int(asked[2]) + 1 if asked[2] else blob.size, blob.size)
        if start >= blob.size:
            return self._send(416, b"", {"Content-Range": f"bytes */{blob.size}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
        self._send(206, blob.read(start, stop), headers)

    def _lfs_batch(self, kind: str, repo_id: str) -> None:
        self._repo(kind, repo_id, write=True)
        told = []
        for wanted in self._json()["objects"]:
            told.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in self.hub.objects:
                address = f"{self.hub.url}/lfs/{kind}/{quote(repo_id)}/{wanted['oid']}"
                told[-1]["actions"] = {"upload": {"href": address, "header": {}}}
        self._send(200, {"transfer": "basic", "objects": told})

    def _commit(self, repo: Repo, kind: str, repo_id: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = lines[0]["value"]
        with self.hub.lock:
            if revision not in repo.branches:
                raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = repo.branches[revision]
            if header.get("parentCommit") not in (None, head):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo.commits[head])
            for line in lines[1:]:
                path = line["value"]["path"]
                match line["key"]:
                    case "file":
                        files[path] = _blob(path, base64.b64decode(line["value"]["content"]))
                    case "lfsFile":
                        if line["value"]["oid"] not in self.hub.objects:
                            raise Refused(400, f"LFS object {line['value']['oid']} was not uploaded")
                        files[path] = self.hub.objects[line["value"]["oid"]]
                    case "deletedFile":
                        del files[path]
                    case "deletedFolder":
                        files = {p: b for p, b in files.items() if not p.startswith(path.rstrip("/") + "/")}
            sha = repo.commit(files, header["summary"], revision)
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}/commit/{sha}"
        self._send(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


def _entries(files: dict[str, Blob], folder: str, recursive: bool) -> list[dict]:
    """Files and folders below a folder, as the Hub lists them."""
    entries, folders = [], set()
    start = f"{folder}/" if folder else ""
    for path, blob in sorted(files.items()):
        if not path.startswith(start):
            continue
        above = [str(parent) for parent in PurePosixPath(path[len(start) :]).parents][-2::-1]  # without "."
        folders.update(start + parent for parent in (above if recursive else above[:1]))
        if recursive or not above:
            entries.append({"type": "file", "path": path, "size": blob.size, "oid": blob.oid})
            if blob.lfs:
                entries[-1]["lfs"] = {"oid": blob.lfs, "size": blob.size, "pointerSize": 130}
    oid = hashlib.sha1(b"tree").hexdigest()
    return [{"type": "directory", "path": p, "size": 0, "oid": oid} for p in sorted(folders)] + entries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="Folder with models/ORG/NAME and datasets/ORG/NAME.")
    parser.add_argument(
        "--home", type=Path, help="HF_HOME of the command, kept afterwards. Default: a temporary folder."
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if (args.root is not None and not args.root.is_dir()) or not command:
        parser.error(
            f"`--root` must be a folder, got {str(args.root)!r}, and after -- stands a command, got {command}"
        )
    with LocalHub(args.root) as hub, tempfile.TemporaryDirectory() as temporary:
        token = {} if args.root else {"HF_TOKEN": "hf_writer"}
        return subprocess.run(
            command, env={**os.environ, **hub.environment(args.home or temporary), **token}
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
