"""Adapters over transformers, by its public names."""

from transformers import is_torch_available

from shared.errors import UserError


def check_torch() -> None:
    """Raises UserError if torch is older than transformers needs, which then has no models."""
    if not is_torch_available():
        raise UserError(
            "environment.image: transformers needs torch 2.6 or newer. Fix: give an image with it, such as "
            "pytorch/pytorch:2.6.0-cuda12.4-cudnn9-runtime"
        )
