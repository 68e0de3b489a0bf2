"""A process that renders chat templates; a script, which imports nothing of this package.

A template is a program that somebody uploaded. What it takes is bounded by the system, which ends
this process and nothing else. Arguments are the seconds of computing and the bytes of memory that
one rendering may take. A job comes as a line of JSON on standard input, its answer goes as one to
standard output.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from typing import Any

# What a rendering may write: so many times what it was given, and so many characters more.
_GROWTH, _MORE = 4, 2**20
_MAX_REASON = 2000
_ASSUMED_SIZE = 2**31


def main() -> None:
    """Answer jobs until there are no more."""
    _outlast_signals()
    _go_first()
    seconds, room_bytes = float(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb")
    with suppress(OSError):  # where the server has no standard error
        os.dup2(2, 1)  # nobody else writes between the answers
    render = _renderer()
    _bound_memory(room_bytes)
    _send(answers, b"{}")
    for line in sys.stdin.buffer:
        _bound_time(seconds)
        answer = _answer(render, line)
        _bound_time(0)
        _send(answers, answer)


def _outlast_signals() -> None:
    """Ignore what tells a group of processes to end: the server ends this one when it has done."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)


def _go_first() -> None:
    """Have a system without memory end this process, and not the server (Linux)."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def _renderer() -> Any:
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template


def _send(answers: Any, line: bytes) -> None:
    answers.write(line + b"\n")
    answers.flush()


def _answer(render: Any, line: bytes) -> bytes:
    """`text`, or why there is none: what it was `refused` for, or what it was `stopped` for."""
    try:
        job = json.loads(line)
        texts, _ = render(
            conversations=job["conversations"],
            tools=job["tools"],
            chat_template=job["template"],
            add_generation_prompt=job["add_generation_prompt"],
            continue_final_message=job["continue_final_message"],
            **job["variables"],
        )
        text = "".join(texts)
        if len(text) > (most := _GROWTH * len(line) + _MORE):
            # The input alone may do that: what is nested grows with its square, if indented.
            return json.dumps({"refused": f"it would write more than {most:,} characters"}).encode()
        return json.dumps({"text": text}).encode()
    except MemoryError:
        return b'{"stopped": "it takes more memory than one rendering may"}'
    except Exception as error:
        # On messages that it was not written for, any error can come of it.
        reason = str(error)[:_MAX_REASON] or type(error).__name__
        return json.dumps({"refused": reason}).encode()


def _bound_time(seconds: float) -> None:
    """Have the system end this process after so many seconds of computing; 0: not at all."""
    if sys.platform != "win32":
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _bound_memory(room_bytes: int) -> None:
    """Have the system give this process so much more than it has."""
    if sys.platform == "linux":
        import resource

        limit = _size() + room_bytes
        with suppress(ValueError):  # a lower limit has been set already
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _size() -> int:
    """Bytes of address space that this process has; where that is not told, more than it has."""
    import resource

    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # no /proc, as in a jail
        return _ASSUMED_SIZE


if __name__ == "__main__":
    main()
