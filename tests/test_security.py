"""What SECURITY.md says that a file may do, line by line: attacks that must come to nothing.

What would run code, or write a file, touches one (`touched`) that must not be there afterwards.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from maskdino.backbones.convert import read_tensors
from maskdino.checkpoint.checkpointer import MaskDINOCheckpointer
from maskdino.checkpoint.pretrained import save_pretrained
from maskdino.checkpoint.reading import fetch, find_resumption, read_checkpoint
from maskdino.checkpoint.released_yaml import read_released_yaml
from maskdino.cli.install_detectron2 import unpack
from maskdino.cli.prepare import coco_semantic, instances_from_panoptic, semantic_from_instances
from maskdino.cli.prepare.common import PreparationError, read_pixels
from maskdino.config import load_config
from maskdino.custom.checks import check, file_problem
from maskdino.custom.formats.files import image_size
from maskdino.custom.formats.reading import read_own_data
from maskdino.custom.formats.xml import read_xml
from maskdino.custom.formats.yolo import read_yaml
from maskdino.custom.request import Request
from maskdino.data import DataError, register_coco_folder, register_panoptic_folder
from maskdino.data.checks import check_datasets, check_known
from maskdino.data.folders import WITHIN
from maskdino.data.images import ImageError, load_image
from maskdino.data.reading import read_json, read_map
from maskdino.evaluation.files import PANOPTIC_FILE
from maskdino.evaluation.report_images import PanopticImages, SemanticImages
from maskdino.export.engines import OnnxRuntime
from maskdino.export.onnx import ExportedMetadata
from maskdino.inference.video import VideoError, VideoReader
from maskdino.model_zoo import load_pretrained
from maskdino.model_zoo.catalogue import RELEASED
from tests.helpers import tiny_cfg, tiny_model

GOES_OUT = ("../secret.png", "a/../../secret.png", "{outside}/secret.png")


@pytest.fixture
def touched(tmp_path: Path) -> Path:
    return tmp_path / "touched"


class RunsCode:
    """Runs a command when it is unpickled without care."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.touched}",)


