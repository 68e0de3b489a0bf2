"""A whole server on a tiny base, on a socket and a thread of this process."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from dynamic_lora_server.app import create_app
from dynamic_lora_server.config import ServerConfig
from dynamic_lora_server.runtime import Runtime
from tests.support.models import CONTEXT_LENGTH, save_tiny_base


def tiny_config(
    folder: Path, *, context_length: int = CONTEXT_LENGTH, **options: Any
) -> ServerConfig:
    """The configuration of a small server whose base and store lie under `folder`."""
    base = save_tiny_base(folder / "base")
    config = json.loads((base / "config.json").read_text())
    config["max_position_embeddings"] = context_length
    (base / "config.json").write_text(json.dumps(config))
    defaults: dict[str, Any] = {
        "model": str(base),
        "home": folder / "home",
        "adapter_roots": (folder,),
        "adapter_memory": 2**24,
        "kv_memory": 2**24,
        "max_running": 8,
        "max_waiting": 32,
        "dtype": "float32",
        "device": "cpu",
    }
    return ServerConfig(**(defaults | options))


def tiny_app(config: ServerConfig) -> FastAPI:
    """The application, with no shipped adapters."""
    shipped = config.home / "none-shipped"
    shipped.mkdir(parents=True, exist_ok=True)
    return create_app(config, load=lambda: Runtime.load(config, shipped=shipped))


@contextlib.contextmanager
def listening(app: FastAPI, *, timeout: float = 120) -> Iterator[str]:
    """The address of an application that is ready, on a socket and a thread of its own."""
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    address = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        deadline = time.monotonic() + timeout
        while httpx.get(f"{address}/ready").status_code != 200:
            assert time.monotonic() < deadline, "the server did not get ready"
            time.sleep(0.1)
        yield address
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        sock.close()
