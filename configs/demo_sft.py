"""Supervised fine-tuning on the demo's speech translation task: the baseline that GRPO is compared with.

Same model, data, trained parameters and evaluation as configs/demo_grpo.py.
Command:   jgrpo sft configs/demo_sft.py --run-dir runs/sft
Hardware:  two CPU cores. Result: see README.md.

The learning rate was found by a sweep (docs/log.md); validation BLEU peaks after 2 to 4 epochs.
"""

from jgrpo.config import CheckpointOptions, DataOptions, EvalOptions, ModelOptions, OptimiserOptions, SFTConfig


def get_config() -> SFTConfig:
    """Return the run."""
    return SFTConfig(
        run_dir="runs/demo_sft",
        model=ModelOptions(path="demo/base", trainable=("projector", "decoder")),
        data=DataOptions(
            train="demo/train.jsonl",
            validation="demo/val.jsonl",
            test=("demo/test.jsonl", "demo/test_voices.jsonl"),
            audio_buckets=(3.0,),
            cache_features=True,
            cache_encoder=True,
        ),
        num_steps=310,
        prompts_per_step=48,
        max_completion_tokens=20,
        optimiser=OptimiserOptions(learning_rate=3e-4, beta2=0.95),
        eval=EvalOptions(every=31, batch_size=40),
        checkpoint=CheckpointOptions(every=100),
    )
