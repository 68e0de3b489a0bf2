"""Files as the system would show them, for code that reads them below a root of its own."""

from pathlib import Path


def write_files(root: Path, files: dict[str, str]) -> None:
    """Write each text as a line, by its path below `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
