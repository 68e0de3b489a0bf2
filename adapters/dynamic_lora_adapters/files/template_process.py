"""Chat templates, rendered in processes that can be ended: no template holds up the server.

A template computes in C, too, where nothing within a process stops it: `10 ** (10 ** 9)` alone
takes a thread for hours, and the interpreter's lock with it. What a rendering may take is bounded
by the system (`template_worker.py`).
"""

import atexit
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from dynamic_lora_adapters.files import template_worker

# 8 MiB of the shortest messages take a quarter of it: no conversation is to stop a sound template.
SECONDS = 5.0
ROOM_BYTES = 512 * 2**20
# By the clock on the wall, starting included: one that gets no core, or waits for a disk, computes
# nothing, and is to hold up nobody for ever.
WAIT_SECONDS = 60.0
_MAX_IDLE = 2
# What an interpreter needs to start, libraries to be found and read, and times to be local: no keys
# and no tokens, as these processes run what somebody uploaded.
_PASSED_ON = re.compile(
    "PATH|HOME|TZ|LANG|LC_[A-Z]+|TMPDIR|TE?MP|VIRTUAL_ENV|(DY)?LD_LIBRARY_PATH"
    "|PYTHON(PATH|HOME|USERBASE|NOUSERSITE|PYCACHEPREFIX|DONTWRITEBYTECODE|UTF8)"
    "|SYSTEMROOT|USERPROFILE|(LOCAL)?APPDATA"  # of Windows
)

logger = logging.getLogger(__name__)


class TemplateRefused(Exception):
    """What jinja, or the template itself, says against its input, or that of it too much comes."""


class TemplateStopped(Exception):
    """A rendering took more time or memory than it may; the message says which."""


class TemplateProcessFailed(RuntimeError):
    """A process could not render, which says nothing against the template."""


class TemplateProcessLate(TemplateProcessFailed):
    """A process gave no answer in time."""


class TemplateProcess:
    """One process, for one thread at a time.

    A rendering may compute for `seconds`, and take `wait_seconds` in all.
    """

    def __init__(
        self, *, seconds: float, room_bytes: int, wait_seconds: float = WAIT_SECONDS
    ) -> None:
        self._seconds = seconds
        self._wait_seconds = wait_seconds
        self._is_late = False
        self._process = subprocess.Popen(
            # -P: the folder of the script is none to import from.
            [sys.executable, "-P", template_worker.__file__, str(seconds), str(room_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # what interrupts the server ends it by closing its input
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._jobs: IO[bytes] = self._process.stdin
        self._answers: IO[bytes] = self._process.stdout
        self._begun = False
        self._is_fresh = True  # it keeps nothing of other templates

    @property
    def alive(self) -> bool:
        """Whether it takes jobs, as far as is known."""
        return self._process.poll() is None

    def render(self, job: bytes) -> str:
        """The text of a job, a line of JSON. Raises TemplateRefused, and TemplateStopped or
        TemplateProcessFailed, after which the process is of no use."""
        timer = threading.Timer(self._wait_seconds, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            return self._answer(job)
        finally:
            timer.cancel()

    def _answer(self, job: bytes) -> str:
        if not self._begun and not self._answers.readline():
            raise self._why_ended(otherwise="did not start")
        self._begun = True
        fresh, self._is_fresh = self._is_fresh, False
        with suppress(BrokenPipeError):
            self._jobs.write(job + b"\n")
            self._jobs.flush()
        line = self._answers.readline()
        if not line.endswith(b"\n"):
            raise self._why_ended(otherwise="ended")
        answer = json.loads(line)
        if "stopped" in answer:
            if not fresh:  # transformers keeps the last templates, which take memory as well
                raise TemplateProcessFailed("a process that renders chat templates was full")
            raise TemplateStopped(answer["stopped"])
        if "refused" in answer:
            raise TemplateRefused(answer["refused"])
        return str(answer["text"])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        for stream in (self._jobs, self._answers):
            with suppress(BrokenPipeError):
                stream.close()
        self._process.wait()

    def _give_up(self) -> None:
        self._is_late = True
        self._process.kill()

    def _why_ended(self, *, otherwise: str) -> TemplateStopped | TemplateProcessFailed:
        status = self._process.wait()
        if self._is_late:
            return TemplateProcessLate(
                "the process that renders chat templates gave no answer in "
                f"{self._wait_seconds:g} s"
            )
        if sys.platform != "win32" and status == -signal.SIGPROF:
            return TemplateStopped(f"it computes for more than {self._seconds:g} s")
        return TemplateProcessFailed(
            f"the process that renders chat templates {otherwise} (status {status})"
        )


def _environment() -> dict[str, str]:
    passed_on = {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)}
    # Libraries would reserve memory for one thread on each core, and have nothing to fetch.
    own = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return passed_on | own


class TemplateProcesses:
    """Processes for as many threads as come; a few stay for the next. Safe from any thread."""

    def __init__(
        self,
        *,
        seconds: float = SECONDS,
        room_bytes: int = ROOM_BYTES,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        self._seconds = seconds
        self._room_bytes = room_bytes
        self._wait_seconds = wait_seconds
        self._lock = threading.Lock()
        self._idle: list[TemplateProcess] = []

    def prepare(self) -> None:
        """Have one start now, without waiting for it: that takes a second."""
        with self._lock:
            if self._idle:
                return
            try:
                self._idle.append(self._new())
            except OSError as error:  # who renders is told; not everybody does
                logger.warning("no process for chat templates can be started: %s", error)

    def render(
        self,
        template: str,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Conversations as transformers renders them, one behind the other; all values are JSON's.

        Without any, the template is compiled and that is all. Raises TemplateRefused,
        TemplateStopped, and TemplateProcessFailed where one was late, or two failed, one after the
        other.
        """
        job = {
            "template": template,
            "conversations": conversations,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "variables": variables or {},
        }
        try:
            line = json.dumps(job).encode()
        except RecursionError:
            raise TemplateRefused("they are nested too deeply") from None
        try:
            return self._rendered(line, self._take())
        except TemplateProcessLate:  # so would another be
            raise
        except TemplateProcessFailed as error:  # what ended it need not be this template's doing
            logger.warning("%s; a new one tries again", error)
            return self._rendered(line, self._new())

    def close(self) -> None:
        """End those that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.close()

    def _rendered(self, line: bytes, process: TemplateProcess) -> str:
        try:
            text = process.render(line)
        except TemplateRefused:
            self._keep(process)
            raise
        except TemplateStopped:
            process.close()
            self.prepare()  # or who comes next would wait for one
            raise
        except BaseException:
            process.close()
            raise
        self._keep(process)
        return text

    def _take(self) -> TemplateProcess:
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None:
                return self._new()
            if process.alive:
                return process
            process.close()

    def _keep(self, process: TemplateProcess) -> None:
        with self._lock:
            if len(self._idle) < _MAX_IDLE:
                self._idle.append(process)
                return
        process.close()

    def _new(self) -> TemplateProcess:
        return TemplateProcess(
            seconds=self._seconds, room_bytes=self._room_bytes, wait_seconds=self._wait_seconds
        )


PROCESSES = TemplateProcesses()
"""Those of this Python process, which end with it."""
atexit.register(PROCESSES.close)
