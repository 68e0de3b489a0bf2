"""Server-sent events (WHATWG HTML, 9.2): bytes in, the events' data out. No I/O."""

import codecs
import re

# Only these end a line. `str.splitlines` would also cut at U+2028 and others,
# which a JSON string may hold as they are.
_LINE_END = re.compile(r"\r\n|\n|\r(?!\Z)")


class SseDecoder:
    """Collects the data of each event from chunks cut anywhere."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._rest = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """The data of the events that `chunk` completes."""
        # A CR at the very end waits: the LF of its pair may be in the next chunk.
        *lines, self._rest = _LINE_END.split(self._rest + self._decode(chunk))
        events = (self._line(line) for line in lines)
        return [event for event in events if event is not None]

    def _line(self, line: str) -> str | None:
        if not line:
            data, self._data = "\n".join(self._data), []
            return data or None
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
        return None
