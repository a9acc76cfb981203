"""From predictions to results in the frame of the image."""

from maskdino.postprocess.frame import Frame
from maskdino.postprocess.options import InferenceOptions
from maskdino.postprocess.results import postprocess

__all__ = ["Frame", "InferenceOptions", "postprocess"]
