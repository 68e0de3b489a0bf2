"""Answers that keep to a grammar, beside others that none holds to anything."""

import json
import random
import re
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from dynamic_lora_server.engine.drafting.drafts import MAX_DRAFT
from dynamic_lora_server.engine.engine import FailedEvent, TokenEvent
from dynamic_lora_server.engine.sampling import grammars as module
from dynamic_lora_server.engine.sampling.grammars import Grammars
from dynamic_lora_server.engine.sampling.guides import Guide
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.generation import FinishReason, Grammar, GrammarKind
from dynamic_lora_server.text import TokenizerView
from tests.support.engines import make_engine, make_sequence, random_prompt, run_all
from tests.support.grammars import (
    GRAMMARS,
    MANY_STATES,
    SCHEMAS,
    VIEW,
    compiled,
    ends_of,
    follow,
    guide,
    guided,
    ids_of,
    json_of,
    matcher_of,
    regex,
    text_of,
)
from tests.support.models import (
    EOS_ID,
    VOCAB_SIZE,
    sentencepiece_tokenizer,
    tiny_llama,
)

KINDS: dict[str, dict[str, Any]] = {
    "native": {},
    "torch": {"native": False},
    "paged": {"paged": True},
    "overlapping": {"overlap": True},
    "drafting": {"speculate": MAX_DRAFT},
}
WORDS = regex("(the|on|a)( (king|hill|rain))+")


@pytest.fixture(scope="module", params=KINDS)
def built(request: pytest.FixtureRequest) -> BuiltEngine:
    return make_engine(tiny_llama(), **KINDS[request.param])


@pytest.fixture(scope="module")
def one() -> BuiltEngine:
    return make_engine(tiny_llama())


@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_answer_is_what_the_schema_says(
    one: BuiltEngine, schema: dict[str, Any], seed: int
) -> None:
    sequences = [
        guided(random_prompt(5, seed=n), json_of(schema), temperature=1.0, seed=seed + n)
        for n in range(3)
    ]
    for reason, sequence in zip(ends_of(one, sequences), sequences, strict=True):
        if reason is FinishReason.LENGTH:
            ids = sequence.output_ids
            assert matcher_of(json_of(schema)).try_consume_tokens(ids) == len(ids) == 80
        else:
            assert reason is FinishReason.EOS
            jsonschema.validate(json.loads(text_of(sequence.output_ids)), schema)


def crowd() -> list[Sequence]:
    """Guided rows and others, greedy, drawn and penalised."""
    schema = {"type": "array", "items": {"enum": ["the king", 7, None]}, "minItems": 2}
    return [
        guided(random_prompt(9, seed=0), json_of(schema), max_new_tokens=30),
        make_sequence(random_prompt(9, seed=1), max_new_tokens=20),
        guided(random_prompt(4, seed=2), WORDS, temperature=1.0, seed=3, logprobs=True),
        make_sequence(random_prompt(40, seed=3), temperature=0.9, seed=5, top_p=0.9),
        guided(random_prompt(4, seed=4), WORDS, temperature=2.0, seed=4, top_k=5),
        guided(random_prompt(4, seed=5), json_of({}), frequency_penalty=1.0, max_new_tokens=15),
        make_sequence(random_prompt(4, seed=6), repetition_penalty=1.5, top_logprobs=2),
    ]


def test_each_row_of_a_mixed_batch_equals_the_request_alone(
    built: BuiltEngine, one: BuiltEngine
) -> None:
    alone = [run_all(one, [sequence])[0] for sequence in crowd()]
    assert run_all(built, crowd()) == alone


def test_a_sequence_that_comes_later_is_guided_too(built: BuiltEngine) -> None:
    first = make_sequence(random_prompt(9, seed=1), max_new_tokens=20)
    expected = run_all(make_engine(tiny_llama()), [make_sequence(random_prompt(9, seed=1))])
    built.engine.add(first)
    for _ in range(4):
        built.engine.step()
    late = guided(random_prompt(3, seed=2), regex("the king"))
    assert ends_of(built, [late]) == [FinishReason.EOS]
    assert text_of(late.output_ids) == b"the king"
    assert first.output_ids[:10] == expected[0]


