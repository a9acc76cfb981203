"""Own data in the format that they are in: what a folder holds is recognized, and read.

COCO (Roboflow's folders too), YOLO, Pascal VOC, LabelMe and CVAT, and Label Studio's exports in
these, become COCO's lists in memory; nothing is written beside the data. The readers are our own:
the libraries that read several of these formats turn polygons into bitmaps of whole pixels, one of
the size of the image for each object, stop at the first line that is wrong, and know no CVAT.
"""

from maskdino.custom.formats.collect import Dataset, Part
from maskdino.custom.formats.reading import OwnData, read_dataset, read_own_data

__all__ = ["Dataset", "OwnData", "Part", "read_dataset", "read_own_data"]
