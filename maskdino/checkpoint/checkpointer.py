"""Checkpoints: read without executing code from the file, written whole or not at all, errors that
say what differs.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from maskdino.checkpoint.released_weights import (
    DECODER_HEADS,
    ReleasedStructure,
    convert_weights,
    is_released,
)

# Tensors whose size depends on the classes or the number of learned queries: fine-tuning may start
# them anew.
RESIZABLE = (
    "heads.class_head.",
    "denoising.label_embedding.",
    "query_selection.content",
    "query_selection.anchor_logits",
)
# Parts that a checkpoint may lack as a whole; their weights then stay as initialised.
PARTS = ("pixel_embedding.", "heads.mask_head.", "denoising.", "query_selection.")
# What a pickle of numpy arrays (ImageNet weights of detectron2's model zoo) may contain.
_PICKLE_GLOBALS = {
    "_codecs": {"encode"},
    "collections": {"OrderedDict"},
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
}


class MaskDINOCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer that also reads released Mask DINO files, and is strict about what
    does not fit.

    Args:
        model: the model.
        save_dir: folder of the checkpoints.
        require_all: raise when the file lacks any weight of the model (evaluation), instead of
            leaving whole parts as initialised (fine-tuning).
        save_to_disk, checkpointables: as in detectron2.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        require_all: bool = False,
        save_to_disk: bool | None = None,
        **checkpointables: object,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.require_all = require_all

    def save(self, name: str, **kwargs: object) -> None:
        """Writes `<name>.pth` beside its place and moves it there, so that a killed run leaves no
        broken file.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data |= {key: item.state_dict() for key, item in self.checkpointables.items()} | kwargs
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        buffer = io.BytesIO()
        torch.save(data, buffer)
        _write_whole(path, buffer.getbuffer())
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Names the checkpoint that a resumed run starts from."""
        _write_whole(
            os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename.encode()
        )

    def _load_file(self, filename: str) -> dict:
        """Reads a file into a dict with the tensors under "model", by our names."""
        data = _read_pickle(filename) if filename.endswith(".pkl") else _read_torch(filename)
        if filename.endswith(".pkl") and "__author__" not in data:
            state = data.get("blobs", data)
            state = {name: value for name, value in state.items() if not name.endswith("_momentum")}
            return {"model": state, "__author__": "Caffe2", "matching_heuristics": True}
        if "model" not in data:
            data = {"model": data.get("model_state", data.get("state_dict", data))}
        if is_released(data["model"]):
            self.logger.info(
                "%s is a released Mask DINO checkpoint: its tensors are renamed", filename
            )
            self._follow_released(filename, data["model"])
            data = {"model": convert_weights(data["model"], self._encoder_heads())}
        return data

    def _encoder_heads(self) -> int:
        """The number of attention heads in the model's encoder: no shape in a file tells it."""
        encoder = getattr(self.model, "encoder", None)  # other models cannot take the file anyway
        return DECODER_HEADS if encoder is None else encoder.num_heads

    def _follow_released(self, filename: str, state: Mapping[str, Tensor]) -> None:
        """Sets what the file's model does, but no tensor of it says.

        Which level has the largest proposals follows from the order of the levels; empty masks give
        anchors in the corner in all of them. A model that is evaluated follows the file. One that
        is trained keeps to its configuration, which is all that will tell how its checkpoints are
        to be read.
        """
        structure = ReleasedStructure.from_shapes({k: tuple(x.shape) for k, x in state.items()})
        selection = getattr(self.model, "query_selection", None)
        if self.require_all and hasattr(selection, "empty_masks"):
            selection.empty_masks = "corner"
        ours = getattr(selection, "coarsest_largest", structure.coarsest_first)
        if ours == structure.coarsest_first:
            return
        level = "coarsest" if structure.coarsest_first else "finest"
        self.logger.warning(
            '%s was trained with MODEL.MASK_DINO.QUERY_SELECTION.LARGEST_PROPOSALS "%s", and this '
            "configuration disagrees: %s",
            filename,
            level,
            "the file is followed" if self.require_all else f'set it to "{level}"',
        )
        if self.require_all:
            selection.coarsest_largest = structure.coarsest_first

    def _load_model(self, checkpoint: dict) -> object:
        whole = not checkpoint.get("matching_heuristics", False)
        known = {name.removeprefix("module.") for name in checkpoint["model"]} if whole else set()
        incompatible = super()._load_model(checkpoint)
        missing = [
            name for name in incompatible.missing_keys if not name.endswith("num_batches_tracked")
        ]
        self._check(missing, incompatible.incorrect_shapes, known)
        self._check_unused(incompatible.unexpected_keys, known)
        return incompatible

    def _check(self, missing: list[str], mismatched: list[tuple], known: set[str]) -> None:
        """Raises where the file is not for this model; tells where it is, but in parts."""
        resized = (
            []
            if self.require_all
            else [entry for entry in mismatched if entry[0].startswith(RESIZABLE)]
        )
        wrong = [
            f"{name}: {have} in the file, {want} in the model"
            for name, have, want in mismatched
            if (name, have, want) not in resized
        ]
        names = {entry[0] for entry in mismatched}
        absent = [name for name in missing if name not in names]
        if known:
            wrong += [
                f"{name}: not in the file"
                for name in absent
                if self.require_all or not _may_lack(name, known)
            ]
        if wrong:
            raise _misfit(wrong)
        for name, have, want in resized:
            self.logger.warning(
                "%s is new: it has shape %s in the file and %s here", name, have, want
            )
        parts = sorted({_part(name) for name in absent})
        if known and parts:
            self.logger.warning("not in the checkpoint, left as initialised: %s", ", ".join(parts))

    def _check_unused(self, unexpected: list[str], known: set[str]) -> None:
        """Raises where a part of the model is smaller than in the file (fewer layers, say).

        Parts that the model lacks as a whole may be left unused, and so may tensors of files that
        hold a backbone alone.
        """
        parts = {_part(name) for name in self.model.state_dict()}
        wrong = [
            f"{name}: not in the model"
            for name in unexpected
            if _part(name) in parts and not name.endswith("num_batches_tracked")
        ]
        if wrong and not all(name.startswith("backbone.") for name in known):
            raise _misfit(wrong)


