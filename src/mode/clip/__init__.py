"""What a CLIP is: model and tokenizer, image preprocessing, encoding of images and texts, device."""
