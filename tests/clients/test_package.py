import subprocess
import sys
from types import ModuleType

import dynamic_lora_client

# httpx brings its own; what matters is what comes on top of it.
_IMPORTED = """
import sys
import httpx
before = set(sys.modules)
import dynamic_lora_client
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
print(*{"torch", "fastapi", "typer", "pydantic"} & set(sys.modules))
"""


def test_all_is_sorted_and_lists_everything_exported() -> None:
    exported = {
        name
        for name, value in vars(dynamic_lora_client).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert dynamic_lora_client.__all__ == sorted(exported | {"__version__"})


def test_library_imports_httpx_and_the_standard_library_only() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _IMPORTED], capture_output=True, text=True, check=True
    )
    added, heavy = run.stdout.splitlines()
    assert "dynamic_lora_client" in added.split()
    assert set(added.split()) - {"dynamic_lora_client"} <= sys.stdlib_module_names
    assert heavy == ""


def test_terminal_command_imports_no_server() -> None:
    code = (
        "import sys; from dynamic_lora_client.cli import create_app; create_app();"
        "print(*{'torch', 'fastapi', 'dynamic_lora_server'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
