"""Configuration keys that Mask DINO adds to detectron2's, one node for each module."""

from detectron2.config import CfgNode

from maskdino.integration.registration import register_postponed

# Keys of 0.2.0, and the value of MODEL.MASK_DINO.RECOMPUTE where one was on.
RECOMPUTE_BEFORE = {
    "MODEL.MASK_DINO.ENCODER.ACTIVATION_CHECKPOINT": "all",
    "MODEL.MASK_DINO.ENCODER.RECOMPUTE_FEEDFORWARD": "all",
    "MODEL.MASK_DINO.RECOMPUTE_ATTENTION": "cheap",
}


def add_maskdino_config(cfg: CfgNode) -> None:
    """Adds Mask DINO's keys, with the paper's values, to a detectron2 configuration (in place).

    One that has them stays as it is. Registers the names that waited for a configuration
    (:mod:`maskdino.integration.registration`).
    """
    register_postponed()
    if "MASK_DINO" in cfg.MODEL:  # as where a tool reads one for which a module of the user asked
        return
    _add_model(cfg)
    _add_queries_and_decoder(cfg)
    _add_backbone(cfg)
    _add_matcher_and_loss(cfg)
    _add_test(cfg)
    _add_input(cfg)
    _add_solver(cfg)
    _add_evaluation(cfg)
    _add_log(cfg)


def _add_model(cfg: CfgNode) -> None:
    model = cfg.MODEL.MASK_DINO = CfgNode()
    # Number of classes that the class head predicts ("no object" not counted).
    model.NUM_CLASSES = 80
    # Their names, for results on own data, which no registered dataset names.
    model.CLASS_NAMES = []
    # Those of them that are no things, of panoptic models of own data.
    model.STUFF_CLASSES = []
    # Channels of tokens and queries.
    model.HIDDEN_DIM = 256
    # Batches are padded, at the right and at the bottom, to a multiple of this number of pixels.
    model.SIZE_DIVISIBILITY = 32
    # Whether there is a mask branch (section 3.4). False gives a pure detector (DINO with this
    # code).
    model.MASK_ON = True
    # What a training step computes again in the backward pass instead of keeping it: "none";
    # "cheap", what is large for the time that it takes; or "all", all but a sum of encoder layers.
    model.RECOMPUTE = "none"
    for key in RECOMPUTE_BEFORE:
        cfg.register_deprecated_key(key)

    # Multi-scale deformable encoder.
    encoder = model.ENCODER = CfgNode()
    encoder.IN_FEATURES = ["res3", "res4", "res5"]  # backbone features, finest first
    # Scales in all: those beyond IN_FEATURES are stride-2 convolutions of the last.
    encoder.NUM_LEVELS = 4
    encoder.NUM_LAYERS = 6
    encoder.NUM_HEADS = 8
    encoder.NUM_POINTS = 4  # sampling points per head and level
    encoder.FEEDFORWARD_DIM = 2048

    # Pixel embedding map (section 3.4, equation 1).
    pixel_embedding = model.PIXEL_EMBEDDING = CfgNode()
    pixel_embedding.IN_FEATURE = "res2"  # backbone feature at 1/4 of the image


def _add_queries_and_decoder(cfg: CfgNode) -> None:
    model = cfg.MODEL.MASK_DINO
    # Unified and enhanced query selection (section 3.5).
    selection = model.QUERY_SELECTION = CfgNode()
    selection.ENABLED = True  # False: learned content queries and anchors
    selection.NUM_QUERIES = 300
    # Initial anchors: "mask2box" or "bitmask" (boxes of the predicted masks; the last foreground
    # pixel is the border, or lies inside), or "none" (the predicted boxes).
    selection.MASK_ENHANCED_ANCHORS = "mask2box"
    # Anchor of a query whose mask is empty, as those of a new mask branch often are: "box" (the
    # predicted box), or "corner" (of the image, without size, as in the released models).
    selection.EMPTY_MASKS = "box"
    # Level with the largest proposals: "coarsest", or "finest" as in the released models trained
    # finest level first.
    selection.LARGEST_PROPOSALS = "coarsest"

    decoder = model.DECODER = CfgNode()
    decoder.NUM_LAYERS = 9
    decoder.NUM_LEVELS = 0  # scales that queries attend to, the finest; 0: all (Table 10)
    decoder.NUM_HEADS = 8
    decoder.NUM_POINTS = 4  # sampling points per head and level
    decoder.FEEDFORWARD_DIM = 2048

    # Unified denoising (section 3.6, appendix B.2).
    denoising = model.DENOISING = CfgNode()
    denoising.MODE = "boxes_and_masks"  # or "boxes" (without mask losses), or "off"
    denoising.NUM_QUERIES = 100  # at most this many noised queries, but at least one group
    denoising.LABEL_NOISE = 0.2  # probability that a label is drawn anew
    # lambda_1 and lambda_2 of DN-DETR, as one: |dx| < BOX_NOISE w / 2 and |dw| < BOX_NOISE w.
    denoising.BOX_NOISE = 0.4