class Builds:
    """Writes a file when it is unpickled, by calls of classes that look harmless."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple:
        return Path.touch, (self.touched,)


def new_file(content: object, path: Path) -> None:
    torch.save(content, path)


def old_file(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def object_array(content: object, path: Path) -> None:
    """Arrays of objects hold pickles of their own."""
    array = np.empty(1, object)
    array[0] = content
    bare_pickle({"model": {"weight": array}}, path)


# Where a checkpoint of ours, or of detectron2, can hold more than weights.
PLACES = ("model", "trainer", "ema_state", "best_checkpoint", "optimizer", "anything")


@pytest.mark.parametrize("evil", [RunsCode, Builds])
@pytest.mark.parametrize("write", [new_file, old_file, bare_pickle, object_array])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_no_code_from_checkpoints(
    suffix: str, write: Callable, evil: type, touched: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"model{suffix}"
    for place in PLACES:
        content = {"model": {"weight": torch.ones(1)}}
        content[place] = {"weight": evil(touched)}
        write(content, path)
        for read in (
            read_checkpoint,
            lambda name: read_checkpoint(name, "meta"),
            read_tensors,
            MaskDINOCheckpointer(torch.nn.Linear(1, 1)).load,
        ):
            with pytest.raises(ValueError, match=path.name):
                read(str(path))
            assert not touched.exists(), (place, read)
    if write is bare_pickle:  # so the files do what they should
        pickle.loads(path.read_bytes())
        assert touched.exists()


@pytest.mark.parametrize("write", [new_file, old_file])
def test_no_code_where_a_run_goes_on(write: Callable, touched: Path, tmp_path: Path) -> None:
    """`last_checkpoint` names a file with code; so does the folder of averaged weights."""
    path = tmp_path / "model_0000009.pth"
    write({"model": {"weight": torch.ones(1)}, "trainer": {"hooks": RunsCode(touched)}}, path)
    (tmp_path / "last_checkpoint").write_text(path.name)
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        find_resumption(str(tmp_path))
    with pytest.raises(ValueError, match="not loaded"):
        MaskDINOCheckpointer(tiny_model(), str(tmp_path)).resume_or_load(str(path), resume=False)
    assert not touched.exists()


YAML_ATTACKS = (
    "A: !!python/object/apply:os.system ['touch {touched}']\n",
    "A: !!python/object/new:os.system ['touch {touched}']\n",
    'A: !!python/object/apply:eval [\'__import__("os").system("touch {touched}")\']\n',
    "A: !!python/name:os.system\n",
    "A: !!python/module:os\n",
    "? !!python/object/apply:os.system ['touch {touched}']\n: 1\n",
    "_BASE_: !!python/object/apply:os.system ['touch {touched}']\n",
    "VERSION: 1\nA: !!python/object/apply:os.system ['touch {touched}']\n",
)


@pytest.mark.parametrize("text", YAML_ATTACKS)
def test_no_code_from_yaml(text: str, touched: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text.format(touched=touched))
    within = tmp_path / "base.yaml"
    within.write_text("_BASE_: config.yaml\n")
    metadata = ExportedMetadata(path.read_text(), "predictions", "full", 32, 32)
    readers = [lambda p=p: load_config(str(p)) for p in (path, within)]
    readers += [lambda: read_yaml(path), lambda: read_released_yaml(path), metadata.cfg]
    for read in readers:
        with pytest.raises(Exception, match=r"python/|constructor|refused|unhashable"):
            read()
        assert not touched.exists()


def test_no_code_from_model_folders(touched: Path, tmp_path: Path) -> None:
    """Neither from the configuration nor from weights that are a pickle in truth."""
    folder = save_pretrained(tiny_model(), tiny_cfg(), tmp_path / "model")
    (folder / "model.safetensors").write_bytes(pickle.dumps(RunsCode(touched)))
    with pytest.raises(ValueError, match="no checkpoint, or was cut off"):
        load_pretrained(folder)
    for text in YAML_ATTACKS:
        (folder / "config.yaml").write_text(text.format(touched=touched))
        with pytest.raises(Exception, match=r"python/|constructor|unhashable"):
            load_pretrained(folder)
    assert not touched.exists()


def test_overrides_are_values(touched: Path) -> None:
    text = f"__import__('os').system('touch {touched}')"
    cfg = load_config(None, ["OUTPUT_DIR", text])
    assert text == cfg.OUTPUT_DIR
    assert not touched.exists()


def test_python_files_are_no_configurations(touched: Path, tmp_path: Path) -> None:
    """A LazyConfig is code: it runs only where it is named as such."""
    path = tmp_path / "config.py"
    path.write_text(f"import os\nos.system('touch {touched}')\n")
    for base in (path, tmp_path / "within.yaml"):
        (tmp_path / "within.yaml").write_text("_BASE_: config.py\n")
        with pytest.raises(ValueError, match=re.escape(path.name)):
            load_config(str(base))
        assert not touched.exists()


def external_model(path: Path, location: str) -> Path:
    """An ONNX file with a weight that lies in another file."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=1)
    entry = weight.external_data.add()
    entry.key, entry.value = "location", location
    values = [onnx.helper.make_tensor_value_info(name, 1, [4]) for name in "xy"]
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], [weight])
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def test_onnx_files_read_nothing_outside_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (folder / "beside.bin", tmp_path / "secret.bin"):
        place.write_bytes(np.ones(4, np.float32).tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    assert OnnxRuntime(external_model(folder / "m.onnx", "beside.bin"))
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24):
        pytest.skip(f"onnxruntime {onnxruntime.__version__} reads any file; see SECURITY.md")
    for location in ("../secret.bin", str(tmp_path / "secret.bin"), "link.bin"):
        path = external_model(folder / "m.onnx", location)
        with pytest.raises(ValueError, match="onnxruntime cannot run"):
            OnnxRuntime(path)


