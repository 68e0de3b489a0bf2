"""Both clients, on a transport without a network: each test runs for each of them."""

import asyncio
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamic_lora_client import (
    AccessDenied,
    AdapterNotFound,
    ApiError,
    AsyncClient,
    BadRequest,
    Busy,
    Client,
    Generation,
    InvalidArgument,
    InvalidResponse,
    NotFound,
    Parameters,
    RetryPolicy,
    ServerFault,
    StreamBroken,
    Timeout,
    Token,
    TransportError,
    Unavailable,
)
from dynamic_lora_client.config import ClientConfig
from dynamic_lora_server.schemas._base import Neutral
from dynamic_lora_server.schemas.generate import GenerateParameters
from tests.clients.wire import (
    COMPOSITION,
    DETAILS,
    GENERATION,
    PASSPORT,
    SERVED_BY,
    STREAM,
    TEXT,
    TOKENS,
    VERSION,
    problem,
    sse,
    token_event,
)

Handler = Callable[[httpx.Request], httpx.Response]
NO_JITTER = {"retry": RetryPolicy(max_jitter=0)}


class Caller:
    """Calls one method of one kind of client; a stream comes back as a list."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.requests: list[httpx.Request] = []

    def __call__(self, answers: Handler | list[Any], method: str, *args: Any, **kwargs: Any) -> Any:
        options = kwargs.pop("client", {})
        transport = httpx.MockTransport(self._recording(answers))
        if self.kind == "sync":
            return self._sync(transport, options, method, args, kwargs)
        return asyncio.run(self._async(transport, options, method, args, kwargs))

    def _recording(self, answers: Handler | list[Any]) -> Handler:
        queue = iter(answers) if isinstance(answers, list) else None

        def handle(request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            if queue is None:
                assert callable(answers)
                return answers(request)
            answer = next(queue)
            if isinstance(answer, Exception):
                raise answer
            assert isinstance(answer, httpx.Response)
            return answer

        return handle

    @staticmethod
    def _sync(transport: Any, options: Any, method: str, args: Any, kwargs: Any) -> Any:
        with Client(transport=transport, **options) as client:
            result = getattr(client, method)(*args, **kwargs)
            return list(result) if method == "stream" else result

    @staticmethod
    async def _async(transport: Any, options: Any, method: str, args: Any, kwargs: Any) -> Any:
        async with AsyncClient(transport=transport, **options) as client:
            if method == "stream":
                return [event async for event in client.stream(*args, **kwargs)]
            return await getattr(client, method)(*args, **kwargs)


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Caller:
    return Caller(request.param)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses taken, without taking them."""
    taken: list[float] = []

    async def sleep(seconds: float) -> None:
        taken.append(seconds)

    monkeypatch.setattr(time, "sleep", taken.append)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    return taken


def _ok(
    body: Any = None, status: int = 200, headers: dict[str, str] | None = None
) -> httpx.Response:
    return httpx.Response(status, json=body, headers=headers)


def _refusal(status: int, name: str = "invalid", **fields: Any) -> httpx.Response:
    headers = {"content-type": "application/problem+json"}
    return httpx.Response(status, json=problem(status, name, **fields), headers=headers)


def test_both_clients_have_the_same_methods() -> None:
    def signatures(kind: type) -> dict[str, list[str]]:
        members = inspect.getmembers(kind, inspect.isfunction)
        return {n: list(inspect.signature(f).parameters) for n, f in members if n[0] != "_"}

    assert signatures(Client) == signatures(AsyncClient)


