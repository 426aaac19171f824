"""AdaLoRA on a dense layer, and what it adds to a step of the optimiser, on the optimiser's flat vectors."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer
from numpy.typing import NDArray

from lora_ms.adapters.methods.adalora import GUARD, AdaLoraConfig, Array, Mask, best, triplet_scores
from lora_ms.adapters.methods.base import Pair, Target
from lora_ms.adapters.methods.lora import LoraSpec
from lora_ms.adapters.methods.lora_cells import LoRADense
from lora_ms.errors import LoraMsError
from lora_ms.nn.flat_groups import FlatGroups
from lora_ms.nn.graph import Graph
from lora_ms.nn.layers import Embedding

if TYPE_CHECKING:
    from lora_ms.adapters.methods.base_cells import AdapterCell


class AdaLoRADense(LoRADense):
    """``y = x W^T + b + alpha / rank x (E A)^T B^T`` with a trained diagonal E.

    ``lora_e`` [rank, 1] starts at zero, A and B normal with deviation 0.02.
    """

    TITLE = "AdaLoRA"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"lora_a_init": Normal(0.02), "lora_b_init": Normal(0.02), **kwargs})
        self.lora_e = Parameter(initializer("zeros", (self.lora_rank, 1), ms.float32), name="lora_e")
        self.scaling.set_data(Tensor(self.lora_alpha / (self.lora_rank + GUARD), ms.float32))
        self.product = ops.MatMul()

    def tensors(self) -> dict[str, Parameter]:
        found = {"lora_A": self.lora_a, "lora_B": self.lora_b, "lora_E": self.lora_e}
        return {**found, "base_layer.bias": self.base.bias} if self.trains_bias else found

    def pair(self) -> Pair | None:
        a, b = self.factor_values()
        return Pair(a.copy(), b.copy(), self.scaling_value())

    def factors(self) -> tuple[Tensor, Tensor]:
        ones = ops.ones((1, self.base.in_channels), ms.float32)
        return self.lora_a * self.product(self.lora_e, ones), self.lora_b

    def factor_values(self) -> tuple[NDArray, NDArray]:
        return self.lora_a.asnumpy() * self.lora_e.asnumpy(), self.lora_b.asnumpy()


def build(config: AdaLoraConfig, target: Target, spec: LoraSpec) -> "AdapterCell":
    """See ``AdapterConfig.build``."""
    if type(target.layer) is Embedding:
        raise LoraMsError("AdaLoRA adapts dense layers and the head, not the embedding: leave it out of target_modules")
    return AdaLoRADense.from_dense(
        target.layer,
        spec.lora_rank,
        spec.lora_alpha,
        lora_dropout=config.lora_dropout,
        train_bias=config.bias != "none",
        operators=target.operators,
    )


class Span(NamedTuple):
    """Where a tensor lies in a flat vector."""

    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + int(np.prod(self.shape))

    def of(self, flat: NDArray[np.float32]) -> NDArray[np.float32]:
        return flat[self.start : self.stop].reshape(self.shape)


def merge_spans(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Start and end of the stretches of a vector that ``spans`` cover, in order."""
    stretches: list[tuple[int, int]] = []
    for span in sorted(spans):
        if stretches and stretches[-1][1] == span.start:
            stretches[-1] = (stretches[-1][0], span.stop)
        else:
            stretches.append((span.start, span.stop))
    return stretches


