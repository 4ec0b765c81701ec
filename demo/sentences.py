"""A small grammar of spoken English with hand-written German, and two translators who prefer different words.

A sentence is a subject, a verb and an object, and may have an adjective, a place and a time. Its German is drawn: about
half of the words have a synonym, and a time or a place may come before the verb. BASE_STYLE and TARGET_STYLE are two
translators with one grammar and other preferences, so a model that learned from the first knows the language but not
the habits of the second. Everything here is a pure function of its arguments; what is random comes from a given
`random.Random`.
"""

import random
from dataclasses import dataclass, replace

AST_PROMPT = "<|audio|> listen to the speech and translate it into German."
ASR_PROMPT = "<|audio|> can you transcribe the speech into a written format?"
QA_PROMPT = "Listen to the audio <|audio|> and answer the following question: {question}"


@dataclass(frozen=True)
class Noun:
    """A German noun: its gender (m, f or n) and both numbers. The accusative of every noun here is its nominative."""

    gender: str
    singular: str
    plural: str = ""


# Each entry: the English word, then the first German choice and, for about half of the words, the second.
SUBJECTS = {
    "boy": (Noun("m", "Junge"), Noun("m", "Bub")),
    "girl": (Noun("n", "Mädchen"), Noun("n", "Mädel")),
    "man": (Noun("m", "Mann"),),
    "woman": (Noun("f", "Frau"), Noun("f", "Dame")),
    "child": (Noun("n", "Kind"),),
    "grandmother": (Noun("f", "Großmutter"), Noun("f", "Oma")),
    "teacher": (Noun("m", "Lehrer"),),
    "doctor": (Noun("m", "Arzt"), Noun("m", "Doktor")),
    "nurse": (Noun("f", "Krankenschwester"), Noun("f", "Pflegerin")),
    "farmer": (Noun("m", "Bauer"), Noun("m", "Landwirt")),
    "baker": (Noun("m", "Bäcker"),),
    "queen": (Noun("f", "Königin"),),
}
VERBS = {
    "buys": ("kauft", "erwirbt"),
    "sells": ("verkauft",),
    "finds": ("findet", "entdeckt"),
    "sees": ("sieht",),
    "paints": ("malt",),
    "needs": ("braucht", "benötigt"),
    "wants": ("will", "möchte"),
    "cleans": ("putzt", "säubert"),
    "carries": ("trägt", "schleppt"),
    "loses": ("verliert",),
    "gets": ("bekommt", "erhält"),
    "hides": ("versteckt",),
}
OBJECTS = {
    "car": (Noun("n", "Auto", "Autos"), Noun("m", "Wagen", "Wagen")),
    "book": (Noun("n", "Buch", "Bücher"),),
    "picture": (Noun("n", "Bild", "Bilder"), Noun("n", "Gemälde", "Gemälde")),
    "letter": (Noun("m", "Brief", "Briefe"),),
    "bag": (Noun("f", "Tasche", "Taschen"), Noun("m", "Beutel", "Beutel")),
    "horse": (Noun("n", "Pferd", "Pferde"),),
    "table": (Noun("m", "Tisch", "Tische"),),
    "chair": (Noun("m", "Stuhl", "Stühle"), Noun("m", "Sessel", "Sessel")),
    "lamp": (Noun("f", "Lampe", "Lampen"), Noun("f", "Leuchte", "Leuchten")),
    "cake": (Noun("m", "Kuchen", "Kuchen"), Noun("f", "Torte", "Torten")),
    "flower": (Noun("f", "Blume", "Blumen"),),
    "hat": (Noun("m", "Hut", "Hüte"),),
}
# Stems that take every ending unchanged.
ADJECTIVES = {
    "big": ("groß", "riesig"),
    "small": ("klein", "winzig"),
    "old": ("alt",),
    "new": ("neu",),
    "red": ("rot",),
    "green": ("grün",),
    "pretty": ("schön", "hübsch"),
    "cheap": ("billig", "günstig"),
    "heavy": ("schwer",),
    "strange": ("seltsam", "merkwürdig"),
}
PLACES = {
    "in the garden": ("im Garten",),
    "in the kitchen": ("in der Küche",),
    "at the market": ("auf dem Markt", "auf dem Marktplatz"),
    "at school": ("in der Schule",),
    "at the station": ("am Bahnhof",),
    "in the shop": ("im Laden", "im Geschäft"),
    "in the forest": ("im Wald",),
    "at home": ("zu Hause", "daheim"),
    "in the basement": ("im Keller", "im Untergeschoss"),
    "in the hospital": ("im Krankenhaus", "in der Klinik"),
}
TIMES = {
    "today": ("heute",),
    "now": ("jetzt", "nun"),
    "every day": ("täglich", "jeden Tag"),
    "in the morning": ("am Morgen", "morgens"),
    "at night": ("nachts", "in der Nacht"),
    "on Sunday": ("am Sonntag",),
    "this week": ("diese Woche",),
    "in winter": ("im Winter",),
}
NUMBERS = {
    2: ("two", "zwei"),
    3: ("three", "drei"),
    4: ("four", "vier"),
    5: ("five", "fünf"),
    6: ("six", "sechs"),
    7: ("seven", "sieben"),
}
# Which optional parts a sentence has: adjective, place, time.
PATTERNS = ("ap", "at", "pt", "apt")

