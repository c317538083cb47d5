"""What must hold for any tensors, not only for those of an example."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cul_core.base.config import Config
from cul_core.base.errors import ConfigError
from cul_core.base.topk import top_k
from cul_core.mergers import MERGERS
from cul_core.mergers.base import WeightedConfig
from cul_core.mergers.ties import TiesConfig
from cul_core.models.discrete_process import DiscreteProcess
from cul_core.models.flow_process import FlowProcess
from cul_core.models.sampling import combine, predict_guided
from cul_core.models.text_conditioning import Conditioning
from cul_core.parts.part import Part
from cul_core.parts.subspace import Subspace, orthonormal_basis
from cul_core.regularizers import REGULARIZERS
from cul_core.training.constraints import Constraints

many, few = (settings(deadline=None, max_examples=count) for count in (40, 12))
SEEDS = st.integers(0, 2**31 - 1)
LEVELS = st.sampled_from((0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1e-40, -1e-40, 3e38))
"""Values with many ties, and the smallest and the largest magnitudes."""
VALUES = LEVELS | st.floats(-(2.0**99), 2.0**99, width=32)


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def tensors(draw, values=VALUES, most=40):
    rows = draw(st.integers(0, 5))
    columns = draw(st.integers(1, max(1, most // max(rows, 1))))
    flat = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(flat).reshape(rows, columns)


# --- the largest entries


def kept_by_sorting(named, count, order):
    """Masks of the `count` largest magnitudes by one sort, of equal ones the first in `order` and memory."""
    places = [(name, i) for name in order for i in range(named[name].numel())]
    flat = {name: named[name].flatten().abs().tolist() for name in order}
    kept = sorted(places, key=lambda place: -flat[place[0]][place[1]])[: max(count, 0)]
    masks = {name: torch.zeros(tensor.numel(), dtype=torch.bool) for name, tensor in named.items()}
    for name, i in kept:
        masks[name][i] = True
    return {name: mask.reshape(named[name].shape) for name, mask in masks.items()}


@many
@given(
    named=st.dictionaries(st.sampled_from("abcd"), tensors(), min_size=1),
    count=st.integers(-1, 130),
    is_reversed=st.booleans(),
)
def test_the_largest_entries_are_those_of_a_sort(named, count, is_reversed):
    order = sorted(named, reverse=is_reversed)
    cut = top_k(named, count, order if is_reversed else None)
    expected = kept_by_sorting(named, count, order)
    for name, tensor in named.items():
        assert torch.equal(cut.mask(name, tensor), expected[name])


@many
@given(tensor=tensors(), count=st.integers(0, 40))
def test_a_transposed_tensor_keeps_its_own_memory_order(tensor, count):
    mask = top_k({"": tensor.T}, count).mask("", tensor.T)
    assert mask.shape == tensor.T.shape and int(mask.sum()) == min(count, tensor.numel())


# --- protected text directions


@st.composite
def rows(draw, width):
    """(n, d) rows of any rank, the zero one too, some of them multiples of others."""
    count, rank = draw(st.integers(1, 6)), draw(st.integers(0, width - 1))
    seed = draw(SEEDS)
    factors = normal(seed, count, rank, dtype=torch.float64)
    return (
        factors @ normal(seed + 1, rank, width, dtype=torch.float64) * draw(st.sampled_from((1e-3, 1.0, 1e3)))
    )


@st.composite
def subspaces(draw, width):
    """What a part may protect, damp, or both."""
    protected = orthonormal_basis(draw(rows(width))) if draw(st.booleans()) else None
    moment = None
    if draw(st.booleans()):
        text = draw(rows(width))
        moment = text.T @ text / len(text)
    return Subspace(width, protected, moment)


@st.composite
def several_subspaces(draw, least=1, most=3):
    width = draw(st.integers(3, 9))
    return [draw(subspaces(width)) for _ in range(draw(st.integers(least, most)))]


def projector(basis):
    return basis @ basis.T


@many
@given(st.integers(3, 9).flatmap(rows))
def test_a_basis_is_orthonormal_and_spans_the_rows(rows):
    basis = orthonormal_basis(rows)
    assert basis.shape == (rows.shape[1], torch.linalg.matrix_rank(rows, rtol=1e-6))
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-12)
    assert torch.allclose(projector(basis) @ projector(basis), projector(basis), atol=1e-12)
    assert torch.allclose(rows @ projector(basis), rows, atol=1e-9 * max(1.0, rows.abs().max().item()))


@many
@given(several_subspaces())
def test_a_joined_subspace_is_the_span_of_all(parts):
    joined, width = Subspace.join(parts), parts[0].width
    bases = [part.protected for part in parts if part.protected is not None]
    assert (joined.protected is None) == (not bases)
    if bases:
        rank = (
            int(torch.linalg.matrix_rank(torch.cat(bases, 1), rtol=1e-6))
            if torch.cat(bases, 1).numel()
            else 0
        )
        assert joined.protected.shape == (width, rank)
        for basis in bases:
            assert torch.allclose(projector(joined.protected) @ basis, basis, atol=1e-9)
    moments = [part.moment for part in parts if part.moment is not None]
    assert (joined.moment is None) == (not moments)
    if moments:
        assert torch.allclose(joined.moment, sum(moments))


@many
@given(several_subspaces())
def test_what_is_allowed_is_the_orthonormal_complement(parts):
    joined, width = Subspace.join(parts), parts[0].width
    whole = joined.allowed if joined.protected is None else torch.cat([joined.protected, joined.allowed], 1)
    assert whole.shape == (width, width)
    assert torch.allclose(whole.T @ whole, torch.eye(width, dtype=torch.float64), atol=1e-11)
    if joined.moment is not None:
        damped = joined.allowed.T @ joined.moment @ joined.allowed
        off = damped - damped.diag().diag()
        assert off.norm() <= 1e-9 * joined.moment.norm()


class Restraint(Part):
    """A part that protects what it is given, and masks by a seed."""

    def __init__(self, subspace, seed=None):
        super().__init__(Config())
        self._subspace, self._seed, self._allowed = subspace, seed, None

    def prepare_mask(self, context, allowed_subspace):
        self._allowed = allowed_subspace("w")

    def subspace(self, name):
        return self._subspace

    def mask(self, name, weight):
        if self._seed is None:
            return None
        columns = weight.shape[1] if self._allowed is None else self._allowed.shape[1]
        return (normal(self._seed, len(weight), columns) > 0).to(weight.dtype)


@many
@given(
    parts=several_subspaces(),
    masks=st.lists(st.none() | SEEDS, min_size=3, max_size=3),
    has_free_part=st.booleans(),
    seed=SEEDS,
    scale=st.sampled_from((1e-6, 1.0, 1e4)),
)
def test_an_allowed_change_answers_no_protected_text_and_is_zero_where_it_is_masked(
    parts, masks, has_free_part, seed, scale
):
    restraints = [Restraint(*pair) for pair in zip(parts, masks, strict=False)]
    if has_free_part:
        restraints.append(Restraint(None, masks[0]))
    constraints = Constraints(restraints, "cpu")
    for part in restraints:
        part.prepare_mask(None, constraints.allowed_subspace)
    change = scale * normal(seed, 4, parts[0].width)
    allowed = constraints.allowed("w", change)
    for part in parts:
        if part.protected is not None:
            response = allowed.double() @ part.protected
            assert response.norm() <= 1e-5 * change.norm()
    basis = constraints.allowed_subspace("w")
    coordinates = allowed @ basis
    for part in restraints:
        if (mask := part.mask("w", change)) is not None:
            assert (coordinates * (1 - mask)).norm() <= 1e-5 * change.norm()
    # nothing more is taken away than must be
    kept = math.prod(
        (m for part in restraints if (m := part.mask("w", change)) is not None), start=torch.ones(1)
    )
    assert torch.allclose(coordinates, (change @ basis) * kept, atol=2e-5 * change.norm().item())
    assert torch.allclose(constraints.allowed("w", allowed), allowed, atol=2e-5 * change.norm().item())


@many
@given(masks=st.lists(SEEDS, min_size=1, max_size=3), seed=SEEDS)
def test_without_subspaces_a_change_is_exactly_zero_where_any_part_masks_it(masks, seed):
    restraints = [Restraint(None, each) for each in masks]
    change = normal(seed, 4, 6)
    constraints = Constraints(restraints, "cpu")
    allowed, may_change = constraints.allowed("w", change), torch.ones(4, 6)
    for part in restraints:
        may_change *= part.mask("w", change)
    assert torch.equal(allowed, change * may_change)
    assert constraints.allowed_subspace("w") is None


# --- proximal steps

ELEMENT_PENALTY = {"l1sp": torch.abs, "l2sp": torch.square}


@pytest.mark.parametrize("anchor", ("start", "pretrained", "both"))
@pytest.mark.parametrize("name", ELEMENT_PENALTY)
@few
@given(
    seed=SEEDS, threshold=st.sampled_from((0.0, 1e-3, 0.1, 0.7, 5.0)), apart=st.sampled_from((0.0, 1e-3, 1.0))
)
def test_a_proximal_step_minimises_its_objective(name, anchor, seed, threshold, apart):
    """threshold sum_a R(w - a) + (w - w')^2 / 2 of every value is no smaller anywhere on a grid."""
    count, rate = 12, 1e-2
    pretrained = normal(seed, count, dtype=torch.float64)
    start = pretrained + apart * normal(seed + 1, count, dtype=torch.float64)
    entry = REGULARIZERS.get(name)
    part = entry.cls(entry.config(strength=threshold * count / rate, anchor=anchor))
    part.prepare(SimpleNamespace(start={"w": start}, pretrained={"w": pretrained}))
    weight = start + normal(seed + 2, count, dtype=torch.float64)
    step = part.proximal("w", weight, rate)
    anchors = {"start": [start], "pretrained": [pretrained], "both": [start, pretrained]}[anchor]

    def objective(values):
        pull = sum(ELEMENT_PENALTY[name](values - each) for each in anchors)
        return threshold * pull + (values - weight).square() / 2

    grid = torch.cat([torch.linspace(-4, 4, 161), torch.logspace(-6, -1, 11), -torch.logspace(-6, -1, 11)])
    around = [step + distance for distance in grid.double()] + [weight, *anchors]
    least = torch.stack([objective(values) for values in around]).amin(0)
    assert (objective(step) <= least + 1e-12 * (1 + least.abs())).all()


# --- merging


@st.composite
def models(draw):
    """Deltas of one to four models, of which some lack a name."""
    names, seed = ("a", "b"), draw(SEEDS)
    deltas = []
    for number in range(draw(st.integers(1, 4))):
        held = draw(st.sets(st.sampled_from(names), min_size=1))
        deltas.append(
            {
                name: draw(st.sampled_from((1.0, 1e-4))) * _with_ties(normal(seed + number, 3, 4))
                for name in sorted(held)
            }
        )
    return deltas


def _with_ties(tensor):
    return torch.where(tensor.abs() < 0.7, (2 * tensor).round() / 2, tensor)


def mergers():
    """One of each, and every way of trimming and of merging what agrees."""
    found = [entry.config() for entry in MERGERS if entry.config is not TiesConfig]
    for trim in ("tensor", "global"):
        for function in ("mean", "sum", "max"):
            found.append(TiesConfig(trim=trim, function=function, keep_fraction=0.6))
    return [*found, TiesConfig(**TiesConfig.REFERENCE)]


def merged(config, deltas):
    return dict(MERGERS.of(config).cls(config).merge(deltas))


def bits(tensors):
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "config", mergers(), ids=lambda config: "-".join(map(str, config.to_json().values()))
)
@few
@given(deltas=models(), data=st.data())
def test_the_order_of_the_models_does_not_matter(config, deltas, data):
    order = data.draw(st.permutations(range(len(deltas))))
    weights = ()
    if isinstance(config, WeightedConfig) and data.draw(st.booleans()):
        weights = tuple(data.draw(st.sampled_from((0.25, 1.0, -1.5, 0.0))) for _ in deltas)
    values = config.to_json()
    one = config if not weights else type(config).from_json(values | {"weights": weights})
    other = one
    if weights:
        other = type(config).from_json(values | {"weights": tuple(weights[i] for i in order)})
    assert bits(merged(one, deltas)) == bits(merged(other, [deltas[i] for i in order]))


