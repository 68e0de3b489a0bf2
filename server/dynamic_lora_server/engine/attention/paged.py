"""Attention straight from KV pages with torch's variable-length kernel (CUDA)."""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from dynamic_lora_adapters.kernels import has_triton
from dynamic_lora_adapters.transfer import check_alive, to_device
from dynamic_lora_server.engine.batch import Span

logger = logging.getLogger(__name__)

# The flash kernel behind varlen_attn reads pages in blocks of this many cells.
PAGE_SIZE = 256
LARGEST_HEAD = 256  # that it takes


def paged_kernel_available(device: torch.device, head_dim: int = LARGEST_HEAD) -> bool:
    """Whether this torch can attend to pages through a block table on this device.

    `varlen_attn` takes `block_table` and `seqused_k` from torch 2.12 on, and not every GPU runs
    it. So it is tried once; where it fails or is wrong, pages are gathered instead.
    """
    if device.type != "cuda" or head_dim > LARGEST_HEAD:
        return False
    try:
        parameters = _parameters()
    except ImportError:
        return False
    return {"block_table", "seqused_k"} <= parameters and _runs(device)


@cache
def _parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


@cache
def triton_pages_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this project's attention to pages in Triton runs on a device: tried once, too."""
    if not has_triton(device):
        return False
    from dynamic_lora_server.engine.attention.paged_triton import TritonPages

    single = [trial for trial in _TRIALS if trial.lengths == (1, 1)]
    return _passes("Triton's", device, dtype, TritonPages, single)


@cache
def _runs(device: torch.device) -> bool:
    return _passes("torch's", device, torch.bfloat16, PagedKernel, _TRIALS)


@dataclass(frozen=True, slots=True)
class _Trial:
    """Two sequences, by the tokens that are new and those that are there."""

    kv_heads: int
    lengths: tuple[int, int]
    used: tuple[int, int]
    window: int | None = None


# One token each, whose keys may be cut into parts, for grouped heads and for others; and few keys,
# where one too many shows.
_TRIALS = (
    _Trial(2, (1, 1), (2 * PAGE_SIZE, PAGE_SIZE + 3)),
    _Trial(4, (1, 1), (2 * PAGE_SIZE, PAGE_SIZE + 3)),
    _Trial(2, (2, 1), (5, 3)),
    _Trial(2, (1, 1), (5, 3), window=2),
)
_TRIAL_PAGES = (3, 0), (1, 2)
_TRIAL_SCALING = 0.125
_Kernel = Callable[["PagedTables"], Callable[..., torch.Tensor]]


def _passes(
    whose: str,
    device: torch.device,
    dtype: torch.dtype,
    kernel: _Kernel,
    trials: Sequence[_Trial],
) -> bool:
    try:
        _try_out(device, dtype, kernel, trials)
    except Exception as error:  # whatever it is, another way to attend does
        check_alive(device)
        kind = type(error).__name__
        logger.warning("%s attention to pages does not run here: %s: %s", whose, kind, error)
        return False
    return True


def _try_out(
    device: torch.device, dtype: torch.dtype, kernel: _Kernel, trials: Sequence[_Trial]
) -> None:
    """Attend as `trials` say. Raises what that raises, and RuntimeError where it is wrong."""

    def whole(*values: object) -> torch.Tensor:
        return torch.tensor(values, device=device, dtype=torch.int32)

    def drawn(*shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))
        return drawn.to(device, dtype)

    for trial in trials:
        keys, values = drawn(8 * PAGE_SIZE, trial.kv_heads, 64).chunk(2)
        tables = PagedTables(
            cumulative=whole(0, trial.lengths[0], sum(trial.lengths)),
            used=whole(*trial.used),
            block_table=whole(*_TRIAL_PAGES),
            max_new=max(trial.lengths),
            max_total=2 * PAGE_SIZE,
            page_size=PAGE_SIZE,
        )
        q = drawn(sum(trial.lengths), 4, 64)
        out = kernel(tables)(q, keys, values, _TRIAL_SCALING, trial.window)
        if not torch.allclose(out.float(), _by_hand(q, keys, values, trial), atol=0.03):
            raise RuntimeError(f"what it attends to is wrong for {trial}")


