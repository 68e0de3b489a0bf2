"""Writes one pip.conf with this machine's pip settings and prints the mounts that it needs.

    python scripts/pip_mounts.py FILE

Every setting of `pip config list`, wherever it comes from (files or PIP_* variables), is
written to FILE. Printed, one a line: `--volume=SOURCE:TARGET:ro` for FILE itself and for each
file or folder of this machine that a setting names, at the same place inside the container.
"""

import ast
import configparser
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

CONTAINER_PIP_CONF = "/etc/pip.conf"


def settings() -> dict[str, str]:
    """pip's settings by name; a PIP_* variable wins over a file, as it does for pip."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, dict[str, str]] = {"global": {}, ":env:": {}}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        found.setdefault(section, {})[key] = str(ast.literal_eval(value))
    return found["global"] | found[":env:"]


def named_paths(values: dict[str, str]) -> list[Path]:
    """The existing local files and folders that the values name, as paths or file: URLs."""
    words = [word for value in values.values() for word in value.split()]
    paths = [_local_path(word) for word in words]
    return sorted({path for path in paths if path is not None and path.exists()})


def _local_path(word: str) -> Path | None:
    if word.startswith("file:"):
        # An index's pages may link to files beside its folder: the parent goes along.
        return Path(unquote(urlsplit(word).path)).parent
    return Path(word) if word.startswith("/") else None


def main() -> None:
    """Write the file named on the command line and print the mounts."""
    target = Path(sys.argv[1]).resolve()
    values = settings()
    parser = configparser.RawConfigParser()
    parser["global"] = {key: "\n".join(value.split()) for key, value in values.items()}
    with target.open("w") as file:
        parser.write(file)
    print(f"--volume={target}:{CONTAINER_PIP_CONF}:ro")
    for path in named_paths(values):
        print(f"--volume={path}:{path}:ro")


if __name__ == "__main__":
    main()
