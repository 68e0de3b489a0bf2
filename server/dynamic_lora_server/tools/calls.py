"""The calls in an answer, read from its text as it comes."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from dynamic_lora_server.tools.json_text import ValueEnd, items, members
from dynamic_lora_server.tools.notation import Notation

_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"]+)"\s*,\s*"[a-z]+"\s*:\s*(?=\{)')
_ARGUMENTS = ("arguments", "parameters")  # the key in one notation or the other; models mix them


@dataclass(frozen=True, slots=True)
class Words:
    """Text that is no call, and goes on from what was before."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """The call of a function; its arguments come next."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Part = Words | CallBegin | CallArguments


class Reader(Protocol):
    """Reads one answer; what it finds is the same in whatever pieces the text comes."""

    @property
    def called(self) -> bool:
        """Whether there were calls, and all of them are whole."""

    def push(self, text: str) -> list[Part]:
        """What more text makes certain."""

    def finish(self) -> list[Part]:
        """What was held back until the end."""


class TextReader:
    """An answer without calls: all of it is text."""

    called = False

    def push(self, text: str) -> list[Part]:
        """The text."""
        return [Words(text)]

    def finish(self) -> list[Part]:
        """Nothing is held back."""
        return []


class FreeReader:
    """Calls in a text that may hold anything.

    A call is told once it is whole: its function is one of `names`, and its arguments are a JSON
    object. All else is text, as is what looks like a call and is none. White space beside a
    call is left out.
    """

    def __init__(self, notation: Notation, names: Collection[str]) -> None:
        self._notation = notation
        self._names = names
        self._held = ""
        self._num_calls = 0
        self._call: _HeldCall | None = None
        self._beside_call = False
        self._text_only = False

    @property
    def called(self) -> bool:
        """Whether there were calls; each is told whole."""
        return self._num_calls > 0

    def push(self, text: str) -> list[Part]:
        """What more text makes certain."""
        self._held += text
        return self._read(final=False)

    def finish(self) -> list[Part]:
        """What was held back until the end."""
        return self._read(final=True)

    def _read(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        while self._held:
            step = self._outside(final) if self._call is None else self._inside(self._call, final)
            if step is None:
                break
            parts += step
        return parts

    def _outside(self, final: bool) -> list[Part] | None:
        """Text up to where a call begins; None where more of it must come first."""
        held = self._held
        begin, value = self._opening(held)
        if value is not None:
            self._call = _HeldCall(value - begin)
        elif final:
            begin = len(held)
        self._held = held[begin:]
        if begin:
            return self._words(held[:begin])
        return None if self._call is None else []

    def _opening(self, held: str) -> tuple[int, int | None]:
        """Where a call begins, white space before it included, and where its value may begin.

        Without the latter, it is where one may begin once the text goes on.
        """
        if self._text_only:
            return len(held), None
        if not self._notation.opening:
            return self._bare_opening(held)
        opening = self._notation.opening
        at = held.find(opening)
        if at >= 0:
            return len(held[:at].rstrip()), at + len(opening)
        longest = min(len(opening) - 1, len(held))
        part = next((n for n in range(longest, 0, -1) if held.endswith(opening[:n])), 0)
        return len(held[: len(held) - part].rstrip()), None

    def _bare_opening(self, held: str) -> tuple[int, int | None]:
        """A call can begin an answer, or follow another with at most a semicolon between."""
        begin = held.lstrip()
        if self._beside_call:
            begin = begin.removeprefix(";").lstrip()
        if not begin:
            return 0, None
        if begin[0] == "{":
            return 0, len(held) - len(begin)
        self._text_only = True
        return len(held), None

    def _inside(self, call: "_HeldCall", final: bool) -> list[Part] | None:
        """A call, or the text that it was not; None where more must come first."""
        held = self._held
        if call.end is None:
            call.value = len(held) - len(held[call.value :].lstrip())
            if call.value == len(held):
                return self._no_call(call.value) if final else None
            if held[call.value] not in "{[":
                return self._no_call(call.value)
            call.end = ValueEnd(call.value)
        if call.found is None:
            end = call.end.find(held)
            if end is None:
                return self._no_call(len(held)) if final else None
            call.found, call.behind = self._parsed(held[call.value : end]), end
        if not call.found:
            return self._no_call(call.behind)
        closing = self._notation.closing
        rest = held[call.behind :].lstrip() if closing else ""
        if rest.startswith(closing):
            return self._told(
                call.found, len(held) - len(rest) + len(closing) if closing else call.behind
            )
        if not closing.startswith(rest):
            return self._no_call(len(held) - len(rest))
        return self._told(call.found, len(held)) if final else None

    def _no_call(self, end: int) -> list[Part]:
        self._call = None
        self._text_only = not self._notation.opening
        text, self._held = self._held[:end], self._held[end:]
        return self._words(text)

    def _told(self, calls: list[tuple[str, str]], end: int) -> list[Part]:
        self._call, self._held, self._beside_call = None, self._held[end:], True
        parts: list[Part] = []
        for name, arguments in calls:
            index = self._num_calls
            parts.append(CallBegin(index, self._notation.new_id(), name))
            parts.append(CallArguments(index, arguments))
            self._num_calls += 1
        return parts

    def _words(self, text: str) -> list[Part]:
        if self._beside_call:
            text = text.lstrip()
        if not text:
            return []
        self._beside_call = False
        return [Words(text)]

    def _parsed(self, text: str) -> list[tuple[str, str]]:
        """The names and arguments of the calls that a value is; none if it is something else."""
        try:
            objects = items(text) if text.startswith("[") else [text]
            return [self._named(one) for one in objects]
        except ValueError:
            return []

    def _named(self, text: str) -> tuple[str, str]:
        found = members(text)
        name, _ = found.get("name", (None, ""))
        arguments = [found[key] for key in _ARGUMENTS if key in found] or [({}, "{}")]
        is_object = len(arguments) == 1 and isinstance(arguments[0][0], dict)
        if not isinstance(name, str) or name not in self._names or not is_object:
            raise ValueError("no call of a function that is there")
        return name, arguments[0][1]


@dataclass(slots=True)
class _HeldCall:
    """What may become a call: its value begins at `value`, behind white space there at first."""

    value: int
    end: ValueEnd | None = None
    found: list[tuple[str, str]] | None = None
    behind: int = 0


class GuidedReader:
    """Calls in a text that a grammar holds to calls and nothing else: arguments as they come."""

    def __init__(self, notation: Notation) -> None:
        self._notation = notation
        self._held = ""
        self._num_calls = 0
        self._num_told = 0
        self._end: ValueEnd | None = None

    @property
    def called(self) -> bool:
        """Whether there were calls, and the last is whole."""
        return self._num_calls > 0 and self._end is None

    def push(self, text: str) -> list[Part]:
        """The beginnings of calls and more of their arguments."""
        self._held += text
        parts: list[Part] = []
        while True:
            if self._end is None:
                head = _HEAD.search(self._held)
                if head is None:
                    return parts
                parts.append(self._begin(head))
            assert self._end is not None
            end = self._end.find(self._held)
            more = self._held[self._num_told : end]
            if more:
                parts.append(CallArguments(self._num_calls - 1, more))
            if end is None:
                self._num_told = len(self._held)
                return parts
            self._held, self._end = self._held[end:], None

    def finish(self) -> list[Part]:
        """The text of an answer that was cut off before its first call had a name."""
        return [] if self._num_calls or not self._held else [Words(self._held)]

    def _begin(self, head: re.Match[str]) -> CallBegin:
        self._held, self._num_told, self._end = self._held[head.end() :], 0, ValueEnd()
        self._num_calls += 1
        return CallBegin(self._num_calls - 1, self._notation.new_id(), head[1])
