"""A trained model without DeepSpeed: loading it, writing text with it, serving it in a browser."""
