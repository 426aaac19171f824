"""AdamW on one flat vector."""

import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.errors import LoraMsError
from lora_ms.nn.flat_parameters import FlatParameters
from lora_ms.nn.graph import Graph
from lora_ms.nn.parallel import WHOLE, Shard, split_axis
from lora_ms.ops import PORTABLE, Operators
from lora_ms.text import size_text
from lora_ms.train.objectives import Objectives

HIGHEST_SCALE = 2.0**24  # that the loss scale grows to: on the CPU gradients are float32, and no overflow ends it


def spread_out(values: Sequence[float], sizes: Sequence[int]) -> Tensor:
    """One value a parameter as a vector [n] of one a number; [] where all are equal."""
    if len(set(values)) == 1:
        return Tensor(values[0], ms.float32)
    return Tensor(np.repeat(np.array(values, np.float32), sizes))


# A HyperMap is unrolled by the compiler itself. A loop that appends to a tuple or a list makes n^2 nodes for n tensors:
# 26 seconds and 1.0 GB to compile an optimiser of 224 parameters, where this takes 4 seconds and 0.2 GB.
_reshape, _slice, _assign = ops.Reshape(), ops.Slice(), ops.Assign()
_flat = ops.MultitypeFuncGraph("flat")
_put = ops.MultitypeFuncGraph("put")


@_flat.register("Tensor")
def _flat_tensor(tensor: Tensor) -> Tensor:
    return _reshape(tensor, (-1,)).astype(ms.float32)


@_put.register("Tensor", "Tensor", "Number", "Number")
def _put_tensor(vector: Tensor, parameter: Parameter, start: int, size: int) -> Tensor:
    return _assign(parameter, _reshape(_slice(vector, (start,), (size,)), parameter.shape))


class Flatten(nn.Cell):
    """Tensors -> their numbers, one after another, float32 [n]."""

    def __init__(self):
        super().__init__()
        self.map, self.concat = ops.HyperMap(), ops.Concat(0)

    def construct(self, tensors: tuple) -> Tensor:
        return self.concat(self.map(_flat, tensors))


@dataclass(frozen=True)
class LossScaling:
    """How the loss is scaled where a model computes in float16, so that small gradients do not become zero."""

    initial: float = 65536.0  # factor on the loss, which is taken out of the gradient again
    dynamic: bool = True  # it falls at an overflow and grows without
    window: int = 1000  # steps without overflow after which it grows
    factor: float = 2.0  # what it is then multiplied by, and divided by after an overflow


def page(parameter: Parameter, folder: Path) -> NDArray:
    """Moves a parameter's numbers into a file, which nothing else sees and which goes with the process; returns them.

    Raises:
        LoraMsError: the disk has no room.
    """
    values = parameter.asnumpy()
    try:
        with TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, values.nbytes)
            memory = np.frombuffer(mmap.mmap(file.fileno(), values.nbytes), values.dtype)
    except OSError as error:
        raise LoraMsError(
            f"{folder}: {size_text(values.nbytes)} for the optimiser's state cannot be had ({error.strerror})"
        ) from None
    memory[...] = values
    parameter.assign_value(Tensor.from_numpy(memory))
    return memory


