"""Mask DINO: detection and instance, panoptic and semantic segmentation with one transformer.

Importing this package registers the meta-architecture, the backbones and the datasets with
detectron2, under names that are free; names that other packages are known to register too wait for
`add_maskdino_config`.
"""

from maskdino import program, released_names
from maskdino.program import VERSION as __version__  # noqa: F401
from maskdino.released_names import missing_attribute as __getattr__  # noqa: F401

released_names.install()
if program.is_command() or program.is_script():
    program.wait_briefly()
    program.leave_out_deprecations()
if not program.is_command():  # which loads the rest when it is sure to need it
    program.require_detectron2()
    from maskdino import extensions
    from maskdino.api import *  # noqa: F403
    from maskdino.api import __all__  # noqa: F401

    extensions.import_recorded()  # they may import this package, which is complete now