def _misfit(wrong: list[str]) -> ValueError:
    shown = "\n  ".join(wrong[:20] + [f"... and {len(wrong) - 20} more"] * (len(wrong) > 20))
    return ValueError(
        f"the checkpoint does not fit the model of this config; {len(wrong)} tensors differ:\n"
        f"  {shown}\nUse the config that the checkpoint was made with (tools/convert_released.py "
        "makes one for released files), or change MODEL.WEIGHTS."
    )


def _part(name: str) -> str:
    return next((part.rstrip(".") for part in PARTS if name.startswith(part)), name.split(".")[0])


def _may_lack(name: str, known: set[str]) -> bool:
    """Whether a file may lack this weight: it holds a backbone alone, or lacks the whole part."""
    if all(other.startswith("backbone.") for other in known):
        return not name.startswith("backbone.")
    part = _part(name)
    is_part = any(name.startswith(prefix) for prefix in PARTS)
    return is_part and not any(other.startswith(f"{part}.") for other in known)


def _write_whole(path: str, content: bytes | memoryview) -> None:
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _read_torch(path: str) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, and is not loaded, because that "
            "could run code; "
            f'save its weights alone, as torch.save({{"model": model.state_dict()}}, path). '
            f"({error})"
        ) from error
    except (EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is no checkpoint, or was cut off: {error}") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Knows numpy arrays and plain containers, and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if name in _PICKLE_GLOBALS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, and only arrays are read from .pkl files"
        )


def _read_pickle(path: str) -> dict:
    with open(path, "rb") as file:
        try:
            return _ArrayUnpickler(file, encoding="latin1").load()
        except (pickle.UnpicklingError, EOFError) as error:  # refused, or cut off
            raise ValueError(f"{path} is not loaded: {error}") from error


def model_weights(path: str) -> Mapping[str, Tensor]:
    """The tensors of a `.pth` file, under the names in the file."""
    data = _read_torch(path)
    return data.get("model", data)
