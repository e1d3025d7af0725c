"""The README.md of an exported folder, with the metadata that the hub reads."""

from __future__ import annotations

import yaml

from gemma_opt.export.compressed import PACKAGE, transformers_must_dequantize
from gemma_opt.loading import Ready
from gemma_opt.recipe import BaseModelSection

_CARD = """---
{metadata}---

# {name}

{about}

```python
from transformers import {imports}

model = {model}.from_pretrained("<this folder>", device_map="auto"{option})
{variable} = {reader}.from_pretrained("<this folder>")
```

```yaml
{recipe}```
"""


_PROGRAM_CARD = """# {name}

{about}

`model.pte` is an ExecuTorch program for XNNPACK. Its method `forward` takes token ids [1, n] and positions [n], and returns
logits [1, n, vocabulary]; its cache holds {context} positions. Text only.

```python
import executorch.kernels.quantized
import torch
from executorch.runtime import Runtime
from transformers import AutoTokenizer

tokens = AutoTokenizer.from_pretrained("<this folder>")("Hello", return_tensors="pt").input_ids
forward = Runtime.get().load_program("<this folder>/model.pte").load_method("forward")
(logits,) = forward.execute([tokens, torch.arange(tokens.shape[1])])
```

```yaml
{recipe}```
"""


def card(ready: Ready, base: BaseModelSection, *, compressed: bool) -> str:
    """What this model is, how it is loaded, and the whole recipe. base: what its weights are of."""
    pictures = ready.processing.processor is not None
    model, reader = ("AutoModelForImageTextToText", "AutoProcessor") if pictures else ("AutoModelForCausalLM", "AutoTokenizer")
    unpack = compressed and transformers_must_dequantize(ready.plan)
    option = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if unpack else ""
    return _CARD.format(
        metadata=yaml.safe_dump(_metadata(base, pictures=pictures), sort_keys=False),
        name=ready.recipe.name,
        about="\n\n".join([*_about(ready, base), *_lost(ready, compressed=compressed)]),
        imports=", ".join(sorted([model, reader, *(["CompressedTensorsConfig"] if unpack else [])])),
        model=model,
        reader=reader,
        variable="processor" if pictures else "tokenizer",
        option=option,
        recipe=ready.recipe.to_yaml(),
    )


def program_card(ready: Ready, base: BaseModelSection) -> str:
    """The same for a program."""
    about = "\n\n".join(_about(ready, base))
    return _PROGRAM_CARD.format(
        name=ready.recipe.name, about=about, context=f"{ready.context:,}", recipe=ready.recipe.to_yaml()
    )


def _metadata(base: BaseModelSection, *, pictures: bool) -> dict[str, str]:
    task = "image-text-to-text" if pictures else "text-generation"
    metadata = {"library_name": "transformers", "pipeline_tag": task}
    if base.revision:  # only what is on the hub has one
        metadata |= {"base_model": base.base, "base_model_relation": "quantized"}
    return metadata | ({"license": "gemma"} if base.base.startswith("google/gemma") else {})


def _about(ready: Ready, base: BaseModelSection) -> list[str]:
    revision = f" at `{base.revision}`" if base.revision else ""
    described = ready.recipe.description and base.base == ready.recipe.model.base  # which it speaks of
    lines = [ready.recipe.description] if described else []
    return [*lines, f"Gemma 3 compressed by gemma-opt from `{base.base}`{revision}; the recipe is below."]


def _lost(ready: Ready, *, compressed: bool) -> list[str]:
    if compressed:
        return [f"Its text linears are quantized, as {PACKAGE} stores them (`pip install {PACKAGE}`); all else is floats."]
    if any(row.format.activation != "none" for row in ready.plan.rows):
        return ["Every weight is a float here, and so are the inputs that the recipe quantizes."]
    return []
