"""Models from the Hugging Face Hub: `local-llava pull`.

`prepare` decides what is to be had; `gguf` and `checkpoint` are the two ways to have it, `target` where it goes.
`files` knows which files of a repository are needed, `download` how one gets here whole, `arriving` the tensors of
those that are still on their way, and `hub_api` the Hub itself.
"""
