"""Compositions as text: the grammar, its errors, and the canonical form."""

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_adapters.compositions.composition import (
    MAX_WEIGHT,
    Composition,
    InvalidComposition,
    Merge,
    Part,
    SignMethod,
    Strategy,
)
from dynamic_lora_adapters.compositions.text import is_expression, parse, parse_parts

names = st.from_regex(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}(/[A-Za-z0-9][A-Za-z0-9._-]{0,9})?", fullmatch=True
).filter(lambda n: n != "base")
versions = st.none() | st.from_regex(r"[0-9a-f]{8,64}", fullmatch=True)
weights = st.floats(-MAX_WEIGHT / 16, MAX_WEIGHT / 16)
parts = st.lists(st.builds(Part, names, versions, weights), max_size=16)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ner", [Part("ner")]),
        ("ner*0.5", [Part("ner", None, 0.5)]),
        (
            "ner*0.7+tone*0.3-legal*0.5",
            [Part("ner", None, 0.7), Part("tone", None, 0.3), Part("legal", None, -0.5)],
        ),
        ("ner*0.7 tone*0.3", [Part("ner", None, 0.7), Part("tone", None, 0.3)]),
        (" ner", [Part("ner")]),
        ("  ner * .5\t+ tone ", [Part("ner", None, 0.5), Part("tone")]),
        ("ner@3f2a9c1d*2", [Part("ner", "3f2a9c1d", 2.0)]),
        ("ner@3f2a9c1d-tone", [Part("ner", "3f2a9c1d"), Part("tone", None, -1.0)]),
        ("ner @ 3f2a9c1d", [Part("ner", "3f2a9c1d")]),
        ("my-adapter-2", [Part("my-adapter-2")]),
        ("my-adapter -2b", [Part("my-adapter"), Part("2b", None, -1.0)]),
        ("ner - tone", [Part("ner"), Part("tone", None, -1.0)]),
        ("ner tone", [Part("ner"), Part("tone")]),
        ("-ner*2", [Part("ner", None, -2.0)]),
        ("+ner", [Part("ner")]),
        ("ner*-2", [Part("ner", None, -2.0)]),
        ("ner-*2", [Part("ner-", None, 2.0)]),
        ("1.5*2", [Part("1.5", None, 2.0)]),
        ("ner*1e-3", [Part("ner", None, 0.001)]),
        ("ner*0+tone*0", [Part("ner", None, 0.0), Part("tone", None, 0.0)]),
        ("NER*2 - Ner", [Part("NER", None, 2.0), Part("Ner", None, -1.0)]),
        (
            "org/SQL-Lora@3f2a9c1d*.5-a/b-c*2",
            [Part("org/SQL-Lora", "3f2a9c1d", 0.5), Part("a/b-c", None, -2.0)],
        ),
    ],
)
def test_what_texts_mean(text: str, expected: list[Part]) -> None:
    assert parse_parts(text) == expected


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 1, "expected an adapter's name"),
        ("  ", 3, "expected an adapter's name"),
        ("\u00e4*2", 1, "expected an adapter's name"),
        ("/a*2", 1, "expected an adapter's name"),
        ("a/*2", 2, "expected '+', '-' or the end"),
        ("a/b/c*2", 4, "expected '+', '-' or the end"),
        ("a/ b*2", 2, "expected '+', '-' or the end"),
        ("ner*0.7+tone*", 14, "expected a number after '*'"),
        ("ner*x", 5, "expected a number after '*'"),
        ("ner*nan", 5, "expected a number after '*'"),
        ("ner-0.5*tone", 9, "expected a number after '*'"),
        ("ner*0.5tone", 8, "expected '+', '-' or the end"),
        ("ner*2*3", 6, "expected '+', '-' or the end"),
        ("ner++tone", 5, "expected an adapter's name after '+'"),
        ("ner+", 5, "expected an adapter's name after '+'"),
        ("ner- tone", 4, "this '-' belongs to the name; put a space before a minus"),
        ("ner@3f2a", 5, "expected 8 to 64 hexadecimal digits after '@'"),
        ("ner@" + "0" * 65, 5, "expected 8 to 64 hexadecimal digits after '@'"),
        ("ner+" + "x" * 141, 5, "this name is longer than 140 characters"),
        ("tone+ner*101", 6, "The weight of 'ner' is 101; weights lie between -100 and 100"),
        ("ner*1e999", 1, "The weight of 'ner' is inf; weights lie between"),
        ("ner*100.00000001", 1, "The weight of 'ner' is 100.00000001; weights lie between"),
        ("ner*0.5+base", 9, "'base' is what every composition adds to"),
        ("ties(ner+tone)", 5, "expected '+', '-' or the end"),
    ],
)
def test_faults_point_at_their_column(text: str, column: int, message: str) -> None:
    with pytest.raises(InvalidComposition) as caught:
        parse_parts(text)
    assert caught.value.column == column
    first, shown, caret = caught.value.message.split("\n")
    assert first.startswith(f"column {column}: {message}")
    assert caught.value.field == "adapter"
    position = caret.index("^")
    assert shown[position : position + 1] == text[column - 1 : column]
    assert caught.value.fix


