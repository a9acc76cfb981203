"""Mask DINO: detection and instance, panoptic and semantic segmentation with one transformer.

Importing this package registers the meta-architecture, the backbones and the datasets with
detectron2, under names that are free; names that other packages are known to register too wait for
`add_maskdino_config`.
"""

from maskdino.integration import released_names
from maskdino.integration.released_names import missing_attribute as __getattr__  # noqa: F401
from maskdino.system import program
from maskdino.system.program import VERSION as __version__  # noqa: F401

released_names.install()
if program.is_command() or program.is_script():
    program.wait_briefly()
    program.leave_out_deprecations()
if not program.is_command():  # which loads the rest when it is sure to need it
    program.require_detectron2()
    from maskdino.api import *  # noqa: F403
    from maskdino.api import __all__  # noqa: F401
    from maskdino.integration import extensions

    extensions.import_recorded()  # they may import this package, which is complete now
