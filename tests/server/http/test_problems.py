"""Errors as answers: the table is complete and both forms are right."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.testclient import TestClient

from dynamic_lora_adapters import errors as adapter_errors
from dynamic_lora_server import errors
from dynamic_lora_server.app import create_app
from dynamic_lora_server.base import base_model
from dynamic_lora_server.config import ServerConfig
from dynamic_lora_server.http import fault_kinds, problems
from dynamic_lora_server.http.disconnect import ClientDisconnected
from dynamic_lora_server.intake import sources
from dynamic_lora_server.schemas.generate import GenerateRequest


def _tree(root: type[Exception]) -> set[type[Exception]]:
    return {root}.union(*(_tree(child) for child in root.__subclasses__()))


def test_every_error_of_both_packages_has_a_row_or_inherits_one() -> None:
    assert base_model and sources  # define errors outside errors.py
    own = {e for e in _tree(errors.ServerError) if e.__module__ == "dynamic_lora_server.errors"}
    adapters = _tree(adapter_errors.AdapterError)
    assert own | adapters | {sources.SourceUnavailable} <= set(fault_kinds.TABLE)


def test_slugs_are_unique_but_for_the_two_disconnects() -> None:
    kinds = [kind for error, kind in fault_kinds.TABLE.items() if error is not ClientDisconnected]
    assert len({kind.slug for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(
    ("error", "status", "code", "headers"),
    [
        (errors.QueueFull("full", retry_after=3), 429, "rate_limit_exceeded", {"Retry-After": "3"}),
        (errors.NotReady("loading"), 503, "not_ready", {"Retry-After": "5"}),
        (errors.ContextOverflow("long"), 422, "context_length_exceeded", {}),
        (errors.EngineFailed("broke"), 500, "engine_failed", {}),
        (adapter_errors.AdapterNotFound("nre", ["ner"]), 404, "model_not_found", {}),
        (adapter_errors.AdapterTooLarge("big"), 413, "adapter_too_large", {}),
        (sources.SourceUnavailable("away"), 502, "source_unavailable", {}),
    ],
)
def test_faults(error: Exception, status: int, code: str, headers: dict[str, str]) -> None:
    fault = problems.fault_of(error)
    assert fault.kind.status == status
    assert fault.headers == headers
    assert problems.openai_error(fault)["error"]["code"] == code


def test_a_problem_document_has_no_empty_members() -> None:
    fault = problems.fault_of(adapter_errors.AdapterNotFound("nre", ["ner"]))
    assert problems.problem(fault) == {
        "type": "/problems/adapter-not-found",
        "title": "Adapter not found",
        "status": 404,
        "detail": "No adapter is named 'nre'. Did you mean 'ner'?",
        "field": "adapter",
        "fix": "List the names with GET /adapters, or upload it with POST /adapters.",
        "error": "No adapter is named 'nre'. Did you mean 'ner'? "
        "List the names with GET /adapters, or upload it with POST /adapters.",
        "near": ["ner"],
    }
    assert "near" not in problems.problem(problems.fault_of(errors.NotReady("loading")))


@pytest.mark.parametrize(
    ("error", "error_type"),
    [
        (errors.InvalidParameter("bad"), "validation"),
        (errors.ContextOverflow("long"), "validation"),
        (errors.QueueFull("full", retry_after=3), "overloaded"),
        (errors.EngineFailed("broke"), "generation"),
        (errors.NotReady("loading"), "generation"),
        (adapter_errors.AdapterNotFound("nre", []), None),
        (errors.Unauthorized("no key", given=False), None),
    ],
)
def test_tgis_clients_find_their_exception(error: Exception, error_type: str | None) -> None:
    assert problems.problem(problems.fault_of(error)).get("error_type") == error_type


def test_openai_errors_use_openais_names() -> None:
    fault = problems.fault_of(errors.ContextOverflow("long", field="max_new_tokens", fix="Less."))
    answer = problems.answer(fault, path="/v1/completions")
    assert answer.status_code == 400
    assert json.loads(bytes(answer.body))["error"] == {
        "message": "long Less.",
        "type": "invalid_request_error",
        "param": "max_tokens",
        "code": "context_length_exceeded",
    }


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/completions", "prompt"),
        ("/v1/chat/completions", "messages"),
        ("/v1/responses", "input"),
    ],
)
def test_a_prompt_that_is_too_long_is_named_as_it_was_sent(path: str, param: str) -> None:
    fault = problems.fault_of(errors.ContextOverflow("long", field="inputs"))
    answer = problems.answer(fault, path=path)
    assert json.loads(bytes(answer.body))["error"]["param"] == param


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("max_new_tokens", "max_output_tokens"),
        ("min_new_tokens", "min_tokens"),
        ("messages", "input"),
        ("adapter", "model"),
        ("tools.12.function.parameters", "tools.12.parameters"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("input.3.call_id", "input.3.call_id"),
    ],
)
def test_what_responses_call_the_fields_of_a_chat(field: str, param: str) -> None:
    answer = problems.answer(
        problems.fault_of(errors.InvalidParameter("bad", field=field)), path="/v1/responses"
    )
    assert json.loads(bytes(answer.body))["error"]["param"] == param


def test_a_field_that_a_body_has_is_named_as_it_is_there() -> None:
    """Also where it is one that it should not have."""
    faults = [{"type": "extra_forbidden", "loc": ("body", "messages"), "msg": "Extra"}]
    for path in ("/v1/responses", "/v1/completions"):
        answer = problems.answer(problems.fault_of(RequestValidationError(faults)), path=path)
        assert json.loads(bytes(answer.body))["error"]["param"] == "messages"
    faults = [{"type": "extra_forbidden", "loc": ("body", "n"), "msg": "Extra"}]
    answer = problems.answer(problems.fault_of(RequestValidationError(faults)), path="/generate")
    assert json.loads(bytes(answer.body))["field"] == "n"


def test_an_unforeseen_error_tells_nothing_of_itself() -> None:
    fault = problems.fault_of(KeyError("secret"))
    assert fault.kind.status == 500
    assert "secret" not in json.dumps(problems.problem(fault))


def test_errors_that_quote_whole_files_are_cut_off() -> None:
    name = "x" * 10**6
    fault = problems.fault_of(adapter_errors.InvalidAdapter(f"{name} is bad", field=name, fix=name))
    assert len(fault.detail) == len(fault.field or "") == len(fault.fix or "") == 2000
    assert fault.detail.endswith("x...")


def test_a_body_of_many_faults_is_told_in_part() -> None:
    faults = [
        {"type": "missing", "loc": ("body", f"field-{i}"), "msg": "Field required"}
        for i in range(25)
    ]
    detail = problems.fault_of(RequestValidationError(faults)).detail
    assert "field-19: Field required; and 5 more." in detail
    assert "field-20" not in detail


def test_a_field_whose_name_is_a_whole_body_is_cut_off() -> None:
    body = {"inputs": "x", "y" * 10**6: 0}
    with pytest.raises(RequestValidationError) as caught:
        problems.parse_body(GenerateRequest, json.dumps(body).encode())
    fault = problems.fault_of(caught.value)
    assert fault.field == "y" * 1997 + "..."
    assert len(fault.detail) == 2000


def test_a_lone_surrogate_in_an_error_can_be_answered() -> None:
    fault = problems.fault_of(errors.InvalidParameter("bad '\ud800'"))
    assert json.loads(bytes(problems.answer(fault, path="/generate").body))["detail"]


def _app() -> FastAPI:
    app = FastAPI()
    problems.install(app)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("secret")

    return app


@pytest.mark.parametrize(
    ("method", "path", "status", "slug"),
    [
        ("GET", "/nowhere", 404, "not-found"),
        ("POST", "/broken", 405, "method-not-allowed"),
        ("GET", "/broken", 500, "internal-error"),
    ],
)
def test_the_frameworks_errors_are_problems_too(
    method: str, path: str, status: int, slug: str
) -> None:
    client = TestClient(_app(), raise_server_exceptions=False)
    response = client.request(method, path)
    document: dict[str, Any] = response.json()
    assert response.status_code == document["status"] == status
    assert response.headers["content-type"] == problems.PROBLEM_MEDIA_TYPE
    assert document["type"] == f"/problems/{slug}"
    assert "secret" not in response.text


def test_a_path_tells_all_methods_that_it_takes(tmp_path: Path) -> None:
    client = TestClient(create_app(ServerConfig(home=tmp_path)))
    for path, methods in (
        ("/adapters", "GET, HEAD, POST"),
        ("/adapters/x", "DELETE, GET, HEAD"),
        ("/compositions/x", "DELETE, GET, HEAD, PUT"),
        ("/generate", "POST"),
    ):
        answer = client.request("PATCH", path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)


def test_every_problem_is_documented() -> None:
    documentation = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
    kinds = [*fault_kinds.TABLE.values(), *fault_kinds.FRAMEWORK_KINDS]
    missing = {kind.slug for kind in kinds if f"`/problems/{kind.slug}`" not in documentation}
    assert missing == set()
