"""Which prompts are asked when, and what is made of the cells."""

from benchmarks.speculation import NUM_CLIENTS, Cell, slices, summary


def test_no_prompt_is_asked_twice_and_none_is_left_out() -> None:
    prompts = [f"prompt {number % 90}" for number in range(100)]
    warm, parts = slices(prompts)
    assert len(parts) == len(NUM_CLIENTS)
    assert len(warm) == 18
    asked = warm + [prompt for part in parts for prompt in part]
    assert sorted(asked) == sorted(set(prompts))
    assert [len(part) for part in parts] == sorted(len(part) for part in parts)


def cell(tokens_per_s: float, answer: str, **changes: int) -> Cell:
    counts = {"num_steps": 100, "num_drafted": 0, "num_accepted": 0} | changes
    return Cell(
        task="ner",
        num_clients=1,
        num_tokens=200,
        wall_s=200 / tokens_per_s,
        answers={"a": answer, "b": "same"},
        **counts,
    )


def test_sides_are_compared_round_by_round() -> None:
    measured = [
        {"plain": [cell(10, "x")], "drafting": [cell(30, "x", num_drafted=40, num_accepted=10)]},
        {"plain": [cell(20, "x")], "drafting": [cell(20, "y", num_steps=50)]},
    ]
    (found,) = summary(measured)
    assert [round(ratio, 6) for ratio in found["ratios"]] == [3, 1]
    assert round(found["ratio"], 6) == 2
    assert found["share_accepted"] == [0.25, 0]
    assert found["tokens_per_step"] == [2, 4]
    assert found["num_answers"] == 2
    assert found["num_answers_that_differ"] == [0, 1]
