"""What one request may cost, and how it is refused. It knows neither server nor model."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """Bounds of a server. What exceeds them is refused before it costs anything.

    A request that waits holds the bytes of its images; pixels are unpacked when its turn comes, so those of one request at a time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_body_bytes: int = Field(32 * 2**20, ge=1)
    """Bytes of a request; its images are in it."""
    max_images: int = Field(8, ge=0)
    """Images in one conversation."""
    max_pixels: int = Field(25_000_000, ge=1)
    """Width times height of all images in one conversation together, by their headers: none is unpacked to find out."""
    max_new_tokens: int = Field(1024, ge=1)
    """Tokens of an answer, where a request names no number or a larger one."""
    max_waiting: int = Field(16, ge=0)
    """Requests in the queue behind the one that is answered."""
    timeout: float = Field(120.0, gt=0)
    """Seconds from a request's arrival to its last token. What is said by then is the answer."""


class RequestError(Exception):
    """A request that is refused, with its HTTP status and the fields of OpenAI's error object.

    Args:
        code: a short name for programs, as OpenAI's where it has one.
        param: the field of the request that is at fault.
    """

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """The JSON body in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
