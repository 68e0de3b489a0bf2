"""The line of grammars that are to be compiled."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamic_lora_server.engine.sampling.grammars import CompiledGrammar, Grammars
from dynamic_lora_server.errors import InvalidParameter, QueueFull
from dynamic_lora_server.generation import Grammar
from dynamic_lora_server.serving import grammar_line as module
from dynamic_lora_server.serving.grammar_line import GrammarLine
from tests.support.eventually import eventually
from tests.support.grammars import VIEW, json_of, regex
from tests.support.models import EOS_ID


class SlowGrammars(Grammars):
    """Compiles those whose text begins with `slow` once it may `go_on`."""

    def __init__(self) -> None:
        super().__init__(VIEW, {EOS_ID})
        self.go_on = threading.Event()
        self.begun: list[str] = []

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        self.begun.append(grammar.source)
        if grammar.source.startswith("slow"):
            assert self.go_on.wait(10)
        return super().compile(grammar)


@pytest.fixture
async def grammars() -> AsyncIterator[SlowGrammars]:
    grammars = SlowGrammars()
    yield grammars
    grammars.go_on.set()


async def test_what_is_compiled_waits_for_nothing(grammars: SlowGrammars) -> None:
    line = GrammarLine(grammars)
    known = await line.compiled(regex("a"))
    slow = asyncio.create_task(line.compiled(regex("slow")))
    await eventually(lambda: "slow" in grammars.begun, "it is being compiled")
    assert await line.compiled(regex("a", "another field")) is known
    assert not slow.done()
    grammars.go_on.set()
    assert await slow is await line.compiled(regex("slow"))


async def test_a_line_that_is_full_refuses_with_a_pause(
    grammars: SlowGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING", 2)
    line = GrammarLine(grammars)
    # However many want one of them, it waits once.
    wanted = [regex(pattern) for pattern in ("slow", "b", "c", "c", "slow", "b")]
    waiting = [asyncio.create_task(line.compiled(one)) for one in wanted]
    await eventually(lambda: "slow" in grammars.begun, "the first is being compiled")
    with pytest.raises(QueueFull, match="2 grammars wait for their turn") as refused:
        await line.compiled(regex("d"))
    assert 1 <= refused.value.retry_after <= 60
    grammars.go_on.set()
    slow, b, c, *others = await asyncio.gather(*waiting)
    assert others == [c, slow, b]
    assert grammars.begun == ["slow", "b", "c"]
    assert await line.compiled(regex("d"))


async def test_who_gives_up_leaves_the_others_waiting(grammars: SlowGrammars) -> None:
    line = GrammarLine(grammars)
    one, other = (asyncio.create_task(line.compiled(regex("slow"))) for _ in range(2))
    await eventually(lambda: grammars.begun, "it is being compiled")
    one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one
    grammars.go_on.set()
    assert await other is await line.compiled(regex("slow"))


async def test_what_nobody_waits_for_any_more_leaves_the_line(
    grammars: SlowGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING", 1)
    line = GrammarLine(grammars)
    slow = asyncio.create_task(line.compiled(regex("slow")))
    await eventually(lambda: grammars.begun, "the first is being compiled")
    for number in range(3):
        asked = [asyncio.create_task(line.compiled(regex(f"b{number}"))) for _ in range(2)]
        await eventually(lambda: line.num_waiting == 1, "it waits")
        asked[0].cancel()
        await asyncio.wait({asked[0]})
        assert line.num_waiting == 1  # for the other
        asked[1].cancel()
        await asyncio.wait({asked[1]})
        # At once another request for it, which is no longer that of those who have gone.
        again = asyncio.create_task(line.compiled(regex(f"b{number}")))
        await eventually(lambda: line.num_waiting == 1, "it waits again")
        again.cancel()
        await asyncio.wait({again})
        await eventually(lambda: line.num_waiting == 0, "nobody waits")
    last = asyncio.create_task(line.compiled(regex("c")))
    grammars.go_on.set()
    assert await last
    assert await slow
    assert grammars.begun == ["slow", "c"]


async def test_what_cannot_be_used_is_told_to_all_who_wait(grammars: SlowGrammars) -> None:
    line = GrammarLine(grammars)
    asked = [line.compiled(regex("slow(")) for _ in range(3)]
    grammars.go_on.set()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(one) for one in found] == [InvalidParameter] * 3
    with pytest.raises(InvalidParameter, match="unclosed"):
        await line.compiled(regex("slow("))
    assert grammars.begun == ["slow("]


async def test_one_that_failed_is_compiled_for_each_request(
    grammars: SlowGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = GrammarLine(grammars)
    monkeypatch.setattr(grammars, "is_shared", lambda _: False)
    first, second = await asyncio.gather(*(line.compiled(regex("a")) for _ in range(2)))
    assert first is not second


async def test_definitions_may_refer_to_one_another_a_long_way() -> None:
    """Reading them goes as deep, which the stack of other threads has no room for."""
    chain: dict[str, Any] = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(3500)}
    schema = {"$ref": "#/$defs/a0", "$defs": chain | {"a3500": {"const": 7}}}
    line = GrammarLine(Grammars(VIEW, {EOS_ID}))
    assert await line.compiled(json_of(schema))
    assert threading.stack_size() == 0
