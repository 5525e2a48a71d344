"""A real trained model: 200 greedy tokens on 20 prompts identical to transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from surefoot.core.config import EngineConfig
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine

FOLDER = Path(__file__).parents[2] / "shared" / "data" / "models" / "stories260K"
BEGINNINGS = [
    "Once upon a time", "One day", "Lily", "The little dog", "Tom and his mom", "There was a big tree", "In the park",
    "A girl named", "The sun", "He was very sad", "She wanted to", "It was", "Ben saw a", "The cat", "They played",
    "Mom said", "A bird", "Once", "The boy ran to", "I",
]  # fmt: skip


@pytest.mark.skipif(not FOLDER.exists(), reason=f"no test data at {FOLDER}")
def test_greedy_text_equals_transformers():
    import transformers

    engine = Engine.load(str(FOLDER), EngineConfig(dtype="float32"))
    reference = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    asked = [engine.tokenizer.encode(text) for text in BEGINNINGS]
    assert all(ids[0] == 1 for ids in asked), "this tokenizer begins with <s>"
    done = engine.generate(asked, SamplingParams(max_tokens=200, ignore_eos=True))
    for prompt, completion in zip(asked, done, strict=True):
        assert len(completion.token_ids) == 200
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + completion.token_ids[:-1]])).logits[0]
        # Each token is the reference's own choice after the tokens before it, hence the two texts are identical.
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == completion.token_ids
