"""The models that are trained: timm models from a config, patched for sub-model augmentation."""
