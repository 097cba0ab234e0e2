"""The body of a chat completion request, and the conversation in it. What would change the answer and is not supported is refused."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alula.data.sample import PLACEHOLDER, Message, Sample
from alula.errors import nearest
from alula.serving.images import read_image
from alula.serving.limits import Limits, RequestError


class Strict(BaseModel):
    """An object whose unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class Address(Strict):
    """Where an image is: in the address itself."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """Accepted and not used: the model's processor decides on the resolution."""


class ImagePart(Strict):
    """An image."""

    type: Literal["image_url"]
    image_url: Address


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Turn(Strict):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content in parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(Strict):
    """What a stream tells besides text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Strict):
    """The only form of answers."""

    type: Literal["text"]


class ChatRequest(Strict):
    """A chat completion request, as OpenAI's API defines it. Answers are greedy unless a temperature is given."""

    model: str
    messages: list[Turn] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = None
    # Fields that clients send with values that ask for nothing.
    n: Literal[1] | None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts before which the answer ends."""
        return tuple(text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or ()) if text)

    @property
    def new_tokens(self) -> int | None:
        """Tokens of the answer at most."""
        return self.max_completion_tokens or self.max_tokens


def read_request(body: bytes) -> ChatRequest:
    """The request in `body`.

    Raises:
        RequestError: 400, naming the field that cannot be used.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = ChatRequest.model_fields if len(problem["loc"]) == 1 else ()
            message = f"The field '{place}' is not supported here. {nearest(place, known) if known else ''}".strip()
            raise RequestError(400, f"{message} Leave it out.", code="unsupported_parameter", param=place) from None
        message = f"{place or 'The body'}: {problem['msg']}. Correct the request."
        raise RequestError(400, message, code="invalid_value", param=place or None) from None


def read_conversation(request: ChatRequest, *, limits: Limits) -> Sample:
    """The conversation that is to be continued, its images packed as they came. Its last message, the answer, is a mere stand-in.

    Raises:
        RequestError: 400; the last message is no question, too many images or pixels, or an image that cannot be used.
    """
    if request.messages[-1].role != "user":
        raise RequestError(
            400, "The last message is not the user's. End with what is to be answered.", code="invalid_value", param="messages"
        )
    addresses = list(_addresses(request))
    if len(addresses) > limits.max_images:
        message = f"{len(addresses)} images came; {limits.max_images} are accepted. Send fewer."
        raise RequestError(400, message, code="too_many_images", param="messages")
    turns = [Message(role=_role(turn), content="\n".join(map(_text, turn.parts))) for turn in request.messages]
    images, pixels = [], 0
    for where, url in addresses:
        content, count = read_image(url, where=where, max_pixels=limits.max_pixels - pixels)
        images.append(content)
        pixels += count
    answer = Message(role="assistant", content="?")
    return Sample(id="request", messages=(*turns, answer), images=tuple(images), origin="your request")


def _addresses(request: ChatRequest) -> Iterator[tuple[str, str]]:
    for i, turn in enumerate(request.messages):
        for j, part in enumerate(turn.parts):
            where = f"messages.{i}.content.{j}"
            if isinstance(part, TextPart):
                if PLACEHOLDER in part.text:
                    message = f"{where}: '{PLACEHOLDER}' in a text stands for an image here. Write it otherwise."
                    raise RequestError(400, message, code="invalid_value", param=where)
            elif turn.role != "user":
                raise RequestError(400, f"{where}: only user messages hold images. Move it.", code="invalid_value", param=where)
            else:
                yield where, part.image_url.url


def _role(turn: Turn) -> str:
    return "system" if turn.role == "developer" else turn.role


def _text(part: TextPart | ImagePart) -> str:
    return part.text if isinstance(part, TextPart) else PLACEHOLDER
