"""The reward of a run: named components, each scored for every example, and their weighted sum."""

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jgrpo.rewards.bleu import DEFAULT_BLEU, BleuOptions, SentenceBleu
from jgrpo.rewards.chrf import SentenceChrf
from jgrpo.rewards.exact import exact_match
from jgrpo.rewards.wer import word_accuracy
from model_port.errors import UserError

# A component: (completions, references, **columns) -> one finite number per example.
Component = Callable[..., Sequence[float] | np.ndarray]

_QUOTED_CHARS = 200


def _each(score: Callable[[str, str], float]) -> Component:
    """A score of one example, as a component that needs no columns."""
    return lambda completions, references, **_: [score(*pair) for pair in zip(completions, references, strict=True)]


# Built when asked for, so that each reward object owns its scorers.
BUILT_IN: dict[str, Callable[[BleuOptions], Component]] = {
    "bleu": lambda options: _each(SentenceBleu(options)),
    "chrf": lambda options: _each(SentenceChrf()),
    "exact": lambda options: _each(exact_match),
    "wer": lambda options: _each(word_accuracy),
}


def _load_component(name: str) -> Component:
    """The function behind "package.module:function"."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(
            f"reward {name!r} is unknown: use one of {', '.join(BUILT_IN)}, or your own function as module:function."
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"reward {name!r}: module {module_name!r} cannot be imported ({error}). Install it or add its folder to "
            "PYTHONPATH."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"reward {name!r}: module {module_name!r} has no function {attribute!r}.")
    return function


def _quote(text: str) -> str:
    return repr(text if len(text) <= _QUOTED_CHARS else text[:_QUOTED_CHARS] + "…")


def _example_error(name: str, problem: str, index: int, completions: list[str], references: list[str]) -> UserError:
    return UserError(
        f"reward {name!r} {problem} at example {index}: completion {_quote(completions[index])}, "
        f"reference {_quote(references[index])}. A reward takes (completions, references, **columns) and returns one "
        "finite number per example."
    )


def _first_failing(component: Component, completions: list[str], references: list[str], columns: dict) -> int | None:
    """The first example on which the component fails alone; None if it only fails on several together."""
    for index in range(len(completions)):
        one = slice(index, index + 1)
        try:
            list(component(completions[one], references[one], **{key: column[one] for key, column in columns.items()}))
        except Exception:
            return index
    return None


def _score(name: str, component: Component, completions: list[str], references: list[str], columns: dict) -> np.ndarray:
    """Run one component, and refuse what is not one finite number per example."""
    try:
        returned = list(component(completions, references, **columns))
    except Exception as error:
        problem = f"failed with {type(error).__name__}: {error},"
        index = _first_failing(component, completions, references, columns)
        if index is None:
            problem, index = f"{problem} on {len(completions)} examples together and on none alone; they begin", 0
        raise _example_error(name, problem, index, completions, references) from error
    if len(returned) != len(completions):
        problem = f"returned {len(returned)} values for {len(completions)} examples; the two part"
        index = min(len(returned), len(completions) - 1)
        raise _example_error(name, problem, index, completions, references)
    scores = np.empty(len(completions))
    for index, value in enumerate(returned):
        try:
            scores[index] = float(value)
        except (TypeError, ValueError) as error:
            raise _example_error(name, f"returned {value!r}", index, completions, references) from error
        if not math.isfinite(scores[index]):
            raise _example_error(name, f"returned {value!r}", index, completions, references)
    return scores


@dataclasses.dataclass(frozen=True)
class Reward:
    """A weighted sum of named components.

    Attributes:
        weights: of each component; one with weight 0 is scored and logged, and does not train.
        functions: the components by the same names.
    """

    weights: Mapping[str, float | int]
    functions: Mapping[str, Component]

    @property
    def names(self) -> tuple[str, ...]:
        """The components, in the order given."""
        return tuple(self.weights)

    def components(
        self, completions: Sequence[str], references: Sequence[str], **columns: Sequence
    ) -> dict[str, np.ndarray]:
        """Every component's score of every example, unweighted, float64 [N].

        Args:
            columns: further columns of the data set, one value per example, passed on to user functions.

        Raises:
            UserError: unequal lengths, or a component that fails or returns something else than N finite numbers;
                the message names the reward and the first example concerned.
        """
        completions = list(completions)
        for what, values in {"references": references, **columns}.items():
            if len(values) != len(completions):
                raise UserError(
                    f"rewards got {len(completions)} completions but {len(values)} values in {what!r}: "
                    "give one per completion."
                )
        if not completions:
            return {name: np.empty(0) for name in self.names}
        references = list(references)
        return {
            name: _score(name, function, completions, references, columns) for name, function in self.functions.items()
        }

    def total(self, components: Mapping[str, np.ndarray]) -> np.ndarray:
        """The weighted sum of what `components` returned, float64 [N]."""
        return sum(weight * components[name] for name, weight in self.weights.items())

    def __call__(self, completions: Sequence[str], references: Sequence[str], **columns: Sequence) -> np.ndarray:
        """The reward of every example, float64 [N]; arguments and errors as for `components`."""
        return self.total(self.components(completions, references, **columns))


def make_reward(spec: str | Mapping[str, float | int], *, bleu: BleuOptions = DEFAULT_BLEU) -> Reward:
    """The reward named by spec: one component, or several with their weights.

    A component is "bleu", "chrf", "exact" (match), "wer" (1 - word error rate), all in [0, 1], or a function of yours
    as "package.module:function", called with (completions, references, **columns).

    Args:
        bleu: the variant of the component "bleu".

    Raises:
        UserError: unknown name, a module or function that does not exist, no component, or a weight that is not a
            finite number.
    """
    weights = {spec: 1.0} if isinstance(spec, str) else dict(spec)
    if not weights:
        raise UserError(f"a reward needs a component: use {', '.join(BUILT_IN)} or your own module:function.")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise UserError(f"the weight of reward {name!r} is {weight!r}: give a finite number.")
    functions = {name: BUILT_IN[name](bleu) if name in BUILT_IN else _load_component(name) for name in weights}
    return Reward(weights, functions)
