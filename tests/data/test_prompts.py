import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jgrpo.data import read_manifest
from jgrpo.data.prompts import TASKS, ask, choose, template_columns
from model_port.errors import UserError
from model_port.processor import AUDIO_MARKER

ASK = ("<|audio|> What of {topic}?", "Hear <|audio|> and tell of {topic}.", "{topic}: <|audio|>")


def test_the_papers_prompts_come_first():
    assert TASKS["librisqa_part1"].prompts[0] == (
        "Listen to the audio <|audio|> and answer the following question:{question}"
    )
    assert TASKS["covost2"].prompts[0] == "<|audio|> listen to the speech and translate it into {language}."
    for task in TASKS.values():
        assert len(set(task.prompts)) == len(task.prompts) > 2
        columns = {template_columns(template) for template in task.prompts}
        assert len(columns) == 1 and all(template.count(AUDIO_MARKER) == 1 for template in task.prompts)


def test_texts_are_put_in_as_they_are():
    columns = {"topic": ["{a} %s {{", "b"], "n": [3, 0.5]}
    prompts, faults = ask(["<|audio|> {{x}} {topic} {n}"], columns, None, 2)
    assert prompts == ["<|audio|> {x} {a} %s {{ 3", "<|audio|> {x} b 0.5"] and not faults


def test_the_choice_depends_on_what_the_example_is_alone():
    names = [f"example {k}" for k in range(300)]
    chosen = [choose(name, 3) for name in names]
    assert min(chosen.count(k) for k in range(3)) > 70
    program = f"from jgrpo.data.prompts import choose\nprint([choose(name, 3) for name in {names!r}])"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == chosen


def test_training_varies_and_evaluation_does_not(write_manifest, rows):
    for row in rows:
        del row["prompt"]
    path = write_manifest([{**row, "id": f"{k}"} for k, row in enumerate(rows)])
    varied = read_manifest(path, prompts=ASK, vary=True).prompts
    expected = [ASK[choose(f"{k}", 3)].format(topic=f"topic {k}") for k in range(7)]
    assert varied == expected and len({text[:4] for text in varied}) > 1
    first = read_manifest(path, prompts=ASK)
    assert first.prompts == [f"<|audio|> What of topic {k}?" for k in range(7)]
    # Whatever the order of the lines.
    backwards = write_manifest([{**row, "id": f"{k}"} for k, row in reversed(list(enumerate(rows)))])
    assert read_manifest(backwards, prompts=ASK, vary=True).prompts == varied[::-1]
    # Without an id an example is known by all that its line says.
    for _ in range(2):
        unnamed = read_manifest(write_manifest(rows), prompts=ASK, vary=True).prompts
        rows.reverse()
        assert unnamed == read_manifest(write_manifest(rows), prompts=ASK, vary=True).prompts[::-1]


def test_another_column_as_the_reference(write_manifest, rows):
    for row in rows:
        del row["reference"]
    examples = read_manifest(write_manifest(rows), reference="topic")
    assert examples.references == [f"topic {k}" for k in range(7)] == examples.columns["topic"]
    with pytest.raises(UserError, match="train.jsonl: the references are to be 'topics'; there are topic"):
        read_manifest(write_manifest(rows), reference="topics")
    rows[3]["topic"] = " "
    with pytest.raises(UserError, match="line 4: 'topic' is ' '; a text is needed"):
        read_manifest(write_manifest(rows), reference="topic")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "<|audio|> {subject}?",
            r"template '<\|audio\|> \{subject\}\?' names the column 'subject'; there are topic, n",
        ),
        ("{topic}?", r"template '\{topic\}\?' holds 0 <\|audio\|> markers and an example has 1 clips"),
        ("<|audio|><|audio|>", "holds 2 <|audio|> markers"),
        ("<|audio|> {topic", "'<|audio|> {topic': .*a brace that names no column is written twice"),
        ("<|audio|> {}", r"\{\} is not the name of a column"),
        ("<|audio|> {topic!r}", r"\{topic\} is not the name"),
        ("<|audio|> {topic:3}", r"\{topic\} is not the name"),
        ("<|audio|> {topic.x}", r"\{topic.x\} is not the name"),
    ],
)
def test_a_template_that_does_not_belong_to_the_data(write_manifest, rows, template, message):
    rows[0]["n"] = 3
    message = message.replace("<|audio|>", r"<\|audio\|>").replace("'{", r"'\{") if "\\" not in message else message
    with pytest.raises(UserError, match=message):
        read_manifest(write_manifest(rows), prompts=(ASK[0], template))


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, "the prompt needs 'topic', which is None; a text is needed"),
        ("", "which is ''"),
        (["x"], r"which is \['x'\]"),
        ("a <|audio|>", r"'topic' holds <\|audio\|>, which stands for a clip"),
    ],
)
def test_a_line_that_a_template_cannot_be_filled_from(write_manifest, rows, value, fault):
    rows[2]["topic"] = value
    with pytest.raises(UserError, match=f"1 unusable line.*\n  line 3: .*{fault}"):
        read_manifest(write_manifest(rows), prompts=ASK)


def test_as_many_markers_as_clips(write_manifest, rows):
    rows[1]["audio"] = ["0.wav", "1.wav"]
    rows[1]["prompt"] = "<|audio|><|audio|>"
    with pytest.raises(UserError, match="holds 1 .* markers and an example has 2 clips"):
        read_manifest(write_manifest(rows), prompts=ASK)
