"""What a run leaves behind and shows meanwhile: folder, metrics, console, exports.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["console", "export", "metrics", "run_folder"]
