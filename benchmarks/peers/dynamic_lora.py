"""This project's own server, started as a user starts it, with adapters uploaded over HTTP."""

import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import aiohttp
import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.errors import PeerUnavailable, RequestFailed
from benchmarks.load import TIMEOUT_S
from benchmarks.peers.base import HttpSession, Session, Setup
from benchmarks.peers.process import ServerProcess, free_port, running
from benchmarks.wire import DynamicLoraWire

# What greedy models answer to prompts of random words soon runs in circles, which drafts would turn
# into a speed that nobody sees. What they bring on real tasks `benchmarks.speculation` measures.
NO_DRAFTS = ("--speculate", "0")
FILES = ("adapter_config.json", "adapter_model.safetensors")


def upload(url: str, folders: list[Path]) -> list[str]:
    """Upload PEFT folders under their own names. Raises PeerUnavailable on a refusal."""
    with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as http:
        for folder in folders:
            post_adapter(http, folder.name, {n: (folder / n).read_bytes() for n in FILES})
    return [folder.name for folder in folders]


def post_adapter(http: httpx.Client, name: str, files: Mapping[str, bytes]) -> None:
    """Upload one adapter's files. Raises PeerUnavailable on a refusal."""
    parts = [("files", (file, content)) for file, content in files.items()]
    answer = http.post("/adapters", data={"name": name}, files=parts)
    if answer.status_code not in {200, 201}:
        raise PeerUnavailable(f"{name} was refused: {answer.status_code} {answer.text[:300]}")


async def totals(http: aiohttp.ClientSession, *names: str) -> list[float]:
    """What counters of a server stand at, their labels summed up: `dynamic_lora_NAME_total`.

    Raises RequestFailed for one that it does not have.
    """
    async with http.get("/metrics") as answer:
        text = await answer.text() if answer.status == 200 else ""
    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] += sample.value
    wanted = [f"dynamic_lora_{name}_total" for name in names]
    if missing := [name for name in wanted if name not in found]:
        raise RequestFailed(f"the server's metrics have no {', '.join(missing)}")
    return [found[name] for name in wanted]


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicLora:
    """`dynamic-lora serve` from this environment, its store in a temporary folder.

    `flags` are further options of `serve`; everything else but drafts is left at its default.
    """

    name: str = "dynamic-lora"
    flags: tuple[str, ...] = ()

    @property
    def has_adapters(self) -> bool:
        """It always is started with them."""
        return True

    @contextmanager
    def session(self, setup: Setup) -> Iterator[Session]:
        """Start, upload, and end on leaving. Raises PeerUnavailable with the reason."""
        dtype = () if "--dtype" in self.flags else ("--dtype", setup.dtype)
        flags = (*NO_DRAFTS, *dtype, *self.flags)
        with (
            tempfile.TemporaryDirectory() as home,
            serving(setup.base, Path(home), setup.logs / f"{self.name}.log", flags) as server,
        ):
            url, process = server
            names = upload(url, setup.adapters)
            process.pause()
            yield HttpSession(
                url=url,
                wire=DynamicLoraWire(names),
                version=f"{version('dynamic-lora')}, {' '.join(flags)}, else its defaults",
                weights=weights_of(flags),
                process=process,
            )


@contextmanager
def serving(
    base: Path | None, home: Path, log: Path, flags: Sequence[str] = ()
) -> Iterator[tuple[str, ServerProcess]]:
    """`dynamic-lora serve` on a free port until the block ends: its address and its process.

    `base` None is the default model, with the shipped adapters.

    Raises PeerUnavailable with the reason.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("dynamic-lora")), "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--home", str(home)]
    command += [*flags] if base is None else ["--model", str(base), *flags]
    with running(command, ready_url=f"{url}/ready", log=log) as process:
        yield url, process


def weights_of(flags: Sequence[str]) -> str:
    """The number format that options of `serve` ask for; `auto` where they do not."""
    given = dict(zip(flags, flags[1:], strict=False))
    return given.get("--quantize") or given.get("--dtype") or "auto"
