"""Annotations, images, samples and batches."""
