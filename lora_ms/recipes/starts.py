"""What a run's model makes of some of its rows, for adapters that start from that."""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import mindspore as ms
import numpy as np
from numpy.typing import NDArray

from lora_ms.adapters.inject import install, target_layers
from lora_ms.adapters.methods.base import SeenRows
from lora_ms.data.loader import DataPlan, permutation
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import CausalLM
from lora_ms.nn.projection import DenseProjection, projection_of
from lora_ms.recipes.data import PreparedRows, held_out_plan
from lora_ms.runtime.device import Runtime
from lora_ms.train.layer_gradients import layer_gradients
from lora_ms.train.layer_inputs import layer_inputs
from lora_ms.train.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STARTING_ROWS = 128  # that a start of an adapter looks at, at most
STARTING_TOKENS = 16384  # label tokens of these, at most: what two layers take at each of them is in memory at once


def seen_rows(
    model: CausalLM,
    rows: PreparedRows,
    settings: TrainSettings,
    tokenizer: "PreTrainedTokenizerBase | None",
    runtime: Runtime,
) -> SeenRows:
    """Of the bare ``model`` and rows drawn by chance; the same on every process."""

    def plan(what: str) -> DataPlan:
        drawn = permutation(len(rows.store), settings.seed, 1 << 21)[:STARTING_ROWS]
        tokens = np.cumsum(rows.store.label_counts[drawn])
        chosen = np.sort(drawn[: max(1, int(np.searchsorted(tokens, STARTING_TOKENS, "right")))])
        if runtime.is_main:
            print(f"the adapter starts from {what} of {len(chosen)} rows", flush=True)
        alone = Runtime(runtime.device)
        return held_out_plan(rows.store.take(chosen), settings.batch_size, tokenizer, settings.seq_length, alone)

    def inputs() -> Iterable[tuple[tuple[str, ...], NDArray[np.float32]]]:
        return layer_inputs(model, plan("what the layers take at label tokens"))

    def gradients(names: Collection[str]) -> Iterable[tuple[str, NDArray[np.float32]]]:
        layers: dict[str, Any] = {name: target_layers(model)[name] for name in names}
        for name, layer in layers.items():
            if type(layer) is not DenseProjection:  # the head may be the embedding, and others are quantised
                raise LoraMsError(f"init_lora_weights lora_ga is for projections of layers with whole weights: {name}")
        wide = {name: layer.trainable() for name, layer in layers.items() if layer.weight_dtype != ms.float32}
        install(model, wide)
        try:
            yield from layer_gradients(model, plan("the gradient of the weights"), names)
        finally:
            install(model, {name: layers[name] for name in wide})

    def weight(name: str) -> NDArray[np.float32]:
        return projection_of(target_layers(model)[name], model.operators).numbers()

    return SeenRows(inputs, gradients, weight)
