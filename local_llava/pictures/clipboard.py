"""The picture on the clipboard of a desktop.

Knows the three kinds of desktop: Windows and macOS by Pillow, Linux by `wl-paste` (Wayland) or `xclip` (X11).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageGrab

from local_llava.errors import ImageError

NAME = "clipboard:"
"""What a user types for it."""

MAX_SECONDS = 10.0
"""Most seconds that the program which owns the clipboard may take to hand it over."""

_EMPTY = "clipboard: no picture on it; copy a picture, not its name"
# variable that tells the desktop, Debian package, command
_LINUX = (
    ("WAYLAND_DISPLAY", "wl-clipboard", ("wl-paste", "--no-newline", "--type", "image/png")),
    ("DISPLAY", "xclip", ("xclip", "-selection", "clipboard", "-target", "image/png", "-out")),
)


def read_clipboard() -> bytes | Path | Image.Image:
    """What is on the clipboard: a picture, its file, or the file that was copied.

    Raises:
        ImageError: No desktop, no program to ask it, no picture, or no answer in time.
    """
    if sys.platform in ("win32", "darwin"):
        return _by_pillow()
    return _by_command()


def _by_pillow() -> Path | Image.Image:
    try:
        found = ImageGrab.grabclipboard()
    except (OSError, ValueError, SyntaxError) as e:
        raise ImageError("clipboard: cannot be read") from e
    if isinstance(found, list):
        if len(found) != 1:
            raise ImageError(f"clipboard: {len(found)} files are on it; copy one")
        return Path(found[0])
    if found is None:
        raise ImageError(_EMPTY)
    return found


def _by_command() -> bytes:
    desktops = [(package, command) for variable, package, command in _LINUX if os.environ.get(variable)]
    if not desktops:
        raise ImageError("clipboard: there is no desktop here (neither WAYLAND_DISPLAY nor DISPLAY is set)")
    installed = [command for _, command in desktops if shutil.which(command[0])]
    if not installed:
        package, command = desktops[0]
        raise ImageError(f"clipboard: {command[0]} is needed to read it: apt install {package}")
    try:
        done = subprocess.run(installed[0], stdin=subprocess.DEVNULL, capture_output=True, timeout=MAX_SECONDS)
    except subprocess.TimeoutExpired as e:
        raise ImageError(f"clipboard: no answer within {MAX_SECONDS:g} seconds") from e
    except OSError as e:
        raise ImageError(f"clipboard: {installed[0][0]} cannot be started: {e.strerror}") from e
    if any(words in done.stderr for words in (b"open display", b"Failed to connect")):
        raise ImageError(f"clipboard: {installed[0][0]} cannot reach the desktop")
    if done.returncode != 0 or not done.stdout:
        raise ImageError(_EMPTY)
    return done.stdout
