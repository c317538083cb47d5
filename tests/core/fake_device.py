"""A device without fp64 on a machine that has only a CPU: tensors that say they are on `meta`, and have their
values on the CPU.

It refuses what Apple's GPUs refuse: fp64 tensors, made there or on the way from there, and operations between
devices.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")
WIDE = (torch.float64, torch.complex128)
aten = torch.ops.aten
BETWEEN_DEVICES = (
    aten._to_copy.default,
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
)


class OnDevice(Tensor):
    """A tensor on the device; `values` holds it on the CPU."""

    @staticmethod
    def __new__(cls, values: Tensor):
        if values.dtype in WIDE:
            raise TypeError(f"Cannot make a tensor of {values.dtype} on this device.")
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
            requires_grad=values.requires_grad,
        )

    def __init__(self, values: Tensor):
        self.values = values

    def __repr__(self):
        return f"OnDevice({self.values})"

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        self.values = other.values

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def computed(func, args, kwargs):
    """What an operation gives, on the device if an argument or its keyword `device` says so."""
    flat, _ = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    inside = any(isinstance(value, OnDevice) for value in tensors)
    asked = kwargs.get("device")
    goes = inside if asked is None else torch.device(asked) == DEVICE
    if inside and func not in BETWEEN_DEVICES:
        for value in tensors:
            if not isinstance(value, OnDevice) and value.ndim:
                raise RuntimeError(f"{func} got tensors on the device and on the CPU.")
    if inside and kwargs.get("dtype") in WIDE:
        raise TypeError(f"{func} would make a tensor of {kwargs['dtype']} on this device.")
    if asked is not None and goes:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args_on_cpu, kwargs_on_cpu = tree_map_only(OnDevice, lambda tensor: tensor.values, (args, kwargs))
    found = func(*args_on_cpu, **kwargs_on_cpu)
    if not goes:
        return found
    found = tree_map_only(Tensor, OnDevice, found)
    return return_and_correct_aliasing(func, args, kwargs, found) if inside else found


class NumbersMode(TorchFunctionMode):
    """Within it, lists of numbers go to the device by way of the CPU; `meta` would lose them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]), *args[2:])
        return func(*args, **kwargs)


class DeviceMode(TorchDispatchMode):
    """Within it, what is made or moved to `DEVICE` is `OnDevice`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def place(module: nn.Module) -> None:
    """Move a module's parameters and buffers to the device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(
                    OnDevice(parameter.detach().clone()), requires_grad=False
                )
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer.clone())


@contextmanager
def on_device(network):
    """Within the block the UNet and the text encoders of a network are on the device."""
    for module in (network.unet, *network.text_encoders):
        place(module)
    with DeviceMode(), NumbersMode():
        yield network
