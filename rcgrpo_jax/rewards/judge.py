"""Rewards that ask a vision-language model on a server: pictures out, scores in."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, get_type_hints

import numpy as np
from annotated_types import Ge, Gt, Le
from jaxtyping import Float
from typing_extensions import TypedDict

from rcgrpo_jax.borders import STRICT, conform
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rewards.base import Reward, RewardInputs, Unscored
from rcgrpo_jax.rewards.endpoint import Unanswered, parse_urls, read_token
from rcgrpo_jax.rewards.pictures import content_parts, data_url, region_box

if TYPE_CHECKING:
    from rcgrpo_jax.rewards.chat import Chat, Server

logger = logging.getLogger(__name__)
_LATER = "Start again when the server is ready and has room."
_TOKEN = "Name in `token_variable` the environment variable that holds a token of this server."
_REMEDIES = {  # HTTP status of the first request -> what to do
    None: "Start the server, or correct `urls`; docs/judges.md says how to serve a judge.",
    200: "Serve the model that this reward was made for; a sampled answer may need more max_tokens.",
    401: _TOKEN,
    403: _TOKEN,
    **dict.fromkeys((429, 502, 503), _LATER),
    404: "Write `urls` up to and with /v1, and as `model` a name that the server's /v1/models lists.",
}
_REFUSED = "Serve at `urls` itself a model that is named `model` and sees two pictures; some servers want top_k=0."

Temperature, Probability = Annotated[float, Ge(0), Le(2)], Annotated[float, Gt(0), Le(1)]
Count, NotNegative = Annotated[int, Ge(1)], Annotated[int, Ge(0)]
Send = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]  # a request -> the choice that came back


class Question(NamedTuple):
    """One question about a pair of pictures."""

    template: str  # as `pictures.content_parts` takes it
    read: Callable[[Mapping[str, Any]], float]  # the score in a choice of the answer; ValueError if it holds none


@dataclass(frozen=True)
class Judge(Reward):
    """Asks the servers of one vision-language model about every candidate. Its fields are its options.

    A subclass has the questions, and makes a reward of their scores. Pass i of a question has the seed `seed + i`. An
    answer that cannot be read is asked for again, with the seed `num_pass` higher each time. A candidate that lacks an
    answer in the end has no score. The scores depend on the answers alone, and not on which servers failed meanwhile.
    """

    urls: str = "http://localhost:8000/v1"  # of the servers, with commas; each gets its share of the requests
    model: str = ""  # its name on the servers; there is no default
    token_variable: str = ""  # name of the environment variable with the bearer token; empty: none is sent
    in_flight: Annotated[int, Ge(1), Le(4096)] = 128  # requests under way; more than the servers compute at a time
    timeout: Annotated[float, Gt(0)] = 120.0  # seconds of one attempt, with the wait in the server's queue
    attempts: Count = 5  # of a request at which servers fail
    patience: Annotated[float, Gt(0)] = 600.0  # seconds without any server before the run ends
    asks: Count = 3  # of a question, as long as the answer cannot be read
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 42
    view: Literal["whole", "region"] = "whole"  # what the judge sees of source and edit
    margin: Annotated[float, Ge(0)] = 0.25  # of "region" around it, in longer sides of its box

    incidental: ClassVar[tuple[str, ...]] = (
        "urls", "token_variable", "in_flight", "timeout", "attempts", "patience",
    )  # fmt: skip
    num_pass: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ()  # numbers of a candidate that people know, and a benchmark shows: `details`

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        options: Any = TypedDict("Options", {name: hints[name] for name in self._options()})
        options.__pydantic_config__ = STRICT
        conform(self._options(), options, "options", "Correct them in reward_options of the configuration.")
        if not self.model:
            raise UserError(
                "model: none found; the name of the model on the servers was wanted.",
                "Set `model` to a name that their /v1/models lists.",
            )
        parse_urls(self.urls)
        read_token(self.token_variable)

    @abstractmethod
    def questions(self) -> Sequence[Question]:
        """What is asked about each pair."""

    def questions_of(self, task: str) -> Sequence[Question]:
        """What is asked about a pair of a kind of edit, as many questions for each; by default the same for all."""
        return self.questions()

    @abstractmethod
    def request(self) -> dict[str, Any]:
        """The fields of a request beside model, messages and seed."""

    def combine(self, scores: Float[np.ndarray, "passes questions"]) -> float:
        """The reward of a candidate, of the scores of all answers: their mean."""
        return float(scores.mean())

    def details(self, scores: Float[np.ndarray, "passes questions"]) -> Sequence[float]:
        """The numbers of a candidate that `columns` names, of the scores of all answers."""
        return ()

    def describe(self) -> dict[str, Any]:
        prompts = "\0".join(question.template for question in self.questions())
        lasting = {name: value for name, value in self._options().items() if name not in self.incidental}
        return lasting | {"prompts": hashlib.sha256(prompts.encode()).hexdigest()}

    def check(self) -> None:
        for server in self._chat.servers:
            self._chat.run(self._check(server)).result()
        self.metrics()  # a step does not count these answers

    def metrics(self) -> dict[str, float]:
        return self._chat.metrics(("retries", "asked_again", "unscored"))

    def start(self, inputs: RewardInputs) -> Future[Float[np.ndarray, "P G"]]:
        return self._chat.run(self._each(_on_host(inputs), self.combine))

    def start_details(self, inputs: RewardInputs) -> Future[Float[np.ndarray, "P G columns"]]:
        """As `start`, with the numbers of `columns` in the place of the score."""
        return self._chat.run(self._each(_on_host(inputs), self.details, len(self.columns)))

    def _options(self) -> dict[str, Any]:
        return {option.name: getattr(self, option.name) for option in fields(self)}

    @cached_property
    def _chat(self) -> Chat:
        from rcgrpo_jax.rewards.chat import Chat  # with its libraries, which take a third of a second to import

        limits = {name: getattr(self, name) for name in ("in_flight", "timeout", "attempts", "patience")}
        return Chat(parse_urls(self.urls), read_token(self.token_variable), **limits)

    async def _check(self, server: Server) -> None:
        """Asks one server every question, about two grey pictures."""
        send, grey = partial(self._chat.send_to, server), data_url(np.full((256, 256, 3), 0.5, np.float32))
        for question in self.questions():
            try:
                await self._ask(send, question, content_parts(question.template, "Change nothing.", grey, grey), 0)
            except Unanswered as cause:
                where = f"{server.url}: " if cause.status == 200 else ""
                raise UserError(f"{where}{str(cause).rstrip('.')}.", _REMEDIES.get(cause.status, _REFUSED)) from None

    async def _each(
        self, inputs: RewardInputs, function: Callable[[np.ndarray], float | Sequence[float]], *shape: int
    ) -> Float[np.ndarray, "P G ..."]:
        """What a function makes of the answers about each candidate, of this shape. Each is a task of its own.

        Raises:
            Unscored: None has all its answers.
            UserError: The servers are gone, or nothing is asked about a kind of edit.
        """
        source, edited, mask = inputs.source, inputs.edited, inputs.mask
        scores, causes = np.full((*edited.shape[:2], *shape), np.nan, np.float32), []
        asked = [self.questions_of(task) for task in inputs.tasks or ("",) * len(source)]
        boxes = [region_box(x, self.margin) if self.view == "region" else (slice(None),) * 2 for x in mask]
        room = asyncio.Semaphore(self.in_flight)  # candidates at work: the PNGs of all would take much memory

        async def score(p: int, g: int, before: asyncio.Task[str]) -> None:
            async with room:
                after = await asyncio.to_thread(data_url, edited[p, g][boxes[p]])
                questions, instruction = asked[p], inputs.instructions[p]
                contents = [content_parts(x.template, instruction, await before, after) for x in questions]
                answers = [
                    self._ask(self._chat.complete, question, content, i)
                    for i in range(self.num_pass)
                    for question, content in zip(questions, contents, strict=True)
                ]
                found = await asyncio.gather(*answers, return_exceptions=True)
            lost = [x for x in found if isinstance(x, BaseException)]
            for error in lost:
                if not isinstance(error, Unanswered):
                    raise error
            if lost:
                causes.append(str(lost[0]))
            else:
                scores[p, g] = function(np.array(found).reshape(self.num_pass, len(questions)))

        try:
            async with asyncio.TaskGroup() as group:
                for p in range(len(source)):
                    before = group.create_task(asyncio.to_thread(data_url, source[p][boxes[p]]))
                    for g in np.flatnonzero(np.isfinite(edited[p]).all((1, 2, 3))):
                        group.create_task(score(p, g, before))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        if causes:
            self._chat.counts["unscored"] += len(causes)
            if not np.isfinite(scores).any():
                raise Unscored(causes[0])
            count = edited.shape[0] * edited.shape[1]
            logger.warning("%d of %d candidates have no score: %s", len(causes), count, causes[0])
        return scores

    async def _ask(self, send: Send, question: Question, content: list[dict[str, Any]], index: int) -> float:
        """The score in the answer to a question, on its pass of that index.

        Raises:
            Unanswered: No answer came, or none that can be read.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **self.request()}
        for ask in range(self.asks):
            self._chat.counts["asked_again"] += ask > 0
            choice = await send({**body, "seed": self.seed + index + ask * self.num_pass})
            try:
                return question.read(choice)
            except ValueError as error:
                cause = error
        raise Unanswered(f"no answer of {self.asks} can be read; the last: {self._chat.redact(str(cause))}", 200)


