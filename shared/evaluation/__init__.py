"""Detections, and COCO's metrics of them."""
