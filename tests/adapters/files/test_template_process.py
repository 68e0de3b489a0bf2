"""Templates that are rendered as transformers renders them, and no longer than they may."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from dynamic_lora_adapters.files import template_process, template_worker
from dynamic_lora_adapters.files.template_process import (
    TemplateProcess,
    TemplateProcesses,
    TemplateProcessFailed,
    TemplateProcessLate,
    TemplateRefused,
    TemplateStopped,
)

CHAT = [
    {"role": "user", "content": "Wie geht\u2019s?\n"},
    {"role": "assistant", "content": "gut \ud83d", "reasoning_content": "so so"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m['content'] }}\n{% endfor %}{{ bos_token }}"
FULL = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% generation %}{{ m | tojson }}"
    "{% endgeneration %}{% set ns.n = ns.n + 1 %}{% if ns.n > 5 %}{% break %}{% endif %}"
    "{% endfor %}{{ tools | tojson(indent=2) }}{{ add_generation_prompt }}"
    "{{ messages[-1].thinking }}{# content #}"
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}"
)


@pytest.fixture(scope="module")
def processes() -> Iterator[TemplateProcesses]:
    found = TemplateProcesses(seconds=0.3, room_bytes=2**26)
    yield found
    found.close()


@pytest.mark.parametrize("template", [PLAIN, FULL])
@pytest.mark.parametrize(
    "asked",
    [
        {"add_generation_prompt": True, "tools": TOOLS},
        {"continue_final_message": True},
        {"tools": []},
    ],
)
def test_the_text_is_what_transformers_writes(
    processes: TemplateProcesses, template: str, asked: dict[str, Any]
) -> None:
    variables: dict[str, Any] = {"bos_token": "<s>", "deep": {"a": [1, None, True, 0.5]}}
    expected: Any = render_jinja_template([CHAT], chat_template=template, **asked, **variables)
    assert processes.render(template, [CHAT], **asked, variables=variables) == expected[0][0]


def test_a_template_is_compiled_for_no_conversation(processes: TemplateProcesses) -> None:
    assert processes.render("{{ raise_exception('never') }}", []) == ""
    with pytest.raises(TemplateRefused, match="No filter named 'nofilter'"):
        processes.render("{{ a | nofilter }}", [])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('no users here') }}", "^no users here$"),
        ("{{ messages.nix.nix }}", "has no attribute 'nix'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('x' * 10 ** 5) }}", "^x{2000}$"),
        ("{{ 'a' * 3 * 10 ** 6 }}", r"would write more than 1,0\d\d,\d\d\d characters"),
    ],
)
def test_what_a_template_says_against_its_input(
    processes: TemplateProcesses, template: str, why: str
) -> None:
    with pytest.raises(TemplateRefused, match=why):
        processes.render(template, [CHAT])
    assert processes.render("{{ bos }}", [CHAT], variables={"bos": "b"}) == "b"


@pytest.mark.parametrize(
    ("template", "conversations", "why"),
    [
        (ENDLESS, [CHAT], "computes for more than 0.3 s"),
        ("{% set a = 10 ** (n ** 9) %}", [CHAT], "computes for more than 0.3 s"),
        ("{{ 10 ** (10 ** 9) }}", [], "computes for more than 0.3 s"),
        (DOUBLED, [CHAT], "takes more memory|computes for more"),
        ("{{ ('a' * 10 ** 10) | length }}", [CHAT], "takes more memory"),
    ],
)
def test_what_takes_too_much_is_stopped_and_holds_up_nobody(
    processes: TemplateProcesses, template: str, conversations: Any, why: str
) -> None:
    with pytest.raises(TemplateStopped, match=why):
        processes.render(template, conversations, variables={"n": 10})
    assert len(processes._idle) == 1, "another has been started"
    assert processes.render(PLAIN, [CHAT[:1]]).startswith("[user] Wie")


def test_what_is_nested_too_deeply_is_refused(processes: TemplateProcesses) -> None:
    deep: Any = []
    for _ in range(10**5):
        deep = [deep]
    with pytest.raises(TemplateRefused, match="nested too deeply"):
        processes.render("", [CHAT], variables={"deep": deep})


def test_the_time_is_each_renderings_own(processes: TemplateProcesses) -> None:
    some = "{% for a in range(9999) %}{% for b in range(5) %}{% endfor %}{% endfor %}"
    for _ in range(40):
        assert not processes.render(some, [CHAT])


def test_many_threads_get_what_is_theirs(processes: TemplateProcesses) -> None:
    found: dict[int, str] = {}

    def work(number: int) -> None:
        for _ in range(5):
            found[number] = processes.render("{{ n }}", [CHAT], variables={"n": number})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: str(number) for number in range(4)}


def test_a_process_that_has_ended_is_taken_for_no_job() -> None:
    processes = TemplateProcesses()
    processes.prepare()
    processes.prepare()
    (one,) = processes._idle
    os.kill(one._process.pid, signal.SIGKILL)
    one._process.wait()
    assert processes.render("{{ 1 }}", [CHAT]) == "1"
    processes.close()
    assert processes._idle == []


def test_what_ends_a_process_is_told() -> None:
    process = TemplateProcess(seconds=9, room_bytes=2**26)
    with pytest.raises(TemplateRefused):
        process.render(b"{}")
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(TemplateProcessFailed, match=r"ended \(status -9\)"):
        process.render(b"{}")
    process.close()


def test_what_tells_a_group_of_processes_to_end_ends_none_that_renders() -> None:
    process = TemplateProcess(seconds=9, room_bytes=2**26)
    for one in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(TemplateRefused):
            process.render(b"{}")
        os.kill(process._process.pid, one)
    with pytest.raises(TemplateRefused):
        process.render(b"{}")
    assert process.alive
    process.close()


def test_one_that_computes_nothing_is_waited_for_no_longer_than_may_be() -> None:
    process = TemplateProcess(seconds=9, room_bytes=2**26)
    with pytest.raises(TemplateRefused):
        process.render(b"{}")
    process._wait_seconds = 0.1
    os.kill(process._process.pid, signal.SIGSTOP)
    with pytest.raises(TemplateProcessLate, match="gave no answer in 0.1 s"):
        process.render(b"[" * 2**20)  # more than waits in a pipe: writing it is waited for, too
    process.close()


def test_nor_is_one_that_is_long_in_starting() -> None:
    processes = TemplateProcesses(wait_seconds=0.001)
    with pytest.raises(TemplateProcessLate, match="gave no answer in 0.001 s"):
        processes.render("{{ 1 }}", [CHAT])
    assert processes._idle == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of a process")
def test_a_process_gets_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "DYNAMIC_LORA_ADMIN_KEYS", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("LC_TIME", "de_DE.UTF-8")
    monkeypatch.setenv("TZ", "Europe/Berlin")
    process = TemplateProcess(seconds=9, room_bytes=2**26)
    found = Path(f"/proc/{process._process.pid}/environ").read_bytes()
    process.close()
    assert b"secret" not in found
    assert {b"LC_TIME=de_DE.UTF-8", b"TZ=Europe/Berlin"} <= set(found.split(b"\0"))


def test_what_a_process_keeps_of_other_templates_is_no_fault_of_the_next() -> None:
    processes = TemplateProcesses(room_bytes=2**25)
    for number in range(12):
        assert processes.render(f"{number}{'€' * 2**19}", []) == ""
    processes.close()


def test_memory_is_bounded_where_the_system_tells_no_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(template_worker.__file__).read_text()
    assert "/proc/" in source
    jailed = tmp_path / "worker.py"
    jailed.write_text(source.replace("/proc/", "/nowhere/"))
    monkeypatch.setattr(template_worker, "__file__", str(jailed))
    processes = TemplateProcesses()
    assert processes.render("{{ 1 }}", [CHAT]) == "1"
    with pytest.raises(TemplateStopped, match="takes more memory"):
        processes.render("{{ ('a' * 10 ** 10) | length }}", [CHAT])
    processes.close()


class Doomed(TemplateProcess):
    """Somebody ends it before it has answered."""

    def render(self, job: bytes) -> str:
        os.kill(self._process.pid, signal.SIGKILL)
        return super().render(job)


def test_a_template_whose_process_somebody_ends_is_rendered_by_another() -> None:
    processes = TemplateProcesses()
    processes._idle.append(Doomed(seconds=9, room_bytes=2**26))
    assert processes.render("{{ 1 }}", [CHAT]) == "1"
    processes.close()


def test_two_that_somebody_ends_are_no_fault_of_the_template(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template_process, "TemplateProcess", Doomed)
    processes = TemplateProcesses()
    with pytest.raises(TemplateProcessFailed):
        processes.render("{{ 1 }}", [CHAT])
    assert processes._idle == []


def test_one_that_does_not_start_is_no_fault_of_the_template(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    processes = TemplateProcesses()
    with pytest.raises(TemplateProcessFailed, match="did not start"):
        processes.render("", [])
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        processes.render("", [])
    processes.prepare()
    assert processes._idle == []
