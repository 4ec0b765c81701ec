# SPDX-License-Identifier: Apache-2.0
"""BERTScore F1: tokens of two texts matched greedily by the cosine of their contextual embeddings.

As bert-score 0.3.13 computes it without idf weights and without rescaling: special tokens can be matched but have no
weight of their own, a text without tokens scores 0, and RoBERTa reads the first word with a space before it, like any
other (bert-score asks for that too, but transformers 5 no longer listens). One thing differs: bert-score also matches a
token with the padding of its batch, at similarity 0, so that a negative best similarity counts as 0 in some batches.
"""

import functools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

from jgrpo.rewards.bert_encoder import encode, read_config, read_json, read_params
from model_port.errors import UserError

logger = logging.getLogger(__name__)

# bert-score's choice of layer, by the name of the model without its owner (its table model2layers).
LAYERS = {
    "bert-base-uncased": 9,
    "bert-large-uncased": 18,
    "bert-base-cased-finetuned-mrpc": 9,
    "bert-base-multilingual-cased": 9,
    "bert-base-chinese": 8,
    "bert-base-turkish-cased": 10,
    "scibert_scivocab_uncased": 8,
    "scibert_scivocab_cased": 9,
    "roberta-base": 10,
    "roberta-large": 17,
    "roberta-large-mnli": 19,
    "distilroberta-base": 5,
    "xlm-roberta-base": 9,
    "xlm-roberta-large": 17,
}
# A text is padded to the smallest of these that holds it, so that few programs are compiled.
_LENGTHS = (16, 32, 64, 128, 256)
_BATCH = 32
# Examples whose embeddings are in memory at one time.
_EXAMPLES = 1024


class BertScore:
    """A model with its tokenizer; called, it scores examples, float64 [N], at most 1 and in practice above 0.

    Texts longer than the model takes are cut, as bert-score does, and that is logged once.

    Attributes:
        name: of the model.
        layer: whose output is compared; 0 is the embeddings'.

    Args:
        directory: a Hugging Face directory of a BERT or RoBERTa: config.json, tokenizer.json, *.safetensors.
        layer: None for bert-score's choice, for models in LAYERS. Their name is looked for in the path, which may be a
            snapshot in the cache of the Hugging Face hub, and in config.json's _name_or_path.

    Raises:
        UserError: files are missing or of another kind of model, or the layer is unknown or not in the model.
    """

    def __init__(self, directory: str, layer: int | None = None):
        path = Path(directory)
        config = read_config(path)
        names = _names(path)
        self.name = next((name for name in names if name in LAYERS), names[0])
        self.layer = LAYERS.get(self.name) if layer is None else layer
        if self.layer is None:
            raise UserError(
                f"BERTScore's layer for the model in {directory} is unknown: it is called {' or '.join(names)}, and "
                f"bert-score's choice is known for {', '.join(LAYERS)}. Set metrics.bertscore_layer."
            )
        if not 0 <= self.layer <= config.num_layers:
            raise UserError(
                f"metrics.bertscore_layer is {self.layer}; the model in {directory} has layers 0 (embeddings) to "
                f"{config.num_layers}."
            )
        self._prefix = " " if config.model_type == "roberta" else ""
        self._tokenizer, self._max_tokens = _load_tokenizer(path, config.max_tokens)
        self._special = np.array(self._tokenizer.encode("").ids)
        if not self._special.size:
            raise UserError(f"{path / 'tokenizer.json'} adds no [CLS] and [SEP] to a text, which BERTScore relies on.")
        self._pad_id = config.pad_id or 0
        self._params = read_params(path, self.layer)
        self._encode = jax.jit(functools.partial(encode, config=config))
        self._warned = False

    @property
    def label(self) -> str:
        """How a score is computed."""
        return f"BERTScore F1, {self.name}, layer {self.layer}, no idf, no rescaling, mean over examples"

    def __call__(self, completions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        scores = np.empty(len(completions))
        for start in range(0, len(completions), _EXAMPLES):
            part = slice(start, start + _EXAMPLES)
            pairs = list(zip(completions[part], references[part], strict=True))
            embedded = self._embed(dict.fromkeys(text for pair in pairs for text in pair))
            scores[part] = [_f1(*embedded[completion], *embedded[reference]) for completion, reference in pairs]
        return scores

    def _embed(self, texts: Iterable[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Unit embeddings [L, D] and weights [L] of each text's tokens, whatever other texts there are."""
        buckets, embedded = {}, {}
        for text in texts:
            ids = self._tokenize(text)
            length = next((length for length in _LENGTHS if len(ids) <= length), self._max_tokens)
            buckets.setdefault(min(length, self._max_tokens), []).append((text, ids))
        for length, members in buckets.items():
            for start in range(0, len(members), _BATCH):
                batch = members[start : start + _BATCH]
                tokens, mask = np.full((_BATCH, length), self._pad_id, np.int32), np.zeros((_BATCH, length), bool)
                for row, (_, ids) in enumerate(batch):
                    tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
                out = np.asarray(self._encode(self._params, tokens, mask))
                for row, (text, ids) in enumerate(batch):
                    vectors = out[row, : len(ids)]
                    weights = np.isin(ids, self._special, invert=True).astype(np.float64)
                    embedded[text] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True), weights
        return embedded

    def _tokenize(self, text: str) -> list[int]:
        text = text.strip()
        encoding = self._tokenizer.encode(self._prefix + text if text else "")
        if encoding.overflowing and not self._warned:
            self._warned = True
            logger.warning(
                "BERTScore cuts texts to the %d tokens that %s takes; the first one cut begins %r.",
                self._max_tokens,
                self.name,
                text[:80],
            )
        return encoding.ids


@functools.lru_cache(1)
def load_bertscore(directory: str, layer: int | None) -> BertScore:
    """The model, read once for all that ask for the same one."""
    return BertScore(directory, layer)


def _names(path: Path) -> list[str]:
    """What the model may be called, the likeliest first."""
    path = path.absolute()
    names = [path.name]
    if path.parent.name == "snapshots":  # models--owner--name/snapshots/revision
        names.insert(0, path.parent.parent.name.split("--")[-1])
    saved_as = read_json(path / "config.json").get("_name_or_path")
    return list(dict.fromkeys(names + ([Path(saved_as).name] if saved_as else [])))


def _load_tokenizer(path: Path, max_tokens: int) -> tuple[Tokenizer, int]:
    """The tokenizer, cutting at the longest text that both it and the model allow, and that length."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{path} has no tokenizer.json. Write one with transformers: AutoTokenizer.from_pretrained(…)."
            "save_pretrained(…)."
        )
    side = path / "tokenizer_config.json"
    if side.is_file():
        max_tokens = min(max_tokens, read_json(side).get("model_max_length") or max_tokens)
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer, max_tokens


def _f1(said: np.ndarray, said_weights: np.ndarray, wanted: np.ndarray, wanted_weights: np.ndarray) -> float:
    """Harmonic mean of the weighted mean best similarity of each side's tokens.

    Args:
        said: unit embeddings of the completion's tokens; `wanted` of the reference's.
    """
    if not said_weights.any() or not wanted_weights.any():
        return 0.0
    similarity = said @ wanted.T
    precision = np.average(similarity.max(axis=1), weights=said_weights)
    recall = np.average(similarity.max(axis=0), weights=wanted_weights)
    return min(float(2 * precision * recall / (precision + recall)), 1.0)
