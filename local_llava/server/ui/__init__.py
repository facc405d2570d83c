"""The page at `/`: a chat with pictures, for people. An optional extra, `ui`.

It is built with NiceGUI (Vue and Quasar, driven from Python), not with Gradio, which more people know:

- Gradio writes every picture into a file on the server, and a conversation in the browser names that file. Then either
  the files outlive the server, or the conversations lose their pictures. Here a picture is kept in the browser alone,
  and is in the server's memory while an answer about it is given.
- Gradio's app has some sixty routes beside the page: files by path, a proxy, recordings, editing of the app's source.
  Of NiceGUI three prefixes are let through, and it serves no files but its own.
- Gradio 6.31 needs Pillow below 13 and pandas; NiceGUI shares most of what it needs with the server.

`mount` is the one thing that the server calls. `conversation`, `preferences`, `answering` and `rendering` know no
NiceGUI; `page`, `layout`, `turns` and `dialogs` are made of it, and `mounting` lets it in; `keeper` is what runs in the
browser: where pictures come from, and what is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

    from local_llava.server.backend import Backend
    from local_llava.server.settings import ServerSettings

__all__ = ["mount", "placeholder_html"]


def mount(app: FastAPI, backend: Backend, settings: ServerSettings) -> None:
    """Serve the page at `/`. Call it when all other routes are there; NiceGUI has one app in a process.

    Raises:
        ImportError: The extra `ui` is not installed; `placeholder_html` says so to people.
    """
    from local_llava.server.ui.mounting import mount_page

    mount_page(app, backend, settings)


def placeholder_html() -> str:
    """What is at `/` without the extra: how to install it, and what is there without it."""
    return """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>local-llava</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:40rem;margin:10vh auto;padding:0 1rem}</style>
</head>
<body>
<main>
<h1>local-llava</h1>
<p>The server runs. Its page is an extra that is not installed; this installs it, and then start the server anew:</p>
<pre><code>pip install "local-llava[ui]"</code></pre>
<p>The APIs of OpenAI and Ollama need no page; <a href="/docs">/docs</a> describes them.</p>
</main>
</body>
</html>
"""
