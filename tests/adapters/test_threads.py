import threading

import pytest
import torch

from dynamic_lora_adapters.threads import single_threaded, spin_briefly


def thread_counts() -> tuple[int, int, int]:
    before = torch.get_num_threads()
    with single_threaded():
        inside = torch.get_num_threads()
    return before, inside, torch.get_num_threads()


def test_torch_uses_one_thread_inside_and_as_many_as_before_outside() -> None:
    wanted = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert thread_counts() == (2, 1, 2)
        counts = []
        side = threading.Thread(target=lambda: counts.append(thread_counts()))
        side.start()
        side.join()
        assert counts == [(2, 1, 2)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(wanted)


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_says_of_waiting_stays(name: str) -> None:
    environment = {name: "ACTIVE"}
    spin_briefly(environment)
    assert environment == {name: "ACTIVE"}


def test_threads_that_wait_are_told_to_sleep_soon() -> None:
    environment: dict[str, str] = {}
    spin_briefly(environment)
    assert int(environment["GOMP_SPINCOUNT"]) < 100_000
