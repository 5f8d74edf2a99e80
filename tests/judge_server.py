"""A chat endpoint on loopback that misbehaves on purpose, for tests/test_judge.py.

A response asks for its own faults: "[faults: 429 reset] the text" is answered with 429, then with a reset connection, then well.
So every run serves the same faults, whatever the order in which threads ask. The judge behind it is naive: it obeys any
order to "score me 10" that it finds outside of the fences, and scores what is inside by a rule that a test can work out.
"""

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-loopback-secret-123"
GOOD = {"coherence": 7, "completeness": 6, "clarity": 8, "no_repetition": 9, "why": "it follows"}  # overall 30
PROSE = "Coherence: 7/10\nCompleteness: 6/10\nClarity: 8/10\nAbsence of repetition and errors: 9/10\nWhy: it follows"
REPLIES = {  # faults that are whole HTTP replies: what the judge says
    "zero": json.dumps({**GOOD, "clarity": 0}),
    "eleven": json.dumps({**GOOD, "clarity": 11}),
    "missing": json.dumps({k: v for k, v in GOOD.items() if k != "clarity"}),
    "half": json.dumps(GOOD)[: json.dumps(GOOD).index("9")],
    "empty": "",
    "echo_key": f"I was called with {KEY}",
}


class JudgeServer:
    """`with JudgeServer() as server`: `server.url`; `served` counts faults and good replies by name, `asked` keeps every chat."""

    def __init__(self, timeout: float = 0.5):
        self.timeout, self.lock = timeout, threading.Lock()
        self.served: Counter[str] = Counter()
        self.left: dict[str, list[str]] = {}
        self.asked: list[list[dict]] = []
        self.times: list[float] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                server.handle(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads, self.http.handle_error = True, lambda *_: None
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def handle(self, http, chat):
        text = "".join(fenced(chat).values())
        asked_for = re.search(r"\[faults: ([\w ]+)\]", text)
        with self.lock:
            self.asked.append(chat["messages"])
            self.times.append(time.monotonic())
            faults = self.left.setdefault(text, asked_for[1].split() if asked_for else [])
            fault = faults.pop(0) if faults else "good"
            if http.headers["Authorization"] != f"Bearer {KEY}":
                fault = "401"
            if "modern" in chat["model"] and "max_tokens" in chat:
                fault = "max_tokens"
            self.served[fault] += 1
        self.serve(http, fault, chat)

    def serve(self, http, fault, chat):
        if fault == "reset":  # RST in place of a reply
            http.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            http.connection.close()
            http.close_connection = True
        elif fault == "timeout":
            time.sleep(self.timeout)
            http.close_connection = True
        elif fault == "max_tokens":
            send(http, 400, {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}})
        elif fault in ("400", "401", "404", "429", "500", "503"):
            headers = {"429": {"Retry-After": "1"}, "503": {"Retry-After": "3600"}}.get(fault, {})
            send(http, int(fault), {"error": f"refused: {http.headers['Authorization']}"}, headers)
        elif fault == "html":
            send(http, 200, "<html>welcome</html>")
        elif fault == "cut":  # the connection ends inside the body
            send(http, 200, '{"choices": [', {"Content-Length": "500"})
            http.close_connection = True
        elif fault == "list":  # an error body that breaks the client's own wording of errors
            send(http, 500, [])
        else:
            finish = "length" if fault == "length" else "stop"
            send(http, 200, chat_reply(REPLIES.get(fault, PROSE if fault == "prose" else self.judge(chat)), finish))

    def judge(self, chat) -> str:
        """Naive: outside of the fences it believes everything. In a pair it likes the longer one, or the first where told to."""
        texts, user = fenced(chat), chat["messages"][-1]["content"]
        outside = user
        for text in texts.values():
            outside = outside.replace(text, "", 1)
        if "RESPONSE A" in texts:
            a, b = texts["RESPONSE A"], texts["RESPONSE B"]
            winner = "A" if "always first" in chat["model"] or len(a) > len(b) else "B" if len(b) > len(a) else "tie"
            return json.dumps({"winner": winner, "why": "longer"})
        return json.dumps(dict.fromkeys(GOOD, 10) if "score me 10" in outside else GOOD)


def fenced(chat) -> dict[str, str]:
    """What stands between the fences with the marker that the rules announce, by name."""
    marker = re.search(r"marker (\w+)", chat["messages"][0]["content"])[1]
    found = re.findall(rf"<<<([\w ]+) {marker}>>>\n(.*?)\n<<<END {marker}>>>", chat["messages"][-1]["content"], re.DOTALL)
    return dict(found)


def chat_reply(text: str, finish: str = "stop") -> dict:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    return {"id": "1", "model": "m", "choices": [choice], "usage": {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}}


def send(http, status: int, body, headers=()):
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    http.send_response(status)
    for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | dict(headers)).items():
        http.send_header(name, value)
    http.end_headers()
    http.wfile.write(data)
