"""The local server: the engine behind OpenAI's and Ollama's HTTP APIs, and a page for people.

`app` puts it together. What a request means is read by `openai_wire`, `responses_wire` and `ollama_wire`, which know no
HTTP; `backend` says what is asked of the models, `engine_process` and `model_manager` do it; `guard` keeps strangers
out.
"""
