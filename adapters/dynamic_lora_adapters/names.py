"""Names: what an adapter may be called, and whether it names the same base model."""

import re
from collections.abc import Collection

from dynamic_lora_adapters.errors import IncompatibleAdapter, InvalidAdapterName

MAX_NAME = 140  # characters: the Hub's longest ids have 42 and 96 around the slash
NAME_RULE = (
    f"a name is 1 to {MAX_NAME} characters long, starts with a letter or a digit, and goes on "
    "with letters, digits, '.', '_' or '-'; a slash may stand between two such names, as in "
    "organisation/name"
)
RESERVED_NAMES = frozenset({"base"})
SUMS = "composition"  # what metrics count all sums of adapters under

_PART = "[A-Za-z0-9][A-Za-z0-9._-]*"
NAME = re.compile(f"{_PART}(?:/{_PART})?")  # of any length
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|.*\\", re.DOTALL)


def check_adapter_name(name: str, *, reserved: Collection[str] = ()) -> str:
    """Return `name` if an adapter may have it.

    Names that differ in the case of their letters are two, but one that is reserved is in any
    case. `reserved` adds to those that mean the base model. Raises
    `InvalidAdapterName`, stating the rule or what the name means.
    """
    if len(name) > MAX_NAME or not NAME.fullmatch(name):
        raise InvalidAdapterName(
            f"{name[:80]!r} cannot be an adapter's name: {NAME_RULE}.",
            field="name",
            fix="Choose another name, for example 'ner-v2'.",
        )
    if name.lower() in RESERVED_NAMES | {other.lower() for other in reserved}:
        raise InvalidAdapterName(
            f"The name {name!r} means the base model and cannot be given to an adapter.",
            field="name",
            fix="Choose another name.",
        )
    if name.lower() == SUMS:
        raise InvalidAdapterName(
            f"The name {name!r} is what metrics count sums of adapters under and cannot be given.",
            field="name",
            fix="Choose another name.",
        )
    return name


def model_leaf(model_id: str) -> str:
    """The last component of a model id or path, in lower case."""
    return re.split(r"[\\/]", model_id.rstrip("\\/"))[-1].lower()


def is_local_path(model_id: str) -> bool:
    """Whether the id reads as a folder rather than as `name` or `organisation/name`."""
    return bool(_WINDOWS_PATH.match(model_id)) or not _HUB_ID.fullmatch(model_id)


def check_base_model(declared: str | None, model_id: str, *, force: bool) -> list[str]:
    """Compare the base model an adapter declares with the one served.

    Returns notes for the passport: empty when both name the same model. Case
    and a missing organisation do not count. A declaration that is missing or a
    folder on another machine proves nothing either way and is only noted.
    Raises `IncompatibleAdapter` for another model unless `force`.
    """
    if not declared:
        return ["The adapter does not say which base model it was trained on; its shapes fit."]
    if is_local_path(declared):
        return [f"The adapter was trained on a local copy ({declared!r}); its shapes fit."]
    if _same_model(declared, model_id):
        return []
    if is_local_path(model_id):
        return [f"The base model is a local copy; the adapter names {declared!r}; its shapes fit."]
    if force:
        return [f"Forced: the adapter was trained on {declared!r}, not on {model_id!r}."]
    raise IncompatibleAdapter(
        f"The adapter was trained on {declared!r}; this server serves {model_id!r}.",
        field="base_model_name_or_path",
        fix="Upload an adapter of the served model, or pass force=true if both are the same model.",
    )


def _same_model(declared: str, model_id: str) -> bool:
    if model_leaf(declared) != model_leaf(model_id):
        return False
    if is_local_path(model_id):
        return True
    organisations = {i.split("/")[0].lower() for i in (declared, model_id) if "/" in i}
    return len(organisations) < 2