def _add_backbone(cfg: CfgNode) -> None:
    # MODEL.BACKBONE.NAME names a builder registered in detectron2 or a model of timm; these keys
    # are for the latter.
    # MODEL.BACKBONE.FREEZE_AT (detectron2) counts stages there too: 0 none, 1 the stem, 2 also
    # res2, ...
    timm = cfg.MODEL.TIMM = CfgNode()
    # Name of the timm model when MODEL.BACKBONE.NAME is "build_timm_backbone" (for plain detectron2
    # models).
    timm.NAME = "resnet50"
    timm.PRETRAINED = False  # load timm's weights; left out where MODEL.WEIGHTS gives a file
    # A file with weights of the backbone alone, as timm or its authors publish them (.pth,
    # .safetensors), or "pip:" and the name of an installed package of weights
    # (maskdino.backbones.packaged); left out where MODEL.WEIGHTS gives a file.
    timm.WEIGHTS = ""
    timm.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    timm.OUTPUT_NORM = False  # a layer norm on each output, as Swin detectors have
    timm.BATCH_NORM = "FrozenBN"  # or "BN", "SyncBN"; for models with batch norm
    timm.DROP_PATH_RATE = 0.0  # largest probability that a block is skipped in training
    # Recompute activations in the backward pass: less memory, more time.
    timm.ACTIVATION_CHECKPOINT = False
    # More arguments of timm.create_model, such as embed_dim; null takes one of a `_BASE_` back.
    timm.ARGS = CfgNode(new_allowed=True)
    # Plain vision transformers: timm's models of one stride, through a simple feature pyramid.
    vit = cfg.MODEL.VIT = CfgNode()
    vit.PYRAMID_CHANNELS = 256
    vit.WINDOW_SIZE = 0  # tokens; 0: every block sees all tokens
    # Blocks that see all tokens, where the others see windows; []: the last of each quarter.
    vit.GLOBAL_BLOCKS = []
    # Keys of released Swin configurations, read where MODEL.BACKBONE.NAME is "D2SwinTransformer".
    cfg.MODEL.SWIN = CfgNode(new_allowed=True)


def _add_matcher_and_loss(cfg: CfgNode) -> None:
    model = cfg.MODEL.MASK_DINO
    # Hybrid matching (section 3.6): weights of the costs; 0 leaves a cost out.
    matcher = model.MATCHER = CfgNode()
    matcher.CLASS_WEIGHT = 4.0
    matcher.L1_WEIGHT = 5.0
    matcher.GIOU_WEIGHT = 2.0
    matcher.MASK_BCE_WEIGHT = 5.0
    matcher.MASK_DICE_WEIGHT = 5.0
    # Decoupled box prediction: the box cost of "stuff" is the mean over "things".
    matcher.DECOUPLE_STUFF_BOXES = True
    # Stable matching (arXiv 2304.04742): the class cost counts a probability less where the box
    # does not fit.
    matcher.POSITION_MODULATED = False

    # Losses (appendix B.1): weights; 0 leaves a loss out.
    loss = model.LOSS = CfgNode()
    loss.CLASS_WEIGHT = 4.0
    loss.L1_WEIGHT = 5.0
    loss.GIOU_WEIGHT = 2.0
    loss.MASK_BCE_WEIGHT = 5.0
    loss.MASK_DICE_WEIGHT = 5.0
    loss.CLASSIFICATION = "focal"  # or "cross_entropy" (softmax with one more class, "no object")
    loss.NO_OBJECT_WEIGHT = 0.1  # weight of "no object" with cross-entropy
    # Stable matching: the focal loss asks a matched query for the IoU of its box instead of 1.
    loss.POSITION_SUPERVISED = False
    # Decoupled box prediction: no box loss for "stuff".
    loss.DECOUPLE_STUFF_BOXES = True
    loss.DEEP_SUPERVISION = True  # losses at every decoder layer, not only at the last
    loss.SUPERVISE_INITIAL = True  # losses for the queries before the first decoder layer
    loss.NUM_POINTS = 12544  # points at which masks are compared, in matching and in each mask loss
    loss.OVERSAMPLE_RATIO = 3.0  # candidates per point of the mask losses
    loss.IMPORTANCE_RATIO = 0.75  # share of the points that are the most uncertain candidates


