"""Prompts, and the engines that sample responses."""
