"""Facts of the machine that a measurement was made on."""

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("dynamic-lora", "torch", "triton", "transformers", "peft", "numpy")
# What decides the speed of matrix products on x86 and ARM.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "sve")
# What a processor is called after: the first that it has.
_WIDEST = ("amx_bf16", "avx512f", "avx2", "sve", "asimd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Processor, memory, accelerator and versions.

    `commit` is the checkout's, with a `+` behind it where files differ; None outside of one.
    """

    cpu: str
    num_cores: int
    cpu_flags: list[str]
    memory_gib: float
    gpu: str | None
    system: str
    python: str
    packages: dict[str, str]
    commit: str | None = None

    @property
    def line(self) -> str:
        """The machine in one line."""
        parts = [f"{self.cpu}, {self.num_cores} cores", ", ".join(self.cpu_flags)]
        parts += [f"{self.memory_gib:.0f} GiB", self.gpu or "no GPU", f"Python {self.python}"]
        parts += [f"{name} {number}" for name, number in self.packages.items()]
        parts += [f"commit {self.commit}"] if self.commit else []
        return "; ".join(part for part in parts if part)

    @property
    def slug(self) -> str:
        """A short name for files: `cpu-avx2-2cores`, or the accelerator's name."""
        if self.gpu is not None:
            return re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        widest = next((flag for flag in _WIDEST if flag in self.cpu_flags), "plain")
        return f"cpu-{widest.replace('_', '-')}-{self.num_cores}cores"


def describe_machine() -> Machine:
    """The facts of this machine, for the process's own share of its cores."""
    fields = _cpuinfo()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        cpu=fields.get("model name") or platform.processor() or platform.machine(),
        num_cores=len(os.sched_getaffinity(0)),
        cpu_flags=cpu_flags(),
        memory_gib=round(memory / 2**30, 1),
        gpu=_gpu(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages=_versions(),
        commit=_commit(),
    )


def cpu_flags() -> list[str]:
    """What this processor has of the abilities that decide its speed."""
    fields = _cpuinfo()
    flags = f"{fields.get('flags', '')} {fields.get('Features', '')}".split()
    return [flag for flag in _FLAGS if flag in flags]


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