def _by_hand(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, trial: _Trial
) -> torch.Tensor:
    """What a trial is to give, token by token in float32."""
    found: list[torch.Tensor] = []
    groups = q.shape[1] // trial.kv_heads
    for length, total, pages in zip(trial.lengths, trial.used, _TRIAL_PAGES, strict=True):
        cells = torch.cat([torch.arange(p * PAGE_SIZE, (p + 1) * PAGE_SIZE) for p in pages])
        for number in range(length):
            last = total - length + number + 1
            first = 0 if trial.window is None else max(last - trial.window, 0)
            seen = cells[first:last].to(q.device)
            k, v = (
                table[seen].float().repeat_interleave(groups, 1).transpose(0, 1)
                for table in (keys, values)
            )
            scores = torch.einsum("hd,hnd->hn", q[len(found)].float(), k) * _TRIAL_SCALING
            found.append(torch.einsum("hn,hnd->hd", scores.softmax(-1), v))
    return torch.stack(found)


@dataclass(frozen=True, slots=True)
class PagedTables:
    """Index tensors of one step, int32.

    Shapes: cumulative [num_sequences + 1], the packed rows of each sequence;
    used [num_sequences], its tokens in the cache; block_table [num_sequences,
    max_pages], its pages, padded with 0.
    """

    cumulative: torch.Tensor
    used: torch.Tensor
    block_table: torch.Tensor
    max_new: int
    max_total: int
    page_size: int

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device) -> "PagedTables":
        """Read the tables off the spans of a batch whose KV space is paged."""
        page_size = spans[0].chunk_size
        pages = [[start // page_size for start in span.starts] for span in spans]
        width = max(map(len, pages))
        cumulative = [0]
        for span in spans:
            cumulative.append(cumulative[-1] + span.num_new)

        def tensor(values: object) -> torch.Tensor:
            return to_device(values, device, torch.int32)

        return cls(
            cumulative=tensor(cumulative),
            used=tensor([span.num_total for span in spans]),
            block_table=tensor([row + [0] * (width - len(row)) for row in pages]),
            max_new=max(span.num_new for span in spans),
            max_total=max(span.num_total for span in spans),
            page_size=page_size,
        )


@dataclass(frozen=True, slots=True)
class PagedKernel:
    """Calls `torch.nn.attention.varlen.varlen_attn` on the pages of one step."""

    tables: PagedTables

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """q [num_tokens, heads, dim] over cells [num_cells, kv_heads, dim] -> like q."""
        from torch.nn.attention.varlen import varlen_attn

        tables = self.tables
        pages = (-1, tables.page_size)
        grouped = q.shape[1] != keys.shape[1]
        out = varlen_attn(
            q,
            keys.unflatten(0, pages),
            values.unflatten(0, pages),
            tables.cumulative,
            # FlashAttention 2 wants bounds of the keys too, and reads `seqused_k` in their place.
            tables.cumulative,
            tables.max_new,
            tables.max_total,
            scale=scaling,
            enable_gqa=grouped,
            seqused_k=tables.used,
            block_table=tables.block_table,
            **_shares(tables.max_new, grouped, window, "num_splits" in _parameters()),
        )
        assert isinstance(out, torch.Tensor)
        return out


def _shares(max_new: int, grouped: bool, window: int | None, takes_splits: bool) -> dict[str, Any]:
    """What a token sees, and into how many parts its keys may be cut.

    One token sees all that there is: said so, grouped heads go to FlashAttention 2 as more rows of
    fewer heads, and it may cut keys into parts. Elsewhere it may not: torch 2.13 writes the first
    sequence's rows alone then (pytorch#194167), and earlier ones do not cut.
    """
    if max_new == 1 and window is None and grouped:
        return {"window_size": (-1, -1)}
    seen = (-1 if window is None else window - 1, 0)
    return {"window_size": seen} | ({"num_splits": 1} if takes_splits else {})
