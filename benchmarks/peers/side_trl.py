"""TRL's side of `against_trl`: GRPOTrainer with the audio that its loss would otherwise not hear.

Settings: those of `side_generate`, and micro_batch, beta and learning_rate. {"do": "step"} lets `Trainer.train` take
one step; the answer has its seconds, those of sampling, and how many forward passes with gradient there were and how
many of them had audio. {"do": "check"} takes a step, too, and gives the sampled tokens and the log-probs that its loss
had, before the update, with their mask.
"""

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers.answers import Line, run_side
from benchmarks.peers.side_generate import divide_logits, load_inputs, load_model, versions, wait

STEPS = 1000  # more than are ever asked for
AUDIO = ("input_features", "input_features_mask")


class AudioGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose prompts are numbers of rows of `clips`, and whose every forward pass hears their audio.

    Completions are cut to `shapes`, their lengths and shared tokens [P, G].

    Attributes:
        sampling_seconds: of the last step.
        passes: with gradient in the last step, and those of them with audio.
        loss_inputs: tokens, prompt numbers and log-probs of the last step, one entry per forward pass with gradient.
    """

    def __init__(self, *args, clips: dict[str, torch.Tensor], shapes: tuple[list, list], **kwargs):
        self._clips, self._shapes, self._audio, self.sampling_seconds = clips, shapes, None, 0.0
        super().__init__(*args, **kwargs)
        self.start_count()
        settle(self.model)
        divide_logits(self.model)
        for model in (self.model, self.ref_model):
            if model is not None:
                model.register_forward_pre_hook(self._add_audio, with_kwargs=True)
        if self.ref_model is not None:
            self.ref_model.eval()

    def start_count(self) -> None:
        """Forget the last step."""
        self.passes = {"gradient": 0, "audio": 0}
        self.loss_inputs: list[dict[str, torch.Tensor]] = []

    def _tokenize_prompts(self, prompts):
        rows = torch.tensor([int(prompt) for prompt in prompts])
        self._sampled = {name: self._clips[name][rows] for name in AUDIO} | {"prompt_row": rows}
        audio = {name: self._sampled[name] for name in AUDIO}
        return self._clips["input_ids"][rows].tolist(), None, audio

    def _generate_single_turn(self, *args, **kwargs):
        start = time.perf_counter()
        completions, *rest = super()._generate_single_turn(*args, **kwargs)
        self.sampling_seconds = time.perf_counter() - start
        return (self._reshaped(completions), *rest)

    def _reshaped(self, completions: list[list[int]]) -> list[list[int]]:
        """Cut completions to the lengths asked for, with the share of their group's longest one's tokens."""
        found = []
        for group, (lengths, shared) in enumerate(zip(*self._shapes, strict=True)):
            own = completions[group * len(lengths) : (group + 1) * len(lengths)]
            longest = own[lengths.index(max(lengths))]
            found += [
                [*longest[:common], *tokens[common:length]]
                for tokens, length, common in zip(own, lengths, shared, strict=True)
            ]
        return found

    def _generate_and_score_completions(self, inputs):
        # What is added here has a row per completion, so TRL shuffles and splits it with the rest.
        return super()._generate_and_score_completions(inputs) | self._sampled

    def _compute_loss(self, model, inputs):
        self._sampled = {name: inputs[name] for name in self._sampled}
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **options):
        size = options.pop("batch_size", None) or len(input_ids)
        pieces = []
        for start in range(0, len(input_ids), size):
            part = slice(start, start + size)
            self._audio = {name: self._sampled[name][part] for name in AUDIO}
            arguments = (model, input_ids[part], attention_mask[part], logits_to_keep)
            pieces.append(super()._get_per_token_logps_and_entropies(*arguments, **options))
            self._audio = None
        logps, entropies, losses = zip(*pieces, strict=True)
        if torch.is_grad_enabled():
            completions = input_ids[:, -logits_to_keep:]
            mask = attention_mask[:, -logits_to_keep:]
            found = {"rows": self._sampled["prompt_row"], "tokens": completions, "mask": mask}
            found["logps"] = logps[0].detach()
            self.loss_inputs.append(found)
        return torch.cat(logps), None if entropies[0] is None else torch.cat(entropies), losses[0]

    def _add_audio(self, module, args, kwargs):
        if self._audio is not None:
            kwargs = kwargs | self._audio
        if torch.is_grad_enabled():
            self.passes["gradient"] += 1
            self.passes["audio"] += kwargs.get("input_features") is not None
        return args, kwargs


def settle(model: torch.nn.Module) -> None:
    """Keep the encoder out of training, and what hears in eval mode whatever the trainer says.

    The encoder's BatchNorm has to use stored statistics. The projector's attention drops out by a number of its own,
    which `disable_dropout` leaves as it is.
    """
    model.model.encoder.requires_grad_(False)
    for part in (model.model.encoder, model.model.projector):
        part.eval()
        part.train = lambda mode=True, part=part: part
    if getattr(model, "_hf_peft_config_loaded", False):
        for name, value in model.named_parameters():
            value.requires_grad_("lora_" in name or ".projector." in name)


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Score a completion by the share of even tokens; what a reward costs is not the question here."""
    return [sum(token % 2 == 0 for token in tokens) / len(tokens) for tokens in completion_ids]


