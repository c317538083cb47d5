"""Gradient projection: the maths on small matrices, then in a real step."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cul_core.base.errors import ConceptError
from cul_core.concepts.captions import anchor_prompts
from cul_core.concepts.concept import Concept
from cul_core.mergers.merge import merge
from cul_core.mergers.ties import TiesConfig
from cul_core.mergers.uniform import UniformConfig
from cul_core.minicanvas.family import MINI
from cul_core.models.sampling import SamplerConfig
from cul_core.parts.prompt_vectors import prompt_rows, target_vector
from cul_core.parts.subspace import complement_basis, orthonormal_basis
from cul_core.regularizers.projection import (
    GradientProjection,
    ProjectionConfig,
    distinct_columns,
    regularized_projector,
)
from cul_core.training.constraints import Constraints
from cul_core.training.loop import update
from cul_core.training.step import run_step


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


class Made(TorchDispatchMode):
    """Counts the values of all new tensors."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not any(made is other for other in args) and not func.is_view:
            self.values += made.numel()
        return made


def stacked_anew(columns, cosine=0.95):
    """The filter as the reference writes it: every row is compared with a new stack of all that are kept."""
    kept = []
    for row in columns:
        unit = row / row.norm()
        if not kept or (torch.stack([other / other.norm() for other in kept]) @ unit).max() < cosine:
            kept.append(row)
    return torch.stack(kept)


@pytest.mark.parametrize("seed", range(5))
def test_duplicate_filter_keeps_what_the_references_keeps(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(120, 24, generator=generator, dtype=torch.float64)
    near = rows[torch.randint(120, (80,), generator=generator)] * 3
    rows = torch.cat([rows, near + torch.randn(80, 24, generator=generator)])[
        torch.randperm(200, generator=generator)
    ]
    kept = distinct_columns(rows)
    assert 120 <= len(kept) < 200 and torch.equal(kept, stacked_anew(rows))


def test_duplicate_filter_compares_each_row_once_with_those_kept_and_copies_none_of_them_again():
    """Of 300 distinct rows and 300 copies, 300 are kept; tensors made on the way hold far fewer values than a
    stack per row."""
    rows = torch.eye(300, dtype=torch.float64).repeat(2, 1)
    with Made() as made:
        assert torch.equal(distinct_columns(rows), rows[:300])
    assert made.values < 10 * rows.numel()


def test_duplicate_filter_keeps_a_row_of_zeros_where_it_stands():
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    assert distinct_columns(rows).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_reference_projector_is_only_approximate_where_the_basis_is_exact():
    rows = rows_of("outlier coordinates")
    reference = (rows.float() @ regularized_projector(rows)).abs().max() / rows.norm()
    basis = orthonormal_basis(rows)
    exact = (rows - rows @ basis @ basis.T).abs().max() / rows.norm()
    assert exact < 1e-12 < reference


def protected(random_network, names=("Navy_Stripes", "Lava")):
    return torch.stack([target_vector(random_network, Concept(name)) for name in names])


def relative_change(model, network, vectors):
    readers = network.weights("text_readers")
    return max(
        ((delta.double() @ vectors.T).norm() / (readers[name].double() @ vectors.T).norm()).item()
        for name, delta in model.edits.items()
        if name in readers
    )


def test_update_projection_keeps_protected_outputs_under_adam_and_weight_decay_where_the_reference_does_not(
    random_model, random_network, networks, anchors, make_request
):
    changes = {}
    for form in ("update", "reference"):
        request = make_request(
            regularizers=[ProjectionConfig(form=form)], iterations=20, learning_rate=1e-3, weight_decay=0.01
        )
        edited, _ = run_step(random_model, request, store=anchors, networks=networks["random"])
        changes[form] = relative_change(edited, random_network, protected(random_network))
    assert changes["update"] < 1e-5
    assert changes["reference"] > 100 * changes["update"]


@pytest.fixture
def prepared(random_model, networks, anchors, make_request, monkeypatch):
    """(The projection of a step without updates, the step's report)."""

    def run(config, **parts):
        seen, original = [], GradientProjection.prepare

        def prepare(self, context):
            seen.append(self)
            original(self, context)

        with monkeypatch.context() as patch:
            patch.setattr(GradientProjection, "prepare", prepare)
            _, report = run_step(
                random_model,
                make_request(regularizers=[config], iterations=0, **parts),
                store=anchors,
                networks=networks["random"],
            )
        return seen[0], report

    return run


def test_a_hundred_updates_with_weight_decay_leave_what_becomes_of_protected_text(prepared, random_network):
    projection, _ = prepared(ProjectionConfig())
    name, generator = min(random_network.weights("text_readers")), torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 192, generator=generator))
    before, optimizer = weight.detach().clone(), torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1)
    training, constraints = SimpleNamespace(max_grad_norm=0.0), Constraints([projection], "cpu")
    for _ in range(100):
        weight.grad = torch.randn(64, 192, generator=generator)
        update({name: weight}, optimizer, [projection], constraints, training)
    change, columns = (weight - before).detach().double(), protected(random_network).T
    assert (change @ columns).norm() < 1e-5 * (before.double() @ columns).norm()
    assert change.norm() > 0.1 * before.norm()


