"""Folders, metrics and cards on their way to the Hub and back. Knows no tensor and nothing else of the package."""