def test_the_hint_of_a_long_text_shows_the_place_alone() -> None:
    text = "+".join(["ner*0.1"] * 15) + "+\n?"
    with pytest.raises(InvalidComposition) as caught:
        parse_parts(text)
    _, shown, caret = caught.value.message.split("\n")
    assert len(shown) < 61
    assert shown[caret.index("^")] == "?"


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("tone*0.3 + ner*0.70", "ner*0.7+tone*0.3"),
        ("ner + ner*0.5", "ner*1.5"),
        ("ner*1", "ner"),
        ("b-a*0.5", "b-a*0.5"),
        ("b - a", "-a+b"),
        ("a - b - c", "a*1-b*1-c"),
        ("a@3f2a9c1d - a", "-a+a@3f2a9c1d"),
        ("ner - ner", "base"),
        ("ner*0 + tone", "tone"),
        ("a*0.1+a*0.2+a*-0.3+a", "a"),
        ("a*0.1+a*0.2-a*0.3", "base"),
        ("a*0.1+a*0.2", "a*0.3"),
        ("a*1e-300+a*0.1-a*0.1", "a*1e-300"),
        ("a*1e-7", "a*1e-07"),
    ],
)
def test_canonical_texts(text: str, canonical: str) -> None:
    composition = parse(text)
    assert str(composition) == canonical
    if not composition.is_base:
        assert parse(canonical) == composition


@given(parts)
def test_the_canonical_text_is_read_back(own: list[Part]) -> None:
    composition = Composition.of(own)
    if composition.is_base:
        assert str(composition) == "base"
    else:
        assert parse(str(composition)) == composition


def test_the_longest_canonical_text_is_read_back() -> None:
    named = (f"{i:x}{'o' * 41}/{'n' * 97}" for i in range(16))
    own = Composition.of(Part(name, "0" * 64, -1.2345678901234567e-100) for name in named)
    assert parse(str(own)) == own


@given(parts, st.randoms())
def test_the_order_of_parts_changes_nothing(own: list[Part], random: Random) -> None:
    shuffled = own.copy()
    random.shuffle(shuffled)
    assert Composition.of(shuffled) == Composition.of(own)


@given(st.text(st.sampled_from("ab-.+*@ 0123456789ef\n"), max_size=40))
def test_any_text_is_read_or_refused_at_a_column_within_it(text: str) -> None:
    try:
        composition = parse(text)
    except InvalidComposition as error:
        assert error.column is None or 1 <= error.column <= len(text) + 1
    else:
        assert all(math.isfinite(part.weight) and part.weight for part in composition.parts)