@dataclass(frozen=True)
class SampledJudge(Judge):
    """A judge that writes its answer."""

    num_pass: Count = 1  # answers to each question
    temperature: Temperature = 0.0
    top_p: Probability = 1.0
    top_k: NotNegative = 0  # 0: no limit, and no such field in the request: many servers do not know it
    max_tokens: Count = 512  # of an answer

    def request(self) -> dict[str, Any]:
        found = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return found | ({"top_k": self.top_k} if self.top_k else {})


def _on_host(inputs: RewardInputs) -> RewardInputs:
    """Waits for the pictures here, and not in the thread that sends requests."""
    return inputs._replace(**{name: np.asarray(getattr(inputs, name)) for name in ("source", "edited", "mask")})


class _Message(TypedDict):
    content: str


class _Written(TypedDict):
    __pydantic_config__ = STRICT
    message: _Message


def written(choice: Mapping[str, Any]) -> str:
    """The text of an answer.

    Raises:
        ValueError: It has none.
    """
    return matching(choice, _Written)["message"]["content"]


def matching(choice: Mapping[str, Any], kind: Any) -> Any:
    """The choice of an answer as a type.

    Raises:
        ValueError: It is not of the type.
    """
    try:
        return conform(choice, kind, "the choice", "")
    except UserError as error:
        raise ValueError(error.problem) from None
