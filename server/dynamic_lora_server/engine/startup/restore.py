"""Where the checkpoint's weights are had from while an adapter is merged."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from dynamic_lora_adapters.apply.layers import GroupedProjection
from dynamic_lora_adapters.apply.pristine import CopiedWeights, Pristine, Restore, SubtractedWeights
from dynamic_lora_server.errors import InvalidParameter

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"


class StoredWeights:
    """Parameters in a folder of safetensors files, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        index = folder / _INDEX
        if index.is_file():
            places = json.loads(index.read_text())["weight_map"]
            self._files = {name: folder / file for name, file in places.items()}
        elif (folder / _WHOLE).is_file():
            with safe_open(folder / _WHOLE, framework="pt") as stream:
                self._files = dict.fromkeys(stream.keys(), folder / _WHOLE)
        else:
            self._files = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def parameter(self, name: str) -> torch.Tensor:
        """The stored value. Raises KeyError."""
        with safe_open(self._files[name], framework="pt") as stream:
            tensor: torch.Tensor = stream.get_tensor(name)
        return tensor


def pristine_weights(
    projections: Sequence[GroupedProjection], restore: Restore, checkpoint: Path | None
) -> Pristine:
    """The way back to the base that `restore` asks for.

    To subtract needs the `checkpoint` folder, from which weights that drifted
    are read again. Raises InvalidParameter if it lacks one of them.
    """
    if restore is Restore.COPY:
        return CopiedWeights()
    stored = None if checkpoint is None else StoredWeights(checkpoint)
    # The head is never changed in place, and may be stored under the embedding's name.
    layers = [projection for projection in projections if not projection.group.is_head]
    for name in (name for layer in layers for name in _names(layer)):
        if stored is None or name not in stored:
            raise InvalidParameter(
                f"restore = subtract refreshes weights from the model's folder, which has no "
                f"{name!r} in safetensors.",
                field="restore",
                fix="Leave the option out: the base is then restored from a copy.",
            )
    assert stored is not None, "a model has layers"

    def reload(index: int) -> torch.Tensor:
        projection = projections[index]
        parts = [stored.parameter(name) for name in _names(projection)]
        return torch.cat([part.T if projection.transposed else part for part in parts])

    return SubtractedWeights(projections, reload)


def _names(projection: GroupedProjection) -> list[str]:
    return [f"{path}.weight" for path in projection.group.paths]
