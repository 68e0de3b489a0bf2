"""`dynamic-lora serve`: load a base model and serve it with its adapters over HTTP."""

import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dynamic_lora_adapters.threads import spin_briefly
from dynamic_lora_server.commands.logs import print_error, set_up_logging
from dynamic_lora_server.config import (
    BASE_PRODUCTS,
    DEVICES,
    DTYPES,
    LOG_LEVELS,
    MODES,
    QUANTIZATIONS,
    RESTORES,
    ServerConfig,
    default_home,
    parse_bytes,
)
from dynamic_lora_server.errors import ServerError

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime

_START_FAILED = 1
_INTERRUPTED = 130  # as shells have it for SIGINT
_DEFAULT = ServerConfig()
# Options that are sizes in bytes, written with a unit.
_SIZES = (
    "max_upload_bytes",
    "max_body_bytes",
    "adapter_memory",
    "kv_memory",
    "prefix_cache_memory",
)


# One alias for each option, so that the command's signature can be read.
_Model = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id of the base model.", show_default="SmolLM2-135M-Instruct"),
]
_Host = Annotated[str, typer.Option(envvar="HOST", help="Address to listen on.")]
_Port = Annotated[int, typer.Option(envvar="PORT", help="Port to listen on; 0 takes a free one.")]
_Home = Annotated[
    Path | None,
    typer.Option(
        envvar="DYNAMIC_LORA_HOME", help="Adapter store.", show_default="the user's data folder"
    ),
]
_DatabaseUrl = Annotated[
    str | None,
    typer.Option(envvar="DYNAMIC_LORA_DATABASE_URL", help="Index instead of HOME's SQLite."),
]
_AdapterRoot = Annotated[
    list[Path] | None,
    typer.Option(help="Folder below which POST /adapters may read a source. Repeatable."),
]
_MaxUploadBytes = Annotated[str, typer.Option(help="Cap on one upload.")]
_MaxBodyBytes = Annotated[str, typer.Option(help="Cap on any other request.")]
_AdapterMemory = Annotated[
    str | None, typer.Option(help="Device memory for adapters.", show_default="by free memory")
]
_KvMemory = Annotated[
    str | None, typer.Option(help="Device memory for the KV cache.", show_default="by free memory")
]
_KvDtype = Annotated[
    str,
    typer.Option(
        help=f"Keys and values in the cache: {', '.join(DTYPES)}. auto is the model's own, or "
        "bfloat16 with --quantize."
    ),
]
_PrefixCacheMemory = Annotated[
    str | None,
    typer.Option(
        help="Part of the KV cache's memory that may keep beginnings of prompts; 0 keeps none.",
        show_default="a quarter of it; on a GPU all that is idle",
    ),
]
_MaxRunning = Annotated[int, typer.Option(help="Sequences in one batch.")]
_MaxWaiting = Annotated[int, typer.Option(help="Sequences that may wait; more get 429.")]
_GraceSeconds = Annotated[
    int, typer.Option(help="What running requests get to end in when the server is to stop.")
]
_PrefillChunk = Annotated[int, typer.Option(help="Prompt tokens in one step.")]
_Dtype = Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")]
_Device = Annotated[str, typer.Option(help=f"{', '.join(DEVICES)}.")]
_Threads = Annotated[
    int | None, typer.Option(help="CPU threads.", show_default="one for each core it may use")
]
_BaseProduct = Annotated[
    str,
    typer.Option(
        help=f"What multiplies by the base's weights: {', '.join(BASE_PRODUCTS)}. All but plain "
        "keep a packed copy of them (CPU); auto takes what measures fastest, if memory is free."
    ),
]
_Quantize = Annotated[
    str,
    typer.Option(
        help=f"Round the base's weights: {', '.join(QUANTIZATIONS)} (CPU). Answers change "
        "slightly; nothing is merged into int8."
    ),
]
_Native = Annotated[
    bool,
    typer.Option(
        "--native/--no-native",
        help="Use C++ that is compiled on this machine, where there is a compiler (CPU).",
    ),
]
_Compile = Annotated[
    bool,
    typer.Option(
        "--compile/--no-compile",
        help="Have torch compile the decoder layers for decoding (GPU); starts take longer, the "
        "first by about a minute.",
    ),
]
_Overlap = Annotated[
    bool,
    typer.Option(
        "--overlap/--no-overlap",
        help="Start a step before the answers of the one before have been read (GPU).",
    ),
]
_Speculate = Annotated[
    int,
    typer.Option(
        help="Most tokens of each sequence to draft in a step from what its adapter has said "
        "before, where that is faster (CPU); 0 drafts none."
    ),
]
_Mode = Annotated[str, typer.Option(help=f"Whether adapters are merged: {', '.join(MODES)}.")]
_Restore = Annotated[
    str,
    typer.Option(help=f"How the base comes back from a merge: {', '.join(RESTORES)}."),
]
_RecordTrace = Annotated[
    Path | None,
    typer.Option(
        help="New file for who asked for which adapter and when, as benchmarks.simulate reads it; "
        "another one at each start."
    ),
]
_LogLevel = Annotated[str, typer.Option(help=f"{', '.join(LOG_LEVELS)}.")]


