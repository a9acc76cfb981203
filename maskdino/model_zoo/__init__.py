"""Models by name: shipped configurations, and the weights that the paper's authors released.

from maskdino import model_zoo
model = model_zoo.get("coco/instance/maskdino_R50.yaml", trained=True)
"""

from .catalogue import RELEASED, ReleasedModel, find_released
from .zoo import (
    RELEASED_WEIGHTS,
    build_pretrained,
    download,
    find_config,
    get,
    get_checkpoint_url,
    get_config,
    get_config_file,
    load_pretrained,
    read_config,
)
from .zoo import list_configs as list

__all__ = [
    "RELEASED",
    "RELEASED_WEIGHTS",
    "ReleasedModel",
    "build_pretrained",
    "download",
    "find_config",
    "find_released",
    "get",
    "get_checkpoint_url",
    "get_config",
    "get_config_file",
    "list",
    "load_pretrained",
    "read_config",
]