class Orthogonality(nn.Cell):
    """``weight`` times the mean distance, in Frobenius' norm, of every A A^T and B^T B from the identity.

    Parameters [n] -> (value [], its gradient [n]). Factors of one shape are multiplied together.

    Args:
        a, b: where the factors [rank, in] and [out, rank] lie in the vector.
        n: length of the vector.
    """

    name = "orthogonality"  # in metrics.jsonl

    def __init__(self, a: Sequence[Span], b: Sequence[Span], n: int, weight: float):
        super().__init__()
        groups: dict[tuple, list[int]] = {}
        for is_a, spans in ((True, a), (False, b)):
            for span in spans:
                groups.setdefault((is_a, span.shape), []).append(span.start)
        self.factor = weight / (len(a) + len(b))
        self.is_a = tuple(is_a for is_a, _ in groups)
        self.groups = FlatGroups([(shape, starts) for (_, shape), starts in groups.items()], n)
        ranks = [shape[0] if is_a else shape[1] for is_a, shape in groups]
        self.ones = tuple(
            Tensor(np.tile(np.eye(rank, dtype=np.float32), (len(starts), 1, 1)))
            for rank, starts in zip(ranks, groups.values(), strict=True)
        )
        self.product = ops.BatchMatMul()
        self.product_t = ops.BatchMatMul(transpose_b=True)
        self.t_product = ops.BatchMatMul(transpose_a=True)
        self.sum = ops.ReduceSum(keep_dims=True)

    def construct(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        total, grads = Tensor(0.0, ms.float32), []
        for i in range(len(self.groups.shapes)):
            x = self.groups.tensors(flat, i)
            off = (self.product_t(x, x) if self.is_a[i] else self.t_product(x, x)) - self.ones[i]  # [m, rank, rank]
            norms = ops.sqrt(self.sum(ops.square(off), (1, 2)))  # [m, 1, 1]
            total = total + norms.sum()
            off = off / ops.maximum(norms, Tensor(1e-12, ms.float32))
            grad = self.product(off, x) if self.is_a[i] else self.product(x, off)
            grads.append((2.0 * self.factor) * grad)
        return total * self.factor, self.groups.whole(grads)


class Importance(nn.Cell):
    """Smoothed ``|p grad|`` of A, B and E, and the smoothed distance from it; and which triplets are kept.

    Args:
        stretches: the parts of the optimiser's vectors that belong to A, B and E.
        triplets: ranks of all modules together.
        beta1, beta2: smoothing of the importance and of its spread.
    """

    def __init__(self, stretches: Sequence[tuple[int, int]], triplets: int, beta1: float, beta2: float):
        super().__init__()
        self.stretches, self.beta1, self.beta2 = tuple(stretches), beta1, beta2
        n = sum(stop - start for start, stop in stretches)
        self.importance = Parameter(ops.zeros(n, ms.float32), name="importance", requires_grad=False)
        self.spread = Parameter(ops.zeros(n, ms.float32), name="spread", requires_grad=False)
        self.kept = Parameter(ops.ones(triplets, ms.float32), name="kept", requires_grad=False)
        # 1 while importance is measured; 0 from the last cut on, whose own step does not count
        self.measuring = Parameter(Tensor(1.0, ms.float32), name="measuring", requires_grad=False)

    def state(self) -> dict[str, Parameter]:
        """What a checkpoint must hold."""
        return {
            "importance": self.importance,
            "spread": self.spread,
            "kept": self.kept,
            "measuring": self.measuring,
        }

    def pick(self, flat: Tensor) -> Tensor:
        return ops.concat([flat[s[0] : s[1]] for s in self.stretches])

    def construct(self, new: Tensor, grad: Tensor, taken: Tensor) -> Tensor:
        value, weight = ops.abs(self.pick(new) * self.pick(grad)), taken * self.measuring
        importance = self.importance + weight * (1.0 - self.beta1) * (value - self.importance)
        spread = self.spread + weight * (1.0 - self.beta2) * (ops.abs(value - importance) - self.spread)
        ops.assign(self.importance, importance)
        ops.assign(self.spread, spread)
        return weight


class Cut(Graph):
    """Sets E [rank, 1] of each module to zero where ``kept`` [triplets of all modules] is 0."""

    def __init__(self, es: Sequence[Parameter], kept: Parameter):
        super().__init__()
        self.es, self.kept = ms.ParameterTuple(es), kept
        self.shapes = tuple(tuple(e.shape) for e in es)

    def construct(self) -> Tensor:
        start = 0
        for i in range(len(self.shapes)):
            mask = self.kept[start : start + self.shapes[i][0]].reshape(self.shapes[i])
            ops.assign(self.es[i], self.es[i] * mask)
            start += self.shapes[i][0]
        return self.kept.sum()


class RankAllocator:
    """Shares out the ranks of the AdaLoRA layers of ``model`` while it trains (a ``train.hooks.StepHook``).

    An adapter whose ranks were shared out before, so that ``config.kept`` names them, keeps those.
    """

    def __init__(self, model: nn.Cell, config: AdaLoraConfig):
        self.schedule = config
        self.layers = {name: cell for name, cell in model.cells_and_names() if isinstance(cell, AdaLoRADense)}
        self.ends = list(accumulate(cell.lora_rank for cell in self.layers.values()))
        self.spans: list[tuple[Span, Span, Span]] = []  # of A, B and E of each layer in the optimiser's vectors

    def _locate(self, params: Sequence[Parameter]) -> None:
        """Finds A, B and E of each layer in a vector of all ``params``.

        Raises:
            LoraMsError: a factor is frozen.
        """
        starts = accumulate((p.size for p in params), initial=0)
        where = {id(p): Span(start, tuple(p.shape)) for p, start in zip(params, starts, strict=False)}
        self.spans = []
        for name, cell in self.layers.items():
            factors = (cell.lora_a, cell.lora_b, cell.lora_e)
            if not all(id(factor) in where for factor in factors):
                raise LoraMsError(f"AdaLoRA trains A, B and E of every module, and {name} is frozen in part")
            a, b, e = (where[id(factor)] for factor in factors)
            self.spans.append((a, b, e))

    def objectives(self, params: Sequence[Parameter]) -> list[nn.Cell]:
        """The terms that AdaLoRA adds to the loss, each a cell from the vector of ``params`` to the term's value and
        gradient, with a ``name``."""
        self._locate(params)
        if not self.schedule.orth_reg_weight:
            return []
        a, b, _ = zip(*self.spans, strict=True)
        return [Orthogonality(a, b, sum(p.size for p in params), self.schedule.orth_reg_weight)]

    def observer(self, params: Sequence[Parameter]) -> nn.Cell:
        """What sees each step of the optimiser."""
        self._locate(params)
        stretches = merge_spans([span for spans in self.spans for span in spans])
        self.importance = Importance(stretches, self.ends[-1], self.schedule.beta1, self.schedule.beta2)
        if self.schedule.kept:
            self.importance.kept.set_data(Tensor(self._flat(self.schedule.kept)))
        self.cut = Cut([cell.lora_e for cell in self.layers.values()], self.importance.kept)
        return self.importance

    def after_step(self, step: int) -> None:
        """Cuts where the schedule says so; waits for the step then."""
        if self.schedule.kept:
            self.cut()
            return
        is_cut, last = self.schedule.is_cut(step), self.schedule.last_cut
        if is_cut:
            kept = best(self.scores(), self.schedule.budget(len(self.layers), step))
            self.importance.kept.set_data(Tensor(kept.astype(np.float32)))
        if is_cut or step > last:
            self.cut()
        if step == last - 1:
            self.importance.measuring.set_data(Tensor(0.0, ms.float32))

    def scores(self) -> Array:
        """The score of every triplet, module by module."""
        wide = np.zeros(max(span.stop for spans in self.spans for span in spans), np.float32)
        score = self.importance.importance.asnumpy() * self.importance.spread.asnumpy()
        start = 0
        for first, last in self.importance.stretches:
            wide[first:last] = score[start : start + last - first]
            start += last - first
        return np.concatenate([triplet_scores(*(span.of(wide) for span in spans)) for spans in self.spans])

    def _flat(self, kept: Mapping[str, tuple[bool, ...]]) -> Array:
        full = {name: kept.get(name, (True,) * cell.lora_rank) for name, cell in self.layers.items()}
        return np.concatenate([np.array(mask, np.float32) for mask in full.values()])

    def kept(self) -> dict[str, Mask]:
        """Which triplets are left, by path."""
        masks = np.split(self.importance.kept.asnumpy() > 0, self.ends[:-1])
        return dict(zip(self.layers, masks, strict=True))

    def config(self) -> AdaLoraConfig:
        """The settings with what is kept: nothing is left out before E is zero wherever it would be."""
        kept = self.kept()
        idle = all(not self.layers[name].lora_e.asnumpy()[~mask].any() for name, mask in kept.items())
        if not idle or all(mask.all() for mask in kept.values()):
            return replace(self.schedule, kept={})
        return replace(self.schedule, kept={name: tuple(mask.tolist()) for name, mask in kept.items()})

    def describe(self) -> str:
        """What will become of the ranks, in one line."""
        s = self.schedule
        if s.kept:
            return "AdaLoRA: the ranks stay as they were shared out before"
        return (
            f"AdaLoRA: rank {s.lora_rank} falls to {s.target_rank} on average from step {(s.tinit or 0) + 2} on (tinit "
            f"{s.tinit}) to step {s.last_cut + 1} (tfinal {s.tfinal}) of {s.total_steps}, every {s.delta_t} steps"
        )

    def summary(self) -> str:
        """What became of the ranks, in one line."""
        ranks = [int(mask.sum()) for mask in self.kept().values()]
        return f"ranks: {min(ranks)} to {max(ranks)}, {sum(ranks) / len(ranks):.2f} on average, {sum(ranks)} in all"
