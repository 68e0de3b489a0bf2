from pathlib import Path

import pytest

from dynamic_lora_client import InvalidArgument, UploadFiles


def test_directory_gives_its_visible_files_without_training_state(peft_dir: Path) -> None:
    (peft_dir / "task.json").write_text("{}")
    (peft_dir / "training_args.bin").write_bytes(b"x")
    files = UploadFiles.find(peft_dir)
    names = [path.name for path in files.paths]
    assert names == ["adapter_config.json", "adapter_model.safetensors", "task.json"]
    assert files.skipped == ("optimizer.pt", "training_args.bin")


def test_pickled_weights_are_sent_for_the_server_to_refuse(peft_dir: Path) -> None:
    (peft_dir / "adapter_model.bin").write_bytes(b"x")
    assert "adapter_model.bin" in {path.name for path in UploadFiles.find(peft_dir).paths}


def test_file_gives_itself(tmp_path: Path) -> None:
    archive = tmp_path / "ner.zip"
    archive.write_bytes(b"PK")
    assert UploadFiles.find(str(archive)).paths == (archive,)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="There is no file or directory .*missing"):
        UploadFiles.find(tmp_path / "missing")


def test_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="it has no adapter_config.json"):
        UploadFiles.find(tmp_path)


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone.zip"
    files = UploadFiles(paths=(gone,))
    with pytest.raises(InvalidArgument, match=r"Cannot read .*gone\.zip"), files.open():
        pass


def test_reads_are_reported_against_the_sum_and_files_are_closed(peft_dir: Path) -> None:
    seen: list[tuple[int, int]] = []
    with UploadFiles.find(peft_dir).open(lambda *sent: seen.append(sent)) as parts:
        handles = [part[1][1] for part in parts]
        for handle in handles:
            while handle.read(65_536):
                pass
    total = sum((peft_dir / part[1][0]).stat().st_size for part in parts)
    assert seen[0] == (8, total)
    assert seen[-1] == (total, total)
    assert len(seen) > 3
    assert all(handle.closed for handle in handles)
