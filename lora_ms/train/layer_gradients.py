"""The gradient of some rows' loss by the weights of a model's projections: for starts of adapters that look at it."""

from collections.abc import Collection, Iterator

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from numpy.typing import NDArray

from lora_ms.data.loader import DataPlan
from lora_ms.errors import LoraMsError
from lora_ms.train.fisher import FLOAT16_SCALE, GradientSum
from lora_ms.train.gradient import MicroStep
from lora_ms.train.parts import SummedLoss


def layer_gradients(
    model: nn.Cell, plan: DataPlan, names: Collection[str]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Paths of the projections ``names``, whose weights are float32, and the gradient of the mean loss of all label
    tokens by each of these [out, in].

    The bare ``model`` is left with all parameters frozen, and as ``set_train(False)``. Takes the memory of these
    gradients, and of the activations.

    plan: one pass over the rows.

    Raises:
        LoraMsError: a loss that is not finite.
    """
    cells = dict(model.cells_and_names())
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    for name in names:
        cells[name].weight.requires_grad = True
    weights = {path: p for path, p in model.parameters_and_names() if p.requires_grad}  # in the model's order
    model.set_train(False)
    scale = FLOAT16_SCALE if model.dtype == ms.float16 else 1.0
    gradient = GradientSum(list(weights.values()), scale)
    micro_step = MicroStep(SummedLoss(model, model.config.vocab_size), gradient)
    tokens = 0
    for step in range(plan.steps_per_epoch):
        batches, label_tokens = plan.step(step)
        for batch in batches:
            inputs = tuple(map(Tensor, batch[:4]))
            micro_step.prepare(*inputs)
            loss = float(micro_step(*inputs).asnumpy())
            if not np.isfinite(loss):
                raise LoraMsError(f"{plan.where(int(plan.step_rows(step)[0]))} or a row near it has the loss {loss}")
        tokens += label_tokens
    for parameter in weights.values():
        parameter.requires_grad = False
    values = gradient.grad.asnumpy()
    values /= np.float32(tokens * scale)
    ends = np.cumsum([p.size for p in weights.values()])[:-1]
    for (path, parameter), piece in zip(weights.items(), np.split(values, ends), strict=True):
        yield path.removesuffix(".weight"), piece.reshape(parameter.shape)