def _add_test(cfg: CfgNode) -> None:
    test = cfg.MODEL.MASK_DINO.TEST = CfgNode()
    test.INSTANCE_ON = True
    test.PANOPTIC_ON = False
    test.SEMANTIC_ON = False
    # Decoder layer whose prediction is used: -1 is the last, 0 the prediction before the first
    # layer (Table 8).
    test.DECODER_LAYER = -1
    test.SCORE_THRESHOLD = 0.0  # instances with a lower score are left out
    # Multiply an instance's class score by the mean of its mask's probabilities over its
    # foreground.
    test.MASK_SCORING = True
    # Masks of objects end at the predicted box, enlarged by this factor (1.2: by a fifth); 0: they
    # do not. Boxes are learned long before masks tell objects apart: for models that saw little.
    test.MASK_LIMIT = 0.0
    test.PANOPTIC_SCORE_THRESHOLD = 0.25  # queries below take no part in the panoptic merge
    test.PANOPTIC_OVERLAP_THRESHOLD = 0.8  # share of a segment's own area that must be left
    # Resize masks to the output before the class maps are summed up: more exact at borders, slower.
    # False: only where instances or panoptic segments are asked for too.
    test.RESIZE_BEFORE_SUM = False
    test.TEMPERATURE = 0.06  # of the softmax over sigmoid class scores (panoptic, semantic)
    # How the network computes in evaluation and prediction: "float32"; "tf32" (TensorFloat-32, on
    # GPUs from Ampere on); "bfloat16" or "float16" (mixed precision; boxes and scores stay
    # float32); or "auto": on GPUs bfloat16 where they have it, else float16, and float32 everywhere
    # else. Published numbers were measured in float32: half precision may change their last digit.
    test.PRECISION = "auto"
    # On a GPU: replay the network as one CUDA graph for each size of image that comes again. The
    # same numbers, in less time; memory for the results of two dozen sizes.
    test.CUDA_GRAPHS = True


def _add_input(cfg: CfgNode) -> None:
    # "instance", "panoptic", "semantic", or a name in MAPPER_REGISTRY
    # (maskdino.integration.extensions): what the training mapper reads (maskdino.data).
    cfg.INPUT.DATASET_MAPPER_NAME = "instance"
    # Large-scale jitter: resize by a random factor, then crop or pad to SIZE (height, width), in
    # pixels.
    cfg.INPUT.LSJ = CfgNode()
    cfg.INPUT.LSJ.ENABLED = True  # False: detectron2's INPUT.MIN_SIZE_TRAIN and INPUT.CROP
    cfg.INPUT.LSJ.SIZE = [1024, 1024]
    cfg.INPUT.LSJ.MIN_SCALE = 0.1
    cfg.INPUT.LSJ.MAX_SCALE = 2.0
    cfg.INPUT.COLOR_AUG_SSD = False  # SSD's colour jitter
    # Names in AUGMENTATION_REGISTRY: applied in training, after resizing and cropping.
    cfg.INPUT.AUGMENTATIONS = []
    # Copy-paste (arXiv 2012.07177): objects of another image, augmented likewise, are laid over an
    # image, at the place where they are; boxes, where there are no masks.
    pasting = cfg.INPUT.COPY_PASTE = CfgNode()
    pasting.PROBABILITY = 0.0  # share of the images; 0: off
    pasting.MAX_OBJECTS = 100  # up to so many, and no more than there are: the number is drawn
    pasting.MIN_VISIBLE = 0.1  # objects of which a smaller share is left visible are dropped
    # Mosaic: four images, side by side, around a center that is drawn, in the size INPUT.LSJ.SIZE.
    mosaic = cfg.INPUT.MOSAIC = CfgNode()
    mosaic.PROBABILITY = 0.0  # share of the images; 0: off
    # In place of those of INPUT.LSJ: at 1, an image fits into the whole mosaic, at 0.5 into an even
    # quarter of it.
    mosaic.MIN_SCALE = 0.4
    mosaic.MAX_SCALE = 1.0
    mosaic.MIN_VISIBLE = 0.1
    # Semantic maps: crops are drawn anew, up to ten times, where one class covers more than this
    # share; 1 is off.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # Share of the images for DATALOADER.SAMPLER_TRAIN RandomSubsetTrainingSampler; detectron2 reads
    # it without having it.
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0
    # INPUT.RANDOM_FLIP (detectron2) is "horizontal", "vertical", "none", or here also "both" and
    # "dihedral" (both, and turns by 90 degrees).


