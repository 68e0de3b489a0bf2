"""Which modules of the base an adapter targets, exactly as PEFT decides it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from dynamic_lora_adapters.errors import IncompatibleAdapter, InvalidAdapter, UnsupportedAdapter
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.lora.patterns import prove_fast
from dynamic_lora_adapters.lora.spec import ALL_LINEAR, LoraSpec

if TYPE_CHECKING:
    from peft import LoraConfig

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """One module that takes a delta, with its own rank and scaling."""

    path: str
    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class ParameterTarget:
    """One parameter that takes a delta (PEFT's `target_parameters`).

    `wrapper` is the path under which PEFT saves its factors: it nests a wrapper
    for each adapted parameter of a module.
    """

    name: str
    wrapper: str
    rank: int
    scaling: float


def find_targets(spec: LoraSpec, geometry: BaseGeometry) -> list[Target]:
    """The modules of the base that `spec` adapts, in the model's order.

    They are linear layers, the output head and the token embedding.

    The matching is PEFT's own code. Raises `IncompatibleAdapter` if nothing
    matches, `UnsupportedAdapter` if a matched module can take no delta,
    `InvalidAdapter` for a pattern that takes unreasonably long to match.
    """
    prove_fast(spec.patterns(), _matched_names(spec, geometry))
    try:
        targets = _matches(spec, geometry)
    except re.error as error:
        # Sound by itself, but not inside the expressions that PEFT builds from it.
        raise InvalidAdapter(
            f"PEFT cannot use a regular expression of this config: {error}.",
            field=", ".join(sorted({key for key, _ in spec.patterns()})),
        ) from None
    if not targets and not find_parameters(spec, geometry):
        raise IncompatibleAdapter(
            f"target_modules {_shown(spec)} matches no module of {geometry.model_id!r}.",
            field="target_modules",
            fix=f"The layers that can be adapted are: {', '.join(_leaf_names(geometry))}.",
        )
    for target in targets:
        if geometry.linear(target.path) is None and target.path not in geometry.embeddings:
            raise UnsupportedAdapter(
                f"target_modules matches {target.path!r} ({geometry.modules[target.path]}), "
                "which cannot take a delta.",
                field="target_modules",
                fix=f"The layers that can be adapted are: {', '.join(_leaf_names(geometry))}.",
            )
    return targets


def find_parameters(spec: LoraSpec, geometry: BaseGeometry) -> list[ParameterTarget]:
    """The parameters that `spec` adapts by name, matched as PEFT does: whole, or after a dot."""
    scales = _Scales(spec)
    by_module: dict[str, list[str]] = {}
    for name in geometry.parameters:
        if _ends_with(name, spec.target_parameters):
            by_module.setdefault(name.rpartition(".")[0], []).append(name)
    found = []
    for module, names in by_module.items():
        for number, name in enumerate(names):
            target = scales.target(name)
            # The first is wrapped first, and by all that come after it.
            wrapper = module + ".base_layer" * (len(names) - 1 - number)
            found.append(ParameterTarget(name, wrapper, target.rank, target.scaling))
    return found


def saved_modules(spec: LoraSpec, geometry: BaseGeometry) -> list[str]:
    """The modules whose own copies `modules_to_save` brings, in the model's order.

    PEFT matches the end of the path, even within a name.
    """
    saved = _modules_to_save(spec, geometry)
    return [path for path in geometry.modules if path.endswith(saved)]


def ties_targets(spec: LoraSpec, geometry: BaseGeometry) -> bool:
    """Whether PEFT gives embedding and head one LoRA because `target_modules` names either.

    It looks at what is listed, or matches its pattern against the bare names (its
    `_check_tied_modules`). Raises as `find_targets` does.
    """
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    if not _may_tie(spec, geometry) or _names_embedding(spec.modules_to_save):
        return False
    if not isinstance(spec.target_modules, str):
        return _names_embedding(spec.target_modules)
    prove_fast(spec.patterns(), EMBEDDING_LAYER_NAMES)
    return any(re.fullmatch(spec.target_modules, name) for name in EMBEDDING_LAYER_NAMES)


def unmatched_names(spec: LoraSpec, geometry: BaseGeometry) -> list[tuple[str, str]]:
    """Entries of lists in the config that name nothing of the base, as (key, name).

    PEFT lets them pass.
    """
    listed = () if isinstance(spec.target_modules, str) else spec.target_modules
    found = [("target_modules", name) for name in listed if not _is_end(name, geometry.modules)]
    found += [
        ("target_parameters", name)
        for name in spec.target_parameters
        if not _is_end(name, geometry.parameters)
    ]
    return found + [
        ("modules_to_save", name)
        for name in spec.modules_to_save
        if not any(path.endswith(name) for path in geometry.modules)
    ]


def _is_end(name: str, paths: Iterable[str]) -> bool:
    return any(_ends_with(path, [name]) for path in paths)


def import_peft() -> None:
    """Import what matching modules takes: half a second that no request need wait for."""
    import peft.tuners.tuners_utils  # noqa: F401


def _ends_with(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _modules_to_save(spec: LoraSpec, geometry: BaseGeometry) -> tuple[str, ...]:
    """`modules_to_save`, and of a tied pair both where PEFT saves one copy for both."""
    if _may_tie(spec, geometry) and _names_embedding(spec.modules_to_save):
        return (*spec.modules_to_save, *geometry.embeddings, *geometry.heads)
    return spec.modules_to_save


def _may_tie(spec: LoraSpec, geometry: BaseGeometry) -> bool:
    return spec.ensure_weight_tying and geometry.tied


def _names_embedding(names: Iterable[str]) -> bool:
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    return any(name.rsplit(".", 1)[-1] in EMBEDDING_LAYER_NAMES for name in names)


class _Scales:
    """Rank and scaling of each target: the first pattern that matches the end of its path.

    As PEFT's `get_pattern_key` says, whose expressions are compiled anew for each path when
    there are more than Python remembers. Raises `re.error`.
    """

    def __init__(self, spec: LoraSpec) -> None:
        self._spec = spec
        self._ranks = [(_end_of_path(key), rank) for key, rank in spec.rank_pattern]
        self._alphas = [(_end_of_path(key), alpha) for key, alpha in spec.alpha_pattern]

    def target(self, path: str) -> Target:
        rank = _first_match(self._ranks, path, self._spec.rank)
        alpha = _first_match(self._alphas, path, self._spec.alpha)
        return Target(path, rank, self._spec.scaling(rank, alpha))


def _end_of_path(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _first_match(patterns: list[tuple[re.Pattern[str], T]], path: str, default: T) -> T:
    return next((value for pattern, value in patterns if pattern.match(path)), default)


def _matches(spec: LoraSpec, geometry: BaseGeometry) -> list[Target]:
    from peft.tuners.tuners_utils import check_target_module_exists

    config = _peft_config(spec, geometry)
    paths = [path for path in geometry.modules if check_target_module_exists(config, path)]
    if ties_targets(spec, geometry):
        tied = {*paths, *geometry.embeddings, *geometry.heads}
        paths = [path for path in geometry.modules if path in tied]
    scales = _Scales(spec)
    return [scales.target(path) for path in paths]


def _peft_config(spec: LoraSpec, geometry: BaseGeometry) -> "LoraConfig":
    from peft import LoraConfig

    target_modules: list[str] | str
    if not isinstance(spec.target_modules, str):
        target_modules = list(spec.target_modules)
    elif spec.target_modules.lower() == ALL_LINEAR:
        # PEFT expands the word to every linear layer but the output head.
        target_modules = [*geometry.linears]
    else:
        target_modules = spec.target_modules
    exclude, layers = spec.exclude_modules, spec.layers_to_transform
    if isinstance(target_modules, str):
        layers = None  # there is none but an empty one, at which PEFT stops
    return LoraConfig(
        target_modules=target_modules,
        exclude_modules=list(exclude) if isinstance(exclude, tuple) else exclude,
        layers_to_transform=None if layers is None else list(layers),
        layers_pattern=list(spec.layers_pattern) or None,
        modules_to_save=list(_modules_to_save(spec, geometry)) or None,
    )


def _matched_names(spec: LoraSpec, geometry: BaseGeometry) -> list[str]:
    """All that the patterns of a config are matched with here."""
    return [*geometry.modules, *(geometry.parameters if spec.target_parameters else ())]


def _leaf_names(geometry: BaseGeometry) -> list[str]:
    return sorted({path.rsplit(".", 1)[-1] for path in geometry.linears})


def _shown(spec: LoraSpec) -> str:
    targets = spec.target_modules
    return repr(targets if isinstance(targets, str) else list(targets))[:200]
