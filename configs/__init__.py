"""Recipes: ml-collections files, `get_config(arg)` each; `common` is theirs."""
