"""Plan a step's memory and time: bytes and FLOPs counted by a run of the network on the meta device."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from ..base.config import stable_hash
from ..concepts.concept import Concept
from ..models.family import Family
from ..models.frozen_layers import product
from ..models.network import Network
from ..models.weight_roles import role_of
from ..requests.request import Request
from .compute import Compute

_LIBRARIES_BYTES, _GAPS = 500_000_000, 0.1
_SHARE_OF_MATMUL = 0.5


@dataclass(frozen=True)
class Passes:
    """Peak activation memory and FLOPs of the network for a number of images, without its weights.

    Args:
        training_bytes: peak activation bytes of forward + backward; weight gradients are freed as they
            arrive.
        kept_bytes: activation bytes that the forward pass keeps for the backward pass.
        teacher_bytes: peak activation bytes of a forward pass without gradients.
        forward_flops: floating point operations of a forward pass; a multiply-add counts as two.
        backward_flops: floating point operations of a backward pass, recomputation included.
    """

    training_bytes: int
    kept_bytes: int
    teacher_bytes: int
    forward_flops: int
    backward_flops: int

    def of(self, count: int) -> Passes:
        """The same for `count` times as many images."""
        return Passes(*(count * value for value in astuple(self)))


@dataclass(frozen=True)
class Estimate:
    """Estimated memory and time of a step on its device.

    All bytes but the margin are counted or follow from numbers of weights. Memory and time that regularizers
    use beyond their declared `Cost` are not counted.

    Args:
        network_bytes: the network's weights in its dtype.
        trained_bytes: fp32 master weights, moments, gradients and exact pretrained weights of the trained
            group, if they rest on the device.
        passes_bytes: peak activations; with offloaded master weights, a teacher's copy of the trained group
            is added to the teacher's peak.
        anchor_bytes: anchor latents and encoded prompts.
        margin_bytes: a guess for the device's libraries and for gaps between allocations.
        seconds: time of all updates, from FLOPs, a short measurement of the device's rate, and the guess that
            a network reaches half the rate. It may be off by a factor of two. None if not measured.
        anchor_seconds: time to sample the anchor images, if no earlier step's are stored.
    """

    network_bytes: int
    trained_bytes: int
    passes_bytes: int
    anchor_bytes: int
    margin_bytes: int
    seconds: float | None = None
    anchor_seconds: float | None = None

    @property
    def memory_bytes(self) -> int:
        return (
            self.network_bytes
            + self.trained_bytes
            + self.passes_bytes
            + self.anchor_bytes
            + self.margin_bytes
        )

    def sentence(self, free_bytes: int | None) -> str:
        """The estimate for users, such as 'Needs about 5.1 GB and 4 min; 7.2 GB are free.'"""
        spent = "" if self.seconds is None else f" and {_minutes(self.seconds)}"
        anchors = (
            f", after up to {_minutes(self.anchor_seconds)} for anchor images" if self.anchor_seconds else ""
        )
        free = "" if free_bytes is None else f"; {free_bytes / 1e9:.1f} GB are free"
        return f"Needs about {self.memory_bytes / 1e9:.1f} GB{spent}{anchors}{free}."


def _minutes(seconds: float) -> str:
    return f"{max(round(seconds / 60), 1)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Count(TorchDispatchMode):
    """Counts live bytes of the tensors that operations return (`now`), their peak (`most`), and `flops`.

    The FLOP formulas are PyTorch's. PyTorch's own counter is not used, because it keeps tensors alive that
    checkpointing would free.
    """

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        self.now = self.most = self.flops = 0
        self._weights = [weight.untyped_storage() for weight in weights]
        self._known = weakref.WeakSet(self._weights)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)


class _FusedAttention(TorchFunctionMode):
    """Counts attention as a fused kernel: unlike real devices, the meta device materializes all scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))


_blanks: dict[tuple[Family, torch.dtype], Network | None] = {}
_counted: dict[tuple, Passes] = {}


def _blank(network: Network, dtype: torch.dtype) -> Network | None:
    """The architecture on the meta device, cached; None if the network cannot be built there."""
    key = network.family, dtype
    if key not in _blanks:
        _blanks[key] = network.blank(dtype)
    return _blanks[key]


