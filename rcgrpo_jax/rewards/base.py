"""What a reward is, and how one is found by name."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from jaxtyping import Array, Float

from rcgrpo_jax.borders import is_like
from rcgrpo_jax.errors import UsageError, UserError, nearest, reason


class RewardInputs(NamedTuple):
    """A batch of `P` prompts with `G` candidate edits each; pictures are sRGB in [0, 1], float32."""

    source: Float[Array, "P H W 3"]
    edited: Float[Array, "P G H W 3"]
    mask: Float[Array, "P H W"]  # in [0, 1], 1 where the edit belongs
    instructions: tuple[str, ...]  # one a prompt
    targets: Float[Array, "P H W 3"] | None = None  # reference edits
    captions: tuple[str, ...] | None = None  # of the edited pictures, one a prompt; given where a reward needs them
    tasks: tuple[str, ...] | None = None  # kinds of edit, one a prompt; given where a reward needs them


class Pending(Protocol):
    """Scores under way; a `concurrent.futures.Future` of the array is one."""

    def result(self) -> Float[Array, "P G"]:
        """Waits for the scores, float32; NaN, never a made-up number, for a candidate that could not be scored."""


class Unscored(Exception):
    """What a reward raises, at its start or as its result, if what it asks gave no answer; the message is the cause.

    The candidates have no score then, the cause is logged, and the run goes on. Any other exception ends the run.
    """


class Reward(ABC):
    """Scores candidates; higher is better.

    A reward that asks a server inherits from this class, and its `start` returns at once. One that is computed here is
    a function of the inputs, or a class with `__call__`: `as_reward` makes it a reward.
    """

    needs_target: bool = False  # whether it is given only examples with a reference edit
    needs_caption: bool = False  # whether it is given only examples with a caption of the edited picture
    needs_task: bool = False  # whether it is given only examples that name their kind of edit; a training has none
    incidental: ClassVar[tuple[str, ...]] = ()  # options that do not touch the scores: a run may resume with others

    def validate(self, instruction: str) -> None:  # noqa: B027 (a reward may accept every instruction)
        """Raises a UserError if no edit for this instruction could be scored; called before training starts."""

    def check(self) -> None:  # noqa: B027 (what is computed here needs none)
        """Raises a UserError if nothing could be scored, as when no server is there; called before weights are read."""

    def describe(self) -> dict[str, Any]:
        """What the scores depend on, as JSON, where the options leave it open; a run resumes only with the same."""
        return {}

    def metrics(self) -> dict[str, float]:
        """What was measured of the scoring since the last call, under names that are always the same."""
        return {}

    @abstractmethod
    def start(self, inputs: RewardInputs) -> Pending:
        """Starts to score every candidate."""


@dataclass(frozen=True)
class Local(Reward):
    """A reward that is computed here.

    The function may have `needs_target`, `needs_caption`, `validate` and `describe`, as `Reward` has them.
    """

    function: Callable[[RewardInputs], Float[Array, "P G"]]

    @property
    def needs_target(self) -> bool:
        return getattr(self.function, "needs_target", Reward.needs_target)

    @property
    def needs_caption(self) -> bool:
        return getattr(self.function, "needs_caption", Reward.needs_caption)

    def validate(self, instruction: str) -> None:
        if hasattr(self.function, "validate"):
            self.function.validate(instruction)

    def describe(self) -> dict[str, Any]:
        return self.function.describe() if hasattr(self.function, "describe") else {}

    def __call__(self, inputs: RewardInputs) -> Float[Array, "P G"]:
        return self.function(inputs)

    def start(self, inputs: RewardInputs) -> Pending:
        return _Dispatched(self.function(inputs))


class _Dispatched(NamedTuple):
    """What a function has returned; the device may still be at work on it."""

    scores: Float[Array, "P G"]

    def result(self) -> Float[Array, "P G"]:
        return self.scores


def as_reward(found: Reward | Callable[[RewardInputs], Float[Array, "P G"]]) -> Reward:
    """A reward as it is, a function as a local one."""
    return found if isinstance(found, Reward) else Local(found)


Factory = Callable[..., Reward | Callable[[RewardInputs], Float[Array, "P G"]]]  # of its options
_FACTORIES: dict[str, Factory] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Makes a factory, usually the reward's class, known to `make` under a name."""

    def add(factory: Factory) -> Factory:
        if name in _FACTORIES:
            raise ValueError(f"The reward {name!r} is registered twice.")
        _FACTORIES[name] = factory
        return factory

    return add


