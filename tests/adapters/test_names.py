import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_adapters.errors import IncompatibleAdapter, InvalidAdapterName
from dynamic_lora_adapters.names import (
    NAME_RULE,
    check_adapter_name,
    check_base_model,
    is_local_path,
    model_leaf,
)

MEANT = {"base", "composition"}


@given(
    st.from_regex(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,41}(/[A-Za-z0-9][A-Za-z0-9._-]{0,96})?", fullmatch=True
    ).filter(lambda name: name.lower() not in MEANT)
)
def test_names_by_the_rule_pass(name: str) -> None:
    assert check_adapter_name(name) == name


@given(st.text() | st.from_regex(r"[A-Za-z0-9._/-]{1,8}", fullmatch=True))
def test_a_name_that_passes_needs_no_quoting(name: str) -> None:
    try:
        check_adapter_name(name)
    except InvalidAdapterName:
        return
    assert re.fullmatch(r"[A-Za-z0-9._/-]+", name, re.ASCII)
    assert len(name.split("/")) <= 2
    assert {"", ".", ".."}.isdisjoint(name.split("/"))


@pytest.mark.parametrize(
    "name",
    [
        *("", "a b", "-x", ".x", "ner\n", "n\u00e9", "a" * 141),
        *("/", "/a", "a/", "a//b", "a/b/c", "a/.", "a/..", "../a", "a/-b", "a\\b", "C:/a"),
    ],
)
def test_bad_names_are_told_the_rule(name: str) -> None:
    with pytest.raises(InvalidAdapterName) as caught:
        check_adapter_name(name)
    assert NAME_RULE in caught.value.message
    assert caught.value.field == "name"


@pytest.mark.parametrize("name", ["base", "Base", "tiny-llama", "Tiny-Llama", "ORG/tiny"])
def test_names_of_the_base_are_reserved_in_any_case(name: str) -> None:
    with pytest.raises(InvalidAdapterName, match="means the base model"):
        check_adapter_name(name, reserved=["Tiny-Llama", "org/Tiny"])


def test_the_label_of_sums_in_the_metrics_is_nobodys_name() -> None:
    for name in ("composition", "Composition"):
        with pytest.raises(InvalidAdapterName, match="what metrics count sums of adapters under"):
            check_adapter_name(name)
    assert check_adapter_name("compositions")


@pytest.mark.parametrize("declared", ["org/Tiny", "org/tiny", "ORG/TINY", "Tiny"])
def test_the_same_base_passes_without_a_note(declared: str) -> None:
    assert check_base_model(declared, "org/Tiny", force=False) == []


@pytest.mark.parametrize("declared", ["other/Tiny", "org/Tiny-Instruct", "tiny2"])
def test_another_base_is_refused_unless_forced(declared: str) -> None:
    with pytest.raises(IncompatibleAdapter) as caught:
        check_base_model(declared, "org/Tiny", force=False)
    assert caught.value.field == "base_model_name_or_path"
    assert repr(declared) in caught.value.message
    assert "force=true" in (caught.value.fix or "")
    (note,) = check_base_model(declared, "org/Tiny", force=True)
    assert note.startswith("Forced")


@pytest.mark.parametrize(
    "declared", ["/data/x", "./x", "../x", "~/x", "a/b/c", "C:\\models\\x", "C:/models/x", ".\\x"]
)
def test_a_local_path_passes_with_a_note(declared: str) -> None:
    assert is_local_path(declared)
    (note,) = check_base_model(declared, "org/Tiny", force=False)
    assert "local copy" in note


@pytest.mark.parametrize("declared", [None, ""])
def test_a_missing_base_passes_with_a_note(declared: str | None) -> None:
    (note,) = check_base_model(declared, "org/Tiny", force=False)
    assert "does not say" in note


def test_a_base_served_from_a_folder_is_known_by_the_folders_name() -> None:
    assert check_base_model("org/Tiny", "/models/tiny", force=False) == []
    (note,) = check_base_model("org/Other", "/models/tiny", force=False)
    assert "The base model is a local copy" in note


def test_leaf() -> None:
    assert model_leaf("org/Tiny") == model_leaf("/data/Tiny/") == model_leaf("C:\\Tiny") == "tiny"
