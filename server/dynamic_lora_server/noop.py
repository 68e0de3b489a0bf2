"""The default for callbacks nobody passed."""


def noop() -> None:
    """Do nothing."""
