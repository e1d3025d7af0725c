"""Every error this package raises on purpose, each with a stable code that starts its message.

    GemmaOptError
    ├── InputError            E1000  a request that cannot be served as it is (safe to show to the client)
    │   ├── EmptyPrompt       E1001
    │   ├── PromptTooLong     E1002
    │   ├── ConflictingInputs E1003
    │   ├── MessagesError     E1004
    │   ├── ParameterError    E1005  a sampling parameter out of its range
    │   ├── ImageError        E1010  not a picture, or one beyond the limits
    │   ├── ImageFetchError   E1011  one text for every network cause: the reason would map private networks
    │   ├── ImagesUnsupported E1012  the model has no vision tower
    │   └── QueueFull         E1020
    ├── UsageError            E2000  what was asked for cannot be built (exit code 2)
    │   ├── RecipeError       E2001
    │   ├── RecipeNotFound    E2002
    │   ├── PlanError         E2010  the recipe does not fit the model
    │   └── NeedsBuild        E2011  the recipe must be compressed first; the message names the command
    ├── CheckpointError       E3000  weights that cannot be read or written
    │   ├── BaseModelError    E3001  no usable base model at that place
    │   ├── CorruptCheckpoint E3002
    │   ├── RecipeMismatch    E3003  the folder was built from another recipe
    │   ├── WeightsError      E3004  NaN, infinite or missing weights
    │   ├── StorageError      E3005  disk full, or a place that cannot be written
    │   └── HubError          E3006  an export that could not be pushed
    └── EngineError           E4000
        ├── CompileError      E4001
        ├── EngineClosed      E4002
        └── GenerationTimeout E4003

Anything else that escapes is a defect: the service logs it and tells the client "internal error".
"""

from typing import ClassVar


class GemmaOptError(Exception):
    """Base of the tree. `str(error)` is `<code> <message>`; the message alone is in `message`."""

    code: ClassVar[str] = "E0000"

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(f"{self.code} {message}")


class InputError(GemmaOptError):
    code = "E1000"


class EmptyPrompt(InputError):
    code = "E1001"


class PromptTooLong(InputError):
    code = "E1002"


class ConflictingInputs(InputError):
    code = "E1003"


class MessagesError(InputError):
    code = "E1004"


class ParameterError(InputError):
    code = "E1005"


class ImageError(InputError):
    code = "E1010"


class ImageFetchError(InputError):
    code = "E1011"


class ImagesUnsupported(InputError):
    code = "E1012"


class QueueFull(InputError):
    code = "E1020"


class UsageError(GemmaOptError):
    code = "E2000"


class RecipeError(UsageError):
    code = "E2001"


class RecipeNotFound(UsageError):
    code = "E2002"


class PlanError(UsageError):
    code = "E2010"


class NeedsBuild(UsageError):
    code = "E2011"


class CheckpointError(GemmaOptError):
    code = "E3000"


class BaseModelError(CheckpointError):
    code = "E3001"


class CorruptCheckpoint(CheckpointError):
    code = "E3002"


class RecipeMismatch(CheckpointError):
    code = "E3003"


class WeightsError(CheckpointError):
    code = "E3004"


class StorageError(CheckpointError):
    code = "E3005"


class HubError(CheckpointError):
    code = "E3006"


class EngineError(GemmaOptError):
    code = "E4000"


class CompileError(EngineError):
    code = "E4001"


class EngineClosed(EngineError):
    code = "E4002"


class GenerationTimeout(EngineError):
    code = "E4003"
