"""Multipart bodies to disk: any chunking, and every way to be wrong."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from dynamic_lora_adapters.errors import AdapterTooLarge
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.intake.uploads import Upload, drain, media_type, receive_upload

TYPE = "multipart/form-data; boundary=XX"
Part = tuple[str, str | None, bytes]


def encode(parts: Sequence[Part]) -> bytes:
    body = b""
    for name, filename, content in parts:
        header = f'Content-Disposition: form-data; name="{name}"'
        if filename is not None:
            header += f'; filename="{filename}"'
        body += b"--XX\r\n" + header.encode() + b"\r\n\r\n" + content + b"\r\n"
    return body + b"--XX--\r\n"


async def chunks_of(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


async def receive(
    inbox: Path, body: bytes, *, size: int = 1000, max_bytes: int = 10**6, content_type: str = TYPE
) -> Upload:
    return await receive_upload(
        chunks_of(body, size), content_type=content_type, inbox=inbox, max_bytes=max_bytes
    )


GOOD: list[Part] = [("name", None, b"ner"), ("files", "a.json", b"{}")]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(content=st.binary(max_size=300), size=st.integers(1, 80))
async def test_any_content_in_any_chunks(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, size: int
) -> None:
    inbox = tmp_path_factory.mktemp("inbox")
    if b"--XX" in content:
        return
    parts: list[Part] = [*GOOD, ("force", None, b"true"), ("files", "../b", content)]
    upload = await receive(inbox, encode(parts), size=size)
    assert (upload.name, upload.force) == ("ner", True)
    assert [file.filename for file in upload.files] == ["a.json", "../b"]
    assert upload.files[1].path.read_bytes() == content
    assert {path.parent for path in inbox.iterdir()} == {inbox}


@pytest.mark.parametrize(
    ("parts", "field", "text"),
    [
        ([("name", None, b"ner")], "files", "no files"),
        ([("files", "a", b"")], "name", "no field name"),
        ([*GOOD, ("name", None, b"x")], "name", "twice"),
        ([*GOOD, ("force", None, b"yes")], "force", "true or false"),
        ([*GOOD, ("colour", None, b"x")], "colour", "no field 'colour'"),
        ([*GOOD, ("name", "f", b"x")], "name", "no file field 'name'"),
        ([("files", None, b"x")], "files", "no file name"),
        ([("name", None, b"\xff"), GOOD[1]], "name", "not UTF-8"),
        ([("name", None, b"x" * 2000), GOOD[1]], "name", "longer than 1024"),
    ],
)
async def test_forms_that_are_wrong(
    tmp_path: Path, parts: list[Part], field: str, text: str
) -> None:
    with pytest.raises(InvalidParameter, match=text) as caught:
        await receive(tmp_path, encode(parts))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("body", "content_type", "text"),
    [
        (b"not a form", TYPE, "not a multipart/form-data form"),
        (encode(GOOD)[:-12], TYPE, "ends in the middle"),
        (b"", TYPE, "ends in the middle"),
        (encode(GOOD), "multipart/form-data", "no boundary"),
        (encode(GOOD), f"multipart/form-data; boundary={'X' * 300}", "Boundary length 300"),
    ],
)
async def test_bodies_that_are_no_form(
    tmp_path: Path, body: bytes, content_type: str, text: str
) -> None:
    with pytest.raises(HTTPException) as caught:
        await receive(tmp_path, body, content_type=content_type)
    assert caught.value.status_code == 400
    assert text in caught.value.detail


async def test_the_cap_holds_while_receiving(tmp_path: Path) -> None:
    body = encode([GOOD[0], ("files", "big", b"x" * 5000)])
    with pytest.raises(AdapterTooLarge, match="larger than 2,000 bytes"):
        await receive(tmp_path, body, size=500, max_bytes=2000)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2000


async def test_too_many_files(tmp_path: Path) -> None:
    parts: list[Part] = [("files", f"f{i}", b"") for i in range(257)]
    with pytest.raises(AdapterTooLarge, match="more than 256 files"):
        await receive(tmp_path, encode(parts))


async def test_what_is_left_of_a_refused_body_is_read() -> None:
    source = chunks_of(b"x" * 5000, 500)
    assert await anext(source)
    await drain(source)
    assert await anext(source, None) is None


@pytest.mark.parametrize("header", ["Multipart/Form-Data; boundary=X", "multipart/form-data"])
def test_media_types(header: str) -> None:
    assert media_type(header) == "multipart/form-data"
