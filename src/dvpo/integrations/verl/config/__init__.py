"""Hydra configs of the plug-in; a package, so that Hydra finds them wherever dvpo is installed."""
