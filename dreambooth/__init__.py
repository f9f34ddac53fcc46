"""DreamBooth: teach a text-to-image model one subject from a few photos. The method, free of any orchestrator."""

__version__ = "0.1.0"
