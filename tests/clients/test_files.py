from pathlib import Path

import pytest

from dynamic_lora_adapters.files.archive import ADAPTER_FILES
from dynamic_lora_client import InvalidArgument, UploadFiles
from dynamic_lora_client.files import SENT_FILES


def test_directory_gives_what_the_server_reads_as_its_trainer_left_it(peft_dir: Path) -> None:
    read = ["chat_template.jinja", "generation_config.json", "task.json", "tokenizer_config.json"]
    left = ["README.md", "adapter_model.bin", "debug.log", "eval.json", "loss.png"]
    for name in read + left:
        (peft_dir / name).write_bytes(b"x")
    files = UploadFiles.find(peft_dir)
    names = [path.name for path in files.paths]
    assert names == sorted([*read, "adapter_config.json", "adapter_model.safetensors"])
    assert files.skipped == (*left, "optimizer.pt")


def test_what_is_sent_is_what_the_server_reads() -> None:
    assert SENT_FILES == ADAPTER_FILES


def test_weights_that_are_a_pickle_alone_are_not_sent(peft_dir: Path) -> None:
    (peft_dir / "adapter_model.safetensors").rename(peft_dir / "adapter_model.bin")
    with pytest.raises(InvalidArgument, match="are a pickle.*safe_serialization=True"):
        UploadFiles.find(peft_dir)


def test_directory_without_weights(peft_dir: Path) -> None:
    (peft_dir / "adapter_model.safetensors").unlink()
    with pytest.raises(InvalidArgument, match=r"has no adapter_model\.safetensors"):
        UploadFiles.find(peft_dir)


def test_file_gives_itself(tmp_path: Path) -> None:
    archive = tmp_path / "ner.zip"
    archive.write_bytes(b"PK")
    assert UploadFiles.find(str(archive)).paths == (archive,)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="There is no file or directory .*missing"):
        UploadFiles.find(tmp_path / "missing")


def test_path_that_cannot_be_looked_at() -> None:
    with pytest.raises(InvalidArgument, match="Cannot read 'aaa.*: File name too long"):
        UploadFiles.find("a" * 5000)


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
