"""Files around the code: container, compose, make, pins, version."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dynamic_lora_client import __version__
from dynamic_lora_server.config import ServerConfig

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {name: Version(version) for name, version in pairs}


def _requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    return [r for r in map(Requirement, lines) if canonicalize_name(r.name) != PROJECT["name"]]


def _compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return document


def _validate(path: Path) -> subprocess.CompletedProcess[str]:
    """Check a compose file against the compose specification's schema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    return subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)


def test_the_compose_file_follows_the_specification() -> None:
    result = _validate(ROOT / "docker-compose.yml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_specification_finds_a_misspelt_key(tmp_path: Path) -> None:
    document = _compose()
    document["services"]["server"]["helthcheck"] = {}
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(yaml.safe_dump(document))
    result = _validate(broken)
    assert result.returncode == 1
    assert "helthcheck" in result.stdout


@pytest.mark.parametrize("service", ["server", "server-gpu"])
def test_compose_keeps_what_the_image_declares(service: str) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    volumes = re.findall(r'"(/[^"]+)"', re.search(r"^VOLUME (.*)$", dockerfile, re.M)[1])  # type: ignore[index]
    settings = _compose()["services"][service]
    assert sorted(volume.partition(":")[2] for volume in settings["volumes"]) == sorted(volumes)
    exposed = re.search(r"^EXPOSE (\d+)$", dockerfile, re.M)
    assert exposed is not None
    assert settings["ports"] == [f"${{DYNAMIC_LORA_LISTEN_PORT:-{exposed[1]}}}:{exposed[1]}"]


def _recipe(target: str, *variables: str, **environment: str) -> str:
    """What make would run, given variables on its command line and in the environment."""
    command = ["make", "--dry-run", "--no-print-directory", target, *variables]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return run.stdout


def test_make_takes_an_address_from_its_command_line_and_none_by_chance() -> None:
    chance = {"HOST": "x86_64-conda-linux-gnu", "PORT": "tcp://10.0.0.1:80"}
    meant = {"DYNAMIC_LORA_LISTEN_HOST": "::1", "DYNAMIC_LORA_LISTEN_PORT": "81"}
    assert "--host 127.0.0.1 --port 8000" in _recipe("serve", **chance)
    assert "--host ::1 --port 81" in _recipe("serve", **chance, **meant)
    assert "--host ::2 --port 82" in _recipe("serve", "HOST=::2", "PORT=82", **meant)


def test_the_cpu_build_of_torch_comes_from_one_index_where_it_is_asked_for() -> None:
    index = re.search(r"^ARG TORCH_CPU_INDEX=(.+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert index is not None
    arguments = _compose()["services"]["server"]["build"]["args"]
    assert arguments["TORCH_CPU_INDEX"] == f"${{TORCH_CPU_INDEX-{index[1]}}}"
    assert f"--extra-index-url {index[1]} torch\n" in _recipe("setup", "--always-make", "TORCH=cpu")
    assert index[1] not in _recipe("setup", "--always-make", TORCH="cpu")


def test_make_refuses_a_build_of_torch_that_it_does_not_know() -> None:
    command = ["make", "--dry-run", "--always-make", "setup", "TORCH=rocm"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "TORCH=rocm: expected cpu or nothing" in run.stderr


def test_the_image_runs_as_numbers_by_which_it_is_known_to_be_no_root() -> None:
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", (ROOT / "Dockerfile").read_text(), re.M)


@pytest.mark.parametrize("service", ["server", "server-gpu"])
def test_compose_waits_for_the_server_to_let_requests_end(service: str) -> None:
    period = re.fullmatch(r"(\d+)s", _compose()["services"][service]["stop_grace_period"])
    assert period is not None
    assert int(period[1]) >= ServerConfig().grace_seconds + 10


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    pins = _pins()
    for requirement in _requirements():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no pin: run `make pins > constraints.txt`"
        assert pins[name] in requirement.specifier, f"{name}=={pins[name]} is outside {requirement}"


def test_pins_name_releases_and_no_builds() -> None:
    assert [name for name, version in _pins().items() if version.local] == []


def test_the_build_backend_is_pinned() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for line in document["build-system"]["requires"]:
        (specifier,) = Requirement(line).specifier
        assert specifier.operator == "=="


def test_the_licences_are_those_of_the_code_and_of_the_shipped_adapters() -> None:
    cards = list((ROOT / "adapters" / "dynamic_lora_adapters" / "shipped").glob("*/task.json"))
    licenses = {path.parent.name: json.loads(path.read_text())["license"] for path in cards}
    stated = PROJECT["license"]
    assert stated.split(" AND ") == ["Apache-2.0", *sorted(set(licenses.values()) - {"Apache-2.0"})]
    assert f'licenses="{stated}"' in (ROOT / "Dockerfile").read_text()
    notice = (ROOT / "NOTICE").read_text()
    for adapter, license in licenses.items():
        names = {"Apache-2.0": "Apache License, Version 2.0"}
        assert re.search(rf"^{adapter} .*{names.get(license, license)}", notice, re.M)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in PROJECT["license-files"]} <= set(ignored)


def test_the_changelog_opens_with_the_version() -> None:
    headings = re.findall(r"^## \[?(\d[^\]\s]*)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[:1] == [__version__]
