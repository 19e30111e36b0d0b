"""SiliconLM: train a language model on the computer on your desk."""

__version__ = "0.1.0"
