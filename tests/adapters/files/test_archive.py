import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dynamic_lora_adapters import AdapterTooLarge, Intake, InvalidAdapter, UnsafeArchive
from dynamic_lora_adapters.files.archive import IGNORED_FILES, UploadLimits

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "task.json"
FILES = {CONFIG: b"{}", WEIGHTS: b"w" * 5000, CARD: b'{"a": 1}'}

Pack = Callable[[Mapping[str, bytes]], bytes]


def pack_zip(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            # A ZipInfo keeps the name as it is, traversal included.
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def pack_tar(files: Mapping[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pack_tar_gz(files: Mapping[str, bytes]) -> bytes:
    return gzip.compress(pack_tar(files))


def pack_gnu_tar(files: Mapping[str, bytes]) -> bytes:
    return pack_tar(files, tarfile.GNU_FORMAT)


PACKERS: dict[str, Pack] = {
    "zip": pack_zip,
    "tar": pack_tar,
    "tar.gz": pack_tar_gz,
    "gnu tar": pack_gnu_tar,
}
packers = pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)


def take(folder: Path, name: str, data: bytes, limits: UploadLimits | None = None) -> Intake:
    intake = Intake(folder, limits)
    intake.add(name, io.BytesIO(data))
    return intake


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@packers
@pytest.mark.parametrize("prefix", ["", "./", "ner/", "./ner/"])
@pytest.mark.parametrize("filename", ["ner.zip", "upload", "ner.dat"])
def test_archives_are_known_by_content(
    pack: Pack, prefix: str, filename: str, tmp_path: Path
) -> None:
    data = pack({prefix + name: content for name, content in FILES.items()})
    assert take(tmp_path, filename, data).ignored_files == []
    assert contents(tmp_path) == FILES


def test_loose_files(tmp_path: Path) -> None:
    intake = Intake(tmp_path)
    for name, data in FILES.items():
        intake.add(f"folder/{name}", io.BytesIO(data))
    intake.add("README.md", io.BytesIO(b"PK\x03\x04"))
    assert contents(tmp_path) == FILES
    assert intake.ignored_files == ["README.md"]


@packers
def test_harmless_files_are_dropped_and_told(pack: Pack, tmp_path: Path) -> None:
    names = [*sorted(IGNORED_FILES), "._adapter_config.json", "__MACOSX/ner/._task.json"]
    names += ["rng_state.pth", "rng_state_3.pth", "random_states_0.pkl"]
    extra = {(n if "/" in n else f"ner/{n}"): b"x" for n in names}
    intake = take(tmp_path, "a.zip", pack({f"ner/{CONFIG}": b"{}"} | extra))
    assert contents(tmp_path) == {CONFIG: b"{}"}
    assert sorted(Path(name).name for name in intake.ignored_files) == sorted(
        Path(name).name for name in names
    )


def test_folders_in_archives_are_no_files(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in (".", "./ner"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
    take(tmp_path, "a.tar", buffer.getvalue())
    take(tmp_path, "a.zip", pack_zip({"ner/": b""}))
    assert contents(tmp_path) == {}


@packers
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../adapter_config.json", "points outside the upload"),
        ("a/../../adapter_config.json", "points outside the upload"),
        ("/etc/adapter_config.json", "points outside the upload"),
        ("..\\adapter_config.json", "points outside the upload"),
        ("C:/adapter_config.json", "points outside the upload"),
        ("a/b/adapter_config.json", "lies in a folder of its own"),
        ("evil.py", "belongs to no adapter"),
        ("weights.pt", "is a pickle"),
        ("weights.pth", "is a pickle"),
        ("model.PKL", "is a pickle"),
        ("last.ckpt", "is a pickle"),
    ],
)
def test_members_that_have_no_place_are_refused(
    pack: Pack, name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidAdapter, match=message):
        take(tmp_path, "a.zip", pack({name: b"x"}))
    assert contents(tmp_path) == {}


def test_a_tar_folder_that_leaves_the_upload_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("../out")
        info.type = tarfile.DIRTYPE
        archive.addfile(info)
    with pytest.raises(UnsafeArchive, match="points outside"):
        take(tmp_path, "a.tar", buffer.getvalue())


@packers
def test_two_top_folders_are_refused(pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(UnsafeArchive, match="'b/task.json' lies in a folder of its own"):
        take(tmp_path, "a.zip", pack({f"a/{CONFIG}": b"{}", f"b/{CARD}": b"{}"}))


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "x.pth", "x.pkl"])
def test_a_loose_pickle_is_refused_unread(name: str, tmp_path: Path) -> None:
    class Unreadable(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise AssertionError("a pickle was read")

    with pytest.raises(UnsafeArchive, match="is a pickle, which can run code") as caught:
        Intake(tmp_path).add(name, Unreadable())
    assert caught.value.field == name
    assert "adapter_model.safetensors" in (caught.value.fix or "")


def test_an_unknown_loose_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="'weights.gguf' belongs to no adapter") as caught:
        take(tmp_path, "weights.gguf", b"GGUF")
    assert CONFIG in (caught.value.fix or "")


@packers
def test_names_of_absurd_length_are_refused_without_repeating_them(
    pack: Pack, tmp_path: Path
) -> None:
    with pytest.raises(UnsafeArchive, match=r"^A file's name is 5000 characters long\.$"):
        take(tmp_path, "a.zip", pack({"x" * 5000: b""}))


@pytest.mark.parametrize("name", ["", ".", "./", "\0", "..", "/adapter_config.json"])
def test_empty_and_outside_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter):
        take(tmp_path, name, b"{}")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_tar_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(CONFIG)
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(UnsafeArchive, match="is a link or a device"):
        take(tmp_path, "a.tar", buffer.getvalue())
    assert contents(tmp_path) == {}


