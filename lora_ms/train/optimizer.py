"""Learning-rate schedules, and AdamW on one flat vector."""

import math
from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from lora_ms.nn.parallel import WHOLE, Shard, split_axis
from lora_ms.ops import PORTABLE, Operators

HIGHEST_SCALE = 2.0**24  # that the loss scale grows to: on the CPU gradients are float32, and no overflow ends it


def learning_rate(
    step: int, total_steps: int, peak: float, kind: str = "cosine", warmup_steps: int = 0, end: float = 0.0
) -> float:
    """Learning rate of optimiser step ``step`` (from 0), as transformers' schedules have it.

    Rises linearly from 0 over ``warmup_steps``; then stays (``constant``) or falls from ``peak`` to ``end`` by
    ``total_steps``, linearly or along half a cosine.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if kind == "constant":
        return peak
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return end + (peak - end) * (1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done)))


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


class FlatAdamW(nn.Cell):
    """AdamW (Loshchilov and Hutter, 2019) with clipping by global norm, over all trainable parameters at once.

    Gradients, both moments and the update are vectors of n numbers, one slice a parameter: a few operators instead
    of a few hundred, and one ``AllReduce``. A step whose gradient is not finite changes nothing but the loss scale.

    Args:
        params: trainable parameters, float32.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``; tensors of fewer than two dimensions are not decayed.
        max_grad_norm: norm above which gradients are scaled down; None for never.
        loss_scale: factor on the loss, which is taken out of the gradient again; 1 in float32.
        dynamic_scale: whether it falls at an overflow and grows without.
        scale_window: steps without overflow after which the loss scale grows.
        scale_factor: what it is then multiplied by, and divided by after an overflow.
        all_reduce: sums a vector over the ranks that see other rows; None for one rank.
        rate_factors: what the learning rate of each parameter is multiplied by; None for 1.
        decays: weight decay of each parameter; None for ``weight_decay``.
        penalty: parameters [n] -> (penalty [], its gradient [n]), added to the mean loss of a step; None for none.
        observer: sees what a step did, (new parameters [n], gradient [n] as used, 1 or 0: taken or not []); its
            ``state()`` is kept with the optimiser's. None for none.
        shard: with which ranks the layers are shared. The gradient of a parameter that is whole on each of them is
            then summed over them, and the norm is that of the whole gradient.
        swap: whether a card keeps the moments in its host's memory and loads them for each step, as MindFormers'
            AdamW does (``Parameter(device="CPU")``; not tried on one). On the CPU it changes nothing.
        operators: what the step computes with.
    """

    def __init__(
        self,
        params: list[Parameter],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 1.0,
        loss_scale: float = 1.0,
        dynamic_scale: bool = False,
        scale_window: int = 1000,
        scale_factor: float = 2.0,
        all_reduce: nn.Cell | None = None,
        rate_factors: Sequence[float] | None = None,
        decays: Sequence[float] | None = None,
        penalty: nn.Cell | None = None,
        observer: nn.Cell | None = None,
        shard: Shard = WHOLE,
        swap: bool = False,
        operators: Operators = PORTABLE,
    ):
        super().__init__()
        self.params = ms.ParameterTuple(params)
        self.sizes = tuple(p.size for p in params)
        n = sum(self.sizes)
        self.starts = (0, *np.cumsum(self.sizes).tolist()[:-1])
        self.flatten, self.map = Flatten(), ops.HyperMap()
        self.adamw, self.max_grad_norm = operators.adamw(*betas, eps), max_grad_norm
        self.dynamic, self.scale_window, self.scale_factor = dynamic_scale, scale_window, scale_factor
        self.all_reduce, self.penalty, self.observer = all_reduce, penalty, observer
        self.grad = Parameter(ops.zeros(n, ms.float32), name="grad", requires_grad=False)
        self.exp_avg, self.exp_avg_sq = (
            Parameter(ops.zeros(n, ms.float32), name=name, requires_grad=False, device="CPU" if swap else None)
            for name in ("exp_avg", "exp_avg_sq")
        )
        self.count = Parameter(Tensor(0.0, ms.float32), name="count", requires_grad=False)
        self.loss_scale = Parameter(Tensor(loss_scale, ms.float32), name="loss_scale", requires_grad=False)
        self.good_steps = Parameter(Tensor(0.0, ms.float32), name="good_steps", requires_grad=False)
        # vectors only where parameters differ
        self.shard = shard
        self.common = spread_out([float(split_axis(p.name) is None) for p in params], self.sizes)  # 1: on every rank
        self.shard_sum = ops.AllReduce(group=shard.group) if shard.count > 1 else None
        self.rates = spread_out(rate_factors or [1.0], self.sizes)
        decays = decays or [weight_decay] * len(params)
        decays = [decay * (p.ndim >= 2) for decay, p in zip(decays, params, strict=True)]
        self.decay = spread_out(decays, self.sizes)

    def state(self) -> dict[str, Parameter]:
        """What a checkpoint must hold for the next step to be the same."""
        return {
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "count": self.count,
            "loss_scale": self.loss_scale,
            "good_steps": self.good_steps,
            **({} if self.observer is None else self.observer.state()),
        }

    def whole_state(self) -> dict[str, NDArray]:
        """The values of ``state()``, as one rank would have them; all ranks of ``shard`` must call it."""
        state = {name: parameter.asnumpy() for name, parameter in self.state().items()}
        for moment in ("exp_avg", "exp_avg_sq"):
            pieces = np.split(state[moment], np.cumsum(self.sizes)[:-1])
            named = {p.name: piece.reshape(p.shape) for p, piece in zip(self.params, pieces, strict=True)}
            state[moment] = np.concatenate([whole.ravel() for whole in self.shard.gather(named).values()])
        return state

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Takes the values of ``whole_state()``, of this or another number of ranks."""
        shapes = {p.name: self.shard.whole_shape(p.name, tuple(p.shape)) for p in self.params}
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
        for name, parameter in self.state().items():
            value = state[name].reshape(-1)
            if name in ("exp_avg", "exp_avg_sq"):
                pieces = zip(shapes.items(), np.split(value, ends), strict=True)
                parts = [self.shard.part(path, piece.reshape(shape)) for (path, shape), piece in pieces]
                value = np.concatenate([part.ravel() for part in parts])
            parameter.set_data(Tensor.from_numpy(value.reshape(parameter.shape)))

    def whole(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """grad [n], of a rank -> (grad [n] with the sum over ``shard`` of what all have, its squared norm [])."""
        if self.shard_sum is None:
            return grad, ops.reduce_sum(grad * grad)
        mine = grad * self.common
        grad = grad - mine + self.shard_sum(mine)
        square = grad * grad
        apart = square * (1.0 - self.common)
        return grad, ops.reduce_sum(square - apart) + self.shard_sum(ops.reduce_sum(apart).reshape((1,)))[0]

    def construct(self, lr: Tensor, label_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One step from the summed gradients in ``grad``, which is then emptied.

        lr [], label_tokens [] (of all ranks) -> (gradient norm before clipping [], whether it was finite []).
        """
        grad = self.grad if self.all_reduce is None else self.all_reduce(self.grad)
        old = self.flatten(self.params)
        if self.dynamic:  # in two steps: the product of a high scale and the tokens may be infinite
            grad = grad * (1.0 / self.loss_scale) * (1.0 / label_tokens)
        else:
            grad = grad * (1.0 / (self.loss_scale * label_tokens))
        if self.penalty is not None:
            grad = grad + self.penalty(old)[1]
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
        new, exp_avg, exp_avg_sq = self.adamw(
            old,
            grad,
            self.exp_avg,
            self.exp_avg_sq,
            scale=scale,
            taken=taken,
            count=steps,
            rate=taken * lr * self.rates,
            decay=self.decay,
        )
        self.map(ops.partial(_put, new), self.params, self.starts, self.sizes)
        ops.assign(self.exp_avg, exp_avg)
        ops.assign(self.exp_avg_sq, exp_avg_sq)
        ops.assign(self.count, count)
        ops.assign(self.grad, ops.zeros_like(grad))
        if self.observer is not None:
            self.observer(new, self.adamw.used(grad, scale), taken)
        if self.dynamic:
            good = (self.good_steps + 1.0) * taken
            full = (good >= self.scale_window).astype(ms.float32)
            grown = self.loss_scale * (1.0 + full * (self.scale_factor - 1.0))
            grown = ops.minimum(grown, ops.maximum(self.loss_scale, HIGHEST_SCALE))
            lowered = self.loss_scale / self.scale_factor
            ops.assign(self.loss_scale, ops.maximum(taken * grown + (1.0 - taken) * lowered, 1.0))
            ops.assign(self.good_steps, good * (1.0 - full))
        return norm, finite
