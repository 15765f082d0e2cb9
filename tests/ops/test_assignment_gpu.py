"""The assignment on a CUDA device against SciPy: every way in which a batch is processed, streams, devices, graphs.

The teams of lanes run on host threads in tests/csrc/run_teams.cpp.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from maskformer_fast.core.extension import load_extension
from maskformer_fast.ops import linear_sum_assignment
from maskformer_fast.ops.assignment import linear_sum_assignment_eager
from tests.support.compute_sanitizer import find_sanitizer, run_under_sanitizer

pytestmark = pytest.mark.gpu
SHAPES = [(100, 20), (20, 100), (33, 33), (1, 1), (1, 9), (9, 1), (31, 32), (64, 63), (0, 3), (3, 0)]
# a warp with its costs in shared memory is above; here: a warp with costs copied, and in place; a block with tables
# in shared memory (of 873 columns: just under the 48 KiB that need no asking), and (the last two) with nothing there
LARGE_SHAPES = [(200, 256), (256, 200), (257, 40), (300, 700), (8, 873), (5000, 50), (50, 5000)]
KINDS = ["uniform", "tied", "forbidden"]


def random_costs(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    cost = torch.randn(shape, generator=generator, dtype=dtype) * 3
    if kind == "tied":
        cost = cost.round()
    if kind == "forbidden":
        cost[torch.rand(shape, generator=generator) < 0.2] = math.inf
    return cost


def totals(cost: Tensor, rows: Tensor) -> Tensor:
    """Float64 cost of each problem's assignment; NaN where nothing is assigned. Checks that no row is used twice."""
    total = []
    problems = cost.reshape(-1, *cost.shape[-2:])
    for problem, result in zip(problems, rows.reshape(-1, cost.shape[-1]), strict=True):
        columns = (result >= 0).nonzero().squeeze(1)
        used = result[columns]
        assert len(used.unique()) == len(used) and (result[result < 0] == -1).all()
        total.append(problem[used, columns].double().sum() if len(used) else torch.tensor(math.nan))
    return torch.stack(total)


