"""`GET /v1/models`: the base model, adapters and compositions as OpenAI lists models."""

from typing import TYPE_CHECKING

from fastapi import APIRouter

from dynamic_lora_adapters.compositions.saved import CompositionNotFound
from dynamic_lora_adapters.home.index import StoredComposition
from dynamic_lora_adapters.home.passport import Passport
from dynamic_lora_server.requests.selection import adapter_name
from dynamic_lora_server.routes._deps import NoQuery, Ready, State, openai_errors
from dynamic_lora_server.schemas.openai_answers import Model, ModelList
from dynamic_lora_server.state import ServerState

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime

router = APIRouter(prefix="/v1", tags=["openai"], dependencies=[NoQuery])


@router.get("/models", responses=openai_errors(400, 503), summary="List what can be named as model")
async def list_models(runtime: Ready, state: State) -> ModelList:
    """The base model first, under each of its names, then the adapters by name, then the saved
    compositions."""
    adapters = [_adapter(runtime, passport) for passport in runtime.registry.list()]
    saved = [_composition(runtime, stored) for stored in runtime.saved.list()]
    names = runtime.config.served_model_names or (runtime.model_id,)
    return ModelList(data=[*(_base(runtime, state, name) for name in names), *adapters, *saved])


@router.get(
    "/models/{model:path}", responses=openai_errors(400, 404, 503), summary="One model or adapter"
)
async def get_model(model: str, runtime: Ready, state: State) -> Model:
    """A model id may hold a slash."""
    name = adapter_name(model, base_names=runtime.base_names)
    if name is None:
        served = model in runtime.config.served_model_names
        return _base(runtime, state, model if served else runtime.name_of_base(runtime.model_id))
    try:
        return _composition(runtime, runtime.saved.get(name))
    except CompositionNotFound:
        return _adapter(runtime, runtime.registry.resolve(name).passport)


def _base(runtime: "Runtime", state: ServerState, name: str) -> Model:
    return Model(
        id=name,
        created=int(state.started_at),
        root=runtime.model_id,
        parent=None,
        max_model_len=runtime.context_length,
    )


def _adapter(runtime: "Runtime", passport: Passport) -> Model:
    return Model(
        id=passport.name,
        created=int(passport.created_at.timestamp()),
        root=passport.version,
        parent=runtime.name_of_base(runtime.model_id),
        max_model_len=runtime.context_length,
    )


def _composition(runtime: "Runtime", stored: StoredComposition) -> Model:
    return Model(
        id=stored.name,
        created=int(stored.created_at.timestamp()),
        root=stored.text,
        parent=runtime.name_of_base(runtime.model_id),
        max_model_len=runtime.context_length,
    )
