import json
import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from jgrpo.config import MetricOptions
from jgrpo.rewards import corpus_scores, make_reward
from jgrpo.rewards.bert_encoder import encode, read_config, read_params
from jgrpo.rewards.bertscore import BertScore, load_bertscore
from model_port.errors import UserError

LAYERS, MAX_TOKENS = 3, 40
COMPLETIONS = [
    "the cat sat on a sofa",
    "dog",
    "the big, big dog ran away!",
    "größer als 東京",
    " a  cat ",
    "u\u0308ber",
]
REFERENCES = ["the cat sat on the couch", "cat", "dog", "grob", "a cat", "über"]


def save(directory, tokenizer, model, **special):
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_TOKENS, **special)
    fast.save_pretrained(directory)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        # Large enough that layers matter and cosines spread; norms around 1, biases around 0.
        mean = 1.0 if "LayerNorm.weight" in name else 0.0
        torch.nn.init.normal_(parameter, mean, 0.4)
    model.save_pretrained(directory)
    return directory


def model_sizes(**changes):
    return dict(
        hidden_size=28, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=44, layer_norm_eps=1e-3
    ) | dict(changes)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    letters = "abcdefghijklmnopqrstuvwxyzäöüß東京"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "dog", "big", ",", "!", *letters]
    vocab = {word: number for number, word in enumerate([*words, *(f"##{letter}" for letter in letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    config = transformers.BertConfig(vocab_size=len(vocab), max_position_embeddings=MAX_TOKENS, **model_sizes())
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    return save(tmp_path_factory.mktemp("bert"), tokenizer, transformers.BertModel(config), **special)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on a sofa", "the big dog ran away"] * 5, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    config = transformers.RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=MAX_TOKENS + 2,  # positions 0 and 1 belong to padding
        type_vocab_size=1,
        **model_sizes(),
    )
    special = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    # With the head that released checkpoints have, and the prefix that it gives to the names.
    model = transformers.RobertaForMaskedLM(config)
    return save(tmp_path_factory.mktemp("roberta"), tokenizer, model, **special)


@pytest.fixture(params=["bert", "roberta"])
def directory(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("num_layers", [0, 1, LAYERS])
def test_hidden_states_are_those_of_transformers(directory, num_layers):
    config = read_config(directory)
    tokens = np.random.default_rng(0).integers(4, 40, (3, 11))
    mask = np.arange(11)[None] < np.array([[11], [6], [1]])
    tokens = np.where(mask, tokens, config.pad_id or 0)
    out = encode(read_params(directory, num_layers), jnp.asarray(tokens), jnp.asarray(mask), config=config)
    reference = transformers.AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        states = reference(torch.tensor(tokens), attention_mask=torch.tensor(mask), output_hidden_states=True)
    wanted = states.hidden_states[num_layers].numpy()
    assert np.abs(wanted[mask]).max() > 1
    np.testing.assert_allclose(np.asarray(out)[mask], wanted[mask], rtol=1e-4, atol=2e-5)


def with_leading_space(source, directory):
    """A copy of a model whose tokenizer puts a space before the first word."""
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    if tokenizer["pre_tokenizer"]["type"] == "ByteLevel":
        tokenizer["pre_tokenizer"]["add_prefix_space"] = True
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


def test_scores_are_those_of_bert_score(directory, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bert_score
    # transformers 5 dropped the method that bert-score calls for empty text, and no longer lets it ask for a space
    # before the first word.
    monkeypatch.setattr(
        transformers.PreTrainedTokenizerFast,
        "build_inputs_with_special_tokens",
        lambda self, ids: self.encode(""),
        raising=False,
    )
    completions, references = [*COMPLETIONS, "", "the cat", ""], [*REFERENCES, "dog", " ", ""]
    same = with_leading_space(directory, tmp_path)
    *_, wanted = bert_score.score(
        completions, references, model_type=str(same), num_layers=2, device="cpu", batch_size=1
    )
    scores = BertScore(str(directory), 2)(completions, references)
    np.testing.assert_allclose(scores, np.minimum(wanted.numpy(), 1), atol=2e-5)
    assert scores[-3:].tolist() == [0, 0, 0] and np.ptp(scores[:4]) > 0.05


def test_scores_do_not_depend_on_the_company(bert):
    score = BertScore(str(bert), 2)
    # More than one batch of texts, of several padded lengths.
    completions = [text + " dog" * number for number in range(7) for text in COMPLETIONS]
    references = [text + " sat" * number for number in range(7) for text in REFERENCES]
    together = score(completions, references)
    alone = [score([completion], [reference])[0] for completion, reference in zip(completions, references, strict=True)]
    np.testing.assert_array_equal(together, alone)
    assert score(COMPLETIONS, COMPLETIONS) == pytest.approx(1.0, abs=1e-6)


def test_as_a_reward_and_as_a_result_the_model_is_read_once(bert):
    options = MetricOptions(bertscore_model=str(bert), bertscore_layer=2)
    load_bertscore.cache_clear()
    scores = make_reward("bertscore", options=options)(COMPLETIONS, REFERENCES)
    for _ in range(2):
        (result,) = corpus_scores(["bertscore"], COMPLETIONS, REFERENCES, options).values()
        assert result.value == pytest.approx(100 * scores.mean())
    assert result.label == f"BERTScore F1, {bert.name}, layer 2, no idf, no rescaling, mean over examples"
    assert load_bertscore.cache_info().misses == 1


def test_long_texts_are_cut_as_bert_score_does_and_it_is_said_once(bert, caplog):
    score = BertScore(str(bert), 2)
    long = "cat " * 100
    with caplog.at_level(logging.WARNING):
        scores = score([long, "dog"], ["cat " * (MAX_TOKENS - 2), long + "dog"])
    assert scores[0] == pytest.approx(1.0, abs=1e-6) and scores[1] < 1
    (message,) = caplog.messages
    assert f"cuts texts to the {MAX_TOKENS} tokens" in message and "begins 'cat cat" in message


@pytest.mark.parametrize(
    ("where", "saved_as", "name", "layer"),
    [
        ("roberta-large", None, "roberta-large", 17),
        ("models--google-bert--bert-base-multilingual-cased/snapshots/3f07", None, "bert-base-multilingual-cased", 9),
        ("mine", "FacebookAI/roberta-base", "roberta-base", 10),
    ],
)
def test_the_layer_follows_from_the_name(bert, tmp_path, where, saved_as, name, layer):
    directory = tmp_path / where
    directory.mkdir(parents=True)
    for file in bert.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((bert / "config.json").read_text()) | {"num_hidden_layers": 24, "_name_or_path": saved_as}
    (directory / "config.json").write_text(json.dumps(config))
    weights = safetensors.torch.load_file(bert / "model.safetensors")
    for key in [key for key in weights if ".layer.0." in key]:
        weights |= {key.replace(".0.", f".{number}.", 1): weights[key].clone() for number in range(24)}
    safetensors.torch.save_file(weights, directory / "model.safetensors")
    score = BertScore(str(directory))
    assert (score.name, score.layer) == (name, layer)
    assert score._params["layers"]["up"]["bias"].shape[0] == layer


def test_first_checkpoints_call_the_norm_gamma_and_beta(bert, tmp_path):
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = safetensors.torch.load_file(bert / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        weights = {key.replace(new, name): value for key, value in weights.items()}
    weights = {f"bert.{key}": value for key, value in weights.items()}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    assert "bert.embeddings.LayerNorm.gamma" in weights
    jax.tree.map(np.testing.assert_array_equal, read_params(tmp_path, 2), read_params(bert, 2))


def spoil(directory, problem):
    config = json.loads((directory / "config.json").read_text())
    if problem in ("model_type", "hidden_act", "position_embedding_type"):
        (directory / "config.json").write_text(json.dumps(config | {problem: "other"}))
    elif problem == "tensors":
        (directory / "model.safetensors").unlink()
    elif problem == "tensor":
        weights = safetensors.torch.load_file(directory / "model.safetensors")
        del weights["encoder.layer.1.output.dense.bias"]
        safetensors.torch.save_file(weights, directory / "model.safetensors")
    elif problem == "truncated":
        (directory / "model.safetensors").write_bytes(b"not safetensors")
    else:
        (directory / problem).unlink()


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("model_type", "type 'other'; BERTScore runs bert, roberta, xlm-roberta"),
        ("hidden_act", "hidden_act 'other'; BERTScore runs 'gelu' only"),
        ("position_embedding_type", "position_embedding_type 'other'"),
        ("config.json", "must be a Hugging Face directory with config.json, tokenizer.json"),
        ("tokenizer.json", "has no tokenizer.json. Write one"),
        ("tensors", r"has no \*.safetensors. BERTScore reads no pytorch_model.bin"),
        ("tensor", "have no encoder.layer.1.output.dense.bias"),
        ("truncated", "truncated or no safetensors file"),
    ],
)
def test_what_is_wrong_with_the_directory_is_said(bert, tmp_path, problem, message):
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path, problem)
    with pytest.raises(UserError, match=message):
        BertScore(str(tmp_path), 2)


def test_model_and_layer_must_be_given(bert):
    with pytest.raises(UserError, match="set metrics.bertscore_model to a directory"):
        make_reward("bertscore")
    with pytest.raises(UserError, match=r"known for bert-base-uncased.*Set metrics.bertscore_layer"):
        make_reward("bertscore", options=MetricOptions(bertscore_model=str(bert)))
    with pytest.raises(UserError, match=r"bertscore_layer is 4; .* layers 0 \(embeddings\) to 3"):
        make_reward("bertscore", options=MetricOptions(bertscore_model=str(bert), bertscore_layer=4))
