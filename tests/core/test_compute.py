"""How a step is computed: precision, checkpointing, micro batches, short memory, text encoders, and the
estimate of it all."""

import gc
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import astuple, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from short import SHORT
from torch.utils._python_dispatch import TorchDispatchMode

from cul_core.base.errors import ConfigError, MemoryShortError, TrainingError
from cul_core.base.registry import Entry
from cul_core.cli import main
from cul_core.concepts.concept import Concept
from cul_core.methods import METHODS
from cul_core.methods.conabl import ConAbl, ConAblConfig
from cul_core.methods.esd import ESDConfig
from cul_core.methods.exact import ExactConfig
from cul_core.methods.sculpmem import SculpMemConfig
from cul_core.minicanvas.family import MINI
from cul_core.models.build_diffusers import build_unet
from cul_core.models.diffusers_network import DiffusersNetwork
from cul_core.models.families.sd1 import SD1
from cul_core.models.free_memory import release_memory
from cul_core.models.load_diffusers import NetworkCache
from cul_core.models.sampling import generator_for
from cul_core.parts.step_context import StepContext
from cul_core.parts.training_config import TrainingConfig
from cul_core.regularizers import REGULARIZERS
from cul_core.regularizers.base import Regularizer
from cul_core.regularizers.distillation import DistillationConfig
from cul_core.regularizers.projection import ProjectionConfig
from cul_core.regularizers.selft import SelFTConfig
from cul_core.regularizers.weight_anchor import L1SPConfig
from cul_core.requests.presets import preset
from cul_core.store.anchors import AnchorStore
from cul_core.training import loop as loop_module
from cul_core.training import master_weights as masters_module
from cul_core.training import memory_plan
from cul_core.training import step as training
from cul_core.training.callbacks import Callbacks
from cul_core.training.compute import Compute
from cul_core.training.master_weights import LossScale
from cul_core.training.memory_plan import Estimate, Passes, estimate_step, passes, planned
from cul_core.training.micro_batches import MicroBatchedModel
from cul_core.training.step import run_step

BF16, FP16 = Compute(dtype="bfloat16"), Compute(dtype="float16")
DISTILLATION = DistillationConfig(**SHORT["distillation"], batch_size=2)
EVERYTHING = {
    "method": SculpMemConfig(warm_up=1, interval=1, distillation=1.0, preservation=1.0, replay=0.5),
    "regularizers": [ProjectionConfig(), L1SPConfig(), SelFTConfig(states=2), DISTILLATION],
}
CAPTIONS = ("a star", "a house", "a cat", "a boat", "a cup")
WORDS = ("Frost", "Denim", "Tartan", "Moon", "Cup", "Rust", "Snow", "Ink", "Clay", "Glass", "Straw", "Gold")
BLANK = DiffusersNetwork(MINI, build_unet(MINI), (), None, None)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Watching(Regularizer):
    """Keeps the context and the gradients of the first update, and changes nothing."""

    def prepare(self, context):
        Watching.context, Watching.gradients = context, {}

    def transform_gradient(self, name, gradient):
        self.gradients.setdefault(name, gradient.clone())
        return gradient


@pytest.fixture
def watching(monkeypatch):
    config = type("WatchingConfig", (L1SPConfig,), {"registry_name": "watching"})
    entry = Entry("watching", Watching, config, "d", "d", "p")
    monkeypatch.setitem(REGULARIZERS._entries, "watching", entry)
    return config()


@pytest.fixture(scope="module")
def low_networks():
    """Caches of the random model in other precisions."""
    return {name: NetworkCache() for name in ("bfloat16", "float16")}


@pytest.fixture
def step(random_model, networks, low_networks, anchors):
    def run(request, compute=None, model=random_model, **options):
        cache = low_networks.get(compute.dtype if compute else "", networks["random"])
        return run_step(model, request, store=anchors, networks=cache, compute=compute, **options)

    return run


@pytest.fixture
def gradients(step, make_request, watching):
    """(the gradients of a step's first update by name, its loss); after that comes one more."""

    def of(method, compute=None, regularizers=(), say=lambda text: None):
        request = make_request(
            method=method, regularizers=[*regularizers, watching], iterations=2, batch_size=4
        )
        _, report = step(request, compute, callbacks=Callbacks(on_message=say))
        return dict(Watching.gradients), report.losses[0]

    return of


