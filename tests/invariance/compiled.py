"""What a compiled rollout does between devices while it decodes."""

from jgrpo.planning.hlo import Instruction, Module

CALLED = ("body", "condition", "calls", "to_apply")
SCOPE = "decode_token"  # as generate.py calls what a token costs


def decoding_collectives(text: str) -> list[Instruction]:
    """Return the collectives inside the decoding loop: that whose body holds what was traced as "decode_token"."""
    module = Module(text)
    loops = [each for part in module.computations.values() for each in part.values() if each.operation == "while"]
    bodies = [_reached(module, loop.attribute("body")) for loop in loops if SCOPE not in loop.source]
    decoding = [inside for inside in bodies if any(SCOPE in each.source for each in inside)]
    assert len(decoding) == 1
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    return [each for each in decoding[0] if each.operation.startswith(kinds)]


def _reached(module: Module, name: str) -> list[Instruction]:
    """Return the instructions of a computation and of all that it calls."""
    found = list(module.computations[name].values())
    for each in list(found):
        for attribute in CALLED:
            called = each.attribute(attribute)
            if called in module.computations:
                found += _reached(module, called)
    return found
