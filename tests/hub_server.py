"""A hub on the loopback address: serves folders as repositories to the real huggingface_hub code.
FOLDER/OWNER/NAME/... is the repository OWNER/NAME, and FOLDER/OWNER/NAME@v1 its revision v1. It
answers snapshot_download: a revision's commit, the list of files, HEAD and GET of each file."""

import hashlib
import json
import re
from pathlib import Path

from judge_server import Answers, Loopback

COMMIT, V1 = "0123456789abcdef0123456789abcdef01234567", "1" * 40
REQUEST = r"/(?:api/models/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?"


class Hub(Loopback):
    """`asked` has the requests; `gated` ids are refused; files named like `dropped` break off."""

    def __init__(self, folder: Path):
        super().__init__(Handler)
        self.folder, self.asked, self.gated, self.dropped = folder, [], set(), None


class Handler(Answers):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        name, what, revision, file = re.fullmatch(REQUEST, path).groups()
        early = revision in ("v1", V1)
        folder = hub.folder / (f"{name}@v1" if early else name)
        if not (hub.folder / name).is_dir():
            return self.answer(401, {"error": "not found"}, "RepoNotFound")
        if not folder.is_dir() or revision not in (None, "main", COMMIT, "v1", V1):
            return self.answer(404, {"error": "no such revision"}, "RevisionNotFound")
        if name in hub.gated and what in ("tree", "resolve"):  # its files may not be read
            return self.answer(403, {"error": "restricted"}, "GatedRepo")
        if what == "resolve":
            return self.send_file(folder / file, V1 if early else COMMIT)
        files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
        if what == "tree":
            sizes = {n: {"size": p.stat().st_size, "oid": digest(p)} for n, p in files.items()}
            return self.answer(200, [{"type": "file", "path": n} | sizes[n] for n in sizes])
        info = {"_id": "0", "id": name, "sha": V1 if early else COMMIT, "private": False}
        info |= {"siblings": [{"rfilename": n} for n in files], "gated": False, "tags": []}
        return self.answer(200, info | {"downloads": 0, "likes": 0})

    do_HEAD = do_GET

    def send_file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            return self.answer(404, {}, "EntryNotFound")
        body, known = path.read_bytes(), {"ETag": f'"{digest(path)}"', "X-Repo-Commit": commit}
        broken = self.server.dropped and self.server.dropped in path.name
        self.send(200, body, known, len(body) // 2 if broken else None)
        self.close_connection = bool(broken)

    def answer(self, code: int, content: object, error: str = "") -> None:
        headers = {"Content-Type": "application/json"} | ({"X-Error-Code": error} if error else {})
        self.send(code, json.dumps(content).encode(), headers)


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
