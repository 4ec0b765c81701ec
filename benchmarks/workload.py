"""A GRPO step to measure: random weights of a named shape, noise as speech, and exactly as many tokens as asked for.

The parts are those of a run: jgrpo.planning says which programs a run has and which arrays they take, and a Workload
fills these arrays. Sampling stops at no token: the end-of-sequence id is one past the vocabulary, so the decoding loop
runs to the last of T tokens, as it does on any implementation that is asked for the same number.
"""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from demo.base_model import CONFIG as DEMO
from jgrpo.config import DataOptions, GRPOConfig, GRPOOptions, ModelOptions
from jgrpo.core.tree import Layout, holds, layouts, pack, smallest, sort_rows
from jgrpo.planning.arrays import LONGEST, Clip, run_arrays
from jgrpo.planning.programs import AbstractRun, Call, abstract_run, calls
from jgrpo.programs.steps import Targets, truncation
from jgrpo.rollout.scoring import step_keys
from jgrpo.runtime.rows import place
from model_port.batch import Batch, Completions, Trees
from model_port.config import GraniteSpeechConfig
from model_port.errors import UserError
from model_port.features import SAMPLE_RATE, log_mel
from model_port.layers import INIT_STDDEV
from model_port.params import Params
from model_port.partition import make_mesh
from model_port.processor import AUDIO_MARKER
from model_port.published import PUBLISHED
from model_port.weights.hf_writer import write_hf

END = "<|end_of_text|>"
TEMPLATE = "{{ messages[-1]['content'] }}"
POOL = 1_000_003
CONSTANT = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}  # the other parameters are drawn
SPREAD, AT_LIMIT = 0.6, 1 / 32  # deviation of the logarithm of lengths, and the share of completions at the limit
UNLIMITED = 1e18  # bytes of a device, as far as the layout of weights is concerned


