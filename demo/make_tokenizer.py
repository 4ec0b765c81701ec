"""Train the demo's tokenizer on generated lines and save it in Hugging Face form.

    python -m demo.make_tokenizer

A byte-level BPE of 1024 tokens: every byte, `<|end_of_text|>` = 0 (end, begin and pad) and `<|audio|>` = 1023. The
chat template is that of Granite Speech 4.0: a user turn is "USER: {content}\\n ASSISTANT:", an assistant turn its
content. The files are written here and not by transformers, so that they do not depend on its version; two runs write
the same bytes.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.sentences import (
    ASR_PROMPT,
    AST_PROMPT,
    BASE_STYLE,
    QA_PROMPT,
    QUESTIONS,
    TARGET_STYLE,
    answer,
    draw_sentence,
    questions_for,
    transcript,
    translate,
)

SEED = 2024
VOCABULARY = 1024
END = "<|end_of_text|>"
AUDIO = "<|audio|>"
LINES = 24_000
# Of 24 lines, how many are of each kind. The prompts are few and always the same, so a small part teaches them.
GERMAN, ENGLISH, ANSWERS, PROMPTS = 12, 5, 5, 2

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' + message['content'] + '\\n ASSISTANT:' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ message['content'] }}"
    "{%- else -%}{{ raise_exception('The roles are user and assistant, not ' + message['role'] + '.') }}"
    "{%- endif -%}{%- endfor -%}"
)
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END,
    "eos_token": END,
    "pad_token": END,
    "additional_special_tokens": [AUDIO],
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 512,
    "chat_template": CHAT_TEMPLATE,
}
SPECIAL_TOKENS = {"bos_token": END, "eos_token": END, "pad_token": END, "additional_special_tokens": [AUDIO]}


def training_lines(count: int) -> Iterator[str]:
    """Text as the model meets it: references after a space, and prompts inside the template without their marker."""
    rng = random.Random(f"{SEED} tokenizer")
    kinds = ["german"] * GERMAN + ["english"] * ENGLISH + ["answer"] * ANSWERS + ["prompt"] * PROMPTS
    for index in range(count):
        kind = kinds[index % len(kinds)]
        sentence = draw_sentence(rng)
        style = rng.choice((BASE_STYLE, TARGET_STYLE))
        question = rng.choice(questions_for(sentence))
        if kind == "german":
            yield " " + translate(sentence, style, rng)
        elif kind == "english":
            yield " " + transcript(sentence)
        elif kind == "answer":
            yield " " + answer(sentence, question, TARGET_STYLE, rng)
        else:
            prompt = rng.choice((AST_PROMPT, ASR_PROMPT, QA_PROMPT.format(question=QUESTIONS[question])))
            yield "USER: " + prompt.replace(AUDIO, "") + "\n ASSISTANT:"


def train() -> Tokenizer:
    """Train on LINES generated lines. The audio token is added last, so that it takes the last id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_lines(LINES), trainer)
    tokenizer.add_special_tokens([AddedToken(AUDIO, special=True, normalized=False)])
    return tokenizer


def save(tokenizer: Tokenizer, out: Path) -> None:
    """Write the files that `transformers.AutoTokenizer.from_pretrained` reads."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    for name, content in (("tokenizer_config.json", CONFIG), ("special_tokens_map.json", SPECIAL_TOKENS)):
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the demo's tokenizer.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tokenizer", help="folder to write into")
    save(train(), parser.parse_args().out)


if __name__ == "__main__":
    main()