@contextmanager
def named(name: str) -> Iterator[None]:
    """Says which reward failed in the block; to end the program, as by `sys.exit`, is a failure too."""
    try:
        yield
    except Unscored:
        raise
    except UserError as error:
        raise type(error)(f"reward {name!r}: {error.problem}", error.remedy) from error
    except (Exception, SystemExit) as error:
        raise UserError(
            f"reward {name!r} failed: {type(error).__name__}: {reason(error)}",
            "Mend the reward, or leave it out of the configuration; --debug shows where it failed.",
        ) from error


def factories() -> dict[str, Factory]:
    """Every registered reward: name -> factory."""
    return dict(_FACTORIES)


def is_remote(factory: Factory) -> bool:
    """Whether it makes a reward that asks a server: a class of `Reward`; what is computed here is a function."""
    return isinstance(factory, type) and issubclass(factory, Reward)


def make(name: str, known: Mapping[str, Factory] | None = None, /, **options: Any) -> Reward:
    """Builds a reward.

    Args:
        name: Its name.
        known: Name -> factory; the registered ones by default.
        **options: Passed to its factory.

    Raises:
        UsageError: No reward has the name, or its factory does not take the options or their values.
        UserError: Its factory failed in another way.
    """
    known = factories() if known is None else known
    if name not in known:
        near = nearest(name, known)
        raise UsageError(
            f"reward: {name!r} found; one of {', '.join(sorted(known))} was wanted.",
            f"Did you mean {near!r}?" if near else "Name one of these, or import the module that registers yours.",
        )
    signature = inspect.signature(known[name])
    try:
        signature.bind(**options)
    except TypeError as error:
        raise UsageError(
            f"reward {name!r}: {error}; the options {', '.join(signature.parameters) or '(none)'} were wanted.",
            "Correct the options.",
        ) from None
    with named(name):
        try:
            return as_reward(known[name](**options))
        except UserError as error:
            raise UsageError(error.problem, error.remedy) from error


def incidental_fields(known: Mapping[str, Factory]) -> list[str]:
    """The fields of a configuration that do not touch the scores of rewards: name -> factory."""
    return [
        f"reward_options.{name}.{option}"
        for name, factory in known.items()
        for option in getattr(factory, "incidental", ())
    ]


def default_options(known: Mapping[str, Factory]) -> dict[str, dict[str, Any]]:
    """The options of rewards: name -> option -> default, where it has one."""
    parameters = {name: inspect.signature(factory).parameters for name, factory in known.items()}
    return {
        name: {option: x.default for option, x in found.items() if x.default is not None and x.default is not x.empty}
        for name, found in parameters.items()
    }


def name_problems(names: Iterable[str], known: Mapping[str, Factory]) -> list[str]:
    """The names that no reward has, a line each."""
    return [f"{name}: no such reward; {_nearest(name, known)}" for name in names if name not in known]


def option_problems(name: str, options: Any, known: Mapping[str, Factory]) -> list[str]:
    """What is wrong with the options that a configuration gives a reward, a line each.

    Args:
        name: The reward's.
        options: Option -> value. A value of another type than the option's default is a problem, but an int is a float.
        known: Name -> factory.
    """
    if name not in known:
        return name_problems([name], known)
    if not isinstance(options, Mapping):
        return [f"{name}: {options!r} found; a group of options was wanted"]
    parameters = inspect.signature(known[name]).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    problems = []
    for option, value in options.items():
        if option not in parameters and not takes_any:
            problems.append(f"{name}.{option}: no such option; {_nearest(option, parameters)}")
        elif option in parameters and not _fits(value, parameters[option].default):
            wanted = type(parameters[option].default).__name__
            problems.append(f"{name}.{option}: {value!r} found; {wanted} was wanted")
    return problems


def _nearest(name: str, known: Collection[str]) -> str:
    near = nearest(name, known)
    return f"did you mean {near}?" if near else f"one of {', '.join(sorted(known)) or '(none)'} was wanted"


def _fits(value: Any, default: Any) -> bool:
    """Whether a value can stand for a default; any can where there is none."""
    return default is None or default is inspect.Parameter.empty or is_like(value, default)
