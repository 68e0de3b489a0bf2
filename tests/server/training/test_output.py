"""The folder that a run writes: what it may replace, and what becomes of an adapter without it."""

import tempfile
from pathlib import Path

import pytest

from dynamic_lora_server.training import TrainingConfigError, TrainingError
from dynamic_lora_server.training.output import check_output, write_output

OLD = {"adapter_config.json": b"old", "adapter_model.safetensors": b"old", "task.json": b"old"}
NEW = dict.fromkeys(OLD, b"new")


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder of temporary files, for this test alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_what_another_run_left_is_replaced_whole(tmp_path: Path) -> None:
    output = check_output(tmp_path / "new" / "out")
    write_output(output, OLD)
    write_output(check_output(output), {"task.json": b"new"})
    assert content(output) == {"task.json": b"new"}
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("name", ["notes.txt", "src"])
def test_a_folder_of_other_things_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    write_output(output, OLD)
    other = output / name
    if other.suffix:
        other.touch()
    else:
        other.mkdir()
    with pytest.raises(TrainingConfigError, match=f"it holds {name}, which is no file of a train"):
        check_output(output)
    assert other.exists()


def test_a_folder_with_the_name_of_a_file_is_another_thing(tmp_path: Path) -> None:
    (tmp_path / "task.json").mkdir()
    with pytest.raises(TrainingConfigError, match=r"it holds task\.json"):
        check_output(tmp_path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(TrainingConfigError, match="it is a file"):
        check_output(tmp_path / "out")


@pytest.mark.parametrize("output", [".", "..", "../here"])
def test_where_the_command_runs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(TrainingConfigError, match="the folder that the command runs in"):
        check_output(Path(output))


def test_a_mount_point_is_refused() -> None:
    with pytest.raises(TrainingConfigError, match="where a file system begins"):
        check_output(Path("/"))


def test_a_tilde_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output(Path("~/made/out")) == tmp_path.resolve() / "made" / "out"
    with pytest.raises(TrainingConfigError, match="cannot be written"):
        check_output(Path("~nobody-by-this-name/out"))


def test_the_older_run_is_put_back_where_the_new_cannot_take_its_place(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rename = tmp_path / "out", Path.rename
    write_output(output, OLD)

    def refuse_made(self: Path, target: Path) -> Path:
        if self.name == "made":
            raise OSError("no more of this")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_made)
    with pytest.raises(TrainingError, match="no more of this; the adapter is in") as caught:
        write_output(output, NEW)
    assert content(output) == OLD
    (kept,) = temporary.glob("out-*")
    assert str(kept) in str(caught.value)
    assert content(kept) == NEW


def test_what_came_into_the_folder_meanwhile_is_kept(tmp_path: Path, temporary: Path) -> None:
    output = check_output(tmp_path / "out")
    output.mkdir()
    (output / "thesis.tex").touch()
    with pytest.raises(TrainingError, match=r"it holds thesis\.tex.*the adapter is in"):
        write_output(output, NEW)
    assert list(content(output)) == ["thesis.tex"]
    assert [content(folder) for folder in temporary.iterdir()] == [NEW]


def test_an_adapter_that_can_be_kept_nowhere_is_said_to_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = check_output(tmp_path / "gone" / "out")
    output.parent.rmdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(TrainingError, match="nor could the adapter be kept elsewhere"):
        write_output(output, NEW)
