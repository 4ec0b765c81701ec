"""Pretrain the demo's projector and decoder on a frozen encoder: translation, transcription and questions.

The second half of demo/make_base.py, which trains the encoder first and runs this config on it. The base that comes
out translates, but not in the style of the demo's corpus: "trained on AST, but not on CoVoST2", as in the paper.

Command:   python -m demo.make_base
Hardware:  two CPU cores; hours and result in docs/log.md.
"""

from jgrpo.config import CheckpointOptions, DataOptions, ModelOptions, OptimiserOptions, SFTConfig


def get_config() -> SFTConfig:
    """Return the run."""
    return SFTConfig(
        run_dir="demo/build/base_run",
        model=ModelOptions(path="demo/build/encoder", trainable=("projector", "decoder")),
        data=DataOptions(train="demo/build/pre.jsonl", audio_buckets=(3.0,), cache_features=True, cache_encoder=True),
        num_steps=1000,
        prompts_per_step=64,
        max_completion_tokens=20,
        seed=1,
        optimiser=OptimiserOptions(learning_rate=2e-3, warmup_fraction=0.1, final_fraction=0.05),
        checkpoint=CheckpointOptions(every=250),
    )