def assert_close(one, other, rtol=1e-4):
    """Two pairs of gradients and a loss; tensors to a share of their largest entry."""
    assert one[1] == pytest.approx(other[1], rel=rtol)
    assert one[0].keys() == other[0].keys()
    for name, gradient in one[0].items():
        torch.testing.assert_close(other[0][name], gradient, rtol=0, atol=rtol * gradient.abs().max().item())


@contextmanager
def calls(network, out_of_memory=lambda rows, with_graph: False):
    """(rows, whether with a graph, its latents) of every call of the UNet; one runs out of memory where that
    says so."""
    seen = []

    def note(unet, inputs):
        rows, with_graph = len(inputs[0]), torch.is_grad_enabled()
        if out_of_memory(rows, with_graph):
            raise torch.OutOfMemoryError("out of memory, as injected by a test")
        seen.append((rows, with_graph, inputs[0].clone()))

    handle = network.unet.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def with_graph(seen):
    return torch.cat([latents for _, has_graph, latents in seen if has_graph])


def unet_state(network):
    return {name: tensor.clone() for name, tensor in network.unet.state_dict().items()}


def assert_untouched(network, before):
    unet = network.unet
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert not any(
        p.requires_grad or p.grad is not None or p._post_accumulate_grad_hooks for p in unet.parameters()
    )
    assert not unet.is_gradient_checkpointing and not any(module._forward_hooks for module in unet.modules())


# --- the same gradients in every way


@pytest.mark.parametrize(
    "compute",
    [Compute(checkpointing="on"), Compute(largest_micro_batch=1), Compute("auto", "on", False, 3)],
    ids=["checkpointing", "one", "three and checkpointing"],
)
@pytest.mark.parametrize("name", [entry.name for entry in METHODS if not entry.cls.is_closed_form])
def test_checkpointing_and_micro_batches_give_every_method_the_same_gradients_and_loss(
    name, compute, gradients, random_network
):
    method = METHODS.get(name).config(**SHORT.get(name, {}))
    if isinstance(method, SculpMemConfig):
        # all entries: which of two nearly equal scores is in a mask depends on the last bits of gradients
        method = replace(method, active_fraction=1.0)
    with calls(random_network) as seen:
        changed = gradients(method, compute)
    micro = compute.largest_micro_batch
    trained = [rows for rows, has_graph, _ in seen if has_graph]
    assert trained == 2 * {0: [4], 1: [1, 1, 1, 1], 3: [3, 1]}[micro]
    assert_close(gradients(method), changed)


def test_losses_of_several_predictions_and_penalties_are_split_as_well(gradients):
    method = SculpMemConfig(warm_up=1, active_fraction=1.0, distillation=1.0, preservation=1.0)
    parts = {"method": method, "regularizers": [L1SPConfig(form="penalty", anchor="both"), DISTILLATION]}
    assert_close(gradients(**parts), gradients(**parts, compute=Compute(largest_micro_batch=1)))


def test_checkpointing_computes_again_and_gives_the_same_bits(step, make_request, random_network):
    count = []
    handle = (
        random_network.unet.up_blocks[-1]
        .resnets[-1]
        .register_forward_pre_hook(lambda *_: count.append(torch.is_grad_enabled()))
    )
    request = make_request(method=ConAblConfig(preservation=1.0), iterations=2)
    plain, _ = step(request)
    before = sum(count)
    again, _ = step(request, Compute(checkpointing="on"))
    handle.remove()
    assert (before, sum(count) - before) == (4, 8)
    assert again.content_hash == plain.content_hash


def test_inputs_that_need_gradients_themselves_are_not_cut_off(random_network):
    student = MicroBatchedModel(random_network, Compute(), lambda text: None)
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    inputs = torch.tensor([1, 2]), random_network.encode(["a cat", "a dog"])
    (given,) = torch.autograd.grad(student(latents, *inputs).sum(), latents)
    (wanted,) = torch.autograd.grad(random_network.predict(latents, *inputs).sum(), latents)
    assert torch.equal(given, wanted) and given.abs().max() > 0


def test_attention_is_fused(random_network):
    assert {type(processor).__name__ for processor in random_network.unet.attn_processors.values()} == {
        "AttnProcessor2_0"
    }


# --- short memory


def test_when_memory_runs_out_the_same_update_goes_on_in_parts_and_then_with_checkpointing(
    gradients, random_network
):
    told = []
    with calls(random_network) as seen:
        plain = gradients(ConAblConfig())
    unet = random_network.unet
    with calls(
        random_network, lambda rows, graph: graph and (rows > 1 or not unet.is_gradient_checkpointing)
    ) as seen_again:
        saved = gradients(ConAblConfig(), say=told.append)
    assert_close(plain, saved)
    assert torch.equal(with_graph(seen), with_graph(seen_again))  # nothing was drawn anew
    assert [text.partition(";")[0] for text in told] == ["Memory ran out"] * 2 + [
        "Memory ran out with one image at a time"
    ]
    assert "2 of 4 images" in told[0] and "1 of 2 images" in told[1] and "checkpointing" in told[2]