def test_what_two_projections_protect_is_protected_exactly_where_one_after_the_other_is_not(
    prepared, random_model, random_network, networks, anchors, make_request
):
    """The union of their directions; each projector alone undoes part of the other."""
    configs = [ProjectionConfig(), ProjectionConfig(rows="last", auxiliary_names="Tartan, object: moon")]
    both = [prepared(config)[0] for config in configs]
    name, generator = min(random_network.weights("text_readers")), torch.Generator().manual_seed(0)
    change = torch.randn(64, 192, generator=generator)
    lasting = ["Navy_Stripes", "Lava", "Tartan"]
    prompts = [*(Concept(kept).prompt for kept in lasting), Concept("moon", "object").prompt]
    lists = [protected(random_network), prompt_rows(random_network, prompts, "last")]
    assert [projection.report()["protected_rank"] for projection in both] == [2, 4]

    def responses(allowed, weight=change):
        return [
            ((allowed.double() @ rows.T).norm() / (weight.double() @ rows.T).norm()).item() for rows in lists
        ]

    def chained(parts):
        allowed = change
        for part in parts:
            allowed = Constraints([part], "cpu").allowed(name, allowed)
        return responses(allowed)

    assert max(chained(both)) > 1e-2 < max(chained(both[::-1]))
    joined = [Constraints(parts, "cpu").allowed(name, change) for parts in (both, both[::-1])]
    assert max(responses(joined[0]) + responses(joined[1])) < 1e-6
    assert joined[0].norm() > 0.9 * change.norm()
    request = make_request(regularizers=configs, iterations=4, learning_rate=1e-3, weight_decay=0.01)
    edited, _ = run_step(random_model, request, store=anchors, networks=networks["random"])
    readers = random_network.weights("text_readers")
    assert len(edited.edits) == 14
    assert max(max(responses(delta, readers[name])) for name, delta in edited.edits.items()) < 1e-6