def test_generate_sends_the_wire_body_and_reads_the_answer(call: Caller) -> None:
    result = call(
        [_ok(GENERATION, headers=SERVED_BY)],
        "generate",
        "Zoë",
        adapter="ner",
        max_new_tokens=3,
        stop=["\n"],
    )
    (request,) = call.requests
    assert (request.method, str(request.url)) == (
        "POST",
        "http://127.0.0.1:8000/generate?adapter=ner",
    )
    assert request.headers["content-type"] == "application/json"
    assert json.loads(request.content) == {
        "inputs": "Zoë",
        "parameters": {"max_new_tokens": 3, "stop": ["\n"], "details": True},
    }
    assert isinstance(result, Generation)
    assert (result.text, result.adapter, result.adapter_version) == (TEXT, "ner", VERSION)
    assert (result.finish_reason, result.seed, result.mode) == ("eos_token", 11, "bypass")
    assert (result.num_prompt_tokens, result.num_cached_tokens, result.num_tokens) == (7, 5, 3)
    assert result.tokens[0] == Token(id=5, text="Zoë", logprob=-0.25, special=False)
    assert result.tokens[2].special
    assert (result.tokens[0].top_tokens, result.others) == ((), ())


def test_several_answers_and_the_likeliest_tokens(call: Caller) -> None:
    other = DETAILS | {"generated_text": "Zoë", "tokens": TOKENS[:1], "top_tokens": [TOKENS[:1]]}
    top = {"top_tokens": [TOKENS[:2], TOKENS[1:], []], "best_of_sequences": [other]}
    details = DETAILS | {"tokens": TOKENS} | top
    answer = _ok({"generated_text": TEXT, "details": details})
    result = call([answer], "generate", "a", n=2, top_n_tokens=2)
    sent = json.loads(call.requests[0].content)["parameters"]
    assert sent == {"n": 2, "top_n_tokens": 2, "details": True}
    assert [[t.id for t in token.top_tokens] for token in result.tokens] == [[5, 6], [6, 2], []]
    (second,) = result.others
    assert (second.text, second.finish_reason, second.seed) == ("Zoë", "eos_token", 11)
    assert (second.num_tokens, second.tokens[0].top_tokens[0].text) == (3, "Zoë")


def test_stream_gives_the_likeliest_tokens(call: Caller) -> None:
    body = sse(token_event(0) | {"top_tokens": TOKENS[:2]}, token_event(2))
    first, _, last = call([httpx.Response(200, content=body)], "stream", "a", top_n_tokens=2)
    assert [token.id for token in first.top_tokens] == [5, 6]
    assert (last.tokens[0], last.mode) == (first, "bypass")


def test_every_parameter_that_is_served_can_be_given() -> None:
    """But those that are arguments of their own: which adapter, and `details`."""
    served = {
        name
        for name, field in GenerateParameters.model_fields.items()
        if not any(isinstance(one, Neutral) for one in field.metadata)
    }
    own = {"adapter_id", "adapters", "details"}
    assert Parameters.__optional_keys__ == served - own


def test_generate_raw_without_details_and_with_the_base(call: Caller) -> None:
    result = call([_ok({"generated_text": "x"})], "generate", "a", raw=True, details=False)
    (request,) = call.requests
    assert request.url.query == b""
    assert json.loads(request.content) == {
        "inputs": "a",
        "parameters": {"details": False},
        "raw": True,
    }
    assert result == Generation(text="x", adapter=None, adapter_version=None)


def test_a_sum_goes_out_as_text_or_as_a_list(call: Caller) -> None:
    call([_ok({"generated_text": "x"})], "generate", "a", adapter="ner*0.7+tone*0.3", details=False)
    pairs = [("ner", 0.7), ("tone", 0.3)]
    call([_ok({"generated_text": "x"})], "generate", "a", adapters=pairs, details=False)
    call([httpx.Response(200, content=STREAM)], "stream", "a", adapters=pairs)
    text, listed, streamed = call.requests
    assert text.url.query == b"adapter=ner%2A0.7%2Btone%2A0.3"
    assert "adapters" not in json.loads(text.content)
    for request in (listed, streamed):
        assert request.url.query == b""
        assert json.loads(request.content)["adapters"] == [
            {"name": "ner", "weight": 0.7},
            {"name": "tone", "weight": 0.3},
        ]