def count_passes(network: Network, group: str, count: int, is_checkpointed: bool) -> Passes:
    """See `Passes`, counted by running a network on the meta device; it takes a quarter of a minute or
    more."""
    everything = network.weights("all").values()
    trained = network.weights(role_of(group)).values()
    inputs = network.inputs(count)

    def drop(weight: nn.Parameter) -> None:
        weight.grad = None

    def again(module: nn.Module, *args: object) -> object:
        return checkpoint(
            module, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _FusedAttention())
        )

    for weight in everything:
        weight.requires_grad_(False)
    with torch.no_grad(), _FusedAttention(), _Count(everything) as teacher:
        network.predict(*inputs)
    handles = [weight.requires_grad_(True).register_post_accumulate_grad_hook(drop) for weight in trained]
    try:
        if is_checkpointed:
            network.set_checkpointing(True, again)
        with _FusedAttention(), _Count(everything) as student:
            output = network.predict(*inputs)
            kept, forward = student.now, student.flops
            torch.autograd.backward(output, torch.empty_like(output))
        return Passes(student.most, kept, teacher.most, forward, student.flops - forward)
    finally:
        network.set_checkpointing(False)
        for handle in handles:
            handle.remove()


def table_path(family: Family) -> Path:
    """File of what one image takes of the family's network, as `benchmarks/count_passes.py` counted it."""
    return family.config_folder / "passes.json"


def table_key(dtype: torch.dtype, group: str, is_checkpointed: bool) -> str:
    """Name of a count in such a file: fp16 and bf16 take the same."""
    return f"{group}, {8 * dtype.itemsize} bits{', checkpointing' if is_checkpointed else ''}"


def network_hash(family: Family) -> str:
    """What tells the network that was counted from a variant of the family."""
    return stable_hash([family.config("unet"), list(family.latent_shape)])


@lru_cache(maxsize=8)
def _table(family: Family) -> dict[str, dict[str, int]]:
    path = table_path(family)
    if not path.is_file():
        return {}
    table = json.loads(path.read_text(encoding="utf-8"))
    return table["passes"] if table["network"] == network_hash(family) else {}


def passes(
    network: Network, dtype: torch.dtype, group: str, count: int, is_checkpointed: bool = False
) -> Passes:
    """`Passes` for `count` images when `group` is trained.

    One image is tabled for the usual groups, else counted once per process, and scaled by `count`. The one
    live weight gradient, which does not grow with the images, is thus counted once per image.
    """
    key = network.family, dtype, group, is_checkpointed
    if key not in _counted:
        known = _table(network.family).get(table_key(dtype, group, is_checkpointed))
        _counted[key] = (
            Passes(**known) if known else count_passes(_blank(network, dtype), group, 1, is_checkpointed)
        )
    return _counted[key].of(count)