def serve(
    model: _Model = None,
    host: _Host = _DEFAULT.host,
    port: _Port = _DEFAULT.port,
    home: _Home = None,
    database_url: _DatabaseUrl = None,
    adapter_root: _AdapterRoot = None,
    max_upload_bytes: _MaxUploadBytes = "2GiB",
    max_body_bytes: _MaxBodyBytes = "8MiB",
    adapter_memory: _AdapterMemory = None,
    kv_memory: _KvMemory = None,
    kv_dtype: _KvDtype = _DEFAULT.kv_dtype,
    prefix_cache_memory: _PrefixCacheMemory = None,
    max_running: _MaxRunning = _DEFAULT.max_running,
    max_waiting: _MaxWaiting = _DEFAULT.max_waiting,
    grace_seconds: _GraceSeconds = _DEFAULT.grace_seconds,
    prefill_chunk: _PrefillChunk = _DEFAULT.prefill_chunk,
    dtype: _Dtype = _DEFAULT.dtype,
    device: _Device = _DEFAULT.device,
    threads: _Threads = None,
    base_product: _BaseProduct = _DEFAULT.base_product,
    native: _Native = _DEFAULT.native,
    compile: _Compile = _DEFAULT.compile,
    overlap: _Overlap = _DEFAULT.overlap,
    speculate: _Speculate = _DEFAULT.speculate,
    quantize: _Quantize = _DEFAULT.quantize,
    mode: _Mode = _DEFAULT.mode,
    restore: _Restore = _DEFAULT.restore,
    record_trace: _RecordTrace = None,
    log_level: _LogLevel = _DEFAULT.log_level,
) -> None:
    """Serve a base model and its LoRA adapters over HTTP, in the foreground."""
    options = locals()
    with _refusals():
        config = _config(options)
    run_server(config, Console(stderr=True))


def _config(options: Mapping[str, Any]) -> ServerConfig:
    """The configuration that the command's options, by name, ask for."""
    found = {name: value for name, value in options.items() if name != "adapter_root"}
    found["home"] = options["home"] or default_home()
    found["adapter_roots"] = tuple(options["adapter_root"] or ())
    for name in _SIZES:
        if options[name] is not None:
            found[name] = parse_bytes(options[name])
    return ServerConfig(**found)


@contextmanager
def _refusals() -> Iterator[None]:
    """What is wrong with an option, said as the command line says it."""
    try:
        yield
    except ServerError as error:
        raise typer.BadParameter(" ".join(filter(None, (error.message, error.fix)))) from error


def run_server(config: ServerConfig, console: Console) -> None:
    """Serve until interrupted.

    Exits with 1 if the model cannot be loaded, the port is taken, or the engine breaks.
    """
    spin_briefly(os.environ)
    set_up_logging(config.log_level, console)
    session = _Session(config, console)
    session.run()
    if session.failed:
        raise typer.Exit(_START_FAILED)


def _model_at_work() -> bool:
    """Whether the thread that loads the model, or the engine's, is still there."""
    return any(thread.name in ("load", "engine") for thread in threading.enumerate())


class _Session:
    """One run of the server in the terminal: what it shows, and how it ends."""

    def __init__(self, config: ServerConfig, console: Console) -> None:
        import uvicorn

        from dynamic_lora_server.app import create_app
        from dynamic_lora_server.commands.listener import Listener

        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._steps = Progress(*columns, console=console, disable=not console.is_terminal)
        self._num_steps = 0
        self.failed = False
        app = create_app(
            config, load=self._load, on_ready=self._on_ready, on_failure=self._on_failure
        )
        self._config = config
        self._server = Listener(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                log_config=None,
                log_level=config.log_level,
                access_log=config.log_level == "debug",
            ),
            app.state.server.end_generations,
            grace=config.grace_seconds,
        )

    def run(self) -> None:
        """Block until the server ends."""
        try:
            self._server.run()
        except ServerError as error:
            self._on_failure(error)
        finally:
            self._steps.stop()
            self.failed = self.failed or not self._server.started
            if _model_at_work():
                self._leave()

    def _load(self) -> "Runtime":
        from transformers.utils import logging as transformers_logging

        from dynamic_lora_server.runtime import Runtime

        # One display at a time: its bars would be drawn over ours.
        transformers_logging.disable_progress_bar()
        return Runtime.load(self._config, on_step=self._show)

    def _leave(self) -> NoReturn:
        """End the process at once, for a thread that cannot be interrupted.

        Python would end it by unwinding, which torch's C++ answers by aborting the process.
        """
        if isinstance(sys.exception(), Exception):
            self.failed = True
            self._console.print_exception()
        if not self.failed:
            self._console.print("Interrupted while the model was at work.")
        logging.shutdown()
        os._exit(_START_FAILED if self.failed else _INTERRUPTED)

    def _show(self, step: str) -> None:
        """A bar that moves until the next step begins, or a line in a file (loading thread)."""
        if not self._console.is_terminal:
            self._console.print(step, markup=False, highlight=False)
            return
        self._finish_step()
        # The first step brings the base model and shows bars of its own.
        if self._num_steps:
            self._steps.start()
        self._steps.add_task(step, total=None)
        self._num_steps += 1

    def _finish_step(self) -> None:
        for task in self._steps.task_ids[-1:]:
            self._steps.update(task, total=1, completed=1)

    def _on_ready(self, runtime: "Runtime") -> None:
        self._finish_step()
        self._steps.stop()
        num_adapters = len(runtime.registry.list())
        self._console.print(
            f"Dynamic LoRA ready at {self._address()} · base {runtime.model_id} · "
            f"{num_adapters} adapter{'' if num_adapters == 1 else 's'}",
            style="bold green",
            highlight=False,
            soft_wrap=True,
        )

    def _on_failure(self, error: Exception) -> None:
        self._steps.stop()
        self.failed = True
        print_error(error, self._console)
        self._server.should_exit = True

    def _address(self) -> str:
        """The address that was bound, which tells the port where 0 was asked for."""
        host, port = self._config.host, self._config.port
        for server in self._server.servers:
            for socket in server.sockets:
                port = socket.getsockname()[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"
