"""The card of a model: what it is, what it was trained with, how good it is, and how to use it.

Its front matter is YAML with the keys of model hubs (license, library_name, tags, pipeline_tag,
datasets, metrics, model-index).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml
from detectron2.config import CfgNode

from maskdino.metrics import of_classes_together
from maskdino.system.program import VERSION
from maskdino.system.words import counted

if TYPE_CHECKING:
    from maskdino.checkpoint.pretrained import Facts

MOST_CLASSES = 200  # that are listed
# What hubs call metrics, by the last part of their names here; those of single classes have others.
HUB_METRICS = {"AP": "mean_average_precision", "PQ": "panoptic_quality", "mIoU": "mean_iou"}
TASKS = {
    "INSTANCE_ON": "instance segmentation",
    "PANOPTIC_ON": "panoptic segmentation",
    "SEMANTIC_ON": "semantic segmentation",
}
TEMPLATE = """\
---
{{ front }}---

# {{ facts.name }}

Mask DINO ([arXiv 2206.02777](https://arxiv.org/abs/2206.02777)) for {{ tasks | join(", ") }}.
Backbone {{ backbone }}, {{ queries }} queries, {{ parameters }} million parameters,
{{ classes }}.
{{ weights }}

## Data

{% if train %}
Trained on {{ train | join(", ") }}.
{% else %}
The configuration names no data that it was trained on.
{% endif %}
{% if names %}
Its classes: {{ names | join(", ") }}.
{% else %}
Its {{ classes }} are listed in `categories.json`.
{% endif %}

## Results

{% if facts.metrics %}
Measured on {{ facts.dataset or "the data that its training was evaluated on" }};
AP, PQ and mIoU are in percent.

| metric | value |
|---|---|
{% for name, value in facts.metrics.items() %}
| {{ name }} | {{ "%.4g" | format(value) }} |
{% endfor %}
{% else %}
No evaluation is recorded.
{% endif %}

## How to use

With the package maskdino ({{ version }} or newer), where this folder is `model`:

```python
import maskdino

predictor = maskdino.MaskDINOPredictor.from_pretrained("model")  # or "user/name" on the hub
result = predictor("photo.jpg")
result.save("drawn.png")
```

```bash
maskdino predict --config-file model --input photo.jpg --output drawn
maskdino publish --inspect model/model.safetensors
```

`maskdino.load_pretrained("model")` gives the model, as detectron2 knows it, and its configuration.

## Limits

- It knows the classes above and nothing else: other objects are left out, or taken for one of them.
- How well it does on images that are not like those it was trained on (other cameras, places,
  light, sizes of objects) is not known: measure it on your own before you rely on it.
- The network reads images with a shorter edge of {{ shortest }} pixels and a longer one of at most
  {{ longest }}: objects of a few pixels there are missed. `predictor.sliced` reads large images in
  parts.
- Scores rank results: they were not calibrated as probabilities, and the default threshold of 0.5
  is a choice.
{% if facts.license == "other" %}
- Its license is not stated: ask whoever made it, and mind the licenses of the data and of the
  weights it began with.
{% endif %}
"""


def tasks_of(cfg: CfgNode) -> list[str]:
    """What the model of a configuration does, in words."""
    node = cfg.MODEL.MASK_DINO
    if not node.MASK_ON:
        return ["object detection"]
    return [task for key, task in TASKS.items() if node.TEST[key]]


def model_card(cfg: CfgNode, facts: Facts, parameters: int) -> str:
    """The card as Markdown."""
    import jinja2  # here, as `import maskdino` needs none

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    categories = facts.categories
    front = _front(cfg, facts, of_classes_together(facts.metrics))
    return environment.from_string(TEMPLATE).render(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        facts=facts,
        tasks=tasks_of(cfg),
        backbone=_backbone(cfg),
        classes=counted(len(categories), "class"),
        names=categories.names if len(categories) <= MOST_CLASSES else (),
        queries=cfg.MODEL.MASK_DINO.QUERY_SELECTION.NUM_QUERIES,
        parameters=f"{parameters / 1e6:.1f}",
        weights=_weights(facts),
        train=list(cfg.DATASETS.TRAIN),
        version=VERSION,
        shortest=cfg.INPUT.MIN_SIZE_TEST,
        longest=cfg.INPUT.MAX_SIZE_TEST,
    )


def _front(cfg: CfgNode, facts: Facts, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The front matter; numbers of single classes are left to the table."""
    tasks = tasks_of(cfg)
    front: dict[str, Any] = {
        "license": facts.license,
        "library_name": "maskdino",
        "pipeline_tag": "image-segmentation" if cfg.MODEL.MASK_DINO.MASK_ON else "object-detection",
        "tags": ["mask-dino", "detectron2", *(task.replace(" ", "-") for task in tasks)],
    }
    if cfg.DATASETS.TRAIN:
        front["datasets"] = list(cfg.DATASETS.TRAIN)
    kinds = {kind for name in metrics if (kind := HUB_METRICS.get(name.rpartition("/")[2]))}
    if kinds:
        front["metrics"] = sorted(kinds)
    if metrics and facts.dataset:
        front["model-index"] = [
            {
                "name": facts.name,
                "results": [
                    {
                        "task": {"type": front["pipeline_tag"]},
                        "dataset": {"name": facts.dataset, "type": facts.dataset},
                        "metrics": [
                            {
                                "type": HUB_METRICS.get(name.rpartition("/")[2], name),
                                "name": name,
                                "value": round(value, 4),
                            }
                            for name, value in metrics.items()
                        ],
                    }
                ],
            }
        ]
    return front


def _weights(facts: Facts) -> str:
    """What is known of the weights, in sentences."""
    told = []
    if facts.iterations is not None:
        told.append(f"It was trained for {counted(facts.iterations, 'step')}.")
    if facts.averaged is not None:
        is_or_not = "are averaged over the training (EMA)" if facts.averaged else "are not averaged"
        told.append(f"Its weights {is_or_not}.")
    if facts.rounded:
        told.append(
            "Weights are rounded to float16: results are near those of the float32 weights, which "
            "the results below are of, but not equal to them."
        )
    return " ".join(told)


def _backbone(cfg: CfgNode) -> str:
    name = cfg.MODEL.BACKBONE.NAME
    if name == "build_resnet_backbone":
        return f"ResNet-{cfg.MODEL.RESNETS.DEPTH}"
    return cfg.MODEL.TIMM.NAME if name == "build_timm_backbone" else name
