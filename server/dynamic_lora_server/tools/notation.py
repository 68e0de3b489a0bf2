"""How models write the calls of functions: the notations that are known."""

import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass

_MISTRAL_ID = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Notation:
    """One way to write calls: objects with a name and arguments, alone or in a list.

    `opening` stands before the objects and `closing` behind them; a model may have either as one
    token. Without an opening, calls can only be all of an answer or its beginning. `arguments` is
    the key of a call's arguments. `listed` says that the objects are items of a list, else
    each has an opening of its own; `several` whether an answer may have more than one.
    """

    name: str
    opening: str
    closing: str
    arguments: str
    listed: bool
    several: bool
    short_ids: bool = False  # nine letters and digits, which Mistral's templates insist on

    @property
    def markers(self) -> tuple[str, ...]:
        """What may be tokens of their own."""
        return tuple(filter(None, (self.opening, self.closing)))

    def new_id(self) -> str:
        """An id for a call."""
        if self.short_ids:
            return "".join(secrets.choice(_MISTRAL_ID) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


HERMES = Notation(
    name="hermes",
    opening="<tool_call>",
    closing="</tool_call>",
    arguments="arguments",
    listed=False,
    several=True,
)
LLAMA3 = Notation(
    name="llama3",
    opening="",
    closing="",
    arguments="parameters",
    listed=False,
    several=False,
)
MISTRAL = Notation(
    name="mistral",
    opening="[TOOL_CALLS]",
    closing="",
    arguments="arguments",
    listed=True,
    several=True,
    short_ids=True,
)
NOTATIONS: Mapping[str, Notation] = {one.name: one for one in (HERMES, LLAMA3, MISTRAL)}
