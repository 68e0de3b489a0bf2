"""How an adapter chats: the chat template and the end tokens that were saved beside it.

Trainers save the tokenizer and the generation config with an adapter. What of them shapes an
answer is the template that the adapter was trained on, and the tokens that end its turns.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from dynamic_lora_adapters.errors import InvalidAdapter
from dynamic_lora_adapters.files.json_file import MAX_JSON_BYTES, read_json_object
from dynamic_lora_adapters.files.template_process import PROCESSES, TemplateRefused, TemplateStopped

CHAT_FILE = "chat.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
# What an upload may hold; kept is `chat.json` alone, which has one spelling.
CHAT_SOURCES = frozenset({TEMPLATE_FILE, TOKENIZER_FILE, GENERATION_FILE})

# A tokenizer's config lists its added tokens, thousands of them with some models.
_MAX_TOKENIZER_BYTES = 16 << 20
_MAX_TEMPLATE_BYTES = 1 << 20
_TEMPLATE_TOKENS = ("bos_token", "eos_token")


class ChatFormat(BaseModel):
    """The template of an adapter's chats, and what ends its answers.

    `special_tokens` are what the template finds under these names. `end_tokens` and
    `end_ids` end an answer as far as the base's tokenizer knows them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: str | None = None
    special_tokens: dict[str, str] = {}
    end_tokens: tuple[str, ...] = ()
    end_ids: tuple[int, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """What an adapter's folder says, as uploaded or as kept; None where it says nothing.

        Raises `InvalidAdapter` naming the file and the key at fault.
        """
        kept = folder / CHAT_FILE
        if kept.exists():
            return cls._kept(kept)
        tokenizer = _read_optional(folder / TOKENIZER_FILE, _MAX_TOKENIZER_BYTES)
        generation = _read_optional(folder / GENERATION_FILE, MAX_JSON_BYTES)
        template = _read_template(folder / TEMPLATE_FILE) or _checked(_template_of(tokenizer))
        tokens = {name: _token(tokenizer, name) for name in _TEMPLATE_TOKENS}
        known = {name: token for name, token in tokens.items() if token is not None}
        end = known.get("eos_token")
        found = cls(
            template=template,
            special_tokens=known if template else {},
            end_tokens=() if end is None else (end,),
            end_ids=_end_ids(generation),
        )
        return None if found == cls() else found

    @classmethod
    def _kept(cls, path: Path) -> Self:
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:  # a newer release may say more, or it is damaged
            first = error.errors()[0]
            place = ".".join([path.name, *map(str, first["loc"])])
            raise InvalidAdapter(f"{place}: {first['msg']}.", field=path.name) from None

    def save(self, folder: Path) -> None:
        """Write it down, in the spelling that is kept."""
        (folder / CHAT_FILE).write_text(self.model_dump_json(), encoding="utf-8")

    def check(self) -> None:
        """Raise `InvalidAdapter` for a template that is none."""
        if self.template is None:
            return
        try:
            PROCESSES.render(self.template, [])
        except (TemplateRefused, TemplateStopped) as error:
            raise InvalidAdapter(
                f"The adapter's chat template cannot be compiled: {error}.",
                field="chat_template",
                fix=f"Mend it, or upload the adapter without {TEMPLATE_FILE} and {TOKENIZER_FILE}.",
            ) from None


def _read_optional(path: Path, max_bytes: int) -> dict[str, Any]:
    return read_json_object(path, max_bytes=max_bytes) if path.exists() else {}


def _read_template(path: Path) -> str | None:
    if not path.exists():
        return None
    with path.open("rb") as stream:
        data = stream.read(_MAX_TEMPLATE_BYTES + 1)
    _check_size(len(data), path.name)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidAdapter(f"{path.name} is not UTF-8: {error}.", field=path.name) from None


def _template_of(tokenizer: Mapping[str, Any]) -> str | None:
    """The `chat_template` of a tokenizer's config: a text, or the default one of several."""
    match tokenizer.get("chat_template"):
        case None | "":
            return None
        case str(template):
            return template
        case [*several]:
            for one in several:
                match one:
                    case {"name": "default", "template": str(template)}:
                        return template or None
    raise _wrong(TOKENIZER_FILE, "chat_template", "a text, or several with one named 'default'")


def _checked(template: str | None) -> str | None:
    if template is not None:
        _check_size(len(template.encode()), f"{TOKENIZER_FILE}: chat_template")
    return template


def _check_size(num_bytes: int, place: str) -> None:
    """Raise `InvalidAdapter` for a template that is too large: processes keep some of them."""
    if num_bytes > _MAX_TEMPLATE_BYTES:
        raise InvalidAdapter(f"{place} is larger than {_MAX_TEMPLATE_BYTES} bytes.", field=place)


def _token(tokenizer: Mapping[str, Any], name: str) -> str | None:
    match tokenizer.get(name):
        case None | "":
            return None
        case str(token) | {"content": str(token)}:
            return token
    raise _wrong(TOKENIZER_FILE, name, "a token")


def _end_ids(generation: Mapping[str, Any]) -> tuple[int, ...]:
    declared = generation.get("eos_token_id")
    if declared is None:
        return ()
    ids = declared if isinstance(declared, list) else [declared]
    if not all(type(one) is int and one >= 0 for one in ids):
        raise _wrong(GENERATION_FILE, "eos_token_id", "a token's id, or a list of them")
    return tuple(sorted(set(ids)))


def _wrong(file: str, key: str, rule: str) -> InvalidAdapter:
    return InvalidAdapter(f"{file}: {key} must be {rule}.", field=f"{file}: {key}")
