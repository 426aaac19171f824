"""What a request's answer is where it cannot be given."""

from http import HTTPStatus
from typing import Any


class ApiError(Exception):
    """An answer with a status of 4xx or 5xx.

    Args:
        param: the key of the request that is wrong.
        headers: further ones of the answer.
    """

    def __init__(self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """As the ``openai`` package and vLLM have it."""
        kind = HTTPStatus(self.status).phrase.title().replace(" ", "").replace("-", "").removesuffix("Error") + "Error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}