@pytest.mark.parametrize("regularizers", [[], [DISTILLATION]], ids=["one backward pass", "two"])
def test_a_backward_pass_that_breaks_off_half_way_counts_for_nothing(regularizers, gradients, random_network):
    failures, told = [], []

    def fail(gradient):
        if len(failures) < 2:
            failures.append(gradient)
            raise torch.OutOfMemoryError("out of memory, as injected by a test")

    def watch(module, inputs, output):
        if output.requires_grad:
            # the gradients of the second half of the network have arrived by then
            output.register_hook(fail)

    plain = gradients(ConAblConfig(), regularizers=regularizers)
    handle = random_network.unet.mid_block.register_forward_hook(watch)
    saved = gradients(ConAblConfig(), regularizers=regularizers, say=told.append)
    handle.remove()
    assert len(failures) == len(told) == 2
    assert_close(plain, saved)


@pytest.mark.parametrize(
    ("compute", "remedy"),
    [
        (None, "with checkpointing; close what else uses it, choose a smaller parameter group"),
        (Compute(checkpointing="off"), "without checkpointing; .*allow checkpointing"),
    ],
)
def test_memory_that_is_short_for_one_picture_is_an_error_that_leaves_everything_as_it_was(
    compute, remedy, step, make_request, random_network, random_model
):
    before = unet_state(random_network)
    said = f"even one image at a time {remedy}"
    with calls(random_network, lambda rows, graph: graph), pytest.raises(MemoryShortError, match=said):
        step(make_request(), compute)
    assert_untouched(random_network, before)
    assert random_model.edits == {} and random_model.history == ()


def test_memory_that_runs_out_elsewhere_is_the_same_error(step, make_request, random_network):
    before = unet_state(random_network)
    request = make_request(regularizers=[SelFTConfig(states=2, guidance_scale=2.5)])
    said = "memory of cpu is too short"
    with calls(random_network, lambda rows, graph: graph), pytest.raises(MemoryShortError, match=said):
        step(request)
    assert_untouched(random_network, before)


@pytest.fixture
def short_apple_gpu(random_network):
    """The UNet runs out of memory, as on Apple's GPUs, with more than so many pictures and a graph."""

    @contextmanager
    def limited(most):
        def check(rows, with_graph):
            if with_graph and rows > most:
                raise RuntimeError("MPS backend out of memory (MPS allocated: 8.9 GB, max allowed: 9.0 GB).")

        with calls(random_network, check):
            yield

    return limited


def test_memory_that_runs_out_on_apple_gpus_is_met_as_on_others(short_apple_gpu, step, make_request):
    told = []
    with short_apple_gpu(1):
        edited, _ = step(make_request(batch_size=2), callbacks=Callbacks(on_message=told.append))
    assert edited.edits and told == ["Memory ran out; the step goes on with 1 of 2 images at a time."]
    with short_apple_gpu(0), pytest.raises(MemoryShortError, match="even one image at a time"):
        step(make_request())
    with short_apple_gpu(0), pytest.raises(MemoryShortError, match="memory of cpu is too short"):
        step(make_request(regularizers=[SelFTConfig(states=2, guidance_scale=2.5)]))


def test_other_errors_of_the_network_are_not_taken_for_short_memory(random_network, step, make_request):
    def fail(rows, with_graph):
        raise RuntimeError("shapes cannot be multiplied")

    with calls(random_network, fail), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        step(make_request())


def test_caches_of_apple_gpus_are_emptied(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append("mps"))
    release_memory(torch.device("mps"))
    release_memory(torch.device("cpu"))
    assert emptied == ["mps"]


# --- precision


