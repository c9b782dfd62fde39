"""Adapters over effdet: adapters over the effdet and timm packages."""
