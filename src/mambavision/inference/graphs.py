"""CUDA graphs: a network's launches recorded once for a shape and replayed as one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambavision.ops.launch import precompiling

MAX_GRAPHS = 8  # shapes; the one used longest ago makes room for a new one
# Recording takes as long as tens of passes, which a shape that does not come again is not worth. At which of its calls
# one is recorded: where there is room, and where another must make room.
RECORDED_AT, REPLACING_AT = 2, 10
MAX_REMEMBERED = 256  # shapes whose calls are counted


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    input: Tensor
    output: Any  # a tensor or a list of them, overwritten by each replay


class GraphRunner:
    """Runs a function of one CUDA tensor through a graph for each shape that comes more than once.

    What a graph computes comes back as a copy, in the type of x: it stays what it is when the next one is computed.
    Graphs share one pool of memory. A copy of a runner, by `copy` or `pickle`, has no graphs yet. Threads take turns,
    and must use one CUDA stream.

    Args:
        dtype: of the tensor that the function sees; what comes is cast.
        memory_format: likewise; with `torch.preserve_format`, channels-last where x is, else contiguous.
    """

    def __init__(self, *, dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        self.dtype = dtype
        self.memory_format = memory_format
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._calls: OrderedDict[Hashable, int] = OrderedDict()  # of shapes that have no graph
        self._pool: Any = None
        self._turn = threading.RLock()

    def run(self, function: Callable[[Tensor], Any], x: Tensor) -> Any:
        """What `function`, always the same, makes of x: a tensor or a list of tensors."""
        key = (tuple(x.shape), self._layout(x), x.device)
        with self._turn:
            recorded = self._recorded.get(key)
            if recorded is None:
                calls = self._count(key)
                full = len(self._recorded) >= MAX_GRAPHS
                if calls < (REPLACING_AT if full else RECORDED_AT):
                    return self._run_once(function, x, new=calls == 1)
                if full:
                    self._recorded.popitem(last=False)
                del self._calls[key]
                recorded = self._recorded[key] = self._record(function, x)
            self._recorded.move_to_end(key)
            recorded.input.copy_(x)
            recorded.graph.replay()
            output = recorded.output
            if isinstance(output, Tensor):
                return output.to(x.dtype, copy=True)
            return [tensor.to(x.dtype, copy=True) for tensor in output]

    def clear(self) -> None:
        """Forget all graphs, as after a change of the weights."""
        with self._turn:
            self._recorded.clear()
            self._calls.clear()
            self._pool = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty_runner, (self.dtype, self.memory_format)

    def _layout(self, x: Tensor) -> torch.memory_format:
        """In which the function sees x."""
        if self.memory_format != torch.preserve_format:
            return self.memory_format
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return torch.channels_last if channels_last else torch.contiguous_format

    def _count(self, key: Hashable) -> int:
        """How often a shape without a graph has come, this call included."""
        self._calls[key] = self._calls.pop(key, 0) + 1  # behind all others
        if len(self._calls) > MAX_REMEMBERED:
            self._calls.popitem(last=False)
        return self._calls[key]

    def _run_once(self, function: Callable[[Tensor], Any], x: Tensor, *, new: bool) -> Any:
        with torch.cuda.device(x.device), torch.no_grad():
            x = x.to(dtype=self.dtype, memory_format=self._layout(x))
            if new:
                with precompiling():
                    function(x)
            return function(x)

    def _record(self, function: Callable[[Tensor], Any], x: Tensor) -> _Recorded:
        # Not under inference_mode, whose tensors could not be written to outside of it.
        with torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
            static = torch.empty(x.shape, dtype=self.dtype, device=x.device, memory_format=self._layout(x))
            static.copy_(x)
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):  # libraries choose and take their work space
                    function(static)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                output = function(static)
            self._pool = graph.pool()
        return _Recorded(graph, static, output)


def _empty_runner(dtype: torch.dtype, memory_format: torch.memory_format) -> GraphRunner:
    return GraphRunner(dtype=dtype, memory_format=memory_format)
