import datetime
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tokenizers import processors

from model_port.batch import Completions
from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.features import log_mel
from model_port.processor import Processor, _auto_tokenizer
from tests.model_port.toy_tokenizer import END, GRANITE3, GRANITE4, make_model_dir

PROMPT = "<|audio|>can you transcribe the speech into a written format?"


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def processor(model_dir):
    return Processor.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def granite4(tmp_path_factory):
    return Processor.from_pretrained(make_model_dir(tmp_path_factory.mktemp("model"), template=GRANITE4))


def hf_tokenizer(path):
    return _auto_tokenizer().from_pretrained(path)


def text_of(processor, row) -> str:
    return processor._tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parity
@pytest.mark.parametrize("system", [None, "", "You are Granite."])
@pytest.mark.parametrize("template", [GRANITE3, GRANITE4], ids=["3.3", "4.x"])
def test_token_ids_equal_transformers(model_dir, template, system):
    from transformers import GraniteSpeechFeatureExtractor, GraniteSpeechProcessor

    tokenizer = hf_tokenizer(model_dir)
    reference = GraniteSpeechProcessor(GraniteSpeechFeatureExtractor(), tokenizer)
    waves = [noise(16000), noise(4321), noise(40000)]
    users = [PROMPT, "First <|audio|> then <|audio|>: which is louder?"]
    if system and template == GRANITE4:
        template = "{%- for message in messages %}{{- message['role'] + ': ' + message['content'] }}{% endfor %}"
    texts = [
        tokenizer.apply_chat_template(
            [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": user}],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )
        for user in users
    ]
    today = datetime.date.today().strftime("%B %d, %Y")
    texts = [text.replace(today, "April 09, 2025") for text in texts]
    if system == "" and template == GRANITE3:  # the template's own system turn goes
        texts = [text[text.index("<|end_of_text|>\n") + len("<|end_of_text|>\n") :] for text in texts]
    expected = reference(texts, waves, return_tensors="np")

    batch = Processor.from_pretrained(model_dir, template=template)(audio=waves, prompts=users, system=system)
    for p in range(2):
        keep = expected["attention_mask"][p].astype(bool)
        np.testing.assert_array_equal(batch.tokens[p][batch.mask[p]], expected["input_ids"][p][keep])


USER_TURN = "<|start_of_role|>user<|end_of_role|>hello<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (
            None,
            "Knowledge Cutoff Date: April 2024.\nToday's Date: April 09, 2025.\n"
            "You are Granite, developed by IBM. You are a helpful AI assistant.",
        ),
        ("Be brief.", "Be brief."),
        ("", None),
    ],
    ids=["the template's", "given", "none"],
)
@pytest.mark.parametrize("needs_user", [False, True])
def test_the_system_turn(model_dir, system, expected, needs_user):
    check = "{%- if messages[-1]['role'] != 'user' %}{{ raise_exception('a user speaks last') }}{% endif %}"
    template = check + GRANITE3 if needs_user else GRANITE3
    turn = "" if expected is None else f"<|start_of_role|>system<|end_of_role|>{expected}<|end_of_text|>\n"
    processor = Processor.from_pretrained(model_dir, template=template)
    assert text_of(processor, processor.encode_prompts(["hello"], system=system)[0]) == turn + USER_TURN


def test_nothing_is_added_to_the_template(model_dir):
    """Not even by a tokenizer that puts a token in front of every text, unless told otherwise."""
    processor = Processor.from_pretrained(model_dir)
    prompt, reference = processor.encode_prompts([PROMPT]), processor.encode_reference("hello")
    begins = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, processor.eos_ids[0])])
    processor._tokenizer.backend_tokenizer.post_processor = begins
    assert processor._tokenizer.encode("hello")[0] == processor.eos_ids[0]
    assert processor.encode_prompts([PROMPT]) == prompt
    assert processor.encode_reference("hello") == reference


def test_a_template_without_system_turn(granite4):
    for system in (None, ""):
        (row,) = granite4.encode_prompts(["hello"], system=system)
        assert text_of(granite4, row) == "USER: hello\n ASSISTANT:"
    whole = "{%- for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="no place for a system message"):
        Processor(granite4._tokenizer, _config(granite4), template=whole).encode_prompts(["hello"], system="Be brief.")


def test_a_template_that_refuses_system_messages(granite4):
    strict = "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + GRANITE4
    refusing = Processor(granite4._tokenizer, _config(granite4), template=strict)
    assert refusing.encode_prompts(["hello"]) == granite4.encode_prompts(["hello"])
    with pytest.raises(UserError, match="fails on the roles .system, user.*no system role"):
        refusing.encode_prompts(["hello"], system="Be brief.")


