"""The plugin host: what is installed, and how to make it by name."""

from katcore.plugin.hookspecs import hookimpl
from katcore.plugin.offer import Offer
from katcore.plugin.plugins import Plugins

__all__ = ["Offer", "Plugins", "hookimpl"]
