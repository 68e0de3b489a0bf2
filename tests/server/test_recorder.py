import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dynamic_lora_server.recorder import Arrival, TraceRecorder

ARRIVAL = Arrival(arrival_s=0.5, adapter="a", num_prompt_tokens=3, num_output_tokens=4)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_written_as_each_answer_ends(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    recorder = TraceRecorder(path)
    before = recorder.now()
    recorder.record(ARRIVAL)
    assert lines(path) == [asdict(ARRIVAL)]
    assert recorder.now() > before >= 0
    recorder.close()
    recorder.record(ARRIVAL)
    assert lines(path) == [asdict(ARRIVAL)]


def test_no_trace_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("precious")
    for number in (2, 3):
        recorder = TraceRecorder(path)
        recorder.record(ARRIVAL)
        recorder.close()
        assert recorder.path == tmp_path / f"trace-{number}.jsonl"
        assert lines(recorder.path) == [asdict(ARRIVAL)]
    assert path.read_text() == "precious"


def test_an_empty_file_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.touch()
    recorder = TraceRecorder(path)
    recorder.close()
    assert recorder.path == path


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_ends_the_recording_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(Path, "open", lambda *_, **__: full)
        recorder = TraceRecorder(Path("trace.jsonl"))
        recorder.record(ARRIVAL)
        recorder.record(ARRIVAL)
    assert [record.message for record in caplog.records] == [
        "The trace ends here: [Errno 28] No space left on device"
    ]
