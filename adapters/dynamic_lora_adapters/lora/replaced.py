"""New values of base parameters, turned into terms by the kind of module they belong to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dynamic_lora_adapters.base_weights import BaseWeights
from dynamic_lora_adapters.errors import UnsupportedAdapter
from dynamic_lora_adapters.geometry import BaseGeometry

if TYPE_CHECKING:
    import torch

# Modules that compute each row by itself, by a part of their class names: norms, the
# routers of a mixture of experts, and the experts.
_ROWWISE = ("Norm", "Router", "Experts")


@dataclass(frozen=True, slots=True)
class Changes:
    """What new values come to, by module path.

    `dense` is `W_new - W` as [out, in] and `bias` the difference of biases, of
    linear layers; `rows` the token ids and row differences of the embedding;
    `overrides` the new values of other modules' parameters, by name.
    """

    dense: dict[str, "torch.Tensor"] = field(default_factory=dict)
    bias: dict[str, "torch.Tensor"] = field(default_factory=dict)
    rows: dict[str, "tuple[torch.Tensor, torch.Tensor]"] = field(default_factory=dict)
    overrides: dict[str, "dict[str, torch.Tensor]"] = field(default_factory=dict)

    def __contains__(self, path: object) -> bool:
        tables = (self.dense, self.bias, self.rows, self.overrides)
        return any(path in table for table in tables)


def find_changes(
    values: "Mapping[str, torch.Tensor]", geometry: BaseGeometry, base: BaseWeights
) -> Changes:
    """Compare new parameter values, by name, with the base's; equal ones are no change.

    Raises `UnsupportedAdapter` for a change of a module that takes none.
    """
    import torch

    changes = Changes()
    for name, value in values.items():
        difference = value - base.parameter(name)
        if not bool(difference.any()):
            continue
        path, _, leaf = name.rpartition(".")
        shape = geometry.linear(path)
        if shape is not None and leaf == "bias":
            changes.bias[path] = difference
        elif shape is not None:
            changes.dense[path] = (difference.T if shape.transposed else difference).contiguous()
        elif path in geometry.embeddings:
            token_ids = torch.nonzero(difference.any(dim=1)).flatten()
            changes.rows[path] = (token_ids, difference[token_ids])
        else:
            _check_rowwise(name, geometry)
            changes.overrides.setdefault(path, {})[leaf] = value
    return changes


def check_rows(path: str, geometry: BaseGeometry, *, field: str) -> None:
    """Raise `UnsupportedAdapter` for a module whose rows a trial run did not tell apart."""
    if path not in geometry.rows:
        raise UnsupportedAdapter(
            f"The adapter has new values for {path!r} ({geometry.modules.get(path)}), which was "
            "not seen to work on each token by itself; they are not served.",
            field=field,
            fix="Leave the module out of what the adapter trains.",
        )


def _check_rowwise(name: str, geometry: BaseGeometry) -> None:
    path = name.rpartition(".")[0]
    kind = geometry.modules.get(path, geometry.model_type)
    if not any(part in kind for part in _ROWWISE):
        raise UnsupportedAdapter(
            f"The adapter has a new value for {name!r} ({kind}), which is not served: "
            "those of linear layers, the token embedding, norms, routers and experts are.",
            field=name,
            fix="Leave the module out of modules_to_save, target_parameters and bias.",
        )
    check_rows(path, geometry, field=name)
