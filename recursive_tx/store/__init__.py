"""A model in a directory: opened, converted, saved, exported."""

