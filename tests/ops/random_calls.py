"""Random calls of the operators of csrc/, sensible and not: as a module, and as a command.

    python -m tests.ops.random_calls LIBRARY [--emulated] [--first N] [--calls N]

The command loads the library, built with a sanitizer, makes the calls and prints the number of
each before it is made, then how many there were of each kind. A call's number is its seed: one that
ends the program is made again alone by ``--first NUMBER --calls 1``.

Letters as in `maskdino.ops.ms_deform_attn`: B images, S tokens, Q queries, M heads, D channels,
L levels, P points; in calls with packed masks N masks, M rows of points, P points.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ODD_NUMBERS = (math.nan, math.inf, -math.inf, 1e30, -1e30, 3e9, -3e9, 0.0, 0.5, 1.0, -0.5, 1e-40)
REFUSED = (TypeError, ValueError, IndexError, RuntimeError)
Arguments = list[Any]


@dataclass
class Call:
    """One call.

    Attributes:
        operator: its name.
        arguments: of it.
        refused: what is wrong with them; empty: nothing.
    """

    operator: str
    arguments: Arguments
    refused: str = ""


class Draw:
    """Draws calls.

    Args:
        number: the seed.
        wild: also numbers that are not finite, places on borders, tensors with strides.
        emulated: for the emulated CUDA kernels, which are slow and have limits of their own.
    """

    def __init__(self, number: int, wild: bool = True, emulated: bool = False) -> None:
        self.random = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        self.wild, self.emulated = wild, emulated
        self.dtype = self.random.choice(DTYPES)
        self.arithmetic = torch.float64 if self.dtype == torch.float64 else torch.float32

    def size(self, most: int) -> int:
        """From 1, now and then 0."""
        if self.wild and self.random.random() < 0.03:
            return 0
        return self.random.randint(1, most)

    def numbers(self, size: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Normal numbers, some of them odd, in memory of any order."""
        drawn = torch.randn(size, generator=self.generator, dtype=torch.float64) * scale
        if self.wild and drawn.numel() and self.random.random() < 0.5:
            chosen = torch.rand(size, generator=self.generator) < self.random.choice((0.02, 0.5, 1))
            odd = torch.tensor(ODD_NUMBERS, dtype=torch.float64)
            which = torch.randint(len(odd), size, generator=self.generator)
            drawn = torch.where(chosen, odd[which], drawn)
        return self.laid_out(drawn.to(dtype))

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The same numbers: dense, permuted, a part of more, at an odd address, or repeated."""
        how = self.random.randrange(6) if self.wild else 0
        if how == 1:
            order = self.random.sample(range(tensor.dim()), tensor.dim())
            back = [order.index(axis) for axis in range(tensor.dim())]
            return tensor.permute(order).contiguous().permute(back)
        if how == 2:
            more = tensor.new_zeros([2 * side + 1 for side in tensor.shape])
            part = more[tuple(slice(1, None, 2) for _ in tensor.shape)]
            return part.copy_(tensor)
        if how == 3:
            flat = tensor.new_zeros(tensor.numel() + 1)
            return flat[1:].view(tensor.shape).copy_(tensor)
        if how == 4 and tensor.shape[0]:
            return tensor[:1].expand(tensor.shape)
        return tensor

    def attention(self) -> Call:
        """A call of deformable attention: either form, forward or backward."""
        images, heads = (
            (self.size(2), self.size(2)) if self.emulated else (self.size(3), self.size(4))
        )
        channels = self.size(self.random.choice((8, 64)))
        if self.random.random() < 0.4:
            channels = self.random.choice((16, 32, 64))  # those of the vectorized kernels
        side = 4 if self.emulated else 12
        shapes = [self.random.randint(1, side) for _ in range(2 * self.random.randint(1, 5))]
        tokens = sum(h * w for h, w in zip(shapes[::2], shapes[1::2], strict=True))
        points = self.random.randint(1, 8)
        queries = self.size(8 if self.emulated else 30)
        value = self.numbers((images, tokens, heads, channels), self.dtype)
        form = self.random.choice(("", "_fused"))
        samples = (heads, len(shapes) // 2, points)
        if form:
            size = self.random.choice((None, 2, 4))
            queries = tokens if size is None else queries
            raw = self.numbers((images, queries, math.prod(samples) * 3), self.dtype, 3.0)
            reference = size and self.numbers((images, queries, size), self.arithmetic)
            arguments = [value, shapes, raw, reference, points]
        else:
            locations = self.numbers((images, queries, *samples, 2), self.arithmetic)
            weights = self.numbers((images, queries, *samples), self.arithmetic)
            arguments = [value, shapes, locations, weights]
        if self.random.random() < 0.5:
            return Call(f"ms_deform_attn{form}", arguments)
        arguments.insert(0, self.numbers((images, queries, heads * channels), self.dtype))
        if form:
            arguments.append(arguments[4] is not None and self.random.random() < 0.7)
        return Call(f"ms_deform_attn{form}_backward", arguments)

    def packed_masks(self) -> Call:
        """A call that samples packed masks; a mask may have no pixels, a call no points."""
        masks, height, width = self.random.randint(1, 5), self.size(40), self.size(70)
        rows = self.size(6)
        bits = torch.randint(256, (masks, height, (width + 7) // 8), generator=self.generator)
        index = torch.randint(masks, (rows,), generator=self.generator)
        shared = self.random.random() < 0.5
        many = 50 if self.emulated else self.random.choice((50, 5000))  # threads share the latter
        points = self.numbers((1 if shared else rows, self.size(many), 2), torch.float32)
        arguments = [self.laid_out(bits.byte()), width, self.laid_out(index), points]
        return Call("sample_packed_masks", arguments)

    def call(self) -> Call:
        """Any call; every fourth is spoiled."""
        if self.wild and self.random.random() < 0.02:
            return self.absurd_sizes()
        call = self.packed_masks() if self.random.random() < 0.2 else self.attention()
        if self.wild and self.random.random() < 0.25:
            self.spoil(call)
        return call

    def absurd_sizes(self) -> Call:
        """A call with tensors without elements whose sides do not fit 64 bits when multiplied."""
        heads, channels = self.random.choice(((2**61, 4), (2**32, 2**32), (2**62, 1)))

        def nothing(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(0, dtype=dtype).as_strided(size, [0] * len(size))

        value, shapes = nothing(0, 1, heads, channels), [1, 1]
        points = nothing(0, 1, heads, 1, 1, 2)
        calls = (
            ("ms_deform_attn", [value, shapes, points, points[..., 0]]),
            ("ms_deform_attn_backward", [value[..., 0], value, shapes, points, points[..., 0]]),
            ("ms_deform_attn_fused", [value, shapes, nothing(0, 1, 3), None, 1]),
        )
        return Call(*self.random.choice(calls), refused="sizes beyond all memory")

    def spoil(self, call: Call) -> None:
        """Changes one argument to what the operator must refuse."""
        kinds: dict[type, Callable[[Any], tuple[Any, str]]]
        kinds = {Tensor: self._spoiled_tensor, list: self._spoiled_shapes, int: self._other_number}
        places = [i for i, argument in enumerate(call.arguments) if type(argument) in kinds]
        place = self.random.choice(places)
        argument = call.arguments[place]
        if call.operator == "sample_packed_masks" and place == 2 and self.random.random() < 0.5:
            if argument.numel() == 0 or call.arguments[3].numel() == 0 or self.emulated:
                return  # no index is looked at; on a GPU an assertion ends the program
            wrong = self.random.choice((-1, call.arguments[0].shape[0], 2**62, -(2**63)))
            argument = argument.clone()
            argument[self.random.randrange(len(argument))] = wrong
            call.arguments[place], call.refused = argument, f"an index {wrong}"
            return
        call.arguments[place], call.refused = kinds[type(argument)](argument)
        call.refused = f"argument {place}: {call.refused}"

    def _spoiled_tensor(self, tensor: Tensor) -> tuple[Tensor, str]:
        how = self.random.randrange(4 if tensor.dim() > 1 else 2)
        if how == 0:
            other = (torch.int32, torch.bool, torch.complex64, torch.int8)
            return torch.zeros(tensor.shape, dtype=self.random.choice(other)), "its dtype"
        if how == 1:
            return tensor[None], "an axis too many"
        if how == 2:
            return tensor.reshape(-1), "all in one axis"
        huge = self.random.choice((2**31, 2**40, 2**62))  # more than fit one tensor, of no memory
        return tensor.new_zeros(()).expand(huge), f"{huge} numbers in one axis"

    def _spoiled_shapes(self, shapes: list[int]) -> tuple[list[int], str]:
        place = self.random.randrange(len(shapes))
        wrong = self.random.choice((0, -1, shapes[place] + 1, 2**31 - 2, 2**31, 2**62, -(2**63)))
        changed = [*shapes[:place], wrong, *shapes[place + 1 :]]
        chosen: list[int] = self.random.choice(([], shapes[:-1], [*shapes, 1, 1], changed))
        return chosen, f"shapes {chosen}"

    def _other_number(self, number: int) -> tuple[int, str]:
        wrong = self.random.choice((-1, -(2**63), 2**24, 2**31, 2**62, 2**63 - 1))
        return wrong, f"{wrong} instead of {number}"


def make(call: Call, operators: Any) -> str:
    """Makes a call and returns what became of it.

    Raises:
        AssertionError: a call that is wrong was not refused, or one that is right was.
    """
    operator: Callable[..., Any] = getattr(operators, call.operator)
    try:
        result = operator(*call.arguments)
    except REFUSED as error:
        assert call.refused, f"{call.operator} refused a sound call: {error}"
        return "refused"
    assert not call.refused, f"{call.operator} took a call although of {call.refused}"
    results = result if isinstance(result, tuple) else (result,)
    for tensor in results:
        tensor.double().sum()  # reads all of it
    return "empty" if results[0].numel() == 0 else "computed"


def main() -> None:
    """Makes the calls of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("--emulated", action="store_true", help="its kernels are those for CUDA")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--calls", type=int, default=100, help="how many")
    parser.add_argument("--one-thread", action="store_true", help="torch itself has one thread")
    arguments = parser.parse_args()
    torch.ops.load_library(arguments.library)
    operators = torch.ops.maskdino_emulated if arguments.emulated else torch.ops.maskdino
    say = sys.stdout.write
    say(f"kernels: {operators.cpu_instruction_set() if not arguments.emulated else 'CUDA'}\n")
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    for number in range(arguments.first, arguments.first + arguments.calls):
        say(f"call {number}\n")
        sys.stdout.flush()
        draw = Draw(number, emulated=arguments.emulated)
        call = draw.call()
        if not arguments.one_thread:
            torch.set_num_threads(draw.random.randint(1, 4))
        torch.use_deterministic_algorithms(draw.random.random() < 0.3)
        outcomes[f"{call.operator} {make(call, operators)}"] += 1
        torch.use_deterministic_algorithms(False)
    for outcome, number in sorted(outcomes.items()):
        say(f"{number:6d} {outcome}\n")


if __name__ == "__main__":
    main()