def check_against_scipy(cost: Tensor, counts: Tensor | None = None) -> None:
    result = linear_sum_assignment(cost.cuda(), None if counts is None else counts.cuda())
    assert result.is_cuda and result.dtype == torch.int64
    expected = linear_sum_assignment_eager(cost, counts)
    assert torch.equal((result.cpu() >= 0).sum(-1), (expected >= 0).sum(-1))
    if counts is not None:
        assert (result.cpu()[torch.arange(cost.shape[-1]) >= counts[..., None]] == -1).all()
    torch.testing.assert_close(
        totals(cost, result.cpu()), totals(cost, expected), rtol=1e-9, atol=1e-9, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cost_equals_scipy(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    check_against_scipy(random_costs(kind, (6, *shape), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", LARGE_SHAPES)
def test_large_problems_equal_scipy(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    check_against_scipy(random_costs(kind, (2, *shape), dtype))
    check_against_scipy(random_costs(kind, (2, *shape[::-1]), dtype).transpose(1, 2))


@pytest.mark.parametrize("kind", ["uniform", "tied"])
def test_thousands_of_rows_and_columns(kind: str) -> None:
    check_against_scipy(random_costs(kind, (2000, 2000)))


@pytest.mark.parametrize("shape", [(100, 20), (200, 256), (40, 300), (30, 6000)])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batch_equals_scipy(kind: str, shape: tuple[int, int]) -> None:
    cost = random_costs(kind, (3, 4, *shape))
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, shape[1] + 1, (3, 4), generator=generator)
    counts[0, 0], counts[0, 1], counts[0, 2] = 0, shape[1], min(shape)
    cost[0, 0, :, 0] = math.nan  # beyond the count, so it is not read
    check_against_scipy(cost, counts)
    check_against_scipy(cost.transpose(0, 1), counts.T)


@pytest.mark.parametrize("shape", [(100, 20), (250, 256), (10, 5000)])
def test_more_problems_than_run_at_a_time(shape: tuple[int, int]) -> None:
    batch = 9 * torch.cuda.get_device_properties(0).multi_processor_count + 5
    cost = random_costs("uniform", (8, *shape)).repeat(batch // 8 + 1, 1, 1)[:batch]
    result = linear_sum_assignment(cost.cuda()).cpu()
    assert torch.equal(result, result[:8].repeat(batch // 8 + 1, 1)[:batch])
    assert torch.equal(result[:8], linear_sum_assignment(cost[:8]))


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (20, 400), (400, 20), (260, 260)])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_invalid_cost_empties_its_problem_only(bad: float, shape: tuple[int, int]) -> None:
    cost = random_costs("uniform", (4, *shape))
    expected = linear_sum_assignment(cost)
    cost[2, -1, -1] = bad
    expected[2] = -1
    assert torch.equal(linear_sum_assignment(cost.cuda()).cpu(), expected)


@pytest.mark.parametrize("value", [1e38, -1e38, 1e308, -1e308, 1e-300, 0.0])
def test_extreme_magnitudes_end(value: float) -> None:
    choices = torch.tensor([value, -value, value / 2, 1.0], dtype=torch.float64)
    cost = choices[torch.randint(0, 4, (8, 12, 12), generator=torch.Generator().manual_seed(0))]
    for result in linear_sum_assignment(cost.cuda()).cpu():
        used = result[result >= 0]
        assert len(used) in (0, 12) and len(used.unique()) == len(used)


def test_counts_outside_empty_their_problem_only() -> None:
    cost = random_costs("uniform", (5, 12, 7))
    counts = torch.tensor([7, -1, 8, 2**40, 3])
    expected = linear_sum_assignment(cost, torch.tensor([7, 0, 0, 0, 3]))
    assert torch.equal(linear_sum_assignment(cost.cuda(), counts.cuda()).cpu(), expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(-1, -2),
        lambda x: x[:, ::2, 1::3],
        lambda x: x.transpose(0, 1),
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x.unflatten(0, (2, 3)).transpose(0, 1),
    ],
)
@pytest.mark.parametrize("shape", [(6, 10, 14), (6, 280, 300)])
def test_strides(view, shape: tuple[int, ...]) -> None:
    cost = random_costs("uniform", shape)
    assert torch.equal(linear_sum_assignment(view(cost.cuda())).cpu(), linear_sum_assignment(view(cost)))


@pytest.mark.parametrize("shape", [(100, 20), (200, 256), (300, 400), (20, 6000)])
def test_runs_on_the_current_stream_without_waiting(shape: tuple[int, int]) -> None:
    first, second = random_costs("uniform", (4, *shape)), random_costs("tied", (4, *shape))
    late, cost, stream = second.cuda(), first.cuda(), torch.cuda.Stream()
    linear_sum_assignment(cost)  # loads the kernels
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # some 0.3 s
        cost.copy_(late)
        result = linear_sum_assignment(cost)
        assert not stream.query()
    stream.synchronize()
    torch.testing.assert_close(totals(second, result.cpu()), totals(second, linear_sum_assignment(second)))


@pytest.mark.parametrize("shape", [(100, 20), (200, 256), (300, 400), (20, 6000)])
def test_captured_into_a_graph(shape: tuple[int, int]) -> None:
    cost, counts = torch.zeros(4, *shape, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    linear_sum_assignment(cost, counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = linear_sum_assignment(cost, counts)
    for fresh, number in ((random_costs("uniform", (4, *shape)), shape[1]), (-random_costs("uniform", (4, *shape)), 3)):
        cost.copy_(fresh)
        counts.fill_(number)
        graph.replay()
        assert torch.equal(result.cpu(), linear_sum_assignment(fresh, counts.cpu()))


def test_any_device_and_the_current_one_stays() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    cost = random_costs("uniform", (5, 40, 30))
    for current, other in ((0, 1), (1, 0)):
        with torch.cuda.device(current):
            result = linear_sum_assignment(cost.to(f"cuda:{other}"))
            assert torch.cuda.current_device() == current and result.device.index == other
            assert torch.equal(result.cpu(), linear_sum_assignment(cost))


@pytest.mark.parametrize("shape", [(100, 20), (300, 400), (20, 6000)])
def test_every_run_gives_the_same(shape: tuple[int, int]) -> None:
    cost = random_costs("tied", (8, *shape)).cuda()
    expected = linear_sum_assignment(cost)
    assert all(torch.equal(linear_sum_assignment(cost), expected) for _ in range(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_and_compile(dtype: torch.dtype) -> None:
    cost = random_costs("uniform", (2, 3, 9, 5), dtype).cuda()
    counts = torch.tensor([[2, 0, 5], [4, 1, 3]], device="cuda")
    torch.library.opcheck(torch.ops.maskformer_fast.linear_sum_assignment.default, (cost, counts))
    compiled = torch.compile(linear_sum_assignment, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(cost, counts), linear_sum_assignment(cost, counts))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_no_errors(tool: str) -> None:
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("no compute-sanitizer: it comes with the CUDA toolkit")
    code = (
        "import torch\n"
        "from maskformer_fast.ops import linear_sum_assignment\n"
        "for shape in ((20, 7), (7, 20), (60, 250), (9, 300), (300, 9), (3, 6000)):\n"
        "    cost = torch.randn(2, *shape).round().cuda()\n"
        "    linear_sum_assignment(cost); linear_sum_assignment(cost, torch.tensor([3, 7]).cuda())\n"
        "torch.cuda.synchronize()"
    )
    status, output = run_under_sanitizer(sanitizer, tool, "-c", code)
    assert status == 0, output


def test_too_little_scratch_is_refused() -> None:
    cost, row_of = torch.zeros(1, 20, 6000, device="cuda"), torch.zeros(1, 6000, dtype=torch.int64, device="cuda")
    arguments = (cost.data_ptr(), (1, 20, 6000), (120000, 6000, 1), 0, row_of.data_ptr())
    extension = load_extension()
    size = extension.assignment_scratch_bytes_f32(*arguments, 0)
    assert size > 6000 * 8
    with pytest.raises(ValueError, match=f"scratch: expected {size} bytes, got {size - 1}"):
        extension.linear_sum_assignment_cuda_f32(*arguments, 0, size - 1, 0, 0)
