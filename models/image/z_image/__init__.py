"""Z-Image: one stream of image and caption tokens, a Qwen3 that reads the caption, and a convolutional autoencoder."""
