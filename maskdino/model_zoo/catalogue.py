"""The weights that the paper's authors released, and the results that they published for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from maskdino.checkpoint.released_weights import decided_by

RELEASE = "https://github.com/IDEA-Research/detrex-storage/releases/download/maskdino-v0.1.0/"


@dataclass(frozen=True)
class ReleasedModel:
    """One released file."""

    config: str  # the shipped configuration of the model, relative to `configs/`
    file: str  # name of the file in the release
    # Published results in percent, by metric; `gflops` and `million_parameters` where published.
    results: Mapping[str, float]
    coarsest_first: bool = False  # the encoder has the coarsest level first; see `decided_by`
    # Hexadecimal checksum of the file; None where nobody has published or computed one.
    sha256: str | None = None

    @property
    def url(self) -> str:
        """Where the file is."""
        return RELEASE + self.file

    @property
    def names(self) -> tuple[str, ...]:
        """What the model is called by: its configuration or file, with the ending or without."""
        config, file = self.config.removesuffix(".yaml"), self.file.removesuffix(".pth")
        return self.config, config, self.file, file

    @property
    def overrides(self) -> tuple[str, ...]:
        """Keys and values in turn that the file decides, whatever its configuration says."""
        return tuple(word for item in decided_by(self.coarsest_first).items() for word in item)


def _released(
    config: str, file: str, *, coarsest_first: bool = False, **results: float
) -> ReleasedModel:
    return ReleasedModel(config, file, MappingProxyType(results), coarsest_first)


RELEASED = (
    _released(
        "coco/instance/maskdino_R50_ffn1024.yaml",
        "maskdino_r50_50ep_300q_hid1024_3sd1_instance_maskenhanced_mask46.1ap_box51.5ap.pth",
        coarsest_first=True,
        mask_ap=46.1,
        box_ap=51.5,
        million_parameters=47,
        gflops=226,
    ),
    _released(
        "coco/instance/maskdino_R50.yaml",
        "maskdino_r50_50ep_300q_hid2048_3sd1_instance_maskenhanced_mask46.3ap_box51.7ap.pth",
        mask_ap=46.3,
        box_ap=51.7,
        million_parameters=52,
        gflops=286,
    ),
    _released(
        "coco/instance/maskdino_swinl_plain_anchors.yaml",
        "maskdino_swinl_50ep_300q_hid2048_3sd1_instance_mask52.1ap_box58.3ap.pth",
        mask_ap=52.1,
        box_ap=58.3,
        million_parameters=223,
        gflops=1326,
    ),
    _released(
        "coco/instance/maskdino_swinl.yaml",
        "maskdino_swinl_50ep_300q_hid2048_3sd1_instance_maskenhanced_mask52.3ap_box59.0ap.pth",
        mask_ap=52.3,
        box_ap=59.0,
        million_parameters=223,
        gflops=1326,
    ),
    _released(
        "coco/panoptic/maskdino_R50.yaml",
        "maskdino_r50_50ep_300q_hid2048_3sd1_panoptic_pq53.0.pth",
        pq=53.0,
        box_ap=48.8,
        mask_ap=44.3,
        miou=60.6,
    ),
    _released(
        "coco/panoptic/maskdino_swinl.yaml",
        "maskdino_swinl_50ep_300q_hid2048_3sd1_panoptic_58.3pq.pth",
        pq=58.3,
        box_ap=56.2,
        mask_ap=50.6,
        miou=67.5,
    ),
    _released(
        "ade20k/semantic/maskdino_R50.yaml",
        "maskdino_r50_50ep_100q_celoss_hid1024_3s_semantic_ade20k_48.7miou.pth",
        coarsest_first=True,
        miou=48.7,
    ),
    _released(
        "cityscapes/semantic/maskdino_R50.yaml",
        "maskdino_r50_50ep_100q_celoss_hid1024_3s_semantic_cityscapes_79.8miou.pth",
        coarsest_first=True,
        miou=79.8,
    ),
)


def find_released(name: str) -> ReleasedModel:
    """Finds released weights by the name of their configuration or of their file.

    Raises:
        KeyError: if no weights were released under this name; the message lists those there are.
    """
    for model in RELEASED:
        if name in model.names:
            return model
    known = ", ".join(model.config for model in RELEASED)
    raise KeyError(f"no weights were released for {name!r}; there are some for {known}")
