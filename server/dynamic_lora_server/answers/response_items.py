"""The items that a response consists of, and the events that tell of them as they come."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from dynamic_lora_server.answers.openai import logprob_of
from dynamic_lora_server.generation import TokenPiece
from dynamic_lora_server.schemas import responses_answers as wire
from dynamic_lora_server.schemas.openai_answers import ChatLogprob
from dynamic_lora_server.schemas.responses_events import (
    ArgumentsDelta,
    ArgumentsDone,
    Event,
    ItemEvent,
    ItemKind,
    PartEvent,
    PartKind,
    TextDelta,
    TextDone,
)
from dynamic_lora_server.tools.calls import CallArguments, CallBegin, Part, Words


def new_id(prefix: str) -> str:
    """An id of a response or of an item."""
    return f"{prefix}_{secrets.token_hex(24)}"


@dataclass(slots=True)
class _Message:
    """One that is being said, with log-probabilities if they are wanted."""

    id: str
    texts: list[str] = field(default_factory=list)
    logprobs: list[ChatLogprob] = field(default_factory=list)


@dataclass(slots=True)
class _Call:
    """One that is being made."""

    id: str
    call_id: str
    name: str
    arguments: list[str] = field(default_factory=list)

    def item(self, status: wire.ItemStatus) -> wire.OutputCall:
        return wire.OutputCall(
            id=self.id,
            status=status,
            call_id=self.call_id,
            name=self.name,
            arguments="".join(self.arguments),
        )


class ResponseItems:
    """Makes items of the parts of one answer, one after another.

    What it returns are the events that tell of it; an answer that is sent at once needs none.
    """

    def __init__(self) -> None:
        self.whole: list[wire.OutputItem] = []
        self._open: _Message | _Call | None = None
        self._numbers = count()

    def next_number(self) -> int:
        """The number of the next event."""
        return next(self._numbers)

    def begin_message(self) -> list[Event]:
        """What is said comes next."""
        events = self._close("completed")
        self._open = _Message(new_id("msg"))
        item = wire.OutputMessage(id=self._open.id, status="in_progress", content=[])
        begun = wire.OutputText(text="")
        return [
            *events,
            self._item_event("response.output_item.added", item),
            self._part_event("response.content_part.added", self._open.id, begun),
        ]

    def take(self, part: Part, pieces: Sequence[TokenPiece] = ()) -> list[Event]:
        """The next part; `pieces` are the tokens of words, if their log-probabilities are
        wanted."""
        match part:
            case Words():
                return self._say(part.text, pieces)
            case CallBegin():
                return self._begin_call(part)
            case CallArguments():
                return self._go_on(part.text)

    def end(self, status: wire.ItemStatus) -> list[Event]:
        """The status is that of the last item. An answer of nothing is an empty message."""
        begun = [] if self._open is not None or self.whole else self.begin_message()
        return [*begun, *self._close(status)]

    @property
    def calls(self) -> bool:
        """Whether a call is being made."""
        return isinstance(self._open, _Call)

    def _say(self, text: str, pieces: Sequence[TokenPiece]) -> list[Event]:
        if not text and not pieces:
            return []
        events = [] if isinstance(self._open, _Message) else self.begin_message()
        message = self._open
        assert isinstance(message, _Message)
        logprobs = [logprob_of(piece) for piece in pieces]
        message.texts.append(text)
        message.logprobs += logprobs
        delta = TextDelta(
            sequence_number=self.next_number(),
            item_id=message.id,
            output_index=len(self.whole),
            delta=text,
            logprobs=logprobs,
        )
        return [*events, delta]

    def _begin_call(self, begin: CallBegin) -> list[Event]:
        events = self._close("completed")
        self._open = _Call(new_id("fc"), begin.id, begin.name)
        item = self._open.item("in_progress")
        return [*events, self._item_event("response.output_item.added", item)]

    def _go_on(self, text: str) -> list[Event]:
        call = self._open
        assert isinstance(call, _Call)
        call.arguments.append(text)
        delta = ArgumentsDelta(
            sequence_number=self.next_number(),
            item_id=call.id,
            output_index=len(self.whole),
            delta=text,
        )
        return [delta]

    def _close(self, status: wire.ItemStatus) -> list[Event]:
        match self._open:
            case _Message():
                return self._close_message(self._open, status)
            case _Call():
                return self._close_call(self._open, status)
            case None:
                return []

    def _close_message(self, message: _Message, status: wire.ItemStatus) -> list[Event]:
        said = wire.OutputText(text="".join(message.texts), logprobs=message.logprobs)
        done = TextDone(
            sequence_number=self.next_number(),
            item_id=message.id,
            output_index=len(self.whole),
            text=said.text,
            logprobs=said.logprobs,
        )
        part = self._part_event("response.content_part.done", message.id, said)
        item = wire.OutputMessage(id=message.id, status=status, content=[said])
        return [done, part, self._put(item)]

    def _close_call(self, call: _Call, status: wire.ItemStatus) -> list[Event]:
        item = call.item(status)
        done = ArgumentsDone(
            sequence_number=self.next_number(),
            item_id=call.id,
            output_index=len(self.whole),
            name=item.name,
            arguments=item.arguments,
        )
        return [done, self._put(item)]

    def _put(self, item: wire.OutputItem) -> Event:
        event = self._item_event("response.output_item.done", item)
        self.whole.append(item)
        self._open = None
        return event

    def _item_event(self, kind: ItemKind, item: wire.OutputItem) -> ItemEvent:
        return ItemEvent(
            sequence_number=self.next_number(),
            type=kind,
            output_index=len(self.whole),
            item=item,
        )

    def _part_event(self, kind: PartKind, item_id: str, part: wire.OutputText) -> PartEvent:
        return PartEvent(
            sequence_number=self.next_number(),
            type=kind,
            item_id=item_id,
            output_index=len(self.whole),
            part=part,
        )
