"""The configuration: its keys and their defaults, reading it, and the values that make no sense."""

from maskdino.config.defaults import add_maskdino_config
from maskdino.config.loading import complete_config, load_config

__all__ = ["add_maskdino_config", "complete_config", "load_config"]
