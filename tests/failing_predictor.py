"""The predictor, broken in two places that no check foresees; test_server.py asks what its clients learn of that."""

from torch import nn

import predict


class Predictor(predict.Predictor):
    """Pictures fail on Cog's thread, before the engine; everything else fails on the engine's thread."""

    def setup(self) -> None:
        """Set up as always, then break."""
        super().setup()
        ready = self.service.ready
        assert ready.processing.processor is not None
        ready.processing.processor.image_processor = None
        ready.model.register_forward_pre_hook(_fail)


def _fail(module: nn.Module, args: object) -> None:
    raise ValueError(f"secret detail at {id(module):#x}")
