"""The text of compositions: `ner*0.7+tone*0.3-legal*0.5`. Imports no torch.

    composition = [sign] part { joint part }
    joint       = "+" | "-" | whitespace          whitespace reads as "+"
    part        = name [ "@" version ] [ "*" number ]
    name        = word [ "/" word ]               as `names` has it

Whitespace may stand between any two tokens. A name is read as far as it goes,
and names may hold '-': `my-adapter-2` is one name, and a minus that follows a
bare name needs a space before it. After a weight or a version it needs none.
Whitespace counts as a plus because that is what a query string makes of one.
"""

import re

from dynamic_lora_adapters.compositions.composition import Composition, InvalidComposition, Part
from dynamic_lora_adapters.names import MAX_NAME, NAME

MAX_TEXT = 4096
MIN_VERSION_DIGITS = 8

_SPACE = re.compile(r"\s*")
_VERSION = re.compile(r"[0-9a-f]*")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_OPERATORS = re.compile(r"[*@+(\s]|^-")
_HINT_WIDTH = 30  # characters shown on either side of a fault


def parse(text: str) -> Composition:
    """Read the text of a weighted sum. Raises InvalidComposition with the column."""
    return Composition.of(parse_parts(text))


def is_expression(text: str) -> bool:
    """Whether a text has operators: if not, it is a name and nothing else.

    Looks no further than a sum may go: a text may be a whole body.
    """
    return bool(_OPERATORS.search(text, 0, MAX_TEXT))


def parse_parts(text: str) -> list[Part]:
    """The parts of a sum in the order they are written, weights of 0 included.

    Raises InvalidComposition, whose text points at the column.
    """
    return _Reader(text).parts()


def parse_label(text: str) -> tuple[str, str | None]:
    """A name, or `name@version`. Raises InvalidComposition."""
    reader = _Reader(text)
    label = reader.label()
    reader.expect_end()
    return label


class _Reader:
    """Reads one text from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def parts(self) -> list[Part]:
        if len(self._text) > MAX_TEXT:
            raise InvalidComposition(
                f"The composition has {len(self._text)} characters; {MAX_TEXT} are allowed."
            )
        parts = [self._part(self._sign())]
        while (joint := self._joint()) is not None:
            parts.append(self._part(joint))
        return parts

    def label(self) -> tuple[str, str | None]:
        self._skip()
        name = self._take(NAME)
        if name is None:
            raise self._fault(f"expected an adapter's name{self._after()}")
        if len(name) > MAX_NAME:
            raise self._fault(
                f"this name is longer than {MAX_NAME} characters", at=self._at - len(name)
            )
        if not self._symbol("@"):
            return name, None
        self._skip()
        version = self._take(_VERSION) or ""
        if not MIN_VERSION_DIGITS <= len(version) <= 64:
            raise self._fault(
                f"expected {MIN_VERSION_DIGITS} to 64 hexadecimal digits after '@'",
                at=self._at - len(version),
            )
        return name, version

    def expect_end(self) -> None:
        self._skip()
        if self._at < len(self._text):
            raise self._fault("expected the end")

    def _part(self, sign: float) -> Part:
        self._skip()
        start = self._at
        name, version = self.label()
        weight = sign * self._weight()
        try:
            return Part(name, version, weight)
        except InvalidComposition as error:
            raise self._fault(error.message.rstrip("."), at=start, fix=error.fix) from None

    def _weight(self) -> float:
        if not self._symbol("*"):
            return 1.0
        self._skip()
        number = self._take(_NUMBER)
        if number is None:
            raise self._fault("expected a number after '*'")
        return float(number)

    def _sign(self) -> float:
        if self._symbol("-"):
            return -1.0
        self._symbol("+")
        return 1.0

    def _joint(self) -> float | None:
        """The sign of the part that follows, or None at the end."""
        before = self._at
        self._skip()
        if self._at == len(self._text):
            return None
        if self._text[self._at] in "+-":
            return self._sign()
        if self._at == before:
            raise self._fault("expected '+', '-' or the end")
        if self._text[before - 1] == "-":
            raise self._fault(
                "this '-' belongs to the name; put a space before a minus", at=before - 1
            )
        return 1.0

    def _symbol(self, symbol: str) -> bool:
        """Whether `symbol` comes next; what stands before it is skipped only then."""
        at = self._end(_SPACE)
        if not self._text.startswith(symbol, at):
            return False
        self._at = at + 1
        return True

    def _skip(self) -> None:
        self._at = self._end(_SPACE)

    def _end(self, pattern: re.Pattern[str]) -> int:
        match = pattern.match(self._text, self._at)
        return self._at if match is None else match.end()

    def _take(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self._text, self._at)
        if match is None:
            return None
        self._at = match.end()
        return match[0]

    def _after(self) -> str:
        before = self._text[: self._at].rstrip()
        return f" after {before[-1]!r}" if before else ""

    def _fault(
        self, message: str, *, at: int | None = None, fix: str | None = None
    ) -> InvalidComposition:
        at = self._at if at is None else at
        start = max(0, at - _HINT_WIDTH)
        window = self._text[start : at + _HINT_WIDTH]
        shown = "".join(c if c.isprintable() else " " for c in window)
        return InvalidComposition(
            f"column {at + 1}: {message}.\n{shown}\n{' ' * (at - start)}^",
            column=at + 1,
            fix=fix or "Write it like ner*0.7+tone*0.3-legal*0.5; spaces may stand in between.",
        )
