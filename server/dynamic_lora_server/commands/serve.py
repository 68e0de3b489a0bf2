"""`dynamic-lora serve`: load a base model and serve it with its adapters over HTTP."""

import gc
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dynamic_lora_adapters.threads import spin_briefly
from dynamic_lora_server.commands import serve_options as options
from dynamic_lora_server.commands.logs import print_error, set_up_logging
from dynamic_lora_server.config import ServerConfig, default_home, parse_bytes
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
    "max_hub_bytes",
    "adapter_memory",
    "kv_memory",
    "prefix_cache_memory",
)
# Options that can be given again, and the fields that have all that were given.
_REPEATABLE = {
    "served_model_name": "served_model_names",
    "adapter_root": "adapter_roots",
    "fetch_from_hub": "fetch_from_hub",
    "api_key": "api_keys",
    "admin_key": "admin_keys",
    "allowed_origin": "allowed_origins",
}


def serve(
    model: options.Model = None,
    served_model_name: options.ServedModelName = None,
    host: options.Host = _DEFAULT.host,
    port: options.Port = _DEFAULT.port,
    home: options.Home = None,
    database_url: options.DatabaseUrl = None,
    adapter_root: options.AdapterRoot = None,
    fetch_from_hub: options.FetchFromHub = None,
    api_key: options.ApiKey = None,
    admin_key: options.AdminKey = None,
    allowed_origin: options.AllowedOrigin = None,
    max_upload_bytes: options.MaxUploadBytes = "2GiB",
    max_body_bytes: options.MaxBodyBytes = "8MiB",
    max_hub_bytes: options.MaxHubBytes = None,
    adapter_memory: options.AdapterMemory = None,
    kv_memory: options.KvMemory = None,
    kv_dtype: options.KvDtype = _DEFAULT.kv_dtype,
    prefix_cache_memory: options.PrefixCacheMemory = None,
    max_running: options.MaxRunning = _DEFAULT.max_running,
    max_waiting: options.MaxWaiting = _DEFAULT.max_waiting,
    grace_seconds: options.GraceSeconds = _DEFAULT.grace_seconds,
    keep_alive_seconds: options.KeepAliveSeconds = _DEFAULT.keep_alive_seconds,
    prefill_chunk: options.PrefillChunk = _DEFAULT.prefill_chunk,
    dtype: options.Dtype = _DEFAULT.dtype,
    device: options.Device = _DEFAULT.device,
    threads: options.Threads = None,
    base_product: options.BaseProduct = _DEFAULT.base_product,
    native: options.Native = _DEFAULT.native,
    compile: options.Compile = _DEFAULT.compile,
    overlap: options.Overlap = _DEFAULT.overlap,
    speculate: options.Speculate = _DEFAULT.speculate,
    quantize: options.Quantize = _DEFAULT.quantize,
    mode: options.Mode = _DEFAULT.mode,
    restore: options.Restore = _DEFAULT.restore,
    tool_call_format: options.ToolCallFormat = _DEFAULT.tool_call_format,
    record_trace: options.RecordTrace = None,
    log_level: options.LogLevel = _DEFAULT.log_level,
) -> None:
    """Serve a base model and its LoRA adapters over HTTP, in the foreground."""
    given = locals()
    with _refusals():
        config = _config(given)
    run_server(config, Console(stderr=True))


def _config(given: Mapping[str, Any]) -> ServerConfig:
    """The configuration that the command's options, by name, ask for."""
    found = {name: value for name, value in given.items() if name not in _REPEATABLE}
    found["home"] = given["home"] or default_home()
    for name, field in _REPEATABLE.items():
        found[field] = tuple(given[name] or ())
    for name in _SIZES:
        if given[name] is not None:
            found[name] = parse_bytes(given[name])
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


def _settle_garbage() -> None:
    """Have Python's collector look no more at what there is now, and will be to the end.

    Half a million objects of the model and of libraries: going through them takes a quarter of a
    second, in which nobody gets a token.
    """
    gc.collect()
    gc.freeze()


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
                timeout_keep_alive=config.keep_alive_seconds,
                log_config=None,
                log_level=config.log_level,
                access_log=False,  # the application writes one
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
        runtime = Runtime.load(self._config, on_step=self._show)
        _settle_garbage()
        return runtime

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
