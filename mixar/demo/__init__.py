"""The demo: the whole method on small images."""
