import pytest
import torch

from dynamic_lora_adapters.apply.costs import (
    LENGTH_GRID,
    NUM_ADAPTERS_GRID,
    KernelChooser,
    KernelCosts,
    measure_costs,
)
from dynamic_lora_adapters.device.groups import ProjectionGroup
from dynamic_lora_adapters.kernels import KERNELS, SlotFactors
from dynamic_lora_adapters.kernels.segment_loop import SegmentLoop
from dynamic_lora_adapters.segments import DeltaPlan, Run
from tests.support.slabs import make_slab


def costs(**cheap: tuple[int, int]) -> KernelCosts:
    """A table on which each named kernel is the fastest at its point."""
    points = [(n, m) for n in NUM_ADAPTERS_GRID for m in LENGTH_GRID]
    return KernelCosts(
        {name: {p: 1.0 if cheap.get(name) == p else 9.0 for p in points} for name in KERNELS}
    )


def run(*lengths: int) -> Run:
    return Run(make_slab(len(lengths), 8, 4, 4), 0, 0, list(lengths))


def test_the_cheapest_kernel_at_the_nearest_point_is_chosen() -> None:
    chooser = KernelChooser(costs(rank_concat=(4, 1), sorted_groups=(8, 4), segment_loop=(1, 32)))
    assert chooser.choose(run(1, 1, 1, 1)).name == "rank_concat"
    assert chooser.choose(run(*[4] * 8)).name == "sorted_groups"
    assert chooser.choose(run(30)).name == "segment_loop"


def test_padding_is_charged_for_the_longest_segment() -> None:
    # At a mean length of 8 the groups would win, but padded to 32 they lose.
    chooser = KernelChooser(costs(sorted_groups=(4, 8)))
    assert chooser.choose(run(8, 8, 8, 8)).name == "sorted_groups"
    assert chooser.choose(run(29, 1, 1, 1)).name != "sorted_groups"


def test_cost_grows_beyond_the_grid() -> None:
    table = costs()
    assert table.of("segment_loop", 64, 128) == pytest.approx(9.0 * 2)


def test_assign_names_a_kernel_for_every_run() -> None:
    plan = DeltaPlan((run(1), run(2, 2)))
    assert all(r.kernel is not None for r in KernelChooser(costs()).assign(plan).runs)


def test_measured_costs_survive_the_cache() -> None:
    groups = [ProjectionGroup(("q",), 16, (16,))]
    measured = measure_costs(groups, KERNELS, device=torch.device("cpu"), dtype=torch.float32)
    assert set(measured.seconds) == set(KERNELS)
    assert all(seconds[1, 1] > 0 for seconds in measured.seconds.values())
    assert KernelCosts.from_json(measured.to_json()).seconds == measured.seconds


def test_what_a_busy_machine_left_out_is_not_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure() -> KernelCosts:
        groups = [ProjectionGroup(("q",), 16, (16,))]
        return measure_costs(groups, KERNELS, device=torch.device("cpu"), dtype=torch.float32)

    monkeypatch.setattr("dynamic_lora_adapters.apply.costs.MAX_SECONDS", 1000.0)
    assert measure().whole
    monkeypatch.setattr("dynamic_lora_adapters.apply.costs.MAX_SECONDS", 0.0)
    assert not measure().whole


def test_short_and_long_tiles_are_compiled_before_the_time_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths: list[int] = []

    class Recording(SegmentLoop):
        def __call__(
            self, out: torch.Tensor, x: torch.Tensor, factors: SlotFactors, run: Run
        ) -> None:
            lengths.append(run.max_length)
            super().__call__(out, x, factors, run)

    monkeypatch.setattr("dynamic_lora_adapters.apply.costs.MAX_SECONDS", 0.0)
    groups = [ProjectionGroup(("q",), 16, (16,))]
    kernels = {"recording": Recording()}
    found = measure_costs(groups, kernels, device=torch.device("cpu"), dtype=torch.float32)
    assert lengths[:4] == [1, 1, LENGTH_GRID[-1], LENGTH_GRID[-1]]
    assert list(found.seconds["recording"]) == [(1, 1)]


def test_what_a_step_makes_once_is_not_timed_with_every_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each sample has cold factors, and index tensors that were made before."""
    slots: list[int] = []
    made: list[bool] = []

    class Recording(SegmentLoop):
        def __call__(
            self, out: torch.Tensor, x: torch.Tensor, factors: SlotFactors, run: Run
        ) -> None:
            slots.append(run.slot_start)
            made.append(run._owner is None)
            run.owner(x.device)
            super().__call__(out, x, factors, run)

    monkeypatch.setattr("dynamic_lora_adapters.apply.costs.MAX_SECONDS", 0.0)
    groups = [ProjectionGroup(("q",), 16, (16,)), ProjectionGroup(("v",), 16, (8,))]
    kernels = {"recording": Recording()}
    measure_costs(groups, kernels, device=torch.device("cpu"), dtype=torch.float32)
    # Of the point (1, 1): the run that is prepared, then five samples of both groups.
    timed = slots[-10:]
    assert made[-11:] == [True] + [False] * 10
    assert timed[0::2] == timed[1::2]
    assert len({slots[-11], *timed}) == 6


def test_a_cache_for_other_kernels_is_refused() -> None:
    """As on a device that runs more of them, or fewer."""
    text = costs().to_json()
    assert set(KernelCosts.from_json(text, names=set(KERNELS)).seconds) == set(KERNELS)
    with pytest.raises(ValueError, match="another version"):
        KernelCosts.from_json(text, names={*KERNELS, "triton_segments"})


@pytest.mark.parametrize("text", ["[]", '[["segment_loop", 1, 1, 0.5]]', "not json"])
def test_a_foreign_cache_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="another version|Expecting value"):
        KernelCosts.from_json(text)