def test_zip_links_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo(CONFIG)
        info.create_system = 3
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UnsafeArchive, match="is a link or a device"):
        take(tmp_path, "a.zip", buffer.getvalue())


def test_encrypted_and_exotic_zips_are_refused(tmp_path: Path) -> None:
    data = bytearray(pack_zip({CONFIG: b"{}"}))
    # The flag word of the central directory's entry.
    data[data.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(InvalidAdapter, match="is encrypted"):
        take(tmp_path, "a.zip", bytes(data))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr(CONFIG, "{}")
    with pytest.raises(InvalidAdapter, match="packed in a way that is not read"):
        take(tmp_path, "a.zip", buffer.getvalue())


@packers
def test_a_file_may_come_once(pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(UnsafeArchive, match=f"'{CONFIG}' comes twice"):
        take(tmp_path, "a.zip", pack({CONFIG: b"{}", f"./{CONFIG}": b"{}"}))
    intake = Intake(tmp_path)
    intake.add(CARD, io.BytesIO(b"{}"))
    with pytest.raises(UnsafeArchive, match=f"'{CARD}' comes twice"):
        intake.add(CARD, io.BytesIO(b"{}"))


@packers
def test_a_bomb_is_stopped_while_it_unpacks(pack: Pack, tmp_path: Path) -> None:
    bomb = pack({WEIGHTS: bytes(50_000_000)})
    with pytest.raises(AdapterTooLarge, match="larger than 1000000 bytes"):
        take(tmp_path, "a.zip", bomb, UploadLimits(max_bytes=1_000_000))
    assert sum(len(data) for data in contents(tmp_path).values()) <= 2_000_000


def test_a_bomb_hidden_in_an_ignored_file_is_stopped(tmp_path: Path) -> None:
    bomb = pack_tar_gz({"README.md": bytes(50_000_000), CONFIG: b"{}"})
    with pytest.raises(AdapterTooLarge, match="larger than 1000000 bytes"):
        take(tmp_path, "a.tar.gz", bomb, UploadLimits(max_bytes=1_000_000))


def test_a_bomb_of_a_tar_header_is_stopped(tmp_path: Path) -> None:
    bomb = gzip.compress(pack_gnu_tar({"x" * 2_000_000: b""}))
    with pytest.raises(UnsafeArchive, match="oversized header"):
        take(tmp_path, "a.tar.gz", bomb)


def test_a_tar_whose_headers_name_each_other_is_broken(tmp_path: Path) -> None:
    long_name = pack_gnu_tar({"x" * 200: b""})[:1024]  # a header, and the name behind it
    with pytest.raises(InvalidAdapter, match="archive 'a.tar' is broken: maximum recursion"):
        take(tmp_path, "a.tar", long_name * 800)


def test_names_that_are_not_utf8_can_be_told(tmp_path: Path) -> None:
    names = {f"mod\udce8le/{name}": data for name, data in FILES.items()}
    intake = take(tmp_path, "a.tar", pack_gnu_tar({**names, "mod\udce8le/README.md": b""}))
    assert intake.ignored_files == ["mod?le/README.md"]
    assert contents(tmp_path) == FILES


def test_a_zip_of_endless_entries_is_not_read_whole(tmp_path: Path) -> None:
    """Folders take no room in it but in its directory, of which an object is made for each."""
    entries = pack_zip({f"folder-{number:06}/": b"" for number in range(30_000)})
    with pytest.raises(UnsafeArchive, match="directory is oversized"):
        take(tmp_path, "a.zip", entries)


def test_a_zip_whose_members_lie_before_its_beginning_is_broken(tmp_path: Path) -> None:
    """In a file; other streams say by themselves what they cannot do."""
    data = bytearray(pack_zip(FILES))
    place = len(data) - 22 + 16  # where the end record has the directory's offset
    data[place : place + 4] = (int.from_bytes(data[place : place + 4], "little") + 9).to_bytes(
        4, "little"
    )
    (tmp_path / "a.zip").write_bytes(data)
    with (tmp_path / "a.zip").open("rb") as stream, pytest.raises(InvalidAdapter, match="broken"):
        Intake(tmp_path).add("a.zip", stream)


def test_a_zip_that_lies_about_sizes_gains_nothing(tmp_path: Path) -> None:
    data = bytearray(pack_zip({WEIGHTS: bytes(1_000_000)}))
    directory = data.index(b"PK\x01\x02")
    data[directory + 24 : directory + 28] = (10).to_bytes(4, "little")
    with pytest.raises(InvalidAdapter, match="is broken"):
        take(tmp_path, "a.zip", bytes(data), UploadLimits(max_bytes=100_000))
    assert len(contents(tmp_path).get(WEIGHTS, b"")) <= 100_000


@packers
def test_the_number_of_members_is_capped(pack: Pack, tmp_path: Path) -> None:
    many = {f"__MACOSX/{i}": b"" for i in range(20)}
    with pytest.raises(AdapterTooLarge, match="more than 10 files"):
        take(tmp_path, "a.zip", pack(many), UploadLimits(max_files=10))


def test_loose_files_count_together(tmp_path: Path) -> None:
    intake = Intake(tmp_path, UploadLimits(max_bytes=10))
    intake.add(CONFIG, io.BytesIO(b"x" * 6))
    with pytest.raises(AdapterTooLarge, match="larger than 10 bytes"):
        intake.add(WEIGHTS, io.BytesIO(b"x" * 6))


@packers
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_truncated_archives_are_refused(pack: Pack, keep: float, tmp_path: Path) -> None:
    noise = bytes(range(256)) * 400
    data = pack({WEIGHTS: noise, CONFIG: noise})
    # Tar pads its end with blocks of zeros that may be missing.
    used = len(data.rstrip(b"\0"))
    with pytest.raises(InvalidAdapter, match=r"^The archive 'a\.zip' is broken"):
        take(tmp_path, "a.zip", data[: int(used * keep)])


@given(st.binary(max_size=300), st.sampled_from([b"PK\x03\x04", b"\x1f\x8b", b"\x1f\x8b\x08\0"]))
def test_garbage_is_refused(data: bytes, magic: bytes) -> None:
    with TemporaryDirectory() as folder, pytest.raises(InvalidAdapter):
        take(Path(folder), "a.zip", magic + data)


@given(
    st.dictionaries(
        st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=30)
        | st.from_regex(r"(\.\./|/|a/|\./)*(task\.json|adapter_config\.json)", fullmatch=True),
        st.binary(max_size=10),
        max_size=4,
    ),
    st.sampled_from(["zip", "tar", "tar.gz"]),
)
@example({"\x00": b""}, "zip")  # a zip file's names end before the first NUL
def test_no_name_writes_outside_the_folder(files: dict[str, bytes], kind: str) -> None:
    with TemporaryDirectory() as outer:
        folder = Path(outer) / "deep" / "inside"
        folder.mkdir(parents=True)
        try:
            take(folder, "a.zip", PACKERS[kind](files))
        except InvalidAdapter as error:
            assert error.message
        found = [path for path in Path(outer).rglob("*") if path.is_file()]
        assert all(path.parent == folder and path.name in FILES for path in found)


def test_a_folder_on_this_machine(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "checkpoint-10").mkdir(parents=True)
    target.mkdir()
    for name, data in FILES.items():
        (source / name).write_bytes(data)
    left = ["README.md", "adapter_model.bin", "debug.log", "events.out.tfevents.1", "optimizer.pt"]
    for name in left:
        (source / name).write_bytes(b"")
    intake = Intake(target)
    intake.add_folder(source)
    assert contents(target) == FILES
    assert sorted(intake.ignored_files) == sorted([*left, "checkpoint-10/"])


def test_a_folder_whose_weights_are_a_pickle_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in (CONFIG, "adapter_model.bin"):
        (source / name).write_bytes(b"{}")
    with pytest.raises(UnsafeArchive, match=r"'adapter_model\.bin' is a pickle"):
        Intake(target).add_folder(source)
    assert contents(target) == {}


def test_the_files_of_a_folder_are_counted(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for number in range(11):
        (source / f"{number}.log").write_bytes(b"")
    with pytest.raises(AdapterTooLarge, match="more than 10 files"):
        Intake(target, UploadLimits(max_files=10)).add_folder(source)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="is not a folder") as caught:
        Intake(tmp_path).add_folder(tmp_path / "nowhere")
    assert caught.value.field == "source"


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_files": 0}])
def test_limits_must_be_positive(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        UploadLimits(**limits)