class OneByOne(TrainerCallback):
    """Lets `Trainer.train` take a step when it is asked for, and answers when it is done."""

    def __init__(self, line: Line, device: str):
        self.line, self.device, self.trainer, self.first = line, device, None, True

    def on_step_begin(self, args, state, control, **kwargs):
        if self.first:
            self.line.answer(versions=versions(), threads=torch.get_num_threads())
            self.first = False
        self.request = self.line.take()
        if self.request is None:
            raise EOFError
        self.trainer.start_count()
        wait(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        wait(self.device)
        seconds = time.perf_counter() - self.start
        found = {"seconds": seconds, "sampling": self.trainer.sampling_seconds, **self.trainer.passes}
        if self.request["do"] == "check":
            parts = self.trainer.loss_inputs
            found |= {name: torch.cat([part[name] for part in parts]).tolist() for name in parts[0]}
        self.line.answer(**found)


def config(settings: dict[str, Any], rows: int) -> GRPOConfig:
    """Return TRL's configuration of our step: one generation and one update over `rows` completions."""
    micro = settings["micro_batch"] or rows
    return GRPOConfig(
        output_dir=str(Path(settings["directory"]) / "trl"),
        use_cpu=settings["device"] == "cpu",
        bf16=settings["dtype"] == "bfloat16",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro,
        num_generations=settings["samples"],
        max_completion_length=settings["new_tokens"],
        generation_kwargs={"suppress_tokens": [settings["audio_token"]]},
        cache_implementation=None if settings["cache"] == "dynamic" else settings["cache"],
        temperature=1.0,
        beta=settings["beta"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        max_steps=STEPS,
        disable_dropout=True,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


def side(line: Line, settings: dict[str, Any]) -> None:
    """Train one step after the other, as asked."""
    clips = load_inputs(settings)
    model = load_model(settings)
    # The constructor and the shuffling of columns ask for these names.
    model.config.image_token_id = model.config.audio_token_id
    path = Path(settings["directory"]) / "model"
    prompts = len(clips["input_ids"])
    one_by_one = OneByOne(line, settings["device"])
    trainer = AudioGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config(settings, prompts * settings["samples"]),
        train_dataset=Dataset.from_dict({"prompt": [str(row) for row in range(prompts)] * STEPS}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(path, padding_side="left"),
        callbacks=[one_by_one],
        clips=clips,
        shapes=(settings["lengths"], settings["shared"]),
    )
    one_by_one.trainer = trainer
    try:
        trainer.train()
    except EOFError:
        pass


if __name__ == "__main__":
    run_side(side)