def coco_content(file_name: str) -> dict:
    box = {"bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
    square = [[1, 1, 6, 1, 6, 6, 1, 6]]
    return {
        "images": [{"id": 1, "file_name": file_name, "height": 16, "width": 16}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": square, **box}],
        "categories": [{"id": 1, "name": "thing", "isthing": 1}],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of images, and beside it one more image."""
    folder = tmp_path / "data" / "images"
    folder.mkdir(parents=True)
    for path in (folder / "good.png", folder.parent / "secret.png", tmp_path / "secret.png"):
        Image.new("RGB", (16, 16), "red").save(path)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    name = f"security_{request.node.name}"
    request.addfinalizer(lambda: DatasetCatalog.data.pop(name, None))
    request.addfinalizer(lambda: MetadataCatalog.data.pop(name, None))
    return name


def checked(name: str) -> None:
    options = {"DATASETS.TRAIN": (name,), "DATASETS.TEST": (), "MODEL.MASK_DINO.NUM_CLASSES": 1}
    check_datasets(load_config(None, [word for item in options.items() for word in item]))


@pytest.mark.parametrize("file_name", [*GOES_OUT, "good.png", "link.png", "{folder}/good.png"])
@pytest.mark.parametrize("any_path", [False, True])
def test_images_of_registered_datasets_stay_in_their_folder(
    file_name: str, any_path: bool, folder: Path, name: str
) -> None:
    inside = file_name not in GOES_OUT
    file_name = file_name.format(outside=folder.parent, folder=folder)
    (folder / "a").mkdir()
    path = folder.parent / "instances.json"
    path.write_text(json.dumps(coco_content(file_name)))
    options = {"any_path": True} if any_path else {}
    register_coco_folder(name, path, folder, **options)
    if inside or any_path:
        checked(name)
        return
    with pytest.raises(DataError, match=r"leads out.*image 1: .*secret.png.*any_path=True"):
        checked(name)


@pytest.mark.parametrize("which", ["images", "annotations"])
@pytest.mark.parametrize("file_name", [*GOES_OUT, "good.png"])
@pytest.mark.parametrize("any_path", [False, True])
def test_files_of_panoptic_datasets_stay_in_their_folders(
    which: str, file_name: str, any_path: bool, folder: Path, name: str
) -> None:
    content = coco_content("good.png")
    content["annotations"] = [{"image_id": 1, "file_name": "good.png", "segments_info": []}]
    content[which][0]["file_name"] = file_name.format(outside=folder.parent)
    path = folder.parent / "panoptic.json"
    path.write_text(json.dumps(content))
    register_panoptic_folder(
        name, path, folder, folder, content["categories"], sem_seg_root=folder, any_path=any_path
    )
    if any_path or file_name == "good.png":
        assert len(DatasetCatalog.get(name)) == 1
        return
    with pytest.raises(DataError, match=r"panoptic.json: the file name .* leads out of"):
        DatasetCatalog.get(name)


@pytest.mark.parametrize("file_name", GOES_OUT)
def test_images_of_own_coco_data_stay_in_their_folder(
    file_name: str, folder: Path, tmp_path: Path
) -> None:
    content = coco_content("good.png")
    outside = {**content["images"][0], "id": 2, "file_name": file_name.format(outside=tmp_path)}
    content["images"].append(outside)
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    for request in (
        Request(output=tmp_path, data=folder),
        Request(output=tmp_path, train_json=path, train_images=folder),
    ):
        data = read_own_data(request).train.data
        found = [finding for finding in check(data) if finding.image == 1]
        assert found and found[0].fatal
        assert "leads out of" in found[0].kind or "missing" in found[0].kind
        assert "any_path" not in found[0].detail  # of datasets that are registered
        if "leads out of" in found[0].kind:
            assert found[0].detail.endswith("them all, with --data or --train-images")


def test_own_coco_data_may_lie_in_two_folders(folder: Path, tmp_path: Path) -> None:
    """Names that lead from the folder of the annotations to that of the images, in the data."""
    path = folder.parent / "annotations" / "instances.json"
    path.parent.mkdir()
    path.write_text(json.dumps(coco_content("../images/good.png")))
    data = read_own_data(Request(output=tmp_path, data=folder.parent)).train.data
    assert data.path_of(data.images[0]) == folder / "good.png"
    assert not any(finding.fatal for finding in check(data))


def test_labels_find_no_image_outside_of_their_folder(folder: Path, tmp_path: Path) -> None:
    """labelme's files name their image by any path."""
    shape = {"label": "thing", "points": [[1, 1], [6, 1], [6, 6]], "shape_type": "polygon"}
    for number, image in enumerate(("good.png", *GOES_OUT)):
        text = {"imagePath": image.format(outside=tmp_path), "shapes": [shape]}
        text |= {"version": "5", "flags": {}, "imageHeight": 16, "imageWidth": 16}
        (folder / f"label{number}.json").write_text(json.dumps(text))
    part = read_own_data(Request(output=tmp_path, data=folder)).train
    assert [image["file_name"] for image in part.data.images] == ["good.png"]
    assert len(part.findings) == len(GOES_OUT)


def test_folders_that_yolos_settings_name_may_be_any(tmp_path: Path) -> None:
    """They are settings, as those of a configuration; their images get names below a folder."""
    images, labels = (tmp_path / "elsewhere" / kind / "train" for kind in ("images", "labels"))
    for folder in (images, labels, tmp_path / "data"):
        folder.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(images / "a.png")
    (labels / "a.txt").write_text("0 0.5 0.5 0.25 0.25\n")
    settings = {"train": str(images), "names": ["thing"]}
    (tmp_path / "data" / "data.yaml").write_text(json.dumps(settings))
    data = read_own_data(Request(output=tmp_path, data=tmp_path / "data/data.yaml")).train.data
    assert data.path_of(data.images[0]) == images / "a.png"
    assert not any(finding.fatal for finding in check(data))


@pytest.mark.parametrize("file_name", [*GOES_OUT, "good.png"])
def test_a_record_beside_a_configuration_gives_own_data_alone(
    file_name: str, folder: Path, tmp_path: Path
) -> None:
    """No other dataset changes, nothing beside it is imported, and its images stay in a folder."""
    run = tmp_path / "run"
    (run / "data").mkdir(parents=True)
    (run / "config.yaml").write_text("VERSION: 2\n")
    (run / "own_data.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')")
    image = {"id": 1, "file_name": file_name.format(outside=tmp_path), "height": 4, "width": 4}
    classes = [{"id": 1, "name": "a"}]
    content = {"images": [image], "annotations": [], "categories": classes}
    (run / "data" / "a.json").write_text(json.dumps(content))
    entry = {"json_file": "a.json", "image_root": str(folder), "categories": classes}
    names = ("custom_train", "custom_val", "coco_2017_val", "mine")
    (run / "data" / "datasets.json").write_text(json.dumps(dict.fromkeys(names, entry)))
    before = MetadataCatalog.get("coco_2017_val").json_file
    try:
        load_config(str(run / "config.yaml"))
        assert MetadataCatalog.get("coco_2017_val").json_file == before
        assert "mine" not in DatasetCatalog.list()
        assert not (tmp_path / "touched").exists()
        if file_name in GOES_OUT:
            with pytest.raises(DataError, match="leads out of the image folder"):
                check_known("custom_val")
        else:
            check_known("custom_val")
    finally:
        for name in names[:2]:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.mark.parametrize("file_name", GOES_OUT)
def test_preparations_write_and_read_in_their_folders(
    file_name: str, folder: Path, tmp_path: Path
) -> None:
    content = coco_content("good.png")
    outside = file_name.format(outside=folder.parent)
    content["annotations"] = [{"image_id": 1, "file_name": outside, "segments_info": []}]
    path, before = tmp_path / "panoptic.json", sorted(tmp_path.rglob("*.png"))
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"leads out of .*: {WITHIN}$"):
        coco_semantic.prepare(path, folder, folder, 1, True)
    output = tmp_path / "instances.json"
    with pytest.raises(DataError, match=f"leads out of .*: {WITHIN}$"):
        instances_from_panoptic.prepare(path, folder, output, 1, True)
    path.write_text(json.dumps(coco_content(outside)))
    with pytest.raises(DataError, match=f"leads out of .*: {WITHIN}$"):
        semantic_from_instances.prepare(path, folder, 1, True)
    assert sorted(tmp_path.rglob("*.png")) == before
    assert {Image.open(file).getpixel((0, 0)) for file in before} == {(255, 0, 0)}


@pytest.mark.parametrize("place", ["maps", "output"])
def test_a_preparation_reads_in_one_folder_and_writes_in_another(
    place: str, tmp_path: Path
) -> None:
    """A whole path lies in one of them at most."""
    for other in ("maps", "output"):
        (tmp_path / other).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / other / "a.png")
    content = coco_content("good.png")
    name = str(tmp_path / place / "a.png")
    content["annotations"] = [{"image_id": 1, "file_name": name, "segments_info": []}]
    path = tmp_path / "panoptic.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"leads out of .*: {WITHIN}$"):
        coco_semantic.prepare(path, tmp_path / "maps", tmp_path / "output", 1, True)


@pytest.mark.parametrize("file_name", GOES_OUT)
def test_a_report_reads_in_its_folder(file_name: str, tmp_path: Path) -> None:
    """An evaluation leaves a list of its label maps; it may come from elsewhere."""
    images = object.__new__(SemanticImages)
    images.folder, images._found = tmp_path, {"a.jpg": file_name.format(outside=tmp_path)}
    with pytest.raises(DataError, match=f"leads out of .*: {WITHIN}$"):
        images._file({"file_name": "a.jpg"})


@pytest.mark.parametrize("file_name", GOES_OUT)
def test_a_report_reads_segments_in_its_folder(file_name: str, tmp_path: Path) -> None:
    """Before panopticapi opens any of them."""
    images = object.__new__(PanopticImages)
    images.folder, images.records = tmp_path, [{"image_id": 1}]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"categories": [], "annotations": []}))
    images.metadata = SimpleNamespace(panoptic_json=str(truth))
    found = [{"image_id": 1, "file_name": file_name.format(outside=tmp_path)}]
    (tmp_path / PANOPTIC_FILE).write_text(json.dumps({"annotations": found}))
    with pytest.raises(DataError, match=f"leads out of .*: {WITHIN}$"):
        images.read()