def test_what_is_orthogonal_to_protected_text_and_every_other_matrix_is_left_alone(prepared, random_network):
    """G (I - Q Q^T) = G where G Q = 0; the reference's P is only approximate, and acts on the gradient."""
    rows = prompt_rows(random_network, [Concept(name).prompt for name in ("Navy_Stripes", "Lava")], "last")
    free = complement_basis(orthonormal_basis(torch.cat([protected(random_network), rows])))
    change = (
        torch.randn(64, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ free @ free.T
    ).float()
    exact, _ = prepared(ProjectionConfig())
    reference, _ = prepared(ProjectionConfig(**ProjectionConfig.REFERENCE))
    value = next(name for name in random_network.weights("text_readers") if name.endswith("to_v.weight"))
    constraints = Constraints([exact], "cpu")
    torch.testing.assert_close(constraints.allowed(value, change), change, atol=1e-5, rtol=0)
    torch.testing.assert_close(reference.transform_gradient(value, change), change, atol=1e-4, rtol=0)
    for end in ("attn2.to_q.weight", "attn1.to_k.weight"):
        name = next(name for name in random_network.weights("attention") if name.endswith(end))
        assert constraints.allowed(name, change) is change
        assert reference.transform_gradient(name, change) is change


def test_where_everything_is_protected_nothing_changes(
    random_model, networks, anchors, make_request, monkeypatch
):
    monkeypatch.setattr(
        "cul_core.regularizers.projection.prompt_rows", lambda *text: torch.eye(192, dtype=torch.float64)
    )
    monkeypatch.setattr("cul_core.regularizers.projection.LEAST_TARGET_ENERGY", -1.0)
    edited, report = run_step(
        random_model,
        make_request(regularizers=[ProjectionConfig()]),
        store=anchors,
        networks=networks["random"],
    )
    assert report.figures["protected_rank"] == 192
    assert all(delta.abs().max() < 1e-7 for delta in edited.edits.values())


def test_earlier_targets_are_protected_under_their_display_names(
    random_model, random_network, networks, anchors, make_request
):
    first, _ = run_step(random_model, make_request("Neon_Cyan"), store=anchors, networks=networks["random"])
    second, _ = run_step(
        first,
        make_request("Lava", regularizers=[ProjectionConfig()], retain=()),
        store=anchors,
        networks=networks["random"],
    )
    vector = target_vector(random_network, Concept("Neon Cyan"))
    for name in first.edits:
        moved = second.edits[name] - first.edits[name]
        assert moved.abs().max() > 0
        assert (moved.double() @ vector).norm() < 1e-5 * moved.norm() * vector.norm()


def response(model, rows):
    return sum((delta.double() @ rows.T).square().sum().item() for delta in model.edits.values()) / len(rows)


def test_decoys_protect_names_nobody_listed(random_model, random_network, networks, anchors, make_request):
    """The change acts on the target's own text as before, but less on other names in the same sentences."""
    sentences = ("In {} Style, a star image.", "a house, in {} Style.")
    others = prompt_rows(
        random_network,
        [s.format(name) for name in ("paper", "grey rain", "Neon Gold") for s in sentences],
        "all",
    )
    own = prompt_rows(random_network, [s.format("Candy Stripes") for s in sentences], "all")
    spill = {}
    for decoys in (0, 60):
        regularizers = [ProjectionConfig(decoys=decoys, damping=1e-4)] if decoys else []
        edited, _ = run_step(
            random_model,
            make_request(regularizers=regularizers, retain=()),
            store=anchors,
            networks=networks["random"],
        )
        spill[decoys] = response(edited, others) / response(edited, own)
    assert spill[0] > 0.8
    assert spill[60] < 0.5 * spill[0]


def test_a_target_that_the_kept_concepts_cover_is_refused(random_model, networks, anchors, make_request):
    """Every position of a few prompts spans the whole text space: nothing would be left to change."""
    request = make_request(
        "Candy Stripes",
        regularizers=[ProjectionConfig(rows="all")],
        retain=("Navy_Stripes", "Lava", "Aurora"),
    )
    with pytest.raises(ConceptError, match=r"Only 0\.\d\d of 'Candy Stripes' would be left to forget"):
        run_step(random_model, request, store=anchors, networks=networks["random"])


def test_kept_concepts_too_near_the_target_are_left_out(
    random_model, networks, anchors, make_request, monkeypatch
):
    monkeypatch.setattr("cul_core.regularizers.projection._NEAR_TARGET_COSINE", -1.0)
    with pytest.raises(ConceptError, match="all of it says the same as the target"):
        run_step(
            random_model,
            make_request(regularizers=[ProjectionConfig()]),
            store=anchors,
            networks=networks["random"],
        )


def test_an_empty_keep_list_is_refused(random_model, networks, anchors, make_request):
    with pytest.raises(ConceptError, match="nothing to protect"):
        run_step(
            random_model,
            make_request(regularizers=[ProjectionConfig()], retain=()),
            store=anchors,
            networks=networks["random"],
        )


# --- auxiliary names


def test_auxiliary_names_are_protected_like_a_keep_list(
    random_model, random_network, networks, anchors, make_request
):
    config = ProjectionConfig(auxiliary_names="object: moon, Tartan, Tartan")
    edited, report = run_step(
        random_model,
        make_request(regularizers=[config], retain=()),
        store=anchors,
        networks=networks["random"],
    )
    rows = vectors(
        random_network, [("An image of a moon", "moon"), ("An image in the style of Tartan", "Tartan")]
    )
    assert relative_change(edited, random_network, rows) < 1e-5
    assert (
        relative_change(
            edited, random_network, vectors(random_network, [("An image in the style of moon", "moon")])
        )
        > 1e-4
    )
    assert report.figures["protected_rank"] == report.figures["auxiliary_protected"] == 2
    assert report.figures["auxiliary_excluded"] == report.figures["auxiliary_unknown"] == 0


def test_auxiliary_names_that_hold_the_target_are_left_out_and_counted(prepared):
    """Of the five, "lava" is on the keep list already and counts as neither."""
    _, report = prepared(
        ProjectionConfig(auxiliary_names="candy_stripes, pale Candy Stripes, Tartan, object: cup, lava")
    )
    assert (report.figures["auxiliary_protected"], report.figures["auxiliary_excluded"]) == (2, 2)
    assert report.figures["protected_rank"] == 4


def test_auxiliary_names_too_near_the_target_are_left_out(prepared, monkeypatch):
    monkeypatch.setattr("cul_core.regularizers.projection._NEAR_TARGET_COSINE", -1.0)
    _, report = prepared(ProjectionConfig(decoys=10, auxiliary_names="Tartan, object: cup"))
    assert (report.figures["auxiliary_protected"], report.figures["auxiliary_excluded"]) == (0, 2)


def test_of_a_list_only_names_are_taken_that_the_model_can_read(prepared):
    """MiniCanvas has a token for cat, tree, house, pencil and cup, and splits the other ninety-five."""
    _, report = prepared(ProjectionConfig(auxiliary="objects"))
    assert (report.figures["auxiliary_protected"], report.figures["auxiliary_unknown"]) == (5, 95)
    with pytest.raises(
        ConceptError, match="MiniCanvas knows none of the names that auxiliary 'public_figures' would keep"
    ):
        prepared(ProjectionConfig(auxiliary="public_figures"))


def test_lists_stop_short_of_the_target_and_typed_names_do_not(prepared, monkeypatch):
    monkeypatch.setattr("cul_core.regularizers.projection._LEAST_BESIDE_LISTS", 1.0)
    _, report = prepared(ProjectionConfig(auxiliary="objects", auxiliary_names="object: moon"))
    assert (report.figures["auxiliary_protected"], report.figures["auxiliary_excluded"]) == (1, 5)


def test_typed_names_are_checked_where_they_are_typed():
    with pytest.raises(ConceptError, match="Line 2 of the auxiliary names: The target is empty"):
        ProjectionConfig(auxiliary_names="Tartan\nobject:")


def test_damping_acts_on_the_text_of_auxiliary_names(prepared, random_network):
    """Their tokens in sentences too, not only the mean that is projected out: a style's in the target's
    place, an object's alone."""
    texts = (["In Tartan Style, a star image."], ["An image of a moon"])
    dampers = [
        prepared(ProjectionConfig(decoys=1, damping=1e-4, auxiliary_names=names))[0]._damper
        for names in ("", "Tartan, object: moon")
    ]
    for text in texts:
        rows = prompt_rows(random_network, text, "all").float()
        before, after = ((rows @ damper).square().sum().item() for damper in dampers)
        assert after < 0.7 * before


# --- requests of several kinds

REQUESTS = (
    Concept("Van_Gogh"),
    Concept("dog", "object", "horse"),
    Concept("Betty_White", "celebrity", "person"),
)
PROMPTS = (
    ("An image in the style of Van Gogh", "Van Gogh"),
    ("An image of a dog", "dog"),
    ("An image of Betty White", "Betty White"),
)


@pytest.fixture
def forget(networks, anchors, make_request):
    def run(model, concept, retain=()):
        request = make_request(regularizers=[ProjectionConfig()], retain=retain)
        request = replace(
            request,
            concepts=(concept,),
            anchor_prompts=anchor_prompts(MINI, [concept]),
            anchor_sampler=SamplerConfig(steps=2),
        )
        return run_step(model, request, store=anchors, networks=networks["random"])

    return run


def vectors(network, prompts=PROMPTS):
    return torch.cat([prompt_rows(network, [prompt], "mean", name) for prompt, name in prompts])


def moved_on(later, earlier, rows):
    """Largest response of the change between two models to unit rows, relative to the change."""
    moves = [(later.edits[name] - earlier.edits[name]).double() for name in later.edits]
    units = torch.nn.functional.normalize(rows, dim=1)
    return max(((move @ units.T).norm(dim=0).max() / move.norm()).item() for move in moves)


def test_a_chain_of_a_style_an_object_and_a_person_keeps_what_each_step_made_of_its_target(
    random_model, random_network, forget
):
    style, _ = forget(random_model, REQUESTS[0], retain=("Lava",))
    both, _ = forget(style, REQUESTS[1])
    all_three, report = forget(both, REQUESTS[2])
    rows = vectors(random_network)
    assert moved_on(both, style, rows[:1]) < 1e-5 and moved_on(all_three, both, rows[:2]) < 1e-5
    label = vectors(random_network, [("An image in the style of Van_Gogh", "Van_Gogh")])
    assert moved_on(both, style, label) > 1e-3  # a file's label is another text
    assert report.figures["protected_rank"] == 2
    assert [(concept["target"], concept["kind"]) for concept in all_three.forgotten] == [
        ("Van_Gogh", "style"),
        ("dog", "object"),
        ("Betty_White", "celebrity"),
    ]


def test_requests_of_several_kinds_are_merged_and_a_chain_goes_on_from_there(
    random_model, random_network, forget
):
    alone = [forget(random_model, concept, retain=("Lava", "Navy_Stripes"))[0] for concept in REQUESTS]
    assert all(model.history[0].parent == random_model.content_hash for model in alone)
    merged = merge(alone, TiesConfig(strength=1.25, keep_fraction=0.8))
    assert [record.targets for record in merged.history] == [("Van_Gogh",), ("dog",), ("Betty_White",), ()]
    assert merged.history[-1].is_merge and merged.requests == 3
    later, report = forget(merged, Concept("Tartan"))
    assert report.figures["protected_rank"] == 3
    assert moved_on(later, merged, vectors(random_network)) < 1e-5


def test_a_weighted_sum_of_projected_steps_keeps_what_each_of_them_kept(random_model, random_network, forget):
    """(sum a_i D_i) c = 0 where every D_i c = 0; TIES drops entries, which breaks that."""
    alone = [forget(random_model, concept, retain=("Lava", "Navy_Stripes"))[0] for concept in REQUESTS]
    kept = protected(random_network)
    assert relative_change(merge(alone, UniformConfig()), random_network, kept) < 1e-5
    assert relative_change(merge(alone, TiesConfig()), random_network, kept) > 1e-4
