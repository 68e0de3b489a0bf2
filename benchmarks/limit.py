"""The machine's own limit: what its matrix products and its memory would allow, measured.

A token of a decoding sequence costs at least one product of every weight matrix with the rows
that decode together; a prompt costs the same products with its own rows. Attention, norms,
sampling, HTTP and the adapters come on top. With a single client the products are bound by
memory: a token cannot take less time than reading every weight once.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.limit_rate import Limit, pieces, tokens_per_s
from dynamic_lora_adapters.apply.inject import head_group, observe_groups
from dynamic_lora_adapters.apply.products import EXACT_KINDS, make_product, obstacle
from dynamic_lora_adapters.device.groups import ProjectionGroup
from dynamic_lora_adapters.geometry import BaseGeometry

Product = Callable[[torch.Tensor], torch.Tensor]

# Prompts are computed in pieces of so many rows at most, as the server does by default.
PREFILL_ROWS = 512
_READ_BYTES = 512 * 2**20


class MachineLimit:
    """Weights of the base's shapes, random, in every layout that the server may choose from.

    Layers that read the same input are one product, as in the server.
    """

    def __init__(self, base: Path, dtype: str) -> None:
        self.dtype = dtype
        kind = getattr(torch, dtype)
        self._layers, self._head = _groups(base)
        groups = [*self._layers, self._head]
        plain = [torch.randn(g.out_features, g.in_features).to(kind) for g in groups]
        self.weight_bytes = sum(weight.nbytes for weight in plain)
        self._inputs = {g.in_features for g in groups}
        kinds = [kind for kind in EXACT_KINDS if obstacle(kind, plain[0]) is None]
        self._layouts: list[list[Product]] = [
            [make_product(kind, weight, None) for weight in plain] for kind in kinds
        ]
        self._memory = torch.ones(_READ_BYTES // 4)
        self._kind = kind

    @torch.inference_mode()
    def measure(self, num_clients: int, num_prompt_tokens: int, num_output_tokens: int) -> Limit:
        """Time it now; takes a few seconds."""
        rate = self._bytes_per_s()
        step_s, bound = self.step_s(num_clients), "products"
        if num_clients == 1:
            step_s, bound = self.weight_bytes / rate, "memory"
        prefill_s = self._prefill_s(num_clients * num_prompt_tokens, num_clients)
        return Limit(
            num_clients=num_clients,
            step_s=step_s,
            prefill_s=prefill_s,
            gbytes_per_s=rate / 1e9,
            bound=bound,
            tokens_per_s=tokens_per_s(
                num_clients=num_clients,
                num_output_tokens=num_output_tokens,
                step_s=step_s,
                prefill_s=prefill_s,
            ),
        )

    @torch.inference_mode()
    def step_s(self, num_rows: int, num_passes: int = 5) -> float:
        """Every product of one step with `num_rows` rows, each in its faster layout."""
        times: list[list[float]] = [
            self._pass(layout, num_rows, num_passes) for layout in self._layouts
        ]
        least: float = sum(min(pair) for pair in zip(*times, strict=True))
        return least

    def _pass(self, layout: list[Product], num_rows: int, num_passes: int) -> list[float]:
        """Each product's median; all weights in turn, so that none stays in a cache."""
        rows = self._rows(num_rows)
        widths = [group.in_features for group in (*self._layers, self._head)]
        passes = [
            [_seconds(product, rows[width]) for product, width in zip(layout, widths, strict=True)]
            for _ in range(num_passes)
        ]
        return [statistics.median(times) for times in zip(*passes, strict=True)]

    def _prefill_s(self, num_tokens: int, num_clients: int) -> float:
        """All layers over all prompt tokens, in pieces, and the head over one row a client."""
        sizes = pieces(num_tokens, PREFILL_ROWS)
        layers = {size: self._layers_s(size) for size in set(sizes)}
        head = min(self._least(layout[-1], self._head, num_clients) for layout in self._layouts)
        return sum(layers[size] for size in sizes) + head

    def _layers_s(self, num_rows: int) -> float:
        # So many rows are bound by arithmetic: layers of one shape take the same time.
        shapes: dict[tuple[int, int], list[int]] = {}
        for index, group in enumerate(self._layers):
            shapes.setdefault((group.in_features, group.out_features), []).append(index)
        return sum(
            len(indices)
            * min(
                self._least(layout[indices[0]], self._layers[indices[0]], num_rows)
                for layout in self._layouts
            )
            for indices in shapes.values()
        )

    def _least(self, product: Product, group: ProjectionGroup, num_rows: int) -> float:
        rows = self._rows(num_rows)[group.in_features]
        return _median_seconds(product, rows)

    def _rows(self, num_rows: int) -> dict[int, torch.Tensor]:
        return {width: torch.randn(num_rows, width).to(self._kind) for width in self._inputs}

    def _bytes_per_s(self) -> float:
        """The best of several ways to read 512 MiB that no cache holds."""
        square = self._memory.view(-1, 4096)
        ones = torch.ones(4096)
        ways: tuple[Product, ...] = (torch.sum, torch.amax, lambda rows: torch.mv(rows, ones))
        best = min(_median_seconds(way, square) for way in ways)
        return self._memory.nbytes / best


def _seconds(product: Product, rows: torch.Tensor) -> float:
    begin = time.perf_counter()
    product(rows)
    return time.perf_counter() - begin


def _median_seconds(product: Product, rows: torch.Tensor, num_times: int = 5) -> float:
    return statistics.median(_seconds(product, rows) for _ in range(num_times))


def _groups(base: Path) -> tuple[list[ProjectionGroup], ProjectionGroup]:
    """The products of a step: layers joined where they share an input, and the output head."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    head = head_group(model)
    if head is None:
        raise TypeError(f"{type(model).__name__} has no linear output head")
    paths = BaseGeometry.of(model, model_id="").linears
    layers = [path for path in paths if path not in head.paths]
    ids = torch.arange(4)[None]
    return observe_groups(model, layers, lambda: model(input_ids=ids, use_cache=False)), head
