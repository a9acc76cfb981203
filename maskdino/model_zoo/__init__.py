"""Models by name: shipped configurations, and the weights that the paper's authors released.

from maskdino import model_zoo
model = model_zoo.get("coco/instance/maskdino_R50.yaml", trained=True)
"""

from .catalogue import RELEASED, ReleasedModel, find_released
from .zoo import download, get, get_checkpoint_url, get_config, get_config_file
from .zoo import list_configs as list

__all__ = [
    "RELEASED",
    "ReleasedModel",
    "download",
    "find_released",
    "get",
    "get_checkpoint_url",
    "get_config",
    "get_config_file",
    "list",
]