def test_a_default_that_cannot_be_left_out(granite4):
    within = (
        "{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}Be brief.{% endif %}"
        " USER: {{ messages[-1]['content'] }}"
    )
    processor = Processor(granite4._tokenizer, _config(granite4), template=within)
    assert text_of(processor, processor.encode_prompts(["hello"])[0]) == "Be brief. USER: hello"
    with pytest.raises(UserError, match="turn of its own"):
        processor.encode_prompts(["hello"], system="")


def _config(processor):
    return GraniteSpeechConfig.tiny(audio_token_id=processor.audio_id, eos_token_ids=processor.eos_ids)


def test_messages_as_they_are(model_dir):
    bare = Processor.from_pretrained(model_dir, template="{{ messages[-1]['content'] }}")
    assert text_of(bare, bare.encode_prompts([PROMPT])[0]) == PROMPT


def test_audio_tokens_slots_and_padding(processor):
    """16000 samples: 50 frames, 4 windows, 12 embeddings. 4800 samples: 15 frames, 1 window, 3 embeddings."""
    waves = [noise(16000), noise(4800, 1), noise(16000, 2), noise(4800, 3)]
    batch = processor(audio=waves, prompts=["one <|audio|>", "two <|audio|> and <|audio|>, <|audio|>"])
    assert batch.features.shape == (2, 3, 50, 160)
    np.testing.assert_array_equal(batch.lengths, [[50, 0, 0], [15, 50, 15]])
    np.testing.assert_array_equal(batch.features[1, 0, :15], log_mel(waves[1]))
    assert not batch.features[1, 0, 15:].any()
    assert not batch.features[0, 1:].any()
    np.testing.assert_array_equal(batch.audio_slots >= 0, batch.tokens == processor.audio_id)
    slots = [row[row >= 0].tolist() for row in batch.audio_slots]
    assert slots == [list(range(12)), [0, 1, 2, *range(12, 24), 24, 25, 26]]
    assert batch.mask[:, 0].all()
    assert (np.diff(batch.mask.astype(int), axis=1) <= 0).all()
    np.testing.assert_array_equal(batch.tokens[~batch.mask], processor.pad_id)


def test_the_mask_does_not_come_from_pad_ids(processor):
    """The end token inside the template is the pad token of this model, and counts."""
    batch = processor(audio=[noise(4800)], prompts=["<|audio|>"], system="", prompt_tokens=64)
    assert processor.pad_id == processor.eos_ids[0]
    assert ((batch.tokens == processor.pad_id) & batch.mask).sum() == 1


def test_padding_to_a_bucket_changes_no_row(processor):
    waves = [noise(4800), noise(16000, 1)]
    small = processor(audio=waves[:1], prompts=[PROMPT], system="")
    large = processor(audio=waves, prompts=[PROMPT, PROMPT], system="", audio_frames=75, prompt_tokens=100)
    assert large.features.shape == (2, 1, 75, 160)
    assert large.tokens.shape == (2, 100)
    np.testing.assert_array_equal(large.features[0, 0, :15], small.features[0, 0])
    np.testing.assert_array_equal(large.tokens[0][large.mask[0]], small.tokens[0][small.mask[0]])
    np.testing.assert_array_equal(large.audio_slots[0][large.mask[0]], small.audio_slots[0])


def test_the_window_comes_from_the_config(tmp_path):
    processor = Processor.from_pretrained(make_model_dir(tmp_path, window_size=10))
    batch = processor(audio=[noise(16000)], prompts=["<|audio|>"])
    assert (batch.audio_slots >= 0).sum() == 2 * 5


def test_files_and_arrays_are_the_same(processor, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(4800), 16000, subtype="FLOAT")
    files = processor(audio=[tmp_path / "a.wav", str(tmp_path / "a.wav")], prompts=[PROMPT, PROMPT])
    arrays = processor(audio=[noise(4800)] * 2, prompts=[PROMPT, PROMPT])
    np.testing.assert_array_equal(files.features, arrays.features)


def test_prompts_without_audio(processor):
    batch = processor(audio=[], prompts=["hello", "hello, world"])
    assert batch.lengths.shape == (2, 0) and batch.features.shape == (2, 0, 1, 160)
    assert (batch.audio_slots == -1).all()


@pytest.mark.parametrize(
    ("audio", "prompts", "sizes", "message"),
    [
        ([noise(4800)], ["<|audio|>", "<|audio|>"], {}, r"2 <\|audio\|> markers \(1, 1 by row\) and 1 clips"),
        ([noise(4800)], ["no marker"], {}, r"0 <\|audio\|> markers .* and 1 clips"),
        ([noise(4800), noise(100)], ["<|audio|><|audio|>"], {}, "clip 1: audio has 100 samples"),
        ([noise(4800)], ["<|audio|>"], {"audio_frames": 14}, "row 0 has 15 audio frames .* padded to 14"),
        ([noise(4800)], ["<|audio|>"], {"prompt_tokens": 5}, "row 0 has .* prompt tokens, audio included, .* to 5"),
        (["missing.wav"], ["<|audio|>"], {}, "missing.wav: no such audio file"),
        ([noise(4800)], "<|audio|>", {}, "are lists"),
    ],
)
def test_what_does_not_fit_is_refused(processor, audio, prompts, sizes, message):
    with pytest.raises(UserError, match=message):
        processor(audio=audio, prompts=prompts, **sizes)


