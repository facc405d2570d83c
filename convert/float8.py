from __future__ import annotations

from collections.abc import Mapping

from local_llava.convert.source import SourceTensor


def with_scales(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    return dict(tensors)
