"""The bars: which ratios are taken, of which rounds, and whether they are reached."""

import pytest

from benchmarks.bar import BARS, Verdict, judge, weight_bits
from benchmarks.cells import Cell
from benchmarks.stats import Timing, summarise
from benchmarks.workload import Popularity, Workload


def _cell(
    peer: str,
    rate: float,
    *,
    popularity: str = "uniform",
    clients: int = 32,
    round_: int = 0,
    clock: float | None = None,
) -> Cell:
    timing = Timing(sent=0, first_token=0.5, last_token=1.0, num_output_tokens=10)
    return Cell(
        peer=peer,
        workload=Workload(
            num_clients=clients, popularity=Popularity.parse(popularity), num_requests=1
        ),
        summary=summarise([timing], wall_s=10 / rate),
        round=round_,
        clocks=None if clock is None else (clock, clock),
    )


def _one(verdicts: list[Verdict], against: str, its_adapters: str = "uniform") -> Verdict:
    [found] = [v for v in verdicts if (v.against, v.its_adapters) == (against, its_adapters)]
    return found


WEIGHTS = {"dynamic-lora": "float32", "vllm-cpu": "float32"}


@pytest.mark.parametrize(("rate", "reached"), [(600.0, True), (599.0, False)])
def test_a_ratio_is_held_against_its_bar(rate: float, *, reached: bool) -> None:
    cells = [_cell("dynamic-lora", rate), _cell("vllm-cpu", 100.0)]
    verdict = _one(judge(cells, WEIGHTS), "vllm-cpu")
    assert verdict.ratio == pytest.approx(rate / 100)
    assert (verdict.at_least, verdict.reached) == (6.0, reached)


def test_ratios_are_taken_within_rounds() -> None:
    cells = [
        _cell("dynamic-lora", 600.0, round_=0, clock=100.0),
        _cell("vllm-cpu", 100.0, round_=0, clock=50.0),
        _cell("vllm-cpu", 50.0, round_=1, clock=50.0),
        _cell("dynamic-lora", 200.0, round_=1, clock=50.0),
        _cell("dynamic-lora", 900.0, round_=2, clock=50.0),
    ]
    verdict = _one(judge(cells, WEIGHTS), "vllm-cpu")
    assert verdict.ratios == pytest.approx([6.0, 4.0])
    assert verdict.ratio == pytest.approx(5.0)
    # At one clock the first round's is 3, the second's 4.
    assert verdict.at_one_clock == pytest.approx(3.5)


@pytest.mark.parametrize(("rates", "reached"), [((600.0, 601.0), True), ((599.0, 900.0), False)])
def test_a_bar_is_reached_where_every_round_reaches_it(
    rates: tuple[float, float], reached: bool
) -> None:
    cells = [
        cell
        for number, rate in enumerate(rates)
        for cell in (
            _cell("dynamic-lora", rate, round_=number),
            _cell("vllm-cpu", 100.0, round_=number),
        )
    ]
    assert _one(judge(cells, WEIGHTS), "vllm-cpu").reached is reached


def test_a_missing_peer_is_named_and_not_judged() -> None:
    verdict = _one(judge([_cell("dynamic-lora", 1.0)], {"dynamic-lora": "float32"}), "peft-static")
    assert verdict.ratios == []
    assert verdict.reached is None


def test_mixed_is_held_against_the_own_base() -> None:
    cells = [
        _cell("dynamic-lora", 90.0),
        _cell("dynamic-lora", 100.0, popularity="base"),
        _cell("dynamic-lora", 99.0, popularity="one"),
    ]
    verdicts = judge(cells, WEIGHTS)
    own = {v.our_adapters: v for v in verdicts if v.against == "dynamic-lora"}
    assert own["uniform"].reached
    assert own["one"].ratio == pytest.approx(0.99)
    assert own["one"].at_least == 0.98


def test_a_single_client_is_compared_at_the_same_width() -> None:
    weights = {
        "dynamic-lora": "float32",
        "dynamic-lora-bf16": "bf16",
        "dynamic-lora-int8": "int8",
        "llama.cpp": "f16",
        "llama.cpp-q8_0": "q8_0",
        "llama.cpp-f32": "f32",
    }
    cells = [_cell(peer, 10.0, popularity="one", clients=1) for peer in weights]
    pairs = {(v.ours, v.against) for v in judge(cells, weights) if "llama" in v.against}
    assert pairs == {
        ("dynamic-lora", "llama.cpp-f32"),
        ("dynamic-lora-bf16", "llama.cpp"),
        ("dynamic-lora-int8", "llama.cpp-q8_0"),
    }


def test_every_variant_of_this_server_is_held_against_the_peers() -> None:
    weights = WEIGHTS | {"dynamic-lora-bf16": "bf16"}
    verdicts = judge([_cell(peer, 10.0) for peer in weights], weights)
    assert {v.ours for v in verdicts if v.against == "vllm-cpu"} == {
        "dynamic-lora",
        "dynamic-lora-bf16",
    }


def test_variants_of_a_peer_stand_once_each_where_they_ran() -> None:
    weights = {
        "dynamic-lora": "float32",
        "llama.cpp": "f16",
        "llama.cpp-q8_0": "q8_0",
        "llama.cpp-f32": "f32",
    }
    cells = [_cell(peer, 10.0) for peer in ("dynamic-lora", "llama.cpp", "llama.cpp-q8_0")]
    against = [v.against for v in judge(cells, weights) if v.against.startswith("llama")]
    assert against == ["llama.cpp", "llama.cpp-q8_0"]


def test_every_bar_has_a_goal_or_only_informs() -> None:
    assert all(bar.at_least is None or bar.at_least > 0 for bar in BARS)


@pytest.mark.parametrize(
    ("weights", "bits"),
    [("f32", 32), ("bfloat16", 16), ("q8_0", 8), ("w8a8", 8), ("auto", None), (None, None)],
)
def test_number_formats_have_widths(weights: str | None, bits: int | None) -> None:
    assert weight_bits(weights) == bits
