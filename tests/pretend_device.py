"""A pretend CUDA device: tensors that claim to be on a GPU, over real numbers on the CPU.

    with PretendDevice() as device:
        model = device.put(model)
        losses = model(batch)
    device.waits, device.copies, device.launches

Autocast, `is_cuda` and device checks behave as on a GPU, because tensors claim one; their numbers
are computed on the CPU in the same types. The device

* raises `DeviceMix` where one operation is given tensors of the host and of the device, and where
  an event belongs to a stream of another GPU than the tensors',
* records what makes the host wait for the device, and every other copy between the two,
* counts operations that launch kernels: all but views, allocations and copies from and to the host.

It computes forward passes and losses; `tests.pretend_backward` computes gradients. It is the second
of two, `cuda:1`, so that whoever forgets to say which GPU is found out. It knows nothing of
kernels: one operation counts as one launch.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.weak import WeakTensorKeyDictionary

from tests.pretend_kernels import compute

CUDA = torch.device("cuda", 1)
_attention_of_cpu = F.scaled_dot_product_attention
PACKAGE = str(Path(__file__).resolve().parent.parent / "maskdino") + "/"
CARRIER = PACKAGE + "ops/host.py"  # copies for others, who are to blame
PRIVATE = ("_ensureCUDADeviceGuardSet", "_only_lift_cpu_tensors", "_set_only_lift_cpu_tensors")

# Their results have sizes, or are values, that the host must know.
WAITING = {
    "_local_scalar_dense": "value on the host", "_unique": "unique", "_unique2": "unique",
    "bincount": "bincount", "equal": "equal", "masked_select": "masked_select",
    "nonzero": "nonzero", "repeat_interleave": "repeat_interleave",
    "unique_consecutive": "unique", "unique_dim": "unique",
}  # fmt: skip
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
FILLING = ("fill_", "masked_fill", "masked_fill_")  # with a value that the host must know
NO_LAUNCH = {
    "_reshape_alias", "_unsafe_view", "alias", "detach", "detach_", "empty", "empty_like",
    "empty_strided", "lift", "lift_fresh", "new_empty", "new_empty_strided", "record_stream",
    "resize_", "set_", "split", "split_with_sizes", "unbind", "view",
}  # fmt: skip


class DeviceMix(RuntimeError):
    """An operation was given tensors of the host and of the device."""


def missing_api() -> str:
    """Says what this PyTorch lacks for the pretend device; empty where nothing is lacking."""
    missing = [name for name in PRIVATE if not hasattr(torch._C, name)]
    return f"torch {torch.__version__} has no torch._C.{missing[0]}" if missing else ""


class OnDevice(Tensor):
    """Claims to be on the device; `numbers` is a tensor on the CPU."""

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnDevice:
        return Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=CUDA,
        )

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if PretendDevice.current is None:
            raise RuntimeError(f"{func} after the pretend device was left")
        return PretendDevice.current.__torch_dispatch__(func, types, args, kwargs)

    def __repr__(self) -> str:
        return f"OnDevice({self.numbers!r})"

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def tolist(self) -> Any:
        PretendDevice.current.wait("tolist")
        return self.numbers.tolist()

    def numpy(self, *_: object, **__: object) -> None:
        raise TypeError(f"can't convert {CUDA} device type tensor to numpy")

    __array__ = numpy


class PretendDevice(TorchDispatchMode):
    """While it is entered, `cuda:1` exists.

    Attributes:
        waits: how often the host waits, by cause and by the place that is to blame
            ("postprocess/results.py:postprocess", "detectron2/structures/boxes.py:clip").
        copies: asynchronous copies, likewise.
        launches: how often each operation was launched.
        lines: the lines of a place, for messages.
    """

    current: PretendDevice | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[str] = Counter()
        self.lines: dict[str, set[int]] = {}
        self._pinned = WeakTensorKeyDictionary()
        self._stack = contextlib.ExitStack()
        self._quiet = False

    def put(self, value: Any) -> Any:
        """Puts a tensor, or the parameters and buffers of a module, on the device unrecorded."""
        if isinstance(value, Tensor):
            return value if isinstance(value, OnDevice) else OnDevice(value.detach().clone())
        for module in value.modules():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    moved = nn.Parameter(self.put(tensor), requires_grad=tensor.requires_grad)
                    module._parameters[name] = moved
            for name, tensor in module._buffers.items():
                if tensor is not None:
                    module._buffers[name] = self.put(tensor)
        return value

    def clear(self) -> None:
        """Forgets what was recorded."""
        for record in (self.waits, self.copies, self.launches, self.lines):
            record.clear()

    def wait(self, kind: str) -> None:
        """Records that the host waits for the device."""
        self._record(self.waits, kind)

    def __enter__(self) -> PretendDevice:
        torch._C._ensureCUDADeviceGuardSet()
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stand_ins = {
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "_lazy_init": lambda: None,
            "current_device": lambda: _thread.device,
            "set_device": _set_device,
            "is_bf16_supported": lambda including_emulation=True: True,  # noqa: ARG005
            "get_device_capability": lambda *_: (9, 0),
            "synchronize": lambda *_: self.wait("synchronize"),
            "current_stream": _Stream,
            "is_current_stream_capturing": lambda: False,
            "device": _current_device,
            "Event": _Event,
        }
        for name, stand_in in stand_ins.items():
            self._patch(torch.cuda, name, stand_in)
        self._patch(F, "scaled_dot_product_attention", _attention)
        PretendDevice.current = self
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        PretendDevice.current = None
        self._stack.close()

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        """Computes on the CPU what one operation does on the device, and records it."""
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        tensors = list(_tensors([args, kwargs]))
        on_device = any(isinstance(x, OnDevice) for x in tensors)
        target = kwargs.get("device")
        to_device = on_device if target is None else torch.device(target).type == "cuda"
        if not (on_device or to_device):
            return self._on_host(func, name, args, kwargs)
        if to_device and target is not None and torch.device(target) != CUDA:
            raise DeviceMix(f"{name} on {target} instead of {CUDA} at {self._place()}")
        if name == "copy_":
            to_device = isinstance(args[0], OnDevice)
        if name in ("_to_copy", "copy_") and isinstance(tensors[-1], OnDevice) != to_device:
            self._note_copy(name, args, kwargs, to_device)
        else:
            self._note(func, name, args, kwargs)
        plain = _map(_numbers, kwargs)
        if target is not None:
            plain["device"] = torch.device("cpu")
        plain.pop("non_blocking" if name == "_to_copy" else "pin_memory", None)
        out = compute(func, name, _map(_numbers, args), plain)
        if to_device:
            return self._wrapped(func, args, kwargs, out)
        if name == "_to_copy" and kwargs.get("non_blocking"):
            self._pinned[out] = True
        return args[0] if name == "copy_" else out

    def _on_host(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        if name == "is_pinned":
            return args[0] in self._pinned
        pinned = name == "_pin_memory" or kwargs.pop("pin_memory", False)
        out = args[0].clone() if name == "_pin_memory" else func(*args, **kwargs)
        if pinned:
            self._pinned[out] = True
        return out

    def _wrapped(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        """Results as tensors of the device; where arguments were changed, those."""
        out = _map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, out)
        before, self._quiet = self._quiet, True
        try:
            return return_and_correct_aliasing(func, args, kwargs, out)
        finally:
            self._quiet = before

    def _record(self, record: Counter[tuple[str, str]], kind: str) -> None:
        if not self._quiet:
            record[kind, self._place()] += 1

    def _note_copy(self, name: str, args: tuple, kwargs: dict[str, Any], to_device: bool) -> None:
        """A copy between host and device."""
        into = "the device" if to_device else "the host"
        waits = not kwargs.get("non_blocking", len(args) > 2 and args[2])
        if to_device:
            pinned = args[-1 if name == "_to_copy" else 1] in self._pinned
        else:  # a new tensor that is not waited for is made in pinned memory
            pinned = name == "_to_copy" or args[0] in self._pinned
        if waits or not (pinned or to_device):
            self.wait(f"copy to {into}")
        else:
            self._record(self.copies, f"{'pinned' if pinned else 'pageable'} to {into}")

    def _note(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        """An operation on the device."""
        host = [x for x in _tensors([args, kwargs]) if not isinstance(x, OnDevice)]
        if name in INDEXING and isinstance(args[0], OnDevice):
            host = self._note_index(list(_tensors(args[1])), list(_tensors(args[2:])))
        elif name in FILLING and isinstance(args[-1], OnDevice):
            self.wait("value on the host")
        elif name in WAITING and kwargs.get("output_size") is None:
            self.wait(WAITING[name])
        scalars = all(x.dim() == 0 for x in host)
        if host and scalars and name == "where":
            self.wait("copy to the device")
        elif host and not (scalars and (torch.Tag.pointwise in func.tags or name in FILLING)):
            shapes = [tuple(x.shape) for x in host]
            raise DeviceMix(f"{name} of {shapes} on the host and others at {self._place()}")
        if not (self._quiet or func.is_view or name in NO_LAUNCH):
            self.launches[name] += 1

    def _note_index(self, indices: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        """Reading or setting elements; returns values on the host that are not scalars."""
        number = any(not isinstance(x, OnDevice) and x.dim() == 0 for x in values)
        mask = any(x.dtype in (torch.bool, torch.uint8) for x in indices)
        if mask and number and len(indices) == 1:
            return []  # CUDA fills, like masked_fill
        if mask:
            self.wait("index with a mask")
        if not all(isinstance(x, OnDevice) for x in indices):
            self.wait("index on the host")
        if number:
            self.wait("copy to the device")
        return [x for x in values if not (isinstance(x, OnDevice) or x.dim() == 0)]

    def _place(self) -> str:
        """File and function of the innermost caller in the package, or else in detectron2."""
        frame: FrameType | None = sys._getframe(1)
        found = "the test"
        while frame is not None:
            path, function = frame.f_code.co_filename, frame.f_code.co_name
            if path.startswith(PACKAGE) and not (path == CARRIER or function.startswith("<")):
                found = f"{path[len(PACKAGE) :]}:{function}"
                self.lines.setdefault(found, set()).add(frame.f_lineno)
                return found
            if "/detectron2/" in path and found == "the test":
                found = f"detectron2/{path.rpartition('/detectron2/')[2]}:{function}"
            frame = frame.f_back
        return found


class _Thread(threading.local):
    device = 0  # the current one


_thread = _Thread()


def _index(device: Any) -> int:
    return device if isinstance(device, int) else torch.device(device).index or 0


def _set_device(device: Any) -> None:
    _thread.device = _index(device)


@contextlib.contextmanager
def _current_device(device: Any) -> Iterator[None]:
    before, _thread.device = _thread.device, _index(device)
    try:
        yield
    finally:
        _thread.device = before


class _Stream:
    def __init__(self, device: Any = None) -> None:
        self.device_index = _thread.device if device is None else _index(device)

    def synchronize(self) -> None:
        PretendDevice.current.wait("stream")


class _Event:
    """Belongs to a stream, by default the current one of the current device."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def record(self, stream: _Stream | None = None) -> None:
        index = (stream or _Stream()).device_index
        if index != CUDA.index:
            raise DeviceMix(f"an event of {CUDA} is recorded on a stream of cuda:{index}")

    def synchronize(self) -> None:
        if threading.current_thread() is threading.main_thread():
            PretendDevice.current.wait("event")
        elif _thread.device != CUDA.index:
            raise DeviceMix(f"a thread that waits for an event of {CUDA} makes a context elsewhere")

    def elapsed_time(self, _: _Event) -> float:
        """A millisecond lies between any two."""
        return 1.0


def _numbers(x: Any) -> Any:
    return x.numbers if isinstance(x, OnDevice) else x


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map(function, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(function, part) for part in value)
    return function(value)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """What CUDA does where there is a mask: one kernel in autocast's type, the mask as a bias."""
    if not isinstance(query, OnDevice):
        return _attention_of_cpu(query, key, value, attn_mask)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
        attn_mask = bias.masked_fill(~attn_mask, float("-inf"))
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    learned = torch.is_grad_enabled() and query.requires_grad
    return attention(query, key, value, attn_mask, learned)[0]