@dataclass(frozen=True)
class Size:
    """What is measured: P prompts, each with a clip and some text, G completions of T tokens.

    Attributes:
        model: demo, tiny or the name of a published model.
        text_tokens: of a prompt; with the 102 audio embeddings of a clip of 10 s the default makes 130.
        mean_length: tokens of a completion on average; None where all have T.
        sharing: tokens over distinct beginnings; see completion_shapes.
    """

    model: str = "demo"
    dtype: str = "float32"
    prompts: int = 8
    samples: int = 8
    seconds: float = 10.0
    new_tokens: int = 64
    text_tokens: int = 28
    mean_length: float | None = None
    sharing: float = 1.0

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Size":
        """Return what the options of harness.arguments say.

        Raises:
            UserError: lengths that no completions have.
        """
        size = cls(**{field.name: getattr(arguments, field.name, field.default) for field in dataclasses.fields(cls)})
        completion_shapes(size)
        return size

    def options(self) -> list[str]:
        """Return the words of a command line that say this size."""
        fields = dataclasses.asdict(self)
        if self.mean_length is None:
            del fields["mean_length"], fields["sharing"]
        return [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def completion_shapes(size: Size) -> tuple[Int[np.ndarray, "P G"], Int[np.ndarray, "P G"]]:
    """Return the tokens of each completion, and how many of them are those of its group's longest.

    Lengths are log-normal about the mean, with one of 32 at the limit; of what it could share at most, a completion
    shares the part that makes the tokens of all groups `sharing` times their distinct beginnings.

    Raises:
        UserError: no lengths have that mean, or not as much can be shared.
    """
    shape, limit = (size.prompts, size.samples), size.new_tokens
    lengths = np.full(shape, limit)
    if size.mean_length is not None:
        random = np.random.default_rng(4)
        drawn = random.lognormal(sigma=SPREAD, size=lengths.size)
        at_limit = random.permutation(lengths.size)[: round(lengths.size * AT_LIMIT)]
        others = np.setdiff1d(np.arange(lengths.size), at_limit)
        mean = (lengths.size * size.mean_length - limit * len(at_limit)) / len(others)
        if not 1 <= mean <= limit:
            raise UserError(
                f"--mean-length is {size.mean_length:g}: with {len(at_limit)} of {lengths.size} completions at the "
                f"limit of {limit} tokens the others would have {mean:.3g}; they need between 1 and {limit}"
            )
        lengths.reshape(-1)[others] = np.clip(np.round(mean * drawn / drawn[others].mean()), 1, limit)[others]
    longest = lengths.max(1)
    most = lengths.sum() / longest.sum()
    if not 1 <= size.sharing <= most:
        raise UserError(f"--sharing is {size.sharing:g}; completions of these lengths share between 1 and {most:.3g}")
    share = 0.0 if size.sharing == 1 else (1 - 1 / size.sharing) / (1 - 1 / most)
    shared = np.floor(share * lengths).astype(int)
    shared[np.arange(len(lengths)), lengths.argmax(1)] = 0
    return lengths, shared


def length_limits(size: Size, mesh: Mesh) -> dict[str, jax.Array]:
    """Return the option of a rollout that ends completions at their lengths; none where all have T tokens."""
    return {} if size.mean_length is None else {"limits": place(completion_shapes(size)[0].astype(np.int32), mesh)}


def reshaped(out: Completions, size: Size, pad_id: int) -> Completions:
    """Give sampled completions the share of the longest one's tokens that `completion_shapes` says.

    On devices or the host, as they are.
    """
    if size.sharing == 1:
        return out
    lengths, shared = completion_shapes(size)
    place = np.arange(size.new_tokens)
    mask, common = place < lengths[..., None], place < shared[..., None]
    groups, donor = np.arange(len(lengths)), lengths.argmax(1)

    def cut(values, past):
        return jnp.where(mask, jnp.where(common, values[groups, donor][:, None], values), past)

    return Completions(tokens=cut(out.tokens, pad_id), mask=out.mask & mask, logp=cut(out.logp, 0.0))


def named_config(name: str) -> GraniteSpeechConfig:
    """Return the config of a model by name."""
    return {"demo": DEMO, "tiny": GraniteSpeechConfig.tiny(), **PUBLISHED}[name]


def model_config(name: str, *, ends_after: int | None = None, **decoder: int) -> GraniteSpeechConfig:
    """Return the config of a model by name; its end-of-sequence id is one past the vocabulary, so none is sampled.

    Args:
        ends_after: instead, so many ids end a completion that it has about this many tokens.
        decoder: fields of the decoder's config that are not the model's.
    """
    config = named_config(name)
    config = dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, **decoder),
        audio_token_id=decoder.get("vocab_size", config.audio_token_id + 1) - 1,
    )
    vocabulary = config.decoder.vocab_size
    ends = (vocabulary,) if ends_after is None else tuple(range(vocabulary // ends_after))
    return dataclasses.replace(config, eos_token_ids=ends, pad_token_id=0)


def run_config(size: Size, *, model: dict | None = None, grpo: dict | None = None, **fields: Any) -> GRPOConfig:
    """Return a run of this size.

    Args:
        model, grpo: fields of ModelOptions and GRPOOptions.
        fields: of GRPOConfig; of a run that is only measured in parts, no directory is ever looked at.
    """
    trainable = ("projector", "lora" if named_config(size.model).lora else "decoder")
    data = DataOptions(train="none", audio_buckets=(size.seconds,), max_prompt_tokens=size.text_tokens)
    options = {
        "run_dir": "none",
        "data": data,
        "num_steps": 1000,
        "prompts_per_step": size.prompts,
        "max_completion_tokens": size.new_tokens,
        **fields,
    }
    return GRPOConfig(
        model=ModelOptions(**{"path": size.model, "dtype": size.dtype, "trainable": trainable, **(model or {})}),
        grpo=GRPOOptions(num_samples=size.samples, **(grpo or {})),
        **options,
    )


def plan(
    size: Size,
    *,
    ends_after: int | None = None,
    decoder: dict[str, int] | None = None,
    devices: list[Any] | None = None,
    **options: Any,
) -> tuple[AbstractRun, Clip]:
    """Return a run of this size as shapes, with its programs, and the padded lengths of its prompts.

    Args:
        ends_after, decoder: see model_config.
        devices: of the mesh; by default those that there are.
        options: see run_config.
    """
    config = run_config(size, **options)
    model = model_config(size.model, ends_after=ends_after, **(decoder or {}))
    arrays = run_arrays(config, model, make_mesh(config.mesh, devices))
    run = abstract_run(arrays, memory=UNLIMITED)
    return run, Clip.of(run, size.seconds)


def planned_calls(size: Size, *, layout: Layout | None = None, **options: Any) -> tuple[AbstractRun, dict[str, Call]]:
    """Return the run and the programs of a step with the shapes that they are called with, by name.

    Args:
        layout: of the prefix trees, by default the largest.
    """
    run, clip = plan(size, **options)
    return run, {call.name: call for call in calls(run, clip, LONGEST if layout is None else layout)}


class Workload:
    """A step's programs with all that they take.

    Attributes:
        run: the run as shapes; its config, model, definition, mesh and programs.
        state, frozen: the parameters; `update` replaces the state.
        clips: waveforms at 16 kHz, one a prompt.
        texts: the user messages.
        batch, encoded: of the prompts, on the mesh.
    """

    def __init__(self, size: Size, *, params: Params | None = None, **options: Any):
        """Make the arrays; `params` are those of another workload of the same shape and mesh, else random ones."""
        self.size, self.options = size, options
        self.run, self.clip = plan(size, **options)
        self.params = random_params(self.run) if params is None else params
        trained = self.run.ref_params
        self.frozen = {name: value for name, value in self.params.items() if name not in trained}
        copies = {name: jnp.array(self.params[name], jnp.float32, copy=True) for name in trained}
        self.state = self.run.programs.init(copies)
        self.clips, self.texts = make_clips(size), make_texts(size)
        self.batch = place(make_batch(self.run, self.clips, self.texts), self.run.mesh)
        self.encoded = self.encode()

    def variant(self, **options: Any) -> "Workload":
        """Return a workload with the same weights and other options; those not given stay."""
        return Workload(self.size, params=self.params, **{**self.options, **options})

    def encode(self) -> jax.Array:
        """Run the encoder over the clips."""
        return self.run.programs.encode(self.state.params, self.frozen, self.batch)

    def rollout(self, num_tokens: int | None = None, **limits: jax.Array) -> Completions:
        """Sample all groups, as at the first step of a run, each completion with T tokens if no `limits` are given."""
        config, programs = self.run.config, self.run.programs
        keys = step_keys(0, 0, num_prompts=self.size.prompts, num_samples=self.size.samples)
        weights = programs.layout(self.state.params, self.frozen)
        return programs.rollout(
            *weights,
            self.batch,
            self.encoded,
            place(keys, self.run.mesh),
            num_tokens=num_tokens or self.size.new_tokens,
            temperature=config.grpo.temperature,
            **truncation(config.grpo),
            **limits,
        )

    def completions(self) -> Completions:
        """Return sampled completions of the lengths of the size, as host arrays."""
        out = self.rollout(**length_limits(self.size, self.run.mesh))
        return jax.device_get(reshaped(out, self.size, self.run.model.pad_token_id))

    def trees(self, completions: Completions, *, layout: Layout | None = None, share: bool = True) -> Trees:
        """Return completions on the host as prefix trees on the mesh.

        Args:
            layout: of the trees; by default as in a run, the first that holds them.
            share: whether beginnings are shared.
        """
        rows = sort_rows(completions.tokens, completions.mask, share=share)
        choices = layouts(*completions.tokens.shape[1:], prompt_tokens=self.batch.tokens.shape[1])
        return place(pack(rows, layout or smallest(holds(rows, choices), choices)), self.run.mesh)

    def score(self, trees: Trees) -> jax.Array:
        """Return the log-probs under the policy as it is."""
        return self.run.programs.score(self.state.params, self.frozen, self.batch, self.encoded, trees)

    def targets(self, completions: Completions, **packing: Any) -> Targets:
        """Return completions to learn from, with random advantages; the reference is the policy that sampled.

        Args:
            packing: see `trees`.
        """
        advantage = np.random.default_rng(0).normal(size=completions.tokens.shape[:2]).astype(np.float32)
        arrays = {"mask": completions.mask, "old_logp": completions.logp, "advantage": advantage}
        ref_logp = completions.logp if self.run.config.grpo.beta > 0 else None
        return Targets(
            trees=self.trees(completions, **packing), **place({**arrays, "ref_logp": ref_logp}, self.run.mesh)
        )

    def update(self, targets: Targets) -> dict[str, jax.Array]:
        """Take a step; the state is the new one afterwards. Return its metrics."""
        programs = self.run.programs
        self.state, metrics = programs.update(self.state, self.frozen, self.batch, self.encoded, targets)
        return metrics

    def export(self, directory: Path | str) -> None:
        """Write the weights, in the dtype of the computation, and a tokenizer as a new Hugging Face directory."""
        write_hf(directory, self.run.model, {name: np.asarray(value) for name, value in self.params.items()})
        save_tokenizer(self.run.model, Path(directory))


def random_params(run: AbstractRun) -> Params:
    """Return random parameters, laid out over the mesh, in the dtype of the computation.

    All are read from one pool of normal numbers, which is fast for billions of them; as its length is a prime, no two
    rows of a matrix are alike.
    """
    pool = INIT_STDDEV * np.random.default_rng(0).standard_normal(POOL).astype(np.float32)
    shapes = {**run.frozen, **run.ref_params}

    def draw(name: str, start: int) -> jax.Array:
        leaf, kind = shapes[name], name.split(".")[-1]
        if kind in CONSTANT:
            value = np.full(leaf.shape, CONSTANT[kind], leaf.dtype)
        else:
            value = np.resize(np.roll(pool, -start).astype(leaf.dtype), leaf.shape)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

    return {name: draw(name, 7919 * place) for place, name in enumerate(run.definition.names)}


def make_clips(size: Size) -> list[np.ndarray]:
    """Return a waveform of noise for every prompt."""
    random = np.random.default_rng(1)
    samples = round(SAMPLE_RATE * size.seconds)
    return [0.1 * random.standard_normal(samples).astype(np.float32) for _ in range(size.prompts)]


def make_texts(size: Size) -> list[str]:
    """Return a user message for every prompt: the clip, then words of one token each."""
    random = np.random.default_rng(2)
    vocabulary = named_config(size.model).decoder.vocab_size
    # The last ids of a vocabulary are special tokens of the published models.
    ids = random.integers(1, vocabulary - 16, (size.prompts, size.text_tokens))
    return [" ".join([AUDIO_MARKER, *(word(index) for index in row)]) for row in ids]


def word(index: int) -> str:
    """Return the word that is the token of this id."""
    return f"w{index}"


def make_batch(run: AbstractRun, clips: list[np.ndarray], texts: list[str]) -> Batch:
    """Return the batch that the processor of an exported directory would make of these."""
    slots = run.model.projector.num_slots(len(log_mel(clips[0])))
    ids = np.array([[int(one[1:]) for one in text.split()[1:]] for text in texts], np.int32).reshape(len(texts), -1)
    audio = np.full((len(texts), slots), run.model.audio_token_id, np.int32)
    places = np.concatenate([np.arange(slots), np.full(ids.shape[1], -1)]).astype(np.int32)
    features = np.stack([log_mel(clip) for clip in clips])[:, None]
    tokens = np.concatenate([audio, ids], axis=1)
    return Batch(
        tokens=tokens,
        mask=np.ones(tokens.shape, bool),
        audio_slots=np.broadcast_to(places, tokens.shape).copy(),
        features=features,
        lengths=np.full((len(texts), 1), features.shape[2], np.int32),
    )


def save_tokenizer(config: GraniteSpeechConfig, directory: Path) -> None:
    """Write a tokenizer of the model's vocabulary: a word is a token, and the end comes after all of them."""
    vocabulary = {word(index): index for index in range(config.decoder.vocab_size) if index != config.audio_token_id}
    words = Tokenizer(models.WordLevel({**vocabulary, AUDIO_MARKER: config.audio_token_id}, unk_token=word(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(AUDIO_MARKER, special=True, normalized=False), AddedToken(END, special=True)])
    special = {"eos_token": END, "pad_token": word(0), "additional_special_tokens": [AUDIO_MARKER]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
