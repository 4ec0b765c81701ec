"""How long the rewards of one rollout take on the host, and that BLEU costs no more than sacrebleu's own loop.

    python benchmarks/reward.py --workers 0 2

scores 2,048 completions of 60 words, 8 to a reference, and prints a table: the median over rounds, in which the
variants take turns so that a busy machine hits all of them alike.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from sacrebleu.metrics import BLEU

from jgrpo.rewards import RewardPool, make_reward

OTHERS = ("chrf", "rouge1", "rougeL", "meteor", "wer", "cer")


Texts = tuple[list[str], list[str]]


def texts(seed: int, *, number: int, words: int, group: int) -> Texts:
    """Completions and references of random words; a completion keeps two thirds of its reference's."""
    random = np.random.default_rng(seed)
    vocabulary = np.array([f"wort{index}" for index in range(5000)])
    references = [random.choice(vocabulary, words) for _ in range(number // group)]
    completions = []
    for reference in references:
        for _ in range(group):
            changed = np.where(random.random(words) < 1 / 3, random.choice(vocabulary, words), reference)
            completions.append(" ".join(changed))
    return completions, [" ".join(reference) for reference in references for _ in range(group)]


def sacrebleu_loop() -> Callable[[list[str], list[str]], list[float]]:
    """What one would write with sacrebleu alone."""
    scorer = BLEU(effective_order=True)
    return lambda completions, references: [
        scorer.sentence_score(completion, [reference]).score
        for completion, reference in zip(completions, references, strict=True)
    ]


def medians(variants: dict[str, Callable], rounds: list[Texts]) -> dict[str, float]:
    """Median seconds of each variant. Every round has texts of its own, as no rollout repeats one before it."""
    seconds = {name: [] for name in variants}
    for completions, references in rounds:
        for name, run in variants.items():
            start = time.perf_counter()
            run(completions, references)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=2048, help="completions")
    parser.add_argument("--words", type=int, default=60, help="words of a completion")
    parser.add_argument("--group", type=int, default=8, help="completions that share a reference")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2], help="sizes of the pools to time BLEU in")
    args = parser.parse_args()
    sizes = {"number": args.number, "words": args.words, "group": args.group}
    rounds = [texts(seed, **sizes) for seed in range(args.rounds)]

    pools = {workers: RewardPool("bleu", workers) for workers in args.workers}
    for pool in pools.values():
        pool.submit(["start"] * 64, ["all workers"] * 64).result()
    variants = {"sacrebleu sentence_score": sacrebleu_loop(), "bleu": make_reward("bleu").components}
    for workers, pool in pools.items():
        variants[f"bleu, pool of {workers}"] = lambda *pair, pool=pool: pool.submit(*pair).result()
    seconds = medians(variants, rounds)
    for pool in pools.values():
        pool.close()
    seconds |= medians({name: make_reward(name).components for name in OTHERS}, rounds[:2])

    base = seconds["sacrebleu sentence_score"]
    print(f"{args.number} completions of {args.words} words, {args.group} to a reference")
    print(f"{'':26}{'seconds':>10}{'relative':>10}")
    for name, value in seconds.items():
        print(f"{name:26}{value:10.3f}{value / base:10.2f}")


if __name__ == "__main__":
    main()