def test_steps_overlap_where_no_row_is_guided() -> None:
    built = make_engine(tiny_llama(), overlap=True)
    run_all(built, [make_sequence(random_prompt(5, seed=0))])
    assert built.engine.num_overlapped == built.engine.num_steps - 1 == 9
    run_all(built, [guided(random_prompt(5, seed=0), regex("[a-z]{40}"))])
    assert built.engine.num_overlapped == 9


def test_what_may_not_go_on_ends_without_an_end_token(one: BuiltEngine) -> None:
    sequence = guided(random_prompt(5, seed=0), regex("the king"), ignore_eos=True)
    assert ends_of(one, [sequence]) == [FinishReason.EOS]
    assert EOS_ID not in sequence.output_ids
    assert text_of(sequence.output_ids) == b"the king"


@given(seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_the_end_token_comes_where_the_grammar_may_end(one: BuiltEngine, seed: int) -> None:
    sequence = guided(random_prompt(5, seed=0), regex("(ab)+"), temperature=2.0, seed=seed)
    reason = ends_of(one, [sequence])[0]
    ids = sequence.output_ids
    assert (ids[-1] == EOS_ID) == (reason is FinishReason.EOS)
    assert EOS_ID not in ids[:-1]
    pattern = "(ab)+" if reason is FinishReason.EOS else "(ab)+a?"
    assert re.fullmatch(pattern, text_of(ids).decode())


def allowed(one: Guide, *draft: int) -> set[int]:
    *_, mask = one.allowed(VOCAB_SIZE, draft)
    return {token for token in range(VOCAB_SIZE) if mask[token >> 3] >> (token & 7) & 1}


def test_an_adapters_own_end_tokens_end_where_the_grammar_may() -> None:
    (other,) = ids_of("#")
    one = guide(regex("[ab#]b?"), ends={EOS_ID, other})
    assert allowed(one) == ids_of("a", "b")  # "#" would end it at once
    assert not one.take(*ids_of("a"))
    assert allowed(one) == {EOS_ID, other, *ids_of("b")}
    assert one.take(*ids_of("b"))


def test_a_requests_stop_tokens_may_come_where_the_grammar_may_end() -> None:
    (stop,) = ids_of("#")
    one = guide(regex("a#?b?"), stops={stop, 2})
    assert allowed(one) == ids_of("a")
    one.take(*ids_of("a"))
    assert allowed(one) == {EOS_ID, 2, stop, *ids_of("b")}


def test_a_draft_leaves_a_guide_where_it_is() -> None:
    a, b, other = (ids_of(char) for char in "ab#")
    one = guide(regex("ab(#a)?"))
    for _ in range(2):
        assert allowed(one) == a
        assert allowed(one, *a) == b
        assert allowed(one, *a, *b) == {EOS_ID, *other}
        assert allowed(one, *a, *other) == set()  # a draft that the grammar does not have
        assert allowed(one, *a, *other, *a) == set()
        assert len(one.allowed(VOCAB_SIZE, [*a, *b])) == 3
    one.take(*a)
    assert allowed(one) == b


def test_a_stop_string_and_the_longest_length_end_it_before(one: BuiltEngine) -> None:
    stopped = guided([5, 6], regex("[a-z]*"), stop_token_ids=tuple(ids_of(*"abcdefghijklmnop")))
    short = guided([5, 6], regex("[a-z]{50}"), max_new_tokens=3)
    last = guided([5, 6], regex("[xyz]"), max_new_tokens=1)
    ends = ends_of(one, [stopped, short, last])
    assert ends == [FinishReason.STOP, FinishReason.LENGTH, FinishReason.EOS]


def test_log_probabilities_are_the_models_own() -> None:
    one = make_engine(tiny_llama())
    sequence = guided(random_prompt(5, seed=0), regex("zzz"), top_logprobs=1, logprobs=True)
    one.engine.add(sequence)
    event = one.engine.step()[0]
    assert isinstance(event, TokenEvent)
    (likeliest,) = event.sampled.top
    assert event.sampled.token_id in ids_of("z")
    assert likeliest[0] not in ids_of("z")
    assert event.sampled.logprob is not None
    assert event.sampled.logprob < likeliest[1]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_end_a_guided_sequence(native: bool, value: float) -> None:
    model = tiny_llama()
    one = make_engine(model, native=native)
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    one.engine.add(guided([5, 6], regex("abc")))
    (event,) = one.engine.step()
    assert isinstance(event, FailedEvent)
    assert "no finite numbers" in event.message


def test_a_grammar_that_grows_too_large_ends_its_sequence_alone(one: BuiltEngine) -> None:
    before, after = (make_sequence(random_prompt(40, seed=1)) for _ in range(2))
    run_all(one, [before])
    broken, fine = guided([5, 6], WORDS), make_sequence([7, 8])
    limits = LLParserLimits(step_max_items=1, step_lexer_fuel=1, verbose_errors=False)
    grammar = LLMatcher.grammar_from_lark('start: ("a" | "b" start "c" | start start)+')
    matcher = LLMatcher(GRAMMARS._vocabulary(), grammar, log_level=0, limits=limits)
    broken.guide = Guide(matcher, ends={EOS_ID})
    one.engine.add(broken)
    one.engine.add(fine)
    events = [event for _ in range(12) for event in one.engine.step()]
    (failed,) = [event for event in events if isinstance(event, FailedEvent)]
    assert failed.sequence_id == broken.id
    assert failed.by_grammar
    assert "<" not in failed.message
    run_all(one, [after])
    assert after.num_reused > before.num_reused == 0
    assert [fine.output_ids] == run_all(one, [make_sequence([7, 8])])


def test_a_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    written = module._written

    def counted(kind: GrammarKind, source: str) -> str:
        read.append(source)
        return written(kind, source)

    monkeypatch.setattr(module, "_written", counted)
    monkeypatch.setattr(module, "_NUM_KEPT", 2)
    grammars = Grammars(VIEW, {EOS_ID})
    for pattern in ("a", "b", "a", "b", "c", "c", "b", "a"):
        assert compiled(regex(pattern), grammars)
    assert read == ["a", "b", "c", "a"]


def test_what_cannot_be_used_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def broken(_: GrammarKind, source: str) -> str:
        read.append(source)
        return "start: ("

    monkeypatch.setattr(module, "_written", broken)
    grammars = Grammars(VIEW, {EOS_ID})
    for field in ("guided_regex", "parameters.grammar"):
        with pytest.raises(InvalidParameter, match=field) as caught:
            compiled(regex("a", field), grammars)
        assert caught.value.field == field
    with pytest.raises(InvalidParameter):
        grammars.known(regex("a"))
    assert read == ["a"]


def test_a_grammar_by_which_llguidance_panics_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*_: object) -> None:
        raise type("PanicException", (BaseException,), {})("index out of bounds")

    monkeypatch.setattr(module, "_written", panic)
    with pytest.raises(InvalidParameter, match="llguidance broke on it: index out of bounds"):
        compiled(regex("a"), Grammars(VIEW, {EOS_ID}))


