"""A hub on the loopback address: serves folders as repositories to the real huggingface_hub code.

    python tests/hub_server.py FOLDER [PORT]      FOLDER/OWNER/NAME/... is the repository OWNER/NAME

Then HF_ENDPOINT=http://127.0.0.1:PORT. It answers what snapshot_download asks: the commit of a
revision, the list of files, HEAD and GET of each. Files stream from disk, so they may be large. A
dataset is served from FOLDER/datasets/OWNER/NAME, revision v1 from FOLDER/OWNER/NAME@v1.
"""

import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT, V1 = "0123456789abcdef0123456789abcdef01234567", "1" * 40
REQUEST = re.compile(
    r"/(?:api/models/)?((?:datasets/)?[^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?"
)


class Hub:
    """with Hub(folder) as hub: hub.url, hub.asked (requests), hub.gated (ids), hub.dropped (names
    of files whose transfers break off in the middle), hub.dropped_once (those that do so once).
    """

    def __init__(self, folder: Path, port: int = 0):
        self.folder, self.asked = Path(folder), []
        self.gated: set[str] = set()
        self.dropped: set[str] = set()
        self.dropped_once: set[str] = set()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        name, what, revision, file = REQUEST.fullmatch(path).groups()
        early = revision in ("v1", V1)
        folder = self.hub.folder / (f"{name}@v1" if early else name)
        if not (self.hub.folder / name).is_dir():
            return self.answer(401, {"error": "not found"}, "RepoNotFound")
        if not folder.is_dir() or revision not in (None, "main", COMMIT, "v1", V1):
            return self.answer(404, {"error": "no such revision"}, "RevisionNotFound")
        if name in self.hub.gated and what in ("tree", "resolve"):  # its files may not be read
            code = 403 if self.headers.get("Authorization") else 401
            return self.answer(code, {"error": "restricted"}, "GatedRepo")
        if what == "resolve":
            return self.send_file(folder / file, V1 if early else COMMIT)
        files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
        if what == "tree":
            kinds = {n: {"type": "file", "oid": digest(p)} for n, p in files.items()}
            sizes = {n: {"path": n, "size": p.stat().st_size} for n, p in files.items()}
            return self.answer(200, [kinds[n] | sizes[n] for n in files])
        info = {"_id": "0", "id": name, "sha": V1 if early else COMMIT, "private": False}
        info |= {"siblings": [{"rfilename": n} for n in files], "gated": False, "tags": []}
        return self.answer(200, info | {"downloads": 0, "likes": 0})

    do_HEAD = do_GET

    def send_file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            return self.answer(404, {}, "EntryNotFound")
        size = path.stat().st_size
        self.send_head(200, size, {"ETag": f'"{digest(path)}"', "X-Repo-Commit": commit})
        if self.command == "HEAD":
            return
        end = size // 2 if path.name in self.hub.dropped | self.hub.dropped_once else size
        self.hub.dropped_once -= {path.name}
        with path.open("rb") as file:
            while piece := file.read(min(2**20, max(0, end - file.tell()))):
                self.wfile.write(piece)
        self.close_connection = end < size

    def answer(self, code: int, content: object, error: str = "") -> None:
        body = json.dumps(content).encode()
        self.send_head(code, len(body), {"X-Error-Code": error} if error else {})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_head(self, code: int, length: int, headers: dict) -> None:
        self.send_response(code)
        known = {"Content-Length": str(length), "Content-Type": "application/json"}
        for key, value in (known | headers).items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


def digest(path: Path) -> str:
    stat = path.stat()
    return hashlib.sha1(f"{path}{stat.st_size}{stat.st_mtime_ns}".encode()).hexdigest()


if __name__ == "__main__":
    hub = Hub(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8008)
    print(f"HF_ENDPOINT={hub.url}", flush=True)
    hub.server.serve_forever()
