"""Writes a finished output as a dataset for training: COCO, YOLO, Pascal VOC, or label masks."""
