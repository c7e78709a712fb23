"""A student that fails in the tenth training batch of the rank that BREAK_RANK names."""

import os

import models


def build(num_classes: int):
    """A ConvNetW32 of `models`."""
    model = models.build("ConvNetW32", num_classes, 32)
    if os.environ.get("BREAK_RANK") == os.environ.get("RANK", "none"):
        batches = []

        def count(module, inputs):
            batches.append(module.training)
            if sum(batches) == 10:
                raise ValueError("broken on purpose")

        model.register_forward_pre_hook(count)
    return model
