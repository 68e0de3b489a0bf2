"""What a request says of single tokens, as OpenAI's and vLLM's clients say it."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from tests.support.http_server import listening, tiny_app, tiny_config
from tests.support.models import EOS_ID, VOCAB_SIZE

ALWAYS = 100


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with listening(tiny_app(tiny_config(tmp_path_factory.mktemp("tokens")))) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def generate(address: str, **parameters: Any) -> httpx.Response:
    body = {"inputs": "the rain", "parameters": {"details": True} | parameters}
    return httpx.post(f"{address}/generate", json=body, timeout=60)


def test_a_token_is_all_that_comes_where_nothing_else_has_a_chance(client: OpenAI) -> None:
    ids = httpx.post(f"{client.base_url}../tokenize", json={"prompt": "#"}).json()["tokens"]
    token_id = ids[-1]
    answer = client.completions.create(
        model="base", prompt="the", max_tokens=4, logit_bias={str(token_id): ALWAYS}, seed=1
    )
    assert answer.choices[0].text == "####"
    chat = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "the"}],
        max_tokens=3,
        temperature=0,
        logprobs=True,
        logit_bias={str(token_id): ALWAYS},
    )
    assert chat.choices[0].message.content == "###"
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content
    # The log-probabilities are the model's own.
    assert chat.choices[0].logprobs.content[0].logprob < -1


def test_no_answer_ends_before_its_least_length(client: OpenAI, address: str) -> None:
    soon: dict[str, Any] = {"logit_bias": {str(EOS_ID): ALWAYS}}
    for least in (0, 1, 7):
        answer = client.completions.create(
            model="base", prompt="the", max_tokens=20, extra_body=soon | {"min_tokens": least}
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == least + 1
        assert answer.choices[0].finish_reason == "stop"
        mine = generate(address, **soon, min_new_tokens=least).json()["details"]
        assert mine["generated_tokens"] == least + 1
        assert mine["finish_reason"] == "eos_token"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"logit_bias": {"x": 1}}, "pattern"),
        ({"logit_bias": {"1": 101}}, "less than or equal to 100"),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "outside 0 to"),
        ({"min_tokens": 17}, "at least 17 tokens, and at most 16"),
        ({"min_tokens": 3, "guided_regex": "a"}, "where a grammar ends, nothing may follow"),
    ],
)
def test_what_cannot_be_is_refused(client: OpenAI, field: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        client.completions.create(model="base", prompt="x", extra_body=field)
    assert client.completions.create(model="base", prompt="x", max_tokens=1).choices


def test_errors_of_generate_name_the_parameter(address: str) -> None:
    refused = generate(address, logit_bias={str(VOCAB_SIZE): 1.0})
    assert refused.status_code == 422
    assert refused.json()["field"] == "parameters.logit_bias"
    refused = generate(address, min_new_tokens=9, max_new_tokens=8)
    assert refused.json()["field"] == "parameters.min_new_tokens"
