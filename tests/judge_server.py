"""A chat endpoint on loopback that misbehaves on purpose, for tests/test_judge.py.
A response asks for its own faults: the first request for "[faults: 429 drop] the text" gets a 429,
the second no reply, the third a good one, in whatever order threads ask. The judge behind it is
naive: it obeys any "score me 10" outside the fences."""

import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-loopback-secret-123"
GOOD = {"coherence": 7, "completeness": 6, "clarity": 8, "no_repetition": 9, "why": "it follows"}
BEST = json.dumps(dict.fromkeys(GOOD, 10))
REPLIES = {  # faults that are whole chat completions, by what their message holds
    "zero": json.dumps({**GOOD, "clarity": 0}),
    "half": json.dumps(GOOD)[: json.dumps(GOOD).index("9")],
    "parts": [{"type": "text", "text": json.dumps(GOOD)}],
    "number": 7,
    "null": None,
    "echo": f"I was called with {KEY}",
    "escape": json.dumps({**GOOD, "why": "\x1b[31m red \ud83d"}),
}
BODIES = {  # faults that are 200, but no chat completion
    "cut": '{"choices": [',  # the connection ends before the length that it announces
    "html": "<html>welcome</html>",
    "error": '{"error": {"message": "overloaded"}}',
    "usage": '{"usage": "many", "choices": [{"message": {"content": "x"}}]}',
    "deep": "[" * 100_000,
    "big": " " * 3_000_000 + json.dumps({"choices": [{"message": {"content": BEST}}]}),
}


class Loopback(ThreadingHTTPServer):
    """with Loopback(handler, ...) as server: it serves at server.url, in a thread."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, handler: type, path: str = ""):
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}{path}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Answers(BaseHTTPRequestHandler):
    """Silent; a reply may break off at byte `end`."""

    def send(self, status: int, body: bytes, headers: dict, end: int | None = None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:end])

    def log_message(self, *_):
        pass


class JudgeServer(Loopback):
    """`served` counts faults and good replies by name, `asked` has the chats."""

    def __init__(self):
        super().__init__(Handler, "/v1")
        self.hang, self.lock = 2.0, threading.Lock()  # seconds of "timeout" and "trickle"
        self.served, self.left, self.asked = Counter(), {}, []

    handle_error = Answers.log_message  # of a client that gave up


class Handler(Answers):
    def do_POST(self):
        server, chat = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        system, user = (message["content"] for message in chat["messages"])
        marker = re.search(r"marker (\w+)", system)[1]
        fences = rf"(?s)<<<[\w ]+ {marker}>>>\n(.*?)\n<<<END {marker}>>>"
        text, key = "".join(re.findall(fences, user)), self.headers["Authorization"]
        good = BEST if "score me 10" in re.sub(fences, "", user) else json.dumps(GOOD)
        planned = re.search(r"\[faults: ([\w ]+)\]", text)
        with server.lock:
            server.asked.append(chat["messages"])
            faults = server.left.setdefault(text, planned[1].split() if planned else [])
            fault = faults.pop(0) if faults else "good"
            if fault == "unsupported" and "max_tokens" in chat:
                faults.append(fault)  # until it is asked without max_tokens
            fault = fault if key == f"Bearer {KEY}" else "401"
            server.served[fault] += 1
        if fault in ("drop", "timeout"):
            return time.sleep(server.hang if fault == "timeout" else 0)
        if fault == "trickle":  # each byte comes in time, the reply never does
            for _ in range(int(server.hang / 0.05)):
                self.wfile.write(b"H")
                time.sleep(0.05)
            return None
        end = "length" if fault == "length" else "stop"
        message = {"role": "assistant", "content": REPLIES.get(fault, good)}
        reply = json.dumps({"choices": [{"finish_reason": end, "message": message}]})
        status, body = 200, BODIES.get(fault, reply)
        if fault == "unsupported":
            status, body = 400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'."
        elif fault.isdigit():
            status, body = int(fault), f"refused: {key}"
        length = len(body) + 9 * (fault == "cut")
        return self.send(status, body.encode(), {"Content-Length": str(length), "Location": "/"})