def test_masters_take_updates_that_bf16_would_lose_and_w0_is_never_rounded(
    step, make_request, watching, low_networks, random_model, networks
):
    exact = networks["random"].get(random_model.source).weights("all")
    network = low_networks["bfloat16"].get(random_model.source, dtype=torch.bfloat16)
    before = unet_state(network)
    low = {name: weight.clone() for name, weight in network.weights("all").items()}
    assert {weight.dtype for weight in low.values()} == {torch.bfloat16}
    edited, _ = step(make_request(learning_rate=1e-5, regularizers=[watching]), BF16)
    assert_untouched(network, before)
    assert all(gradient.dtype == torch.float32 for gradient in Watching.gradients.values())
    moved, lost, rounded = 0.0, 0.0, False
    for name, w0 in Watching.context.pretrained.items():
        assert w0.dtype == torch.float32 and torch.equal(w0, exact[name])
        rounded = rounded or not torch.equal(w0, low[name].float())
        delta = edited.edits[name]
        assert 0 < delta.abs().max() < 4e-5  # three updates by Adam
        moved += (delta != 0).float().mean().item() / 14
        lost += ((w0 + delta).bfloat16() == w0.bfloat16()).float().mean().item() / 14
    assert rounded and moved > 0.9 and lost > 0.8


@pytest.mark.parametrize(("compute", "error"), [(BF16, 0.3), (FP16, 0.3 / 8)], ids=["bf16", "fp16"])
def test_gradients_in_low_precision_are_about_the_exact_ones(compute, error, gradients):
    """Rounding is eight times as fine in fp16, and so are the gradients' errors; the scale of losses is gone
    again."""
    exact, low = gradients(ConAblConfig()), gradients(ConAblConfig(), compute)
    for name, gradient in exact[0].items():
        assert torch.cosine_similarity(gradient.flatten(), low[0][name].flatten(), 0) > 0.97
        # a norm is off by no more than this, which no rounding bounds at 0.05 where the error is 0.2
        assert (low[0][name] - gradient).norm() < error * gradient.norm()
    wholes = [torch.cat([gradient.flatten() for gradient in found[0].values()]) for found in (exact, low)]
    assert wholes[1].norm() == pytest.approx(wholes[0].norm().item(), rel=error / 6)


def test_everything_at_once_trains_in_low_precision_and_offloaded_masters_give_the_same_bits(
    step, make_request, monkeypatch
):
    first, _ = step(make_request("Lava", iterations=1, group="attn2"), BF16)
    resting, _ = step(make_request(**EVERYTHING), BF16, model=first)
    monkeypatch.setattr(training._Step, "_planned", lambda self, compute: (BF16, True))
    offloaded, _ = step(make_request(**EVERYTHING), BF16, model=first)
    assert offloaded.content_hash == resting.content_hash != first.content_hash
    outside = [name for name in first.edits if ".to_k." not in name and ".to_v." not in name]
    assert outside and all(torch.equal(first.edits[name], resting.edits[name]) for name in outside)


