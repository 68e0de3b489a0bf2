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

    sees_the_next = False
    sees_beyond_windows = False
    writes_all = True

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
        tables = self.tables
        rows: list[torch.Tensor] = []
        for number, length in enumerate(tables.cumulative.diff().tolist()):
            for new in range(length):
                hidden = 0 if self.sees_the_next else length - new - 1
                one = replace(
                    tables,
                    cumulative=tables.cumulative[:2],
                    used=tables.used[number : number + 1] - hidden,
                    block_table=tables.block_table[number : number + 1],
                )
                own = q[len(rows) : len(rows) + 1]
                seen = None if self.sees_beyond_windows else window
                row = GatheredPages(one)(own, keys, values, scaling, seen)
                rows.append(row if self.writes_all or number == 0 else 0 * row)
        return torch.cat(rows)


class FirstSequenceAlone(RightKernel):
    """pytorch#194167."""

    writes_all = False


class SeesBeyondWindows(RightKernel):
    sees_beyond_windows = True


class SeesTheNext(RightKernel):
    sees_the_next = True


def test_a_right_kernel_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "PagedKernel", RightKernel)
    assert paged._runs.__wrapped__(CPU)


@pytest.mark.parametrize("wrong", [FirstSequenceAlone, SeesBeyondWindows, SeesTheNext])
def test_a_wrong_kernel_is_told_of(
    wrong: type[RightKernel], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(paged, "PagedKernel", wrong)
    assert not paged._runs.__wrapped__(CPU)
    assert "does not run here: RuntimeError: what it attends to is wrong for" in caplog.text


def test_there_is_none_on_a_cpu_nor_for_larger_heads() -> None:
    assert not paged_kernel_available(CPU)
    assert not paged_kernel_available(torch.device("cuda"), paged.LARGEST_HEAD + 1)
