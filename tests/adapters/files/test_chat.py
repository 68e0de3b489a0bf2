"""What a trainer's tokenizer files say about chats."""

import json
from pathlib import Path
from typing import Any

import pytest

from dynamic_lora_adapters.errors import InvalidAdapter
from dynamic_lora_adapters.files.chat import CHAT_FILE, ChatFormat

ADDED = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}


def read(folder: Path, **files: Any) -> ChatFormat | None:
    """The format of a folder; `files` are texts, or JSON, by the first letter of their names."""
    names = {
        "c": "chat_template.jinja",
        "t": "tokenizer_config.json",
        "g": "generation_config.json",
    }
    for letter, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / names[letter]).write_text(text)
    return ChatFormat.read(folder)


def test_a_folder_that_says_nothing(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    tokenizer = {"chat_template": None, "eos_token": None, "model_max_length": 512}
    assert read(tmp_path, t=tokenizer, g={"temperature": 0.5}, c="") is None


def test_the_template_of_the_tokenizer_and_one_beside_it(tmp_path: Path) -> None:
    tokenizer = {"chat_template": "inner", "eos_token": ADDED, "bos_token": "<s>"}
    found = read(tmp_path, t=tokenizer, g={"eos_token_id": [7, 3, 7]})
    assert found == ChatFormat(
        template="inner",
        special_tokens={"bos_token": "<s>", "eos_token": "<|im_end|>"},
        end_tokens=("<|im_end|>",),
        end_ids=(3, 7),
    )
    beside = read(tmp_path, c="beside")
    assert beside is not None
    assert beside.template == "beside"


def test_of_several_templates_the_default_one_counts(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    found = read(tmp_path, t={"chat_template": several})
    assert found == ChatFormat(template="b")


def test_end_tokens_without_a_template(tmp_path: Path) -> None:
    found = read(tmp_path, t={"eos_token": "</s>"}, g={"eos_token_id": 4})
    assert found == ChatFormat(end_tokens=("</s>",), end_ids=(4,))


def test_what_is_kept_reads_the_same(tmp_path: Path) -> None:
    found = read(tmp_path, c="{{ 'é' }}", t={"eos_token": "</s>"}, g={"eos_token_id": 4})
    assert found is not None
    kept = tmp_path / "kept"
    kept.mkdir()
    found.save(kept)
    assert [path.name for path in kept.iterdir()] == [CHAT_FILE]
    assert ChatFormat.read(kept) == found


@pytest.mark.parametrize(
    ("kept", "field"),
    [('{"template": "t", "colour": 1}', "chat.json.colour"), ("{", "chat.json: Invalid JSON")],
)
def test_what_is_kept_by_another_release_or_damaged_is_refused(
    kept: str, field: str, tmp_path: Path
) -> None:
    (tmp_path / CHAT_FILE).write_text(kept)
    with pytest.raises(InvalidAdapter, match=field) as caught:
        ChatFormat.read(tmp_path)
    assert caught.value.field == CHAT_FILE


def test_a_tokenizer_of_many_added_tokens(tmp_path: Path) -> None:
    many = {str(i): {"content": f"<unused{i}>", "special": True} for i in range(30_000)}
    found = read(tmp_path, t={"added_tokens_decoder": many, "eos_token": "</s>"})
    assert (tmp_path / "tokenizer_config.json").stat().st_size > 1 << 20
    assert found == ChatFormat(end_tokens=("</s>",))


@pytest.mark.parametrize(
    ("files", "field"),
    [
        ({"t": "{"}, "tokenizer_config.json"),
        ({"t": {"chat_template": 5}}, "tokenizer_config.json: chat_template"),
        ({"t": {"chat_template": [{"name": "rag", "template": "a"}]}}, "tokenizer_config.json"),
        ({"t": {"eos_token": ["a"]}}, "tokenizer_config.json: eos_token"),
        ({"g": {"eos_token_id": "a"}}, "generation_config.json: eos_token_id"),
        ({"g": {"eos_token_id": [True]}}, "generation_config.json: eos_token_id"),
        ({"g": {"eos_token_id": -1}}, "generation_config.json: eos_token_id"),
        ({"c": "x" * ((1 << 20) + 1)}, "chat_template.jinja"),
        ({"t": {"chat_template": "é" * ((1 << 19) + 1)}}, "tokenizer_config.json: chat_template"),
    ],
)
def test_broken_files_are_refused_by_name(
    files: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        read(tmp_path, **files)
    assert (caught.value.field or "").startswith(field)


def test_a_template_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InvalidAdapter, match="not UTF-8"):
        ChatFormat.read(tmp_path)


@pytest.mark.parametrize("template", ["{% if %}", "{{ a", "{% unknown %}", "{{ a | nofilter }}"])
def test_a_template_must_compile(template: str) -> None:
    with pytest.raises(InvalidAdapter, match="chat template cannot be compiled") as caught:
        ChatFormat(template=template).check()
    assert caught.value.field == "chat_template"


def test_what_transformers_adds_to_jinja_compiles() -> None:
    ChatFormat(
        template="{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}"
        "{% break %}{% endfor %}{{ raise_exception('no') }}"
    ).check()
    ChatFormat(end_ids=(1,)).check()
