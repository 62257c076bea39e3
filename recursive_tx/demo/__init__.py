"""The small model that ships, so that everything runs offline.

The directory is in Hugging Face layout; README.md says how it was made.
"""
