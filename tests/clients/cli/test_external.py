"""Subcommands that other packages bring, on a real package in a temporary folder."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dynamic_lora_client.cli import ExitCode, create_app

_ECHO = """
from typing import Annotated
import typer

def echo(
    words: list[str],
    port: Annotated[int, typer.Option("--port", "-p", help="Where to listen.")] = 1,
    loud: bool = False,
) -> None:
    typer.echo(f"{words} {port} {loud}")
    if loud:
        raise typer.Exit(7)
"""

_ENTRY_POINTS = """
[dynamic_lora.commands]
echo = plugin_echo:echo
needy = plugin_needy:needy
late = plugin_late:late
broken = plugin_broken:broken
faulty = plugin_faulty:faulty
"""


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)
    (tmp_path / "plugin_echo.py").write_text(_ECHO)
    (tmp_path / "plugin_needy.py").write_text("import no_such_package\n")
    (tmp_path / "plugin_late.py").write_text("def late() -> None:\n    import no_such_package\n")
    (tmp_path / "plugin_broken.py").write_text(
        "def broken() -> None:\n    raise ImportError('no')\n"
    )
    (tmp_path / "plugin_faulty.py").write_text("import dynamic_lora_client.no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("plugin_echo", "plugin_needy", "plugin_late", "plugin_broken", "plugin_faulty"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_commands_are_listed_without_being_imported() -> None:
    result = CliRunner().invoke(create_app(), ["--help"])
    assert "Provided by plugin_echo." in result.stdout
    assert "needy" in result.stdout
    assert not {"plugin_echo", "plugin_needy"} & set(sys.modules)


def test_arguments_and_options_reach_the_command() -> None:
    result = CliRunner().invoke(create_app(), ["echo", "a", "-p8", "b", "--loud"])
    assert result.stdout == "['a', 'b'] 8 True\n"
    assert result.exit_code == 7


def test_help_is_the_commands_own() -> None:
    result = CliRunner().invoke(create_app(), ["echo", "--help"])
    assert result.exit_code == ExitCode.OK
    assert "Where to listen." in result.stdout


def test_wrong_options_are_usage_errors() -> None:
    result = CliRunner().invoke(create_app(), ["echo", "a", "--nope"])
    assert result.exit_code == ExitCode.USAGE
    assert "--nope" in result.stderr


@pytest.mark.parametrize("name", ["needy", "late"])
def test_missing_packages_are_told_with_the_line_that_installs_them(name: str) -> None:
    result = CliRunner().invoke(create_app(), [name])
    assert result.exit_code == ExitCode.MISSING_DEPENDENCY
    assert "no_such_package" in result.stderr
    assert "fix: In a checkout of Dynamic LoRA: pip install '.[server]'" in result.stderr


def test_a_fault_of_the_package_itself_is_not_hidden() -> None:
    result = CliRunner().invoke(create_app(), ["faulty"])
    assert isinstance(result.exception, ModuleNotFoundError)


def test_an_import_that_fails_for_another_reason_is_no_missing_package() -> None:
    result = CliRunner().invoke(create_app(), ["broken"])
    assert type(result.exception) is ImportError