def test_compositions(call: Caller) -> None:
    (listed,) = call([_ok({"compositions": [COMPOSITION]})], "compositions")
    one = call([_ok(COMPOSITION)], "composition", "newsy")
    saved = call([_ok(COMPOSITION, 201)], "save_composition", "newsy", "tone*0.3+ner*0.7")
    assert call([httpx.Response(204)], "delete_composition", "newsy") is None
    assert listed == one == saved
    assert (one.name, one.text, one.version) == ("newsy", "ner*0.7+tone*0.3", VERSION)
    assert one.document["parts"][1]["weight"] == 0.3
    assert [(r.method, r.url.path) for r in call.requests] == [
        ("GET", "/compositions"),
        ("GET", "/compositions/newsy"),
        ("PUT", "/compositions/newsy"),
        ("DELETE", "/compositions/newsy"),
    ]
    assert json.loads(call.requests[2].content) == {"adapter": "tone*0.3+ner*0.7"}


def test_a_composition_that_is_not_there(call: Caller) -> None:
    with pytest.raises(NotFound):
        call([_refusal(404, "composition-not-found")], "composition", "x")
    with pytest.raises(AdapterNotFound):
        call([_refusal(404, "version-not-found")], "generate", "x", adapter="ner@00000000")
    with pytest.raises(InvalidResponse, match="no list 'compositions'"):
        call([_ok({})], "compositions")


def test_stream_gives_tokens_and_then_the_whole(call: Caller) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=STREAM, headers=SERVED_BY)

    *tokens, last = call(answer, "stream", "a", adapter="ner", seed=11)
    assert all(isinstance(token, Token) for token in tokens)
    assert isinstance(last, Generation)
    assert "".join(token.text for token in tokens) == last.text == TEXT
    assert last.tokens == tuple(tokens)
    assert (last.adapter, last.finish_reason, last.num_tokens) == ("ner", "eos_token", 3)
    assert str(call.requests[0].url).endswith("/generate_stream?adapter=ner")
    assert json.loads(call.requests[0].content)["parameters"]["seed"] == 11


def test_stream_with_an_error_in_it(call: Caller) -> None:
    body = sse(token_event(0), {"error": "engine stopped", "error_type": "engine-failed"})
    with pytest.raises(StreamBroken, match="engine stopped") as caught:
        call([httpx.Response(200, content=body)], "stream", "a")
    assert caught.value.error_type == "engine-failed"


def test_stream_that_ends_early(call: Caller) -> None:
    with pytest.raises(StreamBroken, match="ended before the generation did") as caught:
        call([httpx.Response(200, content=sse(token_event(0)))], "stream", "a")
    assert caught.value.error_type is None
    assert len(call.requests) == 1


def test_stream_refused_before_it_begins(call: Caller) -> None:
    with pytest.raises(AdapterNotFound):
        call([_refusal(404, "adapter-not-found")], "stream", "a")


def test_stream_is_retried_before_it_begins(call: Caller, sleeps: list[float]) -> None:
    busy = httpx.Response(429, headers={"retry-after": "2"})
    answers = [busy, httpx.Response(200, content=STREAM)]
    events = call(answers, "stream", "a", client=NO_JITTER)
    assert events[-1].text == TEXT
    assert sleeps == [2]


