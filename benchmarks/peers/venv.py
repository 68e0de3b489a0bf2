"""A virtual environment for a peer whose dependencies do not fit into this project's."""

import subprocess
import sys
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.errors import PeerUnavailable


class PeerVenv:
    """A virtual environment that is filled once; `python` is its interpreter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self._stamp = folder / ".installed"

    @property
    def ready(self) -> bool:
        """Whether everything was installed."""
        return self._stamp.is_file()

    def create(self) -> None:
        """Make the environment. Raises PeerUnavailable."""
        _run([sys.executable, "-m", "venv", str(self.folder)])

    def pip(self, *arguments: str) -> None:
        """Run pip, its progress on the terminal. Raises PeerUnavailable."""
        _run([str(self.python), "-m", "pip", *arguments])

    def finish(self) -> None:
        """Note that everything is installed."""
        self._stamp.touch()

    def install_without(self, package: str, left_out: Iterable[str]) -> None:
        """Install a wheel and its requirements, except those named in `left_out`.

        Raises PeerUnavailable where pip has no wheel for this machine.
        """
        downloads = self.folder / "downloads"
        self.pip("download", "--no-deps", "--only-binary=:all:", "-d", str(downloads), package)
        wheel = next(downloads.glob("*.whl"))
        skipped = {canonicalize_name(name) for name in left_out}
        wanted = [r for r in wheel_requirements(wheel) if canonicalize_name(r.name) not in skipped]
        self.pip("install", *(str(requirement) for requirement in wanted))
        self.pip("install", "--no-deps", str(wheel))


def wheel_requirements(wheel: Path) -> list[Requirement]:
    """What a wheel requires on this machine, extras left aside."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        # The full command of an install is long; what failed stands on the terminal above.
        short = " ".join(command[:4])
        raise PeerUnavailable(f"{short} ... ended with status {error.returncode}") from error
