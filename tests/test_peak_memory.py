"""What torch's allocator hands out: sums of known sizes are exact."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import peak_memory  # noqa: E402


def block(size):
    return torch.empty(size, dtype=torch.uint8)


def test_peak_is_the_largest_sum_of_live_blocks():
    def run():
        blocks = [block(size) for size in (1000, 2000, 3000)]
        del blocks[1]
        blocks.append(block(2500))
        blocks.clear()
        blocks.append(block(5000))

    assert peak_memory.peak_allocated(run) == 6500


def test_blocks_from_before_do_not_count_when_they_are_freed():
    before, left = [block(10_000)], []

    def run():
        before.clear()
        left.append(block(700))

    assert peak_memory.peak_allocated(run) == 700

    def free_what_an_earlier_measurement_saw():
        left.clear()
        left.append(block(300))

    assert peak_memory.peak_allocated(free_what_an_earlier_measurement_saw) == 300