def completions(rows: list[list[list[int]]]) -> Completions:
    longest = max(len(row) for group in rows for row in group)
    shape = (len(rows), len(rows[0]), longest)
    tokens, mask = np.full(shape, 7, np.int32), np.zeros(shape, bool)
    for p, group in enumerate(rows):
        for g, row in enumerate(group):
            tokens[p, g, : len(row)] = row
            mask[p, g, : len(row)] = True
    return Completions(tokens=tokens, mask=mask, logp=np.zeros(shape, np.float32))


def test_decode_returns_the_text_under_the_mask(processor):
    texts = [["the  quick fox .", " Fuchs ?"], ["können", ""]]
    encode = processor._tokenizer.encode
    rows = [[[*encode(text, add_special_tokens=False), processor.eos_ids[0]] for text in group] for group in texts]
    rows[0][0].insert(2, processor.audio_id)
    assert processor.decode(completions(rows)) == texts


def test_a_completion_cut_before_its_end_keeps_its_last_token(processor):
    ids = processor._tokenizer.encode("the quick", add_special_tokens=False)
    assert processor.decode(completions([[ids]])) == [["the quick"]]


@pytest.mark.parametrize("text", ["der schnelle Fuchs", " leading space", "two  spaces .", "x", "Ärger & 你好"])
def test_references_are_what_decode_inverts(processor, granite4, text):
    row = processor.encode_reference(text)
    assert row[-1] == processor.eos_ids[0]
    assert processor.decode(completions([[row]])) == [[text]]
    row = granite4.encode_reference(text)
    assert granite4.decode(completions([[row]])) == [[text if text[0] == " " else " " + text]]


@pytest.mark.parametrize("text", [f"before {END} after", "a <|audio|> marker"])
def test_references_may_not_hold_control_tokens(processor, text):
    with pytest.raises(UserError, match="which has a meaning of its own"):
        processor.encode_reference(text)


def test_a_prompt_that_ends_in_whitespace_takes_no_space(model_dir):
    spaced = Processor.from_pretrained(model_dir, template="{{ messages[-1]['content'] + '\n' }}")
    assert spaced.decode(completions([[spaced.encode_reference("hello")]])) == [["hello"]]


def test_end_ids_of_the_config_follow_the_tokenizers(model_dir, tmp_path):
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = [5, 0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Processor.from_pretrained(tmp_path).eos_ids == (0, 5)


def test_an_older_file_for_the_chat_template(tmp_path):
    make_model_dir(tmp_path, template=None)
    with pytest.raises(UserError, match="no chat template: put chat_template.jinja"):
        Processor.from_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": GRANITE4}))
    processor = Processor.from_pretrained(tmp_path)
    assert text_of(processor, processor.encode_prompts(["hello"])[0]) == "USER: hello\n ASSISTANT:"


@pytest.mark.parametrize("nested", [False, True])
def test_another_front_end_is_refused(tmp_path, nested):
    make_model_dir(tmp_path)
    settings = {"melspec_kwargs": {"sample_rate": 16000, "n_fft": 512, "hop_length": 160, "n_mels": 80}}
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps({"feature_extractor": settings} if nested else settings))
    Processor.from_pretrained(tmp_path)
    settings["melspec_kwargs"]["hop_length"] = 80
    (tmp_path / name).write_text(json.dumps({"feature_extractor": settings} if nested else settings))
    with pytest.raises(UserError, match=f"{name} sets hop_length to 80; only 160"):
        Processor.from_pretrained(tmp_path)


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a model directory"):
        Processor.from_pretrained(tmp_path / "nowhere")
    make_model_dir(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "audio_token_index": 9}))
    with pytest.raises(UserError, match=r"maps <\|audio\|> to 3 and config.json has audio_token_index 9"):
        Processor.from_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        Processor.from_pretrained(tmp_path)


def test_torch_is_not_needed_nor_missed(model_dir):
    """transformers remarks on its absence when imported; nobody who only tokenizes needs to read that."""
    program = """if True:
        import sys
        sys.modules["torch"] = None
        from model_port.processor import Processor
        processor = Processor.from_pretrained(sys.argv[1])
        print(len(processor.encode_reference("hello")) > 1)
    """
    command = [sys.executable, "-c", program, str(model_dir)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")