def test_upload_sends_the_files(call: Caller, peft_dir: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = call(
        [_ok(PASSPORT, 201)],
        "upload",
        "ner",
        peft_dir,
        force=True,
        on_progress=lambda *sent: seen.append(sent),
    )
    body = call.requests[0].content
    assert body.index(b'name="name"\r\n\r\nner') < body.index(b'filename="adapter_config.json"')
    assert b'name="force"\r\n\r\ntrue' in body
    assert b'name="files"; filename="adapter_model.safetensors"' in body
    assert b"optimizer.pt" not in body
    assert (peft_dir / "adapter_model.safetensors").read_bytes() in body
    assert seen[-1] == (200_008, 200_008)
    assert result.created
    assert result.adapter.name == "ner"


def test_fetch_names_where_the_server_finds_it(call: Caller) -> None:
    source = "hf://org/repo@main"
    assert call([_ok(PASSPORT, 201)], "fetch", "ner", source, force=True).created
    assert not call([_ok(PASSPORT)], "fetch", "ner", source).created
    forced, plain = call.requests
    assert (forced.method, forced.url.path) == ("POST", "/adapters")
    assert json.loads(plain.content) == {"name": "ner", "source": source}
    assert json.loads(forced.content) == {"name": "ner", "source": source, "force": True}


def test_upload_of_known_content_is_not_created(call: Caller, peft_dir: Path) -> None:
    result = call([_ok(PASSPORT)], "upload", "ner", peft_dir)
    assert not result.created
    assert b'name="force"' not in call.requests[0].content


def test_upload_is_sent_whole_again_after_a_retry(
    call: Caller, peft_dir: Path, sleeps: list[float]
) -> None:
    answers = [_refusal(503), _ok(PASSPORT, 201)]
    call(answers, "upload", "ner", peft_dir, client=NO_JITTER)
    first, second = (request.content for request in call.requests)
    assert len(first) == len(second) > 200_000
    assert sleeps == [0.5]


def test_adapters_and_adapter(call: Caller) -> None:
    (listed,) = call([_ok({"adapters": [PASSPORT]})], "adapters")
    one = call([_ok(PASSPORT)], "adapter", "ner")
    assert listed == one
    assert (one.rank, one.num_bytes, one.tier) == (8, 4_913_432, "device")
    assert one.target_modules == ("down_proj", "q_proj")
    assert one.description == "Named entities\nof a [tweet]"
    assert one.notes == ("trained from a local path",)
    assert one.ignored_files == ("README.md",)
    assert (one.chat_template, one.end_tokens) == (True, ("<|im_end|>", 2))
    assert one.document["checks"] == ["shapes fit", "values finite"]
    assert [r.url.path for r in call.requests] == ["/adapters", "/adapters/ner"]


def test_adapters_tell_of_unreadable_ones(call: Caller) -> None:
    unreadable = {"name": "old", "version": VERSION, "reason": "Another release stored it."}
    listed = call([_ok({"adapters": [PASSPORT], "unreadable": [unreadable]})], "adapters")
    assert [adapter.name for adapter in listed] == ["ner"]
    (one,) = listed.unreadable
    assert (one.name, one.version, one.reason) == ("old", VERSION, unreadable["reason"])
    assert one.document == unreadable


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": 3}, "no 'name' that is a string"),
        ({"rank": True}, "no 'rank' that is an integer"),
        ({"rank": 8.5}, "no 'rank' that is an integer"),
        ({"notes": [1]}, "no 'notes' that is a list of strings"),
        ({"card": []}, "not a JSON object"),
        ({"end_tokens": [True]}, "no 'end_tokens' that is a list of strings and integers"),
        ({"chat_template": "x"}, "no 'chat_template' that is a boolean"),
        ({"residency": {}}, "no 'tier' that is a string"),
    ],
)
def test_passports_of_another_form(call: Caller, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidResponse, match=message):
        call([_ok(PASSPORT | fields)], "adapter", "ner")


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"tokens": 3}, "no 'tokens' that is a list"),
        ({"tokens": [{"id": 1, "text": "", "logprob": "x"}]}, "no 'logprob' that is a number"),
        ({"tokens": [{"id": 1, "text": ""}]}, "no 'special' that is a boolean"),
        ({"tokens": [], "top_tokens": [{}]}, "no 'top_tokens' that is a list of lists"),
        ({"tokens": [], "top_tokens": [[]]}, "'top_tokens' of other positions"),
    ],
)
def test_details_of_another_form(call: Caller, details: Any, message: str) -> None:
    with pytest.raises(InvalidResponse, match=message):
        call([_ok({"generated_text": "", "details": details})], "generate", "a")


