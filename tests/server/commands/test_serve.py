"""`dynamic-lora serve`: options, one clear line when ready, and a start that fails."""

import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner

from dynamic_lora_adapters.home.store import BlobStore
from dynamic_lora_server.commands.serve import serve
from dynamic_lora_server.config import ServerConfig
from tests.support.eventually import wait_until
from tests.support.models import save_tiny_base

FIELDS = fields(ServerConfig)
APP = typer.Typer()
APP.command()(serve)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--port", "70000"], "port must lie between"),
        (["--kv-memory", "lots"], "not a number of bytes"),
        (["--prefix-cache-memory", "-1"], "is not a number of bytes"),
        (["--dtype", "int3"], "dtype must be one of"),
        (["--speculate", "8"], "speculate must lie between 0 and 7"),
        (["--served-model-name", "a b"], "served_model_names holds 'a b'"),
        (["--served-model-name", "a", "--served-model-name", "a"], "must not repeat a name"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(arguments: list[str], text: str) -> None:
    result = CliRunner().invoke(APP, arguments)
    assert result.exit_code == 2
    assert text in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def test_the_address_comes_from_variables_that_are_the_servers_own() -> None:
    chance = {"HOST": "x86_64-conda-linux-gnu", "PORT": "70000"}
    result = CliRunner().invoke(APP, ["--log-level", "loud"], env=chance)
    assert "log_level must be one of" in " ".join(result.output.split())
    meant = {"DYNAMIC_LORA_LISTEN_PORT": "70000"}
    result = CliRunner().invoke(APP, ["--log-level", "loud"], env=meant)
    assert "port must lie between" in " ".join(result.output.split())


def test_every_option_of_the_server_can_be_given() -> None:
    given = set(inspect.signature(serve).parameters)
    repeatable = {
        "adapter_roots",
        "api_keys",
        "admin_keys",
        "allowed_origins",
        "served_model_names",
    }
    wanted = {f.name.removesuffix("s") if f.name in repeatable else f.name for f in FIELDS}
    assert given == wanted


def _start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dynamic_lora_server", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def _line_with(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr is not None
    return next(line for line in process.stderr if text in line)


@contextmanager
def _ready(tmp_path: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of a tiny base, and the address that its one line names."""
    base, home = save_tiny_base(tmp_path / "base"), str(tmp_path / "home")
    process = _start("--model", str(base), "--home", home, "--kv-memory", "64MiB", *options)
    stop = threading.Timer(200, process.kill)
    stop.start()
    try:
        assert _line_with(process, "Loading the base model") == "Loading the base model\n"
        line = _line_with(process, "ready at")
        found = re.search(r"Dynamic LoRA ready at (http://\S+) · base .+ · \d+ adapters?", line)
        assert found is not None, line
        yield process, found[1]
    finally:
        stop.cancel()
        process.kill()
        process.communicate()


def test_an_idle_connection_is_kept_as_long_as_was_asked(tmp_path: Path) -> None:
    assert ServerConfig().keep_alive_seconds > 60  # what nginx and AWS's load balancers keep
    with _ready(tmp_path, "--keep-alive-seconds", "1") as (_, url):
        address = httpx.URL(url)
        assert address.port is not None
        with socket.create_connection((address.host, address.port), timeout=60) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            while connection.recv(4096):
                pass


def test_it_says_where_it_is_ready_and_ends_on_interrupt(tmp_path: Path) -> None:
    with _ready(tmp_path) as (process, url):
        assert httpx.get(f"{url}/ready").status_code == 200
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/ready")


def test_two_interrupts_end_it_within_a_request(tmp_path: Path) -> None:
    """The second does not wait for what runs; the engine is in torch's C++ then."""
    with _ready(tmp_path) as (process, url):
        wish = {"inputs": "a", "parameters": {"max_new_tokens": 400, "ignore_eos": True}}
        with (
            httpx.stream("POST", f"{url}/generate_stream", json=wish, timeout=60) as answer,
            suppress(httpx.RemoteProtocolError),
        ):
            for number, _ in enumerate(answer.iter_lines()):
                if number in (3, 6):
                    process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors


LONG = {"inputs": "a", "parameters": {"max_new_tokens": 400, "ignore_eos": True}}


@pytest.mark.parametrize("grace", ["0", "60"])
def test_on_sigterm_a_stream_ends_with_its_answer_or_with_the_reason(
    tmp_path: Path, grace: str
) -> None:
    with _ready(tmp_path, "--grace-seconds", grace) as (process, url):
        with httpx.stream("POST", f"{url}/generate_stream", json=LONG, timeout=60) as answer:
            events = (json.loads(line[5:]) for line in answer.iter_lines() if line)
            next(events)
            process.send_signal(signal.SIGTERM)
            *_, last = events
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, errors
    assert "Traceback" not in errors
    if grace == "0":
        assert (last["type"], last["error_type"]) == ("/problems/not-ready", "generation")
        assert last["error"].startswith("The server is shutting down.")
    else:
        assert last["details"]["generated_tokens"] == 400


def test_on_sigterm_a_request_that_runs_too_long_may_be_sent_again(tmp_path: Path) -> None:
    with _ready(tmp_path, "--grace-seconds", "0") as (process, url):
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/generate", json=LONG, timeout=60))
        )
        asking.start()
        wait_until(
            lambda: "running_sequences 1.0" in httpx.get(f"{url}/metrics").text, "the request runs"
        )
        process.send_signal(signal.SIGTERM)
        asking.join()
        process.communicate(timeout=60)
    assert answers[0].status_code == 503
    assert answers[0].json()["type"] == "/problems/not-ready"
    assert answers[0].headers["retry-after"]


def test_a_home_that_another_server_uses_is_refused_before_the_model_is_loaded(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    store = BlobStore(home)
    try:
        process = _start("--model", "nowhere/at-all", "--home", str(home))
        _, errors = process.communicate(timeout=200)
    finally:
        store.close()
    assert process.returncode == 1
    assert f"error: Another server is using '{home}'." in errors
    assert "fix: Stop it, or give this server a --home of its own." in errors


def test_a_port_that_is_taken_is_named_with_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        process = _start("--home", str(tmp_path / "home"), "--port", port)
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert f"error: Port {port} of 127.0.0.1 cannot be listened on" in errors
    assert "fix: Stop the server that has it, or give another --port" in errors
    assert "Traceback" not in errors


def test_a_host_that_is_no_name_is_refused(tmp_path: Path) -> None:
    process = _start("--home", str(tmp_path / "home"), "--host", "my..host")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "of my..host cannot be listened on" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "stage", ["Loading the base model", "Checking the model", "Measuring the delta kernels"]
)
def test_an_interrupt_while_the_model_loads_ends_it_without_a_crash(
    tmp_path: Path, stage: str
) -> None:
    """Torch's C++ aborts the process if Python ends the loading thread within it."""
    base, home = save_tiny_base(tmp_path / "base"), str(tmp_path / "home")
    process = _start("--model", str(base), "--home", home)
    try:
        _line_with(process, stage)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Interrupted while the model was at work." in errors
    assert process.returncode == 130, errors


def test_a_base_that_cannot_be_loaded_ends_the_process_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    process = _start("--model", str(tmp_path / "empty"), "--home", str(tmp_path / "home"))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "config.json" in errors
    assert "Traceback" not in errors


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's OpenMP runtime is asked")
@pytest.mark.parametrize(("own", "expected"), [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77")])
def test_threads_that_wait_sleep_soon_unless_the_user_says_how_long(
    tmp_path: Path, own: dict[str, str], expected: str
) -> None:
    home = str(tmp_path / "home")
    process = _start("--home", home, "--model", "nowhere", OMP_DISPLAY_ENV="VERBOSE", **own)
    try:
        assert f"'{expected}'" in _line_with(process, "GOMP_SPINCOUNT")
    finally:
        process.kill()
        process.communicate()
