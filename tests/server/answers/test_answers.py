"""Generation events on the three wires."""

import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from dynamic_lora_server.answers.chat import ChatAnswer
from dynamic_lora_server.answers.completions import CompletionAnswer
from dynamic_lora_server.answers.openai import UsageTold, framed
from dynamic_lora_server.answers.streams import WholeAnswer
from dynamic_lora_server.answers.tgi import TgiAnswer
from dynamic_lora_server.errors import EngineFailed
from dynamic_lora_server.generation import (
    Echo,
    FinishReason,
    GenerationEvent,
    TokenLogprob,
    TokenPiece,
)
from dynamic_lora_server.tools.notation import HERMES
from dynamic_lora_server.tools.offer import Offer
from tests.support.events import finish, generation, piece


async def documents(stream: AsyncGenerator[bytes, None]) -> list[Any]:
    lines = [chunk.decode().removeprefix("data: ").strip() async for chunk in stream]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def written(answer: BaseModel) -> Any:
    return json.loads(answer.model_dump_json())


def tgi(*, prefix: str = "", num_top: int = 0) -> TgiAnswer:
    return TgiAnswer(prefix=prefix, num_top=num_top, special_ids=[8])


WHOLE = WholeAnswer(
    finish(FinishReason.EOS, "hi"), [piece("hi"), piece("", token="</s>", special=True)]
)


def test_tgi_whole() -> None:
    plain = tgi(prefix="say ").whole([WHOLE], details=False)
    assert plain.model_dump(exclude_none=True) == {"generated_text": "say hi"}
    details = written(tgi(num_top=1).whole([WHOLE, WHOLE], details=True))["details"]
    assert details["finish_reason"] == "eos_token"
    counts = ("generated_tokens", "prompt_tokens", "seed", "cached_tokens")
    assert [details[name] for name in counts] == [2, 3, 11, 2]
    (other,) = details["best_of_sequences"]
    assert other["generated_text"] == "hi"
    for one in (details, other):
        assert [token["text"] for token in one["tokens"]] == ["hi", "</s>"]
        assert [token["special"] for (token,) in one["top_tokens"]] == [True, True]


async def test_tgi_stream_ends_with_the_whole_text_on_its_last_token() -> None:
    events = await documents(
        tgi().stream(
            generation(
                piece("h"),
                piece("", token="i", is_last=True),
                finish(FinishReason.STOP, "hi", tail="i"),
            )
        )
    )
    assert [event["token"]["text"] for event in events] == ["h", "i"]
    assert [event["index"] for event in events] == [1, 2]
    assert [event["generated_text"] for event in events] == [None, "hi"]
    assert events[0]["details"] is None
    assert events[1]["details"]["finish_reason"] == "stop_sequence"
    assert events[1]["details"]["input_length"] == events[1]["details"]["prompt_tokens"] == 3


async def test_tgi_stream_shows_text_that_a_special_token_lets_go() -> None:
    events = await documents(
        tgi().stream(
            generation(
                piece("", token="h"),
                piece("h", token="<|x|>", special=True),
                piece("", token="i"),
                piece("", token="</s>", special=True, is_last=True),
                finish(FinishReason.EOS, "hi", tail="i"),
            )
        )
    )
    shown = [event["token"]["text"] for event in events if not event["token"]["special"]]
    assert "".join(shown) == "hi"
    bare = await documents(
        tgi().stream(
            generation(
                piece("hi"),
                piece("", token="</s>", special=True, is_last=True),
                finish(FinishReason.EOS, "hi"),
            )
        )
    )
    assert [event["token"]["special"] for event in bare] == [False, True]


async def test_tgi_stream_says_what_broke_it() -> None:
    events = await documents(tgi().stream(generation(piece("h"), EngineFailed("it broke"))))
    assert events[-1] == {
        "type": "/problems/engine-failed",
        "title": "The engine failed",
        "status": 500,
        "detail": "it broke",
        "error": "it broke",
        "error_type": "generation",
    }


def completion(**options: Any) -> CompletionAnswer:
    defaults: dict[str, Any] = {
        "model": "ner",
        "fingerprint": "fp_1",
        "n": 1,
        "logprobs": False,
        "usage": UsageTold.NEVER,
    }
    return CompletionAnswer(**(defaults | options))