def test_delete_quotes_the_name(call: Caller) -> None:
    assert call([httpx.Response(204)], "delete", "a/b c") is None
    (request,) = call.requests
    assert (request.method, request.url.raw_path) == ("DELETE", b"/adapters/a/b%20c")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/..", "a/", "/a"])
def test_names_that_are_paths_are_not_sent(call: Caller, name: str) -> None:
    with pytest.raises(InvalidArgument, match="is not the name of an adapter"):
        call([], "delete", name)
    assert call.requests == []


@pytest.mark.parametrize(
    ("method", "args", "kwargs"),
    [
        ("adapter", ["\udcff"], {}),
        ("save_composition", ["\udcff", "a"], {}),
        ("generate", ["a"], {"adapter": "\udcff"}),
        ("stream", ["a"], {"adapter": "\udcff"}),
        ("upload", ["\udcff", "PEFT"], {}),
        ("upload", ["ner", "\udcff.zip"], {}),
    ],
)
def test_names_that_are_not_utf_8_are_not_sent(
    call: Caller, peft_dir: Path, method: str, args: list[Any], kwargs: dict[str, Any]
) -> None:
    (peft_dir / "\udcff.zip").write_bytes(b"PK")
    places = {"PEFT": peft_dir, "\udcff.zip": peft_dir / "\udcff.zip"}
    with pytest.raises(InvalidArgument, match=r"'.udcff(\.zip)?' cannot be written as UTF-8"):
        call([], method, *(places.get(arg, arg) for arg in args), **kwargs)
    assert call.requests == []


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_a_client_that_is_closed(method: str) -> None:
    client = Client()
    client.close()
    with pytest.raises(TransportError, match="The client is closed"):
        list(getattr(client, method)("a"))


async def test_an_async_client_that_is_closed() -> None:
    client = AsyncClient()
    await client.close()
    with pytest.raises(TransportError, match="The client is closed"):
        await client.generate("a")
    with pytest.raises(TransportError, match="The client is closed"):
        await anext(client.stream("a"))


def test_ready_and_health(call: Caller) -> None:
    assert call([_ok({})], "ready") is True
    assert call([_refusal(503)], "ready") is False
    assert call([_ok({})], "health") is True
    with pytest.raises(NotFound):
        call([_refusal(404)], "ready")
    assert [r.url.path for r in call.requests] == ["/ready", "/ready", "/health", "/ready"]


@pytest.mark.parametrize(
    ("status", "name", "kind"),
    [
        (400, "invalid", BadRequest),
        (413, "too-large", BadRequest),
        (422, "invalid", BadRequest),
        (404, "not-found", NotFound),
        (404, "adapter-not-found", AdapterNotFound),
        (429, "queue-full", Busy),
        (503, "not-ready", Unavailable),
        (500, "internal", ServerFault),
        (502, "bad-gateway", ServerFault),
    ],
)
def test_refusals(call: Caller, status: int, name: str, kind: type[ApiError]) -> None:
    answer = _refusal(status, name, field="inputs", fix="Try another.", near=["ner"])
    with pytest.raises(ApiError, match="It cannot be done. Try another.") as caught:
        call([answer], "generate", "a", client={"retry": RetryPolicy(max_attempts=1)})
    assert type(caught.value) is kind
    assert caught.value.status == status
    assert caught.value.fix == "Try another."
    assert caught.value.problem.field == "inputs"
    assert caught.value.problem.type == f"/problems/{name}"
    assert caught.value.problem.near == ("ner",)


def test_adapter_not_found_knows_the_near_names(call: Caller) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        call([_refusal(404, "adapter-not-found", near=["ner", "net"])], "adapter", "nre")
    assert caught.value.near == ("ner", "net")


def test_refusal_in_another_servers_words(call: Caller) -> None:
    answer = httpx.Response(502, text="<h1>Bad gateway</h1>")
    with pytest.raises(ServerFault, match="answered 502 Bad Gateway: <h1>Bad gateway</h1>"):
        call([answer], "adapters")


