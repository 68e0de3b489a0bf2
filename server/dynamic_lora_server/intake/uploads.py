"""Multipart uploads, streamed to disk: no part is ever whole in memory."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastapi.exceptions import HTTPException
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from dynamic_lora_adapters.errors import AdapterTooLarge
from dynamic_lora_server.errors import InvalidParameter

MULTIPART = "multipart/form-data"
JSON = "application/json"
_MAX_FILES = 256
_MAX_FIELD_BYTES = 1024
_TEXT_FIELDS = ("name", "force")
# After a refusal, what the client still sends is read and dropped, within these bounds:
# most clients read the answer only when they have sent everything.
_DRAIN_BYTES = 64 * 2**20
_DRAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ReceivedFile:
    """A file part: the name the client gave it, and where its bytes lie now."""

    filename: str
    path: Path


@dataclass(frozen=True, slots=True)
class Upload:
    """A whole upload."""

    name: str
    force: bool
    files: tuple[ReceivedFile, ...]


def media_type(content_type: str) -> str:
    """The media type of a Content-Type header, without its parameters."""
    return content_type.partition(";")[0].strip().lower()


async def receive_upload(
    chunks: AsyncIterator[bytes], *, content_type: str, inbox: Path, max_bytes: int
) -> Upload:
    """Write the file parts of a multipart body into the folder `inbox` as they arrive.

    The form's fields are `name`, `force` ("true" or "false") and `files`,
    repeated. Raises AdapterTooLarge beyond `max_bytes`, HTTPException 400 for a
    body that is not multipart, and InvalidParameter naming a field at fault.
    """
    form = _Form(content_type, inbox)
    try:
        num_bytes = 0
        async for chunk in chunks:
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise AdapterTooLarge(
                    f"The upload is larger than {max_bytes:,} bytes.",
                    field="files",
                    fix="Upload the adapter alone, or raise the server's --max-upload-bytes.",
                )
            await run_in_threadpool(form.write, chunk)
        return form.finish()
    finally:
        form.close()


async def drain(chunks: AsyncIterator[bytes]) -> None:
    """Read and drop what is left of a refused body, up to a bound."""
    num_bytes = 0
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for chunk in chunks:
                num_bytes += len(chunk)
                if num_bytes > _DRAIN_BYTES:
                    return
    except TimeoutError:
        return


class _Form:
    """The state of one multipart body; fed by python-multipart's callbacks."""

    def __init__(self, content_type: str, inbox: Path) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise _malformed("its Content-Type has no boundary")
        self._inbox = inbox
        self._texts: dict[str, bytearray] = {}
        self._files: list[ReceivedFile] = []
        self._sink: BinaryIO | None = None
        self._text: bytearray | None = None
        self._header = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}
        self._ended = False
        with _parsing():
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_part_data": self._add_data,
                    "on_part_end": self.close,
                    "on_header_field": self._add_header_field,
                    "on_header_value": self._add_header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._open_part,
                    "on_end": self._end,
                },
            )

    def write(self, chunk: bytes) -> None:
        """Parse the next bytes of the body."""
        with _parsing():
            self._parser.write(chunk)

    def finish(self) -> Upload:
        """The upload, once the body has ended."""
        if not self._ended:
            raise _malformed("it ends in the middle of a part")
        if not self._files:
            raise InvalidParameter(
                "The upload has no files.",
                field="files",
                fix="Send the adapter's files, or one archive of them, as parts named files.",
            )
        force = self._field("force", "false")
        if force not in ("true", "false"):
            raise InvalidParameter("force must be true or false.", field="force")
        return Upload(self._field("name"), force == "true", tuple(self._files))

    def close(self) -> None:
        """End the part that is being written, if any."""
        if self._sink is not None:
            self._sink.close()
        self._sink = self._text = None

    def _field(self, name: str, default: str | None = None) -> str:
        content = self._texts.get(name)
        if content is None and default is not None:
            return default
        if content is None:
            raise InvalidParameter(
                f"The upload has no field {name}.", field=name, fix=f"Send a part named {name}."
            )
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise InvalidParameter(f"{name} is not UTF-8.", field=name) from None

    def _begin_part(self) -> None:
        self._headers = {}

    def _add_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _open_part(self) -> None:
        options = parse_options_header(self._headers.get(b"content-disposition"))[1]
        name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        if name == "files" and filename is None:
            raise InvalidParameter(
                "A part named files has no file name.",
                field="files",
                fix='Send it as a file, with filename="adapter_model.safetensors" for example.',
            )
        if name == "files" and filename is not None:
            self._open_file(filename)
        elif name in _TEXT_FIELDS and filename is None:
            self._open_text(name)
        else:
            raise InvalidParameter(
                f"The form has no {'field' if filename is None else 'file field'} {name!r}.",
                field=name or "body",
                fix="Its fields are name, force and files (with file names).",
            )

    def _open_file(self, filename: bytes) -> None:
        if len(self._files) == _MAX_FILES:
            raise AdapterTooLarge(f"The upload has more than {_MAX_FILES} files.", field="files")
        try:
            name = filename.decode()
        except UnicodeDecodeError:
            raise InvalidParameter("A file's name is not UTF-8.", field="files") from None
        # The client's name is never a path here: parts are numbered.
        path = self._inbox / f"part-{len(self._files)}"
        self._files.append(ReceivedFile(name, path))
        self._sink = path.open("xb")

    def _open_text(self, name: str) -> None:
        if name in self._texts:
            raise InvalidParameter(f"{name} comes twice.", field=name)
        self._text = self._texts[name] = bytearray()

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._sink is not None:
            self._sink.write(data[start:end])
        elif self._text is not None:
            self._text += data[start:end]
            if len(self._text) > _MAX_FIELD_BYTES:
                name = next(key for key, text in self._texts.items() if text is self._text)
                raise InvalidParameter(
                    f"{name} is longer than {_MAX_FIELD_BYTES} bytes.", field=name
                )

    def _end(self) -> None:
        self._ended = True


@contextmanager
def _parsing() -> Iterator[None]:
    try:
        yield
    except FormParserError as error:  # a boundary that is too long is no MultipartParseError
        raise _malformed(str(error)) from error


def _malformed(reason: str) -> HTTPException:
    return HTTPException(400, f"The body is not a {MULTIPART} form: {reason}.")