class Rounded(TorchDispatchMode):
    """Counts how often tensors are copied to bf16, by where their values are."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.counts[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_offloaded", [False, True], ids=["resting", "offloaded"])
def test_weights_of_teachers_are_rounded_once_in_a_step_unless_memory_is_short(
    is_offloaded, step, make_request, watching, monkeypatch
):
    """Three updates, in each of which both teachers are asked, at a start that is not W0."""
    first, _ = step(make_request("Lava", iterations=1), BF16)
    asked, original = Counter(), loop_module._Training._teacher

    def teacher(self, weights, *inputs):
        asked["start" if weights is self._context.start else "pretrained"] += 1
        return original(self, weights, *inputs)

    monkeypatch.setattr(loop_module._Training, "_teacher", teacher)
    monkeypatch.setattr(training._Step, "_planned", lambda self, compute: (BF16, is_offloaded))
    with Rounded() as rounded:
        step(make_request(regularizers=[DISTILLATION, watching]), BF16, model=first)
    for name, weights in (("pretrained", Watching.context.pretrained), ("start", Watching.context.start)):
        assert len(weights) == 14 and asked[name] >= 3
        times = asked[name] if is_offloaded else 1
        assert [rounded.counts[weight.data_ptr()] for weight in weights.values()] == 14 * [times]


def test_teachers_that_are_one_are_rounded_as_one(step, make_request, watching):
    request = make_request(
        method=ConAblConfig(teacher="start"), regularizers=[DISTILLATION, watching], iterations=2
    )
    with Rounded() as rounded:
        step(request, BF16)
    context = Watching.context
    for name, weight in context.pretrained.items():
        assert context.start[name].data_ptr() == weight.data_ptr()
        assert rounded.counts[weight.data_ptr()] == 1


def test_pictures_are_decoded_and_encoded_in_fp32_whatever_the_network_computes_in(step, make_request):
    request = make_request(method=ConAblConfig(augmentations=1, flip=True), iterations=1)
    exact, low = step(request), step(request, BF16)
    assert low[1].losses[0] == pytest.approx(exact[1].losses[0], rel=0.5) and low[0].edits


def test_the_scale_of_losses_halves_when_gradients_overflow_grows_later_and_gives_up_after_many():
    scale = LossScale(True)
    first = scale.value
    for _ in range(3):
        scale.note(False)
    assert scale.value == first / 8
    for _ in range(masters_module._GROWS_AFTER):
        scale.note(True)
    assert scale.value == first / 4
    with pytest.raises(TrainingError, match="overflowed fp16 in 20 updates in a row; choose bfloat16"):
        for _ in range(20):
            scale.note(False)
    assert LossScale(False).value == 1


def test_an_update_whose_gradients_overflow_is_left_out(step, make_request, random_model, monkeypatch):
    monkeypatch.setattr(masters_module, "_FIRST_SCALE", 2.0**60)
    monkeypatch.setattr(masters_module, "_MOST_OVERFLOWS", 3)
    edited, report = step(make_request(iterations=2, batch_size=1), FP16)
    assert edited.content_hash == random_model.content_hash and len(report.losses) == 2
    with pytest.raises(TrainingError, match="overflowed fp16 in 3 updates"):
        step(make_request(iterations=3, batch_size=1), FP16)


def test_precision_is_chosen_for_the_device_and_what_does_not_exist_is_refused():
    assert Compute().dtype_on("cpu") == torch.float32 and BF16.dtype_on("cpu") == torch.bfloat16
    with pytest.raises(ConfigError, match="float64"):
        Compute(dtype="float64")


def test_a_network_that_cannot_be_compiled_is_not(step, make_request, random_network, monkeypatch):
    def fail(*inputs, **named):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", fail))
    told = []
    edited, _ = step(make_request(), Compute(compile=True), callbacks=Callbacks(on_message=told.append))
    assert len(told) == 1 and "could not be compiled" in told[0]
    assert edited.content_hash == step(make_request())[0].content_hash
    assert random_network.unet._compiled_call_impl is None


# --- text encoders


def test_text_encoders_are_gone_in_training_and_come_back_for_a_new_prompt(
    tiny_model, tiny_network, make_request, tiny_networks
):
    before = tiny_network.encode(["a very new prompt"])
    assert tiny_network.text_encoders
    encoders, alive = [weakref.ref(encoder) for encoder in tiny_network.text_encoders], []

    def look(*progress):
        gc.collect()
        alive.append([encoder() is not None for encoder in encoders] + list(tiny_network.text_encoders))

    watch = Callbacks(on_progress=look, on_anchors=look, preview_prompts=("a cat",), preview_every=1)
    run_step(
        tiny_model,
        make_request(iterations=2),
        store=AnchorStore(),
        networks=tiny_networks[tiny_model.family.name],
        callbacks=watch,
    )
    assert (
        len(alive) > 2
        and alive == [[False] * len(encoders)] * len(alive)
        and tiny_network.text_encoders == ()
    )
    tiny_network._prompts.clear()
    after = tiny_network.encode(["a very new prompt"])
    assert torch.equal(before.text, after.text) and len(tiny_network.text_encoders) == len(encoders)


def test_prompts_are_kept_by_their_bytes_and_one_call_may_exceed_the_bound(random_network, monkeypatch):
    random_network._prompts.clear()
    alone = {prompt: random_network.encode([prompt]) for prompt in "abcde"}
    monkeypatch.setattr("cul_core.models.diffusers_network._CACHED_BYTES", 3 * alone["a"].nbytes)
    random_network._prompts.clear()
    for prompts in (["a cat", "a dog"], ["a house", "a cat"], ["a boat"]):
        random_network.encode(prompts)
    assert list(random_network._prompts) == ["a house", "a cat", "a boat"]
    batch = random_network.encode([*"abcdea"])
    assert torch.allclose(batch.text, torch.cat([alone[prompt].text for prompt in "abcdea"]), atol=1e-5)
    assert list(random_network._prompts) == ["c", "d", "e"]
    monkeypatch.setattr("cul_core.models.diffusers_network._CACHED_BYTES", 0)
    assert len(random_network.encode([*"abc"])) == 3 and list(random_network._prompts) == []


# --- the estimate


def kept_by_autograd(network, rows):
    """Bytes that a forward pass really keeps for the backward pass."""
    storages = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in network.unet.parameters()}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    weights = network.weights("text_readers").values()
    for weight in weights:
        weight.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = network.predict(
            torch.randn(rows, 4, 8, 8), torch.zeros(rows, dtype=torch.long), network.encode(["a cat"] * rows)
        )
    for weight in weights:
        weight.requires_grad_(False)
    del output
    return sum(storage.nbytes() for place, storage in storages.items() if place not in own)


@pytest.mark.parametrize("rows", [1, 4])
def test_counted_activations_are_those_that_autograd_keeps(rows, random_network):
    counted = passes(BLANK, torch.float32, "kv", rows)
    assert counted.kept_bytes == pytest.approx(kept_by_autograd(random_network, rows), rel=0.1)
    assert counted.teacher_bytes < counted.kept_bytes <= counted.training_bytes


def test_more_pictures_take_more_and_checkpointing_and_half_precision_take_less():
    one, two, four = (passes(BLANK, torch.float32, "kv", rows) for rows in (1, 2, 4))
    assert one.training_bytes < two.training_bytes < four.training_bytes < 4.2 * one.training_bytes
    assert four.forward_flops == 4 * one.forward_flops < 1.2 * four.backward_flops
    again = passes(BLANK, torch.float32, "kv", 4, is_checkpointed=True)
    assert (
        again.training_bytes < 0.7 * four.training_bytes and again.backward_flops > 1.2 * four.backward_flops
    )
    assert passes(BLANK, torch.bfloat16, "kv", 4).training_bytes < 0.6 * four.training_bytes


def test_one_image_is_counted_once_in_a_process_and_all_grows_with_their_number(monkeypatch):
    counted, original = [], memory_plan.count_passes
    monkeypatch.setattr(memory_plan, "_counted", {})
    monkeypatch.setattr(
        memory_plan, "count_passes", lambda *asked: counted.append(asked[1:]) or original(*asked)
    )
    one, *others = (passes(BLANK, torch.float32, "kv", rows) for rows in (1, 2, 5))
    assert counted == [("kv", 1, False)]
    for rows, found in zip((2, 5), others, strict=True):
        assert astuple(found) == tuple(rows * value for value in astuple(one))
    assert all(astuple(one))


def test_a_family_without_files_is_counted_too(tmp_path, monkeypatch):
    family, found = replace(MINI, name="fileless", folder=tmp_path), Passes(1, 2, 3, 4, 5)
    monkeypatch.setattr(memory_plan, "count_passes", lambda *asked: found)
    network = SimpleNamespace(family=family, blank=lambda dtype: None)
    assert passes(network, torch.float32, "kv", 2) == found.of(2)


def images_of(parts):
    """(images with gradients, images by teachers) of every update, as parts declare them."""
    return tuple(sum(getattr(cost, name) for cost in parts) for name in ("student_images", "teacher_images"))


@pytest.mark.parametrize(
    "parts",
    [
        {"method": ConAblConfig()},
        {"method": ConAblConfig(preservation=1.0, replay=0.5)},
        {"method": ESDConfig(**SHORT["esd"])},
        {"method": ESDConfig(**SHORT["esd"], erase_from="a house")},
        {"method": SculpMemConfig(warm_up=1, warm_up_form="train", distillation=1.0, preservation=1.0)},
        {"regularizers": [DISTILLATION]},
        {"regularizers": [replace(DISTILLATION, keep_weight=0.0)]},
        {"regularizers": [replace(DISTILLATION, previous_weight=0.0), L1SPConfig(form="penalty")]},
        {"regularizers": [ProjectionConfig(decoys=3), SelFTConfig(states=2)]},
    ],
    ids=["conabl", "preserving", "esd", "esd inside", "sculpmem", "both", "previous", "keep", "none"],
)
@pytest.mark.parametrize("is_chained", [False, True], ids=["first", "chained"])
def test_what_parts_declare_to_take_is_what_updates_take(
    parts, is_chained, step, make_request, random_network, random_model
):
    """Of the second update, in which nothing is drawn anew."""
    first = step(make_request("Lava", iterations=1))[0] if is_chained else random_model
    request, at = make_request(**parts, iterations=2), []
    with calls(random_network) as seen:
        watch = Callbacks(on_progress=lambda progress: at.append(len(seen)))
        step(request, model=first, callbacks=watch)
    taken = [sum(rows for rows, graph, _ in seen[slice(*at)] if graph is which) for which in (True, False)]
    costs = request.costs((Concept("Lava"),) * is_chained)
    assert tuple(taken) == images_of(costs) and taken[0] >= 2


def test_an_estimate_counts_what_earlier_steps_add(make_request):
    """Of Stable Diffusion's presets, on a small network."""
    earlier = [Concept(name) for name in WORDS]

    def of(name, previous):
        request = (
            preset(name)
            .for_family(SD1)
            .request(
                [Concept("Van_Gogh")],
                retain=[Concept("Monet")],
                anchor_prompts=CAPTIONS,
                seed=0,
                anchor_seed=0,
            )
        )
        return request, estimate_step(BLANK, request, "cpu", Compute(), previous=previous)

    one, prompt_bytes = passes(BLANK, torch.float32, "kv", 1), 4 * BLANK.inputs(1)[2].text.numel()
    # four states of what is kept, and four of what was forgotten before
    request, alone = of("distillation_ours", ())
    _, chained = of("distillation_ours", earlier)
    assert request.training.batch_size == 4
    assert (alone.passes_bytes, chained.passes_bytes) == (4 * one.training_bytes, 8 * one.training_bytes)
    # Concept Ablation's own four besides, one after the other; a teacher for each
    flops = one.forward_flops * 2 + one.backward_flops
    assert chained.seconds / alone.seconds == pytest.approx((4 + 8) * flops / ((4 + 4) * flops))
    # of what was forgotten before, as many prompts as pictures are ever drawn: 8 and one after each 25
    drawn = 8 + request.training.iterations // 25
    assert chained.anchor_bytes - alone.anchor_bytes == drawn * prompt_bytes
    # for replay two prompts with each of twelve styles in every caption
    (request, alone), (_, chained) = of("thorough", ()), of("thorough", earlier)
    assert chained.anchor_bytes - alone.anchor_bytes == len(CAPTIONS) * 2 * len(earlier) * prompt_bytes
    assert chained.passes_bytes == alone.passes_bytes == request.training.batch_size * one.training_bytes