@pytest.mark.parametrize(
    "config", mergers(), ids=lambda config: "-".join(map(str, config.to_json().values()))
)
@few
@given(deltas=models())
def test_negated_models_merge_to_the_negated_result(config, deltas):
    negated = merged(config, [{name: -delta for name, delta in each.items()} for each in deltas])
    for name, delta in merged(config, deltas).items():
        assert torch.equal(negated[name], -delta)


# --- predictions


@many
@given(seed=SEEDS, count=st.integers(1, 3), scale=st.floats(1.125, 20.0))
def test_guidance_of_one_is_the_prompted_prediction(seed, count, scale):
    latents, text = normal(seed, count, 2, 3, 3), normal(seed + 1, count, 4, 5)
    null, calls = Conditioning(normal(seed + 2, 1, 4, 5)), []

    def predict(latents, time, conditioning):
        calls.append(len(latents))
        return latents * time + conditioning.text.mean((1, 2)).view(-1, 1, 1, 1)

    time = torch.tensor(7)
    prompted = predict(latents, time, Conditioning(text))
    assert torch.equal(predict_guided(predict, latents, time, Conditioning(text), null, 1), prompted)
    guided = predict_guided(predict, latents, time, Conditioning(text), null, scale)
    assert calls == [count, count, 2 * count]  # one call each; without guidance of half the size
    unprompted = predict(latents, time, null.expand(count))
    assert torch.allclose(guided, combine(unprompted, prompted, scale))
    assert torch.allclose(combine(unprompted, prompted, 1.0), prompted, atol=1e-5)


