"""Where modules keep the rows of a batch, as a trial run shows.

Norms come before or behind a transpose, routers get a batch axis and answer without one: names
and sizes of a single call do not tell which axis the tokens are on.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dynamic_lora_adapters.geometry import RowAxes


@contextmanager
def watching_rows(model: PreTrainedModel) -> Iterator[Mapping[str, RowAxes]]:
    """Watch a forward pass of `model`; what it yields has the axes by path afterwards.

    A module is left out if it has no parameters of its own, was not called or was called
    in two ways, or if its rows cannot be told by their number: run one that no size of the
    model equals.
    """
    found: dict[str, RowAxes | None] = {}
    axes: dict[str, RowAxes] = {}
    num_rows = 0

    def count(_module: nn.Module, _args: tuple[Any, ...], embeddings: torch.Tensor) -> None:
        nonlocal num_rows
        num_rows = embeddings.shape[:-1].numel()

    def recorder(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def record(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            seen = _axes(args, kwargs, output, num_rows)
            found[path] = seen if found.get(path, seen) == seen else None

        return record

    handles = [model.get_input_embeddings().register_forward_hook(count)]
    for path, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(recorder(path), with_kwargs=True))
    try:
        yield axes
    finally:
        for handle in handles:
            handle.remove()
        axes.update({path: seen for path, seen in found.items() if seen is not None})


def as_outputs(output: Any) -> tuple[Any, ...]:
    """What a module returned, as a tuple."""
    return output if isinstance(output, tuple) else (output,)


def _axes(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, num_rows: int
) -> RowAxes | None:
    """The axes of one call; None if an output has none, or anything two that could be it."""
    values = [*as_outputs(output), *args, *kwargs.values()]
    found = [_candidates(value, num_rows) for value in values]
    num_outputs = len(as_outputs(output))
    if any(len(axes) > 1 for axes in found) or not all(found[:num_outputs]):
        return None
    axes = [one[0] if one else None for one in found]
    return RowAxes(
        outputs=tuple(one[0] for one in found[:num_outputs]),
        args=tuple(axes[num_outputs : num_outputs + len(args)]),
        kwargs=dict(zip(kwargs, axes[num_outputs + len(args) :], strict=True)),
    )


def _candidates(value: Any, num_rows: int) -> list[int]:
    """The axes of a tensor that are as long as the batch."""
    if not isinstance(value, torch.Tensor):
        return []
    return [axis for axis, size in enumerate(value.shape) if size == num_rows]
