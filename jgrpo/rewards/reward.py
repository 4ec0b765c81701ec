# SPDX-License-Identifier: Apache-2.0
"""The reward of a run: named components, each scored for every example, and their weighted sum."""

import dataclasses
import importlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jgrpo.config import MetricOptions
from jgrpo.config.checks import check_types
from jgrpo.core.advantages import group_advantages
from jgrpo.rewards.built_in import BUILT_IN, Component
from jgrpo.rewards.overlap import DEFAULT_OPTIONS
from model_port.errors import UserError

SCALES = ("none", "group")

_QUOTED_CHARS = 200


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


@dataclasses.dataclass(frozen=True)
class Answers:
    """What rewards are computed from.

    Attributes:
        columns: further columns of the data set, one value per example.
        numbers: of the examples here, where these are some of more.
    """

    completions: list[str]
    references: list[str]
    columns: dict[str, Sequence]
    numbers: Sequence[int]

    @classmethod
    def make(cls, completions: Sequence[str], references: Sequence[str], columns: Mapping[str, Sequence]) -> "Answers":
        """Check that every column has one value per completion."""
        for what, values in {"references": references, **columns}.items():
            if len(values) != len(completions):
                raise UserError(
                    f"rewards got {len(completions)} completions but {len(values)} values in {what!r}: "
                    "give one per completion."
                )
        return cls(list(completions), list(references), dict(columns), range(len(completions)))

    def __len__(self) -> int:
        return len(self.completions)

    def part(self, start: int, stop: int) -> "Answers":
        """Answers start to stop, counted here."""
        columns = {name: values[start:stop] for name, values in self.columns.items()}
        texts = self.completions[start:stop], self.references[start:stop]
        return Answers(*texts, columns, self.numbers[start:stop])

    def take(self, indices: Sequence[int]) -> "Answers":
        """Some of the examples, counted here."""

        def some(values):
            return [values[i] for i in indices]

        columns = {name: some(values) for name, values in self.columns.items()}
        return Answers(some(self.completions), some(self.references), columns, some(self.numbers))

    def error(self, name: str, problem: str, index: int) -> UserError:
        """What to raise when the component fails at the example of this index here."""
        return UserError(
            f"reward {name!r} {problem} at example {self.numbers[index]}: "
            f"completion {_quote(self.completions[index])}, reference {_quote(self.references[index])}. "
            "A reward takes (completions, references, **columns) and "
            "returns one finite number per example."
        )


def _first_failing(component: Component, examples: Answers) -> int | None:
    """The first example on which the component fails alone; None if it only fails on several together."""
    for index in range(len(examples)):
        one = examples.part(index, index + 1)
        try:
            list(component(one.completions, one.references, **one.columns))
        except Exception:
            return index
    return None


def _score(name: str, component: Component, examples: Answers) -> np.ndarray:
    """Run one component, and refuse what is not one finite number per example."""
    try:
        returned = list(component(examples.completions, examples.references, **examples.columns))
    except Exception as error:
        problem = f"failed with {type(error).__name__}: {error},"
        index = _first_failing(component, examples)
        if index is None:
            problem, index = f"{problem} on {len(examples)} examples together and on none alone; they begin", 0
        raise examples.error(name, problem, index) from error
    if len(returned) != len(examples):
        problem = f"returned {len(returned)} values for {len(examples)} examples; the two part"
        raise examples.error(name, problem, min(len(returned), len(examples) - 1))
    scores = np.empty(len(examples))
    for index, value in enumerate(returned):
        try:
            scores[index] = float(value)
        except (TypeError, ValueError) as error:
            raise examples.error(name, f"returned {value!r}", index) from error
        if not math.isfinite(scores[index]):
            raise examples.error(name, f"returned {value!r}", index)
    return scores


