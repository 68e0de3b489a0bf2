"""Applies row terms: forward hooks on the modules that an adapter changes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from dynamic_lora_adapters.layers import DeltaSite
from dynamic_lora_adapters.rows import RowSegment


class RowHooks:
    """Hooks of one model. A module gets its hook when the first adapter needs it."""

    def __init__(self, model: PreTrainedModel, site: DeltaSite) -> None:
        self._model = model
        self._site = site
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
        """Run the module again for the rows of each adapter that replaces its parameters.

        `output` is a tensor, or a tuple of tensors with a row for each token
        (a router's).
        """
        if self._replaying:
            return output
        outputs = output if isinstance(output, tuple) else (output,)
        self._replaying = True
        try:
            for segment in self._site.segments:
                parameters = segment.terms.overrides.get(path)
                if parameters is None:
                    continue
                axis = _row_axis(outputs[0])
                num_rows = outputs[0].shape[axis]
                cut = [_cut(arg, segment.rows, axis, num_rows) for arg in args]
                named = {k: _cut(v, segment.rows, axis, num_rows) for k, v in kwargs.items()}
                again = functional_call(module, dict(parameters), tuple(cut), named)
                parts = again if isinstance(again, tuple) else (again,)
                for whole, part in zip(outputs, parts, strict=True):
                    place = whole[segment.rows] if axis == 0 else whole[:, segment.rows]
                    place.copy_(part)
        finally:
            self._replaying = False
        return output


def _row_axis(output: torch.Tensor) -> int:
    """Rows come first, or behind a batch axis of one packed row."""
    return 1 if output.dim() > 2 and output.shape[0] == 1 else 0


def _cut(value: Any, rows: slice, axis: int, num_rows: int) -> Any:
    """The rows of a tensor argument that has as many as the output; others as they are."""
    if not isinstance(value, torch.Tensor) or value.dim() <= axis:
        return value
    if value.shape[axis] != num_rows:
        # A router gets its rows behind a batch axis and answers without one.
        if axis == 0 and value.shape[0] == 1 and value.dim() > 1 and value.shape[1] == num_rows:
            return value[:, rows]
        return value
    return value[rows] if axis == 0 else value[:, rows]


def _place_prompt(segment: RowSegment, output: torch.Tensor) -> None:
    """Put the virtual tokens' embeddings into those rows of the segment that stand for them."""
    prompt = segment.terms.prompt
    if prompt is None or prompt.embeddings is None:
        return
    stop = min(prompt.num_tokens - segment.position, segment.rows.stop - segment.rows.start)
    if stop > 0:
        first = segment.rows.start
        output[first : first + stop] = prompt.embeddings[segment.position :][:stop]
