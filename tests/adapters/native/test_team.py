"""The barrier of `native/team.h`, in programs that say where its threads run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dynamic_lora_adapters.native import library

# Two threads: the first waits for the second, which stays away until the first surely sleeps, and
# says how often it asked where it runs. `PLACES` is where each runs as it comes, and where the
# first is while it waits.
PROGRAM = r"""
#include <chrono>
#include <cstdio>
#include <thread>

#include "team.h"

static const int places[] = {PLACES};
static thread_local int place, later, looks;

extern "C" int sched_getcpu() noexcept { return looks++ ? later : place; }

int main() {
  dynamic_lora::Team team;
  int written = 0, seen = 0, asked = 0;
#pragma omp parallel num_threads(2)
  {
    const dynamic_lora::Member member(team);
    const int thread = omp_get_thread_num();
    place = later = places[thread];
    dynamic_lora::meet();
    if (thread == 0) {
      later = places[2];
      looks = 0;
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      written = 7;
    }
    dynamic_lora::meet();
    if (thread == 0) seen = written, asked = looks;
  }
  std::printf("%d %d\n", seen, asked);
}
"""


def run(folder: Path, places: str) -> tuple[int, int]:
    """What the first thread saw of the second's, and how often it asked for its processor."""
    source, program = folder / "team.cpp", folder / "team"
    source.write_text(PROGRAM)
    headers = Path(library.__file__).parent
    flags = ["-std=c++17", "-fopenmp", f"-DPLACES={places}", f"-I{headers}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True, timeout=100)
    done = subprocess.run([program], capture_output=True, text=True, check=True, timeout=100)
    seen, asked = map(int, done.stdout.split())
    return seen, asked


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells where a thread runs")
@pytest.mark.parametrize(
    ("places", "sleeps_at_once"),
    [
        ("0,1,0", False),
        ("0,0,0", True),
        ("0,1,1", True),
        ("0,1,2", False),
        ("-1,-1,-1", False),
    ],
    ids=["apart", "together", "moved to the other's", "moved elsewhere", "unknown"],
)
def test_a_thread_sleeps_at_once_where_another_was_last_seen(
    places: str, sleeps_at_once: bool, tmp_path: Path
) -> None:
    seen, asked = run(tmp_path, places)
    assert seen == 7, "what is written before a barrier is there behind it"
    assert (asked <= 2) == sleeps_at_once
