import asyncio
import json
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from peft import PromptTuningConfig, get_peft_model

from dynamic_lora_adapters.apply.merge import MergeFailed, Merger
from dynamic_lora_adapters.errors import AdapterError, AdapterNotFound
from dynamic_lora_adapters.terms import AdapterTerms
from dynamic_lora_server.engine.engine import EngineEvent
from dynamic_lora_server.engine.model_runner import ModelRunner
from dynamic_lora_server.engine.sampling import grammars
from dynamic_lora_server.engine.sampling.grammars import CompiledGrammar, Grammars
from dynamic_lora_server.engine.scheduler import Scheduler
from dynamic_lora_server.errors import (
    ContextOverflow,
    EngineFailed,
    InvalidParameter,
    NotReady,
    QueueFull,
)
from dynamic_lora_server.generation import (
    Echo,
    FinishReason,
    Grammar,
    GrammarKind,
    Started,
    TokenPiece,
)
from dynamic_lora_server.modes import Mode
from dynamic_lora_server.noop import noop
from dynamic_lora_server.runtime import Runtime
from dynamic_lora_server.text import TokenizerView
from tests.support.adapters import make_adapter
from tests.support.adapters import quiet as quiet_peft
from tests.support.eventually import eventually
from tests.support.grammars import MANY_STATES, follow
from tests.support.models import (
    BOS,
    EOS,
    EOS_ID,
    PAD,
    PAD_ID,
    save_tiny_base,
    sentencepiece_tokenizer,
    tiny_llama,
    tiny_tokenizer,
)
from tests.support.runtimes import collect, finishes, publish, serving, spec, token_ids


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[Runtime]:
    async with serving(tmp_path, max_running=4, max_waiting=4) as running:
        make = make_adapter(tmp_path / "ner", tiny_llama(), targets="all-linear")
        publish(running, "ner", make)
        yield running


async def quiet(runtime: Runtime) -> None:
    """Wait until the engine has no sequence left, and then until the last lease has ended."""
    await eventually(lambda: not runtime.built.engine.has_work, "the engine rests")
    await eventually(lambda: runtime.stats().adapters.num_leased == 0, "nobody has a lease")


async def test_events_of_a_request(runtime: Runtime) -> None:
    events = await collect(runtime, spec("the king", adapter="ner"))
    started, *pieces, finish = events
    assert isinstance(started, Started)
    assert started.adapter == "ner"
    assert started.version == runtime.registry.resolve("ner").digest
    assert all(isinstance(piece, TokenPiece) for piece in pieces)
    end = finishes(events)[0]
    assert finish is end
    assert end.reason is FinishReason.LENGTH
    assert end.num_output_tokens == len(pieces) == 8
    assert end.num_prompt_tokens == started.num_prompt_tokens
    text = "".join(piece.text for piece in pieces if isinstance(piece, TokenPiece))
    assert text + end.tail == end.text


async def test_each_row_of_a_mixed_batch_equals_the_request_alone(runtime: Runtime) -> None:
    requests = [
        spec("the king", adapter="ner"),
        spec("the king"),
        spec("a longer prompt than the others", adapter="ner", temperature=1.0, seed=3),
        spec("on the hill", temperature=0.8, seed=5, top_p=0.9, top_k=20),
    ]
    alone = [token_ids(await collect(runtime, request)) for request in requests]
    together = await asyncio.gather(*(collect(runtime, request) for request in requests))
    assert [token_ids(events) for events in together] == alone
    assert alone[0] != alone[1]


async def test_n_continuations_draw_with_successive_seeds(runtime: Runtime) -> None:
    events = await collect(runtime, spec(n=3, temperature=1.0, seed=7))
    assert {end.seed for end in finishes(events).values()} == {7, 8, 9}
    second = await collect(runtime, spec(temperature=1.0, seed=8))
    assert token_ids(events, 1) == token_ids(second)
    assert len({tuple(token_ids(events, i)) for i in range(3)}) == 3


async def test_an_unseeded_request_reports_the_seed_it_drew_with(runtime: Runtime) -> None:
    events = await collect(runtime, spec(temperature=1.0))
    seed = finishes(events)[0].seed
    assert token_ids(await collect(runtime, spec(temperature=1.0, seed=seed))) == token_ids(events)


