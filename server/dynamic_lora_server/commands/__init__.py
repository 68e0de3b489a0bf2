"""Subcommands of `dynamic-lora` that need the server's dependencies.

The client's command finds them through the entry point group `dynamic_lora.commands`;
each module imports torch only when its command runs.
"""
