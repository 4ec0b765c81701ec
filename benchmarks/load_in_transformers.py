"""Whether directories that `model-port export` writes load in another release of transformers, with the same logits.

Two steps, because the releases live in environments of their own; the second needs numpy, torch, transformers and peft:

    python benchmarks/load_in_transformers.py write exported        # where this project is installed
    python benchmarks/load_in_transformers.py compare exported      # where the other release is

The models are small and random in every parameter. Each is exported in float32 together with our logits and greedy
tokens for a prompt with one clip, and compared in float32; the exit status is 1 if anything differs.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

FRAMES, NEW_TOKENS = 38, 8
TOLERANCE = 1e-5
INPUTS = "inputs_and_outputs.npz"


def write(out: Path) -> int:
    """Export every variant, with what our model makes of the prompt."""
    from model_port.weights.convert import export, load_model

    for name, checkpoint, lora in _checkpoints(out / "checkpoints"):
        export(checkpoint, out / name, lora=lora)
        model = load_model(checkpoint)
        np.savez(out / f"{name}-{INPUTS}", **_run(model))
        print(f"wrote {out / name}")
    return 0


def _checkpoints(out: Path):
    """Yield (name, Orbax model directory, what to do with its adapter)."""
    import dataclasses

    from model_port.config import LORA_TARGETS, GraniteSpeechConfig, LoraConfig
    from model_port.weights.convert import build_model, model_arrays, save_model

    config = GraniteSpeechConfig.tiny()
    everywhere = LoraConfig(rank=3, alpha=6.0, target_modules=LORA_TARGETS)
    variants = {
        "adapter": config,
        "adapter on all linears": dataclasses.replace(config, lora=everywhere),
        "untied": dataclasses.replace(config, lora=None, tie_word_embeddings=False),
    }
    for seed, (name, variant) in enumerate(variants.items()):
        model = build_model(variant, _random_arrays(variant, seed))
        save_model(model, out / name)
        yield name, out / name, "keep"
    yield "merged", out / "adapter", "merge"
    yield "merged on all linears", out / "adapter on all linears", "merge"
    trained = build_model(config, {**_random_arrays(config, 0), **_trained(config)})
    save_model(trained, out / "trained", base=out / "adapter", only=list(_trained(config)))
    assert len(_trained(config)) < len(model_arrays(trained))
    yield "trained part with base", out / "trained", "keep"


def _random_arrays(config, seed: int) -> dict[str, np.ndarray]:
    """Values for every parameter and BatchNorm statistic, the adapter's B included; none is 0 or 1."""
    from model_port.weights import tree

    random = np.random.default_rng(seed)
    arrays = {}
    for path, shape in tree.shapes(config).items():
        leaf = path.split(".")[-1]
        value = random.standard_normal(shape) * (shape[-2] ** -0.5 if leaf in ("kernel", "a", "b") else 0.2)
        arrays[path] = (np.exp(value) if leaf in ("scale", "var") else value).astype(np.float32)
    return arrays


def _trained(config) -> dict[str, np.ndarray]:
    """What a run trains: the adapter and the projector, other than in the base."""
    other = _random_arrays(config, 7)
    return {path: array for path, array in other.items() if path.startswith("projector.") or ".lora." in path}


def _run(model) -> dict[str, np.ndarray]:
    """Our inputs, logits and greedy tokens."""
    from model_port import generate
    from model_port.batch import Batch

    random = np.random.default_rng(0)
    slots = model.config.projector.num_slots(FRAMES)
    tokens = np.concatenate([[5, 6, 7], np.full(slots, model.config.audio_token_id), [8, 9, 10, 11]]).astype(np.int32)
    features = random.standard_normal((FRAMES, 160)).astype(np.float32)
    positions = np.full(len(tokens), -1, np.int32)
    positions[3 : 3 + slots] = np.arange(slots)
    batch = Batch(
        tokens=tokens[None],
        mask=np.ones((1, len(tokens)), bool),
        audio_slots=positions[None],
        features=features[None, None],
        lengths=np.array([[FRAMES]], np.int32),
    )
    greedy = generate(model, batch, max_new_tokens=NEW_TOKENS, temperature=0)
    return {
        "tokens": tokens,
        "features": features,
        "logits": np.asarray(model(batch)[0]),
        "greedy": np.asarray(greedy.tokens)[0, 0][np.asarray(greedy.mask)[0, 0]],
    }


def compare(out: Path) -> int:
    """Load every exported directory with the transformers that is installed here and compare."""
    import peft
    import torch
    import transformers

    print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
    print(f"{'export':<26}{'largest difference':>20}{'values up to':>14}{'adapter':>10}{'greedy':>9}")
    failures = 0
    for file in sorted(out.glob(f"*-{INPUTS}")):
        name = file.name.removesuffix(f"-{INPUTS}")
        difference, scale, adapter, same, report = _compare_one(out / name, dict(np.load(file)))
        ok = difference <= TOLERANCE and same and not report
        failures += not ok
        print(f"{name:<26}{difference:>20.1e}{scale:>14.1f}{adapter:>10}{'same' if same else 'OTHER':>9}", *report)
    return int(failures > 0)


def _compare_one(path: Path, ours: dict[str, np.ndarray]):
    """Return the largest difference of the logits, their scale, what the adapter does, greedy, and complaints."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model, report = transformers.GraniteSpeechForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    complaints = [f"{kind}: {found}" for kind, found in report.items() if found]
    tokens, features = torch.from_numpy(ours["tokens"]).long()[None], torch.from_numpy(ours["features"])[None]
    theirs = _logits(model, tokens, features)
    adapter = "none"
    if (path / "adapter_config.json").exists():
        model.disable_adapters()
        adapter = f"{np.abs(_logits(model, tokens, features) - theirs).max():.1f}"
        model.enable_adapters()
    config = model.config
    with torch.no_grad():
        greedy = model.generate(
            tokens,
            input_features=features,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            suppress_tokens=[config.audio_token_index],
            eos_token_id=config.text_config.eos_token_id,
            pad_token_id=config.text_config.pad_token_id,
        )[0, tokens.shape[1] :].numpy()
    same = np.array_equal(greedy, ours["greedy"])
    return np.abs(theirs - ours["logits"]).max(), np.abs(theirs).max(), adapter, same, complaints


def _logits(model, tokens, features) -> np.ndarray:
    """The reference's logits, divided by logits_scaling where it leaves that out (5.10 to 5.23)."""
    import torch

    heads = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, given, out: heads.append(out))
    with torch.no_grad():
        logits = model(input_ids=tokens, input_features=features).logits
    hook.remove()
    scaling = model.config.text_config.logits_scaling
    return (logits / scaling if torch.equal(logits, heads[0]) else logits)[0].numpy()


def main() -> int:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("write", "compare"))
    parser.add_argument("directory", type=Path, help="where the exported directories go, or are")
    arguments = parser.parse_args()
    return write(arguments.directory) if arguments.step == "write" else compare(arguments.directory)


if __name__ == "__main__":
    sys.exit(main())
