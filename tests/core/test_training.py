"""The loop's contracts: repeatable, only its group changes, the teacher and the input untouched, errors and
cancelling clean."""

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from short import SHORT

from cul_core.base.errors import Cancelled, ConceptError, ConfigError, TrainingError
from cul_core.base.registry import Registry
from cul_core.concepts.concept import Concept
from cul_core.history.unlearn_model import UnlearnModel
from cul_core.mergers.merge import merge
from cul_core.mergers.uniform import UniformConfig
from cul_core.methods import METHODS
from cul_core.methods.base import Method
from cul_core.methods.conabl import ConAbl, ConAblConfig
from cul_core.models.weight_roles import GROUPS, keys_with_role, role_of
from cul_core.parts.part import LossTerms, Part
from cul_core.parts.prompt_vectors import target_vector
from cul_core.parts.subspace import Subspace
from cul_core.regularizers import REGULARIZERS
from cul_core.regularizers.base import Regularizer
from cul_core.regularizers.distillation import DistillationConfig
from cul_core.regularizers.projection import ProjectionConfig
from cul_core.regularizers.selft import SelFT, SelFTConfig
from cul_core.regularizers.weight_anchor import L1SPConfig, L2SPConfig
from cul_core.requests.request import Request
from cul_core.training.callbacks import Callbacks
from cul_core.training.constraints import Constraints
from cul_core.training.loop import update
from cul_core.training.step import run_step


@pytest.fixture
def step(random_model, networks, anchors):
    def run(request, model=random_model, **options):
        return run_step(model, request, store=anchors, networks=networks["random"], **options)

    return run


