"""The version that the server says it is."""

from importlib.metadata import PackageNotFoundError, version

_NOT_INSTALLED = "0+checkout"


def own_version() -> str:
    """That of the installed distribution; `0+checkout` where the sources run without one."""
    try:
        return version("dynamic-lora")
    except PackageNotFoundError:
        return _NOT_INSTALLED
