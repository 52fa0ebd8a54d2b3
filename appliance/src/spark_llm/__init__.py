"""spark-llm: serves language models on an NVIDIA DGX Spark."""

__version__ = "0.1.0"
