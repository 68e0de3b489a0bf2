"""What tells one served base model from another."""

from pathlib import Path

from dynamic_lora_server.base.fingerprint import fingerprint


def test_files_and_conditions_make_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(2**21))
    plain = fingerprint(tmp_path, ["bfloat16"])
    (tmp_path / "README.md").write_text("changes nothing")
    (tmp_path / "original").mkdir()
    assert fingerprint(tmp_path, ["bfloat16"]) == plain
    others = {fingerprint(tmp_path, ["float32"])}
    weights.write_bytes(bytes(2**21 - 1) + b"1")
    others.add(fingerprint(tmp_path, ["bfloat16"]))
    weights.write_bytes(bytes(2**21 + 1))
    others.add(fingerprint(tmp_path, ["bfloat16"]))
    assert len(others - {plain}) == 3
    assert all(len(one) == len("fp_") + 12 for one in others)
