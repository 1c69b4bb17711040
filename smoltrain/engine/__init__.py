"""DeepSpeed: the wrapped model, gradient reduction, the optimizer, its shards and how they are resharded."""
