"""Code books, the quantized tensor and the checkpoint layout."""
