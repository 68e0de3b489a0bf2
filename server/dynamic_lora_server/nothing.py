"""What is called where nobody asked to be called."""


def nothing() -> None:
    """Nobody wants to know."""