def test_scaling_is_decimal_too() -> None:
    tripled = parse("a*0.1").scaled(3)
    assert str(tripled) == "a*0.3"
    assert Composition.of([*tripled.parts, *parse("a*-0.3").parts]).is_base


def test_limits() -> None:
    assert len(parse("+".join(f"a{i}" for i in range(16))).parts) == 16
    with pytest.raises(InvalidComposition, match="has 17 adapters; 16 are allowed"):
        parse("+".join(f"a{i}" for i in range(17)))
    with pytest.raises(InvalidComposition, match="The weight of 'a' is 120"):
        parse("a*60+a*60")
    with pytest.raises(InvalidComposition, match="has 5000 characters; 4096 are allowed"):
        parse("a" * 5000)
    with pytest.raises(InvalidComposition, match="The weight of 'a' is nan"):
        Part("a", None, math.nan)


@pytest.mark.parametrize("text", ["ner*2", "a b", " a", "a@3f2a9c1d", "-a", "a+b", "ties(a)"])
def test_expressions(text: str) -> None:
    assert is_expression(text)


@pytest.mark.parametrize("text", ["ner", "my-adapter-2", "NER", "org/model", "", "a?b"])
def test_names_are_no_expressions(text: str) -> None:
    assert not is_expression(text)


def test_no_operator_is_looked_for_beyond_what_a_sum_may_have() -> None:
    assert is_expression("a" * 4000 + "*2")
    assert not is_expression("a" * 5000 + "*2")


def test_the_plain_adapter() -> None:
    assert parse("ner").plain == Part("ner")
    assert parse("ner@3f2a9c1d").plain == Part("ner", "3f2a9c1d")
    assert parse("ner*2").plain is None
    assert parse("ner + tone").plain is None
    assert Composition().plain is None


def test_digests_follow_content_weights_and_strategy() -> None:
    a, b = "a" * 64, "b" * 64
    both = parse("x*0.5+y*0.3")
    assert parse("x").digest([a]) == a
    assert both.digest([a, b]) == parse("p*0.3+q*0.5").digest([b, a])
    ties = Merge(strategy=Strategy.TIES, density=0.5)
    others = [
        both.digest([a, b]),
        both.digest([b, a]),
        both.digest([a, a]),
        parse("x*0.5").digest([a]),
        parse("x*0.5-y*0.3").digest([a, b]),
        Composition.of(both.parts, merge=ties).digest([a, b]),
        Composition.of(both.parts, merge=Merge(strategy=Strategy.TIES, density=0.4)).digest([a, b]),
        Composition.of(
            both.parts,
            merge=Merge(strategy=Strategy.TIES, density=0.5, sign_method=SignMethod.FREQUENCY),
        ).digest([a, b]),
        a,
        b,
    ]
    assert len(set(others)) == len(others)
    assert all(len(digest) == 64 for digest in others)


def test_a_merge_keeps_parts_of_weight_0_and_refuses_repeats() -> None:
    ties = Merge(strategy=Strategy.TIES, density=0.5)
    merged = Composition.of([Part("b", None, 0.0), Part("a")], merge=ties)
    assert [part.name for part in merged.parts] == ["a", "b"]
    assert str(merged) == "ties(a+b*0,density=0.5,sign=total)"
    prune = Merge(strategy=Strategy.MAGNITUDE_PRUNE, density=1)
    assert str(Composition.of([Part("a")], merge=prune)) == "magnitude_prune(a,density=1)"
    with pytest.raises(InvalidComposition, match="'a' is merged twice"):
        Composition.of([Part("a"), Part("a")], merge=ties)
    for density in (0, 1.00000001, math.nan):
        with pytest.raises(InvalidComposition) as caught:
            Merge(strategy=Strategy.TIES, density=density)
        rule = "density must lie above 0 and be at most 1"
        assert caught.value.message == f"{rule}; it is {density}."
