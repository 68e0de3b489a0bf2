"""In bypass, a request's logits are the same to the bit whatever requests share its steps."""

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamic_lora_adapters.apply.products import ProductKind, obstacle
from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.native import library
from dynamic_lora_adapters.native.product import rounds_inputs
from dynamic_lora_server.engine import sequence
from dynamic_lora_server.engine.engine import TokenEvent
from dynamic_lora_server.engine.model_runner import ModelRunner
from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.modes import Mode
from tests.support.adapters import make_adapter
from tests.support.engines import admit, make_engine, make_sequence, random_prompt, run_all
from tests.support.models import tiny_llama

REASON = obstacle(ProductKind.NATIVE, torch.ones(8, 8))
if REASON is None and library.has_matrix_unit():
    REASON = "with a matrix unit (AMX), factors in tiles are multiplied in another order"
if REASON is None and platform.machine() not in ("x86_64", "AMD64"):
    REASON = "on other processors the compiler chooses which sums are fused"
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
PAIRED = "factors are multiplied in pairs, in another order where there are few rows"

KINDS = [ProductKind.NATIVE, ProductKind.BF16, ProductKind.INT8, ProductKind.W8A8]
# The second: no projection's outputs fill whole panels, and inputs of eight bits are in groups.
SHAPES: dict[str, dict[str, Any]] = {
    "whole panels": {},
    "rests": {"hidden_size": 300, "intermediate_size": 520, "head_dim": 16},
}
RANKS = [8, 3, 5, 16]

Adapters = Sequence[ResidentAdapter]
# Those that are there before a request of the first adapter, and those that come after it.
NEIGHBOURS: dict[str, Callable[[Adapters], tuple[list[sequence.Sequence], ...]]] = {
    "the base": lambda _: ([], [prompted(7, None)]),
    "the same adapter": lambda adapters: ([], [prompted(7, adapters[0])]),
    "another adapter": lambda adapters: ([], [prompted(7, adapters[1])]),
    "all": lambda adapters: ([], [prompted(7, one) for one in [None, *adapters]]),
    "its prompt in pieces": lambda adapters: ([prompted(70, one) for one in adapters], []),
    "many rows of its adapter": lambda adapters: (
        [prompted(3, adapters[0]) for _ in range(13)],
        [],
    ),
}


def prompted(
    length: int, adapter: ResidentAdapter | None, seed: int = 9, **params: Any
) -> sequence.Sequence:
    prompt = random_prompt(length, seed=seed)
    return make_sequence(prompt, adapter=adapter, **{"max_new_tokens": 4} | params)


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SHAPES[request.param]


@pytest.fixture(scope="module", params=KINDS)
def built(
    request: pytest.FixtureRequest,
    shape: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[BuiltEngine, Adapters]:
    if request.param is ProductKind.BF16 and rounds_inputs():
        pytest.skip(PAIRED)
    built = make_engine(
        tiny_llama(**shape),
        mode=Mode.BYPASS,
        base_product=request.param,
        prefix_cache_memory=0,
    )
    assert built.engine.runner.decoder.num_layers, "transformers' layers are not what is tested"
    like, folder = tiny_llama(**shape), tmp_path_factory.mktemp("adapters")
    return built, [
        admit(built, make_adapter(folder / f"{i}", like, rank=rank, targets="all-linear", seed=i))
        for i, rank in enumerate(RANKS)
    ]


def logits_of(
    target: sequence.Sequence,
    others: tuple[list[sequence.Sequence], ...],
    built: BuiltEngine,
) -> torch.Tensor:
    """Those [tokens, vocab] from which the target's tokens are chosen."""
    found = []
    run = ModelRunner.run

    def recording(self: ModelRunner, *args: Any, **options: Any) -> Any:
        options.pop("greedy_only", None)  # there would be none
        pieces, logits = run(self, *args, **options)
        own = [i for i, piece in enumerate(pieces) if piece.sequence is target]
        found.append(logits[own].clone())
        return pieces, logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "run", recording)
        run_all(built, [*others[0], target, *others[1]])
    return torch.cat(found)


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
@pytest.mark.parametrize("length", [5, 30])  # fewer rows than a tile has, and more
def test_logits_do_not_depend_on_neighbours(
    built: tuple[BuiltEngine, Adapters], length: int, neighbours: str
) -> None:
    engine, adapters = built
    for adapter in (adapters[0], adapters[1], None):
        alone, beside = (
            logits_of(prompted(length, adapter, seed=1), others, engine)
            for others in (([], []), NEIGHBOURS[neighbours](adapters))
        )
        assert len(alone) == 4
        assert torch.equal(beside, alone)


def test_log_probabilities_beside_greedy_requests_do_not_either(
    built: tuple[BuiltEngine, Adapters],
) -> None:
    engine, adapters = built

    def told(*others: sequence.Sequence) -> list[float | None]:
        target = prompted(5, adapters[0], seed=1, logprobs=True)
        for one in (*others, target):
            engine.engine.add(one)
        events = []
        while engine.engine.has_work:
            events += engine.engine.step()
        return [
            event.sampled.logprob
            for event in events
            if isinstance(event, TokenEvent) and event.sequence_id == target.id
        ]

    alone = told()
    assert None not in alone and len(alone) == 4
    assert told(*(prompted(7, one) for one in [None, *adapters])) == alone


@pytest.mark.parametrize("kind", KINDS)
def test_nor_do_they_depend_on_what_is_kept_of_earlier_prompts(
    kind: ProductKind, tmp_path: Path
) -> None:
    if kind is ProductKind.BF16 and rounds_inputs():
        pytest.skip(PAIRED)
    folder = make_adapter(tmp_path / "a", tiny_llama(), rank=8, targets="all-linear")
    built = make_engine(tiny_llama(), mode=Mode.BYPASS, base_product=kind)
    adapter = admit(built, folder)
    first, again = (logits_of(prompted(50, adapter, seed=1), ([], []), built) for _ in range(2))
    assert built.engine.scheduler.prefix_stats().num_reused == 48
    assert torch.equal(again, first)