@pytest.mark.parametrize("replay", [0.0, 0.25])
def test_prompts_that_concept_ablation_declares_are_no_fewer_than_it_keeps(replay, random_network):
    method, earlier = ConAbl(ConAblConfig(replay=replay)), tuple(map(Concept, WORDS))
    training_config, concepts = TrainingConfig(batch_size=2), (Concept("Lava"),)
    latents = torch.zeros(len(CAPTIONS), 4, 8, 8)
    method.prepare(
        StepContext(
            random_network,
            concepts,
            (),
            earlier,
            CAPTIONS,
            latents,
            {},
            {},
            training_config,
            partial(generator_for, 0),
        )
    )
    declared = method.cost(training_config, concepts, earlier, len(CAPTIONS)).prompts
    assert 0.5 * declared <= len(method._embeddings) <= declared


def test_the_parts_of_an_estimate(make_request):
    request = make_request(batch_size=4, iterations=10)
    trained = 4 * sum(weight.numel() for weight in BLANK.weights("text_readers").values())
    exact, low = (estimate_step(BLANK, request, "cpu", compute) for compute in (Compute(), BF16))
    # weights, gradients, two moments; exact W0, and what both teachers have of it in bf16
    assert exact.trained_bytes == 4 * trained and low.trained_bytes == 5.5 * trained
    # and the start, exact and in bf16
    assert estimate_step(BLANK, request, "cpu", Compute(), is_edited=True).trained_bytes == 5 * trained
    assert estimate_step(BLANK, request, "cpu", BF16, is_edited=True).trained_bytes == 7 * trained
    assert estimate_step(BLANK, request, "cpu", BF16, is_offloaded=True).trained_bytes == 0
    # a teacher's weights are made for its call then, which is the worst moment for few images
    few = make_request(batch_size=1)
    resting, offloaded = (
        estimate_step(BLANK, few, "cpu", BF16, is_offloaded=is_offloaded).passes_bytes
        for is_offloaded in (False, True)
    )
    one = passes(BLANK, torch.bfloat16, "kv", 1)
    assert resting == max(one.training_bytes, one.teacher_bytes)
    assert offloaded == max(one.training_bytes, one.teacher_bytes + trained // 2)
    assert exact.network_bytes == 2 * low.network_bytes and exact.margin_bytes == 0 < exact.seconds
    split = estimate_step(BLANK, request, "cpu", Compute(largest_micro_batch=1))
    assert split.passes_bytes < 0.5 * exact.passes_bytes and split.seconds > 1.1 * exact.seconds
    preserving = make_request(batch_size=4, method=ConAblConfig(preservation=1.0))
    assert estimate_step(BLANK, preserving, "cpu", Compute()).passes_bytes > 1.8 * exact.passes_bytes


def test_the_fastest_way_that_fits_is_chosen(make_request, monkeypatch):
    needs, asked = {(1, "off"): 4, (1, "on"): 2}, []

    def estimate(
        network,
        request,
        device,
        compute,
        *,
        previous=(),
        is_edited=False,
        is_offloaded=False,
        with_seconds=True,
    ):
        asked.append((previous, is_edited))
        scale = (compute.largest_micro_batch or 4) / 4 if compute.checkpointing == "on" else 1
        return Estimate(
            0,
            0 if is_offloaded else 8,
            int(100 * needs[1, compute.checkpointing.replace("auto", "off")] * scale),
            0,
            0,
        )

    monkeypatch.setattr("cul_core.training.memory_plan.estimate_step", estimate)
    request, cpu = make_request(batch_size=4), torch.device("cpu")
    sd1 = DiffusersNetwork(SD1, build_unet(SD1), (), None, None)
    earlier = (Concept("Lava"),)

    def way(free, checkpointing="auto", dtype="bfloat16"):
        compute = Compute(dtype, checkpointing)
        asked.clear()
        chosen, is_offloaded, found = planned(sd1, request, cpu, compute, free, earlier, True)
        assert asked and all(said == (earlier, True) for said in asked)
        return chosen.checkpointing, chosen.largest_micro_batch, is_offloaded, found.memory_bytes

    assert way(None) == way(500) == ("auto", 0, False, 408)
    assert way(300) == ("on", 0, False, 208)
    assert way(110) == ("on", 2, False, 108)
    assert way(58) == ("on", 1, False, 58)
    assert way(55) == way(1) == ("on", 1, True, 50)
    assert way(1, dtype="float32") == ("on", 1, False, 58)
    assert way(300, "off")[0] == "off"
    assert planned(BLANK, request, cpu, Compute(), 1) == (Compute(), False, None)
    solved = replace(request, method=ExactConfig())  # nothing is trained, so there is nothing to estimate
    assert planned(sd1, solved, cpu, Compute(), 1) == (Compute(), False, None)


def test_what_is_needed_is_said_before_the_step_begins(tiny_model, make_request, anchors, tiny_networks):
    assert (
        Estimate(4 * 10**9, 10**9, 10**8, 0, 0, 230.0).sentence(7_200_000_000)
        == "Needs about 5.1 GB and 4 min; 7.2 GB are free."
    )
    told = []
    watch = Callbacks(on_message=told.append, on_progress=lambda progress: told.append("update"))
    run_step(
        tiny_model,
        make_request(iterations=1),
        store=anchors,
        networks=tiny_networks[tiny_model.family.name],
        callbacks=watch,
    )
    assert told[0].startswith("Needs about 0.0 GB and 1 min") and told[1:] == ["update"]


def test_the_command_line_says_how_to_compute(tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def run(*arguments, compute, **options):
        raise Asked(compute)

    monkeypatch.setattr("cul_core.training.step.run_step", run)
    with pytest.raises(Asked) as asked:
        main(
            [
                "unlearn",
                "Lava",
                "--out",
                str(tmp_path / "x.safetensors"),
                "--dtype",
                "bfloat16",
                "--checkpointing",
                "on",
                "--compile",
            ]
        )
    assert asked.value.args == (Compute("bfloat16", "on", True),)


# --- on a GPU


@cuda
@pytest.mark.parametrize("is_offloaded", [False, True], ids=["resting", "offloaded"])
def test_a_step_on_a_gpu(tiny_model, make_request, anchors, monkeypatch, is_offloaded):
    networks, told = NetworkCache(), []
    request = make_request(**EVERYTHING)
    real = training._Step._planned
    monkeypatch.setattr(
        training._Step, "_planned", lambda self, compute: (real(self, compute)[0], is_offloaded)
    )
    edited, report = run_step(
        tiny_model,
        request,
        device="cuda",
        store=anchors,
        networks=networks,
        callbacks=Callbacks(on_message=told.append),
    )
    network = networks.get(tiny_model.source, "cuda", Compute().dtype_on("cuda"))
    assert network.dtype in (torch.bfloat16, torch.float16) and network.unet.conv_in.weight.is_contiguous(
        memory_format=torch.channels_last
    )
    assert edited.edits and all(
        delta.dtype == torch.float32 and delta.device.type == "cpu" for delta in edited.edits.values()
    )
    assert "are free" in told[0] and all(map(torch.isfinite, map(torch.tensor, report.losses)))
    del network
    networks.free()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() < 50_000_000
