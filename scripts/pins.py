"""Prints the pins of constraints.txt: what the project's extras reach in this environment.

Run with the environment's own interpreter: `.venv/bin/python scripts/pins.py`.
A local version part (`+cpu`) is dropped, so that the pins fit any build of a release.
"""

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "dynamic-lora"
HEADER = (
    "# What is tested, printed by scripts/pins.py. Install with: pip install -c constraints.txt"
)


def reachable(root: Requirement) -> dict[str, str]:
    """Versions of every installed distribution that `root` needs, by canonical name."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [root]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            found = distribution(name)
            versions[name] = found.version.partition("+")[0]
            queue += _needed(found.requires or [], extra)
    return versions


def _needed(lines: list[str], extra: str) -> list[Requirement]:
    requirements = [Requirement(line) for line in lines]
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]


def main() -> None:
    """Print one `name==version` a line, sorted; the project itself is left out."""
    try:
        versions = reachable(Requirement(f"{PROJECT}[dev]"))
    except PackageNotFoundError as error:
        raise SystemExit(f"{error}: install the project with its [dev] extra first") from None
    print(HEADER)
    for name in sorted(versions.keys() - {PROJECT}):
        print(f"{name}=={versions[name]}")


if __name__ == "__main__":
    main()
