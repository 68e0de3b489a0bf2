"""Adapters and saved compositions, read from the server's answers."""

import httpx

from dynamic_lora_client.documents import Document
from dynamic_lora_client.errors import InvalidResponse
from dynamic_lora_client.types import Adapter, AdapterList, Composition, UnreadableAdapter


def read_adapters(response: httpx.Response) -> AdapterList:
    """The answer of `GET /adapters`. Raises InvalidResponse, as all here do."""
    document = Document.parse(response.content)
    return AdapterList(
        (_adapter(passport) for passport in _listed(document, "adapters")),
        unreadable=tuple(_unreadable(one) for one in document.children("unreadable")),
    )


def read_adapter(response: httpx.Response) -> Adapter:
    """An answer that is one passport."""
    return _adapter(Document.parse(response.content))


def read_compositions(response: httpx.Response) -> list[Composition]:
    """The answer of `GET /compositions`."""
    listed = _listed(Document.parse(response.content), "compositions")
    return [_composition(document) for document in listed]


def read_composition(response: httpx.Response) -> Composition:
    """An answer that is one saved composition."""
    return _composition(Document.parse(response.content))


def _listed(document: Document, key: str) -> list[Document]:
    if not isinstance(document.values.get(key), list):
        raise InvalidResponse(f"The server's answer has no list {key!r}.")
    return document.children(key)


def _unreadable(document: Document) -> UnreadableAdapter:
    return UnreadableAdapter(
        name=document.text("name"),
        version=document.text("version"),
        reason=document.text("reason"),
        document=document.values,
    )


def _composition(document: Document) -> Composition:
    return Composition(
        name=document.text("name"),
        text=document.text("adapter"),
        version=document.optional_text("version"),
        created_at=document.text("created_at"),
        document=document.values,
    )


def _adapter(passport: Document) -> Adapter:
    card, residency = passport.child("card"), passport.child("residency")
    return Adapter(
        name=passport.text("name"),
        version=passport.text("version"),
        kind=passport.text("kind"),
        rank=passport.integer("rank"),
        target_modules=passport.texts("target_modules"),
        num_parameters=passport.integer("num_parameters"),
        num_bytes=passport.integer("bytes"),
        base_model=passport.optional_text("base_model"),
        created_at=passport.text("created_at"),
        chat_template=passport.flag("chat_template"),
        end_tokens=passport.texts_and_integers("end_tokens"),
        description=None if card is None else card.optional_text("description"),
        notes=passport.texts("notes"),
        ignored_files=passport.texts("ignored_files"),
        tier=None if residency is None else residency.text("tier"),
        mode=None if residency is None else residency.optional_text("mode"),
        document=passport.values,
    )
