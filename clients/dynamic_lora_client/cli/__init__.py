"""The terminal command `dynamic-lora`."""

from dynamic_lora_client.cli.app import create_app, main
from dynamic_lora_client.cli.exit_codes import ExitCode

__all__ = ["ExitCode", "create_app", "main"]
