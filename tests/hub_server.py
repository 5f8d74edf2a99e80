"""A hub on the loopback address: serves folders as repositories to the real huggingface_hub code.

    python tests/hub_server.py FOLDER [PORT]      FOLDER/OWNER/NAME/... is the repository OWNER/NAME

Then HF_ENDPOINT=http://127.0.0.1:PORT. It speaks what snapshot_download asks: the commit of a revision, the list of files,
HEAD and GET of each. Files stream from disk, so they may be large.
A dataset OWNER/NAME is served from FOLDER/datasets/OWNER/NAME.
"""

import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """with Hub(folder) as hub: hub.url, hub.asked (paths), hub.gated (ids), hub.dropped (file names whose
    transfers break off in the middle), hub.dropped_once (those that do so once)."""

    def __init__(self, folder: Path, port: int = 0):
        self.folder, self.asked = Path(folder), []
        self.gated: set[str] = set()
        self.dropped: set[str] = set()
        self.dropped_once: set[str] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (Handler,), {"hub": self}))
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
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?|/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if not found:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        name, what, file = found[1] or found[3], found[2] or "", found[4]
        folder = self.hub.folder / name
        if not folder.is_dir():
            return self.answer(401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        if name in self.hub.gated:  # as the real one: what it is may be read, its files not
            if file or "/tree" in what:
                code = 403 if self.headers.get("Authorization") else 401
                return self.answer(code, b'{"error": "Access to this model is restricted"}', {"X-Error-Code": "GatedRepo"})
        if file:
            return self.send_file(folder / file)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if "/tree" in what:
            listed = [{"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size, "oid": digest(p)} for p in files]
            return self.answer(200, json.dumps(listed).encode())
        info = {"_id": "0", "id": name, "sha": COMMIT, "siblings": [{"rfilename": str(p.relative_to(folder))} for p in files],
                "private": False, "gated": False, "tags": [], "downloads": 0, "likes": 0}
        return self.answer(200, json.dumps(info).encode())

    do_HEAD = do_GET

    def send_file(self, path: Path) -> None:
        if not path.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        size = path.stat().st_size
        self.send_head(200, size, {"ETag": f'"{digest(path)}"', "X-Repo-Commit": COMMIT})
        if self.command == "HEAD":
            return
        end = size // 2 if path.name in self.hub.dropped | self.hub.dropped_once else size
        self.hub.dropped_once -= {path.name}
        with path.open("rb") as file:
            while piece := file.read(min(2**20, max(0, end - file.tell()))):
                self.wfile.write(piece)
        self.close_connection = end < size

    def answer(self, code: int, body: bytes, headers: dict | None = None) -> None:
        self.send_head(code, len(body), headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_head(self, code: int, length: int, headers: dict) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(length), "Content-Type": "application/json", **headers}.items():
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
