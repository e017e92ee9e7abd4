"""Images in, shards on disk, batches out.

Nothing is imported here: `shards`, `pre_draw` and `loader` bring streaming along, which takes seconds.
"""
