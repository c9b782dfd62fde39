"""What is EfficientDet's own: adapters over the effdet and timm packages."""
