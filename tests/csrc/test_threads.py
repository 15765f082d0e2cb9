"""Threads that the operators share, with fork, exit and threads of Python. test_sanitizers.py looks for races."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from maskformer_fast.ops import linear_sum_assignment
from tests.support.paths import ROOT


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def random_costs(seed: int) -> torch.Tensor:
    return torch.rand(64, 60, 40, generator=torch.Generator().manual_seed(seed))


def solve_in_child(seed: int, queue: multiprocessing.SimpleQueue) -> None:
    torch.set_num_threads(2)
    queue.put([linear_sum_assignment(random_costs(seed)).tolist() for _ in range(3)])


@pytest.mark.parametrize("pause", [0.0, 0.02])  # seconds: the parent's helper thread still polls, or sleeps
def test_forked_process_starts_threads_of_its_own(two_threads: None, pause: float) -> None:
    expected = linear_sum_assignment(random_costs(0)).tolist()
    context = multiprocessing.get_context("fork")
    if pause:
        time.sleep(pause)
    queue = context.SimpleQueue()
    children = [context.Process(target=solve_in_child, args=(0, queue)) for _ in range(2)]
    for child in children:
        child.start()
    results = [queue.get() for _ in children]
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    assert results == [[expected] * 3] * 2
    assert linear_sum_assignment(random_costs(0)).tolist() == expected


def test_concurrent_calls_do_not_disturb_each_other(two_threads: None) -> None:
    costs = [random_costs(seed) for seed in range(8)]
    expected = [linear_sum_assignment(cost) for cost in costs]
    with ThreadPoolExecutor(4) as executor:
        results = list(executor.map(linear_sum_assignment, costs * 20))
    assert all(torch.equal(result, expected[i % 8]) for i, result in enumerate(results))


@pytest.mark.no_cover
def test_threads_are_reused_and_do_not_block_exit() -> None:
    code = """
import os, torch
from maskformer_fast.ops import linear_sum_assignment
torch.set_num_threads(3)
cost = torch.rand(64, 60, 40)
before = len(os.listdir("/proc/self/task"))
for _ in range(200):
    linear_sum_assignment(cost)
print(len(os.listdir("/proc/self/task")) - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "2"
