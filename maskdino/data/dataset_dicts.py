"""Dataset dicts, as detectron2 has them, of panoptic and semantic annotations."""

from __future__ import annotations

from functools import partial

from maskdino.data.folders import inside
from maskdino.data.reading import DataError, read_json


def load_panoptic(metadata: dict) -> list[dict]:
    """Reads annotations in COCO's panoptic format.

    Returns:
        Dataset dicts with "file_name", "image_id", "height", "width", "pan_seg_file_name",
        "segments_info" (its category ids are class numbers) and, if there is a folder of semantic
        maps, "sem_seg_file_name".

    Raises:
        DataError: an annotation belongs to no image, or to no category, or a file name leads out
            of its folder.
    """
    json_file = metadata["panoptic_json"]
    content = read_json(json_file)
    try:
        return _panoptic_dicts(content, metadata)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{json_file} is not in COCO's panoptic format: {type(error).__name__} {error}"
        ) from error


def _panoptic_dicts(content: dict, metadata: dict) -> list[dict]:
    """What `load_panoptic` gives, of the content of the file."""
    json_file = metadata["panoptic_json"]
    images = {image["id"]: image for image in content["images"]}
    numbers = {
        **metadata["thing_dataset_id_to_contiguous_id"],
        **metadata["stuff_dataset_id_to_contiguous_id"],
    }
    dicts = []
    find = partial(inside, source=json_file, any_path=metadata.get("any_path", False))
    for annotation in content["annotations"]:
        image = images.get(annotation["image_id"])
        if image is None:
            raise DataError(f"{json_file} has no image {annotation['image_id']!r} (an annotation)")
        unknown = {s["category_id"] for s in annotation["segments_info"]} - set(numbers)
        if unknown:
            raise DataError(
                f"{json_file}: segments of {annotation['file_name']} have the categories "
                f"{sorted(unknown)}, which the dataset does not know"
            )
        segments = [
            {**s, "category_id": numbers[s["category_id"]]} for s in annotation["segments_info"]
        ]
        record = {
            "file_name": find(metadata["image_root"], image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "pan_seg_file_name": find(metadata["panoptic_root"], annotation["file_name"]),
            "segments_info": segments,
        }
        if "sem_seg_root" in metadata:
            maps = metadata["sem_seg_root"]
            record["sem_seg_file_name"] = find(maps, annotation["file_name"])
        dicts.append(record)
    return dicts


def load_semantic_list(sem_seg_root: str, image_root: str, json_file: str) -> list[dict]:
    """Reads a list of images with semantic maps; see `register_semantic_folder`.

    Returns:
        Dataset dicts with "file_name", "sem_seg_file_name" and whatever else is in the list, such
        as "height" and "width".

    Raises:
        DataError: there is no such list, or a file name leads out of its folder.
    """
    roots = {"file_name": image_root, "sem_seg_file_name": sem_seg_root}
    try:
        return [
            {**image, **{key: inside(root, image[key], json_file) for key, root in roots.items()}}
            for image in read_json(json_file)["images"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{json_file} is no list of images with semantic maps: {type(error).__name__} {error}"
        ) from error
