"""Applies row terms: forward hooks on the modules that an adapter changes."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from dynamic_lora_adapters.apply.layers import DeltaSite
from dynamic_lora_adapters.apply.row_axes import as_outputs
from dynamic_lora_adapters.geometry import RowAxes
from dynamic_lora_adapters.rows import RowSegment


class RowHooks:
    """Hooks of one model. A module gets its hook when the first adapter needs it.

    `axes` says where the modules that adapters replace keep their rows, by path.
    """

    def __init__(
        self, model: PreTrainedModel, site: DeltaSite, axes: Mapping[str, RowAxes]
    ) -> None:
        self._model = model
        self._site = site
        self._axes = axes
        self._hooked: set[str] = set()
        self._replaying = False
        embedding = model.get_input_embeddings()
        self._input_path = next(p for p, m in model.named_modules() if m is embedding)

    def prepare(self, segments: Iterable[RowSegment]) -> None:
        """Make sure that every module these segments change has its hook."""
        for segment in segments:
            for path in segment.terms.embeddings:
                self._hook(path, embedding=True)
            for path in segment.terms.overrides:
                self._hook(path, embedding=False)
            if segment.terms.prompt is not None:
                self._hook(self._input_path, embedding=True)

    def _hook(self, path: str, *, embedding: bool) -> None:
        if path in self._hooked:
            return
        self._hooked.add(path)

        def embed(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            self._change_embeddings(path, module, args[0].flatten(), output.flatten(0, -2))

        def override(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            return self._replay(path, module, args, kwargs, output)

        module = self._model.get_submodule(path)
        if embedding:
            module.register_forward_hook(embed)
        else:
            module.register_forward_hook(override, with_kwargs=True)

    def _change_embeddings(
        self, path: str, module: nn.Module, token_ids: torch.Tensor, output: torch.Tensor
    ) -> None:
        # Gemma multiplies its embeddings inside the module; a delta is multiplied alike.
        factor = getattr(module, "embed_scale", 1.0)
        if isinstance(factor, torch.Tensor):
            factor = factor.to(output.dtype)
        for segment in self._site.segments:
            rows, terms = segment.rows, segment.terms
            if path in terms.embeddings:
                delta = terms.embeddings[path](token_ids[rows])
                if delta is not None:
                    output[rows] += delta * factor
            if terms.prompt is not None and path == self._input_path:
                _place_prompt(segment, output)

    def _replay(
        self,
        path: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Run the module again for the rows of each adapter that replaces its parameters."""
        if self._replaying:
            return output
        axes = self._axes[path]
        self._replaying = True
        try:
            for segment in self._site.segments:
                parameters = segment.terms.overrides.get(path)
                if parameters is None:
                    continue
                rows = segment.rows
                cut = [_cut(a, axis, rows) for a, axis in zip(args, axes.args, strict=True)]
                named = {name: _cut(v, axes.kwargs[name], rows) for name, v in kwargs.items()}
                again = functional_call(module, dict(parameters), tuple(cut), named)
                places = zip(as_outputs(output), as_outputs(again), axes.outputs, strict=True)
                for whole, part, axis in places:
                    _cut(whole, axis, rows).copy_(part)
        finally:
            self._replaying = False
        return output


def _cut(value: Any, axis: int | None, rows: slice) -> Any:
    """A view of the rows of a tensor that has some; others as they are."""
    if axis is None:
        return value
    return value.narrow(axis, rows.start, rows.stop - rows.start)


def _place_prompt(segment: RowSegment, output: torch.Tensor) -> None:
    """Put the virtual tokens' embeddings into those rows of the segment that stand for them."""
    prompt = segment.terms.prompt
    if prompt is None or prompt.embeddings is None:
        return
    stop = min(prompt.num_tokens - segment.position, segment.rows.stop - segment.rows.start)
    if stop > 0:
        first = segment.rows.start
        output[first : first + stop] = prompt.embeddings[segment.position :][:stop]