async def test_virtual_tokens_count_where_a_default_limit_is_cut(
    runtime: Runtime, tmp_path: Path
) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with quiet_peft():
        get_peft_model(tiny_llama(), config).save_pretrained(str(tmp_path / "soft"))
    publish(runtime, "soft", tmp_path / "soft")
    prompt = (5,) * 505
    fitting = {"adapter": "soft", "max_new_tokens": 100, "clip_output": True}
    events = await collect(runtime, spec(prompt, **fitting))
    assert finishes(events)[0].num_output_tokens == 512 - 505 - 3
    assert finishes(events)[0].reason is FinishReason.LENGTH
    with pytest.raises(ContextOverflow, match="up to 5 new ones"):
        await collect(runtime, spec(prompt, adapter="soft", max_new_tokens=5))
    with pytest.raises(ContextOverflow, match="the adapter adds 3"):
        await collect(runtime, spec((5,) * 509, **fitting))


async def test_a_prompt_that_is_given_back_is_decoded_once_and_off_the_event_loop(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, threads = TokenizerView.decode, []

    def recorded(view: TokenizerView, ids: Sequence[int]) -> str:
        threads.append(threading.current_thread())
        return decode(view, ids)

    monkeypatch.setattr(TokenizerView, "decode", recorded)
    prompt = tuple(tiny_tokenizer().encode("the king"))
    events = await collect(runtime, spec(prompt, n=3, echo=True))
    echoes = [event for event in events if isinstance(event, Echo)]
    assert [(echo.text, list(echo.pieces)) for echo in echoes] == [("the king", [])] * 3
    (thread,) = threads
    assert thread is not threading.current_thread()


async def test_stop_string_ends_the_text_and_the_sequence(runtime: Runtime) -> None:
    free = finishes(await collect(runtime, spec(max_new_tokens=40)))[0].text
    stop = free[5:7]
    events = await collect(runtime, spec(max_new_tokens=40, stop=(stop,)))
    end = finishes(events)[0]
    assert end.reason is FinishReason.STOP
    assert end.text == free[: free.index(stop)]
    await quiet(runtime)


async def test_offsets_count_the_text_that_is_held_back_too(runtime: Runtime) -> None:
    free = finishes(await collect(runtime, spec(max_new_tokens=40)))[0].text
    never = free[5:9] + "never said"
    events = await collect(runtime, spec(max_new_tokens=40, stop=(never, free[-2:])))
    pieces = [event for event in events if isinstance(event, TokenPiece)]
    whole = [piece for piece in pieces if "\ufffd" not in piece.token_text]
    assert any(not piece.text for piece in whole)
    for piece in whole:
        assert free[piece.offset :].startswith(piece.token_text[: len(free) - piece.offset])


async def test_an_answer_keeps_the_space_that_begins_it(tmp_path: Path) -> None:
    """As Llama 2's tokenizer decodes: what begins a text loses its space."""
    save_tiny_base(tmp_path / "base", tokenizer=sentencepiece_tokenizer())
    async with serving(tmp_path) as running:
        for prompt_id in range(3, running.view.vocab_size):
            events = await collect(running, spec((prompt_id,), max_new_tokens=1))
            piece = next(event for event in events if isinstance(event, TokenPiece))
            if piece.token_bytes.startswith(b" "):
                break
        end = finishes(events)[0]
        alone = running.view.backend.decode([piece.token_id])
        assert piece.text + end.tail == end.text == piece.token_text == " " + alone


async def test_stop_token_ends_the_sequence(runtime: Runtime) -> None:
    free = token_ids(await collect(runtime, spec()))
    events = await collect(runtime, spec(stop_token_ids=(free[3],)))
    assert finishes(events)[0].reason is FinishReason.STOP
    taken = free[: free.index(free[3]) + 1]
    assert token_ids(events) == taken
    assert finishes(events)[0].text == runtime.view.decode(taken[:-1])
    kept = await collect(runtime, spec(stop_token_ids=(free[3],), include_stop=True))
    assert finishes(kept)[0].text == runtime.view.decode(taken)


async def test_a_special_token_that_is_asked_for_by_name_ends_the_sequence(
    runtime: Runtime,
) -> None:
    noise: dict[str, Any] = {"temperature": 100.0, "max_new_tokens": 100}
    names = dict(enumerate((BOS, EOS, PAD)))
    for seed in range(100):
        free = token_ids(await collect(runtime, spec(seed=seed, **noise)))
        if (first := next((one for one in free if one in names), None)) is not None:
            break
    assert first is not None
    for ignore_eos in (True, False):
        request = spec(seed=seed, stop=(names[first],), ignore_eos=ignore_eos, **noise)
        events = await collect(runtime, request)
        assert token_ids(events) == free[: free.index(first) + 1]
        by_eos = first == EOS_ID and not ignore_eos
        assert finishes(events)[0].reason is (FinishReason.EOS if by_eos else FinishReason.STOP)
    await quiet(runtime)


async def test_special_tokens_that_are_to_be_shown_are_text(runtime: Runtime) -> None:
    grammar = Grammar(GrammarKind.CALLS, f'start: "a" <[{PAD_ID}]> "b"', "tools")
    for shown, text in ((), "ab"), ((PAD, "<none>"), f"a{PAD}b"):
        request = spec(grammar=grammar, ignore_eos=False, shown_tokens=shown)
        assert finishes(await collect(runtime, request))[0].text == text


async def test_a_grammar_that_breaks_while_its_adapter_is_awaited_is_compiled_again(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "_MAX_STATES", 500)
    made: list[CompiledGrammar] = []
    loading, go_on = threading.Event(), threading.Event()
    compile_one, load = Grammars.compile, runtime.registry.load

    def compiled(self: Grammars, grammar: Grammar) -> CompiledGrammar:
        made.append(compile_one(self, grammar))
        return made[-1]

    def load_late(digest: str) -> AdapterTerms:
        loading.set()
        assert go_on.wait(60)
        return load(digest)

    monkeypatch.setattr(Grammars, "compile", compiled)
    monkeypatch.setattr(runtime.registry, "load", load_late)
    request = spec(adapter="ner", grammar=MANY_STATES, max_new_tokens=3, ignore_eos=False)
    waiting = asyncio.create_task(collect(runtime, request))
    assert await asyncio.to_thread(loading.wait, 60)
    (broken,) = made
    text = "".join(random.Random(1).choices("ab", k=500))
    assert "too many states" in str(follow(broken.guide(ends=()), text))
    go_on.set()
    assert finishes(await waiting)
    assert len(made) == 2


async def test_closing_the_stream_frees_the_place_at_once(runtime: Runtime) -> None:
    stream = runtime.service.stream(spec(adapter="ner", n=4, max_new_tokens=400))
    async for event in stream:
        if isinstance(event, TokenPiece):
            break
    assert runtime.service.places.num_open == 4
    await stream.aclose()
    assert runtime.service.places.num_open == 0
    await quiet(runtime)
    stats = runtime.stats()
    assert (stats.kv_used_tokens, stats.kv_reserved_tokens) == (0, 0)
    assert stats.adapters.num_leased == 0


async def test_cancelling_the_task_frees_the_place(runtime: Runtime) -> None:
    task = asyncio.create_task(collect(runtime, spec(adapter="ner", max_new_tokens=400)))
    await eventually(lambda: runtime.stats().num_running, "the request runs")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await quiet(runtime)
    assert runtime.service.places.num_open == 0


async def test_a_full_queue_refuses_with_a_pause(runtime: Runtime) -> None:
    tasks = [asyncio.create_task(collect(runtime, spec(max_new_tokens=100, n=4))) for _ in range(2)]
    await eventually(lambda: runtime.service.places.num_open == 8, "all places are taken")
    with pytest.raises(QueueFull, match="8 continuations are running or waiting") as refused:
        await collect(runtime, spec())
    assert 1 <= refused.value.retry_after <= 60
    done = await asyncio.gather(*tasks)
    assert all(len(finishes(events)) == 4 for events in done)
    assert finishes(await collect(runtime, spec()))


async def test_the_pause_is_what_answers_take_whatever_was_refused(runtime: Runtime) -> None:
    for _ in range(50):
        with pytest.raises(ContextOverflow):
            await collect(runtime, spec((5,) * 512))
    streams = [runtime.service.stream(spec(n=4, max_new_tokens=100)) for _ in range(2)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(QueueFull) as refused:
        await collect(runtime, spec())
    for stream in streams:
        await stream.aclose()
    assert refused.value.retry_after == 2  # rounds of 4, of a second each: none was answered yet


async def test_more_continuations_than_places_are_no_reason_to_wait(runtime: Runtime) -> None:
    with pytest.raises(InvalidParameter, match="n is 9; the server takes 8 continuations") as error:
        await collect(runtime, spec(n=9))
    assert error.value.field == "n"


async def test_a_request_over_the_context_is_refused_with_both_numbers(runtime: Runtime) -> None:
    with pytest.raises(ContextOverflow, match=r"has 2 tokens and up to 511 .* 513 .* holds 512"):
        await collect(runtime, spec((5, 6), max_new_tokens=511))
    events = await collect(runtime, spec((5, 6), max_new_tokens=3))
    assert finishes(events)


async def test_a_prompt_that_is_too_long_alone_is_to_blame(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ContextOverflow, match=r"has 512 tokens, but the context holds 512") as one:
        await collect(runtime, spec((5,) * 512))
    assert one.value.field == "inputs"
    with pytest.raises(ContextOverflow):  # each of a body full of ids is not looked at
        await collect(runtime, spec((10**9,) * 512))
    monkeypatch.setattr(TokenizerView, "encode", None)  # so long that this would take seconds
    with pytest.raises(ContextOverflow, match=r"has at least \d{4,} tokens, but the context"):
        await collect(runtime, spec("the rain " * 100_000))


async def test_stop_tokens_that_no_model_makes_are_refused(runtime: Runtime) -> None:
    with pytest.raises(InvalidParameter, match="stop_token_ids holds a token id outside 0 to"):
        await collect(runtime, spec(stop_token_ids=(5, 2**70)))


async def test_whom_nobody_reads_keeps_no_adapter_from_others(runtime: Runtime) -> None:
    stream = runtime.service.stream(spec(adapter="ner", max_new_tokens=40))
    await anext(stream)
    await anext(stream)
    await quiet(runtime)
    assert runtime.stats().adapters.num_leased == 0
    assert len([event async for event in stream]) == 40  # the rest, and the end


@pytest.mark.parametrize(
    ("prompt", "text"), [("", "prompt is empty"), ((5, 300), "outside 0 to"), ((-1,), "outside 0")]
)
async def test_impossible_prompts_are_refused(
    runtime: Runtime, prompt: str | tuple[int, ...], text: str
) -> None:
    with pytest.raises(InvalidParameter, match=text):
        await collect(runtime, spec(prompt, add_special_tokens=False))


async def test_an_unknown_adapter_is_refused_with_near_names(runtime: Runtime) -> None:
    with pytest.raises(AdapterNotFound, match="Did you mean 'ner'"):
        await collect(runtime, spec(adapter="nerr"))
    assert runtime.service.places.num_open == 0


async def test_a_broken_step_fails_its_requests_and_the_server_lives_on(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", broken)
        with pytest.raises(EngineFailed, match="the device is on fire"):
            await collect(runtime, spec(adapter="ner"))
    assert caplog.text.count("Traceback (most recent call last)") == 1
    assert "in broken" in caplog.text  # the line that broke
    assert finishes(await collect(runtime, spec(adapter="ner")))


async def test_a_broken_engine_is_told_to_all_and_to_whom_looks_after_it(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the books do not balance")

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "schedule", broken)
        with pytest.raises(EngineFailed, match="has stopped: RuntimeError: the books"):
            await collect(runtime, spec(adapter="ner"))
    with pytest.raises(NotReady, match="The engine has stopped: RuntimeError: the books"):
        await collect(runtime, spec())
    with pytest.raises(NotReady, match="The engine has stopped"):
        runtime.service.check_alive()
    assert runtime.stats().adapters.num_leased == 0


async def test_an_adapter_whose_merge_fails_is_served_unmerged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges: list[object] = []

    def fail(_: Merger, adapter: object) -> None:
        merges.append(adapter)
        raise MergeFailed("MemoryError: no room")

    async with serving(tmp_path, mode=Mode.MERGED) as runtime:
        publish(runtime, "a", make_adapter(tmp_path / "a", tiny_llama(), targets="all-linear"))
        expected = token_ids(await collect(runtime, spec(adapter="a")))
        assert runtime.stats().modes.num_switches == 1
        await collect(runtime, spec())
        publish(runtime, "b", make_adapter(tmp_path / "b", tiny_llama(), seed=5))
        monkeypatch.setattr(Merger, "switch", fail)
        assert token_ids(await collect(runtime, spec(adapter="a"))) == expected
        assert finishes(await collect(runtime, spec(adapter="b", max_new_tokens=20)))
        assert len(merges) == 1  # and not before each step again


async def test_truncate_keeps_the_last_tokens(runtime: Runtime) -> None:
    prompt = "the rain in the plain"
    last = tuple(tiny_tokenizer().encode(prompt))[-3:]
    expected = token_ids(await collect(runtime, spec(last)))
    events = await collect(runtime, spec(prompt, keep_last=3))
    assert isinstance(events[0], Started) and events[0].num_prompt_tokens == 3
    assert token_ids(events) == expected


async def test_a_deleted_adapter_serves_out_its_requests(runtime: Runtime) -> None:
    expected = token_ids(await collect(runtime, spec(adapter="ner", max_new_tokens=60)))
    stream = runtime.service.stream(spec(adapter="ner", max_new_tokens=60))
    events = [await anext(stream), await anext(stream)]
    digest = runtime.registry.resolve("ner").digest
    runtime.registry.delete("ner")
    runtime.loader.forget(digest)
    events += [event async for event in stream]
    assert token_ids(events) == expected
    with pytest.raises(AdapterNotFound):
        await collect(runtime, spec(adapter="ner"))
    assert runtime.stats().adapters.used_bytes == 0


async def test_shutting_down_fails_what_runs(tmp_path: Path) -> None:
    async with serving(tmp_path) as runtime:
        stream = runtime.service.stream(spec(max_new_tokens=400))
        await anext(stream)
        await anext(stream)
        runtime.service.close()
        with pytest.raises(NotReady, match="shutting down"):
            async for _ in stream:
                pass
        with pytest.raises(NotReady, match="shutting down"):
            await collect(runtime, spec())


async def test_a_recorded_trace_says_who_asked_and_when_and_nothing_else(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", tiny_llama())
    path = tmp_path / "trace.jsonl"
    async with serving(tmp_path, record_trace=path) as runtime:
        publish(runtime, "a", folder)
        await collect(runtime, spec("the king", adapter="a", n=2))
        await collect(runtime, spec("the queen", max_new_tokens=3))
        with pytest.raises(AdapterError):
            await collect(runtime, spec(adapter="no-such"))
        await collect(runtime, spec(adapter="a*0.5"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    keys = {"arrival_s", "adapter", "num_prompt_tokens", "num_output_tokens"}
    assert all(set(line) == keys for line in lines)
    assert [(line["adapter"], line["num_output_tokens"]) for line in lines] == [
        ("a", 8),
        ("a", 8),
        (None, 3),
        ("a*0.5", 8),
    ]
    times = [line["arrival_s"] for line in lines]
    assert times[0] == times[1] < times[2]
    assert "king" not in path.read_text()


async def test_a_slot_is_kept_while_a_step_reads_it_for_a_request_that_has_gone(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = runtime.built.engine
    step, stepping, go_on = engine.step, threading.Event(), threading.Event()

    def slowly(before_compute: Callable[[], object] = noop) -> list[EngineEvent]:
        stepping.set()
        assert go_on.wait(10)
        return step(before_compute)

    monkeypatch.setattr(engine, "step", slowly)
    request = asyncio.create_task(collect(runtime, spec(adapter="ner", max_new_tokens=100)))
    assert await asyncio.to_thread(stepping.wait, 10)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert runtime.service.places.num_open == 0
    assert runtime.stats().adapters.num_leased == 1
    go_on.set()
    await quiet(runtime)
    await eventually(lambda: not runtime.stats().adapters.num_leased, "no adapter is leased")
