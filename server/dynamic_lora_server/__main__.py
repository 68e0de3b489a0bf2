"""`python -m dynamic_lora_server` is `dynamic-lora serve`."""

import typer

from dynamic_lora_server.commands.serve import serve


def main() -> None:
    """Run the server with the options of the command line."""
    typer.run(serve)


if __name__ == "__main__":
    main()