NOMINATIVE_THE = {"m": "Der", "f": "Die", "n": "Das"}
ACCUSATIVE_A = {"m": "einen", "f": "eine", "n": "ein"}
ENDING_AFTER_A = {"m": "en", "f": "e", "n": "es"}
ENDING_AFTER_NUMBER = "e"

QUESTIONS = {
    "who": "Who is it about?",
    "what": "What thing is mentioned?",
    "how many": "How many of them are there?",
    "how": "How is it described?",
    "where": "Where does it happen?",
    "when": "When does it happen?",
}


@dataclass(frozen=True)
class Sentence:
    """The meaning of one sentence, as keys of the tables above. `count` is 1 ("a") to 7; None means: not said."""

    subject: str
    verb: str
    object: str
    count: int
    adjective: str | None = None
    place: str | None = None
    time: str | None = None


@dataclass(frozen=True)
class Style:
    """What a translator prefers, as probabilities.

    Attributes:
        second: taking the second German word where there are two.
        front: beginning with the time, or with the place where no time is said.
        front_place: beginning with the place although a time is said, given that the time was not put first.
        transcript: answering a question with the whole transcript.
        short: answering it with a short sentence; otherwise the bare phrase.
    """

    second: float
    front: float
    front_place: float
    transcript: float
    short: float

    def mode(self) -> "Style":
        """The same translator, always taking the likelier choice."""
        return replace(self, second=round(self.second), front=round(self.front), front_place=round(self.front_place))


BASE_STYLE = Style(second=0.35, front=0.30, front_place=0.15, transcript=0.60, short=0.40)
TARGET_STYLE = Style(second=0.75, front=0.70, front_place=0.15, transcript=0.0, short=0.65)


def draw_sentence(rng: random.Random) -> Sentence:
    """Draw a sentence: 90 % have two or three optional parts, 10 % none; 40 % have one object, the rest 2 to 7."""
    pattern = rng.choice(PATTERNS) if rng.random() < 0.9 else ""
    return Sentence(
        subject=rng.choice(list(SUBJECTS)),
        verb=rng.choice(list(VERBS)),
        object=rng.choice(list(OBJECTS)),
        count=1 if rng.random() < 0.4 else rng.choice(list(NUMBERS)),
        adjective=rng.choice(list(ADJECTIVES)) if "a" in pattern else None,
        place=rng.choice(list(PLACES)) if "p" in pattern else None,
        time=rng.choice(list(TIMES)) if "t" in pattern else None,
    )


def draw_splits(sizes: dict[str, int], seed: int) -> dict[str, list[Sentence]]:
    """Draw the sentences of every split, in the order given; no sentence occurs twice, in one split or in two."""
    rng = random.Random(seed)
    seen = set()
    splits = {}
    for name, size in sizes.items():
        splits[name] = []
        while len(splits[name]) < size:
            sentence = draw_sentence(rng)
            if sentence not in seen:
                seen.add(sentence)
                splits[name].append(sentence)
    return splits


