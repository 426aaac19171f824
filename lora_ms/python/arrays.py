"""A tokenizer that gives NumPy arrays where a script asks for another library's tensors."""

from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase


class ArrayEncoding(BatchEncoding):
    """What a tokenizer gives; there is no other device to bring it to."""

    def to(self, device: Any = None, *, non_blocking: bool = False) -> "ArrayEncoding":
        """Itself."""
        return self


class _Arrays:
    """The methods of a tokenizer that know the kinds of tensors."""

    def __call__(self, *args: Any, **options: Any) -> ArrayEncoding:
        return _encoded(super().__call__(*args, **_as_arrays(options)))  # type: ignore[misc]

    def pad(self, *args: Any, **options: Any) -> ArrayEncoding:
        return _encoded(super().pad(*args, **_as_arrays(options)))  # type: ignore[misc]

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        found = super().apply_chat_template(*args, **_as_arrays(options))  # type: ignore[misc]
        return _encoded(found) if isinstance(found, BatchEncoding) else found


def _as_arrays(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "return_tensors": "np"} if options.get("return_tensors") is not None else options


def _encoded(found: BatchEncoding) -> ArrayEncoding:
    return ArrayEncoding(found.data, found.encodings)


def _kind(kind: type) -> type:
    return type(kind.__name__, (_Arrays, kind), {"__module__": kind.__module__})  # by its name it is saved


def with_arrays(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, which gives NumPy arrays."""
    tokenizer.__class__ = _kind(type(tokenizer))
    return tokenizer
