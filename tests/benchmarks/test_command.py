"""What the benchmarks' commands share."""

import argparse
import json
import os
from pathlib import Path

import pytest

from benchmarks.command import command, counts, exit_with_reason, write_json
from benchmarks.errors import BenchmarkError, RequestFailed


def test_a_command_is_called_as_it_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    root = command("prefix", "What it does.\n\n    an example")
    root.add_argument("--clients", type=counts)
    assert root.parse_args(["--clients", "1,8,32"]) == argparse.Namespace(clients=[1, 8, 32])
    with pytest.raises(SystemExit):
        root.parse_args(["--clients", "1,eight"])
    assert "argument --clients: invalid counts value: '1,eight'" in capsys.readouterr().err
    assert root.format_help().startswith("usage: python -m benchmarks.prefix")
    assert "    an example" in root.format_help()


@pytest.mark.parametrize("error", [BenchmarkError("no room"), RequestFailed("no room")])
def test_a_failed_measurement_ends_with_its_reason(error: BenchmarkError) -> None:
    with (
        pytest.raises(SystemExit, match=r"benchmarks\.prefix: no room"),
        exit_with_reason("prefix"),
    ):
        raise error


def test_results_are_written_whole_to_a_folder_that_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    for document in ({"first": 1}, {"second": [2, 3]}):
        write_json(document, path)
        assert json.loads(path.read_text()) == document
    assert list(path.parent.iterdir()) == [path]


def test_results_without_a_file_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"first": 1}, None)
    assert capsys.readouterr().out == '{\n  "first": 1\n}\n'


def test_a_device_is_written_to_and_not_replaced() -> None:
    reader, writer = os.openpty()
    try:
        write_json({}, Path(os.ttyname(writer)))
        assert os.read(reader, 100).split() == [b"{}"]
    finally:
        os.close(reader)
        os.close(writer)
