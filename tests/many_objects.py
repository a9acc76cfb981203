"""Training steps of one image of 256 pixels with 1,000 objects, in a process of its own.

    python -m tests.many_objects 1200 2

prints, for the tiny model of nuclei with so many queries, and so many threads, the time of each
step and its processor time, in seconds, and the memory that the process held before and at most, in
MiB, as one line of JSON.
"""

from __future__ import annotations

import json
import math
import sys
import time

import torch
from detectron2.structures import Boxes, Instances

from maskdino.config import load_config
from maskdino.model import MaskDINO
from maskdino.structures import PackedMasks
from tests.helpers import rectangles
from tests.large_image import CONFIG
from tests.memory import most_resident_mib, resident_mib

SIZE, OBJECTS, STEPS = 256, 1000, 5


def drawn() -> list[dict]:
    """Noise, and rectangles of 4 to 23 pixels."""
    instances = Instances((SIZE, SIZE))
    low, sides = torch.randint(0, SIZE - 24, (OBJECTS, 2)), torch.randint(4, 24, (OBJECTS, 2))
    instances.gt_boxes = Boxes(torch.cat([low, low + sides], dim=1).float())
    instances.gt_classes = torch.zeros(OBJECTS, dtype=torch.int64)
    masks = rectangles(instances.gt_boxes.tensor, (SIZE, SIZE))
    instances.gt_masks = PackedMasks.from_bool(masks)
    image = torch.randint(0, 256, (3, SIZE, SIZE)).float()
    return [{"image": image, "instances": instances, "height": SIZE, "width": SIZE}]


def main(queries: int, threads: int) -> None:
    """Makes the steps, with random weights to begin with."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    words = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    words += ["MODEL.MASK_DINO.QUERY_SELECTION.NUM_QUERIES", str(queries)]
    model = MaskDINO(load_config(f"configs/{CONFIG}.yaml", words)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch, before = drawn(), resident_mib()
    seconds, processor = list[float](), list[float]()
    for _ in range(STEPS):
        begin = time.perf_counter(), time.process_time()
        loss = torch.stack(list(model(batch).values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert math.isfinite(loss.item())
        seconds.append(time.perf_counter() - begin[0])
        processor.append(time.process_time() - begin[1])
    times = {"seconds": seconds, "processor": processor}
    print(json.dumps(times | {"before": before, "most": most_resident_mib()}))  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
