"""Training and evaluation data: manifests of audio, prompts and references, and the batches made of them."""

from jgrpo.data.manifest import Example, Manifest, read_manifest
from jgrpo.data.pipeline import PromptBatch, PromptData, PromptStream

__all__ = ["Example", "Manifest", "PromptBatch", "PromptData", "PromptStream", "read_manifest"]
