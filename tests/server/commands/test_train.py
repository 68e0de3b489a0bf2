"""The `train` command on a tiny base."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dynamic_lora_server.commands.train import train
from tests.server.training.test_config import recipe, write
from tests.support.models import save_tiny_base


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A data folder, a tiny base and a recipe."""
    line = json.dumps({"input": "a", "output": "b"})
    (tmp_path / "train.jsonl").write_text(f"{line}\n" * 4, encoding="utf-8")
    save_tiny_base(tmp_path / "base")
    write(tmp_path / "recipe.yaml", recipe(base=str(tmp_path / "base")))
    return tmp_path


def invoke(*arguments: str | Path) -> Any:
    """Run the command as a terminal would."""
    app = typer.Typer()
    app.command()(train)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_writes_the_adapter_and_says_so(workplace: Path) -> None:
    output = workplace / "made"
    result = invoke(workplace / "recipe.yaml", "--data", workplace, "--output", output)
    assert result.exit_code == 0, result.output
    assert "trained on 4 answers; loss of the last steps" in result.stdout.replace("\n", " ")
    assert "step 1/1 loss" in result.stderr
    assert (output / "task.json").is_file()


def test_base_overrides_where_the_weights_come_from(workplace: Path) -> None:
    write(workplace / "recipe.yaml", recipe(base="org/name", output=str(workplace / "made")))
    result = invoke(workplace / "recipe.yaml", "--data", workplace, "--base", workplace / "base")
    assert result.exit_code == 0, result.output
    saved = json.loads((workplace / "made" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["base_model_name_or_path"] == "org/name"


def test_faults_end_in_one_line(workplace: Path) -> None:
    result = invoke(workplace / "recipe.yaml", "--data", workplace / "elsewhere")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "No such file" in result.stderr
    assert "Traceback" not in result.output


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_trained(
    workplace: Path,
) -> None:
    (workplace / "file").touch()
    output = workplace / "file" / "made"
    result = invoke(workplace / "recipe.yaml", "--data", workplace, "--output", output)
    assert result.exit_code == 1
    assert f"error: the output {output} cannot be written" in result.stderr
    assert "step 1" not in result.output


def test_a_base_that_cannot_be_had_is_refused_with_what_to_do(workplace: Path) -> None:
    result = invoke(workplace / "recipe.yaml", "--data", workplace, "--base", "/no/such/folder")
    assert result.exit_code == 1
    assert "neither a folder here nor a model id" in result.stderr
    assert "fix: Give the path of a model folder" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_where_its_adapter_is(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def interrupt(*_: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr("dynamic_lora_server.commands.train._print_line", interrupt)
    output = workplace / "made"
    result = invoke(workplace / "recipe.yaml", "--data", workplace, "--output", output)
    assert result.exit_code == 130
    assert f"the adapter as it is now is in {output}-partial" in result.stderr
    assert (workplace / "made-partial" / "task.json").is_file()


class Lost(io.StringIO):
    """A stream that takes nothing about the steps of a run."""

    def __init__(self, number: int, terminal: bool) -> None:
        super().__init__()
        self._number = number
        self._terminal = terminal
        self.num_lost = 0

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        if "step 1/" in text or "Training" in text:
            self.num_lost += 1
            raise OSError(self._number, os.strerror(self._number))
        return super().write(text)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_progress_that_cannot_be_written_ends_no_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, number: int, terminal: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Lost(number, terminal)
    monkeypatch.setattr("sys.stderr", stream)
    train(workplace / "recipe.yaml", data=workplace, output=workplace / "made", device="cpu")
    assert stream.num_lost > 0
    assert (workplace / "made" / "task.json").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_last_line_that_cannot_be_written_fails_no_run(workplace: Path) -> None:
    """What comes next in a script is to run: the adapter is there."""
    command = "import typer; from dynamic_lora_server.commands.train import train; typer.run(train)"
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-c", command, "recipe.yaml", "--data", ".", "--output", "made"],
            cwd=workplace,
            stdout=full,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=120,
            check=False,
        )
    assert (done.returncode, "Error" in done.stderr) == (0, False), done.stderr
    assert (workplace / "made" / "task.json").is_file()


def test_the_loss_of_the_dev_split_is_printed(workplace: Path) -> None:
    dataset = {"kind": "jsonl", "train": "train.jsonl", "dev": "train.jsonl"}
    base = str(workplace / "base")
    write(workplace / "recipe.yaml", recipe(base=base, dataset=dataset))
    output = workplace / "made"
    result = invoke(workplace / "recipe.yaml", "--data", workplace, "--output", output)
    assert result.exit_code == 0, result.output
    assert "step 1/1 dev loss" in result.stderr
    assert "dev loss" in result.stdout


def test_a_device_is_chosen_by_name(workplace: Path) -> None:
    result = invoke(workplace / "recipe.yaml", "--data", workplace, "--device", "tpu")
    assert result.exit_code == 1
    assert "error: the device tpu is none of auto, cpu, cuda" in result.stderr
