"""A network replayed as one CUDA graph for each shape of its input.

A small batch keeps a GPU busy for less time than the host needs to ask for a thousand kernels; a
graph is asked for once. The weights that it reads are the model's own, where they are: an optimizer
or a checkpoint that changes them in place changes what the graph computes.

Shape key: B images, H, W pixels of the padded canvas.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from maskdino.ops.constants import holding_constants
from maskdino.ops.graph_memory import GraphMemory
from maskdino.structures import Predictions

logger = logging.getLogger(__name__)

# The first calls with a shape run as they are: a shape that does not come again is worth no graph.
CALLS_BEFORE = 2
MOST_GRAPHS = 24  # each keeps its results: the R50 model some 30 MiB in bfloat16

Results = tuple[Predictions, Tensor | None]  # and the pixel embedding
Network = Callable[[Tensor], Results]


class CudaGraphs:
    """Graphs of one network; the least recently used are forgotten.

    Several threads may call it. Copies of it, and so of a model that holds it, begin without any.
    """

    def __init__(self, most: int = MOST_GRAPHS) -> None:
        self._most = most
        self._graphs: OrderedDict[Hashable, Network] = OrderedDict()
        self._calls: Counter[int] = Counter()  # by hash: a key may hold a network that was replaced
        self._model: nn.Module | None = None
        self._hooks: tuple[dict, ...] = ()  # of its modules, and of all
        self._memory: dict[torch.device, GraphMemory] = {}
        self._lock = threading.Lock()  # a graph has one place for its images and one for results
        self._works = True

    def __call__(
        self, model: nn.Module, network: Network, images: Tensor, key: Hashable
    ) -> Results:
        """Computes `network(images)`.

        Args:
            model: whose modules the network runs. Where one has a hook, or all have, there is no
                replay, which would pass it over.
            network: a function of the images that asks nothing of the host.
            images: (B, 3, H, W) on a GPU.
            key: what else the results depend on and a capture fixes, such as the precision.

        Returns:
            The network's results, copied: the next replay does not touch them.
        """
        if self._model is not model:
            own = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
            everywhere = _global_forward_hooks, _global_forward_pre_hooks
            self._model, self._hooks = model, tuple(chain(everywhere, *own))
        if any(self._hooks) or not self._works or torch.is_grad_enabled() or torch.jit.is_tracing():
            return network(images)
        weights = next(model.parameters()).data_ptr()
        full_key = (tuple(images.shape), images.dtype, images.device, weights, key)
        with self._lock:
            if full_key in self._graphs or self._add(full_key, network, images):
                self._graphs.move_to_end(full_key)
                return self._graphs[full_key](images)
        return network(images)

    def __deepcopy__(self, memo: dict) -> CudaGraphs:
        return CudaGraphs(self._most)

    def __reduce__(self) -> tuple:
        return CudaGraphs, (self._most,)

    def __len__(self) -> int:
        return len(self._graphs)

    def _add(self, key: Hashable, network: Network, images: Tensor) -> bool:
        """Captures what comes again; what cannot be captured runs without from then on."""
        self._calls[hash(key)] += 1
        if self._calls[hash(key)] <= CALLS_BEFORE or not self._works:
            return False
        try:
            if images.device not in self._memory:
                self._memory[images.device] = GraphMemory(images.device)
            self._graphs[key] = capture(network, images, self._memory[images.device])
        except RuntimeError as error:
            self._works = False
            self._graphs.clear()
            logger.warning(
                "The network cannot be a CUDA graph (%s) and runs kernel by kernel, slower; "
                "MODEL.MASK_DINO.TEST.CUDA_GRAPHS False leaves out the attempt.",
                str(error).partition("\n")[0],
            )
            return False
        while len(self._graphs) > self._most:
            forgotten, _ = self._graphs.popitem(last=False)
            del self._calls[hash(forgotten)]  # else each call of a rare shape would be a capture
        return True


def capture(network: Network, images: Tensor, memory: GraphMemory) -> Network:
    """Captures a network as a CUDA graph.

    Args:
        network: see `CudaGraphs.__call__`.
        images: an input of the shape to capture.
        memory: of the graph and others.

    Returns:
        A function that replays the graph on other images of this shape, and copies the results.

    Raises:
        RuntimeError: something in the network waits for the GPU, or cannot be captured.
    """
    # What a graph keeps is of use outside of inference mode too.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.cuda.device(images.device),
        holding_constants() as constants,
    ):
        held = images.clone()
        with memory.rehearsed():
            network(held)
        # Weights that autocast converted before are not the graph's own, nor its own others'.
        torch.clear_autocast_cache()
        try:
            with memory.captured() as graph:
                predictions, pixel_embedding = network(held)
        finally:
            torch.clear_autocast_cache()

    def replay(images: Tensor, _kept: object = constants) -> Results:
        with memory.turn():
            held.copy_(images)
            graph.replay()
            embedding = None if pixel_embedding is None else pixel_embedding.clone()
            return predictions.map(torch.clone), embedding

    return replay
