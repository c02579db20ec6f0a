"""What the general rules cannot know of models that read images, sound or time series, by model_type."""

from __future__ import annotations

from typing import Any

# Two stages of which the second is one window.
_SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_FORECAST: dict[str, Any] = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2, 3]}

# Windows that are no larger than the last of four stages.
_SWIN_BACKBONE: dict[str, Any] = {
    "backbone_config": {
        "image_size": 64,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1, 2, 1],
        "num_heads": [2, 4, 4, 4],
        "window_size": 2,
    }
}
_THREE_AXES: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
}

MODALITY_OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": {**_FORECAST, "label_length": 4, "moving_average": 5},
    "informer": _FORECAST,
    "time_series_transformer": _FORECAST,
    "donut-swin": _SWIN,
    "maskformer-swin": _SWIN,
    "swin": _SWIN,
    "swinv2": _SWIN,
    "swin2sr": {**_SWIN, "image_size": 16, "patch_size": 1, "num_heads": [2, 2]},
    "grounding-dino": _SWIN_BACKBONE,
    "mask2former": _SWIN_BACKBONE,
    "maskformer": _SWIN_BACKBONE,
    "mm-grounding-dino": _SWIN_BACKBONE,
    "oneformer": _SWIN_BACKBONE,
    "csm": {"codec_config": {"upsample_groups": 64}},
    "mimi": {"upsample_groups": 64},
    "mimi_decoder": {"upsample_groups": 64},
    "paddleocr_vl": {"text_config": _THREE_AXES},
    "qwen2_5_omni": {"thinker_config": {"text_config": _THREE_AXES}},
    "qwen2_5_omni_thinker": {"text_config": _THREE_AXES},
    # What released checkpoints have, and the class's defaults leave out.
    "beit": {"use_relative_position_bias": True},
    "data2vec-vision": {"use_relative_position_bias": True},
}

# Detectors whose default backbone is of another library: the stages of a ResNet that they read.
CONVOLUTIONAL: dict[str, list[str]] = {
    "conditional_detr": ["stage4"],
    "dab-detr": ["stage4"],
    "deformable_detr": ["stage2", "stage3", "stage4"],
    "detr": ["stage4"],
    "omdet-turbo": ["stage2", "stage3", "stage4"],
    "table-transformer": ["stage4"],
}
