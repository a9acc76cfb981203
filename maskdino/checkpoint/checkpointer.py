"""Checkpoints of Mask DINO: strict about what does not fit, with errors that say what differs."""

from __future__ import annotations

import os
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from maskdino.checkpoint.reading import (
    LAST,
    CheckpointError,
    find_resumption,
    is_of_backbone,
    read_checkpoint,
    shapes_of,
)
from maskdino.checkpoint.released_weights import (
    EMPTY_MASKS,
    LARGEST_PROPOSALS,
    ReleasedStructure,
    convert_weights,
    is_released,
    refuse_foreign,
)
from maskdino.model import MaskDINO
from maskdino.modeling.query_selection import UnifiedQuerySelection
from maskdino.system.files import write_text, written_whole
from maskdino.system.words import counted

# Tensors whose size depends on the classes or the number of learned queries: fine-tuning may start
# them anew.
RESIZABLE = (
    "heads.class_head.",
    "denoising.label_embedding.",
    "query_selection.content",
    "query_selection.anchor_logits",
)
# Parts that a checkpoint may lack as a whole; their weights then stay as initialized.
PARTS = ("pixel_embedding.", "heads.mask_head.", "denoising.", "query_selection.")


class MaskDINOCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, strict about what does not fit, that reads released files too.

    Args:
        model: the model.
        save_dir: folder of the checkpoints.
        require_all: raise when the file lacks any weight of the model (evaluation), instead of
            leaving whole parts as initialized (fine-tuning).
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
        """Writes `<name>.pth`, whole or not at all.

        Raises:
            WriteError: there is no room, or no permission; the checkpoints before are whole.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data |= {key: item.state_dict() for key, item in self.checkpointables.items()} | kwargs
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with written_whole(path) as temporary, open(temporary, "wb") as file:
            try:
                torch.save(data, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # which PyTorch's writer hides
                    raise error.__context__ from None
                raise
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Names the checkpoint that a resumed run starts from."""
        write_text(os.path.join(self.save_dir, LAST), last_filename_basename)

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to go on from; see `find_resumption`."""
        return bool(find_resumption(self.save_dir).path)

    def get_checkpoint_file(self) -> str:
        """The checkpoint to go on from, loudly where it is not the last; "" if there is none."""
        found = find_resumption(self.save_dir)
        if found.note:
            self.logger.warning(found.note)
        return found.path

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Loads a file; see detectron2's.

        Raises:
            CheckpointError: it cannot be read, or is not for this model; the message names it.
        """
        try:
            return super().load(path, checkpointables)
        except CheckpointError:
            raise
        except (ValueError, KeyError) as error:
            reason = error.args[0] if isinstance(error, KeyError) else error
            raise CheckpointError(f"{path}: {reason}") from error

    def _load_file(self, filename: str) -> dict:
        """Reads a file into a dict with the tensors under "model", by our names."""
        data = read_checkpoint(filename)
        state = data["model"]
        refuse_foreign(state, filename)
        if not is_released(state):
            return data
        if not isinstance(self.model, MaskDINO):
            raise ValueError(f"{filename} holds a Mask DINO; the model is another")
        self.logger.info("%s is a released Mask DINO checkpoint: its tensors are renamed", filename)
        structure = ReleasedStructure.from_shapes(shapes_of(state))
        self._warn_of_disagreement(filename, self.model.query_selection, structure)
        return {"model": convert_weights(state, self.model.encoder.num_heads)}

    def _warn_of_disagreement(
        self, filename: str, selection: nn.Module, structure: ReleasedStructure
    ) -> None:
        """Tells where the model was not built as `maskdino.checkpoint.loading` would have it."""
        if not isinstance(selection, UnifiedQuerySelection):
            return  # learned queries, without proposals
        ours = {
            EMPTY_MASKS: selection.empty_masks,
            LARGEST_PROPOSALS: "coarsest" if selection.coarsest_largest else "finest",
        }
        for key, value in structure.decided.items():
            if ours[key] != value:
                self.logger.warning(
                    '%s was trained with %s "%s", and this model has "%s"',
                    filename,
                    key,
                    value,
                    ours[key],
                )

    def _load_model(self, checkpoint: dict) -> object:
        whole = not checkpoint.get("matching_heuristics", False)
        known = {name.removeprefix("module.") for name in checkpoint["model"]} if whole else set()
        self._check_values(checkpoint["model"], heuristic=not whole)
        incompatible = super()._load_model(checkpoint)
        missing = [
            name for name in incompatible.missing_keys if not name.endswith("num_batches_tracked")
        ]
        if not whole and {*missing} >= {name for name, _ in self.model.named_parameters()}:
            raise ValueError("none of its tensors is one of the model's")
        self._check(missing, incompatible.incorrect_shapes, known)
        self._check_unused(incompatible.unexpected_keys, known)
        return incompatible

    def _check_values(self, state: dict[str, Any], *, heuristic: bool) -> None:
        """Raises where weights are of another kind than the model's, or not finite."""
        own, wrong = self.model.state_dict(), []
        for name, given in state.items():
            value = torch.as_tensor(given)
            if value.dtype.itemsize == 1 and value.is_floating_point():
                value = value.float()  # PyTorch has no `isfinite` of 8 bits
            target = value if heuristic else own.get(name.removeprefix("module."))
            if target is None:
                continue
            if value.is_floating_point() != target.is_floating_point() or value.is_complex():
                wrong.append(f"{name}: {value.dtype} in the file, {target.dtype} in the model")
            elif value.is_floating_point() and not (finite := value.isfinite()).all():
                wrong.append(f"{name}: {int((~finite).sum())} of {value.numel()} are not finite")
        if wrong:
            raise _misfit(wrong)

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
        if known or self.require_all:
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
            self.logger.warning("not in the checkpoint, left as initialized: %s", ", ".join(parts))

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
        if wrong and not is_of_backbone(known):
            raise _misfit(wrong)


def _misfit(wrong: list[str]) -> ValueError:
    shown = "\n  ".join(wrong[:20] + [f"... and {len(wrong) - 20} more"] * (len(wrong) > 20))
    return ValueError(
        "the checkpoint does not fit the model of this config; it differs in "
        f"{counted(len(wrong), 'tensor')}:\n"
        f"  {shown}\nUse the config that the checkpoint was made with (tools/convert_released.py "
        "makes one for released files), or change MODEL.WEIGHTS."
    )


def _part(name: str) -> str:
    return next((part.rstrip(".") for part in PARTS if name.startswith(part)), name.split(".")[0])


def _may_lack(name: str, known: set[str]) -> bool:
    """Whether a file may lack this weight: it holds a backbone alone, or lacks the whole part."""
    if is_of_backbone(known):
        return not name.startswith("backbone.")
    part = _part(name)
    is_part = any(name.startswith(prefix) for prefix in PARTS)
    return is_part and not any(other.startswith(f"{part}.") for other in known)
