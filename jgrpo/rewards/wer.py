"""Word error rate, as a reward (1 - WER) and as a corpus result."""

from collections.abc import Sequence

from model_port.errors import UserError


def word_errors(completion: str, reference: str) -> int:
    """Fewest word substitutions, insertions and deletions that turn the reference into the completion."""
    said, wanted = completion.split(), reference.split()
    distances = list(range(len(wanted) + 1))
    for row, word in enumerate(said, start=1):
        diagonal, distances[0] = distances[0], row
        for column, other in enumerate(wanted, start=1):
            substituted = diagonal + (word != other)
            diagonal = distances[column]
            distances[column] = min(substituted, diagonal + 1, distances[column - 1] + 1)
    return distances[-1]


def word_accuracy(completion: str, reference: str) -> float:
    """1 - WER, not below 0. An empty reference is matched only by an empty completion."""
    num_words = len(reference.split())
    if num_words == 0:
        return float(not completion.split())
    return max(0.0, 1.0 - word_errors(completion, reference) / num_words)


def corpus_wer(completions: Sequence[str], references: Sequence[str]) -> float:
    """All word errors over all reference words: 0 is perfect, above 1 is possible. Text is compared as it is.

    Raises:
        UserError: unequal lengths, or no reference word.
    """
    if len(completions) != len(references):
        raise UserError(f"corpus WER got {len(completions)} completions and {len(references)} references.")
    num_words = sum(len(reference.split()) for reference in references)
    if num_words == 0:
        raise UserError(f"corpus WER needs a reference word: got {len(references)} references without any.")
    return sum(map(word_errors, completions, references)) / num_words
