"""``evaluation.sets``: rows that a run is scored on before, during and after it."""

from dataclasses import dataclass, replace

from lora_ms.config import RunConfig
from lora_ms.data.choices import read_choices, tokens_of
from lora_ms.data.pipeline import Preparation, check_vocabulary
from lora_ms.data.store import TokenStore
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import CausalLM
from lora_ms.recipes import data
from lora_ms.runtime.device import Runtime
from lora_ms.train.forgetting import CHOICE, LOSS, ScoredSet, SetScorer


@dataclass(frozen=True)
class ReadSet:
    """An entry of ``evaluation.sets``, its rows as tokens."""

    metric: str
    store: TokenStore
    choices: tuple[int, ...] = ()
    right: tuple[int, ...] = ()
    lines: tuple[str, ...] = ()  # what became of the rows, for people


def read_sets(config: RunConfig, tokenizer, preparation: Preparation) -> dict[str, ReadSet]:
    """The rows of every set.

    Raises:
        LoraMsError: anything that a user can fix.
    """
    found = {}
    for name, keys in config.evaluation.sets.items():
        try:
            if keys.metric == CHOICE:
                if tokenizer is None:
                    raise LoraMsError("metric choice needs a tokenizer, and load_checkpoint has none")
                questions = read_choices(keys.dataset_dir, keys.num_samples)
                rows, choices = tokens_of(tokenizer, questions, preparation.seq_length)
                store = TokenStore.of(rows)
                if preparation.vocab_size is not None:
                    check_vocabulary(store, preparation.vocab_size)
                found[name] = ReadSet(CHOICE, store, tuple(choices), tuple(row.answer for row in questions))
            else:
                own = data.preparation_of(config, config.eval_dataset, preparation.seq_length, preparation.vocab_size)
                own = replace(own, num_samples=keys.num_samples)
                dataset = config.eval_dataset.model_copy(update={"mix": []})
                prepared = data.rows_of(dataset, [keys.dataset_dir], tokenizer, own)
                lines = [line for report in prepared.reports for line in report.lines()]
                lines[0] = lines[0].replace("data:", f"evaluation.sets.{name}:", 1)
                found[name] = ReadSet(keys.metric, prepared.store, lines=tuple(lines))
        except LoraMsError as error:
            raise LoraMsError(f"evaluation.sets.{name}: {error}") from None
    return found


def scorer_of(
    config: RunConfig, model: CausalLM, sets: dict[str, ReadSet], tokenizer, seq_length: int, runtime: Runtime
) -> SetScorer:
    """What scores the sets."""
    planned = {}
    for name, one in sets.items():
        packed = one.metric == LOSS
        rows = config.eval_batch_size if packed else 1
        lead = model.leading_ids
        plan = data.held_out_plan(one.store, rows, tokenizer, seq_length, runtime, packing=packed, lead=lead)
        planned[name] = ScoredSet(one.metric, plan, one.choices, one.right)
    return SetScorer(model, planned, runtime, model.config.vocab_size)
