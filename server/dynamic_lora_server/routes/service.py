"""`/health`, `/ready`, `/info` and `/metrics`: the server about itself."""

from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from dynamic_lora_adapters.files.card import MAX_STOP_STRINGS
from dynamic_lora_server.generation import MAX_N
from dynamic_lora_server.routes._deps import NoQuery, Ready, State, problems
from dynamic_lora_server.schemas import service as wire
from dynamic_lora_server.version import own_version

router = APIRouter(tags=["service"])


@router.get("/health", summary="Whether the process answers")
async def health() -> wire.Health:
    """200 as long as the process lives, also while the model loads."""
    return wire.Health()


@router.get("/ready", responses=problems(503), summary="Whether the model is loaded")
async def ready(runtime: Ready) -> wire.Ready:
    """200 once generations are served, 503 before, while shutting down, and if the engine broke."""
    runtime.service.check_alive()
    return wire.Ready(model_id=runtime.model_id, num_adapters=len(runtime.registry.list()))


@router.get("/info", responses=problems(422, 503), dependencies=[NoQuery], summary="What is served")
async def info(runtime: Ready) -> wire.Info:
    """The model and the limits of a request, under TGI's names."""
    config = runtime.config
    return wire.Info(
        model_id=runtime.model_id,
        model_origin=runtime.model_origin,
        model_dtype=runtime.dtype,
        model_device_type=runtime.device,
        max_input_tokens=runtime.context_length - 1,
        max_total_tokens=runtime.context_length,
        max_concurrent_requests=config.max_running + config.max_waiting,
        max_best_of=MAX_N,
        max_stop_sequences=MAX_STOP_STRINGS,
        version=own_version(),
        num_adapters=len(runtime.registry.list()),
    )


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    summary="Metrics for Prometheus",
)
async def metrics(state: State) -> Response:
    """Requests, tokens and latencies; once the model is loaded, the engine's state too."""
    rendered = await run_in_threadpool(state.metrics.render)
    return Response(rendered, media_type=CONTENT_TYPE_LATEST)
