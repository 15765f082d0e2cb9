"""Deformable attention against `grid_sample` in float64, gradients against numerical ones, and official recordings."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.ops import deformable_attention
from maskformer_fast.ops.deformable_attention import deformable_attention_eager
from tests.support.paths import ORACLES

LEVELS = ((5, 7), (3, 2), (1, 1))
# Of the largest value. Locations of float32 have an error of 1e-7 of the level's side, and gradients by them are sums.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2}
RECORDINGS = ORACLES / "m2f_r50_coco_tiny" / "msda.pt"


class Case(NamedTuple):
    value: Tensor
    level_sizes: tuple[tuple[int, int], ...]
    reference_points: Tensor
    offsets: Tensor
    logits: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        return [self.value, self.reference_points, self.offsets, self.logits]

    def double(self) -> Case:
        return Case(*[x.detach().double() if isinstance(x, Tensor) else x for x in self])

    def requires_grad(self) -> Case:
        for tensor in self.inputs:
            tensor.requires_grad_()
        return self


def random_case(
    seed=0, batch=2, queries=9, heads=3, dim=32, points=4, level_sizes=LEVELS, dtype=torch.float32, spread=2.0
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    cells, levels = sum(h * w for h, w in level_sizes), len(level_sizes)
    reference = torch.rand(batch, queries, levels, 2, generator=generator, dtype=torch.float64)
    return Case(
        normal(batch, cells, heads, dim).to(dtype),
        tuple(level_sizes),
        reference.to(torch.promote_types(dtype, torch.float32)),
        (spread * normal(batch, queries, heads, levels, points, 2)).to(dtype),
        normal(batch, queries, heads, levels, points).to(dtype),
    )


def oracle(value, level_sizes, reference_points, offsets, logits):
    """What the official code computes, by locations in 0..1 and `grid_sample`."""
    batch, _, heads, dim = value.shape
    queries, levels, points = logits.shape[1], *logits.shape[3:]
    sides = torch.tensor([[w, h] for h, w in level_sizes], dtype=offsets.dtype)
    locations = reference_points[:, :, None, :, None] + offsets / sides[:, None]
    weights = logits.flatten(3).softmax(-1).unflatten(3, (levels, points))
    result = value.new_zeros(batch * heads, dim, queries)
    for level, part in enumerate(value.split([h * w for h, w in level_sizes], 1)):
        image = part.permute(0, 2, 3, 1).reshape(batch * heads, dim, *level_sizes[level])
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        samples = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        result = result + (samples * weights[:, :, :, level].transpose(1, 2).reshape(-1, 1, queries, points)).sum(-1)
    return result.view(batch, heads * dim, queries).transpose(1, 2)


def assert_close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    if wanted.numel():
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


def check_against_oracle(case: Case, function=deformable_attention) -> None:
    exact, case = case.double().requires_grad(), case.requires_grad()
    got, wanted = function(*case), oracle(*exact)
    assert got.dtype == case.value.dtype and got.is_contiguous()
    tolerance = TOLERANCE[case.value.dtype]
    assert_close(got, wanted, tolerance)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(got.dtype)
    gradients = torch.autograd.grad(got, case.inputs, upstream)
    expected = torch.autograd.grad(wanted, exact.inputs, upstream.double())
    for gradient, own, tensor in zip(gradients, expected, case.inputs, strict=True):
        assert gradient.dtype == tensor.dtype
        assert_close(gradient, own, 2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        {}, {"dim": 5, "points": 3}, {"dim": 47, "points": 5, "heads": 1}, {"dim": 1, "points": 1, "batch": 1},
        {"dim": 64, "level_sizes": ((9, 4), (8, 8), (2, 9), (1, 5), (3, 1))}, {"level_sizes": ((1, 1),), "points": 2},
    ],
)  # fmt: skip
def test_every_instruction_set_equals_float64(shape, dtype, isa):
    check_against_oracle(random_case(dtype=dtype, **shape))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), batch=st.integers(0, 3), queries=st.integers(0, 20), heads=st.integers(1, 4),
    dim=st.integers(0, 40), points=st.integers(1, 9), spread=st.sampled_from([0.5, 4.0, 30.0]),
    level_sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), threads=st.integers(1, 4),
)  # fmt: skip
def test_random_shapes_equal_float64(threads, **shape):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if shape["batch"] * shape["queries"] * shape["dim"] == 0:
            check_empty(random_case(**shape))
        else:
            check_against_oracle(random_case(**shape))
    finally:
        torch.set_num_threads(before)


def check_empty(case: Case) -> None:
    """Without images, queries or channels there is a result of the right shape, and gradients are zero."""
    result = deformable_attention(*case.requires_grad())
    assert result.shape == (*case.logits.shape[:2], case.value.shape[2] * case.value.shape[3])
    for gradient in torch.autograd.grad(result, case.inputs, torch.ones_like(result)):
        assert not gradient.any()


def test_eager_twin_equals_float64():
    check_against_oracle(random_case(spread=4.0), deformable_attention_eager)
    check_against_oracle(random_case(dtype=torch.bfloat16), deformable_attention_eager)


@pytest.mark.parametrize("function", [deformable_attention, deformable_attention_eager])
def test_gradients_are_those_of_differences(function):
    case = random_case(queries=2, heads=2, dim=3, points=2, dtype=torch.float64).requires_grad()

    def by_tensors(value, reference_points, offsets, logits):
        return function(value, case.level_sizes, reference_points, offsets, logits)

    assert torch.autograd.gradcheck(by_tensors, case.inputs)


def test_result_and_gradients_do_not_depend_on_threads():
    case = random_case(queries=300, heads=5).requires_grad()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            got = deformable_attention(*case)
            results.append([got, *torch.autograd.grad(got.square().sum(), case.inputs)])
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_tensors_of_other_strides():
    case = random_case()
    strided = Case(
        case.value.transpose(1, 2).contiguous().transpose(1, 2), case.level_sizes,
        case.reference_points[:1].expand_as(case.reference_points), case.offsets.flip(1).flip(1).mT.contiguous().mT,
        torch.stack([case.logits, case.logits], -1)[..., 0],
    )  # fmt: skip
    check_against_oracle(strided)


BACKENDS = pytest.mark.parametrize("function", [deformable_attention, deformable_attention_eager])


@BACKENDS
def test_locations_outside_read_nothing(function, isa):
    case = random_case(level_sizes=((4, 6),), points=1, heads=1)
    case.reference_points.fill_(0.5), case.offsets.zero_()
    centre = torch.tensor([3.0, 2.0]) - 0.5  # in cells
    locations = [(-1, 1), (-1.5, 1), (6, 1), (1, -1), (1, 4), (1e30, 1), (-1e30, 1), (torch.inf, 1), (torch.nan, 1)]
    case.offsets[0, :, 0, 0, 0] = torch.tensor(locations) - centre
    case.value[0, 0] = torch.inf  # a cell that nothing outside may read
    case.requires_grad()
    result = function(*case)
    assert not result[0].any()
    gradients = torch.autograd.grad(result[0].sum(), case.inputs)
    assert not any(gradient.any() for gradient in gradients)


@BACKENDS
def test_edges_are_half_read(function, isa):
    case = random_case(batch=1, queries=4, level_sizes=((4, 6),), points=1, heads=1)
    case.reference_points.fill_(0), case.offsets.zero_()
    case.offsets[0, :, 0, 0, 0] = torch.tensor([(-0.5, 0.0), (5.5, 0.0), (0.0, -0.5), (5.0, 3.5)]) + 0.5
    cells = case.value[0, :, 0]
    wanted = torch.stack([cells[0], cells[5], cells[0], cells[23]]) / 2
    torch.testing.assert_close(function(*case)[0], wanted)


@BACKENDS
def test_numbers_that_are_not_finite(function, isa):
    case = random_case(heads=2)
    clean = function(*case)
    case.logits[0, 0, 0, 1, 2] = torch.nan
    case.logits[0, 1, 0, 1, 2] = torch.inf
    case.logits[0, 2, 0] = -torch.inf
    case.offsets[0, 2, 0] = 1e6  # reads nothing, and is NaN all the same
    got = function(*case)
    assert got[0, :3, :32].isnan().all()
    got[0, :3, :32] = clean[0, :3, :32]
    assert torch.equal(got, clean)

    case = random_case(heads=2)
    case.logits[:, :, :, 1] = -torch.inf
    check_against_oracle(case, function)  # the level has no weight

    case = random_case(level_sizes=((9, 9),), heads=1, points=1, spread=0.0)
    case.reference_points.fill_(0.5)
    case.value[0, 4 * 9 + 5] = torch.nan  # read with weight zero
    case.value[1, 4 * 9 + 3] = torch.nan  # not read
    got = function(*case)
    assert got[0].isnan().all() and not got[1].isnan().any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"value": torch.zeros(2, 42, 3, 32).half()}, TypeError, r"value: expected one of torch.float32, .*, got"),
        ({"offsets": torch.zeros(2, 9, 3, 3, 4, 2).bfloat16()}, TypeError, r"offsets: expected torch.float32, got"),
        ({"logits": torch.zeros(2, 9, 3, 3, 4).double()}, TypeError, r"logits: expected torch.float32, got"),
        ({"reference_points": torch.zeros(2, 9, 3, 2).double()}, TypeError, r"reference_points: expected .*32"),
        ({"value": torch.zeros(2, 42, 96)}, ValueError, r"value: expected shape \[B, S, heads, D\], got \(2, 42, 96\)"),
        ({"value": torch.zeros(2, 41, 3, 32)}, ValueError, r"value: expected 42 cells as level_sizes say, got 41"),
        ({"logits": torch.zeros(2, 9, 3, 12)}, ValueError, r"logits: expected shape \[B, Q, heads, levels, points\]"),
        ({"logits": torch.zeros(2, 9, 3, 3, 0)}, ValueError, r"logits: expected at least one level and point, got"),
        ({"logits": torch.zeros(2, 9, 2, 3, 4)}, ValueError, r"logits: expected shape \(2, 9, 3, 3, 4\), got"),
        ({"offsets": torch.zeros(2, 9, 3, 3, 4)}, ValueError, r"offsets: expected shape \(2, 9, 3, 3, 4, 2\), got"),
        ({"reference_points": torch.zeros(1, 9, 3, 2)}, ValueError, r"reference_points: expected shape \(2, 9, 3, 2\)"),
        ({"level_sizes": ((6, 7),)}, ValueError, r"level_sizes: expected 3 pairs of height and width, got"),
        ({"level_sizes": ((6, 7), (1, 0), (0, 1))}, ValueError, r"level_sizes: expected positive sides, got"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("raw", [False, True])
def test_what_does_not_fit_is_an_error(changes, error, message, raw):
    arguments = random_case()._asdict() | changes
    function = torch.ops.maskformer_fast.deformable_attention if raw else deformable_attention
    if raw:
        arguments["level_sizes"] = [side for pair in arguments["level_sizes"] for side in pair]
    with pytest.raises(error, match=message):
        function(**arguments)


def test_backward_refuses_another_gradient():
    value, level_sizes, *others = random_case()
    sizes = [side for pair in level_sizes for side in pair]
    for gradient, error, message in (
        (torch.zeros(2, 9, 95), ValueError, r"gradient: expected shape \(2, 9, 96\), got \(2, 9, 95\)"),
        (torch.zeros(2, 9, 96).double(), TypeError, r"gradient: expected torch.float32, got torch.float64"),
    ):
        with pytest.raises(error, match=message):
            torch.ops.maskformer_fast.deformable_attention_backward(gradient, value, sizes, *others)
    with pytest.raises(ValueError, match=r"level_sizes: expected pairs of height and width, got \(\(1, 2, 3\),\)"):
        deformable_attention(value, ((1, 2, 3),), *others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_registered_for_export_and_compilation(dtype):
    value, level_sizes, *others = random_case(dtype=dtype).requires_grad()
    sizes = [side for pair in level_sizes for side in pair]
    torch.library.opcheck(torch.ops.maskformer_fast.deformable_attention.default, (value, sizes, *others))
    inputs = [tensor.detach() for tensor in (value, *others)]
    torch.library.opcheck(
        torch.ops.maskformer_fast.deformable_attention_backward.default,
        (torch.ones(2, 9, 96, dtype=dtype), inputs[0], sizes, *inputs[1:]),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(("name", "tolerance"), [("core_f32", 2e-5), ("core_f64", 1e-12)])
def test_official_recordings(name, tolerance):
    if not RECORDINGS.exists():
        pytest.skip("no official recordings here")
    record = torch.load(RECORDINGS, weights_only=True)[name]
    sizes = tuple((h, w) for h, w in record.get("spatial_shapes", torch.tensor([[3, 5], [7, 6], [1, 9]])).tolist())
    locations, weights, gradients = record["sampling_locations"], record["attention_weights"], record["grads"]
    sides = torch.tensor([[w, h] for h, w in sizes]).to(locations)[:, None]
    origin = locations.new_zeros(*locations.shape[:2], len(sizes), 2)
    case = Case(record["value"], sizes, origin, locations * sides, weights.log()).requires_grad()
    total = weights.sum((3, 4))  # 1 in float32
    got = (deformable_attention(*case).unflatten(2, (total.shape[2], -1)) * total.unsqueeze(3)).flatten(2)
    assert_close(got, record["output"], tolerance)
    by_value, _, by_offset, by_logit = torch.autograd.grad(got, case.inputs, record["grad_output"].to(got))
    assert_close(by_value, gradients["value"], tolerance)
    by_weight = gradients["attention_weights"]
    mean = (weights * by_weight).sum((3, 4), keepdim=True) / total[..., None, None]
    assert_close(by_logit, weights * (by_weight - mean), tolerance)
    places = locations * sides - 0.5
    smooth = (places - places.round()).abs() > 1e-4  # at a cell's centre the derivative jumps
    assert smooth.double().mean() > 0.6
    assert_close((by_offset * sides)[smooth], gradients["sampling_locations"][smooth], tolerance)


@pytest.mark.slow
def test_it_compiles_and_exports_with_dynamic_sizes(tmp_path):
    class Network(torch.nn.Module):
        def forward(self, first, second, reference_points, offsets, logits):
            sizes = [tuple(level.shape[1:3]) for level in (first, second)]
            value = torch.cat([level.flatten(1, 2) for level in (first, second)], 1)
            return deformable_attention(value.unflatten(2, (2, -1)), sizes, reference_points, offsets, logits)

    def inputs(batch, queries, sizes, seed):
        case = random_case(seed, batch, queries, 2, 8, level_sizes=sizes)
        levels = case.value.flatten(2).split([h * w for h, w in sizes], 1)
        return (*[level.unflatten(1, size) for level, size in zip(levels, sizes, strict=True)], *case[2:])

    network = Network()
    shapes = [inputs(2, 9, ((5, 7), (3, 2)), 0), inputs(3, 11, ((4, 6), (8, 3)), 1), inputs(1, 1, ((1, 1), (2, 1)), 2)]
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=True)
    for tensors in shapes[:2]:
        leaves = [tensor.requires_grad_() for tensor in tensors]
        ours, wanted = compiled(*leaves), network(*leaves)
        torch.testing.assert_close(ours, wanted)
        for got, own in zip(*[torch.autograd.grad(x.square().sum(), leaves) for x in (ours, wanted)], strict=True):
            torch.testing.assert_close(got, own)

    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from maskformer_fast.deploy.build.deformable_attention import expand, translation

    dynamic = torch.export.Dim.DYNAMIC
    axes = ({0: dynamic, 1: dynamic, 2: dynamic},) * 2 + ({0: dynamic, 1: dynamic},) * 3
    path = tmp_path / "attention.onnx"
    detached = [[tensor.detach().contiguous() for tensor in tensors] for tensors in shapes]
    program = torch.onnx.export(
        network.eval(), tuple(detached[0]), dynamo=True, dynamic_shapes=axes, opset_version=20,
        custom_translation_table=translation(),
    )  # fmt: skip
    model = program.model_proto
    expand(model)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for tensors in detached:
        feeds = {spec.name: x.numpy() for spec, x in zip(session.get_inputs(), tensors, strict=True)}
        got = torch.from_numpy(session.run(None, feeds)[0])
        torch.testing.assert_close(got, network(*tensors), atol=1e-5, rtol=1e-5)
