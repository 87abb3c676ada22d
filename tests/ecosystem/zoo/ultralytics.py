"""The models of ultralytics for detection, segmentation, poses and classification."""

from ultralytics.nn import tasks

KINDS = {
    "yolov3-tiny": tasks.DetectionModel,
    "yolov5n": tasks.DetectionModel,
    "yolov8n": tasks.DetectionModel,
    "yolov8n-seg": tasks.SegmentationModel,
    "yolov8n-pose": tasks.PoseModel,
    "yolov8n-cls": tasks.ClassificationModel,
    "yolov9t": tasks.DetectionModel,
    "yolov10n": tasks.DetectionModel,
    "yolo11n": tasks.DetectionModel,
    "yolo12n": tasks.DetectionModel,
    "yolo26n": tasks.DetectionModel,
}

MODELS = {
    name: (lambda name=name, kind=kind: kind(f"{name}.yaml", verbose=False), (3, 64, 64))
    for name, kind in KINDS.items()
}
