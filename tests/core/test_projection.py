"""Gradient projection: the maths on small matrices, then in a real step."""

import pytest
import torch

from cul_core.concepts import Concept
from cul_core.conditioning import prompt_rows, target_vector
from cul_core.errors import ConceptError
from cul_core.params import is_kv
from cul_core.regularizers.projection import (
    ProjectionConfig,
    complement_basis,
    distinct_columns,
    orthonormal_basis,
    regularized_projector,
)
from cul_core.training import run_step


def rows_of(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 48, generator=generator, dtype=torch.float64)
    if kind == "near duplicates":
        rows[6:] = rows[:6] + 1e-3 * rows[6:]
    if kind == "duplicates":
        rows[6:] = rows[:6]
    if kind == "outlier coordinates":
        rows[:, :2] += 60
    return rows


@pytest.mark.parametrize("kind", ["random", "near duplicates", "duplicates", "outlier coordinates"])
def test_basis_removes_every_protected_row_and_is_a_projector(kind):
    rows = rows_of(kind)
    basis = orthonormal_basis(rows)
    projector = torch.eye(48, dtype=torch.float64) - basis @ basis.T
    assert (rows @ projector).abs().max() <= 1e-5 * rows.norm()
    assert torch.allclose(projector @ projector, projector, atol=1e-6)
    assert torch.allclose(projector, projector.T, atol=1e-6)


def test_basis_of_duplicates_has_the_rank_of_the_distinct_rows():
    assert orthonormal_basis(rows_of("duplicates")).shape == (48, 6)


def test_complement_is_orthonormal_and_orthogonal_to_what_is_protected():
    basis = orthonormal_basis(torch.randn(5, 48, generator=torch.Generator().manual_seed(0)))
    complement = complement_basis(basis)
    assert complement.shape == (48, 43)
    assert (basis.T @ complement).abs().max() < 1e-12
    assert torch.allclose(complement.T @ complement, torch.eye(43, dtype=torch.float64), atol=1e-12)


def test_duplicate_filter_keeps_the_first_of_two_equal_rows():
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    assert distinct_columns(rows).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_reference_projector_is_only_approximate_where_the_basis_is_exact():
    rows = rows_of("outlier coordinates")
    reference = (rows.float() @ regularized_projector(rows)).abs().max() / rows.norm()
    basis = orthonormal_basis(rows)
    exact = (rows - rows @ basis @ basis.T).abs().max() / rows.norm()
    assert exact < 1e-12 < reference


def protected(random_bundle, names=("Navy_Stripes", "Lava")):
    return torch.stack([target_vector(random_bundle, Concept(name)) for name in names])


def relative_change(model, bundle, vectors):
    parameters = dict(bundle.unet.named_parameters())
    return max(((delta.double() @ vectors.T).norm() / (parameters[name].double() @ vectors.T).norm()).item()
               for name, delta in model.edits.items() if is_kv(name))  # fmt: skip


def test_update_projection_keeps_protected_outputs_under_adam_and_weight_decay_where_the_reference_does_not(
    random_model, random_bundle, bundles, anchors, make_request
):
    changes = {}
    for form in ("update", "reference"):
        request = make_request(regularizers=[ProjectionConfig(form=form)], iterations=20, learning_rate=1e-3, weight_decay=0.01)
        edited, _ = run_step(random_model, request, store=anchors, bundles=bundles["random"])
        changes[form] = relative_change(edited, random_bundle, protected(random_bundle))
    assert changes["update"] < 1e-5
    assert changes["reference"] > 100 * changes["update"]


def test_earlier_targets_are_protected_under_their_display_names(random_model, random_bundle, bundles, anchors, make_request):
    first, _ = run_step(random_model, make_request("Neon_Cyan"), store=anchors, bundles=bundles["random"])
    second, _ = run_step(
        first, make_request("Lava", regularizers=[ProjectionConfig()], retain=()), store=anchors, bundles=bundles["random"]
    )
    vector = target_vector(random_bundle, Concept("Neon Cyan"))
    for name in first.edits:
        moved = second.edits[name] - first.edits[name]
        assert moved.abs().max() > 0
        assert (moved.double() @ vector).norm() < 1e-5 * moved.norm() * vector.norm()


def response(model, rows):
    return sum((delta.double() @ rows.T).square().sum().item() for delta in model.edits.values()) / len(rows)


def test_decoys_protect_names_nobody_listed(random_model, random_bundle, bundles, anchors, make_request):
    """The change acts on the target's own text as before, but less on other names in the same sentences."""
    sentences = ("In {} Style, a star image.", "a house, in {} Style.")
    others = prompt_rows(random_bundle, [s.format(name) for name in ("paper", "grey rain", "Neon Gold") for s in sentences], "all")
    own = prompt_rows(random_bundle, [s.format("Candy Stripes") for s in sentences], "all")
    spill = {}
    for decoys in (0, 60):
        regularizers = [ProjectionConfig(decoys=decoys, damping=1e-4)] if decoys else []
        edited, _ = run_step(random_model, make_request(regularizers=regularizers, retain=()), store=anchors, bundles=bundles["random"])
        spill[decoys] = response(edited, others) / response(edited, own)
    assert spill[0] > 0.8
    assert spill[60] < 0.5 * spill[0]


def test_a_target_that_the_kept_concepts_cover_is_refused(random_model, bundles, anchors, make_request):
    """Every position of a few prompts spans the whole text space: nothing would be left to change."""
    request = make_request("Candy Stripes", regularizers=[ProjectionConfig(rows="all")], retain=("Navy_Stripes", "Lava", "Aurora"))
    with pytest.raises(ConceptError, match=r"Only 0\.\d\d of 'Candy Stripes' would be left to forget"):
        run_step(random_model, request, store=anchors, bundles=bundles["random"])


def test_kept_concepts_too_near_the_target_are_left_out(random_model, bundles, anchors, make_request, monkeypatch):
    monkeypatch.setattr("cul_core.regularizers.projection._NEAR_TARGET_COSINE", -1.0)
    with pytest.raises(ConceptError, match="all of it says the same as the target"):
        run_step(random_model, make_request(regularizers=[ProjectionConfig()]), store=anchors, bundles=bundles["random"])


def test_an_empty_keep_list_is_refused(random_model, bundles, anchors, make_request):
    with pytest.raises(ConceptError, match="nothing to protect"):
        run_step(random_model, make_request(regularizers=[ProjectionConfig()], retain=()), store=anchors, bundles=bundles["random"])
