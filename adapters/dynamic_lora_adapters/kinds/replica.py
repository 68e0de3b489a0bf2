"""PEFT's own layers around the adapted modules, without the base model.

PEFT decides which tensors a kind has, of which shapes, and what they mean. To
ask it, the adapted linear layers alone are set up in a tree of modules of the
same names; their weights are placeholders without memory.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamic_lora_adapters.errors import InvalidAdapter
from dynamic_lora_adapters.geometry import LinearShape
from dynamic_lora_adapters.kinds.spec import KindSpec
from dynamic_lora_adapters.kinds.tensors import read_tensors

if TYPE_CHECKING:
    import torch

# With which PEFT turns down a config that does not suit a layer.
_REFUSALS = (
    ArithmeticError,
    AssertionError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

ADAPTER = "default"
"""The name under which a replica holds its adapter."""


def build_replica(
    folder: Path, spec: KindSpec, shapes: Mapping[str, LinearShape]
) -> "dict[str, Any]":
    """PEFT's layers for the modules of `shapes`, with the adapter's tensors in them.

    Maps each module's path to the tuner's layer. Raises `InvalidAdapter` naming a tensor
    that is missing, one too many, misshapen or not finite, or saying why PEFT
    cannot build this adapter on these modules.
    """
    from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict

    with calling_peft(spec):
        model = _wrap(spec, shapes)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        integers = frozenset(n for n, tensor in expected.items() if not tensor.is_floating_point())
    tensors = read_tensors(folder, wanted, integers)
    with calling_peft(spec):
        set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    model.train(False)
    return {path: model.base_model.model.get_submodule(path) for path in shapes}


def config_warnings(spec: KindSpec, config: Mapping[str, Any]) -> list[str]:
    """What PEFT warns of where it loads this `adapter_config.json`.

    Raises `InvalidAdapter` for a config that it does not load.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    given = {key: value for key, value in config.items() if value is not None}
    with calling_peft(spec), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(spec.peft_type)]
        config_class.check_kwargs(**given)
    return [f"PEFT warns: {warning.message}" for warning in caught]


@contextlib.contextmanager
def calling_peft(spec: KindSpec) -> Iterator[None]:
    """For code that calls PEFT: no warnings, no gradients, and its refusals as `InvalidAdapter`.

    The environment is as before afterwards.
    """
    # PEFT warns of what does not concern an adapter that is only read, starts its
    # parameters at random, and says no with whichever exception is at hand.
    import torch

    try:
        with (
            _compilers_kept(),
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            yield
    except _REFUSALS as error:
        raise InvalidAdapter(
            f"PEFT cannot build this {spec.name} adapter on the base model: {error}",
            field="adapter_config.json",
            fix="Upload an adapter that was trained on the served base model.",
        ) from None


@contextlib.contextmanager
def _compilers_kept() -> Iterator[None]:
    """Undoes what PEFT's BOFT leaves behind where it finds no CUDA: CC and CXX are "gcc" then."""
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wrap(spec: KindSpec, shapes: Mapping[str, LinearShape]) -> Any:
    """PEFT's model, whose parameters take no memory yet: a config may ask for any sizes."""
    from peft import PeftModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(spec.peft_type)]
    config = config_class(target_modules=list(shapes), inference_mode=True, **_values(spec, shapes))
    return PeftModel(_skeleton(shapes), config, ADAPTER, low_cpu_mem_usage=True)


def _values(spec: KindSpec, paths: Iterable[str]) -> dict[str, Any]:
    values = dict(spec.values)
    if spec.peft_type == "IA3":
        # As targets, they are spelt out: PEFT wants the one list to be a part of the other.
        chosen = values["feedforward_modules"]
        values["feedforward_modules"] = [path for path in paths if _is_feedforward(chosen, path)]
    return values


def _is_feedforward(chosen: str | list[str], path: str) -> bool:
    if isinstance(chosen, str):
        return re.fullmatch(chosen, path) is not None
    return path.endswith(tuple(chosen))


def _skeleton(shapes: Mapping[str, LinearShape]) -> "torch.nn.Module":
    from torch import nn

    root = nn.Module()
    for path, shape in shapes.items():
        *parents, leaf = path.split(".")
        module = root
        for name in parents:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.add_module(leaf, _placeholder(shape))
    return root


def _placeholder(shape: LinearShape) -> "torch.nn.Linear":
    import torch

    linear = torch.nn.Linear(shape.in_features, shape.out_features, bias=False, device="meta")
    # One zero seen from every place: a weight of full shape that takes no memory.
    weight = torch.zeros(()).expand(shape.out_features, shape.in_features)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear
