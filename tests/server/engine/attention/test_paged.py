"""What torch's attention to pages is asked for, and how it is tried out; no GPU is needed."""

from dataclasses import replace

import pytest
import torch

from dynamic_lora_server.engine.attention import paged
from dynamic_lora_server.engine.attention.paged import PagedTables, paged_kernel_available
from dynamic_lora_server.engine.graphs.static_attention import GatheredPages

CPU = torch.device("cpu")


@pytest.mark.parametrize("takes_splits", [True, False])
def test_keys_are_cut_only_where_that_is_right(takes_splits: bool) -> None:
    whole = {"num_splits": 1} if takes_splits else {}
    shares = paged._shares
    assert shares(1, True, None, takes_splits) == {"window_size": (-1, -1)}
    assert shares(1, False, None, takes_splits) == {"window_size": (-1, 0)} | whole
    assert shares(1, True, 100, takes_splits) == {"window_size": (99, 0)} | whole
    assert shares(5, True, None, takes_splits) == {"window_size": (-1, 0)} | whole


class RightKernel:
    """Attends to pages as torch's is to: token by token, with those of plain operations."""

    def __init__(self, tables: PagedTables) -> None:
        self.tables = tables

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        tables, out = self.tables, torch.empty_like(q)
        row = 0
        for number, length in enumerate(tables.cumulative.diff().tolist()):
            for new in range(length):
                one = replace(
                    tables,
                    cumulative=tables.cumulative[:2],
                    used=tables.used[number : number + 1] - length + new + 1,
                    block_table=tables.block_table[number : number + 1],
                )
                found = GatheredPages(one)(q[row : row + 1], keys, values, scaling, window)
                out[row] = found[0]
                row += 1
        return out


class FirstSequenceAlone(RightKernel):
    """Leaves the rows of all other sequences as they were (pytorch#194167)."""

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        out = super().__call__(q, keys, values, scaling, window)
        out[int(self.tables.cumulative[1]) :] = 0
        return out


class SeesAll(RightKernel):
    """Takes no notice of windows."""

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        del window
        return super().__call__(q, keys, values, scaling, None)


class SeesTheNext(RightKernel):
    """Has a token see the one that comes with it, too."""

    def __init__(self, tables: PagedTables) -> None:
        ahead = tables.cumulative.diff() - 1
        super().__init__(replace(tables, used=tables.used + ahead))


def test_a_right_kernel_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "PagedKernel", RightKernel)
    assert paged._runs.__wrapped__(CPU)


@pytest.mark.parametrize("wrong", [FirstSequenceAlone, SeesAll, SeesTheNext])
def test_a_wrong_kernel_is_told_of(
    wrong: type[RightKernel], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(paged, "PagedKernel", wrong)
    assert not paged._runs.__wrapped__(CPU)
    assert "does not run here: RuntimeError: what it attends to is wrong for" in caplog.text


def test_there_is_none_on_a_cpu_nor_for_larger_heads() -> None:
    assert not paged_kernel_available(CPU)
    assert not paged_kernel_available(torch.device("cuda"), paged.LARGEST_HEAD + 1)