def test_a_lexer_that_is_full_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_STATES", 500)
    grammars = Grammars(VIEW, {EOS_ID})
    first = compiled(MANY_STATES, grammars)
    assert compiled(MANY_STATES, grammars) is first
    failing, beside = first.guide(ends=()), first.guide(ends=())
    text = "".join(random.Random(1).choices("ab", k=500))
    assert follow(beside, "abba") is None
    assert "too many states" in str(follow(failing, text))
    # What runs at that moment has the same lexer; what comes later has not.
    assert "too many states" in str(follow(beside, "a"))
    assert grammars.known(MANY_STATES) is None
    later = [compiled(MANY_STATES, grammars).guide(ends=()) for _ in range(2)]
    assert [follow(one, "abba") for one in later] == [None, None]
    assert "too many states" in str(follow(later[0], text))
    assert follow(later[1], "abba") is None


BROKEN: dict[str, tuple[Grammar, str]] = {
    "no schema": (json_of({"type": "thing"}), "thing"),
    "an unknown keyword": (json_of({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "no JSON": (Grammar(GrammarKind.JSON_SCHEMA, "{", "f"), "EOF"),
    "an open bracket": (regex("a("), "unclosed"),
    "a backreference": (regex(r"(a)\1"), "backreference"),
    "no rules": (Grammar(GrammarKind.RULES, "start: :", "f"), "start"),
    "nested rules": (Grammar(GrammarKind.RULES, "start: " + "(" * 10**5, "f"), ""),
    "many rules": (
        Grammar(GrammarKind.RULES, "".join(f"r{n}: r{n + 1}\n" for n in range(2000)), "f"),
        "16384",
    ),
    "a nested schema": (Grammar(GrammarKind.JSON_SCHEMA, '{"not":' * 10**4, "f"), ""),
    "a long one": (regex("a" * (2**17 + 1)), "131072"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_used_is_refused_by_name(name: str) -> None:
    grammar, reason = BROKEN[name]
    with pytest.raises(InvalidParameter) as caught:
        compiled(grammar)
    assert caught.value.field == grammar.field
    assert reason in caught.value.message
    assert len(caught.value.message) < 700
    assert "backtrace" not in caught.value.message


def test_definitions_may_refer_to_one_another_a_long_way() -> None:
    """Reading them goes as deep, which the stack of other threads has no room for."""
    chain: dict[str, Any] = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(3500)}
    schema = {"$ref": "#/$defs/a0", "$defs": chain | {"a3500": {"const": 7}}}
    one = guide(json_of(schema))
    assert allowed(one) == ids_of(" ", "7")
    assert one.take(*ids_of("7"))


def test_choices_and_rules() -> None:
    texts = ["the king", 'the "rain"', "é\n\\", "🙂"]
    choice = Grammar(GrammarKind.CHOICE, json.dumps(texts), "guided_choice")
    lark = Grammar(GrammarKind.RULES, 'start: "a" start "b" | "c"', "guided_grammar")
    gbnf = Grammar(GrammarKind.RULES, 'root ::= "a" root "b" | "c"', "guided_grammar")
    answers = {choice: texts, lark: ["c", "aacbb"], gbnf: ["c", "aacbb"]}
    for grammar, good in answers.items():
        for text in good:
            matcher = matcher_of(grammar)
            ids = list(VIEW.encode(text, add_special_tokens=False))
            assert matcher.try_consume_tokens(ids) == len(ids), text
            assert matcher.is_accepting()


def test_json_may_be_spaced_but_not_for_ever() -> None:
    grammar = json_of({"type": "array", "items": {"type": "integer"}})
    for text, fits in {
        " [1,\n  2 ]": True,
        "[1,2]": True,
        "  [1]": False,
        f"[{' ' * 32}1]": True,
        f"[{' ' * 33}1]": False,
    }.items():
        ids = [VIEW.encode(char, add_special_tokens=False)[0] for char in text]
        assert (matcher_of(grammar).try_consume_tokens(ids) == len(ids)) is fits, text


def test_pieces_of_a_sentencepiece_vocabulary() -> None:
    view = TokenizerView(sentencepiece_tokenizer())
    grammars = Grammars(view, {EOS_ID})
    texts = [" Paris", "in é"]
    choice = Grammar(GrammarKind.CHOICE, json.dumps(texts), "guided_choice")
    for text in texts:
        matcher = matcher_of(choice, grammars)
        ids = list(view.encode(text.removeprefix(" "), add_special_tokens=False))
        if not text.startswith(" "):
            ids = [*view.encode("x" + text, add_special_tokens=False)][2:]
        assert matcher.try_consume_tokens(ids) == len(ids), text


def test_a_tokenizer_that_cannot_be_read_is_refused_by_name() -> None:
    backend = Tokenizer(WordPiece({"[UNK]": 0, "the": 1, "##re": 2}, unk_token="[UNK]"))
    backend.decoder = WordPieceDecoder()
    view = TokenizerView(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))
    with pytest.raises(InvalidParameter, match="llguidance does not take this model's tokenizer"):
        compiled(regex("the"), Grammars(view, ()))
