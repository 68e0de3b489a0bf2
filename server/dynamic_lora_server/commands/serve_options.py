"""The options of `dynamic-lora serve`, one alias for each, so that its signature can be read."""

from pathlib import Path
from typing import Annotated

import typer

from dynamic_lora_server.config import (
    BASE_PRODUCTS,
    DEVICES,
    DTYPES,
    LOG_LEVELS,
    MODES,
    QUANTIZATIONS,
    RESTORES,
    TOOL_CALL_FORMATS,
)
from dynamic_lora_server.engine.drafting.drafts import MAX_DRAFT

Model = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id of the base model.", show_default="SmolLM2-135M-Instruct"),
]
ServedModelName = Annotated[
    list[str] | None,
    typer.Option(
        help="Name by which clients call the base model; answers and lists use the first. "
        "Repeatable.",
        show_default="the model's id",
    ),
]
# Names that nothing else sets: csh and conda's compilers export HOST, and Kubernetes gives every
# pod beside a service dynamic-lora a DYNAMIC_LORA_PORT, which is a URL.
Host = Annotated[str, typer.Option(envvar="DYNAMIC_LORA_LISTEN_HOST", help="Address to listen on.")]
Port = Annotated[
    int,
    typer.Option(envvar="DYNAMIC_LORA_LISTEN_PORT", help="Port to listen on; 0 takes a free one."),
]
Home = Annotated[
    Path | None,
    typer.Option(
        envvar="DYNAMIC_LORA_HOME", help="Adapter store.", show_default="the user's data folder"
    ),
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(envvar="DYNAMIC_LORA_DATABASE_URL", help="Index instead of HOME's SQLite."),
]
AdapterRoot = Annotated[
    list[Path] | None,
    typer.Option(help="Folder below which POST /adapters may read a source. Repeatable."),
]
FetchFromHub = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ORGANISATION",
        help="Fetch adapters of this organisation from the Hub when a request names their id; "
        "'*' for all. Repeatable.",
        show_default="none is fetched",
    ),
]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        envvar="DYNAMIC_LORA_API_KEYS",
        help="Key that clients must send as a bearer token. Repeatable; the variable, which no "
        "list of processes shows, takes several with spaces between.",
        show_default="none is wanted",
    ),
]
AdminKey = Annotated[
    list[str] | None,
    typer.Option(
        envvar="DYNAMIC_LORA_ADMIN_KEYS",
        help="Key without which nobody changes adapters and compositions. Repeatable.",
        show_default="every client may",
    ),
]
AllowedOrigin = Annotated[
    list[str] | None,
    typer.Option(
        help="Origin of pages that may call the server from a browser (CORS), or * for all. "
        "Repeatable."
    ),
]
MaxUploadBytes = Annotated[str, typer.Option(help="Cap on one upload.")]
MaxHubBytes = Annotated[
    str | None,
    typer.Option(
        help="Cap on the weights that --fetch-from-hub keeps, at least --max-upload-bytes; the "
        "least recently used go first.",
        show_default="none",
    ),
]
MaxBodyBytes = Annotated[str, typer.Option(help="Cap on any other request.")]
AdapterMemory = Annotated[
    str | None, typer.Option(help="Device memory for adapters.", show_default="by free memory")
]
KvMemory = Annotated[
    str | None, typer.Option(help="Device memory for the KV cache.", show_default="by free memory")
]
KvDtype = Annotated[
    str,
    typer.Option(
        help=f"Keys and values in the cache: {', '.join(DTYPES)}. auto is the model's own, or "
        "bfloat16 with --quantize."
    ),
]
PrefixCacheMemory = Annotated[
    str | None,
    typer.Option(
        help="Part of the KV cache's memory that may keep beginnings of prompts; 0 keeps none.",
        show_default="a quarter of it; on a GPU all that is idle",
    ),
]
MaxRunning = Annotated[int, typer.Option(help="Sequences in one batch.")]
MaxWaiting = Annotated[int, typer.Option(help="Sequences that may wait; more get 429.")]
GraceSeconds = Annotated[
    int, typer.Option(help="What running requests get to end in when the server is to stop.")
]
KeepAliveSeconds = Annotated[
    int,
    typer.Option(
        help="How long a connection without a request is kept; longer than a proxy before the "
        "server keeps it."
    ),
]
PrefillChunk = Annotated[
    int, typer.Option(help="Prompt tokens in one step, beside a token of each answer.")
]
Dtype = Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")]
Device = Annotated[str, typer.Option(help=f"{', '.join(DEVICES)}.")]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads.", show_default="one for each core it may use")
]
BaseProduct = Annotated[
    str,
    typer.Option(
        help=f"What multiplies by the base's weights: {', '.join(BASE_PRODUCTS)}. All but plain "
        "keep a packed copy of them (CPU); auto takes what measures fastest, if memory is free."
    ),
]
Quantize = Annotated[
    str,
    typer.Option(
        help=f"Round the base's weights and adapters' factors, and with w8a8 the inputs of layers, "
        f"too: {', '.join(QUANTIZATIONS)} (CPU). Answers change slightly."
    ),
]
Native = Annotated[
    bool,
    typer.Option(
        "--native/--no-native",
        help="Use C++ that is compiled on this machine, where there is a compiler (CPU).",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile/--no-compile",
        help="Have torch compile the decoder layers for decoding (GPU); starts take longer, the "
        "first by about a minute.",
    ),
]
Overlap = Annotated[
    bool,
    typer.Option(
        "--overlap/--no-overlap",
        help="Start a step before the answers of the one before have been read (GPU).",
    ),
]
Speculate = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of each sequence to draft in a step from what its adapter has said "
        "before, where that is faster (CPU); 0 drafts none.",
        show_default=f"{MAX_DRAFT}; 0 on a GPU",
    ),
]
Mode = Annotated[
    str,
    typer.Option(
        help=f"Whether adapters are merged: {', '.join(MODES)}. auto merges what pays, and "
        "nothing on a GPU."
    ),
]
Restore = Annotated[
    str,
    typer.Option(help=f"How the base comes back from a merge: {', '.join(RESTORES)}."),
]
ToolCallFormat = Annotated[
    str,
    typer.Option(
        help=f"How models write calls of tools: {', '.join(TOOL_CALL_FORMATS)}; what a chat "
        "template tells counts before it."
    ),
]
RecordTrace = Annotated[
    Path | None,
    typer.Option(
        help="File for who asked for which adapter and when, as benchmarks.simulate reads it; "
        "where it has a trace already, the name gets a number."
    ),
]
LogLevel = Annotated[str, typer.Option(help=f"{', '.join(LOG_LEVELS)}.")]
