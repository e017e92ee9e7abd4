"""Images in, shards on disk, batches out.

Nothing is imported here: `shards`, `pre_draw` and `loader` import streaming, which takes seconds.
"""