def test_a_refusal_names_its_request(call: Caller) -> None:
    answer = httpx.Response(500, headers={"x-request-id": "5f"}, json=problem(500))
    for given, expected in ((answer, "5f"), (_refusal(404), None)):
        with pytest.raises(ApiError) as caught:
            call([given], "adapters")
        assert caught.value.request_id == expected


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda _: httpx.Response(200, text="<html>"), "not JSON"),
        (lambda _: httpx.Response(200, json=[1]), "not a JSON object"),
        (lambda _: httpx.Response(200, json={}), "no list 'adapters'"),
        (
            lambda _: httpx.Response(200, json={"adapters": [{"name": 3}]}),
            "no 'name' that is a string",
        ),
        (lambda _: httpx.Response(307, headers={"location": "/x"}), "answered with status 307"),
    ],
)
def test_answers_that_are_not_of_this_api(call: Caller, answer: Handler, message: str) -> None:
    with pytest.raises(InvalidResponse, match=message):
        call(answer, "adapters")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (httpx.ConnectTimeout("x"), Timeout, r"did not accept the connection in 5 s\."),
        (httpx.ReadTimeout("x"), Timeout, r"was silent for 300 s\."),
        (httpx.PoolTimeout("x"), Timeout, r"No connection of the client's own became free"),
        (httpx.ConnectError("refused"), TransportError, "Cannot connect to .*: refused. Is the"),
        (httpx.RemoteProtocolError(""), TransportError, "failed: RemoteProtocolError"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_no_answer(
    call: Caller, method: str, error: Exception, kind: type[TransportError], message: str
) -> None:
    with pytest.raises(TransportError, match=message) as caught:
        call([error], method, "a")
    assert type(caught.value) is kind


def test_retries_wait_as_the_server_says(call: Caller, sleeps: list[float]) -> None:
    busy = httpx.Response(429, headers={"retry-after": "3"})
    answers = [busy, httpx.Response(503), _ok(GENERATION)]
    result = call(answers, "generate", "a", client=NO_JITTER)
    assert result.text == TEXT
    assert sleeps == [3, 1.0]


def test_retries_end_with_the_last_refusal(call: Caller, sleeps: list[float]) -> None:
    busy = httpx.Response(429, headers={"retry-after": "7"}, json=problem(429))
    retry = RetryPolicy(max_attempts=3, max_jitter=0)
    with pytest.raises(Busy) as caught:
        call([busy, busy, busy], "generate", "a", client={"retry": retry})
    assert caught.value.retry_after == 7
    assert sleeps == [7, 7]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_tokens": 3}, "There is no generation parameter 'max_tokens'.*max_new_tokens"),
        ({"stop": "\n"}, "stop must be a list of strings"),
        ({"temperature": float("nan")}, "cannot be written as JSON"),
        ({"seed": object()}, "cannot be written as JSON"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_parameters_that_cannot_be_sent(
    call: Caller, method: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        call([], method, "a", **parameters)
    assert call.requests == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://a"}, "is not an http or https address"),
        ({"url": "http://"}, "is not an http or https address"),
        ({"url": "http://a:port"}, "is not valid"),
        ({"url": "http://a:65536"}, "ports are from 1 to 65535"),
        ({"url": "http://my..host"}, "is not valid: .*label empty or too long"),
        ({"url": f"http://{'a' * 64}.org"}, "is not valid: .*label (empty or )?too long"),
        ({"url": "http://a/\udcff"}, "is not valid"),
        ({"url": "http://a:8000/?x"}, "it has a query or a fragment"),
        ({"url": "http://a:8000?"}, "it has a query or a fragment"),
        ({"url": "http://a:8000/#x"}, "it has a query or a fragment"),
        (
            {"url": "https://u:p@a", "api_key": "x"},
            "api_key and the credentials in the URL would be sent as one",
        ),
        (
            {"url": "https://u:p@a", "headers": {"authorization": "x"}},
            "the header Authorization and the credentials in the URL would be sent as one",
        ),
        ({"connect_timeout": 0}, "connect_timeout must be above 0 seconds"),
        ({"read_timeout": float("nan")}, "read_timeout must be above 0 seconds"),
        ({"max_connections": 0}, "max_connections must be at least 1"),
        ({"api_key": "two words"}, "api_key must be of visible ASCII characters"),
        ({"api_key": ""}, "api_key must be of visible ASCII characters"),
        ({"headers": {"x": "é"}}, "headers must be ASCII: 'é' is not"),
        ({"api_key": "x", "headers": {"Authorization": "y"}}, "would be sent as one"),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_settings_without_sense(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        kind(**options)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://me:secret@a",
        "http://me:secret@a:port",
        "http://me:secret/secret@a",
        "me:secret@a",
        "http://me:secret@a?x",
    ],
)
def test_passwords_in_addresses_without_sense_are_not_shown(url: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Client(url)
    assert "secret" not in str(caught.value)
    assert "***@a" in str(caught.value)


def test_an_at_sign_in_the_path_of_an_address_hides_nothing(call: Caller) -> None:
    with pytest.raises(TransportError, match="to http://gateway:8000/team@x: "):
        call([httpx.ConnectError("x")], "adapters", client={"url": "http://gateway:8000/team@x"})


@pytest.mark.parametrize("kind", [httpx.ConnectTimeout, httpx.ReadTimeout, httpx.ConnectError])
def test_passwords_in_the_address_are_sent_and_not_shown(
    call: Caller, kind: type[httpx.RequestError]
) -> None:
    options = {"url": "https://me:secret@lora.example.org"}
    with pytest.raises(TransportError) as caught:
        call([kind("x")], "adapters", client=options)
    assert call.requests[0].headers["authorization"].startswith("Basic ")
    assert "https://***@lora.example.org" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("ALL_PROXY", "socks5://10.0.0.1:1080", r"pip install 'httpx\[socks\]'"),
        ("HTTPS_PROXY", "gopher://10.0.0.1", "gopher"),
        ("HTTPS_PROXY", "http://10.0.0.1:port", "Invalid port"),
        ("SSL_CERT_FILE", "/no/such/file.pem", "No such file"),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_environment_that_cannot_be_used(
    kind: Any, variable: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidArgument, match=f"proxies or certificates .*{reason}"):
        kind("https://lora.example.org")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "0.0.0.0", "[::1]", "localhost", "a.localhost"]
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_no_proxy_is_needed_for_this_machine(
    kind: Any, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://10.0.0.1:1080")
    kind(f"http://{host}:8000")


def test_a_key_is_sent_as_a_bearer_token(call: Caller) -> None:
    call([_ok({"adapters": []})], "adapters", client={"api_key": "secret"})
    (request,) = call.requests
    assert request.headers["authorization"] == "Bearer secret"
    assert "secret" not in repr(ClientConfig(api_key="secret"))


@pytest.mark.parametrize(("status", "name"), [(401, "unauthorized"), (403, "forbidden")])
def test_a_request_without_the_right_key(call: Caller, status: int, name: str) -> None:
    with pytest.raises(AccessDenied) as caught:
        call([_refusal(status, name)], "adapters")
    assert caught.value.status == status
    assert len(call.requests) == 1


def test_settings_reach_the_request(call: Caller) -> None:
    options = {
        "url": "https://host/lora",
        "connect_timeout": 1.5,
        "read_timeout": 9.0,
        "headers": {"authorization": "Bearer x"},
    }
    call([_ok({"adapters": []})], "adapters", client=options)
    (request,) = call.requests
    assert str(request.url) == "https://host/lora/adapters"
    assert request.headers["authorization"] == "Bearer x"
    assert request.headers["user-agent"].startswith("dynamic-lora-client/")
    timeout = request.extensions["timeout"]
    assert (timeout["connect"], timeout["read"], timeout["write"]) == (1.5, 9.0, 9.0)
    assert timeout["pool"] is None