def test_completions_number_their_choices_by_prompt_and_count_prompts_once() -> None:
    pair = [
        WholeAnswer(finish(FinishReason.LENGTH, "ab", index=0), [piece("a"), piece("b", offset=1)]),
        WholeAnswer(finish(FinishReason.STOP, "cd", index=1), [piece("c"), piece("d")]),
    ]
    answer = completion(n=2, logprobs=True).whole([pair, pair])
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.finish_reason for choice in answer.choices] == ["length", "stop"] * 2
    assert answer.usage is not None
    assert answer.usage.model_dump() == {
        "prompt_tokens": 6,
        "completion_tokens": 8,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert written(answer)["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"a": -1.0, " a": -0.5}, {"b": -1.0, " a": -0.5}],
        "text_offset": [0, 1],
    }


def top_logprobs(*pieces: TokenPiece) -> Any:
    answer = completion(logprobs=True).whole(
        [[WholeAnswer(finish(FinishReason.LENGTH, "ab"), list(pieces))]]
    )
    return written(answer)["choices"][0]["logprobs"]["top_logprobs"]


def test_the_sampled_token_is_always_among_the_likely_ones() -> None:
    best = TokenLogprob(token_id=7, token_bytes=b"b", logprob=-0.1)
    sampled = TokenLogprob(token_id=9, token_bytes=b"a", logprob=-1.0)
    assert top_logprobs(piece("a", top=()), piece("a", top=(best,))) == [
        {"a": -1.0},
        {"a": -1.0, "b": -0.1},
    ]
    assert top_logprobs(piece("a", top=(best, sampled))) == [{"a": -1.0, "b": -0.1}]


def test_of_tokens_that_read_the_same_the_likelier_is_named() -> None:
    parts = tuple(
        TokenLogprob(token_id=7, token_bytes=bytes([byte]), logprob=-0.1 * i)
        for i, byte in enumerate((0x80, 0x81), start=1)
    )
    assert top_logprobs(piece("a", top=parts)) == [{"a": -1.0, "\ufffd": -0.1}]
    assert top_logprobs(piece("", token=b"\x82", top=parts)) == [{"\ufffd": -0.1}]


async def test_completion_streams() -> None:
    chunks = await documents(
        framed(
            completion(usage=UsageTold.AT_THE_END, logprobs=True).stream(
                [
                    generation(
                        piece("ab"),
                        piece("", token="c", offset=2),
                        piece("", token="d", offset=3),
                        finish(FinishReason.STOP, "abc", tail="c"),
                    )
                ]
            )
        )
    )
    *pieces, usage, done = chunks
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in pieces) == "abc"
    assert [chunk["choices"][0]["finish_reason"] for chunk in pieces] == [None] * 3 + ["stop"]
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in pieces[:-1]]
    assert [one["text_offset"] for one in logprobs] == [[0], [2], [3]]
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 5)


@pytest.mark.parametrize(("num_top", "most"), [(0, 64), (20, 11)])
async def test_a_prompt_comes_in_parts_that_are_short_to_write(num_top: int, most: int) -> None:
    top = tuple(
        TokenLogprob(token_id=i, token_bytes=b"%d" % i, logprob=-0.1 * i) for i in range(num_top)
    )
    pieces = [piece("", token="a", offset=at, top=top) for at in range(100)]
    echo = Echo(index=0, text="a" * 100, pieces=pieces)
    events = generation(echo, finish(FinishReason.LENGTH, ""))
    *chunks, _ = await documents(completion(logprobs=True).stream([events]))
    parts = [chunk["choices"][0] for chunk in chunks]
    assert [part["text"] for part in parts] == ["a" * 100, *[""] * (len(parts) - 1)]
    offsets = [part["logprobs"]["text_offset"] for part in parts]
    assert max(map(len, offsets)) == most
    assert [offset for part in offsets for offset in part] == list(range(100))
    assert [len(part["logprobs"]["top_logprobs"]) for part in parts] == list(map(len, offsets))


async def test_a_broken_openai_stream_ends_with_an_error_and_not_with_done() -> None:
    chunks = await documents(framed(completion().stream([generation(EngineFailed("it broke"))])))
    (last,) = chunks
    assert (last["error"]["message"], last["error_type"]) == ("it broke", "generation")


