"""Steps of fixed shape give the tokens that other steps give."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from dynamic_lora_server.engine.graphs.decode_graphs import DecodeGraphs, graph_sizes
from dynamic_lora_server.engine.graphs.static_step import StaticStep
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.engine.startup.static_decoding import graphs_obstacle
from dynamic_lora_server.modes import Mode
from tests.support.adapters import make_adapter
from tests.support.engines import (
    admit,
    expected_tokens,
    make_engine,
    make_sequence,
    random_prompt,
    run_all,
)
from tests.support.models import TINY_MODELS, tiny_llama
from tests.support.triton import interpreted

FEW = 4  # tokens; Triton's interpreter is slow


@pytest.fixture(scope="module")
def static() -> Iterator[BuiltEngine]:
    with interpreted():
        yield make_engine(tiny_llama(), paged=True, decode_graphs=True, mode=Mode.BYPASS)


def graphs_of(built: BuiltEngine) -> DecodeGraphs:
    graphs = built.engine.runner.graphs
    assert graphs is not None
    return graphs


def declined(built: BuiltEngine, reason: str) -> int:
    return graphs_of(built).stats().num_declined.get(reason, 0)


def base_rows(*lengths: int) -> list[Sequence]:
    return [make_sequence(random_prompt(length, seed=length)) for length in lengths]


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20])],
)
def test_sizes_end_with_the_largest_batch(most: int, sizes: list[int]) -> None:
    assert graph_sizes(most) == sizes


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen3"])
def test_base_rows_get_the_tokens_of_other_steps(family: str) -> None:
    fixed = make_engine(TINY_MODELS[family](), paged=True, decode_graphs=True)
    plain = make_engine(TINY_MODELS[family](), paged=True)
    assert plain.engine.runner.graphs is None
    # Five rows take the size of eight: three of padding. One prompt spans two pages.
    lengths = (3, 12, 40, 41, 300)
    assert run_all(fixed, base_rows(*lengths)) == run_all(plain, base_rows(*lengths))
    assert graphs_of(fixed).stats().num_replayed >= 9


def test_mixed_adapters_get_the_tokens_of_peft(
    static: BuiltEngine, oracle: PeftModel, folders: dict[str, Path]
) -> None:
    before = graphs_of(static).stats().num_replayed
    tasks = ["attention", "all", None, "large", "down", "all"]
    prompts = [random_prompt(3 + 5 * i, seed=i) for i in range(len(tasks))]
    sequences = [
        make_sequence(
            prompt,
            adapter=None if task is None else admit(static, folders[task]),
            max_new_tokens=FEW,
        )
        for task, prompt in zip(tasks, prompts, strict=True)
    ]
    tokens = run_all(static, sequences)
    for task, prompt, actual in zip(tasks, prompts, tokens, strict=True):
        assert actual == expected_tokens(oracle, task, prompt)[:FEW], task
    assert graphs_of(static).stats().num_replayed > before


def test_slabs_that_come_and_go_are_followed(
    static: BuiltEngine, oracle: PeftModel, folders: dict[str, Path]
) -> None:
    prompt = random_prompt(9, seed=4)
    for task in ("all", "down", "all"):
        adapter = admit(static, folders[task])
        (tokens,) = run_all(static, [make_sequence(prompt, adapter=adapter, max_new_tokens=FEW)])
        static.pool.drop(adapter.digest)
        static.pool.release(adapter)
        assert tokens == expected_tokens(oracle, task, prompt)[:FEW]


def test_prompts_run_as_other_steps_do(static: BuiltEngine) -> None:
    before = declined(static, "prompts")
    run_all(static, base_rows(10))
    assert declined(static, "prompts") == before + 1


def test_a_large_rank_runs_as_other_steps_do(static: BuiltEngine, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "wide", tiny_llama(), rank=65, targets=["o_proj"])
    adapter = admit(static, folder)
    run_all(static, [make_sequence(random_prompt(5, seed=0), adapter=adapter)])
    assert declined(static, "large rank") == 9


def test_rows_of_what_is_merged_need_no_deltas(oracle: PeftModel, folders: dict[str, Path]) -> None:
    built = make_engine(tiny_llama(), paged=True, decode_graphs=True, mode=Mode.MERGED)
    prompt = random_prompt(7, seed=5)
    adapter = admit(built, folders["all"])
    (tokens,) = run_all(built, [make_sequence(prompt, adapter=adapter)])
    assert tokens == expected_tokens(oracle, "all", prompt)
    assert graphs_of(built).stats().num_replayed == 9
    others = [adapter, adapter, None]
    tokens = run_all(built, [make_sequence(prompt, adapter=one) for one in others])[-1]
    assert tokens == expected_tokens(oracle, None, prompt)
    assert declined(built, "differences to what is merged") == 9


def test_soft_capped_logits_are_refused_by_name() -> None:
    built = make_engine(TINY_MODELS["gemma2"](), paged=True, decode_graphs=True)
    built.engine.add(make_sequence(random_prompt(5, seed=0), max_new_tokens=2))
    built.engine.step()
    (event,) = built.engine.step()
    assert "soft-capped logits and attention sinks have no static step" in str(event)


def test_what_stands_in_the_way_is_named() -> None:
    assert graphs_obstacle(torch.device("cpu"), torch.bfloat16) == "there is no CUDA device"
    cuda = torch.device("cuda")
    if not torch.cuda.is_available():
        expected = "neither torch's paged attention nor Triton attends to pages of torch.float32"
        assert graphs_obstacle(cuda, torch.float32) == f"{expected} here"


class FakeGraph:
    """Stands for a captured graph, in the order of their making."""

    made: list["FakeGraph"]

    def __init__(self) -> None:
        self.num_replays = 0
        self.made.append(self)

    def replay(self) -> None:
        self.num_replays += 1


class FakeCuda:
    """Stands for torch's streams and captures: which stream is current, and what waits do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = SimpleNamespace(wait_stream=lambda _: None)
        self.mode: int | str = 0
        self.capture_fails = False
        self.streams: list[SimpleNamespace] = []
        self.captured_on: list[SimpleNamespace] = []
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(FakeGraph, "made", [], raising=False)
        for name, value in {
            "Stream": lambda _: self.new_stream(),
            "current_stream": lambda _: self.current,
            "set_stream": self.set_stream,
            "stream": lambda _: nullcontext(),
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": self.set_mode,
            "CUDAGraph": FakeGraph,
            "graph": lambda _, pool, stream: self.graph(pool, stream),
            "graph_pool_handle": lambda: "pool",
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def new_stream(self) -> SimpleNamespace:
        self.streams.append(SimpleNamespace(wait_stream=lambda _: None))
        return self.streams[-1]

    def set_stream(self, stream: SimpleNamespace) -> None:
        self.current = stream

    def set_mode(self, mode: int | str) -> None:
        warnings.warn("a prototype", UserWarning, stacklevel=1)
        self.mode = mode

    @contextmanager
    def graph(self, pool: str, stream: SimpleNamespace) -> Iterator[None]:
        assert pool == "pool"
        self.captured_on.append(stream)
        before, self.current = self.current, stream
        yield
        if self.capture_fails:
            raise RuntimeError("the capture is broken")
        self.current = before


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_every_size_is_captured_and_then_replayed(fake_cuda: FakeCuda) -> None:
    built = make_engine(tiny_llama(), paged=True, decode_graphs=True, max_running=4)
    told: list[tuple[int, int]] = []
    graphs_of(built).capture(lambda done, total: told.append((done, total)))
    # For 4, 2 and 1 rows, without deltas: there is no Triton here.
    assert told == [(0, 3), (1, 3), (2, 3)]
    assert fake_cuda.mode == 0
    run_all(built, base_rows(3, 4, 5))
    assert [graph.num_replays for graph in FakeGraph.made] == [9, 0, 0]
    (side,) = fake_cuda.streams
    assert fake_cuda.captured_on == [side] * 3


def test_a_step_that_waits_for_the_device_is_not_captured(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = make_engine(tiny_llama(), paged=True, decode_graphs=True, max_running=4)

    def run(*_: object, **__: object) -> None:
        if fake_cuda.mode == "error":
            raise RuntimeError("it waits")

    monkeypatch.setattr(StaticStep, "run", run)
    with pytest.raises(RuntimeError, match="it waits"):
        graphs_of(built).capture(lambda *_: None)
    assert fake_cuda.mode == 0
    assert not FakeGraph.made


def test_a_broken_capture_leaves_the_stream_as_it_was(fake_cuda: FakeCuda) -> None:
    built = make_engine(tiny_llama(), paged=True, decode_graphs=True, max_running=4)
    before, fake_cuda.capture_fails = fake_cuda.current, True
    with pytest.raises(RuntimeError, match="the capture is broken"):
        graphs_of(built).capture(lambda *_: None)
    assert fake_cuda.current is before
