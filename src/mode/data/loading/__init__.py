"""From an index to batches of pixels: decoding, augmentation, the order of samples, reading ahead."""