def test_archives_unpack_into_their_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for member in ("../evil", str(tmp_path / "evil"), "detectron2/../../evil"):
        with tarfile.open(tmp_path / "sources.tar.gz", "w:gz") as tar:
            entry = tarfile.TarInfo(member)
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"evil"))
        with pytest.raises(Exception, match=r"outside|absolute|expected one"):
            unpack(tmp_path / "sources.tar.gz", target)
        assert not (tmp_path / "evil").exists()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG whose head says what it likes, with hardly any pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    parts = ((b"IHDR", head), *chunks, (b"IDAT", pixels), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def bmp() -> bytes:
    """A BMP file whose head says 100,000 x 100,000 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (4321, 8)).save(file, "BMP")
    return file.getvalue().replace(
        struct.pack("<II", 4321, 8), struct.pack("<II", 100_000, 100_000), 1
    )


@pytest.mark.parametrize(
    "content",
    [
        png(100_000, 100_000),
        png(2**31 - 1, 2**31 - 1),
        png(16, 16, (b"zTXt", b"comment\0\0" + zlib.compress(bytes(200 << 20)))),
        png(16, 16, (b"iCCP", b"profile\0\0" + zlib.compress(bytes(200 << 20)))),
        bmp(),
    ],
    ids=["png", "png of 31 bits", "text of 200 MB", "profile of 200 MB", "bmp"],
)
def test_heads_of_images_claim_no_memory(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert len(content) < 1 << 20
    for read in (load_image, lambda name: read_map(name, None)):
        with pytest.raises((ImageError, DataError), match=r"image.png"):
            read(str(path))
    with pytest.raises(PreparationError, match="cannot read"):
        read_pixels(path)
    assert file_problem(path, (100_000, 100_000)) is not None


def test_images_too_large_are_refused_by_their_heads(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(png(100_000, 100_000))
    with pytest.raises(DataError, match="cannot be read"):
        image_size(tmp_path / "image.png")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"images": [1' + "0" * 5000])
def test_json_of_any_depth(text: str, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text(text)
    with pytest.raises(DataError, match="instances.json"):
        read_json(str(path))


def test_xml_takes_no_entities(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    for entity in ('"lol"', f'SYSTEM "file://{tmp_path}/secret"'):
        path.write_text(f"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY e {entity}>]><a>&e;</a>")
        with pytest.raises(DataError, match="declares a document type or entities"):
            read_xml(path)


def test_videos_read_no_other_file(tmp_path: Path) -> None:
    """Lists of parts with the suffix of a video; and a head of 100,000 x 100,000 pixels."""
    av = pytest.importorskip("av")
    (tmp_path / "videos").mkdir()
    path, secret = tmp_path / "videos" / "video.avi", tmp_path / "secret.avi"
    with av.open(str(secret), "w") as container:
        stream = container.add_stream("rawvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr24"
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="bgr24")
        container.mux(stream.encode(frame))
    assert len(list(VideoReader(secret))) == 1
    listed = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    for text in (listed, "ffconcat version 1.0\nfile {}\n"):
        for named in ("../secret.avi", str(secret), f"file:{secret}"):
            path.write_text(text.format(named))
            with pytest.raises(VideoError, match="cannot read video"):
                VideoReader(path)
    content = secret.read_bytes()
    for before, after in (((64, 48), (100_000,) * 2), ((64, -48), (100_000, -100_000))):
        content = content.replace(struct.pack("<ii", *before), struct.pack("<ii", *after))
    path.write_bytes(content)
    reader = VideoReader(path)
    assert list(reader) == [] and reader.skipped > 0


@pytest.mark.parametrize("address", ["http://example.com/a.pth", "ftp://example.com/a.pth"])
def test_nothing_is_downloaded_without_https(address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use https"):
        fetch(address)
    path = tmp_path / "config.yaml"
    path.write_text("_BASE_: http://example.com/base.yaml\n")
    with pytest.raises(ValueError, match="https://"):
        load_config(str(path))


def test_what_the_project_downloads(repository: Path) -> None:
    """Weights come from one address; other packages by their hashes."""
    assert all(re.match(r"https://github\.com/IDEA-Research/", model.url) for model in RELEASED)
    for path in (repository / "tools").glob("*.sh"):
        text = path.read_text()
        assert not re.search(r"\b(curl|wget)\b|http://", text), path
    setup = (repository / "tools/setup_env.sh").read_text()
    assert re.search(r"--no-deps --require-hashes", setup)
    assert re.search(r"panopticapi_sha256=[0-9a-f]{64}\n", setup)
