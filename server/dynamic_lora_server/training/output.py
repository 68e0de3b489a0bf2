"""The folder that a run leaves: looked at before training, then written whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from dynamic_lora_server.training.artifacts import FILES
from dynamic_lora_server.training.errors import TrainingConfigError, TrainingError


def check_output(output: Path) -> Path:
    """Find out whether `output` could be written, before the hours that training may take.

    The absolute path of the folder, which is absent, empty, or holds what another run left.
    Raises TrainingConfigError.
    """
    try:
        folder = output.expanduser().resolve()
        _check_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _beside(folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: the ~ of nobody, links in a circle
        raise TrainingConfigError(f"the output {output} cannot be written: {error}") from error
    return folder


def write_output(output: Path, files: Mapping[str, bytes]) -> None:
    """Write a run's files, by name, to the folder `output`, in place of an older run's.

    What cannot be written there goes to a new folder among the system's temporary ones: hours of
    training are not thrown away for a full disk. Raises TrainingError, which names that folder.
    """
    try:
        replace_output(output, files)
    except OSError as error:
        reason = f"the output {output} cannot be written: {error}"
        raise TrainingError(f"{reason}; {_rescue(output, files)}") from error


def replace_output(output: Path, files: Mapping[str, bytes]) -> None:
    """As `write_output`, but what cannot be written is written nowhere: raises OSError."""
    _check_replaceable(output)
    with _beside(output) as work:
        made, old = work / "made", work / "old"
        _write(made, files)
        if output.exists():
            output.rename(old)
        try:
            made.rename(output)
        except BaseException:
            if old.exists():
                old.rename(output)
            raise


def remove_output(output: Path) -> None:
    """Take away what a run wrote; where that cannot be, or other things lie there, leave it."""
    with suppress(OSError):
        _check_replaceable(output)
        shutil.rmtree(output)


def _check_replaceable(folder: Path) -> None:
    """Raise FileExistsError where writing would take away what no run has written."""
    if folder.is_mount():
        raise FileExistsError("it is where a file system begins; name a folder below it")
    if Path.cwd().is_relative_to(folder):
        raise FileExistsError("it is, or holds, the folder that the command runs in")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError("it is a file")
    others = (path for path in folder.iterdir() if path.name not in FILES or not path.is_file())
    if other := min(others, default=None):
        raise FileExistsError(f"it holds {other.name}, which is no file of a training run")


def _rescue(output: Path, files: Mapping[str, bytes]) -> str:
    """Write the files elsewhere and say where."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{output.name}-"))
        _write(folder, files)
    except OSError as error:
        return f"nor could the adapter be kept elsewhere: {error}"
    return f"the adapter is in {folder} instead"


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A folder on the same file system as `output`, so that renaming moves."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        yield Path(folder)