def _add_solver(cfg: CfgNode) -> None:
    cfg.SOLVER.OPTIMIZER = "ADAMW"  # or "SGD"
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1  # factor of the learning rate of the backbone
    # Factor of the learning rate per block of a plain vision transformer, counted from its end.
    cfg.SOLVER.LAYER_DECAY = 1.0
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0  # weight decay of embeddings and position tables
    # SOLVER.CLIP_GRADIENTS.CLIP_TYPE may also be "full_model": the norm of the whole model's
    # gradient.
    # Batches of IMS_PER_BATCH / ACCUMULATION_STEPS images per optimizer step.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Compile backbone, encoder layers and decoder layers (torch.compile) in training.
    cfg.SOLVER.COMPILE = False
    # On a GPU, replay the network of a step as CUDA graphs (not matching and losses): for images of
    # few sizes, as those of INPUT.LSJ; noised queries are filled up to DENOISING.NUM_QUERIES.
    cfg.SOLVER.CUDA_GRAPHS = False
    cfg.SOLVER.EMA = CfgNode()
    # Keep, evaluate and save an exponential moving average of the weights.
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.9998
    # Keep the weights of the best evaluation in OUTPUT_DIR/best. An evaluation is judged by METRIC,
    # as "segm/AP"; with several datasets in DATASETS.TEST, as "DATASET/segm/AP". Empty: off.
    cfg.SOLVER.BEST = CfgNode()
    cfg.SOLVER.BEST.METRIC = ""
    cfg.SOLVER.BEST.LOWER_IS_BETTER = False  # for metrics that are errors
    # Training ends after this number of evaluations in a row without a better one; 0: never.
    cfg.SOLVER.BEST.PATIENCE = 0


def _add_evaluation(cfg: CfgNode) -> None:
    # Names in EVALUATOR_REGISTRY: they judge every dataset, beside the evaluators of its type.
    cfg.TEST.EVALUATORS = []
    # COCO's numbers: "auto" takes the fastest library that is installed and computes the numbers of
    # pycocotools (hotcoco, then faster-coco-eval), "pycocotools" itself.
    cfg.TEST.COCO_EVALUATOR = "auto"
    # Evaluate images in overlapping slices of SIZE x SIZE pixels, whose results are joined to those
    # of the whole image (docs/large_images.md); 0: as they are. The model reads each slice as it
    # would an image, and keeps TEST.DETECTIONS_PER_IMAGE objects of it.
    slices = cfg.TEST.SLICES = CfgNode()
    slices.SIZE = 0
    slices.OVERLAP = 0.2  # least share of a slice that the next one sees again
    slices.BATCH_SIZE = 1  # slices that the model reads at one time


def _add_log(cfg: CfgNode) -> None:
    log = cfg.LOG = CfgNode()
    # Where scalars go beside the console and metrics.json: "tensorboard", "wandb", "mlflow", or
    # names in WRITER_REGISTRY.
    log.WRITERS = ["tensorboard"]
    log.PROJECT = "maskdino"  # project of W&B, experiment of MLflow
    log.RUN = ""  # name of the run there; empty: the name of the folder OUTPUT_DIR