class FlatAdamW(Graph):
    """AdamW (Loshchilov and Hutter, 2019) with clipping by global norm, over all trainable parameters at once.

    Gradients, both moments and the update are vectors of n numbers, one slice a parameter: a few operators instead
    of a few hundred, and one ``AllReduce``. Where memory can be lent, the parameters are parts of such a vector, so
    that the graph does not grow with their number; else they are copied into one, and back. A step whose gradient is
    not finite changes nothing but the loss scale.

    Args:
        params: trainable parameters, float32.
        betas, eps: as in ``torch.optim.AdamW``.
        weight_decay: of all parameters, or of each; those of fewer than two dimensions are not decayed.
        rate_factors: what the learning rate of each parameter is multiplied by; None for 1.
        max_grad_norm: norm above which gradients are scaled down; None for never.
        loss_scaling: None for a model that computes in float32, whose loss is not scaled.
        objectives: extra terms of the loss, added to the mean loss of a step (see ``train.objectives``).
        observers: cells that are shown what a step did (see ``train.hooks.Observer``).
        all_reduce: sums a vector over the ranks that see other rows; None for one rank.
        shard: with which ranks the layers are shared. The gradient of a parameter that is whole on each of them is
            then summed over them, and the norm is that of the whole gradient.
        eight_bits: whether the moments are kept in eight bits; not where layers are shared (``shard``).
        swap: whether a card keeps the moments in its host's memory and loads them for each step, as MindFormers'
            AdamW does (``Parameter(device="CPU")``; not tried on one). On the CPU it changes nothing.
        paged_in: a folder, in a file of which the moments lie, mapped: they may exceed the memory. Only where memory
            can be lent. None for memory.
        operators: what the step computes with.
    """

    title = "the optimiser"

    def __init__(
        self,
        params: Sequence[Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Sequence[float] = 0.0,
        rate_factors: Sequence[float] | None = None,
        max_grad_norm: float | None = 1.0,
        loss_scaling: LossScaling | None = None,
        objectives: Sequence[Any] = (),
        observers: Sequence[Any] = (),
        all_reduce: nn.Cell | None = None,
        shard: Shard = WHOLE,
        eight_bits: bool = False,
        swap: bool = False,
        paged_in: Path | None = None,
        operators: Operators = PORTABLE,
    ):
        super().__init__()
        self.params = ms.ParameterTuple(params)
        self.sizes = tuple(p.size for p in params)
        n = sum(self.sizes)
        self.starts = (0, *np.cumsum(self.sizes).tolist()[:-1])
        self.flatten = Flatten()
        self.map = ops.HyperMap()
        self.flat: FlatParameters | None = None
        self.is_flat = operators.lends_memory
        if self.is_flat:
            self.vector = Parameter(Tensor(np.zeros(1, np.float32)), name="parameters", requires_grad=False)
            self.flat = FlatParameters(params, self.vector)
        self.eight_bits = eight_bits
        self.adamw = (operators.adamw_8bit if eight_bits else operators.adamw)(*betas, eps)
        self.max_grad_norm = max_grad_norm
        self.all_reduce = all_reduce
        self.shard = shard
        self.shard_sum = ops.AllReduce(group=shard.group) if shard.count > 1 else None
        self.has_objectives = len(objectives) > 0
        self.objectives = Objectives(objectives)
        self.has_observers = len(observers) > 0
        self.observers = nn.CellList(list(observers))

        scaling = loss_scaling or LossScaling(initial=1.0, dynamic=False)
        self.dynamic = scaling.dynamic
        self.scale_window = scaling.window
        self.scale_factor = scaling.factor
        self.grad = Parameter(ops.zeros(n, ms.float32), name="grad", requires_grad=False)
        self.moments = ms.ParameterTuple(
            Parameter(Tensor(value), name=name, requires_grad=False, device="CPU" if swap else None)
            for name, value in self.adamw.state_of(n).items()
        )
        self.pages = {} if paged_in is None else {p.name: page(p, paged_in) for p in self.moments}
        self.count = Parameter(Tensor(0.0, ms.float32), name="count", requires_grad=False)
        self.loss_scale = Parameter(Tensor(scaling.initial, ms.float32), name="loss_scale", requires_grad=False)
        self.good_steps = Parameter(Tensor(0.0, ms.float32), name="good_steps", requires_grad=False)

        # vectors only where parameters differ
        self.common = spread_out([float(split_axis(p.name) is None) for p in params], self.sizes)  # 1: on every rank
        self.rates = spread_out(rate_factors or [1.0], self.sizes)
        decays = [weight_decay] * len(params) if isinstance(weight_decay, float | int) else weight_decay
        decays = [decay * (p.ndim >= 2) for decay, p in zip(decays, params, strict=True)]
        self.decay = spread_out(decays, self.sizes)

    def state(self) -> dict[str, Parameter]:
        """What a checkpoint must hold for the next step to be the same."""
        state = {moment.name: moment for moment in self.moments}
        state |= {
            "count": self.count,
            "loss_scale": self.loss_scale,
            "good_steps": self.good_steps,
        }
        for observer in self.observers:
            state |= observer.state()
        return state

    def whole_state(self) -> dict[str, NDArray]:
        """The values of ``state()``, as one rank would have them; all ranks of ``shard`` must call it."""
        state = {name: parameter.asnumpy() for name, parameter in self.state().items()} | self.pages
        for moment in self._gathered:
            pieces = np.split(state[moment], np.cumsum(self.sizes)[:-1])
            named = {p.name: piece.reshape(p.shape) for p, piece in zip(self.params, pieces, strict=True)}
            state[moment] = np.concatenate([whole.ravel() for whole in self.shard.gather(named).values()])
        return state

    def whole_sizes(self) -> dict[str, int]:
        """How many numbers each value of ``whole_state()`` has."""
        whole = sum(math.prod(self.shard.whole_shape(p.name, tuple(p.shape))) for p in self.params)
        sizes = {name: int(parameter.size) for name, parameter in self.state().items()}
        return sizes | dict.fromkeys(self._gathered, whole)

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Takes the values of ``whole_state()``, of this or another number of ranks."""
        shapes = {p.name: self.shard.whole_shape(p.name, tuple(p.shape)) for p in self.params}
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
        for name, parameter in self.state().items():
            value = state[name].reshape(-1)
            if name in self._gathered:
                pieces = zip(shapes.items(), np.split(value, ends), strict=True)
                parts = [self.shard.part(path, piece.reshape(shape)) for (path, shape), piece in pieces]
                value = np.concatenate([part.ravel() for part in parts])
            if name in self.pages:
                self.pages[name][...] = value
            else:
                parameter.set_data(Tensor.from_numpy(value.reshape(parameter.shape)))

    @property
    def _gathered(self) -> list[str]:
        """The vectors with one number for each of the parameters': of ranks that share layers, each has a part."""
        return [] if self.eight_bits else [moment.name for moment in self.moments]

    def whole(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """grad [n], of a rank -> (grad [n] with the sum over ``shard`` of what all have, its squared norm [])."""
        if self.shard_sum is None:
            return grad, ops.reduce_sum(grad * grad)
        mine = grad * self.common
        grad = grad - mine + self.shard_sum(mine)
        square = grad * grad
        apart = square * (1.0 - self.common)
        return grad, ops.reduce_sum(square - apart) + self.shard_sum(ops.reduce_sum(apart).reshape((1,)))[0]

    def __call__(self, lr: Tensor, label_tokens: Tensor) -> tuple[Tensor, ...]:
        if self.flat is not None:
            self.flat.gather()
        return super().__call__(lr, label_tokens)

    def construct(self, lr: Tensor, label_tokens: Tensor) -> tuple[Tensor, ...]:
        """One step from the summed gradients in ``grad``, which is then emptied.

        lr [], label_tokens [] (of all ranks) -> (gradient norm before clipping [], whether it was finite [], the value
        [] of each extra term of the loss, before the step …).
        """
        old = self.vector if self.is_flat else self.flatten(self.params)
        grad, terms = self.mean_gradient(old, label_tokens)
        grad, square = self.whole(grad)
        norm = ops.sqrt(square)
        finite = ops.isfinite(norm)
        taken = finite.astype(ms.float32)  # 0: this step changes no parameter and no moment
        scale = Tensor(1.0, ms.float32)
        if self.max_grad_norm is not None:
            clip = ops.minimum(self.max_grad_norm / (norm + 1e-6), scale)
            scale = ops.select(finite, clip, ops.zeros_like(clip))
        count = self.count + taken
        steps = ops.maximum(count, Tensor(1.0, ms.float32))
        new = self.adamw(
            old,
            grad,
            self.moments,
            scale=scale,
            taken=taken,
            count=steps,
            rate=taken * lr * self.rates,
            decay=self.decay,
        )
        if self.is_flat:
            # the terms are computed from the old numbers, which lie where the new ones are put
            ops.assign(self.vector, ops.depend(new, terms) if self.has_objectives else new)
        else:
            self.map(ops.partial(_put, new), self.params, self.starts, self.sizes)
        ops.assign(self.count, count)
        # zeros that the compiler does not know: it would keep n of them as a constant
        ops.assign(self.grad, ops.broadcast_to(ops.minimum(taken, 0.0), grad.shape))
        if self.has_observers:
            used = self.adamw.used(grad, scale)
            for observer in self.observers:
                observer(new, used, taken)
        if self.dynamic:
            self.adjust_loss_scale(taken)
        return (norm, finite) + terms

    def mean_gradient(self, parameters: Tensor, label_tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(gradient of the mean loss with its extra terms [n], the value [] of each term …)."""
        grad = self.grad if self.all_reduce is None else self.all_reduce(self.grad)
        if self.dynamic:  # in two steps: the product of a high scale and the tokens may be infinite
            grad = grad * (1.0 / self.loss_scale) * (1.0 / label_tokens)
        else:
            grad = grad * (1.0 / (self.loss_scale * label_tokens))
        if not self.has_objectives:
            return grad, ()
        found = self.objectives(parameters, grad)
        return found[0], found[1:]

    def adjust_loss_scale(self, taken: Tensor) -> None:
        """After a step; taken []: 1, or 0 where it overflowed."""
        good = (self.good_steps + 1.0) * taken
        full = (good >= self.scale_window).astype(ms.float32)
        grown = self.loss_scale * (1.0 + full * (self.scale_factor - 1.0))
        grown = ops.minimum(grown, ops.maximum(self.loss_scale, HIGHEST_SCALE))
        lowered = self.loss_scale / self.scale_factor
        ops.assign(self.loss_scale, ops.maximum(taken * grown + (1.0 - taken) * lowered, 1.0))
        ops.assign(self.good_steps, good * (1.0 - full))
