"""GRPO on the demo's speech translation task: spoken English to German text in the corpus's style.

Reproduces, in small, the paper's speech translation experiment (arXiv 2509.16990, Table 2): base < SFT < GRPO.
Command:   jgrpo grpo configs/demo_grpo.py --run-dir runs/grpo
Hardware:  two CPU cores. Result: see README.md.

Values: G, beta and the temperature are the paper's; epsilon and the loss are the defaults of jgrpo.config; the rest
was found for this small model (docs/log.md).
"""

from jgrpo.config import CheckpointOptions, DataOptions, EvalOptions, GRPOConfig, ModelOptions, OptimiserOptions


def get_config() -> GRPOConfig:
    """Return the run."""
    return GRPOConfig(
        run_dir="runs/demo_grpo",
        model=ModelOptions(path="demo/base", trainable=("projector", "decoder")),
        data=DataOptions(
            train="demo/train.jsonl",
            validation="demo/val.jsonl",
            test=("demo/test.jsonl", "demo/test_voices.jsonl"),
            audio_buckets=(3.0,),
            cache_features=True,
            cache_encoder=True,
        ),
        num_steps=240,
        prompts_per_step=12,
        max_completion_tokens=20,
        optimiser=OptimiserOptions(learning_rate=3e-4, beta2=0.99),
        eval=EvalOptions(every=25, batch_size=40),
        checkpoint=CheckpointOptions(every=50),
    )
