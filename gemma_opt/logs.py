"""Logging for a process of ours, the command line or the predictor: set up by whoever starts, never at import of a part."""

from __future__ import annotations

import logging
import os
import sys

from gemma_opt.errors import UsageError

VARIABLE = "GEMMA_OPT_LOG"
_LEVELS = ("debug", "info", "warning", "error", "critical")
_NOISY = ("torchao", "torch.utils._pytree", "transformers")  # they report at import what is not our user's business


def set_up(default: str) -> None:
    """Log to the process's stderr from the level that GEMMA_OPT_LOG names, else `default`; noisy libraries only their errors.

    At debug these show everything too. Call it before torch is imported. Raises UsageError for an unknown level.
    """
    level = (os.environ.get(VARIABLE) or default).lower()
    if level not in _LEVELS:
        raise UsageError(f"{VARIABLE} is {level!r}, not one of {', '.join(_LEVELS)}")
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.__stderr__)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: every line would come twice
    if level != "debug":
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
