"""The predictor, broken in two places that no check foresees; test_server.py asks what its clients learn of that."""

import predict
from gemma_opt.engine.forward import TextModel


class Predictor(predict.Predictor):
    """Pictures fail on Cog's thread, before the engine; everything else fails on the engine's thread."""

    def setup(self) -> None:
        """Set up as always, then break."""
        super().setup()
        ready = self.service.ready
        assert ready.processing.processor is not None
        ready.processing.processor.image_processor = None
        TextModel.embed = _fail


def _fail(model: TextModel, *args: object) -> None:
    raise ValueError(f"secret detail at {id(model):#x}")