PROCESSES = [
    DiscreteProcess("epsilon"),
    DiscreteProcess("v_prediction"),
    DiscreteProcess("v_prediction", ends_in_noise=True),
    FlowProcess(),
    FlowProcess(shift=3.0),
]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@many
@given(seed=SEEDS, count=st.integers(1, 3), ends=st.booleans())
def test_a_perfect_prediction_gives_the_image_back(process, seed, count, ends):
    times = process.draw_times(count, torch.Generator().manual_seed(seed))
    if ends:  # the last of all, where nothing may be left of an image
        times[0] = 1.0 if times.is_floating_point() else process.timesteps - 1
    clean, noise = normal(seed, count, 2, 3, 3), normal(seed + 1, count, 2, 3, 3)
    noised = process.noised(clean, noise, times)
    signal, sigma = process.coefficients(times)
    assert torch.equal(noised, signal * clean + sigma * noise)
    again = process.clean(process.target(clean, noise, times), noised, times)
    is_noise = isinstance(process, DiscreteProcess) and process.prediction_type == "epsilon"
    worst = (1 / signal).max().item() if is_noise else 1.0  # noise says nothing where no signal is left
    assert torch.allclose(again, clean, rtol=0, atol=1e-6 * 8 * worst)


def test_noise_is_no_prediction_on_a_schedule_that_ends_in_noise():
    """At its last time nothing of an image is left, so that noise implies none."""
    signal, sigma = DiscreteProcess("v_prediction", ends_in_noise=True).coefficients(torch.arange(1000))
    assert signal[-1] == 0 and sigma[-1] == 1 and (signal[:-1] > 0).all()
    with pytest.raises(ConfigError, match="zero terminal SNR.*choose 'v_prediction'"):
        DiscreteProcess("epsilon", ends_in_noise=True)
