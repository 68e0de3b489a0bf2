"""BOFT with one butterfly factor: an orthogonal rotation by blocks, and a scale.

PEFT's layer is not asked here: on a machine with CUDA it compiles an extension
when it is set up.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from dynamic_lora_adapters.errors import IncompatibleAdapter, InvalidAdapter, UnsupportedAdapter
from dynamic_lora_adapters.kinds.folded import PristineLinears, finite_delta
from dynamic_lora_adapters.kinds.spec import KindSpec
from dynamic_lora_adapters.kinds.tensors import read_tensors
from dynamic_lora_adapters.terms import LinearTerms

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."


def read_boft(
    folder: Path, spec: KindSpec, paths: list[str], linears: PristineLinears
) -> dict[str, LinearTerms]:
    """The terms of every layer of a BOFT adapter (Liu et al. 2023).

    Raises `UnsupportedAdapter` for more than one butterfly factor,
    `IncompatibleAdapter` where the blocks do not divide a layer's input.
    """
    if spec.values["boft_n_butterfly_factor"] != 1:
        raise UnsupportedAdapter(
            f"boft_n_butterfly_factor = {spec.values['boft_n_butterfly_factor']} is not served: "
            "PEFT computes it with a CUDA extension alone.",
            field="boft_n_butterfly_factor",
            fix="Train the adapter with boft_n_butterfly_factor=1.",
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        shape = linears.shape(path)
        size = _block_size(spec, path, shape.in_features)
        blocks = shape.in_features // size
        shapes[f"{_PREFIX}{path}.boft_R"] = (1, blocks, size, size)
        shapes[f"{_PREFIX}{path}.boft_s"] = (shape.out_features, 1)
    tensors = read_tensors(folder, shapes)
    return {
        path: _rotated(
            path,
            tensors[f"{_PREFIX}{path}.boft_R"][0],
            tensors[f"{_PREFIX}{path}.boft_s"],
            linears.weight(path),
        )
        for path in paths
    }


def _block_size(spec: KindSpec, path: str, in_features: int) -> int:
    size, blocks = spec.values["boft_block_size"], spec.values["boft_block_num"]
    if (size == 0) == (blocks == 0):
        raise InvalidAdapter(
            "Exactly one of boft_block_size and boft_block_num must be 0.",
            field="boft_block_size",
        )
    divisor = size or blocks
    if in_features % divisor:
        raise IncompatibleAdapter(
            f"The {in_features} inputs of {path!r} do not divide into blocks by {divisor}.",
            field="boft_block_size" if size else "boft_block_num",
            fix="Upload an adapter that was trained on the served base model.",
        )
    return int(size or in_features // blocks)


def _rotated(
    path: str, rotations: "torch.Tensor", scale: "torch.Tensor", weight: "torch.Tensor"
) -> LinearTerms:
    import torch

    # Cayley: (1 - Q)(1 + Q)^-1 is orthogonal for a skew-symmetric Q.
    skew = 0.5 * (rotations - rotations.transpose(1, 2))
    identity = torch.eye(skew.shape[-1]).expand_as(skew)
    blocks = torch.linalg.solve(identity + skew, identity - skew, left=False)
    # The block diagonal matrix R acts on the inputs: W' = s (R W^T)^T.
    columns = weight.T.reshape(blocks.shape[0], blocks.shape[1], -1)
    turned = torch.bmm(blocks, columns).reshape(weight.T.shape).T
    return LinearTerms(dense=finite_delta(path, turned * scale - weight))
