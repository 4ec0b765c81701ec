"""Memory of the compiled programs: what grows with the vocabulary, with G and with the length of completions.

    python -m benchmarks.memory
    python -m benchmarks.memory --model granite-speech-3.3-2b --dtype bfloat16 --vocabularies 49160 98320   # GPU or TPU

No array is made: the compiler says what a program allocates besides its arguments and its result (`temporaries_mb`).
The logits of all completion tokens would take `logits_mb`. `vocabulary_mb` is what a program takes more than the same
one with the smallest vocabulary: it does not grow with the completions, as only a chunk's logits exist at one time.
Only the projector is trained, so that no gradient of the vocabulary's matrix hides the difference. Then the same for
every layout of the prefix trees under a limit of `--limit` tokens, at the smallest vocabulary; the last is what a run
must have.
"""

import argparse
import dataclasses
from typing import Any

from benchmarks.harness import Report, arguments, chosen, run
from benchmarks.workload import Size, plan, planned_calls
from jgrpo.core.tree import layouts
from jgrpo.planning.measure import compile_call

PROGRAMS = ("rollout", "score", "update")
MEGA = 1e6


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; return what is written as JSON."""
    parser = arguments(__doc__, prompts=4)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[1024, 32768], help="sizes V to compile for")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 4], help="of G and of T, one at a time")
    parser.add_argument("--chunk", type=int, default=256, help="completion tokens whose logits exist at one time")
    parser.add_argument("--limit", type=int, default=200, help="T for which every layout is compiled; 0 for none")
    options = parser.parse_args(argv)
    base = Size.of(options)
    programs = chosen(dict.fromkeys(PROGRAMS), options.only)
    report = Report("memory", dataclasses.asdict(base) | {"chunk": options.chunk})
    sizes = [base]
    for factor in options.factors:
        sizes.append(dataclasses.replace(base, new_tokens=factor * base.new_tokens))
        sizes.append(dataclasses.replace(base, samples=factor * base.samples))
    for size in dict.fromkeys(sizes):
        least: dict[str, float] = {}
        for vocabulary in options.vocabularies:
            run, calls = planned_calls(size, **_options(options, vocabulary))
            for name in programs:
                compiled = compile_call(calls[name], run.mesh)
                temporaries = compiled.memory.temporaries
                report.row(
                    program=name,
                    G=size.samples,
                    T=size.new_tokens,
                    V=vocabulary,
                    temporaries_mb=temporaries / MEGA,
                    vocabulary_mb=(temporaries - least.setdefault(name, temporaries)) / MEGA,
                    logits_mb=4.0 * size.prompts * size.samples * size.new_tokens * vocabulary / MEGA,
                    arguments_mb=compiled.memory.arguments / MEGA,
                )
    longest = dataclasses.replace(base, new_tokens=options.limit)
    _, clip = plan(longest)
    for layout in layouts(longest.samples, longest.new_tokens, prompt_tokens=clip.tokens) if options.limit else []:
        run, calls = planned_calls(longest, layout=layout, **_options(options, options.vocabularies[0]))
        for name in set(programs) & {"score", "update"}:
            compiled = compile_call(calls[name], run.mesh)
            report.row(
                program=f"{name}, {layout[0]} x {layout[1]}",
                G=longest.samples,
                T=longest.new_tokens,
                V=options.vocabularies[0],
                temporaries_mb=compiled.memory.temporaries / MEGA,
                arguments_mb=compiled.memory.arguments / MEGA,
            )
    chunk = 4.0 * options.chunk * max(options.vocabularies) / MEGA
    report.note(f"A chunk of {options.chunk} tokens' logits takes {chunk:,.1f} MB at the largest vocabulary.")
    return report.finish(options.json)


def _options(options: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    model = {"trainable": ("projector",), "logprob_chunk": options.chunk}
    return {"decoder": {"vocab_size": vocabulary}, "model": model}


if __name__ == "__main__":
    run(main)
