"""The control groups that this process is in, which limit what it may take (Linux)."""

from pathlib import Path


def group_folders(root: Path, controller: str) -> set[Path]:
    """The folders below `root` of this process's group and of those around it.

    `controller` is one of version 1's, or empty for version 2. What is not there is harmless:
    a folder may be missing, or lack the files of a limit.
    """
    top = root / "sys/fs/cgroup" / controller
    own = _group(root / "proc/self/cgroup", controller)
    # In a container the group may be shown at the top, though its name is longer.
    return {top, *((top / own, *_between(top, top / own)) if own else ())}


def _group(file: Path, controller: str) -> str:
    """The path of this process's group of a controller, below the top; empty if there is none."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path.strip("/")
    return ""


def _between(top: Path, folder: Path) -> list[Path]:
    return [parent for parent in folder.parents if top in parent.parents]