def transcript(sentence: Sentence) -> str:
    """The English sentence as written.

    >>> transcript(Sentence("queen", "hides", "hat", 1, adjective="old", time="at night"))
    'The queen hides an old hat at night.'
    """
    words = ["The", sentence.subject, sentence.verb]
    if sentence.count == 1:
        words.append(_a_or_an(sentence.adjective or sentence.object))
    else:
        words.append(NUMBERS[sentence.count][0])
    words += [sentence.adjective, _english_object(sentence), sentence.place, sentence.time]
    return " ".join(word for word in words if word) + "."


def plain(text: str) -> str:
    """The letters a to z and single spaces only: what a character recogniser is asked to write."""
    return "".join(c for c in text.lower() if c.isalpha() or c == " ")


def translate(sentence: Sentence, style: Style, rng: random.Random) -> str:
    """Draw a German translation.

    The parts after the verb stand in the order subject (where something else comes first), time, place, object.
    """
    subject = _choose(SUBJECTS[sentence.subject], style, rng)
    subject_words = f"{NOMINATIVE_THE[subject.gender]} {subject.singular}"
    verb = _choose(VERBS[sentence.verb], style, rng)
    goal = _german_object(sentence, style, rng)
    time = _choose(TIMES[sentence.time], style, rng) if sentence.time else None
    place = _choose(PLACES[sentence.place], style, rng) if sentence.place else None
    middle = [time, place]
    first = _first(time, place, style, rng)
    if first is None:
        words = [subject_words, verb, *middle, goal]
    else:
        middle.remove(first)
        words = [_capital(first), verb, _uncapital(subject_words), *middle, goal]
    return " ".join(word for word in words if word) + "."


def questions_for(sentence: Sentence) -> list[str]:
    """The kinds of question (keys of QUESTIONS) that the sentence answers."""
    said = {"how": sentence.adjective, "where": sentence.place, "when": sentence.time}
    return [kind for kind in QUESTIONS if said.get(kind, True)]


def answer(sentence: Sentence, kind: str, style: Style, rng: random.Random) -> str:
    """Draw an English answer to a question of this kind: the transcript, a short sentence or the bare phrase."""
    draw = rng.random()
    if draw < style.transcript:
        return transcript(sentence)
    lead, phrase = _answer_parts(sentence, kind)
    return f"{lead} {phrase}." if draw < style.transcript + style.short else _capital(phrase) + "."


def _answer_parts(sentence: Sentence, kind: str) -> tuple[str, str]:
    """The beginning of the short sentence, and the phrase that answers the question."""
    one = sentence.count == 1
    if kind == "who":
        return "It is", f"the {sentence.subject}"
    if kind == "what":
        return ("It is", f"a {sentence.object}") if one else ("They are", _english_object(sentence))
    if kind == "how many":
        return ("There is", "one") if one else ("There are", NUMBERS[sentence.count][0])
    if kind == "how":
        return "It is" if one else "They are", sentence.adjective
    return "It happens", sentence.place if kind == "where" else sentence.time


def _first(time: str | None, place: str | None, style: Style, rng: random.Random) -> str | None:
    """The part that comes before the verb; None for the subject."""
    if (time or place) and rng.random() < style.front:
        return time or place
    if time and place and rng.random() < style.front_place:
        return place
    return None


def _german_object(sentence: Sentence, style: Style, rng: random.Random) -> str:
    """The accusative noun phrase: "einen großen Wagen", "drei große Autos"."""
    noun = _choose(OBJECTS[sentence.object], style, rng)
    stem = _choose(ADJECTIVES[sentence.adjective], style, rng) if sentence.adjective else None
    if sentence.count == 1:
        words = [ACCUSATIVE_A[noun.gender], stem and stem + ENDING_AFTER_A[noun.gender], noun.singular]
    else:
        words = [NUMBERS[sentence.count][1], stem and stem + ENDING_AFTER_NUMBER, noun.plural]
    return " ".join(word for word in words if word)


def _english_object(sentence: Sentence) -> str:
    return sentence.object if sentence.count == 1 else sentence.object + "s"


def _a_or_an(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _choose(options: tuple, style: Style, rng: random.Random):
    """The first or the second option; nothing is drawn where there is only one."""
    return options[1] if len(options) == 2 and rng.random() < style.second else options[0]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _uncapital(text: str) -> str:
    return text[0].lower() + text[1:]
