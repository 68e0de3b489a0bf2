import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.simulation.traces import TRACES, Shape, read_trace, synthetic
from dynamic_lora_server.recorder import Arrival, TraceRecorder
from tests.support.traces import record

SHAPE = Shape(rate=2.0, num_requests=600)
LINE = {"arrival_s": 1.5, "adapter": "ner", "num_prompt_tokens": 9, "num_output_tokens": 4}


@pytest.mark.parametrize("kind", TRACES)
def test_synthetic_traces_are_whole_sorted_and_repeatable(kind: str) -> None:
    trace = synthetic(kind, SHAPE)
    assert len(trace) == 600
    assert trace == sorted(trace, key=lambda arrival: arrival.arrival_s)
    assert trace == synthetic(kind, SHAPE)
    assert trace != synthetic(kind, Shape(rate=2.0, num_requests=600, seed=1))
    mean = sum(arrival.num_output_tokens for arrival in trace) / len(trace)
    assert 58 < mean < 70
    assert 200 < trace[-1].arrival_s < 400


def shares(kind: str, part: slice = slice(None)) -> list[float]:
    """The shares of the adapters of a part of a trace, largest first."""
    trace = synthetic(kind, SHAPE)[part]
    counts = Counter(arrival.adapter for arrival in trace)
    return [number / len(trace) for _, number in counts.most_common()]


def test_popularities_are_what_they_are_called() -> None:
    assert shares("single") == [1.0]
    assert 0.85 < shares("one-hot")[0] < 0.95
    assert max(shares("uniform")) < 0.18
    assert 0.45 < shares("zipf-1.5")[0] < 0.6
    assert shares("zipf-0.8")[0] < shares("zipf-1.0")[0] < shares("zipf-2.0")[0]


def test_the_hot_spot_moves() -> None:
    assert max(shares("moving")) < 0.25
    assert shares("moving", slice(0, 100))[0] > 0.7


def test_bursts_are_dense_and_of_one_adapter() -> None:
    trace = synthetic("bursts", SHAPE)
    gaps = [
        later.arrival_s - earlier.arrival_s
        for earlier, later in zip(trace, trace[20:], strict=False)
    ]
    assert min(gaps) < 20 / SHAPE.rate / 5


def test_a_recorded_trace_is_read_back_sorted(tmp_path: Path) -> None:
    trace = [
        Arrival(arrival_s=0.5, adapter=None, num_prompt_tokens=3, num_output_tokens=1),
        Arrival(arrival_s=1.5, adapter="ner", num_prompt_tokens=9, num_output_tokens=4),
    ]
    record(tmp_path / "t.jsonl", reversed(trace))
    assert read_trace(tmp_path / "t.jsonl") == trace


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (json.dumps(LINE | {"extra": 1}), "expected an object with exactly adapter, arrival_s"),
        (json.dumps({"arrival_s": 1}), "expected an object with exactly"),
        ("[1]", "expected an object"),
        ("{", "line 2: Expecting"),
        (json.dumps(LINE | {"adapter": 3}), "adapter must be a string or null"),
        (json.dumps(LINE | {"num_prompt_tokens": 1.5}), "num_prompt_tokens must be a whole number"),
        (json.dumps(LINE | {"num_output_tokens": True}), "num_output_tokens must be a whole"),
        (json.dumps(LINE | {"num_output_tokens": 0}), "must be at least 1"),
        (json.dumps(LINE | {"arrival_s": -1}), "arrival_s must be finite and at least 0, got -1"),
        (json.dumps(LINE | {"arrival_s": "1"}), "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, text: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + line + "\n")
    with pytest.raises(ValueError) as raised:
        read_trace(path)
    assert "t.jsonl, line 2: " in str(raised.value)
    assert text in str(raised.value)


def test_an_empty_recording_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"t\.jsonl holds no request"):
        read_trace(tmp_path / "t.jsonl")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="trace 'zipf': expected one of single, one-hot"):
        synthetic("zipf", SHAPE)


@pytest.mark.parametrize("fields", [{"num_requests": 0}, {"rate": 0}, {"num_adapters": 0}])
def test_a_shape_without_requests_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a trace needs requests, adapters and a rate"):
        Shape(**{"rate": 1, **fields})


def test_a_shape_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="mean lengths"):
        Shape(rate=1, mean_prompt_tokens=0)


def test_a_recording_is_read_while_it_goes_on_and_where_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    arrival = Arrival(arrival_s=0.5, adapter="a", num_prompt_tokens=3, num_output_tokens=4)
    recorder = TraceRecorder(path)
    recorder.record(arrival)
    assert read_trace(path) == [arrival]
    recorder.record(arrival)
    recorder.close()
    path.write_text(path.read_text()[:-20])
    assert read_trace(path) == [arrival]
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="trace.jsonl, line 2"):
        read_trace(path)
