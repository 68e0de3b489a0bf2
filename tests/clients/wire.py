"""Answers as the server writes them, and a scripted server on a real socket."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Semaphore, Thread
from typing import Any

VERSION = "3f" * 32

PASSPORT: dict[str, Any] = {
    "name": "ner",
    "version": VERSION,
    "kind": "lora",
    "rank": 8,
    "ranks": None,
    "scaling": 2.0,
    "target_modules": ["down_proj", "q_proj"],
    "num_modules": 60,
    "num_parameters": 2_442_240,
    "bytes": 4_913_432,
    "dtype": "float16",
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "created_at": "2025-11-22T20:57:00Z",
    "chat_template": True,
    "end_tokens": ["<|im_end|>", 2],
    "card": {"description": "Named entities\nof a [tweet]", "metrics": {"f1": 0.5}},
    "checks": ["shapes fit", "values finite"],
    "notes": ["trained from a local path"],
    "ignored_files": ["README.md"],
    "residency": {"tier": "device", "mode": "bypass", "num_merges": 0},
}

COMPOSITION: dict[str, Any] = {
    "name": "newsy",
    "adapter": "ner*0.7+tone*0.3",
    "version": VERSION,
    "parts": [
        {"name": "ner", "pinned": None, "weight": 0.7, "version": VERSION},
        {"name": "tone", "pinned": None, "weight": 0.3, "version": VERSION},
    ],
    "created_at": "2025-11-22T20:57:00Z",
}

TOKENS = [
    {"id": 5, "text": "Zoë", "logprob": -0.25, "special": False},
    {"id": 6, "text": " \u2028ok", "logprob": None, "special": False},
    {"id": 2, "text": "", "logprob": -1, "special": True},
]

DETAILS = {
    "finish_reason": "eos_token",
    "generated_tokens": 3,
    "prompt_tokens": 7,
    "cached_tokens": 5,
    "seed": 11,
    "mode": "bypass",
    "prefill": [],
}

TEXT = "Zoë \u2028ok"

GENERATION = {"generated_text": TEXT, "details": DETAILS | {"tokens": TOKENS}}

SERVED_BY = {"x-adapter": "ner", "x-adapter-version": VERSION}


def sse(*events: dict[str, Any]) -> bytes:
    """Events in the form of `/generate_stream`."""
    return b"".join(f"data:{json.dumps(e, ensure_ascii=False)}\n\n".encode() for e in events)


def token_event(index: int) -> dict[str, Any]:
    """One token of the stream; the last one ends it."""
    last = index == len(TOKENS) - 1
    return {
        "index": index + 1,
        "token": TOKENS[index],
        "generated_text": TEXT if last else None,
        "details": DETAILS if last else None,
    }


STREAM = sse(*(token_event(index) for index in range(len(TOKENS))))


def problem(status: int, name: str = "invalid", **fields: Any) -> dict[str, Any]:
    """A problem document."""
    return {
        "type": f"/problems/{name}",
        "title": "Refused",
        "status": status,
        "detail": "It cannot be done.",
    } | fields


@dataclass
class Reply:
    """What the scripted server answers once; it sleeps `pause` seconds before each chunk.

    With `go_on`, it acquires that before each chunk instead. A reply that `breaks` announces more
    bytes than it sends.
    """

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] | None = None
    pause: float = 0.0
    go_on: Semaphore | None = None
    breaks: bool = False

    def parts(self) -> list[bytes]:
        if self.chunks is not None:
            return self.chunks
        return [] if self.body is None else [json.dumps(self.body).encode()]


@dataclass
class Received:
    """A request as it came."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Wire:
    """A scripted server: gives `replies` in turn and keeps the requests."""

    url: str
    replies: list[Reply] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    hung_up: Event = field(default_factory=Event)

    def reply(self, body: Any = None, **options: Any) -> None:
        """Answer the next request so."""
        self.replies.append(Reply(body, **options))

    def sees_hang_up(self) -> bool:
        """Whether a caller goes away before it has the whole answer."""
        return self.hung_up.wait(timeout=30)


@contextmanager
def serve_wire() -> Iterator[Wire]:
    """Run a scripted server on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    wire = Wire(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = _handler_class(wire)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield wire
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler_class(wire: Wire) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("content-length", 0))
            headers = {key.lower(): value for key, value in self.headers.items()}
            body = self.rfile.read(length)
            wire.received.append(Received(self.command, self.path, headers, body))
            try:
                self.send(wire.replies.pop(0))
            except OSError:
                wire.hung_up.set()

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def send(self, reply: Reply) -> None:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if reply.breaks:
                self.send_header("content-length", str(sum(map(len, reply.parts())) + 1))
            self.end_headers()
            for chunk in reply.parts():
                if reply.go_on is None:
                    time.sleep(reply.pause)
                elif not reply.go_on.acquire(timeout=60):
                    raise TimeoutError("nobody lets the next chunk go")
                self.wfile.write(chunk)
                self.wfile.flush()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    return Handler
