"""Reading the members of archives: .zip, .tar and .tar.gz, within bounds."""

import gzip
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, BinaryIO, cast

from dynamic_lora_adapters.errors import AdapterTooLarge, InvalidAdapter, UnsafeArchive

CHUNK_BYTES = 1 << 20
# What a tar header with its long names may take; far above what real ones do.
_MAX_TAR_HEADER_BYTES = 1 << 20
BROKEN_ARCHIVE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    gzip.BadGzipFile,
    EOFError,
    NotImplementedError,
    OverflowError,
    RecursionError,  # of one tar header that names the next, and so on
    ValueError,
    struct.error,
)

# Names of members with their data; None for a folder.
Members = Iterator[tuple[str, IO[bytes] | None]]


def member_reader(stream: BinaryIO) -> Callable[[int, BinaryIO], Members] | None:
    """What reads the members of an archive, told by its content; None for anything else.

    It takes the most bytes that all may have unpacked. Raises InvalidAdapter for members that
    are no plain files, and what BROKEN_ARCHIVE lists.
    """
    stream.seek(0)
    head = stream.read(512)
    stream.seek(0)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_members
    if head.startswith(b"\x1f\x8b"):
        return _gzip_members
    if head[257:262] == b"ustar":
        return _tar_members
    return None


def _zip_members(_: int, stream: BinaryIO) -> Members:
    with zipfile.ZipFile(cast(BinaryIO, _ShortReads(stream))) as archive:
        for info in archive.infolist():
            mode = info.external_attr >> 16
            # Without Unix attributes the type bits are 0.
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _not_a_file(info.filename)
            if info.flag_bits & 1:
                raise InvalidAdapter(
                    f"The archive's member {info.filename!r} is encrypted.", field=info.filename
                )
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InvalidAdapter(
                    f"The archive's member {info.filename!r} is packed in a way that is not read.",
                    field=info.filename,
                    fix="Pack the files with plain 'zip'.",
                )
            if info.filename.endswith("/"):  # `is_dir` fails for a name of no length
                yield info.filename, None
                continue
            with archive.open(info) as member:
                yield info.filename, member


def _gzip_members(max_bytes: int, stream: BinaryIO) -> Members:
    with gzip.GzipFile(fileobj=stream) as unzipped:
        yield from _tar_members(max_bytes, cast(BinaryIO, unzipped))


def _tar_members(max_bytes: int, stream: BinaryIO) -> Members:
    source = _MeteredReader(stream, max_bytes)
    # "r|" reads strictly forwards, so the meter sees each byte once.
    with tarfile.open(fileobj=cast(BinaryIO, source), mode="r|") as archive:
        while True:
            source.limit(_MAX_TAR_HEADER_BYTES)
            info = archive.next()
            if info is None:
                return
            source.limit(None)
            if info.isdir():
                yield info.name, None
                continue
            member = archive.extractfile(info) if info.isreg() and not info.issparse() else None
            if member is None:
                raise _not_a_file(info.name)
            yield info.name, member
            # Skipping what was not read would count as the next header.
            while member.read(CHUNK_BYTES):
                pass


def _not_a_file(name: str) -> UnsafeArchive:
    return UnsafeArchive(
        f"The archive's member {name!r} is a link or a device.",
        field=name,
        fix="Pack the files themselves, for example with 'tar --dereference'.",
    )


class _ShortReads:
    """A zip's stream, of which no piece is longer than CHUNK_BYTES.

    `zipfile` reads the directory whole, and makes an object of each entry: millions fit into an
    upload. Members are read by chunks.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.tell, self.seekable = stream.tell, stream.seekable
        self._stream = stream

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Seek as a file does; raises `BadZipFile` for a place before its beginning."""
        if whence == os.SEEK_SET and offset < 0:
            raise zipfile.BadZipFile("a member lies before the archive's beginning")
        return self._stream.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        """Read as a file does; raises for longer pieces."""
        data = self._stream.read(min(size, CHUNK_BYTES + 1) if size >= 0 else CHUNK_BYTES + 1)
        if len(data) > CHUNK_BYTES:
            raise UnsafeArchive("The archive's directory is oversized.", field="files")
        return data


class _MeteredReader:
    """Reads a tar stream within bounds, whatever its headers say.

    `tarfile` reads long names whole into memory and unpacks members only to
    skip them: headers must stay within `limit`, all of the stream within the
    upload's cap.
    """

    def __init__(self, stream: BinaryIO, max_bytes: int) -> None:
        self._stream = stream
        self._max_bytes = self._left = max_bytes
        # Opening the archive reads the first header already.
        self._header_left: int | None = _MAX_TAR_HEADER_BYTES

    def limit(self, num_bytes: int | None) -> None:
        """Allow so many bytes until the next call; None for no bound of their own."""
        self._header_left = num_bytes

    def read(self, size: int = -1) -> bytes:
        """Read as a file does; raises once a bound is passed."""
        data = self._stream.read(size)
        if self._header_left is not None:
            self._header_left -= len(data)
            if self._header_left < 0:
                raise UnsafeArchive("The archive has an oversized header.", field="files")
        self._left -= len(data)
        if self._left < 0:
            raise too_large(self._max_bytes)
        return data


def too_large(max_bytes: int) -> AdapterTooLarge:
    """The error for an upload of more than so many bytes."""
    return AdapterTooLarge(
        f"The upload is larger than {max_bytes} bytes when unpacked.",
        field="files",
        fix="Upload a smaller adapter, or raise the server's upload limit.",
    )