@dataclasses.dataclass(frozen=True)
class Reward:
    """A weighted sum of named components.

    Attributes:
        weights: of each component; one with weight 0 is scored and logged, and does not train.
        functions: the components by the same names.
        scale: "none", or "group": `total` brings each component to mean 0 and deviation 1 within its group first, so
            that a component's share in the total does not depend on how widely it spreads.
    """

    weights: Mapping[str, float | int]
    functions: Mapping[str, Component]
    scale: str = "none"

    @property
    def names(self) -> tuple[str, ...]:
        """The components, in the order given."""
        return tuple(self.weights)

    def components(
        self, completions: Sequence[str], references: Sequence[str], **columns: Sequence
    ) -> dict[str, np.ndarray]:
        """Every component's score of every example, unweighted and unscaled, float64 [N].

        Args:
            columns: further columns of the data set, one value per example, passed on to user functions.

        Raises:
            UserError: unequal lengths, or a component that fails or returns something else than N finite numbers;
                the message names the reward and the first example concerned.
        """
        return self.score(Answers.make(completions, references, columns))

    def score(self, examples: Answers, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """As `components`, on examples that have been checked; of these components only, where they are given."""
        names = self.names if names is None else names
        if not len(examples):
            return {name: np.empty(0) for name in names}
        return {name: _score(name, self.functions[name], examples) for name in names}

    def total(self, components: Mapping[str, np.ndarray]) -> np.ndarray:
        """The weighted sum of the components, float64, of their shape: [P, G], or any shape where scale is "none".

        Raises:
            UserError: scale is "group" and the components are not [P, G] with G of at least 2.
        """
        if self.scale == "group":
            components = {name: _within_groups(name, components[name]) for name in self.names}
        return sum(weight * components[name] for name, weight in self.weights.items())

    def __call__(self, completions: Sequence[str], references: Sequence[str], **columns: Sequence) -> np.ndarray:
        """The reward of every example, float64 [N]; arguments and errors as for `components`. Needs scale "none"."""
        return self.total(self.components(completions, references, **columns))


@dataclasses.dataclass(frozen=True)
class SourceRewards:
    """The rewards of a mixture's sources, each of which scores the examples of its own.

    Attributes:
        parts: the reward of each source.
    """

    parts: tuple[Reward, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The components of all of them."""
        return tuple(dict.fromkeys(name for reward in self.parts for name in reward.names))

    def total(self, components: Mapping[str, np.ndarray], sources: np.ndarray) -> np.ndarray:
        """As Reward.total, each prompt's by the reward of its source; what other sources' components hold is not read.

        Args:
            sources: of each prompt, or of whatever the first axis of the components is.
        """
        shape = next(iter(components.values())).shape
        total = np.empty(shape)
        for source in np.unique(sources).tolist():
            reward, rows = self.parts[source], sources == source
            total[rows] = reward.total({name: components[name][rows] for name in reward.names})
        return total


def _within_groups(name: str, values: np.ndarray) -> np.ndarray:
    if values.ndim != 2:
        raise UserError(
            f"a reward of scale group compares samples of one prompt: give components of shape [prompts, samples], got "
            f"{list(values.shape)} for {name!r}."
        )
    return group_advantages(np.asarray(values, np.float64), "group")


def make_reward(
    spec: str | Mapping[str, float | int], *, options: MetricOptions = DEFAULT_OPTIONS, scale: str = "none"
) -> Reward:
    """The reward named by spec: one component, or several with their weights.

    A component is one of BUILT_IN, in [0, 1] (bertscore: at most 1, in practice above 0), or a function of yours as
    "package.module:function", called with (completions, references, **columns). "wer" and "cer" are 1 - error rate, not
    below 0; "length" is the closeness of the numbers of words.

    Args:
        options: the variants of the built-in components. What they name (a model, WordNet) is read here.
        scale: one of SCALES; see Reward.

    Raises:
        UserError: unknown name, option or scale, a module or function that does not exist, no component, a weight that
            is not a finite number, or files that a component needs and that are missing.
    """
    weights = {spec: 1.0} if isinstance(spec, str) else dict(spec)
    if not weights:
        raise UserError(f"a reward needs a component: use {', '.join(BUILT_IN)} or your own module:function.")
    if scale not in SCALES:
        raise UserError(f"reward scale {scale!r} is unknown: use one of {', '.join(SCALES)}.")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise UserError(f"the weight of reward {name!r} is {weight!r}: give a finite number.")
    check_types(options, "metrics.")
    functions = {name: BUILT_IN[name].make(options) if name in BUILT_IN else _load_component(name) for name in weights}
    return Reward(weights, functions, scale)
