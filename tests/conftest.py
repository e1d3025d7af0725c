"""What every test may count on: no network, and no model chosen by the developer's shell."""

import os
from collections.abc import Iterator

import pytest
import torch
from server import CogServer

for _name in ("GEMMA_OPT_MODEL", "GEMMA_OPT_RECIPE", "COG_MAX_CONCURRENCY"):
    os.environ.pop(_name, None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would only wait for each other
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # read by cuDNN, whose float32 convolutions would keep 10 bits on a GPU
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported: the kernels' tests run on its interpreter


@pytest.fixture(scope="session")
def cog_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    """Cog's own HTTP server with the bundled model, started once."""
    with CogServer(tmp_path_factory.mktemp("cog") / "server.log") as server:
        yield server
