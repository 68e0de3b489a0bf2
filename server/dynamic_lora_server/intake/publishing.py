"""From an upload or a source to a named adapter: checked whole, published all or nothing."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi.concurrency import contextmanager_in_threadpool
from starlette.concurrency import run_in_threadpool

from dynamic_lora_adapters.files.archive import Intake
from dynamic_lora_adapters.home.passport import Publication
from dynamic_lora_adapters.names import check_adapter_name
from dynamic_lora_server.intake.sources import fetch_source
from dynamic_lora_server.intake.uploads import Upload, drain, receive_upload
from dynamic_lora_server.schemas.adapters import AdapterSource

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime


async def publish_source(
    runtime: "Runtime", source: AdapterSource, *, replace: bool = True, fetched: bool = False
) -> Publication:
    """Fetch an adapter, check it whole and publish it, all or nothing.

    `fetched`: brought by a request that named it, not by an operator.
    """
    _check_name(source.name, runtime)
    async with _staging(runtime) as inbox, _staging(runtime) as folder:
        async with runtime.fetching:
            intake = await run_in_threadpool(_fetch, source, runtime, inbox, folder)
        return await _publish(runtime, source, folder, intake, replace=replace, fetched=fetched)


async def publish_upload(
    runtime: "Runtime", chunks: AsyncIterator[bytes], *, content_type: str
) -> Publication:
    """Receive the form of an upload, check the adapter whole and publish it, all or nothing."""
    async with _staging(runtime) as inbox, _staging(runtime) as folder:
        upload = await _receive(chunks, content_type, runtime, inbox)
        _check_name(upload.name, runtime)
        async with runtime.unpacking:
            intake = await run_in_threadpool(_take_in, upload, runtime, folder)
        return await _publish(runtime, upload, folder, intake)


def _staging(runtime: "Runtime") -> AbstractAsyncContextManager[Path]:
    """A folder for an upload; making and removing it, which takes time, holds up nobody."""
    return contextmanager_in_threadpool(runtime.registry.staging())


def _check_name(name: str, runtime: "Runtime") -> None:
    """Before what takes long; once more when it is published, as it may be given meanwhile."""
    check_adapter_name(name, reserved=runtime.registry.reserved)
    runtime.saved.check_free(name)


async def _receive(
    chunks: AsyncIterator[bytes], content_type: str, runtime: "Runtime", inbox: Path
) -> Upload:
    try:
        return await receive_upload(
            chunks,
            content_type=content_type,
            inbox=inbox,
            max_bytes=runtime.config.max_upload_bytes,
        )
    except Exception:
        await drain(chunks)
        raise


def _take_in(upload: Upload, runtime: "Runtime", folder: Path) -> Intake:
    intake = Intake(folder, runtime.registry.limits)
    for file in upload.files:
        with file.path.open("rb") as stream:
            intake.add(file.filename, stream)
    return intake


def _fetch(source: AdapterSource, runtime: "Runtime", inbox: Path, folder: Path) -> Intake:
    intake = Intake(folder, runtime.registry.limits)
    fetch_source(
        source.source,
        intake,
        roots=runtime.config.adapter_roots,
        inbox=inbox,
        max_bytes=runtime.config.max_upload_bytes,
    )
    return intake


async def _publish(
    runtime: "Runtime",
    wanted: Upload | AdapterSource,
    folder: Path,
    intake: Intake,
    *,
    replace: bool = True,
    fetched: bool = False,
) -> Publication:
    def publish() -> Publication:
        with runtime.saved.kept_for_adapter(wanted.name):
            return runtime.registry.publish(
                wanted.name,
                folder,
                force=wanted.force,
                replace=replace,
                fetched=fetched,
                ignored_files=intake.ignored_files,
            )

    async with runtime.checking:
        return await run_in_threadpool(publish)