def estimate_step(
    network: Network,
    request: Request,
    device: torch.device | str,
    compute: Compute,
    *,
    previous: Sequence[Concept] = (),
    is_edited: bool = False,
    is_offloaded: bool = False,
    with_seconds: bool = True,
) -> Estimate:
    """The estimate of a step of `request`.

    Each part's loss has a backward pass of its own, one after the other, so memory is the maximum over the
    parts and time their sum.

    Args:
        network: the model.
        request: of the step.
        device: on which the step runs.
        compute: compute settings; checkpointing `auto` counts as off.
        previous: targets of earlier steps.
        is_edited: whether the step starts from edited weights.
        is_offloaded: whether the master weights rest in the CPU's memory.
        with_seconds: whether to estimate time, which measures the device's rate once per process.
    """
    device, dtype, training = torch.device(device), compute.dtype_on(device), request.training
    costs = request.costs(previous)
    needs_anchors = any("anchor_latents" in part.needs for part in request.parts())
    blank, micro = _blank(network, dtype), compute.largest_micro_batch
    one = passes(network, dtype, training.group, 1, compute.checkpointing == "on")

    def at_once(count: int) -> int:
        return min(count, micro) if 0 < micro < count else count

    def largest(counts: list[int]) -> int:
        return max(map(at_once, counts))

    student = one.of(largest([cost.student_images for cost in costs]))
    teacher = one.of(largest([cost.teacher_images for cost in costs]))
    weights = sum(weight.numel() * weight.element_size() for weight in blank.weights("all").values())
    trained = sum(weight.numel() for weight in blank.weights(role_of(training.group)).values())
    # gradients, two moments and master weights; exact W0 if the network's is rounded; the step's start
    resting = 0 if is_offloaded else trained * 4 * (4 + (dtype != torch.float32) + is_edited)
    # rounded weights of the teachers: kept if there is room, else made for each call
    copies = (dtype != torch.float32) * trained * dtype.itemsize
    resting += 0 if is_offloaded else copies * (1 + is_edited)
    worst = max(student.training_bytes, teacher.teacher_bytes + is_offloaded * copies)
    latents = request.anchor_count * torch.Size(network.family.latent_shape).numel() * needs_anchors
    prompts = sum(cost.prompts for cost in costs) * blank.inputs(1)[2].text.numel()
    margin = int(_GAPS * worst) + _LIBRARIES_BYTES if device.type == "cuda" else 0
    estimate = Estimate(weights, resting, worst, 4 * (latents + prompts), margin)
    if not with_seconds:
        return estimate
    flops = sum(
        cost.student_images * (one.forward_flops * (1 + (at_once(cost.student_images) < cost.student_images)))
        + cost.student_images * one.backward_flops
        + cost.teacher_images * one.forward_flops
        for cost in costs
    )
    rate = _SHARE_OF_MATMUL * matmul_rate(device, dtype)
    drawn = request.anchor_count * request.anchor_sampler.steps * 2 * needs_anchors
    seconds = training.iterations * flops / rate
    return replace(estimate, seconds=seconds, anchor_seconds=drawn * one.forward_flops / rate)


@lru_cache(maxsize=8)
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP/s of square matrix products; takes a fifth of a second."""
    side = 4096 if device.type == "cuda" else 512
    matrix = torch.zeros(side, side, device=device, dtype=dtype)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    product(matrix, matrix)  # the first call loads the libraries
    begun, count = wait(), 0
    while (now := wait()) - begun < 0.2:
        product(matrix, matrix)
        count += 1
    return 2 * side**3 * max(count, 1) / (now - begun)


def _ways(compute: Compute, batch: int, can_offload: bool) -> Iterator[tuple[Compute, bool]]:
    """(compute, whether master weights are offloaded), from fastest to smallest."""
    checkpointing = ("off", "on") if compute.checkpointing == "auto" else (compute.checkpointing,)
    whole = compute.largest_micro_batch or batch
    for is_offloaded in (False, True)[: 1 + can_offload]:
        for choice in checkpointing:
            yield replace(compute, checkpointing=choice), is_offloaded
        micro = min(whole, batch) // 2
        while micro:
            yield replace(compute, checkpointing=checkpointing[-1], largest_micro_batch=micro), is_offloaded
            micro //= 2


def planned(
    network: Network,
    request: Request,
    device: torch.device,
    compute: Compute,
    free_bytes: int | None,
    previous: Sequence[Concept] = (),
    is_edited: bool = False,
) -> tuple[Compute, bool, Estimate | None]:
    """(resolved compute, whether master weights are offloaded, estimate): the fastest way that fits.

    If no way fits into `free_bytes`, the smallest is taken; if `free_bytes` is None, the fastest. There is no
    estimate for a small family, a closed-form method, which runs no network, or a network that cannot be
    counted (see `Network.blank`).
    """
    if request.parts()[0].is_closed_form:
        return compute, False, None
    if network.family.is_small or _blank(network, compute.dtype_on(device)) is None:
        return compute, False, None

    def estimate(way: Compute, is_offloaded: bool, with_seconds: bool) -> Estimate:
        return estimate_step(
            network,
            request,
            device,
            way,
            previous=previous,
            is_edited=is_edited,
            is_offloaded=is_offloaded,
            with_seconds=with_seconds,
        )

    can_offload = compute.dtype_on(device) != torch.float32  # otherwise the network trains its own weights
    for way, is_offloaded in _ways(compute, request.training.batch_size, can_offload):
        if free_bytes is None or estimate(way, is_offloaded, False).memory_bytes <= free_bytes:
            break
    # checkpointing may still be turned on if memory runs out
    if way.checkpointing == "off" and compute.checkpointing == "auto":
        way = replace(way, checkpointing="auto")
    return way, is_offloaded, estimate(way, is_offloaded, True)
