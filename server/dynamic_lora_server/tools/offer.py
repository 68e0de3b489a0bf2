"""What a request offers the model to call, and what that means for its answer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.generation import Grammar, GrammarKind
from dynamic_lora_server.tools.calls import FreeReader, GuidedReader, Reader
from dynamic_lora_server.tools.grammar import Markers, calls_grammar
from dynamic_lora_server.tools.notation import Notation

if TYPE_CHECKING:
    from dynamic_lora_server.schemas.openai import ChatRequest
    from dynamic_lora_server.schemas.tools import Function, Tool
    from dynamic_lora_server.text import TokenizerView

# Characters of all tools as JSON.
_MAX_LENGTH = 2**17
_NO_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Functions of these names may be called, in a notation; `forced`: they must be.

    The answer keeps to the `grammar`, if there is one.
    """

    notation: Notation
    names: frozenset[str]
    forced: bool
    grammar: Grammar | None

    def reader(self) -> Reader:
        """What reads the calls in one answer."""
        return GuidedReader(self.notation) if self.forced else FreeReader(self.notation, self.names)


def described(tools: "Sequence[Tool]") -> list[dict[str, Any]]:
    """The tools as chat templates expect them.

    Raises InvalidParameter where two have the same name, or they are too large.
    """
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.function.name in names:
            field = f"tools.{index}.function.name"
            raise InvalidParameter(f"Two tools have the name {tool.function.name}.", field=field)
        names.add(tool.function.name)
    found = [{"type": "function", "function": _function(tool.function)} for tool in tools]
    try:
        length = len(json.dumps(found, ensure_ascii=False))
    except RecursionError:
        raise InvalidParameter("tools is nested too deeply.", field="tools") from None
    if length > _MAX_LENGTH:
        raise InvalidParameter(
            f"tools has {length} characters as JSON; {_MAX_LENGTH} are allowed.", field="tools"
        )
    return found


def _function(function: "Function") -> dict[str, Any]:
    found: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        found["description"] = function.description
    # Templates look into the parameters without asking whether there are any.
    found["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return found


def check_choice(body: "ChatRequest") -> None:
    """Raise InvalidParameter for a `tool_choice` that the tools do not allow."""
    choice = body.tool_choice
    if choice is None or choice == "none" or choice == "auto":
        return
    if not body.tools:
        raise InvalidParameter(
            "tool_choice asks for a call, but there are no tools.",
            field="tool_choice",
            fix="Add tools, or leave tool_choice out.",
        )
    if isinstance(choice, str):
        return
    names = [tool.function.name for tool in body.tools]
    if choice.function.name not in names:
        raise InvalidParameter(
            f"tool_choice names {choice.function.name!r}, which is none of the tools.",
            field="tool_choice.function.name",
            fix=f"Name one of {', '.join(names)}.",
        )


def offer_of(body: "ChatRequest", notation: Notation, view: "TokenizerView") -> Offer:
    """What a request with tools offers, unless its `tool_choice` is `none`.

    Raises InvalidParameter for parameters that cannot be those of a function.
    """
    assert body.tools
    described(body.tools)  # before a grammar is made of what is too large
    functions = {tool.function.name: tool.function for tool in body.tools}
    choice = body.tool_choice
    named = None if choice is None or isinstance(choice, str) else choice.function.name
    forced = named is not None or choice == "required"
    several = body.parallel_tool_calls is not False and named is None
    grammar = None
    if forced or not several or any(function.strict for function in functions.values()):
        schemas = {
            name: _schema(function, f"tools.{index}.function.parameters")
            for index, (name, function) in enumerate(functions.items())
            if named is None or name == named
        }
        markers = Markers.of(view, notation)
        try:
            source = calls_grammar(schemas, notation, markers, forced=forced, several=several)
        except (ValueError, RecursionError) as error:
            raise InvalidParameter(
                f"The parameters of tools cannot be used: {error}.", field="tools"
            ) from error
        grammar = Grammar(GrammarKind.CALLS, source, "tools")
    return Offer(notation=notation, names=frozenset(functions), forced=forced, grammar=grammar)


def _schema(function: "Function", field: str) -> Mapping[str, Any]:
    """The schema of a function's arguments, which are an object."""
    schema = function.parameters
    if schema is None:
        return _NO_PARAMETERS
    kind = schema.get("type", "object")
    if kind != "object":
        raise InvalidParameter(
            f"The parameters of {function.name} have the type {kind!r}; arguments are an object.",
            field=field,
            fix="Set type to object.",
        )
    return {**schema, "type": "object"}
