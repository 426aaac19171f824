"""MindFormers' side: its names, files and layouts, its models and its trainer."""