def unet_state(network):
    return {name: tensor.clone() for name, tensor in network.unet.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def short_configs(registry):
    return [pytest.param(entry.config(**SHORT.get(entry.name, {})), id=entry.name) for entry in registry]


def acts(method, regularizer):
    """Whether a regularizer acts on a method's changes; some act on updates alone, which closed forms
    lack."""
    part = REGULARIZERS.of(regularizer).cls(regularizer)
    return not METHODS.of(method).cls.is_closed_form or part.acts_on_closed_form


@pytest.mark.parametrize(
    ("method", "regularizer"),
    [
        pytest.param(method.values[0], regularizer.values[0], id=f"{method.id}-{regularizer.id}")
        for method in short_configs(METHODS)
        for regularizer in (pytest.param(None, id="None"), *short_configs(REGULARIZERS))
        if regularizer.values[0] is None or acts(method.values[0], regularizer.values[0])
    ],
)
def test_every_method_with_every_regularizer_repeats_bit_for_bit_and_changes_only_its_group(
    method, regularizer, step, random_network, make_request
):
    request = make_request(method=method, regularizers=[regularizer] if regularizer else [])
    before = unet_state(random_network)
    (first, report), (second, _) = step(request), step(request)
    assert first.content_hash == second.content_hash
    changed, group = set(first.edits), set(random_network.weights("text_readers"))
    # a mask may spare whole matrices
    assert changed == group if regularizer is None else changed and changed <= group
    assert all(torch.isfinite(torch.tensor(report.losses)))
    assert len(report.losses) == (0 if METHODS.of(method).cls.is_closed_form else 3)
    assert same(unet_state(random_network), before)
    assert not any(parameter.requires_grad for parameter in random_network.unet.parameters())


def test_the_edits_of_a_step_or_a_merge_are_hashed_once(step, random_model, make_request, monkeypatch):
    hashed = []

    def sha256(*data):
        hashed.append(1)
        return hashlib.sha256(*data)

    first, _ = step(make_request("Lava", iterations=1))
    for model in (random_model, first):
        assert model.content_hash
    monkeypatch.setattr("cul_core.history.unlearn_model.hashlib", SimpleNamespace(sha256=sha256))
    edited, report = step(make_request("Frost", iterations=1), first)
    assert edited.content_hash == report.record.result and len(hashed) == 1
    assert edited.history == (*first.history, report.record)
    merged = merge([first, edited], UniformConfig())
    assert merged.content_hash == merged.history[-1].result
    assert len(hashed) == 3  # of the pretrained model, which has no edits, and of the merged one


def test_the_hash_that_is_carried_over_is_never_that_of_other_edits(step, make_request):
    edited, report = step(make_request(iterations=1))
    for model in (edited.with_step({}, report.record), replace(edited, edits={}), edited.with_history(())):
        assert model.content_hash == UnlearnModel(model.source, model.family, model.edits).content_hash


@pytest.mark.parametrize("group", ["attn2", "attn", "full"])
def test_larger_groups_train_too(group, step, random_network, make_request):
    edited, _ = step(make_request(group=group, iterations=2))
    names = set(random_network.weights(role_of(group)))
    assert set(edited.edits) <= names and len(edited.edits) > 0.5 * len(names)


def test_groups_are_selected_by_name_and_an_unknown_or_empty_one_is_refused(random_network):
    groups = [group for group, role in GROUPS.items() if role in random_network.family.roles]
    sizes = {group: len(random_network.weights(role_of(group))) for group in groups}
    assert sizes["kv"] == 14 and sizes["attn2"] == 7 * 5 and sizes["attn"] == 2 * 7 * 5
    assert sizes["attn2"] + sizes["non-attn2"] == sizes["full"] == len(list(random_network.unet.parameters()))
    with pytest.raises(ConfigError, match="'xattn'"):
        role_of("xattn")
    with pytest.raises(ConfigError, match="selects no weight"):
        keys_with_role(random_network.family, "text_readers", ["weight", "bias"])


def test_another_seed_gives_another_model(step, make_request):
    assert step(make_request(seed=1))[0].content_hash != step(make_request(seed=2))[0].content_hash


def test_the_input_model_and_its_history_stay_as_they_were(step, random_model, make_request):
    first, _ = step(make_request("Lava"))
    kept = {name: delta.clone() for name, delta in first.edits.items()}
    second, report = step(make_request("Denim"), model=first)
    assert same(first.edits, kept) and len(first.history) == 1 and len(second.history) == 2
    assert report.record.parent == first.content_hash and report.record.result == second.content_hash
    assert first.history[0].parent == random_model.content_hash
    with pytest.raises(TypeError):
        first.edits["x"] = torch.zeros(1)


def test_a_chain_goes_on_from_where_it_was_and_edits_outside_the_group_are_kept(step, make_request):
    first, _ = step(make_request("Lava", group="attn2", iterations=1))
    second, _ = step(make_request("Denim", group="kv", iterations=1), model=first)
    outside = [name for name in first.edits if not name.endswith(("to_k.weight", "to_v.weight"))]
    assert outside and all(torch.equal(first.edits[name], second.edits[name]) for name in outside)


def test_zero_iterations_change_nothing(step, random_model, make_request):
    assert step(make_request(iterations=0))[0].content_hash == random_model.content_hash


def test_cancelling_stops_within_an_iteration_and_leaves_the_network_clean(
    step, random_network, make_request
):
    before, seen = unet_state(random_network), []
    callbacks = Callbacks(on_progress=seen.append, should_stop=lambda: len(seen) >= 2)
    with pytest.raises(Cancelled, match="iteration 3 of 9"):
        step(make_request(iterations=9), callbacks=callbacks)
    assert len(seen) == 2 and seen[0].seconds_left > seen[1].seconds_left * 0.2
    assert same(unet_state(random_network), before)


def test_a_loss_that_is_not_finite_stops_with_the_iteration_and_the_remedy(
    step, random_network, make_request, monkeypatch
):
    before = unet_state(random_network)
    original = ConAbl.loss

    def broken(self, student, teachers, generator):
        loss = original(self, student, teachers, generator)
        return LossTerms(loss.total * float("nan"), loss.terms)

    monkeypatch.setattr(ConAbl, "loss", broken)
    with pytest.raises(TrainingError, match=r"nan at iteration 1 of 3; lower the learning rate \(0.0004\)"):
        step(make_request())
    assert same(unet_state(random_network), before)


def test_a_request_without_concepts_or_anchor_prompts_is_refused():
    with pytest.raises(ConfigError, match="no concept"):
        Request((), ConAblConfig(), anchor_prompts=("a star",))


@pytest.fixture
def double(monkeypatch):
    """Config of a closed form that doubles every weight, the only method there is."""
    methods = Registry("method")

    @methods.register(
        "double",
        config=type("DoubleConfig", (ConAblConfig,), {}),
        display_name="Double",
        description="d",
        paper="p",
    )
    class Double(Method):
        is_closed_form = True

        def edit(self, context):
            return {name: 2 * weight for name, weight in context.start.items()}

    for module in ("requests.request", "training.step"):
        monkeypatch.setattr(f"cul_core.{module}.METHODS", methods)
    return methods.get("double").config()


def test_a_closed_form_method_runs_in_the_same_step(step, random_network, make_request, double):
    before = unet_state(random_network)
    edited, report = step(make_request(method=double))
    weights = random_network.weights("text_readers")
    assert edited.edits.keys() == weights.keys() and report.losses == ()
    assert all(torch.equal(delta, weights[name]) for name, delta in edited.edits.items())
    assert same(unet_state(random_network), before)


def response(edited, network):
    """Largest relative change of what a matrix makes of the text of what is kept."""
    rows = torch.stack([target_vector(network, Concept(name)) for name in ("Navy_Stripes", "Lava")])
    weights = network.weights("text_readers")
    return max(
        ((delta.double() @ rows.T).norm() / (weights[name].double() @ rows.T).norm()).item()
        for name, delta in edited.edits.items()
    )


def test_a_projection_holds_a_closed_forms_edit_exactly(step, random_network, make_request, double):
    free, _ = step(make_request(method=double))
    held, report = step(make_request(method=double, regularizers=[ProjectionConfig()]))
    assert response(free, random_network) == pytest.approx(1) and report.figures["protected_rank"] == 2
    assert len(held.edits) == 14 and response(held, random_network) < 1e-5
    assert all(delta.norm() > 0.5 * free.edits[name].norm() for name, delta in held.edits.items())


def test_a_mask_holds_a_closed_forms_edit_to_exactly_its_entries(
    step, random_network, make_request, double, monkeypatch
):
    used, original = [], SelFT.prepare

    def prepare(self, context):
        used.append(self)
        original(self, context)

    monkeypatch.setattr(SelFT, "prepare", prepare)
    held, report = step(make_request(method=double, regularizers=[SelFTConfig(states=4)]))
    weights, count = random_network.weights("text_readers"), 0
    for name, mask in used[0]._masks.items():
        delta = held.edits.get(name, torch.zeros_like(weights[name]))
        assert torch.equal(delta, weights[name] * mask) and torch.equal(delta != 0, mask)
        count += int(mask.sum())
    assert count == report.figures["changeable_weights"] > 0


def test_a_mask_and_a_projection_hold_a_closed_forms_edit_together(
    step, random_network, make_request, double
):
    regularizers = [SelFTConfig(states=4), ProjectionConfig()]
    held, report = step(make_request(method=double, regularizers=regularizers))
    again, _ = step(make_request(method=double, regularizers=regularizers[::-1]))
    assert held.edits and held.content_hash == again.content_hash
    assert response(held, random_network) < 1e-5


class Unasked:
    """A store, and a cache of networks, that must not be asked."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} was asked for")


@pytest.mark.parametrize(
    "config",
    [
        L1SPConfig(),
        L2SPConfig(form="penalty"),
        DistillationConfig(),
        SelFTConfig(form="reference"),
        ProjectionConfig(form="reference"),
    ],
    ids=lambda config: config.registry_name,
)
def test_a_regularizer_that_cannot_restrain_a_closed_form_is_refused_before_anything_is_loaded_or_drawn(
    config, random_model, make_request, double
):
    request = make_request(method=double, regularizers=[ProjectionConfig(), config])
    said = f"{REGULARIZERS.of(config).display_name} cannot restrain Double, .*no updates.*leave it out"
    with pytest.raises(ConfigError, match=said):
        run_step(random_model, request, store=Unasked(), networks=Unasked())


@pytest.mark.parametrize("regularizers", [[], [ProjectionConfig()]], ids=["method", "regularizer"])
def test_a_part_whose_weights_a_family_or_a_group_lacks_is_refused_before_anything_is_loaded_or_drawn(
    regularizers, random_model, make_request
):
    method = None if not regularizers else METHODS.get("esd").config()
    name = "Gradient Projection" if regularizers else "Concept Ablation"
    request = make_request(method=method, regularizers=regularizers)
    roles = {role: found for role, found in random_model.family.roles.items() if role != "text_readers"}
    without = replace(random_model, family=replace(random_model.family, roles=roles))
    with pytest.raises(ConfigError, match=f"{name} does not support MiniCanvas, which has no text readers"):
        run_step(without, request, store=Unasked(), networks=Unasked())
    request = replace(request, training=replace(request.training, group="non-attn2"))
    said = f"{name} does not support parameter group 'non-attn2'; it supports kv, attn2, attn, full"
    with pytest.raises(ConfigError, match=said):
        run_step(random_model, request, store=Unasked(), networks=Unasked())


class Pull(Regularizer):
    """Its terms are multiples of the sum of one matrix; notes what happens to that matrix."""

    factors, events, gradients, hook = {}, [], [], None

    def prepare(self, context):
        self.name = min(context.start)
        self.weight = context.network.weights("all")[self.name]

    def prepare_mask(self, context, allowed_subspace):
        Pull.hook = self.weight.register_post_accumulate_grad_hook(
            lambda weight: self.events.append("backward")
        )

    def loss_terms(self, student, teachers):
        self.events.append("terms")
        return {name: factor * self.weight.sum() for name, factor in self.factors.items()}

    def transform_gradient(self, name, gradient):
        if name == self.name:
            self.gradients.append(gradient.clone())
            self.hook.remove()
        return gradient


@pytest.fixture
def pull(monkeypatch):
    """Makes a config of a `Pull` with these factors, the only regularizer there is."""
    registry = Registry("regularizer")
    registry.register(
        "pull",
        config=type("PullConfig", (ConAblConfig,), {}),
        display_name="Pull",
        description="d",
        paper="p",
    )(Pull)
    for module in ("requests.request", "training.step"):
        monkeypatch.setattr(f"cul_core.{module}.REGULARIZERS", registry)

    def config(**factors):
        monkeypatch.setattr(Pull, "factors", factors)
        monkeypatch.setattr(Pull, "events", [])
        monkeypatch.setattr(Pull, "gradients", [])
        return registry.get("pull").config()

    yield config
    Pull.hook.remove()  # a step that ends with an error transforms no gradient


def test_terms_of_a_regularizer_have_a_backward_of_their_own_after_the_methods_and_all_gradients_add_up(
    step, make_request, pull
):
    step(make_request(regularizers=[pull()], iterations=1))
    assert Pull.events == ["backward", "terms"]
    (alone,) = Pull.gradients
    _, report = step(make_request(regularizers=[pull(twice=2.0, thrice=3.0)], iterations=1))
    assert Pull.events == ["backward", "terms", "backward"]
    torch.testing.assert_close(Pull.gradients[0], alone + 2 + 3)
    assert report.record.losses.keys() == {"unlearn", "twice", "thrice"}
    assert report.losses[0] == pytest.approx(sum(report.record.losses.values()), rel=1e-5)


def test_a_term_that_is_not_finite_stops_the_step_as_the_methods_loss_does(
    step, random_network, make_request, pull
):
    before = unet_state(random_network)
    with pytest.raises(
        TrainingError,
        match=r"became nan at iteration 1 of 3; lower the learning rate .* or the regularizers' strengths",
    ):
        step(make_request(regularizers=[pull(twice=2.0, broken=float("nan"))]))
    assert same(unet_state(random_network), before) and not any(
        p.requires_grad for p in random_network.unet.parameters()
    )


class Recorder(Part):
    """Notes the order of its hooks; masks column 0 and forbids row 0."""

    def __init__(self, calls=None):
        super().__init__(None)
        self.calls = [] if calls is None else calls

    def transform_gradient(self, name, gradient):
        self.calls.append("gradient")
        return gradient

    def proximal(self, name, weight, learning_rate):
        self.calls.append("proximal")
        return weight + 1

    def mask(self, name, weight):
        self.calls.append("mask")
        return torch.tensor([[0.0, 1.0], [0.0, 1.0]])

    def constrain(self, name, change):
        self.calls.append("constrain")
        return change * torch.tensor([[0.0], [1.0]])


def test_hard_constraints_act_last_on_the_actual_change_whatever_the_optimizer_did():
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    weight.grad = torch.ones(2, 2)
    recorder, plain_mask = Recorder(), Recorder()
    optimizer = torch.optim.SGD([weight], lr=0.5)
    training = type("T", (), {"max_grad_norm": 0.0, "learning_rate": 0.5})
    update({"w": weight}, optimizer, [recorder], Constraints([recorder], "cpu"), training)
    assert recorder.calls == ["gradient", "proximal", "constrain", "mask"]
    # only entry (1, 1) may change: 4 - 0.5 (SGD) + 1 (proximal)
    assert weight.tolist() == [[1.0, 2.0], [3.0, 4.5]]
    weight.grad = torch.ones(2, 2)
    plain_mask.constrain = lambda name, change: change
    update({"w": weight}, optimizer, [plain_mask], Constraints([plain_mask], "cpu"), training)
    assert weight.tolist() == [[1.0, 2.5], [3.0, 5.0]]


def test_constraints_of_all_parts_act_before_any_mask_and_masks_of_all_parts_hold():
    calls = []
    first, second = Recorder(calls), Recorder(calls)
    second.mask = lambda name, weight: calls.append("mask") or torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    second.constrain = lambda name, change: calls.append("constrain") or change + 1
    for parts, allowed in (
        ([first], [[0.0, 0.0], [0.0, 8.0]]),
        ([second], [[6.0, 7.0], [8.0, 0.0]]),
        # the last part's constraint acts first, so that their product is adjoint to that of the gradients
        ([first, second], [[0.0, 0.0], [0.0, 0.0]]),
        # (0 + 1) where row 0 is forbidden first; columns 0 and entry (1, 1) are masked
        ([second, first], [[0.0, 1.0], [0.0, 0.0]]),
    ):
        calls.clear()
        change = torch.tensor([[5.0, 6.0], [7.0, 8.0]])
        assert Constraints(parts, "cpu").allowed("w", change).tolist() == allowed
        assert calls == ["constrain"] * len(parts) + ["mask"] * len(parts)


def test_protected_directions_of_all_parts_are_joined_and_masks_act_on_the_coordinates_that_are_left():
    """Directions (1, 0, 0) and (1, 1, 0) / sqrt 2 are protected; (0, 0, 1) is left, of either sign."""
    one, other, masking = Part(None), Part(None), Part(None)
    vectors = torch.tensor([[1.0, 0.0, 0.0], [0.5**0.5, 0.5**0.5, 0.0]], dtype=torch.float64)
    subspaces = [Subspace(3, vector[:, None]) for vector in vectors]
    one.subspace = lambda name: subspaces[0] if name == "w" else None
    other.subspace = lambda name: subspaces[1] if name == "w" else None
    constraints, change = Constraints([one, other], "cpu"), torch.tensor([[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]])
    assert constraints.allowed_subspace("w").abs().allclose(torch.tensor([[0.0], [0.0], [1.0]]), atol=1e-6)
    expected = torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 8.0]])
    torch.testing.assert_close(constraints.allowed("w", change), expected, atol=1e-5, rtol=0)
    assert constraints.allowed_subspace("v") is None and constraints.allowed("v", change) is change
    masking.mask = lambda name, weight: torch.tensor([[1.0], [0.0]])
    masked = Constraints([one, masking, other], "cpu").allowed("w", change)
    torch.testing.assert_close(masked, torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 0.0]]), atol=1e-5, rtol=0)


def test_previews_come_from_the_same_noise_before_between_and_after_and_change_nothing(step, make_request):
    seen = []
    watch = Callbacks(
        on_preview=lambda iteration, latents: seen.append((iteration, latents)),
        preview_prompts=("a cat", "a house"),
        preview_every=2,
    )
    watched, _ = step(make_request(iterations=3), callbacks=watch)
    plain, _ = step(make_request(iterations=3))
    assert watched.content_hash == plain.content_hash
    assert [iteration for iteration, _ in seen] == [0, 2, 3]
    assert all(latents.shape == (2, 4, 8, 8) for _, latents in seen)
    assert not torch.equal(seen[0][1], seen[2][1])


def test_a_callback_that_raises_ends_the_step_with_its_own_exception(step, make_request, random_network):
    class HostInterrupt(BaseException):
        pass

    def interrupt():
        raise HostInterrupt

    before = unet_state(random_network)
    with pytest.raises(HostInterrupt):
        step(make_request(), callbacks=Callbacks(should_stop=interrupt))
    assert same(unet_state(random_network), before)


def test_a_concept_to_keep_needs_no_anchor_but_a_target_does(make_request):
    request = make_request()
    assert replace(request, retain=(Concept("dog", "object"),)).retain[0].anchor == ""
    with pytest.raises(ConceptError, match="'dog' of kind 'object' has no anchor"):
        replace(request, concepts=(Concept("dog", "object"),))
