"""How many places there are, and how many are for those who wait for adapters."""

from contextlib import ExitStack

import pytest

from dynamic_lora_server.errors import InvalidParameter, QueueFull
from dynamic_lora_server.serving.places import Places


def test_places_are_taken_and_given_back() -> None:
    places = Places(2, 1)
    with places.taken(2):
        assert places.num_open == 2
        with pytest.raises(QueueFull, match="2 continuations are running or waiting; .* takes 3"):
            places.check(2)
        with places.taken(1), pytest.raises(QueueFull), places.taken(1):
            raise AssertionError("there was a place")
    assert places.num_open == 0
    with pytest.raises(InvalidParameter, match="n is 4; the server takes 3") as refused:
        places.check(4)
    assert refused.value.field == "n"


@pytest.mark.parametrize(
    ("max_running", "max_waiting", "most"),
    [(64, 1024, 816), (4, 4, 6), (2, 1, 2), (1, 1, 1), (1, 0, 1)],
)
def test_a_quarter_of_the_places_is_not_for_those_who_wait_for_adapters(
    max_running: int, max_waiting: int, most: int
) -> None:
    places = Places(max_running, max_waiting)
    assert places.most_held_up == most
    with ExitStack() as stack:
        for _ in range(most):
            stack.enter_context(places.held_up(1))
        with pytest.raises(QueueFull, match=f"lets {most} wait for them") as refused:
            stack.enter_context(places.held_up(1))
        assert refused.value.retry_after >= 1
        assert places.num_held_up == most
    assert places.num_held_up == 0


def test_one_request_may_wait_for_its_adapter_however_many_continuations_it_has() -> None:
    places = Places(2, 2)
    with places.held_up(4):
        with pytest.raises(QueueFull), places.held_up(1):
            raise AssertionError("there was a place")
        assert places.num_held_up == 4
    with places.held_up(1), pytest.raises(QueueFull), places.held_up(3):
        raise AssertionError("there was a place")
