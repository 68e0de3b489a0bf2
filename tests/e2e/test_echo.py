"""Prompts given back with their log-probabilities, as evaluations ask for them."""

from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from dynamic_lora_server.routes import completions
from tests.support.http_server import listening, tiny_app, tiny_config

PROMPT = "the king of the hill"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with (
        listening(tiny_app(tiny_config(tmp_path_factory.mktemp("echo")))) as address,
        OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def complete(client: OpenAI, prompt: Any = PROMPT, **fields: Any) -> Any:
    asked = {"max_tokens": 4, "temperature": 0, "echo": True}
    return client.completions.create(model="base", prompt=prompt, **asked | fields)


def test_the_prompt_comes_before_the_answer(client: OpenAI) -> None:
    alone = complete(client, echo=False).choices[0].text
    answer = complete(client, n=2)
    assert [choice.text for choice in answer.choices] == [PROMPT + alone] * 2
    assert answer.usage.completion_tokens == 8
    assert [one.text for one in complete(client, ["a", "b"], max_tokens=0).choices] == ["a", "b"]


def test_log_probabilities_of_the_whole_text(client: OpenAI) -> None:
    choice = complete(client, logprobs=2).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    assert all(value < 0 for value in found.token_logprobs[1:])
    for at, token in zip(found.text_offset, found.tokens, strict=True):
        assert choice.text[at:].startswith(token)
    # What was greedily chosen after a text is what its own log-probabilities say when it is sent.
    again = complete(client, choice.text, logprobs=2, max_tokens=0).choices[0]
    assert again.text == choice.text
    assert again.finish_reason == "length"
    if again.logprobs.tokens == found.tokens:
        assert again.logprobs.token_logprobs[1:] == pytest.approx(
            found.token_logprobs[1:], abs=1e-4
        )


def test_token_ids(client: OpenAI) -> None:
    choice = complete(client, [[5, 6, 7]], logprobs=0, max_tokens=0).choices[0]
    assert len(choice.logprobs.tokens) == 3
    assert "".join(choice.logprobs.tokens) == choice.text


@pytest.mark.parametrize("most", [0, 3])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_stream_adds_up_to_the_whole(client: OpenAI, most: int, logprobs: int | None) -> None:
    asked = {"max_tokens": most, "logprobs": logprobs, "n": 2}
    whole = complete(client, **asked)
    text = ["", ""]
    tokens: list[list[str]] = [[], []]
    offsets: list[list[int]] = [[], []]
    ends: dict[int, str] = {}
    options = {"include_usage": True}
    for chunk in complete(client, stream=True, stream_options=options, **asked):
        for choice in chunk.choices:
            text[choice.index] += choice.text
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens
                offsets[choice.index] += choice.logprobs.text_offset
            if choice.finish_reason is not None:
                ends[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert text == [choice.text for choice in whole.choices]
    assert ends == {0: "length", 1: "length"}
    assert usage.completion_tokens == whole.usage.completion_tokens == 2 * most
    if logprobs is not None:
        assert tokens == [choice.logprobs.tokens for choice in whole.choices]
        assert offsets == [choice.logprobs.text_offset for choice in whole.choices]


def test_what_is_asked_of_all_prompts_together_has_an_end(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "MAX_PROMPT_LOGPROBS", 2 * 3 * 2 * 3)
    asked: dict[str, Any] = {"n": 2, "logprobs": 2, "stream": True}
    assert list(complete(client, [[5, 6, 7], [5, 6, 7]], **asked))
    refused = "echo and logprobs ask for 42 log-probabilities .* gives 36 back at a time"
    with pytest.raises(BadRequestError, match=refused) as caught:
        complete(client, [[5, 6, 7], [5, 6, 7, 8]], **asked)
    assert caught.value.param == "logprobs"
    assert complete(client, [[5, 6, 7, 8]] * 8, logprobs=None, n=2)


def test_no_tokens_at_all_are_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="nothing else is asked for"):
        complete(client, echo=False, max_tokens=0)
