# ruff: noqa: T201 (a program that talks to a person)
"""The BLEU of a model that recognises every word, by how it chooses among translations.

    python -m demo.oracle

The references are one draw of the target style, as in the corpus; corpus BLEU of sacrebleu (13a, cased).
"""

import random

import sacrebleu

from demo.sentences import BASE_STYLE, TARGET_STYLE, draw_sentence, translate

SEED = 2024
SENTENCES = 2000
TRANSLATORS = {
    "draw of the base style": BASE_STYLE,
    "draw of the target style": TARGET_STYLE,
    "mode of the base style": BASE_STYLE.mode(),
    "mode of the target style": TARGET_STYLE.mode(),
}


def main() -> None:
    """Print one figure per translator."""
    rng = random.Random(f"{SEED} oracle")
    sentences = [draw_sentence(rng) for _ in range(SENTENCES)]
    references = [translate(sentence, TARGET_STYLE, rng) for sentence in sentences]
    for name, style in TRANSLATORS.items():
        translations = [translate(sentence, style, rng) for sentence in sentences]
        print(f"{name}: {sacrebleu.corpus_bleu(translations, [references]).score:.1f}")


if __name__ == "__main__":
    main()
