"""A model directory with a small byte-level BPE tokenizer, trained here: nothing is downloaded."""

import dataclasses
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from model_port.config import GraniteSpeechConfig

END, START_ROLE, END_ROLE, AUDIO = "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|audio|>"

# As Granite 3.3's template reads: without a system message it makes one that contains today's date.
GRANITE3 = (
    "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{%- else %}{% set system = 'Knowledge Cutoff Date: April 2024.\n"
    "Today\\'s Date: ' + strftime_now('%B %d, %Y') + '.\n"
    "You are Granite, developed by IBM. You are a helpful AI assistant.' %}{% set rest = messages %}{% endif %}"
    "{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}"
    "{%- for message in rest %}"
    "{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
# Like the Granite 4 speech template: no system turn, no special token, and nothing after the colon.
GRANITE4 = "{%- for message in messages %}{{- 'USER: ' + message['content'] + '\n ASSISTANT:' }}{% endfor %}"

CORPUS = [
    "can you transcribe the speech into a written format?",
    "translate the speech to German.",
    "the quick brown fox jumps over the lazy dog; der schnelle braune Fuchs springt.",
]


def make_model_dir(path: Path, *, template: str | None = GRANITE3, window_size: int = 15) -> Path:
    """Write config.json and tokenizer files; the end token is the padding token too, as in Granite 3."""
    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END, START_ROLE, END_ROLE, AUDIO],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    byte_pairs.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        additional_special_tokens=[START_ROLE, END_ROLE, AUDIO],
        padding_side="left",
        clean_up_tokenization_spaces=True,
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    tiny = GraniteSpeechConfig.tiny()
    config = dataclasses.replace(
        tiny,
        decoder=dataclasses.replace(tiny.decoder, vocab_size=320),
        projector=dataclasses.replace(tiny.projector, window_size=window_size),
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO),
    )
    (path / "config.json").write_text(json.dumps(config.to_hf()[0]))
    return path
