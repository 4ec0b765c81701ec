"""The demo's grammar, its draws, and the committed corpus."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer

from demo.make_corpus import HELD_OUT_VOICES, SAMPLE_RATE, SEED, SIZES, VOICES, ogg_checksum, with_serial
from demo.make_tokenizer import AUDIO, END, VOCABULARY, train
from demo.sentences import (
    AST_PROMPT,
    BASE_STYLE,
    TARGET_STYLE,
    Sentence,
    Style,
    answer,
    draw_sentence,
    draw_splits,
    plain,
    questions_for,
    transcript,
    translate,
)

DEMO = Path(__file__).parents[2] / "demo"
COMMITTED = ("train", "val", "test", "test_voices")
MANIFESTS = (*COMMITTED, "qa_train", "qa_val", "qa_test")


def style(second: float = 0, front: float = 0, front_place: float = 0) -> Style:
    return Style(second=second, front=front, front_place=front_place, transcript=0, short=1)


FIRST_WORDS = style()
SECOND_WORDS = style(second=1)
TIME_FIRST = style(front=1)
SECOND_TIME_FIRST = style(second=1, front=1)
PLACE_FIRST = style(front_place=1)

# One of each gender in each position, both numbers, with and without an adjective, and every word order.
HAND_MADE = [
    (Sentence("boy", "buys", "car", 1), FIRST_WORDS, "Der Junge kauft ein Auto."),
    (Sentence("boy", "buys", "car", 1), SECOND_WORDS, "Der Bub erwirbt einen Wagen."),
    (Sentence("queen", "hides", "letter", 1, "old", "at school"), FIRST_WORDS,
     "Die Königin versteckt in der Schule einen alten Brief."),
    (Sentence("child", "paints", "picture", 1, "pretty", None, "now"), FIRST_WORDS,
     "Das Kind malt jetzt ein schönes Bild."),
    (Sentence("child", "paints", "flower", 1, "red", "in the garden"), FIRST_WORDS,
     "Das Kind malt im Garten eine rote Blume."),
    (Sentence("woman", "cleans", "cake", 1, "big", None, "every day"), SECOND_WORDS,
     "Die Dame säubert jeden Tag eine riesige Torte."),
    (Sentence("teacher", "sells", "book", 3, "green", "at the station", "today"), FIRST_WORDS,
     "Der Lehrer verkauft heute am Bahnhof drei grüne Bücher."),
    (Sentence("grandmother", "carries", "bag", 2, None, "in the basement", "in the morning"), TIME_FIRST,
     "Am Morgen trägt die Großmutter im Keller zwei Taschen."),
    (Sentence("grandmother", "carries", "bag", 2, None, "in the basement", "in the morning"), SECOND_TIME_FIRST,
     "Morgens schleppt die Oma im Untergeschoss zwei Beutel."),
    (Sentence("farmer", "needs", "horse", 7, "heavy", "at the market", "in winter"), PLACE_FIRST,
     "Auf dem Markt braucht der Bauer im Winter sieben schwere Pferde."),
    (Sentence("nurse", "gets", "chair", 5, "cheap", "at home"), SECOND_TIME_FIRST,
     "Daheim erhält die Pflegerin fünf günstige Sessel."),
    (Sentence("girl", "wants", "lamp", 1, "strange", "in the shop", "at night"), SECOND_TIME_FIRST,
     "In der Nacht möchte das Mädel im Geschäft eine merkwürdige Leuchte."),
    (Sentence("girl", "wants", "lamp", 1, "strange", "in the shop"), PLACE_FIRST,
     "Das Mädchen will im Laden eine seltsame Lampe."),
    (Sentence("doctor", "finds", "hat", 6, "small", "in the hospital", "on Sunday"), SECOND_WORDS,
     "Der Doktor entdeckt am Sonntag in der Klinik sechs winzige Hüte."),
    (Sentence("baker", "loses", "table", 1, "new", "in the kitchen", "this week"), TIME_FIRST,
     "Diese Woche verliert der Bäcker in der Küche einen neuen Tisch."),
    (Sentence("man", "sees", "table", 4), TIME_FIRST, "Der Mann sieht vier Tische."),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "chosen", "german"), HAND_MADE)
def test_german_agrees(sentence, chosen, german):
    assert translate(sentence, chosen, random.Random(0)) == german


def test_english():
    assert transcript(Sentence("queen", "hides", "letter", 1, "old")) == "The queen hides an old letter."
    said = transcript(Sentence("man", "sees", "table", 4, "red", "at home", "on Sunday"))
    assert said == "The man sees four red tables at home on Sunday."
    assert plain(said) == "the man sees four red tables at home on sunday"


@pytest.mark.parametrize(
    ("kind", "one", "many"),
    [
        ("who", "It is the boy.", "The boy."),
        ("what", "It is a hat.", "Hats."),
        ("how many", "There is one.", "Three."),
        ("how", "It is old.", "Old."),
        ("where", "It happens at home.", "At home."),
        ("when", "It happens now.", "Now."),
    ],
)
def test_answers(kind, one, many):
    rng = random.Random(0)
    short, bare = Style(0, 0, 0, transcript=0, short=1), Style(0, 0, 0, transcript=0, short=0)
    assert answer(Sentence("boy", "sees", "hat", 1, "old", "at home", "now"), kind, short, rng) == one
    assert answer(Sentence("boy", "sees", "hat", 3, "old", "at home", "now"), kind, bare, rng) == many


def test_a_question_asks_only_for_what_is_said():
    assert questions_for(Sentence("boy", "sees", "hat", 1)) == ["who", "what", "how many"]
    assert questions_for(Sentence("boy", "sees", "hat", 1, place="at home")) == ["who", "what", "how many", "where"]


def test_styles_have_the_stated_frequencies():
    """Standard deviation of each share below: under 0.008 (n >= 4000)."""
    rng = random.Random(1)
    timed = Sentence("boy", "sees", "table", 2, time="today")
    answered = Sentence("boy", "sees", "table", 2)
    for chosen, second, front, whole, short in ((BASE_STYLE, 0.35, 0.3, 0.6, 0.4), (TARGET_STYLE, 0.75, 0.7, 0, 0.65)):
        german = [translate(timed, chosen, rng) for _ in range(4000)]
        assert np.mean(["Bub" in text for text in german]) == pytest.approx(second, abs=0.03)
        assert np.mean([text.startswith("Heute") for text in german]) == pytest.approx(front, abs=0.03)
        said = Counter(answer(answered, "who", chosen, rng) for _ in range(4000))
        assert said[transcript(answered)] / 4000 == pytest.approx(whole, abs=0.03)
        assert said["It is the boy."] / 4000 == pytest.approx(short, abs=0.03)


def test_the_mode_of_a_style_is_its_likelier_choices():
    sentence = Sentence("boy", "buys", "hat", 1, place="at home", time="now")
    assert translate(sentence, TARGET_STYLE.mode(), random.Random(0)) == "Nun erwirbt der Bub daheim einen Hut."
    assert translate(sentence, BASE_STYLE.mode(), random.Random(0)) == "Der Junge kauft jetzt zu Hause einen Hut."


def test_the_same_generator_draws_the_same():
    def draw(seed):
        rng = random.Random(seed)
        return [translate(draw_sentence(rng), TARGET_STYLE, rng) for _ in range(50)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw_splits({"a": 20, "b": 20}, 3) == draw_splits({"a": 20, "b": 20}, 3)


def test_splits_share_no_sentence():
    splits = draw_splits(SIZES, SEED)
    assert {name: len(sentences) for name, sentences in splits.items()} == SIZES
    said = [transcript(sentence) for sentences in splits.values() for sentence in sentences]
    assert len(set(said)) == len(said) == sum(SIZES.values())


def read_manifest(name: str) -> list[dict]:
    return [json.loads(row) for row in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_is_valid(name):
    rows = read_manifest(name)
    split = name.removeprefix("qa_")
    said = [transcript(sentence) for sentence in draw_splits(SIZES, SEED)[split]]
    voices = HELD_OUT_VOICES if split == "test_voices" else VOICES
    assert [row["transcript"] for row in rows] == said
    assert len({row["id"] for row in rows}) == len({row["audio"] for row in rows}) == SIZES[split]
    for row in rows:
        assert list(row) == ["id", "audio", "prompt", "reference", "transcript", "speaker", "task", "duration"]
        assert row["task"] == ("qa" if name.startswith("qa_") else "ast")
        assert row["prompt"].count("<|audio|>") == 1
        assert row["task"] == "qa" or row["prompt"] == AST_PROMPT
        assert row["reference"] == row["reference"].strip() != ""
        assert 0.5 < row["duration"] <= 3.0
        assert (DEMO / row["audio"]).is_file()
    assert {row["speaker"] for row in rows} == set(voices)


@pytest.mark.parametrize("split", COMMITTED)
def test_audio_reads_back(split):
    for row in read_manifest(split)[::20]:
        wave, rate = soundfile.read(DEMO / row["audio"], dtype="float32")
        assert rate == SAMPLE_RATE
        assert wave.ndim == 1
        assert abs(len(wave) / rate - row["duration"]) < 0.05
        assert np.sqrt(np.mean(np.square(wave))) > 0.01
        assert np.abs(wave).max() < 0.99


def test_an_ogg_stream_takes_a_new_serial_number():
    """Putting the old number back restores the encoder's own checksums."""
    original = (DEMO / "audio/val/00007.opus").read_bytes()
    assert original[14:18] == (7).to_bytes(4, "little")
    changed = with_serial(original, 12345)
    assert changed != original
    assert with_serial(changed, 7) == original
    # The check value of CRC-32/MPEG-2 with initial value 0: one byte 1 gives the generator itself.
    assert ogg_checksum(b"\x01") == 0x04C11DB7


def test_tokenizer_is_the_one_that_the_script_makes():
    saved = Tokenizer.from_file(str(DEMO / "tokenizer" / "tokenizer.json"))
    assert saved.to_str() == train().to_str()
    assert saved.get_vocab_size() == VOCABULARY
    assert saved.token_to_id(END) == 0
    assert saved.token_to_id(AUDIO) == VOCABULARY - 1
    rows = read_manifest("val")
    # One more for the end token.
    lengths = [len(saved.encode(" " + row["reference"]).ids) + 1 for row in rows]
    assert 9.5 < np.mean(lengths) < 11
    assert max(lengths) <= 16
    text = " Zürich → 東京\n"
    assert saved.decode(saved.encode(text).ids) == text