def chat(
    *,
    n: int = 1,
    logprobs: bool = False,
    usage: UsageTold = UsageTold.NEVER,
    offer: Offer | None = None,
) -> ChatAnswer:
    return ChatAnswer(
        model="ner", fingerprint="fp_1", n=n, logprobs=logprobs, usage=usage, offer=offer
    )


def test_chat_whole() -> None:
    answer = written(chat(logprobs=True).whole([WHOLE]))
    (choice,) = answer["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("hi", "stop")
    first, second = choice["logprobs"]["content"]
    assert (first["bytes"], second["token"]) == (list(b"hi"), "</s>")
    assert first["top_logprobs"] == [{"token": " a", "logprob": -0.5, "bytes": [32, 97]}]
    assert answer["usage"]["total_tokens"] == 5


def test_bytes_of_a_part_of_a_character_can_be_joined() -> None:
    whole = "é".encode()
    likely = (TokenLogprob(token_id=7, token_bytes=whole[:1], logprob=-0.1),)
    pieces = [piece("", token=whole[:1], top=likely), piece("é", token=whole[1:], top=likely)]
    answer = chat(logprobs=True).whole([WholeAnswer(finish(FinishReason.LENGTH, "é"), pieces)])
    first, second = written(answer)["choices"][0]["logprobs"]["content"]
    assert first["token"] == second["token"] == "\ufffd"
    assert bytes(first["bytes"] + second["bytes"]).decode() == "é"
    assert first["top_logprobs"][0]["bytes"] == list(whole[:1])


async def test_chat_streams_begin_with_a_role_for_each_choice() -> None:
    chunks = await documents(
        chat(n=2, usage=UsageTold.AT_THE_END).stream(
            generation(
                piece("a", index=1),
                finish(FinishReason.LENGTH, "a", index=1),
                piece("", token="b"),
                finish(FinishReason.EOS, "b", tail="b"),
            )
        )
    )
    deltas = [(c["choices"][0]["index"], c["choices"][0]["delta"]) for c in chunks[:-1]]
    assert deltas == [
        (0, {"role": "assistant", "content": ""}),
        (1, {"role": "assistant", "content": ""}),
        (1, {"content": "a"}),
        (1, {}),
        (0, {"content": "b"}),
    ]
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


@pytest.mark.parametrize("chats", [True, False])
async def test_every_chunk_has_the_counts_so_far(chats: bool) -> None:
    events = generation(
        piece("a", index=1),
        piece("", token="b"),
        piece("b"),
        finish(FinishReason.LENGTH, "a", index=1),
        finish(FinishReason.EOS, "b"),
    )
    always = UsageTold.ALWAYS
    stream = (
        chat(n=2, usage=always).stream(events)
        if chats
        else completion(n=2, usage=always).stream([events])
    )
    *chunks, last = [chunk["usage"] for chunk in await documents(stream)]
    counts = [(u["prompt_tokens"], u["completion_tokens"], u["total_tokens"]) for u in chunks]
    roles = [(3, 0, 3)] * 2 if chats else []
    assert counts == [*roles, (3, 1, 4), (3, 3, 6), (3, 3, 6), (3, 3, 6)]
    assert {usage["prompt_tokens_details"] for usage in chunks} == {None}
    assert last["prompt_tokens_details"] == {"cached_tokens": 2}


OFFER = Offer(notation=HERMES, names=frozenset({"f", "g"}), forced=False, grammar=None)
FORCED = replace(OFFER, forced=True)
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
CALLS = CALL + '\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'


def message_of(choice: Any) -> Any:
    """What a choice says, but for the ids of its calls."""
    calls = [
        (call.type, call.function.name, call.function.arguments)
        for call in choice.message.tool_calls or ()
    ]
    return choice.message.role, choice.message.content or "", calls, choice.finish_reason


async def streamed(answer: ChatAnswer, *events: GenerationEvent) -> Any:
    """What OpenAI's client makes of a stream."""
    state = ChatCompletionStreamState()
    for document in await documents(answer.stream(generation(*events))):
        state.handle_chunk(ChatCompletionChunk.model_validate(document))
    return state.current_completion_snapshot


@pytest.mark.parametrize(
    ("offer", "text", "content", "calls"),
    [
        (OFFER, CALL, None, [("f", '{"a": "é"}')]),
        (OFFER, f"I look. {CALLS}", "I look.", [("f", '{"a": "é"}'), ("g", "{}")]),
        (OFFER, "It rains.", "It rains.", []),
        (OFFER, "", "", []),
        (OFFER, CALL[:-30], CALL[:-30], []),
        (FORCED, CALLS, None, [("f", '{"a": "é"}'), ("g", "{}")]),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("logprobs", [True, False])
async def test_calls_in_a_chat(
    offer: Offer, text: str, content: str | None, calls: list[Any], size: int, logprobs: bool
) -> None:
    pieces = [piece(text[at : at + size]) for at in range(0, len(text), size)]
    end = finish(FinishReason.EOS, text)
    answer = chat(offer=offer, usage=UsageTold.AT_THE_END, logprobs=logprobs)
    whole = ChatCompletion.model_validate_json(
        answer.whole([WholeAnswer(end, pieces)]).model_dump_json()
    )
    choice: Any = whole.choices[0]
    assert choice.message.content == content
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    found = choice.message.tool_calls or []
    assert [(one.function.name, one.function.arguments) for one in found] == calls
    snapshot = await streamed(answer, *pieces, end)
    assert message_of(snapshot.choices[0]) == message_of(choice)
    assert snapshot.choices[0].message.content == content
    assert snapshot.usage == whole.usage
    if logprobs and text:
        assert len(snapshot.choices[0].logprobs.content) == len(pieces)


async def test_the_deltas_of_a_call() -> None:
    """As OpenAI streams them: the name with an id, then the arguments, and at last the end."""
    text = '<tool_call>{"name": "f", "arguments": {"a": 1}}'
    pieces = [piece(text[at : at + 40]) for at in range(0, len(text), 40)]
    chunks = await documents(
        chat(offer=FORCED).stream(generation(*pieces, finish(FinishReason.STOP, text)))
    )
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    (named,) = deltas[1]["tool_calls"]
    assert deltas[0] == {"role": "assistant"}
    assert named.pop("id").startswith("call_")
    assert named == {"index": 0, "type": "function", "function": {"name": "f", "arguments": ""}}
    assert [delta["tool_calls"][0]["function"] for delta in deltas[2:-1]] == [
        {"arguments": '{"'},
        {"arguments": 'a": 1}'},
    ]
    assert deltas[-1] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_each_choice_has_calls_of_its_own() -> None:
    ends = [finish(FinishReason.EOS, text, index=i) for i, text in enumerate((CALL, "no", CALLS))]
    events: list[GenerationEvent] = []
    for at in range(0, len(CALLS), 7):
        for one in ends:
            if text := one.text[at : at + 7]:
                events.append(piece(text, index=one.index))
    answer = chat(n=3, offer=OFFER)
    whole = answer.whole([WholeAnswer(one) for one in ends])
    snapshot = await streamed(answer, *events, *ends)
    assert list(map(message_of, snapshot.choices)) == list(map(message_of, whole.choices))
    assert [choice.finish_reason for choice in whole.choices] == [
        "tool_calls",
        "stop",
        "tool_calls",
    ]


@pytest.mark.parametrize(
    ("reason", "text", "end"),
    [
        (FinishReason.LENGTH, CALL, "length"),  # another call might have come
        (FinishReason.LENGTH, CALL[:-16], "length"),
        (FinishReason.STOP, CALL[:-16], "stop"),  # a stop string within the arguments
    ],
)
async def test_a_call_that_is_cut_off(reason: FinishReason, text: str, end: str) -> None:
    answer = chat(offer=FORCED)
    whole = answer.whole([WholeAnswer(finish(reason, text))])
    assert whole.choices[0].message.tool_calls is not None
    (call,) = whole.choices[0].message.tool_calls
    assert '{"a": "é"}'.startswith(call.function.arguments)
    assert whole.choices[0].finish_reason == end
    snapshot = await streamed(answer, *map(piece, text), finish(reason, text))
    assert message_of(snapshot.choices[0]) == message_of(whole.choices[0])


def test_without_calls_an_answer_does_not_speak_of_them() -> None:
    message = chat().whole([WHOLE]).model_dump()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "hi", "refusal": None}
