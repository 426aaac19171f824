"""Random numbers inside a graph, and dropout that uses them.

t + h uniform numbers are drawn, and the fractional part of their outer product stands for t * h draws. MindSpore's own
Dropout on the CPU draws in several threads and chooses their number by timing its first calls, so that two runs of one
seed differ after a few steps; it is four times slower, too.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.ops import portable


class Draws(nn.Cell):
    """Uniform numbers in [0, 1), [t, h] for x [t, h].

    Every call draws new ones. In a training loop, whose runs must be resumable, they ``follow`` a table instead, which
    the loop fills for every micro-batch.

    used: False where nobody will ask for numbers. Seeds are constants of a graph: it has none where it does not draw.
    """

    def __init__(self, used: bool = True):
        super().__init__()
        # from NumPy's stream, which mindspore.set_seed sets; in any case, since others draw after us
        self._seeds = tuple(int(seed) for seed in np.random.randint(1, 2**31 - 1, 2))
        if used:
            self._draw_anew()
        self.uniform = portable.OuterUniform()
        self.followed = False
        self.split = 0
        self.first = 0  # index of the first column, where a process has a part of the layer's

    def _draw_anew(self) -> None:
        self.rows, self.columns = (ops.UniformReal(seed, 1) for seed in self._seeds)
        self.rows.recompute(False)  # drawn once a step: a recomputed block must meet the same zeros
        self.columns.recompute(False)

    def follow(self, table: Parameter, number: int, split: int) -> None:
        """Takes its numbers from row ``number`` of ``table``: those of x's rows from the first column on, those of its
        columns from column ``split`` on."""
        if not self.followed:
            del self.rows, self.columns
        self.followed = True
        self.split = split
        # the number is a parameter, so that layers can share a graph
        self.number = Parameter(Tensor([number], ms.int32), f"draws.{number}", requires_grad=False)
        self.table = table

    def place(self) -> tuple[int, int]:
        """Its row in the table that it follows, and where in it the numbers of the columns begin."""
        return int(self.number.asnumpy()[0]), self.split + self.first

    def unfollow(self) -> None:
        """Stops following the table."""
        if self.followed:
            self.followed = False
            del self.table, self.number
            self._draw_anew()

    def numbers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The t + h numbers of which ``construct`` makes t * h: rows [t, 1] and columns [1, h]."""
        if self.followed:
            # a row of the table: numbers for most rows of x, then, from `split` on, those for its columns
            numbers = ops.gather(self.table, self.number, 0)[0]
            start = self.split + self.first
            return numbers[: x.shape[0]].reshape((-1, 1)), numbers[start : start + x.shape[1]].reshape((1, -1))
        return self.rows((x.shape[0], 1)), self.columns((1, x.shape[1]))

    def construct(self, x: Tensor) -> Tensor:
        rows, columns = self.numbers(x)
        return self.uniform(rows, columns)


class DropoutKernel(nn.Cell):
    """Zeroes each number of x [t, h] with ``probability`` and divides the others by what is left, in training.

    columns: h, of which a training loop makes room for as many numbers.
    """

    def __init__(self, probability: float, columns: int):
        super().__init__()
        self.probability = probability
        self.columns = columns
        self.draws = Draws(probability > 0)
        self.dropout = portable.Dropout(probability)

    def construct(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        rows, columns = self.draws.numbers(x)
        return self.dropout(x, rows, columns)


class DrawTable:
    """The numbers of all ``Draws`` of a model in training, as a function of seed, step and micro-batch.

    Args:
        draws: those that will follow the table.
        rows: most rows of x, in tokens.
        columns: most columns of x, all parts together.
    """

    def __init__(self, draws: list[Draws], rows: int, columns: int, seed: int):
        self.draws = draws
        self.seed = seed
        self.table = Parameter(Tensor(np.zeros((len(draws), rows + columns), np.float32)), "draws", requires_grad=False)
        for number, draw in enumerate(draws):
            draw.follow(self.table, number, rows)

    def fill(self, step: int, batch: int) -> None:
        """For micro-batch ``batch`` (of all ranks') of optimiser step ``step``."""
        rng = np.random.default_rng((self.seed, step, batch))
        self.table.set_data(Tensor.from_numpy(rng.random(self.table.shape, np.float32)))

    def close(self) -> None:
        """The draws stop following the table."""
        for draw in self.draws:
            draw.unfollow()
