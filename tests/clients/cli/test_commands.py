"""The data commands, against a scripted server on a real socket."""

import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dynamic_lora_client import __version__
from dynamic_lora_client.cli import ExitCode, create_app
from tests.clients.wire import (
    COMPOSITION,
    DETAILS,
    GENERATION,
    PASSPORT,
    SERVED_BY,
    STREAM,
    TEXT,
    VERSION,
    Wire,
    problem,
    sse,
    token_event,
)

_MAIN = [sys.executable, "-c", "from dynamic_lora_client.cli import main; main()"]


class Shell:
    """Runs the command with the scripted server's address in its environment."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def __call__(self, *args: str, stdin: str | bytes | None = None) -> Any:
        environment = {"DYNAMIC_LORA_URL": self.wire.url, "NO_COLOR": "1", "TERM": "dumb"}
        return CliRunner().invoke(create_app(), list(args), input=stdin, env=environment)

    def refused(self, status: int, *args: str, name: str = "invalid", **fields: Any) -> Any:
        self.wire.reply(problem(status, name, **fields), status=status)
        return self(*args)


@pytest.fixture
def shell(wire: Wire) -> Shell:
    return Shell(wire)


def test_version(shell: Shell) -> None:
    assert shell("--version").stdout == f"dynamic-lora {__version__}\n"


def test_help_names_commands_and_exit_codes(shell: Shell) -> None:
    text = " ".join(shell("--help").stdout.split())
    for word in ("push", "ls", "show", "rm", "compose", "generate", "serve", "train"):
        assert f" {word} " in text
    for code in ExitCode:
        assert f" {code.value} " in text


def test_push(shell: Shell, peft_dir: Path) -> None:
    shell.wire.reply(PASSPORT, status=201)
    result = shell("push", "ner", str(peft_dir), "--force")
    assert result.exit_code == ExitCode.OK
    assert result.stdout == ("ner 3f3f3f3f3f3f uploaded: lora, rank 8, 2 target modules, 4.9 MB\n")
    assert "Not sent: optimizer.pt" in result.stderr
    assert "Not needed: README.md" in result.stderr
    assert "Note: trained from a local path" in result.stderr
    (received,) = shell.wire.received
    assert received.target == "/adapters"
    assert b'name="force"' in received.body


def test_push_of_known_content(shell: Shell, peft_dir: Path) -> None:
    shell.wire.reply(PASSPORT)
    assert "already there" in shell("push", "ner", str(peft_dir)).stdout
    assert b'name="force"' not in shell.wire.received[0].body


def test_push_from_the_hub(shell: Shell) -> None:
    shell.wire.reply(PASSPORT, status=201)
    result = shell("push", "ner", "hf://org/repo@main", "--force")
    assert result.stdout == ("ner 3f3f3f3f3f3f uploaded: lora, rank 8, 2 target modules, 4.9 MB\n")
    (received,) = shell.wire.received
    assert received.json() == {"name": "ner", "source": "hf://org/repo@main", "force": True}


def test_push_for_scripts(shell: Shell, peft_dir: Path) -> None:
    shell.wire.reply(PASSPORT, status=201)
    result = shell("push", "ner", str(peft_dir), "--json")
    assert json.loads(result.stdout) == {"created": True, "adapter": PASSPORT}


def test_push_of_nothing_is_a_usage_error(shell: Shell, tmp_path: Path) -> None:
    result = shell("push", "ner", str(tmp_path / "none"))
    assert result.exit_code == ExitCode.USAGE
    assert "error: There is no file or directory" in result.stderr
    assert "fix: Give a PEFT directory" in result.stderr


def test_ls_writes_whole_lines_into_a_pipe(shell: Shell) -> None:
    long = PASSPORT | {"name": "n" * 63, "card": {"description": "d" * 300}, "residency": None}
    shell.wire.reply({"adapters": [PASSPORT, long]})
    shell.wire.reply({"compositions": []})
    heading, first, second = lines = shell("ls").stdout.splitlines()
    assert lines == [line.rstrip() for line in lines]
    assert heading.split()[:3] == ["NAME", "VERSION", "KIND"]
    assert "2,442,240" in first and "4.9 MB" in first and "device" in first
    assert r"Named entities\nof a [tweet]" in first
    assert "n" * 63 in second and "d" * 300 in second


def test_a_pipe_gets_lines_of_any_length(shell: Shell) -> None:
    long = PASSPORT | {"name": "n" * 63, "card": {"description": "d " * 5000 + "end"}}
    shell.wire.reply({"adapters": [PASSPORT, long]})
    shell.wire.reply({"compositions": [COMPOSITION | {"adapter": "ner+" * 1000 + "tone"}]})
    _, first, second, _, third = shell("ls").stdout.splitlines()
    assert first.startswith("ner ") and "2,442,240" in first
    assert second.startswith("n" * 63) and second.endswith("d " * 5000 + "end")
    assert third.startswith("newsy") and third.endswith("ner+" * 1000 + "tone")
    shell.wire.reply(long | {"card": {"k" * 2000: "d" * 5000}})
    lines = [line.split() for line in shell("show", "ner").stdout.splitlines()]
    assert ["card." + "k" * 2000, "d" * 5000] in lines


def test_ls_tells_of_unreadable_adapters(shell: Shell) -> None:
    unreadable = {"name": "old", "version": VERSION, "reason": "Stored by\x1b[2J [2.0]."}
    shell.wire.reply({"adapters": [], "unreadable": [unreadable]})
    shell.wire.reply({"compositions": []})
    result = shell("ls")
    assert (result.exit_code, result.stdout) == (ExitCode.OK, "")
    assert result.stderr == f"Unreadable: old {VERSION[:12]}: Stored by\\x1b[2J [2.0].\n"
    shell.wire.reply({"adapters": [], "unreadable": [unreadable]})
    shell.wire.reply({"compositions": []})
    listed = {"adapters": [], "unreadable": [unreadable], "compositions": []}
    assert json.loads(shell("ls", "--json").stdout) == listed


def test_control_characters_of_strangers_are_escaped(shell: Shell, peft_dir: Path) -> None:
    foreign = PASSPORT | {"ignored_files": ["a\x1b[2J"], "card": {"metrics": {"b\x1b[2J": 1}}}
    shell.wire.reply(foreign, status=201)
    (peft_dir / "c\x1b[2J").write_text("")
    pushed = shell("push", "ner", str(peft_dir)).stderr
    assert r"Not needed: a\x1b[2J" in pushed and r"Not sent: c\x1b[2J" in pushed
    shell.wire.reply(foreign)
    shown = shell("show", "ner").stdout
    assert r"card.metrics.b\x1b[2J" in shown
    assert "\x1b" not in pushed + shown


def test_ls_for_scripts(shell: Shell) -> None:
    shell.wire.reply({"adapters": [PASSPORT]})
    shell.wire.reply({"compositions": [COMPOSITION]})
    listed = {"adapters": [PASSPORT], "unreadable": [], "compositions": [COMPOSITION]}
    assert json.loads(shell("ls", "--json").stdout) == listed


def test_ls_lists_compositions_too(shell: Shell) -> None:
    shell.wire.reply({"adapters": []})
    shell.wire.reply({"compositions": [COMPOSITION, COMPOSITION | {"version": None}]})
    heading, first, second = shell("ls").stdout.splitlines()
    assert heading.split() == ["COMPOSITION", "VERSION", "ADAPTERS"]
    assert first.split() == ["newsy", VERSION[:12], "ner*0.7+tone*0.3"]
    assert second.split() == ["newsy", "missing", "ner*0.7+tone*0.3"]


def test_compose(shell: Shell) -> None:
    shell.wire.reply(COMPOSITION, status=201)
    result = shell("compose", "newsy", "tone*0.3+ner*0.7")
    assert result.stdout == "newsy 3f3f3f3f3f3f saved: ner*0.7+tone*0.3\n"
    (received,) = shell.wire.received
    assert (received.method, received.target) == ("PUT", "/compositions/newsy")
    assert received.json() == {"adapter": "tone*0.3+ner*0.7"}
    shell.wire.reply(COMPOSITION)
    result = shell("compose", "newsy", "ner*0.7+tone*0.3", "--json")
    assert json.loads(result.stdout) == COMPOSITION


def test_show_and_rm_of_a_composition(shell: Shell) -> None:
    not_found = problem(404, "adapter-not-found")
    shell.wire.reply(not_found, status=404)
    shell.wire.reply(COMPOSITION)
    lines = [line.split(maxsplit=1) for line in shell("show", "newsy").stdout.splitlines()]
    assert ["adapter", "ner*0.7+tone*0.3"] in lines
    shell.wire.reply(not_found, status=404)
    shell.wire.reply(status=204)
    assert "Deleted newsy." in shell("rm", "newsy", "--yes").stderr
    assert [(r.method, r.target) for r in shell.wire.received][-2:] == [
        ("DELETE", "/adapters/newsy"),
        ("DELETE", "/compositions/newsy"),
    ]


@pytest.mark.parametrize("command", [("show", "nre"), ("rm", "nre", "--yes")])
def test_what_is_neither_is_reported_as_an_adapter(shell: Shell, command: tuple[str, ...]) -> None:
    shell.wire.reply(problem(404, "adapter-not-found", near=["ner"]), status=404)
    shell.wire.reply(problem(404, "composition-not-found"), status=404)
    result = shell(*command)
    assert result.exit_code == ExitCode.NOT_FOUND
    assert "Near names: ner." in result.stderr


def test_ls_of_nothing_keeps_stdout_empty(shell: Shell) -> None:
    shell.wire.reply({"adapters": []})
    shell.wire.reply({"compositions": []})
    result = shell("ls")
    assert result.stdout == ""
    assert "No adapters yet" in result.stderr


def test_show(shell: Shell) -> None:
    shell.wire.reply(PASSPORT)
    lines = [line.split(maxsplit=1) for line in shell("show", "ner").stdout.splitlines()]
    assert ["version", VERSION] in lines
    assert ["card.metrics.f1", "0.5"] in lines
    assert ["card.description", r"Named entities\nof a [tweet]"] in lines
    assert ["target_modules", "down_proj, q_proj"] in lines
    assert ["checks", "shapes fit"] in lines
    assert ["checks", "values finite"] in lines
    assert "ranks" not in dict(lines)


def test_show_for_scripts(shell: Shell) -> None:
    shell.wire.reply(PASSPORT)
    assert json.loads(shell("show", "ner", "--json").stdout) == PASSPORT


def test_rm(shell: Shell) -> None:
    shell.wire.reply(status=204)
    result = shell("rm", "ner", "--yes")
    assert (result.exit_code, result.stdout) == (ExitCode.OK, "")
    assert "Deleted ner." in result.stderr
    assert [(r.method, r.target) for r in shell.wire.received] == [("DELETE", "/adapters/ner")]


def test_rm_for_scripts(shell: Shell) -> None:
    shell.wire.reply(status=204)
    assert json.loads(shell("rm", "ner", "-y", "--json").stdout) == {"deleted": "ner"}


def test_rm_does_not_guess_without_a_terminal(shell: Shell) -> None:
    result = shell("rm", "ner", stdin="y\n")
    assert result.exit_code == ExitCode.USAGE
    assert "Pass --yes" in result.stderr
    assert shell.wire.received == []


def test_generate_streams_the_text_alone(shell: Shell) -> None:
    shell.wire.reply(chunks=[STREAM], headers=SERVED_BY)
    result = shell(
        *("generate", "-a", "ner", "Ada", "--max-new-tokens", "9", "--temperature", "0.5"),
        *("--top-p", "0.9", "--seed", "3", "--stop", "a", "--stop", "b", "--raw"),
    )
    assert (result.exit_code, result.stdout) == (ExitCode.OK, TEXT + "\n")
    (received,) = shell.wire.received
    assert received.target == "/generate_stream?adapter=ner"
    assert received.json() == {
        "inputs": "Ada",
        "parameters": {
            "max_new_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 3,
            "stop": ["a", "b"],
            "details": True,
        },
        "raw": True,
    }


@pytest.mark.parametrize("args", [(), ("-",)])
def test_generate_reads_stdin_without_its_last_line_end(shell: Shell, args: tuple[str]) -> None:
    shell.wire.reply(chunks=[STREAM])
    shell("generate", *args, stdin="one\n Zoë \n")
    assert shell.wire.received[0].json() == {
        "inputs": "one\n Zoë ",
        "parameters": {"details": True},
    }


def test_generate_refuses_stdin_that_is_not_text(shell: Shell) -> None:
    result = shell("generate", stdin=b"\xff\xfe")
    assert result.exit_code == ExitCode.USAGE
    assert "Standard input is not UTF-8" in result.stderr
    assert shell.wire.received == []


def test_generate_for_scripts(shell: Shell) -> None:
    shell.wire.reply(GENERATION, headers=SERVED_BY)
    result = shell("generate", "-a", "ner", "Ada", "--json")
    assert json.loads(result.stdout) == {
        "generated_text": TEXT,
        "adapter": "ner",
        "adapter_version": VERSION,
        "finish_reason": "eos_token",
        "num_prompt_tokens": DETAILS["prompt_tokens"],
        "num_cached_tokens": DETAILS["cached_tokens"],
        "num_tokens": 3,
        "seed": 11,
    }


def test_generate_prints_what_tokens_left_out(shell: Shell) -> None:
    tail = token_event(2) | {"token": None}
    shell.wire.reply(chunks=[sse(token_event(0), tail)])
    assert shell("generate", "Ada").stdout == TEXT + "\n"


def test_generate_ends_the_line_of_an_empty_answer_too(shell: Shell) -> None:
    shell.wire.reply(chunks=[sse(token_event(2) | {"generated_text": ""})])
    assert shell("generate", "Ada").stdout == "\n"


def test_generate_that_breaks_keeps_the_error_off_stdout(shell: Shell) -> None:
    shell.wire.reply(chunks=[sse(token_event(0), {"error": "gone", "error_type": "x"})])
    result = shell("generate", "Ada")
    assert (result.exit_code, result.stdout) == (ExitCode.REFUSED, "Zoë\n")
    assert result.stderr == "error: gone\n"


def test_generate_that_is_cut_off(shell: Shell) -> None:
    shell.wire.reply(chunks=[sse(token_event(0))], breaks=True)
    assert shell("generate", "Ada").exit_code == ExitCode.UNREACHABLE


@pytest.mark.parametrize(
    ("status", "code"),
    [(422, ExitCode.REFUSED), (500, ExitCode.REFUSED), (404, ExitCode.NOT_FOUND)],
)
def test_refusals(shell: Shell, status: int, code: ExitCode) -> None:
    result = shell.refused(status, "show", "ner", field="name", fix="Use another [one].")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr == "error: name: It cannot be done.\nfix: Use another [one].\n"


def test_fields_are_named_once(shell: Shell) -> None:
    result = shell.refused(422, "show", "ner", field="name", detail="name: too long.")
    assert result.stderr == "error: name: too long.\n"


def test_near_names_are_told(shell: Shell) -> None:
    result = shell.refused(
        404, "generate", "-a", "nre", "x", name="adapter-not-found", near=["ner"]
    )
    assert result.exit_code == ExitCode.NOT_FOUND
    assert "fix: Near names: ner." in result.stderr


@pytest.mark.parametrize("status", [429, 503])
def test_busy_server(shell: Shell, status: int) -> None:
    # Longer than the client is willing to wait, so that it does not.
    headers = {"retry-after": "900"}
    shell.wire.reply(problem(status), status=status, headers=headers)
    result = shell("ls")
    assert result.exit_code == ExitCode.BUSY
    assert "fix: Try again in 900 s." in result.stderr


def test_unreachable_server(shell: Shell) -> None:
    result = shell("ls", "--url", shell.wire.url.replace("127.0.0.1", "127.0.0.2"))
    assert result.exit_code == ExitCode.UNREACHABLE
    assert "error: Cannot connect to" in result.stderr
    assert "dynamic-lora serve" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("ls",),
        ("show", "ner"),
        ("rm", "ner", "--yes"),
        ("push", "ner", "PEFT"),
        ("compose", "a", "b"),
        ("generate", "Ada"),
    ],
)
def test_every_command_sends_the_key(
    shell: Shell, peft_dir: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    monkeypatch.setenv("DYNAMIC_LORA_API_KEY", "secret")
    result = shell.refused(403, *(str(peft_dir) if arg == "PEFT" else arg for arg in args))
    assert result.exit_code == ExitCode.REFUSED
    assert {one.headers["authorization"] for one in shell.wire.received} == {"Bearer secret"}


def test_a_proxy_that_cannot_be_used(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://10.0.0.1")
    result = shell("ls", "--url", "http://lora.example.org")
    assert result.exit_code == ExitCode.USAGE
    assert "error: The environment's proxies or certificates cannot be used" in result.stderr
    assert "fix: See ALL_PROXY" in result.stderr


def test_another_kind_of_server(shell: Shell) -> None:
    shell.wire.reply(chunks=[b"<html>"])
    result = shell("ls")
    assert result.exit_code == ExitCode.UNREACHABLE
    assert "error: The server's answer is not JSON." in result.stderr


@pytest.mark.parametrize(
    "args",
    [(b"show", b"\xff"), (b"push", b"x", b"ad\xe4.zip"), (b"generate", b"-a", b"\xff", b"x")],
)
def test_names_that_are_not_utf_8_are_usage_errors(
    wire: Wire, tmp_path: Path, args: tuple[bytes, ...]
) -> None:
    (tmp_path / "ad\udce4.zip").write_bytes(b"PK")
    environment = os.environ | {"DYNAMIC_LORA_URL": wire.url, "PYTHONUTF8": "1"}
    run = subprocess.run([*_MAIN, *args], capture_output=True, env=environment, cwd=tmp_path)
    assert run.returncode == ExitCode.USAGE
    assert b"cannot be written as UTF-8" in run.stderr
    assert wire.received == []


@pytest.mark.parametrize("args", [("ls", "--url", "ftp://a"), ("ls", "--nope"), ("nope",)])
def test_usage_errors(shell: Shell, args: tuple[str, ...]) -> None:
    assert shell(*args).exit_code == ExitCode.USAGE


@pytest.mark.parametrize(("variable", "coloured"), [("NO_COLOR", False), ("FORCE_COLOR", True)])
def test_errors_are_red_unless_colour_is_off(wire: Wire, variable: str, coloured: bool) -> None:
    wire.reply(problem(404), status=404)
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {variable: "1", "TERM": "xterm", "DYNAMIC_LORA_URL": wire.url}
    run = subprocess.run([*_MAIN, "show", "ner"], capture_output=True, text=True, env=environment)
    assert run.returncode == ExitCode.NOT_FOUND
    assert ("\x1b[31m" in run.stderr) is coloured


def test_interruption_ends_the_stream_and_hangs_up(wire: Wire) -> None:
    wire.reply(chunks=[sse(token_event(0))] * 500, pause=0.02)
    command = [*_MAIN, "generate", "Ada", "--url", wire.url]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == "Zoë"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED
    assert stderr == ""
    assert wire.sees_hang_up()


def _run(wire: Wire, *args: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DYNAMIC_LORA_URL": wire.url}
    streams = {"stderr": subprocess.PIPE} | streams
    return subprocess.run([*_MAIN, *args], encoding="utf-8", env=environment, **streams)


@pytest.mark.parametrize(
    "args", [("ls",), ("ls", "--json"), ("show", "ner"), ("rm", "ner", "-y", "--json")]
)
def test_output_that_nobody_reads_ends_the_command_silently(
    wire: Wire, args: tuple[str, ...]
) -> None:
    for _ in range(2):
        wire.reply(PASSPORT | {"adapters": [PASSPORT], "compositions": []})
    here, there = os.pipe()
    os.close(here)
    run = _run(wire, *args, stdout=there)
    os.close(there)
    assert (run.returncode, run.stderr) == (ExitCode.UNREAD, "")


def test_a_stream_that_nobody_reads_hangs_up(wire: Wire) -> None:
    wire.reply(chunks=[sse(token_event(0))] * 500, pause=0.02)
    here, there = os.pipe()
    os.close(here)
    run = _run(wire, "generate", "Ada", stdout=there)
    os.close(there)
    assert (run.returncode, run.stderr) == (ExitCode.UNREAD, "")
    assert wire.sees_hang_up()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is full")
@pytest.mark.parametrize("args", [("show", "ner"), ("show", "ner", "--json"), ("generate", "Ada")])
def test_output_that_cannot_be_written(wire: Wire, args: tuple[str, ...]) -> None:
    wire.reply(PASSPORT) if args[0] == "show" else wire.reply(chunks=[STREAM])
    with open("/dev/full", "w") as full:
        run = _run(wire, *args, stdout=full)
    assert run.returncode == ExitCode.REFUSED
    assert run.stderr == "error: Input or output failed: No space left on device.\n"


@pytest.mark.parametrize(("closed", "code"), [(0, ExitCode.REFUSED), (1, ExitCode.OK)])
def test_streams_that_were_closed(wire: Wire, closed: int, code: ExitCode) -> None:
    """An empty input is the server's to refuse."""
    wire.reply(problem(422), status=422) if closed == 0 else wire.reply(chunks=[STREAM])
    shell = ["sh", "-c", f'exec "$@" {closed}<&-', "sh"]
    run = subprocess.run(
        [*shell, *_MAIN, "generate", *(["Ada"] * closed), "--url", wire.url],
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert run.returncode == code
    assert "Traceback" not in run.stderr


def test_characters_that_the_terminal_lacks_are_marked(wire: Wire) -> None:
    wire.reply(chunks=[STREAM])
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    command = [*_MAIN, "generate", "Ada", "--url", wire.url]
    run = subprocess.run(command, capture_output=True, encoding="latin-1", env=environment)
    assert (run.returncode, run.stdout) == (ExitCode.OK, "Zoë ?ok\n")


def _on_a_terminal(wire: Wire, *args: str, typed: str = "") -> tuple[int, str]:
    """Run the command with all its streams on a pseudo-terminal: exit status and screen."""
    here, there = pty.openpty()
    environment = os.environ | {"DYNAMIC_LORA_URL": wire.url, "TERM": "xterm", "COLUMNS": "100"}
    command = [*_MAIN, *args]
    process = subprocess.Popen(command, stdin=there, stdout=there, stderr=there, env=environment)
    os.close(there)
    os.write(here, typed.encode())
    screen = b""
    with process, open(here, "rb", buffering=0) as terminal, suppress(OSError):
        while part := terminal.read(4096):  # an OSError is how Linux ends a terminal
            screen += part
    return process.returncode, screen.decode()


@pytest.mark.parametrize("typed", ["n\n", "\x04"])
def test_rm_asks_on_a_terminal_and_takes_no_for_an_answer(wire: Wire, typed: str) -> None:
    code, screen = _on_a_terminal(wire, "rm", "ner", typed=typed)
    assert code == ExitCode.INTERRUPTED
    assert "Delete ner?" in screen
    assert "Nothing deleted." in screen
    assert wire.received == []


def test_rm_asks_on_a_terminal_and_takes_yes(wire: Wire) -> None:
    wire.reply(status=204)
    code, screen = _on_a_terminal(wire, "rm", "ner", typed="y\n")
    assert (code, len(wire.received)) == (ExitCode.OK, 1)
    assert "Deleted ner." in screen


def test_push_shows_its_progress_on_a_terminal(wire: Wire, peft_dir: Path) -> None:
    wire.reply(PASSPORT, status=201)
    code, screen = _on_a_terminal(wire, "push", "ner", str(peft_dir))
    assert code == ExitCode.OK
    assert "Uploading ner" in screen
    assert "200.0/200.0 kB" in screen
